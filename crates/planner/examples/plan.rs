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
        /// Catalogues that extend the built-in one.
        #[arg(long, global = true, value_name = "FILE")]
        catalogue: Vec<String>,
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
    let base = Inputs {
        catalogues: cli.catalogue.iter().filter_map(|name| read(name)).collect(),
        ..Inputs::default()
    };
    let result = match &cli.command {
        Command::Train(args) => command::train(args, &Inputs { model: read(&args.model), ..base }),
        Command::Serve(args) => command::serve(args, &Inputs { model: read(&args.model), ..base }),
        Command::Budget(args) => {
            let runs = args.fit.as_deref().and_then(read);
            command::budget(args, &Inputs { runs, ..base })
        }
        Command::Validate(args) => {
            command::validate(args, &Inputs { runs: read(&args.file), ..base })
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
