//! The waiting jobs: a line for each queue, and in it classes of jobs that are alike, so that what
//! is found out about one need not be found out again about the others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use drumline_queue::Place;
use drumline_spec::Gang;
use drumline_types::{Explanation, JobId, QueueName, Timestamp};
use serde::{Deserialize, Serialize};

/// A gang that jobs ask for, interned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ShapeId(pub(crate) usize);

/// A class of waiting jobs, interned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ClassId(pub(crate) usize);

/// What the jobs of one class have in common.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Alike {
    pub(crate) queue: QueueName,
    pub(crate) gang: Gang,
    /// About how long they are expected to run; `None`: unknown.
    pub(crate) length: Option<u32>,
    pub(crate) priority: i32,
    /// Whether they can be ended at once, so that devices can be lent to them.
    pub(crate) brief: bool,
}

/// What stands between a class and its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It has to be tried.
    Ready,
    /// It was tried and nothing that it could use has been freed since.
    Blocked {
        /// What it lacks.
        by: By,
        /// The count of what was freed of that, when it was tried.
        freed: u64,
    },
}

/// What a class that was tried lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum By {
    /// Devices, or devices in the right places.
    Devices,
    /// Devices that are not kept for others.
    Kept,
    /// Quota.
    Quota,
    /// It can never start as things are: it keeps nobody waiting.
    Outright,
}

/// Waiting jobs that are alike.
#[derive(Debug, Clone)]
pub(crate) struct Class {
    pub(crate) alike: Arc<Alike>,
    pub(crate) shape: ShapeId,
    pub(crate) places: BTreeSet<Place>,
    pub(crate) standing: Standing,
    pub(crate) why: Option<Arc<Explanation>>,
    /// The reason has changed, and the jobs after this place are still to be told.
    pub(crate) telling: Option<Option<Place>>,
    pub(crate) asked: Option<Asked>,
}

/// A job that looked for victims and for a reservation in vain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) job: Arc<JobId>,
    /// The count of what had been freed.
    pub(crate) freed: u64,
    /// It may look again at this moment, whatever happens.
    pub(crate) again: Timestamp,
}

/// One queue's waiting jobs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Line {
    pub(crate) classes: BTreeSet<ClassId>,
    pub(crate) length: usize,
    /// The first job of each class that things as they are do not exclude.
    heads: BTreeSet<(Place, ClassId)>,
}

impl Line {
    /// Returns the first job that things as they are do not exclude.
    pub(crate) fn head(&self) -> Option<&(Place, ClassId)> {
        self.heads.first()
    }
}

impl Class {
    /// Returns its first job, if things as they are do not exclude it.
    fn head(&self) -> Option<&Place> {
        let out = matches!(self.standing, Standing::Blocked { by: By::Outright, .. });
        if out { None } else { self.places.first() }
    }
}

/// Everyone who waits, except who is held back or rests before a restart.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lines {
    shapes: BTreeMap<Gang, ShapeId>,
    ids: BTreeMap<Arc<Alike>, ClassId>,
    classes: Vec<Option<Class>>,
    free: Vec<ClassId>,
    pub(crate) lines: BTreeMap<QueueName, Line>,
    /// What was found out about shapes: they did not fit when so much had been freed.
    pub(crate) misfits: BTreeMap<ShapeId, (u64, Arc<Explanation>)>,
    /// They did not fit either where jobs that end by then may use what is reserved.
    pub(crate) kept_out: BTreeMap<ShapeId, (u64, Timestamp)>,
    /// Classes with a new reason, or with a new first job, that is still to be told.
    pub(crate) news: BTreeSet<ClassId>,
    /// Jobs that have not been told anything yet.
    pub(crate) untold: BTreeSet<Arc<JobId>>,
    length: usize,
}

impl Lines {
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// Returns the gangs that are asked for.
    pub(crate) fn shapes(&self) -> impl Iterator<Item = (&Gang, ShapeId)> {
        self.shapes.iter().map(|(gang, id)| (gang, *id))
    }

