//! The arguments of each command. With the feature `clap` they are argument groups to flatten.

/// A file that the command line has read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TextFile {
    /// Its name, for messages.
    pub name: String,
    /// Its text.
    pub text: String,
}

/// The texts beside the arguments.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inputs {
    /// What `--model` names, where it is a file: a `config.json` or a `TrainingJob` manifest.
    pub model: Option<TextFile>,
    /// Catalogues that extend the built-in one (`--catalogue FILE`).
    pub catalogues: Vec<TextFile>,
    /// A measured profile (`--profile FILE`).
    pub profile: Option<TextFile>,
    /// A table of runs: of published ones for `validate`, of one's own losses for `budget --fit`.
    pub runs: Option<TextFile>,
}

/// Arguments of `plan train`.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
pub struct TrainArgs {
    /// A model of the catalogue, a Hugging Face config.json or a TrainingJob manifest.
    #[cfg_attr(feature = "clap", arg(long, value_name = "NAME|FILE"))]
    pub model: String,
    /// The GPU type.
    #[cfg_attr(feature = "clap", arg(long, value_name = "NAME", default_value = "h100-sxm"))]
    pub gpu: String,
    /// Number of GPUs; without it, the fewest for the deadline or the cheapest.
    #[cfg_attr(feature = "clap", arg(long, value_name = "N"))]
    pub gpus: Option<u32>,
    /// The network between nodes; default: the GPU's usual one.
    #[cfg_attr(feature = "clap", arg(long, value_name = "NAME"))]
    pub network: Option<String>,
    /// Tokens to train on, as in 300B; default: 20 per parameter.
    #[cfg_attr(feature = "clap", arg(long, value_name = "AMOUNT"))]
    pub tokens: Option<String>,
    /// Tokens in a sequence; default: the model's context, at most 8192.
    #[cfg_attr(feature = "clap", arg(long, value_name = "TOKENS"))]
    pub sequence: Option<u32>,
    /// Sequences in an optimizer step; default: usual for the model's size.
    #[cfg_attr(feature = "clap", arg(long, value_name = "SEQUENCES"))]
    pub global_batch: Option<u32>,
    /// Number format of the products: bf16, fp16, fp8, fp32; default: the GPU's.
    #[cfg_attr(feature = "clap", arg(long, value_name = "DTYPE"))]
    pub dtype: Option<String>,
    /// What the software fuses and overlaps: eager, fused, overlapped, native; default:
    /// overlapped, and native with a profile.
    #[cfg_attr(feature = "clap", arg(long, value_name = "STACK"))]
    pub stack: Option<String>,
    /// Days allowed: finds the fewest GPUs.
    #[cfg_attr(feature = "clap", arg(long, value_name = "DAYS"))]
    pub deadline_days: Option<f64>,
    /// Finds the number of GPUs that costs least.
    #[cfg_attr(feature = "clap", arg(long))]
    pub cheapest: bool,
    /// Most GPUs that a search may use.
    #[cfg_attr(feature = "clap", arg(long, value_name = "N", default_value_t = 16384))]
    pub max_gpus: u32,
    /// Share of the GPU memory that may be used.
    #[cfg_attr(feature = "clap", arg(long, value_name = "SHARE", default_value_t = 0.94))]
    pub memory_fraction: f64,
    /// Plans at this TFLOP/s per GPU instead of the model's own estimate (6 per parameter and token).
    #[cfg_attr(feature = "clap", arg(long, value_name = "TFLOPS"))]
    pub achieved_tflops: Option<f64>,
    /// Fixes tensor parallelism.
    #[cfg_attr(feature = "clap", arg(long, value_name = "N"))]
    pub tensor: Option<u32>,
    /// Fixes pipeline stages.
    #[cfg_attr(feature = "clap", arg(long, value_name = "N"))]
    pub pipeline: Option<u32>,
    /// Fixes virtual stages.
    #[cfg_attr(feature = "clap", arg(long, value_name = "N"))]
    pub virtual_stages: Option<u32>,
    /// Fixes context parallelism.
    #[cfg_attr(feature = "clap", arg(long, value_name = "N"))]
    pub context: Option<u32>,
    /// Fixes expert parallelism.
    #[cfg_attr(feature = "clap", arg(long, value_name = "N"))]
    pub expert: Option<u32>,
    /// Fixes sequence parallelism; default: on wherever tensor is above 1.
    #[cfg_attr(feature = "clap", arg(long, value_name = "true|false"))]
    pub sequence_parallel: Option<bool>,
    /// Fixes the ZeRO stage, 0 to 3.
    #[cfg_attr(feature = "clap", arg(long, value_name = "STAGE"))]
    pub zero: Option<u8>,
    /// Fixes recomputation: none, selective, full.
    #[cfg_attr(feature = "clap", arg(long, value_name = "MODE"))]
    pub recompute: Option<String>,
    /// Fixes the micro-batch.
    #[cfg_attr(feature = "clap", arg(long, value_name = "SEQUENCES"))]
    pub micro_batch: Option<u32>,
    /// Dollars per GPU-hour; default: the catalogue's.
    #[cfg_attr(feature = "clap", arg(long, value_name = "DOLLARS"))]
    pub price_per_hour: Option<f64>,
    /// Failures per node and day.
    #[cfg_attr(feature = "clap", arg(long, value_name = "RATE", default_value_t = 0.004))]
    pub failures_per_node_day: f64,
    /// Seconds that a checkpoint stops training; default: from the state's size at 2 GB/s per node.
    #[cfg_attr(feature = "clap", arg(long, value_name = "SECONDS"))]
    pub checkpoint_seconds: Option<f64>,
    /// Seconds between checkpoints; default: the optimum.
    #[cfg_attr(feature = "clap", arg(long, value_name = "SECONDS"))]
    pub checkpoint_interval: Option<f64>,
    /// Seconds from a failure until training goes on.
    #[cfg_attr(feature = "clap", arg(long, value_name = "SECONDS", default_value_t = 600.0))]
    pub restart_seconds: f64,
    /// Writes something else than the table: manifest.
    #[cfg_attr(feature = "clap", arg(long, value_name = "WHAT"))]
    pub emit: Option<String>,
    /// Plans for a range, as in gpus=64..16384, with a plot.
    #[cfg_attr(feature = "clap", arg(long, value_name = "gpus=LOW..HIGH"))]
    pub sweep: Option<String>,
    /// Prints each term with its formula and source.
    #[cfg_attr(feature = "clap", arg(long))]
    pub explain: bool,
}

