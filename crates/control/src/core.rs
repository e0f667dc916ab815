//! All jobs and nodes in memory, and what one input changes in them. No IO but messages to agents,
//! and those only after everything before them is durable.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use drumline_cluster::{Change, Request};
use drumline_lifecycle::{Action, Event, State, deadline, step};
use drumline_ports::store::Revision;
use drumline_spec::{JobKind, JobSpec, QueueSpec};
use drumline_types::{Attempt, JobId, JobPhase, NodeName, QueueName, Timestamp};
use drumline_wire::v1;
use drumline_wire::v1::agent_down::Kind as Down;
use drumline_wire::v1::agent_up::Kind as Up;

use crate::api::ApiError;
use crate::board::Board;
use crate::convert;
use crate::desk::Desk;
use crate::devices;
use crate::fleet::{Fleet, Holders};
use crate::identity;
use crate::job::{Job, Serving};
use crate::ledger::{Group, Loaded, Submission};
use crate::metrics::Metrics;
use crate::options::ReignEnded;
use crate::replicas::{ReplicaOf, Set};
use crate::view;

/// Ranks of one gang: its state must fit into one transaction of the store.
pub(crate) const RANKS_MAX: u32 = 2_000;
/// Jobs of one submission: it is one transaction.
pub(crate) const SUBMISSION_JOBS_MAX: usize = 40;
/// Jobs that have not ended. Each costs memory, and time in every decision.
pub(crate) const ACTIVE_JOBS_MAX: usize = 20_000;

/// A message to an agent that waits for what led to it to be durable.
#[derive(Debug)]
pub(crate) struct Send {
    pub(crate) node: NodeName,
    pub(crate) kind: Down,
}

/// A submission that waits to be written.
#[derive(Debug)]
pub(crate) struct NewJobs {
    pub(crate) ids: Vec<JobId>,
    pub(crate) key: String,
}

/// What of a job's state is compared with the next.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Was {
    pub(crate) phase: JobPhase,
    pub(crate) attempt: Attempt,
    pub(crate) restarts: u32,
    pub(crate) ran: bool,
    pub(crate) checkpoint: Option<u64>,
}

impl Was {
    fn of(state: &State) -> Self {
        Self {
            phase: state.phase,
            attempt: state.attempt,
            restarts: state.restarts,
            ran: state.running.is_some(),
            checkpoint: state.checkpoint.as_ref().map(|at| at.step),
        }
    }
}

/// Everything that one leader knows.
pub(crate) struct Core {
    pub(crate) jobs: BTreeMap<JobId, Job>,
    /// Jobs that have not ended.
    pub(crate) active: BTreeSet<JobId>,
    pub(crate) submissions: BTreeMap<String, Submission>,
    pub(crate) desk: Desk,
    /// Every queue that was made.
    pub(crate) queues: BTreeMap<QueueName, QueueSpec>,
    /// Queues whose stored part has changed.
    pub(crate) dirty_queues: BTreeSet<QueueName>,
    pub(crate) fleet: Fleet,
    pub(crate) metrics: Metrics,
    pub(crate) term: u64,
    /// No deadline of a gang is held against it before this moment: agents are still coming back.
    pub(crate) patience_until: Timestamp,
    /// Jobs whose stored part has changed.
    pub(crate) dirty: BTreeSet<JobId>,
    /// Jobs of which something has changed that readers see.
    pub(crate) stale: BTreeSet<JobId>,
    /// Jobs beside which devices are kept ready.
    pub(crate) spared: BTreeSet<JobId>,
    /// Replicas of services that have not ended, by service.
    pub(crate) sets: BTreeMap<JobId, Set>,
    pub(crate) new: Vec<NewJobs>,
    pub(crate) sends: Vec<Send>,
    pub(crate) events: Vec<v1::EventView>,
    /// The state that a plan was made from which failed its audit, to be saved.
    pub(crate) incident: Option<Box<drumline_scheduler::Saved>>,
    pub(crate) ended_jobs_max: usize,
}

