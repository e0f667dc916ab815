//! The report as comma-separated tables, one file for each.

use crate::report::{PolicyReport, Report};

/// Returns the files of a report, each with its name.
#[must_use]
pub fn files(report: &Report) -> Vec<(&'static str, String)> {
    vec![
        ("summary.csv", summary(report)),
        ("sizes.csv", sizes(report)),
        ("queues.csv", queues(report)),
        ("device_hours.csv", device_hours(report)),
        ("timeline.csv", timeline(report)),
    ]
}

/// Writes one line; a cell with a comma or a quote is quoted.
fn line(text: &mut String, cells: &[String]) {
    for (at, cell) in cells.iter().enumerate() {
        if at > 0 {
            text.push(',');
        }
        if cell.contains([',', '"', '\n', '\r']) {
            text.push_str(&format!("\"{}\"", cell.replace('"', "\"\"")));
        } else {
            text.push_str(cell);
        }
    }
    text.push('\n');
}

fn summary(report: &Report) -> String {
    let mut text = "policy,arrived,finished,running,waiting,impossible,wait_mean_s,wait_p50_s,wait_p90_s,\
                    wait_p99_s,completion_mean_s,completion_p50_s,completion_p90_s,completion_p99_s,\
                    makespan_h,allocation,utilization,fragmentation,effective_time,fairness,preempted,\
                    reclaimed,recalled,consolidated,resized,drained,restarts,node_failures,device_failures,\
                    software_failures,cycles\n"
        .to_owned();
    for policy in &report.policies {
        let (counts, evictions) = (&policy.counts, &policy.evictions);
        let (wait, done) = (&policy.wait, &policy.completion);
        let mut cells = vec![policy.policy.clone()];
        let impossible = policy.impossible.count;
        let whole = [counts.arrived, counts.finished, counts.running, counts.waiting, impossible];
        cells.extend(whole.map(|n| n.to_string()));
        let parts = [
            wait.mean,
            wait.p50,
            wait.p90,
            wait.p99,
            done.mean,
            done.p50,
            done.p90,
            done.p99,
            policy.makespan_hours,
            policy.allocation,
            policy.utilization,
            policy.fragmentation,
        ];
        cells.extend(parts.map(|n| n.to_string()));
        cells.push(policy.effective_time.map_or_else(String::new, |n| n.to_string()));
        cells.push(policy.fairness.to_string());
        let whole = [
            evictions.preempted,
            evictions.reclaimed,
            evictions.recalled,
            evictions.consolidated,
            evictions.resized,
            evictions.drained,
            counts.restarts,
            counts.node_failures,
            counts.device_failures,
            counts.software_failures,
            policy.cycles,
        ];
        cells.extend(whole.map(|n| n.to_string()));
        line(&mut text, &cells);
    }
    text
}

fn each(
    report: &Report,
    header: &str,
    mut rows: impl FnMut(&PolicyReport, &mut dyn FnMut(&[String])),
) -> String {
    let mut text = format!("policy,{header}\n");
    for policy in &report.policies {
        rows(policy, &mut |cells| {
            let mut all = vec![policy.policy.clone()];
            all.extend_from_slice(cells);
            line(&mut text, &all);
        });
    }
    text
}

fn sizes(report: &Report) -> String {
    let header = "ranks,started,wait_mean_s,wait_p50_s,wait_p90_s,wait_p99_s,finished,\
                  completion_mean_s,completion_p50_s,completion_p90_s,completion_p99_s,effective_time";
    each(report, header, |policy, put| {
        for size in &policy.sizes {
            let (wait, done) = (&size.wait, &size.completion);
            let mut cells = vec![size.ranks.clone(), wait.count.to_string()];
            cells.extend([wait.mean, wait.p50, wait.p90, wait.p99].map(|n| n.to_string()));
            cells.push(done.count.to_string());
            cells.extend([done.mean, done.p50, done.p90, done.p99].map(|n| n.to_string()));
            cells.push(size.effective_time.map_or_else(String::new, |n| n.to_string()));
            put(&cells);
        }
    })
}

fn queues(report: &Report) -> String {
    each(report, "queue,used_h,entitled_h,short_h", |policy, put| {
        for queue in &policy.queues {
            let hours = [queue.used_hours, queue.entitled_hours, queue.short_hours];
            let mut cells = vec![queue.queue.clone()];
            cells.extend(hours.map(|n| n.to_string()));
            put(&cells);
        }
    })
}

fn device_hours(report: &Report) -> String {
    each(report, "cause,hours,share", |policy, put| {
        for spent in &policy.device_hours {
            let cause = spent.cause.words().to_owned();
            put(&[cause, spent.hours.to_string(), spent.share.to_string()]);
        }
    })
}

fn timeline(report: &Report) -> String {
    let header =
        "hours,allocation,utilization,broken,fragmentation,wanted,jobs_waiting,jobs_placed";
    each(report, header, |policy, put| {
        for point in &policy.timeline {
            let parts = [
                point.hours,
                point.allocation,
                point.utilization,
                point.broken,
                point.fragmentation,
                point.wanted,
                point.waiting,
                point.placed,
            ];
            put(&parts.map(|n| n.to_string()));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_with_a_comma_is_quoted() {
        let mut text = String::new();
        line(&mut text, &["a,b".to_owned(), "say \"x\"".to_owned(), "c".to_owned()]);
        assert_eq!(text, "\"a,b\",\"say \"\"x\"\"\",c\n");
    }
}
