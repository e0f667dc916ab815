//! Predictions against published runs: reads their table, predicts each row, reports the errors.
//!
//! Nothing here is fitted to a row or a model. What a table leaves blank is filled by rules that
//! hold for every row and are written in `docs/planner.md`, "Validation".

use serde::Serialize;

use crate::catalogue::{Catalogue, Dtype, Gpu, Network, check_model};
use crate::error::{PlanError, nearest_names};
use crate::memory;
use crate::model::{Family, Model, Position};
use crate::split::{Batch, Machines, Recompute, Split, Stack};
use crate::step::{StepTime, step_flops, step_time};

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

const KINDS: [(&str, Measured); 35] = [
    ("hfu_tflops_per_gpu", Measured::HfuTflopsPerGpu),
    ("hardware_tflops_per_gpu", Measured::HfuTflopsPerGpu),
    ("hfu_tflops", Measured::HfuTflopsPerGpu),
    ("model_tflops_per_gpu", Measured::ModelTflopsPerGpu),
    ("mfu_tflops_per_gpu", Measured::ModelTflopsPerGpu),
    ("model_tflops", Measured::ModelTflopsPerGpu),
    ("tflops_per_gpu", Measured::ModelTflopsPerGpu),
    ("hfu_percent", Measured::HfuPercent),
    ("mfu_percent", Measured::MfuPercent),
    ("hfu", Measured::Hfu),
    ("mfu", Measured::Mfu),
    ("step_seconds", Measured::StepSeconds),
    ("step_time_seconds", Measured::StepSeconds),
    ("iteration_seconds", Measured::StepSeconds),
    ("iteration_time_seconds", Measured::StepSeconds),
    ("seconds_per_step", Measured::StepSeconds),
    ("seconds_per_iteration", Measured::StepSeconds),
    ("step_ms", Measured::StepMs),
    ("iteration_ms", Measured::StepMs),
    ("tokens_per_second_per_gpu", Measured::TokensPerSecondPerGpu),
    ("tokens_per_s_per_gpu", Measured::TokensPerSecondPerGpu),
    ("tokens_per_sec_per_gpu", Measured::TokensPerSecondPerGpu),
    ("tokens_per_second", Measured::TokensPerSecond),
    ("tokens_per_s", Measured::TokensPerSecond),
    ("sequences_per_second", Measured::SequencesPerSecond),
    ("samples_per_second", Measured::SequencesPerSecond),
    ("hfu_pflops", Measured::HfuPflops),
    ("aggregate_pflops", Measured::HfuPflops),
    ("model_pflops", Measured::ModelPflops),
    ("days", Measured::Days),
    ("training_days", Measured::Days),
    ("gpu_hours", Measured::GpuHours),
    ("memory_gib", Measured::MemoryGib),
    ("memory_gb", Measured::MemoryGib),
    ("peak_memory_gb", Measured::MemoryGib),
];

/// A published run fitted its GPU, so our estimate may exceed the memory by this much before a
/// setting is ruled out.
const MEMORY_TOLERANCE: f64 = 1.2;

const COLUMNS: [&str; 31] = [
    "source",
    "gpu",
    "interconnect",
    "params_b",
    "layers",
    "hidden",
    "ffn",
    "heads",
    "kv_heads",
    "seq",
    "vocab",
    "gated_mlp",
    "gpus",
    "tensor",
    "pipeline",
    "virtual_stages",
    "data",
    "context",
    "sequence_parallel",
    "recompute",
    "zero",
    "global_batch_seqs",
    "micro_batch",
    "dtype",
    "measured",
    "value",
    // Optional, for tables that say more.
    "stack",
    "tokens_b",
    "head_dim",
    "expert",
    "tie_embeddings",
];

/// One row, read and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Where it was published.
    pub source: String,
    /// The machines, with the interconnect as the row describes it.
    pub machines: Machines,
    /// The model's shape.
    pub model: Model,
    /// The split; what the row leaves blank is filled in by [`Row::predict`].
    pub split: Split,
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

struct Fields<'a> {
    file: &'a str,
    line: u64,
    headers: &'a [String],
    record: &'a csv::StringRecord,
}

