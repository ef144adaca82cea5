//! A sweep as plain data for the page: lists of numbers and texts, serialised as they are.
//!
//! Ratios are annualised, returns and drawdowns are shares (0.23 is 23 %), turnover is traded weight per year, times are unix seconds.
//! Undefined numbers are NaN here and `null` in the page.

use super::Inputs;
use super::aggregate::{Axis, Histogram, Surface, evenly, growth, short, surfaces, thinned};
use super::replay::{TrainTest, of_one_set, train_test};
use crate::kernels::performance::{Performance, finish, performance_read};
use crate::sim::sweep::{CostLevel, OutOfSample, RankBy, SetMean};
use crate::{Error, Result};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// Sets in the table of the best, and on the cost ladder.
const BEST: usize = 10;
/// Cost levels that get curves of their own.
const MOST_CURVES: usize = 12;
/// Windows that are shown at most, and assets with choices of their own; more assets are shown as a distribution.
const MOST_WINDOWS: usize = 1000;
const MOST_ASSETS: usize = 50;

/// Everything that the page shows.
#[derive(Debug, Clone, Serialize)]
pub struct ReportData {
    /// Strategy name.
    pub strategy: String,
    /// What the strategy does, in one line.
    pub doc: String,
    /// `4,096 sets × 3 assets × 2,520 bars` and dates.
    pub subtitle: String,
    /// Label and text of each line under the title.
    pub facts: Vec<(String, String)>,
    /// What to make of it, a sentence each.
    pub verdict: Vec<String>,
    /// What sets are ranked by.
    pub rank_by: String,
    /// Cost at which sets are ranked, in basis points.
    pub cost_bps: f64,
    /// Assets.
    pub assets: usize,
    /// Parameter names.
    pub parameters: Vec<String>,
    /// The best sets in sample.
    pub best: Vec<BestSet>,
    /// Grid axes with more than one value.
    pub axes: Vec<Axis>,
    /// Heat-maps of every axis and every pair of axes.
    pub surfaces: Vec<Surface>,
    /// Sharpe ratios of all sets.
    pub sharpe: Histogram,
    /// What luck alone would have found.
    pub luck: Option<Luck>,
    /// In sample against out of sample; none without a walk-forward.
    pub train_test: Option<TrainTest>,
    /// Why there is none, where there should be.
    pub train_test_missing: Option<String>,
    /// Growth of the chosen sets and of buy-and-hold.
    pub curves: Vec<Curve>,
    /// The sets that were chosen in each window.
    pub choices: Vec<Choices>,
    /// Each cost level.
    pub costs: Vec<CostRow>,
    /// How the results were made.
    pub provenance: Value,
}

/// Multiple-testing summary of a sweep; ratios are annualised, NaN where a number was not computed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Luck {
    /// Sharpe ratio of the best set, in sample.
    pub best_sharpe: f64,
    /// Largest Sharpe ratio that luck gives the best of so many sets.
    pub expected_max_sharpe: f64,
    /// Sets that count as trials.
    pub trials: f64,
    /// Probability that the best set's true ratio is above zero, were it the only set.
    pub probabilistic_sharpe: f64,
    /// Probability that it is above what luck gives.
    pub deflated_sharpe: f64,
    /// Probability of back-test overfitting: how often the best set of one half of time ends in the lower half of the sets in the other.
    pub pbo: f64,
    /// Confidence of the intervals and of the track record, such as 0.95.
    pub level: f64,
    /// Interval of the best set's Sharpe ratio, in sample.
    pub in_sample: [f64; 2],
    /// Interval of the stitched out-of-sample Sharpe ratio.
    pub out_of_sample: [f64; 2],
    /// Years of the best set's series.
    pub years: f64,
    /// Years that its ratio needs to be above what luck gives, at `level`.
    pub minimum_years: f64,
}

/// A set of the grid, in sample, means over assets.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BestSet {
    /// Number in the grid.
    pub set: u64,
    /// Its parameters.
    pub values: Vec<f32>,
    /// Sharpe ratio at the first cost.
    pub sharpe: f64,
    /// Compounded return.
    pub total_return: f64,
    /// Largest drawdown.
    pub max_drawdown: f64,
    /// Turnover per year.
    pub turnover: f64,
    /// Trades on all assets.
    pub trades: u64,
}

