//! What a rank knows when it starts: its environment, checked.

use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use drumline_collective::host::STREAMS_MAX;
use drumline_spec::JobSpec;
use drumline_wire::auth::Token;
use drumline_wire::contract;
use drumline_wire::line::Credential;

/// Longest time without progress in a collective. The first step of a large model is slow, and a
/// peer may be writing a checkpoint: the control plane's watchdog is the stricter one.
const COLLECTIVE_DEADLINE: Duration = Duration::from_secs(120);

/// Why a rank cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// A variable is missing or wrong.
    #[error(
        "environment variable {name}: {problem} (ranks are started by `drumline agent` or `drumline operator`)"
    )]
    Variable {
        /// The variable.
        name: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The spec cannot be read.
    #[error("{path}: {problem}")]
    Spec {
        /// The spec's file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// A rank's place and means.
#[derive(Debug, Clone)]
pub struct Context {
    /// `http://HOST:PORT` of the agent's `RankHost`, or `https://` of the operator's.
    pub agent: String,
    /// The certificate to trust there, in PEM.
    pub agent_ca: Option<String>,
    /// What is shown there: the attempt's secret, or a token that says who the rank is.
    pub credential: Credential,
    /// The job's id.
    pub job: String,
    /// The attempt.
    pub attempt: u32,
    /// This rank.
    pub rank: u32,
    /// The number of ranks.
    pub world_size: u32,
    /// Threads that this rank may use.
    pub threads: usize,
    /// Folder of the job that all nodes share.
    pub job_dir: PathBuf,
    /// Folder that all nodes share: relative paths in the spec start here.
    pub shared_dir: PathBuf,
    /// Names the host.
    pub host: String,
    /// Where to listen for peers.
    pub listen_ip: IpAddr,
    /// TCP connections to each rank on another host; none: the default.
    pub tcp_streams: Option<usize>,
    /// Longest time without progress in a collective.
    pub collective_deadline: Duration,
    /// The job.
    pub spec: JobSpec,
}

impl Context {
    /// Reads the environment that the agent gave.
    ///
    /// # Errors
    /// [`ContextError`], which names the variable or the file.
    pub fn from_environment() -> Result<Self, ContextError> {
        let spec = match given(contract::SPEC_JSON) {
            Some(json) => serde_json::from_str(&json).map_err(|error| ContextError::Variable {
                name: contract::SPEC_JSON,
                problem: error.to_string(),
            })?,
            None => {
                let path = PathBuf::from(text(contract::SPEC)?);
                std::fs::read_to_string(&path)
                    .map_err(|error| error.to_string())
                    .and_then(|json| serde_json::from_str(&json).map_err(|error| error.to_string()))
                    .map_err(|problem| ContextError::Spec { path, problem })?
            }
        };
        let credential = match given(contract::TOKEN_FILE) {
            Some(path) => Credential::File(path.into()),
            None => {
                let secret = Token::new(&text(contract::SECRET)?);
                Credential::Fixed(secret.map_err(|error| ContextError::Variable {
                    name: contract::SECRET,
                    problem: error.to_string(),
                })?)
            }
        };
        Ok(Self {
            agent: text(contract::AGENT)?,
            agent_ca: given(contract::AGENT_CA),
            credential,
            job: text(contract::JOB)?,
            attempt: parse(contract::ATTEMPT)?,
            rank: parse(contract::RANK)?,
            world_size: parse(contract::WORLD_SIZE)?,
            threads: parse::<usize>(contract::THREADS)?.max(1),
            job_dir: text(contract::JOB_DIR)?.into(),
            shared_dir: text(contract::SHARED_DIR)?.into(),
            host: text(contract::HOST)?,
            listen_ip: parse(contract::LISTEN_IP)?,
            tcp_streams: match std::env::var_os(contract::TCP_STREAMS) {
                None => None,
                Some(_) => Some(streams()?),
            },
            collective_deadline: match std::env::var_os(contract::COLLECTIVE_DEADLINE_MS) {
                None => COLLECTIVE_DEADLINE,
                Some(_) => {
                    Duration::from_millis(parse::<u64>(contract::COLLECTIVE_DEADLINE_MS)?.max(1))
                }
            },
            spec,
        })
    }
}

impl Context {
    /// Returns where a path of the spec leads.
    #[must_use]
    pub fn resolve(&self, path: &str) -> PathBuf {
        self.shared_dir.join(path)
    }
}

fn given(name: &'static str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn streams() -> Result<usize, ContextError> {
    let streams = parse(contract::TCP_STREAMS)?;
    if (1..=STREAMS_MAX).contains(&streams) {
        return Ok(streams);
    }
    Err(ContextError::Variable {
        name: contract::TCP_STREAMS,
        problem: format!("{streams} is not from 1 to {STREAMS_MAX}"),
    })
}

fn text(name: &'static str) -> Result<String, ContextError> {
    std::env::var(name).map_err(|error| ContextError::Variable { name, problem: error.to_string() })
}

fn parse<T: FromStr>(name: &'static str) -> Result<T, ContextError> {
    let value = text(name)?;
    value
        .parse()
        .map_err(|_| ContextError::Variable { name, problem: format!("{value:?} is not valid") })
}
