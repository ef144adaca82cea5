//! Markov-switching regressions and autoregressions: which regime a series is in, with coefficients, variance and transitions of its own.
//!
//! Intercept   y_t = c(s_t) + Σ_i φ_i(s_t)·y_{t−i} + Σ_e δ_e(s_t)·x_{e,t} + σ(s_t)·ε_t
//! Mean        the same for deviations from a mean that switches, Hamilton's form: y_t − m_t = Σ_i φ_i(s_t)·(y_{t−i} − m_{t−i}) + σ(s_t)·ε_t with
//!             m_t = c(s_t) + Σ_e δ_e(s_t)·x_{e,t}. What a step depends on is (s_t, …, s_{t−p}): K^(p+1) states of a plain hidden Markov model,
//!             s_t first, whose transitions are 0 where the histories do not fit.
//! Transitions p(s_t = j | s_{t−1} = i, z_t) = softmax_j(a_ij + b_ij·z_t), the last regime's coefficients 0; without z a constant matrix.
//! Start       stationary under the transitions of the first row, or free. The first p rows are given, not explained; in the mean form the
//!             chain starts at row 0 of the data, in the intercept form at row p.
//! Fit         maximum likelihood by BFGS on the devices' exact gradients (kernels/hmm_gradient.rs), all restarts as one batch. Parameters
//!             and data go to the device as f32; what rounding took away is given back to first order, posteriors times lost logarithms, so
//!             that `reference` is good to 2e-7 nats.
//! Source      Hamilton 1989, Econometrica 57; Kim 1994, J. Econometrics 60; Filardo 1994, J. Business & Economic Statistics 12.

use crate::kernels::hmm::{Emission, Hmm, Transitions, Wanted, hmm_forward_backward};
use crate::kernels::hmm_gradient::{Probabilities, hmm_gradient};
use crate::kernels::philox::{normals, philox4x32};
use crate::kernels::{Device, DeviceKind, View};
use crate::{Error, Result};
use ndarray::Array2;

const OP: &str = "switching";
/// Hard zeros on the device.
const LOG_ZERO: f64 = -1e30;
/// Smallest variance, as a share of the series'.
const FLOOR: f64 = 1e-8;
/// Most states of the expanded chain.
const MOST_STATES: usize = 512;

/// Whether a coefficient is the same in all regimes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// One for all regimes.
    Common,
    /// One for each regime.
    Switching,
}

/// What the autoregression is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Lags of the series: the constant is an intercept.
    Intercept,
    /// Lags of deviations from the regime's mean, after Hamilton 1989.
    Mean,
}

/// Where the chain starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// In its stationary distribution.
    Stationary,
    /// In a distribution that is estimated.
    Free,
}

/// What switches, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwitchingConfig {
    /// K.
    pub regimes: usize,
    /// Lags of the series itself.
    pub order: usize,
    /// What the lags are lags of.
    pub form: Form,
    /// The constant (the mean in the mean form).
    pub constant: Effect,
    /// The autoregressive coefficients.
    pub autoregression: Effect,
    /// Each regressor's coefficient.
    pub regressors: Vec<Effect>,
    /// The variance.
    pub variance: Effect,
    /// The start.
    pub start: Start,
}

impl SwitchingConfig {
    /// K regimes of mean and variance, no lags, stationary start.
    pub fn new(regimes: usize) -> SwitchingConfig {
        SwitchingConfig {
            regimes,
            order: 0,
            form: Form::Intercept,
            constant: Effect::Switching,
            autoregression: Effect::Common,
            regressors: Vec::new(),
            variance: Effect::Switching,
            start: Start::Stationary,
        }
    }
}

/// A series and what explains it, rows in time order.
#[derive(Debug, Clone, Copy)]
pub struct SwitchingData<'a> {
    /// The series.
    pub y: &'a [f64],
    /// Columns of regressors, as many rows as `y`.
    pub regressors: &'a [Vec<f64>],
    /// Columns that drive transitions; row t moves t − 1 → t.
    pub drivers: &'a [Vec<f64>],
}

/// Parameters in natural units. Where an effect is common all regimes hold the same number.
#[derive(Debug, Clone, PartialEq)]
pub struct SwitchingParameters {
    /// Intercepts or means [K].
    pub constant: Vec<f64>,
    /// Autoregressive coefficients [K][order].
    pub autoregression: Vec<Vec<f64>>,
    /// Regressors' coefficients [K][E].
    pub regressors: Vec<Vec<f64>>,
    /// Variances [K].
    pub variance: Vec<f64>,
    /// Coefficients of the logits against the last regime [K][K−1][1 + drivers], the constant first.
    pub links: Vec<Vec<Vec<f64>>>,
    /// First regime's distribution [K]; not read where the start is stationary.
    pub initial: Vec<f64>,
}

impl SwitchingParameters {
    /// Links of a constant transition matrix [K][K], row i: from regime i.
    pub fn links_of(matrix: &[Vec<f64>]) -> Vec<Vec<Vec<f64>>> {
        let log = |p: f64| p.max(1e-300).ln();
        let row = |row: &Vec<f64>| {
            let (last, others) = row.split_last().map_or((1.0, &[][..]), |(last, others)| (*last, others));
            others.iter().map(|&p| vec![log(p) - log(last)]).collect()
        };
        matrix.iter().map(row).collect()
    }

    /// Transition matrix [K][K] where the drivers are `z`.
    pub fn transition_matrix(&self, z: &[f64]) -> Vec<Vec<f64>> {
        self.links.iter().map(|row| softmax(&logits(row, z))).collect()
    }

    /// The same model with regime order[i] in place i.
    fn reordered(&self, order: &[usize]) -> SwitchingParameters {
        let links = order
            .iter()
            .map(|&i| {
                let width = self.links[i].first().map_or(1, Vec::len);
                let of = |j: usize| self.links[i].get(j).cloned().unwrap_or_else(|| vec![0.0; width]);
                let last = of(order[order.len() - 1]);
                let others = order[..order.len() - 1].iter();
                others.map(|&j| of(j).iter().zip(&last).map(|(a, b)| a - b).collect()).collect()
            })
            .collect();
        let pick = |x: &[f64]| order.iter().map(|&i| x[i]).collect();
        let rows = |x: &[Vec<f64>]| order.iter().map(|&i| x[i].clone()).collect();
        SwitchingParameters {
            constant: pick(&self.constant),
            autoregression: rows(&self.autoregression),
            regressors: rows(&self.regressors),
            variance: pick(&self.variance),
            links,
            initial: pick(&self.initial),
        }
    }
}

