//! Prints what collectives cost between processes of this host: `bench [RANKS] [tcp] [streams=N] [json]`.

use std::io::{BufReader, Write, stdin, stdout};
use std::process::{Command, ExitCode};

use drumline_collective::bench::{self, Op, Options};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| arguments.iter().any(|a| a == word);
    let result = if has("worker") {
        bench::worker(&mut BufReader::new(stdin()), &mut stdout())
    } else {
        let ranks = arguments.iter().find_map(|a| a.parse().ok()).unwrap_or(2);
        let mut options = Options::default();
        if has("all_reduce") {
            options.ops = vec![Op::AllReduce];
        }
        if let Some(streams) = arguments.iter().find_map(|a| a.strip_prefix("streams=")) {
            options.streams = streams.parse().unwrap_or(options.streams);
        }
        if has("quick") {
            options.rounds = 3;
            options.round_ms = 15;
        }
        let command = |_rank: usize| {
            let mut command = Command::new(std::env::current_exe().unwrap_or_default());
            command.arg("worker");
            command
        };
        bench::run(ranks, !has("tcp"), &options, command).map(|measurements| {
            let mut out = stdout().lock();
            if has("json") {
                let _ = serde_json::to_writer(&mut out, &measurements);
                let _ = writeln!(out);
                return;
            }
            for m in measurements {
                let _ = writeln!(
                    out,
                    "{:<15} {:>9} B {:>10.1} us (best {:>9.1}) {:>7.2} GiB/s, bus {:>7.2}",
                    m.op.name(),
                    m.bytes,
                    m.latency_us,
                    m.latency_best_us,
                    m.algorithm_gibps,
                    m.bus_gibps
                );
            }
        })
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
