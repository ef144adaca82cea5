//! The f32 column of `recurrent` on the CPU: products in register tiles of sequences × units, explicit vectors of the widest kind that the
//! processor has, chosen at run time. The plain column is in `recurrent.rs`.
//!
//! Forward  a task is some sequences of one model. Weights are packed by blocks of L units: [block][input][gate][L]. A tile of up to six
//!          sequences × four gates of L units stays in registers over all inputs and ends as gates: nothing is stored in between.
//! Backward δ(t)·w_hh in tiles of six sequences × four vectors of units, w_hh copied to whole vectors once per task.
//! Weights  δᵀ·[x, h(t−1), 1] over runs of valid steps: tiles of six inputs × four vectors of gates, 256 steps at a time, so that a
//!          run stays in the second-level cache.
//! Models   where there are many small ones, a task is a model: its δ stays in the second-level cache, so that a training step of 1,024 models
//!          (B 8, T 32, I 8, H 16) moves 370 MB instead of 590 and takes 42 ms instead of 67 (two busy Zen 4 cores, interleaved).
//! Ragged   a sequence that has ended leaves its tile, and the tiles of a step are as even as can be: a valid step costs 1.02 to 1.08 of a
//!          dense one, forward and training, lengths of 25 to 100 % (`forback bench lstm_ragged lstm_train_ragged`).
//! Numerics products fused (FMA), summed in the order of inputs; exp within 0.9 ulp, σ = 1/(1 + e^−x), tanh = 1 − 2/(1 + e^2x).
//! Bits     a sequence's bits depend neither on its neighbours nor on the number of threads.

use crate::Result;
use crate::device::prefetch::prefetch;
use crate::kernel::CpuLaunch;
use crate::recurrent::{PAD, RecurrentParams, chunks, flag, hidden_row, input_row, start_of, weight_of};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Most sequences of a tile.
const TILE: usize = 6;
/// Most sequences of a task.
const TASK: usize = 48;
/// Steps of a run of a weight gradient.
const RUN: usize = 256;
/// Steps that memory is asked for ahead of its use.
const AHEAD: usize = 2;
/// Memory that a thread keeps from one call to the next: 4 M reals.
const KEPT: usize = 1 << 22;

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

/// Lends `sizes` reals of aligned memory, with what was there before.
fn in_memory<const N: usize>(sizes: [usize; N], work: impl FnOnce([&mut [f32]; N])) {
    let len = sizes.iter().map(|n| n.next_multiple_of(PAD)).sum::<usize>() + PAD;
    let mut memory = MEMORY.with_borrow_mut(std::mem::take);
    if memory.len() < len {
        memory.resize(len, 0.0);
    }
    let skip = memory.as_ptr().align_offset(4 * PAD).min(PAD);
    let mut rest = &mut memory[skip..];
    let parts = sizes.map(|n| {
        let (x, after) = std::mem::take(&mut rest).split_at_mut(n.next_multiple_of(PAD));
        rest = after;
        &mut x[..n]
    });
    work(parts);
    if memory.len() <= KEPT {
        MEMORY.with_borrow_mut(|kept| *kept = memory);
    }
}

// ---- functions of a vector --------------------------------------------------------------------------------------------------

/// e^x for |x| ≤ 87.
#[inline(always)]
fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    const P: [f32; 5] = [0.499_999_94, 0.166_665_22, 0.041_668_39, 0.008_368_717, 0.001_381_46];
    // Adding and taking away 1.5·2^23 rounds to a whole number, which lies in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let shifted = simd.mul_add_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E), simd.splat_f32s(ROUND));
    let n = simd.sub_f32s(shifted, simd.splat_f32s(ROUND));
    let r = simd.mul_add_f32s(n, simd.splat_f32s(-0.693_359_4), x);
    let r = simd.mul_add_f32s(n, simd.splat_f32s(2.121_944_4e-4), r);
    let mut p = simd.splat_f32s(P[4]);
    for c in [P[3], P[2], P[1], P[0], 1.0, 1.0] {
        p = simd.mul_add_f32s(p, r, simd.splat_f32s(c));
    }
    let power = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    simd.transmute_f32s_u32s(simd.add_u32s(power, simd.transmute_u32s_f32s(p)))
}

/// Into ±limit; the order of the arguments keeps a NaN.
#[inline(always)]
fn clamp<S: Simd>(simd: S, x: S::f32s, limit: f32) -> S::f32s {
    simd.min_f32s(simd.splat_f32s(limit), simd.max_f32s(simd.splat_f32s(-limit), x))
}

#[inline(always)]
fn sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    simd.div_f32s(one, simd.add_f32s(one, exp(simd, simd.neg_f32s(clamp(simd, x, 80.0)))))
}

#[inline(always)]
fn tanh<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let (one, x) = (simd.splat_f32s(1.0), clamp(simd, x, 20.0));
    let e = exp(simd, simd.add_f32s(x, x));
    simd.div_f32s(simd.sub_f32s(e, one), simd.add_f32s(e, one))
}

/// a·(b − c·b).
#[inline(always)]
fn times_rest<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
    simd.mul_f32s(a, simd.sub_f32s(b, simd.mul_f32s(c, b)))
}

/// L values from `at` on, as many as there are: partial loads are slow.
#[inline(always)]
fn load<S: Simd>(simd: S, x: &[f32], at: usize) -> S::f32s {
    match x.get(at..at + S::F32_LANES) {
        Some(x) => S::as_simd_f32s(x).0[0],
        None => simd.partial_load_f32s(&x[at.min(x.len())..]),
    }
}

#[inline(always)]
fn store<S: Simd>(simd: S, x: &mut [f32], at: usize, v: S::f32s) {
    match x.get_mut(at..at + S::F32_LANES) {
        Some(x) => S::as_mut_simd_f32s(x).0[0] = v,
        None => simd.partial_store_f32s(&mut x[at..], v),
    }
}

/// Runs of at most `most` of n, as long as each other: a tile of one sequence waits for its own sums.
fn even(n: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let parts = n.div_ceil(most);
    (0..parts).map(move |k| k * n / parts..(k + 1) * n / parts)
}

// ---- packing ----------------------------------------------------------------------------------------------------------------

/// Reals of one model's packed weights.
fn packed_len(p: &RecurrentParams) -> usize {
    (p.inputs as usize + p.hidden as usize + 1) * 4 * (p.hidden as usize).next_multiple_of(PAD)
}

