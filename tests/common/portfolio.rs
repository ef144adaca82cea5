//! Portfolios with shared capital: the specification's numbers, a plain loop in f64 as the oracle, all devices against the reference, and
//! what must hold whatever the numbers are. Part of `devices`.

use super::common::{DEVICES, Rng, assert_bits, open, open_all, open_with, variants};
use super::error;
use forback::kernels::backtest_sweep::Execution;
use forback::kernels::portfolio_sweep::{AssetReturns, Portfolio, PortfolioOutcome, PortfolioStats, Positions, Rebalance, Status};
use forback::kernels::{Device, DeviceKind, Error, OpenOptions};

/// A problem, owned.
#[derive(Clone)]
struct Books {
    close: Vec<f32>,
    assets: usize,
    count: usize,
    positions: Vec<f32>,
    allocation: Option<Vec<f32>>,
    rebalance: Rebalance,
    cost_bps: Vec<f64>,
    execution: Execution,
    start: usize,
}

impl Books {
    /// Random targets that change every few bars, some short, some flat; prices with gaps.
    fn random(seed: u32, count: usize, bars: usize, assets: usize, rebalance: Rebalance) -> Books {
        let mut rng = Rng::new(seed);
        let mut close = rng.market(bars + 1, assets);
        for price in &mut close {
            if rng.unit() < 0.03 {
                *price = f32::NAN;
            }
        }
        let size = 1.6 / assets as f64;
        let mut positions = vec![0.0f32; count * bars * assets];
        for book in positions.chunks_exact_mut(bars * assets) {
            let mut row: Vec<f32> = vec![0.0; assets];
            for (j, out) in book.chunks_exact_mut(assets).enumerate() {
                for w in &mut row {
                    if j == 0 || rng.unit() < 0.1 {
                        *w = if rng.unit() < 0.2 { 0.0 } else { (size * (rng.unit() - 0.4)) as f32 };
                    }
                }
                out.copy_from_slice(&row);
            }
        }
        Books { close, assets, count, positions, allocation: None, rebalance, cost_bps: vec![0.0, 12.5], execution: Execution::NextClose, start: 0 }
    }

    fn bars(&self) -> usize {
        self.close.len() / self.assets - 1
    }

    fn run_with(&self, device: &Device, slab: Option<usize>) -> forback::Result<PortfolioOutcome> {
        let returns = AssetReturns::of_closes(&self.close, self.assets)?;
        Portfolio {
            allocation: self.allocation.as_deref(),
            rebalance: self.rebalance,
            cost_bps: &self.cost_bps,
            execution: self.execution,
            start: self.start,
            assets: true,
            net: true,
            weights: true,
            slab,
            ..Portfolio::new(&returns, self.count, Positions::Dense(&self.positions))
        }
        .run(device)
    }

    fn run(&self, device: &Device) -> PortfolioOutcome {
        self.run_with(device, None).unwrap()
    }
}

fn numbers(out: &PortfolioOutcome) -> Vec<f64> {
    let stats = |s: &PortfolioStats| {
        let ruin = if let Status::Ruined { bar } = s.status { bar as f64 } else { -1.0 };
        [s.sharpe, s.total_return, s.max_drawdown, s.turnover, s.trades as f64, ruin]
    };
    let all = out.stats.iter().chain(&out.assets).flat_map(stats);
    all.chain(out.net.iter().map(|&x| f64::from(x))).chain(out.weights.iter().copied()).collect()
}

// ---- the oracle -------------------------------------------------------------------------------------------------------

/// One book at one cost, bar by bar as the definition reads.
#[derive(Default)]
struct Plain {
    net: Vec<f64>,
    turnover: f64,
    trades: u64,
    weights: Vec<f64>,
    ruin: Option<usize>,
    /// Orders that rounding decides.
    doubtful: u64,
}

