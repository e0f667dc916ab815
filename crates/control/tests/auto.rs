//! `parallelism: auto`: the split is chosen at submit, for the devices that the fleet has.

mod support;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use drumline_wire::v1;
use support::agent::{Act, FakeAgent, Ledger, Script};
use support::{Control, any_port, get, submit, until_phase};

fn auto(name: &str, layers: u32, hidden: u32) -> String {
    format!(
        "apiVersion: drumline.dev/v1alpha1\nkind: TrainingJob\nmetadata: {{name: {name}}}\n\
         spec: {{model: {{family: llama, layers: {layers}, hidden: {hidden}, ffn: {}, heads: 4, \
         vocab: 256, context: 64}}, data: {{path: data}}, parallelism: auto, \
         batch: {{global: 8}}, steps: 10}}\n",
        2 * hidden
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_split_is_chosen_for_the_fleet_as_it_is_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let control = Control::start(folder.path(), any_port()).await;
    let mut client = control.client().await;

    // Without any device nothing is stored, and what is short is said.
    let request = |manifests: String, dry_run: bool| v1::SubmitRequest {
        manifests,
        dry_run,
        ..v1::SubmitRequest::default()
    };
    let refused = client.submit(request(auto("early", 4, 64), false)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    assert!(refused.message().contains("no cpu device"), "{refused}");

    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let script: Script = Arc::new(|_, _, _| Act::Hold);
    let _agents: Vec<FakeAgent> = (0..2)
        .map(|node| {
            let name = format!("node-{node}");
            FakeAgent::start(&control.url(), &name, 2, &ledger, Arc::clone(&script))
        })
        .collect();
    let started = Instant::now();
    while control.running.handle.list_nodes().unwrap().iter().filter(|n| n.phase == "ready").count()
        < 2
    {
        assert!(started.elapsed() < support::PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    // A dry run shows the split, why, and where its ranks would go.
    let shown = client.submit(request(auto("first", 4, 256), true)).await.unwrap().into_inner();
    let first = &shown.jobs[0];
    assert!(first.split.contains("of 4 cpu devices free now"), "{first:?}");
    assert_eq!(first.placement.len(), first.ranks as usize);
    assert!(first.ranks > 1, "a product of 1 GFLOP/s is slower than any message: {first:?}");

    // What is stored has that split, and says that it was chosen.
    let id = submit(&mut client, &auto("first", 4, 256)).await.remove(0);
    let job = until_phase(&mut client, &id, "running").await;
    assert_eq!(job.tensor * job.pipeline * job.data, first.ranks);
    assert!(job.spec_json.contains("\"chosen\""), "{}", job.spec_json);
    assert!(job.events.iter().any(|e| e.reason == "SplitChosen" && e.message == first.split));

    // With the devices held, the next is planned for what is left, or waits for all.
    let second = client.submit(request(auto("second", 4, 256), false)).await.unwrap().into_inner();
    let second = &second.jobs[0];
    let left = 4 - first.ranks;
    if left == 0 {
        assert!(second.split.contains("healthy, some of them held"), "{second:?}");
        assert_eq!(get(&mut client, &second.id).await.phase, "pending");
    } else {
        assert!(second.ranks <= left, "{second:?}");
    }

    // What fits nowhere is refused with what is short; nothing of it is stored.
    let refused = client.submit(request(auto("huge", 64, 8192), false)).await.unwrap_err();
    assert!(refused.message().contains("GiB short"), "{refused}");
    let listed = client.list_jobs(v1::ListJobsRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.jobs.len(), 2);
}
