//! What would be left of a node if pods of a single typical shape filled it, averaged over shapes.
//!
//! Fragmentation looks one pod ahead; this looks to the end, but as if all pods were alike. It is
//! blind to which pods really come, and sees at once when cores and GPUs run out at different
//! times, which the learned table sees only where it has been.

use crate::openb::fleet::Node;
use crate::openb::typical::Typical;

/// The typical shapes with GPUs, sorted by what they take of a device.
#[derive(Debug, Clone, Default)]
pub struct Rest {
    shapes: Vec<Filler>,
    /// The shares of shapes without GPUs: they leave the GPUs as they are.
    no_gpu: f64,
}

#[derive(Debug, Clone)]
struct Filler {
    cpu_milli: i64,
    gpu_milli: u16,
    gpus: u8,
    models: u32,
    share: f64,
}

impl Rest {
    /// Prepares the typical shapes.
    #[must_use]
    pub fn new(typical: &[Typical]) -> Self {
        let (with, without): (Vec<&Typical>, Vec<&Typical>) =
            typical.iter().partition(|t| t.shape.gpus > 0);
        let mut shapes: Vec<Filler> = with
            .into_iter()
            .map(|t| Filler {
                cpu_milli: i64::from(t.shape.cpu_milli),
                gpu_milli: t.shape.gpu_milli,
                gpus: t.shape.gpus,
                models: t.shape.models,
                share: t.share,
            })
            .collect();
        shapes.sort_by_key(|s| (s.gpu_milli, s.gpus));
        Self { shapes, no_gpu: without.iter().map(|t| t.share).sum() }
    }

    /// Returns the thousandths of a GPU that would be left.
    #[must_use]
    pub fn left(&self, node: &Node) -> f64 {
        let left = node.gpu_left();
        let mut sum = self.no_gpu * left as f64;
        let mut slots = (0, 0i64);
        for s in &self.shapes {
            if slots.0 != s.gpu_milli {
                let count = |d: &u16| i64::from(*d / s.gpu_milli);
                slots = (s.gpu_milli, node.devices().iter().map(count).sum());
            }
            let room = if s.models & node.model == 0 {
                0
            } else if s.gpus == 1 {
                slots.1
            } else {
                let whole = node.devices().iter().filter(|&&d| d >= s.gpu_milli).count();
                whole as i64 / i64::from(s.gpus)
            };
            let cores = if room == 0 || s.cpu_milli * room <= i64::from(node.cpu) {
                room
            } else {
                i64::from(node.cpu) / s.cpu_milli
            };
            let taken = cores * i64::from(s.gpu_milli) * i64::from(s.gpus);
            sum += s.share * (left - taken) as f64;
        }
        sum
    }
}
