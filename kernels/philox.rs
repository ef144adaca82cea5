//! Counter-based random numbers: Philox4x32-10, bits equal on every device.
//!
//! Ten rounds of  (c0, c1, c2, c3) ← (hi(M1·c2) ⊕ c1 ⊕ k0, lo(M1·c2), hi(M0·c0) ⊕ c3 ⊕ k1, lo(M0·c0)),  k0 += W0, k1 += W1.
//! uniform = ((bits >> 8) + ½)·2⁻²⁴, inside (0, 1) (in f32 the largest of 2²⁴ rounds to 1); normals by Box-Muller: n0 = r(u0)·cos 2πu1, n1 = r(u0)·sin 2πu1,
//! n2 = r(u2)·cos 2πu3, n3 = r(u2)·sin 2πu3,  r(u) = √(−2 ln u).
//!
//! Shapes   counter, bits [N,4] u32; key [N,2] u32; uniform, normal [N,4].
//! Launch   one thread per row.     Scratch none.
//! Floor    72 bytes and about 220 instructions per row: bound by memory on a GPU.
//! Numerics the shaders' logarithm, sine and cosine are their own series (Vulkan leaves the built-in ones loose): normals within
//!          1e-6 of f64, also where u is next to 1.
//! Source   Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"; vectors of Random123.
//! Files    shaders/philox.wgsl · cuda/philox.cu · reference: `philox_cpu`

use crate::conformance::{Case, Outputs};
use crate::device::{Buffer, Device, Pass};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads_u32, writes, writes_u32};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;

params! {
    /// Params of [`PHILOX`].
    pub struct PhiloxParams {
        /// Rows.
        n: u32,
    }
}

/// Threads per workgroup.
const WG: u32 = 64;

fn rows(words: &[u32]) -> u64 {
    params_of::<PhiloxParams>(words).map_or(0, |p| u64::from(p.n))
}

/// Bits, uniforms and normals of N counters.
pub static PHILOX: Kernel = Kernel {
    name: "philox",
    about: "counter-based random bits, uniforms and normals",
    args: &[reads_u32("counter"), reads_u32("key"), writes_u32("bits"), writes("uniforms"), writes("normal")],
    params: layout::<PhiloxParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| rows(words).div_ceil(u64::from(WG)),
    wgsl: wgsl!("philox"),
    cuda: cuda!("philox"),
    cpu: Some(Cpu { f32: philox_cpu::<f32>, f64: philox_cpu::<f64> }),
    cost: Cost { unit: "row", units: rows, bytes: 72.0, flops: 220.0 },
};

/// The four words of a counter under a key.
pub fn philox4x32(mut c: [u32; 4], mut k: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let (a, b) = (u64::from(c[0]) * 0xD251_1F53, u64::from(c[2]) * 0xCD9E_8D57);
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// A word as a uniform in (0, 1).
pub fn uniform(bits: u32) -> f64 {
    (f64::from(bits >> 8) + 0.5) / 16_777_216.0
}

/// Four words as four standard normals.
pub fn normals(bits: [u32; 4]) -> [f64; 4] {
    let pair = |a: u32, b: u32| {
        let (radius, angle) = ((-2.0 * uniform(a).ln()).sqrt(), std::f64::consts::TAU * uniform(b));
        (radius * angle.cos(), radius * angle.sin())
    };
    let ((n0, n1), (n2, n3)) = (pair(bits[0], bits[1]), pair(bits[2], bits[3]));
    [n0, n1, n2, n3]
}

fn philox_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: PhiloxParams = launch.params()?;
    let n = p.n as usize;
    let (counter, key) = (&launch.word()?[..4 * n], &launch.word()?[..2 * n]);
    let (bits, uniforms, normal) = (&mut launch.word_mut()?[..4 * n], &mut launch.real_mut()?[..4 * n], &mut launch.real_mut()?[..4 * n]);
    let rows = counter.par_chunks_exact(4).zip(key.par_chunks_exact(2));
    let outs = bits.par_chunks_exact_mut(4).zip(uniforms.par_chunks_exact_mut(4)).zip(normal.par_chunks_exact_mut(4));
    rows.zip(outs).for_each(|((c, k), ((b, u), z))| {
        let words = philox4x32([c[0], c[1], c[2], c[3]], [k[0], k[1]]);
        b.copy_from_slice(&words);
        for i in 0..4 {
            u[i] = R::of(uniform(words[i]));
            z[i] = R::of(normals(words)[i]);
        }
    });
    Ok(())
}

/// Results of [`philox`].
#[derive(Debug, Clone)]
pub struct Philox {
    /// Random words [N,4].
    pub bits: Buffer,
    /// Uniforms in (0, 1) [N,4].
    pub uniform: Buffer,
    /// Standard normals [N,4].
    pub normal: Buffer,
}

/// Records Philox4x32-10 of `counter` [N,4] under `key` [N,2].
/// # Errors
/// `Shape` if the lengths do not match.
pub fn philox(pass: &mut Pass, counter: &Buffer, key: &Buffer) -> Result<Philox> {
    let n = counter.len() / 4;
    if counter.len() != 4 * n || key.len() != 2 * n {
        let got = format!("{} and {} words", counter.len(), key.len());
        return Err(Error::Shape { op: "philox", arg: "counter, key".into(), expected: "[N,4] and [N,2]".into(), got });
    }
    let device = pass.device().clone();
    let out = Philox { bits: device.zeros_u32("bits", 4 * n)?, uniform: device.zeros("uniform", 4 * n)?, normal: device.zeros("normal", 4 * n)? };
    for run in device.plan("philox", n, 4, 1, 220)? {
        let (r4, r2) = (4 * run.start..4 * run.end, 2 * run.start..2 * run.end);
        let (c, k) = (pass.input(counter, r4.clone())?, pass.input(key, r2)?);
        let (b, u, z) = (pass.output(&out.bits, r4.clone())?, pass.output(&out.uniform, r4.clone())?, pass.output(&out.normal, r4)?);
        let params = PhiloxParams { n: (run.end - run.start) as u32 };
        pass.launch(&PHILOX, &params, &[c, k, b.view.clone(), u.view.clone(), z.view.clone()])?;
        for output in [b, u, z] {
            pass.finish(output)?;
        }
    }
    Ok(out)
}

/// Conformance binding.
pub(crate) fn verify(device: &Device, case: &Case) -> Result<Outputs> {
    let (counter, key) = (device.upload_u32("counter", case.u32("counter")?)?, device.upload_u32("key", case.u32("key")?)?);
    let mut pass = device.pass("philox");
    let out = philox(&mut pass, &counter, &key)?;
    let (bits, uniform, normal) = (pass.read(&out.bits)?, pass.read(&out.uniform)?, pass.read(&out.normal)?);
    let mut outputs = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    outputs.words("bits", done.u32(bits)?);
    outputs.reals("uniform", done.f64(uniform)?);
    outputs.reals("normal", done.f64(normal)?);
    Ok(outputs)
}
