//! `parallelism: auto`: the split of a training run for a cluster as it is.

use drumline_spec::{DeviceKind, JobSpec, Parallelism, SplitChoice, Work};

use crate::catalogue::{Catalogue, Dtype, Gpu, check_model};
use crate::error::PlanError;
use crate::model::Model;
use crate::search::{Candidate, Pins, Request, best};
use crate::split::{Batch, Machines, Stack};

/// A split is preferred to one of fewer devices only where it is faster by this share.
const WORTH: f64 = 0.02;

/// Devices that a job may have.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Supply {
    /// How many on each node.
    pub per_node: Vec<u32>,
    /// The maker's name for them.
    pub model: String,
    /// Memory of the smallest, in bytes.
    pub memory_bytes: f64,
    /// Measured matmul rate of the slowest in FLOP/s; 0: not known.
    pub matmul_flops: f64,
    /// Devices of a node that compute at one time, where its devices share fewer cores; 0: all.
    pub at_once: u32,
    /// What they are, for messages: `free now`, `healthy`.
    pub what: &'static str,
}

impl Supply {
    /// Returns the number of devices.
    #[must_use]
    pub fn devices(&self) -> u32 {
        self.per_node.iter().sum()
    }

    /// Returns how many groups of `size` devices fit, each inside one node.
    fn groups(&self, size: u32) -> u32 {
        self.per_node.iter().map(|n| n / size.max(1)).sum()
    }

    /// Describes the devices as the planner knows them: a catalogue's entry, with what the agents
    /// measured in place of its figures.
    fn machines(&self, kind: DeviceKind) -> Result<Machines, PlanError> {
        let catalogue = Catalogue::builtin();
        let mut gpu = match kind {
            DeviceKind::Cpu => catalogue.gpu("cpu")?,
            DeviceKind::Gpu => find(&catalogue, &self.model, self.memory_bytes)?,
        };
        if self.memory_bytes > 0.0 {
            gpu.memory_bytes = self.memory_bytes;
        }
        if kind == DeviceKind::Cpu && self.matmul_flops > 0.0 {
            // The measured rate is what the best product reaches.
            let peak = self.matmul_flops / gpu.calibration.matmul_efficiency;
            gpu.peak_flops = [(Dtype::Fp32, peak)].into();
        }
        gpu.at_once = self.at_once;
        let mut network = catalogue.default_network(&gpu);
        network.gpus_per_node = self.per_node.iter().copied().max().unwrap_or(1);
        Ok(Machines { gpu, network })
    }
}

/// Finds the GPU that a driver calls `model`: the entry whose first word is in that name, of the
/// nearest memory.
fn find(catalogue: &Catalogue, model: &str, memory_bytes: f64) -> Result<Gpu, PlanError> {
    let told = model.to_lowercase();
    let words = |gpu: &Gpu| -> Vec<String> { gpu.name.split('-').map(str::to_owned).collect() };
    let distance = |gpu: &Gpu| -> f64 {
        let unmatched = words(gpu).iter().filter(|word| !told.contains(word.as_str())).count();
        let memory =
            if memory_bytes > 0.0 { (gpu.memory_bytes / memory_bytes).ln().abs() } else { 0.0 };
        // A card for a PCIe slot says so in its name; a module says `SXM`, or nothing.
        let slot = gpu.name.contains("pcie") && !told.contains("pcie");
        memory + 0.01 * unmatched as f64 + if slot { 0.02 } else { 0.0 }
    };
    catalogue
        .gpus()
        .filter(|gpu| words(gpu).first().is_some_and(|word| told.contains(word.as_str())))
        .min_by(|a, b| distance(a).total_cmp(&distance(b)))
        .cloned()
        .ok_or_else(|| {
            PlanError::invalid(
                "spec.parallelism",
                format!("the planner does not know the device {model:?}; give the split yourself"),
            )
        })
}

