//! Whether a device can be used: signs in, a verdict out. Pure: the same signs, the same verdict.
//!
//! What the driver says goes before what its error numbers usually mean ([`xid`]). [`memory`] keeps
//! the signs that do not go away by themselves until somebody has dealt with them.

pub mod memory;
pub mod xid;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use drumline_telemetry::gpu::Recovery;

/// A driver that does not answer for so long is stuck.
pub const STUCK_AFTER: Duration = Duration::from_secs(60);

/// What must be done, mildest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Action {
    /// Nothing.
    #[default]
    None,
    /// Nothing; it is counted.
    Record,
    /// The application that met it starts again; the device is fine.
    RestartApplication,
    /// What runs may end; nothing new starts until somebody has looked.
    Drain,
    /// Nothing runs until the GPU was reset.
    Reset,
    /// Nothing runs until the node was rebooted.
    Reboot,
    /// Nothing runs until the GPU was replaced.
    Hardware,
}

impl Action {
    /// Every action, mildest first.
    pub const ALL: [Self; 7] = [
        Self::None,
        Self::Record,
        Self::RestartApplication,
        Self::Drain,
        Self::Reset,
        Self::Reboot,
        Self::Hardware,
    ];

    /// Returns the token used in messages and labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Record => "record",
            Self::RestartApplication => "restart_application",
            Self::Drain => "drain",
            Self::Reset => "reset",
            Self::Reboot => "reboot",
            Self::Hardware => "hardware",
        }
    }

    /// Returns what an operator does, in a few words; empty when nothing.
    #[must_use]
    pub fn remedy(self) -> &'static str {
        match self {
            Self::None | Self::Record | Self::RestartApplication => "",
            Self::Drain => "look at it, then clear it",
            Self::Reset => "reset the GPU, then clear it",
            Self::Reboot => "reboot the node",
            Self::Hardware => "have the GPU replaced",
        }
    }

    /// Whether the device may be given to new work.
    #[must_use]
    pub fn is_usable(self) -> bool {
        self < Self::Drain
    }

    /// Whether what runs on the device must end now.
    #[must_use]
    pub fn ends_work(self) -> bool {
        self >= Self::Reset
    }

    /// Returns how bad it is.
    #[must_use]
    pub fn severity(self) -> Severity {
        match self {
            Self::None => Severity::Good,
            Self::Record => Severity::Notice,
            Self::RestartApplication | Self::Drain => Severity::Warning,
            Self::Reset | Self::Reboot | Self::Hardware => Severity::Critical,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// All is well.
    Good,
    /// Worth knowing.
    Notice,
    /// Something was lost, or soon may be.
    Warning,
    /// The device is of no use as it is.
    Critical,
}

/// What is known of a device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Signs {
    /// What the driver wants done; `None`: it does not say.
    pub recovery: Option<Recovery>,
    /// Error numbers seen since it was cleared, with how often. 0: the driver gave no number.
    pub xids: BTreeMap<u64, u64>,
    /// It was found lost; the text is the driver's.
    pub lost: Option<String>,
    /// A memory row waits for a reset to be remapped.
    pub remap_pending: bool,
    /// A memory row could not be remapped.
    pub remap_failed: bool,
    /// How long the driver has not answered.
    pub silent: Duration,
}

/// What follows from the signs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verdict {
    /// What must be done.
    pub action: Action,
    /// Why: the evidence, and what would help. Empty when nothing is wrong.
    pub reason: String,
}

/// Judges a device.
///
/// A recovery action of the driver decides by itself, whatever was seen. Without one, or when the
/// driver sees no need for any, the worst of the other signs decides.
#[must_use]
pub fn judge(signs: &Signs) -> Verdict {
    let told = match signs.recovery {
        None | Some(Recovery::None) => None,
        Some(Recovery::Reset) => Some((Action::Reset, "the driver asks for a reset")),
        Some(Recovery::Reboot) => Some((Action::Reboot, "the driver asks for a reboot")),
        Some(Recovery::DrainPeers) => {
            Some((Action::Drain, "the driver asks to drain the GPU's peers"))
        }
        Some(Recovery::DrainAndReset) => {
            Some((Action::Reset, "the driver asks to drain and reset"))
        }
    };
    if let Some((action, what)) = told {
        return verdict(action, &seen(signs, what));
    }
    let mut worst = (Action::None, String::new());
    let mut take = |action: Action, why: &dyn Fn() -> String| {
        if action > worst.0 {
            worst = (action, why());
        }
    };
    // Worn-out memory comes first: of equal signs the first is told.
    if signs.remap_failed {
        take(Action::Hardware, &|| "a memory row could not be remapped".to_owned());
    }
    for code in signs.xids.keys() {
        let meaning = xid::meaning(*code);
        take(meaning.action, &|| format!("Xid {code}: {}", meaning.what));
    }
    if let Some(words) = &signs.lost {
        take(Action::Reboot, &|| words.clone());
    }
    if signs.remap_pending {
        take(Action::Drain, &|| "a memory row waits for a reset to be remapped".to_owned());
    }
    if signs.silent >= STUCK_AFTER {
        let silent = signs.silent.as_secs();
        take(Action::Drain, &|| format!("the driver has not answered for {silent} s"));
    }
    verdict(worst.0, &worst.1)
}

