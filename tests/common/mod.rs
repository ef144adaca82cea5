//! Which devices a test runs on, small deterministic data, and comparisons.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

use forback::kernels::backtest_sweep::{Execution, Outcome, SetStats, Strategy, Sweep};
use forback::kernels::philox::{normals, philox4x32, uniform};
use forback::kernels::{Device, Error, OpenOptions, Schedule};

/// Every device, `reference` first.
pub(crate) const DEVICES: [&str; 5] = ["reference", "cpu", "wgpu", "cuda-host", "cuda"];

/// Opens a device. One that `FORBACK_REQUIRE` lists (`FORBACK_REQUIRE=cpu,wgpu,cuda-host`) must be there; any other that is absent
/// is skipped, and the log says why.
pub(crate) fn open_with(spec: &str, options: &OpenOptions) -> Option<Device> {
    let required = std::env::var("FORBACK_REQUIRE").unwrap_or_default();
    let required = required.split(',').any(|name| name.trim() == spec.split(':').next().unwrap_or(spec)) || ["cpu", "reference"].contains(&spec);
    match Device::open_with(spec, options) {
        Ok(device) => Some(device),
        Err(error) if required => panic!("{spec} is required and cannot be opened: {error}"),
        Err(error @ Error::NoDevice { .. }) => {
            eprintln!("skipped {spec}: {error}");
            None
        }
        Err(error) => panic!("{spec}: {error}"),
    }
}

/// As [`open_with`], without caps.
pub(crate) fn open(spec: &str) -> Option<Device> {
    open_with(spec, &OpenOptions::default())
}

/// The devices among `names` that are there.
pub(crate) fn open_all(names: &[&str]) -> Vec<Device> {
    names.iter().filter_map(|name| open(name)).collect()
}

/// Ways to run the same kernels on `spec` that must give the same bits: with and without the shader compiler's checks, or in three
/// orders of the threads.
pub(crate) fn variants(spec: &str) -> Vec<OpenOptions> {
    let plain = OpenOptions::default();
    match spec {
        "wgpu" => [Some(false), Some(true)].map(|checked| OpenOptions { checked, ..plain.clone() }).to_vec(),
        "cuda-host" => [Schedule::Forward, Schedule::Reverse, Schedule::Random(7)].map(|s| OpenOptions { schedule: Some(s), ..plain.clone() }).to_vec(),
        _ => vec![plain],
    }
}

/// Deterministic numbers for tests.
pub(crate) struct Rng {
    seed: [u32; 2],
    next: u32,
}

impl Rng {
    pub(crate) fn new(seed: u32) -> Rng {
        Rng { seed: [seed, 0x7465_7374], next: 0 }
    }

    fn words(&mut self) -> [u32; 4] {
        self.next += 1;
        philox4x32([self.next, 0, 0, 0], self.seed)
    }

    /// Uniform in (0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        uniform(self.words()[0])
    }

    /// Standard normal.
    pub(crate) fn normal(&mut self) -> f64 {
        normals(self.words())[0]
    }

    /// A whole number in `from..to`.
    pub(crate) fn whole(&mut self, from: u32, to: u32) -> u32 {
        from + (f64::from(to - from) * self.unit()) as u32
    }

    /// `n` returns per period around `mean`.
    pub(crate) fn returns(&mut self, n: usize, mean: f64, deviation: f64) -> Vec<f32> {
        (0..n).map(|_| (mean + deviation * self.normal()) as f32).collect()
    }

    /// A market [T,N] whose prices are rounded to cents and stand still now and then, so that ties of every kind happen.
    pub(crate) fn market(&mut self, bars: usize, assets: usize) -> Vec<f32> {
        let mut close = vec![0.0; bars * assets];
        for a in 0..assets {
            let volatility = 0.005 + 0.03 * self.unit();
            let mut price: f64 = 3.0 + 60.0 * self.unit();
            let mut still = 0;
            for t in 0..bars {
                close[t * assets + a] = ((price * 100.0).round() / 100.0).max(0.01) as f32;
                if still > 0 {
                    still -= 1;
                } else if self.unit() < 0.03 {
                    still = self.whole(2, 20);
                } else {
                    price *= (volatility * self.normal()).exp();
                }
            }
        }
        close
    }
}

