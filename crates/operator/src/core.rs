//! The operator's one state and its one pass over it: what the API server shows, what is promised
//! and not shown yet, and what is being carried out.
//!
//! Tasks carry out; only this file decides, and only between two of their messages.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use drumline_audit::CheckedJob;
use drumline_cluster::Request;
use drumline_spec::{DeviceKind, Gang, GangSettings, JobKind, Parallelism};
use drumline_types::{Attempt, Explanation, JobId, JobPhase, Reason, Timestamp};
use k8s_openapi::api::core::v1::{Namespace, Node as KubeNode, Pod};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceSlice};
use kube::api::DynamicObject;
use kube::runtime::reflector::Store;
use tokio::sync::{Semaphore, mpsc, watch};

use crate::ask::Ask;
use crate::budgets::guarded;
use crate::crd::status::JobStatus;
use crate::desk::{Desk, Holding, Scene, Wanting, request};
use crate::dra::is_claimable;
use crate::figures::Figures;
use crate::fleet::{Fleet, FleetRules, Held, is_ready};
use crate::gang::{Member, UID};
use crate::guard::InEffect;
use crate::job::Job;
use crate::launch::{LaunchError, Writer};
use crate::ledger::{Ledger, Place};
use crate::pods::{Seat, ask};
use crate::promise::Promise;
use crate::queues::QueueStates;
use crate::ranks::keys::Keys;
use crate::ranks::services::Board;
use crate::ranks::worlds::Worlds;
use crate::replicas::Sets;
use crate::status::told;
use crate::step::{Doomed, Next, View, evicted, phase, step};
use crate::wake::Wake;

/// Jobs for which calls are under way at a time.
const TASKS_MAX: usize = 32;
/// After a call failed, its job rests for so long.
pub(crate) const REST: Duration = Duration::from_millis(300);
/// A job whose plan found no room for what it wants beside its devices is tried again so late.
const EXTRA_REST: Duration = Duration::from_secs(2);
/// The message of a job that waits is written at most so often.
const WAIT_TOLD: Duration = Duration::from_secs(2);
/// Why gangs wait while the guard is not in effect.
const UNGUARDED: &str = "bindings of other schedulers do not come by the operator, and gangs wait \
                         until they do: can the API server reach it? See the webhook configuration \
                         drumline-bindings";
/// The guard may take so long to come into effect after an operator has begun to lead, in milliseconds.
const UNGUARDED_MS: u64 = 10_000;
/// How far a run is, is written at most so often.
const PROGRESS_TOLD: Duration = Duration::from_secs(10);

/// Figures of running jobs are taken down so often, in milliseconds.
const FIGURES_MS: u64 = 5_000;

/// What the watches have brought.
#[derive(Clone)]
pub(crate) struct Stores {
    pub(crate) jobs: Vec<(JobKind, Store<DynamicObject>)>,
    pub(crate) queues: Store<DynamicObject>,
    pub(crate) namespaces: Store<Namespace>,
    pub(crate) nodes: Store<KubeNode>,
    pub(crate) pods: Store<Pod>,
    pub(crate) budgets: Store<PodDisruptionBudget>,
    /// Slices and claims, where drivers' devices are given to gangs.
    pub(crate) published: Option<(Store<ResourceSlice>, Store<ResourceClaim>)>,
    /// What pods ask of nodes, by the watches of both.
    pub(crate) ledger: Ledger,
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
    /// A claim whose pod is gone was deleted, or not.
    Swept { uid: String, answer: Result<bool, LaunchError> },
    /// Replicas of a service were made, changed or deleted, or not all of them.
    Replicas { key: String, answer: Result<(), LaunchError> },
    /// A queue's status was written, or not.
    QueueTold { queue: String, answer: Result<(), LaunchError> },
}

