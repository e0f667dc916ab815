//! `drumline bench control`: the whole control path in real time, on the workload of Kueue's
//! scheduler performance test, with agents whose ranks only sleep.
//!
//! The workload (kubernetes-sigs/kueue, test/performance/scheduler, configuration "baseline"):
//! cohorts of queues, in each queue three classes of workloads that differ in size, run time,
//! pace of arrival and priority. Kueue reports 351 s for it; the work itself needs 66 s.

mod agents;
mod etcd;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use drumline_control::Options;
use drumline_store::OpenOptions;
use drumline_wire::auth::{AddToken, Token};
use drumline_wire::v1;
use drumline_wire::v1::control_client::ControlClient;
use futures::StreamExt;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

use super::{Figure, Measured, quantile};
use crate::failure::Failure;
use crate::output::note;

/// Arguments of `bench control`.
#[derive(Debug, Args)]
pub struct ControlArgs {
    /// The store: `embedded` in a folder of its own; `etcd`, a server that is started for the
    /// benchmark; or `etcd://HOST:PORT`, which must be empty.
    #[arg(long, default_value = "embedded")]
    pub store: String,
    /// Folder for the store [default: a new one beside the working folder that is deleted].
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Cohorts of six queues each; Kueue's test has 5.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=50))]
    pub cohorts: u32,
    /// Part of each queue's workloads that is submitted, in percent; Kueue's test has 100.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub percent: u32,
    /// Give the run up after this time.
    #[arg(long, default_value = "10m", value_parser = crate::args::duration)]
    pub timeout: Duration,
}

const QUEUES: u32 = 6;
const QUOTA: u32 = 20;
const BORROWING: u32 = 100;
const DEVICES_PER_NODE: u32 = 10;
/// Submissions under way at once.
const CALLS: usize = 64;

/// One class of workloads.
struct Class {
    name: &'static str,
    count: u32,
    ranks: u32,
    runs_ms: u64,
    every_ms: u64,
    priority: i32,
}

const CLASSES: [Class; 3] = [
    Class { name: "small", count: 350, ranks: 1, runs_ms: 200, every_ms: 100, priority: 50 },
    Class { name: "medium", count: 100, ranks: 5, runs_ms: 500, every_ms: 500, priority: 100 },
    Class { name: "large", count: 50, ranks: 20, runs_ms: 1000, every_ms: 1200, priority: 200 },
];

type Client = ControlClient<InterceptedService<Channel, AddToken>>;

pub(super) async fn run(args: &ControlArgs) -> Result<Measured, Failure> {
    // Beside the working folder, not in a memory file system, so that durable means durable.
    let folder = tempfile::Builder::new().prefix(".drumline-bench-").tempdir_in(".")?;
    let at = args.dir.clone().unwrap_or_else(|| folder.path().to_owned());
    let mut server = None;
    let (address, kind) = match args.store.as_str() {
        "embedded" => (format!("embedded:{}", at.join("state.redb").display()), "embedded"),
        "etcd" => {
            let server = server.insert(etcd::Server::start(&at).await?);
            (server.address().to_owned(), "etcd")
        }
        other => (other.to_owned(), "etcd"),
    };
    let store = drumline_store::open(&address, &OpenOptions::default())
        .await
        .map_err(|error| Failure::user(format!("--store: {error}")))?;
    let token = Token::new("bench-control-0123456789")
        .map_err(|error| Failure::failed(error.to_string()))?;
    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    let options = Options { ended_jobs_max: 50_000, ..Options::loopback(store, token.clone()) };
    let control = drumline_control::start(options, stop.clone())
        .await
        .map_err(|error| Failure::failed(error.to_string()))?;
    control
        .handle
        .wait_until_leader(Duration::from_secs(30))
        .await
        .map_err(|error| Failure::failed(error.to_string()))?;
    let url = format!("http://{}", control.address);
    let devices = args.cohorts * QUEUES * QUOTA;
    let nodes = devices.div_ceil(DEVICES_PER_NODE);
    let fleet = agents::Agents::start(&url, &token, nodes, DEVICES_PER_NODE, &stop);
    let mut client = connect(&url, &token).await?;
    wait_for_nodes(&mut client, nodes).await?;
    submit(&mut client, &queues(args.cohorts)).await?;

    let outcome = drive(args, &client, &fleet).await;
    let cycles = control.handle.registry().gather();
    stop.cancel();
    let outcome = outcome?;
    let (name, setting, mut figures) = report(args, kind, &outcome, &fleet, &cycles);
    let whole = "processor time: control plane, clients and agents";
    figures.extend(cpu_s("self").map(|cpu| Figure::new(whole, cpu, "s")));
    let theirs = server.as_ref().and_then(etcd::Server::cpu_s);
    figures.extend(theirs.map(|cpu| Figure::new("processor time: etcd", cpu, "s")));
    Ok((name, setting, figures))
}

