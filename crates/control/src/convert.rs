//! What agents say, as events. Texts are cut to a length that can be stored.

use drumline_cluster::{Device, Domain, Health, Node};
use drumline_lifecycle::{Checkpoint, Join, Report, Told};
use drumline_spec::DeviceKind;
use drumline_types::{Bytes, NodeName, RankExit, RankPhase, Timestamp};
use drumline_wire::v1;

/// Longest error message that is kept, in bytes.
const MESSAGE_MAX: usize = 1024;
/// Longest address or position that is kept, in bytes.
const SHORT_MAX: usize = 256;

/// Cuts a text at a character's edge.
pub(crate) fn cut(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let end = (0..=max).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    format!("{}…", &text[..end])
}

/// Reads a phase; `None` for a word of a newer agent.
pub(crate) fn phase(word: &str) -> Option<RankPhase> {
    [
        RankPhase::Launching,
        RankPhase::Started,
        RankPhase::Running,
        RankPhase::Succeeded,
        RankPhase::Failed,
    ]
    .into_iter()
    .find(|phase| phase.as_str() == word)
}

pub(crate) fn told(status: &v1::RankStatus) -> Option<Told> {
    let mut exit = RankExit::from(status);
    exit.message = cut(&exit.message, MESSAGE_MAX);
    Some(Told { phase: phase(&status.phase)?, pid: status.pid, exit, at: Timestamp(status.at_ms) })
}

pub(crate) fn join(join: &v1::JoinWorld) -> Join {
    Join {
        collective_address: cut(&join.collective_address, SHORT_MAX),
        inference_url: cut(&join.inference_url, SHORT_MAX),
        host: cut(&join.host, SHORT_MAX),
    }
}

pub(crate) fn report(report: &v1::RankReport) -> Report {
    let checkpoint = report
        .checkpoint
        .as_ref()
        .map(|checkpoint| Checkpoint { step: checkpoint.step, path: cut(&checkpoint.path, 4096) });
    Report {
        step: report.step,
        checkpoint,
        error: cut(&report.error, MESSAGE_MAX),
        position: cut(&report.position, SHORT_MAX),
    }
}

/// Reads a node from its agent's hello. The health of devices comes from `heartbeat` where it has
/// any to tell.
pub(crate) fn node(
    name: &NodeName,
    hello: &v1::Hello,
    heartbeat: Option<&v1::Heartbeat>,
    ready: bool,
) -> Node {
    let devices = hello
        .devices
        .iter()
        .map(|device| {
            let kind = if device.kind == "gpu" { DeviceKind::Gpu } else { DeviceKind::Cpu };
            let memory = Bytes(device.memory_bytes);
            let sample = heartbeat
                .and_then(|beat| beat.devices.iter().find(|s| s.index == device.index))
                .map(|sample| (sample.healthy, sample.message.as_str()));
            let (healthy, message) = sample.unwrap_or((device.healthy, device.message.as_str()));
            let health = match (healthy, message) {
                (true, _) => Health::Healthy,
                (false, "") => Health::Failed("reported unhealthy".to_owned()),
                (false, message) => Health::Failed(cut(message, SHORT_MAX)),
            };
            Device { health, ..Device::new(kind, cut(&device.model, SHORT_MAX), memory) }
        })
        .collect();
    let mut node = Node::new(name.clone(), devices);
    node.ready = ready;
    node.cpu_milli = u64::from(hello.cores) * 1000;
    node.memory = Bytes(hello.memory_bytes);
    node.topology = hello
        .topology
        .iter()
        .map(|step| {
            let (level, name) = (cut(&step.level, SHORT_MAX), cut(&step.name, SHORT_MAX));
            Domain::new(level, name).linked(step.link_mb_per_s)
        })
        .collect();
    node
}

/// Checks a hello.
///
/// # Errors
/// What is wrong with it, for the agent's log.
pub(crate) fn check_hello(hello: &v1::Hello) -> Result<NodeName, String> {
    let name = hello.node.parse::<NodeName>().map_err(|error| error.to_string())?;
    if hello.devices.len() > 256 {
        return Err(format!("{} devices; at most 256 are taken", hello.devices.len()));
    }
    if hello.instance.is_empty() || hello.instance.len() > 128 {
        return Err("an agent's instance is 1 to 128 bytes".to_owned());
    }
    if hello.topology.len() > 16 {
        return Err(format!("{} levels of topology; at most 16 are taken", hello.topology.len()));
    }
    let in_order = hello.devices.iter().zip(0u32..).all(|(device, index)| device.index == index);
    if !in_order {
        return Err("devices must be numbered from 0, in order".to_owned());
    }
    if let Some(unknown) = hello.devices.iter().find(|d| d.kind != "cpu" && d.kind != "gpu") {
        return Err(format!("device kind {:?} is neither cpu nor gpu", unknown.kind));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_at_a_character() {
        assert_eq!(cut("short", 10), "short");
        assert_eq!(cut("ääää", 5), "ää…");
    }

    #[test]
    fn every_phase_is_read_back_and_others_are_not() {
        for word in ["launching", "started", "running", "succeeded", "failed"] {
            assert_eq!(phase(word).unwrap().as_str(), word);
        }
        assert_eq!(phase("paused"), None);
    }

    #[test]
    fn a_hello_that_makes_no_sense_is_refused_with_the_cause() {
        let device = |index, kind: &str| v1::AgentDevice {
            index,
            kind: kind.to_owned(),
            ..v1::AgentDevice::default()
        };
        let hello = |node: &str, devices| v1::Hello {
            node: node.to_owned(),
            instance: "1".to_owned(),
            devices,
            ..v1::Hello::default()
        };
        assert!(check_hello(&hello("n", vec![device(0, "cpu"), device(1, "gpu")])).is_ok());
        for (bad, evidence) in [
            (hello("N", vec![]), "\"N\""),
            (hello("n", vec![device(1, "cpu")]), "from 0"),
            (hello("n", vec![device(0, "tpu")]), "tpu"),
        ] {
            let error = check_hello(&bad).unwrap_err();
            assert!(error.contains(evidence), "{error}");
        }
    }
}
