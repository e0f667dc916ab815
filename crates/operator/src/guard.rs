//! Keeps other schedulers from binding pods to what is promised to gangs: the API server asks here,
//! by a validating webhook, before it stores a binding.
//!
//! Only the operator that leads answers, by its ledger. It makes the webhook's certificate itself, at
//! each start, and puts it into the configuration that the chart has made. A binding that asks for
//! nothing, sent now and then, shows whether bindings come by here; until one does, gangs wait: for a
//! moment, or for good where nothing may pass unjudged.
//! Decision 9 says why it is done like this.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use k8s_openapi::api::core::v1::{Binding, Pod};
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::core::Status;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;
use tokio_util::sync::CancellationToken;

use crate::deploy;
use crate::lease::Leadership;
use crate::ledger::{Ledger, PodKey, Verdict};

/// The webhook configuration, made by the chart and filled in by the operator that leads.
pub const NAME: &str = "drumline-bindings";
/// The port of the operator's service that leads to it.
pub const PORT: u16 = 9443;
/// The pod, which is never there, that bindings are sent for to see whether they come by.
const PROBE: &str = "drumline-guard-probe";
/// Its namespace: one that is always there and always asked about.
const PROBE_SPACE: &str = "default";
/// Between two probes while the guard is in effect.
const PROBE_EVERY: Duration = Duration::from_secs(5);
/// And while it is not.
const PROBE_AGAIN: Duration = Duration::from_millis(250);
/// How long a probe is believed: two may be lost.
const BELIEVED: Duration = Duration::from_secs(18);
/// Longest time that a probe may take.
const PROBE_DEADLINE: Duration = Duration::from_secs(4);
/// How long the API server waits for an answer. Unit: seconds.
const ANSWER_SECONDS: u32 = 10;
/// How long a pod may be unknown here that another scheduler knows already.
const UNKNOWN: Duration = Duration::from_secs(2);
/// Between two looks at whether it is known.
const LOOK: Duration = Duration::from_millis(10);
/// Connections at a time: an API server keeps some dozens.
const CONNECTIONS_MAX: usize = 512;
/// The longest review. A binding has some hundred bytes, and its frame as many.
const REVIEW_MAX: usize = 256 << 10;
/// Longest time for the handshake of TLS.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// What the API server does with a binding while nobody answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenAway {
    /// It stores it: a cluster schedules on without its operator.
    #[default]
    Ignore,
    /// It refuses it, outside of the operator's namespace and `kube-system`.
    Fail,
}

impl std::str::FromStr for WhenAway {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "ignore" => Ok(Self::Ignore),
            "fail" => Ok(Self::Fail),
            other => Err(format!("{other}: ignore or fail is wanted")),
        }
    }
}

/// Where the guard is, and how strict.
#[derive(Debug, Clone)]
pub struct GuardRules {
    /// Where it listens.
    pub listen: SocketAddr,
    /// `https://HOST:PORT` at which the API server reaches it; `None`: the operator's service.
    pub url: Option<String>,
    /// What holds while no operator answers.
    pub when_away: WhenAway,
}

