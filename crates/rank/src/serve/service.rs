//! The `Inference` service of the leader: requests in, text out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use drumline_data::Tokenizer;
use drumline_engine::infer::{Admission, FinishReason, Request, RequestId, Sampling};
use drumline_wire::auth::{RequireToken, Token};
use drumline_wire::v1::generate_request::Prompt;
use drumline_wire::v1::inference_server::{Inference, InferenceServer};
use drumline_wire::{now_ms, v1};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::TcpIncoming;
use tonic::{Response, Status};

use crate::serve::leader::{Command, Shared, Timed};
use crate::serve::text::Text;

/// Events of one stream that may wait for a slow reader.
const STREAM_MAX: usize = 64;
/// The largest number of likeliest tokens that are told with each token.
const LOGPROBS_MAX: u32 = 20;

struct Service {
    tokenizer: Arc<Tokenizer>,
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    seeds: AtomicU64,
    started_ms: u64,
}

/// Serves requests until the process ends.
pub async fn serve(
    listener: TcpListener,
    secret: Token,
    tokenizer: Arc<Tokenizer>,
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
) {
    let started_ms = now_ms();
    let seeds = AtomicU64::new(started_ms);
    let service = Service { tokenizer, shared, commands, seeds, started_ms };
    let server =
        InferenceServer::new(service).max_decoding_message_size(drumline_wire::MESSAGE_MAX_BYTES);
    let guarded =
        tonic::service::interceptor::InterceptedService::new(server, RequireToken::new(secret));
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let served = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(std::time::Duration::from_secs(10)))
        .add_service(guarded)
        .serve_with_incoming(incoming)
        .await;
    if let Err(error) = served {
        eprintln!("the inference service ended: {error}");
    }
}

impl Service {
    async fn tokens(&self, prompt: Option<Prompt>) -> Result<Vec<u32>, Status> {
        match prompt {
            Some(Prompt::Text(text)) => {
                // A long text takes a while: other requests, and health, go on meanwhile.
                let tokenizer = Arc::clone(&self.tokenizer);
                tokio::task::spawn_blocking(move || tokenizer.encode(&text))
                    .await
                    .map_err(|error| Status::internal(error.to_string()))?
                    .map_err(|error| Status::invalid_argument(error.to_string()))
            }
            Some(Prompt::Tokens(tokens)) => Ok(tokens.ids),
            None => Err(Status::invalid_argument("the prompt is missing")),
        }
    }

    fn request(&self, asked: &v1::GenerateRequest, prompt: Vec<u32>) -> Result<Request, Status> {
        let context = self.shared.limits.max_context;
        if prompt.is_empty() {
            return Err(Status::invalid_argument("the prompt has no tokens"));
        }
        let room = context.saturating_sub(prompt.len());
        if room == 0 {
            return Err(Status::invalid_argument(format!(
                "the prompt has {} tokens and leaves no room in the context of {context}",
                prompt.len()
            )));
        }
        if asked.logprobs.is_some_and(|count| count > LOGPROBS_MAX) {
            return Err(Status::invalid_argument(format!("logprobs: at most {LOGPROBS_MAX}")));
        }
        let end = self.tokenizer.end_of_text().filter(|_| !asked.ignore_eos);
        Ok(Request {
            prompt,
            max_tokens: if asked.max_tokens == 0 { room } else { asked.max_tokens as usize },
            sampling: Sampling {
                temperature: asked.temperature,
                top_k: asked.top_k,
                top_p: if asked.top_p > 0.0 { asked.top_p } else { 1.0 },
                seed: asked.seed.unwrap_or_else(|| self.seeds.fetch_add(1, Ordering::Relaxed)),
                logprobs: asked.logprobs.map(|count| count as u8),
            },
            stop_tokens: end.into_iter().collect(),
        })
    }
}

fn refused(admission: &Admission) -> Status {
    match admission {
        Admission::QueueFull { .. } => Status::resource_exhausted(admission.to_string()),
        _ => Status::invalid_argument(admission.to_string()),
    }
}

fn ending() -> Status {
    Status::unavailable("the model is being stopped")
}

#[tonic::async_trait]
impl Inference for Service {
    type GenerateStream = ReceiverStream<Result<v1::GenerateEvent, Status>>;

