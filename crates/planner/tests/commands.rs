//! The commands as a command line uses them: what users ask, and what they are told.

use drumline_planner::PlanError;
use drumline_planner::command::{
    BudgetArgs, Inputs, ServeArgs, TextFile, TrainArgs, budget, serve, train,
};

fn train_args(model: &str, gpu: &str) -> TrainArgs {
    TrainArgs {
        model: model.into(),
        gpu: gpu.into(),
        max_gpus: 16_384,
        memory_fraction: 0.94,
        failures_per_node_day: 0.004,
        restart_seconds: 600.0,
        ..TrainArgs::default()
    }
}

fn serve_args(model: &str, gpu: &str) -> ServeArgs {
    ServeArgs {
        model: model.into(),
        gpu: gpu.into(),
        max_gpus: 16,
        prompt: 1024,
        output_tokens: 256,
        memory_fraction: 0.9,
        ..ServeArgs::default()
    }
}

#[test]
fn gpt_3_takes_14_8_days_and_3640_pf_days_at_the_published_rate() {
    // Brown et al. 2020, table D.1: 3.64e3 PF-days; Narayanan et al. 2021 and others: 10,000 V100.
    let args = TrainArgs {
        gpus: Some(10_000),
        tokens: Some("300B".into()),
        achieved_tflops: Some(24.6),
        ..train_args("gpt3-175b", "v100-32g")
    };
    let output = train(&args, &Inputs::default()).unwrap();
    let at = &output.json["at_achieved"];
    assert!((at["days"].as_f64().unwrap() - 14.8).abs() < 0.05, "{at}");
    assert!((at["pf_days"].as_f64().unwrap() - 3640.0).abs() < 5.0, "{at}");
    let alternatives = output.json["alternatives"].as_array().unwrap();
    let of = |gpu: &str| {
        let days = |a: &&serde_json::Value| a["gpu"] == gpu && a["gpus"] == 10_000;
        alternatives.iter().find(days).map(|a| a["days"].as_f64().unwrap())
    };
    let same = of("v100-32g").unwrap();
    assert!(same < 14.8, "the search does better on the same machines: {same}");
    assert!(of("h100-sxm").unwrap() < same);
    assert!(output.table.contains("14.8 days") && output.table.contains("3638 PF-days"));
}

#[test]
fn a_table_fits_a_screen() {
    let args = TrainArgs {
        gpus: Some(1024),
        tokens: Some("300B".into()),
        sweep: Some("gpus=256..4096".into()),
        ..train_args("gpt3-175b", "a100-80g")
    };
    let output = train(&args, &Inputs::default()).unwrap();
    assert!(output.table.lines().count() <= 40, "{}", output.table);
    for line in output.table.lines() {
        assert!(line.chars().count() <= 110, "{line}");
    }
    let svg = output.plot.unwrap();
    assert!(svg.starts_with("<svg") && svg.matches("<circle").count() == 15);
    assert_eq!(output.json["sweep"].as_array().unwrap().len(), 5);
}

#[test]
fn an_emitted_manifest_is_one_that_submit_accepts() {
    for (model, gpus) in [("llama3-8b", 64), ("gpt3-175b", 512), ("yi-34b", 128)] {
        let args = TrainArgs {
            gpus: Some(gpus),
            tokens: Some("100B".into()),
            emit: Some("manifest".into()),
            ..train_args(model, "h100-sxm")
        };
        let output = train(&args, &Inputs::default()).unwrap();
        let text = output.manifest.unwrap();
        let specs = drumline_spec::manifest::parse(&text, "plan.yaml")
            .unwrap_or_else(|mistakes| panic!("{model}: {mistakes:?}\n{text}"));
        assert_eq!(specs[0].gang().ranks, gpus, "{text}");
        // And planned again from its own manifest, the model is the same.
        let inputs = Inputs {
            model: Some(TextFile { name: "plan.yaml".into(), text }),
            ..Inputs::default()
        };
        let again = TrainArgs { emit: None, ..args };
        let again = train(&again, &inputs).unwrap();
        assert_eq!(again.json["gpus"], gpus);
        let ratio = again.json["parameters"].as_f64().unwrap()
            / output.json["parameters"].as_f64().unwrap();
        assert!((ratio - 1.0).abs() < 1e-3, "{ratio}");
    }
    let args = TrainArgs {
        gpus: Some(64),
        emit: Some("manifest".into()),
        ..train_args("mixtral-8x7b", "h100-sxm")
    };
    let error = train(&args, &Inputs::default()).unwrap_err().to_string();
    assert!(error.contains("cannot express the mixture of experts"), "{error}");
}