/// Arguments of `plan serve`.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
pub struct ServeArgs {
    /// A model of the catalogue, a Hugging Face config.json or a TrainingJob manifest.
    #[cfg_attr(feature = "clap", arg(long, value_name = "NAME|FILE"))]
    pub model: String,
    /// The GPU type.
    #[cfg_attr(feature = "clap", arg(long, value_name = "NAME", default_value = "h100-sxm"))]
    pub gpu: String,
    /// The network between nodes; default: the GPU's usual one.
    #[cfg_attr(feature = "clap", arg(long, value_name = "NAME"))]
    pub network: Option<String>,
    /// Fixes tensor parallelism; default: searched.
    #[cfg_attr(feature = "clap", arg(long, value_name = "N"))]
    pub tensor: Option<u32>,
    /// Fixes pipeline stages; default: searched, or 1 with --tensor.
    #[cfg_attr(feature = "clap", arg(long, value_name = "N"))]
    pub pipeline: Option<u32>,
    /// Most GPUs of a replica.
    #[cfg_attr(feature = "clap", arg(long, value_name = "N", default_value_t = 16))]
    pub max_gpus: u32,
    /// Number format of weights and products; default: the GPU's 16-bit one.
    #[cfg_attr(feature = "clap", arg(long, value_name = "DTYPE"))]
    pub dtype: Option<String>,
    /// Number format of the key-value cache; default: 16 bits.
    #[cfg_attr(feature = "clap", arg(long, value_name = "DTYPE"))]
    pub kv_dtype: Option<String>,
    /// Tokens of a prompt.
    #[cfg_attr(feature = "clap", arg(long, value_name = "TOKENS", default_value_t = 1024))]
    pub prompt: u32,
    /// Tokens of a completion.
    #[cfg_attr(feature = "clap", arg(long, value_name = "TOKENS", default_value_t = 256))]
    pub output_tokens: u32,
    /// Longest time to the first token, in milliseconds; default 2000, 0 for no limit.
    #[cfg_attr(feature = "clap", arg(long, value_name = "MS"))]
    pub ttft_ms: Option<f64>,
    /// Longest time per output token, in milliseconds; default 50, 0 for no limit.
    #[cfg_attr(feature = "clap", arg(long, value_name = "MS"))]
    pub tpot_ms: Option<f64>,
    /// Share of the GPU memory that may be used.
    #[cfg_attr(feature = "clap", arg(long, value_name = "SHARE", default_value_t = 0.9))]
    pub memory_fraction: f64,
    /// Dollars per GPU-hour; default: the catalogue's.
    #[cfg_attr(feature = "clap", arg(long, value_name = "DOLLARS"))]
    pub price_per_hour: Option<f64>,
    /// Adds a plot of tokens per second and of time per token against concurrency.
    #[cfg_attr(feature = "clap", arg(long))]
    pub sweep: bool,
    /// Prints each term with its formula and source.
    #[cfg_attr(feature = "clap", arg(long))]
    pub explain: bool,
}

