//! Activations that dense kernels fuse into their last step, and their derivatives.
//!
//! relu max(x,0) · gelu x·Φ(x), the exact form by erf · tanh · sigmoid 1/(1+e^−x) · silu x·sigmoid(x).
//! Derivatives: from y for relu, tanh and sigmoid, so that nothing but y is kept; from the pre-activation for gelu and silu.
//! In WGSL and CUDA: `activation`, `activation_slope` of common.wgsl and common.cuh. Numerics: within a few ulp of |x| of the definition.

use crate::lanes;
use crate::real::Real;
use crate::{Error, Result};
use pulp::Simd;

/// What a dense kernel applies to its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Activation {
    /// y = x.
    #[default]
    None,
    /// y = max(x, 0).
    Relu,
    /// y = x·Φ(x).
    Gelu,
    /// y = tanh x.
    Tanh,
    /// y = 1 / (1 + e^−x).
    Sigmoid,
    /// y = x / (1 + e^−x).
    Silu,
}

impl Activation {
    /// All of them; the position is the word that kernels take.
    pub const ALL: [Activation; 6] = [Activation::None, Activation::Relu, Activation::Gelu, Activation::Tanh, Activation::Sigmoid, Activation::Silu];

    /// Its name in files and on the command line.
    pub fn name(self) -> &'static str {
        ["none", "relu", "gelu", "tanh", "sigmoid", "silu"][self as usize]
    }

    /// The activation of that name.
    /// # Errors
    /// `Unknown` with the known names.
    pub fn named(name: &str) -> Result<Activation> {
        Activation::ALL.into_iter().find(|a| a.name() == name).ok_or_else(|| Error::Unknown {
            kind: "activation",
            given: name.into(),
            suggestion: None,
            known: Activation::ALL.iter().map(|a| a.name().to_string()).collect(),
        })
    }

    /// The word that kernels take.
    pub fn word(self) -> u32 {
        self as u32
    }

    /// The activation of a kernel's word.
    pub(crate) fn of_word(word: u32) -> Activation {
        Activation::ALL.get(word as usize).copied().unwrap_or_default()
    }

    /// Whether backward needs the pre-activation; otherwise y suffices.
    pub fn keeps_input(self) -> bool {
        matches!(self, Activation::Gelu | Activation::Silu)
    }

    /// y of the pre-activation x.
    pub fn apply<R: Real>(self, x: R) -> R {
        match self {
            Activation::None => x,
            Activation::Relu if x < R::ZERO => R::ZERO,
            Activation::Relu => x,
            Activation::Gelu => x * x.normal_cdf(),
            Activation::Tanh => x.tanh(),
            Activation::Sigmoid => sigmoid(x),
            Activation::Silu => x * sigmoid(x),
        }
    }

    /// dy/dx from what is kept: y, or x where [`Activation::keeps_input`].
    pub fn slope<R: Real>(self, kept: R) -> R {
        match self {
            Activation::None => R::ONE,
            Activation::Relu if kept > R::ZERO => R::ONE,
            Activation::Relu => R::ZERO,
            Activation::Gelu => kept.normal_cdf() + kept * (R::of(-0.5) * kept * kept).exp() * R::of(0.398_942_280_401_432_7),
            Activation::Tanh => R::ONE - kept * kept,
            Activation::Sigmoid => kept * (R::ONE - kept),
            Activation::Silu => {
                let s = sigmoid(kept);
                s * (R::ONE + kept * (R::ONE - s))
            }
        }
    }

    /// y over lanes.
    #[inline(always)]
    pub(crate) fn apply_lanes<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        match self {
            Activation::None => x,
            Activation::Relu => simd.select_f32s(simd.less_than_f32s(x, simd.splat_f32s(0.0)), simd.splat_f32s(0.0), x),
            Activation::Gelu => simd.mul_f32s(x, lanes::normal_cdf_and_bell(simd, x).0),
            Activation::Tanh => lanes::tanh(simd, x),
            Activation::Sigmoid => lanes::sigmoid(simd, x),
            Activation::Silu => simd.mul_f32s(x, lanes::sigmoid(simd, x)),
        }
    }

    /// dy/dx over lanes.
    #[inline(always)]
    pub(crate) fn slope_lanes<S: Simd>(self, simd: S, kept: S::f32s) -> S::f32s {
        let (zero, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
        match self {
            Activation::None => one,
            Activation::Relu => simd.select_f32s(simd.less_than_f32s(zero, kept), one, zero),
            Activation::Gelu => {
                let (cdf, bell) = lanes::normal_cdf_and_bell(simd, kept);
                simd.mul_add_f32s(simd.mul_f32s(kept, bell), simd.splat_f32s(0.398_942_3), cdf)
            }
            Activation::Tanh => simd.sub_f32s(one, simd.mul_f32s(kept, kept)),
            Activation::Sigmoid => simd.mul_f32s(kept, simd.sub_f32s(one, kept)),
            Activation::Silu => {
                let s = lanes::sigmoid(simd, kept);
                simd.mul_f32s(s, simd.mul_add_f32s(kept, simd.sub_f32s(one, s), one))
            }
        }
    }
}

