//! A step's terms by name, and by which of them one split loses to another.

use super::Candidate;
use crate::step::StepTime;

/// The terms of a step by name, for comparison and for tables.
#[must_use]
pub fn terms(time: &StepTime) -> [(&'static str, f64); 15] {
    [
        ("matmuls", time.layers.matmul),
        ("attention", time.layers.attention),
        ("memory-bound operators", time.layers.elementwise),
        ("tensor collectives", time.layers.tensor),
        ("context ring", time.layers.context),
        ("expert all-to-all", time.layers.expert),
        ("recomputation", time.recompute),
        ("embedding and loss", time.embedding_and_loss),
        ("pipeline bubble", time.bubble),
        ("pipeline sends", time.pipeline_sends),
        ("data parallelism", time.data),
        ("optimizer", time.optimizer),
        ("slowest node", time.straggler),
        ("shared cores", time.sharing),
        ("outside the device", time.overhead),
    ]
}

/// Says in words by which terms a candidate loses.
#[must_use]
pub fn explain_loss(best: &Candidate, other: &Candidate) -> String {
    let scale = f64::from(best.global_batch) / f64::from(other.global_batch);
    let slower = other.time.step * scale / best.time.step - 1.0;
    let mut differences: Vec<(f64, &str)> = terms(&best.time)
        .iter()
        .zip(terms(&other.time))
        .map(|((name, a), (_, b))| ((b * scale - a) / best.time.step * 100.0, *name))
        .collect();
    differences.sort_by(|a, b| b.0.total_cmp(&a.0));
    let worse: Vec<String> = differences
        .iter()
        .take(2)
        .filter(|(d, _)| *d > 0.05)
        .map(|(d, name)| format!("{name} +{d:.1}%"))
        .collect();
    let better: Vec<String> = differences
        .iter()
        .rev()
        .take(1)
        .filter(|(d, _)| *d < -0.05)
        .map(|(d, name)| format!("{name} {d:.1}%"))
        .collect();
    let mut text =
        format!("{} is {:.1}% slower: {}", other.split, slower * 100.0, worse.join(", "));
    if worse.is_empty() {
        text = format!("{} is as fast within {:.2}%", other.split, slower.abs() * 100.0);
    }
    if !better.is_empty() {
        text.push_str(&format!(" (though {})", better.join(", ")));
    }
    text
}
