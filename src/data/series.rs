//! One checked price series per symbol, collected row by row from all files.

use std::collections::{HashMap, HashSet};

use super::calendar::{format_short, parse};
use super::{ReadOptions, data_error, nearest, parameter};
use crate::{Error, Result};

const POSITIVE: &str = "log and simple returns need positive prices; use another column, drop the symbol with --symbols, or cut the range with --from/--to";
const SORTED: &str = "sort the file by time, oldest first, one row per time; several assets in one file need a symbol column";
/// Unknown symbols are answered with the whole list where it is this short.
const LISTED: usize = 20;

/// The rows of one symbol: times strictly increasing, prices positive or NaN where missing.
#[derive(Debug)]
pub(super) struct Series {
    pub(super) symbol: String,
    /// File that it (first) came from.
    pub(super) file: String,
    pub(super) times: Vec<i64>,
    pub(super) price: Vec<f32>,
    /// NaN where missing or invalid; `None` where the file has no opens to go with the price.
    pub(super) open: Option<Vec<f32>>,
    /// Opens were scaled to an adjusted close.
    pub(super) scaled_open: bool,
    /// Time and row of the first cell that is there but empty.
    pub(super) first_empty: Option<(i64, u64)>,
    pub(super) wide: bool,
}

/// What the current file is like.
struct Current {
    file: String,
    wide: bool,
    has_open: bool,
    scaled_open: bool,
}

/// Takes rows from the readers, keeps those selected, and checks them.
pub(super) struct Collector<'a> {
    selected: Option<&'a [String]>,
    from: i64,
    to: i64,
    current: Current,
    /// Symbols of the current file, with the series of those selected.
    slots: HashMap<Vec<u8>, Option<usize>>,
    last_slot: (Vec<u8>, Option<usize>),
    series: Vec<Series>,
    /// All symbols of all files, selected or not, in order and for look-up.
    known: Vec<String>,
    known_set: HashSet<Vec<u8>>,
    /// First and last time of the selected symbols, whether in the range or not.
    covered: Option<(i64, i64)>,
    /// Name of the price column, from the first long file.
    pub(super) price_column: Option<String>,
    /// Any finite number is a price.
    pub(super) any_sign: bool,
}

impl<'a> Collector<'a> {
    pub(super) fn new(selected: Option<&'a [String]>, from: i64, to: i64) -> Self {
        Self {
            selected,
            from,
            to,
            current: Current { file: String::new(), wide: false, has_open: false, scaled_open: false },
            slots: HashMap::new(),
            last_slot: (Vec::new(), None),
            series: Vec::new(),
            known: Vec::new(),
            known_set: HashSet::new(),
            covered: None,
            price_column: None,
            any_sign: false,
        }
    }

    pub(super) fn start_file(&mut self, file: &str, wide: bool, has_open: bool, scaled_open: bool) {
        self.current = Current { file: file.to_owned(), wide, has_open, scaled_open };
        self.slots.clear();
        self.last_slot = (Vec::new(), None);
    }

    /// The series of a symbol of the current file; `None` if it is not selected.
    pub(super) fn slot(&mut self, symbol: &[u8], row: u64, column: &str) -> Result<Option<usize>> {
        // Files sorted by symbol ask for the same one again and again.
        if !symbol.is_empty() && symbol == self.last_slot.0.as_slice() {
            return Ok(self.last_slot.1);
        }
        let slot = match self.slots.get(symbol) {
            Some(&slot) => slot,
            None => self.new_slot(symbol, row, column)?,
        };
        self.last_slot.0.clear();
        self.last_slot.0.extend_from_slice(symbol);
        self.last_slot.1 = slot;
        Ok(slot)
    }

