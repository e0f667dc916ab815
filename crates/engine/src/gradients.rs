//! A rank's gradients, and their reduction over the copies of the model while the backward pass
//! still runs.
//!
//! Once the last micro-batch has been through a layer, the layer's gradients are final: they form
//! a bucket whose all-reduce is started, and which is looked at between the kernels of the layers
//! before. Where the copies share the optimizer, each needs the sums of its share alone, and gets
//! no others. Buckets end in the order in which they were started, and a sum over copies does not
//! depend on where one bucket ends, so the bits are those of one reduction at the end.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use drumline_collective::{Collective, CollectiveError, Pending, ReduceOp};
use drumline_tensor::Backend;

use crate::groups::DeviceGroup;
use crate::layout::ALIGN;
use crate::probe::{Probe, Span, timed};

/// Elements below which a layer waits for the next one: 1 MiB, where a reduction's fixed cost is
/// small beside its bytes.
const BUCKET_MIN: usize = 256 << 10;

/// Buckets under way at most, well below [`drumline_collective::STARTED_MAX`]; more join the last.
const BUCKETS_MAX: usize = 32;

/// Where a backward pass leaves gradients.
pub struct Gradients<'a, 'g, B: Backend> {
    /// The flat buffer, as the layout has it.
    pub buffer: &'a mut B::Buffer,
    /// Add to the gradients of matrices instead of replacing them.
    pub accumulate: bool,
    /// The reduction, during the last micro-batch.
    pub(crate) buckets: Option<&'a mut Buckets<'g, B>>,
}

/// The buckets of one step.
pub(crate) struct Buckets<'a, B: Backend> {
    group: &'a dyn Collective,
    /// The same copies on the device: then sums are queued there, beside the backward pass, and
    /// nothing is looked at before the end. Each copy gets all sums.
    device: Option<&'a dyn DeviceGroup<B>>,
    /// To be queued there.
    queued: Vec<Range<usize>>,
    /// What each copy keeps the optimizer of, where they share it: it needs no other sums.
    shares: Option<&'a [Range<usize>]>,
    under_way: VecDeque<(Range<usize>, Box<dyn Pending + 'a>)>,
    /// Final, and not started yet.
    gathering: Option<Range<usize>>,
    /// Started or done, in no order.
    covered: Vec<Range<usize>>,
}

impl<'a, B: Backend> Buckets<'a, B> {
    pub(crate) fn new(
        group: &'a dyn Collective,
        device: Option<&'a Arc<dyn DeviceGroup<B>>>,
        shares: Option<&'a [Range<usize>]>,
    ) -> Self {
        let (under_way, covered) = (VecDeque::new(), Vec::new());
        let device = device.map(|group| &**group);
        Self { group, device, queued: Vec::new(), shares, under_way, gathering: None, covered }
    }

    /// Takes note that the gradients of `range` will not change any more.
    pub(crate) fn add<P: Probe>(
        &mut self,
        probe: &P,
        range: Range<usize>,
    ) -> Result<(), CollectiveError> {
        let joined = match self.gathering.take() {
            // Layers come last first, and lie one after the other but for padding.
            Some(next) if range.end.next_multiple_of(ALIGN) == next.start => range.start..next.end,
            Some(next) => {
                self.start(probe, next)?;
                range
            }
            None => range,
        };
        if joined.len() >= BUCKET_MIN && self.under_way.len() < BUCKETS_MAX {
            return self.start(probe, joined);
        }
        self.gathering = Some(joined);
        Ok(())
    }

    fn start<P: Probe>(&mut self, probe: &P, range: Range<usize>) -> Result<(), CollectiveError> {
        self.covered.push(range.clone());
        if self.device.is_some() {
            self.queued.push(range);
            return Ok(());
        }
        if self.under_way.is_empty() {
            probe.under_way(true);
        }
        let pending = match self.shares {
            None => self.group.start_all_reduce(range.len(), ReduceOp::Sum)?,
            Some(shares) => {
                let within = |at: usize| at.clamp(range.start, range.end) - range.start;
                let parts: Vec<_> = shares.iter().map(|s| within(s.start)..within(s.end)).collect();
                self.group.start_reduce_scatter(&parts)?
            }
        };
        self.under_way.push_back((range, pending));
        Ok(())
    }

