//! The commands `plan train`, `plan serve`, `plan budget` and `plan validate`: arguments and texts
//! in, a table, JSON and files out. A command line only parses flags and reads files.

pub mod args;
mod budget;
mod serve;
mod train;
mod validate;

pub use args::{BudgetArgs, Inputs, ServeArgs, TextFile, TrainArgs, ValidateArgs};
pub use budget::{BudgetReport, LawAnswer, budget};
pub use serve::{ServeReport, TPOT_MS, TTFT_MS, serve};
pub use train::{Alternative, AtAchieved, TrainReport, train};
pub use validate::validate;

use crate::catalogue::{Catalogue, Dtype, Gpu};
use crate::error::PlanError;
use crate::manifest::Wanted;
use crate::model::Model;
use crate::profile::Profile;
use crate::split::{Machines, Stack};

/// What a command answers.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Output {
    /// A table that fits a screen, ending in a newline.
    pub table: String,
    /// The same as data.
    pub json: serde_json::Value,
    /// A manifest, where one was asked for.
    pub manifest: Option<String>,
    /// An SVG, where a sweep was asked for.
    pub plot: Option<String>,
    /// What the user should know beside the answer, one sentence each; for standard error.
    pub warnings: Vec<String>,
}

/// Reads the catalogue with the user's extensions.
pub(crate) fn catalogue(inputs: &Inputs) -> Result<Catalogue, PlanError> {
    let mut catalogue = Catalogue::builtin();
    for file in &inputs.catalogues {
        catalogue = catalogue.extend(&file.name, &file.text)?;
    }
    Ok(catalogue)
}

/// Finds the model: the given file's, or the catalogue's. With a manifest comes what else it asks
/// for.
pub(crate) fn model(
    name: &str,
    inputs: &Inputs,
    catalogue: &Catalogue,
) -> Result<(Model, Option<Wanted>), PlanError> {
    let Some(file) = &inputs.model else {
        return Ok((catalogue.model(name)?, None));
    };
    if file.text.contains("apiVersion") {
        let wanted = crate::manifest::read(&file.name, &file.text)?;
        return Ok((wanted.model.clone(), Some(wanted)));
    }
    Ok((crate::hf::read(&file.name, &file.text)?, None))
}

/// Finds the machines: a measured profile's, or the catalogue's.
pub(crate) fn machines(
    gpu: &str,
    network: Option<&str>,
    inputs: &Inputs,
    catalogue: &Catalogue,
) -> Result<Machines, PlanError> {
    if let Some(file) = &inputs.profile {
        let mut machines = Profile::read(&file.name, &file.text)?.machines();
        if let Some(name) = network {
            machines.network = catalogue.network(name)?;
        }
        return Ok(machines);
    }
    let gpu = catalogue.gpu(gpu)?;
    let network = match network {
        Some(name) => catalogue.network(name)?,
        None => catalogue.default_network(&gpu),
    };
    Ok(Machines { gpu, network })
}

pub(crate) fn dtype(text: Option<&str>, gpu: &Gpu) -> Result<Dtype, PlanError> {
    let dtype = text.map_or(Ok(gpu.training_dtype()), Dtype::parse)?;
    gpu.peak(dtype)?;
    Ok(dtype)
}

/// Reads the stack; a measured profile is of this project's own engine.
pub(crate) fn stack(text: Option<&str>, inputs: &Inputs) -> Result<Stack, PlanError> {
    let default = if inputs.profile.is_some() { Stack::Native } else { Stack::Overlapped };
    text.map_or(Ok(default), Stack::parse)
}

/// Breaks words into lines of at most 100 columns; the first follows `head`, the others an
/// indentation as wide.
pub(crate) fn wrap(head: &str, words: &str) -> String {
    let mut text = head.to_owned();
    let mut width = head.len();
    for (index, word) in words.split(' ').enumerate() {
        if index > 0 && width + 1 + word.len() > 100 {
            text.push('\n');
            text.push_str(&" ".repeat(head.len()));
            width = head.len();
        } else if index > 0 {
            text.push(' ');
            width += 1;
        }
        width += word.len();
        text.push_str(word);
    }
    text.push('\n');
    text
}

pub(crate) fn gib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 30)
}

/// Says what of a model and a GPU is assumed rather than published.
pub(crate) fn notes(model: &Model, gpu: &Gpu) -> Vec<String> {
    let mut notes = Vec::new();
    if !model.assumed.is_empty() {
        notes.push(format!(
            "{}: not published and assumed here: {} ({})",
            model.name,
            model.assumed.join(", "),
            model.source
        ));
    }
    if !gpu.calibration.basis.starts_with("fitted")
        && !gpu.calibration.basis.starts_with("measured")
    {
        notes.push(format!(
            "{}: rates are not fitted to published runs of it ({})",
            gpu.name, gpu.calibration.basis
        ));
    }
    notes
}

pub(crate) fn json<T: serde::Serialize>(value: &T) -> Result<serde_json::Value, PlanError> {
    // JSON has no infinities; serde_json writes them as null, which is what a reader expects.
    serde_json::to_value(value).map_err(|error| PlanError::invalid("output", error.to_string()))
}
