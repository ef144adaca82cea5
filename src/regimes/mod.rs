//! Market regimes: hidden Markov models on returns, per asset or pooled, over the whole sample and refitted as time goes on.
//!
//! closes → [`Feature`]s → scaled observations → EM with restarts for every K asked for → the K that the [`Criterion`] likes best → states by
//! volatility, calmest first → probabilities. [`regimes`] does it over the whole sample, for looking; [`rolling()`] refits on the past alone
//! and filters until the next refit, for trading. The types keep the two apart: see [`FilteredProbabilities`].
//!
//! Units    log returns, decimals per bar; annualised means are mean·periods_per_year, volatilities sd·√periods_per_year.
//! Scale    observations are divided by their deviation over the fit's own rows before they go to the device, returns keep their zero, other
//!          features are centred. Log-likelihoods are those of the observations as they were: ln p(scaled) − Σ ln scale.
//! Pooled   one model, every asset a sequence of it. Each asset is scaled by itself ([`Scale::Own`]), so that a state means "calm for this
//!          asset"; with [`Scale::Common`] by all together, so that states tell quiet assets from wild ones as well.
//! Refits   the first after `train` observations, then every `every`. A refit at bar r uses bars up to r (the last `train`, or all of them); its
//!          parameters filter bars r + 1 up to and including the next refit's. Labels stay because every refit orders its states by volatility.
//!          Where K is chosen, the first refit chooses it for all later ones.
//! Causal   out-of-sample probabilities at bar t do not change with anything after t: scale, start values, refits and K come from bars
//!          before.
//! Cost     all assets, refits and restarts of a K are one batch on the device.
//!
//! ```
//! use forback::regimes::{Panel, RegimeConfig, regimes};
//!
//! # fn main() -> forback::Result<()> {
//! let market = forback::sim::market::synthetic(1000, 1, 7)?;
//! let panel = Panel { symbols: &market.symbols, close: market.close.view(), columns: Vec::new() };
//! let found = regimes(&forback::Device::open("cpu")?, &panel, &RegimeConfig::default(), &mut |_| Ok(()))?;
//! let [calm, turbulent] = &found.models[0].states[..] else { unreachable!() };
//! assert!(calm.volatility < turbulent.volatility);
//! # Ok(()) }
//! ```

mod features;
mod model;
mod probabilities;
pub mod switching;

pub use features::{Feature, Panel};
pub use probabilities::{Causal, FilteredProbabilities, InSampleProbabilities, PredictedProbabilities, SmoothedProbabilities};

use crate::{Device, Error, Result};
use features::{Observations, Scaler};
use model::{Fitted, Model, Problem, posteriors};
use ndarray::{Array2, ArrayView1};
use probabilities::Table;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// Distribution of an observation in a state; features are independent given the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Emission {
    /// Normal.
    #[default]
    Gaussian,
    /// Student's t: single wild days do not need a state of their own.
    StudentT,
}

/// What chooses K among several; the smallest wins, the fewest states on ties.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Criterion {
    /// −2 ln L + p ln n.
    #[default]
    Bic,
    /// −2 ln L + 2p.
    Aic,
    /// BIC + 2·entropy of the states' path given the observations: also wants states to be clear.
    Icl,
}

/// What assets are divided by before they share a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scale {
    /// Each by its own deviation.
    #[default]
    Own,
    /// All by that of all.
    Common,
}

/// What a refit is fitted on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Train {
    /// The last so many observations.
    Last(usize),
    /// All observations so far, from so many on.
    Anchored(usize),
}

impl Train {
    /// Observations before the first refit.
    pub fn least(self) -> usize {
        match self {
            Train::Last(n) | Train::Anchored(n) => n,
        }
    }
}

impl FromStr for Train {
    type Err = Error;

    /// `1260`, `anchored` (from 1260 observations on) or `anchored:N`.
    fn from_str(text: &str) -> Result<Train> {
        let number = |text: &str| text.parse().ok().filter(|&n: &usize| n >= 2);
        let train = match text.trim().split_once(':') {
            None if text.trim() == "anchored" => Some(Train::Anchored(Refits::default().train.least())),
            None => number(text.trim()).map(Train::Last),
            Some(("anchored", n)) => number(n).map(Train::Anchored),
            Some(_) => None,
        };
        let help = "give a number of bars such as 1260, or anchored, or anchored:N to start after N bars";
        train.ok_or_else(|| parameter("train", text, help))
    }
}

