//! Threads of one backend, and how work on rows is shared among them.
#![allow(unsafe_code, reason = "threads write disjoint rows of one output")]

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Mutex;

use rayon::iter::{
    IndexedParallelIterator, IntoParallelIterator, IntoParallelRefMutIterator, ParallelIterator,
};

use crate::backend::TensorError;

/// A pool of its own for each backend, so that ranks in one process do not share threads. One
/// thread needs none.
pub(crate) struct Pool {
    pool: Option<rayon::ThreadPool>,
    threads: usize,
    scratch: Mutex<Vec<Vec<f32>>>,
}

impl Pool {
    pub(crate) fn new(threads: usize) -> Result<Self, TensorError> {
        let threads = threads.max(1);
        let pool = if threads > 1 {
            let built = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .thread_name(|i| format!("tensor-{i}"))
                .build()
                .map_err(|e| TensorError::Threads { threads, message: e.to_string() })?;
            Some(built)
        } else {
            None
        };
        Ok(Self { pool, threads, scratch: Mutex::new(Vec::new()) })
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    pub(crate) fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(f),
            None => f(),
        }
    }

    /// Calls `f` with ranges of at most `grain` that cover `0..rows`. The ranges depend on `rows`
    /// and `grain` alone, never on the number of threads.
    pub(crate) fn split(&self, rows: usize, grain: usize, f: impl Fn(Range<usize>) + Sync + Send) {
        let grain = grain.max(1);
        let parts = rows.div_ceil(grain);
        let range = |part: usize| part * grain..((part + 1) * grain).min(rows);
        match &self.pool {
            Some(pool) if parts > 1 => {
                let all = || (0..parts).into_par_iter().with_max_len(1).for_each(|p| f(range(p)));
                pool.install(all);
            }
            _ => (0..parts).for_each(|p| f(range(p))),
        }
    }

    /// Calls `f` with each item and its index.
    pub(crate) fn each<T: Send>(&self, items: &mut [T], f: impl Fn(usize, &mut T) + Sync + Send) {
        match &self.pool {
            Some(pool) if items.len() > 1 => pool.install(|| {
                items.par_iter_mut().with_max_len(1).enumerate().for_each(|(i, item)| f(i, item));
            }),
            _ => items.iter_mut().enumerate().for_each(|(i, item)| f(i, item)),
        }
    }

    /// Takes the smallest scratch that is large enough, or the largest.
    fn take(&self, elements: usize) -> Vec<f32> {
        let mut list = self.scratch.lock().expect("no kernel panics while it holds the list");
        let fit = |b: &Vec<f32>| {
            (b.len() < elements, if b.len() < elements { usize::MAX - b.len() } else { b.len() })
        };
        let best = (0..list.len()).min_by_key(|i| fit(&list[*i]));
        best.map_or_else(Vec::new, |i| list.swap_remove(i))
    }

    /// Returns the memory of all scratch that is not lent at this moment, in bytes.
    pub(crate) fn scratch_bytes(&self) -> usize {
        let list = self.scratch.lock().expect("no kernel panics while it holds the list");
        list.iter().map(|buffer| buffer.capacity() * size_of::<f32>()).sum()
    }

    /// Lends `f` scratch memory of `elements`, with arbitrary values in it, and keeps it for the
    /// next call.
    pub(crate) fn scratch<R>(&self, elements: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
        let mut buffer = self.take(elements);
        if buffer.len() < elements {
            buffer.clear();
            buffer.resize(elements, 0.0);
        }
        let result = f(&mut buffer[..elements]);
        self.scratch.lock().expect("no kernel panics while it holds the list").push(buffer);
        result
    }
}

/// An output whose rows several threads write, each its own.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    start: *mut f32,
    width: usize,
    rows: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: `Rows` only hands out slices through `part`, whose callers promise disjoint rows.
unsafe impl Send for Rows<'_> {}
// SAFETY: as above.
unsafe impl Sync for Rows<'_> {}

impl<'a> Rows<'a> {
    /// Sees `values` as rows of `width`.
    pub(crate) fn new(values: &'a mut [f32], width: usize) -> Self {
        let rows = values.len().checked_div(width).unwrap_or(0);
        Self { start: values.as_mut_ptr(), width, rows, lifetime: PhantomData }
    }

    /// Returns the rows `range`.
    ///
    /// # Safety
    /// No other live slice overlaps these rows.
    #[allow(clippy::mut_from_ref, reason = "that is the point; see the safety section")]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &'a mut [f32] {
        assert!(range.start <= range.end && range.end <= self.rows, "rows out of range");
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.start.add(range.start * self.width),
                (range.end - range.start) * self.width,
            )
        }
    }

    /// Returns the first element, for kernels that write columns of their own.
    pub(crate) fn as_ptr(&self) -> *mut f32 {
        self.start
    }
}
