//! The one place that maps files into memory.

use std::fs::File;
use std::io;
use std::ops::Deref;

use memmap2::Mmap;

/// A read-only mapping of a whole file.
#[derive(Debug)]
pub(crate) struct Mapped(Mmap);

impl Mapped {
    /// Maps `file`.
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        // SAFETY: a mapping is undefined behaviour when the file changes or shrinks underneath.
        // Shard files are written under a temporary name and renamed into place; nothing of ours
        // writes to or truncates a file under its final name, and pruning unlinks whole files,
        // which leaves a mapping as it was. The bytes are only ever read as plain numbers, for
        // which every bit pattern is valid.
        #[expect(unsafe_code, reason = "mapping a file has no safe form")]
        let map = unsafe { Mmap::map(file)? };
        Ok(Self(map))
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
