//! Finished parts of a sweep in a folder, so that an interrupted sweep goes on and shards of several machines come together.
//!
//! ```text
//! DIR/parts/            of a sweep that is not finished            DIR/shard-1-of-3/     of a shard
//!   job.json            what is swept, its hash, which sets        part-0-4096.parquet   rows of the sets
//!   part-0-4096.json    winners and checksum of the rows           …
//! ```
//! A part counts if its .json is there, which is written last and holds the SHA-256 of the rows and the hash of the sweep.

use super::results::{METRICS, RowWriter, Subject, Whole, io};
use crate::sim::parts::{Part, Row, Winners};
use crate::{Error, Result};
use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, UInt32Type};
use arrow_array::{Array, RecordBatch};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// What a store belongs to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Job {
    /// False once all its sets are there.
    pub(super) partial: bool,
    /// Shard i of n, counted from 1.
    pub(super) shard: Option<(usize, usize)>,
    /// Positions of its sets.
    pub(super) sets: Range<usize>,
    /// All sets of the sweep.
    pub(super) of: usize,
    /// Everything that decides the results.
    pub(super) identity: Value,
    /// SHA-256 of the identity.
    pub(super) hash: String,
    /// The command's options as TOML.
    pub(super) config: String,
}

/// What is stored beside the rows of a part.
#[derive(Serialize, Deserialize)]
struct Sidecar {
    hash: String,
    sets: Range<usize>,
    sha256: String,
    seconds: f64,
    winners: Winners,
}

/// A folder of parts.
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
    job: Job,
    parts: Vec<Range<usize>>,
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    hex(Sha256::digest(bytes).as_slice())
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256_of_file(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    let unreadable = |e: std::io::Error| Error::Io { path: path.display().to_string(), message: format!("cannot be read: {e}") };
    let mut file = File::open(path).map_err(unreadable)?;
    std::io::copy(&mut file, &mut hasher).map_err(unreadable)?;
    Ok(hex(hasher.finalize().as_slice()))
}

