//! The environment of a rank: the contract that `torchrun` users expect, and Drumline's own.

use std::collections::BTreeMap;
use std::path::Path;

use drumline_spec::{JobSpec, Work};
use drumline_wire::{contract, v1};

use crate::devices::Devices;
use crate::gpus::Gpus;

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
    /// The node's GPUs.
    pub gpus: &'a Gpus,
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
    if let Some(seen) = visible(context, rank) {
        set("CUDA_VISIBLE_DEVICES", seen.names.join(","));
        if let Some(ordinal) = seen.ordinal {
            set(contract::GPU_ORDINAL, ordinal.to_string());
        }
    }
    set(contract::HOST, context.host.to_owned());
    set(contract::LISTEN_IP, context.listen_ip.to_owned());
    all
}

/// The GPUs that a rank may see.
#[derive(Debug, PartialEq, Eq)]
struct Visible<'a> {
    names: Vec<&'a str>,
    /// Which of them is the rank's own.
    ordinal: Option<usize>,
}

/// Returns the GPUs that a rank may see; `None` on a node without any, whose environment is left
/// alone.
///
/// A rank sees the gang's GPUs on its node in the order of local ranks, so that `LOCAL_RANK` is the
/// number that programs expect. Where ranks share a GPU each sees its own alone: CUDA refuses a list
/// that names one twice. A rank on a CPU device sees none.
fn visible<'a>(context: &LaunchContext<'a>, rank: &v1::LaunchRank) -> Option<Visible<'a>> {
    if context.gpus.list().is_empty() {
        return None;
    }
    let Some(own) = context.gpus.uuid(rank.device) else {
        return Some(Visible { names: Vec::new(), ordinal: None });
    };
    let ranks = &context.launch.ranks;
    let all: Vec<&str> = ranks.iter().filter_map(|peer| context.gpus.uuid(peer.device)).collect();
    let distinct: std::collections::BTreeSet<&str> = all.iter().copied().collect();
    let names = if distinct.len() == ranks.len() { all } else { vec![own] };
    let ordinal = names.iter().position(|name| *name == own);
    Some(Visible { names, ordinal })
}