/// A model at given parameters. Row r of the tables is row `order` + r of the data.
#[derive(Debug, Clone)]
pub struct SwitchingResult {
    /// Log-likelihood of the rows after the first `order`.
    pub log_likelihood: f64,
    /// p(regime at t | rows up to t) [rows, K].
    pub filtered: Array2<f64>,
    /// p(regime at t | rows before t) [rows, K].
    pub predicted: Array2<f64>,
    /// p(regime at t | all rows) [rows, K]: knows the future, never trade on it.
    pub smoothed: Array2<f64>,
    /// Expected steps in each regime where transitions are constant: 1 / (1 − p_ii).
    pub durations: Option<Vec<f64>>,
}

/// How to search.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SwitchingSearch {
    /// Starting points, run together; the first is the plain one, the others are random around it.
    pub restarts: usize,
    /// Most iterations.
    pub iterations: usize,
    /// Seed of the random starting points.
    pub seed: u32,
}

impl Default for SwitchingSearch {
    fn default() -> Self {
        SwitchingSearch { restarts: 12, iterations: 500, seed: 1 }
    }
}

/// A fitted model, regimes by variance, or by constant where the variance is common; smallest first.
#[derive(Debug, Clone)]
pub struct SwitchingFit {
    /// Maximum-likelihood parameters.
    pub parameters: SwitchingParameters,
    /// The model there.
    pub result: SwitchingResult,
    /// Number of free parameters.
    pub free: usize,
    /// Iterations of the best restart.
    pub iterations: usize,
    /// Whether its gradient vanished.
    pub converged: bool,
    /// Log-likelihoods that the restarts reached, best first.
    pub reached: Vec<f64>,
}

impl SwitchingFit {
    /// −2 ln L + p·ln n.
    pub fn bic(&self) -> f64 {
        self.free as f64 * (self.result.smoothed.nrows() as f64).ln() - 2.0 * self.result.log_likelihood
    }

    /// −2 ln L + 2·p.
    pub fn aic(&self) -> f64 {
        2.0 * self.free as f64 - 2.0 * self.result.log_likelihood
    }
}

/// Standard errors of parameters at a maximum.
#[derive(Debug, Clone, PartialEq)]
pub struct StandardErrors {
    /// Of intercepts or means [K].
    pub constant: Vec<f64>,
    /// Of autoregressive coefficients [K][order].
    pub autoregression: Vec<Vec<f64>>,
    /// Of regressors' coefficients [K][E].
    pub regressors: Vec<Vec<f64>>,
    /// Of variances [K].
    pub variance: Vec<f64>,
    /// Of links [K][K−1][1 + drivers].
    pub links: Vec<Vec<Vec<f64>>>,
    /// Of the transition matrix [K][K] where it is constant.
    pub transitions: Option<Vec<Vec<f64>>>,
}

/// A model and its data, checked.
#[derive(Debug, Clone)]
pub struct Switching<'a> {
    config: SwitchingConfig,
    data: SwitchingData<'a>,
    /// (s_t, …) of every state of the expanded chain.
    histories: Vec<Vec<usize>>,
    /// y, then its regressors, per row after the first `order`.
    obs: Vec<f32>,
    drivers: Vec<f32>,
    floor: f64,
    rows: usize,
}

fn parameter(name: &str, value: impl ToString, help: &str) -> Error {
    Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() }
}

