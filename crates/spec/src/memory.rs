//! What a training run gives for needing less memory, and for bits that repeat: `spec.memory` and
//! `spec.deterministic`.

use serde::{Deserialize, Serialize};

use crate::field::{Field, Kind};
use crate::gang::Parallelism;
use crate::table::default;
use crate::walk::{Checked, Walk};

/// What the backward pass computes again instead of keeping it from the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing.
    #[default]
    None,
    /// Normalised inputs and the output of the non-linearity: what costs no matrix product.
    Selective,
    /// Everything but the input of each layer.
    Full,
}

impl Recompute {
    /// Returns the word used in manifests and reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Selective => "selective",
            Self::Full => "full",
        }
    }
}

/// What a run gives for needing less memory. None of it changes what is learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryOptions {
    /// What is computed again in the backward pass.
    pub recompute: Recompute,
    /// Each copy of the model keeps the moments of its share of the parameters, and updates that
    /// share (`ZeRO` stage 1, Rajbhandari et al. 2020).
    pub shard_optimizer: bool,
    /// The ranks of a tensor group share the rows of the residual stream between the matrix
    /// products (Korthikanti et al. 2022, section 4.2).
    pub sequence_parallel: bool,
}

/// The fields of `spec.memory`.
pub(crate) const MEMORY: &[Field] = &[
    default(
        "recompute",
        Kind::Choice(&[
            ("none", "Everything is kept for the backward pass."),
            (
                "selective",
                "Normalised inputs and the output of the non-linearity are computed again: no \
                 matrix product, so a few percent of a step.",
            ),
            (
                "full",
                "Only the input of each layer is kept; the layer's forward pass is run again, but \
                 for its last product: about a quarter of a step.",
            ),
        ]),
        "none",
        "",
        "What the backward pass computes again instead of keeping it. The losses are the same, bit \
         for bit.",
    ),
    default(
        "shardOptimizer",
        Kind::Bool,
        "false",
        "",
        "Each copy of the model keeps the moments of its share of the parameters and updates that \
         share; the copies then gather the weights (ZeRO stage 1). The optimizer's memory is \
         divided by parallelism.data, which must be at least 2. Checkpoints fit every other split, \
         sharded or not.",
    ),
    default(
        "sequenceParallel",
        Kind::Bool,
        "false",
        "",
        "The ranks of a tensor group share the rows between the matrix products, so that norms \
         are computed once and activations there are divided by parallelism.tensor, which must be \
         at least 2 and divide batch.micro x batch.sequence.",
    ),
];

/// What `spec.deterministic` says.
pub(crate) const DETERMINISTIC_DOC: &str = "The bits of a run depend on its manifest, its split and \
     the kind of processor alone, not on how many threads the ranks get. What could not repeat is \
     refused: parallelism: auto, and elastic. Without it the bits repeat for the same number of \
     threads.";

/// Reads the options and tells what cannot be together with the split. A number of the split that is
/// wrong by itself is 0, which no rule judges.
pub(crate) fn options(
    walk: &mut Walk<'_>,
    split: Parallelism,
    sequence: u32,
) -> (MemoryOptions, bool) {
    const SHARD: &str = "spec.memory.shardOptimizer";
    const SEQUENCE: &str = "spec.memory.sequenceParallel";
    const DETERMINISTIC: &str = "spec.deterministic";
    let is = |walk: &Walk<'_>, path: &str| matches!(walk.get(path), Some(Checked::Bool(true)));
    let memory = MemoryOptions {
        recompute: match walk.text("spec.memory.recompute").as_deref() {
            Some("selective") => Recompute::Selective,
            Some("full") => Recompute::Full,
            _ => Recompute::None,
        },
        shard_optimizer: is(walk, SHARD),
        sequence_parallel: is(walk, SEQUENCE),
    };
    let deterministic = is(walk, DETERMINISTIC);
    let is_auto = walk.text("spec.parallelism").is_some();
    let is_elastic = walk.is_given("spec.elastic");
    if deterministic && is_auto {
        let message = "auto chooses by what is free, so that two runs may be split differently; \
                       give the split, as `drumline submit --dry-run` shows it";
        walk.wrong_field(DETERMINISTIC, message);
    }
    if deterministic && is_elastic {
        let message = "an elastic run adds in another order with every size; leave elastic out";
        walk.wrong_field(DETERMINISTIC, message);
    }
    if is_auto {
        return (memory, deterministic);
    }
    if memory.shard_optimizer && split.data == 1 && !is_elastic {
        let message = "the copies of the model share the optimizer, and data 1 is one copy; nearest \
                       that works: data 2, or leave it out";
        walk.wrong_field(SHARD, message);
    }
    if memory.sequence_parallel && split.tensor == 1 {
        let message = "the ranks of a tensor group share the rows, and tensor 1 is one rank; nearest \
                       that works: tensor 2, or leave it out";
        walk.wrong_field(SEQUENCE, message);
    }
    let micro = walk.u32("spec.batch.micro").unwrap_or(0);
    let rows = u64::from(micro) * u64::from(sequence);
    if memory.sequence_parallel && split.tensor > 1 && !rows.is_multiple_of(u64::from(split.tensor))
    {
        let message = format!(
            "micro {micro} x sequence {sequence} = {rows} rows are not divisible by tensor {}",
            split.tensor
        );
        walk.wrong_field(SEQUENCE, message);
    }
    (memory, deterministic)
}