/// The operator's state.
pub(crate) struct Core {
    pub(crate) stores: Stores,
    rules: FleetRules,
    pub(crate) writer: Writer,
    pub(crate) keys: Arc<Keys>,
    /// What ranks tell.
    pub(crate) worlds: Worlds,
    /// Services of several replicas.
    pub(crate) replicas: Sets,
    /// What gateways are told.
    pub(crate) board: watch::Sender<Board>,
    /// What readers of metrics are told.
    pub(crate) figures: watch::Sender<Vec<Figures>>,
    desk: Desk,
    fleet: Fleet,
    /// Whether other schedulers' bindings are held against the ledger; `None`: nobody asks for it.
    guard: Option<InEffect>,
    /// Members of gangs by their jobs' uids, as the watches show them.
    members: BTreeMap<String, Vec<Member>>,
    /// Jobs whose pods the ledger tells as gangs'.
    gangs: BTreeSet<String>,
    /// Nodes whose kubelets are heard.
    ready: BTreeSet<String>,
    pub(crate) queues: QueueStates,
    /// When this operator began to lead.
    since: Timestamp,
    /// Jobs as they were last read, by uid.
    read: BTreeMap<String, Job>,
    /// Jobs with a write under way.
    pub(crate) busy: BTreeSet<String>,
    pub(crate) promised: BTreeMap<String, Promise>,
    /// Attempts that are asked to leave, until their status says so.
    pub(crate) leaving: BTreeMap<String, (u32, Explanation)>,
    /// Objects as we wrote them, until the watches show them.
    latest: BTreeMap<String, DynamicObject>,
    /// Jobs that rest after a call failed.
    pub(crate) resting: BTreeMap<String, Instant>,
    /// When the message of a job was last written for its own sake.
    told: BTreeMap<String, Instant>,
    /// Whom tainted devices end, by node.
    pub(crate) ended_by_taints: BTreeMap<String, Vec<(JobId, Attempt, String)>>,
    /// Claims that are being deleted, by uid; with a moment, those that rest until then.
    pub(crate) sweeping: BTreeMap<String, Option<Instant>>,
    tasks: Arc<Semaphore>,
    done: mpsc::UnboundedSender<Done>,
}

impl Core {
    /// Returns the state of an operator that has just started: it remembers nothing.
    #[expect(clippy::too_many_arguments, reason = "its parts, put together once")]
    pub(crate) fn new(
        stores: Stores,
        rules: FleetRules,
        writer: Writer,
        keys: Arc<Keys>,
        board: watch::Sender<Board>,
        figures: watch::Sender<Vec<Figures>>,
        guard: Option<InEffect>,
        done: mpsc::UnboundedSender<Done>,
        now: Timestamp,
    ) -> Self {
        stores.ledger.open().begin(Instant::now());
        Self {
            stores,
            rules,
            writer,
            keys,
            worlds: Worlds::default(),
            replicas: Sets::default(),
            board,
            figures,
            desk: Desk::new(now.0),
            fleet: Fleet::default(),
            guard,
            members: BTreeMap::new(),
            gangs: BTreeSet::new(),
            ready: BTreeSet::new(),
            queues: QueueStates::default(),
            since: now,
            read: BTreeMap::new(),
            busy: BTreeSet::new(),
            promised: BTreeMap::new(),
            leaving: BTreeMap::new(),
            latest: BTreeMap::new(),
            resting: BTreeMap::new(),
            told: BTreeMap::new(),
            ended_by_taints: BTreeMap::new(),
            sweeping: BTreeMap::new(),
            tasks: Arc::new(Semaphore::new(TASKS_MAX)),
            done,
        }
    }

