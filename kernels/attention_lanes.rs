//! The lane-wise f32 column of attention: explicit vectors of the widest kind that the processor has (AVX-512, AVX2, NEON, scalar), chosen at
//! run time.
//!
//! A block is two vectors of rows (queries, or keys in `backward_kv`), one row per lane; the rows of the other side are scalars. Products are
//! small matrix products of 4 scalars by 2 vectors, eight sums in registers: a tile of scores is other·blockᵀ, the results are
//! Σ score·other. Nothing is added across lanes. The other side of a head is copied once, padded, so that strides do not matter.
//!
//! Threads    one per item of the batch; batches of fewer than `FEW` items go by runs of `RUN` rows through a buffer.
//! Numerics   exp within 0.9 ulp (polynomial of degree 6); running maximum per tile of `TILE` steps.
//! Backward   one thread per head: queries in lanes, and the gradients of keys and values as products of the same tiles with the block's rows.
//! Ragged     keys beyond a length are neither copied nor counted. The rows in lanes are all there, so that a valid pair costs 1.1 of a dense one
//!            where rows see many keys (T 512) and 1.2 to 1.3 at T 63 (`forback bench attention_ragged`). Transposes by fours instead of one by one
//!            gave 0.6 ms for 0.8 forward at T 63, medians of eight runs each.
//! Bits       a row's bits depend on its own block alone, so on neither batch nor threads.

use crate::Result;
use crate::attention::{Inputs, MAX_WIDTH, NO_KEY, Shape, Strides, flag};
use crate::kernel::CpuLaunch;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Widest vector, and rows of the widest block.
const WIDEST: usize = 16;
const ROWS: usize = 2 * WIDEST;
/// Steps of a tile.
const TILE: usize = 64;
/// Scalars of a product.
const QUAD: usize = 4;
/// Batches below go by runs of rows.
const FEW: usize = 8;
/// Rows of such a run: a multiple of every block.
const RUN: usize = 256;
/// A row of zeros.
static NOTHING: [f32; MAX_WIDTH as usize] = [0.0; MAX_WIDTH as usize];
/// Scores below stand for pairs that are not allowed.
const BARRED: f32 = -9e29;
/// Reals that a thread keeps from one call to the next.
const KEPT: usize = 1 << 20;

thread_local! {
    static MEMORY: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;

    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
    }
}

// ---- what a head does -----------------------------------------------------------------------------------------------------

/// Which rows are in lanes, and what is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    Forward,
    Queries,
    Keys,
    /// Queries, and on the way the keys' gradients: scores are computed once.
    Both,
}

/// What a result is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    /// A row in lanes.
    Own,
    /// A key: its gradient, and that of its value.
    Key,
    Value,
}

/// A tensor of heads.
#[derive(Clone, Copy)]
struct Side<'a> {
    data: &'a [f32],
    strides: Strides,
}

impl<'a> Side<'a> {
    fn row(&self, b: usize, h: usize, i: usize, width: usize) -> &'a [f32] {
        &self.data[self.strides.at(b, h) + i * self.strides.row..][..width]
    }
}

