//! The tape: tensors and ops in the order of their creation, and from them one pass that computes, differentiates and can be replayed.
//!
//! ```text
//! leaves ──> ops on Vars ──> backward(loss) ──> record(pass) ──> pass.prepare() ──> replay.run(), as often as wanted
//! ```
//!
//! Nothing runs while a tape is built: an op checks its shapes and adds a [`Var`], an index. [`Tape::record`] then plans memory over the
//! forward and the backward sweep together ([`crate::plan`]) and records every launch into a pass, so that a whole training step, with
//! clipping and optimiser behind it, is one submit. Values that a recorded pass reads (batches, parameters, learning rates) are views of
//! buffers; writing those changes what a replay computes.
//!
//! Gradients   of a value that several ops read are summed in the order of the reverse sweep, the same on every run.
//! Models      M, the leading axis of every trainable tensor: a loss of shape [M] is M losses, each with gradient one.
//! No gradient what needs none records no backward step and keeps nothing: see [`Tape::input`], [`Tape::no_grad`], [`Tape::detach`].
//! Checkpoint  [`Tape::checkpoint`] drops the values inside a segment after the forward sweep and computes them again for the backward.
//! Source      Griewank, Walther, Evaluating Derivatives, 2nd ed. 2008, ch. 3 (reverse mode), ch. 12 (checkpoints).

use crate::kernels::kernel::Elem;
use crate::kernels::{Pass, View};
use crate::plan::{Plan, Planner};
use crate::{Device, Error, Result};

/// A tensor of a tape: its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Var(pub(crate) u32);

impl Var {
    pub(crate) fn at(self) -> usize {
        self.0 as usize
    }
}

/// What a forward step of an op binds; outputs are overwritten.
pub struct Forward<'a> {
    /// Inputs, in the op's order; `None` where an optional one is absent.
    pub inputs: &'a [Option<View>],
    /// Outputs, in the op's order.
    pub outputs: &'a [Option<View>],
    /// What backward will need beside inputs and outputs, [`Function::saved`] values.
    pub saved: Option<&'a View>,
    /// Temporary reals, [`Function::scratch`].
    pub scratch: &'a [View],
}

/// What a backward step of an op binds; gradients of inputs are overwritten.
pub struct Backward<'a> {
    /// Inputs; those that [`Function::keeps`] does not name are `None`.
    pub inputs: &'a [Option<View>],
    /// Outputs; likewise.
    pub outputs: &'a [Option<View>],
    /// Gradients of the outputs; `None` is zero.
    pub grad_outputs: &'a [Option<View>],
    /// Gradients of the inputs to compute; `None` is not wanted.
    pub grad_inputs: &'a [Option<View>],
    /// What forward saved.
    pub saved: Option<&'a View>,
    /// Temporary reals, [`Function::scratch_backward`].
    pub scratch: &'a [View],
}

/// Values of an op that must live until its backward step, as bits over inputs and outputs.
#[derive(Debug, Clone, Copy)]
pub struct Keeps {
    /// Bit i: input i.
    pub inputs: u32,
    /// Bit i: output i.
    pub outputs: u32,
}

/// An op on a tape.
pub trait Function {
    /// Its name, as in errors and kernels.
    fn name(&self) -> &'static str;
    /// Shape of each output.
    fn shapes(&self) -> Vec<Vec<usize>>;
    /// What the reals of its inputs are stored in; `None` takes any.
    fn takes(&self) -> Option<Elem> {
        Some(Elem::F32)
    }
    /// What output `i` is stored in.
    fn gives(&self, _: usize) -> Elem {
        self.takes().unwrap_or(Elem::F32)
    }
    /// Temporary values of the backward step in the storage that it takes, a buffer each, behind those of [`Function::scratch_backward`].
    fn stored_scratch_backward(&self) -> Vec<u64> {
        Vec::new()
    }
    /// What forward saves for backward, if it binds a buffer for that: reals or words, and how many.
    fn saved(&self) -> Option<(Elem, u64)> {
        None
    }
    /// Temporary reals of the forward step, a buffer each.
    fn scratch(&self, _: &Device) -> Vec<u64> {
        Vec::new()
    }
    /// Temporary reals of the backward step, a buffer each.
    fn scratch_backward(&self, _: &Device) -> Vec<u64> {
        Vec::new()
    }
    /// What backward reads.
    fn keeps(&self) -> Keeps;
    /// Records the forward step.
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()>;
    /// Records the backward step.
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()>;
}

