//! Where a gang would run: the scheduler's one door to `placement`.

use drumline_cluster::Snapshot;
use drumline_placement::{Constraints, Placed, place, try_place};
use drumline_queue::means;
use drumline_spec::{Gang, Parallelism};
use drumline_types::Explanation;

/// Finds devices for a gang, in rank order, on what is free and kept for nobody.
pub(crate) fn find(
    fleet: &Snapshot,
    gang: &Gang,
    split: Parallelism,
    constraints: &Constraints,
) -> Result<Placed, Explanation> {
    let found = if gang.models.is_empty() {
        place(fleet, gang, split, constraints)
    } else {
        let gang = Gang { models: models(fleet, gang), ..gang.clone() };
        place(fleet, &gang, split, constraints)
    };
    found.map_err(|misfit| misfit.explanation())
}

/// Does as [`find`], without a reason.
pub(crate) fn fit(
    fleet: &Snapshot,
    gang: &Gang,
    split: Parallelism,
    constraints: &Constraints,
) -> Option<Placed> {
    if gang.models.is_empty() {
        return try_place(fleet, gang, split, constraints);
    }
    let gang = Gang { models: models(fleet, gang), ..gang.clone() };
    try_place(fleet, &gang, split, constraints)
}

/// Returns the fleet's models that a gang's names mean, the preferred first. A name that means none
/// stays as it is.
pub(crate) fn models(fleet: &Snapshot, gang: &Gang) -> Vec<String> {
    let mut models: Vec<String> = Vec::new();
    for wanted in &gang.models {
        let meant = fleet
            .stocks()
            .filter(|(_, stock)| stock.kind() == gang.device && means(wanted, stock.model()))
            .map(|(_, stock)| stock.model().to_owned());
        let before = models.len();
        for model in meant {
            if !models.contains(&model) {
                models.push(model);
            }
        }
        if models.len() == before && !models.contains(wanted) {
            models.push(wanted.clone());
        }
    }
    models
}

/// Returns a count that grows whenever something that a gang could use may have become free.
pub(crate) fn grown(fleet: &Snapshot, gang: &Gang) -> u64 {
    let leader = gang.leader.map_or(0, |leader| fleet.grown(leader, &[]));
    let own = if gang.models.is_empty() {
        fleet.grown(gang.device, &[])
    } else {
        fleet.grown(gang.device, &models(fleet, gang))
    };
    own + leader
}
