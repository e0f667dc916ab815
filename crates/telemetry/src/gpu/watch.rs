//! Threads that look at the GPUs and wait for their errors, so that nobody else waits for a driver.

use std::ffi::OsString;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nvml_wrapper::Device;
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::event::EventSet;

use super::discover::{Gpu, Inventory};
use super::library::{self, Nvml, NvmlProblem};
use super::sample::{Eye, Sample};

/// Longest wait for the library to open and the GPUs to be found.
pub const OPEN_DEADLINE: Duration = Duration::from_secs(20);
/// Errors kept for a reader that does not fetch them; later ones only count.
const XIDS_MAX: usize = 256;
/// How long one wait for an error lasts, in milliseconds: how fast the thread ends.
const WAIT_MS: u32 = 500;

/// An error that the driver reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xid {
    /// NVML's number of the physical GPU.
    pub index: u32,
    /// NVIDIA's number for what happened; `None`: the driver did not say.
    pub code: Option<u64>,
}

/// The newest look at every GPU.
#[derive(Debug, Clone)]
pub struct Reading {
    /// When.
    pub at: Instant,
    /// In the order of the inventory.
    pub samples: Vec<Sample>,
}

#[derive(Debug)]
struct Shared {
    reading: Mutex<Option<Arc<Reading>>>,
    xids: Mutex<Receiver<Xid>>,
}

/// The GPUs of this machine, looked at until it is dropped.
#[derive(Debug)]
pub struct Watch {
    inventory: Inventory,
    shared: Arc<Shared>,
    /// Dropped with the watch: the threads see it and end.
    _stop: SyncSender<()>,
}

impl Watch {
    /// Opens NVML, finds the GPUs, and looks at them every `interval` from then on.
    ///
    /// # Errors
    /// [`NvmlProblem`]; also when the driver does not answer within [`OPEN_DEADLINE`], after which
    /// its thread is left behind: nothing can end a call into the driver.
    pub fn start(library: Option<OsString>, interval: Duration) -> Result<Self, NvmlProblem> {
        Self::start_within(library, interval, OPEN_DEADLINE)
    }

    /// As [`Self::start`], with another deadline.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_within(
        library: Option<OsString>,
        interval: Duration,
        deadline: Duration,
    ) -> Result<Self, NvmlProblem> {
        let (opened, opening) = sync_channel(1);
        let (stop, stopped) = sync_channel::<()>(0);
        let (xids_in, xids) = sync_channel(XIDS_MAX);
        let shared = Arc::new(Shared { reading: Mutex::new(None), xids: Mutex::new(xids) });
        let theirs = Arc::clone(&shared);
        let spawned = thread::Builder::new().name("nvml".to_owned()).spawn(move || {
            let nvml = match library::open(library.as_deref()) {
                Ok(nvml) => nvml,
                Err(problem) => return drop(opened.send(Err(problem))),
            };
            let inventory = match Inventory::look(&nvml) {
                Ok(inventory) => inventory,
                Err(error) => {
                    return drop(opened.send(Err(NvmlProblem::Refused(error.to_string()))));
                }
            };
            let gpus = inventory.gpus.clone();
            // Before anyone hears that it watches: an error from then on is told.
            let errors = register(&nvml, &gpus);
            if opened.send(Ok(inventory)).is_err() || gpus.is_empty() {
                return;
            }
            // Ends after the other thread: both use the same open library.
            let ended = AtomicBool::new(false);
            thread::scope(|scope| {
                if let Some(errors) = errors {
                    scope.spawn(|| wait_for_errors(errors, &gpus, &xids_in, &ended));
                }
                look_around(&nvml, &gpus, interval, &theirs, &stopped);
                ended.store(true, Ordering::Release);
            });
        });
        if let Err(error) = spawned {
            return Err(NvmlProblem::Refused(format!("no thread: {error}")));
        }
        let inventory = opening.recv_timeout(deadline).map_err(|_| {
            let waited = deadline.as_secs_f64();
            NvmlProblem::Refused(format!("the driver does not answer for {waited} s"))
        })??;
        Ok(Self { inventory, shared, _stop: stop })
    }

    /// Returns what was found at the start.
    #[must_use]
    pub fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// Returns the newest look; `None` before the first. An old one means that the driver hangs.
    #[must_use]
    pub fn latest(&self) -> Option<Arc<Reading>> {
        self.shared.reading.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes the errors that have come since the last call.
    #[must_use]
    pub fn take_errors(&self) -> Vec<Xid> {
        let xids = self.shared.xids.lock().unwrap_or_else(PoisonError::into_inner);
        xids.try_iter().collect()
    }
}

