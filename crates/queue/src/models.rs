//! Device models as small numbers, and the names by which quota and gangs mean them.

use std::collections::BTreeMap;

use drumline_spec::{DeviceKind, is_mig_instance, means_mig_instances};

/// A device model of the fleet, interned. The number means nothing outside one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelId(u16);

impl ModelId {
    /// Returns its place in per-model tables.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// The models that have been seen, in the order in which they were.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Models {
    ids: BTreeMap<(DeviceKind, String), ModelId>,
    names: Vec<(DeviceKind, String)>,
}

impl Models {
    /// Returns the number of the nameless model of a kind, in tables that begin with it.
    pub(crate) fn unknown(kind: DeviceKind) -> ModelId {
        match kind {
            DeviceKind::Cpu => ModelId(0),
            DeviceKind::Gpu => ModelId(1),
        }
    }

    /// Returns the number of a model, a new one if it was never seen. The 65,536th and later models
    /// share one number: a fleet has dozens.
    pub fn intern(&mut self, kind: DeviceKind, model: &str) -> ModelId {
        if let Some(id) = self.ids.get(&(kind, model.to_owned())) {
            return *id;
        }
        let id = ModelId(u16::try_from(self.names.len()).unwrap_or(u16::MAX));
        if id.0 < u16::MAX {
            self.names.push((kind, model.to_owned()));
        }
        self.ids.insert((kind, model.to_owned()), id);
        id
    }

    /// Returns how many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Returns whether none was seen.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Returns every model with its kind and name.
    pub fn iter(&self) -> impl Iterator<Item = (ModelId, DeviceKind, &str)> {
        (0u16..).zip(&self.names).map(|(id, (kind, name))| (ModelId(id), *kind, name.as_str()))
    }

    /// Returns a model's kind and name.
    #[must_use]
    pub fn name(&self, id: ModelId) -> (DeviceKind, &str) {
        self.names.get(id.index()).map_or((DeviceKind::Cpu, ""), |(kind, name)| (*kind, name))
    }
}

/// Returns whether `wanted`, such as `h100`, means the model that its maker calls, for example,
/// `NVIDIA H100 80GB HBM3`: the same text, or each of its words is a word of the model. Case does
/// not count; words are runs of letters and digits. An instance of a GPU that MIG divides is meant only
/// by a name that says so: `a100` means the whole ones.
#[must_use]
pub fn means(wanted: &str, model: &str) -> bool {
    if wanted.eq_ignore_ascii_case(model) {
        return true;
    }
    if is_mig_instance(model) && !means_mig_instances(wanted) {
        return false;
    }
    let words = |text: &str| -> Vec<String> {
        text.split(|c: char| !c.is_alphanumeric())
            .filter(|word| !word.is_empty())
            .map(str::to_lowercase)
            .collect()
    };
    let (wanted, model) = (words(wanted), words(model));
    !wanted.is_empty() && wanted.iter().all(|word| model.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_name_means_the_makers_long_one() {
        for (wanted, model, yes) in [
            ("h100", "NVIDIA H100 80GB HBM3", true),
            ("H100-80GB", "NVIDIA H100 80GB HBM3", true),
            ("h10", "NVIDIA H100 80GB HBM3", false),
            ("a100", "NVIDIA H100 80GB HBM3", false),
            ("", "NVIDIA H100 80GB HBM3", false),
            ("1g.10gb", "1g.10gb", true),
            ("1g.10gb", "NVIDIA-A100-SXM4-80GB-MIG-1g.10gb", true),
            ("a100 mig", "NVIDIA-A100-SXM4-80GB-MIG-1g.10gb", true),
            ("a100", "NVIDIA-A100-SXM4-80GB-MIG-1g.10gb", false),
            ("2g.20gb", "NVIDIA-A100-SXM4-80GB-MIG-1g.10gb", false),
        ] {
            assert_eq!(means(wanted, model), yes, "{wanted}");
        }
    }
}
