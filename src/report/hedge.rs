//! The page of `forback hedge`: distributions of profit and loss, cost against risk with its frontier, theory beside simulation, one path step
//! by step, and the table.
//!
//! Shapes    a distribution is cut where a thousandth of the paths is left on either side and drawn in at most `MOST_BARS` bars; what was
//!           cut is counted.
//! Walks     a path has at most `MOST_POINTS` points, every k-th step; trades, costs and P&L of the steps between are added up.

use super::{assembled, write_whole};
use crate::Result;
use crate::sim::hedge::{Explained, Histogram, StepRow};
use serde::Serialize;
use serde_json::Value;
use std::path::Path;

const TEMPLATE: &str = include_str!("hedge.html");
const SCRIPT: &str = include_str!("hedge.js");

/// Most bars of a distribution.
const MOST_BARS: usize = 96;
/// Most points of a path.
const MOST_POINTS: usize = 1000;
/// Share of the paths that is left out on each side of a distribution.
const CUT: f64 = 0.001;

/// Everything that the page shows.
#[derive(Debug, Clone, Serialize)]
pub struct Page {
    /// Heading.
    pub title: String,
    /// Names and texts below it.
    pub facts: Vec<(String, String)>,
    /// What to make of it, a sentence each.
    pub verdict: Vec<String>,
    /// Digits after the point of an amount of money.
    pub digits: usize,
    /// Share of the worst paths that VaR and CVaR are about.
    pub alpha: f64,
    /// Name of the risk that the page opens with: sd, cvar, var or entropic.
    pub risk: String,
    /// Set-ups that may be compared: one market, option and level of costs.
    pub groups: Vec<Group>,
    /// Set-ups.
    pub rows: Vec<Row>,
    /// Number of the path that is explained.
    pub path: u64,
    /// That path under some set-ups.
    pub walks: Vec<Walk>,
    /// How the results were made: an object of names and values.
    pub provenance: Value,
}

/// Rows of one market, option and level of costs.
#[derive(Debug, Clone, Serialize)]
pub struct Group {
    /// What they share.
    pub name: String,
    /// Positions in [`Page::rows`].
    pub rows: Vec<usize>,
    /// Those of the frontier for each risk (sd, cvar, var, entropic), cheapest first.
    pub frontier: Vec<Vec<usize>>,
}

/// A set-up; money is currency per option at expiry.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Its number.
    pub number: usize,
    /// Policy with parameter and interval.
    pub name: String,
    /// Policy alone.
    pub policy: String,
    /// Policy with parameter.
    pub label: String,
    /// Steps between decisions.
    pub rebalance: u32,
    /// One-way cost.
    pub cost_bps: f64,
    /// Volatility of its deltas.
    pub hedge_volatility: f64,
    /// What was received (short) or paid (long) at the start.
    pub premium: f64,
    /// Mean and standard error.
    pub mean: [f64; 2],
    /// sd, CVaR, VaR, entropic.
    pub risks: [f64; 4],
    /// Their standard errors.
    pub errors: [f64; 4],
    /// Skewness.
    pub skew: f64,
    /// Mean cost and standard error.
    pub cost: [f64; 2],
    /// Traded notional over the spot at the start.
    pub turnover: f64,
    /// Premium at which the entropic risk is zero.
    pub indifference: f64,
    /// Derman-Kamal's sd and Leland's cost; null where they do not apply.
    pub theory: [f64; 2],
    /// Distribution of profit and loss.
    pub histogram: Shape,
}

/// A distribution in bars of one width.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shape {
    /// Lower edge of the first bar.
    pub low: f64,
    /// Width of a bar.
    pub width: f64,
    /// Paths of each bar.
    pub counts: Vec<u64>,
    /// Paths below the first bar and above the last.
    pub outside: [u64; 2],
}

impl Shape {
    /// The middle of a finer histogram.
    pub fn of(histogram: &Histogram) -> Shape {
        let (counts, n) = (&histogram.counts, histogram.counts.len());
        let width = (histogram.high - histogram.low) / n.max(1) as f64;
        let total: u64 = counts.iter().sum();
        let most = (CUT * total as f64) as u64;
        let cut = |order: &mut dyn Iterator<Item = &u64>| {
            let (mut left, mut bins) = (0u64, 0);
            for &count in order {
                if left + count > most {
                    break;
                }
                left += count;
                bins += 1;
            }
            (left, bins)
        };
        let (below, from) = cut(&mut counts.iter());
        let (above, until) = if from == n { (0, 0) } else { cut(&mut counts.iter().rev()) };
        let kept = counts.get(from..n - until).unwrap_or_default();
        let together = kept.len().div_ceil(MOST_BARS).max(1);
        Shape {
            low: histogram.low + width * from as f64,
            width: width * together as f64,
            counts: kept.chunks(together).map(|bins| bins.iter().sum()).collect(),
            outside: [below, above],
        }
    }
}

