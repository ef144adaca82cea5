//! Price files in, a validated panel out: CSV, CSV.gz and Parquet, wide or long, aligned on one calendar.
//!
//! Flow     path → `csv` or `parquet` (rows) → `columns` (which column is what) → `series` (one checked series per symbol)
//!          → `panel` (union calendar, missing cells) → [`Prices`].
//! Wide     `date,AAA,BBB,…`: one column per symbol.
//! Long     one row per symbol and time, with a column `symbol`, `ticker`, `asset`, `contract` or `instrument`; other columns in any order.
//! Single   open/high/low/close columns and no symbol column: one asset, named after the file.
//! Times    unix seconds. A text with a zone is converted to UTC, a clock without one is kept as it stands (`ts_ny` stays New York time).
//! Checked  every price that is selected: finite, positive, a normal f32. What `from`, `to` and `symbols` leave out is not looked at,
//!          so that a defect can be cut away; a row with the wrong number of fields is always an error.
//! Bars     the union of the times of the selected symbols. Where a symbol has no price at such a time the cell is missing: see [`Missing`].

mod calendar;
mod columns;
mod csv;
pub mod options;
mod panel;
mod parquet;
mod series;
pub mod signals;
pub mod spot_futures;
mod table;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod tests;

use std::fs::File;
use std::io::{ErrorKind, Read, Seek};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ndarray::Array2;
use sha2::{Digest, Sha256};

use crate::{Error, Result};
pub use parquet::decoding;
use series::Collector;

/// A panel of prices, T bars by N assets, without a missing cell.
#[derive(Debug, Clone, PartialEq)]
pub struct Prices {
    /// Asset names `[N]`: in the order of `ReadOptions::symbols`, else of first appearance.
    pub symbols: Vec<String>,
    /// Bar times `[T]`, unix seconds, strictly increasing.
    pub times: Vec<i64>,
    /// False if every bar is at midnight, so that dates say all.
    pub has_time_of_day: bool,
    /// Prices `[T, N]`: positive, finite, normal f32.
    pub close: Array2<f32>,
    /// Opens `[T, N]`, where every kept asset has a valid one at every bar. Read from long files when the price is `close`;
    /// when it is an adjusted close (`adj…`) each open is scaled by adjusted / raw close; for any other price there are none.
    pub open: Option<Array2<f32>>,
    /// The files, as they were named.
    pub sources: Vec<String>,
    /// SHA-256 (hex) of the bytes of all files, one after the other; for one file what `sha256sum` prints.
    pub sha256: String,
    /// Assets that the missing-cell policy left out.
    pub dropped: Vec<Dropped>,
    /// Forward-filled cells of each asset that has any.
    pub filled: Vec<(String, usize)>,
    /// The column that `close` came from; `price` for wide files, which do not name it.
    pub price_column: String,
    /// Other things that a user should know: opens that were left out or scaled, bars without any price.
    pub notes: Vec<String>,
}

/// An asset that was left out, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dropped {
    /// Asset name.
    pub symbol: String,
    /// For example `163 of 3201 bars missing, first 2013-05-02`.
    pub reason: String,
}

impl Prices {
    /// Number of bars, T.
    pub fn n_bars(&self) -> usize {
        self.times.len()
    }

    /// Number of assets, N.
    pub fn n_assets(&self) -> usize {
        self.symbols.len()
    }

    /// Returns per year, derived from the times: (T − 1) / elapsed years of 365.25 days, not rounded.
    ///
    /// Daily US equities give about 251.8, calendar-day data 365.25, months 12. Gaps count as elapsed time, so
    /// a file of single days far apart gives a small number.
    ///
    /// # Errors
    /// `Parameter` if there are fewer than two bars or they span no time.
    pub fn periods_per_year(&self) -> Result<f64> {
        match self.times.as_slice() {
            [first, .., last] if last > first => Ok((self.times.len() - 1) as f64 * calendar::YEAR / (last - first) as f64),
            times => Err(Error::Parameter {
                op: "periods_per_year",
                name: "bars".into(),
                value: times.len().to_string(),
                help: "at least 2 bars at increasing times are needed".into(),
            }),
        }
    }

