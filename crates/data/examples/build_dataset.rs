//! Builds a dataset and prints how long each part took: `build_dataset OUT [TEXT | Cargo.lock]`.

use std::path::Path;
use std::time::Instant;

use drumline_data::corpus::CargoSource;
use drumline_data::{BuildOptions, Corpus, Dataset, build};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let out = arguments.next().ok_or("name a folder for the dataset")?;
    let text = arguments.next().unwrap_or_else(|| "Cargo.lock".to_owned());
    let start = Instant::now();
    let corpus = if text.ends_with("Cargo.lock") {
        Corpus::from_cargo(&CargoSource::from_environment(Path::new(&text), 16 << 20)?)?
    } else {
        Corpus::from_path(Path::new(&text), 1 << 30)?
    };
    println!("{:?}\nlisted after {:.2?}", corpus.summary(), start.elapsed());
    let mut stage = None;
    let manifest = build(&corpus, Path::new(&out), &BuildOptions::default(), &mut |p| {
        if stage.replace(p.stage) != Some(p.stage) {
            println!("{:?} after {:.2?}", p.stage, start.elapsed());
        }
    })?;
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{} train and {} held-out tokens, vocabulary {}, {:.2} s, {:.1} MB/s, fingerprint {}",
        manifest.train.tokens,
        manifest.validation.tokens,
        manifest.tokenizer.vocab,
        seconds,
        manifest.source.bytes as f64 / 1e6 / seconds,
        manifest.fingerprint,
    );
    let start = Instant::now();
    Dataset::open(Path::new(&out))?;
    println!("opened and checked in {:.2?}", start.elapsed());
    Ok(())
}
