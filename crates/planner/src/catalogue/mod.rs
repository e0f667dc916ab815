//! Catalogues of GPUs, networks and models: built in, and extended by texts of the user's own.

mod entry;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use crate::dtype::Dtype;
use crate::error::PlanError;
use crate::model::Model;

use entry::CatalogueFile;

/// What is calibrated, per GPU generation: how far real kernels stay below the datasheet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Share of the matrix peak that large products reach.
    pub matmul_efficiency: f64,
    /// Inner dimension at which a product reaches half of that: prologue and epilogue of a tile.
    pub matmul_k_half: f64,
    /// Share of the memory bandwidth that streaming kernels reach.
    pub memory_efficiency: f64,
    /// Share of the matrix peak that fused attention reaches, forward and backward together.
    pub attention_efficiency: f64,
    /// Time that each kernel adds, in microseconds.
    pub kernel_overhead_us: f64,
    /// Share of the GPU-to-GPU bandwidth that large collectives reach.
    pub link_efficiency: f64,
    /// Latency of one step of a collective inside the domain, in microseconds.
    pub link_latency_us: f64,
    /// Time that a step spends outside the device, in milliseconds: input, logging, the gradient
    /// norm's round trip.
    #[serde(default = "step_overhead_ms")]
    pub step_overhead_ms: f64,
    /// Memory that driver, libraries and the collectives' own buffers take, in 10^9 bytes.
    #[serde(default = "framework_gb")]
    pub framework_gb: f64,
    /// Share of the memory bandwidth that norms, residuals and non-linearities reach; 0: as
    /// `memory_efficiency`. On a CPU they find their data in caches and are bound by arithmetic.
    #[serde(default)]
    pub operator_efficiency: f64,
    /// Where the constants come from.
    pub basis: String,
}

fn step_overhead_ms() -> f64 {
    30.0
}

fn framework_gb() -> f64 {
    3.0
}

/// A GPU type.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// The generation whose calibration it uses.
    pub generation: String,
    /// Device memory in bytes.
    pub memory_bytes: f64,
    /// Device memory bandwidth in bytes/s.
    pub memory_bandwidth: f64,
    /// Dense matrix peak in FLOP/s by format.
    pub peak_flops: BTreeMap<Dtype, f64>,
    /// Bytes/s in one direction to the other GPUs of its domain.
    pub link_bandwidth: f64,
    /// GPUs in a domain.
    pub link_domain: u32,
    /// Devices of a node that compute at one time; 0: all. CPU devices may share fewer cores.
    #[serde(default)]
    pub at_once: u32,
    /// Streaming multiprocessors or their equivalent.
    pub sms: u32,
    /// Board power in watts.
    pub power_w: f64,
    /// US dollars per GPU-hour.
    pub price_per_hour: f64,
    /// Calibrated constants.
    pub calibration: Calibration,
    /// Where the figures come from.
    pub source: String,
}

impl Gpu {
    /// Returns the matrix peak in FLOP/s.
    ///
    /// # Errors
    /// [`PlanError::Invalid`] where the GPU has no such unit, with those it has.
    pub fn peak(&self, dtype: Dtype) -> Result<f64, PlanError> {
        self.peak_flops.get(&dtype).copied().ok_or_else(|| {
            let have: Vec<_> = self.peak_flops.keys().map(|d| d.as_str()).collect();
            PlanError::invalid(
                "dtype",
                format!("{} has no {dtype} matrix units; it has {}", self.name, have.join(", ")),
            )
        })
    }

    /// Returns the 16-bit training format it has: bf16, else fp16, else fp32. On a CPU, which has
    /// one processor here, the engine trains in fp32 unless asked.
    #[must_use]
    pub fn training_dtype(&self) -> Dtype {
        if self.sms == 1 && self.peak_flops.contains_key(&Dtype::Fp32) {
            return Dtype::Fp32;
        }
        [Dtype::Bf16, Dtype::Fp16]
            .into_iter()
            .find(|d| self.peak_flops.contains_key(d))
            .unwrap_or(Dtype::Fp32)
    }
}

/// The network between nodes, and the nodes' shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Further names.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// GPUs in a node.
    pub gpus_per_node: u32,
    /// Gbit/s per GPU in one direction.
    pub nic_gbps: f64,
    /// Share of the line rate that large messages reach.
    pub efficiency: f64,
    /// Latency of one message between nodes, in microseconds.
    pub latency_us: f64,
    /// Relative spread of a node's step time.
    pub straggler: f64,
    /// Where the figures come from.
    pub source: String,
}

