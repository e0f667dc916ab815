//! From the text of a manifest to specs that are always legal, or to every mistake in it.

use std::collections::BTreeMap;

use crate::command::CommandJob;
use crate::document::{self, Node, Value};
use crate::gang::{DeviceKind, GangSettings, Parallelism, RestartPolicy};
use crate::job::{JobSpec, SplitChoice, Work};
use crate::memory;
use crate::mistake::{Mistake, Place, nearest};
use crate::model::{Family, ModelConfig, ModelError, nearest_divisor};
use crate::queue::QueueSpec;
use crate::scheduling::{self, Wishes, wishes};
use crate::service::{Autoscale, KvCacheStorage, ModelService, WeightStorage};
use crate::table::{API_VERSION, MANIFESTS, RANKS_MAX, manifest};
use crate::training::{
    Checkpointing, DataSource, LearningRate, Optimizer, Precision, TrainingJob, WeightRounding,
};
use crate::walk::{Checked, Walk};

/// The most mistakes that are told of one file.
pub const MISTAKES_MAX: usize = 200;

/// What the documents of a file describe, in their order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Manifests {
    /// Its queues.
    pub queues: Vec<QueueSpec>,
    /// Its jobs.
    pub jobs: Vec<JobSpec>,
}

/// Parses the jobs of a file, as [`parse_all`]; a queue in it is a mistake.
///
/// # Errors
/// As [`parse_all`].
pub fn parse(text: &str, source_name: &str) -> Result<Vec<JobSpec>, Vec<Mistake>> {
    let all = parse_all(text, source_name)?;
    match all.queues.first() {
        None => Ok(all.jobs),
        Some(queue) => Err(vec![Mistake {
            source: source_name.to_owned(),
            document: 1,
            path: "kind".to_owned(),
            place: Place::START,
            message: format!("queue {}: a job is wanted here, not a queue", queue.name),
            nearest: None,
        }]),
    }
}

/// Parses every manifest of a file, YAML or JSON, one or several documents.
///
/// `source_name` stands in mistakes where a file's name would.
///
/// # Errors
/// Every mistake of the file, in the order of its lines, at most [`MISTAKES_MAX`] and a last one
/// that says how many more there are. Never empty.
pub fn parse_all(text: &str, source_name: &str) -> Result<Manifests, Vec<Mistake>> {
    let (documents, faults) = document::read(text);
    let mut specs = Manifests::default();
    let mut mistakes: Vec<Mistake> = faults
        .into_iter()
        .map(|fault| Mistake {
            source: source_name.to_owned(),
            document: fault.document,
            path: String::new(),
            place: fault.at,
            message: fault.message,
            nearest: None,
        })
        .collect();
    if documents.is_empty() && mistakes.is_empty() {
        let mut walk = Walk::new(source_name, 1);
        let message = "the file holds no manifest; `drumline explain` lists the kinds".to_owned();
        walk.wrong("", Place::START, message, None);
        mistakes = walk.mistakes;
    }
    for (number, root) in &documents {
        let mut walk = Walk::new(source_name, *number);
        let spec = one(&mut walk, root);
        match spec {
            Some(One::Job(job)) if walk.mistakes.is_empty() => specs.jobs.push(*job),
            Some(One::Queue(queue)) if walk.mistakes.is_empty() => specs.queues.push(queue),
            _ => mistakes.append(&mut walk.mistakes),
        }
    }
    if mistakes.is_empty() {
        return Ok(specs);
    }
    mistakes.sort_by_key(|mistake| (mistake.place, mistake.document));
    if let Some(left_out) = mistakes.len().checked_sub(MISTAKES_MAX + 1) {
        mistakes.truncate(MISTAKES_MAX + 1);
        if let Some(last) = mistakes.last_mut() {
            last.path.clear();
            last.nearest = None;
            last.message = format!("and {} more mistakes from here on", left_out + 1);
        }
    }
    Err(mistakes)
}

