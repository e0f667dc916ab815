//! Reads a description of links and adapters as tables write it.

use crate::catalogue::{Catalogue, Gpu, Network};
use crate::split::Machines;

/// Reads a description such as `NVLink 600GB/s; 8x200Gb/s HDR per 8-GPU node`. What it does not
/// say is the GPU's usual.
#[must_use]
pub fn parse_interconnect(text: &str, mut gpu: Gpu, catalogue: &Catalogue) -> Machines {
    let mut network: Network = catalogue.default_network(&gpu);
    let lower = text.to_lowercase();
    let roce = lower.contains("roce") || lower.contains("ethernet") || lower.contains("efa");
    if roce && let Ok(known) = catalogue.network("roce-8x400") {
        network.efficiency = known.efficiency;
        network.latency_us = known.latency_us;
        network.straggler = known.straggler;
    }
    // Node size: "8-GPU".
    if let Some(at) = lower.find("-gpu") {
        let digits: String =
            lower[..at].chars().rev().take_while(char::is_ascii_digit).collect::<String>();
        let size: String = digits.chars().rev().collect();
        if let Ok(size) = size.parse::<u32>()
            && (1..=1024).contains(&size)
        {
            network.gpus_per_node = size;
        }
    }
    for (at, unit, bits) in rates(&lower) {
        let before = &lower[..at];
        let before = before.trim_end();
        let number: String =
            before.chars().rev().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
        let number: String = number.chars().rev().collect();
        let Ok(rate) = number.parse::<f64>() else { continue };
        let rest = before[..before.len() - number.len()].trim_end();
        // The clause that the rate stands in says what it is a rate of.
        let clause = lower[..at].rsplit([';', ',']).next().unwrap_or("");
        let after = &lower[at + unit..];
        let per_gpu = after.split([';', ',']).next().unwrap_or("").contains("per gpu");
        if ["nvlink", "nvswitch", "hccs", "fabric"].iter().any(|w| clause.contains(w)) {
            // Datasheets and papers quote both directions together.
            gpu.link_bandwidth = rate / bits * 1e9 / 2.0;
            continue;
        }
        let count: String = rest
            .strip_suffix('x')
            .map(|r| r.trim_end().chars().rev().take_while(char::is_ascii_digit).collect())
            .unwrap_or_default();
        let count: String = count.chars().rev().collect();
        let count = count.parse::<f64>().unwrap_or(1.0);
        let gbps = count * rate * 8.0 / bits;
        network.nic_gbps = if per_gpu { gbps } else { gbps / f64::from(network.gpus_per_node) };
    }
    if !text.is_empty() {
        network.name = text.to_owned();
    }
    Machines { gpu, network }
}

// Finds "gb/s" in bits or bytes: the original's case tells, so look at the digits' neighbour.
fn rates(lower: &str) -> Vec<(usize, usize, f64)> {
    let mut found = Vec::new();
    for (at, _) in lower.match_indices("gb/s") {
        // Adapters are quoted in bits, GPU links in bytes.
        let clause = lower[..at].rsplit([';', ',']).next().unwrap_or("");
        let link = ["nvlink", "nvswitch", "hccs", "fabric"].iter().any(|w| clause.contains(w));
        found.push((at, 4, if link { 1.0 } else { 8.0 }));
    }
    for (at, _) in lower.match_indices("gbps") {
        found.push((at, 4, 8.0));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interconnects_are_read_as_tables_write_them() {
        let catalogue = Catalogue::builtin();
        let gpu = || catalogue.gpu("a100-80g").unwrap();
        for (text, link, nic, node) in [
            ("NVLink 600GB/s; 8x200Gb/s HDR per 8-GPU node", 300e9, 200.0, 8),
            ("NVLink 900GB/s; 8x400Gb/s RoCE per 8-GPU node", 450e9, 400.0, 8),
            ("NVLink 600GB/s; 4x200Gb/s per 8-GPU node", 300e9, 100.0, 8),
            ("NVLink 600 GB/s, 4 x 100 Gbps EFA per 8-GPU node", 300e9, 50.0, 8),
            ("NVSwitch 300GB/s; 8x100Gb/s EDR per 16-GPU node", 150e9, 50.0, 16),
            ("", 300e9, 200.0, 8),
        ] {
            let machines = parse_interconnect(text, gpu(), &catalogue);
            assert_eq!(machines.gpu.link_bandwidth, link, "{text}");
            assert_eq!(machines.network.nic_gbps, nic, "{text}");
            assert_eq!(machines.network.gpus_per_node, node, "{text}");
        }
    }
}
