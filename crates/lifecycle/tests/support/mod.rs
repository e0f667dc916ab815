//! A job, a fleet of two nodes with two devices each, and checked plans for them.

use drumline_audit::{CheckedJob, check};
use drumline_cluster::{Device, Node, Snapshot};
use drumline_lifecycle::{Action, Event, Join, Rendezvous, Report, State, Told, step};
use drumline_placement::{Constraints, JobPlan, Plan, place};
use drumline_spec::{DeviceKind, JobSpec, Parallelism, manifest};
use drumline_types::{Attempt, Bytes, JobId, NodeName, RankExit, RankIndex, RankPhase, Timestamp};

/// Returns a command of four ranks.
pub(crate) fn command(limit: u32) -> JobSpec {
    parse(&format!(
        "apiVersion: drumline.dev/v1alpha1\nkind: CommandJob\nmetadata: {{name: job}}\n\
         spec: {{argv: [\"true\"], ranks: 4, restarts: {{limit: {limit}, backoff: 1s}}}}\n"
    ))
}

/// Returns a training run of four ranks, with a watchdog of 60 s.
pub(crate) fn training(limit: u32) -> JobSpec {
    parse(&format!(
        "apiVersion: drumline.dev/v1alpha1\nkind: TrainingJob\nmetadata: {{name: job}}\n\
         spec: {{model: {{family: llama, layers: 2, hidden: 32, ffn: 64, heads: 4, vocab: 256, \
         context: 64}}, data: {{path: data}}, parallelism: {{tensor: 2, pipeline: 2}}, \
         batch: {{global: 4, micro: 1}}, steps: 10, watchdog: {{stall: 60s, start: 30s}}, \
         restarts: {{limit: {limit}, backoff: 1s}}}}\n"
    ))
}

/// Returns a service of two ranks.
#[allow(dead_code)]
pub(crate) fn service(limit: u32) -> JobSpec {
    parse(&format!(
        "apiVersion: drumline.dev/v1alpha1\nkind: ModelService\nmetadata: {{name: job}}\n\
         spec: {{model: m, servedName: m, parallelism: {{tensor: 2}}, watchdog: {{stall: 60s}}, \
         restarts: {{limit: {limit}, backoff: 1s}}}}\n"
    ))
}

fn parse(text: &str) -> JobSpec {
    let told = |mistakes: Vec<drumline_spec::Mistake>| {
        panic!("{}", mistakes.iter().map(|m| format!("{m}\n")).collect::<String>())
    };
    manifest::parse(text, "test").unwrap_or_else(told).remove(0)
}

/// Returns the job's id.
pub(crate) fn id() -> JobId {
    "job-1".parse().unwrap()
}

/// Returns the name of node `index`.
pub(crate) fn node(index: u32) -> NodeName {
    format!("node-{index}").parse().unwrap()
}

/// Returns a checked plan for `attempt` on an idle fleet.
pub(crate) fn checked(spec: &JobSpec, attempt: u32) -> CheckedJob {
    let mut fleet = Snapshot::new();
    for index in 0..2 {
        let device = || Device::new(DeviceKind::Cpu, "cpu", Bytes(1 << 30));
        fleet.upsert_node(Node::new(node(index), vec![device(), device()]));
    }
    let gang = spec.gang();
    let split = match &spec.work {
        drumline_spec::Work::TrainingJob(job) => job.parallelism,
        drumline_spec::Work::ModelService(service) => service.parallelism,
        drumline_spec::Work::CommandJob(command) => {
            Parallelism { data: command.ranks, ..Parallelism::SINGLE }
        }
    };
    let placed = place(&fleet, &gang, split, &Constraints::default()).unwrap();
    let job = JobPlan::new(&id(), Attempt(attempt), &gang, placed);
    let plan = Plan { parent: fleet.revision(), jobs: vec![job] };
    let checked = check(&fleet, &plan).unwrap();
    checked.jobs().next().unwrap()
}

/// Returns the event of a plan.
pub(crate) fn planned(spec: &JobSpec, attempt: u32) -> Event {
    let rendezvous = Rendezvous {
        secret: format!("secret-of-attempt-{attempt}"),
        master_addr: "127.0.0.1".to_owned(),
        master_port: 29_500,
    };
    Event::Planned { plan: checked(spec, attempt), rendezvous }
}

