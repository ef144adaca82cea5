//! What devices promise when something is wrong: typed errors that say what to do, limits that change no bit, no writes beside an
//! output, recovery after a lost device.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;
#[path = "devices/hedge.rs"]
mod hedge;
#[path = "common/hmm.rs"]
mod hmm;
#[path = "devices/paths.rs"]
mod paths;
#[path = "common/portfolio.rs"]
mod portfolio;
#[path = "devices/pricing.rs"]
mod pricing;

use common::{Case, DEVICES, Rng, assert_bits, open, open_all, open_with, rolling, variants};
use forback::kernels::backtest::{BACKTEST_STITCH, BACKTEST_SWEEP, BacktestParams, NO_STOP, OFF, SCALE_BIAS, SET_WORDS, STATS, TILE};
use forback::kernels::backtest_sweep::{Chunk, Outcome, SetStats, Strategy, Sweep};
use forback::kernels::backtest_tiles::{BACKTEST_BAND, BACKTEST_BAND_STATES, BACKTEST_CROSS, BACKTEST_JOIN, BACKTEST_SIZED, KEYS_BY_ROW, TilesParams};
use forback::kernels::block_bootstrap::{self, BLOCK_BOOTSTRAP, Bootstrap, BootstrapParams, bootstrap_sharpe};
use forback::kernels::ceilings::{CEILING_MULTIPLY_ADD, CeilingParams};
use forback::kernels::fixed::exponent;
use forback::kernels::indicators::{self, IndicatorParams, span_alpha, wilder_alpha};
use forback::kernels::kernel::{Access, Elem, Kernel, Params, Source};
use forback::kernels::multiple_testing::{self, CSCV_BEST, CSCV_BLOCKS, CSCV_RANK, CscvParams, MultipleTesting, multiple_testing};
use forback::kernels::performance::{PERFORMANCE, PerformanceParams, STATISTICS, performance, performance_read};
use forback::kernels::philox::{PHILOX, PhiloxParams, philox};
use forback::kernels::portfolio::{self as book, PORTFOLIO_SCORE, PORTFOLIO_SIMULATE, PortfolioParams, SIGNAL_SCORE};
use forback::kernels::walk_forward_select::{NONE, SelectParams, WALK_FORWARD_SCORES, WALK_FORWARD_SELECT};
use forback::kernels::walk_forward_sharpe as wfs;
use forback::kernels::{Buffer, Device, DeviceKind, Error, KERNELS, OPS, OpenOptions, View};
use std::collections::BTreeSet;
use std::process::Command;

fn error<T>(result: forback::Result<T>) -> Error {
    match result {
        Ok(_) => panic!("an error was expected"),
        Err(error) => error,
    }
}

// ---- opening ----------------------------------------------------------------------------------------------------------

#[test]
fn an_unknown_device_is_named_with_the_nearest_one() {
    for (spec, nearest) in [("wgpuu", "wgpu"), ("cudda", "cuda"), ("CPU", "cpu"), ("cuda_host", "cuda-host"), ("wgpu:x", "wgpu"), ("referense", "reference")] {
        match error(Device::open(spec)) {
            Error::UnknownDevice { given, suggestion } => assert_eq!((given.as_str(), suggestion.as_deref()), (spec, Some(nearest))),
            other => panic!("{spec}: {other}"),
        }
    }
    for spec in ["", "cpu:0", "wgpu:", "wgpu:-1", "cuda-host:1", "auto:0", "cuda:0:0"] {
        assert!(matches!(error(Device::open(spec)), Error::UnknownDevice { .. }), "{spec}");
    }
}

#[test]
fn an_adapter_that_is_not_there_is_no_device() {
    for (spec, device) in [("wgpu:99", "wgpu"), ("cuda:99", "cuda")] {
        match error(Device::open(spec)) {
            Error::NoDevice { device: named, help, .. } => assert!(named == device && !help.is_empty(), "{spec}: {named}, {help}"),
            other => panic!("{spec}: {other}"),
        }
    }
    // None of these may panic, whatever the machine has.
    for spec in ["auto", "wgpu", "cuda", "cuda-host"] {
        match Device::open(spec) {
            Ok(device) => eprintln!("{spec}: {}", device.info()),
            Err(Error::NoDevice { reason, help, .. }) => assert!(!reason.is_empty() && !help.is_empty()),
            Err(other) => panic!("{spec}: {other}"),
        }
    }
    assert!(!Device::open("auto").unwrap().info().software, "auto took a software adapter");
}

/// In a child process whose Vulkan loader finds no driver.
#[test]
fn without_any_adapter_the_command_says_what_to_install() {
    let Some(forback) = option_env!("CARGO_BIN_EXE_forback") else {
        eprintln!("skipped: the command is not part of this build");
        return;
    };
    if !(cfg!(feature = "wgpu") && cfg!(target_os = "linux")) {
        eprintln!("skipped: only Vulkan's loader can be kept from its drivers");
        return;
    }
    let out = Command::new(forback)
        .args(["verify", env!("CARGO_MANIFEST_DIR"), "--device", "wgpu"])
        .env("VK_DRIVER_FILES", "/nonexistent")
        .env("VK_ICD_FILENAMES", "/nonexistent")
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{stderr}");
    let line = stderr.lines().find(|l| l.starts_with("error: no wgpu device")).unwrap_or_else(|| panic!("{stderr}"));
    assert!(line.contains("mesa-vulkan-drivers") && !stderr.contains("panicked"), "{stderr}");
    assert!(out.stdout.is_empty());
}

