//! What every policy must keep on any trace: nothing overcommitted, nothing refused that fits.

use drumline_sim::openb::fleet::{Node, empty_nodes};
use drumline_sim::openb::input::WHOLE;
use drumline_sim::openb::policy::baseline::{BestFit, DotProd, GpuClustering, GpuPacking};
use drumline_sim::openb::policy::drumline::{Dispatcher, Tuning};
use drumline_sim::openb::policy::frag::{Fgd, fragmentation};
use drumline_sim::openb::policy::placer::Placer;
use drumline_sim::openb::policy::{PolicyName, Scorer};
use drumline_sim::openb::rng::Rng;
use drumline_sim::openb::run::learn_worth;
use drumline_sim::openb::typical::typical;
use drumline_sim::openb::workload::arrivals;
use drumline_sim::openb::{Options, Seeds, Trace, run};
use proptest::prelude::*;

type PodLine = (i32, i32, u8, u16, u8);

fn trace_text(nodes: &[(i32, i32, u8, u8)], pods: &[PodLine]) -> (String, String) {
    let mut node_file = "sn,cpu_milli,memory_mib,gpu,model\n".to_owned();
    for (i, (cpu, memory, gpus, model)) in nodes.iter().enumerate() {
        node_file += &format!("node-{i:03},{cpu},{memory},{gpus},M{model}\n");
    }
    let mut pod_file = "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\n".to_owned();
    for (i, (cpu, memory, gpus, milli, spec)) in pods.iter().enumerate() {
        let milli = match gpus {
            0 => 0,
            1 => *milli,
            _ => WHOLE,
        };
        let spec = ["", "M0", "M0|M1", "M9"][usize::from(*spec)];
        pod_file += &format!("pod-{i:03},{cpu},{memory},{gpus},{milli},{spec}\n");
    }
    (node_file, pod_file)
}

fn trace() -> impl Strategy<Value = (String, String)> {
    let node =
        (1_000i32..40_000, 1_000i32..50_000, prop::sample::select(vec![1u8, 2, 4, 8]), 0u8..2);
    let gpus = prop::sample::select(vec![0u8, 1, 1, 1, 2, 4, 8]);
    let milli = prop::sample::select(vec![100u16, 320, 470, 500, 810, 1000]);
    let pod = (0i32..12_000, 0i32..12_000, gpus, milli, 0u8..4);
    (prop::collection::vec(node, 1..8), prop::collection::vec(pod, 1..40))
        .prop_map(|(nodes, pods)| trace_text(&nodes, &pods))
}

/// The rule, written out once more: cores, memory, model, and enough devices with enough left.
fn fits_somewhere(trace: &Trace, pod: usize, nodes: &[Node]) -> bool {
    let pod = &trace.pods[pod];
    let shape = &trace.shapes[pod.shape];
    nodes.iter().any(|node| {
        let mut devices = 0;
        for place in 0..usize::from(node.gpus) {
            devices += u8::from(node.gpu[place] >= shape.gpu_milli);
        }
        node.cpu >= shape.cpu_milli
            && node.memory >= pod.memory_mib
            && devices >= shape.gpus
            && (shape.gpus == 0 || shape.models & node.model != 0)
    })
}

fn totals(nodes: &[Node]) -> (i64, i64, i64) {
    nodes.iter().fold((0, 0, 0), |(cpu, memory, gpu), node| {
        (cpu + i64::from(node.cpu), memory + i64::from(node.memory), gpu + node.gpu_left())
    })
}

/// Places every arrival and checks each step.
fn check_steps(
    trace: &Trace,
    order: &[usize],
    mut nodes_now: impl FnMut() -> Vec<Node>,
    mut place: impl FnMut(usize) -> bool,
) -> Result<(), TestCaseError> {
    let _ = nodes_now();
    for &pod in order {
        let before = nodes_now();
        let fits = fits_somewhere(trace, pod, &before);
        prop_assert_eq!(place(pod), fits, "pod {} of {:?}", pod, trace.pods[pod]);
        let after = nodes_now();
        let shape = &trace.shapes[trace.pods[pod].shape];
        let (was, is) = (totals(&before), totals(&after));
        let taken = if fits { 1 } else { 0 };
        prop_assert_eq!(was.0 - is.0, taken * i64::from(shape.cpu_milli));
        prop_assert_eq!(was.1 - is.1, taken * i64::from(trace.pods[pod].memory_mib));
        prop_assert_eq!(was.2 - is.2, taken * shape.gpu_total());
        prop_assert!(after.iter().all(|n| n.cpu >= 0 && n.memory >= 0));
        let changed = before.iter().zip(&after).filter(|(b, a)| b.gpu != a.gpu || b.cpu != a.cpu);
        prop_assert!(changed.count() <= 1, "a pod is on one node");
    }
    Ok(())
}

