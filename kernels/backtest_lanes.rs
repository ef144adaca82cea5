//! The lane-wise f32 column of `backtest_sweep`: explicit vectors of the widest kind that the processor has, chosen at run time
//! (AVX-512, AVX2, NEON, scalar), the same bits on all of them and as the plain column in `backtest.rs`.
//!
//! Layout   a job is one asset and a run of tiles. Time goes in blocks of 128 bars: all vectors of the job pass over one block while
//!          its keys (128 × rows words) lie in the second-level cache.
//! Plan     neighbouring sets mostly read neighbouring rows a and the same row b, or the same rows, or neighbouring rows both. Such runs are
//!          cut into vectors, the last one overlapping the one before; sets in shorter runs are packed in any order. Vectors that read
//!          the same rows a run side by side, up to four with 32 registers: a tile over (fast × slow), one load of a per bar.
//! Machines directions 0 and 1 need no arithmetic: net = select(held, r) − select(changed, cost), 11 instructions a bar with mask registers.
//!          Shorts, sizes and stops take the general path.
//! Warm-up  bars before a vector's first legal one are not visited; those in which some lanes are legal and others are not are masked.

use crate::backtest::{BAND, BLOCK, BacktestParams, CROSS, LONG, MOMENTUM, NO_STOP, OFF, SCALE_BIAS, SET_WORDS, SHORT, STATS, TILE, sharpe_of};
use crate::kernel::CpuLaunch;
use crate::{Error, Result};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

/// Most tiles of a job.
const JOB_TILES: usize = 32;
/// Widest vector.
const WIDEST: usize = 16;
/// Most vectors side by side.
const MOST: usize = 4;
/// Keys of one vector over a block.
type Packed = [u32; BLOCK * WIDEST];

// ---- plan ---------------------------------------------------------------------------------------------------------------

/// Where a vector's values lie in a bar's row of a table.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Rows {
    /// One after the other from here.
    From(usize),
    /// All the same.
    Same(usize),
    /// Anywhere.
    Any,
}

impl Rows {
    fn of(rows: &[u32]) -> Rows {
        let steps = |step: u32| rows.windows(2).all(|r| r[1] == r[0] + step);
        match (steps(0), steps(1)) {
            (true, _) => Rows::Same(rows[0] as usize),
            (_, true) => Rows::From(rows[0] as usize),
            _ => Rows::Any,
        }
    }
}

/// Vectors of a group share rows a; each has one row b for all its lanes.
const SHARED_A: u32 = 0;
/// Vectors of a group share rows a and rows b.
const SHARED_AB: u32 = 1;
/// Every vector reads its own rows.
const OWN: u32 = 2;

/// Up to MOST vectors that run side by side.
struct Group {
    kind: u32,
    vectors: usize,
    /// First slot of each vector.
    at: [usize; MOST],
    /// First legal bars: of the earliest and of the latest lane.
    first: (usize, usize),
}

/// A job's sets in slots: vectors one after the other, some sets in two of them.
#[derive(Default)]
struct Slots {
    /// Set of each slot.
    order: Vec<u32>,
    groups: Vec<Group>,
    /// (first set, its slot, how many), within tiles: where each set's results are.
    results: Vec<(usize, usize, usize)>,
}

impl Slots {
    fn of(a: &[u32], b: &[u32], first: &[u32], lanes: usize, side_by_side: usize) -> Slots {
        let mut slots = Slots::default();
        // (kind, row a, row b, first slot)
        let mut vectors: Vec<(u32, u32, u32, usize)> = Vec::new();
        let mut rest: Vec<u32> = Vec::new();
        let step = |i: usize| (a[i + 1].wrapping_sub(a[i]), b[i + 1].wrapping_sub(b[i]));
        let mut from = 0;
        while from < a.len() {
            let mut to = from + 1;
            let run = if to < a.len() { step(from) } else { (0, 0) };
            while to < a.len() && matches!(run, (1, 0) | (0, 0) | (1, 1)) && step(to - 1) == run {
                to += 1;
            }
            if to - from < lanes {
                rest.extend(from as u32..to as u32);
                from = to;
                continue;
            }
            let (kind, row_b) = if run == (1, 0) { (SHARED_A, 0) } else { (SHARED_AB, 1) };
            let mut done = from;
            while done < to {
                let start = done.min(to - lanes);
                vectors.push((kind, a[start], row_b * b[start], slots.order.len()));
                slots.result(done, slots.order.len() + done - start, start + lanes - done);
                slots.order.extend(start as u32..(start + lanes) as u32);
                done = start + lanes;
            }
            from = to;
        }
        for some in rest.chunks(lanes) {
            vectors.push((OWN, 0, 0, slots.order.len()));
            for (l, &set) in some.iter().enumerate() {
                slots.result(set as usize, slots.order.len() + l, 1);
            }
            slots.order.extend((0..lanes).map(|l| some[l.min(some.len() - 1)]));
        }
        vectors.sort_unstable();
        for same in vectors.chunk_by(|x, y| (x.0, x.1, x.2) == (y.0, y.1, y.2)) {
            let mut left = same;
            while !left.is_empty() {
                let n = [4, 2, 1].into_iter().find(|&n| n <= left.len() && n <= side_by_side).unwrap_or(1);
                let at: [usize; MOST] = std::array::from_fn(|v| left[v.min(n - 1)].3);
                let lanes = at[..n].iter().flat_map(|&at| &slots.order[at..at + lanes]).map(|&set| first[set as usize] as usize);
                let first = lanes.fold((usize::MAX, 0), |(low, high), f| (low.min(f), high.max(f)));
                slots.groups.push(Group { kind: left[0].0, vectors: n, at, first });
                left = &left[n..];
            }
        }
        // Groups with the same rows b follow each other and share their tile.
        let rows_b = |g: &Group| g.at.map(|at| b[slots.order[at] as usize]);
        slots.groups.sort_by_cached_key(|g| (g.kind, g.vectors, rows_b(g)));
        slots
    }

    /// Notes where the results of a run of sets are, cut at tiles.
    fn result(&mut self, mut set: usize, mut slot: usize, mut n: usize) {
        while n > 0 {
            let some = n.min(TILE - set % TILE);
            self.results.push((set, slot, some));
            (set, slot, n) = (set + some, slot + some, n - some);
        }
    }
}

/// Puts sets into slots, as wide as the processor's vectors.
struct Planner<'a> {
    a: &'a [u32],
    b: &'a [u32],
    first: &'a [u32],
    general: bool,
}

impl WithSimd for Planner<'_> {
    type Output = Slots;

    fn with_simd<S: Simd>(self, _: S) -> Slots {
        let side_by_side = match (self.general, S::F32_LANES == WIDEST) {
            (true, _) => 1,
            (false, true) => MOST,
            (false, false) => 2,
        };
        Slots::of(self.a, self.b, self.first, S::F32_LANES, side_by_side)
    }
}

// ---- sets and state -----------------------------------------------------------------------------------------------------

