//! `drumline nodes`: the machines, their devices and who holds them.

use clap::Args;
use drumline_types::format_bytes;
use drumline_wire::v1;
use serde_json::Value;

use crate::client::Access;
use crate::failure::Failure;
use crate::output::{self, Format, note};
use crate::{told, views};

/// List nodes and what they are doing.
#[derive(Debug, Args)]
pub struct NodesArgs {
    /// One line for each device.
    #[arg(long)]
    pub devices: bool,
}

/// Runs the command.
///
/// # Errors
/// Unreachable.
pub async fn run(args: &NodesArgs, access: &Access, format: Format) -> Result<(), Failure> {
    let client = access.connect().await?;
    let nodes = client
        .call(|mut c| async move { c.list_nodes(v1::ListNodesRequest {}).await })
        .await?
        .nodes;
    let value = Value::Array(nodes.iter().map(views::node).collect());
    output::value(format, &value, || if args.devices { devices(&nodes) } else { table(&nodes) })?;
    if nodes.is_empty() && format == Format::Table {
        note("no nodes; agents join with `drumline up`");
    }
    Ok(())
}

fn table(nodes: &[v1::NodeView]) -> String {
    let now = drumline_wire::now_ms();
    let rows: Vec<_> = nodes
        .iter()
        .map(|node| {
            let held = node.devices.iter().filter(|device| !device.job.is_empty()).count();
            let unhealthy = node.devices.iter().filter(|device| !device.healthy).count();
            let mut message = node.message.clone();
            if unhealthy > 0 {
                message = format!("{unhealthy} unhealthy devices. {message}");
            }
            vec![
                node.name.clone(),
                node.phase.clone(),
                format!("{held}/{}", node.devices.len()),
                format!("{:.1}/{}", node.cpu_cores_used, node.cores),
                format!(
                    "{}/{}",
                    format_bytes(node.memory_used_bytes),
                    format_bytes(node.memory_bytes)
                ),
                place(&node.topology),
                told::ago(now, node.last_seen_ms),
                node.agent_version.clone(),
                message,
            ]
        })
        .collect();
    output::table(
        &["NODE", "PHASE", "HELD", "CORES", "MEMORY", "PLACE", "SEEN", "VERSION", "MESSAGE"],
        &rows,
    )
}

/// Shows a node's place, such as `spine s1, rack r7 (50 GB/s)`.
fn place(topology: &[v1::TopologyStep]) -> String {
    let steps = topology.iter().map(|step| match step.link_mb_per_s {
        0 => format!("{} {}", step.level, step.name),
        speed => format!("{} {} ({} GB/s)", step.level, step.name, f64::from(speed) / 1000.0),
    });
    steps.collect::<Vec<_>>().join(", ")
}

fn devices(nodes: &[v1::NodeView]) -> String {
    let rows: Vec<_> = nodes
        .iter()
        .flat_map(|node| node.devices.iter().map(move |device| (node, device)))
        .map(|(node, device)| {
            let holder = if device.job.is_empty() {
                String::new()
            } else {
                format!("{} rank {}", device.job, device.rank)
            };
            let health = match (device.healthy, device.idle) {
                (false, _) => format!("unhealthy: {}", device.message),
                (true, true) => "held but idle".to_owned(),
                (true, false) => "healthy".to_owned(),
            };
            vec![
                format!("{}/{}", node.name, device.index),
                device.kind.clone(),
                device.model.clone(),
                told::percent(device.utilization),
                format_bytes(device.memory_used_bytes),
                holder,
                health,
            ]
        })
        .collect();
    output::table(&["DEVICE", "KIND", "MODEL", "USE", "MEMORY", "HELD BY", "HEALTH"], &rows)
}
