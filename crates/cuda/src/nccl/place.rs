//! Where a communicator's buffers are and its work is queued: a stream of a GPU, or, in tests, host
//! memory.
#![allow(unsafe_code, reason = "memory of a device is known by its address")]

use std::sync::Arc;

use cudarc::driver::{result, sys};

use crate::device::Device;

/// Memory and a stream of one device.
///
/// # Safety
/// Implementations hand out addresses that the library may read and write until they are freed, and
/// a stream that lives as long as they do.
pub unsafe trait Place: Send + Sync {
    /// Returns the stream on which work is queued.
    fn stream(&self) -> *mut std::ffi::c_void;

    /// Makes the device current for the calling thread.
    ///
    /// # Errors
    /// The driver's words.
    fn bind(&self) -> Result<(), String>;

    /// Makes what is queued from now on wait for what the device computes before.
    ///
    /// # Errors
    /// The driver's words.
    fn after_compute(&self) -> Result<(), String>;

    /// Makes what the device computes from now on wait for what is queued.
    ///
    /// # Errors
    /// The driver's words.
    fn before_compute(&self) -> Result<(), String>;

    /// Returns whether everything that was queued is done. Does not wait.
    ///
    /// # Errors
    /// The driver's words, when the device has failed.
    fn is_idle(&self) -> Result<bool, String>;

    /// Copies values from one place on the device to another, in the order of what it computes.
    ///
    /// # Safety
    /// There are `elements` at `from`, and there is room for them at `to`.
    ///
    /// # Errors
    /// The driver's words.
    unsafe fn copy_computed(&self, from: u64, to: u64, elements: usize) -> Result<(), String>;

    /// Allocates `elements` f32.
    ///
    /// # Errors
    /// The driver's words.
    fn allocate(&self, elements: usize) -> Result<u64, String>;

    /// Frees what [`Place::allocate`] returned.
    ///
    /// # Safety
    /// Nothing that is queued uses it any more.
    unsafe fn free(&self, address: u64);

    /// Copies host values to the device, in the order of the stream; returns when they are read.
    ///
    /// # Safety
    /// `to` has room for them.
    ///
    /// # Errors
    /// The driver's words.
    unsafe fn upload(&self, from: &[f32], to: u64) -> Result<(), String>;

    /// Copies values to the host after what is queued; returns when they are there.
    ///
    /// # Safety
    /// There are as many at `from`.
    ///
    /// # Errors
    /// The driver's words.
    unsafe fn download(&self, from: u64, to: &mut [f32]) -> Result<(), String>;
}

/// A buffer of a place.
pub(crate) struct Buffer {
    place: Arc<dyn Place>,
    address: u64,
    elements: usize,
}

