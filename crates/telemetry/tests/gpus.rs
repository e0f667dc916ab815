//! NVML through a stand-in library that is found, opened and asked like the real one.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use drumline_fakes::Library;
use drumline_telemetry::gpu::{Near, NvmlProblem, Profile, Reading, Recovery, Watch, library};

/// Long enough for a machine with much else to do.
const PATIENCE: Duration = Duration::from_secs(30);
const OFTEN: Duration = Duration::from_millis(20);

/// A stand-in with its script, which may be changed while it is used.
struct Fake {
    folder: PathBuf,
    library: PathBuf,
}

impl Fake {
    fn build(library: Library, folder: &Path) -> Self {
        let library = library.build(folder).unwrap();
        Self { folder: folder.to_owned(), library }
    }

    fn say(&self, text: &str) {
        // In place at once: a reader never sees half of it.
        let fresh = self.folder.join("fresh");
        std::fs::write(&fresh, text).unwrap();
        std::fs::rename(fresh, self.folder.join("script")).unwrap();
    }

    fn watch(&self) -> Watch {
        Watch::start(Some(self.library.clone().into_os_string()), OFTEN).unwrap()
    }
}

fn wait(watch: &Watch, what: &str, holds: impl Fn(&Reading) -> bool) -> Arc<Reading> {
    let begin = Instant::now();
    loop {
        if let Some(reading) = watch.latest().filter(|reading| holds(reading)) {
            return reading;
        }
        assert!(begin.elapsed() < PATIENCE, "{what}: {:?}", watch.latest());
        std::thread::sleep(OFTEN);
    }
}

/// Runs `body` in a process of its own: the stand-in finds its script through the environment, which
/// must not be changed in a process with threads.
fn in_own_process(test: &str, body: impl FnOnce(&Fake)) {
    const FOLDER: &str = "DRUMLINE_TEST_FAKE_FOLDER";
    if let Some(folder) = std::env::var_os(FOLDER) {
        let folder = PathBuf::from(folder);
        let library = folder.join(Library::Nvml.file_name());
        return body(&Fake { folder, library });
    }
    let folder = tempfile::tempdir().unwrap();
    let fake = Fake::build(Library::Nvml, folder.path());
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(FOLDER, &fake.folder)
        .env("DRUMLINE_FAKE_NVML", fake.folder.join("script"))
        .status()
        .unwrap();
    assert!(status.success(), "{test} failed in its own process");
}

#[test]
fn healthy_gpus_are_found_and_measured() {
    in_own_process("healthy_gpus_are_found_and_measured", |fake| {
        fake.say(
            "gpus 4\ngpu 1 utilization 37\ngpu 1 sm 80\ngpu 1 tensor 25\n\
             gpu 1 memory_used 1048576\ngpu 1 ecc 3\ngpu 1 throttle 36\n\
             gpu 1 process 4242 777\ngpu 1 remapped 2\n",
        );
        let watch = fake.watch();
        let found = watch.inventory();
        assert_eq!((&*found.versions.driver, &*found.versions.cuda), ("580.159.04", "13.0"));
        assert_eq!(found.gpus.len(), 4);
        let gpu = &found.gpus[1];
        assert_eq!(gpu.model, "NVIDIA H100 80GB HBM3");
        assert!(gpu.uuid.starts_with("GPU-"));
        assert_eq!((gpu.memory_bytes, gpu.capability), (85_520_809_984, Some((9, 0))));
        assert_eq!((gpu.numa_node, found.gpus[3].numa_node), (Some(0), Some(1)));
        assert_eq!(
            found.near,
            [
                (0, 1, Near::NvLink(2)),
                (0, 2, Near::Machine),
                (0, 3, Near::Machine),
                (1, 2, Near::Machine),
                (1, 3, Near::Machine),
                (2, 3, Near::NvLink(2)),
            ]
        );
        assert!(!found.is_one_nvlink_domain());
        // Hardware counters need two looks.
        let reading = wait(&watch, "counters", |r| r.samples[1].profile.sm_active.is_some());
        let sample = &reading.samples[1];
        assert_eq!(sample.utilization, Some(0.37));
        assert_eq!(sample.busy(), Some(0.8), "what multiprocessors do goes before the rest");
        assert_eq!(sample.profile.sm_occupancy, Some(0.4));
        assert_eq!(sample.profile.tensor_active, Some(0.25));
        assert_eq!(sample.profile.pcie_bytes_per_second, [Some(3_145_728.0); 2]);
        assert_eq!(sample.profile.nvlink_bytes_per_second, [Some(5_242_880.0); 2]);
        assert_eq!((sample.power_watts, sample.power_limit_watts), (Some(71.5), Some(700.0)));
        assert_eq!(sample.energy_joules, Some(5.0));
        assert_eq!(sample.temperature_celsius, Some(41.0));
        assert_eq!(sample.memory_temperature_celsius, Some(50.0));
        assert_eq!(sample.sm_hertz, Some(1.98e9));
        assert_eq!(sample.throttled.as_deref(), Some(&["power_cap", "sw_thermal"][..]));
        assert_eq!(sample.ecc.corrected, Some(3));
        assert_eq!(sample.retired_pages, [None, None], "these GPUs remap rows instead");
        assert_eq!(sample.remapped_rows, [Some(2), Some(0)]);
        assert_eq!((sample.remap_failed, sample.recovery), (Some(false), Some(Recovery::None)));
        assert_eq!((sample.processes[0].pid, sample.processes[0].memory_bytes), (4242, Some(777)));
        assert_eq!(sample.lost, None);
    });
}

