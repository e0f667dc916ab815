//! `parallelism: auto`: which devices the planner may count on, and its choice.

use drumline_planner::auto::{Supply, resolve};
use drumline_spec::{DeviceKind, JobSpec};

use crate::api::ApiError;
use crate::core::{Core, RANKS_MAX};

impl Core {
    /// Chooses the split of every job that leaves it open: for the devices that are free now, or,
    /// where no split fits those, for all healthy ones of nodes that take work; the job then waits
    /// for them. Jobs of one submission are not set against each other.
    ///
    /// # Errors
    /// [`ApiError::Invalid`] with what is short and the nearest that works, by job.
    pub(crate) fn choose_splits(&self, specs: Vec<JobSpec>) -> Result<Vec<JobSpec>, ApiError> {
        specs.into_iter().map(|spec| self.choose_split(spec)).collect()
    }

    fn choose_split(&self, spec: JobSpec) -> Result<JobSpec, ApiError> {
        if !spec.split.is_open() {
            return Ok(spec);
        }
        let free = self.supply(spec.device, true);
        if let Ok(chosen) = resolve(&spec, &free, RANKS_MAX) {
            return Ok(chosen);
        }
        resolve(&spec, &self.supply(spec.device, false), RANKS_MAX)
            .map_err(|error| ApiError::Invalid(format!("{}: {error}", spec.name)))
    }

    /// Counts the healthy devices of nodes that take work.
    fn supply(&self, kind: DeviceKind, free: bool) -> Supply {
        let mut supply = Supply {
            what: if free { "free now" } else { "healthy, some of them held" },
            ..Supply::default()
        };
        let mut at_once = u32::MAX;
        for state in self.desk.fleet().nodes() {
            let node = state.node();
            let devices: Vec<u32> =
                if free { state.free(kind).collect() } else { state.usable(kind).collect() };
            if devices.is_empty() || node.ineligible().is_some() {
                continue;
            }
            supply.per_node.push(devices.len() as u32);
            // CPU devices may be more than the cores that they are shares of: then each can run at
            // a whole core's rate, but only so many at one time.
            let all = node.devices.iter().filter(|device| device.kind == kind).count() as u32;
            let cores = self.fleet.cores(&node.name);
            let shared = kind == DeviceKind::Cpu && cores > 0 && all > cores;
            if shared {
                at_once = at_once.min((cores * devices.len() as u32).div_ceil(all));
            }
            let whole = if shared { f64::from(all) / f64::from(cores) } else { 1.0 };
            for index in devices {
                let Some(device) = node.devices.get(index as usize) else { continue };
                // The smallest and the slowest sets the pace of a gang.
                let memory = device.memory.0 as f64;
                if supply.memory_bytes == 0.0 || memory < supply.memory_bytes {
                    supply.memory_bytes = memory;
                    supply.model.clone_from(&device.model);
                }
                let rate = whole * self.fleet.peak_flops(&node.name, index);
                if rate > 0.0 && (supply.matmul_flops == 0.0 || rate < supply.matmul_flops) {
                    supply.matmul_flops = rate;
                }
            }
        }
        supply.at_once = if at_once == u32::MAX { 0 } else { at_once };
        supply
    }
}
