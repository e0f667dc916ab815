//! The `drumline` binary.

fn main() -> std::process::ExitCode {
    drumline_cli::main()
}