impl Core {
    /// Begins a reign from what the store holds.
    pub(crate) fn recover(
        loaded: Loaded,
        fleet: Fleet,
        metrics: Metrics,
        term: u64,
        ended_jobs_max: usize,
        now: Timestamp,
    ) -> Self {
        let mut core = Self {
            jobs: BTreeMap::new(),
            active: BTreeSet::new(),
            submissions: loaded.submissions,
            desk: Desk::new(term),
            queues: BTreeMap::new(),
            dirty_queues: BTreeSet::new(),
            patience_until: now.plus_ms(fleet.grace_ms),
            fleet,
            metrics,
            term,
            dirty: BTreeSet::new(),
            stale: BTreeSet::new(),
            spared: BTreeSet::new(),
            sets: BTreeMap::new(),
            new: Vec::new(),
            sends: Vec::new(),
            events: Vec::new(),
            incident: None,
            ended_jobs_max,
        };
        core.recover_queues(loaded.queues, now);
        for (id, job) in loaded.jobs {
            let state = job.state();
            core.stale.insert(id.clone());
            core.events.extend(job.stored.notes.iter().map(|note| view::event(id.as_str(), note)));
            if !state.phase.is_terminal() {
                core.active.insert(id.clone());
            }
            if state.phase.holds_devices() {
                for node in state.nodes() {
                    core.fleet.expect(&node, now);
                }
                core.desk.apply(adopted(&id, &job), now);
                if !job.stored.spares.is_empty() {
                    let devices = job.stored.spares.clone();
                    core.desk.apply(Change::Spared { job: id.clone(), devices }, now);
                    core.spared.insert(id.clone());
                }
            } else if !state.phase.is_terminal() {
                core.desk.apply(submitted(&id, &job), now);
                if state.held {
                    core.desk.apply(Change::Held { job: id.clone(), held: true }, now);
                }
            }
            core.jobs.insert(id, job);
        }
        core.recover_replicas();
        core.events.sort_by_key(|event| event.at_ms);
        for id in core.active.clone() {
            core.apply(&id, Event::Recovered, now);
        }
        core
    }

