// One step of an optimiser for all parameters of all models. Maths, shapes and source: kernels/optimiser.rs.
//   gradient_norm, adam_update, sgd_update, parameter_average   grid  blocks of each model     thread t takes values t, t+WG, …
//   optimiser_prepare                                           grid  models                   thread t takes block sums t, t+WG, …
//   table [B,4]: offset and size of the block's tensor, first value in a model's part, tensor
//   scratch [M, 3·blocks + SCALES]: sums of each block, then gradient factor, taken, step, root, decay, rate1, rate2, average

struct OptimiserParams {
    blocks: u32,
    stride: u32,
    first_block: u32,
    block_count: u32,
    first_model: u32,
    count: u32,
    element: u32,
    row: u32,
    algorithm: u32,
    flags: u32,
    average_start: u32,
    learning_rate: f32,
    learning_rate_low: f32,
    rate1: f32,
    rate1_low: f32,
    rate2: f32,
    rate2_low: f32,
    log1: f32,
    log1_low: f32,
    log2: f32,
    log2_low: f32,
    eps: f32,
    eps_low: f32,
    weight_decay: f32,
    weight_decay_low: f32,
    max_grad_norm: f32,
    max_grad_norm_low: f32,
    average_rate: f32,
    average_rate_low: f32,
}

@group(0) @binding(0) var<uniform> params: OptimiserParams;

override WG: u32 = 256u;
override BLOCK: u32 = 2048u;
const SCALES: u32 = 8u;
const DECAY: u32 = 1u;
const AVERAGE: u32 = 2u;
const LOSS: u32 = 4u;
const HYPER: u32 = 8u;
const NESTEROV: u32 = 16u;
const MOMENTUM: u32 = 32u;
const POLYAK: u32 = 64u;
const LARGE: f32 = 1125899906842624.0;
const SHRINK: f32 = 8.271806e-25;
const GROW: f32 = 1.2089258e24;
const LARGEST_NORM: f32 = 1e18;
const CLIP_EPS: f32 = 1e-6;

var<workgroup> sh_sums: array<vec3<f32>, WG>;

fn reduce(tid: u32) -> vec3<f32> {
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if tid < half {
            sh_sums[tid] += sh_sums[tid + half];
        }
        workgroupBarrier();
    }
    return sh_sums[0];
}

fn is_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}

// ---- norm -------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> grads: array<f32>;
@group(0) @binding(2) var<storage, read> table_of_norm: array<u32>;
@group(0) @binding(3) var<storage, read_write> scratch: array<f32>;

@compute @workgroup_size(WG)
fn gradient_norm(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.count {
        return;
    }
    let model = params.first_model + group / params.block_count;
    let block = params.first_block + group % params.block_count;
    let size = table_of_norm[4u * block + 1u];
    let begin = table_of_norm[4u * block + 2u];
    let at = table_of_norm[4u * block] + model * size + begin - params.element;
    let len = min(BLOCK, size - begin);
    var sums = vec3<f32>(0.0);
    for (var i = tid; i < len; i += WG) {
        let x = grads[at + i];
        if !is_finite(x) {
            sums.z += 1.0;
        } else if abs(x) > LARGE {
            let y = x * SHRINK;
            sums.y += y * y;
        } else {
            sums.x += x * x;
        }
    }
    sh_sums[tid] = sums;
    let total = reduce(tid);
    if tid == 0u {
        let out = model * params.stride - params.row + 3u * block;
        scratch[out] = total.x;
        scratch[out + 1u] = total.y;
        scratch[out + 2u] = total.z;
    }
}

// ---- scales -----------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> rate: array<f32>;
@group(0) @binding(2) var<storage, read> loss: array<f32>;
@group(0) @binding(3) var<storage, read> hyper: array<f32>;
@group(0) @binding(4) var<storage, read_write> model_scratch: array<f32>;
@group(0) @binding(5) var<storage, read_write> counters: array<u32>;
@group(0) @binding(6) var<storage, read_write> norm: array<f32>;

// ln β from 1 − β.
fn log_beta(q: f32) -> f32 {
    if q < 0.5 {
        return -twice_artanh(q / (2.0 - q));
    }
    return max(log_f32(max(1.0 - q, 1e-30)), -1e4);
}

