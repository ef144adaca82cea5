//! Prices to what models learn from: features and targets of every asset and bar, stacked asset after asset.
//!
//! Features of bar t use bars up to t:
//! * returns:N      ln(p_t / p_{t−N});
//! * momentum:N     the same over σ_t·√N: in deviations of what chance would have done;
//! * volatility:N   ln of the deviation (n−1) of the last N log returns, at least 1e-8.
//!
//! Targets of bar t, decided at its close and earned from bar t+d on, d the delay of the execution (1 for the next close), over h bars:
//! * return         f_{t+d+h} / f_{t+d} − 1, f the prices at which is traded; models see it over σ_t·√h, which makes assets and times alike;
//! * sign           1 where that return is positive, else 0;
//! * volatility     ln of the deviation (n−1) of the h log returns of closes after bar t+d, at least 1e-8; models see what it has more than that of
//!   the h returns up to bar t, so that a model that has learned nothing forecasts the volatility so far;
//! * position       the return itself: what a position of 1 earns.
//!
//! σ_t is the deviation of the last 63 log returns, at least 1e-4. A target looks d + h bars ahead; rows without one exist for prediction alone.

use super::data::Table;
use crate::{Error, Result};
use ndarray::{Array2, ArrayView2};
use std::fmt;

/// Log returns that σ is of.
const SIGMA: usize = 63;
const LEAST_SIGMA: f64 = 1e-4;
const LEAST_VOLATILITY: f64 = 1e-8;

/// A feature of a bar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// Log return over so many bars.
    Returns(usize),
    /// The same in deviations.
    Momentum(usize),
    /// Log of the realised volatility of so many returns.
    Volatility(usize),
}

const FEATURES: [&str; 3] = ["returns", "momentum", "volatility"];

impl Feature {
    /// A list such as `returns:1,5,21,volatility:21`: numbers belong to the name before them.
    /// # Errors
    /// `Unknown` for a name, `Parameter` for a number that is none or is there twice.
    pub fn list(text: &str) -> Result<Vec<Feature>> {
        let bad = |value: &str, help: &str| Error::Parameter { op: "train", name: "--features".into(), value: value.into(), help: help.into() };
        let (mut out, mut name) = (Vec::new(), None);
        for word in text.split(',').map(str::trim) {
            let (given, number) = match word.split_once(':') {
                Some((given, number)) => (Some(given), number),
                None if word.bytes().all(|b| b.is_ascii_digit()) && !word.is_empty() => (None, word),
                None => (Some(word), "1"),
            };
            name = given.or(name);
            let bars = number.parse::<usize>().ok().filter(|&n| n > 0).ok_or_else(|| bad(word, "give a number of bars, such as returns:5"))?;
            let feature = match name {
                Some("returns") => Feature::Returns(bars),
                Some("momentum") => Feature::Momentum(bars),
                Some("volatility") if bars >= 2 => Feature::Volatility(bars),
                Some("volatility") => return Err(bad(word, "a volatility is of 2 bars or more: volatility:21")),
                None => return Err(bad(word, "a number belongs to a name before it: returns:1,5,21")),
                Some(other) => {
                    let suggestion = crate::data::nearest(other, FEATURES);
                    return Err(Error::Unknown { kind: "feature", given: other.into(), suggestion, known: FEATURES.map(String::from).to_vec() });
                }
            };
            if out.contains(&feature) {
                return Err(bad(&feature.to_string(), "is there twice; name each feature once"));
            }
            out.push(feature);
        }
        Ok(out)
    }

    /// Bars before the first value.
    fn warm_up(self) -> usize {
        match self {
            Feature::Returns(n) | Feature::Volatility(n) => n,
            Feature::Momentum(n) => n.max(SIGMA),
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Feature::Returns(n) => write!(f, "returns:{n}"),
            Feature::Momentum(n) => write!(f, "momentum:{n}"),
            Feature::Volatility(n) => write!(f, "volatility:{n}"),
        }
    }
}

/// What is forecast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The return over the horizon.
    Return,
    /// Whether it is positive.
    Sign,
    /// Log of the volatility over the horizon.
    Volatility,
    /// No forecast: a position that earns the return.
    Position,
}

/// Prices, and when they are traded at.
#[derive(Debug, Clone, Copy)]
pub struct Bars<'a> {
    /// Closes [T,N], positive.
    pub close: ArrayView2<'a, f32>,
    /// Prices [T,N] at which a decision of bar t is filled if the delay is 0: the close, or the next open.
    pub fill: ArrayView2<'a, f32>,
    /// Bars between a decision and its fill.
    pub delay: usize,
    /// Bars of `fill` that lie ahead of the bar that names them: 1 for the next open.
    pub ahead: usize,
}

/// What models learn from.
#[derive(Debug, Clone)]
pub struct Samples {
    /// Rows of asset i stand at i·R … (i+1)·R, row i·R + j is bar `first` + j.
    pub table: Table,
    /// The first bar of a row.
    pub first: usize,
    /// Bars that a target looks ahead.
    pub reach: usize,
    /// What is forecast, per row, in its own units; NaN where it lies ahead of the data.
    pub truth: Vec<f64>,
    /// What a prediction of the table's target is multiplied by to be in those units …
    pub unit: Vec<f64>,
    /// … and what is then added: the volatility so far, 0 for the others.
    pub base: Vec<f64>,
}