impl fmt::Display for Train {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Train::Last(n) => write!(f, "{n}"),
            Train::Anchored(n) => write!(f, "anchored:{n}"),
        }
    }
}

/// When models are fitted again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refits {
    /// Bars between two refits.
    pub every: usize,
    /// What they are fitted on.
    pub train: Train,
}

impl Default for Refits {
    /// Every year of daily bars, on the last five.
    fn default() -> Refits {
        Refits { every: 252, train: Train::Last(1260) }
    }
}

/// What to fit.
#[derive(Debug, Clone, PartialEq)]
pub struct RegimeConfig {
    /// Numbers of states to try.
    pub states: RangeInclusive<usize>,
    /// What chooses among them.
    pub criterion: Criterion,
    /// What states are seen through.
    pub features: Vec<Feature>,
    /// How observations are distributed.
    pub emission: Emission,
    /// One model for all assets.
    pub pooled: bool,
    /// What pooled assets are divided by.
    pub scale: Scale,
    /// Starts of EM; the best is kept.
    pub restarts: usize,
    /// Seed of the starts.
    pub seed: u64,
    /// Most iterations of EM.
    pub iterations: usize,
    /// Gain in log-likelihood per observation below which EM has converged.
    pub tolerance: f64,
    /// Degrees of freedom of Student's t, fixed.
    pub degrees_of_freedom: f64,
    /// Return periods per year.
    pub periods_per_year: f64,
}

impl Default for RegimeConfig {
    /// Two Gaussian states of daily returns, the best of 8 starts.
    fn default() -> RegimeConfig {
        RegimeConfig {
            states: 2..=2,
            criterion: Criterion::Bic,
            features: vec![Feature::Returns],
            emission: Emission::Gaussian,
            pooled: false,
            scale: Scale::Own,
            restarts: 8,
            seed: 0,
            iterations: 300,
            tolerance: 1e-7,
            degrees_of_freedom: 5.0,
            periods_per_year: 252.0,
        }
    }
}

/// Observations per state that a fit needs.
const ROWS_PER_STATE: usize = 10;
/// Most states of a model.
pub const MOST_STATES: usize = 64;

/// A state of a model, by the smoothed probabilities over the fit's rows; means over the assets of a pooled model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StateSummary {
    /// Annualised mean log return; NaN without returns.
    pub mean: f64,
    /// Annualised volatility of log returns; NaN without returns.
    pub volatility: f64,
    /// Bars that it lasts on average, 1/(1 − a_kk); infinite if it is never left.
    pub duration: f64,
    /// Share of the bars that are in it.
    pub occupancy: f64,
}

/// How good a number of states was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// K.
    pub states: usize,
    /// Free parameters.
    pub parameters: usize,
    /// Log-likelihood of the observations.
    pub log_likelihood: f64,
    /// Akaike's criterion.
    pub aic: f64,
    /// Bayesian criterion.
    pub bic: f64,
    /// Integrated completed likelihood, as a criterion.
    pub icl: f64,
    /// Whether the best start converged.
    pub converged: bool,
}

/// A model over the whole sample.
#[derive(Debug, Clone, PartialEq)]
pub struct RegimeModel {
    /// Assets that it describes.
    pub assets: Vec<usize>,
    /// Observations that it was fitted on.
    pub observations: usize,
    /// The chosen number of states, and how good it was.
    pub chosen: Candidate,
    /// All numbers that were tried.
    pub candidates: Vec<Candidate>,
    /// Iterations of the best start.
    pub iterations: usize,
    /// Its states, calmest first.
    pub states: Vec<StateSummary>,
    /// The same of each asset on its own; duration is the model's.
    pub per_asset: Vec<Vec<StateSummary>>,
    /// Start probabilities [K].
    pub initial: Vec<f64>,
    /// Transition matrix [K,K]: row from, column to.
    pub transition: Array2<f64>,
    /// Location of each feature in each state [K,D]: in the feature's units; of a pooled model in units of each asset's deviation.
    pub mean: Array2<f64>,
    /// Its deviation (scale for Student's t) [K,D], likewise.
    pub deviation: Array2<f64>,
    /// Degrees of freedom [K,D] of Student's t.
    pub degrees_of_freedom: Option<Array2<f64>>,
}

