//! How a sweep is cut into parts, how long it will take, and how far it is.
//!
//! A sweep that the device should finish within [`SHORT`] seconds is one part. A longer one starts with a small part, which is timed;
//! further parts take about [`PART`] seconds each, at least [`LEAST`] sets where memory allows.

use super::is_interrupted;
use super::sweep::{Prepared, duration, guess, size};
use crate::kernels::Device;
use crate::kernels::backtest_sweep::Chunk;
use crate::sim::sweep::SweepRun;
use crate::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::ops::Range;
use std::path::Path;

/// Seconds of a sweep that is not cut.
const SHORT: f64 = 20.0;
/// Seconds of a part.
const PART: f64 = 15.0;
/// Sets of a part, at least, where they fit.
const LEAST: usize = 4096;
/// Rows that are held at once.
const MOST_ROWS: usize = 8_000_000;

/// Cuts runs of sets into parts.
pub(super) struct Cutter {
    fixed: Option<usize>,
    most: usize,
    /// Set-bars of a set.
    per_set: f64,
    /// Set-bars per second.
    rate: f64,
    measured: bool,
}

impl Cutter {
    /// `keep`: rows of a part are held until they are written.
    pub(super) fn of(run: &SweepRun<'_>, device: &Device, fixed: Option<usize>, keep: bool) -> Cutter {
        let rows_per_set = run.assets() * run.config().cost_bps.len();
        let most = if keep { (MOST_ROWS / rows_per_set.max(1)).max(1) } else { usize::MAX };
        Cutter { fixed, most, per_set: run.work_per_set(), rate: guess(device) / run.slowness(), measured: false }
    }

    fn sets_in(&self, seconds: f64) -> usize {
        (seconds * self.rate / self.per_set.max(1.0)) as usize
    }

    fn seconds(&self, sets: usize) -> f64 {
        sets as f64 * self.per_set / self.rate
    }

    /// Whether all sets go into one run.
    pub(super) fn is_one_part(&self, sets: usize) -> bool {
        match self.fixed {
            Some(fixed) => sets <= fixed,
            None => sets <= self.most && self.seconds(sets) <= SHORT,
        }
    }

    /// Whether so many sets are worth a word beforehand.
    pub(super) fn is_long(&self, sets: usize) -> bool {
        self.seconds(sets) > SHORT
    }

    fn size(&self) -> usize {
        match self.fixed {
            Some(fixed) => fixed,
            None => self.sets_in(PART).max(LEAST).min(self.most),
        }
    }

    /// A few sets to measure with.
    pub(super) fn probe(&self, sets: &Range<usize>) -> Range<usize> {
        sets.start..sets.end.min(sets.start + self.sets_in(1.0).clamp(64, LEAST).min(self.most))
    }

    /// The part that begins at `from`.
    pub(super) fn next(&self, from: usize, end: usize) -> Range<usize> {
        if self.measured || self.fixed.is_some() { from..end.min(from + self.size()) } else { self.probe(&(from..end)) }
    }

    /// Learns from a part that is done.
    pub(super) fn observe(&mut self, sets: usize, seconds: f64) {
        let rate = sets as f64 * self.per_set / seconds.max(1e-6);
        self.rate = if self.measured { 0.5 * (self.rate + rate) } else { rate };
        self.measured = true;
    }
}

/// What a sweep will take.
pub(super) struct Estimate {
    sets: usize,
    parts: usize,
    per_part: usize,
    seconds: f64,
    device: &'static str,
    memory: f64,
    disk: Option<(f64, String)>,
}

impl Estimate {
    /// For `sets` sets that are still to run.
    pub(super) fn of(run: &SweepRun<'_>, prepared: &Prepared, sets: usize, cutter: &Cutter, out: Option<&Path>) -> Estimate {
        let per_part = if cutter.is_one_part(sets) { sets } else { cutter.size().min(sets).max(1) };
        let (costs, parameters) = (prepared.config.cost_bps.len() as f64, run.set(0).len() as f64);
        let rows = |sets: usize| sets as f64 * run.assets() as f64 * costs;
        let kept = if out.is_some() { 20.0 * rows(per_part) } else { 0.0 };
        // Columns, words and sums of all sets; prices three times; rows of a part; tables and downloads, which the peak so far knows better.
        let prices = 12.0 * prepared.prices.n_bars() as f64 * run.assets() as f64;
        let memory = run.len() as f64 * (8.0 * parameters + 32.0 + 24.0 * costs) + prices + kept + 256e6;
        let memory = memory.max(peak_bytes().unwrap_or(0.0));
        let parts = sets.div_ceil(per_part.max(1));
        let disk = out.map(|dir| (super::results::bytes(rows(run.len()), parts > 1), dir.display().to_string()));
        let device = prepared.device.info().kind.name();
        Estimate { sets, parts, per_part, seconds: cutter.seconds(sets), device, memory, disk }
    }

    /// As an object; sizes in bytes.
    pub(super) fn json(&self) -> Value {
        json!({ "sets": self.sets, "parts": self.parts, "sets_per_part": self.per_part, "seconds": self.seconds, "device": self.device,
            "memory_bytes": self.memory, "disk_bytes": self.disk.as_ref().map(|d| d.0) })
    }
}

impl std::fmt::Display for Estimate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Estimate { sets, parts, per_part, seconds, device, memory, disk } = self;
        let cut = if *parts == 1 { format!("1 part of {sets} sets") } else { format!("{parts} parts of {per_part} sets") };
        write!(f, "{cut}, about {} on {device}, {} of memory", duration(*seconds), size(*memory))?;
        disk.as_ref().map_or(Ok(()), |(bytes, dir)| write!(f, ", {} in {dir} while it runs", size(*bytes)))
    }
}

/// Most memory that this process has held, where the system tells.
fn peak_bytes() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.split_whitespace().next()?;
    Some(kilobytes.parse::<f64>().ok()? * 1024.0)
}

/// A bar on a terminal, nothing in a pipe; stops the run when the user does.
pub(super) struct Progress(ProgressBar, usize);

impl Progress {
    pub(super) fn new(run: &SweepRun<'_>, silent: bool) -> Progress {
        let per_set = run.assets() * run.config().cost_bps.len();
        if silent || !std::io::stderr().is_terminal() {
            return Progress(ProgressBar::hidden(), per_set);
        }
        let style = ProgressStyle::with_template("{bar:40} {human_pos}/{human_len} back-tests, {eta} left").unwrap_or_else(|_| ProgressStyle::default_bar());
        Progress(ProgressBar::new(0).with_style(style), per_set)
    }

    /// How many sets are to come.
    pub(super) fn total(&self, sets: usize) {
        self.0.set_length((sets * self.1) as u64);
    }

    /// Counts a chunk.
    pub(super) fn visit(&self, chunk: &Chunk) -> Result<()> {
        self.0.inc((chunk.sets.len() * chunk.assets.len()) as u64);
        if is_interrupted() { Err(Error::Interrupted { message: "stopped".into() }) } else { Ok(()) }
    }

    /// A line on stderr, above the bar.
    pub(super) fn note(&self, line: &str) {
        self.0.suspend(|| eprintln!("{line}"));
    }

    pub(super) fn clear(&self) {
        self.0.finish_and_clear();
    }
}
