//! The HTTP server: routes, who may call, readiness and metrics.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_LENGTH;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use drumline_web::{Guard, Keys, PlainTextRefused};
use drumline_wire::auth::Token;
use drumline_wire::line::{Credential, endpoint};
use drumline_wire::v1::services_client::ServicesClient;
use drumline_wire::{now_ms, v1};
use futures::StreamExt;
use prometheus::Registry;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::error::ApiError;
use crate::meter::Meter;
use crate::routes::{Control, Route, Routes};
use crate::{chat, completions};

/// The largest request body, in bytes.
const BODY_MAX: usize = 4 << 20;
/// Bodies up to this size are read to their end before they are refused, in bytes.
const DRAIN_MAX: usize = 64 << 20;
/// How long that may take.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);
/// How long a rank may take to tell its health.
const HEALTH_DEADLINE: Duration = Duration::from_secs(2);

/// Finds the control plane, again at every try.
pub type FindControl = Arc<dyn Fn() -> Result<String, String> + Send + Sync>;

/// What a gateway needs to know.
#[derive(Clone)]
pub struct Options {
    /// Where to listen. Only loopback without TLS, but in a pod.
    pub listen: SocketAddr,
    /// Further `HOST` or `HOST:PORT` under which clients may call.
    pub allow_hosts: Vec<String>,
    /// Returns the control plane's `http://HOST:PORT`, or the operator's `https://HOST:PORT`.
    pub control: FindControl,
    /// The certificate to trust there, in PEM; none on loopback.
    pub control_ca: Option<String>,
    /// What is shown there.
    pub credential: Credential,
    /// Keys that clients may use.
    pub keys: Vec<Token>,
    /// `Some` in a pod, where something before it ends TLS and any name may lead here: every address
    /// may be listened on, and readers of the metrics show one of these tokens.
    pub in_pod: Option<Vec<Token>>,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options").field("listen", &self.listen).finish_non_exhaustive()
    }
}

/// Why a gateway cannot start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
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
    /// A metric is registered twice.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
}

/// What every handler shares.
#[derive(Debug, Clone)]
pub struct Gateway {
    /// Where models are.
    pub routes: Routes,
    /// What is counted.
    pub meter: Meter,
    keys: Keys,
    counter: Arc<AtomicU64>,
}

