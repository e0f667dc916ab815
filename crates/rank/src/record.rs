//! `losses.jsonl` in the job's folder: one line for each finished step, of every attempt.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// Name of the record in the job's folder.
pub const RECORD_FILE: &str = "losses.jsonl";

/// A record that is only ever added to.
#[derive(Debug)]
pub struct Record {
    file: File,
    attempt: u32,
}

impl Record {
    /// Opens the record of the job whose folder is `job_dir`.
    ///
    /// # Errors
    /// When the file cannot be opened; the text names it.
    pub fn open(job_dir: &Path, attempt: u32) -> io::Result<Self> {
        let path = job_dir.join(RECORD_FILE);
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let mut file = file.map_err(|error| {
            io::Error::new(error.kind(), format!("cannot open {}: {error}", path.display()))
        })?;
        // The last attempt may have been killed within a line.
        file.write_all(b"\n")?;
        Ok(Self { file, attempt })
    }

    /// Adds one step. The loss is written with as many digits as tell it from every other.
    ///
    /// # Errors
    /// When the disk is full or gone.
    pub fn step(&mut self, step: u64, loss: f32, grad_norm: f32) -> io::Result<()> {
        let attempt = self.attempt;
        let line = format!(
            "{{\"attempt\":{attempt},\"step\":{step},\"loss\":{loss:?},\"grad_norm\":{grad_norm:?}}}\n"
        );
        self.file.write_all(line.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_comes_back_with_the_same_bits() {
        let folder = tempfile::tempdir().unwrap();
        let losses = [2.345_678_9_f32, 1e-9, 0.1 + 0.2, f32::MIN_POSITIVE];
        let mut record = Record::open(folder.path(), 1).unwrap();
        for (step, loss) in losses.iter().enumerate() {
            record.step(step as u64, *loss, 1.0).unwrap();
        }
        let text = std::fs::read_to_string(folder.path().join(RECORD_FILE)).unwrap();
        let read: Vec<f32> = text
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .map(|line| line["loss"].as_f64().unwrap() as f32)
            .collect();
        assert_eq!(read.map_bits(), losses.to_vec().map_bits());
    }

    trait Bits {
        fn map_bits(&self) -> Vec<u32>;
    }

    impl Bits for Vec<f32> {
        fn map_bits(&self) -> Vec<u32> {
            self.iter().map(|value| value.to_bits()).collect()
        }
    }
}
