//! What was learned for a workload is kept as text: it gives the same run again, and no other.

use drumline_sim::openb::{Options, PolicyName, RunError, ValuesError, run_kept};

const NODES: &str = "sn,cpu_milli,memory_mib,gpu,model\nn-0,64000,262144,8,G2\nn-1,32000,99999,2,T4\n\
                     n-2,32000,99999,4,T4\n";
const PODS: &str = "name,cpu_milli,memory_mib,num_gpu,gpu_milli\np-0,4000,10,1,470\n\
                    p-1,3000,10,1,810\np-2,8000,10,1,1000\np-3,4000,10,1,320\np-4,8000,10,0,0\n";

fn options() -> Options {
    let policies = vec![PolicyName::Drumline];
    Options { policies, seeds: "1..3".parse().unwrap(), ..Options::default() }
}

fn learned() -> (f64, String) {
    let (report, text) = run_kept(NODES, PODS, &options(), None).unwrap();
    assert!(report.policies[0].seconds_learning > 0.0);
    (report.policies[0].mean, text.expect("something was learned"))
}

fn refusal(nodes: &str, pods: &str, text: &str) -> String {
    match run_kept(nodes, pods, &options(), Some(("kept.values", text))) {
        Ok(_) => "accepted".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_run_with_kept_values_ends_as_the_run_that_learned_them() {
    let (mean, text) = learned();
    let (report, to_keep) =
        run_kept(NODES, PODS, &options(), Some(("kept.values", &text))).unwrap();
    assert_eq!(report.policies[0].mean, mean);
    assert_eq!(report.policies[0].seconds_learning, 0.0);
    assert_eq!(to_keep, None, "there is nothing new to keep");
}

#[test]
fn policies_that_learn_nothing_keep_nothing() {
    let options = Options { policies: vec![PolicyName::Fgd], ..options() };
    let (_, text) = run_kept(NODES, PODS, &options, None).unwrap();
    assert_eq!(text, None);
}

#[test]
fn values_of_another_workload_are_refused_with_the_remedy() {
    let (_, text) = learned();
    assert_eq!(refusal(NODES, PODS, &text), "accepted");
    let other_nodes = NODES.replace("64000", "48000");
    let other_pods = PODS.replace("470", "480");
    for (nodes, pods) in [(other_nodes.as_str(), PODS), (NODES, other_pods.as_str())] {
        let error = run_kept(nodes, pods, &options(), Some(("kept.values", &text))).unwrap_err();
        let mismatch = matches!(error, RunError::Values(ValuesError::Mismatch { .. }));
        assert!(mismatch, "{error}");
        assert!(error.to_string().starts_with("kept.values:2: learned for "), "{error}");
        assert!(error.to_string().contains("delete this one to learn anew"), "{error}");
    }
}

#[test]
fn a_file_that_is_damaged_is_refused_with_its_place() {
    let (_, text) = learned();
    let lines: Vec<&str> = text.lines().collect();
    let with = |at: usize, line: &str| {
        let mut lines = lines.clone();
        lines[at] = line;
        lines.join("\n")
    };
    let short = lines[..lines.len() - 1].join("\n");
    let cases = [
        ("{}".to_owned(), "kept.values:1: expected \"drumline sim openb values 1\", found \"{}\""),
        (with(2, "7"), "kept.values:3: expected the number of values, "),
        (with(3, "12 x3"), "kept.values:4: expected a whole number or =N, "),
        (with(3, "=5"), "kept.values:4: expected a whole number or =N, "),
        (format!("{text}1 2 3"), "expected a whole number or =N, "),
        (short, "values in all, found "),
    ];
    for (text, message) in cases {
        let said = refusal(NODES, PODS, &text);
        assert!(said.contains(message), "{said} lacks {message}");
        assert!(said.ends_with("delete the file to learn anew"), "{said}");
    }
}