/// Weights of model m as [block][input][gate][lanes].
fn pack_model(p: &RecurrentParams, weights: [&[f32]; 4], m: usize, lanes: usize, out: &mut [f32]) {
    let (i, h, inner, g) = (p.inputs as usize, p.hidden as usize, (p.inputs + p.hidden) as usize + 1, p.gates());
    for (block, out) in out.chunks_exact_mut(inner * 4 * lanes).enumerate() {
        out.fill(0.0);
        for gate in 0..4 {
            for l in 0..lanes.min(h.saturating_sub(block * lanes)) {
                let j = block * lanes + l;
                let mut put = |k: usize, v: f32| out[(k * 4 + gate) * lanes + l] = v;
                if let Some(row) = input_row(p, gate, j) {
                    weights[0][(m * g + row) * i..][..i].iter().enumerate().for_each(|(k, &v)| put(k, v));
                }
                if let Some(row) = hidden_row(p, gate, j) {
                    weights[1][(m * g + row) * h..][..h].iter().enumerate().for_each(|(k, &v)| put(i + k, v));
                }
                put(i + h, weight_of(p, weights, m, i + h, gate, j));
            }
        }
    }
}

pub(crate) fn pack(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: RecurrentParams = launch.params()?;
    let weights = [launch.real()?, launch.real()?, launch.real()?, launch.real()?];
    let packed = launch.real_mut()?;
    let lanes = Arch::new().dispatch(Lanes);
    let used = packed_len(&p) / (p.hidden as usize).next_multiple_of(PAD) * (p.hidden as usize).next_multiple_of(lanes);
    packed.par_chunks_mut(packed_len(&p)).enumerate().take(p.models as usize).for_each(|(m, out)| pack_model(&p, weights, m, lanes, &mut out[..used]));
    Ok(())
}

// ---- tiles ------------------------------------------------------------------------------------------------------------------

/// Four gates of R sequences: the bias, then x, then h.
#[inline(always)]
fn gate_tile<S: Simd, const R: usize>(simd: S, w: &[S::f32s], x: [&[f32]; R], h: [&[f32]; R]) -> [[S::f32s; 4]; R] {
    let (n, k) = (x[0].len(), h[0].len());
    let (x, h) = (x.map(|x| &x[..n]), h.map(|h| &h[..k]));
    let bias = &w[4 * (n + k)..4 * (n + k + 1)];
    let mut a = [[bias[0], bias[1], bias[2], bias[3]]; R];
    for (i, w) in w[..4 * n].chunks_exact(4).enumerate() {
        for r in 0..R {
            let v = simd.splat_f32s(x[r][i]);
            for g in 0..4 {
                a[r][g] = simd.mul_add_f32s(v, w[g], a[r][g]);
            }
        }
    }
    for (i, w) in w[4 * n..4 * (n + k)].chunks_exact(4).enumerate() {
        for r in 0..R {
            let v = simd.splat_f32s(h[r][i]);
            for g in 0..4 {
                a[r][g] = simd.mul_add_f32s(v, w[g], a[r][g]);
            }
        }
    }
    a
}

/// R rows of left (one after the other) times V vectors of each row of right, `ld` vectors apart.
#[inline(always)]
fn row_tile<S: Simd, const R: usize, const V: usize>(simd: S, left: [&[f32]; R], right: &[S::f32s], ld: usize, at: usize) -> [[S::f32s; V]; R] {
    let n = left[0].len();
    let left = left.map(|x| &x[..n]);
    let mut a = [[simd.splat_f32s(0.0); V]; R];
    for (i, w) in right.chunks_exact(ld).take(n).enumerate() {
        let w = &w[at..at + V];
        for r in 0..R {
            let v = simd.splat_f32s(left[r][i]);
            for e in 0..V {
                a[r][e] = simd.mul_add_f32s(v, w[e], a[r][e]);
            }
        }
    }
    a
}

/// Adds left[r]·right to row index[r] of out; `ld` vectors a row.
#[inline(always)]
fn product<S: Simd>(simd: S, left: &[&[f32]], right: &[S::f32s], ld: usize, index: &[usize], out: &mut [S::f32s]) {
    let most = if S::F32_LANES == 16 { TILE } else { 3 };
    let mut at = 0;
    while at < ld {
        let width = if ld - at >= 4 {
            4
        } else if ld - at >= 2 {
            2
        } else {
            1
        };
        let most = if width == 1 { 8 } else { most };
        for run in even(left.len(), most) {
            let (left, index) = (&left[run.clone()], &index[run]);
            match width {
                4 => product_rows::<S, 4>(simd, left, right, ld, at, index, out),
                2 => product_rows::<S, 2>(simd, left, right, ld, at, index, out),
                _ => product_rows::<S, 1>(simd, left, right, ld, at, index, out),
            }
        }
        at += width;
    }
}

#[inline(always)]
fn product_rows<S: Simd, const V: usize>(simd: S, left: &[&[f32]], right: &[S::f32s], ld: usize, at: usize, index: &[usize], out: &mut [S::f32s]) {
    match left.len() {
        8 => add_tile(simd, ld, at, index, row_tile::<S, 8, V>(simd, first(left), right, ld, at), out),
        7 => add_tile(simd, ld, at, index, row_tile::<S, 7, V>(simd, first(left), right, ld, at), out),
        6 => add_tile(simd, ld, at, index, row_tile::<S, 6, V>(simd, first(left), right, ld, at), out),
        5 => add_tile(simd, ld, at, index, row_tile::<S, 5, V>(simd, first(left), right, ld, at), out),
        4 => add_tile(simd, ld, at, index, row_tile::<S, 4, V>(simd, first(left), right, ld, at), out),
        3 => add_tile(simd, ld, at, index, row_tile::<S, 3, V>(simd, first(left), right, ld, at), out),
        2 => add_tile(simd, ld, at, index, row_tile::<S, 2, V>(simd, first(left), right, ld, at), out),
        _ => add_tile(simd, ld, at, index, row_tile::<S, 1, V>(simd, first(left), right, ld, at), out),
    }
}

/// The first R rows.
#[inline(always)]
fn first<'a, const R: usize>(rows: &[&'a [f32]]) -> [&'a [f32]; R] {
    let mut out = [&[] as &[f32]; R];
    out.copy_from_slice(&rows[..R]);
    out
}

#[inline(always)]
fn add_tile<S: Simd, const R: usize, const V: usize>(simd: S, ld: usize, at: usize, index: &[usize], tile: [[S::f32s; V]; R], out: &mut [S::f32s]) {
    for r in 0..R {
        let out = &mut out[index[r] * ld + at..][..V];
        for e in 0..V {
            out[e] = simd.add_f32s(out[e], tile[r][e]);
        }
    }
}

