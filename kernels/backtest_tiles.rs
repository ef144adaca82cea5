//! The GPU's fast path of `backtest_sweep`: sets without stops, eight a thread (four where they are sized or go short), decided once per
//! tile.
//!
//! The machines are those of `backtest.rs`; so are net returns, blocks, exact sums and statistics, bit for bit where they select. What
//! differs is who does what. A *word* is 32 sets. Where sets form a grid, a word's sets share one side of the comparison and read
//! neighbouring rows (cross) or ascending thresholds of one row (band) on the other; words with the same list follow each other. A
//! workgroup takes 16 words, or 8 of sized sets, 64 bars at a time: first it decides (enter and leave bits of its words in workgroup memory), then
//! each thread earns with the bits of its eight sets: two loads a bar for eight sets. Many sets that form no grid stay with
//! `backtest_sweep`: nothing is shared there.
//!
//! Time is cut into spans, at block boundaries so that no sum changes. Machine states before a span: the bar before (cross), or the
//! composition of the earlier spans' maps {out, in} → {out, in} (band). With G the product of 1 + net over a span, m the least product
//! from its start, l and d the last level and the lowest level of a span entered at its peak, a span entered at level x leaves at
//! min(x·G, l), and its lowest level is min(x·m, d). Momentum needs no earlier state either; sized or shorted bands are not split.
//!
//! Shapes   keys [A,T,rows] or, by row, [A,rows,T], told by two strides; lattice: heads [words,8] (kind: 0 list is side a, 1 side b;
//!          first row or offset of the list, shared row, shared threshold, words from here on with this list and the same first bars,
//!          latest of these, last row of the list, earliest of these), slots
//!          [words·32,2] (set or NONE, first bar), lists, details of sized sets [words·32,4] (side, target, leverage, volatility row); plan = edges [E], scales [A], cuts [spans+1]; states [A,spans,tiles,16,2];
//!          parts [A,spans,12,sets]: sum and sum of squares (64 bits each), trades, growth as mantissa and exponent, level, lowest, G, m,
//!          turnover;
//!          stats [A,set_tiles,5,64] and prefix [A,set_tiles,E,4,64] as in `backtest.rs`.
//! Launch   `backtest_cross`, `backtest_band`, `backtest_sized`: workgroup of 64 threads = (asset, span, tile of sets). WGSL decides a bar a thread,
//!          keys by row so that neighbouring threads read neighbouring words; CUDA decides a set a lane with one vote a bar, keys by bar.
//!          `backtest_band_states` only where there are spans; `backtest_join`: thread = set.
//! Scratch  parts, states; workgroup memory 8.3 KB.
//! Floor    11 instructions a set and bar: two bit tests, select, pay, four sums, drawdown (fused multiply-add, two minima), trades; a
//!          quarter of a load from workgroup memory. Deciding costs 2 (WGSL) or a quarter (CUDA) more.
//! Ladder   llvmpipe, sweep_sma on the machine of `backtest.rs`: one set a thread with three loads a bar 0.22 to 0.29 G pair-bars/s;
//!          tiles 0.62 (4.1 s). What limits (perf): loads of words and returns 28 %, deciding 40 %, arithmetic 15 %. A software adapter would like sixteen sets a thread (loads are loops over lanes there); a GPU would not,
//!          96 of its 128 registers a thread hold sums already.
//! Source   design of the sweep; composition of maps as in Ladner and Fischer 1980.
//! Files    shaders/backtest_tiles.wgsl · cuda/backtest_tiles.cu · reference: the `_cpu` functions

use crate::Result;
use crate::backtest::{BAND, BLOCK, CROSS, LONG, MOMENTUM, OFF, SCALE_BIAS, SHORT, STATS, TILE, sharpe_of};
use crate::conformance::UNDEFINED;
use crate::fixed::to_fixed;
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes, writes_u32};
use crate::real::Real;
use rayon::prelude::*;
use std::collections::HashMap;

