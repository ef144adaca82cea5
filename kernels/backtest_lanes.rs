//! The lane-wise f32 column of `backtest_sweep`: explicit vectors of the widest kind that the processor has, chosen at run time
//! (AVX-512, AVX2, NEON, scalar), the same bits on all of them and as the plain column in `backtest.rs`.
//!
//! Layout   a job is one asset and a run of tiles. Up to four vectors make a group, which passes over up to 2,560 bars with its state in
//!          registers; its keys are packed bar by bar, for many groups at once, so that every load is the next one in memory.
//! Plan     neighbouring sets mostly read neighbouring rows a and the same row b, or the same rows, or neighbouring rows both. Such runs are
//!          cut into vectors. What is left at the ends of runs that lie one above the other makes vectors across the runs; where there
//!          are none, the last vector overlaps the one before. Sets in shorter runs are packed in any order. Vectors that share rows run
//!          side by side: a tile over (fast × slow), one load of a per bar.
//! Machines directions 0 and 1 need no arithmetic: in, net = r − (cost if just entered); out, −(cost if just left). Nine instructions a bar:
//!          compare, xor and masked add, masked move, sum, three fused multiply-adds, one minimum. A level that sinks on the next bar is not
//!          the lowest, and only a rise can pass 1: both minima are taken at bars that rise alone, whose order the processor's
//!          branch predictor learns in the first groups. Where a level may fall below 0 the general path is taken.
//!          Momentum without stops: direction times size, each from a table that has few rows whatever the number of sets.
//!          Shorts, sizes and stops of the other machines take the general path, one vector at a time, over blocks of 128 bars.
//! Trades   where masks are bits, each bar's are stored, and changes are counted later, bit by bit in binary digits: 64 lanes at once.
//! Warm-up  bars before a group's first legal one are not visited; those in which some lanes are legal and others are not are masked.

use crate::backtest::{BAND, BLOCK, BacktestParams, CROSS, LONG, MOMENTUM, NO_STOP, OFF, SCALE_BIAS, SET_WORDS, SHORT, STATS, TILE, sharpe_of};
use crate::kernel::CpuLaunch;
use crate::{Error, Result};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::any::Any;
use std::collections::HashSet;
use std::ops::Range;

/// Most tiles of a job, and of one whose state does not stay in registers.
const JOB_TILES: usize = 128;
const GENERAL_JOB_TILES: usize = 32;
/// Most bars that a group passes over at once: its keys stay in the second-level cache, its state in registers.
const STRETCH: usize = 20 * BLOCK;
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
/// Vectors of a group share rows b; each has one row a for all its lanes.
const SHARED_B: u32 = 2;
/// Every vector reads its own rows.
const OWN: u32 = 3;

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
    /// (first set, its slot, how many), within tiles: where each set's results are, in the order of slots.
    results: Vec<(usize, usize, usize)>,
    /// First result of each vector, and the end.
    starts: Vec<usize>,
    lanes: usize,
}

/// (kind, first row by lane, first row b if shared, first slot).
type Vector = (u32, u32, u32, usize);

