//! Why no split will do: what is short, by how much, and the nearest that works.

use super::{Request, Scan, counts, default_batch, scan};
use crate::error::PlanError;
use crate::split::{Batch, Split, check};

/// Says why a scan found nothing.
pub(super) fn refuse(request: &Request<'_>, gpus: u32, scan: &Scan) -> PlanError {
    let Request { model, machines, .. } = *request;
    let gib = f64::from(1 << 30);
    let Some(leanest) = scan.leanest else {
        let batch = if request.batch.global == 0 {
            default_batch(model, request.batch.sequence, gpus)
        } else {
            request.batch.global
        };
        if gpus > machines.domain() && machines.network.nic_gbps <= 0.0 {
            return PlanError::invalid(
                "network",
                format!(
                    "'{}' joins no nodes; nearest that works: {} GPUs",
                    machines.network.name,
                    machines.domain()
                ),
            );
        }
        if let Err(error) = check_pins(request, gpus, batch) {
            return error;
        }
        let near = nearest_gpus(request, gpus, |n| !n.is_empty_scan);
        return PlanError::invalid(
            "gpus",
            format!(
                "no split of {gpus} GPUs divides {} heads, {} layers and a batch of {batch} sequences{}",
                model.heads,
                model.total_layers(),
                near.map_or(String::new(), |n| format!("; nearest that works: {n} GPUs"))
            ),
        );
    };
    let nearest = nearest_gpus(request, gpus, |n| n.fits).map_or_else(
        || "no number of these GPUs up to 65,536 holds it".to_owned(),
        |n| format!("nearest that works: {n} GPUs"),
    );
    let limit = machines.gpu.memory_bytes * request.memory_fraction;
    PlanError::DoesNotFit {
        model: model.name.clone(),
        gpus,
        gpu: machines.gpu.name.clone(),
        needed_gib: leanest.bytes() / gib,
        limit_gib: limit / gib,
        short_gib: (leanest.bytes() - limit) / gib,
        leanest: leanest.split.to_string(),
        nearest,
    }
}

/// Says which of the fixed settings contradicts the model, the batch or the number of GPUs.
fn check_pins(request: &Request<'_>, gpus: u32, global: u32) -> Result<(), PlanError> {
    let pins = request.pins;
    let split = Split {
        tensor: pins.tensor.unwrap_or(1),
        pipeline: pins.pipeline.unwrap_or(1),
        virtual_stages: pins.virtual_stages.unwrap_or(1),
        context: pins.context.unwrap_or(1),
        expert: pins.expert.unwrap_or(1),
        zero: pins.zero.unwrap_or(0),
        micro_batch: pins.micro_batch.unwrap_or(1),
        ..Split::SINGLE
    };
    // Experts are taken from data ranks, which are not fixed.
    let split = Split { data: split.expert, ..split };
    let micro = u64::from(split.data) * u64::from(split.micro_batch);
    let batch = Batch { global: if global == 0 { micro as u32 } else { global }, ..request.batch };
    check(request.model, &split, &batch)?;
    let fixed = split.tensor * split.pipeline * split.context;
    if gpus.is_multiple_of(fixed) {
        return Ok(());
    }
    let down = gpus / fixed * fixed;
    let near = if down == 0 { fixed.to_string() } else { format!("{down} or {}", down + fixed) };
    Err(PlanError::invalid(
        "gpus",
        format!(
            "{gpus} is not divisible by tensor {} x pipeline {} x context {}; nearest that works: {near}",
            split.tensor, split.pipeline, split.context
        ),
    ))
}

struct Probe {
    fits: bool,
    is_empty_scan: bool,
}

fn nearest_gpus(request: &Request<'_>, gpus: u32, works: impl Fn(&Probe) -> bool) -> Option<u32> {
    let mut counts = counts(request.machines.network.gpus_per_node, 65_536);
    counts.sort_by_key(|n| (n.abs_diff(gpus), *n));
    counts.into_iter().find(|&n| {
        scan(request, n).is_ok_and(|s| {
            works(&Probe { fits: !s.fits.is_empty(), is_empty_scan: s.leanest.is_none() })
        })
    })
}