/// A growth curve and its statistics.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Curve {
    /// `per_asset`, `pooled`, `best_in_sample` or `buy_and_hold`.
    pub kind: &'static str,
    /// Cost in basis points; none for buy-and-hold.
    pub cost_bps: Option<f64>,
    /// Unix seconds of each kept point.
    pub time: Vec<i64>,
    /// Value of 1 invested before the first bar.
    pub equity: Vec<f64>,
    /// Loss from the running peak, positive.
    pub drawdown: Vec<f64>,
    /// Points before thinning.
    pub points: usize,
    /// Statistics over all bars.
    pub total: Total,
}

/// Statistics of a series.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Total {
    /// Sharpe ratio.
    pub sharpe: f64,
    /// Compounded return.
    pub total_return: f64,
    /// Largest drawdown.
    pub max_drawdown: f64,
    /// Sortino ratio against zero.
    pub sortino: f64,
    /// Probability that the true Sharpe ratio is above zero.
    pub probabilistic_sharpe: f64,
    /// Turnover per year; NaN where it is not known.
    pub turnover: f64,
}

impl Total {
    fn of(p: &Performance, turnover: f64) -> Total {
        Total {
            sharpe: p.sharpe,
            total_return: p.total_return,
            max_drawdown: p.max_drawdown,
            sortino: p.sortino,
            probabilistic_sharpe: p.probabilistic_sharpe,
            turnover,
        }
    }
}

/// The sets that a selection chose, at the first cost.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Choices {
    /// `per_asset` or `pooled`.
    pub kind: &'static str,
    /// Number of windows before thinning.
    pub windows: usize,
    /// Unix seconds of the first and last bar of each shown window's test part.
    pub test: Vec<[i64; 2]>,
    /// Parameters of each distinct chosen set.
    pub sets: Vec<Vec<f32>>,
    /// Number in the grid of each distinct chosen set.
    pub set: Vec<u64>,
    /// A line per asset (one for all if pooled): index into `sets` per window. Empty where there are too many assets.
    pub lines: Vec<ChoiceLine>,
    /// 0, 10, 50, 90 and 100 % of the assets' values `[parameter][5][window]`, where there are too many assets for lines.
    pub quantiles: Vec<[Vec<f64>; 5]>,
}

/// Choices of an asset.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ChoiceLine {
    /// Symbol, or `all assets`.
    pub asset: String,
    /// Index into `sets` per window.
    pub at: Vec<usize>,
}

/// What a cost level leaves.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CostRow {
    /// One-way cost in basis points.
    pub cost_bps: f64,
    /// The best set in sample at this cost.
    pub best: Option<BestSet>,
    /// In-sample Sharpe ratios at this cost of the sets in `ReportData::best`.
    pub best_at_first: Vec<f64>,
    /// Chosen per asset, out of sample.
    pub per_asset: Option<Total>,
    /// Chosen for all assets, out of sample.
    pub pooled: Option<Total>,
}

impl ReportData {
    /// Gathers the page's numbers: a pass over the sets per chart, and two small runs of the op (a sample of sets for the scatter charts;
    /// the best set's returns where there is no walk-forward).
    /// # Errors
    /// Device errors. Where the device is too small for the sample, the page says so instead.
    pub fn from_sweep(inputs: &Inputs<'_>) -> Result<ReportData> {
        let Inputs { prices, config, report, .. } = *inputs;
        let level = report.costs.first().ok_or_else(|| Error::Internal("a sweep has a cost level".into()))?;
        let ranked = report.ranked(0, config.rank_by, BEST);
        let statistics = |s: usize| {
            let m = report.set(0, s);
            [m.sharpe, m.total_return, m.max_drawdown, inputs.per_year(m.turnover)]
        };
        let (axes, surfaces) = surfaces(&report.sets.names, &report.sets.columns, &statistics);
        let (train_test, train_test_missing) = match train_test(inputs) {
            Ok(None) if config.regimes.is_some() && !report.windows.is_empty() => (None, Some("sets behind a regime filter are not sampled".into())),
            Ok(found) => (found, None),
            Err(error @ (Error::TooLarge { .. } | Error::Unsupported { .. })) => (None, Some(error.to_string())),
            Err(error) => return Err(error),
        };
        let curves = curves(inputs, ranked.first().copied())?;
        let strategy = report.sets.strategy;
        Ok(ReportData {
            strategy: strategy.name.into(),
            doc: strategy.doc.into(),
            subtitle: subtitle(inputs),
            facts: facts(inputs),
            verdict: if inputs.verdict.is_empty() { verdict(inputs, &curves) } else { inputs.verdict.clone() },
            rank_by: rank_name(config.rank_by).into(),
            cost_bps: level.cost_bps,
            assets: report.assets,
            parameters: report.sets.names.iter().map(|n| (*n).to_string()).collect(),
            best: ranked.iter().map(|&s| inputs.best_set(s, &report.set(0, s))).collect(),
            axes,
            surfaces,
            sharpe: Histogram::of(report.sets.len(), |s| report.set(0, s).sharpe),
            luck: inputs.luck,
            train_test,
            train_test_missing,
            curves,
            choices: [("per_asset", &level.per_asset), ("pooled", &level.pooled)]
                .into_iter()
                .filter_map(|(kind, o)| choices(inputs, kind, o.as_ref()?))
                .collect(),
            costs: costs(inputs, &ranked),
            provenance: provenance(inputs, prices.n_bars()),
        })
    }
}

