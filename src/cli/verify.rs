//! `forback verify`: every conformance file under the paths, a row each.

use super::say;
use crate::Result;
use crate::conformance::verify;
use crate::kernels::conformance::{Case, Verdict, files};
use crate::kernels::{Device, Error};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `forback verify`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Conformance files, or folders of them.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    #[command(flatten)]
    common: super::Common,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let device = args.common.open()?;
    let files = files(&args.paths)?;
    if files.is_empty() {
        return Err(Error::Io { path: args.paths[0].display().to_string(), message: "no .safetensors file here".into() });
    }
    if !args.common.json {
        say(&format!("device {}", device.info()));
        say(&format!("{:<22} {:<28} {:>8} {:>12} {:>10}  worst", "kernel", "case", "launches", "of tolerance", "ms"));
    }
    let mut failed = 0;
    for path in &files {
        let verdict = match Case::read(path) {
            Ok(case) => verify(&device, &case),
            Err(error) => unread(path, &error),
        };
        failed += usize::from(verdict.failure.is_some());
        print(&verdict, &device, args.common.json);
    }
    let line = format!("{} passed, {failed} failed", files.len() - failed);
    if args.common.json {
        eprintln!("{line}");
    } else {
        say(&line);
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn unread(path: &std::path::Path, error: &Error) -> Verdict {
    let case = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    Verdict { kernel: "?".into(), case, launches: 0, share: f64::INFINITY, worst: String::new(), ms: 0.0, failure: Some(error.to_string()) }
}

fn print(verdict: &Verdict, device: &Device, json: bool) {
    let Verdict { kernel, case, launches, share, worst, ms, failure } = verdict;
    if json {
        let number = |x: f64| if x.is_finite() { json!(x) } else { Value::Null };
        let device = device.info().kind.name();
        let row = json!({ "kernel": kernel, "case": case, "device": device, "launches": launches, "passed": failure.is_none(),
            "share": number(*share), "worst": worst, "ms": number(*ms), "failure": failure });
        say(&row.to_string());
    } else {
        let result = failure.as_deref().map_or(worst.clone(), |f| format!("FAILED: {f}"));
        say(&format!("{kernel:<22} {case:<28} {launches:>8} {share:>12.4} {ms:>10.2}  {result}"));
    }
}
