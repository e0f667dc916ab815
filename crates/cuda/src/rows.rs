//! Everything that is bound by memory: flat ranges, normalisations, tables, the loss, the optimizer.

use drumline_tensor::{AdamW, Loss, NormKind, Normalise, Rotary, Rounding};

use crate::backend::{Cuda, THREADS, aligned, grid};
use crate::device::Shape;
use crate::error::CudaError;
use crate::memory::{Kind, View, ViewMut, copy_out, narrow};

/// Rows whose gradients of gain and bias one block adds up.
const GRAD_ROWS: usize = 32;
/// Columns that one thread of that block may have (4 `FOURS` in `kernels/norm.cu`).
const GRAD_COLUMNS: usize = 16;
/// Rows of one part of a sum of columns, and threads of its blocks, which have four columns each.
const SUM_ROWS: usize = 64;
const SUM_THREADS: u32 = 64;
/// Elements of one part of a sum of squares.
const SQUARE_CHUNK: usize = 64 << 10;
/// Bytes that a block's reductions need.
const REDUCTION: u32 = 32 * size_of::<f32>() as u32;

/// Threads for a row of `width` columns: whole warps, four columns to a thread where that is enough.
fn row_threads(width: usize) -> u32 {
    (width / 4).next_multiple_of(32).clamp(32, 1024) as u32
}

/// One block for each row.
fn by_row(rows: usize, width: usize) -> Shape {
    Shape { grid: (grid(rows), 1, 1), threads: row_threads(width), shared: REDUCTION }
}

/// The address of an operand of f32 that may be missing.
fn optional(view: Option<View<'_>>, what: &'static str) -> u64 {
    view.map_or(0, |v| v.wide(what))
}

/// Whether rows of `width` at these addresses can be read in fours.
fn in_fours<const N: usize>(width: usize, addresses: [u64; N]) -> bool {
    width.is_multiple_of(4) && aligned(addresses)
}

impl Cuda {
    pub(crate) fn copy_view(&self, from: View<'_>, to: &ViewMut<'_>) {
        assert_eq!(from.elements, to.elements, "copy");
        self.device.perform("copy", &[from.elements], || {
            if from.kind == to.kind {
                self.settle()?;
                return crate::memory::copy_on(&self.device, from, to);
            }
            self.convert(from.address, to.address, to.elements, narrow([from.kind, to.kind]))
        });
    }

    /// Copies `n` values from one kind to the other.
    pub(crate) fn convert(
        &self,
        from: u64,
        to: u64,
        n: usize,
        narrow: usize,
    ) -> Result<(), CudaError> {
        self.device
            .launch("elementwise.cu", c"convert")
            .pointer(from)
            .pointer(to)
            .u64(n)
            .flag(aligned([from, to]))
            .u32(narrow)
            .go(self.flat(n, 4))
    }

    pub(crate) fn fill_view(&self, to: &ViewMut<'_>, value: f32) {
        self.device.perform("fill", &[to.elements], || {
            self.device
                .launch("elementwise.cu", c"fill")
                .pointer(to.address)
                .f32(value)
                .u64(to.elements)
                .flag(aligned([to.address]))
                .u32(narrow([to.kind]))
                .go(self.flat(to.elements, 4))
        });
    }

    pub(crate) fn add_views(
        &self,
        a: View<'_>,
        b: View<'_>,
        bias: Option<View<'_>>,
        sum: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        assert!(a.elements == b.elements && a.elements == sum.elements, "add");
        self.device
            .launch("elementwise.cu", c"add")
            .pointer(a.address)
            .pointer(b.address)
            .pointer(optional(bias, "a bias that is added"))
            .pointer(sum.address)
            .u64(a.elements)
            .u32(bias.map_or(1, |b| b.elements))
            .flag(aligned([a.address, b.address, sum.address]))
            .u32(narrow([a.kind, b.kind, sum.kind]))
            .go(self.flat(a.elements, 4))
    }

    pub(crate) fn gelu_views(&self, x: View<'_>, y: &ViewMut<'_>) -> Result<(), CudaError> {
        assert_eq!(x.elements, y.elements, "gelu");
        self.device
            .launch("elementwise.cu", c"gelu")
            .pointer(x.address)
            .pointer(y.address)
            .u64(x.elements)
            .flag(aligned([x.address, y.address]))
            .u32(narrow([x.kind, y.kind]))
            .go(self.flat(x.elements, 4))
    }

