//! Token shards: a header and the token ids, little-endian, as one file.
//!
//! Layout: `DLTOKENS`, version (u32), bytes per token (u32, 2 or 4), number of tokens (u64),
//! CRC-32 of the tokens (u32), CRC-32 of the header so far (u32), then the tokens.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::durable;
use crate::map::Mapped;

const MAGIC: [u8; 8] = *b"DLTOKENS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;

// The mapped file is read as integers of this machine.
const _: () = assert!(cfg!(target_endian = "little"), "token shards are little-endian");
// Tokens stay aligned behind the header.
const _: () = assert!(HEADER_BYTES.is_multiple_of(4));

/// Why a shard was refused.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// It could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The shard.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It is not what its header or the manifest says.
    #[error("{path} is damaged: {message}")]
    Damaged {
        /// The shard.
        path: PathBuf,
        /// What was expected and what was found.
        message: String,
    },
}

/// The width of a token on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenWidth {
    /// Two bytes, for vocabularies of up to 65,536 tokens.
    U16,
    /// Four bytes.
    U32,
}

impl TokenWidth {
    /// Returns the narrowest width that holds every id below `vocab`.
    #[must_use]
    pub fn of_vocab(vocab: u32) -> Self {
        if vocab <= 1 << 16 { Self::U16 } else { Self::U32 }
    }

    /// Returns the width in bytes.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

/// What was written, for the manifest.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ShardEntry {
    /// File name within the dataset's folder.
    pub file: String,
    /// Number of tokens.
    pub tokens: u64,
    /// CRC-32 of the tokens.
    pub crc32: u32,
    /// SHA-256 of the tokens, in hexadecimal.
    pub sha256: String,
}

/// Writes one shard; it appears under its name when [`ShardWriter::commit`] returns.
pub(crate) struct ShardWriter {
    path: PathBuf,
    file: BufWriter<tempfile::NamedTempFile>,
    width: TokenWidth,
    tokens: u64,
    crc: crc32fast::Hasher,
    sha: Sha256,
}

impl ShardWriter {
    pub(crate) fn create(path: PathBuf, width: TokenWidth) -> Result<Self, ShardError> {
        let failed = io_error(&path);
        let folder = path.parent().unwrap_or(Path::new("."));
        let temporary = tempfile::NamedTempFile::new_in(folder).map_err(&failed)?;
        let mut file = BufWriter::with_capacity(1 << 20, temporary);
        file.write_all(&[0; HEADER_BYTES]).map_err(&failed)?;
        Ok(Self { file, width, tokens: 0, crc: crc32fast::Hasher::new(), sha: Sha256::new(), path })
    }

    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Appends tokens, which must be below the vocabulary that the width was chosen for.
    pub(crate) fn append(&mut self, ids: &[u32]) -> Result<(), ShardError> {
        let bytes = match self.width {
            TokenWidth::U16 => {
                let narrow: Vec<u16> = ids.iter().map(|id| *id as u16).collect();
                bytemuck::cast_slice(&narrow).to_vec()
            }
            TokenWidth::U32 => bytemuck::cast_slice(ids).to_vec(),
        };
        self.crc.update(&bytes);
        self.sha.update(&bytes);
        self.tokens += ids.len() as u64;
        self.file.write_all(&bytes).map_err(io_error(&self.path))
    }

    pub(crate) fn commit(self) -> Result<ShardEntry, ShardError> {
        let Self { path, file, width, tokens, crc, sha } = self;
        let failed = io_error(&path);
        let mut file = file.into_inner().map_err(|e| failed(e.into_error()))?;
        let crc32 = crc.finalize();
        let header = Header { width, tokens, crc32 };
        file.as_file_mut()
            .seek(SeekFrom::Start(0))
            .and_then(|_| file.as_file_mut().write_all(&header.to_bytes()))
            .map_err(&failed)?;
        durable::commit(file, &path).map_err(&failed)?;
        Ok(ShardEntry {
            file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            tokens,
            crc32,
            sha256: hex(&sha.finalize()),
        })
    }
}

struct Header {
    width: TokenWidth,
    tokens: u64,
    crc32: u32,
}

impl Header {
    fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&(self.width.bytes() as u32).to_le_bytes());
        out[16..24].copy_from_slice(&self.tokens.to_le_bytes());
        out[24..28].copy_from_slice(&self.crc32.to_le_bytes());
        let own = crc32fast::hash(&out[..28]);
        out[28..].copy_from_slice(&own.to_le_bytes());
        out
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(format!(
                "{} bytes are shorter than the header's {HEADER_BYTES}",
                bytes.len()
            ));
        };
        let u32_at = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        if bytes[..8] != MAGIC {
            return Err("it does not begin as a token shard does".to_owned());
        }
        if u32_at(28) != crc32fast::hash(&bytes[..28]) {
            return Err("the header's checksum differs".to_owned());
        }
        if u32_at(8) != VERSION {
            return Err(format!("format version {}, expected {VERSION}", u32_at(8)));
        }
        let width = match u32_at(12) {
            2 => TokenWidth::U16,
            4 => TokenWidth::U32,
            other => return Err(format!("tokens of {other} bytes, expected 2 or 4")),
        };
        Ok(Self {
            width,
            tokens: u64::from(u32_at(16)) | u64::from(u32_at(20)) << 32,
            crc32: u32_at(24),
        })
    }
}

