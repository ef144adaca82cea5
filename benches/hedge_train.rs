//! Seconds of an epoch of an LSTM hedger's training, for benches/peers/hedge_train.py to compare with pfhedge on the same paths and weights.
//!
//!     cargo bench --bench hedge_train -- DIR [layers] [hidden]
//!
//! Writes spot.bin, weights.bin and shape.txt into DIR, prints the loss of the starting weights and the least of five epochs.

use forback::Device;
use forback::kernels::hedge_rollout::HedgeRollout;
use forback::kernels::philox::{normals, philox4x32};
use forback::nn::hedge::HedgePolicy;
use forback::ops::HedgeRisk;
use forback::train::hedge::{HedgeCosts, HedgeTrainConfig, HedgeTrainer};
use std::time::Instant;

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let Some(root) = args.first() else {
        println!("hedge_train: give a directory for the paths and weights that a peer reads");
        return Ok(());
    };
    let size = |i: usize, usual: usize| args.get(i).and_then(|x| x.parse().ok()).unwrap_or(usual);
    let (paths, steps, layers, hidden, maturity, volatility, cost) = (50_000, 30, size(1, 1), size(2, 32), 30.0 / 250.0, 0.2, 0.001);
    let dt = maturity / steps as f64;
    let mut spot = Vec::with_capacity(paths * (steps + 1));
    for path in 0..paths as u32 {
        let mut x = 0.0f64;
        spot.push(1.0);
        for t in 0..steps {
            let z = normals(philox4x32([path, 0, t as u32 / 4, 0], [7, 0]))[t % 4];
            x += volatility * dt.sqrt() * z - 0.5 * volatility * volatility * dt;
            spot.push(x.exp() as f32);
        }
    }
    let device = Device::open("cpu")?;
    let policy = HedgePolicy::lstm("hedger", layers, hidden);
    let op = HedgeRollout { maturity, volatility, ..policy.rollout(1, paths, steps) };
    let config = HedgeTrainConfig { risk: HedgeRisk::Entropic { risk_aversion: 1.0 }, max_grad_norm: None, ..HedgeTrainConfig::default() };
    let trainer = HedgeTrainer::new(&device, &policy, &op, &[HedgeCosts::proportional(cost)], &config)?;
    // A head that says something, so that the comparison of losses sees the network.
    let head: Vec<f32> = (0..hidden as u32).map(|i| 0.3 * normals(philox4x32([i, 1, 0, 0], [7, 0]))[0] as f32).collect();
    trainer.parameters().set("hedger.head.weight", &head)?;
    trainer.write(&spot, &[], &[])?;
    let mut weights = Vec::new();
    for tensor in trainer.parameters().tensors() {
        weights.extend(trainer.parameters().get(&tensor.name)?);
    }
    std::fs::create_dir_all(root)?;
    std::fs::write(format!("{root}/spot.bin"), bytes(&spot))?;
    std::fs::write(format!("{root}/weights.bin"), bytes(&weights))?;
    std::fs::write(format!("{root}/shape.txt"), format!("{paths} {steps} {hidden} {layers} {maturity} {volatility} {cost}"))?;
    println!("forback loss {:.6}", trainer.step()?[0]);
    let mut least = f64::INFINITY;
    for _ in 0..5 {
        let start = Instant::now();
        trainer.step()?;
        least = least.min(start.elapsed().as_secs_f64());
    }
    println!("forback {least:.3} s an epoch, {paths} paths x {steps} steps, {layers} x {hidden} units");
    Ok(())
}
