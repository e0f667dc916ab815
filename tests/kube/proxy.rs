//! Stands between an operator and the API server, and breaks what it is told to break.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kube::Client;
use kube::client::Body;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// What is broken, and what was counted.
#[derive(Default)]
pub(crate) struct Faults {
    /// Nobody answers.
    pub(crate) is_away: AtomicBool,
    /// Every watch is told once that the history is gone.
    pub(crate) is_compacted: AtomicBool,
    /// The first update of each object is told that somebody was faster.
    pub(crate) has_conflicts: AtomicBool,
    updated: Mutex<BTreeSet<String>>,
    compacted: Mutex<BTreeSet<String>>,
    /// Requests that reached the proxy, and connections that were cut at once.
    pub(crate) requests: AtomicU64,
    /// Answers that were made up.
    pub(crate) injected: AtomicU64,
}

/// A proxy that ends when it is dropped.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    pub(crate) faults: Arc<Faults>,
    /// Cancelled and replaced to cut every open connection.
    open: Arc<Mutex<CancellationToken>>,
    stop: CancellationToken,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Proxy {
    /// Starts one that calls the API server as `client`.
    pub(crate) async fn start(client: Client) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (faults, stop) = (Arc::new(Faults::default()), CancellationToken::new());
        let open = Arc::new(Mutex::new(CancellationToken::new()));
        let (shared, cut, ended) = (faults.clone(), open.clone(), stop.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if shared.is_away.load(Ordering::SeqCst) {
                    shared.requests.fetch_add(1, Ordering::SeqCst);
                    continue;
                }
                let (client, faults) = (client.clone(), shared.clone());
                let cut = cut.lock().unwrap().clone();
                let ended = ended.clone();
                tokio::spawn(async move {
                    let service =
                        service_fn(move |request| answer(client.clone(), faults.clone(), request));
                    let connection = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service);
                    tokio::select! {
                        _ = connection => {}
                        () = cut.cancelled() => {}
                        () = ended.cancelled() => {}
                    }
                });
            }
        }));
        Self { address, faults, open, stop }
    }

    /// Cuts every connection: whoever is connected must come again.
    pub(crate) fn cut(&self) {
        let mut open = self.open.lock().unwrap();
        open.cancel();
        *open = CancellationToken::new();
    }

    /// Nobody answers from now on, or somebody does again.
    pub(crate) fn away(&self, is_away: bool) {
        self.faults.is_away.store(is_away, Ordering::SeqCst);
        self.cut();
    }

    pub(crate) fn requests(&self) -> u64 {
        self.faults.requests.load(Ordering::SeqCst)
    }
}

/// Returns the API server's way to say no.
fn refusal(code: StatusCode, reason: &str) -> Response<Body> {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason,
        "message": format!("injected: {reason}"), "code": code.as_u16(),
    });
    Response::builder()
        .status(code)
        .header("content-type", "application/json")
        .body(Body::from(status.to_string().into_bytes()))
        .unwrap()
}

async fn answer(
    client: Client,
    faults: Arc<Faults>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    faults.requests.fetch_add(1, Ordering::SeqCst);
    let path = request.uri().path().to_owned();
    let is_watch = request
        .uri()
        .query()
        .is_some_and(|query| query.contains("watch=true") || query.contains("watch=1"));
    let is_update = matches!(*request.method(), Method::PATCH | Method::PUT);
    let injected = if is_watch && faults.is_compacted.load(Ordering::SeqCst) {
        faults.compacted.lock().unwrap().insert(path).then(|| refusal(StatusCode::GONE, "Expired"))
    } else if is_update && faults.has_conflicts.load(Ordering::SeqCst) {
        let is_first = faults.updated.lock().unwrap().insert(path);
        is_first.then(|| refusal(StatusCode::CONFLICT, "Conflict"))
    } else {
        None
    };
    if let Some(refusal) = injected {
        faults.injected.fetch_add(1, Ordering::SeqCst);
        return Ok(refusal);
    }
    let (mut parts, body) = request.into_parts();
    // The client has its own host and credential.
    parts.headers.remove("host");
    parts.headers.remove("authorization");
    let Ok(body) = body.collect().await else {
        return Ok(refusal(StatusCode::BAD_REQUEST, "BadRequest"));
    };
    let body = Body::from(body.to_bytes().to_vec());
    let forwarded = client.send(Request::from_parts(parts, body)).await;
    Ok(forwarded.unwrap_or_else(|_| refusal(StatusCode::BAD_GATEWAY, "InternalError")))
}
