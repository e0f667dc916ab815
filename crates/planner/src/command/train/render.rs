//! The table of `plan train`.

use super::super::{gib, wrap};
use super::{Job, TrainReport};
use crate::explain;
use crate::quantity::{seconds, show};
use crate::search::{Candidate, Found, terms};

/// Writes the table: at most 100 columns but for `--explain`.
pub(super) fn render(job: &Job<'_>, report: &TrainReport) -> String {
    let mut text = format!(
        "{} ({} parameters{}) on {} x {} ({}), {} tokens\n",
        report.model,
        show(report.parameters),
        if report.active_parameters < report.parameters {
            format!(", {} active", show(report.active_parameters))
        } else {
            String::new()
        },
        report.gpus,
        report.gpu,
        report.network,
        show(report.tokens)
    );
    if let Some(a) = &report.at_achieved {
        text.push_str(&format!(
            "at {} TFLOP/s per GPU: {:.1} days, {:.0} PF-days (6 N D = {:.3e} FLOP)\n",
            a.tflops_per_gpu, a.days, a.pf_days, a.flops
        ));
    }
    if let Some(found) = &report.found {
        render_found(&mut text, job, report, found);
    }
    let e = &report.effective;
    text.push_str(&format!(
        "\ntime    {:.2} days; with failures {:.2} days ({:.1}% effective, {:.0} failures,\n        checkpoint every {}, best {})\n",
        report.days,
        report.days_with_failures,
        e.ratio * 100.0,
        e.failures,
        seconds(e.interval_s),
        seconds(e.optimal_interval_s)
    ));
    let b = &report.bill;
    text.push_str(&format!(
        "bill    {} GPU-hours ({} lost), ${}, {} MWh, ${:.3} per million tokens\n",
        show(b.gpu_hours),
        show(report.lost_gpu_hours),
        show(b.cost),
        show(b.kwh / 1e3),
        b.cost_per_million_tokens
    ));
    for (title, list) in
        [("what the search does instead", &report.alternatives), ("sweep", &report.sweep)]
    {
        if list.is_empty() {
            continue;
        }
        text.push_str(&format!(
            "\n{title}\n{:>7} {:<10} {:>8} {:>9} {:>12}  SPLIT\n",
            "GPUS", "GPU", "DAYS", "TFLOP/S", "DOLLARS"
        ));
        for a in list {
            text.push_str(&format!(
                "{:>7} {:<10} {:>8.2} {:>9.0} {:>12}  {}\n",
                a.gpus,
                a.gpu,
                a.days,
                a.model_tflops_per_gpu,
                show(a.cost),
                a.split
            ));
        }
    }
    text
}

fn render_found(text: &mut String, job: &Job<'_>, report: &TrainReport, found: &Found) {
    let best = &found.best;
    let t = &best.time;
    text.push_str(&format!(
        "split   {}; {} sequences of {} per step, {} micro-batches per rank\n",
        best.split, best.global_batch, report.sequence, t.micro_batches
    ));
    text.push_str(&format!(
        "step    {}: {:.0} model TFLOP/s per GPU ({:.1}% MFU, {:.1}% HFU), {} tokens/s per GPU\n",
        seconds(t.step),
        t.model_flops_per_gpu / 1e12,
        t.mfu * 100.0,
        t.hfu * 100.0,
        show(t.tokens_per_gpu)
    ));
    let shares: Vec<String> = terms(t)
        .iter()
        .filter(|(_, s)| *s / t.step >= 0.005)
        .map(|(name, s)| format!("{name} {:.1}%", 100.0 * s / t.step))
        .collect();
    text.push_str(&wrap("        ", &shares.join(", ")));
    let m = &best.memory;
    let items = [
        ("weights", m.weights),
        ("gradients", m.gradients),
        ("optimizer", m.optimizer),
        ("activations", m.activations),
        ("logits", m.logits),
        ("buffers", m.buffers),
        ("overhead", m.overhead),
    ];
    let total = format!(
        "{:.1} of {:.1} GiB on stage {}: {} {:.1}",
        gib(m.total()),
        gib(job.machines.gpu.memory_bytes),
        m.stage,
        items[0].0,
        gib(items[0].1)
    );
    let lines: Vec<String> = std::iter::once(total)
        .chain(items[1..].iter().map(|(name, bytes)| format!("{name} {:.1}", gib(*bytes))))
        .collect();
    text.push_str(&wrap("memory  ", &lines.join(", ")));
    let lead = if found.runner_up.is_some() { "the runner-up " } else { "" };
    let searched =
        format!("{} splits, {} fit; {lead}{}", found.considered, found.fitting, found.why);
    text.push_str(&wrap("search  ", &searched));
    if found.pareto.len() > 1 {
        text.push_str("pareto  ");
        let points: Vec<String> = found
            .pareto
            .iter()
            .take(4)
            .map(|c: &Candidate| {
                format!("{} at {:.1} GiB ({})", seconds(c.time.step), gib(c.bytes()), c.split)
            })
            .collect();
        text.push_str(&points.join("\n        "));
        text.push('\n');
    }
    if let Some(first) = report.sensitivity.first() {
        let head = format!("20% less {}: step {:+.1}%", first.input, first.less_percent);
        let items: Vec<String> = std::iter::once(head)
            .chain(
                report
                    .sensitivity
                    .iter()
                    .skip(1)
                    .take(3)
                    .map(|s| format!("{} {:+.1}%", s.input, s.less_percent)),
            )
            .collect();
        text.push_str(&wrap("moves   ", &items.join(", ")));
    }
    if job.args.explain {
        let values: Vec<(String, String)> =
            terms(t).iter().map(|(name, s)| ((*name).to_owned(), seconds(*s))).collect();
        text.push_str("\nterms of the step\n");
        text.push_str(&explain::render(&explain::STEP, &values));
        let memory = items.map(|(name, bytes)| (name.to_owned(), format!("{:.2} GiB", gib(bytes))));
        text.push_str("terms of the memory\n");
        text.push_str(&explain::render(&explain::MEMORY, &memory));
        let c = &job.machines.gpu.calibration;
        text.push_str(&format!(
            "constants of {} ({}):\n  e {}, k_half {}, memory {}, attention {}, link {}; network {}: {} of {} Gbit/s\n",
            job.machines.gpu.generation,
            c.basis,
            c.matmul_efficiency,
            c.matmul_k_half,
            c.memory_efficiency,
            c.attention_efficiency,
            c.link_efficiency,
            job.machines.network.name,
            job.machines.network.efficiency,
            job.machines.network.nic_gbps
        ));
    }
}
