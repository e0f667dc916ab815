//! The whole state out as a value, and back in.

use std::collections::BTreeSet;
use std::sync::Arc;

use drumline_cluster::ChangeError;
use drumline_types::{JobId, Timestamp};

use crate::job::{Job, Stand};
use crate::lines::Standing;
use crate::saved::{Saved, SavedClass, SavedJob, SavedShape, Stands};
use crate::scheduler::Scheduler;

impl Scheduler {
    /// Returns the whole state.
    #[must_use]
    pub fn save(&self) -> Saved {
        let (vain, priced) = self.searches.saved(self.now);
        Saved {
            version: Saved::VERSION,
            now: self.now,
            options: self.options.clone(),
            nodes: self.fleet.nodes().map(|state| state.node().clone()).collect(),
            commitments: self.fleet.commitments().cloned().collect(),
            queues: self.tree.specs().into_iter().cloned().collect(),
            jobs: self
                .ids
                .iter()
                .map(|(id, &slot)| (JobId::clone(id), saved(self.job(slot))))
                .collect(),
            holds: self.holds.saved(),
            doubted: self.holds.doubted().clone(),
            awaited: self
                .awaited
                .iter()
                .map(|(id, awaited)| (JobId::clone(id), awaited.clone()))
                .collect(),
            history: self.tree.history(),
            classes: self.saved_classes(),
            shapes: self.saved_shapes(),
            vain,
            priced,
            sought: self.saved_sought(),
            dirty: self.dirty,
        }
    }

    fn saved_classes(&self) -> Vec<SavedClass> {
        let mut classes: Vec<SavedClass> = self
            .lines
            .ids()
            .filter_map(|id| {
                let class = self.lines.class(id)?;
                let stamps = self.stamps(id);
                let blocked = match class.standing {
                    Standing::Blocked { by, freed } => Some((by, freed == stamps.of(by))),
                    Standing::Ready => None,
                };
                let first = class.places.first()?;
                Some(SavedClass {
                    job: JobId::clone(first.job()),
                    blocked,
                    why: class.why.as_deref().cloned(),
                    telling: class.telling.is_some(),
                    told_to: class
                        .telling
                        .as_ref()
                        .and_then(|from| Some(JobId::clone(from.as_ref()?.job()))),
                    asked: class.asked.as_ref().map(|asked| {
                        (JobId::clone(&asked.job), asked.again, asked.freed == stamps.any)
                    }),
                })
            })
            .collect();
        classes.sort_by(|a, b| a.job.cmp(&b.job));
        classes
    }

    fn saved_shapes(&self) -> Vec<SavedShape> {
        self.lines
            .shapes()
            .filter_map(|(gang, id)| {
                let (freed, why) = self.lines.misfits.get(&id)?;
                (*freed == self.freed_for(gang))
                    .then(|| SavedShape { gang: gang.clone(), why: (**why).clone() })
            })
            .collect()
    }

    fn saved_sought(&self) -> BTreeSet<JobId> {
        let fresh = |id: &JobId| {
            let stamp = self.ids.get(id).map(|&slot| self.spares_stamp(slot));
            stamp.is_some_and(|stamp| self.sought.get(id) == Some(&stamp))
        };
        self.sought.keys().filter(|id| fresh(id)).map(|id| JobId::clone(id)).collect()
    }