impl Samples {
    /// Features and targets of every bar that has the former.
    /// # Errors
    /// `Parameter` for no feature, too few bars, a horizon of 0, or of 1 for a volatility; as for [`Table::new`].
    pub fn of(bars: &Bars<'_>, features: &[Feature], target: Target, horizon: usize, window: usize) -> Result<Samples> {
        let wrong = |name: &str, value: String, help: String| Err(Error::Parameter { op: "train", name: name.into(), value, help });
        let (t, n) = bars.close.dim();
        if features.is_empty() {
            return wrong("--features", "none".into(), "give at least one, such as returns:1,5,21".into());
        }
        let least = if target == Target::Volatility { 2 } else { 1 };
        if horizon < least {
            return wrong("--horizon", horizon.to_string(), format!("give at least {least} bars"));
        }
        let far = if target == Target::Volatility { horizon } else { SIGMA };
        let first = features.iter().map(|f| f.warm_up()).max().unwrap_or(0).max(far);
        let reach = bars.delay + bars.ahead + horizon;
        let needed = first + window + reach;
        if t < needed + 1 {
            let help = format!("features need {first} bars before the first row, a window {window}, a target {reach} ahead: at least {} bars", needed + 1);
            return wrong("bars", t.to_string(), help);
        }
        let rows = t - first;
        let mut all = Samples {
            table: Table::new(Array2::zeros((1, 1)).view(), Array2::zeros((1, 1)).view(), 1)?,
            first,
            reach,
            truth: Vec::new(),
            unit: Vec::new(),
            base: Vec::new(),
        };
        let (mut x, mut y) = (Array2::zeros((n * rows, features.len())), Array2::zeros((n * rows, 1)));
        for asset in 0..n {
            let price = |bar: usize| f64::from(bars.close[[bar, asset]]);
            let fill = |bar: usize| f64::from(bars.fill[[bar, asset]]);
            let logs: Vec<f64> = (0..t).map(|j| if j == 0 { 0.0 } else { (price(j) / price(j - 1)).ln() }).collect();
            let sigmas = Deviations::of(&logs, SIGMA);
            let volatilities: Vec<(usize, Deviations)> =
                features.iter().filter_map(|f| if let Feature::Volatility(n) = f { Some((*n, Deviations::of(&logs, *n))) } else { None }).collect();
            let ahead = if target == Target::Volatility { Some(Deviations::of(&logs, horizon)) } else { None };
            for (row, bar) in (first..t).enumerate() {
                let (row, sigma) = (asset * rows + row, sigmas.at(bar).max(LEAST_SIGMA));
                for (d, feature) in features.iter().enumerate() {
                    x[[row, d]] = match *feature {
                        Feature::Returns(n) => (price(bar) / price(bar - n)).ln(),
                        Feature::Momentum(n) => (price(bar) / price(bar - n)).ln() / (sigma * (n as f64).sqrt()),
                        Feature::Volatility(n) => volatilities.iter().find(|v| v.0 == n).map_or(0.0, |v| v.1.at(bar).max(LEAST_VOLATILITY).ln()),
                    } as f32;
                }
                let from = bar + bars.delay;
                let known = bar + reach < t;
                let earned = if known { fill(from + horizon) / fill(from) - 1.0 } else { f64::NAN };
                let volatility = |bar: usize| ahead.as_ref().map_or(f64::NAN, |a| a.at(bar).max(LEAST_VOLATILITY).ln());
                let (truth, unit) = match target {
                    Target::Return => (earned, sigma * (horizon as f64).sqrt()),
                    Target::Position => (earned, 1.0),
                    Target::Sign => (if known { f64::from(earned > 0.0) } else { f64::NAN }, 1.0),
                    Target::Volatility => (if known { volatility(from + horizon) } else { f64::NAN }, 1.0),
                };
                let base = if target == Target::Volatility { volatility(bar) } else { 0.0 };
                y[[row, 0]] = if known { ((truth - base) / unit) as f32 } else { 0.0 };
                all.truth.push(truth);
                all.unit.push(unit);
                all.base.push(base);
            }
        }
        all.table = Table::new(x.view(), y.view(), window)?.stacked(n)?;
        Ok(all)
    }

    /// Rows of one asset.
    pub fn rows(&self) -> usize {
        self.table.rows_of_series()
    }

    /// Asset and bar of a row.
    pub fn place(&self, row: u32) -> (usize, usize) {
        (row as usize / self.rows(), self.first + row as usize % self.rows())
    }
}

/// Sample deviations of the last `window` values at every index, n−1.
struct Deviations(Vec<f64>);

impl Deviations {
    fn of(values: &[f64], window: usize) -> Deviations {
        let one = |bar: usize| {
            let Some(from) = (bar + 1).checked_sub(window) else { return f64::NAN };
            let part = &values[from..=bar];
            let n = part.len() as f64;
            let mean = part.iter().sum::<f64>() / n;
            (part.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / (n - 1.0)).sqrt()
        };
        Deviations((0..values.len()).map(one).collect())
    }

    fn at(&self, bar: usize) -> f64 {
        self.0.get(bar).copied().unwrap_or(f64::NAN)
    }
}
