//! A recorded simulation is replayed to the same decisions; broken files are refused with their
//! place.

mod support;

use std::io::Write;

use drumline_sim::Scenario;
use drumline_sim::record::Recorder;
use drumline_sim::replay::{
    Decision, Entry, Expected, ReplayError, log_line, read_log, read_snapshot, replay, text,
};
use drumline_types::Timestamp;
use support::{play, workload};

const BUSY: &str = r#"
name = "busy"
lasts = "4h"
after = "stop"
fleet = [{ nodes = 8, devices = 4, model = "a100", levels = [{ name = "rack", nodes = 4 }] }]
arrivals = { load = 1.5 }
[[queues]]
name = "a"
quota = { gpu = 16 }
[[queues]]
name = "b"
quota = { gpu = 16 }
[[classes]]
name = "small"
share = 0.8
queues = ["a", "b"]
sizes = [[1, 0.7], [2, 0.3]]
duration = { median = "10m", sigma = 1.0, most = "3h" }
[[classes]]
name = "gang"
share = 0.2
priority = 10
queues = ["a", "b"]
sizes = [[8, 1.0]]
nodeGroup = 4
duration = { median = "30m", sigma = 0.5, most = "3h" }
checkpoint = { every = "10m", cost = "10s" }
[failures]
nodePerDay = 0.5
nodeRepair = "30m"
"#;

/// Records a simulation from a moment on: snapshot, log, decisions.
fn record(from_ms: u64) -> [String; 3] {
    let folder = tempfile::tempdir().unwrap();
    let names = ["snapshot", "log", "decisions"].map(|name| folder.path().join(name));
    let [snapshot, log, decisions] =
        names.each_ref().map(|name| std::fs::File::create(name).unwrap());
    let mut recorder = Recorder::new(Timestamp(from_ms), snapshot, log, decisions);
    play(&Scenario::of(&workload(BUSY), 11), "drumline", &mut recorder);
    assert!(recorder.finish().unwrap());
    names.map(|name| std::fs::read_to_string(name).unwrap())
}

fn again(snapshot: &str, log: &str, decisions: &str) -> Result<u64, ReplayError> {
    let saved = read_snapshot("s.json", snapshot)?;
    let log = read_log("l.jsonl", log)?;
    let mut expected = Expected::read("d.jsonl", decisions)?;
    let mut looks = 0;
    let last = replay(("s.json", saved), ("l.jsonl", &log), &mut |decision: Decision| {
        looks += 1;
        expected.compare(&decision)
    })?;
    expected.end(last.save().now)?;
    Ok(looks)
}

#[test]
fn a_replay_decides_the_same_from_the_start_and_from_the_middle() {
    for from in [0, 3_600_000, 3 * 3_600_000] {
        let [snapshot, log, decisions] = record(from);
        let looks = again(&snapshot, &log, &decisions).unwrap();
        assert_eq!(looks as usize, decisions.lines().count());
        assert!(looks > 10, "{looks}");
    }
}

#[test]
fn a_decision_that_differs_is_shown_with_its_place() {
    let [snapshot, log, decisions] = record(0);
    let (at, line) =
        decisions.lines().enumerate().find(|(_, line)| line.contains("\"index\":1")).unwrap();
    let other = line.replacen("\"index\":1", "\"index\":9", 1);
    let changed = decisions.replacen(line, &other, 1);
    let error = again(&snapshot, &log, &changed).unwrap_err().to_string();
    let place = format!("d.jsonl:{}:1: another decision at ", at + 1);
    assert!(error.starts_with(&place) && error.contains(".starts[0].devices["), "{error}");
    assert!(error.ends_with("expected 9, found 1"), "{error}");
    let short: String = decisions.lines().take(3).map(|line| format!("{line}\n")).collect();
    let error = again(&snapshot, &log, &short).unwrap_err().to_string();
    assert!(error.starts_with("d.jsonl:4:1: "), "{error}");
    let long = format!("{decisions}{}", decisions.lines().last().unwrap());
    let error = again(&snapshot, &log, &long).unwrap_err().to_string();
    assert!(error.contains("1 more expected, and none found"), "{error}");
}

#[test]
fn a_packed_snapshot_is_unpacked_and_a_torn_one_refused() {
    let [snapshot, ..] = record(0);
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(snapshot.as_bytes()).unwrap();
    let packed = packer.finish().unwrap();
    assert_eq!(text("s.gz", packed.clone()).unwrap(), snapshot);
    let torn = packed[..packed.len() / 2].to_vec();
    let fault = text("s.gz", torn).unwrap_err().to_string();
    assert!(fault.starts_with("s.gz:1:1: expected a whole gzip file"), "{fault}");
    let fault = text("s.json", b"{\n  \"a\xff".to_vec()).unwrap_err().to_string();
    assert_eq!(fault, "s.json:2:5: expected UTF-8 text");
}

#[test]
fn a_broken_snapshot_is_refused_with_its_place() {
    let [snapshot, ..] = record(0);
    let refused = |text: &str| read_snapshot("s.json", text).unwrap_err().to_string();
    assert!(refused("").starts_with("s.json:1:1: EOF"), "{}", refused(""));
    assert!(refused("{\n \"version\": x").starts_with("s.json:2:13: expected value"));
    let newer = snapshot.replacen("\"version\":", "\"version\":9", 1);
    let wrong = refused(&newer);
    assert!(
        wrong.contains("expected a snapshot of version ") && wrong.contains(", found version 9"),
        "{wrong}"
    );
    let wrong = refused(&snapshot.replacen("\"nodes\":", "\"knots\":", 1));
    assert!(wrong.contains("nodes"), "{wrong}");
}

#[test]
fn a_broken_log_is_refused_with_its_line() {
    let refused = |text: &str| read_log("l.jsonl", text).unwrap_err().to_string();
    let good = log_line(&Entry::Cycle(Timestamp(5))).unwrap();
    for (line, starts) in [
        ("{\"at\":", "l.jsonl:2:6: EOF while parsing a value"),
        ("{\"at\":4,\"cycle\":true}", "l.jsonl:2:1: expected a time of at least 5 ms, found 4"),
        ("{\"at\":6}", "l.jsonl:2:1: expected a change, or \"cycle\":true: missing field `change`"),
        (
            "{\"at\":6,\"change\":\"exploded\"}",
            "l.jsonl:2:1: expected a change, or \"cycle\":true: unknown variant `exploded`",
        ),
        (
            "{\"at\":6,\"cycle\":true,\"x\":1}",
            "l.jsonl:2:1: expected nothing beside \"cycle\", found \"x\"",
        ),
        ("{\"cycle\":true}", "l.jsonl:2:14: missing field `at`"),
    ] {
        let wrong = refused(&format!("{good}\n{line}\n"));
        assert!(wrong.starts_with(starts), "{wrong}");
    }
    let [snapshot, ..] = record(0);
    let gone = "{\"at\":99999999999,\"change\":\"ended\",\"job\":\"nobody\"}";
    let saved = read_snapshot("s.json", &snapshot).unwrap();
    let log = read_log("l.jsonl", gone).unwrap();
    let error = replay(("s.json", saved), ("l.jsonl", &log), &mut |_| Ok(())).unwrap_err();
    let expected = "l.jsonl:1:1: expected what can have happened: nobody is not known";
    assert_eq!(error.to_string(), expected);
}
