//! Measures one rank's serving step: `serve_rate PRESET WEIGHTS THREADS [MAX_BATCH MAX_CONTEXT CACHED PREFILL]`, with
//! WEIGHTS one of f32, f16, bf16 and int8; CACHED: the tokens that the cache holds (0: all that could be asked
//! for); PREFILL: the tokens of prompts in a step.
//!
//! Prints one JSON object with the memory that was planned beside what is resident; then, for each line
//! `BATCH PROMPT MADE` on its input, one with the rates, by the time of day, and the memory bandwidth of the
//! same moment. `tests/peers/compare_llama_cpp.py` asks several of these and llama.cpp in turn. The
//! clock lives here: the engine has none.

use std::io::BufRead;
use std::time::Instant;

use drumline_engine::bench::presets;
use drumline_engine::infer::rate::{Server, ServingLoad, Setting, llama_110m};
use drumline_tensor::{Cpu, DType, peak};
use serde_json::json;

/// Bytes of this process that are in memory; 0 where the system does not tell.
fn resident() -> usize {
    let told = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = told.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok());
    pages.unwrap_or(0) * rustix::param::page_size()
}

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
    let (threads, max_batch, max_context) = (number(2, 2), number(3, 1), number(4, 576));
    let (cached_tokens, prefill_tokens) = (number(5, 0), number(6, 512));
    let start = Instant::now();
    let seconds = || start.elapsed().as_secs_f64();
    let before = resident();
    let setting =
        Setting { weights, threads, max_batch, max_context, cached_tokens, prefill_tokens };
    let mut server = Server::new(&model, setting).expect("it fits");
    let warm = ServingLoad { batch: 1, prompt: max_context - 2, made: 2 };
    server.run(warm, &seconds).expect("it serves");
    let memory = server.memory();
    let after = resident();
    let told = json!({
        "preset": name, "weights": format!("{weights:?}"), "threads": threads,
        "instructions": Cpu::instructions(), "max_batch": max_batch, "max_context": max_context,
        "prefill": prefill_tokens,
        "weights_bytes": memory.weights, "cache_bytes": memory.cache, "buffers_bytes": memory.buffers,
        "scratch_bytes": memory.scratch,
        "resident_bytes": after, "resident_before_bytes": before,
        "over_weights_and_cache": after as f64 / (memory.weights + memory.cache) as f64,
    });
    println!("{told}");
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("lines of text");
        let load: Vec<usize> =
            line.split_whitespace().map(|n| n.parse().expect("a whole number")).collect();
        let [batch, prompt, made] = load[..] else { panic!("{line:?} is not BATCH PROMPT MADE") };
        let load = ServingLoad { batch, prompt, made };
        let rate = server.run(load, &seconds).expect("it serves");
        let bytes = peak::read_bandwidth(threads, 3, seconds).expect("there is memory");
        let told = json!({
            "batch": batch, "prompt": prompt, "made": made,
            "prefill_tokens_per_second": rate.prefill_tokens_per_second,
            "decode_tokens_per_second": rate.decode_tokens_per_second,
            "bandwidth_bound": bytes / rate.step_bytes * batch as f64,
            "memory_gb_per_second": bytes / 1e9,
        });
        println!("{told}");
    }
}
