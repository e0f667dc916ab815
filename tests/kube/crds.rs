//! The custom resources on a real API server: what is right is taken, what is wrong is refused with
//! its field and the reason.

use drumline_operator::crd;
use drumline_spec::JobKind;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::cluster::{Admin, cluster};

/// A training job that is right; `change` makes it wrong.
fn training(change: impl FnOnce(&mut Value)) -> Value {
    let mut spec = json!({
        "model": { "family": "llama", "layers": 8, "hidden": 512, "ffn": 1024, "heads": 8,
                   "kvHeads": 4, "vocab": 1000, "context": 256 },
        "data": { "path": "corpus" },
        "parallelism": { "tensor": 2, "pipeline": 2, "data": 2 },
        "batch": { "global": 16, "micro": 2 },
        "steps": 100,
    });
    change(&mut spec);
    spec
}

fn command(change: impl FnOnce(&mut Value)) -> Value {
    let mut spec = json!({ "argv": ["python", "train.py"], "ranks": 4 });
    change(&mut spec);
    spec
}

fn service(change: impl FnOnce(&mut Value)) -> Value {
    let mut spec = json!({ "model": "runs/demo" });
    change(&mut spec);
    spec
}

/// A wrong manifest, the field that the API server must name, and a part of the reason.
type Wrong = (JobKind, Value, &'static str, &'static str);

