//! The calls of a decoding step, made as one.
//!
//! A step of a small batch is hundreds of kernels of a few microseconds: queueing them one by one takes the
//! processor longer than the GPU takes to run them. Between two ends of `Backend::together` calls are
//! therefore kept instead of made. When the same calls come a second time, argument for argument, they are
//! captured as a CUDA graph, and from then on that graph is launched whenever they come again. Nothing is
//! assumed about a step: what differs in anything, for example by one more block of the cache or another
//! address, is made call by call as ever.
//!
//! What changes from step to step without changing the calls (tokens, positions, tables of blocks) is
//! sent to places that stay where they are.
#![allow(unsafe_code, reason = "the driver is a C library")]

use std::collections::VecDeque;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::Arc;

use cudarc::driver::{result, sys};

use crate::backend::{Cuda, locked};
use crate::device::{Device, Kernel};
use crate::error::{CudaError, driver};
use crate::matmul::Product;
use crate::memory::Bytes;

/// Graphs that are kept: one for each number of sequences and of spans of the cache that is met often.
const GRAPHS_MAX: usize = 32;
/// How many other runs of calls may come between two that are the same.
const REMEMBERED: usize = 64;
/// The least that an array of indices is given, in bytes: a sequence's blocks grow without moving it.
const PLACE: usize = 4096;

/// What the stream is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Call {
    /// A kernel of ours.
    Kernel(Kernel),
    /// A product of cuBLASLt's.
    Product(Product),
}

/// The graphs of one device, and the places of what its kept calls read.
#[derive(Debug, Default)]
pub(crate) struct Graphs {
    /// The one that was launched last is the last.
    kept: Vec<Graph>,
    /// Digests of runs of calls, the latest last.
    seen: VecDeque<u64>,
    places: Vec<(Vec<u32>, Bytes)>,
    /// Places that the calls that are being kept have.
    used: usize,
    /// The driver would not: nothing is kept any more.
    refused: bool,
    launched: u64,
}

#[derive(Debug)]
struct Graph {
    digest: u64,
    calls: Vec<Call>,
    exec: Exec,
}

/// A graph that can be launched.
#[derive(Debug)]
struct Exec {
    device: Arc<Device>,
    raw: sys::CUgraphExec,
}
// SAFETY: the driver's handles may be used from any thread that has bound the context.
unsafe impl Send for Exec {}

impl Drop for Exec {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made once, destroyed once; a run that is under way ends before.
            let _ = unsafe { result::graph::exec_destroy(self.raw) };
        }
    }
}

impl Graphs {
    /// Returns where `values` are on the device: the same place for the n-th array of every run.
    fn place(&mut self, device: &Arc<Device>, values: &[u32]) -> Result<u64, CudaError> {
        if let Some((_, bytes)) = self.places[..self.used].iter().find(|(sent, _)| sent == values) {
            return Ok(bytes.address());
        }
        let wanted = size_of_val(values).next_power_of_two().max(PLACE);
        if self.used == self.places.len() {
            self.places.push((Vec::new(), Bytes::zeros(device, wanted)?));
        }
        let (sent, bytes) = &mut self.places[self.used];
        if bytes.len() < wanted {
            *bytes = Bytes::zeros(device, wanted)?;
        }
        bytes.put(values)?;
        sent.clear();
        sent.extend_from_slice(values);
        self.used += 1;
        Ok(bytes.address())
    }

    /// Launches the graph of these calls, if there is one.
    fn launch(&mut self, digest: u64, calls: &[Call]) -> Result<bool, CudaError> {
        let is_it = |graph: &Graph| graph.digest == digest && graph.calls == calls;
        let Some(at) = self.kept.iter().position(is_it) else { return Ok(false) };
        let graph = self.kept.remove(at);
        let stream = graph.exec.device.stream();
        // SAFETY: it was made of these very calls, and what they were asked to read and write is live:
        // buffers are not dropped within `together`.
        let done = unsafe { result::graph::launch(graph.exec.raw, stream) };
        self.kept.push(graph);
        driver("cuGraphLaunch", done)?;
        self.launched += 1;
        Ok(true)
    }

