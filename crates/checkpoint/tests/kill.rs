//! Kills a process that writes checkpoints, at random moments: what is left is always whole.
//!
//! SIGKILL ends a process between any two of its instructions; it does not lose what the system
//! has buffered. That needs a power cut, for which the order of syncs is the argument.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use drumline_checkpoint::{Writer, WriterOptions, clean, latest, steps};
use support::{LIMIT, Tensors, options, parts, snapshot, values};

const CHILD: &str = "DRUMLINE_TEST_CHECKPOINT_CHILD";
const RANKS: u32 = 2;
const SEEDS: u64 = 24;

fn tensors() -> Tensors {
    (0..6).map(|i| (format!("layer.{i}"), vec![256, 96])).collect()
}

/// The child's body: two ranks' writers, one checkpoint after the other. Run as a test it does
/// nothing unless it is the child.
#[test]
fn child_that_writes_until_it_is_killed() {
    let Ok(task) = std::env::var(CHILD) else {
        return;
    };
    let (attempt, run) = task.split_once(':').unwrap();
    let run = Path::new(run);
    clean(run).unwrap();
    let found = latest(run).unwrap();
    let mut step = found.checkpoint.map_or(0, |c| c.step());
    let with = |rank| WriterOptions {
        attempt: attempt.parse().unwrap(),
        keep: 2,
        ..options(run, rank, RANKS)
    };
    let writers: Vec<_> = (0..RANKS).map(|rank| Writer::start(with(rank)).unwrap()).collect();
    // Far more than fit into the time until the kill, but not without end.
    for _ in 0..100_000 {
        step += 1;
        for (rank, writer) in writers.iter().enumerate() {
            let own = parts(&tensors(), (2, 1), RANKS as usize, rank);
            writer.submit(step, snapshot(&own, step), LIMIT).unwrap();
        }
        for outcome in writers[0].outcomes() {
            let written = outcome.result.unwrap();
            // After the checkpoint is said to be complete, it must never be lost.
            fs::write(run.join("acknowledged.tmp"), outcome.step.to_string()).unwrap();
            fs::rename(run.join("acknowledged.tmp"), run.join("acknowledged")).unwrap();
            assert!(written.complete);
        }
    }
}

#[test]
fn a_kill_at_any_moment_leaves_a_whole_checkpoint_and_loses_none_that_was_complete() {
    let run = tempfile::tempdir().unwrap();
    let mut last = 0;
    let mut leftovers = 0;
    // The run goes on from kill to kill, as a restarted gang does.
    for seed in 0..SEEDS {
        // Golden-ratio steps spread the moments evenly over 400 ms.
        let share = (seed as f64 * 0.618_033_988_75).fract();
        let after = Duration::from_millis((share * 400.0) as u64);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_writes_until_it_is_killed", "--nocapture"])
            .env(CHILD, format!("{}:{}", seed + 1, run.path().display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // One in four may hardly be up. The others write, however long they take to get there.
        let start = Instant::now();
        let writes = || steps(run.path()).is_ok_and(|all| all.iter().any(|(at, _)| *at > last));
        while seed % 4 != 0 && !writes() {
            assert!(start.elapsed() < LIMIT, "seed {seed}: nothing is written");
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(after);
        let early = child.try_wait().unwrap();
        assert!(early.is_none(), "seed {seed}: the child ended by itself: {early:?}");
        child.kill().unwrap();
        child.wait().unwrap();

        let acknowledged = fs::read_to_string(run.path().join("acknowledged"));
        let acknowledged: u64 = acknowledged.map_or(0, |step| step.parse().unwrap());
        let found = latest(run.path()).unwrap();
        assert!(found.refused.is_empty(), "seed {seed}: {:?}", found.refused);
        let folders = steps(run.path()).unwrap();
        let step = found.checkpoint.as_ref().map_or(0, |c| c.step());
        println!("seed {seed}: killed after {after:?} at step {step}, {} folders", folders.len());
        assert!(step >= acknowledged && step >= last, "seed {seed}: {step} after {last}");
        last = step;
        leftovers += folders.iter().filter(|(at, _)| *at > step).count();
        if let Some(checkpoint) = found.checkpoint {
            for spec in parts(&tensors(), (1, 1), 1, 0) {
                let got = checkpoint.reader().read_whole(&spec.name).unwrap();
                assert_eq!(got, values(&spec, step), "seed {seed}: {}", spec.name);
            }
        }
        clean(run.path()).unwrap();
        let complete = steps(run.path()).unwrap();
        assert!(complete.len() <= 3, "seed {seed}: {complete:?}");
    }
    // The moments were worth something: checkpoints were made, and some kills fell into one.
    assert!(last > 0, "no checkpoint in {SEEDS} rounds");
    assert!(leftovers > 0, "no kill ever fell into the writing of a checkpoint");
}
