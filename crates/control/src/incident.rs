//! Plans that failed their audit: the state that they were made from is kept, so that the decision
//! can be replayed elsewhere with `drumline sim replay`.

use std::path::{Path, PathBuf};

use drumline_scheduler::Saved;
use drumline_types::Timestamp;

/// Incidents that are kept; the oldest go first.
const KEPT_MAX: usize = 16;

/// Writes a state to a file of its own below `folder`, and returns its path.
///
/// # Errors
/// The system's, when the folder cannot be written.
pub(crate) fn save(folder: &Path, saved: &Saved, now: Timestamp) -> std::io::Result<PathBuf> {
    std::fs::create_dir_all(folder)?;
    let path = folder.join(format!("plan-{:015}.json", now.0));
    let unfinished = path.with_extension("tmp");
    std::fs::write(&unfinished, serde_json::to_vec(saved)?)?;
    std::fs::rename(&unfinished, &path)?;
    let mut kept: Vec<PathBuf> = std::fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    // The moment is part of the name, in as many digits as it ever needs.
    kept.sort();
    let surplus = kept.len().saturating_sub(KEPT_MAX);
    for old in &kept[..surplus] {
        std::fs::remove_file(old)?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use drumline_scheduler::{Options, Scheduler};

    #[test]
    fn the_newest_incidents_are_kept_and_can_be_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("incidents");
        let saved = Scheduler::new(Options::default()).save();
        let paths: Vec<PathBuf> =
            (0..20).map(|n| save(&at, &saved, Timestamp(n * 1000)).unwrap()).collect();
        assert!(!paths[0].exists() && paths[19].exists());
        assert_eq!(std::fs::read_dir(&at).unwrap().count(), KEPT_MAX);
        let read: Saved = serde_json::from_slice(&std::fs::read(&paths[19]).unwrap()).unwrap();
        assert_eq!(read, saved);
    }
}
