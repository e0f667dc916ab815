//! [`Cuda`]: a GPU as the engine's device.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drumline_tensor::{
    AdamW, Attention, Backend, CachedAttention, CachedSegment, DType, Draw, Linear, Loss,
    MatmulPrecision, Normalise, Rotary, Rounding, TensorError,
};

use crate::device::{Device, DeviceOptions, Shape};
use crate::error::CudaError;
use crate::graph::Graphs;
use crate::matmul::{Factors, Matmul};
use crate::matrix::Matrix;
use crate::memory::{
    Buffer, Indices, Kind, Scratch, Staging, View, ViewMut, copy_in, copy_out, narrow,
};

/// How a GPU works.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CudaOptions {
    /// Which GPU, and where its kernels are kept.
    pub device: DeviceOptions,
    /// What matrix products of [`Backend::linear`] and its gradients round their factors to.
    pub matmul: MatmulPrecision,
    /// Lets products of f32 round their factors to 10 bits of mantissa, which the tensor cores take.
    pub tf32: bool,
}

/// A GPU as the engine's device.
///
/// With [`MatmulPrecision::Bf16`] products round their factors to bf16 on the way into the tensor
/// cores, and add in f32; activations, their gradients and the copy of the parameters that products
/// read are kept as bf16, so that they are not rounded again and take half of the memory and its
/// traffic. Everything else is f32. Sums have a fixed order: the same calls give the same bits.
pub struct Cuda {
    pub(crate) device: Arc<Device>,
    pub(crate) factors: Factors,
    pub(crate) products: Mutex<Matmul>,
    pub(crate) scratch: Mutex<Scratch>,
    indices: Mutex<Indices>,
    pub(crate) graphs: Mutex<Graphs>,
    host: Mutex<Staging>,
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while one was held was a wrong shape: what is guarded is still whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Threads of a block in operations without rows.
pub(crate) const THREADS: u32 = 256;
/// Blocks for each multiprocessor in those: enough that loads are always under way.
const BLOCKS: usize = 16;

impl Cuda {
    /// Opens a GPU.
    ///
    /// # Errors
    /// [`CudaError`]: which library, device or capability is missing.
    pub fn new(options: &CudaOptions) -> Result<Self, CudaError> {
        let device = Device::open(&options.device)?;
        let products = Mutex::new(Matmul::new(&device)?);
        let factors = match (options.matmul, options.tf32) {
            (MatmulPrecision::Bf16, _) => Factors::Bf16,
            (MatmulPrecision::F32, true) => Factors::Tf32,
            (MatmulPrecision::F32, false) => Factors::F32,
        };
        Ok(Self {
            device,
            factors,
            products,
            scratch: Mutex::default(),
            indices: Mutex::default(),
            graphs: Mutex::default(),
            host: Mutex::default(),
        })
    }

    /// How activations are kept.
    fn activations(&self) -> Kind {
        match self.factors {
            Factors::Bf16 => Kind::Narrow,
            Factors::F32 | Factors::Tf32 => Kind::Wide,
        }
    }

    /// Returns the device.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// A launch over `elements` elements, `each` to a thread.
    pub(crate) fn flat(&self, elements: usize, each: usize) -> Shape {
        let most = self.device.properties().multiprocessors as usize * BLOCKS;
        let blocks = elements.div_ceil(each * THREADS as usize).min(most);
        Shape { grid: (grid(blocks), 1, 1), threads: THREADS, shared: 0 }
    }

    /// Sends indices, or finds them where they were sent before.
    pub(crate) fn send(&self, values: &[u32]) -> Result<u64, CudaError> {
        if self.device.is_collecting() {
            return self.place(values);
        }
        locked(&self.indices).send(&self.device, values)
    }

    /// Temporary memory of these sizes in bytes, until the next operation.
    pub(crate) fn temporary<const N: usize>(
        &self,
        sizes: [usize; N],
    ) -> Result<[u64; N], CudaError> {
        let mut scratch = locked(&self.scratch);
        if !scratch.holds(&sizes) {
            // Calls that are kept have addresses of what will be freed.
            self.settle()?;
        }
        scratch.parts(&self.device, sizes)
    }

    /// Does the work of an operation that is more than calls of the stream.
    fn perform_alone<T: Default>(
        &self,
        operation: &'static str,
        shape: &dyn Debug,
        work: impl FnOnce() -> Result<T, CudaError>,
    ) -> T {
        self.device.perform(operation, shape, || {
            self.settle()?;
            work()
        })
    }
}

/// A number of blocks.
pub(crate) fn grid(blocks: usize) -> u32 {
    u32::try_from(blocks).expect("a launch has fewer than 2^32 blocks")
}

/// Whether all addresses can be read 16 bytes at a time.
pub(crate) fn aligned<const N: usize>(addresses: [u64; N]) -> bool {
    addresses.iter().all(|address| address.is_multiple_of(16))
}

impl Backend for Cuda {
    type Buffer = Buffer;
    type View<'a> = View<'a>;
    type ViewMut<'a> = ViewMut<'a>;
    type Matrix = Matrix;

