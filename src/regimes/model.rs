//! Fits and posteriors of hidden Markov models on the device, and the order of their states.
//!
//! A [`Problem`] is one model and the sequences that share it: an asset, or all assets where they are pooled. All problems of a call, with all
//! their restarts, run in one batch. Observations are scaled to unit deviation before, so that f32 and the least variance mean the same
//! whatever the asset.

use super::features::Feature;
use super::{Emission, standin};
use crate::{Device, Result};

/// The data of one model.
#[derive(Debug, Clone)]
pub(super) struct Problem {
    pub(super) d: usize,
    /// Scaled observations [T_i,D] of each sequence.
    pub(super) sequences: Vec<Vec<f32>>,
}

impl Problem {
    pub(super) fn rows(&self) -> usize {
        self.sequences.iter().map(Vec::len).sum::<usize>() / self.d
    }
}

/// How a model is fitted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Em {
    pub(super) emission: Emission,
    pub(super) restarts: usize,
    pub(super) iterations: usize,
    /// Gain in log-likelihood per observation below which it has converged.
    pub(super) tolerance: f64,
    pub(super) seed: u64,
}

/// A fitted model, in scaled units.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Model {
    pub(super) k: usize,
    pub(super) d: usize,
    pub(super) initial: Vec<f64>,
    pub(super) transition: Vec<f64>,
    /// [K,D].
    pub(super) mean: Vec<f64>,
    /// [K,D]: of the Gaussian, or the squared scale of Student's t.
    pub(super) variance: Vec<f64>,
    /// [K,D] of Student's t.
    pub(super) dof: Option<Vec<f64>>,
    pub(super) log_likelihood: f64,
    pub(super) iterations: usize,
    pub(super) converged: bool,
}

/// The best of all restarts of each problem with K states, states in the order of [`Model::ordered`].
pub(super) fn fit(device: &Device, problems: &[Problem], k: usize, em: &Em, features: &[Feature]) -> Result<Vec<Model>> {
    let _ = device;
    Ok(standin::fit(problems, k, em)?.into_iter().map(|model| model.ordered(features)).collect())
}

/// Filtered and, where asked for, smoothed probabilities [T_i,K] of sequences under a model each.
pub(super) fn posteriors(device: &Device, sequences: &[(&[f32], &Model)], smoothed: bool) -> Result<Vec<(Vec<f32>, Vec<f32>)>> {
    let _ = device;
    let of = |(rows, model): &(&[f32], &Model)| {
        let (_, filtered) = standin::forward(model, rows);
        let posterior = if smoothed { standin::smooth(model, &filtered) } else { Vec::new() };
        let short = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
        (short(filtered), short(posterior))
    };
    Ok(sequences.iter().map(of).collect())
}

impl Model {
    /// Variance of a state's observation, infinite where a t has none.
    pub(super) fn variance_of(&self, state: usize, d: usize) -> f64 {
        let at = state * self.d + d;
        let factor = self.dof.as_ref().map_or(1.0, |dof| if dof[at] > 2.0 { dof[at] / (dof[at] - 2.0) } else { f64::INFINITY });
        self.variance[at] * factor
    }

    /// States by volatility, calmest first: by the variance of returns; without returns by the mean of the realised volatility; without
    /// either by the variance of the first feature. Ties keep their order.
    pub(super) fn ordered(self, features: &[Feature]) -> Model {
        let returns = features.iter().position(|f| *f == Feature::Returns);
        let volatility = features.iter().position(|f| matches!(f, Feature::Volatility { .. }));
        let key = |state: usize| match (returns, volatility) {
            // The scale orders also where a t has no variance.
            (Some(d), _) => self.variance[state * self.d + d],
            (None, Some(d)) => self.mean[state * self.d + d],
            (None, None) => self.variance[state * self.d],
        };
        let mut order: Vec<usize> = (0..self.k).collect();
        order.sort_by(|&a, &b| key(a).total_cmp(&key(b)));
        self.permuted(&order)
    }