params! {
    /// Params of the five kernels.
    pub struct TilesParams {
        /// Assets.
        a: u32,
        /// Bars.
        t: u32,
        /// Rows of the table of keys.
        rows: u32,
        /// Tiles of 512 slots.
        tiles: u32,
        /// Edges of the plan.
        edges: u32,
        /// Spans of bars.
        spans: u32,
        /// Bars between decision and trade.
        lag: u32,
        /// First counted bar.
        start: u32,
        /// Fractional bits of the fixed-point sums.
        shift: u32,
        /// XORed to the entry key of the band machine.
        mask: u32,
        /// One-way cost as a fraction of traded notional …
        cost: f32,
        /// … and what rounding to f32 took away, which only the f64 reference feels.
        cost_low: f32,
        /// Tiles of 64 sets in `stats` and `prefix`.
        set_tiles: u32,
        /// Distance between rows of keys.
        row_stride: u32,
        /// Distance between bars of keys.
        bar_stride: u32,
        /// Words of all tiles.
        words: u32,
        /// Machine of `backtest_sized`: 0 cross, 1 band, 2 momentum.
        mode: u32,
        /// Rows of the volatility table.
        volatility_rows: u32,
        /// Where the details of sized sets begin in the lattice.
        details: u32,
    }
}

/// Threads that simulate a tile.
const WG: u32 = 64;
/// Words of a tile of sets that hold 1 or nothing.
pub(crate) const WORDS: usize = 16;
/// Words of a tile of sized sets.
const SIZED_WORDS: usize = 8;
/// Numbers at a word's head.
const HEAD: usize = 8;
/// Numbers of a set and span.
pub(crate) const PARTS: usize = 12;
/// Slot without a set.
const NONE: u32 = u32::MAX;

fn params(words: &[u32]) -> TilesParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn groups(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.a) * u64::from(p.spans) * u64::from(p.tiles)
}

fn set_bars(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.a) * u64::from(p.words) * 32 * u64::from(p.t.max(1) - 1)
}

/// Keys [A,T,rows] as [A,rows,T].
pub static KEYS_BY_ROW: Kernel = Kernel {
    name: "keys_by_row",
    about: "keys of each row, bar after bar",
    args: &[reads_u32("keys"), writes_u32("by_row")],
    params: layout::<TilesParams>(),
    workgroup: 256,
    constants: &[],
    groups: |words| u64::from(params(words).a) * u64::from(params(words).t.div_ceil(32)) * u64::from(params(words).rows.div_ceil(32)),
    wgsl: wgsl!("backtest_tiles"),
    cuda: cuda!("backtest_tiles"),
    cpu: Some(Cpu { f32: keys_by_row_cpu::<f32>, f64: keys_by_row_cpu::<f64> }),
    cost: Cost { unit: "key", units: |words| u64::from(params(words).a) * u64::from(params(words).t) * u64::from(params(words).rows), bytes: 8.0, flops: 0.0 },
};

/// Where the band machine is after each span, from out and from in.
pub static BACKTEST_BAND_STATES: Kernel = Kernel {
    name: "backtest_band_states",
    about: "where each set is after a span of bars, from either state before",
    args: &[reads_u32("keys"), reads_u32("lattice"), reads_u32("plan"), writes_u32("states")],
    params: layout::<TilesParams>(),
    workgroup: WG,
    constants: &[],
    groups,
    wgsl: wgsl!("backtest_tiles"),
    cuda: cuda!("backtest_tiles"),
    cpu: Some(Cpu { f32: backtest_band_states_cpu::<f32>, f64: backtest_band_states_cpu::<f64> }),
    cost: Cost { unit: "set-bar", units: set_bars, bytes: 0.0, flops: 3.0 },
};

const SIMULATE_ARGS: [crate::kernel::Arg; 7] =
    [reads_u32("keys"), reads_u32("lattice"), reads_u32("plan"), reads("returns"), writes_u32("parts"), writes_u32("prefix"), reads_u32("states")];

/// Simulates every set of every tile over every span: the cross machine.
pub static BACKTEST_CROSS: Kernel = Kernel {
    name: "backtest_cross",
    about: "back-tests of crossing sets, a tile of sets per workgroup",
    args: &SIMULATE_ARGS,
    params: layout::<TilesParams>(),
    workgroup: WG,
    constants: &[],
    groups,
    wgsl: wgsl!("backtest_tiles"),
    cuda: cuda!("backtest_tiles"),
    cpu: Some(Cpu { f32: simulate_cpu::<f32, CROSS>, f64: simulate_cpu::<f64, CROSS> }),
    cost: Cost { unit: "set-bar", units: set_bars, bytes: 0.0, flops: 13.0 },
};

/// Simulates every set of every tile over every span: the band machine.
pub static BACKTEST_BAND: Kernel = Kernel {
    name: "backtest_band",
    about: "back-tests of sets with entry and exit thresholds, a tile of sets per workgroup",
    args: &SIMULATE_ARGS,
    params: layout::<TilesParams>(),
    workgroup: WG,
    constants: &[],
    groups,
    wgsl: wgsl!("backtest_tiles"),
    cuda: cuda!("backtest_tiles"),
    cpu: Some(Cpu { f32: simulate_cpu::<f32, BAND>, f64: simulate_cpu::<f64, BAND> }),
    cost: Cost { unit: "set-bar", units: set_bars, bytes: 0.0, flops: 13.0 },
};