impl<'a> Switching<'a> {
    /// Checks a model against its data.
    /// # Errors
    /// `Parameter` naming what is wrong: no regimes, a row that is not a number, a constant series, more parameters than rows; `Shape` for
    /// columns of other lengths.
    pub fn new(config: SwitchingConfig, data: SwitchingData<'a>) -> Result<Switching<'a>> {
        let (k, p, n) = (config.regimes, config.order, data.y.len());
        if k == 0 {
            return Err(parameter("regimes", 0, "give at least one regime"));
        }
        let depth = if config.form == Form::Mean { p + 1 } else { 1 };
        let states = k.checked_pow(depth as u32).filter(|&s| s <= MOST_STATES);
        let Some(states) = states else {
            let help = format!("the mean form needs regimes^(order + 1) states, at most {MOST_STATES}; use fewer lags, or the intercept form");
            return Err(parameter("regimes, order", format!("{k}, {p}"), &help));
        };
        if config.regressors.len() != data.regressors.len() {
            let expected = format!("{} columns, as many as effects", config.regressors.len());
            return Err(Error::Shape { op: OP, arg: "regressors".into(), expected, got: format!("{} columns", data.regressors.len()) });
        }
        check_column("series", data.y, n)?;
        for (name, columns) in [("regressor", data.regressors), ("driver", data.drivers)] {
            columns.iter().enumerate().try_for_each(|(i, column)| check_column(&format!("{name} {i}"), column, n))?;
        }
        let rows = n.saturating_sub(p);
        let histories = (0..states).map(|s| (0..depth).map(|i| s / k.pow((depth - 1 - i) as u32) % k).collect()).collect();
        let variance = variance_of(data.y);
        let mut model = Switching { config, data, histories, obs: Vec::new(), drivers: Vec::new(), floor: FLOOR * variance, rows };
        let free = model.free();
        if rows <= free {
            let help = format!("{free} parameters need more than {free} rows after the first {p}");
            return Err(parameter("rows", n, &help));
        }
        if variance <= 1e-20 * data.y.iter().map(|y| y * y).sum::<f64>() / n as f64 {
            return Err(parameter("series", data.y[0], "every row is the same: there is nothing to explain"));
        }
        model.obs = (p..n).flat_map(|t| model.row(t)).map(|x| x as f32).collect();
        model.drivers = (p..n).flat_map(|t| model.driver(t)).map(|x| x as f32).collect();
        Ok(model)
    }

    /// Number of free parameters.
    pub fn free(&self) -> usize {
        let c = &self.config;
        let k = c.regimes;
        let of = |effect: Effect| if effect == Effect::Switching { k } else { 1 };
        let coefficients = of(c.constant) + c.order * of(c.autoregression) + c.regressors.iter().map(|&e| of(e)).sum::<usize>();
        coefficients + of(c.variance) + k * (k - 1) * (1 + self.data.drivers.len()) + if c.start == Start::Free { k - 1 } else { 0 }
    }

    /// The model at given parameters.
    /// # Errors
    /// `Shape` or `Parameter` for parameters that are not of this model; `Parameter` if a row is impossible under them; those of the device.
    pub fn evaluate(&self, device: &Device, parameters: &SwitchingParameters) -> Result<SwitchingResult> {
        self.check(parameters)?;
        let point = self.run(device, std::slice::from_ref(parameters), true)?.pop().ok_or_else(|| Error::Internal("an evaluation is missing".into()))?;
        if !point.log_likelihood.is_finite() {
            return Err(parameter("parameters", "log-likelihood −∞", "a row is impossible under them, or the chain has no single stationary distribution"));
        }
        let durations = self.data.drivers.is_empty().then(|| {
            let matrix = parameters.transition_matrix(&[]);
            (0..self.config.regimes).map(|i| 1.0 / (1.0 - matrix[i][i])).collect()
        });
        let [filtered, predicted, smoothed] = [0, 1, 2].map(|i| self.marginal(point.states.get(i).map_or(&[], Vec::as_slice)));
        Ok(SwitchingResult { log_likelihood: point.log_likelihood, filtered, predicted, smoothed, durations })
    }

    /// Gradient of the log-likelihood with respect to the free parameters, and the point that they stand for: for other optimisers.
    ///
    /// Order: constants, autoregressive and regressors' coefficients (lag or column by lag or column, a number per regime where they switch),
    /// ln(variance − floor), links [K][K−1][1 + drivers], logits of the initial distribution against the last regime.
    /// # Errors
    /// Those of [`Switching::evaluate`].
    pub fn gradient(&self, device: &Device, parameters: &SwitchingParameters) -> Result<(f64, Vec<f64>)> {
        self.check(parameters)?;
        let points = self.run(device, std::slice::from_ref(parameters), false)?;
        points.into_iter().next().map(|p| (p.log_likelihood, p.gradient)).ok_or_else(|| Error::Internal("an evaluation is missing".into()))
    }

    /// Maximum likelihood from several starting points.
    /// # Errors
    /// `Parameter` where no starting point has a finite likelihood; those of the device.
    pub fn fit(&self, device: &Device, search: &SwitchingSearch) -> Result<SwitchingFit> {
        let starts: Vec<SwitchingParameters> = (0..search.restarts.max(1)).map(|r| self.rough(search.seed, r as u32)).collect();
        self.fit_from(device, &starts, search)
    }

    /// Maximum likelihood from given starting points.
    /// # Errors
    /// As [`Switching::fit`].
    pub fn fit_from(&self, device: &Device, starts: &[SwitchingParameters], search: &SwitchingSearch) -> Result<SwitchingFit> {
        starts.iter().try_for_each(|start| self.check(start))?;
        let single = device.info().kind != DeviceKind::Reference;
        let mut searches: Vec<Bfgs> = starts.iter().map(|start| Bfgs::new(self.pack(start), single, search.iterations)).collect();
        loop {
            let open: Vec<usize> = (0..searches.len()).filter(|&i| !searches[i].done()).collect();
            if open.is_empty() {
                break;
            }
            let trials: Vec<SwitchingParameters> = open.iter().map(|&i| self.unpack(&searches[i].trial)).collect();
            let points = self.run(device, &trials, false)?;
            let scale = -1.0 / self.rows as f64;
            for (&i, point) in open.iter().zip(points) {
                searches[i].tell(scale * point.log_likelihood, point.gradient.iter().map(|g| scale * g).collect());
            }
        }
        searches.retain(|s| s.value.is_finite());
        searches.sort_by(|a, b| a.value.total_cmp(&b.value));
        let Some(best) = searches.first() else {
            return Err(parameter("starting points", starts.len(), "none of them has a finite likelihood; give others"));
        };
        let parameters = self.ordered(&self.unpack(&best.x));
        Ok(SwitchingFit {
            result: self.evaluate(device, &parameters)?,
            parameters,
            free: self.free(),
            iterations: best.iterations,
            converged: best.converged,
            reached: searches.iter().map(|s| -s.value * self.rows as f64).collect(),
        })
    }

    /// Standard errors from the inverse of the observed information, by central differences of the exact gradient in one batch.
    /// # Errors
    /// `Parameter` where the information cannot be inverted: not at a maximum, or a parameter at its bound.
    pub fn standard_errors(&self, device: &Device, parameters: &SwitchingParameters) -> Result<StandardErrors> {
        self.check(parameters)?;
        let (x, n) = (self.pack(parameters), self.free());
        let width = if device.info().kind == DeviceKind::Reference { 2e-3 } else { 2e-2 };
        let by: Vec<f64> = x.iter().map(|v| width * v.abs().clamp(0.05, 2.0)).collect();
        let moved = |i: usize, sign: f64| {
            let mut x = x.clone();
            x[i] += sign * by[i];
            self.unpack(&x)
        };
        let trials: Vec<SwitchingParameters> = (0..n).flat_map(|i| [moved(i, 1.0), moved(i, -1.0)]).collect();
        let points = self.run(device, &trials, false)?;
        let slope = |i: usize, j: usize| (points[2 * i + 1].gradient[j] - points[2 * i].gradient[j]) / (2.0 * by[i]);
        let information: Vec<Vec<f64>> = (0..n).map(|i| (0..n).map(|j| 0.5 * (slope(i, j) + slope(j, i))).collect()).collect();
        let column = |j: usize| solve(&information, &(0..n).map(|i| f64::from(u8::from(i == j))).collect::<Vec<_>>());
        let covariance: Option<Vec<Vec<f64>>> = (0..n).map(column).collect();
        match covariance {
            Some(covariance) if (0..n).all(|i| covariance[i][i] > 0.0) => Ok(self.errors_of(parameters, &covariance)),
            _ => {
                let help = "the information at these parameters has no positive inverse: give a maximum inside the bounds";
                Err(parameter("parameters", "standard errors", help))
            }
        }
    }

    /// Standard errors in natural units from the covariance of the free parameters.
    fn errors_of(&self, parameters: &SwitchingParameters, covariance: &[Vec<f64>]) -> StandardErrors {
        let (k, z) = (self.config.regimes, self.data.drivers.len());
        let deviation: Vec<f64> = (0..covariance.len()).map(|i| covariance[i][i].sqrt()).collect();
        // As a point, so that `unpack` puts each where it belongs; variances come back as floor + exp.
        let spread = self.unpack(&deviation);
        let of_variance = |s: usize| (spread.variance[s] - self.floor).ln() * (parameters.variance[s] - self.floor);
        let first = covariance.len() - k * (k - 1) * (1 + z) - if self.config.start == Start::Free { k - 1 } else { 0 };
        let transitions = (z == 0).then(|| {
            let matrix = parameters.transition_matrix(&[]);
            let error = |i: usize, j: usize| {
                let by = |l: usize| matrix[i][j] * (f64::from(u8::from(j == l)) - matrix[i][l]);
                let at = |l: usize| first + i * (k - 1) + l;
                let pairs = (0..k - 1).flat_map(|a| (0..k - 1).map(move |b| (a, b)));
                pairs.map(|(a, b)| by(a) * by(b) * covariance[at(a)][at(b)]).sum::<f64>().max(0.0).sqrt()
            };
            (0..k).map(|i| (0..k).map(|j| error(i, j)).collect()).collect()
        });
        StandardErrors {
            variance: (0..k).map(of_variance).collect(),
            constant: spread.constant,
            autoregression: spread.autoregression,
            regressors: spread.regressors,
            links: spread.links,
            transitions,
        }
    }

    fn ordered(&self, parameters: &SwitchingParameters) -> SwitchingParameters {
        let key = if self.config.variance == Effect::Switching { &parameters.variance } else { &parameters.constant };
        let mut order: Vec<usize> = (0..self.config.regimes).collect();
        order.sort_by(|&a, &b| key[a].total_cmp(&key[b]));
        parameters.reordered(&order)
    }

    // ---- rows -----------------------------------------------------------------------------------------------------------

    /// y_t, 1, lags, regressors, and in the mean form the regressors of the lags.
    fn row(&self, t: usize) -> Vec<f64> {
        let (p, x) = (self.config.order, self.data.regressors);
        let lagged = if self.config.form == Form::Mean { p } else { 0 };
        let lags = (1..=p).map(|i| self.data.y[t - i]);
        let columns = (0..=lagged).flat_map(|i| x.iter().map(move |column| column[t - i]));
        [self.data.y[t], 1.0].into_iter().chain(lags).chain(columns).collect()
    }

    fn driver(&self, t: usize) -> Vec<f64> {
        self.data.drivers.iter().map(|column| column[t]).collect()
    }

    /// Row of the data at which the chain starts.
    fn first(&self) -> usize {
        if self.config.form == Form::Mean { 0 } else { self.config.order }
    }

    /// [rows, S] summed over what came before: [rows, K].
    fn marginal(&self, states: &[f64]) -> Array2<f64> {
        let mut out = Array2::zeros((self.rows, self.config.regimes));
        for (row, probabilities) in states.chunks_exact(self.histories.len()).enumerate().take(self.rows) {
            for (history, p) in self.histories.iter().zip(probabilities) {
                out[[row, history[0]]] += p;
            }
        }
        out
    }

    // ---- parameters -----------------------------------------------------------------------------------------------------

    fn check(&self, parameters: &SwitchingParameters) -> Result<()> {
        let (k, p, e, z) = (self.config.regimes, self.config.order, self.config.regressors.len(), self.data.drivers.len());
        let shape = |arg: &str, fits: bool, expected: String| {
            if fits {
                return Ok(());
            }
            Err(Error::Shape { op: OP, arg: arg.into(), expected, got: "another shape".into() })
        };
        let rows = |x: &[Vec<f64>], width: usize| x.len() == k && x.iter().all(|row| row.len() == width);
        shape("constant", parameters.constant.len() == k, format!("[{k}]"))?;
        shape("autoregression", rows(&parameters.autoregression, p), format!("[{k},{p}]"))?;
        shape("regressors", rows(&parameters.regressors, e), format!("[{k},{e}]"))?;
        shape("variance", parameters.variance.len() == k, format!("[{k}]"))?;
        let links = parameters.links.len() == k && parameters.links.iter().all(|row| row.len() == k - 1 && row.iter().all(|l| l.len() == 1 + z));
        shape("links", links, format!("[{k},{},{}]", k - 1, 1 + z))?;
        if let Some(v) = parameters.variance.iter().find(|v| !(v.is_finite() && **v > self.floor)) {
            return Err(parameter("variance", v, &format!("give a variance above {:e}, {FLOOR:e} of the series'", self.floor)));
        }
        if self.config.start == Start::Free {
            shape("initial", parameters.initial.len() == k, format!("[{k}]"))?;
            let sum: f64 = parameters.initial.iter().sum();
            if (sum - 1.0).abs() > 1e-4 || parameters.initial.iter().any(|p| *p < 0.0) {
                return Err(parameter("initial", format!("{:?}", parameters.initial), "give probabilities that sum to 1"));
            }
        }
        let numbers = parameters.constant.iter().chain(parameters.autoregression.iter().flatten()).chain(parameters.regressors.iter().flatten());
        match numbers.chain(parameters.links.iter().flatten().flatten()).find(|x| !x.is_finite()) {
            Some(x) => Err(parameter("parameters", x, "give finite numbers")),
            None => Ok(()),
        }
    }

    /// Free parameters as one vector; the order is that of [`Switching::gradient`].
    fn pack(&self, parameters: &SwitchingParameters) -> Vec<f64> {
        let c = &self.config;
        let mut out = Vec::with_capacity(self.free());
        let mut push = |effect: Effect, of: &dyn Fn(usize) -> f64| match effect {
            Effect::Common => out.push(of(0)),
            Effect::Switching => out.extend((0..c.regimes).map(of)),
        };
        push(c.constant, &|s| parameters.constant[s]);
        (0..c.order).for_each(|i| push(c.autoregression, &|s| parameters.autoregression[s][i]));
        c.regressors.iter().enumerate().for_each(|(e, &effect)| push(effect, &|s| parameters.regressors[s][e]));
        push(c.variance, &|s| (parameters.variance[s] - self.floor).ln());
        out.extend(parameters.links.iter().flatten().flatten());
        if c.start == Start::Free {
            let log = |p: f64| p.max(1e-300).ln();
            let last = log(parameters.initial[c.regimes - 1]);
            out.extend(parameters.initial[..c.regimes - 1].iter().map(|&p| log(p) - last));
        }
        out
    }

    fn unpack(&self, x: &[f64]) -> SwitchingParameters {
        let c = &self.config;
        let (k, z) = (c.regimes, self.data.drivers.len());
        let mut rest = x.iter().copied();
        let mut next = || rest.next().unwrap_or(0.0);
        let mut take = |effect: Effect| -> Vec<f64> {
            match effect {
                Effect::Common => vec![next(); k],
                Effect::Switching => (0..k).map(|_| next()).collect(),
            }
        };
        let constant = take(c.constant);
        let lags: Vec<Vec<f64>> = (0..c.order).map(|_| take(c.autoregression)).collect();
        let columns: Vec<Vec<f64>> = c.regressors.iter().map(|&effect| take(effect)).collect();
        let variance = take(c.variance).iter().map(|v| self.floor + v.exp()).collect();
        let links = (0..k).map(|_| (1..k).map(|_| (0..=z).map(|_| next()).collect()).collect()).collect();
        let initial = match c.start {
            Start::Free => softmax(&(1..k).map(|_| next()).chain([0.0]).collect::<Vec<_>>()),
            Start::Stationary => vec![1.0 / k as f64; k],
        };
        let across = |x: &[Vec<f64>]| (0..k).map(|s| x.iter().map(|column| column[s]).collect()).collect();
        SwitchingParameters { constant, autoregression: across(&lags), regressors: across(&columns), variance, links, initial }
    }

    /// A starting point: least squares for all, constants spread over the residuals' range, sticky transitions; noise from restart 1 on.
    fn rough(&self, seed: u32, restart: u32) -> SwitchingParameters {
        let c = &self.config;
        let (k, p, e, z) = (c.regimes, c.order, c.regressors.len(), self.data.drivers.len());
        let rows: Vec<Vec<f64>> = (p..self.data.y.len()).map(|t| self.row(t)[..2 + p + e].to_vec()).collect();
        let width = 1 + p + e;
        let beta = least_squares(&rows, width).unwrap_or_else(|| vec![0.0; width]);
        let residuals: Vec<f64> = rows.iter().map(|row| row[0] - beta.iter().zip(&row[1..]).map(|(b, x)| b * x).sum::<f64>()).collect();
        let variance = variance_of(&residuals).max(2.0 * self.floor);
        let mut counter = 0;
        let mut noise = move || {
            counter += 1;
            if restart == 0 { 0.0 } else { normals(philox4x32([counter, restart, 0, 0], [seed, 0x7377_6974]))[0] }
        };
        let spread = |s: usize| if k == 1 { 0.0 } else { 2.0 * s as f64 / (k - 1) as f64 - 1.0 };
        let share = 1.0 - beta[1..=p].iter().sum::<f64>();
        let level = if c.form == Form::Mean && share.abs() > 0.05 { beta[0] / share } else { beta[0] };
        let width_of = variance.sqrt();
        let mut vary = |effect: Effect, base: f64, by: f64, step: f64| -> Vec<f64> {
            match effect {
                Effect::Common => vec![base + by * noise(); k],
                Effect::Switching => (0..k).map(|s| base + step * spread(s) + by * noise()).collect(),
            }
        };
        let constant = vary(c.constant, level, 0.8 * width_of, width_of);
        let lags: Vec<Vec<f64>> = (0..p).map(|i| vary(c.autoregression, beta[1 + i], 0.3, 0.0)).collect();
        let columns: Vec<Vec<f64>> = (0..e).map(|i| vary(c.regressors[i], beta[1 + p + i], 0.3 * (0.1 + beta[1 + p + i].abs()), 0.0)).collect();
        let variances = vary(c.variance, (0.6 * variance).ln(), 0.5, 0.5).iter().map(|v| self.floor + v.exp()).collect();
        let stay = |i: usize, j: usize| if i == j { 2.0 } else { 0.0 };
        let links = (0..k)
            .map(|i| (0..k - 1).map(|j| (0..=z).map(|q| if q == 0 { stay(i, j) - stay(i, k - 1) + 0.7 * noise() } else { 0.2 * noise() }).collect()).collect())
            .collect();
        let across = |x: &[Vec<f64>]| (0..k).map(|s| x.iter().map(|column| column[s]).collect()).collect();
        let initial = vec![1.0 / k as f64; k];
        SwitchingParameters { constant, autoregression: across(&lags), regressors: across(&columns), variance: variances, links, initial }
    }
}

// ---- on the device --------------------------------------------------------------------------------------------------------

/// Log-likelihood and gradient at one point, and the expanded chain's filtered, predicted and smoothed probabilities where asked for.
struct Point {
    log_likelihood: f64,
    gradient: Vec<f64>,
    states: Vec<Vec<f64>>,
}

/// The hidden Markov model of one point, in f64: log_init [S], β [S,R], 1/deviation [S], constant [S]; then its table or weights.
struct Expanded {
    model: Vec<f64>,
    links: Vec<f64>,
    initial: Vec<f64>,
    valid: bool,
}

/// Sums over time that a point's gradient is made of.
struct Sums<'a> {
    /// Of log_init, β, log variance.
    model: &'a [f64],
    links: &'a [f64],
    /// [rows, S]
    posterior: &'a [f64],
}

