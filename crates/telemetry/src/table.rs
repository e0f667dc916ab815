//! Every metric name, in one table. `docs/reference/metrics.md` is generated from it.

use std::fmt::Write as _;

use crate::metric::{Kind, Metric, Origin};

/// Buckets of the time to the first token, in seconds: those that vLLM's users know.
pub const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Buckets of the time per output token after the first, in seconds.
pub const TPOT_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1.0, 2.5];
/// Buckets of decisions and store transactions, in seconds.
const FAST: &[f64] = &[
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025,
    0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
];
/// Buckets of what people wait for, in seconds: from a start at once to a queue of a day.
const WAITS: &[f64] = &[
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0,
];

macro_rules! metrics {
    ($($origin:ident { $($id:ident = $name:literal, $kind:expr, $unit:literal, [$($label:literal),*], $help:literal;)* })*) => {
        $($(
            #[doc = $help]
            pub const $id: Metric = Metric {
                name: $name,
                kind: $kind,
                unit: $unit,
                labels: &[$($label),*],
                help: $help,
                origin: Origin::$origin,
            };
        )*)*
        /// Every metric of every process.
        pub const TABLE: &[Metric] = &[$($($id,)*)*];
    };
}

metrics! {
    Control {
        BUILD_INFO = "drumline_build_info", Kind::Gauge, "", ["version", "commit"],
            "Always 1; the labels say what runs.";
        LEADER_TERM = "drumline_leader_term", Kind::Gauge, "", [],
            "The term of this control plane as leader; 0 while it is none.";
        AGENTS_CONNECTED = "drumline_agents_connected", Kind::Gauge, "", [],
            "Agents with an open stream.";
        NODES = "drumline_nodes", Kind::Gauge, "", ["phase"],
            "Nodes by phase: ready, silent, gone.";
        DEVICES = "drumline_devices", Kind::Gauge, "", ["kind"],
            "Devices of the fleet, whatever their state.";
        DEVICES_ALLOCATED = "drumline_devices_allocated", Kind::Gauge, "", ["kind"],
            "Devices that a job holds.";
        DEVICES_IDLE = "drumline_devices_idle", Kind::Gauge, "", ["kind"],
            "Devices that a job holds and that have done nothing for a minute or more.";
        DEVICES_UNHEALTHY = "drumline_devices_unhealthy", Kind::Gauge, "", ["kind"],
            "Devices that cannot be used.";
        FLEET_UTILIZATION = "drumline_fleet_utilization_ratio", Kind::Gauge, "ratio", [],
            "Mean utilization of all healthy devices.";
        JOBS = "drumline_jobs", Kind::Gauge, "", ["kind", "phase"],
            "Jobs by kind and phase.";
        JOBS_PENDING = "drumline_jobs_pending", Kind::Gauge, "", ["reason"],
            "Pending jobs by the reason why they wait.";
        JOBS_SUBMITTED = "drumline_jobs_submitted_total", Kind::Counter, "", ["kind"],
            "Jobs accepted since this control plane became leader.";
        JOBS_ENDED = "drumline_jobs_ended_total", Kind::Counter, "", ["kind", "phase"],
            "Jobs ended since this control plane became leader, by how.";
        GANG_WAIT = "drumline_gang_wait_seconds", Kind::Histogram(WAITS), "seconds", ["queue"],
            "From submission to the launch of the first attempt.";
        GANG_START = "drumline_gang_start_seconds", Kind::Histogram(WAITS), "seconds", ["kind"],
            "From an attempt's launch until all its ranks have joined.";
        GANG_RESTARTS = "drumline_gang_restarts_total", Kind::Counter, "", ["kind", "reason"],
            "Attempts that ended without success and were or will be followed by another.";
        PLACEMENT_DURATION = "drumline_placement_duration_seconds", Kind::Histogram(FAST), "seconds", [],
            "Time of one placement over all waiting jobs.";
        AUDIT_DURATION = "drumline_audit_duration_seconds", Kind::Histogram(FAST), "seconds", [],
            "Time of the independent check of one plan.";
        AUDIT_VIOLATIONS = "drumline_audit_violations_total", Kind::Counter, "", [],
            "Rules that plans broke; such a plan is not carried out. More than 0 is a bug.";
        STORE_TXN_DURATION = "drumline_store_txn_duration_seconds", Kind::Histogram(FAST), "seconds", ["outcome"],
            "Time of one transaction of the state store, until it is durable.";
        CONTROL_INBOX = "drumline_control_inbox_depth", Kind::Gauge, "", [],
            "Inputs that wait for the control plane's dispatcher.";
        JOB_STEP = "drumline_job_step", Kind::Gauge, "", ["job"],
            "The last step that a training run finished.";
        JOB_LOSS = "drumline_job_loss", Kind::Gauge, "", ["job"],
            "The training loss of the last step.";
        JOB_LOSS_VALIDATION = "drumline_job_loss_validation", Kind::Gauge, "", ["job"],
            "The last loss on the held-out split.";
        JOB_TOKENS_PER_SECOND = "drumline_job_tokens_per_second", Kind::Gauge, "tokens/s", ["job"],
            "Tokens of the last step over its time, all ranks together.";
        JOB_TOKENS = "drumline_job_tokens", Kind::Gauge, "tokens", ["job"],
            "Tokens that the run has been trained on; goes back when a restart repeats steps.";
        JOB_MFU = "drumline_job_mfu_ratio", Kind::Gauge, "ratio", ["job"],
            "Share of its devices' measured matmul peak that a training run reaches.";
        JOB_STEP_SECONDS = "drumline_job_step_part_seconds", Kind::Gauge, "seconds", ["job", "part"],
            "Seconds of rank 0's last step by part: matmul, attention, other, communication, bubble and idle add up to it; communication_hidden ran beside them.";
        JOB_MATMUL_PEAK = "drumline_job_matmul_peak_ratio", Kind::Gauge, "ratio", ["job"],
            "Share of a device's measured matmul peak that rank 0 reaches while it multiplies matrices.";
        JOB_OPTIMIZER_RATE = "drumline_job_optimizer_rate", Kind::Gauge, "bytes/s", ["job"],
            "Memory traffic of rank 0's optimizer, at least.";
        JOB_CHECKPOINT_STEP = "drumline_job_checkpoint_step", Kind::Gauge, "", ["job"],
            "The step of the last complete checkpoint.";
        SERVICE_READY = "drumline_service_ready", Kind::Gauge, "", ["service"],
            "Replicas of the service of which every rank answered just now.";
        SERVICE_RUNNING = "drumline_service_requests_running", Kind::Gauge, "", ["service"],
            "Requests in the batch.";
        SERVICE_WAITING = "drumline_service_requests_waiting", Kind::Gauge, "", ["service"],
            "Requests that wait for a place in the batch.";
        SERVICE_KV_USAGE = "drumline_service_kv_usage_ratio", Kind::Gauge, "ratio", ["service"],
            "Share of the key-value cache in use.";
        SERVICE_TOKENS = "drumline_service_tokens_total", Kind::Counter, "tokens", ["service", "kind"],
            "Tokens by kind: prompt, completion.";
    }
    Agent {
        NODE_INFO = "drumline_node_info", Kind::Gauge, "", ["node", "version"],
            "Always 1; the labels say which agent this is.";
        NODE_CPU_USED = "drumline_node_cpu_used_cores", Kind::Gauge, "cores", ["node"],
            "Cores of the machine in use, by anyone.";
        NODE_MEMORY_USED = "drumline_node_memory_used_bytes", Kind::Gauge, "bytes", ["node"],
            "Memory of the machine that is not available any more.";
        NODE_MEMORY_TOTAL = "drumline_node_memory_total_bytes", Kind::Gauge, "bytes", ["node"],
            "Memory of the machine.";
        DEVICE_INFO = "drumline_device_info", Kind::Gauge, "", ["node", "device", "kind", "model"],
            "Always 1; what the device is.";
        DEVICE_UTILIZATION = "drumline_device_utilization_ratio", Kind::Gauge, "ratio", ["node", "device"],
            "Share of the device in use.";
        DEVICE_MEMORY_USED = "drumline_device_memory_used_bytes", Kind::Gauge, "bytes", ["node", "device"],
            "Memory of the device in use.";
        DEVICE_HEALTHY = "drumline_device_healthy", Kind::Gauge, "", ["node", "device"],
            "1 when the device can be used.";
        GPU_INFO = "drumline_gpu_info", Kind::Gauge, "", ["node", "device", "gpu_uuid", "model", "pci_bus_id", "numa_node", "mig", "driver"],
            "Always 1; joins a GPU's UUID to its node and device, and says what it is.";
        GPU_UTILIZATION = "drumline_gpu_utilization_ratio", Kind::Gauge, "ratio", ["gpu_uuid"],
            "Share of the time in which any kernel ran; reads high during a hang, so judge idleness by SM or tensor activity.";
        GPU_MEMORY_BUSY = "drumline_gpu_memory_busy_ratio", Kind::Gauge, "ratio", ["gpu_uuid"],
            "Share of the time in which the memory was read or written.";
        GPU_MEMORY_USED = "drumline_gpu_memory_used_bytes", Kind::Gauge, "bytes", ["gpu_uuid"],
            "Memory in use, by anyone.";
        GPU_MEMORY_TOTAL = "drumline_gpu_memory_total_bytes", Kind::Gauge, "bytes", ["gpu_uuid"],
            "Memory of the GPU.";
        GPU_JOB_MEMORY = "drumline_gpu_job_memory_bytes", Kind::Gauge, "bytes", ["gpu_uuid", "job"],
            "Memory that a job's processes hold on the GPU.";
        GPU_POWER = "drumline_gpu_power_watts", Kind::Gauge, "watts", ["gpu_uuid"],
            "Power that the board draws.";
        GPU_POWER_LIMIT = "drumline_gpu_power_limit_watts", Kind::Gauge, "watts", ["gpu_uuid"],
            "The power limit in force.";
        GPU_ENERGY = "drumline_gpu_energy_joules_total", Kind::Counter, "joules", ["gpu_uuid"],
            "Energy since the driver was loaded.";
        GPU_TEMPERATURE = "drumline_gpu_temperature_celsius", Kind::Gauge, "celsius", ["gpu_uuid", "sensor"],
            "Temperature by sensor: gpu, memory.";
        GPU_CLOCK = "drumline_gpu_clock_hertz", Kind::Gauge, "hertz", ["gpu_uuid", "clock"],
            "Clocks now: sm, memory.";
        GPU_THROTTLED = "drumline_gpu_throttled", Kind::Gauge, "", ["gpu_uuid", "reason"],
            "1 while this slows the clocks down: power_cap, hw_slowdown, sync_boost, sw_thermal, hw_thermal, hw_power_brake, application_setting.";
        GPU_SM_ACTIVE = "drumline_gpu_sm_active_ratio", Kind::Gauge, "ratio", ["gpu_uuid"],
            "Share of the time in which a multiprocessor had work; Hopper and newer.";
        GPU_SM_OCCUPANCY = "drumline_gpu_sm_occupancy_ratio", Kind::Gauge, "ratio", ["gpu_uuid"],
            "Warps on the multiprocessors over those that fit; Hopper and newer.";
        GPU_TENSOR_ACTIVE = "drumline_gpu_tensor_active_ratio", Kind::Gauge, "ratio", ["gpu_uuid"],
            "Share of the time in which the tensor cores worked; Hopper and newer.";
        GPU_DRAM_ACTIVE = "drumline_gpu_dram_active_ratio", Kind::Gauge, "ratio", ["gpu_uuid"],
            "Share of the memory's bandwidth in use; Hopper and newer.";
        GPU_PCIE_RATE = "drumline_gpu_pcie_bytes_per_second", Kind::Gauge, "bytes/s", ["gpu_uuid", "direction"],
            "Traffic over PCIe: sent, received.";
        GPU_NVLINK_RATE = "drumline_gpu_nvlink_bytes_per_second", Kind::Gauge, "bytes/s", ["gpu_uuid", "direction"],
            "Traffic over all NVLinks: sent, received; Hopper and newer.";
        GPU_NVLINKS = "drumline_gpu_nvlinks", Kind::Gauge, "", ["gpu_uuid"],
            "NVLinks that were active when the agent started.";
        GPU_ECC_ERRORS = "drumline_gpu_ecc_errors_total", Kind::Counter, "", ["gpu_uuid", "kind"],
            "Memory errors since the driver was loaded: corrected, uncorrected.";
        GPU_RETIRED_PAGES = "drumline_gpu_retired_pages", Kind::Gauge, "", ["gpu_uuid", "cause"],
            "Memory pages retired after corrected or uncorrected errors; before Ampere.";
        GPU_REMAPPED_ROWS = "drumline_gpu_remapped_rows", Kind::Gauge, "", ["gpu_uuid", "cause"],
            "Memory rows remapped after corrected or uncorrected errors; Ampere and newer.";
        GPU_ROW_REMAPPING = "drumline_gpu_row_remapping", Kind::Gauge, "", ["gpu_uuid", "state"],
            "1 while a row waits for a reset to be remapped (pending), or could not be (failed).";
        GPU_XID_EVENTS = "drumline_gpu_xid_events_total", Kind::Counter, "", ["gpu_uuid", "xid"],
            "Errors that the driver reported since the agent started, by NVIDIA's number.";
        GPU_HEALTH = "drumline_gpu_health", Kind::Gauge, "", ["gpu_uuid", "action"],
            "1 for what must be done about the GPU now: none, record, restart_application, drain, reset, reboot, hardware.";
        RANKS = "drumline_ranks", Kind::Gauge, "", ["node", "phase"],
            "Ranks on this node by phase.";
        RANK_MEMORY = "drumline_rank_memory_bytes", Kind::Gauge, "bytes", ["node", "device", "job"],
            "Resident memory of the rank on a device, with its descendants.";
        RANK_CPU = "drumline_rank_cpu_cores", Kind::Gauge, "cores", ["node", "device", "job"],
            "Cores that the rank on a device uses, with its descendants.";
        RANKS_STARTED = "drumline_ranks_started_total", Kind::Counter, "", ["node"],
            "Ranks that this agent has started.";
        RANKS_FAILED = "drumline_ranks_failed_total", Kind::Counter, "", ["node"],
            "Ranks that ended otherwise than with exit code 0.";
        COLLECT_SUCCESS = "drumline_collect_success", Kind::Gauge, "", ["node", "source"],
            "1 when the last look at this source of measurements worked.";
    }
    Gateway {
        GATEWAY_REQUESTS = "drumline_gateway_requests_total", Kind::Counter, "", ["model", "outcome"],
            "Requests by how they ended.";
        GATEWAY_TOKENS = "drumline_gateway_tokens_total", Kind::Counter, "tokens", ["model", "kind"],
            "Tokens by kind.";
        GATEWAY_IN_FLIGHT = "drumline_gateway_requests_in_flight", Kind::Gauge, "", ["model"],
            "Requests being answered.";
        GATEWAY_TTFT = "drumline_gateway_time_to_first_token_seconds", Kind::Histogram(TTFT_BUCKETS), "seconds", ["model"],
            "From the request's arrival to its first token.";
        GATEWAY_INTER_TOKEN = "drumline_gateway_inter_token_latency_seconds", Kind::Histogram(TPOT_BUCKETS), "seconds", ["model"],
            "Between two tokens of a request, for each token after the first.";
        GATEWAY_PREFILL = "drumline_gateway_prefill_seconds", Kind::Histogram(TTFT_BUCKETS), "seconds", ["model"],
            "From a request's place in the batch to its first token.";
        GATEWAY_DECODE = "drumline_gateway_decode_seconds", Kind::Histogram(TTFT_BUCKETS), "seconds", ["model"],
            "From a request's first token to its last.";
        GATEWAY_SUCCESS = "drumline_gateway_request_success_total", Kind::Counter, "", ["model", "finished_reason"],
            "Requests that were answered in full, by why they ended: stop, length.";
        GATEWAY_PREFIX_QUERIES = "drumline_gateway_prefix_cache_queries_total", Kind::Counter, "tokens", ["model"],
            "Tokens of prompts that were looked up in the cache of prefixes.";
        GATEWAY_PREFIX_HITS = "drumline_gateway_prefix_cache_hits_total", Kind::Counter, "tokens", ["model"],
            "Tokens of prompts that were in the cache already and were not computed again.";
        GATEWAY_TPOT = "drumline_gateway_time_per_output_token_seconds", Kind::Histogram(TPOT_BUCKETS), "seconds", ["model"],
            "Mean time between tokens after the first, per request.";
        GATEWAY_QUEUE = "drumline_gateway_queue_seconds", Kind::Histogram(TTFT_BUCKETS), "seconds", ["model"],
            "Time that a request waited for a place in the batch.";
        GATEWAY_DURATION = "drumline_gateway_request_seconds", Kind::Histogram(TTFT_BUCKETS), "seconds", ["model"],
            "From the request's arrival to its last token.";
    }
    Operator {
        OPERATOR_LEADING = "drumline_operator_leading", Kind::Gauge, "", [],
            "1 while this operator leads; what follows, and the control plane's metrics of nodes, devices and jobs, are told by the leader only.";
        PENDING_LONGEST = "drumline_jobs_pending_longest_seconds", Kind::Gauge, "seconds", ["namespace", "reason"],
            "How long the pending job that has waited longest has waited, since it was created or its last attempt was launched.";
        NODE_DEVICES = "drumline_node_devices", Kind::Gauge, "", ["node", "kind"],
            "Devices that a node offers.";
        NODE_DEVICES_ALLOCATED = "drumline_node_devices_allocated", Kind::Gauge, "", ["node", "kind"],
            "Devices of a node that pods of gangs hold.";
        JOB_RESTARTS = "drumline_job_restarts", Kind::Gauge, "", ["job"],
            "Restarts of a job so far.";
    }
}

