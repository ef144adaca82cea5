//! Fitting hidden Markov models: starts, restarts, Baum-Welch on the device, the choice of K, results in natural units.
//!
//! Start    k-means++ (Philox, so the same everywhere) and up to 20 Lloyd steps on at most 8,192 steps of each group of sequences, on the host: about
//!          K·D·10⁵ operations per start, run in parallel. Even restarts cluster local means and local log-deviations (±10 steps), which
//!          tells calm from wild; odd ones cluster the observations themselves. init uniform, trans 0.9 on the diagonal.
//! Restarts R starts of each group are R more models of the same launches; the likeliest is kept.
//! Choice   every K of the list runs in the same pass; for each group the K of least criterion is kept:
//!          AIC = −2·L + 2·p,  BIC = −2·L + p·ln n,  ICL = BIC + 2·H,  n observed steps, H the entropy of the state path given the
//!          observations, H = L − E[log p(observations, path)] from the sums of the last expectation.
//! Source   Arthur & Vassilvitskii 2007; Schwarz 1978; Akaike 1974; Biernacki, Celeux & Govaert 2000.

use crate::device::{Device, DeviceKind};
use crate::hmm::{Emission, PackShape, cholesky, invert_lower, pack_categorical, pack_gaussian_diagonal, pack_gaussian_full};
use crate::hmm::{pack_log_probabilities, pack_poisson, pack_regression, pack_student_t};
use crate::hmm_baum_welch::{BaumWelch, Observations, Settings, Status, natural};
use crate::philox::{philox4x32, uniform};
use crate::{Error, Result};
use rayon::prelude::*;
use std::f64::consts::PI;

const OP: &str = "hmm_fit";

/// Iterations between two looks at what has converged.
const LOOK: u32 = 8;
/// Most steps that a start clusters.
const SAMPLE: usize = 8192;
/// Steps on each side of a local mean.
const LOCAL: usize = 10;

/// Which K is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Criterion {
    /// Akaike's: predicts, keeps more states.
    Aic,
    /// Schwarz's.
    #[default]
    Bic,
    /// BIC and the entropy of the state path: keeps states that can be told apart.
    Icl,
}

/// What is fitted, from which starts, and when it stops.
#[derive(Debug, Clone, PartialEq)]
pub struct FitOptions {
    /// Emission.
    pub emission: Emission,
    /// Numbers of states to try.
    pub states: Vec<usize>,
    /// Which of them is kept.
    pub criterion: Criterion,
    /// One model of all sequences; else one for each.
    pub pooled: bool,
    /// Starts of each model.
    pub restarts: usize,
    /// Most iterations.
    pub iterations: u32,
    /// A model has converged when an iteration gains less log-likelihood.
    pub tolerance: f64,
    /// Seed of the starts.
    pub seed: u64,
    /// Least variance of a state as a share of the variance of the data.
    pub minimum_variance: f64,
    /// Pseudo-count of each initial state.
    pub init_prior: f64,
    /// Pseudo-count of each transition.
    pub transition_prior: f64,
    /// More pseudo-count of staying in a state.
    pub sticky: f64,
    /// Pseudo-observations at the mean of the data (normal and Student-t).
    pub mean_weight: f64,
    /// Degrees of freedom of a Student-t emission, fixed.
    pub freedom: f64,
    /// Where restart 0 of each model begins instead, one for each model and number of states that match.
    pub start: Vec<Parameters>,
}

impl Default for FitOptions {
    fn default() -> FitOptions {
        FitOptions {
            emission: Emission::GaussianDiagonal,
            states: vec![2],
            criterion: Criterion::Bic,
            pooled: false,
            restarts: 4,
            iterations: 200,
            tolerance: 1e-2,
            seed: 1,
            minimum_variance: 1e-3,
            init_prior: 0.0,
            transition_prior: 0.0,
            sticky: 0.0,
            mean_weight: 0.0,
            freedom: 5.0,
            start: Vec::new(),
        }
    }
}

