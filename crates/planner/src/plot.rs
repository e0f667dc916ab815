//! A sweep as one SVG: two curves over a logarithmic axis, readable in light and dark.

/// One curve.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Its name and unit.
    pub name: String,
    /// Points, `(x, y)`, both positive.
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 720.0;
const PANEL: f64 = 220.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 20.0;

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Draws a panel per series, one above the other, x on a logarithmic axis.
///
/// Points that are not positive and finite are left out.
#[must_use]
pub fn svg(title: &str, x_name: &str, series: &[Series]) -> String {
    let height = 50.0 + series.len() as f64 * (PANEL + 30.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" font-family=\"sans-serif\" font-size=\"12\">\n<title>{0}</title>\n<style>text{{fill:#222}}.a{{stroke:#999;stroke-width:1}}.g{{stroke:#9994;stroke-width:1}}.c{{fill:none;stroke:#1769aa;stroke-width:2}}.p{{fill:#1769aa}}@media (prefers-color-scheme:dark){{text{{fill:#ddd}}.c{{stroke:#6ab7ff}}.p{{fill:#6ab7ff}}}}</style>\n<text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{0}</text>\n",
        escape(title)
    );
    for (index, one) in series.iter().enumerate() {
        let top = 50.0 + index as f64 * (PANEL + 30.0);
        panel(&mut out, one, x_name, top);
    }
    out.push_str("</svg>\n");
    out
}

fn panel(out: &mut String, series: &Series, x_name: &str, top: f64) {
    let good: Vec<(f64, f64)> = series
        .points
        .iter()
        .copied()
        .filter(|(x, y)| x.is_finite() && y.is_finite() && *x > 0.0 && *y > 0.0)
        .collect();
    let bottom = top + PANEL - 40.0;
    out.push_str(&format!(
        "<text x=\"{LEFT}\" y=\"{:.0}\">{}</text>\n",
        top + 2.0,
        escape(&series.name)
    ));
    let (Some(first), Some(last)) = (good.first(), good.last()) else {
        out.push_str(&format!("<text x=\"{LEFT}\" y=\"{:.0}\">no point fits</text>\n", top + 40.0));
        return;
    };
    let (x0, x1) = (first.0.ln(), last.0.ln().max(first.0.ln() + 1e-9));
    let y1 = good.iter().map(|p| p.1).fold(0.0, f64::max) * 1.05;
    let place = |x: f64, y: f64| {
        (
            LEFT + (x.ln() - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            bottom - y / y1 * (bottom - top - 12.0),
        )
    };
    for step in 0..=4 {
        let y = y1 * f64::from(step) / 4.0;
        let (_, py) = place(first.0, y);
        out.push_str(&format!(
            "<line class=\"g\" x1=\"{LEFT}\" x2=\"{:.0}\" y1=\"{py:.1}\" y2=\"{py:.1}\"/><text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
            WIDTH - RIGHT,
            LEFT - 6.0,
            py + 4.0,
            crate::quantity::show(y)
        ));
    }
    let path: Vec<String> = good
        .iter()
        .map(|(x, y)| {
            let (px, py) = place(*x, *y);
            format!("{px:.1},{py:.1}")
        })
        .collect();
    out.push_str(&format!("<polyline class=\"c\" points=\"{}\"/>\n", path.join(" ")));
    for (x, y) in &good {
        let (px, py) = place(*x, *y);
        out.push_str(&format!(
            "<circle class=\"p\" cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"3\"><title>{x_name} {x}: {}</title></circle><text x=\"{px:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"10\">{x}</text>\n",
            crate::quantity::show(*y),
            bottom + 16.0
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_holds_every_good_point_and_escapes_names() {
        let series = Series {
            name: "days <a&b>".to_owned(),
            points: vec![(64.0, 3.0), (128.0, f64::NAN), (256.0, 1.0)],
        };
        let text = svg("t", "gpus", &[series]);
        assert_eq!(text.matches("<circle").count(), 2);
        assert!(text.contains("days &lt;a&amp;b&gt;") && !text.contains("NaN"));
        assert!(svg("t", "x", &[Series { name: "e".into(), points: vec![] }]).contains("no point"));
    }
}
