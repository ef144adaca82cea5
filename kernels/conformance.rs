//! Expected results from other libraries and closed forms: `<kernel>/<case>.safetensors` files, and how results are judged.
//!
//! Inputs `in/…` are F32 or U32, expected outputs `out/…` F64 or U32; the metadata holds `kernel`, `params` (JSON), `rtol`, `atol`,
//! `reference_tol`, `source`. A device passes where |got − want| ≤ atol + rtol·|want| everywhere; the f64 reference must be within
//! reference_tol (relative, or absolute near zero). Undefined values are written as −1e30.

use crate::device::{Device, DeviceKind};
use crate::{Error, OPS, Result};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// How undefined values are written in files and on devices.
pub const UNDEFINED: f64 = -1e30;

/// NaN for undefined, the value otherwise.
pub fn defined(x: f64) -> f64 {
    if x <= -1e29 { f64::NAN } else { x }
}

enum Values {
    F32(Vec<f32>),
    F64(Vec<f64>),
    U32(Vec<u32>),
}

struct Tensor {
    shape: Vec<usize>,
    values: Values,
}

/// One conformance file.
pub struct Case {
    /// Kernel (op) that it is about.
    pub kernel: String,
    /// Name of the case: the file's stem.
    pub name: String,
    /// Where it was read from.
    pub path: PathBuf,
    params: Value,
    rtol: f64,
    atol: f64,
    reference_tol: f64,
    tensors: BTreeMap<String, Tensor>,
}

impl Case {
    /// Reads a file.
    /// # Errors
    /// `Io` or `Data` naming the file.
    pub fn read(path: &Path) -> Result<Case> {
        let data = |message: String| Error::Data {
            file: path.display().to_string(),
            row: None,
            column: None,
            value: None,
            message,
            help: "conformance files are safetensors with kernel, params, rtol and atol in their metadata".into(),
        };
        let bytes = std::fs::read(path).map_err(|e| Error::Io { path: path.display().to_string(), message: e.to_string() })?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| data(e.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let text = |key: &str| metadata.get(key).cloned().ok_or_else(|| data(format!("no '{key}' in the metadata")));
        let number = |key: &str| text(key)?.parse::<f64>().map_err(|e| data(format!("{key}: {e}")));
        let mut tensors = BTreeMap::new();
        for (name, view) in SafeTensors::deserialize(&bytes).map_err(|e| data(e.to_string()))?.tensors() {
            let values = match view.dtype() {
                Dtype::F32 => Values::F32(bytemuck::pod_collect_to_vec(view.data())),
                Dtype::F64 => Values::F64(bytemuck::pod_collect_to_vec(view.data())),
                Dtype::U32 => Values::U32(bytemuck::pod_collect_to_vec(view.data())),
                other => return Err(data(format!("tensor {name} has type {other:?}"))),
            };
            tensors.insert(name, Tensor { shape: view.shape().to_vec(), values });
        }
        Ok(Case {
            kernel: text("kernel")?,
            name: path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default(),
            path: path.to_path_buf(),
            params: serde_json::from_str(&text("params")?).map_err(|e| data(format!("params: {e}")))?,
            rtol: number("rtol")?,
            atol: number("atol")?,
            reference_tol: metadata.get("reference_tol").and_then(|t| t.parse().ok()).unwrap_or(1e-9),
            tensors,
        })
    }

    fn problem(&self, message: String) -> Error {
        let help = "see the file's kernel in the conformance contract".into();
        Error::Data { file: self.path.display().to_string(), row: None, column: None, value: None, message, help }
    }

    fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| self.problem(format!("no tensor '{name}'")))
    }

    /// An F32 input.
    pub fn f32(&self, name: &str) -> Result<&[f32]> {
        match &self.tensor(&format!("in/{name}"))?.values {
            Values::F32(x) => Ok(x),
            _ => Err(self.problem(format!("in/{name} is not F32"))),
        }
    }

    /// A U32 input.
    pub fn u32(&self, name: &str) -> Result<&[u32]> {
        match &self.tensor(&format!("in/{name}"))?.values {
            Values::U32(x) => Ok(x),
            _ => Err(self.problem(format!("in/{name} is not U32"))),
        }
    }

    /// Shape of an input.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.tensor(&format!("in/{name}"))?.shape)
    }

    /// Whether an input is there.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(&format!("in/{name}"))
    }

    /// A number among the params.
    pub fn number(&self, name: &str) -> Result<f64> {
        self.params.get(name).and_then(Value::as_f64).ok_or_else(|| self.problem(format!("no number '{name}' among the params")))
    }

    /// Whether a param is there and true.
    pub fn flag(&self, name: &str) -> bool {
        self.params.get(name).and_then(Value::as_bool).unwrap_or(false)
    }

    /// A text among the params.
    pub fn text(&self, name: &str) -> Result<&str> {
        self.params.get(name).and_then(Value::as_str).ok_or_else(|| self.problem(format!("no text '{name}' among the params")))
    }

    /// Whether a param is there and is not null.
    pub fn given(&self, name: &str) -> bool {
        self.params.get(name).is_some_and(|value| !value.is_null())
    }

    /// A true-or-false param; false where it is absent or null.
    /// # Errors
    /// `Data` if it is something else.
    pub fn truth(&self, name: &str) -> Result<bool> {
        match self.params.get(name) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(x)) => Ok(*x),
            Some(other) => Err(self.problem(format!("'{name}' among the params is {other}, not true or false"))),
        }
    }

    /// Inputs whose name starts with `prefix`, without it.
    pub fn inputs_under(&self, prefix: &str) -> Vec<&str> {
        let prefix = format!("in/{prefix}");
        self.tensors.keys().filter_map(|k| k.strip_prefix(&prefix)).collect()
    }
}

