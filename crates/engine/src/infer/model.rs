//! One rank's part of a served model, and who leads it.

use std::sync::Arc;

use drumline_mesh::{Coords, ShardSpec};
use drumline_spec::{Family, ModelConfig, Parallelism, Recompute};
use drumline_tensor::{Backend, CachedAttention, CachedSegment, DType, Draw, KV_BLOCK};

use super::batcher::{
    Admission, Batcher, Limits, Load, Request, RequestId, Sampled, StepOutput, blocks_for,
};
use super::plan::{Segment, StepPlan};
use super::weights::Weights;
use crate::activations::{Dims, rotary_table};
use crate::error::EngineError;
use crate::groups::{DeviceGroups, Groups, Route};
use crate::layer::{Stage, all, all_mut};
use crate::layout::{Layout, LinearAt, Split};
use crate::probe::{NoProbe, Probe, Span, timed};

/// What a served model may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelOptions {
    /// Sequences decoded in one batch.
    pub max_batch: usize,
    /// Tokens of prompt and completion together; 0: the model's context.
    pub max_context: usize,
    /// Requests that may wait.
    pub max_queue: usize,
    /// Tokens of prompts computed in one step.
    pub prefill_tokens: usize,
    /// The same in a step that also decodes; at most `prefill_tokens`.
    pub prefill_beside_decode: usize,
    /// Cache blocks of 16 tokens; 0: enough for `max_batch` sequences of `max_context`.
    pub blocks: usize,
    /// How matrices are stored. Vectors and activations are f32.
    pub weights: DType,
    /// How keys and values are stored; none: as the matrices are (bf16 beside int8) where the device can,
    /// else as it prefers.
    pub cache: Option<DType>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            max_batch: 16,
            max_context: 0,
            max_queue: 64,
            prefill_tokens: 256,
            prefill_beside_decode: 64,
            blocks: 0,
            weights: DType::F32,
            cache: None,
        }
    }
}

/// The memory of one rank of a served model, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// Weights, as they are stored.
    pub weights: usize,
    /// Blocks of keys and values.
    pub cache: usize,
    /// Everything else that was planned: the buffers of a step.
    pub buffers: usize,
    /// What kernels keep for the next step; grows up to the largest step.
    pub scratch: usize,
}

/// Buffers of one step, for as many rows as a step can have.
struct Memory<B: Backend> {
    x: B::Buffer,
    normal: B::Buffer,
    branch: B::Buffer,
    /// First queries, keys and values, and what attention makes of them; then both widths of the
    /// feed-forward part: never both.
    wide: B::Buffer,
    stats: B::Buffer,
    logits: Option<B::Buffer>,
}

/// One rank's weights, cache and buffers.
pub struct Model<B: Backend, P: Probe = NoProbe> {
    backend: Arc<B>,
    probe: P,
    config: ModelConfig,
    split: Split,
    groups: Groups,
    device: DeviceGroups<B>,
    limits: Limits,
    weights: Weights<B>,
    cache_format: DType,
    keys: Vec<B::Buffer>,
    values: Vec<B::Buffer>,
    memory: Memory<B>,
    rotary: Option<B::Buffer>,
    rows_max: usize,
    gathered: Vec<f32>,
    logits: Vec<f32>,
    tokens: Vec<u32>,
}

impl<B: Backend> Model<B> {
    /// Allocates one rank's part of a model. Its weights are zeros until [`Model::load`].
    ///
    /// # Errors
    /// [`EngineError`] when the split, the groups or the memory do not fit.
    pub fn new(
        config: &ModelConfig,
        parallelism: Parallelism,
        coords: Coords,
        groups: Groups,
        backend: B,
        options: ModelOptions,
    ) -> Result<Self, EngineError> {
        Self::with_probe(config, parallelism, coords, groups, backend, options, NoProbe)
    }
}