fn plain(b: &Books, book: usize, cost: f64) -> Plain {
    let (n, bars) = (b.assets, b.bars());
    let price = |j: usize, i: usize| Some(f64::from(b.close[j * n + i])).filter(|p| !p.is_nan());
    let lag = usize::from(b.execution == Execution::NextClose);
    let band = f64::from(b.rebalance.band as f32);
    let mut out = Plain { weights: vec![0.0; n], ..Plain::default() };
    let mut last: Vec<Option<f64>> = vec![None; n];
    for j in 0..bars {
        for i in 0..n {
            last[i] = price(j, i).or(last[i]);
        }
        if j < b.start {
            continue;
        }
        if out.ruin.is_some() {
            out.net.push(0.0);
            continue;
        }
        let w = &mut out.weights;
        let mut turnover = 0.0;
        if (j - b.start).is_multiple_of(b.rebalance.every as usize) {
            for i in (0..n).filter(|&i| price(j, i).is_some()) {
                let share = |j: usize| b.allocation.as_ref().map_or(1.0, |a| f64::from(a[j * n + i]));
                let u = if j < lag { 0.0 } else { f64::from(b.positions[(book * bars + j - lag) * n + i]) * share(j - lag) };
                let gap = u - w[i];
                // what counts as rounding, by the kernel's definition
                let near = (u.abs() + band) / 1_048_576.0;
                let beyond = gap.abs() - (band + near);
                out.doubtful += u64::from(beyond.abs() < near && gap != 0.0);
                if beyond > 0.0 {
                    let next = if b.rebalance.to_edge { u - gap.signum() * band } else { u };
                    turnover += (next - w[i]).abs();
                    out.trades += 1;
                    w[i] = next;
                } else if gap.abs() <= u.abs() / 1_048_576.0 {
                    w[i] = u;
                }
            }
        }
        let earned: Vec<f64> = (0..n).map(|i| price(j + 1, i).zip(last[i]).map_or(0.0, |(p, q)| (p / q - 1.0) as f32 as f64)).collect();
        let gross: f64 = w.iter().zip(&earned).map(|(w, r)| w * r).sum();
        let net = (1.0 - cost * turnover) * (1.0 + gross) - 1.0;
        out.turnover += turnover;
        if net <= -1.0 {
            out.ruin = Some(j);
            w.fill(0.0);
        } else {
            w.iter_mut().zip(&earned).for_each(|(w, r)| *w *= (1.0 + r) / (1.0 + gross));
        }
        out.net.push(net.max(-1.0));
    }
    out
}

fn drawdown(net: &[f64]) -> f64 {
    let (mut level, mut peak, mut worst) = (1.0f64, 1.0f64, 0.0f64);
    for r in net {
        level *= 1.0 + r;
        peak = peak.max(level);
        worst = worst.max(1.0 - level / peak);
    }
    worst
}

fn sharpe(net: &[f64]) -> f64 {
    let n = net.len() as f64;
    let mean = net.iter().sum::<f64>() / n;
    let m2: f64 = net.iter().map(|r| (r - mean) * (r - mean)).sum();
    if net.len() < 2 || m2 <= (m2 + n * mean * mean) / 1_048_576.0 { f64::NAN } else { mean / (m2 / (n - 1.0)).sqrt() * 252f64.sqrt() }
}

#[track_caller]
fn near(what: &str, got: f64, want: f64, tolerance: f64) {
    assert!((got.is_nan() && want.is_nan()) || (got - want).abs() <= tolerance * want.abs().max(1.0), "{what}: got {got:e}, expected {want:e}");
}

/// Compares every book, and returns how many were too doubtful to.
fn against_oracle(b: &Books, device: &Device) -> usize {
    let out = b.run(device);
    let (costs, mut skipped) = (b.cost_bps.len(), 0);
    // The f32 devices were off by 1.6e-6 at most.
    let tolerance = if device.info().kind == DeviceKind::Reference { 1e-9 } else { 4e-6 };
    for (book, c) in (0..b.count).flat_map(|p| (0..costs).map(move |c| (p, c))) {
        let want = plain(b, book, b.cost_bps[c] * 1e-4);
        let (got, label) = (&out.stats[book * costs + c], format!("{}: book {book} of {}, {} assets, cost {c}", device.info().kind.name(), b.count, b.assets));
        // a doubtful order may be made or not on a device in f32, and what follows moves with it
        let slack = want.doubtful;
        assert!(got.trades.abs_diff(want.trades) <= slack, "{label}: {} orders, expected {} ± {slack}", got.trades, want.trades);
        if slack > 0 && tolerance > 1e-6 {
            skipped += 1;
            continue;
        }
        near(&format!("{label}: turnover"), got.turnover, want.turnover, tolerance);
        near(&format!("{label}: return"), got.total_return, want.net.iter().map(|r| 1.0 + r).product::<f64>() - 1.0, tolerance);
        near(&format!("{label}: drawdown"), got.max_drawdown, drawdown(&want.net), tolerance);
        near(&format!("{label}: sharpe"), got.sharpe, sharpe(&want.net), 20.0 * tolerance);
        assert_eq!(got.status, want.ruin.map_or(Status::Solvent, |bar| Status::Ruined { bar }), "{label}");
        let counted = want.net.len();
        for (j, r) in want.net.iter().enumerate() {
            near(&format!("{label}: net[{j}]"), f64::from(out.net[(book * costs + c) * counted + j]), *r, 2e-6);
        }
        for (i, w) in want.weights.iter().enumerate() {
            near(&format!("{label}: weight {i}"), out.weights[book * b.assets + i], *w, tolerance);
        }
    }
    skipped
}

