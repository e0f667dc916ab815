//! An operator whose API server is away, forgets its history, or refuses every first update: it
//! converges, and it never calls in a hot loop.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use drumline_spec::JobKind;
use kube::Config;
use kube::api::{DeleteParams, ListParams};
use serde_json::{Value, json};

use crate::cluster::{Admin, OPERATOR, cluster};
use crate::kubelet::Kubelets;
use crate::operator::Operator;
use crate::proxy::Proxy;

const C: JobKind = JobKind::CommandJob;

fn gang(ranks: u32) -> Value {
    json!({ "argv": ["x"], "ranks": ranks, "resources": { "device": "gpu" },
            "restarts": { "limit": 3, "backoff": "100ms" } })
}

fn phase(status: &Value) -> &str {
    status["phase"].as_str().unwrap_or_default()
}

/// How long the API server is away; `make test-kube` asks for 60.
fn away() -> Duration {
    let seconds = std::env::var("DRUMLINE_AWAY_S").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(8))
}

/// Waits until so many answers were made up, and returns how many.
async fn until_injected(proxy: &Proxy, least: u64) -> u64 {
    for _ in 0..600 {
        let injected = proxy.faults.injected.load(Ordering::SeqCst);
        if injected >= least {
            return injected;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{} of {least} answers were made up", proxy.faults.injected.load(Ordering::SeqCst));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_server_that_is_away_forgets_and_refuses_is_survived() {
    let Some(cluster) = cluster() else { return };
    let _turn = cluster.turn.lock().await;
    let admin = Admin::start(cluster, "faults").await;
    admin.add_node("a", 4, "16").await;
    admin.add_node("b", 4, "16").await;
    let _kubelets = Kubelets::start(admin.client.clone());
    let proxy = Proxy::start(cluster.client(OPERATOR).await).await;
    let url = format!("http://{}", proxy.address).parse().unwrap();
    let operator = Operator::start(Config::new(url), "faults");
    admin.apply(C, "before", gang(3)).await.unwrap();
    admin.wait(C, "before", "running", |s| phase(s) == "running").await;

    // Away, while a job comes, one goes, and a pod is lost.
    proxy.away(true);
    let (began, counted) = (Instant::now(), proxy.requests());
    admin.apply(C, "meanwhile", gang(2)).await.unwrap();
    let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    admin.pods().delete("before-c1-1", &now).await.unwrap();
    tokio::time::sleep(away()).await;
    let tries = proxy.requests() - counted;
    proxy.away(false);
    let back = Instant::now();
    admin.wait(C, "meanwhile", "running", |s| phase(s) == "running").await;
    admin.wait(C, "before", "running", |s| phase(s) == "running" && s["attempt"] == 2).await;
    // A lease that is asked for each 0.6 s, and seven watches that wait ever longer.
    let rate = tries as f64 / away().as_secs_f64();
    assert!(rate < 20.0, "{rate} tries per second while nobody answers");
    println!(
        "away {:.0} s: {tries} tries; converged {:.1} s after the return",
        (back - began).as_secs_f64(),
        back.elapsed().as_secs_f64()
    );

    // The history of every watch is gone: each lists again, once.
    proxy.faults.is_compacted.store(true, Ordering::SeqCst);
    proxy.cut();
    admin.apply(C, "after", gang(2)).await.unwrap();
    admin.wait(C, "after", "running", |s| phase(s) == "running").await;
    // Those that the job did not need come back in their own time.
    until_injected(&proxy, 5).await;
    proxy.faults.is_compacted.store(false, Ordering::SeqCst);
    let injected = proxy.faults.injected.load(Ordering::SeqCst);

    // Every first update of an object is refused, of jobs, pods and the lease alike.
    proxy.faults.has_conflicts.store(true, Ordering::SeqCst);
    for name in ["before", "meanwhile", "after"] {
        admin.jobs(C).delete(name, &DeleteParams::default()).await.unwrap();
    }
    let (began, counted) = (Instant::now(), proxy.requests());
    admin.apply(C, "refused", gang(8)).await.unwrap();
    admin.wait(C, "refused", "running", |s| phase(s) == "running").await;
    // Three finalizers taken off, one put on, and the lease: pods are only created, bound and deleted.
    let refusals = until_injected(&proxy, injected + 5).await - injected;
    let (seconds, calls) = (began.elapsed().as_secs_f64(), proxy.requests() - counted);
    println!("{refusals} first updates refused: {calls} requests in {seconds:.1} s");
    let pods = admin.pods().list(&ListParams::default()).await.unwrap().items;
    assert_eq!(pods.len(), 8, "no pod is left of what was deleted");

    // At rest nothing is asked but for the lease, and watches that end by themselves. When the rest of
    // what was deleted is settled, nobody says: a loop that never ends is hot in the last look too.
    let mut idle = f64::INFINITY;
    for _ in 0..6 {
        let counted = proxy.requests();
        tokio::time::sleep(Duration::from_secs(5)).await;
        idle = (proxy.requests() - counted) as f64 / 5.0;
        println!("at rest: {idle:.1} requests per second");
        // The lease of this test is renewed every 0.6 s, with two requests each.
        if idle < 8.0 {
            break;
        }
    }
    assert!(idle < 8.0, "{idle} requests per second at rest");
    operator.stop().await;
}
