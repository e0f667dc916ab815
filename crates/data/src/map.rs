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
        // Token shards are written to a temporary file and renamed into place, and a rebuild
        // renames a new file over the name, which leaves the mapped one as it was: no program of
        // ours ever writes to or truncates a file that has the name of a shard. The contents are
        // plain integers, for which every bit pattern is valid, and each id is checked against
        // the vocabulary where it is read.
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
