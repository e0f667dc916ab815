//! Continuous batching: which sequences run, and what each step computes for them.
//!
//! Pure: no device, no clock. Every step decodes all running sequences by one token and, in the
//! same batch, prefills prompts up to a budget, so that a long prompt delays nobody by more than
//! one chunk; while sequences decode, the chunk is smaller. A sequence reserves its blocks when it is
//! admitted, so that none has to be thrown out later; those that hold the beginning of its prompt
//! already are shared with whoever computed them.

use std::collections::VecDeque;

use drumline_tensor::{Draw, KV_BLOCK, sampling};

use super::blocks::Blocks;
use super::plan::{Segment, StepPlan};
use super::sampler::{self, Sampling, TokenScore};

/// Names one request of a batcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// A completion that is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The prompt, at least one token.
    pub prompt: Vec<u32>,
    /// Greatest number of tokens of the completion, at least 1.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end the completion; they are not part of it.
    pub stop_tokens: Vec<u32>,
}

/// What a batcher may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that run at once.
    pub max_batch: usize,
    /// Tokens of prompt and completion together.
    pub max_context: usize,
    /// Requests that may wait.
    pub max_queue: usize,
    /// Tokens of prompts computed in one step.
    pub prefill_tokens: usize,
    /// The same in a step that also decodes: what bounds the time between two tokens.
    pub prefill_beside_decode: usize,
    /// Cache blocks, of [`KV_BLOCK`] tokens each.
    pub blocks: usize,
    /// The size of the vocabulary.
    pub vocab: usize,
}

impl Limits {
    /// Returns the greatest number of rows that a step computes: prompts alone, or all but one of the
    /// sequences decoding beside the smaller part of a prompt.
    #[must_use]
    pub fn rows_max(&self) -> usize {
        let beside = self.prefill_beside_decode.min(self.prefill_tokens).max(1);
        self.prefill_tokens.max(1).max(self.max_batch + beside)
    }
}

/// Why a request is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Admission {
    /// There is nothing to continue, or nothing to make.
    #[error("a request needs at least one token of prompt and one of completion")]
    Empty,
    /// The prompt leaves no room.
    #[error(
        "prompt of {prompt} tokens and completion of {max_tokens} exceed the context of {context}"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens of completion asked for.
        max_tokens: usize,
        /// Greatest sum.
        context: usize,
    },
    /// It could not run even alone.
    #[error("{needed} cache blocks are needed, {total} exist")]
    NeverFits {
        /// Blocks that it would reserve.
        needed: usize,
        /// Blocks of the whole cache.
        total: usize,
    },
    /// A token of the prompt does not exist.
    #[error("token {token} is not below the vocabulary of {vocab}")]
    Token {
        /// The token.
        token: u32,
        /// The size of the vocabulary.
        vocab: usize,
    },
    /// Too many wait already; try again later.
    #[error("{waiting} requests wait already, as many as may")]
    QueueFull {
        /// Requests waiting.
        waiting: usize,
    },
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token came.
    Stop,
    /// It is as long as asked for.
    Length,
}

impl FinishReason {
    /// Returns the word that the OpenAI API has for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// News of one request.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Whose.
    pub request: RequestId,
    /// The next token; none when it was a stop token.
    pub token: Option<u32>,
    /// The chosen token's log-probability, when asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens, best first, as many as asked for.
    pub top: Vec<TokenScore>,
    /// Set on the last event of a request.
    pub finish: Option<FinishReason>,
    /// Tokens of the prompt that were in the cache already.
    pub reused: usize,
}

/// How busy a batcher is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Sequences in the batch.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// Cache blocks in use.
    pub blocks_used: usize,
    /// Cache blocks that exist.
    pub blocks_total: usize,
    /// Tokens of prompts, since the beginning, that were in the cache already.
    pub reused_tokens: u64,
}