/// Simulates every set of every tile over every span: any machine, sides and sizes.
pub static BACKTEST_SIZED: Kernel = Kernel {
    name: "backtest_sized",
    about: "back-tests of sets that go short or are sized, a tile of sets per workgroup",
    args: &[
        reads_u32("keys"),
        reads_u32("lattice"),
        reads_u32("plan"),
        reads("returns"),
        writes_u32("parts"),
        writes_u32("prefix"),
        reads("close"),
        reads("inverse_volatility"),
    ],
    params: layout::<TilesParams>(),
    workgroup: WG,
    constants: &[],
    groups,
    wgsl: wgsl!("backtest_tiles"),
    cuda: cuda!("backtest_tiles"),
    cpu: Some(Cpu { f32: sized_cpu::<f32>, f64: sized_cpu::<f64> }),
    cost: Cost { unit: "set-bar", units: set_bars, bytes: 0.0, flops: 20.0 },
};

/// Statistics of every set from its spans, and prefixes from the series' start.
pub static BACKTEST_JOIN: Kernel = Kernel {
    name: "backtest_join",
    about: "statistics of each set from its spans",
    args: &[reads_u32("parts"), reads_u32("plan"), writes("stats"), writes_u32("prefix")],
    params: layout::<TilesParams>(),
    workgroup: TILE as u32,
    constants: &[],
    groups: |words| u64::from(params(words).a) * u64::from(params(words).set_tiles),
    wgsl: wgsl!("backtest_tiles"),
    cuda: cuda!("backtest_tiles"),
    cpu: Some(Cpu { f32: backtest_join_cpu::<f32>, f64: backtest_join_cpu::<f64> }),
    cost: Cost {
        unit: "set-span",
        units: |words| u64::from(params(words).a) * u64::from(params(words).set_tiles) * TILE as u64 * u64::from(params(words).spans),
        bytes: 44.0,
        flops: 30.0,
    },
};

// ---- words --------------------------------------------------------------------------------------------------------

/// One set as the machines see it: row and threshold of both sides, first legal bar.
#[derive(Clone, Copy)]
pub(crate) struct Sides {
    pub(crate) a: (u32, u32),
    pub(crate) b: (u32, u32),
    pub(crate) first: u32,
}

/// Sets put into words.
pub(crate) struct Lattice {
    /// As the kernels read it.
    pub(crate) data: Vec<u32>,
    pub(crate) tiles: usize,
    pub(crate) words: usize,
    /// Where details begin.
    pub(crate) details: usize,
}

/// Side, target, leverage and volatility row of a sized set.
pub(crate) type Detail = [u32; 4];

/// A word before it is written down: the list side, its list, the shared side, its sets.
struct Word {
    list: Vec<(u32, u32)>,
    shared: (u32, u32),
    sets: Vec<u32>,
}

impl Lattice {
    /// Puts sets into words with the list on the side that needs fewer words. None where many sets would leave most slots empty.
    /// `details`, one a set, if sets are sized or go short.
    pub(crate) fn of(mode: u32, sets: &[Sides], details: Option<&[Detail]>) -> Option<Lattice> {
        let sides = [words_of(mode, sets, |s| (s.a, s.b)), words_of(mode, sets, |s| (s.b, s.a))];
        let kind = usize::from(sides[1].len() < sides[0].len() && mode != MOMENTUM);
        let [a, b] = sides;
        let words = if kind == 0 { a } else { b };
        let few = words.len() <= (3 * sets.len().div_ceil(32)).max(4 * WORDS);
        few.then(|| Lattice::write(mode, kind as u32, sets, words, details))
    }

