//! Two price series on their common times: a spot and a future, for hedge ratios.
//!
//! A leg is a column of a file, of one symbol or contract where the file has several, or the middle of its bid and ask. Prices may be negative (crude oil
//! once was): then changes can be had, returns cannot.

use std::collections::BTreeMap;
use std::path::Path;

use super::calendar::{DAY, format};
use super::options::Crossed;
use super::table::Table;
use crate::{Error, Result};

/// Where the price of a leg stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LegPrice<'a> {
    /// In this column.
    Column(&'a str),
    /// Half way from `bid` to `ask`; rows without both are left out.
    Mid,
}

/// One series of a file.
#[derive(Debug, Clone, Copy)]
pub struct Leg<'a> {
    /// CSV, plain or gzipped.
    pub path: &'a Path,
    /// Its `symbol`, `contract` or `ticker`, where the file has such a column.
    pub symbol: Option<&'a str>,
    /// Its price.
    pub price: LegPrice<'a>,
    /// What to do with a bid above its ask.
    pub crossed: Crossed,
}

/// Prices at the times that both legs have.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SpotFutures {
    /// Times, unix seconds, ascending.
    pub times: Vec<i64>,
    /// Spot prices.
    pub spot: Vec<f64>,
    /// Futures prices.
    pub futures: Vec<f64>,
    /// Times that only the spot has.
    pub only_spot: usize,
    /// Times that only the future has.
    pub only_futures: usize,
}

impl SpotFutures {
    /// The times of day from `open` up to, not including, `close`, in seconds after midnight UTC: the session in which both trade.
    pub fn session(&self, open: i64, close: i64) -> SpotFutures {
        let inside: Vec<usize> = (0..self.times.len()).filter(|&i| (open..close).contains(&self.times[i].rem_euclid(DAY))).collect();
        let of = |x: &[f64]| inside.iter().map(|&i| x[i]).collect();
        SpotFutures { times: inside.iter().map(|&i| self.times[i]).collect(), spot: of(&self.spot), futures: of(&self.futures), ..self.clone() }
    }

    /// Changes of spot and future from each time to the next.
    pub fn changes(&self) -> (Vec<f64>, Vec<f64>) {
        let change = |x: &[f64]| x.windows(2).map(|w| w[1] - w[0]).collect();
        (change(&self.spot), change(&self.futures))
    }

    /// Simple returns of spot and future from each time to the next.
    /// # Errors
    /// `Parameter` naming the time of a price that is not positive.
    pub fn returns(&self) -> Result<(Vec<f64>, Vec<f64>)> {
        for (name, x) in [("spot", &self.spot), ("futures", &self.futures)] {
            if let Some(i) = x.iter().position(|&x| x <= 0.0) {
                let help = "a return needs positive prices; use the changes, or cut the series".into();
                return Err(Error::Parameter { op: "returns", name: format!("{name} at {}", format(self.times[i], true)), value: x[i].to_string(), help });
            }
        }
        let simple = |x: &[f64]| x.windows(2).map(|w| w[1] / w[0] - 1.0).collect();
        Ok((simple(&self.spot), simple(&self.futures)))
    }
}

/// Reads two legs and joins them on time.
/// # Errors
/// `Io`; `Data` with file, row, column and value for a missing column, a cell that is no number, a crossed quote, a time that stands twice, or fewer than
/// two common times; `Unknown` for a symbol that the file lacks.
pub fn read_spot_futures(spot: &Leg<'_>, futures: &Leg<'_>) -> Result<SpotFutures> {
    let (first, second) = (read_leg(spot)?, read_leg(futures)?);
    let mut joined = SpotFutures::default();
    for (&time, &price) in &first {
        if let Some(&other) = second.get(&time) {
            joined.times.push(time);
            joined.spot.push(price);
            joined.futures.push(other);
        }
    }
    (joined.only_spot, joined.only_futures) = (first.len() - joined.times.len(), second.len() - joined.times.len());
    if joined.times.len() < 2 {
        let message = format!("only {} of its {} times are also among the {} of {}", joined.times.len(), first.len(), second.len(), futures.path.display());
        return Err(super::data_error(&spot.path.display().to_string(), message, "two common times at least are needed; check both time zones".into()));
    }
    Ok(joined)
}

fn read_leg(leg: &Leg<'_>) -> Result<BTreeMap<i64, f64>> {
    let mut table = Table::open(leg.path)?;
    let time = table.needed(&["ts_utc", "date", "time", "ts"])?;
    let symbol = table.column(&["symbol", "contract", "ticker", "asset", "instrument"]);
    let name = leg.symbol.map(str::to_owned);
    if leg.symbol.is_some() && symbol.is_none() {
        table.needed(&["symbol", "contract"])?;
    }
    let columns = match leg.price {
        LegPrice::Column(name) => (table.needed(&[&name.to_lowercase()])?, None),
        LegPrice::Mid => (table.needed(&["bid"])?, Some(table.needed(&["ask"])?)),
    };
    let (mut prices, mut known) = (BTreeMap::new(), Vec::new());
    while table.next()?.is_some() {
        if let (Some(column), Some(wanted)) = (symbol, &name) {
            let have = table.words(column);
            if have != *wanted {
                if !known.contains(&have) {
                    known.push(have);
                }
                continue;
            }
        }
        let Some(first) = table.number(columns.0)? else { continue };
        let price = match columns.1 {
            None => first,
            Some(ask) => {
                let Some(second) = table.number(ask)? else { continue };
                if first > second && leg.crossed == Crossed::Drop {
                    continue;
                }
                if first > second {
                    return Err(table.wrong(columns.0, &format!("the bid is above the ask {second}"), "correct the row or drop it"));
                }
                0.5 * (first + second)
            }
        };
        let at = table.time(time)?;
        if prices.insert(at, price).is_some() {
            return Err(table.wrong(time, "this time stands twice", "keep one row per time; name the symbol where the file has several"));
        }
    }
    match name {
        Some(given) if prices.is_empty() => {
            let suggestion = super::nearest(&given, known.iter().map(String::as_str));
            Err(Error::Unknown { kind: "symbol", given, suggestion, known })
        }
        _ => Ok(prices),
    }
}
