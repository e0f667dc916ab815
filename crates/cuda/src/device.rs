//! One GPU: its context, its stream, its memory and its kernels.
//!
//! Everything runs on one stream, in the order of the calls, so no operation needs an event; cudarc's
//! own event tracking is not used, for its buffers are not. What fails on the device is told by a
//! later call: the first failure is kept, later work is refused, and
//! [`Backend::status`](drumline_tensor::Backend::status) tells it.
#![allow(unsafe_code, reason = "the driver is a C library")]

use std::collections::BTreeMap;
use std::ffi::{CStr, c_void};
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaContext, result, sys};
use drumline_tensor::TensorError;

use crate::compile::{Compiler, SOURCES, Source};
use crate::error::{CudaError, driver};
use crate::graph::Call;
use crate::library::{self, Library};

/// The oldest driver that runs code of CUDA 13.0.
const DRIVER_MIN: i32 = 13_000;
/// The oldest compute capability with bf16 tensor cores.
const CAPABILITY_MIN: (i32, i32) = (8, 0);
/// Arguments that a kernel may have.
const ARGUMENTS_MAX: usize = 20;

/// How a GPU is opened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeviceOptions {
    /// Which GPU, in the driver's order.
    pub ordinal: usize,
    /// The folder of compiled kernels; without one they are compiled in every process.
    pub kernel_cache: Option<PathBuf>,
    /// Wait after every operation, so that a failure names the operation that caused it. Slow.
    pub check_each: bool,
}

/// What a GPU is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties {
    /// The driver's name for it.
    pub name: String,
    /// Its own name in the world, as `GPU-...` spells it out; of an instance where MIG divides it.
    pub uuid: [u8; 16],
    /// Compute capability.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that a block may ask for, in bytes.
    pub shared_max: u32,
    /// Memory, in bytes.
    pub memory: usize,
}

/// A stream; only ever used through its own context.
#[derive(Debug, Clone, Copy)]
struct Stream(sys::CUstream);
// SAFETY: the driver's handles may be used from any thread that has bound the context.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

#[derive(Debug, Clone, Copy)]
struct Module(sys::CUmodule);
// SAFETY: as for streams.
unsafe impl Send for Module {}

#[derive(Debug, Clone, Copy)]
struct Function {
    raw: sys::CUfunction,
    shared: u32,
}
// SAFETY: as for streams.
unsafe impl Send for Function {}

/// One GPU.
#[derive(Debug)]
pub struct Device {
    context: Arc<CudaContext>,
    stream: Stream,
    compiler: Compiler,
    check_each: bool,
    properties: Properties,
    modules: Mutex<BTreeMap<&'static str, Module>>,
    functions: Mutex<BTreeMap<&'static CStr, Function>>,
    failure: Mutex<Option<TensorError>>,
    /// Calls that wait to be made as one; none: each is made at once.
    collected: Mutex<Option<Vec<Call>>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded is a cache or a message: whole at every moment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts the GPUs that the driver shows.
///
/// # Errors
/// [`CudaError::Missing`], [`CudaError::TooOld`] or [`CudaError::Driver`].
pub fn count() -> Result<i32, CudaError> {
    if !library::present(Library::Driver) {
        return Err(CudaError::Missing(Library::Driver));
    }
    let mut got = 0;
    // SAFETY: writes one int.
    let version = unsafe { sys::cuDriverGetVersion(&raw mut got) }.result();
    driver("cuDriverGetVersion", version)?;
    if got < DRIVER_MIN {
        return Err(CudaError::TooOld { library: Library::Driver, got, needed: DRIVER_MIN });
    }
    driver("cuInit", result::init())?;
    driver("cuDeviceGetCount", result::device::get_count())
}

impl Device {
    /// Opens a GPU. No kernel is compiled before it is used.
    ///
    /// # Errors
    /// [`CudaError`]: what is missing, too old or not there.
    pub fn open(options: &DeviceOptions) -> Result<Arc<Self>, CudaError> {
        let count = count()?;
        let ordinal = options.ordinal;
        if usize::try_from(count).unwrap_or(0) <= ordinal {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let context = driver("cuDevicePrimaryCtxRetain", CudaContext::new(ordinal))?;
        let capability = driver("cuDeviceGetAttribute", context.compute_capability())?;
        let name = driver("cuDeviceGetName", context.name())?;
        if capability < CAPABILITY_MIN {
            let (major, minor) = capability;
            return Err(CudaError::Capability { name, major, minor });
        }
        use sys::CUdevice_attribute as Attribute;
        let attribute = |which| {
            let value = driver("cuDeviceGetAttribute", context.attribute(which))?;
            Ok::<_, CudaError>(u32::try_from(value).unwrap_or(0))
        };
        let properties = Properties {
            name,
            uuid: driver("cuDeviceGetUuid", context.uuid())?.bytes.map(|byte| byte as u8),
            capability,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1),
            shared_max: attribute(
                Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?,
            memory: driver("cuDeviceTotalMem", context.total_mem())?,
        };
        let stream = driver(
            "cuStreamCreate",
            result::stream::create(result::stream::StreamKind::NonBlocking),
        )?;
        Ok(Arc::new(Self {
            compiler: Compiler::new(capability, options.kernel_cache.as_deref()),
            context,
            stream: Stream(stream),
            check_each: options.check_each,
            properties,
            modules: Mutex::default(),
            functions: Mutex::default(),
            failure: Mutex::default(),
            collected: Mutex::default(),
        }))
    }

    /// Returns what the GPU is.
    #[must_use]
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// Returns the stream that everything runs on, for libraries that are to join its order.
    #[must_use]
    pub fn stream(&self) -> sys::CUstream {
        self.stream.0
    }

    /// Makes this GPU the one that the calling thread's driver calls mean.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn bind(&self) -> Result<(), CudaError> {
        driver("cuCtxSetCurrent", self.context.bind_to_thread())
    }

