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
            @let all: Vec<_> = replicas(fleet, job, service).collect();
            @let ready = all.iter().filter(|(_, one)| one.ready).count();
            @let sum = |of: fn(&v1::ServiceView) -> u32| all.iter().map(|(_, one)| of(one)).sum::<u32>();
            @let used = all.iter().map(|(_, one)| one.kv_usage).sum::<f64>() / all.len().max(1) as f64;
            @let rate = all.iter().map(|(_, one)| one.tokens_per_second).sum::<f64>();
            section.panel {
                h2 {
                    (service.served_name) " " (tag(if ready > 0 { "ready" } else { &job.phase }))
                    " " a.quiet href={ "/jobs/" (job.id) } { (job.id) }
                }
                @if !service.ready { p { (reason(job)) } }
                @if all.len() > 1 {
                    p.quiet {
                        "Replicas: "
                        @for (number, (job, one)) in all.iter().enumerate() {
                            @if number > 0 { ", " }
                            a href={ "/jobs/" (job.id) } { (job.id) } " "
                            (tag(if one.ready { "ready" } else if one.drains { "drains" } else { &job.phase }))
                        }
                    }
                }
                div.figures {
                    @if service.replicas > 1 || all.len() > 1 {
                        div.figure { b { (ready) " / " (service.replicas) } span { "replicas serve" } }
                    }
                    div.figure { b { (sum(|one| one.running)) " / " (sum(|one| one.max_batch)) } span { "sequences running" } }
                    div.figure { b { (sum(|one| one.waiting)) } span { "waiting" } }
                    div.figure { b { (percent(used)) } span { "KV blocks in use" } }
                    div.figure { b { (count(rate as u64)) } span { "tokens/s" } }
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

/// Services that are no replicas, and replicas whose service is gone.
fn served(fleet: &v1::FleetView) -> impl Iterator<Item = (&v1::JobView, &v1::ServiceView)> {
    live(fleet).filter(|(_, service)| {
        let of = &service.replica_of;
        of.is_empty() || !fleet.jobs.iter().any(|job| job.id == *of && !job.has_ended())
    })
}

fn live(fleet: &v1::FleetView) -> impl Iterator<Item = (&v1::JobView, &v1::ServiceView)> {
    let live = |job: &&v1::JobView| !job.has_ended();
    fleet.jobs.iter().filter(live).filter_map(|job| Some((job, job.service.as_ref()?)))
}

/// A service and its replicas.
fn replicas<'a>(
    fleet: &'a v1::FleetView,
    job: &'a v1::JobView,
    service: &'a v1::ServiceView,
) -> impl Iterator<Item = (&'a v1::JobView, &'a v1::ServiceView)> {
    let others = live(fleet).filter(|(_, one)| !job.id.is_empty() && one.replica_of == job.id);
    std::iter::once((job, service)).chain(others)
}
