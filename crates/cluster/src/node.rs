//! One machine: its devices, its place in the topology, and whether it may take work.

use std::collections::BTreeMap;
use std::fmt;

use drumline_spec::{DeviceKind, Toleration};
use drumline_types::{Bytes, NodeName};
use serde::{Deserialize, Serialize};

/// Whether a device can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// It works.
    #[default]
    Healthy,
    /// It does not; the text is the evidence, such as `Xid 79`.
    Failed(String),
}

/// One device of a node. Its index is its place in [`Node::devices`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// What it is.
    pub kind: DeviceKind,
    /// The maker's name for it, such as `NVIDIA H100 80GB HBM3`; free text.
    pub model: String,
    /// Its own memory; for a CPU device, its share of the node's.
    pub memory: Bytes,
    /// Whether it can be used.
    pub health: Health,
}

impl Device {
    /// Returns a healthy device.
    pub fn new(kind: DeviceKind, model: impl Into<String>, memory: Bytes) -> Self {
        Self { kind, model: model.into(), memory, health: Health::Healthy }
    }
}

/// One step of a node's place in the topology, such as rack `r7`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Domain {
    /// The level, such as `zone`, `spine` or `rack`.
    pub level: String,
    /// The domain's name within the domain above it.
    pub name: String,
}

/// Keeps work away that does not tolerate it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Taint {
    /// What the taint is about.
    pub key: String,
    /// Its value; may be empty.
    pub value: String,
}

impl Taint {
    /// Returns whether one of `tolerations` endures this taint.
    #[must_use]
    pub fn tolerated(&self, tolerations: &[Toleration]) -> bool {
        tolerations.iter().any(|toleration| {
            toleration.key == self.key
                && toleration.value.as_ref().is_none_or(|value| *value == self.value)
        })
    }
}

impl fmt::Display for Taint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.value.is_empty() {
            f.write_str(&self.key)
        } else {
            write!(f, "{}={}", self.key, self.value)
        }
    }
}

/// Why a node takes no new work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Ineligible {
    /// Its agent is not heard.
    NotReady,
    /// An administrator closed it.
    Cordoned,
    /// It has a taint that the gang does not tolerate.
    Tainted,
}

impl fmt::Display for Ineligible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotReady => "not ready",
            Self::Cordoned => "cordoned",
            Self::Tainted => "tainted",
        })
    }
}

/// What others than this scheduler use of a node, such as the pods of another scheduler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct External {
    /// Processor time, in thousandths of a core.
    pub cpu_milli: u64,
    /// Main memory.
    pub memory: Bytes,
    /// Thousandths of each device, by its index.
    pub devices: BTreeMap<u32, u32>,
}

/// One machine of the fleet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its name.
    pub name: NodeName,
    /// Free labels.
    pub labels: BTreeMap<String, String>,
    /// Whether its agent is heard.
    pub ready: bool,
    /// Whether an administrator closed it to new work.
    pub cordoned: bool,
    /// What keeps work away.
    pub taints: Vec<Taint>,
    /// Its place in the fleet, outermost level first; nodes of one fleet name the same levels in
    /// the same order. Empty: the place is not known.
    pub topology: Vec<Domain>,
    /// Processor time, in thousandths of a core.
    pub cpu_milli: u64,
    /// Main memory.
    pub memory: Bytes,
    /// Its devices, by index.
    pub devices: Vec<Device>,
    /// What others use of it.
    #[serde(default)]
    pub external: External,
}

impl Node {
    /// Returns a ready node with these devices and nothing else known about it.
    #[must_use]
    pub fn new(name: NodeName, devices: Vec<Device>) -> Self {
        Self {
            name,
            labels: BTreeMap::new(),
            ready: true,
            cordoned: false,
            taints: Vec::new(),
            topology: Vec::new(),
            cpu_milli: 0,
            memory: Bytes(0),
            devices,
            external: External::default(),
        }
    }

    /// Adds the next inner level of the node's place.
    #[must_use]
    pub fn within(mut self, level: impl Into<String>, name: impl Into<String>) -> Self {
        self.topology.push(Domain { level: level.into(), name: name.into() });
        self
    }

    /// Returns why the node takes no new work that tolerates nothing, the first cause if there are
    /// several.
    #[must_use]
    pub fn ineligible(&self) -> Option<Ineligible> {
        self.ineligible_for(&[])
    }

    /// Returns why the node takes no new work that tolerates this much, the first cause if there
    /// are several.
    #[must_use]
    pub fn ineligible_for(&self, tolerations: &[Toleration]) -> Option<Ineligible> {
        if !self.ready {
            Some(Ineligible::NotReady)
        } else if self.cordoned {
            Some(Ineligible::Cordoned)
        } else if !self.taints.iter().all(|taint| taint.tolerated(tolerations)) {
            Some(Ineligible::Tainted)
        } else {
            None
        }
    }
}
