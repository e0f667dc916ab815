//! A transformer's shape as the planner needs it: dense, mixture of experts or encoder-decoder.
//!
//! Dimension letters: `L` layers, `D` residual width, `F` feed-forward width, `H` query heads, `G`
//! key-value heads, `E` head width, `V` vocabulary, `T` sequence length, `B` sequences.

use drumline_spec::{Activation, ModelConfig};
use serde::{Deserialize, Serialize};

/// Which details a family of models has: norms, biases, positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Learned positions, LayerNorm, biases everywhere.
    Gpt,
    /// Rotary positions, RMSNorm, gated feed-forward, no biases.
    Llama,
    /// As Llama, with biases on queries, keys and values.
    Qwen,
    /// Rotary positions, LayerNorm, biases; attention and feed-forward in parallel.
    Neox,
    /// Rotary positions, LayerNorm without biases in the matrices, parallel blocks.
    Palm,
    /// A decoder with relative positions, no biases.
    T5Decoder,
    /// Encoder and decoder with relative positions, no biases.
    T5,
}

/// How positions enter the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Position {
    /// A learned vector per position.
    Learned,
    /// Rotary; no parameters.
    Rotary,
    /// Learned bias per bucket of distance and head (negligible parameters).
    Relative,
    /// Fixed linear bias; no parameters.
    Alibi,
}

/// A mixture of experts in place of the feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Moe {
    /// Routed experts per layer.
    pub experts: u32,
    /// Routed experts that each token visits.
    pub top_k: u32,
    /// Inner width of one expert.
    pub expert_ffn: u32,
    /// Experts that every token visits, of the same width.
    #[serde(default)]
    pub shared_experts: u32,
    /// First layers that keep a dense feed-forward network of width `F`.
    #[serde(default)]
    pub dense_layers: u32,
}

/// Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mla {
    /// Width of the compressed query; 0: queries are not compressed.
    pub q_rank: u32,
    /// Width of the compressed keys and values.
    pub kv_rank: u32,
    /// Rotary part of a head.
    pub rope_dim: u32,
    /// Part of a head without positions.
    pub nope_dim: u32,
    /// Width of a value head.
    pub value_dim: u32,
}

/// The shape of a transformer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Its name in the catalogue, or the file's.
    pub name: String,
    /// Decoder layers, L.
    pub layers: u32,
    /// Encoder layers; 0 for a decoder.
    pub encoder_layers: u32,
    /// Residual width, D.
    pub hidden: u32,
    /// Feed-forward width, F.
    pub ffn: u32,
    /// Query heads, H.
    pub heads: u32,
    /// Key-value heads, G.
    pub kv_heads: u32,
    /// Head width, E.
    pub head_dim: u32,
    /// Vocabulary, V.
    pub vocab: u32,
    /// Greatest sequence length.
    pub context: u32,
    /// The family's details.
    pub family: Family,
    /// Whether the feed-forward network is gated (three matrices).
    pub gated: bool,
    /// Whether linear layers have biases.
    pub bias: bool,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Positions.
    pub position: Position,
    /// Whether the output projection is the embedding, transposed.
    pub tie_embeddings: bool,
    /// Mixture of experts.
    pub moe: Option<Moe>,
    /// Latent attention.
    pub mla: Option<Mla>,
    /// Fields of the shape that nobody has published.
    pub assumed: Vec<String>,
    /// Where the shape comes from.
    pub source: String,
}

impl Model {
    /// Returns whether norms carry a bias (LayerNorm) or only a gain (RMSNorm).
    #[must_use]
    pub fn layer_norm(&self) -> bool {
        matches!(self.family, Family::Gpt | Family::Neox | Family::Palm)
    }

    /// Returns all layers, encoder and decoder.
    #[must_use]
    pub fn total_layers(&self) -> u32 {
        self.layers + self.encoder_layers
    }

    /// Returns the layers whose feed-forward network is a mixture of experts.
    #[must_use]
    pub fn moe_layers(&self) -> u32 {
        self.moe.map_or(0, |moe| self.layers.saturating_sub(moe.dense_layers))
    }

    /// Returns the parameters of one attention block: `D E (H + 2 G) + H E D` and biases.
    #[must_use]
    pub fn attention_params(&self) -> f64 {
        let [d, h, g, e] = [self.hidden, self.heads, self.kv_heads, self.head_dim].map(f64::from);
        if let Some(mla) = self.mla {
            let [q, kv, rope, nope, value] =
                [mla.q_rank, mla.kv_rank, mla.rope_dim, mla.nope_dim, mla.value_dim].map(f64::from);
            let query =
                if q > 0.0 { d * q + q * h * (nope + rope) + q } else { d * h * (nope + rope) };
            return query + d * (kv + rope) + kv + kv * h * (nope + value) + h * value * d;
        }
        let qkv_bias = if self.qkv_bias { e * (h + 2.0 * g) } else { 0.0 };
        let out_bias = if self.bias { d } else { 0.0 };
        d * e * (h + 2.0 * g) + h * e * d + qkv_bias + out_bias
    }

