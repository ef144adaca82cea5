//! What the charts are made of: sums over sets and points, small whatever the size of the sweep.
//!
//! Heat-map   every pair of grid axes (and every axis alone), at most BINS × BINS cells: count, mean and maximum of each statistic over
//!            the sets whose values fall into the cell. An axis with more values than BINS is cut into runs of neighbouring values.
//! Histogram  at most MOST_BARS bars of a round width, every defined value counted once.
//! Fit        least squares y = intercept + slope·x and Spearman's rank correlation (mean ranks for ties).
//! Thinning   a series of any length keeps its first and last point and, of each bucket, the lowest and highest value and the deepest
//!            drawdown.
//! Cost       a pass over the sets per heat-map and per histogram; pairs of axes run side by side.

use rayon::prelude::*;
use serde::Serialize;
use std::collections::HashSet;

/// Most bins of a heat-map's axis.
pub const BINS: usize = 64;
/// Most bars of a histogram.
pub const MOST_BARS: usize = 200;
/// Most points of a series.
pub const MOST_POINTS: usize = 2000;
/// Statistics of a set, in the order of heat-map cells.
pub const STATISTICS: [&str; 4] = ["sharpe", "total_return", "max_drawdown", "turnover"];

/// Six significant digits: enough for a chart, half the bytes.
pub(super) fn short(x: f64) -> f64 {
    if x.is_finite() { format!("{x:.5e}").parse().unwrap_or(x) } else { f64::NAN }
}

// ---- heat-maps --------------------------------------------------------------------------------------------------------

/// Values of a parameter, binned.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Axis {
    /// Parameter name.
    pub name: String,
    /// Smallest value of each bin, ascending.
    pub from: Vec<f32>,
    /// Largest value of each bin.
    pub to: Vec<f32>,
}

impl Axis {
    /// Bins of at most BINS runs of neighbouring values.
    fn of(name: &str, column: &[f32]) -> Axis {
        let mut values: Vec<f32> = column.iter().map(|v| v.to_bits()).collect::<HashSet<u32>>().into_iter().map(f32::from_bits).collect();
        values.sort_by(f32::total_cmp);
        let bins = values.len().min(BINS);
        let edge = |i: usize| i * values.len() / bins;
        Axis { name: name.into(), from: (0..bins).map(|i| values[edge(i)]).collect(), to: (0..bins).map(|i| values[edge(i + 1) - 1]).collect() }
    }

    /// Number of bins.
    pub fn len(&self) -> usize {
        self.from.len()
    }

    /// Whether there is no bin.
    pub fn is_empty(&self) -> bool {
        self.from.is_empty()
    }

    fn bin(&self, value: f32) -> usize {
        self.from.partition_point(|&from| from <= value).saturating_sub(1)
    }
}

/// A heat-map over axes x and y; x = y is one axis alone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Surface {
    /// Index of the horizontal axis.
    pub x: usize,
    /// Index of the vertical axis.
    pub y: usize,
    /// Sets in each cell [Y,X], or [X] of one axis alone.
    pub count: Vec<u64>,
    /// Mean of each statistic's defined values [4][Y,X]; NaN where there is none.
    pub mean: Vec<Vec<f64>>,
    /// Largest value of each statistic [4][Y,X].
    pub max: Vec<Vec<f64>>,
}

/// Running sums of a cell.
#[derive(Clone, Copy)]
struct Cell {
    count: u64,
    defined: [u64; 4],
    sum: [f64; 4],
    max: [f64; 4],
}

impl Cell {
    const EMPTY: Cell = Cell { count: 0, defined: [0; 4], sum: [0.0; 4], max: [f64::NAN; 4] };

    fn add(&mut self, statistics: [f64; 4]) {
        self.count += 1;
        for (k, x) in statistics.into_iter().enumerate().filter(|(_, x)| !x.is_nan()) {
            self.defined[k] += 1;
            self.sum[k] += x;
            self.max[k] = self.max[k].max(x);
        }
    }

