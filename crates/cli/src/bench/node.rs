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
    Rotary, Rounding, TensorError, WeightLayout,
};

/// What is measured: how much work each kernel does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Extent {
    /// Rows of the products: tokens from few to many.
    rows: &'static [usize],
    /// Inputs and outputs: matrices from those of a split layer of a small model to those of a whole
    /// one.
    matrices: &'static [(usize, usize)],
    /// Tokens of one micro-batch, and a layer's widths, for the operators.
    tokens: usize,
    width: usize,
    inner: usize,
    /// Parameters of the optimizer's pass: more than caches hold, in its four arrays.
    streamed: usize,
    /// Tokens, heads, and width of a head.
    attention: &'static [(usize, usize, usize)],
    /// Attention is what bf16 training does.
    attention_bf16: bool,
}

impl Extent {
    /// Of a processor. The optimizer's arrays take 128 MiB.
    pub(super) const PROCESSOR: Self = Self {
        rows: &[32, 128, 512, 1024],
        matrices: &[(128, 512), (256, 1024), (512, 512), (512, 1536), (1024, 256), (1536, 512)],
        tokens: 512,
        width: 512,
        inner: 2048,
        streamed: 8 << 20,
        attention: &[(128, 32, 64), (256, 16, 64), (256, 32, 32), (512, 8, 64)],
        attention_bf16: false,
    };
    /// Of a GPU. The optimizer's arrays take 2 GiB.
    pub(super) const GPU: Self = Self {
        rows: &[128, 1024, 4096, 16_384],
        matrices: &[
            (512, 2048),
            (1024, 4096),
            (2048, 2048),
            (2048, 6144),
            (4096, 1024),
            (5504, 2048),
        ],
        tokens: 8192,
        width: 2048,
        inner: 8192,
        streamed: 128 << 20,
        attention: &[(1024, 16, 64), (2048, 16, 128), (4096, 16, 64), (4096, 16, 128)],
        attention_bf16: true,
    };
    /// The least: shows that it runs.
    pub(super) const LEAST: Self = Self {
        rows: &[8, 32],
        matrices: &[(16, 32), (32, 16), (32, 64)],
        tokens: 16,
        width: 64,
        inner: 64,
        streamed: 1 << 12,
        attention: &[(16, 2, 32), (32, 2, 32)],
        attention_bf16: false,
    };

    /// The values of the greatest operand.
    fn operand(&self) -> usize {
        let product = self.matrices.iter().flat_map(|(input, output)| {
            let rows = self.rows.iter().max().copied().unwrap_or(0);
            [input * output, rows * input, rows * output]
        });
        let attention = self.attention.iter().map(|(t, heads, width)| 3 * t * heads * width);
        let operators = 2 * self.tokens * self.inner.max(2 * self.width);
        product.chain(attention).fold(self.streamed.max(operators), usize::max)
    }
}

