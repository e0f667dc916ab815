//! Why a plan cannot be made: what is wrong, by how much, and the nearest that works.

/// Why a request to the planner failed. Every variant carries its evidence.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A name that no catalogue holds.
    #[error("unknown {kind} '{name}'{}", did_you_mean(nearest))]
    UnknownName {
        /// What was looked up: `model`, `gpu`, `network`, `field`, ...
        kind: &'static str,
        /// The name as given.
        name: String,
        /// The nearest names that exist, best first.
        nearest: Vec<String>,
    },
    /// A catalogue, profile or manifest text that does not parse or contradicts itself.
    #[error("{file}:{line}:{column}: {message}")]
    Text {
        /// The file's name as the caller gave it.
        file: String,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong, and what was expected.
        message: String,
    },
    /// A table row that cannot be read.
    #[error("{file}:{line}: column '{column}': {message}")]
    Csv {
        /// The file's name as the caller gave it.
        file: String,
        /// Line, from 1, the header included.
        line: u64,
        /// The name of the column at fault.
        column: String,
        /// What is wrong, and what was expected.
        message: String,
    },
    /// A Hugging Face configuration of an architecture that the planner has no shape for.
    #[error(
        "architecture '{architecture}' is not covered, and is not planned as another; covered: {covered}"
    )]
    UnsupportedArchitecture {
        /// The architecture or model type as the configuration names it.
        architecture: String,
        /// The covered ones, comma-separated.
        covered: String,
    },
    /// A value outside what is possible, with the nearest that works.
    #[error("{field}: {message}")]
    Invalid {
        /// The option or field at fault.
        field: String,
        /// What is wrong, with the numbers and the nearest that works.
        message: String,
    },
    /// No split fits the devices' memory.
    #[error(
        "no split of {model} over {gpus} x {gpu} fits: the leanest needs {needed_gib:.1} GiB per GPU of {limit_gib:.1} GiB, {short_gib:.1} GiB short ({leanest}); {nearest}"
    )]
    DoesNotFit {
        /// The model.
        model: String,
        /// GPUs asked for.
        gpus: u32,
        /// The GPU type.
        gpu: String,
        /// Least bytes per GPU over all splits, in GiB.
        needed_gib: f64,
        /// What one GPU offers, in GiB.
        limit_gib: f64,
        /// The difference, in GiB.
        short_gib: f64,
        /// The leanest split.
        leanest: String,
        /// The nearest request that works.
        nearest: String,
    },
    /// No number of GPUs up to the limit meets the deadline.
    #[error(
        "{model} cannot be trained in {deadline_days:.1} days on {gpu}: the fastest of up to {max_gpus} GPUs takes {best_days:.1} days on {best_gpus}, {short_days:.1} days too long; {nearest}"
    )]
    Deadline {
        /// The model.
        model: String,
        /// The GPU type.
        gpu: String,
        /// Days allowed.
        deadline_days: f64,
        /// GPUs looked at.
        max_gpus: u32,
        /// Days of the fastest.
        best_days: f64,
        /// GPUs of the fastest.
        best_gpus: u32,
        /// Days missing.
        short_days: f64,
        /// The nearest request that works.
        nearest: String,
    },
}

impl PlanError {
    /// Makes an [`PlanError::Invalid`].
    pub(crate) fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), message: message.into() }
    }

    /// Makes an [`PlanError::UnknownName`] with the nearest of the names that exist.
    pub(crate) fn unknown<'a>(
        kind: &'static str,
        name: &str,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        Self::UnknownName { kind, name: name.to_owned(), nearest: nearest_names(name, names) }
    }
}

/// Returns up to three names that resemble `name`, best first.
#[must_use]
pub fn nearest_names<'a>(name: &str, names: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let wanted = name.to_lowercase();
    let mut scored: Vec<(f64, &str)> = names
        .into_iter()
        .map(|known| {
            let lower = known.to_lowercase();
            // A part of a name counts for as much of it as it covers.
            let covered =
                lower.len().min(wanted.len()) as f64 / lower.len().max(wanted.len()) as f64;
            let contains = lower.contains(&wanted) || wanted.contains(&lower);
            let bonus = if contains && !wanted.is_empty() { 0.3 * covered } else { 0.0 };
            let alike = strsim::jaro_winkler(&wanted, &lower)
                + strsim::normalized_damerau_levenshtein(&wanted, &lower);
            let score = alike / 2.0 + bonus;
            (score, known)
        })
        .filter(|(score, _)| *score > 0.5)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.dedup_by(|a, b| a.1 == b.1);
    scored.into_iter().take(3).map(|(_, known)| known.to_owned()).collect()
}

fn did_you_mean(nearest: &[String]) -> String {
    if nearest.is_empty() { String::new() } else { format!("; nearest: {}", nearest.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_keyboard_finds_its_name() {
        let names = ["a100-80g", "a100-40g", "h100-sxm", "v100-32g"];
        assert_eq!(nearest_names("a100-80gb", names)[0], "a100-80g");
        assert_eq!(nearest_names("h100", names)[0], "h100-sxm");
        assert!(nearest_names("zzzz", names).is_empty());
        let error = PlanError::unknown("gpu", "h10-sxm", names);
        assert!(
            error.to_string().starts_with("unknown gpu 'h10-sxm'; nearest: h100-sxm"),
            "{error}"
        );
    }
}
