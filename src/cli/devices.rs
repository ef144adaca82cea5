//! `forback devices`: what this machine has.

use super::say;
use crate::Result;
use crate::kernels::device::{Probe, probe};
use serde_json::json;
use std::process::ExitCode;

/// Arguments of `forback devices`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Machine-readable results on stdout, one object a line.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    for Probe { spec, found } in probe() {
        match (&found, args.json) {
            (Ok((info, limits)), true) => {
                say(&json!({ "device": spec, "found": true, "adapter": info.adapter, "driver": info.driver, "software": info.software,
                    "binding_bytes": limits.binding_bytes, "buffer_bytes": limits.buffer_bytes,
                    "groups_per_dimension": limits.groups_per_dimension, "memory_bytes": limits.memory_bytes })
                .to_string())
            }
            (Err(error), true) => say(&json!({ "device": spec, "found": false, "reason": error.to_string() }).to_string()),
            (Ok((info, limits)), false) => {
                let software = if info.software { ", software" } else { "" };
                let binding = if limits.binding_bytes == u64::MAX { String::new() } else { format!(", bindings up to {} MiB", limits.binding_bytes >> 20) };
                let driver = if info.driver.is_empty() { String::new() } else { format!(", {}", info.driver) };
                say(&format!("{spec:<10} {}{driver}{software}{binding}", info.adapter));
            }
            (Err(error), false) => say(&format!("{spec:<10} not here: {error}")),
        }
    }
    Ok(ExitCode::SUCCESS)
}
