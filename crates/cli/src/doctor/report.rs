//! The report: verdicts, and how they are shown.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::libraries::Found;
use crate::output;

/// Whether something works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    /// It does.
    Good,
    /// It was not tried.
    Untested,
    /// It does not.
    Bad,
}

impl Verdict {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Untested => "untested",
            Self::Bad => "bad",
        }
    }
}

/// One test of one device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Check {
    pub(super) name: String,
    /// What was measured, in `unit`.
    pub(super) value: Option<f64>,
    pub(super) unit: String,
    pub(super) verdict: Verdict,
    /// What is wrong, or what was compared.
    pub(super) message: String,
}

/// A device and its tests.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Device {
    pub(super) name: String,
    pub(super) model: String,
    pub(super) checks: Vec<Check>,
}

impl Device {
    /// Bad if anything is; good if something was tried and nothing is bad.
    pub(super) fn verdict(&self) -> Verdict {
        let has = |verdict| self.checks.iter().any(|check| check.verdict == verdict);
        match (has(Verdict::Bad), has(Verdict::Good)) {
            (true, _) => Verdict::Bad,
            (false, true) => Verdict::Good,
            (false, false) => Verdict::Untested,
        }
    }
}

/// Everything.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Report {
    pub(super) found: Found,
    pub(super) devices: Vec<Device>,
    pub(super) require_gpu: bool,
}

impl Report {
    fn gpu_works(&self) -> bool {
        // The first device is the processor.
        self.devices.iter().skip(1).any(|device| device.verdict() != Verdict::Bad)
    }

    pub(super) fn verdict(&self) -> Verdict {
        let broken = self.found.libraries.iter().any(|item| item.broken);
        let sick = self.devices.iter().any(|device| device.verdict() == Verdict::Bad);
        let silent = !self.found.silent.is_empty();
        let wanting = self.require_gpu && !self.gpu_works();
        if broken || sick || silent || wanting { Verdict::Bad } else { Verdict::Good }
    }

    fn summary(&self) -> String {
        let gpus = self.found.gpus.len() + self.found.silent.len();
        let bad = self.devices.iter().filter(|d| d.verdict() == Verdict::Bad).count();
        let broken: Vec<_> =
            self.found.libraries.iter().filter(|item| item.broken).map(|i| i.name).collect();
        let mut text = match gpus {
            0 => "no GPU".to_owned(),
            1 => "1 GPU".to_owned(),
            more => format!("{more} GPUs"),
        };
        if bad + self.found.silent.len() > 0 {
            let _ = write!(text, "; {} devices do not work", bad + self.found.silent.len());
        }
        if !broken.is_empty() {
            let _ = write!(text, "; cannot be used: {}", broken.join(", "));
        }
        if self.require_gpu && !self.gpu_works() {
            text.push_str("; one that works is required");
        }
        text
    }

    pub(super) fn json(&self) -> Value {
        let found = &self.found;
        let libraries: Vec<_> = found
            .libraries
            .iter()
            .map(|item| {
                json!({
                    "name": item.name,
                    "purpose": item.purpose,
                    "found": item.problem.is_empty(),
                    "file": item.file,
                    "version": item.version,
                    "problem": item.problem,
                    "remedy": item.remedy,
                })
            })
            .collect();
        let gpus: Vec<_> = found
            .gpus
            .iter()
            .map(|seen| {
                json!({
                    "index": seen.gpu.index,
                    "uuid": seen.gpu.uuid,
                    "model": seen.gpu.model,
                    "memory_bytes": seen.gpu.memory_bytes,
                    "pci_bus_id": seen.gpu.pci_bus_id,
                    "numa_node": seen.gpu.numa_node,
                    "capability": seen.gpu.capability.map(|(major, minor)| format!("{major}.{minor}")),
                    "mig": seen.gpu.mig,
                    "nvlinks": seen.gpu.nvlinks,
                })
            })
            .collect();
        let devices: Vec<_> = self
            .devices
            .iter()
            .map(|device| {
                let checks: Vec<_> = device
                    .checks
                    .iter()
                    .map(|check| {
                        json!({
                            "name": check.name,
                            "value": check.value,
                            "unit": check.unit,
                            "verdict": check.verdict.as_str(),
                            "message": check.message,
                        })
                    })
                    .collect();
                json!({
                    "device": device.name,
                    "model": device.model,
                    "verdict": device.verdict().as_str(),
                    "checks": checks,
                })
            })
            .collect();
        json!({
            "verdict": self.verdict().as_str(),
            "summary": self.summary(),
            "driver": found.versions.driver,
            "cuda": found.versions.cuda,
            "libraries": libraries,
            "search_path": found.search_path,
            "gpus": gpus,
            "silent": found.silent.iter().map(|(index, why)| json!({"index": index, "why": why})).collect::<Vec<_>>(),
            "topology": found.near,
            "devices": devices,
        })
    }

