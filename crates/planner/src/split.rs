//! How a run is set up: the split, the batch, recomputation and what the software overlaps.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::catalogue::{Dtype, Gpu, Network};
use crate::error::PlanError;
use crate::model::Model;

/// Which activations are computed again in the backward pass (Korthikanti et al. 2022, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Every activation is kept.
    None,
    /// The scores of attention are computed again.
    Selective,
    /// Only each layer's input is kept.
    Full,
}

impl Recompute {
    /// Every mode, cheapest in time first.
    pub const ALL: [Self; 3] = [Self::None, Self::Selective, Self::Full];

    /// Returns the word used in options and tables.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Selective => "selective",
            Self::Full => "full",
        }
    }

    /// Parses the word.
    ///
    /// # Errors
    /// [`PlanError::UnknownName`] with the nearest words.
    pub fn parse(text: &str) -> Result<Self, PlanError> {
        Self::ALL
            .into_iter()
            .find(|r| r.as_str() == text.trim().to_lowercase())
            .ok_or_else(|| PlanError::unknown("recompute", text, Self::ALL.map(Self::as_str)))
    }
}

impl fmt::Display for Recompute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What the training software fuses and overlaps: three generations of published practice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stack {
    /// Until early 2022: attention scores in memory, gradients added by a kernel of their own,
    /// no communication hidden (Narayanan et al. 2021; Smith et al. 2022).
    Eager,
    /// 2022: gradients accumulated inside the matmul (Korthikanti et al. 2022).
    Fused,
    /// From 2023: fused attention (Dao et al. 2022), no dropout, gradient and parameter traffic
    /// behind computation, pipeline sends behind computation.
    Overlapped,
    /// This project's own engine: fused attention and accumulation, no dropout, fp32 buffers
    /// whatever the format of products, no communication hidden.
    Native,
}

impl Stack {
    const ALL: [Self; 4] = [Self::Eager, Self::Fused, Self::Overlapped, Self::Native];

    /// Returns the word used in options and tables.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Eager => "eager",
            Self::Fused => "fused",
            Self::Overlapped => "overlapped",
            Self::Native => "native",
        }
    }

    /// Parses the word.
    ///
    /// # Errors
    /// [`PlanError::UnknownName`] with the nearest words.
    pub fn parse(text: &str) -> Result<Self, PlanError> {
        Self::ALL
            .into_iter()
            .find(|s| s.as_str() == text.trim().to_lowercase())
            .ok_or_else(|| PlanError::unknown("stack", text, Self::ALL.map(Self::as_str)))
    }

    /// Returns whether attention never writes its scores to memory.
    #[must_use]
    pub fn fused_attention(self) -> bool {
        self >= Self::Overlapped
    }

    /// Returns whether the weight-gradient matmul adds to the accumulated gradient itself.
    #[must_use]
    pub fn fused_accumulation(self) -> bool {
        self >= Self::Fused
    }

    /// Returns whether gradients, parameters and pipeline sends travel behind computation.
    #[must_use]
    pub fn overlaps(self) -> bool {
        self == Self::Overlapped
    }

    /// Returns whether the model has dropout, whose masks are stored.
    #[must_use]
    pub fn dropout(self) -> bool {
        self < Self::Overlapped
    }
}

impl fmt::Display for Stack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How a model is split over GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Split {
    /// Ranks that share each matrix, t.
    pub tensor: u32,
    /// Pipeline stages, p.
    pub pipeline: u32,
    /// Model chunks per stage in the interleaved schedule, v; 1 is plain 1F1B.
    pub virtual_stages: u32,
    /// Copies that share the batch, d.
    pub data: u32,
    /// Ranks that share each sequence, c.
    pub context: u32,
    /// Ranks that share the experts, e; they are taken from data and context.
    pub expert: u32,
    /// Whether activations between tensor-parallel blocks are split along the sequence.
    pub sequence_parallel: bool,
    /// `ZeRO` stage, 0 to 3.
    pub zero: u8,
    /// Recomputation.
    pub recompute: Recompute,
    /// Sequences in one forward pass, b.
    pub micro_batch: u32,
}

impl Split {
    /// The split of one GPU.
    pub const SINGLE: Self = Self {
        tensor: 1,
        pipeline: 1,
        virtual_stages: 1,
        data: 1,
        context: 1,
        expert: 1,
        sequence_parallel: false,
        zero: 0,
        recompute: Recompute::None,
        micro_batch: 1,
    };

    /// Returns the number of ranks.
    #[must_use]
    pub fn gpus(&self) -> u32 {
        self.tensor * self.pipeline * self.data * self.context
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tp{}", self.tensor)?;
        if self.sequence_parallel {
            f.write_str("+sp")?;
        }
        if self.context > 1 {
            write!(f, " cp{}", self.context)?;
        }
        write!(f, " pp{}", self.pipeline)?;
        if self.virtual_stages > 1 {
            write!(f, "x{}", self.virtual_stages)?;
        }
        write!(f, " dp{}", self.data)?;
        if self.expert > 1 {
            write!(f, " ep{}", self.expert)?;
        }
        write!(f, " zero{} mb{} {}", self.zero, self.micro_batch, self.recompute)
    }
}

/// The batch and the numbers of a training run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// Tokens in a sequence, T.
    pub sequence: u32,
    /// Sequences in an optimizer step, B.
    pub global: u32,
    /// The format of matrix products.
    pub dtype: Dtype,
    /// What the software fuses and overlaps.
    pub stack: Stack,
}

