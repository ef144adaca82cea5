//! What the states are seen through: observations [T,D] of each asset from closes and columns up to their bar.
//!
//! * returns       ln(p_t / p_{t−1}), decimals;
//! * volatility:N  ln of the deviation (n−1) of the last N log returns, at least 1e-8: a volatility is closer to log-normal than to normal.
//!   Its windows overlap, so that neighbouring observations say much the same and states seem to last longer than they do;
//! * level         the price itself, of any sign: for series that are no prices;
//! * column:NAME   another column of a long file, as it stands.
//!
//! A row at bar t uses bars up to t. All assets start at the first bar at which every feature is there.

use crate::{Error, Result};
use ndarray::ArrayView2;
use std::fmt;
use std::str::FromStr;

/// An observation of a bar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Feature {
    /// Log return into the bar.
    Returns,
    /// Log of the realised volatility of the last `window` returns.
    Volatility {
        /// Returns; at least 2.
        window: usize,
    },
    /// The price as it stands.
    Level,
    /// A column of [`Panel::columns`].
    Column(String),
}

impl FromStr for Feature {
    type Err = Error;

    fn from_str(text: &str) -> Result<Feature> {
        let bad = |help: &str| Error::Parameter { op: "regimes", name: "--features".into(), value: text.into(), help: help.into() };
        match text.trim().split_once(':') {
            None if text.trim() == "returns" => Ok(Feature::Returns),
            None if text.trim() == "level" => Ok(Feature::Level),
            None if text.trim() == "volatility" => Ok(Feature::Volatility { window: 21 }),
            Some(("volatility", n)) => {
                let window = n.parse().ok().filter(|&n| n >= 2);
                window.map(|window| Feature::Volatility { window }).ok_or_else(|| bad("give a window of 2 bars or more: volatility:21"))
            }
            Some(("column", name)) if !name.is_empty() => Ok(Feature::Column(name.into())),
            _ => {
                let known = ["returns", "volatility:21", "level", "column:NAME"];
                let suggestion = crate::data::nearest(text, known);
                Err(Error::Unknown { kind: "feature", given: text.into(), suggestion, known: known.map(String::from).to_vec() })
            }
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Feature::Returns => f.write_str("returns"),
            Feature::Volatility { window } => write!(f, "volatility:{window}"),
            Feature::Level => f.write_str("level"),
            Feature::Column(name) => write!(f, "column:{name}"),
        }
    }
}

impl Feature {
    /// Bars before the first value.
    fn warm_up(&self) -> usize {
        match self {
            Feature::Returns => 1,
            Feature::Volatility { window } => *window,
            Feature::Level | Feature::Column(_) => 0,
        }
    }

    /// Whether its price has to be positive.
    pub fn needs_positive(&self) -> bool {
        matches!(self, Feature::Returns | Feature::Volatility { .. })
    }
}

/// Prices, and other columns where features name them.
#[derive(Debug, Clone)]
pub struct Panel<'a> {
    /// Asset names [N], for messages.
    pub symbols: &'a [String],
    /// Closes [T,N].
    pub close: ArrayView2<'a, f32>,
    /// Columns by name, each [T,N].
    pub columns: Vec<(String, ArrayView2<'a, f32>)>,
}

/// Observations of all assets from bar `first` on.
#[derive(Debug, Clone)]
pub(super) struct Observations {
    pub(super) d: usize,
    pub(super) first: usize,
    pub(super) rows: usize,
    /// [N][rows,D].
    pub(super) values: Vec<Vec<f64>>,
    /// Log returns into the same bars [N][rows]; none where prices are not positive.
    pub(super) returns: Option<Vec<Vec<f64>>>,
}

/// Deviations below this count as this.
const LEAST_DEVIATION: f64 = 1e-8;

