//! Keeps this process on the cores that its agent gave it, so that ranks on one host do not wander
//! over one another's.

use drumline_wire::contract;

/// Keeps this thread, and those that it will start, on the cores that the environment names; does
/// nothing when it names none. Returns what could not be done, which is no reason to stop: the
/// system then shares the cores as it likes.
///
/// # Errors
/// The reason, in words.
pub fn keep() -> Result<(), String> {
    match std::env::var(contract::CORES) {
        Ok(list) => pin(&list).map_err(|why| format!("{} {list:?}: {why}", contract::CORES)),
        Err(_) => Ok(()),
    }
}

/// Reads a list such as `0-3,8`.
fn parse(list: &str) -> Result<Vec<usize>, String> {
    let number = |text: &str| {
        text.parse::<usize>()
            .ok()
            .filter(|core| *core < MAX_CPU)
            .ok_or_else(|| format!("{text:?} is no core"))
    };
    let mut cores = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(format!("{part:?} runs backwards"));
        }
        cores.extend(first..=last);
    }
    Ok(cores)
}

#[cfg(target_os = "linux")]
const MAX_CPU: usize = rustix::thread::CpuSet::MAX_CPU;
#[cfg(not(target_os = "linux"))]
const MAX_CPU: usize = 1024;

#[cfg(target_os = "linux")]
fn pin(list: &str) -> Result<(), String> {
    use rustix::thread::{CpuSet, sched_setaffinity};
    let mut set = CpuSet::new();
    for core in parse(list)? {
        set.set(core);
    }
    sched_setaffinity(None, &set).map_err(|error| error.to_string())
}

#[cfg(not(target_os = "linux"))]
fn pin(list: &str) -> Result<(), String> {
    parse(list).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cores_are_read_and_nonsense_is_told() {
        assert_eq!(parse("0-2,5"), Ok(vec![0, 1, 2, 5]));
        assert_eq!(parse("3"), Ok(vec![3]));
        for wrong in ["", "a", "2-1", "1-", "99999999"] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_thread_stays_on_its_cores_and_so_do_those_it_starts() {
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        let core = (0..MAX_CPU).find(|core| allowed.is_set(*core)).unwrap();
        std::thread::spawn(move || {
            pin(&core.to_string()).unwrap();
            std::thread::spawn(move || {
                let own = rustix::thread::sched_getaffinity(None).unwrap();
                assert_eq!((own.count(), own.is_set(core)), (1, true));
            })
            .join()
            .unwrap();
        })
        .join()
        .unwrap();
    }
}