/// Like [`parse_all`], from bytes that may not be UTF-8.
///
/// # Errors
/// As [`parse_all`]; the first byte that is not UTF-8 is one mistake.
pub fn parse_bytes(bytes: &[u8], source_name: &str) -> Result<Manifests, Vec<Mistake>> {
    match std::str::from_utf8(bytes) {
        Ok(text) => parse_all(text, source_name),
        Err(error) => {
            let good = &bytes[..error.valid_up_to()];
            let line_start = good.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
            let column = String::from_utf8_lossy(&good[line_start..]).chars().count() + 1;
            let line = good.iter().filter(|b| **b == b'\n').count() + 1;
            Err(vec![Mistake {
                source: source_name.to_owned(),
                document: 1,
                path: String::new(),
                place: Place { line, column },
                message: "the file is not UTF-8 text from here on".to_owned(),
                nearest: None,
            }])
        }
    }
}

/// What one document describes.
enum One {
    Job(Box<JobSpec>),
    Queue(QueueSpec),
}

/// Reads one document: its kind first, because the kind decides the fields.
fn one(walk: &mut Walk<'_>, root: &Node) -> Option<One> {
    let Value::Map(entries) = &root.value else {
        let message = format!(
            "a manifest is an object with apiVersion, kind, metadata and spec; apiVersion is {API_VERSION}"
        );
        walk.wrong("", root.at, message, None);
        return None;
    };
    let kind = entries.iter().find(|entry| entry.key == "kind");
    let name = match kind.map(|kind| &kind.value.value) {
        Some(Value::Plain(name) | Value::Quoted(name)) => name.as_str(),
        // Missing or no text: the fields that every kind has are still checked.
        _ => "",
    };
    if let Some(manifest) = manifest(name) {
        walk.root(manifest.fields, root);
        return match name {
            "TrainingJob" => training(walk).map(|job| One::Job(Box::new(job))),
            "ModelService" => service(walk).map(|job| One::Job(Box::new(job))),
            "Queue" => scheduling::queue(walk).map(One::Queue),
            _ => command(walk).map(|job| One::Job(Box::new(job))),
        };
    }
    // An unknown kind: judge the document by the kind that was probably meant, so that its other
    // mistakes are told at once; if none is near, only by what all kinds share.
    let names = || MANIFESTS.iter().map(|manifest| manifest.name);
    match nearest(name, names()).and_then(manifest) {
        Some(manifest) => walk.root(manifest.fields, root),
        None => {
            let shared = &MANIFESTS[0].fields[..3];
            let trimmed = entries.iter().filter(|entry| entry.key != "spec").cloned().collect();
            walk.root(shared, &Node { value: Value::Map(trimmed), at: root.at });
        }
    }
    None
}

impl Walk<'_> {
    pub(crate) fn int(&self, path: &str) -> Option<i64> {
        match self.get(path)? {
            Checked::Integer(value) => Some(*value),
            _ => None,
        }
    }

    pub(crate) fn u32(&self, path: &str) -> Option<u32> {
        self.int(path).and_then(|value| u32::try_from(value).ok())
    }

    pub(crate) fn u64(&self, path: &str) -> Option<u64> {
        self.int(path).and_then(|value| u64::try_from(value).ok())
    }

    fn f64(&self, path: &str) -> Option<f64> {
        match self.get(path)? {
            Checked::Number(value) => Some(*value),
            _ => None,
        }
    }

    fn f32(&self, path: &str) -> Option<f32> {
        self.f64(path).map(|value| value as f32)
    }

    pub(crate) fn text(&self, path: &str) -> Option<String> {
        match self.get(path)? {
            Checked::Text(text) => Some(text.clone()),
            _ => None,
        }
    }

    pub(crate) fn duration_ms(&self, path: &str) -> Option<u64> {
        match self.get(path)? {
            Checked::DurationMs(ms) => Some(*ms),
            _ => None,
        }
    }

    pub(crate) fn truth(&self, path: &str) -> Option<bool> {
        match self.get(path)? {
            Checked::Bool(value) => Some(*value),
            _ => None,
        }
    }

    pub(crate) fn list(&self, path: &str) -> Vec<String> {
        match self.get(path) {
            Some(Checked::Texts(texts)) => texts.clone(),
            _ => Vec::new(),
        }
    }

    fn texts_by_name(&self, path: &str) -> BTreeMap<String, String> {
        match self.get(path) {
            Some(Checked::Map(map)) => map.clone(),
            _ => BTreeMap::new(),
        }
    }
}

