//! An independent watcher: it follows every pod from outside, knows nothing of plans, and remembers
//! whether a node's devices were ever promised twice.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::{Api, ApiResource};
use kube::core::Object;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use kube::{Client, ResourceExt};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

const GPU: &str = "nvidia.com/gpu";
const JOB: &str = "drumline.dev/job";
const ATTEMPT: &str = "drumline.dev/attempt";

/// What is read of a pod: little, since there are many.
#[derive(Clone, Debug, Deserialize, serde::Serialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    node_name: Option<String>,
    containers: Vec<Container>,
}

#[derive(Clone, Debug, Deserialize, serde::Serialize, Default)]
#[serde(default)]
struct Container {
    resources: Resources,
}

#[derive(Clone, Debug, Deserialize, serde::Serialize, Default)]
#[serde(default)]
struct Resources {
    limits: BTreeMap<String, Quantity>,
}

#[derive(Clone, Debug, Deserialize, serde::Serialize, Default)]
#[serde(default)]
struct PodStatus {
    phase: Option<String>,
}

type Pod = Object<PodSpec, PodStatus>;

/// One pod, as last seen.
#[derive(Clone, Debug)]
struct Seen {
    node: Option<String>,
    gpus: u32,
    job: Option<String>,
    attempt: u32,
    is_running: bool,
    is_over: bool,
    is_going: bool,
}

#[derive(Default)]
struct Books {
    pods: BTreeMap<String, Seen>,
    taken: BTreeMap<String, u32>,
    /// When a node was found with more promised than it has, in words.
    faults: Vec<String>,
    bindings: u64,
    most: u32,
    /// When the first and the last binding since [`Witness::mark`] were seen.
    span: Option<(Instant, Instant)>,
}

/// The watcher. Cloning shares it.
#[derive(Clone)]
pub(crate) struct Witness {
    books: Arc<Mutex<Books>>,
    stop: CancellationToken,
}

impl Witness {
    /// Starts to watch all pods; every node has `per_node` devices.
    pub(crate) fn start(client: Client, per_node: u32) -> Self {
        let witness = Self { books: Arc::default(), stop: CancellationToken::new() };
        let (books, stop) = (witness.books.clone(), witness.stop.clone());
        tokio::spawn(stop.run_until_cancelled_owned(async move {
            let resource = ApiResource::erase::<k8s_openapi::api::core::v1::Pod>(&());
            let pods: Api<Pod> = Api::all_with(client, &resource);
            let mut stream =
                watcher::watcher(pods, watcher::Config::default()).default_backoff().boxed();
            while let Some(event) = stream.next().await {
                let mut books = books.lock().unwrap();
                match event {
                    Ok(Event::Apply(pod) | Event::InitApply(pod)) => books.see(&pod, per_node),
                    Ok(Event::Delete(pod)) => books.forget(&pod.uid().unwrap_or_default()),
                    Ok(Event::Init | Event::InitDone) => {}
                    Err(error) => books.faults.push(format!("the watch was cut off: {error}")),
                }
            }
        }));
        witness
    }

    /// Counts the pods of a job that are bound and not on their way out; all jobs' without a name.
    pub(crate) fn bound(&self, job: Option<&str>) -> usize {
        let books = self.books.lock().unwrap();
        let is_bound = |pod: &&Seen| pod.node.is_some() && !pod.is_over && !pod.is_going;
        let is_theirs = |pod: &&Seen| job.is_none_or(|job| pod.job.as_deref() == Some(job));
        books.pods.values().filter(is_theirs).filter(is_bound).count()
    }

    /// Counts the pods that run.
    pub(crate) fn running(&self) -> usize {
        let books = self.books.lock().unwrap();
        books.pods.values().filter(|pod| pod.is_running && !pod.is_going).count()
    }

    /// Forgets when bindings were seen.
    pub(crate) fn mark(&self) {
        self.books.lock().unwrap().span = None;
    }

    /// Returns the time from the first binding since the mark to the last.
    pub(crate) fn binding_took(&self) -> Duration {
        let span = self.books.lock().unwrap().span;
        span.map_or(Duration::ZERO, |(first, last)| last - first)
    }

    /// Counts the pods of no gang that are bound and not on their way out.
    pub(crate) fn bound_plain(&self) -> usize {
        let books = self.books.lock().unwrap();
        let is_bound = |pod: &&Seen| pod.node.is_some() && !pod.is_over && !pod.is_going;
        books.pods.values().filter(is_bound).filter(|pod| pod.job.is_none()).count()
    }

