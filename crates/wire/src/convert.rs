//! Wire <-> domain.

use drumline_types::{Explanation, RankExit, RankIndex};

use crate::v1;

impl From<&RankExit> for v1::RankExitView {
    fn from(exit: &RankExit) -> Self {
        Self {
            rank: exit.rank.0,
            exit_code: exit.code,
            signal: exit.signal,
            message: exit.message.clone(),
            ..Self::default()
        }
    }
}

impl From<&v1::RankStatus> for RankExit {
    fn from(status: &v1::RankStatus) -> Self {
        Self {
            rank: RankIndex(status.rank),
            code: status.exit_code,
            signal: status.signal,
            message: status.message.clone(),
        }
    }
}

/// Fills the three fields that tell why a job is where it is.
pub fn explain(view: &mut v1::JobView, why: &Explanation) {
    why.reason.token().clone_into(&mut view.reason);
    view.message.clone_from(&why.message);
    why.reason.remedy().clone_into(&mut view.remedy);
}