    /// Looks at everything once. Returns how long nothing needs another look by itself.
    pub(crate) fn pass(&mut self, now: Timestamp) -> Duration {
        let mut wake = Wake::new(now);
        let jobs = self.jobs();
        let (scene, turn) = self.changes(&jobs, &mut wake);
        // Put back below: it is lent to calls that change everything else.
        let (members, ready) = (std::mem::take(&mut self.members), std::mem::take(&mut self.ready));
        let is_lost = |name: &str| !ready.contains(name);
        self.settle_promises(&members, &mut wake);
        self.sweep_claims(&mut wake);
        self.heed_taints(&jobs);
        self.keep_replicas(&jobs, now, &mut wake);
        let mut wanting: Vec<&Job> = Vec::new();
        let mut between = BTreeSet::new();
        for (uid, job) in &jobs {
            let theirs = members.get(uid).map(Vec::as_slice).unwrap_or_default();
            match self.next(job, theirs, &is_lost, now, &mut wake) {
                // How many replicas there are is told before anything else is begun: one write at a time.
                Some(Next::Consider | Next::Nothing { .. })
                    if self.replicas.is_news(job) && !self.busy.contains(uid) =>
                {
                    self.write(job, job.status.clone());
                }
                Some(Next::Consider) => {
                    wanting.push(job);
                    continue;
                }
                None | Some(Next::Nothing { .. }) => {}
                Some(Next::Adopt) => {
                    self.call(job, |writer, job| async move { writer.adopt(&job).await.map(Some) })
                }
                Some(Next::Write(status)) => {
                    if !self.is_too_soon(job, &status, &mut wake) {
                        self.write(job, *status);
                    }
                }
                Some(Next::Remove(doomed)) => self.remove(job, doomed),
                Some(Next::Release) => self.call(job, |writer, job| async move {
                    writer.release(&job).await.map(|()| None)
                }),
            }
            if !phase(&job.status).is_terminal() && !job.is_deleting {
                between.insert(job.id.clone());
            }
        }
        (self.members, self.ready) = (members, ready);
        let guarded = self.guarded(&jobs);
        let scene = Scene { between, ..scene };
        self.decide(scene, turn, &jobs, wanting, &guarded, now, &mut wake);
        self.tell_queues(&jobs, &mut wake);
        self.told.retain(|uid, _| jobs.contains_key(uid));
        self.latest.retain(|uid, _| jobs.contains_key(uid));
        self.worlds.retain(|uid| jobs.contains_key(uid));
        if self.publish(&jobs, now) {
            // Figures are read at any time, and no older than this.
            wake.at_ms(Some(now.0 + FIGURES_MS));
        }
        wake.left()
    }

    /// Takes in what the ledger has new: the nodes of the scene, and the turn that it is of.
    fn changes(&mut self, jobs: &BTreeMap<String, Job>, wake: &mut Wake) -> (Scene, u64) {
        let mut books = self.stores.ledger.open();
        // Pods of a job that is gone are like anybody's, until the garbage collector comes.
        let gangs: BTreeSet<String> = jobs.keys().cloned().collect();
        for changed in gangs.symmetric_difference(&self.gangs) {
            books.touch_job(changed);
        }
        self.gangs = gangs;
        let changes = books.changes(&|uid| jobs.contains_key(uid), Instant::now());
        drop(books);
        if let Some(lapses) = changes.lapses {
            wake.at(lapses);
        }
        for (uid, members) in changes.members {
            if members.is_empty() {
                self.members.remove(&uid);
            } else {
                self.members.insert(uid, members);
            }
        }
        let mut scene = Scene::default();
        for now in &changes.nodes {
            if now.node.as_ref().is_some_and(|node| is_ready(node)) {
                self.ready.insert(now.name.clone());
            } else {
                self.ready.remove(&now.name);
            }
            self.see_taints(now);
            match self.fleet.update(&self.rules, now) {
                Ok(node) => scene.nodes.push(node),
                Err(gone) => scene.gone.push(gone),
            }
        }
        (scene, changes.turn)
    }

    /// Returns the uids of the jobs whose gangs a disruption budget guards.
    fn guarded(&self, jobs: &BTreeMap<String, Job>) -> BTreeSet<String> {
        let budgets = self.stores.budgets.state();
        if budgets.is_empty() {
            return BTreeSet::new();
        }
        let is_ours = |pod: &Pod| {
            let job = pod.metadata.labels.as_ref().and_then(|labels| labels.get(UID));
            job.is_some_and(|job| jobs.contains_key(job))
        };
        let pods = self.stores.pods.state();
        guarded(&budgets, pods.iter().map(AsRef::as_ref).filter(|pod| is_ours(pod)))
    }

