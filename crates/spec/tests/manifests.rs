//! Whole manifests: what is right is accepted, and what is wrong is told all at once.

use std::path::Path;

use drumline_spec::field::{Kind, Presence};
use drumline_spec::manifest::{MISTAKES_MAX, parse, parse_bytes};
use drumline_spec::table::{MANIFESTS, each_field};
use drumline_spec::{JobKind, JobSpec, SplitChoice, Work, explain, schema};
use proptest::prelude::*;

const TRAIN: &str = "\
apiVersion: drumline.dev/v1alpha1
kind: TrainingJob
metadata: {name: t}
spec:
  model: {family: llama, layers: 4, hidden: 64, ffn: 128, heads: 4, vocab: 256, context: 32}
  data: {path: /d}
  batch: {global: 8}
  steps: 100
";

fn told(text: &str) -> Vec<String> {
    match parse(text, "job.yaml") {
        Ok(_) => Vec::new(),
        Err(mistakes) => mistakes.iter().map(ToString::to_string).collect(),
    }
}

fn golden(name: &str, actual: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, actual).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(actual, expected, "{} differs; UPDATE=1 rewrites it", path.display());
}

fn examples() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/examples");
    let mut found: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "yaml" || ext == "json"))
        .map(|path| (path.display().to_string(), std::fs::read_to_string(path).unwrap()))
        .collect();
    found.sort();
    found
}

#[test]
fn a_file_of_mistakes_tells_every_one_with_its_place() {
    let told = told(include_str!("golden/mistakes.yaml"));
    golden("mistakes.txt", &(told.join("\n") + "\n"));
}

#[test]
fn every_example_is_right() {
    let mut kinds = Vec::new();
    for (name, text) in examples() {
        match parse(&text, &name) {
            Ok(specs) => kinds.extend(specs.iter().map(JobSpec::kind)),
            Err(mistakes) => panic!("{mistakes:#?}"),
        }
    }
    for kind in JobKind::ALL {
        assert!(kinds.contains(&kind), "no example of {kind}");
    }
}

#[test]
fn the_demo_trains_ten_million_parameters_on_four_ranks() {
    let examples = examples();
    let (name, text) = examples.iter().find(|(name, _)| name.ends_with("train-demo.yaml")).unwrap();
    let specs = parse(text, name).unwrap();
    let Work::TrainingJob(job) = &specs[0].work else { panic!("{:?}", specs[0]) };
    assert_eq!((job.parallelism.tensor, job.parallelism.pipeline), (2, 2));
    let parameters = job.model.parameters();
    assert!((9_000_000..11_000_000).contains(&parameters), "{parameters}");
}

#[test]
fn defaults_come_from_the_table() {
    let spec = parse(TRAIN, "x").unwrap().remove(0);
    assert_eq!(spec.settings.queue.as_str(), "default");
    assert_eq!(spec.settings.restarts.backoff_ms, 1000);
    assert_eq!(spec.settings.stall_timeout_ms, 300_000);
    let Work::TrainingJob(job) = spec.work else { panic!() };
    assert_eq!(job.model.kv_heads, 4);
    assert_eq!((job.sequence, job.micro_batch, job.parallelism.world_size()), (32, 1, 1));
    assert_eq!(job.learning_rate.warmup_steps, 5);
    assert!((job.learning_rate.floor - job.learning_rate.peak / 10.0).abs() < 1e-9);
    assert!(!job.model.tie_embeddings);
}

#[test]
fn a_split_may_be_left_to_the_planner() {
    let auto = |micro: &str| {
        TRAIN
            .replace("steps:", "parallelism: auto\n  steps:")
            .replace("{global: 8}", &format!("{{global: 8{micro}}}"))
    };
    let spec = parse(&auto(""), "x").unwrap().remove(0);
    assert_eq!(spec.split, SplitChoice::Auto { micro_is_given: false });
    let json = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<JobSpec>(&json).unwrap(), spec);
    let spec = parse(&auto(", micro: 2"), "x").unwrap().remove(0);
    assert_eq!(spec.split, SplitChoice::Auto { micro_is_given: true });
    assert!(parse(TRAIN, "x").unwrap()[0].split.is_given());
    assert_eq!(
        told(&auto("").replace(": auto", ": atuo")),
        [
            "job.yaml:8:16: spec.parallelism: must be an object with fields, or auto, and is \"atuo\"; did you mean `auto`?"
        ]
    );
    assert!(explain("TrainingJob.parallelism").unwrap().contains("Or the word auto"));
    let schema = schema("TrainingJob").unwrap();
    let split = &schema["properties"]["spec"]["properties"]["parallelism"];
    assert_eq!(
        (split["type"][1].as_str(), split["pattern"].as_str()),
        (Some("string"), Some("^auto$"))
    );
}

