//! Snapshots: who owns what, and runs that go on from one.

mod support;

use drumline_engine::bench::in_process;
use drumline_engine::{EngineError, Trainer};
use drumline_mesh::Mesh;
use drumline_spec::{Family, Parallelism, TrainingJob};
use drumline_tensor::Cpu;
use support::{Whole, job, micros, split, tiny};

/// Trains steps `from..to` on all ranks, from `start` when given; returns rank 0's losses and
/// everything that the ranks own.
fn run(job: &TrainingJob, start: Option<&Whole>, from: u64, to: u64) -> (Vec<f32>, Whole) {
    let mesh = Mesh::new(job.parallelism);
    let ranks = in_process(mesh, |rank, groups| {
        let coords = mesh.coords(rank);
        let mut trainer = Trainer::new(job, coords, groups, Cpu::new(1).unwrap()).unwrap();
        if let Some(start) = start {
            trainer.load(|shard, values| start.fill(shard, values)).unwrap();
        }
        let mut reuse = None;
        let losses: Vec<f32> = (from..to)
            .map(|step| {
                let loss = trainer.step(step, &micros(job, coords.data, step)).unwrap().loss;
                reuse = Some(trainer.snapshot(reuse.take()));
                loss
            })
            .collect();
        (losses, reuse.unwrap_or_else(|| trainer.snapshot(None)))
    });
    let mut whole = Whole::default();
    for (_, snapshot) in &ranks {
        whole.add(snapshot);
    }
    whole.assert_complete();
    (ranks.into_iter().next().unwrap().0, whole)
}

#[test]
fn a_run_that_goes_on_from_a_snapshot_has_the_same_bits() {
    for (family, tie) in [(Family::Gpt2, true), (Family::Llama, false)] {
        for shape in [split(1, 1, 1), split(2, 2, 1), split(1, 2, 2)] {
            let job = job(tiny(family, tie), shape);
            let (unbroken, end) = run(&job, None, 0, 10);
            let (_, middle) = run(&job, None, 0, 4);
            let (resumed, resumed_end) = run(&job, Some(&middle), 4, 10);
            assert_eq!(resumed, unbroken[4..], "{family:?} {shape:?}");
            for name in end.names() {
                assert_eq!(end.get(name), resumed_end.get(name), "{family:?} {shape:?} {name}");
            }
        }
    }
}

#[test]
fn every_split_starts_from_the_same_weights_and_goes_on_from_any_others() {
    for (family, tie) in [(Family::Gpt2, true), (Family::Llama, true)] {
        let single = job(tiny(family, tie), Parallelism::SINGLE);
        let (_, start) = run(&single, None, 0, 0);
        let (unbroken, _) = run(&single, None, 0, 10);
        for shape in [split(4, 1, 1), split(1, 4, 1), split(2, 1, 2)] {
            let job = job(tiny(family, tie), shape);
            let (_, own_start) = run(&job, None, 0, 0);
            assert_eq!(start.names().collect::<Vec<_>>(), own_start.names().collect::<Vec<_>>());
            for name in start.names() {
                assert_eq!(start.get(name), own_start.get(name), "{family:?} {shape:?} {name}");
            }
            let (_, middle) = run(&job, None, 0, 4);
            let (resumed, _) = run(&single, Some(&middle), 4, 10);
            for (got, want) in resumed.iter().zip(&unbroken[4..]) {
                assert!((got - want).abs() / want < 1e-4, "{family:?} {shape:?}: {got} {want}");
            }
        }
    }
}

#[test]
fn names_and_shapes_are_those_of_the_hugging_face_layout() {
    let (_, gpt2) = run(&job(tiny(Family::Gpt2, true), split(2, 1, 1)), None, 0, 0);
    assert_eq!(gpt2.get("transformer.h.3.attn.c_attn.weight").len(), 32 * 96);
    assert_eq!(gpt2.get("transformer.h.0.attn.c_attn.bias").len(), 96);
    assert_eq!(gpt2.get("transformer.wpe.weight").len(), 24 * 32);
    assert_eq!(gpt2.get("adam.m/transformer.ln_f.bias").len(), 32);
    let weights = gpt2.names().filter(|n| !n.starts_with("adam."));
    let total: usize = weights.map(|n| gpt2.get(n).len()).sum();
    assert_eq!(total as u64, tiny(Family::Gpt2, true).parameters());
    let (_, llama) = run(&job(tiny(Family::Llama, false), split(2, 2, 1)), None, 0, 0);
    assert_eq!(llama.get("model.layers.2.self_attn.k_proj.weight").len(), 16 * 32);
    assert_eq!(llama.get("adam.v/model.layers.0.mlp.down_proj.weight").len(), 32 * 48);
    let weights = llama.names().filter(|n| !n.starts_with("adam."));
    let total: usize = weights.map(|n| llama.get(n).len()).sum();
    assert_eq!(total as u64, tiny(Family::Llama, false).parameters());
}

#[test]
fn a_vocabulary_smaller_than_its_group_leaves_some_ranks_without_tokens() {
    let mut model = tiny(Family::Llama, false);
    model.vocab = 5;
    let single = run(&job(model.clone(), split(1, 1, 1)), None, 0, 3).0;
    let four = run(&job(model, split(4, 1, 1)), None, 0, 3).0;
    for (a, b) in single.iter().zip(four) {
        assert!((a - b).abs() / a < 1e-4, "{a} {b}");
    }
}

#[test]
fn wrong_batches_and_tokens_are_refused_before_anything_moves() {
    let job = job(tiny(Family::Llama, false), Parallelism::SINGLE);
    let mesh = Mesh::new(job.parallelism);
    in_process(mesh, |rank, groups| {
        let mut t = Trainer::new(&job, mesh.coords(rank), groups, Cpu::new(1).unwrap()).unwrap();
        let good = micros(&job, 0, 0);
        let error = t.step(0, &good[1..]).unwrap_err();
        assert_eq!(error, EngineError::Batch { what: "micro-batches", expected: 4, got: 3 });
        let mut short = good.clone();
        short[2].targets.pop();
        let error = t.step(0, &short).unwrap_err();
        assert_eq!(error, EngineError::Batch { what: "targets", expected: 40, got: 39 });
        let mut unknown = good.clone();
        unknown[3].tokens[5] = 61;
        let error = t.step(0, &unknown).unwrap_err();
        assert_eq!(error, EngineError::Token { token: 61, vocab: 61 });
        let nan = t.load(|_, values| {
            values.fill(f32::NAN);
            Ok::<_, ()>(())
        });
        assert_eq!(nan, Ok(()));
        assert!(matches!(t.step(0, &good), Err(EngineError::Diverged { step: 0, .. })));
    });
}