impl Fields<'_> {
    fn text(&self, column: &str) -> &str {
        let index = self.headers.iter().position(|h| h == column);
        index.and_then(|i| self.record.get(i)).map_or("", str::trim)
    }

    fn error(&self, column: &str, message: impl Into<String>) -> PlanError {
        PlanError::Csv {
            file: self.file.to_owned(),
            line: self.line,
            column: column.to_owned(),
            message: message.into(),
        }
    }

    fn number(&self, column: &str) -> Result<Option<u32>, PlanError> {
        let text = self.text(column);
        if text.is_empty() {
            return Ok(None);
        }
        let value: f64 = text
            .parse()
            .map_err(|_| self.error(column, format!("'{text}' is not a whole number")))?;
        if value.fract() != 0.0 || !(0.0..=f64::from(1u32 << 30)).contains(&value) {
            return Err(self.error(column, format!("'{text}' is not a whole number up to 2^30")));
        }
        Ok(Some(value as u32))
    }

    fn needed(&self, column: &str) -> Result<u32, PlanError> {
        match self.number(column)? {
            None => Err(self.error(column, "is empty; a whole number from 1 is needed")),
            Some(0) => Err(self.error(column, "is 0; a whole number from 1 is needed")),
            Some(value) => Ok(value),
        }
    }

    fn or_one(&self, column: &str) -> Result<u32, PlanError> {
        Ok(self.number(column)?.unwrap_or(1).max(1))
    }

    fn float(&self, column: &str) -> Result<Option<f64>, PlanError> {
        let text = self.text(column);
        if text.is_empty() {
            return Ok(None);
        }
        match text.parse::<f64>() {
            Ok(value) if value.is_finite() && value > 0.0 => Ok(Some(value)),
            _ => Err(self.error(column, format!("'{text}' is not a positive number"))),
        }
    }

    fn flag(&self, column: &str, otherwise: bool) -> Result<bool, PlanError> {
        match self.text(column).to_lowercase().as_str() {
            "" => Ok(otherwise),
            "0" | "false" | "no" => Ok(false),
            "1" | "true" | "yes" => Ok(true),
            other => Err(self.error(column, format!("'{other}' is not 0 or 1"))),
        }
    }

    // Gives an error of another part of the planner this row's place.
    fn at<T>(&self, column: &str, result: Result<T, PlanError>) -> Result<T, PlanError> {
        result.map_err(|error| self.error(column, error.to_string()))
    }
}

/// Reads a table of published runs.
///
/// # Errors
/// [`PlanError::Csv`] with file, line and column for a missing column, a cell that is no number, an
/// unknown GPU, kind or format, a split that does not multiply to the GPUs.
pub fn read(file: &str, text: &str, catalogue: &Catalogue) -> Result<Table, PlanError> {
    let mut reader = csv::ReaderBuilder::new().comment(Some(b'#')).from_reader(text.as_bytes());
    let csv_error = |error: &csv::Error, column: &str| PlanError::Csv {
        file: file.to_owned(),
        line: error.position().map_or(1, csv::Position::line),
        column: column.to_owned(),
        message: match error.kind() {
            csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                format!("the row has {len} cells, and the header {expected_len}")
            }
            _ => error.to_string(),
        },
    };
    let headers: Vec<String> = reader
        .headers()
        .map_err(|e| csv_error(&e, "header"))?
        .iter()
        .map(|h| h.trim().trim_start_matches('\u{feff}').to_lowercase())
        .collect();
    for needed in ["source", "gpu", "layers", "hidden", "heads", "seq", "gpus", "measured", "value"]
    {
        if !headers.iter().any(|h| h == needed) {
            let near = nearest_names(needed, headers.iter().map(String::as_str));
            let hint = near.first().map_or(String::new(), |n| format!("; did you mean '{n}'"));
            return Err(PlanError::Csv {
                file: file.to_owned(),
                line: 1,
                column: needed.to_owned(),
                message: format!("the header lacks this column{hint}"),
            });
        }
    }
    let mut warnings = Vec::new();
    for header in &headers {
        if !COLUMNS.contains(&header.as_str()) {
            warnings.push(format!("{file}:1: column '{header}' is not used"));
        }
    }
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|e| csv_error(&e, "row"))?;
        let line = record.position().map_or(0, csv::Position::line);
        let fields = Fields { file, line, headers: &headers, record: &record };
        rows.push(read_row(&fields, catalogue)?);
    }
    if rows.is_empty() {
        return Err(PlanError::Csv {
            file: file.to_owned(),
            line: 2,
            column: "source".to_owned(),
            message: "the table has no rows".to_owned(),
        });
    }
    Ok(Table { rows, warnings })
}