// 1 − βᵗ from y = t·ln β ≤ 0.
fn bias(y: f32) -> f32 {
    if y < -0.35 {
        return 1.0 - exp_f32(y);
    }
    let tail = 1.0 + y * 0.2 * (1.0 + y * 0.16666667 * (1.0 + y * 0.14285715 * (1.0 + y * 0.125)));
    return -y * (1.0 + y * 0.5 * (1.0 + y * 0.33333334 * (1.0 + y * 0.25 * tail)));
}

@compute @workgroup_size(WG)
fn optimiser_prepare(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let m = group_index(wid, nwg);
    if m >= params.count {
        return;
    }
    let row = m * params.stride;
    var sums = vec3<f32>(0.0);
    for (var b = tid; b < params.blocks; b += WG) {
        sums += vec3<f32>(model_scratch[row + 3u * b], model_scratch[row + 3u * b + 1u], model_scratch[row + 3u * b + 2u]);
    }
    sh_sums[tid] = sums;
    let total = reduce(tid);
    if tid > 0u {
        return;
    }
    let sgd = params.algorithm == 2u;
    var rate1 = params.rate1;
    var rate2 = params.rate2;
    var log1 = params.log1;
    var log2 = params.log2;
    var weight_decay = params.weight_decay;
    var max_norm = params.max_grad_norm;
    if (params.flags & HYPER) != 0u {
        rate1 = select(1.0 - hyper[4u * m], hyper[4u * m], sgd);
        rate2 = 1.0 - hyper[4u * m + 1u];
        log1 = log_beta(1.0 - hyper[4u * m]);
        log2 = log_beta(rate2);
        weight_decay = hyper[4u * m + 2u];
        max_norm = hyper[4u * m + 3u];
    }
    // norm = unit · 2^80 where large values are among the gradients
    let large = total.y > 0.0;
    let unit = sqrt(select(total.x, total.y + total.x * SHRINK * SHRINK, large));
    let too_long = large && unit > LARGEST_NORM * SHRINK;
    let clips = max_norm > 0.0;
    var status = 0u;
    if total.z > 0.0 {
        status = 1u;
    } else if !clips && (too_long || (!large && unit > LARGEST_NORM)) {
        status = 4u;
    }
    if (params.flags & LOSS) != 0u && !is_finite(loss[m]) {
        status += 2u;
    }
    counters[3u * m + 2u] = status;
    let out = row + 3u * params.blocks;
    if status != 0u {
        counters[3u * m + 1u] += 1u;
        norm[m] = UNDEFINED;
        model_scratch[out + 1u] = 0.0;
        return;
    }
    let steps = counters[3u * m] + 1u;
    counters[3u * m] = steps;
    // the largest f32 stands for a norm beyond it
    norm[m] = select(unit, min(unit, 2.8147496e14) * GROW, large);
    var factor = 1.0;
    if clips {
        factor = min(select(max_norm / (unit + CLIP_EPS), max_norm * SHRINK / unit, large), 1.0);
    }
    let t = f32(steps);
    let lr = params.learning_rate * rate[m];
    var step_size = lr;
    var root = 1.0;
    if !sgd {
        step_size = lr / bias(t * log1);
        root = 1.0 / sqrt(bias(t * log2));
    }
    var average = params.average_rate;
    if (params.flags & POLYAK) != 0u {
        average = 1.0;
        if steps > params.average_start {
            average = 1.0 / f32(steps - params.average_start);
        }
    } else if steps == 1u {
        average = 1.0;
    }
    model_scratch[out] = factor;
    model_scratch[out + 1u] = 1.0;
    model_scratch[out + 2u] = step_size;
    model_scratch[out + 3u] = root;
    model_scratch[out + 4u] = select(weight_decay, lr * weight_decay, params.algorithm == 0u);
    model_scratch[out + 5u] = rate1;
    model_scratch[out + 6u] = rate2;
    model_scratch[out + 7u] = average;
}

// ---- updates ----------------------------------------------------------------------------------------------------

@group(0) @binding(2) var<storage, read> scratch_in: array<f32>;
@group(0) @binding(3) var<storage, read> decay: array<f32>;
@group(0) @binding(4) var<storage, read> table: array<u32>;
@group(0) @binding(5) var<storage, read_write> parameters: array<f32>;
@group(0) @binding(6) var<storage, read_write> moment1: array<f32>;
@group(0) @binding(7) var<storage, read_write> moment2: array<f32>;
@group(0) @binding(8) var<storage, read_write> average: array<f32>;