impl<B: Backend, P: Probe> Model<B, P> {
    /// As [`Model::new`], watched by `probe`.
    ///
    /// # Errors
    /// As [`Model::new`].
    pub fn with_probe(
        config: &ModelConfig,
        parallelism: Parallelism,
        coords: Coords,
        groups: Groups,
        backend: B,
        options: ModelOptions,
        probe: P,
    ) -> Result<Self, EngineError> {
        groups.check(parallelism)?;
        let split = Split::new(parallelism, coords);
        let layout = Layout::new(config, split)?;
        let limits = limits(config, options);
        let rows_max = limits.rows_max();
        let dims = Dims::new(config, split, 1, rows_max);
        let b = &backend;
        let cache_format = cache_format(options, b.cache_formats())?;
        let shape = cache_shape(dims, cache_format);
        let cache = |_| b.alloc(limits.blocks * shape.block_elements());
        let keys = (0..layout.layers.len()).map(cache).collect::<Result<_, _>>()?;
        let values = (0..layout.layers.len()).map(cache).collect::<Result<_, _>>()?;
        let logits = match layout.head {
            Some(_) => Some(b.alloc(limits.max_batch * layout.vocab_rows)?),
            None => None,
        };
        let memory = Memory {
            x: b.alloc(rows_max * dims.hidden)?,
            normal: b.alloc(rows_max * dims.hidden)?,
            branch: b.alloc(rows_max * dims.hidden)?,
            wide: b.alloc(
                rows_max * (dims.qkv_width() + dims.attention_width()).max(dims.up + dims.ffn),
            )?,
            stats: b.alloc(2 * rows_max)?,
            logits,
        };
        let rotary = if config.family == Family::Llama {
            let table = rotary_table(config, limits.max_context);
            let mut buffer = b.alloc(table.len())?;
            b.write(&table, b.view_mut(&mut buffer, 0..table.len()));
            Some(buffer)
        } else {
            None
        };
        let weights = Weights::new(b, layout, dims.hidden, options.weights)?;
        // On the host: every row's logits as the sampler takes them, and before that, with several
        // ranks, as they come from these.
        let takes = split.is_last() || split.is_first() && split.tensor_rank == 0;
        let whole = if takes { limits.max_batch * limits.vocab } else { 0 };
        let parts = match &memory.logits {
            Some(own) if parallelism.tensor > 1 => b.elements(own) * parallelism.tensor as usize,
            _ => 0,
        };
        Ok(Self {
            backend: Arc::new(backend),
            probe,
            config: config.clone(),
            split,
            groups,
            device: DeviceGroups::default(),
            limits,
            weights,
            cache_format,
            keys,
            values,
            memory,
            rotary,
            rows_max,
            gathered: Vec::with_capacity(parts),
            logits: Vec::with_capacity(whole),
            tokens: Vec::new(),
        })
    }

    /// Lets values go between devices by the devices' own groups, of the same ranks as those that the
    /// model was made with. All ranks of a group do this, or none.
    pub fn link_devices(&mut self, device: DeviceGroups<B>) {
        self.device = device;
    }

    /// Returns the device.
    #[must_use]
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Returns how keys and values are stored.
    #[must_use]
    pub fn cache_format(&self) -> DType {
        self.cache_format
    }