#[test]
fn an_unknown_device_on_the_command_line_is_wrong_usage() {
    let Some(forback) = option_env!("CARGO_BIN_EXE_forback") else { return };
    let out = Command::new(forback).args(["verify", env!("CARGO_MANIFEST_DIR"), "--device", "cpuu"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(2) && stderr.contains("did you mean 'cpu'?"), "{stderr}");
}

// ---- limits -----------------------------------------------------------------------------------------------------------

/// Philox, performance, walk_forward_sharpe and its gradient, multiple_testing and the bootstrap of the same data on a device.
fn small_ops(device: &Device) -> forback::Result<Vec<(&'static str, Vec<f64>)>> {
    let mut rng = Rng::new(20);
    let rows = 5000u32;
    let counters: Vec<u32> = (0..4 * rows).collect();
    let keys: Vec<u32> = (0..2 * rows).map(|i| i.wrapping_mul(0x9E37_79B9)).collect();
    let (n, t) = (300u64, 2000u64);
    let x = rng.returns((n * t) as usize, 3e-4, 0.01);
    // An odd T, so that chunks start at ranges that no adapter can bind.
    let (m, odd) = (200u64, 1501u64);
    let y = &x[..(m * odd) as usize];
    let windows: Vec<[u32; 2]> = (0..8).map(|i| [i * 170, i * 170 + 250]).chain([[3, 3], [700, 701]]).collect();
    let upstream = rng.returns(m as usize * windows.len(), 0.0, 1.0);

    let (counter, key) = (device.upload_u32("counter", &counters)?, device.upload_u32("key", &keys)?);
    let (returns, series, grad_sharpe) = (device.upload("returns", &x)?, device.upload("returns", y)?, device.upload("grad_sharpe", &upstream)?);
    let mut pass = device.pass("small ops");
    let numbers = philox(&mut pass, &counter, &key)?;
    let (bits, uniform, normal) = (pass.read(&numbers.bits)?, pass.read(&numbers.uniform)?, pass.read(&numbers.normal)?);
    let statistics = performance_read(&mut pass, &returns, n, t)?;
    let forward = wfs::walk_forward_sharpe(&mut pass, &series, m, odd, &windows, 252.0)?;
    let grad = wfs::walk_forward_sharpe_backward(&mut pass, &forward, &series, &grad_sharpe)?;
    let (sharpe, grad) = (pass.read(&forward.sharpe)?, pass.read(&grad)?);
    let mut done = pass.submit()?;
    let words = done.u32(bits)?.into_iter().map(f64::from).collect();
    let names = [("uniform", uniform), ("normal", normal), ("performance", statistics), ("walk_forward_sharpe", sharpe), ("grad_returns", grad)];
    let reals = names.into_iter().map(|(name, read)| Ok((name, done.f64(read)?))).collect::<forback::Result<Vec<_>>>()?;
    // More combinations than 27 groups, more trials than 64 KiB.
    let tested = multiple_testing(device, &x[..40 * 500], 40, &MultipleTesting { splits: 8, ..MultipleTesting::default() })?;
    let chosen = tested.chosen.iter().map(|&c| f64::from(c)).chain(tested.logits).chain(tested.deflated_sharpe).chain([tested.pbo]).collect();
    let config = Bootstrap { replicates: 31, ..Bootstrap::default() };
    let (replicates, ..) = block_bootstrap::replicates(device, &x[..50 * 400], 50, &config)?;
    Ok([("bits", words)].into_iter().chain(reals).chain([("multiple_testing", chosen), ("block_bootstrap", replicates)]).collect())
}

const MIB: u64 = 1 << 20;

fn caps() -> [(&'static str, OpenOptions); 5] {
    let none = OpenOptions::default();
    [
        ("1 MiB bindings", OpenOptions { binding_bytes: Some(MIB), ..none.clone() }),
        ("3 groups per dimension", OpenOptions { groups_per_dimension: Some(3), ..none.clone() }),
        ("both", OpenOptions { binding_bytes: Some(MIB), groups_per_dimension: Some(3), ..none.clone() }),
        ("short launches", OpenOptions { work_per_launch: Some(2_000_000), ..none.clone() }),
        ("64 KiB bindings", OpenOptions { binding_bytes: Some(64 << 10), ..none }),
    ]
}

#[test]
fn limits_change_no_bit_of_the_small_ops() {
    for spec in ["cpu", "wgpu", "cuda-host", "cuda"] {
        let Some(device) = open(spec) else { continue };
        let want = small_ops(&device).unwrap();
        for (cap, options) in caps() {
            let got = small_ops(&open_with(spec, &options).unwrap()).unwrap();
            for ((name, got), (_, want)) in got.iter().zip(&want) {
                assert_bits(&format!("{name} on {spec} under {cap}"), got, want);
            }
        }
    }
}

#[test]
fn limits_change_no_bit_of_a_sweep() {
    for spec in ["cpu", "wgpu", "cuda-host", "cuda"] {
        let Some(device) = open(spec) else { continue };
        let mut rng = Rng::new(21);
        for strategy in Strategy::ALL {
            // Enough windows that the prefixes of all sets pass 1 MiB; few enough bars that one asset's table is 27 groups at most.
            let (bars, assets, sets) = (48, 5, 700);
            let start = 3;
            let windows = rolling(bars as u32 - 1, start, 12, 2);
            assert!(windows.len() > 8);
            for pooled in [false, true] {
                let case = Case { start, pooled, windows: windows.clone(), cost_bps: vec![10.0], ..Case::random(&mut rng, strategy, bars, assets, sets) };
                let want = case.run(&device).unwrap();
                for (cap, options) in caps() {
                    let label = format!("{} (pooled: {pooled}) on {spec} under {cap}", strategy.name());
                    if pooled && options.binding_bytes == Some(64 << 10) {
                        continue; // one tile of all assets does not fit
                    }
                    let got = case.run(&open_with(spec, &options).unwrap()).unwrap_or_else(|e| panic!("{label}: {e}"));
                    assert_bits(&label, &got.numbers(), &want.numbers());
                    if options.binding_bytes.is_some() {
                        assert!(got.outcome.launches > want.outcome.launches, "{label}: nothing was split");
                    }
                }
            }
        }
    }
}

#[test]
fn any_choice_of_sets_has_the_bits_of_all() {
    for spec in ["reference", "cpu", "wgpu", "cuda-host", "cuda"] {
        let Some(device) = open(spec) else { continue };
        let mut rng = Rng::new(33);
        for strategy in Strategy::ALL {
            let case = Case::random(&mut rng, strategy, 150, 3, 200);
            let (all, n, bars, w) = (case.run(&device).unwrap(), 3, 149, case.windows.len());
            // The longest window and the heaviest weight may be left out.
            for few in [vec![7u32], (0..200).step_by(3).collect(), (64..130).collect()] {
                let mut seen = 0;
                case.with_sweep(|sweep| {
                    let sweep = Sweep { only: Some(&few), ..sweep.clone() };
                    let visit = &mut |chunk: &Chunk| {
                        for set in chunk.sets.clone() {
                            let id = chunk.id(set);
                            assert_eq!(id, few[set]);
                            for asset in chunk.assets.clone() {
                                let (got, want) = (chunk.stats(set, asset), all.stats[chunk.cost][id as usize * n + asset]);
                                let numbers = |s: SetStats| [s.sharpe, s.total_return, s.max_drawdown, s.turnover, s.trades as f64];
                                assert_bits(&format!("set {id} of {} on {spec}", strategy.name()), &numbers(got), &numbers(want));
                                seen += 1;
                            }
                        }
                        Ok(())
                    };
                    let outcome = sweep.run(&device, visit).unwrap();
                    for selected in outcome.per_asset.iter().chain(&outcome.pooled) {
                        assert!(selected.best.iter().all(|id| few.contains(id)), "{:?}", selected.best);
                    }
                });
                assert_eq!(seen, few.len() * n * 2);
            }
            // The winners of all win among themselves, with the same keys and series; replayed, they earn the same.
            let lists = |outcome: &Outcome| [outcome.per_asset.clone(), outcome.pooled.clone()].concat();
            let mut winners: Vec<u32> = lists(&all.outcome).into_iter().flat_map(|selected| selected.best).collect();
            winners.sort_unstable();
            winners.dedup();
            let again = case.with_sweep(|sweep| Sweep { only: Some(&winners), ..sweep.clone() }.run(&device, &mut |_| Ok(())).unwrap());
            for (again, want) in lists(&again).iter().zip(lists(&all.outcome)) {
                assert_eq!((&again.best, &again.keys, &again.stitched), (&want.best, &want.keys, &want.stitched), "{} on {spec}", strategy.name());
            }
            for (cost, want) in all.outcome.per_asset.iter().enumerate() {
                let replay = case.with_sweep(|sweep| sweep.replay(&device, cost, &winners).unwrap());
                assert_eq!(replay.net.len(), n * winners.len() * bars);
                let mut offset = 0;
                for (i, &[_, _, from, to]) in case.windows.iter().enumerate() {
                    for asset in 0..n {
                        let at = winners.binary_search(&want.best[asset * w + i]).unwrap();
                        let (from, to) = ((asset * winners.len() + at) * bars + from as usize, (asset * winners.len() + at) * bars + to as usize);
                        let own = asset * (want.stitched.len() / n) + offset;
                        assert_eq!(replay.net[from..to], want.stitched[own..own + to - from]);
                        assert_eq!(replay.weight[from..to], want.weights[own..own + to - from]);
                    }
                    offset += (to - from) as usize;
                }
            }
        }
    }
    let case = Case::random(&mut Rng::new(1), Strategy::SmaCross, 60, 1, 10);
    let device = open("cpu").unwrap();
    for few in [vec![], vec![3, 3], vec![4, 2], vec![9, 10]] {
        let ran = case.with_sweep(|sweep| Sweep { only: Some(&few), ..sweep.clone() }.run(&device, &mut |_| Ok(())));
        assert!(error(ran).to_string().contains("only must be ascending indices below S = 10"));
    }
}

#[test]
fn too_large_names_need_and_limit() {
    let large = |e: Error| match e {
        Error::TooLarge { needed, limit, help, .. } => {
            assert!(needed > limit && !help.is_empty());
            (needed, limit)
        }
        other => panic!("{other}"),
    };
    for spec in DEVICES {
        // a buffer, a binding, all buffers together
        let Some(device) = open_with(spec, &OpenOptions { buffer_bytes: Some(MIB), ..Default::default() }) else { continue };
        assert_eq!(large(error(device.zeros("x", MIB / 4 + 1))), (MIB + 4, MIB));
        assert_eq!(device.used_bytes(), 0);
        let device = open_with(spec, &OpenOptions { memory_bytes: Some(MIB), ..Default::default() }).unwrap();
        let half = device.zeros("half", MIB / 8).unwrap();
        let refused = error(device.zeros("x", MIB / 8 + 2));
        assert!(matches!(&refused, Error::TooLarge { needed, limit, .. } if (*needed, *limit) == (MIB / 2 + 8, MIB)), "{refused}");
        assert_eq!(device.used_bytes(), MIB / 2, "a refused buffer is not charged");
        drop(half);
        assert_eq!(device.used_bytes(), 0);
        device.zeros("all of it", MIB / 4).unwrap();

        // one series that no launch can hold
        let device = open_with(spec, &OpenOptions { binding_bytes: Some(MIB), ..Default::default() }).unwrap();
        let t = MIB / 4 + 1;
        let x = device.zeros("returns", t).unwrap();
        let mut pass = device.pass("long");
        assert_eq!(large(error(performance(&mut pass, &x, 1, t))).1, MIB);
        assert_eq!(large(error(wfs::walk_forward_sharpe(&mut pass, &x, 1, t, &[[0, 9]], 252.0))).1, MIB);
        let mut rng = Rng::new(22);
        let case = Case { windows: Vec::new(), ..Case::random(&mut rng, Strategy::SmaCross, 300, 1, 2) };
        let long = |bars: usize| Case { close: case.close.iter().cycle().take(bars).copied().collect(), ..case.clone() };
        let half = open_with(spec, &OpenOptions { binding_bytes: Some(MIB / 2), ..Default::default() }).unwrap();
        assert_eq!(large(error(long(50_000).run(&half))).1, MIB / 2);
        // more rounds than a thread's loops may take (llvmpipe)
        if device.limits().loop_rounds < 70_000 {
            let recursive = Case { strategy: Strategy::EmaCross, ..long(70_000) };
            let (needed, limit) = large(error(recursive.run(&open_with(spec, &OpenOptions::default()).unwrap())));
            assert!(needed > 70_000 && limit == device.limits().loop_rounds, "{needed} {limit}");
        }
        // one raw launch
        let params = PerformanceParams { n: 1, t: t as u32, tail: 0 };
        let out = device.zeros("statistics", STATISTICS).unwrap();
        assert_eq!(large(error(pass.launch(&PERFORMANCE, &params, &[View::from(&x), View::from(&out)]))), (4 * t, MIB));
        let device = open_with(spec, &OpenOptions { groups_per_dimension: Some(3), ..Default::default() }).unwrap();
        let (x, out) = (device.zeros("returns", 28).unwrap(), device.zeros("statistics", 28 * STATISTICS).unwrap());
        let params = PerformanceParams { n: 28, t: 1, tail: 0 };
        assert_eq!(large(error(device.pass("wide").launch(&PERFORMANCE, &params, &[View::from(&x), View::from(&out)]))), (28, 27));
        // a table of one asset that no launch can hold
        let many = Case::random(&mut rng, Strategy::SmaCross, 300, 2, 100);
        assert_eq!(large(error(many.run(&device))).1, 27);
    }
}

#[test]
fn memory_that_no_machine_has_is_an_error() {
    for device in open_all(&DEVICES) {
        for len in [1 << 59, 1 << 61, u64::MAX / 4, u64::MAX] {
            let refused = error(device.zeros("everything", len));
            assert!(matches!(refused, Error::OutOfMemory { .. } | Error::TooLarge { .. }), "{:?}: {refused}", device.info().kind);
        }
        assert_eq!(device.used_bytes(), 0);
        // the device goes on
        let x = device.upload("x", &[1.0, 2.0]).unwrap();
        let mut pass = device.pass("after");
        let read = pass.read(&x).unwrap();
        assert_eq!(pass.submit().unwrap().f32(read).unwrap(), [1.0, 2.0]);
    }
}

// ---- kernels that are wrong -------------------------------------------------------------------------------------------

static BROKEN: Kernel = Kernel {
    name: "philox",
    wgsl: Some(Source { file: "shaders/broken.wgsl", text: "// a comment\n\n@compute @workgroup_size(64)\nfn philox() {\n    let x: f32 = nowhere;\n}\n" }),
    cuda: Some(Source {
        file: "cuda/broken.cu",
        text: "// a comment\nstruct PhiloxParams { uint32_t n; };\n\nextern \"C\" __global__ void philox() {\n    float x = nowhere;\n}\n",
    }),
    ..PHILOX
};
static COLUMNLESS: Kernel = Kernel { wgsl: None, cuda: None, cpu: None, ..PHILOX };

fn philox_args(device: &Device, rows: u64) -> [View; 5] {
    let words = |name, len| View::from(&device.zeros_u32(name, len).unwrap());
    let reals = |name, len| View::from(&device.zeros(name, len).unwrap());
    [words("counter", 4 * rows), words("key", 2 * rows), words("bits", 4 * rows), reals("uniform", 4 * rows), reals("normal", 4 * rows)]
}

#[test]
fn a_kernel_that_does_not_compile_names_file_and_line() {
    for device in open_all(&["wgpu", "cuda-host", "cuda"]) {
        let run = || {
            let mut pass = device.pass("broken");
            pass.launch(&BROKEN, &PhiloxParams { n: 1 }, &philox_args(&device, 1)).unwrap();
            pass.submit()
        };
        for _ in 0..2 {
            match error(run()) {
                Error::Compile { kernel, file, line, message } => {
                    assert_eq!((kernel, line), ("philox", 5), "{file}: {message}");
                    assert!(file.ends_with(if device.info().kind == DeviceKind::Wgpu { "shaders/broken.wgsl" } else { "cuda/broken.cu" }), "{file}");
                    assert!(message.contains("nowhere"), "{message}");
                }
                other => panic!("{other}"),
            }
        }
        // the device goes on
        let mut pass = device.pass("after");
        pass.launch(&PHILOX, &PhiloxParams { n: 1 }, &philox_args(&device, 1)).unwrap();
        pass.submit().unwrap();
    }
}

#[test]
fn a_missing_column_is_unsupported() {
    for device in open_all(&DEVICES) {
        let refused = error(device.pass("gap").launch(&COLUMNLESS, &PhiloxParams { n: 1 }, &philox_args(&device, 1)));
        assert_eq!(refused, Error::Unsupported { kernel: "philox", device: device.info().kind.name() });
    }
}

// ---- calls that are wrong ---------------------------------------------------------------------------------------------

#[test]
fn wrong_arguments_are_named() {
    for device in open_all(&DEVICES) {
        let other = Device::open("cpu").unwrap();
        let args = philox_args(&device, 64);
        let refused = |args: &[View]| match error(device.pass("wrong").launch(&PHILOX, &PhiloxParams { n: 64 }, args)) {
            Error::Shape { arg, expected, got, .. } => format!("{arg} must be {expected}, got {got}"),
            other => panic!("{other}"),
        };
        let with = |i: usize, view: View| {
            let mut args = args.clone();
            args[i] = view;
            refused(&args)
        };
        assert_eq!(refused(&args[..4]), "arguments must be 5, got 4");
        assert_eq!(with(4, args[0].clone()), "normal must be f32, got u32");
        assert_eq!(with(0, args[3].clone()), "counter must be u32, got f32");
        assert!(with(4, args[3].clone()).starts_with("normal must be a buffer of its own"), "two outputs in one range");
        assert!(with(2, args[0].clone()).starts_with("bits must be a buffer of its own"), "an input as output");
        let long = device.zeros_u32("counter", 1024).unwrap();
        assert!(with(0, long.view(1000..1025)).starts_with("range must be inside 0..1024"));
        #[allow(clippy::reversed_empty_ranges, reason = "what is refused")]
        let backwards = long.view(5..3);
        assert!(with(0, backwards).starts_with("range must be inside 0..1024"));
        if device.limits().align > 1 {
            assert!(with(0, long.view(1..257)).starts_with("counter must be a range that starts at a multiple of"));
        }
        assert!(with(0, View::from(&other.zeros_u32("counter", 256).unwrap())).contains("on another device"));
        match error(device.pass("wrong").launch(&PHILOX, &PerformanceParams { n: 1, t: 1, tail: 0 }, &args)) {
            Error::Shape { arg, expected, got, .. } => {
                assert_eq!((arg.as_str(), expected.as_str(), got.as_str()), ("params", "PhiloxParams", "PerformanceParams"))
            }
            other => panic!("{other}"),
        }

        // copies and downloads
        let (x, y) = (device.zeros("x", 8).unwrap(), device.zeros("y", 9).unwrap());
        let mut pass = device.pass("wrong");
        for result in [
            pass.copy(&x, &y),
            pass.copy(x.view(0..4), x.view(4..8)),
            pass.copy(&x, &device.zeros_u32("words", 8).unwrap()),
            pass.copy(&x, &other.zeros("x", 8).unwrap()),
            pass.read(x.view(0..9)).map(|_| ()),
            pass.read(&other.zeros("x", 8).unwrap()).map(|_| ()),
        ] {
            assert!(matches!(error(result), Error::Shape { .. }));
        }
        // a read of another type, and one redeemed twice
        let (words, again) = (pass.read(&x).unwrap(), pass.read(&x).unwrap());
        let mut done = pass.submit().unwrap();
        assert!(done.u32(words).is_err());
        assert_eq!(done.f32(again).unwrap(), [0.0; 8]);
        assert!(done.f32(again).is_err());
    }
}

#[test]
fn wrong_calls_of_ops_are_named() {
    let device = open("cpu").unwrap();
    let x = device.zeros("returns", 12).unwrap();
    let mut pass = device.pass("wrong");
    assert!(matches!(error(performance(&mut pass, &x, 5, 2)), Error::Shape { .. }));
    assert!(matches!(error(performance(&mut pass, &x, 12, 0)), Error::Shape { .. }));
    for windows in [[[0, 5]], [[3, 2]]] {
        assert!(matches!(error(wfs::walk_forward_sharpe(&mut pass, &x, 3, 4, &windows, 252.0)), Error::Shape { .. }));
    }
    for periods in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(matches!(error(wfs::walk_forward_sharpe(&mut pass, &x, 3, 4, &[[0, 4]], periods)), Error::Parameter { .. }));
    }
    let words = device.zeros_u32("counter", 7).unwrap();
    assert!(matches!(error(philox(&mut pass, &words, &words)), Error::Shape { .. }));

    let tests = |x: &[f32], trials: usize, config: MultipleTesting| error(multiple_testing(&device, x, trials, &config)).to_string();
    let (mut returns, plain) = (Rng::new(22).returns(3 * 20, 0.0, 0.01), MultipleTesting { splits: 4, ..MultipleTesting::default() });
    for splits in [0, 1, 3, 22, 40] {
        assert!(tests(&returns, 3, MultipleTesting { splits, ..plain }).contains(&format!("splits = {splits}: must be even, 2 to 20")));
    }
    assert!(tests(&returns, 6, MultipleTesting { splits: 16, ..plain }).contains("10 bars give blocks without a bar"));
    assert!(tests(&returns[..6], 2, MultipleTesting { splits: 2, ..plain }).contains("4 bars are the least"));
    assert!(tests(&returns, 7, plain).contains("60 values for 7 rows") && tests(&[], 0, plain).contains("0 values for 0 rows"));
    assert!(tests(&returns, 3, MultipleTesting { level: 0.5, ..plain }).contains("level = 0.5"));
    assert!(tests(&returns, 3, MultipleTesting { benchmark: f64::NAN, ..plain }).contains("benchmark = NaN"));
    assert!(tests(&returns, 3, MultipleTesting { trials: Some(0), ..plain }).contains("trials = 0"));
    let draws = |x: &[f32], config: Bootstrap| error(bootstrap_sharpe(&device, x, 3, &config)).to_string();
    let bootstrap = Bootstrap { replicates: 5, ..Bootstrap::default() };
    for (wrong, part) in [
        (Bootstrap { replicates: 0, ..bootstrap }, "replicates = 0"),
        (Bootstrap { replicates: block_bootstrap::MAX_REPLICATES + 1, ..bootstrap }, "replicates = 1048577"),
        (Bootstrap { block: Some(0.5), ..bootstrap }, "block = 0.5: must be 1 to 20 bars"),
        (Bootstrap { block: Some(21.0), ..bootstrap }, "block = 21"),
        (Bootstrap { level: 1.0, ..bootstrap }, "level = 1"),
    ] {
        assert!(draws(&returns, wrong).contains(part), "{part}");
    }
    for (at, value) in [(27, f32::NAN), (27, f32::NEG_INFINITY)] {
        returns[at] = value;
        assert!(tests(&returns, 3, plain).contains(&format!("returns[1, 7] = {value}: returns must be finite")));
        assert!(draws(&returns, bootstrap).contains("returns[1, 7]"));
    }

    let mut rng = Rng::new(23);
    let fine = Case::random(&mut rng, Strategy::SmaCross, 60, 2, 4);
    let refused = |change: &dyn Fn(&mut Case)| {
        let mut case = fine.clone();
        change(&mut case);
        error(case.run(&device)).to_string()
    };
    assert!(refused(&|c| c.close[5] = f32::NAN).contains("close[2, 1] = NaN"));
    assert!(refused(&|c| c.close[4] = 0.0).contains("close[2, 0] = 0"));
    assert!(refused(&|c| c.close[4] = f32::INFINITY).contains("close[2, 0]"));
    assert!(refused(&|c| c.close.clear()).contains("close must be [T,N]"));
    assert!(refused(&|c| c.cost_bps[1] = -1.0).contains("cost_bps[1] = -1"));
    assert!(refused(&|c| c.cost_bps[0] = f64::NAN).contains("cost_bps[0] = NaN"));
    assert!(refused(&|c| c.parameters[0].1[3] = 2.5).contains("fast[3] = 2.5"));
    assert!(refused(&|c| c.parameters[1].1[0] = 0.0).contains("slow[0] = 0"));
    assert!(refused(&|c| c.parameters[2].1[1] = 2.0).contains("short[1] = 2"));
    assert!(refused(&|c| c.parameters[0].0 = "quick").contains("'fast'"));
    assert!(refused(&|c| c.parameters[0].1.truncate(3)).contains("equal lengths"));
    assert!(refused(&|c| c.windows[0][3] = 60).contains("windows[0]"));
    assert!(refused(&|c| c.windows[0] = [9, 8, 10, 12]).contains("windows[0]"));
    assert!(Strategy::named("sma_cros").is_err());
}

#[test]
fn nothing_in_nothing_out() {
    for device in open_all(&DEVICES) {
        let (words, reals) = (device.upload_u32("words", &[]).unwrap(), device.upload("reals", &[]).unwrap());
        let mut pass = device.pass("nothing");
        let out = philox(&mut pass, &words, &words).unwrap();
        let statistics = performance(&mut pass, &reals, 0, 5).unwrap();
        let forward = wfs::walk_forward_sharpe(&mut pass, &reals, 0, 5, &[[0, 5]], 252.0).unwrap();
        let grad = wfs::walk_forward_sharpe_backward(&mut pass, &forward, &reals, &reals).unwrap();
        pass.launch(&PHILOX, &PhiloxParams { n: 0 }, &philox_args(&device, 0)).unwrap();
        assert_eq!(pass.launches(), 0);
        let reads = [&out.bits, &out.normal, &statistics, &forward.sharpe, &grad].map(|b| pass.read(b).unwrap());
        let mut done = pass.submit().unwrap();
        assert!(done.u32(reads[0]).unwrap().is_empty());
        assert!(reads[1..].iter().all(|&r| done.f64(r).unwrap().is_empty()));
        device.pass("nothing at all").submit().unwrap();

        // no window, and windows without bars
        let x = device.upload("returns", &[0.1, 0.2, 0.3]).unwrap();
        for windows in [vec![], vec![[1, 1], [3, 3]]] {
            let mut pass = device.pass("no bars");
            let forward = wfs::walk_forward_sharpe(&mut pass, &x, 1, 3, &windows, 252.0).unwrap();
            let upstream = device.upload("grad_sharpe", &vec![1.0; windows.len()]).unwrap();
            let grad = wfs::walk_forward_sharpe_backward(&mut pass, &forward, &x, &upstream).unwrap();
            let reads = (pass.read(&forward.sharpe).unwrap(), pass.read(&grad).unwrap());
            let mut done = pass.submit().unwrap();
            assert!(done.f64(reads.0).unwrap().iter().all(|&s| s <= -1e29), "undefined");
            assert_eq!(done.f64(reads.1).unwrap(), [0.0; 3]);
        }
    }
}

// ---- life of a device -------------------------------------------------------------------------------------------------

#[test]
fn a_lost_device_says_so_and_can_be_opened_again() {
    for spec in DEVICES {
        let Some(device) = open(spec) else { continue };
        let args = philox_args(&device, 3);
        let mut pass = device.pass("before");
        pass.launch(&PHILOX, &PhiloxParams { n: 3 }, &args).unwrap();
        device.lose();
        assert!(matches!(error(pass.submit()), Error::DeviceLost { .. }), "{spec}: a pass recorded before");
        assert!(matches!(error(device.zeros("x", 4)), Error::DeviceLost { .. }), "{spec}: a buffer after");
        assert!(matches!(error(device.upload("x", &[1.0])), Error::DeviceLost { .. }), "{spec}: an upload after");
        assert!(matches!(error(device.pass("after").submit()), Error::DeviceLost { .. }), "{spec}: a pass after");
        assert!(matches!(error(small_ops(&device)), Error::DeviceLost { .. }), "{spec}: ops after");
        drop(args);
        assert_eq!(device.used_bytes(), 0, "{spec}");
        let device = Device::open(spec).unwrap();
        let mut pass = device.pass("again");
        pass.launch(&PHILOX, &PhiloxParams { n: 3 }, &philox_args(&device, 3)).unwrap();
        pass.submit().unwrap();
    }
}

#[test]
fn every_buffer_is_given_back() {
    for device in open_all(&DEVICES) {
        let x = device.zeros("x", 1000).unwrap();
        let again = x.clone();
        assert_eq!(device.used_bytes(), 4000);
        drop(x);
        assert_eq!(device.used_bytes(), 4000, "a clone holds it");
        drop(again);
        small_ops(&device).unwrap();
        Case::random(&mut Rng::new(24), Strategy::Macd, 90, 3, 70).run(&device).unwrap();
        assert_eq!(device.used_bytes(), 0, "{:?}", device.info().kind);
    }
}

#[test]
fn a_profile_has_a_time_per_launch() {
    for device in open_all(&DEVICES) {
        let x = device.upload("returns", &Rng::new(25).returns(600, 0.0, 0.01)).unwrap();
        let mut pass = device.pass("profiled");
        pass.profile();
        let forward = wfs::walk_forward_sharpe(&mut pass, &x, 3, 200, &[[0, 100], [50, 200]], 252.0).unwrap();
        pass.read(&forward.sharpe).unwrap();
        performance(&mut pass, &x, 3, 200).unwrap();
        let launches = pass.launches();
        let done = pass.submit().unwrap();
        let names: Vec<&str> = done.profile().iter().map(|l| l.kernel).collect();
        assert_eq!((names, launches), (vec!["segment_moments", "walk_forward_sharpe", "performance"], 3));
        let unknown = done.profile().iter().filter(|l| l.seconds.is_nan()).count();
        let timer = matches!(device.info().kind, DeviceKind::Cpu | DeviceKind::Reference);
        assert!(unknown == 0 || (unknown == launches && !timer), "{:?}: {:?}", device.info(), done.profile());
        assert!(done.profile().iter().all(|l| (l.seconds.is_nan() || (0.0..60.0).contains(&l.seconds)) && l.bytes > 0.0 && l.flops > 0.0));
        let mut plain = device.pass("not profiled");
        performance(&mut plain, &x, 3, 200).unwrap();
        assert!(plain.submit().unwrap().profile().is_empty());
    }
}

#[test]
fn the_same_pass_gives_the_same_bits() {
    for spec in DEVICES {
        let Some(device) = open(spec) else { continue };
        let case = Case::random(&mut Rng::new(26), Strategy::TsMomentum, 120, 3, 130);
        let (first, ops) = (case.run(&device).unwrap().numbers(), small_ops(&device).unwrap());
        // again, in every variant: checked or not, threads in another order
        for options in variants(spec) {
            let other = open_with(spec, &options).unwrap();
            assert_bits(&format!("{spec} {options:?}"), &case.run(&other).unwrap().numbers(), &first);
            for ((name, got), (_, want)) in small_ops(&other).unwrap().iter().zip(&ops) {
                assert_bits(&format!("{name} on {spec} {options:?}"), got, want);
            }
        }
        assert_bits(spec, &case.run(&device).unwrap().numbers(), &first);
    }
}

/// Several outputs of a launch may be ranges of one buffer, as the gradients of a model's weights are.
#[test]
fn outputs_may_share_a_buffer() {
    for device in open_all(&DEVICES) {
        let (rows, gap) = (33u64, 256u64);
        let args = philox_args(&device, rows);
        device.write_u32(&args[0], &(0..4 * rows as u32).collect::<Vec<_>>()).unwrap();
        let run = |args: &[View]| {
            let mut pass = device.pass("shared");
            pass.launch(&PHILOX, &PhiloxParams { n: rows as u32 }, args).unwrap();
            let reads = [pass.read(&args[3]).unwrap(), pass.read(&args[4]).unwrap()];
            let mut done = pass.submit().unwrap();
            reads.map(|read| done.f64(read).unwrap())
        };
        let apart = run(&args);
        let both = device.zeros("both", 2 * gap + 4 * rows).unwrap();
        // The later argument gets the earlier range.
        let shared = [args[0].clone(), args[1].clone(), args[2].clone(), both.view(2 * gap..2 * gap + 4 * rows), both.view(0..4 * rows)];
        let together = run(&shared);
        for (a, b) in apart.iter().zip(&together) {
            assert_bits(device.info().kind.name(), b, a);
        }
        assert!(apart[0].iter().any(|&x| x > 0.0));
    }
}

/// What was prepared once computes anew from what its buffers hold, and gives the bits of a fresh pass.
#[test]
fn a_prepared_pass_runs_again() {
    for device in open_all(&DEVICES) {
        let (rows, name) = (40u64, device.info().kind.name());
        let args = philox_args(&device, rows);
        let record = || {
            let mut pass = device.pass("replay");
            pass.launch(&PHILOX, &PhiloxParams { n: rows as u32 }, &args).unwrap();
            let read = pass.read(&args[3]).unwrap();
            (pass, read)
        };
        let (pass, first) = record();
        let replay = pass.prepare().unwrap();
        assert_eq!((replay.launches(), replay.kernels()), (1, vec!["philox"]));
        let mut seen: Vec<Vec<f64>> = Vec::new();
        for run in 0..3u32 {
            device.write_u32(&args[0], &(0..4 * rows as u32).map(|i| i + 1000 * run).collect::<Vec<_>>()).unwrap();
            let replayed = replay.run().unwrap().f64(first).unwrap();
            let (fresh, read) = record();
            assert_bits(name, &replayed, &fresh.submit().unwrap().f64(read).unwrap());
            assert!(!seen.contains(&replayed), "{name}: run {run} saw the counters of another");
            seen.push(replayed);
        }
        device.write_u32(&args[0], &(0..4 * rows as u32).map(|i| i + 7000).collect::<Vec<_>>()).unwrap();
        replay.rehearse().unwrap();
        let mut look = device.pass("look");
        let out = look.read(&args[3]).unwrap();
        assert_bits(name, &look.submit().unwrap().f64(out).unwrap(), &seen[2]);
        // Runs beside each other: each has room of its own for what it reads.
        let (fresh, read) = record();
        let truth = fresh.submit().unwrap().f64(read).unwrap();
        let run = || (0..5).map(|_| replay.run().unwrap().f64(first).unwrap()).collect::<Vec<_>>();
        let runs = std::thread::scope(|s| [0; 4].map(|_| s.spawn(run)).map(|thread| thread.join().unwrap()));
        runs.iter().flatten().for_each(|values| assert_bits(name, values, &truth));
    }
}

#[test]
fn writes_are_checked_and_exact() {
    for device in open_all(&["reference", "cpu", "wgpu", "cuda-host"]) {
        let (reals, words) = (device.zeros("reals", 6).unwrap(), device.zeros_u32("words", 4).unwrap());
        device.write(reals.view(1..3), &[1.5, -2.0]).unwrap();
        device.write_f64(reals.view(3..4), &[0.1]).unwrap();
        device.write_u32(&words, &[7, 8, 9, u32::MAX]).unwrap();
        let mut pass = device.pass("read");
        let (a, b) = (pass.read(&reals).unwrap(), pass.read(&words).unwrap());
        let mut done = pass.submit().unwrap();
        let tenth = if device.info().kind == DeviceKind::Reference { 0.1 } else { f64::from(0.1f32) };
        assert_eq!(done.f64(a).unwrap(), [0.0, 1.5, -2.0, tenth, 0.0, 0.0], "{}", device.info().kind.name());
        assert_eq!(done.u32(b).unwrap(), [7, 8, 9, u32::MAX]);
        let text = |result| error(result).to_string();
        assert!(text(device.write(reals.view(0..3), &[1.0])).contains("3 × f32"));
        assert!(text(device.write(&words, &[1.0; 4])).contains("4 × u32"));
        assert!(text(device.write(reals.view(5..7), &[1.0; 2])).contains("inside 0..6"));
        let other = open("cpu").unwrap();
        assert!(text(other.write(&reals, &[0.0; 6])).contains("write"));
    }
}

#[test]
fn threads_share_a_device() {
    for device in open_all(&DEVICES) {
        let cases: Vec<Case> = [Strategy::SmaCross, Strategy::RsiReversion].map(|s| Case::random(&mut Rng::new(27), s, 100, 2, 70)).to_vec();
        let want: Vec<Vec<f64>> = cases.iter().map(|c| c.run(&device).unwrap().numbers()).collect();
        let shared = device.upload("returns", &Rng::new(28).returns(900, 0.0, 0.01)).unwrap();
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|i| {
                    let (case, want, device, shared) = (&cases[i % 2], &want[i % 2], &device, &shared);
                    scope.spawn(move || {
                        for _ in 0..3 {
                            assert_bits("a thread's sweep", &case.run(device).unwrap().numbers(), want);
                            let mut pass = device.pass("shared input");
                            performance_read(&mut pass, shared, 9, 100).unwrap();
                            pass.submit().unwrap();
                        }
                    })
                })
                .collect();
            threads.into_iter().for_each(|t| t.join().unwrap());
        });
    }
}

