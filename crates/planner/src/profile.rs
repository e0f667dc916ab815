//! A node's own measurements in place of the catalogue: from `drumline bench` to a GPU entry.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::catalogue::{Calibration, Dtype, Gpu, Network, position};
use crate::error::PlanError;
use crate::fit::minimise;
use crate::ops::Device;
use crate::split::Machines;

/// One measured product.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MatmulPoint {
    /// Rows.
    pub m: u32,
    /// Columns.
    pub n: u32,
    /// Inner dimension.
    pub k: u32,
    /// Seconds of one product.
    pub seconds: f64,
}

/// One measured all-reduce.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CollectivePoint {
    /// Ranks that took part.
    pub ranks: u32,
    /// Bytes summed.
    pub bytes: f64,
    /// Seconds of one all-reduce.
    pub seconds: f64,
}

/// The norms, residuals and non-linearities of one layer, measured one by one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatorPoint {
    /// Which operator.
    pub name: String,
    /// Bytes that it reads and writes, as [`crate::layer::native_operators`] counts them.
    pub bytes: f64,
    /// Seconds of one call.
    pub seconds: f64,
}

/// One measured attention, forward and backward.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionPoint {
    /// Tokens of a sequence.
    pub sequence: u32,
    /// Query heads, over all sequences.
    pub heads: u32,
    /// Width of a head.
    pub head_dim: u32,
    /// Seconds of one forward and one backward pass.
    pub seconds: f64,
}

/// A node's measurements. JSON, as `drumline bench profile` writes it.
///
/// They hold for ranks of `threads` threads while `at_once` such ranks compute.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// A name for the device.
    pub name: String,
    /// The format that was measured.
    pub dtype: Dtype,
    /// Threads of a rank, on a CPU; 0: not a CPU.
    #[serde(default)]
    pub threads: u32,
    /// Ranks that computed at one time, and that the node has cores for; 0: every device has its
    /// own.
    #[serde(default)]
    pub at_once: u32,
    /// Device memory in bytes.
    pub memory_bytes: f64,
    /// Streaming rate in bytes/s, read and write together.
    pub memory_bandwidth: f64,
    /// Devices in the node.
    pub devices: u32,
    /// Products from small to large, at least three.
    pub matmul: Vec<MatmulPoint>,
    /// The same products in further formats.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub matmul_in: BTreeMap<Dtype, Vec<MatmulPoint>>,
    /// Norms, residuals and non-linearities; none: they run at the memory's rate.
    #[serde(default)]
    pub operators: Vec<OperatorPoint>,
    /// Attention; none: half of the matrix peak.
    #[serde(default)]
    pub attention: Vec<AttentionPoint>,
    /// All-reduces, at least two for more than one device.
    #[serde(default)]
    pub all_reduce: Vec<CollectivePoint>,
    /// All-reduces over TCP, at least two for more than one node.
    #[serde(default)]
    pub all_reduce_tcp: Vec<CollectivePoint>,
    /// Milliseconds of a step outside the device.
    #[serde(default)]
    pub step_overhead_ms: f64,
    /// Memory that the runtime takes of each device, in 10^9 bytes.
    #[serde(default)]
    pub framework_gb: f64,
    /// Power of a device in watts, if known.
    #[serde(default)]
    pub power_w: Option<f64>,
    /// Price per device-hour, if known.
    #[serde(default)]
    pub price_per_hour: Option<f64>,
}

