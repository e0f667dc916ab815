//! Scaling laws: loss from parameters and tokens, the best split of a budget, fits of one's own.
//!
//! `N` parameters, `D` tokens, `C = 6 N D` operations, `L` loss in nats per token.

use serde::{Deserialize, Serialize};

use crate::error::{PlanError, nearest_names};
use crate::fit::minimise;

/// `L(N, D) = E + A / N^alpha + B / D^beta` (Hoffmann et al. 2022, 2203.15556, equation 2).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Law {
    /// The loss of a perfect model.
    pub e: f64,
    /// Scale of the parameter term.
    pub a: f64,
    /// Scale of the data term.
    pub b: f64,
    /// Exponent of the parameters.
    pub alpha: f64,
    /// Exponent of the tokens.
    pub beta: f64,
    /// Standard error of `alpha`; 0 where none is known.
    pub alpha_error: f64,
    /// Standard error of `beta`.
    pub beta_error: f64,
}

/// Hoffmann et al. 2022, approach 3, as printed.
pub const HOFFMANN: Law =
    Law { e: 1.69, a: 406.4, b: 410.7, alpha: 0.34, beta: 0.28, alpha_error: 0.0, beta_error: 0.0 };

/// Besiroglu et al. 2024 (2404.10102): the same runs, fitted anew, with standard errors.
pub const BESIROGLU: Law = Law {
    e: 1.8172,
    a: 482.01,
    b: 2085.43,
    alpha: 0.3478,
    beta: 0.3658,
    alpha_error: 0.02,
    beta_error: 0.02,
};

/// A model and its data for a budget.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Optimum {
    /// Parameters.
    pub parameters: f64,
    /// Tokens.
    pub tokens: f64,
    /// Predicted loss in nats per token.
    pub loss: f64,
    /// Tokens per parameter.
    pub tokens_per_parameter: f64,
    /// Parameters at one standard error of the exponents, least and most.
    pub parameters_range: (f64, f64),
    /// Tokens at one standard error of the exponents, least and most.
    pub tokens_range: (f64, f64),
}

impl Law {
    /// Predicts the loss.
    #[must_use]
    pub fn loss(&self, parameters: f64, tokens: f64) -> f64 {
        self.e + self.a / parameters.powf(self.alpha) + self.b / tokens.powf(self.beta)
    }

    fn optimal_parameters(&self, flops: f64) -> f64 {
        let sum = self.alpha + self.beta;
        let g = (self.alpha * self.a / (self.beta * self.b)).powf(1.0 / sum);
        g * (flops / 6.0).powf(self.beta / sum)
    }

    /// Finds the compute-optimal model for a budget of operations:
    /// `N = G (C/6)^(beta/(alpha+beta))`, `D = C / (6 N)`, `G = (alpha A / (beta B))^(1/(alpha+beta))`.
    ///
    /// The range carries the standard errors of the exponents to that of `beta / (alpha + beta)`,
    /// and that error from the budgets that were measured (about 10^21) to this one:
    /// `ln N +- s ln(C / 10^21)`, `s = sqrt((beta s_alpha)^2 + (alpha s_beta)^2) / (alpha + beta)^2`.
    #[must_use]
    pub fn optimum(&self, flops: f64) -> Optimum {
        let parameters = self.optimal_parameters(flops);
        let tokens = flops / 6.0 / parameters;
        let sum = self.alpha + self.beta;
        let error =
            (self.beta * self.alpha_error).hypot(self.alpha * self.beta_error) / (sum * sum);
        let factor = (error * (flops / 1e21).ln().abs()).exp();
        let (least, most) = (parameters / factor, parameters * factor);
        Optimum {
            parameters,
            tokens,
            loss: self.loss(parameters, tokens),
            tokens_per_parameter: tokens / parameters,
            parameters_range: (least, most),
            tokens_range: (flops / 6.0 / most, flops / 6.0 / least),
        }
    }

    /// Returns the tokens that bring a model of `parameters` to `loss`; none where no amount does.
    #[must_use]
    pub fn tokens_for_loss(&self, parameters: f64, loss: f64) -> Option<f64> {
        let rest = loss - self.e - self.a / parameters.powf(self.alpha);
        (rest > 0.0).then(|| (self.b / rest).powf(1.0 / self.beta))
    }

