//! `plan train`: the split, what it needs, how long it takes and what it costs.

mod render;

use serde::Serialize;

use super::{Inputs, Output, TrainArgs, catalogue, json, machines, model, notes};
use crate::catalogue::Catalogue;
use crate::error::PlanError;
use crate::memory::{StageMemory, stage_memory};
use crate::model::Model;
use crate::money::{Bill, Prices};
use crate::plot::{Series, svg};
use crate::quantity::{parse, show, sweep};
use crate::reliability::{Effective, Reliability};
use crate::search::{
    Found, Pins, Request, Sensitivity, best, cheapest, counts, days, fewest, sensitivity,
};
use crate::split::{Batch, Machines, Recompute, Stack};

/// Another way to the same model: other machines or another number of them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Alternative {
    /// The GPU type.
    pub gpu: String,
    /// GPUs.
    pub gpus: u32,
    /// The split.
    pub split: String,
    /// Days without failures.
    pub days: f64,
    /// Model TFLOP/s per GPU.
    pub model_tflops_per_gpu: f64,
    /// Dollars at the catalogue's prices.
    pub cost: f64,
}

/// A run at a given rate, by the convention of 6 operations per parameter and token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct AtAchieved {
    /// TFLOP/s per GPU, as given.
    pub tflops_per_gpu: f64,
    /// `6 N D` operations.
    pub flops: f64,
    /// The same in petaFLOP/s-days.
    pub pf_days: f64,
    /// Days.
    pub days: f64,
}

/// The data of `plan train`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainReport {
    /// The model.
    pub model: String,
    /// Its parameters.
    pub parameters: f64,
    /// The parameters that one token uses.
    pub active_parameters: f64,
    /// The GPU type.
    pub gpu: String,
    /// The network.
    pub network: String,
    /// GPUs.
    pub gpus: u32,
    /// Tokens trained on.
    pub tokens: f64,
    /// Tokens in a sequence.
    pub sequence: u32,
    /// What the search found; none where only the given rate was reckoned with.
    pub found: Option<Found>,
    /// Memory by stage, of the best split.
    pub stages: Vec<StageMemory>,
    /// At the rate given with `--achieved-tflops`.
    pub at_achieved: Option<AtAchieved>,
    /// Days without failures.
    pub days: f64,
    /// Days with failures.
    pub days_with_failures: f64,
    /// GPU-hours lost to failures and checkpoints.
    pub lost_gpu_hours: f64,
    /// Reliability.
    pub effective: Effective,
    /// The bill, failures included.
    pub bill: Bill,
    /// What moves the step.
    pub sensitivity: Vec<Sensitivity>,
    /// Other machines for the same run.
    pub alternatives: Vec<Alternative>,
    /// The sweep's points: GPUs, days, dollars; without those that do not fit.
    pub sweep: Vec<Alternative>,
}

struct Job<'a> {
    args: &'a TrainArgs,
    model: Model,
    machines: Machines,
    batch: Batch,
    pins: Pins,
    tokens: f64,
}

impl Job<'_> {
    fn request(&self) -> Request<'_> {
        Request {
            model: &self.model,
            machines: &self.machines,
            batch: self.batch,
            pins: self.pins,
            memory_fraction: self.args.memory_fraction,
        }
    }
}

fn positive(field: &'static str, value: Option<f64>) -> Result<Option<f64>, PlanError> {
    match value {
        Some(x) if !x.is_finite() || x <= 0.0 => {
            Err(PlanError::invalid(field, format!("{x} is not a positive number")))
        }
        other => Ok(other),
    }
}