    async fn generate(
        &self,
        request: tonic::Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let mut asked = request.into_inner();
        let prompt = self.tokens(asked.prompt.take()).await?;
        let prompt_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        let request = self.request(&asked, prompt)?;
        let echo = if asked.echo {
            self.tokenizer
                .decode(&request.prompt)
                .map_err(|error| Status::invalid_argument(error.to_string()))?
        } else {
            String::new()
        };
        // Never more than the context: what does not fit is refused below.
        let places = request.max_tokens.min(self.shared.limits.max_context) + 1;
        let (events, inbox) = mpsc::channel(places);
        let (reply, answer) = oneshot::channel();
        let command = Command::Submit { request, reply, events };
        self.commands.send(command).await.map_err(|_| ending())?;
        let id = answer.await.map_err(|_| ending())?.map_err(|admission| refused(&admission))?;
        let (out, stream) = mpsc::channel(STREAM_MAX);
        let writing = Writing {
            id,
            asked,
            prompt_tokens,
            tokenizer: Arc::clone(&self.tokenizer),
            out,
            commands: self.commands.clone(),
        };
        tokio::spawn(writing.run(inbox, echo));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn tokenize(
        &self,
        request: tonic::Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let ids = self.tokens(Some(Prompt::Text(request.into_inner().text))).await?;
        Ok(Response::new(v1::TokenizeResponse { ids }))
    }

    async fn health(
        &self,
        _: tonic::Request<v1::HealthRequest>,
    ) -> Result<Response<v1::HealthResponse>, Status> {
        let load = self.shared.load();
        let end = self.tokenizer.end_of_text().and_then(|id| self.tokenizer.token(id));
        Ok(Response::new(v1::HealthResponse {
            ready: self.shared.is_ready(),
            last_step_ms: self.shared.last_step_ms(),
            running: u32::try_from(load.running).unwrap_or(u32::MAX),
            waiting: u32::try_from(load.waiting).unwrap_or(u32::MAX),
            kv_usage: load.blocks_used as f64 / load.blocks_total.max(1) as f64,
            chat_template: String::new(),
            max_context: u32::try_from(self.shared.limits.max_context).unwrap_or(u32::MAX),
            bos_token: String::new(),
            eos_token: end.unwrap_or_default(),
            created_ms: self.started_ms,
        }))
    }
}

/// Turns the events of one request into its stream.
struct Writing {
    id: RequestId,
    asked: v1::GenerateRequest,
    prompt_tokens: u32,
    tokenizer: Arc<Tokenizer>,
    out: mpsc::Sender<Result<v1::GenerateEvent, Status>>,
    commands: mpsc::Sender<Command>,
}

impl Writing {
    async fn run(self, inbox: mpsc::Receiver<Timed>, echo: String) {
        if !self.write(inbox, echo).await {
            // Nobody reads any more, or a stop string came: what is left need not be made.
            let _ = self.commands.send(Command::Cancel(self.id)).await;
        }
    }

    /// Returns whether the request ended by itself.
    async fn write(&self, mut inbox: mpsc::Receiver<Timed>, echo: String) -> bool {
        if !echo.is_empty() {
            let event = v1::GenerateEvent { text: echo, ..v1::GenerateEvent::default() };
            if self.out.send(Ok(event)).await.is_err() {
                return false;
            }
        }
        let tokenizer = Arc::clone(&self.tokenizer);
        let mut text = Text::new(tokenizer.incremental(), &self.asked.stop);
        let mut made = 0;
        loop {
            let next = tokio::select! {
                next = inbox.recv() => next,
                () = self.out.closed() => return false,
            };
            let Some(Timed { event, queue_ms, prefill_ms }) = next else {
                let lost = Status::unavailable("a rank of the model was lost");
                let _ = self.out.send(Err(lost)).await;
                return true;
            };
            made += u32::from(event.token.is_some());
            let mut piece = match event.token.map(|token| text.push(token)).transpose() {
                Ok(piece) => piece.unwrap_or_default(),
                Err(error) => {
                    let _ = self.out.send(Err(Status::internal(error.to_string()))).await;
                    return false;
                }
            };
            let mut finish = event.finish.map(FinishReason::as_str).unwrap_or_default();
            if event.finish.is_some() {
                piece.push_str(&text.finish().unwrap_or_default());
            }
            if text.is_stopped() {
                finish = "stop";
            }
            let message = v1::GenerateEvent {
                text: piece,
                tokens: event.token.map(|token| self.token(token, &event)).into_iter().collect(),
                finish_reason: finish.to_owned(),
                prompt_tokens: self.prompt_tokens,
                completion_tokens: made,
                queue_ms,
                cached_tokens: u32::try_from(event.reused).unwrap_or(u32::MAX),
                prefill_ms,
            };
            if self.out.send(Ok(message)).await.is_err() {
                return false;
            }
            if !finish.is_empty() {
                return event.finish.is_some();
            }
        }
    }

    fn token(&self, id: u32, event: &drumline_engine::infer::Event) -> v1::GeneratedToken {
        // Only log-probabilities name tokens one by one.
        let told = |id: u32| self.tokenizer.decode(&[id]).unwrap_or_default();
        let Some(logprob) = event.logprob else {
            return v1::GeneratedToken { id, ..v1::GeneratedToken::default() };
        };
        let top = event
            .top
            .iter()
            .map(|score| v1::TopLogprob {
                id: score.token,
                text: told(score.token),
                logprob: score.logprob,
            })
            .collect();
        v1::GeneratedToken { id, text: told(id), logprob, top }
    }
}