    /// Returns what is to be done for one job; `None`: nothing, for a reason of our own.
    fn next(
        &mut self,
        job: &Job,
        members: &[Member],
        is_lost: &dyn Fn(&str) -> bool,
        now: Timestamp,
        wake: &mut Wake,
    ) -> Option<Next> {
        let uid = &job.uid;
        if let Some(until) = self.resting.get(uid) {
            if *until > Instant::now() {
                wake.at(*until);
                return None;
            }
            self.resting.remove(uid);
        }
        let is_busy = self.busy.contains(uid) || self.promised.contains_key(uid);
        let view = View {
            job,
            members,
            is_busy,
            told: self.worlds.told(uid, job.status.attempt),
            since_ms: self.since.0,
            is_lost,
            now_ms: now.0,
        };
        if !is_busy && let Some((attempt, why)) = self.leaving.get(uid) {
            let runs = matches!(phase(&job.status), JobPhase::Starting | JobPhase::Running);
            if runs && *attempt == job.status.attempt && !job.is_deleting {
                return Some(Next::Write(Box::new(evicted(&view, why))));
            }
            self.leaving.remove(uid);
        }
        let next = step(&view);
        if let Next::Nothing { at_ms } = &next {
            wake.at_ms(*at_ms);
        }
        Some(next)
    }

    /// Returns every job, as the watches show it or as we wrote it, whichever is newer.
    pub(crate) fn jobs(&mut self) -> BTreeMap<String, Job> {
        let mut jobs = BTreeMap::new();
        let mut before = std::mem::take(&mut self.read);
        let spaces = self.queues.of_namespaces(&self.stores.namespaces);
        for (kind, store) in &self.stores.jobs {
            for shown in store.state() {
                let Some(uid) = shown.metadata.uid.clone() else { continue };
                let object = match self.latest.get(&uid) {
                    Some(ours) if revision(ours) > revision(&shown) => ours,
                    _ => {
                        self.latest.remove(&uid);
                        &*shown
                    }
                };
                let version = object.metadata.resource_version.as_deref();
                let same = before.remove(&uid).filter(|was| {
                    Some(was.resource_version.as_str()) == version
                        && was.space_queue.as_ref() == spaces.get(&was.namespace)
                });
                let read = same.or_else(|| {
                    let mut job = Job::read(*kind, object)?;
                    let devices = &self.rules.devices;
                    job.hold_against(&self.writer.rules.host_paths, &|name| devices.is_gpu(name));
                    let queue = spaces.get(&job.namespace).cloned();
                    job.belongs_to(queue);
                    Some(job)
                });
                if let Some(job) = read {
                    jobs.insert(uid, job);
                }
            }
        }
        self.read.clone_from(&jobs);
        jobs
    }

    fn request(&self, job: &Job, guarded: &BTreeSet<String>) -> Option<Request> {
        let spec = job.spec.as_ref().ok()?;
        let mut request = request(&job.id, spec, job.created_ms, self.rules.devices.cpu_milli);
        request.settings.preemptible &= !guarded.contains(&job.uid);
        Some(request)
    }