/// Chooses the split of a job with `parallelism: auto`: the fastest that a manifest can express,
/// its tensor groups each inside one node, on at most `ranks_max` of the devices. Where fewer
/// devices are about as fast, fewer are taken. Returns the job with the split, and says why.
///
/// A job whose split is given is returned as it is.
///
/// # Errors
/// [`PlanError`] with what is short and by how much, and the nearest that works.
pub fn resolve(spec: &JobSpec, supply: &Supply, ranks_max: u32) -> Result<JobSpec, PlanError> {
    let (SplitChoice::Auto { micro_is_given }, Work::TrainingJob(job)) = (&spec.split, &spec.work)
    else {
        return Ok(spec.clone());
    };
    if supply.devices() == 0 {
        return Err(PlanError::invalid(
            "spec.parallelism",
            format!(
                "auto has no {} device that is {}; start agents that have some, or give the split \
                 yourself",
                spec.device.as_str(),
                supply.what
            ),
        ));
    }
    let model = Model { name: spec.name.clone(), ..Model::from(&job.model) };
    check_model(&model).map_err(|message| PlanError::invalid("spec.model", message))?;
    let machines = supply.machines(spec.device)?;
    let batch = Batch {
        sequence: job.sequence,
        global: job.global_batch,
        dtype: machines.gpu.training_dtype(),
        stack: Stack::Native,
    };
    let micro = micro_is_given.then_some(job.micro_batch);
    let mut found: Vec<(Candidate, String)> = Vec::new();
    let mut refused: Option<PlanError> = None;
    for tensor in 1..=supply.per_node.iter().copied().max().unwrap_or(0) {
        let shares_rows = job.memory.sequence_parallel && tensor > 1;
        if !job.model.check(tensor, 1).is_empty()
            || shares_rows && !job.sequence.is_multiple_of(tensor)
        {
            continue;
        }
        let most = supply.groups(tensor).min(ranks_max / tensor);
        for groups in products(job.model.layers, job.global_batch, most) {
            let pins = Pins {
                tensor: Some(tensor),
                micro_batch: micro,
                sequence_parallel: Some(shares_rows),
                manifest_only: true,
                ..crate::manifest::pins(job.memory)
            };
            let request =
                Request { model: &model, machines: &machines, batch, pins, memory_fraction: 0.94 };
            match best(&request, tensor * groups) {
                Ok(best) => found.push((best.best, best.why)),
                Err(error) => refused = Some(nearer(refused, error)),
            }
        }
    }
    found.sort_by(|(a, _), (b, _)| a.time.step.total_cmp(&b.time.step));
    let fastest = found.first().map_or(f64::INFINITY, |(best, _)| best.time.step);
    let worth = found
        .iter()
        .filter(|(c, _)| c.time.step <= fastest * (1.0 + WORTH))
        .min_by_key(|(c, _)| c.split.gpus());
    let Some((chosen, _)) = worth else {
        return Err(refused.unwrap_or_else(|| {
            PlanError::invalid("spec.parallelism", "auto finds no split of this model")
        }));
    };
    let split = chosen.split;
    let parallelism =
        Parallelism { tensor: split.tensor, pipeline: split.pipeline, data: split.data };
    let shape = |c: &Candidate| (c.split.tensor, c.split.pipeline, c.split.data);
    let second = found.iter().find(|(c, _)| shape(c) != shape(chosen));
    let why = format!(
        "tensor {} x pipeline {} x data {}, micro-batch {}, chosen for {} of {} {} devices {}: {} a step and {:.2} GiB per device expected{}",
        split.tensor,
        split.pipeline,
        split.data,
        split.micro_batch,
        split.gpus(),
        supply.devices(),
        spec.device.as_str(),
        supply.what,
        seconds(chosen.time.step),
        chosen.bytes() / f64::from(1 << 30),
        second.map_or_else(
            || "; no other split fits".to_owned(),
            |(c, _)| format!(
                "; next tensor {} x pipeline {} x data {} at {}",
                c.split.tensor,
                c.split.pipeline,
                c.split.data,
                seconds(c.time.step)
            )
        ),
    );
    let mut job = job.clone();
    job.parallelism = parallelism;
    job.micro_batch = split.micro_batch;
    Ok(JobSpec { split: SplitChoice::Chosen { why }, work: Work::TrainingJob(job), ..spec.clone() })
}

/// Returns every product of a divisor of `layers` and one of `batch` up to `most`, ascending.
fn products(layers: u32, batch: u32, most: u32) -> Vec<u32> {
    let divisors = |n: u32| (1..=n.min(most)).filter(move |d| n.is_multiple_of(*d));
    let mut list: Vec<u32> = divisors(layers)
        .flat_map(|p| divisors(batch).filter_map(move |d| p.checked_mul(d)))
        .filter(|n| *n <= most)
        .collect();
    list.sort_unstable();
    list.dedup();
    list
}

/// Keeps the refusal that is nearer to working: least memory short, or the first.
fn nearer(old: Option<PlanError>, new: PlanError) -> PlanError {
    let short = |error: &PlanError| match error {
        PlanError::DoesNotFit { short_gib, .. } => *short_gib,
        _ => f64::INFINITY,
    };
    match old {
        Some(old) if short(&old) <= short(&new) => old,
        _ => new,
    }
}

