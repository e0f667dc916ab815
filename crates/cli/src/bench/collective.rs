//! `drumline bench collective`: what collectives cost between processes of this machine.

use std::process::Command;

use clap::Args;
use drumline_collective::bench::{self, Op, Options};
use drumline_collective::host::STREAMS_DEFAULT;

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
    let (ranks, shared_memory) = (usize::from(args.ranks), !args.tcp);
    let binary = std::env::current_exe()?;
    let measured = tokio::task::spawn_blocking(move || {
        bench::run(ranks, shared_memory, &options, |_| {
            let mut command = Command::new(&binary);
            command.arg("bench-collective-worker");
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
    let setting = format!("{ranks} processes over {way}; bus bandwidth as in NVIDIA's nccl-tests");
    let figures = measured
        .iter()
        .flat_map(|m| {
            let name = format!("{} of {} bytes", m.op.name(), m.bytes);
            let time = Figure::new(name.clone(), m.latency_us, "us");
            let rate = Figure::new(format!("{name}, bus"), m.bus_gibps, "GiB/s");
            if m.bytes == 0 { vec![time] } else { vec![time, rate] }
        })
        .collect();
    Ok(("collective", setting, figures))
}