impl Network {
    /// Returns the achieved bytes/s per GPU between nodes.
    #[must_use]
    pub fn bandwidth(&self) -> f64 {
        self.nic_gbps * 1e9 / 8.0 * self.efficiency
    }
}

/// GPUs, networks and models by name.
#[derive(Debug, Clone, Default)]
pub struct Catalogue {
    generations: BTreeMap<String, Calibration>,
    gpus: BTreeMap<String, Gpu>,
    networks: BTreeMap<String, Network>,
    models: BTreeMap<String, Model>,
    published_parameters: BTreeMap<String, f64>,
    aliases: BTreeMap<String, String>,
}

impl Catalogue {
    /// Returns the catalogue that the crate carries.
    ///
    /// # Panics
    /// Never on input: the texts are part of the crate, and a test parses them.
    #[must_use]
    pub fn builtin() -> Self {
        let mut catalogue = Self::default();
        for (file, text) in [
            ("gpus.toml", include_str!("../../catalogue/gpus.toml")),
            ("networks.toml", include_str!("../../catalogue/networks.toml")),
            ("models.toml", include_str!("../../catalogue/models.toml")),
        ] {
            if let Err(error) = catalogue.extend_with(file, text) {
                unreachable!("the built-in catalogue is broken: {error}");
            }
        }
        catalogue
    }

    /// Adds the entries of a TOML text, replacing those of the same name.
    ///
    /// # Errors
    /// [`PlanError::Text`] with file, line and column; [`PlanError::UnknownName`] for a generation
    /// that does not exist.
    pub fn extend(mut self, file: &str, text: &str) -> Result<Self, PlanError> {
        self.extend_with(file, text)?;
        Ok(self)
    }

    fn extend_with(&mut self, file: &str, text: &str) -> Result<(), PlanError> {
        let parsed: CatalogueFile = toml::from_str(text).map_err(|error| {
            let (line, column) = position(text, error.span().map_or(0, |span| span.start));
            PlanError::Text {
                file: file.to_owned(),
                line,
                column,
                message: error.message().to_owned(),
            }
        })?;
        let reject = |name: &str, message: String| PlanError::Text {
            file: file.to_owned(),
            line: position(text, text.find(&format!("\"{name}\"")).unwrap_or(0)).0,
            column: 1,
            message,
        };
        for entry in parsed.generation {
            check_calibration(&entry.calibration).map_err(|m| reject(&entry.name, m))?;
            for gpu in self.gpus.values_mut().filter(|g| g.generation == entry.name) {
                gpu.calibration = entry.calibration.clone();
            }
            self.generations.insert(entry.name, entry.calibration);
        }
        for entry in parsed.gpu {
            let calibration = match entry.calibration {
                Some(own) => own,
                None => self.generations.get(&entry.generation).cloned().ok_or_else(|| {
                    PlanError::unknown(
                        "generation",
                        &entry.generation,
                        self.generations.keys().map(String::as_str),
                    )
                })?,
            };
            check_calibration(&calibration).map_err(|m| reject(&entry.name, m))?;
            let positive = [entry.memory_gb, entry.memory_gbs, entry.link_gbs, entry.power_w];
            if positive.iter().any(|x| !x.is_finite() || *x <= 0.0)
                || entry.peak_tflops.is_empty()
                || entry.peak_tflops.values().any(|x| !x.is_finite() || *x <= 0.0)
                || entry.sms == 0
                || entry.link_domain == 0
                || !entry.price_per_hour.is_finite()
                || entry.price_per_hour < 0.0
            {
                return Err(reject(
                    &entry.name,
                    format!("gpu '{}': every figure must be positive and finite", entry.name),
                ));
            }
            for alias in entry.aliases {
                self.aliases.insert(key("gpu", &alias), entry.name.clone());
            }
            self.gpus.insert(
                entry.name.to_lowercase(),
                Gpu {
                    name: entry.name,
                    generation: entry.generation,
                    memory_bytes: entry.memory_gb * 1e9,
                    memory_bandwidth: entry.memory_gbs * 1e9,
                    peak_flops: entry.peak_tflops.into_iter().map(|(d, t)| (d, t * 1e12)).collect(),
                    link_bandwidth: entry.link_gbs * 1e9,
                    link_domain: entry.link_domain,
                    at_once: 0,
                    sms: entry.sms,
                    power_w: entry.power_w,
                    price_per_hour: entry.price_per_hour,
                    calibration,
                    source: entry.source,
                },
            );
        }
        for network in parsed.network {
            if network.gpus_per_node == 0
                || !(0.0..=1e6).contains(&network.nic_gbps)
                || !(0.0..=1.0).contains(&network.efficiency)
                || !(0.0..=1.0).contains(&network.straggler)
                || !(0.0..=1e6).contains(&network.latency_us)
            {
                return Err(reject(
                    &network.name,
                    format!("network '{}': a figure is out of range", network.name),
                ));
            }
            for alias in &network.aliases {
                self.aliases.insert(key("network", alias), network.name.clone());
            }
            self.networks.insert(network.name.to_lowercase(), network);
        }
        for entry in parsed.model {
            for alias in &entry.aliases {
                self.aliases.insert(key("model", alias), entry.name.clone());
            }
            if let Some(parameters) = entry.parameters {
                self.published_parameters.insert(entry.name.to_lowercase(), parameters);
            }
            let model = entry.into_model();
            check_model(&model).map_err(|m| reject(&model.name, m))?;
            self.models.insert(model.name.to_lowercase(), model);
        }
        Ok(())
    }