impl Profile {
    /// Reads a profile.
    ///
    /// # Errors
    /// [`PlanError::Text`] with the place of what is wrong.
    pub fn read(file: &str, text: &str) -> Result<Self, PlanError> {
        let profile: Self = serde_json::from_str(text).map_err(|error| PlanError::Text {
            file: file.to_owned(),
            line: error.line(),
            column: error.column(),
            message: error.to_string(),
        })?;
        let reject = |field: &str, message: &str| {
            let (line, column) = position(text, text.find(&format!("\"{field}\"")).unwrap_or(0));
            Err(PlanError::Text {
                file: file.to_owned(),
                line,
                column,
                message: format!("{field}: {message}"),
            })
        };
        let good = |x: f64| x.is_finite() && x > 0.0;
        if profile.matmul.len() < 3 {
            return reject("matmul", "at least three products are needed");
        }
        let products = profile.matmul_in.values().flatten().chain(&profile.matmul);
        if { products }.any(|p| !good(p.seconds) || p.m == 0 || p.n == 0 || p.k == 0) {
            return reject("matmul", "sizes and seconds must be positive");
        }
        for (field, points) in
            [("all_reduce", &profile.all_reduce), ("all_reduce_tcp", &profile.all_reduce_tcp)]
        {
            if points.iter().any(|p| !good(p.seconds) || !good(p.bytes) || p.ranks < 2) {
                return reject(field, "bytes and seconds must be positive, ranks at least 2");
            }
        }
        if profile.operators.iter().any(|p| !good(p.bytes) || !good(p.seconds)) {
            return reject("operators", "bytes and seconds must be positive");
        }
        if profile
            .attention
            .iter()
            .any(|p| !good(p.seconds) || p.sequence == 0 || p.heads == 0 || p.head_dim == 0)
        {
            return reject("attention", "sizes and seconds must be positive");
        }
        if !(0.0..1e6).contains(&profile.step_overhead_ms)
            || !(0.0..1e6).contains(&profile.framework_gb)
        {
            return reject("step_overhead_ms", "overheads must be numbers from 0");
        }
        if !good(profile.memory_bytes) || !good(profile.memory_bandwidth) || profile.devices == 0 {
            return reject("memory_bytes", "memory, bandwidth and devices must be positive");
        }
        Ok(profile)
    }

    /// Turns the measurements into machines: fits peak, inner half-width and launch time to the
    /// products, bandwidth and latency to the all-reduces, by least squares of the logarithms.
    #[must_use]
    pub fn machines(&self) -> Machines {
        let fastest = self
            .matmul
            .iter()
            .map(|p| 2.0 * f64::from(p.m) * f64::from(p.n) * f64::from(p.k) / p.seconds)
            .fold(0.0, f64::max);
        // The fastest product stands for 95% of the peak; the fit moves it.
        let device = |x: &[f64]| Device {
            peak: fastest / 0.95 * x[0].exp(),
            attention_peak: fastest / 0.95 * x[0].exp(),
            memory: self.memory_bandwidth,
            operators: self.memory_bandwidth,
            matmul_efficiency: 0.95,
            k_half: x[1].exp(),
            attention_efficiency: 0.5,
            overhead: x[2].exp(),
            sms: 1.0,
            operand_bytes: self.dtype.bytes(),
        };
        let mut objective = |x: &[f64]| -> f64 {
            let device = device(x);
            self.matmul
                .iter()
                .map(|p| {
                    let time = device.matmul(f64::from(p.m), f64::from(p.n), f64::from(p.k), 0.0);
                    (time / p.seconds).ln().powi(2)
                })
                .sum()
        };
        let found = minimise(&mut objective, &[0.0, 3.0, -13.0], &[0.2, 1.0, 1.0], 3000);
        let fitted = device(&found.x);
        // Further formats differ in the peak alone.
        let mut peak_flops = BTreeMap::from([(self.dtype, fitted.peak)]);
        for (dtype, points) in &self.matmul_in {
            let ratio = |p: &MatmulPoint| {
                let time = fitted.matmul(f64::from(p.m), f64::from(p.n), f64::from(p.k), 0.0);
                ((time - fitted.overhead).max(0.0) / (p.seconds - fitted.overhead).max(1e-12)).ln()
            };
            if !points.is_empty() {
                let mean = points.iter().map(ratio).sum::<f64>() / points.len() as f64;
                peak_flops.insert(*dtype, fitted.peak * mean.exp());
            }
        }
        let (link, latency) = fit_link(&self.all_reduce).unwrap_or((self.memory_bandwidth, 1e-6));
        let calibration = Calibration {
            matmul_efficiency: 0.95,
            matmul_k_half: fitted.k_half.min(1e5),
            memory_efficiency: 1.0,
            attention_efficiency: self.attention_efficiency(&fitted),
            kernel_overhead_us: (fitted.overhead * 1e6).min(1e5),
            link_efficiency: 1.0,
            link_latency_us: latency * 1e6,
            step_overhead_ms: self.step_overhead_ms,
            framework_gb: self.framework_gb,
            operator_efficiency: self.operator_rate() / self.memory_bandwidth,
            basis: "measured on this node".to_owned(),
        };
        let gpu = Gpu {
            name: self.name.clone(),
            generation: "measured".to_owned(),
            memory_bytes: self.memory_bytes,
            memory_bandwidth: self.memory_bandwidth,
            peak_flops,
            link_bandwidth: link,
            link_domain: self.devices,
            at_once: self.at_once,
            sms: 1,
            power_w: self.power_w.unwrap_or(0.0),
            price_per_hour: self.price_per_hour.unwrap_or(0.0),
            calibration,
            source: "measured profile".to_owned(),
        };
        let tcp = fit_link(&self.all_reduce_tcp);
        let network = Network {
            name: "measured node".to_owned(),
            aliases: Vec::new(),
            gpus_per_node: self.devices,
            nic_gbps: tcp.map_or(0.0, |(rate, _)| rate * 8.0 / 1e9),
            efficiency: 1.0,
            latency_us: tcp.map_or(0.0, |(_, latency)| latency * 1e6),
            straggler: 0.0,
            source: "one measured node; between nodes, TCP over its loopback".to_owned(),
        };
        Machines { gpu, network }
    }