    #[expect(clippy::too_many_arguments, reason = "what one pass has found, used once")]
    fn decide(
        &mut self,
        scene: Scene,
        turn: u64,
        jobs: &BTreeMap<String, Job>,
        mut wanting: Vec<&Job>,
        guarded: &BTreeSet<String>,
        now: Timestamp,
        wake: &mut Wake,
    ) {
        let known: BTreeMap<&JobId, &Job> = jobs.values().map(|job| (&job.id, job)).collect();
        let mut scene = Scene { queues: self.queues.read(&self.stores.queues), ..scene };
        if self.waits_for_guard(now, wake) {
            // What is bound beside us would not be held against what is promised here.
            let why = Explanation::new(Reason::NotYetConsidered, UNGUARDED);
            for job in wanting.drain(..) {
                scene.between.insert(job.id.clone());
                if now.0.saturating_sub(self.since.0) > UNGUARDED_MS {
                    self.tell_wait(job, &why, now, wake);
                }
            }
        }
        for (id, (attempt, devices)) in self.fleet.held() {
            let Some(job) = known.get(id) else { continue };
            let request = self.request(job, guarded).unwrap_or_else(|| unread(job, devices.len()));
            scene.holding.push(Holding {
                request,
                attempt: *attempt,
                devices: devices.clone(),
                started: Timestamp(job.status.launched_ms),
                is_running: phase(&job.status) == JobPhase::Running,
                checkpoint: job.status.checkpoint,
            });
        }
        for job in &wanting {
            let Some(request) = self.request(job, guarded) else { continue };
            scene.wanting.push(Wanting {
                request,
                attempt: Attempt(job.status.attempt + 1),
                not_before: Timestamp(job.status.not_before_ms),
            });
        }
        let decision = self.desk.look(scene, now);
        for checked in decision.start {
            if let Some(job) = known.get(&checked.plan().job)
                && let Err(why) = self.launch(job, &checked, turn, now)
            {
                // Another scheduler was faster, and the next pass knows what it took; or the core
                // does not know of a resource that the job wants beside its devices.
                tracing::info!(job = %job.id, %why, "a plan came too late");
                if job.template.extra() != Ask::default() {
                    self.resting.insert(job.uid.clone(), Instant::now() + EXTRA_REST);
                    let why = Explanation::new(Reason::WaitingForDevices, why);
                    self.tell_wait(job, &why, now, wake);
                }
                wake.at(Instant::now());
            }
        }
        for (id, attempt, why) in decision.leave {
            if let Some(job) = known.get(&id) {
                tracing::info!(job = %id, %why, "a gang is asked to leave");
                self.leaving.insert(job.uid.clone(), (attempt.0, why));
                wake.at(Instant::now());
            }
        }
        for job in wanting {
            if let Some(why) = self.desk.wait_of(&job.id).cloned() {
                self.tell_wait(job, &why, now, wake);
            }
        }
        wake.at_ms(decision.wake.map(|at| at.0));
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

    /// Whether gangs wait for the guard: for good where nothing may pass it, else for a moment.
    fn waits_for_guard(&self, now: Timestamp, wake: &mut Wake) -> bool {
        let Some(guard) = self.guard.as_ref().filter(|guard| !guard.holds()) else { return false };
        let until = self.since.0.saturating_add(UNGUARDED_MS);
        let is_early = now.0 <= until;
        if is_early {
            wake.at_ms(Some(until + 1));
        }
        is_early || guard.is_required()
    }

    /// Begins to launch a checked plan that was made on `turn` of the ledger.
    ///
    /// # Errors
    /// What has come between, in words: nothing was begun.
    fn launch(
        &mut self,
        job: &Job,
        checked: &CheckedJob,
        turn: u64,
        now: Timestamp,
    ) -> Result<(), String> {
        let plan = checked.plan();
        let attempt = plan.attempt.0;
        let spec = job.spec.as_ref().map_err(Clone::clone)?.at(plan.split);
        let extra = job.template.extra();
        let mut asks: BTreeMap<Option<String>, Arc<Ask>> = BTreeMap::new();
        let mut books = self.stores.ledger.open();
        let mut seats = Vec::new();
        let mut places = Vec::new();
        for assignment in &plan.assignments {
            let Some(node) = self.fleet.node_name(&assignment.device.node) else {
                return Err("a plan names a node that is not there".to_owned());
            };
            let (rank, device) = (assignment.rank.0, plan.gang.device);
            let Some((resource, slot)) = self.fleet.place(node, assignment.device.index) else {
                return Err("a plan names a device that is not there".to_owned());
            };
            let resource = (device != DeviceKind::Cpu).then(|| resource.to_owned());
            let of_rank = || Arc::new(ask(&self.writer.rules, &spec, resource.as_deref(), &extra));
            let ask = asks.entry(resource.clone()).or_insert_with(of_rank).clone();
            let claimed = resource.as_deref().filter(|resource| is_claimable(resource));
            let class = match claimed {
                Some(device) => match books.claims.class_of(device) {
                    Some(class) => Some(class.to_owned()),
                    None => return Err(format!("{device} is not published any more")),
                },
                None => None,
            };
            let (node, resource_too) = (node.to_owned(), resource.clone());
            seats.push(Seat { rank, node: node.clone(), resource: resource_too, class, slot });
            let held = Held {
                job: job.id.clone(),
                attempt: plan.attempt,
                rank,
                device,
                resource,
                node,
                slot: Some(slot),
            };
            let pod = (job.namespace.clone(), job.pod(attempt, rank));
            places.push(Place { pod, held, ask });
        }
        books.promise(&job.uid, places, &extra, turn)?;
        drop(books);
        let message = format!("attempt {attempt} is being bound to {} devices", seats.len());
        let why = Explanation::new(Reason::StartingRanks, message);
        let mut status = told(job, JobPhase::Starting, &why, now.0);
        status.attempt = attempt;
        status.launched_ms = now.0;
        status.running_since_ms = 0;
        status.checkpoint_at_launch = status.checkpoint;
        status.ranks = u32::try_from(seats.len()).unwrap_or(u32::MAX);
        status.ready = format!("0/{}", seats.len());
        self.replicas.count(job, &mut status);
        self.promised.insert(job.uid.clone(), Promise::new(job.clone(), attempt, seats.len()));
        let uid = job.uid.clone();
        self.spawn(job.clone(), move |writer, job| async move {
            let mut written = None;
            let answer = writer.launch(&job, &spec, attempt, &status, &seats, &mut written).await;
            Done::Launched { uid, answer, written }
        });
        Ok(())
    }

    /// Whether a status only tells that a run has come on, and the last one is not old enough.
    fn is_too_soon(&mut self, job: &Job, status: &JobStatus, wake: &mut Wake) -> bool {
        let mut without = status.clone();
        without.step = job.status.step;
        without.loss.clone_from(&job.status.loss);
        without.checkpoint = job.status.checkpoint;
        if without != job.status {
            return false;
        }
        match self.told.get(&job.uid) {
            Some(last) if last.elapsed() < PROGRESS_TOLD => {
                wake.at(*last + PROGRESS_TOLD);
                true
            }
            _ => {
                self.told.insert(job.uid.clone(), Instant::now());
                false
            }
        }
    }

    pub(crate) fn write(&mut self, job: &Job, mut status: JobStatus) {
        self.replicas.count(job, &mut status);
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
        self.busy.insert(uid.clone());
        self.spawn(job.clone(), move |writer, job| async move {
            Done::Written { uid, answer: work(writer, job).await }
        });
    }

    /// Carries something out beside the core, which hears of it when it is done.
    pub(crate) fn spawn<T, F, Fut>(&self, about: T, work: F)
    where
        T: Send + 'static,
        F: FnOnce(Writer, T) -> Fut + Send + 'static,
        Fut: Future<Output = Done> + Send,
    {
        let (writer, tasks, done) = (self.writer.clone(), self.tasks.clone(), self.done.clone());
        tokio::spawn(async move {
            // The semaphore is never closed.
            let _place = tasks.acquire_owned().await;
            // Whoever listens is gone only when the whole operator is.
            let _ = done.send(work(writer, about).await);
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
                self.was_launched(&uid, answer);
            }
            Done::TakenBack { uid, answer } => self.was_taken_back(&uid, answer, now),
            Done::Counted { uid, answer } => self.was_counted(&uid, answer),
            Done::Swept { uid, answer } => self.was_swept(uid, answer),
            Done::Replicas { key, answer } => self.was_kept(key, answer),
            Done::QueueTold { queue, answer } => self.queues.was_told(&queue, answer.is_ok()),
        }
    }

    fn rest(&mut self, uid: &str, error: &LaunchError) {
        if !error.is_conflict() {
            tracing::warn!(job = %uid, %error, "a call failed");
        }
        self.resting.insert(uid.to_owned(), Instant::now() + REST);
    }
}

/// Stands for what a job asked for whose spec is refused by now: it holds what it holds.
fn unread(job: &Job, ranks: usize) -> Request {
    let gang = Gang { ranks: u32::try_from(ranks).unwrap_or(u32::MAX), ..Gang::default() };
    Request {
        job: job.id.clone(),
        split: Parallelism { data: gang.ranks, ..Parallelism::SINGLE },
        gang,
        settings: GangSettings { preemptible: false, ..GangSettings::default() },
        submitted: Timestamp(job.created_ms),
    }
}

fn revision(object: &DynamicObject) -> u64 {
    let text = object.metadata.resource_version.as_deref();
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}
