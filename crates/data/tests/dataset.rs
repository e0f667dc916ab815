//! A dataset from end to end: built, opened, batched, damaged, rebuilt.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use drumline_data::{
    BatchError, BatchShape, Batches, BuildOptions, Corpus, Dataset, Progress, Split, build,
};
use proptest::prelude::*;

/// A folder of made-up stories, each of a few hundred words.
fn stories(folder: &Path, count: usize) {
    fs::create_dir_all(folder).unwrap();
    let words = ["drum", "line", "keeps", "a", "whole", "band", "in", "step", "über", "🥁"];
    for story in 0..count {
        let mut text = format!("Story {story}.\n");
        let mut state = story as u64 + 1;
        for word in 0..300 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            text += words[(state >> 33) as usize % words.len()];
            text.push(if word % 12 == 11 { '\n' } else { ' ' });
        }
        fs::write(folder.join(format!("{story:03}.txt")), text).unwrap();
    }
}

fn options() -> BuildOptions {
    BuildOptions { vocab: 300, held_out: 0.1, shard_tokens: 5_000, ..BuildOptions::default() }
}

fn built() -> &'static (tempfile::TempDir, Arc<Dataset>) {
    static BUILT: OnceLock<(tempfile::TempDir, Arc<Dataset>)> = OnceLock::new();
    BUILT.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        stories(&folder.path().join("text"), 60);
        let corpus = Corpus::from_path(&folder.path().join("text"), 1 << 30).unwrap();
        let out = folder.path().join("data");
        build(&corpus, &out, &options(), &mut |_| {}).unwrap();
        let dataset = Arc::new(Dataset::open(&out).unwrap());
        (folder, dataset)
    })
}

#[test]
fn the_tokens_of_both_splits_decode_to_the_whole_corpus() {
    let (folder, dataset) = built();
    let tokenizer = dataset.tokenizer().unwrap();
    let manifest = dataset.manifest();
    assert_eq!(manifest.tokenizer.vocab, 300);
    assert_eq!((manifest.train.documents, manifest.validation.documents), (54, 6));
    assert!(manifest.train.shards.len() > 1, "several shards are covered");
    let mut found = BTreeSet::new();
    for split in [Split::Train, Split::Validation] {
        let tokens = dataset.tokens(split);
        let mut ids = Vec::new();
        assert!(tokens.extend(0, tokens.len() as usize, &mut ids));
        assert!(!tokens.extend(1, tokens.len() as usize, &mut ids), "one too many");
        for document in ids.split(|id| *id == manifest.tokenizer.end_of_text) {
            found.insert(tokenizer.decode(document).unwrap());
        }
    }
    found.remove("");
    let mut expected = BTreeSet::new();
    for file in fs::read_dir(folder.path().join("text")).unwrap() {
        expected.insert(fs::read_to_string(file.unwrap().path()).unwrap());
    }
    assert_eq!(found, expected);
}

#[test]
fn a_build_is_deterministic_and_reports_progress() {
    let (folder, dataset) = built();
    let out = folder.path().join("again");
    let corpus = Corpus::from_path(&folder.path().join("text"), 1 << 30).unwrap();
    let mut seen: Vec<Progress> = Vec::new();
    let manifest = build(&corpus, &out, &options(), &mut |p| seen.push(p)).unwrap();
    assert_eq!(&manifest, dataset.manifest());
    assert!(seen.iter().all(|p| p.bytes <= p.total_bytes));
    assert_eq!(seen.last().unwrap().bytes, manifest.source.bytes);
    for entry in fs::read_dir(&out).unwrap() {
        let name = entry.unwrap().file_name();
        let read = |folder: &Path| fs::read(folder.join(&name)).unwrap();
        assert_eq!(read(&out), read(dataset.folder()), "{name:?}");
    }
}

#[test]
fn a_rebuild_with_fewer_shards_leaves_none_of_the_old() {
    let folder = tempfile::tempdir().unwrap();
    let (text, out) = (folder.path().join("text"), folder.path().join("data"));
    stories(&text, 60);
    let corpus = Corpus::from_path(&text, 1 << 30).unwrap();
    build(&corpus, &out, &options(), &mut |_| {}).unwrap();
    fs::write(out.join("train-notes.tokens"), "not ours").unwrap();
    let few = BuildOptions { shard_tokens: 1 << 30, ..options() };
    let manifest = build(&corpus, &out, &few, &mut |_| {}).unwrap();
    assert_eq!(manifest.train.shards.len(), 1);
    let names: BTreeSet<_> = fs::read_dir(&out)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    let expected = [
        "dataset.json",
        "tokenizer.json",
        "train-00000.tokens",
        "train-notes.tokens",
        "validation-00000.tokens",
    ];
    assert!(names.iter().eq(expected), "{names:?}");
    Dataset::open(&out).unwrap();
}

