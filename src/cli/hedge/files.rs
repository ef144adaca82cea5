//! `forback hedge --out DIR`: results.parquet and results.csv (a row per set-up), run.json, config.toml and report.html.

use super::judge::{label, phrase};
use super::print::{FIGURES, parameter};
use super::{Found, judge};
use crate::cli::results::{Whole, io};
use crate::report::hedge as page;
use crate::sim::hedge::{Explained, HedgeRow, Policy};
use crate::{Error, Result};
use arrow_array::{ArrayRef, BooleanArray, Float64Array, RecordBatch, StringArray, UInt32Array};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use serde_json::json;
use std::path::Path;
use std::sync::Arc;

pub(super) fn write(dir: &Path, found: &Found<'_>, config: &str) -> Result<()> {
    parquet(dir, found)?;
    csv(dir, found)?;
    let mut run = found.job.provenance();
    run["seconds"] = json!(found.seconds);
    run["verdict"] = json!(found.verdict);
    Whole::text(dir, "run.json", &serde_json::to_string_pretty(&run).map_err(|e| Error::Internal(e.to_string()))?)?;
    Whole::text(dir, "config.toml", config)?;
    page::write(&dir.join("report.html"), &page_of(found)?)
}

/// The words of a row, by column.
const WORDS: [&str; 4] = ["market", "option", "position", "policy"];

fn words(found: &Found<'_>, row: &HedgeRow) -> [String; 4] {
    let request = &found.job.request;
    let market = request.markets.get(row.setup.market).map_or_else(String::new, |m| m.name.clone());
    let option = request.options.get(row.setup.option).map_or("", |o| o.kind.name());
    [market, option.into(), found.job.args.position.clone(), row.setup.policy.name().into()]
}

/// The numbers that say which set-up a row is.
const KEYS: [&str; 5] = ["strike", "maturity", "parameter", "rebalance", "cost_bps"];

fn keys(found: &Found<'_>, row: &HedgeRow) -> [f64; 5] {
    let option = found.job.request.options.get(row.setup.option);
    let [strike, maturity] = option.map_or([f64::NAN; 2], |o| [o.strike, o.maturity]);
    [strike, maturity, parameter(&row.setup.policy), f64::from(row.setup.rebalance), row.setup.costs.proportional_bps]
}

fn parquet(dir: &Path, found: &Found<'_>) -> Result<()> {
    let rows = found.rows;
    let real = |values: Vec<f64>| -> ArrayRef { Arc::new(values.into_iter().map(|x| x.is_finite().then_some(x)).collect::<Float64Array>()) };
    let mut columns: Vec<(&str, ArrayRef)> = vec![("setup", Arc::new(UInt32Array::from((0..rows.len() as u32).collect::<Vec<_>>())))];
    for (k, name) in WORDS.iter().enumerate() {
        columns.push((name, Arc::new(StringArray::from(rows.iter().map(|row| words(found, row)[k].clone()).collect::<Vec<_>>()))));
    }
    for (k, name) in KEYS.iter().enumerate() {
        columns.push((name, real(rows.iter().map(|row| keys(found, row)[k]).collect())));
    }
    columns.push(("frontier", Arc::new(BooleanArray::from((0..rows.len()).map(|i| found.is_on_frontier(i)).collect::<Vec<_>>()))));
    columns.extend(FIGURES.iter().map(|(name, of)| (*name, real(rows.iter().map(of).collect()))));
    let batch =
        RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, array)| (name, array, true))).map_err(|e| Error::Internal(e.to_string()))?;
    let metadata = vec![KeyValue::new("forback".to_string(), found.job.provenance().to_string())];
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).set_key_value_metadata(Some(metadata)).build();
    let (whole, file) = Whole::create(dir, "results.parquet", 300.0 * rows.len() as f64)?;
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).map_err(|e| io(&whole.path, &e))?;
    writer.write(&batch).map_err(|e| whole.failed(&e))?;
    writer.close().map_err(|e| whole.failed(&e))?;
    whole.keep()
}

fn csv(dir: &Path, found: &Found<'_>) -> Result<()> {
    let (whole, file) = Whole::create(dir, "results.csv", 400.0 * found.rows.len() as f64)?;
    let mut csv = csv::Writer::from_writer(file);
    let head = ["setup"].into_iter().chain(WORDS).chain(KEYS).chain(["frontier"]).chain(FIGURES.iter().map(|f| f.0));
    csv.write_record(head).map_err(|e| whole.failed(&e))?;
    let cell = |x: f64| if x.is_finite() { format!("{x:?}") } else { String::new() };
    for (i, row) in found.rows.iter().enumerate() {
        let mut cells = vec![i.to_string()];
        cells.extend(words(found, row));
        cells.extend(keys(found, row).map(cell));
        cells.push(found.is_on_frontier(i).to_string());
        cells.extend(FIGURES.iter().map(|(_, of)| cell(of(row))));
        csv.write_record(&cells).map_err(|e| whole.failed(&e))?;
    }
    csv.flush().map_err(|e| whole.failed(&e))?;
    drop(csv);
    whole.keep()
}

// ---- the page ---------------------------------------------------------------------------------------------------------

