//! Sums of the partial results that a batch was split into, in the order of the splits: out[m,c] = Σ_s partials[m,s,first+c].
//!
//! Shapes   partials [M,S,W]; out [M,C] with first + C ≤ W.
//! Launch   one thread per output; consecutive threads read consecutive values.
//! Floor    4·S bytes per output.
//! Numerics plain sums of S values in f32, always in the same order: no atomics. S is a few hundred at most.
//! Files    shaders/split_sum.wgsl · cuda/split_sum.cu · reference: `split_sum_cpu`

use crate::Result;
use crate::device::{Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Elem, Kernel, layout, params_of, reads, writes, writes_as};
use crate::real::Real;
use rayon::prelude::*;

params! {
    /// Params of the kernel.
    pub struct SplitSumParams {
        /// Models, or other outer items.
        models: u32,
        /// Splits.
        splits: u32,
        /// Values of a partial.
        width: u32,
        /// First value that is summed …
        first: u32,
        /// … and how many.
        count: u32,
    }
}

const WG: u32 = 128;

fn outputs(words: &[u32]) -> u64 {
    params_of::<SplitSumParams>(words).map_or(0, |p| u64::from(p.models) * u64::from(p.count))
}

/// Sum over splits.
pub static SPLIT_SUM: Kernel = Kernel {
    name: "split_sum",
    about: "sums of partial results in a fixed order",
    args: &[reads("partials"), writes("total")],
    params: layout::<SplitSumParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| outputs(words).div_ceil(u64::from(WG)),
    wgsl: wgsl!("split_sum"),
    cuda: cuda!("split_sum"),
    cpu: Some(Cpu { f32: split_sum_cpu::<f32>, f64: split_sum_cpu::<f64> }),
    cost: Cost { unit: "output", units: outputs, bytes: 8.0, flops: 1.0 },
};

/// Sum over splits, stored in f16.
pub static SPLIT_SUM_F16: Kernel =
    Kernel { name: "split_sum_f16", about: "the same, stored in f16", args: &[reads("partials"), writes_as("total", Elem::F16)], ..SPLIT_SUM };

/// Sum over splits, stored in bf16.
pub static SPLIT_SUM_BF16: Kernel =
    Kernel { name: "split_sum_bf16", about: "the same, stored in bf16", args: &[reads("partials"), writes_as("total", Elem::Bf16)], wgsl: None, ..SPLIT_SUM };

fn split_sum_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: SplitSumParams = launch.params()?;
    let (partials, total) = (launch.real()?, launch.real_mut()?);
    let (splits, width, from, count) = (p.splits as usize, p.width as usize, p.first as usize, p.count as usize);
    // Pieces of a model, so that one model has work for every thread.
    const PIECE: usize = 4096;
    let models = total.par_chunks_exact_mut(count).zip(partials.par_chunks_exact(splits * width));
    models.take(p.models as usize).for_each(|(total, partials)| {
        total.par_chunks_mut(PIECE).enumerate().for_each(|(piece, total)| {
            total.fill(R::ZERO);
            for partial in partials.chunks_exact(width) {
                let partial = &partial[from + piece * PIECE..][..total.len()];
                total.iter_mut().zip(partial).for_each(|(total, &x)| *total += x);
            }
        });
    });
    Ok(())
}

/// Records the sum of partials [M,S,W] into total [M,C]; models that do not fit one launch go in several.
pub fn split_sum(pass: &mut Pass, op: &'static str, params: SplitSumParams, partials: &View, total: &View) -> Result<()> {
    let device = pass.device().clone();
    let (row, count) = (u64::from(params.splits) * u64::from(params.width), u64::from(params.count));
    device.check_rounds(op, u64::from(params.splits), "rounds")?;
    let kernel = match total.elem() {
        Elem::F16 => &SPLIT_SUM_F16,
        Elem::Bf16 => &SPLIT_SUM_BF16,
        _ => &SPLIT_SUM,
    };
    for run in device.plan(op, params.models.into(), row.max(count), count.div_ceil(u64::from(WG)), row)? {
        let from = pass.input(partials, run.start * row..run.end * row)?;
        let to = pass.output(total, run.start * count..run.end * count)?;
        pass.launch(kernel, &SplitSumParams { models: (run.end - run.start) as u32, ..params }, &[from, to.view.clone()])?;
        pass.finish(to)?;
    }
    Ok(())
}
