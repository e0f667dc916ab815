//! `manifest.json`, and the parts that it is merged from.

use std::collections::BTreeMap;

use drumline_mesh::ShardSpec;
use drumline_spec::{ModelConfig, Parallelism};
use serde::{Deserialize, Serialize};

use crate::error::CheckpointError;
use crate::reader::DType;

/// The manifest's file name. The checkpoint exists when this file does.
pub const MANIFEST_FILE: &str = "manifest.json";
/// The tokenizer's file name within a checkpoint.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// The version of the format that this program writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// A file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// File name within the checkpoint's folder.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// CRC-32 of the whole file.
    pub crc32: u32,
}

/// Where a part of a global tensor lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    /// Global name, shape, and which part.
    #[serde(flatten)]
    pub spec: ShardSpec,
    /// Type of the elements.
    pub dtype: DType,
    /// The file that holds it.
    pub file: String,
    /// Its name within that safetensors file.
    pub key: String,
}

/// What else a run needs to go on exactly as if it had not stopped.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// The seed of initial weights and data order.
    pub seed: u64,
    /// Fingerprint of the dataset; empty when unknown. The data cursor is the step.
    pub data_fingerprint: String,
    /// The job as it was submitted.
    pub job: serde_json::Value,
    /// Whatever else the caller wants back.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, serde_json::Value>,
}

/// `manifest.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Optimizer steps that were finished.
    pub step: u64,
    /// The attempt that wrote it.
    pub attempt: u64,
    /// The model's shape.
    pub model: ModelConfig,
    /// The split that wrote it; any other can read it.
    pub parallelism: Parallelism,
    /// Seed, data, job.
    pub state: RunState,
    /// The tokenizer's file, where the run had one.
    pub tokenizer: Option<FileEntry>,
    /// One file per writing rank.
    pub files: Vec<FileEntry>,
    /// Every part of every tensor, by name and offset.
    pub shards: Vec<ShardEntry>,
}

/// What one rank has written, as `part-RANK-ATTEMPT.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) format_version: u32,
    pub(crate) step: u64,
    pub(crate) attempt: u64,
    pub(crate) rank: u32,
    pub(crate) file: FileEntry,
    pub(crate) shards: Vec<ShardEntry>,
}

/// Puts the shards of all parts in order. Where several ranks hold the same part of a tensor (a
/// norm, say), the first rank's counts.
///
/// # Errors
/// [`CheckpointError::Tensor`] as [`check_coverage`].
pub(crate) fn merge(parts: &[Part]) -> Result<Vec<ShardEntry>, CheckpointError> {
    let mut shards: Vec<ShardEntry> = Vec::new();
    for part in parts {
        shards.extend(part.shards.iter().cloned());
    }
    // Stable: of equal specs the first rank's comes first.
    shards.sort_by(|a, b| a.spec.cmp(&b.spec));
    shards.dedup_by(|later, first| later.spec == first.spec);
    check_coverage(&shards)?;
    Ok(shards)
}

/// Checks that the shards of every tensor lie within it, do not overlap, and leave nothing out.
///
/// # Errors
/// [`CheckpointError::Tensor`] with the tensor's name and what is wrong.
pub fn check_coverage(shards: &[ShardEntry]) -> Result<(), CheckpointError> {
    let mut tensors: BTreeMap<&str, Vec<&ShardSpec>> = BTreeMap::new();
    for shard in shards {
        tensors.entry(&shard.spec.name).or_default().push(&shard.spec);
    }
    for (name, parts) in tensors {
        let wrong = |message: String| CheckpointError::Tensor { name: name.to_owned(), message };
        let global = &parts[0].global_shape;
        let total = checked_elements(global)
            .ok_or_else(|| wrong(format!("shape {global:?} is larger than any memory")))?;
        let mut covered = 0;
        for (i, part) in parts.iter().enumerate() {
            if part.global_shape != *global {
                return Err(wrong(format!(
                    "one shard says that its shape is {global:?}, another {:?}",
                    part.global_shape
                )));
            }
            if !part.is_valid() {
                return Err(wrong(format!(
                    "a shard of {:?} at {:?} does not lie within {global:?}",
                    part.shape, part.offset
                )));
            }
            if let Some(other) = parts[..i].iter().find(|p| p.intersect(part).is_some()) {
                return Err(wrong(format!(
                    "the shard of {:?} at {:?} overlaps the one of {:?} at {:?}",
                    part.shape, part.offset, other.shape, other.offset
                )));
            }
            covered += part.elements();
        }
        if covered != total {
            return Err(wrong(format!(
                "its shards hold {covered} of {total} elements of {global:?}"
            )));
        }
    }
    Ok(())
}

/// Returns the number of elements of a shape; none when that overflows.
pub(crate) fn checked_elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, extent| product.checked_mul(*extent))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(offset: &[usize], shape: &[usize], file: &str) -> ShardEntry {
        ShardEntry {
            spec: ShardSpec {
                name: "w".into(),
                global_shape: vec![4, 4],
                offset: offset.into(),
                shape: shape.into(),
            },
            dtype: DType::F32,
            file: file.into(),
            key: "w".into(),
        }
    }

    fn part(rank: u32, shards: Vec<ShardEntry>) -> Part {
        Part {
            format_version: FORMAT_VERSION,
            step: 1,
            attempt: 1,
            rank,
            file: FileEntry { file: String::new(), bytes: 0, crc32: 0 },
            shards,
        }
    }

    #[test]
    fn a_part_that_two_ranks_hold_is_taken_from_the_first() {
        let whole = |file| vec![shard(&[0, 0], &[4, 4], file)];
        let merged = merge(&[part(0, whole("a")), part(1, whole("b"))]).unwrap();
        assert_eq!(merged, whole("a"));
    }

    #[test]
    fn gaps_overlaps_and_shards_out_of_bounds_are_refused_by_name() {
        let cases = [
            (vec![shard(&[0, 0], &[4, 3], "a")], "12 of 16 elements"),
            (vec![shard(&[0, 0], &[4, 3], "a"), shard(&[0, 2], &[4, 2], "a")], "overlaps"),
            (vec![shard(&[0, 1], &[4, 4], "a")], "does not lie within"),
            (vec![shard(&[0], &[16], "a")], "does not lie within"),
        ];
        for (shards, expected) in cases {
            let error = merge(&[part(0, shards)]).unwrap_err().to_string();
            assert!(error.contains("tensor w") && error.contains(expected), "{error}");
        }
        let mut other = shard(&[2, 0], &[2, 4], "a");
        other.spec.global_shape = vec![5, 4];
        let error = merge(&[part(0, vec![shard(&[0, 0], &[2, 4], "a"), other])]).unwrap_err();
        assert!(error.to_string().contains("another"), "{error}");
    }
}