    /// Waits until all work is done.
    ///
    /// # Errors
    /// [`CudaError::Driver`]: perhaps of an earlier operation.
    pub fn synchronise(&self) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the stream lives as long as the device.
        driver("cuStreamSynchronize", unsafe { result::stream::synchronize(self.stream.0) })
    }

    /// Returns free and total memory in bytes.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        driver("cuMemGetInfo", self.context.mem_get_info())
    }

    /// Returns the first failure, if there was one.
    #[must_use]
    pub fn failure(&self) -> Option<TensorError> {
        locked(&self.failure).clone()
    }

    /// Does one operation's work, unless an earlier one has failed; keeps its failure with the
    /// operation's name and shape.
    pub(crate) fn perform<T: Default>(
        &self,
        operation: &'static str,
        shape: &dyn Debug,
        work: impl FnOnce() -> Result<T, CudaError>,
    ) -> T {
        if locked(&self.failure).is_some() {
            return T::default();
        }
        let done = self.bind().and_then(|()| work()).and_then(|value| {
            if self.check_each {
                self.synchronise()?;
            }
            Ok(value)
        });
        match done {
            Ok(value) => value,
            Err(error) => {
                let text = format!("{shape:?}");
                locked(&self.failure).get_or_insert_with(|| error.during(operation, &text));
                T::default()
            }
        }
    }

    /// Returns whether it waits after every operation.
    pub(crate) fn checks_each(&self) -> bool {
        self.check_each
    }

    /// Keeps calls from now on, until they are taken.
    pub(crate) fn collect(&self) {
        *locked(&self.collected) = Some(Vec::new());
    }

    /// Returns the calls that were kept, if calls are kept, and ends that.
    pub(crate) fn take_collected(&self) -> Option<Vec<Call>> {
        locked(&self.collected).take()
    }

    /// Returns whether calls are kept.
    pub(crate) fn is_collecting(&self) -> bool {
        locked(&self.collected).is_some()
    }

    /// Keeps a call if calls are kept; returns whether it did.
    pub(crate) fn keeps(&self, call: impl FnOnce() -> Call) -> bool {
        match &mut *locked(&self.collected) {
            Some(calls) => {
                calls.push(call());
                true
            }
            None => false,
        }
    }

    /// Launches a kernel.
    pub(crate) fn issue(&self, kernel: &Kernel) -> Result<(), CudaError> {
        let Kernel { function, shape, mut slots, count } = *kernel;
        let mut pointers = [std::ptr::null_mut::<c_void>(); ARGUMENTS_MAX];
        for (pointer, slot) in pointers.iter_mut().zip(&mut slots) {
            *pointer = std::ptr::from_mut(slot).cast();
        }
        // SAFETY: the arguments are as the kernel's source declares them, addresses are those of
        // live buffers of the extents that the caller has checked, and the driver copies the
        // arguments before it returns.
        let launched = unsafe {
            result::launch_kernel(
                function.0,
                shape.grid,
                (shape.threads, 1, 1),
                shape.shared,
                self.stream.0,
                &mut pointers[..count],
            )
        };
        driver("cuLaunchKernel", launched)
    }

    fn module(&self, source: Source) -> Result<sys::CUmodule, CudaError> {
        let mut modules = locked(&self.modules);
        if let Some(module) = modules.get(source.name) {
            return Ok(module.0);
        }
        let (code, _) = self.compiler.code(source)?;
        // SAFETY: the code is NVRTC's, whole by its digest.
        let loaded = unsafe { result::module::load_data(code.as_ptr().cast::<c_void>()) };
        let module = driver("cuModuleLoadData", loaded)?;
        modules.insert(source.name, Module(module));
        Ok(module)
    }

    /// Returns a kernel that may use `shared` bytes of shared memory.
    fn function(
        &self,
        source: &'static str,
        name: &'static CStr,
        shared: u32,
    ) -> Result<sys::CUfunction, CudaError> {
        if shared > self.properties.shared_max {
            return Err(CudaError::Unsupported(format!(
                "{name:?} needs {shared} bytes of shared memory, and a block has {} here",
                self.properties.shared_max
            )));
        }
        let mut functions = locked(&self.functions);
        let known = functions.get(name).copied();
        let mut function = match known {
            Some(function) => function,
            None => {
                let source = SOURCES.iter().find(|s| s.name == source).expect("a source of ours");
                let module = self.module(*source)?;
                // SAFETY: the module is loaded for as long as the device lives.
                let raw = unsafe { result::module::get_function(module, name.to_owned()) };
                // Blocks get 48 KiB without asking.
                Function { raw: driver("cuModuleGetFunction", raw)?, shared: 48 << 10 }
            }
        };
        if shared > function.shared {
            let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is live.
            let set = unsafe {
                result::function::set_function_attribute(
                    function.raw,
                    which,
                    i32::try_from(shared).unwrap_or(i32::MAX),
                )
            };
            driver("cuFuncSetAttribute", set)?;
            function.shared = shared;
        }
        functions.insert(name, function);
        Ok(function.raw)
    }

    /// Prepares a launch of kernel `name` of `source`.
    pub(crate) fn launch(&self, source: &'static str, name: &'static CStr) -> Launch<'_> {
        Launch { device: self, source, name, slots: [0; ARGUMENTS_MAX], count: 0 }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        // SAFETY: all that used them is gone. There is nothing to do about a failure.
        unsafe {
            let _ = result::stream::synchronize(self.stream.0);
            for module in locked(&self.modules).values() {
                let _ = result::module::unload(module.0);
            }
            let _ = result::stream::destroy(self.stream.0);
        }
    }
}

