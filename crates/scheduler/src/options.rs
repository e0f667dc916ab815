//! How the scheduler decides. The defaults are Drumline's policy; the others are there to compare.

pub use drumline_placement::Scoring;
use drumline_placement::Seed;
use serde::{Deserialize, Serialize};

/// In which order the jobs of one queue are considered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub enum Order {
    /// Priority, then arrival, with ageing.
    #[default]
    Priority,
    /// Arrival alone; the first that does not fit blocks those behind it.
    Fifo,
    /// The shortest expected run first.
    ShortestFirst,
}

/// What may be chosen about the decisions. A saved state carries it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Options {
    /// Decides among equals.
    pub seed: Seed,
    /// The order inside a queue.
    pub order: Order,
    /// The choice among places.
    pub scoring: Scoring,
    /// Whether smaller jobs may start around the reservation of a bigger one.
    pub backfill: bool,
    /// Whether jobs may be ended for others (preemption and reclaim).
    pub preemption: bool,
    /// Whether jobs may be moved so that another fits.
    pub consolidation: bool,
    /// Half-life of past use in the fair share, in milliseconds; 0: only present use counts.
    pub half_life_ms: u64,
    /// A waiting job gains one step of priority in each of these, in milliseconds; 0: never.
    pub ageing_ms: u64,
    /// Jobs whose priorities differ by less than this are in one band, as far as other queues are
    /// concerned: bands are multiples of it.
    pub priority_band: u32,
    /// What a restart costs a gang beside the work since its last checkpoint, in milliseconds.
    pub restart_cost_ms: u64,
    /// A job that has waited so long, in milliseconds, takes what it has a claim to at any price;
    /// before that only if it wins more device time than the others lose.
    pub patience_ms: u64,
    /// After a reclaim or preemption, the same job is left alone for this long, in milliseconds.
    pub cooldown_ms: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seed: Seed::default(),
            order: Order::default(),
            scoring: Scoring::default(),
            backfill: true,
            preemption: true,
            consolidation: true,
            half_life_ms: 24 * 3_600_000,
            ageing_ms: 3_600_000,
            priority_band: 1000,
            restart_cost_ms: 60_000,
            patience_ms: 600_000,
            cooldown_ms: 60_000,
        }
    }
}
