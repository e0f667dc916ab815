//! How a place is chosen among those that fit, and what bounds the choice.

use drumline_cluster::DomainAt;
use serde::{Deserialize, Serialize};

use crate::plan::Seed;

/// How a place is chosen among those that fit. The rules of the gang hold under each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub enum Scoring {
    /// Smallest domain, fewest nodes, least fragmentation.
    #[default]
    Drumline,
    /// Any node that fits, drawn with the seed.
    Random,
    /// The first node, by name.
    FirstFit,
    /// The node with the least left over.
    BestFit,
    /// The node where what is left and what is asked for have the least product.
    DotProduct,
    /// Devices in use first, then free ones of a node in use, then idle nodes.
    GpuPacking,
    /// The node whose fragmentation grows least, as seen by gangs like those that run.
    FragmentationGradient,
}

impl Scoring {
    /// Returns whether it is one of the published rules that cost each node.
    pub(crate) fn costs_nodes(self) -> bool {
        matches!(self, Self::DotProduct | Self::GpuPacking | Self::FragmentationGradient)
    }
}

/// What bounds the choice for one gang.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Constraints {
    /// How to choose.
    pub scoring: Scoring,
    /// Decides among equals.
    pub seed: Seed,
    /// The greatest size of an elastic gang, in ranks; `None`: its own.
    pub most: Option<u32>,
    /// Only nodes in this domain; `None`: the fleet.
    pub within: Option<DomainAt>,
}