    /// Returns how far the fitted products are off the measured ones, as a share: the median.
    #[must_use]
    pub fn matmul_fit_error(&self) -> f64 {
        let machines = self.machines();
        let Ok(peak) = machines.gpu.peak(self.dtype) else { return f64::NAN };
        let device = Device::new(&machines.gpu, self.dtype, peak);
        let mut errors: Vec<f64> = self
            .matmul
            .iter()
            .map(|p| {
                let time = device.matmul(f64::from(p.m), f64::from(p.n), f64::from(p.k), 0.0);
                (time / p.seconds - 1.0).abs()
            })
            .collect();
        errors.sort_by(f64::total_cmp);
        errors.get(errors.len() / 2).copied().unwrap_or(f64::NAN)
    }

    /// Returns the share of the matrix peak that attention reaches: operations of the causal half,
    /// 2 forward and 5 backward of `T^2 E` each a head, over the measured time.
    fn attention_efficiency(&self, fitted: &Device) -> f64 {
        let whole = Device { attention_efficiency: 1.0, overhead: 0.0, ..*fitted };
        let (mut ideal, mut measured) = (0.0, 0.0);
        for p in &self.attention {
            let [t, h, e] = [p.sequence, p.heads, p.head_dim].map(f64::from);
            ideal += whole.fused_attention(3.5 * 2.0 * h * t * t * e, e);
            measured += p.seconds;
        }
        if measured > 0.0 { (ideal / measured).clamp(1e-3, 1.0) } else { 0.5 }
    }

    /// Returns bytes/s of a layer's operators, all together.
    fn operator_rate(&self) -> f64 {
        let bytes: f64 = self.operators.iter().map(|p| p.bytes).sum();
        let seconds: f64 = self.operators.iter().map(|p| p.seconds).sum();
        if seconds > 0.0 { bytes / seconds } else { self.memory_bandwidth }
    }
}

