//! Which parameters a rank holds, under which names, and where in its flat buffers.
//!
//! Global tensors have the names and orientations of the Hugging Face layout. Locally, matrices
//! that are multiplied together lie together: queries, keys and values; gate and up. Parameters
//! with weight decay come first, so that the optimizer sees two ranges.

use std::ops::Range;

use drumline_mesh::{Coords, ShardSpec};
use drumline_spec::{Family, ModelConfig, Parallelism, TrainingJob};
use drumline_tensor::WeightLayout;

use crate::error::EngineError;
use crate::init::{self, Init};

/// A rank's place in the split, as numbers to compute with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// Ranks of the tensor group, and this rank's place.
    pub tensor: usize,
    /// Place in the tensor group.
    pub tensor_rank: usize,
    /// Stages of the pipeline.
    pub stages: usize,
    /// This rank's stage.
    pub stage: usize,
    /// Copies of the model.
    pub copies: usize,
    /// This rank's copy.
    pub copy: usize,
    /// Parts of the layers that each stage holds: virtual stages, round the stages in turn.
    pub chunks: usize,
    /// Whether each copy keeps the optimizer of its share of the parameters.
    pub shards_optimizer: bool,
    /// Whether the tensor group shares the rows between the matrix products.
    pub shares_rows: bool,
}

impl Split {
    /// Returns the place of the rank at `at` in a training run.
    #[must_use]
    pub fn of(job: &TrainingJob, at: Coords) -> Self {
        let split = Self::new(job.parallelism, at);
        Self {
            chunks: job.virtual_stages.max(1) as usize,
            shards_optimizer: job.memory.shard_optimizer && split.copies > 1,
            shares_rows: job.memory.sequence_parallel && split.tensor > 1,
            ..split
        }
    }

    /// Joins a split and a rank's coordinates in it.
    #[must_use]
    pub fn new(shape: Parallelism, at: Coords) -> Self {
        Self {
            tensor: shape.tensor as usize,
            tensor_rank: at.tensor as usize,
            stages: shape.pipeline as usize,
            stage: at.pipeline as usize,
            copies: shape.data as usize,
            copy: at.data as usize,
            chunks: 1,
            shards_optimizer: false,
            shares_rows: false,
        }
    }

    /// Returns whether this is the stage with the embedding.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.stage == 0
    }

    /// Returns whether this is the stage with the loss.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.stage + 1 == self.stages
    }
}

/// A part of a global tensor in this rank's flat buffers: `rows` runs of `columns` elements,
/// `stride` apart.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// Which part of which tensor.
    pub shard: ShardSpec,
    /// Where it begins.
    pub start: usize,
    /// Number of runs.
    pub rows: usize,
    /// Elements of a run.
    pub columns: usize,
    /// From one run to the next.
    pub stride: usize,
    /// How it starts.
    pub init: Init,
    /// Whether this rank speaks for its tensor group, where all ranks of it hold the same.
    pub answers: bool,
    /// Whether this rank writes it to checkpoints: exactly one rank of a tensor's holders does.
    pub owner: bool,
}

impl Parameter {
    /// Returns the parts that lie in `range` of the flat buffer, at most three rectangles, as they
    /// lie in a buffer of that range alone.
    #[must_use]
    pub fn within(&self, range: &Range<usize>) -> Vec<Self> {
        let total = self.rows * self.columns;
        // The elements of this parameter, row-major, before a place of the buffer.
        let before = |place: usize| {
            let past = place.saturating_sub(self.start);
            (past / self.stride * self.columns + (past % self.stride).min(self.columns)).min(total)
        };
        let place = |element: usize| (element / self.columns, element % self.columns);
        let ((mut row, from), (last, to)) = (place(before(range.start)), place(before(range.end)));
        let mut parts = Vec::new();
        let mut part = |rows: Range<usize>, columns: Range<usize>| {
            if rows.is_empty() || columns.is_empty() {
                return;
            }
            let mut shard = self.shard.clone();
            let (offset, shape) = (&mut shard.offset, &mut shard.shape);
            match (offset.as_mut_slice(), shape.as_mut_slice()) {
                ([row, column], [height, width]) => {
                    (*row, *column) = (*row + rows.start, *column + columns.start);
                    (*height, *width) = (rows.len(), columns.len());
                }
                ([column], [width]) => {
                    (*column, *width) = (*column + columns.start, columns.len());
                }
                _ => unreachable!("parameters are matrices and vectors"),
            }
            parts.push(Self {
                shard,
                start: self.start + rows.start * self.stride + columns.start - range.start,
                rows: rows.len(),
                columns: columns.len(),
                ..self.clone()
            });
        };
        if row == last {
            part(row..row + 1, from..to);
            return parts;
        }
        if from > 0 {
            part(row..row + 1, from..self.columns);
            row += 1;
        }
        part(row..last, 0..self.columns);
        part(last..last + 1, 0..to);
        parts
    }
}

