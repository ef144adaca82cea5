//! LSTM and GRU over whole sequences, forward and backward, for many models at once.
//!
//! LSTM     i, f, o = σ(a_i), σ(a_f), σ(a_o);  g = tanh(a_g);  a = w_ih·x(t) + w_hh·h(t−1) + bias;  c(t) = f·c(t−1) + i·g;  h(t) = o·tanh(c(t)).
//! GRU      r, z = σ(a_r), σ(a_z);  n = tanh(a_n + r·u);  u = w_hn·h(t−1) + b_hn;  h(t) = (1 − z)·n + z·h(t−1)  (b_ih and b_hh apart).
//! Backward δ(t) = ∂loss/∂(pre-activations), time reversed;  grad_x = δ·w_ih;  grad_w = Σ_{b,t} δᵀ·[x, h(t−1), 1].
//! Shapes   x [M or 1,B,T,I]; w_ih [M,G,I], w_hh [M,G,H], bias [M,G], G = 4H (i,f,g,o) or 3H (r,z,n); y [M,B,T,y_stride], the layer's H
//!          columns from y_offset on; h0, c0 [M,B,H], or [M,H] where learned, zero where absent; lengths [B]: y is 0 and the state frozen
//!          past them; resets [B,T]: the state goes back to its start before a step; `reverse` runs each sequence from its last valid step.
//! Launch   forward  `recurrent_pack` (weights of one unit's four gates side by side), then `lstm_forward` or `gru_forward`: a workgroup
//!          owns ⌊WG / H⌋ (model, 4 sequences), a thread one unit (or every WG-th) of four sequences; all steps inside.
//!          In 16 bits on CUDA up to 256 units forward is `recurrent_pack_mma` (fragments), then `*_forward_mma`, `_wide` (beyond 64 units) or
//!          `_large` (beyond 128): a workgroup owns 16 sequences of one model, or as many times 16 as fit, and multiplies by `mma.sync`.
//!          backward [`recurrent_gates` where gates were not kept], `lstm_backward` or `gru_backward`, `recurrent_gradients` (32 × 32
//!          tiles of grad_x and of the weights' gradients over slices of B·T), [`recurrent_reduce` where there is more than one slice].
//!          Two and at most three launches; four if gates are recomputed and a model has more than 131,072 steps. Only where a device
//!          bounds loops (llvmpipe) or a binding is too small are there more: time and batch are split, no bit changes.
//!          On a CPU with 16 models or more, δ of each within 2^17 reals, all of backward is one launch, `recurrent_backward_models`.
//!          Software adapters (H, y_stride, y_offset multiples of 4, H ≤ 128, I ≥ 4) run the `_blocks` kernels: a thread owns four sequences, their states in
//!          memory, or 8 × 8 of a product; no barrier, no staging. Training (64,63,30,64) on llvmpipe, forward + backward + gradients, ms:
//!          tiles 110 + 105 + 330; 8 × 8 products 40; eight sequences a tile with barriers 45 + 41; two a thread 86 + 59; four 35 + 30.
//! Scratch  forward: packed weights and states; backward: δ [M,B,T,4H], and states with partial sums.
//! Keeps    per step h(t−1), for LSTM c(t−1) too, and the four gates where `keep` is `Gates`.
//! Floor    LSTM forward 8·B·T·H·(I+H) flops, training 3×; bytes 4·B·T·(I + H·(1 to 7)).
//! Stored   x, weights, biases, start and last states, y and their gradients in f32, f16 or bf16, all in one; what is kept, packed or scratch is
//!          f32, and so are all sums: results are rounded once.
//! Numerics f32 sums in the order of k (`mma.sync`: in its own, h(t−1) as a value of 16 bits and its rest, so that no column rounds it: 22 bits
//!          in f16, 16 in bf16); gates through exp with clamped arguments; no atomics, a fixed order everywhere.
//! Source   Hochreiter & Schmidhuber 1997; Cho et al. 2014, with the reset gate after the product as in cuDNN.
//! Files    shaders/recurrent.wgsl, recurrent_blocks.wgsl · cuda/recurrent.cu · recurrent_lanes.rs (f32 on the CPU) · reference: the `_cpu` functions

use crate::conformance::{Case, Outputs};
use crate::device::{Device, Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Elem, Kernel, in_storage, layout, params_of, reads, reads_u32, writes};
use crate::real::Real;
use crate::recurrent_lanes as lanes;
use crate::{Error, Result, cast};
use rayon::prelude::*;
use std::ops::Range;

params! {
    /// Params of the recurrent kernels.
    pub struct RecurrentParams {
        /// Models of the launch.
        models: u32,
        /// Sequences of a model.
        batch: u32,
        /// Sequences of the launch, the same number of each model.
        rows: u32,
        /// First sequence of each model.
        row0: u32,
        /// Steps.
        time: u32,
        /// Inputs.
        inputs: u32,
        /// Hidden units.
        hidden: u32,
        /// First step of the launch, in the order of processing …
        from_step: u32,
        /// … and one past the last.
        to_step: u32,
        /// Reals from one step of y (or grad_y) to the next …
        y_stride: u32,
        /// … and the layer's first.
        y_offset: u32,
        /// Slices that the weights' gradients are summed in.
        slices: u32,
        /// First slice of the launch …
        slice0: u32,
        /// … and how many.
        slice_count: u32,
        /// Sequences of a slice.
        slice_rows: u32,
        /// Parts that time is cut into, where a slice is one sequence.
        time_parts: u32,
        /// What is there: `flag`.
        flags: u32,
    }
}

/// Bits of [`RecurrentParams::flags`].
pub(crate) mod flag {
    pub(crate) const GRU: u32 = 1;
    pub(crate) const GATES: u32 = 2;
    pub(crate) const STATES: u32 = 4;
    pub(crate) const LENGTHS: u32 = 8;
    pub(crate) const RESETS: u32 = 16;
    pub(crate) const REVERSE: u32 = 32;
    pub(crate) const H0: u32 = 64;
    pub(crate) const C0: u32 = 128;
    pub(crate) const LEARNED: u32 = 256;
    pub(crate) const X_SHARED: u32 = 512;
    pub(crate) const BIAS: u32 = 1024;
    pub(crate) const GRAD_Y: u32 = 2048;
    pub(crate) const GRAD_X: u32 = 4096;
    pub(crate) const GRAD_HN: u32 = 8192;
    pub(crate) const GRAD_CN: u32 = 16384;
    pub(crate) const GRAD_W: u32 = 32768;
}

const WG: u32 = 128;
/// Sequences of a tile.
const ROWS: u64 = 4;
/// Side of a tile of a product.
const TILE: u64 = 32;
/// Most hidden units of the WGSL and CUDA columns: four sequences' states fill 16 KiB.
const MAX_HIDDEN: u64 = 1024;
/// Models from which on every thread of a CPU has some of its own …
const MANY_MODELS: u64 = 16;
/// … and most reals of a model's δ that they work so: half of a second-level cache.
const MODEL_DELTA: u64 = 1 << 17;
/// Most steps that one slice of a weight gradient sums.
const SLICE: u64 = 131_072;
/// Most elements of an argument, so that indices fit 32 bits.
const ELEMENTS: u64 = 1 << 31;
/// Units that packed weights are padded to.
pub(crate) const PAD: usize = 16;
/// Threads of a workgroup of the kernels that multiply on tensor cores, …
const MMA_WG: u32 = 256;
/// … sequences of their tiles, and units that a warp works on at once.
const MMA_ROWS: u64 = 16;
const MMA_UNITS: u64 = 8;

impl RecurrentParams {
    const NONE: RecurrentParams = RecurrentParams {
        models: 0,
        batch: 0,
        rows: 0,
        row0: 0,
        time: 0,
        inputs: 0,
        hidden: 0,
        from_step: 0,
        to_step: 0,
        y_stride: 0,
        y_offset: 0,
        slices: 0,
        slice0: 0,
        slice_count: 0,
        slice_rows: 0,
        time_parts: 0,
        flags: 0,
    };

    fn of(words: &[u32]) -> RecurrentParams {
        params_of(words).unwrap_or(RecurrentParams::NONE)
    }

    pub(crate) fn has(&self, bit: u32) -> bool {
        self.flags & bit != 0
    }

    pub(crate) fn gru(&self) -> bool {
        self.has(flag::GRU)
    }

    /// Rows of w_ih and w_hh.
    pub(crate) fn gates(&self) -> usize {
        self.hidden as usize * if self.gru() { 3 } else { 4 }
    }

    /// Sequences of one model in the launch.
    pub(crate) fn own(&self) -> usize {
        (self.rows / self.models.max(1)) as usize
    }

    /// Reals kept per step.
    pub(crate) fn width(&self) -> usize {
        let states = if self.gru() { 1 } else { 2 };
        self.hidden as usize * (if self.has(flag::GATES) { 4 } else { 0 } + states)
    }

    /// Where h(t−1) begins in what is kept of a step; c(t−1) follows.
    pub(crate) fn kept_h(&self) -> usize {
        if self.has(flag::GATES) { 4 * self.hidden as usize } else { 0 }
    }

    /// Reals of one model's weight gradients.
    pub(crate) fn weights(&self) -> usize {
        self.gates() * (self.inputs as usize + self.hidden as usize + if self.gru() { 2 } else { 1 })
    }

    /// Where the partial sums begin in `sums`: behind four states and two sums of them over each model.
    pub(crate) fn partials(&self) -> usize {
        (self.models as usize * self.hidden as usize) * (4 * self.batch as usize + 2)
    }

    /// Where w_ih, w_hh, b_ih, b_hh begin in a slice.
    pub(crate) fn parts(&self) -> [usize; 4] {
        let (m, g) = (self.models as usize, self.gates());
        let (i, h) = (self.inputs as usize, self.hidden as usize);
        [0, m * g * i, m * g * (i + h), m * g * (i + h + 1)]
    }

    /// The time index of processing step s of a sequence.
    pub(crate) fn step(&self, s: usize, length: usize) -> usize {
        if self.has(flag::REVERSE) && s < length { length - 1 - s } else { s }
    }

    pub(crate) fn length(&self, lengths: &[u32], b: usize) -> usize {
        if self.has(flag::LENGTHS) { lengths[b].min(self.time) as usize } else { self.time as usize }
    }

    pub(crate) fn resets_at(&self, resets: &[u32], b: usize, t: usize) -> bool {
        self.has(flag::RESETS) && resets[b * self.time as usize + t] != 0
    }

    /// Row of x of a sequence.
    pub(crate) fn x_row(&self, q: usize, b: usize) -> usize {
        if self.has(flag::X_SHARED) { b } else { q }
    }

    /// First and one past the last of the steps of a slice, counted over a model's B·T.
    pub(crate) fn slice(&self, slice: usize) -> (usize, usize) {
        let (t, parts) = (self.time as usize, self.time_parts as usize);
        let (from, to) = if parts > 1 {
            let part = t.div_ceil(parts);
            let (b, p) = (slice / parts, slice % parts);
            (b * t + (p * part).min(t), b * t + ((p + 1) * part).min(t))
        } else {
            (slice * self.slice_rows as usize * t, (slice + 1) * self.slice_rows as usize * t)
        };
        (from, to.min(self.batch as usize * t))
    }
}