    pub(crate) fn gelu_back(&self, x: View<'_>, dy: &ViewMut<'_>) -> Result<(), CudaError> {
        assert_eq!(x.elements, dy.elements, "gelu gradient");
        self.device
            .launch("elementwise.cu", c"gelu_grad")
            .pointer(x.address)
            .pointer(dy.address)
            .u64(dy.elements)
            .flag(aligned([x.address, dy.address]))
            .u32(narrow([x.kind, dy.kind]))
            .go(self.flat(dy.elements, 4))
    }

    pub(crate) fn swiglu_views(
        &self,
        width: usize,
        gate_up: View<'_>,
        y: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        assert_eq!(gate_up.elements, 2 * y.elements, "swiglu");
        self.device
            .launch("elementwise.cu", c"swiglu")
            .pointer(gate_up.address)
            .pointer(y.address)
            .u64(y.elements)
            .u32(width)
            .flag(in_fours(width, [gate_up.address, y.address]))
            .u32(narrow([gate_up.kind, y.kind]))
            .go(self.flat(y.elements, 4))
    }

    pub(crate) fn swiglu_back(
        &self,
        width: usize,
        gate_up: &ViewMut<'_>,
        dy: View<'_>,
    ) -> Result<(), CudaError> {
        assert_eq!(gate_up.elements, 2 * dy.elements, "swiglu gradient");
        self.device
            .launch("elementwise.cu", c"swiglu_grad")
            .pointer(gate_up.address)
            .pointer(dy.address)
            .u64(dy.elements)
            .u32(width)
            .flag(in_fours(width, [gate_up.address, dy.address]))
            .u32(narrow([gate_up.kind, dy.kind]))
            .go(self.flat(dy.elements, 4))
    }

    pub(crate) fn sum_columns(
        &self,
        rows: usize,
        columns: usize,
        values: View<'_>,
        sums: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        assert!(values.elements == rows * columns && sums.elements == columns, "column sums");
        let parts = rows.div_ceil(SUM_ROWS);
        let [partial] = self.temporary([parts * columns * size_of::<f32>()])?;
        let blocks = grid(columns.div_ceil(4 * SUM_THREADS as usize));
        self.device
            .launch("norm.cu", c"column_parts")
            .pointer(values.address)
            .pointer(partial)
            .u32(rows)
            .u32(columns)
            .u32(SUM_ROWS)
            .flag(in_fours(columns, [values.address]))
            .u32(narrow([values.kind]))
            .go(Shape { grid: (blocks, grid(parts), 1), threads: SUM_THREADS, shared: 0 })?;
        self.add_partial(partial, sums.wide("a sum of columns"), parts, columns, columns)
    }

