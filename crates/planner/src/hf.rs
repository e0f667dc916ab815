//! Reads a model's shape from a Hugging Face `config.json`, or refuses the architecture by name.

use serde_json::{Map, Value};

use crate::catalogue::check_model;
use crate::error::{PlanError, nearest_names};
use crate::model::{Family, Mla, Model, Moe, Position};

/// The `model_type`s whose every dimension the planner knows how to read.
pub const COVERED: [&str; 16] = [
    "gpt2",
    "gpt_neox",
    "gpt_neo",
    "opt",
    "bloom",
    "falcon",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "t5",
];

struct Config<'a> {
    file: &'a str,
    text: &'a str,
    map: &'a Map<String, Value>,
}

impl Config<'_> {
    fn error(&self, field: &str, message: &str) -> PlanError {
        let offset = self.text.find(&format!("\"{field}\"")).unwrap_or(0);
        let (line, column) = crate::catalogue::position(self.text, offset);
        PlanError::Text {
            file: self.file.to_owned(),
            line,
            column,
            message: format!("{field}: {message}"),
        }
    }

    fn optional(&self, field: &str) -> Result<Option<u32>, PlanError> {
        match self.map.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value
                .as_u64()
                .and_then(|v| u32::try_from(v).ok())
                .map(Some)
                .ok_or_else(|| self.error(field, "must be a whole number below 2^32")),
        }
    }

    fn number(&self, field: &str) -> Result<u32, PlanError> {
        self.optional(field)?.ok_or_else(|| {
            let near = nearest_names(field, self.map.keys().map(String::as_str));
            let hint = near.first().map_or(String::new(), |n| format!("; nearest field: {n}"));
            self.error(field, &format!("is missing{hint}"))
        })
    }

    // Newer and older configurations name the same dimension differently.
    fn first(&self, fields: &[&str]) -> Result<u32, PlanError> {
        for field in fields {
            if let Some(value) = self.optional(field)? {
                return Ok(value);
            }
        }
        self.number(fields[0])
    }

    fn flag(&self, field: &str, otherwise: bool) -> bool {
        self.map.get(field).and_then(Value::as_bool).unwrap_or(otherwise)
    }
}

/// Reads a `config.json`.
///
/// # Errors
/// [`PlanError::Text`] with file, line and column for text that is no JSON object or a dimension
/// that is missing or wrong; [`PlanError::UnsupportedArchitecture`] for any `model_type` that is
/// not in [`COVERED`].
pub fn read(file: &str, text: &str) -> Result<Model, PlanError> {
    let value: Value = serde_json::from_str(text).map_err(|error| PlanError::Text {
        file: file.to_owned(),
        line: error.line(),
        column: error.column(),
        message: error.to_string(),
    })?;
    let Some(map) = value.as_object() else {
        return Err(PlanError::Text {
            file: file.to_owned(),
            line: 1,
            column: 1,
            message: "a config.json is a JSON object".to_owned(),
        });
    };
    let c = Config { file, text, map };
    let architecture = map
        .get("architectures")
        .and_then(Value::as_array)
        .and_then(|a| a.first())
        .and_then(Value::as_str);
    let Some(kind) = map.get("model_type").and_then(Value::as_str) else {
        return Err(unsupported(architecture.unwrap_or("(no model_type)")));
    };
    if !COVERED.contains(&kind) {
        return Err(unsupported(architecture.unwrap_or(kind)));
    }
    // A head of another kind (vision, classification, encoder) on a covered body is another model.
    if let Some(name) = architecture
        && !["CausalLM", "LMHeadModel", "ForConditionalGeneration", "Model"]
            .iter()
            .any(|end| name.ends_with(end))
    {
        return Err(unsupported(name));
    }
    let model = shape(&c, kind)?;
    check_model(&model).map_err(|message| c.error("model_type", &message))?;
    if !model.hidden.is_multiple_of(model.heads)
        && map.get("head_dim").is_none()
        && kind != "t5"
        && model.mla.is_none()
    {
        return Err(c.error("num_attention_heads", "does not divide the hidden size"));
    }
    Ok(model)
}

fn unsupported(architecture: &str) -> PlanError {
    PlanError::UnsupportedArchitecture {
        architecture: architecture.to_owned(),
        covered: COVERED.join(", "),
    }
}

