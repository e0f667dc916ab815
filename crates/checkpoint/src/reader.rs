//! Reads any part of any tensor out of files that hold other parts.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use drumline_mesh::ShardSpec;
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::error::CheckpointError;
use crate::manifest::checked_elements;
use crate::map::Mapped;

/// The type of stored elements. All are read as f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of single precision.
    Bf16,
}

impl DType {
    /// Returns the size of an element in bytes.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// A tensor as it lies in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) key: String,
    pub(crate) shape: Vec<usize>,
    /// None: a type that is not read as f32.
    pub(crate) dtype: Option<DType>,
    /// Where its bytes begin in the file.
    start: usize,
}

/// A safetensors file, mapped.
#[derive(Debug)]
pub(crate) struct TensorFile {
    path: PathBuf,
    map: Mapped,
    stored: BTreeMap<String, Stored>,
}

impl TensorFile {
    /// Maps a file and reads its header, which must account for every byte.
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let failed = CheckpointError::io(path);
        let format = |message: String| CheckpointError::Format { path: path.to_owned(), message };
        let file = File::open(path).map_err(&failed)?;
        if file.metadata().map_err(&failed)?.len() < 8 {
            return Err(format("it is too short to be a safetensors file".to_owned()));
        }
        let map = Mapped::new(&file).map_err(&failed)?;
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|e| format(format!("it is not a safetensors file: {e}")))?;
        let mut stored = BTreeMap::new();
        for (key, info) in metadata.tensors() {
            let dtype = match info.dtype {
                Dtype::F32 => Some(DType::F32),
                Dtype::F16 => Some(DType::F16),
                Dtype::BF16 => Some(DType::Bf16),
                _ => None,
            };
            let start = 8 + header + info.data_offsets.0;
            let (shape, name) = (info.shape.clone(), key.clone());
            stored.insert(name, Stored { key, shape, dtype, start });
        }
        Ok(Self { path: path.to_owned(), map, stored })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn tensors(&self) -> impl Iterator<Item = &Stored> {
        self.stored.values()
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Stored> {
        self.stored.get(key)
    }
}

/// A part of a tensor and where it is stored.
#[derive(Debug)]
struct Part {
    spec: ShardSpec,
    dtype: DType,
    file: usize,
    start: usize,
}

/// Tensors by global name, in whatever parts and files they lie. Shared between threads by
/// reference; nothing is loaded until it is read.
#[derive(Debug, Default)]
pub struct Reader {
    files: Vec<TensorFile>,
    tensors: BTreeMap<String, Vec<Part>>,
}

impl Reader {
    /// Adds a file and returns its number.
    pub(crate) fn add_file(&mut self, file: TensorFile) -> usize {
        self.files.push(file);
        self.files.len() - 1
    }

    pub(crate) fn file(&self, number: usize) -> &TensorFile {
        &self.files[number]
    }

    /// Adds what `key` of a file holds as a part of a global tensor.
    pub(crate) fn add_part(
        &mut self,
        spec: ShardSpec,
        file: usize,
        key: &str,
    ) -> Result<(), CheckpointError> {
        let from = &self.files[file];
        let format = |message: String| CheckpointError::Format { path: from.path.clone(), message };
        let stored = from.get(key).ok_or_else(|| format(format!("it has no tensor {key}")))?;
        if stored.shape != spec.shape {
            return Err(format(format!(
                "tensor {key} has shape {:?}, expected {:?}",
                stored.shape, spec.shape
            )));
        }
        let dtype = stored
            .dtype
            .ok_or_else(|| format(format!("tensor {key} is neither of f32 nor f16 nor bf16")))?;
        let part = Part { dtype, file, start: stored.start, spec };
        self.tensors.entry(part.spec.name.clone()).or_default().push(part);
        Ok(())
    }

    /// Lists the tensors by name, with their global shapes.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors.iter().filter_map(|(name, parts)| {
            let first = parts.first()?;
            Some((name.as_str(), first.spec.global_shape.as_slice()))
        })
    }

    /// Returns a tensor's global shape.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        let part = self.tensors.get(name)?.first()?;
        Some(&part.spec.global_shape)
    }

    /// Reads the part of a tensor that `spec` describes into `out`, row-major, from whichever
    /// parts hold it.
    ///
    /// # Errors
    /// [`CheckpointError::Tensor`] when there is no such tensor, its global shape is another, its
    /// stored parts do not cover what is asked for, or `out` is not of `spec.elements()`.
    pub fn read(&self, spec: &ShardSpec, out: &mut [f32]) -> Result<(), CheckpointError> {
        let wrong = |message: String| CheckpointError::Tensor { name: spec.name.clone(), message };
        let Some(parts) = self.tensors.get(&spec.name) else {
            return Err(wrong("it is not in the checkpoint".to_owned()));
        };
        if let Some(shape) = self.shape(&spec.name)
            && shape != spec.global_shape
        {
            return Err(wrong(format!("its shape is {shape:?}, expected {:?}", spec.global_shape)));
        }
        if !spec.is_valid() {
            return Err(wrong(format!(
                "{:?} at {:?} does not lie within {:?}",
                spec.shape, spec.offset, spec.global_shape
            )));
        }
        if out.len() != spec.elements() {
            return Err(wrong(format!(
                "room for {} elements, but {:?} are {}",
                out.len(),
                spec.shape,
                spec.elements()
            )));
        }
        let mut covered = 0;
        for part in parts {
            if let Some(common) = part.spec.intersect(spec) {
                let file = &self.files[part.file];
                let bytes = &file.map[part.start..][..part.spec.elements() * part.dtype.bytes()];
                copy(part, bytes, spec, out, &common);
                covered += common.elements();
            }
        }
        if covered != out.len() {
            return Err(wrong(format!(
                "only {covered} of {} elements of {:?} at {:?} are stored",
                out.len(),
                spec.shape,
                spec.offset
            )));
        }
        Ok(())
    }

    /// Reads a whole tensor.
    ///
    /// # Errors
    /// As [`Reader::read`].
    pub fn read_whole(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let wrong = |message: &str| CheckpointError::Tensor {
            name: name.to_owned(),
            message: message.to_owned(),
        };
        let shape = self.shape(name).ok_or_else(|| wrong("it is not in the checkpoint"))?;
        let elements =
            checked_elements(shape).ok_or_else(|| wrong("its shape is larger than any memory"))?;
        let spec = ShardSpec {
            name: name.to_owned(),
            global_shape: shape.to_vec(),
            offset: vec![0; shape.len()],
            shape: shape.to_vec(),
        };
        let mut out = vec![0.0; elements];
        self.read(&spec, &mut out)?;
        Ok(out)
    }
}

/// Copies `common` out of a stored part.
fn copy(part: &Part, bytes: &[u8], into: &ShardSpec, out: &mut [f32], common: &ShardSpec) {
    if part.dtype == DType::F32
        && let Ok(values) = bytemuck::try_cast_slice::<u8, f32>(bytes)
    {
        return part.spec.copy_part(values, into, out, common);
    }
    // Files of others may be unaligned: whole parts are converted, then copied. Weights are read
    // once per start.
    let values: Vec<f32> = match part.dtype {
        DType::F32 => {
            (bytes.chunks_exact(4)).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
        DType::F16 => {
            (bytes.chunks_exact(2)).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
        DType::Bf16 => {
            (bytes.chunks_exact(2)).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
    };
    part.spec.copy_part(&values, into, out, common);
}