    fn write(mode: u32, kind: u32, sets: &[Sides], mut words: Vec<Word>, details: Option<&[Detail]>) -> Lattice {
        // Words with the same list follow each other.
        words.sort_unstable_by(|x, y| (&x.list, x.shared, &x.sets).cmp(&(&y.list, y.shared, &y.sets)));
        let tile_words = if details.is_some() { SIZED_WORDS } else { WORDS };
        let tiles = words.len().div_ceil(tile_words).max(1);
        let all = tiles * tile_words;
        let mut data = vec![0; all * HEAD];
        data.extend([NONE, u32::MAX].repeat(all * 32));
        let mut lists: HashMap<&[(u32, u32)], u32> = HashMap::new();
        for (w, word) in words.iter().enumerate() {
            let last = word.list.last().map_or(0, |x| x.0);
            let list = if mode == BAND {
                *lists.entry(&word.list).or_insert_with(|| {
                    let at = data.len() as u32;
                    data.extend(word.list.iter().map(|x| x.1).chain(std::iter::repeat(u32::MAX)).take(32));
                    at
                })
            } else {
                word.list.first().map_or(0, |x| x.0)
            };
            data[w * HEAD..][..HEAD].copy_from_slice(&[kind, list, word.shared.0, word.shared.1, 1, 0, last, 0]);
            let slots = all * HEAD + w * 64;
            for (slot, &id) in data[slots..slots + 64].chunks_exact_mut(2).zip(&word.sets) {
                slot.copy_from_slice(&[id, sets[id as usize].first]);
            }
        }
        let at = data.len();
        if let Some(details) = details {
            data.extend([LONG, 0, 0, OFF].repeat(all * 32));
            for (w, word) in words.iter().enumerate() {
                for (detail, &id) in data[at + w * 128..].chunks_exact_mut(4).zip(&word.sets) {
                    detail.copy_from_slice(&details[id as usize]);
                }
            }
        }
        for w in words.len()..all {
            // words without sets repeat the one before
            data.copy_within((w - 1) * HEAD..w * HEAD, w * HEAD);
        }
        let firsts = |w: usize| (0..32).map(move |lane| all * HEAD + (w * 32 + lane) * 2 + 1);
        for w in (0..all).rev() {
            let same = |i: usize| data[w * HEAD + i] == data[(w + 1) * HEAD + i];
            let goes_on = (w + 1) % tile_words > 0 && [0, 1, 6].into_iter().all(same) && firsts(w).zip(firsts(w + 1)).all(|(x, y)| data[x] == data[y]);
            data[w * HEAD + 4] = if goes_on { data[(w + 1) * HEAD + 4] + 1 } else { 1 };
            let of_sets = firsts(w).filter(|&at| data[at - 1] != NONE).map(|at| data[at]);
            let (earliest, latest) = of_sets.fold((u32::MAX, 0), |(low, high), first| (low.min(first), high.max(first)));
            (data[w * HEAD + 5], data[w * HEAD + 7]) = (latest, earliest);
        }
        Lattice { data, tiles, words: all, details: at }
    }
}

/// The shared side, the list's side, and the set.
type Split = ((u32, u32), (u32, u32), u32);

/// Words with lists on the side that `split` gives first: neighbouring rows where sets cross, one row's thresholds else.
fn words_of(mode: u32, sets: &[Sides], split: impl Fn(&Sides) -> ((u32, u32), (u32, u32)) + Sync) -> Vec<Word> {
    let mut order: Vec<Split> = sets.iter().enumerate().map(|(i, s)| (split(s).1, split(s).0, i as u32)).collect();
    order.par_sort_unstable();
    let mut words = Vec::new();
    for shared in order.chunk_by(|x, y| x.0 == y.0) {
        // Lists of neighbouring rows hold each row once: sets with equal sides go into layers.
        let mut layers: Vec<Vec<&Split>> = Vec::new();
        for equal in shared.chunk_by(|x, y| x.1 == y.1) {
            for (i, set) in equal.iter().enumerate() {
                match layers.get_mut(if mode == CROSS { i } else { 0 }) {
                    Some(sets) => sets.push(set),
                    None => layers.push(vec![set]),
                }
            }
        }
        let follows = |x: &Split, y: &Split| if mode == CROSS { y.1.0 == x.1.0 + 1 } else { y.1.0 == x.1.0 };
        for layer in layers {
            for run in layer.chunk_by(|x, y| follows(x, y)) {
                for some in run.chunks(32) {
                    words.push(Word { list: some.iter().map(|x| x.1).collect(), shared: shared[0].0, sets: some.iter().map(|x| x.2).collect() });
                }
            }
        }
    }
    words
}

/// Bars where spans begin and end: about every `length` bars, at the ends of blocks.
pub(crate) fn cuts(edges: &[u32], bars: u32, length: u32) -> Vec<u32> {
    let mut cuts = vec![0];
    let mut from = 0;
    let mut edges = edges.iter().copied().filter(|&e| e > 0).peekable();
    while from < bars {
        while edges.peek().is_some_and(|&e| e <= from) {
            edges.next();
        }
        from = (from + BLOCK as u32).min(bars).min(edges.peek().copied().unwrap_or(bars));
        if from == bars || from - cuts[cuts.len() - 1] >= length {
            cuts.push(from);
        }
    }
    if cuts.len() == 1 {
        cuts.push(0);
    }
    cuts
}

