//! Memory of a tape: which values live when, which of them share a buffer, and the launches in order.
//!
//! Every value is a cell with a first and a last step. Steps are the forward sweep, the seeds, the reverse sweep with its sums of
//! gradients, and the repeated forward steps of checkpointed segments. A cell takes the smallest free slot that holds it, else the largest
//! one grows, else a new one is made; slots become buffers only when all of this is decided. Within a step nothing shares.
//!
//! Source   best fit on intervals: Pisarchyk, Lee, Efficient memory management for deep neural net inference, 2020.

use crate::kernels::cast;
use crate::kernels::kernel::Elem;
use crate::kernels::map::{self, Binary, BinaryFunction};
use crate::kernels::{Buffer, Pass, View};
use crate::tape::{Backward, Forward, Leaf, Tape, Var, len_of};
use crate::{Error, Result};
use std::collections::HashMap;

type CellId = usize;

struct Cell {
    elem: Elem,
    len: u64,
    /// Memory that is given: a leaf, the gradient of a parameter.
    fixed: Option<View>,
    first: usize,
    last: usize,
}

enum What {
    Forward(usize),
    Backward(usize),
    /// outputs[0] = inputs[0] + inputs[1].
    Add,
    /// outputs[0] = the number.
    Fill(f32),
}

struct Step {
    what: What,
    inputs: Vec<Option<CellId>>,
    outputs: Vec<Option<CellId>>,
    grad_outputs: Vec<Option<CellId>>,
    grad_inputs: Vec<Option<CellId>>,
    saved: Option<CellId>,
    scratch: Vec<CellId>,
}

impl Step {
    fn small(what: What, inputs: &[CellId], output: CellId) -> Step {
        let inputs = inputs.iter().map(|&c| Some(c)).collect();
        Step { what, inputs, outputs: vec![Some(output)], grad_outputs: Vec::new(), grad_inputs: Vec::new(), saved: None, scratch: Vec::new() }
    }

    fn cells(&self) -> impl Iterator<Item = CellId> {
        let lists = [&self.inputs, &self.outputs, &self.grad_outputs, &self.grad_inputs].into_iter().flatten().flatten();
        lists.copied().chain(self.saved).chain(self.scratch.iter().copied())
    }
}

/// Cells of one run of a node: of the forward sweep, or of its repetition.
#[derive(Default)]
struct Run {
    values: HashMap<Var, CellId>,
    saved: HashMap<usize, CellId>,
}

pub(crate) struct Planner<'a> {
    tape: &'a Tape,
    wanted: &'a [Var],
    cells: Vec<Cell>,
    steps: Vec<Step>,
    first: Run,
    /// Repetitions of the segments that were reached so far.
    again: HashMap<u32, Run>,
    /// Contributions to the gradient of each root, not summed yet.
    grads: HashMap<Var, Vec<CellId>>,
}

/// Cells and steps with their slots.
pub(crate) struct Planned {
    cells: Vec<Cell>,
    steps: Vec<Step>,
    slots: Vec<(Elem, u64)>,
    slot_of: Vec<Option<usize>>,
    values: HashMap<Var, CellId>,
    grads: HashMap<Var, CellId>,
}

