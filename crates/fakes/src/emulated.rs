//! The emulated device: libcuda, NVRTC and cuBLASLt as C++ that computes on the processor.
//!
//! Kernels are this project's own sources, given to a C++ compiler instead of NVIDIA's. What passes
//! there has **not** run on a GPU: it shows arithmetic, indexing, barriers and calls, and says nothing
//! of speed, or of what NVIDIA's libraries do.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{BuildError, Library, cannot_run};

/// Sources, and the library that each becomes: the name that cudarc looks for first.
const LIBRARIES: [(&str, &str, &str); 3] = [
    ("cuda.cpp", include_str!("../cpp/cuda.cpp"), "libcuda.so"),
    ("nvrtc.cpp", include_str!("../cpp/nvrtc.cpp"), "libnvrtc.so"),
    ("cublaslt.cpp", include_str!("../cpp/cublaslt.cpp"), "libcublasLt.so"),
];
/// What the kernels' sources are compiled behind.
const HEADER: (&str, &str) = ("emulated.h", include_str!("../cpp/emulated.h"));

/// Builds the emulated device into a folder within `parent`, unless it is there, and returns that
/// folder, which then fits `LD_LIBRARY_PATH`. Its name changes with the sources, so that what was
/// compiled for one is never loaded by another: `kernels` within it is the place to keep kernels.
///
/// # Errors
/// [`BuildError`].
pub fn build(parent: &Path) -> Result<PathBuf, BuildError> {
    let parent = std::path::absolute(parent).map_err(|error| cannot_run("a folder", error))?;
    let folder = parent.join(format!("emulated-{:016x}", digest()));
    if folder.is_dir() {
        return Ok(folder);
    }
    // Built beside, then renamed: tests of several binaries may come here at once.
    let own = folder.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::create_dir_all(&own).map_err(|error| cannot_run("a folder", error))?;
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let (name, text) = HEADER;
    std::fs::write(own.join(name), text).map_err(|error| cannot_run("a file", error))?;
    for (source, text, library) in LIBRARIES {
        let path = own.join(source);
        std::fs::write(&path, text).map_err(|error| cannot_run("a file", error))?;
        let output = Command::new(&compiler)
            .args(["-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden"])
            // Where it will be when it is used.
            .arg(format!("-DEMULATED_H=\"{}\"", folder.join(name).display()))
            .arg(format!("-DEMULATED_COMPILER=\"{compiler}\""))
            .arg("-o")
            .arg(own.join(library))
            .arg(path)
            .arg("-ldl")
            .output()
            .map_err(|error| cannot_run("a C++ compiler", error))?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(BuildError::Refused { library: source.to_owned(), message });
        }
    }
    match std::fs::rename(&own, &folder) {
        Ok(()) => Ok(folder),
        Err(_) if folder.is_dir() => {
            let _ = std::fs::remove_dir_all(&own);
            Ok(folder)
        }
        Err(error) => Err(cannot_run("the folder's name", error)),
    }
}

/// Builds every stand-in that a rank on a GPU looks for into one folder within `parent`: the emulated
/// device, NVML and NCCL.
///
/// # Errors
/// [`BuildError`].
pub fn build_all(parent: &Path) -> Result<PathBuf, BuildError> {
    let folder = build(parent)?;
    for library in [Library::Nvml, Library::Nccl] {
        library.build_once(&folder)?;
    }
    Ok(folder)
}

fn digest() -> u64 {
    let mut digest = DefaultHasher::new();
    for (_, text, _) in LIBRARIES {
        text.hash(&mut digest);
    }
    HEADER.1.hash(&mut digest);
    for library in [Library::Nvml, Library::Nccl] {
        library.source().1.hash(&mut digest);
    }
    digest.finish()
}