// ---- the CPU column ---------------------------------------------------------------------------------------------

fn keys_by_row_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: TilesParams = launch.params()?;
    let (t, rows) = (p.t as usize, p.rows as usize);
    let (keys, by_row) = (launch.word()?, launch.word_mut()?);
    by_row.par_chunks_exact_mut(t).enumerate().take(p.a as usize * rows).for_each(|(i, out)| {
        let asset = &keys[i / rows * t * rows..][..t * rows];
        for (out, bar) in out.iter_mut().zip(asset.chunks_exact(rows)) {
            *out = bar[i % rows];
        }
    });
    Ok(())
}

/// What the simulating kernels read.
struct Tile<'a> {
    p: TilesParams,
    keys: &'a [u32],
    lattice: &'a [u32],
    plan: &'a [u32],
}

impl Tile<'_> {
    fn cut(&self, span: usize) -> usize {
        self.plan[(self.p.edges + self.p.a) as usize + span] as usize
    }

    /// Set of a slot and its sides.
    fn slot<const MODE: u32>(&self, slot: usize) -> (u32, Sides) {
        let (word, lane) = (slot / 32, slot % 32);
        let head = &self.lattice[word * HEAD..][..HEAD];
        let at = self.p.words as usize * HEAD + slot * 2;
        let own = match MODE {
            CROSS => ((head[1] + lane as u32).min(head[6]), 0),
            BAND => (head[6], self.lattice[head[1] as usize + lane]),
            _ => (0, 0),
        };
        let (a, b) = if head[0] == 0 { (own, (head[2], head[3])) } else { ((head[2], head[3]), own) };
        (self.lattice[at], Sides { a, b, first: self.lattice[at + 1] })
    }

    /// Whether the machine is in after bar t.
    fn follow<const MODE: u32>(&self, a: usize, s: &Sides, t: usize, inside: bool) -> bool {
        let p = &self.p;
        let asset = a * (p.t * p.rows) as usize;
        let key = |row: u32| self.keys[asset + (row * p.row_stride) as usize + t * p.bar_stride as usize];
        let legal = t >= s.first as usize;
        match (MODE, inside) {
            (CROSS, _) => legal && key(s.a.0) > key(s.b.0),
            (_, false) => legal && (key(s.a.0) ^ p.mask) > s.a.1,
            (_, true) => key(s.b.0) <= s.b.1,
        }
    }
}

fn backtest_band_states_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let tile = Tile { p: launch.params()?, keys: launch.word()?, lattice: launch.word()?, plan: launch.word()? };
    let p = tile.p;
    let (spans, tiles, lag) = (p.spans as usize, p.tiles as usize, p.lag as usize);
    launch.word_mut()?.par_chunks_exact_mut(2 * WORDS).enumerate().take(p.a as usize * spans * tiles).for_each(|(group, states)| {
        let (a, span) = (group / (spans * tiles), group / tiles % spans);
        for (i, out) in states.iter_mut().enumerate() {
            *out = (0..32).fold(0, |word, lane| {
                let (_, sides) = tile.slot::<BAND>((group % tiles * WORDS + i / 2) * 32 + lane);
                let from = tile.cut(span).max(lag);
                let inside = (from..tile.cut(span + 1)).fold(i % 2 == 1, |inside, j| tile.follow::<BAND>(a, &sides, j - lag, inside));
                word | u32::from(inside) << lane
            });
        }
    });
    Ok(())
}

/// What a set's span leaves.
struct Span<R> {
    sums: i64,
    squares: u64,
    trades: u32,
    mantissa: f64,
    exponent: i32,
    level: R,
    lowest: R,
    path: R,
    least: R,
    turnover: R,
}

impl<R: Real> Span<R> {
    /// As words: reals rounded to f32.
    fn words(&self) -> [u32; PARTS] {
        let (sums, real) = (self.sums as u64, |x: R| x.f32().to_bits());
        let growth = (self.mantissa as f32).to_bits();
        let [level, lowest, path, least, turnover] = [self.level, self.lowest, self.path, self.least, self.turnover].map(real);
        let (low, high) = (|x: u64| x as u32, |x: u64| (x >> 32) as u32);
        [low(sums), high(sums), low(self.squares), high(self.squares), self.trades, growth, self.exponent as u32, level, lowest, path, least, turnover]
    }
}