impl Switching<'_> {
    fn run(&self, device: &Device, parameters: &[SwitchingParameters], keep: bool) -> Result<Vec<Point>> {
        let expanded: Vec<Expanded> = parameters.iter().map(|p| self.expand(p)).collect();
        let (b, t, s) = (parameters.len(), self.rows, self.histories.len());
        let upload = |label: &str, values: Vec<f32>| device.upload(label, &values).map(|x| View::from(&x));
        let single = |of: fn(&Expanded) -> &[f64]| expanded.iter().flat_map(|e| of(e).iter().map(|&x| x as f32)).collect::<Vec<f32>>();
        let links = upload("links", single(|e| &e.links))?;
        let transitions = if self.data.drivers.is_empty() {
            Transitions::Table { log_trans: links, per_sequence: true, per_step: false }
        } else {
            let u = self.data.drivers.len() as u64;
            Transitions::Softmax { weights: links, inputs: upload("drivers", self.drivers.repeat(b))?, u, per_sequence: true }
        };
        let hmm = Hmm {
            b: b as u64,
            t: t as u64,
            k: s as u64,
            d: (self.obs.len() / t) as u64,
            emission: Emission::Regression,
            model: upload("model", single(|e| &e.model))?,
            per_sequence: true,
            transitions,
            obs: upload("rows", self.obs.repeat(b))?,
            words: None,
            masked: false,
        };
        let mut pass = device.pass("switching");
        let wanted = Wanted { filtered: true, predicted: true, posterior: true, ..Wanted::default() };
        let forward = hmm_forward_backward(&mut pass, &hmm, wanted)?;
        let probabilities = Probabilities::of(&forward)?;
        let gradient = hmm_gradient(&mut pass, &hmm, &probabilities, None)?;
        let summary = forward.read(&mut pass)?;
        let reads = [pass.read(&gradient.log_obs)?, pass.read(&gradient.model)?, pass.read(&gradient.transitions)?];
        let views = if keep { vec![probabilities.filtered, probabilities.predicted, probabilities.posterior] } else { Vec::new() };
        let states = views.iter().map(|view| pass.read(view)).collect::<Result<Vec<_>>>()?;
        let mut done = pass.submit()?;
        let likelihoods = forward.likelihoods(&mut done, summary)?;
        let [log_obs, model, links] = [done.f64(reads[0])?, done.f64(reads[1])?, done.f64(reads[2])?];
        let states = states.into_iter().map(|read| done.f64(read)).collect::<Result<Vec<_>>>()?;
        let part = |x: &[f64], i: usize| x[i * x.len() / b..(i + 1) * x.len() / b].to_vec();
        let points = parameters.iter().zip(&expanded).enumerate().map(|(i, (parameters, expanded))| {
            let (model, links, posterior) = (part(&model, i), part(&links, i), part(&log_obs, i));
            let sums = Sums { model: &model, links: &links, posterior: &posterior };
            let value = if expanded.valid { likelihoods[i].value + self.rounding(expanded, &sums) } else { f64::NEG_INFINITY };
            Point {
                log_likelihood: if value.is_finite() { value } else { f64::NEG_INFINITY },
                gradient: self.chain_rule(parameters, expanded, &sums),
                states: states.iter().map(|x| part(x, i)).collect(),
            }
        });
        Ok(points.collect())
    }

    /// Regressors of the expanded chain.
    fn width(&self) -> usize {
        self.obs.len() / self.rows - 1
    }

    /// Whether state `to` may follow state `from`.
    fn follows(&self, from: usize, to: usize) -> bool {
        let (a, b) = (&self.histories[from], &self.histories[to]);
        b[1..] == a[..a.len() - 1]
    }

    fn expand(&self, p: &SwitchingParameters) -> Expanded {
        let (s, depth, z) = (self.histories.len(), self.histories[0].len(), self.data.drivers.len());
        let first = self.first();
        let matrix = |row: usize| p.transition_matrix(&self.driver(row));
        let stationary = if self.config.start == Start::Free { Some(p.initial.clone()) } else { stationary(&matrix(first)) };
        let valid = stationary.is_some();
        let initial = stationary.unwrap_or_else(|| vec![1.0 / self.config.regimes as f64; self.config.regimes]);
        let log = |x: f64| if x > 0.0 { x.ln() } else { LOG_ZERO };
        let steps: Vec<Vec<Vec<f64>>> = (1..depth).map(|i| matrix(first + i)).collect();
        let log_init = self.histories.iter().map(|h| {
            let walk = (1..depth).map(|i| log(steps[i - 1][h[depth - i]][h[depth - 1 - i]])).sum::<f64>();
            (log(initial[h[depth - 1]]) + walk).max(LOG_ZERO)
        });
        let inverse = self.histories.iter().map(|h| 1.0 / p.variance[h[0]].sqrt());
        let constant = self.histories.iter().map(|h| -0.5 * (2.0 * std::f64::consts::PI * p.variance[h[0]]).ln());
        let beta = self.histories.iter().flat_map(|h| self.beta(p, h));
        let model = log_init.chain(beta).chain(inverse).chain(constant).collect();
        let mut links = Vec::with_capacity(s * s * (z + 1));
        let table = if z == 0 { matrix(first) } else { Vec::new() };
        for (from, to) in (0..s).flat_map(|from| (0..s).map(move |to| (from, to))) {
            let (i, j) = (self.histories[from][0], self.histories[to][0]);
            let possible = self.follows(from, to);
            if z == 0 {
                links.push(if possible { log(table[i][j]) } else { LOG_ZERO });
                continue;
            }
            let coefficients = p.links[i].get(j);
            links.extend((0..z).map(|q| if possible { coefficients.map_or(0.0, |c| c[1 + q]) } else { 0.0 }));
            links.push(if possible { coefficients.map_or(0.0, |c| c[0]) } else { LOG_ZERO });
        }
        Expanded { model, links, initial, valid }
    }

    /// Coefficients of a state: constant, lags, regressors, and in the mean form those of the lags' means.
    fn beta(&self, p: &SwitchingParameters, h: &[usize]) -> Vec<f64> {
        let (phi, mean_form) = (&p.autoregression[h[0]], self.config.form == Form::Mean);
        let behind = if mean_form { &h[1..] } else { &[] };
        let constant = p.constant[h[0]] - behind.iter().zip(phi).map(|(&s, phi)| phi * p.constant[s]).sum::<f64>();
        let lagged = behind.iter().zip(phi).flat_map(|(&s, phi)| p.regressors[s].iter().map(move |d| -phi * d));
        [constant].into_iter().chain(phi.iter().copied()).chain(p.regressors[h[0]].iter().copied()).chain(lagged).collect()
    }

    /// What the log-likelihood lost because the device holds model and data in f32, to first order: posteriors times lost logarithms.
    fn rounding(&self, expanded: &Expanded, sums: &Sums<'_>) -> f64 {
        let (s, r) = (self.histories.len(), self.width());
        let lost = |x: f64| if x <= 0.1 * LOG_ZERO { 0.0 } else { x - f64::from(x as f32) };
        let (init, emission) = expanded.model.split_at(s);
        let (beta, scales) = emission.split_at(s * r);
        let density = |state: usize, row: &[f64], of: &dyn Fn(f64) -> f64| {
            let fit: f64 = beta[state * r..(state + 1) * r].iter().zip(&row[1..]).map(|(&b, x)| of(b) * x).sum();
            of(scales[s + state]) - 0.5 * ((row[0] - fit) * of(scales[state])).powi(2)
        };
        let rows = self.obs.chunks_exact(1 + r).zip(sums.posterior.chunks_exact(s)).enumerate();
        let observed = rows.map(|(t, (given, posterior))| {
            let (exact, given) = (self.row(self.config.order + t), given.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>());
            let of = |state: usize| density(state, &exact, &|x| x) - density(state, &given, &|x| f64::from(x as f32));
            posterior.iter().enumerate().filter(|(_, p)| **p > 0.0).map(|(state, p)| p * of(state)).sum::<f64>()
        });
        let start: f64 = init.iter().zip(sums.model).map(|(&x, g)| lost(x) * g).sum();
        let links: f64 = expanded.links.iter().zip(sums.links).map(|(&x, g)| lost(x) * g).sum();
        observed.sum::<f64>() + start + links
    }

    /// From the expanded chain's gradient to that of the free parameters.
    fn chain_rule(&self, p: &SwitchingParameters, expanded: &Expanded, sums: &Sums<'_>) -> Vec<f64> {
        let c = &self.config;
        let (k, s, r, e, z) = (c.regimes, self.histories.len(), self.width(), c.regressors.len(), self.data.drivers.len());
        let mut grad = SwitchingParameters {
            constant: vec![0.0; k],
            autoregression: vec![vec![0.0; c.order]; k],
            regressors: vec![vec![0.0; e]; k],
            variance: vec![0.0; k],
            links: vec![vec![vec![0.0; 1 + z]; k]; k],
            initial: vec![0.0; k],
        };
        let (of_init, rest) = sums.model.split_at(s);
        let (of_beta, of_variance) = rest.split_at(s * r);
        for (state, h) in self.histories.iter().enumerate() {
            let g = &of_beta[state * r..(state + 1) * r];
            let behind = if c.form == Form::Mean { &h[1..] } else { &[] };
            grad.constant[h[0]] += g[0];
            (0..c.order).for_each(|i| grad.autoregression[h[0]][i] += g[1 + i]);
            (0..e).for_each(|i| grad.regressors[h[0]][i] += g[1 + c.order + i]);
            for (lag, &before) in behind.iter().enumerate() {
                let phi = p.autoregression[h[0]][lag];
                let of_lag = &g[1 + c.order + e * (1 + lag)..][..e];
                grad.constant[before] -= phi * g[0];
                grad.autoregression[h[0]][lag] -= p.constant[before] * g[0] + of_lag.iter().zip(&p.regressors[before]).map(|(g, d)| g * d).sum::<f64>();
                (0..e).for_each(|i| grad.regressors[before][i] -= phi * of_lag[i]);
            }
            let v = p.variance[h[0]];
            grad.variance[h[0]] += of_variance[state] * (v - self.floor) / v;
        }
        self.links_rule(p, expanded, sums.links, of_init, &mut grad);
        self.pack_gradient(&grad)
    }

    /// Transitions of the chain, and of its start.
    fn links_rule(&self, p: &SwitchingParameters, expanded: &Expanded, of_links: &[f64], of_init: &[f64], grad: &mut SwitchingParameters) {
        let (k, s, z, depth) = (self.config.regimes, self.histories.len(), self.data.drivers.len(), self.histories[0].len());
        let mut counts = vec![vec![0.0; k]; k];
        for (from, to) in (0..s).flat_map(|from| (0..s).map(move |to| (from, to))).filter(|&(from, to)| self.follows(from, to)) {
            let (i, j) = (self.histories[from][0], self.histories[to][0]);
            let g = &of_links[(from * s + to) * (z + 1)..][..z + 1];
            if z == 0 {
                counts[i][j] += g[0];
            } else {
                grad.links[i][j][0] += g[z];
                (0..z).for_each(|q| grad.links[i][j][1 + q] += g[q]);
            }
        }
        let first = self.first();
        let mut add = |row: usize, of_log: &[Vec<f64>]| {
            let drivers = self.driver(row);
            for (i, probabilities) in p.transition_matrix(&drivers).iter().enumerate() {
                let total: f64 = of_log[i].iter().sum();
                for j in 0..k {
                    let g = of_log[i][j] - probabilities[j] * total;
                    grad.links[i][j][0] += g;
                    drivers.iter().enumerate().for_each(|(q, x)| grad.links[i][j][1 + q] += g * x);
                }
            }
        };
        if z == 0 {
            add(first, &counts);
        }
        let mut of_start = vec![0.0; k];
        for (h, &g) in self.histories.iter().zip(of_init) {
            of_start[h[depth - 1]] += g;
        }
        for i in 1..depth {
            let mut walked = vec![vec![0.0; k]; k];
            for (h, &g) in self.histories.iter().zip(of_init) {
                walked[h[depth - i]][h[depth - 1 - i]] += g;
            }
            add(first + i, &walked);
        }
        match self.config.start {
            Start::Free => {
                let total: f64 = of_start.iter().sum();
                (0..k).for_each(|j| grad.initial[j] += of_start[j] - expanded.initial[j] * total);
            }
            Start::Stationary => {
                let matrix = p.transition_matrix(&self.driver(first));
                if let Some(of_log) = stationary_rule(&matrix, &expanded.initial, &of_start) {
                    add(first, &of_log);
                }
            }
        }
    }

    /// Sums a gradient over what is common, in the order of `pack`.
    fn pack_gradient(&self, grad: &SwitchingParameters) -> Vec<f64> {
        let c = &self.config;
        let k = c.regimes;
        let mut out = Vec::with_capacity(self.free());
        let mut push = |effect: Effect, of: &dyn Fn(usize) -> f64| match effect {
            Effect::Common => out.push((0..k).map(of).sum()),
            Effect::Switching => out.extend((0..k).map(of)),
        };
        push(c.constant, &|s| grad.constant[s]);
        (0..c.order).for_each(|i| push(c.autoregression, &|s| grad.autoregression[s][i]));
        c.regressors.iter().enumerate().for_each(|(e, &effect)| push(effect, &|s| grad.regressors[s][e]));
        push(c.variance, &|s| grad.variance[s]);
        out.extend(grad.links.iter().flat_map(|row| row[..k - 1].iter().flatten()));
        if c.start == Start::Free {
            out.extend(&grad.initial[..k - 1]);
        }
        out
    }
}

