//! The GPU's fast path of `backtest_sweep`: sets that are long or flat without sizes and stops, eight a thread, decided once per tile.
//!
//! The machines are those of `backtest.rs`; so are net returns, blocks, exact sums and statistics, bit for bit where they select. What
//! differs is who does what. A *word* is 32 sets. Where sets form a grid, a word's sets share one side of the comparison and read
//! neighbouring rows (cross) or ascending thresholds of one row (band) on the other; words with the same list follow each other. A
//! workgroup takes 16 words, 64 bars at a time: first it decides (enter and leave bits of 16 words × 64 bars in workgroup memory), then
//! each thread earns with the bits of its eight sets: two loads a bar for eight sets. Many sets that form no grid stay with
//! `backtest_sweep`: nothing is shared there.
//!
//! Time is cut into spans, at block boundaries so that no sum changes. Machine states before a span: the bar before (cross), or the
//! composition of the earlier spans' maps {out, in} → {out, in} (band). With G the product of 1 + net over a span, m the least product
//! from its start, l and d the last level and the lowest level of a span entered at its peak, a span entered at level x leaves at
//! min(x·G, l), and its lowest level is min(x·m, d).
//!
//! Shapes   keys [A,T,rows] or, by row, [A,rows,T], told by two strides; lattice: heads [words,8] (kind: 0 list is side a, 1 side b;
//!          first row or offset of the list, shared row, shared threshold, words from here on with this list and the same first bars,
//!          latest of these, last row of the list, earliest of these), slots
//!          [words·32,2] (set or NONE, first bar), lists; plan = edges [E], scales [A], cuts [spans+1]; states [A,spans,tiles,16,2];
//!          parts [A,spans,11,sets]: sum and sum of squares (64 bits each), trades, growth as mantissa and exponent, level, lowest, G, m;
//!          stats [A,set_tiles,5,64] and prefix [A,set_tiles,E,4,64] as in `backtest.rs`.
//! Launch   `backtest_cross`, `backtest_band`: workgroup of 64 threads = (asset, span, tile of 512 sets). WGSL decides a bar a thread,
//!          keys by row so that neighbouring threads read neighbouring words; CUDA decides a set a lane with one vote a bar, keys by bar.
//!          `backtest_band_states` only where there are spans; `backtest_join`: thread = set.
//! Scratch  parts, states; workgroup memory 8.3 KB.
//! Floor    11 instructions a set and bar: two bit tests, select, pay, four sums, drawdown (fused multiply-add, two minima), trades; a
//!          quarter of a load from workgroup memory. Deciding costs 2 (WGSL) or a quarter (CUDA) more.
//! Ladder   llvmpipe, sweep_sma on the machine of `backtest.rs`: one set a thread with three loads a bar 0.22 to 0.29 G pair-bars/s;
//!          tiles LADDER. A software adapter would like sixteen sets a thread (loads are loops over lanes there); a GPU would not,
//!          96 of its 128 registers a thread hold sums already.
//! Source   design of the sweep; composition of maps as in Ladner and Fischer 1980.
//! Files    shaders/backtest_tiles.wgsl · cuda/backtest_tiles.cu · reference: the `_cpu` functions

use crate::backtest::{BAND, BLOCK, CROSS, SCALE_BIAS, STATS, TILE, sharpe_of};
use crate::conformance::UNDEFINED;
use crate::fixed::to_fixed;
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes, writes_u32};
use crate::real::Real;
use crate::Result;
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
    }
}

/// Threads that simulate a tile.
const WG: u32 = 64;
/// Words of a tile.
pub(crate) const WORDS: usize = 16;
/// Numbers at a word's head.
const HEAD: usize = 8;
/// Numbers of a set and span.
pub(crate) const PARTS: usize = 11;
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
    u64::from(p.a) * u64::from(p.tiles) * (WORDS * 32) as u64 * u64::from(p.t.max(1) - 1)
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
    [reads_u32("keys"), reads_u32("lattice"), reads_u32("plan"), reads("returns"), reads_u32("states"), writes_u32("parts"), writes_u32("prefix")];

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
}

/// A word before it is written down: the list side, its list, the shared side, its sets.
struct Word {
    list: Vec<(u32, u32)>,
    shared: (u32, u32),
    sets: Vec<u32>,
}