/// Gain and bias of a normalisation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NormAt {
    /// The gain, `[D]`.
    pub gain: Range<usize>,
    /// The bias, `[D]`.
    pub bias: Option<Range<usize>>,
}

/// A matrix and its bias.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearAt {
    /// The matrix.
    pub weight: Range<usize>,
    /// The bias: one row of outputs.
    pub bias: Option<Range<usize>>,
}

impl LayerAt {
    /// Returns where gains and biases of the norms lie.
    pub(crate) fn norms(&self) -> impl Iterator<Item = &NormAt> {
        [&self.norm1, &self.norm2].into_iter()
    }

    /// Returns where the matrices lie, one after the other.
    pub(crate) fn matrices(&self) -> Range<usize> {
        self.qkv.weight.start..self.down.weight.end
    }
}

/// One decoder layer's parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerAt {
    /// Before attention.
    pub norm1: NormAt,
    /// Queries, keys and values, column-parallel: `D -> (H + 2 K) E / t`.
    pub qkv: LinearAt,
    /// Attention's output, row-parallel: `H E / t -> D`.
    pub project: LinearAt,
    /// Before the feed-forward network.
    pub norm2: NormAt,
    /// Gate and up (or up alone), column-parallel: `D -> 2 F / t`.
    pub up: LinearAt,
    /// Down, row-parallel: `F / t -> D`.
    pub down: LinearAt,
}

/// All that one rank holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// The parts of global tensors, in the order of the buffers.
    pub parameters: Vec<Parameter>,
    /// Elements of a flat buffer.
    pub elements: usize,
    /// The first so many have weight decay.
    pub decayed: usize,
    /// Ranges whose gradients count towards the global norm: together, the ranks of one copy
    /// count each parameter once.
    pub counted: Vec<Range<usize>>,
    /// The token embedding, `[V / t, D]`, on the first stage.
    pub embedding: Option<Range<usize>>,
    /// The position embedding, `[T, D]`, on the first stage of families that learn it.
    pub positions: Option<Range<usize>>,
    /// The layers of this stage, chunk after chunk.
    pub layers: Vec<LayerAt>,
    /// The norm before the output projection, on the last stage.
    pub final_norm: Option<NormAt>,
    /// The output projection, `[V / t, D]`, on the last stage. Tied and on the same stage, it is
    /// the embedding's range.
    pub head: Option<Range<usize>>,
    /// The range of a tied matrix that another stage holds too: gradients must be added.
    pub shared: Option<Range<usize>>,
    /// How matrices lie in memory.
    pub orientation: WeightLayout,
    /// Tokens of the padded vocabulary that each rank of the tensor group holds.
    pub vocab_rows: usize,
    /// How many of them stand for tokens on this rank.
    pub vocab_used: usize,
    /// The first token of this rank.
    pub vocab_offset: usize,
}

impl NormAt {
    /// Returns where gain and bias lie: they are neighbours.
    pub(crate) fn range(&self) -> Range<usize> {
        self.gain.start..self.bias.as_ref().unwrap_or(&self.gain).end
    }
}

impl Layout {
    /// Returns every norm of this stage.
    pub(crate) fn norms(&self) -> impl Iterator<Item = &NormAt> {
        self.layers.iter().flat_map(LayerAt::norms).chain(&self.final_norm)
    }

