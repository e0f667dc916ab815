//! The tests of one GPU: in a process of its own, which sees that GPU alone, so that a driver that
//! hangs or crashes harms nobody else, and so that an instance of a divided GPU can be meant at all.

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use drumline_cuda::{Cuda, CudaOptions, DeviceOptions};
use drumline_engine::EngineError;
use drumline_spec::Parallelism;
use drumline_tensor::{Backend, Cpu, Linear, MatmulPrecision, TensorError, WeightLayout};

use super::libraries::{Found, Seen};
use super::report::{Check, Device, Verdict};
use super::selftest::{all_reduce, bad, compare, losses, rate};

/// The hidden role that is [`test_this_process`].
const ROLE: &str = "doctor-gpu";
/// Longest time for the tests of one GPU. Kernels may have to be compiled first.
const DEADLINE: Duration = Duration::from_secs(150);
/// Calls that one measurement times.
const CALLS: u32 = 16;
/// A measurement that takes as long is long enough; else sizes grow.
const LONG_ENOUGH: Duration = Duration::from_millis(20);
/// The least and greatest side of the square products: from what any device does at once to what a
/// large one is busy with.
const SIDES: (usize, usize) = (256, 8192);
/// The same for the f32 of a copy: 4 MiB to 1 GiB.
const COPIES: (usize, usize) = (1 << 20, 1 << 28);

/// Tests a GPU: whether it answers, whether the driver objects to it, whether everything that it
/// needs to compute is there, how fast it is, and whether it computes what the processor does.
pub(super) fn test(seen: &Seen, found: &Found, test: bool) -> Device {
    let mut checks = vec![driver_content(seen)];
    if test {
        let missing = found.missing_for_compute();
        if missing.is_empty() {
            checks.extend(in_a_process(&seen.gpu.uuid));
        } else {
            checks.push(bad("compute", format!("missing: {}", missing.join(", "))));
        }
    }
    let name = match seen.gpu.mig {
        Some(instance) => format!("gpu {} instance {instance}", seen.gpu.index),
        None => format!("gpu {}", seen.gpu.index),
    };
    Device { name, model: seen.gpu.model.clone(), checks }
}

/// Judges what the driver tells of a GPU, as an agent does.
fn driver_content(seen: &Seen) -> Check {
    use drumline_agent::health::{Signs, judge};
    let signs = Signs {
        recovery: seen.sample.recovery,
        lost: seen.sample.lost.clone(),
        remap_pending: seen.sample.remap_pending.unwrap_or(false),
        remap_failed: seen.sample.remap_failed.unwrap_or(false),
        ..Signs::default()
    };
    let verdict = judge(&signs);
    Check {
        name: "driver".to_owned(),
        value: None,
        unit: String::new(),
        verdict: if verdict.action.is_usable() { Verdict::Good } else { Verdict::Bad },
        message: verdict.reason,
    }
}

/// Runs the tests in a process that sees the GPU `uuid` alone, within the deadline.
fn in_a_process(uuid: &str) -> Vec<Check> {
    match told(uuid) {
        Ok(checks) => checks,
        Err(why) => vec![bad("compute", why)],
    }
}

/// Tests GPUs that each work, together: a reduction between them, over NCCL where it can be.
pub(super) fn together(devices: &[Device], found: &Found) -> Option<Device> {
    // The library's communicators do not join instances of one GPU.
    let whole = found.gpus.iter().filter(|seen| seen.gpu.mig.is_none()).count();
    let work = devices.iter().all(|device| device.verdict() == Verdict::Good);
    if whole < 2 || whole < found.gpus.len() || !work {
        return None;
    }
    let mut check = all_reduce(whole, true);
    if check.verdict == Verdict::Good {
        check.message = format!("between {whole} GPUs, {}", check.message);
    }
    Some(Device { name: "gpus together".to_owned(), model: String::new(), checks: vec![check] })
}