fn wrap(walk: &Walk<'_>, work: Work, wishes: Wishes) -> Option<JobSpec> {
    let device = match walk.text("spec.resources.device")?.as_str() {
        "gpu" => DeviceKind::Gpu,
        _ => DeviceKind::Cpu,
    };
    Some(JobSpec {
        name: walk.text("metadata.name")?,
        labels: walk.texts_by_name("metadata.labels"),
        device,
        split: match walk.text("spec.parallelism") {
            Some(_) => SplitChoice::Auto { micro_is_given: walk.is_given("spec.batch.micro") },
            None => SplitChoice::Given,
        },
        wishes,
        settings: scheduling::settings(
            walk,
            GangSettings {
                queue: walk.text("spec.queue")?.parse().ok()?,
                priority: i32::try_from(walk.int("spec.priority")?).ok()?,
                restarts: RestartPolicy {
                    limit: walk.u32("spec.restarts.limit")?,
                    backoff_ms: walk.duration_ms("spec.restarts.backoff")?,
                },
                stall_timeout_ms: walk.duration_ms("spec.watchdog.stall").unwrap_or(0),
                start_timeout_ms: walk.duration_ms("spec.watchdog.start")?,
                ..GangSettings::default()
            },
        ),
        work,
    })
}

/// Reads the split. A number that is wrong by itself counts as 0, which no rule below judges.
fn parallelism(walk: &mut Walk<'_>) -> Parallelism {
    let part = |name: &str| walk.u32(&format!("spec.parallelism.{name}")).unwrap_or(0);
    let split =
        Parallelism { tensor: part("tensor"), pipeline: part("pipeline"), data: part("data") };
    let ranks = u64::from(split.tensor) * u64::from(split.pipeline) * u64::from(split.data);
    if ranks > RANKS_MAX.unsigned_abs() {
        let Parallelism { tensor, pipeline, data } = split;
        walk.wrong_field(
            "spec.parallelism",
            format!("tensor {tensor} x pipeline {pipeline} x data {data} = {ranks} ranks; at most {RANKS_MAX} are allowed"),
        );
    }
    split
}

fn training(walk: &mut Walk<'_>) -> Option<JobSpec> {
    let split = parallelism(walk);
    let model = model(walk, split);
    let sequence = sequence(walk, model.context);
    batch(walk, split);
    let virtual_stages = virtual_stages(walk, split, model.layers);
    let (memory, deterministic) = memory::options(walk, split, sequence);
    let rate = learning_rate(walk);
    let rounding = rounding(walk);
    let wanted = if walk.text("spec.parallelism").is_some() { 0 } else { split.data };
    let (global, micro) = (walk.u32("spec.batch.global"), walk.u32("spec.batch.micro"));
    let wishes = wishes(walk, wanted, |copies| {
        let (Some(global), Some(micro)) = (global, micro) else { return Ok(()) };
        let part = micro.saturating_mul(copies);
        if part == 0 || global.is_multiple_of(part) {
            return Ok(());
        }
        Err(format!(
            "batch.global {global} is not divisible by {copies} copies x micro {micro} = {part}; \
             choose a batch that every size divides, a greater step, or other bounds"
        ))
    });
    if !walk.mistakes.is_empty() {
        return None;
    }
    let precision = match walk.text("spec.precision")?.as_str() {
        "bf16" => Precision::Bf16,
        _ => Precision::F32,
    };
    let work = Work::TrainingJob(TrainingJob {
        model,
        data: DataSource { path: walk.text("spec.data.path")? },
        parallelism: split,
        virtual_stages,
        precision,
        memory,
        deterministic,
        steps: walk.u64("spec.steps")?,
        global_batch: walk.u32("spec.batch.global")?,
        micro_batch: walk.u32("spec.batch.micro")?,
        sequence,
        seed: walk.u64("spec.seed")?,
        optimizer: Optimizer {
            beta1: walk.f32("spec.optimizer.beta1")?,
            beta2: walk.f32("spec.optimizer.beta2")?,
            epsilon: walk.f32("spec.optimizer.epsilon")?,
            weight_decay: walk.f32("spec.optimizer.weightDecay")?,
            clip_norm: walk.f32("spec.optimizer.clipNorm")?,
            rounding,
        },
        learning_rate: rate?,
        checkpoint: Checkpointing {
            path: walk.text("spec.checkpoint.path").unwrap_or_default(),
            interval_steps: walk.u64("spec.checkpoint.intervalSteps")?,
            keep: walk.u32("spec.checkpoint.keep")?,
            resume_from: walk.text("spec.checkpoint.resumeFrom"),
        },
        eval_interval_steps: walk.u64("spec.eval.intervalSteps")?,
        eval_sequences: walk.u32("spec.eval.sequences")?,
    });
    wrap(walk, work, wishes)
}

