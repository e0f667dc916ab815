//! Every split trains as one rank does.

mod support;

use drumline_spec::{Family, Parallelism};
use support::{job, split, tiny, train};

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

fn check(family: Family, tie: bool) {
    let single = train(&job(tiny(family, tie), Parallelism::SINGLE)).remove(0);
    let (first, last) = (single.0[0].loss, single.0[19].loss);
    assert!((first - 61f32.ln()).abs() < 0.1, "an untrained model guesses: {first}");
    assert!(last < first - 0.3, "20 steps teach it something: {first} -> {last}");
    for shape in splits() {
        let ranks = train(&job(tiny(family, tie), shape));
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
