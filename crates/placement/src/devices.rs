//! Which devices of a node its ranks get.

use drumline_cluster::NodeState;
use drumline_spec::WHOLE_DEVICE;

/// Returns a device for each of `ranks` ranks on a node, leaving out those in `taken`: the first
/// whole ones, or those that are used in part already and have the least left.
pub(crate) fn pick(
    state: &NodeState,
    pool: u32,
    share_milli: u32,
    ranks: u32,
    taken: &[u32],
) -> Vec<u32> {
    let ranks = ranks as usize;
    let open = |index: &u32| state.reserved(*index).is_none() && !taken.contains(index);
    let devices = state.in_pool(pool).filter(open);
    if share_milli == WHOLE_DEVICE {
        return devices.filter(|&index| state.is_free(index)).take(ranks).collect();
    }
    let mut parts: Vec<(u32, u32)> = devices
        .map(|index| (state.left_milli(index), index))
        .filter(|(left, _)| *left >= share_milli)
        .collect();
    parts.sort_unstable();
    parts
        .into_iter()
        .flat_map(|(left, index)| std::iter::repeat_n(index, (left / share_milli.max(1)) as usize))
        .take(ranks)
        .collect()
}
