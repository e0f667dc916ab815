//! Jobs that compute on GPUs, under the real agent, control plane and gateway. The GPUs are stand-ins:
//! NVML's names them, and libcuda's, NVRTC's and cuBLASLt's run the kernels' own sources on the
//! processor (crate `fakes`). What passes here has **not** run on a GPU.
//!
//! A rank finds the libraries as it would find the real ones: by `LD_LIBRARY_PATH`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use drumline_fakes::{BuildError, emulated};
use serde_json::Value;

use crate::cluster::{Cluster, DRUMLINE, kill, losses};

/// Against the processor in f32: only the order of additions differs, over a few steps.
const TOLERANCE: f32 = 1e-3;

/// Every stand-in, and a script for NVML's.
struct Machine {
    libraries: PathBuf,
    folder: tempfile::TempDir,
}

impl Machine {
    /// A machine whose GPUs are as the script says. Says why when there cannot be one.
    fn new(test: &str, script: &str) -> Option<Self> {
        static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
        let built = BUILT.get_or_init(|| {
            match emulated::build_all(Path::new(env!("CARGO_TARGET_TMPDIR"))) {
                Ok(libraries) => Ok(libraries),
                Err(error @ BuildError::NoCompiler { .. }) => Err(error.to_string()),
                Err(error) => panic!("{error}"),
            }
        });
        let libraries = match built {
            Ok(libraries) => libraries.clone(),
            Err(why) => {
                eprintln!("skipped: {test}: {why}");
                return None;
            }
        };
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("script"), script).expect("a file");
        let machine = Self { libraries, folder };
        // Kernels are compiled once, so that no rank has to wait for another's compiler.
        static COMPILED: OnceLock<()> = OnceLock::new();
        COMPILED.get_or_init(|| {
            let mut command = machine.command(Path::new(DRUMLINE));
            let (code, told, errors) = run(command.arg("doctor-gpu"));
            assert_eq!(code, Some(0), "{told}\n{errors}");
        });
        Some(machine)
    }

    fn environment(&self) -> Vec<(&'static str, OsString)> {
        vec![
            ("LD_LIBRARY_PATH", self.libraries.clone().into()),
            ("DRUMLINE_FAKE_NVML", self.folder.path().join("script").into()),
            // Never the user's own: what is kept here is no code for a GPU.
            ("XDG_CACHE_HOME", self.libraries.join("cache").into()),
        ]
    }

    fn cluster(&self, more: &[(&str, &str)]) -> Cluster {
        Cluster::start_with(1, 2, |up| {
            up.envs(self.environment()).envs(more.iter().copied());
        })
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.envs(self.environment());
        command
    }
}

/// A model as small as can be split; `resources` say on what.
fn training(name: &str, (tensor, pipeline, data): (u32, u32, u32), resources: &str) -> String {
    format!(
        "apiVersion: drumline.dev/v1alpha1
kind: TrainingJob
metadata:
  name: {name}
spec:
  model: {{family: llama, layers: 2, hidden: 32, ffn: 64, heads: 4, kvHeads: 2, vocab: 512, context: 32}}
  data: {{path: data/docs}}
  parallelism: {{tensor: {tensor}, pipeline: {pipeline}, data: {data}}}
  batch: {{global: 4, micro: 1, sequence: 16}}
  steps: 12
  seed: 3
  learningRate: {{peak: 1e-3, warmupSteps: 3}}
  checkpoint: {{intervalSteps: 3, keep: 2}}
  eval: {{sequences: 2}}
  restarts: {{limit: 5, backoff: 50ms}}
  resources: {resources}
"
    )
}

fn log(cluster: &Cluster, id: &str) -> String {
    String::from_utf8_lossy(&cluster.run(&["logs", id]).stdout).into_owned()
}

/// Waits for a job's end; panics with its log when it did not succeed.
fn succeed(cluster: &Cluster, id: &str) {
    let job = cluster.wait_long(id);
    assert_eq!(job["phase"], "succeeded", "{job:#}\n{}", log(cluster, id));
}

/// Trains the model on the processor; returns step and loss, as bits.
fn losses_on_cpu(cluster: &Cluster) -> Vec<(u64, u32)> {
    let id = cluster.submit(&training("cpu", (1, 1, 1), "{device: cpu}"));
    succeed(cluster, &id);
    losses(cluster, &id)
}

/// Panics unless two runs lost the same at every step, but for rounding.
fn assert_near(what: &str, got: &[(u64, u32)], want: &[(u64, u32)]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for ((step, got), (other, want)) in got.iter().zip(want) {
        let (got, want) = (f32::from_bits(*got), f32::from_bits(*want));
        assert_eq!(step, other, "{what}");
        let off = (got - want).abs() / want;
        assert!(off < TOLERANCE, "{what}, step {step}: {got} on the GPUs, {want} on the processor");
    }
}

