//! The step loop of a serving gang: the leader decides and broadcasts, every rank runs.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use drumline_engine::EngineError;
use drumline_engine::infer::{
    Admission, Event, Follower, Leader, Limits, Load, Model, Request, RequestId,
};
use drumline_tensor::Backend;
use drumline_wire::{now_ms, v1};
use tokio::runtime::Handle;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use crate::RankError;
use crate::host::Host;

/// Commands on their way to the loop.
pub const COMMANDS_MAX: usize = 1024;
/// Between two steps of an idle gang: each proves that every rank is there.
const IDLE_INTERVAL: Duration = Duration::from_millis(500);
/// Older than this, a step is not "just now".
const FRESH_MS: u64 = 3000;
/// Between two reports to the agent.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// What the service asks of the loop.
#[derive(Debug)]
pub enum Command {
    /// A new request.
    Submit {
        /// What is asked for.
        request: Request,
        /// Takes the id, or why it is refused.
        reply: oneshot::Sender<Result<RequestId, Admission>>,
        /// Takes every event; holds as many as the request can have.
        events: mpsc::Sender<Timed>,
    },
    /// Nobody waits for this one any more.
    Cancel(RequestId),
}

/// An event, how long its request waited for a place in the batch, and how long its prompt took.
#[derive(Debug, Clone)]
pub struct Timed {
    /// The event.
    pub event: Event,
    /// Milliseconds in the queue.
    pub queue_ms: f64,
    /// Milliseconds from the place in the batch to the first event.
    pub prefill_ms: f64,
}

/// What the loop shows of itself.
#[derive(Debug)]
pub struct Shared {
    /// What the batcher may use.
    pub limits: Limits,
    last_step_ms: AtomicU64,
    stopped: AtomicBool,
    load: Mutex<Load>,
}

impl Shared {
    /// Shows a loop that has made no step yet.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            last_step_ms: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            load: Mutex::default(),
        }
    }

    /// Returns when every rank last finished a step, in milliseconds since the epoch.
    #[must_use]
    pub fn last_step_ms(&self) -> u64 {
        self.last_step_ms.load(Ordering::Relaxed)
    }

    /// Returns whether every rank finished a step just now.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        !self.stopped.load(Ordering::Relaxed)
            && now_ms().saturating_sub(self.last_step_ms()) < FRESH_MS
    }

    /// Returns how busy the batcher is.
    #[must_use]
    pub fn load(&self) -> Load {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn step_done(&self, load: Load) {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner) = load;
        self.last_step_ms.store(now_ms(), Ordering::Relaxed);
    }
}

/// Runs the leader's loop until the service's end of `inbox` is closed or a rank is lost.
///
/// # Errors
/// [`RankError`] when a rank is lost: all of the gang's requests end then.
pub fn lead<B: Backend>(
    model: Model<B>,
    inbox: mpsc::Receiver<Command>,
    shared: &Shared,
    host: &Host,
    runtime: &Handle,
) -> Result<(), RankError> {
    let mut desk = Desk {
        leader: Leader::new(model),
        inbox,
        clients: BTreeMap::new(),
        queue: VecDeque::new(),
        prompt_tokens: 0,
        completion_tokens: 0,
    };
    let mut last_report: Option<Instant> = None;
    let mut steps = 0;
    let outcome = loop {
        if !desk.take_commands(runtime) {
            // The server is gone: this process is being stopped.
            break desk.leader.stop().map_err(RankError::from);
        }
        if let Err(error) = desk.step() {
            break Err(error.into());
        }
        steps += 1;
        shared.step_done(desk.leader.load());
        if last_report.is_none_or(|last| last.elapsed() >= REPORT_INTERVAL) {
            last_report = Some(Instant::now());
            let report = desk.report(shared);
            host.report(|whole| {
                whole.step = steps;
                whole.serve = Some(report);
            });
        }
    };
    shared.stopped.store(true, Ordering::Relaxed);
    outcome
}

/// Runs what the leader decides, until it says stop.
///
/// # Errors
/// [`RankError`] when a rank is lost.
pub fn follow<B: Backend>(model: Model<B>) -> Result<(), RankError> {
    let mut follower = Follower::new(model);
    while follower.step()? {}
    Ok(())
}