/// Most set-ups whose path the page explains.
const EXPLAINED: usize = 8;
/// The path that it explains.
const PATH: u64 = 0;

/// Of the first group with the dearest costs, the least risky row of each policy.
fn explained(found: &Found<'_>) -> Vec<usize> {
    let rows = found.rows;
    let groups = judge::groups(rows);
    let bps = |group: &Vec<usize>| judge::costs_of(rows, group).fraction();
    let mut best: Option<&Vec<usize>> = None;
    for group in &groups {
        if best.is_none_or(|b| bps(group) > bps(b)) {
            best = Some(group);
        }
    }
    let mut chosen: Vec<usize> = Vec::new();
    for &i in best.into_iter().flatten() {
        if rows[i].setup.policy == Policy::None {
            continue;
        }
        match chosen.iter_mut().find(|c| rows[**c].setup.policy.name() == rows[i].setup.policy.name()) {
            Some(c) if found.job.risk.of(&rows[i]) < found.job.risk.of(&rows[*c]) => *c = i,
            Some(_) => {}
            None => chosen.push(i),
        }
    }
    chosen.truncate(EXPLAINED);
    chosen
}

fn page_of(found: &Found<'_>) -> Result<page::Page> {
    let (job, request) = (found.job, &found.job.request);
    let groups = judge::groups(found.rows);
    let several = |f: &dyn Fn(&HedgeRow) -> usize| found.rows.iter().any(|row| f(row) != f(&found.rows[0]));
    let group = |members: &Vec<usize>| {
        let (s, costs) = (&found.rows[members[0]].setup, judge::costs_of(found.rows, members));
        let mut name = format!("{} bp", costs.proportional_bps + costs.half_spread_bps);
        if several(&|row| row.setup.market) {
            name += &format!(", {}", request.markets[s.market].name);
        }
        if several(&|row| row.setup.option) {
            name += &format!(", strike {}", request.options[s.option].strike);
        }
        page::Group { name, rows: members.clone(), frontier: Vec::new() }
    };
    let frontier = |risk: judge::Risk| groups.iter().map(|g| judge::frontier(found.rows, g, risk)).collect::<Vec<_>>();
    let risks = [judge::Risk::Sd, judge::Risk::Cvar, judge::Risk::Var, judge::Risk::Entropic];
    let all: Vec<Vec<Vec<usize>>> = risks.iter().map(|&risk| frontier(risk)).collect();
    let mut listed: Vec<page::Group> = groups.iter().map(group).collect();
    for (g, entry) in listed.iter_mut().enumerate() {
        entry.frontier = all.iter().map(|of_risk| of_risk[g].clone()).collect();
    }
    let row = |(i, row): (usize, &HedgeRow)| page::Row {
        number: i,
        name: phrase(&row.setup),
        policy: row.setup.policy.name().into(),
        label: label(&row.setup.policy),
        rebalance: row.setup.rebalance,
        cost_bps: row.setup.costs.proportional_bps,
        hedge_volatility: row.setup.hedge_volatility,
        premium: row.premium,
        mean: [row.risk.mean, row.risk.mean_error],
        risks: risks.map(|risk| risk.of(row)),
        errors: [row.risk.sd_error, row.risk.cvar_error, row.risk.var_error, row.risk.entropic_error],
        skew: row.risk.skew,
        cost: [row.risk.cost, row.risk.cost_error],
        turnover: row.risk.turnover,
        indifference: row.risk.indifference_price,
        theory: [row.theory.sd, row.theory.cost],
        histogram: page::Shape::of(&row.histogram),
    };
    let walk = |i: usize| -> Result<page::Walk> {
        let told: Explained = job.explain(i, PATH)?;
        Ok(page::Walk::of(i, &told))
    };
    let option = request.options.first();
    let side = &job.args.position;
    let title = option.map_or_else(String::new, |o| format!("Hedging a {side} {}", o.kind.name()));
    let mut facts = vec![
        ("Market".to_string(), job.source.line.clone()),
        ("Paths".into(), format!("{} × {} steps, seed {}", super::grouped(found.table.paths), request.steps, request.seed)),
        ("Device".into(), job.device.info().to_string()),
    ];
    if let Some(o) = option {
        let strikes: Vec<String> = request.options.iter().map(|o| super::print::round(o.strike).to_string()).collect();
        let premium = found.rows.first().map_or(f64::NAN, |r| r.premium.abs());
        let text =
            format!("{side} 1 {}, strike {}, {} years, premium {}", o.kind.name(), strikes.join(", "), super::print::round(o.maturity), job.money(premium));
        facts.insert(1, ("Option".into(), text));
    }
    facts.extend(job.source.notes.iter().map(|note| ("Note".to_string(), note.clone())));
    Ok(page::Page {
        title,
        facts,
        verdict: found.verdict.clone(),
        digits: job.digits(),
        alpha: request.risk.alpha,
        risk: job.risk.name().into(),
        groups: listed,
        rows: found.rows.iter().enumerate().map(row).collect(),
        path: PATH,
        walks: explained(found).into_iter().map(walk).collect::<Result<Vec<_>>>()?,
        provenance: job.provenance(),
    })
}