/// The first field in which two identities differ, with both values.
pub(super) fn difference(theirs: &Value, ours: &Value) -> Option<(String, String, String)> {
    let fields = |v: &Value| v.as_object().map(|o| o.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
    let differs = |name: &String| theirs.get(name) != ours.get(name);
    let text = |v: &Value, name: &str| v.get(name).map_or("nothing".to_string(), |v| v.as_str().map_or_else(|| v.to_string(), String::from));
    let name = fields(ours).into_iter().chain(fields(theirs)).find(differs)?;
    Some((name.clone(), text(theirs, &name), text(ours, &name)))
}

impl Store {
    /// Starts a store in an empty or new folder.
    pub(super) fn create(dir: PathBuf, job: Job) -> Result<Store> {
        std::fs::create_dir_all(&dir).map_err(|e| io(&dir, &e))?;
        let store = Store { dir, job, parts: Vec::new() };
        store.describe()?;
        Ok(store)
    }

    /// Whether there is a store in a folder.
    pub(super) fn is_in(dir: &Path) -> bool {
        dir.join("job.json").is_file()
    }

    /// Opens a store; its parts are listed, not read.
    pub(super) fn open(dir: PathBuf) -> Result<Store> {
        let path = dir.join("job.json");
        let broken = |message: String| Error::Io { path: path.display().to_string(), message };
        let text = std::fs::read_to_string(&path).map_err(|e| broken(format!("cannot be read: {e}")))?;
        let job: Job = serde_json::from_str(&text).map_err(|e| broken(format!("is not the description of a sweep ({e}); remove the folder")))?;
        let mut store = Store { dir, job, parts: Vec::new() };
        for entry in std::fs::read_dir(&store.dir).map_err(|e| broken(e.to_string()))? {
            let name = entry.map_err(|e| broken(e.to_string()))?.file_name().to_string_lossy().into_owned();
            let sets = name.strip_prefix("part-").and_then(|name| name.strip_suffix(".json")).and_then(|name| name.split_once('-'));
            if let Some((Ok(start), Ok(end))) = sets.map(|(start, end)| (start.parse(), end.parse())) {
                store.parts.push(start..end);
            }
        }
        store.parts.sort_by_key(|sets| sets.start);
        Ok(store)
    }

    pub(super) fn job(&self) -> &Job {
        &self.job
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Positions of the parts that are there, ascending.
    pub(super) fn parts(&self) -> &[Range<usize>] {
        &self.parts
    }

    fn describe(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.job).map_err(|e| Error::Internal(e.to_string()))?;
        Whole::text(&self.dir, "job.json", &text)
    }

    fn path(&self, sets: &Range<usize>, ending: &str) -> PathBuf {
        self.dir.join(format!("part-{}-{}.{ending}", sets.start, sets.end))
    }

    /// Writes a part: its rows first, then what makes them count.
    pub(super) fn save(&mut self, part: &Part, seconds: f64, subject: Subject<'_>) -> Result<()> {
        let rows = part.rows.as_ref().and_then(|rows| rows.as_slice()).unwrap_or_default();
        let name = format!("part-{}-{}", part.sets.start, part.sets.end);
        let mut writer = RowWriter::create(subject, &self.dir, &name, rows.len(), false)?;
        let costs = subject.run.config().cost_bps.len();
        for (cost, rows) in rows.chunks_exact((rows.len() / costs).max(1)).enumerate() {
            writer.push(cost, part.sets.clone(), rows)?;
        }
        for whole in writer.close()? {
            whole.keep()?;
        }
        let (hash, sha256) = (self.job.hash.clone(), sha256_of_file(&self.path(&part.sets, "parquet"))?);
        let sidecar = Sidecar { hash, sets: part.sets.clone(), sha256, seconds, winners: part.winners.clone() };
        let text = serde_json::to_string(&sidecar).map_err(|e| Error::Internal(e.to_string()))?;
        Whole::text(&self.dir, &format!("{name}.json"), &text)?;
        self.parts.push(part.sets.clone());
        self.parts.sort_by_key(|sets| sets.start);
        Ok(())
    }

    /// Reads a part back, with the seconds that it took, and checks that it is whole and of this sweep.
    pub(super) fn load(&self, sets: &Range<usize>, assets: usize, costs: usize) -> Result<(Part, f64)> {
        let path = self.path(sets, "json");
        let broken = |message: String| Error::Io { path: path.display().to_string(), message };
        let text = std::fs::read_to_string(&path).map_err(|e| broken(format!("cannot be read: {e}")))?;
        let sidecar: Sidecar = serde_json::from_str(&text).map_err(|e| broken(format!("is broken ({e})")))?;
        if sidecar.hash != self.job.hash || sidecar.sets != *sets {
            return Err(broken("belongs to another sweep".into()));
        }
        let rows = self.path(sets, "parquet");
        if sha256_of_file(&rows)? != sidecar.sha256 {
            return Err(Error::Io { path: rows.display().to_string(), message: "has changed since it was written: its checksum is another".into() });
        }
        let part = Part::of_rows(sets.clone(), assets, costs, &self.rows(sets, assets, None)?, sidecar.winners)?;
        Ok((part, sidecar.seconds))
    }

    /// Rows [set, asset] of a part at a cost, or of all costs.
    pub(super) fn rows(&self, sets: &Range<usize>, assets: usize, cost: Option<usize>) -> Result<Vec<Row>> {
        let path = self.path(sets, "parquet");
        let broken = |e: &dyn std::fmt::Display| Error::Io { path: path.display().to_string(), message: format!("cannot be read: {e}") };
        let file = File::open(&path).map_err(|e| broken(&e))?;
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| broken(&e))?;
        let mask = ProjectionMask::columns(builder.parquet_schema(), METRICS);
        let mut builder = builder.with_projection(mask).with_batch_size(65_536);
        if let Some(cost) = cost {
            let n = sets.len() * assets;
            builder = builder.with_offset(cost * n).with_limit(n);
        }
        let mut rows = Vec::new();
        for batch in builder.build().map_err(|e| broken(&e))? {
            read_rows(&batch.map_err(|e| broken(&e))?, &mut rows).ok_or_else(|| broken(&"columns are missing"))?;
        }
        Ok(rows)
    }

    /// Takes a part away, so that it runs again.
    pub(super) fn discard(&mut self, sets: &Range<usize>) {
        // What cannot be removed is written over.
        let _ = std::fs::remove_file(self.path(sets, "json"));
        let _ = std::fs::remove_file(self.path(sets, "parquet"));
        self.parts.retain(|part| part != sets);
    }

    /// Marks all sets as there.
    pub(super) fn complete(&mut self) -> Result<()> {
        self.job.partial = false;
        self.describe()
    }

    /// Removes the folder; the results are elsewhere by now.
    pub(super) fn remove(self) -> Result<()> {
        std::fs::remove_dir_all(&self.dir).map_err(|e| io(&self.dir, &e))
    }
}

fn read_rows(batch: &RecordBatch, rows: &mut Vec<Row>) -> Option<()> {
    let real = |name: &str| batch.column_by_name(name).and_then(|c| c.as_primitive_opt::<Float32Type>());
    let [sharpe, total_return, max_drawdown, turnover] = [real(METRICS[0])?, real(METRICS[1])?, real(METRICS[2])?, real(METRICS[3])?];
    let trades = batch.column_by_name(METRICS[4]).and_then(|c| c.as_primitive_opt::<UInt32Type>())?;
    let value = |column: &arrow_array::Float32Array, i: usize| if column.is_null(i) { f32::NAN } else { column.value(i) };
    rows.extend((0..batch.num_rows()).map(|i| Row {
        sharpe: value(sharpe, i),
        total_return: value(total_return, i),
        max_drawdown: value(max_drawdown, i),
        turnover: value(turnover, i),
        trades: trades.value(i),
    }));
    Some(())
}