/// What one step did.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepOutput {
    /// News, in the order of sequences.
    pub events: Vec<Event>,
    /// Tokens of prompts that were computed.
    pub prefilled: usize,
    /// Sequences that were decoded by one token.
    pub decoded: usize,
}

struct Sequence {
    id: RequestId,
    request: Request,
    /// Prompt and completion so far.
    tokens: Vec<u32>,
    /// How many of them are in the cache.
    cached: usize,
    /// How many of the prompt were there when it began.
    reused: usize,
    blocks: Vec<u32>,
}

/// Decides every step of a served model.
pub struct Batcher {
    limits: Limits,
    blocks: Blocks,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    next: u64,
    reused_tokens: u64,
    /// What the last plan asked for: sequence, tokens, whether to sample.
    planned: Vec<(RequestId, usize, bool)>,
}

impl Batcher {
    /// Creates an empty batcher.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            blocks: Blocks::new(limits.blocks),
            waiting: VecDeque::new(),
            running: Vec::new(),
            next: 0,
            reused_tokens: 0,
            planned: Vec::new(),
        }
    }

    /// Returns what it may use.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Accepts a request, or says why not.
    ///
    /// # Errors
    /// [`Admission`].
    pub fn submit(&mut self, request: Request) -> Result<RequestId, Admission> {
        let Limits { max_context: context, vocab, max_queue, .. } = self.limits;
        let (prompt, max_tokens) = (request.prompt.len(), request.max_tokens);
        if prompt == 0 || max_tokens == 0 {
            return Err(Admission::Empty);
        }
        if prompt.saturating_add(max_tokens) > context {
            return Err(Admission::TooLong { prompt, max_tokens, context });
        }
        if let Some(token) = request.prompt.iter().copied().find(|t| *t as usize >= vocab) {
            return Err(Admission::Token { token, vocab });
        }
        let needed = Blocks::needed(prompt + max_tokens);
        if needed > self.blocks.total() {
            return Err(Admission::NeverFits { needed, total: self.blocks.total() });
        }
        let places = self.limits.max_batch.saturating_sub(self.running.len());
        if self.waiting.len() >= max_queue + places {
            return Err(Admission::QueueFull { waiting: self.waiting.len() });
        }
        let id = RequestId(self.next);
        self.next += 1;
        let tokens = request.prompt.clone();
        let blocks = Vec::new();
        self.waiting.push_back(Sequence { id, request, tokens, cached: 0, reused: 0, blocks });
        Ok(id)
    }

    /// Forgets a request, running or waiting. Returns whether there was one.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        if let Some(at) = self.waiting.iter().position(|s| s.id == id) {
            self.waiting.remove(at);
            return true;
        }
        let Some(at) = self.running.iter().position(|s| s.id == id) else { return false };
        let sequence = self.running.remove(at);
        self.blocks.give(&sequence.blocks);
        true
    }

    /// Returns how busy it is.
    #[must_use]
    pub fn load(&self) -> Load {
        Load {
            running: self.running.len(),
            waiting: self.waiting.len(),
            blocks_used: self.blocks.total() - self.blocks.free(),
            blocks_total: self.blocks.total(),
            reused_tokens: self.reused_tokens,
        }
    }

    /// Returns whether nothing runs or waits.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Decides the next step. In the order of arrival: nobody overtakes a request that waits for
    /// blocks.
    pub fn plan(&mut self) -> StepPlan {
        while self.running.len() < self.limits.max_batch {
            let Some(next) = self.waiting.front() else { break };
            let needed = Blocks::needed(next.tokens.len() + next.request.max_tokens);
            let Some((blocks, reused)) = self.blocks.take(needed, &next.tokens) else { break };
            if let Some(mut sequence) = self.waiting.pop_front() {
                sequence.blocks = blocks;
                sequence.cached = reused * KV_BLOCK;
                sequence.reused = sequence.cached;
                self.reused_tokens += sequence.cached as u64;
                self.running.push(sequence);
            }
        }
        self.planned.clear();
        let Limits { prefill_tokens, prefill_beside_decode, .. } = self.limits;
        let mut budget = match self.running.iter().any(Sequence::decodes) {
            true => prefill_beside_decode.min(prefill_tokens).max(1),
            false => prefill_tokens.max(1),
        };
        let mut segments = Vec::new();
        for s in &self.running {
            let missing = s.tokens.len() - s.cached;
            let decoding = s.decodes();
            let count = if decoding { missing } else { missing.min(budget) };
            if count == 0 {
                continue;
            }
            if !decoding {
                budget -= count;
            }
            let sample = count == missing;
            let end = s.cached + count;
            segments.push(Segment {
                blocks: s.blocks[..Blocks::needed(end)].to_vec(),
                position: s.cached as u32,
                tokens: s.tokens[s.cached..end].to_vec(),
                sample,
            });
            self.planned.push((s.id, count, sample));
        }
        if segments.is_empty() { StepPlan::Idle } else { StepPlan::Run(segments) }
    }

    /// Returns how the token after each sampled segment of the last plan is drawn; none where a request
    /// wants scores, for which all logits are needed.
    #[must_use]
    pub fn draws(&self) -> Option<Vec<Draw>> {
        let sampled = self.planned.iter().filter(|(_, _, sampled)| *sampled);
        let of = |id: &RequestId| self.running.iter().find(|s| s.id == *id);
        sampled
            .map(|(id, ..)| match of(id) {
                Some(s) if s.request.sampling.logprobs.is_some() => None,
                // Who was cancelled since takes what comes.
                Some(s) => Some(s.request.sampling.draw(s.made() as u64)),
                None => Some(Draw::GREEDY),
            })
            .collect()
    }

    /// Takes what the last plan gave, one row or token for each sampled segment, and moves every
    /// sequence on.
    pub fn commit(&mut self, sampled: Sampled<'_>) -> StepOutput {
        let mut output = StepOutput::default();
        let vocab = self.limits.vocab.max(1);
        let mut samples = 0..sampled.len(vocab);
        for (id, count, is_sampled) in std::mem::take(&mut self.planned) {
            let sample = if is_sampled { samples.next() } else { None };
            let Some(at) = self.running.iter().position(|s| s.id == id) else { continue };
            let s = &mut self.running[at];
            if s.cached < s.request.prompt.len() {
                output.prefilled += count;
            } else {
                output.decoded += 1;
            }
            for index in s.cached / KV_BLOCK..(s.cached + count) / KV_BLOCK {
                self.blocks.publish(&s.blocks, index, &s.tokens);
            }
            s.cached += count;
            let Some(sample) = sample else { continue };
            let event = match sampled {
                Sampled::Logits(all) => s.choose(&all[sample * vocab..(sample + 1) * vocab]),
                Sampled::Tokens(tokens) => s.append(tokens[sample]),
            };
            let finished = event.finish.is_some();
            output.events.push(event);
            if finished {
                let sequence = self.running.remove(at);
                self.blocks.give(&sequence.blocks);
            }
        }
        output
    }
}

