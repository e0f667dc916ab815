//! The control plane as a process of its own, killed with SIGKILL at random moments while jobs are
//! submitted: every accepted job is there afterwards, and no gang ever ran twice at once.

mod support;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use drumline_control::Options;
use drumline_wire::auth::AddToken;
use drumline_wire::v1;
use drumline_wire::v1::control_client::ControlClient;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use support::agent::{Act, FakeAgent, Ledger, Script};
use tokio_util::sync::CancellationToken;

/// Names the folder of the child's store; without it this is the parent.
const FOLDER: &str = "DRUMLINE_TEST_CRASH_FOLDER";
/// Names the child's address.
const LISTEN: &str = "DRUMLINE_TEST_CRASH_LISTEN";
/// Fixes the seed of the kills and of what ranks do.
const SEED: &str = "DRUMLINE_TEST_SEED";
const KILLS: u32 = 24;
const SUBMITTERS: u32 = 3;

/// The child: a control plane until it is killed. Does nothing when run as a test.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child_control_plane() {
    let (Ok(folder), Ok(listen)) = (std::env::var(FOLDER), std::env::var(LISTEN)) else {
        eprintln!("skipped: only the crash test below runs this, as a process of its own");
        return;
    };
    let options = Options {
        listen: listen.parse().unwrap(),
        sole_user: true,
        heartbeat: Duration::from_millis(100),
        node_grace: Duration::from_secs(4),
        ..Options::loopback(support::store(folder.as_ref()), support::token())
    };
    drumline_control::run(options, CancellationToken::new()).await.unwrap();
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn(folder: &std::path::Path, listen: SocketAddr) -> Killed {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_control_plane", "--nocapture", "--test-threads=1"])
        .env(FOLDER, folder)
        .env(LISTEN, listen.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    Killed(child)
}

fn free_port() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// Submits until it is told to stop; a submission without an answer is repeated with its key.
async fn submitter(
    url: String,
    number: u32,
    stop: Arc<AtomicBool>,
    accepted: Arc<Mutex<BTreeMap<String, Vec<String>>>>,
) {
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let key = format!("submitter-{number}-{count}");
        let manifests = format!(
            "{}---\n{}",
            support::command(&format!("s{number}-{count}-a"), 1, 3),
            support::command(&format!("s{number}-{count}-b"), 3, 3)
        );
        let deadline = Instant::now() + support::PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "{key} was not accepted in {:?}", support::PATIENCE);
            let request = v1::SubmitRequest {
                manifests: manifests.clone(),
                idempotency_key: key.clone(),
                ..v1::SubmitRequest::default()
            };
            let Ok(channel) = support::channel(&url).await else {
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            let add = AddToken::new(&support::token());
            match ControlClient::with_interceptor(channel, add).submit(request).await {
                Ok(answer) => {
                    let jobs = answer.into_inner().jobs;
                    let ids: Vec<String> = jobs.into_iter().map(|job| job.id).collect();
                    assert_eq!(ids.len(), 2);
                    accepted.lock().unwrap().insert(key.clone(), ids);
                    break;
                }
                Err(status) => {
                    assert_ne!(status.code(), tonic::Code::InvalidArgument, "{status}");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
        count += 1;
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_that_is_killed_again_and_again_loses_nothing_and_repeats_nothing() {
    let seed = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_nanos() as u64
    });
    eprintln!("seed {seed}; {SEED}={seed} repeats the same kills");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let folder = tempfile::tempdir().unwrap();
    let listen = free_port();
    let url = format!("http://{listen}");
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    // Ranks end at odd moments; one in eight first attempts fails.
    let script: Script = Arc::new(move |job, attempt, rank| {
        let mut mixed = seed ^ u64::from(attempt) << 32 ^ u64::from(rank);
        for byte in job.bytes() {
            mixed = mixed.wrapping_mul(0x0000_0100_0000_01b3) ^ u64::from(byte);
        }
        let after = mixed % 60;
        if attempt == 1 && (mixed >> 8).is_multiple_of(8) {
            Act::FailAfter(after, 3)
        } else {
            Act::SucceedAfter(after)
        }
    });
    let _agents: Vec<_> = (0..3)
        .map(|node| {
            let name = format!("node-{node}");
            FakeAgent::start(&url, &name, 2, &ledger, Arc::clone(&script))
        })
        .collect();
    let (stop, accepted) = (Arc::new(AtomicBool::new(false)), Arc::default());
    let submitters: Vec<_> = (0..SUBMITTERS)
        .map(|number| {
            let (stop, accepted) = (Arc::clone(&stop), Arc::clone(&accepted));
            tokio::spawn(submitter(url.clone(), number, stop, accepted))
        })
        .collect();
    for kill in 0..KILLS {
        let child = spawn(folder.path(), listen);
        // One in four from hardly up. The others are at work, however long they take to get there.
        if kill % 4 != 0 {
            let deadline = Instant::now() + support::PATIENCE;
            while tokio::net::TcpStream::connect(listen).await.is_err() {
                assert!(Instant::now() < deadline, "seed {seed}: nobody listens");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        let life = 30 + u64::from(random.next_u32()) % 500;
        tokio::time::sleep(Duration::from_millis(life)).await;
        drop(child);
    }
    let last = spawn(folder.path(), listen);
    stop.store(true, Ordering::Relaxed);
    for submitter in submitters {
        submitter.await.unwrap();
    }
    let accepted: Vec<String> =
        accepted.lock().unwrap().values().flatten().cloned().collect::<Vec<_>>();
    assert!(accepted.len() >= 20, "only {} jobs were accepted", accepted.len());
    let deadline = Instant::now() + support::PATIENCE;
    let channel = loop {
        match support::channel(&url).await {
            Ok(channel) => break channel,
            Err(error) => assert!(Instant::now() < deadline, "seed {seed}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let add = AddToken::new(&support::token());
    let mut client = ControlClient::with_interceptor(channel, add);
    let jobs = loop {
        let request = v1::ListJobsRequest { limit: 5000, ..v1::ListJobsRequest::default() };
        let jobs = match client.list_jobs(request).await {
            Ok(listed) => listed.into_inner().jobs,
            Err(status) => {
                assert!(Instant::now() < deadline, "seed {seed}: {status}");
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        if jobs.iter().all(|job| job.phase == "succeeded") {
            break jobs;
        }
        let open: Vec<_> = jobs
            .iter()
            .filter(|job| job.phase != "succeeded")
            .map(|job| format!("{} {}: {} {}", job.id, job.phase, job.reason, job.message))
            .collect();
        assert!(Instant::now() < deadline, "seed {seed}: {open:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let known: std::collections::BTreeSet<_> = jobs.iter().map(|job| job.id.clone()).collect();
    for id in &accepted {
        assert!(known.contains(id), "seed {seed}: accepted job {id} is lost");
    }
    assert_eq!(known.len(), accepted.len(), "seed {seed}: every stored job was acknowledged");
    let ledger = ledger.lock().unwrap();
    assert_eq!(ledger.violations, Vec::<String>::new(), "seed {seed}");
    assert!(ledger.live.is_empty(), "seed {seed}: {:?}", ledger.live);
    let twice: Vec<_> = ledger.launches.iter().filter(|(_, count)| **count > 1).collect();
    assert!(twice.is_empty(), "seed {seed}: launched twice: {twice:?}");
    let attempts = ledger.launched.len();
    eprintln!("{} jobs, {attempts} attempts, {KILLS} kills", accepted.len());
    drop(last);
}
