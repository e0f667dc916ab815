//! Files that appear whole or not at all, and folders whose entries last.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// Writes a file through `fill` so that a crash leaves the old file or the new one, never a
/// mixture: a temporary file in the same folder, synced, renamed, and the folder synced.
///
/// # Errors
/// Those of `fill` and of the file system.
pub fn write_with<T>(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<T>,
) -> io::Result<T> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let temporary = tempfile::Builder::new().prefix(TEMPORARY_PREFIX).tempfile_in(folder)?;
    // Large tensors pass the buffer by; it is for headers and short ones.
    let mut file = BufWriter::with_capacity(256 << 10, temporary);
    let result = fill(&mut file)?;
    let temporary = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    temporary.as_file().sync_all()?;
    readable(temporary.as_file())?;
    temporary.persist(path).map_err(|e| e.error)?;
    sync_folder(folder)?;
    Ok(result)
}

/// How the names of files under way begin, so that leftovers can be told.
pub const TEMPORARY_PREFIX: &str = ".writing-";

/// Writes `content` to `path` as [`write_with`] does.
///
/// # Errors
/// Those of the file system.
pub fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    write_with(path, |file| file.write_all(content))
}

/// Makes renames and removals within `folder` durable.
///
/// # Errors
/// Those of the file system.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Makes a folder and those above it, and makes the new name durable.
///
/// # Errors
/// Those of the file system.
pub fn create_folder(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(folder)?;
    match folder.parent().filter(|p| !p.as_os_str().is_empty()) {
        Some(parent) => sync_folder(parent),
        None => Ok(()),
    }
}

/// Temporary files are private to their owner; other users' ranks read checkpoints too.
#[cfg(unix)]
fn readable(file: &File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn readable(_: &File) -> io::Result<()> {
    Ok(())
}
