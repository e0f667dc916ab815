//! Linear layers: products of buffers of f32 or bf16, and of stored matrices.

use drumline_tensor::{DType, Linear, WeightLayout};

use crate::backend::{Cuda, aligned, grid, locked};
use crate::device::Shape;
use crate::error::CudaError;
use crate::matmul::{Activation, Factor, Factors, Product};
use crate::matrix::Matrix;
use crate::memory::{Kind, View, ViewMut};

/// Up to this many rows a stored matrix is multiplied by the kernel that reads each weight once for
/// eight rows; more are worth a product of cuBLASLt.
const FEW_ROWS: usize = 16;
/// Outputs of one block of that kernel: 4 for each of 4 warps.
const STORED_OUTPUTS: usize = 16;

/// A row-major matrix.
#[derive(Clone, Copy)]
struct Rows {
    address: u64,
    kind: Kind,
    rows: usize,
    columns: usize,
    /// Whether cuBLASLt, which sees the transpose, is to transpose it.
    transposed: bool,
}

/// The extents of the product that cuBLASLt makes.
struct Extents {
    m: usize,
    n: usize,
    k: usize,
}

impl Cuda {
    /// `out = a . b`, as cuBLASLt sees it, with the factors rounded as this backend does, where they
    /// are not kept so. A bias is kept as `out` is.
    #[expect(clippy::too_many_arguments, reason = "a fused operation has many operands")]
    fn product(
        &self,
        e: &Extents,
        a: Rows,
        b: Rows,
        out: &ViewMut<'_>,
        accumulate: bool,
        bias: Option<View<'_>>,
        activation: Option<Activation>,
    ) -> Result<bool, CudaError> {
        assert!(bias.is_none_or(|b| b.kind == out.kind), "a bias is kept as what it is added to");
        if e.m == 0 || e.n == 0 {
            return Ok(true);
        }
        let plain =
            |r: Rows| Factor { address: r.address, transposed: r.transposed, stride: r.columns };
        let (a, b) = match self.factors {
            Factors::F32 | Factors::Tf32 => {
                let wide = [a.kind, b.kind, out.kind].iter().all(|kind| *kind == Kind::Wide);
                assert!(wide, "products of f32 are of f32");
                (plain(a), plain(b))
            }
            Factors::Bf16 => {
                let bytes = |r: Rows| match r.kind {
                    Kind::Wide => r.rows * bf16_stride(r.columns) * 2,
                    Kind::Narrow => 0,
                };
                let [to_a, to_b] = self.temporary([bytes(a), bytes(b)])?;
                let factor = |r: Rows, to| match r.kind {
                    Kind::Wide => self.narrowed(r, to),
                    Kind::Narrow => Ok(plain(r)),
                };
                (factor(a, to_a)?, factor(b, to_b)?)
            }
        };
        locked(&self.products).multiply(&Product {
            m: e.m,
            n: e.n,
            k: e.k,
            factors: self.factors,
            a,
            b,
            out: out.address,
            kind: out.kind,
            accumulate,
            bias: bias.map(|b| b.address),
            activation,
        })
    }

    /// Rounds a matrix to bf16 at `to`.
    fn narrowed(&self, from: Rows, to: u64) -> Result<Factor, CudaError> {
        let stride = bf16_stride(from.columns);
        let pairs = from.rows * stride / 2;
        self.device
            .launch("elementwise.cu", c"to_bf16")
            .pointer(from.address)
            .pointer(to)
            .u64(pairs)
            .u32(from.columns)
            .u32(stride)
            .go(self.flat(pairs, 1))?;
        Ok(Factor { address: to, transposed: from.transposed, stride })
    }

    pub(crate) fn project(
        &self,
        s: Linear,
        x: View<'_>,
        w: View<'_>,
        bias: Option<View<'_>>,
        y: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        assert!(x.elements == s.rows * s.input && y.elements == s.rows * s.output, "linear");
        assert!(w.elements == s.input * s.output, "linear");
        assert!(bias.is_none_or(|b| b.elements == s.output), "linear");
        let a = weights(s, w, s.layout == WeightLayout::OutIn);
        let b = rows(x, s.rows, s.input, false);
        let extents = Extents { m: s.output, n: s.rows, k: s.input };
        self.product(&extents, a, b, y, false, bias, None).map(drop)
    }

