//! Number formats.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::PlanError;

/// A number format for matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit float.
    Fp32,
    /// 32-bit storage, 19-bit products.
    Tf32,
    /// IEEE half.
    Fp16,
    /// bfloat16.
    Bf16,
    /// 8-bit float products, 16-bit activations between layers.
    Fp8,
    /// 8-bit integers (serving only).
    Int8,
    /// 4-bit float (serving only).
    Fp4,
}

impl Dtype {
    const ALL: [Self; 7] =
        [Self::Fp32, Self::Tf32, Self::Fp16, Self::Bf16, Self::Fp8, Self::Int8, Self::Fp4];

    /// Returns the word used in catalogues and options.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Tf32 => "tf32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
            Self::Fp4 => "fp4",
        }
    }

    /// Parses the word.
    ///
    /// # Errors
    /// [`PlanError::UnknownName`] with the nearest words.
    pub fn parse(text: &str) -> Result<Self, PlanError> {
        let lower = text.trim().to_lowercase();
        let lower = match lower.as_str() {
            "float16" | "half" => "fp16",
            "bfloat16" => "bf16",
            "float32" | "float" => "fp32",
            other => other,
        };
        Self::ALL
            .into_iter()
            .find(|d| d.as_str() == lower)
            .ok_or_else(|| PlanError::unknown("dtype", text, Self::ALL.map(Self::as_str)))
    }

    /// Returns the bytes of one stored weight in this format.
    #[must_use]
    pub fn bytes(self) -> f64 {
        match self {
            Self::Fp32 | Self::Tf32 => 4.0,
            Self::Fp16 | Self::Bf16 => 2.0,
            Self::Fp8 | Self::Int8 => 1.0,
            Self::Fp4 => 0.5,
        }
    }

    /// Returns the bytes of an activation between layers: fp8 training keeps 16 bits there.
    #[must_use]
    pub fn activation_bytes(self) -> f64 {
        self.bytes().max(2.0)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