#[test]
fn blanks_are_no_measurements() {
    in_own_process("blanks_are_no_measurements", |fake| {
        fake.say("gpus 1\ngpu 0 blank 1\ngpu 0 process 1 5\n");
        let watch = fake.watch();
        assert_eq!(watch.inventory().gpus[0].numa_node, None);
        let first = wait(&watch, "a look", |_| true).at;
        let reading = wait(&watch, "another look", |reading| reading.at > first);
        let sample = &reading.samples[0];
        assert_eq!((sample.utilization, sample.memory_busy), (None, None));
        assert_eq!((sample.power_watts, sample.power_limit_watts), (None, None));
        assert_eq!(sample.energy_joules, None);
        assert_eq!((sample.temperature_celsius, sample.memory_temperature_celsius), (None, None));
        assert_eq!((sample.sm_hertz, sample.memory_hertz), (None, None));
        assert_eq!((sample.ecc.corrected, sample.ecc.uncorrected), (None, None));
        assert_eq!(sample.remapped_rows, [None, None]);
        assert_eq!((sample.remap_failed, sample.recovery), (None, None));
        assert_eq!(sample.profile, Profile::default());
        assert_eq!(sample.processes[0].memory_bytes, None);
    });
}

#[test]
fn errors_and_losses_are_told_while_it_runs() {
    in_own_process("errors_and_losses_are_told_while_it_runs", |fake| {
        fake.say("gpus 2\n");
        let watch = fake.watch();
        wait(&watch, "all is well", |r| r.samples.iter().all(|s| s.lost.is_none()));
        assert!(watch.take_errors().is_empty());
        fake.say("gpus 2\nevent 1 79\nevent 1 154\nevent 0 31\ngpu 1 lost 1\n");
        let mut errors = Vec::new();
        let begin = Instant::now();
        while errors.len() < 3 {
            errors.extend(watch.take_errors());
            assert!(begin.elapsed() < PATIENCE, "{errors:?}");
            std::thread::sleep(OFTEN);
        }
        let told: Vec<_> = errors.iter().map(|error| (error.index, error.code)).collect();
        assert_eq!(told, [(1, Some(79)), (1, Some(154)), (0, Some(31))]);
        let reading = wait(&watch, "the loss", |reading| reading.samples[1].lost.is_some());
        assert!(reading.samples[1].lost.as_ref().unwrap().contains("fell off the bus"));
        assert_eq!(reading.samples[1].utilization, None);
        assert_eq!(reading.samples[0].lost, None, "the other one goes on");
    });
}

