//! Files of weights: one or many sets of target weights [T,N] for the assets and bars of a price panel, read a few sets at a time.
//!
//! npy      [T,N] or [S,T,N], f32 or f64, little-endian, C order: row t is bar t of the prices, column i their asset i.
//! Parquet  long (time, symbol, `weight`, and a column `set` where there are several) or wide (time, one column per asset, and `set`).
//!          Rows are aligned with the prices by time and symbol. The rows of a set stand together, in any order of time and symbol.
//! Timing   the weight of row t is decided at the close of bar t; the last row earns nothing.
//! Checked  every weight that is used: finite, also as f32. Rows before the first or after the last bar of the prices, and of symbols that
//!          the prices left out, are not looked at. A cell without a row holds nothing, and is counted.
//! Memory   the sets of one call and one batch of rows, whatever the file.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek};
use std::path::Path;

use ::parquet::arrow::ProjectionMask;
use ::parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use arrow_array::cast::AsArray;
use arrow_array::types::Float64Type;
use arrow_array::{Array, ArrayRef, Float64Array, StringArray};
use arrow_cast::cast;
use arrow_schema::{DataType, Schema};

use super::calendar::{TIME_HELP, format_short};
use super::columns::{Columns, Layout, SYMBOL_NAMES, key, list};
use super::parquet::{is_number, only_temporal, seconds};
use super::{Prices, ReadOptions, data_error, nearest};
use crate::{Error, Result};

const SET_NAMES: [&str; 3] = ["set", "strategy", "portfolio"];
const WEIGHT_NAMES: [&str; 4] = ["weight", "position", "target", "signal"];
const FINITE: &str = "weights are finite numbers, as shares of capital: 1 is all of it, 0 nothing, negative is short";
const BATCH: usize = 1 << 14;

/// Some sets of weights.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SignalSets {
    /// Name of each set: its index in an npy file, what the column `set` says in a Parquet file.
    pub labels: Vec<String>,
    /// Weights [S,T,N], finite.
    pub weights: Vec<f32>,
}

/// A file of weights, open for reading.
pub struct Signals<'a> {
    prices: &'a Prices,
    file: String,
    source: Source,
    absent: u64,
}

enum Source {
    Npy(Npy),
    Parquet(Box<Table>),
}