impl Lattice {
    /// Puts sets into words with the list on the side that needs fewer words. None where many sets would leave most slots empty.
    pub(crate) fn of(mode: u32, sets: &[Sides]) -> Option<Lattice> {
        let sides = [words_of(mode, sets, |s| (s.a, s.b)), words_of(mode, sets, |s| (s.b, s.a))];
        let kind = usize::from(sides[1].len() < sides[0].len());
        let [a, b] = sides;
        let words = if kind == 0 { a } else { b };
        let few = words.len() <= (3 * sets.len().div_ceil(32)).max(4 * WORDS);
        few.then(|| Lattice::write(mode, kind as u32, sets, words))
    }

    fn write(mode: u32, kind: u32, sets: &[Sides], mut words: Vec<Word>) -> Lattice {
        // Words with the same list follow each other.
        words.sort_unstable_by(|x, y| (&x.list, x.shared, &x.sets).cmp(&(&y.list, y.shared, &y.sets)));
        let tiles = words.len().div_ceil(WORDS).max(1);
        let mut data = empty_words(tiles);
        let mut lists: HashMap<&[(u32, u32)], u32> = HashMap::new();
        for (w, word) in words.iter().enumerate() {
            let last = word.list.last().map_or(0, |x| x.0);
            let list = if mode == CROSS {
                word.list.first().map_or(0, |x| x.0)
            } else {
                *lists.entry(&word.list).or_insert_with(|| {
                    let at = data.len() as u32;
                    data.extend(word.list.iter().map(|x| x.1).chain(std::iter::repeat(u32::MAX)).take(32));
                    at
                })
            };
            data[w * HEAD..][..HEAD].copy_from_slice(&[kind, list, word.shared.0, word.shared.1, 1, 0, last, 0]);
            let slots = tiles * WORDS * HEAD + w * 64;
            for (slot, &id) in data[slots..slots + 64].chunks_exact_mut(2).zip(&word.sets) {
                slot.copy_from_slice(&[id, sets[id as usize].first]);
            }
        }
        for w in words.len()..tiles * WORDS {
            // words without sets repeat the one before
            data.copy_within((w - 1) * HEAD..w * HEAD, w * HEAD);
        }
        let firsts = |w: usize| (0..32).map(move |lane| tiles * WORDS * HEAD + (w * 32 + lane) * 2 + 1);
        for w in (0..tiles * WORDS).rev() {
            let same = |i: usize| data[w * HEAD + i] == data[(w + 1) * HEAD + i];
            let goes_on = (w + 1) % WORDS > 0 && [0, 1, 6].into_iter().all(same) && firsts(w).zip(firsts(w + 1)).all(|(x, y)| data[x] == data[y]);
            data[w * HEAD + 4] = if goes_on { data[(w + 1) * HEAD + 4] + 1 } else { 1 };
            let of_sets = firsts(w).filter(|&at| data[at - 1] != NONE).map(|at| data[at]);
            let (earliest, latest) = of_sets.fold((u32::MAX, 0), |(low, high), first| (low.min(first), high.max(first)));
            (data[w * HEAD + 5], data[w * HEAD + 7]) = (latest, earliest);
        }
        Lattice { data, tiles }
    }
}

/// Heads and slots of words without sets.
fn empty_words(tiles: usize) -> Vec<u32> {
    let mut data = vec![0; tiles * WORDS * HEAD];
    data.extend([NONE, u32::MAX].repeat(tiles * WORDS * 32));
    data
}

