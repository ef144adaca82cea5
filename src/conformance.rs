//! Conformance files of everything: the ops of the kernels' list, and modules that are made of several ops on a tape.

use crate::kernels::OPS;
use crate::kernels::activation::Activation;
use crate::kernels::conformance::{self as ops, Case, Outputs, Verdict};
use crate::nn::{Declared, EncoderLayer, Module, Parameters};
use crate::ops::AttentionOptions;
use crate::tape::Tape;
use crate::{Device, Error, Result};

type Binding = fn(&Device, &Case) -> Result<Outputs>;

/// Modules with conformance files.
const MODULES: [(&str, Binding); 1] = [("encoder_layer", encoder_layer)];

/// Names of everything that conformance files may be of.
pub fn names() -> impl Iterator<Item = &'static str> {
    OPS.iter().map(|op| op.name).chain(MODULES.iter().map(|(name, _)| *name))
}

/// Runs one case on a device and judges it.
pub fn verify(device: &Device, case: &Case) -> Verdict {
    match MODULES.iter().find(|(name, _)| *name == case.kernel) {
        Some((_, run)) => ops::verify_by(device, case, run),
        None => ops::verify(device, case),
    }
}

fn encoder_layer(device: &Device, case: &Case) -> Result<Outputs> {
    let &[b, t, width] = case.shape("x")? else {
        return Err(Error::Shape { op: "encoder_layer", arg: "x".into(), expected: "[B,T,E]".into(), got: format!("{:?}", case.shape("x")?) });
    };
    let layer = EncoderLayer {
        prefix: String::new(),
        width,
        heads: case.number("heads")? as usize,
        feedforward: case.shape("param.linear1.bias")?.iter().product(),
        activation: Activation::named(case.text("activation")?)?,
        norm_first: case.flag("norm_first"),
    };
    let mut declared = Declared::new();
    layer.declare(&mut declared);
    let parameters = Parameters::new(device, 1, &declared, 0)?;
    for tensor in declared.tensors() {
        parameters.set(&tensor.name, case.f32(&format!("param.{}", tensor.name))?)?;
    }
    let mut tape = Tape::new(device);
    let x = tape.variable(&device.upload("x", case.f32("x")?)?, &[1, b, t, width])?;
    let (mut kv_len, mut valid) = (None, None);
    if case.has("lengths") {
        let lengths = case.u32("lengths")?;
        let inside: Vec<f32> = lengths.iter().flat_map(|&n| (0..t).map(move |i| if i < n as usize { 1.0 } else { 0.0 })).collect();
        kv_len = Some(tape.input(&device.upload_u32("lengths", lengths)?, &[b])?);
        valid = Some(tape.input(&device.upload("valid", &inside)?, &[1, b, t, 1])?);
    }
    let y = layer.forward(&mut tape, &parameters, x, AttentionOptions { kv_len, ..Default::default() }, valid)?;
    let wanted = case.has("grad_y");
    if wanted {
        let grad = tape.input(&device.upload("grad_y", case.f32("grad_y")?)?, &[1, b, t, width])?;
        tape.backward_with(y, grad)?;
    }
    let mut pass = device.pass("encoder_layer");
    let plan = tape.record(&mut pass, &[y])?;
    let mut reads = vec![("y".to_string(), pass.read(plan.view(y)?)?)];
    if wanted {
        reads.push(("grad_x".to_string(), pass.read(plan.grad(x)?)?));
        for tensor in declared.tensors() {
            reads.push((format!("grad.{}", tensor.name), pass.read(parameters.grad(&tensor.name)?)?));
        }
    }
    let mut outputs = Outputs::launched(pass.launches());
    let mut done = pass.submit()?;
    for (name, read) in reads {
        outputs.reals(&name, done.f64(read)?);
    }
    Ok(outputs)
}
