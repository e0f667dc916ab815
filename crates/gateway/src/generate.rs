//! One generation: from an admitted request to the events of the leader rank.

use std::hash::{Hash, Hasher};
use std::time::Duration;

use drumline_wire::v1;
use futures::Stream;
use tokio::sync::OwnedSemaphorePermit;
use tonic::Streaming;

use crate::error::ApiError;
use crate::meter::{Ending, Measure, Meter};
use crate::routes::Routes;

/// Longest time without an event before a generation is given up.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// A running generation. Dropping it stops the generation on the ranks and frees its place.
#[derive(Debug)]
pub struct Generation {
    events: Streaming<v1::GenerateEvent>,
    measure: Measure,
    over: bool,
    _place: OwnedSemaphorePermit,
}

impl Generation {
    /// Admits a request and starts it. A replica that cannot be reached is passed over as long as
    /// there is another one.
    ///
    /// # Errors
    /// As [`Routes::admit`]; and what the leader rank refuses.
    pub async fn start(
        routes: &Routes,
        meter: &Meter,
        model: &str,
        request: v1::GenerateRequest,
    ) -> Result<Self, ApiError> {
        let prefix = prefix(&request);
        let mut avoid = Vec::new();
        let mut unreached = None;
        loop {
            let admitted = match (routes.admit(model, prefix, &avoid), unreached.take()) {
                (Ok(admitted), _) => admitted,
                // The one that could not be reached is all there was.
                (Err(_), Some(error)) => return Err(error),
                (Err(error), None) => {
                    let ending = match error.status.as_u16() {
                        429 => Ending::Busy,
                        503 => Ending::Failed,
                        _ => Ending::Invalid,
                    };
                    // A name that nobody serves must not become a label: anyone can send any.
                    let label =
                        if routes.names().iter().any(|name| name == model) { model } else { "" };
                    meter.refused(label, ending);
                    return Err(error);
                }
            };
            let (mut client, place) = (admitted.client, admitted.place);
            let mut measure = meter.begin(model);
            let opened = tokio::time::timeout(SILENCE_MAX, client.generate(request.clone())).await;
            let answer = match opened {
                Ok(answer) => answer,
                Err(_) => {
                    Err(tonic::Status::deadline_exceeded("the request was not taken in 60 s"))
                }
            };
            let status = match answer {
                Ok(response) => {
                    let events = response.into_inner();
                    return Ok(Self { events, measure, over: false, _place: place });
                }
                Err(status) => status,
            };
            let error = ApiError::from_rank(&status);
            measure.end(match error.status.as_u16() {
                429 => Ending::Busy,
                400 => Ending::Invalid,
                _ => Ending::Failed,
            });
            if status.code() != tonic::Code::Unavailable {
                return Err(error);
            }
            avoid.push(admitted.job);
            unreached = Some(error);
        }
    }

    /// Returns the next event, or `None` after the one with a finish reason.
    ///
    /// # Errors
    /// When the ranks fail or fall silent.
    pub async fn next(&mut self) -> Result<Option<v1::GenerateEvent>, ApiError> {
        if self.over {
            return Ok(None);
        }
        let status = match tokio::time::timeout(SILENCE_MAX, self.events.message()).await {
            Ok(Ok(Some(event))) => {
                self.measure.event(&event);
                if !event.finish_reason.is_empty() {
                    self.over = true;
                    self.measure.end(Ending::Ok);
                }
                return Ok(Some(event));
            }
            Ok(Ok(None)) => tonic::Status::unavailable("the stream ended before its end"),
            Ok(Err(status)) => status,
            Err(_) => tonic::Status::deadline_exceeded("no token for 60 s"),
        };
        self.over = true;
        self.measure.end(Ending::Failed);
        Err(ApiError::from_rank(&status))
    }

    /// Collects everything into one event.
    ///
    /// # Errors
    /// As [`Generation::next`].
    pub async fn collect(mut self) -> Result<v1::GenerateEvent, ApiError> {
        let mut whole = v1::GenerateEvent::default();
        while let Some(event) = self.next().await? {
            whole.text.push_str(&event.text);
            whole.tokens.extend(event.tokens);
            whole.finish_reason = event.finish_reason;
            whole.prompt_tokens = event.prompt_tokens;
            whole.completion_tokens = event.completion_tokens;
            whole.cached_tokens = event.cached_tokens;
        }
        Ok(whole)
    }

    /// Turns the generation into a stream of its events.
    pub fn into_stream(self) -> impl Stream<Item = Result<v1::GenerateEvent, ApiError>> {
        futures::stream::unfold(Some(self), |state| async move {
            let mut generation = state?;
            match generation.next().await {
                Ok(Some(event)) => Some((Ok(event), Some(generation))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }
}

/// Bytes or tokens of a prompt that decide which replica has most likely seen such a beginning.
const PREFIX: usize = 512;

fn prefix(request: &v1::GenerateRequest) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    match &request.prompt {
        Some(v1::generate_request::Prompt::Text(text)) => {
            text.as_bytes().iter().take(PREFIX).for_each(|byte| byte.hash(&mut hasher));
        }
        Some(v1::generate_request::Prompt::Tokens(tokens)) => {
            tokens.ids.iter().take(PREFIX).for_each(|token| token.hash(&mut hasher));
        }
        None => {}
    }
    hasher.finish()
}
