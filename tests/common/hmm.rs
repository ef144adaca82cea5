//! Guarded launches of the hidden Markov kernels.

use super::{Guarded, Guards};
use crate::common::Rng;
use forback::kernels::DeviceKind;
use forback::kernels::hmm::{
    Emission, HMM_EMISSION, HMM_FORWARD_BACKWARD, HMM_FORWARD_BACKWARD_4, HMM_FORWARD_BACKWARD_8, HMM_FORWARD_BACKWARD_STATES_4, HMM_FORWARD_BACKWARD_STATES_8,
    HMM_FORWARD_BACKWARD_TABLE_4, HMM_FORWARD_BACKWARD_TABLE_8, HmmParams, flag,
};
use forback::kernels::hmm_baum_welch::{BaumWelchParams, HMM_EXPECTATION, HMM_EXPECTATION_LANES, HMM_MAXIMISATION, HMM_REDUCE, HMM_SUMS};
use forback::kernels::hmm_forecast::{HMM_FORECAST, HMM_SOJOURN, HMM_SOJOURN_AVERAGE, HmmForecastParams, SOJOURN};
use forback::kernels::hmm_gradient::{
    HMM_GRADIENT_CHAIN, HMM_GRADIENT_EMISSION, HMM_GRADIENT_REDUCE, HMM_GRADIENT_SOFTMAX, HMM_GRADIENT_STEPS, HMM_GRADIENT_TABLE, HMM_TANGENT,
    HMM_TANGENT_POSTERIOR, HmmGradientParams, HmmReduceParams,
};
use forback::kernels::hmm_sample::{HMM_SAMPLE, HMM_SAMPLE_OBSERVATIONS, HMM_SAMPLE_POSTERIOR, HMM_WEIGHTS, HmmSampleParams};
use forback::kernels::hmm_scan::{HMM_SCAN_BACKWARD, HMM_SCAN_CHUNKS, HMM_SCAN_DOWN, HMM_SCAN_FORWARD, HMM_SCAN_MERGE, HMM_SCAN_SUM, HmmScanParams};
use forback::kernels::hmm_viterbi::{HMM_VITERBI, HMM_VITERBI_LANES, HMM_VITERBI_PATH, HmmViterbiParams, NONE};
use forback::kernels::kernel::{Elem, Kernel, Params};

/// No words, no inputs.
struct Nothing {
    words: Guarded,
    reals: Guarded,
}

/// Launches every hidden Markov kernel on sizes that leave its last workgroup half empty.
pub(super) fn guarded(g: &mut Guards, rng: &mut Rng) {
    let nothing = Nothing { words: g.words(&[0]), reals: g.reals(&[0.0]) };
    forward_backward(g, rng, &nothing);
    viterbi(g, rng, &nothing);
    sample(g, rng, &nothing);
    forecast(g, rng, &nothing);
    gradient(g, rng, &nothing);
    baum_welch(g, rng);
    scan(g, rng, &nothing);
}

/// The kernel, or its name alone on a device for which another kernel does its work.
fn launch<P: Params>(g: &mut Guards, kernel: &'static Kernel, params: &P, args: &[&Guarded]) {
    if kernel.cpu.is_none() && matches!(g.device.info().kind, DeviceKind::Cpu | DeviceKind::Reference) {
        g.launched.insert(kernel.name);
        return;
    }
    g.launch(kernel, params, args);
}

fn zeroed<P: Params>() -> P {
    P::zeroed()
}

/// Rows of logarithms of probabilities.
fn rows(rng: &mut Rng, n: usize, k: usize) -> Vec<f32> {
    let row = |rng: &mut Rng| {
        let x: Vec<f64> = (0..k).map(|_| 0.1 + rng.unit()).collect();
        let sum: f64 = x.iter().sum();
        x.into_iter().map(|x| (x / sum).ln() as f32).collect::<Vec<_>>()
    };
    (0..n).flat_map(|_| row(rng)).collect()
}

