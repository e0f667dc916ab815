//! Measures one rank's serving step: `serve_rate PRESET WEIGHTS THREADS BATCH [PROMPT MADE]`, with
//! WEIGHTS one of f32, f16, bf16 and int8.
//!
//! Prints one JSON object. The clock lives here: the engine has none. With one thread it is that
//! thread's time on a processor, so that a busy machine matters less.

use std::time::Instant;

use drumline_engine::bench::presets;
use drumline_engine::infer::rate::{ServingLoad, llama_110m, serve};
use drumline_tensor::{DType, peak};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: usize| {
        args.get(i).map_or(default, |a| a.parse().expect("a whole number"))
    };
    let name = args.first().map_or("llama-110m", String::as_str);
    let model = match name {
        "llama-110m" => llama_110m(),
        _ => presets().into_iter().find(|p| p.name == name).expect("a preset's name").model,
    };
    let weights = match args.get(1).map_or("bf16", String::as_str) {
        "f32" => DType::F32,
        "f16" => DType::F16,
        "bf16" => DType::Bf16,
        "int8" => DType::I8,
        other => panic!("{other} is none of f32, f16, bf16 and int8"),
    };
    let (threads, batch) = (number(2, 2), number(3, 1));
    let (prompt, made) = (number(4, 128), number(5, 64));
    let start = Instant::now();
    let seconds = || {
        if threads > 1 {
            return start.elapsed().as_secs_f64();
        }
        let spent = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        spent.tv_sec as f64 + spent.tv_nsec as f64 / 1e9
    };
    let load = ServingLoad { weights, threads, batch, prompt, made };
    let rate = serve(&model, load, &seconds).expect("it serves");
    let memory = peak::read_bandwidth(threads, 5, seconds).expect("there is memory");
    let bound = memory / rate.step_bytes * batch as f64;
    println!(
        "{{\"preset\": \"{name}\", \"weights\": \"{weights:?}\", \"threads\": {threads}, \
         \"batch\": {batch}, \"prefill_tokens_per_second\": {:.0}, \
         \"decode_tokens_per_second\": {:.1}, \"bandwidth_bound\": {bound:.1}, \
         \"memory_gb_per_second\": {:.1}, \"weights_mib\": {:.1}, \"cache_mib\": {:.1}, \
         \"buffers_mib\": {:.1}}}",
        rate.prefill_tokens_per_second,
        rate.decode_tokens_per_second,
        memory / 1e9,
        rate.memory.weights as f64 / (1u64 << 20) as f64,
        rate.memory.cache as f64 / (1u64 << 20) as f64,
        rate.memory.buffers as f64 / (1u64 << 20) as f64,
    );
}