/// Emission parameters in natural units.
#[derive(Debug, Clone, PartialEq)]
pub enum EmissionParameters {
    /// None: the observations are log-probabilities.
    LogProbabilities,
    /// Independent normals.
    GaussianDiagonal {
        /// [K,D].
        mean: Vec<f64>,
        /// [K,D].
        variance: Vec<f64>,
    },
    /// Normals.
    GaussianFull {
        /// [K,D].
        mean: Vec<f64>,
        /// [K,D,D].
        covariance: Vec<f64>,
    },
    /// Independent Student-t.
    StudentT {
        /// [K,D].
        location: Vec<f64>,
        /// [K,D].
        scale: Vec<f64>,
        /// Degrees of freedom [K,D].
        freedom: Vec<f64>,
    },
    /// Independent counts.
    Poisson {
        /// [K,D].
        rate: Vec<f64>,
    },
    /// Symbols.
    Categorical {
        /// [K,symbols].
        probability: Vec<f64>,
    },
    /// y ~ N(x·β, variance).
    Regression {
        /// β [K,D−1].
        coefficients: Vec<f64>,
        /// [K].
        variance: Vec<f64>,
    },
}

/// A hidden Markov model in natural units.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameters {
    /// States.
    pub k: usize,
    /// Observed numbers a step; 0 for log-probabilities.
    pub d: usize,
    /// Initial probabilities [K].
    pub init: Vec<f64>,
    /// Transition matrix [K,K], rows from.
    pub trans: Vec<f64>,
    /// Emission.
    pub emission: EmissionParameters,
}

/// log Γ(x) for x > 0.
fn log_gamma(x: f64) -> f64 {
    crate::hmm::log_factorial(x - 1.0)
}

/// log Γ((ν+1)/2) − log Γ(ν/2) − ½·ln(νπ).
fn student_constant(freedom: f64) -> f64 {
    log_gamma(0.5 * (freedom + 1.0)) - log_gamma(0.5 * freedom) - 0.5 * (freedom * PI).ln()
}

impl Parameters {
    /// From one row of `BaumWelch::parameters`.
    fn of(emission: Emission, k: usize, d: usize, row: &[f64]) -> Parameters {
        let (init, rest) = row.split_at(k);
        let (trans, rest) = rest.split_at(k * k);
        let part = |i: usize| rest[i * k * d..(i + 1) * k * d].to_vec();
        let emission = match emission {
            Emission::LogProbabilities => EmissionParameters::LogProbabilities,
            Emission::GaussianDiagonal => EmissionParameters::GaussianDiagonal { mean: part(0), variance: part(1) },
            Emission::GaussianFull => {
                let entry = |c: &[f64], i: usize, j: usize| c[i.max(j) * (i.max(j) + 1) / 2 + i.min(j)];
                let triangles = rest[k * d..].chunks_exact(d * (d + 1) / 2);
                let covariance = triangles.flat_map(|c| (0..d * d).map(move |e| entry(c, e / d, e % d))).collect();
                EmissionParameters::GaussianFull { mean: part(0), covariance }
            }
            Emission::StudentT => EmissionParameters::StudentT { location: part(0), scale: part(1), freedom: part(2) },
            Emission::Poisson => EmissionParameters::Poisson { rate: part(0) },
            Emission::Categorical { .. } => EmissionParameters::Categorical { probability: rest.to_vec() },
            Emission::Regression => {
                let (coefficients, variance) = rest.split_at(k * (d - 1));
                EmissionParameters::Regression { coefficients: coefficients.to_vec(), variance: variance.to_vec() }
            }
        };
        Parameters { k, d, init: init.to_vec(), trans: trans.to_vec(), emission }
    }

    /// As a row of `BaumWelch::parameters`.
    fn natural(&self) -> Vec<f32> {
        let mut row = [self.init.as_slice(), &self.trans].concat();
        match &self.emission {
            EmissionParameters::LogProbabilities => {}
            EmissionParameters::GaussianDiagonal { mean, variance } => row.extend(mean.iter().chain(variance)),
            EmissionParameters::GaussianFull { mean, covariance } => {
                row.extend(mean);
                let d = self.d;
                row.extend(covariance.chunks_exact(d * d).flat_map(|c| (0..d).flat_map(move |i| (0..=i).map(move |j| c[i * d + j]))));
            }
            EmissionParameters::StudentT { location, scale, freedom } => {
                row.extend(location.iter().chain(scale).chain(freedom));
                row.extend(freedom.iter().map(|&v| student_constant(v)));
            }
            EmissionParameters::Poisson { rate } => row.extend(rate),
            EmissionParameters::Categorical { probability } => row.extend(probability),
            EmissionParameters::Regression { coefficients, variance } => row.extend(coefficients.iter().chain(variance)),
        }
        row.into_iter().map(|x| x as f32).collect()
    }

