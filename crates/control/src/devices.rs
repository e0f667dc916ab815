//! What the health of a device means for those who hold it, and its clearing by an operator.

use drumline_lifecycle::Event;
use drumline_types::{DeviceId, JobId, NodeName, Timestamp};
use drumline_wire::v1;
use drumline_wire::v1::agent_down::Kind as Down;

use crate::api::ApiError;
use crate::core::{Core, Send};

impl Core {
    /// Ends the attempts that have ranks on these devices, where nothing can run any more.
    /// Told at every heartbeat for as long as it is so, which makes no difference.
    pub(crate) fn judge_devices(
        &mut self,
        node: &NodeName,
        samples: &[v1::DeviceSample],
        now: Timestamp,
    ) {
        for sample in samples {
            let device = DeviceId { node: node.clone(), index: sample.index };
            let holders: Vec<JobId> = self
                .active
                .iter()
                .filter(|id| self.jobs[*id].state().ranks.iter().any(|r| r.device == device))
                .cloned()
                .collect();
            for id in holders {
                let message = crate::convert::cut(&sample.message, 256);
                let event = Event::DeviceFailed { device: device.clone(), message };
                self.apply(&id, event, now);
            }
        }
    }

    /// Passes on that somebody has dealt with a device.
    pub(crate) fn clear_device(
        &mut self,
        node: &NodeName,
        index: u32,
        now: Timestamp,
    ) -> Result<(), ApiError> {
        let record = self.fleet.nodes.get(node);
        let hello = record.and_then(|record| record.hello.as_ref());
        let device = hello.and_then(|hello| hello.devices.iter().find(|d| d.index == index));
        match device {
            None => Err(ApiError::NotFound(format!(
                "there is no device {node}/{index}; `drumline nodes --devices` lists them"
            ))),
            Some(device) if device.kind != "gpu" => Err(ApiError::Invalid(format!(
                "{node}/{index} is a {} device, which has nothing to clear",
                device.kind
            ))),
            Some(_) if record.is_none_or(|record| record.session.is_none()) => {
                Err(ApiError::Unavailable(format!("node {node} is not heard; try again later")))
            }
            Some(_) => {
                let clear = v1::ClearDevice { index };
                self.sends.push(Send { node: node.clone(), kind: Down::ClearDevice(clear) });
                self.events.push(v1::EventView {
                    at_ms: now.0,
                    severity: "info".to_owned(),
                    reason: "DeviceCleared".to_owned(),
                    message: format!("device {node}/{index}: an operator has dealt with it"),
                    node: node.to_string(),
                    ..v1::EventView::default()
                });
                Ok(())
            }
        }
    }
}

/// Returns what is new about the health of a node's devices.
pub(crate) fn health_news(
    node: &NodeName,
    before: Option<&v1::Heartbeat>,
    samples: &[v1::DeviceSample],
    now: Timestamp,
) -> Vec<v1::EventView> {
    let mut news = Vec::new();
    for sample in samples {
        let was = before.and_then(|beat| beat.devices.iter().find(|s| s.index == sample.index));
        if was.is_none_or(|was| was.healthy) == sample.healthy {
            continue;
        }
        let (severity, reason, what) = match sample.healthy {
            false if sample.ends_work => ("error", "DeviceFailed", sample.message.as_str()),
            false => ("warning", "DeviceDrained", sample.message.as_str()),
            true => ("info", "DeviceHealthy", "offered again"),
        };
        let what = crate::convert::cut(what, 256);
        news.push(v1::EventView {
            at_ms: now.0,
            severity: severity.to_owned(),
            reason: reason.to_owned(),
            message: format!("device {node}/{}: {what}", sample.index),
            node: node.to_string(),
            ..v1::EventView::default()
        });
    }
    news
}
