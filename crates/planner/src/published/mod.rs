//! Predictions against published runs: reads their table, predicts each row, reports the errors.
//!
//! Nothing here is fitted to a row or a model. What a table leaves blank is filled by rules that
//! hold for every row and are written in `docs/planner.md`, "Calibration and validation".

mod interconnect;
mod predict;
mod read;
mod stack;

use serde::Serialize;

pub use interconnect::parse_interconnect;
pub use read::read;
pub use stack::infer_stack;

use crate::error::PlanError;
use crate::model::Model;
use crate::split::{Batch, Machines, Recompute, Split};

/// What a row measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Measured {
    /// Hardware TFLOP/s per GPU: recomputation counted.
    HfuTflopsPerGpu,
    /// Model TFLOP/s per GPU.
    ModelTflopsPerGpu,
    /// Hardware FLOPs utilization in percent.
    HfuPercent,
    /// Model FLOPs utilization in percent.
    MfuPercent,
    /// Hardware FLOPs utilization from 0 to 1.
    Hfu,
    /// Model FLOPs utilization from 0 to 1.
    Mfu,
    /// Seconds of an optimizer step.
    StepSeconds,
    /// Milliseconds of an optimizer step.
    StepMs,
    /// Tokens per second and GPU.
    TokensPerSecondPerGpu,
    /// Tokens per second of the whole run.
    TokensPerSecond,
    /// Sequences per second of the whole run.
    SequencesPerSecond,
    /// Hardware PFLOP/s of the whole run.
    HfuPflops,
    /// Model PFLOP/s of the whole run.
    ModelPflops,
    /// Days for the column `tokens_b`.
    Days,
    /// GPU-hours for the column `tokens_b`.
    GpuHours,
    /// Peak memory per GPU in GiB.
    MemoryGib,
}

/// One row, read and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Where it was published.
    pub source: String,
    /// The machines, with the interconnect as the row describes it.
    pub machines: Machines,
    /// The model's shape.
    pub model: Model,
    /// GPUs.
    pub gpus: u32,
    /// The split; what the row leaves blank is filled in by [`Row::predict`].
    pub split: Split,
    /// Whether the row states tensor and pipeline; if not, [`Row::predict`] tries them.
    pub grid_given: bool,
    /// Virtual stages as published.
    pub virtual_stages: Option<u32>,
    /// Micro-batch as published.
    pub micro_batch: Option<u32>,
    /// Recomputation as published.
    pub recompute: Option<Recompute>,
    /// The batch.
    pub batch: Batch,
    /// What was measured.
    pub measured: Measured,
    /// The column `measured`, as written.
    pub measured_name: String,
    /// The published value.
    pub value: f64,
    /// Billions of tokens, for days and GPU-hours.
    pub tokens_b: Option<f64>,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RowReport {
    /// Where it was published.
    pub source: String,
    /// GPUs.
    pub gpus: u32,
    /// What was measured.
    pub measured: String,
    /// The published value.
    pub published: f64,
    /// The prediction, in the same unit.
    pub predicted: f64,
    /// `100 (predicted / published - 1)`.
    pub error_percent: f64,
}

/// The report of a whole table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ValidationReport {
    /// Row by row, in the table's order.
    pub rows: Vec<RowReport>,
    /// Mean of the absolute errors.
    pub mean_absolute_error_percent: f64,
    /// Greatest absolute error.
    pub max_absolute_error_percent: f64,
}

/// A table of published runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    /// Its rows.
    pub rows: Vec<Row>,
    /// What was read but not used, in words.
    pub warnings: Vec<String>,
}

impl Table {
    /// Predicts every row.
    ///
    /// # Errors
    /// As [`Row::predict`].
    pub fn validate(&self) -> Result<ValidationReport, PlanError> {
        let mut rows = Vec::with_capacity(self.rows.len());
        for row in &self.rows {
            let predicted = row.predict_value()?;
            rows.push(RowReport {
                source: row.source.clone(),
                gpus: row.gpus,
                measured: row.measured_name.clone(),
                published: row.value,
                predicted,
                error_percent: 100.0 * (predicted / row.value - 1.0),
            });
        }
        let errors = rows.iter().map(|row| row.error_percent.abs());
        let max = errors.clone().fold(0.0, f64::max);
        let mean = errors.sum::<f64>() / rows.len().max(1) as f64;
        Ok(ValidationReport {
            rows,
            mean_absolute_error_percent: mean,
            max_absolute_error_percent: max,
        })
    }
}
