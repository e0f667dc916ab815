//! NVIDIA GPUs as devices: the only crate that knows CUDA.
//!
//! [`Cuda`] is a [`Backend`](drumline_tensor::Backend): the engine runs on it as it runs on the CPU.
//! Its kernels are in `kernels/*.cu`, compiled at run time by NVRTC ([`compile`]); matrix products are
//! cuBLASLt's.
//!
//! Every library (the driver, NVRTC, cuBLASLt, NCCL) is looked for at run time. Where one is missing
//! nothing here panics: [`library::present`] is asked first, and the error says what is missing and
//! that `drumline doctor` tells more.
//!
//! `unsafe` is what a foreign interface costs; each use says why it holds.

mod attention;
mod backend;
pub mod compile;
pub mod device;
pub mod error;
pub mod found;
mod graph;
pub mod library;
mod linear;
mod matmul;
mod matrix;
mod memory;
pub mod nccl;
mod rows;
mod sampling;

pub use backend::{Cuda, CudaOptions};
pub use device::{Device, DeviceOptions, Properties};
pub use error::CudaError;
pub use library::Library;
pub use matrix::Matrix;
pub use memory::{Buffer, View, ViewMut};
