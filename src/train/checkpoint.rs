//! Models as safetensors files: of one model under PyTorch's names, or of a whole training that goes on bit for bit.
//!
//! PyTorch's dropout and batch_first leave no trace in a file: a file is the same with and without them, x is batch first here, and a module
//! without dropout computes what `eval()` does. norm_first is an option of [`crate::nn::EncoderLayer`]. Files of bias=False, proj_size, kdim and
//! vdim, add_bias_kv are refused, by name.
//!
//! An LSTM has one bias here and two in PyTorch: a file gets `bias_hh_…` as zeros, and where one is read it is added to `bias_ih_…`.

use super::schedule::{Progress, Rates};
use super::{Model, Trainer, download};
use crate::nn::Parameters;
use crate::{Error, Result};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn reals(path: &Path, name: &str, view: &TensorView<'_>) -> Result<Vec<f32>> {
    let data = view.data();
    match view.dtype() {
        Dtype::F32 => Ok(data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
        Dtype::F64 => Ok(data.chunks_exact(8).map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32).collect()),
        other => Err(refused(path, format!("tensor '{name}' is {other:?}"), "save it as F32")),
    }
}

fn refused(path: &Path, message: String, help: &str) -> Error {
    Error::Data { file: path.display().to_string(), row: None, column: None, value: None, message, help: help.into() }
}

fn write(path: &Path, tensors: &[(String, Vec<usize>, Vec<u8>)], metadata: Option<HashMap<String, String>>) -> Result<()> {
    let mut views = Vec::with_capacity(tensors.len());
    for (name, shape, data) in tensors {
        let view = TensorView::new(Dtype::F32, shape.clone(), data).map_err(|e| Error::Internal(format!("tensor '{name}': {e}")))?;
        views.push((name.clone(), view));
    }
    let whole = safetensors::serialize(views, metadata).map_err(|e| Error::Internal(e.to_string()))?;
    // Beside the target first: a full disk loses nothing.
    let part = path.with_extension("part");
    let done = std::fs::write(&part, whole).and_then(|()| std::fs::rename(&part, path));
    done.map_err(|e| {
        let _ = std::fs::remove_file(&part);
        Error::Io { path: path.display().to_string(), message: e.to_string() }
    })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::Io { path: path.display().to_string(), message: e.to_string() })
}

fn parse<'a>(path: &Path, data: &'a [u8]) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(data).map_err(|e| refused(path, e.to_string(), "this is no safetensors file, or a damaged one"))
}

/// The variant of PyTorch's modules that tensors give away, where there is no such module here.
fn variant(wrong: &[String]) -> Option<&'static str> {
    let any = |what: &dyn Fn(&str) -> bool| wrong.iter().any(|line| what(line));
    if any(&|line| line.contains("weight_hr_") && line.contains("not of this model")) {
        Some("it was saved by an LSTM with proj_size, which is not built: save one without")
    } else if any(&|line| line.contains("q_proj_weight") && line.contains("not of this model")) {
        Some("it was saved by attention with kdim or vdim, which is not built: keys and values have the width of the queries here")
    } else if any(&|line| line.contains("bias_k'") && line.contains("not of this model")) {
        Some("it was saved by attention with add_bias_kv, which is not built: save one without")
    } else if any(&|line| line.contains("bias") && line.contains("missing")) {
        Some("it was saved with bias=False, and this module has biases: save it with biases, zeros serve")
    } else {
        None
    }
}

impl Parameters {
    /// Writes one model as PyTorch's state_dict has it.
    /// # Errors
    /// `Parameter` for a model that is not there; `Data` where the file cannot be written, and then nothing is left of it.
    pub fn save(&self, path: &Path, model: usize) -> Result<()> {
        self.check_model(model)?;
        self.write_model(path, model, &self.all()?)
    }

    /// Writes every model, each into the file that `path` names.
    /// # Errors
    /// `Io` where a file cannot be written.
    pub fn save_each(&self, path: &dyn Fn(usize) -> PathBuf) -> Result<()> {
        let all = self.all()?;
        (0..self.models()).try_for_each(|model| self.write_model(&path(model), model, &all))
    }

    fn all(&self) -> Result<Vec<Vec<f32>>> {
        self.tensors().iter().map(|t| self.get(&t.name)).collect()
    }

    fn write_model(&self, path: &Path, model: usize, all: &[Vec<f32>]) -> Result<()> {
        let mut out = Vec::new();
        let names: BTreeSet<&str> = self.tensors().iter().map(|t| t.name.as_str()).collect();
        for (tensor, values) in self.tensors().iter().zip(all) {
            let each = tensor.shape.iter().product::<usize>();
            out.push((tensor.name.clone(), tensor.shape.clone(), bytes(&values[model * each..(model + 1) * each])));
            let other = tensor.name.replace("bias_ih_", "bias_hh_");
            if other != tensor.name && !names.contains(other.as_str()) {
                out.push((other, tensor.shape.clone(), bytes(&vec![0.0; each])));
            }
        }
        write(path, &out, None)
    }