impl Slots {
    fn of(a: &[u32], b: &[u32], first: &[u32], lanes: usize, side_by_side: usize) -> Slots {
        let mut slots = Slots { lanes, ..Slots::default() };
        let mut vectors: Vec<Vector> = Vec::new();
        // Sets in runs too short for a vector, and the ends of longer runs, one run after the other.
        let (mut rest, mut ends): (Vec<u32>, Vec<Range<usize>>) = (Vec::new(), Vec::new());
        let step = |i: usize| (a[i + 1].wrapping_sub(a[i]), b[i + 1].wrapping_sub(b[i]));
        let mut from = 0;
        while from < a.len() {
            let mut to = from + 1;
            let run = if to < a.len() { step(from) } else { (0, 0) };
            while to < a.len() && matches!(run, (1, 0) | (0, 0) | (1, 1)) && step(to - 1) == run {
                to += 1;
            }
            let whole = (to - from) / lanes * lanes;
            let (kind, row_b) = if run == (1, 0) { (SHARED_A, 0) } else { (SHARED_AB, 1) };
            for start in (from..from + whole).step_by(lanes) {
                vectors.push((kind, a[start], row_b * b[start], slots.order.len()));
                slots.run(start..start + lanes, start..start + lanes);
            }
            match whole {
                0 => rest.extend(from as u32..to as u32),
                _ if from + whole < to => ends.push(from + whole..to),
                _ => {}
            }
            from = to;
        }
        let taken = slots.across(a, b, &ends, &mut vectors);
        for end in ends.into_iter().filter(|end| end.clone().any(|set| !taken.contains(&(set as u32)))) {
            let run = end.end - lanes..end.end;
            let kind = if b[run.start] == b[end.start] && a[run.start] != a[end.start] { SHARED_A } else { SHARED_AB };
            vectors.push((kind, a[run.start], if kind == SHARED_A { 0 } else { b[run.start] }, slots.order.len()));
            slots.run(run, end);
        }
        for some in rest.chunks(lanes) {
            vectors.push((OWN, 0, 0, slots.order.len()));
            slots.any(some);
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
        // Neighbouring sets one after the other: their results share lines of memory.
        slots.groups.sort_by_key(|g| slots.order[g.at[0]]);
        let vector = |slot: usize| slot / lanes;
        slots.starts = (0..=slots.order.len() / lanes).map(|v| slots.results.partition_point(|r| vector(r.1) < v)).collect();
        slots
    }

    /// Puts the ends of runs that lie one above the other into vectors across the runs: of sets with the same row a and neighbouring
    /// rows b. Returns the sets that found a place.
    fn across(&mut self, a: &[u32], b: &[u32], ends: &[Range<usize>], vectors: &mut Vec<Vector>) -> HashSet<u32> {
        let lanes = self.lanes;
        let mut sets: Vec<u32> = ends.iter().filter(|end| b[end.start] == b[end.start - 1]).flat_map(|end| end.start as u32..end.end as u32).collect();
        let rows = |set: u32| (a[set as usize], b[set as usize]);
        sets.sort_unstable_by_key(|&set| (rows(set), set));
        // Sets that occur again find no place here.
        let mut taken = HashSet::new();
        for run in sets.chunk_by(|&x, &y| rows(y) == (rows(x).0, rows(x).1 + 1)).filter(|run| run.len() >= lanes) {
            let mut done = 0;
            while done < run.len() {
                let start = done.min(run.len() - lanes);
                vectors.push((SHARED_B, rows(run[start]).1, 0, self.order.len()));
                self.any(&run[start..start + lanes]);
                done = start + lanes;
            }
            taken.extend(run);
        }
        taken
    }

    /// Gives a run of sets the next slots; only some of them have their results there.
    fn run(&mut self, run: Range<usize>, some: Range<usize>) {
        self.result(some.start, self.order.len() + some.start - run.start, some.len());
        self.order.extend(run.start as u32..run.end as u32);
    }

    /// Gives up to a vector of sets the next slots.
    fn any(&mut self, some: &[u32]) {
        for (l, &set) in some.iter().enumerate() {
            self.result(set as usize, self.order.len() + l, 1);
        }
        self.order.extend((0..self.lanes).map(|l| some[l.min(some.len() - 1)]));
    }

    /// Results of a vector.
    #[inline(always)]
    fn of_vector(&self, at: usize) -> &[(usize, usize, usize)] {
        let vector = at / self.lanes.max(1);
        &self.results[self.starts[vector]..self.starts[vector + 1]]
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
    /// Most vectors side by side where there are 32 registers.
    most: usize,
}

impl WithSimd for Planner<'_> {
    type Output = Slots;

    fn with_simd<S: Simd>(self, _: S) -> Slots {
        let side_by_side = if S::F32_LANES == WIDEST { self.most } else { self.most.min(2) };
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
    /// Rows of the first or the second table.
    fn rows(&self, table: usize) -> &[u32] {
        if table == 0 { &self.a } else { &self.b }
    }

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
    /// Directions of each group's lanes, as bits.
    before: Vec<u64>,
}

impl State {
    fn new(n: usize, groups: usize, general: bool) -> State {
        let zero = vec![0f32; n];
        let stops = vec![0f32; if general { n } else { 0 }];
        State {
            signal: zero.clone(),
            held: zero.clone(),
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
            before: vec![0; groups],
        }
    }

    /// Moves the plain sums of a vector's block into the exact ones.
    #[inline(always)]
    fn flush<S: Simd>(&mut self, simd: S, at: usize, units: Units, sum: S::f32s, square: S::f32s, growth: S::f32s) {
        let lanes = S::F32_LANES;
        let (sums, squares) = (&mut self.sums[at..at + lanes], &mut self.squares[at..at + lanes]);
        if units.within_f32 {
            let x = whole(simd, simd.mul_f32s(sum, simd.splat_f32s(units.sum as f32)));
            let xx = whole(simd, simd.mul_f32s(square, simd.splat_f32s(units.square as f32)));
            for (total, &x) in sums.iter_mut().zip(&x) {
                *total += x;
            }
            for (total, &x) in squares.iter_mut().zip(&xx) {
                *total += x as u64;
            }
        } else {
            let (mut x, mut xx) = ([0f32; WIDEST], [0f32; WIDEST]);
            store::<S>(&mut x, 0, sum);
            store::<S>(&mut xx, 0, square);
            for (total, &x) in sums.iter_mut().zip(&x) {
                *total += (f64::from(x) * units.sum) as i64;
            }
            for (total, &x) in squares.iter_mut().zip(&xx) {
                *total += (f64::from(x) * units.square) as i64 as u64;
            }
        }
        let mut factor = [0f32; WIDEST];
        store::<S>(&mut factor, 0, growth);
        let mut far = 0u64;
        for (total, &x) in self.mantissa[at..at + lanes].iter_mut().zip(&factor) {
            *total *= f64::from(x);
            // Outside 2^±330, well within f64 and its square.
            far |= u64::from(((total.to_bits() >> 52) & 0x7ff).wrapping_sub(1023 - 330) > 660);
        }
        if far != 0 {
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

/// x truncated to whole numbers, for |x| < 2^63.
#[inline(always)]
fn whole<S: Simd>(simd: S, x: S::f32s) -> [i64; WIDEST] {
    #[cfg(target_arch = "x86_64")]
    if let Some(v4) = (&simd as &dyn Any).downcast_ref::<pulp::x86::V4>() {
        let halves: [pulp::f32x8; 2] = bytemuck::cast(bytemuck::cast::<S::f32s, pulp::f32x16>(x));
        return bytemuck::cast([v4.avx512dq._mm512_cvttps_epi64(pulp::cast(halves[0])), v4.avx512dq._mm512_cvttps_epi64(pulp::cast(halves[1]))]);
    }
    let (mut reals, mut out) = ([0f32; WIDEST], [0i64; WIDEST]);
    store::<S>(&mut reals, 0, x);
    for l in 0..S::F32_LANES {
        out[l] = reals[l] as i64;
    }
    out
}

/// The halves of a vector of 64-bit words.
#[inline(always)]
fn halves<S: Simd>(simd: S, x: &[u64], low: &mut [u32; WIDEST], high: &mut [u32; WIDEST]) {
    #[cfg(target_arch = "x86_64")]
    if let (Some(v4), Ok(x)) = ((&simd as &dyn Any).downcast_ref::<pulp::x86::V4>(), <&[u64; WIDEST]>::try_from(x)) {
        let [a, b]: [pulp::u64x8; 2] = bytemuck::cast(*x);
        let (a, b) = (pulp::cast(a), pulp::cast(b));
        let (up_a, up_b) = (v4.avx512f._mm512_srli_epi64::<32>(a), v4.avx512f._mm512_srli_epi64::<32>(b));
        *low = bytemuck::cast([v4.avx512f._mm512_cvtepi64_epi32(a), v4.avx512f._mm512_cvtepi64_epi32(b)]);
        *high = bytemuck::cast([v4.avx512f._mm512_cvtepi64_epi32(up_a), v4.avx512f._mm512_cvtepi64_epi32(up_b)]);
        return;
    }
    for ((low, high), &x) in low.iter_mut().zip(high).zip(x) {
        (*low, *high) = (x as u32, (x >> 32) as u32);
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
fn load_u64<S: Simd>(x: &[u64], at: usize) -> S::u64s {
    S::as_simd_u64s(&x[at..at + S::U64_LANES]).0[0]
}

#[inline(always)]
fn load_u32<S: Simd>(x: &[u32], at: usize) -> S::u32s {
    S::as_simd_u32s(&x[at..at + S::U32_LANES]).0[0]
}

/// The values of a group's vectors.
#[inline(always)]
fn reals_at<S: Simd, const G: usize>(simd: S, x: &[f32], group: &Group) -> [S::f32s; G] {
    let mut values = [simd.splat_f32s(0.0); G];
    for v in 0..G {
        values[v] = load_f32::<S>(x, group.at[v]);
    }
    values
}

#[inline(always)]
fn words_at<S: Simd, const G: usize>(simd: S, x: &[u32], group: &Group) -> [S::u32s; G] {
    let mut values = [simd.splat_u32s(0); G];
    for v in 0..G {
        values[v] = load_u32::<S>(x, group.at[v]);
    }
    values
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

impl Table<'_> {
    fn bars(self) -> usize {
        self.words.len() / self.stride.max(1)
    }

    fn bar(&self, k: usize) -> &[u32] {
        &self.words[k * self.stride..(k + 1) * self.stride]
    }

    /// The values of any rows, one bar after the other.
    #[inline(always)]
    fn gather<S: Simd>(self, _: S, rows: &[u32], out: &mut Vec<u32>) {
        out.resize(self.bars() * S::U32_LANES, 0);
        for (out, bar) in out.chunks_exact_mut(S::U32_LANES).zip(self.words.chunks_exact(self.stride.max(1))) {
            gather(bar, rows, out);
        }
    }
}

#[inline(always)]
fn gather(row: &[u32], any: &[u32], out: &mut [u32]) {
    for (key, &r) in out.iter_mut().zip(any) {
        *key = row[r as usize];
    }
}

// ---- directions 0 and 1 -----------------------------------------------------------------------------------------------------

/// Bars between two flushes, and the edge at their end.
struct Span {
    from: usize,
    to: usize,
    edge: Option<usize>,
}

/// The spans of a run: blocks restart at every edge.
fn spans_of(edges: &[u32], bars: usize) -> Vec<Span> {
    let mut spans = Vec::new();
    let mut from = 0;
    for e in 0..=edges.len() {
        let end = edges.get(e).map_or(bars, |&edge| edge as usize);
        while end - from > BLOCK {
            spans.push(Span { from, to: from + BLOCK, edge: None });
            from += BLOCK;
        }
        spans.push(Span { from, to: end, edge: (e < edges.len()).then_some(e) });
        from = end;
    }
    spans
}

/// Cuts spans into stretches.
fn stretches(spans: &[Span]) -> Vec<&[Span]> {
    let mut stretches = Vec::new();
    let mut rest = spans;
    while let Some(first) = rest.first() {
        let n = rest.partition_point(|s| s.to - first.from <= STRETCH).max(1);
        let (some, more) = rest.split_at(n);
        stretches.push(some);
        rest = more;
    }
    stretches
}

/// Keys of a job over a stretch, as some of its groups read them: bar by bar, so that memory is read and written in order.
#[derive(Default)]
struct Packs {
    /// Table and rows by lane that vectors share, and their keys.
    wide: Vec<(usize, Rows)>,
    wide_keys: Vec<Line>,
    /// Lines between the keys of one vector and those of the next.
    stride: usize,
    /// Table and rows that whole vectors compare with, one of each vector of a group, and their keys.
    tiles: Vec<(usize, [u32; MOST])>,
    tile_keys: Vec<Vec<[u32; MOST]>>,
    /// Rows a and b of a group whose vectors read their own.
    own: [[Vec<u32>; 2]; MOST],
}

/// A line of the cache.
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u32; WIDEST]);

/// Most rows of each kind that are packed at a time.
const WIDE: usize = 24;
const TILES: usize = 128;

impl Packs {
    /// Notes a group's rows; false where there is no place left.
    fn wants(&mut self, group: &Group, lanes: usize, sets: &Sets) -> bool {
        let by_lane = |table: usize| (table, Rows::of(&sets.rows(table)[group.at[0]..group.at[0] + lanes]));
        let by_vector = |table: usize| Some((table, group.at.map(|at| sets.rows(table)[at])));
        let (wide, tile) = match group.kind {
            SHARED_A => (vec![by_lane(0)], by_vector(1)),
            SHARED_B => (vec![by_lane(1)], by_vector(0)),
            SHARED_AB => (vec![by_lane(0), by_lane(1)], None),
            _ => return true,
        };
        let fits = self.wide.len() + 2 <= WIDE && self.tiles.len() < TILES;
        let known = wide.iter().all(|rows| self.wide.contains(rows)) && tile.is_none_or(|tile| self.tiles.contains(&tile));
        if fits && !known {
            for rows in wide {
                self.wide.extend((!self.wide.contains(&rows)).then_some(rows));
            }
            self.tiles.extend(tile.filter(|tile| !self.tiles.contains(tile)));
        }
        fits || known
    }

    /// Fills what was noted from the tables' bars.
    #[inline(always)]
    fn fill<S: Simd>(&mut self, _: S, tables: [Table<'_>; 2]) {
        let (lanes, bars) = (S::U32_LANES, tables[0].bars());
        // Written side by side: no two of them in the same set of the cache.
        self.stride = (bars * lanes).div_ceil(WIDEST).next_multiple_of(64) + 9;
        self.wide_keys.resize(self.wide.len() * self.stride, Line::default());
        self.tile_keys.resize_with(self.tiles.len().max(self.tile_keys.len()), Vec::new);
        for keys in &mut self.tile_keys {
            keys.resize(bars, [0; MOST]);
        }
        for k in 0..bars {
            let bar = [tables[0].bar(k), tables[1].bar(k)];
            for (keys, &(table, rows)) in self.wide_keys.chunks_exact_mut(self.stride).zip(&self.wide) {
                let keys: &mut [u32] = bytemuck::cast_slice_mut(keys);
                let (out, bar) = (&mut keys[k * lanes..(k + 1) * lanes], bar[table]);
                match rows {
                    Rows::From(row) => store_u32::<S>(out, 0, load_u32::<S>(bar, row)),
                    Rows::Same(row) => out.fill(bar[row]),
                    Rows::Any => {}
                }
            }
            for (keys, (table, rows)) in self.tile_keys.iter_mut().zip(&self.tiles) {
                let bar = bar[*table];
                keys[k] = [bar[rows[0] as usize], bar[rows[1] as usize], bar[rows[2] as usize], bar[rows[3] as usize]];
            }
        }
    }

    fn wide(&self, table: usize, rows: &[u32]) -> &[u32] {
        let at = self.wide.iter().position(|&wide| wide == (table, Rows::of(rows)));
        at.map_or(&[], |at| bytemuck::cast_slice(&self.wide_keys[at * self.stride..(at + 1) * self.stride]))
    }

    fn tile(&self, table: usize, rows: [u32; MOST]) -> &[[u32; MOST]] {
        let at = self.tiles.iter().position(|&tile| tile == (table, rows));
        at.map_or(&[], |at| &self.tile_keys[at])
    }
}

/// All groups of a job over the bars of one stretch.
struct Plain<'a> {
    p: &'a BacktestParams,
    m: &'a Market<'a>,
    sets: &'a Sets,
    slots: &'a Slots,
    state: &'a mut State,
    packs: &'a mut Packs,
    history: &'a mut History,
    units: Units,
    spans: &'a [Span],
    edges: usize,
    prefix: &'a mut [u32],
    /// Directions and sizes of the momentum machine.
    weights: Option<&'a Weights>,
}

impl WithSimd for Plain<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        match self.p.mode {
            CROSS => self.groups::<S, CROSS>(simd),
            BAND => self.groups::<S, BAND>(simd),
            _ => self.groups::<S, MOMENTUM>(simd),
        }
    }
}

/// One group, as a function of its own: all of them inside one another would take the compiler minutes.
struct One<'a, 'b, const MODE: u32, const KIND: u32, const G: usize> {
    plain: &'b mut Plain<'a>,
    index: usize,
    group: &'b Group,
}

impl<const MODE: u32, const KIND: u32, const G: usize> WithSimd for One<'_, '_, MODE, KIND, G> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.plain.group::<S, MODE, KIND, G>(simd, self.index, self.group);
    }
}

/// State of a group between spans.
struct Registers<S: Simd, const G: usize> {
    /// The band machine's direction.
    inside: [S::f32s; G],
    /// The direction held, where masks are vectors.
    held: [S::f32s; G],
    /// What leaving costs: −cost if held, else 0. The weight, where there are sizes.
    owed: [S::f32s; G],
    level: [S::f32s; G],
    lowest: [S::f32s; G],
    sum: [S::f32s; G],
    square: [S::f32s; G],
    growth: [S::f32s; G],
    turnover: [S::f32s; G],
    trades: [S::u32s; G],
}

/// What a group reads over a stretch, from the first bar whose decision is known.
struct Reads<'a, S: Simd, const G: usize> {
    /// Keys by lane: of the group, or a and b of each vector.
    wide: [[&'a [u32]; 2]; G],
    /// Keys that are the same for all lanes, of each vector, bar by bar.
    tile: &'a [[u32; MOST]],
    threshold_a: [S::u32s; G],
    threshold_b: [S::u32s; G],
    first: [S::u32s; G],
    /// −cost.
    fee: S::f32s,
    mask: S::u32s,
    base: usize,
}

impl<'a> Plain<'a> {
    /// Bars of the stretch from the first whose decision is known.
    fn bars(&self) -> Range<usize> {
        let to = self.spans.last().map_or(0, |s| s.to);
        self.spans.first().map_or(0, |s| s.from).max(self.p.lag as usize).min(to)..to
    }

    /// What decides about them, by rows a and by rows b.
    fn tables(&self) -> [Table<'a>; 2] {
        let Range { start, end } = self.bars();
        if let Some(weights) = self.weights {
            return [(&weights.directions, weights.signals.len()), (&weights.sizes, weights.kinds.len())]
                .map(|(words, stride)| Table { words: &words[start * stride..end * stride], stride });
        }
        let (lag, rows) = (self.p.lag as usize, self.m.rows);
        [Table { words: &self.m.keys[start.saturating_sub(lag) * rows..end.saturating_sub(lag) * rows], stride: rows }; 2]
    }

    #[inline(always)]
    fn groups<S: Simd, const MODE: u32>(&mut self, simd: S) {
        let slots = self.slots;
        let mut packed = 0;
        for (i, group) in slots.groups.iter().enumerate() {
            if i == packed {
                let tables = self.tables();
                (self.packs.wide, self.packs.tiles) = (Vec::new(), Vec::new());
                packed += slots.groups[i..].iter().take_while(|group| self.packs.wants(group, S::F32_LANES, self.sets)).count().max(1);
                self.packs.fill(simd, tables);
            }
            match (group.kind, group.vectors) {
                (SHARED_A, 4) => simd.vectorize(One::<MODE, SHARED_A, 4> { plain: self, index: i, group }),
                (SHARED_A, 2) => simd.vectorize(One::<MODE, SHARED_A, 2> { plain: self, index: i, group }),
                (SHARED_A, _) => simd.vectorize(One::<MODE, SHARED_A, 1> { plain: self, index: i, group }),
                (SHARED_B, 4) => simd.vectorize(One::<MODE, SHARED_B, 4> { plain: self, index: i, group }),
                (SHARED_B, 2) => simd.vectorize(One::<MODE, SHARED_B, 2> { plain: self, index: i, group }),
                (SHARED_B, _) => simd.vectorize(One::<MODE, SHARED_B, 1> { plain: self, index: i, group }),
                (SHARED_AB, 4) => simd.vectorize(One::<MODE, SHARED_AB, 4> { plain: self, index: i, group }),
                (SHARED_AB, 2) => simd.vectorize(One::<MODE, SHARED_AB, 2> { plain: self, index: i, group }),
                (SHARED_AB, _) => simd.vectorize(One::<MODE, SHARED_AB, 1> { plain: self, index: i, group }),
                (_, 4) => simd.vectorize(One::<MODE, OWN, 4> { plain: self, index: i, group }),
                (_, 2) => simd.vectorize(One::<MODE, OWN, 2> { plain: self, index: i, group }),
                _ => simd.vectorize(One::<MODE, OWN, 1> { plain: self, index: i, group }),
            }
        }
    }

    #[inline(always)]
    fn group<S: Simd, const MODE: u32, const KIND: u32, const G: usize>(&mut self, simd: S, index: usize, group: &Group) {
        let (p, m, sets, lanes) = (self.p, self.m, self.sets, S::F32_LANES);
        let (lag, counted) = (p.lag as usize, p.start as usize);
        let Range { start: base, end: to } = self.bars();
        // The first bar that matters: nothing has to be known of earlier ones.
        let begin = (group.first.0 + lag).max(if MODE == BAND { 0 } else { counted }).max(base).min(to);
        let at = |v: usize| group.at[v]..group.at[v] + lanes;
        if KIND == OWN && begin < to {
            let tables = self.tables();
            for v in 0..G {
                let [a, b] = &mut self.packs.own[v];
                tables[0].gather(simd, &sets.a[at(v)], a);
                tables[1].gather(simd, &sets.b[at(v)], b);
            }
        }
        let packs = &*self.packs;
        let nothing: [&[u32]; 2] = [&[], &[]];
        let mut reads: Reads<'_, S, G> = Reads {
            wide: [nothing; G],
            tile: &[],
            threshold_a: words_at(simd, &sets.threshold_a, group),
            threshold_b: words_at(simd, &sets.threshold_b, group),
            first: words_at(simd, &sets.first, group),
            fee: simd.neg_f32s(simd.splat_f32s(p.cost + p.cost_low)),
            mask: simd.splat_u32s(p.mask),
            base,
        };
        match KIND {
            SHARED_A => (reads.wide[0][0], reads.tile) = (packs.wide(0, &sets.a[at(0)]), packs.tile(1, group.at.map(|at| sets.b[at]))),
            SHARED_B => (reads.wide[0][0], reads.tile) = (packs.wide(1, &sets.b[at(0)]), packs.tile(0, group.at.map(|at| sets.a[at]))),
            SHARED_AB => reads.wide[0] = [packs.wide(0, &sets.a[at(0)]), packs.wide(1, &sets.b[at(0)])],
            _ => {
                for v in 0..G {
                    reads.wide[v] = [&packs.own[v][0], &packs.own[v][1]];
                }
            }
        }
        let state = &*self.state;
        let (zero, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
        let mut x: Registers<S, G> = Registers {
            inside: reals_at(simd, &state.signal, group),
            held: reals_at(simd, &state.held, group),
            owed: reals_at(simd, &state.weight, group),
            level: reals_at(simd, &state.level, group),
            lowest: reals_at(simd, &state.lowest, group),
            sum: [zero; G],
            square: [zero; G],
            growth: [one; G],
            turnover: [zero; G],
            trades: words_at(simd, &state.age, group),
        };
        self.history.begin(self.state.before[index], MODE != MOMENTUM);
        for span in self.spans {
            if begin < span.to {
                // Bars that only the machine sees, that some lanes still warm up in, and all others.
                let begin = begin.max(span.from);
                let start = begin.max(counted).min(span.to);
                let legal = start.max(group.first.1 + lag).min(span.to);
                self.history.make_room(simd, span.to - start);
                if MODE == MOMENTUM {
                    weighted::<S, KIND, true, G>(simd, (p, m, start..legal), &reads, self.history, &mut x);
                    weighted::<S, KIND, false, G>(simd, (p, m, legal..span.to), &reads, self.history, &mut x);
                    for v in 0..G {
                        let turnover = simd.add_f32s(load_f32::<S>(&self.state.turnover, group.at[v]), x.turnover[v]);
                        store::<S>(&mut self.state.turnover, group.at[v], turnover);
                    }
                    x.turnover = [zero; G];
                } else {
                    if MODE == BAND {
                        bars::<S, MODE, KIND, true, false, G>(simd, (p, m, begin..start), &reads, self.history, &mut x);
                    }
                    bars::<S, MODE, KIND, true, true, G>(simd, (p, m, start..legal), &reads, self.history, &mut x);
                    bars::<S, MODE, KIND, false, true, G>(simd, (p, m, legal..span.to), &reads, self.history, &mut x);
                }
                for v in 0..G {
                    self.state.flush(simd, group.at[v], self.units, x.sum[v], x.square[v], x.growth[v]);
                }
                (x.sum, x.square, x.growth) = ([zero; G], [zero; G], [one; G]);
            }
            if let Some(edge) = span.edge {
                for v in 0..G {
                    write(simd, (self.slots, self.state, edge, self.edges), group.at[v], self.prefix);
                }
            }
        }
        let state = &mut *self.state;
        for v in 0..G {
            let at = group.at[v];
            store::<S>(&mut state.signal, at, x.inside[v]);
            store::<S>(&mut state.held, at, x.held[v]);
            store::<S>(&mut state.weight, at, x.owed[v]);
            store::<S>(&mut state.level, at, x.level[v]);
            store::<S>(&mut state.lowest, at, x.lowest[v]);
            store_u32::<S>(&mut state.age, at, x.trades[v]);
        }
        if packed::<S>() {
            state.before[index] = self.history.end(simd, group, &mut state.age);
        }
    }
}

/// Writes the exact sums of a vector before an edge.
#[inline(always)]
fn write<S: Simd>(simd: S, (slots, state, edge, edges): (&Slots, &State, usize, usize), at: usize, prefix: &mut [u32]) {
    let lanes = S::F32_LANES;
    let (sums, squares) = (&state.sums[at..at + lanes], &state.squares[at..at + lanes]);
    let mut planes = [[0u32; WIDEST]; 4];
    let [low_sums, high_sums, low_squares, high_squares] = &mut planes;
    halves(simd, bytemuck::cast_slice(sums), low_sums, high_sums);
    halves(simd, squares, low_squares, high_squares);
    for &(set, slot, n) in slots.of_vector(at) {
        let out = &mut prefix[(set / TILE * edges + edge) * 4 * TILE..][..4 * TILE];
        let (lane, to) = (slot - at, set % TILE);
        for (plane, out) in planes.iter().zip(out.chunks_exact_mut(TILE)) {
            if n == lanes {
                store_u32::<S>(out, to, load_u32::<S>(plane, 0));
            } else {
                copy_few(&mut out[to..to + n], &plane[lane..lane + n]);
            }
        }
    }
}

/// Copies less than a vector, in powers of two.
#[inline(always)]
fn copy_few(mut out: &mut [u32], mut from: &[u32]) {
    #[inline(always)]
    fn copy<'a, 'b, const N: usize>(out: &'a mut [u32], from: &'b [u32]) -> (&'a mut [u32], &'b [u32]) {
        match (out.split_first_chunk_mut::<N>(), from.split_first_chunk::<N>()) {
            (Some((out, more_out)), Some((from, more))) => {
                *out = *from;
                (more_out, more)
            }
            _ => (&mut [], &[]),
        }
    }
    let n = out.len();
    if n & 8 != 0 {
        (out, from) = copy::<8>(out, from);
    }
    if n & 4 != 0 {
        (out, from) = copy::<4>(out, from);
    }
    if n & 2 != 0 {
        (out, from) = copy::<2>(out, from);
    }
    if n & 1 != 0 {
        copy::<1>(out, from);
    }
}

#[inline(always)]
fn vectors<S: Simd>(keys: &[u32], first: usize, n: usize) -> &[S::u32s] {
    &S::as_simd_u32s(keys).0[first..first + n]
}

/// Bars of one span. LEGAL: some lanes may still warm up. EARN: the bars count.
#[inline(always)]
fn bars<S: Simd, const MODE: u32, const KIND: u32, const LEGAL: bool, const EARN: bool, const G: usize>(
    simd: S,
    block: (&BacktestParams, &Market<'_>, Range<usize>),
    reads: &Reads<'_, S, G>,
    history: &mut History,
    x: &mut Registers<S, G>,
) {
    let (p, m, bars) = block;
    if bars.is_empty() {
        return;
    }
    let (zero, one, unit) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0), simd.splat_u32s(1));
    let (fee, fee_bits) = (reads.fee, simd.transmute_u32s_f32s(reads.fee));
    let (n, first, decided) = (bars.len(), bars.start - reads.base, bars.start - p.lag as usize);
    let returns = &m.returns[bars];
    let mut wide: [[&[S::u32s]; 2]; G] = [[&[]; 2]; G];
    for v in 0..if KIND == OWN { G } else { 1 } {
        wide[v][0] = vectors::<S>(reads.wide[v][0], first, n);
        if KIND != SHARED_A && KIND != SHARED_B {
            wide[v][1] = vectors::<S>(reads.wide[v][1], first, n);
        }
    }
    let tile = if KIND == SHARED_A || KIND == SHARED_B { &reads.tile[first..first + n] } else { &[] };
    let history = history.words(if EARN && packed::<S>() { n } else { 0 });
    let mut inside = [simd.greater_than_f32s(zero, one); G];
    let mut held = inside;
    for v in 0..G {
        (inside[v], held[v]) = (simd.greater_than_f32s(x.inside[v], zero), simd.greater_than_f32s(x.held[v], zero));
    }
    let Registers { mut owed, mut level, mut lowest, mut sum, mut square, mut growth, mut trades, .. } = *x;
    for k in 0..n {
        let (r, rises) = (simd.splat_f32s(returns[k]), returns[k] > 0.0);
        let legal = simd.splat_u32s((decided + k) as u32);
        // A level that sinks on the next bar is not the lowest: only before a rise is it looked at, and only a rise can pass 1.
        if EARN && rises {
            for v in 0..G {
                lowest[v] = simd.min_f32s(lowest[v], level[v]);
            }
        }
        for v in 0..G {
            // decide
            let (key_a, key_b) = match KIND {
                SHARED_A => (wide[0][0][k], simd.splat_u32s(tile[k][v])),
                SHARED_B => (simd.splat_u32s(tile[k][v]), wide[0][0][k]),
                SHARED_AB => (wide[0][0][k], wide[0][1][k]),
                _ => (wide[v][0][k], wide[v][1][k]),
            };
            let mut on = if MODE == CROSS {
                simd.greater_than_u32s(key_a, key_b)
            } else {
                let enters = simd.greater_than_u32s(simd.xor_u32s(key_a, reads.mask), reads.threshold_a[v]);
                let stays = simd.less_than_or_equal_u32s(key_b, reads.threshold_b[v]);
                // inside ? stays : enters
                simd.xor_m32s(enters, simd.and_m32s(inside[v], simd.xor_m32s(enters, stays)))
            };
            if LEGAL {
                on = simd.and_m32s(on, simd.less_than_or_equal_u32s(reads.first[v], legal));
            }
            if MODE == BAND {
                inside[v] = on;
            }
            if !EARN {
                continue;
            }
            if packed::<S>() {
                history[k][v] = bits(on);
            } else {
                let changed = simd.xor_m32s(on, held[v]);
                held[v] = on;
                trades[v] = simd.add_u32s(trades[v], simd.select_u32s(changed, unit, simd.splat_u32s(0)));
            }
            // pay and earn: in, r − cost or r; out, −cost or 0
            let entry = simd.transmute_f32s_u32s(simd.xor_u32s(simd.transmute_u32s_f32s(owed[v]), fee_bits));
            let net = simd.select_f32s(on, simd.add_f32s(r, entry), owed[v]);
            owed[v] = simd.select_f32s(on, fee, zero);
            sum[v] = simd.add_f32s(sum[v], net);
            square[v] = simd.mul_add_f32s(net, net, square[v]);
            growth[v] = simd.mul_add_f32s(growth[v], net, growth[v]);
            level[v] = simd.mul_add_f32s(level[v], net, level[v]);
        }
        if EARN && rises {
            for v in 0..G {
                level[v] = simd.min_f32s(level[v], one);
            }
        }
    }
    if EARN {
        for v in 0..G {
            lowest[v] = simd.min_f32s(lowest[v], level[v]);
        }
    }
    for v in 0..G {
        (x.inside[v], x.held[v]) = (simd.select_f32s(inside[v], one, zero), simd.select_f32s(held[v], one, zero));
    }
    *x = Registers { inside: x.inside, held: x.held, owed, level, lowest, sum, square, growth, turnover: x.turnover, trades };
}

/// Bars of one span, direction times size. LEGAL: some lanes may still warm up.
#[inline(always)]
fn weighted<S: Simd, const KIND: u32, const LEGAL: bool, const G: usize>(
    simd: S,
    block: (&BacktestParams, &Market<'_>, Range<usize>),
    reads: &Reads<'_, S, G>,
    history: &mut History,
    x: &mut Registers<S, G>,
) {
    let (p, m, bars) = block;
    if bars.is_empty() {
        return;
    }
    let (zero, one, unit) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0), simd.splat_u32s(1));
    let fee = reads.fee;
    let (n, first, decided) = (bars.len(), bars.start - reads.base, bars.start - p.lag as usize);
    let returns = &m.returns[bars];
    let mut wide: [[&[S::u32s]; 2]; G] = [[&[]; 2]; G];
    for v in 0..if KIND == OWN { G } else { 1 } {
        wide[v][0] = vectors::<S>(reads.wide[v][0], first, n);
        if KIND != SHARED_A && KIND != SHARED_B {
            wide[v][1] = vectors::<S>(reads.wide[v][1], first, n);
        }
    }
    let tile = if KIND == SHARED_A || KIND == SHARED_B { &reads.tile[first..first + n] } else { &[] };
    let history = history.words(if packed::<S>() { n } else { 0 });
    let Registers { owed: mut weight, mut level, mut lowest, mut sum, mut square, mut growth, mut turnover, mut trades, .. } = *x;
    for k in 0..n {
        let r = simd.splat_f32s(returns[k]);
        let legal = simd.splat_u32s((decided + k) as u32);
        for v in 0..G {
            let (direction, size) = match KIND {
                SHARED_A | SHARED_B => (wide[0][0][k], simd.splat_u32s(tile[k][v])),
                SHARED_AB => (wide[0][0][k], wide[0][1][k]),
                _ => (wide[v][0][k], wide[v][1][k]),
            };
            let mut now = simd.mul_f32s(simd.transmute_f32s_u32s(direction), simd.transmute_f32s_u32s(size));
            if LEGAL {
                now = simd.select_f32s(simd.less_than_or_equal_u32s(reads.first[v], legal), now, zero);
            }
            let traded = simd.abs_f32s(simd.sub_f32s(now, weight[v]));
            weight[v] = now;
            turnover[v] = simd.add_f32s(turnover[v], traded);
            let trade = simd.greater_than_f32s(traded, zero);
            if packed::<S>() {
                history[k][v] = bits(trade);
            } else {
                trades[v] = simd.add_u32s(trades[v], simd.select_u32s(trade, unit, simd.splat_u32s(0)));
            }
            let net = simd.mul_add_f32s(now, r, simd.mul_f32s(fee, traded));
            sum[v] = simd.add_f32s(sum[v], net);
            square[v] = simd.mul_add_f32s(net, net, square[v]);
            growth[v] = simd.mul_add_f32s(growth[v], net, growth[v]);
            level[v] = simd.min_f32s(simd.mul_add_f32s(level[v], net, level[v]), one);
            lowest[v] = simd.min_f32s(lowest[v], level[v]);
        }
    }
    *x = Registers { inside: x.inside, held: x.held, owed: weight, level, lowest, sum, square, growth, turnover, trades };
}

