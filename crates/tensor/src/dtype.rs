//! Element types.

/// How one element is stored. Arithmetic is f32 on every type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// The upper half of a single: 8 bits of exponent, 7 of mantissa.
    Bf16,
    /// IEEE half precision.
    F16,
    /// Signed bytes with one f32 scale for each row.
    I8,
}

/// What matrix products round their factors to. Sums, and all other arithmetic, are f32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum MatmulPrecision {
    /// Nothing is rounded.
    #[default]
    F32,
    /// Both factors are rounded to bf16, as automatic mixed precision does it.
    Bf16,
}

impl DType {
    /// Returns the name used in manifests.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::I8 => "int8",
        }
    }

    /// Returns the size of one element in bytes; the scales of [`DType::I8`] are extra.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::I8 => 1,
        }
    }
}
