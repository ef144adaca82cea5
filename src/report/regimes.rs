//! The page of `forback regimes`: price by regime, filtered against smoothed probabilities, transitions, durations, all assets together.
//!
//! Thinning  every asset has the same points: the last bar of each of at most MOST_POINTS runs of bars, fewer where there are many assets, so
//!           that the page stays below 8 MB. A price is that of the bar, a probability the mean of the run, in thousandths; the last state's
//!           is what the others leave.
//! Runs      observed durations are lengths of runs of the same most likely smoothed state, on all bars, ends included.

use super::{assembled, write_whole};
use crate::Result;
use crate::data::Prices;
use crate::regimes::{Causal, OutOfSample, Regimes};
use ndarray::ArrayView1;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;
use std::ops::Range;
use std::path::Path;

const TEMPLATE: &str = include_str!("regimes.html");
const SCRIPT: &str = include_str!("regimes.js");

/// Most points of a series, and the fewest.
const MOST_POINTS: usize = 2000;
const FEWEST_POINTS: usize = 60;
/// Bytes that all series may take.
const BUDGET: usize = 4_500_000;

/// What the page is made of.
pub struct Inputs<'a> {
    /// Prices that were looked at.
    pub prices: &'a Prices,
    /// Models and probabilities over the whole sample.
    pub regimes: &'a Regimes,
    /// Probabilities of refits, where there are any.
    pub out_of_sample: Option<&'a OutOfSample>,
    /// What the command prints as JSON.
    pub found: Value,
    /// Name of each model.
    pub names: Vec<String>,
}

/// Everything that the page shows.
#[derive(Debug, Clone, Serialize)]
struct Page {
    title: String,
    facts: Vec<(String, String)>,
    provenance: Value,
    models: Value,
    names: Vec<String>,
    out_of_sample: Value,
    missing: Value,
    /// Unix seconds of each point.
    time: Vec<i64>,
    /// Bars of a run.
    run: usize,
    assets: Vec<Asset>,
    /// All assets together, where there are several.
    all: Option<Asset>,
}

/// Series of an asset, or of all.
#[derive(Debug, Clone, Serialize)]
struct Asset {
    name: String,
    model: usize,
    states: usize,
    /// States out of sample; 0 where there is none, or where assets differ.
    known: usize,
    price: Vec<f64>,
    /// Probabilities in thousandths [K−1][points]; −1 where there are none.
    out_of_sample: Vec<Vec<i16>>,
    in_sample: Vec<Vec<i16>>,
    smoothed: Vec<Vec<i16>>,
    /// Mean observed run of each state; null if it never was the most likely.
    observed: Vec<f64>,
}

/// Writes the page. It appears under its name only when it is whole.
/// # Errors
/// `Io` where the file cannot be written.
pub fn write(path: &Path, inputs: &Inputs<'_>) -> Result<()> {
    write_whole(path, &page(inputs)?)
}

/// The page as text.
/// # Errors
/// `Internal` if the data cannot be serialised.
pub fn page(inputs: &Inputs<'_>) -> Result<String> {
    let data = inputs.gathered();
    assembled(TEMPLATE, &format!("forback regimes: {}", data.title), &data, SCRIPT)
}

