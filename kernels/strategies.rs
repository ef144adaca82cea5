//! The strategies as machines: what each of the sets compares, from which bar on, how large it is and where it stops.
//!
//! Strategies (weight decided at bar t from closes up to t):
//! * sma_cross, ema_cross (fast, slow, short): from bar slow−1 on 1 if fast > slow, else −1 if short, else 0; EMA α = 2/(n+1) from p_0.
//! * macd (fast, slow, signal): 1 while EMA_fast − EMA_slow exceeds its own EMA, from bar slow + signal − 2.
//! * rsi_reversion (period, low, high): enter when Wilder's RSI < low, leave when > high.
//! * bollinger_reversion (period, width): enter below mean − width·sd (population), leave above the mean.
//! * donchian_breakout (entry, exit): enter above the highest close of the previous `entry` bars, leave below the lowest of `exit`.
//! * ts_momentum (lookback, vol_window, target_vol, max_leverage): sign(p/p[−lookback] − 1)·min(target_vol/(√252·sd), max_leverage), sd of log returns with n−1.
//!
//! Every strategy also takes, each [S] and each optional (see `backtest.rs` for the rules):
//! * side: 1 long, 0 long and short, −1 short (without it: long; ts_momentum both; `short` = 1 is side 0);
//! * stop_loss, take_profit, trailing_stop: fractions of the price, 0 is off; max_holding: bars, 0 is off;
//! * target_vol, vol_window, max_leverage: the weight is direction·min(target_vol/(√252·sd), max_leverage), target_vol 0 is off.

use crate::backtest::{BAND, BOTH, CROSS, LONG, MOMENTUM, NO_STOP, OFF, SET_WORDS, SHORT, TILE};
use crate::backtest_sweep::{OP, Sweep};
use crate::backtest_tiles::Detail;
use crate::fixed::{KEY_ZERO, ratio_key_of};
use crate::{Error, Result};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;

/// The seven strategies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// Crossing of simple moving averages.
    SmaCross,
    /// Crossing of exponential moving averages.
    EmaCross,
    /// Reversion by Wilder's relative strength index.
    RsiReversion,
    /// Reversion from the lower Bollinger band.
    BollingerReversion,
    /// MACD line above its signal line.
    Macd,
    /// Breakout of a Donchian channel.
    DonchianBreakout,
    /// Time-series momentum with a volatility target.
    TsMomentum,
}

impl Strategy {
    /// All of them.
    pub const ALL: [Strategy; 7] = [
        Strategy::SmaCross,
        Strategy::EmaCross,
        Strategy::RsiReversion,
        Strategy::BollingerReversion,
        Strategy::Macd,
        Strategy::DonchianBreakout,
        Strategy::TsMomentum,
    ];

    /// Name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::SmaCross => "sma_cross",
            Strategy::EmaCross => "ema_cross",
            Strategy::RsiReversion => "rsi_reversion",
            Strategy::BollingerReversion => "bollinger_reversion",
            Strategy::Macd => "macd",
            Strategy::DonchianBreakout => "donchian_breakout",
            Strategy::TsMomentum => "ts_momentum",
        }
    }

    /// The strategy of that name.
    pub fn named(name: &str) -> Result<Strategy> {
        let known = || Strategy::ALL.iter().map(|s| s.name().to_string()).collect();
        let unknown = || Error::Unknown { kind: "strategy", given: name.into(), suggestion: None, known: known() };
        Strategy::ALL.into_iter().find(|s| s.name() == name).ok_or_else(unknown)
    }
}

/// What the indicator kernels have to fill.
pub(crate) enum Table {
    Sma(Vec<u32>),
    /// (span, signal span or 0).
    Ema(Vec<(u32, u32)>),
    Rsi(Vec<u32>),
    Bollinger(Vec<u32>),
    Donchian(u32),
    None,
}

impl Table {
    pub(crate) fn rows(&self) -> usize {
        match self {
            Table::Sma(p) | Table::Rsi(p) | Table::Bollinger(p) => p.len(),
            Table::Ema(p) => p.len(),
            Table::Donchian(_) => 2,
            Table::None => 0,
        }
    }

