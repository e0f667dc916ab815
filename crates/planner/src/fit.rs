//! A small minimiser without derivatives (Nelder and Mead 1965), deterministic.

/// Where a minimisation ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Minimum {
    /// The best point.
    pub x: Vec<f64>,
    /// The function there.
    pub value: f64,
    /// Evaluations used.
    pub evaluations: usize,
}

/// Minimises `f` from `start`, whose first simplex has edges `scale`.
///
/// Restarts once from the best point, which frees a simplex that has collapsed. A value that is
/// not finite counts as infinitely bad.
pub fn minimise(
    f: &mut dyn FnMut(&[f64]) -> f64,
    start: &[f64],
    scale: &[f64],
    evaluations: usize,
) -> Minimum {
    let first = descend(f, start, scale, evaluations / 2);
    let smaller: Vec<f64> = scale.iter().map(|s| s * 0.3).collect();
    let second = descend(f, &first.x, &smaller, evaluations - evaluations / 2);
    let evaluations = first.evaluations + second.evaluations;
    let best = if second.value <= first.value { second } else { first };
    Minimum { evaluations, ..best }
}

fn descend(
    f: &mut dyn FnMut(&[f64]) -> f64,
    start: &[f64],
    scale: &[f64],
    limit: usize,
) -> Minimum {
    let n = start.len();
    let mut used = 0;
    let mut eval = |x: &[f64]| {
        used += 1;
        let value = f(x);
        if value.is_finite() { value } else { f64::INFINITY }
    };
    let mut simplex: Vec<(f64, Vec<f64>)> = Vec::with_capacity(n + 1);
    simplex.push((eval(start), start.to_vec()));
    for i in 0..n {
        let mut x = start.to_vec();
        x[i] += scale[i];
        simplex.push((eval(&x), x));
    }
    for _ in 0..limit.saturating_sub(n + 1) {
        simplex.sort_by(|a, b| a.0.total_cmp(&b.0));
        let spread = (simplex[n].0 - simplex[0].0).abs();
        if n == 0 || spread <= 1e-14 * (1.0 + simplex[0].0.abs()) {
            break;
        }
        let centre: Vec<f64> = (0..n)
            .map(|i| simplex[..n].iter().map(|(_, x)| x[i]).sum::<f64>() / n as f64)
            .collect();
        let along = |k: f64, worst: &[f64]| -> Vec<f64> {
            centre.iter().zip(worst).map(|(c, w)| c + k * (c - w)).collect()
        };
        let worst = simplex[n].1.clone();
        let reflected = along(1.0, &worst);
        let value = eval(&reflected);
        if value < simplex[0].0 {
            let expanded = along(2.0, &worst);
            let further = eval(&expanded);
            simplex[n] = if further < value { (further, expanded) } else { (value, reflected) };
        } else if value < simplex[n - 1].0 {
            simplex[n] = (value, reflected);
        } else {
            let outside = value < simplex[n].0;
            let contracted = along(if outside { 0.5 } else { -0.5 }, &worst);
            let inner = eval(&contracted);
            if inner < simplex[n].0.min(value) {
                simplex[n] = (inner, contracted);
            } else {
                let best = simplex[0].1.clone();
                for (old, x) in simplex.iter_mut().skip(1) {
                    for (xi, b) in x.iter_mut().zip(&best) {
                        *xi = b + 0.5 * (*xi - b);
                    }
                    *old = eval(x);
                }
            }
        }
    }
    simplex.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (value, x) = simplex.swap_remove(0);
    Minimum { x, value, evaluations: used }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rosenbrock_is_found() {
        let mut f = |x: &[f64]| (1.0 - x[0]).powi(2) + 100.0 * (x[1] - x[0] * x[0]).powi(2);
        let found = minimise(&mut f, &[-1.2, 1.0], &[0.5, 0.5], 2000);
        assert!((found.x[0] - 1.0).abs() < 1e-4 && (found.x[1] - 1.0).abs() < 1e-4, "{found:?}");
    }
}
