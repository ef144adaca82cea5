//! Attention, fused: forward and backward in O(T) memory.
//!
//! forward    s(i,j) = scale·q(i)·k(j) + bias(i,j);  lse(i) = log Σ_j exp s(i,j);  p(i,j) = exp(s(i,j) − lse(i));  out(i) = Σ_j r(i,j)·p(i,j)·v(j)
//! backward   delta(i) = grad_out(i)·out(i);  dp(i,j) = r(i,j)·grad_out(i)·v(j);  ds = p·(dp − delta);  grad_bias = ds;
//!            grad_q(i) = scale·Σ_j ds(i,j)·k(j);  grad_k(j) = scale·Σ_i ds(i,j)·q(i);  grad_v(j) = Σ_i r·p·grad_out(i)
//! Allowed    j < kv_len, j ≤ i + Tk − Tq (causal), |i + Tk − Tq − j| < window, bias > −1e29: the keys of a row are an interval, and so are
//!            the queries of a key; tiles outside of it are neither loaded nor counted. A row without a key has out 0, lse −1e30.
//! Dropout    r = 0 with the given probability, else 1/(1 − probability), by word j mod 4 of Philox (kernels/philox.rs) with the counter
//!            (b·NH + h, i, j / 4, stream) under the key seed + 2³²·step: the same in backward, on every device, in every chunk. `step` lies on the
//!            device, so that a recorded pass draws anew when it counts up. Weights and lse are those before dropout.
//!
//! Shapes     q, out [B,NH,Tq,D]; k, v [B,NH,Tk,D], or slices of packed rows ([`Layout`]); gradients as their tensors; kv_len [B] u32;
//!            bias [B or 1, NH or 1, Tq, Tk]; lse [B,NH,Tq]; weights [B,NH,Tq,Tk]. D ≤ 256. Independent models are part of B.
//! Launch     a thread owns a row (query, or key in `backward_kv`): it and its results stay in registers, tiles of the other side go
//!            through workgroup memory. D ≤ 8, 16, 32 have kernels of their own; else ⌈D/32⌉ threads share a row and add their parts of the scores.
//!            `rows` puts lse and delta side by side; then `backward_q` and `backward_kv`, each its row's owner: no atomics, one order of sums.
//!            Software adapters, without bias and dropout and with D 8, 16 or 32, run the `_blocks` kernels: two rows a thread, no tiles. On
//!            llvmpipe tiles took 106 ms of training at (64,4,63,16); two rows without barriers, which keep variables in memory, 48.
//! Scratch    rows [B, header and (lse, delta) of each row], backward only.
//! Floor      4·(Tq + Tk)·2·D bytes forward and twice that backward per head; 4·Tq·Tk·D flops forward, 14·Tq·Tk·D backward (scores are
//!            computed twice), one exponential a score forward, two backward.
//! Stored     q, k, v, bias, out and their gradients in f32, f16 or bf16, all in one; scores, sums, lse and scratch are f32, results are rounded once.
//!            On CUDA heads up to 32 wide in 16 bits go through tensor cores; weights and ds, which are not stored, count as a rounded value and its rest.
//! Numerics   running maximum; f32 sums of at most Tk terms, rescaled when the maximum moves. A NaN in a row of q, or in a key that it may see,
//!            makes that row NaN. Padding beyond kv_len is never read.
//! Source     Rabe, Staats 2021, arXiv:2112.05682; Dao 2023, arXiv:2307.08691, for delta and the two passes.
//! Files      shaders/attention.wgsl, attention_blocks.wgsl · cuda/attention.cu · kernels/attention_lanes.rs (fast f32) · reference: the `_cpu` functions

use crate::attention_lanes as lanes;
use crate::conformance::{Case, Outputs};
use crate::device::{Device, DeviceKind, Pass, View};
use crate::kernel::{Arg, Cost, Cpu, CpuLaunch, Elem, Kernel, in_storage, layout, params_of, reads, reads_u32, writes};
use crate::philox::philox4x32;
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

// ---- the op -----------------------------------------------------------------------------------------------------------------

/// Where a tensor's rows lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// [B,NH,T,D].
    #[default]
    HeadsFirst,
    /// [B,T,row]: head h of a row lies at `offset + h·D`. With one projection to q | k | v, row is 3·NH·D and the offsets are 0, NH·D, 2·NH·D;
    /// such tensors share a buffer, and so do their gradients.
    Packed {
        /// Elements from one step to the next.
        row: u64,
        /// Element of head 0.
        offset: u64,
    },
}

impl Layout {
    /// Elements of one batch item.
    pub fn item(self, heads: u64, steps: u64, width: u64) -> u64 {
        match self {
            Layout::HeadsFirst => heads * steps * width,
            Layout::Packed { row, .. } => steps * row,
        }
    }

    /// Elements from one item, head, step to the next, and those before the first.
    fn strides(self, heads: u64, steps: u64, width: u64) -> [u32; 4] {
        match self {
            Layout::HeadsFirst => [heads * steps * width, steps * width, width, 0],
            Layout::Packed { row, offset } => [steps * row, width, row, offset],
        }
        .map(|x| x as u32)
    }
}

/// Shape of an additive bias: [B or 1, NH or 1, Tq, Tk].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bias {
    /// One for each batch item.
    pub per_item: bool,
    /// One for each head.
    pub per_head: bool,
}

/// Dropout of attention weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Chance that a weight is left out, in [0, 1); rounded to a multiple of 2⁻²⁴.
    pub probability: f64,
    /// Key of the random numbers.
    pub seed: u64,
    /// Which of the random numbers under this key: a layer, a step.
    pub stream: u32,
}

/// Sizes and options.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// B.
    pub batch: u64,
    /// NH.
    pub heads: u64,
    /// Tq.
    pub queries: u64,
    /// Tk.
    pub keys: u64,
    /// D.
    pub width: u64,
    /// Query i sees key j only if j ≤ i + Tk − Tq.
    pub causal: bool,
    /// … and only if |i + Tk − Tq − j| < window.
    pub window: Option<u64>,
    /// Factor of q·k; none: 1/√D.
    pub scale: Option<f64>,
    /// Shape of the bias, where there is one.
    pub bias: Option<Bias>,
    /// Dropout of the weights, where wanted.
    pub dropout: Option<Dropout>,
    /// Layout of q and grad_q.
    pub q_layout: Layout,
    /// Layout of k and grad_k.
    pub k_layout: Layout,
    /// Layout of v and grad_v.
    pub v_layout: Layout,
    /// Layout of out and grad_out.
    pub out_layout: Layout,
}

/// Widest head.
pub const MAX_WIDTH: u64 = 256;
/// Longest sequence: positions are exact as f32.
pub const MAX_STEPS: u64 = 1 << 24;
/// lse of a row without a key; a bias at or below a tenth of it excludes a key.
pub const NO_KEY: f64 = -1e30;
const EXCLUDED: f64 = -1e29;
/// Reals before the rows of an item in the scratch: its length, and the step of dropout in halves of 16 bits.
const HEADER: u64 = 4;

impl Attention {
    /// Self-attention of [B,NH,T,D] without options.
    pub fn new(batch: u64, heads: u64, steps: u64, width: u64) -> Attention {
        Attention {
            batch,
            heads,
            queries: steps,
            keys: steps,
            width,
            causal: false,
            window: None,
            scale: None,
            bias: None,
            dropout: None,
            q_layout: Layout::HeadsFirst,
            k_layout: Layout::HeadsFirst,
            v_layout: Layout::HeadsFirst,
            out_layout: Layout::HeadsFirst,
        }
    }

    /// Self-attention between projections: q | k | v from rows [B,T,3·NH·D], out to rows [B,T,NH·D].
    pub fn packed(batch: u64, heads: u64, steps: u64, width: u64) -> Attention {
        let part = |i: u64| Layout::Packed { row: 3 * heads * width, offset: i * heads * width };
        let out_layout = Layout::Packed { row: heads * width, offset: 0 };
        Attention { q_layout: part(0), k_layout: part(1), v_layout: part(2), out_layout, ..Attention::new(batch, heads, steps, width) }
    }

