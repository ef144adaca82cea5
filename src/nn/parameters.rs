//! Named parameters of M models, in one buffer.
//!
//! Layout   tensor after tensor, each [M, …] and starting at a multiple of 64 elements; gradients, moments and averages lie the same way, so
//!          that one launch of the optimiser walks all of them.
//! Random   Philox keyed by seed, model, tensor and element: model m starts the same whatever M is, and on every device.
//! Files    safetensors of one model (no leading M), or of all.

use crate::kernels::optimiser::Tensor as Segment;
use crate::kernels::philox::{normals, philox4x32, uniform};
use crate::kernels::{Buffer, View};
use crate::tape::{Tape, Var};
use crate::{Device, Error, Result};
use std::collections::HashMap;

/// How a tensor starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// One value everywhere.
    Constant(f32),
    /// Uniform between −bound and bound.
    Uniform(f32),
    /// Normal with mean 0 and this standard deviation.
    Normal(f32),
}

impl Init {
    /// Uniform within ±1/√n, as PyTorch starts recurrent and linear layers with n inputs.
    pub fn fan_in(n: usize) -> Init {
        Init::Uniform(1.0 / (n.max(1) as f32).sqrt())
    }

    /// Glorot's uniform: ±√(6/(inputs + outputs)).
    pub fn glorot(inputs: usize, outputs: usize) -> Init {
        Init::Uniform((6.0 / (inputs + outputs).max(1) as f32).sqrt())
    }
}

/// One tensor, of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Its name, as in PyTorch's state_dict.
    pub name: String,
    /// Shape without the models' axis.
    pub shape: Vec<usize>,
    /// How it starts.
    pub init: Init,
    /// Whether weight decay applies: to matrices, not to biases and norms.
    pub decay: bool,
}

/// Tensors to be: modules declare theirs here.
#[derive(Debug, Clone, Default)]
pub struct Declared(Vec<Tensor>);

impl Declared {
    /// None yet.
    pub fn new() -> Declared {
        Declared::default()
    }

    /// Adds a tensor; matrices decay, vectors do not.
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize], init: Init) {
        self.0.push(Tensor { name: name.into(), shape: shape.to_vec(), init, decay: shape.len() > 1 });
    }

    /// Adds a tensor that does not decay, whatever its shape.
    pub fn add_undecayed(&mut self, name: impl Into<String>, shape: &[usize], init: Init) {
        self.0.push(Tensor { name: name.into(), shape: shape.to_vec(), init, decay: false });
    }

    /// The tensors, in the order of their declaration.
    pub fn tensors(&self) -> &[Tensor] {
        &self.0
    }

    /// Values of one model.
    pub fn count(&self) -> usize {
        self.0.iter().map(|t| t.shape.iter().product::<usize>()).sum()
    }
}

/// Alignment of a tensor's start, in elements: that of storage bindings everywhere.
const ALIGN: u64 = 64;

/// Parameters of M models on a device.
pub struct Parameters {
    device: Device,
    models: usize,
    tensors: Vec<Tensor>,
    offsets: Vec<u64>,
    by_name: HashMap<String, usize>,
    values: Buffer,
    grads: Buffer,
}

impl Parameters {
    /// Draws the start of M models.
    /// # Errors
    /// `Parameter` for a name that is declared twice or no model; `TooLarge` beyond the device.
    pub fn new(device: &Device, models: usize, declared: &Declared, seed: u64) -> Result<Parameters> {
        if models == 0 {
            return Err(Error::Parameter { op: "parameters", name: "models".into(), value: "0".into(), help: "train at least one model".into() });
        }
        let (mut offsets, mut by_name, mut end) = (Vec::new(), HashMap::new(), 0u64);
        for (i, tensor) in declared.0.iter().enumerate() {
            if by_name.insert(tensor.name.clone(), i).is_some() {
                let help = "give each module a prefix of its own".into();
                return Err(Error::Parameter { op: "parameters", name: "name".into(), value: tensor.name.clone(), help });
            }
            offsets.push(end);
            end = (end + (models * tensor.shape.iter().product::<usize>()) as u64).next_multiple_of(ALIGN);
        }
        let mut start = vec![0f32; end as usize];
        for (i, (tensor, &offset)) in declared.0.iter().zip(&offsets).enumerate() {
            let each = tensor.shape.iter().product::<usize>();
            for m in 0..models {
                let at = offset as usize + m * each;
                draw(tensor.init, seed, m, i, &mut start[at..at + each]);
            }
        }
        let (values, grads) = (device.upload("parameters", &start)?, device.zeros("gradients", end)?);
        Ok(Parameters { device: device.clone(), models, tensors: declared.0.clone(), offsets, by_name, values, grads })
    }

