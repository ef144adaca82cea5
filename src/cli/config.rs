//! `--config FILE`: the options of a sweep, a training or a hedge as TOML, under their long names. The command line wins over the file.
//!
//! ```toml
//! strategy = "sma_cross"
//! cost-bps = [5, 10]
//! files = ["prices.csv"]
//! [grid]                               # or grid = "fast=2:100:2,slow=20|50|100,slow>=3*fast"
//! fast = "2:100:2"
//! slow = [20, 50, 100]
//! constraints = ["slow>=3*fast"]
//! ```
//! An entry becomes the option of the same name, so what is legal, and what it means, is what the command line says.

use super::{Cli, Command};
use crate::{Error, Result};
use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, CommandFactory, FromArgMatches};
use std::ffi::OsString;
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// Why a command line was not taken.
pub(super) enum Refusal {
    /// clap's own words, help and version among them.
    Usage(clap::Error),
    /// A config file that cannot be used.
    Config(Error),
}

impl From<clap::Error> for Refusal {
    fn from(error: clap::Error) -> Refusal {
        Refusal::Usage(error)
    }
}

/// Options that say how to run and not what: they are not written back.
const NOT_WRITTEN: [&str; 11] = ["config", "out", "json", "resume", "shard", "plan", "part_sets", "replay", "setup", "help", "version"];

/// Commands that take a config file.
const COMMANDS: [&str; 3] = ["sweep", "train", "hedge"];

/// The price files, which the command line takes without a name.
const FILES: &str = "files";

/// The command line with the options of its config file, and those options as TOML, to be written beside the results.
pub(super) fn parse(mut argv: Vec<OsString>) -> std::result::Result<(Command, String), Refusal> {
    let mut matches = Cli::command().try_get_matches_from(&argv)?;
    let given = COMMANDS.iter().find_map(|&name| Some((name, matches.subcommand_matches(name)?.clone())));
    let config = given.as_ref().and_then(|(name, given)| Some((*name, given.get_one::<std::path::PathBuf>("config")?.clone(), given)));
    if let Some((name, path, given)) = config {
        let file = path.display().to_string();
        let text = std::fs::read_to_string(&path)
            .map_err(|e| Refusal::Config(Error::Io { path: file.clone(), message: format!("cannot be read: {e}; name a TOML file with --config") }))?;
        let entries = entries(name, &text, &file).map_err(Refusal::Config)?;
        let at = argv.iter().position(|word| word == name).map_or(argv.len(), |i| i + 1);
        let on_the_line = |id: &str| given.value_source(id) == Some(ValueSource::CommandLine);
        for entry in entries.into_iter().filter(|entry| !on_the_line(&entry.id)) {
            entry.check(name, &file).map_err(Refusal::Config)?;
            if entry.id == FILES {
                argv.extend(entry.words.into_iter().map(OsString::from));
            } else {
                argv.splice(at..at, entry.words.into_iter().map(OsString::from));
            }
        }
        matches = Cli::command().try_get_matches_from(&argv)?;
    }
    let written = COMMANDS.iter().find_map(|&name| Some(written(name, matches.subcommand_matches(name)?))).unwrap_or_default();
    Ok((Cli::from_arg_matches(&matches)?.command, written))
}

/// The command that a config text stands for.
pub(super) fn command(text: &str, file: &Path) -> Result<Command> {
    let file = file.display().to_string();
    let mut argv: Vec<String> = vec!["forback".into(), "sweep".into()];
    let (files, options): (Vec<Entry>, Vec<Entry>) = entries("sweep", text, &file)?.into_iter().partition(|entry| entry.id == FILES);
    for entry in options.into_iter().chain(files) {
        entry.check("sweep", &file)?;
        argv.extend(entry.words);
    }
    let cli = Cli::command().try_get_matches_from(&argv).and_then(|matches| Cli::from_arg_matches(&matches));
    cli.map(|cli| cli.command).map_err(|e| bad(&file, None, None, e.kind().to_string(), "correct the options".into()))
}

// ---- reading ---------------------------------------------------------------------------------------------------------

/// An entry as words of a command line.
struct Entry {
    id: String,
    key: String,
    line: u64,
    words: Vec<String>,
}

impl Entry {
    /// Refuses a value that the option does not take, by line.
    fn check(&self, command: &str, file: &str) -> Result<()> {
        let argv = ["forback", command].into_iter().map(String::from).chain(self.words.iter().cloned());
        let Err(error) = Cli::command().try_get_matches_from(argv) else { return Ok(()) };
        // Options that need another one are judged with all of them.
        if error.kind() == clap::error::ErrorKind::MissingRequiredArgument {
            return Ok(());
        }
        let text = error.to_string();
        let message = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_string();
        Err(bad(file, Some(self.line), Some(&self.key), message, format!("see forback {command} --help")))
    }
}

fn bad(file: &str, line: Option<u64>, key: Option<&str>, message: String, help: String) -> Error {
    Error::Data { file: file.into(), row: line, column: None, value: key.map(String::from), message, help }
}

fn command_named(name: &str) -> clap::Command {
    let mut cli = Cli::command();
    cli.build();
    cli.find_subcommand(name).cloned().unwrap_or_default()
}