fn read_row(fields: &Fields<'_>, catalogue: &Catalogue) -> Result<Row, PlanError> {
    let source = fields.text("source").to_owned();
    let gpu = fields.at("gpu", catalogue.gpu(fields.text("gpu")))?;
    let machines = parse_interconnect(fields.text("interconnect"), gpu, catalogue);
    let [layers, hidden, heads, seq, gpus] = [
        fields.needed("layers")?,
        fields.needed("hidden")?,
        fields.needed("heads")?,
        fields.needed("seq")?,
        fields.needed("gpus")?,
    ];
    let gated = fields.flag("gated_mlp", false)?;
    let family = if gated { Family::Llama } else { Family::Gpt };
    let head_dim = match fields.number("head_dim")? {
        Some(width) if width > 0 => width,
        _ if !hidden.is_multiple_of(heads) => {
            return Err(fields.error(
                "heads",
                format!("hidden {hidden} is not divisible by heads {heads}, and head_dim is blank"),
            ));
        }
        _ => hidden / heads,
    };
    let ffn = fields.number("ffn")?.filter(|f| *f > 0).unwrap_or(4 * hidden);
    let kv_heads = fields.number("kv_heads")?.filter(|g| *g > 0).unwrap_or(heads);
    let vocab = fields.number("vocab")?.filter(|v| *v > 0).unwrap_or(51_200);
    let model = Model {
        name: format!("{}B", fields.text("params_b")),
        layers,
        encoder_layers: 0,
        hidden,
        ffn,
        heads,
        kv_heads,
        head_dim,
        vocab,
        context: seq,
        family,
        gated,
        bias: !gated,
        qkv_bias: !gated,
        position: if gated { Position::Rotary } else { Position::Learned },
        tie_embeddings: fields.flag("tie_embeddings", !gated)?,
        moe: None,
        mla: None,
        assumed: Vec::new(),
        source: source.clone(),
    };
    check_model(&model).map_err(|message| fields.error("layers", message))?;
    let [tensor, pipeline, context] =
        [fields.or_one("tensor")?, fields.or_one("pipeline")?, fields.or_one("context")?];
    let known = u64::from(tensor) * u64::from(pipeline) * u64::from(context);
    let data = match fields.number("data")?.filter(|d| *d > 0) {
        Some(data) => data,
        None if u64::from(gpus).is_multiple_of(known) => (u64::from(gpus) / known) as u32,
        None => {
            return Err(fields.error(
                "gpus",
                format!("{gpus} is not divisible by tensor x pipeline x context = {known}"),
            ));
        }
    };
    if known * u64::from(data) != u64::from(gpus) {
        return Err(fields.error(
            "gpus",
            format!(
                "{gpus} is not tensor {tensor} x pipeline {pipeline} x data {data} x context {context} = {}",
                known * u64::from(data)
            ),
        ));
    }
    let zero = fields.number("zero")?.unwrap_or(0);
    if zero > 3 {
        return Err(fields.error("zero", format!("{zero} is not 0, 1, 2 or 3")));
    }
    let dtype = match fields.text("dtype") {
        "" => machines.gpu.training_dtype(),
        text => fields.at("dtype", Dtype::parse(text))?,
    };
    fields.at("dtype", machines.gpu.peak(dtype))?;
    let stack = match fields.text("stack") {
        "" => infer_stack(&source, &machines.gpu, dtype, zero),
        text => fields.at("stack", Stack::parse(text))?,
    };
    let recompute = match fields.text("recompute") {
        "" => None,
        text => Some(fields.at("recompute", Recompute::parse(text))?),
    };
    let name = fields.text("measured").to_lowercase();
    let Some(measured) = KINDS.iter().find(|(kind, _)| *kind == name).map(|(_, m)| *m) else {
        let near = nearest_names(&name, KINDS.map(|(kind, _)| kind));
        return Err(fields.error(
            "measured",
            format!("'{name}' is not a known kind; nearest: {}", near.join(", ")),
        ));
    };
    let tokens_b = fields.float("tokens_b")?;
    if matches!(measured, Measured::Days | Measured::GpuHours) && tokens_b.is_none() {
        return Err(fields.error(
            "measured",
            format!("'{name}' needs the tokens of the run, in billions, in the column tokens_b"),
        ));
    }
    let value = fields
        .float("value")?
        .ok_or_else(|| fields.error("value", "is empty; a positive number is needed"))?;
    let global = match fields.number("global_batch_seqs")?.filter(|b| *b > 0) {
        Some(global) => global,
        None => {
            return Err(
                fields.error("global_batch_seqs", "is empty; the step's sequences are needed")
            );
        }
    };
    let split = Split {
        tensor,
        pipeline,
        virtual_stages: 1,
        data,
        context,
        expert: fields.or_one("expert")?,
        sequence_parallel: fields.flag("sequence_parallel", false)?,
        zero: zero as u8,
        recompute: recompute.unwrap_or(Recompute::None),
        micro_batch: 1,
    };
    let batch = Batch { sequence: seq, global, dtype, stack };
    fields.at("tensor", crate::split::check(&model, &split, &batch))?;
    Ok(Row {
        source,
        machines,
        model,
        split,
        virtual_stages: fields.number("virtual_stages")?.filter(|v| *v > 0),
        micro_batch: fields.number("micro_batch")?.filter(|b| *b > 0),
        recompute,
        batch,
        measured,
        measured_name: name,
        value,
        tokens_b,
    })
}

