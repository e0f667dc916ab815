//! The agent's metrics: what its machine, devices and ranks use.

use std::time::Instant;

use drumline_telemetry::table;
use drumline_types::RankPhase;
use drumline_wire::v1;
use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec, Registry};

use crate::devices::Devices;
use crate::gpu_metrics::GpuMetrics;
use crate::gpus::Gpus;
use crate::ranks::Gangs;

/// Metrics of one node. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Where they are registered.
    pub registry: Registry,
    node: String,
    cores_used: GaugeVec,
    memory_used: GaugeVec,
    utilization: GaugeVec,
    device_memory: GaugeVec,
    healthy: IntGaugeVec,
    ranks: IntGaugeVec,
    rank_memory: GaugeVec,
    rank_cores: GaugeVec,
    started: IntCounterVec,
    failed: IntCounterVec,
    collect_success: IntGaugeVec,
    /// Those of the GPUs.
    pub gpus: GpuMetrics,
}

impl Metrics {
    /// Registers the metrics of `node`.
    ///
    /// # Errors
    /// When a name is registered twice.
    pub fn new(node: &str, devices: &Devices, gpus: &Gpus) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        table::NODE_INFO
            .int_gauge(&registry)?
            .with_label_values(&[node, env!("CARGO_PKG_VERSION")])
            .set(1);
        let info = table::DEVICE_INFO.int_gauge(&registry)?;
        for device in &devices.list {
            let index = device.index.to_string();
            info.with_label_values(&[node, &index, &device.kind, &device.model]).set(1);
        }
        table::NODE_MEMORY_TOTAL
            .gauge(&registry)?
            .with_label_values(&[node])
            .set(devices.memory_bytes as f64);
        Ok(Self {
            gpus: GpuMetrics::new(&registry, node, gpus)?,
            node: node.to_owned(),
            cores_used: table::NODE_CPU_USED.gauge(&registry)?,
            memory_used: table::NODE_MEMORY_USED.gauge(&registry)?,
            utilization: table::DEVICE_UTILIZATION.gauge(&registry)?,
            device_memory: table::DEVICE_MEMORY_USED.gauge(&registry)?,
            healthy: table::DEVICE_HEALTHY.int_gauge(&registry)?,
            ranks: table::RANKS.int_gauge(&registry)?,
            rank_memory: table::RANK_MEMORY.gauge(&registry)?,
            rank_cores: table::RANK_CPU.gauge(&registry)?,
            started: table::RANKS_STARTED.int_counter(&registry)?,
            failed: table::RANKS_FAILED.int_counter(&registry)?,
            collect_success: table::COLLECT_SUCCESS.int_gauge(&registry)?,
            registry,
        })
    }

    /// Counts a started rank.
    pub fn rank_started(&self) {
        self.started.with_label_values(&[&self.node]).inc();
    }

    /// Counts a rank that ended otherwise than with exit code 0.
    pub fn rank_failed(&self) {
        self.failed.with_label_values(&[&self.node]).inc();
    }

    /// Shows a heartbeat's samples.
    pub fn update(&self, heartbeat: &v1::Heartbeat, gangs: &Gangs, gpus: &Gpus) {
        let node = [self.node.as_str()];
        self.cores_used.with_label_values(&node).set(heartbeat.cpu_cores_used);
        self.memory_used.with_label_values(&node).set(heartbeat.memory_used_bytes as f64);
        let seen = i64::from(heartbeat.memory_used_bytes > 0);
        self.collect_success.with_label_values(&[&self.node, "proc"]).set(seen);
        let now = Instant::now();
        if let Some(works) = gpus.works(now) {
            self.collect_success.with_label_values(&[&self.node, "nvml"]).set(works.into());
        }
        self.gpus.update(gpus, gangs, now);
        for device in &heartbeat.devices {
            let index = device.index.to_string();
            let label = [self.node.as_str(), &index];
            self.utilization.with_label_values(&label).set(device.utilization);
            self.device_memory.with_label_values(&label).set(device.memory_used_bytes as f64);
            self.healthy.with_label_values(&label).set(i64::from(device.healthy));
        }
        for phase in [RankPhase::Started, RankPhase::Running] {
            let count = gangs
                .iter()
                .flat_map(|(_, gang)| gang.ranks.values())
                .filter(|rank| rank.phase == phase)
                .count();
            self.ranks.with_label_values(&[&self.node, phase.as_str()]).set(count as i64);
        }
        // Series of ranks that are gone would stay for ever.
        self.rank_memory.reset();
        self.rank_cores.reset();
        for sample in &heartbeat.ranks {
            let gang = gangs.get(&sample.job, sample.attempt);
            let Some(rank) = gang.and_then(|gang| gang.ranks.get(&sample.rank)) else { continue };
            let device = rank.device.to_string();
            let label = [self.node.as_str(), &device, &sample.job];
            self.rank_memory.with_label_values(&label).set(sample.memory_bytes as f64);
            self.rank_cores.with_label_values(&label).set(sample.cpu_cores);
        }
    }
}
