//! Where a gang may run, at which sizes, and who may use how much.

use drumline_spec::manifest::{Manifests, parse, parse_all};
use drumline_spec::{DeviceKind, Elastic, Gang, Reclaim, TopologyRule};

fn all(text: &str) -> Manifests {
    let told = |mistakes: Vec<_>| panic!("{mistakes:?}");
    parse_all(text, "t.yaml").unwrap_or_else(told)
}

fn told(text: &str) -> Vec<String> {
    match parse_all(text, "t.yaml") {
        Ok(_) => Vec::new(),
        Err(mistakes) => mistakes.iter().map(ToString::to_string).collect(),
    }
}

fn training(more: &str) -> String {
    format!(
        "apiVersion: drumline.dev/v1alpha1\nkind: TrainingJob\nmetadata: {{name: t}}\nspec:\n  \
         model: {{family: llama, layers: 4, hidden: 64, ffn: 128, heads: 4, vocab: 256, context: 32}}\n  \
         data: {{path: /d}}\n  batch: {{global: 8}}\n  steps: 100\n  \
         parallelism: {{tensor: 2, pipeline: 2, data: 2}}\n{more}"
    )
}

#[test]
fn a_gang_carries_every_wish_of_its_manifest() {
    let text = training(
        "  resources: {device: gpu, models: [h100, a100], cpu: 4000, memory: 1024, spares: 8, \
         tolerations: [dedicated=training, flaky]}\n  topology: {required: zone, copyPreferred: rack}\n  \
         elastic: {least: 1, most: 8, step: 1}\n",
    );
    // 8 copies need a batch of 8; 3 copies do not divide it.
    assert!(told(&text)[0].contains("3 copies"), "{:?}", told(&text));
    let text = text.replace("most: 8, step: 1", "most: 2");
    let gang: Gang = all(&text).jobs[0].gang();
    assert_eq!(gang.models, ["h100", "a100"]);
    assert_eq!((gang.cpu_milli, gang.memory.0, gang.spares), (4000, 1 << 30, 8));
    assert_eq!(gang.tolerations.len(), 2);
    let rule = |ranks, level: &str, required| TopologyRule { ranks, level: level.into(), required };
    assert_eq!(gang.topology, [rule(0, "zone", true), rule(4, "rack", false)]);
    assert_eq!(gang.elastic, Some(Elastic { least: 4, most: 8, step: 4 }), "in ranks");
}

#[test]
fn a_tensor_group_may_share_a_domain_of_several_nodes_instead_of_one() {
    let text = training("  topology: {tensorRequired: nvlink, copyPreferred: spine}\n");
    let gang: Gang = all(&text).jobs[0].gang();
    assert_eq!(gang.node_group, 1);
    let rule = |ranks, level: &str, required| TopologyRule { ranks, level: level.into(), required };
    assert_eq!(gang.topology, [rule(4, "spine", false), rule(2, "nvlink", true)]);
    let plain: Gang = all(&training("  topology: {tensorRequired: node}\n")).jobs[0].gang();
    assert_eq!((plain.node_group, plain.topology), (2, Vec::new()));
}

#[test]
fn parts_of_a_gang_have_rules_of_their_own() {
    let text = training(
        "  topology: {runsRequired: [4/rack], runsPreferred: [8/spine, 2/node], preferred: zone}\n",
    );
    let gang: Gang = all(&text).jobs[0].gang();
    let rule = |ranks, level: &str, required| TopologyRule { ranks, level: level.into(), required };
    let wanted = [
        rule(0, "zone", false),
        rule(4, "rack", true),
        rule(8, "spine", false),
        rule(2, "node", false),
    ];
    assert_eq!(gang.topology, wanted);
    for wrong in ["rack", "1/rack", "70000/rack", "16/", "x/rack", "16/Rack!"] {
        let told = told(&training(&format!("  topology: {{runsRequired: [\"{wrong}\"]}}\n")));
        assert_eq!(told.len(), 1, "{wrong}: {told:?}");
        assert!(told[0].contains("not RANKS/LEVEL"), "{told:?}");
        assert!(told[0].starts_with("t.yaml:"), "{told:?}");
    }
}

