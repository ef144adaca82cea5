// Losses of predictions, one value per model, and their gradients. Maths, shapes and source: kernels/loss.rs.
//   loss_elements, …_backward                        grid  blocks of BLOCK elements of each model     thread t takes elements t, t+WG, …
//   loss_cross_entropy, loss_kl, …_backward          grid  blocks of WG rows of each model            thread = row
//   loss_mean                                        grid  models                                     thread t takes blocks t, t+WG, …

struct LossParams {
    rows: u32,
    columns: u32,
    blocks: u32,
    first: u32,
    count: u32,
    prediction_base: u32,
    target_base: u32,
    weight_base: u32,
    block_base: u32,
    target_stride: u32,
    weight_stride: u32,
    kind: u32,
    weighted: u32,
    option: f32,
    option_low: f32,
}

@group(0) @binding(0) var<uniform> params: LossParams;
@group(0) @binding(1) var<storage, read> prediction: array<f32>;

override WG: u32 = 256u;
override BLOCK: u32 = 4096u;
const MSE: u32 = 0u;
const HUBER: u32 = 1u;
const BCE: u32 = 2u;
const PINBALL: u32 = 3u;

var<workgroup> sh_sums: array<vec2<f32>, WG>;

fn reduce(tid: u32, mine: vec2<f32>) -> vec2<f32> {
    sh_sums[tid] = mine;
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

// Not a number, by bits that the compiler does not know.
fn not_a_number() -> f32 {
    return bitcast<f32>(0x7fc00000u | min(params.count, 1u));
}

// ---- elements ---------------------------------------------------------------------------------------------------

@group(0) @binding(2) var<storage, read> target_in: array<f32>;
@group(0) @binding(3) var<storage, read> weight: array<f32>;
@group(0) @binding(4) var<storage, read> quantiles: array<f32>;
@group(0) @binding(5) var<storage, read_write> sums: array<f32>;

// An element: its prediction's index, target, quantile and weight.
struct Element {
    at: u32,
    y: f32,
    tau: f32,
    w: f32,
}

fn element_at(model: u32, i: u32) -> Element {
    var e: Element;
    e.at = model * params.rows * params.columns - params.prediction_base + i;
    let row = i / params.columns;
    let target_at = model * params.target_stride - params.target_base;
    if params.kind == PINBALL {
        e.y = target_in[target_at + row];
        e.tau = quantiles[i - row * params.columns];
    } else {
        e.y = target_in[target_at + i];
    }
    e.w = 1.0;
    if params.weighted == 1u {
        e.w = weight[model * params.weight_stride - params.weight_base + row];
    }
    return e;
}

fn element_loss(x: f32, y: f32, tau: f32) -> f32 {
    let e = x - y;
    let o = params.option;
    switch params.kind {
        case MSE: {
            return e * e;
        }
        case HUBER: {
            return select(o * (abs(e) - 0.5 * o), 0.5 * e * e, abs(e) < o);
        }
        case BCE: {
            return (1.0 - y) * x + (1.0 + (o - 1.0) * y) * (log_1p(exp_f32(-abs(x))) + max(-x, 0.0));
        }
        default: {
            return select((1.0 - tau) * e, -tau * e, e < 0.0);
        }
    }
}

fn element_slope(x: f32, y: f32, tau: f32) -> f32 {
    let e = x - y;
    let o = params.option;
    switch params.kind {
        case MSE: {
            return e + e;
        }
        case HUBER: {
            return clamp(e, -o, o);
        }
        case BCE: {
            let z = exp_f32(-abs(x));
            let away = select(z, 1.0, x < 0.0) / (1.0 + z);
            return (1.0 - y) - (1.0 + (o - 1.0) * y) * away;
        }
        default: {
            return select(select(0.0, 1.0 - tau, e > 0.0), -tau, e < 0.0);
        }
    }
}

@compute @workgroup_size(WG)
fn loss_elements(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.count {
        return;
    }
    let block = params.first + group;
    let model = block / params.blocks;
    let inside = block % params.blocks * BLOCK;
    let last = min(inside + BLOCK, params.rows * params.columns);
    var mine = vec2<f32>(0.0);
    for (var i = inside + tid; i < last; i += WG) {
        let e = element_at(model, i);
        let x = prediction[e.at];
        if e.w != 0.0 {
            var value = element_loss(x, e.y, e.tau);
            if !is_finite(x) || !is_finite(e.y) {
                value = not_a_number();
            }
            mine += vec2<f32>(e.w * value, e.w);
        }
    }
    let total = reduce(tid, mine);
    if tid == 0u {
        sums[2u * block - params.block_base] = total.x;
        sums[2u * block - params.block_base + 1u] = total.y;
    }
}

@group(0) @binding(5) var<storage, read> total_of_elements: array<f32>;
@group(0) @binding(6) var<storage, read> grad_value_of_elements: array<f32>;
@group(0) @binding(7) var<storage, read_write> grad_prediction_elements: array<f32>;

@compute @workgroup_size(WG)
fn loss_elements_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.count {
        return;
    }
    let block = params.first + group;
    let model = block / params.blocks;
    let inside = block % params.blocks * BLOCK;
    let last = min(inside + BLOCK, params.rows * params.columns);
    let total = total_of_elements[model];
    var scale = 0.0;
    if total != 0.0 {
        scale = grad_value_of_elements[model] / total;
    }
    for (var i = inside + tid; i < last; i += WG) {
        let e = element_at(model, i);
        let x = prediction[e.at];
        var grad = 0.0;
        if e.w != 0.0 {
            grad = scale * e.w * element_slope(x, e.y, e.tau);
            if !is_finite(x) || !is_finite(e.y) {
                grad = not_a_number();
            }
        }
        grad_prediction_elements[e.at] = grad;
    }
}