// ---- forward ----------------------------------------------------------------------------------------------------------------

/// One sequence of a forward launch.
struct Sequence<'a> {
    q: usize,
    m: usize,
    b: usize,
    length: usize,
    y: &'a mut [f32],
    saved: &'a mut [f32],
    state_h: &'a mut [f32],
    state_c: &'a mut [f32],
}

/// Splits the sequences of each model into tasks.
fn tasks<'a, T>(p: &RecurrentParams, sequences: &'a mut [T]) -> Vec<&'a mut [T]> {
    let threads = rayon::current_num_threads();
    let own = p.own().max(1);
    let wanted = (4 * threads).div_ceil(p.models.max(1) as usize).max(1);
    let each =
        if p.models as usize >= threads { TASK } else { own.div_ceil(wanted).clamp(TILE, TASK).next_multiple_of(2).max(own.div_ceil(threads).min(TASK)) };
    sequences.chunks_mut(own).flat_map(|model| model.chunks_mut(each)).collect()
}

struct Forward<'a, 'b> {
    p: &'a RecurrentParams,
    x: &'a [f32],
    packed: &'a [f32],
    resets: &'a [u32],
    starts: &'a [f32],
    sequences: &'a mut [Sequence<'b>],
    /// h, the next h and c of the sequences, in whole vectors.
    memory: [&'a mut [f32]; 3],
}

pub(crate) fn forward(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: RecurrentParams = launch.params()?;
    let (x, packed, lengths, resets) = (launch.real()?, launch.real()?, launch.word()?, launch.word()?);
    let (state, y, saved) = (launch.real_mut()?, launch.real_mut()?, launch.real_mut()?);
    let (t, h) = (p.time as usize, p.hidden as usize);
    let (rows, all, own, first) = (p.rows as usize, (p.models * p.batch) as usize, p.own(), p.row0 as usize);
    let (starts, moving) = state.split_at_mut(2 * all * h);
    let (hs, cs) = moving.split_at_mut(all * h);
    let kept = if p.has(flag::STATES) { t * p.width() } else { 0 };
    let states = hs.chunks_mut(h).skip(first).zip(cs.chunks_mut(h).skip(first));
    let outputs = chunks(y, t * p.y_stride as usize, rows).into_iter().zip(chunks(saved, kept, rows)).zip(states);
    let of = |(q, ((y, saved), (state_h, state_c)))| {
        let (m, b): (usize, usize) = (q / own, first + q % own);
        Sequence { q, m, b, length: p.length(lengths, b), y, saved, state_h, state_c }
    };
    let mut sequences: Vec<Sequence<'_>> = outputs.enumerate().map(of).collect();
    let starts = &*starts;
    let arch = Arch::new();
    tasks(&p, &mut sequences).into_par_iter().for_each(|sequences| {
        let packed = &packed[sequences[0].m * packed_len(&p)..][..packed_len(&p)];
        let n = sequences.len() * h.next_multiple_of(arch.dispatch(Lanes));
        in_memory([n; 3], |memory| arch.dispatch(Forward { p: &p, x, packed, resets, starts, sequences, memory }));
    });
    Ok(())
}

impl WithSimd for Forward<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Forward { p, x, packed, resets, starts, sequences, memory: [hs, next, cs] } = self;
        let (t, h, i) = (p.time as usize, p.hidden as usize, p.inputs as usize);
        let padded = h.next_multiple_of(S::F32_LANES);
        let block = (i + h + 1) * 4;
        let start = |sequence: &Sequence<'_>, h_row: &mut [f32], c_row: &mut [f32]| {
            let row = sequence.m * p.batch as usize + sequence.b;
            for j in 0..h {
                h_row[j] = start_of(p, starts, 0, sequence.m, row, j);
                c_row[j] = start_of(p, starts, 1, sequence.m, row, j);
            }
        };
        hs.fill(0.0);
        cs.fill(0.0);
        for ((sequence, h_row), c_row) in sequences.iter().zip(hs.chunks_mut(padded)).zip(cs.chunks_mut(padded)) {
            if p.from_step == 0 {
                start(sequence, h_row, c_row);
            } else {
                h_row[..h].copy_from_slice(sequence.state_h);
                c_row[..h].copy_from_slice(sequence.state_c);
            }
        }
        let most = if S::F32_LANES == 16 { TILE } else { 2 };
        let mut active = Vec::with_capacity(sequences.len());
        for s in p.from_step as usize..p.to_step as usize {
            active.clear();
            for (r, sequence) in sequences.iter_mut().enumerate() {
                let step = p.step(s, sequence.length);
                if s >= sequence.length {
                    sequence.y[step * p.y_stride as usize + p.y_offset as usize..][..h].fill(0.0);
                    continue;
                }
                if p.resets_at(resets, sequence.b, step) {
                    start(sequence, &mut hs[r * padded..][..padded], &mut cs[r * padded..][..padded]);
                }
                active.push((r, step, (p.x_row(sequence.q, sequence.b) * t + step) * i));
                if s + AHEAD < p.to_step as usize {
                    let early = p.step(s + AHEAD, sequence.length);
                    prefetch(&sequence.y[early * p.y_stride as usize + p.y_offset as usize..][..h]);
                    if p.has(flag::STATES) {
                        prefetch(&sequence.saved[early * p.width()..][..p.width()]);
                    }
                }
            }
            for (index, w) in S::as_simd_f32s(packed).0.chunks_exact(block).take(padded / S::F32_LANES).enumerate() {
                let j = index * S::F32_LANES;
                for run in even(active.len(), most) {
                    let rows = &active[run];
                    let mut of: [&[f32]; TILE] = [&[]; TILE];
                    let mut last: [&[f32]; TILE] = [&[]; TILE];
                    for (r, &(row, _, at)) in rows.iter().enumerate() {
                        of[r] = &x[at..at + i];
                        last[r] = &hs[row * padded..][..h];
                    }
                    let mut tile = [[simd.splat_f32s(0.0); 4]; TILE];
                    match rows.len() {
                        6 => keep(&mut tile, gate_tile::<S, 6>(simd, w, first(&of), first(&last))),
                        5 => keep(&mut tile, gate_tile::<S, 5>(simd, w, first(&of), first(&last))),
                        4 => keep(&mut tile, gate_tile::<S, 4>(simd, w, first(&of), first(&last))),
                        3 => keep(&mut tile, gate_tile::<S, 3>(simd, w, first(&of), first(&last))),
                        2 => keep(&mut tile, gate_tile::<S, 2>(simd, w, first(&of), first(&last))),
                        _ => keep(&mut tile, gate_tile::<S, 1>(simd, w, first(&of), first(&last))),
                    }
                    for (r, &(row, step, _)) in rows.iter().enumerate() {
                        let at = row * padded + j;
                        cell(simd, p, tile[r], j, step, &mut sequences[row], &hs[at..], &mut cs[at..], &mut next[at..]);
                    }
                }
            }
            for &(r, step, _) in &active {
                let new = &next[r * padded..][..padded];
                hs[r * padded..][..padded].copy_from_slice(new);
                sequences[r].y[step * p.y_stride as usize + p.y_offset as usize..][..h].copy_from_slice(&new[..h]);
            }
        }
        for ((sequence, h_row), c_row) in sequences.iter_mut().zip(hs.chunks(padded)).zip(cs.chunks(padded)) {
            sequence.state_h.copy_from_slice(&h_row[..h]);
            sequence.state_c.copy_from_slice(&c_row[..h]);
        }
    }
}

