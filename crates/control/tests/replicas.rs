//! Services of several replicas, over the real protocol, with agents on paper.

mod support;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use drumline_wire::v1;
use support::agent::{Act, FakeAgent, Ledger};
use support::{Client, Control, any_port, get, submit, until, until_phase};

struct Cluster {
    control: Control,
    agents: Vec<FakeAgent>,
    folder: tempfile::TempDir,
}

async fn cluster(nodes: u32) -> Cluster {
    let folder = tempfile::tempdir().unwrap();
    let control = Control::start(folder.path(), any_port()).await;
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let agents = (0..nodes)
        .map(|node| {
            let (url, name) = (control.url(), format!("node-{node}"));
            FakeAgent::start(&url, &name, 2, &ledger, Arc::new(|_, _, _| Act::Hold))
        })
        .collect();
    Cluster { control, agents, folder }
}

fn service(more: &str) -> String {
    format!(
        "apiVersion: drumline.dev/v1alpha1\nkind: ModelService\nmetadata: {{name: chat}}\n\
         spec: {{model: runs/demo, maxBatch: 4, maxQueue: 16, {more}}}\n"
    )
}

async fn scale(client: &mut Client, id: &str, replicas: u32) -> Result<v1::JobView, tonic::Status> {
    let request = v1::ScaleJobRequest { id: id.to_owned(), replicas, user: "ann".to_owned() };
    client.scale_job(request).await.map(tonic::Response::into_inner)
}

fn of(job: &v1::JobView) -> &v1::ServiceView {
    job.service.as_ref().unwrap()
}