/// Says what software a run had, from when it was published: fused gradient accumulation came with
/// Korthikanti et al. (May 2022), fused attention and overlap became common with 2023.
///
/// The date is the arXiv number's month, else January of a year in the text; without either, a
/// GPU from Hopper on, or a sharded bf16 run, is taken as of 2023 or later.
#[must_use]
pub fn infer_stack(source: &str, gpu: &Gpu, dtype: Dtype, zero: u32) -> Stack {
    let recent_gpu =
        matches!(gpu.generation.as_str(), "hopper" | "blackwell" | "ada" | "cdna3" | "ascend");
    if recent_gpu || dtype == Dtype::Fp8 {
        return Stack::Overlapped;
    }
    match published_month(source) {
        Some(month) if month >= 2301 => Stack::Overlapped,
        Some(month) if month >= 2205 => Stack::Fused,
        Some(_) => Stack::Eager,
        None if zero >= 1 && dtype == Dtype::Bf16 => Stack::Overlapped,
        None => Stack::Eager,
    }
}

/// Returns a source's month as `YYMM`.
fn published_month(source: &str) -> Option<u32> {
    let numbers: Vec<(usize, &str)> = source
        .split(|c: char| !c.is_ascii_digit() && c != '.')
        .filter(|part| !part.is_empty())
        .map(|part| (part.len(), part))
        .collect();
    let arxiv = numbers.iter().find_map(|(_, part)| {
        let (month, number) = part.split_once('.')?;
        let valid = month.len() == 4 && (4..=5).contains(&number.len());
        let value: u32 = month.parse().ok()?;
        (valid && (1..=12).contains(&(value % 100))).then_some(value)
    });
    arxiv.or_else(|| {
        numbers.iter().find_map(|(_, part)| {
            let year: u32 = part.trim_matches('.').parse().ok()?;
            (2010..2100).contains(&year).then(|| (year - 2000) * 100 + 1)
        })
    })
}