    /// Finds the model that reaches `loss` with the fewest operations over training and serving
    /// `served` tokens: minimises `6 N D + 2 N served` (Sardana et al. 2023, 2401.00448).
    ///
    /// # Errors
    /// [`PlanError::Invalid`] where the loss is at or below the law's least.
    pub fn over_trained(&self, loss: f64, served: f64) -> Result<Optimum, PlanError> {
        if loss <= self.e * (1.0 + 1e-6) {
            return Err(PlanError::invalid(
                "loss",
                format!(
                    "{loss} is not reachable: the law ends at {}; nearest that works: {:.4}",
                    self.e,
                    self.e * 1.01
                ),
            ));
        }
        // Golden section over log N, from the smallest model that can reach the loss.
        let smallest = (self.a / (loss - self.e)).powf(1.0 / self.alpha);
        let cost = |x: f64| {
            let n = x.exp();
            self.tokens_for_loss(n, loss).map_or(f64::INFINITY, |d| 6.0 * n * d + 2.0 * n * served)
        };
        let (mut low, mut high) = (smallest.ln() + 1e-6, smallest.ln() + 12.0);
        let ratio = (5f64.sqrt() - 1.0) / 2.0;
        for _ in 0..200 {
            let (x1, x2) = (high - ratio * (high - low), low + ratio * (high - low));
            if cost(x1) < cost(x2) { high = x2 } else { low = x1 }
        }
        let parameters = ((low + high) / 2.0).exp();
        let tokens = self.tokens_for_loss(parameters, loss).unwrap_or(f64::INFINITY);
        Ok(Optimum {
            parameters,
            tokens,
            loss,
            tokens_per_parameter: tokens / parameters,
            parameters_range: (parameters, parameters),
            tokens_range: (tokens, tokens),
        })
    }
}

/// Kaplan et al. 2020 (2001.08361): `N = 1.3e9 C^0.73`, `D = 2e10 C^0.27` with C in PF-days, and
/// `L = ((8.8e13 / N)^(0.076/0.095) + 5.4e13 / D)^0.095`. Its N leaves embeddings out.
#[must_use]
pub fn kaplan(flops: f64) -> Optimum {
    let pf_days = flops / 8.64e19;
    let parameters = 1.3e9 * pf_days.powf(0.73);
    let tokens = 2e10 * pf_days.powf(0.27);
    let loss = ((8.8e13 / parameters).powf(0.076 / 0.095) + 5.4e13 / tokens).powf(0.095);
    Optimum {
        parameters,
        tokens,
        loss,
        tokens_per_parameter: tokens / parameters,
        parameters_range: (parameters, parameters),
        tokens_range: (tokens, tokens),
    }
}

/// One run: what a fit learns from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Run {
    /// Parameters.
    pub parameters: f64,
    /// Tokens.
    pub tokens: f64,
    /// Final loss.
    pub loss: f64,
}

/// A fitted law and how well it holds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct FittedLaw {
    /// The law; its errors are from leaving tenths of the runs out.
    pub law: Law,
    /// Root mean square of `ln predicted - ln measured`.
    pub rms_log_error: f64,
    /// Runs used.
    pub runs: usize,
}

/// Reads runs from CSV text with the columns `params` (or `parameters`), `tokens` and `loss`;
/// `flops` may stand for either of the first two.
///
/// # Errors
/// [`PlanError::Csv`] with file, line and column.
pub fn read_runs(file: &str, text: &str) -> Result<Vec<Run>, PlanError> {
    let mut reader = csv::ReaderBuilder::new()
        .comment(Some(b'#'))
        .trim(csv::Trim::All)
        .from_reader(text.as_bytes());
    let fail = |line: u64, column: &str, message: String| PlanError::Csv {
        file: file.to_owned(),
        line,
        column: column.to_owned(),
        message,
    };
    let headers: Vec<String> = reader
        .headers()
        .map_err(|e| fail(1, "header", e.to_string()))?
        .iter()
        .map(str::to_lowercase)
        .collect();
    let find = |names: &[&str]| headers.iter().position(|h| names.contains(&h.as_str()));
    let params = find(&["params", "parameters", "n"]);
    let tokens = find(&["tokens", "d"]);
    let flops = find(&["flops", "flop", "c"]);
    let loss = find(&["loss", "l"]).ok_or_else(|| {
        let near = nearest_names("loss", headers.iter().map(String::as_str));
        fail(
            1,
            "loss",
            format!(
                "the header lacks this column; it has {}",
                if near.is_empty() { headers.join(", ") } else { near.join(", ") }
            ),
        )
    })?;
    if [params, tokens, flops].iter().flatten().count() < 2 {
        return Err(fail(1, "params", "two of params, tokens and flops are needed".to_owned()));
    }
    let mut runs = Vec::new();
    for record in reader.records() {
        let record = record
            .map_err(|e| fail(e.position().map_or(0, csv::Position::line), "row", e.to_string()))?;
        let line = record.position().map_or(0, csv::Position::line);
        let cell = |index: usize| -> Result<f64, PlanError> {
            let text = record.get(index).unwrap_or("");
            match text.parse::<f64>() {
                Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
                _ => Err(fail(line, &headers[index], format!("'{text}' is not a positive number"))),
            }
        };
        let [n, d, c] = [params, tokens, flops].map(|i| i.map(cell));
        let (n, d) = match (n, d, c) {
            (Some(n), Some(d), _) => (n?, d?),
            (Some(n), None, Some(c)) => {
                let n = n?;
                (n, c? / 6.0 / n)
            }
            (None, Some(d), Some(c)) => {
                let d = d?;
                (c? / 6.0 / d, d)
            }
            _ => return Err(fail(line, "params", "two sizes are needed".to_owned())),
        };
        runs.push(Run { parameters: n, tokens: d, loss: cell(loss)? });
    }
    Ok(runs)
}