    fn new_slot(&mut self, symbol: &[u8], row: u64, column: &str) -> Result<Option<usize>> {
        let name = String::from_utf8_lossy(symbol).into_owned();
        if name.is_empty() {
            return Err(self.cell_error(row, column, None, "the symbol is empty".into(), "fill it in or remove the row".into()));
        }
        let slot = self.selected.is_none_or(|list| list.contains(&name)).then_some(self.series.len());
        if slot.is_some() {
            self.series.push(Series {
                symbol: name.clone(),
                file: self.current.file.clone(),
                times: Vec::new(),
                price: Vec::new(),
                open: self.current.has_open.then(Vec::new),
                scaled_open: self.current.scaled_open,
                first_empty: None,
                wide: self.current.wide,
            });
        }
        if !self.known_set.contains(symbol) {
            self.known_set.insert(symbol.to_vec());
            self.known.push(name);
        }
        self.slots.insert(symbol.to_vec(), slot);
        Ok(slot)
    }

    /// Whether the time is in the range that was asked for.
    pub(super) fn in_range(&mut self, time: i64) -> bool {
        self.covered = Some(self.covered.map_or((time, time), |(first, last)| (first.min(time), last.max(time))));
        (self.from..=self.to).contains(&time)
    }

    /// Adds a bar that is in the range. A price of `None` is missing; an open that is no valid price is kept as NaN.
    pub(super) fn push(&mut self, slot: usize, time: i64, price: Option<f64>, open: Option<f64>, row: u64, column: &str) -> Result<()> {
        let price = match price {
            None => f32::NAN,
            Some(value) if self.any_sign && (value as f32).is_finite() => value as f32,
            Some(value) => check_price(value).map_err(|(message, help)| {
                let message = format!("{} on {}: {message}", self.series[slot].symbol, format_short(time));
                self.cell_error(row, column, Some(value.to_string()), message, help.into())
            })?,
        };
        let wide = self.current.wide;
        let series = &mut self.series[slot];
        if let Some(&last) = series.times.last().filter(|&&last| last >= time) {
            let whose = if wide { String::new() } else { format!(" of {}", series.symbol) };
            let message = if last == time {
                format!("the time {}{whose} is there twice", format_short(time))
            } else {
                format!("the time {}{whose} comes after {}", format_short(time), format_short(last))
            };
            return Err(Error::Data { file: self.current.file.clone(), row: Some(row), column: None, value: None, message, help: SORTED.into() });
        }
        if price.is_nan() && series.first_empty.is_none() {
            series.first_empty = Some((time, row));
        }
        series.times.push(time);
        series.price.push(price);
        if let Some(opens) = &mut series.open {
            opens.push(open.and_then(|value| check_price(value).ok()).unwrap_or(f32::NAN));
        }
        Ok(())
    }

    /// An error about one cell of the current file.
    pub(super) fn cell_error(&self, row: u64, column: &str, value: Option<String>, message: String, help: String) -> Error {
        Error::Data { file: self.current.file.clone(), row: Some(row), column: Some(column.to_owned()), value, message, help }
    }

    /// The series of all files, one per symbol, in the order asked for.
    pub(super) fn finish(mut self, options: &ReadOptions, sources: &[String]) -> Result<Vec<Series>> {
        for symbol in self.selected.unwrap_or_default() {
            if !self.known_set.contains(symbol.as_bytes()) {
                let suggestion = nearest(symbol, self.known.iter().map(String::as_str));
                let known = if self.known.len() <= LISTED { self.known } else { Vec::new() };
                return Err(Error::Unknown { kind: "symbol", given: symbol.clone(), suggestion, known });
            }
        }
        if self.series.iter().all(|series| series.times.is_empty()) {
            return Err(self.nothing_left(options, sources));
        }
        let mut merged: Vec<Series> = Vec::new();
        let mut position: HashMap<String, usize> = HashMap::new();
        for series in std::mem::take(&mut self.series) {
            match position.get(&series.symbol) {
                None => {
                    position.insert(series.symbol.clone(), merged.len());
                    merged.push(series);
                }
                Some(&at) => merged[at].append(series)?,
            }
        }
        if let Some(list) = self.selected {
            merged.sort_by_key(|series| list.iter().position(|symbol| *symbol == series.symbol));
        }
        Ok(merged)
    }