/// Why there is no guard.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's words.
        source: std::io::Error,
    },
    /// No certificate could be made.
    #[error("no certificate could be made: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The certificate is refused.
    #[error("the guard's certificate cannot be used: {0}")]
    Tls(#[from] tokio_rustls::rustls::Error),
    /// The system has no random numbers.
    #[error("no random numbers: {0}")]
    Random(#[from] getrandom::Error),
}

/// Says whether bindings come by. Cloning shares it.
#[derive(Debug, Clone)]
pub(crate) struct InEffect {
    /// Whether nobody's binding is stored unjudged, so that gangs have to wait for it.
    is_required: bool,
    start: Instant,
    /// Milliseconds after `start` until which it is believed.
    until_ms: Arc<AtomicU64>,
}

impl InEffect {
    fn new(when_away: WhenAway) -> Self {
        let is_required = when_away == WhenAway::Fail;
        Self { is_required, start: Instant::now(), until_ms: Arc::default() }
    }

    /// Returns whether gangs wait until bindings come by, however long that is.
    pub(crate) fn is_required(&self) -> bool {
        self.is_required
    }

    /// Returns whether bindings come by.
    pub(crate) fn holds(&self) -> bool {
        self.start.elapsed().as_millis() < u128::from(self.until_ms.load(Ordering::Acquire))
    }

    fn believe(&self, since: Instant) {
        let until = since.saturating_duration_since(self.start) + BELIEVED;
        let ms = u64::try_from(until.as_millis()).unwrap_or(u64::MAX);
        self.until_ms.store(ms, Ordering::Release);
    }

    fn end(&self) {
        self.until_ms.store(0, Ordering::Release);
    }
}

/// What answers reviews.
struct Desk {
    ledger: Ledger,
    leadership: Leadership,
    /// Whether every watch has shown all there is.
    has_listed: Arc<AtomicBool>,
    /// The path that only the API server knows.
    path: String,
    /// The number of the newest probe that came by.
    probe_seen: AtomicU64,
    refused: AtomicU64,
}

/// Starts the guard, which ends with `stop`.
///
/// # Errors
/// [`GuardError`].
#[expect(clippy::too_many_arguments, reason = "its parts, put together once")]
pub(crate) async fn start(
    rules: GuardRules,
    client: Client,
    namespace: String,
    ledger: Ledger,
    leadership: Leadership,
    has_listed: Arc<AtomicBool>,
    changed: Arc<Notify>,
    stop: CancellationToken,
) -> Result<InEffect, GuardError> {
    let failed = |source| GuardError::Listen { address: rules.listen, source };
    let listener = TcpListener::bind(rules.listen).await.map_err(failed)?;
    let made = rcgen::generate_simple_self_signed(names(&rules, &namespace))?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let tls = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())?;
    // Anybody in the cluster may call the address: who does not know the path is told nothing.
    let mut secret = [0; 16];
    getrandom::fill(&mut secret)?;
    let path: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    let desk = Arc::new(Desk {
        ledger,
        leadership: leadership.clone(),
        has_listed,
        path: format!("/bindings/{path}"),
        probe_seen: AtomicU64::new(0),
        refused: AtomicU64::new(0),
    });
    tokio::spawn(accept(listener, TlsAcceptor::from(Arc::new(tls)), desk.clone(), stop.clone()));
    let in_effect = InEffect::new(rules.when_away);
    let keeper = Keeper {
        rules,
        client,
        namespace,
        certificate: made.cert.pem(),
        desk,
        in_effect: in_effect.clone(),
        changed,
        number: 0,
    };
    tokio::spawn(stop.run_until_cancelled_owned(keeper.run()));
    Ok(in_effect)
}

/// Returns the names under which the API server calls.
fn names(rules: &GuardRules, namespace: &str) -> Vec<String> {
    let service = format!("{}.{namespace}.svc", deploy::NAME);
    let url = rules.url.as_deref().and_then(|url| url.parse::<http::Uri>().ok());
    let host = url.and_then(|url| Some(url.host()?.trim_matches(['[', ']']).to_owned()));
    [Some(service), host].into_iter().flatten().collect()
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, desk: Arc<Desk>, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // The semaphore is never closed.
        let place = places.clone().acquire_owned().await;
        let stream = match stop.run_until_cancelled(listener.accept()).await {
            None => return,
            Some(Ok((stream, _))) => stream,
            Some(Err(error)) => {
                tracing::warn!(%error, "a connection to the guard could not be taken");
                tokio::time::sleep(LOOK).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let (tls, desk, stop) = (tls.clone(), desk.clone(), stop.clone());
        tokio::spawn(async move {
            let _place = place;
            let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE, tls.accept(stream)).await else {
                return;
            };
            let service = service_fn(move |request| {
                let desk = desk.clone();
                async move { Ok::<_, Infallible>(desk.answer(request).await) }
            });
            let mut http = hyper::server::conn::http1::Builder::new();
            let served =
                http.timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service);
            // A caller that goes away is no news.
            let _ = stop.run_until_cancelled(served).await;
        });
    }
}