const BAND: Rebalance = Rebalance { band: 0.01, every: 1, to_edge: false };
const EDGE: Rebalance = Rebalance { band: 0.004, every: 3, to_edge: true };

#[test]
fn books_agree_with_a_plain_loop() {
    for device in open_all(&DEVICES) {
        let (mut books, mut skipped) = (0, 0);
        let slow = matches!(device.info().kind, DeviceKind::Wgpu | DeviceKind::CudaHost);
        // books, bars, assets: one of everything, around a workgroup, primes
        let sizes =
            [(1, 1, 1), (1, 200, 1), (3, 90, 2), (131, 5, 1), (7, 70, 8), (2, 66, 31), (3, 65, 33), (2, 40, 127), (2, 40, 128), (3, 40, 130), (1, 9, 300)];
        for (i, &(count, bars, assets)) in sizes.iter().enumerate().take(if slow { 9 } else { 11 }).chain([(9, &sizes[9])]) {
            for (k, rebalance) in [Rebalance::default(), BAND, EDGE].into_iter().enumerate() {
                let mut b = Books::random(900 + i as u32, count, bars, assets, rebalance);
                b.execution = if (i + k) % 2 == 0 { Execution::SameClose } else { Execution::NextClose };
                b.start = if bars > 30 { (i + k) % 5 } else { 0 };
                if k == 1 {
                    b.allocation = Some((0..bars * assets).map(|x| 0.5 + (x % 7) as f32 * 0.125).collect());
                }
                skipped += against_oracle(&b, &device);
                books += 2 * count;
            }
        }
        assert!(10 * skipped < books, "{skipped} of {books} books were not compared");
    }
}

#[test]
fn a_long_history_goes_through_in_slabs() {
    for device in open_all(&DEVICES) {
        let b = Books::random(905, 2, 1500, 5, BAND);
        assert_eq!(against_oracle(&b, &device), 0, "choose another seed");
        let launches = b.run(&device).launches;
        // llvmpipe leaves loops early beyond 65,535 rounds
        assert_eq!(launches > 3, device.limits().loop_rounds < 150_000, "{:?}: {launches} launches", device.info().kind);
    }
}

// ---- the specification ------------------------------------------------------------------------------------------------

#[test]
fn the_example_of_the_specification() {
    // enter (.5, .5) at 10 bp, +10 % and −10 %, then 0 and +10 %, then back to (.5, .5)
    let close = vec![100.0, 100.0, 110.0, 90.0, 110.0, 99.0, 110.0, 99.0];
    for device in open_all(&DEVICES) {
        let exact = device.info().kind == DeviceKind::Reference;
        // Returns are given in f32; off by 1.7e-9 and 4.1e-8 at most.
        let tolerance = if exact { 5e-9 } else { 1e-7 };
        let positions = [[0.5; 6], [0.5; 6]].concat();
        let books = |every| Books {
            close: close.clone(),
            assets: 2,
            count: 2,
            positions: positions.clone(),
            allocation: None,
            rebalance: Rebalance { every, ..Rebalance::default() },
            cost_bps: vec![10.0],
            execution: Execution::SameClose,
            start: 0,
        };
        let value = |out: &PortfolioOutcome, bars: usize| out.net[..bars].iter().map(|&r| 1.0 + f64::from(r)).product::<f64>();
        let held = books(9).run(&device);
        near("V after entry and two bars", value(&held, 3), 1.043955, tolerance);
        near("w", held.weights[0], 0.526_315_789_5, tolerance);
        near("w", held.weights[1], 0.473_684_210_5, tolerance);
        assert_eq!((held.stats[0].trades, held.stats[1].turnover), (2, 1.0));
        let back = books(2).run(&device);
        near("V after the rebalance", value(&back, 3), 1.043_900_055, tolerance);
        near("turnover", back.stats[0].turnover, 1.052_631_578_9, tolerance);
        assert_eq!((back.stats[0].trades, back.stats[0].status), (4, Status::Solvent));
        assert_eq!(back.stats[0], back.stats[1], "the same book twice");
        let mix = Books { cost_bps: vec![0.0], ..books(1) }.run(&device);
        near("constant mix at no cost", value(&mix, 3), 1.05, tolerance);
    }
}