impl<'a> Signals<'a> {
    /// Opens a file of weights for the assets and bars of `prices`. Symbols of the file that the prices lack are an error, unless
    /// `some_symbols` says that only a choice of symbols was read.
    /// # Errors
    /// `Io` if it cannot be read; `Data` where its form is wrong, with both shapes where they do not match.
    pub fn open(path: &Path, prices: &'a Prices, some_symbols: bool) -> Result<Signals<'a>> {
        let name = path.display().to_string();
        let io = |error: std::io::Error| Error::Io {
            path: name.clone(),
            message: match error.kind() {
                ErrorKind::NotFound => "file not found; check the path".into(),
                ErrorKind::IsADirectory => "is a directory; name the file in it".into(),
                _ => error.to_string(),
            },
        };
        let mut file = File::open(path).map_err(io)?;
        let mut magic = Vec::with_capacity(6);
        file.by_ref().take(6).read_to_end(&mut magic).map_err(io)?;
        file.rewind().map_err(io)?;
        let source = if magic == b"\x93NUMPY" {
            Source::Npy(Npy::open(file, &name, prices)?)
        } else if magic.starts_with(b"PAR1") {
            Source::Parquet(Box::new(Table::open(file, &name, prices, some_symbols)?))
        } else {
            let message = if magic.is_empty() { "the file is empty" } else { "this is neither an npy nor a Parquet file" };
            let help = "save weights with numpy.save as [T,N] or [S,T,N], or as Parquet with columns set, time, symbol, weight";
            return Err(data_error(&name, message.into(), help.into()));
        };
        Ok(Signals { prices, file: name, source, absent: 0 })
    }

    /// Number of sets, where the file says so before it is read.
    pub fn count(&self) -> Option<u64> {
        match &self.source {
            Source::Npy(npy) => Some(npy.sets),
            Source::Parquet(_) => None,
        }
    }

    /// Cells without a row so far; they hold nothing.
    pub fn absent(&self) -> u64 {
        self.absent
    }

    /// The next sets, `most` of them or fewer at the end; none after it.
    /// # Errors
    /// `Data` naming set, row and column of a weight that is not a finite number, of a time that is no bar, of a symbol that the prices
    /// lack, of a cell that is there twice, or of a set whose rows are scattered.
    pub fn next(&mut self, most: usize) -> Result<SignalSets> {
        match &mut self.source {
            Source::Npy(npy) => npy.next(most, &self.file, self.prices),
            Source::Parquet(table) => table.next(most, &self.file, self.prices, &mut self.absent),
        }
    }
}

// ---- npy --------------------------------------------------------------------------------------------------------------

/// Longest header that is read; numpy pads its own to 64 bytes.
const HEADER: u64 = 1 << 16;

struct Npy {
    reader: BufReader<File>,
    sets: u64,
    at: u64,
    wide: bool,
    /// Only [T,N]: the one set has no number.
    single: bool,
}

impl Npy {
    fn open(file: File, name: &str, prices: &Prices) -> Result<Npy> {
        let io = |error: std::io::Error| Error::Io { path: name.to_owned(), message: error.to_string() };
        let bytes = file.metadata().map_err(io)?.len();
        let mut reader = BufReader::new(file);
        let damaged = |message: &str| data_error(name, message.into(), "write it again with numpy.save".into());
        let mut head = [0u8; 8];
        reader.read_exact(&mut head).map_err(|_| damaged("the npy header is cut short"))?;
        let width = if head[6] == 1 { 2 } else { 4 };
        let mut size = [0u8; 4];
        reader.read_exact(&mut size[..width]).map_err(|_| damaged("the npy header is cut short"))?;
        let size = u64::from(u32::from_le_bytes(size));
        if !(1..=3).contains(&head[6]) || size > HEADER {
            return Err(damaged(&format!("npy version {}.{} with a header of {size} bytes is not known", head[6], head[7])));
        }
        let mut text = vec![0u8; size as usize];
        reader.read_exact(&mut text).map_err(|_| damaged("the npy header is cut short"))?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let header = Header::parse(&text).ok_or_else(|| damaged("the npy header is not understood"))?;
        let wide = match header.descr.as_str() {
            "<f8" => true,
            "<f4" => false,
            other => {
                let help = "save numpy.asarray(weights, dtype='<f4') (or '<f8')";
                return Err(data_error(name, format!("its values are '{other}'; weights are little-endian f32 or f64"), help.into()));
            }
        };
        if header.fortran {
            return Err(data_error(name, "its values are in Fortran order".into(), "save numpy.ascontiguousarray(weights)".into()));
        }
        let (t, n) = (prices.n_bars() as u64, prices.n_assets() as u64);
        let (sets, fits) = match header.shape[..] {
            [rows, columns] => (1, (rows, columns) == (t, n)),
            [sets, rows, columns] => (sets, (rows, columns) == (t, n)),
            _ => (0, false),
        };
        if !fits {
            let turned = header.shape.ends_with(&[n, t]) && n != t;
            let help = if turned {
                "transpose it: bars are rows, assets columns"
            } else {
                "give a row per bar and a column per asset of the prices as they are read (--symbols, --from, --to and --missing change them)"
            };
            let message = format!("weights are {:?}, prices are [{t}, {n}]: [T,N] or [S,T,N] is expected", header.shape);
            return Err(data_error(name, message, help.into()));
        }
        let values = sets.checked_mul(t).and_then(|x| x.checked_mul(n)).and_then(|x| x.checked_mul(if wide { 8 } else { 4 }));
        let expected = values.and_then(|x| x.checked_add(8 + width as u64 + size));
        if expected != Some(bytes) {
            let expected = expected.map_or_else(|| "more than any file holds".into(), |x| format!("{x} bytes"));
            return Err(damaged(&format!("the file has {bytes} bytes, its header asks for {expected}")));
        }
        Ok(Npy { reader, sets, at: 0, wide, single: header.shape.len() == 2 })
    }

