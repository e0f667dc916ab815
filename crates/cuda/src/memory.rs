//! Memory of a GPU: buffers of f32 or bf16 and their parts, raw bytes, small arrays of indices, and
//! scratch.
//!
//! The engine allocates all that it needs before its first step, so a buffer is one allocation of the
//! driver's. Scratch grows in the first step and not after it.
#![allow(unsafe_code, reason = "the driver is a C library")]

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::result;
use drumline_tensor::DType;

use crate::device::Device;
use crate::error::{CudaError, driver};

/// Bytes on the device, freed when dropped.
#[derive(Debug)]
pub(crate) struct Bytes {
    device: Arc<Device>,
    address: u64,
    bytes: usize,
}

impl Bytes {
    /// Allocates zeros. No bytes are no allocation.
    pub(crate) fn zeros(device: &Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        device.bind()?;
        let mut own = Self { device: Arc::clone(device), address: 0, bytes };
        if bytes == 0 {
            return Ok(own);
        }
        // SAFETY: the device's context is bound; the address is freed once, by `drop`.
        own.address =
            unsafe { result::malloc_sync(bytes) }.map_err(|error| match device.memory() {
                Ok((free, total)) if free < bytes => CudaError::OutOfMemory { bytes, free, total },
                _ => driver::<()>("cuMemAlloc", Err(error)).expect_err("it is an error"),
            })?;
        // SAFETY: the range was just allocated.
        driver("cuMemsetD8Async", unsafe {
            result::memset_d8_async(own.address, 0, bytes, device.stream())
        })?;
        Ok(own)
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    /// Copies host values to the start; returns when they may be changed again.
    pub(crate) fn put<T: Copy>(&self, from: &[T]) -> Result<(), CudaError> {
        assert!(size_of_val(from) <= self.bytes, "more than the allocation holds");
        copy_in(&self.device, self.address, from)
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if self.address != 0 && self.device.bind().is_ok() {
            // The driver waits for work that uses the range. A failure here is one of the device,
            // which its other operations tell.
            // SAFETY: nobody else has the address.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Copies host values to the device, in the stream's order. The driver has read pageable memory when
/// it returns.
pub(crate) fn copy_in<T: Copy>(device: &Device, to: u64, from: &[T]) -> Result<(), CudaError> {
    if from.is_empty() {
        return Ok(());
    }
    // SAFETY: the caller has checked that the range on the device is as long.
    driver("cuMemcpyHtoDAsync", unsafe { result::memcpy_htod_async(to, from, device.stream()) })
}

/// Copies from the device to the host, and waits.
pub(crate) fn copy_out<T: Copy>(device: &Device, from: u64, to: &mut [T]) -> Result<(), CudaError> {
    debug_assert!(!device.is_collecting(), "what is read may not have been made");
    if to.is_empty() {
        return Ok(());
    }
    // SAFETY: the caller has checked that the range on the device is as long; the host's range is
    // not touched until the stream is done.
    driver("cuMemcpyDtoHAsync", unsafe { result::memcpy_dtoh_async(to, from, device.stream()) })?;
    device.synchronise()
}

/// Host memory that the device's copies reach without a detour, where the system gives any: what
/// goes to other ranks over the host waits here.
#[derive(Debug, Default)]
pub(crate) struct Staging {
    pinned: Option<Pinned>,
    /// Where none can be had.
    plain: Vec<f32>,
}

impl Staging {
    /// Returns `elements` values, of no meaning. It grows, and is kept from call to call.
    pub(crate) fn take(&mut self, device: &Arc<Device>, elements: usize) -> &mut [f32] {
        if self.pinned.as_ref().is_none_or(|pinned| pinned.elements < elements) {
            // The old one first: locked memory is scarce.
            self.pinned = None;
            self.pinned = Pinned::new(device, elements.next_power_of_two());
        }
        match &mut self.pinned {
            Some(pinned) => &mut pinned.as_mut_slice()[..elements],
            None => {
                self.plain.resize(elements, f32::NAN);
                &mut self.plain
            }
        }
    }
}

/// Page-locked host memory, freed when dropped.
#[derive(Debug)]
struct Pinned {
    device: Arc<Device>,
    values: std::ptr::NonNull<f32>,
    elements: usize,
}

// SAFETY: it is memory like any other, and belongs to one owner.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(device: &Arc<Device>, elements: usize) -> Option<Self> {
        device.bind().ok()?;
        let bytes = elements.max(1) * size_of::<f32>();
        // SAFETY: what it holds is written below before anybody reads it.
        let memory = unsafe { result::malloc_host(bytes, 0) }.ok()?;
        let values = std::ptr::NonNull::new(memory.cast::<f32>())?;
        // SAFETY: the range was just allocated. All bits set are a value, if no number.
        unsafe { std::ptr::write_bytes(values.as_ptr().cast::<u8>(), 0xff, bytes) };
        Some(Self { device: Arc::clone(device), values, elements: elements.max(1) })
    }

    fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: so many values are there, all written, and `self` is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.values.as_ptr(), self.elements) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A copy from here may be under way.
        if self.device.synchronise().is_ok() {
            // SAFETY: nobody else has it, and no copy uses it any more.
            let _ = unsafe { result::free_host(self.values.as_ptr().cast()) };
        }
    }
}

