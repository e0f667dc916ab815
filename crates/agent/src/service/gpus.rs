//! What the dispatcher does about GPUs: it takes in what happened to them, and tells.

use std::time::Instant;

use drumline_telemetry::gpu::NvmlProblem;
use drumline_wire::v1;

use super::{Agent, AgentError, Options};
use crate::gpus::{Gpus, Judged};
use crate::health::{self, Action, Verdict};
use crate::process::Ask;

/// Looks for GPUs on a thread of its own: the driver may take its time.
pub(super) async fn find(options: &Options) -> Result<Gpus, AgentError> {
    let (policy, library) = (options.gpus, options.nvml.clone());
    let (first, state_dir) = (options.cpu_devices, options.state_dir.clone());
    let find = move || Gpus::find(policy, library, first, &state_dir);
    match tokio::task::spawn_blocking(find).await {
        Ok(found) => found.map_err(|problem| AgentError::Gpus { problem }),
        Err(error) => Err(AgentError::Gpus { problem: NvmlProblem::Refused(error.to_string()) }),
    }
}

impl Agent {
    /// The node's place: what its options say, then what the machine itself shows.
    pub(super) fn topology(&self) -> Vec<v1::TopologyStep> {
        let mut steps = self.options.topology.clone();
        if self.gpus.is_one_nvlink_domain() && steps.iter().all(|step| step.level != "nvlink") {
            let name = self.options.node.to_string();
            steps.push(v1::TopologyStep { level: "nvlink".to_owned(), name, link_mb_per_s: 0 });
        }
        steps
    }

    /// Takes in what happened to the GPUs. What a broken device means for gangs is the control
    /// plane's business; only an application that the driver has ended already is ended here, since
    /// all that it could do is hang.
    pub(super) fn look_at_gpus(&mut self) {
        let (happened, judged) = self.gpus.look(Instant::now());
        self.metrics.gpus.happened(&self.gpus, &happened);
        for event in &happened {
            let meaning = health::xid::meaning(event.code);
            tracing::warn!(devices = ?event.devices, xid = event.code, what = meaning.what, "GPU");
            if meaning.action == Action::RestartApplication {
                let why = format!("Xid {}: {}", event.code, meaning.what);
                self.end_applications(&event.devices, &why);
            }
        }
        for Judged { device, verdict } in judged {
            let Verdict { action, reason } = &verdict;
            tracing::warn!(device, %action, reason, "GPU judged");
            if let Some(known) = self.devices.list.iter_mut().find(|d| d.index == device) {
                known.healthy = action.is_usable();
                known.message.clone_from(reason);
            }
        }
    }

    fn end_applications(&mut self, devices: &[u32], why: &str) {
        for rank in self.gangs.iter_mut().flat_map(|(_, gang)| gang.ranks.values_mut()) {
            if let Some(process) = &rank.process
                && devices.contains(&rank.device)
            {
                why.clone_into(&mut rank.message);
                process.ask(Ask::Kill);
            }
        }
    }

    pub(super) fn clear_device(&mut self, index: u32) {
        let known = self.gpus.clear(index);
        tracing::info!(device = index, known, "device cleared");
        // Told at once: somebody waits to see it.
        self.beat();
    }
}