/// A path under a set-up; each list has a value per point.
#[derive(Debug, Clone, Serialize)]
pub struct Walk {
    /// Position of its row.
    pub row: usize,
    /// What the option pays.
    pub payoff: f64,
    /// Profit and loss at expiry.
    pub pnl: f64,
    /// Cost of all trades.
    pub cost: f64,
    /// Trades.
    pub trades: usize,
    /// Steps between two points.
    pub every: usize,
    /// Step.
    pub step: Vec<u32>,
    /// Years since the start.
    pub time: Vec<f64>,
    /// Price.
    pub spot: Vec<f64>,
    /// Delta of the hedger at it.
    pub delta: Vec<f64>,
    /// Units held after trading.
    pub holding: Vec<f64>,
    /// Units traded since the point before.
    pub trade: Vec<f64>,
    /// Cost of all trades so far.
    pub paid: Vec<f64>,
    /// Profit and loss so far, the option at its value.
    pub so_far: Vec<f64>,
}

/// Six digits, so that the page stays small.
fn short(x: f64) -> f64 {
    if x.is_finite() { format!("{x:.5e}").parse().unwrap_or(x) } else { x }
}

impl Walk {
    /// The points of `told`, for row `row`.
    pub fn of(row: usize, told: &Explained) -> Walk {
        let steps = &told.steps;
        let every = steps.len().div_ceil(MOST_POINTS).max(1);
        // The first step, then the last of every run.
        let mut ends: Vec<usize> = (0..steps.len()).step_by(every).collect();
        if ends.last().is_some_and(|&last| last + 1 < steps.len()) {
            ends.push(steps.len() - 1);
        }
        let starts = std::iter::once(0).chain(ends.iter().map(|e| e + 1));
        let runs: Vec<&[StepRow]> = starts.zip(&ends).map(|(from, &to)| &steps[from..=to]).collect();
        let paid = steps.iter().scan(0.0, |sum, s| {
            *sum += s.cost;
            Some(*sum)
        });
        let paid: Vec<f64> = paid.collect();
        let at = |f: &dyn Fn(&StepRow) -> f64| ends.iter().map(|&e| short(f(&steps[e]))).collect::<Vec<f64>>();
        Walk {
            row,
            payoff: told.payoff,
            pnl: told.pnl,
            cost: told.cost,
            trades: steps.iter().filter(|s| s.trade != 0.0 || s.option_trade != 0.0).count(),
            every,
            step: ends.iter().map(|&e| steps[e].step).collect(),
            time: at(&|s| s.time),
            spot: at(&|s| s.spot),
            delta: at(&|s| s.delta),
            holding: at(&|s| s.holding),
            trade: runs.iter().map(|run| short(run.iter().map(|s| s.trade).sum())).collect(),
            paid: ends.iter().map(|&e| short(paid[e])).collect(),
            so_far: at(&|s| s.pnl),
        }
    }
}

/// Writes the page. It appears under its name only when it is whole.
/// # Errors
/// `Io` where the file cannot be written.
pub fn write(path: &Path, page: &Page) -> Result<()> {
    write_whole(path, &assembled(TEMPLATE, &format!("forback hedge: {}", page.title), page, SCRIPT)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_keeps_every_path() {
        let mut counts = vec![0u64; 512];
        counts[0] = 1;
        (100..400).for_each(|b| counts[b] = 100);
        counts[511] = 2;
        let shape = Shape::of(&Histogram { low: -10.0, high: 41.2, counts });
        assert_eq!(shape.outside, [1, 2]);
        assert_eq!(shape.counts.iter().sum::<u64>(), 30_000);
        assert!(shape.counts.len() <= MOST_BARS && (shape.low - 0.0).abs() < 1e-9 && (shape.width - 0.4).abs() < 1e-9, "{shape:?}");
        let one = Shape::of(&Histogram { low: 1.0, high: 1.0, counts: vec![5] });
        assert_eq!((one.counts, one.outside), (vec![5], [0, 0]));
    }

    #[test]
    fn a_long_walk_is_thinned_without_losing_a_trade() {
        let step = |i: u32| StepRow {
            step: i,
            time: f64::from(i),
            spot: 100.0,
            delta: 0.5,
            gamma: 0.0,
            holding: 0.01 * f64::from(i),
            trade: 0.01,
            cost: 0.001,
            cash: 0.0,
            pnl: 0.0,
            hedge_price: 0.0,
            option_holding: 0.0,
            option_trade: 0.0,
        };
        let walk = Walk::of(3, &Explained { steps: (0..5003).map(step).collect(), payoff: 0.0, pnl: 1.0, cost: 5.003 });
        assert!(walk.step.len() <= MOST_POINTS + 1 && walk.every == 6, "{} points", walk.step.len());
        assert_eq!((walk.step.first(), walk.step.last(), walk.trades), (Some(&0), Some(&5002), 5003));
        assert!((walk.trade.iter().sum::<f64>() - 50.03).abs() < 1e-6 && (walk.paid[walk.paid.len() - 1] - 5.003).abs() < 1e-6);
    }
}