#[test]
fn json_and_yaml_say_the_same() {
    let json = r#"{"apiVersion":"drumline.dev/v1alpha1","kind":"TrainingJob","metadata":{"name":"t"},
        "spec":{"model":{"family":"llama","layers":4,"hidden":64,"ffn":128,"heads":4,"vocab":256,
        "context":32},"data":{"path":"/d"},"batch":{"global":8},"steps":100},"status":{"phase":7}}"#;
    assert_eq!(parse(json, "a").unwrap(), parse(TRAIN, "b").unwrap());
}

#[test]
fn impossible_splits_name_the_numbers_and_the_nearest_that_works() {
    let with = |old: &str, new: &str| told(&TRAIN.replace(old, new));
    for (old, new, expected) in [
        (
            "steps:",
            "parallelism: {tensor: 3}\n  steps:",
            "job.yaml:8:17: spec.parallelism.tensor: heads 4 is not divisible by tensor 3; nearest that works: tensor 2",
        ),
        (
            "steps:",
            "parallelism: {pipeline: 3}\n  steps:",
            "job.yaml:8:17: spec.parallelism.pipeline: layers 4 is not divisible by pipeline 3; nearest that works: pipeline 2",
        ),
        (
            "steps:",
            "parallelism: {virtualStages: 2}\n  steps:",
            "job.yaml:8:17: spec.parallelism.virtualStages: 2 virtual stages need a pipeline of at least 2 stages; without one, leave it out",
        ),
        (
            "steps:",
            "parallelism: {pipeline: 2, virtualStages: 3}\n  steps:",
            "job.yaml:8:30: spec.parallelism.virtualStages: layers 4 is not divisible by pipeline 2 x virtualStages 3 = 6; nearest that works: virtualStages 2",
        ),
        (
            "{global: 8}",
            "{global: 6, micro: 2}\n  parallelism: {pipeline: 2, virtualStages: 2}",
            "job.yaml:8:30: spec.parallelism.virtualStages: virtualStages 2 goes round the stages in whole turns: the 3 micro-batches of a copy (global 6 / (micro 2 x data 1)) must be a multiple of pipeline 2",
        ),
        (
            "{global: 8}",
            "{global: 8, micro: 3}",
            "job.yaml:7:11: spec.batch.global: global 8 is not divisible by data 1 x micro 3 = 3; nearest that works: global 9",
        ),
        (
            "{global: 8}",
            "{global: 8, sequence: 33}",
            "job.yaml:7:22: spec.batch.sequence: sequence 33 is longer than model.context 32; at most 32 works",
        ),
        (
            "steps:",
            "parallelism: {tensor: 1024, pipeline: 1024, data: 65536}\n  steps:",
            "job.yaml:8:3: spec.parallelism: tensor 1024 x pipeline 1024 x data 65536 = 68719476736 ranks; at most 65536 are allowed",
        ),
        (
            "steps:",
            "memory: {shardOptimizer: true}\n  steps:",
            "job.yaml:8:12: spec.memory.shardOptimizer: the copies of the model share the optimizer, and data 1 is one copy; nearest that works: data 2, or leave it out",
        ),
        (
            "steps:",
            "memory: {sequenceParallel: true}\n  steps:",
            "job.yaml:8:12: spec.memory.sequenceParallel: the ranks of a tensor group share the rows, and tensor 1 is one rank; nearest that works: tensor 2, or leave it out",
        ),
        (
            "{global: 8}",
            "{global: 8, sequence: 31}\n  parallelism: {tensor: 2}\n  memory: {sequenceParallel: true}",
            "job.yaml:9:12: spec.memory.sequenceParallel: micro 1 x sequence 31 = 31 rows are not divisible by tensor 2",
        ),
        (
            "steps:",
            "memory: {recompute: some}\n  steps:",
            "job.yaml:8:23: spec.memory.recompute: \"some\" is not one of none, selective, full",
        ),
        (
            "steps:",
            "deterministic: true\n  parallelism: auto\n  steps:",
            "job.yaml:8:3: spec.deterministic: auto chooses by what is free, so that two runs may be split differently; give the split, as `drumline submit --dry-run` shows it",
        ),
        (
            "steps:",
            "deterministic: true\n  parallelism: {data: 2}\n  elastic: {least: 1, most: 4}\n  steps:",
            "job.yaml:8:3: spec.deterministic: an elastic run adds in another order with every size; leave elastic out",
        ),
        (
            "steps:",
            "precision: bf16\n  optimizer: {rounding: stochastic}\n  steps:",
            "job.yaml:9:15: spec.optimizer.rounding: only a GPU keeps the weights in bf16 beside those in f32, and only for products in bf16; set spec.precision: bf16 and spec.resources.device: gpu, or leave it out",
        ),
        (
            "family: llama",
            "family: gpt2, kvHeads: 2, ropeTheta: 5",
            "job.yaml:5:25: spec.model.kvHeads: gpt2 has no grouped queries: kvHeads 2 must equal heads 4",
        ),
    ] {
        let told = with(old, new);
        assert!(told.iter().any(|line| line == expected), "wanted {expected}\ngot {told:#?}");
    }
}