    fn next(&mut self, most: usize, file: &str, prices: &Prices) -> Result<SignalSets> {
        let (t, n) = (prices.n_bars(), prices.n_assets());
        let count = (self.sets - self.at).min(most as u64) as usize;
        let mut out = SignalSets { labels: (0..count as u64).map(|s| (self.at + s).to_string()).collect(), weights: Vec::with_capacity(count * t * n) };
        let mut row = vec![0u8; n * if self.wide { 8 } else { 4 }];
        for s in 0..count as u64 {
            for j in 0..t {
                self.reader.read_exact(&mut row).map_err(|error| Error::Io { path: file.into(), message: error.to_string() })?;
                let first = out.weights.len();
                if self.wide {
                    out.weights.extend(row.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b) as f32));
                } else {
                    out.weights.extend(row.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
                }
                if let Some(i) = out.weights[first..].iter().position(|w| !w.is_finite()) {
                    let at = if self.single { format!("[{j}, {i}]") } else { format!("[{}, {j}, {i}]", self.at + s) };
                    let message = format!("weights{at} ({} on {}) is {}", prices.symbols[i], format_short(prices.times[j]), out.weights[first + i]);
                    return Err(data_error(file, message, FINITE.into()));
                }
            }
        }
        self.at += count as u64;
        Ok(out)
    }
}

/// The header of an npy file: a Python dictionary with three keys.
#[derive(Debug, PartialEq)]
struct Header {
    descr: String,
    fortran: bool,
    shape: Vec<u64>,
}

impl Header {
    fn parse(text: &str) -> Option<Header> {
        let value = |name: &str| {
            let rest = [format!("'{name}'"), format!("\"{name}\"")].iter().find_map(|quoted| text.split_once(quoted.as_str()))?.1;
            rest.trim_start().strip_prefix(':').map(str::trim_start)
        };
        let descr = value("descr")?;
        let quote = descr.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
        let descr = descr[1..].split_once(quote)?.0.to_owned();
        let fortran = match value("fortran_order")? {
            yes if yes.starts_with("True") => true,
            no if no.starts_with("False") => false,
            _ => return None,
        };
        let inside = value("shape")?.strip_prefix('(')?.split_once(')')?.0;
        let shape = inside.split(',').map(str::trim).filter(|d| !d.is_empty()).map(|d| d.parse().ok()).collect::<Option<Vec<u64>>>()?;
        Some(Header { descr, fortran, shape })
    }
}

// ---- Parquet ----------------------------------------------------------------------------------------------------------

/// Which column is what.
#[derive(Debug)]
enum Form {
    /// Columns of the symbol (one asset without it) and the weight.
    Long { symbol: Option<usize>, weight: usize },
    /// Column and asset of each.
    Wide(Vec<(usize, usize)>),
}

struct Table {
    reader: ParquetRecordBatchReader,
    names: Vec<String>,
    set: Option<usize>,
    time: usize,
    form: Form,
    /// Columns of the file that are read, in order.
    wanted: Vec<usize>,
    /// Assets by symbol.
    assets: HashMap<String, usize>,
    /// Symbols that the prices left out on purpose.
    left_out: HashSet<String>,
    some_symbols: bool,
    batch: Option<Rows>,
    /// Rows of earlier batches.
    before: u64,
    current: Option<Matrix>,
    seen: HashSet<String>,
}

/// A batch of rows, decoded.
struct Rows {
    sets: Option<StringArray>,
    times: Vec<i64>,
    symbols: Option<StringArray>,
    weights: Vec<Float64Array>,
    count: usize,
    at: usize,
}

/// A set being filled; NaN where no row has been.
struct Matrix {
    label: String,
    weights: Vec<f32>,
}

