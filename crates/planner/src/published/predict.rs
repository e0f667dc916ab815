//! Predicts one published run.

use super::{Measured, Row};
use crate::error::PlanError;
use crate::memory;
use crate::reliability::Reliability;
use crate::split::{Batch, Recompute, Split};
use crate::step::{StepTime, step_flops, step_time};

/// A published run fitted its GPU, so our estimate may exceed the memory by this much before a
/// setting is ruled out.
const MEMORY_TOLERANCE: f64 = 1.2;

impl Row {
    /// Fills in what the row leaves blank and predicts its step.
    ///
    /// Authors publish the setting that ran best, so blanks take the setting that the model finds
    /// fastest among those that fit the memory: micro-batch 1, 2, 4, 8, 16; recomputation. Blank
    /// virtual stages are 1 in the stacks without overlap, where interleaving was one codebase's
    /// novelty; later, any that divide the stage's layers, where the micro-batches are a multiple
    /// of the stages as the schedule demands.
    ///
    /// # Errors
    /// [`PlanError::Invalid`] where no setting is possible.
    pub fn predict(&self) -> Result<(Split, StepTime), PlanError> {
        let micro: Vec<u32> = self.micro_batch.map_or(vec![1, 2, 4, 8, 16], |b| vec![b]);
        let modes: Vec<Recompute> = self.recompute.map_or(Recompute::ALL.to_vec(), |r| vec![r]);
        let mut best: Option<Tried> = None;
        let mut refusal = None;
        for grid in self.grids() {
            for &micro_batch in &micro {
                for &recompute in &modes {
                    for virtual_stages in self.virtual_stages(&grid) {
                        let split = Split { micro_batch, recompute, virtual_stages, ..grid };
                        match self.attempt(&split) {
                            Ok(None) => {}
                            Ok(Some(tried)) => {
                                if best.as_ref().is_none_or(|old| tried.beats(old)) {
                                    best = Some(tried);
                                }
                            }
                            Err(error) => refusal = Some(error),
                        }
                    }
                }
            }
        }
        best.map(|tried| (tried.split, tried.time)).ok_or_else(|| {
            refusal.unwrap_or_else(|| PlanError::invalid("row", "no setting is possible"))
        })
    }

    /// The row's grid, or those that a blank one may have been.
    fn grids(&self) -> Vec<Split> {
        if self.grid_given {
            return vec![self.split];
        }
        let mut list = Vec::new();
        for tensor in [1, 2, 4, 8] {
            for pipeline in [1, 2, 4, 8, 16] {
                let ranks = tensor * pipeline * self.split.context;
                let allowed = self.model.heads.is_multiple_of(tensor)
                    && pipeline <= self.model.layers
                    && self.gpus.is_multiple_of(ranks);
                if allowed {
                    let data = self.gpus / ranks;
                    list.push(Split { tensor, pipeline, data, ..self.split });
                }
            }
        }
        list
    }

    fn virtual_stages(&self, grid: &Split) -> Vec<u32> {
        let per_stage = self.model.layers.div_ceil(grid.pipeline);
        match self.virtual_stages {
            Some(v) => vec![v],
            None if grid.pipeline == 1 || !self.batch.stack.overlaps() => vec![1],
            None => (1..=per_stage).filter(|v| per_stage.is_multiple_of(*v)).collect(),
        }
    }

