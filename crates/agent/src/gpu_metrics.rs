//! The metrics of a node's GPUs, with `gpu_uuid` as the label that joins them.

use std::collections::BTreeMap;
use std::time::Instant;

use drumline_telemetry::gpu::Sample;
use drumline_telemetry::gpu::sample::THROTTLES;
use drumline_telemetry::{proc, table};
use prometheus::{CounterVec, GaugeVec, IntCounterVec, IntGaugeVec, Registry};

use crate::gpus::{Gpus, Happened};
use crate::health::Action;
use crate::ranks::Gangs;

/// Metrics of one node's GPUs. Cloning shares them.
#[derive(Debug, Clone)]
pub struct GpuMetrics {
    utilization: GaugeVec,
    memory_busy: GaugeVec,
    memory_used: GaugeVec,
    memory_total: GaugeVec,
    power: GaugeVec,
    power_limit: GaugeVec,
    energy: CounterVec,
    temperature: GaugeVec,
    clock: GaugeVec,
    throttled: IntGaugeVec,
    ecc: IntCounterVec,
    retired: IntGaugeVec,
    remapped: IntGaugeVec,
    remapping: IntGaugeVec,
    xids: IntCounterVec,
    pcie: GaugeVec,
    nvlink: GaugeVec,
    nvlinks: IntGaugeVec,
    sm_active: GaugeVec,
    sm_occupancy: GaugeVec,
    tensor_active: GaugeVec,
    dram_active: GaugeVec,
    health: IntGaugeVec,
    job_memory: GaugeVec,
}

impl GpuMetrics {
    /// Registers the metrics and tells what does not change.
    ///
    /// # Errors
    /// When a name is registered twice.
    pub fn new(registry: &Registry, node: &str, gpus: &Gpus) -> Result<Self, prometheus::Error> {
        let info = table::GPU_INFO.int_gauge(registry)?;
        for (device, gpu, ..) in gpus.iter() {
            let numa = gpu.numa_node.map(|numa| numa.to_string()).unwrap_or_default();
            let index = device.to_string();
            let mig = if gpu.mig.is_some() { "1" } else { "0" };
            info.with_label_values(&[
                node,
                index.as_str(),
                &gpu.uuid,
                &gpu.model,
                &gpu.pci_bus_id,
                &numa,
                mig,
                gpus.driver(),
            ])
            .set(1);
        }
        Ok(Self {
            utilization: table::GPU_UTILIZATION.gauge(registry)?,
            memory_busy: table::GPU_MEMORY_BUSY.gauge(registry)?,
            memory_used: table::GPU_MEMORY_USED.gauge(registry)?,
            memory_total: table::GPU_MEMORY_TOTAL.gauge(registry)?,
            power: table::GPU_POWER.gauge(registry)?,
            power_limit: table::GPU_POWER_LIMIT.gauge(registry)?,
            energy: table::GPU_ENERGY.counter(registry)?,
            temperature: table::GPU_TEMPERATURE.gauge(registry)?,
            clock: table::GPU_CLOCK.gauge(registry)?,
            throttled: table::GPU_THROTTLED.int_gauge(registry)?,
            ecc: table::GPU_ECC_ERRORS.int_counter(registry)?,
            retired: table::GPU_RETIRED_PAGES.int_gauge(registry)?,
            remapped: table::GPU_REMAPPED_ROWS.int_gauge(registry)?,
            remapping: table::GPU_ROW_REMAPPING.int_gauge(registry)?,
            xids: table::GPU_XID_EVENTS.int_counter(registry)?,
            pcie: table::GPU_PCIE_RATE.gauge(registry)?,
            nvlink: table::GPU_NVLINK_RATE.gauge(registry)?,
            nvlinks: table::GPU_NVLINKS.int_gauge(registry)?,
            sm_active: table::GPU_SM_ACTIVE.gauge(registry)?,
            sm_occupancy: table::GPU_SM_OCCUPANCY.gauge(registry)?,
            tensor_active: table::GPU_TENSOR_ACTIVE.gauge(registry)?,
            dram_active: table::GPU_DRAM_ACTIVE.gauge(registry)?,
            health: table::GPU_HEALTH.int_gauge(registry)?,
            job_memory: table::GPU_JOB_MEMORY.gauge(registry)?,
        })
    }

    /// Counts errors that the driver reported.
    pub fn happened(&self, gpus: &Gpus, happened: &[Happened]) {
        for event in happened {
            let code = event.code.to_string();
            for uuid in event.devices.iter().filter_map(|device| gpus.uuid(*device)) {
                self.xids.with_label_values(&[uuid, code.as_str()]).inc();
            }
        }
    }

