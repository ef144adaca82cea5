//! Fits and posteriors of hidden Markov models on the device, and the order of their states.
//!
//! A [`Problem`] is one model and the sequences that share it: an asset, or all assets where they are pooled. All problems of a call, with all
//! their restarts, run in one batch. Observations are scaled to unit deviation before, so that f32 and the least variance mean the same
//! whatever the asset.

use super::features::Feature;
use super::{Candidate, Criterion, Emission, Progress, RegimeConfig};
use crate::kernels::hmm::{self, Hmm, LOG_ZERO, PackShape, Transitions, Wanted, hmm_forward_backward, pack_gaussian_diagonal, pack_student_t, pack_words};
use crate::kernels::hmm_baum_welch::Observations;
use crate::kernels::hmm_fit::{self, EmissionParameters, FitOptions};
use crate::kernels::{Pass, Read, View};
use crate::{Device, Error, Result};
use std::ops::RangeInclusive;

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
    pub(super) converged: bool,
}

/// The best of all starts with the best number of states, and what was tried; likelihoods are those of the scaled observations.
#[derive(Debug, Clone)]
pub(super) struct Fitted {
    pub(super) model: Model,
    pub(super) candidates: Vec<Candidate>,
    pub(super) iterations: usize,
}

impl Fitted {
    pub(super) fn chosen(&self) -> Candidate {
        let none = Candidate { states: self.model.k, parameters: 0, log_likelihood: f64::NAN, aic: f64::NAN, bic: f64::NAN, icl: f64::NAN, converged: false };
        self.candidates.iter().find(|c| c.states == self.model.k).copied().unwrap_or(none)
    }
}

/// The best of all starts of each problem with the best of some numbers of states, in the order of [`Model::ordered`].
pub(super) fn fit(
    device: &Device,
    problems: &[&Problem],
    states: RangeInclusive<usize>,
    config: &RegimeConfig,
    progress: &mut Progress<'_>,
) -> Result<Vec<Fitted>> {
    if !config.pooled {
        let sequences: Vec<&[f32]> = problems.iter().flat_map(|problem| problem.sequences.iter().map(Vec::as_slice)).collect();
        return fit_sequences(device, &sequences, problems.first().map_or(1, |p| p.d), states, config, progress);
    }
    let mut fits = Vec::with_capacity(problems.len());
    for problem in problems {
        let sequences: Vec<&[f32]> = problem.sequences.iter().map(Vec::as_slice).collect();
        fits.extend(fit_sequences(device, &sequences, problem.d, states.clone(), config, progress)?);
    }
    Ok(fits)
}

/// A model of each sequence, or one of all.
fn fit_sequences(
    device: &Device,
    sequences: &[&[f32]],
    d: usize,
    states: RangeInclusive<usize>,
    config: &RegimeConfig,
    progress: &mut Progress<'_>,
) -> Result<Vec<Fitted>> {
    if sequences.is_empty() {
        return Ok(Vec::new());
    }
    let t = sequences.iter().map(|rows| rows.len() / d).max().unwrap_or(0);
    let mut obs = vec![0.0f32; sequences.len() * t * d];
    for (rows, padded) in sequences.iter().zip(obs.chunks_exact_mut(t * d)) {
        padded[..rows.len()].copy_from_slice(rows);
    }
    let lengths: Vec<u32> = sequences.iter().map(|rows| (rows.len() / d) as u32).collect();
    let data = Observations { obs: &obs, n: sequences.len(), t, width: d, lengths: Some(&lengths), observed: None };
    // Of models with series of different lengths the shortest, so that what a later refit brings changes no earlier one.
    let all = lengths.iter().map(|&l| f64::from(l));
    let rows = if config.pooled { all.sum() } else { all.fold(f64::INFINITY, f64::min) };
    let options = FitOptions {
        emission: match config.emission {
            Emission::Gaussian => hmm::Emission::GaussianDiagonal,
            Emission::StudentT => hmm::Emission::StudentT,
        },
        states: states.collect(),
        criterion: match config.criterion {
            Criterion::Bic => hmm_fit::Criterion::Bic,
            Criterion::Aic => hmm_fit::Criterion::Aic,
            Criterion::Icl => hmm_fit::Criterion::Icl,
        },
        pooled: config.pooled,
        restarts: config.restarts,
        iterations: config.iterations as u32,
        // Below that f32 no longer tells a gain from rounding.
        tolerance: (config.tolerance * rows).max(LEAST_GAIN),
        seed: config.seed,
        freedom: config.degrees_of_freedom,
        ..FitOptions::default()
    };
    let mut stopped = Ok(());
    let fits = hmm_fit::fit_with_progress(device, &data, &options, &mut |p| {
        if stopped.is_ok() {
            stopped = progress(&format!("{} of {} fits finished, iteration {}", p.stopped, p.models, p.iterations));
        }
    })?;
    stopped?;
    fits.into_iter().map(|fit| fitted(fit, &config.features)).collect()
}

