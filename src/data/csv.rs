//! Delimited text, plain or gzipped, read as a stream of byte records.

use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read};

use ::csv::{ByteRecord, ErrorKind, ReaderBuilder};
use flate2::read::MultiGzDecoder;
use sha2::{Digest, Sha256};

use super::calendar::TIME_HELP;
use super::columns::{Columns, Layout, Open};
use super::series::{Collector, time_of};
use super::{ReadOptions, data_error};
use crate::{Error, Result};

const BUFFER: usize = 1 << 18;
const NUMBER_HELP: &str =
    "write a plain number like 1234.5 (no thousands separators, decimal point), or leave the cell empty; --symbols and --price choose other columns";

/// Passes bytes on and hashes them.
struct Hashing<'h> {
    file: File,
    hasher: &'h mut Sha256,
}

impl Read for Hashing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        Ok(n)
    }
}

/// Reads one file into the collector.
pub(super) fn read(file: File, name: &str, gzip: bool, options: &ReadOptions, collector: &mut Collector<'_>, hasher: &mut Sha256) -> Result<()> {
    let mut raw = BufReader::with_capacity(BUFFER, Hashing { file, hasher });
    if gzip {
        read_text(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(&mut raw)), name, options, collector)?;
    } else {
        read_text(&mut raw, name, options, collector)?;
    }
    // What the decoder did not need belongs to the file's hash all the same.
    std::io::copy(&mut raw, &mut std::io::sink()).map(|_| ()).map_err(|error| io_error(name, &error))
}

fn read_text(mut text: impl BufRead, name: &str, options: &ReadOptions, collector: &mut Collector<'_>) -> Result<()> {
    let mut header = Vec::new();
    text.read_until(b'\n', &mut header).map_err(|error| io_error(name, &error))?;
    let header = header.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&header).to_vec();
    let delimiter = delimiter(&header);
    // With a line feed at the very end every record of an LF file ends in one: see `Rows::line`.
    let crlf = header.ends_with(b"\r\n");
    let text = text.chain(if crlf { &b""[..] } else { &b"\n"[..] });
    let mut reader = ReaderBuilder::new().delimiter(delimiter).buffer_capacity(BUFFER).from_reader(Cursor::new(header).chain(text));
    let names: Vec<String> =
        reader.byte_headers().map_err(|error| csv_error(name, error))?.iter().map(|field| String::from_utf8_lossy(field).into_owned()).collect();
    if names.iter().all(|column| column.trim().is_empty()) {
        return Err(data_error(name, "the file is empty".into(), "it needs a header line and at least 2 rows of prices".into()));
    }
    let columns = Columns::resolve(name, names, None, options)?;
    let mut rows = Rows { reader, record: ByteRecord::new(), file: name, columns: &columns, crlf, last_time: (Vec::new(), 0), count: 0 };
    match &columns.layout {
        Layout::Wide { assets } => rows.read_wide(assets, collector)?,
        Layout::Long { symbol, price, open } => rows.read_long(*symbol, *price, *open, collector)?,
    }
    if rows.count == 0 {
        return Err(data_error(name, "the file has a header and no rows".into(), "at least 2 rows of prices are needed".into()));
    }
    Ok(())
}

/// A semicolon or a tab where the header has more of them than commas.
fn delimiter(header: &[u8]) -> u8 {
    let count = |delimiter: u8| header.iter().filter(|&&byte| byte == delimiter).count();
    [b';', b'\t'].into_iter().find(|&d| count(d) > count(b',')).unwrap_or(b',')
}

struct Rows<'f, R> {
    reader: ::csv::Reader<R>,
    record: ByteRecord,
    file: &'f str,
    columns: &'f Columns,
    crlf: bool,
    /// Text and value of the last time, which the rows of a long file often share.
    last_time: (Vec<u8>, i64),
    count: u64,
}

