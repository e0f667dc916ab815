//! One rank of a served model: loads its part of the weights and runs the leader's steps.
//!
//! The leader (rank 0) takes requests over gRPC ([`service`]), decides each step ([`leader`]) and
//! turns tokens into text ([`text`]). The others only follow.

pub mod leader;
pub mod service;
pub mod text;

use std::sync::Arc;

use drumline_checkpoint::{ModelSource, open_model};
use drumline_cuda::Cuda;
use drumline_data::Tokenizer;
use drumline_engine::infer::{Model, ModelOptions};
use drumline_engine::{DeviceGroups, EngineError, Groups};
use drumline_spec::{DeviceKind, KvCacheStorage, ModelService, WeightStorage};
use drumline_tensor::{Backend, Cpu, DType, MatmulPrecision};
use drumline_wire::auth::Token;
use tokio::net::TcpListener;
use tokio::runtime::Handle;

use crate::RankError;
use crate::context::Context;
use crate::gpu;
use crate::host::Host;
use crate::serve::leader::Shared;
use crate::world::{self, World};

/// Tokens of prompts computed in one step while nothing decodes: enough that reading the weights takes
/// a small part of it, few enough that the buffers of a step stay small beside the weights.
const PREFILL_TOKENS: usize = 128;
/// The same in a step that also decodes: enough rows that weights are not what a step waits for, few
/// enough that a token takes no more than a few times what it takes alone.
const PREFILL_BESIDE_DECODE: usize = 64;

/// Serves until the gang is stopped, on the kind of device that the service asks for.
///
/// # Errors
/// [`RankError`]; the gang's attempt is over then.
pub fn run(
    context: &Context,
    service: &ModelService,
    host: &Host,
    runtime: &Handle,
) -> Result<(), RankError> {
    match context.spec.gang().device {
        DeviceKind::Cpu => {
            let backend = Cpu::new(context.threads).map_err(EngineError::from)?;
            let alone = |_: &Cpu, _: &Groups| Ok(DeviceGroups::default());
            run_on(backend, alone, context, service, host, runtime)
        }
        DeviceKind::Gpu => {
            let backend = gpu::open(context, MatmulPrecision::F32)?;
            let link = |cuda: &Cuda, groups: &Groups| {
                gpu::link(context, cuda, groups).map(|linked| linked.groups)
            };
            run_on(backend, link, context, service, host, runtime)
        }
    }
}

fn run_on<B: Backend>(
    backend: B,
    link: impl FnOnce(&B, &Groups) -> Result<DeviceGroups<B>, RankError>,
    context: &Context,
    service: &ModelService,
    host: &Host,
    runtime: &Handle,
) -> Result<(), RankError> {
    let source = open_model(&context.resolve(&service.model))?;
    for refused in &source.refused {
        println!("checkpoint of step {} refused: {}", refused.step, refused.error);
    }
    let errors = source.model.check(service.parallelism.tensor, service.parallelism.pipeline);
    if let Some(error) = errors.first() {
        return Err(RankError::Refused(format!("{}: {error}", source.path.display())));
    }
    let front =
        if context.rank == 0 { Some(Front::open(context, &source, runtime)?) } else { None };
    let url = front.as_ref().map(|front| front.url.clone()).unwrap_or_default();
    let World { coords, groups, secret } =
        runtime.block_on(world::join(context, host, service.parallelism, url))?;
    let device = link(&backend, &groups)?;
    let options = ModelOptions {
        max_batch: service.max_batch as usize,
        max_context: service.max_context as usize,
        max_queue: service.max_queue as usize,
        prefill_tokens: PREFILL_TOKENS,
        prefill_beside_decode: PREFILL_BESIDE_DECODE,
        blocks: 0,
        weights: match service.weights {
            WeightStorage::F32 => DType::F32,
            WeightStorage::Bf16 => DType::Bf16,
            WeightStorage::F16 => DType::F16,
            WeightStorage::Int8 => DType::I8,
        },
        cache: match service.kv_cache {
            KvCacheStorage::Auto => None,
            KvCacheStorage::F32 => Some(DType::F32),
            KvCacheStorage::Bf16 => Some(DType::Bf16),
            KvCacheStorage::F16 => Some(DType::F16),
        },
    };
    let mut model =
        Model::new(&source.model, service.parallelism, coords, groups, backend, options)?;
    model.link_devices(device);
    let reader = source.reader;
    model.load(|shard, values| reader.read(shard, values))?;
    drop(reader);
    let memory = model.memory();
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    println!("serves {} from {}", service.served_name, source.path.display());
    println!(
        "memory: weights as {} {:.1} MiB, KV blocks as {} {:.1} MiB, buffers {:.1} MiB",
        service.weights.as_str(),
        mib(memory.weights),
        model.cache_format().as_str(),
        mib(memory.cache),
        mib(memory.buffers)
    );
    match front {
        Some(front) => front.lead(secret, host, model, runtime),
        None => leader::follow(model),
    }
}

/// What only the leader has: the tokenizer and the door for requests.
struct Front {
    url: String,
    listener: TcpListener,
    tokenizer: Arc<Tokenizer>,
}

impl Front {
    fn open(context: &Context, source: &ModelSource, runtime: &Handle) -> Result<Self, RankError> {
        let path = source.tokenizer.as_ref().ok_or_else(|| {
            let folder = source.path.display();
            RankError::Refused(format!("{folder}: there is no tokenizer.json to serve text with"))
        })?;
        let tokenizer = Arc::new(Tokenizer::open(path)?);
        let listener = runtime.block_on(TcpListener::bind((context.listen_ip, 0)))?;
        let url = format!("http://{}", listener.local_addr()?);
        Ok(Self { url, listener, tokenizer })
    }

    fn lead<B: Backend>(
        self,
        secret: Token,
        host: &Host,
        model: Model<B>,
        runtime: &Handle,
    ) -> Result<(), RankError> {
        let shared = Arc::new(Shared::new(model.limits()));
        let (commands, inbox) = tokio::sync::mpsc::channel(leader::COMMANDS_MAX);
        let server =
            service::serve(self.listener, secret, self.tokenizer, Arc::clone(&shared), commands);
        runtime.spawn(server);
        leader::lead(model, inbox, &shared, host, runtime)
    }
}