/// What an op gave for a case.
#[derive(Default)]
pub struct Outputs {
    launches: usize,
    reals: BTreeMap<String, Vec<f64>>,
    words: BTreeMap<String, Vec<u32>>,
}

impl Outputs {
    /// Starts the results of a run that launched `launches` kernels on the device.
    pub fn launched(launches: usize) -> Outputs {
        Outputs { launches, ..Outputs::default() }
    }

    /// Adds an output of reals; NaN stands for undefined.
    pub fn reals(&mut self, name: &str, values: Vec<f64>) {
        self.reals.insert(name.into(), values.into_iter().map(|x| if x.is_nan() { UNDEFINED } else { x }).collect());
    }

    /// Adds an output of words.
    pub fn words(&mut self, name: &str, values: Vec<u32>) {
        self.words.insert(name.into(), values);
    }
}

/// Verdict on one case.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// Kernel (op).
    pub kernel: String,
    /// Case.
    pub case: String,
    /// Launches on the device.
    pub launches: usize,
    /// Worst error as a share of the tolerance; below 1 passes.
    pub share: f64,
    /// Output that the worst error is in.
    pub worst: String,
    /// Milliseconds of the whole op, uploads and download included.
    pub ms: f64,
    /// Why it failed.
    pub failure: Option<String>,
}

/// All `.safetensors` files under the paths, in order.
/// # Errors
/// `Io` for a path that does not exist.
pub fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let io = |path: &Path, e: std::io::Error| Error::Io { path: path.display().to_string(), message: e.to_string() };
    let mut found = Vec::new();
    for path in paths {
        if path.is_dir() {
            let mut inside =
                std::fs::read_dir(path).map_err(|e| io(path, e))?.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(|e| io(path, e))?;
            inside.retain(|p| p.is_dir() || p.extension().is_some_and(|e| e == "safetensors"));
            inside.sort();
            found.extend(files(&inside)?);
        } else {
            std::fs::metadata(path).map_err(|e| io(path, e))?;
            found.push(path.clone());
        }
    }
    Ok(found)
}

/// Runs one case on a device and judges it.
pub fn verify(device: &Device, case: &Case) -> Verdict {
    verify_by(device, case, |device, case| match OPS.iter().find(|op| op.name == case.kernel) {
        Some(op) => (op.verify)(device, case),
        None => Err(Error::Unknown { kind: "kernel", given: case.kernel.clone(), suggestion: None, known: OPS.iter().map(|op| op.name.to_string()).collect() }),
    })
}

/// Runs one case by a binding that is not in the list, and judges it.
pub fn verify_by(device: &Device, case: &Case, run: impl FnOnce(&Device, &Case) -> Result<Outputs>) -> Verdict {
    let start = Instant::now();
    let result = run(device, case);
    let ms = start.elapsed().as_secs_f64() * 1e3;
    let verdict = Verdict { kernel: case.kernel.clone(), case: case.name.clone(), launches: 0, share: f64::INFINITY, worst: String::new(), ms, failure: None };
    let outputs = match result {
        Ok(outputs) => outputs,
        Err(error) => return Verdict { failure: Some(error.to_string()), ..verdict },
    };
    let on_device = matches!(device.info().kind, DeviceKind::Wgpu | DeviceKind::Cuda | DeviceKind::CudaHost);
    let mut verdict = Verdict { launches: outputs.launches, share: 0.0, ..verdict };
    if on_device && outputs.launches == 0 {
        verdict.failure = Some("nothing was launched on the device".into());
    }
    for (name, tensor) in case.tensors.iter().filter_map(|(k, t)| k.strip_prefix("out/").map(|n| (n, t))) {
        judge(device.info().kind == DeviceKind::Reference, case, name, tensor, &outputs, &mut verdict);
    }
    verdict
}

fn judge(reference: bool, case: &Case, name: &str, want: &Tensor, outputs: &Outputs, verdict: &mut Verdict) {
    let fail = |verdict: &mut Verdict, why: String| {
        verdict.share = f64::INFINITY;
        verdict.worst = name.into();
        verdict.failure.get_or_insert(why);
    };
    let (got, want): (Vec<f64>, Vec<f64>) = match &want.values {
        Values::U32(want) => {
            let Some(got) = outputs.words.get(name) else { return fail(verdict, format!("no output '{name}'")) };
            if let Some(i) = (0..want.len().max(got.len())).find(|&i| want.get(i) != got.get(i)) {
                fail(verdict, format!("{name}[{i}]: got {:?}, expected {:?} of {:?}", got.get(i), want.get(i), want.len()));
            }
            return;
        }
        Values::F64(want) => (outputs.reals.get(name).cloned().unwrap_or_default(), want.clone()),
        Values::F32(want) => (outputs.reals.get(name).cloned().unwrap_or_default(), want.iter().map(|&x| f64::from(x)).collect()),
    };
    if got.len() != want.len() {
        return fail(verdict, format!("{name}: got {} values, expected {}", got.len(), want.len()));
    }
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        let allowed = if reference { case.reference_tol * w.abs().max(1.0) } else { case.atol + case.rtol * w.abs() };
        let undefined = (*g <= -1e29) != (*w <= -1e29);
        let share = if undefined || !g.is_finite() { f64::INFINITY } else { (g - w).abs() / allowed };
        if share > verdict.share {
            verdict.share = share;
            verdict.worst = format!("{name}[{i}]");
            if share > 1.0 {
                verdict.failure = Some(format!("{name}[{i}]: got {g:e}, expected {w:e}, {share:.3} of the tolerance"));
            }
        }
    }
}
