//! Strategies that trade only in some regimes: gates on the weights of a sweep, and back-tests of gated weights.
//!
//! The gate of an asset at bar t is open where the probability of the chosen states, known at the close of t, exceeds a threshold. The weight
//! decided at bar t is multiplied by it: with `same_close` and `next_open` return j is gated at bar j, with `next_close` at bar j − 1. The
//! strategy itself, with its stops, runs on behind a closed gate. A threshold is a parameter like any other ([`PARAMETER`]): every set runs at
//! every threshold, and a walk-forward chooses among them in sample. Threshold 0 never closes.
//!
//! Only [`Causal`] probabilities are taken, so that a change of prices after bar t changes no gate up to t.
//!
//! Flow     positions of the sets on the device (`backtest_stitch`) → gates and net returns on the host, in f64 → statistics per set, keys
//!          per window → choices → stitched series → performance on the device. Weights leave the device, so this is many times slower
//!          than a sweep without gates, whose statistics are made where the positions are.
//! Keys     a ratio's key is its f32 in order, so that the largest ratio wins and then the lowest index, as in the sweep.

use super::parts::Row;
use crate::kernels::backtest_sweep::{Execution, Selected};
use crate::kernels::performance::Performance;
use crate::regimes::Causal;
use crate::{Error, Result};
use rayon::prelude::*;

/// Name of the threshold among the parameters of a set.
pub const PARAMETER: &str = "regime_above";

/// When which asset may be traded.
#[derive(Debug, Clone, PartialEq)]
pub struct Gates {
    assets: usize,
    bars: usize,
    /// Probability of the chosen states [T,N]; NaN where there is none yet.
    probability: Vec<f32>,
    thresholds: Vec<f32>,
    first: usize,
}

impl Gates {
    /// Gates that open where the chosen states are together more likely than a threshold; one gate per threshold.
    ///
    /// # Errors
    /// `Parameter` for a state that is not there, a threshold outside [0, 1) or given twice, or an asset without any probability.
    ///
    /// Smoothed probabilities do not get in:
    /// ```compile_fail
    /// fn gate(smoothed: &forback::regimes::SmoothedProbabilities) -> forback::Result<forback::sim::regime_filter::Gates> {
    ///     forback::sim::regime_filter::Gates::new(smoothed, &[0], &[0.5])
    /// }
    /// ```
    /// filtered ones do:
    /// ```
    /// fn gate(filtered: &forback::regimes::FilteredProbabilities) -> forback::Result<forback::sim::regime_filter::Gates> {
    ///     forback::sim::regime_filter::Gates::new(filtered, &[0], &[0.5])
    /// }
    /// ```
    pub fn new(known: &impl Causal, states: &[usize], thresholds: &[f32]) -> Result<Gates> {
        let (assets, bars) = (known.assets(), known.bars());
        let bad = |name: &str, value: String, help: String| Err(Error::Parameter { op: "regime_filter", name: name.into(), value, help });
        if states.is_empty() || thresholds.is_empty() {
            return bad("states, thresholds", "none".into(), "name at least one state and one threshold".into());
        }
        for asset in 0..assets {
            let k = known.states(asset);
            if let Some(state) = states.iter().find(|&&s| s >= k) {
                return bad("state", state.to_string(), format!("the model has {k} states, 0 (calmest) to {}", k.saturating_sub(1)));
            }
        }
        for (i, &p) in thresholds.iter().enumerate() {
            if !(0.0..1.0).contains(&p) || thresholds[..i].contains(&p) {
                return bad("threshold", p.to_string(), "give probabilities from 0 (always open) to below 1, each once".into());
            }
        }
        let mut probability = vec![f32::NAN; bars * assets];
        let mut first = 0;
        for asset in 0..assets {
            let mut from = None;
            for bar in 0..bars {
                if let Some(p) = known.known_at(asset, bar) {
                    let mut distinct = states.to_vec();
                    distinct.sort_unstable();
                    distinct.dedup();
                    probability[bar * assets + asset] = distinct.iter().map(|&s| p[s]).sum();
                    from = from.or(Some(bar));
                }
            }
            let Some(from) = from else { return bad("probabilities", format!("none of asset {asset}"), "use more bars, or an earlier refit".into()) };
            first = first.max(from);
        }
        Ok(Gates { assets, bars, probability, thresholds: thresholds.to_vec(), first })
    }

    /// Assets N and bars T.
    pub fn dim(&self) -> (usize, usize) {
        (self.assets, self.bars)
    }

    /// Thresholds, one gate each.
    pub fn thresholds(&self) -> &[f32] {
        &self.thresholds
    }

    /// First bar on which every asset has a probability.
    pub fn first_bar(&self) -> usize {
        self.first
    }

    /// Whether a decision at the close of a bar may be traded.
    pub fn is_open(&self, threshold: f32, asset: usize, bar: usize) -> bool {
        let p = self.probability[bar * self.assets + asset];
        if threshold == 0.0 { !p.is_nan() } else { p > threshold }
    }

