//! Training with matrix products in bf16 ends where training in f32 does.

mod support;

use drumline_engine::bench::in_process;
use drumline_engine::train::cpu;
use drumline_engine::{StepReport, Trainer};
use drumline_mesh::Mesh;
use drumline_spec::{Family, Parallelism, Precision, TrainingJob};
use support::{job, micros, split, tiny};

/// The bound that was set for the demo model, over its whole run.
const TOLERANCE: f32 = 0.01;

fn train(job: &TrainingJob) -> Vec<StepReport> {
    let mesh = Mesh::new(job.parallelism);
    let mut ranks = in_process(mesh, |rank, groups| {
        let coords = mesh.coords(rank);
        let cpu = cpu(job, 1).unwrap();
        let mut trainer = Trainer::new(job, coords, groups, cpu).unwrap();
        (0..job.steps)
            .map(|step| trainer.step(step, &micros(job, coords.data, step)).unwrap())
            .collect()
    });
    ranks.remove(0)
}

/// Mean of the last ten losses: one step's depends much on its batch.
fn end(reports: &[StepReport]) -> f32 {
    reports[reports.len() - 10..].iter().map(|report| report.loss).sum::<f32>() / 10.0
}

#[test]
fn bf16_ends_within_a_hundredth_of_f32_and_splits_agree() {
    for family in [Family::Gpt2, Family::Llama] {
        let f32_job = TrainingJob { steps: 80, ..job(tiny(family, true), Parallelism::SINGLE) };
        let bf16_job = TrainingJob { precision: Precision::Bf16, ..f32_job.clone() };
        let (exact, rounded) = (train(&f32_job), train(&bf16_job));
        assert_ne!(exact, rounded, "bf16 rounds");
        let (want, got) = (end(&exact), end(&rounded));
        assert!(want < exact[0].loss - 0.5, "{family:?}: the model learns: {want}");
        assert!((got - want).abs() / want < TOLERANCE, "{family:?}: {got} in bf16, {want} in f32");
        let split = TrainingJob { parallelism: split(2, 2, 1), ..bf16_job };
        let got = end(&train(&split));
        assert!((got - want).abs() / want < TOLERANCE, "{family:?}: {got} split, {want} in f32");
    }
}
