//! `config.json` to and from a model's shape.

use std::path::Path;

use drumline_spec::{Family, ModelConfig};
use serde_json::{Map, Value, json};

use crate::error::CheckpointError;

/// Writes a shape as `transformers` reads it.
pub(super) fn write(model: &ModelConfig, end_of_text: Option<u32>) -> Value {
    let mut config = match model.family {
        Family::Llama => json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": model.hidden,
            "intermediate_size": model.ffn,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_dim(),
            "hidden_act": "silu",
            "max_position_embeddings": model.context,
            "rms_norm_eps": number(model.norm_epsilon),
            "rope_theta": number(model.rope_theta),
            "rope_scaling": null,
            "attention_bias": false,
            "mlp_bias": false,
        }),
        Family::Gpt2 => json!({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_embd": model.hidden,
            "n_inner": model.ffn,
            "n_layer": model.layers,
            "n_head": model.heads,
            "n_positions": model.context,
            "n_ctx": model.context,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": number(model.norm_epsilon),
            "scale_attn_weights": true,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }),
    };
    config["vocab_size"] = model.vocab.into();
    config["tie_word_embeddings"] = model.tie_embeddings.into();
    config["torch_dtype"] = "float32".into();
    config["use_cache"] = true.into();
    config["bos_token_id"] = end_of_text.into();
    config["eos_token_id"] = end_of_text.into();
    config
}

/// Returns the decimal number that a person would write for an f32: 1e-5, not 9.99999974e-6.
fn number(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// Reads a shape, and refuses by name what the engine does not cover.
pub(super) fn read(path: &Path, text: &[u8]) -> Result<ModelConfig, CheckpointError> {
    let values: Map<String, Value> = serde_json::from_slice(text)
        .map_err(|e| CheckpointError::Format { path: path.to_owned(), message: e.to_string() })?;
    let config = Config { path, values };
    let architecture = config.values.get("architectures").and_then(|a| a.get(0));
    let model_type = config.values.get("model_type");
    let named = |value: Option<&Value>, name: &str| value.is_some_and(|v| v == name);
    let model = if named(architecture, "LlamaForCausalLM")
        || architecture.is_none() && named(model_type, "llama")
    {
        llama(&config)?
    } else if named(architecture, "GPT2LMHeadModel")
        || architecture.is_none() && named(model_type, "gpt2")
    {
        gpt2(&config)?
    } else {
        let got = architecture.or(model_type).cloned();
        return Err(config.unsupported(
            "architectures",
            &got.unwrap_or(Value::Null),
            "LlamaForCausalLM or GPT2LMHeadModel",
        ));
    };
    match model.check(1, 1).into_iter().next() {
        None => Ok(model),
        Some(error) => {
            Err(CheckpointError::Format { path: path.to_owned(), message: error.to_string() })
        }
    }
}

fn llama(config: &Config<'_>) -> Result<ModelConfig, CheckpointError> {
    config.expect("hidden_act", "silu")?;
    config.expect("attention_bias", false)?;
    config.expect("mlp_bias", false)?;
    // Older files have `rope_theta` and `rope_scaling`, newer ones `rope_parameters`.
    for field in ["rope_scaling", "rope_parameters"] {
        let rope = config.values.get(field).unwrap_or(&Value::Null);
        let kind = rope.get("rope_type").or_else(|| rope.get("type"));
        if let Some(kind) = kind.filter(|kind| *kind != "default") {
            return Err(config.unsupported(&format!("{field}.rope_type"), kind, "default"));
        }
        if field == "rope_scaling" && !rope.is_null() && kind.is_none() {
            return Err(config.unsupported(field, rope, "null"));
        }
    }
    let (heads, hidden) = (config.whole("num_attention_heads")?, config.whole("hidden_size")?);
    let theta = config.values.get("rope_parameters").and_then(|r| r.get("rope_theta"));
    let rope_theta = match theta.and_then(Value::as_f64) {
        Some(theta) => theta as f32,
        None => config.real("rope_theta", 10_000.0)?,
    };
    let model = ModelConfig {
        family: Family::Llama,
        layers: config.whole("num_hidden_layers")?,
        hidden,
        ffn: config.whole("intermediate_size")?,
        heads,
        kv_heads: config.whole_or("num_key_value_heads", heads)?,
        vocab: config.whole("vocab_size")?,
        context: config.whole("max_position_embeddings")?,
        norm_epsilon: config.real("rms_norm_eps", 1e-6)?,
        rope_theta,
        tie_embeddings: config.flag("tie_word_embeddings", false)?,
    };
    let head_dim = config.whole_or("head_dim", hidden.checked_div(heads).unwrap_or(0))?;
    if head_dim.checked_mul(heads) != Some(hidden) {
        return Err(config.unsupported(
            "head_dim",
            &head_dim.into(),
            &format!("hidden_size / num_attention_heads ({hidden} / {heads})"),
        ));
    }
    Ok(model)
}

fn gpt2(config: &Config<'_>) -> Result<ModelConfig, CheckpointError> {
    // Both names stand for the tanh form.
    if config.values.get("activation_function") != Some(&"gelu_pytorch_tanh".into()) {
        config.expect("activation_function", "gelu_new")?;
    }
    config.expect("scale_attn_weights", true)?;
    config.expect("scale_attn_by_inverse_layer_idx", false)?;
    config.expect("add_cross_attention", false)?;
    let (hidden, heads) = (config.whole("n_embd")?, config.whole("n_head")?);
    Ok(ModelConfig {
        family: Family::Gpt2,
        layers: config.whole("n_layer")?,
        hidden,
        ffn: config.whole_or("n_inner", hidden.saturating_mul(4))?,
        heads,
        kv_heads: heads,
        vocab: config.whole("vocab_size")?,
        context: config.whole("n_positions")?,
        norm_epsilon: config.real("layer_norm_epsilon", 1e-5)?,
        rope_theta: 10_000.0,
        tie_embeddings: config.flag("tie_word_embeddings", true)?,
    })
}

struct Config<'a> {
    path: &'a Path,
    values: Map<String, Value>,
}

