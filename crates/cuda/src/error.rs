//! Why a GPU could not do as asked.

use std::path::PathBuf;

use drumline_tensor::TensorError;

use crate::library::Library;

/// Why a GPU could not do as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// A library is not on this machine.
    #[error("{} is not found: {}; `drumline doctor` shows what was searched", .0.file(), .0.remedy())]
    Missing(Library),
    /// A library is here, and older than what this program speaks.
    #[error("{} is of version {got}, and {needed} is needed: {}; see `drumline doctor`", library.file(), library.remedy())]
    TooOld {
        /// Which.
        library: Library,
        /// The version found, as the library tells it.
        got: i32,
        /// The oldest that will do.
        needed: i32,
    },
    /// There is no such device.
    #[error("there is no GPU {ordinal}, this machine shows {count}: see `drumline doctor`")]
    NoDevice {
        /// Which was asked for.
        ordinal: usize,
        /// How many there are.
        count: i32,
    },
    /// The device is older than what the kernels are written for.
    #[error("{name} has compute capability {major}.{minor}, and 8.0 is the oldest that will do")]
    Capability {
        /// The device's name.
        name: String,
        /// Its capability.
        major: i32,
        /// The same, after the point.
        minor: i32,
    },
    /// A call of the driver failed.
    #[error("{call}: {name} ({text})")]
    Driver {
        /// The call.
        call: &'static str,
        /// The driver's name for what happened.
        name: String,
        /// Its words.
        text: String,
    },
    /// A call of cuBLASLt failed.
    #[error("cuBLASLt: {call}: {status}")]
    CublasLt {
        /// The call.
        call: &'static str,
        /// The library's name for what happened.
        status: String,
    },
    /// A kernel's source was refused.
    #[error("kernels {module} for {architecture}: {status}\n{log}")]
    Compile {
        /// The source file.
        module: &'static str,
        /// What for, as `sm_90`.
        architecture: String,
        /// The library's name for what happened.
        status: String,
        /// The compiler's words.
        log: String,
    },
    /// The folder of compiled kernels cannot be used.
    #[error("kernel cache {}: {message}", path.display())]
    Cache {
        /// The folder.
        path: PathBuf,
        /// The system's words.
        message: String,
    },
    /// Memory ran out.
    #[error("no memory for {bytes} bytes on the GPU: {free} of {total} are free")]
    OutOfMemory {
        /// How many were asked for.
        bytes: usize,
        /// How many are free.
        free: usize,
        /// How many there are.
        total: usize,
    },
    /// What is asked for is beyond what the kernels do.
    #[error("{0}")]
    Unsupported(String),
}

impl CudaError {
    /// Adds what was being done, on which shapes.
    #[must_use]
    pub fn during(&self, operation: &'static str, shape: &str) -> TensorError {
        TensorError::Device { operation: format!("{operation} {shape}"), message: self.to_string() }
    }
}

/// Turns a driver's answer into ours.
pub(crate) fn driver<T>(
    call: &'static str,
    result: Result<T, cudarc::driver::DriverError>,
) -> Result<T, CudaError> {
    result.map_err(|error| {
        let text = |words: Result<&std::ffi::CStr, _>| {
            words.map_or_else(|_| String::from("unknown"), |w| w.to_string_lossy().into_owned())
        };
        CudaError::Driver { call, name: text(error.error_name()), text: text(error.error_string()) }
    })
}
