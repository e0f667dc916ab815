//! The HTTP server: pages, their live streams, and the door.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Form, Query, Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, SET_COOKIE};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{self, Next};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use drumline_web::{Guard, Keys, PlainTextRefused};
use drumline_wire::auth::Token;
use drumline_wire::now_ms;
use maud::Markup;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::client::{Client, FindControl};
use crate::layout;
use crate::{events, fleet, job, jobs, queues, services};

/// The cookie that carries the key.
const COOKIE: &str = "drumline_key";
/// How often a live page is rendered anew.
const LIVE_INTERVAL: Duration = Duration::from_millis(1000);
/// Pages that are live at one time; each costs a few calls a second.
const LIVE_MAX: usize = 64;
/// Ranks whose logs one page shows.
const LOGS_MAX: usize = 8;

/// What a dashboard needs to know.
#[derive(Clone)]
pub struct Options {
    /// Where to listen. Only loopback without TLS.
    pub listen: SocketAddr,
    /// Further `HOST` or `HOST:PORT` under which readers may call.
    pub allow_hosts: Vec<String>,
    /// Returns the control plane's `http://HOST:PORT`.
    pub control: FindControl,
    /// The cluster's token, for the control plane.
    pub cluster_token: Token,
    /// Keys that open the pages: to read, nothing more.
    pub keys: Vec<Token>,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options").field("listen", &self.listen).finish_non_exhaustive()
    }
}

/// Why a dashboard cannot start.
#[derive(Debug, thiserror::Error)]
pub enum DashboardError {
    /// The address may not be listened on.
    #[error(transparent)]
    PlainText(#[from] PlainTextRefused),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's words.
        source: std::io::Error,
    },
}

#[derive(Debug, Clone)]
struct Dashboard {
    client: Client,
    keys: Keys,
    live: Arc<AtomicUsize>,
    stop: CancellationToken,
}

/// Runs a dashboard until `stop`. `ready` takes the address once it listens.
///
/// # Errors
/// [`DashboardError`] when it cannot start.
pub async fn run(
    options: Options,
    ready: tokio::sync::oneshot::Sender<SocketAddr>,
    stop: CancellationToken,
) -> Result<(), DashboardError> {
    drumline_web::plain_text_allowed(options.listen)?;
    let failed = |source| DashboardError::Listen { address: options.listen, source };
    let listener = TcpListener::bind(options.listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let dashboard = Dashboard {
        client: Client::new(options.control, options.cluster_token),
        keys: Keys::new(options.keys),
        live: Arc::default(),
        stop: stop.clone(),
    };
    let app = router(dashboard, Guard::new(address, &options.allow_hosts));
    let _ = ready.send(address);
    if let Err(error) =
        axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned()).await
    {
        tracing::error!(%error, "the dashboard's listener ended");
    }
    Ok(())
}

fn router(dashboard: Dashboard, guard: Guard) -> Router {
    let pages = Router::new()
        .route("/", get(page))
        .route("/jobs", get(page))
        .route("/jobs/{id}", get(page))
        .route("/queues", get(page))
        .route("/services", get(page))
        .route("/events", get(page))
        .route("/live", get(live))
        .route_layer(middleware::from_fn_with_state(dashboard.clone(), require_key));
    Router::new()
        .merge(pages)
        .route("/login", post(login).get(async || layout::door(false)))
        .route(
            "/assets/style.css",
            get(async || asset("text/css", include_str!("../assets/style.css"))),
        )
        .route(
            "/assets/live.js",
            get(async || asset("text/javascript", include_str!("../assets/live.js"))),
        )
        .route("/healthz", get(async || "ok\n"))
        .fallback(async || {
            let main = layout::trouble("Not found", "There is no such page.");
            (StatusCode::NOT_FOUND, layout::page("Not found", "", None, &main))
        })
        .layer(DefaultBodyLimit::max(16 << 10))
        .layer(middleware::from_fn_with_state(guard, drumline_web::guard))
        .with_state(dashboard)
}

fn asset(kind: &'static str, text: &'static str) -> Response {
    ([(CONTENT_TYPE, kind), (CACHE_CONTROL, "max-age=300")], text).into_response()
}

#[derive(Debug, Deserialize)]
struct Key {
    key: String,
}

async fn login(State(dashboard): State<Dashboard>, Form(form): Form<Key>) -> Response {
    if valid(&dashboard, &form.key) {
        ([(SET_COOKIE, cookie(&form.key))], Redirect::to("/")).into_response()
    } else {
        // Guessing over the network is slow enough at one try in a third of a second.
        tokio::time::sleep(Duration::from_millis(300)).await;
        (StatusCode::UNAUTHORIZED, layout::door(true)).into_response()
    }
}

fn valid(dashboard: &Dashboard, key: &str) -> bool {
    let mut headers = HeaderMap::new();
    let Ok(value) = format!("Bearer {}", key.trim()).parse() else { return false };
    headers.insert(axum::http::header::AUTHORIZATION, value);
    dashboard.keys.admit(&headers, None)
}

