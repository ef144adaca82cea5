//! `report.html`: one page that shows a sweep, on a phone, in the dark and without a network.
//!
//! Flow     results of a sweep → `replay` (what has to be run again: a sample's train and test scores) → `aggregate` (heat-maps, histogram,
//!          fits, thinned series) → `data` ([`ReportData`]) → the page: template, style, numbers as JSON, plotting library, script.
//! Numbers  stand once, in a JSON block; every chart and table is built from it by `report.js`.
//! Query    `?theme=dark&x=fast&y=slow&stat=turnover&over=max&log=0` opens the page in that state; `check=1` also writes what the charts
//!          hold into a hidden element, for tests.
//! Size     about 1.5 MB of plotting library, at most some megabytes of numbers, whatever the sweep.
//! Library  plotly.js, cartesian bundle 3.7.0 (MIT, plotly-LICENSE.txt), as published on npm (plotly.js-cartesian-dist-min). The crate
//!          `plotly` embeds the complete bundle and a formula typesetter: 6.8 MB a page.
//! Files    report.html · report.css · report.js · plotly-cartesian.min.js

mod aggregate;
mod data;
mod replay;

pub use aggregate::{Axis, BINS, Fit, Histogram, MOST_BARS, MOST_POINTS, STATISTICS, Surface};
pub use data::{BestSet, ChoiceLine, Choices, CostRow, Curve, Luck, ReportData, Total};
pub use replay::{ChosenScores, MOST_SAMPLED, TrainTest};

use crate::data::Prices;
use crate::sim::sweep::{SweepConfig, SweepReport};
use crate::{Device, Error, Result};
use serde_json::Value;
use std::path::Path;

const TEMPLATE: &str = include_str!("report.html");
const STYLE: &str = include_str!("report.css");
const SCRIPT: &str = include_str!("report.js");
const PLOTLY: &str = include_str!("plotly-cartesian.min.js");

/// What a report is made of.
pub struct Inputs<'a> {
    /// Where the sweep ran, and where the sample runs.
    pub device: &'a Device,
    /// The prices that were swept.
    pub prices: &'a Prices,
    /// What was swept.
    pub config: &'a SweepConfig,
    /// What was found.
    pub report: &'a SweepReport,
    /// How the results were made: an object of names and values.
    pub provenance: &'a Value,
    /// What to make of it, a sentence each.
    pub verdict: Vec<String>,
    /// Multiple-testing summary, where there is one.
    pub luck: Option<Luck>,
}

/// Writes the page. It appears under its name only when it is whole.
/// # Errors
/// `Io` where the file cannot be written.
pub fn write(path: &Path, data: &ReportData) -> Result<()> {
    let page = page(data)?;
    let io = |at: &Path, e: std::io::Error| Error::Io { path: at.display().to_string(), message: format!("cannot be written: {e}") };
    let partial = path.with_extension(format!("html.{}", std::process::id()));
    std::fs::write(&partial, page).map_err(|e| io(&partial, e))?;
    std::fs::rename(&partial, path).map_err(|e| {
        // Best effort: the error that led here is the one to report.
        let _ = std::fs::remove_file(&partial);
        io(path, e)
    })
}

/// The page as text.
/// # Errors
/// `Internal` if the data cannot be serialised.
pub fn page(data: &ReportData) -> Result<String> {
    // Inside a script block only `<` can end the block; in JSON it stands in texts alone, where it has an escape.
    let json = serde_json::to_string(data).map_err(|e| Error::Internal(e.to_string()))?.replace('<', "\\u003c");
    let title = format!("forback: {}, {}", data.strategy, data.subtitle);
    let parts = [("title", escape(&title)), ("style", STYLE.into()), ("data", json), ("plotly", PLOTLY.into()), ("script", SCRIPT.into())];
    let mut page = String::with_capacity(parts.iter().map(|p| p.1.len()).sum::<usize>() + TEMPLATE.len());
    let mut rest = TEMPLATE;
    for (name, text) in &parts {
        let mark = format!("{{{{{name}}}}}");
        let (before, after) = rest.split_once(&mark).ok_or_else(|| Error::Internal(format!("report.html has no {mark} in its place")))?;
        page.push_str(before);
        page.push_str(text);
        rest = after;
    }
    page.push_str(rest);
    Ok(page)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
