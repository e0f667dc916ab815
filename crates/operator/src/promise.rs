//! Devices that are promised to gangs whose pods the watches do not show yet: held until they do,
//! or until the API server has none of them any more.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use drumline_types::{Explanation, JobPhase, Reason, Timestamp};

use crate::core::{Core, Done, REST};
use crate::gang::Member;
use crate::job::Job;
use crate::launch::{LaunchError, taken_back};
use crate::status::told;
use crate::wake::Wake;

/// A gang that was bound and is not seen for so long is looked for.
const UNSEEN: Duration = Duration::from_secs(5);
/// A gang that was taken back is not tried again for so long, in milliseconds.
const TAKEN_BACK_MS: u64 = 1000;

/// Devices promised to one attempt.
pub(crate) struct Promise {
    job: Job,
    attempt: u32,
    /// Its pods, whose places are in the ledger.
    pods: usize,
    state: State,
}

enum State {
    Launching,
    /// All bound; since then.
    Bound(Instant),
    /// To be taken back, for this reason; tried again from then on.
    TakingBack(String, Instant),
    /// A task is taking it back.
    Removing(String),
}

impl Promise {
    /// Returns the promise of an attempt that is being launched.
    pub(crate) fn new(job: Job, attempt: u32, pods: usize) -> Self {
        Self { job, attempt, pods, state: State::Launching }
    }
}

impl Core {
    /// Drops promises whose pods the watches show, and looks after those that they do not.
    pub(crate) fn settle_promises(
        &mut self,
        members: &BTreeMap<String, Vec<Member>>,
        wake: &mut Wake,
    ) {
        let now = Instant::now();
        let mut take_back = Vec::new();
        let mut count = Vec::new();
        let mut kept = Vec::new();
        self.promised.retain(|uid, promise| match &promise.state {
            State::Launching | State::Removing(_) => true,
            State::Bound(since) => {
                let seen = members.get(uid).into_iter().flatten();
                let seen = seen.filter(|m| m.attempt == promise.attempt && m.node.is_some());
                if seen.count() >= promise.pods {
                    kept.push(uid.clone());
                    return false;
                }
                if now.duration_since(*since) >= UNSEEN && !self.busy.contains(uid) {
                    count.push((uid.clone(), promise.job.clone(), promise.attempt));
                }
                wake.at(*since + UNSEEN);
                true
            }
            State::TakingBack(_, at) => {
                if *at <= now {
                    take_back.push(uid.clone());
                }
                wake.at(*at);
                true
            }
        });
        if !kept.is_empty() {
            let mut books = self.stores.ledger.open();
            kept.iter().for_each(|uid| books.drop_promise(uid));
        }
        for (uid, job, attempt) in count {
            self.busy.insert(uid.clone());
            self.spawn(job, move |writer, job| async move {
                let answer = writer.list(&job, Some(attempt)).await.map(|pods| pods.len());
                Done::Counted { uid, answer }
            });
        }
        for uid in take_back {
            let Some(promise) = self.promised.get_mut(&uid) else { continue };
            if let State::TakingBack(why, _) = &promise.state {
                promise.state = State::Removing(why.clone());
            }
            let (job, attempt) = (promise.job.clone(), promise.attempt);
            self.spawn(job, move |writer, job| async move {
                let answer = writer.take_back(&job, attempt).await;
                Done::TakenBack { uid, answer }
            });
        }
    }

    /// All pods of a gang were created and bound, or not.
    pub(crate) fn was_launched(&mut self, uid: &str, answer: Result<(), LaunchError>) {
        let Some(promise) = self.promised.get_mut(uid) else { return };
        promise.state = match answer {
            Ok(()) => State::Bound(Instant::now()),
            Err(error) => {
                tracing::warn!(job = %promise.job.id, %error, "a gang is taken back");
                let why = taken_back(promise.attempt, &error).message;
                State::TakingBack(why, Instant::now())
            }
        };
    }

    /// The API server has told how many pods of a gang it has.
    pub(crate) fn was_counted(&mut self, uid: &str, answer: Result<usize, LaunchError>) {
        self.busy.remove(uid);
        let Some(promise) = self.promised.get_mut(uid) else { return };
        match answer {
            // They were deleted before the watch showed them.
            Ok(0) => {
                self.promised.remove(uid);
                self.stores.ledger.open().drop_promise(uid);
            }
            // Some were; those that are there may be bound.
            Ok(there) if there < promise.pods => {
                self.promised.remove(uid);
                self.stores.ledger.open().let_go_of(uid, Instant::now());
            }
            _ => promise.state = State::Bound(Instant::now()),
        }
    }

    /// A gang was taken back, or not yet. When no pod of the attempt is left, its devices are free,
    /// and its status says why.
    pub(crate) fn was_taken_back(
        &mut self,
        uid: &str,
        answer: Result<(), LaunchError>,
        now: Timestamp,
    ) {
        if let Err(error) = answer {
            tracing::warn!(job = %uid, %error, "a gang could not be taken back yet");
            if let Some(promise) = self.promised.get_mut(uid)
                && let State::Removing(why) = &promise.state
            {
                promise.state = State::TakingBack(why.clone(), Instant::now() + REST);
            }
            return;
        }
        self.resting.insert(uid.to_owned(), Instant::now() + REST);
        let Some(promise) = self.promised.remove(uid) else { return };
        self.stores.ledger.open().drop_promise(uid);
        let State::Removing(why) = promise.state else { return };
        // The attempt may never have been written down: then there is nothing to tell.
        let now_shown = self.jobs().remove(uid);
        if let Some(job) = now_shown.filter(|job| job.status.attempt == promise.attempt) {
            let why = Explanation::new(Reason::NotYetConsidered, why);
            let mut status = told(&job, JobPhase::Pending, &why, now.0);
            status.not_before_ms = now.0 + TAKEN_BACK_MS;
            self.write(&job, status);
        }
    }
}