    /// Feeds a job one event and takes what follows.
    pub(crate) fn apply(&mut self, id: &JobId, event: Event, now: Timestamp) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        let before = Was::of(job.state());
        // The placeholder lasts for this line only: a state is long, and is not copied.
        let placeholder = State::submitted(id.clone(), Timestamp(0));
        let state = std::mem::replace(&mut job.stored.state, placeholder);
        let (state, actions) = step(state, &job.spec, event, now);
        job.stored.state = state;
        for action in actions {
            self.act(id, action);
        }
        self.follow(id, &before, now);
    }

    fn act(&mut self, id: &JobId, action: Action) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        match action {
            Action::Persist => drop(self.dirty.insert(id.clone())),
            Action::Record(note) => {
                self.events.push(view::event(id.as_str(), &note));
                job.note(note);
                self.dirty.insert(id.clone());
            }
            Action::Launch => {
                job.remember_places();
                job.samples.clear();
                job.serving = crate::job::Serving::default();
                for node in job.stored.state.nodes() {
                    let launch = launch(job, job.state(), &node, &self.fleet, self.term);
                    self.sends.push(Send { node, kind: Down::Launch(launch) });
                }
            }
            Action::Stop { attempt, grace_ms, nodes } => {
                self.stop(id, attempt, grace_ms, false, nodes);
            }
            Action::Forget { attempt, nodes } => self.stop(id, attempt, 0, true, nodes),
            Action::SendWorld { nodes } => {
                let world = world(&job.stored.state);
                let to = |node| Send { node, kind: Down::World(world.clone()) };
                self.sends.extend(nodes.into_iter().map(to));
            }
        }
    }

    fn stop(
        &mut self,
        id: &JobId,
        attempt: Attempt,
        grace_ms: u64,
        forget: bool,
        nodes: Vec<NodeName>,
    ) {
        let stop = v1::StopGang { job: id.to_string(), attempt: attempt.0, grace_ms, forget };
        let to = |node| Send { node, kind: Down::Stop(stop.clone()) };
        self.sends.extend(nodes.into_iter().map(to));
    }

    /// Draws the conclusions of a job's new state for everything around it.
    fn follow(&mut self, id: &JobId, before: &Was, now: Timestamp) {
        let Some(job) = self.jobs.get(id) else { return };
        let phase = job.state().phase;
        self.stale.insert(id.clone());
        self.metrics.moved(before, job);
        let job_id = id.clone();
        let change = if phase.is_terminal() {
            self.active.remove(id).then_some(Change::Ended { job: job_id })
        } else if phase == JobPhase::Pending && before.phase != JobPhase::Pending {
            let (attempt, not_before) = (job.state().attempt.next(), job.state().not_before);
            Some(Change::Requeued { job: job_id, attempt, not_before })
        } else if job.state().running.is_some() && !before.ran {
            Some(Change::Running { job: job_id })
        } else if job.state().checkpoint.as_ref().map(|at| at.step) > before.checkpoint {
            Some(Change::Checkpointed { job: job_id })
        } else {
            None
        };
        if let Some(change) = change {
            self.fleet.changed |= before.phase.holds_devices() && !phase.holds_devices();
            self.desk.apply(change, now);
        }
    }

    /// Takes new jobs in, to be written with the next transaction.
    pub(crate) fn submit(
        &mut self,
        specs: Vec<JobSpec>,
        queues: Vec<QueueSpec>,
        user: &str,
        key: &str,
        hash: u64,
        now: Timestamp,
    ) -> Result<Vec<JobId>, ApiError> {
        if !key.is_empty()
            && let Some(known) = self.submissions.get(key)
        {
            return if known.hash == hash {
                Ok(known.jobs.clone())
            } else {
                Err(ApiError::Invalid(format!(
                    "idempotency key {key:?} was used with other manifests; choose a new key"
                )))
            };
        }
        let specs = self.choose_splits(specs)?;
        check_size(&specs)?;
        if self.active.len() + specs.len() > ACTIVE_JOBS_MAX {
            return Err(ApiError::Exhausted(format!(
                "{} jobs have not ended; at most {ACTIVE_JOBS_MAX} may",
                self.active.len()
            )));
        }
        self.put_queues(queues, now)?;
        let mut ids = Vec::new();
        for spec in specs {
            let message =
                format!("accepted from {}", if user.is_empty() { "a user" } else { user });
            ids.push(self.take_in(spec, user, None, message, now)?);
        }
        self.keep_replicas(now);
        if !key.is_empty() {
            let submission = Submission { jobs: ids.clone(), hash, at: now };
            self.submissions.insert(key.to_owned(), submission);
        }
        self.new.push(NewJobs { ids: ids.clone(), key: key.to_owned() });
        Ok(ids)
    }

    /// Takes one job in; whoever calls it has it written.
    pub(crate) fn take_in(
        &mut self,
        spec: JobSpec,
        user: &str,
        replica_of: Option<ReplicaOf>,
        message: String,
        now: Timestamp,
    ) -> Result<JobId, ApiError> {
        let id = self.fresh_id(&spec.name)?;
        self.metrics.submitted(spec.kind());
        let mut job = Job::new(spec, user, State::submitted(id.clone(), now));
        let why = crate::schedule::chosen(&job.spec);
        let chosen = (!why.is_empty()).then_some(("SplitChosen", why));
        for (reason, message) in [("Submitted", message)].into_iter().chain(chosen) {
            let note = drumline_lifecycle::Note {
                at: now,
                severity: drumline_lifecycle::Severity::Info,
                reason: reason.to_owned(),
                message,
                attempt: Attempt(0),
            };
            self.events.push(view::event(id.as_str(), &note));
            job.note(note);
        }
        if replica_of.is_none() && job.spec.kind() == JobKind::ModelService {
            self.sets.entry(id.clone()).or_default();
        }
        job.stored.replica_of = replica_of;
        self.desk.apply(submitted(&id, &job), now);
        self.jobs.insert(id.clone(), job);
        self.active.insert(id.clone());
        self.stale.insert(id.clone());
        Ok(id)
    }

    fn fresh_id(&self, name: &str) -> Result<JobId, ApiError> {
        for _ in 0..16 {
            match identity::job_id(name) {
                Some(id) if !self.jobs.contains_key(&id) => return Ok(id),
                Some(_) => {}
                None => break,
            }
        }
        Err(ApiError::Invalid(format!("no id can be made from the name {name:?}")))
    }

    /// Takes what an agent tells.
    pub(crate) fn told(&mut self, node: &NodeName, message: Up, now: Timestamp) {
        self.fleet.heard(node, &mut self.desk, now);
        match message {
            Up::RankStatus(status) => self.rank_status(node, &status, now),
            Up::Join(join) => self.joined(node, &join, now),
            Up::Report(report) => self.reported(&report, now),
            Up::Heartbeat(beat) => self.beat(node, beat, now),
            // A hello opens a stream and logs go their own way.
            Up::Hello(_) | Up::Log(_) => {}
        }
    }

    /// Returns the job if it has this attempt under way.
    fn current(&self, job: &str, attempt: u32) -> Option<JobId> {
        let id = job.parse::<JobId>().ok()?;
        let state = self.jobs.get(&id)?.state();
        (state.attempt.0 == attempt && state.phase.holds_devices()).then_some(id)
    }

    pub(crate) fn rank_status(&mut self, node: &NodeName, status: &v1::RankStatus, now: Timestamp) {
        let Some(id) = self.current(&status.job, status.attempt) else {
            // Nobody wants this rank: it ends, and its agent forgets it.
            let stop = v1::StopGang {
                job: status.job.clone(),
                attempt: status.attempt,
                grace_ms: 0,
                forget: true,
            };
            self.sends.push(Send { node: node.clone(), kind: Down::Stop(stop) });
            return;
        };
        let rank = drumline_types::RankIndex(status.rank);
        if let Some(told) = convert::told(status) {
            self.apply(&id, Event::Status { attempt: Attempt(status.attempt), rank, told }, now);
        }
    }

    fn joined(&mut self, node: &NodeName, join: &v1::JoinWorld, now: Timestamp) {
        let Some(id) = self.current(&join.job, join.attempt) else {
            let error = format!("attempt {} of {} is over", join.attempt, join.job);
            let world = v1::World {
                job: join.job.clone(),
                attempt: join.attempt,
                error,
                ..v1::World::default()
            };
            self.sends.push(Send { node: node.clone(), kind: Down::World(world) });
            return;
        };
        let rank = drumline_types::RankIndex(join.rank);
        let event =
            Event::Joined { attempt: Attempt(join.attempt), rank, join: convert::join(join) };
        self.apply(&id, event, now);
    }

    fn reported(&mut self, report: &v1::RankReport, now: Timestamp) {
        let Some(id) = self.current(&report.job, report.attempt) else { return };
        let rank = drumline_types::RankIndex(report.rank);
        let event = Event::Reported {
            attempt: Attempt(report.attempt),
            rank,
            report: convert::report(report),
        };
        self.apply(&id, event, now);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if let Some(train) = &report.train {
            let peak: f64 = job
                .stored
                .state
                .ranks
                .iter()
                .map(|rank| self.fleet.peak_flops(&rank.device.node, rank.device.index))
                .sum();
            let spec = Arc::clone(&job.spec);
            job.stored.training.take(&spec, report.step, train, peak, now);
        }
        if let Some(serve) = report.serve {
            let before = job.serving.last.unwrap_or_default();
            job.serving.take(report.step, serve, now);
            if let drumline_spec::Work::ModelService(service) = &job.spec.work {
                for (kind, was, is) in [
                    ("prompt", before.prompt_tokens_total, serve.prompt_tokens_total),
                    ("completion", before.completion_tokens_total, serve.completion_tokens_total),
                ] {
                    self.metrics.service_tokens(&service.served_name, kind, is.saturating_sub(was));
                }
            }
        }
    }

    /// Feeds the charts with a step's figures.
    pub(crate) fn chart(&self, board: &Board, report: &v1::RankReport, now: Timestamp) {
        let Some(id) = self.current(&report.job, report.attempt) else { return };
        let Some(job) = self.jobs.get(&id) else { return };
        if let (Some(train), drumline_spec::Work::TrainingJob(spec)) =
            (&report.train, &job.spec.work)
        {
            let (x, training) = (report.step as f64, &job.stored.training);
            let name = |what: &str| format!("job/{id}/{what}");
            if let Some(loss) = train.loss_validation.filter(|loss| *loss != 0.0) {
                board.point(&name("loss_validation"), x, loss);
            }
            if train.loss != 0.0 && train.loss.is_finite() {
                board.point(&name("loss"), x, train.loss);
                let rate = training.tokens_per_second(spec.tokens_per_step());
                board.point(&name("tokens_per_second"), x, rate);
                board.point(&name("mfu"), x, training.mfu);
                board.point(&name("grad_norm"), x, train.grad_norm);
                board.point(&name("learning_rate"), x, train.learning_rate);
                board.point(&name("step_seconds"), x, train.step_seconds);
            }
        }
        if report.serve.is_some()
            && let drumline_spec::Work::ModelService(service) = &job.spec.work
            && job.serving.last.is_some()
        {
            let name = |what: &str| format!("service/{}/{what}", service.served_name);
            let x = now.0 as f64;
            // One line for all replicas: what they do together.
            let all = self.serving_with(&id);
            let sum = |of: &dyn Fn(&Serving, &v1::ServeReport) -> f64| {
                all.iter().map(|(serving, last)| of(serving, last)).sum::<f64>()
            };
            let rate = sum(&|serving, _| serving.tokens_per_second);
            board.point(&name("tokens_per_second"), x, rate);
            board.point(&name("running"), x, sum(&|_, last| f64::from(last.running)));
            board.point(&name("waiting"), x, sum(&|_, last| f64::from(last.waiting)));
            let used = sum(&|_, last| last.kv_usage) / all.len().max(1) as f64;
            board.point(&name("kv_usage"), x, used);
        }
    }

    fn beat(&mut self, node: &NodeName, beat: v1::Heartbeat, now: Timestamp) {
        for sample in &beat.ranks {
            if let Some(id) = self.current(&sample.job, sample.attempt)
                && let Some(job) = self.jobs.get_mut(&id)
                && (sample.rank as usize) < job.stored.state.ranks.len()
            {
                job.samples.insert(sample.rank, sample.clone());
                self.stale.insert(id);
            }
        }
        let before = self.fleet.nodes.get(node).and_then(|record| record.heartbeat.as_ref());
        self.events.extend(devices::health_news(node, before, &beat.devices, now));
        let failed: Vec<_> = beat.devices.iter().filter(|s| s.ends_work).cloned().collect();
        // The scheduler learns first that the device is no place for the next attempt.
        self.fleet.beat(node, beat, &mut self.desk, now);
        self.judge_devices(node, &failed, now);
    }

    /// Moves on everything whose time has come.
    pub(crate) fn tick(&mut self, now: Timestamp) {
        for (node, message) in self.fleet.tick(&mut self.desk, now) {
            self.events.push(v1::EventView {
                at_ms: now.0,
                severity: "warning".to_owned(),
                reason: "NodeLost".to_owned(),
                message: format!("node {node} is given up: {message}"),
                node: node.to_string(),
                ..v1::EventView::default()
            });
            let holders: Vec<JobId> = self
                .active
                .iter()
                .filter(|id| self.jobs[*id].state().nodes().contains(&node))
                .cloned()
                .collect();
            for id in holders {
                let event = Event::NodeLost { node: node.clone(), message: message.clone() };
                self.apply(&id, event, now);
            }
        }
        let due: Vec<JobId> = self
            .active
            .iter()
            .filter(|id| self.job_deadline(id).is_some_and(|at| at <= now))
            .cloned()
            .collect();
        for id in due {
            self.apply(&id, Event::Tick, now);
        }
        self.keep_replicas(now);
    }

    fn job_deadline(&self, id: &JobId) -> Option<Timestamp> {
        let job = self.jobs.get(id)?;
        let at = deadline(job.state(), &job.spec)?;
        // When a waiting job may start is the scheduler's business.
        (job.state().phase != JobPhase::Pending).then(|| at.max(self.patience_until))
    }

    /// Returns the next moment at which [`Self::tick`] may change something.
    pub(crate) fn deadline(&self) -> Option<Timestamp> {
        let jobs = self.active.iter().filter_map(|id| self.job_deadline(id));
        let others = [self.fleet.deadline(), self.desk.wake(), self.replicas_due()];
        jobs.chain(others.into_iter().flatten()).min()
    }

    /// Lets figures grow old: a service that was not heard of late is not ready.
    pub(crate) fn age(&mut self, now: Timestamp) {
        for id in &self.active {
            let Some(job) = self.jobs.get_mut(id) else { continue };
            let heard = job.serving.heard;
            if let Some(last) = &mut job.serving.last
                && last.ready
                && !view::is_fresh(heard, now)
            {
                last.ready = false;
                job.serving.tokens_per_second = 0.0;
                self.stale.insert(id.clone());
            }
        }
    }

    /// Takes the writes that are due: new jobs in groups of their submission, others by themselves.
    pub(crate) fn take_writes(&mut self) -> Result<Vec<Group>, ReignEnded> {
        let mut groups = self.take_queue_writes()?;
        for new in std::mem::take(&mut self.new) {
            let mut group = Group::default();
            for id in &new.ids {
                if let Some(job) = self.jobs.get(id) {
                    group.put_job(id, job)?;
                }
                self.dirty.remove(id);
            }
            if let Some(submission) = self.submissions.get(&new.key) {
                group.put_submission(&new.key, submission)?;
            }
            groups.push(group);
        }
        for id in std::mem::take(&mut self.dirty) {
            let Some(job) = self.jobs.get(&id) else { continue };
            let mut group = Group::default();
            group.put_job(&id, job)?;
            groups.push(group);
        }
        Ok(groups)
    }

    /// Notes what was written.
    pub(crate) fn written(&mut self, revisions: Vec<(JobId, Revision)>) {
        for (id, revision) in revisions {
            if let Some(job) = self.jobs.get_mut(&id) {
                job.revision = Some(revision);
            }
        }
    }

    /// Takes out the oldest ended jobs beyond the limit; returns how to delete them.
    pub(crate) fn prune(&mut self) -> (Vec<Group>, Vec<JobId>) {
        let ended = self.jobs.len() - self.active.len();
        // In batches: not one transaction per job that ends.
        if ended <= self.ended_jobs_max + self.ended_jobs_max / 10 {
            return (Vec::new(), Vec::new());
        }
        let mut old: Vec<(Timestamp, JobId)> = self
            .jobs
            .iter()
            .filter(|(id, _)| !self.active.contains(*id))
            .map(|(id, job)| (job.state().finished.unwrap_or_default(), id.clone()))
            .collect();
        old.sort();
        old.truncate(ended - self.ended_jobs_max);
        let ids: Vec<JobId> = old.into_iter().map(|(_, id)| id).collect();
        let groups = ids
            .iter()
            .map(|id| {
                self.jobs.remove(id);
                self.stale.remove(id);
                let mut group = Group::default();
                group.delete_job(id);
                group
            })
            .collect();
        (groups, ids)
    }

    /// Returns every node as readers see it.
    pub(crate) fn node_views(&self, now: Timestamp) -> Vec<v1::NodeView> {
        let mut holders = Holders::new();
        for id in &self.active {
            for rank in &self.jobs[id].state().ranks {
                holders.insert((rank.device.node.clone(), rank.device.index), rank.rank.0);
            }
        }
        self.fleet.views(self.desk.fleet(), &holders, now)
    }
}