/// The blocks and threads of a launch, and the shared memory of a block in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub(crate) grid: (u32, u32, u32),
    pub(crate) threads: u32,
    pub(crate) shared: u32,
}

/// A launch: its arguments in the kernel's order, then [`Launch::go`].
pub(crate) struct Launch<'a> {
    device: &'a Device,
    source: &'static str,
    name: &'static CStr,
    slots: [u64; ARGUMENTS_MAX],
    count: usize,
}

impl Launch<'_> {
    fn put(mut self, bits: u64) -> Self {
        // Little-endian: a smaller argument is read from the slot's first bytes.
        self.slots[self.count] = bits;
        self.count += 1;
        self
    }

    /// A device address, or null.
    pub(crate) fn pointer(self, address: u64) -> Self {
        self.put(address)
    }

    pub(crate) fn u64(self, value: usize) -> Self {
        self.put(value as u64)
    }

    /// A count, which the kernels keep in 32 bits.
    pub(crate) fn u32(self, value: usize) -> Self {
        self.put(u64::from(u32::try_from(value).expect("shapes are below 2^32")))
    }

    pub(crate) fn flag(self, value: bool) -> Self {
        self.put(u64::from(value))
    }

    pub(crate) fn f32(self, value: f32) -> Self {
        self.put(u64::from(value.to_bits()))
    }

    /// Launches, or keeps the launch with others, unless there are no blocks.
    pub(crate) fn go(self, shape: Shape) -> Result<(), CudaError> {
        let (x, y, z) = shape.grid;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let function = self.device.function(self.source, self.name, shape.shared)?;
        let Self { device, slots, count, .. } = self;
        let kernel = Kernel { function: Entry(function), shape, slots, count };
        if device.keeps(|| Call::Kernel(kernel)) {
            return Ok(());
        }
        device.issue(&kernel)
    }
}

/// A kernel on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Entry(sys::CUfunction);
// SAFETY: as for streams.
unsafe impl Send for Entry {}

/// A launch, ready to be made: two that are equal do the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Kernel {
    function: Entry,
    shape: Shape,
    slots: [u64; ARGUMENTS_MAX],
    count: usize,
}
