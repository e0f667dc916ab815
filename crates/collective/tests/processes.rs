//! Ranks in real processes: this test's own binary, started again as a rank.
//!
//! A child is told its part in the environment, prints its listener's address and reads
//! everybody's from standard input, as it would get them from a rendezvous.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use drumline_collective::host::{HostWorld, Listener, WorldOptions};
use drumline_collective::{Collective, CollectiveError, ReduceOp, conformance};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const ROLE: &str = "DRUMLINE_TEST_ROLE";

struct Rank {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts `n` processes in `role` and links them. `role_of` may single some out.
fn start(n: usize, role_of: impl Fn(usize) -> &'static str, shared_memory: bool) -> Vec<Rank> {
    let mut ranks: Vec<Rank> = (0..n)
        .map(|rank| {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "child", "--nocapture", "--test-threads=1"])
                .env(ROLE, role_of(rank))
                .env("DRUMLINE_TEST_RANK", rank.to_string())
                .env("DRUMLINE_TEST_SHM", if shared_memory { "1" } else { "0" })
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let output = BufReader::new(child.stdout.take().unwrap());
            Rank { child, output }
        })
        .collect();
    let addresses: Vec<String> = ranks.iter_mut().map(|rank| said(rank, "ADDRESS ")).collect();
    for rank in &mut ranks {
        let stdin = rank.child.stdin.as_mut().unwrap();
        writeln!(stdin, "{}", addresses.join(" ")).unwrap();
    }
    ranks
}

/// Waits for a line with `word` and returns what follows.
fn said(rank: &mut Rank, word: &str) -> String {
    let mut line = String::new();
    loop {
        line.clear();
        let n = rank.output.read_line(&mut line).unwrap();
        assert!(n > 0, "a rank ended without saying {word}");
        if let Some((_, rest)) = line.split_once(word) {
            return rest.trim().to_owned();
        }
    }
}

fn all_succeed(ranks: Vec<Rank>) {
    for (number, mut rank) in ranks.into_iter().enumerate() {
        let mut rest = String::new();
        rank.output.read_to_string(&mut rest).unwrap();
        let status = rank.child.wait().unwrap();
        assert!(status.success(), "rank {number}: {status}\n{rest}");
    }
}

/// Not a test by itself: what a child does. Without a role there is nothing to do.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let number = |name: &str| std::env::var(name).unwrap().parse::<usize>().unwrap();
    let rank = number("DRUMLINE_TEST_RANK");
    let listener = Listener::bind(LOOPBACK).unwrap();
    println!("ADDRESS {}", listener.address());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let addresses: Vec<SocketAddr> = line.split_whitespace().map(|a| a.parse().unwrap()).collect();
    let size = addresses.len();
    let mut options = WorldOptions::new(rank, addresses, b"a secret".to_vec());
    options.deadline = Duration::from_secs(60);
    options.shared_memory = number("DRUMLINE_TEST_SHM") == 1;
    let world = HostWorld::connect(listener, &options).unwrap();
    let everyone: Vec<usize> = (0..size).collect();
    let group = world.group(&everyone, 0).unwrap();
    match role.as_str() {
        "conform" => conformance::rank(&*group),
        "groups" => interleaved_groups(&world, &group),
        "repeat" => println!("BITS {}", many_sums(&*group)),
        #[cfg(target_os = "linux")]
        "wait" => wait_idly(&*group),
        "survive" => survive(&*group),
        "hang" => {
            group.barrier().unwrap();
            println!("HANGING");
            std::thread::sleep(Duration::from_secs(600));
        }
        other => panic!("no such role: {other}"),
    }
}

/// Tensor, pipeline and data groups of a 2 x 2 mesh beside the world's, used in turn and from two
/// threads at once.
fn interleaved_groups(world: &HostWorld, everyone: &Arc<impl Collective + 'static>) {
    let (rank, across) = (world.rank(), world.rank() % 2);
    let row = rank / 2 * 2;
    let tensor = world.group(&[row, row + 1], 10 + row as u32).unwrap();
    let pipeline = world.group(&[across, across + 2], 20 + across as u32).unwrap();
    // In an order of its own: the group's ranks are not the world's.
    let reversed = world.group(&[3, 2, 1, 0], 30).unwrap();
    assert_eq!(reversed.rank(), 3 - rank);
    let background = {
        let reversed = Arc::clone(&reversed);
        std::thread::spawn(move || {
            for _ in 0..200 {
                let mut sum = vec![1.0; 2000];
                reversed.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
                assert_eq!(sum[1999], 4.0);
            }
        })
    };
    for step in 0..200 {
        let mut data = vec![(rank + step) as f32; 1 + step * 37];
        tensor.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        assert_eq!(data[0], (2 * row + 1 + 2 * step) as f32);
        // Both sides send before either receives; the world's collective comes in between.
        let other = 1 - pipeline.rank();
        pipeline.send(&data, other).unwrap();
        let mut max = [rank as f32];
        everyone.all_reduce(&mut max, ReduceOp::Max).unwrap();
        assert_eq!(max, [3.0]);
        let mut received = vec![0.0; data.len()];
        pipeline.recv(&mut received, other).unwrap();
        let row_there = 2 - row;
        assert_eq!(received[step * 37], (2 * row_there + 1 + 2 * step) as f32);
    }
    background.join().unwrap();
    everyone.barrier().unwrap();
}

