//! `drumline node-agent`: what watches one node of a Kubernetes cluster.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use drumline_operator::Observe;
use drumline_operator::node::{self, DeviceLook, LookAtDevices, NodeOptions};
use drumline_telemetry::gpu::{Gpu, NvmlProblem, Recovery, Sample, Watch};
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;

/// Between two looks at the GPUs.
const LOOK: Duration = Duration::from_secs(5);
/// A driver that has not answered for so long hangs.
const SILENT: Duration = Duration::from_secs(60);

/// Arguments of `node-agent`.
#[derive(Debug, Args)]
pub struct NodeAgentArgs {
    /// Kubernetes' name of the node that it runs on.
    #[arg(long, env = "NODE_NAME")]
    pub node: String,
    /// Where probes and, with a token, metrics are served.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9401")]
    pub listen: SocketAddr,
    /// File with the token that a reader of the metrics must show.
    #[arg(long, value_name = "FILE")]
    pub metrics_token_file: Option<PathBuf>,
    /// Taint the node while a device is bad.
    #[arg(long)]
    pub taint: bool,
}

/// Runs until it is asked to stop.
///
/// # Errors
/// The user's, for a token file that is none; failed, when there is no cluster.
pub(super) async fn run(args: NodeAgentArgs, stop: CancellationToken) -> Result<(), Failure> {
    let failed = |error: String| Failure::failed(error);
    let client = drumline_operator::config_here().await.map_err(|e| failed(e.to_string()))?;
    let keys = args.metrics_token_file.as_deref().map(super::operator::read_key).transpose()?;
    let options = NodeOptions {
        client,
        node: args.node,
        observe: Observe { listen: args.listen, keys },
        taints: args.taint,
        look: look_at_devices(),
    };
    node::run(options, stop).await.map_err(|error| failed(error.to_string()))
}

/// Returns what looks at this machine's GPUs; one without a driver has none.
fn look_at_devices() -> LookAtDevices {
    let mut watch = Err(NvmlProblem::NoDriver);
    Box::new(move || {
        if watch.is_err() {
            // Again at each look: the driver may be loaded after the agent is started.
            watch = Watch::start(None, LOOK);
        }
        match &watch {
            Ok(watch) => {
                let gpus = &watch.inventory().gpus;
                let reading = watch.latest().ok_or("the driver has not answered yet")?;
                if reading.at.elapsed() > SILENT {
                    let seconds = reading.at.elapsed().as_secs();
                    return Err(format!("the driver has not answered for {seconds} s"));
                }
                Ok(gpus
                    .iter()
                    .zip(&reading.samples)
                    .map(|(gpu, sample)| look(gpu, sample))
                    .collect())
            }
            Err(problem) if problem.is_absent() => Ok(Vec::new()),
            Err(problem) => Err(format!("{problem}. {}", problem.remedy())),
        }
    })
}

fn look(gpu: &Gpu, sample: &Sample) -> DeviceLook {
    DeviceLook {
        index: gpu.index,
        kind: "gpu",
        model: gpu.model.clone(),
        utilization: sample.busy(),
        memory_used: sample.memory_used_bytes,
        problem: problem(sample),
    }
}

/// Returns what keeps a GPU from being used; `None`: nothing that the driver says.
fn problem(sample: &Sample) -> Option<String> {
    if let Some(why) = &sample.lost {
        return Some(format!("it does not answer: {why}"));
    }
    match sample.recovery {
        Some(Recovery::Reset) => return Some("the driver wants it reset".to_owned()),
        Some(Recovery::Reboot) => return Some("the driver wants the node rebooted".to_owned()),
        Some(Recovery::DrainPeers | Recovery::DrainAndReset) => {
            return Some("the driver wants it drained and reset".to_owned());
        }
        Some(Recovery::None) | None => {}
    }
    (sample.remap_failed == Some(true)).then(|| "its memory is worn out".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_bad_when_the_driver_says_so() {
        let good = Sample { recovery: Some(Recovery::None), ..Sample::default() };
        assert_eq!(problem(&good), None);
        for (sample, told) in [
            (Sample { lost: Some("GPU is lost".to_owned()), ..Sample::default() }, "GPU is lost"),
            (Sample { recovery: Some(Recovery::Reboot), ..Sample::default() }, "rebooted"),
            (Sample { remap_failed: Some(true), ..Sample::default() }, "worn out"),
        ] {
            let problem = problem(&sample).expect("it is bad");
            assert!(problem.contains(told), "{problem}");
        }
    }
}
