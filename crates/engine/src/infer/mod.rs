//! Serving: a decoder with a paged cache, and the batcher that decides each step.
//!
//! The leader (rank 0) owns a [`Batcher`]. Each step it makes a [`StepPlan`], broadcasts it, and
//! every rank runs it on its [`Model`]; the leader gets the logits, samples, and hands out events.
//! Followers hold no state but weights and cache blocks.

pub mod batcher;
pub mod blocks;
pub mod model;
pub mod plan;
pub mod rate;
pub mod sampler;
mod weights;

pub use batcher::{
    Admission, Batcher, Event, FinishReason, Limits, Load, Request, RequestId, Sampled, StepOutput,
};
pub use model::{Follower, Leader, MemoryUse, Model, ModelOptions};
pub use plan::{Segment, StepPlan};
pub use sampler::{Sampling, TokenScore};
