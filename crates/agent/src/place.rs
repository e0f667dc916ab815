//! A node's place in the fleet, as its options say it.

/// One step of a node's place in the fleet, such as rack `r7`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The level.
    pub level: String,
    /// The domain's name.
    pub name: String,
    /// What a device of the node can send to one elsewhere in the domain, in megabytes per second;
    /// 0: not known.
    pub link_mb_per_s: u32,
}