// ---- directions and sizes ---------------------------------------------------------------------------------------------------

/// Directions of the momentum machine and sizes, as bits of reals: few of each, whatever the number of sets.
struct Weights {
    /// (side, lookback), a row of directions each.
    signals: Vec<(u32, u32)>,
    /// (volatility row or OFF, target, leverage), a row of sizes each.
    kinds: Vec<(u32, u32, u32)>,
    /// By the bar over which they are held.
    directions: Vec<u32>,
    sizes: Vec<u32>,
}

/// Most words of the tables.
const WEIGHTS: usize = 1 << 22;

impl Weights {
    /// None where the tables would not be small.
    fn of(words: &[u32], lag: usize, m: &Market<'_>) -> Option<Weights> {
        let mut signals: Vec<(u32, u32)> = words.chunks_exact(SET_WORDS).map(signal_of).collect();
        let mut kinds: Vec<(u32, u32, u32)> = words.chunks_exact(SET_WORDS).map(kind_of).collect();
        signals.sort_unstable();
        signals.dedup();
        kinds.sort_unstable();
        kinds.dedup();
        let bars = m.returns.len();
        if bars * (signals.len() + kinds.len()) > WEIGHTS {
            return None;
        }
        let (mut directions, mut sizes) = (vec![0; bars * signals.len()], vec![0; bars * kinds.len()]);
        for (j, (directions, sizes)) in directions.chunks_exact_mut(signals.len()).zip(sizes.chunks_exact_mut(kinds.len())).enumerate().skip(lag) {
            let now = m.close[j - lag];
            for (out, &(side, lookback)) in directions.iter_mut().zip(&signals) {
                let then = m.close[(j - lag).saturating_sub(lookback as usize)];
                let (up, down) = (f32::from(now > then && side != SHORT), f32::from(now < then && side != LONG));
                *out = (up - down).to_bits();
            }
            let inverse_volatility = &m.inverse_volatility[m.inverse_volatility.len().min((j - lag) * m.volatility_rows)..];
            for (out, &(row, target, leverage)) in sizes.iter_mut().zip(&kinds) {
                let size = |volatility: &u32| (f32::from_bits(target) * f32::from_bits(*volatility)).min(f32::from_bits(leverage));
                *out = inverse_volatility.get(row as usize).filter(|_| row != OFF).map_or(1.0, size).to_bits();
            }
        }
        Some(Weights { signals, kinds, directions, sizes })
    }

