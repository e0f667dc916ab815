//! What the pods of every node ask for: those that the watches show, those that are promised to
//! gangs, and those whose binding by another scheduler was let through and is not shown yet.
//!
//! The one place where gangs meet the pods of other schedulers. Each of the two is entered before it
//! is bound, under one lock, so of two that want the same room the second is refused. It is fed by
//! the watches as they come, and tells the core only of what has changed.

mod judge;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Node as KubeNode, Pod};
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceSlice};
use kube::runtime::watcher::Event;

use crate::ask::Ask;
use crate::dra::{Claims, RankClaim};
use crate::fleet::{Held, NodeNow, held, occupied};
use crate::gang::{Member, NODE, Standing, annotation};

pub(crate) use judge::{Place, Verdict};

/// A binding that was let through, or sent, and is not seen for so long was never stored: the API
/// server ends every request before that.
const LET_THROUGH: Duration = Duration::from_secs(70);

/// Namespace and name of a pod.
pub(crate) type PodKey = (String, String);

/// The ledger. Cloning shares it.
#[derive(Clone, Default)]
pub(crate) struct Ledger(Arc<Mutex<Books>>);

impl Ledger {
    /// Opens the books. Nothing may be awaited while they are open.
    pub(crate) fn open(&self) -> MutexGuard<'_, Books> {
        // Every change is made whole by one call that does not panic half way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pod that the watches show.
struct Shown {
    uid: String,
    /// The node that it takes resources of.
    node: Option<String>,
    ask: Arc<Ask>,
    member: Option<Member>,
    /// When it took its place.
    turn: u64,
}

/// A pod that is expected on a node.
struct Expected {
    node: String,
    ask: Arc<Ask>,
    whose: Whose,
    turn: u64,
}

enum Whose {
    /// A gang's, by the uid of its job: until it is shown or its promise is dropped.
    Gang(String, Held),
    /// A gang's that nobody looks after any more, by the uid of its job and its attempt: its binding may
    /// be under way, so until it is shown or deleted, or until then.
    Late(String, u32, Instant),
    /// Another scheduler's, by the uid of the pod: until it is shown, or until then.
    Other(String, Instant),
}

impl Expected {
    /// Returns when it lapses by itself.
    fn until(&self) -> Option<Instant> {
        match self.whose {
            Whose::Gang(..) => None,
            Whose::Late(_, _, until) | Whose::Other(_, until) => Some(until),
        }
    }
}

/// What has changed since the core last asked.
#[derive(Default)]
pub(crate) struct Changes {
    /// Nodes with something new on them.
    pub(crate) nodes: Vec<NodeNow>,
    /// Every pod of jobs of which one has changed, by the jobs' uids.
    pub(crate) members: BTreeMap<String, Vec<Member>>,
    /// What came after this is not among them.
    pub(crate) turn: u64,
    /// When the next entry lapses by itself.
    pub(crate) lapses: Option<Instant>,
}

/// The entries.
#[derive(Default)]
pub(crate) struct Books {
    nodes: BTreeMap<String, Arc<KubeNode>>,
    pods: BTreeMap<PodKey, Shown>,
    expected: BTreeMap<PodKey, Expected>,
    /// Pods that take or are expected to take resources of a node.
    on_node: BTreeMap<String, BTreeSet<PodKey>>,
    of_job: BTreeMap<String, BTreeSet<PodKey>>,
    /// Counts entries.
    turn: u64,
    changed_nodes: BTreeSet<String>,
    changed_jobs: BTreeSet<String>,
    /// What the list that is coming in has shown so far.
    listing: Option<BTreeSet<PodKey>>,
    listing_nodes: Option<BTreeSet<String>>,
    /// Devices that drivers publish, and the claims that have them.
    pub(crate) claims: Claims,
}

impl Books {
    /// Takes in what the watch of pods has brought.
    pub(crate) fn pod_event(&mut self, event: &Event<Pod>) {
        match event {
            Event::Apply(pod) => drop(self.see(pod)),
            Event::InitApply(pod) => {
                let key = self.see(pod);
                if let (Some(key), Some(listing)) = (key, &mut self.listing) {
                    listing.insert(key);
                }
            }
            Event::Delete(pod) => {
                if let Some(key) = key(pod) {
                    self.forget(&key, pod.metadata.uid.as_deref());
                }
            }
            Event::Init => self.listing = Some(BTreeSet::new()),
            Event::InitDone => {
                let Some(listed) = self.listing.take() else { return };
                let gone = self.pods.keys().filter(|key| !listed.contains(*key));
                for key in gone.cloned().collect::<Vec<_>>() {
                    self.forget(&key, None);
                }
            }
        }
    }

