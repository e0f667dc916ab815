//! Builds every stand-in for NVIDIA's libraries into a folder, for `tests/gpu/run --emulated`.
//! Usage: `cargo run -p drumline-fakes --example emulated FOLDER`; prints the folder to name there.

use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(parent) = std::env::args_os().nth(1) else {
        eprintln!("usage: emulated FOLDER");
        return ExitCode::from(2);
    };
    match drumline_fakes::emulated::build_all(std::path::Path::new(&parent)) {
        Ok(folder) => {
            println!("{}", folder.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
