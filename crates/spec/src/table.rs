//! The one table of every kind of manifest and every field: parsing, `explain`, the reference page
//! and the JSON schema all read it.

use crate::field::{Field, Kind, Manifest, MapRule, Presence, TextRule};
use crate::memory::{DETERMINISTIC_DOC, MEMORY};
use crate::scheduling::{ELASTIC, QUEUE_SPEC, RESOURCES, SCHEDULING, TOPOLOGY};

/// The `apiVersion` that this program reads.
pub const API_VERSION: &str = "drumline.dev/v1alpha1";

/// The greatest number of ranks of one gang.
pub const RANKS_MAX: i64 = 65_536;

/// The most replicas of one service.
pub const REPLICAS_MAX: i64 = 256;

/// The longest `metadata.name`, so that the id's suffix still fits a DNS label.
pub const JOB_NAME_MAX: usize = 50;

pub(crate) const HOUR_MS: u64 = 3_600_000;
const STEPS_MAX: i64 = 1_000_000_000;

pub(crate) const fn required(
    name: &'static str,
    kind: Kind,
    unit: &'static str,
    doc: &'static str,
) -> Field {
    Field { name, kind, presence: Presence::Required, unit, doc, word: None }
}

pub(crate) const fn default(
    name: &'static str,
    kind: Kind,
    value: &'static str,
    unit: &'static str,
    doc: &'static str,
) -> Field {
    Field { name, kind, presence: Presence::Default(value), unit, doc, word: None }
}

pub(crate) const fn optional(
    name: &'static str,
    kind: Kind,
    otherwise: &'static str,
    unit: &'static str,
    doc: &'static str,
) -> Field {
    Field { name, kind, presence: Presence::Optional(otherwise), unit, doc, word: None }
}

pub(crate) const fn int(min: i64, max: i64) -> Kind {
    Kind::Integer { min, max }
}

/// Every kind, in the order in which they are listed.
pub static MANIFESTS: &[Manifest] = &[
    Manifest {
        name: "TrainingJob",
        doc: "Trains a decoder on token shards, as a gang of ranks that starts all at once, writes \
              checkpoints, and starts again from the last complete one after a failure.",
        fields: &[API, KIND, METADATA, required("spec", Kind::Object(TRAINING), "", "The run.")],
    },
    Manifest {
        name: "ModelService",
        doc: "Serves a model, split over a gang of ranks, behind the OpenAI-compatible gateway \
              until it is cancelled.",
        fields: &[API, KIND, METADATA, required("spec", Kind::Object(SERVICE), "", "The service.")],
    },
    Manifest {
        name: "CommandJob",
        doc: "Runs any program as a gang of ranks, with the environment that torchrun users expect: \
              RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR, MASTER_PORT.",
        fields: &[API, KIND, METADATA, required("spec", Kind::Object(COMMAND), "", "The command.")],
    },
    Manifest {
        name: "Queue",
        doc: "Says who may use how many devices, who lends to whom, and who may take back. Queues \
              form a tree; jobs are submitted to its leaves.",
        fields: &[
            API,
            KIND,
            METADATA,
            optional("spec", Kind::Object(QUEUE_SPEC), "no limits", "", "The queue."),
        ],
    },
];

const API: Field = required(
    "apiVersion",
    Kind::Choice(&[(API_VERSION, "The version described here.")]),
    "",
    "The version of this format.",
);
const KIND: Field = required(
    "kind",
    Kind::Choice(&[
        ("TrainingJob", "Trains a model."),
        ("ModelService", "Serves a model."),
        ("CommandJob", "Runs any program."),
        ("Queue", "Shares the fleet's devices out."),
    ]),
    "",
    "What it describes. It decides which fields `spec` has.",
);
const METADATA: Field = required(
    "metadata",
    Kind::Object(&[
        required(
            "name",
            Kind::Text(TextRule::Name { max: JOB_NAME_MAX }),
            "",
            "The name. A job's id is this name and a short suffix, so names of jobs may repeat; a \
             queue has the name itself.",
        ),
        optional(
            "labels",
            Kind::Map(MapRule::Labels),
            "none",
            "",
            "Notes of your own, kept with the job and shown by `describe`. They decide nothing.",
        ),
        optional(
            "annotations",
            Kind::Map(MapRule::Annotations),
            "none",
            "",
            "What a Kubernetes cluster is told beside the spec, such as the image of the ranks. \
             Elsewhere they decide nothing.",
        ),
        optional(
            "namespace",
            Kind::Text(TextRule::Name { max: 63 }),
            "the one that the command or its kubeconfig names",
            "",
            "The namespace on a Kubernetes cluster. Elsewhere it decides nothing.",
        ),
    ]),
    "",
    "The name, and notes.",
);