fn prepare<'a>(
    args: &'a TrainArgs,
    inputs: &Inputs,
    catalogue: &Catalogue,
) -> Result<Job<'a>, PlanError> {
    let (model, from_manifest) = model(&args.model, inputs, catalogue)?;
    let machines = machines(&args.gpu, args.network.as_deref(), inputs, catalogue)?;
    let tokens = match &args.tokens {
        Some(text) => parse("tokens", text)?,
        None => 20.0 * model.parameters(),
    };
    let sequence = args
        .sequence
        .or(from_manifest.as_ref().map(|m| m.sequence))
        .unwrap_or_else(|| model.context.min(8192));
    if sequence == 0 || sequence > 1 << 26 {
        return Err(PlanError::invalid("sequence", format!("{sequence} is not from 1 to 2^26")));
    }
    let emits = match args.emit.as_deref() {
        None => false,
        Some("manifest") => true,
        Some(other) => return Err(PlanError::unknown("emit", other, ["manifest"])),
    };
    let stack = super::stack(args.stack.as_deref(), inputs)?;
    let asked = from_manifest.as_ref().map(|m| m.pins).unwrap_or_default();
    let recompute = args.recompute.as_deref().map(Recompute::parse).transpose()?;
    let pins = Pins {
        tensor: args.tensor,
        pipeline: args.pipeline,
        virtual_stages: args.virtual_stages,
        context: args.context,
        expert: args.expert,
        sequence_parallel: args.sequence_parallel.or(asked.sequence_parallel),
        zero: args.zero.or(asked.zero),
        recompute: recompute.or(asked.recompute),
        micro_batch: args.micro_batch,
        // Our own engine does what a manifest can say.
        manifest_only: emits || stack == Stack::Native,
    };
    let batch = Batch {
        sequence,
        global: args.global_batch.or(from_manifest.as_ref().map(|m| m.global_batch)).unwrap_or(0),
        dtype: super::dtype(args.dtype.as_deref(), &machines.gpu)?,
        stack,
    };
    positive("deadline_days", args.deadline_days)?;
    positive("achieved_tflops", args.achieved_tflops)?;
    positive("price_per_hour", args.price_per_hour)?;
    Ok(Job { args, model, machines, batch, pins, tokens })
}

/// Plans a training run.
///
/// # Errors
/// Any [`PlanError`], with what is short, by how much and the nearest that works.
pub fn train(args: &TrainArgs, inputs: &Inputs) -> Result<Output, PlanError> {
    let catalogue = catalogue(inputs)?;
    let job = prepare(args, inputs, &catalogue)?;
    let mut warnings = notes(&job.model, &job.machines.gpu);
    let (gpus, found) = choose(&job, &mut warnings)?;
    let at_achieved = args.achieved_tflops.map(|tflops| {
        let flops = 6.0 * job.model.active_parameters() * job.tokens;
        AtAchieved {
            tflops_per_gpu: tflops,
            flops,
            pf_days: flops / 8.64e19,
            days: flops / (f64::from(gpus) * tflops * 1e12) / 86_400.0,
        }
    });
    let searched = found.as_ref().map(|f| days(&f.best, job.batch.sequence, job.tokens));
    let took = at_achieved.map(|a| a.days).or(searched).unwrap_or(f64::NAN);
    let report = finish(&job, gpus, found, at_achieved, took, &catalogue)?;
    let manifest = match (&report.found, args.emit.is_some()) {
        (Some(found), true) => Some(crate::manifest::emit(
            &job.model,
            &found.best,
            job.batch.sequence,
            job.tokens,
            &job.machines.gpu.name,
        )?),
        _ => None,
    };
    let plot = (!report.sweep.is_empty()).then(|| {
        let series = |name: &str, value: fn(&Alternative) -> f64| Series {
            name: name.to_owned(),
            points: report.sweep.iter().map(|a| (f64::from(a.gpus), value(a))).collect(),
        };
        svg(
            &format!(
                "{} on {}, {} tokens",
                job.model.name,
                job.machines.gpu.name,
                show(job.tokens)
            ),
            "GPUs",
            &[
                series("days", |a| a.days),
                series("dollars", |a| a.cost),
                series("model TFLOP/s per GPU", |a| a.model_tflops_per_gpu),
            ],
        )
    });
    Ok(Output {
        table: render::render(&job, &report),
        json: json(&report)?,
        manifest,
        plot,
        warnings,
    })
}