/// Returns the reference page of all metrics.
#[must_use]
pub fn markdown() -> String {
    let mut page = "# Metrics\n\n\
        Generated from the table in `crates/telemetry/src/table.rs`; do not edit.\n\n\
        Each process serves its own on `/metrics` in Prometheus' text format. Units are base units; \
        ratios go from 0 to 1. On a loopback address `/metrics` needs no token: it holds names and \
        numbers, never secrets, and the Host header is checked. On any other address it needs \
        `Authorization: Bearer TOKEN`.\n"
        .to_owned();
    for origin in Origin::ALL {
        let word = origin.as_str();
        let title = word[..1].to_uppercase() + &word[1..];
        let _ = write!(page, "\n## {title}\n\n| Name | Type | Unit | Labels | Meaning |\n");
        page.push_str("|---|---|---|---|---|\n");
        for metric in TABLE.iter().filter(|metric| metric.origin == origin) {
            let labels: Vec<String> = metric.labels.iter().map(|l| format!("`{l}`")).collect();
            let _ = writeln!(
                page,
                "| `{}` | {} | {} | {} | {} |",
                metric.name,
                metric.kind.as_str(),
                metric.unit,
                labels.join(", "),
                metric.help
            );
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use prometheus::Registry;

    use super::*;

    #[test]
    fn every_name_follows_the_conventions() {
        let mut seen = BTreeSet::new();
        for metric in TABLE {
            let name = metric.name;
            assert!(seen.insert(name), "{name} twice");
            assert!(name.starts_with("drumline_"), "{name}");
            assert!(metric.help.ends_with('.'), "{name}");
            assert_eq!(name.ends_with("_total"), metric.kind == Kind::Counter, "{name}");
            let bare =
                name.strip_suffix("_total").filter(|_| !metric.unit.is_empty()).unwrap_or(name);
            const UNITS: [&str; 7] =
                ["seconds", "bytes", "ratio", "watts", "joules", "celsius", "hertz"];
            if UNITS.contains(&metric.unit) {
                assert!(bare.ends_with(&format!("_{}", metric.unit)), "{name}");
            }
            let fast = metric.labels.contains(&"rank");
            assert!(!fast, "{name}: a series per job and rank is too many");
        }
    }

    #[test]
    fn every_row_can_be_registered_as_what_it_is() {
        let registry = Registry::new();
        for metric in TABLE {
            let made = match metric.kind {
                Kind::Counter => metric.int_counter(&registry).map(drop),
                Kind::Gauge => metric.gauge(&registry).map(drop),
                Kind::Histogram(_) => metric.histogram(&registry).map(drop),
            };
            made.unwrap_or_else(|error| panic!("{}: {error}", metric.name));
        }
    }

    /// Fails when the page is not the table's; `DRUMLINE_WRITE_DOCS=1` writes it anew.
    #[test]
    fn the_reference_page_is_the_table() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference/metrics.md");
        if std::env::var_os("DRUMLINE_WRITE_DOCS").is_some() {
            std::fs::write(&path, markdown()).unwrap();
        }
        let page = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(page == markdown(), "run this test with DRUMLINE_WRITE_DOCS=1 to write the page");
    }
}
