//! Reads a workload file, and checks what no single value can say: names that must exist, sizes
//! that must divide.

use std::collections::BTreeSet;
use std::ops::Range;

use drumline_types::ids::check_name;

use crate::fault::FileFault;
use crate::workload::{Class, Workload};

/// The most machines and the most GPUs of one machine that a workload may have.
const NODES_MAX: u64 = 200_000;
const DEVICES_MAX: u32 = 64;

type Wrong = (Range<usize>, String);

impl Workload {
    /// Reads a workload file.
    ///
    /// # Errors
    /// [`FileFault`] for the first thing that is wrong, with its place.
    pub fn read(file: &str, text: &str) -> Result<Self, FileFault> {
        let workload: Self =
            toml::from_str(text).map_err(|error| FileFault::toml(file, text, &error))?;
        match workload.check() {
            Ok(()) => Ok(workload),
            Err((span, what)) => Err(FileFault::span(file, text, span, what)),
        }
    }

    fn check(&self) -> Result<(), Wrong> {
        let classes = self.classes.span();
        let top = |what: String| (0..0, what);
        if self.lasts.0 == 0 {
            return Err(top("lasts: expected a duration above 0".to_owned()));
        }
        if self.arrivals.jobs.is_none() && self.arrivals.load.is_none() {
            return Err(top(
                "arrivals: expected `jobs` or `load`, to know how many come".to_owned()
            ));
        }
        let nodes: u64 = self.fleet.iter().map(|group| u64::from(group.nodes.0)).sum();
        if nodes == 0 || nodes > NODES_MAX {
            return Err(top(format!("fleet: expected 1 to {NODES_MAX} nodes, found {nodes}")));
        }
        self.check_fleet()?;
        self.check_queues()?;
        if self.classes.get_ref().iter().all(|class| class.share.0 == 0.0) {
            return Err((classes, "classes: expected one with a share above 0".to_owned()));
        }
        self.classes.get_ref().iter().try_for_each(|class| self.check_class(class))
    }

    fn check_fleet(&self) -> Result<(), Wrong> {
        for group in &self.fleet {
            let span = group.levels.span();
            if group.devices.0 > DEVICES_MAX {
                let found = group.devices.0;
                let what = format!("devices: expected at most {DEVICES_MAX} a node, found {found}");
                return Err((span, what));
            }
            for pair in group.levels.get_ref().windows(2) {
                let [outer, inner] = pair else { continue };
                if !outer.nodes.0.is_multiple_of(inner.nodes.0) {
                    let what = format!(
                        "levels: expected the nodes of {} to be a multiple of those of {}, found {} and {}",
                        outer.name, inner.name, outer.nodes.0, inner.nodes.0
                    );
                    return Err((span, what));
                }
            }
        }
        Ok(())
    }

    fn check_queues(&self) -> Result<(), Wrong> {
        let mut names = BTreeSet::new();
        for queue in &self.queues {
            if let Err(error) = check_name(queue.name.get_ref()) {
                return Err((queue.name.span(), error.to_string()));
            }
            if !names.insert(queue.name.get_ref().as_str()) {
                let name = queue.name.get_ref();
                return Err((queue.name.span(), format!("queue {name} is there twice")));
            }
        }
        for queue in &self.queues {
            let Some(parent) = &queue.parent else { continue };
            if !names.contains(parent.get_ref().as_str()) {
                let what = format!("expected a queue of this file, found {:?}", parent.get_ref());
                return Err((parent.span(), what));
            }
            if self.rises_forever(queue.name.get_ref()) {
                let what = format!("queue {} is above itself", queue.name.get_ref());
                return Err((parent.span(), what));
            }
        }
        Ok(())
    }

    fn rises_forever(&self, name: &str) -> bool {
        let mut at = name;
        for _ in 0..=self.queues.len() {
            let queue = self.queues.iter().find(|queue| queue.name.get_ref() == at);
            match queue.and_then(|queue| queue.parent.as_ref()) {
                Some(parent) => at = parent.get_ref(),
                None => return false,
            }
        }
        true
    }

    fn check_class(&self, class: &Class) -> Result<(), Wrong> {
        let name = class.name.get_ref();
        // Ids add a dash and a number to the name.
        if check_name(name).is_err() || name.len() > 40 {
            let what = format!(
                "expected a name of at most 40 characters of a-z, 0-9 and '-', found {name:?}"
            );
            return Err((class.name.span(), what));
        }
        let sizes = class.sizes.get_ref();
        if sizes.iter().all(|(_, weight)| weight.0 == 0.0) {
            let what = "expected pairs of ranks and weight, such as [[1, 0.9], [8, 0.1]]";
            return Err((class.sizes.span(), what.to_owned()));
        }
        let group = class.node_group.0;
        for (ranks, _) in sizes {
            if ranks.0 > group && !ranks.0.is_multiple_of(group) {
                let what = format!("expected multiples of nodeGroup {group}, found {}", ranks.0);
                return Err((class.sizes.span(), what));
            }
        }
        let shares = class.shares.get_ref();
        if shares.iter().any(|(milli, _)| milli.0 > 1000)
            || (!shares.is_empty() && shares.iter().all(|(_, weight)| weight.0 == 0.0))
        {
            let what = "expected pairs of thousandths up to 1000 and weight, such as [[500, 1.0]]";
            return Err((class.shares.span(), what.to_owned()));
        }
        if let Some(elastic) = class.elastic
            && elastic.most.0 < 1.0
        {
            let what = format!("elastic: expected most of at least 1, found {}", elastic.most.0);
            return Err((class.name.span(), what));
        }
        if class.duration.least > class.duration.most {
            let what = "duration: expected least to be no longer than most".to_owned();
            return Err((class.name.span(), what));
        }
        for queue in &class.queues {
            let known = self.queues.iter().find(|known| known.name.get_ref() == queue.get_ref());
            let inner = self.queues.iter().any(|known| {
                known.parent.as_ref().is_some_and(|parent| parent.get_ref() == queue.get_ref())
            });
            if known.is_none() && queue.get_ref() != "default" {
                let what = format!("expected a queue of this file, found {:?}", queue.get_ref());
                return Err((queue.span(), what));
            }
            if inner {
                let what = format!(
                    "queue {} has queues below it, so that it takes no jobs; expected one of those",
                    queue.get_ref()
                );
                return Err((queue.span(), what));
            }
        }
        for rule in &class.topology {
            let level = rule.level.get_ref();
            let mut levels = self.fleet.iter().flat_map(|group| group.levels.get_ref());
            if level != "node" && !levels.any(|known| known.name == *level) {
                let what = format!("expected a level of the fleet, or \"node\", found {level:?}");
                return Err((rule.level.span(), what));
            }
        }
        Ok(())
    }
}
