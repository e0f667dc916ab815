//! Simulations of small fleets: what is known beforehand comes out, nothing is lost, and the same
//! seed gives the same report.

mod support;

use drumline_sim::measure::Cause;
use drumline_sim::report::Ending;
use drumline_sim::{POLICIES, PolicyReport, Preset, Scenario};
use proptest::prelude::*;
use support::{Audit, play, simulate, workload};

fn spent(report: &PolicyReport, cause: Cause) -> f64 {
    report.device_hours.iter().find(|spent| spent.cause == cause).map_or(0.0, |spent| spent.hours)
}

const ONE_GANG: &str = r#"
name = "one gang"
lasts = "10h"
fleet = [{ nodes = 2, devices = 8, model = "h100" }]
arrivals = { process = "at-once", jobs = 1 }
[[classes]]
name = "train"
sizes = [[16, 1.0]]
nodeGroup = 8
duration = { median = "2h" }
start = "60s"
checkpoint = { every = "30m", cost = "30s" }
"#;

#[test]
fn one_gang_takes_its_start_its_work_and_its_pauses() {
    let report = simulate(ONE_GANG, "drumline", 1);
    assert_eq!((report.ending, report.counts.finished), (Ending::Done, 1));
    assert_eq!(report.wait.max, 0.0);
    // Three pauses: the fourth checkpoint would be at the end.
    assert_eq!(report.completion.max, 60.0 + 7200.0 + 3.0 * 30.0);
    assert_eq!(spent(&report, Cause::Useful), 32.0);
    assert_eq!(spent(&report, Cause::Startup), 16.0 / 60.0);
    assert_eq!(spent(&report, Cause::Checkpoint), 16.0 * 90.0 / 3600.0);
    assert_eq!(report.allocation, 1.0);
    assert_eq!(report.effective_time, Some(7200.0 / 7350.0));
}

#[test]
fn two_gangs_that_want_everything_run_one_after_the_other() {
    let text = ONE_GANG.replace("jobs = 1", "jobs = 2");
    let report = simulate(&text, "drumline", 1);
    assert_eq!(report.counts.finished, 2);
    assert!((report.makespan_hours * 3600.0 - 2.0 * 7350.0).abs() < 1e-6);
    assert_eq!(report.wait.max, 7350.0);
    assert!(spent(&report, Cause::IdleFragmented) == 0.0, "nothing was idle");
}

/// A gang on machines that fail, against the expected effective time of Kokolis et al. 2024
/// ("Revisiting Reliability in Large-Scale Machine Learning Research Clusters"): with N nodes,
/// r failures per node and time, checkpoints of cost w each dt, and restarts of u0, about
/// (1 - N r (u0 + dt / 2)) / (1 + w / dt).
#[test]
fn the_effective_time_of_a_big_gang_is_what_theory_says() {
    let text = r#"
name = "theory"
lasts = "60d"
after = "stop"
fleet = [{ nodes = 66, devices = 8, model = "h100" }]
arrivals = { process = "at-once", jobs = 1 }
classes = [{ name = "train", sizes = [[512, 1.0]], nodeGroup = 8, duration = { median = "3000d", most = "3000d" }, start = "5m", restart = "5m", checkpoint = { every = "20m", cost = "30s" } }]
failures = { softwarePerNodeDay = 0.05, detect = "60s" }
"#;
    let (mut found, seeds) = (0.0, 4);
    for seed in 0..seeds {
        let report = simulate(text, "drumline", seed);
        assert_eq!(report.ending, Ending::Lasted);
        found += report.effective_time.unwrap() / seeds as f64;
    }
    let per_minute = 64.0 * 0.05 / 1440.0;
    let theory = (1.0 - per_minute * (6.0 + 10.0)) / (1.0 + 0.5 / 20.0);
    assert!((found - theory).abs() < 0.005, "found {found}, expected {theory}");
}