impl Inputs<'_> {
    /// Turnover per year, from a total over all counted bars.
    fn per_year(&self, turnover: f64) -> f64 {
        let bars = (self.report.bars.saturating_sub(1) as f64 - f64::from(self.report.start)).max(1.0);
        turnover / bars * self.config.periods_per_year
    }

    fn best_set(&self, set: usize, m: &SetMean) -> BestSet {
        BestSet {
            set: self.report.id(set),
            values: self.report.sets.get(set).into_iter().map(|(_, v)| v).collect(),
            sharpe: m.sharpe,
            total_return: m.total_return,
            max_drawdown: m.max_drawdown,
            turnover: self.per_year(m.turnover),
            trades: m.trades,
        }
    }

    /// Time at which return `j` is earned: the close of bar j + 1.
    fn earned(&self, j: u32) -> i64 {
        self.prices.times.get(j as usize + 1).or(self.prices.times.last()).copied().unwrap_or(0)
    }
}

fn rank_name(rank_by: RankBy) -> &'static str {
    match rank_by {
        RankBy::Sharpe => "sharpe",
        RankBy::TotalReturn => "total_return",
        RankBy::MaxDrawdown => "max_drawdown",
        RankBy::Turnover => "turnover",
    }
}

// ---- header -----------------------------------------------------------------------------------------------------------

/// 1234567 as 1,234,567.
fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn subtitle(inputs: &Inputs<'_>) -> String {
    let (prices, report) = (inputs.prices, inputs.report);
    let sets = if report.sets.len() == 1 { "1 set".into() } else { format!("{} sets", thousands(report.sets.len())) };
    let assets = match prices.symbols.as_slice() {
        [one] => one.clone(),
        many => format!("{} assets", thousands(many.len())),
    };
    format!("{sets} × {assets} × {} bars", thousands(report.bars))
}

fn facts(inputs: &Inputs<'_>) -> Vec<(String, String)> {
    let (prices, config, report) = (inputs.prices, inputs.config, inputs.report);
    let time = |t: Option<&i64>| t.map(|t| prices.format_time(*t)).unwrap_or_default();
    let costs = config.cost_bps.iter().map(f64::to_string).collect::<Vec<_>>().join(", ");
    let walk_forward = match &config.walk_forward {
        Some(scheme) => format!("{scheme}: {} windows, {} stitched bars", thousands(report.windows.len()), thousands(report.stitched_bars.len())),
        None => "none: everything below is in sample".into(),
    };
    let filter = inputs.provenance["regime_filter"].as_object().map(|_| {
        let gates = |gates: &crate::sim::regime_filter::Gates| gates.thresholds().iter().map(f32::to_string).collect::<Vec<_>>().join(", ");
        let (states, of) = (&inputs.provenance["regime_filter"]["traded"], &inputs.provenance["regime_filter"]["states"]);
        let above = config.regimes.as_ref().map(gates).unwrap_or_default();
        ("Regimes", format!("trades only where states {states} of {of} are likelier than {above}; filtered probabilities of refits on the past"))
    });
    let facts = [
        ("Data", prices.sources.join(", ")),
        ("Dates", format!("{} to {}", time(prices.times.first()), time(prices.times.last()))),
        ("Grid", config.grid.to_string()),
        ("Walk-forward", walk_forward),
        ("Costs", format!("{costs} bp one way; sets are ranked at {} bp", config.cost_bps.first().copied().unwrap_or(0.0))),
        ("Device", inputs.device.info().to_string()),
    ];
    facts.into_iter().chain(filter).map(|(label, text)| (label.to_string(), text)).collect()
}