/// A product as a mantissa in [1/2, 1) and a power of two.
fn normalised(x: f64) -> (f64, i32) {
    if x == 0.0 || !x.is_finite() {
        return (x, 0);
    }
    let power = x.abs().log2().floor() as i32 + 1;
    (x * 2f64.powi(-power), power)
}

/// Where a set's machine is, from bar to bar.
struct Machine<'a, const MODE: u32> {
    tile: &'a Tile<'a>,
    a: usize,
    sides: Sides,
    inside: bool,
}

impl<const MODE: u32> Machine<'_, MODE> {
    /// Whether the set is in over bar j.
    fn bar(&mut self, j: usize) -> bool {
        if j >= self.tile.p.lag as usize {
            self.inside = self.tile.follow::<MODE>(self.a, &self.sides, j - self.tile.p.lag as usize, self.inside);
        }
        self.inside && j >= self.tile.p.start as usize
    }
}

fn simulate_cpu<R: Real, const MODE: u32>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let tile = Tile { p: launch.params()?, keys: launch.word()?, lattice: launch.word()?, plan: launch.word()? };
    let returns = launch.real()?;
    let (parts, prefix) = (launch.word_mut()?, launch.word_mut()?);
    for a in 0..tile.p.a as usize {
        for slot in 0..tile.p.words as usize * 32 {
            let (set, sides) = tile.slot::<MODE>(slot);
            let mut machine = Machine::<MODE> { tile: &tile, a, sides, inside: false };
            simulate_set(&tile, returns, a, set, &mut |j| if machine.bar(j) { R::ONE } else { R::ZERO }, parts, prefix);
        }
    }
    Ok(())
}

fn sized_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let tile = Tile { p: launch.params()?, keys: launch.word()?, lattice: launch.word()?, plan: launch.word()? };
    let returns = launch.real()?;
    let (parts, prefix) = (launch.word_mut()?, launch.word_mut()?);
    let (close, inverse_volatility) = (launch.real()?, launch.real()?);
    let p = tile.p;
    let (t, lag, rows) = (p.t as usize, p.lag as usize, p.volatility_rows as usize);
    for a in 0..p.a as usize {
        for slot in 0..p.words as usize * 32 {
            let detail = &tile.lattice[p.details as usize + slot * 4..][..4];
            let real = |i: usize| R::of(f64::from(f32::from_bits(detail[i])));
            let (set, sides) = match p.mode {
                CROSS => tile.slot::<CROSS>(slot),
                BAND => tile.slot::<BAND>(slot),
                _ => tile.slot::<MOMENTUM>(slot),
            };
            let (first, lookback) = (sides.first as usize, sides.b.0 as usize);
            let mut direction = 0i32;
            let weight = &mut |j: usize| {
                if j < lag {
                    return R::ZERO;
                }
                let now = j - lag;
                let legal = now >= first;
                // 1 up, −1 down, 0 neither yet
                direction = match p.mode {
                    _ if !legal => 0,
                    CROSS => 2 * i32::from(tile.follow::<CROSS>(a, &sides, now, false)) - 1,
                    BAND if direction == 1 => 2 * i32::from(tile.follow::<BAND>(a, &sides, now, true)) - 1,
                    BAND if tile.follow::<BAND>(a, &sides, now, false) => 1,
                    BAND if !tile.follow::<BAND>(a, &sides, now, true) => -1,
                    BAND => direction,
                    _ => {
                        let (price, then) = (close[a * t + now], close[a * t + now - lookback]);
                        i32::from(price > then) - i32::from(price < then)
                    }
                };
                let held = match (direction, detail[0]) {
                    (1, SHORT) | (-1, LONG) => 0,
                    (held, _) => held,
                };
                if j < p.start as usize || held == 0 {
                    return R::ZERO;
                }
                let calm = if detail[3] == OFF { R::ONE } else { (real(1) * inverse_volatility[(a * t + now) * rows + detail[3] as usize]).min(real(2)) };
                R::of(f64::from(held)) * calm
            };
            simulate_set(&tile, returns, a, set, weight, parts, prefix);
        }
    }
    Ok(())
}