    /// Returns what a batcher for this model may use: the same on every rank.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Returns whether this rank decides: the first of the world.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.groups.world.rank() == 0
    }

    /// Fills every weight that this rank holds from `source`.
    ///
    /// # Errors
    /// What `source` returns; the model is then half loaded.
    pub fn load<E>(
        &mut self,
        source: impl FnMut(&ShardSpec, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.weights.load(&*self.backend, source)
    }

    /// Returns the memory that this rank takes.
    #[must_use]
    pub fn memory(&self) -> MemoryUse {
        let b = &*self.backend;
        let bytes = |buffer: &B::Buffer| b.elements(buffer) * size_of::<f32>();
        let m = &self.memory;
        let step = [&m.x, &m.normal, &m.branch, &m.wide, &m.stats];
        let device: usize = step.into_iter().chain(&m.logits).chain(&self.rotary).map(bytes).sum();
        let host = (self.gathered.capacity() + self.logits.capacity()) * size_of::<f32>();
        MemoryUse {
            weights: self.weights.bytes(b),
            cache: self.keys.iter().chain(&self.values).map(bytes).sum(),
            buffers: device + host,
            scratch: b.scratch_bytes(),
        }
    }

    /// Runs one step's segments. Every rank passes the same plan; the leader gets the logits after
    /// each sampled segment, `[samples, V]`, the others nothing.
    ///
    /// # Errors
    /// [`EngineError`] when the plan does not fit this model or a peer is lost.
    pub fn run(&mut self, segments: &[Segment]) -> Result<&[f32], EngineError> {
        self.step(segments, None)?;
        Ok(&self.logits)
    }

    /// As [`Model::run`], and lets the device choose the token after each sampled segment where it can
    /// and holds all logits, so that they do not travel. `draws` has one for each.
    ///
    /// # Errors
    /// As [`Model::run`].
    pub fn run_drawn(
        &mut self,
        segments: &[Segment],
        draws: &[Draw],
    ) -> Result<Sampled<'_>, EngineError> {
        if draws.len() != segments.iter().filter(|s| s.sample).count() {
            return Err(EngineError::Plan("it has not one draw for each sampled segment"));
        }
        let is_chosen = self.step(segments, Some(draws))?;
        Ok(if is_chosen { Sampled::Tokens(&self.tokens) } else { Sampled::Logits(&self.logits) })
    }

    /// Runs one step; returns whether tokens were chosen.
    fn step(&mut self, segments: &[Segment], draws: Option<&[Draw]>) -> Result<bool, EngineError> {
        self.check(segments)?;
        let backend = Arc::clone(&self.backend);
        let is_chosen = backend.scope(|| self.forward(segments, draws))?;
        backend.status()?;
        Ok(is_chosen)
    }

    /// Checks that a plan stays inside this model's buffers, cache and vocabulary: it may come
    /// from another process.
    fn check(&self, segments: &[Segment]) -> Result<(), EngineError> {
        let rows: usize = segments.iter().map(|s| s.tokens.len()).sum();
        let samples = segments.iter().filter(|s| s.sample).count();
        if rows > self.rows_max || samples > self.limits.max_batch {
            return Err(EngineError::Plan("it has more rows than a step may have"));
        }
        for s in segments {
            let end = s.position as usize + s.tokens.len();
            if s.tokens.is_empty() || end > self.limits.max_context {
                return Err(EngineError::Plan("a segment is empty or beyond the context"));
            }
            if s.blocks.len() * KV_BLOCK < end
                || s.blocks.iter().any(|b| *b as usize >= self.limits.blocks)
            {
                return Err(EngineError::Plan("a segment's cache blocks do not hold it"));
            }
            if s.tokens.iter().any(|t| *t >= self.config.vocab) {
                return Err(EngineError::Plan("a token is not in the vocabulary"));
            }
        }
        Ok(())
    }

    fn forward(
        &mut self,
        segments: &[Segment],
        draws: Option<&[Draw]>,
    ) -> Result<bool, EngineError> {
        let rows = StepRows::of(segments);
        let n = rows.tokens.len();
        let b = &*self.backend;
        let dims = Dims::new(&self.config, self.split, 1, n);
        let stage = Stage {
            backend: b,
            probe: &self.probe,
            tensor: Route::new(b, &*self.groups.tensor, self.device.tensor.as_ref()),
            dims,
            layout: &self.weights.layout,
            parameters: &self.weights.vectors,
            copy: None,
            rotary: self.rotary.as_ref(),
            positions: &rows.positions,
            recompute: Recompute::None,
            rows: None,
        };
        let cached = cache_shape(dims, self.cache_format);
        let pipeline = Route::new(b, &*self.groups.pipeline, self.device.pipeline.as_ref());
        let (split, m) = (self.split, &mut self.memory);
        let width = n * dims.hidden;
        if !split.is_first() {
            timed(&self.probe, Span::PipelineWait, || {
                pipeline.recv(b.view_mut(&mut m.x, 0..width), split.stage - 1)
            })?;
        }
        let (weights, keys, values) = (&self.weights, &mut self.keys, &mut self.values);
        let pass = |m: &mut Memory<B>| {
            if split.is_first() {
                stage.embed_stored(weights, &rows.tokens, &mut m.x)?;
            }
            for (index, (keys, values)) in keys.iter_mut().zip(values).enumerate() {
                stage.serve_layer(index, weights, &rows, m, (cached, keys, values))?;
            }
            Ok::<_, EngineError>(split.is_last() && stage.project(weights, &rows, m))
        };
        // With peers there are exchanges in between; prompts keep the device busy by themselves.
        let is_alone = self.groups.world.size() == 1;
        let is_small = n <= self.limits.max_batch;
        let is_there = if is_alone && is_small { b.together(|| pass(m)) } else { pass(m) }?;
        self.logits.clear();
        let vocab = self.config.vocab as usize;
        if split.is_last() {
            if let (true, Some(draws), Some(out)) = (is_there && is_alone, draws, &m.logits) {
                let columns = self.weights.layout.vocab_rows;
                let out = b.view(out, 0..draws.len() * columns);
                self.tokens.resize(draws.len(), 0);
                let tokens = &mut self.tokens[..];
                let is_chosen = timed(&self.probe, Span::Other, || {
                    b.sample(columns, vocab, out, draws, tokens)
                });
                if is_chosen {
                    return Ok(true);
                }
            }
            if is_there {
                stage.collect(
                    rows.samples.len(),
                    m,
                    vocab,
                    &mut self.gathered,
                    &mut self.logits,
                )?;
            }
            if split.stages > 1 && split.tensor_rank == 0 {
                timed(&self.probe, Span::PipelineSend, || pipeline.host().send(&self.logits, 0))?;
            }
        } else {
            timed(&self.probe, Span::PipelineSend, || {
                pipeline.send(b.view_mut(&mut m.x, 0..width), split.stage + 1)
            })?;
            if split.is_first() && split.tensor_rank == 0 {
                self.logits.resize(rows.samples.len() * vocab, 0.0);
                let logits = &mut self.logits;
                timed(&self.probe, Span::PipelineWait, || {
                    pipeline.host().recv(logits, split.stages - 1)
                })?;
            }
        }
        Ok(false)
    }
}