/// What a step gives for each of its sampled segments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sampled<'a> {
    /// `[samples, V]`: the batcher chooses.
    Logits(&'a [f32]),
    /// The tokens, chosen as [`Batcher::draws`] says.
    Tokens(&'a [u32]),
}

impl Sampled<'_> {
    fn len(self, vocab: usize) -> usize {
        match self {
            Self::Logits(all) => all.len() / vocab,
            Self::Tokens(tokens) => tokens.len(),
        }
    }
}

impl Sequence {
    /// Returns whether its prompt is done.
    fn decodes(&self) -> bool {
        self.made() > 0
    }

    /// Returns how many tokens of the completion are there.
    fn made(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Samples the next token, scores it where that is asked for, and appends it.
    fn choose(&mut self, logits: &[f32]) -> Event {
        let sampling = self.request.sampling;
        let token = sampling::choose(&sampling.draw(self.made() as u64), logits);
        let mut event = self.append(token);
        if let (Some(count), Some(token)) = (sampling.logprobs, event.token) {
            let (own, top) = sampler::scores(logits, token, count as usize);
            event.logprob = Some(own);
            event.top = top;
        }
        event
    }

    /// Appends the next token, unless it ends the completion.
    fn append(&mut self, token: u32) -> Event {
        let made = self.made();
        let mut event = Event {
            request: self.id,
            token: None,
            logprob: None,
            top: Vec::new(),
            finish: None,
            reused: self.reused,
        };
        if self.request.stop_tokens.contains(&token) {
            event.finish = Some(FinishReason::Stop);
            return event;
        }
        self.tokens.push(token);
        event.token = Some(token);
        if made + 1 >= self.request.max_tokens {
            event.finish = Some(FinishReason::Length);
        }
        event
    }
}

/// Returns the blocks that hold `sequences` of `context` tokens.
#[must_use]
pub fn blocks_for(sequences: usize, context: usize) -> usize {
    sequences * context.div_ceil(KV_BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB: usize = 8;

    fn batcher(max_batch: usize, blocks: usize) -> Batcher {
        Batcher::new(Limits {
            max_batch,
            max_context: 64,
            max_queue: 2,
            prefill_tokens: 10,
            prefill_beside_decode: 6,
            blocks,
            vocab: VOCAB,
        })
    }

    fn request(prompt: usize, max_tokens: usize) -> Request {
        Request {
            prompt: vec![1; prompt],
            max_tokens,
            sampling: Sampling::GREEDY,
            stop_tokens: vec![7],
        }
    }

    /// Logits that make every sample `token`.
    fn always(token: usize, samples: usize) -> Vec<f32> {
        let mut logits = vec![0.0; samples * VOCAB];
        for row in logits.chunks_exact_mut(VOCAB) {
            row[token] = 1.0;
        }
        logits
    }

    fn samples(plan: &StepPlan) -> usize {
        match plan {
            StepPlan::Run(segments) => segments.iter().filter(|s| s.sample).count(),
            _ => 0,
        }
    }

    fn step(b: &mut Batcher, token: usize) -> StepOutput {
        let plan = b.plan();
        b.commit(Sampled::Logits(&always(token, samples(&plan))))
    }

    #[test]
    fn a_step_that_decodes_has_a_bound_whatever_prompts_come() {
        let mut b = Batcher::new(Limits { max_queue: 50, ..batcher(4, 64).limits() });
        let bound = b.limits().rows_max();
        assert_eq!(bound, 10, "four sequences and six tokens of prompts, or ten of these");
        let old = [b.submit(request(3, 40)).unwrap(), b.submit(request(4, 40)).unwrap()];
        let plan = b.plan();
        b.commit(Sampled::Logits(&always(2, samples(&plan))));
        // From now on long prompts keep coming, more than there are places.
        let long: Vec<RequestId> = (0..10).map(|_| b.submit(request(50, 2)).unwrap()).collect();
        let mut ended = Vec::new();
        for step in 0..39 {
            let plan = b.plan();
            let StepPlan::Run(segments) = &plan else { panic!("there is work") };
            let rows: usize = segments.iter().map(|s| s.tokens.len()).sum();
            let decoding = segments.iter().filter(|s| s.position >= 50).count() + old.len();
            assert!(rows <= bound && rows - decoding <= 6, "step {step}: {rows} rows");
            let output = b.commit(Sampled::Logits(&always(2, samples(&plan))));
            for id in old {
                let own = output.events.iter().filter(|e| e.request == id && e.token.is_some());
                assert_eq!(own.count(), 1, "step {step}: every running sequence gets its token");
            }
            ended.extend(output.events.iter().filter(|e| e.finish.is_some()).map(|e| e.request));
        }
        // The prompts do not starve either: 39 steps of six tokens are four prompts of 50.
        assert!(ended.contains(&long[0]) && ended.contains(&long[1]) && ended.contains(&long[2]));
    }

    #[test]
    fn a_long_prompt_is_prefilled_in_chunks_while_others_decode() {
        let mut b = batcher(4, 16);
        let short = b.submit(request(3, 8)).unwrap();
        assert_eq!(step(&mut b, 2).events[0].token, Some(2));
        b.submit(request(25, 4)).unwrap();
        for prefilled in [6, 6, 6, 6, 1] {
            let output = step(&mut b, 3);
            assert_eq!((output.prefilled, output.decoded), (prefilled, 1));
            assert_eq!(output.events[0].request, short);
        }
        assert_eq!(step(&mut b, 3).decoded, 2);
    }

    #[test]
    fn the_beginning_of_a_prompt_that_was_seen_before_is_not_computed_again() {
        let mut b = batcher(4, 16);
        b.submit(request(35, 20)).unwrap();
        while !b.is_idle() {
            step(&mut b, 2);
        }
        assert_eq!(b.load(), Load { blocks_total: 16, ..Load::default() });
        // The same prompt and the first tokens of the answer: a second turn.
        let prompt = [vec![1; 35], vec![2; 14], vec![3; 2]].concat();
        b.submit(Request { prompt, ..request(1, 4) }).unwrap();
        let mut computed = 0;
        while !b.is_idle() {
            computed += step(&mut b, 4).prefilled;
        }
        assert_eq!((computed, b.load().reused_tokens), (3, 48));
    }

    #[test]
    fn completions_end_at_stop_tokens_and_at_their_length_and_free_their_blocks() {
        let mut b = batcher(2, 8);
        b.submit(request(2, 2)).unwrap();
        assert_eq!(step(&mut b, 4).events[0].finish, None);
        assert_eq!(step(&mut b, 4).events[0].finish, Some(FinishReason::Length));
        assert!(b.is_idle());
        b.submit(request(2, 9)).unwrap();
        step(&mut b, 4);
        let event = step(&mut b, 7).events.remove(0);
        assert_eq!((event.token, event.finish), (None, Some(FinishReason::Stop)));
        assert_eq!(b.load(), Load { blocks_total: 8, ..Load::default() });
        assert_eq!(b.plan(), StepPlan::Idle);
    }

    #[test]
    fn requests_that_cannot_run_are_refused_with_the_numbers() {
        let mut b = batcher(1, 2);
        assert_eq!(b.submit(request(0, 1)), Err(Admission::Empty));
        assert_eq!(
            b.submit(request(60, 5)),
            Err(Admission::TooLong { prompt: 60, max_tokens: 5, context: 64 })
        );
        assert_eq!(b.submit(request(30, 5)), Err(Admission::NeverFits { needed: 3, total: 2 }));
        let bad = Request { prompt: vec![8], ..request(1, 1) };
        assert_eq!(b.submit(bad), Err(Admission::Token { token: 8, vocab: 8 }));
        for _ in 0..3 {
            b.submit(request(4, 4)).unwrap();
        }
        assert_eq!(b.submit(request(4, 4)), Err(Admission::QueueFull { waiting: 3 }));
    }

    #[test]
    fn a_request_waits_for_blocks_and_gets_those_of_a_cancelled_one() {
        let mut b = batcher(4, 2);
        let first = b.submit(request(20, 5)).unwrap();
        step(&mut b, 1);
        let second = b.submit(request(4, 4)).unwrap();
        step(&mut b, 1);
        assert_eq!((b.load().running, b.load().waiting), (1, 1));
        assert!(b.cancel(first));
        assert!(!b.cancel(first));
        let output = step(&mut b, 1);
        assert_eq!(output.events[0].request, second);
        assert!(b.cancel(second));
        assert_eq!(b.load().blocks_used, 0);
    }
}
