//! Parts of a sweep: runs of neighbouring sets that are computed apart, on one machine or many, and put together again.
//!
//! A part holds the statistics of its sets and the winner among them of every cost, window and asset (or of all assets, if pooled). The
//! best set of all is the best of the winners, by selection key, then lowest index: integers, so the order of the parts does not matter.
//! Only the out-of-sample series are missing then; [`SweepRun::finish`](super::sweep::SweepRun::finish) runs the winners once more for them.
//!
//! Memory   24 bytes per set and cost level for the ranking; 20 bytes per row where rows are kept, for one part at a time.

use super::sweep::{RankBy, SetMean, ranked};
use crate::kernels::backtest_sweep::SetStats;
use crate::{Error, Result};
use ndarray::Array3;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Statistics of one set on one asset at one cost, as they are written.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Row {
    /// Annualised Sharpe ratio; NaN if undefined.
    pub sharpe: f32,
    /// Compounded net return.
    pub total_return: f32,
    /// Largest loss from a running peak, positive.
    pub max_drawdown: f32,
    /// Σ|w_j − w_{j−1}|.
    pub turnover: f32,
    /// Bars on which something was traded.
    pub trades: u32,
}

impl Row {
    /// Rounds statistics to what is written.
    pub fn of(s: &SetStats) -> Row {
        Row {
            sharpe: s.sharpe as f32,
            total_return: s.total_return as f32,
            max_drawdown: s.max_drawdown as f32,
            turnover: s.turnover as f32,
            trades: s.trades.min(u64::from(u32::MAX)) as u32,
        }
    }
}

/// Sums over assets, 24 bytes a set.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct SetSum {
    sharpe: f32,
    defined: u32,
    total_return: f32,
    max_drawdown: f32,
    turnover: f32,
    trades: u32,
}

impl SetSum {
    pub(super) fn add(&mut self, row: &Row) {
        if !row.sharpe.is_nan() {
            self.sharpe += row.sharpe;
            self.defined += 1;
        }
        self.total_return += row.total_return;
        self.max_drawdown += row.max_drawdown;
        self.turnover += row.turnover;
        self.trades = self.trades.saturating_add(row.trades);
    }

    pub(super) fn mean(&self, assets: usize) -> SetMean {
        let n = assets as f64;
        SetMean {
            sharpe: if self.defined == 0 { f64::NAN } else { f64::from(self.sharpe) / f64::from(self.defined) },
            total_return: f64::from(self.total_return) / n,
            max_drawdown: f64::from(self.max_drawdown) / n,
            turnover: f64::from(self.turnover) / n,
            trades: u64::from(self.trades),
        }
    }
}

/// The best set of a window: larger key first, then lower index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Winner {
    /// Selection key, 0 if the ratio is undefined.
    pub key: u32,
    /// Position of the set.
    pub set: u32,
}

impl Winner {
    fn beats(&self, other: &Winner) -> bool {
        (self.key, std::cmp::Reverse(self.set)) > (other.key, std::cmp::Reverse(other.set))
    }
}

/// Winners of some sets, for each cost.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Winners {
    /// Per asset and window [N,W].
    pub per_asset: Vec<Vec<Winner>>,
    /// Per window [W].
    pub pooled: Vec<Vec<Winner>>,
}

/// What a run of neighbouring sets gave.
#[derive(Debug, Clone)]
pub struct Part {
    /// Positions of the sets.
    pub sets: Range<usize>,
    /// The best of them.
    pub winners: Winners,
    /// Rows [cost, set, asset], if they were kept.
    pub rows: Option<Array3<Row>>,
    pub(super) sums: Vec<Vec<SetSum>>,
    /// Launches on the device.
    pub launches: usize,
    /// Submits.
    pub submits: usize,
}