    fn mean(&self, k: usize) -> f64 {
        if self.defined[k] == 0 { f64::NAN } else { self.sum[k] / self.defined[k] as f64 }
    }
}

/// Axes with more than one value, every one of them alone and every pair of them. `statistics(s)` are those of set s.
pub(super) fn surfaces(names: &[&str], columns: &[Vec<f32>], statistics: &(dyn Fn(usize) -> [f64; 4] + Sync)) -> (Vec<Axis>, Vec<Surface>) {
    let mut axes = Vec::new();
    let mut varying = Vec::new();
    for (name, column) in names.iter().zip(columns) {
        let axis = Axis::of(name, column);
        if axis.len() > 1 {
            axes.push(axis);
            varying.push(column.as_slice());
        }
    }
    let pairs: Vec<(usize, usize)> = (0..axes.len()).flat_map(|x| (x..axes.len()).map(move |y| (x, y))).collect();
    let surfaces = pairs.par_iter().map(|&(x, y)| surface((x, &axes[x], varying[x]), (y, &axes[y], varying[y]), statistics)).collect();
    (axes, surfaces)
}

fn surface(x: (usize, &Axis, &[f32]), y: (usize, &Axis, &[f32]), statistics: &(dyn Fn(usize) -> [f64; 4] + Sync)) -> Surface {
    let alone = x.0 == y.0;
    let mut cells = vec![Cell::EMPTY; if alone { x.1.len() } else { x.1.len() * y.1.len() }];
    for (s, (&at_x, &at_y)) in x.2.iter().zip(y.2).enumerate() {
        let row = if alone { 0 } else { y.1.bin(at_y) };
        cells[row * x.1.len() + x.1.bin(at_x)].add(statistics(s));
    }
    let of = |value: &dyn Fn(&Cell, usize) -> f64| (0..4).map(|k| cells.iter().map(|c| short(value(c, k))).collect()).collect();
    Surface { x: x.0, y: y.0, count: cells.iter().map(|c| c.count).collect(), mean: of(&Cell::mean), max: of(&|c, k| c.max[k]) }
}

// ---- histogram --------------------------------------------------------------------------------------------------------

/// Bar i counts the values v with floor(v / width) = first + i.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Histogram {
    /// Index of the first bar.
    pub first: i64,
    /// Width of a bar: 1, 2 or 5 times a power of ten.
    pub width: f64,
    /// Values in each bar.
    pub counts: Vec<u64>,
    /// Values that are not defined, and in no bar.
    pub undefined: u64,
    /// Mean of the defined values.
    pub mean: f64,
    /// Largest value.
    pub best: f64,
}

/// The smallest of 1, 2, 5 · 10^k that is at least `least`.
fn round_up(least: f64) -> f64 {
    let power = 10f64.powi(least.log10().floor() as i32);
    [1.0, 2.0, 5.0].map(|m| m * power).into_iter().find(|w| *w >= least).unwrap_or(10.0 * power)
}

impl Histogram {
    /// Of `value(0)` … `value(count − 1)`.
    pub fn of(count: usize, value: impl Fn(usize) -> f64) -> Histogram {
        let defined = || (0..count).map(&value).filter(|x| x.is_finite());
        let (n, sum, lo, best) = defined().fold((0u64, 0.0, f64::INFINITY, f64::NEG_INFINITY), |(n, sum, lo, hi), x| (n + 1, sum + x, x.min(lo), x.max(hi)));
        let undefined = count as u64 - n;
        if n == 0 {
            return Histogram { first: 0, width: 0.1, counts: Vec::new(), undefined, mean: f64::NAN, best: f64::NAN };
        }
        // The bars at both ends may be half empty, hence two fewer.
        let bars = (n as f64).sqrt().clamp(12.0, (MOST_BARS - 2) as f64);
        let width = if best > lo { round_up(((best - lo) / bars).max(1e-9 * lo.abs().max(best.abs())).max(1e-6)) } else { 0.1 };
        let bar = |x: f64| (x / width).floor() as i64;
        let first = bar(lo);
        let mut counts = vec![0u64; (bar(best) - first + 1) as usize];
        for x in defined() {
            counts[(bar(x) - first) as usize] += 1;
        }
        Histogram { first, width, counts, undefined, mean: sum / n as f64, best }
    }
}