    /// Checks sizes and options.
    /// # Errors
    /// `Parameter` for D = 0 or beyond 256, no head, sequences beyond 2²⁴ steps, a window of 0, a scale that is no number, a probability outside
    /// [0, 1), a row that does not hold its heads; `TooLarge` for an item beyond 2³² elements.
    pub fn check(&self) -> Result<()> {
        let limit = |name: &str, value: u64, range: Range<u64>, help: &str| {
            if range.contains(&value) {
                return Ok(());
            }
            Err(Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() })
        };
        limit("width", self.width, 1..MAX_WIDTH + 1, "give heads of 1 to 256 numbers")?;
        limit("heads", self.heads, 1..1 << 16, "give 1 to 65,535 heads")?;
        limit("queries", self.queries, 0..MAX_STEPS + 1, "give at most 2^24 steps")?;
        limit("keys", self.keys, 0..MAX_STEPS + 1, "give at most 2^24 steps")?;
        limit("window", self.window.unwrap_or(1), 1..u64::MAX, "a window sees at least one key; give none for all")?;
        limit("batch", self.batch.saturating_mul(self.heads), 0..1 << 32, "B·NH must be below 2^32: split the batch")?;
        let number = |name: &str, value: f64, fine: bool, help: &str| {
            if fine {
                return Ok(());
            }
            Err(Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() })
        };
        let scale = self.scale.unwrap_or(1.0);
        number("scale", scale, (scale as f32).is_finite(), "give a finite factor, or none for 1/√D")?;
        let p = self.dropout.map_or(0.0, |d| d.probability);
        number("dropout", p, (0.0..1.0).contains(&p), "give a probability in [0, 1)")?;
        for (name, layout, steps) in self.layouts() {
            if let Layout::Packed { row, offset } = layout
                && offset.saturating_add(self.heads * self.width) > row
            {
                let help = format!("a row must hold {} heads of {} numbers behind the offset", self.heads, self.width);
                return Err(Error::Parameter { op: OP, name: format!("{name} layout"), value: format!("{layout:?}"), help });
            }
            self.small(name, layout.item(self.heads, steps, self.width))?;
        }
        let bias = if self.bias.is_some() { self.heads.saturating_mul(self.queries * self.keys) } else { 0 };
        self.small("bias", bias)?;
        self.small("rows", self.record())
    }

    fn small(&self, what: &str, needed: u64) -> Result<()> {
        let limit = u64::from(u32::MAX);
        if needed <= limit {
            return Ok(());
        }
        Err(Error::TooLarge { what: format!("{OP}: one item of {what}"), needed, limit, unit: "elements", help: "use shorter sequences or fewer heads".into() })
    }

    fn layouts(&self) -> [(&'static str, Layout, u64); 4] {
        let (q, k) = (self.queries, self.keys);
        [("q", self.q_layout, q), ("k", self.k_layout, k), ("v", self.v_layout, k), ("out", self.out_layout, q)]
    }

    /// Elements of q, k, v, out, in this order; their gradients have as many.
    pub fn elements(&self) -> [u64; 4] {
        self.layouts().map(|(_, layout, steps)| self.batch * layout.item(self.heads, steps, self.width))
    }

    /// Elements of lse.
    pub fn lse(&self) -> u64 {
        self.batch * self.heads * self.queries
    }

    /// Elements of the bias, 0 without one.
    pub fn bias_elements(&self) -> u64 {
        self.bias.map_or(0, |b| self.folds(b).0 * self.folds(b).1 * self.queries * self.keys)
    }

    /// Elements of the weights.
    pub fn weights(&self) -> u64 {
        self.batch * self.heads * self.queries * self.keys
    }

    /// Elements that forward keeps for backward besides its results: none.
    pub fn saved(&self) -> u64 {
        0
    }

    /// Temporary elements of forward: none.
    pub fn scratch(&self) -> u64 {
        0
    }

    /// Temporary elements of backward.
    pub fn scratch_backward(&self, _device: &Device) -> u64 {
        self.batch * self.record()
    }

    /// Reals of an item in `rows`: aligned for every device.
    fn record(&self) -> u64 {
        (HEADER + 2 * self.heads * self.queries).next_multiple_of(64)
    }

    /// Items and heads of the bias.
    fn folds(&self, bias: Bias) -> (u64, u64) {
        (if bias.per_item { self.batch } else { 1 }, if bias.per_head { self.heads } else { 1 })
    }

    fn params(&self, lengths: bool) -> AttentionParams {
        let (h, d) = (self.heads, self.width);
        let [q, k, v, out] = self.layouts().map(|(_, layout, steps)| layout.strides(h, steps, d));
        let square = self.queries * self.keys;
        let (bias_batch, bias_head) = match self.bias {
            Some(b) => (if b.per_item { self.folds(b).1 * square } else { 0 }, if b.per_head { square } else { 0 }),
            None => (0, 0),
        };
        let pair = |x: f64| (x as f32, (x - f64::from(x as f32)) as f32);
        let (scale, scale_low) = pair(self.scale.unwrap_or(1.0 / (d as f64).sqrt()));
        let dropout = self.dropout.unwrap_or(Dropout { probability: 0.0, seed: 0, stream: 0 });
        let threshold = (dropout.probability * 16_777_216.0).round().min(16_777_215.0);
        let (keep, keep_low) = pair(1.0 / (1.0 - threshold / 16_777_216.0));
        let set = |on: bool, bit: u32| if on { bit } else { 0 };
        AttentionParams {
            batch: 0,
            first: 0,
            heads: h as u32,
            queries: self.queries as u32,
            keys: self.keys as u32,
            width: d as u32,
            q_batch: q[0],
            q_head: q[1],
            q_row: q[2],
            q_offset: q[3],
            k_batch: k[0],
            k_head: k[1],
            k_row: k[2],
            k_offset: k[3],
            v_batch: v[0],
            v_head: v[1],
            v_row: v[2],
            v_offset: v[3],
            out_batch: out[0],
            out_head: out[1],
            out_row: out[2],
            out_offset: out[3],
            bias_batch: bias_batch as u32,
            bias_head: bias_head as u32,
            record: self.record() as u32,
            flags: set(self.causal, flag::CAUSAL) | set(self.bias.is_some(), flag::BIAS) | set(lengths, flag::LENGTHS) | set(threshold > 0.0, flag::DROPOUT),
            window: self.window.unwrap_or(1 << 30).min(1 << 30) as u32,
            threshold: threshold as u32,
            seed_low: dropout.seed as u32,
            seed_high: (dropout.seed >> 32) as u32,
            stream: dropout.stream,
            scale,
            scale_low,
            keep,
            keep_low,
        }
    }
}

const OP: &str = "attention";

params! {
    /// Params of the attention kernels.
    pub struct AttentionParams {
        /// Items of this launch.
        batch: u32,
        /// First of them in the whole batch: random numbers are keyed by it.
        first: u32,
        /// NH.
        heads: u32,
        /// Tq.
        queries: u32,
        /// Tk.
        keys: u32,
        /// D.
        width: u32,
        /// Strides of q.
        q_batch: u32,
        /// From head to head.
        q_head: u32,
        /// From step to step.
        q_row: u32,
        /// Before the first.
        q_offset: u32,
        /// Strides of k.
        k_batch: u32,
        /// From head to head.
        k_head: u32,
        /// From step to step.
        k_row: u32,
        /// Before the first.
        k_offset: u32,
        /// Strides of v.
        v_batch: u32,
        /// From head to head.
        v_head: u32,
        /// From step to step.
        v_row: u32,
        /// Before the first.
        v_offset: u32,
        /// Strides of out.
        out_batch: u32,
        /// From head to head.
        out_head: u32,
        /// From step to step.
        out_row: u32,
        /// Before the first.
        out_offset: u32,
        /// From item to item of the bias, 0 where items share it.
        bias_batch: u32,
        /// From head to head of the bias, 0 where heads share it.
        bias_head: u32,
        /// Reals of an item in `rows`.
        record: u32,
        /// The `flag` bits.
        flags: u32,
        /// |i + Tk − Tq − j| < window.
        window: u32,
        /// A weight is dropped where its word's upper 24 bits are below.
        threshold: u32,
        /// Seed of dropout.
        seed_low: u32,
        /// Its upper half.
        seed_high: u32,
        /// Stream of dropout.
        stream: u32,
        /// Factor of q·k, rounded …
        scale: f32,
        /// … and what rounding took away, which only the f64 reference feels.
        scale_low: f32,
        /// Factor of weights that are kept, rounded …
        keep: f32,
        /// … and the rest.
        keep_low: f32,
    }
}

/// Bits of [`AttentionParams::flags`].
pub(crate) mod flag {
    pub(crate) const CAUSAL: u32 = 1;
    pub(crate) const BIAS: u32 = 2;
    pub(crate) const LENGTHS: u32 = 4;
    pub(crate) const DROPOUT: u32 = 8;
    /// `backward_kv_packed` writes grad_k, grad_v.
    pub(crate) const GRAD_K: u32 = 16;
    pub(crate) const GRAD_V: u32 = 32;
    /// `grad_bias` adds to what an earlier run of the batch left.
    pub(crate) const ADD: u32 = 64;
}

/// Strides of a tensor, as indices.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strides {
    pub(crate) batch: usize,
    pub(crate) head: usize,
    pub(crate) row: usize,
    pub(crate) offset: usize,
}

impl Strides {
    /// First element of head h of item b.
    pub(crate) fn at(&self, b: usize, h: usize) -> usize {
        b * self.batch + h * self.head + self.offset
    }
}

/// Params as the CPU column reads them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) p: AttentionParams,
    /// Step of dropout.
    pub(crate) step: u32,
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) width: usize,
    pub(crate) q: Strides,
    pub(crate) k: Strides,
    pub(crate) v: Strides,
    pub(crate) out: Strides,
}

impl Shape {
    pub(crate) fn of(p: AttentionParams) -> Shape {
        let u = |x: u32| x as usize;
        let strides = |batch, head, row, offset| Strides { batch: u(batch), head: u(head), row: u(row), offset: u(offset) };
        Shape {
            p,
            step: 0,
            batch: u(p.batch),
            heads: u(p.heads),
            queries: u(p.queries),
            keys: u(p.keys),
            width: u(p.width),
            q: strides(p.q_batch, p.q_head, p.q_row, p.q_offset),
            k: strides(p.k_batch, p.k_head, p.k_row, p.k_offset),
            v: strides(p.v_batch, p.v_head, p.v_row, p.v_offset),
            out: strides(p.out_batch, p.out_head, p.out_row, p.out_offset),
        }
    }

    pub(crate) fn has(&self, bit: u32) -> bool {
        self.p.flags & bit != 0
    }

    pub(crate) fn scale<R: Real>(&self) -> R {
        R::of(f64::from(self.p.scale)) + R::of(f64::from(self.p.scale_low))
    }

    /// Keys of an item by its word.
    pub(crate) fn length(&self, words: &[u32], b: usize) -> usize {
        if self.has(flag::LENGTHS) { self.keys.min(words[b] as usize) } else { self.keys }
    }

    /// Keys that query i may see.
    pub(crate) fn keys_of(&self, i: usize, length: usize) -> Range<usize> {
        let center = i as i64 + self.keys as i64 - self.queries as i64;
        let window = i64::from(self.p.window);
        let last = if self.has(flag::CAUSAL) { center + 1 } else { center + window };
        let end = last.min(length as i64).max(0);
        (center - window + 1).clamp(0, end) as usize..end as usize
    }

    /// Queries that may see key j.
    pub(crate) fn queries_of(&self, j: usize, length: usize) -> Range<usize> {
        if j >= length {
            return 0..0;
        }
        let center = j as i64 - self.keys as i64 + self.queries as i64;
        let window = i64::from(self.p.window);
        let first = if self.has(flag::CAUSAL) { center } else { center - window + 1 };
        let end = (center + window).clamp(0, self.queries as i64);
        first.clamp(0, end) as usize..end as usize
    }

