//! Kubernetes' quantities: `500m`, `2`, `16Gi`.

/// Returns the quantity in thousandths, rounded up; `None` when it is not one.
///
/// Source: the API's "Quantity" serialization format.
#[must_use]
pub fn milli(text: &str) -> Option<u64> {
    const SUFFIXES: [(&str, f64); 15] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("Ei", 1_152_921_504_606_846_976.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
    ];
    let text = text.trim();
    let (digits, factor) = SUFFIXES
        .iter()
        .find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, *factor)))
        .unwrap_or((text, 1.0));
    let value: f64 = digits.parse().ok()?;
    let milli = (value * factor * 1000.0 - 1e-9).ceil();
    (milli.is_finite() && milli >= 0.0).then_some(milli as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_the_api_server_does() {
        for (text, expected) in [
            ("0", Some(0)),
            ("2", Some(2000)),
            ("500m", Some(500)),
            ("1500u", Some(2)),
            ("1.5", Some(1500)),
            ("1Ki", Some(1_024_000)),
            ("12e2", Some(1_200_000)),
            ("1k", Some(1_000_000)),
            ("", None),
            ("x", None),
            ("-1", None),
        ] {
            assert_eq!(milli(text), expected, "{text}");
        }
    }
}
