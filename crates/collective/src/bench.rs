//! Measures collectives between processes of one host, as `drumline bench collective` prints it.
//!
//! [`run`] starts the processes, of a command whose `main` calls [`worker`]; everything they need,
//! the secret included, goes through their standard input. Algorithm and bus bandwidth are as in
//! NVIDIA's nccl-tests (`doc/PERFORMANCE.md` there): bytes over time, and that times a factor
//! which makes the figure comparable to the speed of the links, whatever the number of ranks.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::host::{HostWorld, Listener, STREAMS_DEFAULT, WorldOptions};
use crate::{Collective, CollectiveError, ReduceOp};

/// An operation to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// [`Collective::all_reduce`], the sum.
    AllReduce,
    /// [`Collective::all_gather`]; bytes are of the gathered whole.
    AllGather,
    /// [`Collective::reduce_scatter`]; bytes are of the whole before.
    ReduceScatter,
    /// [`Collective::broadcast`] from rank 0.
    Broadcast,
    /// From rank 0 to rank 1 and back; the time is of one way.
    SendRecv,
    /// [`Collective::barrier`]; measured once, of no bytes.
    Barrier,
}

impl Op {
    /// Every operation.
    pub const ALL: [Self; 6] = [
        Self::AllReduce,
        Self::AllGather,
        Self::ReduceScatter,
        Self::Broadcast,
        Self::SendRecv,
        Self::Barrier,
    ];

    /// Returns the name, as in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::Broadcast => "broadcast",
            Self::SendRecv => "send_recv",
            Self::Barrier => "barrier",
        }
    }

    /// Bus bandwidth over algorithm bandwidth for `ranks` ranks.
    fn bus_factor(self, ranks: usize) -> f64 {
        let n = ranks as f64;
        match self {
            Self::AllReduce => 2.0 * (n - 1.0) / n,
            Self::AllGather | Self::ReduceScatter => (n - 1.0) / n,
            Self::Broadcast | Self::SendRecv | Self::Barrier => 1.0,
        }
    }
}

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Operations.
    pub ops: Vec<Op>,
    /// Sizes in bytes, rounded up to whole values (of which every rank has a part).
    pub sizes_bytes: Vec<usize>,
    /// Rounds of which the median is taken.
    pub rounds: usize,
    /// Length of a round in milliseconds, from which the repetitions in it follow.
    pub round_ms: u64,
    /// TCP connections between two ranks, where these share no memory.
    pub streams: usize,
}

impl Default for Options {
    /// Every operation, 1 KiB to 256 MiB in steps of four, seven rounds of 40 ms.
    fn default() -> Self {
        Self {
            ops: Op::ALL.to_vec(),
            sizes_bytes: (0..=9).map(|step| 1024 << (2 * step)).collect(),
            rounds: 7,
            round_ms: 40,
            streams: STREAMS_DEFAULT,
        }
    }
}

/// One operation at one size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// The operation.
    pub op: Op,
    /// Ranks that took part.
    pub ranks: usize,
    /// Size in bytes.
    pub bytes: usize,
    /// Median over the rounds of the mean time of a call on the slowest rank, in microseconds.
    pub latency_us: f64,
    /// The same of the best round.
    pub latency_best_us: f64,
    /// Bytes over the median, in GiB/s.
    pub algorithm_gibps: f64,
    /// The same times the bus factor of the operation.
    pub bus_gibps: f64,
    /// Calls in a round.
    pub repetitions: usize,
}

/// Why a benchmark failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A collective failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A rank could not be started or talked to.
    #[error("rank {rank}: {message}")]
    Rank {
        /// The rank.
        rank: usize,
        /// What went wrong.
        message: String,
    },
}

/// What is measured on one rank: calls on buffers of its own.
pub trait Subject {
    /// Makes buffers: one of `whole` values and one of `part`, which are zeros.
    ///
    /// # Errors
    /// [`CollectiveError`] when there is no room.
    fn prepare(&mut self, whole: usize, part: usize) -> Result<(), CollectiveError>;

    /// Makes one call, which may end later.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn call(&mut self, op: Op) -> Result<(), CollectiveError>;

    /// Waits for the end of all calls.
    ///
    /// # Errors
    /// [`CollectiveError`].
    fn finish(&mut self) -> Result<(), CollectiveError> {
        Ok(())
    }
}

/// Measures with the ranks of `c`, all of which call this with the same options; returns the same
/// figures on each.
///
/// # Errors
/// [`CollectiveError`] when a call fails.
pub fn measure(c: &dyn Collective, options: &Options) -> Result<Vec<Measurement>, CollectiveError> {
    measure_on(c, &mut Host { c, whole: Vec::new(), part: Vec::new() }, options)
}

