//! Plots as SVG. Colours are chosen to be told apart on light and dark ground.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const SIZE: (u32, u32) = (760, 280);
const INKS: [RGBColor; 7] = [
    RGBColor(0x2b, 0x7b, 0xd6),
    RGBColor(0xd9, 0x5f, 0x0e),
    RGBColor(0x2c, 0x9a, 0x5b),
    RGBColor(0xa8, 0x55, 0xc9),
    RGBColor(0xc9, 0x3a, 0x4b),
    RGBColor(0x8a, 0x7a, 0x1e),
    RGBColor(0x17, 0x93, 0x9c),
];
const GREY: RGBColor = RGBColor(0x80, 0x80, 0x80);

/// A line of a plot.
pub(super) struct Line {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// Returns the colour of the line at a place, as text for a legend.
pub(super) fn ink(at: usize) -> String {
    let RGBColor(r, g, b) = INKS[at % INKS.len()];
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// Draws lines over time. `None` when there is nothing to draw.
pub(super) fn lines(lines: &[Line], y_name: &str, percent: bool) -> Option<String> {
    let all = || lines.iter().flat_map(|line| &line.points);
    let right = all().map(|(x, _)| *x).fold(0.0, f64::max);
    let top = all().map(|(_, y)| *y).fold(0.0, f64::max);
    let top = if percent { 1.0 } else { top * 1.05 };
    if right <= 0.0 || top <= 0.0 {
        return None;
    }
    let (per, unit) = if right > 96.0 { (24.0, "days") } else { (1.0, "hours") };
    let mut svg = String::new();
    draw(&mut svg, lines, (right / per, per, unit), top, (y_name, percent)).ok()?;
    Some(svg)
}

fn draw(
    svg: &mut String,
    lines: &[Line],
    (right, per, unit): (f64, f64, &str),
    top: f64,
    (y_name, percent): (&str, bool),
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let text = ("sans-serif", 12).into_font().color(&GREY);
    let mut chart = ChartBuilder::on(&root)
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(58)
        .build_cartesian_2d(0.0..right, 0.0..top)?;
    chart
        .configure_mesh()
        .axis_style(GREY)
        .bold_line_style(GREY.mix(0.25))
        .light_line_style(GREY.mix(0.0))
        .label_style(text.clone())
        .axis_desc_style(text)
        .x_desc(unit)
        .y_desc(y_name)
        .y_label_formatter(&|y| {
            if percent { format!("{:.0}%", y * 100.0) } else { format!("{y:.0}") }
        })
        .draw()?;
    for (at, line) in lines.iter().enumerate() {
        let ink = INKS[at % INKS.len()].stroke_width(2);
        let points = line.points.iter().map(|(x, y)| (x / per, *y));
        chart.draw_series(LineSeries::new(points, ink))?;
    }
    root.present()?;
    Ok(())
}

/// Draws one stacked bar for each name: parts of one, with the colours of their places.
pub(super) fn bars(bars: &[(String, Vec<f64>)]) -> Option<String> {
    let mut svg = String::new();
    stack(&mut svg, bars).ok()?;
    Some(svg)
}

/// Returns the colour of a part of a bar, as text for a legend.
pub(super) fn part_ink(at: usize) -> String {
    let RGBColor(r, g, b) = part(at);
    format!("#{r:02x}{g:02x}{b:02x}")
}

fn part(at: usize) -> RGBColor {
    const PARTS: [RGBColor; 11] = [
        RGBColor(0x2c, 0x9a, 0x5b),
        RGBColor(0x8f, 0xc9, 0x7a),
        RGBColor(0xe0, 0xb4, 0x3b),
        RGBColor(0x5b, 0xb5, 0xc4),
        RGBColor(0xc9, 0x3a, 0x4b),
        RGBColor(0xe0, 0x7b, 0x39),
        RGBColor(0x9c, 0x2f, 0x6f),
        RGBColor(0xa8, 0x8a, 0xd6),
        RGBColor(0x60, 0x60, 0x60),
        RGBColor(0x4a, 0x74, 0xb8),
        RGBColor(0xc4, 0xc8, 0xcc),
    ];
    PARTS[at % PARTS.len()]
}

fn stack(svg: &mut String, bars: &[(String, Vec<f64>)]) -> Result<(), Box<dyn std::error::Error>> {
    const LEFT: i32 = 190;
    const ROW: i32 = 30;
    let height = ROW * bars.len() as i32 + 8;
    let root = SVGBackend::with_string(svg, (SIZE.0, height as u32)).into_drawing_area();
    let anchor = Pos::new(HPos::Right, VPos::Center);
    let text = ("sans-serif", 13).into_font().color(&GREY).pos(anchor);
    let width = f64::from(SIZE.0 as i32 - LEFT - 10);
    for (row, (name, parts)) in bars.iter().enumerate() {
        let top = row as i32 * ROW + 6;
        root.draw(&Text::new(name.clone(), (LEFT - 8, top + 10), text.clone()))?;
        let mut from = 0.0;
        for (at, size) in parts.iter().enumerate() {
            let x = |share: f64| LEFT + (share * width).round() as i32;
            let corners = [(x(from), top), (x(from + size), top + ROW - 10)];
            root.draw(&Rectangle::new(corners, part(at).filled()))?;
            from += size;
        }
    }
    root.present()?;
    Ok(())
}
