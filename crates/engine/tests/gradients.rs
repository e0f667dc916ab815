//! Gradients: against finite differences of the loss, and against PyTorch.

mod support;

use drumline_engine::bench::{in_process, local_groups};
use drumline_engine::{Batch, Trainer};
use drumline_mesh::{Mesh, ShardSpec};
use drumline_spec::{Family, ModelConfig, Parallelism, TrainingJob};
use drumline_tensor::Cpu;
use serde_json::Value;
use support::{Whole, job, micros, split, tiny};

fn trainer(job: &TrainingJob) -> Trainer<Cpu> {
    let mesh = Mesh::new(Parallelism::SINGLE);
    let groups = local_groups(mesh).remove(0);
    Trainer::new(job, mesh.coords(0), groups, Cpu::new(1).unwrap()).unwrap()
}

/// Along each tensor's own gradient, the loss must rise by the gradient's norm.
#[test]
fn each_tensor_s_gradient_matches_the_finite_difference() {
    for (family, tie) in [(Family::Gpt2, true), (Family::Llama, false)] {
        let mut job = job(tiny(family, tie), Parallelism::SINGLE);
        // A learning rate of 0 makes a step compute gradients and change nothing.
        (job.learning_rate.peak, job.learning_rate.floor) = (0.0, 0.0);
        let mut t = trainer(&job);
        // Away from the symmetric start: unequal gains, biases and larger weights.
        t.load(|shard, values| {
            pattern(shard, values);
            Ok::<_, ()>(())
        })
        .unwrap();
        let data = micros(&job, 0, 3);
        t.step(0, &data).unwrap();
        let (mut weights, mut gradients) = (Whole::default(), Whole::default());
        weights.add(&t.snapshot(None));
        gradients.add(&t.gradients());
        let mut checked = 0;
        let names: Vec<String> = gradients.names().map(str::to_owned).collect();
        for name in names {
            let gradient = gradients.get(&name).to_vec();
            let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 0.0, "{name} has no gradient");
            // Far enough for a loss in f32 to notice, near enough for a straight line.
            let reach = (1e-2 / norm).min(0.05);
            let original = weights.get(&name).to_vec();
            let mut loss_at = |sign: f64| {
                let moved = original
                    .iter()
                    .zip(&gradient)
                    .map(|(w, g)| (f64::from(*w) + sign * reach * f64::from(*g) / norm) as f32);
                *weights.get_mut(&name) = moved.collect();
                t.load(|shard, values| weights.fill(shard, values)).unwrap();
                f64::from(t.evaluate(&data).unwrap())
            };
            let slope = (loss_at(1.0) - loss_at(-1.0)) / (2.0 * reach);
            *weights.get_mut(&name) = original;
            let noise = 1e-6 / reach;
            assert!(
                (slope - norm).abs() < 0.02 * norm + noise,
                "{family:?} {name}: slope {slope}, gradient's norm {norm}, reach {reach}"
            );
            checked += usize::from(noise < 0.1 * norm);
        }
        assert!(checked > 30, "only {checked} tensors were checked sharply");
    }
}

