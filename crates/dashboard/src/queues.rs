//! The queues: who may use how much, and who uses it.

use std::collections::{BTreeMap, HashMap};

use drumline_wire::v1;
use maud::{Markup, html};

use crate::show::{count, tag};

/// Renders the page's main part.
#[must_use]
pub fn render(queues: &[v1::QueueView]) -> Markup {
    let mut depth: BTreeMap<&str, usize> = BTreeMap::new();
    html! {
        h1 { "Queues" }
        section.panel {
            div.scroll { table {
                thead { tr {
                    th { "Queue" } th { "Used of quota" } th.n.wide { "Weight" }
                    th.n { "Running" } th.n { "Waiting" } th { "" }
                } }
                tbody { @for queue in queues {
                    @let at = depth.get(queue.parent.as_str()).map_or(0, |above| above + 1);
                    ({ depth.insert(&queue.name, at); html! {} })
                    tr {
                        td style=(format!("padding-left: {}rem", 0.5 + 1.2 * at as f64)) { b { (queue.name) } }
                        td { (shares(queue)) }
                        td.n.wide { (queue.weight) }
                        td.n { (count(u64::from(queue.running))) }
                        td.n { (count(u64::from(queue.pending))) }
                        td { @if queue.held { (tag("held")) } }
                    }
                } }
            } }
            p.legend { span { "a parent counts what the queues below it use" } span { "beyond the quota: borrowed" } }
        }
    }
}

fn shares(queue: &v1::QueueView) -> Markup {
    let classes: BTreeMap<&str, (u32, Option<u32>)> = classes(&queue.used, &queue.quota);
    html! {
        @if classes.is_empty() { span.nothing { "nothing used, no limit" } }
        @for (class, (used, quota)) in classes {
            div {
                (used) @if let Some(quota) = quota { " of " (quota) } " " (class)
                @if let Some(quota) = quota {
                    @let width = 100.0 * f64::from(used.min(quota)) / f64::from(quota.max(1));
                    div.meter { i style=(format!("width: {width:.0}%")) {} }
                    @if used > quota { span.warn { (used - quota) " borrowed" } }
                } @else { span.nothing { ", no limit" } }
            }
        }
    }
}

fn classes<'a>(
    used: &'a HashMap<String, u32>,
    quota: &'a HashMap<String, u32>,
) -> BTreeMap<&'a str, (u32, Option<u32>)> {
    let names = used.keys().chain(quota.keys()).map(String::as_str);
    names
        .map(|class| (class, (used.get(class).copied().unwrap_or(0), quota.get(class).copied())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_shows_what_it_uses_and_what_it_has_borrowed() {
        let queue = v1::QueueView {
            name: "team-a".to_owned(),
            quota: HashMap::from([("h100".to_owned(), 8)]),
            used: HashMap::from([("h100".to_owned(), 12)]),
            ..v1::QueueView::default()
        };
        let page = render(&[queue]).into_string();
        assert!(page.contains("12 of 8 h100") && page.contains("4 borrowed"), "{page}");
    }
}