impl<'a> Planner<'a> {
    pub(crate) fn new(tape: &'a Tape, wanted: &'a [Var]) -> Planner<'a> {
        Planner { tape, wanted, cells: Vec::new(), steps: Vec::new(), first: Run::default(), again: HashMap::new(), grads: HashMap::new() }
    }

    pub(crate) fn plan(mut self) -> Result<Planned> {
        for (i, value) in self.tape.values.iter().enumerate() {
            if let Leaf::Input(view) | Leaf::Parameter(view, _) = &value.leaf {
                let cell = self.cell(value.elem, view.len(), Some(view.clone()));
                self.first.values.insert(Var(i as u32), cell);
            }
        }
        for node in 0..self.tape.nodes.len() {
            self.forward(node, None);
        }
        if !self.tape.seeds.is_empty() {
            self.reverse();
        }
        let grads = self.finish()?;
        Ok(self.share(grads))
    }

    fn cell(&mut self, elem: Elem, len: u64, fixed: Option<View>) -> CellId {
        self.cells.push(Cell { elem, len, fixed, first: usize::MAX, last: 0 });
        self.cells.len() - 1
    }

    fn root(&self, x: Var) -> Var {
        self.tape.values[x.at()].root
    }

    /// The cell of a value as a node of `segment` sees it.
    fn value(&self, x: Var, segment: Option<u32>) -> Option<CellId> {
        let root = self.root(x);
        let again = segment.and_then(|s| self.again.get(&s)).and_then(|run| run.values.get(&root));
        again.or_else(|| self.first.values.get(&root)).copied()
    }

    fn scratch(&mut self, lens: &[u64]) -> Vec<CellId> {
        lens.iter().map(|&len| self.cell(Elem::F32, len, None)).collect()
    }

    /// A forward step, into the first run or into the repetition of a segment.
    fn forward(&mut self, node: usize, repeat: Option<u32>) {
        let it = &self.tape.nodes[node];
        let inputs = it.inputs.iter().map(|x| x.and_then(|x| self.value(x, repeat))).collect();
        let outputs: Vec<CellId> = it.outputs.iter().map(|&y| self.cell(self.tape.elem(y), len_of(self.tape.shape(y)), None)).collect();
        let saved = it.op.saved().map(|(elem, len)| self.cell(elem, len, None));
        let scratch = self.scratch(&it.op.scratch(self.tape.device()));
        let run = match repeat {
            Some(s) => self.again.entry(s).or_default(),
            None => &mut self.first,
        };
        run.values.extend(it.outputs.iter().copied().zip(outputs.iter().copied()));
        run.saved.extend(saved.map(|cell| (node, cell)));
        let outputs = outputs.into_iter().map(Some).collect();
        self.steps.push(Step { what: What::Forward(node), inputs, outputs, grad_outputs: Vec::new(), grad_inputs: Vec::new(), saved, scratch });
    }

    fn reverse(&mut self) {
        for &(x, grad) in &self.tape.seeds {
            let cell = match grad {
                Some(grad) => self.value(grad, None),
                None => {
                    let cell = self.cell(Elem::F32, len_of(self.tape.shape(x)), None);
                    self.steps.push(Step::small(What::Fill(1.0), &[], cell));
                    Some(cell)
                }
            };
            self.grads.entry(self.root(x)).or_default().extend(cell);
        }
        for node in (0..self.tape.nodes.len()).rev() {
            let it = &self.tape.nodes[node];
            if it.needs_grad && it.outputs.iter().any(|y| self.grads.contains_key(y)) {
                self.repeat(it.segment);
                self.backward(node);
            }
        }
    }

    /// Computes a segment again, when the reverse sweep enters it.
    fn repeat(&mut self, segment: Option<u32>) {
        let Some(s) = segment.filter(|s| !self.again.contains_key(s)) else { return };
        self.again.insert(s, Run::default());
        for node in (0..self.tape.nodes.len()).filter(|&n| self.tape.nodes[n].segment == segment) {
            self.forward(node, Some(s));
        }
    }

    fn backward(&mut self, node: usize) {
        let it = &self.tape.nodes[node];
        let grad_outputs = it.outputs.iter().map(|&y| self.total(y)).collect();
        let keeps = it.op.keeps();
        let kept = |i: usize, bits: u32| bits >> i & 1 == 1;
        let inputs = it.inputs.iter().enumerate().map(|(i, x)| x.filter(|_| kept(i, keeps.inputs)).and_then(|x| self.value(x, it.segment))).collect();
        let outputs = it.outputs.iter().enumerate().map(|(i, &y)| self.value(y, it.segment).filter(|_| kept(i, keeps.outputs))).collect();
        let saved = it.segment.and_then(|s| self.again.get(&s)).unwrap_or(&self.first).saved.get(&node).copied();
        let mut grad_inputs = Vec::with_capacity(it.inputs.len());
        for x in &it.inputs {
            let wanted = x.filter(|x| self.tape.needs_grad(*x));
            let cell = wanted.map(|x| (self.root(x), self.cell(self.tape.elem(x), len_of(self.tape.shape(x)), None)));
            if let Some((root, cell)) = cell {
                self.grads.entry(root).or_default().push(cell);
            }
            grad_inputs.push(cell.map(|(_, cell)| cell));
        }
        let mut scratch = self.scratch(&it.op.scratch_backward(self.tape.device()));
        let stored = it.op.takes().unwrap_or(Elem::F32);
        scratch.extend(it.op.stored_scratch_backward().into_iter().map(|len| self.cell(stored, len, None)));
        self.steps.push(Step { what: What::Backward(node), inputs, outputs, grad_outputs, grad_inputs, saved, scratch });
    }

    /// The sum of all contributions to a gradient.
    fn total(&mut self, root: Var) -> Option<CellId> {
        let cells = self.grads.remove(&root)?;
        let sum = cells.into_iter().reduce(|a, b| {
            let out = self.cell(self.cells[a].elem, self.cells[a].len, None);
            self.steps.push(Step::small(What::Add, &[a, b], out));
            out
        });
        self.grads.insert(root, sum.into_iter().collect());
        sum
    }

    /// Gradients of the leaves, in the memory that they were given; lifetimes of all cells.
    fn finish(&mut self) -> Result<HashMap<Var, CellId>> {
        let mut grads = HashMap::new();
        for (i, value) in self.tape.values.iter().enumerate() {
            let (Leaf::Parameter(_, grad), x) = (&value.leaf, Var(i as u32)) else { continue };
            if self.tape.seeds.is_empty() {
                continue;
            }
            let cell = match self.total(x) {
                // A seed that is an input stays where it is.
                Some(cell) if self.cells[cell].fixed.is_none() => cell,
                Some(_) => {
                    return Err(Error::Parameter {
                        op: "backward",
                        name: "loss".into(),
                        value: "a parameter itself".into(),
                        help: "its gradient is the one given; differentiate what is computed from it".into(),
                    });
                }
                None => {
                    let cell = self.cell(Elem::F32, len_of(&value.shape), None);
                    self.steps.push(Step::small(What::Fill(0.0), &[], cell));
                    cell
                }
            };
            self.cells[cell].fixed.clone_from(grad);
            grads.insert(x, cell);
        }
        for (at, step) in self.steps.iter().enumerate() {
            for cell in step.cells() {
                self.cells[cell].first = self.cells[cell].first.min(at);
                self.cells[cell].last = self.cells[cell].last.max(at);
            }
        }
        let kept = self.wanted.iter().filter_map(|&x| self.value(x, None)).chain(grads.values().copied());
        for cell in kept.collect::<Vec<_>>() {
            self.cells[cell].last = usize::MAX;
        }
        Ok(grads)
    }

    /// Gives every cell a slot.
    fn share(self, grads: HashMap<Var, CellId>) -> Planned {
        let Planner { cells, steps, first, .. } = self;
        let mut starts: Vec<Vec<CellId>> = vec![Vec::new(); steps.len()];
        let mut ends: Vec<Vec<CellId>> = vec![Vec::new(); steps.len()];
        for (id, cell) in cells.iter().enumerate().filter(|(_, c)| c.fixed.is_none() && c.first != usize::MAX) {
            starts[cell.first].push(id);
            if cell.last != usize::MAX {
                ends[cell.last].push(id);
            }
        }
        let (mut slots, mut free): (Vec<(Elem, u64)>, Vec<usize>) = (Vec::new(), Vec::new());
        let mut slot_of = vec![None; cells.len()];
        for (starts, ends) in starts.iter().zip(&ends) {
            for &id in starts {
                let (elem, len) = (cells[id].elem, cells[id].len);
                let fits = free.iter().copied().filter(|&s| slots[s].0 == elem && slots[s].1 >= len).min_by_key(|&s| slots[s].1);
                let slot = fits.or_else(|| free.iter().copied().filter(|&s| slots[s].0 == elem).max_by_key(|&s| slots[s].1)).unwrap_or_else(|| {
                    slots.push((elem, 0));
                    slots.len() - 1
                });
                free.retain(|&s| s != slot);
                slots[slot].1 = slots[slot].1.max(len);
                slot_of[id] = Some(slot);
            }
            free.extend(ends.iter().filter_map(|&id| slot_of[id]));
        }
        Planned { cells, steps, slots, slot_of, values: first.values, grads }
    }
}

