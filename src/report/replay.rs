//! What the charts need beyond the results of a sweep: train and test Sharpe ratios of a sample of sets, and the best set's returns.
//! Both come from the same op as the sweep, over a subset of its columns.

use super::Inputs;
use super::aggregate::{Fit, evenly, short};
use crate::kernels::backtest_sweep::{Chunk, Outcome, Strategy, Sweep};
use crate::sim::sweep::{OutOfSample, SweepRun};
use crate::{Error, Result};
use serde::Serialize;

/// Most sets, and most choices, of the scatter charts.
pub const MOST_SAMPLED: usize = 2000;
/// Set-asset-windows that the sample may cost, and the least sets of a sample.
const SCORES: usize = 20_000_000;
const FEWEST_SAMPLED: usize = 100;

/// In-sample against out-of-sample Sharpe ratios, annualised, at the first cost.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainTest {
    /// Number of all sets.
    pub of: usize,
    /// Sampled sets: evenly spaced in the grid.
    pub set: Vec<u64>,
    /// Mean over windows and assets of each one's train Sharpe ratio.
    pub train: Vec<f64>,
    /// The same over the test parts.
    pub test: Vec<f64>,
    /// How test goes with train.
    pub fit: Fit,
    /// The sets that each selection chose.
    pub chosen: Vec<ChosenScores>,
}

/// Train and test Sharpe ratio of chosen sets, in the window that they were chosen for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChosenScores {
    /// `per_asset` or `pooled` (then means over assets).
    pub selection: &'static str,
    /// Number of choices, windows × assets.
    pub of: usize,
    /// Window of each point.
    pub window: Vec<u32>,
    /// Asset of each point; -1 for all.
    pub asset: Vec<i64>,
    /// Set of each point.
    pub set: Vec<u64>,
    /// Sharpe ratio over the train part.
    pub train: Vec<f64>,
    /// Sharpe ratio over the test part.
    pub test: Vec<f64>,
    /// How test goes with train.
    pub fit: Fit,
}

/// Mean of the defined values.
#[derive(Clone, Copy, Default)]
struct Mean {
    sum: f64,
    n: u32,
}

impl Mean {
    fn add(&mut self, x: f64) {
        if x.is_finite() {
            self.sum += x;
            self.n += 1;
        }
    }

    fn get(self) -> f64 {
        if self.n == 0 { f64::NAN } else { short(self.sum / f64::from(self.n)) }
    }
}

/// Train and test means of a point.
type Point = [Mean; 2];

/// A choice to be scored: where its point is, in which window, on which asset (`None`: all).
struct Wanted {
    selection: usize,
    point: usize,
    window: usize,
    asset: Option<usize>,
}

