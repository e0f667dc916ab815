//! What the gateway counts: requests, tokens and the times that users feel.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use drumline_telemetry::table;
use drumline_wire::v1;
use prometheus::{HistogramVec, IntCounterVec, IntGaugeVec, Registry};

/// Requests whose times are kept for the quantiles that the dashboard shows.
const WINDOW: usize = 512;

/// Counters, gauges and histograms of the gateway. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Meter {
    requests: IntCounterVec,
    tokens: IntCounterVec,
    in_flight: IntGaugeVec,
    ttft: HistogramVec,
    tpot: HistogramVec,
    queue: HistogramVec,
    inter_token: HistogramVec,
    prefill: HistogramVec,
    decode: HistogramVec,
    success: IntCounterVec,
    prefix_queries: IntCounterVec,
    prefix_hits: IntCounterVec,
    duration: HistogramVec,
    recent: Arc<Mutex<BTreeMap<String, Recent>>>,
}

#[derive(Debug, Default)]
struct Recent {
    ttft: VecDeque<f64>,
    tpot: VecDeque<f64>,
}

/// How a request ended, as its metric label says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Answered in full.
    Ok,
    /// Refused as wrong.
    Invalid,
    /// Refused because the queue was full.
    Busy,
    /// The client went away.
    Cancelled,
    /// The model failed.
    Failed,
}

impl Ending {
    fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Invalid => "invalid",
            Self::Busy => "busy",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }
}

impl Meter {
    /// Registers all metrics.
    ///
    /// # Errors
    /// When a name is registered twice.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        Ok(Self {
            requests: table::GATEWAY_REQUESTS.int_counter(registry)?,
            tokens: table::GATEWAY_TOKENS.int_counter(registry)?,
            in_flight: table::GATEWAY_IN_FLIGHT.int_gauge(registry)?,
            ttft: table::GATEWAY_TTFT.histogram(registry)?,
            tpot: table::GATEWAY_TPOT.histogram(registry)?,
            queue: table::GATEWAY_QUEUE.histogram(registry)?,
            inter_token: table::GATEWAY_INTER_TOKEN.histogram(registry)?,
            prefill: table::GATEWAY_PREFILL.histogram(registry)?,
            decode: table::GATEWAY_DECODE.histogram(registry)?,
            success: table::GATEWAY_SUCCESS.int_counter(registry)?,
            prefix_queries: table::GATEWAY_PREFIX_QUERIES.int_counter(registry)?,
            prefix_hits: table::GATEWAY_PREFIX_HITS.int_counter(registry)?,
            duration: table::GATEWAY_DURATION.histogram(registry)?,
            recent: Arc::default(),
        })
    }

    /// Counts a request that was refused before it reached a rank.
    pub fn refused(&self, model: &str, ending: Ending) {
        self.requests.with_label_values(&[model, ending.label()]).inc();
    }

    /// Begins to measure a request.
    #[must_use]
    pub fn begin(&self, model: &str) -> Measure {
        self.in_flight.with_label_values(&[model]).inc();
        Measure {
            meter: self.clone(),
            model: model.to_owned(),
            start: std::time::Instant::now(),
            first: None,
            last: None,
            completion_tokens: 0,
            ended: false,
        }
    }

    /// Sums up what the control plane shows of a model.
    #[must_use]
    pub fn report(&self, model: &str) -> v1::GatewayModelReport {
        let count =
            |outcome: Ending| self.requests.with_label_values(&[model, outcome.label()]).get();
        let quantiles = |values: &VecDeque<f64>| {
            let mut sorted: Vec<f64> = values.iter().copied().collect();
            sorted.sort_by(f64::total_cmp);
            let at = |q: f64| {
                let index = (q * sorted.len().saturating_sub(1) as f64).round() as usize;
                sorted.get(index).copied().unwrap_or(0.0)
            };
            (at(0.5), at(0.99))
        };
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let empty = Recent::default();
        let recent = recent.get(model).unwrap_or(&empty);
        let (ttft_p50_seconds, ttft_p99_seconds) = quantiles(&recent.ttft);
        let (tpot_p50_seconds, tpot_p99_seconds) = quantiles(&recent.tpot);
        let errors_total = count(Ending::Failed) + count(Ending::Busy);
        v1::GatewayModelReport {
            model: model.to_owned(),
            requests_total: count(Ending::Ok) + count(Ending::Cancelled) + errors_total,
            errors_total,
            prompt_tokens_total: self.tokens.with_label_values(&[model, "prompt"]).get(),
            completion_tokens_total: self.tokens.with_label_values(&[model, "completion"]).get(),
            in_flight: self.in_flight.with_label_values(&[model]).get().max(0) as u32,
            queued: 0,
            ttft_p50_seconds,
            ttft_p99_seconds,
            tpot_p50_seconds,
            tpot_p99_seconds,
        }
    }
}