    /// Moves the reductions on, without waiting.
    pub(crate) fn poll<P: Probe>(
        &mut self,
        b: &B,
        probe: &P,
        gradients: &mut B::Buffer,
    ) -> Result<(), CollectiveError> {
        self.queue(b, gradients)?;
        while let Some((range, pending)) = self.under_way.front_mut() {
            let values = b.view_mut(gradients, range.clone());
            let done = timed(probe, Span::GradientComm, || b.on_host(values, |v| pending.poll(v)))?;
            if !done {
                return Ok(());
            }
            self.pop(probe);
        }
        Ok(())
    }

    /// Queues the sums of what is final on the device.
    fn queue(&mut self, b: &B, gradients: &mut B::Buffer) -> Result<(), CollectiveError> {
        let Some(device) = self.device else { return Ok(()) };
        self.queued.drain(..).try_for_each(|range| device.start_sum(b.view_mut(gradients, range)))
    }

    fn pop<P: Probe>(&mut self, probe: &P) {
        self.under_way.pop_front();
        if self.under_way.is_empty() {
            probe.under_way(false);
        }
    }

    /// Reduces all that is left of `elements` gradients and waits for the end.
    pub(crate) fn finish<P: Probe>(
        mut self,
        b: &B,
        probe: &P,
        gradients: &mut B::Buffer,
        elements: usize,
    ) -> Result<(), CollectiveError> {
        if let Some(range) = self.gathering.take() {
            self.start(probe, range)?;
        }
        self.covered.sort_unstable_by_key(|range| range.start);
        let mut rest = Vec::new();
        let mut at = 0usize;
        for range in &self.covered {
            // Between two neighbours there is padding alone.
            if at.next_multiple_of(ALIGN) < range.start {
                rest.push(at..range.start);
            }
            at = range.end;
        }
        if at < elements {
            rest.push(at..elements);
        }
        if let Some(device) = self.device {
            self.queued.append(&mut rest);
            self.queue(b, gradients)?;
            return timed(probe, Span::GradientComm, || device.finish());
        }
        loop {
            // Started only as places become free: as many as there were layers may be left.
            while self.under_way.len() < BUCKETS_MAX
                && let Some(range) = rest.pop()
            {
                self.start(probe, range)?;
            }
            let Some((range, pending)) = self.under_way.front_mut() else {
                return Ok(());
            };
            let values = b.view_mut(gradients, range.clone());
            timed(probe, Span::GradientComm, || b.on_host(values, |v| pending.wait(v)))?;
            self.pop(probe);
        }
    }
}

#[cfg(test)]
mod tests {
    use drumline_collective::local;
    use drumline_tensor::Cpu;

    use super::*;
    use crate::probe::NoProbe;

    #[test]
    fn every_gradient_is_added_once_however_it_is_cut_into_buckets() {
        const ELEMENTS: usize = 3 * BUCKET_MIN + 77;
        let layers = |number: usize| {
            let each = (ELEMENTS - 1000) / number.max(1) / ALIGN * ALIGN;
            (0..number).map(move |i| 500 / ALIGN * ALIGN + i * each).map(move |s| s..s + each)
        };
        for number in [0, 1, 5, 100] {
            std::thread::scope(|scope| {
                for group in local::group(2) {
                    scope.spawn(move || {
                        let b = Cpu::new(1).unwrap();
                        let mut gradients = b.alloc(ELEMENTS).unwrap();
                        let own = |i: usize| (i % 1000) as f32 + group.rank() as f32;
                        for (i, x) in gradients.as_mut_slice().iter_mut().enumerate() {
                            *x = own(i);
                        }
                        let mut buckets = Buckets::new(&group, None, None);
                        let layers: Vec<_> = layers(number).collect();
                        for range in layers.into_iter().rev() {
                            buckets.add(&NoProbe, range).unwrap();
                            buckets.poll(&b, &NoProbe, &mut gradients).unwrap();
                        }
                        buckets.finish(&b, &NoProbe, &mut gradients, ELEMENTS).unwrap();
                        for (i, x) in gradients.as_slice().iter().enumerate() {
                            assert_eq!(*x, 2.0 * (i % 1000) as f32 + 1.0, "element {i}");
                        }
                    });
                }
            });
        }
    }
}
