//! The operator's one state and its one pass over it: what the API server shows, what is promised
//! and not shown yet, and what is being carried out.
//!
//! Tasks carry out; only this file decides, and only between two of their messages.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use drumline_audit::CheckedJob;
use drumline_cluster::Request;
use drumline_spec::manifest::parse_all;
use drumline_spec::{JobKind, QueueSpec};
use drumline_types::{Attempt, Explanation, JobId, JobPhase, Reason, Timestamp};
use k8s_openapi::api::core::v1::{Node as KubeNode, Pod};
use kube::api::DynamicObject;
use kube::runtime::reflector::Store;
use tokio::sync::{Semaphore, mpsc};

use crate::crd::status::JobStatus;
use crate::crd::{GROUP, VERSION};
use crate::decide::{Holding, Scene, Wanting, decide, request};
use crate::fleet::{Fleet, FleetRules, Held, held, is_ready};
use crate::gang::Member;
use crate::job::Job;
use crate::launch::{LaunchError, Writer, taken_back};
use crate::pods::Seat;
use crate::status::told;
use crate::step::{Doomed, Next, View, step};

/// Jobs for which calls are under way at a time.
const TASKS_MAX: usize = 32;
/// After a call failed, its job rests for so long.
const REST: Duration = Duration::from_millis(300);
/// A gang that was bound and is not seen for so long is looked for.
const UNSEEN: Duration = Duration::from_secs(5);
/// A gang that was taken back is not tried again for so long, in milliseconds.
const TAKEN_BACK_MS: u64 = 1000;
/// The message of a job that waits is written at most so often.
const WAIT_TOLD: Duration = Duration::from_secs(2);
/// Nothing is left alone for longer.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// What the watches have brought.
#[derive(Clone)]
pub(crate) struct Stores {
    pub(crate) jobs: Vec<(JobKind, Store<DynamicObject>)>,
    pub(crate) queues: Store<DynamicObject>,
    pub(crate) nodes: Store<KubeNode>,
    pub(crate) pods: Store<Pod>,
}

/// A task's last word.
#[derive(Debug)]
pub(crate) enum Done {
    /// A write of a job's object.
    Written { uid: String, answer: Result<Option<DynamicObject>, LaunchError> },
    /// All pods created and bound, or not.
    Launched {
        uid: String,
        answer: Result<(), LaunchError>,
        /// The job's object once the attempt was written down; `None`: it was not.
        written: Option<DynamicObject>,
    },
    /// A gang was taken back, or not yet.
    TakenBack { uid: String, answer: Result<(), LaunchError> },
    /// How many pods of an attempt the API server has.
    Counted { uid: String, answer: Result<usize, LaunchError> },
}

/// Devices promised to a gang whose pods the watches do not show yet.
struct Promise {
    job: Job,
    attempt: u32,
    held: Vec<Held>,
    state: PromiseState,
}

enum PromiseState {
    Launching,
    /// All bound; since then.
    Bound(Instant),
    /// To be taken back, for this reason; tried again from then on.
    TakingBack(String, Instant),
    /// A task is taking it back.
    Removing(String),
}

/// The operator's state.
pub(crate) struct Core {
    stores: Stores,
    rules: FleetRules,
    writer: Writer,
    /// Jobs with a write under way.
    busy: BTreeMap<String, ()>,
    promised: BTreeMap<String, Promise>,
    /// Objects as we wrote them, until the watches show them.
    latest: BTreeMap<String, DynamicObject>,
    /// Jobs that rest after a call failed.
    resting: BTreeMap<String, Instant>,
    /// When the message of a job that waits was last written.
    told: BTreeMap<String, Instant>,
    tasks: Arc<Semaphore>,
    done: mpsc::UnboundedSender<Done>,
}

impl Core {
    /// Returns the state of an operator that has just started: it remembers nothing.
    pub(crate) fn new(
        stores: Stores,
        rules: FleetRules,
        writer: Writer,
        done: mpsc::UnboundedSender<Done>,
    ) -> Self {
        Self {
            stores,
            rules,
            writer,
            busy: BTreeMap::new(),
            promised: BTreeMap::new(),
            latest: BTreeMap::new(),
            resting: BTreeMap::new(),
            told: BTreeMap::new(),
            tasks: Arc::new(Semaphore::new(TASKS_MAX)),
            done,
        }
    }