/// Returns the processor time of a process, in seconds; `None` where it cannot be told.
fn cpu_s(process: &str) -> Option<f64> {
    /// Clock ticks of a second, as Linux counts processor time for users.
    const TICKS: f64 = 100.0;
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name, which may hold anything, is in brackets; user and system time are the 12th and
    // 13th after it.
    let mut after = text.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: f64 = after.next()?.parse().ok()?;
    let system: f64 = after.next()?.parse().ok()?;
    Some((user + system) / TICKS)
}

async fn connect(url: &str, token: &Token) -> Result<Client, Failure> {
    let failed = |error: tonic::transport::Error| Failure::failed(error.to_string());
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(failed)?.tcp_nodelay(true);
    let channel = endpoint.connect().await.map_err(failed)?;
    Ok(ControlClient::with_interceptor(channel, AddToken::new(token)))
}

async fn wait_for_nodes(client: &mut Client, nodes: u32) -> Result<(), Failure> {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(30) {
        let listed =
            client.list_nodes(v1::ListNodesRequest {}).await.map_err(refused)?.into_inner().nodes;
        if listed.iter().filter(|node| node.phase == "ready").count() as u32 == nodes {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(Failure::failed("the simulated agents did not connect within 30 s"))
}

async fn submit(client: &mut Client, manifests: &str) -> Result<v1::SubmitResponse, Failure> {
    let request =
        v1::SubmitRequest { manifests: manifests.to_owned(), ..v1::SubmitRequest::default() };
    Ok(client.submit(request).await.map_err(refused)?.into_inner())
}

fn refused(status: tonic::Status) -> Failure {
    Failure::from_status(&status, "the control plane of this benchmark")
}

/// Returns the manifests of the queues: in each cohort the queues lend to each other.
fn queues(cohorts: u32) -> String {
    let api = drumline_spec::table::API_VERSION;
    let mut text = String::new();
    for cohort in 0..cohorts {
        let all = QUEUES * QUOTA;
        text += &format!(
            "---\napiVersion: {api}\nkind: Queue\nmetadata: {{name: cohort-{cohort}}}\n\
             spec: {{quota: {{cpu: {all}}}, borrowingLimit: {{cpu: 0}}}}\n"
        );
        for queue in 0..QUEUES {
            text += &format!(
                "---\napiVersion: {api}\nkind: Queue\nmetadata: {{name: q-{cohort}-{queue}}}\n\
                 spec: {{parent: cohort-{cohort}, quota: {{cpu: {QUOTA}}}, \
                 borrowingLimit: {{cpu: {BORROWING}}}, reclaim: any, preemptWithin: true}}\n"
            );
        }
    }
    text
}

/// What a run led to.
struct Outcome {
    jobs: usize,
    wall: Duration,
    /// Milliseconds of the slowest and of half of the submissions.
    calls: Vec<f64>,
    /// When each job was due, by name.
    due: BTreeMap<String, Instant>,
    evictions: u64,
    restarts: u64,
}

async fn drive(
    args: &ControlArgs,
    client: &Client,
    fleet: &agents::Agents,
) -> Result<Outcome, Failure> {
    let mut arrivals: Vec<(u64, String, String)> = Vec::new();
    for cohort in 0..args.cohorts {
        for queue in 0..QUEUES {
            for class in &CLASSES {
                for number in 0..class.count * args.percent / 100 {
                    let name = format!("{}-{cohort}-{queue}-{number}", class.name);
                    let manifest = format!(
                        "{{apiVersion: {}, kind: CommandJob, metadata: {{name: {name}}}, spec: \
                         {{argv: [\"sleep\", \"{}\"], ranks: {}, queue: q-{cohort}-{queue}, \
                         priority: {}, restarts: {{limit: 0}}}}}}",
                        drumline_spec::table::API_VERSION,
                        class.runs_ms,
                        class.ranks,
                        class.priority
                    );
                    arrivals.push((u64::from(number) * class.every_ms, name, manifest));
                }
            }
        }
    }
    arrivals.sort();
    let jobs = arrivals.len();
    let begin = Instant::now();
    let limit = begin + args.timeout;
    let due = arrivals
        .iter()
        .map(|(at, name, _)| (name.clone(), begin + Duration::from_millis(*at)))
        .collect();
    let submissions = futures::stream::iter(arrivals).map(|(at, name, manifest)| {
        let mut client = client.clone();
        async move {
            let due = begin + Duration::from_millis(at);
            tokio::time::sleep_until(due.into()).await;
            let called = Instant::now();
            submit(&mut client, &manifest).await.map_err(|failure| (name, failure))?;
            Ok::<f64, (String, Failure)>(called.elapsed().as_secs_f64() * 1e3)
        }
    });
    let mut submissions = std::pin::pin!(submissions.buffered(CALLS));
    let mut calls = Vec::with_capacity(jobs);
    let mut shown = Instant::now();
    while let Some(call) = submissions.next().await {
        calls.push(call.map_err(|(name, failure)| {
            Failure::failed(format!("{name} was not accepted: {failure:?}"))
        })?);
        if Instant::now() > limit {
            return Err(Failure::failed(format!(
                "given up after {} s with {} of {jobs} submitted",
                args.timeout.as_secs(),
                calls.len()
            )));
        }
        if shown.elapsed() > Duration::from_secs(10) {
            shown = Instant::now();
            let done = fleet.finished();
            note(&format!("{} submitted, {done} finished of {jobs}", calls.len()));
        }
    }
    // The run is over when the control plane itself says that nothing is left.
    let mut client = client.clone();
    loop {
        if fleet.finished() >= jobs {
            let request = v1::ListJobsRequest { active_only: true, limit: 1, ..Default::default() };
            if client.list_jobs(request).await.map_err(refused)?.into_inner().jobs.is_empty() {
                break;
            }
        }
        if Instant::now() > limit {
            return Err(Failure::failed(format!(
                "given up after {} s with {} of {jobs} finished",
                args.timeout.as_secs(),
                fleet.finished()
            )));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let wall = begin.elapsed();
    calls.sort_by(f64::total_cmp);
    let (evictions, restarts) = fleet.stopped();
    Ok(Outcome { jobs, wall, calls, due, evictions, restarts })
}

fn report(
    args: &ControlArgs,
    kind: &'static str,
    outcome: &Outcome,
    fleet: &agents::Agents,
    families: &[prometheus::proto::MetricFamily],
) -> Measured {
    let whole = args.cohorts == 5 && args.percent == 100;
    let setting = format!(
        "{} jobs in {} queues of {} cohorts on {} devices; {kind} store; submitted one by one \
         over gRPC; simulated agents in the same process",
        outcome.jobs,
        args.cohorts * QUEUES,
        args.cohorts,
        args.cohorts * QUEUES * QUOTA
    );
    let wall = Figure::new("wall time", outcome.wall.as_secs_f64(), "s");
    let mut figures = vec![if whole { wall.aim("80 s; Kueue 351 s; the work 66 s") } else { wall }];
    let admitted = fleet.admitted();
    for class in &CLASSES {
        let mut waits: Vec<f64> = admitted
            .iter()
            .filter(|(name, _)| name.starts_with(class.name))
            .filter_map(|(name, at)| {
                let due = outcome.due.get(name)?;
                Some(at.saturating_duration_since(*due).as_secs_f64())
            })
            .collect();
        waits.sort_by(f64::total_cmp);
        for (part, of) in [("half", 0.5), ("99 of 100", 0.99)] {
            let name = format!("{}: due to launched, {part} within", class.name);
            figures.push(Figure::new(name, quantile(&waits, of), "s"));
        }
        let mean = waits.iter().sum::<f64>() / waits.len().max(1) as f64;
        figures.push(Figure::new(format!("{}: due to launched, mean", class.name), mean, "s"));
    }
    figures.push(Figure::new("submission, half within", quantile(&outcome.calls, 0.5), "ms"));
    figures.push(Figure::new("submission, 99 of 100 within", quantile(&outcome.calls, 0.99), "ms"));
    figures.push(Figure::new("gangs stopped by the scheduler", outcome.evictions as f64, ""));
    figures.push(Figure::new("attempts beyond the first", outcome.restarts as f64, ""));
    let applied = |family: &&prometheus::proto::MetricFamily| {
        family.name() == "drumline_store_txn_duration_seconds"
    };
    if let Some(family) = families.iter().find(applied) {
        let histograms =
            || family.get_metric().iter().map(prometheus::proto::Metric::get_histogram);
        let count: u64 = histograms().map(|h| h.get_sample_count()).sum();
        let sum: f64 = histograms().map(|h| h.get_sample_sum()).sum();
        figures.push(Figure::new("store transactions", count as f64, ""));
        let each = sum * 1e3 / count.max(1) as f64;
        figures.push(Figure::new("store transaction, mean", each, "ms"));
    }
    for (metric, name) in [
        ("drumline_placement_duration_seconds", "scheduling, all cycles together"),
        ("drumline_audit_duration_seconds", "audit, all cycles together"),
    ] {
        let family = families.iter().find(|family| family.name() == metric);
        let metric = family.and_then(|family| family.get_metric().first());
        if let Some(histogram) = metric.map(prometheus::proto::Metric::get_histogram) {
            figures.push(Figure::new(name, histogram.get_sample_sum(), "s"));
        }
    }
    ("control", setting, figures)
}
