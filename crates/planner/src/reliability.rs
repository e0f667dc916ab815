//! Failures: expected effective training time, the best checkpoint interval, what is lost.

use serde::{Deserialize, Serialize};

use crate::error::PlanError;
use crate::model::Model;

/// What fails and what recovery costs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Reliability {
    /// Failures per node and day. 2 to 7 per 1,000 node-days are published (Kokolis et al. 2024,
    /// 2410.21680); Llama 3's 419 in 54 days on 2,048 nodes are 3.8.
    pub failures_per_node_day: f64,
    /// Seconds that a checkpoint stops training, w.
    pub checkpoint_s: f64,
    /// Seconds from a failure until training goes on from a checkpoint, u0.
    pub restart_s: f64,
    /// Chosen seconds between checkpoints; none: the optimum.
    pub interval_s: Option<f64>,
}

/// What failures cost a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Effective {
    /// Expected share of wall time that trains, from 0 to 1.
    pub ratio: f64,
    /// Seconds between checkpoints that were reckoned with.
    pub interval_s: f64,
    /// The interval that loses least, `sqrt(2 w / (N r))`.
    pub optimal_interval_s: f64,
    /// The share at the optimum.
    pub optimal_ratio: f64,
    /// Expected failures in the run.
    pub failures: f64,
    /// Mean seconds between failures of the whole gang.
    pub mean_time_between_failures_s: f64,
}

/// Returns the expected effective training time ratio,
/// `(1 - N r (u0 + dt / 2)) / (1 + w / dt)`, at least 0.
///
/// `nodes` N, `rate` r in failures per node and second, `checkpoint` w, `restart` u0 and `interval`
/// dt in seconds. Source: Kokolis et al. 2024 (2410.21680), section 4.
#[must_use]
pub fn effective_ratio(nodes: f64, rate: f64, checkpoint: f64, restart: f64, interval: f64) -> f64 {
    if interval <= 0.0 {
        return 0.0;
    }
    let lost = nodes * rate * (restart + interval / 2.0);
    ((1.0 - lost) / (1.0 + checkpoint / interval)).max(0.0)
}

impl Reliability {
    /// Sets checkpoint time from a model's state and the storage's rate: 2 bytes of weights and 12
    /// of optimizer per parameter, written once, over `nodes x gbs_per_node`.
    #[must_use]
    pub fn checkpoint_seconds(model: &Model, nodes: f64, gbs_per_node: f64) -> f64 {
        14.0 * model.parameters() / (nodes * gbs_per_node * 1e9)
    }

    /// Computes what failures do to a run of `days` without them on `nodes` nodes.
    ///
    /// # Errors
    /// [`PlanError::Invalid`] for a negative or infinite setting, and where failures come faster
    /// than restarts, with the rate that would still work.
    pub fn effective(&self, nodes: f64, days: f64) -> Result<Effective, PlanError> {
        let settings = [
            ("failures", self.failures_per_node_day),
            ("checkpoint_seconds", self.checkpoint_s),
            ("restart_seconds", self.restart_s),
            ("checkpoint_interval", self.interval_s.unwrap_or(1.0)),
        ];
        for (field, value) in settings {
            if !value.is_finite() || value < 0.0 {
                return Err(PlanError::invalid(field, format!("{value} is not a number from 0")));
            }
        }
        let rate = self.failures_per_node_day / 86_400.0;
        let per_second = nodes * rate;
        let optimum = if per_second > 0.0 && self.checkpoint_s > 0.0 {
            (2.0 * self.checkpoint_s / per_second).sqrt()
        } else if per_second > 0.0 {
            1.0
        } else {
            86_400.0
        };
        let interval = self.interval_s.unwrap_or(optimum).max(1e-3);
        let at = |dt: f64| effective_ratio(nodes, rate, self.checkpoint_s, self.restart_s, dt);
        let ratio = at(interval);
        if ratio <= 0.0 {
            let most = 1.0 / (nodes * (self.restart_s + interval / 2.0)) * 86_400.0;
            return Err(PlanError::invalid(
                "failures",
                format!(
                    "{nodes:.0} nodes with {} failures per node-day lose all time to restarts of {:.0} s and repeated work; fewer than {most:.4} per node-day would make progress",
                    self.failures_per_node_day, self.restart_s
                ),
            ));
        }
        Ok(Effective {
            ratio,
            interval_s: interval,
            optimal_interval_s: optimum,
            optimal_ratio: at(optimum),
            failures: nodes * self.failures_per_node_day * days / ratio,
            mean_time_between_failures_s: if per_second > 0.0 {
                1.0 / per_second
            } else {
                f64::INFINITY
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_the_published_root() {
        let r = Reliability {
            failures_per_node_day: 6.5e-3,
            checkpoint_s: 60.0,
            restart_s: 300.0,
            interval_s: None,
        };
        let e = r.effective(2000.0, 10.0).unwrap();
        // By hand: N r = 13 per day, sqrt(2 * 60 * 86400 / 13) = 893.05 s.
        assert!((e.optimal_interval_s - 893.05).abs() < 0.01, "{e:?}");
        // 1 - 13/86400 * (300 + 446.5) = 0.88768; over 1 + 60/893.05 = 1.06719: 0.83180.
        assert!((e.ratio - 0.83180).abs() < 2e-4, "{e:?}");
        for factor in [0.5, 0.8, 1.25, 2.0] {
            let other = Reliability { interval_s: Some(e.interval_s * factor), ..r };
            assert!(other.effective(2000.0, 10.0).unwrap().ratio < e.ratio + 0.002);
        }
    }

    #[test]
    fn llama_3_keeps_nine_tenths_of_its_time() {
        // 419 unplanned interruptions in 54 days on 2,048 nodes, over 90% effective (2407.21783).
        let rate = 419.0 / 54.0 / 2048.0;
        let r = Reliability {
            failures_per_node_day: rate,
            checkpoint_s: 10.0,
            restart_s: 600.0,
            interval_s: None,
        };
        let e = r.effective(2048.0, 54.0 * 0.9).unwrap();
        assert!((0.90..0.95).contains(&e.ratio), "{e:?}");
        assert!((e.failures - 419.0).abs() < 30.0, "{e:?}");
    }

    #[test]
    fn hopeless_rates_are_refused_with_what_would_work() {
        let r = Reliability {
            failures_per_node_day: 1.0,
            checkpoint_s: 60.0,
            restart_s: 600.0,
            interval_s: None,
        };
        let error = r.effective(10_000.0, 1.0).unwrap_err().to_string();
        assert!(error.contains("would make progress"), "{error}");
    }
}