    /// Longest window that sums run over.
    pub(crate) fn longest(&self) -> u32 {
        match self {
            Table::Sma(p) | Table::Bollinger(p) => p.iter().copied().max().unwrap_or(1),
            _ => 1,
        }
    }
}

/// A strategy's sets as words for the simulator, and the tables they read.
pub(crate) struct Machine {
    pub(crate) mode: u32,
    pub(crate) mask: u32,
    pub(crate) table: Table,
    /// Windows of the volatility table.
    pub(crate) volatility: Vec<u32>,
    pub(crate) sets: Vec<Words>,
    /// Sizes and stops, where any set has them.
    overlays: Vec<Overlay>,
    /// Largest weight that any set of the whole columns can hold.
    pub(crate) heaviest: f64,
    /// Longest windows of the whole columns' sums, of prices and of log returns.
    pub(crate) longest: (u32, u32),
    /// Whether any set is sized, goes short or has stops.
    pub(crate) general: bool,
    /// Whether any set has stops.
    pub(crate) stops: bool,
}

/// A parameter column, checked.
struct Column<'a> {
    name: &'static str,
    values: &'a [f32],
}

impl Column<'_> {
    fn problem(&self, set: usize, help: &str) -> Error {
        Error::Parameter { op: OP, name: format!("{}[{set}]", self.name), value: self.values[set].to_string(), help: help.into() }
    }

    /// A whole number from `least` to 2^20 − 1.
    fn whole(&self, set: usize, least: u32) -> Result<u32> {
        let x = self.values[set];
        let whole = x as u32;
        if whole as f32 == x && whole >= least && whole < 1 << 20 {
            return Ok(whole);
        }
        Err(self.problem(set, &format!("give a whole number from {least} to 1048575")))
    }

    fn wholes(&self, least: u32) -> Result<Vec<u32>> {
        in_parallel(self.values.len(), 0, &|s| self.whole(s, least))
    }

    fn real(&self, set: usize, legal: impl Fn(f32) -> bool, help: &str) -> Result<f32> {
        let x = self.values[set];
        if x.is_finite() && legal(x) { Ok(x) } else { Err(self.problem(set, help)) }
    }
}

/// `value(i)` for all i below n, or an error.
fn in_parallel<T: Copy + Send + Sync>(n: usize, empty: T, value: &(dyn Fn(usize) -> Result<T> + Sync)) -> Result<Vec<T>> {
    const RUN: usize = 8192;
    let mut values = vec![empty; n];
    let run = |(run, out): (usize, &mut [T])| {
        for (i, out) in out.iter_mut().enumerate() {
            *out = value(run * RUN + i)?;
        }
        Ok(())
    };
    match values.par_chunks_mut(RUN).enumerate().try_for_each(run) {
        Ok(()) => Ok(values),
        // Whichever came first in time: report the first in order.
        Err(error) => Err((0..n).find_map(|i| value(i).err()).unwrap_or(error)),
    }
}

/// Distinct periods in ascending order, and the row of each: `rows[period]`, counted from `first`.
fn rows_of_periods(periods: &[u32], first: u32) -> (Vec<u32>, Vec<u32>) {
    let mut rows = vec![0u32; periods.iter().max().map_or(0, |&longest| longest as usize + 1)];
    for &period in periods {
        rows[period as usize] = 1;
    }
    let distinct: Vec<u32> = (0..rows.len() as u32).filter(|&p| rows[p as usize] == 1).collect();
    for (i, &period) in distinct.iter().enumerate() {
        rows[period as usize] = first + i as u32;
    }
    (distinct, rows)
}

/// Row numbers for distinct keys, in ascending order, counted from `first`.
fn rows_of<K: Ord + Copy>(keys: impl Iterator<Item = K>, first: u32) -> (Vec<K>, BTreeMap<K, u32>) {
    let mut rows: BTreeMap<K, u32> = keys.map(|k| (k, 0)).collect();
    for (i, row) in rows.values_mut().enumerate() {
        *row = first + i as u32;
    }
    (rows.keys().copied().collect(), rows)
}

/// A set as its machine sees it: the first words that the kernels read.
#[derive(Clone, Copy)]
pub(crate) struct Words {
    pub(crate) a: u32,
    pub(crate) b: u32,
    pub(crate) threshold_a: u32,
    pub(crate) threshold_b: u32,
    pub(crate) first: u32,
    pub(crate) side: u32,
}