/// The model's leader and the clients that wait for its events.
struct Desk<B: Backend> {
    leader: Leader<B>,
    inbox: mpsc::Receiver<Command>,
    clients: BTreeMap<RequestId, Client>,
    /// Requests that have no place in the batch yet, in their order.
    queue: VecDeque<RequestId>,
    prompt_tokens: u64,
    completion_tokens: u64,
}

struct Client {
    events: mpsc::Sender<Timed>,
    arrived: Instant,
    /// When it got its place.
    admitted: Option<Instant>,
    /// Set with the first event.
    prefill_ms: Option<f64>,
}

impl<B: Backend> Desk<B> {
    /// Takes what has come; waits a little when there is nothing else to do. False once nobody can
    /// send any more.
    fn take_commands(&mut self, runtime: &Handle) -> bool {
        if self.leader.is_idle() {
            // Made inside: a timer needs the runtime that it belongs to.
            let wait = async { tokio::time::timeout(IDLE_INTERVAL, self.inbox.recv()).await };
            match runtime.block_on(wait) {
                Ok(Some(command)) => self.command(command),
                Ok(None) => return false,
                Err(_) => {}
            }
        }
        while let Ok(command) = self.inbox.try_recv() {
            self.command(command);
        }
        !self.inbox.is_closed()
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Submit { request, reply, events } => {
                let prompt = request.prompt.len() as u64;
                let outcome = self.leader.submit(request);
                if let Ok(id) = outcome {
                    self.prompt_tokens += prompt;
                    let client = Client {
                        events,
                        arrived: Instant::now(),
                        admitted: None,
                        prefill_ms: None,
                    };
                    self.clients.insert(id, client);
                    self.queue.push_back(id);
                }
                if let (Err(Ok(id)), Ok(_)) = (reply.send(outcome.clone()), &outcome) {
                    self.forget(id);
                }
            }
            Command::Cancel(id) => self.forget(id),
        }
    }

    fn forget(&mut self, id: RequestId) {
        self.leader.cancel(id);
        self.clients.remove(&id);
        self.queue.retain(|waiting| *waiting != id);
    }

    fn step(&mut self) -> Result<(), EngineError> {
        let begin = Instant::now();
        let output = self.leader.step()?;
        // Requests are admitted in order, at the beginning of a step: those before the ones that
        // still wait have got a place.
        while self.queue.len() > self.leader.load().waiting {
            let Some(id) = self.queue.pop_front() else { break };
            if let Some(client) = self.clients.get_mut(&id) {
                client.admitted = Some(begin);
            }
        }
        self.hand_out(output.events);
        Ok(())
    }

    fn hand_out(&mut self, events: Vec<Event>) {
        for event in events {
            let id = event.request;
            let finished = event.finish.is_some();
            self.completion_tokens += u64::from(event.token.is_some());
            let Some(client) = self.clients.get_mut(&id) else { continue };
            let ms =
                |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1e3;
            let admitted = client.admitted.unwrap_or(client.arrived);
            let prefill_ms = *client.prefill_ms.get_or_insert_with(|| ms(admitted, Instant::now()));
            let timed = Timed { event, queue_ms: ms(client.arrived, admitted), prefill_ms };
            let gone = match client.events.try_send(timed) {
                Ok(()) => false,
                // Its channel holds as many events as it can have: full means that nobody reads.
                Err(TrySendError::Closed(_) | TrySendError::Full(_)) => true,
            };
            if finished {
                self.clients.remove(&id);
            } else if gone {
                self.forget(id);
            }
        }
    }

    fn report(&self, shared: &Shared) -> v1::ServeReport {
        let load = self.leader.load();
        let limits = shared.limits;
        let count = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        v1::ServeReport {
            ready: shared.is_ready(),
            running: count(load.running),
            waiting: count(load.waiting),
            kv_usage: load.blocks_used as f64 / load.blocks_total.max(1) as f64,
            prompt_tokens_total: self.prompt_tokens,
            completion_tokens_total: self.completion_tokens,
            max_context: count(limits.max_context),
            max_batch: count(limits.max_batch),
        }
    }
}
