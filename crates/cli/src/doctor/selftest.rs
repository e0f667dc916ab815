//! The tests of one device, each a few seconds.

use std::process::Command;
use std::time::Instant;

use drumline_collective::bench::{self, Op, Options};
use drumline_engine::bench::{batches, in_process, job, presets};
use drumline_engine::{EngineError, Trainer};
use drumline_mesh::Mesh;
use drumline_spec::{Family, ModelConfig, Parallelism};
use drumline_tensor::{Cpu, peak};

use super::libraries::{Found, Seen};
use super::report::{Check, Device, Verdict};

/// Steps of training: enough for an optimizer step to depend on earlier ones.
const STEPS: u64 = 4;
/// Two devices that train the same differ by rounding alone: single precision, sums of a few
/// thousand numbers, a few steps.
const LOSS_TOLERANCE: f64 = 1e-4;

/// Tests the processor.
pub(super) fn cpu(test: bool) -> Device {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let checks = if test {
        let clock = Instant::now();
        let seconds = move || clock.elapsed().as_secs_f64();
        vec![
            rate("matmul", "GFLOP/s", 1e9, peak::matmul_f32(threads, 4, seconds)),
            rate("memory read", "GB/s", 1e9, peak::read_bandwidth(threads, 2, seconds)),
            all_reduce(),
            steps_of_a_split(),
        ]
    } else {
        Vec::new()
    };
    Device { name: "cpu".to_owned(), model: format!("{threads} threads"), checks }
}

/// Tests a GPU: whether it answers, whether the driver objects to it, and whether everything that it
/// needs to compute is there.
pub(super) fn gpu(seen: &Seen, found: &Found, test: bool) -> Device {
    let mut checks = vec![driver_content(seen)];
    if test {
        let missing = found.missing_for_compute();
        if !missing.is_empty() {
            checks.push(Check {
                name: "compute",
                value: None,
                unit: "",
                verdict: Verdict::Bad,
                message: format!("missing: {}", missing.join(", ")),
            });
        }
    }
    let name = match seen.gpu.mig {
        Some(instance) => format!("gpu {} instance {instance}", seen.gpu.index),
        None => format!("gpu {}", seen.gpu.index),
    };
    Device { name, model: seen.gpu.model.clone(), checks }
}

/// Judges what the driver tells of a GPU, as an agent does.
fn driver_content(seen: &Seen) -> Check {
    use drumline_agent::health::{Signs, judge};
    let signs = Signs {
        recovery: seen.sample.recovery,
        lost: seen.sample.lost.clone(),
        remap_pending: seen.sample.remap_pending.unwrap_or(false),
        remap_failed: seen.sample.remap_failed.unwrap_or(false),
        ..Signs::default()
    };
    let verdict = judge(&signs);
    Check {
        name: "driver",
        value: None,
        unit: "",
        verdict: if verdict.action.is_usable() { Verdict::Good } else { Verdict::Bad },
        message: verdict.reason,
    }
}

fn rate<E: std::fmt::Display>(
    name: &'static str,
    unit: &'static str,
    per: f64,
    measured: Result<f64, E>,
) -> Check {
    match measured {
        Ok(value) if value.is_finite() && value > 0.0 => {
            let message = String::new();
            Check { name, value: Some(value / per), unit, verdict: Verdict::Good, message }
        }
        Ok(value) => bad(name, format!("measured {value}")),
        Err(error) => bad(name, error.to_string()),
    }
}

fn bad(name: &'static str, message: String) -> Check {
    Check { name, value: None, unit: "", verdict: Verdict::Bad, message }
}

