//! Where device tests run: on this machine's GPU, or else on the emulated device.
//!
//! The emulated device is three fake libraries (crate `fakes`) in a folder that a child process finds
//! by `LD_LIBRARY_PATH`, as the real ones are found; the code under test cannot tell. What passes
//! there has **not** run on a GPU, and every line that is printed says so.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use drumline_cuda::{Cuda, CudaOptions, DeviceOptions};
use drumline_fakes::{BuildError, emulated};
use drumline_tensor::reference::Random;

/// Tells a child which device it is to use.
const CHILD: &str = "DRUMLINE_TEST_DEVICE";
/// How many there are, emulated.
const DEVICES: &str = "4";
/// Repeats a run whose seed was printed.
const SEED: &str = "DRUMLINE_TEST_SEED";
/// Where the seeds of a run begin, as those of all random tests.
const SEEDS: &str = "PROPTEST_RNG_SEED";

/// Runs `body` on a GPU, or in a child process on the emulated device. Says why when neither can be.
pub(crate) fn on_device(test: &str, body: impl FnOnce(&str)) {
    on_device_with(test, None, body);
}

/// As [`on_device`]; with a `fault`, on the emulated device alone, which then has it.
pub(crate) fn on_device_with(test: &str, fault: Option<&str>, body: impl FnOnce(&str)) {
    let fault: Vec<_> = fault.into_iter().map(|fault| ("DRUMLINE_FAKE_CUDA", fault)).collect();
    run_on(test, &fault, body);
}

/// As [`on_device`], on the emulated device alone, with more in its environment.
pub(crate) fn on_device_with_environment(
    test: &str,
    more: &[(&str, &str)],
    body: impl FnOnce(&str),
) {
    run_on(test, more, body);
}

fn run_on(test: &str, more: &[(&str, &str)], body: impl FnOnce(&str)) {
    if std::env::var_os(CHILD).is_some() {
        return body("emulated device, not a GPU");
    }
    if more.is_empty() && drumline_cuda::device::count().is_ok_and(|count| count > 0) {
        return body("GPU");
    }
    let folder = match libraries() {
        Ok(folder) => folder,
        Err(why) => return eprintln!("skipped: {test}: there is no GPU, and {why}"),
    };
    let mut child = Command::new(std::env::current_exe().expect("a test knows its own file"));
    child.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    child.env(CHILD, "emulated").env("LD_LIBRARY_PATH", folder);
    child.env("DRUMLINE_FAKE_CUDA_DEVICES", DEVICES).envs(more.iter().copied());
    let output = child.output().expect("a test can start itself");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "on the emulated device:\n{text}");
    assert!(text.contains("1 passed"), "the child ran no test:\n{text}");
    eprint!("{text}");
}

/// Opens the device; its kernels are kept beside the build.
pub(crate) fn open(options: CudaOptions) -> Cuda {
    open_of(0, options)
}

/// Opens the device of a rank, round those that there are.
pub(crate) fn open_of(rank: u32, mut options: CudaOptions) -> Cuda {
    options.device = device_options();
    let count = drumline_cuda::device::count().unwrap_or(1).max(1);
    options.device.ordinal = rank as usize % count as usize;
    match Cuda::new(&options) {
        Ok(cuda) => cuda,
        Err(error) => panic!("cannot open the device: {error}"),
    }
}

pub(crate) fn device_options() -> DeviceOptions {
    let kernels = match std::env::var_os(CHILD) {
        Some(_) => libraries().expect("the device is there").join("kernels"),
        None => temporary().join("kernels-gpu"),
    };
    DeviceOptions { ordinal: 0, kernel_cache: Some(kernels), check_each: true }
}

/// Runs `test` for `count` seeds, which a failure prints. They are the same each time unless others are
/// asked for, so that a failing run repeats.
pub(crate) fn for_seeds(where_: &str, count: u64, mut test: impl FnMut(&mut Random, &str)) {
    let number = |name| std::env::var(name).ok().and_then(|seed| seed.parse::<u64>().ok());
    let asked = number(SEED);
    let first = asked.or_else(|| number(SEEDS)).unwrap_or(1);
    for seed in first..first.saturating_add(if asked.is_some() { 1 } else { count }) {
        test(&mut Random::new(seed), &format!("{where_}, {SEED}={seed}"));
    }
    eprintln!("{where_}: seeds from {first}");
}

fn temporary() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

/// Builds the fake libraries unless they are there, and returns their folder.
pub(crate) fn libraries() -> Result<PathBuf, String> {
    static DONE: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    DONE.get_or_init(|| match emulated::build_all(&temporary()) {
        Ok(folder) => Ok(folder),
        Err(error @ BuildError::NoCompiler { .. }) => Err(error.to_string()),
        Err(error) => panic!("{error}"),
    })
    .clone()
}