#[test]
fn what_is_given_for_memory_is_read_and_absent_in_specs_from_before() {
    use drumline_spec::{MemoryOptions, Recompute};
    let text = TRAIN.replace(
        "steps:",
        "parallelism: {tensor: 2, data: 2}\n  memory: {recompute: full, shardOptimizer: true, \
         sequenceParallel: true}\n  deterministic: true\n  steps:",
    );
    let spec = parse(&text, "x").unwrap().remove(0);
    let Work::TrainingJob(job) = &spec.work else { panic!("{spec:?}") };
    let all = MemoryOptions {
        recompute: Recompute::Full,
        shard_optimizer: true,
        sequence_parallel: true,
    };
    assert_eq!((job.memory, job.deterministic), (all, true));
    let mut json = serde_json::to_value(job).unwrap();
    json.as_object_mut().unwrap().retain(|key, _| key != "memory" && key != "deterministic");
    let old: drumline_spec::TrainingJob = serde_json::from_value(json).unwrap();
    assert_eq!((old.memory, old.deterministic), (MemoryOptions::default(), false));
    // One copy now, more of them when it grows.
    let text = TRAIN.replace(
        "steps:",
        "memory: {shardOptimizer: true}\n  elastic: {least: 1, most: 2}\n  steps:",
    );
    assert!(parse(&text, "x").is_ok());
}

#[test]
fn weights_rounded_by_chance_are_read_and_absent_in_specs_from_before() {
    use drumline_spec::WeightRounding;
    let text = TRAIN.replace(
        "steps:",
        "precision: bf16\n  resources: {device: gpu}\n  optimizer: {rounding: stochastic}\n  steps:",
    );
    let spec = parse(&text, "x").unwrap().remove(0);
    let Work::TrainingJob(job) = &spec.work else { panic!("{spec:?}") };
    assert_eq!(job.optimizer.rounding, WeightRounding::Stochastic);
    let mut json = serde_json::to_value(job).unwrap();
    json["optimizer"].as_object_mut().unwrap().remove("rounding");
    let old: drumline_spec::TrainingJob = serde_json::from_value(json).unwrap();
    assert_eq!(old.optimizer.rounding, WeightRounding::Nearest);
}

#[test]
fn interleaving_and_bf16_are_read_and_specs_from_before_them_still_are() {
    let text = TRAIN.replace(
        "steps:",
        "parallelism: {pipeline: 2, virtualStages: 2}\n  precision: bf16\n  steps:",
    );
    let spec = parse(&text, "x").unwrap().remove(0);
    let Work::TrainingJob(job) = &spec.work else { panic!("{spec:?}") };
    assert_eq!((job.virtual_stages, job.precision), (2, drumline_spec::Precision::Bf16));
    let mut json = serde_json::to_value(job).unwrap();
    json.as_object_mut().unwrap().retain(|key, _| key != "virtual_stages" && key != "precision");
    let old: drumline_spec::TrainingJob = serde_json::from_value(json).unwrap();
    assert_eq!((old.virtual_stages, old.precision), (1, drumline_spec::Precision::F32));
}

#[test]
fn one_bad_document_stores_nothing_of_the_file() {
    let text = format!("{TRAIN}---\n{}", TRAIN.replace("steps: 100", "steps: 0"));
    assert_eq!(
        told(&text),
        ["job.yaml:17:10: spec.steps: 0 is out of range; 1 to 1000000000 are allowed"]
    );
    assert_eq!(parse(&format!("{TRAIN}---\n{TRAIN}---\n# the end\n"), "x").unwrap().len(), 2);
}

#[test]
fn nothing_bytes_and_too_much_are_told_plainly() {
    for empty in ["", "\n\n", "# only a comment\n", "---\n---\n", "null\n"] {
        let told = told(empty);
        assert_eq!(told.len(), 1, "{empty:?}: {told:?}");
        assert!(told[0].contains("holds no manifest"), "{told:?}");
    }
    let mistakes = parse_bytes(b"kind: x\nab\xff", "x").unwrap_err();
    assert_eq!(mistakes[0].to_string(), "x:2:3: the file is not UTF-8 text from here on");
    let many: String = (0..1000).map(|n| format!("x{n}: 1\n")).collect();
    let told = told(&format!("kind: CommandJob\n{many}"));
    assert_eq!(told.len(), MISTAKES_MAX + 1);
    assert!(told[MISTAKES_MAX].contains("more mistakes"), "{}", told[MISTAKES_MAX]);
    assert!(!parse(&"x".repeat(2 << 20), "x").unwrap_err().is_empty());
}