#[inline(always)]
fn keep<V: Copy, const R: usize>(tile: &mut [V; TILE], rows: [V; R]) {
    tile[..R].copy_from_slice(&rows);
}

/// From pre-activations of L units to their states; keeps what backward needs.
#[inline(always)]
fn cell<S: Simd>(
    simd: S,
    p: &RecurrentParams,
    a: [S::f32s; 4],
    j: usize,
    step: usize,
    sequence: &mut Sequence<'_>,
    h_last: &[f32],
    c: &mut [f32],
    next: &mut [f32],
) {
    let (one, lanes, h) = (simd.splat_f32s(1.0), S::F32_LANES, p.hidden as usize);
    let h_last = S::as_simd_f32s(&h_last[..lanes]).0[0];
    let c = &mut S::as_mut_simd_f32s(&mut c[..lanes]).0[0];
    let c_last = *c;
    let (r, z) = (sigmoid(simd, a[0]), sigmoid(simd, a[1]));
    let (g, o);
    let new = if p.gru() {
        g = tanh(simd, simd.mul_add_f32s(r, a[3], a[2]));
        o = a[3];
        simd.mul_add_f32s(z, h_last, simd.mul_f32s(simd.sub_f32s(one, z), g))
    } else {
        g = tanh(simd, a[2]);
        o = sigmoid(simd, a[3]);
        *c = simd.mul_add_f32s(z, c_last, simd.mul_f32s(r, g));
        simd.mul_f32s(o, tanh(simd, *c))
    };
    S::as_mut_simd_f32s(&mut next[..lanes]).0[0] = new;
    if p.has(flag::STATES) {
        let kept = &mut sequence.saved[step * p.width()..][..p.width()];
        if p.has(flag::GATES) {
            for (q, v) in [r, z, g, o].into_iter().enumerate() {
                store(simd, &mut kept[q * h..(q + 1) * h], j, v);
            }
        }
        let states = &mut kept[p.kept_h()..];
        store(simd, &mut states[..h], j, h_last);
        if !p.gru() {
            store(simd, &mut states[h..2 * h], j, c_last);
        }
    }
}

// ---- gates again ------------------------------------------------------------------------------------------------------------

struct Gates<'a> {
    p: &'a RecurrentParams,
    packed: &'a [f32],
    x: &'a [f32],
    saved: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Gates<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Gates { p, packed, x, saved, out } = self;
        let (h, i) = (p.hidden as usize, p.inputs as usize);
        let block = (i + h + 1) * 4;
        for (index, w) in S::as_simd_f32s(packed).0.chunks_exact(block).take(h.div_ceil(S::F32_LANES)).enumerate() {
            for (n, out) in out.chunks_mut(2 * 4 * h).enumerate() {
                let (x, last) = (&x[2 * n * i..], &saved[2 * n * p.width() + p.kept_h()..]);
                let tile = if out.len() > 4 * h {
                    gate_tile::<S, 2>(simd, w, [&x[..i], &x[i..2 * i]], [&last[..h], &last[p.width()..p.width() + h]])
                } else {
                    [gate_tile::<S, 1>(simd, w, [&x[..i]], [&last[..h]])[0]; 2]
                };
                for (out, gates) in out.chunks_mut(4 * h).zip(tile) {
                    for (out, v) in out.chunks_mut(h).zip(gates) {
                        store(simd, out, index * S::F32_LANES, v);
                    }
                }
            }
        }
    }
}

pub(crate) fn gates(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: RecurrentParams = launch.params()?;
    let (x, saved) = (launch.real()?, launch.real()?);
    let weights = [launch.real()?, launch.real()?, launch.real()?, launch.real()?];
    let gates = launch.real_mut()?;
    let (t, h, i, own) = (p.time as usize, p.hidden as usize, p.inputs as usize, p.own());
    let arch = Arch::new();
    let lanes = arch.dispatch(Lanes);
    let len = (i + h + 1) * 4 * h.next_multiple_of(lanes);
    gates.par_chunks_mut(own * t * 4 * h).enumerate().take(p.models as usize).for_each(|(m, out)| {
        let mut packed = vec![0f32; len + PAD];
        let skip = packed.as_ptr().align_offset(4 * PAD).min(PAD);
        let packed = &mut packed[skip..skip + len];
        pack_model(&p, weights, m, lanes, packed);
        let packed = &*packed;
        out.par_chunks_mut(t * 4 * h).enumerate().for_each(|(b, out)| {
            let q = m * own + b;
            let x = &x[p.x_row(q, p.row0 as usize + b) * t * i..][..t * i];
            arch.dispatch(Gates { p: &p, packed, x, saved: &saved[q * t * p.width()..][..t * p.width()], out });
        });
    });
    Ok(())
}

// ---- backward ---------------------------------------------------------------------------------------------------------------

/// One sequence of a backward launch.
struct Reversed<'a> {
    q: usize,
    m: usize,
    b: usize,
    length: usize,
    gates: &'a mut [f32],
    grad_h: &'a mut [f32],
    grad_c: &'a mut [f32],
    grad_h0: &'a mut [f32],
    grad_c0: &'a mut [f32],
}

struct Backward<'a, 'b> {
    p: &'a RecurrentParams,
    saved: &'a [f32],
    w_hh: &'a [f32],
    resets: &'a [u32],
    grad_y: &'a [f32],
    sequences: &'a mut [Reversed<'b>],
    /// w_hh, and the gradients of h and c, in whole vectors.
    memory: [&'a mut [f32]; 3],
}