// A workgroup's share: scales in the scratch, first value, number of values, tensor.
struct Share {
    scales: u32,
    at: u32,
    len: u32,
    tensor: u32,
}

fn share_from(group: u32, entry: vec4<u32>) -> Share {
    let model = params.first_model + group / params.block_count;
    let scales = model * params.stride - params.row + 3u * params.blocks;
    return Share(scales, entry.x + model * entry.y + entry.z - params.element, min(BLOCK, entry.y - entry.z), entry.w);
}

fn share_of(group: u32) -> Share {
    let b = 4u * (params.first_block + group % params.block_count);
    return share_from(group, vec4<u32>(table[b], table[b + 1u], table[b + 2u], table[b + 3u]));
}

// Weight decay of the share's tensor.
fn decay_of(share: Share) -> f32 {
    if (params.flags & DECAY) != 0u {
        return scratch_in[share.scales + 4u] * decay[share.tensor];
    }
    return scratch_in[share.scales + 4u];
}

fn averaged(old: f32, w: f32, weight: f32) -> f32 {
    return select(old + (w - old) * weight, w, weight == 1.0);
}

@compute @workgroup_size(WG)
fn adam_update(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.count {
        return;
    }
    let share = share_of(group);
    let s = share.scales;
    if scratch_in[s + 1u] == 0.0 {
        return;
    }
    let factor = scratch_in[s];
    let step_size = scratch_in[s + 2u];
    let root = scratch_in[s + 3u];
    let d = decay_of(share);
    let rate1 = scratch_in[s + 5u];
    let rate2 = scratch_in[s + 6u];
    let weight = scratch_in[s + 7u];
    let coupled = params.algorithm == 1u;
    for (var i = tid; i < share.len; i += WG) {
        let at = share.at + i;
        let w = parameters[at];
        let g = grads[at] * factor + select(0.0, d * w, coupled);
        let kept = select(w - w * d, w, coupled);
        let m = (moment1[at] - moment1[at] * rate1) + g * rate1;
        let v = (moment2[at] - moment2[at] * rate2) + g * g * rate2;
        let next = kept - step_size * m / (sqrt(v) * root + params.eps);
        moment1[at] = m;
        moment2[at] = v;
        parameters[at] = next;
        if (params.flags & AVERAGE) != 0u {
            average[at] = averaged(average[at], next, weight);
        }
    }
}

@group(0) @binding(6) var<storage, read_write> momentum: array<f32>;

@compute @workgroup_size(WG)
fn sgd_update(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.count {
        return;
    }
    let share = share_of(group);
    let s = share.scales;
    if scratch_in[s + 1u] == 0.0 {
        return;
    }
    let factor = scratch_in[s];
    let step_size = scratch_in[s + 2u];
    let d = decay_of(share);
    let keep = scratch_in[s + 5u];
    for (var i = tid; i < share.len; i += WG) {
        let at = share.at + i;
        let w = parameters[at];
        var g = grads[at] * factor + d * w;
        if (params.flags & MOMENTUM) != 0u {
            let b = momentum[at] * keep + g;
            momentum[at] = b;
            g = select(b, g + keep * b, (params.flags & NESTEROV) != 0u);
        }
        parameters[at] = w - step_size * g;
    }
}

@group(0) @binding(1) var<storage, read> parameters_in: array<f32>;
@group(0) @binding(3) var<storage, read> table_of_average: array<u32>;
@group(0) @binding(4) var<storage, read_write> average_out: array<f32>;

@compute @workgroup_size(WG)
fn parameter_average(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.count {
        return;
    }
    let b = 4u * (params.first_block + group % params.block_count);
    let entry = vec4<u32>(table_of_average[b], table_of_average[b + 1u], table_of_average[b + 2u], table_of_average[b + 3u]);
    let share = share_from(group, entry);
    if scratch_in[share.scales + 1u] == 0.0 {
        return;
    }
    for (var i = tid; i < share.len; i += WG) {
        average_out[share.at + i] = averaged(average_out[share.at + i], parameters_in[share.at + i], scratch_in[share.scales + 7u]);
    }
}
