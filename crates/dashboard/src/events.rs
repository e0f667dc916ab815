//! The list of events.

use drumline_wire::v1;
use maud::{Markup, html};

use crate::show::{ago, tag};

/// Renders the page's main part.
#[must_use]
pub fn render(events: &[v1::EventView], now_ms: u64) -> Markup {
    html! {
        h1 { "Events" }
        section.panel { (table(events, now_ms, true)) }
    }
}

/// Shows events, newest first.
#[must_use]
pub fn table(events: &[v1::EventView], now_ms: u64, with_job: bool) -> Markup {
    if events.is_empty() {
        return html! { p.nothing { "No events yet." } };
    }
    html! {
        div.scroll { table {
            thead { tr {
                th { "Ago" } @if with_job { th { "Job" } } th { "What" } th { "Message" }
            } }
            tbody { @for event in events { tr {
                td { (ago(event.at_ms, now_ms)) }
                @if with_job { td {
                    @if event.job.is_empty() { (event.node) }
                    @else { a href={ "/jobs/" (event.job) } { (event.job) } }
                } }
                td {
                    @if event.severity == "info" { code { (event.reason) } }
                    @else { (tag(&event.severity)) " " code { (event.reason) } }
                }
                td.why { (event.message) }
            } } }
        } }
    }
}