/// Equal bits, or both undefined.
#[track_caller]
pub(crate) fn assert_bits(what: &str, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(g.to_bits() == w.to_bits() || (g.is_nan() && w.is_nan()), "{what}[{i}]: got {g:e}, expected the bits of {w:e}");
    }
}

// ---- sweeps -----------------------------------------------------------------------------------------------------------

/// What to sweep, owned.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) strategy: Strategy,
    pub(crate) parameters: Vec<(&'static str, Vec<f32>)>,
    pub(crate) close: Vec<f32>,
    pub(crate) open: Option<Vec<f32>>,
    pub(crate) assets: usize,
    pub(crate) cost_bps: Vec<f64>,
    pub(crate) execution: Execution,
    pub(crate) start: u32,
    pub(crate) windows: Vec<[u32; 4]>,
    pub(crate) pooled: bool,
}

/// Everything that a sweep returns.
pub(crate) struct Swept {
    /// sharpe, total_return, max_drawdown, turnover, trades [cost][set, asset].
    pub(crate) stats: Vec<Vec<SetStats>>,
    /// Train and test Sharpe ratios [cost][set, asset, window].
    pub(crate) scores: Vec<Vec<(f64, f64)>>,
    pub(crate) outcome: Outcome,
}

impl Case {
    /// A sweep of `sets` sets over a market with ties, windows and all, drawn from `rng`.
    pub(crate) fn random(rng: &mut Rng, strategy: Strategy, bars: usize, assets: usize, sets: usize) -> Case {
        let close = rng.market(bars, assets);
        let start = if bars > 40 { rng.whole(0, 20) } else { 0 };
        let execution = if rng.unit() < 0.5 { Execution::SameClose } else { Execution::NextClose };
        let parameters = parameters(rng, strategy, sets);
        let windows = rolling(bars as u32 - 1, start, 40.min(bars as u32 / 3).max(2), 21.min(bars as u32 / 5).max(1));
        Case { strategy, parameters, close, open: None, assets, cost_bps: vec![0.0, 12.5], execution, start, windows, pooled: true }
    }

    /// The same with random sides, stops and sizes, and with opens near the closes before.
    pub(crate) fn with_overlays(mut self, rng: &mut Rng) -> Case {
        let sets = self.sets();
        let mut column = |values: &[f32]| -> Vec<f32> { (0..sets).map(|_| values[rng.whole(0, values.len() as u32 - 1) as usize]).collect() };
        self.parameters.retain(|p| p.0 != "short");
        for (name, values) in [
            ("side", &[1.0, 0.0, -1.0][..]),
            ("stop_loss", &[0.0, 0.01, 0.05]),
            ("take_profit", &[0.0, 0.02, 0.1]),
            ("trailing_stop", &[0.0, 0.015]),
            ("max_holding", &[0.0, 1.0, 4.0, 9.0]),
        ] {
            self.parameters.push((name, column(values)));
        }
        if self.strategy != Strategy::TsMomentum {
            for (name, values) in [("target_vol", &[0.0, 0.1, 0.3][..]), ("vol_window", &[2.0, 5.0, 12.0]), ("max_leverage", &[0.5, 2.0])] {
                self.parameters.push((name, column(values)));
            }
        }
        let before = (0..self.assets).chain(0..self.close.len() - self.assets);
        self.open = Some(before.map(|i| self.close[i] * (1.0 + 0.01 * (rng.unit() as f32 - 0.5))).collect());
        self
    }

    pub(crate) fn sets(&self) -> usize {
        self.parameters[0].1.len()
    }

    pub(crate) fn bars(&self) -> usize {
        self.close.len() / self.assets
    }