/// What was found over the whole sample: it knows the future.
#[derive(Debug, Clone)]
pub struct Regimes {
    /// First bar with an observation.
    pub first: usize,
    /// A model per asset, or one.
    pub models: Vec<RegimeModel>,
    /// Model of each asset [N].
    pub model_of: Vec<usize>,
    /// Filtered with parameters of the whole sample.
    pub filtered: InSampleProbabilities,
    /// Smoothed.
    pub smoothed: SmoothedProbabilities,
}

/// A refit.
#[derive(Debug, Clone, PartialEq)]
pub struct Refitted {
    /// Last bar that it was fitted on.
    pub bar: usize,
    /// Assets of the model.
    pub assets: Vec<usize>,
    /// Transition matrix [K,K].
    pub transition: Array2<f64>,
    /// Deviation of the first feature per state [K], in the feature's units (pooled: in units of each asset's deviation).
    pub deviation: Vec<f64>,
    /// Whether EM converged.
    pub converged: bool,
}

/// The bar after, by the state that was seen before it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NextBar {
    /// Annualised mean log return, weighted by the state's probability.
    pub mean: f64,
    /// Annualised volatility, likewise.
    pub volatility: f64,
    /// Share of the bars.
    pub share: f64,
}

/// `calm`, `turbulent`, or `middle` for what lies between.
pub fn state_name(state: usize, states: usize) -> &'static str {
    match state {
        0 if states == 1 => "only",
        0 => "calm",
        s if s + 1 == states => "turbulent",
        _ => "middle",
    }
}

/// What refits on the past alone saw.
#[derive(Debug, Clone)]
pub struct OutOfSample {
    /// Filtered probabilities.
    pub filtered: FilteredProbabilities,
    /// Every refit, in time, then by asset.
    pub refits: Vec<Refitted>,
    first_refit: usize,
    every: usize,
}

/// Called before every stage of the work, and every few iterations of a fit, with a word on it; an error stops the work after that fit.
pub type Progress<'a> = dyn FnMut(&str) -> Result<()> + 'a;

fn parameter(name: &str, value: &str, help: &str) -> Error {
    Error::Parameter { op: "regimes", name: name.into(), value: value.into(), help: help.into() }
}

// ---- the whole sample -------------------------------------------------------------------------------------------------

/// Fits regimes over the whole sample.
///
/// Filtered and smoothed probabilities both use parameters that know the whole sample; only those of [`rolling()`] may be traded.
/// # Errors
/// `Parameter` for options that are wrong, prices that are not positive, a series that does not move, or too few observations; device errors.
pub fn regimes(device: &Device, panel: &Panel<'_>, config: &RegimeConfig, progress: &mut Progress<'_>) -> Result<Regimes> {
    config.check(panel)?;
    let observations = Observations::of(panel, &config.features)?;
    let (n, rows) = (panel.close.dim().1, observations.rows);
    enough(rows, config, "the sample")?;
    let groups = config.groups(n);
    let jobs: Vec<Job> = groups.iter().map(|assets| Job::of(&observations, panel, config, assets, 0..rows)).collect::<Result<_>>()?;
    let several = if jobs.len() == 1 { String::new() } else { format!(", {} models", jobs.len()) };
    progress(&format!("fitting {} states{several}", config.states_text()))?;
    let fits = fit_jobs(device, &jobs, config, config.states.clone(), progress)?;
    progress("probabilities")?;
    let states: Vec<usize> = (0..n).map(|asset| fits[if config.pooled { 0 } else { asset }].model.k).collect();
    let bars = panel.close.dim().0;
    let (mut filtered, mut smoothed) = (Table::empty(states.clone(), bars), Table::empty(states, bars));
    let sequences = jobs.iter().zip(&fits).flat_map(|(job, fit)| job.problem.sequences.iter().map(move |rows| (rows.as_slice(), &fit.model)));
    let mut all = posteriors(device, &sequences.collect::<Vec<_>>(), true)?.into_iter();
    let mut models = Vec::with_capacity(jobs.len());
    for (job, fit) in jobs.iter().zip(&fits) {
        let mut own = Vec::with_capacity(job.assets.len());
        for (&asset, [f, s]) in job.assets.iter().zip(all.by_ref()) {
            filtered.put(asset, observations.first, &f);
            smoothed.put(asset, observations.first, &s);
            own.push(s);
        }
        models.push(model_of(job, &observations, config, fit, &own));
    }
    let model_of = (0..n).map(|asset| if config.pooled { 0 } else { asset }).collect();
    Ok(Regimes { first: observations.first, models, model_of, filtered: InSampleProbabilities(filtered), smoothed: SmoothedProbabilities(smoothed) })
}