    /// Takes in what the watch of nodes has brought.
    pub(crate) fn node_event(&mut self, event: &Event<KubeNode>) {
        match event {
            Event::Apply(node) | Event::InitApply(node) => {
                let Some(name) = node.metadata.name.clone() else { return };
                if let Some(listing) = &mut self.listing_nodes {
                    listing.insert(name.clone());
                }
                self.changed_nodes.insert(name.clone());
                self.nodes.insert(name, Arc::new(node.clone()));
            }
            Event::Delete(node) => self.forget_node(node.metadata.name.as_deref()),
            Event::Init => self.listing_nodes = Some(BTreeSet::new()),
            Event::InitDone => {
                let Some(listed) = self.listing_nodes.take() else { return };
                let gone = self.nodes.keys().filter(|name| !listed.contains(*name));
                for name in gone.cloned().collect::<Vec<_>>() {
                    self.forget_node(Some(&name));
                }
            }
        }
    }

    /// Takes in what the watch of slices has brought.
    pub(crate) fn slice_event(&mut self, event: &Event<ResourceSlice>) {
        let changed = self.claims.slice_event(event);
        self.changed_nodes.extend(changed);
    }

    /// Takes in what the watch of claims has brought.
    pub(crate) fn claim_event(&mut self, event: &Event<ResourceClaim>) {
        let changed = self.claims.claim_event(event);
        self.changed_nodes.extend(changed);
    }

    /// Returns the claims that were made for ranks whose pods are not shown, or have ended.
    pub(crate) fn dead_claims(&self) -> Vec<RankClaim> {
        let is_over =
            |member: &Member| matches!(member.standing, Standing::Succeeded | Standing::Failed);
        let lives = |claim: &RankClaim| {
            self.pods.get(&claim.key).is_some_and(|pod| {
                pod.uid == claim.pod && !pod.member.as_ref().is_some_and(is_over)
            })
        };
        self.claims.of_ranks().filter(|claim| !lives(claim)).collect()
    }

    fn forget_node(&mut self, name: Option<&str>) {
        let Some(name) = name else { return };
        if self.nodes.remove(name).is_some() {
            self.changed_nodes.insert(name.to_owned());
        }
    }