    /// `2013-01-02`, or `2013-01-02T14:30:00` where the bars have a time of day.
    pub fn format_time(&self, time: i64) -> String {
        calendar::format(time, self.has_time_of_day)
    }
}

/// What to do with a cell of the panel that has no price.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Missing {
    /// Refuse, naming the first missing cell and how many there are.
    #[default]
    Error,
    /// Leave out bars at which no selected asset has a price, then every asset that still misses a cell.
    Drop,
    /// Repeat the last price over gaps of at most `limit` bars (also at the end); assets with a longer gap or a late start are left out.
    /// A filled bar has a zero return and the next one carries the whole move, which lowers volatility and correlations.
    Fill {
        /// Longest gap that is filled, in bars; at least 1.
        limit: usize,
    },
}

impl FromStr for Missing {
    type Err = Error;

    /// `error`, `drop`, `fill` (at most 5 bars) or `fill:N`.
    fn from_str(text: &str) -> Result<Self> {
        match text.trim().split_once(':') {
            None if text.trim() == "error" => Ok(Self::Error),
            None if text.trim() == "drop" => Ok(Self::Drop),
            None if text.trim() == "fill" => Ok(Self::Fill { limit: panel::SHORT_GAP }),
            Some(("fill", n)) => n.parse().ok().filter(|&limit| limit > 0).map(|limit| Self::Fill { limit }).ok_or_else(|| bad_missing(text)),
            _ => Err(bad_missing(text)),
        }
    }
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Error => f.write_str("error"),
            Self::Drop => f.write_str("drop"),
            Self::Fill { limit } => write!(f, "fill:{limit}"),
        }
    }
}

fn bad_missing(text: &str) -> Error {
    parameter("--missing", text, "use error, drop, fill (gaps of at most 5 bars) or fill:N with N ≥ 1")
}

/// Which part of the files to read, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// Time column; found by its name if `None`.
    pub time_column: Option<String>,
    /// Price column of a long or single-asset file, in any case; `close` if `None`.
    pub price: Option<String>,
    /// Symbols to read, in this order; all if `None`.
    pub symbols: Option<Vec<String>>,
    /// First time to read (inclusive): a date, or a date and time.
    pub from: Option<String>,
    /// Last time to read (inclusive; a date means its whole day): a date, or a date and time.
    pub to: Option<String>,
    /// What to do with missing cells.
    pub missing: Missing,
    /// Take any finite number, of any sign, for a price: for columns that are none.
    pub any_sign: bool,
}

/// Reads price files into one panel.
///
/// Long files are put one after the other (a symbol may go on in the next file, but not repeat a time); wide files are joined on time
/// and must not share a symbol. The format is told from the content, not the name. Two bars at least must be left.
///
/// # Errors
/// `Io` if a file cannot be read; `Data` with file, row, column and value where the content is wrong (rows count from 1 and the header is
/// row 1; in Parquet, which has no header row, the first record is row 1); `Unknown` for a symbol that no file has; `Parameter` for options
/// that are wrong or leave nothing.
pub fn read_prices(paths: &[PathBuf], options: &ReadOptions) -> Result<Prices> {
    if paths.is_empty() {
        return Err(parameter("files", "", "name at least one price file"));
    }
    if options.symbols.as_ref().is_some_and(Vec::is_empty) {
        return Err(parameter("--symbols", "", "name at least one symbol, or leave it out to read all"));
    }
    let (from, to) = range(options)?;
    let mut collector = Collector::new(options.symbols.as_deref(), from, to);
    collector.any_sign = options.any_sign;
    let mut hasher = Sha256::new();
    let sources: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    for (path, name) in paths.iter().zip(&sources) {
        read_file(path, name, options, &mut collector, &mut hasher)?;
    }
    let price_column = collector.price_column.take().unwrap_or_else(|| "price".into());
    let series = collector.finish(options, &sources)?;
    let panel = panel::align(series, options.missing, &price_column)?;
    Ok(Prices {
        has_time_of_day: panel.times.iter().any(|t| t.rem_euclid(calendar::DAY) != 0),
        symbols: panel.symbols,
        times: panel.times,
        close: panel.close,
        open: panel.open,
        sources,
        sha256: hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
        dropped: panel.dropped,
        filled: panel.filled,
        price_column,
        notes: panel.notes,
    })
}

