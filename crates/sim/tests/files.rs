//! Workload files and traces: what is wrong is refused with file, line, column and what was
//! expected.

mod support;

use drumline_sim::trace::{TraceOptions, openb};
use drumline_sim::{Scenario, Workload};
use drumline_types::JobId;
use support::play;

const GOOD: &str = r#"name = "w"
lasts = "1d"
fleet = [{ nodes = 4, devices = 8, model = "m", levels = [{ name = "rack", nodes = 2 }] }]
arrivals = { load = 0.5 }
[[queues]]
name = "a"
[[classes]]
name = "c"
queues = ["a"]
sizes = [[8, 1.0]]
nodeGroup = 4
duration = { median = "1h" }
topology = [{ level = "rack" }]
"#;

#[test]
fn a_wrong_workload_is_refused_with_its_place() {
    assert!(Workload::read("w.toml", GOOD).is_ok());
    for (from, to, wrong) in [
        (
            "lasts = \"1d\"",
            "lasts = \"1 day\"",
            "w.toml:2:9: invalid value: string \"1 day\", expected a duration with its unit, such as \"30s\", \"1h30m\" or \"30d\"",
        ),
        (
            "lasts = \"1d\"",
            "lasts = 5",
            "w.toml:2:9: invalid type: integer `5`, expected a duration with its unit",
        ),
        ("lasts", "last", "w.toml:2:1: unknown field `last`, expected one of"),
        (
            "nodes = 4",
            "nodes = 0",
            "w.toml:3:20: invalid value: integer `0`, expected a whole number from 1 to 100000000",
        ),
        (
            "load = 0.5",
            "load = -1",
            "w.toml:4:21: invalid value: integer `-1`, expected a number from 0 to 100000000",
        ),
        ("load = 0.5", "", "w.toml:1:1: arrivals: expected `jobs` or `load`"),
        (
            "load = 0.5",
            "load = 0.5, process = \"wild\"",
            "w.toml:4:36: unknown variant `wild`, expected one of",
        ),
        ("[\"a\"]", "[\"b\"]", "w.toml:9:11: expected a queue of this file, found \"b\""),
        ("[[8, 1.0]]", "[[6, 1.0]]", "w.toml:10:9: expected multiples of nodeGroup 4, found 6"),
        ("[[8, 1.0]]", "[]", "w.toml:10:9: expected pairs of ranks and weight"),
        (
            "level = \"rack\"",
            "level = \"row\"",
            "w.toml:13:23: expected a level of the fleet, or \"node\", found \"row\"",
        ),
        (
            "name = \"a\"",
            "name = \"a\"\nparent = \"z\"",
            "w.toml:7:10: expected a queue of this file, found \"z\"",
        ),
        ("name = \"a\"", "name = \"a\"\nparent = \"a\"", "w.toml:7:10: queue a is above itself"),
        (
            "name = \"c\"",
            "name = \"C\"",
            "w.toml:8:8: expected a name of at most 40 characters of a-z, 0-9 and '-', found \"C\"",
        ),
        ("name = \"w\"", "name = w", "w.toml:1:8: "),
    ] {
        let text = GOOD.replacen(from, to, 1);
        assert_ne!(text, GOOD, "{from}");
        let fault = Workload::read("w.toml", &text).map(|_| ()).unwrap_err().to_string();
        assert!(fault.starts_with(wrong), "found    {fault}\nexpected {wrong}");
    }
}

#[test]
fn jobs_and_load_together_stretch_durations_so_that_both_come_true() {
    let text = GOOD
        .replace("load = 0.5", "load = 0.5, jobs = 300")
        .replace("\"1h\"", "\"1h\", sigma = 0.5");
    let scenario = Scenario::of(&Workload::read("w.toml", &text).unwrap(), 1);
    let jobs: Vec<_> = scenario.jobs.iter(1).collect();
    assert_eq!(jobs.len(), 300);
    let asked: u64 = jobs.iter().map(|job| u64::from(job.gang.ranks) * job.work_ms).sum();
    let load = asked as f64 / (32.0 * 86_400_000.0);
    assert!((load - 0.5).abs() < 0.05, "{load}");
    let ordered = jobs.windows(2).all(|pair| pair[0].arrives <= pair[1].arrives);
    assert!(ordered, "jobs come in the order of their arrival");
}

const NODES: &str =
    "sn,cpu_milli,memory_mib,gpu,model\nn-1,8000,16384,2,T4\nn-0,8000,16384,2,V100\n";
const PODS: &str = "\
name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time
p-0,1000,1024,1,1000,,LS,Running,100,400,110
p-1,1000,1024,2,1000,T4,BE,Failed,110,410,110
p-2,1000,1024,8,1000,,BE,Pending,120,500,
p-3,1000,1024,0,0,,BE,Pending,130,230,
p-4,1000,1024,1,500,A100,BE,Pending,131,500,
";

const OPTIONS: TraceOptions = TraceOptions { speed: 1.0, start_ms: 1000, cycle_ms: 1000, seed: 1 };

fn trace(nodes: &str, pods: &str) -> Result<Scenario, String> {
    openb("t", ("n.csv", nodes), ("p.csv", pods), &OPTIONS).map_err(|fault| fault.to_string())
}

#[test]
fn a_trace_is_simulated_and_rows_that_never_fit_are_named() {
    let scenario = trace(NODES, PODS).unwrap();
    let jobs: Vec<(JobId, u64, u64)> =
        scenario.jobs.iter(1).map(|job| (job.id, job.arrives, job.work_ms)).collect();
    let job = |name: &str, arrives, works| (name.parse().unwrap(), arrives, works);
    assert_eq!(
        jobs,
        [
            job("p-0", 0, 290_000),
            job("p-1", 10_000, 300_000),
            job("p-2", 20_000, 380_000),
            job("p-3", 30_000, 100_000),
            job("p-4", 31_000, 369_000),
        ]
    );
    let report = play(&scenario, "drumline", &mut drumline_sim::world::Nobody);
    assert_eq!(report.counts.finished, 3, "{report:#?}");
    assert_eq!((report.counts.waiting, report.impossible.count), (2, 2));
    assert!(report.impossible.names[0].starts_with("p-2: wants 8 ranks in groups of 8 on gpu"));
    assert!(
        report.impossible.names[1].starts_with("p-4: wants 1 ranks in groups of 1 on a model that")
    );
}

#[test]
fn a_wrong_trace_is_refused_with_its_place() {
    for (from, to, wrong) in [
        ("creation_time", "created", "p.csv:1:1: expected a column named creation_time"),
        (
            ",100,400,",
            ",x,400,",
            "p.csv:2:34: expected seconds since the start of the trace, found \"x\"",
        ),
        (
            ",100,400,110",
            ",100,90,110",
            "p.csv:2:38: expected a deletion that is no earlier than the start, found \"90\"",
        ),
        ("p-1,", "p-0,", "p.csv:3:1: expected a name that no other row has, found \"p-0\""),
        (",130,230,", ",130", "p.csv:5:"),
        ("p-0,1000", "p-0,many", "p.csv:2:5: expected thousandths of a core"),
    ] {
        let text = PODS.replacen(from, to, 1);
        let fault = trace(NODES, &text).map(|_| ()).unwrap_err();
        assert!(fault.starts_with(wrong), "found    {fault}\nexpected {wrong}");
    }
    let fault = trace(&NODES.replace("n-0", "n-1"), PODS).map(|_| ()).unwrap_err();
    assert_eq!(fault, "n.csv:1:1: expected each node once, found n-1 twice");
}
