//! What is installed: NVIDIA's libraries with their versions, and the GPUs that NVML tells of.

use std::time::Duration;

use drumline_cuda::found::{self, Looked};
use drumline_cuda::library::Library;
use drumline_cuda::nccl::{Nccl, NcclProblem};
use drumline_telemetry::gpu::{Gpu, Inventory, Sample, Versions, Watch};

/// Long enough for two looks, which hardware counters need.
const LOOKS: Duration = Duration::from_millis(250);

/// One library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    /// What people call it.
    pub(super) name: &'static str,
    /// What it is for.
    pub(super) purpose: &'static str,
    /// Where it was found; empty: it was not.
    pub(super) file: String,
    /// Its version, where it tells one.
    pub(super) version: String,
    /// What is wrong with it; empty: nothing.
    pub(super) problem: String,
    /// What would help.
    pub(super) remedy: String,
    /// It is there, and cannot be used: that is a failure, and not only an absence.
    pub(super) broken: bool,
}

/// A GPU with the newest look at it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Seen {
    pub(super) gpu: Gpu,
    pub(super) sample: Sample,
}

/// Everything that was found.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Found {
    pub(super) libraries: Vec<Item>,
    /// Where the loader looks, in order, beside its own cache.
    pub(super) search_path: Vec<String>,
    pub(super) versions: Versions,
    pub(super) gpus: Vec<Seen>,
    /// GPUs that do not answer.
    pub(super) silent: Vec<(u32, String)>,
    /// How near pairs of GPUs are.
    pub(super) near: Vec<String>,
}

impl Found {
    /// Looks at the machine.
    pub(super) fn look() -> Self {
        let mut found = Self { search_path: search_path(), ..Self::default() };
        let nvml = match Watch::start(None, LOOKS) {
            Ok(watch) => {
                found.take(&watch);
                let file = found::mapped("libnvidia-ml.so").unwrap_or_default();
                item("NVML", "health and metrics", file, found.versions.nvml.clone(), None)
            }
            Err(problem) => {
                let broken = !problem.is_absent();
                let told = (problem.to_string(), problem.remedy().to_owned(), broken);
                item("NVML", "health and metrics", String::new(), String::new(), Some(told))
            }
        };
        let driver = library(Library::Driver, "driver", "every use of a GPU");
        let nvrtc = library(Library::Nvrtc, "NVRTC", "compiling kernels");
        let cublaslt = library(Library::CublasLt, "cuBLASLt", "matrix products");
        let nccl = match Nccl::open(None) {
            Ok(nccl) => {
                let file = found::mapped("libnccl.so").unwrap_or_else(|| nccl.name().to_owned());
                item("NCCL", COLLECTIVES, file, nccl.version().to_string(), None)
            }
            Err(problem) => {
                let broken = !matches!(problem, NcclProblem::Missing { .. });
                let told = (problem.to_string(), problem.remedy().to_owned(), broken);
                item("NCCL", COLLECTIVES, String::new(), String::new(), Some(told))
            }
        };
        found.libraries = vec![driver, nvml, nvrtc, cublaslt, nccl];
        found
    }

    fn take(&mut self, watch: &Watch) {
        let Inventory { versions, gpus, near, silent } = watch.inventory().clone();
        // The first look and the next; a driver that hangs leaves what there is.
        std::thread::sleep(LOOKS * 3);
        let samples = watch.latest().map(|reading| reading.samples.clone()).unwrap_or_default();
        self.gpus = gpus
            .into_iter()
            .enumerate()
            .map(|(at, gpu)| {
                let lost = Some("it did not answer".to_owned());
                let none = || Sample { lost, ..Sample::default() };
                Seen { gpu, sample: samples.get(at).cloned().unwrap_or_else(none) }
            })
            .collect();
        self.near =
            near.iter().map(|(one, two, near)| format!("{one} and {two}: {near:?}")).collect();
        self.versions = versions;
        self.silent = silent;
    }

    /// Returns what a GPU needs to compute and is missing here.
    pub(super) fn missing_for_compute(&self) -> Vec<&'static str> {
        let needed = ["driver", "NVRTC", "cuBLASLt"];
        let missing = |item: &&Item| needed.contains(&item.name) && !item.problem.is_empty();
        self.libraries.iter().filter(missing).map(|item| item.name).collect()
    }
}

const COLLECTIVES: &str = "collectives between GPUs; without it they go over TCP";

fn item(
    name: &'static str,
    purpose: &'static str,
    file: String,
    version: String,
    problem: Option<(String, String, bool)>,
) -> Item {
    let (problem, remedy, broken) = problem.unwrap_or_default();
    Item { name, purpose, file, version, problem, remedy, broken }
}

fn library(library: Library, name: &'static str, purpose: &'static str) -> Item {
    match found::look(library) {
        Looked::Found { file, version } => item(name, purpose, file, version, None),
        Looked::Missing { tried } => {
            let told = (tried, library.remedy().to_owned(), false);
            item(name, purpose, String::new(), String::new(), Some(told))
        }
    }
}

/// Returns the folders that the loader searches beside its cache.
fn search_path() -> Vec<String> {
    let own = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let own = own.split(':').filter(|folder| !folder.is_empty()).map(str::to_owned);
    own.chain(["/lib", "/usr/lib"].map(str::to_owned)).collect()
}