    /// Share of the asset-bars from [`Gates::first_bar`] on that a threshold leaves open.
    pub fn share(&self, threshold: f32) -> f64 {
        let cells = || (self.first..self.bars).flat_map(|bar| (0..self.assets).map(move |asset| (asset, bar)));
        cells().filter(|&(asset, bar)| self.is_open(threshold, asset, bar)).count() as f64 / cells().count().max(1) as f64
    }

    /// Multiplies the weights [T−1] of an asset by its gate.
    pub(super) fn close(&self, threshold: f32, asset: usize, lag: usize, weights: &mut [f32]) {
        for (j, w) in weights.iter_mut().enumerate() {
            if j < lag || !self.is_open(threshold, asset, j - lag) {
                *w = 0.0;
            }
        }
    }
}

/// Bars between decision and trade on the return index.
pub(super) fn lag(execution: Execution) -> usize {
    usize::from(execution == Execution::NextClose)
}

/// Net return of every bar and what was traded for it: w·r − cost·|Δw|.
pub(super) fn net(weights: &[f32], returns: &[f32], cost: f64) -> Vec<f32> {
    let mut before = 0.0f64;
    let net = weights.iter().zip(returns).map(|(&w, &r)| {
        let w = f64::from(w);
        let net = w * f64::from(r) - cost * (w - before).abs();
        before = w;
        net as f32
    });
    net.collect()
}

/// One set on one asset at one cost.
#[derive(Debug, Clone)]
pub(super) struct Scored {
    pub(super) row: Row,
    /// Count, sum and sum of squares of the net returns of each window's train part [W].
    pub(super) train: Vec<Moments>,
}

/// Count, sum and sum of squares.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Moments {
    n: f64,
    sum: f64,
    square: f64,
}

impl Moments {
    pub(super) fn of(net: &[f32]) -> Moments {
        let add = |m: Moments, &x: &f32| Moments { n: m.n + 1.0, sum: m.sum + f64::from(x), square: m.square + f64::from(x) * f64::from(x) };
        net.iter().fold(Moments::default(), add)
    }

    pub(super) fn and(self, other: Moments) -> Moments {
        Moments { n: self.n + other.n, sum: self.sum + other.sum, square: self.square + other.square }
    }

    /// Sharpe ratio per bar; NaN where it is not defined.
    pub(super) fn sharpe(self) -> f64 {
        let spread = self.square - self.sum * self.sum / self.n;
        // Equal returns leave rounding alone.
        if self.n < 2.0 || spread <= 1e-12 * self.square { f64::NAN } else { self.sum / self.n / (spread / (self.n - 1.0)).sqrt() }
    }
}

/// Larger ratios have larger keys; 0 is undefined.
pub(super) fn key(sharpe: f64) -> u32 {
    let bits = (sharpe as f32).to_bits();
    match sharpe.is_nan() {
        true => 0,
        false if bits >> 31 == 1 => !bits,
        false => bits | 1 << 31,
    }
}

/// Statistics of the bars from `start` on, and moments of the windows' train parts.
pub(super) fn score(weights: &[f32], net: &[f32], start: usize, windows: &[[u32; 4]], periods_per_year: f64) -> Scored {
    let (mut equity, mut peak, mut drawdown) = (1.0f64, 1.0f64, 0.0f64);
    for &x in &net[start.min(net.len())..] {
        equity *= 1.0 + f64::from(x);
        peak = peak.max(equity);
        drawdown = drawdown.max(1.0 - equity / peak);
    }
    let (turnover, trades) = activity(weights, start..weights.len());
    let row = Row {
        sharpe: (Moments::of(&net[start.min(net.len())..]).sharpe() * periods_per_year.sqrt()) as f32,
        total_return: (equity - 1.0) as f32,
        max_drawdown: drawdown as f32,
        turnover: turnover as f32,
        trades: trades as u32,
    };
    Scored { row, train: windows.iter().map(|w| Moments::of(&net[w[0] as usize..w[1] as usize])).collect() }
}

/// Turnover and trading bars inside a range.
fn activity(weights: &[f32], bars: std::ops::Range<usize>) -> (f64, u64) {
    bars.fold((0.0, 0), |(turnover, trades), j| {
        let before = if j == 0 { 0.0 } else { weights[j - 1] };
        let traded = (f64::from(weights[j]) - f64::from(before)).abs();
        (turnover + traded, trades + u64::from(traded > 0.0))
    })
}

/// Parts of the windows that enter the stitched series: from the test start to the next one.
pub(super) fn stitched(windows: &[[u32; 4]]) -> Vec<std::ops::Range<usize>> {
    let end = |i: usize, w: &[u32; 4]| windows.get(i + 1).map_or(w[3], |next| w[3].min(next[2].max(w[2])));
    windows.iter().enumerate().map(|(i, w)| w[2] as usize..end(i, w) as usize).collect()
}