/// One set over all spans, with the weight over each bar.
fn simulate_set<R: Real>(tile: &Tile<'_>, returns: &[R], a: usize, set: u32, weight: &mut dyn FnMut(usize) -> R, parts: &mut [u32], prefix: &mut [u32]) {
    if set == NONE {
        return;
    }
    let p = &tile.p;
    let (bars, sets, edges, set) = (p.t as usize - 1, p.set_tiles as usize * TILE, p.edges as usize, set as usize);
    let mut held = R::ZERO;
    for span in 0..p.spans as usize {
        let put = &mut |edge: usize, x: &Span<R>| {
            let at = ((a * p.set_tiles as usize + set / TILE) * edges + edge) * 4 * TILE + set % TILE;
            for (k, word) in x.words()[..4].iter().enumerate() {
                prefix[at + k * TILE] = *word;
            }
        };
        let x = simulate_span(tile, &returns[a * bars..(a + 1) * bars], a, span, &mut held, weight, put);
        let at = (a * p.spans as usize + span) * PARTS * sets + set;
        for (k, word) in x.words().into_iter().enumerate() {
            parts[at + k * sets] = word;
        }
    }
}

/// One set over one span; `held` is the weight before and after it.
fn simulate_span<R: Real>(
    tile: &Tile<'_>,
    returns: &[R],
    a: usize,
    span: usize,
    held: &mut R,
    weight: &mut dyn FnMut(usize) -> R,
    put: &mut dyn FnMut(usize, &Span<R>),
) -> Span<R> {
    let p = &tile.p;
    let (from, to, edges) = (tile.cut(span), tile.cut(span + 1), &tile.plan[..p.edges as usize]);
    let (shift, scale) = (p.shift as i32, tile.plan[p.edges as usize + a] as i32 - SCALE_BIAS);
    let cost = R::of(f64::from(p.cost)) + R::of(f64::from(p.cost_low));
    let one = R::ONE;
    let zero = R::ZERO;
    let mut x = Span { sums: 0, squares: 0, trades: 0, mantissa: 1.0, exponent: 0, level: one, lowest: one, path: one, least: one, turnover: zero };
    let (mut sum, mut square, mut growth, mut turnover) = (zero, zero, one, zero);
    let smaller = |x: R, y: R| if y < x { y } else { x };
    let mut begun = from;
    for j in from..=to {
        let edge = edges.binary_search(&(j as u32)).ok();
        if j > from && (j == to || j == begun + BLOCK || edge.is_some()) {
            x.sums += to_fixed(sum.f64(), shift - scale);
            x.squares += to_fixed(square.f64(), shift - 2 * scale) as u64;
            let (mantissa, power) = normalised(x.mantissa * growth.f64());
            (x.mantissa, x.exponent) = (mantissa, x.exponent + power);
            x.turnover += turnover;
            (sum, square, growth, turnover, begun) = (zero, zero, one, zero, j);
        }
        if let Some(edge) = edge.filter(|_| j > from || from == 0) {
            put(edge, &x);
        }
        if j == to {
            break;
        }
        let now = weight(j);
        let traded = (now - *held).abs();
        *held = now;
        let net = now.mul_add(returns[j], -(cost * traded));
        x.trades += u32::from(traded > zero);
        turnover += traded;
        sum += net;
        square = net.mul_add(net, square);
        growth = growth.mul_add(net, growth);
        x.level = smaller(x.level.mul_add(net, x.level), one);
        x.lowest = smaller(x.lowest, x.level);
        x.path = x.path.mul_add(net, x.path);
        x.least = smaller(x.least, x.path);
    }
    x
}

