//! How amounts and moments are told to people, the same in every table and in `top`.

use drumline_types::format_duration_ms;
use drumline_wire::v1;

/// How long ago a moment was; empty when it has not come.
#[must_use]
pub fn ago(now_ms: u64, then_ms: u64) -> String {
    if then_ms == 0 { String::new() } else { format_duration_ms(now_ms.saturating_sub(then_ms)) }
}

/// A number with a decimal prefix: 1234567 is `1.23M`.
#[must_use]
pub fn count(value: f64) -> String {
    const PREFIXES: [(f64, &str); 4] = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    if !value.is_finite() {
        return "-".to_owned();
    }
    match PREFIXES.iter().find(|(size, _)| value >= *size) {
        Some((size, prefix)) => format!("{:.2}{prefix}", value / size),
        None if value.fract() == 0.0 => format!("{value:.0}"),
        None => format!("{value:.1}"),
    }
}

/// A share from 0 to 1, in percent.
#[must_use]
pub fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.0}%", share * 100.0) } else { "-".to_owned() }
}

/// What a job is at, in a few words.
#[must_use]
pub fn progress(job: &v1::JobView) -> String {
    if let Some(run) = job.training.as_ref().filter(|run| run.steps > 0) {
        return if run.step == 0 {
            format!("step 0/{}", run.steps)
        } else {
            format!(
                "step {}/{}, loss {:.4}, {} tokens/s",
                run.step,
                run.steps,
                run.loss,
                count(run.tokens_per_second)
            )
        };
    }
    match &job.service {
        Some(service) if service.drains => format!("finishes {} requests", service.running),
        Some(service) if service.ready => {
            let of = match service.replicas {
                0 | 1 => String::new(),
                wanted => format!(" on {} of {wanted} replicas", service.replicas_ready),
            };
            format!(
                "serving {}{of}, {} running, {} waiting",
                service.served_name, service.running, service.waiting
            )
        }
        Some(service) => format!("{} is not ready", service.served_name),
        None => String::new(),
    }
}

/// Why a job is where it is, in one line.
#[must_use]
pub fn reason(job: &v1::JobView) -> String {
    match (job.reason.is_empty(), job.message.is_empty()) {
        (true, _) => job.message.clone(),
        (false, true) => job.reason.clone(),
        (false, false) => format!("{}: {}", job.reason, job.message),
    }
}

/// How a rank's process ended; empty when it has not.
#[must_use]
pub fn exit(code: Option<i32>, signal: Option<i32>) -> String {
    match (code, signal) {
        (_, Some(signal)) => format!("signal {signal}"),
        (Some(code), None) => format!("exit code {code}"),
        (None, None) => String::new(),
    }
}

/// How the first rank failed: one whose end nobody saw was lost with its node.
#[must_use]
pub fn failure(exit: &v1::RankExitView) -> String {
    let how = match self::exit(exit.exit_code, exit.signal) {
        how if how.is_empty() => "lost".to_owned(),
        how => how,
    };
    if exit.message.is_empty() { how } else { format!("{how}: {}", exit.message) }
}

/// A time of day, UTC.
#[must_use]
pub fn clock(at_ms: u64) -> String {
    let seconds = at_ms / 1000;
    let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{h:02}:{m:02}:{s:02}.{:03}Z", at_ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_read_as_people_say_them() {
        assert_eq!(count(1_234_567.0), "1.23M");
        assert_eq!(count(12.0), "12");
        assert_eq!(count(f64::NAN), "-");
        assert_eq!(percent(0.456), "46%");
        assert_eq!(clock(3_661_042), "01:01:01.042Z");
        assert_eq!(ago(100, 0), "");
    }
}
