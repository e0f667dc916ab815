//! Which models are served where, kept up to date by the control plane; and who may still come in.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use drumline_wire::auth::{AddToken, Token};
use drumline_wire::line::Credential;
use drumline_wire::v1::inference_client::InferenceClient;
use drumline_wire::v1::services_client::ServicesClient;
use drumline_wire::{now_ms, v1};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

use crate::error::ApiError;
use crate::meter::Meter;

/// A client of a leader rank.
pub type Inference = InferenceClient<InterceptedService<Channel, AddToken>>;
/// A client of the control plane.
pub type Control = ServicesClient<InterceptedService<Channel, Credential>>;

/// One replica of a served model.
#[derive(Debug, Clone)]
pub struct Route {
    /// What the control plane says of it.
    pub view: v1::ServiceView,
    /// Its leader rank; absent while it is not ready.
    pub client: Option<Inference>,
    places: Arc<Semaphore>,
}

impl Route {
    /// Requests that are running or waiting there, as far as this gateway sent them.
    fn taken(&self) -> usize {
        places(&self.view).saturating_sub(self.places.available_permits())
    }
}

/// A request that was let in.
#[derive(Debug)]
pub struct Admitted {
    /// The replica's leader rank.
    pub client: Inference,
    /// The replica's job.
    pub job: String,
    /// Held until the request is over.
    pub place: OwnedSemaphorePermit,
}

/// The table of served models: every replica of each. Cloning shares it.
#[derive(Debug, Clone, Default)]
pub struct Routes {
    table: Arc<RwLock<BTreeMap<String, Vec<Route>>>>,
    /// One request chooses at a time: two would both see the same room.
    choosing: Arc<Mutex<()>>,
}

