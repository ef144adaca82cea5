//! The lane-wise f32 column of `hmm_forward_backward`: one sequence per lane, explicit vectors of the widest kind that the processor has
//! (AVX-512, AVX2, NEON, scalar), chosen at run time. The plain column is `scaled` in `hmm.rs`.
//!
//! Layout   a tile is as many sequences as a vector has lanes. Rows [T,·] are transposed block by block into [T,·,lane].
//! Forward  m(t) = max_j log b(t,j);  b(t,j) = exp(log b(t,j) − m(t))·2^−e(t−1);  α(t,j) = Σ_i α(t−1,i)·A(i,j) · b(t,j);  s(t) = Σ_j α(t,j).
//!          e(t) is the exponent of s(t): scaling by it is exact, lags one step (off the dependent chain) and costs no logarithm.
//!          log-likelihood = Σ m (compensated) + ln 2·Σ e (an integer) + ln s(T−1).
//! Backward u(t,j) = b(t,j)·β(t,j);  β(t,i) = Σ_j A(i,j)·u(t+1,j): b holds forward's scale, so Σ_i α(t,i)·β(t,i) stays near s(T−1), and its
//!          reciprocal normalises posterior and pair posterior. u is capped: in a state that cannot be reached it may grow without end.
//! Driven   A that changes with time is K² exponentials a step: computed once, in forward, and kept for backward with b and α.
//! Memory   b and α of a tile stay in the second-level cache (T = 1,000, K = 4, 16 lanes: 512 KB), with A of each step in the third (1.5 MB);
//!          longer sequences go in segments: forward keeps α at their starts, backward computes one segment after the other again.
//! Numerics exp within 0.9 ulp (polynomial of degree 6). A sequence whose sums fall below 2^−96 is impossible or out of f32's range: the
//!          plain column, which can shift a step again, does that one.
//! Bits     every operation is per lane: a sequence's bits depend neither on its lane nor on its neighbours.
//! Floor    B 4,096, T 1,000, K 4: 131 MB in and out, 6.6 ms at 20 GB/s.

use crate::hmm::{Batch, IMPOSSIBLE, LEAST, SequenceOut, flag, scaled};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Widest vector.
const WIDEST: usize = 16;
/// Vectors of b and α that a segment may hold: 640 KB of 16 lanes.
const STORED: usize = 10_240;
/// Vectors of b, α and A of each step that a segment may hold: 5 MB of 16 lanes.
const STORED_MATRICES: usize = 81_920;
/// Vectors of log b that a block should hold: 16 KB of 16 lanes.
const BLOCK: usize = 256;
/// States up to which loops over them are unrolled.
const UNROLLED: usize = 8;
/// Below 2^−96 a sum has lost too much.
const SMALLEST: f32 = 1.262_177_4e-29;
/// Cap on u: 2^100.
const LARGEST: f32 = 1.267_650_6e30;
/// Bits of an exponent, and of the sum of two exponents that cancel.
const EXPONENT: u32 = 0x7f80_0000;
const TWICE_ONE: u32 = 0x7f00_0000;

/// One value per lane.
type Lane<T> = [T; WIDEST];

/// Runs every sequence of a batch.
pub(crate) fn forward_backward(batch: &Batch<'_, f32>, outs: &mut [SequenceOut<'_, f32>]) {
    on(Arch::new(), batch, outs);
}

fn on(arch: Arch, batch: &Batch<'_, f32>, outs: &mut [SequenceOut<'_, f32>]) {
    let plan = Plan::of(arch, batch);
    let tiles = outs.par_chunks_mut(plan.lanes).enumerate();
    tiles.for_each(|(i, outs)| plan.in_memory(batch, |memory| plan.tile(batch, i * plan.lanes, outs, memory)));
}

/// Memory that a thread keeps from one call to the next: 2 M reals. Fresh pages cost more than the work on them.
const KEPT: usize = 1 << 21;

thread_local! {
    static MEMORY: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

// ---- sizes and memory -----------------------------------------------------------------------------------------------------

struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;

    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
    }
}

/// What all tiles share.
struct Plan {
    arch: Arch,
    lanes: usize,
    k: usize,
    /// Steps of a block, and of a segment.
    block: usize,
    segment: usize,
    segments: usize,
    /// Whether A changes with time, and whether scalars serve all lanes.
    varying: bool,
    scalars: bool,
    backward: bool,
    pair_sum: bool,
    pair_steps: bool,
    /// Whether observations become log b in lanes, here.
    gaussian: bool,
}

impl Plan {
    fn of(arch: Arch, batch: &Batch<'_, f32>) -> Plan {
        let (t, k) = (batch.p.t as usize, batch.p.k as usize);
        let backward = batch.has(flag::POSTERIOR | flag::PAIR_SUM | flag::PAIR_STEPS);
        let block = (BLOCK / k).max(1);
        let block = if block > 16 { block / 16 * 16 } else { block }.min(t);
        let varying = batch.has(flag::SOFTMAX | flag::TRANS_STEP);
        let (stored, each) = if varying { (STORED_MATRICES, 2 * k + k * k) } else { (STORED, 2 * k) };
        let most = if backward { (stored / (each * block)).max(1) * block } else { block };
        let segments = t.div_ceil(most);
        let segment = t.div_ceil(segments).div_ceil(block) * block;
        Plan {
            arch,
            lanes: arch.dispatch(Lanes),
            k,
            block,
            segment,
            segments: t.div_ceil(segment),
            varying,
            scalars: k > UNROLLED && !varying && !batch.has(flag::TRANS_SEQUENCE),
            backward,
            pair_sum: batch.has(flag::PAIR_SUM),
            pair_steps: batch.has(flag::PAIR_STEPS),
            gaussian: batch.p.emission == 1,
        }
    }

    /// Vectors of each array of [`Memory`], in its order.
    fn sizes(&self, batch: &Batch<'_, f32>) -> [usize; 15] {
        let (k, kk, block) = (self.k, self.k * self.k, self.block);
        let (u, d) = (batch.p.u as usize, batch.p.d as usize);
        let only = |wanted: bool, vectors: usize| if wanted { vectors } else { 0 };
        let softmax = batch.has(flag::SOFTMAX);
        [
            if self.varying { kk * (self.segment + 1) } else { kk },
            only(softmax, kk * (u + 1)),
            only(softmax, u * block),
            k,
            only(self.gaussian, 2 * k * d + k),
            only(self.gaussian, d * block),
            k * block,
            block,
            2 * k * self.segment,
            only(self.backward, (k + 1) * self.segments),
            k,
            2 * k,
            2 * k * block,
            only(self.pair_sum, kk) + only(self.pair_steps, kk * block),
            only(self.pair_sum, 2 * kk),
        ]
    }

    /// Reals of a tile's memory: its arrays, and a vector to align them.
    fn memory(&self, batch: &Batch<'_, f32>) -> usize {
        self.lanes * self.sizes(batch).iter().sum::<usize>() + WIDEST
    }

    fn in_memory(&self, batch: &Batch<'_, f32>, work: impl FnOnce(&mut [f32])) {
        let len = self.memory(batch);
        MEMORY.with_borrow_mut(|kept| {
            let mut memory = std::mem::take(kept);
            if memory.len() < len {
                memory.resize(len, 0.0);
            }
            work(&mut memory[..len]);
            if memory.len() <= KEPT {
                *kept = memory;
            }
        });
    }

    fn tile(&self, batch: &Batch<'_, f32>, first: usize, outs: &mut [SequenceOut<'_, f32>], memory: &mut [f32]) {
        let n = outs.len();
        let lengths: Lane<u32> = std::array::from_fn(|l| batch.length(first + l.min(n - 1)) as u32);
        let ragged = lengths.iter().any(|&length| length != batch.p.t);
        let tile = Tile { plan: self, batch, first, n, lengths, ragged };
        let mut memory = Memory::of(self, batch, memory);
        tile.load(&mut memory);
        let mut state = State::new();
        for segment in 0..self.segments {
            tile.keep(&state, segment, &mut memory);
            tile.forward(&mut state, segment, &mut memory, Some(outs));
        }
        let mut lost = state.write(&lengths, outs);
        if self.backward {
            tile.backward(state, &mut memory, outs, &mut lost);
        }
        for (l, out) in outs.iter_mut().enumerate().filter(|(l, _)| lost[*l]) {
            scaled(batch, first + l, out);
        }
    }
}

/// Arrays of a tile, each [·,lane].
struct Memory<'m> {
    /// A [K,K]; or of a segment [1 + segment,K,K], that of the move into its first step first.
    matrix: &'m mut [f32],
    /// Softmax weights in base 2 [K,1+U,K]: bias, inputs.
    weights: &'m mut [f32],
    /// Inputs of a block [block,U].
    inputs: &'m mut [f32],
    /// exp(log_init) [K].
    init: &'m mut [f32],
    /// Means [K,D], inverse deviations [K,D], constants [K].
    parameters: &'m mut [f32],
    /// Observations of a block [block,D].
    observations: &'m mut [f32],
    /// log b of a block [block,K].
    log_b: &'m mut [f32],
    /// Words of a block [block].
    mask: &'m mut [f32],
    /// b and α of a segment [segment,2,K].
    store: &'m mut [f32],
    /// α and s before each segment [segments,K+1].
    points: &'m mut [f32],
    /// α of the last step [K].
    alpha: &'m mut [f32],
    /// u of the step after, and of this one [2,K].
    u: &'m mut [f32],
    /// Results of a block [2,block,K].
    results: &'m mut [f32],
    /// Pair posteriors of a block: their sum [K,K], or each [block,K,K].
    pair: &'m mut [f32],
    /// Sums of pair posteriors, and what rounding took from them [2,K,K].
    totals: &'m mut [f32],
}