impl Table {
    fn open(file: File, name: &str, prices: &Prices, some_symbols: bool) -> Result<Table> {
        let damaged = |error: &dyn std::fmt::Display| {
            data_error(name, format!("the Parquet file cannot be read ({error})"), "write it again, uncompressed or with snappy or zstd".into())
        };
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| damaged(&error))?;
        let schema = builder.schema().clone();
        let names: Vec<String> = schema.fields().iter().map(|field| field.name().trim().to_owned()).collect();
        let find = |known: &[&str]| known.iter().find_map(|wanted| names.iter().position(|name| key(name) == *wanted));
        let (set, weight) = (find(&SET_NAMES), find(&WEIGHT_NAMES).filter(|&c| is_number(schema.field(c).data_type())));
        if weight.is_none() && find(&SYMBOL_NAMES).is_some() {
            let message = format!("no column of weights among: {}", list(&names, &[]));
            return Err(data_error(name, message, "name it weight, position, target or signal".into()));
        }
        let options = ReadOptions { price: weight.map(|c| names[c].clone()), ..ReadOptions::default() };
        let columns = Columns::resolve(name, names, only_temporal(&schema), &options)?;
        let assets: HashMap<String, usize> = prices.symbols.iter().enumerate().map(|(i, symbol)| (symbol.clone(), i)).collect();
        let left_out = prices.dropped.iter().map(|d| d.symbol.clone()).collect();
        let form = match columns.layout {
            Layout::Long { symbol, price, .. } => {
                if symbol.is_none() && prices.n_assets() != 1 {
                    let message = format!("no symbol column among: {}, and the prices have {} assets", list(&columns.names, &[]), prices.n_assets());
                    return Err(data_error(name, message, "add a column named symbol, or one column per asset".into()));
                }
                Form::Long { symbol, weight: price }
            }
            Layout::Wide { assets: of_file } => {
                let of_file: Vec<usize> = of_file.into_iter().filter(|&c| Some(c) != set).collect();
                Form::Wide(wide(name, &schema, &columns.names, &of_file, prices, &assets, some_symbols)?)
            }
        };
        let mut wanted: Vec<usize> = std::iter::once(columns.time).chain(set).collect();
        match &form {
            Form::Long { symbol, weight } => wanted.extend(symbol.iter().chain([weight])),
            Form::Wide(columns) => wanted.extend(columns.iter().map(|c| c.0)),
        }
        wanted.sort_unstable();
        wanted.dedup();
        let mask = ProjectionMask::roots(builder.parquet_schema(), wanted.iter().copied());
        let reader = builder.with_batch_size(BATCH).with_projection(mask).build().map_err(|error| damaged(&error))?;
        let (names, time) = (columns.names, columns.time);
        let table =
            Table { reader, names, set, time, form, wanted, assets, left_out, some_symbols, batch: None, before: 0, current: None, seen: HashSet::new() };
        Ok(table)
    }

    fn next(&mut self, most: usize, file: &str, prices: &Prices, absent: &mut u64) -> Result<SignalSets> {
        let mut out = SignalSets::default();
        while out.labels.len() < most {
            let Some(mut rows) = self.rows(file)? else {
                if let Some(last) = self.current.take() {
                    last.finish(&mut out, absent);
                }
                break;
            };
            while rows.at < rows.count {
                let label = rows.sets.as_ref().map_or("0", |sets| if sets.is_null(rows.at) { "" } else { sets.value(rows.at) });
                if self.current.as_ref().is_none_or(|set| set.label != label) {
                    if let Some(done) = self.current.take() {
                        done.finish(&mut out, absent);
                        if out.labels.len() == most {
                            break;
                        }
                    }
                    self.current = Some(self.begin(label, &rows, file, prices)?);
                }
                self.place(&rows, file, prices)?;
                rows.at += 1;
            }
            if rows.at < rows.count {
                self.batch = Some(rows);
            } else {
                self.before += rows.count as u64;
            }
        }
        if out.labels.is_empty() && self.seen.is_empty() {
            return Err(data_error(file, "the file has columns and no rows".into(), "it needs a row per bar, or per bar and asset".into()));
        }
        Ok(out)
    }

    /// What is left of the batch, or the next one.
    fn rows(&mut self, file: &str) -> Result<Option<Rows>> {
        if let Some(rows) = self.batch.take() {
            return Ok(Some(rows));
        }
        let Some(batch) = self.reader.next() else { return Ok(None) };
        let batch = batch.map_err(|error| data_error(file, format!("the Parquet file cannot be read ({error})"), "write it again".into()))?;
        let of_column = |column: usize, message: String, help: &str| Error::Data {
            file: file.into(),
            row: None,
            column: Some(self.names[column].clone()),
            value: None,
            message,
            help: help.into(),
        };
        let raw = |column: usize| -> Result<&ArrayRef> {
            let at = self.wanted.binary_search(&column).ok().and_then(|at| batch.columns().get(at));
            at.ok_or_else(|| Error::Internal(format!("column {column} was not read")))
        };
        let to = |column: usize, ty: &DataType| cast(raw(column)?, ty).map_err(|error| of_column(column, error.to_string(), "convert the column"));
        let texts = |column: usize| Ok(to(column, &DataType::Utf8)?.as_string::<i32>().clone());
        let numbers = |column: usize| Ok(to(column, &DataType::Float64)?.as_primitive::<Float64Type>().clone());
        let bad_time = |row: usize, value: Option<String>| Error::Data {
            file: file.into(),
            row: Some(self.before + row as u64 + 1),
            column: Some(self.names[self.time].clone()),
            value,
            message: "this is not a time".into(),
            help: TIME_HELP.into(),
        };
        let times = seconds(raw(self.time)?, &bad_time, &|message| of_column(self.time, message, TIME_HELP))?;
        let (symbols, weights) = match &self.form {
            Form::Long { symbol, weight } => (symbol.map(texts).transpose()?, vec![numbers(*weight)?]),
            Form::Wide(columns) => (None, columns.iter().map(|c| numbers(c.0)).collect::<Result<Vec<_>>>()?),
        };
        Ok(Some(Rows { sets: self.set.map(texts).transpose()?, times, symbols, weights, count: batch.num_rows(), at: 0 }))
    }

    fn begin(&mut self, label: &str, rows: &Rows, file: &str, prices: &Prices) -> Result<Matrix> {
        let name = self.set.map_or("", |c| &self.names[c]);
        if label.is_empty() {
            return Err(self.error(rows, file, name, None, "the set has no name".into(), "fill it in or remove the row"));
        }
        if !self.seen.insert(label.to_owned()) {
            let message = format!("set '{label}' is there again after other sets");
            return Err(self.error(rows, file, name, Some(label.into()), message, "sort the file by set, so that its rows stand together"));
        }
        Ok(Matrix { label: label.into(), weights: vec![f32::NAN; prices.n_bars() * prices.n_assets()] })
    }

    /// Puts the current row into the current set.
    fn place(&mut self, rows: &Rows, file: &str, prices: &Prices) -> Result<()> {
        let (row, time) = (rows.at, rows.times[rows.at]);
        if prices.times.first().is_none_or(|&first| time < first) || prices.times.last().is_none_or(|&last| time > last) {
            return Ok(());
        }
        let Ok(bar) = prices.times.binary_search(&time) else {
            let message = format!("{} is no bar of the prices", format_short(time));
            return Err(self.error(rows, file, &self.names[self.time], None, message, "remove the row, or give its times as the prices have them"));
        };
        let cells: Vec<(usize, usize, &Float64Array)> = match &self.form {
            Form::Wide(columns) => columns.iter().zip(&rows.weights).map(|(&(column, asset), values)| (column, asset, values)).collect(),
            Form::Long { symbol, weight } => {
                let text = rows.symbols.as_ref().map(|s| if s.is_null(row) { "" } else { s.value(row).trim() });
                let asset = match text {
                    None => Some(0),
                    Some(text) => match self.assets.get(text) {
                        Some(&asset) => Some(asset),
                        None if !text.is_empty() && (self.some_symbols || self.left_out.contains(text)) => None,
                        None => {
                            let near = nearest(text, prices.symbols.iter().map(String::as_str)).map(|s| format!(", did you mean '{s}'?"));
                            let message = format!("the prices have no such symbol{}", near.unwrap_or_default());
                            let name = symbol.map_or("", |c| &self.names[c]);
                            return Err(self.error(rows, file, name, Some(text.into()), message, "correct it, or choose symbols with --symbols"));
                        }
                    },
                };
                asset.map(|asset| (*weight, asset, &rows.weights[0])).into_iter().collect()
            }
        };
        let Some(set) = &mut self.current else { return Err(Error::Internal("a row without a set".into())) };
        for (column, asset, values) in cells {
            let value = if values.is_valid(row) { values.value(row) } else { f64::NAN };
            let slot = &mut set.weights[bar * prices.n_assets() + asset];
            let twice = !slot.is_nan();
            *slot = value as f32;
            if twice || !slot.is_finite() {
                let cell = format!("set '{}', {} on {}", set.label, prices.symbols[asset], format_short(time));
                let (what, help) = if twice { ("there twice", "keep one row of each set, time and symbol") } else { ("not a finite number", FINITE) };
                let text = if values.is_valid(row) { value.to_string() } else { "null".into() };
                return Err(self.error(rows, file, &self.names[column], Some(text), format!("{cell} is {what}"), help));
            }
        }
        Ok(())
    }

    /// An error about the current row.
    fn error(&self, rows: &Rows, file: &str, column: &str, value: Option<String>, message: String, help: &str) -> Error {
        let column = Some(column.to_owned()).filter(|c| !c.is_empty());
        Error::Data { file: file.into(), row: Some(self.before + rows.at as u64 + 1), column, value, message, help: help.into() }
    }
}