    /// First element of the bias of query i.
    pub(crate) fn bias_at(&self, b: usize, h: usize, i: usize) -> usize {
        b * self.p.bias_batch as usize + h * self.p.bias_head as usize + i * self.keys
    }

    /// (lse, delta) of head h of item b start here in `rows`.
    pub(crate) fn rows_at(&self, b: usize, h: usize) -> usize {
        b * self.p.record as usize + HEADER as usize + 2 * h * self.queries
    }

    /// Factor of weight (i,j) after dropout.
    pub(crate) fn kept<R: Real>(&self, b: usize, h: usize, i: usize, j: usize) -> R {
        if !self.has(flag::DROPOUT) {
            return R::ONE;
        }
        let p = &self.p;
        let item = (p.first as usize + b) * self.heads + h;
        let word = philox4x32([item as u32, i as u32, j as u32 / 4, p.stream], [p.seed_low, p.seed_high.wrapping_add(self.step)])[j % 4];
        if word >> 8 < p.threshold { R::ZERO } else { R::of(f64::from(p.keep)) + R::of(f64::from(p.keep_low)) }
    }
}

// ---- kernels ------------------------------------------------------------------------------------------------------------------

/// Threads per workgroup.
const WG: u32 = 64;
/// Tiles of the kernels: vec4 of a row that a thread holds, and whether several threads share a row.
const UP_TO_8: &[(&str, u32)] = &[("VECS", 2), ("SPLIT", 0)];
const UP_TO_16: &[(&str, u32)] = &[("VECS", 4), ("SPLIT", 0)];
const UP_TO_32: &[(&str, u32)] = &[("VECS", 8), ("SPLIT", 0)];
const ANY: &[(&str, u32)] = &[("VECS", 8), ("SPLIT", 1)];

fn params(words: &[u32]) -> AttentionParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

fn groups(words: &[u32], steps: u32, split: bool) -> u64 {
    let p = params(words);
    let rows = if split { u64::from(WG) / u64::from(p.width).div_ceil(32).max(1) } else { u64::from(WG) };
    u64::from(p.batch) * u64::from(p.heads) * u64::from(steps).div_ceil(rows)
}

fn scores(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.batch) * u64::from(p.heads) * u64::from(p.queries) * u64::from(p.keys)
}

const Q: Arg = reads("q");
const K: Arg = reads("k");
const V: Arg = reads("v");
const BIAS: Arg = reads("bias");
const GRAD_OUT: Arg = reads("grad_out");
const ROWS: Arg = reads("rows");

/// Forward for any D ≤ 256.
pub static ATTENTION_FORWARD: Kernel = Kernel {
    name: "attention_forward",
    about: "fused attention: results and log-sum-exp of the scores",
    args: &[Q, K, V, BIAS, reads_u32("kv_len"), reads_u32("step"), writes("out"), writes("lse")],
    params: layout::<AttentionParams>(),
    workgroup: WG,
    constants: ANY,
    groups: |words| groups(words, params(words).queries, true),
    wgsl: wgsl!("attention"),
    cuda: cuda!("attention"),
    cpu: Some(Cpu { f32: lanes::attention_forward, f64: attention_forward_cpu::<f64> }),
    cost: Cost { unit: "score", units: scores, bytes: 0.5, flops: 70.0 },
};

/// Lse and delta of every row, side by side, behind the length of their item.
pub static ATTENTION_ROWS: Kernel = Kernel {
    name: "attention_rows",
    about: "what the backward kernels read of a query's results",
    args: &[reads_u32("kv_len"), reads_u32("step"), reads("out"), reads("grad_out"), reads("lse"), writes("rows")],
    params: layout::<AttentionParams>(),
    workgroup: WG,
    constants: ANY,
    groups: |words| (u64::from(params(words).batch) * u64::from(params(words).heads) * u64::from(params(words).queries)).div_ceil(u64::from(WG)),
    wgsl: wgsl!("attention"),
    cuda: cuda!("attention"),
    cpu: Some(Cpu { f32: |launch| attention_rows_cpu(launch, lanes::dot), f64: |launch| attention_rows_cpu(launch, dot::<f64>) }),
    cost: Cost {
        unit: "row",
        units: |words| u64::from(params(words).batch) * u64::from(params(words).heads) * u64::from(params(words).queries),
        bytes: 140.0,
        flops: 32.0,
    },
};

/// Gradient of q for any D ≤ 256.
pub static ATTENTION_BACKWARD_Q: Kernel = Kernel {
    name: "attention_backward_q",
    about: "gradient of the queries",
    args: &[Q, K, V, BIAS, GRAD_OUT, ROWS, writes("grad_q")],
    cpu: Some(Cpu { f32: lanes::attention_backward_q, f64: attention_backward_q_cpu::<f64> }),
    cost: Cost { unit: "score", units: scores, bytes: 0.5, flops: 110.0 },
    ..ATTENTION_FORWARD
};

/// Gradients of k and v for any D ≤ 256.
pub static ATTENTION_BACKWARD_KV: Kernel = Kernel {
    name: "attention_backward_kv",
    about: "gradients of the keys and values",
    args: &[Q, K, V, BIAS, GRAD_OUT, ROWS, writes("grad_k"), writes("grad_v")],
    groups: |words| groups(words, params(words).keys, true),
    cpu: Some(Cpu { f32: lanes::attention_backward_kv, f64: attention_backward_kv_cpu::<f64> }),
    cost: Cost { unit: "score", units: scores, bytes: 0.5, flops: 140.0 },
    ..ATTENTION_FORWARD
};

/// Gradients of k and v, or of one of them, in one buffer.
pub static ATTENTION_BACKWARD_KV_PACKED: Kernel = Kernel {
    name: "attention_backward_kv_packed",
    about: "the same into one buffer",
    args: &[Q, K, V, BIAS, GRAD_OUT, ROWS, writes("grad_kv")],
    cpu: Some(Cpu { f32: lanes::attention_backward_kv_packed, f64: attention_backward_kv_packed_cpu::<f64> }),
    ..ATTENTION_BACKWARD_KV
};

/// All three gradients in one pass over the scores: the CPU's way, since one thread owns a head.
pub static ATTENTION_BACKWARD: Kernel = Kernel {
    name: "attention_backward",
    about: "gradients of queries, keys and values, a head at a time, on the CPU",
    args: &[Q, K, V, BIAS, GRAD_OUT, ROWS, writes("grad_q"), writes("grad_k"), writes("grad_v")],
    wgsl: None,
    cuda: None,
    cpu: Some(Cpu { f32: lanes::attention_backward, f64: attention_backward_cpu::<f64> }),
    cost: Cost { unit: "score", units: scores, bytes: 0.5, flops: 180.0 },
    ..ATTENTION_FORWARD
};

/// The same into one buffer.
pub static ATTENTION_BACKWARD_PACKED: Kernel = Kernel {
    name: "attention_backward_packed",
    about: "the same into one buffer",
    args: &[Q, K, V, BIAS, GRAD_OUT, ROWS, writes("grad_qkv")],
    cpu: Some(Cpu { f32: lanes::attention_backward_packed, f64: attention_backward_packed_cpu::<f64> }),
    ..ATTENTION_BACKWARD
};

/// Heads from which on every thread has some of its own.
const MANY_HEADS: u64 = 8;

macro_rules! narrow {
    ($($id:ident = $name:literal, $about:literal, $steps:ident, $constants:ident, $base:ident;)*) => { $(
        #[doc = $about]
        pub static $id: Kernel = Kernel {
            name: $name,
            about: $about,
            constants: $constants,
            groups: |words| groups(words, params(words).$steps, false),
            ..$base
        };
    )* };
}

narrow! {
    ATTENTION_FORWARD_8 = "attention_forward_8", "fused attention for heads up to 8 wide, a thread per query", queries, UP_TO_8, ATTENTION_FORWARD;
    ATTENTION_FORWARD_16 = "attention_forward_16", "fused attention for heads up to 16 wide, a thread per query", queries, UP_TO_16, ATTENTION_FORWARD;
    ATTENTION_FORWARD_32 = "attention_forward_32", "fused attention for heads up to 32 wide, a thread per query", queries, UP_TO_32, ATTENTION_FORWARD;
    ATTENTION_BACKWARD_Q_8 = "attention_backward_q_8", "gradient of the queries for heads up to 8 wide", queries, UP_TO_8, ATTENTION_BACKWARD_Q;
    ATTENTION_BACKWARD_Q_16 = "attention_backward_q_16", "gradient of the queries for heads up to 16 wide", queries, UP_TO_16, ATTENTION_BACKWARD_Q;
    ATTENTION_BACKWARD_Q_32 = "attention_backward_q_32", "gradient of the queries for heads up to 32 wide", queries, UP_TO_32, ATTENTION_BACKWARD_Q;
    ATTENTION_BACKWARD_KV_8 = "attention_backward_kv_8", "gradients of keys and values for heads up to 8 wide", keys, UP_TO_8, ATTENTION_BACKWARD_KV;
    ATTENTION_BACKWARD_KV_16 = "attention_backward_kv_16", "gradients of keys and values for heads up to 16 wide", keys, UP_TO_16, ATTENTION_BACKWARD_KV;
    ATTENTION_BACKWARD_KV_32 = "attention_backward_kv_32", "gradients of keys and values for heads up to 32 wide", keys, UP_TO_32, ATTENTION_BACKWARD_KV;
    ATTENTION_BACKWARD_KV_PACKED_8 = "attention_backward_kv_packed_8", "the same into one buffer, up to 8 wide", keys, UP_TO_8, ATTENTION_BACKWARD_KV_PACKED;
    ATTENTION_BACKWARD_KV_PACKED_16 = "attention_backward_kv_packed_16", "the same into one buffer, up to 16 wide", keys, UP_TO_16, ATTENTION_BACKWARD_KV_PACKED;
    ATTENTION_BACKWARD_KV_PACKED_32 = "attention_backward_kv_packed_32", "the same into one buffer, up to 32 wide", keys, UP_TO_32, ATTENTION_BACKWARD_KV_PACKED;
}

