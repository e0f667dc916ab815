//! A run takes what was planned and then no more: steps keep nothing, and memory does not grow.

mod support;

use drumline_engine::Trainer;
use drumline_engine::bench::{in_process, local_groups};
use drumline_mesh::Mesh;
use drumline_spec::{Family, MemoryOptions, Parallelism, Recompute, TrainingJob};
use drumline_tensor::Cpu;
use support::{job, micros, split, tiny};

/// Steps of a run, after those that warm it up.
const STEPS: u64 = 1000;
const WARM_UP: u64 = 3;

fn short(family: Family, shape: Parallelism) -> TrainingJob {
    let steps = STEPS + WARM_UP;
    TrainingJob {
        steps,
        sequence: 4,
        global_batch: 4,
        micro_batch: 1,
        ..job(tiny(family, true), shape)
    }
}

#[test]
fn a_thousand_steps_of_one_rank_leave_no_byte_behind() {
    for family in [Family::Gpt2, Family::Llama] {
        let job = short(family, Parallelism::SINGLE);
        let mesh = Mesh::new(job.parallelism);
        let groups = local_groups(mesh).remove(0);
        let mut trainer = Trainer::new(&job, mesh.coords(0), groups, Cpu::new(1).unwrap()).unwrap();
        let batches = micros(&job, 0, 0);
        for step in 0..WARM_UP {
            trainer.step(step, &batches).unwrap();
        }
        let seen = allocation_counter::measure(|| {
            for step in WARM_UP..job.steps {
                trainer.step(step, &batches).unwrap();
            }
        });
        // On AVX2 all products are our own, which allocate nothing. Elsewhere the gemm crate packs one
        // factor of small products in memory that it asks for and gives back within the call.
        let most = if Cpu::instructions() == "avx2" { (0, 0) } else { (1, 4096) };
        assert_eq!((seen.count_current, seen.bytes_current), (0, 0), "{family:?}: {seen:?}");
        assert!(seen.count_max <= most.0 && seen.bytes_max <= most.1, "{family:?}: {seen:?}");
    }
}

/// Allocations of a step with peers (plans, messages) are given back within it.
#[test]
fn a_thousand_steps_of_four_ranks_leave_no_byte_behind() {
    let all = MemoryOptions {
        recompute: Recompute::Full,
        shard_optimizer: true,
        sequence_parallel: true,
    };
    let none = MemoryOptions::default();
    for (shape, virtual_stages, memory) in
        [(split(2, 2, 1), 2, none), (split(2, 1, 2), 1, none), (split(2, 1, 2), 1, all)]
    {
        let job = TrainingJob { virtual_stages, memory, ..short(Family::Llama, shape) };
        let mesh = Mesh::new(shape);
        let left = in_process(mesh, |rank, groups| {
            let coords = mesh.coords(rank);
            let world = std::sync::Arc::clone(&groups.world);
            let mut trainer = Trainer::new(&job, coords, groups, Cpu::new(1).unwrap()).unwrap();
            let batches = micros(&job, coords.data, 0);
            for step in 0..WARM_UP {
                trainer.step(step, &batches).unwrap();
            }
            let seen = allocation_counter::measure(|| {
                for step in WARM_UP..job.steps {
                    trainer.step(step, &batches).unwrap();
                }
            });
            // Who lets go last of a message is not always who made it; together they are even.
            world.barrier().unwrap();
            seen.bytes_current
        });
        let left: i64 = left.iter().sum();
        // The last exchange's values, which the group keeps until the next.
        assert!(left.abs() < 4096, "{shape:?}: {left} bytes after {STEPS} steps");
    }
}