impl<'m> Memory<'m> {
    fn of(plan: &Plan, batch: &Batch<'_, f32>, memory: &'m mut [f32]) -> Memory<'m> {
        let skip = memory.as_ptr().align_offset(4 * WIDEST).min(WIDEST);
        let mut rest = &mut memory[skip..];
        let [matrix, weights, inputs, init, parameters, observations, log_b, mask, store, points, alpha, u, results, pair, totals] =
            plan.sizes(batch).map(|vectors| {
                let (x, after) = std::mem::take(&mut rest).split_at_mut(vectors * plan.lanes);
                rest = after;
                x
            });
        Memory { matrix, weights, inputs, init, parameters, observations, log_b, mask, store, points, alpha, u, results, pair, totals }
    }
}

/// What forward carries besides α.
#[derive(Clone)]
struct State {
    s: Lane<f32>,
    /// Σ m and its compensation.
    sum: Lane<f32>,
    carry: Lane<f32>,
    /// Σ of the biased exponents that scaled.
    exponents: Lane<u32>,
    least_s: Lane<f32>,
    least_m: Lane<f32>,
}

impl State {
    fn new() -> State {
        let of = |x: f32| [x; WIDEST];
        State { s: of(1.0), sum: of(0.0), carry: of(0.0), exponents: [0; WIDEST], least_s: of(1.0), least_m: of(0.0) }
    }

    /// Writes the log-likelihoods; true where forward left the range of f32.
    fn write(&self, lengths: &Lane<u32>, outs: &mut [SequenceOut<'_, f32>]) -> Lane<bool> {
        for (l, out) in outs.iter_mut().enumerate() {
            let exponent = f64::from(self.exponents[l]) - 127.0 * f64::from(lengths[l]);
            let shifts = f64::from(self.sum[l]) - f64::from(self.carry[l]);
            let total = shifts + exponent * std::f64::consts::LN_2 + f64::from(self.s[l]).ln();
            let high = total as f32;
            out.summary.fill(0.0);
            out.summary[..3].copy_from_slice(&[high, (total - f64::from(high)) as f32, -1.0]);
        }
        let kept = |l: usize| self.least_s[l] >= SMALLEST && self.s[l] < f32::INFINITY && self.sum[l].abs() < 1e27 && self.least_m[l] > IMPOSSIBLE as f32;
        std::array::from_fn(|l| !kept(l))
    }
}

// ---- one tile ---------------------------------------------------------------------------------------------------------------

struct Tile<'a> {
    plan: &'a Plan,
    batch: &'a Batch<'a, f32>,
    first: usize,
    n: usize,
    lengths: Lane<u32>,
    /// Whether any is shorter than T.
    ragged: bool,
}

impl Tile<'_> {
    fn run<W: WithSimd>(&self, op: W) -> W::Output {
        self.plan.arch.dispatch(op)
    }

    /// Values `from..from + count` of this tile's rows of x [B,row] into lanes, or of x [row] into all lanes.
    fn gather(&self, x: &[f32], row: usize, per_sequence: bool, from: usize, count: usize, out: &mut [f32]) {
        if per_sequence {
            self.run(Gather { x: &x[self.first * row..], row, n: self.n, from, count, out });
        } else {
            for (out, &x) in out.chunks_exact_mut(self.plan.lanes).zip(&x[from..from + count]) {
                out.fill(x);
            }
        }
    }

    /// Loads what does not depend on time.
    fn load(&self, m: &mut Memory<'_>) {
        let (batch, k, stride) = (self.batch, self.plan.k, self.batch.p.stride as usize);
        self.gather(batch.model, stride, batch.has(flag::MODELS), 0, k, m.init);
        self.run(Exp(m.init));
        if self.plan.gaussian {
            self.gather(batch.model, stride, batch.has(flag::MODELS), k, stride - k, m.parameters);
        }
        let per_sequence = batch.has(flag::TRANS_SEQUENCE);
        if batch.has(flag::SOFTMAX) {
            let terms = batch.p.u as usize + 1;
            for (at, out) in m.weights.chunks_exact_mut(self.plan.lanes).enumerate() {
                // the bias first, and the next state last
                let (i, term, j) = (at / (terms * k), at / k % terms, at % k);
                self.gather(batch.log_trans, k * k * terms, per_sequence, (i * k + j) * terms + (term + terms - 1) % terms, 1, out);
            }
            m.weights.iter_mut().for_each(|w| *w *= std::f32::consts::LOG2_E);
        } else if self.plan.scalars {
            m.matrix[..k * k].copy_from_slice(&batch.log_trans[..k * k]);
            self.run(Exp(m.matrix));
        } else if !self.plan.varying {
            self.gather(batch.log_trans, k * k, per_sequence, 0, k * k, m.matrix);
            self.run(Exp(m.matrix));
        }
        m.alpha.copy_from_slice(m.init);
        m.totals.fill(0.0);
    }

    /// A of some slots, those of a segment that starts with step `from`.
    fn matrices(&self, slots: Range<usize>, from: usize, m: &mut Memory<'_>) {
        let (batch, k, lanes, kk) = (self.batch, self.plan.k, self.plan.lanes, self.plan.k * self.plan.k);
        let count = slots.len();
        if !self.plan.varying || count == 0 {
            return;
        }
        let (t, u) = (batch.p.t as usize, batch.p.u as usize);
        let out = &mut m.matrix[(slots.start + 1 - from) * kk * lanes..][..count * kk * lanes];
        if batch.has(flag::SOFTMAX) {
            // slot t reads inputs[t + 1]
            self.gather(batch.inputs, t * u, true, (slots.start + 1) * u, count * u, m.inputs);
            softmax(self.plan.arch, Softmax { k, u, weights: m.weights, inputs: m.inputs, out });
        } else {
            let row = (t - 1) * kk;
            self.gather(batch.log_trans, row, batch.has(flag::TRANS_SEQUENCE), slots.start * kk, count * kk, out);
            self.run(Exp(out));
        }
    }

    /// log b and words of some steps.
    fn observe(&self, steps: &Range<usize>, m: &mut Memory<'_>) {
        let (batch, k, lanes) = (self.batch, self.plan.k, self.plan.lanes);
        let (t, d, n) = (batch.p.t as usize, batch.p.d as usize, steps.len());
        if batch.p.emission == 0 {
            self.gather(batch.obs, t * k, true, steps.start * k, n * k, m.log_b);
        } else if self.plan.gaussian {
            self.gather(batch.obs, t * d, true, steps.start * d, n * d, m.observations);
            self.run(Gaussian { k, d, n, parameters: m.parameters, observations: m.observations, out: m.log_b });
        } else {
            let mut log_b = vec![0f32; k];
            for (step, out) in steps.clone().zip(m.log_b.chunks_exact_mut(k * lanes)) {
                for l in 0..lanes {
                    batch.log_obs(self.first + l.min(self.n - 1), step, &mut log_b);
                    out.iter_mut().skip(l).step_by(lanes).zip(&log_b).for_each(|(out, &x)| *out = x);
                }
            }
        }
        if batch.has(flag::MASKED) {
            let words: &[f32] = bytemuck::cast_slice(batch.words);
            self.gather(words, 1 + t, true, 1 + steps.start, n, m.mask);
            self.run(Missing { k, words: &m.mask[..n * lanes], log_b: m.log_b });
        }
    }

    fn ragged(&self) -> Option<&Lane<u32>> {
        self.ragged.then_some(&self.lengths)
    }

    fn blocks(&self, segment: usize) -> impl DoubleEndedIterator<Item = Range<usize>> + use<> {
        let (block, t) = (self.plan.block, self.batch.p.t as usize);
        let (from, to) = (segment * self.plan.segment, ((segment + 1) * self.plan.segment).min(t));
        (0..(to - from).div_ceil(block)).map(move |i| from + i * block..(from + (i + 1) * block).min(to))
    }

    /// Keeps α and s before a segment.
    fn keep(&self, state: &State, segment: usize, m: &mut Memory<'_>) {
        let (k, lanes) = (self.plan.k, self.plan.lanes);
        if self.plan.backward {
            let point = &mut m.points[segment * (k + 1) * lanes..][..(k + 1) * lanes];
            point[..k * lanes].copy_from_slice(m.alpha);
            point[k * lanes..].copy_from_slice(&state.s[..lanes]);
        }
    }

    /// Forward over a segment; `outs` where its results are wanted.
    fn forward(&self, state: &mut State, segment: usize, m: &mut Memory<'_>, mut outs: Option<&mut [SequenceOut<'_, f32>]>) {
        let (k, width) = (self.plan.k, self.plan.k * self.plan.lanes);
        let from = segment * self.plan.segment;
        let wanted = outs.is_some() && self.batch.has(flag::FILTERED | flag::PREDICTED);
        for steps in self.blocks(segment) {
            self.observe(&steps, m);
            // The first step has no matrix.
            let late = usize::from(steps.start == 0);
            let slots = steps.start + late - 1..steps.end - 1;
            self.matrices(slots.clone(), from, m);
            let (filtered, predicted) = m.results.split_at_mut(m.results.len() / 2);
            let op = Forward {
                k,
                late,
                steps: steps.clone(),
                log_b: m.log_b,
                matrix: self.matrix(m.matrix, slots.start + 1 - from),
                store: &mut m.store[(steps.start - from) * 2 * width..(steps.end - from) * 2 * width],
                alpha: m.alpha,
                state,
                results: wanted.then_some((&mut *filtered, &mut *predicted)),
                lengths: self.ragged(),
            };
            forward(self.plan.arch, op);
            if let (true, Some(outs)) = (wanted, &mut outs) {
                self.scatter(filtered, k, &steps, outs.iter_mut().filter_map(|out| out.filtered.as_deref_mut()));
                self.scatter(predicted, k, &steps, outs.iter_mut().filter_map(|out| out.predicted.as_deref_mut()));
            }
        }
    }

    fn backward(&self, mut state: State, m: &mut Memory<'_>, outs: &mut [SequenceOut<'_, f32>], lost: &mut Lane<bool>) {
        let (k, lanes, t) = (self.plan.k, self.plan.lanes, self.batch.p.t as usize);
        let (kk, width) = (k * k, k * lanes);
        let mut least = [1f32; WIDEST];
        for segment in (0..self.plan.segments).rev() {
            if segment + 1 < self.plan.segments {
                let point = &m.points[segment * (k + 1) * lanes..][..(k + 1) * lanes];
                m.alpha.copy_from_slice(&point[..width]);
                state.s[..lanes].copy_from_slice(&point[width..]);
                if self.plan.varying {
                    // The move out of this segment is the one into the next.
                    m.matrix.copy_within(..kk * lanes, self.plan.segment * kk * lanes);
                }
                self.forward(&mut state, segment, m, None);
            }
            let from = segment * self.plan.segment;
            for steps in self.blocks(segment).rev() {
                let slots = steps.start..steps.end.min(t - 1);
                let op = Backward {
                    k,
                    t,
                    steps: steps.clone(),
                    store: &m.store[(steps.start - from) * 2 * width..(steps.end - from) * 2 * width],
                    matrix: self.matrix(m.matrix, slots.start + 1 - from),
                    u: m.u,
                    posterior: m.results,
                    pair: m.pair,
                    pair_sum: self.plan.pair_sum,
                    pair_steps: self.plan.pair_steps,
                    least: &mut least,
                    lengths: self.ragged(),
                };
                backward(self.plan.arch, op);
                self.scatter(m.results, k, &steps, outs.iter_mut().filter_map(|out| out.posterior.as_deref_mut()));
                if self.plan.pair_steps {
                    self.scatter(m.pair, kk, &slots, outs.iter_mut().filter_map(|out| out.pair.as_deref_mut()));
                }
                if self.plan.pair_sum {
                    self.run(Accumulate { x: m.pair, totals: m.totals });
                }
            }
        }
        if self.plan.pair_sum {
            let whole = (!self.plan.varying).then(|| self.matrix(m.matrix, 0));
            self.run(Total { totals: m.totals, matrix: whole, out: m.pair });
            self.scatter(m.pair, kk, &(0..1), outs.iter_mut().filter_map(|out| out.pair.as_deref_mut()));
        }
        for (lost, least) in lost.iter_mut().zip(least) {
            *lost |= least.is_nan() || least < SMALLEST;
        }
    }

    /// A, from matrix `first` on where there are several.
    fn matrix<'x>(&self, matrix: &'x [f32], first: usize) -> Matrix<'x> {
        match (self.plan.scalars, self.plan.varying) {
            (true, _) => Matrix::Scalars(matrix),
            (false, true) => Matrix::Steps(&matrix[first * self.plan.k * self.plan.k * self.plan.lanes..]),
            (false, false) => Matrix::Lanes(matrix),
        }
    }

    /// Rows of `width` values a step from lanes.
    fn scatter<'x>(&self, x: &[f32], width: usize, steps: &Range<usize>, rows: impl Iterator<Item = &'x mut [f32]>) {
        let mut rows: Vec<&mut [f32]> = rows.map(|row| &mut row[steps.start * width..steps.end * width]).collect();
        if !rows.is_empty() && !steps.is_empty() {
            self.run(Scatter { x, rows: &mut rows });
        }
    }
}

