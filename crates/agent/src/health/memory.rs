//! What is remembered of each device until somebody has dealt with it: an agent that starts again
//! must not offer a GPU that has fallen off the bus a minute ago.
//!
//! Kept in a file of the agent's state folder, by the device's UUID. A reboot clears everything: it
//! resets every GPU, and what is still wrong then is seen again.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Different error numbers kept for one device.
const XIDS_MAX: usize = 64;

/// What was seen of one device since it was cleared.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Seen {
    /// Error numbers, with how often each came.
    pub xids: BTreeMap<u64, u64>,
    /// The driver's words when it was found lost.
    pub lost: Option<String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Stored {
    /// The boot that it is about.
    boot: String,
    devices: BTreeMap<String, Seen>,
}

/// What was seen of all devices.
#[derive(Debug)]
pub struct Memory {
    path: PathBuf,
    stored: Stored,
}

impl Memory {
    /// Reads what an earlier agent of this boot has seen. A file that cannot be read is as none.
    #[must_use]
    pub fn open(state_dir: &Path) -> Self {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self::open_in_boot(state_dir, boot.trim())
    }

    fn open_in_boot(state_dir: &Path, boot: &str) -> Self {
        let path = state_dir.join("health.json");
        let stored: Stored = std::fs::read(&path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .filter(|stored: &Stored| stored.boot == boot)
            .unwrap_or_default();
        Self { path, stored: Stored { boot: boot.to_owned(), ..stored } }
    }

    /// Returns what was seen of a device.
    #[must_use]
    pub fn of(&self, uuid: &str) -> Seen {
        self.stored.devices.get(uuid).cloned().unwrap_or_default()
    }

    /// Notes an error number; 0 when the driver gave none.
    pub fn saw_error(&mut self, uuid: &str, code: u64) {
        let seen = self.stored.devices.entry(uuid.to_owned()).or_default();
        if seen.xids.len() < XIDS_MAX || seen.xids.contains_key(&code) {
            *seen.xids.entry(code).or_default() += 1;
            self.keep();
        }
    }

    /// Notes that a device is lost.
    pub fn saw_loss(&mut self, uuid: &str, words: &str) {
        let seen = self.stored.devices.entry(uuid.to_owned()).or_default();
        if seen.lost.is_none() {
            seen.lost = Some(words.to_owned());
            self.keep();
        }
    }

    /// Forgets what was seen of a device: somebody has dealt with it.
    pub fn clear(&mut self, uuid: &str) {
        if self.stored.devices.remove(uuid).is_some() {
            self.keep();
        }
    }

    fn keep(&self) {
        if let Err(error) = self.write() {
            let path = self.path.display();
            tracing::error!(%path, %error, "the devices' health cannot be kept");
        }
    }

    fn write(&self) -> io::Result<()> {
        let fresh = self.path.with_extension("json.new");
        std::fs::write(&fresh, serde_json::to_vec(&self.stored)?)?;
        std::fs::rename(&fresh, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_outlives_the_agent_but_not_the_boot() {
        let folder = tempfile::tempdir().unwrap();
        let mut memory = Memory::open_in_boot(folder.path(), "one");
        memory.saw_error("GPU-a", 79);
        memory.saw_error("GPU-a", 79);
        memory.saw_loss("GPU-b", "gone");
        let again = Memory::open_in_boot(folder.path(), "one");
        assert_eq!(again.of("GPU-a").xids, [(79, 2)].into());
        assert_eq!(again.of("GPU-b").lost.as_deref(), Some("gone"));
        assert_eq!(Memory::open_in_boot(folder.path(), "two").of("GPU-a"), Seen::default());
        memory.clear("GPU-a");
        assert_eq!(Memory::open_in_boot(folder.path(), "one").of("GPU-a"), Seen::default());
        assert!(Memory::open_in_boot(folder.path(), "one").of("GPU-b").lost.is_some());
    }

    #[test]
    fn a_damaged_file_is_as_none() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("health.json"), b"{\"boot\": 7").unwrap();
        assert_eq!(Memory::open_in_boot(folder.path(), "one").of("GPU-a"), Seen::default());
    }
}
