//! Reals between f32 and a storage of 16 bits: to[i] = scale·from[i]; sums in that storage; copies of halves that start or end inside a word.
//!
//! Shapes   from, other, to [N].
//! Launch   one thread per element; neighbours read and write neighbours.
//! Floor    6 bytes per element, sums too.
//! Numerics the product (or sum) in f32, f64 on `reference`; then to nearest, ties to even: beyond the largest number to infinity, subnormals
//!          kept. From 16 bits is exact. The gradient of a cast is a cast back.
//! Files    shaders/cast.wgsl · cuda/cast.cu · kernels/half.rs for the formats · reference: the `_cpu` functions

use crate::device::{Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Elem, Kernel, layout, params_of, reads, reads_as, writes, writes_as};
use crate::real::Real;
use crate::{Error, Result};
use rayon::prelude::*;

params! {
    /// Params of the kernels.
    pub struct CastParams {
        /// Elements.
        count: u32,
        /// First element of a copy's source …
        from_at: u32,
        /// … and of its target.
        to_at: u32,
        /// Factor of a cast.
        scale: f32,
    }
}

const WG: u32 = 128;

fn count(words: &[u32]) -> u64 {
    params_of::<CastParams>(words).map_or(0, |p| p.count.into())
}

/// f32 to f16.
pub static CAST_TO_F16: Kernel = Kernel {
    name: "cast_to_f16",
    about: "f32 to f16",
    args: &[reads("from"), writes_as("to", Elem::F16)],
    params: layout::<CastParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| count(words).div_ceil(u64::from(WG)),
    wgsl: wgsl!("cast"),
    cuda: cuda!("cast"),
    cpu: Some(Cpu { f32: cast_cpu::<f32>, f64: cast_cpu::<f64> }),
    cost: Cost { unit: "element", units: count, bytes: 6.0, flops: 1.0 },
};

/// f32 to bf16.
pub static CAST_TO_BF16: Kernel =
    Kernel { name: "cast_to_bf16", about: "f32 to bf16", args: &[reads("from"), writes_as("to", Elem::Bf16)], wgsl: None, ..CAST_TO_F16 };

/// f16 to f32.
pub static CAST_FROM_F16: Kernel = Kernel { name: "cast_from_f16", about: "f16 to f32", args: &[reads_as("from", Elem::F16), writes("to")], ..CAST_TO_F16 };

/// bf16 to f32.
pub static CAST_FROM_BF16: Kernel =
    Kernel { name: "cast_from_bf16", about: "bf16 to f32", args: &[reads_as("from", Elem::Bf16), writes("to")], ..CAST_TO_BF16 };

/// Sums of f16.
pub static CAST_ADD_F16: Kernel = Kernel {
    name: "cast_add_f16",
    about: "sums of f16",
    args: &[reads_as("from", Elem::F16), reads_as("other", Elem::F16), writes_as("to", Elem::F16)],
    cpu: Some(Cpu { f32: cast_add_cpu::<f32>, f64: cast_add_cpu::<f64> }),
    ..CAST_TO_F16
};

/// Sums of bf16.
pub static CAST_ADD_BF16: Kernel = Kernel {
    name: "cast_add_bf16",
    about: "sums of bf16",
    args: &[reads_as("from", Elem::Bf16), reads_as("other", Elem::Bf16), writes_as("to", Elem::Bf16)],
    wgsl: None,
    ..CAST_ADD_F16
};

/// Copies of f16 from any element to any element.
pub static CAST_COPY_F16: Kernel = Kernel {
    name: "cast_copy_f16",
    about: "copies of f16 that start or end inside a word",
    args: &[reads_as("from", Elem::F16), writes_as("to", Elem::F16)],
    cpu: Some(Cpu { f32: cast_copy_cpu::<f32>, f64: cast_copy_cpu::<f64> }),
    ..CAST_TO_F16
};

fn cast_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: CastParams = launch.params()?;
    let (from, to, scale) = (launch.real()?, launch.real_mut()?, R::of(f64::from(p.scale)));
    to.par_iter_mut().zip(from).with_min_len(4096).for_each(|(to, &x)| *to = x * scale);
    Ok(())
}