/// A digest of the bits of sums whose value depends on their order.
fn many_sums(c: &dyn Collective) -> u64 {
    let mut digest = 0xcbf2_9ce4_8422_2325u64;
    for len in [3, 5000, 40_001, 300_000] {
        let mut data: Vec<f32> = (0..len)
            .map(|i| ((i * 31 + c.rank() * 17) % 1009) as f32 * 1.1f32.powi((i % 60) as i32 - 30))
            .collect();
        for _ in 0..3 {
            c.all_reduce(&mut data, ReduceOp::Sum).unwrap();
            for x in &data {
                digest = (digest ^ u64::from(x.to_bits())).wrapping_mul(0x100_0000_01b3);
            }
        }
    }
    digest
}

/// Waits in a collective with a rank that will be killed, and says how soon it noticed.
fn survive(c: &dyn Collective) {
    c.barrier().unwrap();
    println!("WAITING");
    let error = c.all_reduce(&mut vec![1.0; 1 << 20], ReduceOp::Sum).unwrap_err();
    let at = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    assert!(matches!(error, CollectiveError::PeerGone { peer: 1, .. }), "{error}");
    println!("NOTICED {}", at.as_micros());
}

/// Waits half a second for a message and says how long it had a core meanwhile.
#[cfg(target_os = "linux")]
fn wait_idly(c: &dyn Collective) {
    // The first field: nanoseconds on a core.
    let on_core = || -> u64 {
        let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        stat.split_whitespace().next().unwrap().parse().unwrap()
    };
    c.barrier().unwrap();
    if c.rank() == 0 {
        // Only then does the other begin to wait, however late it had a core.
        c.recv(&mut [0.0], 1).unwrap();
        std::thread::sleep(Duration::from_millis(500));
        c.send(&[1.0], 1).unwrap();
        c.all_reduce(&mut [0.0; 4], ReduceOp::Sum).unwrap();
    } else {
        let (before, start) = (on_core(), Instant::now());
        c.send(&[1.0], 0).unwrap();
        c.recv(&mut [0.0], 0).unwrap();
        let took_ms = (on_core() - before) / 1_000_000;
        assert!(start.elapsed() >= Duration::from_millis(450));
        // A few ms, more on a slow core; who looks all the time has all of it, or its part.
        assert!(took_ms < 60, "waiting took {took_ms} ms of a core");
        c.all_reduce(&mut [0.0; 4], ReduceOp::Sum).unwrap();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_waiting_rank_leaves_the_core_to_others() {
    for shared_memory in [true, false] {
        all_succeed(start(2, |_| "wait", shared_memory));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn nothing_with_a_name_is_left_of_a_killed_rank() {
    let ranks = start(2, |_| "hang", true);
    let mut ranks = ranks;
    said(&mut ranks[0], "HANGING");
    said(&mut ranks[1], "HANGING");
    let id = ranks[0].child.id();
    let maps = std::fs::read_to_string(format!("/proc/{id}/maps")).unwrap();
    let shared: Vec<&str> = maps.lines().filter(|l| l.contains("drumline-collective")).collect();
    // Shared memory is in use, and no file system knows it; its descriptors are closed.
    assert!(shared.iter().any(|line| line.contains("/memfd:drumline-collective (deleted)")));
    assert!(shared.iter().all(|line| line.contains("/memfd:")), "{shared:?}");
    let open = std::fs::read_dir(format!("/proc/{id}/fd")).unwrap();
    let names = open.flatten().flat_map(|fd| std::fs::read_link(fd.path()));
    for name in names {
        assert!(!name.to_string_lossy().contains("drumline-collective"), "{name:?}");
    }
}

#[test]
fn every_operation_works_between_processes() {
    for (n, shared_memory) in [(2, true), (2, false), (4, true), (4, false)] {
        all_succeed(start(n, |_| "conform", shared_memory));
    }
}

#[test]
fn many_groups_work_side_by_side() {
    for shared_memory in [true, false] {
        all_succeed(start(4, |_| "groups", shared_memory));
    }
}

#[test]
fn sums_have_the_same_bits_on_every_rank_in_every_run_by_every_path() {
    let mut seen = Vec::new();
    for shared_memory in [true, true, false] {
        let mut ranks = start(3, |_| "repeat", shared_memory);
        seen.extend(ranks.iter_mut().map(|rank| said(rank, "BITS ")));
        all_succeed(ranks);
    }
    assert_eq!(seen.len(), 9);
    assert!(seen.iter().all(|bits| *bits == seen[0]), "{seen:?}");
}

#[test]
fn a_killed_rank_is_noticed_at_once() {
    for shared_memory in [true, false] {
        let role = |rank| if rank == 1 { "hang" } else { "survive" };
        let mut ranks = start(3, role, shared_memory);
        said(&mut ranks[1], "HANGING");
        said(&mut ranks[0], "WAITING");
        said(&mut ranks[2], "WAITING");
        // Long enough for both to be asleep in the collective.
        std::thread::sleep(Duration::from_millis(100));
        let at = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        ranks[1].child.kill().unwrap();
        for survivor in [0, 2] {
            let noticed: u128 = said(&mut ranks[survivor], "NOTICED ").parse().unwrap();
            let took_ms = noticed.saturating_sub(at.as_micros()) / 1000;
            println!("shared memory {shared_memory}: noticed after {took_ms} ms");
            // Tens of ms when the machine is idle; a loaded one may take longer, but nowhere near
            // the deadline of 60 s.
            assert!(took_ms < 20_000, "{took_ms} ms");
        }
        let killed = ranks.remove(1);
        drop(killed);
        all_succeed(ranks);
    }
}

#[test]
fn strangers_at_the_listener_harm_nobody() {
    let listeners: Vec<Listener> = (0..2).map(|_| Listener::bind(LOOPBACK).unwrap()).collect();
    let addresses: Vec<SocketAddr> = listeners.iter().map(Listener::address).collect();
    // Held open, so that they are there for the whole handshake.
    let mut strangers = Vec::new();
    let offers: [&[u8]; 5] = [
        b"",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"DRUMLINE",
        &[0; 4096],
        &[b"DRUMLINE".as_slice(), &[1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0], &[0; 200]].concat(),
    ];
    for offer in offers.into_iter().cycle().take(25) {
        let mut stream = TcpStream::connect(addresses[0]).unwrap();
        stream.write_all(offer).unwrap();
        strangers.push(stream);
    }
    let start = Instant::now();
    let worlds: Vec<HostWorld> = std::thread::scope(|scope| {
        let threads: Vec<_> = listeners
            .into_iter()
            .enumerate()
            .map(|(rank, listener)| {
                let options = WorldOptions::new(rank, addresses.clone(), b"s".to_vec());
                scope.spawn(move || HostWorld::connect(listener, &options).unwrap())
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(start.elapsed() < Duration::from_secs(4), "strangers delay nobody");
    std::thread::scope(|scope| {
        for world in &worlds {
            scope.spawn(|| {
                let group = world.group(&[0, 1], 0).unwrap();
                let mut data = [2.0];
                group.all_reduce(&mut data, ReduceOp::Sum).unwrap();
                assert_eq!(data, [4.0]);
                group.barrier().unwrap();
            });
        }
    });
    // The listener is closed once the world is complete.
    drop(strangers);
    // A process that a test beside this one has just started may hold a copy of it for a moment.
    let start = Instant::now();
    while TcpStream::connect(addresses[0]).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(20), "somebody still listens");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn another_secret_is_refused_by_both_sides_and_a_missing_rank_is_named() {
    let listeners: Vec<Listener> = (0..2).map(|_| Listener::bind(LOOPBACK).unwrap()).collect();
    let addresses: Vec<SocketAddr> = listeners.iter().map(Listener::address).collect();
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = listeners
            .into_iter()
            .enumerate()
            .map(|(rank, listener)| {
                let secret = format!("secret {rank}").into_bytes();
                let mut options = WorldOptions::new(rank, addresses.clone(), secret);
                options.connect_deadline = Duration::from_secs(3);
                scope.spawn(move || HostWorld::connect(listener, &options).unwrap_err())
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(matches!(&results[0], CollectiveError::TimedOut { peer: 1, .. }), "{results:?}");
    assert!(
        matches!(&results[1], CollectiveError::Mismatch { got, .. } if got.contains("secret")),
        "{results:?}"
    );
    assert!(!format!("{results:?}").contains("secret 0"), "no secret in an error");
}