    /// Returns the number of a gang.
    pub(crate) fn shape(&mut self, gang: &Gang) -> ShapeId {
        let shapes = self.shapes.len();
        *self.shapes.entry(gang.clone()).or_insert(ShapeId(shapes))
    }

    /// Puts a job into its class. Returns the class.
    pub(crate) fn join(&mut self, alike: Alike, place: Place, untold: bool) -> ClassId {
        let known = self.ids.get(&alike).copied();
        let id = known.unwrap_or_else(|| {
            let shape = self.shape(&alike.gang);
            let alike = Arc::new(alike);
            let class = Class {
                alike: alike.clone(),
                shape,
                places: BTreeSet::new(),
                standing: Standing::Ready,
                why: None,
                telling: None,
                asked: None,
            };
            let id = self.free.pop().unwrap_or_else(|| {
                self.classes.push(None);
                ClassId(self.classes.len() - 1)
            });
            self.classes[id.0] = Some(class);
            self.ids.insert(alike.clone(), id);
            self.lines.entry(alike.queue.clone()).or_default().classes.insert(id);
            id
        });
        if untold {
            self.untold.insert(place.job().clone());
        }
        self.length += 1;
        self.change(id, |class| {
            class.places.insert(place);
        });
        if let Some(class) = self.class(id) {
            let queue = class.alike.queue.clone();
            self.lines.entry(queue).or_default().length += 1;
        }
        id
    }

    /// Changes a class, and keeps the heads of its line in step.
    fn change(&mut self, id: ClassId, change: impl FnOnce(&mut Class)) {
        let Some(class) = self.classes.get_mut(id.0).and_then(Option::as_mut) else { return };
        let (before, first) = (class.head().cloned(), class.places.first().cloned());
        change(class);
        if class.places.first() != first.as_ref() {
            self.news.insert(id);
        }
        let after = class.head();
        if before.as_ref() == after {
            return;
        }
        let Some(line) = self.lines.get_mut(&class.alike.queue) else { return };
        if let Some(before) = before {
            line.heads.remove(&(before, id));
        }
        if let Some(after) = after {
            line.heads.insert((after.clone(), id));
        }
    }

    /// Says where a class stands.
    pub(crate) fn set_standing(&mut self, id: ClassId, standing: Standing) {
        self.change(id, |class| class.standing = standing);
    }

    /// Takes a job out of its class.
    pub(crate) fn leave(&mut self, id: ClassId, place: &Place) {
        self.untold.remove(place.job());
        let mut there = false;
        self.change(id, |class| there = class.places.remove(place));
        let Some(class) = self.classes[id.0].as_mut().filter(|_| there) else { return };
        self.length -= 1;
        let queue = &class.alike.queue;
        let line = self.lines.entry(queue.clone()).or_default();
        line.length -= 1;
        if class.places.is_empty() {
            line.classes.remove(&id);
            if line.classes.is_empty() {
                let queue = queue.clone();
                self.lines.remove(&queue);
            }
            let alike = class.alike.clone();
            self.ids.remove(&alike);
            self.classes[id.0] = None;
            self.free.push(id);
        }
        if self.length == 0 {
            // Shapes are few and cheap; with nobody waiting they can all be forgotten.
            self.shapes.clear();
            self.misfits.clear();
            self.kept_out.clear();
        }
    }

    pub(crate) fn class(&self, id: ClassId) -> Option<&Class> {
        self.classes.get(id.0).and_then(Option::as_ref)
    }

    pub(crate) fn class_mut(&mut self, id: ClassId) -> Option<&mut Class> {
        self.classes.get_mut(id.0).and_then(Option::as_mut)
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = ClassId> + '_ {
        (0..self.classes.len()).map(ClassId).filter(|id| self.classes[id.0].is_some())
    }

    /// Makes every class tried again.
    pub(crate) fn wake_all(&mut self) {
        for id in (0..self.classes.len()).map(ClassId) {
            self.set_standing(id, Standing::Ready);
        }
    }
}
