//! The policies that can be compared: the scheduler's own, simple ones, and files.

use drumline_placement::Seed;
use drumline_scheduler::{Options, Order, Scoring};

use crate::fault::FileFault;

/// A policy with its name in reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Its name.
    pub name: String,
    /// How it decides.
    pub options: Options,
}

/// The names of the policies that come with the program, and what they do.
pub const POLICIES: &[(&str, &str)] = &[
    ("drumline", "the scheduler as it runs in production"),
    ("fifo", "arrival alone: the first that does not fit blocks those behind it; no preemption"),
    ("shortest-first", "the shortest expected run first; no reservations, no preemption"),
    ("fair-share-without-backfill", "as drumline, but nobody starts around a reservation"),
    ("random", "as drumline, on any place that fits"),
    ("first-fit", "as drumline, on the first place that fits"),
    ("best-fit", "as drumline, on the machines with the least left over"),
    ("dot-product", "as drumline, where what is left and what is asked for have the least product"),
    ("gpu-packing", "as drumline, on GPUs in use, then on machines in use, then on idle ones"),
    ("fgd", "as drumline, where fragmentation grows least (Weng et al. 2023)"),
];

impl Policy {
    /// Returns the policy of this name, deciding with this seed.
    #[must_use]
    pub fn named(name: &str, seed: u64) -> Option<Self> {
        let simple = |order| Options {
            order,
            backfill: false,
            preemption: false,
            consolidation: false,
            ..Options::default()
        };
        let placed = |scoring| Options { scoring, ..Options::default() };
        let options = match name {
            "drumline" => Options::default(),
            "fifo" => simple(Order::Fifo),
            "shortest-first" => simple(Order::ShortestFirst),
            "fair-share-without-backfill" => Options { backfill: false, ..Options::default() },
            "random" => placed(Scoring::Random),
            "first-fit" => placed(Scoring::FirstFit),
            "best-fit" => placed(Scoring::BestFit),
            "dot-product" => placed(Scoring::DotProduct),
            "gpu-packing" => placed(Scoring::GpuPacking),
            "fgd" => placed(Scoring::FragmentationGradient),
            _ => return None,
        };
        Some(Self { name: name.to_owned(), options: Options { seed: Seed(seed), ..options } })
    }

    /// Reads a policy file: the scheduler's options as TOML. What is not there is as in
    /// `drumline`.
    ///
    /// # Errors
    /// [`FileFault`] when the file is malformed, or has a key or value that there is not.
    pub fn read(file: &str, text: &str) -> Result<Self, FileFault> {
        let options: Options =
            toml::from_str(text).map_err(|error| FileFault::toml(file, text, &error))?;
        let stem = std::path::Path::new(file).file_stem();
        let name = stem.map_or(file.to_owned(), |stem| stem.to_string_lossy().into_owned());
        Ok(Self { name, options })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_that_is_listed_can_be_had() {
        for (name, _) in POLICIES {
            let policy = Policy::named(name, 7).unwrap();
            assert_eq!((policy.name.as_str(), policy.options.seed), (*name, Seed(7)));
        }
        assert_eq!(Policy::named("best", 7), None);
    }

    #[test]
    fn a_policy_file_is_refused_with_its_place() {
        let read = |text| Policy::read("dir/mine.toml", text).map_err(|fault| fault.to_string());
        let mine = read("order = \"fifo\"\nbackfill = false\n").unwrap();
        assert_eq!((mine.name.as_str(), mine.options.order), ("mine", Order::Fifo));
        let wrong = read("backfill = true\norder = \"newest\"\n").unwrap_err();
        assert!(wrong.starts_with("dir/mine.toml:2:9: unknown variant `newest`"), "{wrong}");
        let wrong = read("\nbackfil = true\n").unwrap_err();
        assert!(wrong.starts_with("dir/mine.toml:2:1: unknown field `backfil`"), "{wrong}");
    }
}
