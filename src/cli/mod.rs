//! The command line. Results go to stdout, everything else to stderr; exit 0 done, 1 a check failed, 2 wrong usage or input.

mod verify;

use crate::{Device, Result};
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Kernels that go forward and back: walk-forward back-test sweeps in one GPU pass.
#[derive(Parser)]
#[command(name = "forback", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check a device against expected results from other libraries and closed forms.
    Verify(verify::Args),
}

/// Options of every command.
#[derive(clap::Args)]
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

/// Runs the command line.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Verify(args) => verify::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
