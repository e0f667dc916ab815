//! The one long-lived stream to the control plane, opened again whenever it breaks.

use std::time::Duration;

use drumline_wire::auth::{AddToken, Token};
use drumline_wire::v1::agent_link_client::AgentLinkClient;
use drumline_wire::{line, v1};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::service::ControlAddress;

/// Messages under way to the control plane.
const UP_QUEUE: usize = 256;
/// First wait before another try; it doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(30);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// What the link tells the dispatcher.
#[derive(Debug)]
pub enum LinkEvent {
    /// A stream opens; the first message sent must be the hello.
    Opened(mpsc::Sender<v1::AgentUp>),
    /// A message came down.
    Down(Box<v1::AgentDown>),
    /// The stream is broken.
    Closed,
}

/// Keeps a stream open until `stop`.
pub async fn run(
    address: ControlAddress,
    ca: Option<String>,
    token: Token,
    events: mpsc::Sender<LinkEvent>,
    stop: CancellationToken,
) {
    let mut backoff = BACKOFF_MIN;
    let mut silent = false;
    loop {
        let attempt = connect(&address, ca.as_deref(), &token, &events);
        let outcome = tokio::select! {
            () = stop.cancelled() => return,
            outcome = attempt => outcome,
        };
        match outcome {
            Ok(()) => {
                backoff = BACKOFF_MIN;
                silent = false;
                tracing::warn!("the control plane closed the stream");
            }
            // Told once, not at every try.
            Err(reason) if !silent => {
                tracing::warn!(%reason, "the control plane cannot be reached; trying on");
                silent = true;
            }
            Err(_) => {}
        }
        if events.send(LinkEvent::Closed).await.is_err() {
            return;
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(backoff) => {}
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

/// Runs one stream until it ends. `Ok` when it had been open.
async fn connect(
    address: &ControlAddress,
    ca: Option<&str>,
    token: &Token,
    events: &mpsc::Sender<LinkEvent>,
) -> Result<(), String> {
    let url = address.resolve()?;
    let channel = line::endpoint(&url, ca)
        .map_err(|error| format!("control address {url:?}: {error}"))?
        .connect_timeout(Duration::from_secs(3))
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5))
        .connect()
        .await
        .map_err(|error| format!("{url}: {}", line::deepest(&error)))?;
    let mut client = AgentLinkClient::with_interceptor(channel, AddToken::new(token))
        .max_decoding_message_size(drumline_wire::MESSAGE_MAX_BYTES);
    let (up, outgoing) = mpsc::channel(UP_QUEUE);
    if events.send(LinkEvent::Opened(up)).await.is_err() {
        return Ok(());
    }
    let opened =
        tokio::time::timeout(Duration::from_secs(5), client.connect(ReceiverStream::new(outgoing)));
    let mut incoming = opened
        .await
        .map_err(|_| format!("{url}: no answer to the hello within 5 s"))?
        .map_err(|status| format!("{url}: {}", status.message()))?
        .into_inner();
    while let Ok(Some(down)) = incoming.message().await {
        if events.send(LinkEvent::Down(Box::new(down))).await.is_err() {
            break;
        }
    }
    Ok(())
}
