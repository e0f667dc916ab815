//! `drumline bench profile` and `drumline bench plan`: this node's measurements for the planner,
//! and how well the planner predicts this node's engine with them.

use std::path::PathBuf;
use std::process::Command;

use clap::Args;
use drumline_collective::bench as collective;
use drumline_planner::profile::{CollectivePoint, Profile};
use drumline_tensor::MatmulPrecision;
use serde_json::{Value, json};

use super::gpu::{self, DeviceArg};
use super::node::{self, Extent, Samples, Setting};
use super::{Figure, Measured, predict};
use crate::failure::Failure;
use crate::output::{self, Format, note};

/// Arguments of `bench profile`.
#[derive(Debug, Args)]
pub struct ProfileArgs {
    /// Write the profile to this file, for `drumline plan --profile FILE`.
    #[arg(long, value_name = "FILE")]
    pub output_file: Option<PathBuf>,
    /// What is measured: the processor, or one GPU.
    #[arg(long, value_enum, default_value_t = DeviceArg::Cpu)]
    pub device: DeviceArg,
    /// The least of everything: shows that it runs, and nothing else.
    #[arg(long, hide = true)]
    pub least: bool,
    /// Threads of a rank.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: u32,
    /// Ranks that compute at one time; 0: as many as the cores hold.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=64))]
    pub ranks: u32,
    /// Devices of the node, on which ranks may be placed; 0: as many as ranks.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1024))]
    pub devices: u32,
    /// Rounds of which the median is taken.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
}

/// Arguments of `bench plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Rounds, each of kernels and then of steps; medians are taken over all.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::failed(error.to_string())
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

pub(super) async fn run(args: &ProfileArgs) -> Result<Measured, Failure> {
    let threads = args.threads as usize;
    let at_once = if args.ranks == 0 { (cores() / threads).max(1) } else { args.ranks as usize };
    let on_gpu = args.device == DeviceArg::Gpu;
    let gpus = if on_gpu { gpu::count().map_err(failed)? } else { 0 };
    let extent = match args.device {
        _ if args.least => Extent::LEAST,
        DeviceArg::Cpu => Extent::PROCESSOR,
        DeviceArg::Gpu => Extent::GPU,
    };
    // GPUs do not share what the cores of a processor share: one is measured alone.
    let at_once = if on_gpu { 1 } else { at_once };
    let setting = Setting { threads, at_once, bf16: true, extent };
    let devices = match args.devices {
        0 if on_gpu => gpus as u32,
        0 => at_once as u32,
        given => given,
    };
    let rounds = args.rounds;
    let (binary, args_device) = (std::env::current_exe()?, args.device);
    let gpu_device = |rank: u32, matmul: MatmulPrecision| {
        gpu::open(rank, matmul).map_err(|error| error.during("open", "the GPU"))
    };
    let profile = tokio::task::spawn_blocking(move || -> Result<Profile, Failure> {
        let mut samples = Samples::default();
        for round in 0..rounds {
            note(&format!("round {} of {rounds}", round + 1));
            match args_device {
                DeviceArg::Cpu => node::round(setting, &node::processor(threads), 10, &mut samples),
                DeviceArg::Gpu => node::round(setting, &gpu_device, 10, &mut samples),
            }
            .map_err(failed)?;
        }
        let (name, memory) = if on_gpu {
            let cuda = gpu::open(0, MatmulPrecision::F32).map_err(failed)?;
            let of = cuda.device().properties();
            (of.name.clone(), of.memory as f64)
        } else {
            (processor(), memory_bytes() / f64::from(devices))
        };
        let mut profile = node::profile(name, setting, devices, memory, &samples);
        // Between processes, as ranks run: two of them, and as many as there are devices.
        let mut worlds = vec![2, devices.clamp(2, 16)];
        worlds.dedup();
        for ranks in worlds {
            for (shared, points) in
                [(true, &mut profile.all_reduce), (false, &mut profile.all_reduce_tcp)]
            {
                // Between GPUs where there are enough: over NCCL, or as it goes without.
                let on_gpus = on_gpu && shared && gpus >= ranks as usize;
                points.extend(between_processes(&binary, ranks, shared, on_gpus)?);
            }
        }
        Ok(profile)
    })
    .await
    .map_err(failed)??;
    let text = serde_json::to_string_pretty(&profile).map_err(failed)?;
    // What is written is read back by the rules of `plan --profile`.
    let profile = Profile::read("profile", &text).map_err(failed)?;
    if let Some(file) = &args.output_file {
        std::fs::write(file, text + "\n")
            .map_err(|error| Failure::user(format!("--output-file {}: {error}", file.display())))?;
        note(&format!(
            "the profile is in {}; `drumline plan train --profile {0}` uses it",
            file.display()
        ));
    }
    let words = match args.device {
        DeviceArg::Cpu => setting_words(setting, devices),
        DeviceArg::Gpu => format!("{}, {devices} devices", gpu::words(1)?),
    };
    Ok(("profile", words, figures(&profile)))
}

