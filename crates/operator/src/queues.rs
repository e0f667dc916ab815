//! Queues as the cluster has them: their specs, what stands in each, and which of them a namespace
//! belongs to.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use drumline_spec::manifest::parse_all;
use drumline_spec::{Mistake, QueueSpec};
use drumline_types::{JobPhase, QueueName};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::DynamicObject;
use kube::runtime::reflector::Store;
use serde_json::json;

use crate::core::{Core, Done};
use crate::crd::{GROUP, VERSION};
use crate::job::Job;
use crate::step::phase;
use crate::wake::Wake;

/// Annotation of a namespace: the queue of its jobs that name none but `default`.
pub const QUEUE: &str = "drumline.dev/queue";
/// A queue's status is written at most so often.
const TOLD: Duration = Duration::from_secs(3);

/// Jobs of one queue that wait, and that hold devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Counts {
    pub(crate) pending: u64,
    pub(crate) running: u64,
}

/// What is known of the queues beside their specs.
#[derive(Debug, Default)]
pub(crate) struct QueueStates {
    /// What each queue's status was last told, and when.
    told: BTreeMap<String, (Counts, Instant)>,
}

impl QueueStates {
    /// Returns the queues that say what they are; those that do not are told of.
    pub(crate) fn read(&self, store: &Store<DynamicObject>) -> Vec<QueueSpec> {
        let mut queues = Vec::new();
        for object in store.state() {
            match read_queue(&object) {
                Ok(all) => queues.extend(all),
                Err(mistakes) => {
                    let first = mistakes.first().map(|mistake| mistake.message.clone());
                    let name = &object.metadata.name;
                    tracing::warn!(queue = ?name, ?first, "a queue is left out");
                }
            }
        }
        queues
    }

    /// Returns the queue of each namespace that names one.
    pub(crate) fn of_namespaces(&self, store: &Store<Namespace>) -> BTreeMap<String, QueueName> {
        let named = store.state().into_iter().filter_map(|space| {
            let queue = space.metadata.annotations.as_ref()?.get(QUEUE)?.parse().ok()?;
            Some((space.metadata.name.clone()?, queue))
        });
        named.collect()
    }

    pub(crate) fn was_told(&mut self, queue: &str, is_stored: bool) {
        if !is_stored {
            self.told.remove(queue);
        }
    }
}

/// Parses a queue's object as the manifest that it was applied from.
pub(crate) fn read_queue(object: &DynamicObject) -> Result<Vec<QueueSpec>, Vec<Mistake>> {
    let name = object.metadata.name.clone().unwrap_or_default();
    let manifest = json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": "Queue",
        "metadata": { "name": name },
        "spec": object.data.get("spec").cloned().unwrap_or_default(),
    });
    Ok(parse_all(&manifest.to_string(), &name)?.queues)
}

impl Core {
    /// Writes what stands in each queue where it has changed.
    pub(crate) fn tell_queues(&mut self, jobs: &BTreeMap<String, Job>, wake: &mut Wake) {
        let mut counts: BTreeMap<String, Counts> = BTreeMap::new();
        for object in self.stores.queues.state() {
            counts.insert(object.metadata.name.clone().unwrap_or_default(), Counts::default());
        }
        for job in jobs.values() {
            let Ok(spec) = &job.spec else { continue };
            let Some(counts) = counts.get_mut(spec.settings.queue.as_str()) else { continue };
            match phase(&job.status) {
                JobPhase::Pending => counts.pending += 1,
                phase if phase.holds_devices() => counts.running += 1,
                _ => {}
            }
        }
        self.queues.told.retain(|queue, _| counts.contains_key(queue));
        for (queue, counts) in counts {
            if let Some((was, at)) = self.queues.told.get(&queue) {
                if *was == counts {
                    continue;
                }
                if at.elapsed() < TOLD {
                    wake.at(*at + TOLD);
                    continue;
                }
            }
            self.queues.told.insert(queue.clone(), (counts, Instant::now()));
            self.spawn(queue, move |writer, queue| async move {
                let answer = writer.queue_status(&queue, counts.pending, counts.running).await;
                Done::QueueTold { queue, answer }
            });
        }
    }
}