    /// What kind of emission it has.
    pub fn kind(&self) -> Emission {
        match &self.emission {
            EmissionParameters::LogProbabilities => Emission::LogProbabilities,
            EmissionParameters::GaussianDiagonal { .. } => Emission::GaussianDiagonal,
            EmissionParameters::GaussianFull { .. } => Emission::GaussianFull,
            EmissionParameters::StudentT { .. } => Emission::StudentT,
            EmissionParameters::Poisson { .. } => Emission::Poisson,
            EmissionParameters::Categorical { probability } => Emission::Categorical { symbols: (probability.len() / self.k.max(1)) as u32 },
            EmissionParameters::Regression { .. } => Emission::Regression,
        }
    }

    /// The packed model and the logarithms of the transitions, for every other HMM op.
    /// # Errors
    /// `Parameter` naming the state and what is wrong with it.
    pub fn pack(&self) -> Result<(Vec<f32>, Vec<f32>)> {
        let shape = PackShape { models: 1, k: self.k, d: self.d };
        let log = |p: &[f64]| p.iter().map(|&x| if x > 0.0 { x.ln() } else { crate::hmm::LOG_ZERO }).collect::<Vec<f64>>();
        let log_init = log(&self.init);
        let model = match &self.emission {
            EmissionParameters::LogProbabilities => pack_log_probabilities(shape, &log_init),
            EmissionParameters::GaussianDiagonal { mean, variance } => pack_gaussian_diagonal(shape, &log_init, mean, variance),
            EmissionParameters::GaussianFull { mean, covariance } => pack_gaussian_full(shape, &log_init, mean, covariance),
            EmissionParameters::StudentT { location, scale, freedom } => pack_student_t(shape, &log_init, location, scale, freedom),
            EmissionParameters::Poisson { rate } => pack_poisson(shape, &log_init, rate),
            EmissionParameters::Categorical { probability } => pack_categorical(shape, &log_init, probability),
            EmissionParameters::Regression { coefficients, variance } => pack_regression(shape, &log_init, coefficients, variance),
        }?;
        Ok((model, log(&self.trans).into_iter().map(|x| x as f32).collect()))
    }

    /// Mean of a dimension in each state (the location of a Student-t, the rate of a Poisson, the expected symbol); a regression has the
    /// first coefficient.
    pub fn means(&self, dimension: usize) -> Vec<f64> {
        let column = |x: &[f64]| (0..self.k).map(|s| x.get(s * self.d + dimension).copied().unwrap_or(f64::NAN)).collect();
        match &self.emission {
            EmissionParameters::LogProbabilities => vec![f64::NAN; self.k],
            EmissionParameters::GaussianDiagonal { mean, .. } | EmissionParameters::GaussianFull { mean, .. } => column(mean),
            EmissionParameters::StudentT { location, .. } => column(location),
            EmissionParameters::Poisson { rate } => column(rate),
            EmissionParameters::Categorical { probability } => {
                probability.chunks_exact(probability.len() / self.k).map(|p| p.iter().enumerate().map(|(i, p)| i as f64 * p).sum()).collect()
            }
            EmissionParameters::Regression { coefficients, .. } => (0..self.k).map(|s| coefficients.get(s * (self.d - 1)).copied().unwrap_or(0.0)).collect(),
        }
    }