    /// Rows of the two tables that a set reads.
    fn rows(&self, set: &[u32]) -> [u32; 2] {
        let row = |at: std::result::Result<usize, usize>| at.unwrap_or(0) as u32;
        [row(self.signals.binary_search(&signal_of(set))), row(self.kinds.binary_search(&kind_of(set)))]
    }
}

fn signal_of(set: &[u32]) -> (u32, u32) {
    (set[5], set[1])
}

fn kind_of(set: &[u32]) -> (u32, u32, u32) {
    if set[8] == OFF { (OFF, 0, 0) } else { (set[8], set[6], set[7]) }
}

// ---- trades -----------------------------------------------------------------------------------------------------------------

/// Whether masks are 16 bits, one per lane: then they are stored bar by bar, and changes are counted bit by bit.
#[inline(always)]
const fn packed<S: Simd>() -> bool {
    size_of::<S::m32s>() == size_of::<u16>()
}

#[inline(always)]
fn bits<M: bytemuck::NoUninit>(mask: M) -> u16 {
    if size_of::<M>() == size_of::<u16>() { bytemuck::cast(mask) } else { 0 }
}

/// Bars whose directions are kept before they are counted.
const KEPT: usize = 4 * BLOCK;
/// Words of 64 bits in the widest vector.
const ROW: usize = 8;
/// Digits of a counter: a stretch has fewer than 2^DIGITS·ROW bars.
const DIGITS: usize = 10;

