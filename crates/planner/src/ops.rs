//! Time of single operations on one GPU: matmuls with the losses of small ones, attention,
//! memory-bound operators. All times in seconds, all sizes in numbers or bytes.

use crate::catalogue::{Dtype, Gpu};

/// One GPU with a number format: the rates that the operators below divide by.
#[derive(Debug, Clone, Copy)]
pub struct Device {
    /// Matrix peak in FLOP/s.
    pub peak: f64,
    /// Matrix peak of attention, which stays in 16 bits when products are in 8.
    pub attention_peak: f64,
    /// Achieved memory bandwidth in bytes/s.
    pub memory: f64,
    /// Achieved bytes/s of norms, residuals and non-linearities.
    pub operators: f64,
    /// Share of the peak that large matmuls reach.
    pub matmul_efficiency: f64,
    /// Inner dimension at half efficiency.
    pub k_half: f64,
    /// Share of the peak that fused attention reaches.
    pub attention_efficiency: f64,
    /// Seconds that each kernel adds.
    pub overhead: f64,
    /// Streaming multiprocessors.
    pub sms: f64,
    /// Bytes of one operand.
    pub operand_bytes: f64,
}

/// Output tile of one thread block, in rows and columns: the common choice of vendor libraries.
const TILE: f64 = 128.0;

impl Device {
    /// Reads a GPU's rates for a format whose peak is known to exist.
    #[must_use]
    pub fn new(gpu: &Gpu, dtype: Dtype, peak: f64) -> Self {
        let c = &gpu.calibration;
        let attention_peak = match dtype {
            Dtype::Fp8 | Dtype::Int8 | Dtype::Fp4 => gpu
                .peak_flops
                .get(&Dtype::Bf16)
                .or_else(|| gpu.peak_flops.get(&Dtype::Fp16))
                .copied()
                .unwrap_or(peak),
            // On a CPU attention stays in fp32 whatever the format of products.
            Dtype::Bf16 if gpu.sms == 1 => {
                gpu.peak_flops.get(&Dtype::Fp32).copied().unwrap_or(peak)
            }
            _ => peak,
        };
        Self {
            peak,
            attention_peak,
            memory: gpu.memory_bandwidth * c.memory_efficiency,
            operators: gpu.memory_bandwidth
                * if c.operator_efficiency > 0.0 {
                    c.operator_efficiency
                } else {
                    c.memory_efficiency
                },
            matmul_efficiency: c.matmul_efficiency,
            k_half: c.matmul_k_half,
            attention_efficiency: c.attention_efficiency,
            overhead: c.kernel_overhead_us * 1e-6,
            sms: f64::from(gpu.sms),
            operand_bytes: dtype.bytes(),
        }
    }

    /// Returns the share of the matrix peak that an `[m, k] x [k, n]` product reaches.
    ///
    /// `e k / (k + k_half) * w / (w + 1/2)` with `w = ceil(m/128) ceil(n/128) / SMs` waves of
    /// tiles: each tile has a prologue worth `k_half`, and the last wave is half empty on average.
    #[must_use]
    pub fn matmul_share(&self, m: f64, n: f64, k: f64) -> f64 {
        let waves = (m / TILE).ceil().max(1.0) * (n / TILE).ceil().max(1.0) / self.sms;
        self.matmul_efficiency * k / (k + self.k_half) * waves / (waves + 0.5)
    }

    /// Returns the time of an `[m, k] x [k, n]` product that reads or writes `extra_bytes` beside
    /// its operands: the slower of arithmetic and memory (Williams et al. 2009), plus the launch.
    ///
    /// Rows are padded to a tile's 16: a product of one row costs memory, not arithmetic.
    #[must_use]
    pub fn matmul(&self, m: f64, n: f64, k: f64, extra_bytes: f64) -> f64 {
        if m <= 0.0 || n <= 0.0 || k <= 0.0 {
            return 0.0;
        }
        let compute = 2.0 * m * n * k / (self.peak * self.matmul_share(m, n, k));
        let bytes = self.operand_bytes * (m * k + k * n) + self.operand_bytes.max(2.0) * m * n;
        // A product that memory bounds is split along k until every multiprocessor loads.
        if m <= 64.0 {
            let thin = 2.0 * m.max(16.0) * n * k / (self.peak * self.matmul_efficiency);
            return thin.max((bytes + extra_bytes) / self.memory) + self.overhead;
        }
        compute.max((bytes + extra_bytes) / self.memory) + self.overhead
    }

    /// Returns the time of a kernel that streams `bytes` through memory.
    #[must_use]
    pub fn stream(&self, bytes: f64) -> f64 {
        if bytes <= 0.0 { 0.0 } else { bytes / self.memory + self.overhead }
    }

    /// Returns the time of one norm, residual or non-linearity that reads and writes `bytes`.
    #[must_use]
    pub fn operator(&self, bytes: f64) -> f64 {
        if bytes <= 0.0 { 0.0 } else { bytes / self.operators + self.overhead }
    }

    /// Returns the time of fused attention for `flops` real operations with heads of `head_dim`.
    ///
    /// Narrow heads keep the matrix units waiting for the exponentials: half as wide costs about
    /// a quarter of the rate (Dao 2023, 2307.08691, figures 4 to 6).
    #[must_use]
    pub fn fused_attention(&self, flops: f64, head_dim: f64) -> f64 {
        let width = (1.5 * head_dim / (head_dim + 64.0)).min(1.0);
        flops / (self.attention_peak * self.attention_efficiency * width) + self.overhead
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::Catalogue;

    fn a100() -> Device {
        let gpu = Catalogue::builtin().gpu("a100-80g").unwrap();
        Device::new(&gpu, Dtype::Fp16, 312e12)
    }

    #[test]
    fn a_large_product_runs_near_the_measured_rate_and_a_thin_one_at_memory_speed() {
        let device = a100();
        // Public measurements of cuBLAS fp16 on this GPU: 230 to 280 TFLOP/s for 8,192 cubed.
        let n = 8192.0;
        let rate = 2.0 * n * n * n / device.matmul(n, n, n, 0.0) / 1e12;
        assert!((225.0..280.0).contains(&rate), "{rate}");
        // One row: the weights' bytes over the bandwidth, by hand: 2 * 8192^2 / (2039e9 * e).
        let gpu = Catalogue::builtin().gpu("a100-80g").unwrap();
        let by_hand = 2.0 * (n * n + 2.0 * n) / (2039e9 * gpu.calibration.memory_efficiency)
            + device.overhead;
        assert!((device.matmul(1.0, n, n, 0.0) / by_hand - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_small_product_reaches_less_of_the_peak() {
        let device = a100();
        let share = |n: f64| device.matmul_share(n, n, n);
        assert!(share(512.0) < 0.5 * share(8192.0));
        assert!(share(2048.0) < share(8192.0));
    }
}
