//! LSTM and GRU layers: one or two directions, stacked.

use super::{need, optional, wrong, zeros};
use crate::kernels::cast;
use crate::kernels::kernel::Elem;
use crate::kernels::map;
use crate::kernels::recurrent::{self, Cell, Keep, Recurrent, RecurrentArgs, RecurrentGrads};
use crate::kernels::reduce::{self, Reduce};
use crate::kernels::{Device, Pass, View};
use crate::tape::{Backward, Forward, Function, Keeps, Tape, Var};
use crate::{Error, Result};

/// Weights of one layer in one direction.
#[derive(Debug, Clone, Copy)]
pub struct Layer {
    /// [M,G,I], G = 4H (i,f,g,o) for an LSTM, 3H (r,z,n) for a GRU.
    pub w_ih: Var,
    /// [M,G,H].
    pub w_hh: Var,
    /// [M,G]: an LSTM's bias, a GRU's of the inputs.
    pub b_ih: Option<Var>,
    /// [M,G]: a GRU's bias of the hidden units.
    pub b_hh: Option<Var>,
    /// Start [M,B,H], or [M,H] where it is learned and shared by the sequences; zero where absent.
    pub h0: Option<Var>,
    /// An LSTM's c at the start, as h0.
    pub c0: Option<Var>,
}

/// What a recurrent layer takes beside its weights.
#[derive(Debug, Clone, Copy, Default)]
pub struct RecurrentOptions {
    /// Valid steps of each sequence, words [B]; y is 0 and the state frozen past them.
    pub lengths: Option<Var>,
    /// Words [B,T], not zero where the state goes back to its start before the step.
    pub resets: Option<Var>,
    /// Compute the gates again in the backward sweep instead of keeping them: a third of the memory.
    pub recompute: bool,
}

/// Results of a recurrent layer.
#[derive(Debug, Clone, Copy)]
pub struct RecurrentOutput {
    /// [M,B,T,H], or [M,B,T,2H] with two directions.
    pub y: Var,
    /// Last h of each direction [M,B,H].
    pub hn: [Option<Var>; 2],
    /// Last c of each direction of an LSTM [M,B,H].
    pub cn: [Option<Var>; 2],
}

/// Inputs of a direction: w_ih, w_hh, b_ih, b_hh, h0, c0; x comes before, lengths and resets after all of them.
const PER: usize = 6;

struct RecurrentOp {
    name: &'static str,
    /// Forward in time; then, if there are two, backward in time.
    directions: Vec<Recurrent>,
    stored: Elem,
    shapes: Vec<Vec<usize>>,
}

impl RecurrentOp {
    fn at(&self, direction: usize) -> usize {
        1 + direction * PER
    }

    fn words(&self) -> usize {
        1 + self.directions.len() * PER
    }

    /// hn and cn of a direction among the outputs.
    fn states(&self, direction: usize) -> [usize; 2] {
        [1 + 2 * direction, 2 + 2 * direction]
    }

    fn lstm(&self) -> bool {
        self.directions[0].cell == Cell::Lstm
    }

    /// From one direction's part of `saved` to the next: aligned for every device.
    fn part(&self) -> u64 {
        self.directions[0].saved().next_multiple_of(64)
    }

    /// Values of x of every model.
    fn all_x(&self) -> u64 {
        let op = &self.directions[0];
        op.models * op.batch * op.time * op.inputs
    }

    /// The sum over the models that share x; none where each has its own.
    fn sum_of_models(&self) -> Option<Reduce> {
        let op = &self.directions[0];
        let shared = op.x_models < op.models && op.models > 0;
        shared.then(|| Reduce::over(&[op.models, self.all_x() / op.models], &[0]).ok()).flatten()
    }

    /// The part of `saved` that a direction has.
    fn saved_of(&self, saved: &View, direction: usize) -> View {
        let (each, from) = (self.directions[0].saved(), direction as u64 * self.part());
        saved.part(from..from + each)
    }
}