/// Directions of a group's lanes, 16 bits a vector and bar, and counts of their changes as binary digits: digit d of bit l in `digits[d]`.
struct History {
    /// The bar before, and those kept.
    words: Box<[u64; ROW + KEPT]>,
    n: usize,
    /// Whether changes from bar to bar count, or the bits themselves.
    changes: bool,
    digits: [[u64; ROW]; DIGITS],
}

/// Adds three digits: the sum's digit, and the carry.
#[inline(always)]
fn add_digits<S: Simd>(simd: S, a: S::u64s, b: S::u64s, c: S::u64s) -> (S::u64s, S::u64s) {
    let half = simd.xor_u64s(a, b);
    (simd.xor_u64s(half, c), simd.or_u64s(simd.and_u64s(a, b), simd.and_u64s(half, c)))
}

impl History {
    fn new() -> History {
        History { words: Box::new([0; ROW + KEPT]), n: 0, changes: true, digits: [[0; ROW]; DIGITS] }
    }

    /// A new group, whose directions were `before`.
    fn begin(&mut self, before: u64, changes: bool) {
        (self.words[ROW - 1], self.n, self.changes, self.digits) = (before, 0, changes, [[0; ROW]; DIGITS]);
    }

    /// Counts, if `bars` more would not fit.
    #[inline(always)]
    fn make_room<S: Simd>(&mut self, simd: S, bars: usize) {
        if packed::<S>() && self.n + bars > KEPT {
            self.count(simd);
        }
    }

