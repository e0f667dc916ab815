//! From the rendezvous to communicators: one for each axis of the mesh, and one for all ranks.

use std::net::SocketAddr;
use std::sync::Arc;

use drumline_collective::host::{HostWorld, Listener, WorldOptions};
use drumline_collective::{Collective, CollectiveError};
use drumline_engine::Groups;
use drumline_mesh::{Axis, Coords, Mesh};
use drumline_spec::Parallelism;
use drumline_wire::auth::Token;
use drumline_wire::line::Credential;

use crate::context::Context;
use crate::host::{Host, HostError};

/// Why a rank has no world.
#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    /// The rendezvous failed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The ranks cannot be linked.
    #[error("cannot link the ranks: {0}")]
    Link(#[from] CollectiveError),
    /// A rank announced an address that is none.
    #[error("rank {rank} announced the address {address:?}, which is none")]
    Address {
        /// The rank.
        rank: u32,
        /// What it announced.
        address: String,
    },
}

/// This rank's place and its communicators.
#[derive(Clone)]
pub struct World {
    /// Its coordinates.
    pub coords: Coords,
    /// The attempt's secret.
    pub secret: Token,
    /// One communicator for each axis, and one for all.
    pub groups: Groups,
}

/// Joins the world of the attempt: announces this rank, waits for the others, links to them and
/// forms the groups of the split.
///
/// # Errors
/// [`WorldError`].
pub async fn join(
    context: &Context,
    host: &Host,
    split: Parallelism,
    inference_url: String,
) -> Result<World, WorldError> {
    let listener = Listener::bind(context.listen_ip)?;
    let address = listener.address().to_string();
    let world = host.join(context, address, inference_url).await?;
    let secret = match (&context.credential, Token::new(&world.secret)) {
        (Credential::Fixed(secret), _) => secret.clone(),
        (Credential::File(_), Ok(secret)) => secret,
        (Credential::File(_), Err(error)) => {
            return Err(HostError::Join(format!("the world has no secret: {error}")).into());
        }
    };
    let mut members = world.ranks;
    members.sort_by_key(|member| member.rank);
    let addresses = members
        .iter()
        .map(|member| {
            member.collective_address.parse::<SocketAddr>().map_err(|_| WorldError::Address {
                rank: member.rank,
                address: member.collective_address.clone(),
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let shared = secret.expose().as_bytes().to_vec();
    let mut options = WorldOptions::new(context.rank as usize, addresses, shared);
    options.deadline = context.collective_deadline;
    options.streams = context.tcp_streams.unwrap_or(options.streams);
    let rank = context.rank;
    // Linking blocks: it must not hold up the runtime that carries reports.
    let linked = tokio::task::spawn_blocking(move || link(listener, &options, split, rank)).await;
    let linked = linked.unwrap_or_else(|error| {
        let message = error.to_string();
        Err(CollectiveError::Io { op: "connect", message }.into())
    });
    linked.map(|(coords, groups)| World { coords, secret, groups })
}

/// Links this rank to all others of a split and forms its groups. Blocks.
///
/// # Errors
/// [`WorldError::Link`].
pub fn link(
    listener: Listener,
    options: &WorldOptions,
    split: Parallelism,
    rank: u32,
) -> Result<(Coords, Groups), WorldError> {
    let mesh = Mesh::new(split);
    let world = HostWorld::connect(listener, options)?;
    let form = |ranks: Vec<u32>, id: u32| -> Result<Arc<dyn Collective>, CollectiveError> {
        let ranks: Vec<usize> = ranks.iter().map(|rank| *rank as usize).collect();
        Ok(world.group(&ranks, id)?)
    };
    // Every rank is in one group of each axis, so an axis' number tells its groups apart from
    // those of other axes; groups of the same axis share no rank.
    let along = |axis: Axis, id: u32| form(mesh.group(rank, axis), id);
    let groups = Groups {
        tensor: along(Axis::Tensor, 1)?,
        pipeline: along(Axis::Pipeline, 2)?,
        data: along(Axis::Data, 3)?,
        world: form((0..mesh.size()).collect(), 4)?,
    };
    Ok((mesh.coords(rank), groups))
}
