//! NCCL through a stand-in library that really communicates, on host memory.
#![allow(
    unsafe_code,
    reason = "a stand-in library is loaded and given addresses, as the real one is"
)]

use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use drumline_collective::conformance::{self, Shared};
use drumline_collective::{CollectiveError, ReduceOp, local};
use drumline_cuda::nccl::{
    Channel, Exchange, GroupOptions, Nccl, NcclError, NcclGroup, NcclProblem, Peers, Place, Rank,
    Record, Watchdog,
};
use drumline_fakes::Library;

/// Far longer than anything here takes, on a machine with much else to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// Tells how much work a stream still has.
type Pending = unsafe extern "C" fn(*mut c_void) -> i64;

/// Host memory and a stream that the stand-in counts its work by.
struct HostPlace {
    /// Its address names the stream.
    stream: Box<u64>,
    pending: Pending,
    _library: Arc<libloading::Library>,
}

// SAFETY: addresses are those of allocations that live until they are freed.
unsafe impl Place for HostPlace {
    fn bind(&self) -> Result<(), String> {
        Ok(())
    }

    fn stream(&self) -> *mut c_void {
        std::ptr::from_ref(&*self.stream).cast_mut().cast()
    }

    fn after_compute(&self) -> Result<(), String> {
        Ok(())
    }

    fn before_compute(&self) -> Result<(), String> {
        Ok(())
    }

    fn is_idle(&self) -> Result<bool, String> {
        // SAFETY: the function takes any pointer.
        Ok(unsafe { (self.pending)(self.stream()) } == 0)
    }

    unsafe fn copy_computed(&self, from: u64, to: u64, elements: usize) -> Result<(), String> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from as *const f32, to as *mut f32, elements) };
        Ok(())
    }

    fn allocate(&self, elements: usize) -> Result<u64, String> {
        // Its length is kept in front of it.
        let mut memory = vec![f32::NAN; elements + 2];
        memory[0] = f32::from_bits(elements as u32);
        Ok(Box::leak(memory.into_boxed_slice()).as_mut_ptr() as u64 + 8)
    }

    unsafe fn free(&self, address: u64) {
        let start = (address - 8) as *mut f32;
        // SAFETY: `allocate` made it, with its length in front.
        let elements = unsafe { (*start).to_bits() } as usize;
        // SAFETY: as above; nobody uses it any more, as the caller promises.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(start, elements + 2)) });
    }

    unsafe fn upload(&self, from: &[f32], to: u64) -> Result<(), String> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut f32, from.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: u64, to: &mut [f32]) -> Result<(), String> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from as *const f32, to.as_mut_ptr(), to.len()) };
        Ok(())
    }
}

/// The stand-in, open.
struct Fake {
    nccl: Arc<Nccl>,
    library: Arc<libloading::Library>,
}

impl Fake {
    fn open(file: &Path) -> Self {
        let nccl = Nccl::open(Some(file.as_os_str())).unwrap();
        // SAFETY: the library has no initialisers.
        let library = Arc::new(unsafe { libloading::Library::new(file) }.unwrap());
        Self { nccl, library }
    }

    fn place(&self) -> Arc<dyn Place> {
        // SAFETY: the type is that of the stand-in's function.
        let pending = unsafe { self.library.get::<Pending>(b"fake_nccl_pending") };
        let pending = *pending.unwrap();
        let stream = Box::new(0);
        Arc::new(HostPlace { stream, pending, _library: self.library.clone() })
    }