impl Matrix {
    fn finish(mut self, out: &mut SignalSets, absent: &mut u64) {
        for weight in self.weights.iter_mut().filter(|w| w.is_nan()) {
            *weight = 0.0;
            *absent += 1;
        }
        out.labels.push(self.label);
        out.weights.append(&mut self.weights);
    }
}

/// Columns of a wide file with their assets; every asset of the prices needs one.
fn wide(
    file: &str,
    schema: &Schema,
    names: &[String],
    of_file: &[usize],
    prices: &Prices,
    assets: &HashMap<String, usize>,
    some_symbols: bool,
) -> Result<Vec<(usize, usize)>> {
    let column_error = |name: &str, message: String, help: &str| Error::Data {
        file: file.into(),
        row: None,
        column: Some(name.into()),
        value: None,
        message,
        help: help.into(),
    };
    let mut columns = Vec::with_capacity(of_file.len());
    for &column in of_file {
        let name = &names[column];
        match assets.get(name) {
            Some(_) if !is_number(schema.field(column).data_type()) => {
                return Err(column_error(name, format!("weights must be numbers, this column is {}", schema.field(column).data_type()), "convert it"));
            }
            Some(&asset) => columns.push((column, asset)),
            None if some_symbols || prices.dropped.iter().any(|d| d.symbol == *name) => {}
            None => {
                let near = nearest(name, prices.symbols.iter().map(String::as_str)).map(|s| format!(", did you mean '{s}'?"));
                let message = format!("the prices have no such symbol{}", near.unwrap_or_default());
                return Err(column_error(name, message, "rename or remove the column, or choose symbols with --symbols"));
            }
        }
    }
    match prices.symbols.iter().enumerate().find(|(i, _)| !columns.iter().any(|c| c.1 == *i)) {
        Some((_, symbol)) => {
            Err(column_error(symbol, "the file has no column for this asset of the prices".into(), "add it, or leave the asset out with --symbols"))
        }
        None => Ok(columns),
    }
}

#[cfg(test)]
#[path = "tests/signals.rs"]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod tests;
