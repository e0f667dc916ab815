//! The dashboard in a real headless browser: complete, live without a reload, legible when narrow.

use std::process::{Command, Stdio};

use crate::cluster::{Cluster, training};

/// Returns a page as the browser has it after `ms` milliseconds of its life, scripts included.
fn page(url: &str, width: u32, ms: u32) -> Option<String> {
    let profile = tempfile::tempdir().unwrap();
    let output = Command::new("chromium")
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("--window-size={width},800"))
        .arg(format!("--timeout={ms}"))
        .args(["--dump-dom", url])
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("SKIPPED: there is no chromium on this machine (Debian package chromium)");
            None
        }
        Err(error) => panic!("chromium: {error}"),
    }
}

#[test]
fn the_dashboard_is_live_in_a_browser() {
    let cluster = Cluster::start(2, 2);
    cluster.build_data();
    let id = cluster.submit(&training("shown", 2, 2, 1, 100_000));
    cluster.wait_for(&id, "it trains", |job| job["training"]["step"].as_u64().unwrap_or(0) > 5);
    let dashboard = cluster.ready["dashboard"].as_str().unwrap().to_owned();
    let (base, key) = dashboard.split_once("/?key=").unwrap();

    let Some(fleet) = page(&dashboard, 1280, 3500) else { return };
    assert!(fleet.contains("node-0") && fleet.contains("node-1"), "{fleet}");
    assert!(fleet.contains(&id), "the job is listed");
    // The script ran, and its stream of events is open.
    assert!(fleet.contains(r#"class="live""#), "{fleet}");
    // The page that was sent at first shows an earlier step than the one that the browser has now.
    let url = format!("{base}/jobs/{id}?key={key}");
    let step = |html: &str| -> u64 {
        let at = html.find("aria-valuenow=\"").expect("a progress bar") + 15;
        html[at..].split('"').next().unwrap().parse().unwrap()
    };
    let before = cluster.job(&id)["training"]["step"].as_u64().unwrap();
    let job = page(&url, 1280, 6000).unwrap();
    assert!(step(&job) > before, "{} after {before}", step(&job));
    assert!(job.contains("<polyline class=\"curve\""), "the loss is drawn");
    assert!(job.contains("Rank 0") && job.contains("tokens/s"));
    // Nothing is fetched from elsewhere.
    for part in job.split("src=\"").skip(1).chain(job.split("href=\"").skip(1)) {
        assert!(
            part.starts_with('/') || part.starts_with('#') || part.starts_with("data:"),
            "{}",
            &part[..40]
        );
    }
    // Without the key there is only the door.
    let door = page(&format!("{base}/jobs/{id}"), 390, 2000).unwrap();
    assert!(door.contains("Dashboard key") && !door.contains(&id.to_uppercase()));
    assert!(!door.contains("Rank 0"));
    cluster.run(&["cancel", &id]);
    cluster.stop();
}
