//! One look at one GPU. What it does not measure, or answers with a blank, is `None`.

use nvml_wrapper::Device;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{
    Clock, EccCounter, MemoryError, PcieUtilCounter, RetirementCause, TemperatureSensor,
};
use nvml_wrapper::enums::device::{SampleValue, UsedGpuMemory};
use nvml_wrapper::enums::gpm::GpmMetricId;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::gpm::{GpmSample, gpm_metrics_get};
use nvml_wrapper::structs::device::FieldId;

use super::blank::{known_f64, known_u32, known_u64, ratio};
use super::library::Nvml;

/// Field numbers of `nvml.h`, which the wrapper has no methods for.
const MEMORY_TEMPERATURE: u32 = 82;
const REMAPPED_CORRECTABLE: u32 = 142;
const REMAPPED_UNCORRECTABLE: u32 = 143;
const REMAP_PENDING: u32 = 144;
const REMAP_FAILURE: u32 = 145;
const RECOVERY_ACTION: u32 = 230;

/// Hotter than any GPU that still answers, degrees Celsius.
const CELSIUS_MAX: u32 = 200;
/// More than any board draws, milliwatts.
const MILLIWATTS_MAX: u32 = 10_000_000;
/// Faster than any clock, megahertz.
const MEGAHERTZ_MAX: u32 = 20_000;
/// Faster than any link, MiB/s and KB/s.
const RATE_MAX: f64 = 1e8;

/// What the driver says must be done before the GPU is used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Recovery {
    /// Nothing.
    None,
    /// Reset the GPU.
    Reset,
    /// Reboot the node.
    Reboot,
    /// Let the peers' work end, then reset.
    DrainPeers,
    /// Let its work end, then reset.
    DrainAndReset,
}

impl Recovery {
    fn of(code: u64) -> Option<Self> {
        // nvmlDeviceGpuRecoveryAction_t.
        [Self::None, Self::Reset, Self::Reboot, Self::DrainPeers, Self::DrainAndReset]
            .get(usize::try_from(code).ok()?)
            .copied()
    }
}

/// Errors of the memory since the driver was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ecc {
    /// Corrected.
    pub corrected: Option<u64>,
    /// Not corrected.
    pub uncorrected: Option<u64>,
}

/// Hardware counters over the time since the last look; Hopper and newer. Ratios from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Profile {
    /// Time that a multiprocessor had work.
    pub sm_active: Option<f64>,
    /// Warps that were there, of those that could be.
    pub sm_occupancy: Option<f64>,
    /// Time that the tensor cores worked.
    pub tensor_active: Option<f64>,
    /// Share of the memory's bandwidth.
    pub dram_active: Option<f64>,
    /// Bytes a second over PCIe, to and from the GPU's point of view: sent, received.
    pub pcie_bytes_per_second: [Option<f64>; 2],
    /// The same over all NVLinks.
    pub nvlink_bytes_per_second: [Option<f64>; 2],
}

/// A process on the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Use {
    /// Its id, in the namespace of the driver: the host's.
    pub pid: u32,
    /// Memory that it holds; `None` where the driver does not tell.
    pub memory_bytes: Option<u64>,
}

/// One look at one GPU.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sample {
    /// Share of the time in which any kernel ran; reads high during a hang.
    pub utilization: Option<f64>,
    /// Share of the time in which memory was read or written.
    pub memory_busy: Option<f64>,
    /// Memory in use, bytes.
    pub memory_used_bytes: Option<u64>,
    /// Power, watts.
    pub power_watts: Option<f64>,
    /// The limit in force, watts.
    pub power_limit_watts: Option<f64>,
    /// Energy since the driver was loaded, joules.
    pub energy_joules: Option<f64>,
    /// Degrees Celsius of the chip.
    pub temperature_celsius: Option<f64>,
    /// Degrees Celsius of the memory.
    pub memory_temperature_celsius: Option<f64>,
    /// Clock of the multiprocessors, hertz.
    pub sm_hertz: Option<f64>,
    /// Clock of the memory, hertz.
    pub memory_hertz: Option<f64>,
    /// What slows the clocks down now, of [`THROTTLES`].
    pub throttled: Option<Vec<&'static str>>,
    /// Memory errors.
    pub ecc: Ecc,
    /// Pages retired: after several corrected errors, after one that was not.
    pub retired_pages: [Option<u64>; 2],
    /// Rows remapped: after correctable errors, after uncorrectable ones.
    pub remapped_rows: [Option<u64>; 2],
    /// A row waits for a reset to be remapped.
    pub remap_pending: Option<bool>,
    /// A row could not be remapped: the memory is worn out.
    pub remap_failed: Option<bool>,
    /// What the driver wants done.
    pub recovery: Option<Recovery>,
    /// Hardware counters.
    pub profile: Profile,
    /// Who is on it.
    pub processes: Vec<Use>,
    /// The GPU does not answer any more; the text is the driver's.
    pub lost: Option<String>,
}