fn cookie(key: &str) -> String {
    format!("{COOKIE}={}; HttpOnly; SameSite=Strict; Path=/; Max-Age=604800", key.trim())
}

/// Opens with the cookie, with `Authorization: Bearer`, or with `?key=` once, which sets the
/// cookie: so that the address which `drumline` prints opens by itself.
async fn require_key(State(dashboard): State<Dashboard>, request: Request, next: Next) -> Response {
    if dashboard.keys.admit(request.headers(), Some(COOKIE)) {
        return next.run(request).await;
    }
    let query = Query::<BTreeMap<String, String>>::try_from_uri(request.uri());
    let key = query.ok().and_then(|Query(mut query)| query.remove("key"));
    match key.filter(|key| valid(&dashboard, key)) {
        Some(key) => {
            let mut response = next.run(request).await;
            if let Ok(value) = cookie(&key).parse() {
                response.headers_mut().insert(SET_COOKIE, value);
            }
            response
        }
        None => (StatusCode::UNAUTHORIZED, layout::door(false)).into_response(),
    }
}

/// Renders the main part of the page at `path`, with its title.
async fn render(client: &Client, path: &str) -> Result<(String, Markup), Status> {
    match path.split('/').collect::<Vec<_>>().as_slice() {
        ["", ""] => {
            let fleet = client.fleet().await?;
            let history = client.series(&fleet::series()).await?;
            Ok(("Fleet".to_owned(), fleet::render(&fleet, &history)))
        }
        ["", "jobs"] => {
            let list = client.jobs().await?;
            Ok(("Jobs".to_owned(), jobs::render(&list, now_ms())))
        }
        ["", "jobs", id] => {
            let view = client.job(id).await?;
            let history = client.series(&job::series(id)).await?;
            let mut logs = Vec::new();
            for rank in view.ranks.iter().take(LOGS_MAX) {
                let tail = client.log_tail(id, rank.rank).await;
                logs.push((rank.rank, tail.map_err(|status| status.message().to_owned())));
            }
            Ok((view.id.clone(), job::render(&view, &history, &logs, now_ms())))
        }
        ["", "queues"] => Ok(("Queues".to_owned(), queues::render(&client.queues().await?))),
        ["", "services"] => {
            let fleet = client.fleet().await?;
            let history = client.series(&services::series(&fleet)).await?;
            Ok(("Services".to_owned(), services::render(&fleet, &history)))
        }
        ["", "events"] => {
            let list = client.events(200).await?;
            Ok(("Events".to_owned(), events::render(&list, now_ms())))
        }
        _ => Err(Status::not_found("there is no such page")),
    }
}

async fn page(State(dashboard): State<Dashboard>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    // Paths are of our own making and hold nothing that a query would need escaped.
    let stream = format!("/live?path={path}");
    match render(&dashboard.client, &path).await {
        Ok((title, main)) => {
            let html = layout::page(&title, &path, Some(&stream), &main);
            ([(CACHE_CONTROL, "no-store")], html).into_response()
        }
        Err(status) => {
            let (code, title) = match status.code() {
                Code::NotFound => (StatusCode::NOT_FOUND, "Not found"),
                Code::InvalidArgument => (StatusCode::BAD_REQUEST, "Not a job id"),
                _ => (StatusCode::BAD_GATEWAY, "The control plane cannot be reached"),
            };
            let main = layout::trouble(title, status.message());
            let live = (code == StatusCode::BAD_GATEWAY).then_some(stream.as_str());
            (code, layout::page(title, &path, live, &main)).into_response()
        }
    }
}

#[derive(Debug, Deserialize)]
struct Live {
    path: String,
}

/// Counts a live page for as long as it is open.
struct Seat(Arc<AtomicUsize>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn live(State(dashboard): State<Dashboard>, Query(query): Query<Live>) -> Response {
    let taken = dashboard.live.fetch_add(1, Ordering::SeqCst);
    let seat = Seat(dashboard.live.clone());
    if taken >= LIVE_MAX {
        let text = format!("{LIVE_MAX} pages are live; close one\n");
        return drumline_web::retry_after(
            (StatusCode::SERVICE_UNAVAILABLE, text).into_response(),
            10,
        );
    }
    let state = (dashboard, query.path, String::new(), seat);
    let stream = futures::stream::unfold(state, |(dashboard, path, last, seat)| async move {
        loop {
            tokio::select! {
                () = dashboard.stop.cancelled() => return None,
                () = tokio::time::sleep(LIVE_INTERVAL) => {}
            }
            let html = match render(&dashboard.client, &path).await {
                Ok((_, main)) => main,
                Err(status) => {
                    layout::trouble("The control plane cannot be reached", status.message())
                }
            };
            let html = html.into_string();
            // Sent only when something is new.
            if html != last {
                let event = Ok::<_, Infallible>(Event::default().data(&html));
                return Some((event, (dashboard, path, html, seat)));
            }
        }
    });
    Sse::new(stream).keep_alive(KeepAlive::default()).into_response()
}
