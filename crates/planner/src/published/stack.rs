//! What software a published run had, by when it was published.

use crate::catalogue::{Dtype, Gpu};
use crate::split::Stack;

/// Says what software a run had, from when it was published: fused gradient accumulation came with
/// Korthikanti et al. (May 2022), fused attention and overlap became common with 2023.
///
/// The date is the arXiv number's month, else January of a year in the text; without either, a
/// GPU from Hopper on, or a sharded bf16 run, is taken as of 2023 or later.
#[must_use]
pub fn infer_stack(source: &str, gpu: &Gpu, dtype: Dtype, zero: u32) -> Stack {
    let recent_gpu =
        matches!(gpu.generation.as_str(), "hopper" | "blackwell" | "ada" | "cdna3" | "ascend");
    if recent_gpu || dtype == Dtype::Fp8 {
        return Stack::Overlapped;
    }
    // A paper of today that names Megatron-LM means its baseline, which hides nothing.
    let baseline = source.to_lowercase().contains("megatron-lm");
    match published_month(source) {
        Some(month) if month >= 2301 && baseline => Stack::Fused,
        Some(month) if month >= 2301 => Stack::Overlapped,
        Some(month) if month >= 2205 => Stack::Fused,
        Some(_) => Stack::Eager,
        None if zero >= 1 && dtype == Dtype::Bf16 => Stack::Overlapped,
        None => Stack::Eager,
    }
}

/// Returns a source's month as `YYMM`.
fn published_month(source: &str) -> Option<u32> {
    let numbers: Vec<(usize, &str)> = source
        .split(|c: char| !c.is_ascii_digit() && c != '.')
        .filter(|part| !part.is_empty())
        .map(|part| (part.len(), part))
        .collect();
    let arxiv = numbers.iter().find_map(|(_, part)| {
        let (month, number) = part.split_once('.')?;
        let valid = month.len() == 4 && (4..=5).contains(&number.len());
        let value: u32 = month.parse().ok()?;
        (valid && (1..=12).contains(&(value % 100))).then_some(value)
    });
    arxiv.or_else(|| {
        numbers.iter().find_map(|(_, part)| {
            let year: u32 = part.trim_matches('.').parse().ok()?;
            (2010..2100).contains(&year).then(|| (year - 2000) * 100 + 1)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::Catalogue;

    #[test]
    fn the_stack_follows_the_date() {
        let catalogue = Catalogue::builtin();
        let a100 = catalogue.gpu("a100-80g").unwrap();
        let h100 = catalogue.gpu("h100-sxm").unwrap();
        let stack = |source: &str, gpu: &Gpu| infer_stack(source, gpu, Dtype::Bf16, 0);
        assert_eq!(stack("Narayanan et al. 2021 (2104.04473) table 1", &a100), Stack::Eager);
        assert_eq!(stack("MT-NLG 530B (Smith et al. 2022)", &a100), Stack::Eager);
        assert_eq!(stack("Korthikanti et al. 2022 (2205.05198) table 5", &a100), Stack::Fused);
        assert_eq!(stack("MegaScale (2402.15627) 175B", &a100), Stack::Overlapped);
        assert_eq!(stack("MegaScale (2402.15627) 175B, Megatron-LM", &a100), Stack::Fused);
        assert_eq!(stack("Megatron-Core README model table (H100)", &h100), Stack::Overlapped);
    }
}
