//! Where a step's time goes: the engine's spans on a real clock.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use drumline_engine::{Probe, Span};

/// Seconds of a step by what they were spent on.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Breakdown {
    seconds: [f64; Span::ALL.len()],
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_add_up_by_kind() {
        let watch = Stopwatch::default();
        for span in [Span::Matmul, Span::PipelineWait, Span::Matmul] {
            watch.begin(span);
            std::thread::sleep(std::time::Duration::from_millis(2));
            watch.end(span);
        }
        watch.end(Span::Attention);
        let taken = watch.take();
        assert!(taken.of(Span::Matmul) >= 0.004 && taken.of(Span::PipelineWait) >= 0.002);
        assert_eq!(taken.of(Span::Attention), 0.0);
        assert_eq!(watch.take(), Breakdown::default());
    }
}
