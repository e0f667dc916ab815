//! Where a step's time goes, for those who ask. The clock is the caller's.

/// What a stretch of a step is spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Span {
    /// Matrix products of linear layers.
    Matmul,
    /// Attention, forward or backward.
    Attention,
    /// Norms, activations, rotary, embeddings, loss.
    Other,
    /// The optimizer, with clipping.
    Optimizer,
    /// All-reduces inside the tensor group.
    TensorComm,
    /// Gradients over the data group, tied weights between stages, and the step's scalars.
    GradientComm,
    /// Sending to a neighbouring stage.
    PipelineSend,
    /// Waiting for a neighbouring stage: the bubble, and the message.
    PipelineWait,
}

impl Span {
    /// All kinds, in a fixed order.
    pub const ALL: [Self; 8] = [
        Self::Matmul,
        Self::Attention,
        Self::Other,
        Self::Optimizer,
        Self::TensorComm,
        Self::GradientComm,
        Self::PipelineSend,
        Self::PipelineWait,
    ];

    /// Returns the word used in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Matmul => "matmul",
            Self::Attention => "attention",
            Self::Other => "other",
            Self::Optimizer => "optimizer",
            Self::TensorComm => "tensor_comm",
            Self::GradientComm => "gradient_comm",
            Self::PipelineSend => "pipeline_send",
            Self::PipelineWait => "pipeline_wait",
        }
    }
}

/// Watches stretches of a step begin and end. They do not nest.
pub trait Probe: Send + Sync + 'static {
    /// A stretch begins.
    fn begin(&self, span: Span);
    /// It ends.
    fn end(&self, span: Span);
    /// From now on, reductions are under way beside the stretches, or no longer.
    fn under_way(&self, _: bool) {}
}

/// Watches nothing, at no cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProbe;

impl Probe for NoProbe {
    #[inline(always)]
    fn begin(&self, _: Span) {}
    #[inline(always)]
    fn end(&self, _: Span) {}
}

impl<P: Probe> Probe for std::sync::Arc<P> {
    #[inline]
    fn begin(&self, span: Span) {
        (**self).begin(span);
    }
    #[inline]
    fn end(&self, span: Span) {
        (**self).end(span);
    }
    #[inline]
    fn under_way(&self, any: bool) {
        (**self).under_way(any);
    }
}

/// Runs `f` as a stretch.
#[inline(always)]
pub(crate) fn timed<P: Probe, R>(probe: &P, span: Span, f: impl FnOnce() -> R) -> R {
    probe.begin(span);
    let result = f();
    probe.end(span);
    result
}