#[test]
fn instances_are_devices_of_their_own() {
    in_own_process("instances_are_devices_of_their_own", |fake| {
        fake.say("gpus 2\ngpu 0 mig 3\n");
        let watch = fake.watch();
        let gpus = &watch.inventory().gpus;
        let found: Vec<_> = gpus.iter().map(|gpu| (gpu.index, gpu.mig)).collect();
        assert_eq!(found, [(0, Some(0)), (0, Some(1)), (0, Some(2)), (1, None)]);
        assert!(gpus[1].uuid.starts_with("MIG-"));
        assert!(gpus[0].memory_bytes < gpus[3].memory_bytes);
    });
}

#[test]
fn a_driver_that_does_not_answer_is_given_up() {
    in_own_process("a_driver_that_does_not_answer_is_given_up", |fake| {
        fake.say("init hang\n");
        let library = Some(fake.library.clone().into_os_string());
        let problem = Watch::start_within(library, OFTEN, Duration::from_millis(200)).unwrap_err();
        assert!(problem.to_string().contains("does not answer"), "{problem}");
    });
}

#[test]
fn a_driver_that_hangs_later_leaves_an_old_reading() {
    in_own_process("a_driver_that_hangs_later_leaves_an_old_reading", |fake| {
        fake.say("gpus 1\n");
        let watch = fake.watch();
        wait(&watch, "a look", |_| true);
        fake.say("gpus 1\nhang\n");
        let begin = Instant::now();
        // At most one look was under way when it began to hang.
        while watch.latest().unwrap().at.elapsed() < OFTEN * 25 {
            assert!(begin.elapsed() < PATIENCE);
            std::thread::sleep(OFTEN);
        }
        // The thread hangs in the library for good; the process ends all the same.
        std::mem::forget(watch);
    });
}

#[test]
fn drivers_that_refuse_say_why() {
    in_own_process("drivers_that_refuse_say_why", |fake| {
        let open = || library::open(Some(fake.library.as_os_str()));
        for (script, expected) in
            [("init 9", NvmlProblem::NoDriver), ("init 18", NvmlProblem::Mismatch)]
        {
            fake.say(script);
            assert_eq!(open().err(), Some(expected), "{script}");
        }
        fake.say("init 4");
        assert!(matches!(open(), Err(NvmlProblem::Refused(why)) if why.contains("permission")));
        fake.say("gpus 0\n");
        assert!(fake.watch().inventory().gpus.is_empty());
    });
}

#[test]
fn a_missing_library_names_what_was_tried() {
    let problem = library::open(Some("/nowhere/libnvidia-ml.so.1".as_ref())).unwrap_err();
    assert!(problem.is_absent());
    assert!(problem.to_string().contains("/nowhere/libnvidia-ml.so.1"), "{problem}");
    assert!(problem.remedy().contains("driver"));
}

#[test]
fn a_library_of_that_name_that_is_another_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let fake = Fake::build(Library::NvmlForeign, folder.path());
    let problem = library::open(Some(fake.library.as_os_str())).unwrap_err();
    assert!(
        matches!(&problem, NvmlProblem::TooOld { missing, .. } if missing.contains("nvmlInit"))
    );
}

#[test]
fn an_old_library_tells_what_it_knows() {
    let folder = tempfile::tempdir().unwrap();
    let watch = Fake::build(Library::NvmlOld, folder.path()).watch();
    let gpu = &watch.inventory().gpus[0];
    assert_eq!((gpu.memory_bytes, gpu.numa_node, gpu.capability, gpu.mig), (0, None, None, None));
    let reading = wait(&watch, "a look", |_| true);
    let sample = &reading.samples[0];
    assert_eq!((sample.utilization, sample.temperature_celsius), (Some(0.0), Some(41.0)));
    assert_eq!((sample.memory_used_bytes, sample.throttled.as_deref()), (None, None));
    assert_eq!((sample.recovery, sample.remap_failed), (None, None));
    assert!(sample.processes.is_empty());
}