/// Reads how weights are rounded; by chance only where there is a copy of them that is.
fn rounding(walk: &mut Walk<'_>) -> WeightRounding {
    const ROUNDING: &str = "spec.optimizer.rounding";
    if walk.text(ROUNDING).as_deref() != Some("stochastic") {
        return WeightRounding::Nearest;
    }
    let is = |path: &str, wanted: &str| walk.text(path).as_deref() == Some(wanted);
    if !is("spec.precision", "bf16") || !is("spec.resources.device", "gpu") {
        let message = "only a GPU keeps the weights in bf16 beside those in f32, and only for \
                       products in bf16; set spec.precision: bf16 and spec.resources.device: gpu, or \
                       leave it out";
        walk.wrong_field(ROUNDING, message);
    }
    WeightRounding::Stochastic
}

/// Reads the model and checks its shape and split. A number that is wrong by itself is 0.
fn model(walk: &mut Walk<'_>, split: Parallelism) -> ModelConfig {
    let number = |name: &str| walk.u32(&format!("spec.model.{name}")).unwrap_or(0);
    let family = walk.text("spec.model.family");
    let is_gpt2 = family.as_deref() == Some("gpt2");
    let heads = number("heads");
    let model = ModelConfig {
        family: if is_gpt2 { Family::Gpt2 } else { Family::Llama },
        layers: number("layers"),
        hidden: number("hidden"),
        ffn: number("ffn"),
        heads,
        kv_heads: if walk.is_given("spec.model.kvHeads") { number("kvHeads") } else { heads },
        vocab: number("vocab"),
        context: number("context"),
        norm_epsilon: walk.f32("spec.model.normEpsilon").unwrap_or(0.0),
        rope_theta: walk.f32("spec.model.ropeTheta").unwrap_or(10_000.0),
        tie_embeddings: match walk.get("spec.model.tieEmbeddings") {
            Some(Checked::Bool(tie)) => *tie,
            _ => is_gpt2,
        },
    };
    for ModelError { field, message } in model.check(split.tensor, split.pipeline) {
        // A 0 stands for a field whose own mistake has been told already.
        if message == "must be at least 1" {
            continue;
        }
        let path = match field {
            "parallelism.tensor" | "parallelism.pipeline" => format!("spec.{field}"),
            "kv_heads" => "spec.model.kvHeads".to_owned(),
            _ => format!("spec.model.{field}"),
        };
        // Without grouping, kvHeads is heads: one mistake, not two.
        let echo = message.starts_with("kv_heads ") && model.kv_heads == model.heads;
        let needs_family = message.starts_with("rotary") && family.is_none();
        if !echo && !needs_family {
            walk.wrong_field(&path, message.replace("kv_heads", "kvHeads"));
        }
    }
    if is_gpt2 {
        if model.kv_heads != heads && model.kv_heads > 0 && heads > 0 {
            walk.wrong_field(
                "spec.model.kvHeads",
                format!(
                    "gpt2 has no grouped queries: kvHeads {} must equal heads {heads}",
                    model.kv_heads
                ),
            );
        }
        if walk.is_given("spec.model.ropeTheta") {
            walk.wrong_field(
                "spec.model.ropeTheta",
                "gpt2 has learned positions; ropeTheta is only for llama",
            );
        }
    }
    model
}