// ---- rows -------------------------------------------------------------------------------------------------------

@group(0) @binding(2) var<storage, read> classes: array<u32>;
@group(0) @binding(4) var<storage, read_write> sums_of_rows: array<f32>;
@group(0) @binding(4) var<storage, read> total_of_rows: array<f32>;
@group(0) @binding(5) var<storage, read> grad_value_of_rows: array<f32>;
@group(0) @binding(6) var<storage, read_write> grad_prediction_rows: array<f32>;

// A thread's row: index in its model, first logit, weight (0: does not count).
struct Row {
    model: u32,
    row: u32,
    at: u32,
    w: f32,
}

fn row_of(block: u32, tid: u32) -> Row {
    let model = block / params.blocks;
    let row = block % params.blocks * WG + tid;
    var w = 0.0;
    if row < params.rows {
        w = 1.0;
        if params.weighted == 1u {
            w = weight[model * params.weight_stride - params.weight_base + row];
        }
    }
    return Row(model, row, (model * params.rows + row) * params.columns - params.prediction_base, w);
}

// Largest logit, ln Σ e^(x − largest), mean of x − largest; NaN where a logit is not finite.
fn log_sum(at: u32) -> vec3<f32> {
    var top = prediction[at];
    var bad = !is_finite(top);
    for (var j = 1u; j < params.columns; j++) {
        let x = prediction[at + j];
        top = max(top, x);
        bad = bad || !is_finite(x);
    }
    var sum = 0.0;
    var mean = 0.0;
    for (var j = 0u; j < params.columns; j++) {
        let x = prediction[at + j] - top;
        sum += exp_f32(x);
        mean += x;
    }
    var log = log_f32(sum);
    if bad {
        log = not_a_number();
    }
    return vec3<f32>(top, log, mean / f32(params.columns));
}

@compute @workgroup_size(WG)
fn loss_cross_entropy(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.count {
        return;
    }
    let block = params.first + group;
    let r = row_of(block, tid);
    var mine = vec2<f32>(0.0);
    if r.w != 0.0 {
        let class_id = classes[r.model * params.target_stride - params.target_base + r.row];
        if class_id < params.columns {
            let s = log_sum(r.at);
            var value = s.y - (1.0 - params.option) * (prediction[r.at + class_id] - s.x);
            if params.option > 0.0 {
                value -= params.option * s.z;
            }
            mine = vec2<f32>(r.w * value, r.w);
        }
    }
    let total = reduce(tid, mine);
    if tid == 0u {
        sums_of_rows[2u * block - params.block_base] = total.x;
        sums_of_rows[2u * block - params.block_base + 1u] = total.y;
    }
}