/// The values that `tests/peers/golden_train.py` gives every parameter, from its name and index.
fn pattern(shard: &ShardSpec, values: &mut [f32]) {
    if shard.name.starts_with("adam.") {
        return values.fill(0.0);
    }
    let hash = shard
        .name
        .bytes()
        .fold(0x811C_9DC5u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    let columns = *shard.shape.last().unwrap();
    let global_columns = *shard.global_shape.last().unwrap();
    let norm = shard.name.contains("norm") || shard.name.contains("ln_");
    let gain = norm && shard.name.ends_with("weight");
    for (i, value) in values.iter_mut().enumerate() {
        let (row, column) = if shard.shape.len() == 2 {
            (shard.offset[0] + i / columns, shard.offset[1] + i % columns)
        } else {
            (0, shard.offset[0] + i)
        };
        let index = (row * global_columns + column) as u32;
        let mut z = hash ^ index.wrapping_mul(0x9E37_79B9);
        z = (z ^ (z >> 16)).wrapping_mul(0x85EB_CA6B);
        z = (z ^ (z >> 13)).wrapping_mul(0xC2B2_AE35);
        z ^= z >> 16;
        let uniform = (z >> 8) as f32 / (1 << 24) as f32 - 0.5;
        *value = uniform * 0.4 + if gain { 1.0 } else { 0.0 };
    }
}

/// Tokens of the golden run: `seed` counts sequences.
fn golden_batch(seed: usize, rows: usize, sequence: usize, vocab: usize) -> Batch {
    let token = |s: usize, i: usize| ((s * 131 + i * i * 7 + i * 3) % vocab) as u32;
    let (mut tokens, mut targets) = (Vec::new(), Vec::new());
    for s in seed..seed + rows {
        tokens.extend((0..sequence).map(|i| token(s, i)));
        targets.extend((1..=sequence).map(|i| token(s, i)));
    }
    Batch { tokens, targets }
}

fn golden_model(family: Family, tie: bool) -> ModelConfig {
    ModelConfig { context: 16, ..tiny(family, tie) }
}

fn golden(name: &str, model: ModelConfig) {
    let path = format!("{}/tests/golden/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let number = |v: &Value| v.as_f64().unwrap();
    let numbers = |v: &Value| v.as_array().unwrap().iter().map(number).collect::<Vec<_>>();
    for shape in [split(1, 1, 1), split(2, 1, 1), split(2, 2, 1), split(1, 2, 2)] {
        let mut job = job(model.clone(), shape);
        (job.steps, job.global_batch, job.micro_batch, job.sequence) = (5, 4, 1, 16);
        job.learning_rate.warmup_steps = 2;
        let mesh = Mesh::new(shape);
        let ranks = in_process(mesh, |rank, groups| {
            let at = mesh.coords(rank);
            let mut t = Trainer::new(&job, at, groups, Cpu::new(1).unwrap()).unwrap();
            t.load(|shard, values| {
                pattern(shard, values);
                Ok::<_, ()>(())
            })
            .unwrap();
            let mut reports = Vec::new();
            let mut gradients = None;
            for step in 0..5 {
                let own = job.micro_batches() as usize;
                let data: Vec<Batch> = (0..own)
                    .map(|i| {
                        let s = step * 4 + at.data as usize * own + i;
                        golden_batch(s, 1, 16, job.model.vocab as usize)
                    })
                    .collect();
                reports.push(t.step(step as u64, &data).unwrap());
                gradients.get_or_insert_with(|| t.gradients());
            }
            (reports, gradients.unwrap(), t.snapshot(None))
        });
        for (step, report) in ranks[0].0.iter().enumerate() {
            let close = |got: f32, want: f64, what| {
                let off = (f64::from(got) - want).abs() / want;
                assert!(off < 5e-5, "{name} {shape:?} step {step}: {what} {got}, PyTorch {want}");
            };
            close(report.loss, numbers(&file["losses"])[step], "loss");
            close(report.grad_norm, numbers(&file["grad_norms"])[step], "gradient norm");
            close(report.learning_rate, numbers(&file["learning_rates"])[step], "rate");
        }
        let (mut gradients, mut weights) = (Whole::default(), Whole::default());
        for (_, g, w) in &ranks {
            gradients.add(g);
            weights.add(w);
        }
        let tensors = file["tensors"].as_object().unwrap();
        assert_eq!(tensors.len(), gradients.names().count(), "{name}: the same tensors");
        for (tensor, want) in tensors {
            for (what, got, want) in [
                ("gradient", gradients.get(tensor), &want["gradient"]),
                ("weights after 5 steps", weights.get(tensor), &want["weights"]),
            ] {
                let norm = got.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                let wanted = number(&want["norm"]);
                assert!(
                    (norm - wanted).abs() < 1e-4 * wanted.max(1e-3),
                    "{name} {shape:?} {tensor}: norm of {what} {norm}, PyTorch {wanted}"
                );
                let probes = want["values"].as_object().unwrap();
                assert!(probes.len() >= 8);
                for (index, want) in probes {
                    let got = f64::from(got[index.parse::<usize>().unwrap()]);
                    let off = (got - number(want)).abs();
                    // Attention does not see a shift of all scores, so the true gradient of a key's
                    // bias is 0; Adam makes whole steps of what rounding leaves of it.
                    let hidden = job.model.hidden as usize;
                    let at = index.parse::<usize>().unwrap();
                    let noise = tensor.ends_with("attn.c_attn.bias")
                        && (hidden..2 * hidden).contains(&at)
                        && what != "gradient";
                    let steps = if noise { 5.0 * f64::from(job.learning_rate.peak) } else { 0.0 };
                    assert!(
                        off < 1e-4 * wanted + 1e-5 + steps,
                        "{name} {shape:?} {tensor}[{index}]: {what} {got}, PyTorch {want}"
                    );
                }
            }
        }
    }
}

#[test]
fn gpt2_trains_as_in_pytorch() {
    golden("gpt2", golden_model(Family::Gpt2, true));
}

#[test]
fn llama_trains_as_in_pytorch() {
    golden("llama", golden_model(Family::Llama, false));
}
