//! Files that appear whole or not at all.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Writes `content` to `path` so that a crash leaves the old file or the new one, never a mixture:
/// a temporary file in the same folder, synced, renamed, and the folder synced.
///
/// # Errors
/// Those of the file system.
pub fn write_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = folder_of(path);
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(content)?;
    commit(file, path)
}

/// Syncs a temporary file, renames it to `path`, and syncs the folder.
///
/// # Errors
/// Those of the file system.
pub fn commit(file: tempfile::NamedTempFile, path: &Path) -> io::Result<()> {
    file.as_file().sync_all()?;
    readable(file.as_file())?;
    file.persist(path).map_err(|e| e.error)?;
    sync_folder(folder_of(path))
}

/// Makes renames and removals within `folder` durable.
///
/// # Errors
/// Those of the file system.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Temporary files are private to their owner; data sets are read by other users' ranks too.
#[cfg(unix)]
fn readable(file: &File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn readable(_: &File) -> io::Result<()> {
    Ok(())
}