fn probabilities(rng: &mut Rng, n: usize, k: usize) -> Vec<f32> {
    rows(rng, n, k).into_iter().map(f32::exp).collect()
}

/// log_init, mean, 1/deviation, constant of normal states.
fn normals(rng: &mut Rng, k: usize, d: usize) -> Vec<f32> {
    let means: Vec<f32> = rng.returns(k * d, 0.0, 1.0);
    [rows(rng, 1, k), means, vec![1.25; k * d], vec![-0.7; k]].concat()
}

/// A thread, several threads and a workgroup's lanes per sequence; every output, once with pairs step by step and once with their sum.
fn forward_backward(g: &mut Guards, rng: &mut Rng, nothing: &Nothing) {
    let (b, t, d) = (3usize, 7usize, 2usize);
    let kernels = [
        (&HMM_FORWARD_BACKWARD_4, 3),
        (&HMM_FORWARD_BACKWARD_TABLE_4, 3),
        (&HMM_FORWARD_BACKWARD_STATES_4, 3),
        (&HMM_FORWARD_BACKWARD_8, 6),
        (&HMM_FORWARD_BACKWARD_TABLE_8, 6),
        (&HMM_FORWARD_BACKWARD_STATES_8, 6),
        (&HMM_FORWARD_BACKWARD, 9),
    ];
    for (kernel, k) in kernels {
        let states_alone = kernel.name.contains("states");
        for (more, pairs) in [(flag::PREDICTED | flag::PAIR_STEPS, (t - 1) * k * k), (flag::PREDICTED | flag::PAIR_SUM, k * k), (0, 0)] {
            if states_alone && more != 0 {
                continue;
            }
            let wanted = flag::FILTERED | flag::POSTERIOR | more;
            let sections = if more == 0 { 2 } else { 3 };
            let params = HmmParams {
                b: b as u32,
                t: t as u32,
                k: k as u32,
                stride: k as u32,
                flags: wanted | flag::LENGTHS | flag::FORWARD | flag::BACKWARD | flag::PARK,
                end: t as u32,
                record: 4,
                ..zeroed()
            };
            let (model, log_trans, obs) = (g.reals(&rows(rng, 1, k)), g.reals(&rows(rng, k, k)), g.reals(&rng.returns(b * t * k, -1.0, 0.5)));
            let lengths = g.words(&[7, 4, 1]);
            let [states, summary] = [sections * b * t * k, b * 4].map(|n| g.out(Elem::F32, n));
            // Bound, but not written where no pairs are wanted.
            let pair = if pairs > 0 { g.out(Elem::F32, b * pairs) } else { g.reals(&[0.0]) };
            g.launch(kernel, &params, &[&model, &obs, &lengths, &log_trans, &nothing.reals, &states, &pair, &summary]);
        }
    }
    let k = 3;
    let params = HmmParams {
        b: b as u32,
        t: t as u32,
        k: k as u32,
        d: d as u32,
        emission: Emission::GaussianDiagonal.code(),
        stride: (2 * k + 2 * k * d) as u32,
        end: t as u32,
        ..zeroed()
    };
    let (model, obs, log_obs) = (g.reals(&normals(rng, k, d)), g.reals(&rng.returns(b * t * d, 0.0, 1.0)), g.out(Elem::F32, b * t * k));
    g.launch(&HMM_EMISSION, &params, &[&model, &obs, &nothing.words, &log_obs]);
}

