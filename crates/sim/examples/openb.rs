//! Runs the openb experiment: `openb NODES.csv POLICIES SEEDS PODS.csv...`, a table on standard output.

use drumline_sim::openb::{Options, PolicyName, run};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [nodes, policies, seeds, pods @ ..] = args.as_slice() else {
        return Err("usage: openb NODES.csv POLICIES SEEDS PODS.csv...".into());
    };
    let nodes_csv = std::fs::read_to_string(nodes)?;
    for pods in pods {
        let options = Options {
            workload: pods.clone(),
            files: (nodes.clone(), pods.clone()),
            policies: PolicyName::list(policies)?,
            seeds: seeds.parse()?,
            threads: 2,
            ..Options::default()
        };
        let report = run(&nodes_csv, &std::fs::read_to_string(pods)?, &options)?;
        println!("{} (impossible: {})", report.workload, report.impossible.len());
        for p in &report.policies {
            let failures: Vec<String> = p
                .failures
                .iter()
                .map(|f| format!("{} {:.0}/{:.0}", f.class, f.failed, f.arrived))
                .collect();
            println!(
                "{:14} {:6.2} ({:.2}..{:.2}) {:.3}s learn {:.2}s cpu-only {:.2}% cores {:.2}%  {}",
                p.name,
                p.mean,
                p.min,
                p.max,
                p.seconds_per_run,
                p.seconds_learning,
                p.cpu_only_pods_placed,
                p.cpu_only_cores_placed,
                failures.join(" ")
            );
        }
    }
    Ok(())
}