impl Function for RecurrentOp {
    fn name(&self) -> &'static str {
        self.name
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        self.shapes.clone()
    }
    fn takes(&self) -> Option<Elem> {
        Some(self.stored)
    }
    fn saved(&self) -> Option<(Elem, u64)> {
        Some((Elem::F32, self.part() * self.directions.len() as u64))
    }
    fn scratch(&self, _: &Device) -> Vec<u64> {
        self.directions[0].scratch().to_vec()
    }
    fn scratch_backward(&self, _: &Device) -> Vec<u64> {
        let [gates, sums] = self.directions[0].scratch_backward();
        // What the sum over the models that share x needs; in 16 bits it goes through f32.
        let Some(sum) = self.sum_of_models() else { return vec![gates, sums, 0, 0, 0] };
        let half = u64::from(self.stored.is_half());
        vec![gates, sums, sum.scratch(), half * self.all_x(), half * self.all_x() / self.directions[0].models]
    }
    fn stored_scratch_backward(&self) -> Vec<u64> {
        // The gradient of x of the first direction, where it cannot be added to in place, and of the second; that of each model that shares x.
        let (two, half, shared) = (self.directions.len() == 2, self.stored.is_half(), self.sum_of_models().is_some());
        [two && half, two, shared].into_iter().map(|wanted| if wanted { self.all_x() } else { 0 }).collect()
    }
    fn keeps(&self) -> Keeps {
        // x, weights and biases; neither start states nor outputs.
        let weights = (0..self.directions.len()).fold(0, |bits, d| bits | 0b1111 << self.at(d));
        Keeps { inputs: 1 | weights | 0b11 << self.words(), outputs: 0 }
    }

    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        let saved = io.saved.ok_or_else(|| Error::Internal("a recurrent layer has no memory".into()))?;
        let [pack, state] = io.scratch else { return Err(Error::Internal("a recurrent layer has no scratch".into())) };
        for (d, op) in self.directions.iter().enumerate() {
            let (at, [hn, cn]) = (self.at(d), self.states(d));
            let args = RecurrentArgs {
                x: need(io.inputs, 0, self.name)?,
                w_ih: need(io.inputs, at, self.name)?,
                w_hh: need(io.inputs, at + 1, self.name)?,
                b_ih: optional(io.inputs, at + 2),
                b_hh: optional(io.inputs, at + 3),
                h0: optional(io.inputs, at + 4),
                c0: optional(io.inputs, at + 5),
                lengths: optional(io.inputs, self.words()),
                resets: optional(io.inputs, self.words() + 1),
                y: need(io.outputs, 0, self.name)?,
                hn: optional(io.outputs, hn),
                cn: optional(io.outputs, cn).filter(|_| self.lstm()),
                saved: &self.saved_of(saved, d),
                scratch: [pack, state],
            };
            recurrent::recurrent(pass, op, &args)?;
        }
        Ok(())
    }

    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let saved = io.saved.ok_or_else(|| Error::Internal("a recurrent layer has no memory".into()))?;
        let [gates, sums, parts, wide, total, first, second, each] = io.scratch else { return Err(Error::Internal("a recurrent layer has no scratch".into())) };
        if self.directions[0].batch == 0 {
            return zeros(pass, io.grad_inputs);
        }
        let sum = self.sum_of_models();
        let grad_x = optional(io.grad_inputs, 0).map(|grad_x| if sum.is_some() { each } else { grad_x });
        for (d, op) in self.directions.iter().enumerate() {
            let (at, [hn, cn]) = (self.at(d), self.states(d));
            // The second direction's gradient of x is added to the first one's: sums of two stored values are rounded once.
            let apart = match d {
                0 if self.directions.len() == 2 && self.stored.is_half() => Some(first),
                0 => None,
                _ => Some(second),
            };
            let args = RecurrentGrads {
                x: need(io.inputs, 0, self.name)?,
                w_ih: need(io.inputs, at, self.name)?,
                w_hh: need(io.inputs, at + 1, self.name)?,
                b_ih: optional(io.inputs, at + 2),
                b_hh: optional(io.inputs, at + 3),
                lengths: optional(io.inputs, self.words()),
                resets: optional(io.inputs, self.words() + 1),
                saved: &self.saved_of(saved, d),
                grad_y: optional(io.grad_outputs, 0),
                grad_hn: optional(io.grad_outputs, hn),
                grad_cn: optional(io.grad_outputs, cn).filter(|_| self.lstm()),
                grad_x: grad_x.and(apart).or(grad_x),
                grad_w_ih: optional(io.grad_inputs, at),
                grad_w_hh: optional(io.grad_inputs, at + 1),
                grad_b_ih: optional(io.grad_inputs, at + 2),
                grad_b_hh: optional(io.grad_inputs, at + 3),
                grad_h0: optional(io.grad_inputs, at + 4),
                grad_c0: optional(io.grad_inputs, at + 5),
                scratch: [gates, sums],
            };
            recurrent::recurrent_backward(pass, op, &args)?;
            match grad_x {
                Some(grad_x) if d == 1 && self.stored.is_half() => cast::add(pass, first, second, grad_x)?,
                Some(grad_x) if d == 1 => map::accumulate(pass, 1.0, second, grad_x)?,
                _ => {}
            }
        }
        match (sum, optional(io.grad_inputs, 0)) {
            (Some(sum), Some(grad_x)) if self.stored.is_half() => {
                cast::cast(pass, each, wide, 1.0)?;
                reduce::reduce_sum(pass, &sum, wide, total, Some(parts))?;
                cast::cast(pass, total, grad_x, 1.0)
            }
            (Some(sum), Some(grad_x)) => reduce::reduce_sum(pass, &sum, each, grad_x, Some(parts)),
            _ => Ok(()),
        }
    }
}