/// The sets of a job in slots, word by word.
struct Sets {
    a: Vec<u32>,
    b: Vec<u32>,
    threshold_a: Vec<u32>,
    threshold_b: Vec<u32>,
    first: Vec<u32>,
    /// Directions of the upper and of the lower side: 1 or 0, −1 or 0.
    up: Vec<f32>,
    down: Vec<f32>,
    target: Vec<f32>,
    leverage: Vec<f32>,
    volatility_row: Vec<u32>,
    stop_loss: Vec<f32>,
    take_profit: Vec<f32>,
    trailing_stop: Vec<f32>,
    max_holding: Vec<u32>,
    /// Distinct lookbacks of the momentum machine; `b` is then an index into them.
    lookbacks: Vec<u32>,
    stops: bool,
}

impl Sets {
    fn of(words: &[u32], order: &[u32], lookbacks: Vec<u32>) -> Sets {
        let word = |i: usize| -> Vec<u32> { order.iter().map(|&set| words[set as usize * SET_WORDS + i]).collect() };
        let real = |i: usize| -> Vec<f32> { word(i).into_iter().map(f32::from_bits).collect() };
        let side = word(5);
        let mut b = word(1);
        if !lookbacks.is_empty() {
            for row in &mut b {
                *row = lookbacks.binary_search(row).unwrap_or(0) as u32;
            }
        }
        Sets {
            a: word(0),
            b,
            threshold_a: word(2),
            threshold_b: word(3),
            first: word(4),
            up: side.iter().map(|&s| if s == SHORT { 0.0 } else { 1.0 }).collect(),
            down: side.iter().map(|&s| if s == LONG { 0.0 } else { -1.0 }).collect(),
            target: real(6),
            leverage: real(7),
            volatility_row: word(8),
            stop_loss: real(9),
            take_profit: real(10),
            trailing_stop: real(11),
            max_holding: word(12),
            stops: words.chunks_exact(SET_WORDS).any(has_stops),
            lookbacks,
        }
    }
}

fn has_stops(words: &[u32]) -> bool {
    words[12] != OFF || words[9..12].iter().any(|&x| x != NO_STOP.to_bits())
}

/// Whether a set's directions are 0 and 1 and its weights are directions.
fn is_plain(words: &[u32]) -> bool {
    words[5] == LONG && words[8] == OFF && !has_stops(words)
}

/// Powers of two that turn plain sums into the exact ones' units.
#[derive(Clone, Copy)]
struct Units {
    sum: f64,
    square: f64,
    /// Whether the products are exact in f32 too: no factor near its range.
    within_f32: bool,
}

impl Units {
    fn of(shift: i32, scale: i32) -> Units {
        let (sum, square) = (shift - scale, shift - 2 * scale);
        Units { sum: 2f64.powi(sum), square: 2f64.powi(square), within_f32: sum.abs().max(square.abs()) < 100 && scale.abs() < 20 }
    }
}

/// State of all slots of a job between blocks.
struct State {
    signal: Vec<f32>,
    held: Vec<f32>,
    blocked: Vec<f32>,
    entry: Vec<f32>,
    best: Vec<f32>,
    /// Bars held; trades where there are no stops.
    age: Vec<u32>,
    weight: Vec<f32>,
    level: Vec<f32>,
    lowest: Vec<f32>,
    sums: Vec<i64>,
    squares: Vec<u64>,
    mantissa: Vec<f64>,
    exponent: Vec<i32>,
    turnover: Vec<f32>,
    trades: Vec<u32>,
}

impl State {
    fn new(n: usize, general: bool) -> State {
        let zero = vec![0f32; n];
        let stops = vec![0f32; if general { n } else { 0 }];
        State {
            signal: zero.clone(),
            held: stops.clone(),
            blocked: stops.clone(),
            entry: stops.clone(),
            best: stops.clone(),
            age: vec![0; n],
            weight: zero.clone(),
            level: vec![1.0; n],
            lowest: vec![1.0; n],
            sums: vec![0; n],
            squares: vec![0; n],
            mantissa: vec![1.0; n],
            exponent: vec![0; n],
            turnover: zero,
            trades: vec![0; n],
        }
    }

    /// Moves the plain sums of a vector's block into the exact ones.
    #[inline(always)]
    fn flush<S: Simd>(&mut self, simd: S, at: usize, units: Units, sum: S::f32s, square: S::f32s, growth: S::f32s) {
        let lanes = S::F32_LANES;
        let (mut x, mut xx, mut factor) = ([0f32; WIDEST], [0f32; WIDEST], [0f32; WIDEST]);
        store::<S>(&mut factor, 0, growth);
        let (sums, squares) = (&mut self.sums[at..at + lanes], &mut self.squares[at..at + lanes]);
        if units.within_f32 {
            store::<S>(&mut x, 0, simd.mul_f32s(sum, simd.splat_f32s(units.sum as f32)));
            store::<S>(&mut xx, 0, simd.mul_f32s(square, simd.splat_f32s(units.square as f32)));
            for (total, &x) in sums.iter_mut().zip(&x) {
                *total += x as i64;
            }
            for (total, &x) in squares.iter_mut().zip(&xx) {
                *total += x as i64 as u64;
            }
        } else {
            store::<S>(&mut x, 0, sum);
            store::<S>(&mut xx, 0, square);
            for (total, &x) in sums.iter_mut().zip(&x) {
                *total += (f64::from(x) * units.sum) as i64;
            }
            for (total, &x) in squares.iter_mut().zip(&xx) {
                *total += (f64::from(x) * units.square) as i64 as u64;
            }
        }
        let mut far = false;
        for (total, &x) in self.mantissa[at..at + lanes].iter_mut().zip(&factor) {
            *total *= f64::from(x);
            far |= !(1e-100..1e100).contains(&total.abs());
        }
        if far {
            self.rescale(at..at + lanes);
        }
    }

    /// Keeps products within f64.
    #[cold]
    fn rescale(&mut self, lanes: Range<usize>) {
        for (mantissa, exponent) in self.mantissa[lanes.clone()].iter_mut().zip(&mut self.exponent[lanes]) {
            if !(1e-100..1e100).contains(&mantissa.abs()) && *mantissa != 0.0 {
                let power = mantissa.abs().log2().floor() as i32;
                *mantissa *= 2f64.powi(-power);
                *exponent += power;
            }
        }
    }
}

/// One asset.
struct Market<'a> {
    close: &'a [f32],
    fill: &'a [f32],
    returns: &'a [f32],
    keys: &'a [u32],
    inverse_volatility: &'a [u32],
    rows: usize,
    volatility_rows: usize,
}

#[inline(always)]
fn load_f32<S: Simd>(x: &[f32], at: usize) -> S::f32s {
    S::as_simd_f32s(&x[at..at + S::F32_LANES]).0[0]
}

#[inline(always)]
fn load_u32<S: Simd>(x: &[u32], at: usize) -> S::u32s {
    S::as_simd_u32s(&x[at..at + S::U32_LANES]).0[0]
}