fn tiles(x: u64) -> u64 {
    x.div_ceil(TILE)
}

fn loop_groups(words: &[u32]) -> u64 {
    let p = RecurrentParams::of(words);
    let items = u64::from(p.models) * (p.own() as u64).div_ceil(ROWS);
    items.div_ceil(u64::from((WG / p.hidden.max(1)).max(1)))
}

fn gate_groups(words: &[u32]) -> u64 {
    let p = RecurrentParams::of(words);
    u64::from(p.models) * tiles(p.own() as u64 * u64::from(p.time)) * tiles(4 * u64::from(p.hidden))
}

fn gradient_groups(words: &[u32]) -> u64 {
    let p = RecurrentParams::of(words);
    let (models, hidden, inputs) = (u64::from(p.models), u64::from(p.hidden), u64::from(p.inputs));
    let x = models * tiles(p.own() as u64 * u64::from(p.time)) * tiles(inputs);
    let w = models * u64::from(p.slice_count) * tiles(4 * hidden) * tiles(inputs + hidden + 1);
    (if p.has(flag::GRAD_X) { x } else { 0 }) + (if p.has(flag::GRAD_W) { w } else { 0 })
}

fn reduce_items(p: &RecurrentParams) -> u64 {
    u64::from(p.models) * (p.weights() as u64 + 2 * u64::from(p.hidden))
}

fn steps(words: &[u32]) -> u64 {
    let p = RecurrentParams::of(words);
    u64::from(p.rows) * u64::from(p.to_step.saturating_sub(p.from_step)) * u64::from(p.hidden) * (u64::from(p.inputs) + u64::from(p.hidden))
}

