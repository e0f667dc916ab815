//! Checkpoints written by several ranks: committed, refused, pruned, read under another split.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use drumline_checkpoint::{
    Checkpoint, CheckpointError, Writer, WriterOptions, clean, latest, open_model, step_folder,
    steps,
};
use drumline_mesh::ShardSpec;
use proptest::prelude::*;
use support::{LIMIT, Tensors, options, parts, snapshot, values, write};

fn some_tensors() -> Tensors {
    vec![("w".into(), vec![12, 10]), ("adam.m/w".into(), vec![12, 10]), ("norm".into(), vec![9])]
}

fn write_steps(run: &Path, of: impl IntoIterator<Item = u64>) {
    for step in of {
        write(&some_tensors(), (2, 1), 2, step, |rank| options(run, rank, 2));
    }
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

fn check_content(checkpoint: &Checkpoint, tensors: &Tensors) {
    for spec in parts(tensors, (1, 1), 1, 0) {
        let got = checkpoint.reader().read_whole(&spec.name).unwrap();
        assert_eq!(got, values(&spec, checkpoint.step()), "{}", spec.name);
    }
}

#[test]
fn two_ranks_write_one_checkpoint_with_all_that_a_run_needs() {
    let run = tempfile::tempdir().unwrap();
    let tokenizer = run.path().join("t.json");
    fs::write(&tokenizer, "{}").unwrap();
    let with =
        |rank| WriterOptions { tokenizer: Some(tokenizer.clone()), ..options(run.path(), rank, 2) };
    let written = write(&some_tensors(), (2, 1), 2, 120, with);
    assert!(written.path.ends_with("step-00000120"));
    let expected =
        ["manifest.json", "rank-00000-1.safetensors", "rank-00001-1.safetensors", "tokenizer.json"];
    assert!(names(&written.path).iter().eq(expected), "{:?}", names(&written.path));
    let found = latest(run.path()).unwrap();
    assert!(found.refused.is_empty());
    let checkpoint = found.checkpoint.unwrap();
    assert_eq!(checkpoint.step(), 120);
    assert_eq!(checkpoint.manifest().state, options(run.path(), 0, 2).state);
    assert_eq!(fs::read(checkpoint.tokenizer_path().unwrap()).unwrap(), b"{}");
    check_content(&checkpoint, &some_tensors());
    let shapes: Vec<_> = checkpoint.reader().tensors().collect();
    assert_eq!(shapes[1], ("norm", &[9][..]));
    // The folder of a run and of a checkpoint open as the same model.
    assert_eq!(open_model(run.path()).unwrap().step, Some(120));
    assert_eq!(open_model(&written.path).unwrap().step, Some(120));
}

#[test]
fn a_run_without_checkpoints_has_none() {
    let run = tempfile::tempdir().unwrap();
    for path in [run.path(), &run.path().join("missing")] {
        let found = latest(path).unwrap();
        assert!(found.checkpoint.is_none() && found.refused.is_empty());
        assert!(matches!(open_model(path), Err(CheckpointError::Incomplete { .. })));
    }
}

#[test]
fn damage_is_refused_by_name_and_the_one_before_is_used() {
    let run = tempfile::tempdir().unwrap();
    write_steps(run.path(), [10, 20]);
    let newest = step_folder(run.path(), 20);
    for file in ["rank-00001-1.safetensors", "manifest.json"] {
        let path = newest.join(file);
        let good = fs::read(&path).unwrap();
        let refused = |what: &str, expected: &str| {
            let found = latest(run.path()).unwrap();
            assert_eq!(found.checkpoint.expect(what).step(), 10, "{what}");
            assert_eq!(found.refused.len(), 1, "{what}");
            assert_eq!(found.refused[0].step, 20);
            let error = found.refused[0].error.to_string();
            assert!(error.contains(file) && error.contains(expected), "{what}: {error}");
        };
        fs::write(&path, &good[..good.len() - 3]).unwrap();
        if file == "manifest.json" {
            refused("truncated", "");
        } else {
            refused("truncated", &format!("expected {}", good.len()));
            let mut bad = good.clone();
            let last = bad.len() - 1;
            bad[last] ^= 1;
            fs::write(&path, &bad).unwrap();
            refused("altered", "checksum");
            fs::remove_file(&path).unwrap();
            refused("missing", "missing");
        }
        fs::write(&path, &good).unwrap();
        assert_eq!(latest(run.path()).unwrap().checkpoint.unwrap().step(), 20);
    }
    // Two files at once are both named.
    for file in ["rank-00000-1.safetensors", "rank-00001-1.safetensors"] {
        fs::write(newest.join(file), "x").unwrap();
    }
    let error = latest(run.path()).unwrap().refused.remove(0).error.to_string();
    assert!(error.contains("rank-00000") && error.contains("rank-00001"), "{error}");
    // Without its manifest it is no checkpoint at all.
    fs::remove_file(newest.join("manifest.json")).unwrap();
    let found = latest(run.path()).unwrap();
    assert_eq!((found.checkpoint.unwrap().step(), found.refused.len()), (10, 0));
}

#[test]
fn a_manifest_that_points_elsewhere_or_lies_about_tensors_is_refused() {
    let run = tempfile::tempdir().unwrap();
    write_steps(run.path(), [10]);
    let path = step_folder(run.path(), 10).join("manifest.json");
    let good = fs::read_to_string(&path).unwrap();
    for (from, to) in [
        ("\"rank-00001-1.safetensors\"", "\"../rank-00001-1.safetensors\""),
        ("\"format_version\": 1", "\"format_version\": 2"),
        ("\"key\": \"norm\"", "\"key\": \"other\""),
        ("\"dtype\": \"f32\"", "\"dtype\": \"f64\""),
    ] {
        assert!(good.contains(from), "{from}");
        fs::write(&path, good.replacen(from, to, 1)).unwrap();
        let found = latest(run.path()).unwrap();
        assert!(found.checkpoint.is_none(), "{to}");
        assert_eq!(found.refused.len(), 1, "{to}");
    }
}

#[test]
fn the_last_three_are_kept_and_older_leftovers_go() {
    let run = tempfile::tempdir().unwrap();
    write_steps(run.path(), [10, 20, 30]);
    // Never completed: older, and newer.
    for step in [15, 99] {
        fs::create_dir(step_folder(run.path(), step)).unwrap();
        fs::write(step_folder(run.path(), step).join("part-00000-1.json"), "{}").unwrap();
    }
    fs::create_dir(run.path().join("notes")).unwrap();
    write_steps(run.path(), [40]);
    let kept: Vec<_> = steps(run.path()).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(kept, [20, 30, 40, 99]);
    clean(run.path()).unwrap();
    let kept: Vec<_> = steps(run.path()).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(kept, [20, 30, 40]);
    assert!(run.path().join("notes").exists());
    check_content(&latest(run.path()).unwrap().checkpoint.unwrap(), &some_tensors());
}

#[test]
fn a_part_of_an_earlier_attempt_is_never_taken_for_ours() {
    let run = tempfile::tempdir().unwrap();
    let own = |rank| parts(&some_tensors(), (2, 1), 2, rank);
    // Attempt 1: only rank 1 wrote step 10 before the gang died.
    let first = Writer::start(options(run.path(), 1, 2)).unwrap();
    first.submit(10, snapshot(&own(1), 666), LIMIT).unwrap();
    assert!(!first.finish(LIMIT).unwrap()[0].result.as_ref().unwrap().complete);
    // Attempt 2: rank 0 alone must not complete it with that part.
    let second = |rank| WriterOptions {
        attempt: 2,
        parts_timeout: Duration::from_millis(100),
        ..options(run.path(), rank, 2)
    };
    let alone = Writer::start(second(0)).unwrap();
    alone.submit(10, snapshot(&own(0), 10), LIMIT).unwrap();
    let outcome = alone.finish(LIMIT).unwrap().remove(0);
    let error = outcome.result.unwrap_err();
    assert!(
        matches!(&error, CheckpointError::PartsMissing { step: 10, missing, .. } if *missing == [1]),
        "{error}"
    );
    assert!(latest(run.path()).unwrap().checkpoint.is_none());
    // Attempt 3 completes it and takes the leftovers away.
    let third = |rank| WriterOptions { attempt: 3, ..options(run.path(), rank, 2) };
    let written = write(&some_tensors(), (2, 1), 2, 10, third);
    assert_eq!(names(&written.path).len(), 3, "{:?}", names(&written.path));
    check_content(&latest(run.path()).unwrap().checkpoint.unwrap(), &some_tensors());
}

#[test]
fn a_checkpoint_that_does_not_cover_a_tensor_is_not_committed() {
    let run = tempfile::tempdir().unwrap();
    let writer = Writer::start(options(run.path(), 0, 1)).unwrap();
    let half = parts(&some_tensors(), (2, 1), 2, 0);
    writer.submit(10, snapshot(&half, 10), LIMIT).unwrap();
    // A snapshot whose values do not fit its shape.
    let mut bad = snapshot(&parts(&some_tensors(), (1, 1), 1, 0), 20);
    bad[1].values.pop();
    writer.submit(20, bad, LIMIT).unwrap();
    let outcomes = writer.finish(LIMIT).unwrap();
    let text: Vec<_> =
        outcomes.iter().map(|o| o.result.as_ref().unwrap_err().to_string()).collect();
    assert!(text[0].contains("tensor adam.m/w") && text[0].contains("60 of 120"), "{text:?}");
    assert!(text[1].contains("tensor adam.m/w") && text[1].contains("119 values"), "{text:?}");
    assert!(latest(run.path()).unwrap().checkpoint.is_none());
}

#[test]
fn the_step_loop_waits_only_for_a_free_place_and_gets_its_buffers_back() {
    let run = tempfile::tempdir().unwrap();
    // Rank 0 of two: its writer is busy until the part of rank 1 comes, which is never.
    let slow = |rank| WriterOptions {
        parts_timeout: Duration::from_secs(4),
        ..options(run.path(), rank, 2)
    };
    let writer = Writer::start(slow(0)).unwrap();
    let own = parts(&some_tensors(), (2, 1), 2, 0);
    let start = Instant::now();
    writer.submit(10, snapshot(&own, 10), LIMIT).unwrap();
    writer.submit(20, snapshot(&own, 20), LIMIT).unwrap();
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    // Now one is being written and one waits: there is no place, and the wait has an end.
    let error = writer.submit(30, snapshot(&own, 30), Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, CheckpointError::Writer { step: 30, .. }), "{error}");
    let waited = writer.submit(40, snapshot(&own, 40), LIMIT).unwrap();
    assert!(waited > Duration::from_millis(100), "{waited:?}");
    assert!(writer.spare().is_some());
    let outcomes = writer.outcomes();
    assert!(outcomes.iter().all(|o| o.result.is_err()));
    let rest = writer.finish(LIMIT).unwrap();
    let steps: Vec<_> = outcomes.iter().chain(&rest).map(|o| o.step).collect();
    assert_eq!(steps, [10, 20, 40]);
}

