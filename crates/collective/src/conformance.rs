//! What every [`Collective`] must do: one suite, run on each implementation.
//!
//! [`rank`] is the part of one rank and works across processes; the other checks take all ranks of
//! a fresh group, one a thread, and break it in some way. All panic with what went wrong.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::{Collective, CollectiveError, ReduceOp};

/// A communicator of one rank, as the checks take it.
pub type Shared = Arc<dyn Collective>;

/// Numbers of elements: none, one, uneven, a cache line and around, and larger than any buffer.
const LENGTHS: [usize; 12] = [0, 1, 2, 3, 15, 16, 17, 1000, 4099, 70_001, 300_007, 1_100_003];

/// The value of an element before the collective: of many magnitudes, so that the order of
/// additions shows in the bits.
fn value(rank: usize, index: usize, salt: usize) -> f32 {
    let mixed = (rank * 7919 + index * 104_729 + salt * 31).wrapping_mul(2_654_435_761) >> 7;
    let magnitude = [1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3, 1e6, 1e8][mixed % 8];
    (((mixed >> 5) % 2001) as f32 / 1000.0 - 1.0) * magnitude
}

fn values(rank: usize, len: usize, salt: usize) -> Vec<f32> {
    (0..len).map(|index| value(rank, index, salt)).collect()
}

/// What a reduction over `size` ranks must give, to the bit.
fn reduced(size: usize, len: usize, salt: usize, op: ReduceOp) -> Vec<f32> {
    let mut result = values(0, len, salt);
    for rank in 1..size {
        for (index, x) in result.iter_mut().enumerate() {
            let other = value(rank, index, salt);
            *x = match op {
                ReduceOp::Sum => *x + other,
                ReduceOp::Max => x.max(other),
            };
        }
    }
    result
}

fn assert_bits(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: length");
    for (index, (a, b)) in got.iter().zip(expected).enumerate() {
        let same = a.to_bits() == b.to_bits();
        assert!(same, "{what}: element {index} is {a:e}, not {b:e}");
    }
}

/// Runs every operation as one rank of a group of any size, over all lengths, twice.
///
/// # Panics
/// When a result differs in one bit from a plain loop in rank order, or a call fails.
pub fn rank(c: &dyn Collective) {
    for salt in 0..2 {
        // Many ranks need not move much each: the total is what takes time.
        for len in LENGTHS.into_iter().filter(|len| len * c.size() <= 2_500_000) {
            operations(c, len, salt);
        }
    }
    control_messages(c);
    neighbours(c);
    started_calls(c);
}

/// Several reductions under way at once, as gradients are reduced in buckets: looked at now and
/// then by ranks that do it unequally often, with messages in between, then waited for.
fn started_calls(c: &dyn Collective) {
    let (me, size) = (c.rank(), c.size());
    for op in [ReduceOp::Sum, ReduceOp::Max] {
        for lengths in [&[1usize, 0, 17][..], &[70_001, 300_007, 3], &[1_100_003 / size]] {
            let mut buckets: Vec<_> = lengths
                .iter()
                .enumerate()
                .map(|(salt, len)| (c.start_all_reduce(*len, op).unwrap(), values(me, *len, salt)))
                .collect();
            for look in 0..=me {
                for (pending, data) in &mut buckets {
                    pending.poll(data).unwrap();
                }
                let message = [look as f32];
                if me == 0 && size > 1 {
                    c.send(&message, 1).unwrap();
                } else if me == 1 && look == 0 {
                    let mut got = [-1.0];
                    c.recv(&mut got, 0).unwrap();
                    assert_eq!(got, [0.0], "messages pass reductions");
                }
            }
            for (salt, (pending, data)) in buckets.iter_mut().enumerate() {
                pending.wait(data).unwrap();
                let what = format!("started all_reduce {op:?} of {}", data.len());
                assert_bits(data, &reduced(size, data.len(), salt, op), &what);
                assert_eq!(pending.poll(data), Ok(true), "it stays complete");
            }
        }
    }
    c.barrier().unwrap();
}

