//! `plan serve`: memory, latency and throughput of a served model.

use serde::Serialize;

use super::{Inputs, Output, ServeArgs, catalogue, gib, json, machines, model, notes};
use crate::catalogue::Dtype;
use crate::error::PlanError;
use crate::plot::{Series, svg};
use crate::quantity::{seconds, show};
use crate::serve::{Load, Serving, ServingPlan, best, plan};

/// Limit of the time to the first token where none is given: what a reader waits for.
pub const TTFT_MS: f64 = 2000.0;
/// Limit of the time per output token where none is given: 20 tokens per second and reader.
pub const TPOT_MS: f64 = 50.0;

/// The data of `plan serve`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ServeReport {
    /// The model.
    pub model: String,
    /// Its parameters.
    pub parameters: f64,
    /// The GPU type.
    pub gpu: String,
    /// The plan with its curve.
    pub plan: ServingPlan,
    /// The point that serves the most tokens per GPU within the limits.
    pub chosen: Load,
    /// Share of the tokens in a request that are output, for the price of both.
    pub cost_per_million_input_and_output_tokens: f64,
}

/// Plans a replica: at the given split, or at the best one within the limits.
///
/// # Errors
/// Any [`PlanError`], with what is short and the nearest that works.
pub fn serve(args: &ServeArgs, inputs: &Inputs) -> Result<Output, PlanError> {
    let catalogue = catalogue(inputs)?;
    let (model, _) = model(&args.model, inputs, &catalogue)?;
    let machines = machines(&args.gpu, args.network.as_deref(), inputs, &catalogue)?;
    let dtype = super::dtype(args.dtype.as_deref(), &machines.gpu)?;
    let kv_dtype = match args.kv_dtype.as_deref() {
        Some(text) => Dtype::parse(text)?,
        None if dtype.bytes() < 2.0 => Dtype::Bf16,
        None => dtype,
    };
    let price = args.price_per_hour.unwrap_or(machines.gpu.price_per_hour);
    if !price.is_finite() || price < 0.0 {
        return Err(PlanError::invalid("price_per_hour", "must be a number from 0"));
    }
    let base = Serving {
        tensor: args.tensor.unwrap_or(1),
        pipeline: args.pipeline.unwrap_or(1),
        dtype,
        kv_dtype,
        prompt: args.prompt,
        output: args.output_tokens,
        memory_fraction: args.memory_fraction,
    };
    for (field, ms) in [("ttft_ms", args.ttft_ms), ("tpot_ms", args.tpot_ms)] {
        if ms.is_some_and(|x| !x.is_finite() || x < 0.0) {
            return Err(PlanError::invalid(field, "must be a number of milliseconds from 0"));
        }
    }
    // 0 lifts a limit.
    let limit = |ms: Option<f64>, usual: f64| {
        let ms = ms.unwrap_or(usual);
        (ms > 0.0).then_some(ms / 1e3)
    };
    let (ttft, tpot) = (limit(args.ttft_ms, TTFT_MS), limit(args.tpot_ms, TPOT_MS));
    let asked = args.ttft_ms.is_some() || args.tpot_ms.is_some();
    let mut warnings = notes(&model, &machines.gpu);
    let (planned, chosen) = if args.tensor.is_some() || args.pipeline.is_some() {
        let planned = plan(&model, &base, &machines, price)?;
        let meets =
            |l: &Load| ttft.is_none_or(|x| l.ttft_s <= x) && tpot.is_none_or(|x| l.tpot_s <= x);
        let chosen = planned.curve.iter().rev().find(|l| meets(l)).copied();
        let chosen = if asked { chosen } else { chosen.or(planned.curve.first().copied()) };
        let Some(chosen) = chosen else {
            let first = planned.curve[0];
            return Err(PlanError::invalid(
                "latency",
                format!(
                    "tensor {} x pipeline {} misses the limits even alone: TTFT {}, TPOT {}",
                    base.tensor,
                    base.pipeline,
                    seconds(first.ttft_s),
                    seconds(first.tpot_s)
                ),
            ));
        };
        (planned, chosen)
    } else {
        match best(&model, &base, &machines, price, ttft, tpot, args.max_gpus) {
            Ok(found) => found,
            Err(PlanError::Invalid { message, .. }) if !asked => {
                warnings.push(format!("the usual limits are lifted: {message}"));
                best(&model, &base, &machines, price, None, None, args.max_gpus)?
            }
            Err(error) => return Err(error),
        }
    };
    let s = &planned.serving;
    let m = &planned.memory;
    let mut table = format!(
        "{} ({} parameters) on {} x {}, {} weights, {} cache: tensor {} x pipeline {}\n",
        model.name,
        show(model.parameters()),
        planned.gpus,
        machines.gpu.name,
        s.dtype,
        s.kv_dtype,
        s.tensor,
        s.pipeline
    );
    table.push_str(&format!(
        "per GPU: weights {:.1} GiB, overhead {:.1} GiB, room for cache {:.1} GiB\ncache {:.1} KiB per token, {:.3} GiB per sequence of {}; greatest batch {}\n\n",
        gib(m.weights),
        gib(m.overhead),
        gib(m.kv_room),
        m.kv_per_token / 1024.0,
        gib(m.kv_per_sequence),
        s.prompt + s.output,
        m.max_batch
    ));
    table.push_str(&format!(
        "{:>11} {:>10} {:>10} {:>12} {:>14} {:>16}\n",
        "CONCURRENCY", "TTFT", "TPOT", "TOKENS/S", "TOKENS/S/GPU", "$ PER M TOKENS"
    ));
    for load in &planned.curve {
        let mark = if load.concurrency == chosen.concurrency { " <" } else { "" };
        table.push_str(&format!(
            "{:>11} {:>10} {:>10} {:>12.0} {:>14.1} {:>16.3}{mark}\n",
            load.concurrency,
            seconds(load.ttft_s),
            seconds(load.tpot_s),
            load.tokens_per_second,
            load.tokens_per_second_per_gpu,
            load.cost_per_million_tokens
        ));
    }
    let show_limit = |limit: Option<f64>| limit.map_or("none".to_owned(), seconds);
    table.push_str(&format!(
        "< most tokens per GPU within TTFT {} and TPOT {} (0 lifts a limit)\n",
        show_limit(ttft),
        show_limit(tpot)
    ));
    if args.explain {
        table.push_str(
            "\nprefill: the training forward pass of one prompt, chunks of 8,192, causal attention\n\
             decode step: each product's weights or arithmetic, whichever is slower, plus the cache's bytes over bandwidth, plus two all-reduces per layer (Pope et al. 2022, 2211.05102)\n\
             TPOT: decode step + (concurrency - 1) x prefill / (stages x output): others are admitted between steps\n\
             tokens/s: concurrency x output / (output x TPOT + prefill)\n",
        );
    }
    let plot = args.sweep.then(|| {
        let series = |name: &str, value: fn(&Load) -> f64| Series {
            name: name.to_owned(),
            points: planned.curve.iter().map(|l| (f64::from(l.concurrency), value(l))).collect(),
        };
        svg(
            &format!("{} on {} x {}", model.name, planned.gpus, machines.gpu.name),
            "concurrency",
            &[
                series("output tokens/s per GPU", |l| l.tokens_per_second_per_gpu),
                series("milliseconds per output token", |l| l.tpot_s * 1e3),
            ],
        )
    });
    let share = f64::from(s.output) / f64::from(s.prompt + s.output);
    let report = ServeReport {
        model: model.name.clone(),
        parameters: model.parameters(),
        gpu: machines.gpu.name.clone(),
        cost_per_million_input_and_output_tokens: chosen.cost_per_million_tokens * share,
        plan: planned,
        chosen,
    };
    Ok(Output { table, json: json(&report)?, plot, warnings, ..Output::default() })
}