impl Planned {
    /// Allocates the slots and records every step.
    pub(crate) fn record(self, tape: &Tape, pass: &mut Pass) -> Result<Plan> {
        let device = tape.device();
        let make = |(i, &(elem, len)): (usize, &(Elem, u64))| device.zeros_as(&format!("tape slot {i}"), elem, len);
        let buffers: Vec<Buffer> = self.slots.iter().enumerate().map(make).collect::<Result<_>>()?;
        let view = |id: CellId| match (&self.cells[id].fixed, self.slot_of[id]) {
            (Some(view), _) => Some(view.clone()),
            (None, slot) => slot.map(|s| buffers[s].view(0..self.cells[id].len)),
        };
        let all = |cells: &[Option<CellId>]| cells.iter().map(|c| c.and_then(&view)).collect::<Vec<_>>();
        for step in &self.steps {
            let (inputs, outputs) = (all(&step.inputs), all(&step.outputs));
            let saved = step.saved.and_then(&view);
            let (saved, scratch) = (saved.as_ref(), &step.scratch.iter().filter_map(|&c| view(c)).collect::<Vec<_>>()[..]);
            match step.what {
                What::Forward(node) => tape.nodes[node].op.forward(pass, &Forward { inputs: &inputs, outputs: &outputs, saved, scratch })?,
                What::Backward(node) => {
                    let (grad_outputs, grad_inputs) = (all(&step.grad_outputs), all(&step.grad_inputs));
                    let io = Backward { inputs: &inputs, outputs: &outputs, grad_outputs: &grad_outputs, grad_inputs: &grad_inputs, saved, scratch };
                    tape.nodes[node].op.backward(pass, &io)?;
                }
                What::Add => {
                    if let ([Some(a), Some(b)], [Some(out)]) = (&inputs[..], &outputs[..]) {
                        if out.elem().is_half() {
                            cast::add(pass, a, b, out)?;
                            continue;
                        }
                        let dims = map::dims(&[out.len()])?;
                        let op = Binary { function: BinaryFunction::Add, a: dims, b: dims };
                        map::binary(pass, &op, a, b, out)?;
                    }
                }
                What::Fill(value) => {
                    if let [Some(out)] = &outputs[..] {
                        map::fill(pass, value, out)?;
                    }
                }
            }
        }
        let find = |cells: &HashMap<Var, CellId>| cells.iter().filter_map(|(&x, &c)| Some((x, view(c)?))).collect();
        let kept: HashMap<Var, CellId> =
            self.values.iter().filter(|(_, c)| self.cells[**c].fixed.is_some() || self.cells[**c].last == usize::MAX).map(|(&x, &c)| (x, c)).collect();
        Ok(Plan {
            values: find(&kept),
            grads: find(&self.grads),
            roots: tape.values.iter().map(|v| v.root).collect(),
            bytes: self.slots.iter().map(|s| s.0.bytes() * s.1).sum(),
            unshared_bytes: self.cells.iter().filter(|c| c.fixed.is_none() && c.first != usize::MAX).map(|c| c.elem.bytes() * c.len).sum(),
        })
    }
}