fn backtest_join_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: TilesParams = launch.params()?;
    let (parts, plan) = (launch.word()?, launch.word()?);
    let (stats, prefix) = (launch.real_mut()?, launch.word_mut()?);
    let (sets, spans) = (p.set_tiles as usize * TILE, p.spans as usize);
    let (edges, cuts) = (&plan[..p.edges as usize], &plan[(p.edges + p.a) as usize..]);
    let pair = |x: &[u32], at: usize, stride: usize| u64::from(x[at]) | u64::from(x[at + stride]) << 32;
    for (i, stats) in stats.chunks_exact_mut(STATS * TILE).enumerate().take((p.a * p.set_tiles) as usize) {
        for lane in 0..TILE {
            let (a, set) = (i / p.set_tiles as usize, i % p.set_tiles as usize * TILE + lane);
            let (mut sums, mut squares, mut trades, mut growth, mut exponent) = (0i64, 0u64, 0u32, 1f64, 0i32);
            let (mut level, mut lowest, mut turnover) = (1f64, 1f64, 0f64);
            for span in 0..spans {
                let inside = |e: &(usize, &u32)| *e.1 > cuts[span] && *e.1 <= cuts[span + 1];
                for (edge, _) in edges.iter().enumerate().filter(inside).filter(|_| span > 0) {
                    let at = (i * edges.len() + edge) * 4 * TILE + lane;
                    for (at, base) in [(at, sums as u64), (at + 2 * TILE, squares)] {
                        let x = pair(prefix, at, TILE).wrapping_add(base);
                        (prefix[at], prefix[at + TILE]) = (x as u32, (x >> 32) as u32);
                    }
                }
                let at = (a * spans + span) * PARTS * sets + set;
                let real = |k: usize| f64::from(f32::from_bits(parts[at + k * sets]));
                sums = sums.wrapping_add(pair(parts, at, sets) as i64);
                squares = squares.wrapping_add(pair(parts, at + 2 * sets, sets));
                trades += parts[at + 4 * sets];
                turnover += real(11);
                let (mantissa, power) = normalised(growth * real(5));
                (growth, exponent) = (mantissa, exponent + power + parts[at + 6 * sets] as i32);
                lowest = lowest.min(real(8)).min(level * real(10));
                level = real(7).min(level * real(9));
            }
            let counted = u64::from(p.t - 1).saturating_sub(u64::from(p.start));
            let sharpe = sharpe_of(counted, sums, squares, p.shift);
            let values = [if sharpe <= UNDEFINED { UNDEFINED } else { sharpe }, growth * 2f64.powi(exponent) - 1.0, 1.0 - lowest, turnover, f64::from(trades)];
            for (k, value) in values.into_iter().enumerate() {
                stats[k * TILE + lane] = R::of(value);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sides(a: (u32, u32), b: (u32, u32)) -> Sides {
        Sides { a, b, first: a.0 + b.0 }
    }

    /// Every set is in exactly one slot, with its own sides.
    fn check(mode: u32, sets: &[Sides]) -> usize {
        let Some(lattice) = Lattice::of(mode, sets, None) else { return 0 };
        let p = TilesParams { words: lattice.words as u32, ..bytemuck::Zeroable::zeroed() };
        let tile = Tile { p, keys: &[], lattice: &lattice.data, plan: &[] };
        let mut seen = vec![0; sets.len()];
        for slot in 0..lattice.words * 32 {
            let (set, got) = if mode == CROSS { tile.slot::<CROSS>(slot) } else { tile.slot::<BAND>(slot) };
            if set != NONE {
                let want = &sets[set as usize];
                assert_eq!((got.a, got.b, got.first), (want.a, want.b, want.first), "set {set}");
                seen[set as usize] += 1;
            }
        }
        assert!(seen.iter().all(|&n| n == 1), "{seen:?}");
        lattice.tiles
    }

    #[test]
    fn sets_of_any_shape_are_in_words_once() {
        let grid = |fast: u32, slow: u32| -> Vec<Sides> { (0..slow).flat_map(|s| (0..fast).map(move |f| sides((f, 0), (fast + s, 0)))).collect() };
        for (fast, slow) in [(1, 1), (3, 70), (70, 3), (33, 32), (100, 40)] {
            let sets = grid(fast, slow);
            let twice: Vec<Sides> = sets.iter().chain(&sets).copied().collect();
            let tiles = check(CROSS, &sets);
            assert!(tiles > 0 && tiles <= (fast * slow) as usize / 512 + 1 + (fast.min(slow) as usize * fast.max(slow).div_ceil(32) as usize) / 16);
            assert!(check(CROSS, &twice) > 0);
        }
        let scattered = |n: u32| -> Vec<Sides> { (0..n).map(|i| sides((i * 7919 % 97, 0), (100 + i * 104_729 % 89, 0))).collect() };
        assert!(check(CROSS, &scattered(30)) > 0);
        assert!(Lattice::of(CROSS, &scattered(2000), None).is_none());
        let band: Vec<Sides> = (0..5u32).flat_map(|row| (0..20).flat_map(move |low| (0..3).map(move |high| sides((row, !low), (row, 50 + high))))).collect();
        assert_eq!(check(BAND, &band), 1);
    }

    #[test]
    fn cuts_end_blocks() {
        assert_eq!(cuts(&[], 0, 512), [0, 0]);
        assert_eq!(cuts(&[], 700, 256), [0, 256, 512, 700]);
        assert_eq!(cuts(&[0, 100, 130], 700, 256), [0, 258, 514, 700]);
        assert_eq!(cuts(&[], 2519, u32::MAX), [0, 2519]);
    }
}
