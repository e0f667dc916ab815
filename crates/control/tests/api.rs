//! What callers are told when they are wrong, and what they may not do.

mod support;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use drumline_control::{Error, Options};
use drumline_wire::auth::Token;
use drumline_wire::v1;
use support::agent::{Act, FakeAgent, Ledger};
use support::{Control, any_port, client, command, submit, training};
use tokio_util::sync::CancellationToken;
use tonic::Code;

async fn alone() -> (Control, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    (Control::start(folder.path(), any_port()).await, folder)
}

fn request(manifests: &str) -> v1::SubmitRequest {
    v1::SubmitRequest {
        manifests: manifests.to_owned(),
        source_name: "job.yaml".to_owned(),
        ..v1::SubmitRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_mistake_is_told_and_nothing_is_stored() {
    let (control, _folder) = alone().await;
    let mut client = control.client().await;
    let wrong = format!(
        "{}---\napiVersion: drumline.dev/v1alpha1\nkind: CommandJob\nmetadata: {{name: b}}\n\
         spec: {{argv: [], rank: 2}}\n",
        command("good", 1, 0)
    );
    let status = client.submit(request(&wrong)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let lines: Vec<_> = status.message().lines().collect();
    assert!(lines.len() >= 2, "{}", status.message());
    assert!(lines.iter().all(|line| line.starts_with("job.yaml:")), "{}", status.message());
    assert!(status.message().contains("did you mean `ranks`?"), "{}", status.message());
    let jobs = client.list_jobs(v1::ListJobsRequest::default()).await.unwrap().into_inner();
    assert!(jobs.jobs.is_empty(), "the good one came with a bad one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_token_opens_the_door_for_people_and_for_agents() {
    let (control, _folder) = alone().await;
    let wrong = Token::new("another-token-0123456789").unwrap();
    let mut stranger = client(&control.url(), &wrong).await;
    for status in [
        stranger.version(v1::VersionRequest {}).await.unwrap_err(),
        stranger.submit(request(&command("a", 1, 0))).await.unwrap_err(),
        stranger.fleet(v1::FleetRequest {}).await.unwrap_err(),
    ] {
        assert_eq!(status.code(), Code::Unauthenticated);
        assert!(!status.message().contains("test-token"));
    }
    let bare = support::channel(&control.url()).await.unwrap();
    let status = v1::control_client::ControlClient::new(bare)
        .version(v1::VersionRequest {})
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let script = Arc::new(|_: &str, _, _| Act::Hold);
    let _agent = FakeAgent::start_with(&control.url(), "node-0", 2, &ledger, script, wrong);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(control.running.handle.list_nodes().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_is_too_long_is_refused_and_harms_nobody() {
    let (control, _folder) = alone().await;
    let mut caller = control.client().await;
    let mut other = control.client().await;
    let long = request(&"#".repeat(drumline_wire::MESSAGE_MAX_BYTES + 1));
    let status = caller.submit(long).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    // Within the message's limit, but too long for a manifest.
    let status = caller.submit(request(&"#".repeat(2 << 20))).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    other.version(v1::VersionRequest {}).await.unwrap();
    caller.version(v1::VersionRequest {}).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_malformed_request_is_refused_and_harms_nobody() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (control, _folder) = alone().await;
    for garbage in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        &[0xff; 4096][..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\xff",
    ] {
        let mut stream = tokio::net::TcpStream::connect(control.running.address).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(1), stream.read_to_end(&mut answer));
        let _ = read.await;
    }
    // An agent whose first word is no hello.
    let channel = support::channel(&control.url()).await.unwrap();
    let mut link = v1::agent_link_client::AgentLinkClient::with_interceptor(
        channel,
        drumline_wire::auth::AddToken::new(&support::token()),
    );
    let first = v1::AgentUp { kind: Some(v1::agent_up::Kind::Heartbeat(v1::Heartbeat::default())) };
    let status = link.connect(futures::stream::iter([first])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("Hello"), "{}", status.message());
    control.client().await.version(v1::VersionRequest {}).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_ids_are_not_found_with_a_remedy() {
    let (control, _folder) = alone().await;
    let mut client = control.client().await;
    for id in ["nope", "../etc", ""] {
        let get = v1::GetJobRequest { id: id.to_owned() };
        let cancel = v1::CancelJobRequest { id: id.to_owned(), user: String::new() };
        let logs = v1::LogsRequest { id: id.to_owned(), ..v1::LogsRequest::default() };
        for status in [
            client.get_job(get.clone()).await.unwrap_err(),
            client.watch_job(get).await.unwrap_err(),
            client.cancel_job(cancel).await.unwrap_err(),
            client.logs(logs).await.unwrap_err(),
        ] {
            assert_eq!(status.code(), Code::NotFound, "{id:?}");
            assert!(status.message().contains("drumline jobs"), "{}", status.message());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_key_gives_the_same_jobs_also_after_a_restart() {
    let (control, folder) = alone().await;
    let mut client = control.client().await;
    let manifests = format!("{}---\n{}", command("a", 1, 0), command("b", 1, 0));
    let keyed = |manifests: &str| v1::SubmitRequest {
        idempotency_key: "key-1".to_owned(),
        ..request(manifests)
    };
    let ids = |answer: tonic::Response<v1::SubmitResponse>| -> Vec<String> {
        answer.into_inner().jobs.into_iter().map(|job| job.id).collect()
    };
    let first = ids(client.submit(keyed(&manifests)).await.unwrap());
    assert_eq!(first.len(), 2);
    assert_eq!(ids(client.submit(keyed(&manifests)).await.unwrap()), first);
    let status = client.submit(keyed(&command("c", 1, 0))).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_ne!(submit(&mut client, &manifests).await, first, "without a key: new jobs");
    drop(client);
    let address = control.running.address;
    control.stop().await;
    let control = Control::start(folder.path(), address).await;
    let mut client = control.client().await;
    assert_eq!(ids(client.submit(keyed(&manifests)).await.unwrap()), first);
    let listed = client.list_jobs(v1::ListJobsRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.jobs.len(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_tells_the_placement_or_the_reason_and_stores_nothing() {
    let (control, _folder) = alone().await;
    let mut client = control.client().await;
    let dry = |manifests: &str| v1::SubmitRequest { dry_run: true, ..request(manifests) };
    let answer = client.submit(dry(&training("a", 0))).await.unwrap().into_inner();
    assert_eq!(answer.jobs[0].reason, "NoMatchingDevice");
    assert!(answer.jobs[0].placement.is_empty() && answer.jobs[0].id.is_empty());
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let script: support::agent::Script = Arc::new(|_, _, _| Act::Hold);
    let _agents = ["node-0", "node-1"]
        .map(|node| FakeAgent::start(&control.url(), node, 2, &ledger, Arc::clone(&script)));
    let placed = loop {
        let mut answer = client.submit(dry(&training("a", 0))).await.unwrap().into_inner();
        if !answer.jobs[0].placement.is_empty() {
            break answer.jobs.remove(0).placement;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(placed.len(), 4);
    assert_eq!(placed[0].node, placed[1].node);
    let too_big = client.submit(dry(&command("b", 5, 0))).await.unwrap().into_inner();
    assert_eq!(too_big.jobs[0].reason, "ExceedsCluster");
    let listed = client.list_jobs(v1::ListJobsRequest::default()).await.unwrap().into_inner();
    assert!(listed.jobs.is_empty());
    assert!(ledger.lock().unwrap().launches.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_waits_says_why_in_one_line() {
    let (control, _folder) = alone().await;
    let mut client = control.client().await;
    let id = submit(&mut client, &command("big", 8, 0)).await.remove(0);
    let view = support::get(&mut client, &id).await;
    assert_eq!((view.phase.as_str(), view.reason.as_str()), ("pending", "NoMatchingDevice"));
    assert!(!view.message.contains('\n') && !view.remedy.is_empty());
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let script: support::agent::Script = Arc::new(|_, _, _| Act::Hold);
    let _agent = FakeAgent::start(&control.url(), "node-0", 2, &ledger, script);
    let view = support::until(&mut client, &id, |job| job.reason == "ExceedsCluster").await;
    assert!(view.message.contains("needs 8 cpu devices"), "{}", view.message);
    let elsewhere = command("q", 1, 0).replace("ranks: 1", "ranks: 1, queue: research");
    let id = submit(&mut client, &elsewhere).await.remove(0);
    assert_eq!(support::get(&mut client, &id).await.reason, "QueueMissing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_others_reach_is_refused_without_tls() {
    let folder = tempfile::tempdir().unwrap();
    for listen in ["0.0.0.0:0", "[::]:0"] {
        let options = Options {
            listen: listen.parse().unwrap(),
            ..Options::loopback(support::store(&folder.path().join(&listen[..2])), support::token())
        };
        let error = drumline_control::start(options, CancellationToken::new()).await.unwrap_err();
        assert!(matches!(error, Error::PlainText(_)));
        assert!(error.to_string().contains("TLS"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_did_what_is_written_down_without_the_token() {
    use std::os::unix::fs::PermissionsExt;
    let (control, folder) = alone().await;
    let mut client = control.client().await;
    let id = submit(&mut client, &command("a", 1, 0)).await.remove(0);
    let _ = client.submit(request("kind: [")).await.unwrap_err();
    let cancel = v1::CancelJobRequest { id: id.clone(), user: "grace".to_owned() };
    client.cancel_job(cancel).await.unwrap();
    let path = folder.path().join("audit.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert_eq!((&lines[0]["user"], &lines[0]["action"]), (&"ada".into(), &"submit".into()));
    assert_eq!(lines[0]["jobs"][0], id.as_str());
    assert_ne!(lines[1]["outcome"], "ok");
    assert_eq!((&lines[2]["user"], &lines[2]["action"]), (&"grace".into(), &"cancel".into()));
    assert!(!text.contains("test-token"));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}