    /// Standard deviation of a dimension in each state; infinite for a Student-t of ν ≤ 2, of the residual for a regression.
    pub fn deviations(&self, dimension: usize) -> Vec<f64> {
        let (k, d) = (self.k, self.d);
        match &self.emission {
            EmissionParameters::LogProbabilities => vec![f64::NAN; k],
            EmissionParameters::GaussianDiagonal { variance, .. } => (0..k).map(|s| variance[s * d + dimension].sqrt()).collect(),
            EmissionParameters::GaussianFull { covariance, .. } => (0..k).map(|s| covariance[(s * d + dimension) * d + dimension].sqrt()).collect(),
            EmissionParameters::StudentT { scale, freedom, .. } => (0..k)
                .map(|s| {
                    let (scale, v) = (scale[s * d + dimension], freedom[s * d + dimension]);
                    if v > 2.0 { scale * (v / (v - 2.0)).sqrt() } else { f64::INFINITY }
                })
                .collect(),
            EmissionParameters::Poisson { rate } => (0..k).map(|s| rate[s * d + dimension].sqrt()).collect(),
            EmissionParameters::Categorical { probability } => probability
                .chunks_exact(probability.len() / k)
                .map(|p| {
                    let moment = |n: i32| p.iter().enumerate().map(|(i, p)| (i as f64).powi(n) * p).sum::<f64>();
                    (moment(2) - moment(1).powi(2)).max(0.0).sqrt()
                })
                .collect(),
            EmissionParameters::Regression { variance, .. } => variance.iter().map(|v| v.sqrt()).collect(),
        }
    }

    /// Expected stay in each state, in steps: 1/(1 − a_ii).
    pub fn durations(&self) -> Vec<f64> {
        (0..self.k).map(|i| 1.0 / (1.0 - self.trans[i * self.k + i]).max(1e-12)).collect()
    }

    /// Long-run share of each state: the left eigenvector of the transition matrix, by repeated squaring of (A + I)/2.
    pub fn stationary(&self) -> Vec<f64> {
        let k = self.k;
        let mut power: Vec<f64> = (0..k * k).map(|e| 0.5 * (self.trans[e] + if e / k == e % k { 1.0 } else { 0.0 })).collect();
        for _ in 0..60 {
            let squared = (0..k * k).map(|e| (0..k).map(|c| power[e / k * k + c] * power[c * k + e % k]).sum::<f64>());
            power = squared.collect();
            for row in power.chunks_exact_mut(k) {
                let total: f64 = row.iter().sum();
                row.iter_mut().for_each(|x| *x /= total);
            }
        }
        (0..k).map(|j| (0..k).map(|i| self.init[i] * power[i * k + j]).sum()).collect()
    }

    /// States from the calmest to the wildest in a dimension; equal ones by mean, then as they stand.
    pub fn by_volatility(&self, dimension: usize) -> Vec<usize> {
        let (deviations, means) = (self.deviations(dimension), self.means(dimension));
        let mut order: Vec<usize> = (0..self.k).collect();
        order.sort_by(|&a, &b| deviations[a].total_cmp(&deviations[b]).then(means[a].total_cmp(&means[b])));
        order
    }

    /// The same model with state `order[i]` as its state i.
    pub fn reordered(&self, order: &[usize]) -> Parameters {
        let k = self.k;
        let rows = |x: &[f64]| -> Vec<f64> { order.iter().flat_map(|&s| x[s * (x.len() / k)..(s + 1) * (x.len() / k)].iter().copied()).collect() };
        let emission = match &self.emission {
            EmissionParameters::LogProbabilities => EmissionParameters::LogProbabilities,
            EmissionParameters::GaussianDiagonal { mean, variance } => EmissionParameters::GaussianDiagonal { mean: rows(mean), variance: rows(variance) },
            EmissionParameters::GaussianFull { mean, covariance } => EmissionParameters::GaussianFull { mean: rows(mean), covariance: rows(covariance) },
            EmissionParameters::StudentT { location, scale, freedom } => {
                EmissionParameters::StudentT { location: rows(location), scale: rows(scale), freedom: rows(freedom) }
            }
            EmissionParameters::Poisson { rate } => EmissionParameters::Poisson { rate: rows(rate) },
            EmissionParameters::Categorical { probability } => EmissionParameters::Categorical { probability: rows(probability) },
            EmissionParameters::Regression { coefficients, variance } => {
                EmissionParameters::Regression { coefficients: rows(coefficients), variance: rows(variance) }
            }
        };
        let trans = order.iter().flat_map(|&i| order.iter().map(move |&j| self.trans[i * k + j])).collect();
        Parameters { k, d: self.d, init: rows(&self.init), trans, emission }
    }

