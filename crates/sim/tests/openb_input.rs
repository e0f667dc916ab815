//! Malformed traces are refused with file, line, column and what was expected.

use drumline_sim::openb::{Options, PolicyName, Seeds, run};

const NODES: &str = "sn,cpu_milli,memory_mib,gpu,model\nn-0,64000,262144,2,P100\n";
const PODS: &str = "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\np-0,1000,10,1,500,\n";

fn refusal(nodes: &str, pods: &str) -> String {
    let files = ("nodes.csv".to_owned(), "pods.csv".to_owned());
    let options = Options { files, policies: vec![PolicyName::BestFit], ..Options::default() };
    match run(nodes, pods, &options) {
        Ok(_) => "accepted".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_wrong_cell_is_named_with_its_place() {
    assert_eq!(refusal(NODES, PODS), "accepted");
    let cases = [
        ("", PODS, "nodes.csv:1:1: expected a header line with column names, found \"\""),
        ("sn,cpu_milli\n", PODS, "nodes.csv:1:1: expected a column named memory_mib, found \"\""),
        (
            "sn,cpu_milli,memory_mib,gpu,model\nn-0,many,1,2,P100\n",
            PODS,
            "nodes.csv:2:5: expected thousandths of a core, a whole number from 0 to 1000000000, \
             found \"many\"",
        ),
        (
            "sn,cpu_milli,memory_mib,gpu,model\n\nn-0,1,1,16,P100\n",
            PODS,
            "nodes.csv:3:9: expected GPUs, a whole number from 0 to 8, found \"16\"",
        ),
        (
            NODES,
            "name,cpu_milli,memory_mib,num_gpu,gpu_milli\np-0,1000,10,1\n",
            "pods.csv:2:14: expected 5 columns, as in the header, found \"\"",
        ),
        (
            NODES,
            "name,cpu_milli,memory_mib,num_gpu,gpu_milli\np-0,1000,10,0,500\n",
            "pods.csv:2:15: expected 0 exactly when num_gpu is 0, found \"500\"",
        ),
        (
            NODES,
            "name,cpu_milli,memory_mib,num_gpu,gpu_milli\n,1000,10,0,0\n",
            "pods.csv:2:1: expected a name, found \"\"",
        ),
        (
            NODES,
            "name,cpu_milli,memory_mib,num_gpu,gpu_milli\np-0,-5,10,0,0\n",
            "pods.csv:2:5: expected thousandths of a core, a whole number from 0 to 1000000000, \
             found \"-5\"",
        ),
    ];
    for (nodes, pods, message) in cases {
        assert_eq!(refusal(nodes, pods), message);
    }
}

#[test]
fn an_empty_fleet_or_no_pods_end_in_a_report() {
    let header = "name,cpu_milli,memory_mib,num_gpu,gpu_milli\n";
    for (nodes, pods) in [("sn,cpu_milli,memory_mib,gpu,model\n", PODS), (NODES, header)] {
        let report = run(nodes, pods, &Options::default()).unwrap();
        assert_eq!(report.policies.len(), PolicyName::ALL.len());
        assert!(report.policies.iter().all(|p| p.mean == 0.0), "{report:?}");
    }
}

#[test]
fn seeds_and_policies_are_read_as_written() {
    assert_eq!("42..51".parse(), Ok(Seeds { first: 42, last: 51 }));
    assert_eq!("42..=51".parse(), Ok(Seeds { first: 42, last: 51 }));
    assert_eq!("7".parse(), Ok(Seeds { first: 7, last: 7 }));
    assert_eq!(Seeds { first: 42, last: 51 }.list().len(), 10);
    for bad in ["", "a", "5..4", "1..", "0..99999", "-1..2"] {
        assert!(bad.parse::<Seeds>().is_err(), "{bad}");
    }
    assert_eq!(PolicyName::list("all").unwrap(), PolicyName::ALL);
    assert_eq!(
        PolicyName::list("fgd,GpuPacking").unwrap(),
        [PolicyName::Fgd, PolicyName::GpuPacking]
    );
    assert!(PolicyName::list("fgd,best").unwrap_err().to_string().contains("\"best\""));
}

#[test]
fn the_report_has_the_shape_that_is_promised() {
    let options = Options {
        workload: "tiny".to_owned(),
        policies: vec![PolicyName::Drumline],
        seeds: "1..2".parse().unwrap(),
        ..Options::default()
    };
    let json = serde_json::to_value(run(NODES, PODS, &options).unwrap()).unwrap();
    assert_eq!(json["workload"], "tiny");
    let policy = &json["policies"][0];
    assert_eq!(policy["name"], "drumline");
    for key in ["mean", "min", "max", "seconds_per_run"] {
        assert!(policy[key].is_number(), "{key}");
    }
    assert_eq!(policy["mean"], 100.0, "five halves arrive for two GPUs, and four fit");
}
