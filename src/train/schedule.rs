//! Learning rates over time, and when to stop: per model.

/// Factor of the learning rate.
#[derive(Debug, Clone, PartialEq)]
pub enum Schedule {
    /// 1 throughout.
    Constant,
    /// From 1 to `floor` on half a cosine over all steps. Loshchilov, Hutter 2017.
    Cosine {
        /// The last factor.
        floor: f64,
    },
    /// Divides a model's rate when its validation loss has not fallen by `threshold`, an absolute amount, for `patience` epochs.
    Plateau {
        /// Factor of a reduction.
        factor: f64,
        /// Epochs without improvement that are let pass.
        patience: usize,
        /// What counts as an improvement.
        threshold: f64,
        /// The factor stays above this.
        floor: f64,
    },
}

/// Rates of M models.
#[derive(Debug, Clone, PartialEq)]
pub struct Rates {
    schedule: Schedule,
    warm_up: u64,
    steps: u64,
    /// Of each model: factor so far, best loss, epochs since.
    plateau: Vec<(f64, f64, usize)>,
}

impl Rates {
    /// Linear from 0 over `warm_up` steps, then the schedule over the rest of `steps`.
    pub fn new(schedule: Schedule, warm_up: u64, steps: u64, models: usize) -> Rates {
        Rates { schedule, warm_up, steps, plateau: vec![(1.0, f64::INFINITY, 0); models] }
    }

    pub(crate) fn state(&self) -> &[(f64, f64, usize)] {
        &self.plateau
    }

    pub(crate) fn with_state(like: &Rates, plateau: Vec<(f64, f64, usize)>) -> Rates {
        Rates { plateau, ..like.clone() }
    }

    /// Factors of all models in a step, counted from 0.
    pub fn at(&self, step: u64) -> Vec<f32> {
        let warm = if step < self.warm_up { (step + 1) as f64 / self.warm_up as f64 } else { 1.0 };
        let after = step.saturating_sub(self.warm_up) as f64 / self.steps.saturating_sub(self.warm_up).max(1) as f64;
        let common = match self.schedule {
            Schedule::Cosine { floor } => floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * after.min(1.0)).cos()),
            _ => 1.0,
        };
        self.plateau.iter().map(|&(factor, _, _)| (warm * common * factor) as f32).collect()
    }

    /// Takes note of the models' validation losses at the end of an epoch; a loss that is no number is no improvement.
    pub fn epoch(&mut self, losses: &[f64]) {
        let Schedule::Plateau { factor, patience, threshold, floor } = self.schedule else { return };
        for ((rate, best, since), &loss) in self.plateau.iter_mut().zip(losses) {
            if loss < *best - threshold {
                (*best, *since) = (loss, 0);
            } else {
                *since += 1;
                if *since > patience {
                    (*rate, *since) = ((*rate * factor).max(floor), 0);
                }
            }
        }
    }
}

/// When models stop.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EarlyStopping {
    /// Epochs without improvement that are let pass.
    pub patience: usize,
    /// What counts as an improvement, absolute.
    pub threshold: f64,
}

/// Best epoch and state of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Best validation loss; infinite before the first.
    pub best: f64,
    /// Its epoch, from 0.
    pub best_epoch: usize,
    /// Epoch after which it was stopped.
    pub stopped: Option<usize>,
}

impl Progress {
    /// Nothing seen yet.
    pub fn new() -> Progress {
        Progress { best: f64::INFINITY, best_epoch: 0, stopped: None }
    }

    /// Takes note of an epoch; true where it is the best so far, and its parameters are to be kept.
    pub fn epoch(&mut self, epoch: usize, loss: f64, stopping: Option<EarlyStopping>) -> bool {
        if self.stopped.is_some() {
            return false;
        }
        let threshold = stopping.map_or(0.0, |s| s.threshold);
        let better = loss < self.best - threshold || (self.best.is_infinite() && loss.is_finite());
        if better {
            (self.best, self.best_epoch) = (loss, epoch);
        } else if stopping.is_some_and(|s| epoch - self.best_epoch > s.patience) {
            self.stopped = Some(epoch);
        }
        better
    }
}

impl Default for Progress {
    fn default() -> Progress {
        Progress::new()
    }
}