/// Reads the sequence length, the model's context when it is absent.
fn sequence(walk: &mut Walk<'_>, context: u32) -> u32 {
    const PATH: &str = "spec.batch.sequence";
    if !walk.is_given(PATH) {
        return context;
    }
    let sequence = walk.u32(PATH).unwrap_or(0);
    if context > 0 && sequence > context {
        walk.wrong_field(
            PATH,
            format!("sequence {sequence} is longer than model.context {context}; at most {context} works"),
        );
    }
    sequence
}

fn batch(walk: &mut Walk<'_>, split: Parallelism) {
    let (Some(global), Some(micro)) = (walk.u32("spec.batch.global"), walk.u32("spec.batch.micro"))
    else {
        return;
    };
    let part = u64::from(micro) * u64::from(split.data);
    let global = u64::from(global);
    if part == 0 || global.is_multiple_of(part) {
        return;
    }
    let below = global / part * part;
    let above = below + part;
    let near = if below == 0 || above - global < global - below { above } else { below };
    let message = format!(
        "global {global} is not divisible by data {} x micro {micro} = {part}; nearest that works: \
         global {near}",
        split.data
    );
    walk.wrong_field("spec.batch.global", message);
}

/// Reads how many parts of the layers each stage holds, and checks that they can be interleaved.
fn virtual_stages(walk: &mut Walk<'_>, split: Parallelism, layers: u32) -> u32 {
    const PATH: &str = "spec.parallelism.virtualStages";
    let parts = walk.u32(PATH).unwrap_or(1);
    let stages = split.pipeline;
    if parts <= 1 || stages == 0 {
        return parts;
    }
    if stages == 1 {
        let message = format!(
            "{parts} virtual stages need a pipeline of at least 2 stages; without one, leave it out"
        );
        walk.wrong_field(PATH, message);
        return parts;
    }
    let all = u64::from(parts) * u64::from(stages);
    if layers > 0 && layers.is_multiple_of(stages) && !u64::from(layers).is_multiple_of(all) {
        let near = nearest_divisor(layers / stages, parts);
        let message = format!(
            "layers {layers} is not divisible by pipeline {stages} x virtualStages {parts} = {all}; \
             nearest that works: virtualStages {near}"
        );
        walk.wrong_field(PATH, message);
    }
    if let (Some(global), Some(micro)) =
        (walk.u32("spec.batch.global"), walk.u32("spec.batch.micro"))
    {
        let part = u64::from(micro) * u64::from(split.data);
        let micros = u64::from(global).checked_div(part).unwrap_or(0);
        if micros > 0 && !micros.is_multiple_of(u64::from(stages)) {
            let message = format!(
                "virtualStages {parts} goes round the stages in whole turns: the {micros} \
                 micro-batches of a copy (global {global} / (micro {micro} x data {})) must be a \
                 multiple of pipeline {stages}",
                split.data
            );
            walk.wrong_field(PATH, message);
        }
    }
    parts
}

fn learning_rate(walk: &mut Walk<'_>) -> Option<LearningRate> {
    let peak = walk.f32("spec.learningRate.peak");
    let floor = if walk.is_given("spec.learningRate.floor") {
        walk.f32("spec.learningRate.floor")
    } else {
        peak.map(|peak| peak / 10.0)
    };
    let steps = walk.u64("spec.steps");
    let warmup = if walk.is_given("spec.learningRate.warmupSteps") {
        walk.u64("spec.learningRate.warmupSteps")
    } else {
        steps.map(|steps| steps / 20)
    };
    if let (Some(peak), Some(floor)) = (peak, floor)
        && floor > peak
    {
        walk.wrong_field("spec.learningRate.floor", format!("floor {floor} is above peak {peak}"));
    }
    if let (Some(steps), Some(warmup)) = (steps, warmup)
        && warmup > steps
    {
        let message = format!("warmupSteps {warmup} is more than steps {steps}");
        walk.wrong_field("spec.learningRate.warmupSteps", message);
    }
    Some(LearningRate { peak: peak?, floor: floor?, warmup_steps: warmup? })
}