    fn see(&mut self, pod: &Pod) -> Option<PodKey> {
        let key = key(pod)?;
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let member = Member::read(pod);
        let is_bound = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
        let was_expected = self.expected.get(&key).is_some_and(|expected| match &expected.whose {
            Whose::Gang(job, held) => is_of(member.as_ref(), job, held.attempt.0),
            Whose::Late(job, attempt, _) => is_of(member.as_ref(), job, *attempt),
            Whose::Other(expected, _) => *expected == uid,
        });
        let node = occupied(pod).map(str::to_owned);
        let ask = Ask::of(pod);
        // Another leader's gang: whoever made it may have sent its binding, which is stored any moment.
        let is_new = self.pods.get(&key).is_none_or(|before| before.uid != uid);
        if is_new
            && !self.expected.contains_key(&key)
            && let Some(member) = member.as_ref().filter(|one| one.standing == Standing::Unbound)
            && let Some(planned) = annotation(pod, NODE)
        {
            let until = Instant::now() + LET_THROUGH;
            let late = Whose::Late(member.job.clone(), member.attempt, until);
            self.expect(key.clone(), planned.clone(), Arc::new(ask.clone()), late);
        }
        let before = self.pods.get(&key);
        let same = before.filter(|before| {
            let (old, new) = (before.member.as_ref(), member.as_ref());
            before.uid == uid
                && before.node == node
                && *before.ask == ask
                && old.and_then(held) == new.and_then(held)
        });
        let (turn, ask) = match same {
            Some(before) => (before.turn, before.ask.clone()),
            None => {
                self.turn += 1;
                (self.turn, Arc::new(ask))
            }
        };
        let is_same = same.is_some();
        if let Some(job) = before.and_then(|before| before.member.as_ref()).map(|m| m.job.clone())
            && member.as_ref().is_none_or(|member| member.job != job)
        {
            self.leave_job(&job, &key);
        }
        if let Some(member) = &member {
            self.of_job.entry(member.job.clone()).or_default().insert(key.clone());
            self.changed_jobs.insert(member.job.clone());
        }
        let before = self.pods.insert(key.clone(), Shown { uid, node, ask, member, turn });
        if was_expected && is_bound {
            self.unexpect(&key);
        }
        if !is_same {
            if let Some(node) = before.and_then(|before| before.node) {
                self.leave(&node, &key);
            }
            if let Some(node) = self.pods.get(&key).and_then(|pod| pod.node.clone()) {
                self.enter(node, key.clone());
            }
        }
        Some(key)
    }

    fn forget(&mut self, key: &PodKey, uid: Option<&str>) {
        if self.pods.get(key).is_none_or(|pod| uid.is_some_and(|uid| uid != pod.uid)) {
            return;
        }
        let Some(gone) = self.pods.remove(key) else { return };
        // A pod that is gone cannot be bound any more. A promise is kept all the same: its keeper drops it.
        let is_its = |expected: &Expected| match &expected.whose {
            Whose::Gang(..) => false,
            Whose::Late(job, attempt, _) => is_of(gone.member.as_ref(), job, *attempt),
            Whose::Other(uid, _) => *uid == gone.uid,
        };
        if self.expected.get(key).is_some_and(is_its) {
            self.unexpect(key);
        }
        if let Some(node) = &gone.node {
            self.leave(node, key);
        }
        if let Some(member) = &gone.member {
            self.leave_job(&member.job, key);
        }
    }

    fn enter(&mut self, node: String, key: PodKey) {
        self.changed_nodes.insert(node.clone());
        self.on_node.entry(node).or_default().insert(key);
    }

    /// Takes a pod off a node, unless another entry of it keeps it there.
    fn leave(&mut self, node: &str, key: &PodKey) {
        self.changed_nodes.insert(node.to_owned());
        let stays = self.pods.get(key).is_some_and(|pod| pod.node.as_deref() == Some(node))
            || self.expected.get(key).is_some_and(|expected| expected.node == node);
        if !stays && let Some(there) = self.on_node.get_mut(node) {
            there.remove(key);
            if there.is_empty() {
                self.on_node.remove(node);
            }
        }
    }

    fn leave_job(&mut self, job: &str, key: &PodKey) {
        self.changed_jobs.insert(job.to_owned());
        if let Some(theirs) = self.of_job.get_mut(job) {
            theirs.remove(key);
            if theirs.is_empty() {
                self.of_job.remove(job);
            }
        }
    }

    fn expect(&mut self, key: PodKey, node: String, ask: Arc<Ask>, whose: Whose) {
        self.turn += 1;
        let expected = Expected { node: node.clone(), ask, whose, turn: self.turn };
        if let Some(before) = self.expected.insert(key.clone(), expected) {
            self.leave(&before.node, &key);
        }
        self.enter(node, key);
    }

    fn unexpect(&mut self, key: &PodKey) {
        if let Some(gone) = self.expected.remove(key) {
            self.leave(&gone.node, key);
        }
    }

