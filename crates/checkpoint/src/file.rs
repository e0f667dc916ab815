//! One safetensors file of f32, written straight from the tensors' memory.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::path::Path;

use drumline_mesh::ShardSpec;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use crate::durable;
use crate::error::CheckpointError;
use crate::manifest::{FileEntry, ShardEntry};
use crate::reader::DType;

// The file holds the bytes of this machine's f32.
const _: () = assert!(cfg!(target_endian = "little"), "safetensors is little-endian");

/// A rank's parts of global tensors, in host memory and independent of the step loop.
pub trait Shards: Send + 'static {
    /// Lists every part with its values, row-major, `spec.elements()` of them. Global shapes are
    /// without padding.
    fn shards(&self) -> Vec<(&ShardSpec, &[f32])>;
}

/// A rank's part of a global tensor, with its values, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Global name and shape, without padding, and which part this is.
    pub spec: ShardSpec,
    /// The values, `spec.elements()` of them.
    pub values: Vec<f32>,
}

impl Shards for Vec<Tensor> {
    fn shards(&self) -> Vec<(&ShardSpec, &[f32])> {
        self.iter().map(|t| (&t.spec, t.values.as_slice())).collect()
    }
}

/// Writes a rank's parts to `path` and returns the file's and the shards' entries.
///
/// # Errors
/// [`CheckpointError::Tensor`] when values and shape do not agree; [`CheckpointError::Io`].
pub(crate) fn write_shards(
    path: &Path,
    parts: &[(&ShardSpec, &[f32])],
) -> Result<(FileEntry, Vec<ShardEntry>), CheckpointError> {
    let file = file_name(path);
    let mut shards = Vec::with_capacity(parts.len());
    let mut named = Vec::with_capacity(parts.len());
    // Several parts of one tensor in one file need names of their own.
    let mut times: BTreeMap<&str, usize> = BTreeMap::new();
    for (spec, values) in parts {
        if !spec.is_valid() || spec.elements() != values.len() {
            return Err(CheckpointError::Tensor {
                name: spec.name.clone(),
                message: format!(
                    "{} values for a shard of {:?} at {:?} of {:?}",
                    values.len(),
                    spec.shape,
                    spec.offset,
                    spec.global_shape
                ),
            });
        }
        let count = times.entry(&spec.name).or_default();
        let key = match *count {
            0 => spec.name.clone(),
            n => format!("{}#{n}", spec.name),
        };
        *count += 1;
        named.push((key.clone(), spec.shape.clone()));
        shards.push(ShardEntry {
            spec: (*spec).clone(),
            dtype: DType::F32,
            file: file.clone(),
            key,
        });
    }
    let mut values = parts.iter();
    let entry = write_f32(path, &named, &mut |sink| match values.next() {
        Some((_, values)) => sink(values),
        None => Ok(()),
    })?;
    Ok((entry, shards))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Takes one tensor's values.
pub(crate) type Sink<'a> = dyn FnMut(&[f32]) -> Result<(), CheckpointError> + 'a;

/// Writes a safetensors file of the f32 tensors that are named, with their shapes; `next` is
/// called once for each, in that order, and passes its values on.
///
/// # Errors
/// [`CheckpointError::Io`], [`CheckpointError::Format`], and those of `next`.
pub(crate) fn write_f32(
    path: &Path,
    named: &[(String, Vec<usize>)],
    next: &mut dyn FnMut(&mut Sink<'_>) -> Result<(), CheckpointError>,
) -> Result<FileEntry, CheckpointError> {
    let format = |message: String| CheckpointError::Format { path: path.to_owned(), message };
    let mut end = 0;
    let infos: Vec<_> = named
        .iter()
        .map(|(name, shape)| {
            let start = end;
            end += shape.iter().product::<usize>() * size_of::<f32>();
            let info =
                TensorInfo { dtype: Dtype::F32, shape: shape.clone(), data_offsets: (start, end) };
            (name.clone(), info)
        })
        .collect();
    // What transformers asks of every file: which framework's layout it is.
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(about), infos).map_err(|e| format(e.to_string()))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|e| format(e.to_string()))?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut failed = None;
    let written = durable::write_with(path, |file| {
        let mut counting = Counting { inner: file, bytes: 0, crc: crc32fast::Hasher::new() };
        counting.write_all(&(header.len() as u64).to_le_bytes())?;
        counting.write_all(&header)?;
        for (name, shape) in named {
            let expected = shape.iter().product::<usize>();
            let mut sink = |values: &[f32]| {
                if values.len() != expected {
                    return Err(CheckpointError::Tensor {
                        name: name.clone(),
                        message: format!("{} values for shape {shape:?}", values.len()),
                    });
                }
                counting.write_all(bytemuck::cast_slice(values)).map_err(CheckpointError::io(path))
            };
            if let Err(e) = next(&mut sink) {
                failed = Some(e);
                return Err(io::Error::other("a tensor could not be written"));
            }
        }
        Ok((counting.bytes, counting.crc.finalize()))
    });
    if let Some(e) = failed {
        return Err(e);
    }
    let (bytes, crc32) = written.map_err(CheckpointError::io(path))?;
    Ok(FileEntry { file: file_name(path), bytes, crc32 })
}

/// Counts and sums what passes, while it is in the cache.
struct Counting<'a> {
    inner: &'a mut dyn Write,
    bytes: u64,
    crc: crc32fast::Hasher,
}

// So that a block is still in the cache when it is written after it was summed.
const BLOCK_BYTES: usize = 1 << 20;

impl Write for Counting<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let block = &bytes[..bytes.len().min(BLOCK_BYTES)];
        let taken = self.inner.write(block)?;
        self.crc.update(&block[..taken]);
        self.bytes += taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
