//! Runs a pipeline schedule on paper: proves it right and says how long its stages idle.
//!
//! It shares no logic with the generators: it knows only what each instruction needs.

use std::collections::{BTreeMap, VecDeque};

use crate::schedule::{Instruction, Schedule};

/// What the parts of a step cost, in any unit of time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Costs {
    /// One chunk's forward pass of one micro-batch.
    pub forward: f64,
    /// One chunk's backward pass of one micro-batch.
    pub backward: f64,
    /// From the end of a send until the receiver has the message.
    pub transfer: f64,
    /// Messages that one stage may have under way to another before its next send waits.
    pub in_flight_max: usize,
}

impl Default for Costs {
    /// A backward pass of twice a forward pass, transfers for nothing, two messages under way.
    fn default() -> Self {
        Self { forward: 1.0, backward: 2.0, transfer: 0.0, in_flight_max: 2 }
    }
}

/// What a step comes to.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Duration of the step.
    pub duration: f64,
    /// Share of stages x duration in which nothing is computed.
    pub bubble: f64,
    /// Per stage, the most forward results held at once for a backward pass to come.
    pub held_max: Vec<u32>,
}

/// What is wrong with a schedule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleFault {
    /// No stage can go on.
    #[error("deadlock: stage {stage} waits at instruction {index}, {instruction:?}")]
    Deadlock {
        /// The first stage that waits.
        stage: u32,
        /// Index into its list.
        index: usize,
        /// What it waits in.
        instruction: Instruction,
    },
    /// An instruction comes before what it needs, or twice.
    #[error("stage {stage}, instruction {index}, {instruction:?}: {why}")]
    Illegal {
        /// The stage.
        stage: u32,
        /// Index into its list.
        index: usize,
        /// The instruction.
        instruction: Instruction,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A stage ends with work undone or messages unread.
    #[error("stage {stage} ends, and micro-batch {micro} of chunk {chunk} is {why}")]
    Unfinished {
        /// The stage.
        stage: u32,
        /// The micro-batch.
        micro: u32,
        /// The chunk.
        chunk: u32,
        /// What is missing.
        why: &'static str,
    },
}

/// How far one micro-batch of one chunk has come on its stage.
#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    input: bool,
    forward: bool,
    output_sent: bool,
    gradient: bool,
    backward: bool,
    gradient_sent: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Message {
    backward: bool,
    micro: u32,
    /// Virtual stage that consumes it.
    to: u32,
}

#[derive(Debug, Default)]
struct Link {
    under_way: VecDeque<(Message, f64)>,
    /// When each message was taken, in order: a bounded sender waits for these.
    taken_at: Vec<f64>,
    sent: usize,
}

/// What became of one attempt to carry out an instruction.
enum Outcome {
    Done,
    Waits,
}

struct Simulation<'a> {
    schedule: &'a Schedule,
    costs: Costs,
    clock: Vec<f64>,
    busy: Vec<f64>,
    held: Vec<u32>,
    held_max: Vec<u32>,
    progress: BTreeMap<(u32, u32, u32), Progress>,
    links: BTreeMap<(u32, u32), Link>,
}

/// Carries out `schedule` and returns its figures.
///
/// Proves that every micro-batch is forwarded and backwarded exactly once per stage and chunk, in
/// an order in which each instruction has what it needs; that every message is received in the
/// order sent; and that nothing deadlocks when sends wait beyond `costs.in_flight_max` messages.
///
/// # Errors
/// The first [`ScheduleFault`].
pub fn simulate(schedule: &Schedule, costs: Costs) -> Result<Report, ScheduleFault> {
    let stages = schedule.stages() as usize;
    let mut simulation = Simulation {
        schedule,
        costs,
        clock: vec![0.0; stages],
        busy: vec![0.0; stages],
        held: vec![0; stages],
        held_max: vec![0; stages],
        progress: BTreeMap::new(),
        links: BTreeMap::new(),
    };
    let mut at = vec![0; stages];
    loop {
        let mut moved = false;
        for stage in 0..schedule.stages() {
            let list = schedule.stage(stage);
            while let Some(&instruction) = list.get(at[stage as usize]) {
                let index = at[stage as usize];
                match simulation.carry_out(stage, instruction) {
                    Ok(Outcome::Done) => at[stage as usize] += 1,
                    Ok(Outcome::Waits) => break,
                    Err(why) => {
                        return Err(ScheduleFault::Illegal { stage, index, instruction, why });
                    }
                }
                moved = true;
            }
        }
        if moved {
            continue;
        }
        for stage in 0..schedule.stages() {
            let index = at[stage as usize];
            if let Some(&instruction) = schedule.stage(stage).get(index) {
                return Err(ScheduleFault::Deadlock { stage, index, instruction });
            }
        }
        break;
    }
    simulation.finish()
}