/// Returns bytes/s and seconds of a step, by least squares of the logarithms of
/// `2 (g-1)/g bytes / bw + 2 (g-1)/g latency`; nothing without points.
fn fit_link(points: &[CollectivePoint]) -> Option<(f64, f64)> {
    if points.is_empty() {
        return None;
    }
    let mut objective = |x: &[f64]| -> f64 {
        points
            .iter()
            .map(|p| {
                let g = f64::from(p.ranks);
                let steps = 2.0 * (g - 1.0);
                let time = steps / g * p.bytes / x[0].exp() + steps / g * x[1].exp();
                (time / p.seconds).ln().powi(2)
            })
            .sum()
    };
    let largest = points.iter().map(|p| 2.0 * p.bytes / p.seconds).fold(1.0, f64::max);
    let found = minimise(&mut objective, &[largest.ln(), -11.0], &[0.5, 1.0], 2000);
    Some((found.x[0].exp(), found.x[1].exp()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(peak: f64, overhead: f64) -> Profile {
        let point = |m: u32, n: u32, k: u32| {
            let ops = 2.0 * f64::from(m) * f64::from(n) * f64::from(k);
            MatmulPoint { m, n, k, seconds: ops / peak + overhead }
        };
        Profile {
            name: "cpu".to_owned(),
            dtype: Dtype::Fp32,
            memory_bytes: 16e9,
            memory_bandwidth: 20e9,
            devices: 4,
            threads: 1,
            at_once: 0,
            matmul_in: BTreeMap::new(),
            operators: Vec::new(),
            attention: vec![AttentionPoint {
                sequence: 256,
                heads: 48,
                head_dim: 64,
                // A quarter of the rate with heads of 64: width 0.75.
                seconds: 7.0 * 48.0 * 65536.0 * 64.0 / (0.75 * 0.25 * peak),
            }],
            all_reduce_tcp: [1e4, 1e6, 1e8]
                .map(|bytes| CollectivePoint { ranks: 2, bytes, seconds: bytes / 1e9 + 80e-6 })
                .to_vec(),
            matmul: vec![
                point(256, 256, 256),
                point(512, 512, 512),
                point(1024, 1024, 1024),
                point(2048, 1024, 512),
            ],
            all_reduce: [1e4, 1e6, 1e8]
                .map(|bytes| CollectivePoint {
                    ranks: 4,
                    bytes,
                    seconds: 1.5 * bytes / 2e9 + 1.5 * 50e-6,
                })
                .to_vec(),
            step_overhead_ms: 1.0,
            framework_gb: 0.1,
            power_w: None,
            price_per_hour: None,
        }
    }

    #[test]
    fn a_profile_predicts_what_it_measured() {
        let profile = made(50e9, 1e-4);
        let machines = profile.machines();
        let device =
            Device::new(&machines.gpu, Dtype::Fp32, machines.gpu.peak(Dtype::Fp32).unwrap());
        for p in &profile.matmul {
            let time = device.matmul(f64::from(p.m), f64::from(p.n), f64::from(p.k), 0.0);
            assert!((time / p.seconds - 1.0).abs() < 0.1, "{p:?}: {time}");
        }
        assert!((machines.gpu.link_bandwidth / 2e9 - 1.0).abs() < 0.02);
        assert!((machines.gpu.calibration.link_latency_us / 50.0 - 1.0).abs() < 0.05);
        // One gigabyte a second is 8 Gbit/s.
        assert!((machines.network.nic_gbps / 8.0 - 1.0).abs() < 0.02);
        // Attention runs at a quarter of 50 GFLOP/s, whatever peak the products were fitted to.
        let attention = device.attention_peak * device.attention_efficiency;
        assert!((attention / 12.5e9 - 1.0).abs() < 0.01, "{attention}");
    }

    #[test]
    fn a_bad_profile_has_a_place() {
        let text = serde_json::to_string_pretty(&made(50e9, 1e-4)).unwrap();
        assert!(Profile::read("p.json", &text).is_ok());
        let error = Profile::read("p.json", &text.replace("\"devices\": 4", "\"devices\": 0"));
        assert!(error.unwrap_err().to_string().starts_with("p.json:"));
        assert!(Profile::read("p.json", "{").is_err());
    }
}