    /// Lays out the parameters of one rank.
    ///
    /// # Errors
    /// [`EngineError::Split`] when the model cannot be split so.
    pub fn new(model: &ModelConfig, split: Split) -> Result<Self, EngineError> {
        let (tensor, pipeline) = (split.tensor as u32, (split.stages * split.chunks) as u32);
        if let Some(error) = model.check(tensor, pipeline).into_iter().next() {
            return Err(EngineError::Split { field: error.field, message: error.message });
        }
        let decayed = Builder::build(model, split, 0).decayed;
        Ok(Builder::build(model, split, decayed))
    }
}

/// A part of a matrix along one dimension: where it begins globally and locally, and its extent.
struct Piece {
    global: usize,
    local: usize,
    extent: usize,
}

/// Elements of a cache line: where each tensor begins.
pub(crate) const ALIGN: usize = 16;

struct Builder {
    split: Split,
    parameters: Vec<Parameter>,
    counted: Vec<Range<usize>>,
    decayed: usize,
    plain: usize,
}

impl Builder {
    fn build(model: &ModelConfig, split: Split, decayed: usize) -> Layout {
        let mut b =
            Self { split, parameters: Vec::new(), counted: Vec::new(), decayed: 0, plain: decayed };
        let names = Names::of(model.family);
        let d = model.hidden as usize;
        let vocab = model.vocab as usize;
        let vocab_rows = vocab.div_ceil(split.tensor);
        let vocab_offset = (vocab_rows * split.tensor_rank).min(vocab);
        let vocab_used = vocab_rows.min(vocab - vocab_offset);
        let shared_table = model.tie_embeddings && split.stages > 1;
        let table = |b: &mut Self, name: &str, counted: bool| {
            let range = b.reserve(vocab_rows * d, true);
            if vocab_used > 0 {
                let shard = ShardSpec {
                    name: name.to_owned(),
                    global_shape: vec![vocab, d],
                    offset: vec![vocab_offset, 0],
                    shape: vec![vocab_used, d],
                };
                b.push(shard, range.start, d, init::matrix(), counted);
            }
            if counted {
                b.counted.push(range.clone());
            }
            range
        };
        let embedding = split.is_first().then(|| table(&mut b, names.embedding, true));
        let head = split.is_last().then(|| match &embedding {
            Some(embedding) if model.tie_embeddings => embedding.clone(),
            _ if model.tie_embeddings => table(&mut b, names.embedding, false),
            _ => table(&mut b, "lm_head.weight", true),
        });
        let positions = (split.is_first() && model.family == Family::Gpt2).then(|| {
            let range = b.reserve(model.context as usize * d, false);
            let shard = whole("transformer.wpe.weight", &[model.context as usize, d]);
            b.replicated(shard, range.start, d, init::matrix(), range.len());
            range
        });
        let each = model.layers as usize / (split.stages * split.chunks);
        let layers = (0..split.chunks)
            .map(|chunk| each * (chunk * split.stages + split.stage))
            .flat_map(|first| first..first + each)
            .map(|layer| b.layer(model, &names, layer))
            .collect();
        let final_norm = split.is_last().then(|| b.norm(model, names.final_norm));
        let shared = match (shared_table, &embedding, &head) {
            (true, Some(range), None) | (true, None, Some(range)) => Some(range.clone()),
            _ => None,
        };
        let mut counted = b.counted;
        counted.sort_by_key(|r| r.start);
        Layout {
            parameters: b.parameters,
            elements: b.plain,
            decayed: b.decayed,
            counted: merge(counted),
            embedding,
            positions,
            layers,
            final_norm,
            head,
            shared,
            orientation: names.orientation,
            vocab_rows,
            vocab_used,
            vocab_offset,
        }
    }