fn limits(config: &ModelConfig, options: ModelOptions) -> Limits {
    let context = config.context as usize;
    let max_context = match options.max_context {
        0 => context,
        wanted => wanted.min(context),
    };
    let max_batch = options.max_batch.max(1);
    let blocks = match options.blocks {
        0 => blocks_for(max_batch, max_context),
        wanted => wanted,
    };
    Limits {
        max_batch,
        max_context,
        max_queue: options.max_queue,
        prefill_tokens: options.prefill_tokens.max(1),
        prefill_beside_decode: options.prefill_beside_decode.max(1),
        blocks,
        vocab: config.vocab as usize,
    }
}

/// Chooses how keys and values are stored among what a device can.
fn cache_format(options: ModelOptions, has: &[DType]) -> Result<DType, EngineError> {
    if let Some(wanted) = options.cache {
        if has.contains(&wanted) {
            return Ok(wanted);
        }
        let names: Vec<&str> = has.iter().map(|format| format.as_str()).collect();
        return Err(EngineError::Split {
            field: "spec.kvCache",
            message: format!(
                "this device cannot store keys and values as {}; it can as {}",
                wanted.as_str(),
                names.join(", ")
            ),
        });
    }
    let like = match options.weights {
        DType::I8 => DType::Bf16,
        other => other,
    };
    let first = has.first().copied().unwrap_or(DType::F32);
    Ok(if has.contains(&like) { like } else { first })
}

fn cache_shape(d: Dims, stored: DType) -> CachedAttention {
    CachedAttention { heads: d.heads, kv_heads: d.kv_heads, head_dim: d.head_dim, stored }
}

/// The rows of one step, flattened.
struct StepRows<'a> {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    /// Each row's place in the cache.
    slots: Vec<u32>,
    /// Rows after which logits are wanted.
    samples: Vec<u32>,
    segments: Vec<CachedSegment<'a>>,
}

