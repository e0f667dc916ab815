//! The engine on [`Cuda`] against the engine on the CPU: training and serving of tiny models, whole and
//! split over ranks that share the device.

mod support;

use std::time::Duration;

use drumline_cuda::{Cuda, CudaOptions, nccl};
use drumline_engine::bench::{batches, in_process, job, local_groups, presets};
use drumline_engine::infer::{Model, ModelOptions, Sampled, Segment};
use drumline_engine::{DeviceGroups, Groups, Memory, Snapshot, StepReport, Trainer};
use drumline_mesh::Mesh;
use drumline_spec::{
    Family, MemoryOptions, ModelConfig, Parallelism, Recompute, TrainingJob, WeightRounding,
};
use drumline_tensor::sampling::choose;
use drumline_tensor::{Backend, Cpu, DType, Draw, MatmulPrecision};

/// f32 on both: only the order of additions differs. Norm of the difference over
/// the norm.
const F32: f64 = 1e-4;

/// A model small enough to train in a blink, with every number different from the others.
fn tiny(family: Family) -> ModelConfig {
    ModelConfig {
        family,
        layers: 2,
        hidden: 32,
        ffn: 48,
        heads: 4,
        kv_heads: if family == Family::Llama { 2 } else { 4 },
        vocab: 61,
        context: 40,
        ..presets()[0].model.clone()
    }
}

fn tiny_job(family: Family, parallelism: Parallelism, steps: u64) -> TrainingJob {
    TrainingJob {
        model: tiny(family),
        sequence: 40,
        global_batch: 4,
        ..job(&presets()[0], parallelism, 1, steps)
    }
}

/// One rank's micro-batches, so that any split sees the same global batch.
fn micros(job: &TrainingJob, copy: u32, step: u64) -> Vec<drumline_engine::Batch> {
    let single = TrainingJob { parallelism: Parallelism::SINGLE, ..job.clone() };
    let own = job.micro_batches() as usize;
    batches(&single, 0, step)[copy as usize * own..(copy as usize + 1) * own].to_vec()
}

/// Trains every rank of a job, and returns its reports, gradients of the last step and weights.
fn train<B: Backend>(
    job: &TrainingJob,
    backend: impl Fn() -> B + Sync,
) -> Vec<(Vec<StepReport>, Snapshot, Snapshot)> {
    train_linked(job, |_, _| (backend(), DeviceGroups::default()))
}

/// As [`train`], on devices that `open` opens and links.
fn train_linked<B: Backend>(
    job: &TrainingJob,
    open: impl Fn(u32, &Groups) -> (B, DeviceGroups<B>) + Sync,
) -> Vec<(Vec<StepReport>, Snapshot, Snapshot)> {
    let mesh = Mesh::new(job.parallelism);
    in_process(mesh, |rank, groups| {
        let coords = mesh.coords(rank);
        let (backend, device) = open(rank, &groups);
        let mut trainer = Trainer::new(job, coords, groups, backend).expect("a tiny model fits");
        trainer.link_devices(device);
        let reports = (0..job.steps)
            .map(|step| trainer.step(step, &micros(job, coords.data, step)).expect("a step"))
            .collect();
        (reports, trainer.gradients(), trainer.snapshot(None))
    })
}

/// As [`train`], by trainers that are made anew after `before` steps; returns the reports from there on.
fn resumed<B: Backend>(
    job: &TrainingJob,
    before: u64,
    backend: impl Fn() -> B + Sync,
) -> Vec<Vec<StepReport>> {
    let mesh = Mesh::new(job.parallelism);
    let first = TrainingJob { steps: before, ..job.clone() };
    let kept: Vec<Snapshot> = in_process(mesh, |rank, groups| {
        let coords = mesh.coords(rank);
        let mut trainer = Trainer::new(job, coords, groups, backend()).expect("it fits");
        for step in 0..first.steps {
            trainer.step(step, &micros(job, coords.data, step)).expect("a step");
        }
        trainer.snapshot(None)
    });
    in_process(mesh, |rank, groups| {
        let coords = mesh.coords(rank);
        let mut trainer = Trainer::new(job, coords, groups, backend()).expect("it fits");
        let loaded = trainer.load(|shard, to| {
            let mut all = kept.iter().flat_map(Snapshot::shards);
            let (_, from) = all.find(|(s, _)| *s == shard).ok_or_else(|| format!("{shard:?}"))?;
            to.copy_from_slice(from);
            Ok::<_, String>(())
        });
        loaded.expect("every shard was kept");
        (before..job.steps)
            .map(|step| trainer.step(step, &micros(job, coords.data, step)).expect("a step"))
            .collect()
    })
}

