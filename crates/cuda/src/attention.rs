//! Attention: over whole sequences, forward and backward, and to the paged cache.

use std::ffi::CStr;

use drumline_tensor::{Attention, CachedAttention, CachedSegment, DType, KV_BLOCK};

use crate::backend::{Cuda, aligned, grid};
use crate::device::Shape;
use crate::error::CudaError;
use crate::matmul::Factors;
use crate::memory::{Kind, View, ViewMut, narrow};

/// Threads of a block.
const THREADS: u32 = 128;
/// Tokens of the cache that a block of `kernels/cached.cu` looks at, and heads that share a pass.
const SPAN: usize = 256;
const GROUP: usize = 8;
// A span is a whole number of cache blocks of the kernels' size.
const _: () = assert!(SPAN.is_multiple_of(KV_BLOCK) && KV_BLOCK == 16);

/// The kernels for one width of heads.
struct Kernels {
    source: &'static str,
    forward: &'static CStr,
    /// Gradients of keys and values.
    keys: &'static CStr,
    /// Gradients of queries.
    queries: &'static CStr,
    /// Queries, or keys, of a block.
    tile: usize,
    /// Bytes of shared memory, forward and backward.
    shared: [u32; 2],
}

macro_rules! kernels {
    ($source:literal, $stem:literal, $suffix:literal, $tile:expr, $shared:expr) => {{
        const NAMES: [&CStr; 3] = [
            as_c(concat!($stem, $suffix, "\0")),
            as_c(concat!($stem, "_keys", $suffix, "\0")),
            as_c(concat!($stem, "_queries", $suffix, "\0")),
        ];
        let [forward, keys, queries] = NAMES;
        Kernels { source: $source, forward, keys, queries, tile: $tile, shared: $shared }
    }};
}

const fn as_c(text: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(name) => name,
        Err(_) => panic!("a kernel's name ends with its only zero"),
    }
}

/// Chooses kernels: the tensor cores' where products round to bf16 and the heads are as wide as these
/// take, else the exact ones.
///
/// The exact ones look at how values are kept when they run; of the others there are two.
fn kernels(factors: Factors, kind: Kind, head_dim: usize) -> Result<Kernels, CudaError> {
    // `kernels/attention.cu`: tiles of 32 rows of E + 1, squares of scores of 32 x 33.
    let exact = |tiles: usize, squares: usize| {
        ((tiles * 32 * (head_dim + 1) + squares * 32 * 33) * size_of::<f32>()) as u32
    };
    let exact = [exact(3, 1), exact(4, 2)];
    // `kernels/attention_bf16.cu`: rows of E + 8, and 64 floats of the queries' own.
    let rounded = |rows: usize| (rows * (head_dim + 8) * 2 + 64 * size_of::<f32>()) as u32;
    let rounded = [rounded(3 * 64), rounded(2 * 64 + 2 * 32)];
    Ok(match (factors, kind, head_dim) {
        (Factors::Bf16, Kind::Wide, 64) => {
            kernels!("attention_bf16.cu", "attention_bf16", "_64", 64, rounded)
        }
        (Factors::Bf16, Kind::Wide, 128) => {
            kernels!("attention_bf16.cu", "attention_bf16", "_128", 64, rounded)
        }
        (Factors::Bf16, Kind::Narrow, 64) => {
            kernels!("attention_bf16.cu", "attention_narrow", "_64", 64, rounded)
        }
        (Factors::Bf16, Kind::Narrow, 128) => {
            kernels!("attention_bf16.cu", "attention_narrow", "_128", 64, rounded)
        }
        (_, _, 1..=32) => kernels!("attention.cu", "attention", "_8", 32, exact),
        (_, _, 33..=64) => kernels!("attention.cu", "attention", "_16", 32, exact),
        (_, _, 65..=128) => kernels!("attention.cu", "attention", "_32", 32, exact),
        (_, _, 129..=256) => kernels!("attention.cu", "attention", "_64", 32, exact),
        _ => {
            let text = format!("heads are {head_dim} wide, 256 is the most");
            return Err(CudaError::Unsupported(text));
        }
    })
}

