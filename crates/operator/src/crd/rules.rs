//! What a schema cannot say by itself, as CEL rules that the API server checks: impossible splits,
//! bounds of durations, names that Drumline sets itself, and specs that may not change.
//!
//! The rules repeat what `drumline_spec` checks; the operator parses every object with it all the
//! same, so a rule that is missing here costs an early answer, never a wrong launch.

use drumline_spec::field::{Field, Kind, MapRule, duration};
use drumline_spec::table::{RANKS_MAX, each_field, manifest};
use serde_json::{Value, json};

/// Adds the rules of a kind to its `spec` schema.
pub fn add(kind: &str, spec: &mut Value) {
    if let Some(manifest) = manifest(kind) {
        each_field(manifest, &mut |path, field| {
            if let Some(below) = path.strip_prefix("spec.")
                && let Some(schema) = find(spec, below)
            {
                add_own(schema, field);
            }
        });
    }
    let mut rules = match kind {
        "TrainingJob" => training(),
        "ModelService" => service(),
        _ => Vec::new(),
    };
    rules.extend(fixed(kind));
    if !rules.is_empty() {
        spec["x-kubernetes-validations"] = Value::Array(rules);
    }
}

fn find<'a>(spec: &'a mut Value, path: &str) -> Option<&'a mut Value> {
    path.split('.').try_fold(spec, |at, name| at.get_mut("properties")?.get_mut(name))
}

/// Rules about one value alone.
fn add_own(schema: &mut Value, field: &Field) {
    match &field.kind {
        Kind::Duration { min_ms, max_ms } => {
            schema["minLength"] = json!(1);
            schema["maxLength"] = json!(32);
            let (least, most) = (duration(*min_ms), duration(*max_ms));
            schema["x-kubernetes-validations"] = json!([{
                "rule": format!("duration(self) >= duration('{least}') && duration(self) <= duration('{most}')"),
                "message": format!("must be from {least} to {most}"),
            }]);
        }
        Kind::Map(MapRule::Environment) => {
            schema["x-kubernetes-validations"] = json!([
                {
                    "rule": "self.all(name, name.matches('^[A-Za-z_][A-Za-z0-9_]*$'))",
                    "message": "a variable's name has letters, digits and '_', and starts with no digit",
                },
                {
                    "rule": "self.all(name, !name.startsWith('DRUMLINE_') && !(name in ['RANK', \
                             'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'GROUP_RANK', \
                             'GROUP_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', \
                             'TORCHELASTIC_RESTART_COUNT', 'TORCHELASTIC_RUN_ID']))",
                    "message": "the rendezvous variables are set by Drumline for each rank and cannot be overridden",
                },
            ]);
        }
        _ => {}
    }
}

/// One rule. What is told is fixed: the API server refuses expressions that print numbers, because
/// it cannot bound their cost. The operator's parser tells the numbers.
fn rule(rule: &str, field: &str, told: &str) -> Value {
    json!({ "rule": rule, "message": told, "fieldPath": field })
}

/// `value` must be divisible by `part`.
fn divisible(guard: &str, value: &str, part: &str, at: &str) -> Value {
    let name = |path: &str| path.replace("self.", "");
    rule(
        &format!("{guard}{value} % {part} == 0"),
        at,
        &format!("{} must be divisible by {}", name(value), name(part)),
    )
}

const TENSOR: &str = "self.parallelism.tensor";
const PIPELINE: &str = "self.parallelism.pipeline";
const HEADS: &str = "self.model.heads";
const KV_HEADS: &str = "self.model.kvHeads";
/// `kvHeads` may be absent: then it is `heads`.
const IF_KV: &str = "!has(self.model.kvHeads) || ";

fn world_size() -> Value {
    rule(
        &format!("{TENSOR} * {PIPELINE} * self.parallelism.data <= {RANKS_MAX}"),
        ".parallelism",
        &format!(
            "tensor x pipeline x data is the number of ranks; at most {RANKS_MAX} are allowed"
        ),
    )
}