// ---- transposition ------------------------------------------------------------------------------------------------------------

/// out[f,lane] = x[min(lane, n−1), from + f].
struct Gather<'a> {
    x: &'a [f32],
    row: usize,
    n: usize,
    from: usize,
    count: usize,
    out: &'a mut [f32],
}

impl WithSimd for Gather<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (lanes, count) = (S::F32_LANES, self.count);
        let mut rows: Lane<&[f32]> = [&[]; WIDEST];
        for (l, row) in rows.iter_mut().enumerate() {
            *row = &self.x[l.min(self.n - 1) * self.row + self.from..][..count];
        }
        if count < lanes {
            for (f, out) in self.out.chunks_exact_mut(lanes).enumerate().take(count) {
                out.iter_mut().zip(rows).for_each(|(out, row)| *out = row[f]);
            }
            return;
        }
        let mut done = 0;
        while done < count {
            let at = done.min(count - lanes);
            let mut x = [simd.splat_f32s(0.0); WIDEST];
            for l in 0..lanes {
                x[l] = S::as_simd_f32s(&rows[l][at..at + lanes]).0[0];
            }
            let x = transpose(simd, x);
            S::as_mut_simd_f32s(&mut self.out[at * lanes..(at + lanes) * lanes]).0.copy_from_slice(&x[..lanes]);
            done = at + lanes;
        }
    }
}

/// rows[lane][f] = x[f,lane].
struct Scatter<'a, 'r> {
    x: &'a [f32],
    rows: &'a mut [&'r mut [f32]],
}

impl WithSimd for Scatter<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (lanes, count) = (S::F32_LANES, self.rows[0].len());
        if count < lanes {
            for (f, x) in self.x.chunks_exact(lanes).enumerate().take(count) {
                self.rows.iter_mut().zip(x).for_each(|(row, &x)| row[f] = x);
            }
            return;
        }
        let mut done = 0;
        while done < count {
            let at = done.min(count - lanes);
            let mut x = [simd.splat_f32s(0.0); WIDEST];
            x[..lanes].copy_from_slice(S::as_simd_f32s(&self.x[at * lanes..(at + lanes) * lanes]).0);
            let x = transpose(simd, x);
            for (l, row) in self.rows.iter_mut().enumerate() {
                S::as_mut_simd_f32s(&mut row[at..at + lanes]).0[0] = x[l];
            }
            done = at + lanes;
        }
    }
}

// No closures around vector instructions, here and below: a closure is a function without the caller's target features.

