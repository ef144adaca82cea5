//! What the tests of the small tensor ops share.

#![allow(dead_code, reason = "each module uses a part")]

use forback::kernels::map::{Dims, RANK};
use forback::kernels::{Device, Error, OpenOptions, Pass, Result, Schedule, View};

/// Opens a device; one that `FORBACK_REQUIRE` lists must be there.
pub(crate) fn open_with(spec: &str, options: &OpenOptions) -> Option<Device> {
    let required = std::env::var("FORBACK_REQUIRE").unwrap_or_default();
    match Device::open_with(spec, options) {
        Ok(device) => Some(device),
        Err(Error::NoDevice { .. }) if !required.split(',').any(|name| name.trim() == spec) => None,
        Err(error) => panic!("{spec}: {error}"),
    }
}

/// `reference`.
pub(crate) fn reference() -> Device {
    Device::open("reference").unwrap()
}

/// Every other device, wgpu with and without checks, cuda-host in two orders.
pub(crate) fn devices() -> Vec<Device> {
    let plain = OpenOptions::default();
    [
        ("cpu", plain.clone()),
        ("wgpu", OpenOptions { checked: Some(false), ..plain.clone() }),
        ("wgpu", OpenOptions { checked: Some(true), ..plain.clone() }),
        ("cuda-host", OpenOptions { schedule: Some(Schedule::Forward), ..plain.clone() }),
        ("cuda-host", OpenOptions { schedule: Some(Schedule::Reverse), ..plain.clone() }),
        ("cuda", plain),
    ]
    .iter()
    .filter_map(|(spec, options)| open_with(spec, options))
    .collect()
}

/// Numbers around 0, a few of them large.
pub(crate) fn values(n: usize, seed: u32) -> Vec<f32> {
    (0..n)
        .map(|i| {
            let word = forback::kernels::philox::philox4x32([i as u32, 1, 2, 3], [seed, 77]);
            let z = forback::kernels::philox::normals(word)[0] as f32;
            if i % 29 == 5 { 3.0 * z } else { z }
        })
        .collect()
}

pub(crate) fn up(device: &Device, x: &[f32]) -> View {
    View::from(&device.upload("x", x).unwrap())
}

pub(crate) fn words(device: &Device, x: &[u32]) -> View {
    View::from(&device.upload_u32("words", x).unwrap())
}

pub(crate) fn zeros(device: &Device, n: usize) -> View {
    // What an op does not write shows.
    View::from(&device.upload("zeros", &vec![77.0; n]).unwrap())
}

/// Runs what `record` records and returns the reals of `of`.
#[track_caller]
pub(crate) fn go(device: &Device, of: &View, record: impl FnOnce(&mut Pass) -> Result<()>) -> Vec<f64> {
    let mut pass = device.pass("test");
    record(&mut pass).unwrap();
    let read = pass.read(of).unwrap();
    pass.submit().unwrap().f64(read).unwrap()
}

#[track_caller]
pub(crate) fn near(got: f64, want: f64, rtol: f64) {
    assert!((got - want).abs() <= rtol * want.abs().max(1e-3), "got {got:e}, expected {want:e}");
}

#[track_caller]
pub(crate) fn close(what: &str, got: &[f64], want: &[f64], rtol: f64, atol: f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= atol + rtol * w.abs(), "{what}[{i}]: got {g:e}, expected {w:e}");
    }
}

/// x with element i moved down and up by about h, and the distance between the two as they are held.
pub(crate) fn around(x: &[f32], i: usize, h: f32) -> (Vec<f32>, Vec<f32>, f64) {
    let (mut low, mut high) = (x.to_vec(), x.to_vec());
    low[i] -= h;
    high[i] += h;
    let distance = f64::from(high[i]) - f64::from(low[i]);
    (low, high, distance)
}

/// Compares a gradient with central differences of Σ g·f(x).
#[track_caller]
pub(crate) fn gradient_is(what: &str, x: &[f32], grad: &[f64], g: &[f32], f: impl Fn(&[f32]) -> Vec<f64>) {
    assert_eq!(x.len(), grad.len(), "{what}: lengths");
    for i in 0..x.len() {
        let (low, high, h) = around(x, i, 1e-3);
        let slope: f64 = f(&high).iter().zip(f(&low)).zip(g).map(|((a, b), &g)| (a - b) / h * f64::from(g)).sum();
        assert!((grad[i] - slope).abs() <= 3e-5 * (1.0 + slope.abs()), "{what}: gradient [{i}] is {}, differences give {slope}", grad[i]);
    }
}

/// Every index of a shape in row-major order.
pub(crate) fn indices(dims: &Dims) -> impl Iterator<Item = Dims> + use<> {
    let dims = *dims;
    (0..dims.iter().product::<u64>()).map(move |mut i| {
        let mut index = [0; RANK];
        for d in (0..RANK).rev() {
            index[d] = i % dims[d];
            i /= dims[d];
        }
        index
    })
}