const TRAINING: &[Field] = &[
    required("model", Kind::Object(MODEL), "", "The decoder's shape."),
    required(
        "data",
        Kind::Object(&[required(
            "path",
            Kind::Text(TextRule::Path),
            "",
            "Folder with token shards and dataset.json, as `drumline data build` writes it. Every \
             node must see it under this path; a relative path starts at the \
             folder that all nodes share.",
        )]),
        "",
        "The tokens to train on.",
    ),
    optional(
        "parallelism",
        Kind::Object(&[
            default("tensor", int(1, 1024), "1", "ranks", TENSOR_DOC),
            default("pipeline", int(1, 1024), "1", "stages", PIPELINE_DOC),
            default(
                "virtualStages",
                int(1, 64),
                "1",
                "",
                "Parts of the layers that each pipeline stage holds. More than 1 interleaves the \
                 schedule: the bubble shrinks by this factor, and activations are sent so many \
                 times as often. pipeline x virtualStages divides layers, and pipeline divides the \
                 micro-batches.",
            ),
            default(
                "data",
                int(1, RANKS_MAX),
                "1",
                "copies",
                "Copies of the model, each of which takes its share of the global batch.",
            ),
        ]),
        "one rank",
        "",
        "How the model is split. The number of ranks is tensor x pipeline x data.",
    )
    .or_word(
        "auto",
        "The planner chooses at submit: the fastest split of the devices that are free then, or of \
         all healthy ones where no split fits those. batch.micro is chosen too, unless it is given. \
         `drumline submit --dry-run` shows the choice and why; the job keeps it.",
    ),
    required(
        "batch",
        Kind::Object(&[
            required(
                "global",
                int(1, 1 << 20),
                "sequences",
                "Sequences in one optimizer step, over all ranks. Divisible by data x micro.",
            ),
            default(
                "micro",
                int(1, 65_536),
                "1",
                "sequences",
                "Sequences in one forward pass of one rank. More use more memory; fewer leave a \
                 smaller pipeline bubble.",
            ),
            optional(
                "sequence",
                int(1, 1 << 24),
                "model.context",
                "tokens",
                "Tokens in one sequence, at most model.context.",
            ),
        ]),
        "",
        "How many sequences make one step.",
    ),
    default(
        "precision",
        Kind::Choice(&[
            ("f32", "f32 throughout."),
            ("bf16", "Inputs rounded to bf16, products added up in f32."),
        ]),
        "f32",
        "",
        "The numbers that matrix products are computed with. Weights, gradients, activations and \
         the optimizer are f32 either way.",
    ),
    optional(
        "memory",
        Kind::Object(MEMORY),
        "its defaults",
        "",
        "What is given for needing less memory. None of it changes what is learned.",
    ),
    default("deterministic", Kind::Bool, "false", "", DETERMINISTIC_DOC),
    required("steps", int(1, STEPS_MAX), "steps", "Optimizer steps of the whole run."),
    default(
        "seed",
        int(0, i64::MAX),
        "0",
        "",
        "Seed of the initial weights and of the data's order. The same seed and split give the \
         same losses, bit for bit.",
    ),
    optional(
        "optimizer",
        Kind::Object(&[
            default(
                "beta1",
                Kind::Number { min: 0.0, max: 0.999_999 },
                "0.9",
                "",
                "Decay of the first moment.",
            ),
            default(
                "beta2",
                Kind::Number { min: 0.0, max: 0.999_999 },
                "0.95",
                "",
                "Decay of the second moment.",
            ),
            default(
                "epsilon",
                Kind::Number { min: 1e-12, max: 1.0 },
                "1e-8",
                "",
                "Added to the root of the second moment.",
            ),
            default(
                "weightDecay",
                Kind::Number { min: 0.0, max: 10.0 },
                "0.1",
                "",
                "Decoupled decay of matrices; norms and biases are left alone.",
            ),
            default(
                "clipNorm",
                Kind::Number { min: 0.0, max: 1e6 },
                "1.0",
                "",
                "Greatest norm of the whole gradient, over all shards; 0 switches clipping off.",
            ),
            default(
                "rounding",
                Kind::Choice(&[
                    ("nearest", "To the nearest, ties to even."),
                    (
                        "stochastic",
                        "Up or down by chance, the likelier the nearer: what products read then follows \
                         changes of the weights that are smaller than a step of bf16. The same run \
                         draws the same.",
                    ),
                ]),
                "nearest",
                "",
                "How weights, which are f32, become the bf16 that products read on a GPU. `stochastic` \
                 needs one, and `precision: bf16`.",
            ),
        ]),
        "its defaults",
        "",
        "AdamW (Loshchilov and Hutter 2019).",
    ),
    optional(
        "learningRate",
        Kind::Object(&[
            default(
                "peak",
                Kind::Number { min: 0.0, max: 100.0 },
                "3e-4",
                "",
                "The greatest rate, reached at the end of the warm-up.",
            ),
            optional(
                "floor",
                Kind::Number { min: 0.0, max: 100.0 },
                "a tenth of peak",
                "",
                "The rate at the last step, at most peak.",
            ),
            optional(
                "warmupSteps",
                int(0, STEPS_MAX),
                "a twentieth of steps",
                "steps",
                "Steps of linear warm-up, at most steps.",
            ),
        ]),
        "its defaults",
        "",
        "Linear warm-up, then a cosine down to the floor.",
    ),
    optional(
        "checkpoint",
        Kind::Object(&[
            optional(
                "path",
                Kind::Text(TextRule::Path),
                "a folder of the job's own, jobs/ID in the folder that all nodes share",
                "",
                "Folder of the run's checkpoints. Every node must see it; a relative path starts \
                 at the folder that all nodes share.",
            ),
            default(
                "intervalSteps",
                int(0, STEPS_MAX),
                "100",
                "steps",
                "Steps between two checkpoints; 0 writes only the last.",
            ),
            default(
                "keep",
                int(1, 1000),
                "2",
                "checkpoints",
                "How many complete checkpoints are kept.",
            ),
            optional(
                "resumeFrom",
                Kind::Text(TextRule::Path),
                "new weights",
                "",
                "Checkpoint to start from while the run has none of its own. Another split is \
                 allowed.",
            ),
        ]),
        "its defaults",
        "",
        "When checkpoints are written, and which are kept.",
    ),
    optional(
        "eval",
        Kind::Object(&[
            default(
                "intervalSteps",
                int(0, STEPS_MAX),
                "0",
                "steps",
                "Steps between two losses on the held-out split; 0 measures it only at the end.",
            ),
            default(
                "sequences",
                int(1, 1 << 20),
                "16",
                "sequences",
                "Held-out sequences in one such measurement.",
            ),
        ]),
        "its defaults",
        "",
        "The loss on held-out data.",
    ),
    RESOURCES,
    TOPOLOGY,
    ELASTIC,
    SCHEDULING,
    QUEUE,
    PRIORITY,
    RESTARTS,
    optional(
        "watchdog",
        Kind::Object(&[
            default(
                "stall",
                Kind::Duration { min_ms: 0, max_ms: 168 * HOUR_MS },
                "5m",
                "",
                "Longest time between two finished steps before the attempt is ended and restarted; \
                 0s switches the watchdog off.",
            ),
            START,
        ]),
        "its defaults",
        "",
        "Deadlines for a gang that hangs.",
    ),
];