    /// Words of the next n bars.
    #[inline(always)]
    fn words(&mut self, n: usize) -> &mut [[u16; MOST]] {
        let from = ROW + self.n;
        self.n += n;
        bytemuck::cast_slice_mut(&mut self.words[from..from + n])
    }

    /// Adds the changes of all kept bars to the counters.
    #[inline(always)]
    fn count<S: Simd>(&mut self, simd: S) {
        let last = self.words[ROW + self.n - 1];
        let n = self.n.next_multiple_of(8 * ROW);
        self.words[ROW + self.n..ROW + n].fill(if self.changes { last } else { 0 });
        let mut d = [simd.splat_u64s(0); DIGITS];
        for i in 0..DIGITS {
            d[i] = load_u64::<S>(&self.digits[i], 0);
        }
        for at in (ROW..ROW + n).step_by(8 * ROW) {
            let mut changed = [d[0]; 8];
            for i in 0..8 {
                let here = at + i * ROW;
                changed[i] = load_u64::<S>(&self.words[..], here);
                if self.changes {
                    changed[i] = simd.xor_u64s(changed[i], load_u64::<S>(&self.words[..], here - 1));
                }
            }
            let mut twos = [d[1]; 4];
            for i in 0..4 {
                (d[0], twos[i]) = add_digits(simd, d[0], changed[2 * i], changed[2 * i + 1]);
            }
            let (one, four_a) = add_digits(simd, d[1], twos[0], twos[1]);
            let (one, four_b) = add_digits(simd, one, twos[2], twos[3]);
            let (four, mut carry) = add_digits(simd, d[2], four_a, four_b);
            (d[1], d[2]) = (one, four);
            for i in 3..DIGITS {
                (d[i], carry) = (simd.xor_u64s(d[i], carry), simd.and_u64s(d[i], carry));
            }
        }
        for i in 0..DIGITS {
            S::as_mut_simd_u64s(&mut self.digits[i]).0[0] = d[i];
        }
        self.words[ROW - 1] = last;
        self.n = 0;
    }