macro_rules! recurrent_kernel {
    ($(#[$doc:meta])* $value:ident, $name:literal, $about:literal, [$($arg:expr),*], $groups:expr, $cpu32:expr, $cpu64:expr, $flops:expr) => {
        $(#[$doc])*
        pub static $value: Kernel = Kernel {
            name: $name,
            about: $about,
            args: &[$($arg),*],
            params: layout::<RecurrentParams>(),
            workgroup: WG,
            constants: &[],
            groups: $groups,
            wgsl: wgsl!("recurrent"),
            cuda: cuda!("recurrent"),
            cpu: Some(Cpu { f32: $cpu32, f64: $cpu64 }),
            cost: Cost { unit: "unit-input-step", units: steps, bytes: 0.5, flops: $flops },
        };
    };
}

recurrent_kernel! {
    /// Weights of a unit's four gates side by side, inputs first, then hidden units, then the bias.
    RECURRENT_PACK, "recurrent_pack", "weights of a unit's gates side by side",
    [reads("w_ih"), reads("w_hh"), reads("b_ih"), reads("b_hh"), writes("packed")],
    |words| {
        let p = RecurrentParams::of(words);
        (u64::from(p.models) * u64::from(p.hidden) * (u64::from(p.inputs) + u64::from(p.hidden) + 1)).div_ceil(u64::from(WG))
    },
    lanes::pack, recurrent_pack_cpu, 1.0
}
recurrent_kernel! {
    /// All steps of an LSTM layer.
    LSTM_FORWARD, "lstm_forward", "all steps of an LSTM layer",
    [reads("x"), reads("packed"), reads_u32("lengths"), reads_u32("resets"), writes("state"), writes("y"), writes("saved")],
    loop_groups, lanes::forward, recurrent_forward_cpu, 8.0
}
recurrent_kernel! {
    /// All steps of a GRU layer.
    GRU_FORWARD, "gru_forward", "all steps of a GRU layer",
    [reads("x"), reads("packed"), reads_u32("lengths"), reads_u32("resets"), writes("state"), writes("y"), writes("saved")],
    loop_groups, lanes::forward, recurrent_forward_cpu, 6.0
}
recurrent_kernel! {
    /// Pre-activations of all steps again, from x and the states kept.
    RECURRENT_GATES, "recurrent_gates", "pre-activations of all steps from the states kept",
    [reads("x"), reads("saved"), reads("w_ih"), reads("w_hh"), reads("b_ih"), reads("b_hh"), writes("gates")],
    gate_groups, lanes::gates, recurrent_gates_cpu, 8.0
}
recurrent_kernel! {
    /// All steps of an LSTM layer backward: gradients of the pre-activations and of the states.
    LSTM_BACKWARD, "lstm_backward", "all steps of an LSTM layer backward",
    [reads("saved"), reads("w_hh"), reads_u32("lengths"), reads_u32("resets"), reads("grad_y"), writes("gates"), writes("sums")],
    loop_groups, lanes::backward, recurrent_backward_cpu, 8.0
}
recurrent_kernel! {
    /// All steps of a GRU layer backward: gradients of the pre-activations and of the states.
    GRU_BACKWARD, "gru_backward", "all steps of a GRU layer backward",
    [reads("saved"), reads("w_hh"), reads_u32("lengths"), reads_u32("resets"), reads("grad_y"), writes("gates"), writes("sums")],
    loop_groups, lanes::backward, recurrent_backward_cpu, 6.0
}
recurrent_kernel! {
    /// grad_x, and slices of the weights' gradients.
    RECURRENT_GRADIENTS, "recurrent_gradients", "grad_x, and slices of the weights' gradients",
    [reads("x"), reads("saved"), reads_u32("lengths"), reads("w_ih"), reads("gates"), writes("grad_x"), writes("sums")],
    gradient_groups, lanes::gradients, recurrent_gradients_cpu, 16.0
}
recurrent_kernel! {
    /// Sums of the slices, and of learned start states over the batch.
    RECURRENT_REDUCE, "recurrent_reduce", "sums of the slices and of learned start states",
    [writes("sums")],
    |words| reduce_items(&RecurrentParams::of(words)).div_ceil(u64::from(WG)), recurrent_reduce_cpu, recurrent_reduce_cpu, 1.0
}

/// Gates where they were not kept, δ, grad_x and the weights' gradients, a model at a time: the CPU's way with many small models, whose δ
/// then stays in a cache.
pub static RECURRENT_BACKWARD_MODELS: Kernel = Kernel {
    name: "recurrent_backward_models",
    about: "a recurrent layer backward, a model at a time, on the CPU",
    args: &[
        reads("x"),
        reads("saved"),
        reads("w_ih"),
        reads("w_hh"),
        reads("b_ih"),
        reads("b_hh"),
        reads_u32("lengths"),
        reads_u32("resets"),
        reads("grad_y"),
        writes("grad_x"),
        writes("sums"),
    ],
    groups: |words| u64::from(RecurrentParams::of(words).models),
    wgsl: None,
    cuda: None,
    cpu: Some(Cpu { f32: lanes::backward_models, f64: recurrent_backward_models_cpu }),
    cost: Cost { unit: "unit-input-step", units: steps, bytes: 0.5, flops: 24.0 },
    ..LSTM_BACKWARD
};

// ---- forward on tensor cores ----------------------------------------------------------------------------------------------------

/// Sizes of a forward kernel on tensor cores.
#[derive(Clone, Copy)]
struct Fragments {
    /// Times eight units that a warp owns, at most.
    octets: u64,
    /// Tiles of 16 inputs or units whose weights lie in registers; those of further ones come from memory at every step.
    depth: u64,
    /// Words of shared memory.
    words: u64,
}

const MMA: Fragments = Fragments { octets: 1, depth: 5, words: 6144 };
const MMA_WIDE: Fragments = Fragments { octets: 2, depth: 4, words: 6144 };
const MMA_LARGE: Fragments = Fragments { octets: 4, depth: 1, words: 12288 };

impl Fragments {
    const fn constants(&self) -> [(&'static str, u32); 3] {
        [("OCTETS", self.octets as u32), ("DEPTH", self.depth as u32), ("WORDS", self.words as u32)]
    }

    /// Words of one tile: two buffers of 16 rows of x, and of h as a value and its rest.
    fn tile(inputs: u64, hidden: u64) -> u64 {
        2 * MMA_ROWS * (8 * inputs.div_ceil(16) + 16 * hidden.div_ceil(16) + 4)
    }

    fn takes(&self, inputs: u64, hidden: u64) -> bool {
        let warps = u64::from(MMA_WG / 32);
        hidden.div_ceil(MMA_UNITS) <= self.octets * warps && Fragments::tile(inputs, hidden) <= self.words
    }

    fn groups(&self, words: &[u32]) -> u64 {
        let p = RecurrentParams::of(words);
        let (inputs, hidden, warps) = (u64::from(p.inputs), u64::from(p.hidden).max(1), u64::from(MMA_WG / 32));
        let slots = (warps / hidden.div_ceil(MMA_UNITS).min(warps)).min(self.words / Fragments::tile(inputs, hidden)).max(1);
        (u64::from(p.models) * (p.own() as u64).div_ceil(MMA_ROWS)).div_ceil(slots)
    }
}

/// Reals of one model's weights as fragments, and of its biases.
fn mma_packed(inputs: u64, hidden: u64) -> u64 {
    hidden.div_ceil(MMA_UNITS) * (256 * (inputs.div_ceil(16) + hidden.div_ceil(16)) + 4 * MMA_UNITS)
}

static RECURRENT_PACK_MMA: Kernel = Kernel {
    name: "recurrent_pack_mma",
    about: "weights as fragments of tensor cores",
    workgroup: MMA_WG,
    constants: &MMA.constants(),
    groups: |words| {
        let p = RecurrentParams::of(words);
        (u64::from(p.models) * mma_packed(u64::from(p.inputs), u64::from(p.hidden)) / 4).div_ceil(u64::from(MMA_WG))
    },
    wgsl: None,
    cpu: None,
    ..RECURRENT_PACK
};

macro_rules! mma_kernel {
    ($($value:ident = $name:literal, $about:literal, $of:ident, $sizes:ident;)*) => { $(
        static $value: Kernel = Kernel {
            name: $name,
            about: $about,
            workgroup: MMA_WG,
            constants: &$sizes.constants(),
            groups: |words| $sizes.groups(words),
            wgsl: None,
            cpu: None,
            ..$of
        };
    )* };
}

mma_kernel! {
    LSTM_FORWARD_MMA = "lstm_forward_mma", "all steps of an LSTM layer on tensor cores", LSTM_FORWARD, MMA;
    LSTM_FORWARD_MMA_WIDE = "lstm_forward_mma_wide", "the same for more hidden units", LSTM_FORWARD, MMA_WIDE;
    LSTM_FORWARD_MMA_LARGE = "lstm_forward_mma_large", "the same for up to 256 hidden units", LSTM_FORWARD, MMA_LARGE;
    GRU_FORWARD_MMA = "gru_forward_mma", "all steps of a GRU layer on tensor cores", GRU_FORWARD, MMA;
    GRU_FORWARD_MMA_WIDE = "gru_forward_mma_wide", "the same for more hidden units", GRU_FORWARD, MMA_WIDE;
    GRU_FORWARD_MMA_LARGE = "gru_forward_mma_large", "the same for up to 256 hidden units", GRU_FORWARD, MMA_LARGE;
}

// ---- kernels of software adapters ----------------------------------------------------------------------------------------------

const BLOCK_WG: u32 = 8;
/// Most hidden units.
const BLOCK_HIDDEN: u64 = 128;
/// Most rounds of one slice of a weight gradient: one a step, two more a sequence.
const BLOCK_SLICE: u64 = 60_000;

fn block_gradient_groups(words: &[u32]) -> u64 {
    let p = RecurrentParams::of(words);
    let (models, hidden, inputs) = (u64::from(p.models), u64::from(p.hidden), u64::from(p.inputs));
    let groups = |items: u64| items.div_ceil(u64::from(BLOCK_WG));
    let x = models * (p.own() as u64 * u64::from(p.time)).div_ceil(8) * inputs.div_ceil(8);
    let slices = models * u64::from(p.slice_count) * hidden / 2;
    let w = groups(slices * inputs.div_ceil(8)) + groups(slices * hidden.div_ceil(8));
    (if p.has(flag::GRAD_X) { groups(x) } else { 0 }) + (if p.has(flag::GRAD_W) { w } else { 0 })
}

fn block_loop_groups(words: &[u32]) -> u64 {
    let p = RecurrentParams::of(words);
    (u64::from(p.models) * (p.own() as u64).div_ceil(ROWS)).div_ceil(u64::from(BLOCK_WG))
}

macro_rules! block_kernel {
    ($($value:ident = $name:literal, $about:literal, $of:ident, $groups:expr;)*) => { $(
        #[doc = $about]
        pub static $value: Kernel =
            Kernel { name: $name, about: $about, workgroup: BLOCK_WG, groups: $groups, wgsl: wgsl!("recurrent_blocks"), cuda: None, cpu: None, ..$of };
    )* };
}

block_kernel! {
    LSTM_FORWARD_BLOCKS = "lstm_forward_blocks", "all steps of an LSTM layer, on software adapters", LSTM_FORWARD, block_loop_groups;
    GRU_FORWARD_BLOCKS = "gru_forward_blocks", "all steps of a GRU layer, on software adapters", GRU_FORWARD, block_loop_groups;
    LSTM_BACKWARD_BLOCKS = "lstm_backward_blocks", "all steps of an LSTM layer backward, on software adapters", LSTM_BACKWARD, block_loop_groups;
    GRU_BACKWARD_BLOCKS = "gru_backward_blocks", "all steps of a GRU layer backward, on software adapters", GRU_BACKWARD, block_loop_groups;
    RECURRENT_GRADIENTS_BLOCKS = "recurrent_gradients_blocks", "grad_x and slices of the weights' gradients, on software adapters", RECURRENT_GRADIENTS,
        block_gradient_groups;
}

stored_kernels! {
    &["packed", "state", "saved", "gates", "sums"];
    RECURRENT_PACK_F16 "recurrent_pack_f16", RECURRENT_PACK_BF16 "recurrent_pack_bf16" = RECURRENT_PACK[5];
    LSTM_FORWARD_F16 "lstm_forward_f16", LSTM_FORWARD_BF16 "lstm_forward_bf16" = LSTM_FORWARD[7];
    GRU_FORWARD_F16 "gru_forward_f16", GRU_FORWARD_BF16 "gru_forward_bf16" = GRU_FORWARD[7];
    RECURRENT_GATES_F16 "recurrent_gates_f16", RECURRENT_GATES_BF16 "recurrent_gates_bf16" = RECURRENT_GATES[7];
    LSTM_BACKWARD_F16 "lstm_backward_f16", LSTM_BACKWARD_BF16 "lstm_backward_bf16" = LSTM_BACKWARD[7];
    GRU_BACKWARD_F16 "gru_backward_f16", GRU_BACKWARD_BF16 "gru_backward_bf16" = GRU_BACKWARD[7];
    RECURRENT_GRADIENTS_F16 "recurrent_gradients_f16", RECURRENT_GRADIENTS_BF16 "recurrent_gradients_bf16" = RECURRENT_GRADIENTS[7];
    RECURRENT_PACK_MMA_F16 "recurrent_pack_mma_f16", RECURRENT_PACK_MMA_BF16 "recurrent_pack_mma_bf16" = RECURRENT_PACK_MMA[5];
    LSTM_FORWARD_MMA_F16 "lstm_forward_mma_f16", LSTM_FORWARD_MMA_BF16 "lstm_forward_mma_bf16" = LSTM_FORWARD_MMA[7];
    LSTM_FORWARD_MMA_WIDE_F16 "lstm_forward_mma_wide_f16", LSTM_FORWARD_MMA_WIDE_BF16 "lstm_forward_mma_wide_bf16" = LSTM_FORWARD_MMA_WIDE[7];
    LSTM_FORWARD_MMA_LARGE_F16 "lstm_forward_mma_large_f16", LSTM_FORWARD_MMA_LARGE_BF16 "lstm_forward_mma_large_bf16" = LSTM_FORWARD_MMA_LARGE[7];
    GRU_FORWARD_MMA_F16 "gru_forward_mma_f16", GRU_FORWARD_MMA_BF16 "gru_forward_mma_bf16" = GRU_FORWARD_MMA[7];
    GRU_FORWARD_MMA_WIDE_F16 "gru_forward_mma_wide_f16", GRU_FORWARD_MMA_WIDE_BF16 "gru_forward_mma_wide_bf16" = GRU_FORWARD_MMA_WIDE[7];
    GRU_FORWARD_MMA_LARGE_F16 "gru_forward_mma_large_f16", GRU_FORWARD_MMA_LARGE_BF16 "gru_forward_mma_large_bf16" = GRU_FORWARD_MMA_LARGE[7];
}

/// The kernels with arguments in 16 bits.
const STORED: [&Kernel; 28] = [
    &RECURRENT_PACK_F16,
    &RECURRENT_PACK_BF16,
    &LSTM_FORWARD_F16,
    &LSTM_FORWARD_BF16,
    &GRU_FORWARD_F16,
    &GRU_FORWARD_BF16,
    &RECURRENT_GATES_F16,
    &RECURRENT_GATES_BF16,
    &LSTM_BACKWARD_F16,
    &LSTM_BACKWARD_BF16,
    &GRU_BACKWARD_F16,
    &GRU_BACKWARD_BF16,
    &RECURRENT_GRADIENTS_F16,
    &RECURRENT_GRADIENTS_BF16,
    &RECURRENT_PACK_MMA_F16,
    &RECURRENT_PACK_MMA_BF16,
    &LSTM_FORWARD_MMA_F16,
    &LSTM_FORWARD_MMA_BF16,
    &LSTM_FORWARD_MMA_WIDE_F16,
    &LSTM_FORWARD_MMA_WIDE_BF16,
    &LSTM_FORWARD_MMA_LARGE_F16,
    &LSTM_FORWARD_MMA_LARGE_BF16,
    &GRU_FORWARD_MMA_F16,
    &GRU_FORWARD_MMA_BF16,
    &GRU_FORWARD_MMA_WIDE_F16,
    &GRU_FORWARD_MMA_WIDE_BF16,
    &GRU_FORWARD_MMA_LARGE_F16,
    &GRU_FORWARD_MMA_LARGE_BF16,
];

// ---- the plain column -------------------------------------------------------------------------------------------------------

fn sigmoid<R: Real>(x: R) -> R {
    let x = x.max(R::of(-80.0)).min(R::of(80.0));
    R::ONE / (R::ONE + (-x).exp())
}

/// Row of w_ih (and b_ih) of gate q of unit j: none of a GRU's last.
pub(crate) fn input_row(p: &RecurrentParams, q: usize, j: usize) -> Option<usize> {
    (!(p.gru() && q == 3)).then_some(q * p.hidden as usize + j)
}

/// Row of w_hh (and b_hh): a GRU's third gate has none, the fourth its third.
pub(crate) fn hidden_row(p: &RecurrentParams, q: usize, j: usize) -> Option<usize> {
    match (p.gru(), q) {
        (true, 2) => None,
        (true, 3) => Some(2 * p.hidden as usize + j),
        _ => Some(q * p.hidden as usize + j),
    }
}

/// Weight of input k (x, h, 1) in gate q of unit j of model m.
pub(crate) fn weight_of<R: Real>(p: &RecurrentParams, [w_ih, w_hh, b_ih, b_hh]: [&[R]; 4], m: usize, k: usize, q: usize, j: usize) -> R {
    let (i, h, g) = (p.inputs as usize, p.hidden as usize, p.gates());
    let (input, hidden) = (input_row(p, q, j), hidden_row(p, q, j));
    if k < i {
        return input.map_or(R::ZERO, |row| w_ih[(m * g + row) * i + k]);
    }
    if k < i + h {
        return hidden.map_or(R::ZERO, |row| w_hh[(m * g + row) * h + k - i]);
    }
    let of = |b: &[R], row: Option<usize>| row.map_or(R::ZERO, |row| b[m * g + row]);
    match (p.has(flag::BIAS), p.gru()) {
        (false, _) => R::ZERO,
        (true, false) => of(b_ih, input),
        (true, true) => of(b_ih, input) + of(b_hh, hidden),
    }
}

pub(crate) fn recurrent_pack_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: RecurrentParams = launch.params()?;
    let weights = [launch.real()?, launch.real()?, launch.real()?, launch.real()?];
    let packed = launch.real_mut()?;
    let (k, h) = ((p.inputs + p.hidden) as usize, p.hidden as usize);
    packed.par_chunks_mut((k + 1) * h * 4).enumerate().take(p.models as usize).for_each(|(m, out)| {
        for (at, out) in out.iter_mut().enumerate() {
            *out = weight_of(&p, weights, m, at / (4 * h), at % 4, at / 4 % h);
        }
    });
    Ok(())
}

/// The state that a sequence starts from: unit j of h, or of c.
pub(crate) fn start_of<R: Real>(p: &RecurrentParams, state: &[R], which: usize, m: usize, row: usize, j: usize) -> R {
    if !p.has(if which == 0 { flag::H0 } else { flag::C0 }) {
        return R::ZERO;
    }
    let h = p.hidden as usize;
    let of = if p.has(flag::LEARNED) { m } else { row };
    state[which * (p.models * p.batch) as usize * h + of * h + j]
}

/// One sequence of a forward launch.
struct Forward<'a, R> {
    y: &'a mut [R],
    saved: &'a mut [R],
    /// h and c on their way.
    h: &'a mut [R],
    c: &'a mut [R],
}

/// Chunks of a mutable slice, or as many empty ones.
pub(crate) fn chunks<R>(x: &mut [R], each: usize, count: usize) -> Vec<&mut [R]> {
    if each == 0 || x.is_empty() { (0..count).map(|_| Default::default()).collect() } else { x.chunks_mut(each).take(count).collect() }
}

pub(crate) fn recurrent_forward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: RecurrentParams = launch.params()?;
    let (x, packed, lengths, resets) = (launch.real()?, launch.real()?, launch.word()?, launch.word()?);
    let (state, y, saved) = (launch.real_mut()?, launch.real_mut()?, launch.real_mut()?);
    let (t, h, i) = (p.time as usize, p.hidden as usize, p.inputs as usize);
    let (rows, all, own) = (p.rows as usize, (p.models * p.batch) as usize, p.own());
    let (starts, moving) = state.split_at_mut(2 * all * h);
    let (hs, cs) = moving.split_at_mut(all * h);
    let starts = &*starts;
    let first = p.row0 as usize;
    let kept = if p.has(flag::STATES) { t * p.width() } else { 0 };
    let mut sequences: Vec<Forward<'_, R>> = chunks(y, t * p.y_stride as usize, rows)
        .into_iter()
        .zip(chunks(saved, kept, rows))
        .zip(hs.chunks_mut(h).skip(first).zip(cs.chunks_mut(h).skip(first)))
        .map(|((y, saved), (h, c))| Forward { y, saved, h, c })
        .collect();
    sequences.par_iter_mut().enumerate().for_each(|(q, out)| {
        let (m, b) = (q / own, first + q % own);
        let row = m * p.batch as usize + b;
        let length = p.length(lengths, b);
        let w = &packed[m * (i + h + 1) * h * 4..][..(i + h + 1) * h * 4];
        let start = |out: &mut Forward<'_, R>| {
            for j in 0..h {
                out.h[j] = start_of(&p, starts, 0, m, row, j);
                out.c[j] = start_of(&p, starts, 1, m, row, j);
            }
        };
        if p.from_step == 0 {
            start(out);
        }
        let mut next = vec![R::ZERO; h];
        for s in p.from_step as usize..p.to_step as usize {
            let step = p.step(s, length);
            let y = step * p.y_stride as usize + p.y_offset as usize;
            if s >= length {
                out.y[y..y + h].fill(R::ZERO);
                continue;
            }
            if p.resets_at(resets, b, step) {
                start(out);
            }
            let x = &x[(p.x_row(q, b) * t + step) * i..][..i];
            for j in 0..h {
                let mut a = [R::ZERO; 4];
                for (k, &v) in x.iter().chain(&*out.h).chain(&[R::ONE]).enumerate() {
                    for q in 0..4 {
                        a[q] += w[(k * h + j) * 4 + q] * v;
                    }
                }
                let before = (out.h[j], out.c[j]);
                let gates = if p.gru() {
                    let (r, z) = (sigmoid(a[0]), sigmoid(a[1]));
                    let n = (a[2] + r * a[3]).tanh();
                    next[j] = (R::ONE - z) * n + z * before.0;
                    [r, z, n, a[3]]
                } else {
                    let g = [sigmoid(a[0]), sigmoid(a[1]), a[2].tanh(), sigmoid(a[3])];
                    out.c[j] = g[1] * before.1 + g[0] * g[2];
                    next[j] = g[3] * out.c[j].tanh();
                    g
                };
                if p.has(flag::STATES) {
                    let kept = &mut out.saved[step * p.width()..][..p.width()];
                    if p.has(flag::GATES) {
                        (0..4).for_each(|q| kept[q * h + j] = gates[q]);
                    }
                    kept[p.kept_h() + j] = before.0;
                    if !p.gru() {
                        kept[p.kept_h() + h + j] = before.1;
                    }
                }
            }
            out.h.copy_from_slice(&next);
            out.y[y..y + h].copy_from_slice(&next);
        }
    });
    Ok(())
}

