//! Products of matrices for the fast f32 columns: c[r,j] (+)= Σ_k left[r,k]·right[k,j], by a micro-kernel over packed panels.
//!
//! Layout   `right` is packed once into panels [depth, NV vectors] of zero-padded columns; `left` is read as it lies where consecutive k
//!          are neighbours, else packed into strips [depth, ROWS]. A micro-tile keeps ROWS × NV vectors of c in registers (6 × 4 of
//!          AVX-512, 6 × 2 of AVX2 and NEON): 10 loads per 24 multiply-adds.
//! Blocks   of DEPTH in k: a panel of them is 64 KB at most. Larger depths add block to block, which also blocks the sums.
//! Bits     an element's sum runs over k in order within blocks of DEPTH counted from 0, whatever the tile: its bits depend neither on
//!          its place nor on the threads, and a NaN in a row or column stays there.
//! Use      inside a `WithSimd` of the caller: [`Packed::right`], then [`multiply`] for any rows. The caller brings memory and threads.
//! Source   Goto & van de Geijn 2008, ACM TOMS 34(3), for the panels.

use pulp::Simd;

/// Rows of a micro-tile.
pub(crate) const ROWS: usize = 6;
/// Depth of a block.
pub(crate) const DEPTH: usize = 256;

/// Vectors across a micro-tile: the number that pads `columns` least, wide ones preferred.
#[inline(always)]
pub(crate) fn vectors<S: Simd>(columns: usize) -> usize {
    // Cost of a vector of columns in a tile that many vectors wide.
    let cost = |nv: usize, each: usize| columns.div_ceil(nv * S::F32_LANES) * nv * each;
    let two = if cost(1, 14) < cost(2, 11) { 1 } else { 2 };
    if S::F32_LANES == 16 && cost(4, 10) <= cost(two, if two == 1 { 14 } else { 11 }) { 4 } else { two }
}

/// The right operand as it lies in memory.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a> {
    /// Values.
    pub(crate) data: &'a [f32],
    /// Distance between rows of memory.
    pub(crate) stride: usize,
    /// Whether consecutive k are neighbours (element [k,j] at j·stride + k), else consecutive j (at k·stride + j).
    pub(crate) along_depth: bool,
}

/// A packed right operand: blocks of depth, in each the panels, in each [k, NV vectors].
#[derive(Clone, Copy)]
pub(crate) struct Packed<'a> {
    data: &'a [f32],
    depth: usize,
    columns: usize,
    vectors: usize,
}

/// Reals of a packed operand.
#[inline(always)]
pub(crate) fn packed_len<S: Simd>(depth: usize, columns: usize) -> usize {
    let width = vectors::<S>(columns) * S::F32_LANES;
    depth * columns.div_ceil(width) * width
}

