//! Searches the split: the fastest for a number of GPUs, the fewest for a deadline, the cheapest.

mod refuse;
mod sensitivity;
mod size;
mod terms;

use std::cmp::Ordering;

use serde::Serialize;

use crate::error::PlanError;
use crate::layer::layer_time;
use crate::memory::{self, StageMemory};
use crate::model::Model;
use crate::ops::Device;
use crate::split::{Batch, Machines, Recompute, Split, check};
use crate::step::{StepTime, assemble};

use refuse::refuse;
pub use sensitivity::{Sensitivity, sensitivity};
pub use size::{Sized, cheapest, counts, days, fewest};
pub use terms::{explain_loss, terms};

/// What is fixed by the user; everything else is searched.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Pins {
    /// Tensor.
    pub tensor: Option<u32>,
    /// Pipeline.
    pub pipeline: Option<u32>,
    /// Virtual stages.
    pub virtual_stages: Option<u32>,
    /// Context.
    pub context: Option<u32>,
    /// Expert.
    pub expert: Option<u32>,
    /// Sequence parallelism; otherwise on wherever tensor is above 1, as it costs nothing.
    pub sequence_parallel: Option<bool>,
    /// `ZeRO` stage.
    pub zero: Option<u8>,
    /// Recomputation.
    pub recompute: Option<Recompute>,
    /// Micro-batch.
    pub micro_batch: Option<u32>,
    /// Only splits that a `TrainingJob` manifest can express.
    pub manifest_only: bool,
}

/// A request to the search.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The model.
    pub model: &'a Model,
    /// The machines.
    pub machines: &'a Machines,
    /// The batch; `global` 0 lets [`default_batch`] choose it for each number of GPUs.
    pub batch: Batch,
    /// What is fixed.
    pub pins: Pins,
    /// Share of the GPU memory that may be used.
    pub memory_fraction: f64,
}

/// One split with its time and memory.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Candidate {
    /// The split.
    pub split: Split,
    /// Sequences in a step.
    pub global_batch: u32,
    /// The step.
    pub time: StepTime,
    /// The fullest stage.
    pub memory: StageMemory,
}

impl Candidate {
    /// Returns the bytes of the fullest rank.
    #[must_use]
    pub fn bytes(&self) -> f64 {
        self.memory.total()
    }
}

/// What a search found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Found {
    /// The fastest that fits.
    pub best: Candidate,
    /// The fastest with another tensor, pipeline, context or expert split.
    pub runner_up: Option<Candidate>,
    /// Why the runner-up loses, in words.
    pub why: String,
    /// Splits that no other beats in both step time and memory, fastest first.
    pub pareto: Vec<Candidate>,
    /// Splits looked at.
    pub considered: usize,
    /// Those that fit.
    pub fitting: usize,
}

/// Returns the global batch that runs of this size usually have: about 0.5 M tokens at 125 M
/// parameters, growing with the cube root of the parameters up to 16 M (GPT-3, table 2.1; Llama 3,
/// table 4), as sequences in a number that splits over `gpus`.
#[must_use]
pub fn default_batch(model: &Model, sequence: u32, gpus: u32) -> u32 {
    let tokens = (0.5e6 * (model.parameters() / 125e6).cbrt()).clamp(0.25e6, 16e6);
    let wanted = (tokens / f64::from(sequence.max(1))).max(1.0);
    let odd = gpus.max(1) >> gpus.max(1).trailing_zeros();
    // A power of two times the odd part of the number of GPUs divides over any split of them.
    let odd = if f64::from(odd) > 4.0 * wanted { 1 } else { odd };
    let power = (wanted / f64::from(odd)).log2().round().max(0.0);
    (f64::from(odd) * power.exp2()).min(1e9) as u32
}

fn divisors(n: u32) -> Vec<u32> {
    let mut list: Vec<u32> =
        (1..=n.isqrt()).filter(|d| n.is_multiple_of(*d)).flat_map(|d| [d, n / d]).collect();
    list.sort_unstable();
    list.dedup();
    list
}

fn choose(pin: Option<u32>, options: Vec<u32>) -> Vec<u32> {
    pin.map_or(options, |value| vec![value])
}

/// What a scan of all splits gathers.
struct Scan {
    fits: Vec<Candidate>,
    leanest: Option<Candidate>,
    considered: usize,
}