pub(crate) fn recurrent_gates_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: RecurrentParams = launch.params()?;
    let (x, saved) = (launch.real()?, launch.real()?);
    let weights = [launch.real()?, launch.real()?, launch.real()?, launch.real()?];
    gates_rows(p, x, saved, weights, launch.real_mut()?);
    Ok(())
}

fn gates_rows<R: Real>(p: RecurrentParams, x: &[R], saved: &[R], weights: [&[R]; 4], gates: &mut [R]) {
    let (t, h, i, own) = (p.time as usize, p.hidden as usize, p.inputs as usize, p.own());
    gates.par_chunks_mut(t * 4 * h).enumerate().take(p.rows as usize).for_each(|(q, out)| {
        let (m, b) = (q / own, p.row0 as usize + q % own);
        for (step, out) in out.chunks_mut(4 * h).enumerate() {
            let x = &x[(p.x_row(q, b) * t + step) * i..][..i];
            let before = &saved[(q * t + step) * p.width() + p.kept_h()..][..h];
            for (at, out) in out.iter_mut().enumerate() {
                *out = R::ZERO;
                for (k, &v) in x.iter().chain(before).chain(&[R::ONE]).enumerate() {
                    *out += weight_of(&p, weights, m, k, at / h, at % h) * v;
                }
            }
        }
    });
}

/// Gates as forward had them: kept, or from their pre-activations.
fn gates_again<R: Real>(p: &RecurrentParams, saved: &[R], own: &[R], j: usize) -> [R; 4] {
    let h = p.hidden as usize;
    if p.has(flag::GATES) {
        return [saved[j], saved[h + j], saved[2 * h + j], saved[3 * h + j]];
    }
    let a = [own[j], own[h + j], own[2 * h + j], own[3 * h + j]];
    if p.gru() {
        let r = sigmoid(a[0]);
        [r, sigmoid(a[1]), (a[2] + r * a[3]).tanh(), a[3]]
    } else {
        [sigmoid(a[0]), sigmoid(a[1]), a[2].tanh(), sigmoid(a[3])]
    }
}

pub(crate) fn recurrent_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: RecurrentParams = launch.params()?;
    let (saved, w_hh, words, grad_y) = (launch.real()?, launch.real()?, [launch.word()?, launch.word()?], launch.real()?);
    backward_rows(p, saved, w_hh, words, grad_y, launch.real_mut()?, launch.real_mut()?);
    Ok(())
}

fn backward_rows<R: Real>(p: RecurrentParams, saved: &[R], w_hh: &[R], [lengths, resets]: [&[u32]; 2], grad_y: &[R], gates: &mut [R], sums: &mut [R]) {
    let (t, h, own, first) = (p.time as usize, p.hidden as usize, p.own(), p.row0 as usize);
    let all = (p.models * p.batch) as usize * h;
    let (grad_h, rest) = sums.split_at_mut(all);
    let (grad_c, rest) = rest.split_at_mut(all);
    let (grad_h0, grad_c0) = rest[..2 * all].split_at_mut(all);
    let of = |x| <[R]>::chunks_mut(x, h).skip(first).take(p.rows as usize).collect::<Vec<_>>();
    let states = of(grad_h).into_par_iter().zip(of(grad_c)).zip(of(grad_h0).into_par_iter().zip(of(grad_c0)));
    states.zip(chunks(gates, t * 4 * h, p.rows as usize)).enumerate().for_each(|(q, (((dh, dc), (dh0, dc0)), gates))| {
        let (m, b) = (q / own, first + q % own);
        let length = p.length(lengths, b);
        if p.to_step == p.time {
            if !p.has(flag::GRAD_HN) {
                dh.fill(R::ZERO);
            }
            if !p.has(flag::GRAD_CN) {
                dc.fill(R::ZERO);
            }
            dh0.fill(R::ZERO);
            dc0.fill(R::ZERO);
        }
        for s in (p.from_step as usize..p.to_step as usize).rev() {
            let step = p.step(s, length);
            let out = &mut gates[step * 4 * h..(step + 1) * 4 * h];
            if s >= length {
                out.fill(R::ZERO);
                continue;
            }
            let kept = &saved[(q * t + step) * p.width()..][..p.width()];
            let before = &kept[p.kept_h()..];
            for j in 0..h {
                let g = gates_again(&p, kept, out, j);
                let up = if p.has(flag::GRAD_Y) { grad_y[(q * t + step) * p.y_stride as usize + p.y_offset as usize + j] } else { R::ZERO };
                let d = dh[j] + up;
                let delta = if p.gru() {
                    let [r, z, n, u] = g;
                    let dn = d * (R::ONE - z) * (R::ONE - n * n);
                    let dz = d * (before[j] - n) * z * (R::ONE - z);
                    dh[j] = d * z;
                    [dn * u * r * (R::ONE - r), dz, dn, dn * r]
                } else {
                    let [i, f, c, o] = g;
                    let last = before[h + j];
                    let tc = (f * last + i * c).tanh();
                    let e = dc[j] + d * o * (R::ONE - tc * tc);
                    dc[j] = e * f;
                    dh[j] = R::ZERO;
                    [e * c * i * (R::ONE - i), e * last * f * (R::ONE - f), e * i * (R::ONE - c * c), d * tc * o * (R::ONE - o)]
                };
                (0..4).for_each(|q| out[q * h + j] = delta[q]);
            }
            for q in 0..4 {
                for j in 0..h {
                    if let Some(row) = hidden_row(&p, q, j) {
                        let w = &w_hh[(m * p.gates() + row) * h..][..h];
                        (0..h).for_each(|k| dh[k] += out[q * h + j] * w[k]);
                    }
                }
            }
            if p.resets_at(resets, b, step) {
                for j in 0..h {
                    dh0[j] += dh[j];
                    dc0[j] += dc[j];
                }
                dh.fill(R::ZERO);
                dc.fill(R::ZERO);
            }
        }
        if p.from_step == 0 {
            for j in 0..h {
                dh0[j] += dh[j];
                dc0[j] += dc[j];
            }
        }
    });
}

pub(crate) fn recurrent_gradients_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: RecurrentParams = launch.params()?;
    let (x, saved, lengths, w_ih, gates) = (launch.real()?, launch.real()?, launch.word()?, launch.real()?, launch.real()?);
    gradients_rows(p, x, saved, lengths, w_ih, gates, launch.real_mut()?, launch.real_mut()?);
    Ok(())
}

fn gradients_rows<R: Real>(p: RecurrentParams, x: &[R], saved: &[R], lengths: &[u32], w_ih: &[R], gates: &[R], grad_x: &mut [R], sums: &mut [R]) {
    let (t, h, i, own, g) = (p.time as usize, p.hidden as usize, p.inputs as usize, p.own(), p.gates());
    if p.has(flag::GRAD_X) && t > 0 {
        grad_x.par_chunks_mut(t * i).enumerate().take(p.rows as usize).for_each(|(q, out)| {
            for (step, out) in out.chunks_mut(i).enumerate() {
                let delta = &gates[(q * t + step) * 4 * h..][..g];
                out.fill(R::ZERO);
                for (c, &d) in delta.iter().enumerate() {
                    let w = &w_ih[(q / own * g + c) * i..][..i];
                    (0..i).for_each(|k| out[k] += d * w[k]);
                }
            }
        });
    }
    if !p.has(flag::GRAD_W) {
        return;
    }
    let each = p.models as usize * p.weights();
    let slices = sums[p.partials()..].chunks_mut(each).enumerate().skip(p.slice0 as usize).take(p.slice_count as usize);
    for (slice, out) in slices {
        let [_, at_hh, at_b, at_bh] = p.parts();
        for m in 0..p.models as usize {
            out[m * g * i..(m + 1) * g * i].fill(R::ZERO);
            out[at_hh + m * g * h..at_hh + (m + 1) * g * h].fill(R::ZERO);
            out[at_b + m * g..at_b + (m + 1) * g].fill(R::ZERO);
            if p.gru() {
                out[at_bh + m * g..at_bh + (m + 1) * g].fill(R::ZERO);
            }
            let (from, to) = p.slice(slice);
            for n in from..to {
                let (b, step) = (n / t, n % t);
                if step >= p.length(lengths, b) {
                    continue;
                }
                let q = m * own + b - p.row0 as usize;
                let x = &x[(p.x_row(q, b) * t + step) * i..][..i];
                let before = &saved[(q * t + step) * p.width() + p.kept_h()..][..h];
                for at in 0..4 * h {
                    let d = gates[(q * t + step) * 4 * h + at];
                    if let Some(row) = input_row(&p, at / h, at % h) {
                        (0..i).for_each(|k| out[(m * g + row) * i + k] += d * x[k]);
                        out[at_b + m * g + row] += d;
                    }
                    if let Some(row) = hidden_row(&p, at / h, at % h) {
                        (0..h).for_each(|k| out[at_hh + (m * g + row) * h + k] += d * before[k]);
                        if p.gru() {
                            out[at_bh + m * g + row] += d;
                        }
                    }
                }
            }
        }
    }
}