fn viterbi(g: &mut Guards, rng: &mut Rng, nothing: &Nothing) {
    let (b, t) = (5usize, 7usize);
    for (kernel, k, lanes, pointer_words) in [(&HMM_VITERBI, 3usize, 1, 2usize), (&HMM_VITERBI_LANES, 6, 8, 7)] {
        let params =
            HmmViterbiParams { b: b as u32, t: t as u32, k: k as u32, to_step: t as u32, carry_out: 1, pointer_words: pointer_words as u32, lanes, ..zeroed() };
        let (model, log_trans, obs) = (g.reals(&rows(rng, 1, k)), g.reals(&rows(rng, k, k)), g.reals(&rng.returns(b * t * k, -1.0, 0.5)));
        // Slot 1 alone is written.
        let (carry, ends, pointers) = (g.reals(&vec![0.0; 2 * b * (k + 2)]), g.words(&vec![0; 4 * b]), g.out(Elem::U32, b * pointer_words));
        g.launch(kernel, &params, &[&model, &obs, &nothing.words, &log_trans, &nothing.reals, &carry, &ends, &pointers]);
        let [state, path, failed] = [b, b * t, b].map(|n| g.out(Elem::U32, n));
        let log_prob = g.out(Elem::F32, 2 * b);
        let params = HmmViterbiParams { carry_in: 1, ..params };
        g.launch(&HMM_VITERBI_PATH, &params, &[&carry, &nothing.words, &ends, &pointers, &state, &path, &log_prob, &failed]);
    }
}

fn sample(g: &mut Guards, rng: &mut Rng, nothing: &Nothing) {
    let (b, t, k, d, draws) = (3usize, 7usize, 3usize, 2usize, 2usize);
    let params = HmmSampleParams {
        b: b as u32,
        t: t as u32,
        k: k as u32,
        d: d as u32,
        draws: 1,
        emission: Emission::GaussianDiagonal.code(),
        to_step: t as u32,
        seed: 5,
        ..zeroed()
    };
    let (model, log_trans) = (g.reals(&normals(rng, k, d)), g.reals(&rows(rng, k, k)));
    let [init_weights, weights] = [2 * k + 2 * k * d, k * k].map(|n| g.out(Elem::U32, n));
    for (from, to) in [(&model, &init_weights), (&log_trans, &weights)] {
        g.launch(&HMM_WEIGHTS, &HmmSampleParams { b: from.1 as u32, ..zeroed() }, &[from, to]);
    }
    let (states, obs) = (g.out(Elem::U32, b * t), g.out(Elem::F32, b * t * d));
    g.launch(&HMM_SAMPLE, &params, &[&init_weights, &weights, &nothing.words, &log_trans, &nothing.reals, &states]);
    g.launch(&HMM_SAMPLE_OBSERVATIONS, &params, &[&model, &nothing.words, &states, &obs]);
    let (filtered, states) = (g.reals(&probabilities(rng, b * t, k)), g.out(Elem::U32, b * draws * t));
    let params = HmmSampleParams { draws: draws as u32, ..params };
    g.launch(&HMM_SAMPLE_POSTERIOR, &params, &[&filtered, &nothing.words, &log_trans, &nothing.reals, &states]);
}

fn forecast(g: &mut Guards, rng: &mut Rng, nothing: &Nothing) {
    let (b, h, k) = (3usize, 4usize, 3usize);
    let params = HmmForecastParams { b: b as u32, h: h as u32, k: k as u32, to_step: h as u32, lanes: 4, cap: 1e4, log_left: -0.7, ..zeroed() };
    let (probability, log_trans) = (g.reals(&probabilities(rng, b, k)), g.reals(&rows(rng, k, k)));
    let [forecast, survival, sojourn, expected] = [b * h * k, b * h * k, SOJOURN as usize * b * k, b].map(|n| g.out(Elem::F32, n));
    let capped = g.out(Elem::U32, b * k);
    g.launch(&HMM_FORECAST, &params, &[&probability, &log_trans, &nothing.reals, &forecast]);
    g.launch(&HMM_SOJOURN, &params, &[&log_trans, &nothing.reals, &survival, &sojourn, &capped]);
    g.launch(&HMM_SOJOURN_AVERAGE, &params, &[&probability, &sojourn, &expected]);
}