impl<R: Read> Rows<'_, R> {
    /// The line of the next record; `None` at the end.
    fn next(&mut self) -> Result<Option<u64>> {
        match self.reader.read_byte_record(&mut self.record) {
            Ok(false) => Ok(None),
            Ok(true) => {
                self.count += 1;
                Ok(Some(self.line()))
            }
            Err(error) => Err(match csv_error(self.file, error) {
                Error::Data { file, row: Some(_), column, value, message, help } => Error::Data { file, row: Some(self.line()), column, value, message, help },
                other => other,
            }),
        }
    }

    /// First line of the record just read. The positions of `csv` start before empty lines and, with CRLF, before the last line's feed,
    /// so the line is counted back from the reader: it has consumed the feed of an LF record, and not yet that of a CRLF record.
    fn line(&self) -> u64 {
        let inside = self.record.as_slice().iter().filter(|&&byte| byte == b'\n').count() as u64;
        self.reader.position().line().saturating_sub(inside + u64::from(!self.crlf))
    }

    fn field(&self, column: usize) -> &[u8] {
        self.record.get(column).unwrap_or_default().trim_ascii()
    }

    fn time(&mut self, row: u64, collector: &Collector<'_>) -> Result<i64> {
        let text = self.record.get(self.columns.time).unwrap_or_default();
        if text == self.last_time.0.as_slice() && !text.is_empty() {
            return Ok(self.last_time.1);
        }
        let Some(seconds) = time_of(text) else {
            let column = &self.columns.names[self.columns.time];
            return Err(collector.cell_error(row, column, Some(lossy(text)), "this is not a time".into(), TIME_HELP.into()));
        };
        self.last_time.0.clear();
        self.last_time.0.extend_from_slice(text);
        self.last_time.1 = seconds;
        Ok(seconds)
    }

    fn price(&self, column: usize, row: u64, collector: &Collector<'_>) -> Result<Option<f64>> {
        let text = self.field(column);
        number(text).ok_or_else(|| {
            let name = &self.columns.names[column];
            collector.cell_error(row, name, Some(lossy(text)), "this is not a number".into(), NUMBER_HELP.into())
        })
    }

    fn read_wide(&mut self, assets: &[usize], collector: &mut Collector<'_>) -> Result<()> {
        collector.start_file(self.file, true, false, false);
        let mut slots = Vec::with_capacity(assets.len());
        for &column in assets {
            let name = &self.columns.names[column];
            slots.extend(collector.slot(name.as_bytes(), 1, name)?.map(|slot| (column, slot)));
        }
        while let Some(row) = self.next()? {
            // A file without a selected asset is still checked for ragged rows.
            if slots.is_empty() {
                continue;
            }
            let time = self.time(row, collector)?;
            if !collector.in_range(time) {
                continue;
            }
            for &(column, slot) in &slots {
                let price = self.price(column, row, collector)?;
                collector.push(slot, time, price, None, row, &self.columns.names[column])?;
            }
        }
        Ok(())
    }

    fn read_long(&mut self, symbol: Option<usize>, price: usize, open: Option<Open>, collector: &mut Collector<'_>) -> Result<()> {
        let price_name = &self.columns.names[price];
        collector.start_file(self.file, false, open.is_some(), open.is_some_and(|o| o.raw_close.is_some()));
        collector.price_column.get_or_insert_with(|| price_name.clone());
        let stem = super::series::stem(self.file);
        while let Some(row) = self.next()? {
            let slot = match symbol {
                Some(column) => collector.slot(self.field(column), row, &self.columns.names[column])?,
                None => collector.slot(stem.as_bytes(), row, price_name)?,
            };
            let Some(slot) = slot else { continue };
            let time = self.time(row, collector)?;
            if !collector.in_range(time) {
                continue;
            }
            let value = self.price(price, row, collector)?;
            // An open that is no number counts as missing.
            let cell = |column: usize| number(self.field(column)).flatten();
            let opened = open.and_then(|open| scaled(cell(open.column), value, open.raw_close.map(cell)));
            collector.push(slot, time, value, opened, row, price_name)?;
        }
        Ok(())
    }
}

/// The open in the units of the price: as it is, or times adjusted / raw close.
pub(super) fn scaled(open: Option<f64>, price: Option<f64>, raw_close: Option<Option<f64>>) -> Option<f64> {
    match raw_close {
        None => open,
        Some(raw) => Some(open? * (price? / raw?)),
    }
}

/// `Some(None)` is a missing cell, `None` is text that is no number.
fn number(text: &[u8]) -> Option<Option<f64>> {
    // Nearly every price starts with a digit, so the list is rarely looked at.
    if !text.first().is_some_and(u8::is_ascii_digit) {
        const MISSING: [&[u8]; 9] = [b"", b"na", b"n/a", b"#n/a", b"nan", b"null", b"none", b"-", b"."];
        if MISSING.iter().any(|word| text.eq_ignore_ascii_case(word)) {
            return Some(None);
        }
    }
    let value: f64 = std::str::from_utf8(text).ok()?.parse().ok()?;
    Some((!value.is_nan()).then_some(value))
}

fn lossy(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}

fn csv_error(file: &str, error: ::csv::Error) -> Error {
    match error.kind() {
        ErrorKind::Io(error) => io_error(file, error),
        ErrorKind::UnequalLengths { pos, expected_len, len } => Error::Data {
            file: file.into(),
            row: pos.as_ref().map(::csv::Position::line),
            column: None,
            value: None,
            message: format!("expected {expected_len} fields as in the header, got {len}"),
            help: "correct the row; a field that contains the delimiter must be quoted".into(),
        },
        _ => data_error(file, error.to_string(), "correct the file".into()),
    }
}

fn io_error(file: &str, error: &std::io::Error) -> Error {
    let message = match error.kind() {
        std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::InvalidInput | std::io::ErrorKind::InvalidData => {
            format!("{error}; the compressed file is cut off or damaged, fetch it again")
        }
        std::io::ErrorKind::IsADirectory => "is a directory; name the file in it".into(),
        _ => error.to_string(),
    };
    Error::Io { path: file.into(), message }
}