impl Simulation<'_> {
    fn carry_out(&mut self, stage: u32, instruction: Instruction) -> Result<Outcome, &'static str> {
        use Instruction as I;
        let (micro, chunk) = match instruction {
            I::RecvForward { micro, chunk }
            | I::Forward { micro, chunk }
            | I::SendForward { micro, chunk }
            | I::RecvBackward { micro, chunk }
            | I::Backward { micro, chunk }
            | I::SendBackward { micro, chunk } => (micro, chunk),
        };
        if micro >= self.schedule.micros() || chunk >= self.schedule.chunks() {
            return Err("no such micro-batch or chunk");
        }
        let stages = self.schedule.stages();
        let virtual_stage = chunk * stages + stage;
        let first = virtual_stage == 0;
        let last = virtual_stage == stages * self.schedule.chunks() - 1;
        let key = (stage, chunk, micro);
        let mut state = self.progress.get(&key).copied().unwrap_or_default();
        let own = stage as usize;
        let require = |holds: bool, why| if holds { Ok(()) } else { Err(why) };
        let message = |backward, to| Message { backward, micro, to };
        match instruction {
            I::RecvForward { .. } => {
                require(!first, "the first stage has no input to receive")?;
                require(!state.input, "received twice")?;
                let from = (virtual_stage - 1) % stages;
                if !self.receive(from, stage, message(false, virtual_stage))? {
                    return Ok(Outcome::Waits);
                }
                state.input = true;
            }
            I::Forward { .. } => {
                require(first || state.input, "its input has not been received")?;
                require(!state.forward, "forwarded twice")?;
                state.forward = true;
                self.clock[own] += self.costs.forward;
                self.busy[own] += self.costs.forward;
                self.held[own] += 1;
                self.held_max[own] = self.held_max[own].max(self.held[own]);
            }
            I::SendForward { .. } => {
                require(!last, "the last stage has nobody to send to")?;
                require(state.forward, "there is no output yet")?;
                require(!state.output_sent, "sent twice")?;
                let to = virtual_stage + 1;
                if !self.send(stage, to % stages, message(false, to)) {
                    return Ok(Outcome::Waits);
                }
                state.output_sent = true;
            }
            I::RecvBackward { .. } => {
                require(!last, "the last stage makes its own gradient")?;
                require(!state.gradient, "received twice")?;
                let from = (virtual_stage + 1) % stages;
                if !self.receive(from, stage, message(true, virtual_stage))? {
                    return Ok(Outcome::Waits);
                }
                state.gradient = true;
            }
            I::Backward { .. } => {
                require(state.forward, "it has not been forwarded")?;
                require(last || state.gradient, "its gradient has not been received")?;
                require(!state.backward, "backwarded twice")?;
                state.backward = true;
                self.clock[own] += self.costs.backward;
                self.busy[own] += self.costs.backward;
                self.held[own] -= 1;
            }
            I::SendBackward { .. } => {
                require(!first, "the first stage has nobody to send to")?;
                require(state.backward, "there is no gradient yet")?;
                require(!state.gradient_sent, "sent twice")?;
                let to = virtual_stage - 1;
                if !self.send(stage, to % stages, message(true, to)) {
                    return Ok(Outcome::Waits);
                }
                state.gradient_sent = true;
            }
        }
        self.progress.insert(key, state);
        Ok(Outcome::Done)
    }

    /// Returns whether there was room; a full link frees a place when a message is taken.
    fn send(&mut self, from: u32, to: u32, message: Message) -> bool {
        let link = self.links.entry((from, to)).or_default();
        let clock = &mut self.clock[from as usize];
        if let Some(place) = link.sent.checked_sub(self.costs.in_flight_max) {
            match link.taken_at.get(place) {
                Some(&taken) => *clock = clock.max(taken),
                None => return false,
            }
        }
        link.sent += 1;
        link.under_way.push_back((message, *clock + self.costs.transfer));
        true
    }

    /// Returns whether a message was there, which must be the one expected.
    fn receive(&mut self, from: u32, to: u32, expected: Message) -> Result<bool, &'static str> {
        let link = self.links.entry((from, to)).or_default();
        let Some(&(message, arrives)) = link.under_way.front() else {
            return Ok(false);
        };
        if message != expected {
            return Err("the next message of its peer is another one");
        }
        link.under_way.pop_front();
        let clock = &mut self.clock[to as usize];
        *clock = clock.max(arrives);
        link.taken_at.push(*clock);
        Ok(true)
    }

    fn finish(self) -> Result<Report, ScheduleFault> {
        for stage in 0..self.schedule.stages() {
            for chunk in 0..self.schedule.chunks() {
                for micro in 0..self.schedule.micros() {
                    let state = self.progress.get(&(stage, chunk, micro));
                    let state = state.copied().unwrap_or_default();
                    let why = match state {
                        Progress { forward: false, .. } => "not forwarded",
                        Progress { backward: false, .. } => "not backwarded",
                        _ => continue,
                    };
                    return Err(ScheduleFault::Unfinished { stage, micro, chunk, why });
                }
            }
        }
        for ((_, to), link) in &self.links {
            if let Some((message, _)) = link.under_way.front() {
                return Err(ScheduleFault::Unfinished {
                    stage: *to,
                    micro: message.micro,
                    chunk: message.to / self.schedule.stages(),
                    why: "sent but never received",
                });
            }
        }
        let duration = self.clock.iter().copied().fold(0.0, f64::max);
        let available = duration * f64::from(self.schedule.stages());
        let bubble =
            if available > 0.0 { 1.0 - self.busy.iter().sum::<f64>() / available } else { 0.0 };
        Ok(Report { duration, bubble, held_max: self.held_max })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_f_one_b_has_the_bubble_of_the_formula_and_bounded_activations() {
        for stages in 1..=8 {
            for micros in [1, 2, 3, 7, 8, 16, 33] {
                let schedule = Schedule::one_f_one_b(stages, micros).unwrap();
                for in_flight_max in [1, 2] {
                    let costs = Costs { in_flight_max, ..Costs::default() };
                    let report = simulate(&schedule, costs).unwrap();
                    if in_flight_max >= 2 || stages <= 2 {
                        assert!(
                            (report.bubble - schedule.bubble_ideal()).abs() < 1e-9,
                            "{stages} stages, {micros} micro-batches: {report:?}, expected {}",
                            schedule.bubble_ideal()
                        );
                    }
                    for (stage, held) in report.held_max.iter().enumerate() {
                        assert_eq!(*held, (stages - stage as u32).min(micros));
                    }
                }
            }
        }
    }

    #[test]
    fn interleaving_divides_the_bubble() {
        for (stages, chunks, micros) in [(2, 2, 4), (4, 2, 8), (4, 3, 16), (3, 2, 9), (8, 4, 32)] {
            let schedule = Schedule::interleaved(stages, chunks, micros).unwrap();
            let costs = Costs { in_flight_max: 8, ..Costs::default() };
            let report = simulate(&schedule, costs)
                .unwrap_or_else(|fault| panic!("{stages} x {chunks}, {micros}: {fault}"));
            let plain = Schedule::one_f_one_b(stages, micros).unwrap();
            assert!(
                report.bubble < plain.bubble_ideal(),
                "{stages} x {chunks}, {micros}: {} against {}",
                report.bubble,
                plain.bubble_ideal()
            );
        }
    }

    #[test]
    fn a_missing_backward_pass_is_found() {
        let schedule = Schedule::one_f_one_b(2, 2).unwrap();
        let mut lists: Vec<Vec<_>> = (0..2).map(|s| schedule.stage(s).to_vec()).collect();
        lists[0].pop();
        let fault = simulate(&Schedule::from_lists(1, 2, lists), Costs::default());
        assert_eq!(
            fault,
            Err(ScheduleFault::Unfinished { stage: 0, micro: 1, chunk: 0, why: "not backwarded" })
        );
    }

    #[test]
    fn two_stages_that_wait_for_one_another_are_a_deadlock() {
        use Instruction as I;
        let at = (0, 0);
        let lists = vec![
            vec![I::RecvBackward { micro: at.0, chunk: at.1 }],
            vec![I::RecvForward { micro: at.0, chunk: at.1 }],
        ];
        let fault = simulate(&Schedule::from_lists(1, 1, lists), Costs::default());
        assert!(matches!(fault, Err(ScheduleFault::Deadlock { stage: 0, .. })), "{fault:?}");
    }

    proptest! {
        #[test]
        fn a_lost_instruction_is_always_found(
            stages in 1u32..5, micros in 1u32..7, stage in 0usize..5, index in 0usize..60,
        ) {
            let schedule = Schedule::one_f_one_b(stages, micros).unwrap();
            let mut lists: Vec<Vec<_>> =
                (0..stages).map(|s| schedule.stage(s).to_vec()).collect();
            let list = &mut lists[stage % stages as usize];
            let lost = list.remove(index % list.len());
            let report = simulate(&Schedule::from_lists(1, micros, lists), Costs::default());
            prop_assert!(report.is_err(), "lost {lost:?} unnoticed");
        }

        #[test]
        fn every_interleaved_schedule_is_sound(
            stages in 2u32..6, chunks in 2u32..4, rounds in 1u32..5,
        ) {
            let schedule = Schedule::interleaved(stages, chunks, stages * rounds).unwrap();
            let costs = Costs { in_flight_max: (stages * chunks) as usize, ..Costs::default() };
            let report = simulate(&schedule, costs);
            prop_assert!(report.is_ok(), "{:?}", report);
        }
    }
}