    pub(crate) fn project_back(
        &self,
        s: Linear,
        dy: View<'_>,
        w: View<'_>,
        dx: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        assert!(dx.elements == s.rows * s.input && dy.elements == s.rows * s.output, "linear");
        assert!(w.elements == s.input * s.output, "linear");
        let a = weights(s, w, s.layout == WeightLayout::InOut);
        let b = rows(dy, s.rows, s.output, false);
        self.product(&Extents { m: s.input, n: s.rows, k: s.output }, a, b, dx, false, None, None)
            .map(drop)
    }

    /// [`Cuda::project`] with GELU behind it. Returns false where there is no such product: of bf16
    /// alone, and what goes beside it must be in rows of 16 bytes.
    pub(crate) fn project_gelu(
        &self,
        s: Linear,
        x: View<'_>,
        w: View<'_>,
        bias: Option<View<'_>>,
        up: &ViewMut<'_>,
        act: &ViewMut<'_>,
    ) -> Result<bool, CudaError> {
        assert!(x.elements == s.rows * s.input && act.elements == s.rows * s.output, "linear");
        assert!(w.elements == s.input * s.output && up.elements == act.elements, "linear");
        assert!(bias.is_none_or(|b| b.elements == s.output), "linear");
        if !beside(s.output, up.as_view(), act) {
            return Ok(false);
        }
        let a = weights(s, w, s.layout == WeightLayout::OutIn);
        let b = rows(x, s.rows, s.input, false);
        let extents = Extents { m: s.output, n: s.rows, k: s.input };
        self.product(&extents, a, b, act, false, bias, Some(Activation::Gelu(up.address)))
    }

    /// [`Cuda::project_back`] times GELU's slope at `up`, as [`Cuda::project_gelu`].
    pub(crate) fn project_back_gelu(
        &self,
        s: Linear,
        dy: View<'_>,
        w: View<'_>,
        up: View<'_>,
        dx: &ViewMut<'_>,
    ) -> Result<bool, CudaError> {
        assert!(dx.elements == s.rows * s.input && dy.elements == s.rows * s.output, "linear");
        assert!(w.elements == s.input * s.output && up.elements == dx.elements, "linear");
        if !beside(s.input, up, dx) {
            return Ok(false);
        }
        let a = weights(s, w, s.layout == WeightLayout::InOut);
        let b = rows(dy, s.rows, s.output, false);
        let extents = Extents { m: s.input, n: s.rows, k: s.output };
        self.product(&extents, a, b, dx, false, None, Some(Activation::Slope(up.address)))
    }

    pub(crate) fn weigh(
        &self,
        s: Linear,
        x: View<'_>,
        dy: View<'_>,
        dw: &ViewMut<'_>,
        accumulate: bool,
    ) -> Result<(), CudaError> {
        assert!(x.elements == s.rows * s.input && dy.elements == s.rows * s.output, "linear");
        assert!(dw.elements == s.input * s.output, "linear");
        let of = |v, columns, transposed| rows(v, s.rows, columns, transposed);
        let (extents, a, b) = match s.layout {
            WeightLayout::OutIn => (
                Extents { m: s.input, n: s.output, k: s.rows },
                of(x, s.input, false),
                of(dy, s.output, true),
            ),
            WeightLayout::InOut => (
                Extents { m: s.output, n: s.input, k: s.rows },
                of(dy, s.output, false),
                of(x, s.input, true),
            ),
        };
        self.product(&extents, a, b, dw, accumulate, None, None).map(drop)
    }

    pub(crate) fn multiply_stored(
        &self,
        rows: usize,
        x: View<'_>,
        w: &Matrix,
        bias: Option<View<'_>>,
        y: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        assert!(x.elements == rows * w.input && y.elements == rows * w.output, "stored linear");
        assert!(bias.is_none_or(|b| b.elements == w.output), "stored linear");
        let bias = bias.map(|b| b.address);
        if rows > FEW_ROWS {
            return self.multiply_many(rows, x, w, bias, y);
        }
        let kernel = match w.dtype {
            DType::F32 => c"multiply_f32",
            DType::Bf16 => c"multiply_bf16",
            DType::F16 => c"multiply_f16",
            DType::I8 => c"multiply_i8",
        };
        self.device
            .launch("stored.cu", kernel)
            .pointer(x.address)
            .pointer(w.values.address())
            .pointer(w.scales())
            .pointer(bias.unwrap_or(0))
            .pointer(y.address)
            .u32(rows)
            .u32(w.input)
            .u32(w.output)
            .u32(w.stride())
            .go(Shape {
                grid: (grid(w.output.div_ceil(STORED_OUTPUTS)), 1, 1),
                threads: 128,
                shared: 0,
            })
    }