/// Gates where they were not kept, δ and all gradients.
pub(crate) fn recurrent_backward_models_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: RecurrentParams = launch.params()?;
    let (x, saved) = (launch.real()?, launch.real()?);
    let weights = [launch.real()?, launch.real()?, launch.real()?, launch.real()?];
    let (words, grad_y) = ([launch.word()?, launch.word()?], launch.real()?);
    let (grad_x, sums) = (launch.real_mut()?, launch.real_mut()?);
    let mut gates = vec![R::ZERO; p.rows as usize * p.time as usize * 4 * p.hidden as usize];
    if !p.has(flag::GATES) && p.time > 0 {
        gates_rows(p, x, saved, weights, &mut gates);
    }
    backward_rows(p, saved, weights[1], words, grad_y, &mut gates, sums);
    gradients_rows(p, x, saved, words[0], weights[0], &gates, grad_x, sums);
    Ok(())
}

pub(crate) fn recurrent_reduce_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: RecurrentParams = launch.params()?;
    let sums = launch.real_mut()?;
    let (models, batch, h) = (p.models as usize, p.batch as usize, p.hidden as usize);
    let all = models * batch * h;
    let (states, partials) = sums.split_at_mut(p.partials());
    if p.has(flag::LEARNED) {
        let (grads, out) = states.split_at_mut(4 * all);
        for (at, out) in out.iter_mut().enumerate() {
            let (which, m, j) = (at / (models * h), at / h % models, at % h);
            *out = (0..batch).map(|b| grads[(2 + which) * all + (m * batch + b) * h + j]).sum();
        }
    }
    if p.has(flag::GRAD_W) {
        let (first, rest) = partials.split_at_mut(models * p.weights());
        for other in rest.chunks(models * p.weights()).take(p.slices as usize - 1) {
            first.par_iter_mut().zip(other).for_each(|(sum, &x)| *sum += x);
        }
    }
    Ok(())
}

// ---- the op -----------------------------------------------------------------------------------------------------------------

/// Which cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cell {
    /// Long short-term memory: gates i, f, g, o.
    Lstm,
    /// Gated recurrent unit: gates r, z, n.
    Gru,
}

/// What forward keeps for backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: there is no backward.
    Nothing,
    /// The states before each step; backward computes the gates again.
    States,
    /// States and gates.
    Gates,
}

/// Sizes and options of one layer in one direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recurrent {
    /// LSTM or GRU.
    pub cell: Cell,
    /// Models.
    pub models: u64,
    /// 1 if all models see the same x, else `models`.
    pub x_models: u64,
    /// Sequences of a model.
    pub batch: u64,
    /// Steps.
    pub time: u64,
    /// Inputs.
    pub inputs: u64,
    /// Hidden units.
    pub hidden: u64,
    /// Whether h0 and c0 are [M,H], shared by a model's sequences, rather than [M,B,H].
    pub learned_start: bool,
    /// Run each sequence from its last valid step to its first.
    pub reverse: bool,
    /// What forward keeps.
    pub keep: Keep,
    /// Reals from one step of y (and grad_y) to the next: H, or 2H where two directions share y …
    pub y_stride: u64,
    /// … and the column where this layer's H begin.
    pub y_offset: u64,
}

/// Views of a forward pass. For an LSTM `b_ih` is the bias and `b_hh` and GRU-only arguments stay `None`.
#[derive(Debug, Clone, Copy)]
pub struct RecurrentArgs<'a> {
    /// [M or 1,B,T,I].
    pub x: &'a View,
    /// [M,G,I].
    pub w_ih: &'a View,
    /// [M,G,H].
    pub w_hh: &'a View,
    /// LSTM: the bias; GRU: that of the inputs, and then `b_hh` too. [M,G].
    pub b_ih: Option<&'a View>,
    /// GRU: the bias of the hidden units [M,G].
    pub b_hh: Option<&'a View>,
    /// Start [M,B,H] or, where learned, [M,H]; zero where absent.
    pub h0: Option<&'a View>,
    /// As h0, of an LSTM's c.
    pub c0: Option<&'a View>,
    /// Valid steps of each sequence, words [B].
    pub lengths: Option<&'a View>,
    /// Words [B,T]: not zero where the state goes back to its start before the step.
    pub resets: Option<&'a View>,
    /// Result [M,B,T,y_stride]; only this layer's columns are written.
    pub y: &'a View,
    /// Final h [M,B,H].
    pub hn: Option<&'a View>,
    /// Final c [M,B,H].
    pub cn: Option<&'a View>,
    /// What backward needs: [`Recurrent::saved`] reals, in a buffer of their own.
    pub saved: &'a View,
    /// [`Recurrent::scratch`] reals, in two buffers of their own.
    pub scratch: [&'a View; 2],
}

/// Views of a backward pass; gradients that are `None` cost nothing.
#[derive(Debug, Clone, Copy)]
pub struct RecurrentGrads<'a> {
    /// As in forward.
    pub x: &'a View,
    /// As in forward.
    pub w_ih: &'a View,
    /// As in forward.
    pub w_hh: &'a View,
    /// As in forward.
    pub b_ih: Option<&'a View>,
    /// As in forward.
    pub b_hh: Option<&'a View>,
    /// As in forward.
    pub lengths: Option<&'a View>,
    /// As in forward.
    pub resets: Option<&'a View>,
    /// What forward kept.
    pub saved: &'a View,
    /// [M,B,T,y_stride], zero where absent.
    pub grad_y: Option<&'a View>,
    /// [M,B,H], zero where absent.
    pub grad_hn: Option<&'a View>,
    /// [M,B,H], zero where absent.
    pub grad_cn: Option<&'a View>,
    /// [M,B,T,I], each model's, also where they share x: its gradient is then their sum.
    pub grad_x: Option<&'a View>,
    /// As w_ih.
    pub grad_w_ih: Option<&'a View>,
    /// As w_hh.
    pub grad_w_hh: Option<&'a View>,
    /// As b_ih.
    pub grad_b_ih: Option<&'a View>,
    /// As b_hh.
    pub grad_b_hh: Option<&'a View>,
    /// [M,B,H] or, where learned, [M,H].
    pub grad_h0: Option<&'a View>,
    /// As grad_h0.
    pub grad_c0: Option<&'a View>,
    /// [`Recurrent::scratch_backward`] reals, in two buffers of their own.
    pub scratch: [&'a View; 2],
}

/// Models m0..m1 of a pass, or sequences b0..b1 of one model.
struct Chunk {
    models: Range<u64>,
    rows: Range<u64>,
}

impl Recurrent {
    /// One layer, forward in time, zero or per-sequence start states, gates kept.
    pub fn new(cell: Cell, models: u64, batch: u64, time: u64, inputs: u64, hidden: u64) -> Recurrent {
        Recurrent {
            cell,
            models,
            x_models: models,
            batch,
            time,
            inputs,
            hidden,
            learned_start: false,
            reverse: false,
            keep: Keep::Gates,
            y_stride: hidden,
            y_offset: 0,
        }
    }