impl Inputs<'_> {
    fn gathered(&self) -> Page {
        let (prices, first) = (self.prices, self.regimes.first);
        let (bars, n) = (prices.n_bars(), prices.n_assets());
        let most = self.regimes.models.iter().map(|m| m.chosen.states).max().unwrap_or(1);
        // Seven bytes of price, four of each probability.
        let bytes = 7 + 12 * most.saturating_sub(1).max(1);
        let points = (BUDGET / (bytes * n)).clamp(FEWEST_POINTS, MOST_POINTS).min(bars - first);
        let edge = |i: usize| first + i * (bars - first) / points;
        let runs: Vec<Range<usize>> = (0..points).map(|i| edge(i)..edge(i + 1)).collect();
        let assets: Vec<Asset> = (0..n).into_par_iter().map(|asset| self.asset(asset, &runs)).collect();
        let all = (n > 1).then(|| self.all(&assets, &runs, most));
        let time = |t: Option<&i64>| t.map(|t| prices.format_time(*t)).unwrap_or_default();
        let run = &self.found["run"];
        let text = |key: &str| run[key].as_str().map(String::from).unwrap_or_default();
        let features = run["features"].as_array().map(|f| f.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ")).unwrap_or_default();
        let refits = match (run["refit"].as_u64(), run["train"].as_str()) {
            (Some(every), Some(train)) => format!(
                "every {every} bars on {}",
                if let Some(n) = train.strip_prefix("anchored:") { format!("all so far, from {n} on") } else { format!("the last {train}") }
            ),
            _ => "none: everything below knows the future".into(),
        };
        let facts = [
            ("Data", prices.sources.join(", ")),
            ("Dates", format!("{} to {}", time(prices.times.first()), time(prices.times.last()))),
            (
                "Model",
                format!(
                    "{} states, {} on {features}, {}",
                    text("states"),
                    text("emission"),
                    if run["pooled"] == true { "one model for all assets" } else { "a model per asset" }
                ),
            ),
            ("Refits", refits),
            ("Device", text("device")),
        ];
        let mut out_of_sample = self.found["out_of_sample"].clone();
        if let Some(o) = out_of_sample.as_object_mut() {
            o.remove("refits");
        }
        let assets_text = if let [one] = prices.symbols.as_slice() { one.clone() } else { format!("{n} assets") };
        Page {
            title: format!("{assets_text} × {bars} bars"),
            facts: facts.map(|(name, text)| (name.into(), text)).to_vec(),
            provenance: run.clone(),
            models: self.found["models"].clone(),
            names: self.names.clone(),
            out_of_sample,
            missing: self.found["out_of_sample_missing"].clone(),
            time: runs.iter().map(|r| prices.times[r.end - 1]).collect(),
            run: runs.iter().map(Range::len).max().unwrap_or(1),
            assets,
            all,
        }
    }

    fn asset(&self, asset: usize, runs: &[Range<usize>]) -> Asset {
        let model = self.regimes.model_of[asset];
        let states = self.regimes.models[model].chosen.states;
        let smoothed = |bar: usize| self.regimes.smoothed.get(asset, bar);
        Asset {
            name: self.prices.symbols[asset].clone(),
            model,
            states,
            known: self.out_of_sample.map_or(0, |o| Causal::states(&o.filtered, asset)),
            price: runs.iter().map(|r| super::aggregate::short(f64::from(self.prices.close[[r.end - 1, asset]]))).collect(),
            out_of_sample: thousandths(runs, states, &|bar| self.out_of_sample?.filtered.get(asset, bar)),
            in_sample: thousandths(runs, states, &|bar| self.regimes.filtered.get(asset, bar)),
            smoothed: thousandths(runs, states, &smoothed),
            observed: observed(&[(self.regimes.first..self.prices.n_bars()).filter_map(smoothed).map(likeliest).collect()], states),
        }
    }

    /// Means over the assets that have as many states as most; the price is an equal-weight index of log prices.
    fn all(&self, assets: &[Asset], runs: &[Range<usize>], most: usize) -> Asset {
        let alike: Vec<&Asset> = assets.iter().filter(|a| a.states == most).collect();
        let mean = |of: fn(&Asset) -> &Vec<Vec<i16>>| -> Vec<Vec<i16>> {
            let at = |state: usize, i: usize| {
                let there: Vec<f64> = alike.iter().filter_map(|a| of(a).get(state)?.get(i)).filter(|&&p| p >= 0).map(|&p| f64::from(p)).collect();
                if there.is_empty() { -1 } else { (there.iter().sum::<f64>() / there.len() as f64).round() as i16 }
            };
            (0..most.saturating_sub(1)).map(|state| (0..runs.len()).map(|i| at(state, i)).collect()).collect()
        };
        let positive = self.prices.close.iter().all(|p| *p > 0.0);
        let index = |bar: usize| {
            let log = |asset: usize, bar: usize| f64::from(self.prices.close[[bar, asset]]).ln();
            let n = assets.len();
            super::aggregate::short(100.0 * ((0..n).map(|a| log(a, bar) - log(a, self.regimes.first)).sum::<f64>() / n as f64).exp())
        };
        let paths: Vec<Vec<usize>> = assets
            .iter()
            .enumerate()
            .filter(|(_, a)| a.states == most)
            .map(|(asset, _)| (self.regimes.first..self.prices.n_bars()).filter_map(|bar| self.regimes.smoothed.get(asset, bar)).map(likeliest).collect())
            .collect();
        Asset {
            name: format!("all {} assets", assets.len()),
            model: 0,
            states: most,
            known: 0,
            price: if positive { runs.iter().map(|r| index(r.end - 1)).collect() } else { vec![f64::NAN; runs.len()] },
            out_of_sample: mean(|a| &a.out_of_sample),
            in_sample: mean(|a| &a.in_sample),
            smoothed: mean(|a| &a.smoothed),
            observed: observed(&paths, most),
        }
    }
}

fn likeliest(p: ArrayView1<'_, f32>) -> usize {
    (0..p.len()).fold(0, |best, k| if p[k] > p[best] { k } else { best })
}

/// Mean over each run of all states but the last, in thousandths.
fn thousandths<'a>(runs: &[Range<usize>], states: usize, at: &dyn Fn(usize) -> Option<ArrayView1<'a, f32>>) -> Vec<Vec<i16>> {
    let mut all = vec![Vec::with_capacity(runs.len()); states.saturating_sub(1)];
    for run in runs {
        let there: Vec<ArrayView1<'_, f32>> = run.clone().filter_map(at).filter(|p| p.len() == states).collect();
        for (state, list) in all.iter_mut().enumerate() {
            let mean = there.iter().map(|p| f64::from(p[state])).sum::<f64>() / there.len().max(1) as f64;
            list.push(if there.is_empty() { -1 } else { (1000.0 * mean).round() as i16 });
        }
    }
    all
}

/// Mean length of the runs of each state in some paths.
fn observed(paths: &[Vec<usize>], states: usize) -> Vec<f64> {
    let (mut bars, mut runs) = (vec![0usize; states], vec![0usize; states]);
    for path in paths {
        for (i, &state) in path.iter().enumerate() {
            bars[state] += 1;
            runs[state] += usize::from(i == 0 || path[i - 1] != state);
        }
    }
    bars.iter().zip(runs).map(|(&b, r)| if r == 0 { f64::NAN } else { super::aggregate::short(b as f64 / r as f64) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array2;

    #[test]
    fn runs_are_counted_with_their_ends() {
        let lengths = observed(&[vec![0, 0, 1, 0, 0, 0], vec![1, 1, 1, 1]], 3);
        assert_eq!(lengths[..2], [2.5, 2.5]);
        assert!(lengths[2].is_nan());
    }

    #[test]
    fn probabilities_are_means_of_runs_in_thousandths() {
        let table = Array2::from_shape_fn((4, 3), |(bar, state)| [[0.2f32, 0.3, 0.5], [0.4, 0.1, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]][bar][state]);
        let got = thousandths(&[0..2, 2..3, 3..4], 3, &|bar| (bar < 3).then(|| table.row(bar)));
        assert_eq!(got, [[300, 1000, -1], [200, 0, -1]]);
    }
}
