//! `drumline pod-gateway`: the gateway of a Kubernetes cluster. It learns from the operator where models
//! are served.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use drumline_wire::line::Credential;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::operator::read_token;
use crate::failure::Failure;

/// Arguments of `pod-gateway`.
#[derive(Debug, Args)]
pub struct PodGatewayArgs {
    /// Where clients are served, in plain text: what stands before it ends TLS.
    #[arg(long, default_value_t = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8080)))]
    pub listen: SocketAddr,
    /// Where the operator that leads is reached.
    #[arg(long, value_name = "URL")]
    pub operator: String,
    /// File with the certificate that the operator shows, in PEM.
    #[arg(long, value_name = "FILE")]
    pub operator_ca: PathBuf,
    /// File with the token that is shown to the operator, read again for each call.
    #[arg(long, value_name = "FILE")]
    pub operator_token: PathBuf,
    /// File with the key that clients show.
    #[arg(long, value_name = "FILE")]
    pub keys_file: PathBuf,
    /// File with the token that a reader of the metrics must show.
    #[arg(long, value_name = "FILE")]
    pub metrics_token_file: PathBuf,
}

/// Runs until it is asked to stop.
///
/// # Errors
/// The user's, for a file that cannot be read; failed, when it cannot listen.
pub(super) async fn run(args: PodGatewayArgs, stop: CancellationToken) -> Result<(), Failure> {
    let ca = std::fs::read_to_string(&args.operator_ca).map_err(|error| {
        Failure::user(format!("--operator-ca {}: {error}", args.operator_ca.display()))
    })?;
    let operator = args.operator;
    let options = drumline_gateway::Options {
        listen: args.listen,
        allow_hosts: Vec::new(),
        control: Arc::new(move || Ok(operator.clone())),
        control_ca: Some(ca),
        credential: Credential::File(args.operator_token),
        keys: vec![read_token("--keys-file", &args.keys_file)?],
        in_pod: Some(vec![read_token("--metrics-token-file", &args.metrics_token_file)?]),
    };
    // Nobody asks where it listens: its service leads to it.
    let (ready, _listening) = oneshot::channel();
    drumline_gateway::run(options, ready, stop)
        .await
        .map_err(|error| Failure::failed(error.to_string()))
}
