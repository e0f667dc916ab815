//! The Rust source of pinned crates: real text that is present wherever a project was built.

use std::fs;
use std::path::{Path, PathBuf};

use super::folder::walk;
use super::{CorpusError, CorpusSummary, SourceFile, char_floor, read_text};

/// Which crates' source is the corpus, and how much of it.
#[derive(Debug, Clone)]
pub struct CargoSource {
    /// The lock file that pins names and versions.
    pub lock: PathBuf,
    /// The Cargo home; the source lies in `registry/src/*/NAME-VERSION` below it.
    pub cargo_home: PathBuf,
    /// Greatest size of the corpus, in bytes.
    pub budget_bytes: u64,
    /// Greatest size of one file, in bytes; larger ones are mostly bindings and tables.
    pub file_bytes_max: u64,
    /// Greatest share of one crate, in bytes, so that none dominates.
    pub crate_bytes_max: u64,
}

impl CargoSource {
    /// Names a lock file, with `CARGO_HOME` (or `HOME/.cargo`) from the environment, at most
    /// 128 KiB of a file and an eighth of the budget of a crate.
    ///
    /// # Errors
    /// [`CorpusError::NoCargoHome`].
    pub fn from_environment(lock: &Path, budget_bytes: u64) -> Result<Self, CorpusError> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let cargo_home = set("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| set("HOME").map(|home| Path::new(&home).join(".cargo")))
            .ok_or(CorpusError::NoCargoHome)?;
        Ok(Self {
            lock: lock.to_owned(),
            cargo_home,
            budget_bytes,
            file_bytes_max: 128 << 10,
            crate_bytes_max: (budget_bytes / 8).max(1),
        })
    }

    /// Lists the files by crate name, version and path.
    pub(super) fn list(&self) -> Result<(Vec<SourceFile>, CorpusSummary), CorpusError> {
        let registry = self.cargo_home.join("registry").join("src");
        let mut summary = CorpusSummary {
            description: format!("Rust source of the crates pinned in {}", self.lock.display()),
            ..CorpusSummary::default()
        };
        let mut roots: Vec<_> = fs::read_dir(&registry)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        roots.sort();
        let mut files = Vec::new();
        for (name, version) in self.pinned()? {
            let folder = format!("{name}-{version}");
            let Some(root) = roots.iter().find(|root| root.join(&folder).is_dir()) else {
                summary.missing_crates += 1;
                continue;
            };
            self.list_crate(&root.join(&folder), &folder, &mut files, &mut summary)?;
        }
        summary.files = files.len() as u64;
        if files.is_empty() {
            return Err(CorpusError::Empty {
                place: registry,
                remedy: format!(
                    "run `cargo fetch` beside {}, or name a text file or folder with --data",
                    self.lock.display()
                ),
            });
        }
        Ok((files, summary))
    }

    fn list_crate(
        &self,
        folder: &Path,
        name: &str,
        files: &mut Vec<SourceFile>,
        summary: &mut CorpusSummary,
    ) -> Result<(), CorpusError> {
        let mut found = Vec::new();
        walk(folder, 0, &mut found)?;
        let mut taken = 0;
        for (path, bytes) in found {
            if bytes == 0 || path.extension().is_none_or(|e| e != "rs") {
                continue;
            }
            if bytes > self.file_bytes_max {
                summary.skipped_large += 1;
                continue;
            }
            if taken + bytes > self.crate_bytes_max || summary.bytes + bytes > self.budget_bytes {
                summary.skipped_budget += 1;
                continue;
            }
            let Some(text) = read_text(&path, bytes)? else {
                summary.skipped_not_text += 1;
                continue;
            };
            if looks_generated(&text) {
                summary.skipped_generated += 1;
                continue;
            }
            taken += bytes;
            summary.bytes += bytes;
            let inner = path.strip_prefix(folder).unwrap_or(&path);
            files.push(SourceFile {
                name: format!("{name}/{}", inner.to_string_lossy().replace('\\', "/")),
                path,
                bytes,
            });
        }
        Ok(())
    }

    /// Returns name and version of every crate from a registry, in order.
    fn pinned(&self) -> Result<Vec<(String, String)>, CorpusError> {
        let text = fs::read_to_string(&self.lock)
            .map_err(|source| CorpusError::Read { path: self.lock.clone(), source })?;
        let lock: Lock = toml::from_str(&text).map_err(|e| CorpusError::Lock {
            path: self.lock.clone(),
            message: e.message().to_owned(),
        })?;
        let mut pinned: Vec<_> = lock
            .package
            .into_iter()
            .filter(|p| {
                let plain = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
                // Names become paths: nothing in a lock file may lead out of the registry.
                p.source.as_deref().is_some_and(|s| s.starts_with("registry+"))
                    && p.name.chars().all(plain)
                    && p.version.chars().all(plain)
            })
            .map(|p| (p.name, p.version))
            .collect();
        pinned.sort();
        pinned.dedup();
        Ok(pinned)
    }
}

