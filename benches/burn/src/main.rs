//! Forward and backward of an LSTM and of attention in burn (autodiff over wgpu, f32), for run.sh: outputs and gradients are compared with the
//! host's in f64 first, and nothing is timed where they differ. A step is timed until the device is done, inputs on the device.
//!
//!   forback-burn [--runs N] [--follow]     a JSON line per workload on stdout
//!
//! --runs N    timed steps a line, of which it gives the median and the minimum; 5
//! --follow    compares and warms up once, then times all workloads again for every line on stdin, until it ends
//!
//! burn takes the adapter that wgpu prefers; CUBECL_WGPU_DEFAULT_DEVICE=Cpu names a software one. Exit 1 if values differ.

mod host;
mod steps;

use burn::tensor::{Device, DeviceKind};
use std::io::BufRead;
use std::process::ExitCode;
use std::time::Instant;
use steps::{Attention, Lstm, Step};

/// Of the largest value of an output or gradient.
const TOLERANCE: f64 = 1e-4;
/// Steps before the first timed one: kernels are compiled and tuned, streams of operations fused.
const WARM_UP: usize = 5;

/// Largest difference of each output and gradient, over its largest value.
fn compare(step: &dyn Step) -> Result<Vec<(&'static str, f64)>, String> {
    let mut worst = Vec::new();
    for ((name, ours), (_, expected)) in step.values()?.into_iter().zip(step.expected()) {
        if ours.len() != expected.len() {
            return Err(format!("{}: {name} has {} values, expected {}", step.name(), ours.len(), expected.len()));
        }
        let top = expected.iter().fold(0.0_f64, |top, x| top.max(x.abs()));
        let difference = ours.iter().zip(&expected).fold(0.0_f64, |d, (a, b)| if a.is_finite() { d.max((a - b).abs()) } else { f64::INFINITY });
        worst.push((name, difference / top));
    }
    Ok(worst)
}

/// The JSON line of `runs` timed steps.
fn time(step: &dyn Step, runs: usize, adapter: &str, compared: &[(&str, f64)]) -> Result<String, String> {
    let mut seconds = Vec::new();
    for _ in 0..runs {
        let start = Instant::now();
        step.run()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let (median, min) = (seconds[runs / 2], seconds[0]);
    let compared: Vec<String> = compared.iter().map(|(name, x)| format!("\"{name}\": {x:e}")).collect();
    Ok(format!(
        "{{\"workload\": \"{}\", \"peer\": \"burn\", \"peer_rate\": {}, \"unit\": \"flops/s\", \"device\": \"wgpu\", \"adapter\": \"{adapter}\", \
         \"shape\": {:?}, \"median_s\": {median}, \"min_s\": {min}, \"runs\": {runs}, \"compared\": {{{}}}, \"versions\": {{\"burn\": \"0.22.1\"}}}}",
        step.name(),
        step.work() / median,
        step.shape(),
        compared.join(", "),
    ))
}

fn run() -> Result<(), String> {
    let (mut runs, mut follow) = (5, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--follow" => follow = true,
            "--runs" => runs = args.next().and_then(|n| n.parse().ok()).filter(|&n| n > 0).ok_or("--runs takes a number of at least 1")?,
            _ => return Err(format!("unknown argument {arg}; known: --runs N, --follow")),
        }
    }
    let device = Device::wgpu(DeviceKind::DefaultDevice).autodiff();
    let adapter = device.identity().map_or_else(String::new, |identity| identity.name.replace(['"', '\\'], ""));
    let steps: [Box<dyn Step>; 2] = [Box::new(Lstm::new([64, 63, 30, 64], &device)), Box::new(Attention::new([64, 4, 63, 16], &device))];
    let mut compared = Vec::new();
    for step in &steps {
        let worst = compare(&**step)?;
        eprintln!("{:<16} {worst:?}", step.name());
        if let Some((name, x)) = worst.iter().find(|(_, x)| x.is_nan() || *x > TOLERANCE) {
            return Err(format!("{}: {name} differs by {x:e} of its largest value, nothing was timed", step.name()));
        }
        compared.push(worst);
    }
    for step in &steps {
        (0..WARM_UP).try_for_each(|_| step.run())?;
    }
    let mut lines = std::io::stdin().lock().lines();
    while !follow || lines.next().is_some() {
        for (step, compared) in steps.iter().zip(&compared) {
            println!("{}", time(&**step, runs, &adapter, compared)?);
        }
        if !follow {
            break;
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}
