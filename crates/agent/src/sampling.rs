//! Samples of the machine, its devices and its ranks.

use std::path::Path;
use std::time::Instant;

use drumline_telemetry::proc::{self, Rates};
use drumline_wire::v1;

use crate::devices::Devices;
use crate::gpus::Gpus;
use crate::logs;
use crate::ranks::Gangs;

/// Takes samples; remembers the last ones, so that it can tell rates.
#[derive(Debug, Default)]
pub struct Sampler {
    node: Rates<()>,
    groups: Rates<u32>,
}

impl Sampler {
    /// Reads the machine and every live rank: its whole process group, so that what a program
    /// starts by itself counts for it.
    pub fn sample(
        &mut self,
        devices: &Devices,
        gpus: &Gpus,
        gangs: &Gangs,
        state_dir: &Path,
    ) -> v1::Heartbeat {
        let now = Instant::now();
        let groups = proc::process_groups();
        let mut ranks = Vec::new();
        let mut busy: Vec<(u32, f64, u64)> = Vec::new();
        for ((job, attempt), gang) in gangs.iter() {
            for (rank, state) in gang.ranks.iter().filter(|(_, state)| state.process.is_some()) {
                let Some(seen) = groups.get(&state.pid) else { continue };
                let cores = self.groups.cores(state.pid, seen.cpu_seconds, now);
                busy.push((state.device, cores, seen.rss_bytes));
                let log = logs::path(state_dir, job, *attempt, *rank);
                ranks.push(v1::RankSample {
                    job: job.clone(),
                    attempt: *attempt,
                    rank: *rank,
                    memory_bytes: seen.rss_bytes,
                    cpu_cores: cores,
                    log_bytes: std::fs::metadata(log).map_or(0, |metadata| metadata.len()),
                });
            }
        }
        self.groups.retain(|pid| groups.contains_key(pid));
        let share = f64::from(devices.cores) / devices.list.len().max(1) as f64;
        let sample = |device: &v1::AgentDevice| {
            let own = || busy.iter().filter(|(index, ..)| *index == device.index);
            let cores: f64 = own().map(|(_, cores, _)| cores).sum();
            v1::DeviceSample {
                index: device.index,
                utilization: (cores / share).clamp(0.0, 1.0),
                memory_used_bytes: own().map(|(.., memory)| memory).sum(),
                healthy: device.healthy,
                message: device.message.clone(),
                action: String::new(),
                ends_work: false,
            }
        };
        let cpu_seconds = proc::node_cpu_seconds().unwrap_or(0.0);
        v1::Heartbeat {
            cpu_cores_used: self.node.cores((), cpu_seconds, now),
            memory_used_bytes: proc::node_memory_used().unwrap_or(0),
            devices: devices
                .list
                .iter()
                .map(|device| gpus.device_sample(device.index).unwrap_or_else(|| sample(device)))
                .collect(),
            ranks,
        }
    }
}
