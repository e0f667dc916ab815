//! A store whose answers get lost, and two control planes that want to lead.

mod support;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use drumline_control::Options;
use drumline_ports::store::fake::{FakeStore, Faults};
use drumline_ports::store::{Elector, Store};
use drumline_wire::v1;
use support::agent::{Act, FakeAgent, Ledger, Script};
use support::{Control, command, submit};
use tonic::Code;

/// A leader that a busy machine keeps from its renewals for less than this goes on leading.
const LEASE: Duration = Duration::from_secs(4);

fn options(store: &Arc<FakeStore>, identity: &str) -> Options {
    let store: Arc<dyn Store> = Arc::<FakeStore>::clone(store);
    Options {
        identity: identity.to_owned(),
        heartbeat: Duration::from_millis(100),
        node_grace: Duration::from_secs(5),
        lease: LEASE,
        ..Options::loopback(store, support::token())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_whose_answers_are_lost_are_settled_and_nothing_happens_twice() {
    let seed = 20_261_122;
    let faults = Faults {
        lost_ack_permille: 120,
        lost_request_permille: 80,
        delayed_request_permille: 60,
        refused_permille: 40,
        delay_max: Duration::from_millis(40),
        ..Faults::default()
    };
    let store = Arc::new(FakeStore::with_faults(seed, faults));
    let control = Control::start_with(options(&store, "a")).await;
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let script: Script = Arc::new(|_, attempt, rank| match (attempt, rank) {
        (1, 1) => Act::FailAfter(10, 3),
        _ => Act::SucceedAfter(10),
    });
    let _agents: Vec<_> = (0..2)
        .map(|node| {
            let name = format!("node-{node}");
            FakeAgent::start(&control.url(), &name, 2, &ledger, Arc::clone(&script))
        })
        .collect();
    let mut client = control.client().await;
    let mut ids = BTreeSet::new();
    for number in 0..15 {
        let request = v1::SubmitRequest {
            manifests: command(&format!("job-{number}"), 2, 3),
            idempotency_key: format!("key-{number}"),
            ..v1::SubmitRequest::default()
        };
        let started = Instant::now();
        let id = loop {
            match client.submit(request.clone()).await {
                Ok(answer) => break answer.into_inner().jobs.remove(0).id,
                Err(status) => assert_eq!(status.code(), Code::Unavailable, "seed {seed}"),
            }
            assert!(started.elapsed() < support::PATIENCE, "seed {seed}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert!(ids.insert(id), "seed {seed}: two keys, one job");
    }
    let started = Instant::now();
    loop {
        let listed = client.list_jobs(v1::ListJobsRequest::default()).await;
        let jobs = listed.map(|listed| listed.into_inner().jobs).unwrap_or_default();
        if jobs.len() == ids.len() && jobs.iter().all(|job| job.phase == "succeeded") {
            assert!(jobs.iter().all(|job| job.attempt == 2), "seed {seed}");
            break;
        }
        let phases: Vec<_> = jobs.iter().map(|job| (&job.id, &job.phase, &job.message)).collect();
        assert!(started.elapsed() < support::PATIENCE, "seed {seed}: {phases:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // What is stored is what was said.
    store.set_faults(Faults::default());
    let stored = store.range("/drumline/jobs/").await.unwrap();
    assert_eq!(stored.items.len(), 2 * ids.len());
    let ledger = ledger.lock().unwrap();
    assert_eq!(ledger.violations, Vec::<String>::new(), "seed {seed}");
    assert!(ledger.launches.values().all(|count| *count == 1), "seed {seed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_second_control_plane_waits_and_then_knows_every_job() {
    let store = Arc::new(FakeStore::new());
    let first = Control::start_with(options(&store, "first")).await;
    let second = drumline_control::start(options(&store, "second"), first.stop.child_token());
    let second = second.await.unwrap();
    let id = submit(&mut first.client().await, &command("kept", 2, 0)).await.remove(0);
    let mut waiting =
        support::client(&format!("http://{}", second.address), &support::token()).await;
    let status = waiting.list_jobs(v1::ListJobsRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "only the leader answers");
    let before = first.running.handle.fleet().unwrap();

    // The first is fenced out while it still runs, as after a long pause.
    let elector = Elector::new(Arc::<FakeStore>::clone(&store), "/drumline/leader", "test", LEASE);
    let holder = elector.holder().await.unwrap().unwrap();
    assert_eq!(holder.candidate.identity, "first");
    store.lease_revoke(holder.candidate.lease).await.unwrap();
    second.handle.wait_until_leader(support::PATIENCE).await.unwrap();
    let after = second.handle.fleet().unwrap();
    assert!(after.leader_term > before.leader_term);
    assert_eq!(after.leader, "second");
    assert_eq!(support::get(&mut waiting, &id).await.phase, "pending");
    // The first notices at its next write at the latest, and stores nothing in its old term.
    let request = v1::SubmitRequest { manifests: command("late", 1, 0), ..Default::default() };
    let status = first.client().await.submit(request).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    let jobs = second.handle.list_jobs(&v1::ListJobsRequest::default()).unwrap().jobs;
    assert_eq!(jobs.len(), 1, "the late one was fenced");
}