// ---- guards -----------------------------------------------------------------------------------------------------------

/// Elements on both sides of every range; a multiple of every adapter's alignment.
const GUARD: usize = 64;
const GUARD_REAL: f32 = -54_321.25;
const GUARD_WORD: u32 = 0xA5A5_5A5A;

/// A buffer with a guard before and after so many elements.
struct Guarded(Buffer, usize);

/// Launches every kernel with ranges in the middle of larger buffers, and remembers them.
struct Guards {
    device: Device,
    ranges: Vec<(&'static str, &'static str, Buffer, usize, bool)>,
    launched: BTreeSet<&'static str>,
}

impl Guards {
    fn words(&self, values: &[u32]) -> Guarded {
        let all: Vec<u32> = [GUARD_WORD; GUARD].iter().chain(values).chain(&[GUARD_WORD; GUARD]).copied().collect();
        Guarded(self.device.upload_u32("guarded", &all).unwrap(), values.len())
    }

    fn reals(&self, values: &[f32]) -> Guarded {
        let all: Vec<f32> = [GUARD_REAL; GUARD].iter().chain(values).chain(&[GUARD_REAL; GUARD]).copied().collect();
        Guarded(self.device.upload("guarded", &all).unwrap(), values.len())
    }

    /// An output filled with guard values; every one of them must be overwritten.
    fn out(&self, elem: Elem, len: usize) -> Guarded {
        match elem {
            Elem::F32 => self.reals(&vec![GUARD_REAL; len]),
            Elem::U32 => self.words(&vec![GUARD_WORD; len]),
            Elem::F16 | Elem::Bf16 => panic!("guarded kernels are those in f32"),
        }
    }

