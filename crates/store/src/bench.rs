//! Measures a store: durable transactions per second, and how soon a watch tells of a change.
//!
//! Time is the caller's [`std::time::Instant`]; every figure comes from answered calls.

use std::sync::Arc;
use std::time::{Duration, Instant};

use drumline_ports::store::{Op, Store, StoreError, Txn};
use futures::StreamExt;
use futures::future::try_join_all;
use serde::Serialize;

/// How much to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BenchOptions {
    /// Put before every key of the benchmark; deleted at the end.
    pub prefix: String,
    /// Bytes of each value. Default 512: about a small job record.
    pub value_bytes: usize,
    /// How long each throughput is measured. Default 3 s.
    pub time_each: Duration,
    /// Writers of the concurrent figure. Default 32.
    pub writers: usize,
    /// Changes whose way to a watch is timed. Default 200.
    pub watch_samples: usize,
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self {
            prefix: "bench/".to_owned(),
            value_bytes: 512,
            time_each: Duration::from_secs(3),
            writers: 32,
            watch_samples: 200,
        }
    }
}

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchReport {
    /// One writer, one key per transaction.
    pub sequential: Throughput,
    /// Many writers at once.
    pub concurrent: Throughput,
    /// From asking for a put to its event.
    pub watch: Latency,
}

/// Transactions answered in a time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Throughput {
    /// Writers at once.
    pub writers: usize,
    /// Transactions answered.
    pub transactions: u64,
    /// The time that took, in seconds.
    pub seconds: f64,
    /// Transactions per second.
    pub per_second: f64,
    /// How long the single transactions took.
    pub latency: Latency,
}

/// The spread of some durations, in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Latency {
    /// Half took no longer.
    pub p50_ms: f64,
    /// 99 of 100 took no longer.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

/// Measures everything, and deletes what it wrote.
///
/// # Errors
/// The store's first error; a figure that leaves out failures would lie.
pub async fn run(
    store: &Arc<dyn Store>,
    options: &BenchOptions,
) -> Result<BenchReport, StoreError> {
    let measured = async {
        Ok(BenchReport {
            sequential: throughput(store, options, 1).await?,
            concurrent: throughput(store, options, options.writers.max(1)).await?,
            watch: watch_latency(store, options).await?,
        })
    };
    let report = measured.await;
    store.txn(Txn::new().then(Op::delete_prefix(&options.prefix))).await?;
    report
}

/// Lets `writers` put one key each, over and over, and counts the answers.
///
/// # Errors
/// The store's first error.
pub async fn throughput(
    store: &Arc<dyn Store>,
    options: &BenchOptions,
    writers: usize,
) -> Result<Throughput, StoreError> {
    let started = Instant::now();
    let end = started + options.time_each;
    let value = vec![b'x'; options.value_bytes];
    let writing = (0..writers).map(|writer| {
        let (store, value) = (Arc::clone(store), value.clone());
        let key = format!("{}{writer}", options.prefix);
        async move {
            let mut took = Vec::new();
            loop {
                let asked = Instant::now();
                if asked >= end {
                    return Ok(took);
                }
                let txn = Txn::new().then(Op::put(key.clone(), value.clone()));
                store.txn(txn).await?;
                took.push(asked.elapsed());
            }
        }
    });
    let took: Vec<Duration> = try_join_all(writing).await?.into_iter().flatten().collect();
    let seconds = started.elapsed().as_secs_f64();
    Ok(Throughput {
        writers,
        transactions: took.len() as u64,
        seconds,
        per_second: took.len() as f64 / seconds,
        latency: Latency::of(took),
    })
}

/// Times the way of single changes from the writer to a watch.
///
/// # Errors
/// The store's first error, or [`StoreError::Unavailable`] when an event does not come within 10 s.
pub async fn watch_latency(
    store: &Arc<dyn Store>,
    options: &BenchOptions,
) -> Result<Latency, StoreError> {
    let key = format!("{}watched", options.prefix);
    let from = store.revision().await?.next();
    let mut watch = store.watch(&key, from).await?;
    let mut took = Vec::with_capacity(options.watch_samples);
    for sample in 0..options.watch_samples.max(1) {
        let asked = Instant::now();
        let txn = Txn::new().then(Op::put(key.clone(), sample.to_string()));
        let written = store.txn(txn).await?.revision;
        loop {
            let next = tokio::time::timeout(Duration::from_secs(10), watch.next()).await;
            let missing = || StoreError::unavailable("watch latency", "no event within 10 s");
            let batch = next.map_err(|_| missing())?.ok_or_else(missing)??;
            if batch.through >= written {
                break;
            }
        }
        took.push(asked.elapsed());
    }
    Ok(Latency::of(took))
}

impl Latency {
    fn of(mut took: Vec<Duration>) -> Self {
        took.sort_unstable();
        // The nearest rank: the least value that so many do not exceed.
        let at = |permille: usize| {
            let rank = (took.len() * permille).div_ceil(1000).max(1);
            took.get(rank - 1).map_or(0.0, |d| d.as_secs_f64() * 1e3)
        };
        Self { p50_ms: at(500), p99_ms: at(990), max_ms: at(1000) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let took = (1..=200).rev().map(Duration::from_millis).collect();
        let latency = Latency::of(took);
        assert_eq!((latency.p50_ms, latency.p99_ms), (100.0, 198.0));
        assert_eq!(latency.max_ms, 200.0);
        let one = Latency::of(vec![Duration::from_millis(7)]);
        assert_eq!((one.p50_ms, one.max_ms), (7.0, 7.0));
    }

    #[tokio::test]
    async fn a_benchmark_counts_what_the_store_holds_and_cleans_up() {
        let fake = drumline_ports::store::fake::FakeStore::new();
        let store: Arc<dyn Store> = Arc::new(fake);
        let options = BenchOptions {
            time_each: Duration::from_millis(30),
            writers: 4,
            watch_samples: 5,
            ..BenchOptions::default()
        };
        let before = store.revision().await.expect("revision").0;
        let report = run(&store, &options).await.expect("measures");
        let after = store.revision().await.expect("revision").0;
        let counted = report.sequential.transactions + report.concurrent.transactions;
        // The watched puts and the final deletion are the rest.
        assert_eq!(after - before, counted + 5 + 1);
        assert_eq!(report.concurrent.writers, 4);
        assert_eq!(store.range("bench/").await.expect("range").items, []);
    }
}