/// What a reader should take away, from the curves alone.
fn verdict(inputs: &Inputs<'_>, curves: &[Curve]) -> Vec<String> {
    let ratio = |x: f64| if x.is_nan() { "undefined".to_string() } else { format!("{x:.2}").replace('-', "\u{2212}") };
    let Some(hold) = curves.iter().find(|c| c.kind == "buy_and_hold").map(|c| c.total.sharpe) else { return Vec::new() };
    let cost = inputs.config.cost_bps.first().copied().unwrap_or(0.0);
    let mut lines = Vec::new();
    let own = if inputs.report.assets > 1 { "a set per asset" } else { "a set" };
    for (kind, name) in [("per_asset", own), ("pooled", "one set for all assets")] {
        let Some(chosen) = curves.iter().find(|c| c.kind == kind).map(|c| c.total.sharpe) else { continue };
        let against = match chosen.partial_cmp(&hold) {
            Some(std::cmp::Ordering::Greater) => "more than",
            Some(std::cmp::Ordering::Less) => "less than",
            _ => "against",
        };
        lines.push(format!(
            "Choosing {name} in each window earned a Sharpe ratio of {} out of sample at {cost} bp, {against} the {} of buy and hold.",
            ratio(chosen),
            ratio(hold)
        ));
    }
    if lines.is_empty() {
        lines.push("Everything here is in sample: no set was tested on bars that it was not chosen on. Use a walk-forward for that.".into());
    }
    lines
}

// ---- curves -----------------------------------------------------------------------------------------------------------

fn curves(inputs: &Inputs<'_>, best: Option<usize>) -> Result<Vec<Curve>> {
    let report = inputs.report;
    let counted: Vec<u32> = match report.windows.is_empty() {
        true => (report.start..report.bars.saturating_sub(1) as u32).collect(),
        false => report.stitched_bars.clone(),
    };
    let curve = |kind, cost_bps, returns: &[f32], total| {
        let (equity, drawdown) = growth(returns);
        let kept = thinned(&equity, &drawdown);
        let time = |k: &usize| match (k.checked_sub(1).and_then(|k| counted.get(k)), counted.first()) {
            (Some(&j), _) => inputs.earned(j),
            (None, Some(&j)) => inputs.prices.times.get(j as usize).copied().unwrap_or(0),
            (None, None) => 0,
        };
        let of = |series: &[f64]| kept.iter().map(|&k| short(series[k])).collect();
        Curve { kind, cost_bps, time: kept.iter().map(time).collect(), equity: of(&equity), drawdown: of(&drawdown), points: equity.len(), total }
    };
    let mut curves = Vec::new();
    let shown = evenly(report.costs.len(), MOST_CURVES);
    for level in shown.iter().map(|&c| &report.costs[c]) {
        for (kind, chosen) in [("per_asset", &level.per_asset), ("pooled", &level.pooled)] {
            curves.extend(chosen.iter().map(|o| curve(kind, Some(level.cost_bps), &o.returns, total(inputs, o))));
        }
    }
    if let Some(set) = best.filter(|_| report.windows.is_empty()) {
        let series = of_one_set(inputs, set)?;
        for (c, returns) in shown.iter().filter_map(|&c| Some((c, series.get(c)?))) {
            let turnover = inputs.per_year(report.set(c, set).turnover);
            let p = performance(inputs, returns)?;
            curves.push(curve("best_in_sample", Some(report.costs[c].cost_bps), returns, Total::of(&p, turnover)));
        }
    }
    curves.extend(report.buy_and_hold.iter().map(|o| curve("buy_and_hold", None, &o.returns, Total { turnover: f64::NAN, ..total(inputs, o) })));
    Ok(curves)
}

fn total(inputs: &Inputs<'_>, o: &OutOfSample) -> Total {
    Total::of(&o.portfolio, o.turnover * inputs.config.periods_per_year)
}

fn performance(inputs: &Inputs<'_>, returns: &[f32]) -> Result<Performance> {
    let mut pass = inputs.device.pass("report");
    let uploaded = inputs.device.upload("returns", returns)?;
    let read = performance_read(&mut pass, &uploaded, 1, returns.len() as u64)?;
    let all = finish(&pass.submit()?.f64(read)?, returns.len() as u64, inputs.config.periods_per_year);
    all.into_iter().next().ok_or_else(|| Error::Internal("one series has one performance".into()))
}

