//! Typed ids: a job, a node, a device, a rank and an attempt can never be mixed up.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "name {name:?} must be 1 to {max} characters of a-z, 0-9 and '-', starting and ending with a letter or digit"
)]
pub struct NameError {
    /// The name as given.
    pub name: String,
    /// The greatest length allowed, in characters.
    pub max: usize,
}

/// The longest name, in characters: a DNS label, so that the same name works on Kubernetes.
pub const NAME_MAX: usize = 63;

/// Checks that `name` is a DNS label.
///
/// # Errors
/// [`NameError`] when it is empty, too long or has other characters.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let edge = |c: Option<char>| c.is_some_and(|c| c != '-');
    if name.len() <= NAME_MAX
        && name.chars().all(legal)
        && edge(name.chars().next())
        && edge(name.chars().last())
    {
        Ok(())
    } else {
        Err(NameError { name: name.to_owned(), max: NAME_MAX })
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Returns the name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(name: &str) -> Result<Self, NameError> {
                check_name(name)?;
                Ok(Self(name.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(name: String) -> Result<Self, NameError> {
                check_name(&name)?;
                Ok(Self(name))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type! {
    /// Names one submitted job, service or command: the manifest's name and a short suffix.
    JobId
}
name_type! {
    /// Names one machine of the fleet.
    NodeName
}
name_type! {
    /// Names one queue.
    QueueName
}

impl QueueName {
    /// Returns the queue of jobs that name none.
    #[must_use]
    pub fn default_queue() -> Self {
        Self("default".to_owned())
    }
}

/// One device of one node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceId {
    /// The machine that holds the device.
    pub node: NodeName,
    /// The device's place on its node, from 0.
    pub index: u32,
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.node, self.index)
    }
}

/// A rank's place in its world, from 0.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
#[serde(transparent)]
pub struct RankIndex(pub u32);

impl fmt::Display for RankIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Counts the starts of a gang, from 1. Agents refuse an attempt older than one they have seen.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
#[serde(transparent)]
pub struct Attempt(pub u32);

impl Attempt {
    /// Returns the attempt after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_dns_label() {
        for good in ["a", "train-7b", "0-x"] {
            assert!(JobId::from_str(good).is_ok(), "{good}");
        }
        let long = "a".repeat(64);
        for bad in ["", "-a", "a-", "A", "a_b", "a/b", "ä", long.as_str()] {
            assert!(JobId::from_str(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_stored_name_is_checked_when_it_is_read() {
        assert!(serde_json::from_str::<NodeName>("\"node-0\"").is_ok());
        assert!(serde_json::from_str::<NodeName>("\"../etc\"").is_err());
    }
}