#[test]
fn finish_has_a_deadline() {
    let run = tempfile::tempdir().unwrap();
    let writer = Writer::start(options(run.path(), 0, 2)).unwrap();
    let own = parts(&some_tensors(), (2, 1), 2, 0);
    writer.submit(10, snapshot(&own, 10), LIMIT).unwrap();
    let error = writer.finish(Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, CheckpointError::Writer { step: 10, .. }), "{error}");
    assert!(
        Writer::<Vec<_>>::start(WriterOptions { writers: vec![1], ..options(run.path(), 0, 2) })
            .is_err()
    );
}

#[test]
fn reads_of_what_is_not_there_are_errors_by_name() {
    let run = tempfile::tempdir().unwrap();
    write_steps(run.path(), [10]);
    let checkpoint = latest(run.path()).unwrap().checkpoint.unwrap();
    let good = parts(&some_tensors(), (1, 1), 1, 0).remove(0);
    let read = |spec: &ShardSpec, room: usize| {
        let result = checkpoint.reader().read(spec, &mut vec![0.0; room]);
        result.expect_err(&spec.name).to_string()
    };
    let mut missing = good.clone();
    missing.name = "v".into();
    assert!(read(&missing, 120).contains("tensor v"));
    let mut reshaped = good.clone();
    reshaped.global_shape = vec![10, 12];
    reshaped.shape = vec![10, 12];
    assert!(read(&reshaped, 120).contains("[12, 10]"));
    let mut outside = good.clone();
    outside.offset = vec![1, 0];
    assert!(read(&outside, 120).contains("does not lie"));
    assert!(read(&good, 119).contains("119"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// What is written under one split is read the same under any other.
    #[test]
    fn resharding_is_exact(
        rows in 1usize..20, columns in 1usize..20, length in 1usize..20,
        from in (1usize..4, 1usize..4), to in (1usize..5, 1usize..5),
        ranks in 1u32..4, step in 0u64..1000,
    ) {
        let tensors: Tensors = vec![
            ("w".into(), vec![rows, columns]),
            ("v".into(), vec![columns, rows]),
            ("b".into(), vec![length]),
        ];
        let run = tempfile::tempdir().unwrap();
        write(&tensors, from, ranks, step, |rank| options(run.path(), rank, ranks));
        let checkpoint = latest(run.path()).unwrap().checkpoint.unwrap();
        for spec in parts(&tensors, to, 1, 0) {
            let mut got = vec![f32::NAN; spec.elements()];
            checkpoint.reader().read(&spec, &mut got).unwrap();
            prop_assert_eq!(got, values(&spec, step));
        }
    }
}