fn setting_words(setting: Setting, devices: u32) -> String {
    format!(
        "{} ranks of {} threads at work together, {devices} devices; products from 32 to 1,024 rows",
        setting.at_once, setting.threads
    )
}

/// Tells what the planner makes of the measurements.
fn figures(profile: &Profile) -> Vec<Figure> {
    let machines = profile.machines();
    let gpu = &machines.gpu;
    let c = &gpu.calibration;
    let best = profile
        .matmul
        .iter()
        .map(|p| 2.0 * f64::from(p.m) * f64::from(p.n) * f64::from(p.k) / p.seconds)
        .fold(0.0, f64::max);
    let mut figures = vec![Figure::new("matmul, best f32", best / 1e9, "GFLOP/s")];
    for (dtype, peak) in &gpu.peak_flops {
        let name = format!("matmul {dtype}, fitted peak");
        figures.push(Figure::new(name, peak * c.matmul_efficiency / 1e9, "GFLOP/s"));
    }
    figures.extend([
        Figure::new("inner dimension at half the peak", c.matmul_k_half, ""),
        Figure::new("time of one call", c.kernel_overhead_us, "us"),
        Figure::new("matmul fit, median error", 100.0 * profile.matmul_fit_error(), "%"),
        Figure::new("memory, by the optimizer", gpu.memory_bandwidth / 1e9, "GB/s"),
        Figure::new(
            "operators of a layer",
            gpu.memory_bandwidth * c.operator_efficiency / 1e9,
            "GB/s",
        ),
        Figure::new("attention, share of the peak", 100.0 * c.attention_efficiency, "%"),
        Figure::new("all-reduce in shared memory", gpu.link_bandwidth / 1e9, "GB/s"),
        Figure::new("its latency", c.link_latency_us, "us"),
        Figure::new("all-reduce over TCP", machines.network.nic_gbps / 8.0, "GB/s"),
        Figure::new("its latency over TCP", machines.network.latency_us, "us"),
    ]);
    figures
}

/// Measures all-reduces between so many processes of this host.
fn between_processes(
    binary: &std::path::Path,
    ranks: u32,
    shared_memory: bool,
    on_gpus: bool,
) -> Result<Vec<CollectivePoint>, Failure> {
    let measured = collective::run(ranks as usize, shared_memory, &node::all_reduces(20), |_| {
        let mut command = Command::new(binary);
        command.arg("bench-collective-worker");
        if on_gpus {
            command.arg("--gpu");
        }
        command
    })
    .map_err(failed)?;
    Ok(measured
        .iter()
        .map(|m| CollectivePoint { ranks, bytes: m.bytes as f64, seconds: m.latency_us * 1e-6 })
        .collect())
}

/// Returns this host's memory; a guess of 4 GiB where it is not told.
fn memory_bytes() -> f64 {
    let told = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
        line.split_whitespace().nth(1)?.parse::<f64>().ok()
    });
    told.map_or(4.0 * f64::from(1 << 30), |kib| kib * 1024.0)
}

fn processor() -> String {
    super::machine()["cpu"].as_str().unwrap_or("cpu").to_owned()
}

/// Runs `bench plan`: its answer is a table of runs, not a list of figures.
pub(super) async fn plan(args: &PlanArgs, format: Format) -> Result<(), Failure> {
    let rounds = args.rounds;
    let cores = cores();
    let rows = tokio::task::spawn_blocking(move || {
        predict::run(&predict::cases(cores), cores, rounds, &|text| note(&text))
    })
    .await
    .map_err(failed)?
    .map_err(Failure::failed)?;
    let mut errors: Vec<f64> = rows.iter().map(|row| row.error_percent.abs()).collect();
    errors.sort_by(f64::total_cmp);
    let (middle, worst) = (super::quantile(&errors, 0.5), super::quantile(&errors, 1.0));
    let value: Value = json!({
        "rows": rows,
        "median_absolute_error_percent": middle,
        "max_absolute_error_percent": worst,
        "cores": cores,
    });
    output::value(format, &value, || {
        let cells: Vec<Vec<String>> = rows
            .iter()
            .map(|row| {
                let (t, p, d) = row.split;
                vec![
                    row.model.to_owned(),
                    format!("{:.1} M", row.parameters as f64 / 1e6),
                    format!("tp{t} pp{p} dp{d}"),
                    row.threads.to_string(),
                    format!("{} x {} / {}", row.batch.0, row.sequence, row.batch.1),
                    format!("{:.1}", row.predicted * 1e3),
                    format!("{:.1}", row.measured * 1e3),
                    format!("{:+.1}%", row.error_percent),
                ]
            })
            .collect();
        let head = [
            "MODEL",
            "SIZE",
            "SPLIT",
            "THREADS",
            "BATCH / MICRO",
            "PREDICTED ms",
            "MEASURED ms",
            "ERROR",
        ];
        format!(
            "{}median absolute error {middle:.1}% (aim 15%), greatest {worst:.1}%, {} runs on {cores} cores\n",
            output::table(&head, &cells),
            rows.len()
        )
    })?;
    if cfg!(debug_assertions) {
        note("this is a debug build: its figures say little; build with --release");
    }
    Ok(())
}