    /// Adds the counts to those of each slot, and says which directions the group holds now.
    #[inline(always)]
    fn end<S: Simd>(&mut self, simd: S, group: &Group, trades: &mut [u32]) -> u64 {
        if self.n > 0 {
            self.count(simd);
        }
        for (v, &at) in group.at.iter().enumerate().take(group.vectors) {
            for (d, digit) in self.digits.iter().enumerate() {
                for word in digit.iter().map(|&word| (word >> (WIDEST * v)) as u32).filter(|word| word & 0xffff != 0) {
                    for (l, trades) in trades[at..at + WIDEST].iter_mut().enumerate() {
                        *trades += ((word >> l) & 1) << d;
                    }
                }
            }
        }
        self.words[ROW - 1]
    }
}

// ---- all others -------------------------------------------------------------------------------------------------------------

/// All groups of a job over the bars `from..to` of one block.
struct Block<'a> {
    p: &'a BacktestParams,
    m: &'a Market<'a>,
    sets: &'a Sets,
    groups: &'a [Group],
    state: &'a mut State,
    /// Taken out when the block begins.
    tiles: Option<&'a mut [Packed; 3]>,
    units: Units,
    from: usize,
    to: usize,
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        if let Some(tiles) = self.tiles.take() {
            general::block(&mut self, simd, tiles);
        }
    }
}

impl Block<'_> {
    /// Where a group begins: at its first legal bar, if nothing has to be known of earlier ones.
    fn begin(&self, first: usize) -> usize {
        let counted = if self.p.mode == BAND { 0 } else { self.p.start as usize };
        (first + self.p.lag as usize).max(counted).max(self.from)
    }
}

