//! Checkpoints and PyTorch: names, shapes, layouts and outputs of its modules, and the way there and back where PyTorch is installed.

use crate::common::open;
use forback::kernels::activation::Activation;
use forback::nn::{Cell, Declared, EncoderLayer, Module, MultiheadAttention, Parameters, Recurrent};
use forback::ops::{AttentionOptions, RecurrentOptions};
use forback::tape::Tape;
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

enum Net {
    Cell(Recurrent),
    Attention(MultiheadAttention),
    Encoder(EncoderLayer),
}

/// A module here and there.
struct Case {
    name: &'static str,
    net: Net,
    width: usize,
    module: &'static str,
    arguments: Value,
}

fn cases() -> Vec<Case> {
    let cell = |cell: Cell| Net::Cell(Recurrent { layers: 2, bidirectional: true, ..Recurrent::new("", cell, 3, 5) });
    let cells = json!({ "input_size": 3, "hidden_size": 5, "num_layers": 2, "bidirectional": true, "batch_first": true, "dropout": 0.3 });
    let encoder = |norm_first: bool, activation: Activation| {
        Net::Encoder(EncoderLayer { prefix: String::new(), width: 8, heads: 2, feedforward: 16, activation, norm_first })
    };
    let layer = |norm_first: bool, activation: &str| json!({ "d_model": 8, "nhead": 2, "dim_feedforward": 16, "activation": activation, "norm_first": norm_first, "batch_first": true });
    vec![
        Case { name: "lstm", net: cell(Cell::Lstm), width: 3, module: "LSTM", arguments: cells.clone() },
        Case { name: "gru", net: cell(Cell::Gru), width: 3, module: "GRU", arguments: cells },
        Case {
            name: "attention",
            net: Net::Attention(MultiheadAttention { prefix: String::new(), width: 8, heads: 2 }),
            width: 8,
            module: "MultiheadAttention",
            arguments: json!({ "embed_dim": 8, "num_heads": 2, "batch_first": true, "dropout": 0.2 }),
        },
        Case { name: "encoder", net: encoder(false, Activation::Relu), width: 8, module: "TransformerEncoderLayer", arguments: layer(false, "relu") },
        Case { name: "encoder_norm_first", net: encoder(true, Activation::Gelu), width: 8, module: "TransformerEncoderLayer", arguments: layer(true, "gelu") },
    ]
}

const MODELS: usize = 2;
const BATCH: usize = 3;
const STEPS: usize = 4;

/// Values between −1 and 1 that any language makes alike.
fn wave(n: usize, phase: f64) -> Vec<f32> {
    (0..n).map(|i| (i as f64 * 0.7 + phase).sin() as f32).collect()
}

impl Case {
    fn declared(&self) -> Declared {
        let mut declared = Declared::new();
        match &self.net {
            Net::Cell(net) => net.declare(&mut declared),
            Net::Attention(net) => net.declare(&mut declared),
            Net::Encoder(net) => net.declare(&mut declared),
        }
        declared
    }

    fn x(&self) -> Vec<f32> {
        wave(BATCH * STEPS * self.width, 0.3)
    }