const BUSY: &str = r#"
name = "busy"
lasts = "12h"
fleet = [{ nodes = 12, devices = 4, model = "a100", levels = [{ name = "rack", nodes = 4 }] }]
[arrivals]
load = 1.2
batch = 2
[[queues]]
name = "a"
weight = 2
quota = { gpu = 24 }
[[queues]]
name = "b"
quota = { gpu = 24 }
[[classes]]
name = "small"
share = 0.8
queues = ["a", "b"]
sizes = [[1, 0.7], [2, 0.3]]
nodeGroup = 2
duration = { median = "10m", sigma = 1.0, most = "3h" }
estimate = { sigma = 0.5, missing = 0.3 }
[[classes]]
name = "gang"
share = 0.2
priority = 10
queues = ["a", "b"]
sizes = [[8, 0.6], [16, 0.4]]
nodeGroup = 4
duration = { median = "30m", sigma = 0.5, most = "3h" }
checkpoint = { every = "auto", cost = "10s" }
topology = [{ level = "rack" }]
[failures]
nodePerDay = 0.4
devicePerDay = 0.1
softwarePerNodeDay = 0.2
nodeRepair = "1h"
deviceRepair = "2h"
lemons = 0.2
lemonFactor = 4
"#;

/// What must hold of every report, whatever happened.
fn check(report: &PolicyReport, devices: f64) {
    let counts = &report.counts;
    assert_eq!(counts.arrived, counts.finished + counts.running + counts.waiting, "{counts:?}");
    let hours: f64 = report.device_hours.iter().map(|spent| spent.hours).sum();
    let there = devices * report.simulated_hours;
    assert!((hours - there).abs() <= 1e-6 * there.max(1.0), "{hours} of {there} device-hours");
    assert!((report.capacity_hours - there).abs() <= 1e-6 * there.max(1.0));
    let held: f64 = [
        Cause::Useful,
        Cause::Startup,
        Cause::Restart,
        Cause::Checkpoint,
        Cause::LostToFailure,
        Cause::LostToEviction,
        Cause::Stalled,
        Cause::Leaving,
    ]
    .into_iter()
    .map(|cause| spent(report, cause))
    .sum();
    let allocated = report.allocation * there;
    assert!((held - allocated).abs() <= 1e-6 * there.max(1.0), "{held} of {allocated}");
    assert!(report.utilization <= report.allocation + 1e-9);
    assert_eq!(report.wait.count + not_started(report), counts.arrived);
    assert_eq!(report.completion.count, counts.finished);
}

/// Jobs that never started: those that wait, less those that wait to start again.
fn not_started(report: &PolicyReport) -> u64 {
    report.counts.arrived - report.wait.count
}

#[test]
fn failures_cost_what_is_booked_and_every_job_comes_to_its_end() {
    let scenario = Scenario::of(&workload(BUSY), 3);
    let mut audit = Audit::default();
    let report = play(&scenario, "drumline", &mut audit);
    assert_eq!(report.ending, Ending::Done);
    assert_eq!(report.counts.finished, report.counts.arrived);
    assert!(report.counts.node_failures > 0 && report.counts.device_failures > 0);
    assert!(report.counts.software_failures > 0);
    assert!(report.counts.restarts > 0 && spent(&report, Cause::LostToFailure) > 0.0);
    assert!(audit.checked == report.cycles && audit.starts >= report.counts.finished);
    check(&report, 48.0);
}

#[test]
fn every_policy_meets_the_same_arrivals_and_the_same_failures() {
    let scenario = Scenario::of(
        &workload(&BUSY.replace("lasts = \"12h\"", "lasts = \"6h\"\nafter = \"stop\"")),
        5,
    );
    let reports: Vec<PolicyReport> =
        POLICIES.iter().map(|(name, _)| play(&scenario, name, &mut Audit::default())).collect();
    for report in &reports {
        check(report, 48.0);
        let met = |report: &PolicyReport| {
            (report.counts.arrived, report.counts.node_failures, report.counts.device_failures)
        };
        assert_eq!(met(report), met(&reports[0]), "{}", report.policy);
    }
}