// ---- fits -------------------------------------------------------------------------------------------------------------

/// How y goes with x.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Fit {
    /// Points with both coordinates defined.
    pub points: usize,
    /// Least-squares slope; NaN below three points or where x does not vary.
    pub slope: f64,
    /// Least-squares intercept.
    pub intercept: f64,
    /// Spearman's rank correlation.
    pub rank_correlation: f64,
}

impl Fit {
    /// Of the points that are defined.
    pub fn of(x: &[f64], y: &[f64]) -> Fit {
        let (x, y): (Vec<f64>, Vec<f64>) = x.iter().zip(y).filter(|(x, y)| x.is_finite() && y.is_finite()).unzip();
        let none = Fit { points: x.len(), slope: f64::NAN, intercept: f64::NAN, rank_correlation: f64::NAN };
        if x.len() < 3 {
            return none;
        }
        let (mean_x, mean_y, xx, xy, _) = moments(&x, &y);
        let (_, _, rr, rs, ss) = moments(&ranks(&x), &ranks(&y));
        if xx == 0.0 {
            return none;
        }
        let slope = xy / xx;
        Fit { slope, intercept: mean_y - slope * mean_x, rank_correlation: if ss == 0.0 { f64::NAN } else { rs / (rr * ss).sqrt() }, ..none }
    }
}

/// Means, and centred sums of x², xy and y².
fn moments(x: &[f64], y: &[f64]) -> (f64, f64, f64, f64, f64) {
    let n = x.len() as f64;
    let (mx, my) = (x.iter().sum::<f64>() / n, y.iter().sum::<f64>() / n);
    let sum = |a: &[f64], ma: f64, b: &[f64], mb: f64| a.iter().zip(b).map(|(a, b)| (a - ma) * (b - mb)).sum::<f64>();
    (mx, my, sum(x, mx, x, mx), sum(x, mx, y, my), sum(y, my, y, my))
}

/// Ranks from 0; equal values share their mean rank.
fn ranks(x: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[a].total_cmp(&x[b]));
    let mut ranks = vec![0.0; x.len()];
    let mut from = 0;
    while from < order.len() {
        let equal = order[from..].iter().take_while(|&&i| x[i] == x[order[from]]).count();
        for &i in &order[from..from + equal] {
            ranks[i] = from as f64 + (equal - 1) as f64 / 2.0;
        }
        from += equal;
    }
    ranks
}

// ---- series -----------------------------------------------------------------------------------------------------------

/// Growth of 1 and its drawdown, from simple returns [K]: both [K+1], starting at 1 and 0.
pub(super) fn growth(returns: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let (mut equity, mut drawdown) = (vec![1.0], vec![0.0]);
    let (mut value, mut peak) = (1.0f64, 1.0f64);
    for r in returns {
        value *= 1.0 + f64::from(*r);
        peak = peak.max(value);
        equity.push(value);
        drawdown.push(1.0 - value / peak);
    }
    (equity, drawdown)
}

/// Indices, ascending and at most MOST_POINTS, that keep the ends and the extremes of a series.
pub(super) fn thinned(equity: &[f64], drawdown: &[f64]) -> Vec<usize> {
    let n = equity.len();
    if n <= MOST_POINTS {
        return (0..n).collect();
    }
    let buckets = (MOST_POINTS - 2) / 3;
    let mut kept = vec![0, n - 1];
    for b in 0..buckets {
        let bucket = b * n / buckets..(b + 1) * n / buckets;
        let low = |x: &[f64]| bucket.clone().min_by(|&i, &j| x[i].total_cmp(&x[j]));
        let high = |x: &[f64]| bucket.clone().max_by(|&i, &j| x[i].total_cmp(&x[j]));
        kept.extend([low(equity), high(equity), high(drawdown)].into_iter().flatten());
    }
    kept.sort_unstable();
    kept.dedup();
    kept
}

