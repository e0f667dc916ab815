//! Logs, streamed with offsets, across lost connections.

mod support;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use drumline_wire::v1;
use support::agent::{Act, FakeAgent, Ledger, Script};
use support::{Control, any_port, command, submit, until_phase};
use tonic::Code;

async fn read(mut stream: tonic::Streaming<v1::LogChunk>) -> (String, Vec<u64>) {
    let (mut text, mut offsets) = (Vec::new(), Vec::new());
    let all = async {
        while let Some(chunk) = stream.message().await.unwrap() {
            assert_eq!(
                chunk.offset as usize,
                offsets.first().map_or(chunk.offset as usize, |first| *first as usize + text.len())
            );
            offsets.push(chunk.offset);
            text.extend(chunk.data);
        }
    };
    tokio::time::timeout(support::PATIENCE, all).await.unwrap();
    (String::from_utf8(text).unwrap(), offsets)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_is_followed_over_a_lost_control_plane_and_read_from_any_offset() {
    let folder = tempfile::tempdir().unwrap();
    let control = Control::start(folder.path(), any_port()).await;
    let address = control.running.address;
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let script: Script = Arc::new(|_, _, _| Act::Hold);
    let agent = FakeAgent::start(&control.url(), "node-0", 2, &ledger, script);
    let mut client = control.client().await;
    let id = submit(&mut client, &command("talks", 1, 0)).await.remove(0);
    until_phase(&mut client, &id, "running").await;
    let ask = |offset, follow, tail_bytes| v1::LogsRequest {
        id: id.clone(),
        rank: Some(0),
        offset,
        follow,
        tail_bytes,
        ..v1::LogsRequest::default()
    };
    agent.speak("one\n");
    agent.speak("two\n");
    let (text, offsets) = read(client.logs(ask(0, false, 0)).await.unwrap().into_inner()).await;
    assert_eq!((text.as_str(), offsets[0]), ("one\ntwo\n", 0));
    let (text, offsets) = read(client.logs(ask(4, false, 0)).await.unwrap().into_inner()).await;
    assert_eq!((text.as_str(), offsets[0]), ("two\n", 4));
    let (text, offsets) = read(client.logs(ask(0, false, 3)).await.unwrap().into_inner()).await;
    assert_eq!((text.as_str(), offsets[0]), ("wo\n", 5));

    let mut follow = client.logs(ask(0, true, 0)).await.unwrap().into_inner();
    let first = follow.message().await.unwrap().unwrap();
    assert_eq!(first.data, b"one\ntwo\n");
    drop(client);
    control.stop().await;
    drop(follow);
    agent.speak("three\n");
    let control = Control::start(folder.path(), address).await;
    let mut client = control.client().await;
    // The agent may still be on its way back: a followed log waits for it.
    let follow = client.logs(ask(8, true, 0)).await.unwrap().into_inner();
    let reader = tokio::spawn(read(follow));
    tokio::time::sleep(Duration::from_millis(500)).await;
    agent.speak("four\n");
    tokio::time::sleep(Duration::from_millis(100)).await;
    agent.kill_rank(&id, 1, 0, 9);
    let (text, offsets) = reader.await.unwrap();
    assert_eq!((text.as_str(), offsets[0]), ("three\nfour\n", 8));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_cannot_be_had_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let control = Control::start(folder.path(), any_port()).await;
    let mut client = control.client().await;
    let id = submit(&mut client, &command("waits", 2, 0)).await.remove(0);
    let ask = |rank, attempt| v1::LogsRequest {
        id: id.clone(),
        rank: Some(rank),
        attempt,
        ..v1::LogsRequest::default()
    };
    let status = client.logs(ask(0, 0)).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("no log yet: NoMatchingDevice"), "{}", status.message());
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let script: Script = Arc::new(|_, _, _| Act::Hold);
    let agent = FakeAgent::start(&control.url(), "node-0", 2, &ledger, script);
    until_phase(&mut client, &id, "running").await;
    for (rank, attempt, evidence) in [(7, 0, "no rank 7"), (0, 9, "no attempt 9")] {
        let status = client.logs(ask(rank, attempt)).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound);
        assert!(status.message().contains(evidence), "{}", status.message());
    }
    agent.kill();
    let started = std::time::Instant::now();
    // The stream's end is seen a moment later.
    while control.running.handle.list_nodes().unwrap().iter().any(|node| node.phase == "ready") {
        assert!(started.elapsed() < support::PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut gone = client.logs(ask(0, 0)).await.unwrap().into_inner();
    let status = gone.message().await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("node-0"), "{}", status.message());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_is_slow_gets_every_byte_and_holds_nobody_up() {
    let folder = tempfile::tempdir().unwrap();
    let control = Control::start(folder.path(), any_port()).await;
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let script: Script = Arc::new(|_, _, rank| match rank {
        0 => Act::Hold,
        _ => Act::SucceedAfter(400),
    });
    let agent = FakeAgent::start(&control.url(), "node-0", 2, &ledger, script);
    let mut client = control.client().await;
    let id = submit(&mut client, &command("talks", 2, 0)).await.remove(0);
    until_phase(&mut client, &id, "running").await;
    let ask = v1::LogsRequest {
        id: id.clone(),
        rank: Some(0),
        follow: true,
        ..v1::LogsRequest::default()
    };
    let mut follow = client.logs(ask).await.unwrap().into_inner();
    let line = "x".repeat(20_000) + "\n";
    let lines = 600;
    for _ in 0..lines {
        agent.speak(&line);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // Nobody reads the log, and statuses still come through.
    support::until(&mut client, &id, |job| job.ranks[1].phase == "succeeded").await;
    let mut bytes = 0usize;
    while bytes < lines * line.len() {
        let next = tokio::time::timeout(support::PATIENCE, follow.message());
        let chunk = next.await.unwrap().unwrap().unwrap();
        assert_eq!(chunk.offset as usize, bytes, "no gap and no repetition");
        bytes += chunk.data.len();
    }
}
