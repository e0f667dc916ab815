//! The report for people: one column for each policy.

use crate::measure::Cause;
use crate::report::{PolicyReport, Report, percent, seconds, summary};

/// Returns the report as aligned text.
#[must_use]
pub fn table(report: &Report) -> String {
    let mut text = format!(
        "{} (seed {}): {} machines, {} devices\n\n",
        report.workload, report.seed, report.nodes, report.devices
    );
    let policies = &report.policies;
    let mut rows: Vec<Vec<String>> = Vec::new();
    let columns: Vec<Vec<(&str, String)>> = policies.iter().map(summary).collect();
    if let Some(first) = columns.first() {
        for (at, (name, _)) in first.iter().enumerate() {
            let cells = columns.iter().filter_map(|column| column.get(at));
            rows.push(row(name, cells.map(|(_, value)| value.clone())));
        }
    }
    text.push_str(&aligned("", policies, &rows));
    text.push_str("\nWhere the device-hours went\n\n");
    let rows: Vec<Vec<String>> = Cause::ALL
        .into_iter()
        .map(|cause| {
            let cell = |policy: &PolicyReport| {
                let spent = policy.device_hours.iter().find(|spent| spent.cause == cause);
                spent.map_or_else(String::new, |spent| {
                    format!("{:.1} ({})", spent.hours, percent(spent.share))
                })
            };
            row(cause.words(), policies.iter().map(cell))
        })
        .collect();
    text.push_str(&aligned("", policies, &rows));
    if policies.iter().any(|policy| policy.queues.len() > 1) {
        text.push_str("\nHours used of hours entitled to\n\n");
        text.push_str(&aligned("", policies, &queues(policies)));
    }
    text.push_str("\nWait by ranks: mean / p99, and effective training time\n\n");
    text.push_str(&aligned("", policies, &sizes(policies)));
    if policies.iter().any(|policy| !policy.reasons.is_empty()) {
        text.push_str("\nWhat waiting jobs were told, by time\n\n");
        text.push_str(&aligned("", policies, &reasons(policies)));
    }
    let names: Vec<&String> =
        policies.first().map(|policy| policy.impossible.names.iter().collect()).unwrap_or_default();
    if !names.is_empty() {
        text.push_str("\nCan never start\n\n");
        names.iter().for_each(|name| text.push_str(&format!("{name}\n")));
    }
    text
}

fn row(name: &str, cells: impl Iterator<Item = String>) -> Vec<String> {
    std::iter::once(name.to_owned()).chain(cells).collect()
}

/// Collects the keys of all policies in the order in which they first appear.
fn keys<'a>(lists: impl Iterator<Item = Vec<&'a str>>) -> Vec<&'a str> {
    let mut keys: Vec<&str> = Vec::new();
    for key in lists.flatten() {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys
}

fn queues(policies: &[PolicyReport]) -> Vec<Vec<String>> {
    let names = keys(policies.iter().map(|p| p.queues.iter().map(|q| q.queue.as_str()).collect()));
    let cell = |policy: &PolicyReport, name: &str| {
        let share = policy.queues.iter().find(|share| share.queue == name);
        share.map_or_else(String::new, |share| {
            format!("{:.0} of {:.0}", share.used_hours, share.entitled_hours)
        })
    };
    names.iter().map(|name| row(name, policies.iter().map(|p| cell(p, name)))).collect()
}

fn sizes(policies: &[PolicyReport]) -> Vec<Vec<String>> {
    let names = keys(policies.iter().map(|p| p.sizes.iter().map(|s| s.ranks.as_str()).collect()));
    let cell = |policy: &PolicyReport, name: &str| {
        let size = policy.sizes.iter().find(|size| size.ranks == name);
        size.map_or_else(String::new, |size| {
            let effective = size.effective_time.map_or("-".to_owned(), percent);
            format!("{} / {}, {effective}", seconds(size.wait.mean), seconds(size.wait.p99))
        })
    };
    names.iter().map(|name| row(name, policies.iter().map(|p| cell(p, name)))).collect()
}

fn reasons(policies: &[PolicyReport]) -> Vec<Vec<String>> {
    let tokens =
        keys(policies.iter().map(|p| p.reasons.iter().map(|r| r.reason.token()).collect()));
    let cell = |policy: &PolicyReport, token: &str| {
        let share = policy.reasons.iter().find(|share| share.reason.token() == token);
        share.map_or_else(String::new, |share| percent(share.share))
    };
    tokens.iter().map(|token| row(token, policies.iter().map(|p| cell(p, token)))).collect()
}

fn aligned(corner: &str, policies: &[PolicyReport], rows: &[Vec<String>]) -> String {
    let header = row(corner, policies.iter().map(|policy| policy.policy.to_uppercase()));
    let width = |column: usize| {
        let cells = rows.iter().chain([&header]).filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut text = String::new();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let cell = if cell.is_empty() && !std::ptr::eq(row, &header) { "-" } else { cell };
            line.push_str(cell);
            line.push_str(&" ".repeat(width + 2 - cell.chars().count()));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