    fn layer(&mut self, model: &ModelConfig, names: &Names, layer: usize) -> LayerAt {
        let split = self.split;
        let (t, r) = (split.tensor, split.tensor_rank);
        let (d, f, e) = (model.hidden as usize, model.ffn as usize, model.head_dim() as usize);
        let (q, kv) = (model.heads as usize * e, model.kv_heads as usize * e);
        let prefix = format!("{}.{layer}", names.layers);
        let named = |part: &str| format!("{prefix}.{part}");
        let part = |extent: usize, global: usize, local: usize| Piece {
            global: global + extent / t * r,
            local,
            extent: extent / t,
        };
        let residual = init::residual(model);
        let norm1 = self.norm(model, &named(names.norm1));
        let (norm2, qkv, project, up, down);
        match model.family {
            Family::Gpt2 => {
                // One tensor of three parts; each rank holds a part of each.
                let total = q + 2 * kv;
                let pieces = if t == 1 {
                    vec![Piece { global: 0, local: 0, extent: total }]
                } else {
                    vec![part(q, 0, 0), part(kv, q, q / t), part(kv, q + kv, (q + kv) / t)]
                };
                qkv = self.columns(&named("attn.c_attn"), d, total, &pieces);
                project = self.rows(&named("attn.c_proj"), q, d, residual);
                norm2 = self.norm(model, &named(names.norm2));
                up = self.columns(&named("mlp.c_fc"), d, f, &[part(f, 0, 0)]);
                down = self.rows(&named("mlp.c_proj"), f, d, residual);
            }
            Family::Llama => {
                qkv = self.stacked(
                    d,
                    &[
                        (named("self_attn.q_proj.weight"), q),
                        (named("self_attn.k_proj.weight"), kv),
                        (named("self_attn.v_proj.weight"), kv),
                    ],
                );
                project = self.narrow(&named("self_attn.o_proj.weight"), d, q, residual);
                norm2 = self.norm(model, &named(names.norm2));
                up = self.stacked(
                    d,
                    &[(named("mlp.gate_proj.weight"), f), (named("mlp.up_proj.weight"), f)],
                );
                down = self.narrow(&named("mlp.down_proj.weight"), d, f, residual);
            }
        }
        LayerAt { norm1, qkv, project, norm2, up, down }
    }

    /// LLaMA, column-parallel: `[output, input]` matrices one below the other, each rank with a
    /// band of rows of each.
    fn stacked(&mut self, input: usize, matrices: &[(String, usize)]) -> LinearAt {
        let (t, r) = (self.split.tensor, self.split.tensor_rank);
        let rows: usize = matrices.iter().map(|(_, rows)| rows / t).sum();
        let range = self.reserve(rows * input, true);
        let mut start = range.start;
        for (name, rows) in matrices {
            let shard = ShardSpec {
                name: name.clone(),
                global_shape: vec![*rows, input],
                offset: vec![rows / t * r, 0],
                shape: vec![rows / t, input],
            };
            self.push(shard, start, input, init::matrix(), true);
            start += rows / t * input;
        }
        self.counted.push(range.clone());
        LinearAt { weight: range, bias: None }
    }

    /// LLaMA, row-parallel: `[output, input]`, each rank with a band of columns.
    fn narrow(&mut self, name: &str, output: usize, input: usize, init: Init) -> LinearAt {
        let (t, r) = (self.split.tensor, self.split.tensor_rank);
        let columns = input / t;
        let range = self.reserve(output * columns, true);
        let shard = ShardSpec {
            name: name.to_owned(),
            global_shape: vec![output, input],
            offset: vec![0, columns * r],
            shape: vec![output, columns],
        };
        self.push(shard, range.start, columns, init, true);
        self.counted.push(range.clone());
        LinearAt { weight: range, bias: None }
    }

    /// GPT-2, column-parallel: `[input, output]`, each rank with bands of columns; the bias alike.
    fn columns(&mut self, name: &str, input: usize, output: usize, pieces: &[Piece]) -> LinearAt {
        let local: usize = pieces.iter().map(|p| p.extent).sum();
        let weight = self.reserve(input * local, true);
        let bias = self.reserve(local, false);
        for piece in pieces {
            let shard = ShardSpec {
                name: format!("{name}.weight"),
                global_shape: vec![input, output],
                offset: vec![0, piece.global],
                shape: vec![input, piece.extent],
            };
            self.push(shard, weight.start + piece.local, local, init::matrix(), true);
            let shard = ShardSpec {
                name: format!("{name}.bias"),
                global_shape: vec![output],
                offset: vec![piece.global],
                shape: vec![piece.extent],
            };
            self.push(shard, bias.start + piece.local, piece.extent, Init::Zero, true);
        }
        self.counted.push(weight.clone());
        self.counted.push(bias.clone());
        LinearAt { weight, bias: Some(bias) }
    }