    /// Looks at everything once. Returns how long nothing needs another look by itself.
    pub(crate) fn pass(&mut self, now: Timestamp) -> Duration {
        let mut wake = Wake::new(now);
        let jobs = self.jobs();
        let mut members: BTreeMap<String, Vec<Member>> = BTreeMap::new();
        let mut others = Vec::new();
        for pod in self.stores.pods.state() {
            match Member::read(&pod) {
                // Pods of a job that is gone are like anybody's, until the garbage collector comes.
                Some(member) if jobs.contains_key(&member.job) => {
                    members.entry(member.job.clone()).or_default().push(member)
                }
                _ => others.push(pod),
            }
        }
        let nodes = self.stores.nodes.state();
        let ready: BTreeMap<&str, bool> = nodes
            .iter()
            .filter_map(|node| Some((node.metadata.name.as_deref()?, is_ready(node))))
            .collect();
        let is_lost = |name: &str| !ready.get(name).copied().unwrap_or(false);
        self.settle_promises(&members, &mut wake);
        let mut wanting: Vec<(&Job, Wanting)> = Vec::new();
        for (uid, job) in &jobs {
            let theirs = members.get(uid).map(Vec::as_slice).unwrap_or_default();
            if let Some(until) = self.resting.get(uid) {
                if *until > Instant::now() {
                    wake.at(*until);
                    continue;
                }
                self.resting.remove(uid);
            }
            let is_busy = self.busy.contains_key(uid) || self.promised.contains_key(uid);
            let view = View { job, members: theirs, is_busy, is_lost: &is_lost, now_ms: now.0 };
            match step(&view) {
                Next::Nothing { at_ms } => wake.at_ms(at_ms),
                Next::Adopt => {
                    self.call(job, |writer, job| async move { writer.adopt(&job).await.map(Some) })
                }
                Next::Write(status) => self.write(job, *status),
                Next::Remove(doomed) => self.remove(job, doomed),
                Next::Release => self.call(job, |writer, job| async move {
                    writer.release(&job).await.map(|()| None)
                }),
                Next::Consider => {
                    let Some(request) = self.request(job) else { continue };
                    let asked = Wanting {
                        request,
                        attempt: Attempt(job.status.attempt + 1),
                        not_before: Timestamp(job.status.not_before_ms),
                    };
                    wanting.push((job, asked));
                }
            }
        }
        if !wanting.is_empty() {
            let held = self.all_held(&members);
            let fleet = Fleet::build(
                &self.rules,
                nodes.iter().map(AsRef::as_ref),
                &held,
                others.iter().map(AsRef::as_ref),
            );
            self.decide(fleet, &jobs, &wanting, now, &mut wake);
        }
        self.told.retain(|uid, _| jobs.contains_key(uid));
        self.latest.retain(|uid, _| jobs.contains_key(uid));
        wake.left()
    }

    /// Returns every job, as the watches show it or as we wrote it, whichever is newer.
    fn jobs(&mut self) -> BTreeMap<String, Job> {
        let mut jobs = BTreeMap::new();
        for (kind, store) in &self.stores.jobs {
            for object in store.state() {
                let Some(uid) = object.metadata.uid.clone() else { continue };
                let read = match self.latest.get(&uid) {
                    Some(ours) if revision(ours) > revision(&object) => Job::read(*kind, ours),
                    _ => {
                        self.latest.remove(&uid);
                        Job::read(*kind, &object)
                    }
                };
                if let Some(job) = read {
                    jobs.insert(uid, job);
                }
            }
        }
        jobs
    }