    /// Many rows: the matrix is widened to what cuBLASLt multiplies, where it is not that already.
    fn multiply_many(
        &self,
        rows: usize,
        x: View<'_>,
        w: &Matrix,
        bias: Option<u64>,
        y: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        let (stride, elements) = (w.stride(), w.output * w.stride());
        let narrow = w.output.saturating_mul(stride);
        let x_bytes = rows * bf16_stride(w.input) * 2;
        let x = self::rows(x, rows, w.input, false);
        let plain = Factor { address: x.address, transposed: false, stride: w.input };
        let (factors, address, b) = match w.dtype {
            DType::F32 => (Factors::F32, w.values.address(), plain),
            DType::F16 => {
                let [wide] = self.temporary([elements * 4])?;
                self.widen(c"widen_f16", w, wide)?;
                (Factors::F32, wide, plain)
            }
            DType::Bf16 => {
                let [to] = self.temporary([x_bytes])?;
                (Factors::Bf16, w.values.address(), self.narrowed(x, to)?)
            }
            DType::I8 => {
                let [to, wide] = self.temporary([x_bytes, narrow * 2])?;
                self.widen(c"widen_i8", w, wide)?;
                (Factors::Bf16, wide, self.narrowed(x, to)?)
            }
        };
        let scaled = w.dtype == DType::I8;
        locked(&self.products).multiply(&Product {
            m: w.output,
            n: rows,
            k: w.input,
            factors,
            a: Factor { address, transposed: true, stride },
            b,
            out: y.wide("a stored matrix's product"),
            kind: Kind::Wide,
            accumulate: false,
            bias: if scaled { None } else { bias },
            activation: None,
        })?;
        if !scaled {
            return Ok(());
        }
        self.device
            .launch("stored.cu", c"scale_columns")
            .pointer(y.address)
            .pointer(w.scales())
            .pointer(bias.unwrap_or(0))
            .u64(y.elements)
            .u32(w.output)
            .go(self.flat(y.elements, 1))
    }

    fn widen(&self, kernel: &'static std::ffi::CStr, w: &Matrix, to: u64) -> Result<(), CudaError> {
        let eights = w.output * w.stride() / 8;
        self.device
            .launch("stored.cu", kernel)
            .pointer(w.values.address())
            .pointer(to)
            .u64(eights)
            .go(self.flat(eights, 1))
    }

    pub(crate) fn look_up_stored(
        &self,
        indices: &[u32],
        offset: usize,
        table: &Matrix,
        out: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        assert_eq!(out.elements, indices.len() * table.input, "stored embedding");
        let kernel = match table.dtype {
            DType::F32 => c"look_up_f32",
            DType::Bf16 => c"look_up_bf16",
            DType::F16 => c"look_up_f16",
            DType::I8 => c"look_up_i8",
        };
        let sent = self.send(indices)?;
        self.device
            .launch("stored.cu", kernel)
            .pointer(table.values.address())
            .pointer(table.scales())
            .pointer(sent)
            .pointer(out.address)
            .u32(offset)
            .u32(table.input)
            .u32(table.output)
            .u32(table.stride())
            .go(Shape { grid: (grid(indices.len()), 1, 1), threads: 128, shared: 0 })
    }
}

/// The matrix of a linear layer.
fn weights(s: Linear, w: View<'_>, transposed: bool) -> Rows {
    let (rows, columns) = match s.layout {
        WeightLayout::OutIn => (s.output, s.input),
        WeightLayout::InOut => (s.input, s.output),
    };
    self::rows(w, rows, columns, transposed)
}

fn rows(view: View<'_>, rows: usize, columns: usize, transposed: bool) -> Rows {
    Rows { address: view.address, kind: view.kind, rows, columns, transposed }
}

/// Whether cuBLASLt takes `values` of rows of `width` beside the product `out`.
fn beside(width: usize, values: View<'_>, out: &ViewMut<'_>) -> bool {
    let narrow = values.kind == Kind::Narrow && out.kind == Kind::Narrow;
    narrow && width.is_multiple_of(8) && aligned([values.address])
}

/// Elements from one row of a rounded matrix to the next: 16 bytes, as the tensor cores' loads want.
fn bf16_stride(columns: usize) -> usize {
    columns.next_multiple_of(8)
}