/// The norm of the difference over the norm, of all shards together.
fn distance(got: &Snapshot, want: &Snapshot) -> f64 {
    // A further copy of the model owns no shard: its reports alone are compared.
    if want.shards().next().is_none() {
        return 0.0;
    }
    let (mut off, mut all) = (0.0f64, 0.0f64);
    for ((a, got), (b, want)) in got.shards().zip(want.shards()) {
        assert_eq!(a, b);
        for (g, w) in got.iter().zip(want) {
            off += (f64::from(*g) - f64::from(*w)).powi(2);
            all += f64::from(*w).powi(2);
        }
    }
    assert!(all > 0.0 && off.is_finite(), "something was learnt, and it is a number");
    (off / all).sqrt()
}

fn cuda(matmul: MatmulPrecision) -> Cuda {
    support::open(CudaOptions { matmul, ..CudaOptions::default() })
}

/// Compares runs of one family and split, rank by rank.
fn compare(family: Family, parallelism: Parallelism, matmul: MatmulPrecision, bound: f64) {
    let job = tiny_job(family, parallelism, 4);
    let got = train(&job, || cuda(matmul));
    compare_with_cpu(&job, &got, &format!("{family:?} {parallelism:?} {matmul:?}"), bound);
}

/// Compares what ranks did with what they do on the processor.
fn compare_with_cpu(
    job: &TrainingJob,
    got: &[(Vec<StepReport>, Snapshot, Snapshot)],
    what: &str,
    bound: f64,
) {
    let want = train(job, || Cpu::new(1).expect("one thread"));
    for (rank, (got, want)) in got.iter().zip(&want).enumerate() {
        let what = format!("{what} rank {rank}");
        for (got, want) in got.0.iter().zip(&want.0) {
            let off = f64::from((got.loss - want.loss).abs() / want.loss);
            assert!(off < bound, "{what}: loss {} {}", got.loss, want.loss);
        }
        let gradients = distance(&got.1, &want.1);
        assert!(gradients < bound, "{what}: gradients are off by {gradients:e}");
        eprintln!("{what}: gradients of step 4 are off by {gradients:.1e}");
    }
}

#[test]
fn training_in_f32_follows_the_cpu() {
    support::on_device("training_in_f32_follows_the_cpu", |_| {
        for family in [Family::Gpt2, Family::Llama] {
            compare(family, Parallelism::SINGLE, MatmulPrecision::F32, F32);
        }
    });
}

#[test]
fn split_training_in_f32_follows_the_cpu() {
    support::on_device("split_training_in_f32_follows_the_cpu", |_| {
        for (tensor, pipeline, data) in [(2, 1, 1), (1, 2, 1), (1, 1, 2)] {
            let parallelism = Parallelism { tensor, pipeline, data };
            compare(Family::Llama, parallelism, MatmulPrecision::F32, F32);
        }
    });
}

/// Opens a rank's own GPU, and joins it to those of the others.
fn linked(
    rank: u32,
    groups: &Groups,
    matmul: MatmulPrecision,
) -> (Cuda, DeviceGroups<Cuda>, String) {
    let cuda = support::open_of(rank, CudaOptions { matmul, ..CudaOptions::default() });
    let name = nccl::Rank { job: "test".to_owned(), attempt: 1, rank };
    let linked = nccl::link(&cuda, groups, name, Duration::from_secs(60)).expect("they meet");
    (cuda, linked.groups, linked.words)
}

#[test]
fn split_training_over_nccl_follows_the_cpu() {
    support::on_device("split_training_over_nccl_follows_the_cpu", |device| {
        let options = |sequence_parallel, shard_optimizer| MemoryOptions {
            sequence_parallel,
            shard_optimizer,
            ..MemoryOptions::default()
        };
        // Two families: one ties its embedding to the output, over both ends of a pipeline.
        for (family, (tensor, pipeline, data), memory) in [
            (Family::Llama, (2, 1, 1), options(false, false)),
            (Family::Gpt2, (2, 1, 1), options(true, false)),
            (Family::Gpt2, (1, 2, 1), options(false, false)),
            (Family::Llama, (1, 1, 2), options(false, false)),
            (Family::Llama, (1, 1, 2), options(false, true)),
            (Family::Llama, (2, 2, 1), options(false, false)),
        ] {
            let parallelism = Parallelism { tensor, pipeline, data };
            let job = TrainingJob { memory, ..tiny_job(family, parallelism, 4) };
            let got = train_linked(&job, |rank, groups| {
                let (cuda, groups, words) = linked(rank, groups, MatmulPrecision::F32);
                // On a machine with fewer GPUs than ranks it may be the other way.
                let emulated = device != "GPU";
                assert!(!emulated || words.starts_with("over NCCL 2.30"), "{words}");
                (cuda, groups)
            });
            let what = format!("{family:?} {parallelism:?} {memory:?} linked");
            compare_with_cpu(&job, &got, &what, F32);
        }
    });
}

