//! What a run gives for memory changes where numbers are kept and who computes them, and not what
//! they are.

mod support;

use drumline_engine::bench::{in_process, local_groups};
use drumline_engine::{EngineError, Memory, StepReport, Trainer};
use drumline_mesh::Mesh;
use drumline_spec::{Family, MemoryOptions, Parallelism, Recompute, TrainingJob};
use drumline_tensor::{Cpu, DType};
use support::{Whole, job, micros, split, tiny, train};

/// As for the splits: only the order of sums changes.
const TOLERANCE: f32 = 1e-4;

const RECOMPUTE: [Recompute; 3] = [Recompute::None, Recompute::Selective, Recompute::Full];

/// Every split of 2 and 4 ranks, interleaved pipelines too.
fn shapes() -> Vec<(Parallelism, u32)> {
    let mut all = Vec::new();
    for tensor in [1, 2, 4] {
        for pipeline in [1, 2, 4] {
            for data in [1, 2, 4] {
                if matches!(tensor * pipeline * data, 2 | 4) {
                    all.push((split(tensor, pipeline, data), 1));
                }
            }
        }
    }
    let interleaved = [split(1, 2, 1), split(2, 2, 1), split(1, 2, 2)];
    all.into_iter().chain(interleaved.map(|shape| (shape, 2))).collect()
}

/// The options that mean something for a split.
fn options(shape: Parallelism) -> Vec<MemoryOptions> {
    let mut all = Vec::new();
    for recompute in RECOMPUTE {
        for shard_optimizer in [false, true] {
            for sequence_parallel in [false, true] {
                let options = MemoryOptions { recompute, shard_optimizer, sequence_parallel };
                let means = (!shard_optimizer || shape.data > 1)
                    && (!sequence_parallel || shape.tensor > 1)
                    && options != MemoryOptions::default();
                if means {
                    all.push(options);
                }
            }
        }
    }
    all
}

fn with(family: Family, shape: Parallelism, parts: u32, memory: MemoryOptions) -> TrainingJob {
    TrainingJob { virtual_stages: parts, memory, ..short(family, shape) }
}

/// Enough steps for an optimizer that forgets or mixes its moments to show.
fn short(family: Family, shape: Parallelism) -> TrainingJob {
    TrainingJob { steps: 8, ..job(tiny(family, true), shape) }
}

fn assert_close(got: &[StepReport], want: &[StepReport], what: &str) {
    for (step, (got, want)) in got.iter().zip(want).enumerate() {
        let off = (got.loss - want.loss).abs() / want.loss;
        assert!(off < TOLERANCE, "{what} step {step}: loss {} {}", got.loss, want.loss);
        let off = (got.grad_norm - want.grad_norm).abs() / want.grad_norm;
        assert!(off < 1e-3, "{what} step {step}: norm {} {}", got.grad_norm, want.grad_norm);
    }
}

#[test]
fn every_option_on_every_split_trains_as_one_rank_does() {
    for family in [Family::Gpt2, Family::Llama] {
        let single = train(&short(family, Parallelism::SINGLE)).remove(0);
        for (shape, parts) in shapes() {
            for memory in options(shape) {
                let what = format!("{family:?} {shape:?} x {parts} {memory:?}");
                let ranks = train(&with(family, shape, parts, memory));
                assert_close(&ranks[0].0, &single.0, &what);
                for (reports, held_out) in &ranks {
                    assert_eq!(reports, &ranks[0].0, "{what}");
                    let off = (held_out - single.1).abs() / single.1;
                    assert!(off < TOLERANCE, "{what}: held out {held_out} {}", single.1);
                }
            }
        }
    }
}

#[test]
fn what_is_computed_again_has_the_same_bits() {
    for family in [Family::Gpt2, Family::Llama] {
        for (shape, parts) in [(Parallelism::SINGLE, 1), (split(2, 2, 1), 2), (split(2, 1, 2), 1)] {
            for sequence_parallel in [false, shape.tensor > 1] {
                let run = |recompute| {
                    let memory =
                        MemoryOptions { recompute, sequence_parallel, ..Default::default() };
                    train(&with(family, shape, parts, memory))
                };
                let kept = run(Recompute::None);
                for recompute in [Recompute::Selective, Recompute::Full] {
                    assert_eq!(run(recompute), kept, "{family:?} {shape:?} {recompute:?}");
                }
            }
        }
    }
}