    /// Returns whether a run of calls has come not long ago; from now on it has.
    fn has_seen(&mut self, digest: u64) -> bool {
        if self.seen.contains(&digest) {
            return true;
        }
        if self.seen.len() == REMEMBERED {
            self.seen.pop_front();
        }
        self.seen.push_back(digest);
        false
    }
}

impl Cuda {
    /// Keeps the calls that `f` leads to, and makes them as one.
    pub(crate) fn keep_together<R>(&self, f: impl FnOnce() -> R) -> R {
        let is_off = self.device.checks_each() || locked(&self.graphs).refused;
        if is_off || self.device.is_collecting() {
            return f();
        }
        locked(&self.graphs).used = 0;
        self.device.collect();
        let all = Collected(&self.device);
        let result = f();
        self.device.perform("together", &(), || match self.device.take_collected() {
            Some(calls) => self.make(calls),
            None => Ok(()),
        });
        drop(all);
        result
    }

    /// Makes the calls that were kept, one by one, and keeps no more of them: before what is not a call of
    /// the stream alone.
    pub(crate) fn settle(&self) -> Result<(), CudaError> {
        match self.device.take_collected() {
            Some(calls) => self.issue(&calls),
            None => Ok(()),
        }
    }

    /// Returns how many graphs were launched.
    #[must_use]
    pub fn graphs_launched(&self) -> u64 {
        locked(&self.graphs).launched
    }

    /// Where `values` are that kept calls read.
    pub(crate) fn place(&self, values: &[u32]) -> Result<u64, CudaError> {
        locked(&self.graphs).place(&self.device, values)
    }

    fn issue(&self, calls: &[Call]) -> Result<(), CudaError> {
        for call in calls {
            match call {
                Call::Kernel(kernel) => self.device.issue(kernel)?,
                Call::Product(product) => locked(&self.products).issue(product)?,
            }
        }
        Ok(())
    }

    fn make(&self, calls: Vec<Call>) -> Result<(), CudaError> {
        let digest = BuildHasherDefault::<DefaultHasher>::default().hash_one(&calls);
        let graphs = &mut *locked(&self.graphs);
        if graphs.launch(digest, &calls)? {
            return Ok(());
        }
        // The first time everything is loaded and planned, which a capture would not survive.
        if !graphs.has_seen(digest) {
            return self.issue(&calls);
        }
        match self.capture(&calls) {
            Ok(exec) => {
                if graphs.kept.len() == GRAPHS_MAX {
                    graphs.kept.remove(0);
                }
                graphs.kept.push(Graph { digest, calls: calls.clone(), exec });
                graphs.launch(digest, &calls).map(drop)
            }
            Err(error) => {
                graphs.refused = true;
                tracing::warn!(%error, "no CUDA graphs here: every kernel is launched by itself");
                self.issue(&calls)
            }
        }
    }

    /// Makes a graph of calls. Nothing of them is done.
    fn capture(&self, calls: &[Call]) -> Result<Exec, CudaError> {
        let stream = self.device.stream();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as the device.
        driver("cuStreamBeginCapture", unsafe { result::stream::begin_capture(stream, mode) })?;
        let issued = self.issue(calls);
        // SAFETY: as above. It ends the capture whatever became of it.
        let graph = driver("cuStreamEndCapture", unsafe { result::stream::end_capture(stream) })?;
        // SAFETY: the graph was just made; what can be launched no longer needs it.
        let made = unsafe {
            let made = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            made
        };
        let raw = driver("cuGraphInstantiate", made)?;
        let exec = Exec { device: Arc::clone(&self.device), raw };
        issued.map(|()| exec)
    }
}

/// Ends the keeping of calls, also where `f` has panicked over a wrong shape.
struct Collected<'a>(&'a Device);

impl Drop for Collected<'_> {
    fn drop(&mut self) {
        self.0.take_collected();
    }
}
