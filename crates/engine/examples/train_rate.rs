//! Measures the training step: `train_rate PRESET THREADS STEPS [TENSOR PIPELINE DATA MICRO]`.
//!
//! Prints one JSON object. The clock lives here: the engine has none.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use drumline_engine::bench::{job, presets, train};
use drumline_engine::{Probe, Span};
use drumline_spec::Parallelism;
use drumline_tensor::{Cpu, peak};

/// Adds up the seconds of each kind of stretch. Every rank's trainer has a clone, so with several
/// ranks the sums are over all of them.
#[derive(Default)]
struct Stopwatch {
    running: Mutex<std::collections::HashMap<(std::thread::ThreadId, usize), Instant>>,
    seconds: Mutex<[f64; 8]>,
}

fn index(span: Span) -> usize {
    Span::ALL.iter().position(|s| *s == span).unwrap_or(0)
}

impl Probe for Stopwatch {
    fn begin(&self, span: Span) {
        let key = (std::thread::current().id(), index(span));
        self.running.lock().unwrap().insert(key, Instant::now());
    }
    fn end(&self, span: Span) {
        let key = (std::thread::current().id(), index(span));
        let start = self.running.lock().unwrap().remove(&key).unwrap();
        self.seconds.lock().unwrap()[index(span)] += start.elapsed().as_secs_f64();
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: u32| {
        args.get(i).map_or(default, |a| a.parse().expect("a whole number"))
    };
    let name = args.first().map_or("gpt-10m", String::as_str);
    let presets = presets();
    let preset = presets.iter().find(|p| p.name == name).expect("a preset's name");
    let (threads, steps) = (number(1, 2), number(2, 5));
    let shape = Parallelism { tensor: number(3, 1), pipeline: number(4, 1), data: number(5, 1) };
    let micro = number(6, preset.batch / shape.data);
    let job = job(preset, shape, micro, u64::from(steps));
    let start = Instant::now();
    let probe = Arc::new(Stopwatch::default());
    let rate = train(&job, threads as usize, &|| start.elapsed().as_secs_f64(), &probe)
        .expect("training runs");
    let total_threads = threads as usize * shape.world_size() as usize;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let peak =
        peak::matmul_f32(total_threads.min(cores), 5, || start.elapsed().as_secs_f64()).unwrap();
    let sums = *probe.seconds.lock().unwrap();
    let all: f64 = sums.iter().sum();
    let shares: Vec<String> = Span::ALL
        .iter()
        .zip(sums)
        .map(|(span, s)| format!("\"{}\": {:.3}", span.as_str(), s / all))
        .collect();
    println!(
        "{{\"preset\": \"{name}\", \"threads\": {total_threads}, \"instructions\": \"{}\", \
         \"tokens_per_second\": {:.0}, \"best_tokens_per_second\": {:.0}, \"gflops\": {:.1}, \
         \"peak_gflops\": {:.1}, \"share_of_peak\": {:.3}, \"loss\": [{:.4}, {:.4}], \
         \"breakdown\": {{{}}}}}",
        Cpu::instructions(),
        rate.tokens_per_second,
        job.tokens_per_step() as f64
            / rate.step_seconds.iter().copied().fold(f64::INFINITY, f64::min),
        rate.flops / 1e9,
        peak / 1e9,
        rate.flops / peak,
        rate.loss.0,
        rate.loss.1,
        shares.join(", ")
    );
}
