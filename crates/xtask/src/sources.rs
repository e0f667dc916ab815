//! The files: each says what it is for, none grows without a reason, and the pure crates use
//! nothing that makes two runs differ.

use std::path::Path;

use crate::layers::PURE;

/// Lines over which a file needs a reason.
const LINES_MAX: usize = 800;

/// Files that are longer, with the reason.
const LONG: &[(&str, &str)] = &[];

/// What a pure crate's sources may not name.
const IMPURE: &[&str] =
    &["std::fs", "std::env::var", "SystemTime", "Instant::now", "HashMap", "HashSet", "tokio::"];

/// Checks the files that `git ls-files` names.
pub(crate) fn check(root: &Path, listing: &str) -> Vec<String> {
    let mut findings = Vec::new();
    for name in listing.lines().filter(|name| !name.ends_with(".lock")) {
        let Ok(text) = std::fs::read_to_string(root.join(name)) else { continue };
        findings.extend(check_text(name, &text));
    }
    findings
}

fn check_text(name: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let mut find = |line: usize, what: &str| findings.push(format!("{name}:{line}: {what}"));
    // Told apart here so that this file does not find itself.
    let machine = [["/wo", "rk/"].concat(), ["/ro", "ot/"].concat(), ["bash_", "jobs"].concat()];
    for (index, line) in text.lines().enumerate() {
        if machine.iter().any(|path| line.contains(path.as_str())) {
            find(index + 1, "names a path of one machine");
        }
    }
    let Some(path) = name.strip_suffix(".rs") else { return findings };
    if !text.starts_with("//! ") {
        find(1, "the first line must be `//!` and one sentence of purpose");
    }
    let lines = text.lines().count();
    if lines > LINES_MAX && !LONG.iter().any(|(long, _)| long == &name) {
        find(lines, &format!("{lines} lines; split by idea, or give the reason in xtask"));
    }
    let pure = PURE.iter().any(|short| path.starts_with(&format!("crates/{short}/src/")));
    if pure {
        // Test modules come last and may do what they like.
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for (index, line) in code.lines().enumerate() {
            let line = line.split("//").next().unwrap_or_default();
            for word in IMPURE.iter().filter(|word| line.contains(**word)) {
                find(index + 1, &format!("a pure crate names {word}"));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_says_what_it_is_for() {
        assert_eq!(check_text("crates/web/src/x.rs", "//! Purpose.\n"), Vec::<String>::new());
        assert_eq!(check_text("crates/web/src/x.rs", "use x;\n").len(), 1);
    }

    #[test]
    fn a_pure_crate_reads_no_clock_and_hashes_nothing() {
        let bad = "//! Purpose.\nuse std::collections::HashMap;\nlet t = Instant::now();\n";
        assert_eq!(check_text("crates/engine/src/x.rs", bad).len(), 2);
        assert_eq!(check_text("crates/agent/src/x.rs", bad).len(), 0);
        let test = "//! Purpose.\n#[cfg(test)]\nmod tests { use std::collections::HashMap; }\n";
        assert_eq!(check_text("crates/engine/src/x.rs", test).len(), 0);
    }
}