    /// The sweep of these sets, for `use_it`.
    pub(crate) fn with_sweep<T>(&self, use_it: impl FnOnce(&Sweep<'_>) -> T) -> T {
        let parameters: Vec<(&str, &[f32])> = self.parameters.iter().map(|(name, values)| (*name, &values[..])).collect();
        use_it(&Sweep {
            close: &self.close,
            open: self.open.as_deref(),
            assets: self.assets,
            strategy: self.strategy,
            parameters: &parameters,
            only: None,
            cost_bps: &self.cost_bps,
            execution: self.execution,
            start: self.start,
            periods_per_year: 252.0,
            windows: &self.windows,
            stitch_ends: None,
            per_asset: true,
            pooled: self.pooled,
            scores: true,
            profile: false,
        })
    }

    pub(crate) fn run(&self, device: &Device) -> forback::Result<Swept> {
        let (sets, n, w, costs) = (self.sets(), self.assets, self.windows.len(), self.cost_bps.len());
        let unseen = SetStats { sharpe: -7.0, total_return: -7.0, max_drawdown: -7.0, turnover: -7.0, trades: 7_777_777 };
        let (mut stats, mut scores) = (vec![vec![unseen; sets * n]; costs], vec![vec![(-7.0, -7.0); sets * n * w]; costs]);
        let outcome = self.with_sweep(|sweep| {
            sweep.run(device, &mut |chunk| {
                for (set, asset) in chunk.sets.clone().flat_map(|s| chunk.assets.clone().map(move |a| (s, a))) {
                    assert_eq!(stats[chunk.cost][set * n + asset].trades, unseen.trades, "set {set} of asset {asset} came twice");
                    stats[chunk.cost][set * n + asset] = chunk.stats(set, asset);
                    for window in 0..w {
                        scores[chunk.cost][(set * n + asset) * w + window] = chunk.scores(set, asset, window);
                    }
                }
                Ok(())
            })
        })?;
        assert!(stats.iter().flatten().all(|s| s.trades != unseen.trades), "a set was never handed out");
        Ok(Swept { stats, scores, outcome })
    }
}

impl Swept {
    /// All results as one list of numbers, for comparisons of bits.
    pub(crate) fn numbers(&self) -> Vec<f64> {
        let stats = self.stats.iter().flatten().flat_map(|s| [s.sharpe, s.total_return, s.max_drawdown, s.turnover, s.trades as f64]);
        let scores = self.scores.iter().flatten().flat_map(|s| [s.0, s.1]);
        let selected = self.outcome.per_asset.iter().chain(&self.outcome.pooled).flat_map(|s| {
            let whole = s.best.iter().map(|&b| f64::from(b)).chain(s.trades.iter().map(|&t| t as f64));
            let real = s.stitched.iter().map(|&x| f64::from(x)).chain(s.turnover.iter().copied());
            whole.chain(real).chain(s.performance.iter().flat_map(|p| p.entries().map(|e| e.1)))
        });
        stats.chain(scores).chain(selected).collect()
    }
}

/// Windows of `train` and `test` bars, one after the other from `start`.
pub(crate) fn rolling(returns: u32, start: u32, train: u32, test: u32) -> Vec<[u32; 4]> {
    let count = returns.saturating_sub(start + train) / test.max(1);
    (0..count.min(12)).map(|i| start + i * test).map(|s| [s, s + train, s + train, s + train + test]).collect()
}

/// `sets` random sets of a strategy, with repetitions.
pub(crate) fn parameters(rng: &mut Rng, strategy: Strategy, sets: usize) -> Vec<(&'static str, Vec<f32>)> {
    let mut whole = |from: u32, to: u32| -> Vec<f32> { (0..sets).map(|_| rng.whole(from, to) as f32).collect() };
    let tenths = |x: Vec<f32>| x.into_iter().map(|v| v / 10.0).collect();
    let halves = |x: Vec<f32>| x.into_iter().map(|v| v / 2.0).collect();
    match strategy {
        Strategy::SmaCross | Strategy::EmaCross => vec![("fast", whole(1, 8)), ("slow", whole(2, 26)), ("short", whole(0, 2))],
        Strategy::Macd => vec![("fast", whole(2, 6)), ("slow", whole(5, 12)), ("signal", whole(2, 5))],
        Strategy::RsiReversion => vec![("period", whole(2, 11)), ("low", whole(20, 46)), ("high", whole(50, 81))],
        Strategy::BollingerReversion => vec![("period", whole(2, 21)), ("width", halves(whole(0, 5)))],
        Strategy::DonchianBreakout => vec![("entry", whole(1, 13)), ("exit", whole(1, 13))],
        Strategy::TsMomentum => {
            vec![("lookback", whole(1, 16)), ("vol_window", whole(2, 13)), ("target_vol", tenths(whole(1, 5))), ("max_leverage", halves(whole(1, 5)))]
        }
    }
}
