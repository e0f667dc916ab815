//! Where a library was found and which version it is: for reports, before anything is computed.
#![allow(unsafe_code, reason = "libraries are loaded and asked for their version")]

use std::ffi::c_int;

use crate::library::Library;

/// What a look for a library gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Looked {
    /// It is there.
    Found {
        /// Its file.
        file: String,
        /// Its version; empty when it does not tell.
        version: String,
    },
    /// It is not.
    Missing {
        /// What was tried, and the loader's words.
        tried: String,
    },
}

/// The names that the loader is asked for: the version that this program is made for first.
fn names(library: Library) -> &'static [&'static str] {
    match library {
        Library::Driver => &["libcuda.so.1", "libcuda.so"],
        Library::Nvrtc => &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
        Library::CublasLt => &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
        Library::Nccl => &["libnccl.so.2", "libnccl.so"],
    }
}

/// Looks for a library. Nothing is started: no device is touched.
#[must_use]
pub fn look(library: Library) -> Looked {
    let mut tried = Vec::new();
    for name in names(library) {
        // SAFETY: NVIDIA's initialisers have no conditions.
        match unsafe { libloading::Library::new(*name) } {
            Ok(open) => {
                let file = mapped(name).unwrap_or_else(|| (*name).to_owned());
                let version = version(library, &open).unwrap_or_default();
                // Unloading a library that has started threads is not safe: it stays.
                std::mem::forget(open);
                return Looked::Found { file, version };
            }
            Err(error) => tried.push(words(name, &error)),
        }
    }
    Looked::Missing { tried: tried.join("; ") }
}

/// Returns what the loader said of `name`: its own words are the error's source.
pub(crate) fn words(name: &str, error: &libloading::Error) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string);
    let words = source.unwrap_or_else(|| error.to_string());
    if words.contains(name) { words } else { format!("{name}: {words}") }
}

/// Asks a library for its version, where it has a function for that.
fn version(library: Library, open: &libloading::Library) -> Option<String> {
    /// A function that writes one number and returns an error code.
    type WritesOne = unsafe extern "C" fn(*mut c_int) -> c_int;
    type WritesTwo = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
    let (mut one, mut two) = (0, 0);
    // SAFETY: the types are those of the functions in the libraries' headers since they exist, and
    // the places for the results are valid.
    unsafe {
        match library {
            Library::Driver => {
                let ask = open.get::<WritesOne>(b"cuDriverGetVersion").ok()?;
                let told = ask(&raw mut one) == 0;
                told.then(|| format!("CUDA {}.{}", one / 1000, one % 1000 / 10))
            }
            Library::Nvrtc => {
                let ask = open.get::<WritesTwo>(b"nvrtcVersion").ok()?;
                (ask(&raw mut one, &raw mut two) == 0).then(|| format!("{one}.{two}"))
            }
            Library::CublasLt => {
                let ask =
                    open.get::<unsafe extern "C" fn() -> usize>(b"cublasLtGetVersion").ok()?;
                let code = ask();
                Some(format!("{}.{}.{}", code / 10_000, code / 100 % 100, code % 100))
            }
            Library::Nccl => None,
        }
    }
}

/// Returns the file of a library that is loaded, given how its name begins.
#[must_use]
pub fn mapped(name: &str) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let stem = name.split(".so").next()?;
    maps.lines().find_map(|line| {
        let path = &line[line.find('/')?..];
        let file = path.rsplit('/').next()?;
        let rest = file.strip_prefix(stem)?;
        rest.starts_with(".so").then(|| path.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loaded_library_is_found_by_its_name() {
        let libc = mapped("libc.so.6").expect("every program here has it");
        assert!(libc.starts_with('/') && libc.contains("libc.so"), "{libc}");
        assert_eq!(mapped("libnothing.so"), None);
    }

    #[test]
    fn a_look_never_panics_and_says_what_was_tried() {
        for library in Library::ALL {
            match look(library) {
                Looked::Found { file, .. } => assert!(file.contains("lib")),
                Looked::Missing { tried } => assert!(tried.contains("lib"), "{tried}"),
            }
        }
    }
}