#[test]
fn explain_answers_for_every_field_and_names_the_nearest_for_others() {
    for manifest in MANIFESTS {
        let mut paths = Vec::new();
        each_field(manifest, &mut |path, field| paths.push((path.to_owned(), field.doc)));
        for (path, doc) in paths {
            let text = explain(&format!("{}.{path}", manifest.name)).unwrap();
            let first = doc.split_whitespace().next().unwrap();
            assert!(text.contains(first), "{path}: {text}");
        }
    }
    assert!(explain("TrainingJob.model").unwrap().contains("kvHeads"));
    assert!(explain("").unwrap().contains("CommandJob"));
    assert_eq!(
        explain("TrainingJob.modle.heads").unwrap_err().nearest.as_deref(),
        Some("TrainingJob.model.heads")
    );
    assert_eq!(explain("TraningJob").unwrap_err().nearest.as_deref(), Some("TrainingJob"));
}

#[test]
fn the_schema_has_every_field_of_the_table() {
    for manifest in MANIFESTS {
        let schema = schema(manifest.name).unwrap();
        each_field(manifest, &mut |path, field| {
            let pointer: String =
                path.split('.').map(|name| format!("/properties/{name}")).collect();
            let found = schema.pointer(&pointer).unwrap_or_else(|| panic!("{path}"));
            if let (Kind::Integer { min, .. }, Presence::Default(text)) =
                (&field.kind, &field.presence)
            {
                assert_eq!(found["minimum"], *min);
                assert_eq!(found["default"].to_string(), *text);
            }
        });
    }
    assert!(schema("Cue").is_none());
}

/// A small edit of a right manifest: what slips of the keyboard look like.
fn mutated() -> impl Strategy<Value = String> {
    let base = examples().into_iter().map(|(_, text)| text).collect::<Vec<_>>().join("---\n");
    let length = base.len();
    let edit = (0..length, 0..20usize, "[ -~\n\t]{0,8}");
    proptest::collection::vec(edit, 1..6).prop_map(move |edits| {
        let mut text = base.clone();
        for (at, cut, insert) in edits {
            let at = at.min(text.len());
            let end = (at + cut).min(text.len());
            text.replace_range(at..end, &insert);
        }
        text
    })
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        if let Err(mistakes) = parse_bytes(&bytes, "x") {
            prop_assert!(!mistakes.is_empty());
        }
    }

    #[test]
    fn no_yaml_like_text_makes_the_parser_panic(text in "([a-z]{1,3}|[-:?{}\\[\\],&*!|>'\"%@`#<~ \n\t]|kind|spec|metadata){0,120}") {
        if let Err(mistakes) = parse(&text, "x") {
            prop_assert!(!mistakes.is_empty());
        }
    }

    #[test]
    fn a_mutated_manifest_is_judged_and_what_passes_is_legal(text in mutated()) {
        match parse(&text, "x") {
            Err(mistakes) => {
                prop_assert!(!mistakes.is_empty());
                let lines = text.split('\n').count() + 1;
                for mistake in mistakes {
                    prop_assert!(mistake.place.line >= 1 && mistake.place.line <= lines, "{mistake}");
                }
            }
            Ok(specs) => for spec in specs {
                prop_assert!(spec.gang().ranks >= 1);
                if let Work::TrainingJob(job) = &spec.work {
                    let split = job.parallelism;
                    prop_assert!(job.model.check(split.tensor, split.pipeline).is_empty());
                    prop_assert!(job.micro_batches() >= 1);
                }
            },
        }
    }

    #[test]
    fn numbers_of_any_size_overflow_nothing(numbers in proptest::collection::vec(any::<u64>(), 9)) {
        let n = |at: usize| numbers[at] >> (numbers[at] % 64);
        let text = TRAIN
            .replace("layers: 4", &format!("layers: {}", n(0)))
            .replace("hidden: 64", &format!("hidden: {}", n(1)))
            .replace("heads: 4", &format!("heads: {}", n(2)))
            .replace("global: 8", &format!("global: {}, micro: {}", n(3), n(4)))
            .replace("steps: 100", &format!(
                "parallelism: {{tensor: {}, pipeline: {}, data: {}}}\n  steps: {}", n(5), n(6), n(7), n(8)
            ));
        let _ = parse(&text, "x");
    }
}
