//! Stand-ins for NVIDIA's libraries, for tests on machines without a GPU.
//!
//! They are C, built on the spot with `cc`, and loaded from a file exactly as the real ones are:
//! what is tested is the whole way through the loader. A script file says how they behave; it is
//! read again at every call, so that a test can break a device while a program uses it. Nothing in
//! a shipped binary depends on this crate.

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
    /// The compiler cannot be run.
    #[error("cannot run `cc`, a C compiler: {0}")]
    NoCompiler(#[source] io::Error),
    /// The compiler refused the source.
    #[error("cc {library:?}: {message}")]
    Refused {
        /// The library.
        library: Library,
        /// What the compiler said.
        message: String,
    },
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
        std::fs::write(&source, text).map_err(BuildError::NoCompiler)?;
        let mut cc = Command::new("cc");
        cc.args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]);
        if matches!(self, Self::NvmlOld | Self::NcclOld) {
            cc.arg("-DOLD");
        }
        cc.arg("-o").arg(&library).arg(&source).arg("-lpthread").arg("-lrt");
        let output = cc.output().map_err(BuildError::NoCompiler)?;
        if output.status.success() {
            return Ok(library);
        }
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(BuildError::Refused { library: self, message })
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
}
