//! The served models.

use drumline_wire::v1;
use maud::{Markup, html};

use crate::chart::{Axis, Curve, lines};
use crate::show::{count, percent, reason, tag};

/// Series that the page shows: one for each served model.
#[must_use]
pub fn series(fleet: &v1::FleetView) -> Vec<String> {
    served(fleet)
        .map(|(_, service)| format!("service/{}/tokens_per_second", service.served_name))
        .collect()
}

/// Renders the page's main part; `history` has the points of [`series`].
#[must_use]
pub fn render(fleet: &v1::FleetView, history: &[Vec<(f64, f64)>]) -> Markup {
    let services: Vec<_> = served(fleet).collect();
    html! {
        h1 { "Services" }
        @if services.is_empty() {
            section.panel { p.nothing {
                "No model is served. Serve a checkpoint with " code { "drumline serve CHECKPOINT" } "."
            } }
        }
        @if !fleet.gateway_url.is_empty() {
            p { "OpenAI-compatible: " code { (fleet.gateway_url) "/v1" } }
        }
        @for (index, (job, service)) in services.iter().enumerate() {
            section.panel {
                h2 {
                    (service.served_name) " " (tag(if service.ready { "ready" } else { &job.phase }))
                    " " a.quiet href={ "/jobs/" (job.id) } { (job.id) }
                }
                @if !service.ready { p { (reason(job)) } }
                div.figures {
                    div.figure { b { (service.running) " / " (service.max_batch) } span { "sequences running" } }
                    div.figure { b { (service.waiting) } span { "waiting" } }
                    div.figure { b { (percent(service.kv_usage)) } span { "KV blocks in use" } }
                    div.figure { b { (count(service.tokens_per_second as u64)) } span { "tokens/s" } }
                    div.figure { b { (count(u64::from(service.max_context))) } span { "tokens of context" } }
                }
                (lines("Tokens per second", &[Curve {
                    name: "tokens/s".to_owned(),
                    points: history.get(index).cloned().unwrap_or_default(),
                    dots: false,
                }], Axis::Ago, Axis::Number))
            }
        }
    }
}

fn served(fleet: &v1::FleetView) -> impl Iterator<Item = (&v1::JobView, &v1::ServiceView)> {
    let live = |job: &&v1::JobView| !job.has_ended();
    fleet.jobs.iter().filter(live).filter_map(|job| Some((job, job.service.as_ref()?)))
}