pub(crate) fn backward(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: RecurrentParams = launch.params()?;
    let (saved, w_hh, lengths, resets, grad_y) = (launch.real()?, launch.real()?, launch.word()?, launch.word()?, launch.real()?);
    let (gates, sums) = (launch.real_mut()?, launch.real_mut()?);
    let (t, h, own, first) = (p.time as usize, p.hidden as usize, p.own(), p.row0 as usize);
    let all = (p.models * p.batch) as usize * h;
    let (grad_h, rest) = sums.split_at_mut(all);
    let (grad_c, rest) = rest.split_at_mut(all);
    let (grad_h0, grad_c0) = rest[..2 * all].split_at_mut(all);
    let [grad_h, grad_c, grad_h0, grad_c0] = [grad_h, grad_c, grad_h0, grad_c0].map(|x| x.chunks_mut(h).skip(first));
    let states = grad_h.zip(grad_c).zip(grad_h0.zip(grad_c0)).take(p.rows as usize);
    let of = |(q, (((grad_h, grad_c), (grad_h0, grad_c0)), gates))| {
        let (m, b): (usize, usize) = (q / own, first + q % own);
        Reversed { q, m, b, length: p.length(lengths, b), gates, grad_h, grad_c, grad_h0, grad_c0 }
    };
    let mut sequences: Vec<Reversed<'_>> = states.zip(chunks(gates, t * 4 * h, p.rows as usize)).enumerate().map(of).collect();
    let arch = Arch::new();
    tasks(&p, &mut sequences).into_par_iter().for_each(|sequences| {
        let each = p.gates() * h;
        let w_hh = &w_hh[sequences[0].m * each..][..each];
        let padded = h.next_multiple_of(arch.dispatch(Lanes));
        let n = sequences.len() * padded;
        in_memory([4 * h * padded, n, n], |memory| arch.dispatch(Backward { p: &p, saved, w_hh, resets, grad_y, sequences, memory }));
    });
    Ok(())
}

impl WithSimd for Backward<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Backward { p, saved, w_hh, resets, grad_y, sequences, memory: [w, dhs, dcs] } = self;
        let (t, h, lanes) = (p.time as usize, p.hidden as usize, S::F32_LANES);
        let padded = h.next_multiple_of(lanes);
        w.fill(0.0);
        for (c, out) in w.chunks_mut(padded).enumerate() {
            if let Some(row) = hidden_row(p, c / h, c % h) {
                out[..h].copy_from_slice(&w_hh[row * h..][..h]);
            }
        }
        let w = S::as_simd_f32s(w).0;
        let begin = p.to_step == p.time;
        dhs.fill(0.0);
        dcs.fill(0.0);
        for ((sequence, dh), dc) in sequences.iter_mut().zip(dhs.chunks_mut(padded)).zip(dcs.chunks_mut(padded)) {
            if !begin || p.has(flag::GRAD_HN) {
                dh[..h].copy_from_slice(sequence.grad_h);
            }
            if !begin || p.has(flag::GRAD_CN) {
                dc[..h].copy_from_slice(sequence.grad_c);
            }
            if begin {
                sequence.grad_h0.fill(0.0);
                sequence.grad_c0.fill(0.0);
            }
        }
        let (mut active, mut index) = (Vec::with_capacity(sequences.len()), Vec::with_capacity(sequences.len()));
        for s in (p.from_step as usize..p.to_step as usize).rev() {
            active.clear();
            for (r, sequence) in sequences.iter_mut().enumerate() {
                let step = p.step(s, sequence.length);
                if s >= sequence.length {
                    sequence.gates[step * 4 * h..][..4 * h].fill(0.0);
                    continue;
                }
                active.push((r, step));
                if s >= p.from_step as usize + AHEAD {
                    let early = p.step(s - AHEAD, sequence.length);
                    prefetch(&saved[(sequence.q * t + early) * p.width()..][..p.width()]);
                    prefetch(&sequence.gates[early * 4 * h..][..4 * h]);
                }
                let out = &mut sequence.gates[step * 4 * h..][..4 * h];
                let slot = sequence.q * t + step;
                let kept = &saved[slot * p.width()..][..p.width()];
                let up = if p.has(flag::GRAD_Y) { &grad_y[slot * p.y_stride as usize + p.y_offset as usize..][..h] } else { &[] };
                let (dh, dc) = (&mut dhs[r * padded..][..padded], &mut dcs[r * padded..][..padded]);
                let (dh, dc) = (S::as_mut_simd_f32s(dh).0, S::as_mut_simd_f32s(dc).0);
                for v in 0..padded / lanes {
                    delta(simd, p, v * lanes, kept, up, out, &mut dh[v], &mut dc[v]);
                }
            }
            let left: Vec<&[f32]> = active.iter().map(|&(r, step)| &sequences[r].gates[step * 4 * h..][..4 * h]).collect();
            index.clear();
            index.extend(active.iter().map(|&(r, _)| r));
            product(simd, &left, w, padded / lanes, &index, S::as_mut_simd_f32s(dhs).0);
            for &(r, step) in &active {
                let sequence = &mut sequences[r];
                if p.resets_at(resets, sequence.b, step) {
                    add_start(sequence, &dhs[r * padded..], &dcs[r * padded..]);
                    dhs[r * padded..][..padded].fill(0.0);
                    dcs[r * padded..][..padded].fill(0.0);
                }
            }
        }
        for (r, sequence) in sequences.iter_mut().enumerate() {
            sequence.grad_h.copy_from_slice(&dhs[r * padded..][..h]);
            sequence.grad_c.copy_from_slice(&dcs[r * padded..][..h]);
            if p.from_step == 0 {
                add_start(sequence, &dhs[r * padded..], &dcs[r * padded..]);
            }
        }
    }
}

fn add_start(sequence: &mut Reversed<'_>, dh: &[f32], dc: &[f32]) {
    sequence.grad_h0.iter_mut().zip(dh).for_each(|(sum, &d)| *sum += d);
    sequence.grad_c0.iter_mut().zip(dc).for_each(|(sum, &d)| *sum += d);
}