/// Assets that share a model, the rows of it, and their scales.
struct Job {
    assets: Vec<usize>,
    scalers: Vec<Scaler>,
    problem: Problem,
}

impl Job {
    fn of(observations: &Observations, panel: &Panel<'_>, config: &RegimeConfig, assets: &[usize], rows: std::ops::Range<usize>) -> Result<Job> {
        let of = |asset: usize| observations.rows_of(asset, rows.clone());
        let scalers: Vec<Scaler> = if config.scale == Scale::Common && assets.len() > 1 {
            let parts: Vec<&[f64]> = assets.iter().map(|&asset| of(asset)).collect();
            vec![Scaler::of(&config.features, &parts, &|| "all assets".into())?; assets.len()]
        } else {
            let from = observations.first + rows.start;
            let what = |asset: usize| format!("{} from bar {from} to {}", panel.symbols[asset], from + rows.len() - 1);
            assets.iter().map(|&asset| Scaler::of(&config.features, &[of(asset)], &|| what(asset))).collect::<Result<_>>()?
        };
        let sequences = assets.iter().zip(&scalers).map(|(&asset, scaler)| scaler.apply(of(asset))).collect();
        Ok(Job { assets: assets.to_vec(), scalers, problem: Problem { d: observations.d, sequences } })
    }

    /// ln p(raw) − ln p(scaled) of all rows.
    fn log_jacobian(&self) -> f64 {
        let rows = |i: usize| (self.problem.sequences[i].len() / self.problem.d) as f64;
        self.scalers.iter().enumerate().map(|(i, scaler)| rows(i) * scaler.log_jacobian()).sum()
    }
}

/// Fits every job with the best of some numbers of states; likelihoods and criteria are those of the observations as they were.
fn fit_jobs(device: &Device, jobs: &[Job], config: &RegimeConfig, states: RangeInclusive<usize>, progress: &mut Progress<'_>) -> Result<Vec<Fitted>> {
    let problems: Vec<&Problem> = jobs.iter().map(|job| &job.problem).collect();
    let mut fits = model::fit(device, &problems, states, config, progress)?;
    for (fit, job) in fits.iter_mut().zip(jobs) {
        let more = job.log_jacobian();
        for c in &mut fit.candidates {
            c.log_likelihood += more;
            [&mut c.aic, &mut c.bic, &mut c.icl].into_iter().for_each(|x| *x -= 2.0 * more);
        }
    }
    Ok(fits)
}

fn matrix(rows: usize, columns: usize, value: impl Fn(usize, usize) -> f64) -> Array2<f64> {
    Array2::from_shape_fn((rows, columns), |(i, j)| value(i, j))
}

fn model_of(job: &Job, observations: &Observations, config: &RegimeConfig, fit: &Fitted, smoothed: &[Vec<f32>]) -> RegimeModel {
    let (model, k, d) = (&fit.model, fit.model.k, fit.model.d);
    // Raw units where the model has one asset or one scale; else those of each asset.
    let scaler = &job.scalers[0];
    let raw = job.assets.len() == 1 || config.scale == Scale::Common;
    let scale = |f: usize| if raw { scaler.scale[f] } else { 1.0 };
    let centre = |f: usize| if raw { scaler.centre[f] } else { 0.0 };
    let per_asset: Vec<Vec<StateSummary>> = job
        .assets
        .iter()
        .zip(smoothed)
        .map(|(&asset, smoothed)| summaries(model, smoothed, observations.returns.as_ref().map(|r| r[asset].as_slice()), config.periods_per_year))
        .collect();
    let mean_of = |state: usize, f: &dyn Fn(&StateSummary) -> f64| {
        let defined: Vec<f64> = per_asset.iter().map(|asset| f(&asset[state])).filter(|x| x.is_finite()).collect();
        if defined.is_empty() { f64::NAN } else { defined.iter().sum::<f64>() / defined.len() as f64 }
    };
    let state = |s: usize| StateSummary {
        mean: mean_of(s, &|x| x.mean),
        volatility: mean_of(s, &|x| x.volatility),
        duration: model.duration(s),
        occupancy: mean_of(s, &|x| x.occupancy),
    };
    RegimeModel {
        assets: job.assets.clone(),
        observations: job.problem.rows(),
        chosen: fit.chosen(),
        candidates: fit.candidates.clone(),
        iterations: fit.iterations,
        states: (0..k).map(state).collect(),
        initial: model.initial.clone(),
        transition: matrix(k, k, |i, j| model.transition[i * k + j]),
        mean: matrix(k, d, |s, f| centre(f) + scale(f) * model.mean[s * d + f]),
        deviation: matrix(k, d, |s, f| scale(f) * model.variance[s * d + f].sqrt()),
        degrees_of_freedom: model.dof.as_ref().map(|dof| matrix(k, d, |s, f| dof[s * d + f])),
        per_asset,
    }
}

