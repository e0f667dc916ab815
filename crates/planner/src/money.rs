//! GPU-hours, money and energy.

use serde::{Deserialize, Serialize};

/// What an hour costs and draws.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Prices {
    /// US dollars per GPU-hour.
    pub gpu_hour: f64,
    /// Board power of one GPU in watts.
    pub gpu_power_w: f64,
    /// Share of the board power that training draws on average.
    pub draw: f64,
    /// Power of the rest of a node per GPU, as a share of the board power: processors, memory,
    /// fans, adapters (DGX H100: 10.2 kW for 8 x 700 W, so 0.8; 0.4 at work).
    pub host_share: f64,
    /// Power of the building over that of the machines (PUE).
    pub pue: f64,
}

impl Prices {
    /// The defaults for a GPU of this price and power.
    #[must_use]
    pub fn of(price_per_hour: f64, power_w: f64) -> Self {
        Self {
            gpu_hour: price_per_hour,
            gpu_power_w: power_w,
            draw: 0.8,
            host_share: 0.4,
            pue: 1.15,
        }
    }

    /// Computes what `gpus` cost for `hours`, failures included.
    #[must_use]
    pub fn bill(&self, gpus: f64, hours: f64, tokens: f64) -> Bill {
        let gpu_hours = gpus * hours;
        let kwh = gpu_hours * self.gpu_power_w / 1e3 * (self.draw + self.host_share) * self.pue;
        let cost = gpu_hours * self.gpu_hour;
        Bill { gpu_hours, cost, kwh, cost_per_million_tokens: cost / (tokens / 1e6) }
    }
}

/// The bill of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bill {
    /// GPU-hours.
    pub gpu_hours: f64,
    /// US dollars.
    pub cost: f64,
    /// Kilowatt-hours at the building's meter.
    pub kwh: f64,
    /// US dollars per million tokens trained on or generated.
    pub cost_per_million_tokens: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deepseek_v3_costs_what_its_report_says() {
        // 2,788 K H800 hours at $2 are $5.576 M (2412.19437, table 1).
        let bill = Prices::of(2.0, 700.0).bill(2048.0, 2_788_000.0 / 2048.0, 14.8e12);
        assert!((bill.cost - 5.576e6).abs() < 1.0, "{bill:?}");
        assert!((bill.cost_per_million_tokens - 0.37676).abs() < 1e-4);
        // By hand: 2.788e6 h * 0.7 kW * 1.2 * 1.15.
        assert!((bill.kwh - 2.788e6 * 0.7 * 1.2 * 1.15).abs() < 1.0);
    }
}
