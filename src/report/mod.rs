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
//! Files    report.html · report.css · page.js (what all pages share) · report.js · plotly-cartesian.min.js; regimes.html and regimes.js are the
//!          page of `forback regimes`, hedge.html and hedge.js that of `forback hedge`

mod aggregate;
mod data;
pub mod hedge;
pub mod regimes;
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
const SHARED: &str = include_str!("page.js");
const SCRIPT: &str = include_str!("report.js");
const LICENCE: &str = include_str!("plotly-LICENSE.txt");
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
    write_whole(path, &page(data)?)
}

fn write_whole(path: &Path, page: &str) -> Result<()> {
    let io = |at: &Path, e: std::io::Error| Error::Io { path: at.display().to_string(), message: format!("cannot be written: {e}") };
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let partial = path.with_file_name(format!(".{name}.{}", std::process::id()));
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
    assembled(TEMPLATE, &format!("forback: {}, {}", data.strategy, data.subtitle), data, SCRIPT)
}

/// A template with its title, the style, the numbers, the library and the scripts in their places.
fn assembled(template: &str, title: &str, data: &impl serde::Serialize, script: &str) -> Result<String> {
    // Inside a script block only `<` can end the block; in JSON it stands in texts alone, where it has an escape.
    let json = serde_json::to_string(data).map_err(|e| Error::Internal(e.to_string()))?.replace('<', "\\u003c");
    let script = format!("{SHARED}{script}");
    let parts = [("title", escape(title)), ("style", STYLE.into()), ("data", json), ("licence", LICENCE.into()), ("plotly", PLOTLY.into()), ("script", script)];
    let mut page = String::with_capacity(parts.iter().map(|p| p.1.len()).sum::<usize>() + template.len());
    let mut rest = template;
    for (name, text) in &parts {
        let mark = format!("{{{{{name}}}}}");
        let (before, after) = rest.split_once(&mark).ok_or_else(|| Error::Internal(format!("a page's template has no {mark} in its place")))?;
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::kernels::philox::{philox4x32, uniform};
    use crate::report::aggregate::{evenly, growth, surfaces, thinned};

    fn unit(i: usize, stream: u32) -> f64 {
        uniform(philox4x32([i as u32, stream, 0, 0], [3, 1])[0])
    }

    /// A page as large as pages get: a million sets over four axes, curves, choices and scores at their limits.
    fn largest() -> ReportData {
        let n = 1_000_000;
        let column = |values: usize, stream| (0..n).map(|i| (values as f64 * unit(i, stream)) as f32).collect::<Vec<f32>>();
        let columns = [column(1000, 0), column(1000, 1), column(1000, 2), column(1000, 3)];
        let statistics: Vec<[f64; 4]> = (0..n).map(|i| philox4x32([i as u32, 9, 0, 0], [3, 1]).map(|w| 3.0 * uniform(w) - 1.0)).collect();
        let (axes, surfaces) = surfaces(&["lookback", "vol_window", "target_vol", "max_leverage"], &columns, &|s| statistics[s]);
        let total = Total { sharpe: 0.5, total_return: 1.0 / 3.0, max_drawdown: 0.2, sortino: 0.7, probabilistic_sharpe: 0.9, turnover: 12.0 };
        let returns: Vec<f32> = (0..100_000).map(|i| (0.01 * (unit(i, 5) - 0.49)) as f32).collect();
        let (equity, drawdown) = growth(&returns);
        let kept = thinned(&equity, &drawdown);
        let curve = |c: usize| Curve {
            kind: ["per_asset", "pooled"][c % 2],
            cost_bps: Some(c as f64),
            time: kept.iter().map(|&k| 1_300_000_000 + 60 * k as i64).collect(),
            equity: kept.iter().map(|&k| aggregate::short(equity[k])).collect(),
            drawdown: kept.iter().map(|&k| aggregate::short(drawdown[k])).collect(),
            points: equity.len(),
            total,
        };
        let scores = |stream| (0..MOST_SAMPLED).map(|i| aggregate::short(unit(i, stream))).collect::<Vec<f64>>();
        let set: Vec<u64> = evenly(n, MOST_SAMPLED).into_iter().map(|s| s as u64).collect();
        let places: Vec<u32> = set.iter().map(|&s| s as u32).collect();
        let chosen = |selection| ChosenScores {
            selection,
            of: 1 << 20,
            window: places.clone(),
            asset: places.iter().map(|&s| i64::from(s)).collect(),
            set: set.clone(),
            train: scores(6),
            test: scores(7),
            fit: Fit::of(&scores(6), &scores(7)),
        };
        let choices = |kind| Choices {
            kind,
            windows: 5000,
            test: (0..1000).map(|w| [1_300_000_000 + w, 1_300_000_900 + w]).collect(),
            sets: set.iter().map(|&s| vec![s as f32; 4]).collect(),
            set: set.clone(),
            lines: (0..50).map(|a| ChoiceLine { asset: format!("ASSET{a}"), at: (0..1000).map(|w| (a * 31 + w * 7) % MOST_SAMPLED).collect() }).collect(),
            quantiles: Vec::new(),
        };
        ReportData {
            strategy: "ts_momentum".into(),
            doc: "weights by trend".into(),
            subtitle: "1,000,000 sets".into(),
            facts: vec![("Data".into(), "</script><script>alert(1)</script>".into())],
            verdict: vec!["None.".into()],
            rank_by: "sharpe".into(),
            cost_bps: 10.0,
            assets: 50,
            parameters: axes.iter().map(|a| a.name.clone()).collect(),
            best: Vec::new(),
            sharpe: Histogram::of(n, |s| statistics[s][0]),
            axes,
            surfaces,
            luck: Some(Luck {
                best_sharpe: 2.0,
                expected_max_sharpe: 1.9,
                trials: 1e6,
                probabilistic_sharpe: 0.99,
                deflated_sharpe: 0.6,
                pbo: 0.4,
                level: 0.95,
                in_sample: [0.1, 3.9],
                out_of_sample: [f64::NAN; 2],
                years: 9.4,
                minimum_years: f64::INFINITY,
            }),
            train_test: Some(TrainTest {
                of: n,
                set: set.clone(),
                train: scores(6),
                test: scores(7),
                fit: Fit::of(&scores(6), &scores(7)),
                chosen: vec![chosen("per_asset"), chosen("pooled")],
            }),
            train_test_missing: None,
            curves: (0..24).map(curve).collect(),
            choices: vec![choices("per_asset"), choices("pooled")],
            costs: (0..50)
                .map(|c| CostRow { cost_bps: f64::from(c), best: None, best_at_first: vec![1.0; 10], per_asset: Some(total), pooled: None })
                .collect(),
            provenance: serde_json::json!({ "version": "0" }),
        }
    }

    #[test]
    fn a_million_sets_make_a_small_page() {
        let data = largest();
        assert_eq!((data.axes.len(), data.surfaces.len()), (4, 10));
        for surface in &data.surfaces {
            assert_eq!(surface.count.iter().sum::<u64>(), 1_000_000);
            assert!(surface.count.len() <= BINS * BINS);
        }
        let page = page(&data).unwrap();
        println!("{:.2} MB, of which {:.2} MB are the library", page.len() as f64 / 1e6, PLOTLY.len() as f64 / 1e6);
        assert!(page.len() < 8_000_000, "{} bytes", page.len());
        assert!(!page.contains("<script>alert"), "texts cannot end the block that they stand in");
        let json = page.split_once("id=\"report-data\">").unwrap().1.split_once("</script>").unwrap().0;
        let again: Value = serde_json::from_str(json).unwrap();
        assert_eq!(again["facts"][0][1], "</script><script>alert(1)</script>");
        assert!(again["luck"]["minimum_years"].is_null(), "undefined is null");
        assert_eq!(again["luck"]["expected_max_sharpe"], 1.9);
        // To look at it: FORBACK_REPORT=/tmp/largest.html cargo test a_million_sets
        if let Ok(at) = std::env::var("FORBACK_REPORT") {
            write(Path::new(&at), &data).unwrap();
        }
    }

    #[test]
    fn a_page_that_cannot_be_written_is_an_error_with_its_path() {
        let error = write(Path::new("/nowhere/at/all/report.html"), &small()).unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if path.starts_with("/nowhere")), "{error}");
    }

    fn small() -> ReportData {
        ReportData {
            strategy: String::new(),
            doc: String::new(),
            subtitle: String::new(),
            facts: Vec::new(),
            verdict: Vec::new(),
            rank_by: "sharpe".into(),
            cost_bps: 0.0,
            assets: 1,
            parameters: Vec::new(),
            best: Vec::new(),
            axes: Vec::new(),
            surfaces: Vec::new(),
            sharpe: Histogram::of(0, |_| f64::NAN),
            luck: None,
            train_test: None,
            train_test_missing: None,
            curves: Vec::new(),
            choices: Vec::new(),
            costs: Vec::new(),
            provenance: Value::Null,
        }
    }
}