    fn nothing_left(&self, options: &ReadOptions, sources: &[String]) -> Error {
        let Some((first, last)) = self.covered else {
            return data_error(&sources.join(", "), "no rows below the header".into(), "at least 2 rows of prices are needed".into());
        };
        let (name, value) = match (&options.from, &options.to) {
            (Some(from), Some(to)) => ("--from/--to", format!("{from} to {to}")),
            (Some(from), None) => ("--from", from.clone()),
            (None, to) => ("--to", to.clone().unwrap_or_default()),
        };
        parameter(name, &value, &format!("no bar is left; the files cover {} to {}", format_short(first), format_short(last)))
    }
}

impl Series {
    /// Joins the rows of the same symbol from a later file.
    fn append(&mut self, other: Self) -> Result<()> {
        let column = Some(self.symbol.clone());
        let clash = |message: String, help: &str| Error::Data { file: other.file.clone(), row: None, column, value: None, message, help: help.into() };
        if self.wide || other.wide {
            return Err(clash(format!("{} has this symbol too", self.file), "wide files are joined on time and must not share a symbol; rename or remove one"));
        }
        let n = self.times.len();
        let time = |i: usize| if i < n { self.times[i] } else { other.times[i - n] };
        let mut order: Vec<usize> = (0..n + other.times.len()).collect();
        order.sort_by_key(|&i| time(i)); // stable and fast on two sorted runs
        if let Some(pair) = order.windows(2).find(|pair| time(pair[0]) == time(pair[1])) {
            let message = format!("{} has {} in {} too", self.symbol, format_short(time(pair[0])), self.file);
            return Err(clash(message, "files of the same symbols must not overlap in time; remove one, or cut the range with --from/--to"));
        }
        let price = |i: usize| if i < n { self.price[i] } else { other.price[i - n] };
        let open = match (&self.open, &other.open) {
            (Some(a), Some(b)) => Some(order.iter().map(|&i| if i < n { a[i] } else { b[i - n] }).collect()),
            _ => None,
        };
        let prices = order.iter().map(|&i| price(i)).collect();
        self.times = order.iter().map(|&i| time(i)).collect();
        self.price = prices;
        self.open = open;
        // A row number would point into the wrong file.
        self.first_empty = None;
        Ok(())
    }
}

/// A positive normal f32, or what is wrong and what to do.
fn check_price(value: f64) -> std::result::Result<f32, (&'static str, &'static str)> {
    if !value.is_finite() {
        return Err(("the price is not finite", "correct the file, or cut the row away with --symbols or --from/--to"));
    }
    if value <= 0.0 {
        return Err(("the price is not positive", POSITIVE));
    }
    let single = value as f32;
    if single.is_normal() {
        Ok(single)
    } else {
        Err(("the price is outside the range of 32-bit floats (1.2e-38 to 3.4e38)", "rescale the prices, or leave the symbol out with --symbols"))
    }
}

/// Reads the text of a time cell.
pub(super) fn time_of(text: &[u8]) -> Option<i64> {
    parse(text).map(|stamp| stamp.seconds)
}

/// Name of a single asset: the file's name without directory and endings.
pub(super) fn stem(file: &str) -> String {
    let mut name = std::path::Path::new(file).file_name().map_or_else(|| file.to_owned(), |name| name.to_string_lossy().into_owned());
    for ending in [".gz", ".csv", ".tsv", ".txt", ".parquet", ".pq"] {
        let cut = name.len().saturating_sub(ending.len());
        if cut > 0 && name.is_char_boundary(cut) && name[cut..].eq_ignore_ascii_case(ending) {
            name.truncate(cut);
        }
    }
    name
}