/// Transposes the first lanes × lanes values.
#[inline(always)]
fn transpose<S: Simd>(_: S, x: [S::f32s; WIDEST]) -> [S::f32s; WIDEST] {
    #[cfg(target_arch = "x86_64")]
    if S::F32_LANES == 16
        && let Some(simd) = pulp::x86::V4::try_new()
    {
        return bytemuck::cast(x86::transpose_16(simd, bytemuck::cast(x)));
    } else if S::F32_LANES == 8
        && let Some(simd) = pulp::x86::V3::try_new()
    {
        let (mut eight, mut out) = ([x[0]; 8], x);
        eight.copy_from_slice(&x[..8]);
        let eight: [S::f32s; 8] = bytemuck::cast(x86::transpose_8(simd, bytemuck::cast(eight)));
        out[..8].copy_from_slice(&eight);
        return out;
    }
    let lanes = S::F32_LANES;
    let mut out = x;
    let (from, to): (&[f32], &mut [f32]) = (bytemuck::cast_slice(&x), bytemuck::cast_slice_mut(&mut out));
    for (f, to) in to.chunks_exact_mut(lanes).enumerate().take(lanes) {
        for (l, to) in to.iter_mut().enumerate() {
            *to = from[l * lanes + f];
        }
    }
    out
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::{__m256, __m256d, __m512, __m512d};
    use pulp::x86::{V3, V4};

    #[inline(always)]
    fn double(x: __m512) -> __m512d {
        bytemuck::cast(x)
    }

    #[inline(always)]
    fn single(x: __m512d) -> __m512 {
        bytemuck::cast(x)
    }

    /// Pairs of rows, pairs of pairs within 128 bits, then 128-bit parts twice.
    #[inline(always)]
    pub(super) fn transpose_16(simd: V4, x: [__m512; 16]) -> [__m512; 16] {
        let s = simd.avx512f;
        let (mut pairs, mut fours, mut out) = (x, x, x);
        for i in 0..8 {
            pairs[2 * i] = s._mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
            pairs[2 * i + 1] = s._mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
        }
        // fours[4·g + c]: column 4·q + c of rows 4·g .. 4·g + 4 in part q
        for g in 0..4 {
            for c in 0..2 {
                let (a, b) = (double(pairs[4 * g + c]), double(pairs[4 * g + c + 2]));
                fours[4 * g + 2 * c] = single(s._mm512_unpacklo_pd(a, b));
                fours[4 * g + 2 * c + 1] = single(s._mm512_unpackhi_pd(a, b));
            }
        }
        for c in 0..4 {
            let (a, b, d, e) = (fours[c], fours[4 + c], fours[8 + c], fours[12 + c]);
            let (even_ab, odd_ab) = (s._mm512_shuffle_f32x4::<0x88>(a, b), s._mm512_shuffle_f32x4::<0xdd>(a, b));
            let (even_de, odd_de) = (s._mm512_shuffle_f32x4::<0x88>(d, e), s._mm512_shuffle_f32x4::<0xdd>(d, e));
            out[c] = s._mm512_shuffle_f32x4::<0x88>(even_ab, even_de);
            out[4 + c] = s._mm512_shuffle_f32x4::<0x88>(odd_ab, odd_de);
            out[8 + c] = s._mm512_shuffle_f32x4::<0xdd>(even_ab, even_de);
            out[12 + c] = s._mm512_shuffle_f32x4::<0xdd>(odd_ab, odd_de);
        }
        out
    }

    #[inline(always)]
    pub(super) fn transpose_8(simd: V3, x: [__m256; 8]) -> [__m256; 8] {
        let s = simd.avx;
        let (mut pairs, mut fours, mut out) = (x, x, x);
        for i in 0..4 {
            pairs[2 * i] = s._mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
            pairs[2 * i + 1] = s._mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
        }
        for g in 0..2 {
            for c in 0..2 {
                let (a, b): (__m256d, __m256d) = (bytemuck::cast(pairs[4 * g + c]), bytemuck::cast(pairs[4 * g + c + 2]));
                fours[4 * g + 2 * c] = bytemuck::cast(s._mm256_unpacklo_pd(a, b));
                fours[4 * g + 2 * c + 1] = bytemuck::cast(s._mm256_unpackhi_pd(a, b));
            }
        }
        for c in 0..4 {
            out[c] = s._mm256_permute2f128_ps::<0x20>(fours[c], fours[4 + c]);
            out[4 + c] = s._mm256_permute2f128_ps::<0x31>(fours[c], fours[4 + c]);
        }
        out
    }
}

// ---- probabilities ------------------------------------------------------------------------------------------------------------

/// exp of x ≤ 88, 0 below −87: x = n·ln 2 + r, 2^n·(1 + r + r²·p(r)).
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

/// exp of every value, in place.
struct Exp<'a>(&'a mut [f32]);

impl WithSimd for Exp<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for x in S::as_mut_simd_f32s(self.0).0 {
            *x = exp(simd, *x);
        }
    }
}

/// 2^x of x ≤ 0, 0 below −126: x = n + r, 2^n·(1 + r·p(r)), within 9.2e−8 of itself and rounding.
#[inline(always)]
fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    #[allow(clippy::approx_constant, reason = "fitted: near ln 2, not it")]
    const P: [f32; 5] = [0.693_147, 0.240_222_42, 0.055_507_336, 0.009_671_513, 0.001_326_472_7];
    const ROUND: f32 = 12_582_912.0;
    let shifted = simd.add_f32s(x, simd.splat_f32s(ROUND));
    let r = simd.sub_f32s(x, simd.sub_f32s(shifted, simd.splat_f32s(ROUND)));
    let mut p = simd.splat_f32s(P[4]);
    for c in [P[3], P[2], P[1], P[0], 1.0] {
        p = simd.mul_add_f32s(p, r, simd.splat_f32s(c));
    }
    let power = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    let y = simd.transmute_f32s_u32s(simd.add_u32s(power, simd.transmute_u32s_f32s(p)));
    simd.select_f32s(simd.less_than_f32s(x, simd.splat_f32s(-126.0)), simd.splat_f32s(0.0), y)
}

/// out[n,K,K] = softmax over the last of (1, inputs[n,:])·weights[K,:,K], weights in base 2.
struct Softmax<'a> {
    k: usize,
    u: usize,
    weights: &'a [f32],
    inputs: &'a mut [f32],
    out: &'a mut [f32],
}

fn softmax(arch: Arch, op: Softmax<'_>) {
    match op.k {
        1 => arch.dispatch(Of::<_, 1>(op)),
        2 => arch.dispatch(Of::<_, 2>(op)),
        3 => arch.dispatch(Of::<_, 3>(op)),
        4 => arch.dispatch(Of::<_, 4>(op)),
        5 => arch.dispatch(Of::<_, 5>(op)),
        6 => arch.dispatch(Of::<_, 6>(op)),
        7 => arch.dispatch(Of::<_, 7>(op)),
        8 => arch.dispatch(Of::<_, 8>(op)),
        _ => arch.dispatch(Of::<_, 0>(op)),
    }
}

impl<const K: usize> WithSimd for Of<Softmax<'_>, K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Softmax { k, u, weights, inputs, out } = self.0;
        let k = if K > 0 { K } else { k };
        let (weights, inputs) = (S::as_simd_f32s(weights).0, S::as_mut_simd_f32s(inputs).0);
        let (low, high) = (simd.splat_f32s(-1e18), simd.splat_f32s(1e18));
        for (n, matrix) in S::as_mut_simd_f32s(out).0.chunks_exact_mut(k * k).enumerate() {
            let inputs = &mut inputs[n * u..(n + 1) * u];
            for x in inputs.iter_mut() {
                *x = simd.min_f32s(high, simd.max_f32s(low, *x));
            }
            let mut i = 0;
            while i + 2 <= k {
                softmax_rows::<S, K, 2>(simd, k, &weights[i * k * (u + 1)..], inputs, &mut matrix[i * k..]);
                i += 2;
            }
            if i < k {
                softmax_rows::<S, K, 1>(simd, k, &weights[i * k * (u + 1)..], inputs, &mut matrix[i * k..]);
            }
        }
    }
}

/// out_j = w_0j + Σ_i x_i·w_(1+i)j.
#[inline(always)]
fn logits<S: Simd, const K: usize>(simd: S, k: usize, weights: &[S::f32s], inputs: &[S::f32s], out: &mut [S::f32s]) {
    if K > 0 {
        some_logits::<S, K>(simd, K, weights, inputs, 0, out);
        return;
    }
    let mut j = 0;
    while j + 8 <= k {
        some_logits::<S, 8>(simd, k, weights, inputs, j, out);
        j += 8;
    }
    while j < k {
        some_logits::<S, 1>(simd, k, weights, inputs, j, out);
        j += 1;
    }
}

#[inline(always)]
fn some_logits<S: Simd, const J: usize>(simd: S, k: usize, weights: &[S::f32s], inputs: &[S::f32s], at: usize, out: &mut [S::f32s]) {
    let mut sums = [simd.splat_f32s(0.0); J];
    sums.copy_from_slice(&weights[at..at + J]);
    for (&x, w) in inputs.iter().zip(weights[k..].chunks_exact(k)) {
        let w = &w[at..at + J];
        for j in 0..J {
            sums[j] = simd.mul_add_f32s(x, w[j], sums[j]);
        }
    }
    out[at..at + J].copy_from_slice(&sums);
}

/// One or two rows: two share a division.
#[inline(always)]
fn softmax_rows<S: Simd, const K: usize, const ROWS: usize>(simd: S, k: usize, weights: &[S::f32s], inputs: &[S::f32s], out: &mut [S::f32s]) {
    let (k, terms) = (if K > 0 { K } else { k }, inputs.len() + 1);
    let mut sums = [simd.splat_f32s(0.0); ROWS];
    for i in 0..ROWS {
        let row = &mut out[i * k..][..k];
        let weights = &weights[i * k * terms..][..k * terms];
        logits::<S, K>(simd, k, weights, inputs, row);
        let mut most = simd.splat_f32s(IMPOSSIBLE as f32);
        for j in 0..k {
            most = simd.max_f32s(row[j], most);
        }
        for j in 0..k {
            row[j] = exp2(simd, simd.sub_f32s(row[j], most));
            sums[i] = simd.add_f32s(sums[i], row[j]);
        }
    }
    let product = if ROWS == 2 { simd.mul_f32s(sums[0], sums[ROWS - 1]) } else { sums[0] };
    let inverse = simd.div_f32s(simd.splat_f32s(1.0), product);
    for i in 0..ROWS {
        let inverse = if ROWS == 2 { simd.mul_f32s(inverse, sums[1 - i]) } else { inverse };
        for x in &mut out[i * k..][..k] {
            *x = simd.mul_f32s(*x, inverse);
        }
    }
}

/// log b = 0 where nothing was observed; words [n] are bits of reals.
struct Missing<'a> {
    k: usize,
    words: &'a [f32],
    log_b: &'a mut [f32],
}

