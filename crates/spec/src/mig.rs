//! What an instance of a GPU that MIG divides is called, and who means it.

/// Returns whether a model is an instance of a GPU that MIG divides: one of its words is `MIG`, as in
/// `NVIDIA A100-SXM4-40GB MIG 1g.5gb`, or it names a profile, as `1g.10gb`.
///
/// Words are runs of letters and digits; case does not count.
#[must_use]
pub fn is_mig_instance(model: &str) -> bool {
    let words: Vec<&str> = words(model).collect();
    words.iter().any(|word| word.eq_ignore_ascii_case("mig"))
        || words.windows(2).any(|pair| is_slices(pair[0]) && is_amount(pair[1], "gb"))
}

/// Returns whether a name of a model, which may be a part of it, means such instances: it says `MIG`,
/// or the number of slices, as `1g`.
#[must_use]
pub fn means_mig_instances(name: &str) -> bool {
    words(name).any(|word| word.eq_ignore_ascii_case("mig") || is_slices(word))
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty())
}

/// A GPU has a handful of slices: no unit of memory is written so.
fn is_slices(word: &str) -> bool {
    is_amount(word, "g") && word.len() == 2
}

fn is_amount(word: &str, unit: &str) -> bool {
    let digits = word.bytes().take_while(u8::is_ascii_digit).count();
    digits > 0 && word.get(digits..).is_some_and(|rest| rest.eq_ignore_ascii_case(unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_is_told_from_a_whole_gpu() {
        for (model, yes) in [
            ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", true),
            ("NVIDIA-H100-80GB-HBM3-MIG-1g.10gb", true),
            ("MIG-1g.10gb.me", true),
            ("1g.10gb", true),
            ("NVIDIA-A100-SXM4-40GB", false),
            ("NVIDIA H100 80GB HBM3", false),
            ("Tesla K40 12G", false),
            ("Migrator 9000", false),
            ("1g", false),
            ("", false),
        ] {
            assert_eq!(is_mig_instance(model), yes, "{model}");
        }
        for (name, yes) in [
            ("1g.10gb", true),
            ("mig", true),
            ("A100-SXM4-40GB-MIG-3g.20gb", true),
            ("a100", false),
            ("H100-80GB", false),
            ("", false),
        ] {
            assert_eq!(means_mig_instances(name), yes, "{name}");
        }
    }
}
