//! `forback kernels`: the list, as a table for people, as JSON, or as CUDA units for a compiler; its ops as Markdown for the README.

use super::say;
use crate::kernels::kernel::Elem;
use crate::kernels::{KERNELS, Kernel, OPS, Op};
use crate::{Error, Result};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `forback kernels`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Machine-readable results on stdout, one object a line.
    #[arg(long)]
    json: bool,
    /// The table of the README: a line per op.
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
    /// Write every kernel's whole CUDA unit into a folder, for a compiler.
    #[arg(long, value_name = "DIR", hide = true)]
    cuda_units: Option<PathBuf>,
}

/// Columns that a kernel has.
fn columns(kernel: &Kernel) -> [(&'static str, bool); 3] {
    [("CPU", kernel.cpu.is_some()), ("WGSL", kernel.wgsl.is_some()), ("CUDA", kernel.cuda.is_some())]
}

fn op_of(kernel: &Kernel) -> &'static str {
    OPS.iter().find(|op| op.kernels.iter().any(|k| k.name == kernel.name)).map_or("", |op| op.name)
}

/// The README's line of an op: what its kernels are stored in besides f32, and how many there are in each column.
fn markdown(op: &Op) -> String {
    let count = |has: fn(&Kernel) -> bool| op.kernels.iter().filter(|k| has(k)).count();
    let kernels = [count(|k| k.cpu.is_some()), count(|k| k.wgsl.is_some()), count(|k| k.cuda.is_some())];
    let halves = op.kernels.iter().any(|kernel| kernel.stored() != Elem::F32);
    let ticks = [op.differentiable, halves].map(|there| if there { "✓" } else { "" });
    format!("| `{}` | {} | {} | {} |", op.name, op.about, ticks.join(" | "), kernels.map(|n| n.to_string()).join(" | "))
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    if let Some(dir) = &args.cuda_units {
        return write_units(dir);
    }
    if args.markdown {
        say("| op | what it computes | backward | f16, bf16 | kernels: CPU | WGSL | CUDA |");
        say("|---|---|---|---|---|---|---|");
        OPS.iter().for_each(|op| say(&markdown(op)));
        return Ok(ExitCode::SUCCESS);
    }
    if !args.json {
        say(&format!("{:<20} {:<29} {:<15} {:>9}  {:<34} about", "op", "kernel", "columns", "workgroup", "cost"));
    }
    for kernel in KERNELS {
        let cost = format!("{} B, {} instructions per {}", kernel.cost.bytes, kernel.cost.flops, kernel.cost.unit);
        let has = columns(kernel).map(|(name, there)| if there { name } else { "-" });
        if args.json {
            let arg = |a: &crate::kernels::kernel::Arg| json!({ "name": a.name, "type": a.elem.wgsl(), "written": a.access == crate::kernels::kernel::Access::Write });
            say(&json!({ "op": op_of(kernel), "kernel": kernel.name, "about": kernel.about, "cpu": kernel.cpu.is_some(), "wgsl": kernel.wgsl.is_some(),
                    "cuda": kernel.cuda.is_some(), "workgroup": kernel.workgroup, "args": kernel.args.iter().map(arg).collect::<Vec<_>>(),
                    "params": kernel.params.name, "unit": kernel.cost.unit, "bytes": kernel.cost.bytes, "flops": kernel.cost.flops })
            .to_string());
        } else {
            say(&format!("{:<20} {:<29} {:<15} {:>9}  {cost:<34} {}", op_of(kernel), kernel.name, has.join(" "), kernel.workgroup, kernel.about));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn write_units(dir: &std::path::Path) -> Result<ExitCode> {
    let io = |e: std::io::Error| Error::Io { path: dir.display().to_string(), message: e.to_string() };
    std::fs::create_dir_all(dir).map_err(io)?;
    for kernel in KERNELS {
        if let Some(unit) = kernel.cuda_unit() {
            std::fs::write(dir.join(format!("{}.cu", kernel.name)), unit).map_err(io)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
