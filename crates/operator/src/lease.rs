//! Leadership by a Lease: one operator writes, the others wait.
//!
//! The clock of the holder is never compared with ours: a lease has lapsed when we have seen the
//! same record for its whole duration. A leader that could not renew in time stops writing before
//! anyone else may start.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use tokio_util::sync::CancellationToken;

/// The lease's name.
pub const NAME: &str = "drumline-operator";

/// How leadership is held.
#[derive(Debug, Clone)]
pub struct LeaseRules {
    /// Who we are: unique for each process.
    pub identity: String,
    /// Others may take over once they have seen no renewal for so long.
    pub duration: Duration,
}

/// Says whether this process may write. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Leadership {
    start: Instant,
    /// Milliseconds after `start` until which we lead; 0: we do not.
    until_ms: Arc<AtomicU64>,
    /// Counts the times that this process has begun to lead.
    newest_term: Arc<AtomicU64>,
    /// The time that this clone belongs to: what was begun in an earlier one must not go on.
    term: u64,
}

/// This process does not lead, or not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("another operator leads; this one writes nothing")]
pub struct NotLeading;

impl Default for Leadership {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            until_ms: Arc::default(),
            newest_term: Arc::default(),
            term: 0,
        }
    }
}

impl Leadership {
    /// Returns whether this process leads now.
    #[must_use]
    pub fn holds(&self) -> bool {
        let now = self.start.elapsed().as_millis();
        now < u128::from(self.until_ms.load(Ordering::Acquire))
    }

    /// Begins a new term: what was begun in the one before writes nothing any more.
    #[must_use]
    pub fn begin(&self) -> Self {
        let term = self.newest_term.fetch_add(1, Ordering::AcqRel) + 1;
        Self { term, ..self.clone() }
    }

    /// Must be asked before each write.
    ///
    /// # Errors
    /// [`NotLeading`].
    pub fn check(&self) -> Result<(), NotLeading> {
        let is_newest = self.newest_term.load(Ordering::Acquire) == self.term;
        if is_newest && self.holds() { Ok(()) } else { Err(NotLeading) }
    }

    fn lead_until(&self, moment: Instant) {
        let ms = moment.saturating_duration_since(self.start).as_millis();
        self.until_ms.store(u64::try_from(ms).unwrap_or(u64::MAX), Ordering::Release);
    }

    fn resign(&self) {
        self.until_ms.store(0, Ordering::Release);
    }
}

/// Seeks and keeps the lease until `stop`, then hands it back.
pub async fn run(
    api: Api<Lease>,
    rules: LeaseRules,
    leadership: Leadership,
    stop: CancellationToken,
) {
    // Three tries within the time that a leader trusts its lease.
    let pause = rules.duration / 5;
    let mut seen: Option<(String, Instant)> = None;
    loop {
        let asked = Instant::now();
        let limit = rules.duration / 3;
        match tokio::time::timeout(limit, try_hold(&api, &rules, &mut seen, &leadership)).await {
            // From the moment of asking, and short of the duration: the others wait longer.
            Ok(Ok(true)) => leadership.lead_until(asked + rules.duration * 2 / 3),
            Ok(Ok(false)) => leadership.resign(),
            // Whether it was renewed is not known: what we trust runs out by itself.
            Ok(Err(error)) => tracing::warn!(%error, "the lease cannot be renewed"),
            Err(_) => tracing::warn!("the API server does not answer for the lease"),
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => break,
        }
    }
    if leadership.holds() {
        leadership.resign();
        let _ = tokio::time::timeout(Duration::from_secs(2), hand_back(&api, &rules)).await;
    }
}

async fn try_hold(
    api: &Api<Lease>,
    rules: &LeaseRules,
    seen: &mut Option<(String, Instant)>,
    leadership: &Leadership,
) -> kube::Result<bool> {
    let Some(mut lease) = api.get_opt(NAME).await? else {
        let mut lease = Lease::default();
        lease.metadata.name = Some(NAME.to_owned());
        take(&mut lease, rules, true);
        return won(api.create(&PostParams::default(), &lease).await);
    };
    let spec = lease.spec.clone().unwrap_or_default();
    let holder = spec.holder_identity.unwrap_or_default();
    if holder != rules.identity && !holder.is_empty() {
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        let since = match seen {
            Some((was, since)) if *was == version => *since,
            _ => {
                let now = Instant::now();
                *seen = Some((version, now));
                now
            }
        };
        let named = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let duration = named.map_or(rules.duration, Duration::from_secs).max(rules.duration);
        if since.elapsed() < duration {
            leadership.resign();
            return Ok(false);
        }
    }
    let is_new = holder != rules.identity;
    take(&mut lease, rules, is_new);
    // Carries the version that was read: of two that try, one gets a conflict.
    won(api.replace(NAME, &PostParams::default(), &lease).await)
}

fn take(lease: &mut Lease, rules: &LeaseRules, is_new: bool) {
    let now = MicroTime(Timestamp::now());
    let spec = lease.spec.get_or_insert_default();
    spec.holder_identity = Some(rules.identity.clone());
    spec.lease_duration_seconds =
        Some(i32::try_from(rules.duration.as_secs().max(1)).unwrap_or(i32::MAX));
    spec.renew_time = Some(now.clone());
    if is_new {
        spec.acquire_time = Some(now);
        spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0).saturating_add(1));
    }
}

fn won(answer: kube::Result<Lease>) -> kube::Result<bool> {
    match answer {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

async fn hand_back(api: &Api<Lease>, rules: &LeaseRules) -> kube::Result<()> {
    let Some(mut lease) = api.get_opt(NAME).await? else { return Ok(()) };
    let spec = lease.spec.get_or_insert_default();
    if spec.holder_identity.as_deref() == Some(&rules.identity) {
        spec.holder_identity = Some(String::new());
        api.replace(NAME, &PostParams::default(), &lease).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_begun_in_an_earlier_term_writes_nothing() {
        let leadership = Leadership::default();
        let first = leadership.begin();
        assert_eq!(first.check(), Err(NotLeading));
        leadership.lead_until(Instant::now() + Duration::from_secs(60));
        assert_eq!(first.check(), Ok(()));
        let second = leadership.begin();
        assert_eq!((first.check(), second.check()), (Err(NotLeading), Ok(())));
        leadership.resign();
        assert_eq!(second.check(), Err(NotLeading));
    }
}