fn gradient(g: &mut Guards, rng: &mut Rng, nothing: &Nothing) {
    let (b, t, k, d, u) = (3usize, 5usize, 3usize, 2usize, 1usize);
    let (each, p) = (t * k, k + 2 * k * d);
    let params = HmmGradientParams {
        b: b as u32,
        t: t as u32,
        k: k as u32,
        d: d as u32,
        u: u as u32,
        p: p as u32,
        blocks: 1,
        lanes: 4,
        emission: Emission::GaussianDiagonal.code(),
        end: t as u32,
        start_stride: 2 * each as u32,
        start_offset: k as u32,
        ..zeroed()
    };
    let [filtered, predicted, posterior] = [(); 3].map(|()| g.reals(&probabilities(rng, b * t, k)));
    let upstream = g.reals(&rng.returns(b, 1.0, 0.5));
    let [grad_log_obs, chain] = [b * each, 2 * b * each].map(|n| g.out(Elem::F32, n));
    g.launch(&HMM_GRADIENT_CHAIN, &params, &[&filtered, &predicted, &posterior, &upstream, &nothing.words, &grad_log_obs, &chain]);
    let (obs, model) = (g.reals(&rng.returns(b * t * d, 0.0, 1.0)), g.reals(&normals(rng, k, d)));
    let partials = g.out(Elem::F32, b * p);
    g.launch(&HMM_GRADIENT_EMISSION, &params, &[&chain, &grad_log_obs, &obs, &model, &partials]);
    let sums = g.out(Elem::F32, 2 * p);
    g.launch(&HMM_GRADIENT_REDUCE, &HmmReduceParams { rows: b as u32, p: p as u32, block: 2 }, &[&partials, &sums]);

    let (table, of_table) = (g.reals(&rows(rng, k, k)), g.out(Elem::F32, b * k * k));
    g.launch(&HMM_GRADIENT_TABLE, &params, &[&chain, &table, &chain, &chain, &of_table]);
    // It adds to what is there.
    let (tables, of_steps) = (g.reals(&rows(rng, (t - 1) * k, k)), g.reals(&vec![0.0; (t - 1) * k * k]));
    let by_step = HmmGradientParams { p: 1, trans_step: (k * k) as u32, ..params };
    g.launch(&HMM_GRADIENT_STEPS, &by_step, &[&chain, &tables, &chain, &chain, &of_steps]);
    let (weights, inputs) = (g.reals(&rng.returns(k * k * (u + 1), 0.0, 0.5)), g.reals(&rng.returns(b * t * u, 0.0, 1.0)));
    let (of_weights, driven) = (g.out(Elem::F32, b * k * k * (u + 1)), HmmGradientParams { flags: flag::SOFTMAX, ..params });
    g.launch(&HMM_GRADIENT_SOFTMAX, &driven, &[&chain, &weights, &chain, &chain, &inputs, &of_weights]);

    let moves = 7 << 18;
    let moving = HmmGradientParams { flags: flag::FORWARD | flag::BACKWARD | moves, ..params };
    let [init, trans, log_obs] = [k, k * k, b * each].map(|n| g.reals(&rng.returns(n, 0.0, 1.0)));
    let tangent = g.out(Elem::F32, 3 * b * each);
    g.launch(&HMM_TANGENT, &moving, &[&chain, &table, &nothing.reals, &nothing.words, &init, &trans, &log_obs, &tangent]);
    let [slopes, grad_log_obs] = [(); 2].map(|()| g.out(Elem::F32, b * each));
    g.launch(&HMM_TANGENT_POSTERIOR, &params, &[&tangent, &nothing.words, &slopes, &grad_log_obs]);
}

