//! One job: where it stands and why, its curves, its ranks on their devices, its logs.

use drumline_types::{format_bytes, format_duration_ms};
use drumline_wire::v1;
use maud::{Markup, html};

use crate::chart::{Axis, Curve, lines};
use crate::events;
use crate::show::{ago, count, percent, progress, reason, tag};

/// Series that the page shows, by name.
#[must_use]
pub fn series(id: &str) -> Vec<String> {
    ["loss", "loss_validation", "tokens_per_second", "mfu"]
        .map(|name| format!("job/{id}/{name}"))
        .to_vec()
}

/// Renders the page's main part. `history` has the points of [`series`], `logs` the end of each
/// rank's log, or why it cannot be read.
#[must_use]
pub fn render(
    job: &v1::JobView,
    history: &[Vec<(f64, f64)>],
    logs: &[(u32, Result<String, String>)],
    now_ms: u64,
) -> Markup {
    html! {
        h1 { (job.id) " " (tag(&job.phase)) " " small { (job.kind) } }
        section.panel {
            @if !job.reason.is_empty() || !job.message.is_empty() {
                p style="margin-top:0" {
                    @if job.reason.is_empty() { (job.message) } @else { (reason(job)) }
                    @if !job.remedy.is_empty() && !matches!(job.phase.as_str(), "running" | "succeeded") {
                        " " span.quiet { (job.remedy) }
                    }
                }
            }
            @if let Some(failure) = &job.first_failure { (first_failure(failure)) }
            (facts(job, now_ms))
            @if let Some(training) = &job.training { (progress_bar(job, training)) }
        }
        @if job.training.is_some() { (training_charts(history)) }
        @if let Some(training) = &job.training {
            @if let Some(breakdown) = &training.breakdown { (step_breakdown(breakdown)) }
        }
        section.panel { h2 { "Ranks" } (ranks(job)) }
        section.panel { h2 { "Logs" } (log_panels(job, logs)) }
        section.panel { h2 { "Events" } (events::table(&job.events, now_ms, false)) }
    }
}

fn first_failure(failure: &v1::RankExitView) -> Markup {
    let how = match (failure.exit_code, failure.signal) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "was lost".to_owned(),
    };
    html! {
        p.bad {
            "First failure (attempt " (failure.attempt) "): rank " (failure.rank)
            @if !failure.node.is_empty() { " on " (failure.node) }
            " " (how)
            @if !failure.message.is_empty() { ": " (failure.message) }
        }
    }
}

fn facts(job: &v1::JobView, now_ms: u64) -> Markup {
    let end = if job.finished_ms > 0 { job.finished_ms } else { now_ms };
    html! {
        dl.facts {
            dt { "Split" } dd {
                (job.world_size) " ranks on " (job.device_kind) ": tensor " (job.tensor)
                " × pipeline " (job.pipeline) " × data " (job.data)
            }
            dt { "Queue" } dd { (job.queue) ", priority " (job.priority) }
            dt { "Submitted" } dd { (ago(job.created_ms, now_ms)) " ago" }
            @if job.started_ms > 0 {
                dt { "Running for" } dd { (format_duration_ms(end.saturating_sub(job.started_ms))) }
            }
            @if !job.spares.is_empty() {
                dt { "Spares" } dd {
                    @for (at, spare) in job.spares.iter().enumerate() {
                        @if at > 0 { ", " }
                        (spare.node) "/" (spare.device)
                        @if !spare.lent_to.is_empty() { " (lent to " (spare.lent_to) ")" }
                    }
                }
            }
            dt { "Attempt" } dd { (job.attempt) ", restarts " (job.restarts) }
            @if let Some(service) = &job.service {
                dt { "Model" } dd { (service.served_name) @if !service.gateway_url.is_empty() { " at " code { (service.gateway_url) "/v1" } } }
            }
            @if let Some(training) = &job.training {
                @if training.parameters > 0 { dt { "Parameters" } dd { (count(training.parameters)) } }
                @if !training.checkpoint_path.is_empty() {
                    dt { "Checkpoint" } dd { "step " (count(training.checkpoint_step)) ", " code { (training.checkpoint_path) } }
                }
            }
        }
    }
}

fn progress_bar(job: &v1::JobView, training: &v1::TrainingView) -> Markup {
    let share = if training.steps > 0 { training.step as f64 / training.steps as f64 } else { 0.0 };
    html! {
        div.meter role="progressbar" aria-label="Steps" aria-valuemin="0" aria-valuemax=(training.steps)
            aria-valuenow=(training.step) { i style=(format!("width:{:.1}%", share * 100.0)) {} }
        div.figures style="margin:0.6rem 0 0" {
            div.figure { b { (progress(job)) } span { "steps" } }
            div.figure { b { (format!("{:.4}", training.loss)) } span { "loss" } }
            @if training.loss_validation > 0.0 {
                div.figure { b { (format!("{:.4}", training.loss_validation)) } span { "held-out loss" } }
            }
            div.figure { b { (count(training.tokens_per_second as u64)) } span { "tokens/s" } }
            @if training.mfu > 0.0 {
                div.figure { b { (percent(training.mfu)) } span { "of matmul peak (MFU)" } }
            }
            div.figure { b { (count(training.tokens)) } span { "tokens" } }
            @if training.eta_ms > 0 && job.phase == "running" {
                div.figure { b { (format_duration_ms(training.eta_ms)) } span { "left" } }
            }
        }
    }
}