// ---- search ---------------------------------------------------------------------------------------------------------------

/// Minimises by BFGS with a backtracking line search, one evaluation at a time: evaluate at `trial`, then `tell`.
struct Bfgs {
    x: Vec<f64>,
    value: f64,
    gradient: Vec<f64>,
    /// Approximate inverse Hessian [n,n].
    inverse: Vec<f64>,
    direction: Vec<f64>,
    step: f64,
    trial: Vec<f64>,
    iterations: usize,
    limit: usize,
    /// Relative noise of a value.
    noise: f64,
    tolerance: f64,
    fresh: bool,
    finished: bool,
    converged: bool,
}

/// Longest step of one parameter.
const STRIDE: f64 = 2.0;

impl Bfgs {
    fn new(x: Vec<f64>, single: bool, limit: usize) -> Bfgs {
        let n = x.len();
        Bfgs {
            trial: x.clone(),
            x,
            value: f64::INFINITY,
            gradient: vec![0.0; n],
            inverse: identity(n),
            direction: vec![0.0; n],
            step: 1.0,
            iterations: 0,
            limit,
            noise: if single { 2e-7 } else { 1e-12 },
            // The model goes to the device in f32, and its gradient is that of what arrives.
            tolerance: if single { 2e-5 } else { 3e-7 },
            fresh: true,
            finished: false,
            converged: false,
        }
    }

