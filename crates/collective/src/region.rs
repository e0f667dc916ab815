//! Memory that ranks of one host share: an unnamed file in memory, sealed, mapped by its peers.
//!
//! Nothing of it has a name in a file system, so that a rank that is killed leaves nothing
//! behind: the memory goes with the last mapping.
#![expect(unsafe_code, reason = "mappings and views into memory that another process writes")]

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fd::OwnedFd;
use rustix::mm::{MapFlags, ProtFlags};

/// What a peer needs in order to map a region: only of use to the same user on the same host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) pid: u32,
    pub(crate) fd: u32,
    /// Length of the region in bytes.
    pub(crate) len: u64,
    /// Also at the start of the region: proves that what was opened is what was offered.
    pub(crate) nonce: [u8; 16],
}

/// A readable, writable mapping, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory, valid from any thread until dropped. All access goes
// through raw pointers and atomics under the protocols of `ring`, `mailbox` and `bell`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn of(base: *mut core::ffi::c_void, len: usize) -> io::Result<Self> {
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    /// Maps fresh zeroed memory of this process alone. Pages cost nothing until touched.
    pub(crate) fn private(len: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | no_reserve();
        // SAFETY: a new mapping, at an address of the system's choice, overlaps nothing.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )?
        };
        Self::of(base, len)
    }

    /// Maps `len` bytes of `file` from `offset`, a multiple of the page size.
    fn shared(file: &OwnedFd, offset: u64, len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping, at an address of the system's choice, overlaps nothing. The file
        // is sealed against shrinking (checked by the caller), so every page stays backed.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                offset,
            )?
        };
        Self::of(base, len)
    }

    /// Returns a pointer to `len` bytes at `offset`.
    ///
    /// # Panics
    /// When they are not within the mapping: layouts are constants, so that is a bug.
    pub(crate) fn bytes(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// Returns the 32-bit word at `offset`.
    pub(crate) fn word32(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4));
        // SAFETY: in bounds (checked), aligned (mappings are page-aligned), valid for the
        // mapping's life, and every process accesses it as an atomic only.
        unsafe { &*self.bytes(offset, 4).cast::<AtomicU32>() }
    }

    /// Returns the 64-bit word at `offset`.
    pub(crate) fn word64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8));
        // SAFETY: as in `word32`.
        unsafe { &*self.bytes(offset, 8).cast::<AtomicU64>() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this mapping, whole; views of it hold it in an `Arc`. It cannot fail for a
        // mapping that exists, and there is nothing to do if it does.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(target_os = "linux")]
fn no_reserve() -> MapFlags {
    MapFlags::NORESERVE
}

#[cfg(not(target_os = "linux"))]
fn no_reserve() -> MapFlags {
    MapFlags::empty()
}

/// Returns what two processes must have in common to be able to share memory; none where that
/// cannot work at all.
#[cfg(target_os = "linux")]
pub(crate) fn host_identity() -> Option<[u8; 32]> {
    use sha2::{Digest, Sha256};
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
    let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?;
    let mut hash = Sha256::new();
    hash.update(&boot);
    hash.update(namespace.as_os_str().as_encoded_bytes());
    Some(hash.finalize().into())
}

/// Returns none: sharing memory needs Linux.
#[cfg(not(target_os = "linux"))]
pub(crate) fn host_identity() -> Option<[u8; 32]> {
    None
}

/// Creates a region of `len` zeroed bytes and what its peers need to map it. The file must be kept
/// open until they have.
#[cfg(target_os = "linux")]
pub(crate) fn create(len: usize) -> io::Result<(Arc<Mapping>, OwnedFd, Offer)> {
    use rustix::fd::AsRawFd;
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("drumline-collective", flags)?;
    ftruncate(&file, len as u64)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let mapping = Mapping::shared(&file, 0, len)?;
    let mut nonce = [0; 16];
    getrandom::fill(&mut nonce).map_err(io::Error::other)?;
    // SAFETY: in bounds (checked by `bytes`); no peer knows of the region yet.
    unsafe { std::ptr::copy_nonoverlapping(nonce.as_ptr(), mapping.bytes(0, 16), 16) };
    let offer = Offer {
        pid: std::process::id(),
        fd: u32::try_from(file.as_raw_fd()).map_err(io::Error::other)?,
        len: len as u64,
        nonce,
    };
    Ok((Arc::new(mapping), file, offer))
}

/// Fails: sharing memory needs Linux.
#[cfg(not(target_os = "linux"))]
pub(crate) fn create(_len: usize) -> io::Result<(Arc<Mapping>, OwnedFd, Offer)> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Maps the first `header` bytes and `lane` bytes from `lane_offset` of a peer's region of `len`
/// bytes.
#[cfg(target_os = "linux")]
pub(crate) fn open(
    offer: &Offer,
    len: usize,
    header: usize,
    lane_offset: usize,
    lane: usize,
) -> io::Result<(Arc<Mapping>, Arc<Mapping>)> {
    use rustix::fs::{Mode, OFlags, SealFlags, fcntl_get_seals, fstat};
    let refused = |why: &str| io::Error::other(format!("the peer's shared memory {why}"));
    let path = format!("/proc/{}/fd/{}", offer.pid, offer.fd);
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    // Without the seal a peer could shrink the file, and a touch of the mapping would kill us.
    if !fcntl_get_seals(&file)?.contains(SealFlags::SHRINK) {
        return Err(refused("is not sealed"));
    }
    if offer.len != len as u64 || fstat(&file)?.st_size != len as i64 {
        return Err(refused("has another size than expected"));
    }
    let header = Mapping::shared(&file, 0, header)?;
    let mut nonce = [0; 16];
    // SAFETY: in bounds (checked by `bytes`); the owner wrote it before it made the offer.
    unsafe { std::ptr::copy_nonoverlapping(header.bytes(0, 16), nonce.as_mut_ptr(), 16) };
    if nonce != offer.nonce {
        return Err(refused("is not the one offered"));
    }
    let lane = Mapping::shared(&file, lane_offset as u64, lane)?;
    Ok((Arc::new(header), Arc::new(lane)))
}

/// Fails: sharing memory needs Linux.
#[cfg(not(target_os = "linux"))]
pub(crate) fn open(
    _offer: &Offer,
    _len: usize,
    _header: usize,
    _lane_offset: usize,
    _lane: usize,
) -> io::Result<(Arc<Mapping>, Arc<Mapping>)> {
    Err(io::ErrorKind::Unsupported.into())
}
