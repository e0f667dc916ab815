//! Kernels from source to machine code: NVRTC, behind a cache on disk.
//!
//! An entry is named by the digest of the source and the options (the architecture among them), and
//! ends with a digest of itself: one that is cut short or changed is compiled
//! again. It is renamed into place, so that ranks that start together do no harm to each other.
#![allow(unsafe_code, reason = "NVRTC is a C library")]

use std::ffi::CString;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};

use crate::error::CudaError;
use crate::library::{self, Library};

/// What comes before every source.
const PRELUDE: &str = include_str!("../kernels/device.cuh");

/// A source file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Its name, as `norm.cu`.
    pub name: &'static str,
    text: &'static str,
}

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        /// Every source file of kernels.
        pub const SOURCES: &[Source] = &[
            $(Source { name: $name, text: include_str!(concat!("../kernels/", $name)) }),*
        ];
    };
}

sources!(
    "attention.cu",
    "attention_bf16.cu",
    "cached.cu",
    "elementwise.cu",
    "embedding.cu",
    "loss.cu",
    "norm.cu",
    "optimizer.cu",
    "sampling.cu",
    "stored.cu",
);

impl Source {
    /// Returns what the compiler gets.
    #[must_use]
    pub fn whole(&self) -> String {
        format!("{PRELUDE}\n#line 1 \"{}\"\n{}", self.name, self.text)
    }
}

/// Bytes of the digest that ends an entry.
const DIGEST: usize = 32;
/// Entries' names begin so; a change of their form changes it.
const FORM: &str = "cubin-1";

/// Compiles for one architecture, and remembers on disk.
#[derive(Debug, Clone)]
pub struct Compiler {
    architecture: String,
    cache: Option<PathBuf>,
}

impl Compiler {
    /// Compiles for compute capability `major.minor`, into the folder `cache` where there is one.
    #[must_use]
    pub fn new((major, minor): (i32, i32), cache: Option<&Path>) -> Self {
        Self { architecture: format!("sm_{major}{minor}"), cache: cache.map(Path::to_owned) }
    }

    /// Returns machine code, and whether it had to be made.
    ///
    /// # Errors
    /// [`CudaError::Missing`] without NVRTC, unless the cache has the code;
    /// [`CudaError::Compile`]; [`CudaError::Cache`] when the folder cannot be written.
    pub fn code(&self, source: Source) -> Result<(Vec<u8>, bool), CudaError> {
        let entry = self.cache.as_ref().map(|folder| folder.join(self.entry_name(source)));
        if let Some(code) = entry.as_deref().and_then(read_entry) {
            return Ok((code, false));
        }
        let code = self.compile(source)?;
        if let Some(path) = &entry {
            write_entry(path, &code).map_err(|error| CudaError::Cache {
                path: path.clone(),
                message: error.to_string(),
            })?;
        }
        Ok((code, true))
    }

    fn options(&self) -> [String; 2] {
        [format!("--gpu-architecture={}", self.architecture), "--std=c++17".to_owned()]
    }

    /// The compiler's version is not part of the name, so that a machine without NVRTC can use
    /// what another has compiled.
    fn entry_name(&self, source: Source) -> String {
        let mut digest = Sha256::new();
        for part in [FORM, &source.whole()].into_iter().map(str::as_bytes) {
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        for option in self.options() {
            digest.update((option.len() as u64).to_le_bytes());
            digest.update(option);
        }
        let hex: String = digest.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect();
        let stem = source.name.trim_end_matches(".cu");
        format!("{stem}-{}-{hex}.cubin", self.architecture)
    }

    fn compile(&self, source: Source) -> Result<Vec<u8>, CudaError> {
        if !library::present(Library::Nvrtc) {
            return Err(CudaError::Missing(Library::Nvrtc));
        }
        let failed = |status: result::NvrtcError, log: String| CudaError::Compile {
            module: source.name,
            architecture: self.architecture.clone(),
            status: status.to_string(),
            log,
        };
        let text = CString::new(source.whole()).expect("sources have no zero bytes");
        let name = CString::new(source.name).expect("names have no zero bytes");
        let program = Program {
            raw: result::create_program(&text, Some(&name))
                .map_err(|e| failed(e, String::new()))?,
        };
        // SAFETY: the program lives until the end of this function.
        unsafe { result::compile_program(program.raw, &self.options()) }
            .map_err(|error| failed(error, program.log()))?;
        program.code().map_err(|error| failed(error, String::new()))
    }
}

/// A program of NVRTC, destroyed when dropped.
struct Program {
    raw: sys::nvrtcProgram,
}

impl Program {
    fn log(&self) -> String {
        // SAFETY: the program is live.
        let log = unsafe { result::get_program_log(self.raw) }.unwrap_or_default();
        let bytes: Vec<u8> = log.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn code(&self) -> Result<Vec<u8>, result::NvrtcError> {
        let mut bytes = 0;
        // SAFETY: the program is live and compiled; the buffer is as long as NVRTC says.
        unsafe {
            sys::nvrtcGetCUBINSize(self.raw, &raw mut bytes).result()?;
            let mut code = vec![0u8; bytes];
            sys::nvrtcGetCUBIN(self.raw, code.as_mut_ptr().cast()).result()?;
            Ok(code)
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: nobody else has it. There is nothing to do about a failure.
        let _ = unsafe { result::destroy_program(self.raw) };
    }
}

/// Returns an entry's code, if the entry is there and whole.
fn read_entry(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(path).ok()?;
    let end = bytes.len().checked_sub(DIGEST)?;
    let sound = end > 0 && Sha256::digest(&bytes[..end])[..] == bytes[end..];
    bytes.truncate(end);
    sound.then_some(bytes)
}

fn write_entry(path: &Path, code: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    // The process's number and the thread's address make the name its own.
    let own = format!("{}-{:?}.tmp", std::process::id(), std::thread::current().id());
    let unfinished = path.with_extension(own);
    let mut bytes = code.to_vec();
    bytes.extend_from_slice(&Sha256::digest(code));
    std::fs::write(&unfinished, bytes)?;
    std::fs::rename(&unfinished, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let own = format!("drumline-cuda-{}-{name}", std::process::id());
        std::env::temp_dir().join(own)
    }

    #[test]
    fn what_was_cut_short_or_changed_is_not_read() {
        let folder = folder("cache");
        let path = folder.join("a.cubin");
        assert_eq!(read_entry(&path), None);
        write_entry(&path, b"machine code").unwrap();
        assert_eq!(read_entry(&path).as_deref(), Some(&b"machine code"[..]));
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(read_entry(&path), None, "cut at {cut}");
        }
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            std::fs::write(&path, changed).unwrap();
            assert_eq!(read_entry(&path), None, "changed at {at}");
        }
        // Nothing half-made is left.
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn an_entry_is_named_by_source_and_architecture() {
        let (a, b) = (Compiler::new((9, 0), None), Compiler::new((8, 0), None));
        let names: std::collections::BTreeSet<_> =
            SOURCES.iter().flat_map(|s| [a.entry_name(*s), b.entry_name(*s)]).collect();
        assert_eq!(names.len(), 2 * SOURCES.len());
        assert!(a.entry_name(SOURCES[0]).starts_with("attention-sm_90-"));
    }

    #[test]
    fn every_source_opens_by_what_it_computes() {
        for source in SOURCES {
            assert!(source.text.starts_with("// "), "{}", source.name);
        }
    }
}