    fn done(&self) -> bool {
        self.finished
    }

    fn tell(&mut self, value: f64, gradient: Vec<f64>) {
        let usable = value.is_finite() && gradient.iter().all(|g| g.is_finite());
        if self.value == f64::INFINITY {
            if !usable {
                self.finished = true;
                return;
            }
            (self.value, self.gradient) = (value, gradient);
            return self.aim();
        }
        let slope = dot(&self.direction, &self.gradient);
        let allowed = self.value + 1e-4 * self.step * slope + self.noise * self.value.abs();
        if usable && value <= allowed {
            let moved: Vec<f64> = self.trial.iter().zip(&self.x).map(|(a, b)| a - b).collect();
            let turned: Vec<f64> = gradient.iter().zip(&self.gradient).map(|(a, b)| a - b).collect();
            self.update(&moved, &turned);
            let gained = self.value - value;
            (self.x, self.value, self.gradient) = (self.trial.clone(), value, gradient);
            self.iterations += 1;
            let stalled = gained <= self.noise * self.value.abs() && dot(&self.direction, &self.gradient).abs() <= self.noise;
            if stalled || self.iterations >= self.limit {
                self.converged = self.flat(10.0);
                self.finished = true;
                return;
            }
            return self.aim();
        }
        let curve = value - self.value - slope * self.step;
        let best = if usable && curve > 0.0 { -0.5 * slope * self.step * self.step / curve } else { 0.0 };
        self.step = best.clamp(0.1 * self.step, 0.5 * self.step);
        let longest = self.direction.iter().fold(0.0f64, |m, d| m.max(d.abs()));
        if self.step * longest > 1e-11 {
            self.place();
        } else if self.fresh {
            self.converged = self.flat(100.0);
            self.finished = true;
        } else {
            // The approximation is of no use here: start it again.
            self.inverse = identity(self.x.len());
            self.fresh = true;
            self.aim();
        }
    }

