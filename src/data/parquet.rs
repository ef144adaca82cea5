//! Parquet, wide or long, read batch by batch; only the columns that are needed.

use std::cell::Cell;
use std::fs::File;
use std::io::Seek;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ::parquet::arrow::ProjectionMask;
use ::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type};
use arrow_array::{Array, ArrayRef, Float64Array, RecordBatch};
use arrow_cast::cast;
use arrow_schema::{DataType, Schema, TimeUnit};
use sha2::Sha256;

use super::calendar::{DAY, TIME_HELP, is_time};
use super::columns::{Columns, Layout, Open};
use super::csv::scaled;
use super::series::{Collector, stem, time_of};
use super::{ReadOptions, data_error};
use crate::{Error, Result};

const BATCH: usize = 1 << 14;

thread_local! {
    static DECODING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is inside the Parquet decoder, whose panics become errors: a panic hook has nothing to say about them.
pub fn decoding() -> bool {
    DECODING.get()
}

/// What a step of the decoder gives. On some damaged files the decoder panics instead of returning an error; both are an error here.
fn decode<T, E: std::fmt::Display>(damaged: &dyn Fn(&dyn std::fmt::Display) -> Error, step: impl FnOnce() -> std::result::Result<T, E>) -> Result<T> {
    DECODING.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(step));
    DECODING.set(false);
    match outcome {
        Ok(result) => result.map_err(|error| damaged(&error)),
        Err(_) => Err(damaged(&"its parts contradict each other")),
    }
}

/// Reads one file into the collector. Rows are records, the first is row 1.
pub(super) fn read(mut file: File, name: &str, options: &ReadOptions, collector: &mut Collector<'_>, hasher: &mut Sha256) -> Result<()> {
    let io = |error: std::io::Error| Error::Io { path: name.to_owned(), message: error.to_string() };
    std::io::copy(&mut file, hasher).map_err(io)?;
    file.rewind().map_err(io)?;
    let damaged = |error: &dyn std::fmt::Display| {
        data_error(name, format!("the Parquet file cannot be read ({error})"), "write it again, uncompressed or with snappy or zstd".into())
    };
    let builder = decode(&damaged, || ParquetRecordBatchReaderBuilder::try_new(file))?;
    let schema = builder.schema().clone();
    let names: Vec<String> = schema.fields().iter().map(|field| field.name().clone()).collect();
    if names.is_empty() {
        return Err(data_error(name, "the file has no columns".into(), "it needs a time and a price column".into()));
    }
    let columns = Columns::resolve(name, names, only_temporal(&schema), options)?;
    let mut table = Table { file: name, columns: &columns, schema: &schema, wanted: vec![columns.time], slots: Vec::new() };
    table.prepare(collector)?;
    let mask = ProjectionMask::roots(builder.parquet_schema(), table.wanted.iter().copied());
    let mut reader = decode(&damaged, || builder.with_batch_size(BATCH).with_projection(mask).build())?;
    let mut rows = 0;
    while let Some(batch) = decode(&damaged, || reader.next().transpose())? {
        match &columns.layout {
            Layout::Wide { .. } => table.wide(&batch, rows, collector)?,
            Layout::Long { symbol, price, open } => table.long(&batch, rows, *symbol, *price, *open, collector)?,
        }
        rows += batch.num_rows() as u64;
    }
    if rows == 0 {
        return Err(data_error(name, "the file has columns and no rows".into(), "at least 2 rows of prices are needed".into()));
    }
    Ok(())
}

/// The time column of a file whose names tell nothing: the only one of a date or time type.
pub(super) fn only_temporal(schema: &Schema) -> Option<usize> {
    let mut temporal =
        (0..schema.fields().len()).filter(|&c| matches!(schema.field(c).data_type(), DataType::Date32 | DataType::Date64 | DataType::Timestamp(..)));
    temporal.next().filter(|_| temporal.next().is_none())
}