    /// Returns the parameters of one dense feed-forward network.
    #[must_use]
    pub fn ffn_params(&self) -> f64 {
        let [d, f] = [self.hidden, self.ffn].map(f64::from);
        self.ffn_matrices() * d * f + if self.bias { f + d } else { 0.0 }
    }

    /// Returns the parameters of one expert; 0 without a mixture.
    #[must_use]
    pub fn expert_params(&self) -> f64 {
        self.moe.map_or(0.0, |moe| {
            let [d, f] = [self.hidden, moe.expert_ffn].map(f64::from);
            self.ffn_matrices() * d * f + if self.bias { f + d } else { 0.0 }
        })
    }

    /// Returns 3 for a gated feed-forward network, else 2.
    #[must_use]
    pub fn ffn_matrices(&self) -> f64 {
        if self.gated { 3.0 } else { 2.0 }
    }

    fn norm_params(&self) -> f64 {
        let d = f64::from(self.hidden);
        if self.layer_norm() { 2.0 * d } else { d }
    }

    /// Returns the parameters of one layer outside routed experts: attention, norms, and the dense
    /// network or the shared experts and the router. Averaged over dense and mixture layers.
    #[must_use]
    pub fn layer_params_without_routed(&self) -> f64 {
        let norms = 2.0 * self.norm_params();
        let mut attention = self.attention_params();
        if self.encoder_layers > 0 {
            // Each decoder layer attends twice: to itself and to the encoder, with a third norm.
            let decoder = f64::from(self.layers) / f64::from(self.total_layers());
            attention += decoder * (self.attention_params() + self.norm_params());
        }
        let Some(moe) = self.moe else {
            return attention + norms + self.ffn_params();
        };
        let share = f64::from(self.moe_layers()) / f64::from(self.layers.max(1));
        let router = f64::from(self.hidden) * f64::from(moe.experts);
        attention
            + norms
            + (1.0 - share) * self.ffn_params()
            + share * (router + f64::from(moe.shared_experts) * self.expert_params())
    }

    /// Returns the parameters of one layer's routed experts, averaged over all layers.
    #[must_use]
    pub fn layer_routed_params(&self) -> f64 {
        self.moe.map_or(0.0, |moe| {
            let share = f64::from(self.moe_layers()) / f64::from(self.layers.max(1));
            share * f64::from(moe.experts) * self.expert_params()
        })
    }

    /// Returns the parameters of the token embedding and of learned positions.
    #[must_use]
    pub fn embedding_params(&self) -> f64 {
        let [d, v, t] = [self.hidden, self.vocab, self.context].map(f64::from);
        v * d + if self.position == Position::Learned { t * d } else { 0.0 }
    }

    /// Returns the parameters of an output projection of its own; 0 where it is tied.
    #[must_use]
    pub fn head_params(&self) -> f64 {
        if self.tie_embeddings { 0.0 } else { f64::from(self.vocab) * f64::from(self.hidden) }
    }

    /// Counts all parameters, a tied embedding once.
    #[must_use]
    pub fn parameters(&self) -> f64 {
        let final_norms = if self.encoder_layers > 0 { 2.0 } else { 1.0 } * self.norm_params();
        f64::from(self.total_layers())
            * (self.layer_params_without_routed() + self.layer_routed_params())
            + self.embedding_params()
            + self.head_params()
            + final_norms
    }

    /// Counts the parameters that one token uses: all but the experts it does not visit.
    #[must_use]
    pub fn active_parameters(&self) -> f64 {
        let Some(moe) = self.moe else { return self.parameters() };
        let idle = f64::from(moe.experts.saturating_sub(moe.top_k)) * self.expert_params();
        self.parameters() - f64::from(self.moe_layers()) * idle
    }

    /// Counts the weights of one layer's matrices that a token is multiplied with.
    #[must_use]
    pub fn layer_matmul_params(&self) -> f64 {
        let Some(moe) = self.moe else {
            let decoder = f64::from(self.layers) / f64::from(self.total_layers().max(1));
            let cross =
                if self.encoder_layers > 0 { decoder * self.attention_params() } else { 0.0 };
            return self.attention_params() + self.ffn_params() + cross;
        };
        let share = f64::from(self.moe_layers()) / f64::from(self.layers.max(1));
        let experts = f64::from(moe.top_k + moe.shared_experts) * self.expert_params()
            + f64::from(self.hidden) * f64::from(moe.experts);
        self.attention_params() + (1.0 - share) * self.ffn_params() + share * experts
    }