#[test]
fn a_model_is_trained_on_gpus_survives_a_kill_and_is_served() {
    const TEST: &str = "a_model_is_trained_on_gpus_survives_a_kill_and_is_served";
    let Some(machine) = Machine::new(TEST, "gpus 2\n") else { return };
    let cluster = machine.cluster(&[]);
    cluster.build_data();
    let want = losses_on_cpu(&cluster);
    assert_eq!(want.len(), 12);

    let slowly = cluster.slowly();
    let id = cluster.submit(&training("tensor", (2, 1, 1), "{device: gpu}"));
    let job = cluster.wait_for_long(&id, "a checkpoint", |job| {
        job["training"]["checkpoint_step"].as_u64().unwrap_or(0) > 0
    });
    let devices: Vec<_> = (0..2).map(|rank| job["placement"][rank]["device"].as_u64()).collect();
    // The processor's devices come first.
    assert_eq!(devices, [Some(2), Some(3)], "{job:#}");
    kill(job["placement"][1]["pid"].as_u64().expect("a pid") as u32);
    drop(slowly);
    succeed(&cluster, &id);
    let job = cluster.job(&id);
    assert!(job["restarts"].as_u64() >= Some(1), "{job:#}");
    let text = log(&cluster, &id);
    assert!(text.contains("emulated device (no GPU), compute capability 9.0"), "{text}");
    assert!(text.contains("collectives between GPUs: over NCCL 2.30.4"), "{text}");
    assert!(text.contains("continues from step"), "{text}");
    assert_near("tensor 2, killed once", &losses(&cluster, &id), &want);

    // Served on a GPU, it says what it says on the processor.
    let checkpoint = job["training"]["checkpoint_path"].as_str().unwrap().to_owned();
    let said: Vec<String> = ["cpu", "gpu"]
        .into_iter()
        .map(|device| {
            let served = cluster.submit(&format!(
                "apiVersion: drumline.dev/v1alpha1
kind: ModelService
metadata: {{name: on-{device}}}
spec: {{model: {checkpoint:?}, servedName: on-{device}, resources: {{device: {device}}}}}
"
            ));
            let name = format!("on-{device}");
            let wait = ["complete", "The control plane", "--model", &name, "--max-tokens", "8"];
            cluster.wait_for_long(&served, "it is ready", |job| job["phase"] == "running");
            let mut asked = cluster.run(&[&wait[..], &["--temperature", "0"]].concat());
            // The gateway learns of a service a moment after the control plane does.
            for _ in 0..600 {
                if asked.status.success() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(100));
                asked = cluster.run(&[&wait[..], &["--temperature", "0"]].concat());
            }
            let told = String::from_utf8_lossy(&asked.stderr);
            assert!(asked.status.success(), "{told}\n{}", log(&cluster, &served));
            String::from_utf8_lossy(&asked.stdout).into_owned()
        })
        .collect();
    assert_eq!(said[0], said[1]);
    cluster.stop();
}

#[test]
fn ranks_that_share_a_gpu_meet_in_host_memory_and_all_splits_learn_the_same() {
    const TEST: &str = "ranks_that_share_a_gpu_meet_in_host_memory_and_all_splits_learn_the_same";
    let Some(machine) = Machine::new(TEST, "gpus 2\n") else { return };
    let cluster = machine.cluster(&[]);
    cluster.build_data();
    let want = losses_on_cpu(&cluster);
    for (name, split, resources, way) in [
        ("data", (1, 1, 2), "{device: gpu}", "over NCCL 2.30.4"),
        ("pipeline", (1, 2, 1), "{device: gpu}", "over NCCL 2.30.4"),
        // Four halves of two GPUs.
        ("both", (2, 1, 2), "{device: gpu, share: 500}", "through host memory, pinned: ranks"),
    ] {
        let id = cluster.submit(&training(name, split, resources));
        succeed(&cluster, &id);
        let text = log(&cluster, &id);
        assert!(text.contains(&format!("collectives between GPUs: {way}")), "{name}: {text}");
        assert_near(name, &losses(&cluster, &id), &want);
    }
    cluster.stop();
}

#[test]
fn a_collective_that_stands_still_ends_its_rank_with_a_record() {
    const TEST: &str = "a_collective_that_stands_still_ends_its_rank_with_a_record";
    let Some(machine) = Machine::new(TEST, "gpus 2\n") else { return };
    let script = machine.folder.path().join("nccl");
    let cluster = machine.cluster(&[
        ("DRUMLINE_FAKE_NCCL", script.to_str().expect("UTF-8")),
        ("DRUMLINE_COLLECTIVE_DEADLINE_MS", "10000"),
    ]);
    cluster.build_data();
    for (name, fault, record) in [
        ("init", "init hang\n", "init number 1 of group tensor, f32[0], has made no progress"),
        // Two all-reduces of a layer's activations, and then nothing.
        ("stall", "stall 2\n", "of group tensor, f32[512], has made no progress"),
    ] {
        std::fs::write(&script, fault).expect("a file");
        let manifest = training(name, (2, 1, 1), "{device: gpu}").replace("limit: 5", "limit: 0");
        let id = cluster.submit(&manifest);
        let job = cluster.wait_long(&id);
        assert_eq!(job["phase"], "failed", "{job:#}");
        let text = log(&cluster, &id);
        let whole = format!("collective watchdog: job {id} attempt 1 rank ");
        assert!(text.contains(&whole) && text.contains(record), "{name}: {text}");
    }
    // An error that the library tells later ends the rank in its own words.
    std::fs::write(&script, "async 6 3\n").expect("a file");
    let manifest = training("async", (2, 1, 1), "{device: gpu}").replace("limit: 5", "limit: 0");
    let id = cluster.submit(&manifest);
    let job = cluster.wait_long(&id);
    assert_eq!(job["phase"], "failed", "{job:#}");
    let text = log(&cluster, &id);
    assert!(text.contains("remote process exited or there was a network error"), "{text}");
    cluster.stop();
}