impl Gateway {
    /// Returns a new id with this prefix.
    #[must_use]
    pub fn id(&self, prefix: &str) -> String {
        let count = self.counter.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}-{:x}{count:06x}", now_ms())
    }

    /// Returns seconds since the Unix epoch.
    #[must_use]
    pub fn seconds(&self) -> u64 {
        now_ms() / 1000
    }

    /// Asks a model's leader ranks how they are, until one is well.
    ///
    /// # Errors
    /// When the model is not served, not ready, or silent.
    pub async fn health(&self, model: &str) -> Result<v1::HealthResponse, ApiError> {
        let routes = self.routes.of(model);
        let routes = routes.ok_or_else(|| ApiError::no_such_model(model, &self.routes.names()))?;
        let mut last = not_ready(model);
        for route in routes.iter().filter(|route| route.client.is_some()) {
            match route_health(route).await {
                Ok(health) => return Ok(health),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

fn not_ready(model: &str) -> ApiError {
    ApiError::unavailable(format!("the model {model:?} is not ready yet"))
}

async fn route_health(route: &Route) -> Result<v1::HealthResponse, ApiError> {
    let name = &route.view.served_name;
    let Some(mut client) = route.client.clone() else { return Err(not_ready(name)) };
    match tokio::time::timeout(HEALTH_DEADLINE, client.health(v1::HealthRequest {})).await {
        Ok(Ok(health)) => Ok(health.into_inner()),
        Ok(Err(status)) => Err(ApiError::from_rank(&status)),
        Err(_) => Err(ApiError::unavailable(format!("the model {name:?} does not answer"))),
    }
}

/// Runs a gateway until `stop`. `ready` takes the address once it listens.
///
/// # Errors
/// [`GatewayError`] when it cannot start.
pub async fn run(
    options: Options,
    ready: tokio::sync::oneshot::Sender<SocketAddr>,
    stop: CancellationToken,
) -> Result<(), GatewayError> {
    if options.in_pod.is_none() {
        drumline_web::plain_text_allowed(options.listen)?;
    }
    let failed = |source| GatewayError::Listen { address: options.listen, source };
    let listener = TcpListener::bind(options.listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let registry = Registry::new();
    let gateway = Gateway {
        routes: Routes::default(),
        meter: Meter::register(&registry)?,
        keys: Keys::new(options.keys.clone()),
        counter: Arc::default(),
    };
    let following = tokio::spawn(gateway.routes.clone().follow(
        control_client(&options),
        format!("http://{address}"),
        gateway.meter.clone(),
        stop.child_token(),
    ));
    let (metric_keys, guard) = match options.in_pod {
        Some(keys) => (Some(Keys::new(keys)), None),
        None => {
            let keys = Some(gateway.keys.clone()).filter(|_| !address.ip().is_loopback());
            (keys, Some(Guard::new(address, &options.allow_hosts)))
        }
    };
    let metrics = drumline_telemetry::http::router(registry, metric_keys, None);
    let app = router(gateway, metrics, guard);
    let _ = ready.send(address);
    let served = axum::serve(listener, app).with_graceful_shutdown(stop.clone().cancelled_owned());
    tokio::select! {
        outcome = served.into_future() => {
            if let Err(error) = outcome {
                tracing::error!(%error, "the gateway's listener ended");
            }
        }
        // Streams that are under way get a moment to end.
        () = async { stop.cancelled().await; tokio::time::sleep(Duration::from_secs(5)).await } => {}
    }
    following.abort();
    Ok(())
}

fn control_client(options: &Options) -> impl Fn() -> Result<Control, String> + use<> {
    let find = options.control.clone();
    let (credential, ca) = (options.credential.clone(), options.control_ca.clone());
    move || {
        let url = find()?;
        let channel = endpoint(&url, ca.as_deref())
            .map_err(|error| format!("control address {url:?}: {error}"))?
            .connect_lazy();
        let client = ServicesClient::with_interceptor(channel, credential.clone());
        Ok(client.max_decoding_message_size(drumline_wire::MESSAGE_MAX_BYTES))
    }
}

fn router(gateway: Gateway, metrics: Router, guard: Option<Guard>) -> Router {
    let api = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{model}", get(model))
        .route("/v1/completions", post(completions::create))
        .route("/v1/chat/completions", post(chat::create))
        .route_layer(middleware::from_fn(refuse_large))
        .route_layer(middleware::from_fn_with_state(gateway.clone(), require_key));
    let app = Router::new()
        .merge(api)
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .fallback(async |request: Request| {
            let message = format!("{} {} does not exist here", request.method(), request.uri());
            let mut error = ApiError::invalid("", message);
            error.status = StatusCode::NOT_FOUND;
            error
        })
        .with_state(gateway)
        .merge(metrics)
        .layer(DefaultBodyLimit::max(BODY_MAX));
    match guard {
        Some(guard) => app.layer(middleware::from_fn_with_state(guard, drumline_web::guard)),
        None => app,
    }
}

/// Reads what is too large to its end before it is refused: a client that still writes would see a
/// broken connection instead of the answer.
async fn refuse_large(request: Request, next: Next) -> Response {
    let length = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let length = length.and_then(|text| text.parse::<usize>().ok()).unwrap_or(0);
    if length <= BODY_MAX {
        return next.run(request).await;
    }
    if length <= DRAIN_MAX {
        let mut body = request.into_body().into_data_stream();
        let drained = async { while let Some(Ok(_)) = body.next().await {} };
        let _ = tokio::time::timeout(DRAIN_DEADLINE, drained).await;
    }
    let message = format!("the body has {length} bytes; at most {BODY_MAX} are taken");
    let mut error = ApiError::invalid("", message);
    error.status = StatusCode::PAYLOAD_TOO_LARGE;
    error.into_response()
}

async fn require_key(State(gateway): State<Gateway>, request: Request, next: Next) -> Response {
    if gateway.keys.admit(request.headers(), None) {
        next.run(request).await
    } else {
        ApiError::unauthenticated().into_response()
    }
}

fn model_json(name: &str, replicas: &[Route]) -> Value {
    let context = replicas.iter().map(|route| route.view.max_context).min().unwrap_or(0);
    json!({
        "id": name, "object": "model", "created": 0, "owned_by": "drumline",
        "max_model_len": context,
        "ready": replicas.iter().any(|route| route.client.is_some()),
        "replicas": replicas.len(),
        "replicas_ready": replicas.iter().filter(|route| route.client.is_some()).count(),
    })
}

async fn models(State(gateway): State<Gateway>) -> Json<Value> {
    let all = gateway.routes.all();
    let data: Vec<Value> = all.iter().map(|(name, replicas)| model_json(name, replicas)).collect();
    Json(json!({ "object": "list", "data": data }))
}

async fn model(
    State(gateway): State<Gateway>,
    axum::extract::Path(name): axum::extract::Path<String>,
) -> Result<Json<Value>, ApiError> {
    let replicas = gateway.routes.of(&name);
    replicas
        .map(|replicas| Json(model_json(&name, &replicas)))
        .ok_or_else(|| ApiError::no_such_model(&name, &gateway.routes.names()))
}

/// Ready means: there is a model, and of every model the ranks of a replica answered a step just
/// now.
async fn readyz(State(gateway): State<Gateway>) -> Response {
    let all = gateway.routes.all();
    let mut ready = !all.is_empty();
    let mut list = Vec::new();
    for (name, replicas) in &all {
        let answers = futures::future::join_all(replicas.iter().map(route_health)).await;
        let well = |answer: &Result<v1::HealthResponse, ApiError>| {
            answer.as_ref().is_ok_and(|health| health.ready)
        };
        let count = answers.iter().filter(|answer| well(answer)).count();
        let why = match answers.into_iter().find(|answer| !well(answer)) {
            Some(Err(error)) => error.message,
            Some(Ok(_)) => "its ranks did not answer a step just now".to_owned(),
            None => String::new(),
        };
        ready &= count > 0;
        list.push(json!({
            "model": name, "ready": count > 0, "reason": why,
            "replicas": replicas.len(), "replicas_ready": count,
        }));
    }
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({ "ready": ready, "models": list }))).into_response()
}