    fn name(&self) -> &'static str {
        if self.cell == Cell::Gru { "gru" } else { "lstm" }
    }

    /// Rows of the weights.
    fn gates(&self) -> u64 {
        self.hidden * if self.cell == Cell::Gru { 3 } else { 4 }
    }

    /// Refuses sizes and options that make no sense.
    /// # Errors
    /// `Parameter` naming the size.
    pub fn check(&self) -> Result<()> {
        let wrong =
            |name: &str, value: u64, help: &str| Err(Error::Parameter { op: self.name(), name: name.into(), value: value.to_string(), help: help.into() });
        for (name, value) in [("models", self.models), ("inputs", self.inputs), ("hidden", self.hidden)] {
            if value == 0 {
                return wrong(name, value, "must be at least 1");
            }
        }
        if self.x_models != 1 && self.x_models != self.models {
            return wrong("x_models", self.x_models, "must be 1 or the number of models");
        }
        if self.y_offset.saturating_add(self.hidden) > self.y_stride {
            return wrong("y_offset", self.y_offset, "the layer's columns must lie inside y_stride");
        }
        let sizes = [self.models, self.batch, self.time, self.y_stride.max(6 * self.hidden).max(self.inputs)];
        if sizes.iter().try_fold(4u64, |product, &size| product.checked_mul(size)).is_none_or(|bytes| bytes > 1 << 48) {
            return wrong("batch", self.batch, "M·B·T·H is beyond 2^48 bytes: use fewer sequences");
        }
        if self.time.max(self.batch) >= 1 << 31 || (self.inputs + self.hidden + 2).saturating_mul(4 * self.hidden) > ELEMENTS {
            return wrong("hidden", self.hidden, "one model's weights or steps are beyond 2^31");
        }
        Ok(())
    }

    /// Sequences of a slice, parts of time, slices of a model: they depend on the sizes alone.
    fn slices(&self) -> (u64, u64, u64) {
        let (batch, time) = (self.batch.max(1), self.time.max(1));
        let wanted = if self.models >= 32 || self.keep == Keep::States { 1 } else { (batch * time / 512).clamp(1, 16) };
        let rows = batch.div_ceil(wanted).min((SLICE / time).max(1));
        let parts = time.div_ceil(SLICE);
        (rows, parts, batch.div_ceil(rows) * parts)
    }

    fn width(&self) -> u64 {
        let states = if self.cell == Cell::Gru { 1 } else { 2 };
        match self.keep {
            Keep::Nothing => 0,
            Keep::States => states * self.hidden,
            Keep::Gates => (4 + states) * self.hidden,
        }
    }

    /// Reals of `saved`.
    pub fn saved(&self) -> u64 {
        self.models * self.batch * self.time * self.width()
    }

    /// Reals of forward's two scratch buffers: packed weights, states.
    pub fn scratch(&self) -> [u64; 2] {
        let padded = self.hidden.next_multiple_of(PAD as u64);
        let rows = (self.inputs + self.hidden + 1) * 4 * padded;
        let fragments = if MMA_LARGE.takes(self.inputs, self.hidden) { mma_packed(self.inputs, self.hidden) } else { 0 };
        [self.models * rows.max(fragments), 4 * self.models * self.batch * self.hidden]
    }

    fn weights(&self) -> u64 {
        self.gates() * (self.inputs + self.hidden + if self.cell == Cell::Gru { 2 } else { 1 })
    }

    /// Reals of backward's two scratch buffers: gradients of the pre-activations; states and partial sums.
    pub fn scratch_backward(&self) -> [u64; 2] {
        let states = self.models * self.hidden * (4 * self.batch + 2);
        [self.models * self.batch * self.time * 4 * self.hidden, states + self.slices().2 * self.models * self.weights()]
    }

    fn flags(&self) -> u32 {
        let mut flags = if self.cell == Cell::Gru { flag::GRU } else { 0 };
        flags |= match self.keep {
            Keep::Nothing => 0,
            Keep::States => flag::STATES,
            Keep::Gates => flag::STATES | flag::GATES,
        };
        for (there, bit) in [(self.reverse, flag::REVERSE), (self.learned_start, flag::LEARNED)] {
            flags |= if there { bit } else { 0 };
        }
        flags
    }

    fn params(&self, flags: u32) -> RecurrentParams {
        let (slice_rows, time_parts, slices) = self.slices();
        RecurrentParams {
            batch: self.batch as u32,
            time: self.time as u32,
            inputs: self.inputs as u32,
            hidden: self.hidden as u32,
            to_step: self.time as u32,
            y_stride: self.y_stride as u32,
            y_offset: self.y_offset as u32,
            slices: slices as u32,
            slice_count: slices as u32,
            slice_rows: slice_rows as u32,
            time_parts: time_parts as u32,
            flags,
            ..RecurrentParams::NONE
        }
    }

    fn expect(&self, arg: &str, view: Option<&View>, len: u64, words: bool) -> Result<()> {
        self.expect_stored(arg, view, len, if words { Elem::U32 } else { Elem::F32 })
    }

    fn expect_stored(&self, arg: &str, view: Option<&View>, len: u64, elem: Elem) -> Result<()> {
        let Some(view) = view else { return Ok(()) };
        if view.len() == len && view.elem() == elem {
            return Ok(());
        }
        let got = format!("{} {}", view.len(), view.elem().wgsl());
        Err(Error::Shape { op: self.name(), arg: arg.into(), expected: format!("{len} {} ({self:?})", elem.wgsl()), got })
    }

    fn absent(&self, arg: &str, view: Option<&View>, why: &str) -> Result<()> {
        if view.is_none() {
            return Ok(());
        }
        Err(Error::Shape { op: self.name(), arg: arg.into(), expected: format!("None: {why}"), got: "a view".into() })
    }

    fn check_gpu(&self, device: &Device) -> Result<()> {
        use crate::DeviceKind::{Cpu, Reference};
        if matches!(device.info().kind, Cpu | Reference) || self.hidden <= MAX_HIDDEN {
            return Ok(());
        }
        let help = "use fewer hidden units, or --device cpu".into();
        Err(Error::TooLarge { what: format!("{}: hidden", self.name()), needed: self.hidden, limit: MAX_HIDDEN, unit: "units", help })
    }

    /// Whether the kernels of software adapters take these sizes on this device.
    fn blocks(&self, device: &Device) -> bool {
        let (slice_rows, time_parts, _) = self.slices();
        let quads = [self.hidden, self.y_stride, self.y_offset].iter().all(|n| n.is_multiple_of(4));
        let sizes = quads && self.hidden <= BLOCK_HIDDEN && self.inputs >= 4;
        let info = device.info();
        info.kind == crate::DeviceKind::Wgpu && info.software && sizes && slice_rows * (self.time.div_ceil(time_parts) + 2) <= BLOCK_SLICE
    }

    /// Whether [`RECURRENT_BACKWARD_MODELS`] takes these sizes: models for every thread, δ of one within half of a second-level cache.
    fn model_by_model(&self, device: &Device) -> bool {
        use crate::DeviceKind::{Cpu, Reference};
        let delta = self.batch * self.time * 4 * self.hidden;
        matches!(device.info().kind, Cpu | Reference) && self.models >= MANY_MODELS && self.slices().2 == 1 && (1..=MODEL_DELTA).contains(&delta)
    }

    /// The kernels that take a forward pass: weights packed, and all steps.
    fn forward_kernels(&self, device: &Device, stored: Elem) -> Result<[&'static Kernel; 2]> {
        let lstm = self.cell == Cell::Lstm;
        let of = |[if_lstm, if_gru]: [&'static Kernel; 2]| if lstm { if_lstm } else { if_gru };
        let half = stored.is_half();
        let mma = half && matches!(device.info().kind, crate::DeviceKind::Cuda | crate::DeviceKind::CudaHost);
        let on_tensor_cores = [
            (MMA, [&LSTM_FORWARD_MMA, &GRU_FORWARD_MMA]),
            (MMA_WIDE, [&LSTM_FORWARD_MMA_WIDE, &GRU_FORWARD_MMA_WIDE]),
            (MMA_LARGE, [&LSTM_FORWARD_MMA_LARGE, &GRU_FORWARD_MMA_LARGE]),
        ];
        let fitting = on_tensor_cores.into_iter().find(|(sizes, _)| mma && sizes.takes(self.inputs, self.hidden));
        let [pack, forward] = match fitting {
            Some((_, kernels)) => [&RECURRENT_PACK_MMA, of(kernels)],
            None if self.blocks(device) && !half && self.time > 0 => [&RECURRENT_PACK, of([&LSTM_FORWARD_BLOCKS, &GRU_FORWARD_BLOCKS])],
            None => [&RECURRENT_PACK, of([&LSTM_FORWARD, &GRU_FORWARD])],
        };
        Ok([in_storage(&STORED, pack, stored)?, in_storage(&STORED, forward, stored)?])
    }

    /// Rounds of a step of those kernels' loops, forward and backward.
    fn block_rounds(&self) -> (u64, u64) {
        let quads = self.hidden / 4;
        let forward = quads * (self.inputs / 4 + quads + 7) + 9 * quads + 16;
        (forward, self.hidden.div_ceil(8) * (self.gates() / 4 + 1) + 9 * quads + 32)
    }

    /// Runs of models that fit the device; runs of whole slices of sequences where not even one model does.
    fn chunks(&self, device: &Device) -> Result<Vec<Chunk>> {
        let (slice_rows, _, slices) = self.slices();
        let per_row = self.time * (4 * self.hidden).max(self.inputs).max(self.width()).max(self.y_stride);
        let fixed = (slices * self.weights()).max(self.scratch()[0] / self.models) + self.hidden * (4 * self.batch + 2);
        let groups_of = |rows: u64| rows.div_ceil(ROWS) + tiles(rows * self.time) * (tiles(4 * self.hidden) + tiles(self.inputs));
        let weight_groups = slices * tiles(4 * self.hidden) * tiles(self.inputs + self.hidden + 1);
        let work = |rows: u64| rows * self.time * 16 * self.hidden * (self.inputs + self.hidden);
        let elements = (self.batch * per_row).max(fixed);
        let fits = |elements: u64| 4 * elements <= device.limits().binding_bytes && elements <= ELEMENTS;
        if fits(elements) {
            let runs = device.plan(self.name(), self.models, elements, groups_of(self.batch) + weight_groups, work(self.batch))?;
            let most = runs.first().map_or(1, |run| run.end - run.start).min((ELEMENTS / elements.max(1)).max(1));
            let whole = 0..self.batch;
            return Ok((0..self.models).step_by(most as usize).map(|m| Chunk { models: m..(m + most).min(self.models), rows: whole.clone() }).collect());
        }
        if !fits(fixed) {
            let help = "use fewer hidden units or inputs".into();
            let limit = device.limits().binding_bytes.min(4 * ELEMENTS);
            return Err(Error::TooLarge { what: format!("{}: weights of one model", self.name()), needed: 4 * fixed, limit, unit: "B", help });
        }
        let runs = device.plan(self.name(), self.batch.div_ceil(slice_rows), slice_rows * per_row, groups_of(slice_rows) + weight_groups, work(slice_rows))?;
        let rows: Vec<_> = runs.iter().map(|run| run.start * slice_rows..(run.end * slice_rows).min(self.batch)).collect();
        Ok((0..self.models).flat_map(|m| rows.iter().map(move |rows| Chunk { models: m..m + 1, rows: rows.clone() })).collect())
    }

    /// Runs of steps that one launch may take: `rounds` of its loops per step.
    fn time_runs(&self, device: &Device, rounds: u64) -> Result<Vec<Range<u64>>> {
        device.check_rounds(self.name(), rounds + 64, "rounds")?;
        let run = ((device.limits().loop_rounds - 64) / rounds.max(1)).max(1);
        Ok((0..self.time.div_ceil(run)).map(|i| i * run..((i + 1) * run).min(self.time)).collect())
    }

    /// Rounds of the tile loop over `n` values.
    fn check_tiles(&self, device: &Device, n: u64) -> Result<()> {
        device.check_rounds(self.name(), n.div_ceil(16) * 6 + 64, "rounds")
    }
}

/// Part of a view to read and write: in place where its start is aligned, else through a copy that [`Bound::finish`] brings back.
struct Bound {
    view: View,
    target: Option<View>,
}

impl Bound {
    fn new(pass: &mut Pass, of: &View, range: Range<u64>) -> Result<Bound> {
        let aligned = (of.range.start + range.start).is_multiple_of(pass.device().align(of.elem()));
        let target = if aligned { None } else { Some(of.part(range.clone())) };
        Ok(Bound { view: pass.input(of, range)?, target })
    }

    fn finish(self, pass: &mut Pass) -> Result<()> {
        match self.target {
            Some(target) => pass.copy(&self.view, target),
            None => Ok(()),
        }
    }
}

fn bits(list: &[(bool, u32)]) -> u32 {
    list.iter().map(|&(there, bit)| if there { bit } else { 0 }).sum()
}

/// Copies, from one storage to another where they differ, `count` items of `each` reals from item `from` of one view to item `to` of another.
fn copy(pass: &mut Pass, (from, at): (&View, u64), (to, to_at): (&View, u64), len: u64) -> Result<()> {
    let (from, to) = (from.part(at..at + len), to.part(to_at..to_at + len));
    match len {
        0 => Ok(()),
        _ if from.elem() == to.elem() => pass.copy(from, to),
        _ => cast::cast(pass, &from, &to, 1.0),
    }
}