fn shape(c: &Config<'_>, kind: &str) -> Result<Model, PlanError> {
    let llama_like = [
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "deepseek_v2",
        "deepseek_v3",
    ]
    .contains(&kind);
    let hidden = c.first(&["hidden_size", "n_embd", "d_model"])?;
    let layers = c.first(&["num_hidden_layers", "n_layer", "num_layers", "n_layers"])?;
    let heads = c.first(&["num_attention_heads", "n_head", "num_heads", "n_heads"])?;
    if heads == 0 || hidden == 0 {
        return Err(c.error("hidden_size", "hidden size and heads must be at least 1"));
    }
    let ffn = match kind {
        "gpt2" => c.optional("n_inner")?.unwrap_or(hidden.saturating_mul(4)),
        "gpt_neo" => c.optional("intermediate_size")?.unwrap_or(hidden.saturating_mul(4)),
        "bloom" => hidden.saturating_mul(4),
        "falcon" => c.optional("ffn_hidden_size")?.unwrap_or(hidden.saturating_mul(4)),
        "opt" => c.number("ffn_dim")?,
        "t5" => c.number("d_ff")?,
        _ => c.number("intermediate_size")?,
    };
    let kv_heads = match kind {
        "falcon" if c.flag("new_decoder_architecture", false) => c.number("num_kv_heads")?,
        "falcon" if c.flag("multi_query", true) => 1,
        _ => c.optional("num_key_value_heads")?.unwrap_or(heads),
    };
    let head_dim = match kind {
        "t5" => c.number("d_kv")?,
        _ => c.optional("head_dim")?.unwrap_or(hidden / heads),
    };
    let context = match kind {
        "gpt2" => c.first(&["n_positions", "n_ctx"])?,
        "bloom" => c.optional("seq_length")?.unwrap_or(2048),
        "falcon" => c.optional("max_position_embeddings")?.unwrap_or(2048),
        "t5" => c.optional("n_positions")?.unwrap_or(512),
        _ => c.number("max_position_embeddings")?,
    };
    let moe = match kind {
        "mixtral" => Some(Moe {
            experts: c.number("num_local_experts")?,
            top_k: c.number("num_experts_per_tok")?,
            expert_ffn: ffn,
            shared_experts: 0,
            dense_layers: 0,
        }),
        "qwen3_moe" => Some(Moe {
            experts: c.number("num_experts")?,
            top_k: c.number("num_experts_per_tok")?,
            expert_ffn: c.number("moe_intermediate_size")?,
            shared_experts: 0,
            dense_layers: 0,
        }),
        "qwen2_moe" => {
            let width = c.number("moe_intermediate_size")?;
            let shared = c.optional("shared_expert_intermediate_size")?.unwrap_or(0);
            Some(Moe {
                experts: c.number("num_experts")?,
                top_k: c.number("num_experts_per_tok")?,
                expert_ffn: width,
                // One shared expert as wide as several routed ones.
                shared_experts: shared / width.max(1),
                dense_layers: 0,
            })
        }
        "deepseek_v2" | "deepseek_v3" => Some(Moe {
            experts: c.number("n_routed_experts")?,
            top_k: c.number("num_experts_per_tok")?,
            expert_ffn: c.number("moe_intermediate_size")?,
            shared_experts: c.optional("n_shared_experts")?.unwrap_or(0),
            dense_layers: c.optional("first_k_dense_replace")?.unwrap_or(0),
        }),
        _ => None,
    };
    let mla = match kind {
        "deepseek_v2" | "deepseek_v3" => Some(Mla {
            q_rank: c.optional("q_lora_rank")?.unwrap_or(0),
            kv_rank: c.number("kv_lora_rank")?,
            rope_dim: c.number("qk_rope_head_dim")?,
            nope_dim: c.number("qk_nope_head_dim")?,
            value_dim: c.number("v_head_dim")?,
        }),
        _ => None,
    };
    let family = match kind {
        "gpt2" | "gpt_neo" | "opt" | "bloom" => Family::Gpt,
        "gpt_neox" => Family::Neox,
        "falcon" => Family::Palm,
        "qwen2" | "qwen2_moe" => Family::Qwen,
        "t5" => Family::T5,
        _ => Family::Llama,
    };
    let gated_t5 = c
        .map
        .get("feed_forward_proj")
        .and_then(Value::as_str)
        .is_some_and(|text| text.starts_with("gated"));
    let bias = match kind {
        "falcon" => c.flag("bias", false),
        "llama" => c.flag("attention_bias", false) && c.flag("mlp_bias", false),
        _ => matches!(family, Family::Gpt | Family::Neox),
    };
    let encoder_layers = if kind == "t5" { layers } else { 0 };
    let layers = match kind {
        "t5" => c.optional("num_decoder_layers")?.unwrap_or(layers),
        _ => layers,
    };
    let tie_default = !(llama_like || kind == "gpt_neox");
    Ok(Model {
        name: c
            .map
            .get("_name_or_path")
            .and_then(Value::as_str)
            .filter(|n| !n.is_empty())
            .unwrap_or(c.file)
            .to_owned(),
        layers,
        encoder_layers,
        hidden,
        ffn,
        heads,
        kv_heads,
        head_dim,
        vocab: c.number("vocab_size")?,
        context,
        family,
        gated: llama_like || gated_t5,
        bias,
        qkv_bias: bias || family == Family::Qwen || c.flag("attention_bias", false),
        position: match kind {
            "gpt2" | "gpt_neo" | "opt" => Position::Learned,
            "bloom" => Position::Alibi,
            "t5" => Position::Relative,
            _ => Position::Rotary,
        },
        tie_embeddings: c.flag("tie_word_embeddings", tie_default),
        moe,
        mla,
        assumed: Vec::new(),
        source: format!("config.json ({kind})"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "model_type": "llama",
  "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
  "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
  "max_position_embeddings": 8192, "tie_word_embeddings": false
}"#;

    #[test]
    fn a_llama_is_read_to_its_exact_size() {
        let model = read("config.json", LLAMA).unwrap();
        assert_eq!(model.parameters(), 8_030_261_248.0);
    }

    #[test]
    fn a_gpt2_and_a_mixture_are_read() {
        let gpt2 = r#"{"architectures":["GPT2LMHeadModel"],"model_type":"gpt2","n_embd":768,
          "n_layer":12,"n_head":12,"n_positions":1024,"vocab_size":50257}"#;
        assert_eq!(read("c", gpt2).unwrap().parameters(), 124_439_808.0);
        let mixtral = r#"{"architectures":["MixtralForCausalLM"],"model_type":"mixtral",
          "hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,
          "num_attention_heads":32,"num_key_value_heads":8,"vocab_size":32000,
          "max_position_embeddings":32768,"num_local_experts":8,"num_experts_per_tok":2}"#;
        assert_eq!(read("c", mixtral).unwrap().parameters(), 46_702_792_704.0);
    }

    #[test]
    fn what_is_not_covered_is_refused_by_name() {
        for (text, name) in [
            (r#"{"architectures":["MambaForCausalLM"],"model_type":"mamba"}"#, "MambaForCausalLM"),
            (r#"{"model_type":"rwkv"}"#, "rwkv"),
            (
                &LLAMA.replace("LlamaForCausalLM", "LlamaForSequenceClassification"),
                "LlamaForSequenceClassification",
            ),
            (r#"{"hidden_size": 3}"#, "(no model_type)"),
        ] {
            let error = read("config.json", text).unwrap_err();
            assert!(
                matches!(&error, PlanError::UnsupportedArchitecture { architecture, .. } if architecture == name),
                "{error}"
            );
        }
    }

    #[test]
    fn a_bad_dimension_has_a_place() {
        let text = LLAMA.replace("\"intermediate_size\": 14336", "\"intermediate_size\": -1");
        let error = read("config.json", &text).unwrap_err().to_string();
        assert!(error.starts_with("config.json:3:24: intermediate_size"), "{error}");
        let text = LLAMA.replace("intermediate_size", "intermediate_sizes");
        let error = read("config.json", &text).unwrap_err().to_string();
        assert!(error.contains("nearest field: intermediate_sizes"), "{error}");
        assert!(read("c", "{").is_err() && read("c", "[]").is_err());
        let zero = LLAMA.replace("\"num_attention_heads\": 32", "\"num_attention_heads\": 0");
        assert!(read("c", &zero).is_err());
    }
}