// ---- kernels of software adapters ---------------------------------------------------------------------------------------------

const BLOCK_WG: u32 = 8;
/// Most rows that a thread goes through: a round each.
const BLOCK_ROUNDS: u64 = 60_000;

fn block_groups(words: &[u32], steps: u32) -> u64 {
    let p = params(words);
    (u64::from(p.batch) * u64::from(p.heads) * u64::from(steps).div_ceil(2)).div_ceil(u64::from(BLOCK_WG))
}

macro_rules! blocks {
    ($($id:ident = $name:literal, $about:literal, $steps:ident, $constants:ident, $base:ident, $args:expr;)*) => { $(
        #[doc = $about]
        pub static $id: Kernel = Kernel {
            name: $name,
            about: $about,
            args: $args,
            constants: $constants,
            workgroup: BLOCK_WG,
            groups: |words| block_groups(words, params(words).$steps),
            wgsl: wgsl!("attention_blocks"),
            cuda: None,
            cpu: None,
            ..$base
        };
    )* };
}

const VECS_2: &[(&str, u32)] = &[("VECS", 2)];
const VECS_4: &[(&str, u32)] = &[("VECS", 4)];
const VECS_8: &[(&str, u32)] = &[("VECS", 8)];
const BLOCK_FORWARD: &[Arg] = &[Q, K, V, reads_u32("kv_len"), writes("out"), writes("lse")];
const BLOCK_Q: &[Arg] = &[Q, K, V, GRAD_OUT, ROWS, writes("grad_q")];
const BLOCK_KV: &[Arg] = &[Q, K, V, GRAD_OUT, ROWS, writes("grad_k"), writes("grad_v")];
const BLOCK_PACKED: &[Arg] = &[Q, K, V, GRAD_OUT, ROWS, writes("grad_kv")];

blocks! {
    ATTENTION_FORWARD_BLOCKS_8 = "attention_forward_blocks_8", "fused attention for heads 8 wide on software adapters", queries, VECS_2, ATTENTION_FORWARD, BLOCK_FORWARD;
    ATTENTION_BACKWARD_Q_BLOCKS_8 = "attention_backward_q_blocks_8", "gradient of the queries, 8 wide, software adapters", queries, VECS_2, ATTENTION_BACKWARD_Q, BLOCK_Q;
    ATTENTION_BACKWARD_KV_BLOCKS_8 = "attention_backward_kv_blocks_8", "gradients of keys and values, 8 wide, software adapters", keys, VECS_2, ATTENTION_BACKWARD_KV, BLOCK_KV;
    ATTENTION_BACKWARD_KV_PACKED_BLOCKS_8 = "attention_backward_kv_packed_blocks_8", "the same into one buffer, software adapters", keys, VECS_2, ATTENTION_BACKWARD_KV_PACKED, BLOCK_PACKED;
    ATTENTION_FORWARD_BLOCKS_16 = "attention_forward_blocks_16", "fused attention for heads 16 wide on software adapters", queries, VECS_4, ATTENTION_FORWARD, BLOCK_FORWARD;
    ATTENTION_BACKWARD_Q_BLOCKS_16 = "attention_backward_q_blocks_16", "gradient of the queries, 16 wide, software adapters", queries, VECS_4, ATTENTION_BACKWARD_Q, BLOCK_Q;
    ATTENTION_BACKWARD_KV_BLOCKS_16 = "attention_backward_kv_blocks_16", "gradients of keys and values, 16 wide, software adapters", keys, VECS_4, ATTENTION_BACKWARD_KV, BLOCK_KV;
    ATTENTION_BACKWARD_KV_PACKED_BLOCKS_16 = "attention_backward_kv_packed_blocks_16", "the same into one buffer, software adapters", keys, VECS_4, ATTENTION_BACKWARD_KV_PACKED, BLOCK_PACKED;
    ATTENTION_FORWARD_BLOCKS_32 = "attention_forward_blocks_32", "fused attention for heads 32 wide on software adapters", queries, VECS_8, ATTENTION_FORWARD, BLOCK_FORWARD;
    ATTENTION_BACKWARD_Q_BLOCKS_32 = "attention_backward_q_blocks_32", "gradient of the queries, 32 wide, software adapters", queries, VECS_8, ATTENTION_BACKWARD_Q, BLOCK_Q;
    ATTENTION_BACKWARD_KV_BLOCKS_32 = "attention_backward_kv_blocks_32", "gradients of keys and values, 32 wide, software adapters", keys, VECS_8, ATTENTION_BACKWARD_KV, BLOCK_KV;
    ATTENTION_BACKWARD_KV_PACKED_BLOCKS_32 = "attention_backward_kv_packed_blocks_32", "the same into one buffer, software adapters", keys, VECS_8, ATTENTION_BACKWARD_KV_PACKED, BLOCK_PACKED;
}

/// Gradient of the bias, summed over the items and heads that share it.
pub static ATTENTION_GRAD_BIAS: Kernel = Kernel {
    name: "attention_grad_bias",
    about: "gradient of the scores' bias",
    args: &[Q, K, V, BIAS, GRAD_OUT, ROWS, writes("grad_bias")],
    groups: |words| bias_elements(words).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: attention_grad_bias_cpu::<f32>, f64: attention_grad_bias_cpu::<f64> }),
    cost: Cost { unit: "score", units: scores, bytes: 4.0, flops: 80.0 },
    ..ATTENTION_FORWARD
};

/// The attention weights, for looking at them.
pub static ATTENTION_WEIGHTS: Kernel = Kernel {
    name: "attention_weights",
    about: "attention weights before dropout",
    args: &[Q, K, reads("lse"), BIAS, reads_u32("kv_len"), writes("weights")],
    groups: |words| scores(words).div_ceil(u64::from(WG)),
    cpu: Some(Cpu { f32: attention_weights_cpu::<f32>, f64: attention_weights_cpu::<f64> }),
    cost: Cost { unit: "score", units: scores, bytes: 4.0, flops: 50.0 },
    ..ATTENTION_FORWARD
};

stored_kernels! {
    &["lse", "rows"];
    ATTENTION_FORWARD_8_F16 "attention_forward_8_f16", ATTENTION_FORWARD_8_BF16 "attention_forward_8_bf16" = ATTENTION_FORWARD_8[8];
    ATTENTION_FORWARD_16_F16 "attention_forward_16_f16", ATTENTION_FORWARD_16_BF16 "attention_forward_16_bf16" = ATTENTION_FORWARD_16[8];
    ATTENTION_FORWARD_32_F16 "attention_forward_32_f16", ATTENTION_FORWARD_32_BF16 "attention_forward_32_bf16" = ATTENTION_FORWARD_32[8];
    ATTENTION_FORWARD_F16 "attention_forward_f16", ATTENTION_FORWARD_BF16 "attention_forward_bf16" = ATTENTION_FORWARD[8];
    ATTENTION_ROWS_F16 "attention_rows_f16", ATTENTION_ROWS_BF16 "attention_rows_bf16" = ATTENTION_ROWS[6];
    ATTENTION_BACKWARD_Q_8_F16 "attention_backward_q_8_f16", ATTENTION_BACKWARD_Q_8_BF16 "attention_backward_q_8_bf16" = ATTENTION_BACKWARD_Q_8[7];
    ATTENTION_BACKWARD_Q_16_F16 "attention_backward_q_16_f16", ATTENTION_BACKWARD_Q_16_BF16 "attention_backward_q_16_bf16" = ATTENTION_BACKWARD_Q_16[7];
    ATTENTION_BACKWARD_Q_32_F16 "attention_backward_q_32_f16", ATTENTION_BACKWARD_Q_32_BF16 "attention_backward_q_32_bf16" = ATTENTION_BACKWARD_Q_32[7];
    ATTENTION_BACKWARD_Q_F16 "attention_backward_q_f16", ATTENTION_BACKWARD_Q_BF16 "attention_backward_q_bf16" = ATTENTION_BACKWARD_Q[7];
    ATTENTION_BACKWARD_KV_8_F16 "attention_backward_kv_8_f16", ATTENTION_BACKWARD_KV_8_BF16 "attention_backward_kv_8_bf16" = ATTENTION_BACKWARD_KV_8[8];
    ATTENTION_BACKWARD_KV_16_F16 "attention_backward_kv_16_f16", ATTENTION_BACKWARD_KV_16_BF16 "attention_backward_kv_16_bf16" = ATTENTION_BACKWARD_KV_16[8];
    ATTENTION_BACKWARD_KV_32_F16 "attention_backward_kv_32_f16", ATTENTION_BACKWARD_KV_32_BF16 "attention_backward_kv_32_bf16" = ATTENTION_BACKWARD_KV_32[8];
    ATTENTION_BACKWARD_KV_F16 "attention_backward_kv_f16", ATTENTION_BACKWARD_KV_BF16 "attention_backward_kv_bf16" = ATTENTION_BACKWARD_KV[8];
    ATTENTION_BACKWARD_KV_PACKED_8_F16 "attention_backward_kv_packed_8_f16", ATTENTION_BACKWARD_KV_PACKED_8_BF16 "attention_backward_kv_packed_8_bf16" = ATTENTION_BACKWARD_KV_PACKED_8[7];
    ATTENTION_BACKWARD_KV_PACKED_16_F16 "attention_backward_kv_packed_16_f16", ATTENTION_BACKWARD_KV_PACKED_16_BF16 "attention_backward_kv_packed_16_bf16" = ATTENTION_BACKWARD_KV_PACKED_16[7];
    ATTENTION_BACKWARD_KV_PACKED_32_F16 "attention_backward_kv_packed_32_f16", ATTENTION_BACKWARD_KV_PACKED_32_BF16 "attention_backward_kv_packed_32_bf16" = ATTENTION_BACKWARD_KV_PACKED_32[7];
    ATTENTION_BACKWARD_KV_PACKED_F16 "attention_backward_kv_packed_f16", ATTENTION_BACKWARD_KV_PACKED_BF16 "attention_backward_kv_packed_bf16" = ATTENTION_BACKWARD_KV_PACKED[7];
    ATTENTION_BACKWARD_F16 "attention_backward_f16", ATTENTION_BACKWARD_BF16 "attention_backward_bf16" = ATTENTION_BACKWARD[9];
    ATTENTION_BACKWARD_PACKED_F16 "attention_backward_packed_f16", ATTENTION_BACKWARD_PACKED_BF16 "attention_backward_packed_bf16" = ATTENTION_BACKWARD_PACKED[7];
    ATTENTION_GRAD_BIAS_F16 "attention_grad_bias_f16", ATTENTION_GRAD_BIAS_BF16 "attention_grad_bias_bf16" = ATTENTION_GRAD_BIAS[7];
    ATTENTION_WEIGHTS_F16 "attention_weights_f16", ATTENTION_WEIGHTS_BF16 "attention_weights_bf16" = ATTENTION_WEIGHTS[6];
}

