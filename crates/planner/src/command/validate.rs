//! `plan validate`: predictions against a table of published runs.

use super::{Inputs, Output, ValidateArgs, catalogue, json};
use crate::calibrate::{before_fitting, leave_one_out, leave_one_source_out};
use crate::error::PlanError;
use crate::published;

/// Predicts each row of the table in `inputs.runs`.
///
/// # Errors
/// [`PlanError::Csv`] with file, line and column for a table that cannot be read.
pub fn validate(args: &ValidateArgs, inputs: &Inputs) -> Result<Output, PlanError> {
    let catalogue = catalogue(inputs)?;
    let Some(file) = &inputs.runs else {
        return Err(PlanError::invalid("file", "a CSV of published runs is needed"));
    };
    let table = published::read(&file.name, &file.text, &catalogue)?;
    let report = table.validate()?;
    let mut text = format!(
        "{:<46} {:>6} {:<24} {:>9} {:>9} {:>7}\n",
        "SOURCE", "GPUS", "MEASURED", "PUBLISHED", "PREDICTED", "ERROR"
    );
    let out = if args.leave_one_out {
        let blank = before_fitting(&catalogue);
        Some((leave_one_out(&table.rows, &blank)?, leave_one_source_out(&table.rows, &blank)?))
    } else {
        None
    };
    for (index, row) in report.rows.iter().enumerate() {
        let source: String = row.source.chars().take(46).collect();
        text.push_str(&format!(
            "{source:<46} {:>6} {:<24} {:>9.2} {:>9.2} {:>+6.1}%",
            row.gpus, row.measured, row.published, row.predicted, row.error_percent
        ));
        if let Some((rows, sources)) = &out {
            text.push_str(&format!(
                "  left out {:>+6.1}%, its source {:>+6.1}%",
                rows[index], sources[index]
            ));
        }
        text.push('\n');
    }
    text.push_str(&format!(
        "\nmean absolute error {:.1}%, greatest {:.1}%, {} rows\n",
        report.mean_absolute_error_percent,
        report.max_absolute_error_percent,
        report.rows.len()
    ));
    if let Some((rows, sources)) = &out {
        let mean = |e: &[f64]| e.iter().map(|x| x.abs()).sum::<f64>() / e.len().max(1) as f64;
        text.push_str(&format!(
            "with constants fitted to the other rows {:.1}%, to the other sources {:.1}%\n",
            mean(rows),
            mean(sources)
        ));
    }
    text.push_str(
        "Calibrated per GPU generation and network family only; error = predicted / published - 1.\n",
    );
    Ok(Output { table: text, json: json(&report)?, warnings: table.warnings, ..Output::default() })
}
