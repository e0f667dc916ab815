//! Processes killed with SIGKILL in the middle of a run: nothing is lost, nothing is left behind.

use crate::cluster::{Cluster, kill, losses, training};

fn step(job: &serde_json::Value) -> u64 {
    job["training"]["step"].as_u64().unwrap_or(0)
}

/// A generator whose seed a failure prints.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

#[test]
fn a_control_plane_that_is_killed_finds_its_ranks_again() {
    let cluster = Cluster::start(2, 2);
    cluster.build_data();
    let slowly = cluster.slowly();
    let id = cluster.submit(&training("adopted", 2, 1, 1, 400));
    let before = cluster.wait_for(&id, "it trains", |job| step(job) > 20);
    kill(cluster.pids("control")[0]);
    let other = cluster.wait_for(&id, "it trains on", |job| step(job) > step(&before) + 20);
    assert_eq!(other["restarts"], 0, "the ranks were not touched");
    drop(slowly);
    assert_eq!(cluster.wait(&id), Some(0));
    assert_eq!(losses(&cluster, &id).len(), 400);
    cluster.stop();
}

#[test]
fn an_agent_that_is_killed_takes_its_ranks_along_and_its_gang_starts_elsewhere() {
    let cluster = Cluster::start(2, 2);
    cluster.build_data();
    let slowly = cluster.slowly();
    let id = cluster.submit(&training("moved", 2, 1, 1, 400));
    let job = cluster.wait_for(&id, "a checkpoint", |job| {
        job["training"]["checkpoint_step"].as_u64().unwrap_or(0) > 0
    });
    let node = job["placement"][0]["node"].as_str().expect("a node").to_owned();
    let agents = cluster.pids("agent");
    let own = agents.into_iter().find(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&node)
    });
    kill(own.expect("the node's agent"));
    drop(slowly);
    assert_eq!(cluster.wait(&id), Some(0));
    let job = cluster.job(&id);
    assert!(job["restarts"].as_u64().is_some_and(|restarts| restarts >= 1), "{job:#}");
    assert_eq!(losses(&cluster, &id).len(), 400);
    cluster.stop();
}

#[test]
fn a_run_killed_at_a_random_step_has_the_losses_of_the_unbroken_one() {
    let cluster = Cluster::start(2, 2);
    cluster.build_data();
    let whole = cluster.submit(&training("whole", 2, 2, 1, 120));
    assert_eq!(cluster.wait(&whole), Some(0), "{:#}", cluster.job(&whole));
    let expected = losses(&cluster, &whole);
    assert_eq!(expected.len(), 120);
    let seed = u64::from(std::process::id());
    let mut dice = Dice(seed);
    for round in 0..3 {
        let at = 12 + dice.roll(90);
        let slowly = cluster.slowly();
        let id = cluster.submit(&training(&format!("broken-{round}"), 2, 2, 1, 120));
        let job = cluster.wait_for(&id, "the step", |job| step(job) >= at);
        let rank = dice.roll(4) as usize;
        kill(job["placement"][rank]["pid"].as_u64().expect("a pid") as u32);
        drop(slowly);
        assert_eq!(cluster.wait(&id), Some(0), "seed {seed}");
        assert_eq!(losses(&cluster, &id), expected, "seed {seed}, killed after step {at}");
    }
    cluster.stop();
}

#[test]
fn twenty_kills_lose_no_job_and_leave_no_process() {
    let cluster = Cluster::start(2, 2);
    cluster.build_data();
    let seed = u64::from(std::process::id());
    let mut dice = Dice(seed);
    for round in 0..20 {
        let id = cluster.submit(&training(&format!("round-{round}"), 2, 1, 1, 40));
        let at = dice.roll(30);
        cluster.wait_for(&id, "the step", |job| step(job) >= at);
        let role = ["control", "agent", "rank", "supervise", "gateway"][dice.roll(5) as usize];
        let pids = cluster.pids(role);
        if !pids.is_empty() {
            kill(pids[dice.roll(pids.len() as u64) as usize]);
        }
        let job = cluster.wait_for(&id, "the end", |job| {
            ["succeeded", "failed", "cancelled"].iter().any(|phase| job["phase"] == *phase)
        });
        assert_eq!(job["phase"], "succeeded", "seed {seed}, round {round}, {role}: {job:#}");
        assert_eq!(losses(&cluster, &id).len(), 40, "seed {seed}, round {round}, {role}");
    }
    assert_eq!(cluster.json(&["jobs"]).as_array().map(Vec::len), Some(20));
    cluster.stop();
}