const TENSOR_DOC: &str = "Ranks that share each layer's matrices. They are placed on one node. Divides \
    heads, kvHeads and ffn.";
const PIPELINE_DOC: &str = "Stages that the layers are divided into. Divides layers.";

const MODEL: &[Field] = &[
    required(
        "family",
        Kind::Choice(&[
            ("gpt2", "Learned positions, LayerNorm, GELU, biases."),
            ("llama", "Rotary positions, RMSNorm, SwiGLU, grouped queries, no biases."),
        ]),
        "",
        "Which position coding, norm and feed-forward the decoder has.",
    ),
    required("layers", int(1, 10_000), "layers", "Decoder layers."),
    required("hidden", int(1, 1 << 20), "", "Width of the residual stream. Divisible by heads."),
    required(
        "ffn",
        int(1, 1 << 22),
        "",
        "Inner width of the feed-forward network. Divisible by tensor.",
    ),
    required("heads", int(1, 65_536), "heads", "Query heads. Divisible by tensor."),
    optional(
        "kvHeads",
        int(1, 65_536),
        "heads",
        "heads",
        "Key and value heads, for grouped queries. Divides heads; divisible by tensor.",
    ),
    required(
        "vocab",
        int(2, 1 << 24),
        "tokens",
        "Tokens in the vocabulary: at least as many as the data's tokenizer has.",
    ),
    required("context", int(1, 1 << 24), "tokens", "Longest sequence."),
    default(
        "normEpsilon",
        Kind::Number { min: 1e-12, max: 1.0 },
        "1e-5",
        "",
        "Added to the variance in each norm.",
    ),
    optional(
        "ropeTheta",
        Kind::Number { min: 1.0, max: 1e9 },
        "10000",
        "",
        "Base of the rotary frequencies; only for llama.",
    ),
    optional(
        "tieEmbeddings",
        Kind::Bool,
        "true for gpt2, false for llama",
        "",
        "Whether the output projection is the embedding, transposed.",
    ),
];