/// How values of a buffer are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// f32.
    Wide,
    /// bf16.
    Narrow,
}

impl Kind {
    /// Returns the size of one value in bytes.
    pub(crate) fn bytes(self) -> usize {
        self.dtype().bytes()
    }

    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::Wide => DType::F32,
            Self::Narrow => DType::Bf16,
        }
    }

    pub(crate) fn is_narrow(self) -> bool {
        self == Self::Narrow
    }
}

/// A flat allocation on the device.
#[derive(Debug)]
pub struct Buffer {
    bytes: Bytes,
    elements: usize,
    kind: Kind,
}

impl Buffer {
    pub(crate) fn zeros(
        device: &Arc<Device>,
        elements: usize,
        kind: Kind,
    ) -> Result<Self, CudaError> {
        Ok(Self { bytes: Bytes::zeros(device, elements * kind.bytes())?, elements, kind })
    }

    pub(crate) fn elements(&self) -> usize {
        self.elements
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    fn at(&self, range: &Range<usize>) -> u64 {
        assert!(range.start <= range.end && range.end <= self.elements, "a part of the buffer");
        self.bytes.address() + (range.start * self.kind.bytes()) as u64
    }

    pub(crate) fn view(&self, range: Range<usize>) -> View<'_> {
        let (address, elements) = (self.at(&range), range.len());
        View { address, elements, kind: self.kind, buffer: PhantomData }
    }

    pub(crate) fn view_mut(&mut self, range: Range<usize>) -> ViewMut<'_> {
        let (address, elements) = (self.at(&range), range.len());
        ViewMut { address, elements, kind: self.kind, buffer: PhantomData }
    }
}

/// A part of a buffer that is read.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pub(crate) address: u64,
    pub(crate) elements: usize,
    pub(crate) kind: Kind,
    buffer: PhantomData<&'a Buffer>,
}

impl View<'_> {
    /// Returns the address of what an operation knows as f32 alone.
    pub(crate) fn wide(self, what: &'static str) -> u64 {
        assert_eq!(self.kind, Kind::Wide, "{what} is f32");
        self.address
    }
}

/// A part of a buffer that is written.
#[derive(Debug)]
pub struct ViewMut<'a> {
    pub(crate) address: u64,
    pub(crate) elements: usize,
    pub(crate) kind: Kind,
    buffer: PhantomData<&'a mut Buffer>,
}

impl<'a> ViewMut<'a> {
    pub(crate) fn split(self, at: usize) -> (Self, Self) {
        assert!(at <= self.elements, "a part of the view");
        let Self { address, elements, kind, buffer } = self;
        let second = address + (at * kind.bytes()) as u64;
        (
            Self { address, elements: at, kind, buffer },
            Self { address: second, elements: elements - at, kind, buffer },
        )
    }