fn training_charts(history: &[Vec<(f64, f64)>]) -> Markup {
    let curve = |index: usize, name: &str, dots: bool| Curve {
        name: name.to_owned(),
        points: history.get(index).cloned().unwrap_or_default(),
        dots,
    };
    html! {
        div.grid {
            section.panel {
                h2 { "Loss" }
                (lines("Loss by step", &[curve(0, "training", false), curve(1, "held-out", true)], Axis::Number, Axis::Number))
                p.legend {
                    span.key style="--c: var(--accent)" { "training" }
                    span.key style="--c: var(--second)" { "held-out" }
                }
            }
            section.panel {
                h2 { "Throughput" }
                (lines("Tokens per second by step", &[curve(2, "tokens/s", false)], Axis::Number, Axis::Number))
                p.legend { span.key style="--c: var(--accent)" { "tokens/s" } }
            }
        }
    }
}

fn step_breakdown(breakdown: &v1::StepBreakdown) -> Markup {
    let parts = [
        ("matmul", breakdown.matmul_seconds),
        ("attention", breakdown.attention_seconds),
        ("other kernels", breakdown.other_seconds),
        ("communication", breakdown.communication_seconds),
        ("pipeline bubble", breakdown.bubble_seconds),
        ("idle", breakdown.idle_seconds),
    ];
    let total = breakdown.step_seconds.max(parts.iter().map(|part| part.1).sum());
    if total <= 0.0 {
        return html! {};
    }
    let colours = ["--accent", "--second", "--good", "--warn", "--bad", "--line"];
    let hidden = breakdown.communication_hidden_seconds;
    html! {
        section.panel {
            h2 { "Where a step's time goes" }
            div.stack role="img" aria-label="Shares of a step's time" {
                @for (index, (name, seconds)) in parts.iter().enumerate() {
                    i class=(format!("c{index}")) title=(name)
                        style=(format!("width:{:.1}%", seconds / total * 100.0)) {}
                }
            }
            p.legend {
                @for (colour, (name, seconds)) in colours.iter().zip(&parts) {
                    span.key style=(format!("--c: var({colour})")) {
                        (name) " " (percent(seconds / total))
                    }
                }
            }
            @if breakdown.matmul_peak_share > 0.0 || hidden > 0.0 {
                p.legend {
                    @if breakdown.matmul_peak_share > 0.0 {
                        "Matrix products at " (percent(breakdown.matmul_peak_share))
                        " of the device's measured peak. "
                    }
                    @if hidden > 0.0 {
                        "Communication beside it: " (percent(hidden / total)) " of the step."
                    }
                }
            }
        }
    }
}

fn ranks(job: &v1::JobView) -> Markup {
    if job.ranks.is_empty() {
        return html! { p.nothing { "No rank is placed: " (reason(job)) } };
    }
    html! {
        div.scroll { table {
            thead { tr {
                th.n { "Rank" } th { "Node" } th.n { "Device" } th.wide { "Tensor, pipeline, data" }
                th { "Phase" } th.n.wide { "Step" } th.n { "Cores" } th.n { "Memory" } th.n.wide { "Pid" }
            } }
            tbody { @for rank in &job.ranks { tr {
                td.n { (rank.rank) }
                td { (rank.node) }
                td.n { (rank.device) }
                td.wide { (rank.tensor) ", " (rank.pipeline) ", " (rank.data) }
                td { (tag(&rank.phase)) }
                td.n.wide { (count(rank.step)) }
                td.n { (format!("{:.2}", rank.cpu_cores)) }
                td.n { (format_bytes(rank.memory_bytes)) }
                td.n.wide { (rank.pid) }
            } } }
        } }
    }
}

fn log_panels(job: &v1::JobView, logs: &[(u32, Result<String, String>)]) -> Markup {
    html! {
        @if logs.is_empty() { p.nothing { "No rank has started." } }
        @for (rank, log) in logs {
            details id=(format!("log-{rank}")) open[*rank == 0] {
                summary { "Rank " (rank) }
                @match log {
                    Ok(text) if text.trim().is_empty() => p.nothing { "It has printed nothing." },
                    Ok(text) => pre id=(format!("text-{rank}")) tabindex="0" { (text) },
                    Err(why) => p.nothing { (why) },
                }
            }
        }
        @if job.ranks.len() > logs.len() {
            p.nothing { "The others: " code { "drumline logs " (job.id) " --rank N" } }
        }
    }
}