/// Fits a law: the least Huber loss (delta 10^-3) of `ln L`, from a grid of starts
/// (Hoffmann et al. 2022, section D.2).
///
/// # Errors
/// [`PlanError::Invalid`] with fewer than six runs, or runs that all have one size or one amount of
/// data, which leave an exponent free.
pub fn fit(runs: &[Run]) -> Result<FittedLaw, PlanError> {
    if runs.len() < 6 {
        return Err(PlanError::invalid(
            "runs",
            format!(
                "{} runs cannot fix five constants; {} more are needed",
                runs.len(),
                6 - runs.len()
            ),
        ));
    }
    let spread = |value: &dyn Fn(&Run) -> f64| {
        let (low, high) =
            runs.iter().map(value).fold((f64::INFINITY, 0.0_f64), |(l, h), x| (l.min(x), h.max(x)));
        high / low
    };
    for (field, ratio) in [("params", spread(&|r| r.parameters)), ("tokens", spread(&|r| r.tokens))]
    {
        if ratio < 1.5 {
            return Err(PlanError::invalid(
                field,
                format!(
                    "all runs lie within a factor {ratio:.2}; at least 1.5 is needed to see an exponent"
                ),
            ));
        }
    }
    let law = fit_once(runs, None);
    let rms = (runs
        .iter()
        .map(|r| (law.loss(r.parameters, r.tokens).ln() - r.loss.ln()).powi(2))
        .sum::<f64>()
        / runs.len() as f64)
        .sqrt();
    // Leave tenths out: the spread of the exponents, as a jackknife's standard error.
    let folds = 10.min(runs.len());
    let parts: Vec<Law> = (0..folds)
        .map(|fold| {
            let kept: Vec<Run> = runs
                .iter()
                .enumerate()
                .filter(|(i, _)| i % folds != fold)
                .map(|(_, r)| *r)
                .collect();
            fit_once(&kept, Some(&law))
        })
        .collect();
    let error = |value: &dyn Fn(&Law) -> f64| {
        let n = folds as f64;
        let mean = parts.iter().map(value).sum::<f64>() / n;
        ((n - 1.0) / n * parts.iter().map(|p| (value(p) - mean).powi(2)).sum::<f64>()).sqrt()
    };
    let law = Law { alpha_error: error(&|l| l.alpha), beta_error: error(&|l| l.beta), ..law };
    Ok(FittedLaw { law, rms_log_error: rms, runs: runs.len() })
}

