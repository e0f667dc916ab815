//! The report as one page: no script, nothing from elsewhere, readable in both colour schemes.

use crate::measure::Cause;
use crate::measure::timeline::Point;
use crate::report::plot::{Line, bars, ink, lines, part_ink};
use crate::report::{PolicyReport, Report, percent, seconds, summary};

const STYLE: &str = "\
:root{color-scheme:light dark;--ground:#fff;--text:#1c2024;--dim:#60646c;--line:#d9d9e0}\
@media(prefers-color-scheme:dark){:root{--ground:#16181b;--text:#edeef0;--dim:#b0b4ba;--line:#363a3f}}\
body{background:var(--ground);color:var(--text);font:15px/1.5 system-ui,sans-serif;max-width:960px;\
margin:2rem auto;padding:0 1rem}\
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}p{color:var(--dim);margin:.2rem 0}\
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
th,td{padding:.25rem .8rem .25rem 0;text-align:left;border-bottom:1px solid var(--line);\
white-space:nowrap}thead th{color:var(--dim);font-weight:600}tbody th{font-weight:400}\
svg{max-width:100%;height:auto}.key{display:flex;flex-wrap:wrap;gap:.2rem 1rem;color:var(--dim)}\
.key span::before{content:'';display:inline-block;width:.8em;height:.8em;border-radius:2px;\
margin-right:.4em;background:var(--ink)}";

/// Returns the report as one HTML page.
#[must_use]
pub fn html(report: &Report) -> String {
    let title = format!("{}: {} devices", report.workload, report.devices);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>{0}</title><style>{STYLE}</style></head><body>\n<h1>{0}</h1>\n\
         <p>Simulated by Drumline: {1} machines, seed {2}.</p>\n",
        escape(&title),
        report.nodes,
        report.seed
    );
    let policies = &report.policies;
    let columns: Vec<Vec<(&str, String)>> = policies.iter().map(summary).collect();
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    if let Some(first) = columns.first() {
        for (at, (name, _)) in first.iter().enumerate() {
            let cells = columns.iter().filter_map(|column| Some(column.get(at)?.1.clone()));
            rows.push(((*name).to_owned(), cells.collect()));
        }
    }
    section(&mut page, "Summary", "");
    table(&mut page, policies, &rows);
    section(&mut page, "Where the device-hours went", "Every device-hour once.");
    let stacked: Vec<(String, Vec<f64>)> = policies
        .iter()
        .map(|policy| {
            let parts = policy.device_hours.iter().map(|spent| spent.share).collect();
            (policy.policy.clone(), parts)
        })
        .collect();
    page.push_str(&bars(&stacked).unwrap_or_default());
    let words = Cause::ALL.into_iter().enumerate();
    key(&mut page, words.map(|(at, cause)| (part_ink(at), cause.words().to_owned())));
    let rows: Vec<(String, Vec<String>)> = Cause::ALL
        .into_iter()
        .map(|cause| {
            let cell = |policy: &PolicyReport| {
                let spent = policy.device_hours.iter().find(|spent| spent.cause == cause);
                spent.map_or_else(String::new, |spent| {
                    format!("{:.1} h, {}", spent.hours, percent(spent.share))
                })
            };
            (cause.words().to_owned(), policies.iter().map(cell).collect())
        })
        .collect();
    table(&mut page, policies, &rows);
    over_time(&mut page, policies);
    section(
        &mut page,
        "Wait and effective training time by size",
        "Mean / p99 of the wait, and time in which work was done that was kept over time since the first start.",
    );
    by_key(&mut page, policies, |policy| {
        let cell = |size: &crate::report::SizeReport| {
            let effective = size.effective_time.map_or("-".to_owned(), percent);
            let (mean, p99) = (seconds(size.wait.mean), seconds(size.wait.p99));
            (format!("{} ranks", size.ranks), format!("{mean} / {p99}, {effective}"))
        };
        policy.sizes.iter().map(cell).collect()
    });
    section(
        &mut page,
        "Queues",
        "Device-hours used of those that the queue was entitled to, and those that it wanted, was entitled to and did not get.",
    );
    by_key(&mut page, policies, |policy| {
        let cell = |queue: &crate::measure::Share| {
            let (used, entitled) = (queue.used_hours, queue.entitled_hours);
            let text = format!("{used:.0} of {entitled:.0}, short {:.0}", queue.short_hours);
            (queue.queue.clone(), text)
        };
        policy.queues.iter().map(cell).collect()
    });
    if policies.iter().any(|policy| !policy.reasons.is_empty()) {
        section(&mut page, "What waiting jobs were told", "By time.");
        by_key(&mut page, policies, |policy| {
            let told = policy.reasons.iter();
            told.map(|told| (told.reason.token().to_owned(), percent(told.share))).collect()
        });
    }
    if let Some(first) = policies.first().filter(|policy| policy.impossible.count > 0) {
        section(
            &mut page,
            "Jobs that can never start",
            &format!("{} in all.", first.impossible.count),
        );
        let items = first.impossible.names.iter();
        let items: String = items.map(|name| format!("<li>{}</li>", escape(name))).collect();
        page.push_str(&format!("<ul>{items}</ul>\n"));
    }
    page.push_str("</body></html>\n");
    page
}