/// Reads a description such as `NVLink 600GB/s; 8x200Gb/s HDR per 8-GPU node`. What it does not
/// say is the GPU's usual.
#[must_use]
pub fn parse_interconnect(text: &str, mut gpu: Gpu, catalogue: &Catalogue) -> Machines {
    let mut network: Network = catalogue.default_network(&gpu);
    let lower = text.to_lowercase();
    let roce = lower.contains("roce") || lower.contains("ethernet") || lower.contains("efa");
    if roce && let Ok(known) = catalogue.network("roce-8x400") {
        network.efficiency = known.efficiency;
        network.latency_us = known.latency_us;
        network.straggler = known.straggler;
    }
    // Node size: "8-GPU".
    if let Some(at) = lower.find("-gpu") {
        let digits: String =
            lower[..at].chars().rev().take_while(char::is_ascii_digit).collect::<String>();
        let size: String = digits.chars().rev().collect();
        if let Ok(size) = size.parse::<u32>()
            && (1..=1024).contains(&size)
        {
            network.gpus_per_node = size;
        }
    }
    for (at, unit, bits) in rates(&lower) {
        let before = &lower[..at];
        let before = before.trim_end();
        let number: String =
            before.chars().rev().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
        let number: String = number.chars().rev().collect();
        let Ok(rate) = number.parse::<f64>() else { continue };
        let rest = before[..before.len() - number.len()].trim_end();
        // The clause that the rate stands in says what it is a rate of.
        let clause = lower[..at].rsplit([';', ',']).next().unwrap_or("");
        let after = &lower[at + unit..];
        let per_gpu = after.split([';', ',']).next().unwrap_or("").contains("per gpu");
        if ["nvlink", "nvswitch", "hccs", "fabric"].iter().any(|w| clause.contains(w)) {
            // Datasheets and papers quote both directions together.
            gpu.link_bandwidth = rate / bits * 1e9 / 2.0;
            continue;
        }
        let count: String = rest
            .strip_suffix('x')
            .map(|r| r.trim_end().chars().rev().take_while(char::is_ascii_digit).collect())
            .unwrap_or_default();
        let count: String = count.chars().rev().collect();
        let count = count.parse::<f64>().unwrap_or(1.0);
        let gbps = count * rate * 8.0 / bits;
        network.nic_gbps = if per_gpu { gbps } else { gbps / f64::from(network.gpus_per_node) };
    }
    if !text.is_empty() {
        network.name = text.to_owned();
    }
    Machines { gpu, network }
}

// Finds "gb/s" in bits or bytes: the original's case tells, so look at the digits' neighbour.
fn rates(lower: &str) -> Vec<(usize, usize, f64)> {
    let mut found = Vec::new();
    for (at, _) in lower.match_indices("gb/s") {
        // Adapters are quoted in bits, GPU links in bytes.
        let clause = lower[..at].rsplit([';', ',']).next().unwrap_or("");
        let link = ["nvlink", "nvswitch", "hccs", "fabric"].iter().any(|w| clause.contains(w));
        found.push((at, 4, if link { 1.0 } else { 8.0 }));
    }
    for (at, _) in lower.match_indices("gbps") {
        found.push((at, 4, 8.0));
    }
    found
}

