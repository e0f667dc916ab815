//! One row of the table of metrics, and how it is registered.

use prometheus::core::Collector;
use prometheus::{
    CounterVec, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry,
};

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Goes up only.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts observations in buckets with these upper bounds.
    Histogram(&'static [f64]),
}

impl Kind {
    /// Returns Prometheus' word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

/// Which process exports a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The control plane.
    Control,
    /// Each node's agent.
    Agent,
    /// The gateway.
    Gateway,
    /// The operator of a Kubernetes cluster, beside what it shares with the control plane.
    Operator,
}

impl Origin {
    /// Every origin, in the order of the reference.
    pub const ALL: [Self; 4] = [Self::Control, Self::Agent, Self::Gateway, Self::Operator];

    /// Returns the word used in the reference.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Control => "control plane",
            Self::Agent => "agent",
            Self::Gateway => "gateway",
            Self::Operator => "operator",
        }
    }
}

/// One metric.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Metric {
    /// The full name, with its unit and, for counters, `_total`.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// The base unit; empty for plain numbers.
    pub unit: &'static str,
    /// The labels, in the order in which values are given.
    pub labels: &'static [&'static str],
    /// One sentence.
    pub help: &'static str,
    /// Who exports it.
    pub origin: Origin,
}

impl Metric {
    fn opts(&self) -> Opts {
        Opts::new(self.name, self.help)
    }

    /// Registers it as a gauge of real numbers.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn gauge(&self, registry: &Registry) -> Result<GaugeVec, prometheus::Error> {
        keep(registry, GaugeVec::new(self.opts(), self.labels)?)
    }

    /// Registers it as a gauge of whole numbers.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn int_gauge(&self, registry: &Registry) -> Result<IntGaugeVec, prometheus::Error> {
        keep(registry, IntGaugeVec::new(self.opts(), self.labels)?)
    }

    /// Registers it as a counter of real numbers, such as seconds.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn counter(&self, registry: &Registry) -> Result<CounterVec, prometheus::Error> {
        keep(registry, CounterVec::new(self.opts(), self.labels)?)
    }

    /// Registers it as a counter of whole numbers.
    ///
    /// # Errors
    /// When the name is registered already.
    pub fn int_counter(&self, registry: &Registry) -> Result<IntCounterVec, prometheus::Error> {
        keep(registry, IntCounterVec::new(self.opts(), self.labels)?)
    }

    /// Registers it as a histogram, with the buckets of its row.
    ///
    /// # Errors
    /// When the name is registered already, or its row is no histogram.
    pub fn histogram(&self, registry: &Registry) -> Result<HistogramVec, prometheus::Error> {
        let Kind::Histogram(buckets) = self.kind else {
            return Err(prometheus::Error::Msg(format!(
                "{} is a {}",
                self.name,
                self.kind.as_str()
            )));
        };
        let options = HistogramOpts::from(self.opts()).buckets(buckets.to_vec());
        keep(registry, HistogramVec::new(options, self.labels)?)
    }
}

fn keep<C: Collector + Clone + 'static>(
    registry: &Registry,
    metric: C,
) -> Result<C, prometheus::Error> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}