    /// The same tensors with other values, such as averages; gradients are shared.
    /// # Errors
    /// `Shape` for a buffer of another length.
    pub fn with_values(&self, values: Buffer) -> Result<Parameters> {
        if values.len() != self.values.len() {
            let (expected, got) = (format!("{} values", self.values.len()), values.len().to_string());
            return Err(Error::Shape { op: "parameters", arg: "values".into(), expected, got });
        }
        let (device, tensors, offsets, by_name) = (self.device.clone(), self.tensors.clone(), self.offsets.clone(), self.by_name.clone());
        Ok(Parameters { device, models: self.models, tensors, offsets, by_name, values, grads: self.grads.clone() })
    }

    /// M.
    pub fn models(&self) -> usize {
        self.models
    }

    /// The tensors, in the order of their declaration.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// All values, in the layout of this module's head.
    pub fn values(&self) -> &Buffer {
        &self.values
    }

    /// All gradients, likewise.
    pub fn grads(&self) -> &Buffer {
        &self.grads
    }

    /// Where each tensor starts, and its values per model.
    pub fn segments(&self) -> Vec<Segment> {
        let segment = |(&offset, t): (&u64, &Tensor)| Segment { offset, size: t.shape.iter().product::<usize>() as u64 };
        self.offsets.iter().zip(&self.tensors).map(segment).collect()
    }

    /// Values of one model.
    pub fn count(&self) -> usize {
        self.tensors.iter().map(|t| t.shape.iter().product::<usize>()).sum()
    }

    /// 1 for tensors that weight decay applies to, 0 for biases and norms, in the order of their declaration.
    pub fn decay(&self) -> Vec<f32> {
        self.tensors.iter().map(|t| if t.decay { 1.0 } else { 0.0 }).collect()
    }

    /// A tensor as a parameter on a tape: [M, …], its gradient written into [`Parameters::grads`].
    /// # Errors
    /// `Parameter` for a name that is not there.
    pub fn on(&self, tape: &mut Tape, name: &str) -> Result<Var> {
        let i = self.find(name)?;
        let shape: Vec<usize> = std::iter::once(self.models).chain(self.tensors[i].shape.iter().copied()).collect();
        tape.parameter(self.view(&self.values, i), self.view(&self.grads, i), &shape)
    }

    /// Values of a tensor [M, …].
    /// # Errors
    /// `Parameter` for a name that is not there.
    pub fn get(&self, name: &str) -> Result<Vec<f32>> {
        let mut pass = self.device.pass("parameters");
        let read = pass.read(self.view(&self.values, self.find(name)?))?;
        pass.submit()?.f32(read)
    }

    /// Overwrites a tensor [M, …].
    /// # Errors
    /// `Parameter` for a name that is not there; `Shape` for another number of values.
    pub fn set(&self, name: &str, values: &[f32]) -> Result<()> {
        self.device.write(self.view(&self.values, self.find(name)?), values)
    }

    /// Where the gradient of a tensor is [M, …].
    /// # Errors
    /// `Parameter` for a name that is not there.
    pub fn grad(&self, name: &str) -> Result<View> {
        Ok(self.view(&self.grads, self.find(name)?))
    }

    fn find(&self, name: &str) -> Result<usize> {
        self.by_name.get(name).copied().ok_or_else(|| {
            let all: Vec<&str> = self.tensors.iter().map(|t| t.name.as_str()).take(12).collect();
            let help = format!("there are {}: {}{}", self.tensors.len(), all.join(", "), if self.tensors.len() > 12 { ", …" } else { "" });
            Error::Parameter { op: "parameters", name: "name".into(), value: name.into(), help }
        })
    }

    fn view(&self, buffer: &Buffer, i: usize) -> View {
        let len = (self.models * self.tensors[i].shape.iter().product::<usize>()) as u64;
        buffer.view(self.offsets[i]..self.offsets[i] + len)
    }
}

/// Last word of the counters, apart from those of paths and dropout.
const STREAM: u32 = 0x7061_7261;

/// Values of tensor `i` of model `m`.
fn draw(init: Init, seed: u64, m: usize, i: usize, out: &mut [f32]) {
    for (block, values) in out.chunks_mut(4).enumerate() {
        let words = philox4x32([block as u32, m as u32, i as u32, STREAM], [seed as u32, (seed >> 32) as u32]);
        let normal = normals(words);
        for (k, value) in values.iter_mut().enumerate() {
            *value = match init {
                Init::Constant(c) => c,
                Init::Uniform(bound) => (2.0 * uniform(words[k]) - 1.0) as f32 * bound,
                Init::Normal(sd) => normal[k] as f32 * sd,
            };
        }
    }
}
