//! Every split trains as one rank does.

mod support;

use drumline_engine::bench::local_groups;
use drumline_engine::{Memory, Trainer};
use drumline_mesh::Mesh;
use drumline_spec::{Family, Parallelism, TrainingJob};
use drumline_tensor::{Cpu, DType};
use support::{Whole, job, split, tiny, train};

/// The bound: 1e-4 relative, over 20 steps. Splits only change the order of sums.
const TOLERANCE: f32 = 1e-4;

fn splits() -> Vec<Parallelism> {
    let mut all = Vec::new();
    for tensor in [1, 2, 4] {
        for pipeline in [1, 2, 4] {
            for data in [1, 2, 4] {
                if matches!(tensor * pipeline * data, 2 | 4) {
                    all.push(split(tensor, pipeline, data));
                }
            }
        }
    }
    all
}

/// The splits, and those of two stages with their layers in two parts each.
fn shapes() -> impl Iterator<Item = (Parallelism, u32)> {
    let interleaved = [split(1, 2, 1), split(2, 2, 1), split(1, 2, 2)];
    splits().into_iter().map(|shape| (shape, 1)).chain(interleaved.map(|shape| (shape, 2)))
}

fn check(family: Family, tie: bool) {
    let single = train(&job(tiny(family, tie), Parallelism::SINGLE)).remove(0);
    let (first, last) = (single.0[0].loss, single.0[19].loss);
    assert!((first - 61f32.ln()).abs() < 0.1, "an untrained model guesses: {first}");
    assert!(last < first - 0.3, "20 steps teach it something: {first} -> {last}");
    for (shape, virtual_stages) in shapes() {
        let job = TrainingJob { virtual_stages, ..job(tiny(family, tie), shape) };
        let ranks = train(&job);
        for (rank, (reports, held_out)) in ranks.iter().enumerate() {
            assert_eq!(reports, &ranks[0].0, "{shape:?}: rank {rank} reports as rank 0 does");
            for (step, (got, want)) in reports.iter().zip(&single.0).enumerate() {
                let off = (got.loss - want.loss).abs() / want.loss;
                assert!(off < TOLERANCE, "{shape:?} step {step}: {} {}", got.loss, want.loss);
                let off = (got.grad_norm - want.grad_norm).abs() / want.grad_norm;
                assert!(
                    off < 1e-3,
                    "{shape:?} step {step}: norm {} {}",
                    got.grad_norm,
                    want.grad_norm
                );
                assert_eq!(got.learning_rate, want.learning_rate);
            }
            let off = (held_out - single.1).abs() / single.1;
            assert!(off < TOLERANCE, "{shape:?}: held out {held_out} {}", single.1);
        }
    }
}

#[test]
fn memory_is_what_was_planned_for_every_rank_of_every_split() {
    for family in [Family::Gpt2, Family::Llama] {
        for tie in [true, false] {
            for (shape, virtual_stages) in shapes() {
                let job = TrainingJob { virtual_stages, ..job(tiny(family, tie), shape) };
                let mesh = Mesh::new(shape);
                for (rank, groups) in (0..).zip(local_groups(mesh)) {
                    let coords = mesh.coords(rank);
                    let planned = Memory::plan(&job, coords, DType::F32).unwrap();
                    let trainer = Trainer::new(&job, coords, groups, Cpu::new(1).unwrap()).unwrap();
                    assert_eq!(trainer.memory(), planned, "{shape:?} x {virtual_stages}, {rank}");
                }
            }
        }
    }
}

#[test]
fn an_interleaved_run_stands_under_the_same_names_as_another() {
    let whole = |shape: Parallelism, virtual_stages: u32| {
        let job = TrainingJob { virtual_stages, ..job(tiny(Family::Llama, false), shape) };
        let mesh = Mesh::new(shape);
        let mut whole = Whole::default();
        for (rank, groups) in (0..).zip(local_groups(mesh)) {
            let cpu = Cpu::new(1).unwrap();
            let trainer = Trainer::new(&job, mesh.coords(rank), groups, cpu).unwrap();
            whole.add(&trainer.snapshot(None));
        }
        whole.assert_complete();
        whole
    };
    let (one, other) = (whole(Parallelism::SINGLE, 1), whole(split(1, 2, 1), 2));
    assert!(one.names().eq(other.names()));
    for name in one.names() {
        assert_eq!(one.get(name), other.get(name), "{name}");
    }
}

#[test]
fn gpt2_with_tied_embeddings() {
    check(Family::Gpt2, true);
}

#[test]
fn gpt2_with_a_projection_of_its_own() {
    check(Family::Gpt2, false);
}

#[test]
fn llama_with_a_projection_of_its_own() {
    check(Family::Llama, false);
}

#[test]
fn llama_with_tied_embeddings() {
    check(Family::Llama, true);
}
