//! What the tests of neural kernels share: devices, random values, comparison, finite differences.

use forback::kernels::{Device, OpenOptions, Schedule, View};

/// Devices that a result is compared on: cpu, wgpu with checks off and on, cuda-host in two schedules. Those that `FORBACK_REQUIRE` does
/// not name may be absent.
pub(crate) fn devices() -> Vec<Device> {
    let required = std::env::var("FORBACK_REQUIRE").unwrap_or_default();
    let options = |checked, schedule| OpenOptions { checked, schedule, ..OpenOptions::default() };
    let wanted = [
        ("cpu", options(None, None)),
        ("wgpu", options(Some(false), None)),
        ("wgpu", options(Some(true), None)),
        ("cuda-host", options(None, Some(Schedule::Forward))),
        ("cuda-host", options(None, Some(Schedule::Reverse))),
    ];
    let mut found = Vec::new();
    for (name, options) in wanted {
        match Device::open_with(name, &options) {
            Ok(device) => found.push(device),
            Err(error) => assert!(!required.split(',').any(|r| r == name), "{name}: {error}"),
        }
    }
    found
}

/// The plain f64 column.
pub(crate) fn reference() -> Device {
    Device::open("reference").unwrap()
}

/// Random values of about ±1, the same for the same seed.
pub(crate) fn values(seed: u64, len: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1234_5678_9ABC_DEF0;
    let mut uniform = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = state;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((x ^ (x >> 31)) >> 40) as f32 / 16_777_216.0 - 0.5
    };
    (0..len).map(|_| uniform() + uniform() + uniform()).collect()
}

/// A view of an uploaded buffer.
pub(crate) fn upload(device: &Device, data: &[f32]) -> View {
    View::from(&device.upload("test", data).unwrap())
}

/// A view of a buffer full of a value that no result has, so that what is not written shows.
pub(crate) fn unwritten(device: &Device, len: u64) -> View {
    upload(device, &vec![12345.0; len as usize])
}

/// Asserts |got − want| ≤ atol + rtol·|want| everywhere.
pub(crate) fn close(what: &str, got: &[f64], want: &[f64], rtol: f64, atol: f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= atol + rtol * w.abs(), "{what}[{i}] = {g:e}, expected {w:e}");
    }
}

/// Asserts that `grad` is the gradient of `value` at `x`, by central differences on the f64 column. f32 uploads leave steps of 2^-10 exact
/// enough; the error of the difference is of third order.
pub(crate) fn is_gradient(what: &str, x: &[f32], grad: &[f64], value: impl Fn(&[f32]) -> f64) {
    assert_eq!(x.len(), grad.len(), "{what}: length");
    let stride = (x.len() / 12).max(1);
    for i in (0..x.len()).step_by(stride) {
        let at = |step: f32| {
            let mut moved = x.to_vec();
            moved[i] += step;
            (f64::from(moved[i]) - f64::from(x[i]), value(&moved))
        };
        let slope = |h: f32| {
            let ((up, high), (down, low)) = (at(h), at(-h));
            (high - low) / (up - down)
        };
        // Richardson: the third-order error cancels.
        let (one, two) = (slope(0.000_976_562_5), slope(0.001_953_125));
        let want = (4.0 * one - two) / 3.0;
        assert!((grad[i] - want).abs() <= 1e-6 * want.abs().max(1.0), "{what}[{i}] = {:e}, finite differences {want:e}", grad[i]);
    }
}

/// Σ weight·x.
pub(crate) fn dot(weight: &[f32], x: &[f64]) -> f64 {
    weight.iter().zip(x).map(|(&w, &x)| f64::from(w) * x).sum()
}