impl Part {
    /// A part that was stored: rows [cost, set, asset] as they were written.
    /// # Errors
    /// `Shape` if the number of rows does not fit.
    pub fn of_rows(sets: Range<usize>, assets: usize, costs: usize, rows: &[Row], winners: Winners) -> Result<Part> {
        if assets == 0 || rows.len() != costs * sets.len() * assets {
            let expected = format!("{costs} costs × {} sets × {assets} assets", sets.len());
            return Err(Error::Shape { op: "sweep", arg: "rows of a part".into(), expected, got: rows.len().to_string() });
        }
        let mut sums = vec![vec![SetSum::default(); sets.len()]; costs];
        for (sum, rows) in sums.iter_mut().flatten().zip(rows.chunks_exact(assets)) {
            rows.iter().for_each(|row| sum.add(row));
        }
        Ok(Part { sets, winners, rows: None, sums, launches: 0, submits: 0 })
    }
}

/// Parts put together.
#[derive(Debug, Clone, PartialEq)]
pub struct Fold {
    pub(super) sums: Vec<Vec<SetSum>>,
    pub(super) winners: Winners,
    done: Vec<Range<usize>>,
    pub(super) launches: usize,
    pub(super) submits: usize,
}

impl Fold {
    /// Nothing of `sets` sets at `costs` cost levels yet.
    pub fn new(sets: usize, costs: usize) -> Fold {
        let sums = vec![vec![SetSum::default(); sets]; costs];
        Fold { sums, winners: Winners::default(), done: Vec::new(), launches: 0, submits: 0 }
    }

    /// Adds a part; parts come in any order.
    /// # Errors
    /// `Parameter` if it repeats sets or has other cost levels or windows; `Shape` if it lies outside the sets.
    pub fn add(&mut self, part: &Part) -> Result<()> {
        let bad = |help: &str| {
            let value = format!("sets {} to {}", part.sets.start, part.sets.end.saturating_sub(1));
            Err(Error::Parameter { op: "sweep", name: "part".into(), value, help: help.into() })
        };
        if self.done.iter().any(|done| part.sets.start < done.end && done.start < part.sets.end) {
            return bad("these sets are there already; give each part once");
        }
        if part.sums.len() != self.sums.len() || self.sums.iter().any(|sums| part.sets.end > sums.len()) {
            return bad("it belongs to another sweep");
        }
        for (all, own) in [(&mut self.winners.per_asset, &part.winners.per_asset), (&mut self.winners.pooled, &part.winners.pooled)] {
            if self.done.is_empty() {
                all.clone_from(own);
            }
            if all.len() != own.len() || all.iter().zip(own).any(|(all, own)| all.len() != own.len()) {
                return bad("it belongs to a sweep with other windows");
            }
            for (best, winner) in all.iter_mut().flatten().zip(own.iter().flatten()) {
                if winner.beats(best) {
                    *best = *winner;
                }
            }
        }
        for (all, own) in self.sums.iter_mut().zip(&part.sums) {
            all[part.sets.clone()].copy_from_slice(own);
        }
        self.done.push(part.sets.clone());
        self.done.sort_by_key(|done| done.start);
        self.launches += part.launches;
        self.submits += part.submits;
        Ok(())
    }

    /// Ranges of sets that are there, ascending and joined.
    pub fn done(&self) -> Vec<Range<usize>> {
        let mut joined: Vec<Range<usize>> = Vec::new();
        for done in &self.done {
            match joined.last_mut().filter(|last| last.end == done.start) {
                Some(last) => last.end = done.end,
                None => joined.push(done.clone()),
            }
        }
        joined
    }

    /// Ranges inside `sets` that are not there yet.
    pub fn missing(&self, sets: Range<usize>) -> Vec<Range<usize>> {
        let mut missing = Vec::new();
        let mut next = sets.start;
        for done in &self.done {
            if done.start.min(sets.end) > next {
                missing.push(next..done.start.min(sets.end));
            }
            next = next.max(done.end);
        }
        if next < sets.end {
            missing.push(next..sets.end);
        }
        missing
    }

    /// The best `top` of the sets that are there: positions and statistics.
    pub fn ranked(&self, cost: usize, assets: usize, rank_by: RankBy, top: usize) -> Vec<(usize, SetMean)> {
        let Some(sums) = self.sums.get(cost) else { return Vec::new() };
        let positions: Vec<usize> = self.done().into_iter().flatten().collect();
        let there: Vec<SetSum> = positions.iter().map(|&p| sums[p]).collect();
        ranked(&there, assets, rank_by, top).into_iter().map(|i| (positions[i], there[i].mean(assets))).collect()
    }
}

