//! Measures writing, verifying and reading a checkpoint: `checkpoint_speed FOLDER [MILLIONS [RANKS]]`.

use std::path::Path;
use std::time::{Duration, Instant};

use drumline_checkpoint::{RunState, Tensor, Writer, WriterOptions, latest};
use drumline_mesh::{ShardSpec, split};
use drumline_spec::{Family, ModelConfig, Parallelism};

const LIMIT: Duration = Duration::from_secs(300);
const COLUMNS: usize = 1024;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("name a folder")?;
    let millions: usize = arguments.next().map_or(Ok(30), |n| n.parse())?;
    let ranks: u32 = arguments.next().map_or(Ok(4), |n| n.parse())?;
    let run = Path::new(&folder).join("checkpoint-speed");
    let rows = millions * 1_000_000 / COLUMNS / 16;
    let with = |rank| WriterOptions {
        run: run.clone(),
        rank,
        writers: (0..ranks).collect(),
        attempt: 1,
        keep: 2,
        model: ModelConfig {
            family: Family::Llama,
            layers: 1,
            hidden: 64,
            ffn: 64,
            heads: 1,
            kv_heads: 1,
            vocab: 64,
            context: 64,
            norm_epsilon: 1e-5,
            rope_theta: 10_000.0,
            tie_embeddings: false,
        },
        parallelism: Parallelism { tensor: ranks, ..Parallelism::SINGLE },
        state: RunState::default(),
        tokenizer: None,
        parts_timeout: LIMIT,
    };
    let parts = |rank: u32, of: u32, by_columns: bool| {
        (0..16).map(move |tensor| {
            let (whole, index) = (of as usize, rank as usize);
            let cut = if by_columns { COLUMNS } else { rows };
            let span = split(cut, whole, index);
            let (offset, shape) = if by_columns {
                (vec![0, span.start], vec![rows, span.len()])
            } else {
                (vec![span.start, 0], vec![span.len(), COLUMNS])
            };
            ShardSpec {
                name: format!("tensor.{tensor}"),
                global_shape: vec![rows, COLUMNS],
                offset,
                shape,
            }
        })
    };
    let writers =
        (0..ranks).map(|rank| Writer::start(with(rank))).collect::<Result<Vec<_>, _>>()?;
    let bytes = (16 * rows * COLUMNS * 4) as f64;
    for step in 1..=4 {
        let snapshots: Vec<Vec<Tensor>> = (0..ranks)
            .map(|rank| {
                parts(rank, ranks, false)
                    .map(|spec| Tensor { values: vec![step as f32; spec.elements()], spec })
                    .collect()
            })
            .collect();
        let start = Instant::now();
        for (writer, snapshot) in writers.iter().zip(snapshots) {
            writer.submit(step, snapshot, LIMIT)?;
        }
        let submitted = start.elapsed();
        let written = loop {
            if let Some(outcome) = writers[0].outcomes().pop() {
                break outcome.result?;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        println!(
            "step {step}: {:.0} MB, submit {submitted:.1?}, own file {:.1?}, complete {:.1?}, {:.0} MB/s",
            bytes / 1e6,
            written.write,
            written.total,
            bytes / 1e6 / start.elapsed().as_secs_f64()
        );
    }
    let start = Instant::now();
    let checkpoint = latest(&run)?.checkpoint.ok_or("no checkpoint")?;
    let seconds = start.elapsed().as_secs_f64();
    println!("opened and verified: {:.0} MB/s", bytes / 1e6 / seconds);
    for (how, by_columns) in [("rows", false), ("columns", true)] {
        let start = Instant::now();
        let mut read = 0;
        for rank in 0..2 {
            for spec in parts(rank, 2, by_columns) {
                let mut out = vec![0.0; spec.elements()];
                checkpoint.reader().read(&spec, &mut out)?;
                read += out.len() * 4;
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        println!("read in two parts by {how}: {:.0} MB/s", read as f64 / 1e6 / seconds);
    }
    std::fs::remove_dir_all(&run)?;
    Ok(())
}
