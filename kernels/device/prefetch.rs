//! Cache hints of the CPU column: lines asked for some steps before they are used. Results do not depend on them.
//!
//! Why: a backward pass runs through what was kept from the last step to the first, sequences apart by a whole sequence; the processor's own
//! prefetchers do not follow that, and every first access waits for memory (a quarter of an LSTM's training step at H 16).

/// Reals of a cache line.
const LINE: usize = 16;

/// Asks for the lines of `x`, to be read.
#[inline(always)]
pub(crate) fn prefetch(x: &[f32]) {
    for at in (0..x.len()).step_by(LINE) {
        line(&x[at]);
    }
}

#[inline(always)]
#[cfg(target_arch = "x86_64")]
fn line(x: &f32) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a hint without effect on memory, of an address that is valid; SSE, which it needs, is part of x86-64.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(x).cast()) }
}

#[inline(always)]
#[cfg(not(target_arch = "x86_64"))]
fn line(_: &f32) {}