struct Table<'f> {
    file: &'f str,
    columns: &'f Columns,
    schema: &'f Schema,
    /// Columns of the file that are read, in order.
    wanted: Vec<usize>,
    /// Wide: column and series of each selected asset.
    slots: Vec<(usize, usize)>,
}

impl Table<'_> {
    /// Chooses the columns to read and refuses those of a wrong type.
    fn prepare(&mut self, collector: &mut Collector<'_>) -> Result<()> {
        match &self.columns.layout {
            Layout::Wide { assets } => {
                collector.start_file(self.file, true, false, false);
                for &column in assets {
                    let name = &self.columns.names[column];
                    if let Some(slot) = collector.slot(name.as_bytes(), 1, name)? {
                        self.require_number(column)?;
                        self.slots.push((column, slot));
                        self.wanted.push(column);
                    }
                }
            }
            Layout::Long { symbol, price, open } => {
                self.require_number(*price)?;
                let open_columns = open.iter().flat_map(|open| std::iter::once(open.column).chain(open.raw_close));
                collector.start_file(self.file, false, open.is_some(), open.is_some_and(|o| o.raw_close.is_some()));
                collector.price_column.get_or_insert_with(|| self.columns.names[*price].clone());
                self.wanted.extend(symbol.iter().chain([price]).copied().chain(open_columns));
            }
        }
        self.wanted.sort_unstable();
        self.wanted.dedup();
        Ok(())
    }

    fn require_number(&self, column: usize) -> Result<()> {
        if is_number(self.schema.field(column).data_type()) {
            return Ok(());
        }
        let message = format!("prices must be numbers, this column is {}", self.schema.field(column).data_type());
        Err(self.column_error(column, message, "choose numeric columns with --price or --symbols, or convert this one".into()))
    }

    fn column_error(&self, column: usize, message: String, help: String) -> Error {
        Error::Data { file: self.file.into(), row: None, column: Some(self.columns.names[column].clone()), value: None, message, help }
    }

    /// A column of the batch as it is.
    fn raw<'b>(&self, batch: &'b RecordBatch, column: usize) -> Result<&'b ArrayRef> {
        let array = self.wanted.binary_search(&column).ok().and_then(|at| batch.columns().get(at));
        array.ok_or_else(|| Error::Internal(format!("column {column} was not read")))
    }

    /// A column of the batch as `to`.
    fn column(&self, batch: &RecordBatch, column: usize, to: &DataType) -> Result<ArrayRef> {
        cast(self.raw(batch, column)?, to).map_err(|error| self.column_error(column, error.to_string(), "convert the column".into()))
    }

    fn numbers(&self, batch: &RecordBatch, column: usize) -> Result<Float64Array> {
        Ok(self.column(batch, column, &DataType::Float64)?.as_primitive::<Float64Type>().clone())
    }

    fn times(&self, batch: &RecordBatch, before: u64, collector: &Collector<'_>) -> Result<Vec<i64>> {
        let column = self.columns.time;
        let bad = |row: usize, value: Option<String>| {
            collector.cell_error(before + row as u64 + 1, &self.columns.names[column], value, "this is not a time".into(), TIME_HELP.into())
        };
        seconds(self.raw(batch, column)?, &bad, &|message| self.column_error(column, message, TIME_HELP.into()))
    }

    fn wide(&self, batch: &RecordBatch, before: u64, collector: &mut Collector<'_>) -> Result<()> {
        if self.slots.is_empty() {
            return Ok(());
        }
        let times = self.times(batch, before, collector)?;
        let kept: Vec<bool> = times.iter().map(|&time| collector.in_range(time)).collect();
        for &(column, slot) in &self.slots {
            let prices = self.numbers(batch, column)?;
            for row in (0..times.len()).filter(|&row| kept[row]) {
                collector.push(slot, times[row], cell(&prices, row), None, before + row as u64 + 1, &self.columns.names[column])?;
            }
        }
        Ok(())
    }

    fn long(&self, batch: &RecordBatch, before: u64, symbol: Option<usize>, price: usize, open: Option<Open>, collector: &mut Collector<'_>) -> Result<()> {
        let times = self.times(batch, before, collector)?;
        let prices = self.numbers(batch, price)?;
        let price_name = &self.columns.names[price];
        // Opens that are not even numbers count as missing.
        let optional = |column: usize| if is_number(self.schema.field(column).data_type()) { self.numbers(batch, column).ok() } else { None };
        let opens = open.and_then(|open| optional(open.column));
        let raw_closes = open.and_then(|open| open.raw_close).map(optional);
        let symbols = symbol.map(|column| self.column(batch, column, &DataType::Utf8)).transpose()?;
        let stem = stem(self.file);
        for (row, &time) in times.iter().enumerate() {
            let number = before + row as u64 + 1;
            let slot = match &symbols {
                None => collector.slot(stem.as_bytes(), number, price_name)?,
                Some(array) => {
                    let texts = array.as_string::<i32>();
                    let text = if texts.is_null(row) { "" } else { texts.value(row).trim() };
                    collector.slot(text.as_bytes(), number, symbol.map_or("", |column| &self.columns.names[column]))?
                }
            };
            let Some(slot) = slot else { continue };
            if !collector.in_range(time) {
                continue;
            }
            let value = cell(&prices, row);
            let open = opens.as_ref().and_then(|opens| cell(opens, row));
            let raw = raw_closes.as_ref().map(|closes| closes.as_ref().and_then(|closes| cell(closes, row)));
            collector.push(slot, time, value, scaled(open, value, raw), number, price_name)?;
        }
        Ok(())
    }
}