impl Cluster {
    /// Reports what replicas have to do until `holds` is true of the service.
    async fn report_until(
        &self,
        client: &mut Client,
        id: &str,
        load: impl Fn(u32) -> v1::ServeReport,
        holds: impl Fn(&v1::JobView) -> bool,
    ) -> v1::JobView {
        let begin = Instant::now();
        loop {
            let job = get(client, id).await;
            if holds(&job) {
                return job;
            }
            assert!(begin.elapsed() < support::PATIENCE, "{job:?}");
            let all = std::iter::once(id.to_owned()).chain(of(&job).replica_jobs.clone());
            for replica in all {
                let view = get(client, &replica).await;
                let number = view.service.as_ref().map_or(0, |service| service.replica);
                let report = v1::RankReport {
                    job: replica,
                    attempt: view.attempt,
                    rank: 0,
                    serve: Some(load(number)),
                    ..v1::RankReport::default()
                };
                self.agents[0].report(report).await;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn load(running: u32, waiting: u32) -> v1::ServeReport {
    v1::ServeReport { ready: true, max_batch: 4, running, waiting, ..v1::ServeReport::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_are_jobs_of_their_own_and_end_with_their_service() {
    let cluster = cluster(3).await;
    let mut client = cluster.control.client().await;
    let id = submit(&mut client, &service("replicas: 3")).await.remove(0);
    let job = cluster
        .report_until(&mut client, &id, |_| load(0, 0), |job| of(job).replicas_ready == 3)
        .await;
    assert_eq!((of(&job).replicas, of(&job).replica_jobs.len()), (3, 2));
    for (number, replica) in (1..).zip(&of(&job).replica_jobs) {
        let replica = get(&mut client, replica).await;
        assert_eq!((of(&replica).replica_of.as_str(), of(&replica).replica), (&*id, number));
        assert_eq!(
            (of(&replica).served_name.as_str(), replica.phase.as_str()),
            ("chat", "running")
        );
        assert!(replica.events[0].message.contains(&format!("replica {number} of {id}")));
    }
    // Every one of them may be called.
    let routes = cluster.control.running.handle.services().unwrap();
    assert_eq!(routes.iter().filter(|one| one.ready && !one.endpoint.is_empty()).count(), 3);
    let cancel = v1::CancelJobRequest { id: id.clone(), user: String::new() };
    client.cancel_job(cancel).await.unwrap();
    for replica in &of(&job).replica_jobs {
        let ended = until_phase(&mut client, replica, "cancelled").await;
        let told = ended.events.iter().any(|event| event.message.contains(&id));
        assert!(told, "{:?}", ended.events);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_is_scaled_up_and_down_and_a_new_leader_keeps_it_so() {
    let cluster = cluster(3).await;
    let mut client = cluster.control.client().await;
    let id = submit(&mut client, &service("replicas: 1")).await.remove(0);
    let scaled = scale(&mut client, &id, 4).await.unwrap();
    assert!(scaled.events.iter().any(|event| event.message == "from 1 to 4 replicas, by ann"));
    let busy = |number| load(u32::from(number == 3), 0);
    let job = cluster.report_until(&mut client, &id, busy, |job| of(job).replicas_ready == 4).await;
    // The last one has a request: it gets no more, and is not cut off.
    let last = of(&job).replica_jobs[2].clone();
    scale(&mut client, &id, 2).await.unwrap();
    cluster.report_until(&mut client, &id, busy, |job| of(job).replica_jobs.len() == 2).await;
    let draining = get(&mut client, &last).await;
    assert_eq!((draining.phase.as_str(), of(&draining).drains), ("running", true));
    let routes = cluster.control.running.handle.services().unwrap();
    assert!(routes.iter().any(|one| one.job == last && !one.ready));
    cluster
        .report_until(&mut client, &id, |_| load(0, 0), |job| of(job).replica_jobs.len() == 1)
        .await;
    until_phase(&mut client, &last, "cancelled").await;

    // The next leader finds the same set, and starts nothing that is there already.
    let kept = of(&get(&mut client, &id).await).replica_jobs.clone();
    drop(client);
    let address = cluster.control.running.address;
    cluster.control.stop().await;
    let control = Control::start(cluster.folder.path(), address).await;
    let mut client = control.client().await;
    let job = until(&mut client, &id, |job| of(job).replicas == 2).await;
    assert_eq!(of(&job).replica_jobs, kept);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_follow_what_is_asked_of_them() {
    let cluster = cluster(3).await;
    let mut client = cluster.control.client().await;
    let auto = service("autoscale: {max: 3, waiting: 2, downAfter: 1s}");
    let id = submit(&mut client, &auto).await.remove(0);
    // A batch of 4 and 2 that wait are one replica's part.
    let job =
        cluster.report_until(&mut client, &id, |_| load(4, 3), |job| of(job).replicas > 1).await;
    assert_eq!(of(&job).replicas, 2);
    cluster
        .report_until(&mut client, &id, |_| load(4, 16), |job| of(job).replicas_ready == 3)
        .await;
    cluster
        .report_until(&mut client, &id, |_| load(0, 0), |job| of(job).replica_jobs.is_empty())
        .await;
    assert_eq!(get(&mut client, &id).await.phase, "running", "the fewest is one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_scaled_says_why() {
    let cluster = cluster(1).await;
    let mut client = cluster.control.client().await;
    let id = submit(&mut client, &service("replicas: 2")).await.remove(0);
    let job = until(&mut client, &id, |job| of(job).replica_jobs.len() == 1).await;
    let replica = of(&job).replica_jobs[0].clone();
    let auto = submit(&mut client, &service("autoscale: {max: 2}")).await.remove(0);
    let command = submit(&mut client, &support::command("other", 1, 0)).await.remove(0);
    for (id, replicas, word) in [
        (&id, 0, "drumline cancel"),
        (&id, 257, "from 1 to 256"),
        (&replica, 3, &*format!("a replica of {id}")),
        (&auto, 2, "autoscale"),
        (&command, 2, "CommandJob"),
    ] {
        let told = scale(&mut client, id, replicas).await.unwrap_err();
        assert_eq!(told.code(), tonic::Code::InvalidArgument);
        assert!(told.message().contains(word), "{}", told.message());
    }
    let told = scale(&mut client, "nobody", 2).await.unwrap_err();
    assert_eq!(told.code(), tonic::Code::NotFound);
    let cancel = v1::CancelJobRequest { id: id.clone(), user: String::new() };
    client.cancel_job(cancel).await.unwrap();
    let told = scale(&mut client, &id, 3).await.unwrap_err();
    assert!(told.message().contains("has ended"), "{}", told.message());
}
