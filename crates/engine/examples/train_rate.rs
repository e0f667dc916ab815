//! Measures the training step: `train_rate PRESET THREADS STEPS [TENSOR PIPELINE DATA MICRO]`.
//!
//! Prints one line; `drumline bench train --breakdown` tells more. The clock lives here: the engine
//! has none.

use std::time::Instant;

use drumline_engine::NoProbe;
use drumline_engine::bench::{job, presets, train};
use drumline_spec::Parallelism;

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
    let job = job(preset, shape, number(6, preset.batch / shape.data), u64::from(steps));
    let start = Instant::now();
    let seconds = || start.elapsed().as_secs_f64();
    let rate = train(&job, threads as usize, &seconds, &NoProbe).expect("training runs");
    println!(
        "{name} {:.0} tokens/s {:.1} GFLOP/s loss {:.4} {:.4}",
        rate.tokens_per_second,
        rate.flops / 1e9,
        rate.loss.0,
        rate.loss.1
    );
}