/// Reduces 4 MiB between two processes of this machine.
fn all_reduce() -> Check {
    const NAME: &str = "all-reduce";
    let binary = match std::env::current_exe() {
        Ok(binary) => binary,
        Err(error) => return bad(NAME, error.to_string()),
    };
    let sizes_bytes = vec![4 << 20];
    let options =
        Options { ops: vec![Op::AllReduce], sizes_bytes, rounds: 3, ..Options::default() };
    let measured = bench::run(2, true, &options, |_| {
        let mut command = Command::new(&binary);
        command.arg("bench-collective-worker");
        command
    });
    let gibps = measured.map(|all| all.first().map_or(0.0, |one| one.bus_gibps * 1.073_741_824e9));
    rate(NAME, "GB/s", 1e9, gibps)
}

/// Trains a small model alone and split over two ranks, which must come to the same.
fn steps_of_a_split() -> Check {
    const NAME: &str = "training";
    let both = losses(Parallelism::SINGLE).and_then(|alone| {
        let split = losses(Parallelism { tensor: 2, ..Parallelism::SINGLE })?;
        Ok((alone, split))
    });
    match both {
        Ok((alone, split)) => compare(NAME, &alone, &split, "one rank and two"),
        Err(error) => bad(NAME, error.to_string()),
    }
}

fn compare(name: &'static str, one: &[f32], other: &[f32], who: &str) -> Check {
    let greatest = one
        .iter()
        .zip(other)
        .map(|(a, b)| f64::from((a - b).abs() / a.abs().max(f32::MIN_POSITIVE)))
        .fold(0.0, |worst: f64, x| if x.is_nan() { f64::INFINITY } else { worst.max(x) });
    let learns = one.last() < one.first();
    let message = format!("losses of {who} differ by {greatest:.1e}, at most {LOSS_TOLERANCE:.0e}");
    let verdict = if greatest <= LOSS_TOLERANCE && learns && one.len() == other.len() {
        Verdict::Good
    } else {
        Verdict::Bad
    };
    let message = if learns { message } else { format!("{message}; the loss does not fall") };
    Check { name, value: None, unit: "", verdict, message }
}

/// Returns the losses of a few steps on the CPU.
fn losses(split: Parallelism) -> Result<Vec<f32>, EngineError> {
    let presets = presets();
    let Some(preset) = presets.first() else { return Ok(Vec::new()) };
    let mut preset = preset.clone();
    preset.model = ModelConfig {
        family: Family::Llama,
        layers: 2,
        hidden: 64,
        ffn: 192,
        heads: 4,
        kv_heads: 2,
        vocab: 128,
        context: 64,
        ..preset.model
    };
    (preset.batch, preset.sequence) = (4, 64);
    let mut job = job(&preset, split, 4, STEPS);
    job.learning_rate.peak = 1e-2;
    let mesh = Mesh::new(split);
    let ranks = in_process(mesh, |rank, groups| {
        let coords = mesh.coords(rank);
        let mut trainer = Trainer::new(&job, coords, groups, Cpu::new(1)?)?;
        (0..STEPS)
            .map(|step| Ok(trainer.step(step, &batches(&job, coords.data, step))?.loss))
            .collect::<Result<Vec<f32>, EngineError>>()
    });
    ranks.into_iter().next().unwrap_or_else(|| Ok(Vec::new()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_that_differ_or_do_not_fall_are_bad() {
        let verdict = |one: &[f32], other: &[f32]| compare("t", one, other, "x").verdict;
        assert_eq!(verdict(&[4.0, 3.0], &[4.0, 3.0001]), Verdict::Good);
        assert_eq!(verdict(&[4.0, 3.0], &[4.0, 3.1]), Verdict::Bad);
        assert_eq!(verdict(&[4.0, 3.0], &[4.0, f32::NAN]), Verdict::Bad);
        assert_eq!(verdict(&[3.0, 4.0], &[3.0, 4.0]), Verdict::Bad);
        assert_eq!(verdict(&[4.0, 3.0], &[4.0]), Verdict::Bad);
    }

    #[test]
    fn the_processor_trains_alike_alone_and_split() {
        let check = steps_of_a_split();
        assert_eq!(check.verdict, Verdict::Good, "{}", check.message);
    }
}