    /// Drops promises whose pods the watches show, and looks after those that they do not.
    fn settle_promises(&mut self, members: &BTreeMap<String, Vec<Member>>, wake: &mut Wake) {
        let now = Instant::now();
        let mut take_back = Vec::new();
        let mut count = Vec::new();
        self.promised.retain(|uid, promise| match &promise.state {
            PromiseState::Launching | PromiseState::Removing(_) => true,
            PromiseState::Bound(since) => {
                let seen = members.get(uid).into_iter().flatten();
                let seen = seen.filter(|m| m.attempt == promise.attempt && m.node.is_some());
                if seen.count() >= promise.held.len() {
                    return false;
                }
                if now.duration_since(*since) >= UNSEEN && !self.busy.contains_key(uid) {
                    count.push((uid.clone(), promise.job.clone(), promise.attempt));
                }
                wake.at(*since + UNSEEN);
                true
            }
            PromiseState::TakingBack(_, at) => {
                if *at <= now {
                    take_back.push(uid.clone());
                }
                wake.at(*at);
                true
            }
        });
        for (uid, job, attempt) in count {
            self.busy.insert(uid.clone(), ());
            self.spawn(job, move |writer, job| async move {
                let answer = writer.list(&job, Some(attempt)).await.map(|pods| pods.len());
                Done::Counted { uid, answer }
            });
        }
        for uid in take_back {
            let Some(promise) = self.promised.get_mut(&uid) else { continue };
            if let PromiseState::TakingBack(why, _) = &promise.state {
                promise.state = PromiseState::Removing(why.clone());
            }
            let (job, attempt) = (promise.job.clone(), promise.attempt);
            self.spawn(job, move |writer, job| async move {
                let answer = writer.take_back(&job, attempt).await;
                Done::TakenBack { uid, answer }
            });
        }
    }

    fn all_held(&self, members: &BTreeMap<String, Vec<Member>>) -> Vec<Held> {
        let mut all: Vec<Held> = Vec::new();
        for (uid, members) in members {
            let promised = self.promised.get(uid).map(|promise| promise.attempt);
            let shown = members.iter().filter(|member| Some(member.attempt) != promised);
            all.extend(shown.filter_map(held));
        }
        all.extend(self.promised.values().flat_map(|promise| promise.held.iter().cloned()));
        all
    }

    fn request(&self, job: &Job) -> Option<Request> {
        let spec = job.spec.as_ref().ok()?;
        Some(request(&job.id, spec, job.created_ms, self.rules.cpu_device_milli))
    }

    fn decide(
        &mut self,
        mut fleet: Fleet,
        jobs: &BTreeMap<String, Job>,
        wanting: &[(&Job, Wanting)],
        now: Timestamp,
        wake: &mut Wake,
    ) {
        let known: BTreeMap<&JobId, &Job> = jobs.values().map(|job| (&job.id, job)).collect();
        let holding = fleet.held.iter().filter_map(|(id, (attempt, devices))| {
            let Some(request) = known.get(id).and_then(|job| self.request(job)) else {
                tracing::error!(job = %id, "a job whose spec is refused holds devices");
                return None;
            };
            let started = known.get(id).map_or(0, |job| job.status.launched_ms);
            Some(Holding {
                request,
                attempt: *attempt,
                devices: devices.clone(),
                started: Timestamp(started),
            })
        });
        let scene = Scene {
            holding: holding.collect(),
            nodes: std::mem::take(&mut fleet.nodes),
            queues: self.queues(),
            wanting: wanting.iter().map(|(_, asked)| asked.clone()).collect(),
        };
        let decision = decide(scene, now);
        for checked in decision.start {
            if let Some(job) = known.get(&checked.plan().job) {
                self.launch(&fleet, job, &checked, now);
            }
        }
        for (id, why) in decision.wait {
            if let Some(job) = known.get(&id) {
                self.tell_wait(job, &why, now, wake);
            }
        }
        wake.at_ms(decision.wake.map(|at| at.0));
    }

