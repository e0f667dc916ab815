//! What the operator is to its ranks: the same service that an agent is elsewhere, by TLS.
//!
//! A rank shows the token of its pod, which the API server vouches for; its world tells it the
//! attempt's secret, which the ranks show to each other and the gateway to their leader. Nothing of
//! it is stored: a new leader of the operator asks running ranks to say again where they listen.

pub mod admit;
mod answer;
pub mod callers;
pub mod keys;
pub mod place;
pub mod serve;
pub mod services;
pub mod worlds;

use std::net::SocketAddr;

/// The audience of the tokens that ranks and gateways show.
pub const AUDIENCE: &str = "drumline.dev/operator";

/// Where ranks are served.
#[derive(Debug, Clone)]
pub struct RankRules {
    /// Where this process listens.
    pub listen: SocketAddr,
    /// `https://HOST:PORT` at which pods reach whichever operator leads.
    pub url: String,
    /// The name of the pod that this process is; empty: none, and nobody is told where it is.
    pub pod: String,
}
