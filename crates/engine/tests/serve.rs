//! Serving: the cache changes nothing, splits change nothing, company changes nothing.

mod support;

use std::collections::BTreeMap;

use drumline_engine::Trainer;
use drumline_engine::bench::{in_process, local_groups};
use drumline_engine::infer::{
    Event, FinishReason, Follower, Leader, Model, ModelOptions, Request, Sampling, Segment,
};
use drumline_mesh::Mesh;
use drumline_spec::{Family, ModelConfig, Parallelism};
use drumline_tensor::{Cpu, DType, KV_BLOCK};
use support::{Whole, job, micros, split, tiny};

/// A model that has learned a little, so that its answers are not all alike.
fn trained(family: Family, tie: bool) -> (ModelConfig, Whole, Trainer<Cpu>) {
    let mut job = job(tiny(family, tie), Parallelism::SINGLE);
    job.learning_rate.peak = 1e-2;
    let mesh = Mesh::new(job.parallelism);
    let groups = local_groups(mesh).remove(0);
    let mut t = Trainer::new(&job, mesh.coords(0), groups, Cpu::new(1).unwrap()).unwrap();
    for step in 0..job.steps {
        t.step(step, &micros(&job, 0, step)).unwrap();
    }
    let mut whole = Whole::default();
    whole.add(&t.snapshot(None));
    (job.model, whole, t)
}

fn single(config: &ModelConfig, weights: &Whole, options: ModelOptions) -> Model<Cpu> {
    let mesh = Mesh::new(Parallelism::SINGLE);
    let groups = local_groups(mesh).remove(0);
    let cpu = Cpu::new(1).unwrap();
    let shape = Parallelism::SINGLE;
    let mut model = Model::new(config, shape, mesh.coords(0), groups, cpu, options).unwrap();
    model.load(|shard, values| weights.fill(shard, values)).unwrap();
    model
}

fn log_prob(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    f64::from(logits[token as usize] - max) - sum.ln()
}

#[test]
fn decoding_token_by_token_scores_as_the_training_forward_does() {
    for (family, tie) in [(Family::Gpt2, true), (Family::Llama, false)] {
        let (config, weights, mut trainer) = trained(family, tie);
        let batches = micros(&job(config.clone(), Parallelism::SINGLE), 0, 77);
        let want = f64::from(trainer.evaluate(&batches[..1]).unwrap());
        for chunk in [1, 3, 7, 20] {
            let mut model = single(&config, &weights, ModelOptions::default());
            let (mut total, mut last) = (0.0, Vec::new());
            for (s, tokens) in batches[0].tokens.chunks_exact(20).enumerate() {
                let blocks: Vec<u32> =
                    (0..20u32.div_ceil(KV_BLOCK as u32)).map(|b| b * 2).collect();
                let mut done = 0;
                while done < 20 {
                    let end = (done + chunk).min(20);
                    let segment = Segment {
                        blocks: blocks.clone(),
                        position: done as u32,
                        tokens: tokens[done..end].to_vec(),
                        sample: true,
                    };
                    let logits = model.run(&[segment]).unwrap();
                    assert_eq!(logits.len(), 61);
                    total -= log_prob(logits, batches[0].targets[s * 20 + end - 1]);
                    last = logits.to_vec();
                    done = end;
                }
            }
            if chunk == 1 {
                let mean = total / 40.0;
                assert!((mean - want).abs() < 1e-5 * want, "{family:?}: {mean} {want}");
            }
            // However it was cut, the end is the same.
            let whole = Segment {
                blocks: vec![0, 2],
                position: 0,
                tokens: batches[0].tokens[20..].to_vec(),
                sample: true,
            };
            let logits = model.run(&[whole]).unwrap();
            for (a, b) in logits.iter().zip(&last) {
                assert!((a - b).abs() < 1e-4, "{family:?} chunk {chunk}: {a} {b}");
            }
        }
    }
}

fn requests() -> Vec<Request> {
    let sampled = |temperature, top_k, top_p, seed| Sampling {
        temperature,
        top_k,
        top_p,
        seed,
        logprobs: None,
    };
    let samplings = [
        Sampling::GREEDY,
        sampled(1.0, 0, 1.0, 3),
        sampled(0.8, 5, 1.0, 9),
        sampled(1.2, 0, 0.9, 4),
        Sampling { logprobs: Some(2), ..Sampling::GREEDY },
        sampled(0.7, 10, 0.8, 1),
    ];
    samplings
        .into_iter()
        .enumerate()
        .map(|(i, sampling)| Request {
            prompt: (0..1 + i * 2).map(|j| ((i * 17 + j * 5) % 61) as u32).collect(),
            max_tokens: 4 + i,
            sampling,
            stop_tokens: vec![60],
        })
        .collect()
}