/// Returns a job as the scheduler sees it.
pub(crate) fn request(id: &JobId, spec: &JobSpec, submitted: Timestamp) -> Request {
    Request {
        job: id.clone(),
        gang: spec.gang(),
        split: spec.parallelism(),
        settings: spec.settings.clone(),
        submitted,
    }
}

fn submitted(id: &JobId, job: &Job) -> Change {
    let state = job.state();
    let request = Box::new(request(id, &job.spec, state.created));
    Change::Submitted { request, attempt: state.attempt.next(), not_before: state.not_before }
}

fn adopted(id: &JobId, job: &Job) -> Change {
    let state = job.state();
    Change::Adopted {
        request: Box::new(request(id, &job.spec, state.created)),
        attempt: state.attempt,
        devices: state.ranks.iter().map(|rank| rank.device.clone()).collect(),
        started: state.launched.unwrap_or(state.created),
    }
}

/// Checks that a submission can be stored.
pub(crate) fn check_size(specs: &[JobSpec]) -> Result<(), ApiError> {
    if specs.len() > SUBMISSION_JOBS_MAX {
        return Err(ApiError::Invalid(format!(
            "{} jobs in one submission; at most {SUBMISSION_JOBS_MAX} are stored together",
            specs.len()
        )));
    }
    for spec in specs {
        let ranks = spec.gang().ranks;
        if ranks > RANKS_MAX {
            return Err(ApiError::Invalid(format!(
                "{} has {ranks} ranks; at most {RANKS_MAX} are supported in one gang",
                spec.name
            )));
        }
    }
    let bytes: usize =
        specs.iter().map(|spec| serde_json::to_vec(spec).map_or(0, |json| json.len())).sum();
    let most = crate::ledger::BYTES_MAX / 2;
    if bytes > most {
        return Err(ApiError::Invalid(format!(
            "the specs have {bytes} bytes together; at most {most} are stored in one submission"
        )));
    }
    Ok(())
}

