//! Which waiting jobs may have devices now, and in which order.
//!
//! A function of its arguments: queues, what they use, who waits, and the time. It knows no node;
//! where an admitted gang fits is the business of `placement`.

pub mod admit;
pub mod limits;
pub mod waiting;

pub use admit::{Admission, admit};
pub use limits::{QueueLimits, Queues, Usage};
pub use waiting::{Admitted, Waiting};