impl Routes {
    /// Returns the names of the served models.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// Returns every model with its replicas. None has no replica.
    #[must_use]
    pub fn all(&self) -> BTreeMap<String, Vec<Route>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the replicas of a model; none for one that is not served.
    #[must_use]
    pub fn of(&self, model: &str) -> Option<Vec<Route>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).get(model).cloned()
    }

    /// Returns how many requests of a model may be running or waiting; none for one that is not
    /// served.
    #[must_use]
    pub fn places(&self, model: &str) -> Option<usize> {
        let ready = |route: &&Route| route.client.is_some();
        let routes = self.of(model)?;
        let most = routes.iter().map(|route| places(&route.view)).max().unwrap_or(0);
        Some(routes.iter().filter(ready).map(|route| places(&route.view)).sum::<usize>().max(most))
    }

    /// Lets a request in at a replica that is none of `avoid`: the one that has most likely seen
    /// such a beginning (`prefix`, any hash of it), unless another has much less to do; then that
    /// with the least.
    ///
    /// # Errors
    /// 404 for a model that is not served, 503 while it is not ready, 429 when its queues are full.
    pub fn admit(&self, model: &str, prefix: u64, avoid: &[String]) -> Result<Admitted, ApiError> {
        let Some(routes) = self.of(model) else {
            return Err(ApiError::no_such_model(model, &self.names()));
        };
        let _turn = self.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ready: Vec<(usize, &Route, &Inference)> = routes
            .iter()
            .filter(|route| !avoid.contains(&route.view.job))
            .filter_map(|route| Some((route.taken(), route, route.client.as_ref()?)))
            .collect();
        if ready.is_empty() {
            let jobs: Vec<&str> = routes.iter().map(|route| route.view.job.as_str()).collect();
            return Err(ApiError::unavailable(format!(
                "the model {model:?} is not ready yet; `drumline describe job {}` says why",
                jobs.join(" ")
            )));
        }
        let least = ready.iter().map(|(taken, ..)| *taken).min().unwrap_or(0);
        let affinity = |route: &Route| affinity(prefix, &route.view.job);
        ready.sort_by_key(|(taken, route, _)| {
            let is_near = *taken <= least + route.view.max_batch as usize / 2;
            (!is_near, if is_near { 0 } else { *taken }, affinity(route))
        });
        for (_, route, client) in &ready {
            if let Ok(place) = route.places.clone().try_acquire_owned() {
                let job = route.view.job.clone();
                return Ok(Admitted { client: (*client).clone(), job, place });
            }
        }
        let all: usize = ready.iter().map(|(_, route, _)| places(&route.view)).sum();
        Err(ApiError::busy(format!(
            "{all} requests are running or waiting for the model {model:?}; try again later"
        )))
    }

    /// Takes the control plane's list. Routes that did not move keep their connection and places.
    fn update(&self, services: Vec<v1::ServiceView>) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let mut next: BTreeMap<String, Vec<Route>> = BTreeMap::new();
        for view in services {
            let known = table.get(&view.served_name).into_iter().flatten();
            let same = known.into_iter().find(|old| {
                old.view.job == view.job
                    && old.view.endpoint == view.endpoint
                    && old.view.secret == view.secret
                    && places(&old.view) == places(&view)
            });
            let (client, places) = match same {
                // What runs there keeps its place, also where nothing new is sent to.
                Some(old) if !view.ready => (None, old.places.clone()),
                Some(old) if old.client.is_some() => (old.client.clone(), old.places.clone()),
                Some(old) => (connect(&view), old.places.clone()),
                None => (connect(&view), Arc::new(Semaphore::new(places(&view)))),
            };
            let name = view.served_name.clone();
            next.entry(name).or_default().push(Route { view, client, places });
        }
        *table = next;
    }

    /// Keeps the table up to date until `stop`; and tells the control plane what was counted.
    pub async fn follow(
        self,
        control: impl Fn() -> Result<Control, String>,
        url: String,
        meter: Meter,
        stop: CancellationToken,
    ) {
        let mut backoff = Duration::from_millis(50);
        loop {
            let followed = tokio::select! {
                () = stop.cancelled() => return,
                followed = self.follow_once(&control, &url, &meter) => followed,
            };
            match followed {
                Ok(()) => backoff = Duration::from_millis(50),
                Err(reason) => tracing::debug!(%reason, "the list of services broke off"),
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(backoff) => {}
            }
            backoff = (backoff * 2).min(Duration::from_secs(2));
        }
    }

    async fn follow_once(
        &self,
        control: &impl Fn() -> Result<Control, String>,
        url: &str,
        meter: &Meter,
    ) -> Result<(), String> {
        let mut control = control()?;
        let open = control.watch(v1::WatchServicesRequest {});
        let mut updates = tokio::time::timeout(Duration::from_secs(5), open)
            .await
            .map_err(|_| "no answer within 5 s".to_owned())?
            .map_err(|status| status.message().to_owned())?
            .into_inner();
        let mut tick = tokio::time::interval(Duration::from_secs(2));
        loop {
            tokio::select! {
                update = updates.message() => match update {
                    Ok(Some(view)) => self.update(view.services),
                    Ok(None) => return Ok(()),
                    Err(status) => return Err(status.message().to_owned()),
                },
                _ = tick.tick() => {
                    let models = self.names().iter().map(|model| meter.report(model)).collect();
                    let report = v1::GatewayReport { url: url.to_owned(), at_ms: now_ms(), models };
                    let sent = control.report_gateway(report);
                    // A report is of use only while it is fresh: a late one is given up.
                    let _ = tokio::time::timeout(Duration::from_secs(2), sent).await;
                }
            }
        }
    }
}

/// Returns where a replica stands in the order of those that get a prefix: the least first. A
/// replica that comes or goes moves only its own prefixes.
fn affinity(prefix: u64, job: &str) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    (prefix, job).hash(&mut hasher);
    hasher.finish()
}

/// Returns how many requests may be running or waiting.
fn places(view: &v1::ServiceView) -> usize {
    (view.max_batch.max(1) as usize).saturating_add(view.max_queue as usize)
}

fn connect(view: &v1::ServiceView) -> Option<Inference> {
    if !view.ready || view.endpoint.is_empty() {
        return None;
    }
    let token = Token::new(&view.secret).ok()?;
    let channel = Endpoint::from_shared(view.endpoint.clone())
        .ok()?
        .connect_timeout(Duration::from_secs(2))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5))
        .connect_lazy();
    let client = InferenceClient::with_interceptor(channel, AddToken::new(&token));
    Some(client.max_decoding_message_size(drumline_wire::MESSAGE_MAX_BYTES))
}
