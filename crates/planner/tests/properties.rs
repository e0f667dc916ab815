//! Properties that hold for every plan: memory is monotone, terms are sound, nothing panics.

use drumline_planner::catalogue::{Catalogue, Dtype};
use drumline_planner::memory::{layer_activation_bytes, peak, stage_memory};
use drumline_planner::search::{self, Pins, Request};
use drumline_planner::split::{Batch, Machines, Recompute, Split, Stack};
use drumline_planner::step::step_time;
use drumline_planner::{hf, manifest, profile, published, scaling};
use proptest::prelude::*;

fn machines(name: &str) -> Machines {
    let catalogue = Catalogue::builtin();
    let gpu = catalogue.gpu(name).unwrap();
    let network = catalogue.default_network(&gpu);
    Machines { gpu, network }
}

const MODELS: [&str; 8] = [
    "gpt2",
    "gpt3-13b",
    "gpt3-175b",
    "llama2-70b",
    "llama3-8b",
    "mixtral-8x7b",
    "deepseek-v3",
    "t5-11b",
];

fn any_split() -> impl Strategy<Value = (Split, Stack)> {
    (0u32..4, 0u32..4, 0u32..7, 0u32..3, any::<bool>(), 0u8..4, 0usize..3, 0u32..3, 0usize..3)
        .prop_map(|(t, p, d, c, sp, zero, recompute, mb, stack)| {
            let split = Split {
                tensor: 1 << t,
                pipeline: 1 << p,
                virtual_stages: 1,
                data: 1 << d,
                context: 1 << c,
                expert: 1,
                sequence_parallel: sp,
                zero,
                recompute: Recompute::ALL[recompute],
                micro_batch: 1 << mb,
            };
            (split, [Stack::Eager, Stack::Fused, Stack::Overlapped][stack])
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn memory_never_grows_with_sharding_or_recomputation(
        model in 0usize..MODELS.len(), (split, stack) in any_split()
    ) {
        let model = Catalogue::builtin().model(MODELS[model]).unwrap();
        let batch = Batch { sequence: 2048, global: 4096, dtype: Dtype::Bf16, stack };
        let states = |zero: u8| {
            let m = stage_memory(&model, &Split { zero, ..split }, &batch, 4, 3e9, 0);
            m.weights + m.gradients + m.optimizer
        };
        for zero in 0..3u8 {
            prop_assert!(states(zero + 1) <= states(zero));
        }
        let kept = |recompute| {
            layer_activation_bytes(&model, &Split { recompute, ..split }, &batch)
        };
        prop_assert!(kept(Recompute::Full) <= kept(Recompute::Selective));
        prop_assert!(kept(Recompute::Selective) <= kept(Recompute::None));
        let wider = Split { tensor: split.tensor * 2, ..split };
        prop_assert!(
            layer_activation_bytes(&model, &wider, &batch)
                <= layer_activation_bytes(&model, &split, &batch) * (1.0 + 1e-12)
        );
        let more = Split { micro_batch: split.micro_batch * 2, ..split };
        prop_assert!(peak(&model, &more, &batch, 4, 3e9).total() > peak(&model, &split, &batch, 4, 3e9).total());
    }

    #[test]
    fn a_step_is_positive_finite_and_below_the_peak(
        model in 0usize..MODELS.len(), (split, stack) in any_split()
    ) {
        let model = Catalogue::builtin().model(MODELS[model]).unwrap();
        let batch = Batch { sequence: 2048, global: 4096, dtype: Dtype::Bf16, stack };
        let machines = machines("h100-sxm");
        match step_time(&model, &split, &batch, &machines) {
            Ok(s) => {
                prop_assert!(s.step.is_finite() && s.step > 0.0);
                prop_assert!(s.bubble >= -1e-9 * s.step && s.data >= 0.0 && s.pipeline_sends >= 0.0);
                // Attention is counted in full and computed causally, so counted operations may
                // exceed the real ones, but never the peak.
                prop_assert!(s.mfu > 0.0 && s.mfu <= 1.0 && s.hfu >= s.mfu);
            }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }

    #[test]
    fn extreme_dimensions_are_planned_or_refused(
        numbers in proptest::collection::vec(
            prop_oneof![0u32..5, Just(u32::MAX), Just(1 << 30), Just(1 << 24), 8u32..4096], 16
        )
    ) {
        let catalogue = Catalogue::builtin();
        let n = |i: usize| numbers[i].to_string();
        let header = "source,gpu,layers,hidden,ffn,heads,kv_heads,seq,vocab,gpus,tensor,pipeline,virtual_stages,data,context,global_batch_seqs,micro_batch,measured,value";
        let row = ["x".to_owned(), "a100".to_owned()].into_iter()
            .chain((0..15).map(n))
            .chain(["mfu".to_owned(), "0.4".to_owned()])
            .collect::<Vec<_>>()
            .join(",");
        if let Ok(table) = published::read("t", &format!("{header}\n{row}\n"), &catalogue) {
            let _ = table.validate();
        }
        let config = format!(
            r#"{{"model_type":"deepseek_v3","hidden_size":{},"num_hidden_layers":{},"num_attention_heads":{},
            "intermediate_size":{},"max_position_embeddings":{},"vocab_size":{},"n_routed_experts":{},
            "num_experts_per_tok":{},"moe_intermediate_size":{},"n_shared_experts":{},"kv_lora_rank":{},
            "qk_rope_head_dim":{},"qk_nope_head_dim":{},"v_head_dim":{},"first_k_dense_replace":{}}}"#,
            n(0), n(1), n(2), n(3), n(4), n(5), n(6), n(7), n(8), n(9), n(10), n(11), n(12), n(13), n(14)
        );
        if let Ok(model) = hf::read("t", &config) {
            let machines = machines("b200");
            let batch = Batch {
                sequence: model.context.min(4096), global: 64, dtype: Dtype::Bf16,
                stack: Stack::Overlapped,
            };
            let request = Request {
                model: &model, machines: &machines, batch, pins: Pins::default(),
                memory_fraction: 0.94,
            };
            let _ = search::best(&request, 16);
        }
        let t5 = format!(
            r#"{{"model_type":"t5","d_model":{},"num_layers":{},"num_decoder_layers":{},"num_heads":{},
            "d_kv":{},"d_ff":{},"vocab_size":{}}}"#,
            n(0), n(1), n(2), n(3), n(4), n(5), n(6)
        );
        let _ = hf::read("t", &t5).map(|m| m.parameters());
    }

    #[test]
    fn any_text_is_refused_without_a_panic(text in "\\PC{0,200}") {
        let catalogue = Catalogue::builtin();
        let _ = published::read("t", &text, &catalogue);
        let _ = hf::read("t", &text);
        let _ = manifest::read("t", &text);
        let _ = profile::Profile::read("t", &text);
        let _ = scaling::read_runs("t", &text);
        let _ = catalogue.clone().extend("t", &text);
        let _ = catalogue.model(&text);
        let _ = drumline_planner::quantity::parse("t", &text);
        let _ = drumline_planner::quantity::sweep(&text);
    }
}