fn check_scorer<S: Scorer>(trace: &Trace, scorer: S) -> Result<(), TestCaseError> {
    let mut rng = Rng::new(7);
    let order = arrivals(trace, 1.3, &mut rng);
    let nodes = empty_nodes(trace, &mut rng);
    let placer = std::cell::RefCell::new(Placer::new(nodes, scorer, trace.shapes.len()));
    check_steps(
        trace,
        &order,
        || placer.borrow().nodes.clone(),
        |pod| {
            let pod = &trace.pods[pod];
            let shape = &trace.shapes[pod.shape];
            placer.borrow_mut().place(pod.shape, shape, pod.memory_mib).is_some()
        },
    )
}

fn quick() -> Tuning {
    Tuning { rounds: 2, fillings: 1, ..Tuning::default() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_policy_overcommits_or_refuses_what_fits((nodes, pods) in trace()) {
        let trace = Trace::read(("nodes", &nodes), ("pods", &pods)).unwrap();
        check_scorer(&trace, DotProd)?;
        check_scorer(&trace, GpuClustering)?;
        check_scorer(&trace, GpuPacking)?;
        check_scorer(&trace, BestFit)?;
        check_scorer(&trace, Fgd::new(typical(&trace, 0.95)))?;
    }

    #[test]
    fn our_policy_neither_overcommits_nor_refuses_what_fits((nodes, pods) in trace()) {
        let trace = Trace::read(("nodes", &nodes), ("pods", &pods)).unwrap();
        let tuning = quick();
        let worth = learn_worth(&trace, &tuning);
        let mut rng = Rng::new(7);
        let order = arrivals(&trace, 1.3, &mut rng);
        let nodes = empty_nodes(&trace, &mut rng);
        let dispatcher =
            std::cell::RefCell::new(Dispatcher::new(nodes, &worth, &tuning, &trace.shapes));
        check_steps(
            &trace,
            &order,
            || dispatcher.borrow().nodes().to_vec(),
            |pod| {
                let pod = &trace.pods[pod];
                dispatcher.borrow_mut().place(pod.shape, pod.memory_mib).is_some()
            },
        )?;
    }

    #[test]
    fn the_same_seeds_give_the_same_figures_on_any_number_of_threads((nodes, pods) in trace()) {
        let policies = PolicyName::ALL[..6].to_vec();
        let options =
            Options { policies, seeds: Seeds { first: 1, last: 3 }, ..Options::default() };
        let one = run(&nodes, &pods, &options).unwrap();
        let two = run(&nodes, &pods, &Options { threads: 2, ..options }).unwrap();
        for (a, b) in one.policies.iter().zip(&two.policies) {
            prop_assert_eq!((a.name, a.mean, a.min, a.max), (b.name, b.mean, b.min, b.max));
            prop_assert_eq!(&a.failures, &b.failures);
        }
    }

    #[test]
    fn fragmentation_lies_between_nothing_and_all_that_is_left((nodes, pods) in trace()) {
        let trace = Trace::read(("nodes", &nodes), ("pods", &pods)).unwrap();
        let typical = typical(&trace, 0.95);
        for node in empty_nodes(&trace, &mut Rng::new(1)) {
            let amount = fragmentation(&node, &typical);
            prop_assert!((0.0..=node.gpu_left() as f64 + 1e-6).contains(&amount));
        }
    }
}

#[test]
fn arrivals_stop_where_the_next_would_pass_the_ratio() {
    let (nodes, pods) = trace_text(&[(9000, 9000, 8, 0)], &[(0, 0, 1, 1000, 0), (0, 0, 2, 0, 0)]);
    let trace = Trace::read(("nodes", &nodes), ("pods", &pods)).unwrap();
    for seed in 0..50 {
        let order = arrivals(&trace, 1.3, &mut Rng::new(seed));
        let total: i64 = order.iter().map(|&p| trace.shapes[trace.pods[p].shape].gpu_total()).sum();
        assert!((9_000..=10_400).contains(&total), "{total}");
    }
}

#[test]
fn a_trace_that_asks_for_more_than_the_ratio_is_cut() {
    let (nodes, pods) = trace_text(&[(9000, 9000, 1, 0)], &[(0, 0, 1, 1000, 0); 30]);
    let trace = Trace::read(("nodes", &nodes), ("pods", &pods)).unwrap();
    assert_eq!(arrivals(&trace, 1.3, &mut Rng::new(1)).len(), 1);
    assert_eq!(arrivals(&trace, 4.0, &mut Rng::new(1)).len(), 4);
}

#[test]
fn a_pod_that_can_never_fit_is_counted_and_named() {
    let (nodes, pods) = trace_text(&[(9000, 9000, 2, 0); 4], &[(0, 0, 1, 500, 0), (0, 0, 4, 0, 0)]);
    let options = Options { policies: vec![PolicyName::Fgd], ..Options::default() };
    let report = run(&nodes, &pods, &options).unwrap();
    assert_eq!(report.impossible, ["pod-001"]);
    let class = report.policies[0].failures.iter().find(|c| c.class == "4-gpu").unwrap();
    assert_eq!(class.arrived, class.failed);
}
