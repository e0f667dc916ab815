//! Which of NVIDIA's libraries this machine has. cudarc panics where one is missing, so every use of
//! one asks here first.
#![allow(unsafe_code, reason = "looking for a library runs its initialisers")]

use std::sync::OnceLock;

/// A library that is loaded at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Library {
    /// `libcuda.so.1`: comes with the display driver.
    Driver,
    /// `libnvrtc.so.13`: compiles kernels.
    Nvrtc,
    /// `libcublasLt.so.13`: matrix products.
    CublasLt,
    /// `libnccl.so.2`: collectives.
    Nccl,
}

impl Library {
    /// Every library, in the order in which a missing one is told.
    pub const ALL: [Self; 4] = [Self::Driver, Self::Nvrtc, Self::CublasLt, Self::Nccl];

    /// Returns the file that the dynamic loader looks for.
    #[must_use]
    pub fn file(self) -> &'static str {
        match self {
            Self::Driver => "libcuda.so.1",
            Self::Nvrtc => "libnvrtc.so.13",
            Self::CublasLt => "libcublasLt.so.13",
            Self::Nccl => "libnccl.so.2",
        }
    }

    /// Returns how one gets it.
    #[must_use]
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Driver => "install NVIDIA's driver, 580 or newer",
            Self::Nvrtc => "install the CUDA 13 toolkit, or the Python package nvidia-cuda-nvrtc",
            Self::CublasLt => "install the CUDA 13 toolkit, or the Python package nvidia-cublas",
            Self::Nccl => "install NCCL 2.30 or newer, or the Python package nvidia-nccl-cu13",
        }
    }
}

/// Returns whether the dynamic loader finds a library. It looks once and remembers.
#[must_use]
pub fn present(library: Library) -> bool {
    static FOUND: [OnceLock<bool>; 4] = [const { OnceLock::new() }; 4];
    *FOUND[library as usize].get_or_init(|| {
        // SAFETY: these load a library, as the calls that need it would; NVIDIA's initialisers have
        // no conditions.
        unsafe {
            match library {
                Library::Driver => cudarc::driver::sys::is_culib_present(),
                Library::Nvrtc => cudarc::nvrtc::sys::is_culib_present(),
                Library::CublasLt => cudarc::cublaslt::sys::is_culib_present(),
                Library::Nccl => cudarc::nccl::sys::is_culib_present(),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_twice_finds_the_same() {
        for library in Library::ALL {
            assert_eq!(present(library), present(library), "{library:?}");
            assert!(library.file().starts_with("lib") && !library.remedy().is_empty());
        }
    }
}
