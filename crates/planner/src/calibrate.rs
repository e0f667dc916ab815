//! Fits the constants of GPU generations and networks to published runs, and checks that they
//! carry over to runs that were left out.
//!
//! One set of constants per generation; none per row or per model. A pull towards the values that
//! kernels are known to reach keeps few rows from bending many constants.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::catalogue::{Calibration, Catalogue};
use crate::error::PlanError;
use crate::fit::minimise;
use crate::published::Row;

/// How strongly a constant is held to its prior: a factor e away costs as much as this mean square
/// error of one row.
const PRIOR_WEIGHT: f64 = 0.02;

/// What was believed of fitted generations before any run was looked at: shares that large
/// kernels and collectives reach in vendors' and authors' own measurements. In order: matmul,
/// `k_half`, memory, attention, link.
const PRIORS: [(&str, [f64; 5]); 2] =
    [("ampere", [0.82, 120.0, 0.85, 0.55, 0.77]), ("hopper", [0.70, 350.0, 0.80, 0.42, 0.80])];

/// Returns the catalogue with the fitted generations set back to what was believed beforehand, so
/// that a row that is left out has left no trace.
#[must_use]
pub fn before_fitting(catalogue: &Catalogue) -> Catalogue {
    let mut catalogue = catalogue.clone();
    for (name, [matmul, k_half, memory, attention, link]) in PRIORS {
        let Some(fitted) = catalogue.calibration(name).cloned() else { continue };
        let prior = Calibration {
            matmul_efficiency: matmul,
            matmul_k_half: k_half,
            memory_efficiency: memory,
            attention_efficiency: attention,
            link_efficiency: link,
            ..fitted
        };
        catalogue.set_calibration(name, &prior);
    }
    catalogue
}

/// Constants found, and how well they do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fitted {
    /// By generation.
    pub generations: BTreeMap<String, Calibration>,
    /// Mean absolute error over the rows, in percent.
    pub mean_absolute_error_percent: f64,
    /// Greatest absolute error, in percent.
    pub max_absolute_error_percent: f64,
}

fn errors(rows: &[Row]) -> Result<Vec<f64>, PlanError> {
    rows.iter().map(|row| Ok((row.predict_value()? / row.value).ln())).collect()
}

fn with(rows: &[Row], generation: &str, calibration: &Calibration) -> Vec<Row> {
    let mut rows = rows.to_vec();
    for row in rows.iter_mut().filter(|row| row.machines.gpu.generation == generation) {
        row.machines.gpu.calibration = calibration.clone();
    }
    rows
}

fn scaled(prior: &Calibration, x: &[f64]) -> Calibration {
    let share = |value: f64, x: f64| (value * x.exp()).clamp(0.05, 0.95);
    Calibration {
        matmul_efficiency: share(prior.matmul_efficiency, x[0]),
        matmul_k_half: (prior.matmul_k_half * x[1].exp()).clamp(10.0, 2000.0),
        memory_efficiency: share(prior.memory_efficiency, x[2]),
        attention_efficiency: share(prior.attention_efficiency, x[3]),
        link_efficiency: share(prior.link_efficiency, x[4]),
        ..prior.clone()
    }
}

/// Fits the constants of every generation that has at least two rows, from the catalogue's as the
/// prior.
///
/// # Errors
/// Whatever [`Row::predict`] finds impossible.
pub fn fit(rows: &[Row], catalogue: &Catalogue) -> Result<Fitted, PlanError> {
    let mut names: Vec<&str> =
        rows.iter().map(|row| row.machines.gpu.generation.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let mut generations = BTreeMap::new();
    let mut fitted_rows = rows.to_vec();
    for name in names {
        let own: Vec<Row> =
            rows.iter().filter(|r| r.machines.gpu.generation == name).cloned().collect();
        let Some(prior) = catalogue.calibration(name) else { continue };
        if own.len() < 2 {
            continue;
        }
        let mut objective = |x: &[f64]| {
            let candidate = scaled(prior, x);
            let Ok(errors) = errors(&with(&own, name, &candidate)) else { return f64::INFINITY };
            // Huber: an outlier pulls in proportion, not by its square.
            let loss: f64 = errors
                .iter()
                .map(|e| if e.abs() < 0.1 { e * e } else { 0.2 * e.abs() - 0.01 })
                .sum();
            loss + PRIOR_WEIGHT * x.iter().map(|x| x * x).sum::<f64>()
        };
        let found = minimise(&mut objective, &[0.0; 5], &[0.1, 0.3, 0.1, 0.1, 0.1], 160);
        let calibration = scaled(prior, &found.x);
        fitted_rows = with(&fitted_rows, name, &calibration);
        generations.insert(name.to_owned(), calibration);
    }
    let absolute: Vec<f64> =
        errors(&fitted_rows)?.iter().map(|e| 100.0 * (e.exp() - 1.0).abs()).collect();
    Ok(Fitted {
        generations,
        mean_absolute_error_percent: absolute.iter().sum::<f64>() / absolute.len().max(1) as f64,
        max_absolute_error_percent: absolute.iter().copied().fold(0.0, f64::max),
    })
}

/// Predicts each source's rows with constants fitted to all other sources, and returns the errors
/// in percent, in the rows' order. A source is what `source` says: rows of one table share their
/// software and their cluster, so leaving out single rows would flatter.
///
/// # Errors
/// As [`fit`].
pub fn leave_one_source_out(rows: &[Row], catalogue: &Catalogue) -> Result<Vec<f64>, PlanError> {
    let mut result = vec![0.0; rows.len()];
    let mut sources: Vec<&str> = rows.iter().map(|row| row.source.as_str()).collect();
    sources.sort_unstable();
    sources.dedup();
    for source in sources {
        let kept: Vec<Row> = rows.iter().filter(|row| row.source != source).cloned().collect();
        let fitted = fit(&kept, catalogue)?;
        for (index, row) in rows.iter().enumerate().filter(|(_, row)| row.source == source) {
            let mut row = row.clone();
            if let Some(calibration) = fitted.generations.get(&row.machines.gpu.generation) {
                row.machines.gpu.calibration = calibration.clone();
            }
            result[index] = 100.0 * (row.predict_value()? / row.value - 1.0);
        }
    }
    Ok(result)
}

/// Predicts each row with constants fitted to all other rows; errors in percent.
///
/// # Errors
/// As [`fit`].
pub fn leave_one_out(rows: &[Row], catalogue: &Catalogue) -> Result<Vec<f64>, PlanError> {
    let mut result = Vec::with_capacity(rows.len());
    for left in 0..rows.len() {
        let mut kept = rows.to_vec();
        let mut row = kept.remove(left);
        kept.retain(|r| r.machines.gpu.generation == row.machines.gpu.generation);
        let fitted = fit(&kept, catalogue)?;
        if let Some(calibration) = fitted.generations.get(&row.machines.gpu.generation) {
            row.machines.gpu.calibration = calibration.clone();
        }
        result.push(100.0 * (row.predict_value()? / row.value - 1.0));
    }
    Ok(result)
}