/// Runs a sample of at most MOST_SAMPLED sets and the sets that were chosen; `None` without a walk-forward.
pub(super) fn train_test(inputs: &Inputs<'_>) -> Result<Option<TrainTest>> {
    let report = inputs.report;
    let (windows, assets) = (report.windows.len(), report.assets);
    // The op knows no gates.
    let Some(level) = report.costs.first().filter(|_| windows > 0 && inputs.config.regimes.is_none()) else { return Ok(None) };
    let most = (SCORES / (windows * assets).max(1)).clamp(FEWEST_SAMPLED, MOST_SAMPLED);
    let sampled: Vec<u32> = evenly(report.sets.len(), most).into_iter().map(|s| s as u32).collect();
    let selections: Vec<(&'static str, &OutOfSample)> =
        [("per_asset", &level.per_asset), ("pooled", &level.pooled)].into_iter().filter_map(|(name, o)| o.as_ref().map(|o| (name, o))).collect();
    let points: Vec<Vec<usize>> = selections.iter().map(|(_, o)| evenly(o.best.len(), most)).collect();

    let mut sets = sampled.clone();
    sets.extend(selections.iter().zip(&points).flat_map(|((_, o), points)| points.iter().map(|&i| o.best[i])).filter(|&s| (s as usize) < report.sets.len()));
    sets.sort_unstable();
    sets.dedup();
    let mut wanted: Vec<Vec<Wanted>> = sets.iter().map(|_| Vec::new()).collect();
    for (selection, ((name, o), points)) in selections.iter().zip(&points).enumerate() {
        for (point, &i) in points.iter().enumerate() {
            if let Ok(at) = sets.binary_search(&o.best[i]) {
                wanted[at].push(Wanted { selection, point, window: i % windows, asset: (*name == "per_asset").then_some(i / windows) });
            }
        }
    }

    let mut means = vec![Point::default(); sets.len()];
    let mut chosen: Vec<Vec<Point>> = points.iter().map(|p| vec![Point::default(); p.len()]).collect();
    run(inputs, &sets, &report.windows, &[level.cost_bps], true, &mut |chunk| {
        for set in chunk.sets.clone() {
            for asset in chunk.assets.clone() {
                for window in 0..windows {
                    add(&mut means[set], chunk.scores(set, asset, window));
                }
                for w in wanted[set].iter().filter(|w| w.asset.is_none_or(|a| a == asset)) {
                    add(&mut chosen[w.selection][w.point], chunk.scores(set, asset, w.window));
                }
            }
        }
        Ok(())
    })?;

    let of = |set: &u32, part: usize| sets.binary_search(set).map_or(f64::NAN, |at| means[at][part].get());
    let train: Vec<f64> = sampled.iter().map(|s| of(s, 0)).collect();
    let test: Vec<f64> = sampled.iter().map(|s| of(s, 1)).collect();
    let chosen = selections.iter().zip(&points).zip(&chosen).map(|((&(selection, o), points), means)| {
        let part = |k: usize| means.iter().map(|m| m[k].get()).collect::<Vec<f64>>();
        let (train, test) = (part(0), part(1));
        ChosenScores {
            selection,
            of: o.best.len(),
            window: points.iter().map(|i| (i % windows) as u32).collect(),
            asset: points.iter().map(|i| if selection == "per_asset" { (i / windows) as i64 } else { -1 }).collect(),
            set: points.iter().map(|&i| report.id(o.best[i] as usize)).collect(),
            fit: Fit::of(&train, &test),
            train,
            test,
        }
    });
    Ok(Some(TrainTest {
        of: report.sets.len(),
        fit: Fit::of(&train, &test),
        set: sampled.iter().map(|&s| report.id(s as usize)).collect(),
        train,
        test,
        chosen: chosen.collect(),
    }))
}

fn add(point: &mut Point, (train, test): (f64, f64)) {
    point[0].add(train);
    point[1].add(test);
}

/// Returns of one set over all counted bars, mean over assets, at each cost.
pub(super) fn of_one_set(inputs: &Inputs<'_>, set: usize) -> Result<Vec<Vec<f32>>> {
    let report = inputs.report;
    if inputs.config.regimes.is_some() {
        return of_one_gated_set(inputs, set);
    }
    let returns = report.bars.saturating_sub(1) as u32;
    let whole = [[report.start, returns, report.start, returns]];
    let outcome = run(inputs, &[set as u32], &whole, &inputs.config.cost_bps, false, &mut |_| Ok(()))?;
    let bars = outcome.stitched_bars.len();
    let mean =
        |series: &[f32]| (0..bars).map(|k| (series.iter().skip(k).step_by(bars).map(|&x| f64::from(x)).sum::<f64>() / report.assets as f64) as f32).collect();
    Ok(outcome.per_asset.iter().map(|selected| mean(&selected.stitched)).collect())
}

/// The same behind gates.
fn of_one_gated_set(inputs: &Inputs<'_>, set: usize) -> Result<Vec<Vec<f32>>> {
    let run = SweepRun::new(inputs.device, inputs.prices.close.view(), inputs.config)?;
    let run = match &inputs.prices.open {
        Some(open) => run.with_open(open.view()),
        None => run,
    };
    (0..inputs.config.cost_bps.len()).map(|cost| run.portfolios(cost, &[set])).collect()
}

/// The op over some of the sweep's sets.
fn run(
    inputs: &Inputs<'_>,
    sets: &[u32],
    windows: &[[u32; 4]],
    cost_bps: &[f64],
    scores: bool,
    visit: &mut dyn FnMut(&Chunk) -> Result<()>,
) -> Result<Outcome> {
    let (report, config) = (inputs.report, inputs.config);
    let close = inputs.prices.close.as_standard_layout();
    let close = close.as_slice().ok_or_else(|| Error::Internal("a standard layout is contiguous".into()))?;
    let open = inputs.prices.open.as_ref().map(|open| open.as_standard_layout());
    let parameters: Vec<(&str, &[f32])> = report.sets.names.iter().copied().zip(report.sets.columns.iter().map(Vec::as_slice)).collect();
    let sweep = Sweep {
        close,
        open: open.as_ref().and_then(|open| open.as_slice()),
        assets: report.assets,
        strategy: Strategy::named(report.sets.strategy.name)?,
        parameters: &parameters,
        only: Some(sets),
        cost_bps,
        execution: config.execution,
        start: report.start,
        periods_per_year: config.periods_per_year,
        windows,
        stitch_ends: None,
        per_asset: !scores,
        pooled: false,
        scores,
        profile: false,
    };
    sweep.run(inputs.device, visit)
}