/// Words with lists on the side that `split` gives first: neighbouring rows where sets cross, one row's thresholds else.
fn words_of(mode: u32, sets: &[Sides], split: impl Fn(&Sides) -> ((u32, u32), (u32, u32)) + Sync) -> Vec<Word> {
    let mut order: Vec<((u32, u32), (u32, u32), u32)> = sets.iter().enumerate().map(|(i, s)| (split(s).1, split(s).0, i as u32)).collect();
    order.par_sort_unstable();
    let mut words = Vec::new();
    for shared in order.chunk_by(|x, y| x.0 == y.0) {
        // Sets with equal sides go into layers.
        let mut layers: Vec<Vec<&((u32, u32), (u32, u32), u32)>> = Vec::new();
        for equal in shared.chunk_by(|x, y| x.1 == y.1) {
            for (layer, set) in equal.iter().enumerate() {
                match layers.get_mut(layer) {
                    Some(sets) => sets.push(set),
                    None => layers.push(vec![set]),
                }
            }
        }
        let follows = |x: &((u32, u32), (u32, u32), u32), y: &((u32, u32), (u32, u32), u32)| if mode == CROSS { y.1.0 == x.1.0 + 1 } else { y.1.0 == x.1.0 };
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
    fn slot<const MODE: u32>(&self, tile: usize, slot: usize) -> (u32, Sides) {
        let (word, lane) = (tile * WORDS + slot / 32, slot % 32);
        let head = &self.lattice[word * HEAD..][..HEAD];
        let at = self.p.tiles as usize * WORDS * HEAD + (word * 32 + lane) * 2;
        let list = |i: usize| self.lattice[head[1] as usize + i];
        let own = if MODE == CROSS { ((head[1] + lane as u32).min(head[6]), 0) } else { (head[6], list(lane)) };
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
                let (_, sides) = tile.slot::<BAND>(group % tiles, i / 2 * 32 + lane);
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
}

impl<R: Real> Span<R> {
    /// As words: reals rounded to f32.
    fn words(&self) -> [u32; PARTS] {
        let (sums, real) = (self.sums as u64, |x: R| x.f32().to_bits());
        let growth = (self.mantissa as f32).to_bits();
        let [level, lowest, path, least] = [self.level, self.lowest, self.path, self.least].map(real);
        let (low, high) = (|x: u64| x as u32, |x: u64| (x >> 32) as u32);
        [low(sums), high(sums), low(self.squares), high(self.squares), self.trades, growth, self.exponent as u32, level, lowest, path, least]
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

fn simulate_cpu<R: Real, const MODE: u32>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let tile = Tile { p: launch.params()?, keys: launch.word()?, lattice: launch.word()?, plan: launch.word()? };
    let (returns, _) = (launch.real()?, launch.word()?);
    let (parts, prefix) = (launch.word_mut()?, launch.word_mut()?);
    let p = tile.p;
    let (bars, sets, edges) = (p.t as usize - 1, p.set_tiles as usize * TILE, &tile.plan[..p.edges as usize]);
    for a in 0..p.a as usize {
        for slot in 0..p.tiles as usize * WORDS * 32 {
            let (set, sides) = tile.slot::<MODE>(slot / (WORDS * 32), slot % (WORDS * 32));
            if set == NONE {
                continue;
            }
            let mut machine = (false, false);
            for span in 0..p.spans as usize {
                let put = &mut |edge: usize, x: &Span<R>| {
                    let at = ((a * p.set_tiles as usize + set as usize / TILE) * edges.len() + edge) * 4 * TILE + set as usize % TILE;
                    for (k, word) in x.words()[..4].iter().enumerate() {
                        prefix[at + k * TILE] = *word;
                    }
                };
                let x = simulate_span::<R, MODE>(&tile, &returns[a * bars..(a + 1) * bars], a, &sides, span, &mut machine, put);
                let at = (a * p.spans as usize + span) * PARTS * sets + set as usize;
                for (k, word) in x.words().into_iter().enumerate() {
                    parts[at + k * sets] = word;
                }
            }
        }
    }
    Ok(())
}

/// One set over one span; `machine` is where it is and what of that is held.
fn simulate_span<R: Real, const MODE: u32>(
    tile: &Tile<'_>,
    returns: &[R],
    a: usize,
    sides: &Sides,
    span: usize,
    machine: &mut (bool, bool),
    put: &mut dyn FnMut(usize, &Span<R>),
) -> Span<R> {
    let p = &tile.p;
    let (from, to, lag, edges) = (tile.cut(span), tile.cut(span + 1), p.lag as usize, &tile.plan[..p.edges as usize]);
    let (shift, scale) = (p.shift as i32, tile.plan[p.edges as usize + a] as i32 - SCALE_BIAS);
    let cost = R::of(f64::from(p.cost)) + R::of(f64::from(p.cost_low));
    let one = R::ONE;
    let mut x = Span { sums: 0, squares: 0, trades: 0, mantissa: 1.0, exponent: 0, level: one, lowest: one, path: one, least: one };
    let (mut sum, mut square, mut growth) = (R::ZERO, R::ZERO, R::ONE);
    let smaller = |x: R, y: R| if y < x { y } else { x };
    let (mut inside, mut held) = *machine;
    let mut begun = from;
    for j in from..=to {
        let edge = edges.binary_search(&(j as u32)).ok();
        if j > from && (j == to || j == begun + BLOCK || edge.is_some()) {
            x.sums += to_fixed(sum.f64(), shift - scale);
            x.squares += to_fixed(square.f64(), shift - 2 * scale) as u64;
            let (mantissa, power) = normalised(x.mantissa * growth.f64());
            (x.mantissa, x.exponent) = (mantissa, x.exponent + power);
            (sum, square, growth, begun) = (R::ZERO, R::ZERO, R::ONE, j);
        }
        if let Some(edge) = edge.filter(|_| j > from || from == 0) {
            put(edge, &x);
        }
        if j == to {
            break;
        }
        if j >= lag {
            inside = tile.follow::<MODE>(a, sides, j - lag, inside);
        }
        let now = inside && j >= p.start as usize;
        let earned = if now { returns[j] } else { R::ZERO };
        let net = earned - if now != held { cost } else { R::ZERO };
        x.trades += u32::from(now != held);
        held = now;
        sum += net;
        square = net.mul_add(net, square);
        growth = growth.mul_add(net, growth);
        x.level = smaller(x.level.mul_add(net, x.level), one);
        x.lowest = smaller(x.lowest, x.level);
        x.path = x.path.mul_add(net, x.path);
        x.least = smaller(x.least, x.path);
    }
    *machine = (inside, held);
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
            let (mut level, mut lowest) = (1f64, 1f64);
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
                let (mantissa, power) = normalised(growth * real(5));
                (growth, exponent) = (mantissa, exponent + power + parts[at + 6 * sets] as i32);
                lowest = lowest.min(real(8)).min(level * real(10));
                level = real(7).min(level * real(9));
            }
            let counted = u64::from(p.t - 1).saturating_sub(u64::from(p.start));
            let sharpe = sharpe_of(counted, sums, squares, p.shift);
            let values = [if sharpe <= UNDEFINED { UNDEFINED } else { sharpe }, growth * 2f64.powi(exponent) - 1.0, 1.0 - lowest, f64::from(trades), f64::from(trades)];
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
    fn check(mode: u32, sets: &[Sides]) -> Lattice {
        let lattice = Lattice::of(mode, sets).expect("words");
        let p = TilesParams { tiles: lattice.tiles as u32, ..bytemuck::Zeroable::zeroed() };
        let tile = Tile { p, keys: &[], lattice: &lattice.data, plan: &[] };
        let mut seen = vec![0; sets.len()];
        for slot in 0..lattice.tiles * WORDS * 32 {
            let (at, lane) = (slot / (WORDS * 32), slot % (WORDS * 32));
            let (set, got) = if mode == CROSS { tile.slot::<CROSS>(at, lane) } else { tile.slot::<BAND>(at, lane) };
            if set != NONE {
                let want = &sets[set as usize];
                assert_eq!((got.a, got.b, got.first), (want.a, want.b, want.first), "set {set}");
                seen[set as usize] += 1;
            }
        }
        assert!(seen.iter().all(|&n| n == 1), "{seen:?}");
        lattice
    }

    #[test]
    fn sets_of_any_shape_are_in_words_once() {
        let grid = |fast: u32, slow: u32| -> Vec<Sides> { (0..slow).flat_map(|s| (0..fast).map(move |f| sides((f, 0), (fast + s, 0)))).collect() };
        for (fast, slow) in [(1, 1), (3, 70), (70, 3), (33, 32), (100, 40)] {
            let sets = grid(fast, slow);
            let twice: Vec<Sides> = sets.iter().chain(&sets).copied().collect();
            let lattice = check(CROSS, &sets);
            assert!(lattice.tiles <= (fast * slow) as usize / 512 + 1 + (fast.min(slow) as usize * fast.max(slow).div_ceil(32) as usize) / 16);
            check(CROSS, &twice);
        }
        let scattered = |n: u32| -> Vec<Sides> { (0..n).map(|i| sides((i * 7919 % 97, 0), (100 + i * 104_729 % 89, 0))).collect() };
        check(CROSS, &scattered(30));
        assert!(Lattice::of(CROSS, &scattered(2000)).is_none());
        let band: Vec<Sides> = (0..5u32).flat_map(|row| (0..20).flat_map(move |low| (0..3).map(move |high| sides((row, !low), (row, 50 + high))))).collect();
        assert_eq!(check(BAND, &band).tiles, 1);
    }

    #[test]
    fn cuts_end_blocks() {
        assert_eq!(cuts(&[], 0, 512), [0, 0]);
        assert_eq!(cuts(&[], 700, 256), [0, 256, 512, 700]);
        assert_eq!(cuts(&[0, 100, 130], 700, 256), [0, 258, 514, 700]);
        assert_eq!(cuts(&[], 2519, u32::MAX), [0, 2519]);
    }
}