    /// Returns the gangs that hold devices, of one node or of all, and how many pods each has bound in
    /// all.
    pub(crate) fn gangs(&self, node: Option<&str>) -> BTreeMap<String, usize> {
        let books = self.books.lock().unwrap();
        let holds = |pod: &&Seen| pod.node.is_some() && !pod.is_going && !pod.is_over;
        let is_there = |pod: &&Seen| node.is_none() || pod.node.as_deref() == node;
        let there = books.pods.values().filter(holds).filter(is_there);
        let jobs: BTreeSet<&String> = there.filter_map(|pod| pod.job.as_ref()).collect();
        let count = |job: &String| {
            books.pods.values().filter(holds).filter(|pod| pod.job.as_ref() == Some(job)).count()
        };
        jobs.into_iter().map(|job| (job.clone(), count(job))).collect()
    }

    /// Returns whether no pod of a job is left.
    pub(crate) fn is_gone(&self, job: &str) -> bool {
        let books = self.books.lock().unwrap();
        !books.pods.values().any(|pod| pod.job.as_deref() == Some(job))
    }

    /// Counts the pods of an attempt that are bound.
    pub(crate) fn attempt(&self, job: &str, attempt: u32) -> usize {
        let books = self.books.lock().unwrap();
        let theirs = books.pods.values().filter(|pod| {
            pod.job.as_deref() == Some(job) && pod.attempt == attempt && pod.node.is_some()
        });
        theirs.count()
    }

    /// Counts the pods of a node that are not over.
    pub(crate) fn on_node(&self, node: &str) -> usize {
        let books = self.books.lock().unwrap();
        let there = |pod: &&Seen| pod.node.as_deref() == Some(node) && !pod.is_over;
        books.pods.values().filter(there).count()
    }

    /// Counts all pods that are there.
    pub(crate) fn pods(&self) -> usize {
        self.books.lock().unwrap().pods.len()
    }

    /// Counts the bindings that were ever seen, and the most devices of one node ever promised.
    pub(crate) fn bindings(&self) -> (u64, u32) {
        let books = self.books.lock().unwrap();
        (books.bindings, books.most)
    }

    /// Returns what was wrong.
    pub(crate) fn faults(&self) -> Vec<String> {
        self.books.lock().unwrap().faults.clone()
    }

    /// Waits until `is_good`, and returns how long that took.
    pub(crate) async fn until(
        &self,
        what: &str,
        limit: Duration,
        is_good: impl Fn(&Self) -> bool,
    ) -> Duration {
        let start = Instant::now();
        while !is_good(self) {
            let (pods, bound) = (self.pods(), self.bound(None));
            assert!(start.elapsed() < limit, "not {what} in {limit:?}: {bound} of {pods} bound");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        start.elapsed()
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        // The task holds one clone of the books.
        if Arc::strong_count(&self.books) <= 2 {
            self.stop.cancel();
        }
    }
}

impl Books {
    fn see(&mut self, pod: &Pod, per_node: u32) {
        let uid = pod.uid().unwrap_or_default();
        let limits = pod.spec.containers.iter().filter_map(|one| one.resources.limits.get(GPU));
        let gpus = limits.filter_map(|quantity| quantity.0.parse::<u32>().ok()).sum();
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        let seen = Seen {
            node: pod.spec.node_name.clone(),
            gpus,
            job: pod.labels().get(JOB).cloned(),
            attempt: pod.labels().get(ATTEMPT).and_then(|text| text.parse().ok()).unwrap_or(0),
            is_running: phase == Some("Running"),
            is_over: matches!(phase, Some("Succeeded" | "Failed")),
            is_going: pod.metadata.deletion_timestamp.is_some(),
        };
        let was_bound = self.pods.get(&uid).is_some_and(|pod| pod.node.is_some());
        self.forget(&uid);
        if let Some(node) = seen.node.clone().filter(|_| !seen.is_over) {
            let taken = self.taken.entry(node.clone()).or_default();
            *taken += seen.gpus;
            self.most = self.most.max(*taken);
            if !was_bound {
                self.bindings += 1;
                let now = Instant::now();
                self.span = Some((self.span.map_or(now, |(first, _)| first), now));
                if *taken > per_node {
                    self.faults.push(format!(
                        "{node} has {taken} of {per_node} devices promised, the last to {}",
                        pod.name_any()
                    ));
                }
            }
        }
        self.pods.insert(uid, seen);
    }

    fn forget(&mut self, uid: &str) {
        let Some(seen) = self.pods.remove(uid) else { return };
        if let Some(taken) =
            seen.node.filter(|_| !seen.is_over).and_then(|n| self.taken.get_mut(&n))
        {
            *taken -= seen.gpus;
        }
    }
}
