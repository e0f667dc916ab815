//! Who may use how much, and who goes first: the tree of queues, the order inside each, and the
//! turn between them.
//!
//! It knows no node; where a gang fits is the business of `placement`, and what follows from both
//! that of `scheduler`.

pub mod amounts;
pub mod decay;
pub mod models;
pub mod order;
pub mod tree;
pub mod turn;

pub use amounts::{History, Share, Short};
pub use models::{ModelId, Models, means};
pub use order::Place;
pub use tree::{Charge, Closed, QueueId, Tree};
pub use turn::{Candidate, Turn};
