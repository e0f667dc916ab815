//! Rates of matrix products, by shape: `cargo run --release -p drumline-tensor --example
//! matmul_rate -- [threads] [rounds]`. Each round runs all kinds in turn, so that a busy machine
//! slows all alike; the median counts.

use std::time::Instant;

use drumline_tensor::cpu::simd::{self, Level};
use drumline_tensor::reference::Random;
use drumline_tensor::{Backend, Cpu, CpuOptions, Linear, MatmulPrecision, WeightLayout, peak};

const SHAPES: [(usize, usize, usize); 10] = [
    (2048, 384, 384),
    (2048, 384, 1152),
    (2048, 384, 1536),
    (2048, 1536, 384),
    (2048, 384, 256),
    (512, 768, 768),
    (512, 768, 3072),
    (512, 3072, 768),
    (256, 384, 1536),
    (64, 384, 1536),
];

/// Returns this thread's time on a processor, in seconds: a busy machine matters less. With several
/// threads, the time of day.
fn seconds(threads: usize, start: Instant) -> f64 {
    if threads > 1 {
        return start.elapsed().as_secs_f64();
    }
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    spent.tv_sec as f64 + spent.tv_nsec as f64 / 1e9
}

fn main() {
    let mut arguments = std::env::args().skip(1).map(|a| a.parse::<usize>().unwrap());
    let threads = arguments.next().unwrap_or(1);
    let rounds = arguments.next().unwrap_or(9);
    let backend = |matmul| {
        Cpu::with_options(CpuOptions { threads, matmul, ..CpuOptions::default() }).unwrap()
    };
    let (f32s, bf16s) = (backend(MatmulPrecision::F32), backend(MatmulPrecision::Bf16));
    let start = Instant::now();
    let clock = || seconds(threads, start);
    let peaks = [
        peak::matmul(threads, MatmulPrecision::F32, 9, clock).unwrap(),
        peak::matmul(threads, MatmulPrecision::Bf16, 9, clock).unwrap(),
    ];
    println!(
        "{threads} threads, {}; peaks f32 {:.0} and bf16 {:.0} GFLOP/s, memory {:.1} GB/s",
        Cpu::instructions(),
        peaks[0] / 1e9,
        peaks[1] / 1e9,
        peak::read_bandwidth(threads, 5, clock).unwrap() / 1e9
    );
    println!("GFLOP/s: gemm crate, f32, bf16");
    let mut random = Random::new(1);
    for (rows, input, output) in SHAPES {
        for layout in [WeightLayout::OutIn, WeightLayout::InOut] {
            let s = Linear { rows, input, output, layout };
            let (x, w) = (random.values(rows * input), random.values(input * output));
            let dy = random.values(rows * output);
            let mut times: [[Vec<f64>; 3]; 3] = Default::default();
            let (mut y, mut dx, mut dw) =
                (vec![0.0; dy.len()], vec![0.0; x.len()], vec![0.0; w.len()]);
            for _ in 0..=rounds {
                for (kind, times) in times.iter_mut().enumerate() {
                    let cpu = if kind == 2 { &bf16s } else { &f32s };
                    // Where nothing of our own may be used, the gemm crate is.
                    simd::limit(if kind == 0 { Level::Plain } else { Level::Avx512Bf16 });
                    cpu.scope(|| {
                        for (pass, times) in times.iter_mut().enumerate() {
                            let begin = clock();
                            match pass {
                                0 => cpu.linear(s, &x, &w, None, &mut y),
                                1 => cpu.linear_grad_input(s, &dy, &w, &mut dx),
                                _ => cpu.linear_grad_weight(s, &x, &dy, &mut dw, false),
                            }
                            times.push(clock() - begin);
                        }
                    });
                }
            }
            let flops = 2.0 * (rows * input * output) as f64 / 1e9;
            let rate = |times: &mut Vec<f64>| {
                times.remove(0);
                times.sort_by(f64::total_cmp);
                flops / times[times.len() / 2]
            };
            let cells: Vec<String> = ["forward", "input", "weight"]
                .iter()
                .enumerate()
                .map(|(pass, name)| {
                    let [a, b, c] = [0, 1, 2].map(|kind| rate(&mut times[kind][pass]));
                    format!("{name} {a:4.0} {b:4.0} {c:4.0}")
                })
                .collect();
            println!("{rows:5} x {input:4} x {output:4} {layout:?}: {}", cells.join(" | "));
        }
    }
}
