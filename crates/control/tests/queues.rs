//! Queues over the real protocol: quotas, borrowing, preemption, holding, and what survives.

mod support;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use drumline_wire::v1;
use support::agent::{Act, FakeAgent, Ledger, Script};
use support::{Client, Control, any_port, get, submit, until, until_phase};

fn queue(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: drumline.dev/v1alpha1\nkind: Queue\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n"
    )
}

fn job(name: &str, queue: &str, ranks: u32, more: &str) -> String {
    format!(
        "apiVersion: drumline.dev/v1alpha1\nkind: CommandJob\nmetadata: {{name: {name}}}\n\
         spec: {{argv: [\"true\"], ranks: {ranks}, queue: {queue}{more}}}\n"
    )
}

struct Cluster {
    control: Control,
    client: Client,
    ledger: Arc<Mutex<Ledger>>,
    _agents: Vec<FakeAgent>,
    folder: tempfile::TempDir,
}

/// Two nodes with four devices each, whose ranks run until they are stopped.
async fn cluster() -> Cluster {
    let folder = tempfile::tempdir().unwrap();
    let control = Control::start(folder.path(), any_port()).await;
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let script: Script = Arc::new(|_, _, _| Act::Hold);
    let agents = (0..2)
        .map(|node| {
            let name = format!("node-{node}");
            FakeAgent::start(&control.url(), &name, 4, &ledger, Arc::clone(&script))
        })
        .collect();
    let client = control.client().await;
    let cluster = Cluster { control, client, ledger, _agents: agents, folder };
    let started = Instant::now();
    while cluster.control.running.handle.list_nodes().unwrap().len() < 2 {
        assert!(started.elapsed() < support::PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    cluster
}

async fn refused(client: &mut Client, manifests: &str) -> String {
    let request =
        v1::SubmitRequest { manifests: manifests.to_owned(), ..v1::SubmitRequest::default() };
    client.submit(request).await.unwrap_err().message().to_owned()
}

async fn queues(client: &mut Client) -> Vec<v1::QueueView> {
    client.list_queues(v1::ListQueuesRequest {}).await.unwrap().into_inner().queues
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_keeps_its_jobs_within_its_quota_and_says_so() {
    let mut cluster = cluster().await;
    let client = &mut cluster.client;
    let text = [
        queue("small", "quota: {cpu: 3}, borrowingLimit: {cpu: 0}"),
        job("a", "small", 2, ""),
        job("b", "small", 2, ""),
    ];
    let ids = submit(client, &text.join("---\n")).await;
    until_phase(client, &ids[0], "running").await;
    let waits = until(client, &ids[1], |view| view.reason == "WaitingForQuota").await;
    assert!(waits.message.contains("small"), "{}", waits.message);
    let listed = queues(client).await;
    let small = listed.iter().find(|queue| queue.name == "small").unwrap();
    assert_eq!((small.quota["cpu"], small.used["cpu"]), (3, 2));
    assert_eq!((small.running, small.pending), (1, 1));
    // More quota is told of at once.
    submit(client, &queue("small", "quota: {cpu: 4}, borrowingLimit: {cpu: 0}")).await;
    until_phase(client, &ids[1], "running").await;
    assert!(cluster.ledger.lock().unwrap().violations.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_of_higher_priority_takes_the_place_of_a_lower_one_which_waits_again() {
    let mut cluster = cluster().await;
    let client = &mut cluster.client;
    let ids = submit(client, &job("low", "default", 8, ", priority: 1")).await;
    until_phase(client, &ids[0], "running").await;
    let high = submit(client, &job("high", "default", 6, ", priority: 100")).await;
    until_phase(client, &high[0], "running").await;
    let low = get(client, &ids[0]).await;
    assert_eq!((low.phase.as_str(), low.restarts), ("pending", 0), "nothing is held against it");
    assert!(low.events.iter().any(|event| event.reason == "Preempted"), "{:#?}", low.events);
    let request = v1::CancelJobRequest { id: high[0].clone(), user: "ada".to_owned() };
    client.cancel_job(request).await.unwrap();
    let again = until_phase(client, &ids[0], "running").await;
    assert_eq!(again.attempt, 2);
    assert!(cluster.ledger.lock().unwrap().violations.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_may_not_be_preempted_is_left_alone() {
    let mut cluster = cluster().await;
    let client = &mut cluster.client;
    let firm = ", priority: 1, scheduling: {preemptible: false}";
    let ids = submit(client, &job("firm", "default", 8, firm)).await;
    until_phase(client, &ids[0], "running").await;
    let high = submit(client, &job("high", "default", 6, ", priority: 100")).await;
    until(client, &high[0], |view| view.reason == "WaitingForDevices").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(get(client, &ids[0]).await.phase, "running");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_job_waits_until_it_is_released_even_over_a_restart() {
    let mut cluster = cluster().await;
    let id = {
        let client = &mut cluster.client;
        // All devices are taken, so that the second waits.
        let ids = submit(client, &job("first", "default", 8, "")).await;
        until_phase(client, &ids[0], "running").await;
        let id = submit(client, &job("second", "default", 1, "")).await.remove(0);
        let hold = |held| v1::HoldJobRequest { id: id.clone(), held, user: "ada".to_owned() };
        client.hold_job(hold(true)).await.unwrap();
        let running = v1::HoldJobRequest { id: ids[0].clone(), held: true, user: String::new() };
        let told = client.hold_job(running).await.unwrap_err();
        assert!(told.message().contains("only a waiting job"), "{told}");
        let cancel = v1::CancelJobRequest { id: ids[0].clone(), user: String::new() };
        client.cancel_job(cancel).await.unwrap();
        until_phase(client, &ids[0], "cancelled").await;
        until(client, &id, |view| view.reason == "Held").await;
        submit(client, &queue("kept", "quota: {cpu: 1}, weight: 7")).await;
        id
    };
    let address = cluster.control.running.address;
    cluster.control.stop().await;
    let control = Control::start(cluster.folder.path(), address).await;
    let mut client = control.client().await;
    let kept = queues(&mut client).await.into_iter().find(|queue| queue.name == "kept").unwrap();
    assert_eq!(kept.weight, 7);
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(get(&mut client, &id).await.phase, "pending");
    let release = v1::HoldJobRequest { id: id.clone(), held: false, user: String::new() };
    client.hold_job(release).await.unwrap();
    until_phase(&mut client, &id, "running").await;
    assert!(cluster.ledger.lock().unwrap().violations.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queues_that_cannot_be_are_refused_and_used_ones_stay() {
    let mut cluster = cluster().await;
    let client = &mut cluster.client;
    let told = refused(client, &queue("lost", "parent: nowhere")).await;
    assert!(told.contains("nowhere"), "{told}");
    let both = [queue("top", "quota: {cpu: 8}"), queue("leaf", "parent: top, quota: {cpu: 4}")];
    submit(client, &both.join("---\n")).await;
    let told = refused(client, &queue("top", "parent: leaf")).await;
    assert!(told.contains("top"), "a circle: {told}");
    let delete = |name: &str| v1::DeleteQueueRequest { name: name.to_owned(), user: String::new() };
    let told = client.delete_queue(delete("top")).await.unwrap_err();
    assert!(told.message().contains("leaf"), "{told}");
    let ids = submit(client, &job("in-leaf", "leaf", 1, "")).await;
    let told = client.delete_queue(delete("leaf")).await.unwrap_err();
    assert!(told.message().contains(&ids[0]), "{told}");
    let told = client.delete_queue(delete("laef")).await.unwrap_err();
    assert!(told.message().contains("there is no queue laef"), "{told}");
    let cancel = v1::CancelJobRequest { id: ids[0].clone(), user: String::new() };
    client.cancel_job(cancel).await.unwrap();
    until_phase(client, &ids[0], "cancelled").await;
    client.delete_queue(delete("leaf")).await.unwrap();
    client.delete_queue(delete("top")).await.unwrap();
    let waits = submit(client, &job("late", "top", 1, "")).await;
    until(client, &waits[0], |view| view.reason == "QueueMissing").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_saved_state_holds_what_the_scheduler_knows_and_is_read_back() {
    let mut cluster = cluster().await;
    let client = &mut cluster.client;
    let ids = submit(client, &job("a", "default", 3, "")).await;
    until_phase(client, &ids[0], "running").await;
    let json = client.snapshot(v1::SnapshotRequest {}).await.unwrap().into_inner().json;
    let saved: drumline_scheduler::Saved = serde_json::from_str(&json).unwrap();
    assert_eq!(saved.nodes.len(), 2);
    assert_eq!(saved.commitments.len(), 1);
    let restored = drumline_scheduler::Scheduler::restore(saved).unwrap();
    assert_eq!(restored.fleet().commitments().count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_elastic_gang_starts_with_what_fits() {
    let mut cluster = cluster().await;
    let client = &mut cluster.client;
    let ids = submit(client, &job("fill", "default", 3, "")).await;
    until_phase(client, &ids[0], "running").await;
    let elastic = ", elastic: {least: 2, most: 8}";
    let id = submit(client, &job("stretch", "default", 8, elastic)).await.remove(0);
    let view = until_phase(client, &id, "running").await;
    assert_eq!(view.ranks.len(), 5);
    let ledger = cluster.ledger.lock().unwrap();
    assert_eq!(ledger.launched[&(id.clone(), 1)].world_size, 5);
    assert!(ledger.launched[&(id, 1)].spec_json.contains("\"ranks\":5"));
    assert!(ledger.violations.is_empty());
}

/// A queue `default` that was made and deleted is the open one again, for those who show it and
/// for those who decide, now and after a restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleting_the_default_queue_opens_it_again() {
    let mut cluster = cluster().await;
    let client = &mut cluster.client;
    submit(client, &queue("default", "quota: {cpu: 1}, borrowingLimit: {cpu: 0}")).await;
    let waits = submit(client, &job("first", "default", 2, "")).await;
    until(client, &waits[0], |view| view.reason == "ExceedsQuota").await;
    let cancel = v1::CancelJobRequest { id: waits[0].clone(), user: String::new() };
    client.cancel_job(cancel).await.unwrap();
    until_phase(client, &waits[0], "cancelled").await;
    let delete = v1::DeleteQueueRequest { name: "default".to_owned(), user: String::new() };
    client.delete_queue(delete).await.unwrap();
    let listed = queues(client).await;
    let default = listed.iter().find(|queue| queue.name == "default").unwrap();
    assert!(default.quota.is_empty(), "{default:?}");
    let ids = submit(client, &job("second", "default", 3, "")).await;
    until_phase(client, &ids[0], "running").await;
    // One that was made together with one that cannot be is not left behind either.
    let both = [queue("default", "held: true"), queue("lost", "parent: nowhere")].join("---\n");
    assert!(refused(client, &both).await.contains("nowhere"));
    let ids = submit(client, &job("third", "default", 3, "")).await;
    until_phase(client, &ids[0], "running").await;
}