const SERVICE: &[Field] = &[
    required(
        "model",
        Kind::Text(TextRule::Path),
        "",
        "A checkpoint, a run's folder (its latest complete checkpoint), or a folder in the Hugging \
         Face layout. Every node must see it; a relative path starts at the folder that all nodes share.",
    ),
    optional(
        "servedName",
        Kind::Text(TextRule::ModelName),
        "metadata.name",
        "",
        "The model's name in requests to the gateway.",
    ),
    optional(
        "parallelism",
        Kind::Object(&[
            default("tensor", int(1, 1024), "1", "ranks", TENSOR_DOC),
            default("pipeline", int(1, 1024), "1", "stages", PIPELINE_DOC),
            default(
                "data",
                int(1, RANKS_MAX),
                "1",
                "copies",
                "Always 1: copies of a service are its replicas.",
            ),
        ]),
        "one rank",
        "",
        "How each replica is split.",
    ),
    default(
        "replicas",
        int(1, REPLICAS_MAX),
        "1",
        "replicas",
        "How many copies serve, each a gang of its own. The gateway gives each request to the one \
         with the most room. `drumline scale` and `kubectl scale` change it while it runs.",
    ),
    optional(
        "autoscale",
        Kind::Object(&[
            default("min", int(1, REPLICAS_MAX), "1", "replicas", "The fewest."),
            optional("max", int(1, REPLICAS_MAX), "required", "replicas", "The most."),
            default(
                "waiting",
                int(0, 100_000),
                "4",
                "requests",
                "How many may wait at each replica, beside those of its batch, before another one \
                 is started; less than maxQueue.",
            ),
            default(
                "kvUsage",
                Kind::Number { min: 0.05, max: 1.0 },
                "0.8",
                "",
                "Share of the KV cache in use beyond which another replica is started.",
            ),
            default(
                "downAfter",
                Kind::Duration { min_ms: 1000, max_ms: 24 * HOUR_MS },
                "5m",
                "",
                "A replica goes once it was not needed for so long.",
            ),
        ]),
        "replicas decides",
        "",
        "Starts and ends replicas by what is asked of them.",
    ),
    default(
        "maxBatch",
        int(1, 4096),
        "8",
        "sequences",
        "Most sequences that are decoded in one batch.",
    ),
    default(
        "maxContext",
        int(0, 1 << 24),
        "0",
        "tokens",
        "Most tokens of prompt and completion together; 0 means the model's context.",
    ),
    default(
        "maxQueue",
        int(0, 100_000),
        "64",
        "requests",
        "Requests that may wait for a place in the batch before the gateway answers 429.",
    ),
    default(
        "weights",
        Kind::Choice(&[
            ("f32", "As they were trained."),
            (
                "bf16",
                "Half the memory, twice the speed; inputs of products are rounded to bf16 too.",
            ),
            ("f16", "Half the memory and finer than bf16; slower than it with many rows."),
            ("int8", "A quarter of the memory, one scale for each output; inputs as with bf16."),
        ]),
        "f32",
        "",
        "How matrices are stored while they are served. Activations and sums are f32.",
    ),
    default(
        "kvCache",
        Kind::Choice(&[
            (
                "auto",
                "As the weights are; bf16 beside int8, and f32 on devices that have no other.",
            ),
            ("f32", "As they were computed."),
            ("bf16", "Half the memory: keys and values are rounded to 8 bits."),
            ("f16", "Half the memory: rounded to 11 bits, and to 65504 at most."),
        ]),
        "auto",
        "",
        "How the keys and values of past tokens are stored.",
    ),
    RESOURCES,
    TOPOLOGY,
    SCHEDULING,
    QUEUE,
    PRIORITY,
    RESTARTS,
    optional(
        "watchdog",
        Kind::Object(&[
            default(
                "stall",
                Kind::Duration { min_ms: 0, max_ms: 168 * HOUR_MS },
                "1m",
                "",
                "Longest time between two engine steps before the attempt is ended and restarted; \
                 0s switches the watchdog off.",
            ),
            START,
        ]),
        "its defaults",
        "",
        "Deadlines for a gang that hangs.",
    ),
];

