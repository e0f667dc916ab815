//! One piece of work of any kind, as the queue, the placement and the lifecycle see it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::command::CommandJob;
use crate::gang::{DeviceKind, Gang, GangSettings, Parallelism};
use crate::scheduling::Wishes;
use crate::service::ModelService;
use crate::training::TrainingJob;

/// The kinds of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum JobKind {
    /// A training run.
    TrainingJob,
    /// A served model.
    ModelService,
    /// Any program.
    CommandJob,
}

impl JobKind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::TrainingJob, Self::ModelService, Self::CommandJob];

    /// Returns the manifest's `kind`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::TrainingJob => "TrainingJob",
            Self::ModelService => "ModelService",
            Self::CommandJob => "CommandJob",
        }
    }
}

impl fmt::Display for JobKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What a gang does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
pub enum Work {
    /// Trains a model.
    TrainingJob(TrainingJob),
    /// Serves a model.
    ModelService(ModelService),
    /// Runs any program.
    CommandJob(CommandJob),
}

/// Who chose the split of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub enum SplitChoice {
    /// The manifest, or its defaults.
    #[default]
    Given,
    /// Nobody yet: `parallelism: auto`. Until the split is chosen at submit it is that of one rank,
    /// and the job must not be placed.
    Auto {
        /// Whether the manifest gives `batch.micro`, which is then kept.
        #[serde(rename = "microIsGiven")]
        micro_is_given: bool,
    },
    /// The planner, at submit.
    Chosen {
        /// For what, and why this one.
        why: String,
    },
}

impl SplitChoice {
    /// Returns whether the manifest chose.
    #[must_use]
    pub fn is_given(&self) -> bool {
        *self == Self::Given
    }

    /// Returns whether the split is still to be chosen.
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(self, Self::Auto { .. })
    }
}

/// One validated manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// The manifest's `metadata.name`: a DNS label of at most 50 characters, so that the id's
    /// suffix fits.
    pub name: String,
    /// The user's notes. They decide nothing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The kind of device each rank gets.
    pub device: DeviceKind,
    /// Queue, priority, restarts and deadlines.
    pub settings: GangSettings,
    /// Who chose the split.
    #[serde(default, skip_serializing_if = "SplitChoice::is_given")]
    pub split: SplitChoice,
    /// What it asks for beyond ranks and split.
    #[serde(default, skip_serializing_if = "Wishes::is_empty")]
    pub wishes: Wishes,
    /// What the gang does.
    pub work: Work,
}

impl JobSpec {
    /// Returns the kind of work.
    #[must_use]
    pub fn kind(&self) -> JobKind {
        match self.work {
            Work::TrainingJob(_) => JobKind::TrainingJob,
            Work::ModelService(_) => JobKind::ModelService,
            Work::CommandJob(_) => JobKind::CommandJob,
        }
    }

    /// Returns how the ranks divide the work: a command's ranks are copies of each other.
    #[must_use]
    pub fn parallelism(&self) -> Parallelism {
        match &self.work {
            Work::TrainingJob(job) => job.parallelism,
            Work::ModelService(service) => service.parallelism,
            Work::CommandJob(command) => Parallelism { data: command.ranks, ..Parallelism::SINGLE },
        }
    }

    /// Returns the spec for ranks that divide the work in this way: an elastic gang may run at
    /// another size than the one it was submitted with.
    #[must_use]
    pub fn at(&self, split: Parallelism) -> Self {
        let mut spec = self.clone();
        match &mut spec.work {
            Work::TrainingJob(training) => training.parallelism = split,
            Work::ModelService(service) => service.parallelism = split,
            Work::CommandJob(command) => command.ranks = split.world_size(),
        }
        spec
    }

    /// Returns the gang that the work needs.
    #[must_use]
    pub fn gang(&self) -> Gang {
        let (ranks, node_group) = match &self.work {
            Work::TrainingJob(job) => (job.parallelism.world_size(), job.parallelism.tensor),
            Work::ModelService(service) => {
                (service.parallelism.world_size(), service.parallelism.tensor)
            }
            Work::CommandJob(command) => (command.ranks, 1),
        };
        let gang = Gang { ranks, node_group, device: self.device, ..Gang::default() };
        let split = self.parallelism();
        self.wishes.apply(gang, split.tensor * split.pipeline)
    }
}