    /// Outputs of each model for the same x.
    fn outputs(&self, parameters: &Parameters) -> Vec<Vec<f32>> {
        let m = parameters.models();
        let all: Vec<f32> = (0..m).flat_map(|_| self.x()).collect();
        let x = parameters.values().device().upload("x", &all).unwrap();
        let mut tape = Tape::new(parameters.values().device());
        let x = tape.input(&x, &[m, BATCH, STEPS, self.width]).unwrap();
        let y = match &self.net {
            Net::Cell(net) => net.forward(&mut tape, parameters, x, RecurrentOptions::default()),
            Net::Attention(net) => net.forward(&mut tape, parameters, x, AttentionOptions::default()),
            Net::Encoder(net) => net.forward(&mut tape, parameters, x, AttentionOptions::default(), None),
        }
        .unwrap();
        let mut pass = parameters.values().device().pass("outputs");
        let plan = tape.record(&mut pass, &[y]).unwrap();
        let read = pass.read(plan.view(y).unwrap()).unwrap();
        let values = pass.submit().unwrap().f32(read).unwrap();
        values.chunks_exact(values.len() / m).map(<[f32]>::to_vec).collect()
    }
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// PyTorch 2.15: names and shapes of the state_dicts, and the first six outputs with parameter i of the state_dict set to
/// 0.5·sin(0.7·j + 0.1·i) for its element j and x to sin(0.7·j + 0.3).
const TORCH: &str = include_str!("torch.json");

#[test]
fn checkpoints_have_the_names_layouts_and_outputs_of_pytorch() {
    let truth: Value = serde_json::from_str(TORCH).unwrap();
    let (dir, device) = (tempfile::tempdir().unwrap(), open("cpu").unwrap());
    for case in cases() {
        let (path, want) = (dir.path().join("model.safetensors"), &truth[case.name]);
        let parameters = Parameters::new(&device, MODELS, &case.declared(), 3).unwrap();
        parameters.save(&path, 1).unwrap();
        let data = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&data).unwrap();
        let ours: Value = file.tensors().into_iter().map(|(name, view)| (name, json!(view.shape()))).collect::<serde_json::Map<_, _>>().into();
        let theirs: Value =
            want["shapes"].as_array().unwrap().iter().map(|t| (t[0].as_str().unwrap().to_string(), t[1].clone())).collect::<serde_json::Map<_, _>>().into();
        let sorted = |v: &Value| v.as_object().unwrap().iter().map(|(k, v)| format!("{k} {v}")).collect::<std::collections::BTreeSet<_>>();
        assert_eq!(sorted(&ours), sorted(&theirs), "{}", case.name);

        // The same values under the same names give the same outputs.
        let mut views = Vec::new();
        for (i, tensor) in want["shapes"].as_array().unwrap().iter().enumerate() {
            let shape: Vec<usize> = tensor[1].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
            let bytes: Vec<u8> = wave(shape.iter().product(), 0.1 * i as f64).iter().flat_map(|v| (0.5 * v).to_le_bytes()).collect();
            views.push((tensor[0].as_str().unwrap().to_string(), shape, bytes));
        }
        let tensors = views
            .iter()
            .map(|(name, shape, bytes)| (name.clone(), safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap()));
        std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
        parameters.load(&path, 1).unwrap();
        let first: Vec<f32> = want["first"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
        let error = worst(&case.outputs(&parameters)[1][..first.len()], &first);
        assert!(error < 1e-5, "{}: {error}", case.name);
    }
}

#[test]
fn variants_that_are_not_built_are_named() {
    let (dir, device) = (tempfile::tempdir().unwrap(), open("cpu").unwrap());
    let path = dir.path().join("model.safetensors");
    let refused = |case: &Case, tensors: &[(&str, &[usize])]| {
        let zeros = vec![0u8; 4 * 4096];
        let views = tensors.iter().map(|(name, shape)| {
            let n = 4 * shape.iter().product::<usize>();
            (name.to_string(), safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &zeros[..n]).unwrap())
        });
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        Parameters::new(&device, 1, &case.declared(), 1).unwrap().load(&path, 0).unwrap_err().to_string()
    };
    let cases = cases();
    assert!(refused(&cases[0], &[("weight_ih_l0", &[20, 3]), ("weight_hr_l0", &[2, 5])]).contains("proj_size"));
    assert!(refused(&cases[0], &[("weight_ih_l0", &[20, 3]), ("weight_hh_l0", &[20, 5])]).contains("bias=False"));
    assert!(refused(&cases[2], &[("q_proj_weight", &[8, 8]), ("k_proj_weight", &[8, 4]), ("in_proj_bias", &[24])]).contains("kdim or vdim"));
    assert!(refused(&cases[2], &[("in_proj_weight", &[24, 8]), ("bias_k", &[1, 1, 8])]).contains("add_bias_kv"));
    assert!(refused(&cases[3], &[("linear1.weight", &[16, 8]), ("norm1.weight", &[8])]).contains("bias=False"));
    assert!(refused(&cases[3], &[("linear1.weight", &[16, 9])]).contains("'linear1.weight' is [16, 9], this model has [16, 8]"));
}

/// PyTorch loads what is saved here, computes the same, saves something else, and that is loaded here.
#[test]
fn checkpoints_go_to_pytorch_and_back() {
    let (dir, device) = (tempfile::tempdir().unwrap(), open("cpu").unwrap());
    let mut list = Vec::new();
    for case in cases() {
        let parameters = Parameters::new(&device, MODELS, &case.declared(), 9).unwrap();
        parameters.save(&dir.path().join(format!("{}.safetensors", case.name)), 1).unwrap();
        list.push(json!({ "name": case.name, "module": case.module, "arguments": case.arguments, "shape": [BATCH, STEPS, case.width],
            "x": case.x(), "y": case.outputs(&parameters)[1] }));
    }
    std::fs::write(dir.path().join("cases.json"), json!(list).to_string()).unwrap();
    let python = std::env::var("FORBACK_TORCH_PYTHON").unwrap_or_else(|_| "python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/torch_round_trip.py");
    let ran = match Command::new(&python).arg(&script).arg(dir.path()).output() {
        Ok(ran) if ran.status.code() != Some(77) => ran,
        Ok(ran) => return println!("skipped: {python}: {}; FORBACK_TORCH_PYTHON names one with torch", String::from_utf8_lossy(&ran.stdout).trim()),
        Err(error) => return println!("skipped: {python}: {error}"),
    };
    let said = format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success(), "{said}");
    print!("{said}");
    for case in cases() {
        let parameters = Parameters::new(&device, MODELS, &case.declared(), 1).unwrap();
        let before = case.outputs(&parameters);
        parameters.load(&dir.path().join(format!("{}.torch.safetensors", case.name)), 0).unwrap();
        let after = case.outputs(&parameters);
        let text = std::fs::read_to_string(dir.path().join(format!("{}.torch.json", case.name))).unwrap();
        let want: Vec<f32> = serde_json::from_str(&text).unwrap();
        let error = worst(&after[0], &want);
        assert!(error < 1e-5, "{}: {error}", case.name);
        assert_eq!(after[1], before[1], "{}: the other model", case.name);
        assert!(worst(&before[0], &want) > 1e-3, "{}: nothing was loaded", case.name);
    }
}
