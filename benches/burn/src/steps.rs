//! The training steps in burn, as its users write them: forward, the sum of the output, backward. Summing starts the backward pass with ones.

use crate::host::{self, Values, normals};
use burn::module::Param;
use burn::nn::{self, LstmConfig};
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Tensor, TensorData};

/// A step to time: `run` starts it; `values` runs it once and reads everything; `expected` is the host's.
pub trait Step {
    fn name(&self) -> &'static str;
    fn shape(&self) -> [usize; 4];
    /// Flops, counted as `forback bench` counts them.
    fn work(&self) -> f64;
    fn run(&self) -> Result<(), String>;
    fn values(&self) -> Result<Values, String>;
    fn expected(&self) -> Values;
}

fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f64>, String> {
    let values = tensor.into_data().try_to_vec::<f32>().map_err(|e| format!("{e:?}"))?;
    Ok(values.into_iter().map(f64::from).collect())
}

fn missing() -> String {
    "burn gave no gradient".into()
}

/// burn::nn::Lstm, one bias a gate: its hidden transformations have none, as forback's layer here.
pub struct Lstm {
    shape: [usize; 4],
    data: [Vec<f32>; 4],
    module: nn::Lstm,
    x: Tensor<3>,
}

impl Lstm {
    pub fn new(shape: [usize; 4], device: &Device) -> Self {
        let [b, t, i, h] = shape;
        let scale = 1.0 / (h as f64).sqrt();
        let data = [normals(b * t * i, 0, 1.0), normals(4 * h * i, 1, scale), normals(4 * h * h, 2, scale), normals(4 * h, 3, scale)];
        let mut module = LstmConfig::new(i, h, true).init(device);
        for (gate, controller) in Self::gates_mut(&mut module).into_iter().enumerate() {
            let turned = |w: &[f32], columns: usize| {
                let of = |c: usize, k: usize| w[(gate * h + k) * columns + c];
                let values: Vec<f32> = (0..columns).flat_map(|c| (0..h).map(move |k| of(c, k)).collect::<Vec<_>>()).collect();
                Param::from_data(TensorData::new(values, [columns, h]), device)
            };
            controller.input_transform.weight = turned(&data[1], i);
            controller.hidden_transform.weight = turned(&data[2], h);
            let bias = data[3][gate * h..][..h].to_vec();
            controller.input_transform.bias = Some(Param::from_data(TensorData::new(bias, [h]), device));
            controller.hidden_transform.bias = None;
        }
        let x = Tensor::from_data(TensorData::new(data[0].clone(), [b, t, i]), device);
        Self { shape, data, module, x }
    }

    /// Gates in the order i, f, g, o.
    fn gates_mut(module: &mut nn::Lstm) -> Vec<&mut nn::GateController> {
        let nn::Lstm { input_gate, forget_gate, cell_gate, output_gate, .. } = module;
        [Some(input_gate), forget_gate.as_mut(), Some(cell_gate), Some(output_gate)].into_iter().flatten().collect()
    }

    fn gates(&self) -> Vec<&nn::GateController> {
        let m = &self.module;
        [Some(&m.input_gate), m.forget_gate.as_ref(), Some(&m.cell_gate), Some(&m.output_gate)].into_iter().flatten().collect()
    }

    /// y, and the gradients of a gate's weights [I,H], [H,H], [H].
    #[allow(clippy::type_complexity, reason = "a step's results, read or dropped by its two callers")]
    fn step(&self) -> Result<(Tensor<3>, Vec<(Tensor<2>, Tensor<2>, Tensor<1>)>), String> {
        let (y, _) = self.module.forward(self.x.clone(), None);
        let mut grads = y.clone().sum().backward();
        let mut of = |gate: &nn::GateController| {
            let w_ih = gate.input_transform.weight.val().grad_remove(&mut grads)?;
            let w_hh = gate.hidden_transform.weight.val().grad_remove(&mut grads)?;
            let bias = gate.input_transform.bias.as_ref()?.val().grad_remove(&mut grads)?;
            Some((w_ih, w_hh, bias))
        };
        let grads = self.gates().into_iter().map(&mut of).collect::<Option<Vec<_>>>().ok_or_else(missing)?;
        Ok((y, grads))
    }
}

impl Step for Lstm {
    fn name(&self) -> &'static str {
        "lstm_train"
    }

    fn shape(&self) -> [usize; 4] {
        self.shape
    }

    fn work(&self) -> f64 {
        let [b, t, i, h] = self.shape;
        3.0 * (2 * b * t * 4 * h * (i + h)) as f64
    }

    fn run(&self) -> Result<(), String> {
        let results = self.step()?;
        self.x.device().sync().map_err(|e| format!("{e:?}"))?;
        drop(results);
        Ok(())
    }

    fn values(&self) -> Result<Values, String> {
        let (y, grads) = self.step()?;
        let (mut w_ih, mut w_hh, mut bias) = (Vec::new(), Vec::new(), Vec::new());
        for (g_ih, g_hh, g_bias) in grads {
            w_ih.extend(read(g_ih.transpose())?);
            w_hh.extend(read(g_hh.transpose())?);
            bias.extend(read(g_bias)?);
        }
        Ok(vec![("y", read(y)?), ("grad_w_ih", w_ih), ("grad_w_hh", w_hh), ("grad_bias", bias)])
    }

    fn expected(&self) -> Values {
        let [x, w_ih, w_hh, bias] = &self.data;
        host::lstm(self.shape, x, w_ih, w_hh, bias)
    }
}

/// burn::tensor::module::attention, no mask.
pub struct Attention {
    shape: [usize; 4],
    data: [Vec<f32>; 3],
    leaves: [Tensor<4>; 3],
}

impl Attention {
    pub fn new(shape: [usize; 4], device: &Device) -> Self {
        let data = [0, 1, 2].map(|seed| normals(shape.iter().product(), seed, 1.0));
        let leaf = |x: &Vec<f32>| Tensor::from_data(TensorData::new(x.clone(), shape), device).require_grad();
        let leaves = [leaf(&data[0]), leaf(&data[1]), leaf(&data[2])];
        Self { shape, data, leaves }
    }

    /// Output, and the gradients of q, k and v.
    fn step(&self) -> Result<[Tensor<4>; 4], String> {
        let [q, k, v] = &self.leaves;
        let out = attention(q.clone(), k.clone(), v.clone(), None, None, AttentionModuleOptions::default());
        let mut grads = out.clone().sum().backward();
        let mut of = |x: &Tensor<4>| x.grad_remove(&mut grads).ok_or_else(missing);
        Ok([out, of(q)?, of(k)?, of(v)?])
    }
}

impl Step for Attention {
    fn name(&self) -> &'static str {
        "attention_train"
    }

    fn shape(&self) -> [usize; 4] {
        self.shape
    }

    fn work(&self) -> f64 {
        let [b, heads, t, d] = self.shape;
        3.5 * 4.0 * (b * heads * t * t * d) as f64
    }

    fn run(&self) -> Result<(), String> {
        let results = self.step()?;
        self.leaves[0].device().sync().map_err(|e| format!("{e:?}"))?;
        drop(results);
        Ok(())
    }

    fn values(&self) -> Result<Values, String> {
        let names = ["out", "grad_q", "grad_k", "grad_v"];
        names.into_iter().zip(self.step()?).map(|(name, x)| Ok((name, read(x)?))).collect()
    }

    fn expected(&self) -> Values {
        let [q, k, v] = &self.data;
        host::attention(self.shape, q, k, v)
    }
}
