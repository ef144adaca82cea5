//! Series of different lengths onto one calendar, and what becomes of the cells without a price.

use ndarray::Array2;

use super::calendar::format_short;
use super::series::Series;
use super::{Dropped, Missing, data_error};
use crate::{Error, Result};

/// The part of `Prices` that alignment decides.
pub(super) struct Panel {
    pub(super) symbols: Vec<String>,
    pub(super) times: Vec<i64>,
    pub(super) close: Array2<f32>,
    pub(super) open: Option<Array2<f32>>,
    pub(super) dropped: Vec<Dropped>,
    pub(super) filled: Vec<(String, usize)>,
    pub(super) notes: Vec<String>,
}

/// Gaps that `--missing fill` bridges when no limit is given.
pub(super) const SHORT_GAP: usize = 5;

/// One asset on the calendar.
struct Column {
    series: Series,
    /// Prices `[T]`, NaN where missing.
    price: Vec<f32>,
    filled: usize,
}

/// Puts the series on the union of their times and applies the policy.
pub(super) fn align(series: Vec<Series>, missing: Missing, price_column: &str) -> Result<Panel> {
    let mut notes = Vec::new();
    let times = calendar(&series, missing, &mut notes);
    let files = distinct_files(&series);
    if times.len() < 2 {
        let found = times.first().map_or_else(|| "no bar".to_owned(), |&time| format!("only one bar ({})", format_short(time)));
        let message = format!("{found} with a price is left, returns need at least 2");
        return Err(data_error(&files, message, "widen --from/--to, or use a file with more rows".into()));
    }
    let columns: Vec<Column> = series
        .into_iter()
        .map(|series| {
            let price = on_calendar(&times, &series.times, &series.price);
            Column { series, price, filled: 0 }
        })
        .collect();
    let (columns, dropped) = match missing {
        Missing::Error => (refuse_missing(columns, &times, price_column)?, Vec::new()),
        Missing::Drop => {
            let mut short = 0;
            let split = split(columns, |column| {
                let reason = missing_reason(&column.price, &times)?;
                short += usize::from(fill(column, SHORT_GAP, &times).is_none());
                Some(reason)
            });
            if short > 0 {
                notes.push(format!("{short} of the dropped symbols would be kept by --missing fill:{SHORT_GAP} (no gap of more than {SHORT_GAP} bars)"));
            }
            split
        }
        Missing::Fill { limit } => split(columns, |column| fill(column, limit, &times)),
    };
    if columns.is_empty() {
        return Err(none_left(&files, missing, &dropped, &times));
    }
    let open = open_panel(&columns, &times, &mut notes);
    Ok(Panel {
        close: Array2::from_shape_fn((times.len(), columns.len()), |(t, n)| columns[n].price[t]),
        open,
        filled: columns.iter().filter(|column| column.filled > 0).map(|column| (column.series.symbol.clone(), column.filled)).collect(),
        symbols: columns.into_iter().map(|column| column.series.symbol).collect(),
        times,
        dropped,
        notes,
    })
}

/// The union of all times. `Drop` leaves out times at which nothing has a price, `Fill` those before the first price.
fn calendar(series: &[Series], missing: Missing, notes: &mut Vec<String>) -> Vec<i64> {
    let union = |only_priced: bool| {
        let rows = series.iter().flat_map(|s| s.times.iter().zip(&s.price));
        let mut times: Vec<i64> = rows.filter(|(_, price)| !only_priced || !price.is_nan()).map(|(&time, _)| time).collect();
        times.sort(); // stable sort: the rows are a few sorted runs, which it merges
        times.dedup();
        times
    };
    let mut times = union(missing == Missing::Drop);
    let all = if missing == Missing::Drop { union(false).len() } else { times.len() };
    if let Missing::Fill { .. } = missing {
        let priced = series.iter().filter_map(|s| s.price.iter().position(|p| !p.is_nan()).map(|at| s.times[at]));
        let first = priced.min().unwrap_or(i64::MAX);
        times.retain(|&time| time >= first);
    }
    if all > times.len() {
        notes.push(format!("{} of {all} bars left out: no selected symbol has a price there", all - times.len()));
    }
    times
}

/// Values at the times of the calendar, NaN where the series has none. Both are increasing, and every time is in the calendar or left out of it.
fn on_calendar(calendar: &[i64], times: &[i64], values: &[f32]) -> Vec<f32> {
    let mut at = 0;
    calendar
        .iter()
        .map(|&time| {
            while times.get(at).is_some_and(|&t| t < time) {
                at += 1;
            }
            if times.get(at) == Some(&time) { values[at] } else { f32::NAN }
        })
        .collect()
}

/// `163 of 3201 bars missing, first 2013-05-02`; `None` if complete.
fn missing_reason(price: &[f32], times: &[i64]) -> Option<String> {
    let first = price.iter().position(|p| p.is_nan())?;
    let count = price.iter().filter(|p| p.is_nan()).count();
    Some(format!("{count} of {} bars missing, first {}", times.len(), format_short(times[first])))
}