    pub(crate) fn as_view(&self) -> View<'_> {
        let Self { address, elements, kind, .. } = *self;
        View { address, elements, kind, buffer: PhantomData }
    }

    /// As [`View::wide`].
    pub(crate) fn wide(&self, what: &'static str) -> u64 {
        self.as_view().wide(what)
    }
}

/// The bits of a kernel's `narrow` argument: the first operand's is bit 0.
pub(crate) fn narrow<const N: usize>(kinds: [Kind; N]) -> usize {
    kinds.iter().rev().fold(0, |bits, kind| 2 * bits + usize::from(kind.is_narrow()))
}

/// Arrays of indices that were sent to the device not long ago: positions and targets are asked for
/// by every layer, and are sent once.
#[derive(Debug, Default)]
pub(crate) struct Indices {
    /// The one that was used last is the last.
    sent: Vec<(Vec<u32>, Bytes)>,
}

impl Indices {
    /// How many are remembered.
    const KEPT: usize = 8;

    /// Returns where `values` are on the device. They stay there until eight other arrays have been
    /// sent; what reads them was launched by then, and the stream keeps the order.
    pub(crate) fn send(&mut self, device: &Arc<Device>, values: &[u32]) -> Result<u64, CudaError> {
        if let Some(found) = self.sent.iter().position(|(sent, _)| sent == values) {
            let entry = self.sent.remove(found);
            let address = entry.1.address();
            self.sent.push(entry);
            return Ok(address);
        }
        let wanted = size_of_val(values);
        let (mut host, mut bytes) = if self.sent.len() < Self::KEPT {
            (Vec::new(), Bytes::zeros(device, wanted)?)
        } else {
            self.sent.remove(0)
        };
        if bytes.len() < wanted {
            bytes = Bytes::zeros(device, wanted.next_power_of_two())?;
        }
        bytes.put(values)?;
        host.clear();
        host.extend_from_slice(values);
        let address = bytes.address();
        self.sent.push((host, bytes));
        Ok(address)
    }
}

/// Memory that one operation uses and the next one may: the stream keeps them apart.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    bytes: Option<Bytes>,
}

impl Scratch {
    /// Returns how large it has become.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.as_ref().map_or(0, Bytes::len)
    }

    /// Returns whether it is large enough for parts of these sizes.
    pub(crate) fn holds<const N: usize>(&self, sizes: &[usize; N]) -> bool {
        self.bytes() >= sizes.iter().map(|size| size.next_multiple_of(256)).sum()
    }

    /// Returns the addresses of parts of these sizes, each aligned to 256 bytes.
    pub(crate) fn parts<const N: usize>(
        &mut self,
        device: &Arc<Device>,
        sizes: [usize; N],
    ) -> Result<[u64; N], CudaError> {
        let mut total = 0;
        let starts = sizes.map(|size| {
            let start = total;
            total += size.next_multiple_of(256);
            start
        });
        if self.bytes.as_ref().is_none_or(|b| b.len() < total) {
            // The old one first: there may not be room for both. Freeing waits for its users.
            self.bytes = None;
            self.bytes = Some(Bytes::zeros(device, total.max(256))?);
        }
        let base = self.bytes.as_ref().map_or(0, Bytes::address);
        Ok(starts.map(|start| base + start as u64))
    }
}

/// Copies on the device, between views of one kind.
pub(crate) fn copy_on(device: &Device, from: View<'_>, to: &ViewMut<'_>) -> Result<(), CudaError> {
    debug_assert!(!device.is_collecting(), "what is copied may not have been made");
    let bytes = from.elements.min(to.elements) * from.kind.bytes();
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: both ranges are live and as long.
    driver("cuMemcpyDtoDAsync", unsafe {
        result::memcpy_dtod_async(to.address, from.address, bytes, device.stream())
    })
}
