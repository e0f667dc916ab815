//! Opening the GPU that a rank was given.

use std::path::PathBuf;

use drumline_cuda::{Cuda, CudaOptions, DeviceOptions};
use drumline_tensor::MatmulPrecision;
use drumline_wire::contract;

use crate::RankError;
use crate::context::Context;

/// Opens the rank's GPU, with products that round their factors as `matmul` says.
///
/// Never the processor in its place: a GPU was asked for and is held.
///
/// # Errors
/// [`RankError::Gpu`], which says what is missing; [`RankError::Refused`] when the agent did not say
/// which GPU is this rank's.
pub fn open(context: &Context, matmul: MatmulPrecision) -> Result<Cuda, RankError> {
    let name = contract::GPU_ORDINAL;
    let ordinal = match std::env::var(name) {
        // Where nothing is said a rank sees its own GPU alone.
        Err(_) => 0,
        Ok(text) => text
            .parse()
            .map_err(|_| RankError::Refused(format!("environment variable {name}: {text:?}")))?,
    };
    let device = DeviceOptions { ordinal, kernel_cache: Some(kernels(context)), check_each: false };
    let cuda = Cuda::new(&CudaOptions { device, matmul, tf32: false })?;
    let of = cuda.device().properties();
    let (major, minor) = of.capability;
    println!(
        "GPU {ordinal}: {}, compute capability {major}.{minor}, {:.1} GiB",
        of.name,
        of.memory as f64 / f64::from(1 << 30)
    );
    Ok(cuda)
}

/// Where compiled kernels are kept: in the user's cache, so that every job finds them, or else
/// beside the jobs.
fn kernels(context: &Context) -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .map_or_else(|| context.shared_dir.join("kernels"), |cache| cache.join("drumline/kernels"))
}
