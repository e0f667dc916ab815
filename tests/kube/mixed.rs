//! Tier 2: kube-scheduler and the operator bind to the same nodes at the same time, more than fits.
//! An independent watcher adds up what each node's pods ask for: never more than it has.
//!
//! A few hundred pods by default; 10,000 with `DRUMLINE_KWOK=full`. `DRUMLINE_GUARD=off` runs it without
//! the guard, which shows what it is for.

use std::time::{Duration, Instant};

use crate::cluster::skipped;
use crate::kwok::{Kwok, Size};
use crate::scale::{Run, gangs};
use crate::witness::Witness;

/// Of the pods that are asked for in a round, for each of the two, of all devices.
const DEMAND: f64 = 0.75;
/// A round goes on until so much of all devices is held.
const FULL: f64 = 0.85;
/// A round that does not get there in this time has found no room for its gangs, and ends.
const ROUND: Duration = Duration::from_secs(20);

fn size() -> (Size, u64) {
    match std::env::var("DRUMLINE_KWOK").as_deref() {
        Ok("full") => (Size { nodes: 250, per_node: 8, gang_max: 128 }, 10_000),
        Ok("half") => (Size { nodes: 50, per_node: 8, gang_max: 64 }, 2_000),
        _ => (Size { nodes: 12, per_node: 8, gang_max: 32 }, 400),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beside_kube_scheduler_no_node_has_more_pods_than_it_has_devices() {
    let (size, pods) = size();
    let kwok = match Kwok::start(size).await {
        Ok(kwok) => kwok,
        Err(why) => return skipped(&why),
    };
    let scheduler = match kwok.kube_scheduler() {
        Ok(scheduler) => scheduler,
        Err(why) => return skipped(&why),
    };
    let witness = Witness::start(kwok.client.clone(), size.per_node);
    let run = Run { kwok, witness, size };
    // It lists all nodes first: until then the operator would have them for itself.
    run.kwok.create_plain("warm", 1).await;
    run.all_bound(1).await;
    run.kwok.delete_plain("warm", 1).await;
    run.all_gone().await;
    let operator = match std::env::var("DRUMLINE_GUARD").as_deref() {
        Ok("off") => run.kwok.operator(),
        _ => run.kwok.guarded_operator().await,
    };
    let devices = size.devices();
    let demand = (f64::from(devices) * DEMAND) as u32;
    let start = Instant::now();
    let (mut round, mut plain) = (0, 0);
    while run.witness.bindings().0 < pods {
        round += 1;
        let theirs = format!("p{round}");
        let ours = gangs(&format!("g{round}"), demand, size.gang_max);
        // The last round's pods go at the same time.
        let last = round - 1;
        let before =
            if last > 0 { gangs(&format!("g{last}"), demand, size.gang_max) } else { vec![] };
        let end_of_last = async {
            run.delete(&before).await;
            if last > 0 {
                run.kwok.delete_plain(&format!("p{last}"), demand).await;
            }
        };
        tokio::join!(run.apply(&ours), run.kwok.create_plain(&theirs, demand), end_of_last);
        let began = Instant::now();
        while (run.witness.bound(None) as f64) < f64::from(devices) * FULL
            && began.elapsed() < ROUND
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        plain += run.witness.bound_plain();
        run.check();
    }
    let (bindings, most) = run.witness.bindings();
    println!(
        "{bindings} pods in {round} rounds on {} nodes of {} devices in {:.0?}: at most {most} of a \
         node were held; {} bindings of kube-scheduler refused, {} plans too late",
        size.nodes,
        size.per_node,
        start.elapsed(),
        run.kwok.logged("a binding is refused"),
        run.kwok.logged("a plan came too late"),
    );
    println!("{plain} plain pods were held at the rounds' ends, beside gangs");
    // Both had their part, or nothing was shown.
    assert!(plain as u64 >= bindings / 10, "kube-scheduler bound hardly anything");
    assert!(plain as u64 <= bindings * 9 / 10, "the operator bound hardly anything");
    assert_eq!(most, size.per_node, "no node was ever full");
    run.delete(&gangs(&format!("g{round}"), demand, size.gang_max)).await;
    run.kwok.delete_plain(&format!("p{round}"), demand).await;
    run.all_gone().await;
    run.check();
    drop((operator, scheduler));
}