/// The kernels with arguments in 16 bits.
const STORED: [&Kernel; 42] = [
    &ATTENTION_FORWARD_8_F16,
    &ATTENTION_FORWARD_8_BF16,
    &ATTENTION_FORWARD_16_F16,
    &ATTENTION_FORWARD_16_BF16,
    &ATTENTION_FORWARD_32_F16,
    &ATTENTION_FORWARD_32_BF16,
    &ATTENTION_FORWARD_F16,
    &ATTENTION_FORWARD_BF16,
    &ATTENTION_ROWS_F16,
    &ATTENTION_ROWS_BF16,
    &ATTENTION_BACKWARD_Q_8_F16,
    &ATTENTION_BACKWARD_Q_8_BF16,
    &ATTENTION_BACKWARD_Q_16_F16,
    &ATTENTION_BACKWARD_Q_16_BF16,
    &ATTENTION_BACKWARD_Q_32_F16,
    &ATTENTION_BACKWARD_Q_32_BF16,
    &ATTENTION_BACKWARD_Q_F16,
    &ATTENTION_BACKWARD_Q_BF16,
    &ATTENTION_BACKWARD_KV_8_F16,
    &ATTENTION_BACKWARD_KV_8_BF16,
    &ATTENTION_BACKWARD_KV_16_F16,
    &ATTENTION_BACKWARD_KV_16_BF16,
    &ATTENTION_BACKWARD_KV_32_F16,
    &ATTENTION_BACKWARD_KV_32_BF16,
    &ATTENTION_BACKWARD_KV_F16,
    &ATTENTION_BACKWARD_KV_BF16,
    &ATTENTION_BACKWARD_KV_PACKED_8_F16,
    &ATTENTION_BACKWARD_KV_PACKED_8_BF16,
    &ATTENTION_BACKWARD_KV_PACKED_16_F16,
    &ATTENTION_BACKWARD_KV_PACKED_16_BF16,
    &ATTENTION_BACKWARD_KV_PACKED_32_F16,
    &ATTENTION_BACKWARD_KV_PACKED_32_BF16,
    &ATTENTION_BACKWARD_KV_PACKED_F16,
    &ATTENTION_BACKWARD_KV_PACKED_BF16,
    &ATTENTION_BACKWARD_F16,
    &ATTENTION_BACKWARD_BF16,
    &ATTENTION_BACKWARD_PACKED_F16,
    &ATTENTION_BACKWARD_PACKED_BF16,
    &ATTENTION_GRAD_BIAS_F16,
    &ATTENTION_GRAD_BIAS_BF16,
    &ATTENTION_WEIGHTS_F16,
    &ATTENTION_WEIGHTS_BF16,
];

/// Elements of a launch's grad_bias.
fn bias_elements(words: &[u32]) -> u64 {
    let p = params(words);
    let items = if p.bias_batch > 0 { u64::from(p.batch) } else { 1 };
    let heads = if p.bias_head > 0 { u64::from(p.heads) } else { 1 };
    items * heads * u64::from(p.queries) * u64::from(p.keys)
}

// ---- CPU column, plain ----------------------------------------------------------------------------------------------------------

/// Inputs of the backward kernels.
pub(crate) struct Inputs<'a, R> {
    pub(crate) shape: Shape,
    pub(crate) q: &'a [R],
    pub(crate) k: &'a [R],
    pub(crate) v: &'a [R],
    pub(crate) bias: &'a [R],
    pub(crate) grad_out: &'a [R],
    pub(crate) rows: &'a [R],
}

impl<'a, R: Real> Inputs<'a, R> {
    pub(crate) fn of(launch: &mut CpuLaunch<'a, R>) -> Result<Inputs<'a, R>> {
        let mut shape = Shape::of(launch.params()?);
        let mut next = || launch.real();
        let (q, k, v, bias, grad_out, rows) = (next()?, next()?, next()?, next()?, next()?, next()?);
        let half = |n: usize| rows.get(n).map_or(0, |x| x.f64() as u32);
        shape.step = half(1) | half(2) << 16;
        Ok(Inputs { shape, q, k, v, bias, grad_out, rows })
    }

    pub(crate) fn length(&self, b: usize) -> usize {
        self.rows[b * self.shape.p.record as usize].f64() as usize
    }

    fn row<'b>(&self, x: &'b [R], strides: &Strides, b: usize, h: usize, i: usize) -> &'b [R] {
        &x[strides.at(b, h) + i * strides.row..][..self.shape.width]
    }

    /// p and ds of a pair; `None` where the bias excludes it.
    fn pair(&self, b: usize, h: usize, i: usize, j: usize) -> Option<(R, R)> {
        let s = &self.shape;
        let (q, k) = (self.row(self.q, &s.q, b, h, i), self.row(self.k, &s.k, b, h, j));
        let score = score(s, q, k, self.bias, b, h, i, j)?;
        let (lse, delta) = (self.rows[s.rows_at(b, h) + 2 * i], self.rows[s.rows_at(b, h) + 2 * i + 1]);
        let p = (score - lse).exp();
        let dp = dot(self.row(self.grad_out, &s.out, b, h, i), self.row(self.v, &s.v, b, h, j));
        Some((p, p * (dp * s.kept(b, h, i, j) - delta)))
    }
}

fn dot<R: Real>(a: &[R], b: &[R]) -> R {
    a.iter().zip(b).fold(R::ZERO, |sum, (&a, &b)| a.mul_add(b, sum))
}

/// Score of a pair; `None` where the bias excludes it.
#[allow(clippy::too_many_arguments, reason = "a pair and what it is part of")]
fn score<R: Real>(s: &Shape, q: &[R], k: &[R], bias: &[R], b: usize, h: usize, i: usize, j: usize) -> Option<R> {
    let bias = if s.has(flag::BIAS) { bias[s.bias_at(b, h, i) + j] } else { R::ZERO };
    // A NaN is no exclusion: it must show.
    let excluded = bias <= R::of(EXCLUDED);
    (!excluded).then(|| dot(q, k) * s.scale() + bias)
}

/// Runs `work` for every (item, head, row) of `steps` rows, into blocks of `width` that are then put where the strides say.
fn owned<R: Real>(s: &Shape, steps: usize, width: usize, work: impl Fn(usize, usize, usize, &mut [R]) + Sync, mut put: impl FnMut(usize, usize, usize, &[R])) {
    let mut block = vec![R::ZERO; steps * width];
    for b in 0..s.batch {
        for h in 0..s.heads {
            block.par_chunks_exact_mut(width).enumerate().for_each(|(i, out)| work(b, h, i, out));
            block.chunks_exact(width).enumerate().for_each(|(i, out)| put(b, h, i, out));
        }
    }
}

pub(crate) fn attention_forward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let mut s = Shape::of(launch.params()?);
    let (q, k, v, bias, words) = (launch.real()?, launch.real()?, launch.real()?, launch.real()?, launch.word()?);
    s.step = launch.word()?[0];
    let (out, lse) = (launch.real_mut()?, launch.real_mut()?);
    let d = s.width;
    let row = |x: &[R], strides: &Strides, b: usize, h: usize, i: usize| -> Vec<R> { x[strides.at(b, h) + i * strides.row..][..d].to_vec() };
    let work = |b: usize, h: usize, i: usize, result: &mut [R]| {
        result.fill(R::ZERO);
        let q = row(q, &s.q, b, h, i);
        let keys = s.keys_of(i, s.length(words, b));
        let scores: Vec<(usize, R)> = keys.filter_map(|j| Some((j, score(&s, &q, &row(k, &s.k, b, h, j), bias, b, h, i, j)?))).collect();
        let most = scores.iter().fold(R::of(NO_KEY), |most, &(_, x)| most.max(x));
        let mut sum = R::ZERO;
        for &(j, x) in &scores {
            let p = (x - most).exp();
            let kept = p * s.kept(b, h, i, j);
            sum += p;
            result.iter_mut().zip(row(v, &s.v, b, h, j)).for_each(|(out, v)| *out = kept.mul_add(v, *out));
        }
        result[d] = R::of(NO_KEY);
        if !scores.is_empty() {
            result[..d].iter_mut().for_each(|x| *x = *x / sum);
            result[d] = most + sum.ln();
        }
    };
    owned(&s, s.queries, d + 1, work, |b, h, i, result| {
        out[s.out.at(b, h) + i * s.out.row..][..d].copy_from_slice(&result[..d]);
        lse[(b * s.heads + h) * s.queries + i] = result[d];
    });
    Ok(())
}