fn service(walk: &mut Walk<'_>) -> Option<JobSpec> {
    let split = parallelism(walk);
    if split.data > 1 {
        walk.wrong_field(
            "spec.parallelism.data",
            format!(
                "must be 1: {} copies of a service are spec.replicas: {}",
                split.data, split.data
            ),
        );
    }
    let autoscale = autoscale(walk);
    let wishes = wishes(walk, 1, |_| Ok(()));
    if !walk.mistakes.is_empty() {
        return None;
    }
    let name = walk.text("metadata.name")?;
    let work = Work::ModelService(ModelService {
        model: walk.text("spec.model")?,
        served_name: walk.text("spec.servedName").unwrap_or(name),
        parallelism: split,
        replicas: walk.u32("spec.replicas")?,
        autoscale,
        max_batch: walk.u32("spec.maxBatch")?,
        max_context: walk.u32("spec.maxContext").unwrap_or(0),
        max_queue: walk.u32("spec.maxQueue")?,
        weights: match walk.text("spec.weights")?.as_str() {
            "bf16" => WeightStorage::Bf16,
            "f16" => WeightStorage::F16,
            "int8" => WeightStorage::Int8,
            _ => WeightStorage::F32,
        },
        kv_cache: match walk.text("spec.kvCache")?.as_str() {
            "f32" => KvCacheStorage::F32,
            "bf16" => KvCacheStorage::Bf16,
            "f16" => KvCacheStorage::F16,
            _ => KvCacheStorage::Auto,
        },
    });
    wrap(walk, work, wishes)
}

fn autoscale(walk: &mut Walk<'_>) -> Option<Autoscale> {
    if !walk.is_given("spec.autoscale") {
        return None;
    }
    if !walk.is_given("spec.autoscale.max") {
        walk.wrong_field("spec.autoscale.max", "is missing: it says how far a service may grow");
    }
    if walk.u32("spec.replicas").is_some_and(|replicas| replicas > 1) {
        walk.wrong_field("spec.replicas", "autoscale decides; give autoscale.min instead");
    }
    let min = walk.u32("spec.autoscale.min")?;
    let max = walk.u32("spec.autoscale.max")?;
    let waiting = walk.u32("spec.autoscale.waiting")?;
    if min > max {
        walk.wrong_field("spec.autoscale.min", format!("{min} is more than max, {max}"));
    }
    if let Some(queue) = walk.u32("spec.maxQueue")
        && waiting >= queue
    {
        // The gateway turns away what is beyond: the figure would never be seen.
        let message = format!("{waiting} never wait: maxQueue is {queue}");
        walk.wrong_field("spec.autoscale.waiting", message);
    }
    let kv_usage = walk.f64("spec.autoscale.kvUsage")?;
    let down_after_ms = walk.duration_ms("spec.autoscale.downAfter")?;
    Some(Autoscale { min, max, waiting, kv_usage, down_after_ms })
}

fn command(walk: &mut Walk<'_>) -> Option<JobSpec> {
    let ranks = walk.u32("spec.ranks").unwrap_or(0);
    let wishes = wishes(walk, ranks, |_| Ok(()));
    if !walk.mistakes.is_empty() {
        return None;
    }
    let argv = match walk.get("spec.argv")? {
        Checked::Texts(argv) => argv.clone(),
        _ => return None,
    };
    let work = Work::CommandJob(CommandJob {
        argv,
        env: walk.texts_by_name("spec.env"),
        workdir: walk.text("spec.workdir").unwrap_or_default(),
        ranks: walk.u32("spec.ranks")?,
    });
    wrap(walk, work, wishes)
}
