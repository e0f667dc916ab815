//! The faults of the fake store: dice thrown from a seed, and watches that suffer from them.

use std::time::Duration;

use futures::{StreamExt, stream};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tokio::sync::watch;
use tokio::time::sleep;

use super::super::WatchStream;
use super::super::error::StoreError;
use super::super::model::WatchBatch;
use super::Doom;

/// How often things go wrong, in thousandths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Faults {
    /// Writes that are applied but reported as unknown.
    pub lost_ack_permille: u32,
    /// Writes that are not applied and reported as unknown.
    pub lost_request_permille: u32,
    /// Writes that are reported as unknown and applied up to [`Faults::delay_max`] later.
    pub delayed_request_permille: u32,
    /// Reads, watches being opened and writes that fail cleanly.
    pub refused_permille: u32,
    /// Batches of a watch that get lost; the watch then ends with an error.
    pub watch_drop_permille: u32,
    /// Batches of a watch that are delivered a second time.
    pub watch_repeat_permille: u32,
    /// Batches of a watch that come up to [`Faults::delay_max`] late.
    pub watch_delay_permille: u32,
    /// Writes after which all history is compacted.
    pub compact_permille: u32,
    /// The longest delay.
    pub delay_max: Duration,
}

/// What becomes of one write.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Fate {
    pub(super) doom: Option<Doom>,
    pub(super) compact: bool,
}

/// The source of misfortune.
pub(super) struct Dice {
    rng: ChaCha8Rng,
    pub(super) faults: Faults,
    pub(super) doomed: Option<Doom>,
}

impl Dice {
    pub(super) fn new(seed: u64, faults: Faults) -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(seed), faults, doomed: None }
    }

    /// Makes dice for one watch, so that watches do not change each other's luck.
    pub(super) fn fork(&mut self) -> Self {
        Self::new(self.rng.next_u64(), self.faults)
    }

    fn hits(&mut self, permille: u32) -> bool {
        self.rng.next_u32() % 1000 < permille
    }

    fn delay(&mut self) -> Duration {
        let max_us = u64::try_from(self.faults.delay_max.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(self.rng.next_u64() % max_us.saturating_add(1).max(1))
    }

    pub(super) fn fate(&mut self) -> Fate {
        let faults = self.faults;
        // All dice are thrown each time: one rate does not shift the luck of another.
        let thrown = [
            (faults.refused_permille, Doom::Refuse),
            (faults.lost_request_permille, Doom::LoseRequest),
            (faults.lost_ack_permille, Doom::LoseAck),
        ]
        .map(|(permille, doom)| self.hits(permille).then_some(doom));
        let late = self.hits(faults.delayed_request_permille);
        let delay = Doom::Delay(self.delay());
        let compact = self.hits(faults.compact_permille);
        let by_chance = thrown.into_iter().flatten().next().or(late.then_some(delay));
        Fate { doom: self.doomed.take().or(by_chance), compact }
    }

    pub(super) fn refuse_read(&mut self, op: &str) -> Result<(), StoreError> {
        let permille = self.faults.refused_permille;
        if self.hits(permille) {
            return Err(StoreError::unavailable(op, "fake: refused"));
        }
        Ok(())
    }
}

struct Disturbed {
    honest: WatchStream,
    dice: Dice,
    cuts: watch::Receiver<u64>,
    op: String,
    repeat: Option<WatchBatch>,
    ended: bool,
}

/// Lets a watch suffer: batches come late or twice, and a lost one ends the stream with an error,
/// as the contract demands.
pub(super) fn disturb(
    honest: WatchStream,
    dice: Dice,
    cuts: watch::Receiver<u64>,
    op: String,
) -> WatchStream {
    let disturbed = Disturbed { honest, dice, cuts, op, repeat: None, ended: false };
    Box::pin(stream::unfold(disturbed, |mut watch| async move {
        if watch.ended {
            return None;
        }
        let item = watch.next_item().await;
        watch.ended = item.is_err();
        Some((item, watch))
    }))
}

impl Disturbed {
    async fn next_item(&mut self) -> Result<WatchBatch, StoreError> {
        if let Some(again) = self.repeat.take() {
            return Ok(again);
        }
        let batch = tokio::select! {
            biased;
            // An error means that the store is gone, which the honest stream reports.
            Ok(()) = self.cuts.changed() => return Err(self.lost("fake: watch cut")),
            batch = self.honest.next() => batch,
        };
        let batch = batch.unwrap_or_else(|| Err(self.lost("fake: store is gone")))?;
        let faults = self.dice.faults;
        let dropped = self.dice.hits(faults.watch_drop_permille);
        let repeated = self.dice.hits(faults.watch_repeat_permille);
        let late = self.dice.hits(faults.watch_delay_permille);
        let delay = self.dice.delay();
        if dropped {
            return Err(self.lost("fake: batch dropped"));
        }
        if late {
            sleep(delay).await;
        }
        if repeated {
            self.repeat = Some(batch.clone());
        }
        Ok(batch)
    }

    fn lost(&self, cause: &str) -> StoreError {
        StoreError::unavailable(self.op.clone(), cause)
    }
}