    /// Times one setting; none where its schedule or its batch is not one that would have run.
    fn attempt(&self, split: &Split) -> Result<Option<Tried>, PlanError> {
        // A batch that does not divide (1,538 sequences over 48) is timed at the nearest that
        // does, and the step scaled.
        let per_pass = u64::from(split.data) * u64::from(split.micro_batch);
        let global = u64::from(self.batch.global);
        let passes = ((global as f64 / per_pass as f64).round() as u64).max(1);
        let rounded = passes.saturating_mul(per_pass);
        let far = rounded > global + global / 50 && self.micro_batch.is_none();
        if (far && split.micro_batch > 1) || rounded > u64::from(u32::MAX) {
            return Ok(None);
        }
        let batch = Batch { global: rounded as u32, ..self.batch };
        let mut time = step_time(&self.model, split, &batch, &self.machines)?;
        time.step *= global as f64 / rounded as f64;
        let m = time.micro_batches as u32;
        let interleaved = split.virtual_stages > 1 && self.virtual_stages.is_none();
        if interleaved && !m.is_multiple_of(split.pipeline) {
            return Ok(None);
        }
        let framework = self.machines.framework_bytes();
        let need = memory::peak(&self.model, split, &batch, m, framework).total();
        let fits = need <= MEMORY_TOLERANCE * self.machines.gpu.memory_bytes;
        // Where nothing fits by our count, the leanest stands in.
        let rank = if fits { time.step } else { need };
        Ok(Some(Tried { fits, rank, split: *split, time }))
    }

    /// Adds what failures cost: days and GPU-hours of a whole run are published with them.
    fn with_failures(&self, days: f64) -> f64 {
        let nodes = f64::from(self.gpus) / f64::from(self.machines.network.gpus_per_node.max(1));
        let nodes = nodes.ceil().max(1.0);
        let usual = Reliability {
            failures_per_node_day: 0.004,
            checkpoint_s: Reliability::checkpoint_seconds(&self.model, nodes, 2.0),
            restart_s: 600.0,
            interval_s: None,
        };
        usual.effective(nodes, days).map_or(days, |e| days / e.ratio)
    }

    /// Predicts the published figure, in its unit.
    ///
    /// # Errors
    /// As [`Row::predict`].
    pub fn predict_value(&self) -> Result<f64, PlanError> {
        let (split, time) = self.predict()?;
        let gpus = f64::from(self.gpus);
        let (model_flops, hardware_flops) = step_flops(&self.model, split.recompute, &self.batch);
        let days = self.tokens_b.map_or(f64::NAN, |billions| {
            billions * 1e9 / self.batch.tokens() * time.step / 86_400.0
        });
        Ok(match self.measured {
            Measured::HfuTflopsPerGpu => time.hardware_flops_per_gpu / 1e12,
            Measured::ModelTflopsPerGpu => time.model_flops_per_gpu / 1e12,
            Measured::HfuPercent => time.hfu * 100.0,
            Measured::MfuPercent => time.mfu * 100.0,
            // A utilization above 1 can only be a percentage.
            Measured::Hfu => time.hfu * if self.value > 1.0 { 100.0 } else { 1.0 },
            Measured::Mfu => time.mfu * if self.value > 1.0 { 100.0 } else { 1.0 },
            Measured::StepSeconds => time.step,
            Measured::StepMs => time.step * 1e3,
            Measured::TokensPerSecondPerGpu => time.tokens_per_gpu,
            Measured::TokensPerSecond => time.tokens_per_gpu * gpus,
            Measured::SequencesPerSecond => f64::from(self.batch.global) / time.step,
            Measured::HfuPflops => hardware_flops / time.step / 1e15,
            Measured::ModelPflops => model_flops / time.step / 1e15,
            Measured::Days => self.with_failures(days),
            Measured::GpuHours => self.with_failures(days) * 24.0 * gpus,
            Measured::MemoryGib => {
                let m = time.micro_batches as u32;
                memory::peak(&self.model, &split, &self.batch, m, self.machines.framework_bytes())
                    .total()
                    / f64::from(1 << 30)
            }
        })
    }
}

/// One setting of a row's blanks.
struct Tried {
    fits: bool,
    rank: f64,
    split: Split,
    time: StepTime,
}

impl Tried {
    fn beats(&self, old: &Self) -> bool {
        (self.fits && !old.fits) || (self.fits == old.fits && self.rank < old.rank)
    }
}