/// How all of attention's operands are kept; those of bf16 where eight can be read at a time.
fn one_kind<const N: usize>(views: [View<'_>; N]) -> Result<Kind, CudaError> {
    let kind = views[0].kind;
    assert!(views.iter().all(|view| view.kind == kind), "attention's operands are of one kind");
    if kind == Kind::Narrow && !aligned(views.map(|view| view.address)) {
        let text = "attention to bf16 that is not aligned to 16 bytes".to_owned();
        return Err(CudaError::Unsupported(text));
    }
    Ok(kind)
}

impl Cuda {
    pub(crate) fn attend(
        &self,
        s: Attention,
        qkv: View<'_>,
        out: &ViewMut<'_>,
        lse: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        let rows = s.batch * s.sequence;
        assert!(qkv.elements == rows * s.qkv_width(), "attention");
        assert!(out.elements == rows * s.heads * s.head_dim, "attention");
        assert!(lse.elements == rows * s.heads, "attention");
        let kind = one_kind([qkv, out.as_view()])?;
        let kernels = kernels(self.factors, kind, s.head_dim)?;
        let tiles = s.sequence.div_ceil(kernels.tile);
        self.device
            .launch(kernels.source, kernels.forward)
            .pointer(qkv.address)
            .pointer(out.address)
            .pointer(lse.wide("log-sums"))
            .u32(s.sequence)
            .u32(s.heads)
            .u32(s.kv_heads)
            .u32(s.head_dim)
            .f32(s.scale())
            .u32(narrow([kind]))
            .go(Shape {
                grid: (grid(tiles), grid(s.heads), grid(s.batch)),
                threads: THREADS,
                shared: kernels.shared[0],
            })
    }

    pub(crate) fn attend_back(
        &self,
        s: Attention,
        qkv: View<'_>,
        out: View<'_>,
        lse: View<'_>,
        dout: View<'_>,
        dqkv: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        let rows = s.batch * s.sequence;
        assert!(qkv.elements == rows * s.qkv_width() && dqkv.elements == qkv.elements, "attention");
        assert!(out.elements == rows * s.heads * s.head_dim, "attention");
        assert!(dout.elements == out.elements && lse.elements == rows * s.heads, "attention");
        let kind = one_kind([qkv, out, dout, dqkv.as_view()])?;
        let kernels = kernels(self.factors, kind, s.head_dim)?;
        let [delta] = self.temporary([lse.elements * size_of::<f32>()])?;
        self.device
            .launch("attention.cu", c"attention_delta")
            .pointer(out.address)
            .pointer(dout.address)
            .pointer(delta)
            .u64(rows * s.heads)
            .u32(s.sequence)
            .u32(s.heads)
            .u32(s.head_dim)
            .u32(narrow([kind]))
            .go(Shape {
                grid: (grid((rows * s.heads).div_ceil(THREADS as usize / 32)), 1, 1),
                threads: THREADS,
                shared: 0,
            })?;
        for (kernel, heads) in [(kernels.keys, s.kv_heads), (kernels.queries, s.heads)] {
            self.device
                .launch(kernels.source, kernel)
                .pointer(qkv.address)
                .pointer(dout.address)
                .pointer(lse.wide("log-sums"))
                .pointer(delta)
                .pointer(dqkv.address)
                .u32(s.sequence)
                .u32(s.heads)
                .u32(s.kv_heads)
                .u32(s.head_dim)
                .f32(s.scale())
                .u32(narrow([kind]))
                .go(Shape {
                    grid: (grid(s.sequence.div_ceil(kernels.tile)), grid(heads), grid(s.batch)),
                    threads: THREADS,
                    shared: kernels.shared[1],
                })?;
        }
        Ok(())
    }

    pub(crate) fn store(
        &self,
        s: CachedAttention,
        qkv: View<'_>,
        slots: &[u32],
        keys: &ViewMut<'_>,
        values: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        let width = (s.heads + 2 * s.kv_heads) * s.head_dim;
        assert_eq!(qkv.elements, slots.len() * width, "cache write");
        let blocks = keys.elements / s.block_elements().max(1);
        assert!(keys.elements == values.elements, "cache write");
        assert!(slots.iter().all(|slot| (*slot as usize) < blocks * KV_BLOCK), "cache write");
        let sent = self.send(slots)?;
        let kernel = match s.stored {
            DType::Bf16 => c"cache_write_bf16",
            DType::F16 => c"cache_write_f16",
            DType::F32 | DType::I8 => c"cache_write_f32",
        };
        self.device
            .launch("cached.cu", kernel)
            .pointer(qkv.wide("what the cache takes"))
            .pointer(sent)
            .pointer(keys.wide("the cache"))
            .pointer(values.wide("the cache"))
            .u32(s.heads)
            .u32(s.kv_heads)
            .u32(s.head_dim)
            .go(Shape { grid: (grid(slots.len()), 1, 1), threads: 128, shared: 0 })
    }

    pub(crate) fn attend_cached(
        &self,
        s: CachedAttention,
        segments: &[CachedSegment<'_>],
        qkv: View<'_>,
        keys: View<'_>,
        values: View<'_>,
        out: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        let rows = qkv.elements / ((s.heads + 2 * s.kv_heads) * s.head_dim);
        assert!(out.elements == rows * s.heads * s.head_dim, "cached attention");
        let held = keys.elements / s.block_elements().max(1);
        assert!(keys.elements == values.elements, "cached attention");
        // For each row: the tokens that it sees, and where its blocks are listed; then the lists.
        let mut table = vec![0u32; 2 * rows];
        for g in segments {
            let start = table.len() - 2 * rows;
            let used = (g.position + g.rows).div_ceil(KV_BLOCK);
            let blocks = &g.blocks[..used];
            assert!(blocks.iter().all(|b| (*b as usize) < held), "cached attention");
            table.extend_from_slice(blocks);
            for row in 0..g.rows {
                table[g.row + row] = (g.position + row + 1) as u32;
                table[rows + g.row + row] = start as u32;
            }
        }
        let most = table[..rows].iter().copied().max().unwrap_or(0) as usize;
        let spans = most.div_ceil(SPAN);
        let sent = self.send(&table)?;
        let at = |index: usize| sent + (index * size_of::<u32>()) as u64;
        let partial = match spans {
            0 | 1 => 0,
            _ => {
                let each = spans * (s.head_dim + 2) * size_of::<f32>();
                self.temporary([rows * s.heads * each])?[0]
            }
        };
        let kernel = match s.stored {
            DType::Bf16 => c"cached_attention_bf16",
            DType::F16 => c"cached_attention_f16",
            DType::F32 | DType::I8 => c"cached_attention_f32",
        };
        self.device
            .launch("cached.cu", kernel)
            .pointer(qkv.wide("queries of the cache"))
            .pointer(keys.wide("the cache"))
            .pointer(values.wide("the cache"))
            .pointer(sent)
            .pointer(at(rows))
            .pointer(at(2 * rows))
            .pointer(out.wide("attention to the cache"))
            .pointer(partial)
            .u32(s.heads)
            .u32(s.kv_heads)
            .u32(s.head_dim)
            .f32(1.0 / (s.head_dim as f32).sqrt())
            .go(Shape {
                grid: (grid(rows), grid(s.kv_heads), grid(spans)),
                threads: 128,
                shared: ((GROUP * (s.head_dim + SPAN) + 32) * size_of::<f32>()) as u32,
            })?;
        if spans <= 1 {
            return Ok(());
        }
        self.device
            .launch("cached.cu", c"cached_attention_join")
            .pointer(partial)
            .pointer(sent)
            .pointer(out.wide("attention to the cache"))
            .u32(spans)
            .u32(s.head_dim)
            .go(Shape { grid: (grid(rows), grid(s.heads), 1), threads: 128, shared: 0 })
    }
}