#[test]
fn training_in_bf16_stays_near_f32() {
    support::on_device("training_in_bf16_stays_near_f32", |_| {
        // Both factors of every product lose 16 bits: 8 bits of each are left.
        for family in [Family::Gpt2, Family::Llama] {
            compare(family, Parallelism::SINGLE, MatmulPrecision::Bf16, 1e-2);
        }
    });
}

#[test]
fn weights_rounded_by_chance_train_as_well_and_the_same_after_a_restart() {
    let test = "weights_rounded_by_chance_train_as_well_and_the_same_after_a_restart";
    support::on_device(test, |_| {
        let mut job = tiny_job(Family::Llama, Parallelism { data: 2, ..Parallelism::SINGLE }, 6);
        job.memory.shard_optimizer = true;
        let run = |job: &TrainingJob| train(job, || cuda(MatmulPrecision::Bf16));
        let nearest = run(&job);
        job.optimizer.rounding = WeightRounding::Stochastic;
        let drawn = run(&job);
        let mut plain = job.clone();
        plain.optimizer.rounding = WeightRounding::Nearest;
        compare_with_cpu(&plain, &drawn, test, 2e-2);
        assert!(distance(&drawn[0].1, &nearest[0].1) > 0.0, "something was rounded otherwise");
        assert_eq!(run(&job)[0].0, drawn[0].0, "the same run draws the same");
        assert_eq!(
            resumed(&job, 3, || cuda(MatmulPrecision::Bf16))[0],
            drawn[0].0[3..],
            "and so it does from its middle"
        );
        // What rounds no copy says so.
        let (mesh, cpu) = (Mesh::new(job.parallelism), Cpu::new(1).expect("one thread"));
        let refused = Trainer::new(&job, mesh.coords(0), local_groups(mesh).remove(0), cpu);
        let message = refused.err().expect("the CPU keeps no copy").to_string();
        assert!(message.starts_with("spec.optimizer.rounding: stochastic"), "{message}");
    });
}

/// Norms, log-sums and the residual stream stay f32, and masters and moments with them.
#[test]
fn bf16_keeps_activations_in_half_and_takes_what_was_planned() {
    support::on_device("bf16_keeps_activations_in_half_and_takes_what_was_planned", |_| {
        for (family, recompute) in [
            (Family::Gpt2, Recompute::None),
            (Family::Llama, Recompute::None),
            (Family::Llama, Recompute::Selective),
            (Family::Gpt2, Recompute::Full),
        ] {
            let memory = MemoryOptions { recompute, ..MemoryOptions::default() };
            let job = TrainingJob { memory, ..tiny_job(family, Parallelism::SINGLE, 1) };
            let mesh = Mesh::new(job.parallelism);
            let used = |precision| {
                let groups = local_groups(mesh).remove(0);
                let backend = cuda(precision);
                let kept = backend.activation_dtype();
                let trainer = Trainer::new(&job, mesh.coords(0), groups, backend).expect("it fits");
                let memory = trainer.memory();
                assert_eq!(memory, Memory::plan(&job, mesh.coords(0), kept).expect("a split"));
                memory
            };
            let (wide, narrow) = (used(MatmulPrecision::F32), used(MatmulPrecision::Bf16));
            let share = narrow.activations as f64 / wide.activations as f64;
            // The residual stream and statistics, f32, are a good part of a model as tiny as this. With
            // everything computed again, the stream alone is kept.
            let most = if recompute == Recompute::None { 0.65 } else { 1.0 };
            assert!(share <= most, "{family:?} {recompute:?}: {share}");
            assert_eq!(narrow.optimizer, wide.optimizer);
            assert_eq!(2 * narrow.weights, 3 * wide.weights, "masters and their copies");
        }
    });
}

