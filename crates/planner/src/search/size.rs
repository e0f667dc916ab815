//! How many GPUs: the fewest for a deadline, and the cheapest.

use serde::Serialize;

use super::{Candidate, Found, Request, best, divisors};
use crate::error::PlanError;

/// Numbers of GPUs that clusters come in: whole shares of a node, then nodes in numbers whose only
/// prime factors are 2 and 3, with single factors of 5 and 7.
#[must_use]
pub fn counts(per_node: u32, most: u32) -> Vec<u32> {
    let per_node = per_node.max(1);
    let mut list: Vec<u32> = divisors(per_node);
    for k in [1u32, 3, 5, 7, 9, 15] {
        let mut nodes = k;
        while u64::from(nodes) * u64::from(per_node) <= u64::from(most) {
            list.push(nodes * per_node);
            nodes *= 2;
        }
    }
    list.retain(|n| *n <= most);
    list.sort_unstable();
    list.dedup();
    list
}

/// A number of GPUs with its plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sized {
    /// GPUs.
    pub gpus: u32,
    /// Days for the tokens, failures left aside.
    pub days: f64,
    /// What was found for them.
    pub found: Found,
}

/// Days to train on `tokens` at a candidate's rate.
#[must_use]
pub fn days(candidate: &Candidate, sequence: u32, tokens: f64) -> f64 {
    let per_step = f64::from(candidate.global_batch) * f64::from(sequence);
    tokens / per_step * candidate.time.step / 86_400.0
}

/// Finds the fewest GPUs that train on `tokens` within `deadline_days`, of those in [`counts`].
///
/// # Errors
/// [`PlanError::Deadline`] with the fastest there is and the days that would do;
/// [`PlanError::DoesNotFit`] where no number of GPUs holds the model.
pub fn fewest(
    request: &Request<'_>,
    tokens: f64,
    deadline_days: f64,
    max_gpus: u32,
) -> Result<Sized, PlanError> {
    let model = request.model;
    let flops = tokens * model.train_flops_per_token(f64::from(request.batch.sequence));
    let peak = request.machines.gpu.peak(request.batch.dtype)?;
    // At the full peak nobody is faster.
    let floor = flops / (peak * deadline_days.max(1e-9) * 86_400.0);
    let mut fastest: Option<(f64, u32)> = None;
    let mut refusal = None;
    for gpus in counts(request.machines.network.gpus_per_node, max_gpus) {
        if f64::from(gpus) < floor * 0.9 && gpus.saturating_mul(2) < max_gpus {
            continue;
        }
        match best(request, gpus) {
            Ok(found) => {
                let took = days(&found.best, request.batch.sequence, tokens);
                if took <= deadline_days {
                    return Ok(Sized { gpus, days: took, found });
                }
                if fastest.is_none_or(|(best, _)| took < best) {
                    fastest = Some((took, gpus));
                }
            }
            Err(error) => {
                refusal.get_or_insert(error);
            }
        }
    }
    match (fastest, refusal) {
        (Some((best_days, best_gpus)), _) => Err(PlanError::Deadline {
            model: model.name.clone(),
            gpu: request.machines.gpu.name.clone(),
            deadline_days,
            max_gpus,
            best_days,
            best_gpus,
            short_days: best_days - deadline_days,
            nearest: format!(
                "nearest that works: {:.1} days, or {:.3e} tokens",
                best_days,
                tokens * deadline_days / best_days
            ),
        }),
        (None, Some(error)) => Err(error),
        (None, None) => Err(PlanError::invalid("max_gpus", format!("{max_gpus} allows no GPUs"))),
    }
}

/// Finds the number of GPUs whose GPU-hours for `tokens` are fewest, within a deadline if any.
///
/// # Errors
/// As [`fewest`].
pub fn cheapest(
    request: &Request<'_>,
    tokens: f64,
    deadline_days: Option<f64>,
    max_gpus: u32,
) -> Result<Sized, PlanError> {
    let mut cheapest: Option<Sized> = None;
    let mut refusal = None;
    let mut misses = 0;
    for gpus in counts(request.machines.network.gpus_per_node, max_gpus) {
        let found = match best(request, gpus) {
            Ok(found) => found,
            Err(error) => {
                refusal.get_or_insert(error);
                continue;
            }
        };
        let took = days(&found.best, request.batch.sequence, tokens);
        if deadline_days.is_some_and(|limit| took > limit) {
            continue;
        }
        let hours = |s: &Sized| s.days * f64::from(s.gpus);
        let sized = Sized { gpus, days: took, found };
        if cheapest.as_ref().is_none_or(|old| hours(&sized) < hours(old)) {
            cheapest = Some(sized);
            misses = 0;
        } else {
            misses += 1;
            // Efficiency falls with the number of GPUs; six larger ones in a row settle it.
            if misses >= 6 {
                break;
            }
        }
    }
    match (cheapest, deadline_days, refusal) {
        (Some(sized), ..) => Ok(sized),
        (None, Some(limit), _) => fewest(request, tokens, limit, max_gpus),
        (None, None, Some(error)) => Err(error),
        (None, None, None) => {
            Err(PlanError::invalid("max_gpus", format!("{max_gpus} allows no GPUs")))
        }
    }
}