/// A shard, mapped into memory.
#[derive(Debug)]
pub struct Shard {
    map: Mapped,
    width: TokenWidth,
    tokens: u64,
}

impl Shard {
    /// Maps `entry`'s file in `folder`, and checks length, header and checksum.
    ///
    /// # Errors
    /// [`ShardError`], with the path and what differs.
    pub fn open(folder: &Path, entry: &ShardEntry) -> Result<Self, ShardError> {
        let path = folder.join(&entry.file);
        let failed = io_error(&path);
        let damaged = |message| ShardError::Damaged { path: path.clone(), message };
        let file = File::open(&path).map_err(&failed)?;
        let length = file.metadata().map_err(&failed)?.len();
        if length < HEADER_BYTES as u64 {
            return Err(damaged(format!(
                "{length} bytes are shorter than the header's {HEADER_BYTES}"
            )));
        }
        let map = Mapped::new(&file).map_err(&failed)?;
        let header = Header::parse(&map).map_err(&damaged)?;
        let expected = header
            .tokens
            .checked_mul(header.width.bytes() as u64)
            .and_then(|bytes| bytes.checked_add(HEADER_BYTES as u64));
        if expected != Some(length) {
            return Err(damaged(format!(
                "{length} bytes, but the header says {} tokens of {} bytes",
                header.tokens,
                header.width.bytes()
            )));
        }
        if (header.tokens, header.crc32) != (entry.tokens, entry.crc32) {
            return Err(damaged(format!(
                "{} tokens with checksum {:08x}, but dataset.json says {} with {:08x}",
                header.tokens, header.crc32, entry.tokens, entry.crc32
            )));
        }
        let crc32 = crc32fast::hash(&map[HEADER_BYTES..]);
        if crc32 != header.crc32 {
            return Err(damaged(format!(
                "the tokens' checksum is {crc32:08x}, expected {:08x}",
                header.crc32
            )));
        }
        Ok(Self { map, width: header.width, tokens: header.tokens })
    }

    /// Returns the number of tokens.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Appends tokens `start..start + count` to `out`, which must lie within the shard.
    pub(crate) fn extend(&self, start: usize, count: usize, out: &mut Vec<u32>) {
        let width = self.width.bytes();
        let from = HEADER_BYTES + start * width;
        let bytes = &self.map[from..from + count * width];
        match self.width {
            TokenWidth::U16 => out
                .extend(bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])))),
            TokenWidth::U32 => out.extend(
                bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            ),
        }
    }
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> ShardError + use<> {
    let path = path.to_owned();
    move |source| ShardError::Io { path: path.clone(), source }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut out, byte| {
        // Writing to a string cannot fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn write(folder: &Path, ids: &[u32], width: TokenWidth) -> ShardEntry {
        let mut writer = ShardWriter::create(folder.join("a.tokens"), width).unwrap();
        for part in ids.chunks(7) {
            writer.append(part).unwrap();
        }
        writer.commit().unwrap()
    }

    fn read(shard: &Shard, start: usize, count: usize) -> Vec<u32> {
        let mut out = Vec::new();
        shard.extend(start, count, &mut out);
        out
    }

    #[test]
    fn the_width_follows_the_vocabulary() {
        assert_eq!(TokenWidth::of_vocab(65_536), TokenWidth::U16);
        assert_eq!(TokenWidth::of_vocab(65_537), TokenWidth::U32);
    }

    #[test]
    fn every_altered_byte_and_every_truncation_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let entry = write(folder.path(), &[1, 2, 3, 500, 65_535], TokenWidth::U16);
        let path = folder.path().join(&entry.file);
        let good = std::fs::read(&path).unwrap();
        Shard::open(folder.path(), &entry).unwrap();
        let refused = |bytes: &[u8], what: String| {
            std::fs::write(&path, bytes).unwrap();
            let error = Shard::open(folder.path(), &entry).expect_err(&what);
            assert!(error.to_string().contains("a.tokens"), "{error}");
        };
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            refused(&bad, format!("byte {at} altered"));
            refused(&good[..at], format!("cut to {at} bytes"));
        }
        refused(&[&good[..], &[0, 0]].concat(), "two bytes more".to_owned());
        std::fs::remove_file(&path).unwrap();
        assert!(Shard::open(folder.path(), &entry).is_err());
    }

    proptest! {
        #[test]
        fn tokens_read_back(
            ids in prop::collection::vec(0u32..70_000, 1..200), at in 0usize..200, wide: bool,
        ) {
            let width = if wide { TokenWidth::U32 } else { TokenWidth::U16 };
            let ids: Vec<u32> = if wide { ids } else { ids.iter().map(|i| i % 65_536).collect() };
            let folder = tempfile::tempdir().unwrap();
            let entry = write(folder.path(), &ids, width);
            let shard = Shard::open(folder.path(), &entry).unwrap();
            prop_assert_eq!(shard.tokens(), ids.len() as u64);
            let at = at % ids.len();
            prop_assert_eq!(read(&shard, at, ids.len() - at), &ids[at..]);
        }
    }
}