#[test]
fn a_static_book_pays_its_entry_alone() {
    for device in open_all(&DEVICES) {
        for every in [1, 5] {
            let mut b = Books::random(910, 1, 300, 1, Rebalance { every, ..Rebalance::default() });
            b.positions.fill(1.0);
            let out = b.run(&device);
            assert_eq!((out.stats[1].trades, out.stats[1].turnover), (1, 1.0), "{:?}", device.info().kind);
            // to the band's edge without a move: once, not again and again
            let still = Books { close: vec![100.0; 301], rebalance: Rebalance { band: 0.3, every, to_edge: true }, ..b };
            let out = still.run(&device);
            assert_eq!((out.stats[0].trades, out.stats[0].total_return), (1, 0.0), "{:?}", device.info().kind);
            assert!((out.weights[0] - 0.7).abs() < 1e-6);
        }
    }
}

#[test]
fn a_book_without_capital_stays_without() {
    // three times long into −40 %, then the price recovers; short into a price that triples
    let close = vec![100.0, 100.0, 60.0, 120.0, 240.0, 90.0];
    for device in open_all(&DEVICES) {
        let b = Books {
            close: close.clone(),
            assets: 1,
            count: 3,
            positions: [[3.0f32; 5], [-1.5; 5], [0.5; 5]].concat(),
            allocation: None,
            rebalance: Rebalance::default(),
            cost_bps: vec![0.0, 5.0],
            execution: Execution::SameClose,
            start: 0,
        };
        let out = b.run(&device);
        for (c, bar) in [(0, 1), (1, 1), (2, 2), (3, 2)] {
            let s = out.stats[c];
            assert_eq!(s.status, Status::Ruined { bar }, "{:?}: {s:?}", device.info().kind);
            assert_eq!((s.total_return, s.max_drawdown), (-1.0, 1.0), "{s:?}");
            assert!(out.net[c * 5 + bar] == -1.0 && out.net[c * 5 + bar + 1..(c + 1) * 5].iter().all(|&r| r == 0.0), "{:?}", out.net);
        }
        assert_eq!(out.weights[..2], [0.0, 0.0]);
        assert_eq!(out.stats[4].status, Status::Solvent);
        against_oracle(&b, &device);
    }
}

// ---- devices ----------------------------------------------------------------------------------------------------------

#[test]
fn every_device_agrees_with_the_reference_on_orders_and_values() {
    let reference = open("reference").unwrap();
    for (seed, count, bars, assets) in [(920, 5, 130, 6), (921, 140, 3, 1), (922, 2, 129, 45)] {
        // a band beyond what rounding reaches: orders must be the same
        let b = Books { rebalance: BAND, ..Books::random(seed, count, bars, assets, BAND) };
        let doubtful: u64 = (0..count).map(|p| plain(&b, p, 0.0).doubtful).sum();
        let want = b.run(&reference);
        for device in open_all(&DEVICES[1..]) {
            let got = b.run(&device);
            let label = format!("{} on {}", seed, device.info().kind.name());
            for (g, w) in got.stats.iter().zip(&want.stats).chain(got.assets.iter().zip(&want.assets)) {
                assert!(g.trades.abs_diff(w.trades) <= doubtful, "{label}: {g:?} {w:?}");
                if doubtful == 0 {
                    near(&label, g.total_return, w.total_return, 1e-5);
                    near(&label, g.max_drawdown, w.max_drawdown, 1e-5);
                    near(&label, g.turnover, w.turnover, 1e-5);
                    near(&label, g.sharpe, w.sharpe, 2e-4);
                    assert_eq!(g.status, w.status, "{label}");
                }
            }
        }
    }
}