#[test]
fn unknown_names_get_the_nearest() {
    for (args, nearest) in [
        (TrainArgs { gpus: Some(8), ..train_args("lama3-8b", "h100") }, "llama3-8b"),
        (TrainArgs { gpus: Some(8), ..train_args("gpt2", "a100-80q") }, "a100-80g"),
        (
            TrainArgs { gpus: Some(8), dtype: Some("bf61".into()), ..train_args("gpt2", "h100") },
            "bf16",
        ),
        (
            TrainArgs { gpus: Some(8), network: Some("ndr".into()), ..train_args("gpt2", "h100") },
            "ndr-8x400",
        ),
        (
            TrainArgs { gpus: Some(8), emit: Some("manifst".into()), ..train_args("gpt2", "h100") },
            "manifest",
        ),
        (
            TrainArgs {
                gpus: Some(8),
                sweep: Some("gpu=8..16".into()),
                ..train_args("gpt2", "h100")
            },
            "gpus",
        ),
    ] {
        let error = train(&args, &Inputs::default()).unwrap_err();
        let PlanError::UnknownName { nearest: names, .. } = &error else { panic!("{error}") };
        assert_eq!(names[0], nearest, "{error}");
    }
}

#[test]
fn impossible_requests_say_what_is_short_and_what_works() {
    let cases = [
        (TrainArgs { gpus: Some(8), ..train_args("gpt3-175b", "a100-80g") }, "GiB short"),
        (TrainArgs { gpus: Some(0), ..train_args("gpt2", "h100") }, "not from 1"),
        (TrainArgs { ..train_args("gpt2", "h100") }, "give a number of GPUs"),
        (
            TrainArgs { gpus: Some(8), dtype: Some("fp8".into()), ..train_args("gpt2", "v100") },
            "no fp8 matrix units",
        ),
        (
            TrainArgs {
                gpus: Some(16),
                network: Some("single-node".into()),
                ..train_args("gpt2", "h100")
            },
            "nearest that works: 8 GPUs",
        ),
        (
            TrainArgs { gpus: Some(16), tensor: Some(5), ..train_args("gpt2", "h100") },
            "heads 12 of gpt2 is not divisible by tensor 5; nearest that works: tensor 4",
        ),
        (
            TrainArgs { gpus: Some(16), tensor: Some(3), ..train_args("gpt2", "h100") },
            "nearest that works: 15 or 18",
        ),
        (
            TrainArgs {
                gpus: Some(8),
                micro_batch: Some(3),
                global_batch: Some(16),
                ..train_args("gpt2", "h100")
            },
            "nearest that works: 15 or 18",
        ),
        (
            TrainArgs {
                deadline_days: Some(0.01),
                tokens: Some("15T".into()),
                ..train_args("llama3-70b", "h100")
            },
            "days too long",
        ),
        (
            TrainArgs {
                gpus: Some(8),
                deadline_days: Some(10.0),
                tokens: Some("1T".into()),
                ..train_args("llama3-8b", "h100")
            },
            "nearest that works: 144 GPUs",
        ),
        (
            TrainArgs { gpus: Some(8), cheapest: true, ..train_args("gpt2", "h100") },
            "leave one of them out",
        ),
        (
            TrainArgs { gpus: Some(8), tokens: Some("many".into()), ..train_args("gpt2", "h100") },
            "'many' is not a positive amount",
        ),
    ];
    for (args, words) in cases {
        let error = train(&args, &Inputs::default()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn what_is_assumed_is_said() {
    let args = TrainArgs {
        gpus: Some(4096),
        tokens: Some("1T".into()),
        ..train_args("wudao-2.0", "b200")
    };
    let output = train(&args, &Inputs::default()).unwrap();
    assert!(output.warnings.iter().any(|w| w.contains("not published and assumed here")));
    assert!(output.warnings.iter().any(|w| w.contains("not fitted")));
}

#[test]
fn a_config_json_is_planned_and_an_uncovered_one_is_refused() {
    let config = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":4096,
      "intermediate_size":14336,"num_hidden_layers":32,"num_attention_heads":32,
      "num_key_value_heads":8,"vocab_size":128256,"max_position_embeddings":8192}"#;
    let inputs = |text: &str| Inputs {
        model: Some(TextFile { name: "config.json".into(), text: text.into() }),
        ..Inputs::default()
    };
    let args = TrainArgs { gpus: Some(64), ..train_args("config.json", "h100") };
    let from_file = train(&args, &inputs(config)).unwrap();
    let named = TrainArgs { gpus: Some(64), ..train_args("llama3-8b", "h100") };
    let named = train(&named, &Inputs::default()).unwrap();
    assert_eq!(from_file.json["found"], named.json["found"]);
    let error = train(&args, &inputs(&config.replace("\"llama\"", "\"mamba\""))).unwrap_err();
    assert!(matches!(error, PlanError::UnsupportedArchitecture { .. }), "{error}");
}

#[test]
fn serving_answers_with_latency_throughput_and_price() {
    let output = serve(&serve_args("llama3-70b", "h100"), &Inputs::default()).unwrap();
    let chosen = &output.json["chosen"];
    assert!(chosen["tpot_s"].as_f64().unwrap() <= 0.05);
    assert!(output.table.contains("CONCURRENCY") && output.table.contains('<'));
    let quantised = ServeArgs { dtype: Some("fp8".into()), ..serve_args("llama3-70b", "h100") };
    let fp8 = serve(&quantised, &Inputs::default()).unwrap();
    assert!(
        fp8.json["chosen"]["tokens_per_second_per_gpu"].as_f64()
            > chosen["tokens_per_second_per_gpu"].as_f64()
    );
    let small = ServeArgs { max_gpus: 1, ..serve_args("llama3-405b", "h100") };
    let error = serve(&small, &Inputs::default()).unwrap_err().to_string();
    assert!(error.contains("GiB short"), "{error}");
    for model in ["deepseek-v3", "mixtral-8x7b", "gpt2", "t5-11b"] {
        let args = ServeArgs { prompt: 128, output_tokens: 64, ..serve_args(model, "h200") };
        let output = serve(&args, &Inputs::default()).unwrap();
        assert!(output.json["chosen"]["tokens_per_second"].as_f64().unwrap() > 1.0, "{model}");
    }
}

#[test]
fn budgets_in_every_unit_agree() {
    let base = BudgetArgs { gpu: "h100-sxm".into(), mfu: 0.4, ..BudgetArgs::default() };
    let flops = |args: &BudgetArgs| {
        budget(args, &Inputs::default()).unwrap().json["flops"].as_f64().unwrap()
    };
    // 989.4e12 * 0.4 * 3600 operations per GPU-hour, by hand.
    let hours = BudgetArgs { gpu_hours: Some("1000".into()), ..base.clone() };
    assert!((flops(&hours) / (1000.0 * 989.4e12 * 0.4 * 3600.0) - 1.0).abs() < 1e-12);
    let money =
        BudgetArgs { money: Some("2900".into()), price_per_hour: Some(2.9), ..base.clone() };
    assert!((flops(&money) / flops(&hours) - 1.0).abs() < 1e-12);
    let none = budget(&base, &Inputs::default()).unwrap_err().to_string();
    assert!(none.contains("give one budget"), "{none}");
    let two = BudgetArgs { flops: Some("1e23".into()), ..money };
    assert!(budget(&two, &Inputs::default()).unwrap_err().to_string().contains("not several"));
    let asked = BudgetArgs {
        flops: Some("5.88e23".into()),
        parameters: Some("280B".into()),
        served_tokens: Some("1T".into()),
        ..base
    };
    let output = budget(&asked, &Inputs::default()).unwrap();
    // Gopher was too large for its budget (Hoffmann et al. 2022): a higher loss than the optimum.
    let law = &output.json["laws"][1];
    assert!(law["loss_of_asked"].as_f64() > law["optimum"]["loss"].as_f64());
}

#[test]
fn every_catalogued_gpu_plans_a_small_model() {
    for gpu in drumline_planner::Catalogue::builtin().gpus() {
        let args =
            TrainArgs { gpus: Some(8), sequence: Some(1024), ..train_args("gpt2", &gpu.name) };
        // A pair or a group of four of these has a network between.
        let output = train(&args, &Inputs::default()).unwrap();
        let mfu = output.json["found"]["best"]["time"]["mfu"].as_f64().unwrap();
        assert!((0.005..0.9).contains(&mfu), "{}: {mfu}", gpu.name);
    }
}

#[test]
fn deepseek_v3_takes_about_the_reported_gpu_hours() {
    // 2,664 K H800 hours for 14.8 T tokens in fp8 on 2,048 GPUs, batch 15,360 of 4,096 tokens
    // (2412.19437, sections 4.2 and 1). The report's schedule hides more of the all-to-all.
    let args = TrainArgs {
        gpus: Some(2048),
        tokens: Some("14.8T".into()),
        sequence: Some(4096),
        global_batch: Some(15_360),
        dtype: Some("fp8".into()),
        ..train_args("deepseek-v3", "h800")
    };
    let output = train(&args, &Inputs::default()).unwrap();
    let hours = output.json["days"].as_f64().unwrap() * 24.0 * 2048.0;
    let error = hours / 2.664e6 - 1.0;
    println!("{hours:.3e} GPU-hours, {:+.1}%", error * 100.0);
    assert!(error.abs() < 0.2, "{hours}");
}

#[test]
fn activations_of_the_175b_run_match_korthikanti_with_and_without_sequence_parallelism() {
    // Korthikanti et al. 2022, table 2 and section 4.3: per layer s b h (34/t) with sequence
    // parallelism and selective recomputation, s b h (10 + 24/t) without, times 12 layers of the
    // first stage and p (1 + (p-1)/(p v)) micro-batches; plus the embedding's dropout mask.
    let (s, h, t, p, v) = (2048.0_f64, 12_288.0, 8.0, 8.0, 3.0);
    for (sequence_parallel, per_layer) in [(true, 34.0 / t), (false, 10.0 + 24.0 / t)] {
        let args = TrainArgs {
            gpus: Some(64),
            sequence: Some(2048),
            global_batch: Some(64),
            dtype: Some("fp16".into()),
            stack: Some("fused".into()),
            tensor: Some(8),
            pipeline: Some(8),
            virtual_stages: Some(3),
            micro_batch: Some(1),
            recompute: Some("selective".into()),
            sequence_parallel: Some(sequence_parallel),
            memory_fraction: 1.0,
            // Without sequence parallelism it needs 95 GiB, more than the A100 of the paper has.
            ..train_args("gpt3-175b", "h200")
        };
        let output = train(&args, &Inputs::default()).unwrap();
        let got = output.json["stages"][0]["activations"].as_f64().unwrap();
        let published = s * h * per_layer * 12.0 * p * (1.0 + (p - 1.0) / (p * v));
        let error = got / published - 1.0;
        println!(
            "{:.2} GiB for {:.2}, {:+.1}%",
            got / 1.0737e9,
            published / 1.0737e9,
            error * 100.0
        );
        assert!(error.abs() < 0.1, "{got} {published}");
    }
}

#[test]
fn a_sweep_needs_no_number_of_gpus() {
    let args =
        TrainArgs { sweep: Some("gpus=8..1024".into()), ..train_args("gpt3-175b", "h100-sxm") };
    let output = train(&args, &Inputs::default()).unwrap();
    // 8 and 16 GPUs cannot hold it: the plan is of the first number that can.
    let first = output.json["sweep"][0]["gpus"].as_u64().unwrap();
    assert_eq!(output.json["gpus"], first);
    assert!(first > 8 && output.plot.is_some());
    let none = TrainArgs { sweep: Some("gpus=1..2".into()), ..args };
    assert!(train(&none, &Inputs::default()).unwrap_err().to_string().contains("GiB short"));
}

#[test]
fn a_profile_takes_the_place_of_the_catalogue() {
    let product = |m: u32, n: u32, k: u32| {
        let seconds = 2.0 * f64::from(m) * f64::from(n) * f64::from(k) / 80e9 + 2e-6;
        format!(r#"{{"m":{m},"n":{n},"k":{k},"seconds":{seconds:e}}}"#)
    };
    let products: Vec<String> =
        [(512, 512, 512), (128, 1024, 256), (1024, 1024, 1024), (32, 512, 512)]
            .map(|(m, n, k)| product(m, n, k))
            .to_vec();
    let text = format!(
        r#"{{"name":"this node","dtype":"fp32","threads":1,"at_once":2,"memory_bytes":8e9,
        "memory_bandwidth":1e10,"devices":4,"matmul":[{}],
        "all_reduce":[{{"ranks":2,"bytes":4096,"seconds":1e-5}},
                      {{"ranks":2,"bytes":16777216,"seconds":1e-2}}]}}"#,
        products.join(",")
    );
    let inputs =
        Inputs { profile: Some(TextFile { name: "node.json".into(), text }), ..Inputs::default() };
    let args = |gpus| TrainArgs {
        gpus: Some(gpus),
        tokens: Some("1B".into()),
        global_batch: Some(8),
        sequence: Some(512),
        ..train_args("gpt2", "h100-sxm")
    };
    let of = |gpus| train(&args(gpus), &inputs).unwrap().json["found"]["best"]["time"].clone();
    let [one, two, four] = [1, 2, 4].map(of);
    let step = |v: &serde_json::Value| v["step"].as_f64().unwrap();
    // 6 x 124 million parameters x 4,096 tokens and attention at 80 GFLOP/s or less: 38 s or more.
    assert!((38.0..80.0).contains(&step(&one)), "{one}");
    assert!(step(&two) < 0.6 * step(&one), "{two}");
    // Four devices share two cores: no faster than two.
    assert!(step(&four) >= 0.99 * step(&two) && four["sharing"].as_f64().unwrap() > 0.0, "{four}");
}
