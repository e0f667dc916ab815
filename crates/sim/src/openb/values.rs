//! What was learned for a workload, as text that is kept and used again.
//!
//! The text opens with what it was learned from, as a fingerprint of the nodes, the typical pods
//! and the settings: values learned elsewhere are refused, not trusted. Files are the caller's.

use std::fmt::Write as _;

use crate::openb::input::Trace;
use crate::openb::policy::drumline::Tuning;
use crate::openb::policy::worth::{Grid, Worth};
use crate::openb::run::TYPICAL_COVERAGE;
use crate::openb::typical::{Typical, typical};

/// The first line of a file of values.
const TITLE: &str = "drumline sim openb values 1";

/// Why kept values were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValuesError {
    /// They were learned from something else.
    #[error(
        "{file}:2: learned for {found}, but these nodes, pods and settings are {expected}: \
         name another file, or delete this one to learn anew"
    )]
    Mismatch {
        /// The file, as the caller names it.
        file: String,
        /// The fingerprint of this trace.
        expected: String,
        /// The one in the file.
        found: String,
    },
    /// The file holds something else, or only a part.
    #[error("{file}:{line}: expected {expected}, found {found:?}: delete the file to learn anew")]
    Malformed {
        /// The file, as the caller names it.
        file: String,
        /// The line, from 1.
        line: usize,
        /// What was expected there.
        expected: String,
        /// What is there.
        found: String,
    },
}

/// Writes down what was learned for a trace.
///
/// Each value is in tenths of a thousandth of a GPU; `=N` stands for N values that are those of the
/// period before.
#[must_use]
pub fn to_text(trace: &Trace, worth: &Worth) -> String {
    let (cells, stride) = (worth.tenths(), worth.grid().stride());
    let typical = typical(trace, TYPICAL_COVERAGE);
    let mut text = format!("{TITLE}\n{}\n{}\n", fingerprint(trace, &typical), cells.len());
    let (mut same, mut in_line) = (0usize, 0);
    for (at, &value) in cells.iter().enumerate() {
        if at >= stride && cells[at - stride] == value {
            same += 1;
            continue;
        }
        flush(&mut text, &mut same);
        let _ = write!(text, "{value}");
        in_line += 1;
        text.push(if in_line % 20 == 0 { '\n' } else { ' ' });
    }
    flush(&mut text, &mut same);
    text.push('\n');
    text
}

fn flush(text: &mut String, same: &mut usize) {
    if *same > 0 {
        let _ = write!(text, "={same} ");
        *same = 0;
    }
}

/// Reads what was learned for a trace. The name of the file is used in errors only.
///
/// # Errors
/// [`ValuesError`] when the text is malformed, or was learned for something else.
pub fn from_text(trace: &Trace, file: &str, text: &str) -> Result<Worth, ValuesError> {
    let malformed = |line: usize, expected: String, found: &str| ValuesError::Malformed {
        file: file.to_owned(),
        line,
        expected,
        found: found.chars().take(40).collect(),
    };
    let typical = typical(trace, TYPICAL_COVERAGE);
    let mut lines = (1usize..).zip(text.lines().map(str::trim));
    let mut head = || lines.next().map_or("", |(_, line)| line);
    let title = head();
    if title != TITLE {
        return Err(malformed(1, format!("{TITLE:?}"), title));
    }
    let (expected, found) = (fingerprint(trace, &typical), head().to_owned());
    if found != expected {
        return Err(ValuesError::Mismatch { file: file.to_owned(), expected, found });
    }
    let grid = Grid::new(&typical, trace.models.len().max(1));
    let (length, stride, count) = (grid.len(), grid.stride(), head());
    if count != length.to_string() {
        return Err(malformed(3, format!("the number of values, {length}"), count));
    }
    let mut cells: Vec<i32> = Vec::with_capacity(length);
    for (line, words) in lines {
        for word in words.split_whitespace() {
            let room = length - cells.len();
            let known = match word.strip_prefix('=').map(str::parse::<usize>) {
                Some(Ok(same)) if same <= room && cells.len() >= stride => {
                    (0..same).for_each(|_| cells.push(cells[cells.len() - stride]));
                    true
                }
                Some(_) => false,
                None => word.parse().is_ok_and(|value| {
                    cells.push(value);
                    room > 0
                }),
            };
            if !known {
                let expected = format!("a whole number or =N, {length} values in all");
                return Err(malformed(line, expected, word));
            }
        }
    }
    if cells.len() != length {
        let expected = format!("{length} values in all");
        return Err(malformed(text.lines().count(), expected, &cells.len().to_string()));
    }
    Ok(Worth::new(grid, &cells, &typical))
}

/// Returns what distinguishes these nodes, typical pods and settings from others.
fn fingerprint(trace: &Trace, typical: &[Typical]) -> String {
    let mut hash = Fnv(0xcbf2_9ce4_8422_2325);
    for node in &trace.nodes {
        hash.add(u64::from(node.cpu_milli.unsigned_abs()));
        hash.add(u64::from(node.gpus) << 8 | u64::from(node.model));
    }
    hash.add(trace.nodes.len() as u64);
    for Typical { shape, share } in typical {
        hash.add(u64::from(shape.cpu_milli.unsigned_abs()));
        hash.add(u64::from(shape.gpu_milli) << 8 | u64::from(shape.gpus));
        hash.add(u64::from(shape.models));
        hash.add(share.to_bits());
    }
    format!("{:?}", Tuning::default()).bytes().for_each(|byte| hash.add(u64::from(byte)));
    format!("{:016x}", hash.0)
}

/// FNV-1a over words (Fowler, Noll and Vo): the same on every machine.
struct Fnv(u64);

impl Fnv {
    fn add(&mut self, word: u64) {
        for byte in word.to_le_bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}