/// Returns the event of a rank's status.
pub(crate) fn status(attempt: u32, rank: u32, phase: RankPhase) -> Event {
    let code = match phase {
        RankPhase::Succeeded => Some(0),
        RankPhase::Failed => Some(1),
        _ => None,
    };
    ended(attempt, rank, phase, code, None, "", 0)
}

/// Returns the event of a rank's end.
pub(crate) fn ended(
    attempt: u32,
    rank: u32,
    phase: RankPhase,
    code: Option<i32>,
    signal: Option<i32>,
    message: &str,
    at: u64,
) -> Event {
    let rank = RankIndex(rank);
    let exit = RankExit { rank, code, signal, message: message.to_owned() };
    let told = Told { phase, pid: 7, exit, at: Timestamp(at) };
    Event::Status { attempt: Attempt(attempt), rank, told }
}

/// Returns the event of a rank that ended by a signal.
#[allow(dead_code)]
pub(crate) fn killed(attempt: u32, rank: u32, signal: i32, at: u64) -> Event {
    ended(attempt, rank, RankPhase::Failed, None, Some(signal), "", at)
}

/// Returns the event of a rank that joins.
pub(crate) fn joined(attempt: u32, rank: u32) -> Event {
    let join = Join {
        collective_address: format!("127.0.0.1:{}", 4000 + rank),
        inference_url: String::new(),
        host: "host".to_owned(),
    };
    Event::Joined { attempt: Attempt(attempt), rank: RankIndex(rank), join }
}

/// Returns the event of a report.
pub(crate) fn report(attempt: u32, rank: u32, step: u64, checkpoint: Option<u64>) -> Event {
    let checkpoint =
        checkpoint.map(|step| drumline_lifecycle::Checkpoint { step, path: format!("/c/{step}") });
    let report = Report { step, checkpoint, ..Report::default() };
    Event::Reported { attempt: Attempt(attempt), rank: RankIndex(rank), report }
}

/// A job that is fed events one by one.
pub(crate) struct Driver {
    pub(crate) spec: JobSpec,
    pub(crate) state: State,
    pub(crate) now: u64,
    pub(crate) actions: Vec<Action>,
}

#[allow(dead_code)]
impl Driver {
    pub(crate) fn new(spec: JobSpec) -> Self {
        let state = State::submitted(id(), Timestamp(0));
        Self { spec, state, now: 0, actions: Vec::new() }
    }

    /// Feeds one event and keeps the actions that it led to.
    pub(crate) fn feed(&mut self, event: Event) -> &mut Self {
        let (state, actions) = step(self.state.clone(), &self.spec, event, Timestamp(self.now));
        self.state = state;
        self.actions = actions;
        self
    }

    pub(crate) fn wait(&mut self, ms: u64) -> &mut Self {
        self.now += ms;
        self.feed(Event::Tick)
    }

    /// Plans the next attempt and lets every rank join.
    pub(crate) fn run(&mut self) -> &mut Self {
        let attempt = self.state.attempt.0 + 1;
        self.now = self.now.max(self.state.not_before.0);
        self.feed(planned(&self.spec.clone(), attempt));
        for rank in 0..self.state.ranks.len() as u32 {
            self.feed(status(attempt, rank, RankPhase::Started));
            if self.spec.kind() == drumline_spec::JobKind::CommandJob {
                self.feed(status(attempt, rank, RankPhase::Running));
            } else {
                self.feed(joined(attempt, rank));
            }
        }
        assert_eq!(self.state.phase, drumline_types::JobPhase::Running);
        self
    }

    /// Lets every rank that still lives end by the stop's SIGTERM.
    pub(crate) fn stop_the_rest(&mut self) -> &mut Self {
        let attempt = self.state.attempt.0;
        for rank in 0..self.state.ranks.len() as u32 {
            self.feed(ended(attempt, rank, RankPhase::Failed, None, Some(15), "", 9_999_999));
        }
        self
    }

    pub(crate) fn has(&self, wanted: impl Fn(&Action) -> bool) -> bool {
        self.actions.iter().any(wanted)
    }
}
