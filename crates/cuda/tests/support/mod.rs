//! Where device tests run: on this machine's GPU, or else on the emulated device.
//!
//! The emulated device is three fake libraries (`tests/fake`) in a folder that a child process finds
//! by `LD_LIBRARY_PATH`, as the real ones are found; the code under test cannot tell. What passes
//! there has **not** run on a GPU, and every line that is printed says so.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use drumline_cuda::{Cuda, CudaOptions, DeviceOptions};
use drumline_tensor::reference::Random;

/// Tells a child which device it is to use.
const CHILD: &str = "DRUMLINE_TEST_DEVICE";
/// Repeats a run whose seed was printed.
const SEED: &str = "DRUMLINE_TEST_SEED";

/// Runs `body` on a GPU, or in a child process on the emulated device. Says why when neither can be.
pub(crate) fn on_device(test: &str, body: impl FnOnce(&str)) {
    on_device_with(test, None, body);
}

/// As [`on_device`]; with a `fault`, on the emulated device alone, which then has it.
pub(crate) fn on_device_with(test: &str, fault: Option<&str>, body: impl FnOnce(&str)) {
    if std::env::var_os(CHILD).is_some() {
        return body("emulated device, not a GPU");
    }
    if fault.is_none() && drumline_cuda::device::count().is_ok_and(|count| count > 0) {
        return body("GPU");
    }
    let folder = match emulated() {
        Ok(folder) => folder,
        Err(why) => return eprintln!("skipped: {test}: there is no GPU, and {why}"),
    };
    let mut child = Command::new(std::env::current_exe().expect("a test knows its own file"));
    child.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    child.env(CHILD, "emulated").env("LD_LIBRARY_PATH", folder);
    if let Some(fault) = fault {
        child.env("DRUMLINE_FAKE_CUDA", fault);
    }
    let output = child.output().expect("a test can start itself");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "on the emulated device:\n{text}");
    assert!(text.contains("1 passed"), "the child ran no test:\n{text}");
    eprint!("{text}");
}

/// Opens the device; its kernels are kept beside the build.
pub(crate) fn open(mut options: CudaOptions) -> Cuda {
    options.device = device_options();
    match Cuda::new(&options) {
        Ok(cuda) => cuda,
        Err(error) => panic!("cannot open the device: {error}"),
    }
}

pub(crate) fn device_options() -> DeviceOptions {
    let kernels = match std::env::var_os(CHILD) {
        Some(_) => built().join("kernels"),
        None => temporary().join("kernels-gpu"),
    };
    DeviceOptions { ordinal: 0, kernel_cache: Some(kernels), check_each: true }
}

/// Runs `test` for `count` fresh seeds, which a failure prints.
pub(crate) fn for_seeds(where_: &str, count: u64, mut test: impl FnMut(&mut Random, &str)) {
    let asked = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok());
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let first = asked.unwrap_or(since.as_nanos() as u64);
    for seed in first..first.saturating_add(if asked.is_some() { 1 } else { count }) {
        test(&mut Random::new(seed), &format!("{where_}, {SEED}={seed}"));
    }
    eprintln!("{where_}: seeds from {first}");
}

fn temporary() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake")
}

/// The fake libraries, by file; the name that cudarc looks for first.
const LIBRARIES: [(&str, &str); 3] =
    [("cuda.cpp", "libcuda.so"), ("nvrtc.cpp", "libnvrtc.so"), ("cublaslt.cpp", "libcublasLt.so")];

/// The folder of the fake libraries as their sources are now.
fn built() -> PathBuf {
    let mut digest = DefaultHasher::new();
    for name in LIBRARIES.map(|(source, _)| source).into_iter().chain(["emulated.h"]) {
        std::fs::read(sources().join(name)).unwrap_or_default().hash(&mut digest);
    }
    temporary().join(format!("emulated-{:016x}", digest.finish()))
}

/// Builds the fake libraries unless they are there, and returns their folder.
pub(crate) fn emulated() -> Result<PathBuf, String> {
    static DONE: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    DONE.get_or_init(|| {
        let folder = built();
        if folder.is_dir() {
            return Ok(folder);
        }
        if !sources().is_dir() {
            return Err("the emulated one's sources are not on this machine".to_owned());
        }
        // Built beside, then renamed: tests of several binaries may come here at once.
        let own = folder.with_extension(format!("{}.tmp", std::process::id()));
        std::fs::create_dir_all(&own).map_err(|e| format!("{}: {e}", own.display()))?;
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        for (source, library) in LIBRARIES {
            let header = sources().join("emulated.h");
            let output = Command::new(&compiler)
                .args(["-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden"])
                .arg(format!("-DEMULATED_H=\"{}\"", header.display()))
                .arg(format!("-DEMULATED_COMPILER=\"{compiler}\""))
                .arg("-o")
                .arg(own.join(library))
                .arg(sources().join(source))
                .arg("-ldl")
                .output()
                .map_err(|e| format!("{compiler} cannot be run ({e}) to build an emulated one"))?;
            if !output.status.success() {
                let text = String::from_utf8_lossy(&output.stderr);
                panic!("{source} does not compile:\n{text}");
            }
        }
        match std::fs::rename(&own, &folder) {
            Ok(()) => Ok(folder),
            Err(_) if folder.is_dir() => {
                let _ = std::fs::remove_dir_all(&own);
                Ok(folder)
            }
            Err(e) => Err(format!("{}: {e}", folder.display())),
        }
    })
    .clone()
}
