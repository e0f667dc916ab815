//! Pipeline schedules: for each stage, the list of instructions that it carries out in a step.
//!
//! Pure data. The engine interprets the lists; [`crate::simulate()`] checks them and gives their
//! bubble. Messages between two stages are taken in the order sent, whatever they carry.
//!
//! Source: Narayanan et al. 2021 (Megatron-LM), section 2.2, for both schedules.

use serde::{Deserialize, Serialize};

/// One instruction of a stage.
///
/// `micro` is the micro-batch, `chunk` the part of the stage's layers: always 0 without
/// interleaving. Chunk `c` of stage `s` holds the layers of virtual stage `c * stages + s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Instruction {
    /// Receive the input activation from the virtual stage before.
    RecvForward {
        /// The micro-batch.
        micro: u32,
        /// The chunk of this stage that consumes it.
        chunk: u32,
    },
    /// Run the chunk's layers forward (the last virtual stage: the loss too).
    Forward {
        /// The micro-batch.
        micro: u32,
        /// The chunk.
        chunk: u32,
    },
    /// Send the output activation to the virtual stage after.
    SendForward {
        /// The micro-batch.
        micro: u32,
        /// The chunk of this stage that made it.
        chunk: u32,
    },
    /// Receive the gradient of the output activation from the virtual stage after.
    RecvBackward {
        /// The micro-batch.
        micro: u32,
        /// The chunk of this stage that consumes it.
        chunk: u32,
    },
    /// Run the chunk's layers backward.
    Backward {
        /// The micro-batch.
        micro: u32,
        /// The chunk.
        chunk: u32,
    },
    /// Send the gradient of the input activation to the virtual stage before.
    SendBackward {
        /// The micro-batch.
        micro: u32,
        /// The chunk of this stage that made it.
        chunk: u32,
    },
}

/// Why a schedule cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// An extent is 0.
    #[error("a pipeline needs at least one stage, chunk and micro-batch")]
    Empty,
    /// Interleaving goes round the stages in whole turns.
    #[error(
        "an interleaved pipeline needs micro-batches in multiples of its {stages} stages, not {micros}"
    )]
    NotDivisible {
        /// Stages.
        stages: u32,
        /// Micro-batches.
        micros: u32,
    },
    /// Between one stage and itself there is nothing to interleave.
    #[error("an interleaved pipeline needs at least two stages")]
    OneStage,
}

/// The instruction lists of all stages for one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    stages: u32,
    chunks: u32,
    micros: u32,
    lists: Vec<Vec<Instruction>>,
}

impl Schedule {
    /// Makes the one-forward-one-backward schedule: each stage runs as many forwards ahead as
    /// there are stages after it, then alternates, so that it never holds the activations of more
    /// than `stages` micro-batches.
    ///
    /// # Errors
    /// [`ScheduleError::Empty`].
    pub fn one_f_one_b(stages: u32, micros: u32) -> Result<Self, ScheduleError> {
        if stages == 0 || micros == 0 {
            return Err(ScheduleError::Empty);
        }
        let lists = (0..stages)
            .map(|stage| {
                let warm_up = (stages - stage - 1).min(micros);
                let forwards = (0..micros).map(|micro| (micro, 0));
                let backwards = (0..micros).map(|micro| (micro, 0));
                interleave(stages, 1, stage, warm_up, forwards, backwards)
            })
            .collect();
        Ok(Self { stages, chunks: 1, micros, lists })
    }

    /// Makes the interleaved schedule: each stage holds `chunks` parts of the layers, which
    /// divides the bubble by `chunks` at the price of more messages and activations.
    ///
    /// # Errors
    /// [`ScheduleError`] when an extent is 0, there is one stage only, or `micros` is not a
    /// multiple of `stages`.
    pub fn interleaved(stages: u32, chunks: u32, micros: u32) -> Result<Self, ScheduleError> {
        if chunks == 1 {
            return Self::one_f_one_b(stages, micros);
        }
        if stages == 0 || micros == 0 || chunks == 0 {
            return Err(ScheduleError::Empty);
        }
        if stages == 1 {
            return Err(ScheduleError::OneStage);
        }
        if !micros.is_multiple_of(stages) {
            return Err(ScheduleError::NotDivisible { stages, micros });
        }
        let total = micros * chunks;
        // The k-th unit of work: `stages` micro-batches through one chunk, then through the next.
        let unit = move |k: u32| {
            let chunk = k / stages % chunks;
            (k / (stages * chunks) * stages + k % stages, chunk)
        };
        let lists = (0..stages)
            .map(|stage| {
                let warm_up = ((stages - stage - 1) * 2 + (chunks - 1) * stages).min(total);
                let forwards = (0..total).map(unit);
                let backwards = (0..total).map(unit).map(|(m, c)| (m, chunks - 1 - c));
                interleave(stages, chunks, stage, warm_up, forwards, backwards)
            })
            .collect();
        Ok(Self { stages, chunks, micros, lists })
    }