/// States of one asset by its smoothed probabilities [R,K].
fn summaries(model: &Model, smoothed: &[f32], returns: Option<&[f64]>, periods_per_year: f64) -> Vec<StateSummary> {
    let k = model.k;
    let rows = (smoothed.len() / k) as f64;
    (0..k)
        .map(|state| {
            let weights = || smoothed.iter().skip(state).step_by(k).map(|&p| f64::from(p));
            let total: f64 = weights().sum();
            let of =
                |f: &dyn Fn(f64) -> f64| returns.filter(|_| total > 0.0).map_or(f64::NAN, |r| weights().zip(r).map(|(w, &x)| w * f(x)).sum::<f64>() / total);
            let mean = of(&|x| x);
            let variance = of(&|x| (x - mean) * (x - mean));
            StateSummary {
                mean: mean * periods_per_year,
                volatility: (variance * periods_per_year).sqrt(),
                duration: model.duration(state),
                occupancy: total / rows,
            }
        })
        .collect()
}

// ---- refits -----------------------------------------------------------------------------------------------------------

/// Refits as time goes on, and filters out of sample: probabilities at bar t know nothing after t.
/// # Errors
/// As [`regimes`]; `Parameter` where the history ends before the first refit has a bar to filter.
pub fn rolling(device: &Device, panel: &Panel<'_>, config: &RegimeConfig, refits: Refits, progress: &mut Progress<'_>) -> Result<OutOfSample> {
    config.check(panel)?;
    let observations = Observations::of(panel, &config.features)?;
    let (t, n) = panel.close.dim();
    let ends = refits.ends(observations.first, observations.rows)?;
    enough(refits.train.least(), config, "train")?;
    let groups = config.groups(n);
    // Jobs in time, then by asset: what comes later changes the place of nothing before.
    let rows_of = |end: usize| match refits.train {
        Train::Last(train) => end - train..end,
        Train::Anchored(_) => 0..end,
    };
    let mut jobs = Vec::with_capacity(ends.len() * groups.len());
    for &end in &ends {
        for assets in &groups {
            jobs.push(Job::of(&observations, panel, config, assets, rows_of(end))?);
        }
    }
    // The first refit chooses K.
    progress(&format!("the first of {} refits", ends.len()))?;
    let mut models: Vec<Model> = fit_jobs(device, &jobs[..groups.len()], config, config.states.clone(), progress)?.into_iter().map(|fit| fit.model).collect();
    let states: Vec<usize> = models.iter().map(|model| model.k).collect();
    progress(&format!("the other {} refits", ends.len() - 1))?;
    models.extend(later(device, &jobs[groups.len()..], config, &states, progress)?);
    progress("filtering out of sample")?;
    let states_of = |asset: usize| states[if config.pooled { 0 } else { asset }];
    let mut filtered = Table::empty((0..n).map(states_of).collect(), t);
    for (r, &end) in ends.iter().enumerate() {
        let next = (end + refits.every).min(observations.rows);
        let from = rows_of(end).start;
        let mut sequences: Vec<(usize, Vec<f32>, &Model)> = Vec::new();
        for g in 0..groups.len() {
            let (job, model) = (&jobs[r * groups.len() + g], &models[r * groups.len() + g]);
            sequences.extend(job.assets.iter().zip(&job.scalers).map(|(&asset, scaler)| (asset, scaler.apply(observations.rows_of(asset, from..next)), model)));
        }
        let views: Vec<(&[f32], &Model)> = sequences.iter().map(|(_, rows, model)| (rows.as_slice(), *model)).collect();
        for ((asset, _, model), [rows, _]) in sequences.iter().zip(posteriors(device, &views, false)?) {
            filtered.put(*asset, observations.first + end, &rows[(end - from) * model.k..]);
        }
    }
    let refitted = |(i, (job, model)): (usize, (&Job, &Model))| {
        let scale = if job.assets.len() == 1 || config.scale == Scale::Common { job.scalers[0].scale[0] } else { 1.0 };
        Refitted {
            bar: observations.first + ends[i / groups.len()] - 1,
            assets: job.assets.clone(),
            transition: matrix(model.k, model.k, |a, b| model.transition[a * model.k + b]),
            deviation: (0..model.k).map(|s| scale * model.variance_of(s, 0).sqrt()).collect(),
            converged: model.converged,
        }
    };
    let refitted = jobs.iter().zip(&models).enumerate().map(refitted).collect();
    Ok(OutOfSample { filtered: FilteredProbabilities(filtered), refits: refitted, first_refit: observations.first + ends[0] - 1, every: refits.every })
}