impl Observations {
    pub(super) fn of(panel: &Panel<'_>, features: &[Feature]) -> Result<Observations> {
        let (t, n) = panel.close.dim();
        if features.is_empty() {
            return Err(Error::Parameter { op: "regimes", name: "features".into(), value: "none".into(), help: "give at least one, such as returns".into() });
        }
        let first = features.iter().map(Feature::warm_up).max().unwrap_or(0);
        if t <= first {
            let help = format!("the features need {first} bars before the first observation, there are {t}: use more bars or a shorter window");
            return Err(Error::Parameter { op: "regimes", name: "bars".into(), value: t.to_string(), help });
        }
        let positive = panel.close.iter().all(|p| *p > 0.0);
        if features.iter().any(Feature::needs_positive) && !positive {
            let at = panel.close.indexed_iter().find(|(_, p)| **p <= 0.0 || p.is_nan()).map_or((0, 0), |(at, _)| at);
            let help = "log returns need positive prices; use the feature level, or another column".into();
            let name = format!("price of {} at bar {}", panel.symbols[at.1], at.0);
            return Err(Error::Parameter { op: "regimes", name, value: panel.close[at].to_string(), help });
        }
        let mut values = Vec::with_capacity(n);
        let mut returns = Vec::with_capacity(n);
        for asset in 0..n {
            let price = |bar: usize| f64::from(panel.close[[bar, asset]]);
            let logs: Vec<f64> = if positive { (0..t).map(|j| if j == 0 { 0.0 } else { (price(j) / price(j - 1)).ln() }).collect() } else { Vec::new() };
            let mut rows = vec![0.0; (t - first) * features.len()];
            for (d, feature) in features.iter().enumerate() {
                let column = column_of(panel, feature)?;
                for (i, bar) in (first..t).enumerate() {
                    let value = match feature {
                        Feature::Returns => logs[bar],
                        Feature::Volatility { window } => deviation(&logs[bar + 1 - window..=bar]).max(LEAST_DEVIATION).ln(),
                        Feature::Level => price(bar),
                        Feature::Column(_) => column.map_or(f64::NAN, |c| f64::from(c[[bar, asset]])),
                    };
                    if !value.is_finite() {
                        let name = format!("{feature} of {} at bar {bar}", panel.symbols[asset]);
                        return Err(Error::Parameter { op: "regimes", name, value: value.to_string(), help: "observations must be finite numbers".into() });
                    }
                    rows[i * features.len() + d] = value;
                }
            }
            values.push(rows);
            returns.push(logs.get(first..).unwrap_or_default().to_vec());
        }
        Ok(Observations { d: features.len(), first, rows: t - first, values, returns: positive.then_some(returns) })
    }

    /// Rows of an asset.
    pub(super) fn rows_of(&self, asset: usize, rows: std::ops::Range<usize>) -> &[f64] {
        &self.values[asset][rows.start * self.d..rows.end * self.d]
    }
}

fn column_of<'a>(panel: &'a Panel<'_>, feature: &Feature) -> Result<Option<&'a ArrayView2<'a, f32>>> {
    let Feature::Column(name) = feature else { return Ok(None) };
    let found = panel.columns.iter().find(|(known, values)| known == name && values.dim() == panel.close.dim());
    found.map(|(_, values)| Some(values)).ok_or_else(|| Error::Unknown {
        kind: "column",
        given: name.clone(),
        suggestion: crate::data::nearest(name, panel.columns.iter().map(|c| c.0.as_str())),
        known: panel.columns.iter().map(|c| c.0.clone()).collect(),
    })
}

/// Sample deviation, n−1.
pub(super) fn deviation(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    (values.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / (n - 1.0)).sqrt()
}

/// Where an asset's observations are centred and how they are scaled before they go to the device in f32: from the rows of the fit alone.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scaler {
    pub(super) centre: Vec<f64>,
    pub(super) scale: Vec<f64>,
}

impl Scaler {
    /// Returns keep their zero, everything else is centred. Values [R,D] of one or more assets.
    pub(super) fn of(features: &[Feature], parts: &[&[f64]], what: &dyn Fn() -> String) -> Result<Scaler> {
        let d = features.len();
        let n = parts.iter().map(|part| part.len() / d).sum::<usize>() as f64;
        let sum = |k: usize, f: &dyn Fn(f64) -> f64| parts.iter().flat_map(|part| part.iter().skip(k).step_by(d)).map(|&x| f(x)).sum::<f64>();
        let (mut centre, mut scale) = (vec![0.0; d], vec![1.0; d]);
        for k in 0..d {
            let mean = sum(k, &|x| x) / n;
            let variance = sum(k, &|x| (x - mean) * (x - mean)) / (n - 1.0).max(1.0);
            // What rounding to f32 prices leaves of a constant series counts as nothing.
            let noise = if features[k] == Feature::Returns { 1e-9 } else { 1e-7 * mean.abs() };
            if variance.is_nan() || variance.sqrt() <= noise {
                let help = "a series that does not move has no regimes: leave the asset out, or widen the window".into();
                return Err(Error::Parameter { op: "regimes", name: format!("{} of {}", features[k], what()), value: "constant".into(), help });
            }
            centre[k] = if features[k] == Feature::Returns { 0.0 } else { mean };
            scale[k] = variance.sqrt();
        }
        Ok(Scaler { centre, scale })
    }

    pub(super) fn apply(&self, rows: &[f64]) -> Vec<f32> {
        let d = self.scale.len();
        rows.iter().enumerate().map(|(i, x)| ((x - self.centre[i % d]) / self.scale[i % d]) as f32).collect()
    }

    /// ln|d scaled / d raw| of a row, negative: what a raw row's log-likelihood has more.
    pub(super) fn log_jacobian(&self) -> f64 {
        -self.scale.iter().map(|s| s.ln()).sum::<f64>()
    }
}