impl<'a> StepRows<'a> {
    fn of(segments: &'a [Segment]) -> Self {
        let mut rows = Self {
            tokens: Vec::new(),
            positions: Vec::new(),
            slots: Vec::new(),
            samples: Vec::new(),
            segments: Vec::new(),
        };
        for s in segments {
            let position = s.position as usize;
            rows.segments.push(CachedSegment {
                row: rows.tokens.len(),
                rows: s.tokens.len(),
                position,
                blocks: &s.blocks,
            });
            for (i, token) in s.tokens.iter().enumerate() {
                let at = position + i;
                rows.tokens.push(*token);
                rows.positions.push(at as u32);
                rows.slots.push(s.blocks[at / KV_BLOCK] * KV_BLOCK as u32 + (at % KV_BLOCK) as u32);
            }
            if s.sample {
                rows.samples.push(rows.tokens.len() as u32 - 1);
            }
        }
        rows
    }
}

impl<B: Backend, P: Probe> Stage<'_, B, P> {
    /// Looks tokens up, and positions where they are learned, into `x`.
    fn embed_stored(
        &self,
        w: &Weights<B>,
        tokens: &[u32],
        x: &mut B::Buffer,
    ) -> Result<(), EngineError> {
        let (b, d) = (self.backend, self.dims.hidden);
        let Some(table) = &self.layout.embedding else { return Ok(()) };
        let n = tokens.len() * d;
        timed(self.probe, Span::Other, || {
            let to = b.view_mut(x, 0..n);
            b.embed_stored(tokens, self.layout.vocab_offset, w.matrix(table), to);
        });
        self.add_partial(b.view_mut(x, 0..n))?;
        if let Some(table) = &self.layout.positions {
            timed(self.probe, Span::Other, || {
                let table = b.view(self.parameters, table.clone());
                b.embed(d, self.positions, 0, table, b.view_mut(x, 0..n), true);
            });
        }
        Ok(())
    }

    /// Computes the linear layer `at`, as [`Stage::linear`] does.
    fn linear_stored(
        &self,
        w: &Weights<B>,
        at: &LinearAt,
        x: B::View<'_>,
        y: B::ViewMut<'_>,
        with_bias: bool,
    ) {
        let bias = if with_bias { self.bias(at) } else { None };
        timed(self.probe, Span::Matmul, || {
            self.backend.linear_stored(self.dims.rows, x, w.matrix(&at.weight), bias, y);
        });
    }

    /// One layer of a serving step: `m.x` in, `m.x` out.
    fn serve_layer(
        &self,
        index: usize,
        w: &Weights<B>,
        rows: &StepRows<'_>,
        m: &mut Memory<B>,
        (cached, keys, values): (CachedAttention, &mut B::Buffer, &mut B::Buffer),
    ) -> Result<(), EngineError> {
        let (b, d, n) = (self.backend, self.dims, self.dims.rows);
        let at = &self.layout.layers[index];
        let hidden = 0..n * d.hidden;
        let (qkv, attended) = (n * d.qkv_width(), n * d.attention_width());
        let normal = b.view_mut(&mut m.normal, hidden.clone());
        let stats = b.view_mut(&mut m.stats, 0..2 * n);
        self.norm(&at.norm1, n, b.view(&m.x, hidden.clone()), normal, stats);
        let out = b.view_mut(&mut m.wide, 0..qkv);
        self.linear_stored(w, &at.qkv, b.view(&m.normal, hidden.clone()), out, true);
        if let Some(table) = self.rotary {
            timed(self.probe, Span::Other, || {
                let x = b.view_mut(&mut m.wide, 0..qkv);
                b.rotary(d.rotation(n, false), all(b, table), &rows.positions, x);
            });
        }
        timed(self.probe, Span::Attention, || {
            let (x, out) = b.split_mut(b.view_mut(&mut m.wide, 0..qkv + attended), qkv);
            let x = b.as_view(&x);
            b.cache_write(cached, x, &rows.slots, all_mut(b, keys), all_mut(b, values));
            b.cached_attention(cached, &rows.segments, x, all(b, keys), all(b, values), out);
        });
        let branch = b.view_mut(&mut m.branch, hidden.clone());
        let input = b.view(&m.wide, qkv..qkv + attended);
        self.linear_stored(w, &at.project, input, branch, false);
        self.add_partial(b.view_mut(&mut m.branch, hidden.clone()))?;
        self.add_branch(&at.project, m, hidden.clone());
        let normal = b.view_mut(&mut m.normal, hidden.clone());
        let stats = b.view_mut(&mut m.stats, 0..2 * n);
        self.norm(&at.norm2, n, b.view(&m.x, hidden.clone()), normal, stats);
        let (up, act) = (n * d.up, n * d.ffn);
        let out = b.view_mut(&mut m.wide, 0..up);
        self.linear_stored(w, &at.up, b.view(&m.normal, hidden.clone()), out, true);
        {
            let (from, to) = b.split_mut(b.view_mut(&mut m.wide, 0..up + act), up);
            self.activate(b.as_view(&from), to);
        }
        let branch = b.view_mut(&mut m.branch, hidden.clone());
        self.linear_stored(w, &at.down, b.view(&m.wide, up..up + act), branch, false);
        self.add_partial(b.view_mut(&mut m.branch, hidden.clone()))?;
        self.add_branch(&at.down, m, hidden);
        Ok(())
    }

    /// Adds a branch to the residual stream; the sum takes the branch's memory, and the two
    /// buffers change places.
    fn add_branch(&self, from: &LinearAt, m: &mut Memory<B>, range: std::ops::Range<usize>) {
        let b = self.backend;
        timed(self.probe, Span::Other, || {
            let sum = b.view_mut(&mut m.normal, range.clone());
            let (x, branch) = (b.view(&m.x, range.clone()), b.view(&m.branch, range.clone()));
            b.add(x, branch, self.bias(from), sum);
        });
        std::mem::swap(&mut m.x, &mut m.normal);
    }

    /// Normalises the sampled rows and projects them to this rank's part of their logits. Returns whether
    /// there are any.
    fn project(&self, w: &Weights<B>, rows: &StepRows<'_>, m: &mut Memory<B>) -> bool {
        let (b, d, count) = (self.backend, self.dims, rows.samples.len());
        let (Some(norm), Some(head), Some(out)) =
            (&self.layout.final_norm, &self.layout.head, &mut m.logits)
        else {
            return false;
        };
        if count == 0 {
            return false;
        }
        let range = 0..count * d.hidden;
        let picked = b.view_mut(&mut m.branch, range.clone());
        b.gather_rows(d.hidden, &rows.samples, b.view(&m.x, 0..d.rows * d.hidden), picked);
        let normal = b.view_mut(&mut m.normal, range.clone());
        let stats = b.view_mut(&mut m.stats, 0..2 * count);
        self.norm(norm, count, b.view(&m.branch, range.clone()), normal, stats);
        let columns = self.layout.vocab_rows;
        let size = count * columns;
        timed(self.probe, Span::Matmul, || {
            let x = b.view(&m.normal, range);
            b.linear_stored(count, x, w.matrix(head), None, b.view_mut(out, 0..size));
        });
        true
    }

    /// Brings the whole vocabulary's logits of `count` rows to the host.
    fn collect(
        &self,
        count: usize,
        m: &mut Memory<B>,
        vocab: usize,
        gathered: &mut Vec<f32>,
        logits: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        let Some(out) = &mut m.logits else { return Ok(()) };
        let (b, columns) = (self.backend, self.layout.vocab_rows);
        let size = count * columns;
        let ranks = self.tensor.size();
        if ranks == 1 {
            logits.resize(size, 0.0);
            b.read(b.view(out, 0..size), logits);
            return Ok(());
        }
        gathered.resize(size * ranks, 0.0);
        timed(self.probe, Span::TensorComm, || {
            b.on_host(b.view_mut(out, 0..size), |own| self.tensor.host().all_gather(own, gathered))
        })?;
        // Rank by rank, row by row -> row by row, without the padding at the vocabulary's end.
        logits.resize(count * vocab, 0.0);
        for (r, row) in logits.chunks_exact_mut(vocab).enumerate() {
            for (rank, part) in row.chunks_mut(columns).enumerate() {
                let from = (rank * count + r) * columns;
                part.copy_from_slice(&gathered[from..from + part.len()]);
            }
        }
        Ok(())
    }
}

