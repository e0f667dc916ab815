//! NVIDIA GPUs as devices: the only crate that knows CUDA.
//!
//! Every library (the driver, NVRTC, cuBLASLt, NCCL) is looked for at run time. Where one is missing
//! nothing here panics: [`library::present`] is asked first, and the error says what is missing and
//! that `drumline doctor` tells more.
//!
//! `unsafe` is what a foreign interface costs; each use says why it holds.

pub mod found;
pub mod library;
pub mod nccl;

pub use library::Library;
