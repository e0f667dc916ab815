//! Measures the store at an address: `cargo run --release --example bench -- embedded:PATH`.

use drumline_store::bench::{BenchOptions, run};
use drumline_store::{OpenOptions, open};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address =
        std::env::args().nth(1).ok_or("which store? embedded:PATH or etcd://HOST:PORT")?;
    let started = std::time::Instant::now();
    let store = open(&address, &OpenOptions::default()).await?;
    eprintln!("opened in {:?}", started.elapsed());
    let report = run(&store, &BenchOptions::default()).await?;
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}
