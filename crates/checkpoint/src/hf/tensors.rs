//! Every weight of a model, by name and shape.

use drumline_spec::{Family, ModelConfig};

/// Lists the weights that a model of this shape has, by their names in the Hugging Face layout,
/// with their shapes. Matrices are `[out, in]` for LLaMA and `[in, out]` for GPT-2, as there.
#[must_use]
pub fn weights(model: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let [d, f, v, t] = [model.hidden, model.ffn, model.vocab, model.context].map(|n| n as usize);
    let kv = (model.kv_heads * model.head_dim()) as usize;
    let mut out: Vec<(String, Vec<usize>)> = Vec::new();
    match model.family {
        Family::Gpt2 => {
            out.push(("transformer.wte.weight".into(), vec![v, d]));
            out.push(("transformer.wpe.weight".into(), vec![t, d]));
            for layer in 0..model.layers {
                let mut add = |name: &str, shape: &[usize]| {
                    out.push((format!("transformer.h.{layer}.{name}"), shape.to_vec()));
                };
                let qkv = d + 2 * kv;
                add("ln_1.weight", &[d]);
                add("ln_1.bias", &[d]);
                add("attn.c_attn.weight", &[d, qkv]);
                add("attn.c_attn.bias", &[qkv]);
                add("attn.c_proj.weight", &[d, d]);
                add("attn.c_proj.bias", &[d]);
                add("ln_2.weight", &[d]);
                add("ln_2.bias", &[d]);
                add("mlp.c_fc.weight", &[d, f]);
                add("mlp.c_fc.bias", &[f]);
                add("mlp.c_proj.weight", &[f, d]);
                add("mlp.c_proj.bias", &[d]);
            }
            out.push(("transformer.ln_f.weight".into(), vec![d]));
            out.push(("transformer.ln_f.bias".into(), vec![d]));
        }
        Family::Llama => {
            out.push(("model.embed_tokens.weight".into(), vec![v, d]));
            for layer in 0..model.layers {
                let mut add = |name: &str, shape: &[usize]| {
                    out.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
                };
                add("input_layernorm", &[d]);
                add("self_attn.q_proj", &[d, d]);
                add("self_attn.k_proj", &[kv, d]);
                add("self_attn.v_proj", &[kv, d]);
                add("self_attn.o_proj", &[d, d]);
                add("post_attention_layernorm", &[d]);
                add("mlp.gate_proj", &[f, d]);
                add("mlp.up_proj", &[f, d]);
                add("mlp.down_proj", &[d, f]);
            }
            out.push(("model.norm.weight".into(), vec![d]));
        }
    }
    if !model.tie_embeddings {
        out.push(("lm_head.weight".into(), vec![v, d]));
    }
    out
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn tiny(family: Family) -> ModelConfig {
        let gpt2 = family == Family::Gpt2;
        ModelConfig {
            family,
            layers: 2,
            hidden: 16,
            ffn: 40,
            heads: 4,
            kv_heads: if gpt2 { 4 } else { 2 },
            vocab: 37,
            context: 24,
            norm_epsilon: 1e-5,
            rope_theta: 10_000.0,
            tie_embeddings: gpt2,
        }
    }

    #[test]
    fn the_listed_weights_are_all_the_parameters() {
        for family in [Family::Gpt2, Family::Llama] {
            for tie_embeddings in [false, true] {
                let model = ModelConfig { tie_embeddings, ..tiny(family) };
                let listed: usize =
                    weights(&model).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
                assert_eq!(listed as u64, model.parameters(), "{family:?}");
            }
        }
    }
}