#[inline(always)]
fn store<S: Simd>(x: &mut [f32], at: usize, v: S::f32s) {
    S::as_mut_simd_f32s(&mut x[at..at + S::F32_LANES]).0[0] = v;
}

#[inline(always)]
fn store_u32<S: Simd>(x: &mut [u32], at: usize, v: S::u32s) {
    S::as_mut_simd_u32s(&mut x[at..at + S::U32_LANES]).0[0] = v;
}

/// A table of words [bars,stride] from a bar on.
#[derive(Clone, Copy)]
struct Table<'a> {
    words: &'a [u32],
    stride: usize,
}

impl<'a> Table<'a> {
    /// The values of one vector over n bars as a slice and a stride: the table itself where its rows are neighbours, else `packed`.
    #[inline(always)]
    fn lanes<'p, S: Simd>(self, _: S, any: &[u32], n: usize, packed: &'p mut Packed) -> (&'p [u32], usize)
    where
        'a: 'p,
    {
        let lanes = S::U32_LANES;
        let (table, stride) = (self.words, self.stride);
        let bars = packed.chunks_exact_mut(lanes).take(n).enumerate();
        match Rows::of(any) {
            Rows::From(row) => return (&table[row..], stride),
            Rows::Same(row) => {
                for (k, out) in bars {
                    out.fill(table[k * stride + row]);
                }
            }
            Rows::Any => {
                for (k, out) in bars {
                    gather(&table[k * stride..(k + 1) * stride], any, out);
                }
            }
        }
        (&packed[..], lanes)
    }
}

#[inline(always)]
fn gather(row: &[u32], any: &[u32], out: &mut [u32]) {
    for (key, &r) in out.iter_mut().zip(any) {
        *key = row[r as usize];
    }
}

// ---- one block ------------------------------------------------------------------------------------------------------------

/// All groups of a job over the bars `from..to` of one block.
struct Block<'a> {
    p: &'a BacktestParams,
    m: &'a Market<'a>,
    sets: &'a Sets,
    groups: &'a [Group],
    state: &'a mut State,
    /// Taken out when the block begins.
    tiles: Option<&'a mut Tiles>,
    units: Units,
    from: usize,
    to: usize,
    plain: bool,
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let Some(tiles) = self.tiles.take() else { return };
        if !self.plain {
            return general::block(&mut self, simd, tiles);
        }
        match self.p.mode {
            CROSS => self.plain::<S, CROSS>(simd, tiles),
            _ => self.plain::<S, BAND>(simd, tiles),
        }
    }
}

/// Registers of the hot loop.
struct Registers<S: Simd, const G: usize> {
    /// Only before the first counted bar apart from `held`.
    inside: [S::m32s; G],
    held: [S::m32s; G],
    level: [S::f32s; G],
    lowest: [S::f32s; G],
    sum: [S::f32s; G],
    square: [S::f32s; G],
    growth: [S::f32s; G],
    trades: [S::u32s; G],
}

/// Bars that do not count: only the machine runs.
const SILENT: u32 = 0;
/// The first counted bar: the machine may be in already, but nothing is held.
const FIRST: u32 = 1;
/// All others.
const HOT: u32 = 2;

/// Packed keys, and which rows b they hold.
struct Tiles {
    a: [Packed; MOST],
    b: [Packed; MOST],
    rows_b: Option<(usize, [u32; MOST])>,
}