#[test]
fn assets_alone_are_scored_as_the_sweep_does() {
    for device in open_all(&DEVICES) {
        let b = Books::random(930, 3, 150, 4, Rebalance::default());
        let out = b.run(&device);
        let n = b.assets;
        for (p, c, i) in (0..3).flat_map(|p| (0..2).flat_map(move |c| (0..n).map(move |i| (p, c, i)))) {
            let (mut before, mut turnover, mut trades, mut last, mut net) = (0.0, 0.0, 0, f64::NAN, Vec::new());
            for j in 0..150 {
                let price = |j: usize| f64::from(b.close[j * n + i]);
                if !price(j).is_nan() {
                    last = price(j);
                }
                let w = if j == 0 { 0.0 } else { f64::from(b.positions[(p * 150 + j - 1) * n + i]) };
                let r = if price(j + 1).is_nan() || last.is_nan() { 0.0 } else { price(j + 1) / last - 1.0 };
                let traded: f64 = f64::abs(w - before);
                net.push(w * r - b.cost_bps[c] * 1e-4 * traded);
                (before, turnover, trades) = (w, turnover + traded, trades + u64::from(traded > 0.0));
            }
            let (got, label) = (&out.assets[(p * 2 + c) * n + i], format!("{}: book {p}, cost {c}, asset {i}", device.info().kind.name()));
            assert_eq!(got.trades, trades, "{label}");
            near(&label, got.turnover, turnover, 1e-5);
            near(&label, got.total_return, net.iter().map(|r| 1.0 + r).product::<f64>() - 1.0, 1e-5);
            near(&label, got.max_drawdown, drawdown(&net), 1e-5);
            near(&label, got.sharpe, sharpe(&net), 2e-4);
        }
    }
}

#[test]
fn slabs_limits_and_schedules_change_no_bit() {
    for spec in DEVICES {
        let Some(device) = open(spec) else { continue };
        for (bars, assets, bytes) in [(150, 3, 2 << 10), (97, 130, 32 << 10)] {
            let b = Books::random(940, 5, bars, assets, EDGE);
            let want = numbers(&b.run(&device));
            for slab in [1, 7, 64, 100] {
                let slab = if device.info().kind == DeviceKind::CudaHost { slab.max(32) } else { slab };
                assert_bits(&format!("{spec}, {slab} bars a slab"), &numbers(&b.run_with(&device, Some(slab)).unwrap()), &want);
            }
            for options in variants(spec) {
                assert_bits(&format!("{spec} {options:?}"), &numbers(&b.run(&open_with(spec, &options).unwrap())), &want);
            }
            let caps = OpenOptions { binding_bytes: Some(bytes), groups_per_dimension: Some(3), ..OpenOptions::default() };
            let small = b.run(&open_with(spec, &caps).unwrap());
            assert!(small.launches > 3, "{spec}: nothing was split");
            assert_bits(&format!("{spec} under {caps:?}"), &numbers(&small), &want);
        }
    }
}

#[test]
fn streamed_positions_give_the_same_bits() {
    let device = open("cpu").unwrap();
    let b = Books::random(950, 4, 90, 5, BAND);
    for (execution, start) in [(Execution::NextClose, 0), (Execution::SameClose, 0), (Execution::NextClose, 4)] {
        let b = Books { execution, start, ..b.clone() };
        let want = numbers(&b.run(&device));
        let fill = |books: std::ops::Range<usize>, rows: std::ops::Range<usize>, out: &mut [f32]| {
            for (book, out) in books.zip(out.chunks_exact_mut(rows.len() * 5)) {
                out.copy_from_slice(&b.positions[(book * 90 + rows.start) * 5..(book * 90 + rows.end) * 5]);
            }
            Ok(())
        };
        let returns = AssetReturns::of_closes(&b.close, 5).unwrap();
        let streamed = Portfolio {
            rebalance: BAND,
            cost_bps: &b.cost_bps,
            execution,
            start,
            assets: true,
            net: true,
            weights: true,
            slab: Some(13),
            ..Portfolio::new(&returns, 4, Positions::Streamed(&fill))
        };
        assert_bits("streamed", &numbers(&streamed.run(&device).unwrap()), &want);
    }
}

// ---- what must hold ---------------------------------------------------------------------------------------------------

#[test]
fn assets_in_another_order_change_rounding_alone() {
    // Assets meet only in sums: over a book's gross return, turnover and orders. Another order of the terms rounds the sums differently
    // and nothing else; orders are whole numbers and stay.
    for device in open_all(&DEVICES) {
        let b = Books::random(960, 2, 80, 37, BAND);
        let order: Vec<usize> = (0..37).map(|i| (i * 11 + 5) % 37).collect();
        let permuted = |x: &[f32]| x.chunks_exact(37).flat_map(|row| order.iter().map(|&i| row[i])).collect::<Vec<f32>>();
        let other = Books { close: permuted(&b.close), positions: permuted(&b.positions), ..b.clone() };
        let (x, y) = (b.run(&device), other.run(&device));
        assert!((0..2).all(|p| plain(&b, p, 0.0).doubtful == 0), "choose another seed");
        for (x, y) in x.stats.iter().zip(&y.stats) {
            assert_eq!((x.trades, x.status), (y.trades, y.status));
            near("return", x.total_return, y.total_return, 1e-5);
            near("turnover", x.turnover, y.turnover, 1e-5);
        }
        for (k, &i) in order.iter().enumerate() {
            near("weight", y.weights[k], x.weights[i], 1e-6);
        }
    }
}

