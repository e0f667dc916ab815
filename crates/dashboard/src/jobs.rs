//! The list of jobs.

use drumline_wire::v1;
use maud::{Markup, html};

use crate::show::job_table;

/// Renders the page's main part.
#[must_use]
pub fn render(list: &v1::ListJobsResponse, now_ms: u64) -> Markup {
    let (old, active): (Vec<&v1::JobView>, Vec<&v1::JobView>) =
        list.jobs.iter().partition(|job| job.has_ended());
    html! {
        h1 { "Jobs" }
        section.panel {
            h2 { "Active" }
            (job_table(&active, now_ms, "Nothing runs and nothing waits."))
        }
        section.panel {
            h2 { "Ended" }
            (job_table(&old, now_ms, "No job has ended yet."))
            @if list.truncated { p.nothing { "Older jobs are left out here; see " code { "drumline jobs" } "." } }
        }
    }
}
