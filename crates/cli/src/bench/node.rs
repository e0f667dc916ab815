//! Measures what the planner asks of a node: matrix products from thin to large, memory, the
//! operators of a layer, attention, and all-reduces, on the engine's own kernels.
//!
//! A measurement holds for ranks of so many threads while so many of them compute: ranks of one
//! host share its caches, its memory and its clock, so all are measured at work together.

use std::collections::BTreeMap;
use std::sync::Barrier;
use std::time::Instant;

use drumline_collective::bench::{self, Op, Options};
use drumline_planner::Dtype;
use drumline_planner::profile::{
    AttentionPoint, CollectivePoint, MatmulPoint, OperatorPoint, Profile,
};
use drumline_tensor::{
    AdamW, Attention, Backend, Cpu, CpuOptions, Linear, MatmulPrecision, NormKind, Normalise,
    Rotary, TensorError, WeightLayout,
};

/// Rows, inputs and outputs of the products: tokens from few to many, matrices from those of a
/// split layer of a small model to those of a whole one.
const ROWS: [usize; 4] = [32, 128, 512, 1024];
const MATRICES: [(usize, usize); 6] =
    [(128, 512), (256, 1024), (512, 512), (512, 1536), (1024, 256), (1536, 512)];
/// Tokens of one micro-batch, and a layer's widths, for the operators.
const TOKENS: usize = 512;
const WIDTH: usize = 512;
const INNER: usize = 2048;
/// Parameters of the optimizer's pass: 128 MiB in its four arrays, more than caches hold.
const STREAMED: usize = 8 << 20;

/// Which ranks are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Setting {
    /// Threads of each.
    pub(super) threads: usize,
    /// Ranks that compute at one time.
    pub(super) at_once: usize,
    /// Products in bf16 too.
    pub(super) bf16: bool,
}

/// Samples of every kernel, by its place in the list, over all rounds so far.
#[derive(Debug, Default)]
pub(super) struct Samples {
    kernels: Vec<Vec<f64>>,
    collectives: BTreeMap<(u32, u64), Vec<f64>>,
}

/// One kernel, as the profile describes it.
#[derive(Debug, Clone)]
enum Kernel {
    Product { shape: Linear, pass: Pass, precision: MatmulPrecision },
    Operator { name: &'static str, numbers: f64 },
    Attention { sequence: usize, heads: usize, head_dim: usize },
    Stream,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    GradInput,
    GradWeight,
}

/// Lists the kernels in the order in which they are measured.
fn kernels(bf16: bool) -> Vec<Kernel> {
    let mut list = vec![Kernel::Stream];
    let precisions = [MatmulPrecision::F32, MatmulPrecision::Bf16];
    for precision in precisions.into_iter().take(if bf16 { 2 } else { 1 }) {
        for (i, rows) in ROWS.into_iter().enumerate() {
            for (j, (input, output)) in MATRICES.into_iter().enumerate() {
                // Both ways in which the engine's families keep their weights.
                let layout =
                    if (i + j) % 2 == 0 { WeightLayout::InOut } else { WeightLayout::OutIn };
                let shape = Linear { rows, input, output, layout };
                for pass in [Pass::Forward, Pass::GradInput, Pass::GradWeight] {
                    list.push(Kernel::Product { shape, pass, precision });
                }
            }
        }
    }
    let (n, d, f) = (TOKENS as f64, WIDTH as f64, INNER as f64);
    list.extend([
        Kernel::Operator { name: "add_norm", numbers: 2.0 * 4.0 * n * d },
        Kernel::Operator { name: "norm_grad", numbers: 2.0 * 4.0 * n * d },
        Kernel::Operator { name: "rotary", numbers: 2.0 * 4.0 * n * d },
        Kernel::Operator { name: "gelu", numbers: 2.0 * n * f },
        Kernel::Operator { name: "gelu_grad", numbers: 3.0 * n * f },
        Kernel::Operator { name: "swiglu", numbers: 3.0 * n * f },
        Kernel::Operator { name: "swiglu_grad", numbers: 5.0 * n * f },
    ]);
    for (sequence, heads, head_dim) in [(128, 32, 64), (256, 16, 64), (256, 32, 32), (512, 8, 64)] {
        list.push(Kernel::Attention { sequence, heads, head_dim });
    }
    list
}

/// What the kernels of one rank work on. Factors are only read, and what is updated in place keeps
/// its size: numbers that grow or shrink with each call would end as infinities or denormals, which
/// processors treat in their own time.
struct Bench {
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    out: Vec<f32>,
    twos: Vec<f32>,
    /// Cosines and sines of no rotation.
    table: Vec<f32>,
    stats: Vec<f32>,
    vector: Vec<f32>,
    moments: (Vec<f32>, Vec<f32>),
}

impl Bench {
    fn new() -> Self {
        // Not zeros, so that no processor can take a short cut.
        let fill = |n: usize, by: usize| (0..n).map(|i| (i % by) as f32 * 0.01 + 0.01).collect();
        Self {
            a: fill(STREAMED, 13),
            b: fill(STREAMED, 7),
            c: fill(STREAMED, 11),
            out: fill(STREAMED, 3),
            twos: vec![2.0; TOKENS * INNER],
            table: (0..TOKENS * 64).map(|i| if i % 64 < 32 { 1.0 } else { 0.0 }).collect(),
            stats: vec![1.0; 2 * ROWS[3] + 64 * 2048],
            vector: fill(INNER * 2, 5),
            moments: (vec![0.0; STREAMED], vec![0.0; STREAMED]),
        }
    }