pub(crate) enum Leaf {
    /// No leaf: the output of a node, or another shape of such a value.
    No,
    /// Read only.
    Input(View),
    /// Read, and its gradient written here; without a view the plan has it.
    Parameter(View, Option<View>),
}

pub(crate) struct Value {
    pub(crate) shape: Vec<usize>,
    pub(crate) elem: Elem,
    pub(crate) leaf: Leaf,
    /// The value whose memory this is: itself, or what it is another shape of.
    pub(crate) root: Var,
    pub(crate) needs_grad: bool,
}

pub(crate) struct Node {
    pub(crate) op: Box<dyn Function>,
    pub(crate) inputs: Vec<Option<Var>>,
    pub(crate) outputs: Vec<Var>,
    pub(crate) needs_grad: bool,
    pub(crate) segment: Option<u32>,
}

/// Tensors and ops, in the order of their creation.
pub struct Tape {
    device: Device,
    pub(crate) values: Vec<Value>,
    pub(crate) nodes: Vec<Node>,
    /// What is differentiated, and the gradient that it starts with (ones where there is none).
    pub(crate) seeds: Vec<(Var, Option<Var>)>,
    segments: u32,
    segment: Option<u32>,
    grad: bool,
}

pub(crate) fn len_of(shape: &[usize]) -> u64 {
    shape.iter().map(|&n| n as u64).product()
}

impl Tape {
    /// An empty tape.
    pub fn new(device: &Device) -> Tape {
        Tape { device: device.clone(), values: Vec::new(), nodes: Vec::new(), seeds: Vec::new(), segments: 0, segment: None, grad: true }
    }

    /// The device that it records for.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// A leaf without gradient: data, masks, lengths (words), learning rates.
    /// # Errors
    /// `Shape` if the view is on another device or has not as many values as the shape.
    pub fn input(&mut self, view: impl Into<View>, shape: &[usize]) -> Result<Var> {
        let view = view.into();
        self.check_leaf("input", &view, shape)?;
        Ok(self.push(shape, view.elem(), Leaf::Input(view), false))
    }

    /// A leaf with a gradient, which [`Plan::grad`] has after recording.
    /// # Errors
    /// As for [`Tape::input`]; `Shape` for words, which have no gradient.
    pub fn variable(&mut self, view: impl Into<View>, shape: &[usize]) -> Result<Var> {
        let view = view.into();
        self.check_leaf("variable", &view, shape)?;
        reals("variable", view.elem())?;
        Ok(self.push(shape, Elem::F32, Leaf::Parameter(view, None), true))
    }

    /// A leaf whose gradient is written into `grad` by every run: a parameter. Where nothing depends on it, zeros are.
    /// # Errors
    /// As for [`Tape::variable`].
    pub fn parameter(&mut self, view: impl Into<View>, grad: impl Into<View>, shape: &[usize]) -> Result<Var> {
        let (view, grad) = (view.into(), grad.into());
        for each in [&view, &grad] {
            self.check_leaf("parameter", each, shape)?;
            reals("parameter", each.elem())?;
        }
        Ok(self.push(shape, Elem::F32, Leaf::Parameter(view, Some(grad)), true))
    }

    /// The same values in another shape; copies nothing.
    /// # Errors
    /// `Shape` if the number of values differs.
    pub fn reshape(&mut self, x: Var, shape: &[usize]) -> Result<Var> {
        self.known("reshape", x)?;
        if len_of(shape) != len_of(self.shape(x)) {
            let expected = format!("{} values, as {:?}", len_of(self.shape(x)), self.shape(x));
            return Err(Error::Shape { op: "reshape", arg: "shape".into(), expected, got: format!("{shape:?}") });
        }
        let (root, elem, needs_grad) = (self.values[x.at()].root, self.values[x.at()].elem, self.values[x.at()].needs_grad);
        self.values.push(Value { shape: shape.to_vec(), elem, leaf: Leaf::No, root, needs_grad });
        Ok(Var(self.values.len() as u32 - 1))
    }

