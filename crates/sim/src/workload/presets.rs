//! Workloads that come with the program.

/// A workload file that comes with the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preset {
    /// Its name.
    pub name: &'static str,
    /// The file.
    pub text: &'static str,
}

macro_rules! presets {
    ($($name:literal),* $(,)?) => {
        /// Every workload that comes with the program, the smallest first.
        pub const PRESETS: &[Preset] =
            &[$(Preset { name: $name, text: include_str!(concat!("presets/", $name, ".toml")) },)*];
    };
}

presets!["small", "mixed", "shared", "one-big-run", "research", "fleet"];

impl Preset {
    /// Returns the preset of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        PRESETS.iter().find(|preset| preset.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::Workload;

    #[test]
    fn every_preset_is_legal_and_says_what_it_is() {
        for preset in PRESETS {
            let workload = Workload::read(preset.name, preset.text).unwrap();
            assert_eq!(workload.name, preset.name);
            assert!(workload.about.ends_with('.'), "{}", preset.name);
        }
    }
}