fn told(uuid: &str) -> Result<Vec<Check>, String> {
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let binary = std::env::current_exe().map_err(|error| words(&error))?;
    let mut child = Command::new(binary)
        .arg(ROLE)
        .env("CUDA_VISIBLE_DEVICES", uuid)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| words(&error))?;
    // Read beside the wait: a full pipe must not hold the process up.
    let read = |pipe: Option<Box<dyn std::io::Read + Send>>| {
        std::thread::spawn(move || {
            let mut text = String::new();
            let _ = pipe.map(|pipe| pipe.take(1 << 20).read_to_string(&mut text));
            text
        })
    };
    let output = read(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let errors = read(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let begin = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|error| words(&error))? {
            break status;
        }
        if begin.elapsed() > DEADLINE {
            // One that is stuck in the driver may not even die; it is left behind then.
            let _ = child.kill();
            return Err(format!("its tests did not end within {} s", DEADLINE.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let (output, errors) = (output.join().unwrap_or_default(), errors.join().unwrap_or_default());
    serde_json::from_str(&output).map_err(|_| {
        let last = errors.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
        format!("its tests ended with {status}: {last}")
    })
}

/// Tests the one GPU that this process sees, and prints the checks as JSON: the body of the hidden role.
///
/// # Errors
/// When they cannot be printed.
pub(crate) fn test_this_process() -> std::io::Result<()> {
    let text = serde_json::to_string(&checks()).map_err(std::io::Error::other)?;
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())
}

fn checks() -> Vec<Check> {
    let cuda = match open(MatmulPrecision::Bf16) {
        Ok(cuda) => cuda,
        Err(error) => return vec![bad("compute", error.to_string())],
    };
    let mut matmul = rate("matmul, bf16", "TFLOP/s", 1e12, matmul(&cuda));
    if matmul.verdict == Verdict::Good {
        matmul.message = "as the engine calls it: f32 in memory, rounded on the way".to_owned();
    }
    let copy = rate("memory copy", "GB/s", 1e9, copy(&cuda));
    drop(cuda);
    vec![matmul, copy, training()]
}

fn open(matmul: MatmulPrecision) -> Result<Cuda, EngineError> {
    let kernel_cache = drumline_rank::gpu::kernel_cache();
    let device = DeviceOptions { ordinal: 0, kernel_cache, check_each: false };
    Cuda::new(&CudaOptions { device, matmul, tf32: false })
        .map_err(|error| error.during("open", "GPU 0").into())
}

/// Measures `call`, given a size, at sizes that double from the first of `sizes` to the last or until
/// [`CALLS`] calls are long enough. Returns the seconds of one call and the size.
fn timed(
    cuda: &Cuda,
    sizes: (usize, usize),
    mut call: impl FnMut(usize) -> Result<(), TensorError>,
) -> Result<(f64, usize), TensorError> {
    let wait = || {
        let waited = cuda.device().synchronise();
        waited.map_err(|error| error.during("wait", "for the GPU"))
    };
    let mut size = sizes.0;
    loop {
        call(size)?;
        wait()?;
        let start = Instant::now();
        for _ in 0..CALLS {
            call(size)?;
        }
        wait()?;
        cuda.status()?;
        let took = start.elapsed();
        if took >= LONG_ENOUGH || size * 2 > sizes.1 {
            return Ok((took.as_secs_f64() / f64::from(CALLS), size));
        }
        size *= 2;
    }
}

/// Returns the greatest size that leaves three quarters of the free memory alone, where each unit of
/// `area` takes `bytes`.
fn fits(cuda: &Cuda, bytes: usize) -> usize {
    cuda.device().memory().map_or(0, |(free, _)| free / 4 / bytes)
}

/// Returns the operations per second of square products.
fn matmul(cuda: &Cuda) -> Result<f64, TensorError> {
    let most = SIDES.1.min(fits(cuda, 3 * 4).isqrt()).max(SIDES.0);
    let area = most * most;
    let (mut x, mut w, mut y) = (cuda.alloc(area)?, cuda.alloc(area)?, cuda.alloc(area)?);
    for values in [&mut x, &mut w] {
        // Not zeros: they cost less power, and so less time.
        cuda.fill(cuda.view_mut(values, 0..area), 1.25);
    }
    let (seconds, side) = timed(cuda, (SIDES.0, most), |side| {
        let shape = Linear { rows: side, input: side, output: side, layout: WeightLayout::InOut };
        let all = 0..side * side;
        let (x, w) = (cuda.view(&x, all.clone()), cuda.view(&w, all.clone()));
        cuda.linear(shape, x, w, None, cuda.view_mut(&mut y, all));
        Ok(())
    })?;
    Ok(2.0 * (side as f64).powi(3) / seconds)
}

/// Returns the bytes that a copy reads and writes in a second.
fn copy(cuda: &Cuda) -> Result<f64, TensorError> {
    let most = COPIES.1.min(fits(cuda, 2 * 4)).max(COPIES.0);
    let (mut from, mut to) = (cuda.alloc(most)?, cuda.alloc(most)?);
    cuda.fill(cuda.view_mut(&mut from, 0..most), 1.25);
    let (seconds, elements) = timed(cuda, (COPIES.0, most), |elements| {
        cuda.copy(cuda.view(&from, 0..elements), cuda.view_mut(&mut to, 0..elements));
        Ok(())
    })?;
    Ok((2 * elements * size_of::<f32>()) as f64 / seconds)
}

/// Trains a small model on the GPU and on the processor, which must come to the same.
fn training() -> Check {
    const NAME: &str = "training";
    let both = losses(Parallelism::SINGLE, || Ok(Cpu::new(1)?)).and_then(|cpu| {
        let gpu = losses(Parallelism::SINGLE, || open(MatmulPrecision::F32))?;
        Ok((cpu, gpu))
    });
    match both {
        Ok((cpu, gpu)) => compare(NAME, &cpu, &gpu, "the processor and the GPU"),
        Err(error) => bad(NAME, error.to_string()),
    }
}
