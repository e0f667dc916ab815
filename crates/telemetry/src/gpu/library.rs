//! Finding and opening NVML: where it was looked for, what was wrong with it, what would help.

use std::ffi::{OsStr, OsString};

use nvml_wrapper::error::NvmlError;

/// Names a library file to use instead of the system's.
pub const PATH_VARIABLE: &str = "DRUMLINE_NVML_LIBRARY";
/// What the loader is asked for, in order. The driver installs the first; the second is a link that
/// only development packages bring.
pub const NAMES: [&str; 2] = ["libnvidia-ml.so.1", "libnvidia-ml.so"];

/// An open NVML.
pub use nvml_wrapper::Nvml;

/// Why NVML cannot be used on this machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NvmlProblem {
    /// No such library.
    #[error("no NVML: {tried}")]
    Missing {
        /// What was tried, and the loader's words.
        tried: String,
    },
    /// A library that lacks the functions needed.
    #[error("{name} is too old or not NVML: {missing}")]
    TooOld {
        /// The library.
        name: String,
        /// What it lacks.
        missing: String,
    },
    /// The kernel driver is not loaded.
    #[error("the NVIDIA kernel driver is not loaded")]
    NoDriver,
    /// Library and kernel driver are of different versions.
    #[error("the NVIDIA library and the kernel driver are of different versions")]
    Mismatch,
    /// It answered with another error.
    #[error("NVML: {0}")]
    Refused(String),
}

impl NvmlProblem {
    /// Returns what would help.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Missing { .. } => {
                "Install the NVIDIA driver (its library libnvidia-ml.so.1 must be in the loader's \
                 path); in a container, start it with the NVIDIA container runtime."
            }
            Self::TooOld { .. } => "Install NVIDIA driver 525 or newer.",
            Self::NoDriver => {
                "Load the kernel driver: `modprobe nvidia`, or reboot after an install."
            }
            Self::Mismatch => "Reboot: the driver was updated and the old one is still loaded.",
            Self::Refused(_) => "See `nvidia-smi` and the kernel's log (`dmesg | grep -i nvrm`).",
        }
    }

    /// Whether the machine simply has no NVIDIA driver, which is no failure of anything.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Missing { .. })
    }
}

/// Versions of what is installed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Versions {
    /// The driver's, such as `580.159.04`.
    pub driver: String,
    /// NVML's.
    pub nvml: String,
    /// The newest CUDA that the driver can run, such as `13.0`.
    pub cuda: String,
}

impl Versions {
    /// Asks; what is not answered stays empty.
    #[must_use]
    pub fn of(nvml: &Nvml) -> Self {
        let cuda = nvml.sys_cuda_driver_version().map(|version| {
            format!(
                "{}.{}",
                nvml_wrapper::cuda_driver_version_major(version),
                nvml_wrapper::cuda_driver_version_minor(version)
            )
        });
        Self {
            driver: nvml.sys_driver_version().unwrap_or_default(),
            nvml: nvml.sys_nvml_version().unwrap_or_default(),
            cuda: cuda.unwrap_or_default(),
        }
    }
}

/// Opens NVML: `library` if given, else what [`PATH_VARIABLE`] names, else the system's.
///
/// Blocks for as long as the driver does, which with a broken GPU may be for ever: call it from a
/// thread that may be given up.
///
/// # Errors
/// [`NvmlProblem`].
pub fn open(library: Option<&OsStr>) -> Result<Nvml, NvmlProblem> {
    let named: Option<OsString> =
        library.map(OsStr::to_owned).or_else(|| std::env::var_os(PATH_VARIABLE));
    let candidates = match named {
        Some(one) => vec![one],
        None => NAMES.iter().map(OsString::from).collect(),
    };
    let mut tried = Vec::new();
    for candidate in candidates {
        let name = candidate.to_string_lossy().into_owned();
        match Nvml::builder().lib_path(&candidate).init() {
            Ok(nvml) => return Ok(nvml),
            Err(NvmlError::LibloadingError(error)) => tried.push(format!("{name}: {error}")),
            Err(NvmlError::FailedToLoadSymbol(missing)) => {
                return Err(NvmlProblem::TooOld { name, missing });
            }
            Err(NvmlError::DriverNotLoaded) => return Err(NvmlProblem::NoDriver),
            Err(NvmlError::LibRmVersionMismatch) => return Err(NvmlProblem::Mismatch),
            Err(error) => return Err(NvmlProblem::Refused(error.to_string())),
        }
    }
    Err(NvmlProblem::Missing { tried: tried.join("; ") })
}