/// Looks at every GPU at once and then every `interval`.
fn look_around(
    nvml: &Nvml,
    gpus: &[Gpu],
    interval: Duration,
    shared: &Shared,
    stopped: &Receiver<()>,
) {
    let mut eyes: Vec<Option<Eye<'_>>> =
        gpus.iter().map(|gpu| handle(nvml, gpu).ok().map(|d| Eye::new(nvml, d))).collect();
    loop {
        let samples = eyes
            .iter_mut()
            .map(|eye| match eye {
                Some(eye) => eye.look(),
                None => Sample { lost: Some("cannot be opened".to_owned()), ..Sample::default() },
            })
            .collect();
        let reading = Arc::new(Reading { at: Instant::now(), samples });
        *shared.reading.lock().unwrap_or_else(PoisonError::into_inner) = Some(reading);
        match stopped.recv_timeout(interval) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Returns a GPU's handle, or that of its instance.
fn handle<'a>(nvml: &'a Nvml, gpu: &Gpu) -> Result<Device<'a>, NvmlError> {
    let whole = nvml.device_by_index(gpu.index)?;
    match gpu.mig {
        Some(number) => whole.mig_device_by_index(number),
        None => Ok(whole),
    }
}

/// Waits for errors of all GPUs until told to end.
fn wait_for_errors(set: EventSet<'_>, gpus: &[Gpu], xids: &SyncSender<Xid>, ended: &AtomicBool) {
    while !ended.load(Ordering::Acquire) {
        match set.wait(WAIT_MS) {
            Ok(event) => {
                let Some(xid) = event.event_data else { continue };
                let code = match xid {
                    XidError::Value(code) => Some(code),
                    XidError::Unknown => None,
                };
                let index = event.device.index().or_else(|_| {
                    let uuid = event.device.uuid()?;
                    let known = gpus.iter().find(|gpu| gpu.uuid == uuid);
                    known.map(|gpu| gpu.index).ok_or(NvmlError::NotFound)
                });
                if let Ok(index) = index {
                    let _ = xids.try_send(Xid { index, code });
                }
            }
            Err(NvmlError::Timeout) => {}
            // Waiting does not work: not a reason to spin.
            Err(_) => thread::sleep(Duration::from_millis(u64::from(WAIT_MS))),
        }
    }
}

/// Asks for the errors of every GPU that can tell any. A refusal takes the whole set with it, so the
/// others are asked again without the one that refused.
fn register<'a>(nvml: &'a Nvml, gpus: &[Gpu]) -> Option<EventSet<'a>> {
    let mut indices: Vec<u32> = gpus.iter().map(|gpu| gpu.index).collect();
    indices.dedup();
    while !indices.is_empty() {
        let mut set = Some(nvml.create_event_set().ok()?);
        let refused = indices.iter().position(|index| {
            let Some(taken) = set.take() else { return true };
            let registered = nvml.device_by_index(*index).ok().and_then(|device| {
                device.register_events(EventTypes::CRITICAL_XID_ERROR, taken).ok()
            });
            set = registered;
            set.is_none()
        });
        match refused {
            None => return set,
            Some(at) => drop(indices.remove(at)),
        }
    }
    None
}