fn cast_add_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let (from, other, to) = (launch.real()?, launch.real()?, launch.real_mut()?);
    to.par_iter_mut().zip(from.par_iter().zip(other)).with_min_len(4096).for_each(|(to, (&a, &b))| *to = a + b);
    Ok(())
}

fn cast_copy_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: CastParams = launch.params()?;
    let (from, to, n) = (launch.real()?, launch.real_mut()?, p.count as usize);
    to[p.to_at as usize..][..n].copy_from_slice(&from[p.from_at as usize..][..n]);
    Ok(())
}

const OP: &str = "cast";
/// Elements of a unit that launches are planned in: starts stay aligned on every device.
const UNIT: u64 = 4096;

fn wrong(arg: &str, expected: String, got: String) -> Error {
    Error::Shape { op: OP, arg: arg.into(), expected, got }
}

/// Records to = scale·from, one of them f32 and the other f16 or bf16.
/// # Errors
/// `Shape` for other element types or lengths that differ.
pub fn cast(pass: &mut Pass, from: &View, to: &View, scale: f32) -> Result<()> {
    let kernel = match (from.elem(), to.elem()) {
        (Elem::F32, Elem::F16) => &CAST_TO_F16,
        (Elem::F32, Elem::Bf16) => &CAST_TO_BF16,
        (Elem::F16, Elem::F32) => &CAST_FROM_F16,
        (Elem::Bf16, Elem::F32) => &CAST_FROM_BF16,
        (a, b) => return Err(wrong("to", "f32 to f16 or bf16, or back".into(), format!("{} to {}", a.wgsl(), b.wgsl()))),
    };
    each_run(pass, kernel, &[from], to, scale)
}

/// Records to = a + b, all f16 or all bf16.
/// # Errors
/// As for [`cast`].
pub fn add(pass: &mut Pass, a: &View, b: &View, to: &View) -> Result<()> {
    let kernel = match (a.elem(), b.elem(), to.elem()) {
        (Elem::F16, Elem::F16, Elem::F16) => &CAST_ADD_F16,
        (Elem::Bf16, Elem::Bf16, Elem::Bf16) => &CAST_ADD_BF16,
        (a, b, to) => return Err(wrong("other", "all f16 or all bf16".into(), format!("{}, {} to {}", a.wgsl(), b.wgsl(), to.wgsl()))),
    };
    each_run(pass, kernel, &[a, b], to, 1.0)
}

fn each_run(pass: &mut Pass, kernel: &'static Kernel, from: &[&View], to: &View, scale: f32) -> Result<()> {
    if let Some(other) = from.iter().find(|view| view.len() != to.len()) {
        return Err(wrong("to", format!("{} values", other.len()), format!("{} values", to.len())));
    }
    for run in pass.device().plan(OP, to.len().div_ceil(UNIT), UNIT, UNIT / u64::from(WG), UNIT)? {
        let range = run.start * UNIT..(run.end * UNIT).min(to.len());
        let mut views = from.iter().map(|view| pass.input(*view, range.clone())).collect::<Result<Vec<_>>>()?;
        let out = pass.output(to, range.clone())?;
        views.push(out.view.clone());
        pass.launch(kernel, &CastParams { count: (range.end - range.start) as u32, from_at: 0, to_at: 0, scale }, &views)?;
        pass.finish(out)?;
    }
    Ok(())
}

/// Records a copy of f16 between equally long ranges of two buffers, wherever they start.
pub(crate) fn copy(pass: &mut Pass, from: &View, to: &View) -> Result<()> {
    let device = pass.device().clone();
    let align = device.align(Elem::F16);
    let most = (device.limits().binding_bytes / 2).saturating_sub(align).clamp(1, 1 << 28);
    for at in (0..from.len()).step_by(most as usize) {
        let count = most.min(from.len() - at);
        // From the aligned element before.
        let bind = |view: &View| {
            let start = view.range.start + at;
            let before = start % align;
            (before as u32, view.buffer.view(start - before..start + count))
        };
        let ((from_at, from), (to_at, to)) = (bind(from), bind(to));
        pass.launch(&CAST_COPY_F16, &CastParams { count: count as u32, from_at, to_at, scale: 1.0 }, &[from, to])?;
    }
    Ok(())
}