fn wrong() -> Vec<Wrong> {
    use JobKind::{CommandJob as C, ModelService as M, TrainingJob as T};
    let set = |path: &'static str, value: Value| {
        move |spec: &mut Value| *spec.pointer_mut(path).expect("a place") = value
    };
    let add = |path: &'static str, name: &'static str, value: Value| {
        move |spec: &mut Value| spec.pointer_mut(path).expect("a place")[name] = value
    };
    let drop = |path: &'static str, name: &'static str| {
        move |spec: &mut Value| {
            spec.pointer_mut(path).and_then(Value::as_object_mut).expect("a place").remove(name);
        }
    };
    vec![
        (T, training(drop("", "model")), "spec.model", "Required"),
        (T, training(drop("", "data")), "spec.data", "Required"),
        (T, training(drop("/data", "path")), "spec.data.path", "Required"),
        (T, training(drop("", "batch")), "spec.batch", "Required"),
        (T, training(drop("/batch", "global")), "spec.batch.global", "Required"),
        (T, training(drop("", "steps")), "spec.steps", "Required"),
        (T, training(set("/steps", json!(0))), "spec.steps", "greater than or equal to 1"),
        (T, training(set("/steps", json!("many"))), "spec.steps", "numeric"),
        (T, training(set("/model/family", json!("bert"))), "spec.model.family", "supported values"),
        (
            T,
            training(set("/model/layers", json!(7))),
            "spec.parallelism.pipeline",
            "model.layers must be divisible by parallelism.pipeline",
        ),
        (
            T,
            training(set("/model/heads", json!(6))),
            "spec.model.heads",
            "model.hidden must be divisible by model.heads",
        ),
        (
            T,
            training(set("/model/kvHeads", json!(3))),
            "spec.model.kvHeads",
            "model.heads must be divisible by model.kvHeads",
        ),
        (
            T,
            training(set("/model/kvHeads", json!(1))),
            "spec.parallelism.tensor",
            "model.kvHeads must be divisible by parallelism.tensor",
        ),
        (
            T,
            training(set("/model/ffn", json!(1023))),
            "spec.parallelism.tensor",
            "model.ffn must be divisible by parallelism.tensor",
        ),
        (T, training(set("/model/hidden", json!(520))), "spec.model.heads", "even head width"),
        (
            T,
            training(set("/model/family", json!("gpt2"))),
            "spec.model.kvHeads",
            "gpt2 has no grouped queries",
        ),
        (
            T,
            training(|s| {
                s["model"]["family"] = json!("gpt2");
                s["model"]["kvHeads"] = json!(8);
                s["model"]["ropeTheta"] = json!(5000);
            }),
            "spec.model.ropeTheta",
            "only for llama",
        ),
        (
            T,
            training(set("/parallelism/tensor", json!(0))),
            "spec.parallelism.tensor",
            "greater than or equal to 1",
        ),
        (
            T,
            training(set("/parallelism/tensor", json!(3))),
            "spec.parallelism.tensor",
            "model.heads must be divisible by parallelism.tensor",
        ),
        (
            T,
            training(|s| {
                s["parallelism"]["data"] = json!(65_536);
            }),
            "spec.parallelism",
            "at most 65536 are allowed",
        ),
        (
            T,
            training(add("/parallelism", "virtualStages", json!(3))),
            "spec.parallelism.virtualStages",
            "model.layers must be divisible",
        ),
        (
            T,
            training(|s| {
                s["parallelism"]["pipeline"] = json!(1);
                s["parallelism"]["virtualStages"] = json!(2);
            }),
            "spec.parallelism.virtualStages",
            "at least 2 stages",
        ),
        (
            T,
            training(set("/batch/global", json!(15))),
            "spec.batch.global",
            "must be divisible by (parallelism.data * batch.micro)",
        ),
        (
            T,
            training(add("/batch", "sequence", json!(512))),
            "spec.batch.sequence",
            "longer than model.context",
        ),
        (
            T,
            training(add("", "learningRate", json!({ "peak": 0.1, "floor": 0.2 }))),
            "spec.learningRate.floor",
            "above peak",
        ),
        (
            T,
            training(add("", "learningRate", json!({ "warmupSteps": 101 }))),
            "spec.learningRate.warmupSteps",
            "more than steps",
        ),
        (
            T,
            training(add("", "optimizer", json!({ "beta1": 1.5 }))),
            "spec.optimizer.beta1",
            "less than or equal",
        ),
        (
            T,
            training(add("", "optimizer", json!({ "rounding": "stochastic" }))),
            "spec.optimizer.rounding",
            "needs precision bf16",
        ),
        (
            T,
            training(add("", "checkpoint", json!({ "keep": 0 }))),
            "spec.checkpoint.keep",
            "greater than or equal to 1",
        ),
        (
            T,
            training(add("", "watchdog", json!({ "stall": "5 minutes" }))),
            "spec.watchdog.stall",
            "match",
        ),
        (
            T,
            training(add("", "watchdog", json!({ "start": "25h" }))),
            "spec.watchdog.start",
            "must be from 100ms to 24h",
        ),
        (
            T,
            training(add("", "restarts", json!({ "limit": 1001 }))),
            "spec.restarts.limit",
            "less than or equal to 1000",
        ),
        (
            T,
            training(add("", "restarts", json!({ "backoff": "2h" }))),
            "spec.restarts.backoff",
            "must be from 0ms to 1h",
        ),
        (T, training(add("", "queue", json!("Team A"))), "spec.queue", "match"),
        (
            T,
            training(add("", "priority", json!(2_000_000))),
            "spec.priority",
            "less than or equal to 1000000",
        ),
        (
            T,
            training(add("", "resources", json!({ "device": "tpu" }))),
            "spec.resources.device",
            "supported values",
        ),
        (T, training(add("", "stepz", json!(1))), "spec.stepz", "field not declared in schema"),
        (T, training(add("", "elastic", json!({ "least": 1 }))), "spec.elastic.most", "Required"),
        (M, service(drop("", "model")), "spec.model", "Required"),
        (
            M,
            service(add("", "parallelism", json!({ "data": 2 }))),
            "spec.parallelism.data",
            "copies of a service are spec.replicas",
        ),
        (
            M,
            service(|spec| {
                spec["replicas"] = json!(2);
                spec["autoscale"] = json!({ "max": 3 });
            }),
            "spec.replicas",
            "autoscale decides",
        ),
        (M, service(add("", "autoscale", json!({ "min": 2 }))), "spec.autoscale.max", "Required"),
        (
            M,
            service(add("", "autoscale", json!({ "min": 3, "max": 2 }))),
            "spec.autoscale.min",
            "more than max",
        ),
        (
            M,
            service(add("", "autoscale", json!({ "max": 2, "waiting": 64 }))),
            "spec.autoscale.waiting",
            "less than maxQueue",
        ),
        (M, service(add("", "maxBatch", json!(0))), "spec.maxBatch", "greater than or equal to 1"),
        (M, service(add("", "servedName", json!("a b"))), "spec.servedName", "match"),
        (C, command(drop("", "argv")), "spec.argv", "Required"),
        (C, command(set("/argv", json!([]))), "spec.argv", "at least 1 items"),
        (C, command(set("/ranks", json!(70_000))), "spec.ranks", "less than or equal to 65536"),
        (C, command(add("", "env", json!({ "RANK": "0" }))), "spec.env", "cannot be overridden"),
        (
            C,
            command(add("", "env", json!({ "DRUMLINE_X": "0" }))),
            "spec.env",
            "cannot be overridden",
        ),
        (C, command(add("", "env", json!({ "1A": "0" }))), "spec.env", "starts with no digit"),
        (C, command(add("", "workdir", json!(""))), "spec.workdir", "at least 1 chars"),
    ]
}

