//! The client's end of a line to whoever answers: by plain text on loopback, elsewhere by TLS with
//! one certificate that is trusted; and the credential that is shown on it.

use std::path::PathBuf;
use std::time::Duration;

use tonic::service::Interceptor;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};

use crate::auth::{AddToken, Token};

/// The name in the certificate of whoever is called by TLS, whatever its address. The certificate
/// itself is what is trusted.
pub const CERTIFICATE_NAME: &str = "drumline";

/// What a caller shows of itself.
#[derive(Debug, Clone)]
pub enum Credential {
    /// A secret that stays as it is.
    Fixed(Token),
    /// A file whose content is replaced from time to time, such as a projected token.
    File(PathBuf),
}

impl Interceptor for Credential {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        match self {
            Self::Fixed(token) => AddToken::new(token).call(request),
            Self::File(path) => {
                let text = std::fs::read_to_string(&*path).map_err(|error| {
                    Status::unavailable(format!("the token {}: {error}", path.display()))
                })?;
                let token = Token::new(&text).map_err(|error| {
                    Status::unavailable(format!("the token {}: {error}", path.display()))
                })?;
                AddToken::new(&token).call(request)
            }
        }
    }
}

/// Returns the words of the innermost cause: "connection refused", not "error trying to connect".
#[must_use]
pub fn deepest(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = cause.to_string();
        source = cause.source();
    }
    text
}

/// Returns how to reach `url`; with `https`, only who shows a certificate that `ca`, in PEM, vouches
/// for is talked to.
///
/// # Errors
/// When `url` is no address, or `ca` no certificate.
pub fn endpoint(url: &str, ca: Option<&str>) -> Result<Endpoint, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(url.to_owned())?
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .tcp_nodelay(true);
    match ca {
        Some(pem) => endpoint.tls_config(
            ClientTlsConfig::new()
                .ca_certificate(Certificate::from_pem(pem))
                .domain_name(CERTIFICATE_NAME),
        ),
        None => Ok(endpoint),
    }
}