impl Buffer {
    pub(crate) fn new(place: &Arc<dyn Place>, elements: usize) -> Result<Self, String> {
        // Never empty: some allocators have no address for nothing.
        let address = place.allocate(elements.max(1))?;
        Ok(Self { place: Arc::clone(place), address, elements })
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn elements(&self) -> usize {
        self.elements
    }

    /// Leaves the memory alone for ever: something that cannot be waited for may still use it.
    pub(crate) fn leak(self) {
        std::mem::forget(self);
    }

    pub(crate) fn upload(&self, from: &[f32]) -> Result<(), String> {
        assert!(from.len() <= self.elements, "a buffer is made to fit");
        // SAFETY: it has room, as was just asserted.
        unsafe { self.place.upload(from, self.address) }
    }

    pub(crate) fn download(&self, to: &mut [f32]) -> Result<(), String> {
        assert!(to.len() <= self.elements, "a buffer is made to fit");
        // SAFETY: it has as many, as was just asserted.
        unsafe { self.place.download(self.address, to) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: whoever queues work with a buffer keeps it until the work is done, or leaks it.
        unsafe { self.place.free(self.address) };
    }
}

/// A stream of its own beside the one on which a GPU computes.
#[derive(Debug)]
pub struct CudaPlace {
    device: Arc<Device>,
    stream: sys::CUstream,
    /// Told when the device has computed what an exchange waits for.
    computed: sys::CUevent,
    /// Told when an exchange is done.
    exchanged: sys::CUevent,
}

// SAFETY: the driver's handles may be used from any thread that has bound the context.
unsafe impl Send for CudaPlace {}
// SAFETY: as above; the driver locks what it must.
unsafe impl Sync for CudaPlace {}

impl CudaPlace {
    /// Makes a stream beside the one on which `device` computes.
    ///
    /// # Errors
    /// The driver's words.
    pub fn beside(device: &Arc<Device>) -> Result<Self, String> {
        device.bind().map_err(|error| error.to_string())?;
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let mut place = Self {
            device: Arc::clone(device),
            stream: std::ptr::null_mut(),
            computed: std::ptr::null_mut(),
            exchanged: std::ptr::null_mut(),
        };
        // What was made before a failure is destroyed with `place`.
        place.stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(told)?;
        place.computed = event().map_err(told)?;
        place.exchanged = event().map_err(told)?;
        Ok(place)
    }

    /// Makes what `second` is given from now on wait for what `first` has been given.
    fn join(
        &self,
        event: sys::CUevent,
        first: sys::CUstream,
        second: sys::CUstream,
    ) -> Result<(), String> {
        self.bind()?;
        // SAFETY: the event and both streams live as long as `self`. A wait means the newest record
        // at the time of the call, so the event can be used again at once.
        unsafe {
            result::event::record(event, first).map_err(told)?;
            let plain = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            result::stream::wait_event(second, event, plain).map_err(told)
        }
    }
}

impl Drop for CudaPlace {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        // SAFETY: nobody else has them. There is nothing to do about a failure. A stream on which
        // something hangs is not waited for: the driver frees it when that has ended.
        unsafe {
            for event in [self.computed, self.exchanged] {
                if !event.is_null() {
                    let _ = result::event::destroy(event);
                }
            }
            if !self.stream.is_null() {
                let _ = result::stream::destroy(self.stream);
            }
        }
    }
}

fn told(error: result::DriverError) -> String {
    error.to_string()
}

// SAFETY: addresses come from the driver's allocator, and the stream is held as long as `self`.
unsafe impl Place for CudaPlace {
    fn stream(&self) -> *mut std::ffi::c_void {
        self.stream.cast()
    }

    fn bind(&self) -> Result<(), String> {
        self.device.bind().map_err(|error| error.to_string())
    }

    fn after_compute(&self) -> Result<(), String> {
        self.join(self.computed, self.device.stream(), self.stream)
    }

    fn before_compute(&self) -> Result<(), String> {
        self.join(self.exchanged, self.stream, self.device.stream())
    }

    fn is_idle(&self) -> Result<bool, String> {
        self.bind()?;
        // SAFETY: the stream is held by `self`.
        match unsafe { sys::cuStreamQuery(self.stream) } {
            sys::CUresult::CUDA_SUCCESS => Ok(true),
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            error => Err(told(result::DriverError(error))),
        }
    }

    unsafe fn copy_computed(&self, from: u64, to: u64, elements: usize) -> Result<(), String> {
        self.bind()?;
        let bytes = elements * size_of::<f32>();
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.device.stream()) }.map_err(told)
    }

    fn allocate(&self, elements: usize) -> Result<u64, String> {
        self.bind()?;
        // SAFETY: a size that is not 0.
        unsafe { result::malloc_sync(elements * size_of::<f32>()) }.map_err(told)
    }

    unsafe fn free(&self, address: u64) {
        if self.bind().is_ok() {
            // SAFETY: the caller's promise. An error leaves the memory allocated, which harms nobody.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    unsafe fn upload(&self, from: &[f32], to: u64) -> Result<(), String> {
        self.bind()?;
        // SAFETY: the caller's promise; the source is read before the wait below is over.
        unsafe {
            result::memcpy_htod_async(to, from, self.stream).map_err(told)?;
            result::stream::synchronize(self.stream).map_err(told)
        }
    }

    unsafe fn download(&self, from: u64, to: &mut [f32]) -> Result<(), String> {
        self.bind()?;
        // SAFETY: the caller's promise; the target is written before the wait below is over.
        unsafe {
            result::memcpy_dtoh_async(to, from, self.stream).map_err(told)?;
            result::stream::synchronize(self.stream).map_err(told)
        }
    }
}
