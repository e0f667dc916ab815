//! Any file or folder as a corpus.

use std::fs;
use std::path::{Path, PathBuf};

use super::{CorpusError, CorpusSummary, SourceFile, read_text};

// Beyond this depth a tree is taken for a mistake (links are not followed, so it is not a cycle).
const DEPTH_MAX: usize = 64;
// How much of a file is looked at to tell whether it is text.
const PROBE_BYTES: u64 = 64 << 10;

/// Lists `path` itself, or all text files below it.
pub(super) fn list(
    path: &Path,
    budget_bytes: u64,
) -> Result<(Vec<SourceFile>, CorpusSummary), CorpusError> {
    let failed = |source| CorpusError::Read { path: path.to_owned(), source };
    let metadata = fs::metadata(path).map_err(failed)?;
    let mut summary =
        CorpusSummary { description: path.display().to_string(), ..CorpusSummary::default() };
    let mut files = Vec::new();
    if metadata.is_dir() {
        let mut found = Vec::new();
        walk(path, 0, &mut found)?;
        for (file, bytes) in found {
            let room = budget_bytes.saturating_sub(summary.bytes);
            if bytes == 0 {
                continue;
            }
            if bytes > room {
                summary.skipped_budget += 1;
                continue;
            }
            if read_text(&file, bytes.min(PROBE_BYTES))?.is_none() || !is_text(&file, bytes)? {
                summary.skipped_not_text += 1;
                continue;
            }
            summary.bytes += bytes;
            let name = file.strip_prefix(path).unwrap_or(&file);
            files.push(SourceFile {
                name: name.to_string_lossy().replace('\\', "/"),
                path: file,
                bytes,
            });
        }
    } else if metadata.len() > 0 {
        let bytes = metadata.len().min(budget_bytes);
        if is_text(path, bytes)? {
            summary.bytes = bytes;
            files.push(SourceFile {
                name: path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
                path: path.to_owned(),
                bytes,
            });
        } else {
            summary.skipped_not_text = 1;
        }
    }
    summary.files = files.len() as u64;
    if files.is_empty() {
        return Err(CorpusError::Empty {
            place: path.to_owned(),
            remedy: format!(
                "name a UTF-8 text file or a folder that holds some ({} files there are not UTF-8 \
                 text, {} are larger than the budget of {budget_bytes} bytes)",
                summary.skipped_not_text, summary.skipped_budget
            ),
        });
    }
    Ok((files, summary))
}

fn is_text(path: &Path, bytes: u64) -> Result<bool, CorpusError> {
    Ok(read_text(path, bytes)?.is_some())
}

/// Collects the files below `folder` in the order of their names, folder by folder.
pub(super) fn walk(
    folder: &Path,
    depth: usize,
    found: &mut Vec<(PathBuf, u64)>,
) -> Result<(), CorpusError> {
    let failed = |source| CorpusError::Read { path: folder.to_owned(), source };
    if depth > DEPTH_MAX {
        return Ok(());
    }
    let mut entries =
        fs::read_dir(folder).map_err(failed)?.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let kind = entry.file_type().map_err(failed)?;
        let path = entry.path();
        if kind.is_dir() {
            walk(&path, depth + 1, found)?;
        } else if kind.is_file() {
            let bytes = entry.metadata().map_err(failed)?.len();
            found.push((path, bytes));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_gives_its_text_files_in_order_and_counts_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("b/.git")).unwrap();
        fs::write(at("b/two.txt"), "two").unwrap();
        fs::write(at("a.txt"), "one").unwrap();
        fs::write(at("b/.git/config"), "hidden").unwrap();
        fs::write(at("c.bin"), b"\xFF\xFE\0").unwrap();
        fs::write(at("d.txt"), "x".repeat(100)).unwrap();
        fs::write(at("empty"), "").unwrap();
        let (files, summary) = list(folder.path(), 50).unwrap();
        let names: Vec<_> = files.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["a.txt", "b/two.txt"]);
        assert_eq!((summary.files, summary.bytes), (2, 6));
        assert_eq!((summary.skipped_not_text, summary.skipped_budget), (1, 1));
    }

    #[test]
    fn a_place_without_text_is_named_with_a_remedy() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("x"), b"\xFF").unwrap();
        let error = list(folder.path(), 1000).unwrap_err().to_string();
        assert!(error.contains(&folder.path().display().to_string()), "{error}");
        assert!(error.contains("1 files there are not UTF-8"), "{error}");
        let missing = folder.path().join("none");
        let error = list(&missing, 1000).unwrap_err().to_string();
        assert!(error.contains("none"), "{error}");
    }

    #[test]
    fn one_large_file_is_cut_at_the_budget() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.txt");
        fs::write(&path, "é".repeat(100)).unwrap();
        let (files, summary) = list(&path, 51).unwrap();
        assert_eq!((files.len(), summary.bytes), (1, 51));
    }
}