#[test]
fn costs_take_and_never_give() {
    for device in open_all(&DEVICES) {
        let b = Books { cost_bps: vec![0.0, 1.0, 5.0, 20.0, 100.0], ..Books::random(970, 6, 120, 9, Rebalance::default()) };
        let out = b.run(&device);
        for book in out.stats.chunks_exact(5) {
            assert!(book.windows(2).all(|s| s[1].total_return < s[0].total_return && s[1].turnover == s[0].turnover && s[1].trades == s[0].trades));
        }
        let bars = b.bars();
        for book in out.net.chunks_exact(5 * bars) {
            assert!((0..4).all(|c| (0..bars).all(|j| book[(c + 1) * bars + j] <= book[c * bars + j])));
        }
    }
}

#[test]
fn a_wider_band_trades_less_and_cash_earns_nothing() {
    for device in open_all(&DEVICES) {
        let b = Books::random(980, 2, 200, 12, Rebalance::default());
        let orders = |band: f64| Books { rebalance: Rebalance { band, ..Rebalance::default() }, ..b.clone() }.run(&device).stats[0].trades;
        let counts: Vec<u64> = [0.0, 0.001, 0.01, 0.05, 2.0].into_iter().map(orders).collect();
        assert!(counts.windows(2).all(|c| c[1] < c[0]) && counts[4] == 0, "{counts:?}");
        // however small: a target inside the band is never taken up
        let dust = Books { positions: vec![1e-10; b.positions.len()], rebalance: BAND, ..b.clone() }.run(&device);
        assert!(dust.stats[0].sharpe.is_nan() && dust.stats[0].trades == 0 && dust.weights.iter().all(|&w| w == 0.0), "{:?}", dust.stats[0]);
        let flat = Books { positions: vec![0.0; b.positions.len()], ..b }.run(&device);
        let s = flat.stats[0];
        assert!(s.sharpe.is_nan() && (s.total_return, s.max_drawdown, s.turnover, s.trades) == (0.0, 0.0, 0.0, 0), "{s:?}");
    }
}

#[test]
fn wrong_books_are_named() {
    let device = open("cpu").unwrap();
    let fine = Books::random(990, 2, 20, 3, BAND);
    let refused = |change: &dyn Fn(&mut Books)| {
        let mut b = fine.clone();
        change(&mut b);
        error(b.run_with(&device, None)).to_string()
    };
    for (got, want) in [
        (refused(&|b| b.positions[20 * 3 + 7] = f32::NAN), "positions[1, 2, 1] = NaN"),
        (refused(&|b| b.positions.truncate(5)), "[P,T,N] = [2, 20, 3], got 5 values"),
        (refused(&|b| b.close[4] = -1.0), "close[1, 1] = -1"),
        (refused(&|b| b.allocation = Some(vec![0.5; 7])), "allocation must be [T,N] = [20, 3]"),
        (refused(&|b| b.allocation = Some(vec![f32::INFINITY; 60])), "allocation[0, 0] = inf"),
        (refused(&|b| b.cost_bps[1] = -3.0), "cost_bps[1] = -3"),
        (refused(&|b| b.cost_bps.clear()), "at least one cost"),
        (refused(&|b| b.rebalance.band = f64::NAN), "band = NaN"),
        (refused(&|b| b.rebalance.every = 0), "every = 0"),
    ] {
        assert!(got.contains(want), "'{want}' is not in: {got}");
    }
    assert!(matches!(error(fine.run_with(&device, Some(0))), Error::Parameter { .. }));
    // one book that no launch can hold
    let tiny = open_with("cpu", &OpenOptions { binding_bytes: Some(64), ..OpenOptions::default() }).unwrap();
    let wide = Books::random(991, 1, 4, 40, BAND);
    assert!(matches!(error(wide.run_with(&tiny, None)), Error::TooLarge { .. }));
    // nothing to earn on
    let late = Books { start: 20, ..fine }.run(&device);
    assert!(late.stats.len() == 4 && late.stats[0].sharpe.is_nan() && late.stats[0].total_return == 0.0 && late.launches == 0);
}