    /// Returns the queues of the cluster that say what they are; those that do not are told of.
    fn queues(&self) -> Vec<QueueSpec> {
        let mut queues = Vec::new();
        for object in self.stores.queues.state() {
            let name = object.metadata.name.clone().unwrap_or_default();
            let manifest = serde_json::json!({
                "apiVersion": format!("{GROUP}/{VERSION}"),
                "kind": "Queue",
                "metadata": { "name": name },
                "spec": object.data.get("spec").cloned().unwrap_or_default(),
            });
            match parse_all(&manifest.to_string(), &name) {
                Ok(all) => queues.extend(all.queues),
                Err(mistakes) => {
                    let first = mistakes.first().map(|mistake| mistake.message.clone());
                    tracing::warn!(queue = %name, ?first, "a queue is left out");
                }
            }
        }
        queues
    }

    fn tell_wait(&mut self, job: &Job, why: &Explanation, now: Timestamp, wake: &mut Wake) {
        // What went wrong is told already, and a delay's countdown is no news.
        if why.reason == Reason::BackingOff && job.status.not_before_ms > 0 {
            return;
        }
        let is_same = job.status.reason == why.reason.token() && job.has_status;
        if is_same && job.status.message == why.message {
            return;
        }
        if let Some(last) = self.told.get(&job.uid)
            && is_same
            && last.elapsed() < WAIT_TOLD
        {
            wake.at(*last + WAIT_TOLD);
            return;
        }
        self.told.insert(job.uid.clone(), Instant::now());
        let mut status = told(job, JobPhase::Pending, why, now.0);
        if let Ok(spec) = &job.spec {
            status.ready = format!("0/{}", spec.gang().ranks);
        }
        self.write(job, status);
    }

    fn launch(&mut self, fleet: &Fleet, job: &Job, checked: &CheckedJob, now: Timestamp) {
        let plan = checked.plan();
        let mut seats = Vec::new();
        let mut holds = Vec::new();
        for assignment in &plan.assignments {
            let Some(node) = fleet.node_name(&assignment.device.node) else {
                tracing::error!(job = %job.id, "a plan names a node that is not there");
                return;
            };
            seats.push(Seat { rank: assignment.rank.0, node: node.to_owned() });
            holds.push(Held {
                job: job.id.clone(),
                attempt: plan.attempt,
                rank: assignment.rank.0,
                device: plan.gang.device,
                node: node.to_owned(),
            });
        }
        let attempt = plan.attempt.0;
        let message = format!("attempt {attempt} is being bound to {} devices", seats.len());
        let why = Explanation::new(Reason::StartingRanks, message);
        let mut status = told(job, JobPhase::Starting, &why, now.0);
        status.attempt = attempt;
        status.launched_ms = now.0;
        status.running_since_ms = 0;
        status.ready = format!("0/{}", seats.len());
        let promise =
            Promise { job: job.clone(), attempt, held: holds, state: PromiseState::Launching };
        self.promised.insert(job.uid.clone(), promise);
        let uid = job.uid.clone();
        self.spawn(job.clone(), move |writer, job| async move {
            let mut written = None;
            let answer = writer.launch(&job, attempt, &status, &seats, &mut written).await;
            Done::Launched { uid, answer, written }
        });
    }

    fn write(&mut self, job: &Job, status: JobStatus) {
        self.call(
            job,
            move |writer, job| async move { writer.status(&job, &status).await.map(Some) },
        );
    }

    fn remove(&mut self, job: &Job, doomed: Vec<Doomed>) {
        self.call(job, move |writer, job| async move {
            writer.remove(&job, &doomed).await.map(|()| None)
        });
    }

    fn call<F, Fut>(&mut self, job: &Job, work: F)
    where
        F: FnOnce(Writer, Job) -> Fut + Send + 'static,
        Fut: Future<Output = Result<Option<DynamicObject>, LaunchError>> + Send,
    {
        let uid = job.uid.clone();
        self.busy.insert(uid.clone(), ());
        self.spawn(job.clone(), move |writer, job| async move {
            Done::Written { uid, answer: work(writer, job).await }
        });
    }