    /// Whether the gradient is `times` its tolerance or less.
    fn flat(&self, times: f64) -> bool {
        self.gradient.iter().zip(&self.x).all(|(g, x)| g.abs() * x.abs().clamp(1.0, 10.0) <= times * self.tolerance * self.value.abs().max(1.0))
    }

    /// Next direction and first trial along it.
    fn aim(&mut self) {
        if self.flat(1.0) {
            self.converged = true;
            self.finished = true;
            return;
        }
        let n = self.x.len();
        for (row, out) in self.inverse.chunks_exact(n).zip(&mut self.direction) {
            *out = -dot(row, &self.gradient);
        }
        if dot(&self.direction, &self.gradient) >= 0.0 {
            self.inverse = identity(n);
            self.fresh = true;
            self.direction = self.gradient.iter().map(|g| -g).collect();
        }
        let longest = self.direction.iter().fold(0.0f64, |m, d| m.max(d.abs()));
        self.step = (STRIDE / longest).min(if self.fresh { (0.5 / longest).max(1.0) } else { 1.0 });
        self.place();
    }

    fn place(&mut self) {
        self.trial = self.x.iter().zip(&self.direction).map(|(x, d)| x + self.step * d).collect();
    }

    fn update(&mut self, moved: &[f64], turned: &[f64]) {
        let n = moved.len();
        let sy = dot(moved, turned);
        if sy <= 1e-12 * (dot(moved, moved) * dot(turned, turned)).sqrt() {
            return;
        }
        if self.fresh {
            let scale = sy / dot(turned, turned);
            self.inverse = identity(n).into_iter().map(|x| x * scale).collect();
            self.fresh = false;
        }
        let hy: Vec<f64> = self.inverse.chunks_exact(n).map(|row| dot(row, turned)).collect();
        let weight = (1.0 + dot(turned, &hy) / sy) / sy;
        for (i, j) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
            self.inverse[i * n + j] += weight * moved[i] * moved[j] - (moved[i] * hy[j] + hy[i] * moved[j]) / sy;
        }
    }
}