/// Records an LSTM or GRU layer, all steps.
/// # Errors
/// `Shape` where a view does not fit the sizes; `Parameter` for sizes that make no sense; `TooLarge` beyond the device.
pub fn recurrent(pass: &mut Pass, op: &Recurrent, args: &RecurrentArgs<'_>) -> Result<()> {
    op.check()?;
    let (g, all) = (op.gates(), op.models * op.batch);
    let lstm = op.cell == Cell::Lstm;
    let starts = if op.learned_start { op.models } else { all } * op.hidden;
    let stored = args.x.elem();
    op.expect_stored("x", Some(args.x), op.x_models * op.batch * op.time * op.inputs, storage(stored))?;
    op.expect_stored("w_ih", Some(args.w_ih), op.models * g * op.inputs, stored)?;
    op.expect_stored("w_hh", Some(args.w_hh), op.models * g * op.hidden, stored)?;
    check_biases(op, args.b_ih, args.b_hh, stored)?;
    op.expect_stored("h0", args.h0, starts, stored)?;
    op.expect_stored("c0", args.c0, starts, stored)?;
    op.expect("lengths", args.lengths, op.batch, true)?;
    op.expect("resets", args.resets, op.batch * op.time, true)?;
    op.expect_stored("y", Some(args.y), all * op.time * op.y_stride, stored)?;
    op.expect_stored("hn", args.hn, all * op.hidden, stored)?;
    op.expect_stored("cn", args.cn, all * op.hidden, stored)?;
    op.expect("saved", Some(args.saved), op.saved(), false)?;
    op.expect("scratch[0]", Some(args.scratch[0]), op.scratch()[0], false)?;
    op.expect("scratch[1]", Some(args.scratch[1]), op.scratch()[1], false)?;
    if !lstm {
        op.absent("c0", args.c0, "a GRU has no c")?;
        op.absent("cn", args.cn, "a GRU has no c")?;
    }
    if all == 0 {
        return Ok(());
    }
    let device = pass.device().clone();
    op.check_gpu(&device)?;
    let flags = op.flags()
        | bits(&[
            (args.lengths.is_some(), flag::LENGTHS),
            (args.resets.is_some(), flag::RESETS),
            (args.h0.is_some(), flag::H0),
            (args.c0.is_some(), flag::C0),
            (args.b_ih.is_some(), flag::BIAS),
        ]);
    let units = op.hidden.div_ceil(u64::from(WG));
    let blocks = op.blocks(&device) && !stored.is_half();
    let rounds = if blocks { op.block_rounds().0 } else { units * (op.inputs.div_ceil(4) + op.hidden.div_ceil(4) + 8) + 1 };
    let runs = op.time_runs(&device, rounds)?;
    let (lengths, resets) = words(&device, args.lengths, args.resets)?;
    let [pack, forward] = op.forward_kernels(&device, stored)?;
    for chunk in op.chunks(&device)? {
        let models = chunk.models.end - chunk.models.start;
        let (m0, rows) = (chunk.models.start, chunk.rows.clone());
        let shared = op.x_models == 1 && models > 1;
        let (count, first) = (models * (rows.end - rows.start), m0 * op.batch + rows.start);
        let p = RecurrentParams {
            models: models as u32,
            rows: count as u32,
            row0: rows.start as u32,
            ..op.params(flags | if shared { flag::X_SHARED } else { 0 })
        };
        let of_models = |each: u64| m0 * each..(m0 + models) * each;
        let of_rows = |each: u64| first * each..(first + count) * each;
        // Whole models: their states are this chunk's. One model in parts: the states of its sequences.
        let region = models * op.batch * op.hidden;
        let packed = pass.input(args.scratch[0], 0..op.scratch()[0] / op.models * models)?;
        let state = pass.input(args.scratch[1], 0..4 * region)?;
        let starts = if op.learned_start { op.hidden } else { op.batch * op.hidden };
        for (from, which) in [(args.h0, 0), (args.c0, 1)] {
            if let Some(from) = from {
                copy(pass, (from, m0 * starts), (&state, which * region), models * starts)?;
            }
        }
        let weights = [pass.input(args.w_ih, of_models(g * op.inputs))?, pass.input(args.w_hh, of_models(g * op.hidden))?];
        let b_ih = pass.input(args.b_ih.unwrap_or(args.w_ih), of_models(if args.b_ih.is_some() { g } else { 0 }))?;
        let b_hh = pass.input(args.b_hh.unwrap_or(args.w_ih), of_models(if args.b_hh.is_some() { g } else { 0 }))?;
        let [w_ih, w_hh] = weights;
        pass.launch(pack, &p, &[w_ih, w_hh, b_ih, b_hh, packed.clone()])?;
        if op.time > 0 {
            let x = pass.input(args.x, x_range(op, &chunk, shared))?;
            let y = Bound::new(pass, args.y, of_rows(op.time * op.y_stride))?;
            let saved = Bound::new(pass, args.saved, of_rows(op.time * op.width()))?;
            for run in &runs {
                let p = RecurrentParams { from_step: run.start as u32, to_step: run.end as u32, ..p };
                let args = [x.clone(), packed.clone(), lengths.clone(), resets.clone(), state.clone(), y.view.clone(), saved.view.clone()];
                pass.launch(forward, &p, &args)?;
            }
            y.finish(pass)?;
            saved.finish(pass)?;
        } else {
            let p = RecurrentParams { to_step: 0, ..p };
            let x = pass.input(args.x, 0..0)?;
            pass.launch(forward, &p, &[x, packed, lengths.clone(), resets.clone(), state.clone(), args.y.part(0..0), args.saved.part(0..0)])?;
        }
        let (at, len) = (rows.start * op.hidden, (count) * op.hidden);
        for (to, which) in [(args.hn, 2), (args.cn, 3)] {
            if let Some(to) = to {
                copy(pass, (&state, which * region + at), (to, first * op.hidden), len)?;
            }
        }
    }
    Ok(())
}

/// What reals are stored in; words are refused as f32 is expected.
fn storage(elem: Elem) -> Elem {
    if elem.is_half() { elem } else { Elem::F32 }
}

fn check_biases(op: &Recurrent, b_ih: Option<&View>, b_hh: Option<&View>, stored: Elem) -> Result<()> {
    op.expect_stored("b_ih", b_ih, op.models * op.gates(), stored)?;
    op.expect_stored("b_hh", b_hh, op.models * op.gates(), stored)?;
    if op.cell == Cell::Lstm {
        return op.absent("b_hh", b_hh, "an LSTM has one bias");
    }
    if b_ih.is_some() == b_hh.is_some() {
        return Ok(());
    }
    let got = if b_ih.is_some() { "b_ih alone" } else { "b_hh alone" };
    Err(Error::Shape { op: op.name(), arg: "b_ih, b_hh".into(), expected: "both or neither".into(), got: got.into() })
}

fn x_range(op: &Recurrent, chunk: &Chunk, shared: bool) -> Range<u64> {
    let each = op.time * op.inputs;
    if shared {
        return 0..op.batch * each;
    }
    let m = if op.x_models == 1 { 0 } else { chunk.models.start };
    let models = chunk.models.end - chunk.models.start;
    let count = models * (chunk.rows.end - chunk.rows.start);
    (m * op.batch + chunk.rows.start) * each..(m * op.batch + chunk.rows.start + count) * each
}

/// Lengths and resets to bind; what is absent is bound to the other or to nothing.
fn words(device: &Device, lengths: Option<&View>, resets: Option<&View>) -> Result<(View, View)> {
    let nothing = match lengths.or(resets) {
        Some(view) => view.clone(),
        None => View::from(&device.zeros_u32("no words", 1)?),
    };
    Ok((lengths.unwrap_or(&nothing).clone(), resets.unwrap_or(&nothing).clone()))
}