/// Returns the part of a gang's launch that one node carries out.
pub(crate) fn launch(
    job: &Job,
    state: &State,
    node: &NodeName,
    fleet: &Fleet,
    term: u64,
) -> v1::LaunchGang {
    // Nodes in the order of their first rank.
    let mut groups: Vec<&NodeName> = Vec::new();
    for rank in &state.ranks {
        if !groups.contains(&&rank.device.node) {
            groups.push(&rank.device.node);
        }
    }
    let threads = fleet.threads(node);
    let ranks = state
        .ranks
        .iter()
        .filter(|rank| rank.device.node == *node)
        .zip(0u32..)
        .map(|(rank, local_rank)| v1::LaunchRank {
            rank: rank.rank.0,
            local_rank,
            device: rank.device.index,
            tensor: rank.coords.tensor,
            pipeline: rank.coords.pipeline,
            data: rank.coords.data,
            threads,
        })
        .collect();
    v1::LaunchGang {
        job: state.job.to_string(),
        attempt: state.attempt.0,
        leader_term: term,
        ranks,
        spec_json: job.launch_spec(),
        world_size: state.ranks.len() as u32,
        secret: state.rendezvous.secret.clone(),
        master_addr: state.rendezvous.master_addr.clone(),
        master_port: u32::from(state.rendezvous.master_port),
        group_count: groups.len() as u32,
        group_rank: groups.iter().position(|group| *group == node).unwrap_or(0) as u32,
    }
}

fn world(state: &State) -> v1::World {
    let ranks = state
        .ranks
        .iter()
        .filter_map(|rank| {
            let join = rank.join.as_ref()?;
            Some(v1::WorldRank {
                rank: rank.rank.0,
                collective_address: join.collective_address.clone(),
                host: join.host.clone(),
            })
        })
        .collect();
    let (job, attempt) = (state.job.to_string(), state.attempt.0);
    v1::World { job, attempt, ranks, ..v1::World::default() }
}
