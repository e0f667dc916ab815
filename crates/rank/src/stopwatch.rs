//! Where a step's time goes: the engine's spans on a real clock.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use drumline_engine::{Probe, Span};

/// Seconds of a step by what they were spent on.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Breakdown {
    seconds: [f64; Span::ALL.len()],
    hidden: f64,
}

impl Breakdown {
    /// Returns the seconds of one kind.
    #[must_use]
    pub fn of(&self, span: Span) -> f64 {
        Span::ALL.iter().position(|known| *known == span).map_or(0.0, |at| self.seconds[at])
    }

    /// Returns the seconds of several kinds together.
    #[must_use]
    pub fn sum(&self, spans: &[Span]) -> f64 {
        spans.iter().map(|span| self.of(*span)).sum()
    }

    /// Returns the seconds of all kinds together: what is left of a step is neither computing nor
    /// waiting.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.seconds.iter().sum()
    }

    /// Returns the seconds in which gradients were under way while this rank did something else.
    /// They are part of what it did.
    #[must_use]
    pub fn hidden(&self) -> f64 {
        self.hidden
    }

    /// Returns the seconds that communication held this rank up.
    #[must_use]
    pub fn exposed(&self) -> f64 {
        self.sum(&[Span::TensorComm, Span::GradientComm, Span::PipelineSend])
    }

    /// Adds another step's.
    pub fn add(&mut self, other: &Self) {
        for (sum, x) in self.seconds.iter_mut().zip(other.seconds) {
            *sum += x;
        }
        self.hidden += other.hidden;
    }

    /// Returns a share of everything, such as the mean of several steps.
    #[must_use]
    pub fn scaled(&self, by: f64) -> Self {
        Self { seconds: self.seconds.map(|x| x * by), hidden: self.hidden * by }
    }
}

/// Measures spans. Used by the thread that makes the step; the lock is never contended.
#[derive(Debug, Default)]
pub struct Stopwatch {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    since: Option<Instant>,
    breakdown: Breakdown,
    /// Since when reductions have been under way, and how long they had held this rank up by then.
    under_way: Option<(Instant, f64)>,
}

impl Stopwatch {
    /// Returns what was measured since the last call, and starts afresh.
    pub fn take(&self) -> Breakdown {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut state.breakdown)
    }
}

impl Probe for Stopwatch {
    fn begin(&self, _: Span) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).since = Some(Instant::now());
    }

    fn end(&self, span: Span) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(since) = state.since.take() else { return };
        if let Some(at) = Span::ALL.iter().position(|known| *known == span) {
            state.breakdown.seconds[at] += since.elapsed().as_secs_f64();
        }
    }

    fn under_way(&self, any: bool) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let held_up = state.breakdown.of(Span::GradientComm);
        if any {
            state.under_way = Some((Instant::now(), held_up));
        } else if let Some((since, before)) = state.under_way.take() {
            let beside = since.elapsed().saturating_sub(Duration::from_secs_f64(held_up - before));
            state.breakdown.hidden += beside.as_secs_f64();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOMENT: Duration = Duration::from_millis(2);

    #[test]
    fn spans_add_up_by_kind() {
        let watch = Stopwatch::default();
        for span in [Span::Matmul, Span::PipelineWait, Span::Matmul] {
            watch.begin(span);
            std::thread::sleep(MOMENT);
            watch.end(span);
        }
        watch.end(Span::Attention);
        let taken = watch.take();
        assert!(taken.of(Span::Matmul) >= 0.004 && taken.of(Span::PipelineWait) >= 0.002);
        assert_eq!(taken.of(Span::Attention), 0.0);
        assert_eq!(taken.total(), taken.sum(&Span::ALL));
        assert_eq!(watch.take(), Breakdown::default());
    }

    #[test]
    fn a_reduction_is_hidden_while_something_else_is_done() {
        let watch = Stopwatch::default();
        let begin = Instant::now();
        watch.under_way(true);
        for span in [Span::Matmul, Span::GradientComm] {
            watch.begin(span);
            std::thread::sleep(MOMENT);
            watch.end(span);
        }
        watch.under_way(false);
        let (taken, all) = (watch.take(), begin.elapsed().as_secs_f64());
        assert!(taken.hidden() >= taken.of(Span::Matmul));
        assert!(taken.hidden() <= all - taken.of(Span::GradientComm) + 1e-6);
        assert_eq!(taken.exposed(), taken.of(Span::GradientComm));
    }
}