    /// Looks a GPU up by name or alias, whatever the case.
    ///
    /// # Errors
    /// [`PlanError::UnknownName`] with the nearest names.
    pub fn gpu(&self, name: &str) -> Result<Gpu, PlanError> {
        self.look_up(&self.gpus, "gpu", name)
    }

    /// Looks a network up.
    ///
    /// # Errors
    /// [`PlanError::UnknownName`] with the nearest names.
    pub fn network(&self, name: &str) -> Result<Network, PlanError> {
        self.look_up(&self.networks, "network", name)
    }

    /// Looks a model up.
    ///
    /// # Errors
    /// [`PlanError::UnknownName`] with the nearest names.
    pub fn model(&self, name: &str) -> Result<Model, PlanError> {
        self.look_up(&self.models, "model", name)
    }

    fn look_up<T: Clone>(
        &self,
        map: &BTreeMap<String, T>,
        kind: &'static str,
        name: &str,
    ) -> Result<T, PlanError> {
        let lower = name.trim().to_lowercase();
        let wanted = folded(&lower);
        map.get(&lower)
            .or_else(|| {
                self.aliases.get(&key(kind, &lower)).and_then(|n| map.get(&n.to_lowercase()))
            })
            .or_else(|| map.iter().find(|(n, _)| folded(n) == wanted).map(|(_, value)| value))
            .or_else(|| {
                let prefix = format!("{kind}:");
                let found = self
                    .aliases
                    .iter()
                    .filter_map(|(k, real)| Some((k.strip_prefix(&prefix)?, real)))
                    .find(|(alias, _)| folded(alias) == wanted);
                found.and_then(|(_, real)| map.get(&real.to_lowercase()))
            })
            .cloned()
            .ok_or_else(|| {
                let prefix = format!("{kind}:");
                let aliases = self.aliases.keys().filter_map(|k| k.strip_prefix(&prefix));
                PlanError::unknown(kind, name, map.keys().map(String::as_str).chain(aliases))
            })
    }

    /// Returns the network that nodes of this GPU usually have.
    #[must_use]
    pub fn default_network(&self, gpu: &Gpu) -> Network {
        let name = match gpu.generation.as_str() {
            "pascal" | "volta" => "edr-8x100",
            "hopper" | "cdna3" => "ndr-8x400",
            "blackwell" if gpu.link_domain > 8 => "nvl72",
            "blackwell" => "xdr-8x800",
            "tpu" => "ici-v4",
            "cdna2" => "slingshot-4x200",
            "cpu" => "host",
            "turing" | "ada" => "ethernet-100",
            _ if gpu.link_bandwidth < 100e9 => "ethernet-100",
            _ => "hdr-8x200",
        };
        self.networks.get(name).cloned().unwrap_or_else(|| Network {
            name: "none".to_owned(),
            aliases: Vec::new(),
            gpus_per_node: gpu.link_domain,
            nic_gbps: 0.0,
            efficiency: 1.0,
            latency_us: 0.0,
            straggler: 0.0,
            source: "no catalogue".to_owned(),
        })
    }

