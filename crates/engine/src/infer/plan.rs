//! What the leader tells every rank to run in one step.

use crate::error::EngineError;

/// New tokens of one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Cache blocks of the sequence, in order, enough for these tokens too.
    pub blocks: Vec<u32>,
    /// Position of the first of these tokens.
    pub position: u32,
    /// The tokens: a part of a prompt, or the one just sampled.
    pub tokens: Vec<u32>,
    /// Whether the leader wants the logits after the last of them.
    pub sample: bool,
}

/// One step of every rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepPlan {
    /// Run these segments as one batch.
    Run(Vec<Segment>),
    /// Nothing to do; sent so that a silent leader can be told from an idle one.
    Idle,
    /// End.
    Stop,
}

impl StepPlan {
    /// Writes the plan as little-endian 32-bit words.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut words: Vec<u32> = Vec::new();
        match self {
            Self::Stop => words.push(0),
            Self::Idle => words.push(1),
            Self::Run(segments) => {
                words.extend([2, segments.len() as u32]);
                for s in segments {
                    words.extend([
                        s.position,
                        u32::from(s.sample),
                        s.blocks.len() as u32,
                        s.tokens.len() as u32,
                    ]);
                    words.extend(&s.blocks);
                    words.extend(&s.tokens);
                }
            }
        }
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    }

    /// Reads a plan.
    ///
    /// # Errors
    /// [`EngineError::Plan`] when the bytes are none.
    pub fn decode(bytes: &[u8]) -> Result<Self, EngineError> {
        let (words, rest) = bytes.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(EngineError::Plan("its length is not a multiple of four"));
        }
        let mut words = words.iter().map(|w| u32::from_le_bytes(*w));
        let mut next = || words.next().ok_or(EngineError::Plan("it ends too early"));
        let plan = match next()? {
            0 => Self::Stop,
            1 => Self::Idle,
            2 => {
                let count = next()? as usize;
                let mut segments = Vec::new();
                for _ in 0..count {
                    let (position, sample) = (next()?, next()? != 0);
                    let (blocks, tokens) = (next()?, next()?);
                    let mut take = |n: u32| (0..n).map(|_| next()).collect::<Result<Vec<_>, _>>();
                    let (blocks, tokens) = (take(blocks)?, take(tokens)?);
                    segments.push(Segment { blocks, position, tokens, sample });
                }
                Self::Run(segments)
            }
            _ => return Err(EngineError::Plan("its kind is unknown")),
        };
        match words.next() {
            None => Ok(plan),
            Some(_) => Err(EngineError::Plan("it goes on after its end")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_survive_the_wire_and_broken_ones_are_refused() {
        let run = StepPlan::Run(vec![
            Segment { blocks: vec![3, 1], position: 16, tokens: vec![7, 8], sample: true },
            Segment { blocks: vec![0], position: 0, tokens: vec![5], sample: false },
        ]);
        for plan in [StepPlan::Idle, StepPlan::Stop, run] {
            let bytes = plan.encode();
            assert_eq!(StepPlan::decode(&bytes), Ok(plan));
            for cut in 0..bytes.len() {
                assert!(StepPlan::decode(&bytes[..cut]).is_err(), "cut at {cut}");
            }
            assert!(StepPlan::decode(&[&bytes[..], &[0; 4]].concat()).is_err());
        }
        assert!(StepPlan::decode(&[9, 0, 0, 0]).is_err());
        // A length that no memory could hold must not be believed.
        let huge: Vec<u8> =
            [2u32, 1, 0, 0, u32::MAX, 0].into_iter().flat_map(u32::to_le_bytes).collect();
        assert!(StepPlan::decode(&huge).is_err());
    }
}