fn attention_rows_cpu<R: Real>(mut launch: CpuLaunch<'_, R>, dot: fn(&[R], &[R]) -> R) -> Result<()> {
    let s = Shape::of(launch.params()?);
    let (words, step, out, grad_out, lse) = (launch.word()?, launch.word()?[0], launch.real()?, launch.real()?, launch.real()?);
    let rows = launch.real_mut()?;
    rows.par_chunks_exact_mut(s.p.record as usize).enumerate().take(s.batch).for_each(|(b, record)| {
        record[0] = R::of(s.length(words, b) as f64);
        record[1] = R::of(f64::from(step & 0xffff));
        record[2] = R::of(f64::from(step >> 16));
        record[3] = R::ZERO;
        for (n, pair) in record[HEADER as usize..].chunks_exact_mut(2).take(s.heads * s.queries).enumerate() {
            let at = s.out.at(b, n / s.queries) + n % s.queries * s.out.row;
            pair[0] = lse[b * s.heads * s.queries + n];
            pair[1] = dot(&out[at..][..s.width], &grad_out[at..][..s.width]);
        }
    });
    Ok(())
}

pub(crate) fn attention_backward_q_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let x = Inputs::of(&mut launch)?;
    let (s, grad_q) = (x.shape, launch.real_mut()?);
    let work = |b: usize, h: usize, i: usize, out: &mut [R]| {
        out.fill(R::ZERO);
        for j in s.keys_of(i, x.length(b)) {
            if let Some((_, ds)) = x.pair(b, h, i, j) {
                out.iter_mut().zip(x.row(x.k, &s.k, b, h, j)).for_each(|(out, &k)| *out = ds.mul_add(k, *out));
            }
        }
        out.iter_mut().for_each(|x| *x *= s.scale());
    };
    owned(&s, s.queries, s.width, work, |b, h, i, out| grad_q[s.q.at(b, h) + i * s.q.row..][..s.width].copy_from_slice(out));
    Ok(())
}

/// grad_k and grad_v of a key.
fn key_gradients<R: Real>(x: &Inputs<'_, R>, b: usize, h: usize, j: usize, out: &mut [R]) {
    let s = &x.shape;
    out.fill(R::ZERO);
    let (grad_k, grad_v) = out.split_at_mut(s.width);
    for i in s.queries_of(j, x.length(b)) {
        if let Some((p, ds)) = x.pair(b, h, i, j) {
            let kept = p * s.kept(b, h, i, j);
            grad_k.iter_mut().zip(x.row(x.q, &s.q, b, h, i)).for_each(|(out, &q)| *out = ds.mul_add(q, *out));
            grad_v.iter_mut().zip(x.row(x.grad_out, &s.out, b, h, i)).for_each(|(out, &g)| *out = kept.mul_add(g, *out));
        }
    }
    grad_k.iter_mut().for_each(|x| *x *= s.scale());
}

pub(crate) fn attention_backward_kv_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let x = Inputs::of(&mut launch)?;
    let (s, grad_k, grad_v) = (x.shape, launch.real_mut()?, launch.real_mut()?);
    owned(
        &s,
        s.keys,
        2 * s.width,
        |b, h, j, out| key_gradients(&x, b, h, j, out),
        |b, h, j, out| {
            grad_k[s.k.at(b, h) + j * s.k.row..][..s.width].copy_from_slice(&out[..s.width]);
            grad_v[s.v.at(b, h) + j * s.v.row..][..s.width].copy_from_slice(&out[s.width..]);
        },
    );
    Ok(())
}

pub(crate) fn attention_backward_kv_packed_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let x = Inputs::of(&mut launch)?;
    let (s, grad_kv) = (x.shape, launch.real_mut()?);
    owned(
        &s,
        s.keys,
        2 * s.width,
        |b, h, j, out| key_gradients(&x, b, h, j, out),
        |b, h, j, out| {
            if s.has(flag::GRAD_K) {
                grad_kv[s.k.at(b, h) + j * s.k.row..][..s.width].copy_from_slice(&out[..s.width]);
            }
            if s.has(flag::GRAD_V) {
                grad_kv[s.v.at(b, h) + j * s.v.row..][..s.width].copy_from_slice(&out[s.width..]);
            }
        },
    );
    Ok(())
}

/// Gradients of all heads [B·NH, Tq + 2·Tk, D]: of q, of k, of v.
fn head_gradients<R: Real>(x: &Inputs<'_, R>) -> Vec<R> {
    let (s, d) = (&x.shape, x.shape.width);
    let mut all = vec![R::ZERO; s.batch * s.heads * (s.queries + 2 * s.keys) * d];
    all.par_chunks_exact_mut((s.queries + 2 * s.keys) * d).enumerate().for_each(|(n, out)| {
        let (b, h) = (n / s.heads, n % s.heads);
        let (grad_q, rest) = out.split_at_mut(s.queries * d);
        let (grad_k, grad_v) = rest.split_at_mut(s.keys * d);
        for i in 0..s.queries {
            for j in s.keys_of(i, x.length(b)) {
                let Some((p, ds)) = x.pair(b, h, i, j) else { continue };
                let (ds, kept) = (ds * s.scale(), p * s.kept(b, h, i, j));
                let add = |to: &mut [R], factor: R, row: &[R]| to.iter_mut().zip(row).for_each(|(to, &x)| *to = factor.mul_add(x, *to));
                add(&mut grad_q[i * d..][..d], ds, x.row(x.k, &s.k, b, h, j));
                add(&mut grad_k[j * d..][..d], ds, x.row(x.q, &s.q, b, h, i));
                add(&mut grad_v[j * d..][..d], kept, x.row(x.grad_out, &s.out, b, h, i));
            }
        }
    });
    all
}

/// Puts the gradients of all heads where the strides say; `which` is 0 for q, 1 for k, 2 for v.
fn put_heads<R: Real>(s: &Shape, all: &[R], which: usize, to: &mut [R]) {
    let (strides, from, steps) = [(&s.q, 0, s.queries), (&s.k, s.queries, s.keys), (&s.v, s.queries + s.keys, s.keys)][which];
    for (n, head) in all.chunks_exact((s.queries + 2 * s.keys) * s.width).enumerate() {
        for i in 0..steps {
            let at = strides.at(n / s.heads, n % s.heads) + i * strides.row;
            to[at..at + s.width].copy_from_slice(&head[(from + i) * s.width..][..s.width]);
        }
    }
}

fn attention_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let x = Inputs::of(&mut launch)?;
    let all = head_gradients(&x);
    (0..3).try_for_each(|which| launch.real_mut().map(|to| put_heads(&x.shape, &all, which, to)))
}

fn attention_backward_packed_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let x = Inputs::of(&mut launch)?;
    let (all, to) = (head_gradients(&x), launch.real_mut()?);
    (0..3).for_each(|which| put_heads(&x.shape, &all, which, to));
    Ok(())
}

fn attention_grad_bias_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let x = Inputs::of(&mut launch)?;
    let (s, grad_bias) = (x.shape, launch.real_mut()?);
    let (items, heads) = (if s.p.bias_batch > 0 { s.batch } else { 1 }, if s.p.bias_head > 0 { s.heads } else { 1 });
    grad_bias.par_chunks_exact_mut(s.keys.max(1)).enumerate().take(items * heads * s.queries).for_each(|(row, out)| {
        let (i, h0, b0) = (row % s.queries, row / s.queries % heads, row / s.queries / heads);
        if !s.has(flag::ADD) {
            out.fill(R::ZERO);
        }
        for b in (b0..s.batch).step_by(items) {
            for h in (h0..s.heads).step_by(heads) {
                for j in s.keys_of(i, x.length(b)) {
                    if let Some((_, ds)) = x.pair(b, h, i, j) {
                        out[j] += ds;
                    }
                }
            }
        }
    });
    Ok(())
}

fn attention_weights_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let s = Shape::of(launch.params()?);
    let (q, k, lse, bias, words, weights) = (launch.real()?, launch.real()?, launch.real()?, launch.real()?, launch.word()?, launch.real_mut()?);
    weights.par_chunks_exact_mut(s.keys.max(1)).enumerate().take(s.batch * s.heads * s.queries).for_each(|(row, out)| {
        let (i, h, b) = (row % s.queries, row / s.queries % s.heads, row / s.queries / s.heads);
        out.fill(R::ZERO);
        for j in s.keys_of(i, s.length(words, b)) {
            let (q, k) = (&q[s.q.at(b, h) + i * s.q.row..][..s.width], &k[s.k.at(b, h) + j * s.k.row..][..s.width]);
            if let Some(score) = score(&s, q, k, bias, b, h, i, j) {
                out[j] = (score - lse[row]).exp();
            }
        }
    });
    Ok(())
}

// ---- recording ------------------------------------------------------------------------------------------------------------------

/// Inputs and results of [`attention`]; backward reads them again.
#[derive(Debug, Clone)]
pub struct AttentionArgs {
    /// Queries.
    pub q: View,
    /// Keys.
    pub k: View,
    /// Values.
    pub v: View,
    /// Number of keys of each item [B] u32.
    pub kv_len: Option<View>,
    /// Added to the scores.
    pub bias: Option<View>,
    /// One word: which draw of dropout; needed with dropout only.
    pub step: Option<View>,
    /// Result.
    pub out: View,
    /// Log-sum-exp of the scores [B,NH,Tq].
    pub lse: View,
}

/// What [`attention_backward`] reads and writes besides; a gradient that is `None` is not computed.
#[derive(Debug, Clone)]
pub struct AttentionGrads {
    /// Gradient of out.
    pub grad_out: View,
    /// [`Attention::scratch_backward`] reals.
    pub scratch: View,
    /// Gradient of q.
    pub grad_q: Option<View>,
    /// Gradient of k.
    pub grad_k: Option<View>,
    /// Gradient of v.
    pub grad_v: Option<View>,
    /// Gradient of the bias, summed over the items and heads that share it.
    pub grad_bias: Option<View>,
}

/// The kernels of a width on a device.
struct Kernels {
    /// Whether they are those of software adapters, which know neither bias nor dropout.
    blocks: bool,
    forward: &'static Kernel,
    q: &'static Kernel,
    kv: &'static Kernel,
    packed: &'static Kernel,
}

