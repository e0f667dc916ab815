//! The shape of a decoder-only transformer, and what a split needs of it.

use serde::{Deserialize, Serialize};

/// A family of decoders: which position coding, norm and feed-forward it uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Learned positions, LayerNorm, GELU, biases, tied embeddings.
    Gpt2,
    /// Rotary positions, RMSNorm, SwiGLU, grouped queries, no biases.
    Llama,
}

/// How positions enter the model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Position {
    /// A learned vector for each position, added to the token's embedding.
    Learned,
    /// Rotary embedding of queries and keys with this base (Su et al. 2021).
    Rotary {
        /// The base of the geometric sequence of frequencies.
        theta: f32,
    },
}

/// Which normalisation stands before attention and feed-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    /// Mean and variance, with gain and bias.
    LayerNorm,
    /// Root mean square, with gain only (Zhang and Sennrich 2019).
    RmsNorm,
}

/// The feed-forward network's non-linearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// GELU, tanh form, as GPT-2 has it.
    Gelu,
    /// SiLU-gated linear unit (Shazeer 2020).
    SwiGlu,
}

/// Why a model's shape or split is impossible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct ModelError {
    /// The manifest field at fault, relative to the model or its parallelism.
    pub field: &'static str,
    /// What is wrong, with the numbers and the nearest that would work.
    pub message: String,
}

/// The shape of a decoder. Fields are public because every combination can be written down; only
/// one that passes [`ModelConfig::check`] enters a spec.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Which relatives it belongs to.
    pub family: Family,
    /// Number of decoder layers, L.
    pub layers: u32,
    /// Width of the residual stream, D.
    pub hidden: u32,
    /// Inner width of the feed-forward network, F.
    pub ffn: u32,
    /// Number of query heads, H.
    pub heads: u32,
    /// Number of key and value heads, `H_kv`; equal to `heads` without grouping.
    pub kv_heads: u32,
    /// Number of tokens in the vocabulary, V. As given; ranks pad their shards themselves.
    pub vocab: u32,
    /// Greatest sequence length, T.
    pub context: u32,
    /// The epsilon of the normalisation.
    pub norm_epsilon: f32,
    /// The rotary base; ignored by families with learned positions.
    pub rope_theta: f32,
    /// Whether the output projection is the embedding, transposed.
    pub tie_embeddings: bool,
}

impl ModelConfig {
    /// Returns the width of one head, D / H.
    #[must_use]
    pub fn head_dim(&self) -> u32 {
        self.hidden / self.heads
    }

    /// Returns how positions enter the model.
    #[must_use]
    pub fn position(&self) -> Position {
        match self.family {
            Family::Gpt2 => Position::Learned,
            Family::Llama => Position::Rotary { theta: self.rope_theta },
        }
    }

    /// Returns the family's normalisation.
    #[must_use]
    pub fn norm(&self) -> Norm {
        match self.family {
            Family::Gpt2 => Norm::LayerNorm,
            Family::Llama => Norm::RmsNorm,
        }
    }

    /// Returns the family's non-linearity.
    #[must_use]
    pub fn activation(&self) -> Activation {
        match self.family {
            Family::Gpt2 => Activation::Gelu,
            Family::Llama => Activation::SwiGlu,
        }
    }

    /// Returns whether linear layers have biases.
    #[must_use]
    pub fn has_bias(&self) -> bool {
        self.family == Family::Gpt2
    }