    /// Adds or replaces one GPU, for example one made from a measured profile.
    pub fn insert_gpu(&mut self, gpu: Gpu) {
        self.gpus.insert(gpu.name.to_lowercase(), gpu);
    }

    /// Replaces a generation's calibration, on every GPU of it.
    pub fn set_calibration(&mut self, generation: &str, calibration: &Calibration) {
        for gpu in self.gpus.values_mut().filter(|g| g.generation == generation) {
            gpu.calibration = calibration.clone();
        }
        self.generations.insert(generation.to_owned(), calibration.clone());
    }

    /// Returns a generation's calibration.
    #[must_use]
    pub fn calibration(&self, generation: &str) -> Option<&Calibration> {
        self.generations.get(generation)
    }

    /// Returns every GPU, by name.
    pub fn gpus(&self) -> impl Iterator<Item = &Gpu> {
        self.gpus.values()
    }

    /// Returns every network, by name.
    pub fn networks(&self) -> impl Iterator<Item = &Network> {
        self.networks.values()
    }

    /// Returns every model, by name.
    pub fn models(&self) -> impl Iterator<Item = &Model> {
        self.models.values()
    }

    /// Returns the published number of parameters of a model, where the entry states one.
    #[must_use]
    pub fn published_parameters(&self, name: &str) -> Option<f64> {
        self.published_parameters.get(&name.to_lowercase()).copied()
    }
}

/// Leaves of a name what tells it apart: `NVIDIA A100-80GB_SXM` and `a100-80g-sxm` are one.
fn folded(name: &str) -> String {
    let plain: String =
        name.to_lowercase().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '.').collect();
    let plain = plain.replace("nvidia", "").replace("tesla", "");
    let mut out = String::with_capacity(plain.len());
    let mut last = ' ';
    for c in plain.chars() {
        // "80gb" is "80g".
        if !(c == 'b'
            && last == 'g'
            && out.len() > 1
            && out.as_bytes()[out.len() - 2].is_ascii_digit())
        {
            out.push(c);
        }
        last = c;
    }
    out
}

fn key(kind: &str, alias: &str) -> String {
    format!("{kind}:{}", alias.to_lowercase())
}

/// Returns line and column, from 1, of a byte offset.
pub(crate) fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |tail| tail.chars().count()) + 1;
    (line, column)
}

fn check_calibration(c: &Calibration) -> Result<(), String> {
    let shares =
        [c.matmul_efficiency, c.memory_efficiency, c.attention_efficiency, c.link_efficiency];
    let rest = [
        c.matmul_k_half,
        c.kernel_overhead_us,
        c.link_latency_us,
        c.step_overhead_ms,
        c.framework_gb,
    ];
    if shares.iter().all(|x| *x > 0.0 && *x <= 1.0) && rest.iter().all(|x| (0.0..1e6).contains(x)) {
        Ok(())
    } else {
        Err("calibration: efficiencies are in (0, 1], the rest in [0, 1e6)".to_owned())
    }
}

