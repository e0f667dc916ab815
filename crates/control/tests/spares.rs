//! Spares over the real protocol: a node dies under a gang, and the next attempt starts on what was
//! kept ready, from which the job that used it meanwhile is moved out.

mod support;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use support::agent::{Act, FakeAgent, Ledger, Script};
use support::{Control, any_port, get, submit, until, until_phase};

fn job(name: &str, ranks: u32, more: &str) -> String {
    format!(
        "apiVersion: drumline.dev/v1alpha1\nkind: CommandJob\nmetadata: {{name: {name}}}\n\
         spec: {{argv: [\"true\"], ranks: {ranks}{more}}}\n"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_killed_under_a_gang_with_spares_is_replaced_by_them() {
    let folder = tempfile::tempdir().unwrap();
    let control = Control::start(folder.path(), any_port()).await;
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let script: Script = Arc::new(|_, _, _| Act::Hold);
    let mut agents: Vec<FakeAgent> = (0..3)
        .map(|node| {
            let name = format!("node-{node}");
            FakeAgent::start(&control.url(), &name, 4, &ledger, Arc::clone(&script))
        })
        .collect();
    let mut client = control.client().await;
    let started = Instant::now();
    let ready = || {
        let nodes = control.running.handle.list_nodes().unwrap();
        nodes.iter().filter(|node| node.phase == "ready").count()
    };
    while ready() < 3 {
        assert!(started.elapsed() < support::PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let more = ", resources: {spares: 4}, restarts: {limit: 3, backoff: 10ms}";
    let gang = submit(&mut client, &job("gang", 8, more)).await.remove(0);
    until_phase(&mut client, &gang, "running").await;
    let kept = until(&mut client, &gang, |view| view.spares.len() == 4).await;
    let spare = kept.spares[0].node.clone();
    assert!(kept.ranks.iter().all(|rank| rank.node != spare), "{kept:?}");
    // Lent meanwhile.
    let guest = submit(&mut client, &job("guest", 4, "")).await.remove(0);
    let lent = until_phase(&mut client, &guest, "running").await;
    assert!(lent.ranks.iter().all(|rank| rank.node == spare), "{lent:?}");
    let shown = |view: &drumline_wire::v1::JobView| view.spares.iter().all(|s| s.lent_to == guest);
    until(&mut client, &gang, shown).await;
    // Its node dies; nothing else is free.
    let victim = kept.ranks[7].node.clone();
    let at = agents.iter().position(|agent| agent.node == victim).unwrap();
    agents.remove(at).kill();
    let again = until(&mut client, &gang, |job| job.attempt == 2 && job.phase == "running").await;
    assert!(again.ranks.iter().any(|rank| rank.node == spare), "{again:?}");
    assert!(again.ranks.iter().all(|rank| rank.node != victim), "{again:?}");
    let moved = get(&mut client, &guest).await;
    assert_eq!(
        (moved.phase.as_str(), moved.restarts),
        ("pending", 0),
        "nothing is held against it"
    );
    let told = moved.events.iter().find(|event| event.reason == "Reclaimed").unwrap();
    assert!(told.message.contains(&gang), "{}", told.message);
    assert_eq!(again.spares.len(), 0);
    // The node comes back: the guest runs again, and who ran on spares has the first claim to more.
    let url = control.url();
    agents.push(FakeAgent::start(&url, &victim, 4, &ledger, Arc::clone(&script)));
    until_phase(&mut client, &guest, "running").await;
    assert!(ledger.lock().unwrap().violations.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_the_control_plane_keeps_the_same_spares() {
    let folder = tempfile::tempdir().unwrap();
    let control = Control::start(folder.path(), any_port()).await;
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let script: Script = Arc::new(|_, _, _| Act::Hold);
    let url = control.url();
    let start = |name: &str| FakeAgent::start(&url, name, 4, &ledger, Arc::clone(&script));
    let mut agents = vec![start("node-0"), start("node-1")];
    let mut client = control.client().await;
    let gang = submit(&mut client, &job("gang", 4, ", resources: {spares: 4}")).await.remove(0);
    until_phase(&mut client, &gang, "running").await;
    let kept = until(&mut client, &gang, |view| view.spares.len() == 4).await;
    // They are all lent, and a node joins that is idle: chosen anew, they would be there.
    let guest = submit(&mut client, &job("guest", 4, "")).await.remove(0);
    until_phase(&mut client, &guest, "running").await;
    agents.push(start("node-2"));
    let lent = |view: &drumline_wire::v1::JobView| {
        view.spares.len() == 4 && view.spares.iter().all(|spare| spare.lent_to == guest)
    };
    until(&mut client, &gang, lent).await;
    let address = control.running.address;
    control.stop().await;
    let control = Control::start(folder.path(), address).await;
    let mut client = control.client().await;
    let again = until(&mut client, &gang, |view| !view.spares.is_empty()).await;
    let of = |view: &drumline_wire::v1::JobView| {
        let devices = view.spares.iter().map(|spare| (spare.node.clone(), spare.device));
        devices.collect::<Vec<_>>()
    };
    assert_eq!(of(&again), of(&kept));
    until(&mut client, &gang, lent).await;
    assert_eq!((again.attempt, again.restarts), (1, 0));
    assert!(ledger.lock().unwrap().violations.is_empty());
}