/// The first rank of a served model: it decides every step.
pub struct Leader<B: Backend, P: Probe = NoProbe> {
    model: Model<B, P>,
    batcher: Batcher,
}

impl<B: Backend, P: Probe> Leader<B, P> {
    /// Joins a model, on rank 0, to a batcher.
    #[must_use]
    pub fn new(model: Model<B, P>) -> Self {
        let batcher = Batcher::new(model.limits());
        Self { model, batcher }
    }

    /// Accepts a request, or says why not.
    ///
    /// # Errors
    /// [`Admission`].
    pub fn submit(&mut self, request: Request) -> Result<RequestId, Admission> {
        self.batcher.submit(request)
    }

    /// Forgets a request. Returns whether there was one.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        self.batcher.cancel(id)
    }

    /// Returns how busy it is.
    #[must_use]
    pub fn load(&self) -> Load {
        self.batcher.load()
    }

    /// Returns the memory that this rank takes.
    #[must_use]
    pub fn memory(&self) -> MemoryUse {
        self.model.memory()
    }

    /// Returns what the batcher may use.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.batcher.limits()
    }

    /// Returns whether nothing runs or waits: a step would be an idle one.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.batcher.is_idle()
    }

    /// Runs one step on all ranks: an idle one when there is nothing to do, which still proves
    /// that every rank answers.
    ///
    /// # Errors
    /// [`EngineError`] when a peer is lost.
    pub fn step(&mut self) -> Result<StepOutput, EngineError> {
        let plan = self.batcher.plan();
        self.model.announce(&plan)?;
        match &plan {
            StepPlan::Run(segments) => {
                let sampled = match self.batcher.draws() {
                    Some(draws) => self.model.run_drawn(segments, &draws)?,
                    None => Sampled::Logits(self.model.run(segments)?),
                };
                Ok(self.batcher.commit(sampled))
            }
            StepPlan::Idle | StepPlan::Stop => {
                self.model.groups.world.barrier()?;
                Ok(StepOutput::default())
            }
        }
    }

    /// Ends the followers.
    ///
    /// # Errors
    /// [`EngineError`] when a peer is lost.
    pub fn stop(&mut self) -> Result<(), EngineError> {
        self.model.announce(&StepPlan::Stop)
    }
}