/// Checks that a shape is possible.
///
/// # Errors
/// What is wrong, in words.
pub(crate) fn check_model(model: &Model) -> Result<(), String> {
    // Bounds far above anything built keep every product finite and exact in f64.
    let named = [
        ("layers", model.layers, 100_000),
        ("hidden", model.hidden, 1 << 24),
        ("ffn", model.ffn, 1 << 26),
        ("heads", model.heads, 1 << 20),
        ("kv_heads", model.kv_heads, 1 << 20),
        ("head_dim", model.head_dim, 1 << 20),
        ("vocab", model.vocab, 1 << 28),
        ("context", model.context, 1 << 30),
    ];
    for (field, value, most) in named {
        if value == 0 || value > most {
            return Err(format!("{field} {value} of '{}' must be from 1 to {most}", model.name));
        }
    }
    if model.encoder_layers > 100_000 {
        return Err(format!(
            "{} encoder layers of '{}' are too many",
            model.encoder_layers, model.name
        ));
    }
    let mut widths = Vec::new();
    if let Some(moe) = model.moe {
        widths.extend([moe.experts, moe.top_k, moe.expert_ffn, moe.shared_experts]);
    }
    if let Some(mla) = model.mla {
        widths.extend([mla.q_rank, mla.kv_rank, mla.rope_dim, mla.nope_dim, mla.value_dim]);
    }
    if let Some(wide) = widths.into_iter().find(|w| *w > 1 << 24) {
        return Err(format!(
            "{wide} in the mixture or attention of '{}' is above 2^24",
            model.name
        ));
    }
    if !model.heads.is_multiple_of(model.kv_heads) {
        return Err(format!(
            "heads {} of '{}' is not divisible by kv_heads {}",
            model.heads, model.name, model.kv_heads
        ));
    }
    if let Some(moe) = model.moe
        && (moe.experts == 0
            || moe.top_k == 0
            || moe.top_k > moe.experts
            || moe.expert_ffn == 0
            || moe.dense_layers > model.layers)
    {
        return Err(format!(
            "mixture of '{}': {} experts, top_k {}, expert_ffn {}, dense_layers {} is impossible",
            model.name, moe.experts, moe.top_k, moe.expert_ffn, moe.dense_layers
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_counts_to_its_published_size() {
        let catalogue = Catalogue::builtin();
        let mut seen = 0;
        for model in catalogue.models() {
            let Some(published) = catalogue.published_parameters(&model.name) else { continue };
            let error = model.parameters() / published - 1.0;
            // Papers round their titles ("22B"); released weights are exact.
            assert!(error.abs() < 0.03, "{}: {} for {published}", model.name, model.parameters());
            seen += 1;
        }
        assert!(seen > 70, "{seen}");
    }

    #[test]
    fn released_weights_are_counted_exactly() {
        let catalogue = Catalogue::builtin();
        for (name, parameters) in [
            ("gpt2", 124_439_808.0),
            ("gpt2-xl", 1_557_611_200.0),
            ("llama2-70b", 68_976_648_192.0),
            ("llama3-8b", 8_030_261_248.0),
            ("llama3-405b", 405_853_388_800.0),
            ("mixtral-8x7b", 46_702_792_704.0),
            ("qwen2.5-7b", 7_615_616_512.0),
            ("yi-34b", 34_388_917_248.0),
        ] {
            assert_eq!(catalogue.model(name).unwrap().parameters(), parameters, "{name}");
        }
    }

    #[test]
    fn active_parameters_of_mixtures_match_their_reports() {
        let catalogue = Catalogue::builtin();
        for (name, active) in [
            ("mixtral-8x7b", 12.9e9),
            ("mixtral-8x22b", 39.1e9),
            ("deepseek-v3", 37.0e9),
            ("deepseek-v2", 21.4e9),
            ("qwen3-235b-a22b", 22.2e9),
        ] {
            let counted = catalogue.model(name).unwrap().active_parameters();
            assert!((counted / active - 1.0).abs() < 0.03, "{name}: {counted}");
        }
    }

    #[test]
    fn a_user_text_extends_and_replaces() {
        let text = r#"
[[gpu]]
name = "x1"
generation = "hopper"
memory_gb = 96.0
memory_gbs = 4000.0
peak_tflops = { bf16 = 1000.0 }
link_gbs = 400.0
link_domain = 8
sms = 120
power_w = 600.0
price_per_hour = 1.5
source = "ours"
"#;
        let catalogue = Catalogue::builtin().extend("ours.toml", text).unwrap();
        assert_eq!(catalogue.gpu("X1").unwrap().memory_bytes, 96e9);
        assert!(catalogue.gpu("X1").unwrap().peak(Dtype::Fp8).is_err());
    }

    #[test]
    fn a_broken_text_names_file_line_and_column() {
        let error = Catalogue::builtin().extend("ours.toml", "[[gpu]]\nname = 3\n").unwrap_err();
        assert!(error.to_string().starts_with("ours.toml:2:8: "), "{error}");
        for name in ["NVIDIA A100-80GB", "A100_80GB_SXM", "a100-sxm4-80gb", "A100"] {
            assert_eq!(Catalogue::builtin().gpu(name).unwrap().name, "a100-80g", "{name}");
        }
        assert_eq!(Catalogue::builtin().model("Llama-3-8B").unwrap().name, "llama3-8b");
        let error = Catalogue::builtin().model("gpt3-175").unwrap_err();
        assert!(error.to_string().contains("gpt3-175b"), "{error}");
    }
}