#[test]
fn split_training_in_bf16_stays_near_f32() {
    support::on_device("split_training_in_bf16_stays_near_f32", |device| {
        let options = |sequence_parallel, shard_optimizer, recompute| MemoryOptions {
            sequence_parallel,
            shard_optimizer,
            recompute,
        };
        for (family, (tensor, pipeline, data), memory) in [
            (Family::Gpt2, (2, 1, 1), options(true, false, Recompute::None)),
            (Family::Llama, (2, 1, 1), options(false, false, Recompute::Selective)),
            (Family::Llama, (1, 2, 1), options(false, false, Recompute::None)),
            (Family::Gpt2, (1, 1, 2), options(false, true, Recompute::Full)),
        ] {
            let parallelism = Parallelism { tensor, pipeline, data };
            let job = TrainingJob { memory, ..tiny_job(family, parallelism, 4) };
            for over_nccl in [true, false] {
                let got = train_linked(&job, |rank, groups| {
                    if over_nccl {
                        let (cuda, groups, words) = linked(rank, groups, MatmulPrecision::Bf16);
                        let emulated = device != "GPU";
                        assert!(!emulated || words.starts_with("over NCCL 2.30"), "{words}");
                        return (cuda, groups);
                    }
                    (cuda(MatmulPrecision::Bf16), DeviceGroups::default())
                });
                let what = format!("{family:?} {parallelism:?} {memory:?} nccl {over_nccl}");
                compare_with_cpu(&job, &got, &what, 1e-2);
            }
        }
    });
}

#[test]
fn the_same_run_gives_the_same_bits() {
    support::on_device("the_same_run_gives_the_same_bits", |_| {
        let job = tiny_job(Family::Gpt2, Parallelism::SINGLE, 3);
        let run = || train(&job, || cuda(MatmulPrecision::Bf16)).remove(0);
        let (first, second) = (run(), run());
        assert_eq!(first.0, second.0);
        assert_eq!(distance(&first.2, &second.2), 0.0);
    });
}

/// A tiny model for serving, with weights of its own.
fn served<B: Backend>(family: Family, backend: B, options: ModelOptions) -> Model<B> {
    let mesh = Mesh::new(Parallelism::SINGLE);
    let groups = local_groups(mesh).remove(0);
    let (config, shape) = (tiny(family), Parallelism::SINGLE);
    let mut model = Model::new(&config, shape, mesh.coords(0), groups, backend, options)
        .expect("a tiny model fits");
    let mut seed = 1u64;
    model
        .load(|_, values| {
            for x in values.iter_mut() {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *x = ((seed >> 40) as f32 / (1 << 24) as f32 - 0.5) * 0.4;
            }
            Ok::<_, String>(())
        })
        .expect("the source has everything");
    model
}