/// Looks at every split of `gpus` GPUs.
fn scan(request: &Request<'_>, gpus: u32) -> Result<Scan, PlanError> {
    let Request { model, machines, pins, .. } = *request;
    let mut batch = request.batch;
    if batch.sequence == 0 {
        return Err(PlanError::invalid("sequence", "must be at least 1"));
    }
    if batch.global == 0 {
        batch.global = default_batch(model, batch.sequence, gpus);
    }
    let peak = machines.gpu.peak(batch.dtype)?;
    let device = Device::new(&machines.gpu, batch.dtype, peak);
    let limit = machines.gpu.memory_bytes * request.memory_fraction;
    let mut result = Scan { fits: Vec::new(), leanest: None, considered: 0 };
    if gpus > machines.domain() && machines.network.nic_gbps <= 0.0 {
        return Ok(result);
    }
    let kv_divides = |t: u32| {
        !pins.manifest_only || (model.kv_heads.is_multiple_of(t) && model.ffn.is_multiple_of(t))
    };
    let tensors = choose(
        pins.tensor,
        divisors(gpus).into_iter().filter(|t| *t <= machines.domain().min(128)).collect(),
    );
    // A sequence is shared only where one rank's part stays long enough to fill it.
    let longest = if pins.manifest_only { 1 } else { (batch.sequence / 4096).max(1) };
    let contexts = choose(
        pins.context,
        (0..10).map(|i| 1 << i).take_while(|c| *c == 1 || *c <= longest).collect(),
    );
    for &tensor in &tensors {
        if !model.heads.is_multiple_of(tensor.max(1)) || !kv_divides(tensor.max(1)) {
            continue;
        }
        for &context in &contexts {
            let Some(rest) =
                tensor.checked_mul(context).filter(|n| *n > 0 && gpus.is_multiple_of(*n))
            else {
                continue;
            };
            let rest = gpus / rest;
            let pipelines = choose(
                pins.pipeline,
                divisors(rest).into_iter().filter(|p| *p <= model.total_layers()).collect(),
            );
            for micro_batch in choose(pins.micro_batch, vec![1, 2, 4, 8, 16]) {
                for recompute in Recompute::ALL {
                    // What costs time is for the user to ask for, where a job comes of it.
                    let wanted = pins.recompute.or(pins.manifest_only.then_some(Recompute::None));
                    let pinned = wanted.is_some_and(|r| r != recompute);
                    // With fused attention there is nothing selective to save.
                    let useless =
                        recompute == Recompute::Selective && batch.stack.fused_attention();
                    if pinned || (useless && pins.recompute.is_none()) {
                        continue;
                    }
                    for &pipeline in &pipelines {
                        if pipeline == 0 || !rest.is_multiple_of(pipeline) {
                            continue;
                        }
                        let split = Split {
                            tensor,
                            pipeline,
                            data: rest / pipeline,
                            context,
                            sequence_parallel: pins
                                .sequence_parallel
                                .unwrap_or(!pins.manifest_only)
                                && tensor > 1,
                            recompute,
                            micro_batch,
                            ..Split::SINGLE
                        };
                        scan_stages(request, &batch, &device, &split, limit, &mut result);
                    }
                }
            }
        }
    }
    Ok(result)
}

/// Looks at experts, virtual stages and `ZeRO` stages of one grid.
fn scan_stages(
    request: &Request<'_>,
    batch: &Batch,
    device: &Device,
    split: &Split,
    limit: f64,
    result: &mut Scan,
) {
    let Request { model, machines, pins, .. } = *request;
    let per_pass = u64::from(split.data) * u64::from(split.micro_batch);
    if per_pass > u64::from(batch.global) || !u64::from(batch.global).is_multiple_of(per_pass) {
        return;
    }
    if pins.manifest_only && !model.layers.is_multiple_of(split.pipeline) {
        return;
    }
    // The fullest of uneven stages sets the pace: below three layers it is too far from the mean.
    let layers = model.total_layers();
    if pins.pipeline.is_none()
        && !layers.is_multiple_of(split.pipeline)
        && layers / split.pipeline < 3
    {
        return;
    }
    let experts = match model.moe {
        None => vec![1],
        Some(moe) => choose(
            pins.expert,
            divisors(split.data * split.context)
                .into_iter()
                .filter(|e| moe.experts.is_multiple_of(*e) && *e <= 1024)
                .collect(),
        ),
    };
    for expert in experts {
        let split = Split { expert, ..*split };
        let Ok(m) = check(model, &split, batch) else { continue };
        let layer = layer_time(model, &split, batch, machines, device);
        let virtual_stages = match pins.virtual_stages {
            Some(v) => vec![v],
            None if split.pipeline == 1
                || pins.manifest_only
                || !m.is_multiple_of(split.pipeline)
                || !layers.is_multiple_of(split.pipeline) =>
            {
                vec![1]
            }
            None => divisors(layers / split.pipeline).into_iter().filter(|v| *v <= 12).collect(),
        };
        for v in virtual_stages {
            let zeros = match pins.zero {
                Some(zero) => vec![zero],
                None if split.data * split.context == 1 || pins.manifest_only => vec![0],
                None if split.pipeline > 1 => vec![0, 1],
                None => vec![0, 1, 2, 3],
            };
            for zero in zeros {
                let split = Split { virtual_stages: v, zero, ..split };
                if check(model, &split, batch).is_err() {
                    continue;
                }
                result.considered += 1;
                let memory = memory::peak(model, &split, batch, m, machines.framework_bytes());
                let fits = memory.total() <= limit;
                let lean = result.leanest.is_none_or(|old| memory.total() < old.bytes());
                if !fits && !lean {
                    continue;
                }
                let time = assemble(model, &split, batch, machines, device, &layer, f64::from(m));
                let candidate = Candidate { split, global_batch: batch.global, time, memory };
                if lean {
                    result.leanest = Some(candidate);
                }
                if fits {
                    result.fits.push(candidate);
                }
            }
        }
    }
}

