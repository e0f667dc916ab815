//! Measures one rank's serving step: `serve_rate PRESET THREADS BATCH [PROMPT MADE]`.
//!
//! Prints one JSON object. The clock lives here: the engine has none.

use std::time::Instant;

use drumline_engine::bench::{presets, serve};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: usize| {
        args.get(i).map_or(default, |a| a.parse().expect("a whole number"))
    };
    let name = args.first().map_or("llama-10m", String::as_str);
    let presets = presets();
    let preset = presets.iter().find(|p| p.name == name).expect("a preset's name");
    let (threads, batch) = (number(1, 2), number(2, 1));
    let (prompt, made) = (number(3, 128), number(4, 64));
    let start = Instant::now();
    let seconds = || start.elapsed().as_secs_f64();
    let rate = serve(&preset.model, threads, batch, prompt, made, &seconds).expect("it serves");
    println!(
        "{{\"preset\": \"{name}\", \"threads\": {threads}, \"batch\": {batch}, \
         \"prefill_tokens_per_second\": {:.0}, \"decode_tokens_per_second\": {:.0}, \
         \"weight_gib_per_second\": {:.1}}}",
        rate.prefill_tokens_per_second,
        rate.decode_tokens_per_second,
        rate.weight_bytes_per_second / (1u64 << 30) as f64
    );
}