// ---- choices ----------------------------------------------------------------------------------------------------------

fn choices(inputs: &Inputs<'_>, kind: &'static str, chosen: &OutOfSample) -> Option<Choices> {
    let report = inputs.report;
    let windows = report.windows.len();
    if windows == 0 {
        return None;
    }
    let shown = evenly(windows, MOST_WINDOWS);
    let slots = chosen.best.len() / windows;
    let mut at: BTreeMap<u32, usize> = BTreeMap::new();
    let choice = |slot: usize, window: usize| chosen.best[slot * windows + window];
    for set in (0..slots).flat_map(|slot| shown.iter().map(move |&w| (slot, w))).map(|(slot, w)| choice(slot, w)) {
        at.insert(set, 0);
    }
    for (i, index) in at.values_mut().enumerate() {
        *index = i;
    }
    let values = |set: u32| report.sets.get(set as usize).into_iter().map(|(_, v)| v).collect::<Vec<f32>>();
    let line = |slot: usize| ChoiceLine {
        asset: if kind == "pooled" { "all assets".into() } else { inputs.prices.symbols[slot].clone() },
        at: shown.iter().map(|&w| at.get(&choice(slot, w)).copied().unwrap_or(0)).collect(),
    };
    let many = slots > MOST_ASSETS;
    let quantile = |parameter: usize| {
        let mut rows: [Vec<f64>; 5] = Default::default();
        for &w in &shown {
            let column = &report.sets.columns[parameter];
            let mut values: Vec<f32> = (0..slots).filter_map(|slot| column.get(choice(slot, w) as usize)).copied().collect();
            values.sort_by(f32::total_cmp);
            for (row, q) in rows.iter_mut().zip([0.0, 0.1, 0.5, 0.9, 1.0]) {
                let i = ((values.len().max(1) - 1) as f64 * q).round() as usize;
                row.push(values.get(i).map_or(f64::NAN, |&v| short(f64::from(v))));
            }
        }
        rows
    };
    Some(Choices {
        kind,
        windows,
        test: shown.iter().map(|&w| report.windows[w]).map(|w| [inputs.earned(w[2]), inputs.earned(w[3].saturating_sub(1))]).collect(),
        sets: if many { Vec::new() } else { at.keys().map(|&s| values(s)).collect() },
        set: if many { Vec::new() } else { at.keys().map(|&s| report.id(s as usize)).collect() },
        lines: if many { Vec::new() } else { (0..slots).map(line).collect() },
        quantiles: if many { (0..report.sets.names.len()).map(quantile).collect() } else { Vec::new() },
    })
}

// ---- costs ------------------------------------------------------------------------------------------------------------

fn costs(inputs: &Inputs<'_>, best: &[usize]) -> Vec<CostRow> {
    let report = inputs.report;
    let row = |(c, level): (usize, &CostLevel)| CostRow {
        cost_bps: level.cost_bps,
        best: report.ranked(c, inputs.config.rank_by, 1).first().map(|&s| inputs.best_set(s, &report.set(c, s))),
        best_at_first: best.iter().map(|&s| report.set(c, s).sharpe).collect(),
        per_asset: level.per_asset.as_ref().map(|o| total(inputs, o)),
        pooled: level.pooled.as_ref().map(|o| total(inputs, o)),
    };
    report.costs.iter().enumerate().map(row).collect()
}

// ---- provenance -------------------------------------------------------------------------------------------------------

/// What the caller gave, with what only the report knows.
fn provenance(inputs: &Inputs<'_>, bars: usize) -> Value {
    let report = inputs.report;
    let mut all = inputs.provenance.clone();
    if let Some(map) = all.as_object_mut() {
        let now = time::OffsetDateTime::now_utc();
        map.insert("written".into(), format!("{} {:02}:{:02} UTC", now.date(), now.hour(), now.minute()).into());
        map.insert("counted_bars".into(), bars.saturating_sub(1 + report.start as usize).into());
        map.insert("set_bars".into(), serde_json::json!(report.work()));
        map.insert("launches".into(), report.launches.into());
        map.insert("submits".into(), report.submits.into());
    }
    all
}