    /// Reads one model from a state_dict of PyTorch's or of [`Parameters::save`].
    /// # Errors
    /// `Data` naming every tensor that is missing, unknown or of another shape; then nothing was changed.
    pub fn load(&self, path: &Path, model: usize) -> Result<()> {
        self.check_model(model)?;
        let data = read(path)?;
        let file = parse(path, &data)?;
        let mut unused: BTreeSet<String> = file.names().into_iter().map(|n| n.to_string()).collect();
        let (mut wrong, mut values) = (Vec::new(), Vec::new());
        for tensor in self.tensors() {
            unused.remove(&tensor.name);
            let Ok(view) = file.tensor(&tensor.name) else {
                wrong.push(format!("'{}' is missing", tensor.name));
                continue;
            };
            if view.shape() != tensor.shape {
                wrong.push(format!("'{}' is {:?}, this model has {:?}", tensor.name, view.shape(), tensor.shape));
                continue;
            }
            let mut value = reals(path, &tensor.name, &view)?;
            let other = tensor.name.replace("bias_ih_", "bias_hh_");
            if other != tensor.name && self.tensors().iter().all(|t| t.name != other) && unused.remove(&other) {
                let view = file.tensor(&other).map_err(|e| refused(path, e.to_string(), "save it again"))?;
                value.iter_mut().zip(reals(path, &other, &view)?).for_each(|(a, b)| *a += b);
            }
            values.push((tensor, value));
        }
        wrong.extend(unused.iter().map(|name| format!("'{name}' is not of this model")));
        if !wrong.is_empty() {
            let help = variant(&wrong).unwrap_or("build the model with the sizes that it was saved with");
            return Err(refused(path, format!("another architecture: {}", wrong.join("; ")), help));
        }
        for (tensor, value) in values {
            let each = value.len();
            let mut all = self.get(&tensor.name)?;
            all[model * each..(model + 1) * each].copy_from_slice(&value);
            self.set(&tensor.name, &all)?;
        }
        Ok(())
    }

    fn check_model(&self, model: usize) -> Result<()> {
        if model < self.models() {
            return Ok(());
        }
        let help = format!("there are {} models, counted from 0", self.models());
        Err(Error::Parameter { op: "checkpoint", name: "model".into(), value: model.to_string(), help })
    }
}

impl<N: Model> Trainer<'_, N> {
    /// Writes everything that the training needs to go on: parameters, moments, averages, counters, best parameters, schedule.
    /// # Errors
    /// `Data` where the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut values = vec![
            ("parameters", download(&self.device, self.parameters.values())?),
            ("moment1", download(&self.device, &self.state.moment1)?),
            ("moment2", download(&self.device, &self.state.moment2)?),
            ("best", self.best.clone()),
            // Words in the bits of reals.
            ("counters", self.counters()?.into_iter().map(f32::from_bits).collect()),
        ];
        if let Some(average) = &self.state.average {
            values.push(("average", download(&self.device, average.values())?));
        }
        let tensors: Vec<_> = values.iter().map(|(name, v)| (name.to_string(), vec![v.len()], bytes(v))).collect();
        let state = serde_json::json!({
            "epoch": self.epoch,
            "architecture": self.architecture(),
            "rates": self.rates.state().iter().map(|&(f, best, since)| (f.to_bits(), best.to_bits(), since)).collect::<Vec<_>>(),
            "progress": self.progress.iter().map(|p| (p.best.to_bits(), p.best_epoch, p.stopped)).collect::<Vec<_>>(),
        });
        write(path, &tensors, Some(HashMap::from([("training".to_string(), state.to_string())])))
    }

    /// Takes up a training that was saved: what follows has the bits that it would have had.
    /// # Errors
    /// `Data` for a file of another architecture, saying how it differs, or a damaged one; then nothing was changed.
    pub fn resume(&mut self, path: &Path) -> Result<()> {
        let data = read(path)?;
        let file = parse(path, &data)?;
        let damaged = |what: &str| refused(path, format!("{what} is missing or damaged"), "give a file that Trainer::save wrote");
        let (_, metadata) = SafeTensors::read_metadata(&data).map_err(|e| refused(path, e.to_string(), "the file is damaged"))?;
        let text = metadata.metadata().as_ref().and_then(|m| m.get("training")).ok_or_else(|| damaged("the state of a training"))?;
        let state: serde_json::Value = serde_json::from_str(text).map_err(|_| damaged("the state of a training"))?;
        if state["architecture"] != self.architecture() {
            let (theirs, ours) = (&state["architecture"], self.architecture());
            return Err(refused(path, format!("another architecture: {theirs}, this is {ours}"), "build the model and the folds that it was saved with"));
        }
        let get = |name: &str| file.tensor(name).map_err(|_| damaged(name)).and_then(|view| reals(path, name, &view));
        let (values, moment1, moment2, best, counters) = (get("parameters")?, get("moment1")?, get("moment2")?, get("best")?, get("counters")?);
        let rates: Vec<(u64, u64, usize)> = serde_json::from_value(state["rates"].clone()).map_err(|_| damaged("rates"))?;
        let progress: Vec<(u64, usize, Option<usize>)> = serde_json::from_value(state["progress"].clone()).map_err(|_| damaged("progress"))?;
        let average = self.state.average.as_ref().map(|average| Ok::<_, Error>((average, get("average")?))).transpose()?;
        if let Some((average, values)) = average {
            self.device.write(average.values(), &values)?;
        }
        self.epoch = state["epoch"].as_u64().ok_or_else(|| damaged("epoch"))? as usize;
        self.device.write(self.parameters.values(), &values)?;
        self.device.write(&self.state.moment1, &moment1)?;
        self.device.write(&self.state.moment2, &moment2)?;
        self.device.write_u32(&self.state.counters, &counters.into_iter().map(f32::to_bits).collect::<Vec<_>>())?;
        self.rates = Rates::with_state(&self.rates, rates.into_iter().map(|(f, b, n)| (f64::from_bits(f), f64::from_bits(b), n)).collect());
        self.progress = progress.into_iter().map(|(best, best_epoch, stopped)| Progress { best: f64::from_bits(best), best_epoch, stopped }).collect();
        self.best = best;
        Ok(())
    }

    fn architecture(&self) -> serde_json::Value {
        let tensors: Vec<_> = self.parameters.tensors().iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
        serde_json::json!({ "models": self.parameters.models(), "tensors": tensors, "averaged": self.state.average.is_some() })
    }
}