// Tokens per second decide: with a batch that follows the GPUs, steps differ in size.
fn faster(a: &Candidate, b: &Candidate) -> Ordering {
    let rate = |c: &Candidate| c.time.step / f64::from(c.global_batch);
    // A tie goes to the leaner, then to the simpler split, so that the order is total.
    rate(a)
        .total_cmp(&rate(b))
        .then(a.bytes().total_cmp(&b.bytes()))
        .then((a.split.tensor, a.split.pipeline).cmp(&(b.split.tensor, b.split.pipeline)))
}

/// Finds the fastest split of exactly `gpus` GPUs that fits.
///
/// # Errors
/// [`PlanError::DoesNotFit`] with what is short and the nearest that works;
/// [`PlanError::Invalid`] where no split divides model and batch, with what would.
pub fn best(request: &Request<'_>, gpus: u32) -> Result<Found, PlanError> {
    if gpus == 0 || gpus > 1 << 20 {
        return Err(PlanError::invalid("gpus", format!("{gpus} is not from 1 to 1,048,576")));
    }
    if !(0.05..=1.0).contains(&request.memory_fraction) {
        return Err(PlanError::invalid("memory_fraction", "must be from 0.05 to 1"));
    }
    let mut scan = scan(request, gpus)?;
    if scan.fits.is_empty() {
        return Err(refuse(request, gpus, &scan));
    }
    scan.fits.sort_by(faster);
    let best = scan.fits[0];
    let shape = |s: &Split| (s.tensor, s.pipeline, s.context, s.expert);
    let runner_up = scan.fits.iter().find(|c| shape(&c.split) != shape(&best.split)).copied();
    let why = runner_up
        .map_or_else(|| "no other split fits".to_owned(), |other| explain_loss(&best, &other));
    let mut pareto: Vec<Candidate> = Vec::new();
    for candidate in &scan.fits {
        if pareto.last().is_none_or(|last| candidate.bytes() < 0.98 * last.bytes()) {
            pareto.push(*candidate);
        }
        if pareto.len() == 12 {
            break;
        }
    }
    Ok(Found {
        best,
        runner_up,
        why,
        pareto,
        considered: scan.considered,
        fitting: scan.fits.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::{Catalogue, Dtype};
    use crate::split::Stack;

    fn machines(gpu: &str) -> Machines {
        let catalogue = Catalogue::builtin();
        let gpu = catalogue.gpu(gpu).unwrap();
        let network = catalogue.default_network(&gpu);
        Machines { gpu, network }
    }

    fn request<'a>(model: &'a Model, machines: &'a Machines, global: u32) -> Request<'a> {
        Request {
            model,
            machines,
            batch: Batch {
                sequence: 2048,
                global,
                dtype: machines.gpu.training_dtype(),
                stack: Stack::Overlapped,
            },
            pins: Pins::default(),
            memory_fraction: 0.94,
        }
    }

    #[test]
    fn divisors_are_all_there_once() {
        assert_eq!(divisors(1), [1]);
        assert_eq!(divisors(36), [1, 2, 3, 4, 6, 9, 12, 18, 36]);
        assert_eq!(divisors(12), [1, 2, 3, 4, 6, 12]);
    }

    #[test]
    fn a_trillion_parameters_on_16384_gpus_is_planned() {
        let model = Catalogue::builtin().model("megatron-1t").unwrap();
        let machines = machines("h100-sxm");
        let found = best(&request(&model, &machines, 4096), 16_384).unwrap();
        assert_eq!(found.best.split.gpus(), 16_384);
        assert!(found.best.bytes() <= 0.94 * machines.gpu.memory_bytes);
        assert!((0.3..0.6).contains(&found.best.time.mfu), "{:?}", found.best);
        assert!(found.considered > 500);
        assert!(found.runner_up.is_some() && found.why.contains('%'), "{}", found.why);
        for pair in found.pareto.windows(2) {
            assert!(pair[0].time.step <= pair[1].time.step && pair[0].bytes() > pair[1].bytes());
        }
    }

    #[test]
    fn what_does_not_fit_says_what_is_short_and_what_works() {
        let model = Catalogue::builtin().model("gpt3-175b").unwrap();
        let machines = machines("a100-80g");
        let error = best(&request(&model, &machines, 64), 8).unwrap_err();
        let PlanError::DoesNotFit { short_gib, needed_gib, limit_gib, nearest, .. } = &error else {
            panic!("{error}")
        };
        assert!((needed_gib - limit_gib - short_gib).abs() < 1e-9 && *short_gib > 0.0);
        let works: u32 = nearest.split_whitespace().find_map(|word| word.parse().ok()).unwrap();
        assert!(best(&request(&model, &machines, 64), works).is_ok(), "{error}");
    }

    #[test]
    fn a_deadline_takes_the_fewest_and_an_impossible_one_says_what_is_possible() {
        let model = Catalogue::builtin().model("llama3-8b").unwrap();
        let machines = machines("h100-sxm");
        let request = request(&model, &machines, 0);
        let sized = fewest(&request, 1e12, 10.0, 4096).unwrap();
        assert!(sized.days <= 10.0);
        let fewer: Vec<u32> = counts(8, 4096).into_iter().filter(|n| *n < sized.gpus).collect();
        let next = *fewer.last().unwrap();
        let slower = best(&request, next).unwrap();
        assert!(days(&slower.best, 2048, 1e12) > 10.0);
        let error = fewest(&request, 1e15, 1.0, 512).unwrap_err().to_string();
        assert!(error.contains("days too long") && error.contains("nearest that works"), "{error}");
    }

    #[test]
    fn the_cheapest_costs_no_more_than_any_number_of_gpus() {
        let model = Catalogue::builtin().model("llama3-8b").unwrap();
        let machines = machines("h100-sxm");
        let request = request(&model, &machines, 512);
        let sized = cheapest(&request, 1e11, None, 256).unwrap();
        let hours = |days: f64, gpus: u32| days * f64::from(gpus);
        for gpus in [8, 16, 64, 256] {
            let other = best(&request, gpus).unwrap();
            let took = days(&other.best, 2048, 1e11);
            assert!(hours(sized.days, sized.gpus) <= hours(took, gpus) * (1.0 + 1e-9), "{gpus}");
        }
        // With a deadline the cheapest that is fast enough.
        let soon = cheapest(&request, 1e11, Some(sized.days / 3.0), 256).unwrap();
        assert!(soon.days <= sized.days / 3.0 && soon.gpus > sized.gpus);
    }

    #[test]
    fn more_of_any_rate_is_never_slower() {
        let model = Catalogue::builtin().model("llama3-70b").unwrap();
        let machines = machines("h100-sxm");
        let request = request(&model, &machines, 1024);
        let found = best(&request, 512).unwrap();
        let list = sensitivity(&model, &found.best, &request.batch, &machines).unwrap();
        assert_eq!(list[0].input, "matrix rate");
        for s in &list[..] {
            if s.input != "latencies" && s.input != "spread between nodes" {
                assert!(s.more_percent <= 1e-9 && s.less_percent >= -1e-9, "{s:?}");
            } else {
                assert!(s.more_percent >= -1e-9, "{s:?}");
            }
        }
    }

    #[test]
    fn a_manifest_gets_a_split_that_it_can_express() {
        let model = Catalogue::builtin().model("llama3-70b").unwrap();
        let machines = machines("h100-sxm");
        let mut request = request(&model, &machines, 1024);
        request.pins.manifest_only = true;
        let split = best(&request, 256).unwrap().best.split;
        assert_eq!((split.context, split.virtual_stages, split.zero), (1, 1, 0));
        assert!(model.layers.is_multiple_of(split.pipeline));
    }

    #[test]
    fn the_default_batch_divides() {
        let model = Catalogue::builtin().model("gpt3-175b").unwrap();
        for gpus in [1, 8, 96, 1024, 2560, 10_000, 16_384] {
            let batch = default_batch(&model, 2048, gpus);
            let tokens = f64::from(batch) * 2048.0;
            assert!((1e6..17e6).contains(&tokens), "{gpus}: {tokens}");
        }
        let small = Dtype::Bf16;
        assert_eq!(small.bytes(), 2.0);
    }
}
