//! Records a simulation, so that it can be replayed: a snapshot, what happened after it, and what
//! was decided.

use std::io::Write;

use drumline_cluster::Change;
use drumline_placement::Cycle;
use drumline_scheduler::Scheduler;
use drumline_types::Timestamp;

use crate::replay::{Decision, Entry, log_line};
use crate::world::Observer;

/// Writes the three files of a replay.
#[derive(Debug)]
pub struct Recorder<W: Write> {
    snapshot: W,
    log: W,
    decisions: W,
    from: Timestamp,
    began: bool,
}

impl<W: Write> Recorder<W> {
    /// Records from the first look at or after `from`.
    pub fn new(from: Timestamp, snapshot: W, log: W, decisions: W) -> Self {
        Self { snapshot, log, decisions, from, began: false }
    }

    /// Writes what is still to be written, and returns whether anything was recorded.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn finish(mut self) -> std::io::Result<bool> {
        for file in [&mut self.snapshot, &mut self.log, &mut self.decisions] {
            file.flush()?;
        }
        Ok(self.began)
    }

    fn write(&mut self, entry: &Entry) -> Result<(), String> {
        let line = log_line(entry).map_err(|error| error.to_string())?;
        writeln!(self.log, "{line}").map_err(|error| format!("cannot write the log: {error}"))
    }
}

impl<W: Write> Observer for Recorder<W> {
    fn changed(&mut self, change: &Change, now: Timestamp) -> Result<(), String> {
        if self.began { self.write(&Entry::Change(now, Box::new(change.clone()))) } else { Ok(()) }
    }

    fn deciding(&mut self, scheduler: &Scheduler, now: Timestamp) -> Result<(), String> {
        if !self.began && now >= self.from {
            serde_json::to_writer(&mut self.snapshot, &scheduler.save())
                .map_err(|error| format!("cannot write the snapshot: {error}"))?;
            self.began = true;
        }
        Ok(())
    }

    fn decided(&mut self, _scheduler: &Scheduler, cycle: &Cycle) -> Result<(), String> {
        if !self.began {
            return Ok(());
        }
        self.write(&Entry::Cycle(cycle.now))?;
        let line =
            serde_json::to_string(&Decision::from(cycle)).map_err(|error| error.to_string())?;
        writeln!(self.decisions, "{line}")
            .map_err(|error| format!("cannot write the decisions: {error}"))
    }
}
