//! The client's side of the control API: finds the cluster, shows the token, sorts the answers.

use std::future::Future;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use drumline_operator::front;
use drumline_wire::MESSAGE_MAX_BYTES;
use drumline_wire::auth::{AddToken, Token};
use drumline_wire::line;
use drumline_wire::v1::control_client::ControlClient;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::failure::Failure;
use crate::state::{StateDir, read_token};

/// Longest time for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest time for the answer to one short question.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// How to find a cluster: its state folder, or an address and a token.
#[derive(Debug, Clone)]
pub struct Access {
    /// The state folder.
    pub state: StateDir,
    /// `http://HOST:PORT` on loopback or `https://HOST:PORT`, instead of what the state folder says, or
    /// `kube://CONTEXT/NAMESPACE`.
    pub endpoint: Option<String>,
    /// The token's file, instead of the state folder's.
    pub token_file: Option<PathBuf>,
    /// File with the certificate that an `https://` endpoint must show.
    pub ca: Option<PathBuf>,
}

/// The generated client, with the token.
pub type Control = ControlClient<InterceptedService<Channel, AddToken>>;

/// A connection to a control plane.
#[derive(Debug, Clone)]
pub struct Client {
    /// The generated client.
    pub control: Control,
    /// Where it is connected to.
    pub address: String,
}

impl Access {
    /// Returns the control plane's address as it is now: it may change when it restarts.
    ///
    /// # Errors
    /// Unreachable, when no cluster is known; the user's mistake, when the address is none.
    pub fn address(&self) -> Result<String, Failure> {
        let address = match &self.endpoint {
            Some(endpoint) => endpoint.trim_end_matches('/').to_owned(),
            None => match self.state.endpoint() {
                Ok(endpoint) => endpoint.control,
                Err(error) => {
                    return Err(Failure::unreachable(format!("no cluster is known here: {error}"))
                        .hint("start one on this machine with `drumline up`, or name one with `--endpoint` or `--state-dir`"));
                }
            },
        };
        protected(&address)?;
        Ok(address)
    }

    /// Returns whether the cluster is on another machine, reached by TLS.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        self.endpoint.as_deref().is_some_and(is_https)
    }

    /// Reads the certificate that the control plane must show, where it is reached by TLS.
    ///
    /// # Errors
    /// The user's mistake: it is needed and not named, or cannot be read.
    pub fn certificate(&self) -> Result<Option<String>, Failure> {
        let Some(url) = self.endpoint.as_deref().filter(|url| is_https(url)) else {
            return Ok(None);
        };
        let Some(path) = &self.ca else {
            return Err(Failure::user(format!("--endpoint {url}: no --ca says whom to trust")).hint(
                "copy `tls.crt` from the state folder of the machine that runs `drumline up`, and name \
                 it with `--ca`",
            ));
        };
        match std::fs::read_to_string(path) {
            Ok(pem) if pem.contains("-----BEGIN CERTIFICATE-----") => Ok(Some(pem)),
            Ok(_) => Err(Failure::user(format!("--ca {}: no certificate in PEM", path.display()))),
            Err(error) => Err(Failure::user(format!("--ca {}: {error}", path.display()))),
        }
    }

    /// Reads the token.
    ///
    /// # Errors
    /// The user's mistake, with the file's name.
    pub fn token(&self) -> Result<Token, Failure> {
        let path = self.token_file.clone().unwrap_or_else(|| self.state.token_file());
        read_token(&path).map_err(|error| {
            Failure::user(error.to_string())
                .hint("name the cluster's token file with `--token-file`")
        })
    }

    /// Connects.
    ///
    /// # Errors
    /// Unreachable, with the address and the cause.
    pub async fn connect(&self) -> Result<Client, Failure> {
        if let Some(address) = self.kubernetes() {
            return to_kubernetes(&address).await;
        }
        // Who is not there is told before a token that may be missing with it.
        let address = self.address()?;
        let token = self.token()?;
        let channel = self.reach(&address).await?;
        Ok(Client::new(channel, &token, address))
    }

    /// Connects to who listens at the control plane's `address`, and shows no token yet.
    ///
    /// # Errors
    /// Unreachable, with the address and the cause: a certificate that is not the one that is trusted is
    /// one.
    pub async fn reach(&self, address: &str) -> Result<Channel, Failure> {
        let endpoint = line::endpoint(address, self.certificate()?.as_deref())
            .map_err(|error| {
                Failure::user(format!("--endpoint {address:?}: {}", line::deepest(&error)))
            })?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(Duration::from_secs(5))
            .keep_alive_timeout(Duration::from_secs(5));
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect()).await;
        let channel = match connected {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => {
                let mut status = Status::unavailable(error.to_string());
                status.set_source(std::sync::Arc::new(error));
                return Err(Failure::from_status(&status, address));
            }
            Err(_) => {
                let status =
                    Status::unavailable(format!("no connection within {CONNECT_TIMEOUT:?}"));
                return Err(Failure::from_status(&status, address));
            }
        };
        Ok(channel)
    }

    /// Returns the Kubernetes cluster that `--endpoint` names, if it names one.
    #[must_use]
    pub fn kubernetes(&self) -> Option<front::Address> {
        front::Address::parse(self.endpoint.as_deref()?)
    }
}

