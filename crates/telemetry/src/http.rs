//! The exporter: `/metrics` over HTTP, guarded like every listener.
//!
//! On loopback it is readable without a token, so that a Prometheus beside it needs no secret: the
//! page holds names and numbers only, and the Host check keeps web pages of other sites out. A
//! listener on any other address is given keys, and then asks for one of them.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_TYPE, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use drumline_web::{Guard, Keys};
use prometheus::{Encoder, Registry, TextEncoder};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Called before each reading, to bring gauges up to date.
pub type Refresh = Arc<dyn Fn() + Send + Sync>;

#[derive(Clone)]
struct Exporter {
    registry: Registry,
    keys: Option<Keys>,
    refresh: Option<Refresh>,
}

/// Returns a router that serves `/metrics`, without the Host check: for a server that has its own.
///
/// With `keys`, a reader needs one of them. `refresh` runs before each reading.
pub fn router(registry: Registry, keys: Option<Keys>, refresh: Option<Refresh>) -> Router {
    Router::new().route("/metrics", get(metrics)).with_state(Exporter { registry, keys, refresh })
}

/// Serves `/metrics` on a loopback `listener` until `stop`.
///
/// # Errors
/// When the listener's address cannot be read, or is not loopback and there are no `keys`.
pub async fn serve(
    listener: TcpListener,
    registry: Registry,
    keys: Option<Keys>,
    refresh: Option<Refresh>,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let address = listener.local_addr()?;
    if keys.is_none() && !address.ip().is_loopback() {
        let words = format!("metrics on {address} need a token: it is not a loopback address");
        return Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, words));
    }
    let guard = Guard::new(address, &[]);
    let app = router(registry, keys, refresh)
        .layer(middleware::from_fn_with_state(guard, drumline_web::guard));
    axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned()).await
}

/// Says whether a process can do its work now.
pub type IsReady = Arc<dyn Fn() -> bool + Send + Sync>;

/// Serves `/healthz` and `/readyz` to anyone, for the probes of whoever runs this process, and
/// `/metrics` to holders of one of `keys`, on any address until `stop`. Without keys there are no
/// metrics.
///
/// # Errors
/// The system's, when the listener fails.
pub async fn serve_probed(
    listener: TcpListener,
    registry: Registry,
    keys: Option<Keys>,
    refresh: Option<Refresh>,
    is_ready: IsReady,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let ready = move || {
        let answer = match is_ready() {
            true => (StatusCode::OK, "ready\n"),
            false => (StatusCode::SERVICE_UNAVAILABLE, "not ready yet\n"),
        };
        std::future::ready(answer)
    };
    let mut app =
        Router::new().route("/healthz", get(|| async { "ok\n" })).route("/readyz", get(ready));
    if keys.is_some() {
        app = app.merge(router(registry, keys, refresh));
    }
    axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned()).await
}

async fn metrics(State(exporter): State<Exporter>, request: Request) -> Response {
    if let Some(keys) = &exporter.keys
        && !keys.admit(request.headers(), None)
    {
        let mut refused = (StatusCode::UNAUTHORIZED, "a bearer token is needed\n").into_response();
        refused.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        return refused;
    }
    if let Some(refresh) = &exporter.refresh {
        refresh();
    }
    let encoder = TextEncoder::new();
    let mut page = Vec::new();
    match encoder.encode(&exporter.registry.gather(), &mut page) {
        Ok(()) => {
            let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            ([(CONTENT_TYPE, kind)], page).into_response()
        }
        Err(error) => {
            tracing::error!(%error, "metrics cannot be encoded");
            (StatusCode::INTERNAL_SERVER_ERROR, "metrics cannot be encoded\n").into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use drumline_wire::auth::Token;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn fetch(keys: Option<Keys>, headers: &str) -> String {
        let registry = Registry::new();
        let gauge = crate::table::LEADER_TERM.int_gauge(&registry).unwrap();
        let refresh: Refresh = Arc::new(move || gauge.with_label_values::<&str>(&[]).set(7));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let _end = stop.clone().drop_guard();
        tokio::spawn(serve(listener, registry, keys, Some(refresh), stop.clone()));
        ask(address, "/metrics", headers).await
    }

    async fn ask(address: std::net::SocketAddr, path: &str, headers: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let headers = headers.replace("HERE", &address.to_string());
        let request = format!("GET {path} HTTP/1.1\r\n{headers}Connection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn the_page_is_fresh_and_only_for_our_hosts() {
        let page = fetch(None, "Host: HERE\r\n").await;
        assert!(page.contains("\ndrumline_leader_term 7\n"), "{page}");
        assert!(fetch(None, "Host: evil.example\r\n").await.starts_with("HTTP/1.1 403"));
    }

    #[tokio::test]
    async fn with_keys_a_reader_needs_one() {
        let keys = || Some(Keys::new(vec![Token::new("0123456789abcdef").unwrap()]));
        assert!(fetch(keys(), "Host: HERE\r\n").await.starts_with("HTTP/1.1 401"));
        let bearer = "Host: HERE\r\nAuthorization: Bearer 0123456789abcdef\r\n";
        assert!(fetch(keys(), bearer).await.starts_with("HTTP/1.1 200"));
    }

    #[tokio::test]
    async fn probes_need_no_key_and_metrics_are_there_only_with_one() {
        let keys = Keys::new(vec![Token::new("0123456789abcdef").unwrap()]);
        for (keys, path, headers, status) in [
            (None, "/healthz", "", "200"),
            (None, "/readyz", "", "503"),
            (None, "/metrics", "", "404"),
            (Some(keys.clone()), "/metrics", "", "401"),
            (Some(keys), "/metrics", "Authorization: Bearer 0123456789abcdef\r\n", "200"),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let stop = CancellationToken::new();
            let _end = stop.clone().drop_guard();
            let not_ready: IsReady = Arc::new(|| false);
            let stop = stop.clone();
            tokio::spawn(serve_probed(listener, Registry::new(), keys, None, not_ready, stop));
            let answer = ask(address, path, &format!("Host: pod\r\n{headers}")).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{path}: {answer}");
        }
    }
}