impl WithSimd for Missing<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let words = S::as_simd_f32s(self.words).0;
        for (row, &words) in S::as_mut_simd_f32s(self.log_b).0.chunks_exact_mut(self.k).zip(words) {
            let observed = simd.greater_than_u32s(simd.transmute_u32s_f32s(words), simd.splat_u32s(0));
            for x in row {
                *x = simd.select_f32s(observed, *x, simd.splat_f32s(0.0));
            }
        }
    }
}

/// out[n,K] = log-density of independent normals.
struct Gaussian<'a> {
    k: usize,
    d: usize,
    n: usize,
    parameters: &'a [f32],
    observations: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Gaussian<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (k, d) = (self.k, self.d);
        let (parameters, x) = (S::as_simd_f32s(self.parameters).0, S::as_simd_f32s(self.observations).0);
        let (mean, rest) = parameters.split_at(k * d);
        let (scale, constant) = rest.split_at(k * d);
        let (least, half) = (simd.splat_f32s(LEAST as f32), simd.splat_f32s(-0.5));
        // Beyond this a square would overflow.
        let (low, high) = (simd.splat_f32s(-1e14), simd.splat_f32s(1e14));
        let (near, far) = (simd.splat_f32s(-1e18), simd.splat_f32s(1e18));
        let out = S::as_mut_simd_f32s(self.out).0;
        for (x, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(k)).take(self.n) {
            for (j, out) in out.iter_mut().enumerate() {
                let mut squares = simd.splat_f32s(0.0);
                for (i, &x) in x.iter().enumerate() {
                    let distance = simd.min_f32s(far, simd.max_f32s(near, simd.sub_f32s(x, mean[j * d + i])));
                    let z = simd.mul_f32s(distance, scale[j * d + i]);
                    let z = simd.min_f32s(high, simd.max_f32s(low, z));
                    squares = simd.mul_add_f32s(z, z, squares);
                }
                *out = simd.max_f32s(least, simd.mul_add_f32s(half, squares, constant[j]));
            }
        }
    }
}

// ---- the recursion ------------------------------------------------------------------------------------------------------------

/// Where A lies.
#[derive(Clone, Copy)]
enum Matrix<'a> {
    /// [K,K] for all lanes.
    Scalars(&'a [f32]),
    /// [K,K,lane].
    Lanes(&'a [f32]),
    /// [n,K,K,lane].
    Steps(&'a [f32]),
}

struct Forward<'a> {
    k: usize,
    /// 1 where the first step is that of the sequence, and has no matrix.
    late: usize,
    steps: Range<usize>,
    log_b: &'a [f32],
    matrix: Matrix<'a>,
    store: &'a mut [f32],
    alpha: &'a mut [f32],
    state: &'a mut State,
    /// Filtered and predicted [n,K].
    results: Option<(&'a mut [f32], &'a mut [f32])>,
    /// Of the lanes, where some are shorter than T.
    lengths: Option<&'a Lane<u32>>,
}

/// K as a constant, 0 where it is not known.
struct Of<T, const K: usize>(T);

fn forward(arch: Arch, op: Forward<'_>) {
    match op.k {
        1 => arch.dispatch(Of::<_, 1>(op)),
        2 => arch.dispatch(Of::<_, 2>(op)),
        3 => arch.dispatch(Of::<_, 3>(op)),
        4 => arch.dispatch(Of::<_, 4>(op)),
        5 => arch.dispatch(Of::<_, 5>(op)),
        6 => arch.dispatch(Of::<_, 6>(op)),
        7 => arch.dispatch(Of::<_, 7>(op)),
        8 => arch.dispatch(Of::<_, 8>(op)),
        _ => arch.dispatch(Of::<_, 0>(op)),
    }
}

#[inline(always)]
fn lane<S: Simd>(x: &Lane<f32>) -> S::f32s {
    S::as_simd_f32s(&x[..S::F32_LANES]).0[0]
}

#[inline(always)]
fn set_lane<S: Simd>(x: &mut Lane<f32>, v: S::f32s) {
    S::as_mut_simd_f32s(&mut x[..S::F32_LANES]).0[0] = v;
}

/// What the entries of a matrix are.
trait Entries<S: Simd> {
    type Entry: Copy;
    fn of(simd: S, x: Self::Entry) -> S::f32s;
}

/// One for all lanes.
struct Scalars;

impl<S: Simd> Entries<S> for Scalars {
    type Entry = f32;

    #[inline(always)]
    fn of(simd: S, x: f32) -> S::f32s {
        simd.splat_f32s(x)
    }
}

/// One for each lane.
struct Vectors;

impl<S: Simd> Entries<S> for Vectors {
    type Entry = S::f32s;

    #[inline(always)]
    fn of(_: S, x: S::f32s) -> S::f32s {
        x
    }
}

/// `step < length` of each lane.
#[inline(always)]
fn within<S: Simd>(simd: S, step: usize, lengths: S::u32s) -> S::m32s {
    simd.less_than_u32s(simd.splat_u32s(step as u32), lengths)
}

/// All of x where `active` is none.
#[inline(always)]
fn choose<S: Simd>(simd: S, active: Option<S::m32s>, x: S::f32s, other: S::f32s) -> S::f32s {
    match active {
        Some(active) => simd.select_f32s(active, x, other),
        None => x,
    }
}

impl<const K: usize> WithSimd for Of<Forward<'_>, K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let k = if K > 0 { K } else { self.0.k };
        match self.0.matrix {
            Matrix::Scalars(a) if K == 0 => self.steps::<S, Scalars>(simd, a, 0),
            Matrix::Steps(a) => self.steps::<S, Vectors>(simd, S::as_simd_f32s(a).0, k * k),
            Matrix::Scalars(a) | Matrix::Lanes(a) => self.steps::<S, Vectors>(simd, S::as_simd_f32s(a).0, 0),
        }
    }
}

impl<const K: usize> Of<Forward<'_>, K> {
    #[inline(always)]
    fn steps<S: Simd, M: Entries<S>>(self, simd: S, a: &[M::Entry], stride: usize) {
        let Forward { late, steps, log_b, store, alpha: last, state, mut results, lengths, k, .. } = self.0;
        let k = if K > 0 { K } else { k };
        let (log_b, store, last) = (S::as_simd_f32s(log_b).0, S::as_mut_simd_f32s(store).0, S::as_mut_simd_f32s(last).0);
        let (zero, zeros) = (simd.splat_f32s(0.0), simd.splat_u32s(0));
        let (mut s, mut sum, mut carry) = (lane::<S>(&state.s), lane::<S>(&state.sum), lane::<S>(&state.carry));
        let (mut least_s, mut least_m) = (lane::<S>(&state.least_s), lane::<S>(&state.least_m));
        let mut exponents = S::as_simd_u32s(&state.exponents[..S::F32_LANES]).0[0];
        for n in 0..steps.len() {
            let active = lengths.map(|lengths| within(simd, steps.start + n, S::as_simd_u32s(&lengths[..S::F32_LANES]).0[0]));
            let (before, here) = store.split_at_mut(n * 2 * k);
            let (b, alpha) = here[..2 * k].split_at_mut(k);
            let previous = if n == 0 { &last[..k] } else { &before[(2 * n - 1) * k..2 * n * k] };

            // what was observed
            let log_b = &log_b[n * k..(n + 1) * k];
            let mut m = log_b[0];
            for j in 1..k {
                m = simd.max_f32s(m, log_b[j]);
            }
            let mut exponent = simd.and_u32s(simd.transmute_u32s_f32s(s), simd.splat_u32s(EXPONENT));
            let scale = simd.transmute_f32s_u32s(simd.sub_u32s(simd.splat_u32s(TWICE_ONE), exponent));
            for j in 0..k {
                b[j] = simd.mul_f32s(exp(simd, simd.sub_f32s(log_b[j], m)), scale);
            }
            if let Some(active) = active {
                m = simd.select_f32s(active, m, zero);
                exponent = simd.select_u32s(active, exponent, zeros);
            }
            let y = simd.sub_f32s(m, carry);
            let next = simd.add_f32s(sum, y);
            carry = simd.sub_f32s(simd.sub_f32s(next, sum), y);
            sum = next;
            least_m = simd.min_f32s(m, least_m);
            exponents = simd.add_u32s(exponents, simd.wrapping_dyn_shr_u32s(exponent, simd.splat_u32s(23)));

            // α
            if late > n {
                alpha.copy_from_slice(previous);
            } else {
                columns::<S, M, K>(simd, k, &a[(n - late) * stride..][..k * k], previous, alpha);
            }
            if let Some((_, out)) = &mut results {
                let out = &mut S::as_mut_simd_f32s(out).0[n * k..(n + 1) * k];
                for j in 0..k {
                    out[j] = choose(simd, active, simd.div_f32s(alpha[j], s), zero);
                }
            }
            let mut now = zero;
            for j in 0..k {
                alpha[j] = choose(simd, active, simd.mul_f32s(alpha[j], b[j]), previous[j]);
                now = simd.add_f32s(now, alpha[j]);
            }
            s = now;
            least_s = simd.min_f32s(s, least_s);
            if let Some((out, _)) = &mut results {
                let out = &mut S::as_mut_simd_f32s(out).0[n * k..(n + 1) * k];
                for j in 0..k {
                    out[j] = choose(simd, active, simd.div_f32s(alpha[j], s), zero);
                }
            }
        }
        let n = steps.len();
        last[..k].copy_from_slice(&store[(2 * n - 1) * k..2 * n * k]);
        set_lane::<S>(&mut state.s, s);
        set_lane::<S>(&mut state.sum, sum);
        set_lane::<S>(&mut state.carry, carry);
        set_lane::<S>(&mut state.least_s, least_s);
        set_lane::<S>(&mut state.least_m, least_m);
        S::as_mut_simd_u32s(&mut state.exponents[..S::F32_LANES]).0[0] = exponents;
    }
}