#[test]
fn the_same_seed_gives_the_same_report_to_the_last_bit() {
    let run = |seed| {
        let report = play(&Scenario::of(&workload(BUSY), seed), "drumline", &mut Audit::default());
        serde_json::to_string(&report).unwrap()
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

#[test]
fn a_job_that_can_never_fit_is_counted_and_named() {
    let text = BUSY.replace("[[8, 0.6], [16, 0.4]]", "[[8, 0.6], [64, 0.4]]");
    let report = simulate(&text, "drumline", 3);
    assert_eq!(report.ending, Ending::Stuck);
    assert!(report.impossible.count > 0);
    assert!(report.impossible.names[0].starts_with("gang-"), "{}", report.impossible.names[0]);
    let why = "wants 64 ranks in groups of 4 on gpu; the fleet could hold 48";
    assert!(report.impossible.names[0].ends_with(why), "{}", report.impossible.names[0]);
    assert_eq!(report.counts.waiting, report.impossible.count, "all others have ended");
    check(&report, 48.0);
}

#[test]
fn a_simulation_that_is_stopped_tells_what_is_known_so_far() {
    use std::sync::atomic::AtomicBool;
    let scenario = Scenario::of(&workload(BUSY), 3);
    let stop = AtomicBool::new(true);
    let mut told = 0;
    let mut progress = |_: &drumline_sim::Status| told += 1;
    let mut limits = drumline_sim::Limits { stop: &stop, progress: &mut progress };
    let policy = drumline_sim::Policy::named("drumline", 3).unwrap();
    let nobody = &mut drumline_sim::world::Nobody;
    let report = drumline_sim::run(&scenario, &policy, nobody, &mut limits).unwrap();
    assert_eq!((report.ending, told), (Ending::Stopped, 1));
    assert!(report.simulated_hours > 0.0 && report.simulated_hours < 12.0);
    check(&report, 48.0);
}

#[test]
fn the_small_presets_run_to_their_end() {
    let preset = Preset::named("small").unwrap();
    let report = play(&Scenario::of(&workload(preset.text), 1), "drumline", &mut Audit::default());
    assert_eq!((report.ending, report.counts.finished), (Ending::Done, 400));
    check(&report, 128.0);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) })]

    /// Whatever the fleet, the sizes and the failures: the audit accepts every plan, every
    /// device-hour is booked once, and no job is lost.
    #[test]
    fn nothing_is_lost_in_any_small_fleet(
        nodes in 1u32..10,
        devices in prop::sample::select(vec![1u32, 2, 4, 8]),
        jobs in 1u32..60,
        load in 0.2f64..2.5,
        group in prop::sample::select(vec![1u32, 2, 4]),
        gang in 1u32..5,
        fails in 0.0f64..2.0,
        elastic in any::<bool>(),
        saves in prop::sample::select(vec!["", "checkpoint = { every = \"7m\", cost = \"11s\" }"]),
        policy in prop::sample::select(POLICIES.iter().map(|(name, _)| *name).collect::<Vec<_>>()),
        seed in 0u64..1000,
    ) {
        let elastic = if elastic { "elastic = { least = 0.5, most = 2 }" } else { "" };
        let text = format!(r#"
name = "any"
lasts = "5h"
fleet = [{{ nodes = {nodes}, devices = {devices}, model = "m", levels = [{{ name = "rack", nodes = 2 }}] }}]
arrivals = {{ jobs = {jobs}, load = {load} }}
[[classes]]
name = "one"
sizes = [[1, 0.6], [{group}, 0.4]]
nodeGroup = {group}
duration = {{ median = "12m", sigma = 1.0, most = "2h" }}
estimate = {{ sigma = 0.7, missing = 0.3 }}
[[classes]]
name = "gang"
priority = 5
sizes = [[{wide}, 1.0]]
nodeGroup = {group}
duration = {{ median = "20m", sigma = 0.7, most = "2h" }}
{saves}
{elastic}
[failures]
nodePerDay = {fails}
devicePerDay = {fails}
softwarePerNodeDay = {fails}
nodeRepair = "20m"
deviceRepair = "30m"
"#, wide = group * gang);
        let scenario = Scenario::of(&workload(&text), seed);
        let report = play(&scenario, policy, &mut Audit::default());
        check(&report, f64::from(nodes * devices));
        // What waits in the end either never fits, or waits behind such a job.
        if report.counts.waiting > 0 {
            prop_assert!(report.impossible.count > 0 , "{:?} {:?}", report.ending, report.never_started);
        }
    }
}
