//! Fitting hidden Markov models: starts, restarts, Baum-Welch on the device, the choice of K, results in natural units.
//!
//! Start    k-means++ (Philox, so the same everywhere) and up to 20 Lloyd steps on at most 8,192 steps of each group of sequences, on the host: about
//!          K·D·10⁵ operations per start, run in parallel. Even restarts cluster local means and local log-deviations (±10 steps), which
//!          tells calm from wild; odd ones cluster the observations themselves. init uniform, trans 0.9 on the diagonal.
//! Restarts R starts of each group are R more models of the same launches; the likeliest is kept.
//! Choice   every K of the list runs in the same pass; for each group the K of least criterion is kept:
//!          AIC = −2·L + 2·p,  BIC = −2·L + p·ln n,  ICL = BIC + 2·H,  n observed steps, H the entropy of the state path given the
//!          observations, H = L − E[log p(observations, path)] from the sums of the last expectation.
//!          p counts what the model may be, not what it became: K − 1 initial probabilities, K − 1 of each row of transitions, those of
//!          the emission. A probability that EM drives to zero was estimated and counts, as in hmmlearn and depmixS4; one that the start
//!          of [`FitOptions::start`] forbids stays zero and does not.
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
            EmissionParameters::Categorical { probability } => pack_categorical(shape, &log_init, probability, probability.len() / self.k),
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

    /// Free parameters of a start: probabilities that are not hard zeros less one a row, and those of the emission. Of a fitted model it
    /// leaves out what EM drove to zero, though it was free: [`Candidate::free`] has the number that the criteria use.
    pub fn free(&self) -> usize {
        let zeros = |x: &[f64], width: usize| -> usize {
            let row = |r: &[f64]| r.iter().filter(|&&p| p <= 0.0).count().min(width - 1);
            x.chunks_exact(width).map(row).sum()
        };
        let symbols = match &self.emission {
            EmissionParameters::Categorical { probability } => zeros(probability, probability.len() / self.k),
            _ => 0,
        };
        free_without_zeros(self.kind(), self.k, self.d) - zeros(&self.init, self.k) - zeros(&self.trans, self.k) - symbols
    }
}