    /// The same values without their gradient.
    /// # Errors
    /// `Parameter` for a tensor of another, longer tape.
    pub fn detach(&mut self, x: Var) -> Result<Var> {
        self.known("detach", x)?;
        let (root, elem, shape) = (self.values[x.at()].root, self.values[x.at()].elem, self.shape(x).to_vec());
        self.values.push(Value { shape, elem, leaf: Leaf::No, root, needs_grad: false });
        Ok(Var(self.values.len() as u32 - 1))
    }

    /// Shape of a tensor.
    pub fn shape(&self, x: Var) -> &[usize] {
        self.values.get(x.at()).map_or(&[], |value| &value.shape)
    }

    /// What a tensor is stored in.
    pub fn elem(&self, x: Var) -> Elem {
        self.values.get(x.at()).map_or(Elem::F32, |value| value.elem)
    }

    /// Refuses reals in another storage than `wanted`; words are for the op to check.
    pub(crate) fn stored_in(&self, op: &'static str, arg: &str, x: Option<Var>, wanted: Elem) -> Result<()> {
        match x.map(|x| self.elem(x)) {
            Some(elem) if elem != wanted && (elem.is_half() || wanted.is_half() && elem != Elem::U32) => {
                let (expected, got) = (format!("stored in {}", wanted.wgsl()), format!("{}: cast it", elem.wgsl()));
                Err(Error::Shape { op, arg: arg.into(), expected, got })
            }
            _ => Ok(()),
        }
    }

    /// Whether a gradient flows into it.
    pub fn needs_grad(&self, x: Var) -> bool {
        self.values.get(x.at()).is_some_and(|value| value.needs_grad)
    }

    /// Runs `f`, whose ops keep nothing for a backward sweep.
    pub fn no_grad<T>(&mut self, f: impl FnOnce(&mut Tape) -> T) -> T {
        let before = std::mem::replace(&mut self.grad, false);
        let out = f(self);
        self.grad = before;
        out
    }

    /// Runs `f`, whose values are computed again for the backward sweep instead of kept. Segments do not nest: the outer one counts.
    pub fn checkpoint<T>(&mut self, f: impl FnOnce(&mut Tape) -> T) -> T {
        let outer = self.segment;
        if outer.is_none() {
            self.segment = Some(self.segments);
            self.segments += 1;
        }
        let out = f(self);
        self.segment = outer;
        out
    }

    /// Whether an op on these inputs will have a backward step.
    pub fn records(&self, inputs: &[Option<Var>]) -> bool {
        self.grad && inputs.iter().flatten().any(|x| self.needs_grad(*x))
    }

    /// Adds an op; returns its outputs. For ops of one's own; those of the library are methods of [`Tape`], see [`crate::ops`].
    /// # Errors
    /// `Parameter` for a tensor of another, longer tape; `Shape` for an input in another storage than the op takes, and for a storage
    /// that the device lacks.
    pub fn apply(&mut self, op: impl Function + 'static, inputs: &[Option<Var>]) -> Result<Vec<Var>> {
        for x in inputs.iter().flatten() {
            self.known(op.name(), *x)?;
        }
        if let Some(wanted) = op.takes() {
            for (i, x) in inputs.iter().enumerate() {
                self.stored_in(op.name(), &format!("input {i}"), *x, wanted)?;
            }
        }
        let needs_grad = self.records(inputs);
        let shapes = op.shapes();
        for i in 0..shapes.len() {
            self.device.supports(op.gives(i))?;
        }
        let outputs: Vec<Var> = shapes.iter().enumerate().map(|(i, shape)| self.push(shape, op.gives(i), Leaf::No, needs_grad)).collect();
        self.nodes.push(Node { op: Box::new(op), inputs: inputs.to_vec(), outputs: outputs.clone(), needs_grad, segment: self.segment });
        Ok(outputs)
    }

