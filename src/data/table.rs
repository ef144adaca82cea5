//! Rows of a delimited file by column name, for files that are no price panel: option chains, surfaces, pairs of legs.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek};
use std::path::Path;

use ::csv::{ByteRecord, ReaderBuilder};
use flate2::read::MultiGzDecoder;

use super::calendar::{TIME_HELP, parse};
use super::{data_error, nearest};
use crate::{Error, Result};

/// A file's columns.
pub(super) struct Table {
    pub(super) file: String,
    names: Vec<String>,
    reader: ::csv::Reader<Box<dyn Read>>,
    record: ByteRecord,
    last_time: (Vec<u8>, i64),
}

impl Table {
    /// Opens a CSV file, plain or gzipped, and reads its header.
    pub(super) fn open(path: &Path) -> Result<Table> {
        let file = path.display().to_string();
        let io = |error: std::io::Error| Error::Io {
            path: file.clone(),
            message: match error.kind() {
                ErrorKind::NotFound => "file not found; check the path".into(),
                ErrorKind::IsADirectory => "is a directory; name the file in it".into(),
                _ => error.to_string(),
            },
        };
        let mut raw = File::open(path).map_err(io)?;
        let mut magic = Vec::with_capacity(2);
        raw.by_ref().take(2).read_to_end(&mut magic).map_err(io)?;
        raw.rewind().map_err(io)?;
        let text: Box<dyn Read> = match magic.as_slice() {
            [] => return Err(data_error(&file, "the file is empty".into(), "it needs a header line and rows".into())),
            [0x1F, 0x8B] => Box::new(MultiGzDecoder::new(BufReader::new(raw))),
            _ => Box::new(raw),
        };
        let mut reader = ReaderBuilder::new().from_reader(text);
        let header = reader.byte_headers().map_err(|error| data_error(&file, error.to_string(), "correct the header line".into()))?;
        let clean = |field: &[u8]| String::from_utf8_lossy(field.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(field)).trim().to_lowercase();
        let names = header.iter().map(clean).collect();
        Ok(Table { file, names, reader, record: ByteRecord::new(), last_time: (Vec::new(), 0) })
    }

    /// The column that has one of these names.
    pub(super) fn column(&self, names: &[&str]) -> Option<usize> {
        names.iter().find_map(|name| self.names.iter().position(|have| have == name))
    }

    /// The same, which must be there.
    pub(super) fn needed(&self, names: &[&str]) -> Result<usize> {
        self.column(names).ok_or_else(|| {
            let first = names.first().copied().unwrap_or_default();
            let near = nearest(first, self.names.iter().map(String::as_str)).map(|near| format!("; there is '{near}'")).unwrap_or_default();
            data_error(&self.file, format!("no column '{}'{near}", names.join("' or '")), format!("the file has {}", self.names.join(", ")))
        })
    }

    /// Moves to the next row and gives its line; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<u64>> {
        match self.reader.read_byte_record(&mut self.record) {
            Ok(false) => Ok(None),
            Ok(true) => Ok(Some(self.line())),
            Err(error) => match error.kind() {
                ::csv::ErrorKind::Io(error) => Err(Error::Io { path: self.file.clone(), message: error.to_string() }),
                _ => Err(Error::Data {
                    file: self.file.clone(),
                    row: Some(self.line()),
                    column: None,
                    value: None,
                    message: error.to_string(),
                    help: "correct the row".into(),
                }),
            },
        }
    }

    fn line(&self) -> u64 {
        self.record.position().map_or(0, ::csv::Position::line)
    }

    /// Text of a cell.
    pub(super) fn text(&self, column: usize) -> &[u8] {
        self.record.get(column).unwrap_or_default().trim_ascii()
    }

    /// The same, as text.
    pub(super) fn words(&self, column: usize) -> String {
        String::from_utf8_lossy(self.text(column)).into_owned()
    }

    /// An error about a cell of the row.
    pub(super) fn wrong(&self, column: usize, message: &str, help: &str) -> Error {
        Error::Data {
            file: self.file.clone(),
            row: Some(self.line()),
            column: self.names.get(column).cloned(),
            value: Some(self.words(column)),
            message: message.into(),
            help: help.into(),
        }
    }

    /// A finite number; `None` for an empty cell.
    pub(super) fn number(&self, column: usize) -> Result<Option<f64>> {
        let text = self.text(column);
        if text.is_empty() {
            return Ok(None);
        }
        let value: Option<f64> = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
        match value {
            Some(x) if x.is_finite() => Ok(Some(x)),
            Some(_) => Err(self.wrong(column, "this is not a finite number", "leave the cell empty where there is no value")),
            None => Err(self.wrong(column, "this is not a number", "write a plain number like 1234.5, or leave the cell empty")),
        }
    }

    /// A number that must be there.
    pub(super) fn needed_number(&self, column: usize) -> Result<f64> {
        self.number(column)?.ok_or_else(|| self.wrong(column, "the cell is empty", "every row needs this number"))
    }

    /// A number that must be there and above 0.
    pub(super) fn positive(&self, column: usize) -> Result<f64> {
        match self.needed_number(column)? {
            x if x > 0.0 => Ok(x),
            _ => Err(self.wrong(column, "this must be above 0", "correct the cell or drop the row")),
        }
    }

    /// A time, in unix seconds.
    pub(super) fn time(&mut self, column: usize) -> Result<i64> {
        let text = self.record.get(column).unwrap_or_default();
        if text == self.last_time.0.as_slice() && !text.is_empty() {
            return Ok(self.last_time.1);
        }
        let seconds = parse(text).map(|stamp| stamp.seconds).ok_or_else(|| self.wrong(column, "this is not a time", TIME_HELP))?;
        self.last_time = (text.to_vec(), seconds);
        Ok(seconds)
    }
}
