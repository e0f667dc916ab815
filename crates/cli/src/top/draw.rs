//! Draws `top`: the same content as a screen and as plain text, at any size.

use drumline_types::{format_bytes, format_duration_ms};
use drumline_wire::v1;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Paragraph, Row, Table, TableState};

use crate::output;
use crate::told;
use crate::top::model::{Screen, sparkline};

/// Draws the screen.
pub(crate) fn screen(frame: &mut Frame<'_>, screen: &Screen) {
    let coloured = output::stdout_is_coloured();
    let area = frame.area();
    let nodes = u16::try_from(screen.fleet.nodes.len()).unwrap_or(u16::MAX);
    // Nodes take what they need, but never more than a third; the chosen job five lines.
    let nodes_height = nodes.saturating_add(3).min((area.height / 3).max(4));
    let detail_height = if area.height >= 20 { 7 } else { 0 };
    let [head, nodes, jobs, detail, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(nodes_height),
        Constraint::Min(3),
        Constraint::Length(detail_height),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(Paragraph::new(headline(screen)), head);
    draw_nodes(frame, nodes, screen, coloured);
    draw_jobs(frame, jobs, screen, coloured);
    if detail_height > 0 {
        draw_detail(frame, detail, screen);
    }
    let (text, style) = if screen.lost.is_empty() {
        ("q quits, up and down choose a job".to_owned(), Style::new().add_modifier(Modifier::DIM))
    } else {
        (format!("{}; trying again", screen.lost), paint(coloured, Color::Red))
    };
    frame.render_widget(Paragraph::new(Line::styled(text, style)), foot);
}

fn headline(screen: &Screen) -> String {
    let fleet = &screen.fleet;
    let mut text = format!(
        "{} of {} devices held, {} in use; {} running, {} waiting",
        fleet.devices_allocated,
        fleet.devices_total,
        told::percent(fleet.utilization),
        fleet.jobs_running,
        fleet.jobs_pending
    );
    if fleet.devices_idle > 0 {
        text.push_str(&format!("; {} held but idle", fleet.devices_idle));
    }
    if fleet.devices_unhealthy > 0 {
        text.push_str(&format!("; {} unhealthy", fleet.devices_unhealthy));
    }
    text
}

const NODE_HEADER: [&str; 5] = ["NODE", "PHASE", "CORES", "MEMORY", "DEVICES"];

fn node_row(node: &v1::NodeView) -> Vec<String> {
    let device = |device: &v1::DeviceView| match (device.healthy, device.job.is_empty()) {
        (false, _) => "unhealthy".to_owned(),
        (true, true) => "free".to_owned(),
        (true, false) => {
            let idle = if device.idle { " idle" } else { "" };
            format!("{}:{} {}{idle}", device.job, device.rank, told::percent(device.utilization))
        }
    };
    vec![
        node.name.clone(),
        node.phase.clone(),
        format!("{:.1}/{}", node.cpu_cores_used, node.cores),
        format!("{}/{}", format_bytes(node.memory_used_bytes), format_bytes(node.memory_bytes)),
        node.devices.iter().map(device).collect::<Vec<_>>().join("  "),
    ]
}

const JOB_HEADER: [&str; 6] = ["JOB", "KIND", "PHASE", "RANKS", "AGE", "WHAT IT IS AT"];

fn job_row(now_ms: u64, job: &v1::JobView) -> Vec<String> {
    let progress = told::progress(job);
    let is_running = job.phase == "running" || job.phase == "succeeded";
    let at = match (is_running && !progress.is_empty(), told::reason(job)) {
        (true, _) => progress,
        (false, reason) if reason.is_empty() => progress,
        (false, reason) => reason,
    };
    vec![
        job.id.clone(),
        job.kind.clone(),
        job.phase.clone(),
        job.world_size.to_string(),
        told::ago(now_ms, job.created_ms),
        at,
    ]
}

fn detail(screen: &Screen, columns: usize) -> Vec<String> {
    let Some(job) = screen.chosen_job() else {
        return vec!["no jobs yet; `drumline submit FILE` submits one".to_owned()];
    };
    let columns = columns.saturating_sub(34);
    let reason = told::reason(job);
    let first =
        if reason.is_empty() { job.phase.clone() } else { format!("{}: {reason}", job.phase) };
    let mut lines = vec![first];
    let last = |curve: &[f64]| curve.last().copied();
    if let Some(loss) = last(&screen.curves.loss) {
        lines.push(format!(
            "{:<10}{loss:>12.4}  {}",
            "loss",
            sparkline(&screen.curves.loss, columns)
        ));
    }
    if let Some(rate) = last(&screen.curves.tokens_per_second) {
        let curve = sparkline(&screen.curves.tokens_per_second, columns);
        lines.push(format!("{:<10}{:>12}  {curve}", "tokens/s", told::count(rate)));
    }
    if let Some(run) = &job.training {
        let mut line = format!(
            "{} parameters, {} tokens seen, {} restarts",
            told::count(run.parameters as f64),
            told::count(run.tokens as f64),
            job.restarts
        );
        if run.mfu > 0.0 {
            line.push_str(&format!(", {} of the matmul peak", told::percent(run.mfu)));
        }
        if run.eta_ms > 0 && job.phase == "running" {
            line.push_str(&format!(", {} left", format_duration_ms(run.eta_ms)));
        }
        lines.push(line);
        if !run.checkpoint_path.is_empty() {
            lines.push(format!(
                "checkpoint of step {} in {}",
                run.checkpoint_step, run.checkpoint_path
            ));
        }
    }
    if let Some(service) = &job.service {
        lines.push(format!(
            "{} running, {} waiting, KV cache {} in use, {} tokens/s",
            service.running,
            service.waiting,
            told::percent(service.kv_usage),
            told::count(service.tokens_per_second)
        ));
    }
    lines
}

fn draw_nodes(frame: &mut Frame<'_>, area: Rect, screen: &Screen, coloured: bool) {
    let rows = screen.fleet.nodes.iter().map(|node| {
        let style = phase_style(coloured, &node.phase);
        Row::new(node_row(node).into_iter().map(clean)).style(style)
    });
    let widths = [
        Constraint::Length(16),
        Constraint::Length(8),
        Constraint::Length(9),
        Constraint::Length(19),
        Constraint::Min(10),
    ];
    let table = Table::new(rows, widths).header(header(&NODE_HEADER)).block(block("Nodes"));
    frame.render_widget(table, area);
}

fn draw_jobs(frame: &mut Frame<'_>, area: Rect, screen: &Screen, coloured: bool) {
    let now = screen.fleet.now_ms;
    let rows = screen.fleet.jobs.iter().map(|job| {
        let style = phase_style(coloured, &job.phase);
        Row::new(job_row(now, job).into_iter().map(clean)).style(style)
    });
    let widths = [
        Constraint::Length(24),
        Constraint::Length(12),
        Constraint::Length(10),
        Constraint::Length(5),
        Constraint::Length(7),
        Constraint::Min(10),
    ];
    let table = Table::new(rows, widths)
        .header(header(&JOB_HEADER))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
        .block(block("Jobs"));
    let mut state = TableState::default()
        .with_selected((!screen.fleet.jobs.is_empty()).then(|| screen.chosen()));
    frame.render_stateful_widget(table, area, &mut state);
}

fn draw_detail(frame: &mut Frame<'_>, area: Rect, screen: &Screen) {
    let lines: Vec<Line<'_>> = detail(screen, usize::from(area.width))
        .into_iter()
        .map(|line| Line::raw(clean(line)))
        .collect();
    let title = screen.chosen_job().map_or_else(|| "Job".to_owned(), |job| clean(job.id.clone()));
    frame.render_widget(Paragraph::new(lines).block(block(&title)), area);
}

fn header<'a>(names: &'a [&'a str]) -> Row<'a> {
    Row::new(names.iter().copied()).style(Style::new().add_modifier(Modifier::BOLD))
}

fn block(title: &str) -> Block<'_> {
    Block::new().borders(Borders::TOP).title(Span::raw(format!(" {title} ")))
}

fn phase_style(coloured: bool, phase: &str) -> Style {
    match phase {
        "running" | "succeeded" => paint(coloured, Color::Green),
        "failed" | "gone" => paint(coloured, Color::Red),
        "restarting" | "silent" => paint(coloured, Color::Yellow),
        _ => Style::new(),
    }
}

fn paint(coloured: bool, colour: Color) -> Style {
    if coloured { Style::new().fg(colour) } else { Style::new() }
}

/// Whatever a job's message holds, it moves no cursor.
fn clean(text: String) -> String {
    if text.contains(char::is_control) {
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
    } else {
        text
    }
}

/// Writes what the screen would show as plain text.
pub(crate) fn text(screen: &Screen, width: u16) -> String {
    let fleet = &screen.fleet;
    let mut text = format!("{}\n\n", headline(screen));
    let nodes: Vec<_> = fleet.nodes.iter().map(node_row).collect();
    text.push_str(&output::table(&NODE_HEADER, &nodes));
    text.push('\n');
    let jobs: Vec<_> = fleet.jobs.iter().map(|job| job_row(fleet.now_ms, job)).collect();
    text.push_str(&output::table(&JOB_HEADER, &jobs));
    if screen.chosen_job().is_some() {
        text.push('\n');
        text.push_str(&format!("{}\n", screen.chosen_id()));
        for line in detail(screen, usize::from(width)) {
            text.push_str(&format!("  {}\n", clean(line)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::model::Curves;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn example() -> Screen {
        let device = |index, job: &str| v1::DeviceView {
            index,
            kind: "cpu".to_owned(),
            healthy: true,
            job: job.to_owned(),
            rank: index,
            utilization: if job.is_empty() { 0.0 } else { 0.91 },
            ..v1::DeviceView::default()
        };
        let node = |name: &str, job: &str| v1::NodeView {
            name: name.to_owned(),
            phase: "ready".to_owned(),
            cores: 1,
            cpu_cores_used: 0.9,
            memory_bytes: 8 << 30,
            memory_used_bytes: 1 << 30,
            devices: vec![device(0, job), device(1, job)],
            ..v1::NodeView::default()
        };
        let mut screen = Screen::default();
        screen.fleet = v1::FleetView {
            now_ms: 100_000,
            nodes: vec![node("node-0", "train-1a2b"), node("node-1", "")],
            jobs: vec![
                v1::JobView {
                    id: "train-1a2b".to_owned(),
                    kind: "TrainingJob".to_owned(),
                    phase: "running".to_owned(),
                    world_size: 2,
                    created_ms: 40_000,
                    training: Some(v1::TrainingView {
                        step: 12,
                        steps: 60,
                        loss: 5.4321,
                        tokens_per_second: 4321.0,
                        parameters: 9_600_000,
                        ..v1::TrainingView::default()
                    }),
                    ..v1::JobView::default()
                },
                v1::JobView {
                    id: "big-9z".to_owned(),
                    kind: "CommandJob".to_owned(),
                    phase: "pending".to_owned(),
                    reason: "WaitingForDevices".to_owned(),
                    message: "4 of 8 devices are free\x1b[2J".to_owned(),
                    world_size: 8,
                    created_ms: 99_000,
                    ..v1::JobView::default()
                },
            ],
            devices_total: 4,
            devices_allocated: 2,
            utilization: 0.455,
            jobs_running: 1,
            jobs_pending: 1,
            ..v1::FleetView::default()
        };
        screen.curves =
            Curves { loss: vec![8.3, 7.0, 6.0, 5.4], tokens_per_second: vec![4000.0, 4321.0] };
        screen
    }

    fn drawn(width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| super::screen(frame, &example())).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn a_screen_tells_the_fleet_the_jobs_and_why_one_waits() {
        let screen = drawn(100, 24);
        for told in [
            "2 of 4 devices held, 46% in use; 1 running, 1 waiting",
            "train-1a2b:0 91%",
            "step 12/60, loss 5.4321, 4.32k tokens",
            "WaitingForDevices: 4 of 8 devices are",
            "▁",
            "q quits",
        ] {
            assert!(screen.contains(told), "no {told:?} in\n{screen}");
        }
    }

    #[test]
    fn no_size_breaks_the_screen() {
        for width in (1..130).step_by(7) {
            for height in 1..45 {
                drawn(width, height);
            }
        }
    }

    #[test]
    fn the_plain_text_has_no_escapes() {
        let text = text(&example(), 120);
        assert!(!text.contains('\x1b'), "{text}");
        assert!(text.contains("WaitingForDevices"), "{text}");
        assert!(text.contains("loss            5.4000  █▅▂▁"), "{text}");
    }
}