fn operations(c: &dyn Collective, len: usize, salt: usize) {
    let (me, size) = (c.rank(), c.size());
    for op in [ReduceOp::Sum, ReduceOp::Max] {
        let mut data = values(me, len, salt);
        c.all_reduce(&mut data, op).unwrap();
        let what = format!("all_reduce {op:?} of {len}");
        assert_bits(&data, &reduced(size, len, salt, op), &what);
    }

    let send = values(me, len, salt);
    let mut recv = vec![f32::NAN; size * len];
    c.all_gather(&send, &mut recv).unwrap();
    for rank in 0..size {
        let what = format!("all_gather of {len}, part {rank}");
        let part = &recv[rank * len..(rank + 1) * len];
        assert_bits(part, &values(rank, len, salt), &what);
    }

    let send = values(me, size * len, salt);
    let mut recv = vec![f32::NAN; len];
    c.reduce_scatter(&send, &mut recv).unwrap();
    let all = reduced(size, size * len, salt, ReduceOp::Sum);
    let what = format!("reduce_scatter of {len}");
    assert_bits(&recv, &all[me * len..(me + 1) * len], &what);

    parts_in_place(c, len, salt);

    for root in [0, size - 1, size / 2] {
        let mut data = values(me, len, salt + root);
        c.broadcast(&mut data, root).unwrap();
        let what = format!("broadcast of {len} from {root}");
        assert_bits(&data, &values(root, len, salt + root), &what);
    }
    c.barrier().unwrap();
}

/// Sums and gathers parts where they lie: of equal lengths, and all in one rank's hands.
fn parts_in_place(c: &dyn Collective, len: usize, salt: usize) {
    let (me, size) = (c.rank(), c.size());
    let even = crate::parts(len, size, 16);
    let lopsided: Vec<_> =
        (0..size).map(|rank| if rank + 1 < size { 0..0 } else { 0..len }).collect();
    for parts in [even, lopsided] {
        let whole = reduced(size, len, salt, ReduceOp::Sum);
        let own = parts[me].clone();
        let mut data = values(me, len, salt);
        c.reduce_scatter_parts(&mut data, &parts).unwrap();
        let what = format!("reduce_scatter of {own:?} of {len}");
        assert_bits(&data[own.clone()], &whole[own.clone()], &what);

        let mut started = values(me, len, salt);
        let mut pending = c.start_reduce_scatter(&parts).unwrap();
        pending.poll(&mut started).unwrap();
        pending.wait(&mut started).unwrap();
        assert_bits(&started[own.clone()], &whole[own.clone()], &format!("started {what}"));

        for (index, x) in data.iter_mut().enumerate() {
            if !own.contains(&index) {
                *x = f32::NAN;
            }
        }
        c.all_gather_parts(&mut data, &parts).unwrap();
        assert_bits(&data, &whole, &format!("all_gather of {own:?} of {len}"));
    }
}

fn control_messages(c: &dyn Collective) {
    for (turn, len) in [0, 1, 5, 4096, 100_001].into_iter().enumerate() {
        let root = turn % c.size();
        let content = |rank: usize| -> Vec<u8> { (0..len).map(|i| (i * 7 + rank) as u8).collect() };
        let mut data = if c.rank() == root { content(root) } else { b"something else".to_vec() };
        c.broadcast_bytes(&mut data, root).unwrap();
        assert!(data == content(root), "broadcast_bytes of {len} from {root}");
    }
}

/// The traffic of a 1F1B pipeline: both neighbours send to one another before either receives,
/// more than any ring holds, and in between there are collectives.
fn neighbours(c: &dyn Collective) {
    const MICROS: usize = 4;
    let (me, size) = (c.rank(), c.size());
    for len in [0, 1, 1001, 800_003] {
        for micro in 0..MICROS {
            if me + 1 < size {
                c.send(&values(me, len, micro), me + 1).unwrap();
            }
            if me > 0 {
                c.send(&values(me, len, micro + 100), me - 1).unwrap();
            }
        }
        for micro in 0..MICROS {
            let mut data = vec![f32::NAN; len];
            if me + 1 < size {
                c.recv(&mut data, me + 1).unwrap();
                assert_bits(&data, &values(me + 1, len, micro + 100), "from above");
            }
            if me > 0 {
                c.recv(&mut data, me - 1).unwrap();
                assert_bits(&data, &values(me - 1, len, micro), "from below");
            }
        }
        let mut sum = [1.0];
        c.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
        assert_eq!(sum, [size as f32]);
    }
}

