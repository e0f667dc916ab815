//! Other machines: commands and nodes that reach the control plane by TLS. Here the other machine is
//! another address of this one.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::cluster::{Cluster, DRUMLINE, assert_nothing_left, training};

/// A node of another machine, in a state folder of its own.
struct Joined {
    child: Child,
    folder: tempfile::TempDir,
}

impl Joined {
    /// Joins `cluster` with one device.
    fn new(cluster: &Cluster) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let child = Command::new(DRUMLINE)
            .args(["join", "--node", "far", "--devices", "1", "--gpus", "off"])
            .args(["--listen-ip", "127.0.0.2", "--topology", "rack=r2", "--shared-dir"])
            .arg(cluster.folder().join("shared"))
            .args(remote(cluster, "agent-token"))
            .arg("--state-dir")
            .arg(folder.path())
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("drumline starts");
        Self { child, folder }
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How another machine names `cluster`, with copies of its files.
fn remote(cluster: &Cluster, token: &str) -> Vec<String> {
    let file = |name: &str| cluster.folder().join(name).display().to_string();
    let url = cluster.ready["remote"].as_str().expect("an address").to_owned();
    vec![
        "--endpoint".into(),
        url,
        "--ca".into(),
        file("tls.crt"),
        "--token-file".into(),
        file(token),
    ]
}

/// Runs a command as another machine would: with nothing but an address, a certificate and a token.
fn afar(folder: &Path, arguments: &[&str], whom: &[String]) -> (Option<i32>, String, String) {
    let output = Command::new(DRUMLINE)
        .args(arguments)
        .args(whom)
        .arg("--state-dir")
        .arg(folder)
        .stdin(Stdio::null())
        .output()
        .expect("drumline starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_machine_that_joins_by_tls_runs_half_of_a_gang() {
    let cluster = Cluster::start_serving_others(1, 1);
    cluster.build_data();
    let here = tempfile::tempdir().expect("a temporary folder");
    let all = remote(&cluster, "token");
    let (code, told, errors) = afar(here.path(), &["nodes", "--output", "json"], &all);
    assert_eq!(code, Some(0), "{errors}");
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&told).expect("JSON")[0]["name"],
        "node-0"
    );

    let mut joined = Joined::new(&cluster);
    let deadline = Instant::now() + Duration::from_secs(60);
    while cluster.json(&["nodes"]).as_array().map_or(0, Vec::len) < 2 {
        assert!(Instant::now() < deadline, "the node joins: {:?}", joined.child.try_wait());
        std::thread::sleep(Duration::from_millis(50));
    }
    let manifest = here.path().join("job.yaml");
    std::fs::write(&manifest, training("both", 1, 2, 1, 100_000)).expect("a file");
    let manifest = manifest.to_str().expect("UTF-8");
    let (code, id, errors) = afar(here.path(), &["submit", manifest], &all);
    assert_eq!(code, Some(0), "{errors}");
    let id = id.trim();
    let has_saved =
        |job: &serde_json::Value| job["training"]["checkpoint_step"].as_u64() >= Some(10);
    let job = cluster.wait_for(id, "a checkpoint", has_saved);
    let mut nodes: Vec<&str> = job["placement"]
        .as_array()
        .expect("ranks")
        .iter()
        .filter_map(|rank| rank["node"].as_str())
        .collect();
    nodes.sort_unstable();
    assert_eq!(nodes, ["far", "node-0"], "{job:#}");
    for rank in ["0", "1"] {
        let (code, log, errors) = afar(here.path(), &["logs", id, "--rank", rank], &all);
        assert!(code == Some(0), "rank {rank}: {log}\n{errors}");
        assert!(rank == "1" || log.contains("step"), "{log}");
    }

    // The machine is gone: so is half of the gang, which waits for it, and goes on when it is back.
    joined.child.kill().expect("it runs");
    joined.child.wait().expect("it ends");
    cluster.wait_for(id, "the loss of its node", |job| job["phase"] != "running");
    assert_nothing_left(joined.folder.path());
    let again = Joined::new(&cluster);
    let is_back = |job: &serde_json::Value| job["phase"] == "running" && job["attempt"] != 1;
    cluster.wait_for(id, "the gang again", is_back);
    let (code, _, errors) = afar(here.path(), &["cancel", id], &all);
    assert_eq!(code, Some(0), "{errors}");
    cluster.wait_for(id, "its end", |job| job["phase"] == "cancelled");
    drop(again);
    cluster.stop();
}

#[test]
fn a_stranger_is_told_what_is_missing_or_wrong() {
    let (cluster, other) =
        (Cluster::start_serving_others(1, 1), Cluster::start_serving_others(1, 1));
    let here = tempfile::tempdir().expect("a temporary folder");
    let all = remote(&cluster, "token");
    let wrong = |whom: &[String], code: i32, words: &str| {
        let (got, _, errors) = afar(here.path(), &["nodes"], whom);
        assert!(got == Some(code) && errors.contains(words), "{words}: {got:?} {errors}");
    };
    let with = |at: usize, value: &str| {
        let mut whom = all.clone();
        value.clone_into(&mut whom[at]);
        whom
    };
    let theirs = |name: &str| other.folder().join(name).display().to_string();
    wrong(&[&all[..2], &all[4..]].concat(), 2, "no --ca says whom to trust");
    wrong(&with(3, &theirs("tls.crt")), 3, "certificate");
    wrong(&with(3, &theirs("token")), 2, "no certificate in PEM");
    wrong(&with(5, &theirs("token")), 2, "refused the token");
    // The agents' token lets nodes join, and reads and changes nothing.
    wrong(&remote(&cluster, "agent-token"), 2, "refused the token");
    wrong(&with(1, &all[1].replace("https", "http")), 3, "is named https://");
    wrong(&with(1, "http://192.0.2.1:7400"), 2, "the token would cross the network unprotected");
    let (code, _, errors) = afar(here.path(), &["complete", "x"], &all);
    assert!(code == Some(2) && errors.contains("listens there alone"), "{errors}");
    let (code, _, errors) = afar(here.path(), &["up", "--remote", "0.0.0.0:0"], &[]);
    assert!(code == Some(2) && errors.contains("no address says where ranks"), "{errors}");
    let (code, _, errors) = afar(here.path(), &["join"], &[]);
    assert!(code == Some(2) && errors.contains("no --endpoint says whom to join"), "{errors}");
    let (code, _, errors) = afar(here.path(), &["join"], &with(3, &theirs("tls.crt")));
    assert!(code == Some(3) && errors.contains("certificate"), "{errors}");
    // What it shows stays the same when it starts again, and the key is the owner's alone.
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(cluster.folder().join("tls.key")).expect("a key").permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    let before = std::fs::read(cluster.folder().join("tls.crt")).expect("a certificate");
    let cluster = cluster.again(1, 1);
    assert_eq!(std::fs::read(cluster.folder().join("tls.crt")).expect("a certificate"), before);
    let whom = remote(&cluster, "token");
    let (code, _, errors) = afar(here.path(), &["nodes"], &whom);
    assert_eq!(code, Some(0), "{errors}");
    cluster.stop();
    other.stop();
}