fn kernels(op: &Attention, device: &Device, stored: Elem) -> Kernels {
    let cpu = matches!(device.info().kind, DeviceKind::Cpu | DeviceKind::Reference);
    let plain = op.bias.is_none() && op.dropout.is_none_or(|d| d.probability <= 0.0) && op.keys.max(op.queries) <= BLOCK_ROUNDS;
    let blocks = device.info().kind == DeviceKind::Wgpu && device.info().software && plain && !stored.is_half() && matches!(op.width, 8 | 16 | 32);
    let of = |forward, q, kv, packed| Kernels { blocks, forward, q, kv, packed };
    match op.width {
        8 if blocks => of(&ATTENTION_FORWARD_BLOCKS_8, &ATTENTION_BACKWARD_Q_BLOCKS_8, &ATTENTION_BACKWARD_KV_BLOCKS_8, &ATTENTION_BACKWARD_KV_PACKED_BLOCKS_8),
        16 if blocks => {
            of(&ATTENTION_FORWARD_BLOCKS_16, &ATTENTION_BACKWARD_Q_BLOCKS_16, &ATTENTION_BACKWARD_KV_BLOCKS_16, &ATTENTION_BACKWARD_KV_PACKED_BLOCKS_16)
        }
        32 if blocks => {
            of(&ATTENTION_FORWARD_BLOCKS_32, &ATTENTION_BACKWARD_Q_BLOCKS_32, &ATTENTION_BACKWARD_KV_BLOCKS_32, &ATTENTION_BACKWARD_KV_PACKED_BLOCKS_32)
        }
        1..=8 if !cpu => of(&ATTENTION_FORWARD_8, &ATTENTION_BACKWARD_Q_8, &ATTENTION_BACKWARD_KV_8, &ATTENTION_BACKWARD_KV_PACKED_8),
        9..=16 if !cpu => of(&ATTENTION_FORWARD_16, &ATTENTION_BACKWARD_Q_16, &ATTENTION_BACKWARD_KV_16, &ATTENTION_BACKWARD_KV_PACKED_16),
        17..=32 if !cpu => of(&ATTENTION_FORWARD_32, &ATTENTION_BACKWARD_Q_32, &ATTENTION_BACKWARD_KV_32, &ATTENTION_BACKWARD_KV_PACKED_32),
        _ => of(&ATTENTION_FORWARD, &ATTENTION_BACKWARD_Q, &ATTENTION_BACKWARD_KV, &ATTENTION_BACKWARD_KV_PACKED),
    }
}

fn expect(arg: &str, view: Option<&View>, expected: u64) -> Result<()> {
    let Some(view) = view else { return Ok(()) };
    if view.len() == expected {
        return Ok(());
    }
    Err(Error::Shape { op: OP, arg: arg.into(), expected: format!("{expected} values"), got: format!("{} values", view.len()) })
}

fn expect_stored(arg: &str, view: Option<&View>, stored: Elem) -> Result<()> {
    match view.map(View::elem) {
        Some(elem) if elem != stored => {
            let (expected, got) = (format!("stored in {}, as q", stored.wgsl()), elem.wgsl().into());
            let expected = if arg == "lse" { "f32, whatever q is stored in".into() } else { expected };
            Err(Error::Shape { op: OP, arg: arg.into(), expected, got })
        }
        _ => Ok(()),
    }
}

/// An op on its device: what forward, backward and weights share.
struct Recorder<'a> {
    op: &'a Attention,
    args: &'a AttentionArgs,
    lengths: View,
    step: View,
    params: AttentionParams,
    /// What q, k, v, bias, out and their gradients are stored in: what q is.
    stored: Elem,
}

/// A tensor that runs of the batch take apart.
#[derive(Clone, Copy)]
struct Tensor<'a> {
    view: &'a View,
    /// Elements of an item; 0 where all share it.
    item: u64,
}

impl<'a> Recorder<'a> {
    fn of(pass: &Pass, op: &'a Attention, args: &'a AttentionArgs) -> Result<Recorder<'a>> {
        op.check()?;
        let [q, k, v, out] = op.elements();
        for (name, view, expected) in [("q", &args.q, q), ("k", &args.k, k), ("v", &args.v, v), ("out", &args.out, out), ("lse", &args.lse, op.lse())] {
            expect(name, Some(view), expected)?;
        }
        expect("kv_len", args.kv_len.as_ref(), op.batch)?;
        if args.bias.is_some() != op.bias.is_some() {
            let (expected, got) = if op.bias.is_some() { ("there, as the op says", "none") } else { ("none, as the op says", "one") };
            return Err(Error::Shape { op: OP, arg: "bias".into(), expected: expected.into(), got: got.into() });
        }
        expect("bias", args.bias.as_ref(), op.bias_elements())?;
        expect("step", args.step.as_ref(), 1)?;
        let stored = args.q.elem();
        for (name, view) in [("k", Some(&args.k)), ("v", Some(&args.v)), ("bias", args.bias.as_ref()), ("out", Some(&args.out))] {
            expect_stored(name, view, stored)?;
        }
        expect_stored("lse", Some(&args.lse), Elem::F32)?;
        let params = op.params(args.kv_len.is_some());
        if params.flags & flag::DROPOUT != 0 && args.step.is_none() {
            return Err(Error::Shape { op: OP, arg: "step".into(), expected: "one word, as the op has dropout".into(), got: "none".into() });
        }
        // What is not read needs something of its type to bind.
        let word = match args.kv_len.as_ref().filter(|view| view.len() > 0).or(args.step.as_ref()) {
            Some(view) => view.clone(),
            None => View::from(&pass.device().zeros_u32("word", 1)?),
        };
        let (lengths, step) = (args.kv_len.clone().unwrap_or(word.clone()), args.step.clone().unwrap_or(word));
        Ok(Recorder { op, args, lengths, step, params, stored })
    }

    /// Whether there is nothing to compute.
    fn empty(&self) -> bool {
        self.op.batch == 0 || self.op.queries + self.op.keys == 0
    }

    fn q(&self) -> Tensor<'_> {
        Tensor { view: &self.args.q, item: self.op.elements()[0] / self.op.batch }
    }

    fn k(&self) -> Tensor<'_> {
        Tensor { view: &self.args.k, item: self.op.elements()[1] / self.op.batch }
    }

    fn v(&self) -> Tensor<'_> {
        Tensor { view: &self.args.v, item: self.op.elements()[2] / self.op.batch }
    }

    fn out<'b>(&self, view: &'b View) -> Tensor<'b> {
        Tensor { view, item: self.op.elements()[3] / self.op.batch }
    }

    fn lse(&self) -> Tensor<'_> {
        Tensor { view: &self.args.lse, item: self.op.heads * self.op.queries }
    }

    fn lengths(&self) -> Tensor<'_> {
        Tensor { view: &self.lengths, item: u64::from(self.args.kv_len.is_some()) }
    }

    fn step(&self) -> Tensor<'_> {
        Tensor { view: &self.step, item: 0 }
    }

    /// The bias, or something of its type to bind in its place.
    fn bias(&self) -> Tensor<'_> {
        match (&self.args.bias, self.op.bias) {
            (Some(view), Some(bias)) => Tensor { view, item: self.bias_item(bias) },
            _ => self.q(),
        }
    }

    fn bias_item(&self, bias: Bias) -> u64 {
        if bias.per_item { self.op.bias_elements() / self.op.batch } else { 0 }
    }

    /// Runs of the batch that one launch can take.
    fn runs(&self, device: &Device, tensors: &[Tensor<'_>], groups: u64, flops: u64) -> Result<Vec<Range<u64>>> {
        let op = self.op;
        let longest = tensors.iter().map(|t| t.item).max().unwrap_or(1).max(1);
        let runs = device.plan(OP, op.batch, longest, groups, flops * op.heads * op.queries * op.keys)?;
        let most = (u64::from(u32::MAX) / longest).max(1);
        Ok(runs.into_iter().flat_map(|run| run.clone().step_by(most as usize).map(move |at| at..(at + most).min(run.end))).collect())
    }

    /// Records a kernel over the whole batch.
    fn launch(&self, pass: &mut Pass, kernel: &'static Kernel, flags: u32, reads: &[Tensor<'_>], writes: &[Tensor<'_>]) -> Result<()> {
        let device = pass.device().clone();
        let kernel = in_storage(&STORED, kernel, self.stored)?;
        let one = AttentionParams { batch: 1, flags: self.params.flags | flags, ..self.params };
        let groups = (kernel.groups)(bytemuck::cast_slice(bytemuck::bytes_of(&one)));
        let all: Vec<Tensor<'_>> = reads.iter().chain(writes).copied().collect();
        for (n, run) in self.runs(&device, &all, groups, kernel.cost.flops as u64)?.into_iter().enumerate() {
            let part = |t: &Tensor<'_>| if t.item == 0 { 0..t.view.len() } else { run.start * t.item..run.end * t.item };
            let shared = writes.iter().any(|t| t.item == 0);
            if shared && n > 0 && self.stored.is_half() {
                let what = format!("{OP}: grad_bias that items share, summed in {}", self.stored.wgsl());
                let help = "cast the bias and q, k, v to f32, or take fewer items at once".into();
                return Err(Error::TooLarge { what, needed: self.op.batch, limit: run.start, unit: "items in a launch", help });
            }
            let add = if shared && n > 0 { flag::ADD } else { 0 };
            let params = AttentionParams { batch: (run.end - run.start) as u32, first: run.start as u32, flags: one.flags | add, ..one };
            let mut views = reads.iter().map(|t| pass.input(t.view, part(t))).collect::<Result<Vec<_>>>()?;
            let mut outputs = Vec::with_capacity(writes.len());
            for t in writes {
                // A packed tensor may hold more than this kernel writes.
                outputs.push(pass.update(t.view, part(t))?);
            }
            views.extend(outputs.iter().map(|o| o.view.clone()));
            pass.launch(kernel, &params, &views)?;
            for output in outputs {
                pass.finish(output)?;
            }
        }
        Ok(())
    }
}