/// Names of the reasons for slower clocks, as labels.
pub const THROTTLES: &[&str] = &[
    "power_cap",
    "hw_slowdown",
    "sync_boost",
    "sw_thermal",
    "hw_thermal",
    "hw_power_brake",
    "application_setting",
];

impl Sample {
    /// Share of the GPU in use: multiprocessors with work where the hardware counts them, else the
    /// time in which any kernel ran.
    #[must_use]
    pub fn busy(&self) -> Option<f64> {
        self.profile.sm_active.or(self.utilization)
    }
}

/// Looks at GPUs again and again; keeps what the next look needs.
#[derive(Debug)]
pub struct Eye<'nvml> {
    nvml: &'nvml Nvml,
    device: Device<'nvml>,
    gpm: bool,
    before: Option<GpmSample<'nvml>>,
}

impl<'nvml> Eye<'nvml> {
    /// Prepares to look at `device`.
    #[must_use]
    pub fn new(nvml: &'nvml Nvml, device: Device<'nvml>) -> Self {
        let gpm = device.gpm_support().unwrap_or(false);
        Self { nvml, device, gpm, before: None }
    }

    /// Whether the hardware counts what its units do.
    #[must_use]
    pub fn has_profile(&self) -> bool {
        self.gpm
    }

    /// Looks. A GPU that is lost has a sample that says so and nothing else.
    pub fn look(&mut self) -> Sample {
        let d = &self.device;
        let rates = d.utilization_rates();
        // Asked first, and of every kind of GPU: it tells whether anything else makes sense.
        let memory = d.memory_info();
        for error in [rates.as_ref().err(), memory.as_ref().err()].into_iter().flatten() {
            if is_lost(error) {
                let lost = Some(error.to_string());
                return Sample { lost, recovery: self.fields().recovery, ..Sample::default() };
            }
        }
        let rates = rates.ok();
        let share = |percent: u32| known_u32(percent, 110).and_then(|p| ratio(f64::from(p)));
        let watts = |milli: Result<u32, NvmlError>| {
            milli
                .ok()
                .and_then(|milli| known_u32(milli, MILLIWATTS_MAX))
                .map(|m| f64::from(m) / 1e3)
        };
        let hertz = |clock: Clock| {
            let megahertz = d.clock_info(clock).ok().and_then(|mhz| known_u32(mhz, MEGAHERTZ_MAX));
            megahertz.map(|mhz| f64::from(mhz) * 1e6)
        };
        let errors = |kind: MemoryError| {
            d.total_ecc_errors(kind, EccCounter::Volatile).ok().and_then(known_u64)
        };
        let retired =
            |cause: RetirementCause| d.retired_pages(cause).ok().map(|pages| pages.len() as u64);
        let degrees = d.temperature(TemperatureSensor::Gpu).ok();
        let fields = self.fields();
        Sample {
            utilization: rates.as_ref().and_then(|rates| share(rates.gpu)),
            memory_busy: rates.as_ref().and_then(|rates| share(rates.memory)),
            memory_used_bytes: memory.ok().and_then(|memory| known_u64(memory.used)),
            power_watts: watts(d.power_usage()),
            power_limit_watts: watts(d.enforced_power_limit()),
            energy_joules: d
                .total_energy_consumption()
                .ok()
                .and_then(known_u64)
                .map(|millijoules| millijoules as f64 / 1e3),
            temperature_celsius: degrees.and_then(|c| known_u32(c, CELSIUS_MAX)).map(f64::from),
            sm_hertz: hertz(Clock::SM),
            memory_hertz: hertz(Clock::Memory),
            throttled: d.current_throttle_reasons().ok().map(throttles),
            ecc: Ecc {
                corrected: errors(MemoryError::Corrected),
                uncorrected: errors(MemoryError::Uncorrected),
            },
            retired_pages: [
                retired(RetirementCause::MultipleSingleBitEccErrors),
                retired(RetirementCause::DoubleBitEccError),
            ],
            processes: d
                .running_compute_processes()
                .unwrap_or_default()
                .into_iter()
                .map(|process| Use {
                    pid: process.pid,
                    memory_bytes: match process.used_gpu_memory {
                        UsedGpuMemory::Used(bytes) => known_u64(bytes),
                        UsedGpuMemory::Unavailable => None,
                    },
                })
                .collect(),
            profile: self.profile(),
            ..fields
        }
    }