/// Tells the format by the first bytes and reads one file into the collector; all its bytes go through the hasher.
fn read_file(path: &Path, name: &str, options: &ReadOptions, collector: &mut Collector<'_>, hasher: &mut Sha256) -> Result<()> {
    let io = |error: std::io::Error| Error::Io {
        path: name.to_owned(),
        message: match error.kind() {
            ErrorKind::NotFound => "file not found; check the path".into(),
            ErrorKind::IsADirectory => "is a directory; name the file in it".into(),
            _ => error.to_string(),
        },
    };
    let mut file = File::open(path).map_err(io)?;
    let mut magic = Vec::with_capacity(4);
    file.by_ref().take(4).read_to_end(&mut magic).map_err(io)?;
    file.rewind().map_err(io)?;
    let unreadable = |what: &str| data_error(name, format!("this is {what}, not a price table"), "save it as CSV (UTF-8) or Parquet".into());
    match magic.as_slice() {
        [] => Err(data_error(name, "the file is empty".into(), "it needs a header line and at least 2 rows of prices".into())),
        b"PAR1" => parquet::read(file, name, options, collector, hasher),
        [b'P', b'K', 3, 4] => Err(unreadable("a zip or spreadsheet file")),
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => Err(unreadable("UTF-16 text")),
        [0x28, 0xB5, 0x2F, 0xFD] => Err(unreadable("a zstd file")),
        _ => csv::read(file, name, magic.starts_with(&[0x1F, 0x8B]), options, collector, hasher),
    }
}

/// `--from` and `--to` as the first and the last second that count.
fn range(options: &ReadOptions) -> Result<(i64, i64)> {
    let end = |name: &str, text: &Option<String>| match text {
        None => Ok(None),
        Some(text) => {
            calendar::parse(text.as_bytes()).map(Some).ok_or_else(|| parameter(name, text, "this is not a time; write YYYY-MM-DD or YYYY-MM-DDTHH:MM:SS"))
        }
    };
    let from = end("--from", &options.from)?.map_or(i64::MIN, |stamp| stamp.seconds);
    let to = end("--to", &options.to)?.map_or(i64::MAX, calendar::Stamp::last_second);
    if from > to {
        let (from, to) = (options.from.as_deref().unwrap_or_default(), options.to.as_deref().unwrap_or_default());
        return Err(parameter("--from", from, &format!("this is after --to {to}; swap them")));
    }
    Ok((from, to))
}

/// The known name that is most like `given`, if any is much like it: a part of the other, or a Jaro-Winkler similarity of at least 0.75.
///
/// Case does not matter; the first of equals wins.
pub fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    const ENOUGH: f64 = 0.75;
    const PART: f64 = 0.9;
    let given = given.to_lowercase();
    let mut best: Option<(f64, &str)> = None;
    for name in known {
        let lower = name.to_lowercase();
        let part = given.len().min(lower.len()) >= 3 && (lower.contains(&given) || given.contains(&lower));
        let score = strsim::jaro_winkler(&given, &lower).max(if part { PART } else { 0.0 });
        if score >= ENOUGH && best.is_none_or(|(top, _)| score > top) {
            best = Some((score, name));
        }
    }
    best.map(|(_, name)| name.to_owned())
}

fn parameter(name: &str, value: &str, help: &str) -> Error {
    Error::Parameter { op: "prices", name: name.into(), value: value.into(), help: help.into() }
}

/// An error about a file as a whole.
fn data_error(file: &str, message: String, help: String) -> Error {
    Error::Data { file: file.into(), row: None, column: None, value: None, message, help }
}