/// Gain in log-likelihood that always counts as none.
const LEAST_GAIN: f64 = 1e-3;

fn fitted(fit: hmm_fit::Fit, features: &[Feature]) -> Result<Fitted> {
    let candidate = |c: &hmm_fit::Candidate| Candidate {
        states: c.k,
        parameters: c.free,
        log_likelihood: c.log_likelihood,
        aic: c.criteria.aic,
        bic: c.criteria.bic,
        icl: c.criteria.icl.unwrap_or(f64::NAN),
        converged: c.converged,
    };
    let mut p = fit.parameters;
    // Devices leave rows that sum to one in f32; many steps ahead that is not enough.
    for row in p.trans.chunks_exact_mut(p.k).chain(std::iter::once(p.init.as_mut_slice())) {
        let sum: f64 = row.iter().sum();
        row.iter_mut().for_each(|x| *x /= sum);
    }
    let (mean, variance, dof) = match p.emission {
        EmissionParameters::GaussianDiagonal { mean, variance } => (mean, variance, None),
        EmissionParameters::StudentT { location, scale, freedom } => (location, scale.iter().map(|s| s * s).collect(), Some(freedom)),
        other => return Err(Error::Internal(format!("a regime model cannot have the emission {other:?}"))),
    };
    let model = Model { k: p.k, d: p.d, initial: p.init, transition: p.trans, mean, variance, dof, converged: fit.converged };
    Ok(Fitted { model: model.ordered(features), candidates: fit.candidates.iter().map(candidate).collect(), iterations: fit.iterations })
}

/// Observations of a launch stay below this many probabilities: 64 MiB of each kind.
const MOST_VALUES: usize = 16 << 20;

/// Filtered and, where asked for, smoothed probabilities [T_i,K] of sequences under a model each.
pub(super) fn posteriors(device: &Device, sequences: &[(&[f32], &Model)], smoothed: bool) -> Result<Vec<[Vec<f32>; 2]>> {
    let mut all = vec![[Vec::new(), Vec::new()]; sequences.len()];
    let mut states: Vec<usize> = sequences.iter().map(|(_, model)| model.k).collect();
    states.sort_unstable();
    states.dedup();
    for k in states {
        let these: Vec<usize> = (0..sequences.len()).filter(|&i| sequences[i].1.k == k).collect();
        let longest = these.iter().map(|&i| sequences[i].0.len() / sequences[i].1.d).max().unwrap_or(0);
        for some in these.chunks((MOST_VALUES / (longest * k).max(1)).max(1)) {
            let batch: Vec<(&[f32], &Model)> = some.iter().map(|&i| sequences[i]).collect();
            for (&i, found) in some.iter().zip(posteriors_of_batch(device, &batch, longest, smoothed)?) {
                all[i] = found;
            }
        }
    }
    Ok(all)
}