/// δ of L units; dh becomes what goes past the gates, dc that of the step before.
#[inline(always)]
fn delta<S: Simd>(simd: S, p: &RecurrentParams, j: usize, kept: &[f32], up: &[f32], out: &mut [f32], dh: &mut S::f32s, dc: &mut S::f32s) {
    let (one, h) = (simd.splat_f32s(1.0), p.hidden as usize);
    let mut g = [one; 4];
    let from = if p.has(flag::GATES) { kept } else { &*out };
    for q in 0..4 {
        g[q] = load(simd, &from[q * h..(q + 1) * h], j);
    }
    if !p.has(flag::GATES) {
        g[0] = sigmoid(simd, g[0]);
        g[1] = sigmoid(simd, g[1]);
        if p.gru() {
            g[2] = tanh(simd, simd.mul_add_f32s(g[0], g[3], g[2]));
        } else {
            g[2] = tanh(simd, g[2]);
            g[3] = sigmoid(simd, g[3]);
        }
    }
    let mut d = *dh;
    if !up.is_empty() {
        d = simd.add_f32s(d, load(simd, up, j));
    }
    let before = &kept[p.kept_h()..];
    let deltas = if p.gru() {
        let last = load(simd, &before[..h], j);
        let dn = simd.mul_f32s(simd.mul_f32s(d, simd.sub_f32s(one, g[1])), simd.sub_f32s(one, simd.mul_f32s(g[2], g[2])));
        let dz = times_rest(simd, simd.mul_f32s(d, simd.sub_f32s(last, g[2])), g[1], g[1]);
        *dh = simd.mul_f32s(d, g[1]);
        [times_rest(simd, simd.mul_f32s(dn, g[3]), g[0], g[0]), dz, dn, simd.mul_f32s(dn, g[0])]
    } else {
        let last = load(simd, &before[h..2 * h], j);
        let t = tanh(simd, simd.mul_add_f32s(g[1], last, simd.mul_f32s(g[0], g[2])));
        let e = simd.mul_add_f32s(simd.mul_f32s(d, g[3]), simd.sub_f32s(one, simd.mul_f32s(t, t)), *dc);
        *dc = simd.mul_f32s(e, g[1]);
        *dh = simd.splat_f32s(0.0);
        let dg = simd.mul_f32s(simd.mul_f32s(e, g[0]), simd.sub_f32s(one, simd.mul_f32s(g[2], g[2])));
        [
            times_rest(simd, simd.mul_f32s(e, g[2]), g[0], g[0]),
            times_rest(simd, simd.mul_f32s(e, last), g[1], g[1]),
            dg,
            times_rest(simd, simd.mul_f32s(d, t), g[3], g[3]),
        ]
    };
    for q in 0..4 {
        store(simd, &mut out[q * h..(q + 1) * h], j, deltas[q]);
    }
}

// ---- gradients of x and of the weights ----------------------------------------------------------------------------------------

struct GradX<'a> {
    p: &'a RecurrentParams,
    w_ih: &'a [f32],
    gates: &'a [f32],
    out: &'a mut [f32],
    /// w_ih and results, in whole vectors.
    memory: [&'a mut [f32]; 2],
}

impl WithSimd for GradX<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let GradX { p, w_ih, gates, out, memory: [w, results] } = self;
        let (h, i, g) = (p.hidden as usize, p.inputs as usize, p.gates());
        let padded = i.next_multiple_of(S::F32_LANES);
        w.fill(0.0);
        w.chunks_mut(padded).zip(w_ih.chunks(i)).for_each(|(to, from)| to[..i].copy_from_slice(from));
        let w = S::as_simd_f32s(w).0;
        let mut index = [0; TASK];
        index.iter_mut().enumerate().for_each(|(r, index)| *index = r);
        for (out, gates) in out.chunks_mut(TASK * i).zip(gates.chunks(TASK * 4 * h)) {
            let mut left: [&[f32]; TASK] = [&[]; TASK];
            let rows = gates.len() / (4 * h);
            left.iter_mut().zip(gates.chunks(4 * h)).for_each(|(left, gates)| *left = &gates[..g]);
            results.fill(0.0);
            product(simd, &left[..rows], w, padded / S::F32_LANES, &index[..rows], S::as_mut_simd_f32s(results).0);
            out.chunks_mut(i).zip(results.chunks(padded)).for_each(|(out, results)| out.copy_from_slice(&results[..i]));
        }
    }
}

/// Columns c0.. of δ, against all inputs, over runs of steps: [input][columns].
struct GradW<'a> {
    p: &'a RecurrentParams,
    m: usize,
    slice: usize,
    c0: usize,
    columns: usize,
    x: &'a [f32],
    /// What the model's sequences kept, and their δ.
    saved: &'a [f32],
    gates: &'a [f32],
    lengths: &'a [u32],
    out: &'a mut [f32],
}

impl WithSimd for GradW<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (p, t) = (self.p, self.p.time as usize);
        let (h, i) = (p.hidden as usize, p.inputs as usize);
        let vectors = self.columns.div_ceil(S::F32_LANES);
        let ld = COLUMNS.max(S::F32_LANES) / S::F32_LANES;
        let out = S::as_mut_simd_f32s(self.out).0;
        let (from, to) = p.slice(self.slice);
        let mut n = from;
        while n < to {
            // a run of valid steps of one sequence, or of all where none is shorter
            let (b, step) = (n / t, n % t);
            let length = p.length(self.lengths, b);
            let end = if p.has(flag::LENGTHS) { (b + 1) * t } else { to }.min(to);
            let valid = if p.has(flag::LENGTHS) { (b * t + length.max(step)).min(end) } else { end }.min(n + RUN);
            if valid == n {
                n = end;
                continue;
            }
            let row = b - p.row0 as usize;
            let x = &self.x[(p.x_row(self.m * p.own() + row, b) * t + step) * i..];
            let saved = &self.saved[(row * t + step) * p.width() + p.kept_h()..];
            let gates = &self.gates[(row * t + step) * 4 * h + self.c0..];
            let run = Run { steps: valid - n, gates, stride: 4 * h, columns: self.columns, ld };
            let (of_x, rest) = out.split_at_mut(i * ld);
            let (of_h, of_one) = rest.split_at_mut(h * ld);
            run.inputs(simd, vectors, x, i, i, of_x);
            run.inputs(simd, vectors, saved, p.width(), h, of_h);
            run.inputs(simd, vectors, &[1.0], 0, 1, of_one);
            n = valid;
        }
    }
}

/// Columns of a task of weight gradients: four vectors of 16.
const COLUMNS: usize = 64;

struct Run<'a> {
    steps: usize,
    gates: &'a [f32],
    stride: usize,
    columns: usize,
    ld: usize,
}