fn sigmoid<R: Real>(x: R) -> R {
    R::ONE / (R::ONE + (-x).exp())
}

/// y = f(y) in place, with a copy of the pre-activation where it is kept.
#[inline(always)]
pub(crate) fn apply<S: Simd>(simd: S, activation: Activation, y: &mut [f32], kept: Option<&mut [f32]>) {
    if let Some(kept) = kept {
        kept.copy_from_slice(y);
    }
    if activation == Activation::None {
        return;
    }
    let (whole, rest) = S::as_mut_simd_f32s(y);
    for y in whole {
        *y = activation.apply_lanes(simd, *y);
    }
    if !rest.is_empty() {
        let y = activation.apply_lanes(simd, simd.partial_load_f32s(rest));
        simd.partial_store_f32s(rest, y);
    }
}

/// out = grad · f′(kept).
#[inline(always)]
pub(crate) fn pull_back<S: Simd>(simd: S, activation: Activation, grad: &[f32], kept: &[f32], out: &mut [f32]) {
    if activation == Activation::None {
        out.copy_from_slice(grad);
        return;
    }
    let ((grads, grad_rest), (kepts, kept_rest), (outs, rest)) = (S::as_simd_f32s(grad), S::as_simd_f32s(kept), S::as_mut_simd_f32s(out));
    for ((&grad, &kept), out) in grads.iter().zip(kepts).zip(outs) {
        *out = simd.mul_f32s(grad, activation.slope_lanes(simd, kept));
    }
    if !rest.is_empty() {
        let slope = activation.slope_lanes(simd, simd.partial_load_f32s(kept_rest));
        simd.partial_store_f32s(rest, simd.mul_f32s(simd.partial_load_f32s(grad_rest), slope));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
mod tests {
    use super::*;
    use pulp::{Arch, WithSimd};

    struct Both(Activation, Vec<f32>);

    impl WithSimd for Both {
        type Output = (Vec<f32>, Vec<f32>);
        fn with_simd<S: Simd>(self, simd: S) -> (Vec<f32>, Vec<f32>) {
            let (mut y, mut slope) = (self.1.clone(), vec![0.0; self.1.len()]);
            apply(simd, self.0, &mut y, None);
            let kept = if self.0.keeps_input() { &self.1 } else { &y };
            pull_back(simd, self.0, &vec![1.0; kept.len()], kept, &mut slope);
            (y, slope)
        }
    }

    #[test]
    fn lanes_agree_with_the_definition() {
        let x: Vec<f32> = (-2001..2002).map(|i| i as f32 * 0.01).chain([-1e4, -90.0, 90.0, 1e4, 0.0, 1e-6]).collect();
        for activation in Activation::ALL {
            assert_eq!(Activation::named(activation.name()).unwrap(), activation);
            assert_eq!(Activation::of_word(activation.word()), activation);
            let (y, slope) = Arch::new().dispatch(Both(activation, x.clone()));
            for ((&x, &y), &slope) in x.iter().zip(&y).zip(&slope) {
                let want = activation.apply(f64::from(x));
                let kept = if activation.keeps_input() { f64::from(x) } else { want };
                let close = |got: f32, want: f64, atol: f64| (f64::from(got) - want).abs() <= atol + 1e-6 * want.abs();
                assert!(close(y, want, 2e-7), "{activation:?}({x}) = {y}, not {want}");
                assert!(close(slope, activation.slope(kept), 1e-6), "{activation:?}'({x}) = {slope}, not {}", activation.slope(kept));
            }
        }
        assert!(Activation::named("swish").is_err());
    }
}