/// Shorts, sizes, stops and momentum: one vector at a time.
mod general {
    use super::*;

    #[inline(always)]
    pub(super) fn block<S: Simd>(block: &mut Block<'_>, simd: S, tiles: &mut [Packed; 3]) {
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
    fn groups<S: Simd, const MODE: u32, const STOPS: bool>(block: &mut Block<'_>, simd: S, tiles: &mut [Packed; 3]) {
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
        tiles: &mut [Packed; 3],
    ) {
        let (p, m, sets, lanes) = (block.p, block.m, block.sets, S::F32_LANES);
        let lag = p.lag as usize;
        // The first bar whose decision is known.
        let base = block.from.max(lag);
        let n = block.to - base;
        let any = at..at + lanes;
        let [pa, pb, pc] = tiles;
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
    let most = if p.general == 0 || p.mode == MOMENTUM { JOB_TILES } else { GENERAL_JOB_TILES };
    let run = (tiles * assets).div_ceil(rayon::current_num_threads()).clamp(1, most);
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
    let cost = p.cost + p.cost_low;
    // Levels stay above 0.
    let solvent = cost <= 1.0 && market.returns.iter().all(|r| r - cost >= -1.0);
    let plain = p.mode != MOMENTUM && solvent && words.chunks_exact(SET_WORDS).all(is_plain);
    let stops = words.chunks_exact(SET_WORDS).any(has_stops);
    let weights = if p.mode == MOMENTUM && !stops { Weights::of(words, p.lag as usize, market) } else { None };
    let weighted = weights.is_some();
    let word = |i: usize| -> Vec<u32> { words.iter().skip(i).step_by(SET_WORDS).copied().collect() };
    let (mut a, mut b) = (word(0), word(1));
    if let Some(weights) = &weights {
        (a, b) = words.chunks_exact(SET_WORDS).map(|set| weights.rows(set)).map(|[a, b]| (a, b)).unzip();
    }
    let most = if plain { MOST } else { 1 + usize::from(weighted) };
    let slots = arch.dispatch(Planner { a: &a, b: &b, first: &word(4), most });
    let mut lookbacks = if p.mode == MOMENTUM && !weighted { word(1) } else { Vec::new() };
    lookbacks.sort_unstable();
    lookbacks.dedup();
    let mut sets = Sets::of(words, &slots.order, lookbacks);
    if weighted {
        (sets.a, sets.b) = slots.order.iter().map(|&set| (a[set as usize], b[set as usize])).unzip();
    }
    let sets = sets;
    let mut state = State::new(slots.order.len(), slots.groups.len(), !plain && !weighted);
    let units = Units::of(p.shift as i32, scale);
    let spans = spans_of(edges, market.returns.len());
    if plain || weighted {
        let (mut packs, mut history) = (Packs::default(), History::new());
        for spans in stretches(&spans) {
            let (state, packs, history) = (&mut state, &mut packs, &mut history);
            let (m, sets, slots, weights, prefix) = (market, &sets, &slots, weights.as_ref(), &mut *job.prefix);
            arch.dispatch(Plain { p, m, sets, slots, state, packs, history, units, spans, edges: edges.len(), prefix, weights });
        }
    } else {
        let mut tiles = [[0u32; BLOCK * WIDEST]; 3];
        for &Span { from, to, edge } in &spans {
            if from < to {
                arch.dispatch(Block { p, m: market, sets: &sets, groups: &slots.groups, state: &mut state, tiles: Some(&mut tiles), units, from, to });
            }
            if let Some(edge) = edge {
                arch.dispatch(Edge { slots: &slots, state: &state, edge, edges: edges.len(), prefix: job.prefix });
            }
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
            (stats[3 * TILE + l], stats[4 * TILE + l]) = match (plain, weighted) {
                (true, _) => (trades, trades),
                (_, true) => (state.turnover[i], trades),
                _ => (state.turnover[i], state.trades[i] as f32),
            };
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
        /// Rows a repeat after so many sets, rows b go up.
        grid: Option<usize>,
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
            let row_a = o.grid.map_or_else(|| rows[i % rows.len()], |n| (i % n) as u32);
            let row_b = o.grid.map_or(w[1] % p.rows.min(20), |n| 20 + (i / n % 20) as u32);
            let head = [row_a, row_b, w[2] % 4, w[3] % 4, 20 + w[0] % 40, (w[0] >> 8) % o.sides, 0.1f32.to_bits(), 1.5f32.to_bits()];
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
                let o = Overlays { sides, sized, stops, grid: None };
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

    /// Vectors across runs, several stretches, runs that end inside a vector, levels below 0.
    #[test]
    fn grids_give_the_bits_of_the_plain_column() {
        for (n, tiles, lag, start, edges, cost) in
            [(19, 5, 1, 0, 6, 1e-3), (19, 4, 0, 300, 0, 1e-3), (17, 6, 0, 0, 6, 0.0), (20, 3, 0, 0, 6, 0.98), (40, 3, 1, 0, 6, 1e-3)]
        {
            for mode in [CROSS, BAND] {
                let p = BacktestParams {
                    a: 1,
                    t: 2900,
                    rows: 40,
                    tiles,
                    edges,
                    mode,
                    lag,
                    start,
                    shift: 49,
                    mask: u32::from(mode == BAND),
                    cost,
                    volatility_rows: 1,
                    ..bytemuck::Zeroable::zeroed()
                };
                let o = Overlays { sides: 1, sized: false, stops: false, grid: Some(n) };
                let plain = run(&PLAIN, &p, &[], o);
                let trades: f32 = plain.0.chunks_exact(TILE).skip(4).step_by(STATS).flatten().map(|&trades| f32::from_bits(trades)).sum();
                assert!(trades > 20_000.0, "few trades: {trades}");
                for (name, kernel) in [("lanes", &BACKTEST_SWEEP), ("scalar", &SCALAR)] {
                    let lanes = run(kernel, &p, &[], o);
                    let wrong = plain.0.iter().zip(&lanes.0).position(|(a, b)| a != b);
                    assert!(plain == lanes, "{name}, mode {mode}, rows of {n}, lag {lag}: stat {wrong:?}");
                }
            }
        }
    }

    #[test]
    fn ends_of_runs_go_across() {
        let (a, b): (Vec<u32>, Vec<u32>) = (0..1600).map(|i| (i % 100, 100 + i / 100)).unzip();
        let slots = Slots::of(&a, &b, &vec![0; 1600], 16, 4);
        assert_eq!(slots.order.len(), 1600);
        assert_eq!(slots.groups.iter().filter(|g| g.kind == SHARED_B).map(|g| g.vectors).sum::<usize>(), 4);
        let mut found = vec![0; 1600];
        for &(set, slot, n) in &slots.results {
            assert!((0..n).all(|i| slots.order[slot + i] as usize == set + i));
            found[set..set + n].iter_mut().for_each(|f| *f += 1);
        }
        assert!(found.iter().all(|&f| f == 1));
    }
}