/// A kernel's work: q·k on one side, grad_out·v on the other.
struct Work<'a> {
    arch: Arch,
    lanes: usize,
    pass: Pass,
    s: Shape,
    /// Rows in lanes: q, or k; grad_out, or v.
    own: [Side<'a>; 2],
    /// Rows as scalars: k, or q; v, or grad_out.
    other: [Side<'a>; 2],
    bias: &'a [f32],
    /// (lse, delta) of the queries; empty in forward.
    rows: &'a [f32],
    steps: usize,
    others: usize,
}

/// Arrays of a thread.
struct Memory<'m> {
    /// Padded rows of the other side [others, width].
    other: [&'m mut [f32]; 2],
    /// Transposed block [width, rows].
    own: [&'m mut [f32]; 2],
    /// Tiles of scores and of their gradients [TILE, rows].
    tile: [&'m mut [f32]; 2],
    /// Biases and dropout factors of a tile [TILE, rows].
    extra: [&'m mut [f32]; 2],
    /// Transposed sums [width, rows].
    sum: [&'m mut [f32]; 2],
    /// The block's rows, whole vectors [rows, wide], and the sums of keys and values [others, wide]; `Both` only.
    natural: [&'m mut [f32]; 2],
    keys: [&'m mut [f32]; 2],
    /// Results of a block [rows, results].
    result: &'m mut [f32],
}

impl<'a> Work<'a> {
    fn new(pass: Pass, s: Shape, x: [Side<'a>; 4], bias: &'a [f32], rows: &'a [f32]) -> Work<'a> {
        let arch = Arch::new();
        let [q, k, v, grad] = x;
        let (own, other) = if pass == Pass::Keys { ([k, v], [q, grad]) } else { ([q, grad], [k, v]) };
        let (steps, others) = if pass == Pass::Keys { (s.keys, s.queries) } else { (s.queries, s.keys) };
        Work { arch, lanes: arch.dispatch(Lanes), pass, s, own, other, bias, rows, steps, others }
    }

    /// Padded width.
    fn padded(&self) -> usize {
        self.s.width.next_multiple_of(QUAD)
    }

    /// Width in whole vectors.
    fn wide(&self) -> usize {
        self.s.width.next_multiple_of(self.lanes)
    }

    /// Reals of a result row.
    fn results(&self) -> usize {
        match self.pass {
            Pass::Forward => self.s.width + 1,
            Pass::Queries | Pass::Both => self.s.width,
            Pass::Keys => 2 * self.s.width,
        }
    }

    fn length(&self, b: usize, words: &[u32]) -> usize {
        if self.pass == Pass::Forward { self.s.length(words, b) } else { self.rows[b * self.s.p.record as usize] as usize }
    }

    fn others_of(&self, i: usize, length: usize) -> Range<usize> {
        if self.pass == Pass::Keys { self.s.queries_of(i, length) } else { self.s.keys_of(i, length) }
    }

    /// Computes rows of a head, and hands each result to `put`.
    fn head(&self, b: usize, h: usize, rows: Range<usize>, length: usize, mut put: impl FnMut(Of, usize, &[f32])) {
        let (block, padded, results) = (2 * self.lanes, self.padded(), self.results());
        let both = usize::from(self.pass == Pass::Both);
        let (natural, keys) = (both * ROWS * self.wide(), both * (self.others + QUAD) * self.wide());
        let sizes = [(self.others + QUAD) * padded, padded * block, TILE * block, TILE * block, padded * block, natural, keys];
        let total = 2 * sizes.iter().sum::<usize>() + ROWS * results + 16 * WIDEST;
        MEMORY.with_borrow_mut(|kept| {
            let mut memory = std::mem::take(kept);
            if memory.len() < total {
                memory.resize(total, 0.0);
            }
            let skip = memory.as_ptr().align_offset(4 * WIDEST).min(WIDEST);
            let mut rest = &mut memory[skip..];
            let mut next = |len: usize| {
                let (x, after) = std::mem::take(&mut rest).split_at_mut(len.next_multiple_of(WIDEST));
                rest = after;
                &mut x[..len]
            };
            let mut pair = |len: usize| [next(len), next(len)];
            let [other, own, tile, extra, sum, natural, keys] = sizes.map(&mut pair);
            let mut memory_of = Memory { other, own, tile, extra, sum, natural, keys, result: next(ROWS * results) };
            // Keys beyond the length are nobody's.
            let others = if self.pass == Pass::Keys { self.others } else { self.others.min(length) };
            self.copy_other(b, h, others, &mut memory_of);
            memory_of.keys.iter_mut().for_each(|x| x.fill(0.0));
            for first in rows.clone().step_by(block) {
                let n = block.min(rows.end - first);
                self.block(b, h, first, n, length, &mut memory_of);
                memory_of.result.chunks_exact(results).take(n).enumerate().for_each(|(i, x)| put(Of::Own, first + i, x));
            }
            for (of, x) in [Of::Key, Of::Value].into_iter().zip(&memory_of.keys) {
                x.chunks_exact(self.wide()).take(both * self.others).enumerate().for_each(|(j, x)| put(of, j, &x[..self.s.width]));
            }
            if memory.len() <= KEPT {
                *kept = memory;
            }
        });
    }

    fn copy_other(&self, b: usize, h: usize, others: usize, m: &mut Memory<'_>) {
        let (width, padded) = (self.s.width, self.padded());
        let scale = if self.pass == Pass::Keys { self.s.p.scale } else { 1.0 };
        for (n, (to, from)) in m.other.iter_mut().zip(&self.other).enumerate() {
            let factor = if n == 0 { scale } else { 1.0 };
            for (j, to) in to.chunks_exact_mut(padded).enumerate().take(others + QUAD) {
                to[width.min(padded)..].fill(0.0);
                if j < others {
                    to.iter_mut().zip(from.row(b, h, j, width)).for_each(|(to, &x)| *to = factor * x);
                } else {
                    to.fill(0.0);
                }
            }
        }
    }

    /// One block of rows.
    fn block(&self, b: usize, h: usize, first: usize, n: usize, length: usize, m: &mut Memory<'_>) {
        let (block, width) = (2 * self.lanes, self.s.width);
        let count = if self.pass == Pass::Forward { 1 } else { 2 };
        for (x, (to, from)) in m.own.iter_mut().zip(&self.own).take(count).enumerate() {
            let factor = if x == 0 && self.pass != Pass::Keys { self.s.p.scale } else { 1.0 };
            let row = |i: usize| if i < n { from.row(b, h, first + i, width) } else { &NOTHING[..width] };
            for i in (0..block).step_by(QUAD) {
                let rows = [row(i), row(i + 1), row(i + 2), row(i + 3)];
                let (quads, rest) = to[..width * block].split_at_mut(width / QUAD * QUAD * block);
                for (d, to) in quads.chunks_exact_mut(QUAD * block).enumerate() {
                    let four = rows.map(|row| quad_of(row, QUAD * d));
                    for (e, to) in to.chunks_exact_mut(block).enumerate() {
                        to[i..i + QUAD].copy_from_slice(&four.map(|row| factor * row[e]));
                    }
                }
                for (to, d) in rest.chunks_exact_mut(block).zip(width / QUAD * QUAD..) {
                    to[i..i + QUAD].copy_from_slice(&rows.map(|row| factor * row[d]));
                }
            }
        }
        if self.pass == Pass::Both {
            let wide = self.wide();
            for (x, (to, from)) in m.natural.iter_mut().zip(&self.own).enumerate() {
                let factor = if x == 0 { self.s.p.scale } else { 1.0 };
                for (i, to) in to.chunks_exact_mut(wide).enumerate() {
                    let row = if i < n { from.row(b, h, first + i, width) } else { &[] };
                    to[row.len()..].fill(0.0);
                    to.iter_mut().zip(row).for_each(|(to, &x)| *to = factor * x);
                }
            }
        }
        let mut state = State::new(n, |i| self.others_of(first + i, length));
        if matches!(self.pass, Pass::Queries | Pass::Both) {
            let at = self.s.rows_at(b, h) + 2 * first;
            for (i, own) in self.rows[at..at + 2 * n].chunks_exact(2).enumerate() {
                (state.lse[i], state.delta[i]) = (own[0], own[1]);
            }
        }
        m.sum[0].fill(0.0);
        m.sum[1].fill(0.0);
        for start in (state.any.start..state.any.end).step_by(TILE) {
            let steps = start..(start + TILE).min(state.any.end);
            self.extras(b, h, first, n, &steps, m);
            let masked = steps.start < state.all.start || steps.end > state.all.end;
            self.arch.dispatch(Tile { work: self, b, h, steps, masked, state: &mut state, m });
        }
        self.finish(n, &state, m);
    }

    /// Biases and dropout factors of a tile.
    fn extras(&self, b: usize, h: usize, first: usize, n: usize, steps: &Range<usize>, m: &mut Memory<'_>) {
        let block = 2 * self.lanes;
        let pair = |own: usize, other: usize| if self.pass == Pass::Keys { (other, own) } else { (own, other) };
        if self.s.has(flag::BIAS) {
            for (step, out) in steps.clone().zip(m.extra[0].chunks_exact_mut(block)) {
                for (i, out) in out.iter_mut().enumerate().take(n) {
                    let (i, j) = pair(first + i, step);
                    *out = self.bias[self.s.bias_at(b, h, i) + j];
                }
                out[n..].fill(0.0);
            }
        }
        if self.s.has(flag::DROPOUT) {
            for (step, out) in steps.clone().zip(m.extra[1].chunks_exact_mut(block)) {
                for (i, out) in out.iter_mut().enumerate().take(n) {
                    let (i, j) = pair(first + i, step);
                    *out = self.s.kept(b, h, i, j);
                }
                out[n..].fill(0.0);
            }
        }
    }

    /// Results of a block, by row.
    fn finish(&self, n: usize, state: &State, m: &mut Memory<'_>) {
        let (block, width) = (2 * self.lanes, self.s.width);
        let results = self.results();
        let scale = |i: usize| match self.pass {
            Pass::Forward if state.total[i] != 0.0 => 1.0 / state.total[i],
            Pass::Forward => 0.0,
            Pass::Queries | Pass::Both => self.s.p.scale,
            // The scalars were scale·q.
            Pass::Keys => 1.0,
        };
        for (x, sum) in m.sum.iter().enumerate().take(if self.pass == Pass::Keys { 2 } else { 1 }) {
            for i in (0..n.next_multiple_of(QUAD)).step_by(QUAD) {
                let factors = [scale(i), scale(i + 1), scale(i + 2), scale(i + 3)];
                for d in (0..width / QUAD * QUAD).step_by(QUAD) {
                    let four = [0, 1, 2, 3].map(|e| quad_of(sum, (d + e) * block + i));
                    for (r, factor) in factors.into_iter().enumerate() {
                        m.result[(i + r) * results + x * width + d..][..QUAD].copy_from_slice(&four.map(|column| factor * column[r]));
                    }
                }
                for d in width / QUAD * QUAD..width {
                    for (r, factor) in factors.into_iter().enumerate() {
                        m.result[(i + r) * results + x * width + d] = factor * sum[d * block + i + r];
                    }
                }
            }
        }
        if self.pass == Pass::Forward {
            for (i, out) in m.result.chunks_exact_mut(results).take(n).enumerate() {
                out[width] = if state.total[i] != 0.0 { state.most[i] + state.total[i].ln() } else { NO_KEY as f32 };
            }
        }
    }
}

/// What a block carries from tile to tile, and what its rows may see.
struct State {
    most: [f32; ROWS],
    total: [f32; ROWS],
    lse: [f32; ROWS],
    delta: [f32; ROWS],
    /// Steps from … to of each row.
    from: [f32; ROWS],
    to: [f32; ROWS],
    /// Steps that any row may see, and those that all may see.
    any: Range<usize>,
    all: Range<usize>,
}

impl State {
    #[allow(clippy::reversed_empty_ranges, reason = "the neutral start of a union of ranges")]
    fn new(n: usize, steps: impl Fn(usize) -> Range<usize>) -> State {
        let of = |x: f32| [x; ROWS];
        let mut state =
            State { most: of(NO_KEY as f32), total: of(0.0), lse: of(0.0), delta: of(0.0), from: of(0.0), to: of(0.0), any: usize::MAX..0, all: 0..usize::MAX };
        for i in 0..n {
            let steps = steps(i);
            (state.from[i], state.to[i]) = (steps.start as f32, steps.end as f32);
            state.all = state.all.start.max(steps.start)..state.all.end.min(steps.end);
            if !steps.is_empty() {
                state.any = state.any.start.min(steps.start)..state.any.end.max(steps.end);
            }
        }
        // Lanes without a row see what the last sees; nobody reads them.
        for i in n.max(1)..ROWS {
            (state.from[i], state.to[i]) = (state.from[n - 1], state.to[n - 1]);
        }
        if state.any.is_empty() {
            state.any = 0..0;
        }
        state
    }
}

// ---- one tile -----------------------------------------------------------------------------------------------------------------

struct Tile<'t, 'a, 'm> {
    work: &'t Work<'a>,
    b: usize,
    h: usize,
    steps: Range<usize>,
    masked: bool,
    state: &'t mut State,
    m: &'t mut Memory<'m>,
}

impl WithSimd for Tile<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (width, padded) = (self.work.s.width, self.work.padded());
        let rows = self.steps.start * padded..(self.steps.start + self.steps.len().next_multiple_of(QUAD)) * padded;
        let Memory { other, own, tile, extra, sum, natural, keys, .. } = self.m;
        let [other_a, other_b] = [&other[0][rows.clone()], &other[1][rows]];
        let [own_a, own_b] = [&own[0], &own[1]].map(|x| S::as_simd_f32s(x).0);
        let [tile_a, tile_b] = tile.each_mut().map(|x| S::as_mut_simd_f32s(x).0);
        let [bias, kept] = [&extra[0], &extra[1]].map(|x| S::as_simd_f32s(x).0);
        let [sum_a, sum_b] = sum.each_mut().map(|x| S::as_mut_simd_f32s(x).0);
        let s = &self.work.s;
        scores(simd, own_a, other_a, width, padded, tile_a);
        if s.has(flag::BIAS) {
            for (x, &bias) in tile_a.iter_mut().zip(bias).take(2 * self.steps.len()) {
                let added = simd.add_f32s(*x, bias);
                *x = simd.select_f32s(simd.less_than_or_equal_f32s(bias, simd.splat_f32s(-1e29)), simd.splat_f32s(NO_KEY as f32), added);
            }
        }
        let barred = self.masked || s.has(flag::BIAS);
        if self.masked {
            let [from, to] = [&self.state.from, &self.state.to].map(|x| lanes_of(simd, x));
            for (step, x) in self.steps.clone().zip(tile_a.chunks_exact_mut(2)) {
                let at = simd.splat_f32s(step as f32);
                for l in 0..2 {
                    let inside = simd.and_m32s(simd.less_than_or_equal_f32s(from[l], at), simd.less_than_f32s(at, to[l]));
                    x[l] = simd.select_f32s(inside, x[l], simd.splat_f32s(NO_KEY as f32));
                }
            }
        }
        let tile_a = &mut tile_a[..2 * self.steps.len()];
        let tile_b = &mut tile_b[..2 * self.steps.len().next_multiple_of(QUAD)];
        let kept = s.has(flag::DROPOUT).then_some(kept);
        if self.work.pass == Pass::Forward {
            softmax(simd, tile_a, barred, self.state, sum_a);
            if let Some(kept) = kept {
                tile_a.iter_mut().zip(kept).for_each(|(x, &kept)| *x = simd.mul_f32s(*x, kept));
            }
            accumulate(simd, tile_a, other_b, padded, sum_a);
            return;
        }
        scores(simd, own_b, other_b, width, padded, tile_b);
        if let Some(kept) = kept {
            tile_b.iter_mut().zip(kept).for_each(|(x, &kept)| *x = simd.mul_f32s(*x, kept));
        }
        let [mut lse, mut delta] = [&self.state.lse, &self.state.delta].map(|x| lanes_of(simd, x));
        let by_key = self.work.pass == Pass::Keys;
        let at = if by_key { s.rows_at(self.b, self.h) + 2 * self.steps.start } else { 0 };
        let rows = if by_key { &self.work.rows[at..at + 2 * self.steps.len()] } else { &[] };
        let mut own_rows = rows.chunks_exact(2);
        for (x, y) in tile_a.chunks_exact_mut(2).zip(tile_b.chunks_exact_mut(2)) {
            if let Some(own) = own_rows.next() {
                lse = [simd.splat_f32s(own[0]); 2];
                delta = [simd.splat_f32s(own[1]); 2];
            }
            for l in 0..2 {
                let mut p = exp(simd, simd.sub_f32s(x[l], lse[l]));
                let mut ds = simd.mul_f32s(p, simd.sub_f32s(y[l], delta[l]));
                if barred {
                    let out = simd.less_than_f32s(x[l], simd.splat_f32s(BARRED));
                    p = simd.select_f32s(out, simd.splat_f32s(0.0), p);
                    ds = simd.select_f32s(out, simd.splat_f32s(0.0), ds);
                }
                (x[l], y[l]) = (p, ds);
            }
        }
        let tile_b = &tile_b[..2 * self.steps.len()];
        accumulate(simd, tile_b, other_a, padded, sum_a);
        if self.work.pass == Pass::Queries {
            return;
        }
        if let Some(kept) = kept {
            tile_a.iter_mut().zip(kept).for_each(|(x, &kept)| *x = simd.mul_f32s(*x, kept));
        }
        if by_key {
            accumulate(simd, tile_a, other_b, padded, sum_b);
            return;
        }
        let (block, wide) = (2 * self.work.lanes, self.work.wide());
        let used = self.steps.len() * block..self.steps.len().next_multiple_of(QUAD) * block;
        // ds with q, p with grad_out
        for ((tile, natural), keys) in tile.iter_mut().rev().zip(natural.iter()).zip(keys.iter_mut()) {
            // Of the last four steps, those that are not there.
            tile[used.clone()].fill(0.0);
            let keys = &mut keys[self.steps.start * wide..][..used.end / block * wide];
            outer(simd, &tile[..used.end], S::as_simd_f32s(natural).0, S::as_mut_simd_f32s(keys).0, block, wide / self.work.lanes);
        }
    }
}

/// Four values from `at` on.
#[inline(always)]
fn quad_of(x: &[f32], at: usize) -> [f32; QUAD] {
    let x = &x[at..at + QUAD];
    [x[0], x[1], x[2], x[3]]
}

#[inline(always)]
fn lanes_of<S: Simd>(simd: S, x: &[f32; ROWS]) -> [S::f32s; 2] {
    let x = S::as_simd_f32s(x).0;
    if x.len() >= 2 { [x[0], x[1]] } else { [simd.splat_f32s(0.0); 2] }
}

/// tile[j] = Σ_d other[j,d]·own[d]
#[inline(always)]
fn scores<S: Simd>(simd: S, own: &[S::f32s], other: &[f32], width: usize, padded: usize, tile: &mut [S::f32s]) {
    let own = &own[..2 * width];
    for (rows, out) in other.chunks_exact(QUAD * padded).zip(tile.chunks_exact_mut(2 * QUAD)) {
        let (r0, rest) = rows.split_at(padded);
        let (r1, rest) = rest.split_at(padded);
        let (r2, r3) = rest.split_at(padded);
        let mut sum = [[simd.splat_f32s(0.0); 2]; QUAD];
        for ((((own, &x0), &x1), &x2), &x3) in own.chunks_exact(2).zip(r0).zip(r1).zip(r2).zip(r3) {
            for (sum, x) in sum.iter_mut().zip([x0, x1, x2, x3]) {
                let x = simd.splat_f32s(x);
                sum[0] = simd.mul_add_f32s(x, own[0], sum[0]);
                sum[1] = simd.mul_add_f32s(x, own[1], sum[1]);
            }
        }
        for (out, sum) in out.chunks_exact_mut(2).zip(sum) {
            out.copy_from_slice(&sum);
        }
    }
}

/// sum[d] += Σ_j other[j,d]·tile[j]
#[inline(always)]
fn accumulate<S: Simd>(simd: S, tile: &[S::f32s], other: &[f32], padded: usize, sum: &mut [S::f32s]) {
    for (d, sum) in sum.chunks_exact_mut(2 * QUAD).enumerate() {
        let mut x: [[S::f32s; 2]; QUAD] = std::array::from_fn(|n| [sum[2 * n], sum[2 * n + 1]]);
        for (row, p) in other.chunks_exact(padded).zip(tile.chunks_exact(2)) {
            let row = &row[QUAD * d..][..QUAD];
            for n in 0..QUAD {
                let factor = simd.splat_f32s(row[n]);
                x[n][0] = simd.mul_add_f32s(factor, p[0], x[n][0]);
                x[n][1] = simd.mul_add_f32s(factor, p[1], x[n][1]);
            }
        }
        for (sum, x) in sum.chunks_exact_mut(2).zip(x) {
            sum.copy_from_slice(&x);
        }
    }
}

/// keys[j] += Σ_i tile[j,i]·natural[i], rows of `vectors` vectors
#[inline(always)]
fn outer<S: Simd>(simd: S, tile: &[f32], natural: &[S::f32s], keys: &mut [S::f32s], block: usize, vectors: usize) {
    for first in (0..vectors).step_by(2) {
        if first + 2 <= vectors {
            outer_vectors::<S, 2>(simd, tile, natural, keys, block, vectors, first);
        } else {
            outer_vectors::<S, 1>(simd, tile, natural, keys, block, vectors, first);
        }
    }
}

#[inline(always)]
fn outer_vectors<S: Simd, const N: usize>(simd: S, tile: &[f32], natural: &[S::f32s], keys: &mut [S::f32s], block: usize, vectors: usize, first: usize) {
    for (rows, out) in tile.chunks_exact(QUAD * block).zip(keys.chunks_exact_mut(QUAD * vectors)) {
        let (r0, rest) = rows.split_at(block);
        let (r1, rest) = rest.split_at(block);
        let (r2, r3) = rest.split_at(block);
        let mut sum = [[simd.splat_f32s(0.0); N]; QUAD];
        for ((((row, &x0), &x1), &x2), &x3) in natural.chunks_exact(vectors).zip(r0).zip(r1).zip(r2).zip(r3) {
            let row = &row[first..first + N];
            for (sum, x) in sum.iter_mut().zip([x0, x1, x2, x3]) {
                let x = simd.splat_f32s(x);
                for n in 0..N {
                    sum[n] = simd.mul_add_f32s(x, row[n], sum[n]);
                }
            }
        }
        for (out, sum) in out.chunks_exact_mut(vectors).zip(sum) {
            for (out, sum) in out[first..first + N].iter_mut().zip(sum) {
                *out = simd.add_f32s(*out, sum);
            }
        }
    }
}

/// Scores to weights relative to the running maximum; rescales what was summed before.
#[inline(always)]
fn softmax<S: Simd>(simd: S, tile: &mut [S::f32s], barred: bool, state: &mut State, sum: &mut [S::f32s]) {
    let before = lanes_of(simd, &state.most);
    let mut most = before;
    for x in tile.chunks_exact(2) {
        most = [simd.max_f32s(x[0], most[0]), simd.max_f32s(x[1], most[1])];
    }
    // No closure: one would be compiled without the vectors' instructions.
    let factor = [exp(simd, simd.sub_f32s(before[0], most[0])), exp(simd, simd.sub_f32s(before[1], most[1]))];
    let mut total = lanes_of(simd, &state.total);
    total = [simd.mul_f32s(total[0], factor[0]), simd.mul_f32s(total[1], factor[1])];
    for x in sum.chunks_exact_mut(2) {
        x[0] = simd.mul_f32s(x[0], factor[0]);
        x[1] = simd.mul_f32s(x[1], factor[1]);
    }
    for x in tile.chunks_exact_mut(2) {
        for l in 0..2 {
            let mut p = exp(simd, simd.sub_f32s(x[l], most[l]));
            if barred {
                p = simd.select_f32s(simd.less_than_f32s(x[l], simd.splat_f32s(BARRED)), simd.splat_f32s(0.0), p);
            }
            x[l] = p;
            total[l] = simd.add_f32s(total[l], p);
        }
    }
    S::as_mut_simd_f32s(&mut state.most).0[..2].copy_from_slice(&most);
    S::as_mut_simd_f32s(&mut state.total).0[..2].copy_from_slice(&total);
}

/// e^x for x ≤ 88; 0 below −87.
#[inline(always)]
fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    const P: [f32; 5] = [0.499_999_94, 0.166_665_22, 0.041_668_39, 0.008_368_717, 0.001_381_46];
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and taking away 1.5·2^23 rounds to a whole number, which lies in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let shifted = simd.mul_add_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E), simd.splat_f32s(ROUND));
    let n = simd.sub_f32s(shifted, simd.splat_f32s(ROUND));
    let r = simd.mul_add_f32s(n, simd.splat_f32s(-LN2_HIGH), x);
    let r = simd.mul_add_f32s(n, simd.splat_f32s(-LN2_LOW), r);
    let mut p = simd.splat_f32s(P[4]);
    for c in [P[3], P[2], P[1], P[0], 1.0, 1.0] {
        p = simd.mul_add_f32s(p, r, simd.splat_f32s(c));
    }
    let power = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    let y = simd.transmute_f32s_u32s(simd.add_u32s(power, simd.transmute_u32s_f32s(p)));
    // A NaN stays one.
    simd.select_f32s(simd.less_than_f32s(x, simd.splat_f32s(-87.0)), simd.splat_f32s(0.0), y)
}

/// Σ a·b in eight sums, which the compiler makes vectors.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    const N: usize = 8;
    let mut sums = [0f32; N];
    let (mut left, mut right) = (a.chunks_exact(N), b.chunks_exact(N));
    for (a, b) in (&mut left).zip(&mut right) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(left.remainder()).zip(right.remainder()) {
        *sum += a * b;
    }
    let [a, b, c, d, e, f, g, h] = sums;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

// ---- kernels --------------------------------------------------------------------------------------------------------------------

/// All rows of a small batch through a buffer: `put` sees every result.
fn by_runs(work: &Work<'_>, words: &[u32], mut put: impl FnMut(usize, usize, usize, &[f32])) {
    let (s, results) = (&work.s, work.results());
    let runs = work.steps.div_ceil(RUN);
    let mut buffer = vec![0.0; s.batch * s.heads * runs * RUN * results];
    buffer.par_chunks_exact_mut(RUN * results).enumerate().for_each(|(n, out)| {
        let (run, h, b) = (n % runs, n / runs % s.heads, n / runs / s.heads);
        let rows = run * RUN..((run + 1) * RUN).min(work.steps);
        let first = rows.start;
        work.head(b, h, rows, work.length(b, words), |_, i, x| out[(i - first) * results..][..results].copy_from_slice(x));
    });
    for (n, out) in buffer.chunks_exact(RUN * results).enumerate() {
        let (run, h, b) = (n % runs, n / runs % s.heads, n / runs / s.heads);
        let rows = RUN.min(work.steps - run * RUN);
        out.chunks_exact(results).take(rows).enumerate().for_each(|(i, x)| put(b, h, run * RUN + i, x));
    }
}

pub(crate) fn attention_forward(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let mut s = Shape::of(launch.params()?);
    let (q, k, v, bias, words) = (launch.real()?, launch.real()?, launch.real()?, launch.real()?, launch.word()?);
    s.step = launch.word()?[0];
    let (out, lse) = (launch.real_mut()?, launch.real_mut()?);
    let side = |data, strides| Side { data, strides };
    let sides = [side(q, s.q), side(k, s.k), side(v, s.v), side(&[], s.out)];
    let (work, width) = (Work::new(Pass::Forward, s, sides, bias, &[]), s.width);
    let local = |h: usize, i: usize| s.out.at(0, h) + i * s.out.row;
    if s.batch < FEW {
        by_runs(&work, words, |b, h, i, x| {
            out[b * s.out.batch + local(h, i)..][..width].copy_from_slice(&x[..width]);
            lse[(b * s.heads + h) * s.queries + i] = x[width];
        });
        return Ok(());
    }
    let items = out.par_chunks_exact_mut(s.out.batch.max(1)).zip(lse.par_chunks_exact_mut((s.heads * s.queries).max(1)));
    items.enumerate().take(s.batch).for_each(|(b, (out, lse))| {
        for h in 0..s.heads {
            work.head(b, h, 0..s.queries, work.length(b, words), |_, i, x| {
                out[local(h, i)..][..width].copy_from_slice(&x[..width]);
                lse[h * s.queries + i] = x[width];
            });
        }
    });
    Ok(())
}

fn backward<'a>(pass: Pass, x: &Inputs<'a, f32>) -> Work<'a> {
    let side = |data, strides| Side { data, strides };
    let s = x.shape;
    Work::new(pass, s, [side(x.q, s.q), side(x.k, s.k), side(x.v, s.v), side(x.grad_out, s.out)], x.bias, x.rows)
}

pub(crate) fn attention_backward_q(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let x = Inputs::of(&mut launch)?;
    let (s, grad_q) = (x.shape, launch.real_mut()?);
    let (work, width) = (backward(Pass::Queries, &x), s.width);
    let local = |h: usize, i: usize| s.q.at(0, h) + i * s.q.row;
    if s.batch < FEW {
        by_runs(&work, &[], |b, h, i, x| grad_q[b * s.q.batch + local(h, i)..][..width].copy_from_slice(x));
        return Ok(());
    }
    grad_q.par_chunks_exact_mut(s.q.batch.max(1)).enumerate().take(s.batch).for_each(|(b, grad_q)| {
        for h in 0..s.heads {
            work.head(b, h, 0..s.queries, work.length(b, &[]), |_, i, x| grad_q[local(h, i)..][..width].copy_from_slice(x));
        }
    });
    Ok(())
}

pub(crate) fn attention_backward_kv(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let x = Inputs::of(&mut launch)?;
    let (s, grad_k, grad_v) = (x.shape, launch.real_mut()?, launch.real_mut()?);
    let (work, width) = (backward(Pass::Keys, &x), s.width);
    let local = |strides: &Strides, h: usize, j: usize| strides.at(0, h) + j * strides.row;
    if s.batch < FEW {
        by_runs(&work, &[], |b, h, j, x| {
            grad_k[b * s.k.batch + local(&s.k, h, j)..][..width].copy_from_slice(&x[..width]);
            grad_v[b * s.v.batch + local(&s.v, h, j)..][..width].copy_from_slice(&x[width..]);
        });
        return Ok(());
    }
    let items = grad_k.par_chunks_exact_mut(s.k.batch.max(1)).zip(grad_v.par_chunks_exact_mut(s.v.batch.max(1)));
    items.enumerate().take(s.batch).for_each(|(b, (grad_k, grad_v))| {
        for h in 0..s.heads {
            work.head(b, h, 0..s.keys, work.length(b, &[]), |_, j, x| {
                grad_k[local(&s.k, h, j)..][..width].copy_from_slice(&x[..width]);
                grad_v[local(&s.v, h, j)..][..width].copy_from_slice(&x[width..]);
            });
        }
    });
    Ok(())
}

pub(crate) fn attention_backward_kv_packed(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let x = Inputs::of(&mut launch)?;
    let (s, grad_kv) = (x.shape, launch.real_mut()?);
    let (work, width) = (backward(Pass::Keys, &x), s.width);
    let put = |grad_kv: &mut [f32], h: usize, j: usize, x: &[f32]| {
        if s.has(flag::GRAD_K) {
            grad_kv[s.k.at(0, h) + j * s.k.row..][..width].copy_from_slice(&x[..width]);
        }
        if s.has(flag::GRAD_V) {
            grad_kv[s.v.at(0, h) + j * s.v.row..][..width].copy_from_slice(&x[width..]);
        }
    };
    let strides = if s.has(flag::GRAD_K) { s.k } else { s.v };
    if s.batch < FEW {
        by_runs(&work, &[], |b, h, j, x| put(&mut grad_kv[b * strides.batch..], h, j, x));
        return Ok(());
    }
    grad_kv.par_chunks_exact_mut(strides.batch.max(1)).enumerate().take(s.batch).for_each(|(b, grad_kv)| {
        for h in 0..s.heads {
            work.head(b, h, 0..s.keys, work.length(b, &[]), |_, j, x| put(grad_kv, h, j, x));
        }
    });
    Ok(())
}

/// All gradients of a head through a buffer: those of q, of k, of v.
fn by_heads(work: &Work<'_>, mut put: impl FnMut(Of, usize, usize, usize, &[f32])) {
    let (s, width) = (&work.s, work.s.width);
    let mut buffer = vec![0.0; s.batch * s.heads * (s.queries + 2 * s.keys) * width];
    let starts = |of: Of| match of {
        Of::Own => 0,
        Of::Key => s.queries,
        Of::Value => s.queries + s.keys,
    };
    let head = (s.queries + 2 * s.keys) * width;
    buffer.par_chunks_exact_mut(head).enumerate().for_each(|(n, out)| {
        let (b, h) = (n / s.heads, n % s.heads);
        work.head(b, h, 0..s.queries, work.length(b, &[]), |of, i, x| out[(starts(of) + i) * width..][..width].copy_from_slice(x));
    });
    for (n, out) in buffer.chunks_exact(head).enumerate() {
        for (i, x) in out.chunks_exact(width).enumerate() {
            let of = if i < s.queries {
                Of::Own
            } else if i < s.queries + s.keys {
                Of::Key
            } else {
                Of::Value
            };
            put(of, n / s.heads, n % s.heads, i - starts(of), x);
        }
    }
}

/// Strides of what a result is of.
fn strides_of(s: &Shape, of: Of) -> &Strides {
    match of {
        Of::Own => &s.q,
        Of::Key => &s.k,
        Of::Value => &s.v,
    }
}

pub(crate) fn attention_backward(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let x = Inputs::of(&mut launch)?;
    let (s, grad_q, grad_k, grad_v) = (x.shape, launch.real_mut()?, launch.real_mut()?, launch.real_mut()?);
    let (work, width) = (backward(Pass::Both, &x), s.width);
    let local = |of: Of, h: usize, i: usize| strides_of(&s, of).at(0, h) + i * strides_of(&s, of).row;
    if s.batch < FEW {
        by_heads(&work, |of, b, h, i, x| {
            let to = match of {
                Of::Own => &mut *grad_q,
                Of::Key => &mut *grad_k,
                Of::Value => &mut *grad_v,
            };
            to[b * strides_of(&s, of).batch + local(of, h, i)..][..width].copy_from_slice(x);
        });
        return Ok(());
    }
    let keys = grad_k.par_chunks_exact_mut(s.k.batch.max(1)).zip(grad_v.par_chunks_exact_mut(s.v.batch.max(1)));
    grad_q.par_chunks_exact_mut(s.q.batch.max(1)).zip(keys).enumerate().take(s.batch).for_each(|(b, (grad_q, (grad_k, grad_v)))| {
        for h in 0..s.heads {
            work.head(b, h, 0..s.queries, work.length(b, &[]), |of, i, x| {
                let to = match of {
                    Of::Own => &mut *grad_q,
                    Of::Key => &mut *grad_k,
                    Of::Value => &mut *grad_v,
                };
                to[local(of, h, i)..][..width].copy_from_slice(x);
            });
        }
    });
    Ok(())
}

pub(crate) fn attention_backward_packed(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let x = Inputs::of(&mut launch)?;
    let (s, grad) = (x.shape, launch.real_mut()?);
    let (work, width) = (backward(Pass::Both, &x), s.width);
    let local = |of: Of, h: usize, i: usize| strides_of(&s, of).at(0, h) + i * strides_of(&s, of).row;
    if s.batch < FEW {
        by_heads(&work, |of, b, h, i, x| grad[b * s.q.batch + local(of, h, i)..][..width].copy_from_slice(x));
        return Ok(());
    }
    grad.par_chunks_exact_mut(s.q.batch.max(1)).enumerate().take(s.batch).for_each(|(b, grad)| {
        for h in 0..s.heads {
            work.head(b, h, 0..s.queries, work.length(b, &[]), |of, i, x| grad[local(of, h, i)..][..width].copy_from_slice(x));
        }
    });
    Ok(())
}