// ---- numbers --------------------------------------------------------------------------------------------------------------

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn identity(n: usize) -> Vec<f64> {
    (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect()
}

fn variance_of(x: &[f64]) -> f64 {
    let n = x.len().max(1) as f64;
    let mean = x.iter().sum::<f64>() / n;
    x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n
}

fn check_column(name: &str, column: &[f64], rows: usize) -> Result<()> {
    if column.len() != rows {
        return Err(Error::Shape { op: OP, arg: name.into(), expected: format!("{rows} rows"), got: format!("{} rows", column.len()) });
    }
    match column.iter().position(|x| !x.is_finite()) {
        Some(row) => Err(parameter(&format!("{name}, row {row}"), column[row], "give a number in every row; leave out the rows without")),
        None => Ok(()),
    }
}

/// Logits of one row against the last regime, whose logit is 0.
fn logits(row: &[Vec<f64>], z: &[f64]) -> Vec<f64> {
    row.iter().map(|c| c[0] + dot(&c[1..], z)).chain([0.0]).collect()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let most = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|v| (v - most).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|v| v / sum).collect()
}

/// Solves a·x = b by elimination with pivots; `None` where a is singular.
fn solve(a: &[Vec<f64>], b: &[f64]) -> Option<Vec<f64>> {
    let n = b.len();
    let mut rows: Vec<Vec<f64>> = a.iter().zip(b).map(|(row, &b)| row.iter().copied().chain([b]).collect()).collect();
    for column in 0..n {
        let pivot = (column..n).max_by(|&i, &j| rows[i][column].abs().total_cmp(&rows[j][column].abs()))?;
        rows.swap(column, pivot);
        let head = rows[column].clone();
        if head[column].is_nan() || head[column].abs() <= 1e-13 {
            return None;
        }
        for row in rows.iter_mut().skip(column + 1) {
            let factor = row[column] / head[column];
            (column..=n).for_each(|j| row[j] -= factor * head[j]);
        }
    }
    let mut x = vec![0.0; n];
    for i in (0..n).rev() {
        x[i] = (rows[i][n] - (i + 1..n).map(|j| rows[i][j] * x[j]).sum::<f64>()) / rows[i][i];
    }
    x.iter().all(|v| v.is_finite()).then_some(x)
}

/// Rows of y and regressors.
fn least_squares(rows: &[Vec<f64>], width: usize) -> Option<Vec<f64>> {
    let moment = |i: usize, j: usize| rows.iter().map(|row| row[i] * row[j]).sum::<f64>();
    let a: Vec<Vec<f64>> = (1..=width).map(|i| (1..=width).map(|j| moment(i, j)).collect()).collect();
    solve(&a, &(1..=width).map(|i| moment(i, 0)).collect::<Vec<_>>())
}

/// Stationary distribution of a transition matrix; `None` where it is not unique.
fn stationary(matrix: &[Vec<f64>]) -> Option<Vec<f64>> {
    let k = matrix.len();
    let row = |i: usize| (0..k).map(|j| if i == k - 1 { 1.0 } else { matrix[j][i] - f64::from(u8::from(i == j)) }).collect();
    let right: Vec<f64> = (0..k).map(|i| f64::from(u8::from(i == k - 1))).collect();
    let pi = solve(&(0..k).map(row).collect::<Vec<Vec<f64>>>(), &right)?;
    pi.iter().all(|p| *p > -1e-9).then(|| pi.into_iter().map(|p| p.max(0.0)).collect())
}

/// Gradient with respect to log matrix of Σ_s of_log[s]·log π(s): π·dA·(I − A + 1π)⁻¹ is the change of π.
fn stationary_rule(matrix: &[Vec<f64>], pi: &[f64], of_log: &[f64]) -> Option<Vec<Vec<f64>>> {
    let k = pi.len();
    let h: Vec<f64> = (0..k).map(|s| if pi[s] > 0.0 { of_log[s] / pi[s] } else { 0.0 }).collect();
    let row = |i: usize| (0..k).map(|j| f64::from(u8::from(i == j)) - matrix[i][j] + pi[j]).collect();
    let x = solve(&(0..k).map(row).collect::<Vec<Vec<f64>>>(), &h)?;
    Some((0..k).map(|i| (0..k).map(|j| pi[i] * matrix[i][j] * x[j]).collect()).collect())
}