    pub(super) fn text(&self) -> String {
        let rows: Vec<_> = self
            .found
            .libraries
            .iter()
            .map(|item| {
                let state = if item.problem.is_empty() {
                    item.file.clone()
                } else if item.broken {
                    "cannot be used".to_owned()
                } else {
                    "not found".to_owned()
                };
                vec![item.name.to_owned(), item.version.clone(), state, item.purpose.to_owned()]
            })
            .collect();
        let mut text = output::table(&["LIBRARY", "VERSION", "WHERE", "FOR"], &rows);
        let _ =
            writeln!(text, "\nsearched: the loader's cache, {}", self.found.search_path.join(", "));
        for item in self.found.libraries.iter().filter(|item| !item.problem.is_empty()) {
            let _ = writeln!(text, "{}: {}\n  {}", item.name, item.problem, item.remedy);
        }
        for (index, why) in &self.found.silent {
            let _ = writeln!(text, "GPU {index} does not answer: {why}");
        }
        for near in &self.found.near {
            let _ = writeln!(text, "GPUs {near}");
        }
        let mut rows = Vec::new();
        for device in &self.devices {
            for check in &device.checks {
                let value =
                    check.value.map_or_else(String::new, |v| format!("{v:.1} {}", check.unit));
                rows.push(vec![
                    device.name.clone(),
                    check.name.clone(),
                    value,
                    check.verdict.as_str().to_owned(),
                    check.message.clone(),
                ]);
            }
        }
        text.push('\n');
        text.push_str(&output::table(&["DEVICE", "TEST", "RESULT", "VERDICT", ""], &rows));
        for device in &self.devices {
            let verdict = device.verdict().as_str();
            let _ = writeln!(text, "{} ({}): {verdict}", device.name, device.model);
        }
        let _ = writeln!(text, "{}: {}", self.verdict().as_str(), self.summary());
        text
    }
}

#[cfg(test)]
mod tests {
    use super::super::libraries::Item;
    use super::*;

    fn device(verdicts: &[Verdict]) -> Device {
        let check = |verdict: &Verdict| Check {
            name: "test".to_owned(),
            value: None,
            unit: String::new(),
            verdict: *verdict,
            message: String::new(),
        };
        Device {
            name: "d".to_owned(),
            model: String::new(),
            checks: verdicts.iter().map(check).collect(),
        }
    }

    #[test]
    fn one_bad_test_makes_a_device_bad_and_none_leaves_it_untested() {
        use Verdict::{Bad, Good, Untested};
        for (checks, expected) in [
            (&[Good, Good][..], Good),
            (&[Good, Untested], Good),
            (&[Good, Bad], Bad),
            (&[Untested], Untested),
            (&[], Untested),
        ] {
            assert_eq!(device(checks).verdict(), expected);
        }
    }

    #[test]
    fn absence_is_no_failure_unless_a_gpu_is_required() {
        let item = |broken| Item {
            name: "NVML",
            purpose: "",
            file: String::new(),
            version: String::new(),
            problem: "none".to_owned(),
            remedy: "install".to_owned(),
            broken,
        };
        let report = |broken, require_gpu| Report {
            found: Found { libraries: vec![item(broken)], ..Found::default() },
            devices: vec![device(&[Verdict::Good])],
            require_gpu,
        };
        assert_eq!(report(false, false).verdict(), Verdict::Good);
        assert_eq!(report(false, true).verdict(), Verdict::Bad);
        assert_eq!(report(true, false).verdict(), Verdict::Bad);
        assert!(report(true, false).text().contains("install"));
        let silent = Report {
            found: Found { silent: vec![(0, "lost".to_owned())], ..Found::default() },
            ..report(false, false)
        };
        assert_eq!(silent.verdict(), Verdict::Bad);
    }
}