impl<'a> Packed<'a> {
    /// Packs `right` [depth, columns] into `memory` of [`packed_len`] reals.
    #[inline(always)]
    pub(crate) fn right<S: Simd>(_: S, right: Right<'_>, depth: usize, columns: usize, memory: &'a mut [f32]) -> Packed<'a> {
        let vectors = vectors::<S>(columns);
        let width = vectors * S::F32_LANES;
        let padded = columns.div_ceil(width) * width;
        for (block, out) in memory[..depth * padded].chunks_mut(DEPTH * padded).enumerate() {
            let (k0, deep) = (block * DEPTH, out.len() / padded);
            for (panel, out) in out.chunks_exact_mut(deep * width).enumerate() {
                let j0 = panel * width;
                let n = width.min(columns - j0);
                if n < width {
                    out.fill(0.0);
                }
                if right.along_depth {
                    for j in 0..n {
                        let from = &right.data[(j0 + j) * right.stride + k0..][..deep];
                        for (out, &x) in out.chunks_exact_mut(width).zip(from) {
                            out[j] = x;
                        }
                    }
                } else {
                    for (k, out) in out.chunks_exact_mut(width).enumerate() {
                        out[..n].copy_from_slice(&right.data[(k0 + k) * right.stride + j0..][..n]);
                    }
                }
            }
        }
        Packed { data: memory, depth, columns, vectors }
    }

    /// Packs an operand that `fill(k, j, out)` gives: columns j .. j + out.len() of row k.
    #[inline(always)]
    pub(crate) fn rows<S: Simd>(_: S, depth: usize, columns: usize, memory: &'a mut [f32], mut fill: impl FnMut(usize, usize, &mut [f32])) -> Packed<'a> {
        let vectors = vectors::<S>(columns);
        let width = vectors * S::F32_LANES;
        let padded = columns.div_ceil(width) * width;
        for (block, out) in memory[..depth * padded].chunks_mut(DEPTH * padded).enumerate() {
            let deep = out.len() / padded;
            for (panel, out) in out.chunks_exact_mut(deep * width).enumerate() {
                let n = width.min(columns - panel * width);
                for (k, out) in out.chunks_exact_mut(width).enumerate() {
                    fill(block * DEPTH + k, panel * width, &mut out[..n]);
                    out[n..].fill(0.0);
                }
            }
        }
        Packed { data: memory, depth, columns, vectors }
    }

    /// The same packed operand from memory that [`Packed::right`] has filled.
    #[inline(always)]
    pub(crate) fn again<S: Simd>(_: S, depth: usize, columns: usize, data: &'a [f32]) -> Packed<'a> {
        Packed { data, depth, columns, vectors: vectors::<S>(columns) }
    }
}

/// The left operand.
#[derive(Clone, Copy)]
pub(crate) enum Left<'a> {
    /// Element [r,k] at r·stride + k: read as it lies.
    Rows {
        /// Values.
        data: &'a [f32],
        /// Distance between rows.
        stride: usize,
    },
    /// Strips [k, ROWS], as [`pack_left`] writes them.
    Strips(&'a [f32]),
}

/// Reals of a left operand in strips.
pub(crate) fn strips_len(rows: usize, depth: usize) -> usize {
    rows.div_ceil(ROWS) * ROWS * depth
}

/// Writes row k of a left operand whose consecutive r are neighbours into its strips; `depth` is that of all rows, at most DEPTH.
#[inline(always)]
pub(crate) fn pack_left(row: &[f32], k: usize, depth: usize, strips: &mut [f32]) {
    let (whole, rest) = row.as_chunks::<ROWS>();
    let mut strips = strips.chunks_exact_mut(ROWS * depth);
    for (x, strip) in whole.iter().zip(&mut strips) {
        strip[k * ROWS..(k + 1) * ROWS].copy_from_slice(x);
    }
    if let (false, Some(strip)) = (rest.is_empty(), strips.next()) {
        let out = &mut strip[k * ROWS..(k + 1) * ROWS];
        out.fill(0.0);
        out[..rest.len()].copy_from_slice(rest);
    }
}

/// What c holds before the first block of depth.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Nothing: it is overwritten.
    Zero,
    /// One value per column that is added.
    Bias(&'a [f32]),
    /// Values that are added to.
    Kept,
}

/// c[r·stride + j] = start + Σ_k left[r,k]·right[k,j] for `rows` rows.
#[inline(always)]
pub(crate) fn multiply<S: Simd>(simd: S, left: Left<'_>, right: &Packed<'_>, rows: usize, start: Start<'_>, c: &mut [f32], stride: usize) {
    match right.vectors {
        4 => tiles::<S, 4>(simd, left, right, rows, start, c, stride),
        2 => tiles::<S, 2>(simd, left, right, rows, start, c, stride),
        _ => tiles::<S, 1>(simd, left, right, rows, start, c, stride),
    }
}

#[inline(always)]
fn tiles<S: Simd, const NV: usize>(simd: S, left: Left<'_>, right: &Packed<'_>, rows: usize, start: Start<'_>, c: &mut [f32], stride: usize) {
    let width = NV * S::F32_LANES;
    let padded = right.columns.div_ceil(width) * width;
    for (block, panels) in right.data[..right.depth * padded].chunks(DEPTH * padded).enumerate() {
        let (k0, deep) = (block * DEPTH, panels.len() / padded);
        for (panel, data) in panels.chunks_exact(deep * width).enumerate() {
            let j0 = panel * width;
            let n = width.min(right.columns - j0);
            let data = S::as_simd_f32s(data).0.as_chunks::<NV>().0;
            let start = match start {
                Start::Bias(bias) if block == 0 => Start::Bias(&bias[j0..j0 + n]),
                _ if block > 0 => Start::Kept,
                other => other,
            };
            for r0 in (0..rows).step_by(ROWS) {
                let count = ROWS.min(rows - r0);
                let acc = match left {
                    Left::Rows { data: x, stride } => {
                        let mut strip: [&[f32]; ROWS] = [&[]; ROWS];
                        for (r, row) in strip.iter_mut().enumerate() {
                            *row = &x[(r0 + r.min(count - 1)) * stride + k0..][..deep];
                        }
                        if count > 2 { from_rows::<S, NV>(simd, strip, data) } else { from_two_rows::<S, NV>(simd, strip[0], strip[1], data) }
                    }
                    Left::Strips(x) => from_strip::<S, NV>(simd, x[r0 * deep..][..ROWS * deep].as_chunks::<ROWS>().0, data),
                };
                store::<S, NV>(simd, &acc, start, count, n, &mut c[r0 * stride + j0..], stride);
            }
        }
    }
}

#[inline(always)]
fn from_rows<S: Simd, const NV: usize>(simd: S, rows: [&[f32]; ROWS], panel: &[[S::f32s; NV]]) -> [[S::f32s; NV]; ROWS] {
    let [r0, r1, r2, r3, r4, r5] = rows;
    let deep = panel.len();
    let (r0, r1, r2, r3, r4, r5) = (&r0[..deep], &r1[..deep], &r2[..deep], &r3[..deep], &r4[..deep], &r5[..deep]);
    let mut acc = [[simd.splat_f32s(0.0); NV]; ROWS];
    for (k, b) in panel.iter().enumerate() {
        step(simd, &[r0[k], r1[k], r2[k], r3[k], r4[k], r5[k]], b, &mut acc);
    }
    acc
}

/// The last one or two rows: a third of the work.
#[inline(always)]
fn from_two_rows<S: Simd, const NV: usize>(simd: S, r0: &[f32], r1: &[f32], panel: &[[S::f32s; NV]]) -> [[S::f32s; NV]; ROWS] {
    let (mut first, mut second) = ([simd.splat_f32s(0.0); NV], [simd.splat_f32s(0.0); NV]);
    for ((b, &a0), &a1) in panel.iter().zip(r0).zip(r1) {
        let (a0, a1) = (simd.splat_f32s(a0), simd.splat_f32s(a1));
        for (v, &b) in b.iter().enumerate() {
            first[v] = simd.mul_add_f32s(a0, b, first[v]);
            second[v] = simd.mul_add_f32s(a1, b, second[v]);
        }
    }
    let mut acc = [[simd.splat_f32s(0.0); NV]; ROWS];
    (acc[0], acc[1]) = (first, second);
    acc
}

#[inline(always)]
fn from_strip<S: Simd, const NV: usize>(simd: S, strip: &[[f32; ROWS]], panel: &[[S::f32s; NV]]) -> [[S::f32s; NV]; ROWS] {
    let mut acc = [[simd.splat_f32s(0.0); NV]; ROWS];
    for (a, b) in strip.iter().zip(panel) {
        step(simd, a, b, &mut acc);
    }
    acc
}

#[inline(always)]
fn step<S: Simd, const NV: usize>(simd: S, a: &[f32; ROWS], b: &[S::f32s; NV], acc: &mut [[S::f32s; NV]; ROWS]) {
    for (acc, &a) in acc.iter_mut().zip(a) {
        let a = simd.splat_f32s(a);
        for (acc, &b) in acc.iter_mut().zip(b) {
            *acc = simd.mul_add_f32s(a, b, *acc);
        }
    }
}

/// Adds a micro-tile to what c starts from: `count` rows of `n` columns.
#[inline(always)]
fn store<S: Simd, const NV: usize>(simd: S, acc: &[[S::f32s; NV]; ROWS], start: Start<'_>, count: usize, n: usize, c: &mut [f32], stride: usize) {
    let lanes = S::F32_LANES;
    for (r, acc) in acc.iter().enumerate().take(count) {
        let row = &mut c[r * stride..r * stride + n];
        for (v, &acc) in acc.iter().enumerate() {
            let at = v * lanes;
            if at >= n {
                break;
            }
            let end = (at + lanes).min(n);
            let out = &mut row[at..end];
            if end - at == lanes {
                let out = &mut S::as_mut_simd_f32s(out).0[0];
                *out = match start {
                    Start::Zero => acc,
                    Start::Bias(bias) => simd.add_f32s(acc, S::as_simd_f32s(&bias[at..end]).0[0]),
                    Start::Kept => simd.add_f32s(*out, acc),
                };
            } else {
                let sum = match start {
                    Start::Zero => acc,
                    Start::Bias(bias) => simd.add_f32s(acc, simd.partial_load_f32s(&bias[at..end])),
                    Start::Kept => simd.add_f32s(simd.partial_load_f32s(out), acc),
                };
                simd.partial_store_f32s(out, sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lanes::take_memory;
    use pulp::{Arch, WithSimd};

    struct Case {
        rows: usize,
        depth: usize,
        columns: usize,
    }

    impl WithSimd for Case {
        type Output = ();

        fn with_simd<S: Simd>(self, simd: S) {
            let Case { rows, depth, columns } = self;
            let value = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 1009.0 - 0.5;
            let left: Vec<f32> = (0..rows * depth).map(value).collect();
            let right: Vec<f32> = (0..depth * columns).map(|i| value(i + 5)).collect();
            let transposed: Vec<f32> = (0..columns * depth).map(|i| right[i % depth * columns + i / depth]).collect();
            let bias: Vec<f32> = (0..columns).map(value).collect();
            for (data, stride, along_depth) in [(&right, columns, false), (&transposed, depth, true)] {
                {
                    let mut memory = take_memory(packed_len::<S>(depth, columns));
                    let memory = memory.reals();
                    let packed = Packed::right(simd, Right { data, stride, along_depth }, depth, columns, memory);
                    let mut c = vec![f32::NAN; rows * columns];
                    multiply(simd, Left::Rows { data: &left, stride: depth }, &packed, rows, Start::Bias(&bias), &mut c, columns);
                    for (i, &c) in c.iter().enumerate() {
                        let (r, j) = (i / columns, i % columns);
                        let want: f64 = (0..depth).map(|k| f64::from(left[r * depth + k]) * f64::from(right[k * columns + j])).sum();
                        let want = want + f64::from(bias[j]);
                        assert!((f64::from(c) - want).abs() < 1e-5 * (depth as f64).sqrt(), "{rows}×{depth}×{columns} at {i}: {c} not {want}");
                    }
                    if depth <= DEPTH {
                        let mut strips = vec![0.0; strips_len(rows, depth)];
                        for k in 0..depth {
                            let row: Vec<f32> = (0..rows).map(|r| left[r * depth + k]).collect();
                            pack_left(&row, k, depth, &mut strips);
                        }
                        let mut again: Vec<f32> = (0..rows * columns).map(|i| bias[i % columns]).collect();
                        multiply(simd, Left::Strips(&strips), &packed, rows, Start::Kept, &mut again, columns);
                        assert_eq!(again, c, "strips and rows give the same bits");
                    }
                }
            }
        }
    }

    #[test]
    fn products_of_every_shape() {
        for (rows, depth, columns) in [(1, 1, 1), (5, 3, 7), (6, 16, 16), (13, 257, 31), (7, 600, 64), (12, 20, 65), (3, 256, 130), (1, 33, 200)] {
            Arch::new().dispatch(Case { rows, depth, columns });
        }
    }
}