/// Runs a program on a machine; returns its exit code and what it wrote.
fn run(command: &mut Command) -> (Option<i32>, String, String) {
    let output = command.output().expect("it starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn the_doctor_tests_every_gpu_in_a_process_of_its_own() {
    const TEST: &str = "the_doctor_tests_every_gpu_in_a_process_of_its_own";
    let Some(machine) = Machine::new(TEST, "gpus 2\n") else { return };
    let doctor = |fault: Option<&str>| {
        let mut command = machine.command(Path::new(DRUMLINE));
        command.args(["doctor", "--require-gpu", "--output", "json"]);
        if let Some(fault) = fault {
            command.env("DRUMLINE_FAKE_CUDA", fault);
        }
        let (code, report, told) = run(&mut command);
        let report: Value = serde_json::from_str(&report).unwrap_or_else(|_| panic!("{told}"));
        (code, report)
    };
    let (code, report) = doctor(None);
    assert_eq!(code, Some(0), "{report:#}");
    for gpu in 1..3 {
        let device = &report["devices"][gpu];
        assert_eq!(device["verdict"], "good", "{device:#}");
        let checks = device["checks"].as_array().unwrap();
        let names: Vec<_> = checks.iter().map(|check| check["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["driver", "matmul, bf16", "memory copy", "training"]);
        assert!(checks[1]["value"].as_f64() > Some(0.0) && checks[2]["value"].as_f64() > Some(0.0));
        let compared = checks[3]["message"].as_str().unwrap();
        assert!(compared.contains("the processor and the GPU differ by"), "{compared}");
    }
    let together = &report["devices"][3];
    assert_eq!(together["verdict"], "good", "{together:#}");
    assert!(together.to_string().contains("between 2 GPUs, over NCCL 2.30.4"), "{together:#}");
    // A GPU that computes nothing any more: its verdict says so, and the processor's is its own.
    let (code, report) = doctor(Some("launch-fails=5"));
    assert_eq!(code, Some(1), "{report:#}");
    assert_eq!(report["devices"][0]["verdict"], "good", "{report:#}");
    for gpu in 1..3 {
        let device = &report["devices"][gpu];
        assert_eq!(device["verdict"], "bad", "{device:#}");
        assert!(device.to_string().contains("CUDA_ERROR_LAUNCH_FAILED"), "{device:#}");
    }
}

#[test]
fn every_line_of_the_gpu_script_runs() {
    const TEST: &str = "every_line_of_the_gpu_script_runs";
    let Some(machine) = Machine::new(TEST, "gpus 2\n") else { return };
    let folder = machine.folder.path().join("gpu");
    std::fs::create_dir_all(folder.join("tests")).expect("a folder");
    std::os::unix::fs::symlink(DRUMLINE, folder.join("drumline")).expect("a link");
    std::fs::write(folder.join("commit"), "a test\n").expect("a file");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/gpu/run");
    let mut command = machine.command(&script);
    // Slow, on a machine that does much else: what runs is asked for, not how fast.
    command.env("GPU_SECONDS", "1500");
    command.arg("--emulated").arg(&machine.libraries).arg(&folder);
    let (code, told, errors) = run(&mut command);
    let report = folder.join("report");
    let results = std::fs::read_to_string(report.join("results.jsonl")).unwrap_or_default();
    assert_eq!(code, Some(0), "{told}\n{errors}\n{results}");
    let outcomes: std::collections::BTreeMap<String, String> = results
        .lines()
        .map(|line| {
            let one: Value = serde_json::from_str(line).expect("JSON");
            let word = |key: &str| one[key].as_str().expect("text").to_owned();
            (format!("{} {}", word("part"), word("name")), word("outcome"))
        })
        .collect();
    for name in [
        "tests doctor",
        "equivalence splits",
        "bench train-gpt2-124m",
        "bench train-llama-1.3b",
        "bench collective",
        "bench serve",
        "bench profile",
    ] {
        assert_eq!(outcomes.get(name).map(String::as_str), Some("passed"), "{name}: {results}");
    }
    let written = std::fs::read_to_string(report.join("emulated.md")).expect("a report");
    assert!(written.contains("**No GPU was used**"), "{written}");
    assert!(!report.join("benchmarks-gpu.md").exists(), "nothing looks like a card's report");
}
