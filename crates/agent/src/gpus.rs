//! This node's GPUs: which it offers, what was last seen of each, and whether it may be used.
//!
//! Joins the watch's threads to the pure judgement of [`crate::health`]. It waits for nothing.

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use drumline_telemetry::gpu::{Gpu, NvmlProblem, Reading, Sample, Watch};
use drumline_wire::v1;

use crate::health::memory::Memory;
use crate::health::{Signs, Verdict, judge};

/// How often every GPU is looked at.
const INTERVAL: Duration = Duration::from_secs(1);

/// Whether a node offers its GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Those that are there, if any.
    #[default]
    Auto,
    /// None.
    Off,
    /// The agent does not start without one.
    Required,
}

/// An error number that came since the last look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Happened {
    /// The node's devices that it is about: several when MIG divides the GPU.
    pub devices: Vec<u32>,
    /// The number; 0 when the driver gave none.
    pub code: u64,
}

/// A device's verdict that has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    /// The device's number on the node.
    pub device: u32,
    /// The verdict.
    pub verdict: Verdict,
}

/// The GPUs of this node. Without any it does nothing.
#[derive(Debug)]
pub struct Gpus {
    watch: Option<Watch>,
    /// Why there is none, unless the machine simply has no driver.
    problem: Option<NvmlProblem>,
    memory: Memory,
    /// The number of the first among the node's devices.
    first: u32,
    started: Instant,
    reading: Option<Arc<Reading>>,
    verdicts: Vec<Verdict>,
}

impl Gpus {
    /// Looks for GPUs, which blocks for as long as the driver takes, at most about 20 s. Their
    /// devices are numbered from `first`.
    ///
    /// # Errors
    /// [`NvmlProblem`] when they are required and cannot be used.
    pub fn find(
        policy: Policy,
        library: Option<OsString>,
        first: u32,
        state_dir: &Path,
    ) -> Result<Self, NvmlProblem> {
        let mut gpus = Self {
            watch: None,
            problem: None,
            memory: Memory::open(state_dir),
            first,
            started: Instant::now(),
            reading: None,
            verdicts: Vec::new(),
        };
        if policy == Policy::Off {
            return Ok(gpus);
        }
        match Watch::start(library, INTERVAL) {
            Ok(watch) if watch.inventory().gpus.is_empty() && policy == Policy::Required => {
                let silent = watch.inventory().silent.iter().map(|(_, why)| why.as_str()).next();
                let why = silent.unwrap_or("the driver knows of no GPU").to_owned();
                return Err(NvmlProblem::Refused(why));
            }
            Ok(watch) => {
                gpus.verdicts = vec![Verdict::default(); watch.inventory().gpus.len()];
                gpus.watch = Some(watch);
            }
            Err(problem) if policy == Policy::Required => return Err(problem),
            Err(problem) if problem.is_absent() => {}
            Err(problem) => {
                tracing::warn!(%problem, remedy = problem.remedy(), "no GPU is offered");
                gpus.problem = Some(problem);
            }
        }
        // What an earlier agent has seen counts from the start.
        gpus.look(Instant::now());
        Ok(gpus)
    }

    /// Returns the GPUs, in the order of their devices.
    #[must_use]
    pub fn list(&self) -> &[Gpu] {
        self.watch.as_ref().map_or(&[], |watch| &watch.inventory().gpus)
    }

    /// Returns GPUs that could not even be named when the agent started, with the cause.
    #[must_use]
    pub fn silent(&self) -> &[(u32, String)] {
        self.watch.as_ref().map_or(&[], |watch| &watch.inventory().silent)
    }

    /// Whether the machine is one NVLink domain.
    #[must_use]
    pub fn is_one_nvlink_domain(&self) -> bool {
        self.watch.as_ref().is_some_and(|watch| watch.inventory().is_one_nvlink_domain())
    }

    /// Returns the driver's version; empty without one.
    #[must_use]
    pub fn driver(&self) -> &str {
        self.watch.as_ref().map_or("", |watch| &watch.inventory().versions.driver)
    }

    /// Whether the last look worked; `None` where there is no driver to ask.
    #[must_use]
    pub fn works(&self, now: Instant) -> Option<bool> {
        match (&self.watch, &self.problem) {
            (Some(_), _) => Some(self.silence(now) < INTERVAL * 5),
            (None, Some(_)) => Some(false),
            (None, None) => None,
        }
    }