fn training() -> Vec<Value> {
    let part = "(self.parallelism.data * self.batch.micro)";
    vec![
        world_size(),
        divisible("", "self.model.hidden", HEADS, ".model.heads"),
        rule(
            "self.model.family != 'llama' || self.model.hidden % self.model.heads != 0 || \
             (self.model.hidden / self.model.heads) % 2 == 0",
            ".model.heads",
            "rotary positions need an even head width, hidden / heads",
        ),
        divisible(IF_KV, HEADS, KV_HEADS, ".model.kvHeads"),
        divisible("", HEADS, TENSOR, ".parallelism.tensor"),
        divisible(IF_KV, KV_HEADS, TENSOR, ".parallelism.tensor"),
        divisible("", "self.model.ffn", TENSOR, ".parallelism.tensor"),
        divisible("", "self.model.layers", PIPELINE, ".parallelism.pipeline"),
        rule(
            &format!("self.parallelism.virtualStages == 1 || {PIPELINE} > 1"),
            ".parallelism.virtualStages",
            "virtual stages need a pipeline of at least 2 stages",
        ),
        divisible(
            "",
            "self.model.layers",
            &format!("({PIPELINE} * self.parallelism.virtualStages)"),
            ".parallelism.virtualStages",
        ),
        rule(
            &format!(
                "self.parallelism.virtualStages == 1 || self.batch.global % {part} != 0 || \
                 (self.batch.global / {part}) % {PIPELINE} == 0"
            ),
            ".parallelism.virtualStages",
            "with virtual stages, the micro-batches of a copy, batch.global / (parallelism.data * \
             batch.micro), must be divisible by parallelism.pipeline",
        ),
        rule(
            "!self.memory.shardOptimizer || self.parallelism.data > 1 || has(self.elastic)",
            ".memory.shardOptimizer",
            "the copies of the model share the optimizer: parallelism.data must be at least 2",
        ),
        rule(
            &format!("!self.memory.sequenceParallel || {TENSOR} > 1"),
            ".memory.sequenceParallel",
            "the ranks of a tensor group share the rows: parallelism.tensor must be at least 2",
        ),
        rule(
            &format!(
                "!self.memory.sequenceParallel || (self.batch.micro * (has(self.batch.sequence) ? \
                 self.batch.sequence : self.model.context)) % {TENSOR} == 0"
            ),
            ".memory.sequenceParallel",
            "batch.micro x batch.sequence must be divisible by parallelism.tensor",
        ),
        rule(
            "!self.deterministic || !has(self.elastic)",
            ".deterministic",
            "an elastic run adds in another order with every size",
        ),
        rule(
            "self.optimizer.rounding != 'stochastic' || (self.precision == 'bf16' && \
             self.resources.device == 'gpu')",
            ".optimizer.rounding",
            "stochastic needs precision bf16 and resources.device gpu: only there weights are rounded",
        ),
        rule(
            "self.model.family != 'gpt2' || !has(self.model.kvHeads) || self.model.kvHeads == self.model.heads",
            ".model.kvHeads",
            "gpt2 has no grouped queries: kvHeads must equal heads",
        ),
        rule(
            "self.model.family != 'gpt2' || !has(self.model.ropeTheta)",
            ".model.ropeTheta",
            "gpt2 has learned positions; ropeTheta is only for llama",
        ),
        rule(
            "!has(self.batch.sequence) || self.batch.sequence <= self.model.context",
            ".batch.sequence",
            "sequence must not be longer than model.context",
        ),
        divisible("", "self.batch.global", part, ".batch.global"),
        rule(
            "!has(self.learningRate.floor) || self.learningRate.floor <= self.learningRate.peak",
            ".learningRate.floor",
            "floor must not be above peak",
        ),
        rule(
            "!has(self.learningRate.warmupSteps) || self.learningRate.warmupSteps <= self.steps",
            ".learningRate.warmupSteps",
            "warmupSteps must not be more than steps",
        ),
    ]
}

fn service() -> Vec<Value> {
    vec![
        world_size(),
        rule(
            "self.parallelism.data == 1",
            ".parallelism.data",
            "must be 1: copies of a service are spec.replicas",
        ),
        rule(
            "!has(self.autoscale) || self.replicas == 1",
            ".replicas",
            "autoscale decides; give autoscale.min instead",
        ),
        rule(
            "!has(self.autoscale) || self.autoscale.min <= self.autoscale.max",
            ".autoscale.min",
            "min is more than max",
        ),
        rule(
            "!has(self.autoscale) || self.autoscale.waiting < self.maxQueue",
            ".autoscale.waiting",
            "so many never wait: it must be less than maxQueue",
        ),
    ]
}

/// A gang that was planned from one spec is not changed under its feet: what decides the gang
/// stays. Queue and priority may change while a job waits.
fn fixed(kind: &str) -> Vec<Value> {
    let fields: &[&str] = match kind {
        "TrainingJob" => &["model", "parallelism", "batch", "resources", "steps", "seed"],
        "ModelService" => &["model", "parallelism", "resources"],
        "CommandJob" => &["argv", "ranks", "resources"],
        _ => &[],
    };
    fields
        .iter()
        .map(|name| {
            json!({
                "rule": format!("self.{name} == oldSelf.{name}"),
                "fieldPath": format!(".{name}"),
                "message": "does not change once the job is there; delete the job and apply it again",
            })
        })
        .collect()
}