    /// Adds the rows of `partial`, `stride` elements apart, to `sums`.
    fn add_partial(
        &self,
        partial: u64,
        sums: u64,
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> Result<(), CudaError> {
        self.device
            .launch("norm.cu", c"add_rows")
            .pointer(partial)
            .pointer(sums)
            .u32(rows)
            .u32(columns)
            .u32(stride)
            .go(Shape {
                grid: (grid(columns.div_ceil(THREADS as usize)), 1, 1),
                threads: THREADS,
                shared: 0,
            })
    }

    #[expect(clippy::too_many_arguments, reason = "a fused operation has many operands")]
    pub(crate) fn normalise(
        &self,
        s: Normalise,
        x: View<'_>,
        branch: Option<(View<'_>, Option<View<'_>>, &ViewMut<'_>)>,
        gain: View<'_>,
        bias: Option<View<'_>>,
        y: &ViewMut<'_>,
        stats: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        let n = s.rows * s.width;
        assert!(x.elements == n && y.elements == n && stats.elements == 2 * s.rows, "norm");
        assert!(branch.as_ref().is_none_or(|(b, _, sum)| b.elements == n && sum.elements == n));
        let (added, kind, added_bias, sum) = match &branch {
            Some((b, bias, sum)) => {
                let bias = optional(*bias, "a branch's bias");
                (b.address, b.kind, bias, sum.wide("the sum that is normalised"))
            }
            None => (0, Kind::Wide, 0, 0),
        };
        let (x, gain) = (x.wide("what is normalised"), gain.wide("a gain"));
        self.device
            .launch("norm.cu", c"normalise")
            .pointer(x)
            .pointer(added)
            .pointer(added_bias)
            .pointer(sum)
            .pointer(gain)
            .pointer(optional(bias, "a norm's bias"))
            .pointer(y.address)
            .pointer(stats.wide("statistics"))
            .u32(s.rows)
            .u32(s.width)
            .f32(s.epsilon)
            .flag(s.kind == NormKind::Rms)
            .flag(in_fours(s.width, [x, added, sum, gain, y.address]))
            .u32(narrow([kind, y.kind]))
            .go(by_row(s.rows, s.width))
    }

    #[expect(clippy::too_many_arguments, reason = "a fused operation has many operands")]
    pub(crate) fn normalise_back(
        &self,
        s: Normalise,
        dy: View<'_>,
        x: View<'_>,
        gain: View<'_>,
        stats: View<'_>,
        dx: &ViewMut<'_>,
        dgain: &ViewMut<'_>,
        dbias: Option<&ViewMut<'_>>,
    ) -> Result<(), CudaError> {
        let n = s.rows * s.width;
        assert!(dy.elements == n && x.elements == n && dx.elements == n, "norm gradient");
        assert!(dgain.elements == s.width && stats.elements == 2 * s.rows, "norm gradient");
        let threads = row_threads(s.width);
        if s.width > GRAD_COLUMNS * threads as usize {
            let most = GRAD_COLUMNS * 1024;
            let text = format!("rows are {} wide, {most} is the most", s.width);
            return Err(CudaError::Unsupported(text));
        }
        let parts = s.rows.div_ceil(GRAD_ROWS);
        let [partial] = self.temporary([parts * 2 * s.width * size_of::<f32>()])?;
        let (x, gain, dx) = (x.wide("what was normalised"), gain.wide("a gain"), dx.wide("dx"));
        self.device
            .launch("norm.cu", c"norm_grad")
            .pointer(dy.address)
            .pointer(x)
            .pointer(gain)
            .pointer(stats.wide("statistics"))
            .pointer(dx)
            .pointer(partial)
            .u32(s.rows)
            .u32(s.width)
            .u32(GRAD_ROWS)
            .flag(s.kind == NormKind::Rms)
            .flag(in_fours(s.width, [dy.address, x, gain, dx]))
            .u32(narrow([dy.kind]))
            .go(by_row(parts, s.width))?;
        self.add_partial(partial, dgain.wide("dgain"), parts, s.width, 2 * s.width)?;
        match dbias {
            Some(dbias) => {
                assert_eq!(dbias.elements, s.width, "norm gradient");
                let from = partial + (s.width * size_of::<f32>()) as u64;
                self.add_partial(from, dbias.wide("dbias"), parts, s.width, 2 * s.width)
            }
            None => Ok(()),
        }
    }

    pub(crate) fn rotate(
        &self,
        s: Rotary,
        table: View<'_>,
        positions: &[u32],
        x: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        assert!(positions.len() == s.rows && x.elements == s.rows * s.width, "rotary");
        assert!(s.heads * s.head_dim <= s.width && s.head_dim.is_multiple_of(2), "rotary");
        let held = table.elements / s.head_dim.max(1);
        assert!(positions.iter().all(|p| (*p as usize) < held), "rotary");
        let pairs = s.rows * s.heads * s.head_dim / 2;
        let sent = self.send(positions)?;
        self.device
            .launch("embedding.cu", c"rotary")
            .pointer(x.address)
            .pointer(table.wide("a table of angles"))
            .pointer(sent)
            .u64(pairs)
            .u32(s.width)
            .u32(s.heads)
            .u32(s.head_dim)
            .f32(if s.inverse { -1.0 } else { 1.0 })
            .u32(narrow([x.kind]))
            .go(self.flat(pairs, 1))
    }

    pub(crate) fn look_up(
        &self,
        width: usize,
        indices: &[u32],
        offset: usize,
        table: View<'_>,
        out: &ViewMut<'_>,
        accumulate: bool,
    ) -> Result<(), CudaError> {
        assert_eq!(out.elements, indices.len() * width, "embed");
        let sent = self.send(indices)?;
        self.device
            .launch("embedding.cu", c"embed")
            .pointer(table.wide("a table of embeddings"))
            .pointer(sent)
            .pointer(out.address)
            .u32(offset)
            .u32(table.elements / width)
            .u32(width)
            .flag(accumulate)
            .u32(narrow([out.kind]))
            .go(by_row(indices.len(), width))
    }

    pub(crate) fn look_up_back(
        &self,
        width: usize,
        indices: &[u32],
        offset: usize,
        dy: View<'_>,
        dtable: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        assert_eq!(dy.elements, indices.len() * width, "embed gradient");
        let rows = dtable.elements / width;
        let groups = Groups::of(indices, offset, rows);
        let (count, members) = (groups.rows.len(), groups.members.len());
        let sent = self.send(&[&groups.rows[..], &groups.starts, &groups.members].concat())?;
        let at = |index: usize| sent + (index * size_of::<u32>()) as u64;
        if members == 0 {
            return Ok(());
        }
        self.device
            .launch("embedding.cu", c"embed_grad")
            .pointer(dy.address)
            .pointer(sent)
            .pointer(at(count))
            .pointer(at(2 * count + 1))
            .pointer(dtable.wide("the gradient of a table"))
            .u32(width)
            .u32(narrow([dy.kind]))
            .go(by_row(count, width))
    }

    pub(crate) fn gather(
        &self,
        width: usize,
        indices: &[u32],
        from: View<'_>,
        out: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        assert_eq!(out.elements, indices.len() * width, "gather");
        let rows = from.elements / width;
        assert!(indices.iter().all(|i| (*i as usize) < rows), "gather");
        let sent = self.send(indices)?;
        self.device
            .launch("cached.cu", c"gather_rows")
            .pointer(from.wide("what is gathered"))
            .pointer(sent)
            .pointer(out.wide("what is gathered"))
            .u32(width)
            .go(by_row(indices.len(), width))
    }

    pub(crate) fn classify(
        &self,
        s: Loss,
        targets: &[u32],
        scale: f32,
        logits: &ViewMut<'_>,
        losses: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        check_loss(s, logits.elements, targets.len());
        assert_eq!(losses.elements, s.rows, "loss");
        let sent = self.send(targets)?;
        self.device
            .launch("loss.cu", c"cross_entropy")
            .pointer(logits.address)
            .pointer(sent)
            .pointer(losses.wide("losses"))
            .u32(s.columns)
            .u32(s.used)
            .u32(s.offset)
            .f32(scale)
            .flag(in_fours(s.columns, [logits.address]))
            .u32(narrow([logits.kind]))
            .go(by_row(s.rows, s.columns))
    }

    pub(crate) fn greatest(
        &self,
        s: Loss,
        logits: View<'_>,
        max: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        check_loss(s, logits.elements, s.rows);
        assert_eq!(max.elements, s.rows, "loss");
        self.device
            .launch("loss.cu", c"row_max")
            .pointer(logits.address)
            .pointer(max.wide("maxima"))
            .u32(s.columns)
            .u32(s.used)
            .flag(in_fours(s.columns, [logits.address]))
            .u32(narrow([logits.kind]))
            .go(by_row(s.rows, s.columns))
    }

    pub(crate) fn classify_slice(
        &self,
        s: Loss,
        targets: &[u32],
        logits: View<'_>,
        max: View<'_>,
        sums: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        check_loss(s, logits.elements, targets.len());
        assert!(max.elements == s.rows && sums.elements == 2 * s.rows, "loss");
        let sent = self.send(targets)?;
        self.device
            .launch("loss.cu", c"partial_cross_entropy")
            .pointer(logits.address)
            .pointer(sent)
            .pointer(max.wide("maxima"))
            .pointer(sums.wide("sums"))
            .u32(s.rows)
            .u32(s.columns)
            .u32(s.used)
            .u32(s.offset)
            .flag(in_fours(s.columns, [logits.address]))
            .u32(narrow([logits.kind]))
            .go(by_row(s.rows, s.columns))
    }

    pub(crate) fn classify_slice_back(
        &self,
        s: Loss,
        targets: &[u32],
        scale: f32,
        max: View<'_>,
        sums: View<'_>,
        logits: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        check_loss(s, logits.elements, targets.len());
        assert!(max.elements == s.rows && sums.elements >= s.rows, "loss");
        let sent = self.send(targets)?;
        self.device
            .launch("loss.cu", c"partial_cross_entropy_grad")
            .pointer(logits.address)
            .pointer(sent)
            .pointer(max.wide("maxima"))
            .pointer(sums.wide("sums"))
            .u32(s.columns)
            .u32(s.used)
            .u32(s.offset)
            .f32(scale)
            .flag(in_fours(s.columns, [logits.address]))
            .u32(narrow([logits.kind]))
            .go(by_row(s.rows, s.columns))
    }

    pub(crate) fn square(&self, values: View<'_>) -> Result<f64, CudaError> {
        let parts = values.elements.div_ceil(SQUARE_CHUNK);
        if parts == 0 {
            return Ok(0.0);
        }
        let [partial, total] = self.temporary([parts * size_of::<f64>(), size_of::<f64>()])?;
        let shape = |blocks| Shape {
            grid: (grid(blocks), 1, 1),
            threads: THREADS,
            shared: THREADS * size_of::<f64>() as u32,
        };
        self.device
            .launch("optimizer.cu", c"sum_squares")
            .pointer(values.wide("what is squared"))
            .pointer(partial)
            .u64(values.elements)
            .u64(SQUARE_CHUNK)
            .go(shape(parts))?;
        self.device
            .launch("optimizer.cu", c"sum_doubles")
            .pointer(partial)
            .pointer(total)
            .u64(parts)
            .go(shape(1))?;
        let mut sum = [0.0f64];
        copy_out(&self.device, total, &mut sum)?;
        Ok(sum[0])
    }

    pub(crate) fn optimise(
        &self,
        a: AdamW,
        p: &ViewMut<'_>,
        copy: Option<&ViewMut<'_>>,
        g: View<'_>,
        m: &ViewMut<'_>,
        v: &ViewMut<'_>,
    ) -> Result<(), CudaError> {
        let n = g.elements;
        assert!(p.elements == n && m.elements == n && v.elements == n, "adamw");
        assert!(copy.is_none_or(|c| c.elements == n && c.kind == Kind::Narrow), "adamw");
        let copied = copy.map_or(0, |c| c.address);
        let [p, m, v] = [p, m, v].map(|view| view.wide("what AdamW keeps"));
        let g = g.wide("a gradient");
        let (seed, first) = chances(a.rounding);
        self.device
            .launch("optimizer.cu", c"adamw")
            .pointer(p)
            .pointer(copied)
            .pointer(g)
            .pointer(m)
            .pointer(v)
            .u64(n)
            .f32(a.beta1)
            .f32(a.beta2)
            .f32(a.epsilon)
            .f32(1.0 - a.learning_rate * a.weight_decay)
            .f32(a.learning_rate / a.correction1)
            .f32(1.0 / a.correction2.sqrt())
            .f32(a.gradient_scale)
            .u64(seed)
            .u64(first)
            .flag(a.rounding != Rounding::Nearest)
            .flag(aligned([p, copied, g, m, v]))
            .go(self.flat(n, 4))
    }

    /// Copies f32 to bf16.
    pub(crate) fn copy_by(&self, from: View<'_>, to: &ViewMut<'_>, rounding: Rounding) {
        let Rounding::Stochastic { .. } = rounding else { return self.copy_view(from, to) };
        let n = from.elements;
        assert!(to.elements == n && to.kind == Kind::Narrow, "copy by chance");
        let (seed, first) = chances(rounding);
        self.device.perform("copy_rounded", &[n], || {
            self.device
                .launch("optimizer.cu", c"copy_by_chance")
                .pointer(from.wide("what is rounded"))
                .pointer(to.address)
                .u64(n)
                .u64(seed)
                .u64(first)
                .flag(aligned([from.address, to.address]))
                .go(self.flat(n, 4))
        });
    }
}

/// The seed and the first place of a rounding, as arguments of a kernel.
fn chances(rounding: Rounding) -> (usize, usize) {
    match rounding {
        Rounding::Nearest => (0, 0),
        Rounding::Stochastic { seed, first } => (seed as usize, first as usize),
    }
}

fn check_loss(s: Loss, logits: usize, targets: usize) {
    assert!(s.used <= s.columns && logits == s.rows * s.columns && targets == s.rows, "loss");
}

/// The rows of a table that anything is added to, and from where, in order.
#[derive(Debug, PartialEq, Eq)]
struct Groups {
    rows: Vec<u32>,
    /// Where each row's members begin, and the end of the last.
    starts: Vec<u32>,
    members: Vec<u32>,
}

impl Groups {
    fn of(indices: &[u32], offset: usize, rows: usize) -> Self {
        let place = |index: u32| (index as usize).checked_sub(offset).filter(|row| *row < rows);
        let mut pairs: Vec<(u32, u32)> = indices
            .iter()
            .zip(0..)
            .filter_map(|(index, member)| Some((place(*index)? as u32, member)))
            .collect();
        pairs.sort_unstable();
        let mut groups = Self { rows: Vec::new(), starts: Vec::new(), members: Vec::new() };
        for (row, member) in pairs {
            if groups.rows.last() != Some(&row) {
                groups.rows.push(row);
                groups.starts.push(groups.members.len() as u32);
            }
            groups.members.push(member);
        }
        groups.starts.push(groups.members.len() as u32);
        groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_grouped_by_row_in_their_order() {
        let groups = Groups::of(&[7, 3, 9, 7, 2, 3, 7], 3, 5);
        assert_eq!(groups.rows, [0, 4]);
        assert_eq!(groups.starts, [0, 2, 5]);
        assert_eq!(groups.members, [1, 5, 0, 3, 6]);
        assert_eq!(Groups::of(&[0, 1], 2, 4).starts, [0]);
    }
}