/// Models of the refits after the first, with the numbers of states that it chose for each group.
fn later(device: &Device, jobs: &[Job], config: &RegimeConfig, states: &[usize], progress: &mut Progress<'_>) -> Result<Vec<Model>> {
    let mut models: Vec<Option<Model>> = vec![None; jobs.len()];
    for k in config.states.clone() {
        let these: Vec<usize> = (0..jobs.len()).filter(|i| states[i % states.len()] == k).collect();
        let problems: Vec<&Problem> = these.iter().map(|&i| &jobs[i].problem).collect();
        for (i, fit) in these.into_iter().zip(model::fit(device, &problems, k..=k, config, progress)?) {
            models[i] = Some(fit.model);
        }
    }
    Ok(models.into_iter().flatten().collect())
}

impl OutOfSample {
    /// First bar with probabilities: the one after the first refit.
    pub fn first_bar(&self) -> Option<usize> {
        self.filtered.first_bar(0)
    }

    /// Number of refits.
    pub fn times(&self) -> usize {
        self.refits.iter().map(|r| r.bar).collect::<std::collections::BTreeSet<_>>().len()
    }

    /// What the bar after earned, by the probabilities known at its start; all assets together, each with its own states.
    pub fn next_bar(&self, panel: &Panel<'_>, periods_per_year: f64) -> Vec<NextBar> {
        let (assets, bars, most) = self.filtered.values().dim();
        let (mut weight, mut sum, mut square) = (vec![0.0; most], vec![0.0; most], vec![0.0; most]);
        for (asset, bar) in (0..assets).flat_map(|a| (0..bars.saturating_sub(1)).map(move |b| (a, b))) {
            let Some(p) = self.filtered.get(asset, bar) else { continue };
            let r = (f64::from(panel.close[[bar + 1, asset]]) / f64::from(panel.close[[bar, asset]])).ln();
            for (k, &p) in p.iter().enumerate() {
                let p = f64::from(p);
                weight[k] += p;
                sum[k] += p * r;
                square[k] += p * r * r;
            }
        }
        let all: f64 = weight.iter().sum();
        let state = |k: usize| {
            let mean = sum[k] / weight[k];
            let variance = (square[k] / weight[k] - mean * mean).max(0.0);
            NextBar { mean: mean * periods_per_year, volatility: (variance * periods_per_year).sqrt(), share: weight[k] / all }
        };
        (0..most).map(state).collect()
    }

    /// Share of the bars on which the most likely state is that of hindsight; `None` where assets have other numbers of states there.
    pub fn agreement(&self, smoothed: &SmoothedProbabilities) -> Option<f64> {
        let (assets, bars, _) = self.filtered.values().dim();
        let likeliest = |p: ArrayView1<'_, f32>| (0..p.len()).fold(0, |best, k| if p[k] > p[best] { k } else { best });
        let (mut same, mut all) = (0u64, 0u64);
        for (asset, bar) in (0..assets).flat_map(|a| (0..bars).map(move |b| (a, b))) {
            let (Some(seen), Some(known)) = (self.filtered.get(asset, bar), smoothed.get(asset, bar)) else { continue };
            if seen.len() != known.len() {
                return None;
            }
            all += 1;
            same += u64::from(likeliest(seen) == likeliest(known));
        }
        (all > 0).then(|| same as f64 / all as f64)
    }