/// Calls the API server with the user's kubeconfig: the control API over it runs in this process,
/// so that every command is the same.
async fn to_kubernetes(address: &front::Address) -> Result<Client, Failure> {
    let channel = front::connect(address).await.map_err(|error| {
        Failure::user(format!("--endpoint {address}: {error}"))
            .hint("`kubectl config get-contexts` lists contexts; KUBECONFIG names the file")
    })?;
    // Nobody reads it: the kubeconfig says who calls.
    let token =
        Token::new("within-one-process").map_err(|error| Failure::failed(error.to_string()))?;
    Ok(Client::new(channel, &token, address.to_string()))
}

fn is_https(url: &str) -> bool {
    url.split_once("://").is_some_and(|(scheme, _)| scheme.eq_ignore_ascii_case("https"))
}

/// Checks that an address is reached by TLS, or on loopback: the token must not cross a network
/// unprotected.
fn protected(address: &str) -> Result<(), Failure> {
    let uri: http::Uri = address
        .parse()
        .map_err(|error| Failure::user(format!("--endpoint {address:?}: {error}")))?;
    let host = match (uri.scheme_str(), uri.host()) {
        (Some("https"), Some(_)) => return Ok(()),
        (Some("http"), Some(host)) => host.trim_matches(['[', ']']).to_owned(),
        _ => {
            return Err(Failure::user(format!(
                "--endpoint {address:?} is neither http://HOST:PORT, https://HOST:PORT nor \
                 kube://CONTEXT/NAMESPACE"
            )));
        }
    };
    let loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    if loopback {
        Ok(())
    } else {
        Err(Failure::user(format!(
            "--endpoint {address}: the token would cross the network unprotected"
        ))
        .hint("name the https:// address that `drumline up --remote IP:PORT` prints, and its certificate with `--ca`"))
    }
}

impl Client {
    fn new(channel: Channel, token: &Token, address: String) -> Self {
        let control = ControlClient::with_interceptor(channel, AddToken::new(token))
            .max_decoding_message_size(MESSAGE_MAX_BYTES)
            .max_encoding_message_size(MESSAGE_MAX_BYTES);
        Self { control, address }
    }

    /// Waits for the answer to a short question.
    ///
    /// # Errors
    /// What the control plane said, or that it did not answer in time.
    pub async fn call<T, F: Future<Output = Result<Response<T>, Status>>>(
        &self,
        ask: impl FnOnce(Control) -> F,
    ) -> Result<T, Failure> {
        match tokio::time::timeout(ANSWER_TIMEOUT, ask(self.control.clone())).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.failure(&status)),
            Err(_) => {
                let status = Status::new(
                    Code::DeadlineExceeded,
                    format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()),
                );
                Err(self.failure(&status))
            }
        }
    }

    /// Sorts a status of this control plane.
    #[must_use]
    pub fn failure(&self, status: &Status) -> Failure {
        Failure::from_status(status, &self.address)
    }
}

/// Tries again while the cluster cannot be reached: waits longer each time, and gives up after a
/// span without any success.
#[derive(Debug)]
pub struct Patience {
    span: Duration,
    has_succeeded: bool,
    lost_since: Option<Instant>,
    delay: Duration,
}

impl Patience {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(2);
    /// Who was never connected most likely asks for a cluster that is not there.
    const NEVER_CONNECTED: Duration = Duration::from_secs(5);

    /// Gives up after `span` without a success.
    #[must_use]
    pub fn new(span: Duration) -> Self {
        Self { span, has_succeeded: false, lost_since: None, delay: Self::FIRST }
    }

    /// Starts afresh after a success.
    pub fn succeeded(&mut self) {
        self.has_succeeded = true;
        self.lost_since = None;
        self.delay = Self::FIRST;
    }

    /// Waits before the next try.
    ///
    /// # Errors
    /// The failure itself, when it is not of the kind that passes or patience is at its end.
    pub async fn after(&mut self, failure: Failure) -> Result<(), Failure> {
        if !failure.is_transient() {
            return Err(failure);
        }
        let span =
            if self.has_succeeded { self.span } else { self.span.min(Self::NEVER_CONNECTED) };
        if span.is_zero() {
            return Err(failure);
        }
        let since = *self.lost_since.get_or_insert_with(|| {
            crate::output::note(&format!("{failure}; trying again"));
            Instant::now()
        });
        if since.elapsed() + self.delay > span {
            return Err(failure);
        }
        tokio::time::sleep(self.delay).await;
        self.delay = (self.delay * 2).min(Self::LONGEST);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_leaves_this_machine_only_protected() {
        for good in
            ["http://127.0.0.1:7", "http://localhost:1", "http://[::1]:1", "https://10.0.0.1:7"]
        {
            assert!(protected(good).is_ok(), "{good}");
        }
        for bad in ["http://10.0.0.1:7070", "ftp://127.0.0.1:1", "127.0.0.1:1", "nonsense", ""] {
            assert_eq!(protected(bad).unwrap_err().code(), 2, "{bad}");
        }
    }

    #[tokio::test]
    async fn patience_ends_and_never_starts_for_mistakes() {
        let mut patience = Patience::new(Duration::from_millis(250));
        let mut tries = 0;
        while patience.after(Failure::unreachable("x")).await.is_ok() {
            tries += 1;
        }
        assert_eq!(tries, 1, "100 ms, and then 200 ms would be too long");
        assert!(patience.after(Failure::user("x")).await.is_err());
    }
}
