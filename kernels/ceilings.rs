//! What the machine can do at best, measured by the same means as everything else: the ceilings that `forback bench` compares with.
//!
//! `ceiling_multiply_add`: every thread keeps CHAINS independent chains x ← x·a + b in registers for `rounds` rounds; two
//! instructions (one where fused) per chain and round, nothing else to wait for. The memory ceiling is a buffer copy of a pass.
//!
//! Shapes   out [n·WG].      Launch   n workgroups.      Scratch  none.
//! Floor    itself.
//! Files    shaders/ceilings.wgsl · cuda/ceilings.cu · reference: `ceiling_multiply_add_cpu`

use crate::device::{Device, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, writes};
use crate::real::Real;
use crate::{Error, Result};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::time::Instant;

params! {
    /// Params of [`CEILING_MULTIPLY_ADD`].
    pub struct CeilingParams {
        /// Workgroups.
        n: u32,
        /// Rounds.
        rounds: u32,
        /// Factor of every chain.
        a: f32,
        /// Summand of every chain.
        b: f32,
    }
}

const WG: u32 = 64;
/// Independent chains per thread.
const CHAINS: usize = 16;

fn params(words: &[u32]) -> CeilingParams {
    params_of(words).unwrap_or(bytemuck::Zeroable::zeroed())
}

/// Multiply-adds in registers.
pub static CEILING_MULTIPLY_ADD: Kernel = Kernel {
    name: "ceiling_multiply_add",
    about: "multiply-adds in registers: the arithmetic ceiling",
    args: &[writes("out")],
    params: layout::<CeilingParams>(),
    workgroup: WG,
    constants: &[("CHAINS", CHAINS as u32)],
    groups: |words| u64::from(params(words).n),
    wgsl: wgsl!("ceilings"),
    cuda: cuda!("ceilings"),
    cpu: Some(Cpu { f32: ceiling_multiply_add_lanes, f64: ceiling_multiply_add_cpu::<f64> }),
    cost: Cost {
        unit: "round",
        units: |words| u64::from(params(words).n) * u64::from(params(words).rounds) * u64::from(WG),
        bytes: 0.0,
        flops: 2.0 * CHAINS as f64,
    },
};

fn ceiling_multiply_add_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: CeilingParams = launch.params()?;
    let (a, b) = (R::of(f64::from(p.a)), R::of(f64::from(p.b)));
    launch.real_mut()?.par_chunks_exact_mut(WG as usize).take(p.n as usize).for_each(|out| {
        for (tid, o) in out.iter_mut().enumerate() {
            let mut x: [R; CHAINS] = std::array::from_fn(|i| R::of((tid + i) as f64));
            for _ in 0..p.rounds {
                for v in &mut x {
                    *v = *v * a + b;
                }
            }
            *o = x.into_iter().sum();
        }
    });
    Ok(())
}

/// The same work in the processor's widest vectors, whose lanes are the chains of neighbouring threads.
fn ceiling_multiply_add_lanes(mut launch: CpuLaunch<'_, f32>) -> Result<()> {
    let p: CeilingParams = launch.params()?;
    let arch = Arch::new();
    launch.real_mut()?.par_chunks_exact_mut(WG as usize).take(p.n as usize).for_each(|out| arch.dispatch(Chains { out, p }));
    Ok(())
}

/// One workgroup.
struct Chains<'a> {
    out: &'a mut [f32],
    p: CeilingParams,
}

impl WithSimd for Chains<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (a, b) = (simd.splat_f32s(self.p.a), simd.splat_f32s(self.p.b));
        let tid: [f32; WG as usize] = std::array::from_fn(|i| i as f32);
        for (tid, out) in S::as_simd_f32s(&tid).0.iter().zip(S::as_mut_simd_f32s(self.out).0) {
            let mut x: [S::f32s; CHAINS] = std::array::from_fn(|i| simd.add_f32s(*tid, simd.splat_f32s(i as f32)));
            for _ in 0..self.p.rounds {
                for v in &mut x {
                    *v = simd.add_f32s(simd.mul_f32s(*v, a), b);
                }
            }
            *out = x.into_iter().reduce(|s, v| simd.add_f32s(s, v)).unwrap_or(a);
        }
    }
}

/// Arithmetic instructions per second that the device reaches when nothing else limits it.
pub fn multiply_add_rate(device: &Device) -> Result<f64> {
    let p = CeilingParams { n: 4096, rounds: 512, a: 0.999, b: 1e-3 };
    let out = device.zeros("ceiling", u64::from(p.n * WG))?;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let mut pass = device.pass("ceiling");
        pass.launch(&CEILING_MULTIPLY_ADD, &p, &[View::from(&out)])?;
        let read = pass.read(out.view(0..1))?;
        let start = Instant::now();
        let x = pass.submit()?.f32(read)?;
        best = best.min(start.elapsed().as_secs_f64());
        if !x.first().is_some_and(|v| v.is_finite()) {
            return Err(Error::Internal("the arithmetic ceiling did not compute".into()));
        }
    }
    Ok((CEILING_MULTIPLY_ADD.cost.units)(&[p.n, p.rounds, 0, 0]) as f64 * CEILING_MULTIPLY_ADD.cost.flops / best)
}

/// Bytes per second, read and written, of a copy between two device buffers.
pub fn copy_rate(device: &Device) -> Result<f64> {
    let n: u64 = 8 << 20;
    let (from, to) = (device.zeros("from", n)?, device.zeros("to", n)?);
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let mut pass = device.pass("copy");
        for _ in 0..4 {
            pass.copy(&from, &to)?;
        }
        let start = Instant::now();
        pass.submit()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(4.0 * 8.0 * n as f64 / best)
}
