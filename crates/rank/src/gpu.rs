//! The GPU that a rank was given, and its way to the GPUs of the other ranks.

use std::path::PathBuf;

use drumline_cuda::nccl::{self, Linked};
use drumline_cuda::{Cuda, CudaOptions, DeviceOptions};
use drumline_engine::Groups;
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
    // Or else beside the jobs.
    let kernels = kernel_cache().unwrap_or_else(|| context.shared_dir.join("kernels"));
    let device = DeviceOptions { ordinal, kernel_cache: Some(kernels), check_each: false };
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

/// Joins the rank's GPU to those of the other ranks: over NCCL where all of them can. The log says
/// which way it is.
///
/// # Errors
/// [`RankError::Collective`].
pub fn link(context: &Context, cuda: &Cuda, groups: &Groups) -> Result<Linked, RankError> {
    let rank =
        nccl::Rank { job: context.job.clone(), attempt: context.attempt, rank: context.rank };
    let linked = nccl::link(cuda, groups, rank, context.collective_deadline)?;
    println!("collectives between GPUs: {}", linked.words);
    Ok(linked)
}

/// Returns where compiled kernels are kept: in the user's cache, so that every program finds them.
/// None where the environment names none.
#[must_use]
pub fn kernel_cache() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .map(|cache| cache.join("drumline/kernels"))
}