    fn alloc(&self, elements: usize) -> Result<Buffer, TensorError> {
        self.status()?;
        Buffer::zeros(&self.device, elements, Kind::Wide)
            .map_err(|error| error.during("allocate", &format!("[{elements}] f32")))
    }

    fn alloc_activation(&self, elements: usize) -> Result<Buffer, TensorError> {
        self.status()?;
        let kind = self.activations();
        Buffer::zeros(&self.device, elements, kind)
            .map_err(|error| error.during("allocate", &format!("[{elements}] {:?}", kind.dtype())))
    }

    fn activation_dtype(&self) -> DType {
        self.activations().dtype()
    }

    fn bytes(&self, buffer: &Buffer) -> usize {
        buffer.bytes()
    }

    fn scratch_bytes(&self) -> usize {
        locked(&self.scratch).bytes()
    }

    fn elements(&self, buffer: &Buffer) -> usize {
        buffer.elements()
    }

    fn view<'a>(&self, buffer: &'a Buffer, range: Range<usize>) -> View<'a> {
        buffer.view(range)
    }

    fn view_mut<'a>(&self, buffer: &'a mut Buffer, range: Range<usize>) -> ViewMut<'a> {
        buffer.view_mut(range)
    }

    fn split_mut<'a>(
        &self,
        view: Self::ViewMut<'a>,
        at: usize,
    ) -> (Self::ViewMut<'a>, Self::ViewMut<'a>) {
        view.split(at)
    }

    fn as_view<'a>(&self, view: &'a Self::ViewMut<'_>) -> View<'a> {
        view.as_view()
    }

    fn together<R>(&self, f: impl FnOnce() -> R) -> R {
        self.keep_together(f)
    }

    fn status(&self) -> Result<(), TensorError> {
        self.device.failure().map_or(Ok(()), Err)
    }

    fn read(&self, from: View<'_>, to: &mut [f32]) {
        assert_eq!(from.elements, to.len(), "read");
        let shape = [to.len()];
        self.perform_alone("read", &shape, || match from.kind {
            Kind::Wide => copy_out(&self.device, from.address, to),
            Kind::Narrow => {
                let [wide] = self.temporary([size_of_val(to)])?;
                self.convert(from.address, wide, to.len(), narrow([Kind::Narrow, Kind::Wide]))?;
                copy_out(&self.device, wide, to)
            }
        });
    }

    fn write(&self, from: &[f32], to: ViewMut<'_>) {
        assert_eq!(from.len(), to.elements, "write");
        let shape = [from.len()];
        self.perform_alone("write", &shape, || match to.kind {
            Kind::Wide => copy_in(&self.device, to.address, from),
            Kind::Narrow => {
                let [wide] = self.temporary([size_of_val(from)])?;
                copy_in(&self.device, wide, from)?;
                self.convert(wide, to.address, from.len(), narrow([Kind::Wide, Kind::Narrow]))
            }
        });
    }

    fn copy(&self, from: View<'_>, to: ViewMut<'_>) {
        self.copy_view(from, &to);
    }

    fn copy_rounded(&self, from: View<'_>, to: ViewMut<'_>, rounding: Rounding) {
        self.copy_by(from, &to, rounding);
    }

    fn on_host<R>(&self, values: ViewMut<'_>, f: impl FnOnce(&mut [f32]) -> R) -> R {
        // Taken, not borrowed: `f` may wait for another rank.
        let mut staging = std::mem::take(&mut *locked(&self.host));
        let host = staging.take(&self.device, values.elements);
        // The copy back of an earlier call is over when this read is.
        self.read(values.as_view(), host);
        let result = f(host);
        self.write(host, values);
        *locked(&self.host) = staging;
        result
    }

    fn fill(&self, to: ViewMut<'_>, value: f32) {
        self.fill_view(&to, value);
    }

    fn linear(&self, s: Linear, x: View<'_>, w: View<'_>, bias: Option<View<'_>>, y: ViewMut<'_>) {
        self.device.perform("linear", &(s, self.factors), || self.project(s, x, w, bias, &y));
    }

    fn linear_grad_input(&self, s: Linear, dy: View<'_>, w: View<'_>, dx: ViewMut<'_>) {
        let what = (s, self.factors);
        self.device.perform("linear_grad_input", &what, || self.project_back(s, dy, w, &dx));
    }

    fn linear_grad_weight(
        &self,
        s: Linear,
        x: View<'_>,
        dy: View<'_>,
        dw: ViewMut<'_>,
        accumulate: bool,
    ) {
        let what = (s, self.factors, accumulate);
        self.device.perform("linear_grad_weight", &what, || self.weigh(s, x, dy, &dw, accumulate));
    }

    fn linear_gelu(
        &self,
        s: Linear,
        x: View<'_>,
        w: View<'_>,
        bias: Option<View<'_>>,
        up: ViewMut<'_>,
        act: ViewMut<'_>,
    ) -> bool {
        let what = (s, self.factors);
        self.device.perform("linear_gelu", &what, || self.project_gelu(s, x, w, bias, &up, &act))
    }

    fn linear_grad_input_gelu(
        &self,
        s: Linear,
        dy: View<'_>,
        w: View<'_>,
        up: View<'_>,
        dx: ViewMut<'_>,
    ) -> bool {
        let what = (s, self.factors);
        self.device
            .perform("linear_grad_input_gelu", &what, || self.project_back_gelu(s, dy, w, up, &dx))
    }

    fn alloc_matrix(&self, dtype: DType, s: Linear) -> Result<Matrix, TensorError> {
        self.status()?;
        Matrix::zeros(&self.device, dtype, s)
            .map_err(|error| error.during("allocate a matrix", &format!("{dtype:?} {s:?}")))
    }

    fn write_matrix(&self, from: &[f32], to: &mut Matrix) {
        let what = (to.dtype, [to.output, to.input]);
        self.perform_alone("write_matrix", &what, || to.write(from));
    }

    fn matrix_bytes(&self, matrix: &Matrix) -> usize {
        matrix.bytes()
    }

    fn linear_stored(
        &self,
        rows: usize,
        x: View<'_>,
        w: &Matrix,
        bias: Option<View<'_>>,
        y: ViewMut<'_>,
    ) {
        let what = (w.dtype, [rows, w.input, w.output]);
        self.device.perform("linear_stored", &what, || self.multiply_stored(rows, x, w, bias, &y));
    }

    fn embed_stored(&self, indices: &[u32], offset: usize, table: &Matrix, out: ViewMut<'_>) {
        let what = (table.dtype, [indices.len(), table.input, table.output]);
        self.device
            .perform("embed_stored", &what, || self.look_up_stored(indices, offset, table, &out));
    }

    fn add_column_sums(&self, rows: usize, columns: usize, values: View<'_>, sums: ViewMut<'_>) {
        self.device.perform("add_column_sums", &[rows, columns], || {
            self.sum_columns(rows, columns, values, &sums)
        });
    }

    fn add(&self, a: View<'_>, b: View<'_>, bias: Option<View<'_>>, sum: ViewMut<'_>) {
        self.device.perform("add", &[a.elements], || self.add_views(a, b, bias, &sum));
    }

    fn norm(
        &self,
        s: Normalise,
        x: View<'_>,
        gain: View<'_>,
        bias: Option<View<'_>>,
        y: ViewMut<'_>,
        stats: ViewMut<'_>,
    ) {
        self.device.perform("norm", &s, || self.normalise(s, x, None, gain, bias, &y, &stats));
    }

    fn add_norm(
        &self,
        s: Normalise,
        x: View<'_>,
        branch: View<'_>,
        branch_bias: Option<View<'_>>,
        sum: ViewMut<'_>,
        gain: View<'_>,
        bias: Option<View<'_>>,
        y: ViewMut<'_>,
        stats: ViewMut<'_>,
    ) {
        let branch = Some((branch, branch_bias, &sum));
        self.device
            .perform("add_norm", &s, || self.normalise(s, x, branch, gain, bias, &y, &stats));
    }

    fn norm_grad(
        &self,
        s: Normalise,
        dy: View<'_>,
        x: View<'_>,
        gain: View<'_>,
        stats: View<'_>,
        dx: ViewMut<'_>,
        dgain: ViewMut<'_>,
        dbias: Option<ViewMut<'_>>,
    ) {
        self.device.perform("norm_grad", &s, || {
            self.normalise_back(s, dy, x, gain, stats, &dx, &dgain, dbias.as_ref())
        });
    }

    fn rotary(&self, s: Rotary, table: View<'_>, positions: &[u32], x: ViewMut<'_>) {
        self.device.perform("rotary", &s, || self.rotate(s, table, positions, &x));
    }

    fn attention(&self, s: Attention, qkv: View<'_>, out: ViewMut<'_>, lse: ViewMut<'_>) {
        self.device.perform("attention", &s, || self.attend(s, qkv, &out, &lse));
    }

    fn attention_grad(
        &self,
        s: Attention,
        qkv: View<'_>,
        out: View<'_>,
        lse: View<'_>,
        dout: View<'_>,
        dqkv: ViewMut<'_>,
    ) {
        self.device
            .perform("attention_grad", &s, || self.attend_back(s, qkv, out, lse, dout, &dqkv));
    }

    fn cache_formats(&self) -> &'static [DType] {
        &[DType::F32, DType::Bf16, DType::F16]
    }

    fn cache_write(
        &self,
        s: CachedAttention,
        qkv: View<'_>,
        slots: &[u32],
        keys: ViewMut<'_>,
        values: ViewMut<'_>,
    ) {
        let what = (s, slots.len());
        self.device.perform("cache_write", &what, || self.store(s, qkv, slots, &keys, &values));
    }

    fn cached_attention(
        &self,
        s: CachedAttention,
        segments: &[CachedSegment<'_>],
        qkv: View<'_>,
        keys: View<'_>,
        values: View<'_>,
        out: ViewMut<'_>,
    ) {
        let what = (s, segments.len());
        self.device.perform("cached_attention", &what, || {
            self.attend_cached(s, segments, qkv, keys, values, &out)
        });
    }

    fn gelu(&self, x: View<'_>, y: ViewMut<'_>) {
        self.device.perform("gelu", &[x.elements], || self.gelu_views(x, &y));
    }

    fn gelu_grad(&self, x: View<'_>, dy: ViewMut<'_>) {
        self.device.perform("gelu_grad", &[x.elements], || self.gelu_back(x, &dy));
    }

    fn swiglu(&self, width: usize, gate_up: View<'_>, y: ViewMut<'_>) {
        self.device
            .perform("swiglu", &[y.elements, width], || self.swiglu_views(width, gate_up, &y));
    }

    fn swiglu_grad(&self, width: usize, gate_up: ViewMut<'_>, dy: View<'_>) {
        self.device.perform("swiglu_grad", &[dy.elements, width], || {
            self.swiglu_back(width, &gate_up, dy)
        });
    }

    fn embed(
        &self,
        width: usize,
        indices: &[u32],
        offset: usize,
        table: View<'_>,
        out: ViewMut<'_>,
        accumulate: bool,
    ) {
        self.device.perform("embed", &[indices.len(), width], || {
            self.look_up(width, indices, offset, table, &out, accumulate)
        });
    }

    fn embed_grad(
        &self,
        width: usize,
        indices: &[u32],
        offset: usize,
        dy: View<'_>,
        dtable: ViewMut<'_>,
    ) {
        self.device.perform("embed_grad", &[indices.len(), width], || {
            self.look_up_back(width, indices, offset, dy, &dtable)
        });
    }

    fn gather_rows(&self, width: usize, indices: &[u32], from: View<'_>, out: ViewMut<'_>) {
        self.device.perform("gather_rows", &[indices.len(), width], || {
            self.gather(width, indices, from, &out)
        });
    }

    fn cross_entropy(
        &self,
        s: Loss,
        targets: &[u32],
        scale: f32,
        logits: ViewMut<'_>,
        losses: ViewMut<'_>,
    ) {
        self.device
            .perform("cross_entropy", &s, || self.classify(s, targets, scale, &logits, &losses));
    }

    fn row_max(&self, s: Loss, logits: View<'_>, max: ViewMut<'_>) {
        self.device.perform("row_max", &s, || self.greatest(s, logits, &max));
    }

    fn partial_cross_entropy(
        &self,
        s: Loss,
        targets: &[u32],
        logits: View<'_>,
        max: View<'_>,
        sums: ViewMut<'_>,
    ) {
        self.device.perform("partial_cross_entropy", &s, || {
            self.classify_slice(s, targets, logits, max, &sums)
        });
    }

    fn partial_cross_entropy_grad(
        &self,
        s: Loss,
        targets: &[u32],
        scale: f32,
        max: View<'_>,
        sums: View<'_>,
        logits: ViewMut<'_>,
    ) {
        self.device.perform("partial_cross_entropy_grad", &s, || {
            self.classify_slice_back(s, targets, scale, max, sums, &logits)
        });
    }

    fn sample(
        &self,
        columns: usize,
        used: usize,
        logits: View<'_>,
        draws: &[Draw],
        tokens: &mut [u32],
    ) -> bool {
        let what = [draws.len(), columns, used];
        self.perform_alone("sample", &what, || self.choose(columns, used, logits, draws, tokens));
        true
    }

    fn sum_squares(&self, values: View<'_>) -> f64 {
        self.perform_alone("sum_squares", &[values.elements], || self.square(values))
    }

    fn adamw(
        &self,
        step: AdamW,
        parameters: ViewMut<'_>,
        copy: Option<ViewMut<'_>>,
        gradients: View<'_>,
        first: ViewMut<'_>,
        second: ViewMut<'_>,
    ) {
        self.device.perform("adamw", &[gradients.elements], || {
            self.optimise(step, &parameters, copy.as_ref(), gradients, &first, &second)
        });
    }
}
