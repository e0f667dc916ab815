//! Command-line arguments of simulations, for a program to flatten into its own, and what they
//! ask for.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::fault::FileFault;
use crate::policy::{POLICIES, Policy};
use crate::scenario::Scenario;
use crate::trace::{TraceOptions, openb};
use crate::workload::{PRESETS, Preset, Workload};

/// Arguments of `sim run`.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// A workload that comes with the program; `sim presets` lists them.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["workload", "pods"])]
    pub preset: Option<String>,
    /// A workload file; `sim presets NAME` prints one to begin with.
    #[arg(long, value_name = "FILE", conflicts_with = "pods")]
    pub workload: Option<PathBuf>,
    /// The openb node list, as CSV.
    #[arg(long, value_name = "FILE", requires = "pods")]
    pub nodes: Option<PathBuf>,
    /// The openb pod list with its times, as CSV.
    #[arg(long, value_name = "FILE", requires = "nodes")]
    pub pods: Option<PathBuf>,
    /// Arrivals of a trace come so many times as fast.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, requires = "pods")]
    pub speed: f64,
    /// Policies, with commas between them: names (`sim presets` lists them), or TOML files with
    /// the scheduler's options.
    #[arg(
        long,
        value_name = "POLICIES",
        visible_alias = "policy",
        value_delimiter = ',',
        default_value = "drumline"
    )]
    pub compare: Vec<String>,
    /// Decides what is drawn: arrivals, sizes, durations, failures.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Write the report as a web page with plots.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Write the report as CSV files into this folder.
    #[arg(long, value_name = "DIR")]
    pub csv: Option<PathBuf>,
    /// Record what `sim replay` needs into this folder: snapshot.json, changes.jsonl and
    /// decisions.jsonl. For one policy.
    #[arg(long, value_name = "DIR")]
    pub record: Option<PathBuf>,
    /// Record from this hour of the simulation on.
    #[arg(long, value_name = "HOURS", default_value_t = 0.0, requires = "record")]
    pub record_from: f64,
}

/// Arguments of `sim replay`.
#[derive(Debug, Clone, Args)]
pub struct ReplayArgs {
    /// The snapshot: JSON as `drumline snapshot` writes it, or that packed with gzip.
    #[arg(value_name = "FILE")]
    pub snapshot: PathBuf,
    /// What happened after it, one JSON object a line: {"at":MS,"change":...} or
    /// {"at":MS,"cycle":true}. Without it the scheduler looks once.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Decisions that it must come to, one JSON object a line, as `--output json` prints them.
    #[arg(long, value_name = "FILE")]
    pub expect: Option<PathBuf>,
    /// Look at this moment, in milliseconds since the epoch, instead of the snapshot's own.
    #[arg(long, value_name = "MS", conflicts_with = "log")]
    pub at: Option<u64>,
}

/// Arguments of `sim presets`.
#[derive(Debug, Clone, Args)]
pub struct PresetsArgs {
    /// Print this preset's workload file.
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
}

/// Why arguments cannot be followed. All are the user's to mend.
#[derive(Debug, thiserror::Error)]
pub enum ArgsError {
    /// A file cannot be read.
    #[error("cannot read {file}: {why}")]
    Unreadable {
        /// The file.
        file: String,
        /// Why.
        why: std::io::Error,
    },
    /// A file is not what it should be.
    #[error(transparent)]
    File(#[from] FileFault),
    /// A name is not known.
    #[error("no {what} is named {name:?}; there are {known}")]
    Unknown {
        /// What was looked for.
        what: &'static str,
        /// Its name.
        name: String,
        /// The names that there are.
        known: String,
    },
    /// An argument is out of bounds, or does not go with another.
    #[error("{0}")]
    Wrong(String),
}

impl RunArgs {
    /// Returns the scenario that is asked for: `small` when nothing is.
    ///
    /// # Errors
    /// [`ArgsError`].
    pub fn scenario(&self) -> Result<Scenario, ArgsError> {
        if let (Some(nodes), Some(pods)) = (&self.nodes, &self.pods) {
            if !(self.speed > 0.0 && self.speed <= 1e6) {
                let what = format!("speed {} must be above 0 and at most 1000000", self.speed);
                return Err(ArgsError::Wrong(what));
            }
            let options = TraceOptions {
                speed: self.speed,
                start_ms: 10_000,
                cycle_ms: 1000,
                seed: self.seed,
            };
            let stem = pods.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            let name = stem.unwrap_or_else(|| "openb".to_owned());
            let (node_file, pod_file) = (shown(nodes), shown(pods));
            let (nodes, pods) = (read(nodes)?, read(pods)?);
            return Ok(openb(&name, (&node_file, &nodes), (&pod_file, &pods), &options)?);
        }
        let workload = match &self.workload {
            Some(file) => Workload::read(&shown(file), &read(file)?)?,
            None => {
                let preset = preset(self.preset.as_deref().unwrap_or("small"))?;
                Workload::read(preset.name, preset.text)?
            }
        };
        Ok(Scenario::of(&workload, self.seed))
    }

    /// Returns the policies that are asked for.
    ///
    /// # Errors
    /// [`ArgsError`].
    pub fn policies(&self) -> Result<Vec<Policy>, ArgsError> {
        let mut policies: Vec<Policy> = Vec::new();
        for name in self.compare.iter().map(|name| name.trim()) {
            let found = match Policy::named(name, self.seed) {
                Some(policy) => policy,
                None if name.ends_with(".toml") || name.contains('/') => {
                    let file = Path::new(name);
                    Policy::read(&shown(file), &read(file)?)?
                }
                None => {
                    let known: Vec<&str> = POLICIES.iter().map(|(name, _)| *name).collect();
                    let known = format!("{}, and TOML files", known.join(", "));
                    return Err(ArgsError::Unknown { what: "policy", name: name.into(), known });
                }
            };
            if policies.iter().any(|known| known.name == found.name) {
                return Err(ArgsError::Wrong(format!("policy {} is there twice", found.name)));
            }
            policies.push(found);
        }
        if self.record.is_some() && policies.len() != 1 {
            return Err(ArgsError::Wrong("--record is for one policy".to_owned()));
        }
        Ok(policies)
    }
}

/// Returns the preset of this name.
///
/// # Errors
/// [`ArgsError::Unknown`] with the names that there are.
pub fn preset(name: &str) -> Result<&'static Preset, ArgsError> {
    Preset::named(name).ok_or_else(|| {
        let known: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
        ArgsError::Unknown { what: "preset", name: name.to_owned(), known: known.join(", ") }
    })
}

fn shown(file: &Path) -> String {
    file.display().to_string()
}

fn read(file: &Path) -> Result<String, ArgsError> {
    std::fs::read_to_string(file).map_err(|why| ArgsError::Unreadable { file: shown(file), why })
}