/// The sets of shard `i` of `n`, counted from 1: contiguous shares that differ by at most one set.
/// # Errors
/// `Parameter` unless 1 ≤ i ≤ n ≤ sets.
pub fn shard(sets: usize, i: usize, n: usize) -> Result<Range<usize>> {
    if i == 0 || i > n || n > sets {
        let help = format!("write i/n with 1 ≤ i ≤ n ≤ {sets}, such as 1/3");
        return Err(Error::Parameter { op: "sweep", name: "shard".into(), value: format!("{i}/{n}"), help });
    }
    let cut = |i: usize| (i as u128 * sets as u128 / n as u128) as usize;
    Ok(cut(i - 1)..cut(i))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn part(sets: Range<usize>, keys: [u32; 2]) -> Part {
        let rows: Vec<Row> = sets.clone().map(|s| Row { sharpe: s as f32, ..Row::default() }).collect();
        let winners = Winners { per_asset: vec![keys.map(|key| Winner { key, set: sets.start as u32 }).to_vec()], pooled: Vec::new() };
        Part::of_rows(sets, 1, 1, &rows, winners).unwrap()
    }

    #[test]
    fn parts_fold_to_the_same_whatever_their_order() {
        let parts = [part(0..4, [7, 0]), part(4..5, [9, 0]), part(5..10, [9, 3])];
        let folded = |order: [usize; 3]| {
            let mut fold = Fold::new(10, 1);
            order.iter().for_each(|&i| fold.add(&parts[i]).unwrap());
            fold
        };
        let first = folded([0, 1, 2]);
        assert_eq!(first.winners.per_asset, [[Winner { key: 9, set: 4 }, Winner { key: 3, set: 5 }]]);
        for order in [[2, 1, 0], [1, 0, 2], [2, 0, 1]] {
            assert_eq!(folded(order), first);
        }
        assert!(first.done().iter().eq([&(0..10)]) && first.missing(0..10).is_empty());
        assert_eq!(first.ranked(0, 1, RankBy::Sharpe, 2).iter().map(|r| r.0).collect::<Vec<_>>(), [9, 8]);
    }

    #[test]
    fn what_is_missing_is_known_and_what_is_there_is_not_taken_twice() {
        let mut fold = Fold::new(10, 1);
        fold.add(&part(2..4, [1, 1])).unwrap();
        fold.add(&part(6..7, [1, 1])).unwrap();
        assert_eq!(fold.missing(0..10), [0..2, 4..6, 7..10]);
        assert!(fold.missing(3..6).iter().eq([&(4..6)]));
        assert_eq!(fold.done(), [2..4, 6..7]);
        assert_eq!(fold.ranked(0, 1, RankBy::Sharpe, 9).iter().map(|r| r.0).collect::<Vec<_>>(), [6, 3, 2]);
        assert!(fold.add(&part(3..6, [1, 1])).unwrap_err().to_string().contains("there already"));
        assert!(fold.add(&part(9..12, [1, 1])).is_err());
        assert!(Part::of_rows(0..3, 2, 1, &[Row::default(); 5], Winners::default()).is_err());
    }

    #[test]
    fn shards_share_the_sets_evenly() {
        for (sets, n) in [(10, 3), (7, 7), (1_000_001, 64)] {
            let shards: Vec<_> = (1..=n).map(|i| shard(sets, i, n).unwrap()).collect();
            assert!(shards.windows(2).all(|pair| pair[0].end == pair[1].start) && shards[0].start == 0 && shards[n - 1].end == sets);
            assert!(shards.iter().all(|s| s.len() == sets / n || s.len() == sets / n + 1));
        }
        for (i, n) in [(0, 3), (4, 3), (1, 0), (1, 11)] {
            assert!(shard(10, i, n).is_err(), "{i}/{n}");
        }
    }
}