/// Records the gradients of [`recurrent`]; results are overwritten.
/// # Errors
/// As [`recurrent`]; `Parameter` where `keep` is `Nothing`.
pub fn recurrent_backward(pass: &mut Pass, op: &Recurrent, args: &RecurrentGrads<'_>) -> Result<()> {
    op.check()?;
    let (g, all) = (op.gates(), op.models * op.batch);
    let lstm = op.cell == Cell::Lstm;
    let starts = if op.learned_start { op.models } else { all } * op.hidden;
    let x_len = op.x_models * op.batch * op.time * op.inputs;
    let y_len = all * op.time * op.y_stride;
    let reals = [
        ("x", Some(args.x), x_len),
        ("w_ih", Some(args.w_ih), op.models * g * op.inputs),
        ("w_hh", Some(args.w_hh), op.models * g * op.hidden),
        ("saved", Some(args.saved), op.saved()),
        ("grad_y", args.grad_y, y_len),
        ("grad_hn", args.grad_hn, all * op.hidden),
        ("grad_cn", args.grad_cn, all * op.hidden),
        ("grad_x", args.grad_x, all * op.time * op.inputs),
        ("grad_w_ih", args.grad_w_ih, op.models * g * op.inputs),
        ("grad_w_hh", args.grad_w_hh, op.models * g * op.hidden),
        ("grad_b_ih", args.grad_b_ih, op.models * g),
        ("grad_b_hh", args.grad_b_hh, op.models * g),
        ("grad_h0", args.grad_h0, starts),
        ("grad_c0", args.grad_c0, starts),
        ("scratch[0]", Some(args.scratch[0]), op.scratch_backward()[0]),
        ("scratch[1]", Some(args.scratch[1]), op.scratch_backward()[1]),
    ];
    let stored = storage(args.x.elem());
    for (arg, view, len) in reals {
        let inside = arg == "saved" || arg.starts_with("scratch");
        op.expect_stored(arg, view, len, if inside { Elem::F32 } else { stored })?;
    }
    check_biases(op, args.b_ih, args.b_hh, stored)?;
    op.expect("lengths", args.lengths, op.batch, true)?;
    op.expect("resets", args.resets, op.batch * op.time, true)?;
    if lstm {
        op.absent("grad_b_hh", args.grad_b_hh, "an LSTM has one bias")?;
    } else {
        op.absent("grad_c0", args.grad_c0, "a GRU has no c")?;
        op.absent("grad_cn", args.grad_cn, "a GRU has no c")?;
    }
    let parameter = |name: &str, value: String, help: &str| Error::Parameter { op: op.name(), name: name.into(), value, help: help.into() };
    if op.keep == Keep::Nothing {
        return Err(parameter("keep", "Nothing".into(), "backward needs what forward keeps: use Keep::States or Keep::Gates"));
    }
    let device = pass.device().clone();
    op.check_gpu(&device)?;
    let weights = [args.grad_w_ih, args.grad_w_hh, args.grad_b_ih, args.grad_b_hh];
    let wanted = weights.iter().any(Option::is_some);
    let (slice_rows, time_parts, slices) = op.slices();
    let flags = op.flags()
        | bits(&[
            (args.lengths.is_some(), flag::LENGTHS),
            (args.resets.is_some(), flag::RESETS),
            (args.b_ih.is_some(), flag::BIAS),
            (args.grad_y.is_some(), flag::GRAD_Y),
            (args.grad_hn.is_some(), flag::GRAD_HN),
            (args.grad_cn.is_some(), flag::GRAD_CN),
            (args.grad_x.is_some(), flag::GRAD_X),
            (wanted, flag::GRAD_W),
        ]);
    let units = op.hidden.div_ceil(u64::from(WG));
    let blocks = op.blocks(&device) && !stored.is_half();
    let whole = op.model_by_model(&device) && !stored.is_half();
    let rounds = if blocks { op.block_rounds().1 } else { units * (op.hidden.div_ceil(2) + 8) + 1 };
    let runs = op.time_runs(&device, rounds)?;
    op.check_tiles(&device, op.inputs + op.hidden + 1)?;
    op.check_tiles(&device, 4 * op.hidden)?;
    op.check_tiles(&device, (slice_rows * op.time.div_ceil(time_parts)).min(SLICE + op.time % SLICE))?;
    let (lengths, resets) = words(&device, args.lengths, args.resets)?;
    if all == 0 {
        return Ok(());
    }
    let chunks = op.chunks(&device)?;
    let nothing = match args.grad_x {
        Some(_) => None,
        None => Some(View::from(&device.zeros_as("no grad_x", stored, 1)?)),
    };
    for chunk in &chunks {
        let models = chunk.models.end - chunk.models.start;
        let (m0, rows) = (chunk.models.start, chunk.rows.clone());
        let shared = op.x_models == 1 && models > 1;
        let whole = whole && rows == (0..op.batch);
        let (count, first) = (models * (rows.end - rows.start), m0 * op.batch + rows.start);
        let slice0 = rows.start / slice_rows * time_parts;
        let p = RecurrentParams {
            models: models as u32,
            rows: count as u32,
            row0: rows.start as u32,
            slice0: slice0 as u32,
            slice_count: ((rows.end.div_ceil(slice_rows) * time_parts) - slice0) as u32,
            ..op.params(flags | if shared { flag::X_SHARED } else { 0 })
        };
        let of_models = |each: u64| m0 * each..(m0 + models) * each;
        let of_rows = |each: u64| first * each..(first + count) * each;
        let region = models * op.batch * op.hidden;
        let sums = pass.input(args.scratch[1], 0..4 * region + 2 * models * op.hidden + slices * models * op.weights())?;
        let gates = pass.input(args.scratch[0], 0..count * op.time * 4 * op.hidden)?;
        for (from, which) in [(args.grad_hn, 0), (args.grad_cn, 1)] {
            if let Some(from) = from {
                copy(pass, (from, first * op.hidden), (&sums, which * region + rows.start * op.hidden), count * op.hidden)?;
            }
        }
        let w_ih = pass.input(args.w_ih, of_models(g * op.inputs))?;
        let w_hh = pass.input(args.w_hh, of_models(g * op.hidden))?;
        let x = pass.input(args.x, x_range(op, chunk, shared))?;
        let saved = pass.input(args.saved, of_rows(op.time * op.width()))?;
        let grad_x = match (args.grad_x, &nothing) {
            (Some(view), _) => Bound::new(pass, view, of_rows(op.time * op.inputs))?,
            (None, Some(view)) => Bound { view: view.clone(), target: None },
            (None, None) => return Err(Error::Internal("recurrent_backward: no place for grad_x".into())),
        };
        let grad_y = match args.grad_y {
            Some(view) => pass.input(view, of_rows(op.time * op.y_stride))?,
            None => w_hh.clone(),
        };
        let b_ih = pass.input(args.b_ih.unwrap_or(args.w_ih), of_models(if args.b_ih.is_some() { g } else { 0 }))?;
        let b_hh = pass.input(args.b_hh.unwrap_or(args.w_ih), of_models(if args.b_hh.is_some() { g } else { 0 }))?;
        if whole {
            let inputs = [x, saved, w_ih, w_hh, b_ih, b_hh, lengths.clone(), resets.clone(), grad_y];
            let outputs = [grad_x.view.clone(), sums.clone()];
            pass.launch(&RECURRENT_BACKWARD_MODELS, &p, &[&inputs[..], &outputs[..]].concat())?;
        } else {
            if op.keep == Keep::States && op.time > 0 {
                let args = [x.clone(), saved.clone(), w_ih.clone(), w_hh.clone(), b_ih, b_hh, gates.clone()];
                pass.launch(in_storage(&STORED, &RECURRENT_GATES, stored)?, &p, &args)?;
            }
            let kernel = match (lstm, blocks) {
                (true, false) => &LSTM_BACKWARD,
                (true, true) => &LSTM_BACKWARD_BLOCKS,
                (false, false) => &GRU_BACKWARD,
                (false, true) => &GRU_BACKWARD_BLOCKS,
            };
            let kernel = in_storage(&STORED, kernel, stored)?;
            let none: Vec<Range<u64>> = std::iter::once(0..0).collect();
            for run in if op.time == 0 { &none } else { &runs }.iter().rev() {
                let p = RecurrentParams { from_step: run.start as u32, to_step: run.end as u32, ..p };
                pass.launch(kernel, &p, &[saved.clone(), w_hh.clone(), lengths.clone(), resets.clone(), grad_y.clone(), gates.clone(), sums.clone()])?;
            }
            if wanted || (args.grad_x.is_some() && op.time > 0) {
                let kernel = if blocks { &RECURRENT_GRADIENTS_BLOCKS } else { in_storage(&STORED, &RECURRENT_GRADIENTS, stored)? };
                pass.launch(kernel, &p, &[x, saved, lengths.clone(), w_ih, gates, grad_x.view.clone(), sums.clone()])?;
            }
        }
        grad_x.finish(pass)?;
        if rows.end < op.batch {
            // The model's other sequences follow.
            continue;
        }
        let learned = op.learned_start && (args.grad_h0.is_some() || args.grad_c0.is_some());
        if learned || (wanted && slices > 1) {
            pass.launch(&RECURRENT_REDUCE, &p, std::slice::from_ref(&sums))?;
        }
        let each = if op.learned_start { op.hidden } else { op.batch * op.hidden };
        for (to, which) in [(args.grad_h0, 0), (args.grad_c0, 1)] {
            if let Some(to) = to {
                let from = if op.learned_start { 4 * region + which * models * op.hidden } else { (2 + which) * region };
                copy(pass, (&sums, from), (to, m0 * each), models * each)?;
            }
        }
        let begin = 4 * region + 2 * models * op.hidden;
        let parts = p.parts().map(|at| begin + at as u64);
        for ((to, from), each) in weights.into_iter().zip(parts).zip([g * op.inputs, g * op.hidden, g, g]) {
            if let Some(to) = to {
                copy(pass, (&sums, from), (to, m0 * each), models * each)?;
            }
        }
    }
    Ok(())
}

// ---- conformance ------------------------------------------------------------------------------------------------------------

fn verify(device: &Device, case: &Case, cell: Cell) -> Result<Outputs> {
    let op = if cell == Cell::Gru { "gru" } else { "lstm" };
    let wrong = |arg: &str, expected: &str| Error::Shape { op, arg: arg.into(), expected: expected.into(), got: format!("{:?}", case.shape(arg)) };
    let &[x_models, batch, time, inputs] = case.shape("x")? else { return Err(wrong("x", "[M,B,T,I]")) };
    let &[models, _, hidden] = case.shape("w_hh")? else { return Err(wrong("w_hh", "[M,G,H]")) };
    let [x_models, models, batch, time, inputs, hidden] = [x_models, models, batch, time, inputs, hidden].map(|x| x as u64);
    let learned_start = case.has("h0") && case.shape("h0")?.len() == 2;
    let layer = Recurrent { x_models, learned_start, ..Recurrent::new(cell, models, batch, time, inputs, hidden) };
    layer.check()?;
    let upload = |name: &str| -> Result<Option<View>> { if case.has(name) { Ok(Some(View::from(&device.upload(name, case.f32(name)?)?))) } else { Ok(None) } };
    let upload_words =
        |name: &str| -> Result<Option<View>> { if case.has(name) { Ok(Some(View::from(&device.upload_u32(name, case.u32(name)?)?))) } else { Ok(None) } };
    let need = |name: &str| -> Result<View> { Ok(View::from(&device.upload(name, case.f32(name)?)?)) };
    let zeros = |name: &str, len: u64| -> Result<View> { Ok(View::from(&device.zeros(name, len)?)) };
    let (x, w_ih, w_hh) = (need("x")?, need("w_ih")?, need("w_hh")?);
    let (b_ih, b_hh) = if cell == Cell::Gru { (upload("b_ih")?, upload("b_hh")?) } else { (upload("bias")?, None) };
    let (h0, c0, lengths, resets) = (upload("h0")?, upload("c0")?, upload_words("lengths")?, upload_words("resets")?);
    let all = models * batch;
    let (y, hn, cn) = (zeros("y", all * time * hidden)?, zeros("hn", all * hidden)?, zeros("cn", all * hidden)?);
    let saved = zeros("saved", layer.saved())?;
    let scratch = [zeros("packed", layer.scratch()[0])?, zeros("state", layer.scratch()[1])?];
    let mut pass = device.pass(op);
    let forward = RecurrentArgs {
        x: &x,
        w_ih: &w_ih,
        w_hh: &w_hh,
        b_ih: b_ih.as_ref(),
        b_hh: b_hh.as_ref(),
        h0: h0.as_ref(),
        c0: c0.as_ref(),
        lengths: lengths.as_ref(),
        resets: resets.as_ref(),
        y: &y,
        hn: Some(&hn),
        cn: (cell == Cell::Lstm).then_some(&cn),
        saved: &saved,
        scratch: [&scratch[0], &scratch[1]],
    };
    recurrent(&mut pass, &layer, &forward)?;
    let mut results = vec![("y", pass.read(&y)?), ("hn", pass.read(&hn)?)];
    if cell == Cell::Lstm {
        results.push(("cn", pass.read(&cn)?));
    }
    let (grad_y, grad_hn, grad_cn) = (upload("grad_y")?, upload("grad_hn")?, upload("grad_cn")?);
    if grad_y.is_some() || grad_hn.is_some() || grad_cn.is_some() {
        let like = |name: &'static str, view: Option<&View>| -> Result<Option<(&'static str, View)>> {
            view.map(|view| Ok((name, View::from(&device.zeros(name, view.len())?)))).transpose()
        };
        let bias = if cell == Cell::Gru { "grad_b_ih" } else { "grad_bias" };
        let own_x = (x_models == models).then_some(&x);
        let grads = [
            like("grad_x", own_x)?,
            like("grad_w_ih", Some(&w_ih))?,
            like("grad_w_hh", Some(&w_hh))?,
            like(bias, b_ih.as_ref())?,
            like("grad_b_hh", b_hh.as_ref())?,
            like("grad_h0", h0.as_ref())?,
            like("grad_c0", c0.as_ref())?,
        ];
        let [grad_x, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh, grad_h0, grad_c0] = grads.each_ref().map(|grad| grad.as_ref().map(|(_, view)| view));
        let scratch = [zeros("gates", layer.scratch_backward()[0])?, zeros("sums", layer.scratch_backward()[1])?];
        let backward = RecurrentGrads {
            x: &x,
            w_ih: &w_ih,
            w_hh: &w_hh,
            b_ih: b_ih.as_ref(),
            b_hh: b_hh.as_ref(),
            lengths: lengths.as_ref(),
            resets: resets.as_ref(),
            saved: &saved,
            grad_y: grad_y.as_ref(),
            grad_hn: grad_hn.as_ref(),
            grad_cn: grad_cn.as_ref(),
            grad_x,
            grad_w_ih,
            grad_w_hh,
            grad_b_ih,
            grad_b_hh,
            grad_h0,
            grad_c0,
            scratch: [&scratch[0], &scratch[1]],
        };
        recurrent_backward(&mut pass, &layer, &backward)?;
        for (name, view) in grads.iter().flatten() {
            results.push((name, pass.read(view)?));
        }
    }
    let mut outputs = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    for (name, read) in results {
        outputs.reals(name, done.f64(read)?);
    }
    Ok(outputs)
}

/// Conformance binding of `lstm`.
pub fn verify_lstm(device: &Device, case: &Case) -> Result<Outputs> {
    verify(device, case, Cell::Lstm)
}

/// Conformance binding of `gru`.
pub fn verify_gru(device: &Device, case: &Case) -> Result<Outputs> {
    verify(device, case, Cell::Gru)
}
