//! How the GPUs of a gang reach one another: over NCCL where all ranks can, else through host memory.
//!
//! Every rank tells every other what it has, over the host, and all come to the same answer.

use std::sync::Arc;
use std::time::Duration;

use drumline_collective::{Collective, CollectiveError};
use drumline_engine::{DeviceGroup, DeviceGroups, Groups};

use super::group::{GroupOptions, NcclGroup, Peers};
use super::library::{Nccl, NcclProblem, VERSION_SHARED_GPU, Version};
use super::place::{CudaPlace, Place};
use super::watchdog::{Rank, Watchdog};
use crate::backend::Cuda;

/// Asks NCCL to let several ranks use one GPU.
const SHARING_VARIABLE: &str = "NCCL_MULTI_RANK_GPU_ENABLE";
/// What the watchdog is given to act before whoever waits gives up: its record says more.
const WATCHDOG_FIRST: Duration = Duration::from_secs(5);

/// The way between the GPUs of a gang.
pub struct Linked {
    /// The groups on the device; none where values go through host memory.
    pub groups: DeviceGroups<Cuda>,
    /// What was decided and why, in words.
    pub words: String,
}

/// What a rank has, as it tells the others: numbers that f32 holds exactly.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Told {
    /// None: no NCCL that can be used.
    version: Option<Version>,
    /// It would share its GPU.
    shares: bool,
    uuid: [u8; 16],
}

/// Values of one [`Told`].
const TOLD: usize = 20;

impl Told {
    fn write(self) -> [f32; TOLD] {
        let none = Version { major: 0, minor: 0, patch: 0 };
        let Version { major, minor, patch } = self.version.unwrap_or(none);
        let mut all = [0.0; TOLD];
        all[0] = major as f32;
        all[1] = minor as f32;
        all[2] = patch as f32;
        all[3] = f32::from(u8::from(self.shares));
        for (to, byte) in all[4..].iter_mut().zip(self.uuid) {
            *to = f32::from(byte);
        }
        all
    }

    fn read(from: &[f32]) -> Self {
        let number = |at: usize| from[at] as i32;
        let version = Version { major: number(0), minor: number(1), patch: number(2) };
        let mut uuid = [0; 16];
        for (byte, value) in uuid.iter_mut().zip(&from[4..]) {
            *byte = *value as u8;
        }
        Self { version: (version.major > 0).then_some(version), shares: from[3] != 0.0, uuid }
    }
}

/// Decides from what every rank told, in rank order: the oldest version, or why not.
fn decide(all: &[Told]) -> Result<Version, String> {
    let mut oldest: Option<Version> = None;
    for (rank, told) in all.iter().enumerate() {
        let version =
            told.version.ok_or_else(|| format!("rank {rank} has no NCCL that can be used"))?;
        oldest = Some(oldest.map_or(version, |oldest| oldest.min(version)));
        let Some(other) = all[..rank].iter().position(|other| other.uuid == told.uuid) else {
            continue;
        };
        let shared = [other, rank]
            .iter()
            .all(|at| all[*at].shares && all[*at].version >= Some(VERSION_SHARED_GPU));
        if !shared {
            return Err(format!(
                "ranks {other} and {rank} share a GPU, which NCCL {VERSION_SHARED_GPU} allows when \
                 {SHARING_VARIABLE} is 1"
            ));
        }
    }
    oldest.ok_or_else(|| "there are no ranks".to_owned())
}

/// Joins the GPU of this rank to those of the others; every rank of the gang calls this at the same
/// time. A collective that makes no progress within `deadline` ends the process, and its record is the
/// last of its log.
///
/// # Errors
/// [`CollectiveError`] when a peer is gone, or NCCL fails after all had agreed on it.
pub fn link(
    cuda: &Cuda,
    groups: &Groups,
    rank: Rank,
    deadline: Duration,
) -> Result<Linked, CollectiveError> {
    let size = groups.world.size();
    if size == 1 {
        return Ok(Linked {
            groups: DeviceGroups::default(),
            words: "not needed by one rank".to_owned(),
        });
    }
    let opened = Nccl::open(None);
    let own = Told {
        version: opened.as_ref().ok().map(|nccl| nccl.version()),
        shares: std::env::var_os(SHARING_VARIABLE).is_some_and(|value| value == "1"),
        uuid: cuda.device().properties().uuid,
    };
    let mut all = vec![0.0; TOLD * size];
    groups.world.all_gather(&own.write(), &mut all)?;
    let told: Vec<Told> = all.chunks_exact(TOLD).map(Told::read).collect();
    let (nccl, version) = match (decide(&told), opened) {
        (Ok(version), Ok(nccl)) => (nccl, version),
        (Err(why), opened) => {
            let own = opened.err().map(|problem: NcclProblem| format!(" ({problem})"));
            let own = own.unwrap_or_default();
            let words = format!("through host memory, pinned: {why}{own}");
            return Ok(Linked { groups: DeviceGroups::default(), words });
        }
        // All have said that they have it.
        (Ok(_), Err(problem)) => {
            return Err(CollectiveError::Io { op: "form", message: problem.to_string() });
        }
    };
    let watchdog = Watchdog::that_ends_the_process(rank, deadline)
        .map_err(|error| CollectiveError::Io { op: "form", message: error.to_string() })?;
    let place = || CudaPlace::beside(cuda.device()).map(|place| Arc::new(place) as Arc<dyn Place>);
    let form = |control: &Arc<dyn Collective>, name: &str, peers: Peers| {
        if control.size() == 1 {
            return Ok(None);
        }
        let group = NcclGroup::form(&GroupOptions {
            nccl: Arc::clone(&nccl),
            control: Arc::clone(control),
            name,
            peers,
            place: &place,
            deadline: deadline + WATCHDOG_FIRST,
            watchdog: &watchdog,
        })?;
        Ok::<_, CollectiveError>(Some(Arc::new(group) as Arc<dyn DeviceGroup<Cuda>>))
    };
    let groups = DeviceGroups {
        tensor: form(&groups.tensor, "tensor", Peers::None)?,
        pipeline: form(&groups.pipeline, "pipeline", Peers::Ring)?,
        data: form(&groups.data, "data", Peers::None)?,
    };
    Ok(Linked { groups, words: format!("over NCCL {version}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(minor: i32, shares: bool, gpu: u8) -> Told {
        let version = Version { major: 2, minor, patch: 4 };
        Told { version: (minor > 0).then_some(version), shares, uuid: [gpu; 16] }
    }

    #[test]
    fn what_ranks_tell_arrives_whole() {
        for one in [told(30, true, 255), told(0, false, 3), told(18, false, 0)] {
            assert_eq!(Told::read(&one.write()), one);
        }
    }

    #[test]
    fn ranks_use_nccl_when_all_have_it_and_gpus_are_their_own_or_may_be_shared() {
        let version = |minor| Version { major: 2, minor, patch: 4 };
        assert_eq!(decide(&[told(30, false, 1), told(28, false, 2)]), Ok(version(28)));
        let why = decide(&[told(30, false, 1), told(0, false, 2)]).unwrap_err();
        assert!(why.contains("rank 1 has no NCCL"), "{why}");
        for (one, other) in
            [(told(30, false, 1), told(30, true, 1)), (told(30, true, 1), told(29, true, 1))]
        {
            let why = decide(&[told(30, true, 9), one, other]).unwrap_err();
            assert!(why.contains("ranks 1 and 2 share a GPU"), "{why}");
        }
        assert_eq!(decide(&[told(30, true, 1), told(30, true, 1)]), Ok(version(30)));
    }
}