fn choose(job: &Job<'_>, warnings: &mut Vec<String>) -> Result<(u32, Option<Found>), PlanError> {
    let args = job.args;
    let request = job.request();
    if let Some(gpus) = args.gpus {
        if args.cheapest {
            return Err(PlanError::invalid(
                "cheapest",
                format!("searches the number of GPUs, and {gpus} are given; leave one of them out"),
            ));
        }
        let found = match best(&request, gpus) {
            Ok(found) => {
                late(job, gpus, &found)?;
                Some(found)
            }
            // A given rate answers days and cost even where our own search finds no split.
            Err(error) if args.achieved_tflops.is_some() => {
                warnings.push(format!("the search found no split: {error}"));
                None
            }
            Err(error) => return Err(error),
        };
        return Ok((gpus, found));
    }
    if args.achieved_tflops.is_some() {
        return Err(PlanError::invalid("gpus", "a given rate needs a number of GPUs"));
    }
    let sized = match (args.deadline_days, args.cheapest) {
        (deadline, true) => cheapest(&request, job.tokens, deadline, args.max_gpus)?,
        (Some(deadline), false) => fewest(&request, job.tokens, deadline, args.max_gpus)?,
        (None, false) => {
            // A sweep alone asks for a curve; the plan beside it is of its first point that works.
            if let Some(text) = &args.sweep {
                let (_, points) = sweep(text)?;
                let works = |n: u32| best(&request, n).ok().map(|found| (n, Some(found)));
                return match points.iter().find_map(|n| works(*n)) {
                    Some(found) => Ok(found),
                    None => {
                        Err(best(&request, points.last().copied().unwrap_or(1)).err().unwrap_or(
                            PlanError::invalid("sweep", format!("no point of {text} fits")),
                        ))
                    }
                };
            }
            return Err(PlanError::invalid(
                "gpus",
                "give a number of GPUs, a deadline in days, or ask for the cheapest",
            ));
        }
    };
    Ok((sized.gpus, Some(sized.found)))
}

/// Refuses a given number of GPUs that misses the deadline, with the fewest that meet it.
fn late(job: &Job<'_>, gpus: u32, found: &Found) -> Result<(), PlanError> {
    let took = days(&found.best, job.batch.sequence, job.tokens);
    let Some(deadline) = job.args.deadline_days.filter(|d| took > *d) else { return Ok(()) };
    if job.args.achieved_tflops.is_some() {
        return Ok(());
    }
    let nearest = match fewest(&job.request(), job.tokens, deadline, job.args.max_gpus) {
        Ok(sized) => format!("nearest that works: {} GPUs", sized.gpus),
        Err(error) => error.to_string(),
    };
    Err(PlanError::Deadline {
        model: job.model.name.clone(),
        gpu: job.machines.gpu.name.clone(),
        deadline_days: deadline,
        max_gpus: gpus,
        best_days: took,
        best_gpus: gpus,
        short_days: took - deadline,
        nearest,
    })
}