    /// Returns what takes resources of a node: each pod once.
    fn taken<'a>(&'a self, node: &str) -> impl Iterator<Item = Taken<'a>> {
        let there = self.on_node.get(node).into_iter().flatten();
        let node = node.to_owned();
        there.filter_map(move |key| {
            let shown = self.pods.get(key).filter(|pod| pod.node.as_deref() == Some(&node));
            if let Some(pod) = shown {
                let member = pod.member.as_ref();
                let job = member.map(|member| member.job.as_str());
                let held = member.and_then(held);
                return Some(Taken { key, job, held, ask: &pod.ask, turn: pod.turn });
            }
            let expected = self.expected.get(key).filter(|expected| expected.node == node)?;
            let (job, held) = match &expected.whose {
                Whose::Gang(job, held) => (Some(job.as_str()), Some(held.clone())),
                Whose::Late(job, ..) => (Some(job.as_str()), None),
                Whose::Other(..) => (None, None),
            };
            Some(Taken { key, job, held, ask: &expected.ask, turn: expected.turn })
        })
    }

    /// Returns what has changed, and forgets that it has. `is_job` knows the uids of the jobs whose
    /// pods are gangs; other pods are like anybody's.
    pub(crate) fn changes(&mut self, is_job: &dyn Fn(&str) -> bool, now: Instant) -> Changes {
        self.lapse(now);
        let mut changes = Changes { turn: self.turn, ..Changes::default() };
        for name in std::mem::take(&mut self.changed_nodes) {
            let mut of_node = NodeNow {
                node: self.nodes.get(&name).cloned(),
                held: Vec::new(),
                others: Ask::default(),
                published: self.claims.on(&name),
                name,
            };
            // A claim has its device whoever made it; that of a rank counts once, as the rank's.
            for device in of_node.published.iter().filter(|device| device.is_claimed) {
                of_node.others.put(&device.id, 1000);
            }
            for taken in self.taken(&of_node.name) {
                match taken.held {
                    Some(held) if taken.job.is_some_and(is_job) => of_node.held.push(held),
                    _ => of_node.others.add(taken.ask),
                }
            }
            changes.nodes.push(of_node);
        }
        for job in std::mem::take(&mut self.changed_jobs) {
            let theirs = self.of_job.get(&job).into_iter().flatten();
            let members = theirs.filter_map(|key| self.pods.get(key)?.member.clone()).collect();
            changes.members.insert(job, members);
        }
        changes.lapses = self.expected.values().filter_map(Expected::until).min();
        changes
    }

    /// Forgets bindings that were let through or sent, and never stored.
    fn lapse(&mut self, now: Instant) {
        let is_over = |expected: &Expected| expected.until().is_some_and(|until| until <= now);
        let lapsed = self.expected.iter().filter(|(_, expected)| is_over(expected));
        for key in lapsed.map(|(key, _)| key.clone()).collect::<Vec<_>>() {
            self.unexpect(&key);
        }
    }

    /// Begins a term of leadership: nobody keeps the promises of the last any more, and everything is
    /// told again.
    pub(crate) fn begin(&mut self, now: Instant) {
        self.let_go(|_| true, now);
        self.changed_nodes.extend(self.nodes.keys().cloned());
        self.changed_nodes.extend(self.on_node.keys().cloned());
        self.changed_jobs.extend(self.of_job.keys().cloned());
    }

    /// Leaves promises of which bindings may be under way to themselves. `is_job` knows the jobs' uids.
    fn let_go(&mut self, is_job: impl Fn(&str) -> bool, now: Instant) {
        for expected in self.expected.values_mut() {
            if let Whose::Gang(job, held) = &expected.whose
                && is_job(job)
            {
                self.changed_nodes.insert(expected.node.clone());
                expected.whose = Whose::Late(job.clone(), held.attempt.0, now + LET_THROUGH);
            }
        }
    }

    /// Leaves what is left of a gang's promise to itself: some of its pods are there, others not.
    pub(crate) fn let_go_of(&mut self, job: &str, now: Instant) {
        self.let_go(|whose| whose == job, now);
    }

    /// Tells of a job's nodes again: its pods have become a gang's, or are no gang's any more.
    pub(crate) fn touch_job(&mut self, job: &str) {
        let theirs = self.of_job.get(job).into_iter().flatten();
        let nodes = theirs.filter_map(|key| self.pods.get(key)?.node.clone());
        let promised = self
            .expected
            .values()
            .filter(|expected| matches!(&expected.whose, Whose::Gang(whose, _) if whose == job));
        let nodes: Vec<String> = nodes.chain(promised.map(|one| one.node.clone())).collect();
        self.changed_nodes.extend(nodes);
    }
}

