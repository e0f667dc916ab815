//! Which rank failed first: the one that the others only followed.

use drumline_types::{Explanation, RankExit, RankPhase, Reason, Timestamp};

use crate::state::{RankState, State};

/// How likely a failed rank is the cause, likeliest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    /// It failed by itself.
    Own,
    /// It was lost with its node.
    Lost,
    /// It failed because a peer was gone.
    Followed,
    /// It ended because the gang was told to stop.
    Stopped,
}

const SIGKILL: i32 = 9;
const SIGTERM: i32 = 15;

/// Returns the rank of the present attempt that failed first.
///
/// A signal or an error of its own goes before a lost node, and that before a peer that was found
/// gone; among equals the earlier one by its node's clock. Ranks that ended by our own stop are no
/// cause, unless they had ended before any other: their news was only slower.
#[must_use]
pub fn first(state: &State) -> Option<&RankState> {
    let failed = || state.ranks.iter().filter(|rank| is_failure(state, rank));
    let earliest = failed().filter(|rank| !rank.after_stop).filter_map(|rank| rank.ended).min();
    failed().min_by_key(|rank| {
        let ended = rank.ended.unwrap_or(Timestamp(u64::MAX));
        (standing(rank, earliest), ended, rank.rank)
    })
}

/// A rank that ended with exit code 0 has failed only if that alone took the gang down, as with a
/// service, which never ends by itself.
fn is_failure(state: &State, rank: &RankState) -> bool {
    match rank.phase {
        RankPhase::Failed => true,
        RankPhase::Succeeded => {
            state
                .ending
                .as_ref()
                .is_some_and(|e| !e.cancelled && e.why.reason == Reason::RankFailed)
                && !rank.after_stop
                && !state
                    .ranks
                    .iter()
                    .any(|other| other.phase == RankPhase::Failed && !other.after_stop)
        }
        RankPhase::Launching | RankPhase::Started | RankPhase::Running => false,
    }
}

fn standing(rank: &RankState, earliest: Option<Timestamp>) -> Standing {
    if rank.lost {
        return Standing::Lost;
    }
    let exit = rank.exit.as_ref();
    let told = exit.map_or("", |exit| exit.message.as_str());
    if is_peer_gone(told) || is_peer_gone(&rank.error) {
        return Standing::Followed;
    }
    let signal = exit.and_then(|exit| exit.signal);
    let code = exit.and_then(|exit| exit.code);
    let by_stop = matches!(signal, Some(SIGKILL | SIGTERM)) || matches!(code, Some(130 | 143 | 0));
    if rank.after_stop && by_stop && !(rank.ended.is_some() && rank.ended <= earliest) {
        return Standing::Stopped;
    }
    Standing::Own
}

/// Returns whether a message says that another rank was found gone or silent.
#[must_use]
pub fn is_peer_gone(message: &str) -> bool {
    const SIGNS: [&str; 7] = [
        "is gone during",
        "of the group is silent",
        "peer gone",
        "connection reset by peer",
        "connection closed by peer",
        "broken pipe",
        "connection refused",
    ];
    let message = message.to_lowercase();
    SIGNS.iter().any(|sign| message.contains(sign))
}

/// Says in one line what ended an attempt.
#[must_use]
pub fn explain(rank: &RankState) -> Explanation {
    let place = format!("rank {} on {}", rank.rank, rank.device.node);
    let exit = evidence(rank);
    let words = if exit.message.is_empty() { String::new() } else { format!(": {}", exit.message) };
    if rank.lost {
        return Explanation::new(Reason::NodeLost, format!("{place} was lost{words}"));
    }
    match (exit.signal, exit.code) {
        (Some(signal), _) => {
            let name = signal_name(signal);
            Explanation::new(Reason::RankKilled, format!("{place} was ended by {name}{words}"))
        }
        (None, Some(code)) => {
            Explanation::new(Reason::RankFailed, format!("{place} exited with code {code}{words}"))
        }
        (None, None) => Explanation::new(Reason::RankFailed, format!("{place} failed{words}")),
    }
}

/// Returns how a rank ended, with the error that it reported where its agent saw none.
#[must_use]
pub fn evidence(rank: &RankState) -> RankExit {
    let unknown = RankExit { rank: rank.rank, code: None, signal: None, message: String::new() };
    let mut exit = rank.exit.clone().unwrap_or(unknown);
    if !rank.error.is_empty() {
        exit.message.clone_from(&rank.error);
    }
    exit
}

fn signal_name(signal: i32) -> String {
    let name = match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        13 => "SIGPIPE",
        15 => "SIGTERM",
        _ => return format!("signal {signal}"),
    };
    format!("signal {signal} ({name})")
}
