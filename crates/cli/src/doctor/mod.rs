//! `drumline doctor`: what this machine has, what is missing and how to get it, and whether each
//! device works.
//!
//! It needs no cluster. Everything is asked behind a deadline or behind a look at whether it is there:
//! a broken driver must not break the program that is meant to say so.

mod gpu;
mod libraries;
mod report;
mod selftest;

use clap::Args;

pub(crate) use gpu::test_this_process as test_gpu;

use crate::failure::{Class, Failure};
use crate::output::{self, Format, note};
use libraries::Found;
use report::{Report, Verdict};

/// Look for GPUs and their libraries, and test every device.
///
/// The exit code is 1 when a device does not work, or a driver that is installed cannot be used. A
/// machine without any GPU is fine, unless one is required.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Fail when there is no GPU that works.
    #[arg(long)]
    pub require_gpu: bool,
    /// Only look; test no device.
    #[arg(long)]
    pub no_test: bool,
}

/// Runs the command.
///
/// # Errors
/// Failed, when something that should work does not; the report is written all the same.
pub async fn run(args: &DoctorArgs, format: Format) -> Result<(), Failure> {
    let (require_gpu, test) = (args.require_gpu, !args.no_test);
    if test {
        note("testing each device takes up to a minute");
    }
    let report = tokio::task::spawn_blocking(move || examine(require_gpu, test))
        .await
        .map_err(|error| Failure::failed(error.to_string()))?;
    output::value(format, &report.json(), || report.text())?;
    // The report says it all.
    if report.verdict() == Verdict::Good { Ok(()) } else { Err(Failure::said(Class::Failed)) }
}

fn examine(require_gpu: bool, test: bool) -> Report {
    let found = Found::look();
    let mut devices = vec![selftest::cpu(test)];
    devices.extend(found.gpus.iter().map(|seen| gpu::test(seen, &found, test)));
    if test {
        devices.extend(gpu::together(&devices[1..], &found));
    }
    Report { found, devices, require_gpu }
}