/// Keeps the columns without a reason to drop them.
fn split(columns: Vec<Column>, mut reason: impl FnMut(&mut Column) -> Option<String>) -> (Vec<Column>, Vec<Dropped>) {
    let (mut kept, mut dropped) = (Vec::new(), Vec::new());
    for mut column in columns {
        match reason(&mut column) {
            None => kept.push(column),
            Some(reason) => dropped.push(Dropped { symbol: column.series.symbol, reason }),
        }
    }
    (kept, dropped)
}

/// Repeats the last price over gaps of at most `limit` bars, or says why not.
fn fill(column: &mut Column, limit: usize, times: &[i64]) -> Option<String> {
    let reason = missing_reason(&column.price, times)?;
    if column.price[0].is_nan() {
        let start = column.price.iter().position(|p| !p.is_nan());
        return Some(match start {
            None => reason,
            Some(at) => format!("{reason}; starts {}", format_short(times[at])),
        });
    }
    let mut t = 0;
    while t < times.len() {
        if !column.price[t].is_nan() {
            t += 1;
            continue;
        }
        let gap = column.price[t..].iter().take_while(|p| p.is_nan()).count();
        if gap > limit {
            return Some(format!("{reason}; a gap of {gap} bars from {}, more than {limit}", format_short(times[t])));
        }
        let last = column.price[t - 1];
        column.price[t..t + gap].fill(last);
        column.filled += gap;
        t += gap;
    }
    None
}

/// The columns if they are complete, else the first missing cell and what can be done.
fn refuse_missing(columns: Vec<Column>, times: &[i64], price_column: &str) -> Result<Vec<Column>> {
    let first = columns.iter().enumerate().filter_map(|(n, column)| Some((column.price.iter().position(|p| p.is_nan())?, n))).min();
    let Some((t, n)) = first else { return Ok(columns) };
    let Series { symbol, file, first_empty, wide, .. } = &columns[n].series;
    let cells: usize = columns.iter().map(|column| column.price.iter().filter(|p| p.is_nan()).count()).sum();
    let symbols = columns.iter().filter(|column| column.price.iter().any(|p| p.is_nan())).count();
    let message = format!(
        "{symbol} has no price on {}; {cells} of {} cells are missing, in {symbols} of {} symbols",
        format_short(times[t]),
        times.len() * columns.len(),
        columns.len()
    );
    // Where every symbol has started, if that is not the first bar and leaves something.
    let starts: Option<Vec<usize>> = columns.iter().map(|column| column.price.iter().position(|p| !p.is_nan())).collect();
    let start = starts.and_then(|starts| starts.into_iter().max()).filter(|&t| t > 0 && t + 1 < times.len());
    let late = start.map(|t| format!(", or start where all have begun with --from {}", format_short(times[t]))).unwrap_or_default();
    Err(Error::Data {
        file: file.clone(),
        row: first_empty.filter(|&(time, _)| time == times[t]).map(|(_, row)| row),
        column: Some(if *wide { symbol.clone() } else { price_column.to_owned() }),
        value: None,
        message,
        help: format!(
            "use --missing drop (leaves incomplete symbols out), --missing fill:5 (repeats the last price over short gaps), --symbols to choose{late}"
        ),
    })
}

fn none_left(files: &str, missing: Missing, dropped: &[Dropped], times: &[i64]) -> Error {
    let example = dropped.first().map(|d| format!(" ({}: {})", d.symbol, d.reason)).unwrap_or_default();
    let message = format!("no asset is left with --missing {missing}: none of the {} selected covers all {} bars{example}", dropped.len(), times.len());
    data_error(files, message, "choose symbols that trade on the same days with --symbols, or cut the range with --from/--to".into())
}

/// The opens, if every kept asset has a valid one wherever it has a price of its own; a filled bar opens at the filled price.
fn open_panel(columns: &[Column], times: &[i64], notes: &mut Vec<String>) -> Option<Array2<f32>> {
    let with_opens = columns.iter().filter(|column| column.series.open.is_some()).count();
    if with_opens == 0 {
        return None;
    }
    let mut left_out = |why: String| {
        notes.push(format!("opens left out: {why}"));
        None
    };
    if let Some(without) = columns.iter().find(|column| column.series.open.is_none()) {
        return left_out(format!("{} has none", without.series.symbol));
    }
    let mut open = Array2::zeros((times.len(), columns.len()));
    let (mut invalid, mut first) = (0usize, None);
    for (n, column) in columns.iter().enumerate() {
        let series = &column.series;
        let opens = on_calendar(times, &series.times, series.open.as_deref().unwrap_or_default());
        let prices = on_calendar(times, &series.times, &series.price);
        for t in 0..times.len() {
            open[[t, n]] = if prices[t].is_nan() { column.price[t] } else { opens[t] };
            if open[[t, n]].is_nan() {
                invalid += 1;
                first.get_or_insert_with(|| format!("{} on {}", series.symbol, format_short(times[t])));
            }
        }
    }
    if let Some(first) = first {
        return left_out(format!("{invalid} of them are missing or not positive, first {first}"));
    }
    if columns.iter().any(|column| column.series.scaled_open) {
        notes.push("opens are scaled by adjusted / raw close, to go with the adjusted prices".into());
    }
    Some(open)
}

fn distinct_files(series: &[Series]) -> String {
    let mut files: Vec<&str> = series.iter().map(|s| s.file.as_str()).collect();
    files.dedup();
    files.join(", ")
}
