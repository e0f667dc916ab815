//! An operator that is killed with SIGKILL at any moment is followed by one that comes to the same:
//! every gang whole, no device promised twice, no pod left.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use drumline_operator::WhenAway;
use drumline_spec::JobKind;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams};
use serde_json::json;

use crate::cluster::{Admin, OPERATOR, cluster};
use crate::kubelet::{Kubelets, try_finish};
use crate::operator::{guard, options};

const C: JobKind = JobKind::CommandJob;
/// Kills; more with `DRUMLINE_KILLS=200`, which is what `make test-kube` asks for.
const KILLS: u64 = 12;

/// An operator as a process of its own: this test program, told to be one.
struct Process(Child);

impl Process {
    fn start(kubeconfig: &str, number: u64, log: &Path) -> Self {
        let identity = format!("process-{number}");
        Self(spawn_operator(kubeconfig, &identity, Duration::from_secs(1), None, log))
    }
}

/// Starts this test program in the part of an operator, with a guard on a port of loopback or without.
pub(crate) fn spawn_operator(
    kubeconfig: &str,
    identity: &str,
    lease: Duration,
    guard: Option<u16>,
    log: &Path,
) -> Child {
    let program = std::env::current_exe().expect("this program");
    let log = std::fs::File::create(log).expect("a log");
    Command::new(program)
        .args(["--exact", "killed::an_operator_to_be_killed", "--ignored", "--nocapture"])
        .env("DRUMLINE_TEST_OPERATOR", kubeconfig)
        .env("DRUMLINE_TEST_IDENTITY", identity)
        .env("DRUMLINE_TEST_LEASE_MS", lease.as_millis().to_string())
        .env("DRUMLINE_TEST_GUARD", guard.unwrap_or(0).to_string())
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a log"))
        .stderr(log)
        .spawn()
        .expect("the operator starts")
}