/// A time column in seconds. Timestamps with a zone are instants in UTC already; text and integers are read as in CSV. `bad` is the error
/// of a cell, by its row in the batch and its text; `unfit` that of a column of a type without times.
pub(super) fn seconds(times: &ArrayRef, bad: &dyn Fn(usize, Option<String>) -> Error, unfit: &dyn Fn(String) -> Error) -> Result<Vec<i64>> {
    let to = |array: &ArrayRef, to: &DataType| cast(array, to).map_err(|error| unfit(error.to_string()));
    let per_second = match times.data_type() {
        DataType::Timestamp(TimeUnit::Second, _) => 1,
        DataType::Timestamp(TimeUnit::Millisecond, _) | DataType::Date64 => 1_000,
        DataType::Timestamp(TimeUnit::Microsecond, _) => 1_000_000,
        DataType::Timestamp(TimeUnit::Nanosecond, _) => 1_000_000_000,
        _ => 0,
    };
    let n = times.len();
    if per_second > 0 || *times.data_type() == DataType::Date32 {
        // Date32 counts days, and arrow goes to 64 bits by way of 32.
        let array = if per_second > 0 { to(times, &DataType::Int64)? } else { to(&to(times, &DataType::Int32)?, &DataType::Int64)? };
        let values = array.as_primitive::<Int64Type>();
        let seconds = |v: i64| if per_second > 0 { v.div_euclid(per_second) } else { v * DAY };
        return (0..n)
            .map(|row| {
                let value = values.is_valid(row).then(|| values.value(row));
                value.map(seconds).filter(|&s| is_time(s)).ok_or_else(|| bad(row, value.map(|v| v.to_string())))
            })
            .collect();
    }
    let array = to(times, &DataType::Utf8)?;
    let texts = array.as_string::<i32>();
    (0..n)
        .map(|row| {
            if texts.is_null(row) {
                return Err(bad(row, None));
            }
            time_of(texts.value(row).as_bytes()).ok_or_else(|| bad(row, Some(texts.value(row).to_owned())))
        })
        .collect()
}

/// Null and NaN are missing.
fn cell(values: &Float64Array, row: usize) -> Option<f64> {
    (values.is_valid(row) && !values.value(row).is_nan()).then(|| values.value(row))
}

/// Numbers, also behind a dictionary; a column of nulls only is one without prices.
pub(super) fn is_number(field: &DataType) -> bool {
    match field {
        DataType::Dictionary(_, values) => is_number(values),
        other => other.is_numeric() || *other == DataType::Null,
    }
}