    /// Free parameters: probabilities that are not hard zeros less one a row, and those of the emission.
    pub fn free(&self) -> usize {
        let rows = |x: &[f64], width: usize| -> usize { x.chunks_exact(width).map(|r| r.iter().filter(|&&p| p > 0.0).count().saturating_sub(1)).sum() };
        let (k, d) = (self.k, self.d);
        let emission = match &self.emission {
            EmissionParameters::LogProbabilities => 0,
            EmissionParameters::GaussianDiagonal { .. } | EmissionParameters::StudentT { .. } => 2 * k * d,
            EmissionParameters::GaussianFull { .. } => k * d + k * d * (d + 1) / 2,
            EmissionParameters::Poisson { .. } => k * d,
            EmissionParameters::Categorical { probability } => rows(probability, probability.len() / k),
            EmissionParameters::Regression { .. } => k * d,
        };
        rows(&self.init, k) + rows(&self.trans, k) + emission
    }
}

/// Penalised likelihoods of a fit; smaller is better.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Criteria {
    /// −2·L + 2·p.
    pub aic: f64,
    /// −2·L + p·ln n.
    pub bic: f64,
    /// BIC + 2·entropy of the state path; none for log-probabilities.
    pub icl: Option<f64>,
}

impl Criteria {
    /// The one that was asked for; BIC where there is no ICL.
    pub fn get(&self, criterion: Criterion) -> f64 {
        match criterion {
            Criterion::Aic => self.aic,
            Criterion::Bic => self.bic,
            Criterion::Icl => self.icl.unwrap_or(self.bic),
        }
    }
}

/// One start and where it led.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Restart {
    /// Log-likelihood that it reached.
    pub log_likelihood: f64,
    /// How it ended.
    pub status: Status,
    /// Maximisations.
    pub iterations: usize,
}

/// One number of states that was tried.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// States.
    pub k: usize,
    /// Log-likelihood of its best restart.
    pub log_likelihood: f64,
    /// Free parameters.
    pub free: usize,
    /// Its criteria.
    pub criteria: Criteria,
    /// Whether its best restart converged.
    pub converged: bool,
}

/// A fitted model: the best restart of the best K.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    /// The model.
    pub parameters: Parameters,
    /// Its log-likelihood.
    pub log_likelihood: f64,
    /// Log-likelihood of the start and after each iteration; the last is `log_likelihood`.
    pub path: Vec<f64>,
    /// How it ended. [`Status::Fell`] tells that the log-likelihood fell by more than rounding.
    pub status: Status,
    /// Whether the last iteration gained less than the tolerance.
    pub converged: bool,
    /// Maximisations.
    pub iterations: usize,
    /// Observed steps.
    pub observations: usize,
    /// Expected steps in each state [K].
    pub weights: Vec<f64>,
    /// Penalised likelihoods.
    pub criteria: Criteria,
    /// All starts of the kept K, in order.
    pub restarts: Vec<Restart>,
    /// Every K that was tried, in the order of the options.
    pub candidates: Vec<Candidate>,
}

impl Fit {
    /// Shares of the observed steps in each state.
    pub fn occupancy(&self) -> Vec<f64> {
        let total: f64 = self.weights.iter().sum();
        self.weights.iter().map(|w| w / total).collect()
    }

    /// The same fit with state `order[i]` as its state i.
    pub fn reordered(&self, order: &[usize]) -> Fit {
        let weights = order.iter().map(|&s| self.weights[s]).collect();
        Fit { parameters: self.parameters.reordered(order), weights, ..self.clone() }
    }
}

/// How far a fit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FitProgress {
    /// Models that have stopped.
    pub stopped: usize,
    /// Models, restarts and numbers of states counted apart.
    pub models: usize,
    /// Iterations that the running ones have done.
    pub iterations: u32,
}

/// Fits a model to each sequence, or one to all ([`FitOptions::pooled`]): one [`Fit`] each.
///
/// # Errors
/// As [`Observations::check`]; `Parameter` for illegal options, for more states than observations, for a constant series (its
/// variance is zero: no state has a density), and for a series that no start makes possible.
pub fn fit(device: &Device, data: &Observations<'_>, options: &FitOptions) -> Result<Vec<Fit>> {
    fit_with_progress(device, data, options, &mut |_| {})
}
