//! From the text of a table to rows, or to the file, line and column of what is wrong with it.

use super::{Measured, Row, Table, infer_stack, parse_interconnect};
use crate::catalogue::{Catalogue, Dtype, check_model};
use crate::error::{PlanError, nearest_names};
use crate::model::{Family, Model, Position};
use crate::split::{Batch, Recompute, Split, Stack, check};

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
    let ffn = fields.number("ffn")?.filter(|f| *f > 0).unwrap_or(hidden.saturating_mul(4));
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
    let grid_given = !fields.text("tensor").is_empty() || !fields.text("pipeline").is_empty();
    let known =
        u64::from(tensor) * u64::from(pipeline).saturating_mul(u64::from(context)).min(1 << 31);
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
    if known.saturating_mul(u64::from(data)) != u64::from(gpus) {
        return Err(fields.error(
            "gpus",
            format!(
                "{gpus} is not tensor {tensor} x pipeline {pipeline} x data {data} x context {context} = {}",
                known.saturating_mul(u64::from(data))
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
    let tokens_b = fields.float("tokens_b")?.or_else(|| tokens_in(&source));
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
    // The batch is rounded to the data ranks when the row is predicted, so any divides here.
    fields.at("tensor", check(&model, &split, &Batch { global: data, ..batch }))?;
    Ok(Row {
        source,
        machines,
        model,
        gpus,
        split,
        grid_given,
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

/// Finds `300B tokens` or `1.4T tokens` in a source's words; in billions.
fn tokens_in(source: &str) -> Option<f64> {
    let words: Vec<&str> = source.split([' ', ',', ';', '(', ')']).collect();
    words.windows(2).find(|pair| pair[1].starts_with("token")).and_then(|pair| {
        crate::quantity::parse("tokens", pair[0]).ok().filter(|t| *t >= 1e6).map(|t| t / 1e9)
    })
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
    fn a_batch_that_does_not_divide_and_a_missing_grid_are_planned_all_the_same() {
        let odd = ROW.replace(",1024,,fp16", ",1030,,fp16");
        let bare = ROW.replace(",256,8,1,,32,", ",256,,,,,");
        let days = ROW
            .replace("table 1", "18.4B on 300B tokens")
            .replace("hfu_tflops_per_gpu,135", "days,30");
        for (row, low, high) in [(odd, 100.0, 170.0), (bare, 100.0, 220.0), (days, 10.0, 60.0)] {
            let text = format!("{HEADER}\n{row}\n");
            let table = read("runs.csv", &text, &Catalogue::builtin()).unwrap();
            let value = table.rows[0].predict_value().unwrap();
            assert!((low..high).contains(&value), "{row}: {value}");
        }
    }
}