impl Batch {
    /// Returns the bytes of one number of an activation.
    #[must_use]
    pub fn activation_bytes(&self) -> f64 {
        if self.stack == Stack::Native { 4.0 } else { self.dtype.activation_bytes() }
    }

    /// Returns the bytes per parameter of weights, gradients and optimizer, before sharding.
    #[must_use]
    pub fn bytes_per_parameter(&self) -> (f64, f64, f64) {
        let dtype = if self.stack == Stack::Native { Dtype::Fp32 } else { self.dtype };
        crate::memory::bytes_per_parameter(dtype)
    }

    /// Returns the tokens of an optimizer step.
    #[must_use]
    pub fn tokens(&self) -> f64 {
        f64::from(self.sequence) * f64::from(self.global)
    }
}

/// The machines.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machines {
    /// The GPU type.
    pub gpu: Gpu,
    /// The node and network shape.
    pub network: Network,
}

impl Machines {
    /// Returns the bytes that driver and libraries take of each GPU.
    #[must_use]
    pub fn framework_bytes(&self) -> f64 {
        self.gpu.calibration.framework_gb * 1e9
    }

    /// Returns the GPUs that reach each other over the fast links.
    #[must_use]
    pub fn domain(&self) -> u32 {
        self.gpu.link_domain.min(self.network.gpus_per_node.max(1)).max(1)
    }
}

/// Checks a split against model and batch, and returns micro-batches per rank and step.
///
/// # Errors
/// [`PlanError::Invalid`] with the numbers and the nearest that works.
pub fn check(model: &Model, split: &Split, batch: &Batch) -> Result<u32, PlanError> {
    let named = [
        ("tensor", split.tensor),
        ("pipeline", split.pipeline),
        ("virtual_stages", split.virtual_stages),
        ("data", split.data),
        ("context", split.context),
        ("expert", split.expert),
        ("micro_batch", split.micro_batch),
        ("global_batch", batch.global),
        ("sequence", batch.sequence),
    ];
    for (field, value) in named {
        if value == 0 {
            return Err(PlanError::invalid(field, "must be at least 1"));
        }
    }
    let near = |value: u32, wanted: u32| drumline_spec::model::nearest_divisor(value, wanted);
    let ranks = [split.tensor, split.pipeline, split.data, split.context]
        .into_iter()
        .try_fold(1u32, |a, b| a.checked_mul(b));
    if ranks.is_none_or(|r| r > 1 << 24) {
        return Err(PlanError::invalid("data", "the split has more than 16,777,216 ranks"));
    }
    if !model.heads.is_multiple_of(split.tensor) {
        let nearest = near(model.heads, split.tensor);
        return Err(PlanError::invalid(
            "tensor",
            format!(
                "heads {} of {} is not divisible by tensor {}; nearest that works: tensor {nearest}",
                model.heads, model.name, split.tensor
            ),
        ));
    }
    let chunks = u64::from(split.pipeline) * u64::from(split.virtual_stages);
    if chunks > u64::from(model.total_layers()) {
        return Err(PlanError::invalid(
            "pipeline",
            format!(
                "pipeline {} x virtual_stages {} is more than the {} layers of {}; nearest that works: virtual_stages {}, pipeline {}",
                split.pipeline,
                split.virtual_stages,
                model.total_layers(),
                model.name,
                (model.total_layers() / split.pipeline).max(1),
                split.pipeline.min(model.total_layers())
            ),
        ));
    }
    if let Some(moe) = model.moe
        && !moe.experts.is_multiple_of(split.expert)
    {
        let nearest = near(moe.experts, split.expert);
        return Err(PlanError::invalid(
            "expert",
            format!(
                "{} experts are not divisible by expert {}; nearest that works: expert {nearest}",
                moe.experts, split.expert
            ),
        ));
    }
    if split.expert > 1 && model.moe.is_none() {
        return Err(PlanError::invalid("expert", format!("{} has no experts", model.name)));
    }
    if !(split.data * split.context).is_multiple_of(split.expert) {
        return Err(PlanError::invalid(
            "expert",
            format!(
                "expert {} does not divide data x context = {}",
                split.expert,
                split.data * split.context
            ),
        ));
    }
    if !batch.sequence.is_multiple_of(split.context) {
        return Err(PlanError::invalid(
            "context",
            format!("sequence {} is not divisible by context {}", batch.sequence, split.context),
        ));
    }
    if split.zero > 3 {
        return Err(PlanError::invalid(
            "zero",
            format!("stage {} is not 0, 1, 2 or 3", split.zero),
        ));
    }
    let per_pass = u64::from(split.data) * u64::from(split.micro_batch);
    if !u64::from(batch.global).is_multiple_of(per_pass) {
        let up = u64::from(batch.global).div_ceil(per_pass) * per_pass;
        let down = u64::from(batch.global) / per_pass * per_pass;
        let nearest = if down == 0 { up.to_string() } else { format!("{down} or {up}") };
        return Err(PlanError::invalid(
            "global_batch",
            format!(
                "{} is not divisible by data {} x micro_batch {}; nearest that works: {nearest}",
                batch.global, split.data, split.micro_batch
            ),
        ));
    }
    Ok((u64::from(batch.global) / per_pass) as u32)
}