    /// Makes a schedule of lists from elsewhere, to be checked by [`crate::simulate()`].
    #[must_use]
    pub fn from_lists(chunks: u32, micros: u32, lists: Vec<Vec<Instruction>>) -> Self {
        Self { stages: u32::try_from(lists.len()).unwrap_or(u32::MAX), chunks, micros, lists }
    }

    /// Returns the number of stages.
    #[must_use]
    pub fn stages(&self) -> u32 {
        self.stages
    }

    /// Returns the number of chunks that each stage holds.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    /// Returns the number of micro-batches in a step.
    #[must_use]
    pub fn micros(&self) -> u32 {
        self.micros
    }

    /// Returns the instructions of `stage`; none for a stage that does not exist.
    #[must_use]
    pub fn stage(&self, stage: u32) -> &[Instruction] {
        self.lists.get(stage as usize).map_or(&[], Vec::as_slice)
    }

    /// Returns the share of the step in which a stage idles if all chunks take the same time:
    /// `(p - 1) / (v m + p - 1)` for `p` stages, `v` chunks and `m` micro-batches.
    #[must_use]
    pub fn bubble_ideal(&self) -> f64 {
        let idle = f64::from(self.stages) - 1.0;
        idle / (f64::from(self.chunks) * f64::from(self.micros) + idle)
    }
}

/// Joins forwards and backwards, both in order: `warm_up` forwards, then one of each in turn.
fn interleave(
    stages: u32,
    chunks: u32,
    stage: u32,
    warm_up: u32,
    mut forwards: impl Iterator<Item = (u32, u32)>,
    backwards: impl Iterator<Item = (u32, u32)>,
) -> Vec<Instruction> {
    let mut list = Vec::new();
    let first = |chunk| stage == 0 && chunk == 0;
    let last = |chunk| stage == stages - 1 && chunk == chunks - 1;
    let forward = |list: &mut Vec<Instruction>, (micro, chunk): (u32, u32)| {
        if !first(chunk) {
            list.push(Instruction::RecvForward { micro, chunk });
        }
        list.push(Instruction::Forward { micro, chunk });
        if !last(chunk) {
            list.push(Instruction::SendForward { micro, chunk });
        }
    };
    for work in forwards.by_ref().take(warm_up as usize) {
        forward(&mut list, work);
    }
    for (micro, chunk) in backwards {
        if let Some(work) = forwards.next() {
            forward(&mut list, work);
        }
        if !last(chunk) {
            list.push(Instruction::RecvBackward { micro, chunk });
        }
        list.push(Instruction::Backward { micro, chunk });
        if !first(chunk) {
            list.push(Instruction::SendBackward { micro, chunk });
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_stages_and_three_micro_batches_alternate_after_one_warm_up() {
        use Instruction::{
            Backward as B, Forward as F, RecvBackward as RB, RecvForward as RF, SendBackward as SB,
            SendForward as SF,
        };
        let schedule = Schedule::one_f_one_b(2, 3).unwrap();
        let m = |make: fn(u32, u32) -> Instruction, micro| make(micro, 0);
        let f = |i| m(|micro, chunk| F { micro, chunk }, i);
        let sf = |i| m(|micro, chunk| SF { micro, chunk }, i);
        let rf = |i| m(|micro, chunk| RF { micro, chunk }, i);
        let b = |i| m(|micro, chunk| B { micro, chunk }, i);
        let sb = |i| m(|micro, chunk| SB { micro, chunk }, i);
        let rb = |i| m(|micro, chunk| RB { micro, chunk }, i);
        assert_eq!(
            schedule.stage(0),
            [f(0), sf(0), f(1), sf(1), rb(0), b(0), f(2), sf(2), rb(1), b(1), rb(2), b(2)]
        );
        assert_eq!(
            schedule.stage(1),
            [rf(0), f(0), b(0), sb(0), rf(1), f(1), b(1), sb(1), rf(2), f(2), b(2), sb(2)]
        );
    }

    #[test]
    fn one_stage_neither_sends_nor_receives() {
        let schedule = Schedule::one_f_one_b(1, 2).unwrap();
        assert!(
            schedule
                .stage(0)
                .iter()
                .all(|i| matches!(i, Instruction::Forward { .. } | Instruction::Backward { .. }))
        );
        assert_eq!(schedule.stage(0).len(), 4);
        assert_eq!(schedule.bubble_ideal(), 0.0);
    }

    #[test]
    fn impossible_shapes_are_refused() {
        assert_eq!(Schedule::one_f_one_b(0, 1), Err(ScheduleError::Empty));
        assert_eq!(Schedule::interleaved(2, 0, 2), Err(ScheduleError::Empty));
        assert_eq!(Schedule::interleaved(1, 2, 2), Err(ScheduleError::OneStage));
        assert_eq!(
            Schedule::interleaved(4, 2, 6),
            Err(ScheduleError::NotDivisible { stages: 4, micros: 6 })
        );
    }
}