    /// GPT-2, row-parallel: `[input, output]`, each rank with a band of rows and the whole bias.
    fn rows(&mut self, name: &str, input: usize, output: usize, init: Init) -> LinearAt {
        let (t, r) = (self.split.tensor, self.split.tensor_rank);
        let rows = input / t;
        let weight = self.reserve(rows * output, true);
        let shard = ShardSpec {
            name: format!("{name}.weight"),
            global_shape: vec![input, output],
            offset: vec![rows * r, 0],
            shape: vec![rows, output],
        };
        self.push(shard, weight.start, output, init, true);
        self.counted.push(weight.clone());
        let bias = self.reserve(output, false);
        let shard = whole(&format!("{name}.bias"), &[output]);
        self.replicated(shard, bias.start, output, Init::Zero, output);
        LinearAt { weight, bias: Some(bias) }
    }

    fn norm(&mut self, model: &ModelConfig, name: &str) -> NormAt {
        let d = model.hidden as usize;
        let gain = self.reserve(d, false);
        self.replicated(whole(&format!("{name}.weight"), &[d]), gain.start, d, Init::One, d);
        let bias = model.has_bias().then(|| {
            let bias = self.reserve(d, false);
            self.replicated(whole(&format!("{name}.bias"), &[d]), bias.start, d, Init::Zero, d);
            bias
        });
        NormAt { gain, bias }
    }

    /// A tensor that every rank of the tensor group holds whole; the first one answers for it.
    fn replicated(
        &mut self,
        shard: ShardSpec,
        start: usize,
        stride: usize,
        init: Init,
        elements: usize,
    ) {
        let answers = self.split.tensor_rank == 0;
        self.push(shard, start, stride, init, answers);
        if answers {
            self.counted.push(start..start + elements);
        }
    }

    fn push(&mut self, shard: ShardSpec, start: usize, stride: usize, init: Init, answers: bool) {
        let (rows, columns) = match shard.shape.as_slice() {
            [rows, columns] => (*rows, *columns),
            [columns] => (1, *columns),
            _ => unreachable!("parameters are matrices and vectors"),
        };
        let owner = answers && self.split.copy == 0;
        let place = Parameter { shard, start, rows, columns, stride, init, answers, owner };
        self.parameters.push(place);
    }

    fn reserve(&mut self, elements: usize, decay: bool) -> Range<usize> {
        let cursor = if decay { &mut self.decayed } else { &mut self.plain };
        let start = *cursor;
        *cursor = (start + elements).next_multiple_of(ALIGN);
        start..start + elements
    }
}

fn whole(name: &str, shape: &[usize]) -> ShardSpec {
    ShardSpec {
        name: name.to_owned(),
        global_shape: shape.to_vec(),
        offset: vec![0; shape.len()],
        shape: shape.to_vec(),
    }
}

/// Joins ranges that are neighbours but for the padding between them.
fn merge(ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    let mut merged: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end.next_multiple_of(ALIGN) => last.end = range.end,
            _ => merged.push(range),
        }
    }
    merged
}

/// What the families call their tensors.
struct Names {
    embedding: &'static str,
    layers: &'static str,
    norm1: &'static str,
    norm2: &'static str,
    final_norm: &'static str,
    orientation: WeightLayout,
}

impl Names {
    fn of(family: Family) -> Self {
        match family {
            Family::Gpt2 => Self {
                embedding: "transformer.wte.weight",
                layers: "transformer.h",
                norm1: "ln_1",
                norm2: "ln_2",
                final_norm: "transformer.ln_f",
                orientation: WeightLayout::InOut,
            },
            Family::Llama => Self {
                embedding: "model.embed_tokens.weight",
                layers: "model.layers",
                norm1: "input_layernorm",
                norm2: "post_attention_layernorm",
                final_norm: "model.norm",
                orientation: WeightLayout::OutIn,
            },
        }
    }
}
