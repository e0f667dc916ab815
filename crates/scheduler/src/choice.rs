//! The ways in which a gang may be charged and placed: by model, where a queue has quota by model.

use drumline_queue::{QueueId, Tree};
use drumline_spec::{Gang, is_mig_instance};

use crate::scheduler::Scheduler;

/// One way to charge and place a gang.
#[derive(Debug, Clone)]
pub(crate) struct Choice {
    pub(crate) charged: drumline_queue::ModelId,
    /// Only these; `None`: as the gang says.
    pub(crate) models: Option<Vec<String>>,
}

impl Scheduler {
    /// Returns the ways in which a gang may be charged and placed, the preferred first.
    pub(crate) fn choices(&self, leaf: QueueId, gang: &Gang) -> Vec<Choice> {
        if !self.tree.names_models(leaf) {
            return vec![Choice { charged: Tree::unknown(gang.device), models: None }];
        }
        let of_kind = self
            .tree
            .models()
            .iter()
            .filter(|(_, kind, name)| *kind == gang.device && !name.is_empty());
        if gang.models.is_empty() {
            return of_kind
                .filter(|(.., name)| !is_mig_instance(name))
                .map(|(model, _, name)| Choice {
                    charged: model,
                    models: Some(vec![name.to_owned()]),
                })
                .collect();
        }
        gang.models
            .iter()
            .filter_map(|wanted| {
                let (model, ..) = self.tree.models().iter().find(|(_, kind, name)| {
                    *kind == gang.device && drumline_queue::means(wanted, name)
                })?;
                Some(Choice { charged: model, models: Some(vec![wanted.clone()]) })
            })
            .collect()
    }
}
