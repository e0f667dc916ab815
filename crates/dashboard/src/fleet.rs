//! The first page: the fleet at a glance.

use drumline_types::format_bytes;
use drumline_wire::v1;
use maud::{Markup, html};

use crate::chart::{Axis, Curve, lines};
use crate::show::{job_table, percent, tag};

/// Series that the page shows, by name.
#[must_use]
pub fn series() -> Vec<String> {
    ["fleet/utilization", "fleet/allocated"].map(str::to_owned).to_vec()
}

/// Renders the page's main part; `history` has the points of [`series`].
#[must_use]
pub fn render(fleet: &v1::FleetView, history: &[Vec<(f64, f64)>]) -> Markup {
    let active: Vec<&v1::JobView> = fleet.jobs.iter().filter(|job| is_active(job)).collect();
    let figure = |value: String, name: &str, class: &str| {
        html! { div.figure { b class=(class) { (value) } span { (name) } } }
    };
    let ready = fleet.nodes.iter().filter(|node| node.phase == "ready").count();
    let class = |bad: bool, name: &'static str| if bad { name } else { "" };
    html! {
        h1 { "Fleet" }
        div.figures {
            (figure(format!("{ready} / {}", fleet.nodes.len()), "nodes ready", class(ready < fleet.nodes.len(), "bad")))
            (figure(format!("{} / {}", fleet.devices_allocated, fleet.devices_total), "devices allocated", ""))
            (figure(percent(fleet.utilization), "mean utilization", ""))
            (figure(fleet.devices_idle.to_string(), "allocated but idle", class(fleet.devices_idle > 0, "warn")))
            (figure(fleet.devices_unhealthy.to_string(), "unhealthy", class(fleet.devices_unhealthy > 0, "bad")))
            (figure(fleet.jobs_running.to_string(), "jobs running", ""))
            (figure(fleet.jobs_pending.to_string(), "jobs waiting", class(fleet.jobs_pending > 0, "warn")))
        }
        div.grid {
            section.panel {
                h2 { "Nodes and devices" }
                @if fleet.nodes.is_empty() {
                    p.nothing { "No agent has registered yet. Start one with " code { "drumline up" } "." }
                }
                div.nodes { @for node in &fleet.nodes { (node_card(node)) } }
                p.legend {
                    span { "fill: utilization" } span { "solid edge: allocated" }
                    span { "dashed: allocated but idle" } span { "striped: unhealthy" }
                }
            }
            section.panel {
                h2 { "Devices over time" }
                (lines("Share of devices", &curves(history, fleet.devices_total), Axis::Ago, Axis::Share))
                p.legend {
                    span.key style="--c: var(--accent)" { "utilization" }
                    span.key style="--c: var(--second)" { "allocated" }
                }
            }
        }
        section.panel {
            h2 { "Active jobs" }
            (job_table(&active, fleet.now_ms, "Nothing runs and nothing waits."))
        }
    }
}

fn is_active(job: &v1::JobView) -> bool {
    !job.has_ended()
}

/// The control plane tells utilization as a share and allocation as a number of devices.
fn curves(history: &[Vec<(f64, f64)>], devices: u32) -> Vec<Curve> {
    let parts = [("utilization", 1.0), ("allocated", f64::from(devices.max(1)))];
    let curve = |((name, whole), points): ((&str, f64), &Vec<(f64, f64)>)| Curve {
        name: name.to_owned(),
        points: points.iter().map(|(x, y)| (*x, y / whole)).collect(),
        dots: false,
    };
    parts.into_iter().zip(history).map(curve).collect()
}

fn node_card(node: &v1::NodeView) -> Markup {
    html! {
        article.node {
            h3 { span { (node.name) } (tag(&node.phase)) }
            div.devices { @for device in &node.devices { (device_cell(device)) } }
            div.quiet {
                (format!("offers {} cores · machine: {:.1} busy", node.cores, node.cpu_cores_used)) " · "
                (format_bytes(node.memory_used_bytes)) " of " (format_bytes(node.memory_bytes))
            }
            @if !node.message.is_empty() { div.bad { (node.message) } }
        }
    }
}

fn device_cell(device: &v1::DeviceView) -> Markup {
    let held = !device.job.is_empty();
    let class = match (device.healthy, held, device.idle) {
        (false, ..) => "device sick",
        (_, true, true) => "device held idle",
        (_, true, false) => "device held",
        _ => "device",
    };
    let mut title = format!("{} {} {}", device.kind, device.index, device.model);
    if held {
        title = format!(
            "{title}: {} rank {}, {} busy",
            device.job,
            device.rank,
            percent(device.utilization)
        );
    } else if device.healthy {
        title.push_str(": free");
    }
    if !device.message.is_empty() {
        title = format!("{title}: {}", device.message);
    }
    let height = format!("height:{:.0}%", device.utilization.clamp(0.0, 1.0) * 100.0);
    let inner = html! { i style=(height) {} b { (device.index) } };
    html! {
        @if held {
            a class=(class) href={ "/jobs/" (device.job) } title=(title) aria-label=(title) { (inner) }
        } @else {
            span class=(class) title=(title) aria-label=(title) role="img" { (inner) }
        }
    }
}