#[test]
fn only_a_command_has_a_leader() {
    let command = "apiVersion: drumline.dev/v1alpha1\nkind: CommandJob\nmetadata: {name: c}\n\
                   spec: {argv: [x], ranks: 5, resources: {device: gpu, leader: cpu}}\n";
    let gang: Gang = all(command).jobs[0].gang();
    assert_eq!((gang.device, gang.leader), (DeviceKind::Gpu, Some(DeviceKind::Cpu)));
    let wrong = told(&training("  resources: {leader: cpu}\n"));
    assert!(wrong[0].contains("only a CommandJob"), "{wrong:?}");
}

#[test]
fn spares_are_whole_tensor_groups() {
    let with = |spares: u32| told(&training(&format!("  resources: {{spares: {spares}}}\n")));
    assert!(
        with(3)[0].contains("3 spares are no whole tensor groups of 2; 4 are"),
        "{:?}",
        with(3)
    );
    assert!(with(4).is_empty(), "{:?}", with(4));
}

#[test]
fn sizes_that_cannot_be_are_refused_where_they_stand() {
    let with = |elastic: &str| told(&training(&format!("  elastic: {elastic}\n")));
    assert!(with("{least: 3, most: 2}")[0].contains("is more than most"));
    assert!(with("{least: 3, most: 4}")[0].contains("wanted size, 2 copies"));
    assert!(with("{least: 1, most: 2, step: 2}")[0].contains("not a multiple of step, 2"));
    assert!(with("{least: 1, most: 2}").is_empty());
    assert!(with("{least: 1}")[0].contains("most"));
}

#[test]
fn a_job_says_how_it_may_be_disturbed() {
    let text = training(
        "  scheduling: {expected: 2h, minRuntime: 10m, preemptible: false, disruptions: {count: 2}}\n",
    );
    let settings = all(&text).jobs[0].settings.clone();
    assert_eq!((settings.expected_ms, settings.min_runtime_ms), (Some(7_200_000), 600_000));
    assert!(!settings.preemptible);
    assert_eq!(settings.disruptions.map(|d| (d.count, d.per_ms)), Some((2, 86_400_000)));
    let plain = all(&training("")).jobs[0].clone();
    assert!(plain.wishes.is_empty() && plain.settings.preemptible);
    let json = serde_json::to_string(&plain).unwrap();
    assert!(!json.contains("wishes"), "nothing is stored of what nobody asked for");
}

const QUEUE: &str = "\
apiVersion: drumline.dev/v1alpha1
kind: Queue
metadata: {name: team-a}
spec:
  parent: research
  quota: {h100: 64, cpu: 8}
  weight: 3
  borrowingLimit: {h100: 32}
  reclaim: lowerPriority
";

#[test]
fn a_file_may_hold_queues_and_jobs() {
    let both = all(&format!("{QUEUE}---\n{}", training("  queue: team-a\n")));
    assert_eq!((both.queues.len(), both.jobs.len()), (1, 1));
    let queue = &both.queues[0];
    assert_eq!(queue.parent.as_ref().unwrap().as_str(), "research");
    assert_eq!((queue.quota["h100"], queue.quota["cpu"], queue.weight), (64, 8, 3));
    assert_eq!(queue.borrowing_limit.as_ref().unwrap()["h100"], 32);
    assert_eq!((queue.lending_limit.clone(), queue.reclaim), (None, Reclaim::LowerPriority));
    assert!(parse(QUEUE, "q.yaml").is_err(), "where only jobs are wanted, a queue is a mistake");
    let open = all("apiVersion: drumline.dev/v1alpha1\nkind: Queue\nmetadata: {name: open}\n");
    assert!(open.queues[0].quota.is_empty());
}

#[test]
fn wrong_queues_are_told_with_place_and_remedy() {
    let wrong = |from: &str, to: &str| told(&QUEUE.replace(from, to));
    assert!(wrong("h100: 64", "h100: many")[0].contains("whole number"));
    assert!(wrong("h100: 64", "h100: -1")[0].contains("t.yaml:6"));
    assert!(wrong("parent: research", "parent: team-a")[0].contains("own parent"));
    assert!(wrong("weight: 3", "weight: 0")[0].contains("1 to"));
    assert!(wrong("lowerPriority", "lower")[0].contains("lowerPriority"));
    assert!(wrong("quota:", "quotas:")[0].contains("quota"));
}
