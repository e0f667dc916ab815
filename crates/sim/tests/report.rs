//! The forms of a report: a table, CSV files and a web page, from figures that are made up.

use drumline_sim::Report;
use drumline_sim::measure::timeline::Point;
use drumline_sim::measure::{Cause, Share, Stats};
use drumline_sim::report::{
    Counts, Ending, Evictions, Impossible, LostHours, PolicyReport, ReasonShare, SizeReport, files,
    html, table,
};
use drumline_types::Reason;

fn policy(name: &str, scale: f64, ending: Ending) -> PolicyReport {
    let stats = |mean: f64| Stats {
        count: 40,
        mean: mean * scale,
        p50: mean * scale / 2.0,
        p90: mean * scale * 3.0,
        p99: mean * scale * 9.0,
        max: mean * scale * 10.0,
    };
    let hours = [500.0, 4.0, 3.0, 2.5, 12.0, 6.0, 1.0, 0.5, 11.0, 60.0, 168.0];
    let point = |hours: f64| Point {
        hours,
        allocation: 0.75 / scale,
        utilization: 0.7 / scale,
        broken: 0.01,
        fragmentation: 0.2 * scale,
        wanted: 0.4 * scale,
        waiting: 12.0 * scale,
        placed: 30.0,
    };
    PolicyReport {
        policy: name.to_owned(),
        ending,
        simulated_hours: 24.0,
        makespan_hours: 26.5 * scale,
        counts: Counts {
            arrived: 42,
            finished: 39,
            running: 1,
            waiting: 2,
            restarts: 5,
            checkpoints: 120,
            node_failures: 3,
            device_failures: 2,
            software_failures: 1,
        },
        impossible: Impossible {
            count: 2,
            names: vec!["gang-7: wants 64 ranks, \"all\" <of> them".to_owned()],
        },
        never_started: vec!["gang-7".to_owned(), "gang-9".to_owned()],
        wait: stats(300.0),
        completion: stats(4000.0),
        sizes: vec![
            SizeReport {
                ranks: "1".to_owned(),
                wait: stats(10.0),
                completion: stats(2000.0),
                effective_time: Some(0.99 / scale),
            },
            SizeReport {
                ranks: "9-64".to_owned(),
                wait: stats(900.0),
                completion: stats(9000.0),
                effective_time: None,
            },
        ],
        allocation: 0.75 / scale,
        utilization: 0.7 / scale,
        fragmentation: 0.2 * scale,
        effective_time: Some(0.95 / scale),
        device_hours: Cause::ALL
            .into_iter()
            .zip(hours)
            .map(|(cause, hours)| LostHours { cause, hours, share: hours / 768.0 })
            .collect(),
        capacity_hours: 768.0,
        evictions: Evictions {
            preempted: 4,
            reclaimed: 2,
            recalled: 0,
            consolidated: 1,
            resized: 0,
            drained: 0,
        },
        fairness: 0.97 / scale,
        queues: ["research", "product"]
            .into_iter()
            .map(|queue| Share {
                queue: queue.to_owned(),
                used_hours: 260.0 / scale,
                entitled_hours: 280.0,
                short_hours: 20.0 * scale,
            })
            .collect(),
        reasons: vec![
            ReasonShare { reason: Reason::WaitingForQuota, share: 0.25 },
            ReasonShare { reason: Reason::WaitingForDevices, share: 0.75 },
        ],
        cycles: 1000,
        considered: 5000,
        timeline: (0..24).map(|hour| point(f64::from(hour))).collect(),
        seconds: 0.5,
    }
}

fn report() -> Report {
    Report {
        workload: "made-up".to_owned(),
        seed: 7,
        nodes: 4,
        devices: 32,
        policies: vec![
            policy("drumline", 1.0, Ending::Done),
            policy("a <b> & c", 1.25, Ending::Stopped),
        ],
    }
}

#[test]
fn the_table_has_a_column_for_each_policy() {
    insta::assert_snapshot!(table(&report()));
}

#[test]
fn the_files_are_rectangular() {
    let files = files(&report());
    for (name, text) in &files {
        // Commas within quotes are part of a cell.
        let columns = |line: &str| {
            line.split('"').step_by(2).map(|part| part.matches(',').count()).sum::<usize>()
        };
        let header = columns(text.lines().next().unwrap());
        assert!(text.lines().count() > 2, "{name}");
        assert!(text.lines().all(|line| columns(line) == header), "{name}:\n{text}");
    }
    let small: Vec<String> = files
        .iter()
        .filter(|(name, _)| *name != "timeline.csv")
        .map(|(name, text)| format!("{name}\n{text}"))
        .collect();
    insta::assert_snapshot!(small.join("\n"));
}

#[test]
fn the_page_has_its_plots_and_nothing_from_elsewhere() {
    let page = html(&report());
    assert_eq!(page.matches("<svg").count(), 6, "five plots over time, and the hours");
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    for never in ["<script", "<link", "@import", "url(", "<b>", "<of>", "NaN", "inf"] {
        assert!(!page.contains(never), "{never}");
    }
    let elsewhere = page.replace("http://www.w3.org/2000/svg", "");
    assert!(!elsewhere.contains("http"), "nothing is loaded");
    assert!(page.contains("a &lt;b&gt; &amp; c") && page.contains("&quot;all&quot; &lt;of&gt;"));
    for cause in Cause::ALL {
        assert!(page.contains(cause.words()), "{cause:?}");
    }
    let empty = html(&Report { policies: Vec::new(), ..report() });
    assert!(empty.ends_with("</html>\n"));
}