    /// Runs one kernel once.
    fn call(&mut self, cpu: &Cpu, kernel: &Kernel) {
        let Self { a, b, c, out, twos, table, stats, vector, moments } = self;
        match kernel {
            Kernel::Stream => {
                let step = AdamW {
                    learning_rate: 1e-6,
                    beta1: 0.9,
                    beta2: 0.95,
                    epsilon: 1e-8,
                    weight_decay: 0.1,
                    correction1: 0.5,
                    correction2: 0.5,
                    gradient_scale: 1.0,
                };
                cpu.sum_squares(b);
                cpu.adamw(step, out, b, &mut moments.0, &mut moments.1);
            }
            Kernel::Product { shape, pass, .. } => {
                let Linear { rows, input, output, .. } = *shape;
                let (x, w, y) = (rows * input, input * output, rows * output);
                match pass {
                    Pass::Forward => {
                        cpu.linear(*shape, &a[..x], &b[..w], None, &mut out[..y]);
                    }
                    Pass::GradInput => {
                        cpu.linear_grad_input(*shape, &c[..y], &b[..w], &mut out[..x]);
                    }
                    Pass::GradWeight => {
                        cpu.linear_grad_weight(*shape, &a[..x], &c[..y], &mut out[..w], false);
                    }
                }
            }
            Kernel::Operator { name, .. } => {
                let (n, d, f) = (TOKENS, WIDTH, INNER);
                let norm = Normalise { rows: n, width: d, kind: NormKind::Layer, epsilon: 1e-5 };
                let rotary = Rotary {
                    rows: n,
                    width: 2 * d,
                    heads: 2 * d / 64,
                    head_dim: 64,
                    inverse: false,
                };
                let (gain, bias) = vector.split_at_mut(INNER);
                let stats = &mut stats[..2 * n];
                match *name {
                    "add_norm" => {
                        let (sum, y) = out[..2 * n * d].split_at_mut(n * d);
                        let x = &a[..n * d];
                        for _ in 0..2 {
                            let branch = &b[..n * d];
                            cpu.add_norm(
                                norm,
                                x,
                                branch,
                                None,
                                sum,
                                &gain[..d],
                                Some(&bias[..d]),
                                y,
                                stats,
                            );
                        }
                    }
                    "norm_grad" => {
                        for _ in 0..2 {
                            let (dgain, dbias) = moments.0[..2 * d].split_at_mut(d);
                            let dx = &mut out[..n * d];
                            let (dy, x) = (&a[..n * d], &a[n * d..2 * n * d]);
                            cpu.norm_grad(norm, dy, x, &gain[..d], stats, dx, dgain, Some(dbias));
                        }
                    }
                    "rotary" => {
                        let positions: Vec<u32> = (0..n as u32).collect();
                        for _ in 0..2 {
                            cpu.rotary(rotary, &table[..], &positions, &mut out[..n * 2 * d]);
                        }
                    }
                    "gelu" => cpu.gelu(&a[..n * f], &mut out[..n * f]),
                    "gelu_grad" => cpu.gelu_grad(&mut out[..n * f], &twos[..n * f]),
                    "swiglu" => cpu.swiglu(f, &a[..2 * n * f], &mut out[..n * f]),
                    _ => cpu.swiglu_grad(f, &mut out[..2 * n * f], &twos[..n * f]),
                }
            }
            Kernel::Attention { sequence, heads, head_dim } => {
                let shape = Attention {
                    batch: 1,
                    sequence: *sequence,
                    heads: *heads,
                    kv_heads: *heads,
                    head_dim: *head_dim,
                };
                let n = sequence * heads * head_dim;
                let lse = &mut stats[..sequence * heads];
                let (qkv, out) = (&a[..3 * n], &mut out[..n]);
                cpu.attention(shape, qkv, out, lse);
                cpu.attention_grad(shape, qkv, out, lse, &b[..n], &mut moments.0[..3 * n]);
            }
        }
    }
}

/// Runs every kernel for about `round_ms` on `at_once` ranks together, and adds one sample each.
///
/// # Errors
/// [`TensorError`] when memory or threads cannot be had.
pub(super) fn round(
    setting: Setting,
    round_ms: u64,
    samples: &mut Samples,
) -> Result<(), TensorError> {
    let list = kernels(setting.bf16);
    samples.kernels.resize(list.len(), Vec::new());
    let mut ranks = Vec::with_capacity(setting.at_once);
    for _ in 0..setting.at_once {
        let cpu = |matmul| {
            Cpu::with_options(CpuOptions {
                threads: setting.threads,
                matmul,
                ..CpuOptions::default()
            })
        };
        ranks.push((cpu(MatmulPrecision::F32)?, cpu(MatmulPrecision::Bf16)?, Bench::new()));
    }
    let (gate, list) = (&Barrier::new(setting.at_once), &list);
    let times: Vec<Vec<f64>> = std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|(f32, bf16, mut bench)| {
                scope.spawn(move || -> Vec<f64> {
                    let measure = |kernel: &Kernel| {
                        let cpu = match kernel {
                            Kernel::Product { precision: MatmulPrecision::Bf16, .. } => &bf16,
                            _ => &f32,
                        };
                        // All ranks begin together: each is measured while the others work.
                        gate.wait();
                        cpu.scope(|| timed(cpu, &mut bench, kernel, round_ms))
                    };
                    list.iter().map(measure).collect()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    for (i, samples) in samples.kernels.iter_mut().enumerate() {
        let sum: f64 = times.iter().filter_map(|rank| rank.get(i)).sum();
        samples.push(sum / times.len() as f64);
    }
    Ok(())
}

/// Returns the seconds of one call, over as many as fill `round_ms`.
fn timed(cpu: &Cpu, bench: &mut Bench, kernel: &Kernel, round_ms: u64) -> f64 {
    bench.call(cpu, kernel);
    let start = Instant::now();
    bench.call(cpu, kernel);
    let once = start.elapsed().as_secs_f64().max(1e-7);
    let calls = (round_ms as f64 * 1e-3 / once).clamp(1.0, 1e5) as u32;
    let start = Instant::now();
    for _ in 0..calls {
        bench.call(cpu, kernel);
    }
    start.elapsed().as_secs_f64() / f64::from(calls)
}

/// Measures all-reduces between threads of this process, as `drumline bench train` runs its ranks,
/// and adds one sample for each size.
///
/// # Errors
/// What a rank said.
pub(super) fn collectives_in_process(
    ranks: u32,
    round_ms: u64,
    samples: &mut Samples,
) -> Result<(), String> {
    let options = all_reduces(round_ms);
    let group = drumline_collective::local::group(ranks as usize);
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = group
            .into_iter()
            .map(|rank| {
                let options = &options;
                scope.spawn(move || bench::measure(&rank, options))
            })
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    for result in results.into_iter().take(1) {
        for m in result.map_err(|error| error.to_string())? {
            let key = (ranks, m.bytes as u64);
            samples.collectives.entry(key).or_default().push(m.latency_us * 1e-6);
        }
    }
    Ok(())
}

/// Returns what is measured of collectives: one round of sizes from 4 KiB to 16 MiB.
pub(super) fn all_reduces(round_ms: u64) -> Options {
    Options {
        ops: vec![Op::AllReduce],
        sizes_bytes: (0..5).map(|step| 4096 << (3 * step)).collect(),
        rounds: 3,
        round_ms,
        ..Options::default()
    }
}

/// Returns the middle of the samples.
pub(super) fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Turns samples into a profile: the median of each kernel's.
pub(super) fn profile(
    name: String,
    setting: Setting,
    devices: u32,
    memory_bytes: f64,
    samples: &Samples,
) -> Profile {
    let mut profile = Profile {
        name,
        dtype: Dtype::Fp32,
        threads: setting.threads as u32,
        at_once: setting.at_once as u32,
        memory_bytes,
        memory_bandwidth: 0.0,
        devices,
        matmul: Vec::new(),
        matmul_in: BTreeMap::new(),
        operators: Vec::new(),
        attention: Vec::new(),
        all_reduce: samples
            .collectives
            .iter()
            .map(|((ranks, bytes), times)| CollectivePoint {
                ranks: *ranks,
                bytes: *bytes as f64,
                seconds: median(times),
            })
            .collect(),
        all_reduce_tcp: Vec::new(),
        step_overhead_ms: 0.0,
        framework_gb: 0.05,
        power_w: None,
        price_per_hour: None,
    };
    for (kernel, times) in kernels(setting.bf16).iter().zip(&samples.kernels) {
        let seconds = median(times);
        match kernel {
            // Adam reads four numbers and writes three, the norm reads one.
            Kernel::Stream => profile.memory_bandwidth = 32.0 * STREAMED as f64 / seconds,
            Kernel::Product { shape, pass, precision } => {
                let [r, i, o] = [shape.rows, shape.input, shape.output].map(|x| x as u32);
                let (m, n, k) = match pass {
                    Pass::Forward => (r, o, i),
                    Pass::GradInput => (r, i, o),
                    Pass::GradWeight => (i, o, r),
                };
                let point = MatmulPoint { m, n, k, seconds };
                match precision {
                    MatmulPrecision::F32 => profile.matmul.push(point),
                    MatmulPrecision::Bf16 => {
                        profile.matmul_in.entry(Dtype::Bf16).or_default().push(point);
                    }
                }
            }
            Kernel::Operator { name, numbers } => profile.operators.push(OperatorPoint {
                name: (*name).to_owned(),
                bytes: 4.0 * numbers,
                seconds,
            }),
            Kernel::Attention { sequence, heads, head_dim } => {
                let [sequence, heads, head_dim] = [*sequence, *heads, *head_dim].map(|x| x as u32);
                profile.attention.push(AttentionPoint { sequence, heads, head_dim, seconds });
            }
        }
    }
    profile
}
