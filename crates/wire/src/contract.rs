//! The environment that a rank is given beyond what `torchrun` users expect.

/// Address of the agent's `RankHost` service, `http://HOST:PORT`.
pub const AGENT: &str = "DRUMLINE_AGENT";
/// Certificate of whoever serves `RankHost`, in PEM; absent on loopback.
pub const AGENT_CA: &str = "DRUMLINE_AGENT_CA";
/// The attempt's secret.
pub const SECRET: &str = "DRUMLINE_SECRET";
/// The job's id.
pub const JOB: &str = "DRUMLINE_JOB";
/// The attempt's number.
pub const ATTEMPT: &str = "DRUMLINE_ATTEMPT";
/// Instead of the secret: a file with a token that says who the rank is. Its world tells it the
/// secret then.
pub const TOKEN_FILE: &str = "DRUMLINE_TOKEN_FILE";
/// File with the job's spec as JSON.
pub const SPEC: &str = "DRUMLINE_SPEC";
/// Instead of the file: the spec itself.
pub const SPEC_JSON: &str = "DRUMLINE_SPEC_JSON";
/// Folder of the job that all nodes share; checkpoints go here unless the spec says otherwise.
pub const JOB_DIR: &str = "DRUMLINE_JOB_DIR";
/// Threads that the rank may use.
pub const THREADS: &str = "DRUMLINE_THREADS";
/// TCP connections between two ranks on different hosts, 1 to 16, the same for all agents of a
/// cluster: set for an agent, it holds for its ranks. Absent: 4.
pub const TCP_STREAMS: &str = "DRUMLINE_TCP_STREAMS";
/// Cores that are this rank's alone, such as `0-3,8`; absent where ranks share cores.
pub const CORES: &str = "DRUMLINE_CORES";
/// Index of the rank's device on its node.
pub const DEVICE: &str = "DRUMLINE_DEVICE";
/// Which of the GPUs in `CUDA_VISIBLE_DEVICES` is the rank's own, from 0; absent for CPU devices.
pub const GPU_ORDINAL: &str = "DRUMLINE_GPU_ORDINAL";
/// Longest time without progress in a collective between ranks, in milliseconds; the default is two
/// minutes. Set where the agent is started.
pub const COLLECTIVE_DEADLINE_MS: &str = "DRUMLINE_COLLECTIVE_DEADLINE_MS";
/// Names the host, so that ranks on one host find each other's shared memory.
pub const HOST: &str = "DRUMLINE_HOST";
/// IP address on which the rank listens for its peers.
pub const LISTEN_IP: &str = "DRUMLINE_LISTEN_IP";
/// The rank's place in its world, from 0; `torchrun`'s name.
pub const RANK: &str = "RANK";
/// The number of ranks; `torchrun`'s name.
pub const WORLD_SIZE: &str = "WORLD_SIZE";
/// Folder that all nodes share. Relative paths in manifests start here.
pub const SHARED_DIR: &str = "DRUMLINE_SHARED_DIR";
