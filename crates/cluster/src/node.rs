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
    /// What one device of this node can send to one elsewhere in the domain, in megabytes (10^6
    /// bytes) per second; 0: not known. It names no domain: two nodes that differ in it alone are in
    /// the same one.
    #[serde(default, skip_serializing_if = "is_unknown")]
    pub link_mb_per_s: u32,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_unknown(link_mb_per_s: &u32) -> bool {
    *link_mb_per_s == 0
}

impl Domain {
    /// Returns a domain whose links are not known.
    pub fn new(level: impl Into<String>, name: impl Into<String>) -> Self {
        Self { level: level.into(), name: name.into(), link_mb_per_s: 0 }
    }

    /// Returns it with the speed of its links.
    #[must_use]
    pub fn linked(self, link_mb_per_s: u32) -> Self {
        Self { link_mb_per_s, ..self }
    }
}

/// Splits `TEXT@GB/S`, such as `rack=r7@12.5`, into the text and megabytes per second and device;
/// without an `@`, the speed is not known (0).
///
/// # Errors
/// What is wrong with the speed.
pub fn split_link(text: &str) -> Result<(&str, u32), String> {
    let Some((text, speed)) = text.rsplit_once('@') else { return Ok((text, 0)) };
    let wanted = || {
        format!("@{speed}: a speed in GB/s for each device is wanted, 0.001 to 4000000, such as 50")
    };
    let mb_per_s = speed.parse::<f64>().map_err(|_| wanted())? * 1000.0;
    if (1.0..=4e9).contains(&mb_per_s) {
        Ok((text, mb_per_s.round() as u32))
    } else {
        Err(wanted())
    }
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
        self.topology.push(Domain::new(level, name));
        self
    }

    /// Says how fast the links of the level are that was added last, in megabytes per second and
    /// device.
    #[must_use]
    pub fn linked(mut self, link_mb_per_s: u32) -> Self {
        if let Some(domain) = self.topology.last_mut() {
            domain.link_mb_per_s = link_mb_per_s;
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_is_split_from_what_it_is_the_speed_of() {
        for (text, found) in [
            ("rack=r7", Some(("rack=r7", 0))),
            ("rack=r7@12.5", Some(("rack=r7", 12_500))),
            ("rack=a@b@900", Some(("rack=a@b", 900_000))),
            ("rack=r7@", None),
            ("rack=r7@fast", None),
            ("rack=r7@0", None),
            ("rack=r7@-1", None),
            ("rack=r7@NaN", None),
            ("rack=r7@1e9", None),
        ] {
            assert_eq!(split_link(text).ok(), found, "{text}");
        }
    }

    #[test]
    fn a_place_that_was_written_without_links_is_read() {
        let old: Domain = serde_json::from_str(r#"{"level":"rack","name":"r7"}"#).unwrap();
        assert_eq!(old, Domain::new("rack", "r7"));
        assert_eq!(serde_json::to_string(&old).unwrap(), r#"{"level":"rack","name":"r7"}"#);
        let new = old.linked(50_000);
        let json = serde_json::to_string(&new).unwrap();
        assert_eq!(serde_json::from_str::<Domain>(&json).unwrap(), new);
    }
}