impl Row {
    /// Fills in what the row leaves blank and predicts its step.
    ///
    /// Authors publish the setting that ran best, so blanks take the setting that the model finds
    /// fastest among those that fit the memory: micro-batch 1, 2, 4, 8, 16; recomputation. Blank
    /// virtual stages are 1 in the stacks without overlap, where interleaving was one codebase's
    /// novelty; later, any that divide the stage's layers, where the micro-batches are a multiple
    /// of the stages as the schedule demands.
    ///
    /// # Errors
    /// [`PlanError::Invalid`] where no setting is possible.
    pub fn predict(&self) -> Result<(Split, StepTime), PlanError> {
        let micro: Vec<u32> = self.micro_batch.map_or(vec![1, 2, 4, 8, 16], |b| vec![b]);
        let recompute: Vec<Recompute> = self.recompute.map_or(Recompute::ALL.to_vec(), |r| vec![r]);
        let per_stage = self.model.layers.div_ceil(self.split.pipeline);
        let mut best: Option<(bool, f64, Split, StepTime)> = None;
        let mut last_error = None;
        for &micro_batch in &micro {
            for &mode in &recompute {
                let virtual_stages: Vec<u32> = match self.virtual_stages {
                    Some(v) => vec![v],
                    None if self.split.pipeline == 1 || !self.batch.stack.overlaps() => vec![1],
                    None => (1..=per_stage).filter(|v| per_stage.is_multiple_of(*v)).collect(),
                };
                for v in virtual_stages {
                    let split =
                        Split { micro_batch, recompute: mode, virtual_stages: v, ..self.split };
                    let time = match step_time(&self.model, &split, &self.batch, &self.machines) {
                        Ok(time) => time,
                        Err(error) => {
                            last_error = Some(error);
                            continue;
                        }
                    };
                    let m = time.micro_batches as u32;
                    if self.virtual_stages.is_none() && v > 1 && !m.is_multiple_of(split.pipeline) {
                        continue;
                    }
                    let need = memory::peak(&self.model, &split, &self.batch, m).total();
                    let fits = need <= MEMORY_TOLERANCE * self.machines.gpu.memory_bytes;
                    // Where nothing fits by our count, the leanest stands in.
                    let rank = if fits { time.step } else { need };
                    let better = best.as_ref().is_none_or(|(old_fits, old, ..)| {
                        (fits && !old_fits) || (fits == *old_fits && rank < *old)
                    });
                    if better {
                        best = Some((fits, rank, split, time));
                    }
                }
            }
        }
        best.map(|(_, _, split, time)| (split, time)).ok_or_else(|| {
            last_error.unwrap_or_else(|| PlanError::invalid("row", "no setting is possible"))
        })
    }

    /// Predicts the published figure, in its unit.
    ///
    /// # Errors
    /// As [`Row::predict`].
    pub fn predict_value(&self) -> Result<f64, PlanError> {
        let (split, time) = self.predict()?;
        let gpus = f64::from(self.split.gpus());
        let (model_flops, hardware_flops) = step_flops(&self.model, split.recompute, &self.batch);
        let days = self.tokens_b.map_or(f64::NAN, |billions| {
            billions * 1e9 / self.batch.tokens() * time.step / 86_400.0
        });
        Ok(match self.measured {
            Measured::HfuTflopsPerGpu => time.hardware_flops_per_gpu / 1e12,
            Measured::ModelTflopsPerGpu => time.model_flops_per_gpu / 1e12,
            Measured::HfuPercent => time.hfu * 100.0,
            Measured::MfuPercent => time.mfu * 100.0,
            // A utilization above 1 can only be a percentage.
            Measured::Hfu => time.hfu * if self.value > 1.0 { 100.0 } else { 1.0 },
            Measured::Mfu => time.mfu * if self.value > 1.0 { 100.0 } else { 1.0 },
            Measured::StepSeconds => time.step,
            Measured::StepMs => time.step * 1e3,
            Measured::TokensPerSecondPerGpu => time.tokens_per_gpu,
            Measured::TokensPerSecond => time.tokens_per_gpu * gpus,
            Measured::SequencesPerSecond => f64::from(self.batch.global) / time.step,
            Measured::HfuPflops => hardware_flops / time.step / 1e15,
            Measured::ModelPflops => model_flops / time.step / 1e15,
            Measured::Days => days,
            Measured::GpuHours => days * 24.0 * gpus,
            Measured::MemoryGib => {
                let m = time.micro_batches as u32;
                memory::peak(&self.model, &split, &self.batch, m).total() / f64::from(1 << 30)
            }
        })
    }
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
                gpus: row.split.gpus(),
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

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "source,gpu,interconnect,params_b,layers,hidden,ffn,heads,kv_heads,seq,vocab,gated_mlp,gpus,tensor,pipeline,virtual_stages,data,context,sequence_parallel,recompute,zero,global_batch_seqs,micro_batch,dtype,measured,value";
    const ROW: &str = "Narayanan et al. 2021 (2104.04473) table 1,A100-80G-SXM,NVLink 600GB/s; 8x200Gb/s HDR per 8-GPU node,18.4,40,6144,24576,48,48,2048,51200,0,256,8,1,,32,1,0,full,0,1024,,fp16,hfu_tflops_per_gpu,135";