    /// Returns the width over which scores are computed plus that of the values, `2 H E` without
    /// latent attention.
    #[must_use]
    pub fn score_and_value_width(&self) -> f64 {
        let h = f64::from(self.heads);
        self.mla.map_or(2.0 * h * f64::from(self.head_dim), |mla| {
            h * f64::from(mla.nope_dim + mla.rope_dim + mla.value_dim)
        })
    }

    /// Counts a forward pass's operations for one token by the convention of Narayanan et al.
    /// 2021, appendix: 2 per matrix weight, attention over all `T` positions (the causal half is
    /// not taken off), and the logits. A backward pass is twice that.
    ///
    /// For a GPT this is `24 L D^2 (1 + T / (6 D) + V / (12 L D))`.
    #[must_use]
    pub fn forward_flops_per_token(&self, sequence: f64) -> f64 {
        let layers = f64::from(self.total_layers());
        layers * self.layer_forward_flops_per_token(sequence) + self.logit_flops_per_token()
    }

    /// Counts one layer's share of [`Model::forward_flops_per_token`].
    #[must_use]
    pub fn layer_forward_flops_per_token(&self, sequence: f64) -> f64 {
        let biases = if self.bias { 1.0 } else { 0.0 };
        let [d, f, h, g, e] =
            [self.hidden, self.ffn, self.heads, self.kv_heads, self.head_dim].map(f64::from);
        let bias_params = biases * (d + if self.moe.is_some() { 0.0 } else { f + d })
            + if self.qkv_bias { e * (h + 2.0 * g) } else { 0.0 };
        2.0 * (self.layer_matmul_params() - bias_params)
            + 2.0 * sequence * self.score_and_value_width()
    }

    /// Counts the output projection's forward operations for one token, `2 D V`.
    #[must_use]
    pub fn logit_flops_per_token(&self) -> f64 {
        2.0 * f64::from(self.hidden) * f64::from(self.vocab)
    }

    /// Counts model operations of one token's forward and backward pass, without recomputation.
    #[must_use]
    pub fn train_flops_per_token(&self, sequence: f64) -> f64 {
        3.0 * self.forward_flops_per_token(sequence)
    }

    /// Returns the numbers of the key-value cache that one token adds in one layer.
    #[must_use]
    pub fn kv_values_per_token_layer(&self) -> f64 {
        self.mla.map_or(2.0 * f64::from(self.kv_heads) * f64::from(self.head_dim), |mla| {
            f64::from(mla.kv_rank + mla.rope_dim)
        })
    }
}

impl From<&ModelConfig> for Model {
    fn from(config: &ModelConfig) -> Self {
        let llama = config.family == drumline_spec::Family::Llama;
        Self {
            name: "manifest".to_owned(),
            layers: config.layers,
            encoder_layers: 0,
            hidden: config.hidden,
            ffn: config.ffn,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: if config.heads == 0 { 0 } else { config.head_dim() },
            vocab: config.vocab,
            context: config.context,
            family: if llama { Family::Llama } else { Family::Gpt },
            gated: config.activation() == Activation::SwiGlu,
            bias: config.has_bias(),
            qkv_bias: config.has_bias(),
            position: if llama { Position::Rotary } else { Position::Learned },
            tie_embeddings: config.tie_embeddings,
            moe: None,
            mla: None,
            assumed: Vec::new(),
            source: "TrainingJob manifest".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::Catalogue;

    #[test]
    fn flops_follow_the_published_formula() {
        // Narayanan et al. 2021, equation 3 (times 1, forward only): 24 B s l h^2 (1 + s/6h + V/12lh).
        let model = Catalogue::builtin().model("megatron-145.6b").unwrap();
        let (l, h, s, v) = (80.0_f64, 12288.0_f64, 2048.0, 51200.0);
        let formula = 24.0 * l * h * h * (1.0 + s / (6.0 * h) + v / (12.0 * l * h));
        let counted = model.forward_flops_per_token(s);
        assert!((counted / formula - 1.0).abs() < 1e-9, "{counted} {formula}");
    }

    #[test]
    fn the_manifest_and_the_planner_count_the_same_parameters() {
        let config = ModelConfig {
            family: drumline_spec::Family::Llama,
            layers: 32,
            hidden: 4096,
            ffn: 11_008,
            heads: 32,
            kv_heads: 32,
            vocab: 32_000,
            context: 4096,
            norm_epsilon: 1e-5,
            rope_theta: 10_000.0,
            tie_embeddings: false,
        };
        assert_eq!(Model::from(&config).parameters() as u64, config.parameters());
    }
}