fn seconds(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.1} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(layers: u32, hidden: u32, batch: &str) -> JobSpec {
        let text = format!(
            "apiVersion: drumline.dev/v1alpha1\nkind: TrainingJob\nmetadata: {{name: t}}\nspec:\n  \
             model: {{family: llama, layers: {layers}, hidden: {hidden}, ffn: {ffn}, heads: 8, \
             kvHeads: 4, vocab: 4096, context: 256}}\n  data: {{path: /d}}\n  parallelism: auto\n  \
             batch: {batch}\n  steps: 100\n",
            ffn = 3 * hidden,
        );
        drumline_spec::manifest::parse(&text, "t.yaml").unwrap().remove(0)
    }

    fn cpus(per_node: &[u32]) -> Supply {
        Supply {
            per_node: per_node.to_vec(),
            memory_bytes: 4e9,
            matmul_flops: 80e9,
            what: "free now",
            ..Supply::default()
        }
    }

    fn split(spec: &JobSpec) -> (Parallelism, u32) {
        let Work::TrainingJob(job) = &spec.work else { panic!("{spec:?}") };
        (job.parallelism, job.micro_batch)
    }

    #[test]
    fn a_split_is_legal_fits_the_nodes_and_says_why() {
        for per_node in [vec![1], vec![2], vec![4, 4], vec![3, 3], vec![7], vec![1, 1, 1, 5]] {
            let supply = cpus(&per_node);
            let spec = resolve(&job(6, 512, "{global: 24}"), &supply, 2000).unwrap();
            let (parallelism, micro) = split(&spec);
            let Parallelism { tensor, pipeline, data } = parallelism;
            assert!(pipeline * data <= supply.groups(tensor), "{per_node:?} {parallelism:?}");
            assert_eq!(24 % (data * micro), 0);
            assert_eq!((6 % pipeline, 8 % tensor, 4 % tensor), (0, 0, 0));
            let SplitChoice::Chosen { why } = &spec.split else { panic!("{:?}", spec.split) };
            assert!(why.contains("free now") && why.contains("a step"), "{why}");
            // Chosen once: a second time nothing is chosen again.
            assert_eq!(resolve(&spec, &supply, 2000).unwrap(), spec);
        }
    }

    #[test]
    fn more_devices_are_taken_where_they_help_and_shared_cores_do_not() {
        let spec = job(8, 1024, "{global: 32}");
        let (on_four, _) = split(&resolve(&spec, &cpus(&[4]), 2000).unwrap());
        assert_eq!(on_four.world_size(), 4);
        let shared = Supply { at_once: 1, ..cpus(&[4]) };
        let (on_one_core, _) = split(&resolve(&spec, &shared, 2000).unwrap());
        assert_eq!(on_one_core.world_size(), 1);
    }

    #[test]
    fn a_given_micro_batch_is_kept() {
        let spec = resolve(&job(6, 512, "{global: 24, micro: 3}"), &cpus(&[4]), 2000).unwrap();
        assert_eq!(split(&spec).1, 3);
    }

    #[test]
    fn what_is_short_is_said() {
        let error = resolve(&job(6, 512, "{global: 8}"), &cpus(&[]), 2000).unwrap_err();
        assert!(error.to_string().contains("no cpu device that is free now"), "{error}");
        let error = resolve(&job(48, 2048, "{global: 8}"), &cpus(&[2, 2]), 2000).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("GiB short") && text.contains("nearest that works"), "{text}");
    }

    #[test]
    fn a_drivers_name_finds_its_entry() {
        let catalogue = Catalogue::builtin();
        for (told, gib, name) in [
            ("NVIDIA H100 80GB HBM3", 80.0, "h100-sxm"),
            ("NVIDIA H100 PCIe", 80.0, "h100-pcie"),
            ("NVIDIA H200", 141.0, "h200"),
            ("NVIDIA A100-SXM4-80GB", 80.0, "a100-80g"),
            ("NVIDIA A100-SXM4-40GB", 40.0, "a100-40g"),
            ("Tesla V100-SXM2-32GB", 32.0, "v100-32g"),
            ("Tesla T4", 15.0, "t4"),
        ] {
            let gpu = find(&catalogue, told, gib * f64::from(1 << 30)).unwrap();
            assert!(gpu.name.starts_with(name), "{told}: {}", gpu.name);
        }
        assert!(find(&catalogue, "Unheard 9000", 1e9).is_err());
    }
}