    /// State i becomes what was state `order[i]`.
    fn permuted(&self, order: &[usize]) -> Model {
        let rows = |x: &[f64], width: usize| order.iter().flat_map(|&s| x[s * width..(s + 1) * width].to_vec()).collect::<Vec<f64>>();
        let transition = order.iter().flat_map(|&i| order.iter().map(move |&j| (i, j))).map(|(i, j)| self.transition[i * self.k + j]).collect();
        Model {
            initial: rows(&self.initial, 1),
            transition,
            mean: rows(&self.mean, self.d),
            variance: rows(&self.variance, self.d),
            dof: self.dof.as_ref().map(|dof| rows(dof, self.d)),
            ..self.clone()
        }
    }

    /// Bars that a state lasts on average, 1/(1 − a_kk), from what leaves it so that no digit is lost; infinite if nothing does.
    pub(super) fn duration(&self, state: usize) -> f64 {
        let leaves: f64 = (0..self.k).filter(|&j| j != state).map(|j| self.transition[state * self.k + j]).sum();
        1.0 / leaves
    }

    /// Probabilities [K] one step later.
    pub(super) fn step(&self, p: &[f64]) -> Vec<f64> {
        (0..self.k).map(|j| (0..self.k).map(|i| p[i] * self.transition[i * self.k + j]).sum()).collect()
    }

    /// Free parameters: start, transitions, and location and scale (and degrees of freedom) per state and feature.
    pub(super) fn parameters(&self) -> usize {
        let per_state = self.d * if self.dof.is_some() { 3 } else { 2 };
        (self.k - 1) + self.k * (self.k - 1) + self.k * per_state
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn model() -> Model {
        Model {
            k: 3,
            d: 2,
            initial: vec![0.5, 0.3, 0.2],
            transition: vec![0.9, 0.06, 0.04, 0.1, 0.8, 0.1, 0.0, 0.02, 0.98],
            mean: vec![0.0, 1.0, 0.1, 2.0, 0.2, 3.0],
            variance: vec![4.0, 1.0, 1.0, 1.0, 9.0, 0.5],
            dof: None,
            log_likelihood: -1.0,
            iterations: 3,
            converged: true,
        }
    }

    #[test]
    fn states_are_ordered_by_volatility_and_carry_their_rows_along() {
        let ordered = model().ordered(&[Feature::Returns, Feature::Level]);
        assert_eq!(ordered.variance, [1.0, 1.0, 4.0, 1.0, 9.0, 0.5]);
        assert_eq!(ordered.mean, [0.1, 2.0, 0.0, 1.0, 0.2, 3.0]);
        assert_eq!(ordered.initial, [0.3, 0.5, 0.2]);
        assert_eq!(ordered.transition, [0.8, 0.1, 0.1, 0.06, 0.9, 0.04, 0.02, 0.0, 0.98]);
        let again = ordered.clone().ordered(&[Feature::Returns, Feature::Level]);
        assert_eq!(again, ordered);
        // Without returns the mean of the realised volatility decides.
        let by_level = model().ordered(&[Feature::Level, Feature::Volatility { window: 5 }]);
        assert_eq!(by_level.initial, [0.5, 0.3, 0.2]);
    }

    #[test]
    fn durations_parameters_and_steps_by_hand() {
        let m = model();
        let near = |got: f64, want: f64| assert!((got - want).abs() < 1e-12, "{got}, {want}");
        near(m.duration(0), 10.0);
        near(m.duration(1), 5.0);
        near(m.duration(2), 50.0);
        assert_eq!(m.parameters(), 2 + 6 + 12);
        // K = 2, D = 1: one start, two transitions, two means and two variances.
        let two = Model { k: 2, d: 1, ..model() };
        assert_eq!(two.parameters(), 7);
        assert_eq!(Model { k: 1, d: 1, transition: vec![1.0], ..model() }.duration(0), f64::INFINITY);
        for (got, want) in m.step(&[1.0, 0.0, 0.0]).into_iter().zip([0.9, 0.06, 0.04]) {
            near(got, want);
        }
    }
}