/// One pod on a node.
struct Taken<'a> {
    key: &'a PodKey,
    /// The uid of its job, when it is a gang's.
    job: Option<&'a str>,
    held: Option<Held>,
    ask: &'a Ask,
    turn: u64,
}

/// Whether a pod is one of an attempt of a job.
fn is_of(member: Option<&Member>, job: &str, attempt: u32) -> bool {
    member.is_some_and(|member| member.job == job && member.attempt == attempt)
}

fn key(pod: &Pod) -> Option<PodKey> {
    Some((pod.metadata.namespace.clone()?, pod.metadata.name.clone()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use drumline_spec::DeviceKind;
    use drumline_types::Attempt;
    use serde_json::json;

    const GPU: &str = "nvidia.com/gpu";

    fn pod(name: &str, node: Option<&str>, gpus: u32) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "namespace": "n", "name": name, "uid": format!("uid-{name}") },
            "spec": { "nodeName": node, "containers": [{ "name": "x", "resources": {
                "limits": { GPU: gpus.to_string() } } }] },
        }))
        .unwrap()
    }

    fn member(rank: u32, node: Option<&str>) -> Pod {
        let mut pod = pod(&format!("g-c1-{rank}"), node, 1);
        pod.spec.as_mut().unwrap().scheduler_name = Some(crate::gang::SCHEDULER.to_owned());
        let labels = json!({ crate::gang::UID: "job", crate::gang::JOB_ID: "g-job",
                             crate::gang::ATTEMPT: "1", crate::gang::RANK: rank.to_string(),
                             crate::gang::RANKS: "2", crate::gang::DEVICE: "gpu" });
        pod.metadata.labels = serde_json::from_value(labels).unwrap();
        pod
    }

    fn place(rank: u32) -> Place {
        let mut ask = Ask::place();
        ask.put(GPU, 1000);
        Place {
            pod: key_of(&format!("g-c1-{rank}")),
            held: Held {
                job: "g-job".parse().unwrap(),
                attempt: Attempt(1),
                rank,
                device: DeviceKind::Gpu,
                resource: None,
                node: "a".to_owned(),
                slot: Some(rank),
            },
            ask: Arc::new(ask),
        }
    }

    #[test]
    fn what_another_leader_was_binding_is_kept_free() {
        let mut books = books();
        let planned = |rank: u32, node: Option<&str>| {
            let mut pod = member(rank, node);
            let planned = [(NODE.to_owned(), "a".to_owned())].into();
            pod.metadata.annotations = Some(planned);
            pod
        };
        // This process has just begun to lead: it has promised nothing, and sees pods that wait.
        books.pod_event(&Event::Apply(planned(0, None)));
        books.pod_event(&Event::Apply(planned(1, None)));
        books.begin(Instant::now());
        assert_eq!(review(&mut books, "p0"), Verdict::Allowed);
        assert_eq!(review(&mut books, "p1"), Verdict::Allowed);
        let told = review(&mut books, "p2");
        assert!(matches!(&told, Verdict::Refused(why) if why.contains(GPU)), "{told:?}");
        // One is bound after all, the other one deleted: each is counted once, or not at all.
        books.pod_event(&Event::Apply(planned(0, Some("a"))));
        books.pod_event(&Event::Delete(planned(1, None)));
        assert_eq!(review(&mut books, "p2"), Verdict::Allowed);
        let told = review(&mut books, "p3");
        assert!(matches!(told, Verdict::Refused(_)), "{told:?}");
        // What was never stored lapses.
        books.pod_event(&Event::Apply(planned(1, None)));
        books.changes(&|_| true, Instant::now() + LET_THROUGH * 2);
        assert!(!books.expected.contains_key(&key_of("g-c1-1")));
    }

    fn key_of(name: &str) -> PodKey {
        ("n".to_owned(), name.to_owned())
    }

    /// Books of one node with four devices, and plain pods `p0` to `p4` that wait.
    fn books() -> Books {
        let mut books = Books::default();
        let node = json!({ "metadata": { "name": "a" },
                           "status": { "allocatable": { GPU: "4", "pods": "110" } } });
        books.node_event(&Event::Apply(serde_json::from_value(node).unwrap()));
        for number in 0..5 {
            books.pod_event(&Event::Apply(pod(&format!("p{number}"), None, 1)));
        }
        books
    }

    fn review(books: &mut Books, name: &str) -> Verdict {
        let uid = format!("uid-{name}");
        books.review(&key_of(name), Some(&uid), "a", false, Instant::now())
    }

    fn gpus(books: &Books) -> u64 {
        books.taken("a").map(|taken| taken.ask.get(GPU)).sum()
    }

    #[test]
    fn of_two_that_want_the_same_room_the_second_is_refused() {
        let mut books = books();
        books.promise("job", vec![place(0), place(1)], &Ask::default(), 0).unwrap();
        assert_eq!(review(&mut books, "p0"), Verdict::Allowed);
        assert_eq!(review(&mut books, "p1"), Verdict::Allowed);
        let Verdict::Refused(why) = review(&mut books, "p2") else { panic!("let through") };
        assert!(why.contains("nvidia.com/gpu of a") && why.contains("0 are left of 4"), "{why}");
        // Asked again, it is the same binding.
        assert_eq!(review(&mut books, "p1"), Verdict::Allowed);
        assert_eq!(gpus(&books), 4000);
        books.drop_promise("other");
        // What the watch shows takes the place of what was expected.
        books.pod_event(&Event::Apply(pod("p0", Some("a"), 1)));
        books.pod_event(&Event::Apply(member(0, Some("a"))));
        assert_eq!((gpus(&books), books.expected.len()), (4000, 2));
        // A pod that has gone leaves its room to the next.
        books.pod_event(&Event::Delete(pod("p0", Some("a"), 1)));
        assert_eq!(review(&mut books, "p2"), Verdict::Allowed);
    }

    #[test]
    fn what_is_promised_of_one_resource_leaves_the_others_alone() {
        const MIG: &str = "nvidia.com/mig-1g.10gb";
        let mut books = books();
        let node = json!({ "metadata": { "name": "a" },
                           "status": { "allocatable": { GPU: "4", MIG: "2", "pods": "110" } } });
        books.node_event(&Event::Apply(serde_json::from_value(node).unwrap()));
        let instance = |rank| {
            let mut place = place(rank);
            let mut ask = Ask::place();
            ask.put(MIG, 1000);
            (place.held.resource, place.ask) = (Some(MIG.to_owned()), Arc::new(ask));
            place
        };
        books.promise("job", vec![instance(0), instance(1)], &Ask::default(), 0).unwrap();
        let wants_instance = |name: &str| {
            let mut pod = pod(name, None, 0);
            let resources = json!({ "limits": { MIG: "1" } });
            pod.spec.as_mut().unwrap().containers[0].resources =
                serde_json::from_value(resources).unwrap();
            pod
        };
        books.pod_event(&Event::Apply(wants_instance("m")));
        let Verdict::Refused(why) = review(&mut books, "m") else { panic!("let through") };
        assert!(why.contains("nvidia.com/mig-1g.10gb of a") && why.contains("0 are left of 2"));
        assert_eq!(review(&mut books, "p0"), Verdict::Allowed);
        let late = books.promise("other", vec![instance(2)], &Ask::default(), 0).unwrap_err();
        assert!(late.contains(MIG), "{late}");
        books.promise("other", vec![place(2), place(3)], &Ask::default(), 0).unwrap();
    }

    #[test]
    fn a_device_that_a_claim_has_is_nobody_elses() {
        const DEVICE: &str = "gpu.nvidia.com:a/gpu-0";
        let mut books = books();
        books.claims = Claims::new(vec![crate::dra::Driver::parse("gpu.nvidia.com").unwrap()]);
        let slice = json!({ "metadata": { "name": "s" }, "spec": {
            "driver": "gpu.nvidia.com", "nodeName": "a",
            "pool": { "name": "a", "generation": 1, "resourceSliceCount": 1 },
            "devices": [{ "name": "gpu-0" }],
        }});
        books.slice_event(&Event::Apply(serde_json::from_value(slice).unwrap()));
        let claim: ResourceClaim = serde_json::from_value(json!({
            "metadata": { "namespace": "n", "name": "c", "uid": "u" },
            "spec": {},
            "status": {
                "allocation": { "devices": { "results": [{ "request": "r", "pool": "a",
                    "driver": "gpu.nvidia.com", "device": "gpu-0" }] } },
                "reservedFor": [{ "resource": "pods", "name": "p0", "uid": "uid-p0" }],
            },
        }))
        .unwrap();
        let of_device = |rank| {
            let mut place = place(rank);
            place.held.resource = Some(DEVICE.to_owned());
            place.ask = Arc::new(Ask::place());
            place
        };
        // It was given to another's pod after the plan was made.
        books.claim_event(&Event::Apply(claim.clone()));
        assert_eq!(books.changes(&|_| true, Instant::now()).nodes[0].others.get(DEVICE), 1000);
        let why = books.promise("job", vec![of_device(0)], &Ask::default(), 0).unwrap_err();
        assert_eq!(why, format!("{DEVICE} is allocated to the claim n/c"));
        // It is given to another's pod after it was promised: that pod is not bound.
        books.claim_event(&Event::Delete(claim.clone()));
        books.promise("job", vec![of_device(0)], &Ask::default(), 0).unwrap();
        books.claim_event(&Event::Apply(claim));
        let Verdict::Refused(why) = review(&mut books, "p0") else { panic!("let through") };
        assert_eq!(why, format!("{DEVICE} of a is a gang's"));
        assert_eq!(review(&mut books, "p1"), Verdict::Allowed);
    }

    #[test]
    fn a_gang_gets_no_room_that_was_let_through_after_its_plan() {
        let mut books = books();
        let all = |_: &str| true;
        let turn = books.changes(&all, Instant::now()).turn;
        for name in ["p0", "p1", "p2"] {
            assert_eq!(review(&mut books, name), Verdict::Allowed);
        }
        let why =
            books.promise("job", vec![place(0), place(1)], &Ask::default(), turn).unwrap_err();
        assert!(why.contains("1 are left of 4"), "{why}");
        assert_eq!(gpus(&books), 3000, "all of a gang or none of it");
        let changes = books.changes(&all, Instant::now());
        assert_eq!(changes.nodes.len(), 1);
        assert_eq!(changes.nodes[0].others.get(GPU), 3000);
        let mut extra = Ask::default();
        extra.put("rdma/hca", 1000);
        let why = books.promise("job", vec![place(0)], &extra, changes.turn).unwrap_err();
        assert_eq!(why, "a has no rdma/hca");
        books.promise("job", vec![place(0)], &Ask::default(), changes.turn).unwrap();
        let changes = books.changes(&all, Instant::now());
        assert_eq!(changes.nodes[0].held.len(), 1);
        // Of a promise of the last term the binding may still be under way.
        books.begin(Instant::now());
        let changes = books.changes(&all, Instant::now());
        assert_eq!((changes.nodes[0].held.len(), changes.nodes[0].others.get(GPU)), (0, 4000));
        assert_eq!(books.changes(&all, Instant::now()).nodes.len(), 0);
    }

    #[test]
    fn a_binding_that_the_last_term_sent_keeps_its_room_until_it_is_seen() {
        let promised = || {
            let mut books = books();
            books.promise("job", vec![place(0), place(1)], &Ask::default(), 0).unwrap();
            books.pod_event(&Event::Apply(member(0, None)));
            books.begin(Instant::now());
            books
        };
        // Nobody else gets it, neither a gang nor another scheduler.
        let mut books = promised();
        let three = vec![place(2), place(3), place(4)];
        books.promise("other", three, &Ask::default(), 0).unwrap_err();
        assert_eq!(review(&mut books, "p0"), Verdict::Allowed);
        assert_eq!(review(&mut books, "p1"), Verdict::Allowed);
        assert!(matches!(review(&mut books, "p2"), Verdict::Refused(_)));
        // It is stored after all.
        books.pod_event(&Event::Apply(member(0, Some("a"))));
        assert_eq!(gpus(&books), 4000);
        // Its pod is deleted: what was under way for it finds none.
        let mut books = promised();
        books.pod_event(&Event::Delete(member(0, None)));
        assert_eq!(gpus(&books), 1000);
        // It never comes.
        books.changes(&|_| true, Instant::now() + LET_THROUGH);
        assert_eq!(gpus(&books), 0);
        // A gang of which some pods are gone before they were seen: the others may be bound.
        let mut books = self::books();
        books.promise("job", vec![place(0), place(1)], &Ask::default(), 0).unwrap();
        books.let_go_of("job", Instant::now());
        assert_eq!(gpus(&books), 2000);
    }

    #[test]
    fn a_node_without_gangs_is_left_alone() {
        let mut books = books();
        for number in 0..5 {
            assert_eq!(review(&mut books, &format!("p{number}")), Verdict::Allowed);
        }
        assert_eq!(review(&mut books, "p9"), Verdict::Unknown);
        books.pod_event(&Event::Apply(member(0, None)));
        assert!(matches!(review(&mut books, "g-c1-0"), Verdict::Refused(_)));
        // A dry run takes no room.
        let mut books = self::books();
        let dry = books.review(&key_of("p0"), None, "a", true, Instant::now());
        assert_eq!((dry, gpus(&books)), (Verdict::Allowed, 0));
    }

    #[test]
    fn a_binding_that_was_never_stored_lapses() {
        let mut books = books();
        books.promise("job", vec![place(0), place(1), place(2)], &Ask::default(), 0).unwrap();
        assert_eq!(review(&mut books, "p0"), Verdict::Allowed);
        let later = Instant::now() + LET_THROUGH;
        let verdict = |books: &mut Books| books.review(&key_of("p1"), None, "a", false, later);
        assert_eq!(verdict(&mut books), Verdict::Allowed);
        assert_eq!(gpus(&books), 4000);
    }

    #[test]
    fn a_list_that_comes_anew_shows_what_is_gone() {
        let mut books = books();
        books.pod_event(&Event::Apply(member(0, Some("a"))));
        books.changes(&|_| true, Instant::now());
        books.pod_event(&Event::Init);
        books.pod_event(&Event::InitApply(pod("p0", Some("a"), 1)));
        books.pod_event(&Event::InitDone);
        assert_eq!(books.pods.len(), 1);
        let changes = books.changes(&|_| true, Instant::now());
        assert_eq!(changes.members["job"].len(), 0);
        assert_eq!(changes.nodes[0].others.get(GPU), 1000);
        assert!(books.of_job.is_empty());
        books.node_event(&Event::Init);
        books.node_event(&Event::InitDone);
        assert!(books.changes(&|_| true, Instant::now()).nodes[0].node.is_none());
    }
}