/// Runs all requests to their end and returns each one's tokens and finish.
fn complete(leader: &mut Leader<Cpu>, requests: &[Request]) -> Vec<(Vec<u32>, FinishReason)> {
    let mut results = BTreeMap::new();
    let mut ids = Vec::new();
    for request in requests {
        ids.push(leader.submit(request.clone()).unwrap());
    }
    for _ in 0..200 {
        for event in leader.step().unwrap().events {
            let Event { request, token, finish, .. } = event;
            let (tokens, reason) = results.entry(request).or_insert((Vec::new(), None));
            tokens.extend(token);
            *reason = finish;
        }
        if leader.is_idle() {
            break;
        }
    }
    assert_eq!(leader.load().blocks_used, 0);
    ids.iter().map(|id| (results[id].0.clone(), results[id].1.unwrap())).collect()
}

fn small() -> ModelOptions {
    // Small enough that prompts are chunked and requests wait for places.
    ModelOptions { max_batch: 3, prefill_tokens: 4, ..ModelOptions::default() }
}

#[test]
fn an_answer_is_the_same_alone_in_company_and_on_every_split() {
    for (family, tie) in [(Family::Gpt2, true), (Family::Llama, false)] {
        let (config, weights, _) = trained(family, tie);
        let requests = requests();
        let alone: Vec<_> = requests
            .iter()
            .map(|r| {
                let mut leader = Leader::new(single(&config, &weights, ModelOptions::default()));
                complete(&mut leader, std::slice::from_ref(r)).remove(0)
            })
            .collect();
        assert!(alone.iter().any(|(tokens, _)| tokens.len() > 5));
        for (tokens, reason) in &alone {
            assert!(*reason == FinishReason::Stop || tokens.len() >= 4);
        }
        for shape in [
            split(1, 1, 1),
            split(2, 1, 1),
            split(4, 1, 1),
            split(1, 2, 1),
            split(2, 2, 1),
            split(1, 4, 1),
        ] {
            let mesh = Mesh::new(shape);
            let ranks = in_process(mesh, |rank, groups| {
                let cpu = Cpu::new(1).unwrap();
                let mut model =
                    Model::new(&config, shape, mesh.coords(rank), groups, cpu, small()).unwrap();
                model.load(|shard, values| weights.fill(shard, values)).unwrap();
                if !model.is_leader() {
                    let mut follower = Follower::new(model);
                    while follower.step().unwrap() {}
                    return Vec::new();
                }
                let mut leader = Leader::new(model);
                leader.step().unwrap(); // idle: every rank answers
                let results = complete(&mut leader, &requests);
                leader.stop().unwrap();
                results
            });
            assert_eq!(ranks[0], alone, "{family:?} {shape:?}");
        }
    }
}

#[test]
fn a_prefix_from_the_cache_gives_the_same_answers_to_the_bit() {
    for (family, tie) in [(Family::Gpt2, true), (Family::Llama, false)] {
        let (mut config, _, _) = trained(family, tie);
        config.context = 64;
        let mut job = job(config.clone(), Parallelism::SINGLE);
        job.sequence = 20;
        let mesh = Mesh::new(Parallelism::SINGLE);
        let groups = local_groups(mesh).remove(0);
        let t = Trainer::new(&job, mesh.coords(0), groups, Cpu::new(1).unwrap()).unwrap();
        let mut weights = Whole::default();
        weights.add(&t.snapshot(None));
        let request = |tail: u32| Request {
            prompt: (0..40).map(|i| (i * 7 % 60) as u32).chain([tail]).collect(),
            max_tokens: 6,
            sampling: Sampling { logprobs: Some(3), ..Sampling::GREEDY },
            stop_tokens: Vec::new(),
        };
        let events = |leader: &mut Leader<Cpu>, request: Request| {
            leader.submit(request).unwrap();
            let mut events = Vec::new();
            while !leader.is_idle() {
                events.extend(leader.step().unwrap().events);
            }
            events.into_iter().map(|e| (e.token, e.logprob.map(f32::to_bits), e.top)).collect()
        };
        let mut leader = Leader::new(single(&config, &weights, small()));
        for (turn, tail) in [5, 5, 9].into_iter().enumerate() {
            let got: Vec<_> = events(&mut leader, request(tail));
            assert_eq!(leader.load().reused_tokens, 32 * turn as u64, "{family:?}");
            let mut fresh = Leader::new(single(&config, &weights, ModelOptions::default()));
            assert_eq!(got, events(&mut fresh, request(tail)), "{family:?}, turn {turn}");
        }
    }
}

