//! The command line. Results go to stdout, everything else to stderr; exit 0 done, 1 a check failed, 2 wrong usage or input, 130 stopped
//! by the user.

mod bench;
mod config;
mod devices;
mod hedge;
mod kernels;
mod merge;
mod plan;
mod price_files;
mod print;
mod regime_files;
mod regime_filter;
mod regimes;
mod replay;
mod results;
mod signals;
mod store;
mod sweep;
mod train;
mod train_files;
mod verify;

use crate::{Device, Error, Result};
use clap::{Parser, Subcommand};
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

/// Kernels that go forward and back: walk-forward back-test sweeps in one GPU pass.
#[derive(Parser)]
#[command(name = "forback", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Back-test a grid of strategies walk-forward on a price file, or on a synthetic market without one.
    Sweep(Box<sweep::Args>),
    /// Fit market regimes: hidden Markov models on returns, over the whole sample and refitted as time goes on.
    Regimes(Box<regimes::Args>),
    /// Train neural models walk-forward, and say what their forecasts are worth out of sample.
    Train(Box<train::Args>),
    /// Hedge an option over simulated or historical paths with many policies at once: cost against risk.
    Hedge(Box<hedge::Args>),
    /// Put the shards of a sweep together.
    Merge(merge::Args),
    /// List the devices of this machine, and why the missing ones are missing.
    Devices(devices::Args),
    /// List the kernels: arguments, columns, launches and cost.
    Kernels(kernels::Args),
    /// Check a device against expected results from other libraries and closed forms.
    Verify(verify::Args),
    /// Time the standard workloads on a device.
    Bench(bench::Args),
}

/// Options of every command.
#[derive(clap::Args, Clone)]
struct Common {
    /// auto, cpu, reference, wgpu[:n], cuda[:n] or cuda-host.
    #[arg(long, env = "FORBACK_DEVICE", default_value = "auto")]
    device: String,
    /// Seed of everything random.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Machine-readable results on stdout, nothing else there.
    #[arg(long)]
    json: bool,
}

impl Common {
    fn open(&self) -> Result<Device> {
        Device::open(&self.device)
    }
}

/// Prints a line to stdout; a closed pipe ends the program quietly.
fn say(line: &str) {
    if writeln!(std::io::stdout(), "{line}").is_err() {
        std::process::exit(0);
    }
}

/// Help and version as clap writes them; what is wrong in one line, without the block on usage.
fn usage(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind::{DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion};
    if matches!(error.kind(), DisplayHelp | DisplayHelpOnMissingArgumentOrSubcommand | DisplayVersion) {
        // Best effort: there is no other place to say it.
        let _ = error.print();
        return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
    }
    let text = error.to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"));
    let line = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ").replace(":;", ":");
    eprintln!("{line}; --help lists what there is");
    ExitCode::from(2)
}

/// Panics of the Parquet decoder become errors, and the error says it.
fn quiet_decoder() {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !crate::data::decoding() {
            told(panic);
        }
    }));
}

/// Reads a config text as `--config` does, up to the sweep itself: what a fuzzer may try.
/// # Errors
/// `Data` with the line of what is no TOML, no option of a sweep or no value of it.
pub fn check_config(text: &str) -> Result<()> {
    config::command(text, std::path::Path::new("sweep.toml")).map(drop)
}

/// Runs the command line.
pub fn main() -> ExitCode {
    quiet_decoder();
    let (command, options) = match config::parse(std::env::args_os().collect()) {
        Ok(parsed) => parsed,
        Err(config::Refusal::Usage(error)) => return usage(&error),
        Err(config::Refusal::Config(error)) => return failed(&error),
    };
    let result = match &command {
        Command::Sweep(args) => sweep::run(args, &options),
        Command::Regimes(args) => regimes::run(args),
        Command::Train(args) => train::run(args, &options),
        Command::Hedge(args) => hedge::run(args, &options),
        Command::Merge(args) => merge::run(args),
        Command::Devices(args) => devices::run(args),
        Command::Kernels(args) => kernels::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Bench(args) => bench::run(args),
    };
    match result {
        Ok(code) => code,
        Err(error) => failed(&error),
    }
}

fn failed(error: &Error) -> ExitCode {
    if let Error::Interrupted { message } = error {
        eprintln!("interrupted: {message}");
        return ExitCode::from(STOPPED);
    }
    eprintln!("error: {error}");
    ExitCode::from(2)
}

// ---- stopping ----------------------------------------------------------------------------------------------------

/// Exit code of a run that the user stopped.
const STOPPED: u8 = 130;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Lets Ctrl-C and SIGTERM stop a run at the next opportunity; a second one stops it at once.
fn catch_interrupts() -> Result<()> {
    let stop = || {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(STOPPED.into());
        }
    };
    ctrlc::set_handler(stop).map_err(|e| Error::Internal(format!("Ctrl-C cannot be caught: {e}")))
}

/// Whether the user wants to stop.
fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}