#[test]
fn what_is_missing_or_damaged_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let (text, out) = (folder.path().join("text"), folder.path().join("data"));
    let error = Dataset::open(&out).unwrap_err().to_string();
    assert!(error.contains("dataset.json is missing"), "{error}");
    stories(&text, 60);
    let corpus = Corpus::from_path(&text, 1 << 30).unwrap();
    build(&corpus, &out, &options(), &mut |_| {}).unwrap();
    for file in ["validation-00000.tokens", "train-00001.tokens", "tokenizer.json", "dataset.json"]
    {
        let path = out.join(file);
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        // In dataset.json: a digit of a number.
        let at =
            (bad.len() / 2..bad.len()).find(|i| bad[*i].is_ascii_digit() || file.ends_with("s"));
        bad[at.unwrap()] ^= 1;
        fs::write(&path, &bad).unwrap();
        let refused = |what: &str| {
            let opened = Dataset::open(&out).and_then(|d| d.tokenizer().map(|_| ()));
            let error = opened.expect_err(what).to_string();
            assert!(error.contains(file), "{what}: {error}");
        };
        refused("altered");
        fs::write(&path, &good[..good.len() / 2]).unwrap();
        refused("truncated");
        fs::remove_file(&path).unwrap();
        refused("missing");
        fs::write(&path, &good).unwrap();
        Dataset::open(&out).unwrap();
    }
}

#[test]
fn one_file_is_split_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("book.txt");
    fs::write(&path, "A line of a long book.\n".repeat(2_000)).unwrap();
    let corpus = Corpus::from_path(&path, 1 << 30).unwrap();
    let manifest =
        build(&corpus, &folder.path().join("data"), &BuildOptions::default(), &mut |_| {}).unwrap();
    let share = manifest.validation.bytes as f64 / manifest.source.bytes as f64;
    assert!((0.01..0.04).contains(&share), "{share}");
    assert_eq!(manifest.train.bytes + manifest.validation.bytes, manifest.source.bytes);
}

fn batches(shape: BatchShape, seed: u64) -> Batches {
    Batches::new(built().1.clone(), shape, seed).unwrap()
}

/// All rows of a step, by data rank and micro-batch.
fn rows_of_step(batches: &Batches, shape: BatchShape, step: u64) -> Vec<(Vec<u32>, Vec<u32>)> {
    let mut rows = Vec::new();
    for rank in 0..shape.data {
        for micro in 0..batches.micro_batches() {
            let batch = batches.batch(step, rank, micro).unwrap();
            let t = batch.sequence;
            let pairs = batch.tokens.chunks(t).zip(batch.targets.chunks(t));
            rows.extend(pairs.map(|(a, b)| (a.to_vec(), b.to_vec())));
        }
    }
    rows
}

#[test]
fn an_epoch_visits_every_window_once_and_targets_follow_tokens() {
    let shape = BatchShape { sequence: 64, micro_batch: 1, global_batch: 1, data: 1 };
    let batches = batches(shape, 5);
    let tokens = built().1.tokens(Split::Train);
    let mut text = Vec::new();
    tokens.extend(0, tokens.len() as usize, &mut text);
    let mut starts = vec![0; batches.windows() as usize];
    for step in 0..batches.windows() {
        let batch = batches.batch(step, 0, 0).unwrap();
        assert_eq!(batch.tokens[1..], batch.targets[..63]);
        for (window, times) in starts.iter_mut().enumerate() {
            let at = window * 64;
            if text[at..at + 64] == batch.tokens && text[at + 64] == batch.targets[63] {
                *times += 1;
            }
        }
    }
    assert!(starts.iter().all(|times| *times == 1), "{starts:?}");
    assert_eq!(batches.epoch(batches.windows()), 1);
}

#[test]
fn places_that_do_not_exist_are_errors() {
    let shape = BatchShape { sequence: 64, micro_batch: 2, global_batch: 8, data: 2 };
    let batches = batches(shape, 0);
    assert!(batches.batch(0, 2, 0).is_err());
    assert!(batches.batch(0, 0, 2).is_err());
    assert!(batches.batch(u64::MAX, 0, 0).is_err());
    let count = batches.validation_sequences();
    assert!(count > 2);
    assert_eq!(batches.validation(count - 2, 2).unwrap().rows, 2);
    assert!(batches.validation(count - 1, 2).is_err());
    assert!(batches.validation(u64::MAX, 2).is_err());
    for bad in [
        BatchShape { global_batch: 6, ..shape },
        BatchShape { data: 0, ..shape },
        BatchShape { micro_batch: u32::MAX, ..shape },
    ] {
        let error = Batches::new(built().1.clone(), bad, 0).unwrap_err();
        assert!(matches!(error, BatchError::Shape { .. }), "{error}");
    }
    let long = BatchShape { sequence: 1 << 30, ..shape };
    let error = Batches::new(built().1.clone(), long, 0).unwrap_err();
    assert!(matches!(error, BatchError::TooFewTokens { .. }), "{error}");
}

proptest! {
    #[test]
    fn the_global_batch_is_the_same_under_any_split(
        seed: u64, step in 0u64..100, data in 0u32..3, micro in 0u32..3,
    ) {
        let whole = BatchShape { sequence: 32, micro_batch: 16, global_batch: 16, data: 1 };
        let split = BatchShape { data: 1 << data, micro_batch: 1 << (micro % (5 - data)), ..whole };
        let one = rows_of_step(&batches(whole, seed), whole, step);
        let many = rows_of_step(&batches(split, seed), split, step);
        prop_assert_eq!(one, many);
    }

    #[test]
    fn resuming_at_any_step_gives_what_the_unbroken_run_got(seed: u64, at in 0u64..50) {
        let shape = BatchShape { sequence: 16, micro_batch: 2, global_batch: 4, data: 2 };
        let unbroken: Vec<_> = {
            let run = batches(shape, seed);
            (0..at + 3).map(|step| rows_of_step(&run, shape, step)).collect()
        };
        let resumed = batches(shape, seed);
        for step in at..at + 3 {
            prop_assert_eq!(&rows_of_step(&resumed, shape, step), &unbroken[step as usize]);
        }
    }
}