    fn spawn<F, Fut>(&self, job: Job, work: F)
    where
        F: FnOnce(Writer, Job) -> Fut + Send + 'static,
        Fut: Future<Output = Done> + Send,
    {
        let (writer, tasks, done) = (self.writer.clone(), self.tasks.clone(), self.done.clone());
        tokio::spawn(async move {
            // The semaphore is never closed.
            let _place = tasks.acquire_owned().await;
            // Whoever listens is gone only when the whole operator is.
            let _ = done.send(work(writer, job).await);
        });
    }

    /// Takes in what a task has done.
    pub(crate) fn done(&mut self, done: Done, now: Timestamp) {
        match done {
            Done::Written { uid, answer } => {
                self.busy.remove(&uid);
                match answer {
                    Ok(Some(object)) => drop(self.latest.insert(uid, object)),
                    Ok(None) => {}
                    Err(error) => self.rest(&uid, &error),
                }
            }
            Done::Launched { uid, answer, written } => {
                if let Some(object) = written {
                    self.latest.insert(uid.clone(), object);
                }
                let Some(promise) = self.promised.get_mut(&uid) else { return };
                promise.state = match answer {
                    Ok(()) => PromiseState::Bound(Instant::now()),
                    Err(error) => {
                        tracing::warn!(job = %promise.job.id, %error, "a gang is taken back");
                        let why = taken_back(promise.attempt, &error).message;
                        PromiseState::TakingBack(why, Instant::now())
                    }
                };
            }
            Done::TakenBack { uid, answer } => match answer {
                Ok(()) => self.was_taken_back(&uid, now),
                Err(error) => {
                    tracing::warn!(job = %uid, %error, "a gang could not be taken back yet");
                    if let Some(promise) = self.promised.get_mut(&uid)
                        && let PromiseState::Removing(why) = &promise.state
                    {
                        let again = Instant::now() + REST;
                        promise.state = PromiseState::TakingBack(why.clone(), again);
                    }
                }
            },
            Done::Counted { uid, answer } => {
                self.busy.remove(&uid);
                let Some(promise) = self.promised.get_mut(&uid) else { return };
                match answer {
                    // They were deleted before the watch showed them.
                    Ok(there) if there < promise.held.len() => drop(self.promised.remove(&uid)),
                    _ => promise.state = PromiseState::Bound(Instant::now()),
                }
            }
        }
    }

    /// No pod of the attempt is left: its devices are free, and its status says why.
    fn was_taken_back(&mut self, uid: &str, now: Timestamp) {
        self.resting.insert(uid.to_owned(), Instant::now() + REST);
        let Some(promise) = self.promised.remove(uid) else { return };
        let PromiseState::Removing(why) = promise.state else { return };
        // The attempt may never have been written down: then there is nothing to tell.
        let now_shown = self.jobs().remove(uid);
        if let Some(job) = now_shown.filter(|job| job.status.attempt == promise.attempt) {
            let why = Explanation::new(Reason::NotYetConsidered, why);
            let mut status = told(&job, JobPhase::Pending, &why, now.0);
            status.not_before_ms = now.0 + TAKEN_BACK_MS;
            self.write(&job, status);
        }
    }

    fn rest(&mut self, uid: &str, error: &LaunchError) {
        if !error.is_conflict() {
            tracing::warn!(job = %uid, %error, "a call failed");
        }
        self.resting.insert(uid.to_owned(), Instant::now() + REST);
    }
}

fn revision(object: &DynamicObject) -> u64 {
    let text = object.metadata.resource_version.as_deref();
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// The earliest moment at which something needs another look.
struct Wake {
    now: Timestamp,
    left: Duration,
}

impl Wake {
    fn new(now: Timestamp) -> Self {
        Self { now, left: LOOK_AGAIN }
    }

    fn at(&mut self, moment: Instant) {
        self.left = self.left.min(moment.saturating_duration_since(Instant::now()));
    }

    fn at_ms(&mut self, ms: Option<u64>) {
        if let Some(ms) = ms {
            self.left = self.left.min(Duration::from_millis(ms.saturating_sub(self.now.0)));
        }
    }

    fn left(&self) -> Duration {
        // Never a hot loop, whatever the clocks say.
        self.left.max(Duration::from_millis(10))
    }
}