#[test]
fn memory_is_what_was_planned_and_less_of_what_the_option_is_for() {
    for family in [Family::Gpt2, Family::Llama] {
        for (shape, parts) in shapes() {
            let mesh = Mesh::new(shape);
            for memory in options(shape) {
                let job = with(family, shape, parts, memory);
                let plain = with(family, shape, parts, MemoryOptions::default());
                for (rank, groups) in (0..).zip(local_groups(mesh)) {
                    let coords = mesh.coords(rank);
                    let planned = Memory::plan(&job, coords, DType::F32).unwrap();
                    let trainer = Trainer::new(&job, coords, groups, Cpu::new(1).unwrap()).unwrap();
                    let what = format!("{family:?} {shape:?} x {parts} {memory:?}, rank {rank}");
                    assert_eq!(trainer.memory(), planned, "{what}");
                    let whole = Memory::plan(&plain, coords, DType::F32).unwrap();
                    if memory.shard_optimizer {
                        let share = planned.optimizer as f64 / whole.optimizer as f64;
                        let copies = f64::from(shape.data);
                        assert!((share * copies - 1.0).abs() < 0.05, "{what}: {share}");
                    } else {
                        assert_eq!(planned.optimizer, whole.optimizer, "{what}");
                    }
                    if memory.recompute != Recompute::None || memory.sequence_parallel {
                        assert!(planned.activations < whole.activations, "{what}");
                    }
                }
            }
        }
    }
}

/// Trains steps `from..to`, from `start` when given; returns the losses and all that is owned.
fn run(job: &TrainingJob, start: Option<&Whole>, from: u64, to: u64) -> (Vec<f32>, Whole) {
    let mesh = Mesh::new(job.parallelism);
    let ranks = in_process(mesh, |rank, groups| {
        let coords = mesh.coords(rank);
        let mut trainer = Trainer::new(job, coords, groups, Cpu::new(1).unwrap()).unwrap();
        if let Some(start) = start {
            trainer.load(|shard, values| start.fill(shard, values)).unwrap();
        }
        let losses: Vec<f32> = (from..to)
            .map(|step| trainer.step(step, &micros(job, coords.data, step)).unwrap().loss)
            .collect();
        (losses, trainer.snapshot(None))
    });
    let mut whole = Whole::default();
    ranks.iter().for_each(|(_, snapshot)| whole.add(snapshot));
    whole.assert_complete();
    (ranks.into_iter().next().unwrap().0, whole)
}

#[test]
fn a_shared_optimizer_resumes_to_the_bit_and_fits_every_other_split() {
    let shared = MemoryOptions { shard_optimizer: true, ..Default::default() };
    for family in [Family::Gpt2, Family::Llama] {
        let single = short(family, Parallelism::SINGLE);
        let (unbroken, _) = run(&single, None, 0, 8);
        for shape in [split(1, 1, 2), split(2, 1, 2), split(1, 2, 2), split(1, 1, 4)] {
            let job = with(family, shape, 1, shared);
            let (losses, end) = run(&job, None, 0, 8);
            let (_, middle) = run(&job, None, 0, 3);
            let (resumed, resumed_end) = run(&job, Some(&middle), 3, 8);
            assert_eq!(resumed, losses[3..], "{family:?} {shape:?}");
            for name in end.names() {
                assert_eq!(end.get(name), resumed_end.get(name), "{family:?} {shape:?} {name}");
            }
            // To one rank, to copies that do not share, to another number of copies; and back.
            let other = if shape.data == 2 { split(1, 1, 4) } else { split(2, 1, 2) };
            for to in [
                single.clone(),
                with(family, shape, 1, MemoryOptions::default()),
                with(family, other, 1, shared),
            ] {
                let (there, their_end) = run(&to, Some(&middle), 3, 6);
                let (back, _) = run(&job, Some(&their_end), 6, 8);
                for (got, want) in there.iter().chain(&back).zip(&unbroken[3..]) {
                    let off = (got - want).abs() / want;
                    assert!(off < TOLERANCE, "{family:?} {shape:?} {:?}", to.parallelism);
                }
            }
        }
    }
}

#[test]
fn rows_that_do_not_divide_are_refused() {
    let memory = MemoryOptions { sequence_parallel: true, ..Default::default() };
    let mut job = with(Family::Llama, split(4, 1, 1), 1, memory);
    (job.micro_batch, job.sequence) = (1, 21);
    let mesh = Mesh::new(job.parallelism);
    let groups = local_groups(mesh).remove(0);
    let refused = Trainer::new(&job, mesh.coords(0), groups, Cpu::new(1).unwrap()).err();
    let Some(EngineError::Split { field, message }) = refused else { panic!("{refused:?}") };
    assert_eq!(field, "memory.sequence_parallel");
    assert_eq!(message, "21 rows are not divisible by tensor 4");
}