const COMMAND: &[Field] = &[
    required(
        "argv",
        Kind::Texts { min: 1, max: 4096 },
        "",
        "The program and its arguments, each as it is; no shell reads them. A name without a slash \
         is looked up in the agent's PATH.",
    ),
    default("ranks", int(1, RANKS_MAX), "1", "ranks", "Ranks, each with one device."),
    optional(
        "env",
        Kind::Map(MapRule::Environment),
        "none",
        "",
        "Further environment. The rendezvous variables are Drumline's and cannot be set here.",
    ),
    optional(
        "workdir",
        Kind::Text(TextRule::Path),
        "a folder of the job's own",
        "",
        "Working directory on each node.",
    ),
    RESOURCES,
    TOPOLOGY,
    ELASTIC,
    SCHEDULING,
    QUEUE,
    PRIORITY,
    RESTARTS,
    optional(
        "watchdog",
        Kind::Object(&[START]),
        "its defaults",
        "",
        "Deadlines for a gang that hangs. A command reports no steps, so only its start is watched.",
    ),
];

const START: Field = default(
    "start",
    Kind::Duration { min_ms: 100, max_ms: 24 * HOUR_MS },
    "1m",
    "",
    "Longest time from launch until every rank has joined.",
);
const QUEUE: Field = default(
    "queue",
    Kind::Text(TextRule::Name { max: 63 }),
    "default",
    "",
    "The queue that the job waits in.",
);
const PRIORITY: Field =
    default("priority", int(-1_000_000, 1_000_000), "0", "", "Higher goes first within its queue.");
const RESTARTS: Field = optional(
    "restarts",
    Kind::Object(&[
        default(
            "limit",
            int(0, 1000),
            "3",
            "restarts",
            "Restarts of the gang without progress in between; 0 forbids any.",
        ),
        default(
            "backoff",
            Kind::Duration { min_ms: 0, max_ms: HOUR_MS },
            "1s",
            "",
            "Wait before the first restart without progress; it doubles with each.",
        ),
    ]),
    "its defaults",
    "",
    "How often and how fast the gang is started again.",
);

/// Returns the kind with this name.
#[must_use]
pub fn manifest(kind: &str) -> Option<&'static Manifest> {
    MANIFESTS.iter().find(|manifest| manifest.name == kind)
}

/// Calls `visit` with every field of a kind and its path, parents first.
pub fn each_field(manifest: &Manifest, visit: &mut dyn FnMut(&str, &'static Field)) {
    fn walk(prefix: &str, fields: &'static [Field], visit: &mut dyn FnMut(&str, &'static Field)) {
        for field in fields {
            let path = join(prefix, field.name);
            visit(&path, field);
            if let Kind::Object(fields) = field.kind {
                walk(&path, fields, visit);
            }
        }
    }
    walk("", manifest.fields, visit);
}

/// Joins a path and a name with a dot.
pub(crate) fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}
