//! Every op on every device: the conformance files, an independent oracle on small problems, parity with the f64 reference on
//! shapes around the workgroup size, the gradient against finite differences, and what must hold whatever the numbers are.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use common::{Case, DEVICES, Rng, Swept, assert_bits, open, open_all, open_with, parameters, variants};
use forback::kernels::backtest_sweep::{Execution, Strategy};
use forback::kernels::block_bootstrap::{Bootstrap, Kind, bootstrap_sharpe, replicates};
use forback::kernels::conformance::{self, defined};
use forback::kernels::multiple_testing::{MultipleTesting, Tested, combinations, expected_max_sharpe, multiple_testing};
use forback::kernels::performance::{finish, performance_read};
use forback::kernels::philox::philox;
use forback::kernels::walk_forward_sharpe::{walk_forward_sharpe, walk_forward_sharpe_backward};
use forback::kernels::{Device, OpenOptions};
use proptest::prelude::any;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use std::path::PathBuf;

// ---- files ------------------------------------------------------------------------------------------------------------

#[test]
fn every_conformance_file_passes_on_every_device() {
    let given = std::env::var_os("FORBACK_CONFORMANCE").map(PathBuf::from);
    let root = given.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/conformance"));
    let folders: Vec<PathBuf> = forback::conformance::names().map(|name| root.join(name)).filter(|p| p.is_dir()).collect();
    if folders.is_empty() {
        eprintln!("skipped: no conformance files under {} (FORBACK_CONFORMANCE names another folder)", root.display());
        return;
    }
    let cases: Vec<conformance::Case> = conformance::files(&folders).unwrap().iter().map(|p| conformance::Case::read(p).unwrap()).collect();
    let mut failures = Vec::new();
    for spec in DEVICES {
        for options in variants(spec) {
            let Some(device) = open_with(spec, &options) else { continue };
            for case in &cases {
                if let Some(why) = forback::conformance::verify(&device, case).failure {
                    let checked = if options.checked == Some(true) { "FORBACK_CHECKED=1 " } else { "" };
                    failures.push(format!("{checked}forback verify {} --device {spec}    # {why}", case.path.display()));
                }
            }
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

// ---- the oracle -------------------------------------------------------------------------------------------------------

/// Directions decided at every bar from `warm` on, straight from the definitions: `side` 1 long, 0 both, −1 short. Averages are compared without dividing, so that prices that are
/// multiples of a power of two make exact ties.
fn directions(strategy: Strategy, p: &[f64], side: f64, warm: usize, value: &dyn Fn(&str) -> f64) -> Vec<f64> {
    let whole = |name: &str| value(name) as usize;
    let sum = |t: usize, n: usize| p[t + 1 - n..=t].iter().sum::<f64>();
    let ema = |x: &[f64], n: usize| {
        let mut out = vec![x[0]; x.len()];
        for t in 1..x.len() {
            out[t] = if n == 1 { x[t] } else { out[t - 1] + 2.0 / (n as f64 + 1.0) * (x[t] - out[t - 1]) };
        }
        out
    };
    let (up, down) = (f64::from(u8::from(side >= 0.0)), -f64::from(u8::from(side <= 0.0)));
    let band = |first: usize, enter: &dyn Fn(usize) -> bool, leave: &dyn Fn(usize) -> bool| {
        let mut held = 0.0;
        (0..p.len())
            .map(|t| {
                if t >= first.max(warm) {
                    held = match (held > 0.0, enter(t), leave(t)) {
                        (false, true, _) => up,
                        (_, _, true) => down,
                        _ => held,
                    };
                }
                held
            })
            .collect()
    };
    let cross = |first: usize, above: &dyn Fn(usize) -> bool| {
        (0..p.len())
            .map(|t| {
                if t < first.max(warm) {
                    0.0
                } else if above(t) {
                    up
                } else {
                    down
                }
            })
            .collect()
    };
    match strategy {
        Strategy::SmaCross => {
            let (fast, slow) = (whole("fast"), whole("slow"));
            cross(fast.max(slow) - 1, &|t| sum(t, fast) * slow as f64 > sum(t, slow) * fast as f64)
        }
        Strategy::EmaCross => {
            let (fast, slow) = (ema(p, whole("fast")), ema(p, whole("slow")));
            cross(whole("fast").max(whole("slow")) - 1, &|t| fast[t] > slow[t])
        }
        Strategy::Macd => {
            let (fast, slow) = (ema(p, whole("fast")), ema(p, whole("slow")));
            let line: Vec<f64> = fast.iter().zip(&slow).map(|(f, s)| f - s).collect();
            let signal = ema(&line, whole("signal"));
            let tie = |t: usize| (line[t] - signal[t]).abs() <= 1e-12 * p[t];
            cross(whole("fast").max(whole("slow")) + whole("signal") - 2, &|t| line[t] > signal[t] && !tie(t))
        }
        Strategy::RsiReversion => {
            let n = whole("period");
            // Wilder's averages times n.
            let (mut gain, mut loss) = (vec![0.0; p.len()], vec![0.0; p.len()]);
            for t in 1..p.len() {
                let fade = if t <= n { 1.0 } else { 1.0 - 1.0 / n as f64 };
                gain[t] = gain[t - 1] * fade + (p[t] - p[t - 1]).max(0.0);
                loss[t] = loss[t - 1] * fade + (p[t - 1] - p[t]).max(0.0);
            }
            let against = |t: usize, level: f64| if gain[t] + loss[t] == 0.0 { 50.0 - level } else { 100.0 * gain[t] - level * (gain[t] + loss[t]) };
            band(n, &|t| against(t, value("low")) < 0.0, &|t| against(t, value("high")) > 0.0)
        }
        Strategy::BollingerReversion => {
            let (n, width) = (whole("period"), value("width"));
            let distance = |t: usize| n as f64 * p[t] - sum(t, n);
            let variance = |t: usize| n as f64 * p[t + 1 - n..=t].iter().map(|x| x * x).sum::<f64>() - sum(t, n) * sum(t, n);
            let below = |t: usize| distance(t) < 0.0 && distance(t) * distance(t) > width * width * variance(t);
            band(n - 1, &|t| below(t), &|t| distance(t) > 0.0)
        }
        Strategy::DonchianBreakout => {
            let (entry, exit) = (whole("entry"), whole("exit"));
            band(0, &|t| t >= entry && p[t - entry..t].iter().all(|x| p[t] > *x), &|t| t >= exit && p[t - exit..t].iter().all(|x| p[t] < *x))
        }
        Strategy::TsMomentum => {
            let lookback = whole("lookback");
            let sign = |t: usize| if p[t] > p[t - lookback] { up } else { down * f64::from(u8::from(p[t] < p[t - lookback])) };
            (0..p.len()).map(|t| if t < lookback.max(warm) { 0.0 } else { sign(t) }).collect()
        }
    }
}

/// Size of a position decided at bar t; none before the window.
fn size(p: &[f64], t: usize, value: &dyn Fn(&str) -> f64) -> f64 {
    let n = value("vol_window") as usize;
    if t < n {
        return 0.0;
    }
    let logs: Vec<f64> = (t - n..t).map(|j| (p[j + 1] / p[j]).ln()).collect();
    let mean = logs.iter().sum::<f64>() / n as f64;
    let deviation = (logs.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / (n as f64 - 1.0)).sqrt();
    if deviation < 1e-15 { value("max_leverage") } else { (value("target_vol") / (252f64.sqrt() * deviation)).min(value("max_leverage")) }
}

/// A position under stops, as prices are f32.
#[derive(Default)]
struct Stops {
    held: f32,
    blocked: f32,
    entry: f32,
    best: f32,
    age: u32,
}

impl Stops {
    fn step(&mut self, wanted: f32, close: f32, fill: f32, value: &dyn Fn(&str) -> f64) -> f32 {
        let fraction = |name: &str| value(name) as f32;
        if self.held != 0.0 {
            self.age += 1;
            let long = self.held > 0.0;
            self.best = if long { self.best.max(close) } else { self.best.min(close) };
            let worse = |from: f32, by: f32| by > 0.0 && if long { close <= from * (1.0 - by) } else { close >= from * (1.0 + by) };
            let better = |from: f32, by: f32| by > 0.0 && if long { close >= from * (1.0 + by) } else { close <= from * (1.0 - by) };
            let old = value("max_holding") > 0.0 && self.age >= value("max_holding") as u32;
            if worse(self.entry, fraction("stop_loss")) || better(self.entry, fraction("take_profit")) || worse(self.best, fraction("trailing_stop")) || old {
                self.blocked = self.held;
            }
        }
        if wanted != self.blocked {
            self.blocked = 0.0;
        }
        let now = if self.blocked == 0.0 { wanted } else { 0.0 };
        if now != 0.0 && now != self.held {
            (self.entry, self.best, self.age) = (fill, fill, 0);
        }
        self.held = now;
        now
    }
}

/// A back-test, straight from the definitions.
struct Simulated {
    net: Vec<f64>,
    turnover: f64,
    trades: u64,
    /// Bars on which a sized weight moved by so little that rounding decides whether it was a trade.
    doubtful: u64,
}

fn simulate(case: &Case, set: usize, asset: usize, cost: f64) -> Simulated {
    let p: Vec<f64> = case.close.iter().skip(asset).step_by(case.assets).map(|&x| f64::from(x)).collect();
    let value = |name: &str| case.parameters.iter().find(|c| c.0 == name).map_or(0.0, |c| f64::from(c.1[set]));
    let given = |name: &str| case.parameters.iter().any(|c| c.0 == name);
    let side = match (given("side"), case.strategy) {
        (true, _) => value("side"),
        (false, Strategy::TsMomentum) => 0.0,
        _ => 1.0 - value("short"),
    };
    let sized = value("target_vol") > 0.0;
    // A sized set waits for its window.
    let warm = if sized { value("vol_window") as usize } else { 0 };
    let decided = directions(case.strategy, &p, side, warm, &value);
    let lag = usize::from(case.execution == Execution::NextClose);
    let opens = case.open.as_ref().filter(|_| case.execution == Execution::NextOpen);
    let fill: Vec<f64> = (0..p.len()).map(|j| opens.filter(|_| j + 1 < p.len()).map_or(p[j], |o| f64::from(o[(j + 1) * case.assets + asset]))).collect();
    let mut out = Simulated { net: vec![0.0; p.len() - 1], turnover: 0.0, trades: 0, doubtful: 0 };
    let (mut before, mut stops) = (0.0, Stops::default());
    for j in case.start as usize..p.len() - 1 {
        let mut weight = 0.0;
        if j >= lag {
            let t = j - lag;
            let held = stops.step(decided[t] as f32, p[t] as f32, fill[j] as f32, &value);
            weight = f64::from(held) * if sized { size(&p, t, &value) } else { 1.0 };
        }
        let traded: f64 = if f64::abs(weight - before) > 1e-12 { f64::abs(weight - before) } else { 0.0 };
        out.net[j] = weight * (fill[j + 1] / fill[j] - 1.0) - cost * traded;
        out.turnover += traded;
        let real = sized && weight != 0.0 && traded <= 1e-4 * weight.abs();
        out.trades += u64::from(traded > 0.0 && !real);
        out.doubtful += u64::from(real);
        before = weight;
    }
    out
}

/// Annualised Sharpe ratio; NaN below two values and where the variance is below 2⁻²⁰ of the mean square, as the sweep has it.
fn sharpe(x: &[f64]) -> f64 {
    let n = x.len() as f64;
    let (sum, squares) = (x.iter().sum::<f64>(), x.iter().map(|v| v * v).sum::<f64>());
    let central = squares - sum * sum / n;
    if x.len() < 2 || central <= squares * 2f64.powi(-20) { f64::NAN } else { sum / n / (central / (n - 1.0)).sqrt() * 252f64.sqrt() }
}

fn close_to(got: f64, want: f64, tolerance: f64) -> bool {
    (got.is_nan() && want.is_nan()) || (got - want).abs() <= tolerance * want.abs().max(1.0)
}

/// Whether `best` is the first of the largest scores; scores nearer than the resolution of a key count as equal.
fn is_best(best: u32, scores: &[f64]) -> bool {
    let top = scores.iter().copied().fold(f64::NAN, f64::max);
    let mine = scores[best as usize];
    if top.is_nan() {
        return best == 0;
    }
    let near = (mine - top).abs() <= 1e-6 * top.abs();
    near && !scores[..best as usize].iter().any(|s| s.to_bits() == mine.to_bits())
}

/// Random prices that are multiples of 1/64, so that averages tie exactly where they tie at all.
fn ticks(mut case: Case) -> Case {
    for price in &mut case.close {
        *price = (*price * 64.0).round().max(1.0) / 64.0;
    }
    case
}

fn against_oracle(case: &Case, device: &Device, label: &str) {
    let swept = case.run(device).unwrap();
    let (n, w) = (case.assets, case.windows.len());
    for (c, bps) in case.cost_bps.iter().enumerate() {
        let all: Vec<Simulated> = (0..case.sets() * n).map(|i| simulate(case, i / n, i % n, bps * 1e-4)).collect();
        for (i, want) in all.iter().enumerate() {
            let (got, at) = (swept.stats[c][i], format!("{label}: cost {bps}, set {}, asset {}", i / n, i % n));
            let counted = &want.net[(case.start as usize).min(want.net.len())..];
            let (mut equity, mut peak, mut drawdown) = (1.0, 1.0, 0.0f64);
            for r in counted {
                equity *= 1.0 + r;
                peak = f64::max(peak, equity);
                drawdown = drawdown.max(1.0 - equity / peak);
            }
            let trades = want.trades..=want.trades + want.doubtful;
            assert!(trades.contains(&got.trades), "{at}: {} trades, expected {trades:?}", got.trades);
            for (name, got, want) in [
                ("turnover", got.turnover, want.turnover),
                ("total_return", got.total_return, equity - 1.0),
                ("max_drawdown", got.max_drawdown, drawdown),
                ("sharpe", got.sharpe, sharpe(counted)),
            ] {
                assert!(close_to(got, want, 1e-8), "{at}: {name} {got:e}, expected {want:e}");
            }
            for (k, window) in case.windows.iter().enumerate() {
                let (train, test) = swept.scores[c][i * w + k];
                let part = |from: u32, to: u32| sharpe(&want.net[from as usize..to as usize]);
                let expected = (part(window[0], window[1]), part(window[2], window[3]));
                assert!(close_to(train, expected.0, 1e-7) && close_to(test, expected.1, 1e-7), "{at}, window {k}: {train} {test}, expected {expected:?}");
            }
        }
        if w == 0 {
            continue;
        }
        let (own, pooled) = (&swept.outcome.per_asset[c], &swept.outcome.pooled[c]);
        for (k, window) in case.windows.iter().enumerate() {
            let part = |set: usize, asset: usize| all[set * n + asset].net[window[0] as usize..window[1] as usize].to_vec();
            for asset in 0..n {
                let scores: Vec<f64> = (0..case.sets()).map(|set| sharpe(&part(set, asset))).collect();
                assert!(is_best(own.best[asset * w + k], &scores), "{label}: best of asset {asset}, window {k} is {}: {scores:?}", own.best[asset * w + k]);
            }
            let scores: Vec<f64> = (0..case.sets()).map(|set| sharpe(&(0..n).flat_map(|a| part(set, a)).collect::<Vec<_>>())).collect();
            assert!(is_best(pooled.best[k], &scores), "{label}: pooled best of window {k} is {}: {scores:?}", pooled.best[k]);
        }
        // Stitched: each window's test part up to the next window's.
        let parts: Vec<std::ops::Range<usize>> = (0..w)
            .map(|k| case.windows[k][2] as usize..case.windows.get(k + 1).map_or(case.windows[k][3], |next| case.windows[k][3].min(next[2])) as usize)
            .collect();
        let bars: Vec<u32> = parts.iter().cloned().flatten().map(|j| j as u32).collect();
        assert_eq!(swept.outcome.stitched_bars, bars);
        for (selected, slot) in [(own, w), (pooled, 0)] {
            for asset in 0..n {
                let chosen = |k: usize| &all[selected.best[asset * slot + k] as usize * n + asset];
                let want: Vec<f64> = (0..w).flat_map(|k| chosen(k).net[parts[k].clone()].to_vec()).collect();
                let got = &selected.stitched[asset * bars.len()..(asset + 1) * bars.len()];
                for (j, (got, want)) in got.iter().zip(&want).enumerate() {
                    assert!(
                        (f64::from(*got) - want).abs() <= 1e-9 + 6.1e-8 * want.abs(),
                        "{label}: stitched bar {j} of asset {asset}: {got:e}, expected {want:e}"
                    );
                }
                let total = want.iter().map(|r| 1.0 + r).product::<f64>() - 1.0;
                let measured = &selected.performance[asset];
                assert!(close_to(measured.total_return, total, 1e-8), "{label}: stitched total return {}, expected {total}", measured.total_return);
                let ratio = sharpe(&want);
                assert!(ratio.is_nan() || close_to(measured.sharpe, ratio, 1e-7), "{label}: stitched Sharpe ratio {}, expected {ratio}", measured.sharpe);
            }
        }
    }
}

#[test]
fn sweeps_agree_with_a_plain_back_test() {
    let (device, mut rng) = (open("reference").unwrap(), Rng::new(1));
    for strategy in Strategy::ALL {
        for (bars, assets, sets) in [(2, 1, 3), (3, 2, 5), (40, 1, 9), (130, 3, 20), (400, 2, 33)] {
            for execution in [Execution::SameClose, Execution::NextClose] {
                let case = ticks(Case { execution, ..Case::random(&mut rng, strategy, bars, assets, sets) });
                against_oracle(&case, &device, &format!("{} T {bars} {execution:?} start {}", strategy.name(), case.start));
            }
        }
    }
}

#[test]
fn sides_stops_and_sizes_agree_with_a_plain_back_test() {
    let (device, mut rng) = (open("reference").unwrap(), Rng::new(44));
    for strategy in Strategy::ALL {
        for execution in [Execution::SameClose, Execution::NextClose, Execution::NextOpen] {
            for (bars, assets, sets) in [(3, 2, 5), (150, 2, 40), (330, 1, 60)] {
                let case = ticks(Case { execution, ..Case::random(&mut rng, strategy, bars, assets, sets) }).with_overlays(&mut rng);
                against_oracle(&case, &device, &format!("overlays {} T {bars} {execution:?} start {}", strategy.name(), case.start));
            }
        }
    }
}

#[test]
fn sides_stops_and_sizes_trade_alike_everywhere() {
    let mut rng = Rng::new(45);
    let (reference, devices) = (open("reference").unwrap(), devices());
    for strategy in Strategy::ALL {
        let execution = [Execution::SameClose, Execution::NextClose, Execution::NextOpen][rng.whole(0, 2) as usize];
        let case = Case { execution, cost_bps: vec![5.0], ..Case::random(&mut rng, strategy, 190, 2, 70) }.with_overlays(&mut rng);
        let want = case.run(&reference).unwrap();
        for device in &devices {
            let got = case.run(device).unwrap();
            for (i, (g, w)) in got.stats[0].iter().zip(&want.stats[0]).enumerate() {
                let at = format!("{} on {}, set {}, asset {}", strategy.name(), device.info().kind.name(), i / 2, i % 2);
                assert_eq!(g.trades, w.trades, "{at}: trades");
                // Off by 8.1e-7 at most.
                for (name, g, w) in
                    [("return", g.total_return, w.total_return), ("drawdown", g.max_drawdown, w.max_drawdown), ("turnover", g.turnover, w.turnover)]
                {
                    assert!(close_to(g, w, 2e-6), "{at}: {name} {g:e}, expected {w:e}");
                }
            }
        }
    }
}

/// Overlapping and gapped windows, which stitch differently.
#[test]
fn windows_of_any_layout_agree_with_a_plain_back_test() {
    let (device, mut rng) = (open("reference").unwrap(), Rng::new(2));
    for windows in [
        vec![[0, 60, 60, 100], [20, 80, 80, 120], [40, 100, 100, 149]],
        vec![[0, 50, 55, 75], [30, 80, 85, 105], [60, 110, 115, 135]],
        vec![[5, 70, 70, 70], [5, 100, 100, 120]],
        vec![[10, 140, 140, 149]],
    ] {
        let case = Case { windows, start: 5, ..Case::random(&mut rng, Strategy::SmaCross, 150, 2, 40) };
        against_oracle(&ticks(case), &device, "sma_cross");
    }
}

/// The ties that decide: a relative strength index that stands exactly on its threshold does not enter, nor does a close exactly on
/// its band.
#[test]
fn a_value_on_its_threshold_is_not_beyond_it() {
    let steps = |moves: &[f32]| -> Vec<f32> {
        let mut price = 100.0;
        let tail = moves.iter().map(move |m| {
            price += m;
            price
        });
        [100.0].into_iter().chain(tail).collect()
    };
    // three gains and seven losses: 30 at bar 10, then rising
    let rsi = steps(&[1.0, -1.0, -1.0, 1.0, -1.0, -1.0, 1.0, -1.0, -1.0, -1.0, 8.0, 8.0, 8.0]);
    // with two values the lower one lies one deviation below the mean
    let bollinger = steps(&[-3.0, 5.0, -1.0, 0.0, 0.0, -2.0, 6.0]);
    let case = |strategy, close: &[f32], parameters: &[(&'static str, f32)]| Case {
        strategy,
        parameters: parameters.iter().map(|(name, x)| (*name, vec![*x])).collect(),
        close: close.to_vec(),
        open: None,
        assets: 1,
        cost_bps: vec![0.0],
        execution: Execution::SameClose,
        start: 0,
        windows: Vec::new(),
        pooled: false,
    };
    for device in open_all(&DEVICES) {
        for low in [30.0, 30.001] {
            let swept = case(Strategy::RsiReversion, &rsi, &[("period", 10.0), ("low", low), ("high", 99.0)]).run(&device).unwrap();
            assert_eq!(swept.stats[0][0].trades, u64::from(low > 30.0), "{:?}: rsi 30, low {low}", device.info().kind);
        }
        for width in [1.0, 0.999] {
            let swept = case(Strategy::BollingerReversion, &bollinger, &[("period", 2.0), ("width", width)]).run(&device).unwrap();
            assert_eq!(swept.stats[0][0].trades > 0, width < 1.0, "{:?}: width {width}", device.info().kind);
        }
    }
}

#[test]
fn one_bar_earns_nothing_and_equal_prices_trade_nothing() {
    let mut rng = Rng::new(3);
    for device in open_all(&DEVICES) {
        for strategy in Strategy::ALL {
            let mut columns = parameters(&mut rng, strategy, 70);
            columns.retain(|c| c.0 != "short");
            for bars in [1, 2, 90] {
                let windows = common::rolling(bars as u32 - 1, 0, 30, 10);
                let case = Case {
                    strategy,
                    parameters: columns.clone(),
                    close: vec![101.25; 2 * bars],
                    open: None,
                    assets: 2,
                    cost_bps: vec![0.0, 10.0],
                    execution: Execution::SameClose,
                    start: 0,
                    windows,
                    pooled: true,
                };
                let swept = case.run(&device).unwrap();
                for s in swept.stats.iter().flatten() {
                    let nothing = s.sharpe.is_nan() && (s.total_return, s.max_drawdown, s.turnover, s.trades) == (0.0, 0.0, 0.0, 0);
                    assert!(nothing, "{:?} {} T {bars}: {s:?}", device.info().kind, strategy.name());
                }
                assert!(swept.scores.iter().flatten().all(|s| s.0.is_nan() && s.1.is_nan()));
                for selected in swept.outcome.per_asset.iter().chain(&swept.outcome.pooled) {
                    assert!(selected.best.iter().all(|&b| b == 0), "an undefined ratio won");
                    assert!(selected.stitched.iter().all(|&x| x == 0.0));
                    assert!(selected.performance.iter().all(|p| p.sharpe.is_nan() && p.max_drawdown == 0.0));
                }
            }
        }
    }
}

/// Windows without test bars, without bars, and no windows: there is a choice for each, and undefined statistics.
#[test]
fn windows_without_bars_are_undefined_and_still_chosen() {
    let (reference, mut rng) = (open("reference").unwrap(), Rng::new(11));
    for device in open_all(&DEVICES) {
        for (bars, windows) in [(1, vec![[0; 4]; 2]), (1, vec![]), (60, vec![]), (60, vec![[0, 30, 30, 30], [10, 40, 59, 59]]), (60, vec![[30; 4]])] {
            let case = Case { windows, start: 0, ..Case::random(&mut rng, Strategy::SmaCross, bars, 3, 70) };
            let swept = case.run(&device).unwrap();
            let label = format!("{:?} T {bars} {:?}", device.info().kind, case.windows);
            assert!(swept.outcome.launches > 0, "{label}: nothing ran on the device");
            assert!(swept.scores.iter().flatten().all(|s| s.1.is_nan()), "{label}");
            let w = case.windows.len();
            for (selected, slots) in [(&swept.outcome.per_asset, 3), (&swept.outcome.pooled, 1)] {
                assert_eq!(selected.len(), case.cost_bps.len(), "{label}");
                for s in selected {
                    assert_eq!((s.best.len(), s.stitched.len(), s.performance.len(), s.trades.len()), (slots * w, 0, 3, 3 * w), "{label}");
                    assert!(s.performance.iter().all(|p| p.sharpe.is_nan()), "{label}");
                }
            }
            if bars > 1 {
                against_oracle(&ticks(case), &reference, &label);
            }
        }
    }
}

// ---- what must hold whatever the numbers ------------------------------------------------------------------------------

#[test]
fn nothing_looks_ahead() {
    let mut rng = Rng::new(4);
    for device in open_all(&DEVICES) {
        for strategy in Strategy::ALL {
            let case = Case { pooled: true, ..Case::random(&mut rng, strategy, 180, 2, 40) };
            let before = case.run(&device).unwrap();
            for (t, factor) in [(100, 0.4), (139, 3.0)] {
                let mut other = case.clone();
                for (i, price) in other.close.iter_mut().enumerate().skip((t + 1) * case.assets) {
                    *price *= factor * (1.0 + 0.01 * (i % 7) as f32);
                }
                let after = other.run(&device).unwrap();
                let known = before.outcome.stitched_bars.iter().take_while(|&&j| (j as usize) < t).count();
                assert!(known > 20);
                let selected = |s: &common::Swept| s.outcome.per_asset.iter().chain(&s.outcome.pooled).cloned().collect::<Vec<_>>();
                for (was, is) in selected(&before).iter().zip(&selected(&after)) {
                    for asset in 0..case.assets {
                        let k = before.outcome.stitched_bars.len();
                        let part = |x: &[f32]| x[asset * k..asset * k + known].iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
                        assert_bits(
                            &format!("{:?} {}: net after bar {t} changed", device.info().kind, strategy.name()),
                            &part(&is.stitched),
                            &part(&was.stitched),
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn permuting_assets_permutes_results() {
    let mut rng = Rng::new(5);
    let order = [2, 0, 3, 1];
    for device in open_all(&DEVICES) {
        for strategy in Strategy::ALL {
            let case = Case::random(&mut rng, strategy, 90, 4, 70);
            let close = case.close.chunks_exact(4).flat_map(|row| order.map(|a| row[a])).collect();
            let (plain, permuted) = (case.run(&device).unwrap(), Case { close, ..case.clone() }.run(&device).unwrap());
            let label = format!("{:?} {}", device.info().kind, strategy.name());
            for c in 0..2 {
                for (i, s) in permuted.stats[c].iter().enumerate() {
                    let want = plain.stats[c][i / 4 * 4 + order[i % 4]];
                    let numbers = |s: forback::kernels::backtest_sweep::SetStats| [s.sharpe, s.total_return, s.max_drawdown, s.turnover, s.trades as f64];
                    assert_bits(&label, &numbers(*s), &numbers(want));
                }
                assert_eq!(permuted.outcome.pooled[c].best, plain.outcome.pooled[c].best, "{label}");
                for (i, from) in order.iter().enumerate() {
                    let (is, was) = (&permuted.outcome.per_asset[c], &plain.outcome.per_asset[c]);
                    let (w, k) = (case.windows.len(), plain.outcome.stitched_bars.len());
                    assert_eq!(is.best[i * w..(i + 1) * w], was.best[from * w..(from + 1) * w], "{label}");
                    assert_eq!(is.stitched[i * k..(i + 1) * k], was.stitched[from * k..(from + 1) * k], "{label}");
                }
            }
        }
    }
}

/// Random sweeps of every strategy on every device: few and small ones where a launch is slow. A failing case is shrunk.
fn property(holds: impl Fn(&Device, &str, Case, &mut Rng)) {
    for (spec, cases, most_bars, most_sets) in
        [("reference", 8, 150usize, 150), ("cpu", 24, 200, 200), ("wgpu", 6, 120, 140), ("cuda-host", 2, 60, 66), ("cuda", 8, 200, 200)]
    {
        let Some(device) = open(spec) else { continue };
        let config = Config { cases, failure_persistence: None, max_shrink_iters: 30, ..Config::default() };
        let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
        let draw = (any::<u32>(), 45..=most_bars, 1usize..4, 1usize..=most_sets);
        let outcome = runner.run(&draw, |(seed, bars, assets, sets)| {
            for strategy in Strategy::ALL {
                let mut rng = Rng::new(seed);
                let case = Case::random(&mut rng, strategy, bars, assets, sets);
                let label = format!("{} on {spec}, seed {seed}, T {bars}, N {assets}, S {sets}", strategy.name());
                holds(&device, &label, case, &mut rng);
            }
            Ok(())
        });
        outcome.unwrap_or_else(|e| panic!("{e}"));
    }
}

/// A set on an asset: its statistics, then its train and test scores.
fn of_set(case: &Case, swept: &Swept, cost: usize, set: usize, asset: usize) -> Vec<f64> {
    let (at, w) = (set * case.assets + asset, case.windows.len());
    let s = swept.stats[cost][at];
    let stats = [s.sharpe, s.total_return, s.max_drawdown, s.turnover, s.trades as f64];
    stats.into_iter().chain(swept.scores[cost][at * w..(at + 1) * w].iter().flat_map(|s| [s.0, s.1])).collect()
}

#[test]
fn permuting_sets_permutes_results() {
    property(|device, label, case, rng| {
        let mut order: Vec<usize> = (0..case.sets()).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, rng.whole(0, i as u32 + 1) as usize);
        }
        let parameters = case.parameters.iter().map(|(name, x)| (*name, order.iter().map(|&s| x[s]).collect())).collect();
        let (plain, permuted) = (case.run(device).unwrap(), Case { parameters, ..case.clone() }.run(device).unwrap());
        let (n, w, k) = (case.assets, case.windows.len(), plain.outcome.stitched_bars.len());
        for cost in 0..case.cost_bps.len() {
            for (set, &from) in order.iter().enumerate() {
                for asset in 0..n {
                    assert_bits(label, &of_set(&case, &permuted, cost, set, asset), &of_set(&case, &plain, cost, from, asset));
                }
            }
            let (is, was) = (&permuted.outcome.per_asset[cost], &plain.outcome.per_asset[cost]);
            for asset in 0..n {
                let choices = |x: &[u32]| x[asset * w..(asset + 1) * w].to_vec();
                let (is_best, was_best): (Vec<usize>, Vec<usize>) =
                    (choices(&is.best).iter().map(|&b| order[b as usize]).collect(), choices(&was.best).iter().map(|&b| b as usize).collect());
                // Of sets that tie the first is taken, and which that is depends on the order: they are as good in sample.
                for window in 0..w {
                    let score = |set: usize| plain.scores[cost][(set * n + asset) * w + window].0;
                    let (a, b) = (score(is_best[window]), score(was_best[window]));
                    assert!(close_to(a, b, 1e-6), "{label}: asset {asset}, window {window}: {a} was chosen, {b} before");
                }
                if is_best == was_best {
                    assert_eq!(is.stitched[asset * k..(asset + 1) * k], was.stitched[asset * k..(asset + 1) * k], "{label}");
                }
            }
        }
    });
}

/// Multiplying all prices by a power of two is exact, so nothing may notice it.
#[test]
fn a_power_of_two_on_all_prices_changes_no_bit() {
    property(|device, label, case, rng| {
        let factor = 2f32.powi(rng.whole(0, 41) as i32 - 20);
        let close = case.close.iter().map(|p| p * factor).collect();
        let scaled = Case { close, ..case.clone() }.run(device).unwrap();
        assert_bits(&format!("{label}, prices times {factor}"), &scaled.numbers(), &case.run(device).unwrap().numbers());
    });
}

/// Prices in ticks times a small whole number are exact in f32, but no longer have the same fixed-point bits: decisions are the same all
/// the same, and so is what they earn but for rounding. Wilder's average rounds, so a strength exactly on its threshold is left out.
#[test]
fn a_factor_on_all_prices_changes_no_decision() {
    property(|device, label, case, rng| {
        let (mut case, factor) = (ticks(case), rng.whole(3, 200) as f32);
        case.parameters.iter_mut().filter(|p| ["low", "high"].contains(&p.0)).flat_map(|p| &mut p.1).for_each(|x| *x += 0.317);
        let close = case.close.iter().map(|p| p * factor).collect();
        let (plain, scaled) = (case.run(device).unwrap(), Case { close, ..case.clone() }.run(device).unwrap());
        for (i, (got, want)) in scaled.stats.iter().flatten().zip(plain.stats.iter().flatten()).enumerate() {
            let label = format!("{label}, prices times {factor}, result {i}");
            // Momentum's weights are real numbers: a last bit of them may count as a trade.
            assert!(got.trades == want.trades || case.strategy == Strategy::TsMomentum, "{label}: {} trades, {} before", got.trades, want.trades);
            for (name, got, want) in [
                ("turnover", got.turnover, want.turnover),
                ("total_return", got.total_return, want.total_return),
                ("max_drawdown", got.max_drawdown, want.max_drawdown),
            ] {
                assert!((got - want).abs() <= 2e-5 * want.abs().max(1.0), "{label}: {name} {got:e}, {want:e} before");
            }
        }
    });
}

/// Prices after bar t change: scores of windows that end by then, what was chosen and what it earned keep their bits. A jump at the
/// first bars is the largest move and the highest price of all, so that fixed-point numbers have the same unit in both runs.
#[test]
fn no_score_knows_the_future() {
    property(|device, label, mut case, rng| {
        let highest = case.close.iter().copied().fold(0.0, f32::max);
        let n = case.assets;
        case.close[n..2 * n].fill(64.0 * highest);
        let t = rng.whole(case.bars() as u32 / 3, case.bars() as u32 - 1);
        let mut other = case.clone();
        for (i, price) in other.close.iter_mut().enumerate().skip((t as usize + 1) * n) {
            *price *= 0.5 + (i as f32 * 0.37) % 2.5;
        }
        let (before, after) = (case.run(device).unwrap(), other.run(device).unwrap());
        let label = format!("{label}, prices after bar {t}");
        let (w, k) = (case.windows.len(), before.outcome.stitched_bars.len());
        let known = before.outcome.stitched_bars.iter().take_while(|&&j| j < t).count();
        for cost in 0..case.cost_bps.len() {
            for (i, (is, was)) in after.scores[cost].iter().zip(&before.scores[cost]).enumerate() {
                let window = case.windows[i % w];
                if window[1] <= t {
                    assert_bits(&format!("{label}: train score {i}"), &[is.0], &[was.0]);
                }
                if window[3] <= t {
                    assert_bits(&format!("{label}: test score {i}"), &[is.1], &[was.1]);
                }
            }
            for (pooled, is, was) in
                [(false, &after.outcome.per_asset[cost], &before.outcome.per_asset[cost]), (true, &after.outcome.pooled[cost], &before.outcome.pooled[cost])]
            {
                for (i, (is, was)) in is.best.iter().zip(&was.best).enumerate().filter(|(i, _)| case.windows[i % w][1] <= t) {
                    assert_eq!(is, was, "{label}: choice {i} (pooled: {pooled})");
                }
                for i in (0..n * w).filter(|i| case.windows[i % w][3] <= t) {
                    assert_eq!((is.trades[i], is.turnover[i]), (was.trades[i], was.turnover[i]), "{label}: activity {i} (pooled: {pooled})");
                }
                for asset in 0..n {
                    let part = asset * k..asset * k + known;
                    assert_eq!(is.stitched[part.clone()], was.stitched[part], "{label}: net returns of asset {asset} (pooled: {pooled})");
                }
            }
        }
    });
}

// ---- parity -----------------------------------------------------------------------------------------------------------

/// Worst error against `want`, relative above one; undefined values must be undefined in both.
fn error(label: &str, got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "{label}: lengths");
    let one = |(i, (g, w)): (usize, (&f64, &f64))| {
        assert_eq!(g.is_nan(), w.is_nan(), "{label}[{i}]: got {g}, expected {w}");
        if g == w || g.is_nan() { 0.0 } else { (g - w).abs() / w.abs().max(1.0) }
    };
    got.iter().zip(want).enumerate().map(one).fold(0.0, f64::max)
}

/// Every device may be off by twice what the f32 CPU column is off, and `atol`.
fn parity(label: &str, atol: f64, run: &dyn Fn(&Device) -> Vec<f64>, devices: &[Device]) {
    let want = run(&devices[0]);
    let rounding = error(label, &run(&devices[1]), &want);
    assert!(rounding < 1e-2, "{label}: the f32 column is off by {rounding:e}");
    for device in &devices[2..] {
        let off = error(&format!("{label} on {}", device.info()), &run(device), &want);
        assert!(off <= 2.0 * rounding + atol, "{label} on {}: off by {off:e}, the f32 column by {rounding:e}", device.info());
    }
}

/// `reference`, `cpu`, then every other device in each of its variants.
fn devices() -> Vec<Device> {
    DEVICES.iter().flat_map(|spec| variants(spec).into_iter().filter_map(|options: OpenOptions| open_with(spec, &options))).collect()
}

#[test]
fn philox_has_equal_bits_everywhere() {
    let (devices, mut rng) = (devices(), Rng::new(6));
    for n in [1, 63, 64, 65, 997, 4099] {
        let mut words = |count: usize| (0..count).map(|_| rng.whole(0, u32::MAX)).collect::<Vec<u32>>();
        let (counters, keys) = (words(4 * n), words(2 * n));
        let run = |device: &Device| {
            let (counter, key) = (device.upload_u32("counter", &counters).unwrap(), device.upload_u32("key", &keys).unwrap());
            let mut pass = device.pass("philox");
            let out = philox(&mut pass, &counter, &key).unwrap();
            let reads = (pass.read(&out.bits).unwrap(), pass.read(&out.uniform).unwrap(), pass.read(&out.normal).unwrap());
            let mut done = pass.submit().unwrap();
            (done.u32(reads.0).unwrap(), done.f64(reads.1).unwrap(), done.f64(reads.2).unwrap())
        };
        let (bits, uniforms, _) = run(&devices[0]);
        for device in &devices {
            let got = run(device);
            assert_eq!(got.0, bits, "bits, N {n}, {}", device.info());
            assert_bits(
                &format!("uniforms, N {n}, {}", device.info()),
                &got.1,
                &uniforms.iter().map(|&u| if device.info().kind == forback::DeviceKind::Reference { u } else { f64::from(u as f32) }).collect::<Vec<_>>(),
            );
        }
        parity(&format!("normals, N {n}"), 1e-6, &|device| run(device).2, &devices);
    }
}

#[test]
fn performance_has_parity() {
    let (devices, mut rng) = (devices(), Rng::new(7));
    for t in [1, 2, 127, 128, 129, 1009, 5003] {
        let n = if t > 1000 { 3 } else { 7 };
        let mut x: Vec<f32> = (0..n).flat_map(|_| rng.returns(t, 4e-4, 0.012)).collect();
        x[..t].fill(0.0); // stands still
        x[t..2 * t].fill(0.0073); // rises evenly
        if n > 3 {
            x[3 * t + t / 2] = -1.0; // ruin
            x[4 * t..5 * t].iter_mut().for_each(|r| *r = r.abs()); // never falls
            x[5 * t..6 * t].iter_mut().for_each(|r| *r = (*r * 50.0).round() / 50.0); // few values, many ties
        }
        let run = |device: &Device| {
            let returns = device.upload("returns", &x).unwrap();
            let mut pass = device.pass("performance");
            let read = performance_read(&mut pass, &returns, n as u64, t as u64).unwrap();
            let statistics = pass.submit().unwrap().f64(read).unwrap();
            finish(&statistics, t as u64, 252.0).iter().flat_map(|p| p.entries().map(|e| e.1)).collect::<Vec<_>>()
        };
        parity(&format!("performance, T {t}"), 2e-5, &run, &devices);
    }
}

/// Sharpe ratios and the gradient for given returns, in f64 where the device has it.
fn sharpes(device: &Device, x: &[f32], t: usize, windows: &[[u32; 2]], upstream: Option<&[f32]>) -> (Vec<f64>, Vec<f64>) {
    let returns = device.upload("returns", x).unwrap();
    let mut pass = device.pass("walk_forward_sharpe");
    let n = (x.len() / t) as u64;
    let forward = walk_forward_sharpe(&mut pass, &returns, n, t as u64, windows, 252.0).unwrap();
    let read = pass.read(&forward.sharpe).unwrap();
    let grad = upstream.map(|g| {
        let upstream = device.upload("grad_sharpe", g).unwrap();
        let grad = walk_forward_sharpe_backward(&mut pass, &forward, &returns, &upstream).unwrap();
        pass.read(&grad).unwrap()
    });
    let mut done = pass.submit().unwrap();
    let ratios = done.f64(read).unwrap().into_iter().map(defined).collect();
    (ratios, grad.map(|read| done.f64(read).unwrap()).unwrap_or_default())
}

#[test]
fn walk_forward_sharpe_has_parity() {
    let (devices, mut rng) = (devices(), Rng::new(8));
    for (n, t) in [(1, 1), (3, 2), (2, 63), (5, 64), (3, 65), (7, 211), (2, 2003)] {
        let mut x = rng.returns(n * t, 3e-4, 0.01);
        x[..t / 2].fill(0.001);
        let mut windows: Vec<[u32; 2]> = vec![[0, t as u32], [0, t as u32 / 2], [t as u32 / 2, t as u32 / 2], [t as u32 - 1, t as u32]];
        for _ in 0..30 {
            let (a, b) = (rng.whole(0, t as u32 + 1), rng.whole(0, t as u32 + 1));
            windows.push([a.min(b), a.max(b)]);
        }
        let upstream = rng.returns(n * windows.len(), 0.0, 1.0);
        let label = format!("walk_forward_sharpe, N {n}, T {t}");
        parity(&label, 2e-5, &|device| sharpes(device, &x, t, &windows, None).0, &devices);
        parity(&format!("{label}, gradient"), 1e-4, &|device| sharpes(device, &x, t, &windows, Some(&upstream)).1, &devices);
    }
}

/// Central differences of fourth order on the f64 reference; the returns and the steps are multiples of 2⁻²⁰, so every perturbed
/// return is exact in f32.
#[test]
fn walk_forward_sharpe_backward_is_the_gradient() {
    let (device, mut rng) = (open("reference").unwrap(), Rng::new(9));
    let (n, t) = (2, 29);
    let grid = 2f32.powi(20);
    let x: Vec<f32> = rng.returns(n * t, 1e-3, 0.02).iter().map(|r| (r * grid).round() / grid).collect();
    let windows = [[0, 10], [5, 20], [0, 25], [18, 20], [22, 23], [24, 24]];
    let w = windows.len();
    let upstream = rng.returns(n * w, 0.0, 1.0);
    let (_, grad) = sharpes(&device, &x, t, &windows, Some(&upstream));
    let steps = [2f32.powi(-13), -(2f32.powi(-13)), 2f32.powi(-14), -(2f32.powi(-14))];
    for i in 0..n * t {
        let row = i / t;
        let mut rows = Vec::new();
        for step in steps {
            rows.extend_from_slice(&x[row * t..(row + 1) * t]);
            let at = rows.len() - t + i % t;
            rows[at] += step;
        }
        let (ratios, _) = sharpes(&device, &rows, t, &windows, None);
        let loss =
            |k: usize| (0..w).map(|v| ratios[k * w + v]).zip(&upstream[row * w..]).filter(|(s, _)| !s.is_nan()).map(|(s, g)| s * f64::from(*g)).sum::<f64>();
        let slope = |k: usize| (loss(k) - loss(k + 1)) / (2.0 * f64::from(steps[k]));
        let want = (4.0 * slope(2) - slope(0)) / 3.0;
        assert!((grad[i] - want).abs() <= 1e-6 * want.abs().max(1.0), "return {} of series {row}: {}, expected {want}", i % t, grad[i]);
    }
    assert!((0..n).all(|row| grad[row * t + 25..(row + 1) * t].iter().all(|&g| g == 0.0)), "bars outside every window");
}

#[test]
fn sweeps_have_parity_and_equal_choices() {
    let (devices, mut rng) = (devices(), Rng::new(10));
    for (i, strategy) in Strategy::ALL.into_iter().enumerate() {
        for (bars, assets, sets) in [(2, 1, 1), (65, 5, 63), (130, 1, 64), (131, 2, 65), (257, 3, 127), (700, 2, 200)] {
            let costs = [[0.0, 10.0], [5.0, 50.0], [1.0, 25.0]][i % 3].to_vec();
            let case = Case { cost_bps: costs, ..Case::random(&mut rng, strategy, bars, assets, sets) };
            let label = format!("{} T {bars} N {assets} S {sets} {:?} start {}", strategy.name(), case.execution, case.start);
            let all: Vec<common::Swept> = devices.iter().map(|d| case.run(d).unwrap()).collect();
            let reals = |s: &common::Swept| {
                let stats = s.stats.iter().flatten().flat_map(|s| [s.total_return, s.max_drawdown, s.turnover]);
                let stitched = s.outcome.per_asset.iter().chain(&s.outcome.pooled).flat_map(|p| p.stitched.iter().map(|&x| f64::from(x)));
                stats.chain(stitched).collect::<Vec<_>>()
            };
            let ratios =
                |s: &common::Swept| s.stats.iter().flatten().map(|s| s.sharpe).chain(s.scores.iter().flatten().flat_map(|s| [s.0, s.1])).collect::<Vec<_>>();
            let (want, rounding) = (&all[0], [error(&label, &reals(&all[1]), &reals(&all[0])), error(&label, &ratios(&all[1]), &ratios(&all[0]))]);
            for (device, got) in devices.iter().zip(&all).skip(1) {
                let label = format!("{label} on {}", device.info());
                let trades = |s: &common::Swept| s.stats.iter().flatten().map(|s| s.trades).collect::<Vec<_>>();
                assert_eq!(trades(got), trades(want), "{label}: trades");
                let ties = near_ties(&label, &case, got, want);
                assert!(ties <= 2 + case.windows.len() * (assets + 1) / 5, "{label}: {ties} choices differ");
                if ties > 0 {
                    eprintln!("{label}: {ties} of the choices are between sets that only rounding tells apart");
                    continue;
                }
                let activity = |s: &common::Swept| s.outcome.per_asset.iter().chain(&s.outcome.pooled).flat_map(|p| p.trades.clone()).collect::<Vec<_>>();
                assert_eq!(activity(got), activity(want), "{label}: stitched trades");
                let off = [error(&label, &reals(got), &reals(want)), error(&label, &ratios(got), &ratios(want))];
                assert!(off[0] <= 2.0 * rounding[0] + 2e-6 && off[1] <= 2.0 * rounding[1] + 2e-5, "{label}: off by {off:?}, the f32 column by {rounding:?}");
            }
        }
    }
}

/// Grids of sets go through tiles on a GPU, and series through spans: sums must be those of one thread that walks all bars.
#[test]
fn tiles_and_spans_have_the_sums_of_one_walk() {
    let (devices, mut rng) = (devices(), Rng::new(46));
    let cpu = &devices[1];
    for (i, strategy) in Strategy::ALL.into_iter().enumerate() {
        // one span, spans of 512 bars, spans of 1,024 bars; grids that fill words and grids that do not, each set twice
        for (bars, assets, sides) in [(190, 2, [5, 40]), (1300, 2, [37, 3]), (8300, 1, [3, 5])] {
            if bars > 8192 && ![Strategy::SmaCross, Strategy::RsiReversion, Strategy::TsMomentum].contains(&strategy) {
                continue;
            }
            let execution = [Execution::SameClose, Execution::NextClose][i % 2];
            let n = sides[0] * sides[1];
            let grid = |set: usize| (2.0 + (set % sides[0]) as f32, 3.0 + (set / sides[0] % sides[1]) as f32);
            let column = |f: &dyn Fn(f32, f32) -> f32| (0..2 * n).map(|set| f(grid(set).0, grid(set).1)).collect::<Vec<f32>>();
            let mut parameters = match strategy {
                Strategy::TsMomentum => vec![("lookback", column(&|a, _| a)), ("max_leverage", column(&|_, b| 1.0 + b / 20.0))],
                Strategy::RsiReversion => vec![("period", column(&|a, _| a)), ("low", column(&|_, b| 10.0 + b)), ("high", column(&|_, b| 99.0 - b))],
                Strategy::BollingerReversion => vec![("period", column(&|a, _| a)), ("width", column(&|_, b| 0.1 * b))],
                Strategy::DonchianBreakout => vec![("entry", column(&|a, _| a)), ("exit", column(&|_, b| b))],
                Strategy::Macd => vec![("fast", column(&|a, _| a)), ("slow", column(&|_, b| 40.0 + b)), ("signal", column(&|_, _| 5.0))],
                _ => vec![("fast", column(&|a, _| a)), ("slow", column(&|_, b| 20.0 + b))],
            };
            // sides and sizes without stops
            if strategy == Strategy::TsMomentum || bars == 190 {
                parameters.push(("side", (0..2 * n).map(|set| [1.0, 0.0, -1.0][set % 3]).collect()));
                parameters.push(("target_vol", (0..2 * n).map(|set| if set % 5 == 0 && strategy != Strategy::TsMomentum { 0.0 } else { 0.1 }).collect()));
                parameters.push(("vol_window", column(&|_, b| 2.0 + b)));
                if strategy != Strategy::TsMomentum {
                    parameters.push(("max_leverage", column(&|a, _| a)));
                }
            }
            let windows = common::rolling(bars as u32 - 1, 0, bars as u32 / 3, bars as u32 / 9);
            let case = Case { execution, parameters, cost_bps: vec![7.0], windows, ..Case::random(&mut rng, strategy, bars, assets, 1) };
            let want = case.run(cpu).unwrap();
            for device in devices.iter().skip(2) {
                let label = format!("{} T {bars} on {}", strategy.name(), device.info());
                let got = case.run(device).unwrap();
                let launched = got.outcome.launches > 0;
                for (g, w) in got.stats.iter().flatten().zip(want.stats.iter().flatten()) {
                    let turnover = (g.turnover - w.turnover).abs() <= 1e-5 * w.turnover;
                    assert!(
                        launched && turnover && g.trades == w.trades && (close_to(g.sharpe, w.sharpe, 2e-6) || g.sharpe.is_nan() && w.sharpe.is_nan()),
                        "{label}: {g:?}, expected {w:?}"
                    );
                    let off = (g.total_return - w.total_return).abs() / (1.0 + w.total_return) + (g.max_drawdown - w.max_drawdown).abs();
                    assert!(off < 2e-5, "{label}: {g:?}, expected {w:?}");
                }
                let choices = |s: &common::Swept| s.outcome.per_asset.iter().chain(&s.outcome.pooled).flat_map(|p| p.best.clone()).collect::<Vec<_>>();
                assert_eq!(choices(&got), choices(&want), "{label}");
            }
        }
    }
}

/// Windows where two devices chose different sets. Both must be as good: sets that only rounding tells apart, say because they pay
/// the same cost on different bars of a standstill.
fn near_ties(label: &str, case: &Case, got: &common::Swept, want: &common::Swept) -> usize {
    let (n, w) = (case.assets, case.windows.len());
    let mut ties = 0;
    for (c, bps) in case.cost_bps.iter().enumerate() {
        let value = |set: u32, assets: std::ops::Range<usize>, k: usize| {
            let [from, to, ..] = case.windows[k].map(|x| x as usize);
            sharpe(&assets.flat_map(|a| simulate(case, set as usize, a, bps * 1e-4).net[from..to].to_vec()).collect::<Vec<_>>())
        };
        for (pooled, (got, want)) in [(false, (&got.outcome.per_asset, &want.outcome.per_asset)), (true, (&got.outcome.pooled, &want.outcome.pooled))] {
            let (Some(got), Some(want)) = (got.get(c), want.get(c)) else { continue };
            assert_eq!(got.best.len(), want.best.len(), "{label}");
            for (i, (a, b)) in got.best.iter().zip(&want.best).enumerate().filter(|(_, (a, b))| a != b) {
                let assets = if pooled { 0..n } else { i / w..i / w + 1 };
                let (a, b) = (value(*a, assets.clone(), i % w), value(*b, assets, i % w));
                assert!((a - b).abs() <= 2e-6 * a.abs().max(1.0), "{label}: best of window {} (pooled: {pooled}) is worth {a}, expected {b}", i % w);
                ties += 1;
            }
        }
    }
    ties
}

// ---- multiple testing -------------------------------------------------------------------------------------------------

/// Sharpe ratio per bar, undefined where the deviation is none, as the cross-validation has it.
fn bar_sharpe(x: &[f64]) -> Option<f64> {
    let ratio = sharpe(x) / 252f64.sqrt();
    (!ratio.is_nan()).then_some(ratio)
}

/// Choices and the share of combinations in which they end at or below the middle, straight from the definition.
fn naive_overfitting(x: &[f32], trials: usize, splits: usize) -> (Vec<u32>, f64) {
    let t = x.len() / trials;
    let edge = |b: usize| b * (t / splits) + b.min(t % splits);
    let (mut chosen, mut overfit) = (Vec::new(), 0);
    let masks: Vec<usize> = (0..1usize << splits).filter(|m| m.count_ones() as usize == splits / 2).collect();
    for &mask in &masks {
        let ratios = |inside: bool| -> Vec<f64> {
            let bars: Vec<usize> = (0..splits).filter(|b| (mask >> b & 1 == 1) == inside).flat_map(|b| edge(b)..edge(b + 1)).collect();
            let one = |s: usize| bar_sharpe(&bars.iter().map(|&j| f64::from(x[s * t + j])).collect::<Vec<_>>()).unwrap_or(f64::NEG_INFINITY);
            (0..trials).map(one).collect()
        };
        let (inside, outside) = (ratios(true), ratios(false));
        let best = (1..trials).fold(0, |best, s| if inside[s] > inside[best] { s } else { best });
        let below = outside.iter().filter(|&&r| r < outside[best]).count() as f64;
        let level = outside.iter().filter(|&&r| r == outside[best]).count() as f64;
        let omega = (below + (level + 1.0) / 2.0) / (trials as f64 + 1.0);
        overfit += usize::from((omega / (1.0 - omega)).ln() <= 0.0);
        chosen.push(best as u32);
    }
    (chosen, overfit as f64 / masks.len() as f64)
}

fn tested(device: &Device, x: &[f32], trials: usize, splits: u32) -> Tested {
    multiple_testing(device, x, trials, &MultipleTesting { splits, ..MultipleTesting::default() }).unwrap()
}

/// Trials with a duplicate, one that stands still, one that never moves, and one a million times smaller.
fn trials(rng: &mut Rng, n: usize, t: usize) -> Vec<f32> {
    let mut x: Vec<f32> = (0..n).flat_map(|i| rng.returns(t, 2e-4 * (i % 3) as f64, 0.01)).collect();
    if n > 6 {
        x.copy_within(2 * t..3 * t, 4 * t);
        x[3 * t..4 * t].fill(0.0);
        x[5 * t..6 * t].fill(0.0012);
        x[6 * t..7 * t].iter_mut().for_each(|r| *r *= 1e-6);
    }
    x
}

#[test]
fn overfitting_is_what_naive_enumeration_finds() {
    let (devices, mut rng) = (devices(), Rng::new(40));
    for (n, t, splits) in [(2, 4, 2), (3, 8, 4), (5, 17, 4), (7, 41, 6), (33, 50, 8), (129, 30, 4), (260, 64, 2)] {
        let x = trials(&mut rng, n, t);
        let (chosen, pbo) = naive_overfitting(&x, n, splits);
        let first = tested(&devices[0], &x, n, splits as u32);
        for device in &devices {
            let label = format!("S {n}, T {t}, {splits} splits on {}", device.info());
            let got = tested(device, &x, n, splits as u32);
            assert_eq!((&got.chosen, got.pbo), (&chosen, pbo), "{label}");
            assert_bits(&label, &got.logits, &first.logits);
            assert_eq!(got.loss, first.loss, "{label}");
        }
    }
}

#[test]
fn multiple_testing_has_parity() {
    let (devices, mut rng) = (devices(), Rng::new(41));
    for (n, t, splits) in [(1, 5, 2), (2, 127, 4), (9, 128, 6), (131, 129, 4), (7, 2003, 2)] {
        let x = trials(&mut rng, n, t);
        let run = |device: &Device| {
            let got = tested(device, &x, n, splits);
            [got.sharpe, got.probabilistic_sharpe, got.deflated_sharpe, vec![got.expected_max_sharpe, got.pbo]].concat()
        };
        parity(&format!("multiple_testing, S {n}, T {t}"), 2e-5, &run, &devices);
    }
}

#[test]
fn permuting_trials_permutes_their_results() {
    let mut rng = Rng::new(42);
    let (n, t) = (23, 96);
    // No two trials alike: ties go to the lowest index, which a permutation moves.
    let x: Vec<f32> = rng.returns(n * t, 1e-4, 0.01);
    let order: Vec<usize> = (0..n).map(|i| i * 7 % n).collect();
    let permuted: Vec<f32> = order.iter().flat_map(|&i| x[i * t..(i + 1) * t].to_vec()).collect();
    for device in open_all(&DEVICES) {
        let (was, is) = (tested(&device, &x, n, 8), tested(&device, &permuted, n, 8));
        let label = format!("{}", device.info());
        let moved = |v: &[f64]| order.iter().map(|&i| v[i]).collect::<Vec<_>>();
        assert_bits(&label, &is.sharpe, &moved(&was.sharpe));
        assert_bits(&label, &is.probabilistic_sharpe, &moved(&was.probabilistic_sharpe));
        assert_eq!(is.chosen.iter().map(|&i| order[i as usize] as u32).collect::<Vec<_>>(), was.chosen, "{label}");
        assert_bits(&label, &is.logits, &was.logits);
        assert_eq!((is.pbo, is.loss), (was.pbo, was.loss), "{label}");
        // The last ulp of a sum depends on its order.
        assert!((is.expected_max_sharpe - was.expected_max_sharpe).abs() < 1e-12);
        // Scale is no skill: a power of two moves nothing.
        let scaled = tested(&device, &x.iter().map(|v| v * 1024.0).collect::<Vec<_>>(), n, 8);
        assert_eq!((scaled.chosen, scaled.pbo), (was.chosen, was.pbo), "{label}");
    }
}

#[test]
fn one_trial_is_no_choice_and_flat_trials_never_win() {
    let mut rng = Rng::new(43);
    for device in open_all(&DEVICES) {
        let alone = tested(&device, &rng.returns(60, 1e-3, 0.01), 1, 6);
        assert!(alone.pbo.is_nan() && alone.loss.is_nan() && alone.expected_max_sharpe == 0.0 && alone.trials == 1);
        assert_bits("one trial", &alone.deflated_sharpe, &alone.probabilistic_sharpe);
        let mut x = vec![0.0; 60];
        x.extend(rng.returns(60, -2e-3, 0.01));
        x.extend(vec![0.001; 60]);
        let got = tested(&device, &x, 3, 6);
        assert!(got.chosen.iter().all(|&c| c == 1) && got.pbo == 0.0, "{:?}", got.chosen);
        assert!(got.sharpe[0].is_nan() && got.sharpe[2].is_nan() && got.deflated_sharpe[0].is_nan() && got.trials == 1);
        let flat = tested(&device, &[0.0; 180], 3, 6);
        assert!(flat.chosen.iter().all(|&c| c == 0) && flat.pbo == 1.0 && flat.logits.iter().all(|&l| l == 0.0), "equal trials share their mean rank");
    }
}

/// The expected best of N against the mean best of many draws of N.
#[test]
fn the_expected_best_is_what_luck_gives() {
    let mut rng = Rng::new(44);
    for (n, tolerance) in [(10, 0.06), (50, 0.05), (300, 0.05)] {
        let best = |rng: &mut Rng| (0..n).map(|_| rng.normal()).fold(f64::MIN, f64::max);
        let mean = (0..1500).map(|_| best(&mut rng)).sum::<f64>() / 1500.0;
        let formula = expected_max_sharpe(n, 1.0);
        assert!((mean - formula).abs() < tolerance, "best of {n}: {mean}, formula {formula}");
    }
    assert_eq!(combinations(10).len(), 252);
}

/// Returns whose mean is zero and whose squares sum exactly in f32: a replicate that took one other bar would differ.
fn exact_returns(rng: &mut Rng, t: usize) -> Vec<f32> {
    let half: Vec<f32> = (0..t / 2).map(|_| rng.whole(1, 64) as f32 / 64.0).collect();
    let middle = if t % 2 == 1 { vec![0.0] } else { Vec::new() };
    half.iter().copied().chain(middle).chain(half.iter().map(|v| -v)).collect()
}

#[test]
fn replicates_take_the_same_bars_everywhere() {
    let (devices, mut rng) = (devices(), Rng::new(45));
    for (n, t, block, kind) in [
        (1, 2, Some(1.0), Kind::Stationary),
        (3, 63, Some(5.0), Kind::Circular),
        (2, 64, None, Kind::Stationary),
        (5, 301, Some(1.0), Kind::Circular),
        (2, 1001, Some(20.5), Kind::Stationary),
        (1, 700, Some(333.0), Kind::Circular),
    ] {
        let x: Vec<f32> = (0..n).flat_map(|_| exact_returns(&mut rng, t)).collect();
        let config = Bootstrap { replicates: 37, block, seed: 0x1234_5678_9abc_def0, kind, ..Bootstrap::default() };
        let want = replicates(&devices[0], &x, n, &config).unwrap();
        for device in &devices {
            let got = replicates(device, &x, n, &config).unwrap();
            assert_eq!(got.2, want.2, "block lengths");
            for (i, (g, w)) in got.0.iter().zip(&want.0).enumerate() {
                let close = (g.is_nan() && w.is_nan()) || (g - w).abs() <= 4e-7 * w.abs();
                assert!(close, "{kind:?} {block:?}, T {t}, replicate {} of series {}: {g}, expected {w} on {}", i / n, i % n, device.info());
            }
        }
        assert!(want.0.iter().filter(|x| x.is_finite()).count() * 2 > want.0.len() || t == 2);
        let other = replicates(&devices[0], &x, n, &Bootstrap { seed: 1, ..config }).unwrap();
        assert!(t == 2 || other.0 != want.0, "another seed draws other bars");
    }
}

/// A block as long as the series is the series itself, from another start: every replicate has its ratio.
#[test]
fn one_circular_block_is_the_series() {
    let x = Rng::new(46).returns(250, 5e-4, 0.01);
    for device in open_all(&DEVICES) {
        let config = Bootstrap { replicates: 20, block: Some(250.0), kind: Kind::Circular, ..Bootstrap::default() };
        let got = bootstrap_sharpe(&device, &x, 1, &config).unwrap()[0];
        let want = sharpe(&x.iter().map(|&v| f64::from(v)).collect::<Vec<_>>()) / 252f64.sqrt();
        for end in [got.sharpe, got.lower, got.upper] {
            assert!((end - want).abs() < 2e-6, "{got:?}, expected {want}");
        }
    }
}

/// Share of 95 % intervals that hold the true ratio, for independent returns and for an autoregression.
#[test]
fn intervals_hold_the_true_ratio() {
    let (device, mut rng) = (open("cpu").unwrap(), Rng::new(47));
    let (n, t) = (300, 400);
    let mut coverage = |phi: f64, block: Option<f64>| {
        let (mean, innovation) = (0.1, (1.0 - phi * phi).sqrt());
        let mut x = Vec::with_capacity(n * t);
        for _ in 0..n {
            let mut state = rng.normal();
            for _ in 0..t {
                x.push((mean + state) as f32);
                state = phi * state + innovation * rng.normal();
            }
        }
        let config = Bootstrap { replicates: 500, block, ..Bootstrap::default() };
        let found = bootstrap_sharpe(&device, &x, n, &config).unwrap();
        found.iter().filter(|i| i.lower <= mean && mean <= i.upper).count() as f64 / n as f64
    };
    let independent = coverage(0.0, None);
    assert!((0.90..=0.985).contains(&independent), "independent returns: {independent}");
    let (blocks, single) = (coverage(0.4, None), coverage(0.4, Some(1.0)));
    assert!(blocks > 0.86 && single < 0.86 && blocks > single + 0.06, "autoregression: blocks {blocks}, single bars {single}");
}