/// Arguments of `plan budget`.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
pub struct BudgetArgs {
    /// Budget in operations, as in 3.14e23.
    #[cfg_attr(feature = "clap", arg(long, value_name = "AMOUNT"))]
    pub flops: Option<String>,
    /// Budget in GPU-hours.
    #[cfg_attr(feature = "clap", arg(long, value_name = "AMOUNT"))]
    pub gpu_hours: Option<String>,
    /// Budget in dollars.
    #[cfg_attr(feature = "clap", arg(long, value_name = "AMOUNT"))]
    pub money: Option<String>,
    /// The GPU type, for GPU-hours and money.
    #[cfg_attr(feature = "clap", arg(long, value_name = "NAME", default_value = "h100-sxm"))]
    pub gpu: String,
    /// Model FLOPs utilization, for GPU-hours and money.
    #[cfg_attr(feature = "clap", arg(long, value_name = "SHARE", default_value_t = 0.4))]
    pub mfu: f64,
    /// Dollars per GPU-hour; default: the catalogue's.
    #[cfg_attr(feature = "clap", arg(long, value_name = "DOLLARS"))]
    pub price_per_hour: Option<f64>,
    /// Tokens that the model will serve: finds the smaller model that is cheapest over its life.
    #[cfg_attr(feature = "clap", arg(long, value_name = "AMOUNT"))]
    pub served_tokens: Option<String>,
    /// Predicts the loss of this many parameters.
    #[cfg_attr(feature = "clap", arg(long, value_name = "AMOUNT"))]
    pub parameters: Option<String>,
    /// Predicts the loss at this many tokens; default: what the budget leaves.
    #[cfg_attr(feature = "clap", arg(long, value_name = "AMOUNT"))]
    pub tokens: Option<String>,
    /// Fits a law to a CSV of runs with params, tokens and loss, and uses it.
    #[cfg_attr(feature = "clap", arg(long, value_name = "FILE"))]
    pub fit: Option<String>,
}

/// Arguments of `plan validate`.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
pub struct ValidateArgs {
    /// A CSV of published runs.
    #[cfg_attr(feature = "clap", arg(value_name = "FILE"))]
    pub file: String,
    /// Also fits the constants to all other rows and predicts each row with them.
    #[cfg_attr(feature = "clap", arg(long))]
    pub leave_one_out: bool,
}