/// Which ranks are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Setting {
    /// Threads of each.
    pub(super) threads: usize,
    /// Ranks that compute at one time.
    pub(super) at_once: usize,
    /// Products in bf16 too.
    pub(super) bf16: bool,
    /// How much is measured.
    pub(super) extent: Extent,
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
fn kernels(bf16: bool, extent: &Extent) -> Vec<Kernel> {
    let mut list = vec![Kernel::Stream];
    let precisions = [MatmulPrecision::F32, MatmulPrecision::Bf16];
    for precision in precisions.into_iter().take(if bf16 { 2 } else { 1 }) {
        for (i, rows) in extent.rows.iter().copied().enumerate() {
            for (j, (input, output)) in extent.matrices.iter().copied().enumerate() {
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
    let (n, d, f) = (extent.tokens as f64, extent.width as f64, extent.inner as f64);
    list.extend([
        Kernel::Operator { name: "add_norm", numbers: 2.0 * 4.0 * n * d },
        Kernel::Operator { name: "norm_grad", numbers: 2.0 * 4.0 * n * d },
        Kernel::Operator { name: "rotary", numbers: 2.0 * 4.0 * n * d },
        Kernel::Operator { name: "gelu", numbers: 2.0 * n * f },
        Kernel::Operator { name: "gelu_grad", numbers: 3.0 * n * f },
        Kernel::Operator { name: "swiglu", numbers: 3.0 * n * f },
        Kernel::Operator { name: "swiglu_grad", numbers: 5.0 * n * f },
    ]);
    for (sequence, heads, head_dim) in extent.attention.iter().copied() {
        list.push(Kernel::Attention { sequence, heads, head_dim });
    }
    list
}

/// What the kernels of one rank work on. Factors are only read, and what is updated in place keeps
/// its size: numbers that grow or shrink with each call would end as infinities or denormals, which
/// processors treat in their own time.
struct Bench<B: Backend> {
    extent: Extent,
    a: B::Buffer,
    b: B::Buffer,
    c: B::Buffer,
    out: B::Buffer,
    twos: B::Buffer,
    /// Cosines and sines of no rotation.
    table: B::Buffer,
    stats: B::Buffer,
    gain: B::Buffer,
    bias: B::Buffer,
    moments: (B::Buffer, B::Buffer),
    positions: Vec<u32>,
}

/// Width of a head in the measured rotation.
const HEAD: usize = 64;

impl<B: Backend> Bench<B> {
    fn new(device: &B, extent: Extent) -> Result<Self, TensorError> {
        let made = |n: usize, value: &dyn Fn(usize) -> f32| {
            let mut buffer = device.alloc(n)?;
            let values: Vec<f32> = (0..n).map(value).collect();
            device.write(&values, device.view_mut(&mut buffer, 0..n));
            Ok::<_, TensorError>(buffer)
        };
        // Not zeros, so that no processor can take a short cut.
        let fill = |n: usize, by: usize| made(n, &|i| (i % by) as f32 * 0.01 + 0.01);
        let (most, Extent { tokens, width, inner, .. }) = (extent.operand(), extent);
        let rows = extent.rows.iter().max().copied().unwrap_or(0);
        let log_sums = extent.attention.iter().map(|(t, heads, _)| t * heads).max().unwrap_or(0);
        Ok(Self {
            extent,
            a: fill(most, 13)?,
            b: fill(most, 7)?,
            c: fill(most, 11)?,
            out: fill(most, 3)?,
            twos: made(tokens * inner, &|_| 2.0)?,
            table: made(tokens * HEAD, &|i| if i % HEAD < HEAD / 2 { 1.0 } else { 0.0 })?,
            stats: made((2 * rows.max(tokens)).max(log_sums), &|_| 1.0)?,
            gain: fill(width, 5)?,
            bias: fill(width, 5)?,
            moments: (device.alloc(most)?, device.alloc(most)?),
            positions: (0..tokens as u32).collect(),
        })
    }

    /// Runs one kernel once.
    fn call(&mut self, device: &B, kernel: &Kernel) {
        let Extent { tokens: n, width: d, inner: f, streamed, .. } = self.extent;
        let Self { a, b, c, out, twos, table, stats, gain, bias, moments, positions, .. } = self;
        match kernel {
            Kernel::Stream => {
                let step = AdamW {
                    rounding: Rounding::Nearest,
                    learning_rate: 1e-6,
                    beta1: 0.9,
                    beta2: 0.95,
                    epsilon: 1e-8,
                    weight_decay: 0.1,
                    correction1: 0.5,
                    correction2: 0.5,
                    gradient_scale: 1.0,
                };
                let all = 0..streamed;
                device.sum_squares(device.view(b, all.clone()));
                device.adamw(
                    step,
                    device.view_mut(out, all.clone()),
                    None,
                    device.view(b, all.clone()),
                    device.view_mut(&mut moments.0, all.clone()),
                    device.view_mut(&mut moments.1, all),
                );
            }
            Kernel::Product { shape, pass, .. } => {
                let Linear { rows, input, output, .. } = *shape;
                let (x, w, y) = (rows * input, input * output, rows * output);
                match pass {
                    Pass::Forward => {
                        let out = device.view_mut(out, 0..y);
                        device.linear(
                            *shape,
                            device.view(a, 0..x),
                            device.view(b, 0..w),
                            None,
                            out,
                        );
                    }
                    Pass::GradInput => {
                        let out = device.view_mut(out, 0..x);
                        device.linear_grad_input(
                            *shape,
                            device.view(c, 0..y),
                            device.view(b, 0..w),
                            out,
                        );
                    }
                    Pass::GradWeight => {
                        let out = device.view_mut(out, 0..w);
                        device.linear_grad_weight(
                            *shape,
                            device.view(a, 0..x),
                            device.view(c, 0..y),
                            out,
                            false,
                        );
                    }
                }
            }
            Kernel::Operator { name, .. } => {
                let norm = Normalise { rows: n, width: d, kind: NormKind::Layer, epsilon: 1e-5 };
                let rotary = Rotary {
                    rows: n,
                    width: 2 * d,
                    heads: 2 * d / HEAD,
                    head_dim: HEAD,
                    inverse: false,
                };
                match *name {
                    "add_norm" => {
                        for _ in 0..2 {
                            let (sum, y) =
                                device.split_mut(device.view_mut(out, 0..2 * n * d), n * d);
                            device.add_norm(
                                norm,
                                device.view(a, 0..n * d),
                                device.view(b, 0..n * d),
                                None,
                                sum,
                                device.view(gain, 0..d),
                                Some(device.view(bias, 0..d)),
                                y,
                                device.view_mut(stats, 0..2 * n),
                            );
                        }
                    }
                    "norm_grad" => {
                        for _ in 0..2 {
                            let both = device.view_mut(&mut moments.0, 0..2 * d);
                            let (dgain, dbias) = device.split_mut(both, d);
                            device.norm_grad(
                                norm,
                                device.view(a, 0..n * d),
                                device.view(a, n * d..2 * n * d),
                                device.view(gain, 0..d),
                                device.view(stats, 0..2 * n),
                                device.view_mut(out, 0..n * d),
                                dgain,
                                Some(dbias),
                            );
                        }
                    }
                    "rotary" => {
                        for _ in 0..2 {
                            let x = device.view_mut(out, 0..n * 2 * d);
                            device.rotary(rotary, device.view(table, 0..n * HEAD), positions, x);
                        }
                    }
                    "gelu" => device.gelu(device.view(a, 0..n * f), device.view_mut(out, 0..n * f)),
                    "gelu_grad" => {
                        device
                            .gelu_grad(device.view(twos, 0..n * f), device.view_mut(out, 0..n * f));
                    }
                    "swiglu" => {
                        device.swiglu(
                            f,
                            device.view(a, 0..2 * n * f),
                            device.view_mut(out, 0..n * f),
                        );
                    }
                    _ => {
                        let x = device.view_mut(out, 0..2 * n * f);
                        device.swiglu_grad(f, x, device.view(twos, 0..n * f));
                    }
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
                let (n, rows) = (sequence * heads * head_dim, sequence * heads);
                let qkv = device.view(a, 0..3 * n);
                device.attention(
                    shape,
                    qkv,
                    device.view_mut(out, 0..n),
                    device.view_mut(stats, 0..rows),
                );
                device.attention_grad(
                    shape,
                    qkv,
                    device.view(out, 0..n),
                    device.view(stats, 0..rows),
                    device.view(b, 0..n),
                    device.view_mut(&mut moments.0, 0..3 * n),
                );
            }
        }
    }

    /// Waits until the device has done everything.
    fn wait(&self, device: &B) {
        device.read(device.view(&self.out, 0..1), &mut [0.0]);
    }
}

/// Opens a rank's device, with products that round their factors as asked.
pub(super) type OpenDevice<'a, B> =
    &'a (dyn Fn(u32, MatmulPrecision) -> Result<B, TensorError> + Sync);

/// Opens the processor with so many threads.
pub(super) fn processor(
    threads: usize,
) -> impl Fn(u32, MatmulPrecision) -> Result<Cpu, TensorError> {
    move |_, matmul| Cpu::with_options(CpuOptions { threads, matmul, ..CpuOptions::default() })
}

/// Runs every kernel for about `round_ms` on `at_once` ranks together, and adds one sample each.
///
/// # Errors
/// [`TensorError`] when memory or threads cannot be had.
pub(super) fn round<B: Backend>(
    setting: Setting,
    open: OpenDevice<'_, B>,
    round_ms: u64,
    samples: &mut Samples,
) -> Result<(), TensorError> {
    let list = kernels(setting.bf16, &setting.extent);
    samples.kernels.resize(list.len(), Vec::new());
    let mut ranks = Vec::with_capacity(setting.at_once);
    for rank in 0..setting.at_once as u32 {
        let (f32, bf16) = (open(rank, MatmulPrecision::F32)?, open(rank, MatmulPrecision::Bf16)?);
        let bench = Bench::new(&f32, setting.extent)?;
        bench.wait(&f32);
        ranks.push((f32, bf16, bench));
    }
    let (gate, list) = (&Barrier::new(setting.at_once), &list);
    let times: Vec<Result<Vec<f64>, TensorError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|(f32, bf16, mut bench)| {
                scope.spawn(move || {
                    let measure = |kernel: &Kernel| {
                        let device = match kernel {
                            Kernel::Product { precision: MatmulPrecision::Bf16, .. } => &bf16,
                            Kernel::Attention { .. } if setting.extent.attention_bf16 => &bf16,
                            _ => &f32,
                        };
                        // All ranks begin together: each is measured while the others work.
                        gate.wait();
                        device.scope(|| timed(device, &mut bench, kernel, round_ms))
                    };
                    let times = list.iter().map(measure).collect();
                    f32.status().and(bf16.status()).map(|()| times)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    let times = times.into_iter().collect::<Result<Vec<_>, _>>()?;
    for (i, samples) in samples.kernels.iter_mut().enumerate() {
        let sum: f64 = times.iter().filter_map(|rank| rank.get(i)).sum();
        samples.push(sum / times.len() as f64);
    }
    Ok(())
}

/// Returns the seconds of one call, over as many as fill `round_ms`.
fn timed<B: Backend>(device: &B, bench: &mut Bench<B>, kernel: &Kernel, round_ms: u64) -> f64 {
    bench.call(device, kernel);
    bench.wait(device);
    let start = Instant::now();
    bench.call(device, kernel);
    bench.wait(device);
    let once = start.elapsed().as_secs_f64().max(1e-7);
    let calls = (round_ms as f64 * 1e-3 / once).clamp(1.0, 1e5) as u32;
    let start = Instant::now();
    for _ in 0..calls {
        bench.call(device, kernel);
    }
    bench.wait(device);
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
    for (kernel, times) in kernels(setting.bf16, &setting.extent).iter().zip(&samples.kernels) {
        let seconds = median(times);
        match kernel {
            // Adam reads four numbers and writes three, the norm reads one.
            Kernel::Stream => {
                profile.memory_bandwidth = 32.0 * setting.extent.streamed as f64 / seconds
            }
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