/// As [`measure`], of calls on `subject`; `c` keeps the ranks in step.
///
/// # Errors
/// [`CollectiveError`] when a call fails.
pub fn measure_on(
    c: &dyn Collective,
    subject: &mut dyn Subject,
    options: &Options,
) -> Result<Vec<Measurement>, CollectiveError> {
    let mut measurements = Vec::new();
    for &op in &options.ops {
        let sizes = match op {
            Op::Barrier => &[0][..],
            _ => &options.sizes_bytes[..],
        };
        for &bytes in sizes {
            measurements.push(measure_one(c, subject, options, op, bytes)?);
        }
    }
    Ok(measurements)
}

fn measure_one(
    c: &dyn Collective,
    subject: &mut dyn Subject,
    options: &Options,
    op: Op,
    bytes: usize,
) -> Result<Measurement, CollectiveError> {
    let size = c.size();
    let part = bytes.div_ceil(4 * size);
    let whole = match op {
        Op::AllGather | Op::ReduceScatter => part * size,
        _ => bytes.div_ceil(4),
    };
    subject.prepare(whole, part)?;
    // Warm-up, which also says how long a call takes; rank 0 decides for all.
    subject.call(op)?;
    subject.finish()?;
    let mut repetitions = 1;
    let round = Duration::from_millis(options.round_ms.max(1));
    loop {
        let took = time_round(c, subject, op, repetitions)?;
        let mut enough = [if took * 2.0 >= round.as_secs_f64() { 1.0 } else { 0.0 }];
        c.broadcast(&mut enough, 0)?;
        if enough[0] != 0.0 || repetitions >= 1 << 20 {
            break;
        }
        repetitions *= 2;
    }
    let mut times = Vec::with_capacity(options.rounds);
    for _ in 0..options.rounds.max(1) {
        times.push(time_round(c, subject, op, repetitions)? / repetitions as f64);
    }
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let algorithm_gibps = (whole * 4) as f64 / median / f64::from(1 << 30);
    Ok(Measurement {
        op,
        ranks: size,
        bytes: whole * 4,
        latency_us: median * 1e6,
        latency_best_us: times[0] * 1e6,
        algorithm_gibps,
        bus_gibps: algorithm_gibps * op.bus_factor(size),
        repetitions,
    })
}

/// Values in host memory.
struct Host<'a> {
    c: &'a dyn Collective,
    whole: Vec<f32>,
    part: Vec<f32>,
}

impl Subject for Host<'_> {
    fn prepare(&mut self, whole: usize, part: usize) -> Result<(), CollectiveError> {
        self.whole = vec![0.0; whole];
        self.part = vec![0.0; part];
        Ok(())
    }

    fn call(&mut self, op: Op) -> Result<(), CollectiveError> {
        let c = self.c;
        match op {
            Op::AllReduce => c.all_reduce(&mut self.whole, ReduceOp::Sum),
            Op::AllGather => c.all_gather(&self.part, &mut self.whole),
            Op::ReduceScatter => c.reduce_scatter(&self.whole, &mut self.part),
            Op::Broadcast => c.broadcast(&mut self.whole, 0),
            Op::Barrier => c.barrier(),
            Op::SendRecv => match c.rank() {
                0 => c.send(&self.whole, 1).and_then(|()| c.recv(&mut self.whole, 1)),
                1 => c.recv(&mut self.whole, 0).and_then(|()| c.send(&self.whole, 0)),
                _ => Ok(()),
            },
        }
    }
}

/// Returns the seconds that the slowest rank took for so many calls.
fn time_round(
    c: &dyn Collective,
    subject: &mut dyn Subject,
    op: Op,
    repetitions: usize,
) -> Result<f64, CollectiveError> {
    c.barrier()?;
    let start = Instant::now();
    for _ in 0..repetitions {
        subject.call(op)?;
    }
    subject.finish()?;
    let mut took = start.elapsed().as_secs_f64() as f32;
    if op == Op::SendRecv {
        took /= 2.0;
    }
    let mut slowest = [took];
    c.all_reduce(&mut slowest, ReduceOp::Max)?;
    Ok(f64::from(slowest[0]))
}

/// What a worker is told first.
#[derive(Serialize, Deserialize)]
struct Setup {
    rank: usize,
    secret: Vec<u8>,
    shared_memory: bool,
    options: Options,
}

/// Runs as one rank of [`run`]: reads its part from `input`, prints its address and, as rank 0,
/// the figures to `output`.
///
/// # Errors
/// [`BenchError`] when the other end is not [`run`], or a collective fails.
pub fn worker(input: &mut dyn BufRead, output: &mut dyn Write) -> Result<(), BenchError> {
    worker_with(input, output, &mut |group, options| {
        Ok((measure(group.as_ref(), options)?, String::new()))
    })
}