impl Run<'_> {
    /// Adds `count` inputs' products.
    #[inline(always)]
    fn inputs<S: Simd>(&self, simd: S, vectors: usize, left: &[f32], stride: usize, count: usize, out: &mut [S::f32s]) {
        let mut at = 0;
        while at < vectors {
            let width = if vectors - at >= 4 {
                4
            } else if vectors - at >= 2 {
                2
            } else {
                1
            };
            let most = if S::F32_LANES == 16 { TILE } else { 3 };
            let mut k = 0;
            while k < count {
                let rows = (count - k).min(most);
                let out = &mut out[k * self.ld + at..];
                match width {
                    4 => self.rows::<S, 4>(simd, at, &left[k..], stride, rows, out),
                    2 => self.rows::<S, 2>(simd, at, &left[k..], stride, rows, out),
                    _ => self.rows::<S, 1>(simd, at, &left[k..], stride, rows, out),
                }
                k += rows;
            }
            at += width;
        }
    }

    #[inline(always)]
    fn rows<S: Simd, const V: usize>(&self, simd: S, at: usize, left: &[f32], stride: usize, rows: usize, out: &mut [S::f32s]) {
        match rows {
            6 => self.tile::<S, 6, V>(simd, at, left, stride, out),
            5 => self.tile::<S, 5, V>(simd, at, left, stride, out),
            4 => self.tile::<S, 4, V>(simd, at, left, stride, out),
            3 => self.tile::<S, 3, V>(simd, at, left, stride, out),
            2 => self.tile::<S, 2, V>(simd, at, left, stride, out),
            _ => self.tile::<S, 1, V>(simd, at, left, stride, out),
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize, const V: usize>(&self, simd: S, at: usize, left: &[f32], stride: usize, out: &mut [S::f32s]) {
        let mut a = [[simd.splat_f32s(0.0); V]; R];
        for r in 0..R {
            for e in 0..V {
                a[r][e] = out[r * self.ld + e];
            }
        }
        let from = at * S::F32_LANES;
        let width = (self.columns - from).min(V * S::F32_LANES);
        if width == V * S::F32_LANES {
            for n in 0..self.steps {
                let w = S::as_simd_f32s(&self.gates[n * self.stride + from..][..V * S::F32_LANES]).0;
                let (w, left) = (&w[..V], &left[n * stride..][..R]);
                for r in 0..R {
                    let v = simd.splat_f32s(left[r]);
                    for e in 0..V {
                        a[r][e] = simd.mul_add_f32s(v, w[e], a[r][e]);
                    }
                }
            }
        } else {
            for n in 0..self.steps {
                let row = &self.gates[n * self.stride + from..][..width];
                let left = &left[n * stride..][..R];
                for e in 0..V {
                    let w = load(simd, row, e * S::F32_LANES);
                    for r in 0..R {
                        a[r][e] = simd.mul_add_f32s(simd.splat_f32s(left[r]), w, a[r][e]);
                    }
                }
            }
        }
        for r in 0..R {
            for e in 0..V {
                out[r * self.ld + e] = a[r][e];
            }
        }
    }
}

pub(crate) fn gradients(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: RecurrentParams = launch.params()?;
    let (x, saved, lengths, w_ih, gates) = (launch.real()?, launch.real()?, launch.word()?, launch.real()?, launch.real()?);
    let (grad_x, sums) = (launch.real_mut()?, launch.real_mut()?);
    let (t, h, i, own, g) = (p.time as usize, p.hidden as usize, p.inputs as usize, p.own(), p.gates());
    let arch = Arch::new();
    if p.has(flag::GRAD_X) && t > 0 {
        let part = (own * t).div_ceil(4 * rayon::current_num_threads()).clamp(2 * TASK, 1024);
        grad_x.par_chunks_mut(own * t * i).zip(gates.par_chunks(own * t * 4 * h)).enumerate().for_each(|(m, (out, gates))| {
            let w_ih = &w_ih[m * g * i..][..g * i];
            let padded = i.next_multiple_of(arch.dispatch(Lanes));
            out.par_chunks_mut(part * i).zip(gates.par_chunks(part * 4 * h)).for_each(|(out, gates)| {
                in_memory([g * padded, TASK * padded], |memory| arch.dispatch(GradX { p: &p, w_ih, gates, out, memory }));
            });
        });
    }
    if !p.has(flag::GRAD_W) {
        return Ok(());
    }
    let each = p.models as usize * p.weights();
    let [_, at_hh, at_b, at_bh] = p.parts();
    let slices = sums[p.partials()..].par_chunks_mut(each).enumerate().skip(p.slice0 as usize).take(p.slice_count as usize);
    slices.for_each(|(slice, out)| {
        let (w_ih, rest) = out.split_at_mut(at_hh);
        let (w_hh, rest) = rest.split_at_mut(at_b - at_hh);
        let (b_ih, b_hh) = rest.split_at_mut(at_bh - at_b);
        let b_hh = chunks(b_hh, g, p.models as usize);
        let models = w_ih.par_chunks_mut(g * i).zip(w_hh.par_chunks_mut(g * h)).zip(b_ih.par_chunks_mut(g).zip(b_hh));
        models.enumerate().for_each(|(m, ((w_ih, w_hh), (b_ih, b_hh)))| {
            let mut out = Weights { p: &p, w_ih, w_hh, b_ih, b_hh };
            let (saved, gates) = (&saved[m * own * t * p.width()..], &gates[m * own * t * 4 * h..]);
            let sum = |c0: usize| {
                let columns = COLUMNS.min(4 * h - c0);
                let len = (i + h + 1) * COLUMNS;
                let mut memory = vec![0f32; len + PAD];
                let skip = memory.as_ptr().align_offset(4 * PAD).min(PAD);
                arch.dispatch(GradW { p: &p, m, slice, c0, columns, x, saved, lengths, gates, out: &mut memory[skip..skip + len] });
                (c0, columns, skip, memory)
            };
            if 4 * h <= COLUMNS {
                let (c0, columns, skip, memory) = sum(0);
                out.put(c0, columns, &memory[skip..]);
                return;
            }
            let blocks: Vec<_> = (0..4 * h).into_par_iter().step_by(COLUMNS).map(sum).collect();
            blocks.iter().for_each(|(c0, columns, skip, memory)| out.put(*c0, *columns, &memory[*skip..]));
        });
    });
    Ok(())
}

/// One model's weight gradients in one slice.
struct Weights<'a> {
    p: &'a RecurrentParams,
    w_ih: &'a mut [f32],
    w_hh: &'a mut [f32],
    b_ih: &'a mut [f32],
    b_hh: &'a mut [f32],
}

