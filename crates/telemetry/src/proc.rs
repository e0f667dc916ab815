//! Collectors over `/proc`: what the machine and each process use.
//!
//! Every reading may fail (the process has just ended, the file is hidden) and is then `None`.

use std::collections::BTreeMap;
use std::fs;
use std::time::Instant;

/// Memory of the machine, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// All of it.
    pub total_bytes: u64,
    /// What a new program could still get, as the kernel estimates it.
    pub available_bytes: u64,
}

impl Memory {
    /// Returns what is not available any more.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.total_bytes.saturating_sub(self.available_bytes)
    }
}

/// Reads the machine's memory.
#[must_use]
pub fn node_memory() -> Option<Memory> {
    parse_meminfo(&fs::read_to_string("/proc/meminfo").ok()?)
}

/// Returns the machine's memory in bytes.
#[must_use]
pub fn node_memory_total() -> Option<u64> {
    node_memory().map(|memory| memory.total_bytes)
}

/// Returns the memory of the machine that is in use, in bytes.
#[must_use]
pub fn node_memory_used() -> Option<u64> {
    node_memory().map(|memory| memory.used_bytes())
}

fn parse_meminfo(text: &str) -> Option<Memory> {
    let field = |name: &str| -> Option<u64> {
        let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 =
            rest.trim_start_matches(':').trim().strip_suffix(" kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    };
    Some(Memory { total_bytes: field("MemTotal")?, available_bytes: field("MemAvailable")? })
}

/// Returns the core-seconds that the machine's cores have been busy since it started.
#[must_use]
pub fn node_cpu_seconds() -> Option<f64> {
    let ticks = parse_stat_busy(&fs::read_to_string("/proc/stat").ok()?)?;
    Some(ticks as f64 / ticks_per_second())
}

/// Sums user, nice, system, irq, softirq and steal of the first line.
fn parse_stat_busy(text: &str) -> Option<u64> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line.split_whitespace().map_while(|n| n.parse().ok()).collect();
    // 3 is idle and 4 waits for a disk; 8 and 9 are counted in user and nice already.
    (ticks.len() >= 8).then(|| [0, 1, 2, 5, 6, 7].iter().map(|&at| ticks[at]).sum())
}

/// What a process, or several together, use.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Usage {
    /// Resident memory; memory that processes share is counted in each.
    pub rss_bytes: u64,
    /// Core-seconds used so far, without those of children that have ended.
    pub cpu_seconds: f64,
    /// Number of processes.
    pub processes: u32,
}

/// Reads what one process uses.
#[must_use]
pub fn process(pid: u32) -> Option<Usage> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let stat = parse_process(&stat)?;
    Some(stat.usage())
}

/// Returns the process group that a process is in.
#[must_use]
pub fn group_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_process(&stat).map(|stat| stat.group)
}

/// Reads what every process group uses, by the group's id. One walk over `/proc`.
#[must_use]
pub fn process_groups() -> BTreeMap<u32, Usage> {
    let mut groups: BTreeMap<u32, Usage> = BTreeMap::new();
    let Ok(entries) = fs::read_dir("/proc") else { return groups };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let Some(stat) = parse_process(&text) else { continue };
        let (group, one) = (groups.entry(stat.group).or_default(), stat.usage());
        group.rss_bytes += one.rss_bytes;
        group.cpu_seconds += one.cpu_seconds;
        group.processes += 1;
    }
    groups
}

struct ProcessStat {
    group: u32,
    ticks: u64,
    rss_pages: u64,
}

impl ProcessStat {
    fn usage(&self) -> Usage {
        Usage {
            rss_bytes: self.rss_pages * rustix::param::page_size() as u64,
            cpu_seconds: self.ticks as f64 / ticks_per_second(),
            processes: 1,
        }
    }
}

/// Parses `/proc/PID/stat`. The command's name may hold blanks and parentheses: fields are counted
/// from behind its last one.
fn parse_process(text: &str) -> Option<ProcessStat> {
    let rest = &text[text.rfind(')')? + 1..];
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // The first of these is field 3 of proc(5).
    let field = |number: usize| -> Option<u64> { fields.get(number - 3)?.parse().ok() };
    Some(ProcessStat {
        group: u32::try_from(field(5)?).ok()?,
        ticks: field(14)? + field(15)?,
        rss_pages: field(24)?,
    })
}

fn ticks_per_second() -> f64 {
    rustix::param::clock_ticks_per_second().max(1) as f64
}

/// Turns growing core-seconds into cores in use between two readings, per source.
#[derive(Debug, Default)]
pub struct Rates<K: Ord>(BTreeMap<K, (f64, Instant)>);

impl<K: Ord> Rates<K> {
    /// Creates an empty set of sources.
    #[must_use]
    pub fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// Returns the cores in use since this source's last reading; 0 at its first, and when its
    /// processes were replaced by others in between.
    pub fn cores(&mut self, source: K, cpu_seconds: f64, now: Instant) -> f64 {
        let Some((before, at)) = self.0.insert(source, (cpu_seconds, now)) else { return 0.0 };
        let elapsed = now.saturating_duration_since(at).as_secs_f64();
        if elapsed > 0.0 { ((cpu_seconds - before) / elapsed).max(0.0) } else { 0.0 }
    }

    /// Forgets the sources that `keep` refuses.
    pub fn retain(&mut self, mut keep: impl FnMut(&K) -> bool) {
        self.0.retain(|source, _| keep(source));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn memory_is_read_in_bytes() {
        let text = "MemTotal:       16384 kB\nMemFree: 1 kB\nMemAvailable:    4096 kB\n";
        let memory = parse_meminfo(text).unwrap();
        assert_eq!(memory.total_bytes, 16 << 20);
        assert_eq!(memory.used_bytes(), 12 << 20);
        assert_eq!(parse_meminfo("MemTotal: 5 kB\n"), None);
    }

    #[test]
    fn waiting_and_idle_are_not_busy() {
        let text = "cpu  100 10 20 9999 8888 1 2 3 50 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(parse_stat_busy(text), Some(136));
        assert_eq!(parse_stat_busy("intr 5\n"), None);
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let text = "42 (a) b (c)) S 1 77 42 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 4 0 1000 \
                    1000000 300 18446744073709551615";
        let stat = parse_process(text).unwrap();
        assert_eq!((stat.group, stat.ticks, stat.rss_pages), (77, 300, 300));
        assert!(parse_process("nonsense").is_none());
    }

    #[test]
    fn this_process_and_machine_can_be_read() {
        let me = process(std::process::id()).unwrap();
        assert!(me.rss_bytes > 100 << 10, "{me:?}");
        assert!(process_groups().values().any(|group| group.processes > 0));
        assert!(node_memory_total().unwrap() > node_memory_used().unwrap());
        assert!(node_cpu_seconds().unwrap() > 0.0);
        assert_eq!(process(u32::MAX), None);
    }

    #[test]
    fn a_rate_needs_two_readings_and_never_goes_below_zero() {
        let start = Instant::now();
        let mut rates = Rates::new();
        assert_eq!(rates.cores("a", 10.0, start), 0.0);
        assert_eq!(rates.cores("a", 13.0, start + Duration::from_secs(2)), 1.5);
        assert_eq!(rates.cores("a", 1.0, start + Duration::from_secs(3)), 0.0);
        rates.retain(|_| false);
        assert_eq!(rates.cores("a", 5.0, start + Duration::from_secs(4)), 0.0);
    }
}