    /// Returns a scheduler that decides what the saved one would have decided.
    ///
    /// # Errors
    /// [`ChangeError`] when the state contradicts itself.
    pub fn restore(saved: Saved) -> Result<Self, ChangeError> {
        let mut scheduler = Self::bare(saved.options);
        scheduler.now = saved.now;
        for node in saved.nodes {
            let change = drumline_cluster::Change::Node { node: Box::new(node) };
            scheduler.apply(change, saved.now)?;
        }
        for held in saved.commitments {
            scheduler.fleet.hold(held)?;
        }
        for queue in saved.queues {
            let name = queue.name.clone();
            let refused = |why| ChangeError::Queue { queue: name, why };
            scheduler.tree.set(queue, saved.now).map_err(refused)?;
        }
        let mut running = Vec::new();
        for (id, job) in saved.jobs {
            if job.request.job != id {
                return Err(ChangeError::UnknownJob(id));
            }
            let slot = scheduler.insert(job.request, job.attempt, job.held, job.past);
            match job.stands {
                Stands::Waiting { not_before, told } => {
                    scheduler.wait(slot, not_before, told.map(Arc::new));
                }
                Stands::Placed { started, running: runs, safe, ends, leaving } => {
                    if scheduler.fleet.commitment(&id).is_none() {
                        return Err(ChangeError::UnknownJob(id));
                    }
                    let ends = (ends > Timestamp(0)).then_some(ends);
                    scheduler.placed(slot, started, safe, ends, leaving);
                    running.push((slot, runs));
                }
            }
        }
        for (slot, runs) in running {
            if let Some(placed) = scheduler.job_mut(slot).placed_mut() {
                placed.running = runs;
            }
        }
        for (id, hold) in saved.holds {
            if scheduler.known(&id).is_none() {
                return Err(ChangeError::UnknownJob(id));
            }
            scheduler.fleet.reserve(&id, hold.devices.clone())?;
            scheduler.holds.keep(&id, hold);
        }
        scheduler.holds.doubt_only(saved.doubted);
        for (id, awaited) in saved.awaited {
            let Some(job) = scheduler.known(&id).filter(|job| job.placed().is_some()) else {
                return Err(ChangeError::UnknownJob(id));
            };
            let id = job.id.clone();
            scheduler.awaited.insert(id, awaited);
        }
        scheduler.tree.remember(saved.history);
        scheduler.remember_classes(saved.classes);
        scheduler.remember_shapes(saved.shapes);
        scheduler.searches.remember(saved.vain, saved.priced);
        for id in saved.sought {
            let Some(&slot) = scheduler.ids.get(&id) else { continue };
            let stamp = scheduler.spares_stamp(slot);
            scheduler.sought.insert(Arc::new(id), stamp);
        }
        scheduler.dirty = saved.dirty;
        Ok(scheduler)
    }

    fn remember_classes(&mut self, classes: Vec<SavedClass>) {
        for saved in classes {
            let Some(Stand::InLine { class: id, .. }) = self.known(&saved.job).map(|j| &j.stand)
            else {
                continue;
            };
            let id = *id;
            let stamps = self.stamps(id);
            let place = |scheduler: &Self, job: &JobId| match &scheduler.known(job)?.stand {
                Stand::InLine { place, .. } => Some(place.clone()),
                _ => None,
            };
            let told_to = saved.told_to.as_ref().and_then(|job| place(self, job));
            let telling = saved.telling.then_some(told_to);
            // A count that is never reached stands for one that is past.
            if let Some((by, fresh)) = saved.blocked {
                let freed = if fresh { stamps.of(by) } else { u64::MAX };
                self.lines.set_standing(id, Standing::Blocked { by, freed });
            }
            if let Some(class) = self.lines.class_mut(id) {
                class.why = saved.why.map(Arc::new);
                class.telling = telling;
                class.asked = saved.asked.map(|(job, again, fresh)| crate::lines::Asked {
                    job: Arc::new(job),
                    freed: if fresh { stamps.any } else { u64::MAX },
                    again,
                });
            }
        }
    }

    fn remember_shapes(&mut self, shapes: Vec<SavedShape>) {
        for saved in shapes {
            let freed = self.freed_for(&saved.gang);
            let id = self.lines.shape(&saved.gang);
            self.lines.misfits.insert(id, (freed, Arc::new(saved.why)));
        }
    }
}

fn saved(job: &Job) -> SavedJob {
    let told = |told: &Option<Arc<_>>| told.as_deref().cloned();
    let stands = match &job.stand {
        Stand::Aside { not_before, told: why } => {
            Stands::Waiting { not_before: *not_before, told: told(why) }
        }
        Stand::InLine { told: why, .. } => {
            Stands::Waiting { not_before: Timestamp(0), told: told(why) }
        }
        Stand::Placed(placed) => Stands::Placed {
            started: placed.started,
            running: placed.running,
            safe: placed.safe,
            ends: placed.ends,
            leaving: placed.leaving.clone(),
        },
    };
    SavedJob {
        request: (*job.request).clone(),
        attempt: job.attempt,
        held: job.held,
        stands,
        past: job.past.clone(),
    }
}