#[test]
fn twice_the_gpus_are_never_slower_at_the_optimum() {
    let catalogue = Catalogue::builtin();
    for name in ["gpt3-13b", "llama3-8b", "gpt3-175b"] {
        let model = catalogue.model(name).unwrap();
        let machines = machines("h100-sxm");
        let request = Request {
            model: &model,
            machines: &machines,
            batch: Batch {
                sequence: 2048,
                global: 2048,
                dtype: Dtype::Bf16,
                stack: Stack::Overlapped,
            },
            pins: Pins::default(),
            memory_fraction: 0.94,
        };
        let mut last = f64::INFINITY;
        for gpus in [64, 128, 256, 512, 1024, 2048] {
            let step = search::best(&request, gpus).unwrap().best.time.step;
            assert!(step <= last, "{name} on {gpus}: {step} after {last}");
            last = step;
        }
    }
}

#[test]
fn the_search_finds_no_less_than_any_of_its_own_splits() {
    let model = Catalogue::builtin().model("llama2-70b").unwrap();
    let machines = machines("a100-80g");
    let batch = Batch { sequence: 4096, global: 512, dtype: Dtype::Bf16, stack: Stack::Overlapped };
    let request = Request {
        model: &model,
        machines: &machines,
        batch,
        pins: Pins::default(),
        memory_fraction: 0.94,
    };
    let best = search::best(&request, 128).unwrap().best;
    for (tensor, pipeline) in [(8, 1), (8, 2), (4, 4), (4, 8), (2, 8), (8, 4)] {
        for micro_batch in [1, 2] {
            for recompute in Recompute::ALL {
                let split = Split {
                    tensor,
                    pipeline,
                    data: 128 / tensor / pipeline,
                    sequence_parallel: true,
                    zero: 1,
                    micro_batch,
                    recompute,
                    ..Split::SINGLE
                };
                let time = step_time(&model, &split, &batch, &machines).unwrap();
                let fits = peak(
                    &model,
                    &split,
                    &batch,
                    time.micro_batches as u32,
                    machines.framework_bytes(),
                )
                .total()
                    <= 0.94 * machines.gpu.memory_bytes;
                assert!(!fits || best.time.step <= time.step * (1.0 + 1e-9), "{split}");
            }
        }
    }
}

#[test]
fn the_same_request_gives_the_same_plan() {
    let model = Catalogue::builtin().model("mixtral-8x22b").unwrap();
    let machines = machines("h200");
    let request = Request {
        model: &model,
        machines: &machines,
        batch: Batch { sequence: 8192, global: 512, dtype: Dtype::Bf16, stack: Stack::Overlapped },
        pins: Pins::default(),
        memory_fraction: 0.94,
    };
    assert_eq!(search::best(&request, 128).unwrap(), search::best(&request, 128).unwrap());
}

#[test]
fn a_trillion_parameters_on_16384_gpus_take_less_than_a_second() {
    let model = Catalogue::builtin().model("megatron-1t").unwrap();
    let machines = machines("h100-sxm");
    let request = Request {
        model: &model,
        machines: &machines,
        batch: Batch { sequence: 2048, global: 4096, dtype: Dtype::Bf16, stack: Stack::Overlapped },
        pins: Pins::default(),
        memory_fraction: 0.94,
    };
    let start = std::time::Instant::now();
    let found = search::best(&request, 16_384).unwrap();
    let took = start.elapsed();
    println!("{} splits in {took:?}", found.considered);
    assert!(took < std::time::Duration::from_secs(1), "{took:?}");
}