impl Machine {
    fn of(strategy: Strategy, parameters: &[(&str, &[f32])]) -> Result<Machine> {
        let count = parameters.first().map_or(0, |p| p.1.len());
        if count == 0 || parameters.iter().any(|p| p.1.len() != count) {
            let got = parameters.iter().map(|p| format!("{} [{}]", p.0, p.1.len())).collect::<Vec<_>>().join(", ");
            return Err(Error::Shape { op: OP, arg: "parameters".into(), expected: "equal lengths S ≥ 1".into(), got });
        }
        let optional = |name: &'static str| parameters.iter().find(|p| p.0 == name).map(|p| Column { name, values: p.1 });
        let column = |name: &'static str| {
            optional(name).ok_or_else(|| Error::Shape {
                op: OP,
                arg: "parameters".into(),
                expected: format!("'{name}' for {}", strategy.name()),
                got: "none".into(),
            })
        };
        let plain = Words { a: 0, b: 0, threshold_a: 0, threshold_b: 0, first: 0, side: LONG };
        let (mut mode, mut mask) = (BAND, u32::MAX);
        let each = |words: &(dyn Fn(usize) -> Result<Words> + Sync)| in_parallel(count, plain, words);
        let (table, mut sets) = match strategy {
            Strategy::SmaCross | Strategy::EmaCross => {
                mode = CROSS;
                let (fast, slow) = (column("fast")?.wholes(1)?, column("slow")?.wholes(1)?);
                let short = optional("short");
                // Rows of the fast averages first: neighbouring sets then read neighbouring rows.
                let (mut periods, fast_rows) = rows_of_periods(&fast, 0);
                let (slow_periods, slow_rows) = rows_of_periods(&slow, periods.len() as u32);
                periods.extend(slow_periods);
                let sets = each(&|set| {
                    let (f, s) = (fast[set], slow[set]);
                    let side = match &short {
                        Some(c) => c.real(set, |x| x == 0.0 || x == 1.0, "give 0 (long only) or 1 (long and short)")? as u32,
                        None => LONG,
                    };
                    Ok(Words { a: fast_rows[f as usize], b: slow_rows[s as usize], first: f.max(s) - 1, side, ..plain })
                })?;
                let sma = strategy == Strategy::SmaCross;
                (if sma { Table::Sma(periods) } else { Table::Ema(periods.into_iter().map(|p| (p, 0)).collect()) }, sets)
            }
            Strategy::Macd => {
                mode = CROSS;
                let (fast, slow, signal) = (column("fast")?.wholes(1)?, column("slow")?.wholes(1)?, column("signal")?.wholes(1)?);
                // Ordered by signal span: neighbouring sets differ in the fast span.
                let by_signal = |spans: &[u32], first: usize| rows_of(signal.iter().copied().zip(spans.iter().copied()), first as u32);
                let (mut pairs, fast_rows) = by_signal(&fast, 0);
                let (slow_pairs, slow_rows) = by_signal(&slow, pairs.len());
                pairs.extend(slow_pairs);
                let sets = each(&|set| {
                    let (f, s, g) = (fast[set], slow[set], signal[set]);
                    Ok(Words { a: fast_rows[&(g, f)], b: slow_rows[&(g, s)], first: f.max(s) + g - 2, ..plain })
                })?;
                (Table::Ema(pairs.into_iter().map(|(g, n)| (n, g)).collect()), sets)
            }
            Strategy::RsiReversion => {
                let (period, low, high) = (column("period")?.wholes(1)?, column("low")?, column("high")?);
                let (periods, rows) = rows_of_periods(&period, 0);
                let sets = each(&|set| {
                    let n = period[set];
                    let percent = |c: &Column<'_>| c.real(set, |x| (0.0..=100.0).contains(&x), "give a number from 0 to 100");
                    let level = |x: f32| f64::from(x) / 100.0 * 2f64.powi(31);
                    // Keys are truncated: a ratio exactly on its threshold has the threshold's key, and is beyond neither.
                    let (enter, leave) = (level(percent(&low)?).floor() as u32, level(percent(&high)?).floor() as u32);
                    let row = rows[n as usize];
                    Ok(Words { a: row, b: row, threshold_a: !enter, threshold_b: leave, first: n, ..plain })
                })?;
                (Table::Rsi(periods), sets)
            }
            Strategy::BollingerReversion => {
                let (period, width) = (column("period")?.wholes(1)?, column("width")?);
                let (periods, rows) = rows_of_periods(&period, 0);
                let sets = each(&|set| {
                    let n = period[set];
                    let w = f64::from(width.real(set, |x| x >= 0.0, "give a number of deviations, 0 or more")?);
                    let row = rows[n as usize];
                    Ok(Words { a: row, b: row, threshold_a: !ratio_key_of(w * w, w > 0.0), threshold_b: KEY_ZERO, first: n - 1, ..plain })
                })?;
                (Table::Bollinger(periods), sets)
            }
            Strategy::DonchianBreakout => {
                mask = 0;
                let (entry, exit) = (column("entry")?.wholes(1)?, column("exit")?.wholes(1)?);
                let sets = each(&|set| Ok(Words { a: 0, b: 1, threshold_a: entry[set] - 1, threshold_b: exit[set] - 1, ..plain }))?;
                (Table::Donchian(entry.iter().chain(&exit).copied().max().unwrap_or(1)), sets)
            }
            Strategy::TsMomentum => {
                mode = MOMENTUM;
                let lookback = column("lookback")?.wholes(1)?;
                for name in ["vol_window", "target_vol", "max_leverage"] {
                    column(name)?;
                }
                (Table::None, each(&|set| Ok(Words { b: lookback[set], first: lookback[set], side: BOTH, ..plain }))?)
            }
        };
        if let Some(side) = optional("side") {
            for (set, words) in sets.iter_mut().enumerate() {
                let x = side.real(set, |x| x == 1.0 || x == 0.0 || x == -1.0, "give 1 (long), 0 (long and short) or -1 (short)")?;
                words.side = [SHORT, BOTH, LONG][(x + 1.0) as usize];
            }
        }
        let (overlays, volatility) = overlays(strategy, &optional, &mut sets)?;
        let general = mode == MOMENTUM || !overlays.is_empty() || sets.iter().any(|w| w.side != LONG);
        let weights = overlays.iter().map(|o| if o.volatility_row == OFF { 1.0 } else { f64::from(f32::from_bits(o.leverage)) });
        let heaviest = if overlays.is_empty() { 1.0 } else { weights.fold(0.0, f64::max) };
        let longest = (table.longest(), volatility.last().copied().unwrap_or(1));
        let stops = overlays.iter().any(Overlay::stops);
        Ok(Machine { mode, mask, table, volatility, sets, overlays, heaviest, longest, general, stops })
    }

    /// The sets that run, with rows for them alone; scales and key widths of all.
    pub(crate) fn of_sweep(sweep: &Sweep<'_>) -> Result<Machine> {
        let all = Machine::of(sweep.strategy, sweep.parameters)?;
        let Some(only) = sweep.only else { return Ok(all) };
        let count = all.count();
        if only.is_empty() || only.windows(2).any(|pair| pair[0] >= pair[1]) || only.last().is_some_and(|&last| last as usize >= count) {
            let got = format!("{} indices up to {:?}", only.len(), only.last());
            return Err(Error::Shape { op: OP, arg: "only".into(), expected: format!("ascending indices below S = {count}, at least one"), got });
        }
        let columns: Vec<Vec<f32>> = sweep.parameters.iter().map(|(_, column)| only.iter().map(|&set| column[set as usize]).collect()).collect();
        let parameters: Vec<(&str, &[f32])> = sweep.parameters.iter().zip(&columns).map(|(p, column)| (p.0, column.as_slice())).collect();
        let Machine { heaviest, longest, .. } = all;
        Ok(Machine { heaviest, longest, ..Machine::of(sweep.strategy, &parameters)? })
    }

    pub(crate) fn count(&self) -> usize {
        self.sets.len()
    }

    /// Side and size of a set.
    pub(crate) fn detail(&self, set: usize) -> Detail {
        let o = self.overlays.get(set).copied().unwrap_or(Overlay::NONE);
        [self.sets[set].side, o.target, o.leverage, o.volatility_row]
    }

    /// Words of a run of sets, padded to whole tiles.
    pub(crate) fn words(&self, sets: Range<usize>) -> Vec<u32> {
        let mut words = vec![0; sets.len().next_multiple_of(TILE) * SET_WORDS];
        let padding = Words { a: 0, b: 0, threshold_a: 0, threshold_b: 0, first: 0, side: LONG };
        words.par_chunks_exact_mut(SET_WORDS).enumerate().with_min_len(4096).for_each(|(i, out)| {
            let set = sets.start + i;
            let w = if set < sets.end { self.sets[set] } else { padding };
            let o = self.overlays.get(set).filter(|_| set < sets.end).copied().unwrap_or(Overlay::NONE);
            out[..6].copy_from_slice(&[w.a, w.b, w.threshold_a, w.threshold_b, w.first, w.side]);
            out[6..13].copy_from_slice(&[o.target, o.leverage, o.volatility_row, o.stop_loss, o.take_profit, o.trailing_stop, o.max_holding]);
        });
        words
    }
}