/// Free parameters of a model that rules out nothing.
fn free_without_zeros(emission: Emission, k: usize, d: usize) -> usize {
    let of_emission = match emission {
        Emission::LogProbabilities => 0,
        Emission::GaussianDiagonal | Emission::StudentT => 2 * k * d,
        Emission::GaussianFull => k * d + k * d * (d + 1) / 2,
        Emission::Poisson | Emission::Regression => k * d,
        Emission::Categorical { symbols } => k * (symbols as usize).saturating_sub(1),
    };
    k - 1 + k * (k - 1) + of_emission
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
    /// Free parameters: those of the start that led here, whatever EM drove to zero since.
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

/// As [`fit`], telling after every few iterations how far it is.
/// # Errors
/// As [`fit`].
pub fn fit_with_progress(device: &Device, data: &Observations<'_>, options: &FitOptions, progress: &mut dyn FnMut(FitProgress)) -> Result<Vec<Fit>> {
    check_options(options)?;
    data.check(options.emission)?;
    let per_model = if options.pooled { data.n } else { 1 };
    let groups = data.n / per_model;
    let facts = (0..groups).into_par_iter().map(|g| Facts::of(data, options, g, per_model)).collect::<Result<Vec<Facts>>>()?;
    let mut fits = Vec::with_capacity(groups);
    let elements = elements(device, data, options, per_model);
    // Kernels index their buffers with 32 bits.
    let most = (u64::from(u32::MAX) / elements).max(1);
    let runs = device.plan(OP, groups as u64, elements, 1, 1)?;
    let parts = runs.into_iter().flat_map(|run| run.clone().step_by(most as usize).map(move |from| from..(from + most).min(run.end)));
    for run in parts {
        let (from, to) = (run.start as usize, run.end as usize);
        let part = data.part(from * per_model, to * per_model);
        fits.extend(fit_groups(device, &part, options, &facts[from..to], from, progress)?);
    }
    Ok(fits)
}

/// Longest buffer per group of sequences, over all K.
fn elements(device: &Device, data: &Observations<'_>, options: &FitOptions, per_model: usize) -> u64 {
    let k = options.states.iter().copied().max().unwrap_or(1) as u64;
    let on_host = matches!(device.info().kind, DeviceKind::Cpu | DeviceKind::Reference);
    let (jobs, steps) = ((per_model * options.restarts) as u64, (per_model * data.t) as u64);
    let states = if on_host { 0 } else { (if k <= 4 { 1 } else { 3 }) * steps * options.restarts as u64 * k };
    let each = natural(options.emission, k, data.width as u64) + k * k;
    states.max(steps * data.width as u64).max(jobs * (2 * each + k * k + 4 * k + 3)).max(1)
}

fn wrong<T>(name: &str, value: String, help: &str) -> Result<T> {
    Err(Error::Parameter { op: OP, name: name.into(), value, help: help.into() })
}

fn check_options(options: &FitOptions) -> Result<()> {
    if options.states.is_empty() || options.states.contains(&0) {
        return wrong("states", format!("{:?}", options.states), "give one or more numbers of states, each at least 1");
    }
    if options.restarts == 0 || options.iterations == 0 {
        return wrong("restarts, iterations", format!("{}, {}", options.restarts, options.iterations), "give at least one of each");
    }
    let shares = [("tolerance", options.tolerance), ("minimum_variance", options.minimum_variance), ("mean_weight", options.mean_weight)];
    let counts = [("init_prior", options.init_prior), ("transition_prior", options.transition_prior), ("sticky", options.sticky)];
    for (name, value) in shares.into_iter().chain(counts) {
        if !(value.is_finite() && value >= 0.0) {
            return wrong(name, value.to_string(), "give 0 or a positive number");
        }
    }
    if !(options.freedom.is_finite() && options.freedom > 0.0) {
        return wrong("freedom", options.freedom.to_string(), "degrees of freedom are positive");
    }
    Ok(())
}

// ---- what a group of sequences is like ------------------------------------------------------------------------------------------

/// Moments of the observations of one model.
struct Facts {
    observations: usize,
    mean: Vec<f64>,
    variance: Vec<f64>,
    /// Σ log x! of counts.
    log_factorials: f64,
}

impl Facts {
    fn of(data: &Observations<'_>, options: &FitOptions, group: usize, per_model: usize) -> Result<Facts> {
        let steps =
            || (group * per_model..(group + 1) * per_model).flat_map(|n| (0..data.length(n)).filter(move |&t| data.seen(n, t)).map(move |t| data.x(n, t)));
        let observations = steps().count();
        let most = options.states.iter().copied().max().unwrap_or(1);
        if observations < most {
            let help = format!("series {group} has {observations} observed steps; give fewer states or a longer series");
            return wrong("states", most.to_string(), &help);
        }
        let mut mean = vec![0.0; data.width];
        let mut variance = vec![0.0; data.width];
        let mut log_factorials = 0.0;
        for x in steps() {
            mean.iter_mut().zip(x).for_each(|(m, &x)| *m += f64::from(x) / observations as f64);
            if options.emission == Emission::Poisson {
                log_factorials += x.iter().map(|&x| crate::hmm::log_factorial(f64::from(x))).sum::<f64>();
            }
        }
        for x in steps() {
            variance.iter_mut().zip(&mean).zip(x).for_each(|((v, m), &x)| *v += (f64::from(x) - m).powi(2) / observations as f64);
        }
        // Of a regression only the left side needs to vary.
        let varies = match options.emission {
            Emission::GaussianDiagonal | Emission::GaussianFull | Emission::StudentT => data.width,
            Emission::Regression => 1,
            _ => 0,
        };
        if let Some(i) = (0..varies).find(|&i| variance[i] <= 1e-13 * mean[i] * mean[i]) {
            let help = format!("column {i} of series {group} is constant: no state has a variance; leave the series or the column out");
            return wrong("obs", mean[i].to_string(), &help);
        }
        Ok(Facts { observations, mean, variance, log_factorials })
    }
}

// ---- starts -----------------------------------------------------------------------------------------------------------------------

/// Uniform numbers of one start.
struct Stream {
    counter: [u32; 4],
    key: [u32; 2],
}

impl Stream {
    fn next(&mut self) -> f64 {
        let bits = philox4x32(self.counter, self.key)[0];
        self.counter[0] += 1;
        uniform(bits)
    }
}

/// A start of one model: natural parameters.
fn start(
    data: &Observations<'_>,
    options: &FitOptions,
    facts: &Facts,
    sequences: std::ops::Range<usize>,
    group: usize,
    k: usize,
    restart: usize,
) -> Parameters {
    let mut stream = Stream { counter: [0, restart as u32, group as u32, k as u32], key: [options.seed as u32, (options.seed >> 32) as u32] };
    let stride = facts.observations.div_ceil(SAMPLE).max(1);
    let steps = sequences.flat_map(|n| (0..data.length(n)).filter(move |&t| data.seen(n, t)).map(move |t| (n, t)));
    let sample: Vec<(usize, usize)> = steps.step_by(stride).collect();
    let features: Vec<Vec<f64>> = standardised(sample.iter().map(|&(n, t)| features(data, options, facts, n, t, restart.is_multiple_of(2))).collect());
    let labels = clusters(&features, k, &mut stream);
    let stay = if k == 1 { 1.0 } else { 0.9 };
    let trans = (0..k * k).map(|e| if e / k == e % k { stay } else { (1.0 - stay) / (k - 1) as f64 }).collect();
    let emission = emission_of_labels(data, options, facts, k, &sample, &labels);
    Parameters { k, d: if options.emission == Emission::LogProbabilities { 0 } else { data.width }, init: vec![1.0 / k as f64; k], trans, emission }
}

/// What a start clusters of one step: local means and log-deviations, or the observation itself.
fn features(data: &Observations<'_>, options: &FitOptions, facts: &Facts, n: usize, t: usize, local: bool) -> Vec<f64> {
    let around = || (t.saturating_sub(LOCAL)..(t + LOCAL + 1).min(data.length(n))).filter(|&s| data.seen(n, s));
    let mean = |value: &dyn Fn(usize) -> f64| around().map(value).sum::<f64>() / around().count() as f64;
    match options.emission {
        Emission::Categorical { symbols } => (0..symbols).map(|s| mean(&|at| f64::from(u8::from(data.x(n, at)[0] == s as f32)))).collect(),
        Emission::LogProbabilities => data.x(n, t).iter().map(|&x| f64::from(x).exp()).collect(),
        Emission::Poisson if local => (0..data.width).map(|i| mean(&|at| f64::from(data.x(n, at)[i]))).collect(),
        _ if local => {
            let columns = if options.emission == Emission::Regression { 1 } else { data.width };
            (0..columns)
                .flat_map(|i| {
                    let level = mean(&|at| f64::from(data.x(n, at)[i]));
                    let spread = mean(&|at| (f64::from(data.x(n, at)[i]) - level).powi(2)) + 1e-4 * facts.variance[i];
                    [level, 0.5 * spread.ln()]
                })
                .collect()
        }
        Emission::Regression => vec![f64::from(data.x(n, t)[0])],
        _ => data.x(n, t).iter().map(|&x| f64::from(x)).collect(),
    }
}

/// Columns to mean 0 and deviation 1; constant ones to 0.
fn standardised(mut rows: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let (count, width) = (rows.len() as f64, rows.first().map_or(0, Vec::len));
    for i in 0..width {
        let mean = rows.iter().map(|r| r[i]).sum::<f64>() / count;
        let deviation = (rows.iter().map(|r| (r[i] - mean).powi(2)).sum::<f64>() / count).sqrt();
        let scale = if deviation > 1e-12 * mean.abs().max(1e-300) { 1.0 / deviation } else { 0.0 };
        rows.iter_mut().for_each(|r| r[i] = (r[i] - mean) * scale);
    }
    rows
}

/// k-means++ and Lloyd's iterations: the cluster of each row.
fn clusters(rows: &[Vec<f64>], k: usize, stream: &mut Stream) -> Vec<usize> {
    let distance = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum::<f64>();
    let pick = |u: f64| ((u * rows.len() as f64) as usize).min(rows.len() - 1);
    let mut centres = vec![rows[pick(stream.next())].clone()];
    let mut nearest: Vec<f64> = rows.iter().map(|r| distance(r, &centres[0])).collect();
    while centres.len() < k {
        let mut left = stream.next() * nearest.iter().sum::<f64>();
        let drawn = nearest.iter().position(|&x| {
            left -= x;
            left < 0.0
        });
        let centre = rows[drawn.unwrap_or_else(|| pick(stream.next()))].clone();
        nearest.iter_mut().zip(rows).for_each(|(x, r)| *x = x.min(distance(r, &centre)));
        centres.push(centre);
    }
    let mut labels = vec![0; rows.len()];
    for _ in 0..20 {
        let label = |r: &Vec<f64>| (0..k).min_by(|&a, &b| distance(r, &centres[a]).total_cmp(&distance(r, &centres[b]))).unwrap_or(0);
        let next: Vec<usize> = rows.iter().map(label).collect();
        let same = next == labels;
        labels = next;
        if same {
            break;
        }
        for (state, centre) in centres.iter_mut().enumerate() {
            let members: Vec<&Vec<f64>> = rows.iter().zip(&labels).filter(|(_, l)| **l == state).map(|(r, _)| r).collect();
            if !members.is_empty() {
                (0..centre.len()).for_each(|i| centre[i] = members.iter().map(|m| m[i]).sum::<f64>() / members.len() as f64);
            }
        }
    }
    labels
}

/// Emission parameters of clustered steps.
fn emission_of_labels(
    data: &Observations<'_>,
    options: &FitOptions,
    facts: &Facts,
    k: usize,
    sample: &[(usize, usize)],
    labels: &[usize],
) -> EmissionParameters {
    let d = data.width;
    let members = |s: usize| sample.iter().zip(labels).filter(move |(_, l)| **l == s).map(|(&(n, t), _)| data.x(n, t));
    let count = |s: usize| members(s).count() as f64;
    let mean = |s: usize, i: usize| {
        let n = count(s);
        if n > 0.0 { members(s).map(|x| f64::from(x[i])).sum::<f64>() / n } else { facts.mean[i] }
    };
    // A cluster's spread, at least a fiftieth of all the variance: narrow starts trap EM.
    let product = |s: usize, i: usize, j: usize| {
        let (n, mi, mj) = (count(s), mean(s, i), mean(s, j));
        let floor = if i == j { 0.02 * facts.variance[i] } else { 0.0 };
        if n < 2.0 {
            return if i == j { facts.variance[i] } else { 0.0 };
        }
        members(s).map(|x| (f64::from(x[i]) - mi) * (f64::from(x[j]) - mj)).sum::<f64>() / n + floor
    };
    let cells = |f: &dyn Fn(usize, usize) -> f64| -> Vec<f64> { (0..k * d).map(|e| f(e / d, e % d)).collect() };
    match options.emission {
        Emission::LogProbabilities => EmissionParameters::LogProbabilities,
        Emission::GaussianDiagonal => EmissionParameters::GaussianDiagonal { mean: cells(&mean), variance: cells(&|s, i| product(s, i, i)) },
        Emission::GaussianFull => {
            let covariance = (0..k * d * d).map(|e| product(e / (d * d), e / d % d, e % d)).collect();
            EmissionParameters::GaussianFull { mean: cells(&mean), covariance }
        }
        Emission::StudentT => {
            let shrink = if options.freedom > 2.0 { (options.freedom - 2.0) / options.freedom } else { 0.5 };
            let scale = cells(&|s, i| (shrink * product(s, i, i)).sqrt());
            EmissionParameters::StudentT { location: cells(&mean), scale, freedom: vec![options.freedom; k * d] }
        }
        Emission::Poisson => EmissionParameters::Poisson { rate: cells(&|s, i| mean(s, i).max(0.01 * facts.mean[i]).max(1e-3)) },
        Emission::Categorical { symbols } => {
            let share = |s: usize, symbol: u32| (members(s).filter(|x| x[0] == symbol as f32).count() as f64 + 1.0) / (count(s) + f64::from(symbols));
            EmissionParameters::Categorical { probability: (0..k).flat_map(|s| (0..symbols).map(move |i| (s, i))).map(|(s, i)| share(s, i)).collect() }
        }
        Emission::Regression => {
            let all: Vec<&[f32]> = sample.iter().map(|&(n, t)| data.x(n, t)).collect();
            let (pooled, _) = least_squares(&all, d - 1);
            let (mut coefficients, mut variance) = (Vec::with_capacity(k * (d - 1)), Vec::with_capacity(k));
            for s in 0..k {
                let own: Vec<&[f32]> = members(s).collect();
                let beta = if own.len() >= 5 * d { least_squares(&own, d - 1).0 } else { pooled.clone() };
                let rows = if own.len() >= 2 { &own } else { &all };
                let error = |x: &[f32]| f64::from(x[0]) - beta.iter().zip(&x[1..]).map(|(b, &x)| b * f64::from(x)).sum::<f64>();
                variance.push(rows.iter().map(|x| error(x).powi(2)).sum::<f64>() / rows.len() as f64 + 0.02 * facts.variance[0]);
                coefficients.extend(beta);
            }
            EmissionParameters::Regression { coefficients, variance }
        }
    }
}

/// Coefficients of the first number on the others, and what they explain.
fn least_squares(rows: &[&[f32]], r: usize) -> (Vec<f64>, f64) {
    let (mut products, mut right) = (vec![0.0; r * (r + 1) / 2], vec![0.0; r]);
    for x in rows {
        for i in 0..r {
            for j in 0..=i {
                products[i * (i + 1) / 2 + j] += f64::from(x[1 + i]) * f64::from(x[1 + j]);
            }
            right[i] += f64::from(x[1 + i]) * f64::from(x[0]);
        }
    }
    let explained = crate::hmm_baum_welch::solve(&mut products, &mut right, r);
    (right, explained)
}

// ---- the fit ------------------------------------------------------------------------------------------------------------------------

/// The start that the options give to a group of sequences, in restart 0.
fn given_start(options: &FitOptions, k: usize, group: usize) -> Option<&Parameters> {
    let mut given = options.start.iter().filter(|p| p.k == k);
    let many = given.clone().nth(1).is_some();
    if many { given.nth(group) } else { given.next() }
}

/// The models of one K.
struct Engine {
    k: usize,
    fit: BaumWelch,
    stopped: usize,
}

/// What came out of one K.
struct Outcome {
    k: usize,
    models: usize,
    iterations: usize,
    parameters: Vec<f64>,
    path: Vec<f64>,
    status: Vec<u32>,
    totals: Vec<f64>,
    /// First impossible step of each (model, sequence), or −1.
    failed: Vec<f64>,
}

fn fit_groups(
    device: &Device,
    data: &Observations<'_>,
    options: &FitOptions,
    facts: &[Facts],
    first: usize,
    progress: &mut dyn FnMut(FitProgress),
) -> Result<Vec<Fit>> {
    let (groups, models) = (facts.len(), facts.len() * options.restarts);
    let mut engines = options.states.iter().map(|&k| engine(device, data, options, facts, first, k)).collect::<Result<Vec<Engine>>>()?;
    let mut done = 0;
    while done < options.iterations && engines.iter().any(|e| e.stopped < models) {
        let more = LOOK.min(options.iterations - done);
        let mut pass = device.pass(OP);
        let mut looks = Vec::new();
        for (i, engine) in engines.iter_mut().enumerate().filter(|(_, e)| e.stopped < models) {
            engine.fit.record(&mut pass, more)?;
            let row = u64::from(engine.fit.iterations) * models as u64;
            looks.push((i, pass.read(engine.fit.status.view(row..row + models as u64))?));
        }
        let mut values = pass.submit()?;
        for (i, read) in looks {
            engines[i].stopped = values.u32(read)?.iter().filter(|&&s| s != 0).count();
        }
        done += more;
        let stopped = engines.iter().map(|e| e.stopped).sum();
        progress(FitProgress { stopped, models: models * engines.len(), iterations: done });
    }
    let outcomes = outcomes(device, engines, models)?;
    (0..groups).map(|g| best(options, data, facts, first, g, &outcomes)).collect()
}

/// Starts of all models of one K, uploaded.
fn engine(device: &Device, data: &Observations<'_>, options: &FitOptions, facts: &[Facts], first: usize, k: usize) -> Result<Engine> {
    let per_model = data.n / facts.len();
    let mut given = options.start.iter().filter(|p| p.k == k);
    if given.any(|p| p.kind() != options.emission || (p.d != data.width && options.emission != Emission::LogProbabilities)) {
        return wrong("start", format!("{k} states"), "a start has the emission and the numbers a step of the observations");
    }
    let starts: Vec<Vec<f32>> = (0..facts.len() * options.restarts)
        .into_par_iter()
        .map(|m| {
            let (g, restart) = (m / options.restarts, m % options.restarts);
            match given_start(options, k, first + g) {
                Some(own) if restart == 0 => own.natural(),
                _ => start(data, options, &facts[g], g * per_model..(g + 1) * per_model, first + g, k, restart).natural(),
            }
        })
        .collect();
    let width = if options.emission == Emission::LogProbabilities { 1 } else { data.width };
    let guards: Vec<f32> = facts
        .iter()
        .flat_map(|f| {
            let floors = f.variance.iter().map(|v| ((options.minimum_variance * v) as f32).max(1e-30)).take(width);
            floors.chain(f.mean.iter().map(|&m| m as f32).take(width)).collect::<Vec<f32>>()
        })
        .collect();
    let settings = Settings {
        emission: options.emission,
        k,
        per_model,
        restarts: options.restarts,
        tolerance: options.tolerance as f32,
        init_prior: options.init_prior as f32,
        transition_prior: options.transition_prior as f32,
        sticky: options.sticky as f32,
        mean_weight: options.mean_weight as f32,
    };
    let fit = BaumWelch::new(device, data, &settings, &starts.concat(), &guards, options.iterations)?;
    Ok(Engine { k, fit, stopped: 0 })
}

/// The last expectations, and the downloads.
fn outcomes(device: &Device, engines: Vec<Engine>, models: usize) -> Result<Vec<Outcome>> {
    let mut pass = device.pass(OP);
    let mut reads = Vec::new();
    for engine in engines {
        let Engine { k, mut fit, .. } = engine;
        fit.finish(&mut pass)?;
        let all = [pass.read(&fit.parameters)?, pass.read(&fit.path)?, pass.read(&fit.totals)?, pass.read(&fit.statistics)?, pass.read(&fit.status)?];
        reads.push((k, fit.iterations as usize, all));
    }
    let mut done = pass.submit()?;
    let mut outcomes = Vec::new();
    for (k, iterations, [parameters, path, totals, statistics, status]) in reads {
        let (parameters, path, totals, status) = (done.f64(parameters)?, done.f64(path)?, done.f64(totals)?, done.u32(status)?);
        let failed = done.f64(statistics)?.chunks_exact(totals.len() / models).map(|row| row[row.len() - 1]).collect();
        outcomes.push(Outcome { k, models, iterations, parameters, path, status, totals, failed });
    }
    Ok(outcomes)
}

impl Outcome {
    /// Path and end of model m.
    fn run(&self, m: usize) -> (Vec<f64>, Restart) {
        let stop = (1..=self.iterations + 1).find(|row| self.status[row * self.models + m] != 0);
        let iterations = stop.map_or(self.iterations, |row| row - 1);
        let at = |row: usize| 2 * (row * self.models + m);
        let path: Vec<f64> = (0..=iterations).map(|row| self.path[at(row)] + self.path[at(row) + 1]).collect();
        let status = Status::of(stop.map_or(0, |row| self.status[row * self.models + m]));
        let log_likelihood = if status == Status::Impossible { f64::NEG_INFINITY } else { path[iterations] };
        (path, Restart { log_likelihood, status, iterations })
    }
}

/// The best restart of the best K of group g.
fn best(options: &FitOptions, data: &Observations<'_>, facts: &[Facts], first: usize, g: usize, outcomes: &[Outcome]) -> Result<Fit> {
    let (facts, d) = (&facts[g], if options.emission == Emission::LogProbabilities { 0 } else { data.width });
    let mut candidates = Vec::new();
    let mut kept: Option<Fit> = None;
    for outcome in outcomes {
        let k = outcome.k;
        let runs: Vec<(Vec<f64>, Restart)> = (0..options.restarts).map(|r| outcome.run(g * options.restarts + r)).collect();
        let likeliest = (0..options.restarts).max_by(|&a, &b| runs[a].1.log_likelihood.total_cmp(&runs[b].1.log_likelihood).then(b.cmp(&a))).unwrap_or(0);
        let end = runs[likeliest].1;
        let m = g * options.restarts + likeliest;
        if !end.log_likelihood.is_finite() {
            let per_model = outcome.failed.len() / outcome.models;
            let at = (0..per_model).map(|q| (q, outcome.failed[m * per_model + q])).find(|(_, step)| *step >= 0.0);
            let (q, step) = at.unwrap_or((0, 0.0));
            let help = format!("every start with {k} states makes it impossible; allow for it, or give another start");
            let name = format!("obs of sequence {} at step {step}", (first + g) * per_model + q);
            return wrong(&name, format!("{:?}", data.x(g * per_model + q, step as usize)), &help);
        }
        let (width, each) = (outcome.parameters.len() / outcome.models, outcome.totals.len() / outcome.models);
        let parameters = Parameters::of(options.emission, k, d, &outcome.parameters[m * width..(m + 1) * width]);
        let totals = &outcome.totals[m * each..(m + 1) * each];
        let own = given_start(options, k, first + g).filter(|_| likeliest == 0);
        let free = own.map_or_else(|| free_without_zeros(options.emission, k, d), Parameters::free);
        let (p, n) = (free as f64, facts.observations as f64);
        let bic = -2.0 * end.log_likelihood + p * n.ln();
        let icl = expected_log(&parameters, totals, facts).map(|joint| bic + 2.0 * (end.log_likelihood - joint).max(0.0));
        let criteria = Criteria { aic: -2.0 * end.log_likelihood + 2.0 * p, bic, icl };
        let converged = end.status == Status::Converged;
        candidates.push(Candidate { k, log_likelihood: end.log_likelihood, free, criteria, converged });
        if kept.as_ref().is_none_or(|best| criteria.get(options.criterion) < best.criteria.get(options.criterion)) {
            let sums = (each - 3 - k - k * k) / k;
            kept = Some(Fit {
                weights: (0..k).map(|s| totals[k + k * k + s * sums]).collect(),
                parameters,
                log_likelihood: end.log_likelihood,
                path: runs[likeliest].0.clone(),
                status: end.status,
                converged,
                iterations: end.iterations,
                observations: facts.observations,
                criteria,
                restarts: runs.iter().map(|r| r.1).collect(),
                candidates: Vec::new(),
            });
        }
    }
    kept.map(|fit| Fit { candidates, ..fit }).ok_or_else(|| Error::Internal("a fit without a number of states".into()))
}

/// E[log p(observations, path)] under the path's posterior, from the sums of the last expectation; none for log-probabilities.
fn expected_log(parameters: &Parameters, totals: &[f64], facts: &Facts) -> Option<f64> {
    let (k, d) = (parameters.k, parameters.d);
    let entropy = |counts: &[f64], p: &[f64]| counts.iter().zip(p).filter(|(c, _)| **c > 0.0).map(|(c, p)| c * p.max(1e-300).ln()).sum::<f64>();
    let chain = entropy(&totals[..k], &parameters.init) + entropy(&totals[k..k + k * k], &parameters.trans);
    let states = &totals[k + k * k..totals.len() - 3];
    let each = states.len() / k;
    let log_tau = (2.0 * PI).ln();
    let mut total = chain - facts.log_factorials;
    for (s, sums) in states.chunks_exact(each).enumerate() {
        let (weight, sums) = (sums[0], &sums[1..]);
        total += match &parameters.emission {
            EmissionParameters::LogProbabilities => return None,
            EmissionParameters::GaussianDiagonal { variance, .. } => {
                (0..d).map(|i| (variance[s * d + i], sums[d + i])).map(|(v, square)| -0.5 * (weight * (log_tau + v.ln()) + square / v)).sum::<f64>()
            }
            EmissionParameters::GaussianFull { covariance, .. } => {
                let factor = cholesky(&covariance[s * d * d..(s + 1) * d * d], d).ok()?;
                let (inverse, logs) = invert_lower(&factor, d);
                let entry = |i: usize, j: usize| sums[d + i.max(j) * (i.max(j) + 1) / 2 + i.min(j)];
                let row = |r: usize| &inverse[r * (r + 1) / 2..(r + 1) * (r + 2) / 2];
                let trace: f64 =
                    (0..d).map(|r| (0..=r).flat_map(|i| (0..=r).map(move |j| (i, j))).map(|(i, j)| row(r)[i] * row(r)[j] * entry(i, j)).sum::<f64>()).sum();
                -0.5 * (weight * (d as f64 * log_tau + 2.0 * logs) + trace)
            }
            EmissionParameters::StudentT { scale, freedom, .. } => (0..d)
                .map(|i| {
                    let (scale, v) = (scale[s * d + i], freedom[s * d + i]);
                    weight * (student_constant(v) - scale.ln()) - 0.5 * (v + 1.0) * sums[3 * d + i]
                })
                .sum::<f64>(),
            EmissionParameters::Poisson { rate } => (0..d).map(|i| sums[i] * rate[s * d + i].ln() - weight * rate[s * d + i]).sum::<f64>(),
            EmissionParameters::Categorical { probability } => entropy(sums, &probability[s * sums.len()..(s + 1) * sums.len()]),
            EmissionParameters::Regression { variance, .. } => -0.5 * (weight * (log_tau + variance[s].ln()) + sums[sums.len() - 1] / variance[s]),
        };
    }
    Some(total)
}
