//! `drumline bench collective`: what collectives cost between processes of this machine, on values in
//! host memory or on GPUs.

use std::process::Command;

use clap::Args;
use drumline_collective::bench::{self, BenchError, Op, Options};
use drumline_collective::host::STREAMS_DEFAULT;

use super::gpu::{self, DeviceArg};
use super::{Figure, Measured};
use crate::failure::Failure;

/// Arguments of `bench collective`.
#[derive(Debug, Args)]
pub struct CollectiveArgs {
    /// Ranks, each a process.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(2..=64))]
    pub ranks: u16,
    /// Over TCP alone, without shared memory.
    #[arg(long)]
    pub tcp: bool,
    /// TCP connections between two ranks.
    #[arg(long, default_value_t = STREAMS_DEFAULT as u16, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub streams: u16,
    /// Only this operation, such as all_reduce.
    #[arg(long)]
    pub op: Option<String>,
    /// Where the values are. Ranks go round the GPUs; over NCCL where it can be, else through host
    /// memory.
    #[arg(long, value_enum, default_value_t = DeviceArg::Cpu)]
    pub device: DeviceArg,
    /// Greatest size, in bytes.
    #[arg(long, default_value_t = 256 << 20, value_parser = clap::value_parser!(u64).range(1024..=16 << 30))]
    pub bytes_max: u64,
}

pub(super) async fn run(args: &CollectiveArgs) -> Result<Measured, Failure> {
    let mut options = Options { streams: usize::from(args.streams), ..Options::default() };
    if let Some(name) = &args.op {
        options.ops.retain(|op| op.name() == name);
        if options.ops.is_empty() {
            let names: Vec<_> = Op::ALL.iter().map(|op| op.name()).collect();
            return Err(Failure::user(format!("--op {name:?} is not one of {}", names.join(", "))));
        }
    }
    options.sizes_bytes.retain(|bytes| *bytes as u64 <= args.bytes_max);
    let (ranks, shared_memory) = (usize::from(args.ranks), !args.tcp);
    let on_gpus = args.device == DeviceArg::Gpu;
    if on_gpus {
        // Before any process is started: the error says what is missing.
        gpu::count().map_err(|error| Failure::failed(error.to_string()))?;
    }
    let binary = std::env::current_exe()?;
    let (measured, told) = tokio::task::spawn_blocking(move || {
        bench::run_told(ranks, shared_memory, &options, |_| {
            let mut command = Command::new(&binary);
            command.arg("bench-collective-worker");
            if on_gpus {
                command.arg("--gpu");
            }
            command
        })
    })
    .await
    .map_err(|error| Failure::failed(error.to_string()))?
    .map_err(|error| Failure::failed(error.to_string()))?;
    let way = if shared_memory {
        "shared memory".to_owned()
    } else {
        format!("TCP ({} connections a pair)", args.streams)
    };
    let way = match args.device {
        DeviceArg::Cpu => format!("{ranks} processes over {way}"),
        DeviceArg::Gpu => {
            format!("{}; {told}; processes linked by {way}", gpu::words(u32::from(args.ranks))?)
        }
    };
    let setting = format!("{way}; algorithm and bus bandwidth as in NVIDIA's nccl-tests");
    let figures = measured
        .iter()
        .flat_map(|m| {
            let name = format!("{} of {} bytes", m.op.name(), m.bytes);
            let time = Figure::new(name.clone(), m.latency_us, "us");
            let rate = |what, gibps| Figure::new(format!("{name}, {what}"), gibps, "GiB/s");
            let rates = [rate("algorithm", m.algorithm_gibps), rate("bus", m.bus_gibps)];
            if m.bytes == 0 { vec![time] } else { std::iter::once(time).chain(rates).collect() }
        })
        .collect();
    Ok(("collective", setting, figures))
}

/// Runs as one process of the benchmark, with values on a GPU where `on_gpu` says so: the body of the
/// hidden role.
///
/// # Errors
/// [`BenchError`].
pub(crate) fn worker(on_gpu: bool) -> Result<(), BenchError> {
    let mut input = std::io::BufReader::new(std::io::stdin());
    let mut output = std::io::stdout();
    if !on_gpu {
        return bench::worker(&mut input, &mut output);
    }
    bench::worker_with(&mut input, &mut output, &mut gpu::measure)
}