#[tokio::test]
async fn the_api_server_refuses_every_wrong_manifest_with_field_and_reason() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "wrong").await;
    let all = wrong();
    assert!(all.len() >= 40);
    let mut faults = Vec::new();
    for (number, (kind, spec, field, reason)) in all.into_iter().enumerate() {
        let told = match admin.apply(kind, &format!("wrong-{number}"), spec).await {
            Ok(_) => "it was taken".to_owned(),
            Err(error) => error.to_string(),
        };
        let field = field.strip_prefix("spec.stepz").map_or(field, |_| "stepz");
        if !told.contains(field) || !told.contains(reason) {
            faults.push(format!("{kind} {field} ({reason}): {told}"));
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
    let name = "a".repeat(51);
    let told = admin.apply(JobKind::CommandJob, &name, command(|_| {})).await.unwrap_err();
    assert!(told.to_string().contains("metadata.name"), "{told}");
}

#[tokio::test]
async fn what_is_right_is_taken_with_its_defaults_and_what_decides_the_gang_stays() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "right").await;
    let job = admin.apply(JobKind::TrainingJob, "demo", training(|_| {})).await.unwrap();
    let spec = &job.data["spec"];
    assert_eq!(spec["optimizer"]["beta2"], 0.95);
    assert_eq!(spec["watchdog"]["stall"], "5m");
    assert_eq!(spec["queue"], "default");
    let service = admin.apply(JobKind::ModelService, "demo", service(|_| {})).await.unwrap();
    assert_eq!(
        service.data["spec"]["parallelism"],
        json!({ "tensor": 1, "pipeline": 1, "data": 1 })
    );
    let scale = admin.jobs(JobKind::ModelService).get_scale("demo").await.unwrap();
    assert_eq!(scale.spec.unwrap().replicas, Some(1));
    // Priority may change, the split may not.
    let jobs = admin.jobs(JobKind::TrainingJob);
    let patch = |spec: Value| {
        let (jobs, spec) = (jobs.clone(), json!({ "spec": spec }));
        async move { jobs.patch("demo", &PatchParams::default(), &Patch::Merge(&spec)).await }
    };
    patch(json!({ "priority": 7 })).await.unwrap();
    let told = patch(json!({ "parallelism": { "data": 4 } })).await.unwrap_err().to_string();
    assert!(told.contains("spec.parallelism") && told.contains("does not change"), "{told}");
}

#[test]
fn the_generated_files_are_current() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let is_update = std::env::var_os("UPDATE").is_some();
    let folders = ["k8s/crds", "helm/drumline/crds"].map(|folder| root.join(folder));
    for (folder, crd) in
        folders.iter().flat_map(|folder| crd::all().into_iter().map(move |crd| (folder, crd)))
    {
        let name = crd["spec"]["names"]["plural"].as_str().unwrap();
        let path = folder.join(format!("{name}.yaml"));
        let text = format!(
            "# Generated from crates/spec/src/table.rs; make it again with\n\
             #   UPDATE=1 cargo test -p drumline-operator generated_files\n{}",
            crd::to_yaml(&crd)
        );
        if is_update {
            std::fs::create_dir_all(folder).unwrap();
            std::fs::write(&path, &text).unwrap();
        }
        let stored = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(stored == text, "{} is stale; see its first lines", path.display());
    }
}

#[test]
fn the_rendered_manifests_are_current() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let rights = drumline_operator::deploy::all("{{ .Release.Namespace }}");
    let texts: Vec<String> = rights.iter().map(crd::to_yaml).collect();
    let text = format!(
        "# Generated from crates/operator/src/deploy.rs; make it again with\n\
         #   UPDATE=1 cargo test -p drumline-operator rendered_manifests\n{}",
        texts.join("---\n")
    );
    let path = "helm/drumline/templates/rbac.yaml";
    let at = root.join(path);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&at, &text).unwrap();
    }
    let stored = std::fs::read_to_string(&at).unwrap_or_default();
    assert!(stored == text, "{path} is stale; see its first lines");
}
