//! The binary against a scripted control plane: exit codes, output, and lost connections.

mod fake;

use std::time::Duration;

use drumline_wire::v1;
use fake::{Fake, Script, drumline, job};

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn wait_returns_the_jobs_own_outcome() {
    let state = tempfile::tempdir().unwrap();
    let fake =
        Fake::start(state.path(), Script { job: Some(job("succeeded")), ..Script::default() })
            .await;
    let out = drumline(state.path(), &["wait", "t-1"]).await;
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    assert_eq!(text(&out.stdout), "t-1 succeeded\n");
    let failure = v1::RankExitView {
        rank: 1,
        node: "node-0".to_owned(),
        signal: Some(9),
        message: "killed".to_owned(),
        ..v1::RankExitView::default()
    };
    let failed = v1::JobView {
        reason: "RestartsExhausted".to_owned(),
        message: "3 restarts without progress".to_owned(),
        remedy: "Mend the cause.".to_owned(),
        first_failure: Some(failure),
        ..job("failed")
    };
    fake.change(|script| script.job = Some(failed));
    let out = drumline(state.path(), &["wait", "t-1", "--output", "json"]).await;
    assert_eq!(out.status.code(), Some(1));
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).expect("only JSON on stdout");
    assert_eq!(json["first_failure"]["signal"], 9);
    let said = text(&out.stderr);
    for told in
        ["RestartsExhausted: 3 restarts", "rank 1 on node-0: signal 9: killed", "hint: Mend"]
    {
        assert!(said.contains(told), "no {told:?} in {said}");
    }
    let out = drumline(state.path(), &["wait", "unknown"]).await;
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("no job unknown"));
}

#[tokio::test(flavor = "multi_thread")]
async fn wait_goes_on_over_a_restart_of_the_control_plane() {
    let state = tempfile::tempdir().unwrap();
    let script = Script { job: Some(job("running")), break_watch: true, ..Script::default() };
    let mut fake = Fake::start(state.path(), script).await;
    let folder = state.path().to_owned();
    let waiting = tokio::spawn(async move { drumline(&folder, &["wait", "t-1"]).await });
    tokio::time::sleep(Duration::from_millis(400)).await;
    fake.restart(state.path(), Duration::from_millis(500)).await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(!waiting.is_finished(), "it ended although the job runs");
    fake.change(|script| script.job = Some(job("succeeded")));
    let out = tokio::time::timeout(Duration::from_secs(120), waiting).await.unwrap().unwrap();
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    assert_eq!(text(&out.stdout), "t-1 succeeded\n");
    assert!(text(&out.stderr).contains("trying again"), "{out:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_ends_when_time_is_up_or_the_cluster_stays_away() {
    let state = tempfile::tempdir().unwrap();
    let script = Script { job: Some(job("pending")), ..Script::default() };
    let fake = Fake::start(state.path(), script).await;
    let out = drumline(state.path(), &["wait", "t-1", "--timeout", "3s"]).await;
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    assert!(text(&out.stderr).contains("time is up: t-1 is pending"), "{out:?}");
    drop(fake);
    std::fs::write(state.path().join("endpoint.json"), r#"{"control":"http://127.0.0.1:1"}"#)
        .unwrap();
    let out = drumline(state.path(), &["wait", "t-1", "--reconnect", "500ms"]).await;
    assert_eq!(out.status.code(), Some(3), "{out:?}");
    let said = text(&out.stderr);
    assert!(said.contains("http://127.0.0.1:1") && said.contains("drumline up"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn followed_logs_show_every_byte_once_over_a_broken_stream() {
    let state = tempfile::tempdir().unwrap();
    let logs: Vec<Vec<u8>> = (0..2)
        .map(|rank| {
            (0..20)
                .map(|line| format!("rank {rank} line {line}\n"))
                .collect::<String>()
                .into_bytes()
        })
        .collect();
    let script = Script {
        job: Some(job("succeeded")),
        logs: logs.clone(),
        break_logs_after: Some(100),
        ..Script::default()
    };
    let fake = Fake::start(state.path(), script).await;
    let out = drumline(state.path(), &["logs", "-f", "t-1", "--rank", "1"]).await;
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    assert_eq!(text(&out.stdout), text(&logs[1]));
    assert_eq!(fake.script.lock().unwrap().offsets, [0, 100], "it went on where it was");
    fake.change(|script| script.break_logs_after = Some(100));
    let out = drumline(state.path(), &["logs", "-f", "t-1"]).await;
    let mut shown: Vec<String> = text(&out.stdout).lines().map(str::to_owned).collect();
    shown.sort();
    let mut expected: Vec<String> = (0..2)
        .flat_map(|rank| (0..20).map(move |line| format!("[{rank}] rank {rank} line {line}")))
        .collect();
    expected.sort();
    assert_eq!(shown, expected);
    fake.change(|script| script.job = Some(job("failed")));
    let out = drumline(state.path(), &["logs", "-f", "t-1"]).await;
    assert_eq!(out.status.code(), Some(1), "a failed job is no success");
    let out = drumline(state.path(), &["logs", "t-1"]).await;
    assert_eq!(out.status.code(), Some(0), "without -f it only reads");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submission_whose_answer_is_lost_is_stored_once() {
    let state = tempfile::tempdir().unwrap();
    let fake = Fake::start(state.path(), Script { lose_answers: 2, ..Script::default() }).await;
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/examples/train-demo.yaml");
    let out = drumline(state.path(), &["submit", example]).await;
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    assert_eq!(text(&out.stdout), "t-1\n");
    assert_eq!(fake.script.lock().unwrap().submitted.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_token_is_the_users_mistake() {
    let state = tempfile::tempdir().unwrap();
    let _fake = Fake::start(state.path(), Script::default()).await;
    std::fs::write(state.path().join("token"), "another-token-another").unwrap();
    let out = drumline(state.path(), &["jobs"]).await;
    assert_eq!(out.status.code(), Some(2), "{out:?}");
    let said = text(&out.stderr);
    assert!(said.contains("--token-file") && !said.contains("another-token"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn listings_are_data_in_three_forms() {
    let state = tempfile::tempdir().unwrap();
    let waiting = v1::JobView {
        reason: "WaitingForDevices".to_owned(),
        message: "0 of 4 devices are free".to_owned(),
        ..job("pending")
    };
    let _fake = Fake::start(state.path(), Script { job: Some(waiting), ..Script::default() }).await;
    let out = drumline(state.path(), &["jobs"]).await;
    let table = text(&out.stdout);
    assert!(table.starts_with("ID "), "{table}");
    assert!(table.contains("WaitingForDevices: 0 of 4 devices are free"), "{table}");
    assert!(out.stderr.is_empty() && !table.contains('\x1b'), "{out:?}");
    let out = drumline(state.path(), &["jobs", "-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(json[0]["reason"], "WaitingForDevices");
    let out = drumline(state.path(), &["jobs", "-o", "yaml"]).await;
    assert!(text(&out.stdout).contains("reason: WaitingForDevices\n"), "{out:?}");
    let out = drumline(state.path(), &["top"]).await;
    assert!(
        text(&out.stdout).contains("0 of 4 devices held"),
        "without a terminal it looks once: {out:?}"
    );
    let out = drumline(state.path(), &["describe", "job", "t-1"]).await;
    assert!(text(&out.stdout).contains("reason      WaitingForDevices"), "{out:?}");
}
