//! Large pages for large buffers: weights and caches are read from end to end in every step, and a page
//! of 4 KiB ends each of the processor's prefetches and costs a look-up.
#![allow(unsafe_code, reason = "the system is given an address range; nothing is read or written")]

use std::mem::MaybeUninit;

/// The size of a large page.
const LARGE: usize = 2 << 20;

/// Asks for large pages for what of `memory` they can hold whole, before it is touched. No more than
/// `memory` becomes resident. A system that has none, or does not want to, ignores it.
pub(super) fn advise<T>(memory: &mut [MaybeUninit<T>]) {
    let bytes = size_of_val(memory);
    let start = memory.as_mut_ptr().cast::<u8>();
    let skip = start.align_offset(LARGE);
    let length = bytes.saturating_sub(skip) / LARGE * LARGE;
    if length == 0 {
        return;
    }
    #[cfg(target_os = "linux")]
    // SAFETY: the range lies in `memory`, which is this process's own; the advice changes how it is
    // backed, never what it holds.
    let _ = unsafe { libc::madvise(start.add(skip).cast(), length, libc::MADV_HUGEPAGE) };
}