fn over_time(page: &mut String, policies: &[PolicyReport]) {
    type Part = fn(&Point) -> f64;
    let plots: [(&str, &str, Part, bool); 5] = [
        ("Allocation", "devices held", |point| point.allocation, true),
        ("Utilization", "devices that work", |point| point.utilization, true),
        (
            "Fragmentation of idle devices",
            "on partly used machines",
            |point| point.fragmentation,
            true,
        ),
        ("Demand that waits", "devices wanted / devices", |point| point.wanted, true),
        ("Jobs that wait", "jobs", |point| point.waiting, false),
    ];
    for (title, y_name, part, is_percent) in plots {
        let series: Vec<Line> = policies
            .iter()
            .map(|policy| Line {
                name: policy.policy.clone(),
                points: policy.timeline.iter().map(|point| (point.hours, part(point))).collect(),
            })
            .collect();
        // Demand may be many times the fleet: then the axis says it in numbers.
        let most = series.iter().flat_map(|line| &line.points).map(|(_, y)| *y).fold(0.0, f64::max);
        if let Some(svg) = lines(&series, y_name, is_percent && most <= 1.0) {
            section(page, title, "");
            page.push_str(&svg);
            let names = series.into_iter().enumerate();
            key(page, names.map(|(at, line)| (ink(at), line.name)));
        }
    }
}

fn section(page: &mut String, title: &str, about: &str) {
    page.push_str(&format!("\n<h2>{}</h2>\n", escape(title)));
    if !about.is_empty() {
        page.push_str(&format!("<p>{}</p>\n", escape(about)));
    }
}

fn key(page: &mut String, items: impl Iterator<Item = (String, String)>) {
    let item = |(ink, name): (String, String)| {
        format!("<span style=\"--ink:{ink}\">{}</span>", escape(&name))
    };
    page.push_str(&format!("\n<div class=\"key\">{}</div>\n", items.map(item).collect::<String>()));
}

fn by_key(
    page: &mut String,
    policies: &[PolicyReport],
    cells: impl Fn(&PolicyReport) -> Vec<(String, String)>,
) {
    let columns: Vec<Vec<(String, String)>> = policies.iter().map(cells).collect();
    let mut names: Vec<String> = Vec::new();
    for (name, _) in columns.iter().flatten() {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    let value = |column: &Vec<(String, String)>, name: &String| {
        let found = column.iter().find(|(known, _)| known == name);
        found.map_or("-".to_owned(), |(_, value)| value.clone())
    };
    let rows: Vec<(String, Vec<String>)> = names
        .into_iter()
        .map(|name| {
            let cells = columns.iter().map(|column| value(column, &name)).collect();
            (name, cells)
        })
        .collect();
    table(page, policies, &rows);
}

fn table(page: &mut String, policies: &[PolicyReport], rows: &[(String, Vec<String>)]) {
    page.push_str("<div class=\"scroll\"><table><thead><tr><th></th>");
    for policy in policies {
        page.push_str(&format!("<th scope=\"col\">{}</th>", escape(&policy.policy)));
    }
    page.push_str("</tr></thead><tbody>\n");
    for (name, cells) in rows {
        page.push_str(&format!("<tr><th scope=\"row\">{}</th>", escape(name)));
        cells.iter().for_each(|cell| page.push_str(&format!("<td>{}</td>", escape(cell))));
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table></div>\n");
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