fn finish(
    job: &Job<'_>,
    gpus: u32,
    found: Option<Found>,
    at_achieved: Option<AtAchieved>,
    took: f64,
    catalogue: &Catalogue,
) -> Result<TrainReport, PlanError> {
    let args = job.args;
    let nodes = (f64::from(gpus) / f64::from(job.machines.network.gpus_per_node.max(1))).ceil();
    let reliability = Reliability {
        failures_per_node_day: args.failures_per_node_day,
        checkpoint_s: args
            .checkpoint_seconds
            .unwrap_or_else(|| Reliability::checkpoint_seconds(&job.model, nodes, 2.0)),
        restart_s: args.restart_seconds,
        interval_s: args.checkpoint_interval,
    };
    let effective = reliability.effective(nodes, took)?;
    let with_failures = took / effective.ratio;
    let price = args.price_per_hour.unwrap_or(job.machines.gpu.price_per_hour);
    let bill = Prices::of(price, job.machines.gpu.power_w).bill(
        f64::from(gpus),
        with_failures * 24.0,
        job.tokens,
    );
    let mut stages = Vec::new();
    let mut moved = Vec::new();
    if let Some(found) = &found {
        let batch = Batch { global: found.best.global_batch, ..job.batch };
        let split = found.best.split;
        let m = found.best.time.micro_batches as u32;
        stages = (0..split.pipeline)
            .map(|stage| {
                stage_memory(&job.model, &split, &batch, m, job.machines.framework_bytes(), stage)
            })
            .collect();
        moved = sensitivity(&job.model, &found.best, &batch, &job.machines)?;
    }
    let alternatives =
        if at_achieved.is_some() { alternatives(job, gpus, took, catalogue) } else { Vec::new() };
    let sweep = match &args.sweep {
        None => Vec::new(),
        Some(text) => {
            let (name, points) = sweep(text)?;
            if name != "gpus" {
                return Err(PlanError::unknown("sweep", &name, ["gpus"]));
            }
            let list: Vec<Alternative> = points
                .into_iter()
                .filter_map(|n| best(&job.request(), n).ok().map(|found| (n, found)))
                .map(|(n, found)| alternative(job, &job.machines, n, &found, price))
                .collect();
            if list.is_empty() {
                return Err(PlanError::invalid("sweep", format!("no point of {text} fits")));
            }
            list
        }
    };
    Ok(TrainReport {
        model: job.model.name.clone(),
        parameters: job.model.parameters(),
        active_parameters: job.model.active_parameters(),
        gpu: job.machines.gpu.name.clone(),
        network: job.machines.network.name.clone(),
        gpus,
        tokens: job.tokens,
        sequence: job.batch.sequence,
        found,
        stages,
        at_achieved,
        days: took,
        days_with_failures: with_failures,
        lost_gpu_hours: f64::from(gpus) * 24.0 * (with_failures - took),
        effective,
        bill,
        sensitivity: moved,
        alternatives,
        sweep,
    })
}

fn alternative(
    job: &Job<'_>,
    machines: &Machines,
    gpus: u32,
    found: &Found,
    price: f64,
) -> Alternative {
    let took = days(&found.best, job.batch.sequence, job.tokens);
    Alternative {
        gpu: machines.gpu.name.clone(),
        gpus,
        split: found.best.split.to_string(),
        days: took,
        model_tflops_per_gpu: found.best.time.model_flops_per_gpu / 1e12,
        cost: took * 24.0 * f64::from(gpus) * price,
    }
}

/// What the search does on the same machines and on today's: as many GPUs, and the fewest for the
/// same days.
fn alternatives(job: &Job<'_>, gpus: u32, took: f64, catalogue: &Catalogue) -> Vec<Alternative> {
    let mut list = Vec::new();
    let own = job.machines.gpu.name.as_str();
    let names: Vec<&str> = std::iter::once(own)
        .chain(["a100-80g", "h100-sxm", "b200"].into_iter().filter(|n| *n != own))
        .collect();
    for (index, name) in names.iter().enumerate() {
        let Ok(gpu) = catalogue.gpu(name) else { continue };
        let machines = if index == 0 {
            job.machines.clone()
        } else {
            let network = catalogue.default_network(&gpu);
            Machines { gpu, network }
        };
        let batch =
            Batch { dtype: machines.gpu.training_dtype(), stack: Stack::Overlapped, ..job.batch };
        let request = Request {
            model: &job.model,
            machines: &machines,
            batch,
            pins: Pins::default(),
            memory_fraction: job.args.memory_fraction,
        };
        let price = machines.gpu.price_per_hour;
        // The number as given, or the nearest below that clusters come in.
        let same = std::iter::once(gpus)
            .chain(counts(machines.network.gpus_per_node, gpus).into_iter().rev().take(6))
            .find_map(|n| best(&request, n).ok().map(|found| (n, found)));
        if let Some((n, found)) = same {
            list.push(alternative(job, &machines, n, &found, price));
        }
        if let Ok(sized) = fewest(&request, job.tokens, took, gpus) {
            let entry = alternative(job, &machines, sized.gpus, &sized.found, price);
            if list.last() != Some(&entry) {
                list.push(entry);
            }
        }
    }
    list
}
