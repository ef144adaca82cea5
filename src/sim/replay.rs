//! What one set did: every trade, and the equity bar by bar.
//!
//! A trade lasts from the close at which a position is opened to the close at which it is gone or has changed sides; resizing in between
//! belongs to it. With own trading d_j (|w| at entry, |w_j − w_{j−1}| while it lasts, |w| at exit):
//! ```text
//! net return = Π (1 + w_j·r_j − cost·d_j) · (1 − cost·|w at exit|) − 1          cost = Σ cost·d_j
//! ```
//! A bar that turns from long to short pays the two halves of its cost to the two trades, so the costs of all trades add up to cost × turnover,
//! and their net returns compound to the total return up to the product of the two halves.
//!
//! Shapes   net, weight [N,T−1] on the return index: return j is bar j → j+1.

use super::parts::Row;
use super::sweep::SweepRun;
use crate::{Error, Result};
use ndarray::Array2;

/// One position from its opening to its end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Trade {
    /// Asset.
    pub asset: usize,
    /// Bar at whose close it was opened.
    pub entry: usize,
    /// Bar at whose close it ended; the last bar if it is still open.
    pub exit: usize,
    /// Still open at the last bar: no closing trade, no closing cost.
    pub open: bool,
    /// Weight at entry; negative is short.
    pub weight: f64,
    /// Close at entry.
    pub entry_price: f64,
    /// Close at exit.
    pub exit_price: f64,
    /// Compounded net return on the equity.
    pub net_return: f64,
    /// What its trading cost, as a share of the equity.
    pub cost: f64,
}

impl Trade {
    /// Bars that it lasted.
    pub fn bars(&self) -> usize {
        self.exit - self.entry
    }
}

/// One set at one cost on all assets.
#[derive(Debug, Clone)]
pub struct SetReplay {
    /// Number of the set in the grid.
    pub id: u64,
    /// Names and values of its parameters.
    pub parameters: Vec<(&'static str, f32)>,
    /// One-way cost in basis points.
    pub cost_bps: f64,
    /// Statistics per asset [N]: those of the sweep.
    pub stats: Vec<Row>,
    /// First counted return.
    pub start: usize,
    /// Net returns [N,T−1].
    pub net: Array2<f32>,
    /// Weights held [N,T−1].
    pub weight: Array2<f32>,
    /// Every trade, assets in order, then in time.
    pub trades: Vec<Trade>,
}

impl SetReplay {
    /// Equity of an asset after each return [T−1]; it starts at 1.
    pub fn equity(&self, asset: usize) -> Vec<f64> {
        let mut equity = 1.0;
        let grow = |&net: &f32| {
            equity *= 1.0 + f64::from(net);
            equity
        };
        self.net.row(asset).iter().map(grow).collect()
    }
}

impl SweepRun<'_> {
    /// Replays the set at a position, for each cost.
    ///
    /// # Errors
    /// As the sweep.
    pub fn replay(&self, position: usize) -> Result<Vec<SetReplay>> {
        let (assets, rows) = (self.assets(), self.rows_of(position)?);
        let shape = |values: Vec<f32>| {
            let bars = values.len() / assets.max(1);
            Array2::from_shape_vec((assets, bars), values).map_err(|e| Error::Internal(e.to_string()))
        };
        let costs = self.config().cost_bps.iter().zip(rows.chunks(assets.max(1)));
        let replays = self.replayed(position)?.into_iter().zip(costs).map(|(replay, (&cost_bps, stats))| {
            let (net, weight) = (shape(replay.net)?, shape(replay.weight)?);
            let trades = (0..assets).flat_map(|asset| trades(self.close(), assets, asset, &weight, cost_bps * 1e-4)).collect();
            let (id, parameters, start) = (self.id(position), self.set(position), self.start() as usize);
            Ok(SetReplay { id, parameters, cost_bps, stats: stats.to_vec(), start, net, weight, trades })
        });
        replays.collect()
    }
}

/// Trades of one asset from the weights that it was held with.
fn trades(close: &[f32], assets: usize, asset: usize, weight: &Array2<f32>, cost: f64) -> Vec<Trade> {
    let price = |bar: usize| f64::from(close[bar * assets + asset]);
    let weights = weight.row(asset);
    let mut trades = Vec::new();
    // The trade that is on, its growth and the weight before.
    let mut on: Option<(Trade, f64, f64)> = None;
    for (j, w) in weights.iter().map(|&w| f64::from(w)).enumerate() {
        if let Some((trade, growth, before)) = on.filter(|(_, _, before)| w == 0.0 || (w < 0.0) != (*before < 0.0)) {
            let paid = cost * before.abs();
            trades.push(Trade { exit: j, open: false, exit_price: price(j), net_return: growth * (1.0 - paid) - 1.0, cost: trade.cost + paid, ..trade });
            on = None;
        }
        if w == 0.0 {
            continue;
        }
        let (mut trade, growth, before) = on.unwrap_or_else(|| {
            let opened = Trade { asset, entry: j, exit: j, open: true, weight: w, entry_price: price(j), exit_price: price(j), net_return: 0.0, cost: 0.0 };
            (opened, 1.0, 0.0)
        });
        let paid = cost * (w - before).abs();
        trade.cost += paid;
        on = Some((trade, growth * (1.0 + w * (price(j + 1) / price(j) - 1.0) - paid), w));
    }
    let last = weights.len();
    trades.extend(on.map(|(trade, growth, _)| Trade { exit: last, exit_price: price(last), net_return: growth - 1.0, ..trade }));
    trades
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn trades_by_hand() {
        // Two assets; the second: long 1, resized to 2, turned to −1, flat, long to the end.
        let close = [1.0, 100.0, 1.0, 110.0, 1.0, 99.0, 1.0, 90.0, 1.0, 80.0, 1.0, 88.0];
        let weight = Array2::from_shape_vec((2, 5), vec![0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0, -1.0, 0.0, 0.5]).unwrap();
        assert!(trades(&close, 2, 0, &weight, 0.01).is_empty());
        let got = trades(&close, 2, 1, &weight, 0.01);
        let spans: Vec<_> = got.iter().map(|t| (t.entry, t.exit, t.open, t.weight, t.bars())).collect();
        assert_eq!(spans, [(0, 2, false, 1.0, 2), (2, 3, false, -1.0, 1), (4, 5, true, 0.5, 1)]);
        let near = |got: f64, want: f64| assert!((got - want).abs() < 1e-12, "{got}, {want}");
        near(got[0].net_return, (1.0 + 0.1 - 0.01) * (1.0 - 0.2 - 0.01) * (1.0 - 0.02) - 1.0);
        near(got[1].net_return, (1.0 + 9.0 / 99.0 - 0.01) * (1.0 - 0.01) - 1.0);
        near(got[2].net_return, 0.5 * 0.1 - 0.005);
        // Turnover: 1 + 1 + 3 + 1 + 0.5.
        near(got.iter().map(|t| t.cost).sum(), 0.01 * 6.5);
        assert_eq!((got[0].entry_price, got[0].exit_price, got[2].exit_price), (100.0, 99.0, 88.0));
    }
}