    /// Returns what the control plane is told of the devices.
    #[must_use]
    pub fn devices(&self) -> Vec<v1::AgentDevice> {
        let named = self.list().iter().enumerate().map(|(at, gpu)| v1::AgentDevice {
            index: self.first + at as u32,
            kind: "gpu".to_owned(),
            model: gpu.model.clone(),
            memory_bytes: gpu.memory_bytes,
            healthy: self.verdicts[at].action.is_usable(),
            message: self.verdicts[at].reason.clone(),
            matmul_flops: 0.0,
            uuid: gpu.uuid.clone(),
        });
        let after = self.first + self.list().len() as u32;
        let silent = self.silent().iter().zip(after..).map(|((number, why), index)| {
            // It has no name to be remembered by: it is never offered by this agent.
            v1::AgentDevice {
                index,
                kind: "gpu".to_owned(),
                message: format!("GPU {number} does not answer: {why}"),
                ..v1::AgentDevice::default()
            }
        });
        named.chain(silent).collect()
    }

    /// Takes in what was seen since the last call; returns the errors that came, and the verdicts
    /// that have changed.
    pub fn look(&mut self, now: Instant) -> (Vec<Happened>, Vec<Judged>) {
        let Some(watch) = &self.watch else { return (Vec::new(), Vec::new()) };
        let gpus = &watch.inventory().gpus;
        let mut happened = Vec::new();
        for error in watch.take_errors() {
            let code = error.code.unwrap_or(0);
            let mut devices = Vec::new();
            for (gpu, device) in gpus.iter().zip(self.first..) {
                if gpu.index == error.index {
                    self.memory.saw_error(&gpu.uuid, code);
                    devices.push(device);
                }
            }
            happened.push(Happened { devices, code });
        }
        self.reading = watch.latest();
        if let Some(reading) = &self.reading {
            for (gpu, sample) in gpus.iter().zip(&reading.samples) {
                if let Some(words) = &sample.lost {
                    self.memory.saw_loss(&gpu.uuid, words);
                }
            }
        }
        let verdicts: Vec<Verdict> =
            (0..gpus.len()).map(|at| judge(&self.signs(at, now))).collect();
        let judged = (self.first..)
            .zip(self.verdicts.iter().zip(&verdicts))
            .filter(|(_, (was, is))| was != is)
            .map(|(device, (_, is))| Judged { device, verdict: is.clone() })
            .collect();
        self.verdicts = verdicts;
        (happened, judged)
    }

    fn silence(&self, now: Instant) -> Duration {
        let heard = self.reading.as_ref().map_or(self.started, |reading| reading.at);
        now.saturating_duration_since(heard)
    }

    fn signs(&self, at: usize, now: Instant) -> Signs {
        let seen = self.memory.of(&self.list()[at].uuid);
        let sample = self.reading.as_ref().and_then(|reading| reading.samples.get(at));
        Signs {
            recovery: sample.and_then(|sample| sample.recovery),
            xids: seen.xids,
            lost: seen.lost,
            remap_pending: sample.and_then(|sample| sample.remap_pending).unwrap_or(false),
            remap_failed: sample.and_then(|sample| sample.remap_failed).unwrap_or(false),
            silent: self.silence(now),
        }
    }

    /// Returns every GPU with its device's number, its newest sample, and its verdict.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Gpu, Option<&Sample>, &Verdict)> {
        self.list().iter().enumerate().map(|(at, gpu)| {
            let sample = self.reading.as_ref().and_then(|reading| reading.samples.get(at));
            (self.first + at as u32, gpu, sample, &self.verdicts[at])
        })
    }

    /// Returns the UUID of a device that is a GPU.
    #[must_use]
    pub fn uuid(&self, device: u32) -> Option<&str> {
        let at = device.checked_sub(self.first)? as usize;
        self.list().get(at).map(|gpu| gpu.uuid.as_str())
    }

    /// Forgets what was seen of a device. What the driver still says counts at the next look.
    /// Returns whether there is such a GPU.
    pub fn clear(&mut self, device: u32) -> bool {
        let Some(uuid) = self.uuid(device).map(str::to_owned) else { return false };
        self.memory.clear(&uuid);
        true
    }

    /// Returns the sample of one device for a heartbeat.
    #[must_use]
    pub fn device_sample(&self, device: u32) -> Option<v1::DeviceSample> {
        let (_, _, sample, verdict) = self.iter().find(|(index, ..)| *index == device)?;
        Some(v1::DeviceSample {
            index: device,
            utilization: sample.and_then(Sample::busy).unwrap_or(0.0),
            memory_used_bytes: sample.and_then(|sample| sample.memory_used_bytes).unwrap_or(0),
            healthy: verdict.action.is_usable(),
            message: verdict.reason.clone(),
            action: verdict.action.as_str().to_owned(),
            ends_work: verdict.action.ends_work(),
        })
    }
}
