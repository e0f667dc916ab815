//! The policies: each gives a node and a pod a score, and the greatest score takes the pod.

pub mod baseline;
pub mod drumline;
pub mod fill;
pub mod frag;
pub mod learn;
pub mod placer;
pub mod rest;
pub mod worth;

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::openb::fleet::Node;
use crate::openb::input::Shape;

/// What a policy thinks of one node for one pod that fits there.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Greater is better; of equals the first node wins.
    pub value: f32,
    /// The device for a share of one GPU; 0 otherwise.
    pub device: u8,
}

/// Scores a node for a pod. The score depends on nothing but its arguments, so that it can be
/// kept until the node changes.
pub trait Scorer {
    /// Returns the score of a node that a pod of this shape fits on.
    fn score(&mut self, node: &Node, shape: &Shape) -> Score;
}

/// Every policy of the experiment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PolicyName {
    /// Any node that fits, with the same chance.
    Random,
    /// The least product of what the pod asks for and what the node has left.
    DotProd,
    /// Nodes with pods of the same size first.
    GpuClustering,
    /// GPUs in use first, then nodes in use, then empty nodes.
    GpuPacking,
    /// The node with the least left over, processor time and GPUs weighed alike.
    BestFit,
    /// Fragmentation gradient descent: the least growth of what typical pods cannot use.
    Fgd,
    /// The least loss of what the node is finally worth.
    Drumline,
}

impl PolicyName {
    /// Every policy, in the order of reports.
    pub const ALL: [Self; 7] = [
        Self::Random,
        Self::DotProd,
        Self::GpuClustering,
        Self::GpuPacking,
        Self::BestFit,
        Self::Fgd,
        Self::Drumline,
    ];

    /// Returns the name used on the command line and in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::DotProd => "dotprod",
            Self::GpuClustering => "gpuclustering",
            Self::GpuPacking => "gpupacking",
            Self::BestFit => "bestfit",
            Self::Fgd => "fgd",
            Self::Drumline => "drumline",
        }
    }

    /// Reads a list such as `fgd,drumline`, or `all`.
    ///
    /// # Errors
    /// [`UnknownPolicy`] for the first name that is not known.
    pub fn list(text: &str) -> Result<Vec<Self>, UnknownPolicy> {
        if text.trim() == "all" {
            return Ok(Self::ALL.to_vec());
        }
        text.split(',').map(str::parse).collect()
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Serialize for PolicyName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// A policy that is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no policy {0:?}; there are random, dotprod, gpuclustering, gpupacking, bestfit, fgd, drumline, and all"
)]
pub struct UnknownPolicy(pub String);

impl FromStr for PolicyName {
    type Err = UnknownPolicy;
    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        let wanted: String =
            name.chars().filter(|c| c.is_ascii_alphanumeric()).collect::<String>().to_lowercase();
        Self::ALL
            .into_iter()
            .find(|policy| policy.as_str() == wanted)
            .ok_or_else(|| UnknownPolicy(name.to_owned()))
    }
}
