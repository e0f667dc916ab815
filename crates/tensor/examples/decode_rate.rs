//! Rates of stored matrices with few rows: `cargo run --release -p drumline-tensor --example
//! decode_rate -- [threads] [rounds]`. About 94 million weights are read in every pass, more than
//! any cache holds. With one thread, its time on the processor counts, else the time of day.

use std::time::Instant;

use drumline_tensor::reference::Random;
use drumline_tensor::{Backend, Cpu, DType, Linear, WeightLayout, peak};

/// As `examples/matmul_rate.rs`.
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
    let rounds = arguments.next().unwrap_or(5);
    let cpu = Cpu::new(threads).unwrap();
    let start = Instant::now();
    let clock = || seconds(threads, start);
    let memory = peak::read_bandwidth(threads, rounds, clock).unwrap();
    println!("{threads} threads, {}; memory {:.1} GB/s", Cpu::instructions(), memory / 1e9);
    let s = Linear { rows: 1, input: 768, output: 3072, layout: WeightLayout::OutIn };
    let mut random = Random::new(1);
    let w = random.values(s.input * s.output);
    let kinds = [DType::F32, DType::F16, DType::Bf16, DType::I8];
    let matrix = |dtype| {
        let mut matrix = cpu.alloc_matrix(dtype, s).unwrap();
        cpu.write_matrix(&w, &mut matrix);
        matrix
    };
    let matrices = kinds.map(|dtype| (0..40).map(|_| matrix(dtype)).collect::<Vec<_>>());
    let counts = [1usize, 2, 4, 8, 16, 32, 256];
    let x = random.values(256 * s.input);
    let mut y = vec![0.0; 256 * s.output];
    let mut times = vec![vec![Vec::new(); counts.len()]; kinds.len()];
    for _ in 0..=rounds {
        for (kind, matrices) in matrices.iter().enumerate() {
            for (at, rows) in counts.into_iter().enumerate() {
                cpu.scope(|| {
                    let begin = clock();
                    for w in matrices {
                        let y = &mut y[..rows * s.output];
                        cpu.linear_stored(rows, &x[..rows * s.input], w, None, y);
                    }
                    times[kind][at].push(clock() - begin);
                });
            }
        }
    }
    for (kind, dtype) in kinds.into_iter().enumerate() {
        let bytes: usize = matrices[kind].iter().map(|m| cpu.matrix_bytes(m)).sum();
        let medians: Vec<f64> = times[kind]
            .iter_mut()
            .map(|times| {
                times.remove(0);
                times.sort_by(f64::total_cmp);
                times[times.len() / 2]
            })
            .collect();
        let cells: Vec<String> = counts
            .iter()
            .zip(&medians)
            .map(|(rows, t)| {
                format!("{rows}: {:.1} ms, {:.1}x", t * 1e3, *rows as f64 * medians[0] / t)
            })
            .collect();
        let rate = bytes as f64 / medians[0];
        println!(
            "{dtype:?}: 1 row at {:.1} GB/s, {:.0}% of memory | rows {}",
            rate / 1e9,
            100.0 * rate / memory,
            cells.join(" | ")
        );
    }
}