/// Runs `each` for every rank, one a thread.
///
/// # Panics
/// When one of them does.
pub fn on_threads<T: Send>(ranks: Vec<Shared>, each: impl Fn(Shared) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let each = &each;
        let threads: Vec<_> =
            ranks.into_iter().map(|rank| scope.spawn(move || each(rank))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// Checks that all ranks doing different things fail, soon, and that the first error says what
/// differs.
///
/// # Panics
/// When a rank succeeds, or nobody sees the difference.
pub fn differing_calls_are_a_mismatch(fresh: impl Fn(usize) -> Vec<Shared>) {
    type Call = fn(&dyn Collective) -> Result<(), CollectiveError>;
    let differing: [(Call, Call); 4] = [
        (
            |c| c.all_reduce(&mut [0.0; 8], ReduceOp::Sum),
            |c| c.all_reduce(&mut [0.0; 9], ReduceOp::Sum),
        ),
        (
            |c| c.all_reduce(&mut [0.0; 8], ReduceOp::Sum),
            |c| c.all_reduce(&mut [0.0; 8], ReduceOp::Max),
        ),
        (
            |c| c.all_reduce(&mut [0.0; 8], ReduceOp::Sum),
            |c| c.all_gather(&[0.0; 8], &mut [0.0; 16]),
        ),
        (|c| c.send(&[0.0; 8], 1), |c| c.recv(&mut [0.0; 9], 0)),
    ];
    for (number, (zero, one)) in differing.into_iter().enumerate() {
        let errors = on_threads(fresh(2), |c| {
            let first = if c.rank() == 0 { zero(&*c) } else { one(&*c) };
            // A send is over before the receiver sees it; then the next call must fail.
            let second = c.barrier();
            first.and(second).unwrap_err()
        });
        assert!(
            errors.iter().any(|error| matches!(error, CollectiveError::Mismatch { .. })),
            "pair {number}: {errors:?}"
        );
    }
}

/// Checks that a buffer of the wrong length, a root or a peer that does not exist is refused
/// before anything is sent, so that the group still works.
///
/// # Panics
/// When it is not.
pub fn wrong_arguments_are_refused_without_harm(fresh: impl Fn(usize) -> Vec<Shared>) {
    on_threads(fresh(2), |c| {
        let is_mismatch = |result| matches!(result, Err(CollectiveError::Mismatch { .. }));
        assert!(is_mismatch(c.all_gather(&[0.0; 4], &mut [0.0; 7])));
        assert!(is_mismatch(c.reduce_scatter(&[0.0; 7], &mut [0.0; 4])));
        assert!(is_mismatch(c.broadcast(&mut [0.0; 4], 2)));
        for parts in [&[0..2, 3..4][..], &[0..1, 1..2, 2..4], &[1..2, 2..4], &[0..2, 2..5]] {
            assert!(is_mismatch(c.all_gather_parts(&mut [0.0; 4], parts)));
            assert!(is_mismatch(c.reduce_scatter_parts(&mut [0.0; 4], parts)));
        }
        assert!(is_mismatch(c.broadcast_bytes(&mut Vec::new(), 2)));
        assert!(is_mismatch(c.send(&[0.0], 2)));
        assert!(is_mismatch(c.send(&[0.0], c.rank())));
        assert!(is_mismatch(c.recv(&mut [0.0], c.rank())));
        let mut data = [1.0];
        c.all_reduce(&mut data, ReduceOp::Sum).unwrap();
        assert_eq!(data, [2.0]);
    });
}

/// Checks that started calls are bounded, that none is waited for before an earlier one, that no
/// other collective comes between them, and that after each refusal the group still works.
///
/// # Panics
/// When one is not refused, or a refusal does harm.
pub fn started_calls_keep_their_order_and_bound(fresh: impl Fn(usize) -> Vec<Shared>) {
    on_threads(fresh(2), |c| {
        let is_mismatch = |result| matches!(result, Err(CollectiveError::Mismatch { .. }));
        let mut all: Vec<_> = (0..crate::STARTED_MAX)
            .map(|_| c.start_all_reduce(2, ReduceOp::Sum).unwrap())
            .collect();
        assert!(is_mismatch(c.start_all_reduce(2, ReduceOp::Sum).map(drop)));
        assert!(is_mismatch(all[1].wait(&mut [1.0; 2])));
        assert_eq!(all[1].poll(&mut [1.0; 2]), Ok(false));
        assert!(is_mismatch(all[0].wait(&mut [1.0; 3])));
        assert!(is_mismatch(c.barrier()));
        assert!(is_mismatch(c.all_reduce(&mut [1.0; 2], ReduceOp::Sum)));
        for (index, pending) in all.iter_mut().enumerate() {
            let mut data = [index as f32; 2];
            pending.wait(&mut data).unwrap();
            assert_eq!(data, [2.0 * index as f32; 2]);
        }
        drop(all);
        c.barrier().unwrap();
    });
}

/// Checks that a started call that is dropped before its end is cancelled on every rank, and that
/// one whose peer leaves or differs fails when it is looked at.
///
/// # Panics
/// When a call hangs or succeeds.
pub fn started_calls_end_with_their_group(fresh: impl Fn(usize) -> Vec<Shared>) {
    type Ending = fn(&dyn Collective);
    let endings: [Ending; 3] = [
        |c| drop(c.start_all_reduce(100_000, ReduceOp::Sum)),
        |_| (),
        |c| {
            let mut other = c.start_all_reduce(100_001, ReduceOp::Sum).unwrap();
            other.wait(&mut vec![0.0; 100_001]).unwrap_err();
        },
    ];
    for (number, ending) in endings.into_iter().enumerate() {
        on_threads(fresh(2), |c| {
            if c.rank() == 1 {
                ending(&*c);
                return;
            }
            let start = Instant::now();
            let until_error = || -> Result<(), CollectiveError> {
                let mut data = vec![0.0; 100_000];
                let mut pending = c.start_all_reduce(data.len(), ReduceOp::Sum)?;
                while !pending.poll(&mut data)? {
                    let late = start.elapsed() >= Duration::from_secs(5);
                    assert!(!late, "ending {number} goes unseen");
                    std::thread::yield_now();
                }
                Ok(())
            };
            let error = until_error().unwrap_err();
            assert!(!matches!(error, CollectiveError::TimedOut { .. }), "{number}: {error}");
            assert!(c.barrier().is_err(), "ending {number}");
        });
    }
}

/// Checks that a rank that never comes is named after the deadline, which `fresh` must set to
/// `deadline`.
///
/// # Panics
/// When the others hang, succeed or blame someone else.
pub fn a_silent_rank_is_named(fresh: impl Fn(usize) -> Vec<Shared>, deadline: Duration) {
    for op in ["all_reduce", "recv", "started"] {
        let done = std::sync::Barrier::new(3);
        let errors = on_threads(fresh(3), |c| {
            let start = Instant::now();
            let result = match (c.rank(), op) {
                (2, _) => Ok(()),
                (_, "recv") => c.recv(&mut [0.0], 2),
                (_, "started") => c
                    .start_all_reduce(100, ReduceOp::Sum)
                    .and_then(|mut pending| pending.wait(&mut [0.0; 100])),
                _ => c.all_reduce(&mut [0.0; 100], ReduceOp::Sum),
            };
            done.wait();
            (c.rank(), result, start.elapsed())
        });
        let mut named = 0;
        for (rank, result, took) in errors {
            match result {
                Ok(()) => assert_eq!(rank, 2),
                Err(CollectiveError::TimedOut { peer, waited_ms, .. }) => {
                    assert_eq!(peer, 2, "{op}");
                    assert!(u128::from(waited_ms) + 1 >= deadline.as_millis());
                    named += 1;
                }
                // The other may have given up first.
                Err(CollectiveError::Aborted) => {}
                Err(error) => panic!("{op}: {error}"),
            }
            assert!(took < deadline * 10 + Duration::from_secs(2), "{op}: {took:?}");
        }
        assert!(named > 0, "{op}: nobody named the silent rank");
    }
}

/// Checks that a rank that leaves fails the others' calls, in far less than the deadline.
///
/// # Panics
/// When the others hang or succeed.
pub fn a_rank_that_leaves_fails_the_others(fresh: impl Fn(usize) -> Vec<Shared>) {
    on_threads(fresh(3), |c| {
        c.barrier().unwrap();
        if c.rank() == 1 {
            return;
        }
        let start = Instant::now();
        let error = c.all_reduce(&mut [0.0; 5000], ReduceOp::Sum).unwrap_err();
        assert!(
            matches!(error, CollectiveError::PeerGone { peer: 1, .. } | CollectiveError::Aborted),
            "{error}"
        );
        assert!(start.elapsed() < Duration::from_secs(5));
        let again = c.barrier().unwrap_err();
        assert!(
            matches!(again, CollectiveError::PeerGone { .. } | CollectiveError::Aborted),
            "{again}"
        );
    });
}

/// Checks that what a rank sent before it left still arrives.
///
/// # Panics
/// When it does not.
pub fn words_of_a_rank_that_left_still_arrive(fresh: impl Fn(usize) -> Vec<Shared>) {
    let left = std::sync::Barrier::new(2);
    on_threads(fresh(2), |c| {
        if c.rank() == 0 {
            c.send(&values(0, 3000, 0), 1).unwrap();
            drop(c);
            left.wait();
        } else {
            left.wait();
            std::thread::sleep(Duration::from_millis(30));
            let mut data = vec![0.0; 3000];
            c.recv(&mut data, 0).unwrap();
            assert_bits(&data, &values(0, 3000, 0), "message");
            assert!(matches!(c.recv(&mut data, 0), Err(CollectiveError::PeerGone { peer: 0, .. })));
        }
    });
}

/// Checks that an abort ends calls that wait, on every rank, and all later ones.
///
/// # Panics
/// When a call hangs or succeeds.
pub fn an_abort_ends_every_call(fresh: impl Fn(usize) -> Vec<Shared>) {
    on_threads(fresh(3), |c| {
        let start = Instant::now();
        if c.rank() == 2 {
            std::thread::sleep(Duration::from_millis(50));
            c.abort();
        } else {
            let error = c.barrier().unwrap_err();
            assert_eq!(error, CollectiveError::Aborted);
        }
        assert_eq!(c.barrier(), Err(CollectiveError::Aborted));
        assert_eq!(c.send(&[0.0], (c.rank() + 1) % 3), Err(CollectiveError::Aborted));
        assert!(start.elapsed() < Duration::from_secs(5));
    });
}

/// Checks everything that threads can check. `fresh(n)` makes a new group of `n` ranks whose
/// deadline is `deadline`: some hundred milliseconds.
///
/// # Panics
/// When a check fails.
pub fn all(fresh: impl Fn(usize) -> Vec<Shared>, deadline: Duration) {
    for size in [1, 2, 3, 4, 5, 9] {
        on_threads(fresh(size), |c| rank(&*c));
    }
    differing_calls_are_a_mismatch(&fresh);
    wrong_arguments_are_refused_without_harm(&fresh);
    started_calls_keep_their_order_and_bound(&fresh);
    started_calls_end_with_their_group(&fresh);
    a_silent_rank_is_named(&fresh, deadline);
    a_rank_that_leaves_fails_the_others(&fresh);
    words_of_a_rank_that_left_still_arrive(&fresh);
    an_abort_ends_every_call(&fresh);
}
