//! Runs presets and prints the report: `cargo run --release -p drumline-sim --example preset --
//! small drumline,fifo,mine.toml 1`.

use std::sync::atomic::AtomicBool;

use drumline_sim::world::Nobody;
use drumline_sim::{Limits, Policy, Preset, Report, Scenario, Workload, report, run};

fn main() -> Result<(), String> {
    let mut words = std::env::args().skip(1);
    let preset = words.next().unwrap_or_else(|| "small".to_owned());
    let policies = words.next().unwrap_or_else(|| "drumline".to_owned());
    let seed = words.next().map_or(Ok(1), |seed| seed.parse()).map_err(|_| "seed")?;
    let preset = Preset::named(&preset).ok_or("no such preset")?;
    let workload = Workload::read(preset.name, preset.text).map_err(|fault| fault.to_string())?;
    let scenario = Scenario::of(&workload, seed);
    let stop = AtomicBool::new(false);
    let mut last = 0;
    let mut reports = Vec::new();
    for name in policies.split(',') {
        let policy = match std::fs::read_to_string(name) {
            Ok(text) => Policy::read(name, &text).map_err(|fault| fault.to_string())?,
            Err(_) => Policy::named(name, seed).ok_or("no such policy")?,
        };
        let mut progress = |status: &drumline_sim::Status| {
            if status.now_ms / 3_600_000 != last {
                last = status.now_ms / 3_600_000;
                eprintln!("{name} {last} h: {status:?}");
            }
        };
        let mut limits = Limits { stop: &stop, progress: &mut progress };
        let found = run(&scenario, &policy, &mut Nobody, &mut limits);
        let found = found.map_err(|error| error.to_string())?;
        eprintln!("{name}: {:.2} s, {} looks", found.seconds, found.cycles);
        reports.push(found);
    }
    let report = Report::new(&scenario, reports);
    println!("{}", report::table(&report));
    if let Some(file) = words.next() {
        std::fs::write(file, report::html(&report)).map_err(|error| error.to_string())?;
    }
    Ok(())
}