fn scale_of(model: u32) -> f32 {
    if total_of_rows[model] == 0.0 {
        return 0.0;
    }
    return grad_value_of_rows[model] / total_of_rows[model];
}

@compute @workgroup_size(WG)
fn loss_cross_entropy_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.count {
        return;
    }
    let r = row_of(params.first + group, tid);
    if r.row >= params.rows {
        return;
    }
    let class_id = classes[r.model * params.target_stride - params.target_base + r.row];
    if r.w == 0.0 || class_id >= params.columns {
        for (var j = 0u; j < params.columns; j++) {
            grad_prediction_rows[r.at + j] = 0.0;
        }
        return;
    }
    let s = log_sum(r.at);
    let scale = scale_of(r.model) * r.w;
    for (var j = 0u; j < params.columns; j++) {
        let want = params.option / f32(params.columns) + select(0.0, 1.0 - params.option, j == class_id);
        var grad = scale * (exp_f32(prediction[r.at + j] - s.x - s.y) - want);
        if !is_finite(s.y) {
            grad = s.y;
        }
        grad_prediction_rows[r.at + j] = grad;
    }
}

@compute @workgroup_size(WG)
fn loss_kl(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.count {
        return;
    }
    let block = params.first + group;
    let r = row_of(block, tid);
    var mine = vec2<f32>(0.0);
    if r.w != 0.0 {
        let s = log_sum(r.at);
        let y_at = r.model * params.target_stride - params.target_base + r.row * params.columns;
        var value = 0.0;
        for (var j = 0u; j < params.columns; j++) {
            let y = target_in[y_at + j];
            if !is_finite(y) {
                value = not_a_number();
            } else if y > 0.0 {
                value += y * (log_f32(max(y, 1.1754944e-38)) - (prediction[r.at + j] - s.x - s.y));
            }
        }
        mine = vec2<f32>(r.w * value, r.w);
    }
    let total = reduce(tid, mine);
    if tid == 0u {
        sums_of_rows[2u * block - params.block_base] = total.x;
        sums_of_rows[2u * block - params.block_base + 1u] = total.y;
    }
}

@compute @workgroup_size(WG)
fn loss_kl_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.count {
        return;
    }
    let r = row_of(params.first + group, tid);
    if r.row >= params.rows {
        return;
    }
    if r.w == 0.0 {
        for (var j = 0u; j < params.columns; j++) {
            grad_prediction_rows[r.at + j] = 0.0;
        }
        return;
    }
    let s = log_sum(r.at);
    let y_at = r.model * params.target_stride - params.target_base + r.row * params.columns;
    var mass = 0.0;
    for (var j = 0u; j < params.columns; j++) {
        mass += target_in[y_at + j];
    }
    let scale = scale_of(r.model) * r.w;
    for (var j = 0u; j < params.columns; j++) {
        var grad = scale * (mass * exp_f32(prediction[r.at + j] - s.x - s.y) - target_in[y_at + j]);
        if !is_finite(s.y) {
            grad = s.y;
        }
        grad_prediction_rows[r.at + j] = grad;
    }
}

// ---- means ------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> sums_in: array<f32>;
@group(0) @binding(2) var<storage, read_write> value: array<f32>;
@group(0) @binding(3) var<storage, read_write> total: array<f32>;

@compute @workgroup_size(WG)
fn loss_mean(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let m = group_index(wid, nwg);
    if m >= params.count {
        return;
    }
    var mine = vec2<f32>(0.0);
    for (var b = tid; b < params.blocks; b += WG) {
        let at = 2u * (m * params.blocks + b);
        mine += vec2<f32>(sums_in[at], sums_in[at + 1u]);
    }
    let all = reduce(tid, mine);
    if tid == 0u {
        var mean = 0.0;
        if all.y != 0.0 {
            mean = all.x / all.y;
        }
        value[m] = mean;
        total[m] = all.y;
    }
}