/// Loop rounds of a thread that walks over `steps` steps of the other side: tiles, their loads, groups of four, dropout.
fn rounds(op: &Attention, steps: u64) -> u64 {
    let (vecs, threads) = match op.width {
        0..=8 => (2, 1),
        9..=16 => (4, 1),
        17..=32 => (8, 1),
        d => (8, d.div_ceil(32)),
    };
    let tile = if threads == 1 { 256 / vecs } else { (256 / (8 * threads)).min(8) / 4 * 4 };
    let dropout = if op.dropout.is_some() { 5 * 11 } else { 0 };
    steps.div_ceil(tile) * (16 + tile / 4 * (2 + 4 * threads + dropout)) + 16
}

/// Records attention: `args.out` and `args.lse` are overwritten.
///
/// out[b,h,i] depends on the keys and values that query i may see, and on nothing else.
/// # Errors
/// As [`Attention::check`]; `Shape` for a view of another length or a bias that the op does not announce; `TooLarge` if not even one item
/// fits the device.
pub fn attention(pass: &mut Pass, op: &Attention, args: &AttentionArgs) -> Result<()> {
    let r = Recorder::of(pass, op, args)?;
    if r.empty() || op.queries == 0 {
        return Ok(());
    }
    pass.device().check_rounds(OP, rounds(op, op.keys), "rounds")?;
    let Kernels { blocks, forward, .. } = kernels(op, pass.device(), r.stored);
    let results = [r.out(&args.out), r.lse()];
    match blocks {
        true => r.launch(pass, forward, 0, &[r.q(), r.k(), r.v(), r.lengths()], &results),
        false => r.launch(pass, forward, 0, &[r.q(), r.k(), r.v(), r.bias(), r.lengths(), r.step()], &results),
    }
}

/// Records the gradients that are wanted, from what [`attention`] left in `args.out` and `args.lse`. They are overwritten; of a packed gradient
/// only its own columns.
/// # Errors
/// As [`attention`].
pub fn attention_backward(pass: &mut Pass, op: &Attention, args: &AttentionArgs, grads: &AttentionGrads) -> Result<()> {
    let r = Recorder::of(pass, op, args)?;
    let [q, k, v, out] = op.elements();
    expect("grad_out", Some(&grads.grad_out), out)?;
    expect("grad_q", grads.grad_q.as_ref(), q)?;
    expect("grad_k", grads.grad_k.as_ref(), k)?;
    expect("grad_v", grads.grad_v.as_ref(), v)?;
    expect("grad_bias", grads.grad_bias.as_ref(), op.bias_elements())?;
    expect("scratch", Some(&grads.scratch), op.scratch_backward(pass.device()))?;
    let outs = [("grad_out", Some(&grads.grad_out)), ("grad_q", grads.grad_q.as_ref()), ("grad_k", grads.grad_k.as_ref()), ("grad_v", grads.grad_v.as_ref())];
    for (name, view) in outs.into_iter().chain([("grad_bias", grads.grad_bias.as_ref())]) {
        expect_stored(name, view, r.stored)?;
    }
    if grads.grad_bias.is_some() && op.bias.is_none() {
        return Err(Error::Shape { op: OP, arg: "grad_bias".into(), expected: "none, as the op has no bias".into(), got: "one".into() });
    }
    if r.empty() {
        return Ok(());
    }
    let device = pass.device().clone();
    device.check_rounds(OP, rounds(op, op.keys.max(op.queries)), "rounds")?;
    let kernels = kernels(op, &device, r.stored);
    let grad_out = r.out(&grads.grad_out);
    let rows = Tensor { view: &grads.scratch, item: op.record() };
    r.launch(pass, &ATTENTION_ROWS, 0, &[r.lengths(), r.step(), r.out(&args.out), grad_out, r.lse()], &[rows])?;
    let inputs = [r.q(), r.k(), r.v(), r.bias(), grad_out, rows];
    let plain = [r.q(), r.k(), r.v(), grad_out, rows];
    let like = |view, tensor: Tensor<'_>| Tensor { view, item: tensor.item };
    if let (Some(view), Some(bias)) = (&grads.grad_bias, op.bias) {
        r.launch(pass, &ATTENTION_GRAD_BIAS, 0, &inputs, &[Tensor { view, item: r.bias_item(bias) }])?;
    }
    let cpu = matches!(device.info().kind, DeviceKind::Cpu | DeviceKind::Reference) && op.batch * op.heads >= MANY_HEADS;
    if let (true, Some(grad_q), Some(grad_k), Some(grad_v)) = (cpu, &grads.grad_q, &grads.grad_k, &grads.grad_v) {
        if grad_q.is(grad_k) && grad_k.is(grad_v) {
            return r.launch(pass, &ATTENTION_BACKWARD_PACKED, 0, &inputs, &[like(grad_q, r.q())]);
        }
        if !grad_q.is(grad_k) && !grad_q.is(grad_v) && !grad_k.is(grad_v) {
            let outputs = [like(grad_q, r.q()), like(grad_k, r.k()), like(grad_v, r.v())];
            return r.launch(pass, &ATTENTION_BACKWARD, 0, &inputs, &outputs);
        }
    }
    let inputs: &[Tensor<'_>] = if kernels.blocks { &plain } else { &inputs };
    if let Some(view) = &grads.grad_q {
        r.launch(pass, kernels.q, 0, inputs, &[like(view, r.q())])?;
    }
    match (&grads.grad_k, &grads.grad_v) {
        (Some(grad_k), Some(grad_v)) if grad_k.is(grad_v) => {
            r.launch(pass, kernels.packed, flag::GRAD_K | flag::GRAD_V, inputs, &[like(grad_k, r.k())])?;
        }
        (Some(grad_k), Some(grad_v)) => r.launch(pass, kernels.kv, 0, inputs, &[like(grad_k, r.k()), like(grad_v, r.v())])?,
        (Some(grad_k), None) => r.launch(pass, kernels.packed, flag::GRAD_K, inputs, &[like(grad_k, r.k())])?,
        (None, Some(grad_v)) => r.launch(pass, kernels.packed, flag::GRAD_V, inputs, &[like(grad_v, r.v())])?,
        (None, None) => {}
    }
    Ok(())
}

/// Records the attention weights [B,NH,Tq,Tk] before dropout, from what [`attention`] left in `args.lse`; 0 for what a query may not see.
/// # Errors
/// As [`attention`].
pub fn attention_weights(pass: &mut Pass, op: &Attention, args: &AttentionArgs, weights: &View) -> Result<()> {
    let r = Recorder::of(pass, op, args)?;
    expect("weights", Some(weights), op.weights())?;
    if r.empty() || op.weights() == 0 {
        return Ok(());
    }
    op.small("weights", op.weights() / op.batch)?;
    let weights = Tensor { view: weights, item: op.weights() / op.batch };
    r.launch(pass, &ATTENTION_WEIGHTS, 0, &[r.q(), r.k(), r.lse(), r.bias(), r.lengths()], &[weights])
}

// ---- conformance ----------------------------------------------------------------------------------------------------------------

/// Conformance binding.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let shape = |name: &str| -> Result<[u64; 4]> {
        let shape: Vec<u64> = case.shape(name)?.iter().map(|&n| n as u64).collect();
        shape.try_into().map_err(|got| Error::Shape { op: OP, arg: name.into(), expected: "[B,NH,T,D]".into(), got: format!("{got:?}") })
    };
    let [batch, heads, queries, width] = shape("q")?;
    let keys = shape("k")?[2];
    let bias = if case.has("bias") { Some(shape("bias")?).map(|s| Bias { per_item: s[0] == batch, per_head: s[1] == heads }) } else { None };
    let op = Attention {
        queries,
        keys,
        causal: case.flag("causal"),
        window: case.number("window").ok().map(|w| w as u64),
        scale: case.number("scale").ok(),
        bias,
        ..Attention::new(batch, heads, queries, width)
    };
    let input = |name: &str| -> Result<View> { Ok(View::from(&device.upload(name, case.f32(name)?)?)) };
    let zeros = |name: &str, len: u64| -> Result<View> { Ok(View::from(&device.zeros(name, len)?)) };
    let [q, k, v, out] = op.elements();
    let args = AttentionArgs {
        q: input("q")?,
        k: input("k")?,
        v: input("v")?,
        kv_len: if case.has("kv_len") { Some(View::from(&device.upload_u32("kv_len", case.u32("kv_len")?)?)) } else { None },
        bias: if bias.is_some() { Some(input("bias")?) } else { None },
        step: None,
        out: zeros("out", out)?,
        lse: zeros("lse", op.lse())?,
    };
    let mut pass = device.pass(OP);
    attention(&mut pass, &op, &args)?;
    let mut reads = vec![("out", pass.read(&args.out)?), ("lse", pass.read(&args.lse)?)];
    if case.has("grad_out") {
        let grads = AttentionGrads {
            grad_out: input("grad_out")?,
            scratch: zeros("rows", op.scratch_backward(device))?,
            grad_q: Some(zeros("grad_q", q)?),
            grad_k: Some(zeros("grad_k", k)?),
            grad_v: Some(zeros("grad_v", v)?),
            grad_bias: if bias.is_some() { Some(zeros("grad_bias", op.bias_elements())?) } else { None },
        };
        attention_backward(&mut pass, &op, &args, &grads)?;
        for (name, view) in [("grad_q", &grads.grad_q), ("grad_k", &grads.grad_k), ("grad_v", &grads.grad_v), ("grad_bias", &grads.grad_bias)] {
            if let Some(view) = view {
                reads.push((name, pass.read(view)?));
            }
        }
    }
    let mut outputs = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    for (name, read) in reads {
        outputs.reals(name, done.f64(read)?);
    }
    Ok(outputs)
}