/// Size and stops of a set: the next words that the kernels read.
#[derive(Clone, Copy)]
struct Overlay {
    target: u32,
    leverage: u32,
    volatility_row: u32,
    stop_loss: u32,
    take_profit: u32,
    trailing_stop: u32,
    max_holding: u32,
}

impl Overlay {
    const NONE: Overlay = {
        let far = NO_STOP.to_bits();
        Overlay { target: 0, leverage: 0, volatility_row: OFF, stop_loss: far, take_profit: far, trailing_stop: far, max_holding: OFF }
    };

    fn stops(&self) -> bool {
        [self.stop_loss, self.take_profit, self.trailing_stop].iter().any(|&x| x != NO_STOP.to_bits()) || self.max_holding != OFF
    }
}

/// Sizes and stops of all sets, and the windows of their volatility table; a sized set also waits for its window.
fn overlays<'a>(strategy: Strategy, optional: &dyn Fn(&'static str) -> Option<Column<'a>>, sets: &mut [Words]) -> Result<(Vec<Overlay>, Vec<u32>)> {
    let names = ["stop_loss", "take_profit", "trailing_stop", "max_holding", "target_vol"];
    if names.iter().all(|name| optional(name).is_none()) {
        return Ok((Vec::new(), Vec::new()));
    }
    let mut overlays = vec![Overlay::NONE; sets.len()];
    for (i, name) in names.into_iter().take(3).enumerate() {
        let Some(stop) = optional(name) else { continue };
        for (set, o) in overlays.iter_mut().enumerate() {
            let x = stop.real(set, |x| (0.0..1e6).contains(&x), "give a fraction of the price such as 0.05, or 0 for none")?;
            *[&mut o.stop_loss, &mut o.take_profit, &mut o.trailing_stop][i] = if x > 0.0 { x } else { NO_STOP }.to_bits();
        }
    }
    if let Some(holding) = optional("max_holding") {
        for (set, o) in overlays.iter_mut().enumerate() {
            let n = holding.whole(set, 0)?;
            o.max_holding = if n > 0 { n } else { OFF };
        }
    }
    let Some(target) = optional("target_vol") else { return Ok((overlays, Vec::new())) };
    let needed = |name: &'static str| {
        optional(name).ok_or_else(|| Error::Shape { op: OP, arg: "parameters".into(), expected: format!("'{name}' beside 'target_vol'"), got: "none".into() })
    };
    let (window, leverage) = (needed("vol_window")?.wholes(2)?, needed("max_leverage")?);
    let (windows, rows) = rows_of_periods(&window, 0);
    let momentum = strategy == Strategy::TsMomentum;
    let help = if momentum { "give a positive number" } else { "give a positive number, or 0 for no target" };
    for (set, (o, words)) in overlays.iter_mut().zip(sets).enumerate() {
        let v = target.real(set, |x| x > 0.0 || (x == 0.0 && !momentum), help)?;
        let m = leverage.real(set, |x| x > 0.0, "give a positive number")?;
        if v > 0.0 {
            (o.target, o.leverage, o.volatility_row) = (v.to_bits(), m.to_bits(), rows[window[set] as usize]);
            words.first = words.first.max(window[set]);
        }
    }
    Ok((overlays, windows))
}