/// The best key of each column of `keys` [sets][columns], lowest set first: (set, key).
pub(super) fn winners(keys: &[Vec<u32>], columns: usize) -> Vec<(u32, u32)> {
    let best = |c: usize| (0..keys.len()).fold((0, keys[0][c]), |best, s| if keys[s][c] > best.1 { (s as u32, keys[s][c]) } else { best });
    (0..columns).into_par_iter().map(best).collect()
}

/// A selection before its series are stitched: chosen sets and keys.
pub(super) fn selected(winners: Vec<(u32, u32)>) -> Selected {
    let (best, keys) = winners.into_iter().unzip();
    Selected { best, keys, ..Selected::default() }
}

/// Puts the chosen sets' series behind each other: `held(set, asset)` are gated weights and net returns over all bars.
pub(super) fn stitch(selected: &mut Selected, assets: usize, windows: &[[u32; 4]], held: &dyn Fn(u32, usize) -> Result<(Vec<f32>, Vec<f32>)>) -> Result<()> {
    let parts = stitched(windows);
    let per_asset = selected.best.len() > windows.len() || assets == 1;
    for asset in 0..assets {
        // Neighbouring windows often chose the same set.
        let mut last: Option<(u32, Vec<f32>, Vec<f32>)> = None;
        for (w, part) in parts.iter().enumerate() {
            let set = selected.best[if per_asset { asset * windows.len() + w } else { w }];
            if last.as_ref().is_none_or(|(s, ..)| *s != set) {
                let (weights, net) = held(set, asset)?;
                last = Some((set, weights, net));
            }
            let Some((_, weights, net)) = &last else { continue };
            selected.stitched.extend(&net[part.clone()]);
            selected.weights.extend(&weights[part.clone()]);
            let (turnover, trades) = activity(weights, part.clone());
            selected.turnover.push(turnover);
            selected.trades.push(trades);
        }
    }
    Ok(())
}

/// Performance of no bars.
pub(super) fn nothing(assets: usize) -> Vec<Performance> {
    vec![Performance::NONE; assets]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn keys_are_in_the_order_of_ratios() {
        let ratios = [f64::NAN, f64::MIN, -2.0, -1e-9, 0.0, 1e-9, 0.5, 2.0, f64::MAX];
        assert!(ratios.windows(2).all(|p| key(p[0]) < key(p[1])), "{:?}", ratios.map(key));
        assert_eq!(winners(&[vec![3, 7], vec![9, 7], vec![9, 0]], 2), [(1, 9), (0, 7)]);
    }

    #[test]
    fn a_gated_back_test_by_hand() {
        let (weights, returns) = ([0.0f32, 1.0, 1.0, 0.0, -1.0], [0.5f32, 0.1, -0.2, 0.3, 0.1]);
        let net = net(&weights, &returns, 0.01);
        let want = [0.0, 0.1 - 0.01, -0.2, -0.01, -0.1 - 0.01];
        assert!(net.iter().zip(want).all(|(&x, y)| (f64::from(x) - y).abs() < 1e-7), "{net:?}");
        let scored = score(&weights, &net, 1, &[[0, 3, 3, 5]], 4.0);
        let growth: f64 = want[1..].iter().map(|x| 1.0 + x).product();
        assert!((f64::from(scored.row.total_return) - (growth - 1.0)).abs() < 1e-6);
        assert_eq!((scored.row.turnover, scored.row.trades), (3.0, 3));
        assert!((f64::from(scored.row.max_drawdown) - (1.0 - growth / 1.09)).abs() < 1e-6);
        let mean = want[1..].iter().sum::<f64>() / 4.0;
        let sd = (want[1..].iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 3.0).sqrt();
        assert!((f64::from(scored.row.sharpe) - 2.0 * mean / sd).abs() < 1e-5);
        assert_eq!(scored.train, [Moments::of(&net[..3])]);
        assert!(Moments::of(&[0.1, 0.1, 0.1]).sharpe().is_nan() && Moments::of(&[0.1]).sharpe().is_nan());
    }

    #[test]
    fn stitched_parts_end_where_the_next_begins() {
        assert_eq!(stitched(&[[0, 5, 5, 9], [2, 7, 7, 11], [4, 9, 9, 13]]), [5..7, 7..9, 9..13]);
        let mut chosen = selected(vec![(4, 1), (2, 1)]);
        stitch(&mut chosen, 1, &[[0, 1, 1, 3], [1, 3, 3, 4]], &|set, _| Ok((vec![0.0, set as f32, 0.0, 1.0], vec![0.0, 0.1 * set as f32, 0.0, 0.5]))).unwrap();
        assert_eq!(chosen.stitched, [0.4, 0.0, 0.5]);
        assert_eq!((chosen.turnover, chosen.trades), (vec![8.0, 1.0], vec![2, 1]));
    }
}