impl Weights<'_> {
    /// Transposes columns c0.. of [input][column].
    fn put(&mut self, c0: usize, columns: usize, from: &[f32]) {
        let (h, i) = (self.p.hidden as usize, self.p.inputs as usize);
        for at in 0..columns {
            let (gate, j) = ((c0 + at) / h, (c0 + at) % h);
            if let Some(row) = input_row(self.p, gate, j) {
                self.w_ih[row * i..][..i].iter_mut().enumerate().for_each(|(k, out)| *out = from[k * COLUMNS + at]);
                self.b_ih[row] = from[(i + h) * COLUMNS + at];
            }
            if let Some(row) = hidden_row(self.p, gate, j) {
                self.w_hh[row * h..][..h].iter_mut().enumerate().for_each(|(k, out)| *out = from[(i + k) * COLUMNS + at]);
                if self.p.gru() {
                    self.b_hh[row] = from[(i + h) * COLUMNS + at];
                }
            }
        }
    }
}

// ---- a model at a time ------------------------------------------------------------------------------------------------------

/// δ and all gradients of one model after the other: δ stays in the second-level cache and never reaches memory.
pub(crate) fn backward_models(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: RecurrentParams = launch.params()?;
    let (x, saved) = (launch.real()?, launch.real()?);
    let weights = [launch.real()?, launch.real()?, launch.real()?, launch.real()?];
    let (lengths, resets, grad_y) = (launch.word()?, launch.word()?, launch.real()?);
    let (grad_x, sums) = (launch.real_mut()?, launch.real_mut()?);
    let (t, h, i, own, g, models) = (p.time as usize, p.hidden as usize, p.inputs as usize, p.own(), p.gates(), p.models as usize);
    let (states, partials) = sums.split_at_mut(p.partials());
    let [grad_h, grad_c, grad_h0, grad_c0] = quarters(&mut states[..4 * models * own * h]);
    let [_, at_hh, at_b, at_bh] = p.parts();
    let (w_ih, rest) = partials.split_at_mut(at_hh);
    let (w_hh, rest) = rest.split_at_mut(at_b - at_hh);
    let (b_ih, b_hh) = rest.split_at_mut(at_bh - at_b);
    let wanted = |bit: u32, n: usize| if p.has(bit) { n } else { 0 };
    let outs = chunks(w_ih, g * i, models).into_iter().zip(chunks(w_hh, g * h, models)).zip(chunks(b_ih, g, models).into_iter().zip(chunks(
        b_hh,
        if p.gru() { g } else { 0 },
        models,
    )));
    let states = grad_h.chunks_mut(own * h).zip(grad_c.chunks_mut(own * h)).zip(grad_h0.chunks_mut(own * h).zip(grad_c0.chunks_mut(own * h)));
    let tasks: Vec<_> = outs.zip(states).zip(chunks(grad_x, wanted(flag::GRAD_X, own * t * i), models)).collect();
    let arch = Arch::new();
    let lanes = arch.dispatch(Lanes);
    let (padded, padded_i, rows) = (h.next_multiple_of(lanes), i.next_multiple_of(lanes), own.min(TASK));
    let packed = if p.has(flag::GATES) { 0 } else { (i + h + 1) * 4 * padded };
    let sizes =
        [own * t * 4 * h, packed, 4 * h * padded, rows * padded, rows * padded, wanted(flag::GRAD_X, g * padded_i), TASK * padded_i, (i + h + 1) * COLUMNS];
    tasks.into_par_iter().enumerate().for_each(|(m, ((weight_grads, state_grads), grad_x))| {
        let ((w_ih, w_hh), (b_ih, b_hh)) = weight_grads;
        let ((grad_h, grad_c), (grad_h0, grad_c0)) = state_grads;
        let mut out = Weights { p: &p, w_ih, w_hh, b_ih, b_hh };
        in_memory(sizes, |[gates, packed, w, dh, dc, w_x, results, sum]| {
            let of_model = &saved[m * own * t * p.width()..][..own * t * p.width()];
            if !p.has(flag::GATES) {
                pack_model(&p, weights, m, lanes, packed);
                for (row, (out, saved)) in gates.chunks_mut(t * 4 * h).zip(of_model.chunks(t * p.width())).enumerate() {
                    let x = &x[p.x_row(m * own + row, row) * t * i..][..t * i];
                    arch.dispatch(Gates { p: &p, packed, x, saved, out });
                }
            }
            let states = grad_h.chunks_mut(h).zip(grad_c.chunks_mut(h)).zip(grad_h0.chunks_mut(h).zip(grad_c0.chunks_mut(h)));
            let of = |(b, (((grad_h, grad_c), (grad_h0, grad_c0)), gates))| Reversed {
                q: m * own + b,
                m,
                b,
                length: p.length(lengths, b),
                gates,
                grad_h,
                grad_c,
                grad_h0,
                grad_c0,
            };
            let mut sequences: Vec<Reversed<'_>> = states.zip(gates.chunks_mut(t * 4 * h)).enumerate().map(of).collect();
            let w_hh = &weights[1][m * g * h..][..g * h];
            for sequences in sequences.chunks_mut(TASK) {
                let n = sequences.len() * padded;
                let memory = [&mut *w, &mut dh[..n], &mut dc[..n]];
                arch.dispatch(Backward { p: &p, saved, w_hh, resets, grad_y, sequences, memory });
            }
            if p.has(flag::GRAD_X) {
                let w_ih = &weights[0][m * g * i..][..g * i];
                arch.dispatch(GradX { p: &p, w_ih, gates, out: grad_x, memory: [w_x, results] });
            }
            if p.has(flag::GRAD_W) {
                for c0 in (0..4 * h).step_by(COLUMNS) {
                    let columns = COLUMNS.min(4 * h - c0);
                    sum.fill(0.0);
                    arch.dispatch(GradW { p: &p, m, slice: 0, c0, columns, x, saved: of_model, lengths, gates, out: sum });
                    out.put(c0, columns, sum);
                }
            }
        });
    });
    Ok(())
}

fn quarters(x: &mut [f32]) -> [&mut [f32]; 4] {
    let n = x.len() / 4;
    let (a, rest) = x.split_at_mut(n);
    let (b, rest) = rest.split_at_mut(n);
    let (c, d) = rest.split_at_mut(n);
    [a, b, c, d]
}