    /// Forms a group of `n` ranks, each on a thread, with what each got.
    fn groups(
        &self,
        n: usize,
        deadline: Duration,
        watchdog: &Watchdog,
    ) -> Vec<Result<NcclGroup, CollectiveError>> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = local::group_with_deadline(n, PATIENCE)
                .into_iter()
                .map(|control| {
                    scope.spawn(move || {
                        NcclGroup::form(&GroupOptions {
                            nccl: Arc::clone(&self.nccl),
                            control: Arc::new(control),
                            name: "test",
                            peers: Peers::Ring,
                            place: &|| Ok(self.place()),
                            deadline,
                            watchdog,
                        })
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    fn fresh(&self, n: usize, watchdog: &Watchdog) -> Vec<Shared> {
        let groups = self.groups(n, PATIENCE, watchdog);
        groups.into_iter().map(|group| Arc::new(group.unwrap()) as Shared).collect()
    }
}

/// A watchdog that nothing should wake.
fn calm() -> Watchdog {
    Watchdog::start(Rank::default(), PATIENCE, |records| panic!("{records:?}")).unwrap()
}

/// Runs `body` in a process of its own whose environment names the script.
fn with_script(test: &str, script: &str, body: impl FnOnce(&Fake)) {
    const FILE: &str = "DRUMLINE_TEST_FAKE_NCCL_FILE";
    if let Some(file) = std::env::var_os(FILE) {
        return body(&Fake::open(Path::new(&file)));
    }
    let folder = tempfile::tempdir().unwrap();
    let file = Library::Nccl.build(folder.path()).unwrap();
    let named: PathBuf = folder.path().join("script");
    std::fs::write(&named, script).unwrap();
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(FILE, file)
        .env("DRUMLINE_FAKE_NCCL", named)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{test}: {told}");
}

#[test]
fn every_operation_gives_what_a_plain_loop_gives() {
    let folder = tempfile::tempdir().unwrap();
    let fake = Fake::open(&Library::Nccl.build(folder.path()).unwrap());
    let watchdog = calm();
    for size in [1, 2, 3, 4] {
        conformance::on_threads(fake.fresh(size, &watchdog), |c| conformance::rank(&*c));
    }
}

#[test]
fn refusals_do_no_harm_and_started_calls_keep_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let fake = Fake::open(&Library::Nccl.build(folder.path()).unwrap());
    let watchdog = calm();
    conformance::wrong_arguments_are_refused_without_harm(|n| fake.fresh(n, &watchdog));
    conformance::started_calls_keep_their_order_and_bound(|n| fake.fresh(n, &watchdog));
    conformance::an_abort_ends_every_call(|n| fake.fresh(n, &watchdog));
}

#[test]
fn values_on_the_device_are_reduced_where_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let fake = Fake::open(&Library::Nccl.build(folder.path()).unwrap());
    let watchdog = calm();
    let id = fake.nccl.unique_id().unwrap();
    std::thread::scope(|scope| {
        for rank in 0..2usize {
            let (fake, watchdog) = (&fake, &watchdog);
            scope.spawn(move || {
                let place = fake.place();
                let channel =
                    Channel::open(&fake.nccl, place.clone(), id, rank, 2, "g", PATIENCE, watchdog)
                        .unwrap();
                let own = place.allocate(1000).unwrap();
                let other = place.allocate(1000).unwrap();
                let (values, mut got) = (vec![rank as f32 + 1.0; 1000], vec![0.0; 1000]);
                // SAFETY: there is room for 1000 values at both, until the channel was waited for.
                unsafe {
                    place.upload(&values, own).unwrap();
                    channel.queue(Exchange::AllReduce(ReduceOp::Sum), own, own, 1000).unwrap();
                    // Each sends to the other and receives from it: alone, either would wait.
                    let peer = 1 - rank;
                    channel
                        .queue_together(&[
                            (Exchange::Send { to: peer }, own, 0, 1000),
                            (Exchange::Recv { from: peer }, 0, other, 1000),
                        ])
                        .unwrap();
                    channel.wait("test").unwrap();
                    place.download(other, &mut got).unwrap();
                    place.free(own);
                    place.free(other);
                }
                assert_eq!(got, vec![3.0; 1000]);
            });
        }
    });
}

#[test]
fn ranks_may_be_processes() {
    const TEST: &str = "ranks_may_be_processes";
    const RANK: &str = "DRUMLINE_TEST_RANK";
    const ID: &str = "DRUMLINE_TEST_ID";
    const FILE: &str = "DRUMLINE_TEST_FILE";
    if let Ok(rank) = std::env::var(RANK) {
        let fake = Fake::open(Path::new(&std::env::var_os(FILE).unwrap()));
        let digits = std::env::var(ID).unwrap();
        let bytes: Vec<u8> = digits.split(',').map(|byte| byte.parse().unwrap()).collect();
        let id = drumline_cuda::nccl::UniqueId::from_bytes(&bytes).unwrap();
        let rank: usize = rank.parse().unwrap();
        let place = fake.place();
        let channel =
            Channel::open(&fake.nccl, place.clone(), id, rank, 3, "g", PATIENCE, &calm()).unwrap();
        let data = place.allocate(70_001).unwrap();
        let mut got = vec![0.0; 70_001];
        // SAFETY: there is room for the values until the channel was waited for.
        unsafe {
            place.upload(&vec![rank as f32; 70_001], data).unwrap();
            channel.queue(Exchange::AllReduce(ReduceOp::Sum), data, data, 70_001).unwrap();
            channel.wait("test").unwrap();
            place.download(data, &mut got).unwrap();
        }
        assert!(got.iter().all(|x| *x == 3.0));
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = Library::Nccl.build(folder.path()).unwrap();
    let id = Fake::open(&file).nccl.unique_id().unwrap();
    let digits: Vec<String> = id.0.iter().map(ToString::to_string).collect();
    let children: Vec<_> = (0..3)
        .map(|rank| {
            std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", TEST, "--nocapture", "--test-threads=1"])
                .env(RANK, rank.to_string())
                .env(ID, digits.join(","))
                .env(FILE, &file)
                .spawn()
                .unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn a_communicator_that_never_comes_is_given_up() {
    with_script("a_communicator_that_never_comes_is_given_up", "init hang\n", |fake| {
        let begin = Instant::now();
        for group in fake.groups(2, Duration::from_millis(300), &calm()) {
            let error = group.unwrap_err();
            assert!(error.to_string().contains("no progress for 300 ms"), "{error}");
        }
        assert!(begin.elapsed() < PATIENCE);
    });
}

#[test]
fn a_refusal_to_join_is_told() {
    with_script("a_refusal_to_join_is_told", "init 2\n", |fake| {
        for group in fake.groups(2, PATIENCE, &calm()) {
            let error = group.unwrap_err();
            assert!(error.to_string().contains("system error"), "{error}");
        }
    });
}

#[test]
fn an_asynchronous_error_breaks_the_group() {
    let script = "rank 1 async 6 2\n";
    with_script("an_asynchronous_error_breaks_the_group", script, |fake| {
        let watchdog = calm();
        let groups: Vec<Shared> = fake
            .groups(2, Duration::from_secs(8), &watchdog)
            .into_iter()
            .map(|group| Arc::new(group.unwrap()) as Shared)
            .collect();
        conformance::on_threads(groups, |c| {
            if c.rank() == 0 {
                // Two go well; whether the third does is the other's affair.
                let _ = (0..3).try_for_each(|_| c.all_reduce(&mut [1.0; 8], ReduceOp::Sum));
                return;
            }
            let errors: Vec<_> =
                (0..4).filter_map(|_| c.all_reduce(&mut [1.0; 8], ReduceOp::Sum).err()).collect();
            assert!(errors[0].to_string().contains("remote process"), "{errors:?}");
            assert!(errors[0].to_string().contains("told by the stand-in"), "{errors:?}");
            assert_eq!(errors.last(), Some(&CollectiveError::Aborted));
        });
    });
}

#[test]
fn a_collective_without_progress_is_recorded_and_ends_the_wait() {
    const TEST: &str = "a_collective_without_progress_is_recorded_and_ends_the_wait";
    with_script(TEST, "rank 1 stall 2\n", |fake| {
        let rank = Rank { job: "train-1".to_owned(), attempt: 3, rank: 7 };
        let (told, hears) = mpsc::channel::<Vec<Record>>();
        let act = move |records: &[Record]| told.send(records.to_vec()).unwrap();
        // What goes well may take its time on a busy machine.
        let watchdog = Watchdog::start(rank.clone(), Duration::from_secs(3), act).unwrap();
        let groups = fake.groups(2, Duration::from_secs(6), &watchdog);
        let groups: Vec<Shared> =
            groups.into_iter().map(|group| Arc::new(group.unwrap()) as Shared).collect();
        conformance::on_threads(groups, |c| {
            for _ in 0..2 {
                c.all_reduce(&mut [1.0; 5], ReduceOp::Sum).unwrap();
            }
            let error = c.all_gather(&[1.0; 11], &mut [0.0; 22]).unwrap_err();
            assert!(error.to_string().contains("no progress"), "{error}");
        });
        let records = hears.recv_timeout(PATIENCE).unwrap();
        let first = &records[0];
        assert_eq!(first.rank, rank);
        assert_eq!((first.collective, first.sequence, first.elements), ("all_gather", 3, 11));
        assert_eq!(first.group, "test");
        let text = first.to_string();
        assert!(text.starts_with(
            "job train-1 attempt 3 rank 7: all_gather number 3 of group test, f32[11]"
        ));
    });
}

#[test]
fn the_watchdog_ends_a_process_that_the_library_does_not_let_go() {
    const TEST: &str = "the_watchdog_ends_a_process_that_the_library_does_not_let_go";
    const FILE: &str = "DRUMLINE_TEST_HANGING";
    if let Some(file) = std::env::var_os(FILE) {
        let fake = Fake::open(Path::new(&file));
        let rank = Rank { job: "train-2".to_owned(), attempt: 1, rank: 0 };
        let watchdog = Watchdog::that_ends_the_process(rank, Duration::from_secs(2)).unwrap();
        let groups = fake.fresh(2, &watchdog);
        // Longer than anybody waits: the deadline of the calls is not what ends this.
        conformance::on_threads(groups, |c| c.all_reduce(&mut [1.0; 4], ReduceOp::Sum).unwrap());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = Library::Nccl.build(folder.path()).unwrap();
    let script = folder.path().join("script");
    std::fs::write(&script, "stall 0\nabort hang\n").unwrap();
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", TEST, "--nocapture", "--test-threads=1"])
        .env(FILE, file)
        .env("DRUMLINE_FAKE_NCCL", script)
        .output()
        .unwrap();
    assert!(!output.status.success());
    let told = String::from_utf8_lossy(&output.stderr);
    let last = told.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    assert!(
        last.starts_with("collective watchdog: job train-2 attempt 1 rank 0: all_reduce number 1"),
        "{told}"
    );
}

#[test]
fn a_missing_and_an_old_library_say_what_they_are() {
    let problem = Nccl::open(Some("/nowhere/libnccl.so.2".as_ref())).unwrap_err();
    assert!(matches!(&problem, NcclProblem::Missing { tried } if tried.contains("/nowhere")));
    assert!(problem.remedy().contains("libnccl.so.2"));
    let folder = tempfile::tempdir().unwrap();
    let old = Library::NcclOld.build(folder.path()).unwrap();
    let problem = Nccl::open(Some(old.as_os_str())).unwrap_err();
    assert!(
        matches!(&problem, NcclProblem::TooOld { why, .. } if why.contains("2.7.8")),
        "{problem}"
    );
    let foreign = Library::NvmlForeign.build(folder.path()).unwrap();
    let problem = Nccl::open(Some(foreign.as_os_str())).unwrap_err();
    assert!(
        matches!(&problem, NcclProblem::TooOld { why, .. } if why.contains("ncclGetVersion")),
        "{problem}"
    );
}

#[test]
fn a_new_version_that_lacks_a_function_is_refused_by_its_name() {
    const TEST: &str = "a_new_version_that_lacks_a_function_is_refused_by_its_name";
    const FILE: &str = "DRUMLINE_TEST_LACKING";
    if let Some(file) = std::env::var_os(FILE) {
        let problem = Nccl::open(Some(&file)).unwrap_err();
        assert!(problem.to_string().contains("lacks ncclGetLastError"), "{problem}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = Library::NcclOld.build(folder.path()).unwrap();
    let script = folder.path().join("script");
    std::fs::write(&script, "version 23004\n").unwrap();
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", TEST, "--test-threads=1"])
        .env(FILE, file)
        .env("DRUMLINE_FAKE_NCCL", script)
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn errors_name_what_was_tried() {
    let error =
        NcclError::TimedOut { what: "recv", group: "pipeline 0->1".to_owned(), waited_ms: 9 };
    assert_eq!(error.to_string(), "recv of group pipeline 0->1 made no progress for 9 ms");
}
