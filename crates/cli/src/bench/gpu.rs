//! GPUs under `drumline bench`: which rank has which, and how they reach one another.

use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use drumline_collective::bench::{Measurement, Op, Options, Subject, measure_on};
use drumline_collective::{Collective, CollectiveError, ReduceOp, local};
use drumline_cuda::nccl::{self, Linked};
use drumline_cuda::{Buffer, Cuda, CudaError, CudaOptions, DeviceOptions};
use drumline_engine::{DeviceGroups, Groups};
use drumline_tensor::{Backend, MatmulPrecision};

use crate::failure::Failure;

/// Longest time without progress in a collective.
const DEADLINE: Duration = Duration::from_secs(60);

/// What ranks compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceArg {
    /// The processor's cores.
    Cpu,
    /// NVIDIA GPUs.
    Gpu,
}

/// Returns how many GPUs this process sees: at least one.
///
/// # Errors
/// [`CudaError`], which says what is missing.
pub(super) fn count() -> Result<usize, CudaError> {
    match usize::try_from(drumline_cuda::device::count()?).unwrap_or(0) {
        0 => Err(CudaError::NoDevice { ordinal: 0, count: 0 }),
        count => Ok(count),
    }
}

/// Opens the GPU of a rank: ranks go round the GPUs that there are.
///
/// # Errors
/// [`CudaError`], which says what is missing.
pub(super) fn open(rank: u32, matmul: MatmulPrecision) -> Result<Cuda, CudaError> {
    let ordinal = rank as usize % count()?;
    let kernel_cache = drumline_rank::gpu::kernel_cache();
    let device = DeviceOptions { ordinal, kernel_cache, check_each: false };
    Cuda::new(&CudaOptions { device, matmul, tf32: false })
}

/// Joins a rank's GPU to those of the others, as ranks of a gang are joined.
///
/// # Errors
/// [`CollectiveError`].
pub(super) fn link(cuda: &Cuda, groups: &Groups, rank: u32) -> Result<Linked, CollectiveError> {
    let rank = nccl::Rank { job: "bench".to_owned(), attempt: 1, rank };
    nccl::link(cuda, groups, rank, DEADLINE)
}

/// Returns what a setting says of the GPUs.
pub(super) fn words(ranks: u32) -> Result<String, Failure> {
    let failed = |error: CudaError| Failure::failed(error.to_string());
    let count = count().map_err(failed)?;
    let cuda = open(0, MatmulPrecision::F32).map_err(failed)?;
    let name = &cuda.device().properties().name;
    Ok(match ranks {
        1 => format!("on {name}"),
        _ => {
            format!("{ranks} ranks on {} GPUs, the first of them {name}", count.min(ranks as usize))
        }
    })
}

/// Collectives of values on GPUs, to be measured.
struct OnGpu {
    cuda: Cuda,
    control: Arc<dyn Collective>,
    groups: DeviceGroups<Cuda>,
    whole: Option<Buffer>,
    elements: usize,
    part: usize,
}

impl OnGpu {
    fn send(&mut self, to: usize) -> Result<(), CollectiveError> {
        let Some(whole) = &mut self.whole else { return Ok(()) };
        let values = self.cuda.view_mut(whole, 0..self.elements);
        match &self.groups.pipeline {
            Some(device) => device.send(self.cuda.as_view(&values), to),
            None => self.cuda.on_host(values, |v| self.control.send(v, to)),
        }
    }

    fn recv(&mut self, from: usize) -> Result<(), CollectiveError> {
        let Some(whole) = &mut self.whole else { return Ok(()) };
        let values = self.cuda.view_mut(whole, 0..self.elements);
        match &self.groups.pipeline {
            Some(device) => device.recv(values, from),
            None => self.cuda.on_host(values, |v| self.control.recv(v, from)),
        }
    }
}

impl Subject for OnGpu {
    fn prepare(&mut self, whole: usize, part: usize) -> Result<(), CollectiveError> {
        let told = |error: drumline_tensor::TensorError| CollectiveError::Io {
            op: "prepare",
            message: error.to_string(),
        };
        // The old ones first: there may not be room for both.
        self.whole = None;
        self.whole = Some(self.cuda.alloc(whole).map_err(told)?);
        (self.elements, self.part) = (whole, part);
        Ok(())
    }

    fn call(&mut self, op: Op) -> Result<(), CollectiveError> {
        let (c, rank) = (&*self.control, self.control.rank());
        let Some(whole) = &mut self.whole else { return Ok(()) };
        let (cuda, groups) = (&self.cuda, &self.groups);
        let values = cuda.view_mut(whole, 0..self.elements);
        let even: Vec<_> = (0..c.size()).map(|at| at * self.part..(at + 1) * self.part).collect();
        // All of it is rank 0's, and a gathering of that is a broadcast.
        let begin = |at: usize| if at == 0 { 0 } else { self.elements };
        let from_first: Vec<_> = (0..c.size()).map(|at| begin(at)..self.elements).collect();
        match op {
            Op::AllReduce => match &groups.tensor {
                Some(device) => device.all_reduce(values, ReduceOp::Sum),
                None => cuda.on_host(values, |v| c.all_reduce(v, ReduceOp::Sum)),
            },
            Op::AllGather => match &groups.tensor {
                Some(device) => device.all_gather_parts(values, &even),
                None => cuda.on_host(values, |v| c.all_gather_parts(v, &even)),
            },
            Op::ReduceScatter => match &groups.tensor {
                Some(device) => device.reduce_scatter_parts(values, &even),
                None => cuda.on_host(values, |v| c.reduce_scatter_parts(v, &even)),
            },
            Op::Broadcast => match &groups.tensor {
                Some(device) => device.all_gather_parts(values, &from_first),
                None => cuda.on_host(values, |v| c.broadcast(v, 0)),
            },
            Op::Barrier => c.barrier(),
            Op::SendRecv if rank > 1 => Ok(()),
            Op::SendRecv if rank == 0 => self.send(1).and_then(|()| self.recv(1)),
            Op::SendRecv => self.recv(0).and_then(|()| self.send(0)),
        }
    }

    fn finish(&mut self) -> Result<(), CollectiveError> {
        let told = |message: String| CollectiveError::Io { op: "wait", message };
        self.cuda.device().synchronise().map_err(|error| told(error.to_string()))?;
        self.cuda.status().map_err(|error| told(error.to_string()))?;
        let all = [&self.groups.tensor, &self.groups.pipeline];
        all.into_iter().flatten().try_for_each(|group| group.check())
    }
}

/// Measures collectives of values on this rank's GPU with the ranks of `control`; returns also the way
/// that they went.
///
/// # Errors
/// [`CollectiveError`].
pub(super) fn measure(
    control: &Arc<dyn Collective>,
    options: &Options,
) -> Result<(Vec<Measurement>, String), CollectiveError> {
    let rank = control.rank() as u32;
    let cuda = open(rank, MatmulPrecision::F32)
        .map_err(|error| CollectiveError::Io { op: "open", message: error.to_string() })?;
    let alone: Arc<dyn Collective> = Arc::new(local::group(1).remove(0));
    let groups = Groups {
        tensor: Arc::clone(control),
        pipeline: Arc::clone(control),
        data: alone,
        world: Arc::clone(control),
    };
    let Linked { groups, words } = link(&cuda, &groups, rank)?;
    let control = Arc::clone(control);
    let mut subject =
        OnGpu { cuda, control: Arc::clone(&control), groups, whole: None, elements: 0, part: 0 };
    let measured = measure_on(&*control, &mut subject, options)?;
    Ok((measured, words))
}