    /// Probabilities of the state `horizon` bars after each bar, as known at it.
    /// # Errors
    /// `Internal` if the refits do not cover the probabilities.
    pub fn predicted(&self, horizon: usize) -> Result<PredictedProbabilities> {
        let mut table = self.filtered.0.clone();
        let assets = Causal::assets(&self.filtered);
        let per_refit = self.refits.iter().take_while(|r| r.bar == self.first_refit).count().max(1);
        for asset in 0..assets {
            let group = if per_refit == 1 { 0 } else { asset };
            for bar in self.first_refit + 1..Causal::bars(&self.filtered) {
                let Some(now) = self.filtered.get(asset, bar) else { continue };
                let refit = (bar - self.first_refit - 1) / self.every;
                let model = self.refits.get(refit * per_refit + group).ok_or_else(|| Error::Internal("a refit is missing".into()))?;
                let mut p: Vec<f64> = now.iter().map(|&p| f64::from(p)).collect();
                for _ in 0..horizon {
                    p = (0..p.len()).map(|j| (0..p.len()).map(|i| p[i] * model.transition[[i, j]]).sum()).collect();
                }
                table.put(asset, bar, &p.iter().map(|&p| p as f32).collect::<Vec<_>>());
            }
        }
        Ok(PredictedProbabilities(table))
    }
}

impl Refits {
    /// Ends of the rows that each refit is fitted on; each has at least a row after it.
    fn ends(self, first: usize, rows: usize) -> Result<Vec<usize>> {
        let least = self.train.least();
        if self.every == 0 {
            return Err(parameter("refit", "0", "give a number of bars, 1 or more"));
        }
        if rows <= least {
            let help = format!(
                "the first refit needs {least} observations and a bar after them; there are {rows} observations, the first at bar {first}: \
                 shorten train, or use more bars"
            );
            return Err(parameter("train", &self.train.to_string(), &help));
        }
        Ok((least..rows).step_by(self.every).collect())
    }
}

// ---- options ----------------------------------------------------------------------------------------------------------

impl RegimeConfig {
    /// `2` or `2..5`.
    pub fn states_text(&self) -> String {
        let (least, most) = (self.states.start(), self.states.end());
        if least == most { least.to_string() } else { format!("{least}..{most}") }
    }

    /// Assets that share a model.
    fn groups(&self, assets: usize) -> Vec<Vec<usize>> {
        if self.pooled { vec![(0..assets).collect()] } else { (0..assets).map(|asset| vec![asset]).collect() }
    }

    fn check(&self, panel: &Panel<'_>) -> Result<()> {
        let (least, most) = (*self.states.start(), *self.states.end());
        if least == 0 || least > most || most > MOST_STATES {
            let help = format!("give numbers of states from 1 to {MOST_STATES}, such as 2 or 2..5");
            return Err(parameter("states", &self.states_text(), &help));
        }
        if self.restarts == 0 {
            return Err(parameter("restarts", "0", "give at least one start"));
        }
        if !(self.degrees_of_freedom.is_finite() && self.degrees_of_freedom > 0.0) {
            return Err(parameter("degrees of freedom", &self.degrees_of_freedom.to_string(), "give a positive number; above 2 for a finite variance"));
        }
        if !(self.periods_per_year.is_finite() && self.periods_per_year > 0.0) {
            return Err(parameter("periods_per_year", &self.periods_per_year.to_string(), "give a positive number of return periods per year"));
        }
        let (bars, assets) = panel.close.dim();
        if assets == 0 || bars == 0 || panel.symbols.len() != assets {
            let got = format!("[{bars},{assets}] and {} symbols", panel.symbols.len());
            return Err(Error::Shape { op: "regimes", arg: "close".into(), expected: "[T,N] with T, N ≥ 1 and a symbol each".into(), got });
        }
        Ok(())
    }
}

fn enough(rows: usize, config: &RegimeConfig, what: &str) -> Result<()> {
    let least = config.states.end() * ROWS_PER_STATE;
    if rows >= least {
        return Ok(());
    }
    let help = format!("{} states need {least} observations of each asset, {what} has {rows}: fewer states, or more bars", config.states.end());
    Err(parameter("observations", &rows.to_string(), &help))
}
