//! The learning rate's course, and the constants of one AdamW step.

use drumline_spec::{LearningRate, TrainingJob};
use drumline_tensor::{AdamW, Rounding};

/// Returns the learning rate of step `step`, counted from 0: a linear warm-up that ends at the
/// peak, then a half cosine that reaches the floor at the last step.
///
/// Source: Loshchilov and Hutter 2017, without restarts.
#[must_use]
pub fn learning_rate(schedule: LearningRate, steps: u64, step: u64) -> f32 {
    if step < schedule.warmup_steps {
        return schedule.peak * (step + 1) as f32 / schedule.warmup_steps as f32;
    }
    let decay = steps.saturating_sub(1).saturating_sub(schedule.warmup_steps);
    if decay == 0 {
        return schedule.peak;
    }
    let done = ((step - schedule.warmup_steps) as f64 / decay as f64).min(1.0);
    let share = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
    let (peak, floor) = (f64::from(schedule.peak), f64::from(schedule.floor));
    (floor + (peak - floor) * share) as f32
}

/// Returns the factor that brings a gradient of this norm down to the job's limit.
#[must_use]
pub fn clip_scale(clip_norm: f32, norm: f32) -> f32 {
    if clip_norm > 0.0 && norm > clip_norm { clip_norm / norm } else { 1.0 }
}

/// Returns the constants of step `step`, counted from 0.
#[must_use]
pub fn adamw(job: &TrainingJob, step: u64, gradient_scale: f32) -> AdamW {
    let o = job.optimizer;
    let power = i32::try_from(step + 1).unwrap_or(i32::MAX);
    AdamW {
        learning_rate: learning_rate(job.learning_rate, job.steps, step),
        beta1: o.beta1,
        beta2: o.beta2,
        epsilon: o.epsilon,
        weight_decay: o.weight_decay,
        // In f64: 1 - 0.999 loses three digits in f32.
        correction1: (1.0 - f64::from(o.beta1).powi(power)) as f32,
        correction2: (1.0 - f64::from(o.beta2).powi(power)) as f32,
        gradient_scale,
        // The state knows which of its elements are meant.
        rounding: Rounding::Nearest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_warms_up_peaks_and_falls_to_the_floor() {
        let s = LearningRate { peak: 1.0, floor: 0.1, warmup_steps: 10 };
        assert!((learning_rate(s, 101, 0) - 0.1).abs() < 1e-6);
        assert!((learning_rate(s, 101, 9) - 1.0).abs() < 1e-6);
        assert!((learning_rate(s, 101, 10) - 1.0).abs() < 1e-6);
        assert!((learning_rate(s, 101, 55) - 0.55).abs() < 1e-6);
        assert!((learning_rate(s, 101, 100) - 0.1).abs() < 1e-6);
        assert!((learning_rate(s, 101, 1000) - 0.1).abs() < 1e-6);
        for step in 10..100 {
            assert!(learning_rate(s, 101, step + 1) <= learning_rate(s, 101, step));
        }
    }

    #[test]
    fn short_runs_and_runs_without_warm_up_have_a_rate() {
        let s = LearningRate { peak: 1.0, floor: 0.1, warmup_steps: 0 };
        assert_eq!(learning_rate(s, 1, 0), 1.0);
        assert_eq!(learning_rate(s, 0, 0), 1.0);
        let s = LearningRate { warmup_steps: 5, ..s };
        assert!((learning_rate(s, 3, 2) - 0.6).abs() < 1e-6);
    }

    #[test]
    fn clipping_only_shrinks() {
        assert_eq!(clip_scale(1.0, 0.5), 1.0);
        assert_eq!(clip_scale(1.0, 4.0), 0.25);
        assert_eq!(clip_scale(0.0, 4.0), 1.0);
    }
}