fn entries(command_name: &str, text: &str, file: &str) -> Result<Vec<Entry>> {
    let line_of = |at: usize| 1 + text.bytes().take(at).filter(|&byte| byte == b'\n').count() as u64;
    let table = DeTable::parse(text)
        .map_err(|e| bad(file, e.span().map(|span| line_of(span.start)), None, e.message().replace('\n', ", "), "correct the TOML".into()))?;
    let command = command_named(command_name);
    let mut entries = Vec::new();
    for (key, value) in table.get_ref().iter() {
        let (name, line) = (key.get_ref().to_string(), line_of(key.span().start));
        let refused = |message: &str, help: String| bad(file, Some(line), Some(&name), message.into(), help);
        let list = |value: &DeValue<'_>| {
            words(value).ok_or_else(|| refused("its value is no text, number, true, false or list of these", format!("see forback {command_name} --help")))
        };
        if name == FILES {
            entries.push(Entry { id: name.clone(), key: name.clone(), line, words: list(value.get_ref())? });
            continue;
        }
        let known = || command.get_arguments().filter(|arg| !["config", "help"].contains(&arg.get_id().as_str()));
        let Some(arg) = known().find(|arg| arg.get_long() == Some(name.as_str())) else {
            let names = known().filter_map(|arg| arg.get_long()).chain([FILES]);
            let near = crate::data::nearest(&name.replace('_', "-"), names).map(|near| format!("did you mean '{near}'?"));
            return Err(refused(
                &format!("this is no option of forback {command_name}"),
                near.unwrap_or_else(|| format!("forback {command_name} --help lists the options")),
            ));
        };
        let id = arg.get_id().to_string();
        let words = match (value.get_ref(), arg.get_action()) {
            (DeValue::Boolean(true), ArgAction::SetTrue) => vec![format!("--{name}")],
            (DeValue::Boolean(false), ArgAction::SetTrue) => Vec::new(),
            (_, ArgAction::SetTrue) => return Err(refused("this is a switch", "write true or false".into())),
            (DeValue::Table(table), _) if name == "grid" => {
                let text = grid(table.iter().map(|(key, value)| (key.get_ref().as_ref(), value.get_ref())));
                let help = "write names with values, such as fast = \"2:100:2\"".into();
                vec![format!("--grid={}", text.ok_or_else(|| refused("a value of the grid is no text, number or list of these", help))?)]
            }
            (value, _) => vec![format!("--{name}={}", list(value)?.join(","))],
        };
        entries.push(Entry { id, key: name, line, words });
    }
    Ok(entries)
}

/// A value as texts: one, or those of a list.
fn words(value: &DeValue<'_>) -> Option<Vec<String>> {
    Some(match value {
        DeValue::String(text) => vec![text.to_string()],
        DeValue::Integer(number) => vec![number.as_str().to_string()],
        DeValue::Float(number) => vec![number.as_str().to_string()],
        DeValue::Boolean(truth) => vec![truth.to_string()],
        // A date: as it is written.
        DeValue::Datetime(date) => vec![date.to_string()],
        DeValue::Array(list) => list.iter().map(|value| words(value.get_ref())).collect::<Option<Vec<_>>>()?.concat(),
        DeValue::Table(_) => return None,
    })
}

/// A grid as text: values by name, `constraints` as they are.
fn grid<'a>(entries: impl Iterator<Item = (&'a str, &'a DeValue<'a>)>) -> Option<String> {
    let entry = |(key, value): (&str, &DeValue<'_>)| {
        let words = words(value)?;
        Some(if key == "constraints" { words.join(",") } else { format!("{key}={}", words.join("|")) })
    };
    let entries: Option<Vec<String>> = entries.map(entry).collect();
    entries.map(|entries| entries.join(","))
}

// ---- writing ---------------------------------------------------------------------------------------------------------

/// What a command was asked for, defaults included.
fn written(name: &str, matches: &ArgMatches) -> String {
    let command = command_named(name);
    let what = match name {
        "train" => "training",
        other => other,
    };
    let mut lines = vec![format!("# forback {name} --config FILE repeats this {what}.")];
    for arg in command.get_arguments().filter(|arg| !NOT_WRITTEN.contains(&arg.get_id().as_str())) {
        let (id, key) = (arg.get_id().as_str(), arg.get_long().unwrap_or(FILES));
        if matches!(arg.get_action(), ArgAction::SetTrue) {
            if matches.get_flag(id) {
                lines.push(format!("{key} = true"));
            }
            continue;
        }
        let values: Vec<String> = matches.get_raw(id).into_iter().flatten().map(|value| toml_value(&value.to_string_lossy())).collect();
        match values.as_slice() {
            [] => {}
            [one] if !matches!(arg.get_action(), ArgAction::Append) => lines.push(format!("{key} = {one}")),
            many => lines.push(format!("{key} = [{}]", many.join(", "))),
        }
    }
    lines.join("\n") + "\n"
}

/// A number as it stands, anything else in quotes.
fn toml_value(text: &str) -> String {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    let number = match text.split_once('.') {
        None => digits(text) && text.len() < 19,
        Some((whole, part)) => digits(whole) && !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()),
    };
    if number { text.to_string() } else { toml::Value::String(text.to_string()).to_string() }
}