    fn rejects(row: &str, column: &str, words: &str) {
        let text = format!("{HEADER}\n{row}\n");
        let error = read("runs.csv", &text, &Catalogue::builtin()).unwrap_err().to_string();
        assert!(error.starts_with(&format!("runs.csv:2: column '{column}'")), "{error}");
        assert!(error.contains(words), "{error}");
    }

    #[test]
    fn a_bad_cell_names_file_line_and_column() {
        rejects(&ROW.replace(",40,6144", ",forty,6144"), "layers", "'forty' is not a whole number");
        rejects(&ROW.replace("A100-80G-SXM", "A100-80G-SXX"), "gpu", "nearest: a100-80g");
        rejects(&ROW.replace("hfu_tflops_per_gpu", "hfu_tflop"), "measured", "hfu_tflops");
        rejects(&ROW.replace("fp16", "fp61"), "dtype", "fp16");
        rejects(&ROW.replace(",256,8,1,", ",250,8,1,"), "gpus", "= 256");
        rejects(&ROW.replace(",135", ",-3"), "value", "not a positive number");
        rejects(&ROW.replace("full", "fully"), "recompute", "full");
        rejects(&ROW.replace(",135", ",135,1"), "row", "27 cells, and the header 26");
    }

    #[test]
    fn a_missing_column_and_an_empty_table_are_said() {
        let catalogue = Catalogue::builtin();
        let error = read("r.csv", "source,gpu\nx,y\n", &catalogue).unwrap_err().to_string();
        assert!(error.starts_with("r.csv:1: column 'layers'"), "{error}");
        let error = read("r.csv", &format!("{HEADER}\n"), &catalogue).unwrap_err().to_string();
        assert!(error.contains("no rows"), "{error}");
        assert!(read("r.csv", "", &catalogue).is_err());
    }

    #[test]
    fn interconnects_are_read_as_tables_write_them() {
        let catalogue = Catalogue::builtin();
        let gpu = || catalogue.gpu("a100-80g").unwrap();
        for (text, link, nic, node) in [
            ("NVLink 600GB/s; 8x200Gb/s HDR per 8-GPU node", 300e9, 200.0, 8),
            ("NVLink 900GB/s; 8x400Gb/s RoCE per 8-GPU node", 450e9, 400.0, 8),
            ("NVLink 600GB/s; 4x200Gb/s per 8-GPU node", 300e9, 100.0, 8),
            ("NVLink 600 GB/s, 4 x 100 Gbps EFA per 8-GPU node", 300e9, 50.0, 8),
            ("NVSwitch 300GB/s; 8x100Gb/s EDR per 16-GPU node", 150e9, 50.0, 16),
            ("", 300e9, 200.0, 8),
        ] {
            let machines = parse_interconnect(text, gpu(), &catalogue);
            assert_eq!(machines.gpu.link_bandwidth, link, "{text}");
            assert_eq!(machines.network.nic_gbps, nic, "{text}");
            assert_eq!(machines.network.gpus_per_node, node, "{text}");
        }
    }

    #[test]
    fn the_stack_follows_the_date() {
        let catalogue = Catalogue::builtin();
        let a100 = catalogue.gpu("a100-80g").unwrap();
        let h100 = catalogue.gpu("h100-sxm").unwrap();
        let stack = |source: &str, gpu: &Gpu| infer_stack(source, gpu, Dtype::Bf16, 0);
        assert_eq!(stack("Narayanan et al. 2021 (2104.04473) table 1", &a100), Stack::Eager);
        assert_eq!(stack("MT-NLG 530B (Smith et al. 2022)", &a100), Stack::Eager);
        assert_eq!(stack("Korthikanti et al. 2022 (2205.05198) table 5", &a100), Stack::Fused);
        assert_eq!(stack("MegaScale (2402.15627) 175B", &a100), Stack::Overlapped);
        assert_eq!(stack("Megatron-Core README model table (H100)", &h100), Stack::Overlapped);
    }
}