impl Drop for Process {
    fn drop(&mut self) {
        // SIGKILL: it gets no chance to tidy up.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not a test: the body of the process above.
#[tokio::test]
#[ignore = "it is started by the test beside it"]
async fn an_operator_to_be_killed() {
    let Ok(text) = std::env::var("DRUMLINE_TEST_OPERATOR") else { return };
    tracing_subscriber::fmt().with_ansi(false).init();
    let identity = std::env::var("DRUMLINE_TEST_IDENTITY").unwrap();
    let kubeconfig: kube::config::Kubeconfig = serde_json::from_str(&text).unwrap();
    let user = kube::config::KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &user);
    let mut options = options(config.await.unwrap(), &identity);
    let lease = std::env::var("DRUMLINE_TEST_LEASE_MS").unwrap();
    options.lease.duration = Duration::from_millis(lease.parse().unwrap());
    let port: u16 = std::env::var("DRUMLINE_TEST_GUARD").unwrap().parse().unwrap();
    options.guard = (port > 0).then(|| guard(port, WhenAway::Fail));
    // The process dies by its parent's hand; this is for when the parent has died.
    let stop = tokio_util::sync::CancellationToken::new();
    let run = drumline_operator::run(options, stop);
    let _ = tokio::time::timeout(Duration::from_secs(900), run).await;
}

/// Numbers from a seed: SplitMix64 (Steele, Lea and Flood 2014).
struct Draws(u64);

impl Draws {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}

fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// Watches from outside: no node ever has more GPUs promised than it has.
fn check(pods: &[Pod], per_node: u32) {
    let mut taken: BTreeMap<&str, u32> = BTreeMap::new();
    for pod in pods.iter().filter(|pod| !has_ended(pod)) {
        if let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) {
            *taken.entry(node).or_default() += 1;
        }
    }
    for (node, count) in taken {
        assert!(count <= per_node, "{node}: {count} of {per_node} GPUs are promised");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_killed_at_random_points_leaves_no_partial_gang_and_no_orphan() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "killed").await;
    for node in ["a", "b", "c", "d"] {
        admin.add_node(node, 4, "16").await;
    }
    let _kubelets = Kubelets::start(admin.client.clone());
    let kubeconfig = serde_json::to_string(&cluster.kubeconfig(OPERATOR)).unwrap();
    let log = cluster.folder().join("killed-operator.log");
    let kills = std::env::var("DRUMLINE_KILLS").ok().and_then(|text| text.parse().ok());
    let seed = std::env::var("DRUMLINE_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or(1);
    let mut draws = Draws(seed);
    let mut jobs: Vec<String> = Vec::new();
    for kill in 0..kills.unwrap_or(KILLS) {
        let operator = Process::start(&kubeconfig, kill, &log);
        // It leads after about a second; then it is in the middle of something.
        let life = Duration::from_millis(1_000 + draws.below(1_500));
        let end = Instant::now() + life;
        while Instant::now() < end {
            match draws.below(4) {
                0 if jobs.len() < 8 => {
                    let name = format!("j{kill}-{}", draws.below(1_000_000));
                    let ranks = 1 + draws.below(6);
                    // Some are urgent: gangs that run leave for them.
                    let priority = [0, 0, 5000][draws.below(3) as usize];
                    let spec = json!({ "argv": ["x"], "ranks": ranks, "priority": priority,
                                       "restarts": { "limit": 3, "backoff": "100ms" },
                                       "resources": { "device": "gpu" } });
                    if admin.apply(C, &name, spec).await.is_ok() {
                        jobs.push(name);
                    }
                }
                1 if jobs.len() > 3 => {
                    let name = jobs.swap_remove(draws.below(jobs.len() as u64) as usize);
                    admin.jobs(C).delete(&name, &DeleteParams::default()).await.unwrap();
                }
                2 if jobs.len() > 2 => {
                    let name = &jobs[draws.below(jobs.len() as u64) as usize];
                    // Now and then: all of its ranks finish, or one of them fails.
                    match draws.below(12) {
                        0 => end_ranks(&admin, name, 0).await,
                        1 => end_ranks(&admin, name, 3).await,
                        _ => {}
                    }
                }
                _ => {}
            }
            check(&admin.pods().list(&ListParams::default()).await.unwrap().items, 4);
            tokio::time::sleep(Duration::from_millis(60)).await;
        }
        drop(operator);
    }
    // The last operator is left alone, and everything settles.
    let _operator = Process::start(&kubeconfig, u64::MAX, &log);
    let deadline = Instant::now() + Duration::from_secs(180);
    loop {
        let pods = admin.pods().list(&ListParams::default()).await.unwrap().items;
        check(&pods, 4);
        let fault = unsettled(&admin, &pods, &jobs).await;
        let Some(fault) = fault else { break };
        assert!(Instant::now() < deadline, "seed {seed}: {fault}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Ends the running ranks of a job: all of them with success, or one of them without.
async fn end_ranks(admin: &Admin, job: &str, exit_code: i32) {
    let theirs = ListParams::default().labels(&format!("drumline.dev/job={job}"));
    let pods = admin.pods().list(&theirs).await.unwrap().items;
    let running = pods.iter().filter(|pod| {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        phase == Some("Running") && pod.metadata.deletion_timestamp.is_none()
    });
    for pod in running.take(if exit_code == 0 { usize::MAX } else { 1 }) {
        // It may have been deleted at the same moment.
        let _ = try_finish(&admin.pods(), pod.metadata.name.as_ref().unwrap(), exit_code).await;
    }
}

/// Says what is not as it should be once nothing happens any more.
async fn unsettled(admin: &Admin, pods: &[Pod], jobs: &[String]) -> Option<String> {
    let there = admin.jobs(C).list(&ListParams::default()).await.unwrap();
    if there.items.len() != jobs.len() {
        let left = there.iter().filter(|job| job.metadata.deletion_timestamp.is_some());
        let left: Vec<String> = left
            .map(|job| {
                let (meta, status) = (&job.metadata, &job.data["status"]);
                let ours = |pod: &&Pod| {
                    let owners = pod.metadata.owner_references.iter().flatten();
                    owners.into_iter().any(|owner| Some(&owner.uid) == meta.uid.as_ref())
                };
                let pods: Vec<_> = pods
                    .iter()
                    .filter(ours)
                    .map(|pod| (&pod.metadata.name, &pod.metadata.deletion_timestamp))
                    .collect();
                format!("{:?} {:?} {status} {pods:?}", meta.name, meta.finalizers)
            })
            .collect();
        return Some(format!("{} jobs instead of {}: {left:#?}", there.items.len(), jobs.len()));
    }
    let mut counted = 0;
    for job in &there {
        let (name, uid) = (job.metadata.name.clone()?, job.metadata.uid.clone()?);
        let ranks = job.data["spec"]["ranks"].as_u64()?;
        let phase = job.data["status"]["phase"].as_str().unwrap_or_default().to_owned();
        let theirs = pods.iter().filter(|pod| {
            pod.metadata.labels.as_ref().and_then(|all| all.get("drumline.dev/job-uid"))
                == Some(&uid)
        });
        let theirs: Vec<&Pod> = theirs.collect();
        counted += theirs.len() as u64;
        let alive = theirs.iter().filter(|pod| !has_ended(pod)).count();
        // What ended in the attempt before is kept, so that its log can be read.
        let newest = job.data["status"]["attempt"].to_string();
        let is_newest = |pod: &&&Pod| {
            let labels = pod.metadata.labels.as_ref();
            labels.and_then(|all| all.get("drumline.dev/attempt")) == Some(&newest)
        };
        let of_newest: Vec<&&Pod> = theirs.iter().filter(is_newest).collect();
        let is_whole = of_newest.len() as u64 == ranks
            && alive == of_newest.iter().filter(|pod| !has_ended(pod)).count();
        let is_good = match phase.as_str() {
            "running" => is_whole && alive > 0,
            "pending" => alive == 0 && job.data["status"]["reason"] == "WaitingForDevices",
            "succeeded" => is_whole && alive == 0,
            "failed" => alive == 0,
            _ => false,
        };
        if !is_good {
            let status = &job.data["status"];
            return Some(format!("{name}: {alive} of {ranks} pods are alive, {status}"));
        }
    }
    (counted != pods.len() as u64).then(|| "there are pods without a job".to_owned())
}
