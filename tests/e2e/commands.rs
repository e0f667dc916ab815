//! What users type, and what they get back.

use crate::cluster::{Cluster, run_in};

const TORCHRUN: &str = include_str!("../../docs/examples/torchrun-style.yaml");

fn command(name: &str, script: &str, ranks: u32) -> String {
    format!(
        "apiVersion: drumline.dev/v1alpha1
kind: CommandJob
metadata: {{name: {name}}}
spec:
  argv: [sh, -c, {script:?}]
  ranks: {ranks}
  restarts: {{limit: 0}}
"
    )
}

#[test]
fn a_command_gang_meets_at_its_rendezvous() {
    let cluster = Cluster::start(2, 2);
    let id = cluster.submit(TORCHRUN);
    assert_eq!(cluster.wait(&id), Some(0), "{:#}", cluster.job(&id));
    let output = cluster.run(&["logs", &id]);
    let log = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(log.contains("all 4 ranks met"), "{log}");
    for rank in 1..4 {
        assert!(log.contains(&format!("rank {rank} of 4 said hello")), "{log}");
    }
    let one = cluster.run(&["logs", &id, "--rank", "2"]);
    assert_eq!(String::from_utf8_lossy(&one.stdout), "rank 2 of 4 said hello\n");
    cluster.stop();
}

#[test]
fn exit_codes_tell_whose_turn_it_is() {
    let cluster = Cluster::start(1, 2);
    // One rank: of two, the one that is slower may be stopped before it has said anything.
    let id = cluster.submit(&command("fails", "echo before; exit 7", 1));
    let waited = cluster.run(&["wait", &id, "--timeout", "60s"]);
    assert_eq!(waited.status.code(), Some(1));
    let told = String::from_utf8_lossy(&waited.stderr).into_owned();
    assert!(told.contains("7") && told.contains("rank"), "{told}");
    // Following a failed job returns its outcome too, after all of its log.
    let followed = cluster.run(&["logs", "-f", &id, "--rank", "0"]);
    assert_eq!(String::from_utf8_lossy(&followed.stdout), "before\n");
    assert_eq!(followed.status.code(), Some(1));

    assert_eq!(cluster.run(&["describe", "job", "nothing-here"]).status.code(), Some(2));
    assert_eq!(cluster.run(&["submit", "/no/such/file.yaml"]).status.code(), Some(2));
    let nowhere = tempfile::tempdir().unwrap();
    let output = run_in(nowhere.path(), &["jobs"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("drumline up"));
    cluster.stop();
}

#[test]
fn a_cancelled_job_leaves_nothing() {
    let cluster = Cluster::start(1, 2);
    let id = cluster.submit(&command("sleeps", "trap '' TERM; sleep 600 & wait; sleep 600", 2));
    cluster.wait_for(&id, "it runs", |job| job["phase"] == "running");
    let started = std::time::Instant::now();
    assert_eq!(cluster.run(&["cancel", &id]).status.code(), Some(0));
    cluster.wait_for(&id, "it is cancelled", |job| job["phase"] == "cancelled");
    // Long before the ranks would have ended by themselves.
    assert!(started.elapsed().as_secs() < 300);
    assert_eq!(cluster.wait(&id), Some(1), "a cancelled job did not do what it was for");
    // A supervisor tells of its rank's end before its own.
    while !cluster.pids("supervise").is_empty() {
        assert!(started.elapsed().as_secs() < 300);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    cluster.stop();
}

#[test]
fn a_job_that_cannot_start_says_why_and_starts_when_it_can() {
    let cluster = Cluster::start(1, 2);
    let too_big = cluster.submit(&command("too-big", "true", 9));
    let job = cluster.wait_for(&too_big, "a reason", |job| job["reason"] == "ExceedsCluster");
    assert!(job["message"].as_str().is_some_and(|text| text.contains('9')), "{job:#}");
    cluster.run(&["cancel", &too_big]);

    let first = cluster.submit(&command("first", "sleep 600", 2));
    cluster.wait_for(&first, "it runs", |job| job["phase"] == "running");
    let second = cluster.submit(&command("second", "echo mine", 1));
    let job = cluster.wait_for(&second, "a reason", |job| job["reason"] == "WaitingForDevices");
    assert_eq!(job["phase"], "pending");
    cluster.run(&["cancel", &first]);
    assert_eq!(cluster.wait(&second), Some(0));
    cluster.stop();
}

#[test]
fn a_wrong_manifest_stores_nothing() {
    let cluster = Cluster::start(1, 1);
    let good = command("good", "true", 1);
    let file = cluster.folder().join("wrong.yaml");
    let text = format!("{good}---\n{}", good.replace("ranks: 1", "ranks: 0\n  colour: red"));
    std::fs::write(&file, text).unwrap();
    let output = cluster.run(&["submit", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty(), "data only when it worked");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("spec.ranks") && told.contains("colour"), "{told}");
    assert_eq!(cluster.json(&["jobs"]).as_array().map(Vec::len), Some(0));
    cluster.stop();
}

#[test]
fn no_token_is_in_a_command_line_or_a_log() {
    let cluster = Cluster::start(1, 1);
    let id = cluster.submit(&command("quiet", "true", 1));
    assert_eq!(cluster.wait(&id), Some(0));
    let secrets: Vec<String> = ["token", "gateway-key"]
        .iter()
        .filter_map(|name| std::fs::read_to_string(cluster.folder().join(name)).ok())
        .map(|secret| secret.trim().to_owned())
        .collect();
    assert!(!secrets.is_empty());
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        assert!(!secrets.iter().any(|secret| line.contains(secret.as_str())), "{line}");
    }
    for entry in std::fs::read_dir(cluster.folder().join("log")).unwrap().flatten() {
        let log = std::fs::read_to_string(entry.path()).unwrap();
        assert!(!secrets.iter().any(|secret| log.contains(secret.as_str())), "{:?}", entry.path());
    }
    cluster.stop();
}
