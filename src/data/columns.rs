//! Which column is what: the time, the symbol, the price, the open, or one asset each.

use super::{ReadOptions, data_error, nearest};
use crate::{Error, Result};

const TIME_NAMES: [&str; 15] =
    ["date", "datetime", "date_time", "timestamp", "time", "ts", "ts_utc", "ts_ny", "trade_date", "day", "week", "month", "quarter", "year", "index"];
pub(super) const SYMBOL_NAMES: [&str; 5] = ["symbol", "ticker", "asset", "contract", "instrument"];
/// Columns of a bar: two of them, or `close` alone, and no symbol column make a file of a single asset.
const BAR_NAMES: [&str; 9] = ["open", "high", "low", "close", "adj_close", "volume", "vwap", "bid", "ask"];
const SHOWN: usize = 30;

/// The columns of one file by index.
#[derive(Debug)]
pub(super) struct Columns {
    /// Header names, trimmed.
    pub(super) names: Vec<String>,
    pub(super) time: usize,
    pub(super) layout: Layout,
}

#[derive(Debug)]
pub(super) enum Layout {
    /// One column per asset.
    Wide { assets: Vec<usize> },
    /// One row per symbol and time; no symbol column means a single asset.
    Long { symbol: Option<usize>, price: usize, open: Option<Open> },
}

/// Where opens come from: the column, and the raw close if the price is an adjusted close.
#[derive(Debug, Clone, Copy)]
pub(super) struct Open {
    pub(super) column: usize,
    pub(super) raw_close: Option<usize>,
}

impl Columns {
    /// Finds the columns by name. `temporal` is the one column of a date or time type, where the format knows types.
    pub(super) fn resolve(file: &str, names: Vec<String>, temporal: Option<usize>, options: &ReadOptions) -> Result<Self> {
        let names: Vec<String> = names.into_iter().map(|name| name.trim().to_owned()).collect();
        let keys: Vec<String> = names.iter().map(|name| key(name)).collect();
        let find = |wanted: &str| keys.iter().position(|k| *k == key(wanted));
        let time = match &options.time_column {
            Some(wanted) => find(wanted).ok_or_else(|| no_column(file, wanted, "time column", "--time-column NAME", &names, &[]))?,
            None => time_column(&keys)
                .or(temporal)
                .ok_or_else(|| data_error(file, format!("no time column among: {}", list(&names, &[])), "name it with --time-column NAME".into()))?,
        };
        let symbol = SYMBOL_NAMES.iter().find_map(|name| find(name)).filter(|&c| c != time);
        let wanted = options.price.as_deref().unwrap_or("close");
        let price = find(wanted).filter(|&c| c != time && Some(c) != symbol);
        let bar_columns = BAR_NAMES.iter().filter(|name| find(name).is_some()).count();
        if symbol.is_some() || price.is_some() || bar_columns >= 2 {
            let hidden: Vec<usize> = std::iter::once(time).chain(symbol).collect();
            let price = price.ok_or_else(|| no_column(file, wanted, "price column", "--price NAME", &names, &hidden))?;
            let open = find("open").filter(|&c| c != price).and_then(|column| match keys[price].as_str() {
                "close" => Some(Open { column, raw_close: None }),
                adjusted if adjusted.starts_with("adj") => find("close").map(|close| Open { column, raw_close: Some(close) }),
                _ => None,
            });
            return Ok(Self { names, time, layout: Layout::Long { symbol, price, open } });
        }
        if let Some(price) = &options.price {
            return Err(Error::Data {
                file: file.into(),
                row: None,
                column: Some(price.clone()),
                value: None,
                message: format!("no such column: the file has no symbol column, so each column is an asset ({})", list(&names, &[time])),
                help: "leave --price out, or choose assets with --symbols".into(),
            });
        }
        let assets = wide_assets(file, &names, &keys, time)?;
        Ok(Self { names, time, layout: Layout::Wide { assets } })
    }
}

/// Names are compared without case, and with space, dash and dot as underscore: `Adj Close` is `adj_close`.
pub(super) fn key(name: &str) -> String {
    name.trim().chars().map(|c| if matches!(c, ' ' | '-' | '.') { '_' } else { c.to_ascii_lowercase() }).collect()
}

/// The exact names first, then names that start or end like a time, then the unnamed index column that data frames write.
fn time_column(keys: &[String]) -> Option<usize> {
    let like = |k: &String| ["date", "time", "ts_", "week"].iter().any(|start| k.starts_with(start)) || ["_date", "_time"].iter().any(|end| k.ends_with(end));
    TIME_NAMES
        .iter()
        .find_map(|name| keys.iter().position(|k| k == name))
        .or_else(|| keys.iter().position(like))
        .or_else(|| keys.iter().position(|k| k == "__index_level_0__"))
        .or_else(|| keys.first().filter(|k| is_unnamed(k)).map(|_| 0))
}

fn is_unnamed(key: &str) -> bool {
    key.is_empty() || key.starts_with("unnamed:")
}

fn wide_assets(file: &str, names: &[String], keys: &[String], time: usize) -> Result<Vec<usize>> {
    let assets: Vec<usize> = (0..names.len()).filter(|&c| c != time && !is_unnamed(&keys[c])).collect();
    if assets.is_empty() {
        return Err(data_error(file, "there is no price column beside the time".into(), "a wide file has one column per asset".into()));
    }
    let mut seen = std::collections::HashSet::new();
    match assets.iter().find(|&&c| !seen.insert(names[c].as_str())) {
        None => Ok(assets),
        Some(&twice) => Err(Error::Data {
            file: file.into(),
            row: None,
            column: Some(names[twice].clone()),
            value: None,
            message: "two columns have this name".into(),
            help: "rename or remove one".into(),
        }),
    }
}

fn no_column(file: &str, wanted: &str, what: &str, flag: &str, names: &[String], hidden: &[usize]) -> Error {
    let near = nearest(wanted, names.iter().enumerate().filter(|(c, _)| !hidden.contains(c)).map(|(_, name)| name.as_str()));
    let hint = near.map(|name| format!(", did you mean '{name}'?")).unwrap_or_default();
    Error::Data {
        file: file.into(),
        row: None,
        column: Some(wanted.to_owned()),
        value: None,
        message: format!("no such {what}{hint} (columns: {})", list(names, hidden)),
        help: format!("choose one with {flag}"),
    }
}

/// The column names for a message, cut where there are many.
pub(super) fn list(names: &[String], hidden: &[usize]) -> String {
    let shown: Vec<&str> = names.iter().enumerate().filter(|(c, _)| !hidden.contains(c)).map(|(_, name)| name.as_str()).collect();
    if shown.len() <= SHOWN { shown.join(", ") } else { format!("{}, … {} in all", shown[..SHOWN].join(", "), shown.len()) }
}