/// Measures one request. Dropped before its end, it counts as cancelled by the client.
#[derive(Debug)]
pub struct Measure {
    meter: Meter,
    model: String,
    start: std::time::Instant,
    first: Option<std::time::Instant>,
    /// When the last token came.
    last: Option<std::time::Instant>,
    completion_tokens: u64,
    ended: bool,
}

impl Measure {
    /// Takes one event of the leader rank.
    pub fn event(&mut self, event: &v1::GenerateEvent) {
        let model = [self.model.as_str()];
        let (now, tokens) = (std::time::Instant::now(), event.tokens.len());
        if tokens > 0 && self.first.is_none() {
            self.first = Some(now);
            let ttft = (now - self.start).as_secs_f64();
            let meter = &self.meter;
            meter.ttft.with_label_values(&model).observe(ttft);
            meter.queue.with_label_values(&model).observe(event.queue_ms / 1000.0);
            meter.prefill.with_label_values(&model).observe(event.prefill_ms / 1000.0);
            let (asked, found) = (u64::from(event.prompt_tokens), u64::from(event.cached_tokens));
            meter.prefix_queries.with_label_values(&model).inc_by(asked);
            meter.prefix_hits.with_label_values(&model).inc_by(found);
            self.remember(|recent| &mut recent.ttft, ttft);
        } else if let Some(last) = self.last.filter(|_| tokens > 0) {
            let each = (now - last).as_secs_f64() / tokens as f64;
            let histogram = self.meter.inter_token.with_label_values(&model);
            (0..tokens).for_each(|_| histogram.observe(each));
        }
        if tokens > 0 {
            self.last = Some(now);
        }
        self.completion_tokens += event.tokens.len() as u64;
        if !event.finish_reason.is_empty() {
            if let (Some(first), Some(last)) = (self.first, self.last) {
                let spent = (last - first).as_secs_f64();
                self.meter.decode.with_label_values(&model).observe(spent);
            }
            // One of two words: nothing that a client sends becomes a label.
            let reason = if event.finish_reason == "stop" { "stop" } else { "length" };
            self.meter.success.with_label_values(&[&self.model, reason]).inc();
            let count = |kind, tokens: u32| {
                let labels = [self.model.as_str(), kind];
                self.meter.tokens.with_label_values(&labels).inc_by(u64::from(tokens));
            };
            count("prompt", event.prompt_tokens);
            count("completion", event.completion_tokens);
        }
    }

    /// Ends the measurement.
    pub fn end(&mut self, ending: Ending) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let model = [self.model.as_str()];
        self.meter.in_flight.with_label_values(&model).dec();
        self.meter.requests.with_label_values(&[&self.model, ending.label()]).inc();
        self.meter.duration.with_label_values(&model).observe(self.start.elapsed().as_secs_f64());
        if let Some(first) = self.first
            && self.completion_tokens > 1
        {
            let tpot = first.elapsed().as_secs_f64() / (self.completion_tokens - 1) as f64;
            self.meter.tpot.with_label_values(&model).observe(tpot);
            self.remember(|recent| &mut recent.tpot, tpot);
        }
    }

    fn remember(&self, list: impl Fn(&mut Recent) -> &mut VecDeque<f64>, value: f64) {
        let mut recent = self.meter.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let values = list(recent.entry(self.model.clone()).or_default());
        if values.len() == WINDOW {
            values.pop_front();
        }
        values.push_back(value);
    }
}

impl Drop for Measure {
    fn drop(&mut self) {
        self.end(Ending::Cancelled);
    }
}
