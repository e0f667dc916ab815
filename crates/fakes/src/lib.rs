//! Stand-ins for NVIDIA's libraries, for tests on machines without a GPU.
//!
//! They are C and C++, built on the spot, and loaded from a file exactly as the real ones are:
//! what is tested is the whole way through the loader. A script file says how NVML and NCCL behave; it
//! is read again at every call, so that a test can break a device while a program uses it.
//! [`emulated`] computes. Nothing in a shipped binary depends on this crate.

pub mod emulated;

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    /// `libnvidia-ml.so.1`; its script is named by `DRUMLINE_FAKE_NVML`.
    Nvml,
    /// `libnvidia-ml.so.1` of a driver so old that most functions are missing.
    NvmlOld,
    /// A library of NVML's name that has none of its functions.
    NvmlForeign,
    /// `libnccl.so.2`; its script is named by `DRUMLINE_FAKE_NCCL`.
    Nccl,
    /// `libnccl.so.2` of a version before non-blocking communicators.
    NcclOld,
}

/// Why a library could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The compiler cannot be run, or there is no place for what it makes.
    #[error("cannot have {what}: {source}")]
    NoCompiler {
        /// What was wanted.
        what: &'static str,
        /// The system's words.
        source: io::Error,
    },
    /// The compiler refused the source.
    #[error("{library} does not compile: {message}")]
    Refused {
        /// The source.
        library: String,
        /// What the compiler said.
        message: String,
    },
}

fn cannot_run(what: &'static str, source: io::Error) -> BuildError {
    BuildError::NoCompiler { what, source }
}

impl Library {
    fn source(self) -> (&'static str, &'static str) {
        match self {
            Self::Nvml | Self::NvmlOld => ("nvml.c", include_str!("../c/nvml.c")),
            Self::NvmlForeign => ("foreign.c", "int not_nvml(void) { return 1; }\n"),
            Self::Nccl | Self::NcclOld => ("nccl.c", include_str!("../c/nccl.c")),
        }
    }

    /// Returns the file name under which programs look for it.
    #[must_use]
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Nvml | Self::NvmlOld | Self::NvmlForeign => "libnvidia-ml.so.1",
            Self::Nccl | Self::NcclOld => "libnccl.so.2",
        }
    }

    /// Builds the library into `folder`, which then fits `LD_LIBRARY_PATH`; returns its file.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn build(self, folder: &Path) -> Result<PathBuf, BuildError> {
        let (name, text) = self.source();
        let (source, library) = (folder.join(name), folder.join(self.file_name()));
        std::fs::write(&source, text).map_err(|error| cannot_run("a file", error))?;
        let mut cc = Command::new("cc");
        cc.args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]);
        if matches!(self, Self::NvmlOld | Self::NcclOld) {
            cc.arg("-DOLD");
        }
        // Known by this name whatever file it is opened by: the emulated device asks for it.
        cc.arg(format!("-Wl,-soname,{}", self.file_name()));
        cc.arg("-o").arg(&library).arg(&source).arg("-lpthread").arg("-lrt");
        let output = cc.output().map_err(|error| cannot_run("a C compiler", error))?;
        if output.status.success() {
            return Ok(library);
        }
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(BuildError::Refused { library: name.to_owned(), message })
    }

    /// As [`Library::build`], unless the library is there; tests of several binaries may come at
    /// once.
    fn build_once(self, folder: &Path) -> Result<(), BuildError> {
        let there = folder.join(self.file_name());
        if there.is_file() {
            return Ok(());
        }
        let own = folder.join(format!("{}.tmp", std::process::id()));
        std::fs::create_dir_all(&own).map_err(|error| cannot_run("a folder", error))?;
        let made = self.build(&own)?;
        std::fs::rename(made, there).map_err(|error| cannot_run("the file's name", error))?;
        let _ = std::fs::remove_dir_all(own);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_library_builds_without_a_warning() {
        let folder = std::env::temp_dir().join(format!("drumline-fakes-{}", std::process::id()));
        for library in
            [Library::Nvml, Library::NvmlOld, Library::NvmlForeign, Library::Nccl, Library::NcclOld]
        {
            let own = folder.join(format!("{library:?}"));
            std::fs::create_dir_all(&own).unwrap();
            let file = library.build(&own).unwrap();
            assert!(file.metadata().unwrap().len() > 0);
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn the_emulated_device_is_built_once() {
        let own = format!("drumline-emulated-{}", std::process::id());
        let parent = std::env::temp_dir().join(own);
        let folder = emulated::build_all(&parent).unwrap();
        let made =
            |folder: &Path| folder.join("libcuda.so").metadata().unwrap().modified().unwrap();
        let first = made(&folder);
        assert_eq!(emulated::build_all(&parent).unwrap(), folder);
        assert_eq!(made(&folder), first);
        for name in ["libnvrtc.so", "libcublasLt.so", "libnvidia-ml.so.1", "libnccl.so.2"] {
            assert!(folder.join(name).is_file(), "{name}");
        }
        std::fs::remove_dir_all(&parent).unwrap();
    }
}