/// What a group reads over a block, from the first bar whose decision is known.
struct Reads<'a, S: Simd, const G: usize> {
    /// Keys a: of the group, or of each vector.
    a: [(&'a [u32], usize); G],
    b: [(&'a [u32], usize); G],
    /// Keys b of the group's vectors, bar by bar, as bits of reals: those are broadcast from memory.
    tile: &'a [f32],
    threshold_a: [S::u32s; G],
    threshold_b: [S::u32s; G],
    first: [S::u32s; G],
    cost: S::f32s,
    mask: S::u32s,
}

impl Block<'_> {
    /// Where a group begins: at its first legal bar, if nothing has to be known of earlier ones.
    fn begin(&self, first: usize) -> usize {
        let counted = if self.p.mode == BAND { 0 } else { self.p.start as usize };
        (first + self.p.lag as usize).max(counted).max(self.from)
    }

    #[inline(always)]
    fn plain<S: Simd, const MODE: u32>(&mut self, simd: S, tiles: &mut Tiles) {
        tiles.rows_b = None;
        for group in self.groups {
            if self.begin(group.first.0) >= self.to {
                continue;
            }
            match (group.kind, group.vectors) {
                (SHARED_A, 4) => self.group::<S, MODE, SHARED_A, 4>(simd, group, tiles),
                (SHARED_A, 2) => self.group::<S, MODE, SHARED_A, 2>(simd, group, tiles),
                (SHARED_A, _) => self.group::<S, MODE, SHARED_A, 1>(simd, group, tiles),
                (SHARED_AB, 4) => self.group::<S, MODE, SHARED_AB, 4>(simd, group, tiles),
                (SHARED_AB, 2) => self.group::<S, MODE, SHARED_AB, 2>(simd, group, tiles),
                (SHARED_AB, _) => self.group::<S, MODE, SHARED_AB, 1>(simd, group, tiles),
                (_, 4) => self.group::<S, MODE, OWN, 4>(simd, group, tiles),
                (_, 2) => self.group::<S, MODE, OWN, 2>(simd, group, tiles),
                _ => self.group::<S, MODE, OWN, 1>(simd, group, tiles),
            }
        }
    }

    #[inline(always)]
    fn group<S: Simd, const MODE: u32, const KIND: u32, const G: usize>(&mut self, simd: S, group: &Group, tiles: &mut Tiles) {
        let (p, sets, lanes) = (self.p, self.sets, S::F32_LANES);
        let lag = p.lag as usize;
        // The first bar whose decision is known.
        let base = self.from.max(lag);
        let n = self.to - base;
        let table = Table { words: &self.m.keys[(base - lag) * self.m.rows..], stride: self.m.rows };
        let Tiles { a: pa, b: pb, rows_b } = tiles;
        let empty: (&[u32], usize) = (&[], 0);
        let (mut a, mut b, mut tile) = ([empty; G], [empty; G], &[][..]);
        let at = |v: usize| group.at[v]..group.at[v] + lanes;
        if KIND != SHARED_A {
            *rows_b = None;
        }
        if KIND == OWN {
            for (v, (pa, pb)) in pa.iter_mut().zip(pb).enumerate().take(G) {
                a[v] = table.lanes(simd, &sets.a[at(v)], n, pa);
                b[v] = table.lanes(simd, &sets.b[at(v)], n, pb);
            }
        } else {
            let ([pa, ..], [pb, ..]) = (pa, pb);
            a[0] = table.lanes(simd, &sets.a[at(0)], n, pa);
            if KIND == SHARED_AB {
                b[0] = table.lanes(simd, &sets.b[at(0)], n, pb);
            } else {
                let rows: [u32; MOST] = group.at.map(|at| sets.b[at]);
                if *rows_b != Some((G, rows)) {
                    for (v, &row) in rows.iter().enumerate().take(G) {
                        let column = table.words[row as usize..].iter().step_by(table.stride);
                        for (out, key) in pb[v..n * G].iter_mut().step_by(G).zip(column) {
                            *out = *key;
                        }
                    }
                    *rows_b = Some((G, rows));
                }
                tile = bytemuck::cast_slice(&pb[..n * G]);
            }
        }
        let reads: Reads<'_, S, G> = Reads {
            a,
            b,
            tile,
            threshold_a: std::array::from_fn(|v| load_u32::<S>(&sets.threshold_a, group.at[v])),
            threshold_b: std::array::from_fn(|v| load_u32::<S>(&sets.threshold_b, group.at[v])),
            first: std::array::from_fn(|v| load_u32::<S>(&sets.first, group.at[v])),
            cost: simd.splat_f32s(p.cost + p.cost_low),
            mask: simd.splat_u32s(p.mask),
        };
        let state = &*self.state;
        let load = |x: &[f32]| -> [S::f32s; G] { std::array::from_fn(|v| load_f32::<S>(x, group.at[v])) };
        let (zero, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
        let mut registers: Registers<S, G> = Registers {
            inside: load(&state.signal).map(|w| simd.greater_than_f32s(w, zero)),
            held: load(&state.weight).map(|w| simd.greater_than_f32s(w, zero)),
            level: load(&state.level),
            lowest: load(&state.lowest),
            sum: [zero; G],
            square: [zero; G],
            growth: [one; G],
            trades: [simd.splat_u32s(0); G],
        };
        let first = group.first;
        let begin = self.begin(first.0);
        let start = begin.max(p.start as usize).min(self.to);
        let legal = start.max(first.1 + lag).min(self.to);
        let mut hot = start;
        if MODE == BAND && begin < self.to && p.start as usize >= self.from {
            self.bars::<S, MODE, KIND, true, SILENT, G>(simd, &reads, &mut registers, begin - base..start - base);
            hot = (start + 1).min(self.to);
            self.bars::<S, MODE, KIND, true, FIRST, G>(simd, &reads, &mut registers, start - base..hot - base);
        }
        let legal = legal.max(hot);
        self.bars::<S, MODE, KIND, true, HOT, G>(simd, &reads, &mut registers, hot - base..legal - base);
        self.bars::<S, MODE, KIND, false, HOT, G>(simd, &reads, &mut registers, legal - base..self.to - base);

        let state = &mut *self.state;
        for v in 0..G {
            let at = group.at[v];
            store::<S>(&mut state.signal, at, simd.select_f32s(registers.inside[v], one, zero));
            store::<S>(&mut state.weight, at, simd.select_f32s(registers.held[v], one, zero));
            store::<S>(&mut state.level, at, registers.level[v]);
            store::<S>(&mut state.lowest, at, registers.lowest[v]);
            let trades = simd.add_u32s(load_u32::<S>(&state.age, at), registers.trades[v]);
            store_u32::<S>(&mut state.age, at, trades);
            state.flush(simd, at, self.units, registers.sum[v], registers.square[v], registers.growth[v]);
        }
    }

    /// The hot loop over bars counted from the first whose decision is known. LEGAL: some lanes may still warm up.
    #[inline(always)]
    fn bars<S: Simd, const MODE: u32, const KIND: u32, const LEGAL: bool, const ROLE: u32, const G: usize>(
        &self,
        simd: S,
        reads: &Reads<'_, S, G>,
        registers: &mut Registers<S, G>,
        bars: Range<usize>,
    ) {
        if bars.is_empty() {
            return;
        }
        let (zero, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
        let (cost, mask) = (reads.cost, reads.mask);
        let lag = self.p.lag as usize;
        let base = self.from.max(lag);
        let returns = &self.m.returns[base + bars.start..base + bars.end];
        let (a, b) = (reads.a[0], reads.b[0]);
        let skip = |x: &(&[u32], usize)| x.0.len().min(bars.start * x.1);
        let mut rows_a = a.0[skip(&a)..].chunks(a.1.max(1));
        let mut rows_b = b.0[skip(&b)..].chunks(b.1.max(1));
        let mut tile = reads.tile[reads.tile.len().min(bars.start * G)..].chunks_exact(G);
        let Registers { mut inside, mut held, mut level, mut lowest, mut sum, mut square, mut growth, mut trades } = *registers;
        for (k, &r) in returns.iter().enumerate() {
            let k = bars.start + k;
            let r = simd.splat_f32s(r);
            let row_a = if KIND == OWN { &[] } else { rows_a.next().unwrap_or(&[]) };
            let row_b = if KIND == SHARED_AB { rows_b.next().unwrap_or(&[]) } else { &[] };
            let of_tile = if KIND == SHARED_A { tile.next().unwrap_or(&[]) } else { &[] };
            let shared_a = if KIND == OWN { reads.mask } else { load_u32::<S>(row_a, 0) };
            let shared_b = if KIND == SHARED_AB { load_u32::<S>(row_b, 0) } else { reads.mask };
            for v in 0..G {
                // decide
                let key_a = if KIND == OWN { load_u32::<S>(reads.a[v].0, k * reads.a[v].1) } else { shared_a };
                let key_b = match KIND {
                    OWN => load_u32::<S>(reads.b[v].0, k * reads.b[v].1),
                    SHARED_AB => shared_b,
                    _ => simd.transmute_u32s_f32s(simd.splat_f32s(of_tile[v])),
                };
                let was_in = if ROLE == HOT { held[v] } else { inside[v] };
                let mut on = if MODE == CROSS {
                    simd.greater_than_u32s(key_a, key_b)
                } else {
                    let enters = simd.greater_than_u32s(simd.xor_u32s(key_a, mask), reads.threshold_a[v]);
                    let stays = simd.less_than_or_equal_u32s(key_b, reads.threshold_b[v]);
                    // was_in ? stays : enters
                    simd.xor_m32s(enters, simd.and_m32s(was_in, simd.xor_m32s(enters, stays)))
                };
                if LEGAL {
                    on = simd.and_m32s(on, simd.less_than_or_equal_u32s(reads.first[v], simd.splat_u32s((base + k - lag) as u32)));
                }
                if ROLE != HOT {
                    inside[v] = on;
                }
                if ROLE == SILENT {
                    continue;
                }
                // pay and earn
                let changed = simd.xor_m32s(on, held[v]);
                held[v] = on;
                trades[v] = simd.add_u32s(trades[v], simd.select_u32s(changed, simd.splat_u32s(1), simd.splat_u32s(0)));
                let net = simd.sub_f32s(simd.select_f32s(on, r, zero), simd.select_f32s(changed, cost, zero));
                sum[v] = simd.add_f32s(sum[v], net);
                square[v] = simd.mul_add_f32s(net, net, square[v]);
                growth[v] = simd.mul_add_f32s(growth[v], net, growth[v]);
                level[v] = simd.min_f32s(simd.mul_add_f32s(level[v], net, level[v]), one);
                lowest[v] = simd.min_f32s(lowest[v], level[v]);
            }
        }
        if ROLE == HOT {
            inside = held;
        }
        *registers = Registers { inside, held, level, lowest, sum, square, growth, trades };
    }
}

/// Shorts, sizes, stops and momentum: one vector at a time.
mod general {
    use super::*;

    #[inline(always)]
    pub(super) fn block<S: Simd>(block: &mut Block<'_>, simd: S, tiles: &mut Tiles) {
        match (block.p.mode, block.sets.stops) {
            (CROSS, false) => groups::<S, CROSS, false>(block, simd, tiles),
            (CROSS, true) => groups::<S, CROSS, true>(block, simd, tiles),
            (BAND, false) => groups::<S, BAND, false>(block, simd, tiles),
            (BAND, true) => groups::<S, BAND, true>(block, simd, tiles),
            (_, false) => groups::<S, MOMENTUM, false>(block, simd, tiles),
            (_, true) => groups::<S, MOMENTUM, true>(block, simd, tiles),
        }
    }

    /// Closes `lookback` bars before each decision from bar `base` on, a row per distinct lookback; anything where there are none.
    fn closes_before(block: &Block<'_>, base: usize) -> Vec<u32> {
        let lookbacks = &block.sets.lookbacks;
        let mut table = vec![0; lookbacks.len() * (block.to - base)];
        for (k, row) in table.chunks_exact_mut(lookbacks.len().max(1)).enumerate() {
            let t = base + k - block.p.lag as usize;
            for (out, &lookback) in row.iter_mut().zip(lookbacks) {
                *out = block.m.close[t.saturating_sub(lookback as usize)].to_bits();
            }
        }
        table
    }

    #[inline(always)]
    fn groups<S: Simd, const MODE: u32, const STOPS: bool>(block: &mut Block<'_>, simd: S, tiles: &mut Tiles) {
        let base = block.from.max(block.p.lag as usize);
        let before = if MODE == MOMENTUM && base < block.to { closes_before(block, base) } else { Vec::new() };
        for group in block.groups {
            if block.begin(group.first.0) < block.to {
                vector::<S, MODE, STOPS>(block, simd, group.at[0], group.first, &before, tiles);
            }
        }
    }

    #[inline(always)]
    fn vector<S: Simd, const MODE: u32, const STOPS: bool>(
        block: &mut Block<'_>,
        simd: S,
        at: usize,
        first: (usize, usize),
        before: &[u32],
        tiles: &mut Tiles,
    ) {
        let (p, m, sets, lanes) = (block.p, block.m, block.sets, S::F32_LANES);
        let lag = p.lag as usize;
        // The first bar whose decision is known.
        let base = block.from.max(lag);
        let n = block.to - base;
        let any = at..at + lanes;
        let Tiles { a: [pa, pc, ..], b: [pb, ..], .. } = tiles;
        let keys = Table { words: &m.keys[if MODE == MOMENTUM { 0 } else { (base - lag) * m.rows }..], stride: m.rows };
        let then = Table { words: before, stride: sets.lookbacks.len() };
        let a = if MODE == MOMENTUM { (&[][..], 0) } else { keys.lanes(simd, &sets.a[any.clone()], n, pa) };
        let b = if MODE == MOMENTUM { then } else { keys }.lanes(simd, &sets.b[any.clone()], n, pb);
        let size_rows = &sets.volatility_row[any.clone()];
        let sized = size_rows.iter().any(|&r| r != OFF);
        // Lanes without a size read row 0 and are set to 1 below.
        let rows: Vec<u32> = size_rows.iter().map(|&r| if r == OFF { 0 } else { r }).collect();
        let volatility = Table { words: &m.inverse_volatility[if sized { (base - lag) * m.volatility_rows } else { 0 }..], stride: m.volatility_rows };
        let volatility = if sized { volatility.lanes(simd, &rows, n, pc) } else { (&[][..], 0) };

        let (zero, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
        let reads: Reads<'_, S> = Reads {
            a,
            b,
            volatility,
            threshold_a: load_u32::<S>(&sets.threshold_a, at),
            threshold_b: load_u32::<S>(&sets.threshold_b, at),
            first: load_u32::<S>(&sets.first, at),
            up: load_f32::<S>(&sets.up, at),
            down: load_f32::<S>(&sets.down, at),
            target: load_f32::<S>(&sets.target, at),
            leverage: load_f32::<S>(&sets.leverage, at),
            no_size: simd.greater_than_u32s(load_u32::<S>(size_rows, 0), simd.splat_u32s(OFF - 1)),
            stop_loss: simd.neg_f32s(load_f32::<S>(&sets.stop_loss, at)),
            take_profit: load_f32::<S>(&sets.take_profit, at),
            trailing_stop: simd.neg_f32s(load_f32::<S>(&sets.trailing_stop, at)),
            max_holding: load_u32::<S>(&sets.max_holding, at),
        };
        let state = &*block.state;
        let mut lane: Lanes<S> = Lanes {
            signal: load_f32::<S>(&state.signal, at),
            held: load_f32::<S>(&state.held, at),
            blocked: load_f32::<S>(&state.blocked, at),
            entry: load_f32::<S>(&state.entry, at),
            best: load_f32::<S>(&state.best, at),
            age: load_u32::<S>(&state.age, at),
            weight: load_f32::<S>(&state.weight, at),
            level: load_f32::<S>(&state.level, at),
            lowest: load_f32::<S>(&state.lowest, at),
            sum: zero,
            square: zero,
            growth: one,
            turnover: load_f32::<S>(&state.turnover, at),
            block_turnover: zero,
            trades: simd.splat_u32s(0),
        };
        let begin = block.begin(first.0);
        let counted = begin.max(p.start as usize).min(block.to);
        let legal = counted.max(first.1 + lag).min(block.to);
        if MODE == BAND {
            bars::<S, MODE, false, false, true, false>(block, simd, &reads, &mut lane, begin..counted);
        }
        if sized {
            bars::<S, MODE, STOPS, true, true, true>(block, simd, &reads, &mut lane, counted..legal);
            bars::<S, MODE, STOPS, true, false, true>(block, simd, &reads, &mut lane, legal..block.to);
        } else {
            bars::<S, MODE, STOPS, false, true, true>(block, simd, &reads, &mut lane, counted..legal);
            bars::<S, MODE, STOPS, false, false, true>(block, simd, &reads, &mut lane, legal..block.to);
        }
        let state = &mut *block.state;
        for (target, value) in [
            (&mut state.signal, lane.signal),
            (&mut state.held, lane.held),
            (&mut state.blocked, lane.blocked),
            (&mut state.entry, lane.entry),
            (&mut state.best, lane.best),
            (&mut state.weight, lane.weight),
            (&mut state.level, lane.level),
            (&mut state.lowest, lane.lowest),
            (&mut state.turnover, simd.add_f32s(lane.turnover, lane.block_turnover)),
        ] {
            store::<S>(target, at, value);
        }
        store_u32::<S>(&mut state.age, at, lane.age);
        let trades = simd.add_u32s(load_u32::<S>(&state.trades, at), lane.trades);
        store_u32::<S>(&mut state.trades, at, trades);
        state.flush(simd, at, block.units, lane.sum, lane.square, lane.growth);
    }

    /// What a vector reads over a block, from the first bar whose decision is known.
    struct Reads<'a, S: Simd> {
        a: (&'a [u32], usize),
        b: (&'a [u32], usize),
        volatility: (&'a [u32], usize),
        threshold_a: S::u32s,
        threshold_b: S::u32s,
        first: S::u32s,
        up: S::f32s,
        down: S::f32s,
        target: S::f32s,
        leverage: S::f32s,
        no_size: S::m32s,
        stop_loss: S::f32s,
        take_profit: S::f32s,
        trailing_stop: S::f32s,
        max_holding: S::u32s,
    }

    /// State of a vector.
    #[derive(Clone, Copy)]
    struct Lanes<S: Simd> {
        signal: S::f32s,
        held: S::f32s,
        blocked: S::f32s,
        entry: S::f32s,
        best: S::f32s,
        age: S::u32s,
        weight: S::f32s,
        level: S::f32s,
        lowest: S::f32s,
        sum: S::f32s,
        square: S::f32s,
        growth: S::f32s,
        turnover: S::f32s,
        block_turnover: S::f32s,
        trades: S::u32s,
    }

    /// LEGAL: some lanes may still warm up. EARN: the bars count.
    #[inline(always)]
    fn bars<S: Simd, const MODE: u32, const STOPS: bool, const SIZED: bool, const LEGAL: bool, const EARN: bool>(
        block: &Block<'_>,
        simd: S,
        reads: &Reads<'_, S>,
        lane: &mut Lanes<S>,
        bars: Range<usize>,
    ) {
        if bars.is_empty() {
            return;
        }
        let (p, m, lag) = (block.p, block.m, block.p.lag as usize);
        let base = block.from.max(lag);
        let (zero, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
        let (cost, mask) = (simd.splat_f32s(p.cost + p.cost_low), simd.splat_u32s(p.mask));
        let rows = |x: (&'_ [u32], usize)| (x.0.len().min((bars.start - base) * x.1), x.1.max(1));
        let (a, b, c) = (rows(reads.a), rows(reads.b), rows(reads.volatility));
        let mut rows_a = reads.a.0[a.0..].chunks(a.1);
        let mut rows_b = reads.b.0[b.0..].chunks(b.1);
        let mut rows_c = reads.volatility.0[c.0..].chunks(c.1);
        let mut x = *lane;
        let returns = &m.returns[bars.clone()];
        let closes = &m.close[bars.start - lag..bars.end - lag];
        let fills = &m.fill[bars.clone()];
        for (i, ((&r, &close), &fill)) in returns.iter().zip(closes).zip(fills).enumerate() {
            let row = |rows: &mut std::slice::Chunks<'_, u32>| load_u32::<S>(rows.next().unwrap_or(&[]), 0);
            // direction
            let next = match MODE {
                CROSS => simd.select_f32s(simd.greater_than_u32s(row(&mut rows_a), row(&mut rows_b)), reads.up, reads.down),
                BAND => {
                    let enters = simd.greater_than_u32s(simd.xor_u32s(row(&mut rows_a), mask), reads.threshold_a);
                    let leaves = simd.greater_than_u32s(row(&mut rows_b), reads.threshold_b);
                    let otherwise = simd.select_f32s(leaves, reads.down, x.signal);
                    let not_up = simd.less_than_or_equal_f32s(x.signal, zero);
                    simd.select_f32s(simd.and_m32s(not_up, enters), reads.up, otherwise)
                }
                _ => {
                    let (now, then) = (simd.splat_f32s(close), simd.transmute_f32s_u32s(row(&mut rows_b)));
                    let not_above = simd.select_f32s(simd.less_than_f32s(now, then), reads.down, zero);
                    simd.select_f32s(simd.greater_than_f32s(now, then), reads.up, not_above)
                }
            };
            x.signal = next;
            if LEGAL {
                let legal = simd.less_than_or_equal_u32s(reads.first, simd.splat_u32s((bars.start + i - lag) as u32));
                x.signal = simd.select_f32s(legal, next, zero);
            }
            if !EARN {
                continue;
            }
            // stops
            let direction = if STOPS {
                let close = simd.splat_f32s(close);
                x.age = simd.add_u32s(x.age, simd.splat_u32s(1));
                let is_up = simd.greater_than_f32s(x.held, zero);
                x.best = simd.select_f32s(is_up, simd.max_f32s(x.best, close), simd.min_f32s(x.best, close));
                let side = |v: S::f32s| simd.mul_f32s(x.held, v);
                let edge = |from: S::f32s, distance: S::f32s| side(simd.mul_f32s(from, simd.add_f32s(one, side(distance))));
                let price = side(close);
                let stopped = simd.or_m32s(
                    simd.or_m32s(
                        simd.less_than_or_equal_f32s(price, edge(x.entry, reads.stop_loss)),
                        simd.greater_than_or_equal_f32s(price, edge(x.entry, reads.take_profit)),
                    ),
                    simd.or_m32s(
                        simd.less_than_or_equal_f32s(price, edge(x.best, reads.trailing_stop)),
                        simd.greater_than_or_equal_u32s(x.age, reads.max_holding),
                    ),
                );
                let in_market = simd.greater_than_f32s(simd.abs_f32s(x.held), zero);
                x.blocked = simd.select_f32s(simd.and_m32s(in_market, stopped), x.held, x.blocked);
                let left = simd.greater_than_f32s(simd.abs_f32s(simd.sub_f32s(x.signal, x.blocked)), zero);
                x.blocked = simd.select_f32s(left, zero, x.blocked);
                let free = simd.less_than_or_equal_f32s(simd.abs_f32s(x.blocked), zero);
                let wanted = simd.select_f32s(free, x.signal, zero);
                let differs = simd.greater_than_f32s(simd.abs_f32s(simd.sub_f32s(wanted, x.held)), zero);
                let enters = simd.and_m32s(differs, simd.greater_than_f32s(simd.abs_f32s(wanted), zero));
                let fill = simd.splat_f32s(fill);
                x.entry = simd.select_f32s(enters, fill, x.entry);
                x.best = simd.select_f32s(enters, fill, x.best);
                x.age = simd.select_u32s(enters, simd.splat_u32s(0), x.age);
                x.held = wanted;
                wanted
            } else {
                x.signal
            };
            // size
            let now = if SIZED {
                let inverse_volatility = simd.transmute_f32s_u32s(row(&mut rows_c));
                let size = simd.min_f32s(simd.mul_f32s(reads.target, inverse_volatility), reads.leverage);
                simd.mul_f32s(direction, simd.select_f32s(reads.no_size, one, size))
            } else {
                direction
            };
            // pay and earn
            let traded = simd.abs_f32s(simd.sub_f32s(now, x.weight));
            x.weight = now;
            x.block_turnover = simd.add_f32s(x.block_turnover, traded);
            let trade = simd.select_u32s(simd.greater_than_f32s(traded, zero), simd.splat_u32s(1), simd.splat_u32s(0));
            x.trades = simd.add_u32s(x.trades, trade);
            let net = simd.mul_add_f32s(now, simd.splat_f32s(r), simd.neg_f32s(simd.mul_f32s(cost, traded)));
            x.sum = simd.add_f32s(x.sum, net);
            x.square = simd.mul_add_f32s(net, net, x.square);
            x.growth = simd.mul_add_f32s(x.growth, net, x.growth);
            x.level = simd.min_f32s(simd.mul_add_f32s(x.level, net, x.level), one);
            x.lowest = simd.min_f32s(x.lowest, x.level);
        }
        *lane = x;
    }
}

// ---- the launch -------------------------------------------------------------------------------------------------------------

/// What a job writes.
struct Job<'a> {
    asset: usize,
    tile: usize,
    stats: &'a mut [f32],
    prefix: &'a mut [u32],
}

/// The CPU entry of `backtest_sweep` in f32.
pub(crate) fn backtest_sweep_lanes(launch: CpuLaunch<'_, f32>) -> Result<()> {
    sweep_on(Arch::new(), launch)
}

fn sweep_on(arch: Arch, mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: BacktestParams = launch.params()?;
    let (price, returns, keys, inverse_volatility) = (launch.real()?, launch.real()?, launch.word()?, launch.real()?);
    let (sets, plan) = (launch.word()?, launch.word()?);
    let (stats, prefix) = (launch.real_mut()?, launch.word_mut()?);
    let (t, rows, tiles, assets) = (p.t as usize, p.rows as usize, p.tiles as usize, p.a as usize);
    let (edges, scales) = plan.split_at(p.edges as usize);
    if edges.windows(2).any(|e| e[0] >= e[1]) {
        return Err(Error::Internal("backtest_sweep: edges must ascend".into()));
    }
    let per_tile = edges.len() * 4 * TILE;
    let run = (tiles * assets / (4 * rayon::current_num_threads())).clamp(1, JOB_TILES);
    let mut jobs = Vec::new();
    let (mut stats, mut prefix) = (&mut stats[..assets * tiles * STATS * TILE], &mut prefix[..assets * tiles * per_tile]);
    for asset in 0..assets {
        for tile in (0..tiles).step_by(run) {
            let n = run.min(tiles - tile);
            let (s, more_stats) = std::mem::take(&mut stats).split_at_mut(n * STATS * TILE);
            let (q, more_prefix) = std::mem::take(&mut prefix).split_at_mut(n * per_tile);
            (stats, prefix) = (more_stats, more_prefix);
            jobs.push(Job { asset, tile, stats: s, prefix: q });
        }
    }
    let volatility_rows = p.volatility_rows as usize;
    let inverse_volatility: &[u32] = bytemuck::cast_slice(inverse_volatility);
    let table = |len: usize, rows: usize, a: usize| if len >= assets * t * rows { a * t * rows..(a + 1) * t * rows } else { 0..0 };
    jobs.into_par_iter().for_each(|mut job| {
        let a = job.asset;
        let market = Market {
            close: &price[a * t..(a + 1) * t],
            fill: &price[(assets + a) * t..(assets + a + 1) * t],
            returns: &returns[a * (t - 1)..(a + 1) * (t - 1)],
            keys: &keys[table(keys.len(), rows, a)],
            inverse_volatility: &inverse_volatility[table(inverse_volatility.len(), volatility_rows, a)],
            rows,
            volatility_rows,
        };
        simulate(arch, &p, &market, sets, edges, scales[a] as i32 - SCALE_BIAS, &mut job);
    });
    Ok(())
}

fn simulate(arch: Arch, p: &BacktestParams, market: &Market<'_>, words: &[u32], edges: &[u32], scale: i32, job: &mut Job<'_>) {
    let n = job.stats.len() / STATS;
    let words = &words[job.tile * TILE * SET_WORDS..][..n * SET_WORDS];
    let plain = p.mode != MOMENTUM && words.chunks_exact(SET_WORDS).all(is_plain);
    let word = |i: usize| -> Vec<u32> { words.iter().skip(i).step_by(SET_WORDS).copied().collect() };
    let slots = arch.dispatch(Planner { a: &word(0), b: &word(1), first: &word(4), general: !plain });
    let mut lookbacks = if p.mode == MOMENTUM { word(1) } else { Vec::new() };
    lookbacks.sort_unstable();
    lookbacks.dedup();
    let sets = Sets::of(words, &slots.order, lookbacks);
    let mut state = State::new(slots.order.len(), !plain);
    let mut tiles = Tiles { a: [[0u32; BLOCK * WIDEST]; MOST], b: [[0u32; BLOCK * WIDEST]; MOST], rows_b: None };
    let shift = p.shift as i32;
    let units = Units::of(shift, scale);
    let mut j = 0;
    for e in 0..=edges.len() {
        let end = edges.get(e).map_or(market.returns.len(), |&edge| edge as usize);
        while j < end {
            let to = end.min(j + BLOCK);
            arch.dispatch(Block { p, m: market, sets: &sets, groups: &slots.groups, state: &mut state, tiles: Some(&mut tiles), units, from: j, to, plain });
            j = to;
        }
        if e < edges.len() {
            arch.dispatch(Edge { slots: &slots, state: &state, edge: e, edges: edges.len(), prefix: job.prefix });
        }
    }
    let counted = (market.returns.len() as u64).saturating_sub(u64::from(p.start));
    for &(set, slot, n) in &slots.results {
        let stats = &mut job.stats[set / TILE * STATS * TILE..][..STATS * TILE];
        for (l, i) in (slot..slot + n).enumerate() {
            let l = set % TILE + l;
            stats[l] = sharpe_of(counted, state.sums[i], state.squares[i], p.shift) as f32;
            stats[TILE + l] = (state.mantissa[i] * 2f64.powi(state.exponent[i]) - 1.0) as f32;
            stats[2 * TILE + l] = 1.0 - state.lowest[i];
            let trades = state.age[i] as f32;
            (stats[3 * TILE + l], stats[4 * TILE + l]) = if plain { (trades, trades) } else { (state.turnover[i], state.trades[i] as f32) };
        }
    }
}

/// Writes the exact sums before an edge.
struct Edge<'a> {
    slots: &'a Slots,
    state: &'a State,
    edge: usize,
    edges: usize,
    prefix: &'a mut [u32],
}

impl WithSimd for Edge<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for &(set, slot, n) in &self.slots.results {
            let out = &mut self.prefix[(set / TILE * self.edges + self.edge) * 4 * TILE..][..4 * TILE];
            put64(out, set % TILE, self.state.sums[slot..slot + n].iter().map(|&x| x as u64));
            put64(&mut out[2 * TILE..], set % TILE, self.state.squares[slot..slot + n].iter().copied());
        }
    }
}

/// Writes 64-bit words as two planes of a tile, least significant first.
#[inline(always)]
fn put64(out: &mut [u32], from: usize, values: impl ExactSizeIterator<Item = u64>) {
    let (low, high) = out.split_at_mut(TILE);
    let lanes = from..from + values.len();
    for ((low, high), x) in low[lanes.clone()].iter_mut().zip(&mut high[lanes]).zip(values) {
        (*low, *high) = (x as u32, (x >> 32) as u32);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::backtest::{BACKTEST_SWEEP, backtest_sweep_cpu};
    use crate::kernel::{Cpu, Kernel};
    use crate::philox::philox4x32;
    use crate::{Device, View};

    static PLAIN: Kernel = Kernel { cpu: Some(Cpu { f32: backtest_sweep_cpu::<f32>, f64: backtest_sweep_cpu::<f64> }), ..BACKTEST_SWEEP };
    static SCALAR: Kernel = Kernel { cpu: Some(Cpu { f32: |launch| sweep_on(Arch::Scalar, launch), f64: backtest_sweep_cpu::<f64> }), ..BACKTEST_SWEEP };

    fn random(seed: u32, n: usize) -> Vec<u32> {
        (0..n).map(|i| philox4x32([i as u32, seed, 0, 0], [7, 0])[0]).collect()
    }

    /// Which sides, sizes and stops the random sets have.
    #[derive(Clone, Copy)]
    struct Overlays {
        sides: u32,
        sized: bool,
        stops: bool,
    }

    fn run(kernel: &'static Kernel, p: &BacktestParams, rows: &[u32], o: Overlays) -> (Vec<u32>, Vec<u32>) {
        let device = Device::open("cpu").unwrap();
        let (a, t, tiles) = (p.a as usize, p.t as usize, p.tiles as usize);
        let unit = |w: u32| f64::from(w >> 8) as f32 / 16_777_216.0;
        let price: Vec<f32> = random(1, 2 * a * t).iter().map(|&w| 100.0 + (w % 8) as f32).collect();
        let returns: Vec<f32> = random(2, a * (t - 1)).iter().map(|&w| 0.1 * (unit(w) - 0.5)).collect();
        // Few distinct keys, so that ties occur.
        let keys: Vec<u32> = random(3, a * t * p.rows as usize).iter().map(|w| w % 5).collect();
        let volatility = random(4, a * t * p.volatility_rows as usize);
        let inverse_volatility: Vec<f32> = volatility.iter().map(|&w| if w % 11 == 0 { 0.0 } else { 0.05 * unit(w) }).collect();
        let picks = random(5, tiles * TILE * 8);
        let set = |i: usize| {
            let w = &picks[8 * i..8 * i + 8];
            let stop = |w: u32| if o.stops && !w.is_multiple_of(3) { 0.01 * (1 + w % 4) as f32 } else { crate::backtest::NO_STOP }.to_bits();
            let row = if o.sized && !w[4].is_multiple_of(5) { w[4] % p.volatility_rows } else { OFF };
            let holding = if o.stops && !w[7].is_multiple_of(2) { 1 + w[7] % 7 } else { OFF };
            let head =
                [rows[i % rows.len()], w[1] % p.rows.min(20), w[2] % 4, w[3] % 4, 20 + w[0] % 40, (w[0] >> 8) % o.sides, 0.1f32.to_bits(), 1.5f32.to_bits()];
            [&head[..], &[row, stop(w[5]), stop(w[6]), stop(w[7]), holding, 0, 0, 0]].concat()
        };
        let sets: Vec<u32> = (0..tiles * TILE).flat_map(set).collect();
        let mut plan = vec![0, 17, 64, 65, 200, t as u32 - 1];
        plan.truncate(p.edges as usize);
        plan.extend(vec![SCALE_BIAS as u32; a]);
        let f = |x: &[f32]| device.upload("x", x).unwrap();
        let u = |x: &[u32]| device.upload_u32("x", x).unwrap();
        let (stats, prefix) = (
            device.zeros("s", (a * tiles * STATS * TILE) as u64).unwrap(),
            device.zeros_u32("p", (a * tiles * TILE * 4 * p.edges as usize).max(1) as u64).unwrap(),
        );
        let buffers = [f(&price), f(&returns), u(&keys), f(&inverse_volatility), u(&sets), u(&plan), stats.clone(), prefix.clone()];
        let args: Vec<View> = buffers.iter().map(View::from).collect();
        let mut pass = device.pass("test");
        pass.launch(kernel, p, &args).unwrap();
        let (s, q) = (pass.read(&stats).unwrap(), pass.read(&prefix).unwrap());
        let mut done = pass.submit().unwrap();
        (done.f32(s).unwrap().iter().map(|x| (x + 0.0).to_bits()).collect(), done.u32(q).unwrap())
    }

    #[test]
    fn lanes_give_the_bits_of_the_plain_column() {
        let contiguous: Vec<u32> = (0..20).collect();
        let all = [(1, false, false), (3, false, false), (1, true, false), (2, true, true), (3, false, true)];
        for (mode, (sides, sized, stops)) in [CROSS, BAND, MOMENTUM].into_iter().flat_map(|m| all.map(|o| (m, o))) {
            for (lag, start, edges, rows) in [(0, 0, 6, &contiguous[..]), (1, 64, 6, &[3][..]), (1, 70, 0, &[5, 2, 9][..])] {
                let p = BacktestParams {
                    a: 2,
                    t: 300,
                    rows: 40,
                    tiles: 3,
                    edges,
                    mode,
                    lag,
                    start,
                    shift: 50,
                    mask: u32::from(mode == BAND),
                    cost: 1e-3,
                    volatility_rows: 7,
                    general: 1,
                    ..bytemuck::Zeroable::zeroed()
                };
                let o = Overlays { sides, sized, stops };
                let plain = run(&PLAIN, &p, rows, o);
                let moved = plain.0.chunks_exact(TILE).skip(4).step_by(STATS).flatten().filter(|&&trades| trades != 0).count();
                assert!(moved > 100, "few sets trade: {moved}");
                for (name, kernel) in [("lanes", &BACKTEST_SWEEP), ("scalar", &SCALAR)] {
                    let lanes = run(kernel, &p, rows, o);
                    let wrong = plain.0.iter().zip(&lanes.0).position(|(a, b)| a != b);
                    assert!(plain == lanes, "{name}, mode {mode}, lag {lag}, sides {sides}, sized {sized}, stops {stops}: stat {wrong:?}");
                }
            }
        }
    }
}