/// Where the values of a recorded tape are.
pub struct Plan {
    values: HashMap<Var, View>,
    grads: HashMap<Var, View>,
    roots: Vec<Var>,
    /// Bytes of all slots: the peak of everything that the tape makes, leaves apart.
    pub bytes: u64,
    /// What it would be if nothing shared memory.
    pub unshared_bytes: u64,
}

impl Plan {
    /// The values of a leaf, or of a tensor that was `wanted`.
    /// # Errors
    /// `Parameter` for any other tensor: its memory was given to others.
    pub fn view(&self, x: Var) -> Result<View> {
        let help = "name it in the wanted tensors of Tape::record".to_string();
        let missing = || Error::Parameter { op: "plan", name: "view".into(), value: format!("tensor {}", x.0), help };
        self.roots.get(x.at()).and_then(|root| self.values.get(root)).cloned().ok_or_else(missing)
    }

    /// The gradient of a leaf.
    /// # Errors
    /// `Parameter` for a tensor that is no variable or parameter, or where no backward was asked for.
    pub fn grad(&self, x: Var) -> Result<View> {
        let help = "only variables and parameters keep their gradients, and only after Tape::backward".to_string();
        let missing = || Error::Parameter { op: "plan", name: "grad".into(), value: format!("tensor {}", x.0), help };
        self.roots.get(x.at()).and_then(|root| self.grads.get(root)).cloned().ok_or_else(missing)
    }
}
