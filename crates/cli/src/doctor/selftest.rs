//! The tests of the processor, each a few seconds, and what GPUs are held against.

use std::process::Command;
use std::time::Instant;

use drumline_collective::bench::{self, Op, Options};
use drumline_engine::bench::{batches, in_process, job, presets};
use drumline_engine::{EngineError, Trainer};
use drumline_mesh::Mesh;
use drumline_spec::{Family, ModelConfig, Parallelism};
use drumline_tensor::{Backend, Cpu, peak};

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
            all_reduce(2, false),
            steps_of_a_split(),
        ]
    } else {
        Vec::new()
    };
    Device { name: "cpu".to_owned(), model: format!("{threads} threads"), checks }
}

pub(super) fn rate<E: std::fmt::Display>(
    name: &'static str,
    unit: &'static str,
    per: f64,
    measured: Result<f64, E>,
) -> Check {
    match measured {
        Ok(value) if value.is_finite() && value > 0.0 => {
            let (name, unit, message) = (name.to_owned(), unit.to_owned(), String::new());
            Check { name, value: Some(value / per), unit, verdict: Verdict::Good, message }
        }
        Ok(value) => bad(name, format!("measured {value}")),
        Err(error) => bad(name, error.to_string()),
    }
}

pub(super) fn bad(name: &str, message: String) -> Check {
    let (name, unit) = (name.to_owned(), String::new());
    Check { name, value: None, unit, verdict: Verdict::Bad, message }
}

/// Reduces 4 MiB between so many processes of this machine, in host memory or on a GPU each. The message
/// is what the first says of the way that values went.
pub(super) fn all_reduce(ranks: usize, on_gpus: bool) -> Check {
    const NAME: &str = "all-reduce";
    let binary = match std::env::current_exe() {
        Ok(binary) => binary,
        Err(error) => return bad(NAME, error.to_string()),
    };
    let sizes_bytes = vec![4 << 20];
    let options =
        Options { ops: vec![Op::AllReduce], sizes_bytes, rounds: 3, ..Options::default() };
    let measured = bench::run_told(ranks, true, &options, |_| {
        let mut command = Command::new(&binary);
        command.arg("bench-collective-worker");
        if on_gpus {
            command.arg("--gpu");
        }
        command
    });
    let mut way = String::new();
    let gibps = measured.map(|(all, told)| {
        way = told;
        all.first().map_or(0.0, |one| one.bus_gibps * 1.073_741_824e9)
    });
    let mut check = rate(NAME, "GB/s", 1e9, gibps);
    if check.verdict == Verdict::Good {
        check.message = way;
    }
    check
}

/// Trains a small model alone and split over two ranks, which must come to the same.
fn steps_of_a_split() -> Check {
    const NAME: &str = "training";
    let cpu = || Ok(Cpu::new(1)?);
    let both = losses(Parallelism::SINGLE, cpu).and_then(|alone| {
        let split = losses(Parallelism { tensor: 2, ..Parallelism::SINGLE }, cpu)?;
        Ok((alone, split))
    });
    match both {
        Ok((alone, split)) => compare(NAME, &alone, &split, "one rank and two"),
        Err(error) => bad(NAME, error.to_string()),
    }
}

pub(super) fn compare(name: &str, one: &[f32], other: &[f32], who: &str) -> Check {
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
    Check { name: name.to_owned(), value: None, unit: String::new(), verdict, message }
}

/// Returns the losses of a few steps on devices that `open` opens, one for each rank.
pub(super) fn losses<B: Backend>(
    split: Parallelism,
    open: impl Fn() -> Result<B, EngineError> + Sync,
) -> Result<Vec<f32>, EngineError> {
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
        let mut trainer = Trainer::new(&job, coords, groups, open()?)?;
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