/// Joins the driver's wish with the last error that may have led to it.
fn seen(signs: &Signs, what: &str) -> String {
    let cause = signs.xids.keys().rev().find(|code| **code != xid::RECOVERY_CHANGED);
    match cause {
        Some(code) => format!("{what} (Xid {code}: {})", xid::meaning(*code).what),
        None => what.to_owned(),
    }
}

fn verdict(action: Action, why: &str) -> Verdict {
    let remedy = action.remedy();
    let reason = match (action.is_usable(), remedy) {
        (true, _) if action != Action::None => why.to_owned(),
        (true, _) => String::new(),
        (false, remedy) => format!("{why}; {remedy}"),
    };
    Verdict { action, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xids(codes: &[u64]) -> Signs {
        Signs { xids: codes.iter().map(|code| (*code, 1)).collect(), ..Signs::default() }
    }

    #[test]
    fn signs_lead_to_actions() {
        let says = |recovery| Signs { recovery: Some(recovery), ..Signs::default() };
        let lost = Signs { lost: Some("device fell off the bus".to_owned()), ..Signs::default() };
        let table: Vec<(&str, Signs, Action, &str)> = vec![
            ("nothing", Signs::default(), Action::None, ""),
            ("an application's fault", xids(&[31]), Action::RestartApplication, "Xid 31"),
            ("a count", xids(&[63]), Action::Record, "Xid 63"),
            ("an unknown number", xids(&[777]), Action::Record, "Xid 777"),
            ("no number", xids(&[0]), Action::Record, "Xid 0"),
            ("fallen off the bus", xids(&[79]), Action::Reboot, "Xid 79"),
            ("the worst of several", xids(&[13, 48, 95]), Action::Reset, "Xid 95"),
            ("look closer", xids(&[74]), Action::Drain, "NVLink"),
            ("lost", lost.clone(), Action::Reboot, "fell off the bus"),
            ("the driver wants a reset", says(Recovery::Reset), Action::Reset, "driver"),
            ("the driver wants a reboot", says(Recovery::Reboot), Action::Reboot, "driver"),
            ("drain the peers", says(Recovery::DrainPeers), Action::Drain, "peers"),
            ("drain and reset", says(Recovery::DrainAndReset), Action::Reset, "drain and reset"),
            ("the driver sees no need", says(Recovery::None), Action::None, ""),
            (
                "the driver goes before the table, milder",
                Signs { recovery: Some(Recovery::DrainPeers), ..xids(&[79]) },
                Action::Drain,
                "Xid 79",
            ),
            (
                "the driver goes before the table, stricter",
                Signs { recovery: Some(Recovery::Reboot), ..xids(&[13, 154]) },
                Action::Reboot,
                "(Xid 13",
            ),
            (
                "the table decides where the driver sees no need",
                Signs { recovery: Some(Recovery::None), ..xids(&[79]) },
                Action::Reboot,
                "Xid 79",
            ),
            (
                "worn-out memory",
                Signs { remap_failed: true, ..xids(&[64]) },
                Action::Hardware,
                "remapped",
            ),
            (
                "a row that waits",
                Signs { remap_pending: true, ..Signs::default() },
                Action::Drain,
                "waits for a reset",
            ),
            (
                "a driver that is stuck",
                Signs { silent: STUCK_AFTER, ..Signs::default() },
                Action::Drain,
                "60 s",
            ),
            (
                "a driver that is slow",
                Signs { silent: STUCK_AFTER / 2, ..Signs::default() },
                Action::None,
                "",
            ),
        ];
        for (name, signs, action, evidence) in table {
            let verdict = judge(&signs);
            assert_eq!(verdict.action, action, "{name}: {}", verdict.reason);
            assert!(verdict.reason.contains(evidence), "{name}: {}", verdict.reason);
            assert_eq!(verdict.reason.is_empty(), action == Action::None, "{name}");
        }
    }

    #[test]
    fn only_what_cannot_go_on_is_ended() {
        for action in Action::ALL {
            assert!(!action.ends_work() || !action.is_usable(), "{action}");
        }
        assert!(!Action::Drain.is_usable() && !Action::Drain.ends_work());
        assert!(Action::RestartApplication.is_usable());
        assert!(Action::Reboot.ends_work());
        assert_eq!(Action::Hardware.severity(), Severity::Critical);
    }
}
