//! The main job, as the README has it, on a smaller scale.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::cluster::{Cluster, DRUMLINE, assert_nothing_left, run_in, training};

#[test]
fn the_demo_trains_survives_serves_and_cleans_up() {
    let folder = tempfile::tempdir().unwrap();
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let output = Command::new(DRUMLINE)
        .args(["demo", "--kill-rank", "--steps", "44", "--output", "json", "--data"])
        .arg(text)
        .arg("--state-dir")
        .arg(folder.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{told}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(report["cluster"]["nodes"], 2);
    assert_eq!(report["cluster"]["devices"], 4);
    let run = &report["training"];
    assert_eq!((&run["tensor"], &run["pipeline"], &run["data"]), (&2.into(), &2.into(), &1.into()));
    assert_eq!(
        (&run["ranks"], &run["steps"], &run["restarts"]),
        (&4.into(), &44.into(), &1.into())
    );
    let number = |value: &Value| value.as_f64().expect("a number");
    assert!(number(&run["loss_last"]) < number(&run["loss_first"]) - 0.5, "{run:#}");
    assert!(number(&run["loss_validation"]) > 0.0 && number(&run["tokens_per_second"]) > 0.0);
    assert_eq!(report["checkpoint"]["step"], 44);
    assert!(
        Path::new(report["checkpoint"]["path"].as_str().unwrap()).join("manifest.json").exists()
    );
    assert!(!report["serving"]["completion"].as_str().unwrap().is_empty());
    assert!(report["dashboard"].as_str().unwrap().starts_with("http://127.0.0.1:"));
    assert!(told.contains("bit for bit"), "{told}");
    assert_nothing_left(folder.path());
}

#[test]
fn a_run_goes_on_under_another_split_and_is_exported_and_served() {
    let cluster = Cluster::start(2, 2);
    cluster.build_data();
    let first = cluster.submit(&training("first", 2, 2, 1, 20));
    assert_eq!(cluster.wait(&first), Some(0), "{:#}", cluster.job(&first));
    let from = cluster.job(&first)["training"]["checkpoint_path"].as_str().unwrap().to_owned();
    let manifest = training("second", 1, 1, 2, 40)
        .replace("keep: 2}", &format!("keep: 2, resumeFrom: {from:?}}}"));
    let second = cluster.submit(&manifest);
    assert_eq!(cluster.wait(&second), Some(0), "{:#}", cluster.job(&second));
    let job = cluster.job(&second);
    let loss = |job: &Value| job["training"]["loss"].as_f64().unwrap();
    assert!(loss(&job) < loss(&cluster.job(&first)), "{job:#}");
    assert_eq!(crate::cluster::losses(&cluster, &second).len(), 20, "steps 21 to 40");

    let checkpoint = job["training"]["checkpoint_path"].as_str().unwrap().to_owned();
    let folder = cluster.folder().join("exported");
    let output = run_in(cluster.folder(), &["export", &checkpoint, folder.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(folder.join(file).is_file(), "{file}");
    }
    // The exported folder is served like a checkpoint, and says the same.
    let ask = |name: &str, prompt: &str| {
        let what =
            ["complete", prompt, "--model", name, "--max-tokens", "12", "--temperature", "0"];
        let asked = cluster.run(&what);
        assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
        String::from_utf8_lossy(&asked.stdout).into_owned()
    };
    let mut said = Vec::new();
    for (name, model, tensor) in
        [("own", checkpoint.as_str(), "2"), ("exported", folder.to_str().unwrap(), "1")]
    {
        let served = cluster.run(&["serve", model, "--name", name, "--tensor", tensor]);
        assert!(served.status.success(), "{}", String::from_utf8_lossy(&served.stderr));
        said.push(ask(name, "The control plane"));
    }
    assert_eq!(said[0], said[1]);
    assert!(said[0].len() > 5, "{said:?}");
    replicated(&cluster, "exported", &|| ask("exported", "The control plane"), &said[1]);

    // A prompt that comes again is found in the cache, says the same, and is counted.
    let long = "The control plane decides what runs where, and agents start it.";
    assert_eq!(ask("own", long), ask("own", long));
    let page = crate::cluster::metrics(cluster.ready["gateway"].as_str().unwrap());
    let value = |series: &str| {
        let line = page.lines().find(|line| line.starts_with(series));
        let number = line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        number.unwrap_or_else(|| panic!("{series} in\n{page}"))
    };
    let of = |name: &str| value(&format!("drumline_gateway_{name}{{model=\"own\"}}"));
    let (queries, hits) = (of("prefix_cache_queries_total"), of("prefix_cache_hits_total"));
    assert!(hits >= 16.0 && hits < queries, "{hits} of {queries} tokens were in the cache");
    assert_eq!(of("time_to_first_token_seconds_count"), of("prefill_seconds_count"));
    assert!(of("inter_token_latency_seconds_count") >= 1.0);
    assert!(of("queue_seconds_sum") + of("prefill_seconds_sum") <= of("request_seconds_sum"));
    let success = page.lines().filter(|line| {
        line.starts_with("drumline_gateway_request_success_total") && line.contains("\"own\"")
    });
    let ended: f64 = success.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum();
    assert_eq!(ended, 3.0);
    cluster.stop();
}

/// Scales a service to two replicas and back: what it says stays the same, and no call fails.
fn replicated(cluster: &Cluster, model: &str, ask: &dyn Fn() -> String, says: &str) {
    let jobs = cluster.json(&["jobs", "--kind", "ModelService"]);
    let is_it = |job: &&Value| job["service"]["model"] == model;
    let id = jobs.as_array().unwrap().iter().find(is_it).unwrap()["id"].as_str().unwrap();
    let wrong = cluster.run(&["scale", id, "--replicas", "0"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(cluster.run(&["scale", id, "--replicas", "2"]).status.success());
    let job = cluster.wait_for(id, "two serve", |job| job["service"]["replicas_ready"] == 2);
    let replica = job["service"]["replica_jobs"][0].as_str().unwrap();
    let described = cluster.run(&["describe", "job", replica]);
    let text = String::from_utf8_lossy(&described.stdout).into_owned();
    assert!(text.contains(&format!("1 of {id}")), "{text}");
    let told = cluster.run(&["scale", replica, "--replicas", "2"]);
    assert!(String::from_utf8_lossy(&told.stderr).contains(&format!("a replica of {id}")));
    // The service itself loses its rank: its replica answers meanwhile.
    let killed = cluster.job(id);
    let pid = killed["placement"][0]["pid"].as_u64().unwrap();
    crate::cluster::kill(u32::try_from(pid).unwrap());
    // It may be on its way back by the time somebody looks.
    cluster.wait_for(id, "its end was seen", |job| {
        job["phase"] != "running" || job["restarts"] != killed["restarts"]
    });
    assert_eq!(ask(), says);
    cluster.wait_for(id, "two serve again", |job| job["service"]["replicas_ready"] == 2);
    assert!(cluster.run(&["scale", id, "--replicas", "1"]).status.success());
    cluster.wait_for(replica, "it is gone", |job| job["phase"] == "cancelled");
    assert_eq!(ask(), says);
}
