//! The decision core: changes in, starts and evictions out.
//!
//! It composes `cluster` (what there is and who holds it), `queue` (who may use how much, and who
//! goes first) and `placement` (where). The control plane, the simulator and the Kubernetes
//! operator drive the same code, which is a function of the changes it was given: a saved state
//! and the changes after it lead to the same decisions, bit for bit. `audit` checks what comes out
//! and shares no logic.
//!
//! The rules, in the order in which a cycle applies them, are in `docs/scheduling.md`.

mod choice;
mod consolidate;
mod cycle;
mod gaps;
mod give_way;
mod grow;
mod holds;
mod job;
mod keep;
mod lines;
pub mod options;
mod preempt;
mod promise;
mod regain;
mod reserve;
mod restore;
pub mod saved;
pub mod scheduler;
mod site;
mod spares;
mod tell;
mod vain;
mod worth;

pub use holds::{Hold, Keep};
pub use lines::By;
pub use options::{Options, Order, Scoring};
pub use saved::{Awaited, Leaving, Past, Saved, SavedClass, SavedJob, SavedShape, Stands};
pub use scheduler::Scheduler;
pub use vain::{Priced, Search, Vain};