fn fit_once(runs: &[Run], near: Option<&Law>) -> Law {
    const DELTA: f64 = 1e-3;
    let law = |x: &[f64]| Law {
        e: x[0].exp(),
        a: x[1].exp(),
        b: x[2].exp(),
        alpha: x[3],
        beta: x[4],
        alpha_error: 0.0,
        beta_error: 0.0,
    };
    let mut objective = |x: &[f64]| -> f64 {
        if x[3] <= 0.0 || x[4] <= 0.0 {
            return f64::INFINITY;
        }
        let law = law(x);
        runs.iter()
            .map(|r| {
                let e = (law.loss(r.parameters, r.tokens).ln() - r.loss.ln()).abs();
                if e < DELTA { e * e / 2.0 } else { DELTA * (e - DELTA / 2.0) }
            })
            .sum()
    };
    let starts: Vec<[f64; 5]> = match near {
        Some(l) => vec![[l.e.ln(), l.a.ln(), l.b.ln(), l.alpha, l.beta]],
        None => {
            let least = runs.iter().map(|r| r.loss).fold(f64::INFINITY, f64::min);
            let mut starts = Vec::new();
            for share in [0.5, 0.8] {
                for (alpha, beta) in [(0.3, 0.3), (0.4, 0.4), (0.3, 0.5), (0.5, 0.3)] {
                    // Start each term with half of what the irreducible loss leaves, at the first run.
                    let rest = (runs[0].loss - share * least).max(1e-3) / 2.0;
                    starts.push([
                        (share * least).ln(),
                        (rest * runs[0].parameters.powf(alpha)).ln(),
                        (rest * runs[0].tokens.powf(beta)).ln(),
                        alpha,
                        beta,
                    ]);
                }
            }
            starts
        }
    };
    let scale =
        if near.is_some() { [0.02, 0.2, 0.2, 0.01, 0.01] } else { [0.1, 1.0, 1.0, 0.05, 0.05] };
    let mut best = (f64::INFINITY, starts[0].to_vec());
    for start in &starts {
        let mut x = start.to_vec();
        // The valley along (A, alpha) and (B, beta) is long: restart until it stops paying.
        for _ in 0..4 {
            let found = minimise(&mut objective, &x, &scale, 3000);
            x = found.x;
            if found.value < best.0 {
                best = (found.value, x.clone());
            }
        }
    }
    law(&best.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_optimum_is_the_closed_form() {
        // By hand, Hoffmann at 5.76e23: G = (0.34*406.4/(0.28*410.7))^(1/0.62) = 1.3448;
        // N = G * (9.6e22)^(0.28/0.62) = 3.22e10 (the paper prints 40 B from unrounded constants).
        let o = HOFFMANN.optimum(5.76e23);
        assert!((o.parameters / 3.22e10 - 1.0).abs() < 0.02, "{o:?}");
        assert!((6.0 * o.parameters * o.tokens / 5.76e23 - 1.0).abs() < 1e-12);
        for factor in [0.9, 1.1] {
            let n = o.parameters * factor;
            assert!(HOFFMANN.loss(n, 5.76e23 / 6.0 / n) > o.loss);
        }
    }

    #[test]
    fn the_replication_asks_for_about_20_tokens_per_parameter() {
        // Besiroglu et al. 2024: consistent with Hoffmann's approaches 1 and 2, about 70 B
        // parameters and 1.4 T tokens for Chinchilla's budget.
        let o = BESIROGLU.optimum(5.88e23);
        assert!((15.0..30.0).contains(&o.tokens_per_parameter), "{o:?}");
        assert!(o.parameters_range.0 < 70e9 && o.parameters_range.1 > 70e9, "{o:?}");
        assert!(o.parameters_range.0 < o.parameters && o.parameters < o.parameters_range.1);
    }

    #[test]
    fn kaplan_wants_larger_models() {
        // 3,640 PF-days, GPT-3's budget: 1.3e9 * 3640^0.73 = 5.17e11, by hand.
        let o = kaplan(3640.0 * 8.64e19);
        assert!((o.parameters / 5.17e11 - 1.0).abs() < 0.01, "{o:?}");
        assert!(o.parameters > 3.0 * BESIROGLU.optimum(3640.0 * 8.64e19).parameters);
    }

    #[test]
    fn chinchilla_loss_by_hand() {
        // 1.69 + 406.4/70e9^0.34 + 410.7/1.4e12^0.28 = 1.69 + 0.0830 + 0.1634.
        assert!((HOFFMANN.loss(70e9, 1.4e12) - 1.9364).abs() < 2e-3);
    }

    #[test]
    fn serving_much_shrinks_the_model() {
        let plain = BESIROGLU.optimum(5.88e23);
        let served = BESIROGLU.over_trained(plain.loss, 10e12).unwrap();
        let never = BESIROGLU.over_trained(plain.loss, 0.0).unwrap();
        assert!((never.parameters / plain.parameters - 1.0).abs() < 0.01, "{never:?} {plain:?}");
        assert!(served.parameters < 0.8 * plain.parameters && served.tokens > plain.tokens);
        assert!(BESIROGLU.over_trained(1.8, 0.0).is_err());
    }

    #[test]
    fn a_fit_recovers_the_law_that_made_the_runs() {
        let mut text = String::from("params,tokens,loss\n");
        for n in [1e8, 3e8, 1e9, 3e9, 1e10] {
            for ratio in [5.0, 20.0, 80.0] {
                let loss = BESIROGLU.loss(n, n * ratio);
                text.push_str(&format!("{n},{},{loss}\n", n * ratio));
            }
        }
        let runs = read_runs("runs.csv", &text).unwrap();
        let fitted = fit(&runs).unwrap();
        assert!(fitted.rms_log_error < 1e-3, "{fitted:?}");
        assert!((fitted.law.alpha - BESIROGLU.alpha).abs() < 0.02, "{fitted:?}");
        assert!((fitted.law.beta - BESIROGLU.beta).abs() < 0.02, "{fitted:?}");
    }

    #[test]
    fn bad_runs_are_told_where() {
        let error = read_runs("r.csv", "params,tokens,loss\n1e9,x,3\n").unwrap_err().to_string();
        assert!(error.starts_with("r.csv:2: column 'tokens': 'x'"), "{error}");
        assert!(read_runs("r.csv", "params,loss\n").unwrap_err().to_string().contains("two of"));
        assert!(fit(&[]).unwrap_err().to_string().contains("6 more"));
    }
}
