//! `drumline bench store`: the state store, embedded or etcd.

use std::time::Duration;

use clap::Args;
use drumline_store::OpenOptions;
use drumline_store::bench::BenchOptions;

use super::{Figure, Measured};
use crate::failure::Failure;

/// Arguments of `bench store`.
#[derive(Debug, Args)]
pub struct StoreArgs {
    /// The store: embedded:PATH or etcd://HOST:PORT; without it, a new embedded one.
    #[arg(long)]
    pub store: Option<String>,
    /// How long each throughput is measured.
    #[arg(long, default_value = "3s", value_parser = crate::args::duration)]
    pub time: Duration,
    /// Writers of the concurrent figure.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub writers: u16,
    /// Bytes of each value.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub value_bytes: u32,
}

pub(super) async fn run(args: &StoreArgs) -> Result<Measured, Failure> {
    // Beside the working folder, not in a memory file system, so that durable means durable.
    let folder = tempfile::Builder::new().prefix(".drumline-bench-").tempdir_in(".")?;
    let address = match &args.store {
        Some(address) => address.clone(),
        None => format!("embedded:{}", folder.path().join("store.redb").display()),
    };
    let store = drumline_store::open(&address, &OpenOptions::default())
        .await
        .map_err(|error| Failure::user(error.to_string()))?;
    let options = BenchOptions {
        time_each: args.time,
        writers: usize::from(args.writers),
        value_bytes: args.value_bytes as usize,
        prefix: format!("bench/{}/", std::process::id()),
        ..BenchOptions::default()
    };
    let report = drumline_store::bench::run(&store, &options)
        .await
        .map_err(|error| Failure::failed(error.to_string()))?;
    let kind = if address.starts_with("etcd") { "etcd" } else { "embedded" };
    let setting = format!(
        "{kind}, values of {} bytes, {} s each; a transaction counts when it is durable",
        options.value_bytes,
        options.time_each.as_secs_f64()
    );
    let figures = vec![
        Figure::new("transactions, one writer", report.sequential.per_second, "1/s")
            .aim("500 on the embedded store"),
        Figure::new(
            format!("transactions, {} writers", report.concurrent.writers),
            report.concurrent.per_second,
            "1/s",
        ),
        Figure::new("watch, half within", report.watch.p50_ms, "ms"),
        Figure::new("watch, 99 of 100 within", report.watch.p99_ms, "ms"),
    ];
    Ok(("store", setting, figures))
}
