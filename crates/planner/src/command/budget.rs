//! `plan budget`: the right size of model and data for a budget.

use serde::Serialize;

use super::{BudgetArgs, Inputs, Output, catalogue, json};
use crate::error::PlanError;
use crate::quantity::{parse, show};
use crate::scaling::{BESIROGLU, FittedLaw, HOFFMANN, Law, Optimum, fit, kaplan, read_runs};

/// One law's answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LawAnswer {
    /// The law's name.
    pub law: String,
    /// The compute-optimal model.
    pub optimum: Optimum,
    /// The loss of the size asked about, where one was.
    pub loss_of_asked: Option<f64>,
    /// The model that costs least over training and serving, at the optimum's loss.
    pub over_trained: Option<Optimum>,
}

/// The data of `plan budget`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BudgetReport {
    /// The budget in operations.
    pub flops: f64,
    /// The budget in petaFLOP/s-days.
    pub pf_days: f64,
    /// GPU-hours at the given utilization.
    pub gpu_hours: f64,
    /// Dollars at the given price.
    pub cost: f64,
    /// The answers.
    pub laws: Vec<LawAnswer>,
    /// The law fitted to the user's runs.
    pub fitted: Option<FittedLaw>,
}

/// Answers how large a model and how much data a budget should go to.
///
/// # Errors
/// [`PlanError::Invalid`] for none or several budgets or a bad amount; [`PlanError::Csv`] for a
/// bad table of runs.
pub fn budget(args: &BudgetArgs, inputs: &Inputs) -> Result<Output, PlanError> {
    let catalogue = catalogue(inputs)?;
    let gpu = catalogue.gpu(&args.gpu)?;
    let peak = gpu.peak(gpu.training_dtype())?;
    if !(0.0..=1.0).contains(&args.mfu) || args.mfu == 0.0 {
        return Err(PlanError::invalid("mfu", format!("{} is not in (0, 1]", args.mfu)));
    }
    let price = args.price_per_hour.unwrap_or(gpu.price_per_hour);
    if !price.is_finite() || price <= 0.0 {
        return Err(PlanError::invalid("price_per_hour", "must be a positive number"));
    }
    let per_hour = peak * args.mfu * 3600.0;
    let parameters = args.parameters.as_deref().map(|t| parse("parameters", t)).transpose()?;
    let tokens = args.tokens.as_deref().map(|t| parse("tokens", t)).transpose()?;
    let budgets = [
        args.flops.as_deref().map(|t| parse("flops", t)),
        args.gpu_hours.as_deref().map(|t| parse("gpu_hours", t).map(|h| h * per_hour)),
        args.money.as_deref().map(|t| parse("money", t).map(|m| m / price * per_hour)),
    ];
    let given: Vec<f64> = budgets.into_iter().flatten().collect::<Result<_, _>>()?;
    let flops = match (given.as_slice(), parameters, tokens) {
        ([one], ..) => *one,
        ([], Some(n), Some(d)) => 6.0 * n * d,
        ([], ..) => {
            return Err(PlanError::invalid(
                "flops",
                "give one budget: flops, gpu_hours or money; or parameters with tokens",
            ));
        }
        _ => return Err(PlanError::invalid("flops", "give one budget, not several")),
    };
    let fitted = match (&args.fit, &inputs.runs) {
        (Some(_), Some(file)) => Some(fit(&read_runs(&file.name, &file.text)?)?),
        (Some(name), None) => {
            return Err(PlanError::invalid("fit", format!("'{name}' was not read")));
        }
        _ => None,
    };
    let served = args.served_tokens.as_deref().map(|t| parse("served_tokens", t)).transpose()?;
    let mut laws: Vec<LawAnswer> = Vec::new();
    let mut named: Vec<(&str, Law)> =
        vec![("Hoffmann 2022, approach 3", HOFFMANN), ("Besiroglu 2024", BESIROGLU)];
    if let Some(own) = &fitted {
        named.insert(0, ("fitted to your runs", own.law));
    }
    for (name, law) in named {
        let optimum = law.optimum(flops);
        let over_trained = served.map(|s| law.over_trained(optimum.loss, s)).transpose()?;
        let loss_of_asked = parameters.map(|n| law.loss(n, tokens.unwrap_or(flops / 6.0 / n)));
        laws.push(LawAnswer { law: name.to_owned(), optimum, loss_of_asked, over_trained });
    }
    laws.push(LawAnswer {
        law: "Kaplan 2020 (for comparison)".to_owned(),
        optimum: kaplan(flops),
        loss_of_asked: None,
        over_trained: None,
    });
    let gpu_hours = flops / per_hour;
    let report = BudgetReport {
        flops,
        pf_days: flops / 8.64e19,
        gpu_hours,
        cost: gpu_hours * price,
        laws,
        fitted,
    };
    let table = render(&report, &gpu.name, args.mfu, price, served);
    Ok(Output { table, json: json(&report)?, ..Output::default() })
}

fn render(report: &BudgetReport, gpu: &str, mfu: f64, price: f64, served: Option<f64>) -> String {
    let mut text = format!(
        "budget {:.3e} FLOP = {:.0} PF-days = {} {gpu} hours at {:.0}% MFU = ${} at ${price:.2} per hour\n\n",
        report.flops,
        report.pf_days,
        show(report.gpu_hours),
        mfu * 100.0,
        show(report.cost)
    );
    text.push_str(&format!(
        "{:<30} {:>10} {:>17} {:>10} {:>8} {:>7}\n",
        "LAW", "PARAMETERS", "(1 ERROR)", "TOKENS", "PER PAR.", "LOSS"
    ));
    for answer in &report.laws {
        let o = &answer.optimum;
        let range = if o.parameters_range.0 < o.parameters {
            format!("{} to {}", show(o.parameters_range.0), show(o.parameters_range.1))
        } else {
            "not known".to_owned()
        };
        text.push_str(&format!(
            "{:<30} {:>10} {range:>17} {:>10} {:>8.1} {:>7.3}\n",
            answer.law,
            show(o.parameters),
            show(o.tokens),
            o.tokens_per_parameter,
            o.loss
        ));
        if let Some(loss) = answer.loss_of_asked {
            text.push_str(&format!(
                "  the size asked about: loss {loss:.3} ({:+.3})\n",
                loss - o.loss
            ));
        }
        if let (Some(over), Some(served)) = (&answer.over_trained, served) {
            let training = 6.0 * over.parameters * over.tokens;
            let life = |n: f64, d: f64| 6.0 * n * d + 2.0 * n * served;
            let saved = 1.0 - life(over.parameters, over.tokens) / life(o.parameters, o.tokens);
            text.push_str(&format!(
                "  serving {} tokens: {} parameters on {} tokens reach the same loss for {:.1}% less over their life ({:.1}x the training)\n",
                show(served),
                show(over.parameters),
                show(over.tokens),
                saved * 100.0,
                training / report.flops
            ));
        }
    }
    if let Some(own) = &report.fitted {
        text.push_str(&format!(
            "\nyour runs ({}): L = {:.4} + {:.2} / N^{:.4} + {:.2} / D^{:.4}; errors of the exponents {:.4}, {:.4}; rms of ln L {:.4}\n",
            own.runs,
            own.law.e,
            own.law.a,
            own.law.alpha,
            own.law.b,
            own.law.beta,
            own.law.alpha_error,
            own.law.beta_error,
            own.rms_log_error
        ));
    }
    text
}
