//! Who may look on while a simulation runs: a recorder, an auditor, or nobody.

use drumline_cluster::Change;
use drumline_placement::Cycle;
use drumline_scheduler::Scheduler;
use drumline_types::Timestamp;

/// Looks on. A simulation is the same with and without it.
pub trait Observer {
    /// The scheduler was told of a change.
    ///
    /// # Errors
    /// A sentence that ends the simulation.
    fn changed(&mut self, change: &Change, now: Timestamp) -> Result<(), String> {
        let _ = (change, now);
        Ok(())
    }

    /// The scheduler is about to decide.
    ///
    /// # Errors
    /// A sentence that ends the simulation.
    fn deciding(&mut self, scheduler: &Scheduler, now: Timestamp) -> Result<(), String> {
        let _ = (scheduler, now);
        Ok(())
    }

    /// The scheduler has decided.
    ///
    /// # Errors
    /// A sentence that ends the simulation.
    fn decided(&mut self, scheduler: &Scheduler, cycle: &Cycle) -> Result<(), String> {
        let _ = (scheduler, cycle);
        Ok(())
    }
}

/// Looks at nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nobody;

impl Observer for Nobody {}
