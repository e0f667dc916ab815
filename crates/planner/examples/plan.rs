//! Runs the planner's commands without the `drumline` binary: `plan train --model gpt3-175b ...`.
//!
//! Needs the feature `clap`; the `drumline` binary wires the same arguments.

#[cfg(feature = "clap")]
fn main() {
    use clap::{Parser, Subcommand};
    use drumline_planner::command::{
        self, BudgetArgs, Inputs, ServeArgs, TextFile, TrainArgs, ValidateArgs,
    };

    #[derive(Parser)]
    struct Cli {
        #[command(subcommand)]
        command: Command,
        /// table or json.
        #[arg(long, global = true, default_value = "table")]
        output: String,
    }

    #[derive(Subcommand)]
    enum Command {
        Train(Box<TrainArgs>),
        Serve(Box<ServeArgs>),
        Budget(Box<BudgetArgs>),
        Validate(Box<ValidateArgs>),
    }

    let read = |name: &str| {
        std::fs::read_to_string(name).ok().map(|text| TextFile { name: name.to_owned(), text })
    };
    let cli = Cli::parse();
    let result = match &cli.command {
        Command::Train(args) => {
            command::train(args, &Inputs { model: read(&args.model), ..Inputs::default() })
        }
        Command::Serve(args) => {
            command::serve(args, &Inputs { model: read(&args.model), ..Inputs::default() })
        }
        Command::Budget(args) => {
            let runs = args.fit.as_deref().and_then(read);
            command::budget(args, &Inputs { runs, ..Inputs::default() })
        }
        Command::Validate(args) => {
            command::validate(args, &Inputs { runs: read(&args.file), ..Inputs::default() })
        }
    };
    match result {
        Ok(output) => {
            for warning in &output.warnings {
                eprintln!("note: {warning}");
            }
            match (cli.output.as_str(), &output.manifest) {
                ("json", _) => println!("{:#}", output.json),
                (_, Some(manifest)) => print!("{manifest}"),
                _ => print!("{}", output.table),
            }
        }
        Err(error) => {
            eprintln!("error: {error}");
            std::process::exit(1);
        }
    }
}

#[cfg(not(feature = "clap"))]
fn main() {
    eprintln!("build with --features clap");
}