/// At most `most` of 0 … n − 1, evenly spaced, the first among them.
pub(super) fn evenly(n: usize, most: usize) -> Vec<usize> {
    let k = n.min(most);
    (0..k).map(|i| (i as u128 * n as u128 / k as u128) as usize).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::kernels::philox::{philox4x32, uniform};

    fn unit(i: usize, stream: u32) -> f64 {
        uniform(philox4x32([i as u32, stream, 0, 0], [11, 5])[0])
    }

    /// A grid of sets with random statistics, one Sharpe ratio in fifty undefined.
    fn sets(n: usize) -> (Vec<Vec<f32>>, Vec<[f64; 4]>) {
        let axis = |values: f64, stream| (0..n).map(|i| (2.0 + (values * unit(i, stream)).floor()) as f32).collect::<Vec<f32>>();
        let statistics = (0..n).map(|i| [if i % 50 == 7 { f64::NAN } else { 3.0 * unit(i, 3) - 1.0 }, unit(i, 4), unit(i, 5) - 2.0, 40.0 * unit(i, 6)]);
        (vec![axis(99.0, 0), axis(700.0, 1), axis(2.0, 2), vec![5.0; n]], statistics.collect())
    }

    #[test]
    fn cells_hold_every_set_once_whatever_the_order() {
        let n = 20_000;
        let (columns, statistics) = sets(n);
        let names = ["fast", "slow", "short", "fixed"];
        let (axes, maps) = surfaces(&names, &columns, &|s| statistics[s]);
        assert_eq!(axes.iter().map(|a| (a.name.as_str(), a.len())).collect::<Vec<_>>(), [("fast", 64), ("slow", 64), ("short", 2)]);
        assert_eq!(maps.len(), 6, "three axes alone, three pairs");

        // 7919 is prime to n: a permutation.
        let at = |i: usize| i * 7919 % n;
        let shuffled: Vec<Vec<f32>> = columns.iter().map(|c| (0..n).map(|i| c[at(i)]).collect()).collect();
        let (axes_again, again) = surfaces(&names, &shuffled, &|s| statistics[at(s)]);
        assert_eq!(axes, axes_again);
        for (a, b) in maps.iter().zip(&again) {
            assert_eq!((a.x, a.y, a.count.iter().sum::<u64>()), (b.x, b.y, n as u64));
            assert_eq!(a.count, b.count);
            for (a, b) in a.mean.iter().chain(&a.max).flatten().zip(b.mean.iter().chain(&b.max).flatten()) {
                assert!((a - b).abs() <= 2e-5 * a.abs() || (a.is_nan() && b.is_nan()), "{a} {b}");
            }
        }

        // One cell by hand: fast in the third bin, short = 3.
        let map = maps.iter().find(|m| (m.x, m.y) == (0, 2)).unwrap();
        let inside = |s: &usize| (axes[0].from[2]..=axes[0].to[2]).contains(&columns[0][*s]) && columns[2][*s] == 3.0;
        let cell = 64 + 2;
        assert_eq!(map.count[cell], (0..n).filter(inside).count() as u64);
        let drawdowns: Vec<f64> = (0..n).filter(inside).map(|s| statistics[s][2]).collect();
        assert!((map.mean[2][cell] - drawdowns.iter().sum::<f64>() / drawdowns.len() as f64).abs() < 1e-5);
        assert!((map.max[2][cell] - drawdowns.iter().copied().fold(f64::MIN, f64::max)).abs() < 1e-5, "a negative maximum is not lost");
        let sharpes: Vec<f64> = (0..n).filter(inside).map(|s| statistics[s][0]).filter(|x| !x.is_nan()).collect();
        assert!((map.mean[0][cell] - sharpes.iter().sum::<f64>() / sharpes.len() as f64).abs() < 1e-5, "undefined ratios are left out");
    }

    #[test]
    fn histograms_count_every_value_in_round_bars() {
        for n in [1, 2, 10, 1000, 100_000] {
            let values: Vec<f64> = (0..n).map(|i| if i % 100 == 50 { f64::NAN } else { 2.0 * unit(i, 8) - 1.3 }).collect();
            let h = Histogram::of(n, |i| values[i]);
            assert_eq!(h.counts.iter().sum::<u64>() + h.undefined, n as u64);
            assert!(h.counts.len() <= MOST_BARS && h.counts.len() as f64 >= (n as f64).sqrt().min(60.0) / 3.0, "{} bars of {n}", h.counts.len());
            for (i, &count) in h.counts.iter().enumerate() {
                let edges = ((h.first + i as i64) as f64 * h.width, (h.first + 1 + i as i64) as f64 * h.width);
                let inside = values.iter().filter(|x| **x >= edges.0 - 1e-12 && **x < edges.1 - 1e-12).count() as u64;
                assert_eq!(count, inside, "bar {i} of {n}");
            }
        }
        assert_eq!(Histogram::of(5, |_| f64::NAN).undefined, 5);
        let same = Histogram::of(9, |_| 0.7);
        assert_eq!((same.counts, same.best), (vec![9], 0.7));
        assert!(Histogram::of(2, |i| [-1e9, 1e9][i]).counts.len() <= MOST_BARS);
    }

    #[test]
    fn fits_are_those_of_closed_forms() {
        let x: Vec<f64> = (0..9).map(f64::from).collect();
        let line: Vec<f64> = x.iter().map(|x| 3.0 - 0.5 * x).collect();
        let fit = Fit::of(&x, &line);
        assert!((fit.slope + 0.5).abs() < 1e-12 && (fit.intercept - 3.0).abs() < 1e-12 && (fit.rank_correlation + 1.0).abs() < 1e-12);
        let cube: Vec<f64> = x.iter().map(|x| x * x * x).collect();
        assert!((Fit::of(&x, &cube).rank_correlation - 1.0).abs() < 1e-12, "monotone is 1 whatever the shape");
        // Σd² = 2 of four ranks: 1 − 6·2/(4·15).
        assert!((Fit::of(&[1.0, 2.0, 3.0, 4.0], &[2.0, 1.0, 3.0, 4.0]).rank_correlation - 0.8).abs() < 1e-12);
        assert_eq!(ranks(&[5.0, 1.0, 5.0]), [1.5, 0.0, 1.5]);
        assert!(Fit::of(&[1.0, f64::NAN, 2.0], &[1.0, 1.0, 1.0]).slope.is_nan());
        assert!(Fit::of(&[1.0; 4], &[1.0, 2.0, 3.0, 4.0]).slope.is_nan());
    }

    #[test]
    fn thinning_keeps_ends_and_extremes() {
        let returns: Vec<f32> = (0..50_000).map(|i| (0.02 * (unit(i, 9) - 0.49)) as f32).collect();
        let (equity, drawdown) = growth(&returns);
        let kept = thinned(&equity, &drawdown);
        assert!(kept.len() <= MOST_POINTS && kept.len() > MOST_POINTS / 2);
        assert!(kept.windows(2).all(|w| w[0] < w[1]) && kept[0] == 0 && kept[kept.len() - 1] == 50_000);
        let most = |x: &[f64], at: &mut dyn Iterator<Item = usize>| at.map(|i| x[i]).fold(f64::MIN, f64::max);
        for series in [&equity, &drawdown] {
            assert_eq!(most(series, &mut kept.iter().copied()), most(series, &mut (0..=50_000)));
        }
        assert_eq!(thinned(&[1.0; 5], &[0.0; 5]), [0, 1, 2, 3, 4]);
        assert_eq!(evenly(10, 4), [0, 2, 5, 7]);
        assert_eq!(evenly(3, 4), [0, 1, 2]);
        assert!(evenly(0, 4).is_empty());
    }
}
