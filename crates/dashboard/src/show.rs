//! Small pieces that several pages show alike: phases, shares, times, job rows.

use drumline_types::format_duration_ms;
use drumline_wire::v1;
use maud::{Markup, html};

/// Shows a phase or a severity in its colour; the word stays, so that colour is never needed.
#[must_use]
pub fn tag(word: &str) -> Markup {
    let class = match word {
        "running" | "ready" | "succeeded" => "tag good",
        "pending" | "starting" | "restarting" | "cancelling" | "silent" | "launching"
        | "started" | "warning" => "tag warn",
        "failed" | "gone" | "error" => "tag bad",
        _ => "tag quiet",
    };
    html! { span class=(class) { (word) } }
}

/// Writes a share from 0 to 1 as percent.
#[must_use]
pub fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.0}%", share * 100.0) } else { "–".to_owned() }
}

/// Writes a number with groups of three digits.
#[must_use]
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// Writes how long ago a moment was; nothing for 0.
#[must_use]
pub fn ago(at_ms: u64, now_ms: u64) -> String {
    if at_ms == 0 { "–".to_owned() } else { format_duration_ms(now_ms.saturating_sub(at_ms)) }
}

/// Shows a job's reason and evidence in one line.
#[must_use]
pub fn reason(job: &v1::JobView) -> Markup {
    html! {
        @if !job.reason.is_empty() && job.reason != "Completed" {
            code { (job.reason) } " " (job.message)
        }
    }
}

/// Writes a job's progress.
#[must_use]
pub fn progress(job: &v1::JobView) -> String {
    match &job.training {
        Some(training) if training.steps > 0 => {
            format!("{} / {}", count(training.step), count(training.steps))
        }
        _ => match &job.service {
            Some(service) if service.ready => format!("{} running", service.running),
            _ => "–".to_owned(),
        },
    }
}

/// Shows a table of jobs, or a line that there are none.
#[must_use]
pub fn job_table(jobs: &[&v1::JobView], now_ms: u64, nothing: &str) -> Markup {
    if jobs.is_empty() {
        return html! { p.nothing { (nothing) } };
    }
    html! {
        div.scroll { table {
            thead { tr {
                th { "Job" } th.wide { "Kind" } th { "Phase" } th.n { "Ranks" } th.n.wide { "Progress" }
                th.n.wide { "Loss" } th.n.wide { "Age" } th { "Reason" }
            } }
            tbody { @for job in jobs { tr {
                td { a href={ "/jobs/" (job.id) } { (job.id) } }
                td.wide { (job.kind) }
                td { (tag(&job.phase)) }
                td.n { (job.world_size) }
                td.n.wide { (progress(job)) }
                td.n.wide {
                    @match &job.training { Some(t) if t.step > 0 => (format!("{:.3}", t.loss)), _ => "–" }
                }
                td.n.wide { (ago(job.created_ms, now_ms)) }
                td.why { (reason(job)) }
            } } }
        } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(count(7), "7");
        assert_eq!(count(1234), "1\u{202f}234");
        assert_eq!(count(1_234_567), "1\u{202f}234\u{202f}567");
    }

    #[test]
    fn what_users_wrote_is_escaped() {
        let job =
            v1::JobView { reason: "Held".into(), message: "<script>".into(), ..Default::default() };
        assert!(!reason(&job).into_string().contains("<script>"));
    }
}