    /// Reads what only fields tell.
    fn fields(&self) -> Sample {
        let ids = [
            MEMORY_TEMPERATURE,
            REMAPPED_CORRECTABLE,
            REMAPPED_UNCORRECTABLE,
            REMAP_PENDING,
            REMAP_FAILURE,
            RECOVERY_ACTION,
        ];
        let values = self.device.field_values_for(&ids.map(FieldId)).unwrap_or_default();
        let mut numbers = values.into_iter().map(|value| number(value.ok()?.value.ok()?));
        let mut next = || numbers.next().flatten();
        Sample {
            memory_temperature_celsius: next()
                .and_then(|c| known_u32(u32::try_from(c).ok()?, CELSIUS_MAX))
                .map(f64::from),
            remapped_rows: [next(), next()],
            remap_pending: next().map(|value| value != 0),
            remap_failed: next().map(|value| value != 0),
            recovery: next().and_then(Recovery::of),
            ..Sample::default()
        }
    }

    fn profile(&mut self) -> Profile {
        const KILO: f64 = 1000.0;
        const MEBI: f64 = 1_048_576.0;
        if !self.gpm {
            // Each question takes the driver 20 ms.
            let rate = |counter| self.device.pcie_throughput(counter).ok();
            let bytes = |counter| {
                rate(counter)
                    .and_then(|kb| known_u32(kb, RATE_MAX as u32))
                    .map(|kb| f64::from(kb) * KILO)
            };
            let pcie = [bytes(PcieUtilCounter::Send), bytes(PcieUtilCounter::Receive)];
            return Profile { pcie_bytes_per_second: pcie, ..Profile::default() };
        }
        let ids = [
            GpmMetricId::SmUtil,
            GpmMetricId::SmOccupancy,
            GpmMetricId::AnyTensorUtil,
            GpmMetricId::DramBwUtil,
            GpmMetricId::PcieTxPerSec,
            GpmMetricId::PcieRxPerSec,
            GpmMetricId::NvlinkTotalTxPerSec,
            GpmMetricId::NvlinkTotalRxPerSec,
        ];
        let Ok(after) = self.device.gpm_sample() else { return Profile::default() };
        let before = self.before.replace(after);
        let (Some(before), Some(after)) = (before, self.before.as_ref()) else {
            return Profile::default();
        };
        let answers = gpm_metrics_get(self.nvml, &before, after, &ids).unwrap_or_default();
        let value = |id: GpmMetricId| {
            answers.iter().flatten().find(|answer| answer.metric_id == id).map(|found| found.value)
        };
        let share = |id| value(id).and_then(ratio);
        let bytes = |id| value(id).and_then(|v| known_f64(v, RATE_MAX)).map(|v| v * MEBI);
        Profile {
            sm_active: share(GpmMetricId::SmUtil),
            sm_occupancy: share(GpmMetricId::SmOccupancy),
            tensor_active: share(GpmMetricId::AnyTensorUtil),
            dram_active: share(GpmMetricId::DramBwUtil),
            pcie_bytes_per_second: [
                bytes(GpmMetricId::PcieTxPerSec),
                bytes(GpmMetricId::PcieRxPerSec),
            ],
            nvlink_bytes_per_second: [
                bytes(GpmMetricId::NvlinkTotalTxPerSec),
                bytes(GpmMetricId::NvlinkTotalRxPerSec),
            ],
        }
    }
}

/// Whether an error says that the GPU is gone or must be reset, rather than that it lacks something.
#[must_use]
pub fn is_lost(error: &NvmlError) -> bool {
    matches!(error, NvmlError::GpuLost | NvmlError::ResetRequired | NvmlError::IrqIssue)
}

fn number(value: SampleValue) -> Option<u64> {
    match value {
        SampleValue::U32(value) => known_u32(value, u32::MAX).map(u64::from),
        SampleValue::U64(value) => known_u64(value),
        SampleValue::I64(value) => u64::try_from(value).ok().and_then(known_u64),
        SampleValue::F64(value) => known_f64(value, 1e15).map(|value| value as u64),
    }
}

/// Returns what slows the clocks; being idle is no such reason.
fn throttles(reasons: ThrottleReasons) -> Vec<&'static str> {
    [
        ThrottleReasons::SW_POWER_CAP,
        ThrottleReasons::HW_SLOWDOWN,
        ThrottleReasons::SYNC_BOOST,
        ThrottleReasons::SW_THERMAL_SLOWDOWN,
        ThrottleReasons::HW_THERMAL_SLOWDOWN,
        ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN,
        ThrottleReasons::APPLICATIONS_CLOCKS_SETTING,
    ]
    .into_iter()
    .zip(THROTTLES)
    .filter(|(flag, _)| reasons.contains(*flag))
    .map(|(_, name)| *name)
    .collect()
}
