//! Between plans and manifests: reads a model from a `TrainingJob`, writes the job of a plan.

use drumline_spec::{JobSpec, MemoryOptions, Work};

use crate::error::PlanError;
use crate::model::{Family, Model};
use crate::search::{Candidate, Pins};
use crate::split::Recompute;

/// What a plan takes from a manifest.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The model, under the job's name.
    pub model: Model,
    /// Tokens in a sequence.
    pub sequence: u32,
    /// Sequences in a step.
    pub global_batch: u32,
    /// What the job asks for: only what differs from a field's default fixes anything.
    pub pins: Pins,
}

/// Returns what a job's options fix.
pub(crate) fn pins(memory: MemoryOptions) -> Pins {
    Pins {
        sequence_parallel: memory.sequence_parallel.then_some(true),
        zero: memory.shard_optimizer.then_some(1),
        recompute: match memory.recompute {
            drumline_spec::Recompute::None => None,
            drumline_spec::Recompute::Selective => Some(Recompute::Selective),
            drumline_spec::Recompute::Full => Some(Recompute::Full),
        },
        ..Pins::default()
    }
}

/// Reads a manifest's first `TrainingJob`.
///
/// # Errors
/// [`PlanError::Text`] with the first mistake of the manifest, or where it holds no training run.
pub fn read(file: &str, text: &str) -> Result<Wanted, PlanError> {
    let specs: Vec<JobSpec> = drumline_spec::manifest::parse(text, file).map_err(|mistakes| {
        let more = mistakes.len().saturating_sub(1);
        let first = mistakes.first();
        PlanError::Text {
            file: file.to_owned(),
            line: first.map_or(1, |m| m.place.line),
            column: first.map_or(1, |m| m.place.column),
            message: format!(
                "{}: {}{}",
                first.map_or("", |m| m.path.as_str()),
                first.map_or("", |m| m.message.as_str()),
                if more > 0 { format!(" (and {more} more mistakes)") } else { String::new() }
            ),
        }
    })?;
    for spec in specs {
        if let Work::TrainingJob(job) = spec.work {
            let mut model = Model::from(&job.model);
            model.name = spec.name;
            return Ok(Wanted {
                model,
                sequence: job.sequence,
                global_batch: job.global_batch,
                pins: pins(job.memory),
            });
        }
    }
    Err(PlanError::Text {
        file: file.to_owned(),
        line: 1,
        column: 1,
        message: "the manifest holds no TrainingJob".to_owned(),
    })
}

/// Writes the `TrainingJob` of a plan: what `drumline submit` accepts.
///
/// # Errors
/// [`PlanError::Invalid`] where a manifest cannot express the model or the split, naming what.
pub fn emit(
    model: &Model,
    candidate: &Candidate,
    sequence: u32,
    tokens: f64,
    gpu: &str,
) -> Result<String, PlanError> {
    let refuse = |what: &str| {
        PlanError::invalid("emit", format!("a TrainingJob cannot express {what} of {}", model.name))
    };
    if model.moe.is_some() {
        return Err(refuse("the mixture of experts"));
    }
    if model.encoder_layers > 0 || model.mla.is_some() {
        return Err(refuse("the attention"));
    }
    let family = match model.family {
        Family::Gpt => "gpt2",
        Family::Llama => "llama",
        _ => return Err(refuse("the family's biases and norms")),
    };
    if u64::from(model.head_dim) * u64::from(model.heads) != u64::from(model.hidden) {
        return Err(refuse("heads whose widths do not sum to the hidden size"));
    }
    let split = &candidate.split;
    if split.context > 1 || split.expert > 1 {
        return Err(refuse("context or expert parallelism"));
    }
    if split.zero > 1 {
        return Err(refuse("ZeRO stages above 1"));
    }
    let mut memory = String::new();
    for (wanted, line) in [
        (split.recompute != Recompute::None, format!("recompute: {}", split.recompute)),
        (split.zero == 1 && split.data > 1, "shardOptimizer: true".to_owned()),
        (split.sequence_parallel && split.tensor > 1, "sequenceParallel: true".to_owned()),
    ] {
        if wanted {
            memory.push_str(&format!("    {line}\n"));
        }
    }
    if !memory.is_empty() {
        memory.insert_str(0, "  memory:\n");
    }
    let per_step = f64::from(candidate.global_batch) * f64::from(sequence);
    let steps = (tokens / per_step).ceil().max(1.0) as u64;
    // Peak rates of GPT-3's table 2.1 follow 0.003239 - 0.0001395 ln N (Kaplan et al. 2020, D.6).
    let rate = (0.003_239 - 0.000_139_5 * model.parameters().ln()).max(3e-5);
    let name: String = model
        .name
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect::<String>()
        .trim_matches('-')
        .chars()
        .take(40)
        .collect();
    let name = if name.starts_with(|c: char| c.is_ascii_alphabetic()) {
        name
    } else {
        format!("m-{name}")
    };
    let name = name.trim_end_matches('-');
    Ok(format!(
        "# Planned for {gpus} x {gpu}: {split}, {seconds:.3} s per step, {gib:.1} GiB on the fullest GPU.\n\
         apiVersion: drumline.dev/v1alpha1\n\
         kind: TrainingJob\n\
         metadata:\n  name: {name}\n\
         spec:\n\
         \x20 model:\n    family: {family}\n    layers: {layers}\n    hidden: {hidden}\n    ffn: {ffn}\n    heads: {heads}\n    kvHeads: {kv}\n    vocab: {vocab}\n    context: {sequence}\n    tieEmbeddings: {tie}\n\
         \x20 data:\n    # What `drumline data build` wrote; change it to yours.\n    path: data/{name}\n\
         \x20 parallelism:\n    tensor: {t}\n    pipeline: {p}\n    data: {d}\n\
         \x20 batch:\n    global: {global}\n    micro: {micro}\n{memory}\
         \x20 steps: {steps}\n\
         \x20 learningRate:\n    peak: {rate:.2e}\n    warmupSteps: {warmup}\n\
         \x20 checkpoint:\n    intervalSteps: {interval}\n\
         \x20 resources:\n    device: gpu\n",
        gpus = split.gpus(),
        seconds = candidate.time.step,
        gib = candidate.bytes() / f64::from(1 << 30),
        layers = model.layers,
        hidden = model.hidden,
        ffn = model.ffn,
        heads = model.heads,
        kv = model.kv_heads,
        vocab = model.vocab,
        tie = model.tie_embeddings,
        t = split.tensor,
        p = split.pipeline,
        d = split.data,
        global = candidate.global_batch,
        micro = split.micro_batch,
        warmup = (steps / 100).max(1),
        // About every half hour.
        interval = ((1800.0 / candidate.time.step) as u64).clamp(1, steps),
    ))
}
