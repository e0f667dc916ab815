//! Any program, started as a gang with the environment that `torchrun` users expect.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A gang of any program, checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandJob {
    /// The program and its arguments; never handed to a shell.
    pub argv: Vec<String>,
    /// Further environment. The rendezvous variables cannot be overridden.
    pub env: BTreeMap<String, String>,
    /// Working directory; empty: a folder of the job's own.
    pub workdir: String,
    /// Number of ranks.
    pub ranks: u32,
}