    fn launch<P: Params>(&mut self, kernel: &'static Kernel, params: &P, args: &[&Guarded]) {
        let views: Vec<View> = args.iter().map(|a| a.0.view(GUARD as u64..(GUARD + a.1) as u64)).collect();
        let mut pass = self.device.pass("guarded");
        pass.launch(kernel, params, &views).unwrap();
        pass.submit().unwrap();
        self.launched.insert(kernel.name);
        for (arg, Guarded(buffer, len)) in kernel.args.iter().zip(args) {
            // What columns keep elsewhere.
            let scratch = arg.name == "history";
            self.ranges.push((kernel.name, arg.name, buffer.clone(), *len, arg.access == Access::Write && !scratch));
        }
        self.check();
    }

    fn check(&self) {
        let mut pass = self.device.pass("check");
        let reads: Vec<_> = self.ranges.iter().map(|r| pass.read(&r.2).unwrap()).collect();
        let mut done = pass.submit().unwrap();
        for ((kernel, arg, buffer, len, written), read) in self.ranges.iter().zip(reads) {
            let (values, guard): (Vec<f64>, f64) = match buffer.elem() {
                Elem::F32 => (done.f64(read).unwrap(), f64::from(GUARD_REAL)),
                Elem::U32 => (done.u32(read).unwrap().into_iter().map(f64::from).collect(), f64::from(GUARD_WORD)),
                Elem::F16 | Elem::Bf16 => panic!("guarded kernels are those in f32"),
            };
            let label = format!("{kernel}: {arg} on {}", self.device.info());
            assert!(values[..GUARD].iter().all(|&v| v == guard), "{label}: written before its range");
            assert!(values[GUARD + len..].iter().all(|&v| v == guard), "{label}: written after its range");
            if let (true, Some(i)) = (*written, values[GUARD..GUARD + len].iter().position(|&v| v == guard)) {
                panic!("{label}[{i}] of {len} was never written");
            }
        }
    }
}

