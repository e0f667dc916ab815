//! The binary without a cluster: help, wrong input, exit codes, and where output goes.

use std::path::Path;
use std::process::{Command, Output, Stdio};

fn drumline(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_drumline"));
    // A state folder that never exists.
    command.env_clear().env("DRUMLINE_STATE_DIR", "/nonexistent/drumline").args(arguments);
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."));
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn current(path: &str, actual: &str) {
    let full = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path);
    if std::env::var_os("DRUMLINE_WRITE_DOCS").is_some() {
        std::fs::create_dir_all(full.parent().unwrap()).unwrap();
        std::fs::write(&full, actual).unwrap();
    }
    let expected = std::fs::read_to_string(&full).unwrap_or_default();
    assert!(actual == expected, "{path} is not current; DRUMLINE_WRITE_DOCS=1 rewrites it");
}

#[test]
fn without_arguments_a_newcomer_is_led_to_the_demo() {
    let out = drumline(&[]);
    assert_eq!(out.status.code(), Some(0));
    assert!(text(&out.stdout).contains("drumline demo"));
    assert!(out.stderr.is_empty());
}

#[test]
fn help_lists_every_command_and_hides_the_roles() {
    let help = text(&drumline(&["--help"]).stdout);
    for name in [
        "demo",
        "up",
        "submit",
        "jobs",
        "describe",
        "logs",
        "wait",
        "cancel",
        "nodes",
        "top",
        "serve",
        "complete",
        "explain",
        "validate",
        "completions",
        "version",
    ] {
        assert!(help.lines().any(|line| line.trim_start().starts_with(name)), "{name}\n{help}");
    }
    for hidden in ["  supervise", "  rank-exec", "  agent", "  gateway"] {
        assert!(!help.contains(hidden), "{hidden}\n{help}");
    }
}

#[test]
fn the_reference_pages_are_current() {
    current("docs/reference/cli.md", &drumline_cli::reference::markdown());
    current("docs/reference/manifests.md", &drumline_spec::reference::markdown());
}

#[test]
fn wrong_input_is_told_in_full_and_exits_2() {
    let mistakes = "crates/spec/tests/golden/mistakes.yaml";
    let cases: [&[&str]; 12] = [
        &["validate", mistakes],
        &["submit", mistakes],
        &["validate", "no-such-file.yaml"],
        &["explain", "TraningJob"],
        &["explain", "TrainingJob.modle.heads"],
        &["describe", "job"],
        &["jbos"],
        &["up", "--nodes", "0"],
        &["wait", "x", "--timeout", "soon"],
        &["jobs", "--endpoint", "10.1.2.3:80"],
        &["jobs", "--endpoint", "http://10.1.2.3:80"],
        &["completions", "klingon"],
    ];
    let mut told = String::new();
    for arguments in cases {
        let out = drumline(arguments);
        assert_eq!(out.status.code(), Some(2), "{arguments:?}: {out:?}");
        assert!(out.stdout.is_empty(), "{arguments:?} wrote to standard output: {out:?}");
        told.push_str(&format!("$ drumline {}\n{}\n", arguments.join(" "), text(&out.stderr)));
    }
    current("crates/cli/tests/golden/wrong-input.txt", &told);
}

#[test]
fn a_cluster_that_is_not_there_exits_3_and_says_what_to_do() {
    let cases: [&[&str]; 7] = [
        &["jobs"],
        &["nodes", "--output", "json"],
        &["submit", "docs/examples/train-demo.yaml"],
        &["logs", "-f", "x", "--reconnect", "0s"],
        &["wait", "x", "--reconnect", "0s"],
        &["top", "--once"],
        &["version", "--cluster"],
    ];
    let mut told = String::new();
    for arguments in cases {
        let out = drumline(arguments);
        assert_eq!(out.status.code(), Some(3), "{arguments:?}: {out:?}");
        assert!(out.stdout.is_empty(), "{arguments:?}");
        told.push_str(&format!("$ drumline {}\n{}\n", arguments.join(" "), text(&out.stderr)));
    }
    current("crates/cli/tests/golden/unreachable.txt", &told);
}

#[test]
fn data_goes_to_standard_output_alone() {
    let cases: [&[&str]; 6] = [
        &["validate", "docs/examples/train-demo.yaml"],
        &["validate", "docs/examples/serve-demo.yaml", "-o", "json"],
        &["explain", "TrainingJob"],
        &["explain", "CommandJob", "--schema"],
        &["completions", "bash"],
        &["version"],
    ];
    for arguments in cases {
        let out = drumline(arguments);
        assert_eq!(out.status.code(), Some(0), "{arguments:?}: {out:?}");
        assert!(!out.stdout.is_empty() && out.stderr.is_empty(), "{arguments:?}: {out:?}");
        assert!(!text(&out.stdout).contains('\x1b'), "{arguments:?} has escapes");
    }
    let out = drumline(&["validate", "crates/spec/tests/golden/mistakes.yaml", "-o", "json"]);
    assert_eq!(out.status.code(), Some(2));
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(json["mistakes"].as_array().unwrap().len() > 20);
    assert_eq!(json["mistakes"][0]["line"], 1);
}

#[test]
fn a_manifest_can_come_from_standard_input() {
    let mut child = command(&["validate", "-"])
        .stdin(Stdio::from(std::fs::File::open("../../docs/examples/torchrun-style.yaml").unwrap()))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = command(&["explain", "TrainingJob", "--schema"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    assert!(out.stderr.is_empty(), "{}", text(&out.stderr));
}

#[test]
fn an_open_split_is_valid_and_said_to_be_chosen_later() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("auto.yaml");
    let demo = std::fs::read_to_string("../../docs/examples/train-demo.yaml").unwrap();
    // The demo's split is an object of its own lines: the word takes its place.
    let start = demo.find("  parallelism:").unwrap();
    let end = start
        + demo[start..]
            .match_indices('\n')
            .find(|(at, _)| !demo[start + at + 1..].starts_with("    "))
            .unwrap()
            .0;
    let open = format!("{}  parallelism: auto{}", &demo[..start], &demo[end..]);
    std::fs::write(&file, open).unwrap();
    let out = drumline(&["validate", file.to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(0), "{out:?}");
    assert!(text(&out.stdout).contains("chosen at submit"), "{out:?}");
    let out = drumline(&["validate", file.to_str().unwrap(), "-o", "json"]);
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(json["manifests"][0]["parallelism"], "auto");
}
