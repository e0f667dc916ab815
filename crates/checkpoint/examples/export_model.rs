//! Opens a model (checkpoint, run, or Hugging Face folder) and exports it: `export_model FROM TO`.

use std::path::Path;

use drumline_checkpoint::{hf, open_model};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(from), Some(to)) = (arguments.next(), arguments.next()) else {
        return Err("usage: export_model FROM TO".into());
    };
    let source = open_model(Path::new(&from))?;
    hf::export(&source, Path::new(&to))?;
    println!("{:?}", source.model);
    Ok(())
}
