//! The dashboard in a real headless browser: complete, live without a reload, legible when narrow.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cluster::{Cluster, WAIT_MAX, training};

/// A browser, driven over the WebDriver protocol.
struct Browser {
    driver: Child,
    port: u16,
    session: String,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Starts one, or says that there is none on this machine.
    fn start() -> Option<Self> {
        let started = Command::new("chromedriver")
            .arg("--port=0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut driver = match started {
            Ok(driver) => driver,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                println!("SKIPPED: no chromedriver on this machine (Debian: chromium-driver)");
                return None;
            }
            Err(error) => panic!("chromedriver: {error}"),
        };
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port = lines
            .find_map(|line| {
                let line = line.ok()?;
                let rest = line.split("successfully on port ").nth(1)?;
                rest.trim_end_matches('.').parse().ok()
            })
            .expect("chromedriver says its port");
        // Its further words must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        let profile = tempfile::tempdir().unwrap();
        let data = format!("--user-data-dir={}", profile.path().display());
        let mut browser = Self { driver, port, session: String::new(), _profile: profile };
        let arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            &data,
        ];
        let wish = json!({ "capabilities": { "alwaysMatch": {
            "goog:chromeOptions": { "args": arguments },
        }}});
        let made = browser.call("POST", "/session", &wish);
        browser.session = made["sessionId"].as_str().expect("a session").to_owned();
        Some(browser)
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = if method == "POST" { body.to_string() } else { String::new() };
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.port,
            body.len()
        )
        .unwrap();
        // The driver keeps the connection open: the length says where the answer ends.
        let mut answer = BufReader::new(stream);
        let (mut head, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            answer.read_line(&mut line).unwrap();
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line.trim().is_empty() {
                break;
            }
            head.push_str(&line);
        }
        let mut json = vec![0; length];
        answer.read_exact(&mut json).unwrap();
        let value: Value = serde_json::from_slice(&json).unwrap_or_default();
        assert!(head.starts_with("HTTP/1.1 200"), "{method} {path}: {head}{value}");
        value["value"].clone()
    }

    fn within(&self, method: &str, path: &str, body: &Value) -> Value {
        self.call(method, &format!("/session/{}{path}", self.session), body)
    }

    fn open(&self, url: &str) {
        self.within("POST", "/url", &json!({ "url": url }));
    }

    fn run(&self, script: &str) -> Value {
        self.within("POST", "/execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// Waits until a script's answer is `true`.
    fn wait(&self, what: &str, script: &str) {
        let deadline = Instant::now() + WAIT_MAX;
        while self.run(script) != json!(true) {
            assert!(Instant::now() < deadline, "{what} within {WAIT_MAX:?}: {}", self.source());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn source(&self) -> String {
        self.within("GET", "/source", &Value::Null).as_str().unwrap_or_default().to_owned()
    }

    fn resize(&self, width: u32, height: u32) {
        self.within("POST", "/window/rect", &json!({ "width": width, "height": height }));
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Also after a failed test: a driver that is killed leaves its browser behind.
        let end = std::panic::AssertUnwindSafe(|| self.within("DELETE", "", &Value::Null));
        if !self.session.is_empty() {
            let _ = std::panic::catch_unwind(end);
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

#[test]
fn the_dashboard_is_live_in_a_browser() {
    let Some(browser) = Browser::start() else { return };
    let cluster = Cluster::start(2, 2);
    cluster.build_data();
    let id = cluster.submit(&training("shown", 2, 2, 1, 100_000));
    cluster.wait_for(&id, "it trains", |job| job["training"]["step"].as_u64().unwrap_or(0) > 5);
    let dashboard = cluster.ready["dashboard"].as_str().unwrap().to_owned();
    let (base, _) = dashboard.split_once("/?key=").unwrap();

    // Without the key there is only the door.
    browser.open(&format!("{base}/jobs/{id}"));
    let door = browser.source();
    assert!(door.contains("Dashboard key") && !door.contains("Rank 0"));

    // The printed address opens by itself; the key does not stay in the address bar.
    browser.resize(1280, 800);
    browser.open(&dashboard);
    browser.wait("the page is live", "return document.querySelector('#lamp').className === 'live'");
    assert_eq!(browser.run("return location.search"), json!(""));
    let fleet = browser.source();
    assert!(fleet.contains("node-0") && fleet.contains("node-1") && fleet.contains(&id), "{fleet}");

    // From here on the cookie opens. Steps go on without a reload: a mark on the window stays.
    browser.open(&format!("{base}/jobs/{id}"));
    browser.run("window.mark = 'same page'");
    let step = "Number(document.querySelector('[role=progressbar]').ariaValueNow)";
    let before = browser.run(&format!("return {step}")).as_u64().unwrap();
    browser.wait("a later step", &format!("return {step} > {before}"));
    assert_eq!(browser.run("return window.mark"), json!("same page"));
    let job = browser.source();
    assert!(job.contains("class=\"curve\"") && job.contains("Rank 0"), "{job}");
    // Nothing was fetched from elsewhere.
    let fetched = browser.run("return performance.getEntriesByType('resource').map(e => e.name)");
    for name in fetched.as_array().unwrap() {
        assert!(name.as_str().unwrap().starts_with(base), "{name}");
    }
    // On a phone nothing sticks out to the side.
    browser.resize(500, 844);
    for path in ["/", "/jobs", "/services", "/events"] {
        browser.open(&format!("{base}{path}"));
        let fits = "return document.documentElement.scrollWidth <= window.innerWidth";
        browser.wait(&format!("{path} fits"), fits);
    }
    drop(browser);
    cluster.run(&["cancel", &id]);
    cluster.stop();
}