/// out_j = Σ_i x_i·a_ij.
#[inline(always)]
fn columns<S: Simd, M: Entries<S>, const K: usize>(simd: S, k: usize, a: &[M::Entry], x: &[S::f32s], out: &mut [S::f32s]) {
    if K > 0 {
        some_columns::<S, M, K>(simd, K, a, x, 0, out);
        return;
    }
    let mut j = 0;
    while j + 8 <= k {
        some_columns::<S, M, 8>(simd, k, a, x, j, out);
        j += 8;
    }
    while j < k {
        some_columns::<S, M, 1>(simd, k, a, x, j, out);
        j += 1;
    }
}

#[inline(always)]
fn some_columns<S: Simd, M: Entries<S>, const J: usize>(simd: S, k: usize, a: &[M::Entry], x: &[S::f32s], at: usize, out: &mut [S::f32s]) {
    let mut sums = [simd.splat_f32s(0.0); J];
    for i in 0..k {
        let row = &a[i * k + at..][..J];
        for j in 0..J {
            sums[j] = simd.mul_add_f32s(x[i], M::of(simd, row[j]), sums[j]);
        }
    }
    out[at..at + J].copy_from_slice(&sums);
}

/// out_i = Σ_j a_ij·x_j.
#[inline(always)]
fn rows<S: Simd, M: Entries<S>, const K: usize>(simd: S, k: usize, a: &[M::Entry], x: &[S::f32s], out: &mut [S::f32s]) {
    if K > 0 {
        some_rows::<S, M, K>(simd, K, a, x, 0, out);
        return;
    }
    let mut i = 0;
    while i + 8 <= k {
        some_rows::<S, M, 8>(simd, k, a, x, i, out);
        i += 8;
    }
    while i < k {
        some_rows::<S, M, 1>(simd, k, a, x, i, out);
        i += 1;
    }
}

#[inline(always)]
fn some_rows<S: Simd, M: Entries<S>, const I: usize>(simd: S, k: usize, a: &[M::Entry], x: &[S::f32s], at: usize, out: &mut [S::f32s]) {
    let mut sums = [simd.splat_f32s(0.0); I];
    let mut rows: [&[M::Entry]; I] = [&[]; I];
    for i in 0..I {
        rows[i] = &a[(at + i) * k..][..k];
    }
    for j in 0..k {
        for i in 0..I {
            sums[i] = simd.mul_add_f32s(M::of(simd, rows[i][j]), x[j], sums[i]);
        }
    }
    out[at..at + I].copy_from_slice(&sums);
}

struct Backward<'a> {
    k: usize,
    /// Steps of the whole.
    t: usize,
    steps: Range<usize>,
    store: &'a [f32],
    matrix: Matrix<'a>,
    u: &'a mut [f32],
    posterior: &'a mut [f32],
    pair: &'a mut [f32],
    pair_sum: bool,
    pair_steps: bool,
    /// Least Σ_i α_i·β_i of each lane.
    least: &'a mut Lane<f32>,
    /// Of the lanes, where some are shorter than T.
    lengths: Option<&'a Lane<u32>>,
}

fn backward(arch: Arch, op: Backward<'_>) {
    match op.k {
        1 => arch.dispatch(Of::<_, 1>(op)),
        2 => arch.dispatch(Of::<_, 2>(op)),
        3 => arch.dispatch(Of::<_, 3>(op)),
        4 => arch.dispatch(Of::<_, 4>(op)),
        5 => arch.dispatch(Of::<_, 5>(op)),
        6 => arch.dispatch(Of::<_, 6>(op)),
        7 => arch.dispatch(Of::<_, 7>(op)),
        8 => arch.dispatch(Of::<_, 8>(op)),
        _ => arch.dispatch(Of::<_, 0>(op)),
    }
}

impl<const K: usize> WithSimd for Of<Backward<'_>, K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let k = if K > 0 { K } else { self.0.k };
        match self.0.matrix {
            Matrix::Scalars(a) if K == 0 => self.steps::<S, Scalars>(simd, a, 0),
            Matrix::Steps(a) => self.steps::<S, Vectors>(simd, S::as_simd_f32s(a).0, k * k),
            Matrix::Scalars(a) | Matrix::Lanes(a) => self.steps::<S, Vectors>(simd, S::as_simd_f32s(a).0, 0),
        }
    }
}

impl<const K: usize> Of<Backward<'_>, K> {
    #[inline(always)]
    fn steps<S: Simd, M: Entries<S>>(self, simd: S, a: &[M::Entry], stride: usize) {
        let Backward { k, t, steps, store, u, posterior, pair, pair_sum, pair_steps, least, lengths, .. } = self.0;
        let k = if K > 0 { K } else { k };
        let kk = k * k;
        let store = S::as_simd_f32s(store).0;
        let (posterior, pair) = (S::as_mut_simd_f32s(posterior).0, S::as_mut_simd_f32s(pair).0);
        let (u, beta) = S::as_mut_simd_f32s(u).0.split_at_mut(k);
        let beta = &mut beta[..k];
        let (zero, one, cap) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0), simd.splat_f32s(LARGEST));
        let mut least_q = lane::<S>(least);
        if pair_sum {
            pair.fill(zero);
        }
        for n in (0..steps.len()).rev() {
            let step = steps.start + n;
            let (mut active, mut followed) = (None, None);
            if let Some(lengths) = lengths {
                let lengths = S::as_simd_u32s(&lengths[..S::F32_LANES]).0[0];
                (active, followed) = (Some(within(simd, step, lengths)), Some(within(simd, step + 1, lengths)));
            }
            let (b, alpha) = store[2 * n * k..][..2 * k].split_at(k);
            let posterior = &mut posterior[n * k..(n + 1) * k];

            // β, α·β and their sum
            let inside = step + 1 < t;
            if inside {
                rows::<S, M, K>(simd, k, &a[n * stride..][..kk], u, beta);
            } else {
                beta.fill(one);
            }
            let mut q = zero;
            for i in 0..k {
                beta[i] = choose(simd, followed, beta[i], one);
                posterior[i] = simd.mul_f32s(alpha[i], beta[i]);
                q = simd.add_f32s(q, posterior[i]);
            }
            least_q = simd.min_f32s(q, least_q);
            let inverse = simd.div_f32s(one, q);
            for i in 0..k {
                posterior[i] = choose(simd, active, simd.mul_f32s(posterior[i], inverse), zero);
            }

            // pairs of this step and the next; A comes in at the end where it does not change
            if (pair_sum || pair_steps) && inside {
                let a = &a[n * stride..][..kk];
                let pair = if pair_steps { &mut pair[n * kk..(n + 1) * kk] } else { &mut pair[..kk] };
                for i in 0..k {
                    let w = choose(simd, followed, simd.mul_f32s(alpha[i], inverse), zero);
                    for j in 0..k {
                        let at = i * k + j;
                        if pair_steps {
                            pair[at] = simd.mul_f32s(simd.mul_f32s(w, M::of(simd, a[at])), u[j]);
                        } else if stride > 0 {
                            pair[at] = simd.mul_add_f32s(simd.mul_f32s(w, M::of(simd, a[at])), u[j], pair[at]);
                        } else {
                            pair[at] = simd.mul_add_f32s(w, u[j], pair[at]);
                        }
                    }
                }
            }
            for j in 0..k {
                let x = simd.min_f32s(simd.mul_f32s(b[j], beta[j]), cap);
                u[j] = choose(simd, active, x, zero);
            }
        }
        set_lane::<S>(least, least_q);
    }
}

/// totals += x, with what rounding takes kept behind the totals.
struct Accumulate<'a> {
    x: &'a [f32],
    totals: &'a mut [f32],
}

impl WithSimd for Accumulate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (sums, carries) = S::as_mut_simd_f32s(self.totals).0.split_at_mut(S::as_simd_f32s(self.x).0.len());
        for ((sum, carry), &x) in sums.iter_mut().zip(carries).zip(S::as_simd_f32s(self.x).0) {
            let y = simd.sub_f32s(x, *carry);
            let next = simd.add_f32s(*sum, y);
            *carry = simd.sub_f32s(simd.sub_f32s(next, *sum), y);
            *sum = next;
        }
    }
}

/// out = totals, times A where it does not change with time.
struct Total<'a> {
    totals: &'a [f32],
    matrix: Option<Matrix<'a>>,
    out: &'a mut [f32],
}

