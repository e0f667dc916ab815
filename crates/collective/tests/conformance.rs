//! The conformance suite on every implementation whose ranks are threads.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use drumline_collective::conformance::{self, Shared};
use drumline_collective::host::{HostCollective, HostWorld, Listener, WorldOptions};
use drumline_collective::local;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Long enough for a rank that others keep from its core.
const DEADLINE: Duration = Duration::from_secs(6);

/// A world of `n` ranks in this process.
fn worlds(n: usize, shared_memory: bool, streams: usize) -> Vec<HostWorld> {
    let listeners: Vec<Listener> = (0..n).map(|_| Listener::bind(LOOPBACK).unwrap()).collect();
    let addresses: Vec<_> = listeners.iter().map(Listener::address).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = listeners
            .into_iter()
            .enumerate()
            .map(|(rank, listener)| {
                let mut options = WorldOptions::new(rank, addresses.clone(), b"secret".to_vec());
                options.deadline = DEADLINE;
                options.shared_memory = shared_memory;
                options.streams = streams;
                scope.spawn(move || HostWorld::connect(listener, &options).unwrap())
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn groups(worlds: &[HostWorld], id: u32) -> Vec<Arc<HostCollective>> {
    let ranks: Vec<usize> = (0..worlds.len()).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            worlds.iter().map(|world| scope.spawn(|| world.group(&ranks, id).unwrap())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn fresh(n: usize, shared_memory: bool, streams: usize) -> Vec<Shared> {
    groups(&worlds(n, shared_memory, streams), 1)
        .into_iter()
        .map(|c| {
            for peer in (0..n).filter(|peer| *peer != drumline_collective::Collective::rank(&*c)) {
                assert_eq!(c.shares_memory_with(peer), shared_memory);
            }
            c as Shared
        })
        .collect()
}

#[test]
fn threads_of_one_process_conform() {
    let fresh = |n| {
        local::group_with_deadline(n, DEADLINE).into_iter().map(|c| Arc::new(c) as Shared).collect()
    };
    conformance::all(fresh, DEADLINE);
}

#[test]
fn tcp_of_one_connection_conforms() {
    conformance::all(|n| fresh(n, false, 1), DEADLINE);
}

#[test]
fn tcp_of_several_connections_conforms() {
    conformance::all(|n| fresh(n, false, 4), DEADLINE);
}

#[cfg(target_os = "linux")]
#[test]
fn shared_memory_conforms() {
    conformance::all(|n| fresh(n, true, 4), DEADLINE);
}