/// Logits after a prompt in chunks of `chunk` tokens, then after decoding a few more.
fn logits<B: Backend>(family: Family, backend: B, weights: DType, chunk: usize) -> Vec<f32> {
    let options = ModelOptions { weights, ..ModelOptions::default() };
    let mut model = served(family, backend, options);
    let tokens: Vec<u32> = (0..36).map(|i| i * 7 % 61).collect();
    let (mut all, mut done) = (Vec::new(), 0);
    while done < tokens.len() {
        // The last six tokens one by one.
        let end = if done < 30 { (done + chunk).min(30) } else { done + 1 };
        let segment = Segment {
            blocks: vec![5, 2, 9],
            position: done as u32,
            tokens: tokens[done..end].to_vec(),
            sample: true,
        };
        let logits = model.run(std::slice::from_ref(&segment)).expect("a step").to_vec();
        // Once more, and the device chooses: what the host would have chosen.
        let point = (done as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        for draw in [
            Draw::GREEDY,
            Draw { temperature: 2.0, point, ..Draw::GREEDY },
            Draw { temperature: 2.0, top_k: 20, top_p: 0.8, point },
        ] {
            let want = [choose(&draw, &logits)];
            let got = model.run_drawn(std::slice::from_ref(&segment), &[draw]).expect("a step");
            assert_eq!(got, Sampled::Tokens(&want), "{draw:?}");
        }
        all.extend_from_slice(&logits);
        done = end;
    }
    all
}

#[test]
fn serving_gives_the_logits_of_the_cpu() {
    support::on_device("serving_gives_the_logits_of_the_cpu", |_| {
        for family in [Family::Gpt2, Family::Llama] {
            for dtype in [DType::F32, DType::F16, DType::Bf16, DType::I8] {
                // 30 rows at once take cuBLASLt, 7 the kernel for few rows.
                for chunk in [30, 7] {
                    let want = logits(family, Cpu::new(1).expect("a thread"), dtype, chunk);
                    let got = logits(family, cuda(MatmulPrecision::F32), dtype, chunk);
                    assert_eq!(got.len(), want.len());
                    let square = |x: f32| f64::from(x).powi(2);
                    let off: f64 = got.iter().zip(&want).map(|(g, w)| square(g - w)).sum();
                    let all: f64 = want.iter().map(|w| square(*w)).sum();
                    // Where factors are rounded to bf16, a number next to a tie may go either way
                    // after sums in another order: one step of 2^-8 of a few of them.
                    let rounds = matches!(dtype, DType::Bf16 | DType::I8);
                    let (off, bound) = ((off / all).sqrt(), if rounds { 3e-3 } else { F32 });
                    let what = format!("{family:?} {dtype:?} in chunks of {chunk}");
                    assert!(off < bound, "{what}: logits are off by {off:e}");
                    eprintln!("{what}: logits are off by {off:.1e}");
                }
            }
        }
    });
}

/// Logits of every step in which `sequences` prompts of three tokens are prefilled and then decoded side
/// by side, and how many steps were launched as one.
fn decoded(family: Family, sequences: u32, check_each: bool) -> (Vec<f32>, u64) {
    let mut device = support::device_options();
    device.check_each = check_each;
    let cuda = Cuda::new(&CudaOptions { device, ..CudaOptions::default() }).expect("a device");
    let options = ModelOptions { weights: DType::Bf16, max_batch: 24, ..ModelOptions::default() };
    let mut model = served(family, cuda, options);
    let mut all = Vec::new();
    let step = |position: u32, count: u32| -> Vec<Segment> {
        let segment = |s: u32| Segment {
            // Two blocks of 16 tokens each, far from each other.
            blocks: vec![s, 24 + s],
            position,
            tokens: (0..count).map(|i| ((position + i) * 7 + s % 3) % 61).collect(),
            sample: true,
        };
        (0..sequences).map(segment).collect()
    };
    all.extend_from_slice(model.run(&step(0, 3)).expect("a step"));
    for position in 3..20 {
        all.extend_from_slice(model.run(&step(position, 1)).expect("a step"));
    }
    (all, model.backend().graphs_launched())
}

#[test]
fn steps_that_come_again_are_launched_as_one_and_give_the_same_bits() {
    let test = "steps_that_come_again_are_launched_as_one_and_give_the_same_bits";
    support::on_device(test, |_| {
        for family in [Family::Gpt2, Family::Llama] {
            // Few rows take our own kernels, more take cuBLASLt.
            for sequences in [1, 3, 20] {
                let (want, none) = decoded(family, sequences, true);
                let (got, launched) = decoded(family, sequences, false);
                assert_eq!((none, got == want), (0, true), "{family:?}, {sequences}");
                // 17 steps, of which the first is new; the table of blocks grows once.
                assert!((12..=16).contains(&launched), "{family:?}, {sequences}: {launched}");
            }
        }
    });
}

#[test]
fn a_driver_without_graphs_is_served_call_by_call() {
    let test = "a_driver_without_graphs_is_served_call_by_call";
    let refuses = [("DRUMLINE_FAKE_CUDA", "no-graphs")];
    support::on_device_with_environment(test, &refuses, |_| {
        let (want, _) = decoded(Family::Llama, 3, true);
        let (got, launched) = decoded(Family::Llama, 3, false);
        assert_eq!((launched, got == want), (0, true));
    });
}

#[test]
fn ranks_that_share_a_gpu_or_lack_nccl_say_why_they_go_through_the_host() {
    let test = "ranks_that_share_a_gpu_or_lack_nccl_say_why_they_go_through_the_host";
    // A library that is not there is named; the loader is not asked for another.
    let missing = [("DRUMLINE_NCCL_LIBRARY", "/nowhere/libnccl.so.2")];
    support::on_device_with_environment(test, &missing, |_| {
        let parallelism = Parallelism { data: 2, ..Parallelism::SINGLE };
        let job = tiny_job(Family::Llama, parallelism, 2);
        let got = train_linked(&job, |rank, groups| {
            let (cuda, groups, words) = linked(rank, groups, MatmulPrecision::F32);
            assert!(
                words.starts_with("through host memory, pinned: rank 0 has no NCCL"),
                "{words}"
            );
            assert!(words.contains("/nowhere"), "{words}");
            (cuda, groups)
        });
        compare_with_cpu(&job, &got, "through the host", F32);
    });
}