impl Tape {
    /// LSTM over whole sequences: x [M or 1,B,T,I]; y[b,t] depends on x[b,0..=t], with two directions on all valid steps. One direction, or two
    /// whose outputs stand side by side in y [M,B,T,2H]. Hochreiter, Schmidhuber 1997; gates i, f, g, o.
    /// # Errors
    /// `Shape` naming the argument; `Parameter` for no direction or more than two.
    pub fn lstm(&mut self, x: Var, directions: &[Layer], options: RecurrentOptions) -> Result<RecurrentOutput> {
        self.recurrent("lstm", Cell::Lstm, x, directions, options)
    }

    /// GRU, as [`Tape::lstm`]; gates r, z, n, the reset gate after the product. Cho et al. 2014.
    /// # Errors
    /// As for [`Tape::lstm`].
    pub fn gru(&mut self, x: Var, directions: &[Layer], options: RecurrentOptions) -> Result<RecurrentOutput> {
        self.recurrent("gru", Cell::Gru, x, directions, options)
    }

    fn recurrent(&mut self, name: &'static str, cell: Cell, x: Var, directions: &[Layer], options: RecurrentOptions) -> Result<RecurrentOutput> {
        let [x_models, b, t, i] = self.axes(name, "x", x, "[M or 1,B,T,I]")?;
        let first = match directions {
            [first] | [first, _] => first,
            _ => {
                let help = "give one layer, or two: forward and backward in time".into();
                return Err(Error::Parameter { op: name, name: "directions".into(), value: directions.len().to_string(), help });
            }
        };
        let [m, _, h] = self.axes(name, "w_hh", first.w_hh, "[M,G,H]")?;
        if x_models != 1 && x_models != m {
            return Err(wrong(name, "x", format!("[{m} or 1,B,T,I] for weights of {m} models"), self.shape(x)));
        }
        let gates = if cell == Cell::Lstm { 4 * h } else { 3 * h };
        let mut inputs = vec![Some(x)];
        let mut learned = false;
        for layer in directions {
            self.expect(name, "w_ih", layer.w_ih, &[m, gates, i])?;
            self.expect(name, "w_hh", layer.w_hh, &[m, gates, h])?;
            for (arg, bias) in [("b_ih", layer.b_ih), ("b_hh", layer.b_hh)] {
                if let Some(bias) = bias {
                    self.expect(name, arg, bias, &[m, gates])?;
                }
            }
            for (arg, start) in [("h0", layer.h0), ("c0", layer.c0)] {
                if let Some(start) = start {
                    learned = self.shape(start).len() == 2;
                    let expected: &[usize] = if learned { &[m, h] } else { &[m, b, h] };
                    self.expect(name, arg, start, expected)?;
                }
            }
            inputs.extend([Some(layer.w_ih), Some(layer.w_hh), layer.b_ih, layer.b_hh, layer.h0, layer.c0]);
        }
        if let Some(lengths) = options.lengths {
            self.expect(name, "lengths", lengths, &[b])?;
            self.expect_words(name, "lengths", lengths)?;
        }
        if let Some(resets) = options.resets {
            self.expect(name, "resets", resets, &[b, t])?;
            self.expect_words(name, "resets", resets)?;
        }
        inputs.extend([options.lengths, options.resets]);
        let keep = match (self.records(&inputs), options.recompute) {
            (false, _) => Keep::Nothing,
            (true, true) => Keep::States,
            (true, false) => Keep::Gates,
        };
        let width = directions.len() * h;
        let make = |d: usize| Recurrent {
            x_models: x_models as u64,
            learned_start: learned,
            reverse: d == 1,
            keep,
            y_stride: width as u64,
            y_offset: (d * h) as u64,
            ..Recurrent::new(cell, m as u64, b as u64, t as u64, i as u64, h as u64)
        };
        let layers = directions;
        let directions: Vec<Recurrent> = (0..layers.len()).map(make).collect();
        directions[0].check()?;
        let mut shapes = vec![vec![m, b, t, width]];
        shapes.extend(std::iter::repeat_n(vec![m, b, h], 2 * directions.len()));
        let two = directions.len() == 2;
        let stored = self.elem(x);
        for layer in layers {
            let named =
                [("w_ih", Some(layer.w_ih)), ("w_hh", Some(layer.w_hh)), ("b_ih", layer.b_ih), ("b_hh", layer.b_hh), ("h0", layer.h0), ("c0", layer.c0)];
            for (arg, tensor) in named {
                self.stored_in(name, arg, tensor, stored)?;
            }
        }
        let out = self.apply(RecurrentOp { name, directions, stored, shapes }, &inputs)?;
        let lstm = cell == Cell::Lstm;
        Ok(RecurrentOutput { y: out[0], hn: [Some(out[1]), two.then(|| out[3])], cn: [lstm.then_some(out[2]), (lstm && two).then(|| out[4])] })
    }
}