/// What is read of the API server's question.
#[derive(Debug, Deserialize)]
struct Review {
    request: Asked,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Asked {
    uid: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    dry_run: bool,
    object: Binding,
}

fn plain(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response
}

impl Desk {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if request.method() != Method::POST || !is_same(request.uri().path(), &self.path) {
            return plain(StatusCode::NOT_FOUND, "nothing is here");
        }
        let body = Limited::new(request.into_body(), REVIEW_MAX).collect().await;
        let Ok(body) = body else { return plain(StatusCode::BAD_REQUEST, "not a review") };
        let Ok(Review { request }) = serde_json::from_slice(&body.to_bytes()) else {
            return plain(StatusCode::BAD_REQUEST, "not a review of a binding");
        };
        let verdict = self.judge(&request).await;
        if !(self.leadership.holds() && self.has_listed.load(Ordering::Acquire)) {
            // The webhook's failure policy says what follows.
            return plain(StatusCode::SERVICE_UNAVAILABLE, "this operator does not lead");
        }
        let answer = match verdict {
            Verdict::Allowed => json!({ "uid": request.uid, "allowed": true }),
            Verdict::Refused(why) => refused(&request.uid, &why),
            Verdict::Unknown => refused(&request.uid, "the pod is not known yet; try again"),
        };
        if answer["allowed"] == false {
            let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
            let pod = request.object.metadata.name.as_deref().unwrap_or_default();
            let why = answer["status"]["message"].as_str().unwrap_or_default();
            tracing::info!(namespace = %request.namespace, %pod, %why, refused, "a binding is refused");
        }
        let review = json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": answer,
        });
        let mut response = Response::new(Full::from(review.to_string()));
        let json = http::HeaderValue::from_static("application/json");
        response.headers_mut().insert(http::header::CONTENT_TYPE, json);
        response
    }

    async fn judge(&self, asked: &Asked) -> Verdict {
        let Binding { metadata, target } = &asked.object;
        let name = metadata.name.clone().unwrap_or_default();
        let node = target.name.as_deref().unwrap_or_default();
        if name == PROBE {
            if let Some(number) = node.strip_prefix("probe-").and_then(|text| text.parse().ok()) {
                self.probe_seen.fetch_max(number, Ordering::AcqRel);
            }
            return Verdict::Allowed;
        }
        let key: PodKey = (asked.namespace.clone(), name);
        let uid = metadata.uid.as_deref().filter(|uid| !uid.is_empty());
        let deadline = Instant::now() + UNKNOWN;
        loop {
            let now = Instant::now();
            let verdict = self.ledger.open().review(&key, uid, node, asked.dry_run, now);
            if verdict != Verdict::Unknown || now >= deadline {
                return verdict;
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn refused(uid: &str, why: &str) -> Value {
    json!({
        "uid": uid, "allowed": false,
        "status": { "code": 409, "reason": "Conflict", "message": format!("Drumline: {why}") },
    })
}

/// Compares without telling by its time how much is right.
fn is_same(shown: &str, wanted: &str) -> bool {
    let different = shown.bytes().zip(wanted.bytes()).fold(0, |all, (a, b)| all | (a ^ b));
    shown.len() == wanted.len() && different == 0
}

/// Keeps the webhook's configuration as it must be while this process leads, and looks whether it
/// works.
struct Keeper {
    rules: GuardRules,
    client: Client,
    namespace: String,
    certificate: String,
    desk: Arc<Desk>,
    in_effect: InEffect,
    changed: Arc<Notify>,
    number: u64,
}

impl Keeper {
    async fn run(mut self) {
        let mut user = None;
        let mut is_told = false;
        let mut fails = 0_u32;
        loop {
            if !self.desk.leadership.holds() {
                self.in_effect.end();
                is_told = false;
                tokio::time::sleep(PROBE_AGAIN).await;
                continue;
            }
            let asked = Instant::now();
            let done =
                tokio::time::timeout(PROBE_DEADLINE, self.look(&mut user, &mut is_told)).await;
            let why = match done {
                Ok(Ok(())) => {
                    let was_in_effect = self.in_effect.holds();
                    self.in_effect.believe(asked);
                    fails = 0;
                    if !was_in_effect {
                        tracing::info!("bindings of other schedulers are held against the ledger");
                        self.changed.notify_one();
                    }
                    tokio::time::sleep(PROBE_EVERY).await;
                    continue;
                }
                Ok(Err(why)) => why,
                Err(_) => "the API server does not answer".to_owned(),
            };
            fails += 1;
            // The configuration takes a moment to be heard of.
            if fails % 20 == 8 {
                let is_held = !self.in_effect.holds() && self.in_effect.is_required();
                tracing::warn!(%why, gangs_wait = is_held, "bindings do not come by the guard");
            }
            // Somebody may have changed it.
            is_told &= !fails.is_multiple_of(8);
            tokio::time::sleep(PROBE_AGAIN).await;
        }
    }

    /// Fills in the configuration when that is due, and sends a probe.
    async fn look(&mut self, user: &mut Option<String>, is_told: &mut bool) -> Result<(), String> {
        let text = |error: kube::Error| error.to_string();
        let user = match user {
            Some(user) => user,
            None => {
                let reviews: Api<SelfSubjectReview> = Api::all(self.client.clone());
                let (params, empty) = (PostParams::default(), SelfSubjectReview::default());
                let review = reviews.create(&params, &empty).await.map_err(text)?;
                let info = review.status.and_then(|status| status.user_info);
                user.insert(info.and_then(|info| info.username).unwrap_or_default())
            }
        };
        if !*is_told {
            let all: Api<ValidatingWebhookConfiguration> = Api::all(self.client.clone());
            let webhooks =
                webhooks(&self.rules, &self.namespace, user, &self.desk.path, &self.certificate);
            let patch = Patch::Merge(json!({ "webhooks": webhooks }));
            all.patch(NAME, &PatchParams::default(), &patch).await.map_err(text)?;
            *is_told = true;
        }
        self.number += 1;
        let mut binding = Binding::default();
        binding.metadata.name = Some(PROBE.to_owned());
        binding.target.kind = Some("Node".to_owned());
        binding.target.name = Some(format!("probe-{}", self.number));
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), PROBE_SPACE);
        let params = PostParams { dry_run: true, ..PostParams::default() };
        let sent: kube::Result<Status> =
            pods.create_subresource("binding", PROBE, &params, &binding).await;
        match sent {
            _ if self.desk.probe_seen.load(Ordering::Acquire) >= self.number => Ok(()),
            Err(error) if !matches!(&error, kube::Error::Api(status) if status.code == 404) => {
                Err(error.to_string())
            }
            _ => Err(format!("a probe did not come by; is {NAME} there, and does it lead here?")),
        }
    }
}

/// Returns the webhooks of the configuration.
fn webhooks(
    rules: &GuardRules,
    namespace: &str,
    user: &str,
    path: &str,
    certificate: &str,
) -> Value {
    let mut client = json!({ "caBundle": ByteString(certificate.as_bytes().to_vec()) });
    match &rules.url {
        Some(url) => client["url"] = json!(format!("{}{path}", url.trim_end_matches('/'))),
        None => {
            client["service"] = json!({
                "namespace": namespace, "name": deploy::NAME, "port": PORT, "path": path,
            });
        }
    }
    let (policy, spared) = match rules.when_away {
        WhenAway::Ignore => ("Ignore", json!({})),
        // What the operator itself needs to run must not wait for it.
        WhenAway::Fail => (
            "Fail",
            json!({ "matchExpressions": [{
                "key": "kubernetes.io/metadata.name", "operator": "NotIn",
                "values": ["kube-system", namespace],
            }]}),
        ),
    };
    json!([{
        "name": "bindings.drumline.dev",
        "admissionReviewVersions": ["v1"],
        "clientConfig": client,
        "failurePolicy": policy,
        "matchPolicy": "Equivalent",
        // A binding that is let through takes its place in the ledger.
        "sideEffects": "NoneOnDryRun",
        "timeoutSeconds": ANSWER_SECONDS,
        "namespaceSelector": spared,
        "rules": [{
            "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"],
            "resources": ["pods/binding", "bindings"], "scope": "Namespaced",
        }],
        // Our own are in the ledger before they are sent.
        "matchConditions": [{
            "name": "is-of-others",
            "expression": format!(
                "request.userInfo.username != {} || request.name == '{PROBE}'", json!(user)),
        }],
    }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_webhook_is_named_as_the_api_server_calls_it() {
        let mut rules = GuardRules {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            url: None,
            when_away: WhenAway::Fail,
        };
        assert_eq!(names(&rules, "d"), ["drumline-operator.d.svc"]);
        let hook = webhooks(&rules, "d", "me", "/bindings/x", "CERT")[0].clone();
        assert_eq!(hook["clientConfig"]["service"]["path"], "/bindings/x");
        assert_eq!(hook["clientConfig"]["caBundle"], "Q0VSVA==");
        assert_eq!(hook["namespaceSelector"]["matchExpressions"][0]["values"][1], "d");
        rules.url = Some("https://[::1]:9443/".to_owned());
        rules.when_away = WhenAway::Ignore;
        assert_eq!(names(&rules, "d")[1], "::1");
        let hook = webhooks(&rules, "d", "me", "/bindings/x", "CERT")[0].clone();
        assert_eq!(hook["clientConfig"]["url"], "https://[::1]:9443/bindings/x");
        assert_eq!(hook["failurePolicy"], "Ignore");
    }

    #[test]
    fn a_path_that_is_not_the_whole_path_is_another() {
        assert!(is_same("/bindings/a", "/bindings/a"));
        for other in ["", "/bindings/", "/bindings/b", "/bindings/aa"] {
            assert!(!is_same(other, "/bindings/a"), "{other}");
        }
    }
}