#[test]
fn no_kernel_writes_beside_its_outputs() {
    for spec in DEVICES {
        for options in variants(spec) {
            let Some(device) = open_with(spec, &options) else { continue };
            guarded(Guards { device, ranges: Vec::new(), launched: BTreeSet::new() });
        }
    }
}

const NEURAL: [&str; 17] = [
    "cast",
    "map",
    "reduce",
    "adamw",
    "loss",
    "lstm",
    "gru",
    "attention",
    "linear",
    "layer_norm",
    "softmax",
    "embedding",
    "pool",
    "normalise",
    "objective",
    "conv1d",
    "hedge_rollout",
];

fn guarded(mut g: Guards) {
    macro_rules! launch {
        ($kernel:expr, $params:expr, [$($range:expr),*]) => {
            g.launch(&$kernel, &$params, &[$(&$range),*])
        };
    }
    let mut rng = Rng::new(30);
    // philox, performance
    let rows = 67u32;
    let [counter, key] = [4 * rows, 2 * rows].map(|n| g.words(&(0..n).collect::<Vec<_>>()));
    let four = 4 * rows as usize;
    let [bits, uniforms, normal] = [Elem::U32, Elem::F32, Elem::F32].map(|e| g.out(e, four));
    launch!(PHILOX, PhiloxParams { n: rows }, [counter, key, bits, uniforms, normal]);
    let out = g.out(Elem::F32, 3 * CEILING_MULTIPLY_ADD.workgroup as usize);
    launch!(CEILING_MULTIPLY_ADD, CeilingParams { n: 3, rounds: 2, a: 0.5, b: 1.0 }, [out]);
    let (n, t) = (5usize, 131usize);
    let returns = g.reals(&rng.returns(n * t, 0.0, 0.01));
    let statistics = g.out(Elem::F32, n * STATISTICS as usize);
    launch!(PERFORMANCE, PerformanceParams { n: n as u32, t: t as u32, tail: 6 }, [returns, statistics]);

    // walk_forward_sharpe: windows 0..40, 20..131, 40..131 over edges 0, 20, 40, 131
    let (w, segments) = (3usize, 3usize);
    let params = wfs::WalkForwardParams { n: n as u32, t: t as u32, w: w as u32, g: segments as u32, periods: 252.0, periods_low: 0.0 };
    let edges = g.words(&[0, 20, 40, 131]);
    let spans = g.words(&[0, 2, 1, 3, 2, 3]);
    let segment_of = g.words(&(0..131u32).map(|j| u32::from(j >= 20) + u32::from(j >= 40)).collect::<Vec<_>>());
    let covers = g.words(&[4, 5, 7, 9, 0, 0, 1, 1, 2]);
    let moments = g.out(Elem::F32, 2 * n * segments);
    launch!(wfs::SEGMENT_MOMENTS, params, [returns, edges, moments]);
    let [sharpe, pairs] = [n * w, 2 * n * w].map(|len| g.out(Elem::F32, len));
    launch!(wfs::WALK_FORWARD_SHARPE, params, [moments, edges, spans, sharpe, pairs]);
    let upstream = g.reals(&rng.returns(n * w, 0.0, 1.0));
    let grad = g.out(Elem::F32, n * t);
    launch!(wfs::WALK_FORWARD_SHARPE_BACKWARD, params, [returns, pairs, upstream, edges, spans, segment_of, covers, grad]);

    // multiple_testing: three combinations of four blocks; bootstrap with blocks of two bars
    let params = CscvParams { n: n as u32, t: t as u32, splits: 4, shift: 50, combinations: 3, first: 0 };
    let (sums, masks) = (g.out(Elem::U32, 16 * n), g.words(&[0b0011, 0b0101, 0b0110]));
    launch!(CSCV_BLOCKS, params, [returns, sums]);
    let (best, counts) = (g.words(&[0, multiple_testing::NONE, 0].repeat(3)), g.words(&[0; 6]));
    launch!(CSCV_BEST, params, [sums, masks, best]);
    launch!(CSCV_RANK, params, [sums, masks, best, counts]);
    let (lengths, sharpe) = (g.words(&[0, u32::MAX].repeat(n)), g.out(Elem::F32, 7 * n));
    let params = BootstrapParams { n: n as u32, t: t as u32, table: 2, replicates: 7, first: 2, seed: 1, seed_high: 2 };
    launch!(BLOCK_BOOTSTRAP, params, [returns, statistics, lengths, sharpe]);

    // indicators
    let (a, t, rows) = (3usize, 71usize, 5usize);
    let market = rng.market(t, a);
    let columns: Vec<f32> = (0..a * t).map(|i| market[i % t * a + i / t]).collect();
    let highest: Vec<u32> = columns.chunks_exact(t).map(|c| exponent(c.iter().copied().fold(0.0, f32::max))).collect();
    // Closes, then fills.
    let (price, exponents) = (g.reals(&[columns.clone(), columns.clone()].concat()), g.words(&highest));
    let spans_of = [2u32, 3, 5, 8, 13];
    let half = |x: u64| [x as u32, (x >> 32) as u32];
    let periods = g.words(&spans_of);
    let alphas = g.words(&spans_of.iter().flat_map(|&n| [half(span_alpha(n)), half(span_alpha(3))].concat()).collect::<Vec<_>>());
    let wilder = g.words(&spans_of.iter().flat_map(|&n| half(wilder_alpha(n))).collect::<Vec<_>>());
    let params = IndicatorParams { a: a as u32, t: t as u32, rows: rows as u32, bits: indicators::bollinger_bits(13), extra: 3 };
    let earned = g.out(Elem::F32, a * (t - 1));
    let [sums, squares] = [0, 1].map(|_| g.out(Elem::U32, 4 * a * (t + 1)));
    launch!(indicators::PRICE_SUMS, params, [price, exponents, earned, sums, squares]);
    let table = a * t * rows;
    let [keys, ema, rsi, bollinger] = [0; 4].map(|_| g.out(Elem::U32, table));
    launch!(indicators::INDICATOR_SMA, params, [price, exponents, sums, periods, keys]);
    launch!(indicators::INDICATOR_EMA, params, [price, exponents, alphas, ema]);
    launch!(indicators::INDICATOR_RSI, params, [price, exponents, periods, wilder, rsi]);
    launch!(indicators::INDICATOR_BOLLINGER, params, [price, exponents, sums, squares, periods, bollinger]);
    let runs = g.out(Elem::U32, 2 * a * t);
    launch!(indicators::INDICATOR_DONCHIAN, IndicatorParams { rows: 2, extra: 9, ..params }, [price, runs]);
    let logs = g.words(&columns.iter().flat_map(|p| half((f64::from(*p).ln() * 2f64.powi(44)) as i64 as u64)).collect::<Vec<_>>());
    let volatility = g.out(Elem::F32, table);
    launch!(indicators::INDICATOR_VOLATILITY, IndicatorParams { bits: 44, ..params }, [logs, periods, volatility]);

    // back-test, selection, scores, stitch: two tiles, two windows 0..30 | 30..50 and 20..50 | 50..70
    let (tiles, w) = (2usize, 2usize);
    let lanes = tiles * TILE;
    // Some sized, some with stops.
    let stop = |s: u32| if s.is_multiple_of(3) { 0.02 } else { NO_STOP }.to_bits();
    let size = |s: u32| if s.is_multiple_of(4) { s % 5 } else { OFF };
    let words: Vec<u32> = (0..lanes as u32)
        .flat_map(|s| [s % 5, (s / 5 + 1) % 5, 0, 0, 13, s % 3, 0.1f32.to_bits(), 2f32.to_bits(), size(s), stop(s), stop(s + 1), stop(s + 2), 4 + s, 0, 0, 0])
        .collect();
    assert_eq!(words.len(), lanes * SET_WORDS);
    let sets = g.words(&words);
    let scale = (SCALE_BIAS as u32).wrapping_sub(1);
    let plan = g.words(&[0, 20, 30, 50, 70, scale, scale, scale]);
    let params = BacktestParams {
        a: a as u32,
        t: t as u32,
        rows: rows as u32,
        tiles: tiles as u32,
        edges: 5,
        mode: 0,
        lag: 1,
        start: 0,
        shift: 50,
        mask: u32::MAX,
        cost: 1e-3,
        cost_low: 0.0,
        per_asset: 0,
        stitched: 0,
        volatility_rows: rows as u32,
        general: 1,
        piece: 0,
        pieces: 1,
    };
    let (stats, prefix) = (g.out(Elem::F32, a * tiles * STATS * TILE), g.out(Elem::U32, a * tiles * 5 * 4 * TILE));
    launch!(BACKTEST_SWEEP, params, [price, earned, keys, volatility, sets, plan, stats, prefix]);
    // the same sets as four words of a tile, over two spans
    let tile = TilesParams {
        a: a as u32,
        t: t as u32,
        rows: rows as u32,
        tiles: 1,
        edges: 5,
        spans: 2,
        lag: 1,
        start: 0,
        shift: 50,
        mask: u32::MAX,
        cost: 1e-3,
        cost_low: 0.0,
        set_tiles: tiles as u32,
        row_stride: t as u32,
        bar_stride: 1,
        words: 16,
        mode: 0,
        volatility_rows: rows as u32,
        details: 0,
    };
    let turned = g.out(Elem::U32, table);
    launch!(KEYS_BY_ROW, tile, [keys, turned]);
    let slots: Vec<u32> = (0..512u32).flat_map(|slot| if slot < lanes as u32 { [slot, 13] } else { [NONE, 13] }).collect();
    let spanned = g.words(&[0, 20, 30, 50, 70, scale, scale, scale, 0, 50, t as u32 - 1]);
    for kernel in [&BACKTEST_CROSS, &BACKTEST_BAND] {
        let band = kernel.name == BACKTEST_BAND.name;
        let list = 16 * 8 + 512 * 2;
        let heads = (0..16u32).flat_map(|w| [w % 2, if band { list } else { 0 }, w % 5, w << 27, 1, 13, 4, 0]);
        let lattice: Vec<u32> = heads.chain(slots.iter().copied()).chain((0..32).map(|i| i << 27)).collect();
        let lattice = g.words(&lattice);
        let states = g.out(Elem::U32, a * 2 * 16 * 2);
        launch!(BACKTEST_BAND_STATES, tile, [turned, lattice, spanned, states]);
        let (stats, prefix) = (g.out(Elem::F32, a * tiles * STATS * TILE), g.out(Elem::U32, a * tiles * 5 * 4 * TILE));
        let parts = g.out(Elem::U32, a * 2 * 12 * lanes);
        launch!(*kernel, tile, [turned, lattice, spanned, earned, parts, prefix, states]);
        launch!(BACKTEST_JOIN, tile, [parts, spanned, stats, prefix]);
    }
    for mode in [0, 1, 2u32] {
        let list = if mode == 1 { 8 * 8 + 256 * 2 } else { 0 };
        let heads = (0..8u32).flat_map(|w| [0, list, w % 5, w << 27, 1, 13, 4, 0]);
        let lists = (0..32).map(|i| i << 27);
        let details = (0..256u32).flat_map(|s| [s % 3, 0.1f32.to_bits(), 2f32.to_bits(), size(s)]);
        let lattice: Vec<u32> = heads.chain(slots[..512].iter().copied()).chain(lists).chain(details).collect();
        let lattice = g.words(&lattice);
        let sized = TilesParams { words: 8, mode, details: 8 * 8 + 256 * 2 + 32, spans: if mode == 1 { 1 } else { 2 }, ..tile };
        let plan = g.words(&[0, 20, 30, 50, 70, scale, scale, scale, 0, if mode == 1 { t as u32 - 1 } else { 50 }, t as u32 - 1]);
        let (stats, prefix) = (g.out(Elem::F32, a * tiles * STATS * TILE), g.out(Elem::U32, a * tiles * 5 * 4 * TILE));
        let parts = g.out(Elem::U32, a * sized.spans as usize * 12 * lanes);
        launch!(BACKTEST_SIZED, sized, [turned, lattice, plan, earned, parts, prefix, price, volatility]);
        launch!(BACKTEST_JOIN, sized, [parts, plan, stats, prefix]);
    }
    let select = SelectParams { a: a as u32, pooled: 1, w: w as u32, tiles: tiles as u32, edges: 5, sets: lanes as u32 - 3, first: 0, shift: 50 };
    let train = g.words(&[0, 2, 30, 0, 1, 3, 30, 0]);
    let (best, chosen) = (g.words(&[0, NONE].repeat(a * w)), g.out(Elem::U32, a * w * SET_WORDS));
    launch!(WALK_FORWARD_SELECT, select, [prefix, train, sets, best, chosen]);
    let both = g.words(&[0, 2, 30, 0, 2, 3, 20, 0, 1, 3, 30, 0, 3, 4, 20, 0]);
    let scores = g.out(Elem::F32, a * w * 2 * lanes);
    launch!(WALK_FORWARD_SCORES, select, [prefix, both, scores]);
    let windows = g.words(&[30, 50, 0, 50, 70, 20]);
    let (net, activity) = (g.out(Elem::F32, 2 * a * 40), g.out(Elem::F32, 2 * a * w));
    let params = BacktestParams { tiles: w as u32, per_asset: 1, stitched: 40, ..params };
    launch!(BACKTEST_STITCH, params, [price, earned, keys, volatility, chosen, windows, net, activity]);
    let (net, activity) = (g.out(Elem::F32, 2 * a * 40), g.out(Elem::F32, 2 * a * w * 3));
    launch!(BACKTEST_STITCH, BacktestParams { piece: 9, pieces: 3, ..params }, [price, earned, keys, volatility, chosen, windows, net, activity]);

    // portfolios: 5 books (the last workgroup is not full) of 3 and of 130 assets, 2 costs
    for (n, bars) in [(3usize, 7usize), (130, 2)] {
        let (p, costs) = (5usize, 2usize);
        let params = PortfolioParams {
            p: p as u32,
            n: n as u32,
            bars: bars as u32,
            first: 0,
            every: 1,
            lanes: book::lanes(n),
            edge: 0,
            composed: 1,
            costs: costs as u32,
            net: 1,
            band: 0.01,
        };
        let (returns, positions) = (g.reals(&rng.returns((bars + 1) * n, 0.0, 0.01)), g.reals(&rng.returns(p * bars * n, 0.1, 0.1)));
        let (allocation, rates) = (g.reals(&rng.returns(bars * n, 1.0, 0.1)), g.reals(&[0.0, 0.0, 1e-3, 0.0]));
        let [weights, carry, activity, net] = [p * n, p, p * book::ACTIVITY * bars, p * costs * bars].map(|len| g.out(Elem::F32, len));
        launch!(PORTFOLIO_SIMULATE, params, [returns, positions, allocation, weights, carry, activity]);
        let [state, stats] = [book::STATE, book::STATS].map(|words| g.out(Elem::F32, p * costs * words));
        launch!(PORTFOLIO_SCORE, params, [activity, net, rates, state, stats]);
        let [state, stats] = [book::STATE, book::STATS].map(|words| g.out(Elem::F32, p * costs * n * words));
        launch!(SIGNAL_SCORE, params, [returns, positions, rates, state, stats]);
    }

    hmm::guarded(&mut g, &mut rng);
    paths::guarded(&mut g);
    pricing::guarded(&mut g);
    hedge::guarded(&mut g);

    // The neural kernels have no launches between guards here; cuda-host puts guard zones around every argument of every launch by itself.
    let neural = |name: &&str| OPS.iter().any(|op| NEURAL.contains(&op.name) && op.kernels.iter().any(|k| k.name == *name));
    let missing: Vec<&str> =
        KERNELS.iter().map(|k| k.name).filter(|name| !g.launched.contains(name) && !neural(name) && !hedge::has_guarded_twin(name)).collect();
    assert!(missing.is_empty(), "no guarded launch for {missing:?}");
}