/// The same where all models have as many states, padded to `t` steps.
fn posteriors_of_batch(device: &Device, sequences: &[(&[f32], &Model)], t: usize, smoothed: bool) -> Result<Vec<[Vec<f32>; 2]>> {
    let Some(&(_, first)) = sequences.first() else { return Ok(Vec::new()) };
    let (b, k, d) = (sequences.len(), first.k, first.d);
    let each = |f: &dyn Fn(&Model) -> Vec<f64>| sequences.iter().flat_map(|(_, model)| f(model)).collect::<Vec<f64>>();
    let log = |p: &[f64]| p.iter().map(|&p| if p > 0.0 { p.ln() } else { LOG_ZERO }).collect::<Vec<f64>>();
    let (log_init, mean) = (each(&|m| log(&m.initial)), each(&|m| m.mean.clone()));
    let shape = PackShape { models: b, k, d };
    let (emission, model) = if first.dof.is_some() {
        let (scale, dof) = (each(&|m| m.variance.iter().map(|v| v.sqrt()).collect()), each(&|m| m.dof.clone().unwrap_or_default()));
        (hmm::Emission::StudentT, pack_student_t(shape, &log_init, &mean, &scale, &dof)?)
    } else {
        (hmm::Emission::GaussianDiagonal, pack_gaussian_diagonal(shape, &log_init, &mean, &each(&|m| m.variance.clone()))?)
    };
    let log_trans: Vec<f32> = each(&|m| log(&m.transition)).into_iter().map(|x| x as f32).collect();
    let mut obs = vec![0.0f32; b * t * d];
    for ((rows, _), padded) in sequences.iter().zip(obs.chunks_exact_mut(t * d)) {
        padded[..rows.len()].copy_from_slice(rows);
    }
    let lengths: Vec<u32> = sequences.iter().map(|(rows, _)| (rows.len() / d) as u32).collect();
    let words = device.upload_u32("lengths", &pack_words(t, &lengths, None)?)?;
    let (model, log_trans, obs) = (device.upload("model", &model)?, device.upload("log_trans", &log_trans)?, device.upload("obs", &obs)?);
    let hmm = Hmm {
        b: b as u64,
        t: t as u64,
        k: k as u64,
        d: d as u64,
        emission,
        model: View::from(&model),
        per_sequence: true,
        transitions: Transitions::Table { log_trans: View::from(&log_trans), per_sequence: true, per_step: false },
        obs: View::from(&obs),
        words: Some(View::from(&words)),
        masked: false,
    };
    let mut pass = device.pass("regimes");
    let wanted = Wanted { filtered: true, posterior: smoothed, ..Wanted::default() };
    let out = hmm_forward_backward(&mut pass, &hmm, wanted)?;
    let read = |pass: &mut Pass, view: &Option<View>| view.as_ref().map(|view| pass.read(view.clone())).transpose();
    let (filtered, posterior, summary) = (read(&mut pass, &out.filtered)?, read(&mut pass, &out.posterior)?, out.read(&mut pass)?);
    let mut done = pass.submit()?;
    let mut values = |read: Option<Read>| read.map_or(Ok(Vec::new()), |read| done.f64(read));
    let (filtered, posterior) = (values(filtered)?, values(posterior)?);
    if let Some(i) = out.likelihoods(&mut done, summary)?.iter().position(|l| l.impossible.is_some()) {
        return Err(Error::Internal(format!("the model of sequence {i} cannot give its own observations")));
    }
    let part = |all: &[f64], i: usize| all.get(i * t * k..).map_or(Vec::new(), |x| x.iter().take(lengths[i] as usize * k).map(|&p| p as f32).collect());
    Ok((0..b).map(|i| [part(&filtered, i), part(&posterior, i)]).collect())
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
        let leaves = (0..self.k).filter(|&j| j != state).fold(0.0, |sum, j| sum + self.transition[state * self.k + j]);
        1.0 / leaves
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
    fn durations_by_hand() {
        let m = model();
        let near = |got: f64, want: f64| assert!((got - want).abs() < 1e-12, "{got}, {want}");
        near(m.duration(0), 10.0);
        near(m.duration(1), 5.0);
        near(m.duration(2), 50.0);
        assert_eq!(Model { k: 1, d: 1, transition: vec![1.0], ..model() }.duration(0), f64::INFINITY);
    }
}