#[derive(serde::Deserialize)]
struct Lock {
    #[serde(default)]
    package: Vec<Package>,
}

#[derive(serde::Deserialize)]
struct Package {
    name: String,
    version: String,
    source: Option<String>,
}

/// Tells tables and generator output, which teach a small model little, by their own words or by
/// very long lines or a very large share of digits.
fn looks_generated(text: &str) -> bool {
    let head = &text[..char_floor(text, 1024)].to_ascii_lowercase();
    let said = [
        "@generated",
        "automatically generated",
        "auto-generated",
        "autogenerated",
        "generated by",
    ];
    if said.iter().any(|words| head.contains(words)) {
        return true;
    }
    let digits = text.bytes().filter(u8::is_ascii_digit).count();
    let lines = text.lines().count().max(1);
    text.len() / lines > 160 || digits * 4 > text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry(files: &[(&str, &str)]) -> (tempfile::TempDir, CargoSource) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join("registry/src/index-1").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let lock = folder.path().join("Cargo.lock");
        let package = |name, version| {
            format!(
                "[[package]]\nname = \"{name}\"\nversion = \"{version}\"\nsource = \"registry+x\"\n"
            )
        };
        let text = [
            "version = 4\n[[package]]\nname = \"ours\"\nversion = \"0.1.0\"\n".to_owned(),
            package("zed", "1.0.0"),
            package("alpha", "2.0.0"),
            package("alpha", "1.0.0"),
            package("absent", "1.0.0"),
            package("../../escape", "1.0.0"),
        ];
        fs::write(&lock, text.concat()).unwrap();
        let source = CargoSource {
            lock,
            cargo_home: folder.path().to_owned(),
            budget_bytes: 10_000,
            file_bytes_max: 1_000,
            crate_bytes_max: 2_000,
        };
        (folder, source)
    }

    #[test]
    fn pinned_crates_come_by_name_version_and_path_without_tables_and_giants() {
        let (_folder, source) = registry(&[
            ("zed-1.0.0/src/lib.rs", "fn z() {}\n"),
            ("alpha-2.0.0/src/lib.rs", "fn two() {}\n"),
            ("alpha-1.0.0/src/lib.rs", "fn one() {}\n"),
            ("alpha-1.0.0/src/a.rs", "fn a() {}\n"),
            ("alpha-1.0.0/build.txt", "not rust"),
            ("alpha-1.0.0/src/table.rs", "[1, 2, 3, 4, 5, 6, 7, 88888]\n"),
            ("alpha-1.0.0/src/sys.rs", "// Automatically generated by bindgen\nfn x() {}\n"),
            ("zed-1.0.0/src/giant.rs", &"fn g() {}\n".repeat(200)),
            ("unpinned-1.0.0/src/lib.rs", "fn no() {}\n"),
        ]);
        let (files, summary) = source.list().unwrap();
        let names: Vec<_> = files.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "alpha-1.0.0/src/a.rs",
                "alpha-1.0.0/src/lib.rs",
                "alpha-2.0.0/src/lib.rs",
                "zed-1.0.0/src/lib.rs"
            ]
        );
        assert_eq!((summary.skipped_generated, summary.skipped_large), (2, 1));
        assert_eq!(summary.missing_crates, 1);
    }

    #[test]
    fn the_budgets_of_corpus_and_crate_hold() {
        let text = "fn f() {}\n".repeat(90);
        let (_folder, mut source) = registry(&[
            ("alpha-1.0.0/a.rs", &text),
            ("alpha-1.0.0/b.rs", &text),
            ("alpha-1.0.0/c.rs", &text),
            ("zed-1.0.0/a.rs", &text),
        ]);
        let (files, summary) = source.list().unwrap();
        assert_eq!((files.len(), summary.skipped_budget), (3, 1), "2,000 bytes of a crate");
        source.budget_bytes = 1_000;
        let (files, summary) = source.list().unwrap();
        assert_eq!((files.len(), summary.skipped_budget), (1, 3));
        assert!(summary.bytes <= 1_000);
    }

    #[test]
    fn an_empty_registry_is_named_with_the_remedy() {
        let (folder, source) = registry(&[]);
        let error = source.list().unwrap_err().to_string();
        assert!(error.contains("registry/src"), "{error}");
        assert!(error.contains("cargo fetch") && error.contains("--data"), "{error}");
        drop(folder);
    }

    #[test]
    fn a_broken_lock_is_named() {
        let (folder, source) = registry(&[]);
        fs::write(&source.lock, "package = 3").unwrap();
        assert!(matches!(source.list(), Err(CorpusError::Lock { .. })));
        fs::remove_file(&source.lock).unwrap();
        assert!(matches!(source.list(), Err(CorpusError::Read { .. })));
        drop(folder);
    }
}
