//! `forback merge`: the shards of a sweep, made on one machine or many, put together.

use super::results::{self, Rows};
use super::store::{Store, difference};
use super::sweep::{Done, Prepared};
use super::{Command, config};
use crate::sim::parts::Fold;
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Arguments of `forback merge`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Folders of shards, or folders that hold shard-I-of-N folders.
    #[arg(required = true, value_name = "DIR")]
    shards: Vec<PathBuf>,
    /// Folder for the results of the whole sweep.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The price files, where they are no longer at the recorded paths.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    data: Vec<PathBuf>,
    /// Device for the winners' last run (default: as the shards).
    #[arg(long)]
    device: Option<String>,
    /// Machine-readable results on stdout, nothing else there.
    #[arg(long)]
    json: bool,
}

fn refused(shard: &Store, help: String) -> Error {
    let name = shard.job().shard.map_or("shard".into(), |(i, n)| format!("shard {i}/{n}"));
    Error::Parameter { op: "merge", name, value: shard.dir().display().to_string(), help }
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let start = Instant::now();
    let shards = open(&args.shards)?;
    check(&shards)?;
    let first = shards.first().ok_or_else(|| Error::Internal("there is a shard".into()))?;
    let text = &first.job().config;
    let Command::Sweep(mut sweep) = config::command(text, &first.dir().join("job.json"))? else {
        return Err(refused(first, "its options are not those of a sweep".into()));
    };
    if !args.data.is_empty() {
        sweep.prices.files.clone_from(&args.data);
    }
    if let Some(device) = &args.device {
        sweep.common.device.clone_from(device);
    }
    (sweep.common.json, sweep.out) = (args.json, Some(args.out.clone()));
    results::folder(&args.out)?;
    let prepared = Prepared::of(&sweep)?;
    if let Some((field, theirs, ours)) = difference(&first.job().identity, &prepared.identity()) {
        let hint = if field == "data" || field == "panel" { "; name the same price files with --data" } else { "" };
        return Err(refused(first, format!("it was made with {field} {theirs}, here it is {ours}{hint}")));
    }
    let run = prepared.run()?;
    let mut fold = Fold::new(run.len(), prepared.config.cost_bps.len());
    let mut seconds = 0.0;
    for shard in &shards {
        for sets in shard.parts() {
            let (part, took) = shard.load(sets, run.assets(), prepared.config.cost_bps.len())?;
            fold.add(&part)?;
            seconds += took;
        }
        if let Some(gap) = fold.missing(shard.job().sets.clone()).first() {
            return Err(refused(shard, format!("sets {} to {} are missing; run it again with --resume", gap.start, gap.end - 1)));
        }
    }
    let report = run.finish(fold, &mut |_| Ok(()))?;
    let seconds = seconds + start.elapsed().as_secs_f64();
    let done = Done { args: &sweep, prepared: &prepared, run: &run, report: &report, seconds, config: text };
    done.deliver(Some(&args.out), &Rows::Stored(&shards))
}

/// The shards in the folders, by number.
fn open(dirs: &[PathBuf]) -> Result<Vec<Store>> {
    let mut shards = Vec::new();
    for dir in dirs {
        if Store::is_in(dir) {
            shards.push(Store::open(dir.clone())?);
            continue;
        }
        let below = below(dir)?;
        if below.is_empty() {
            return Err(Error::Io { path: dir.display().to_string(), message: "holds no shard; make one with forback sweep --shard 1/3 --out DIR".into() });
        }
        for dir in below {
            shards.push(Store::open(dir)?);
        }
    }
    shards.sort_by_key(|shard| shard.job().shard);
    Ok(shards)
}

/// Folders shard-I-of-N in a folder.
fn below(dir: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |e: std::io::Error| Error::Io { path: dir.display().to_string(), message: format!("cannot be read: {e}") };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let named = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("shard-"));
        if named && Store::is_in(&path) {
            found.push(path);
        }
    }
    Ok(found)
}

/// All shards of one sweep, each once, each finished.
fn check(shards: &[Store]) -> Result<()> {
    let Some(first) = shards.first() else { return Ok(()) };
    for shard in shards {
        let Some((_, n)) = shard.job().shard else {
            return Err(refused(shard, "this is a sweep that was not sharded; go on with forback sweep --resume".into()));
        };
        if let Some((field, theirs, ours)) = difference(&shard.job().identity, &first.job().identity) {
            return Err(refused(shard, format!("it belongs to another sweep: its {field} is {theirs}, that of {} is {ours}", first.dir().display())));
        }
        if let Some((_, other)) = first.job().shard.filter(|(_, other)| *other != n) {
            return Err(refused(shard, format!("it is one of {n} shards, {} one of {other}", first.dir().display())));
        }
        if shard.job().partial {
            return Err(refused(shard, "it is not finished; run it again with --resume".into()));
        }
    }
    if let Some(pair) = shards.windows(2).find(|pair| pair[0].job().shard == pair[1].job().shard) {
        return Err(refused(&pair[1], format!("it is there twice, also in {}; give each shard once", pair[0].dir().display())));
    }
    let n = first.job().shard.map_or(0, |(_, n)| n);
    if let Some(i) = (1..=n).find(|&i| !shards.iter().any(|shard| shard.job().shard == Some((i, n)))) {
        let help = format!("it is not there; make it with --shard {i}/{n}, or name its folder");
        return Err(Error::Parameter { op: "merge", name: format!("shard {i}/{n}"), value: "missing".into(), help });
    }
    Ok(())
}