/// Measures on one rank, and says in words how values went.
pub type Measure<'a> = &'a mut dyn FnMut(
    &Arc<dyn Collective>,
    &Options,
) -> Result<(Vec<Measurement>, String), CollectiveError>;

/// As [`worker`], which measures by `by`.
///
/// # Errors
/// As [`worker`].
pub fn worker_with(
    input: &mut dyn BufRead,
    output: &mut dyn Write,
    by: Measure<'_>,
) -> Result<(), BenchError> {
    let setup: Setup = read_line(input, 0)?;
    let rank = setup.rank;
    let listener = Listener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST))?;
    write_line(output, rank, &listener.address())?;
    let addresses: Vec<SocketAddr> = read_line(input, rank)?;
    let everyone: Vec<usize> = (0..addresses.len()).collect();
    let mut options = WorldOptions::new(rank, addresses, setup.secret);
    options.shared_memory = setup.shared_memory;
    options.streams = setup.options.streams;
    let world = HostWorld::connect(listener, &options)?;
    let group: Arc<dyn Collective> = world.group(&everyone, 0)?;
    let measured = by(&group, &setup.options)?;
    group.barrier()?;
    if rank == 0 {
        write_line(output, rank, &measured)?;
    }
    Ok(())
}

fn failed(rank: usize, error: impl std::fmt::Display) -> BenchError {
    BenchError::Rank { rank, message: error.to_string() }
}

fn read_line<T: serde::de::DeserializeOwned>(
    input: &mut dyn BufRead,
    rank: usize,
) -> Result<T, BenchError> {
    let mut line = String::new();
    input.read_line(&mut line).map_err(|error| failed(rank, error))?;
    serde_json::from_str(&line).map_err(|error| failed(rank, error))
}

fn write_line<T: Serialize>(
    output: &mut dyn Write,
    rank: usize,
    value: &T,
) -> Result<(), BenchError> {
    let line = serde_json::to_string(value).map_err(|error| failed(rank, error))?;
    writeln!(output, "{line}").and_then(|()| output.flush()).map_err(|error| failed(rank, error))
}

/// A worker process, ended when dropped.
struct Worker {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Fails when it has ended already, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Measures between `ranks` processes, each started from `command(rank)`, which must run
/// [`worker`] on its standard input and output.
///
/// # Errors
/// [`BenchError`] when a process cannot be started or ends early.
pub fn run(
    ranks: usize,
    shared_memory: bool,
    options: &Options,
    command: impl FnMut(usize) -> Command,
) -> Result<Vec<Measurement>, BenchError> {
    run_told(ranks, shared_memory, options, command).map(|(measurements, _)| measurements)
}

/// As [`run`]; returns also what rank 0 says of the way that values went.
///
/// # Errors
/// As [`run`].
pub fn run_told(
    ranks: usize,
    shared_memory: bool,
    options: &Options,
    mut command: impl FnMut(usize) -> Command,
) -> Result<(Vec<Measurement>, String), BenchError> {
    let mut secret = vec![0; 32];
    getrandom::fill(&mut secret).map_err(|error| failed(0, error))?;
    let mut workers = Vec::with_capacity(ranks);
    for rank in 0..ranks {
        let mut child = command(rank)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| failed(rank, error))?;
        let output = child.stdout.take();
        let output = output.ok_or_else(|| failed(rank, "has no standard output"))?;
        let mut worker = Worker { child, output: BufReader::new(output) };
        let setup = Setup { rank, secret: secret.clone(), shared_memory, options: options.clone() };
        worker.tell(rank, &setup)?;
        workers.push(worker);
    }
    let mut addresses: Vec<SocketAddr> = Vec::with_capacity(ranks);
    for (rank, worker) in workers.iter_mut().enumerate() {
        addresses.push(read_line(&mut worker.output, rank)?);
    }
    for (rank, worker) in workers.iter_mut().enumerate() {
        worker.tell(rank, &addresses)?;
    }
    let measured = read_line(&mut workers[0].output, 0)?;
    for (rank, worker) in workers.iter_mut().enumerate() {
        let status = worker.child.wait().map_err(|error| failed(rank, error))?;
        if !status.success() {
            return Err(failed(rank, status));
        }
    }
    Ok(measured)
}

impl Worker {
    fn tell<T: Serialize>(&mut self, rank: usize, value: &T) -> Result<(), BenchError> {
        match &mut self.child.stdin {
            Some(stdin) => write_line(stdin, rank, value),
            None => Err(failed(rank, "has no standard input")),
        }
    }
}