    /// Shows the newest look at every GPU. What was not measured has no series, rather than an old
    /// value that looks like a new one.
    pub fn update(&self, gpus: &Gpus, gangs: &Gangs, now: Instant) {
        let stale = gpus.works(now) != Some(true);
        self.job_memory.reset();
        for (_, gpu, sample, verdict) in gpus.iter() {
            let uuid = gpu.uuid.as_str();
            for action in Action::ALL {
                let is = i64::from(action == verdict.action);
                self.health.with_label_values(&[uuid, action.as_str()]).set(is);
            }
            self.memory_total.with_label_values(&[uuid]).set(gpu.memory_bytes as f64);
            self.nvlinks.with_label_values(&[uuid]).set(i64::from(gpu.nvlinks));
            let nothing = Sample::default();
            let sample = sample.filter(|_| !stale).unwrap_or(&nothing);
            self.gauges(uuid, sample);
            self.counters(uuid, sample);
            self.by_job(uuid, sample, gangs);
        }
    }

    fn gauges(&self, uuid: &str, sample: &Sample) {
        let one = |gauge: &GaugeVec, labels: &[&str], value: Option<f64>| match value {
            Some(value) => gauge.with_label_values(labels).set(value),
            // Fails when it was never there, which is fine.
            None => drop(gauge.remove_label_values(labels)),
        };
        one(&self.utilization, &[uuid], sample.utilization);
        one(&self.memory_busy, &[uuid], sample.memory_busy);
        one(&self.memory_used, &[uuid], sample.memory_used_bytes.map(|bytes| bytes as f64));
        one(&self.power, &[uuid], sample.power_watts);
        one(&self.power_limit, &[uuid], sample.power_limit_watts);
        one(&self.temperature, &[uuid, "gpu"], sample.temperature_celsius);
        one(&self.temperature, &[uuid, "memory"], sample.memory_temperature_celsius);
        one(&self.clock, &[uuid, "sm"], sample.sm_hertz);
        one(&self.clock, &[uuid, "memory"], sample.memory_hertz);
        let profile = &sample.profile;
        one(&self.sm_active, &[uuid], profile.sm_active);
        one(&self.sm_occupancy, &[uuid], profile.sm_occupancy);
        one(&self.tensor_active, &[uuid], profile.tensor_active);
        one(&self.dram_active, &[uuid], profile.dram_active);
        for (at, direction) in ["sent", "received"].into_iter().enumerate() {
            one(&self.pcie, &[uuid, direction], profile.pcie_bytes_per_second[at]);
            one(&self.nvlink, &[uuid, direction], profile.nvlink_bytes_per_second[at]);
        }
        let count = |gauge: &IntGaugeVec, labels: &[&str], value: Option<i64>| match value {
            Some(value) => gauge.with_label_values(labels).set(value),
            None => drop(gauge.remove_label_values(labels)),
        };
        let signed = |value: Option<u64>| value.map(u64::cast_signed);
        for (at, cause) in ["corrected", "uncorrected"].into_iter().enumerate() {
            count(&self.retired, &[uuid, cause], signed(sample.retired_pages[at]));
            count(&self.remapped, &[uuid, cause], signed(sample.remapped_rows[at]));
        }
        count(&self.remapping, &[uuid, "pending"], sample.remap_pending.map(i64::from));
        count(&self.remapping, &[uuid, "failed"], sample.remap_failed.map(i64::from));
        for reason in THROTTLES {
            let is = sample.throttled.as_ref().map(|found| i64::from(found.contains(reason)));
            count(&self.throttled, &[uuid, reason], is);
        }
    }

    /// Moves counters to what the driver counts. They start again with the driver, as Prometheus
    /// expects of counters.
    fn counters(&self, uuid: &str, sample: &Sample) {
        if let Some(joules) = sample.energy_joules {
            let counter = self.energy.with_label_values(&[uuid]);
            if joules < counter.get() {
                counter.reset();
            }
            counter.inc_by(joules - counter.get());
        }
        let kinds = [("corrected", sample.ecc.corrected), ("uncorrected", sample.ecc.uncorrected)];
        for (kind, errors) in kinds {
            let Some(errors) = errors else { continue };
            let counter = self.ecc.with_label_values(&[uuid, kind]);
            if errors < counter.get() {
                counter.reset();
            }
            counter.inc_by(errors - counter.get());
        }
    }

    /// Sums the memory of a GPU's processes by job: a process belongs to the rank whose process
    /// group it is in.
    fn by_job(&self, uuid: &str, sample: &Sample, gangs: &Gangs) {
        let mut jobs: BTreeMap<&str, u64> = BTreeMap::new();
        for process in &sample.processes {
            let Some(bytes) = process.memory_bytes else { continue };
            let Some(group) = proc::group_of(process.pid) else { continue };
            let owner = gangs.iter().find(|(_, gang)| {
                gang.ranks.values().any(|rank| rank.process.is_some() && rank.pid == group)
            });
            if let Some(((job, _), _)) = owner {
                *jobs.entry(job).or_default() += bytes;
            }
        }
        for (job, bytes) in jobs {
            self.job_memory.with_label_values(&[uuid, job]).set(bytes as f64);
        }
    }
}