/// One iteration: two models of two sequences each.
fn baum_welch(g: &mut Guards, rng: &mut Rng) {
    let (models, per_model, t) = (2usize, 2usize, 9usize);
    let jobs = models * per_model;
    for (kernel, k, d) in [(&HMM_EXPECTATION, 3usize, 1usize), (&HMM_EXPECTATION_LANES, 6, 2)] {
        let params = BaumWelchParams {
            jobs: jobs as u32,
            models: models as u32,
            restarts: 1,
            per_model: per_model as u32,
            t: t as u32,
            k: k as u32,
            d: d as u32,
            emission: Emission::GaussianDiagonal.code(),
            end: t as u32,
            phase: 3,
            action: 1,
            ..zeroed()
        };
        let width = k + k * k + k * (1 + 2 * d) + 3;
        let natural: Vec<f32> = (0..models).flat_map(|_| [probabilities(rng, 1 + k, k), rng.returns(k * d, 0.0, 1.0), vec![0.8; k * d]].concat()).collect();
        let packed: Vec<f32> = (0..models).flat_map(|_| normals(rng, k, d)).collect();
        let (obs, lengths) = (g.reals(&rng.returns(jobs * t * d, 0.0, 1.0)), g.words(&[9, 5, 9, 1]));
        let (parameters, packed) = (g.reals(&natural), g.reals(&packed));
        // The host's columns need no states; γ past a length is never written.
        let (status, states) = (g.words(&vec![0; 2 * models]), g.reals(&vec![0.0; 3 * jobs * t * k]));
        let statistics = if k > 4 { g.reals(&vec![0.0; jobs * width]) } else { g.out(Elem::F32, jobs * width) };
        let args = [&obs, &lengths, &parameters, &packed, &status, &states, &statistics];
        launch(g, kernel, &params, &args);
        launch(g, &HMM_SUMS, &params, &[&obs, &lengths, &parameters, &status, &states, &statistics]);
        let totals = g.out(Elem::F32, models * width);
        g.launch(&HMM_REDUCE, &params, &[&statistics, &totals]);
        let guards = g.reals(&[vec![1e-6; d], vec![0.0; d]].concat().repeat(models));
        let [model, log_trans] = [models * (2 * k + 2 * k * d), models * k * k].map(|n| g.out(Elem::F32, n));
        let path = g.reals(&vec![0.0; 4 * models]);
        g.launch(&HMM_MAXIMISATION, &params, &[&guards, &totals, &parameters, &model, &log_trans, &status, &path]);
    }
}

/// Three chunks, the last one short; one level of groups above them.
fn scan(g: &mut Guards, rng: &mut Rng, nothing: &Nothing) {
    let (b, t, k, chunks) = (2usize, 130usize, 3usize, 3usize);
    let element = k * (k + 1);
    let params = HmmScanParams {
        b: b as u32,
        t: t as u32,
        k: k as u32,
        chunk: 64,
        chunks: chunks as u32,
        filtered: 0,
        predicted: 1,
        posterior: NONE,
        park: 0,
        record: 4,
        ..zeroed()
    };
    let (model, log_trans, obs) = (g.reals(&rows(rng, 1, k)), g.reals(&rows(rng, k, k)), g.reals(&rng.returns(b * t * k, -1.0, 0.5)));
    // The groups' elements lie behind those of the chunks.
    let elements = g.reals(&vec![0.0; b * (chunks + 1) * element]);
    g.launch(&HMM_SCAN_CHUNKS, &params, &[&model, &obs, &nothing.words, &log_trans, &elements]);
    let level = HmmScanParams { children: chunks as u32, groups: 1, group_at: (b * chunks * element) as u32, root: 1, ..params };
    g.launch(&HMM_SCAN_MERGE, &level, &[&elements]);
    let vectors = g.out(Elem::F32, 2 * b * chunks * k);
    g.launch(&HMM_SCAN_DOWN, &HmmScanParams { group_at: 0, ..level }, &[&elements, &vectors]);
    let [states, records, summary] = [2 * b * t * k, 4 * b * chunks, 4 * b].map(|n| g.out(Elem::F32, n));
    g.launch(&HMM_SCAN_FORWARD, &params, &[&model, &obs, &nothing.words, &log_trans, &vectors, &states, &records]);
    g.launch(&HMM_SCAN_SUM, &params, &[&records, &summary]);
    let backward = HmmScanParams { predicted: NONE, posterior: 1, ..params };
    g.launch(&HMM_SCAN_BACKWARD, &backward, &[&nothing.words, &log_trans, &vectors, &summary, &states]);
}