    /// Asks for the gradients of a loss: one value, or [M], one per model, each with gradient one. Several calls add up.
    /// # Errors
    /// `Shape` for a tensor of more axes (give [`Tape::backward_with`] a gradient), `Parameter` for one that depends on no parameter.
    pub fn backward(&mut self, loss: Var) -> Result<()> {
        if self.shape(loss).len() > 1 && len_of(self.shape(loss)) != 1 {
            let got = format!("{:?}; reduce it, or give backward_with the gradient that it starts with", self.shape(loss));
            return Err(Error::Shape { op: "backward", arg: "loss".into(), expected: "one value, or one per model [M]".into(), got });
        }
        self.stored_in("backward", "loss", Some(loss), Elem::F32)?;
        self.seed(loss, None)
    }

    /// The same from a gradient of the tensor's own shape.
    /// # Errors
    /// `Shape` if the shapes differ; `Parameter` as for [`Tape::backward`].
    pub fn backward_with(&mut self, x: Var, grad: Var) -> Result<()> {
        if self.shape(x) != self.shape(grad) || self.needs_grad(grad) {
            let got = format!("{:?}{}", self.shape(grad), if self.needs_grad(grad) { ", which needs a gradient itself: detach it" } else { "" });
            return Err(Error::Shape { op: "backward", arg: "grad".into(), expected: format!("{:?}", self.shape(x)), got });
        }
        self.stored_in("backward", "grad", Some(grad), self.elem(x))?;
        self.seed(x, Some(grad))
    }

    fn seed(&mut self, x: Var, grad: Option<Var>) -> Result<()> {
        if !self.needs_grad(x) {
            let help = "make a parameter or a variable of a leaf, outside of no_grad and detach".to_string();
            return Err(Error::Parameter { op: "backward", name: "loss".into(), value: "a tensor that depends on no parameter".into(), help });
        }
        for x in [Some(x), grad].into_iter().flatten() {
            self.known("backward", x)?;
        }
        self.seeds.push((x, grad));
        Ok(())
    }

    /// Records everything into a pass, forward and backward; `wanted` are the tensors whose values [`Plan::view`] will have at its end.
    /// # Errors
    /// `TooLarge` if the plan does not fit the device; whatever an op's launches return.
    pub fn record(&self, pass: &mut Pass, wanted: &[Var]) -> Result<Plan> {
        for x in wanted {
            self.known("record", *x)?;
        }
        Planner::new(self, wanted).plan()?.record(self, pass)
    }

    fn known(&self, op: &'static str, x: Var) -> Result<()> {
        if x.at() < self.values.len() {
            return Ok(());
        }
        let help = format!("this tape has {}; a tensor belongs to the tape that made it", self.values.len());
        Err(Error::Parameter { op, name: "tensor".into(), value: x.0.to_string(), help })
    }

    fn push(&mut self, shape: &[usize], elem: Elem, leaf: Leaf, needs_grad: bool) -> Var {
        let root = Var(self.values.len() as u32);
        self.values.push(Value { shape: shape.to_vec(), elem, leaf, root, needs_grad });
        root
    }

    fn check_leaf(&self, op: &'static str, view: &View, shape: &[usize]) -> Result<()> {
        if *view.device() != self.device {
            let (expected, got) = (format!("on {}", self.device.info()), format!("on {}", view.device().info()));
            return Err(Error::Shape { op, arg: "view".into(), expected, got });
        }
        if view.len() != len_of(shape) {
            return Err(Error::Shape { op, arg: "view".into(), expected: format!("{} values for {shape:?}", len_of(shape)), got: view.len().to_string() });
        }
        Ok(())
    }
}

fn reals(op: &'static str, elem: Elem) -> Result<()> {
    if elem == Elem::F32 {
        return Ok(());
    }
    let (expected, got) = match elem {
        Elem::U32 => ("reals: words have no gradient", "words"),
        Elem::F16 => ("f32: masters are not rounded; cast the tensor", "f16"),
        _ => ("f32: masters are not rounded; cast the tensor", "bf16"),
    };
    Err(Error::Shape { op, arg: "view".into(), expected: expected.into(), got: got.into() })
}