impl<B: Backend, P: Probe> Model<B, P> {
    fn announce(&self, plan: &StepPlan) -> Result<(), EngineError> {
        if self.groups.world.size() > 1 {
            self.groups.world.broadcast_bytes(&mut plan.encode(), 0)?;
        }
        Ok(())
    }
}

/// Any other rank of a served model: it does as the leader says.
pub struct Follower<B: Backend, P: Probe = NoProbe> {
    model: Model<B, P>,
}

impl<B: Backend, P: Probe> Follower<B, P> {
    /// Makes a follower of a model, on a rank other than 0.
    #[must_use]
    pub fn new(model: Model<B, P>) -> Self {
        Self { model }
    }

    /// Waits for the next step and runs it. Returns false when the leader has ended.
    ///
    /// # Errors
    /// [`EngineError`] when a peer is lost or the plan is malformed.
    pub fn step(&mut self) -> Result<bool, EngineError> {
        let mut bytes = Vec::new();
        self.model.groups.world.broadcast_bytes(&mut bytes, 0)?;
        match StepPlan::decode(&bytes)? {
            StepPlan::Stop => return Ok(false),
            StepPlan::Idle => self.model.groups.world.barrier()?,
            StepPlan::Run(segments) => {
                self.model.run(&segments)?;
            }
        }
        Ok(true)
    }
}
