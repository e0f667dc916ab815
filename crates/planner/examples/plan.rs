//! Runs the validation on a table of published runs: `plan FILE [CATALOGUE.toml]`.

use drumline_planner::{Catalogue, published};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let text = std::fs::read_to_string(&args[1]).expect("table");
    let mut catalogue = Catalogue::builtin();
    if let Some(file) = args.get(2).filter(|a| !a.starts_with("--")) {
        let text = std::fs::read_to_string(file).expect("catalogue");
        catalogue = catalogue.extend(file, &text).expect("catalogue");
    }
    let table = match published::read(&args[1], &text, &catalogue) {
        Ok(table) => table,
        Err(error) => {
            println!("{error}");
            return;
        }
    };
    for row in &table.rows {
        let (split, s) = row.predict().expect("row");
        let value = row.predict_value().expect("row");
        println!(
            "{:34.34} {:>6} {:<22} pub {:>8.2} pred {:>8.2} {:>+6.1}%  {split} m{} | step {:.3} mm {:.3} at {:.3} el {:.3} tp {:.3} cp {:.3} rc {:.3} loss {:.3} bub {:.3} snd {:.3} dp {:.3} opt {:.3} str {:.3}",
            row.source,
            row.split.gpus(),
            row.measured_name,
            row.value,
            value,
            100.0 * (value / row.value - 1.0),
            s.micro_batches,
            s.step,
            s.layers.matmul,
            s.layers.attention,
            s.layers.elementwise,
            s.layers.tensor,
            s.layers.context,
            s.recompute,
            s.embedding_and_loss,
            s.bubble,
            s.pipeline_sends,
            s.data,
            s.optimizer,
            s.straggler
        );
    }
    if args.iter().any(|a| a == "--fit") {
        let fitted = drumline_planner::calibrate::fit(&table.rows, &catalogue).expect("fit");
        println!("{fitted:#?}");
        let loo = drumline_planner::calibrate::leave_one_out(&table.rows, &catalogue).expect("loo");
        let sources = drumline_planner::calibrate::leave_one_source_out(&table.rows, &catalogue)
            .expect("loso");
        for (row, (a, b)) in table.rows.iter().zip(loo.iter().zip(&sources)) {
            println!("{:40.40} {:>6} {:>+7.1}% {:>+7.1}%", row.source, row.split.gpus(), a, b);
        }
        let mean = |e: &[f64]| e.iter().map(|x| x.abs()).sum::<f64>() / e.len() as f64;
        println!(
            "leave one row out {:.2}%, leave one source out {:.2}%",
            mean(&loo),
            mean(&sources)
        );
    }
    let report = table.validate().expect("rows");
    println!(
        "mean {:.2}% max {:.2}%",
        report.mean_absolute_error_percent, report.max_absolute_error_percent
    );
}
