//! NVIDIA's error numbers and what each asks for, where the driver says nothing of its own.
//!
//! Source: NVIDIA, "XID Errors" and "GPU Debug Guidelines"; the sorting follows what operators of
//! large fleets do with them.

use super::Action;

/// The number that only tells that the driver's recovery action has changed.
pub const RECOVERY_CHANGED: u64 = 154;

/// What one error number means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meaning {
    /// What it asks for.
    pub action: Action,
    /// What happened, in a few words.
    pub what: &'static str,
}

/// Returns what an error number means. An unknown one is recorded, no more: applications cause most
/// of them.
#[must_use]
pub fn meaning(code: u64) -> Meaning {
    let (action, what) = match code {
        13 => (Action::RestartApplication, "a kernel raised an exception"),
        31 => (Action::RestartApplication, "a kernel touched memory that is not its own"),
        43 => (Action::Record, "an application's work was stopped"),
        46 => (Action::Reset, "the GPU stopped processing"),
        48 => (Action::Drain, "a memory error that could not be corrected"),
        62 => (Action::Reset, "the GPU's microcontroller halted"),
        63 => (Action::Record, "a memory row was remapped"),
        64 => (Action::Reset, "a memory row could not be recorded for remapping"),
        68 => (Action::RestartApplication, "the video decoder raised an exception"),
        69 => (Action::RestartApplication, "a graphics engine raised an exception"),
        74 => (Action::Drain, "an NVLink error"),
        79 => (Action::Reboot, "the GPU has fallen off the bus"),
        92 => (Action::Record, "many memory errors were corrected"),
        94 => (Action::RestartApplication, "a memory error was contained to one application"),
        95 => (Action::Reset, "a memory error could not be contained"),
        109 => (Action::Reset, "a context switch timed out"),
        110 => (Action::Reset, "a security fault"),
        119 => (Action::Reset, "the GPU's system processor did not answer"),
        120 => (Action::Reset, "the GPU's system processor failed"),
        136 => (Action::Reset, "link training failed"),
        140 => (Action::Reset, "an unrecovered memory error"),
        143 => (Action::Reset, "the GPU could not be initialised"),
        144..=150 => (Action::Drain, "an NVLink error"),
        155 => (Action::Reset, "NVLink firmware failed"),
        156 => (Action::Reset, "a resource could not be retired"),
        158 => (Action::Reset, "a timeout within the GPU"),
        RECOVERY_CHANGED => (Action::Record, "the driver's recovery action has changed"),
        _ => (Action::Record, "an error of the GPU"),
    };
    Meaning { action, what }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_that_operators_sort_is_sorted_as_they_do() {
        let table: [(Action, &[u64]); 5] = [
            (Action::RestartApplication, &[13, 31, 68, 69, 94]),
            (Action::Record, &[43, 63, 92, 154, 1, 32, 500]),
            (Action::Reset, &[46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158]),
            (Action::Reboot, &[79]),
            (Action::Drain, &[48, 74, 144, 145, 146, 147, 148, 149, 150]),
        ];
        for (action, codes) in table {
            for code in codes {
                assert_eq!(meaning(*code).action, action, "Xid {code}");
            }
        }
    }
}
