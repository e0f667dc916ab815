//! The environment of a rank: the contract that `torchrun` users expect, and Drumline's own.

use std::collections::BTreeMap;
use std::path::Path;

use drumline_spec::{JobSpec, Work};
use drumline_wire::{contract, v1};

use crate::devices::Devices;

/// What is the same for every rank of one launch.
#[derive(Debug, Clone)]
pub struct LaunchContext<'a> {
    /// The launch.
    pub launch: &'a v1::LaunchGang,
    /// The job's spec.
    pub spec: &'a JobSpec,
    /// Where the spec was written.
    pub spec_file: &'a Path,
    /// Folder of the job that all nodes share.
    pub job_dir: &'a Path,
    /// Folder that all nodes share.
    pub shared_dir: &'a Path,
    /// `http://HOST:PORT` of the agent's `RankHost`.
    pub agent_url: &'a str,
    /// Names this host.
    pub host: &'a str,
    /// IP address on which ranks listen.
    pub listen_ip: &'a str,
    /// What the ranks' devices share.
    pub devices: &'a Devices,
}

/// Returns the variables of one rank, user's first, so that ours cannot be overridden.
#[must_use]
pub fn variables(context: &LaunchContext<'_>, rank: &v1::LaunchRank) -> BTreeMap<String, String> {
    let launch = context.launch;
    let mut all = BTreeMap::new();
    if let Work::CommandJob(command) = &context.spec.work {
        all.extend(command.env.clone());
    }
    let local_world_size = launch.ranks.len();
    let mut set = |name: &str, value: String| {
        all.insert(name.to_owned(), value);
    };
    set("RANK", rank.rank.to_string());
    set("WORLD_SIZE", launch.world_size.to_string());
    set("LOCAL_RANK", rank.local_rank.to_string());
    set("LOCAL_WORLD_SIZE", local_world_size.to_string());
    set("GROUP_RANK", launch.group_rank.to_string());
    set("GROUP_WORLD_SIZE", launch.group_count.to_string());
    set("MASTER_ADDR", launch.master_addr.clone());
    set("MASTER_PORT", launch.master_port.to_string());
    set("TORCHELASTIC_RESTART_COUNT", launch.attempt.saturating_sub(1).to_string());
    set("TORCHELASTIC_RUN_ID", launch.job.clone());
    set(contract::AGENT, context.agent_url.to_owned());
    set(contract::SECRET, launch.secret.clone());
    set(contract::JOB, launch.job.clone());
    set(contract::ATTEMPT, launch.attempt.to_string());
    set(contract::SPEC, context.spec_file.display().to_string());
    set(contract::JOB_DIR, context.job_dir.display().to_string());
    set(contract::SHARED_DIR, context.shared_dir.display().to_string());
    set(contract::THREADS, rank.threads.max(1).to_string());
    if let Some(cores) = context.devices.share(rank.device) {
        set(contract::CORES, cores);
    }
    set(contract::DEVICE, rank.device.to_string());
    set(contract::HOST, context.host.to_owned());
    set(contract::LISTEN_IP, context.listen_ip.to_owned());
    all
}