impl Config<'_> {
    /// Returns a value; none when it is missing or null, which mean the same there.
    fn get(&self, field: &str) -> Option<&Value> {
        self.values.get(field).filter(|value| !value.is_null())
    }

    fn unsupported(&self, field: &str, got: &Value, supported: &str) -> CheckpointError {
        CheckpointError::Unsupported {
            path: self.path.to_owned(),
            field: field.to_owned(),
            got: got.to_string(),
            supported: supported.to_owned(),
        }
    }

    fn wrong(&self, field: &str, expected: &str) -> CheckpointError {
        let got = self.get(field).unwrap_or(&Value::Null);
        CheckpointError::Format {
            path: self.path.to_owned(),
            message: format!("{field} is {got}, expected {expected}"),
        }
    }

    /// Accepts a field that is missing or has the one value that is covered.
    fn expect(&self, field: &str, only: impl Into<Value>) -> Result<(), CheckpointError> {
        let only = only.into();
        match self.get(field) {
            Some(got) if *got != only => Err(self.unsupported(field, got, &only.to_string())),
            _ => Ok(()),
        }
    }

    fn whole(&self, field: &str) -> Result<u32, CheckpointError> {
        let value = self.get(field).and_then(Value::as_u64);
        value
            .and_then(|value| u32::try_from(value).ok())
            .ok_or_else(|| self.wrong(field, "a whole number"))
    }

    fn whole_or(&self, field: &str, default: u32) -> Result<u32, CheckpointError> {
        match self.get(field) {
            None => Ok(default),
            Some(_) => self.whole(field),
        }
    }

    fn real(&self, field: &str, default: f32) -> Result<f32, CheckpointError> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => (value.as_f64())
                .map(|value| value as f32)
                .filter(|value| value.is_finite() && *value > 0.0)
                .ok_or_else(|| self.wrong(field, "a number above 0")),
        }
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool, CheckpointError> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.wrong(field, "true or false")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hf::tensors::tests::tiny;

    fn parse(config: &Value) -> Result<ModelConfig, CheckpointError> {
        read(Path::new("config.json"), config.to_string().as_bytes())
    }

    #[test]
    fn a_written_shape_reads_back() {
        for family in [Family::Gpt2, Family::Llama] {
            for tie_embeddings in [false, true] {
                let model = ModelConfig { tie_embeddings, ..tiny(family) };
                assert_eq!(parse(&write(&model, Some(0))).unwrap(), model);
            }
        }
    }

    #[test]
    fn epsilons_are_written_as_people_write_them() {
        assert_eq!(number(1e-5).to_string(), "0.00001");
        assert_eq!(number(500_000.0), 500_000.0);
    }

    #[test]
    fn the_newer_form_of_the_rotary_base_is_read() {
        let mut config = write(&tiny(Family::Llama), None);
        config["rope_parameters"] = json!({"rope_theta": 500_000.0, "rope_type": "default"});
        assert_eq!(parse(&config).unwrap().rope_theta, 500_000.0);
    }

    #[test]
    fn what_is_not_covered_is_refused_by_name() {
        let cases = [
            (Family::Llama, "architectures", json!(["MixtralForCausalLM"]), "MixtralForCausalLM"),
            (Family::Llama, "hidden_act", json!("gelu"), "hidden_act"),
            (Family::Llama, "attention_bias", json!(true), "attention_bias"),
            (Family::Llama, "rope_scaling", json!({"rope_type": "llama3"}), "llama3"),
            (Family::Llama, "rope_scaling", json!({"type": "linear"}), "linear"),
            (Family::Llama, "rope_parameters", json!({"rope_type": "yarn"}), "yarn"),
            (Family::Llama, "head_dim", json!(5), "head_dim"),
            (Family::Llama, "vocab_size", json!(-1), "vocab_size"),
            (Family::Llama, "num_attention_heads", json!(0), "heads"),
            (Family::Llama, "rms_norm_eps", json!("x"), "rms_norm_eps"),
            (Family::Gpt2, "activation_function", json!("relu"), "relu"),
            (Family::Gpt2, "scale_attn_by_inverse_layer_idx", json!(true), "inverse_layer"),
            (Family::Gpt2, "n_embd", json!(u64::MAX), "n_embd"),
        ];
        for (family, field, value, expected) in cases {
            let mut config = write(&tiny(family), None);
            config[field] = value;
            let error = parse(&config).unwrap_err().to_string();
            assert!(error.contains(expected), "{field}: {error}");
        }
        assert!(read(Path::new("c"), b"[]").is_err());
        assert!(parse(&json!({})).is_err());
    }
}
