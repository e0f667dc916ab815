//! Which models are served where, kept up to date by the control plane; and who may still come in.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
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

/// One served model.
#[derive(Debug, Clone)]
pub struct Route {
    /// What the control plane says of it.
    pub view: v1::ServiceView,
    /// Its leader rank; absent while it is not ready.
    pub client: Option<Inference>,
    places: Arc<Semaphore>,
}

/// The table of served models. Cloning shares it.
#[derive(Debug, Clone, Default)]
pub struct Routes {
    table: Arc<RwLock<BTreeMap<String, Route>>>,
}

impl Routes {
    /// Returns the names of the served models.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// Returns every route.
    #[must_use]
    pub fn all(&self) -> Vec<Route> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Returns how many requests of a model may be running or waiting; none for one that is not
    /// served.
    #[must_use]
    pub fn places(&self, model: &str) -> Option<usize> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.get(model).map(|route| places(&route.view))
    }

    /// Lets a request in: returns the model's client and a place that is held until it is dropped.
    ///
    /// # Errors
    /// 404 for a model that is not served, 503 while it is not ready, 429 when its queue is full.
    pub fn admit(&self, model: &str) -> Result<(Inference, OwnedSemaphorePermit), ApiError> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let Some(route) = table.get(model) else {
            return Err(ApiError::no_such_model(model, &table.keys().cloned().collect::<Vec<_>>()));
        };
        let Some(client) = route.client.clone() else {
            return Err(ApiError::unavailable(format!(
                "the model {model:?} is not ready yet; `drumline describe job {}` says why",
                route.view.job
            )));
        };
        match route.places.clone().try_acquire_owned() {
            Ok(place) => Ok((client, place)),
            Err(_) => Err(ApiError::busy(format!(
                "{} requests are running or waiting for the model {model:?}; try again later",
                places(&route.view)
            ))),
        }
    }

    /// Takes the control plane's list. Routes that did not move keep their connection and places.
    fn update(&self, services: Vec<v1::ServiceView>) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = BTreeMap::new();
        for view in services {
            // Two services of one name: the one that is ready serves.
            let taken: Option<&Route> = next.get(&view.served_name);
            if !view.ready && taken.is_some_and(|route| route.client.is_some()) {
                continue;
            }
            let old = table.get(&view.served_name).cloned();
            let same = old.filter(|old| {
                old.view.endpoint == view.endpoint
                    && old.view.secret == view.secret
                    && places(&old.view) == places(&view)
            });
            let (client, places) = match same {
                Some(old) if old.client.is_some() || view.endpoint.is_empty() => {
                    (old.client, old.places)
                }
                _ => (connect(&view), Arc::new(Semaphore::new(places(&view)))),
            };
            next.insert(view.served_name.clone(), Route { view, client, places });
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