#[test]
fn stored_weights_change_the_scores_by_no_more_than_their_rounding() {
    for (family, tie) in [(Family::Gpt2, true), (Family::Llama, false)] {
        let (config, weights, _) = trained(family, tie);
        let segment = Segment {
            blocks: vec![0, 1],
            position: 0,
            tokens: (0..20).map(|i| i * 3 % 61).collect(),
            sample: true,
        };
        let logits = |dtype| {
            let options = ModelOptions { weights: dtype, ..ModelOptions::default() };
            let mut model = single(&config, &weights, options);
            let bytes = model.memory().weights;
            (model.run(std::slice::from_ref(&segment)).unwrap().to_vec(), bytes)
        };
        let (want, full) = logits(DType::F32);
        let scale = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        // bf16 rounds by 2^-9, f16 by 2^-12 and int8 by half a step of 1/127 of the greatest; a few
        // layers add up to a few times that.
        for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::Bf16, 2e-2), (DType::I8, 6e-2)] {
            let (got, bytes) = logits(dtype);
            let worst = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
            assert!(worst > 0.0 && worst <= tolerance * scale, "{family:?} {dtype:?}: {worst}");
            assert!(bytes < full, "{dtype:?}: {bytes} of {full} bytes");
        }
    }
}

#[test]
fn a_cache_in_halves_takes_half_the_memory_and_changes_scores_by_its_rounding() {
    for (family, tie) in [(Family::Gpt2, true), (Family::Llama, false)] {
        let (config, weights, _) = trained(family, tie);
        let prompt: Vec<u32> = (0..20).map(|i| i * 3 % 61).collect();
        // In pieces, so that most of what is attended to was stored by an earlier step.
        let logits = |cache| {
            let options = ModelOptions { cache, ..ModelOptions::default() };
            let mut model = single(&config, &weights, options);
            let mut got = Vec::new();
            for (i, tokens) in prompt.chunks(4).enumerate() {
                let segment = Segment {
                    blocks: vec![2, 0],
                    position: 4 * i as u32,
                    tokens: tokens.to_vec(),
                    sample: true,
                };
                got.extend_from_slice(model.run(&[segment]).unwrap());
            }
            (got, model.memory().cache, model.cache_format())
        };
        let (want, full, format) = logits(None);
        assert_eq!(format, DType::F32, "as the weights are");
        let scale = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::Bf16, 2e-2)] {
            let (got, bytes, format) = logits(Some(dtype));
            assert_eq!((bytes * 2, format), (full, dtype));
            let worst = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
            assert!(worst > 0.0 && worst <= tolerance * scale, "{family:?} {dtype:?}: {worst}");
        }
        for (stored, format) in [(DType::F16, DType::F16), (DType::I8, DType::Bf16)] {
            let options = ModelOptions { weights: stored, ..ModelOptions::default() };
            assert_eq!(single(&config, &weights, options).cache_format(), format, "{stored:?}");
        }
    }
}

#[test]
fn a_cache_that_the_device_cannot_store_is_refused_with_those_that_it_can() {
    let groups = local_groups(Mesh::new(Parallelism::SINGLE)).remove(0);
    let coords = Mesh::new(Parallelism::SINGLE).coords(0);
    let (config, _, _) = trained(Family::Llama, false);
    let options = ModelOptions { cache: Some(DType::I8), ..ModelOptions::default() };
    let cpu = Cpu::new(1).unwrap();
    let refused = Model::new(&config, Parallelism::SINGLE, coords, groups, cpu, options);
    let message = refused.err().unwrap().to_string();
    assert!(message.contains("spec.kvCache") && message.contains("f32, bf16, f16"), "{message}");
}

#[test]
fn cancelling_frees_the_place_and_leaves_the_others_alone() {
    let (config, weights, _) = trained(Family::Llama, false);
    let requests = requests();
    let mut leader = Leader::new(single(&config, &weights, small()));
    let want = complete(&mut leader, &requests[5..]).remove(0);
    let doomed = leader.submit(requests[1].clone()).unwrap();
    leader.submit(requests[5].clone()).unwrap();
    leader.step().unwrap();
    assert!(leader.cancel(doomed));
    let mut tokens = Vec::new();
    while !leader.is_idle() {
        for event in leader.step().unwrap().events {
            assert_ne!(event.request, doomed);
            tokens.extend(event.token);
        }
    }
    assert_eq!(tokens, want.0);
}

#[test]
fn a_plan_that_does_not_fit_is_refused_and_harms_nothing() {
    let (config, weights, _) = trained(Family::Llama, false);
    let mut model = single(&config, &weights, ModelOptions { blocks: 4, ..small() });
    let good = Segment { blocks: vec![1], position: 0, tokens: vec![5, 6], sample: true };
    let want = model.run(std::slice::from_ref(&good)).unwrap().to_vec();
    for bad in [
        Segment { blocks: vec![4], ..good.clone() },
        Segment { blocks: vec![], ..good.clone() },
        Segment { tokens: vec![], ..good.clone() },
        Segment { tokens: vec![61], ..good.clone() },
        Segment { position: 15, ..good.clone() },
        Segment { position: u32::MAX, ..good.clone() },
        Segment { tokens: vec![0; 8], ..good.clone() },
    ] {
        assert!(model.run(std::slice::from_ref(&bad)).is_err(), "{bad:?}");
    }
    assert_eq!(model.run(&[good]).unwrap(), want);
}