impl WithSimd for Total<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (totals, out) = (S::as_simd_f32s(self.totals).0, S::as_mut_simd_f32s(self.out).0);
        for (i, (out, &total)) in out.iter_mut().zip(totals).enumerate() {
            *out = match self.matrix {
                Some(Matrix::Scalars(a)) => simd.mul_f32s(total, simd.splat_f32s(a[i])),
                Some(Matrix::Lanes(a) | Matrix::Steps(a)) => simd.mul_f32s(total, S::as_simd_f32s(a).0[i]),
                None => total,
            };
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;
    use crate::hmm::{HmmParams, SUMMARY, log_space, sequences};
    use crate::philox::{normals, philox4x32};
    use crate::real::Real;

    /// A batch on the host.
    #[derive(Clone, Default)]
    struct Host {
        p: Option<HmmParams>,
        model: Vec<f32>,
        obs: Vec<f32>,
        words: Vec<u32>,
        log_trans: Vec<f32>,
        inputs: Vec<f32>,
    }

    fn random(n: usize, seed: u32) -> Vec<f32> {
        (0..n.div_ceil(4) as u32).flat_map(|i| normals(philox4x32([i, 0, 0, 0], [seed, 0]))).take(n).map(|z| z as f32).collect()
    }

    /// Rows of log-probabilities.
    fn log_rows(n: usize, k: usize, seed: u32) -> Vec<f32> {
        let mut x = random(n * k, seed);
        for row in x.chunks_exact_mut(k) {
            let total = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            row.iter_mut().for_each(|x| *x = (f64::from(*x) - total) as f32);
        }
        x
    }

    const EVERYTHING: u32 = flag::FILTERED | flag::PREDICTED | flag::POSTERIOR;

    impl Host {
        fn new([b, t, k, d]: [usize; 4], flags: u32) -> Host {
            let models = if flags & flag::MODELS != 0 { b } else { 1 };
            let tables = if flags & flag::TRANS_SEQUENCE != 0 { b } else { 1 };
            let u = if flags & flag::SOFTMAX != 0 { 2 } else { 0 };
            let slots = if flags & flag::TRANS_STEP != 0 { (t - 1).max(1) } else { 1 };
            let flags = if u > 0 { flags | flag::TRANS_STEP } else { flags };
            let emission = u32::from(d > 0);
            let stride = k + if d > 0 { 2 * k * d + k } else { 0 };
            let mut model = Vec::new();
            for m in 0..models as u32 {
                model.extend(log_rows(1, k, 10 + m));
                model.extend(random(k * d, 1000 + m));
                model.extend(random(k * d, 2000 + m).iter().map(|z| (0.3 * z).exp()));
                model.extend(random(if d > 0 { k } else { 0 }, 3000 + m));
            }
            let log_trans = if u > 0 { random(tables * k * k * (u + 1), 4) } else { log_rows(tables * slots * k, k, 4) };
            let obs = if d > 0 { random(b * t * d, 5) } else { random(b * t * k, 5).iter().map(|z| 3.0 * z - 10.0).collect() };
            let mut words = Vec::new();
            for i in 0..b {
                words.push(((i * 7919) % (t + 1)) as u32);
                let each = if flags & flag::MASKED != 0 { t } else { 0 };
                words.extend(random(each, 100 + i as u32).iter().map(|&z| u32::from(z > -0.7)));
            }
            let p = HmmParams {
                b: b as u32,
                t: t as u32,
                k: k as u32,
                d: d as u32,
                u: u as u32,
                emission,
                symbols: 0,
                stride: stride as u32,
                flags,
                begin: 0,
                end: t as u32,
                park: 0,
                record: SUMMARY as u32,
            };
            Host { p: Some(p), model, obs, words, log_trans, inputs: random(b * t * u, 6) }
        }

        /// Sequences `run` alone.
        fn some(&self, run: Range<usize>) -> Host {
            let p = self.p.unwrap();
            let b = p.b as usize;
            let cut = |x: &[f32], cut: bool| x[if cut { run.start * x.len() / b..run.end * x.len() / b } else { 0..x.len() }].to_vec();
            let each = self.words.len() / b;
            Host {
                p: Some(HmmParams { b: run.len() as u32, ..p }),
                model: cut(&self.model, p.flags & flag::MODELS != 0),
                obs: cut(&self.obs, true),
                words: self.words[run.start * each..run.end * each].to_vec(),
                log_trans: cut(&self.log_trans, p.flags & flag::TRANS_SEQUENCE != 0),
                inputs: cut(&self.inputs, true),
            }
        }

        /// states, pair, summary.
        fn run<R: Real>(&self, each: impl Fn(&Batch<'_, R>, &mut [SequenceOut<'_, R>])) -> [Vec<R>; 3] {
            let p = self.p.unwrap();
            let [model, obs, log_trans, inputs] =
                [&self.model, &self.obs, &self.log_trans, &self.inputs].map(|x| x.iter().map(|&x| R::of(f64::from(x))).collect::<Vec<R>>());
            let batch = Batch { p, model: &model, log_trans: &log_trans, inputs: &inputs, obs: &obs, words: &self.words };
            let (b, t, k) = (p.b as usize, p.t as usize, p.k as usize);
            let sections = (p.flags & EVERYTHING).count_ones() as usize;
            let pairs = if p.flags & flag::PAIR_STEPS != 0 { (t - 1) * k * k } else { k * k };
            // Whatever was there must not matter.
            let mut out = [vec![R::of(7.0); sections * b * t * k], vec![R::of(7.0); b * pairs], vec![R::of(7.0); b * SUMMARY as usize]];
            let [states, pair, summary] = &mut out;
            each(&batch, &mut sequences(&p, states, pair, summary));
            out
        }

        fn lanes(&self) -> [Vec<f32>; 3] {
            self.run(forward_backward)
        }

        fn plain(&self) -> [Vec<f32>; 3] {
            self.run(|batch, outs| outs.iter_mut().enumerate().for_each(|(b, out)| scaled(batch, b, out)))
        }

        fn truth(&self) -> [Vec<f64>; 3] {
            self.run(|batch, outs| outs.iter_mut().enumerate().for_each(|(b, out)| log_space(batch, b, out)))
        }

        /// Largest differences from the truth: states, pairs relative to their largest, log-likelihoods relative.
        fn errors(&self) -> [f64; 3] {
            let ([s, p, l], [ts, tp, tl]) = (self.lanes(), self.truth());
            let most = |x: &[f32], y: &[f64]| {
                let each = x.iter().zip(y).map(|(&x, &y)| if x.is_nan() { f64::INFINITY } else { (f64::from(x) - y).abs() });
                each.fold(0.0, f64::max)
            };
            let scale = if self.p.unwrap().flags & flag::PAIR_SUM != 0 { f64::from(self.p.unwrap().t) } else { 1.0 };
            let pairs = if self.p.unwrap().flags & (flag::PAIR_SUM | flag::PAIR_STEPS) != 0 { most(&p, &tp) / scale } else { 0.0 };
            let likelihoods = l.chunks_exact(4).zip(tl.chunks_exact(4)).map(|(x, y)| {
                let (x0, y0) = (f64::from(x[0]) + f64::from(x[1]), y[0] + y[1]);
                // Log-densities may cancel: a nat a step is the least that counts.
                if f64::from(x[2]) == y[2] { (x0 - y0).abs() / y0.abs().max(f64::from(self.p.unwrap().t.max(10))) } else { f64::INFINITY }
            });
            [most(&s, &ts), pairs, likelihoods.fold(0.0, f64::max)]
        }
    }

    fn bits(x: &[Vec<f32>; 3]) -> Vec<Vec<u32>> {
        x.iter().map(|x| x.iter().map(|x| x.to_bits()).collect()).collect()
    }

    #[test]
    fn exp_is_within_an_ulp() {
        struct All(Vec<f32>);
        impl WithSimd for All {
            type Output = Vec<f32>;
            fn with_simd<S: Simd>(mut self, simd: S) -> Vec<f32> {
                Exp(&mut self.0).with_simd(simd);
                self.0
            }
        }
        let x: Vec<f32> = (0..1 << 20).map(|i| -87.0 * (i as f32 / (1 << 20) as f32)).collect();
        let y = Arch::new().dispatch(All(x.clone()));
        let ulps = x.iter().zip(&y).map(|(&x, &y)| {
            let truth = f64::from(x).exp();
            let ulp = f64::from(f32::from_bits((truth as f32).to_bits() + 1)) - f64::from(truth as f32);
            ((f64::from(y) - truth) / ulp).abs()
        });
        let worst = ulps.fold(0.0, f64::max);
        assert!(worst < 0.9, "{worst} ulp");
        let edges = [0.0, -1e30, -1e29, -100.0, f32::NEG_INFINITY, f32::NAN, -87.5, -0.0];
        let y = Arch::new().dispatch(All(edges.iter().copied().cycle().take(16).collect()));
        assert_eq!((y[0], y[7]), (1.0, 1.0));
        assert!(y[5].is_nan() && [1, 2, 3, 4, 6].iter().all(|&i| y[i] == 0.0), "{y:?}");
    }

    #[test]
    fn equals_the_truth_for_every_kind() {
        let kinds = [
            0,
            flag::MODELS,
            flag::TRANS_SEQUENCE,
            flag::TRANS_STEP,
            flag::TRANS_STEP | flag::TRANS_SEQUENCE,
            flag::SOFTMAX,
            flag::SOFTMAX | flag::TRANS_SEQUENCE | flag::MODELS,
            flag::LENGTHS,
            flag::LENGTHS | flag::MASKED,
            flag::LENGTHS | flag::MASKED | flag::SOFTMAX | flag::MODELS,
        ];
        for k in [1, 2, 3, 4, 5, 7, 8, 9, 16, 19] {
            for (kind, pair) in kinds.into_iter().flat_map(|kind| [flag::PAIR_SUM, flag::PAIR_STEPS].map(|pair| (kind, pair))) {
                for (t, d) in [(1, 0), (2, 0), (37, 0), (90, 2)] {
                    let host = Host::new([18, t, k, d], kind | pair | EVERYTHING);
                    let [states, pairs, likelihood] = host.errors();
                    assert!(states < 2e-6 && pairs < 2e-6 && likelihood < 1e-7, "K {k} T {t} D {d} flags {kind:b} {pair}: {states:e} {pairs:e} {likelihood:e}");
                }
            }
        }
    }

    #[test]
    fn splitting_a_batch_changes_no_bit() {
        for (kind, k) in [(0, 4), (flag::LENGTHS | flag::MASKED, 3), (flag::SOFTMAX | flag::MODELS, 3), (flag::LENGTHS | flag::TRANS_SEQUENCE, 11)] {
            let host = Host::new([41, 150, k, 0], kind | flag::PAIR_SUM | EVERYTHING);
            let whole = bits(&host.lanes());
            for run in [0..1, 40..41, 3..20, 7..41] {
                let part = bits(&host.some(run.clone()).lanes());
                for (whole, part) in whole.iter().zip(&part) {
                    let sections = if part.len() > whole.len() / 41 * run.len() / 3 * 2 && whole.len() == 3 * 41 * 150 * k { 3 } else { 1 };
                    let (each, n) = (whole.len() / sections / 41, part.len() / sections);
                    for s in 0..sections {
                        let at = s * whole.len() / sections;
                        assert!(whole[at + run.start * each..at + run.end * each] == part[s * n..(s + 1) * n], "K {k} {run:?} section {s}");
                    }
                }
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn every_width_of_vector_gives_the_same_bits() {
        let narrower = [pulp::x86::V3::try_new().map(Arch::V3), Some(Arch::Scalar)];
        for (kind, k, t) in [(0, 4, 150), (flag::LENGTHS | flag::MASKED | flag::MODELS, 3, 75), (flag::SOFTMAX, 2, 75), (0, 11, 40), (0, 1, 5)] {
            let host = Host::new([19, t, k, 0], kind | flag::PAIR_SUM | EVERYTHING);
            let widest = bits(&host.lanes());
            for arch in narrower.into_iter().flatten() {
                assert!(widest == bits(&host.run(|batch, outs| on(arch, batch, outs))), "K {k} {arch:?}");
            }
        }
    }

    #[test]
    fn wanting_less_changes_no_bit() {
        let all = Host::new([5, 300, 4, 0], EVERYTHING | flag::PAIR_SUM);
        let [states, pair, summary] = all.lanes();
        let section = states.len() / 3;
        for (i, bit) in [flag::FILTERED, flag::PREDICTED, flag::POSTERIOR].into_iter().enumerate() {
            let [one, _, likelihood] = Host::new([5, 300, 4, 0], bit).lanes();
            assert_eq!(one, states[i * section..(i + 1) * section]);
            assert_eq!(likelihood, summary);
        }
        let [_, alone, likelihood] = Host::new([5, 300, 4, 0], flag::PAIR_SUM).lanes();
        assert_eq!((alone, likelihood), (pair, summary.clone()));
        assert_eq!(Host::new([5, 300, 4, 0], 0).lanes()[2], summary);
    }

    #[test]
    fn segments_change_no_bit_of_states() {
        // 2,000 steps of 16 states are seven segments, eight where A changes with time; the first 320 steps of short sequences at most two.
        for kind in [0, flag::SOFTMAX, flag::TRANS_STEP] {
            let flags = kind | flag::LENGTHS | EVERYTHING | flag::PAIR_SUM;
            let mut long = Host::new([3, 2000, 16, 0], flags);
            long.words = vec![2000, 300, 1];
            let mut short = Host::new([3, 320, 16, 0], flags);
            short.words = vec![320, 300, 1];
            for b in 0..3 {
                short.obs[b * 320 * 16..(b + 1) * 320 * 16].copy_from_slice(&long.obs[b * 2000 * 16..][..320 * 16]);
            }
            if kind == flag::SOFTMAX {
                for b in 0..3 {
                    short.inputs[b * 320 * 2..(b + 1) * 320 * 2].copy_from_slice(&long.inputs[b * 2000 * 2..][..320 * 2]);
                }
            } else {
                short.log_trans = long.log_trans[..short.log_trans.len()].to_vec();
            }
            let [states, pairs, likelihood] = long.errors();
            assert!(states < 2e-6 && pairs < 2e-6 && likelihood < 1e-7, "kind {kind}: {states:e} {pairs:e} {likelihood:e}");
            let (long, short) = (long.lanes(), short.lanes());
            for section in 0..3 {
                let at = |t: usize| (section * 3 + 1) * t * 16;
                assert_eq!(long[0][at(2000)..][..300 * 16], short[0][at(320)..][..300 * 16]);
            }
            assert_eq!(long[2][4..], short[2][4..]);
        }
    }

    #[test]
    fn padding_is_never_read() {
        let mut host = Host::new([20, 70, 3, 0], flag::LENGTHS | flag::MASKED | EVERYTHING | flag::PAIR_SUM);
        let before = bits(&host.lanes());
        for b in 0..20 {
            let length = host.words[b * 71] as usize;
            for t in (0..70).filter(|&t| t >= length || host.words[b * 71 + 1 + t] == 0) {
                host.obs[(b * 70 + t) * 3..][..3].fill(f32::NAN);
            }
        }
        assert_eq!(before, bits(&host.lanes()));
    }

    #[test]
    fn outliers_hard_zeros_and_impossible_steps() {
        let mut host = Host::new([33, 80, 3, 0], EVERYTHING | flag::PAIR_SUM);
        // left to right: state 0 is left for 1, 1 for 2, never back
        host.log_trans = [[-0.1, -2.35, -1e30], [-1e30, -0.1, -2.35], [-1e30, -1e30, 0.0]].concat();
        host.model = vec![0.0, -1e30, -1e30];
        let step = |b: usize, t: usize| (b * 80 + t) * 3;
        for t in 0..80 {
            // the state that is not reached fits far better
            host.obs[step(1, t)..][..3].copy_from_slice(&[-300.0, -200.0, 0.0]);
            host.obs[step(2, t)..][..3].copy_from_slice(&[-1e4, -3e4, -9e4]);
        }
        host.obs[step(3, 40)..][..3].fill(-1e30);
        host.obs[step(4, 0)..][..3].copy_from_slice(&[-1e30, 0.0, 0.0]);
        host.obs[step(17, 79)..][..3].fill(-1e30);
        let [states, pairs, likelihood] = host.errors();
        assert!(states < 2e-6 && pairs < 2e-6 && likelihood < 1e-7, "{states:e} {pairs:e} {likelihood:e}");
        let (lanes, plain) = (host.lanes(), host.plain());
        let impossible: Vec<f32> = lanes[2].chunks_exact(4).map(|s| s[2]).collect();
        assert_eq!((impossible[3], impossible[4], impossible[17], impossible[5]), (40.0, 0.0, 79.0, -1.0));
        let worst = lanes[0].iter().zip(&plain[0]).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-6, "{worst:e} from the plain column");
    }

    #[test]
    fn a_state_that_is_never_reached_may_fit_better_for_ever() {
        let mut host = Host::new([2, 3000, 2, 0], EVERYTHING | flag::PAIR_SUM);
        host.log_trans = vec![0.0, -1e30, -1e30, 0.0];
        host.model = vec![0.0, -1e30];
        host.obs = [-1.0f32, 0.0].repeat(6000);
        let [states, pairs, likelihood] = host.errors();
        assert!(states < 2e-6 && pairs < 2e-6 && likelihood < 1e-7, "{states:e} {pairs:e} {likelihood:e}");
    }

    #[test]
    fn a_hundred_thousand_steps() {
        for k in [2, 4, 16] {
            let host = Host::new([2, 100_000, k, 0], EVERYTHING | flag::PAIR_SUM);
            let [states, pairs, likelihood] = host.errors();
            eprintln!("K {k}: states {states:e} pairs {pairs:e} log-likelihood {likelihood:e}");
            assert!(states < 2e-6 && pairs < 2e-6 && likelihood < 1e-7, "K {k}: {states:e} {pairs:e} {likelihood:e}");
        }
    }
}