    /// Counts the parameters, a tied embedding once.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        let [l, d, f, v, t] =
            [self.layers, self.hidden, self.ffn, self.vocab, self.context].map(u64::from);
        let kv = u64::from(self.kv_heads) * u64::from(self.head_dim());
        let bias = u64::from(self.has_bias());
        let attention = d * (d + 2 * kv) + d * d + bias * (d + 2 * kv + d);
        let feed_forward = match self.activation() {
            Activation::SwiGlu => 3 * d * f,
            Activation::Gelu => 2 * d * f + bias * (f + d),
        };
        let norm = match self.norm() {
            Norm::LayerNorm => 2 * d,
            Norm::RmsNorm => d,
        };
        let position = if self.position() == Position::Learned { t * d } else { 0 };
        let head = if self.tie_embeddings { 0 } else { v * d };
        v * d + position + l * (attention + feed_forward + 2 * norm) + norm + head
    }

    /// Counts the floating-point operations of one token's forward and backward pass.
    ///
    /// 6 per parameter that takes part in a matmul (the output projection included, the embedding
    /// look-up not), and 12 L D T for attention scores and values, halved because attention is
    /// causal. Source: Chowdhery et al. 2022, appendix B, with the causal half.
    #[must_use]
    pub fn train_flops_per_token(&self, sequence: u32) -> f64 {
        let [l, d, f, v] = [self.layers, self.hidden, self.ffn, self.vocab].map(f64::from);
        let kv = f64::from(self.kv_heads) * f64::from(self.head_dim());
        let feed_forward = match self.activation() {
            Activation::SwiGlu => 3.0 * d * f,
            Activation::Gelu => 2.0 * d * f,
        };
        let matmul = l * (d * (d + 2.0 * kv) + d * d + feed_forward) + v * d;
        6.0 * matmul + 6.0 * l * d * f64::from(sequence)
    }

    /// Checks the shape and every split that tensor and pipeline parallelism ask of it, and
    /// returns every mistake.
    #[must_use]
    pub fn check(&self, tensor: u32, pipeline: u32) -> Vec<ModelError> {
        let mut errors = Vec::new();
        let mut error = |field, message| errors.push(ModelError { field, message });
        let named = [
            ("layers", self.layers),
            ("hidden", self.hidden),
            ("ffn", self.ffn),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("vocab", self.vocab),
            ("context", self.context),
        ];
        for (field, value) in named {
            if value == 0 {
                error(field, "must be at least 1".to_owned());
            }
        }
        let whole = |a: u32, b: u32| a > 0 && b > 0 && a.is_multiple_of(b);
        let set = |a: u32, b: u32| a > 0 && b > 0;
        if set(self.hidden, self.heads) && !whole(self.hidden, self.heads) {
            let near = nearest_divisor(self.hidden, self.heads);
            error(
                "heads",
                format!(
                    "hidden {} is not divisible by heads {}; nearest that works: heads {near}",
                    self.hidden, self.heads
                ),
            );
        } else if set(self.hidden, self.heads)
            && self.family == Family::Llama
            && !self.head_dim().is_multiple_of(2)
        {
            error(
                "heads",
                format!(
                    "rotary positions need an even head width, and hidden {} / heads {} = {}",
                    self.hidden,
                    self.heads,
                    self.head_dim()
                ),
            );
        }
        if set(self.heads, self.kv_heads) && !whole(self.heads, self.kv_heads) {
            let near = nearest_divisor(self.heads, self.kv_heads);
            error(
                "kv_heads",
                format!(
                    "heads {} is not divisible by kv_heads {}; nearest that works: kv_heads {near}",
                    self.heads, self.kv_heads
                ),
            );
        }
        for (what, value) in [("heads", self.heads), ("kv_heads", self.kv_heads), ("ffn", self.ffn)]
        {
            if set(value, tensor) && !whole(value, tensor) {
                let near = nearest_divisor(value, tensor);
                error(
                    "parallelism.tensor",
                    format!(
                        "{what} {value} is not divisible by tensor {tensor}; nearest that works: tensor {near}"
                    ),
                );
            }
        }
        if set(self.layers, pipeline) && !whole(self.layers, pipeline) {
            let near = nearest_divisor(self.layers, pipeline);
            error(
                "parallelism.pipeline",
                format!(
                    "layers {} is not divisible by pipeline {pipeline}; nearest that works: pipeline {near}",
                    self.layers
                ),
            );
        }
        errors
    }
}

/// Returns the divisor of `value` that is nearest to `wanted`, the smaller of two that are equally
/// near. `value` must not be 0.
#[must_use]
pub fn nearest_divisor(value: u32, wanted: u32) -> u32 {
    let divisors = (1..=value.isqrt()).filter(|d| value.is_multiple_of(*d));
    divisors.flat_map(|d| [d, value / d]).min_by_key(|d| (d.abs_diff(wanted), *d)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpt2_small() -> ModelConfig {
        ModelConfig {
            family: Family::Gpt2,
            layers: 12,
            hidden: 768,
            ffn: 3072,
            heads: 12,
            kv_heads: 12,
            vocab: 50_257,
            context: 1024,
            norm_epsilon: 1e-5,
            rope_theta: 10_000.0,
            tie_embeddings: true,
        }
    }

    #[test]
    fn gpt2_small_has_the_published_number_of_parameters() {
        // Radford et al. 2019 print 117M; the released weights hold 124,439,808.
        assert_eq!(gpt2_small().parameters(), 124_439_808);
    }

    #[test]
    fn llama_2_7b_has_the_published_number_of_parameters() {
        let llama = ModelConfig {
            family: Family::Llama,
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
        assert_eq!(llama.parameters(), 6_738_415_616);
    }

    #[test]
    fn an_impossible_split_names_the_numbers_and_the_nearest_that_works() {
        let errors = gpt2_small().check(5, 7);
        let text: Vec<_> = errors.iter().map(ToString::to_string).collect();
        assert!(text.contains(
            &"parallelism.tensor: heads 12 is not divisible by tensor 5; nearest that works: tensor 4".to_owned()
        ), "{text:?}");
        assert!(text.contains(
            &"parallelism.pipeline: layers 12 is not divisible by pipeline 7; nearest that works: pipeline 6".to_owned()
        ), "{text:?}");
    }

    #[test]
    fn no_shape_of_zeros_panics() {
        let mut model = gpt2_small();
        for field in [0, 1] {
            model.heads = field;
            model.kv_heads = 0;
            model.layers = 0;
            assert!(!model.check(0, 0).is_empty());
        }
    }
}
