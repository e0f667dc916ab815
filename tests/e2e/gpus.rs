//! A machine with GPUs, as a stand-in for NVIDIA's library plays it, under the real agent and
//! control plane.

use std::time::{Duration, Instant};

use drumline_fakes::Library;
use serde_json::Value;

use crate::cluster::{Cluster, WAIT_MAX};

/// A folder with the stand-in library and its script.
struct Fake {
    folder: tempfile::TempDir,
}

impl Fake {
    fn new(script: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Library::Nvml.build(folder.path()).expect("a C compiler");
        let fake = Self { folder };
        fake.say(script);
        fake
    }

    fn say(&self, text: &str) {
        let fresh = self.folder.path().join("fresh");
        std::fs::write(&fresh, text).expect("a file");
        std::fs::rename(fresh, self.folder.path().join("script")).expect("the same folder");
    }

    fn cluster(&self) -> Cluster {
        // Found as the real one would be.
        Cluster::start_with(1, 1, |up| {
            up.env("LD_LIBRARY_PATH", self.folder.path());
            up.env("DRUMLINE_FAKE_NVML", self.folder.path().join("script"));
        })
    }
}

/// A gang that holds `ranks` GPUs until it is stopped.
fn holder(name: &str, ranks: u32) -> String {
    format!(
        "apiVersion: drumline.dev/v1alpha1
kind: CommandJob
metadata:
  name: {name}
spec:
  argv: [sh, -c, \"echo sees $CUDA_VISIBLE_DEVICES; exec sleep 600\"]
  ranks: {ranks}
  resources: {{device: gpu, models: [h100]}}
  restarts: {{limit: 1, backoff: 50ms}}
"
    )
}

fn devices(cluster: &Cluster) -> Vec<Value> {
    let nodes = cluster.json(&["nodes"]);
    nodes[0]["devices"].as_array().cloned().unwrap_or_default()
}

fn wait(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < WAIT_MAX, "{what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn number(job: &Value) -> usize {
    job["placement"][0]["device"].as_u64().expect("a device") as usize
}

#[test]
fn a_gpu_that_falls_off_the_bus_ends_its_gang_alone_and_is_not_offered_again() {
    let fake = Fake::new("gpus 3\n");
    let cluster = fake.cluster();
    let all = devices(&cluster);
    let kinds: Vec<_> = all.iter().map(|device| device["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["cpu", "gpu", "gpu", "gpu"]);
    assert_eq!(all[1]["model"], "NVIDIA H100 80GB HBM3");
    let uuids: Vec<_> = all.iter().map(|device| device["uuid"].as_str().unwrap()).collect();

    let runs = |job: &Value| job["phase"] == "running";
    let first = cluster.submit(&holder("first", 1));
    let own = number(&cluster.wait_for(&first, "it runs", runs));
    let second = cluster.submit(&holder("second", 1));
    let other = number(&cluster.wait_for(&second, "it runs", runs));
    assert_ne!(own, other);
    let log = || String::from_utf8(cluster.run(&["logs", &first]).stdout).unwrap();
    wait("the rank sees its GPU", || log().contains(&format!("sees {}", uuids[own])));

    // Number 1 of the node's devices is the driver's number 0.
    fake.say(&format!("gpus 3\nevent {} 79\n", own - 1));
    wait("it is bad", || devices(&cluster)[own]["healthy"] == false);
    fake.say(&format!("gpus 3\nevent {} 79\ngpu {} lost 1\n", own - 1, own - 1));
    let job = cluster.wait_for(&first, "it runs elsewhere", |job| {
        job["restarts"] == 1 && job["phase"] == "running"
    });
    let now = number(&job);
    assert!(now != own && now != other, "{job:#}");
    let told = job["events"].to_string();
    assert!(told.contains("DeviceFailed") && told.contains("Xid 79"), "{told}");
    assert!(told.contains("reboot the node"), "{told}");
    let text = String::from_utf8(cluster.run(&["describe", "job", &first]).stdout).unwrap();
    assert!(text.contains("Xid 79"), "{text}");
    assert_eq!(cluster.job(&second)["restarts"], 0, "the other gang is not touched");

    let sick = &devices(&cluster)[own];
    assert_eq!((&sick["healthy"], &sick["action"]), (&false.into(), &"reboot".into()), "{sick:#}");
    let nodes = cluster.json(&["nodes"]);
    let shown = http_get(nodes[0]["metrics"].as_str().expect("an address"));
    for line in [
        format!("drumline_gpu_xid_events_total{{gpu_uuid=\"{}\",xid=\"79\"}} 1", uuids[own]),
        format!("drumline_gpu_health{{action=\"reboot\",gpu_uuid=\"{}\"}} 1", uuids[own]),
        format!("drumline_gpu_health{{action=\"none\",gpu_uuid=\"{}\"}} 1", uuids[other]),
        "drumline_collect_success{node=\"node-0\",source=\"nvml\"} 1".to_owned(),
    ] {
        assert!(shown.contains(&line), "{line} is not in\n{shown}");
    }
    let page = http_get(cluster.ready["dashboard"].as_str().expect("an address"));
    assert!(page.contains("Xid 79"), "the dashboard says why: {page}");

    // Three GPUs, one of them bad, two held: a third gang waits.
    let third = cluster.submit(&holder("third", 1));
    cluster.wait_for(&third, "it waits", |job| job["reason"] == "WaitingForDevices");

    // It is back; that alone says nothing, until somebody has looked.
    fake.say(&format!("gpus 3\nevent {} 79\n", own - 1));
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(devices(&cluster)[own]["healthy"], false, "it does not come back by itself");
    let cleared = cluster.run(&["clear", &format!("node-0/{own}")]);
    assert!(cleared.status.success(), "{}", String::from_utf8_lossy(&cleared.stderr));
    cluster.wait_for(&third, "it runs", |job| job["phase"] == "running");
    cluster.stop();
}

#[test]
fn what_the_driver_wants_and_what_applications_cause_are_told_apart() {
    let fake = Fake::new("gpus 2\n");
    let cluster = fake.cluster();
    let id = cluster.submit(&holder("held", 2));
    cluster.wait_for(&id, "it runs", |job| job["phase"] == "running");

    // Both ranks see both, in the order of local ranks.
    let uuids: Vec<_> =
        devices(&cluster).iter().map(|d| d["uuid"].as_str().unwrap().to_owned()).collect();
    let both = format!("sees {},{}", uuids[1], uuids[2]);
    let log = || String::from_utf8(cluster.run(&["logs", &id]).stdout).unwrap();
    wait("the ranks see their GPUs", || log().matches(&both).count() == 2);

    // An application's fault: the gang starts again, on the same devices.
    fake.say("gpus 2\nevent 0 31\n");
    let job = cluster
        .wait_for(&id, "it starts again", |job| job["restarts"] == 1 && job["phase"] == "running");
    assert!(job["events"].to_string().contains("Xid 31"), "{job:#}");
    assert!(devices(&cluster).iter().all(|device| device["healthy"] == true));

    // Drained: what runs goes on, and nothing new starts.
    fake.say("gpus 2\nevent 0 31\ngpu 1 recovery 3\n");
    wait("it is drained", || devices(&cluster)[2]["action"] == "drain");
    std::thread::sleep(Duration::from_secs(2));
    let job = cluster.job(&id);
    assert_eq!((&job["restarts"], &job["phase"]), (&1.into(), &"running".into()), "{job:#}");

    // The driver is content again: usable without anybody's word.
    fake.say("gpus 2\nevent 0 31\n");
    wait("it is offered again", || devices(&cluster)[2]["healthy"] == true);

    // The driver wants a reset: nothing may run there, and two GPUs are not to be had.
    fake.say("gpus 2\nevent 0 31\ngpu 1 recovery 1\n");
    let job = cluster.wait_for(&id, "it waits", |job| job["phase"] == "pending");
    assert!(job["events"].to_string().contains("the driver asks for a reset"), "{job:#}");
    cluster.stop();
}

#[test]
fn without_a_driver_a_job_that_wants_a_gpu_says_where_to_look() {
    let cluster = Cluster::start_with(1, 1, |up| {
        up.env("DRUMLINE_NVML_LIBRARY", "/nowhere/libnvidia-ml.so.1");
    });
    let id = cluster.submit(&holder("wants", 1));
    let job = cluster.wait_for(&id, "it waits", |job| job["reason"] == "NoMatchingDevice");
    assert!(job["remedy"].as_str().unwrap_or_default().contains("drumline doctor"), "{job:#}");
    cluster.stop();
}

/// Runs `drumline doctor` with this environment; returns its exit code and its report.
fn doctor(arguments: &[&str], environment: &[(&str, &std::path::Path)]) -> (Option<i32>, Value) {
    let output = std::process::Command::new(crate::cluster::DRUMLINE)
        .args(["doctor", "--output", "json"])
        .args(arguments)
        .envs(environment.iter().copied())
        .output()
        .expect("drumline starts");
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!("{error}: {}", String::from_utf8_lossy(&output.stderr));
    });
    (output.status.code(), report)
}

#[test]
fn the_doctor_tests_a_machine_without_a_gpu_and_says_what_is_missing() {
    let nowhere = [("DRUMLINE_NVML_LIBRARY", std::path::Path::new("/nowhere/libnvidia-ml.so.1"))];
    let (code, report) = doctor(&[], &nowhere);
    assert_eq!((code, &report["verdict"]), (Some(0), &"good".into()), "{report:#}");
    let nvml =
        report["libraries"].as_array().unwrap().iter().find(|l| l["name"] == "NVML").unwrap();
    assert_eq!(nvml["found"], false);
    assert!(nvml["problem"].as_str().unwrap().contains("/nowhere"), "{nvml:#}");
    assert!(nvml["remedy"].as_str().unwrap().contains("Install"), "{nvml:#}");
    let checks = report["devices"][0]["checks"].as_array().unwrap();
    let names: Vec<_> = checks.iter().map(|check| check["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["matmul", "memory read", "all-reduce", "training"]);
    assert!(checks.iter().all(|check| check["verdict"] == "good"), "{report:#}");
    let (code, report) = doctor(&["--no-test", "--require-gpu"], &nowhere);
    assert_eq!((code, &report["verdict"]), (Some(1), &"bad".into()), "{report:#}");
}

#[test]
fn the_doctor_finds_a_gpu_that_is_lost_and_a_driver_that_is_broken() {
    let fake = Fake::new("gpus 2\ngpu 1 lost 1\n");
    let (library, script) =
        (fake.folder.path().join("libnvidia-ml.so.1"), fake.folder.path().join("script"));
    let environment =
        [("DRUMLINE_NVML_LIBRARY", library.as_path()), ("DRUMLINE_FAKE_NVML", script.as_path())];
    let (code, report) = doctor(&["--no-test"], &environment);
    assert_eq!(code, Some(1), "{report:#}");
    assert_eq!(report["gpus"].as_array().unwrap().len(), 1, "{report:#}");
    assert_eq!(report["gpus"][0]["model"], "NVIDIA H100 80GB HBM3");
    assert!(
        report["silent"][0]["why"].as_str().unwrap().contains("fell off the bus"),
        "{report:#}"
    );
    fake.say("init 9\n");
    let (code, report) = doctor(&["--no-test"], &environment);
    assert_eq!(code, Some(1), "{report:#}");
    assert!(report["summary"].as_str().unwrap().contains("NVML"), "{report:#}");
}

/// Fetches a page over plain HTTP.
fn http_get(url: &str) -> String {
    use std::io::{Read as _, Write as _};
    let rest = url.strip_prefix("http://").expect("plain HTTP");
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let mut stream = std::net::TcpStream::connect(host).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a deadline");
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
        .expect("it reads");
    let mut page = String::new();
    stream.read_to_string(&mut page).expect("it answers");
    page
}
