//! Command-line arguments of the experiment, for a program to flatten into its own.

use std::path::PathBuf;

use clap::Args;

use crate::openb::policy::PolicyName;
use crate::openb::run::Options;
use crate::openb::workload::Seeds;

/// Arguments of `sim openb`.
#[derive(Debug, Clone, Args)]
pub struct OpenbArgs {
    /// Node list, as CSV.
    #[arg(long, value_name = "FILE")]
    pub nodes: PathBuf,
    /// Pod list, as CSV; its name without `pods_` and `.csv` is the workload's name.
    #[arg(long, value_name = "FILE")]
    pub pods: PathBuf,
    /// Policy, several with commas between them, or `all`.
    #[arg(long, value_name = "NAME", default_value = "all")]
    pub policy: String,
    /// GPU demand that arrives, over the capacity.
    #[arg(long, default_value_t = 1.3)]
    pub ratio: f64,
    /// Seeds, both ends included.
    #[arg(long, default_value = "42..51")]
    pub seeds: Seeds,
    /// File that keeps what the policy `drumline` learns for this workload: used if it is there,
    /// else written.
    #[arg(long, value_name = "FILE")]
    pub values: Option<PathBuf>,
    /// Threads; 0 for one per core.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
}

impl OpenbArgs {
    /// Returns the options that these arguments ask for.
    ///
    /// # Errors
    /// A sentence for the user when a policy is not known or the ratio is not above 0.
    pub fn options(&self) -> Result<Options, String> {
        if !(self.ratio > 0.0 && self.ratio <= 100.0) {
            return Err(format!("ratio {} must be above 0 and at most 100", self.ratio));
        }
        let file = |path: &PathBuf| path.display().to_string();
        let stem = self.pods.file_stem().map(|s| s.to_string_lossy().into_owned());
        let stem = stem.unwrap_or_else(|| "openb".to_owned());
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Options {
            workload: stem.strip_prefix("pods_").unwrap_or(&stem).to_owned(),
            files: (file(&self.nodes), file(&self.pods)),
            policies: PolicyName::list(&self.policy).map_err(|e| e.to_string())?,
            ratio: self.ratio,
            seeds: self.seeds,
            threads: if self.threads == 0 { cores() } else { self.threads },
        })
    }
}
