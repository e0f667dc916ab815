//! A catalogue file as it is typed.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Calibration, Network};
use crate::dtype::Dtype;
use crate::model::{Family, Mla, Model, Moe, Position};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CatalogueFile {
    #[serde(default)]
    pub(super) generation: Vec<GenerationEntry>,
    #[serde(default)]
    pub(super) gpu: Vec<GpuEntry>,
    #[serde(default)]
    pub(super) network: Vec<Network>,
    #[serde(default)]
    pub(super) model: Vec<ModelEntry>,
}

#[derive(Deserialize)]
pub(super) struct GenerationEntry {
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) calibration: Calibration,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct GpuEntry {
    pub(super) name: String,
    #[serde(default)]
    pub(super) aliases: Vec<String>,
    pub(super) generation: String,
    pub(super) memory_gb: f64,
    pub(super) memory_gbs: f64,
    pub(super) peak_tflops: BTreeMap<Dtype, f64>,
    pub(super) link_gbs: f64,
    pub(super) link_domain: u32,
    pub(super) sms: u32,
    pub(super) power_w: f64,
    pub(super) price_per_hour: f64,
    #[serde(default)]
    pub(super) calibration: Option<Calibration>,
    pub(super) source: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ModelEntry {
    pub(super) name: String,
    #[serde(default)]
    pub(super) aliases: Vec<String>,
    pub(super) layers: u32,
    #[serde(default)]
    pub(super) encoder_layers: u32,
    pub(super) hidden: u32,
    pub(super) ffn: u32,
    pub(super) heads: u32,
    #[serde(default)]
    pub(super) kv_heads: Option<u32>,
    #[serde(default)]
    pub(super) head_dim: Option<u32>,
    pub(super) vocab: u32,
    pub(super) context: u32,
    pub(super) family: Family,
    #[serde(default)]
    pub(super) gated: Option<bool>,
    #[serde(default)]
    pub(super) bias: Option<bool>,
    #[serde(default)]
    pub(super) position: Option<Position>,
    #[serde(default)]
    pub(super) tie_embeddings: bool,
    #[serde(default)]
    pub(super) moe: Option<Moe>,
    #[serde(default)]
    pub(super) mla: Option<Mla>,
    /// The published total, for the reader and the test.
    #[serde(default)]
    pub(super) parameters: Option<f64>,
    #[serde(default)]
    pub(super) assumed: Vec<String>,
    pub(super) source: String,
}

impl ModelEntry {
    /// Fills in what the family implies.
    pub(super) fn into_model(self) -> Model {
        let family = self.family;
        let bias = self.bias.unwrap_or(matches!(family, Family::Gpt | Family::Neox));
        Model {
            layers: self.layers,
            encoder_layers: self.encoder_layers,
            hidden: self.hidden,
            ffn: self.ffn,
            heads: self.heads,
            kv_heads: self.kv_heads.unwrap_or(self.heads),
            head_dim: self.head_dim.unwrap_or(self.hidden / self.heads.max(1)),
            vocab: self.vocab,
            context: self.context,
            family,
            gated: self.gated.unwrap_or(matches!(family, Family::Llama | Family::Qwen)),
            bias,
            qkv_bias: bias || family == Family::Qwen,
            position: self.position.unwrap_or(match family {
                Family::Gpt => Position::Learned,
                Family::T5 | Family::T5Decoder => Position::Relative,
                _ => Position::Rotary,
            }),
            tie_embeddings: self.tie_embeddings,
            moe: self.moe,
            mla: self.mla,
            assumed: self.assumed,
            source: self.source,
            name: self.name,
        }
    }
}
