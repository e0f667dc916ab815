//! [`NcclGroup`] as the engine's way between GPUs.
#![allow(unsafe_code, reason = "device memory is named by its address")]

use std::ops::Range;

use drumline_collective::{CollectiveError, ReduceOp};
use drumline_engine::DeviceGroup;

use super::channel::Exchange;
use super::group::NcclGroup;
use crate::backend::Cuda;
use crate::memory::{View, ViewMut};

/// Returns the address of element `at` of values.
fn element(values: &ViewMut<'_>, at: usize) -> u64 {
    values.address + (at * values.kind.bytes()) as u64
}

/// Returns the length of every part, where all are as long and hold `elements` together.
fn even(parts: &[Range<usize>], elements: usize) -> Option<usize> {
    let each = parts.first()?.len();
    let all = parts.iter().enumerate().all(|(at, part)| *part == (at * each..(at + 1) * each));
    (all && each * parts.len() == elements).then_some(each)
}

fn check_parts(op: &'static str, elements: usize, parts: &[Range<usize>]) {
    let fits = parts.iter().all(|part| part.start <= part.end && part.end <= elements);
    assert!(fits, "{op}: parts of the view");
}

// Each view names memory of a buffer that is freed by the driver no sooner than what was queued with it is
// done, and it has as many elements as it says.
impl DeviceGroup<Cuda> for NcclGroup {
    fn all_reduce(&self, values: ViewMut<'_>, op: ReduceOp) -> Result<(), CollectiveError> {
        if values.elements == 0 {
            return Ok(());
        }
        let (at, elements) = (values.address, values.elements);
        let all = [(Exchange::AllReduce(op), at, at, elements)];
        // SAFETY: as said above.
        unsafe { self.together_on_device("all_reduce", values.kind, &all) }
    }

    fn start_sum(&self, values: ViewMut<'_>) -> Result<(), CollectiveError> {
        let (at, elements) = (values.wide("a sum beside what is computed"), values.elements);
        if elements == 0 {
            return Ok(());
        }
        // SAFETY: as said above.
        unsafe { self.collective_on_device(Exchange::AllReduce(ReduceOp::Sum), at, at, elements) }
    }

    fn finish(&self) -> Result<(), CollectiveError> {
        self.join_compute("all_reduce")
    }

    fn reduce_scatter_parts(
        &self,
        values: ViewMut<'_>,
        parts: &[Range<usize>],
    ) -> Result<(), CollectiveError> {
        const OP: &str = "reduce_scatter";
        check_parts(OP, values.elements, parts);
        let Some(each) = even(parts, values.elements) else {
            // The library knows parts of one length alone.
            return DeviceGroup::<Cuda>::all_reduce(self, values, ReduceOp::Sum);
        };
        let rank = drumline_collective::Collective::rank(self);
        let (from, to) = (values.address, element(&values, rank * each));
        // SAFETY: as said above; the library allows its own part as the target.
        unsafe {
            self.together_on_device(OP, values.kind, &[(Exchange::ReduceScatter, from, to, each)])
        }
    }

    fn all_gather_parts(
        &self,
        values: ViewMut<'_>,
        parts: &[Range<usize>],
    ) -> Result<(), CollectiveError> {
        const OP: &str = "all_gather";
        check_parts(OP, values.elements, parts);
        if let Some(each) = even(parts, values.elements) {
            let rank = drumline_collective::Collective::rank(self);
            let (from, to) = (element(&values, rank * each), values.address);
            // SAFETY: as said above; the library allows its own part as the source.
            return unsafe {
                self.together_on_device(OP, values.kind, &[(Exchange::AllGather, from, to, each)])
            };
        }
        let all: Vec<_> = parts
            .iter()
            .enumerate()
            .filter(|(_, part)| !part.is_empty())
            .map(|(root, part)| {
                let at = element(&values, part.start);
                (Exchange::Broadcast { root }, at, at, part.len())
            })
            .collect();
        // SAFETY: as said above; every part lies inside.
        unsafe { self.together_on_device(OP, values.kind, &all) }
    }

    fn send(&self, values: View<'_>, to: usize) -> Result<(), CollectiveError> {
        // SAFETY: as said above.
        unsafe { self.send_on_device(values.wide("a message"), values.elements, to) }
    }

    fn recv(&self, values: ViewMut<'_>, from: usize) -> Result<(), CollectiveError> {
        // SAFETY: as said above.
        unsafe { self.recv_on_device(values.wide("a message"), values.elements, from) }
    }

    fn check(&self) -> Result<(), CollectiveError> {
        self.check_queued()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_even_only_when_they_fill_the_values_in_order() {
        assert_eq!(even(&[0..2, 2..4], 4), Some(2));
        assert_eq!(even(&[0..2, 2..4], 5), None);
        assert_eq!(even(&[0..3, 3..4], 4), None);
        assert_eq!(even(&[2..4, 0..2], 4), None);
        assert_eq!(even(&[], 0), None);
    }
}
