// Neural hedging policies over price paths. Maths, shapes, rows of scratch and source: kernels/hedge_rollout.rs.
//   grid  M · ⌈paths / WG⌉      workgroup WG, all of one model      thread = path
//   scratch of a model: `rows` rows of `stride` paths: states, the adjoint of a state (backward), activations of a step or of several
//   hedge_rollout_weights  grid  tiles · ⌈paths / 128⌉ · M      workgroup 64: 32 × 32 of a weight, 4 × 4 a thread

struct HedgeRolloutParams {
    models: u32,
    paths: u32,
    stride: u32,
    steps: u32,
    from_step: u32,
    to_step: u32,
    slots: u32,
    rows: u32,
    acts: u32,
    step_rows: u32,
    state: u32,
    inputs: u32,
    columns: u32,
    lstm: u32,
    layers: u32,
    width0: u32,
    width1: u32,
    width2: u32,
    width3: u32,
    activation: u32,
    weights: u32,
    head: u32,
    baseline: u32,
    claim: u32,
    unwind: u32,
    partials: u32,
    first_block: u32,
    strike: f32,
    maturity: f32,
    volatility: f32,
    rate: f32,
    range: f32,
    premium: f32,
    x_row: u32,
    x_rows: u32,
    d_row: u32,
    d_rows: u32,
    weight_at: u32,
    bias_at: u32,
    lookback: u32,
    ragged: u32,
}

@group(0) @binding(0) var<uniform> params: HedgeRolloutParams;
@group(0) @binding(1) var<storage, read> weights: array<f32>;
@group(0) @binding(2) var<storage, read> risk: array<f32>;
@group(0) @binding(3) var<storage, read> spot: array<f32>;
@group(0) @binding(4) var<storage, read> extra: array<f32>;
@group(0) @binding(5) var<storage, read> claim: array<f32>;
@group(0) @binding(5) var<storage, read> grad_pnl: array<f32>;
@group(0) @binding(6) var<storage, read_write> scratch: array<f32>;
@group(0) @binding(7) var<storage, read_write> pnl: array<f32>;
@group(0) @binding(7) var<storage, read> grad_costs: array<f32>;
@group(0) @binding(8) var<storage, read_write> costs: array<f32>;
@group(0) @binding(1) var<storage, read> scratch_in: array<f32>;
@group(0) @binding(2) var<storage, read_write> holdings: array<f32>;
@group(0) @binding(1) var<storage, read> kept: array<f32>;
@group(0) @binding(2) var<storage, read_write> partials: array<f32>;

override WG: u32 = 128u;
override SHARED: u32 = 1u;

const RESIDUAL: u32 = 0u;
const BAND: u32 = 1u;
const GIVEN: u32 = 2u;
const LEAK: f32 = 0.01;
const BLOCK: u32 = 128u;

var<workgroup> sh_weights: array<f32, SHARED>;
// Model and path of this thread, steps of the path, and where row 0 of its scratch is.
var<private> model: u32;
var<private> path: u32;
var<private> length: u32;
var<private> column: u32;

struct Prices {
    spot: f32,
    baseline: f32,
    width: f32,
    log_moneyness: f32,
    root_left: f32,
}

// A holding and its slopes by the previous one and by the two outputs.
struct Holding {
    hold: f32,
    by_previous: f32,
    by_output: vec2<f32>,
}

fn cell(row: u32) -> u32 {
    return column + row * params.stride;
}

fn weight(i: u32) -> f32 {
    if SHARED > 1u {
        return sh_weights[i];
    }
    return weights[model * params.weights + i];
}

fn width_of(layer: u32) -> u32 {
    switch layer {
        case 0u: { return params.width0; }
        case 1u: { return params.width1; }
        case 2u: { return params.width2; }
        default: { return params.width3; }
    }
}

fn slot_of(t: u32) -> u32 {
    return select(t, t & 1u, params.slots == 2u) * params.state;
}

// Rows within the activations of a step, as in kernels/hedge_rollout.rs.
fn activations(layer: u32) -> u32 {
    let widths = vec4<u32>(params.width0, params.width1, params.width2, params.width3);
    return params.inputs + dot(select(vec4<u32>(0u), widths, vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(layer)), vec4<u32>(1u));
}

fn gradients(layer: u32) -> u32 {
    if params.lstm > 0u {
        return params.inputs + (2u * params.layers + 4u * layer) * params.width0;
    }
    return activations(params.layers) + activations(layer) - params.inputs;
}

fn layer_input(layer: u32) -> u32 {
    return select(params.inputs + (2u * layer - 1u) * params.width0, 0u, layer == 0u);
}

fn outputs() -> u32 {
    return select(2u, 1u, params.head == RESIDUAL);
}

// ---- market -----------------------------------------------------------------------------------------------------------------

fn spot_at(t: u32) -> f32 {
    return spot[path * (params.steps + 1u) + t];
}

fn left(t: u32) -> f32 {
    return params.maturity * (f32(length - t) / f32(params.steps));
}

// Steps of this thread's path: to its last price above 0.
fn length_of() -> u32 {
    var low = select(params.steps, 1u, params.ragged > 0u);
    var high = params.steps;
    while low < high {
        let middle = (low + high + 1u) / 2u;
        if spot_at(middle) > 0.0 {
            low = middle;
        } else {
            high = middle - 1u;
        }
    }
    return low;
}

fn growth(t: u32) -> f32 {
    return exp_f32(params.rate * left(t));
}

fn unit_cost(price: f32) -> f32 {
    return risk[4u * model] * price + risk[4u * model + 1u];
}

fn charge(trade: f32, price: f32) -> f32 {
    return select(abs(trade) * unit_cost(price) + risk[4u * model + 2u], 0.0, trade == 0.0);
}

fn prices_at(t: u32) -> Prices {
    var q: Prices;
    let years = left(t);
    let at = (path * params.steps + t) * params.columns;
    q.spot = spot_at(t);
    // Near the strike S − K is exact, S / K is not.
    let ratio = (q.spot - params.strike) / (q.spot + params.strike);
    q.log_moneyness = select(log_f32(q.spot / params.strike), twice_artanh(ratio), abs(ratio) < 0.17);
    q.root_left = sqrt(years);
    let spread = params.volatility * q.root_left;
    let d1 = (q.log_moneyness + params.rate * years) / spread + 0.5 * spread;
    let normal = normal_cdf_and_bell(d1);
    if params.baseline == GIVEN {
        q.baseline = extra[at];
        if params.head > BAND {
            q.width = extra[at + 1u];
        }
        return q;
    }
    q.baseline = normal.x - f32(params.baseline);
    if params.head > BAND {
        let gamma = normal.y * 0.39894228 / (q.spot * spread);
        let cube = 1.5 * exp_f32(-params.rate * years) * unit_cost(q.spot) * gamma * gamma / risk[4u * model + 3u];
        q.width = select(0.0, exp_f32(log_f32(max(cube, 1e-37)) / 3.0), cube > 1e-37);
    }
    return q;
}

// ---- network ----------------------------------------------------------------------------------------------------------------

// z = b + W·x, or z += W·x.
fn dense(x: u32, x_rows: u32, z: u32, z_rows: u32, at: u32, bias: u32, adds: bool) {
    for (var j = 0u; j < z_rows; j += 4u) {
        let row = min(vec4<u32>(j, j + 1u, j + 2u, j + 3u), vec4<u32>(z_rows - 1u));
        var sum: vec4<f32>;
        if adds {
            sum = vec4<f32>(scratch[cell(z + row.x)], scratch[cell(z + row.y)], scratch[cell(z + row.z)], scratch[cell(z + row.w)]);
        } else {
            sum = vec4<f32>(weight(bias + row.x), weight(bias + row.y), weight(bias + row.z), weight(bias + row.w));
        }
        let w = at + row * x_rows;
        for (var i = 0u; i < x_rows; i++) {
            sum += scratch[cell(x + i)] * vec4<f32>(weight(w.x + i), weight(w.y + i), weight(w.z + i), weight(w.w + i));
        }
        scratch[cell(z + row.w)] = sum.w;
        scratch[cell(z + row.z)] = sum.z;
        scratch[cell(z + row.y)] = sum.y;
        scratch[cell(z + row.x)] = sum.x;
    }
}

// Wᵀ·d for the columns i, i + 1, i + 2, i + 3, or the last one where they are past it.
fn pulled(d: u32, d_rows: u32, at: u32, x_rows: u32, i: u32) -> vec4<f32> {
    let w = at + min(vec4<u32>(i, i + 1u, i + 2u, i + 3u), vec4<u32>(x_rows - 1u));
    var sum = vec4<f32>(0.0);
    for (var j = 0u; j < d_rows; j++) {
        let k = j * x_rows;
        sum += scratch[cell(d + j)] * vec4<f32>(weight(w.x + k), weight(w.y + k), weight(w.z + k), weight(w.w + k));
    }
    return sum;
}

// Activations of a step from row `acts` on, and the state behind it but for the holding.
fn network(t: u32, q: Prices, before: u32, after: u32, acts: u32) {
    scratch[cell(acts)] = q.log_moneyness;
    scratch[cell(acts + 1u)] = q.root_left;
    scratch[cell(acts + 2u)] = q.baseline;
    scratch[cell(acts + 3u)] = scratch[cell(before)];
    let features = (path * params.steps + t + 1u) * params.columns + 4u - params.inputs;
    for (var i = 4u; i < params.inputs; i++) {
        scratch[cell(acts + i)] = extra[features + i - 4u];
    }
    var at = 0u;
    var x = acts;
    var x_rows = params.inputs;
    let h = params.width0;
    for (var l = 0u; l < params.layers; l++) {
        let z = acts + gradients(l);
        if params.lstm == 0u {
            let width = width_of(l);
            dense(x, x_rows, z, width, at, at + width * x_rows, false);
            at += width * (x_rows + 1u);
            x = acts + activations(l);
            x_rows = width;
            for (var j = 0u; j < width; j++) {
                scratch[cell(x + j)] = activation(params.activation, scratch[cell(z + j)]);
            }
        } else {
            let state = 1u + 2u * l * h;
            for (var j = 0u; j < h; j++) {
                scratch[cell(x + x_rows + j)] = scratch[cell(before + state + j)];
            }
            dense(x, x_rows, z, 4u * h, at, at + 4u * h * (x_rows + h), false);
            dense(x + x_rows, h, z, 4u * h, at + 4u * h * x_rows, 0u, true);
            at += 4u * h * (x_rows + h + 1u);
            x = acts + layer_input(l + 1u);
            x_rows = h;
            for (var j = 0u; j < h; j++) {
                let i = sigmoid_f32(scratch[cell(z + j)]);
                let f = sigmoid_f32(scratch[cell(z + h + j)]);
                let g = tanh_f32(scratch[cell(z + 2u * h + j)]);
                let o = sigmoid_f32(scratch[cell(z + 3u * h + j)]);
                let c = f * scratch[cell(before + state + h + j)] + i * g;
                let y = o * tanh_f32(c);
                scratch[cell(z + j)] = i;
                scratch[cell(z + h + j)] = f;
                scratch[cell(z + 2u * h + j)] = g;
                scratch[cell(z + 3u * h + j)] = o;
                scratch[cell(after + state + h + j)] = c;
                scratch[cell(after + state + j)] = y;
                scratch[cell(x + j)] = y;
            }
        }
    }
    dense(x, x_rows, acts + gradients(params.layers), outputs(), at, at + outputs() * x_rows, false);
}

// Width of a band and its slope by the output.
fn band_width(q: Prices, o: f32) -> vec2<f32> {
    if params.head == BAND {
        let slope = select(1.0, LEAK, o < 0.0);
        return vec2<f32>(slope * o, slope);
    }
    let bounded = tanh_f32(o);
    let width = q.width * exp_f32(params.range * bounded);
    return vec2<f32>(width, width * params.range * (1.0 - bounded * bounded));
}

fn decide(q: Prices, previous: f32, out: u32) -> Holding {
    let first = scratch[cell(out)];
    if params.head == RESIDUAL {
        let bounded = tanh_f32(first);
        return Holding(q.baseline + params.range * bounded, 0.0, vec2<f32>(params.range * (1.0 - bounded * bounded), 0.0));
    }
    let below = band_width(q, first);
    let above = band_width(q, scratch[cell(out + 1u)]);
    let low = q.baseline - below.x;
    let high = q.baseline + above.x;
    if low > high {
        return Holding(0.5 * (low + high), 0.0, vec2<f32>(-0.5 * below.y, 0.5 * above.y));
    }
    if previous <= low {
        return Holding(low, 0.0, vec2<f32>(-below.y, 0.0));
    }
    if previous >= high {
        return Holding(high, 0.0, vec2<f32>(0.0, above.y));
    }
    return Holding(previous, 1.0, vec2<f32>(0.0));
}

// ---- entries ----------------------------------------------------------------------------------------------------------------

// Takes this thread's model and path and loads the weights; false where there is no path.
fn begin(wid: vec3<u32>, nwg: vec3<u32>, tid: u32) -> bool {
    let blocks = (params.paths + WG - 1u) / WG;
    let group = group_index(wid, nwg);
    model = group / blocks;
    path = group % blocks * WG + tid;
    column = model * params.rows * params.stride + path;
    if SHARED > 1u {
        if model < params.models {
            for (var i = tid; i < params.weights; i += WG) {
                sh_weights[i] = weights[model * params.weights + i];
            }
        }
        workgroupBarrier();
    }
    let live = model < params.models && path < params.paths;
    if live {
        length = length_of();
    }
    return live;
}

fn roll() {
    let n = model * params.paths + path;
    if params.from_step == 0u {
        for (var i = 0u; i < params.state; i++) {
            scratch[cell(i)] = 0.0;
        }
        pnl[n] = params.premium * growth(0u);
        costs[2u * n] = 0.0;
        costs[2u * n + 1u] = 0.0;
    }
    var total = pnl[n];
    var cost = costs[2u * n];
    var turnover = costs[2u * n + 1u];
    for (var t = params.from_step; t < min(params.to_step, length); t++) {
        let before = slot_of(t);
        let after = slot_of(t + 1u);
        let q = prices_at(t);
        network(t, q, before, after, params.acts);
        let previous = scratch[cell(before)];
        let hold = decide(q, previous, params.acts + gradients(params.layers)).hold;
        let trade = hold - previous;
        let paid = charge(trade, q.spot);
        total += hold * (spot_at(t + 1u) * growth(t + 1u) - q.spot * growth(t)) - paid * growth(t);
        cost += paid;
        turnover += abs(trade);
        scratch[cell(after)] = hold;
    }
    if params.from_step < length && length <= params.to_step {
        let last = scratch[cell(slot_of(length))];
        let price = spot_at(length);
        if params.unwind > 0u {
            let paid = charge(last, price);
            total -= paid;
            cost += paid;
            turnover += abs(last);
        }
        if params.claim == GIVEN {
            total -= claim[path];
        } else {
            total -= max(select(price - params.strike, params.strike - price, params.claim == 1u), 0.0);
        }
    }
    for (var t = max(params.from_step, length); t < params.to_step; t++) {
        scratch[cell(slot_of(t + 1u))] = scratch[cell(slot_of(t))];
    }
    pnl[n] = total;
    costs[2u * n] = cost;
    costs[2u * n + 1u] = turnover;
}

@compute @workgroup_size(WG)
fn hedge_rollout(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    if begin(wid, nwg, tid) {
        roll();
    }
}

@compute @workgroup_size(WG)
fn hedge_rollout_cached(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    if begin(wid, nwg, tid) {
        roll();
    }
}

@compute @workgroup_size(WG)
fn hedge_rollout_holdings(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let blocks = (params.paths + WG - 1u) / WG;
    let group = group_index(wid, nwg);
    let m = group / blocks;
    let n = group % blocks * WG + tid;
    if m >= params.models || n >= params.paths {
        return;
    }
    for (var t = 0u; t < params.steps; t++) {
        holdings[(m * params.paths + n) * params.steps + t] = scratch_in[(m * params.rows + (t + 1u) * params.state) * params.stride + n];
    }
}

// Outputs' gradients become those of all layers; returns that of the previous holding as an input.
fn network_backward(before: u32, after: u32, acts: u32, adjoint: u32) -> f32 {
    let h = params.width0;
    // The product above a layer: where its gradient is, how many rows, and its weight.
    var d = acts + gradients(params.layers);
    var d_rows = outputs();
    let last = select(width_of(params.layers - 1u), h, params.lstm > 0u);
    var at = params.weights - outputs() * (last + 1u);
    for (var below = params.layers; below > 0u; below--) {
        let l = below - 1u;
        let z = acts + gradients(l);
        let inputs = select(select(width_of(l - 1u), h, params.lstm > 0u), params.inputs, l == 0u);
        if params.lstm == 0u {
            let width = width_of(l);
            let y = acts + activations(l);
            for (var i = 0u; i < width; i += 4u) {
                let g = pulled(d, d_rows, at, width, i);
                for (var k = 0u; k < min(4u, width - i); k++) {
                    let saved = select(y, z, params.activation == GELU || params.activation == SILU);
                    scratch[cell(z + i + k)] = g[k] * activation_slope(params.activation, scratch[cell(saved + i + k)]);
                }
            }
            d = z;
            d_rows = width;
            at -= width * (inputs + 1u);
        } else {
            let state = 1u + 2u * l * h;
            for (var j = 0u; j < h; j += 4u) {
                let above = pulled(d, d_rows, at, h, j);
                for (var k = 0u; k < min(4u, h - j); k++) {
                    let r = j + k;
                    let grad_h = scratch[cell(adjoint + state + r)] + above[k];
                    let i = scratch[cell(z + r)];
                    let f = scratch[cell(z + h + r)];
                    let g = scratch[cell(z + 2u * h + r)];
                    let o = scratch[cell(z + 3u * h + r)];
                    let squashed = tanh_f32(scratch[cell(after + state + h + r)]);
                    let grad_c = scratch[cell(adjoint + state + h + r)] + grad_h * o * (1.0 - squashed * squashed);
                    scratch[cell(adjoint + state + h + r)] = grad_c * f;
                    scratch[cell(z + r)] = grad_c * g * i * (1.0 - i);
                    scratch[cell(z + h + r)] = grad_c * scratch[cell(before + state + h + r)] * f * (1.0 - f);
                    scratch[cell(z + 2u * h + r)] = grad_c * i * (1.0 - g * g);
                    scratch[cell(z + 3u * h + r)] = grad_h * squashed * o * (1.0 - o);
                }
            }
            d = z;
            d_rows = 4u * h;
            at -= 4u * h * (inputs + h + 1u);
            for (var j = 0u; j < h; j += 4u) {
                let g = pulled(d, d_rows, at + 4u * h * inputs, h, j);
                for (var k = 0u; k < min(4u, h - j); k++) {
                    scratch[cell(adjoint + state + j + k)] = g[k];
                }
            }
        }
    }
    return pulled(d, d_rows, 0u, params.inputs, 3u).x;
}

// What a unit traded at step t takes from the loss.
fn per_unit(t: u32, grad_pnl: f32, grads: vec2<f32>) -> f32 {
    return unit_cost(spot_at(t)) * (grad_pnl * growth(t) - grads.x) - grads.y;
}

fn unroll() {
    let n = model * params.paths + path;
    let by_pnl = grad_pnl[n];
    let by_costs = vec2<f32>(grad_costs[2u * n], grad_costs[2u * n + 1u]);
    let adjoint = params.slots * params.state;
    if params.to_step == params.steps {
        for (var i = 0u; i < params.state; i++) {
            scratch[cell(adjoint + i)] = 0.0;
        }
    }
    for (var later = params.to_step; later > params.from_step; later--) {
        let t = later - 1u;
        let before = t * params.state;
        let after = before + params.state;
        let acts = params.acts + (t - params.from_step) * params.step_rows;
        if t >= length {
            for (var i = 0u; i < params.step_rows; i++) {
                scratch[cell(acts + i)] = 0.0;
            }
            continue;
        }
        let q = prices_at(t);
        network(t, q, before, after, acts);
        let out = acts + gradients(params.layers);
        let previous = scratch[cell(before)];
        let held = scratch[cell(after)];
        let decision = decide(q, previous, out);
        var next_trade = 0.0;
        if later < length {
            next_trade = scratch[cell(after + params.state)] - held;
        } else if params.unwind > 0u {
            next_trade = -held;
        }
        let earned = by_pnl * (spot_at(later) * growth(later) - q.spot * growth(t));
        let costs_of = sign(next_trade) * per_unit(later, by_pnl, by_costs) - sign(held - previous) * per_unit(t, by_pnl, by_costs);
        let by_hold = scratch[cell(adjoint)] + earned + costs_of;
        scratch[cell(out)] = by_hold * decision.by_output.x;
        if params.head != RESIDUAL {
            scratch[cell(out + 1u)] = by_hold * decision.by_output.y;
        }
        let by_input = network_backward(before, after, acts, adjoint);
        scratch[cell(adjoint)] = by_hold * decision.by_previous + by_input;
        if t % params.lookback == 0u {
            for (var i = 1u; i < params.state; i++) {
                scratch[cell(adjoint + i)] = 0.0;
            }
        }
    }
}

@compute @workgroup_size(WG)
fn hedge_rollout_reverse(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    if begin(wid, nwg, tid) {
        unroll();
    }
}

@compute @workgroup_size(WG)
fn hedge_rollout_reverse_cached(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    if begin(wid, nwg, tid) {
        unroll();
    }
}

// ---- gradient of a weight -----------------------------------------------------------------------------------------------------

const DEPTH: u32 = 16u;
var<workgroup> sh_d: array<f32, 544>;
var<workgroup> sh_x: array<f32, 544>;

// One row of activations at a path, 0 past the rows and the paths; row `ones` is 1.
fn kept_at(m: u32, t: u32, row: u32, rows: u32, first: u32, n: u32, ones: u32) -> f32 {
    if n >= params.paths {
        return 0.0;
    }
    if row == ones {
        return 1.0;
    }
    if row >= rows {
        return 0.0;
    }
    return kept[(m * params.rows + params.acts + (t - params.from_step) * params.step_rows + first + row) * params.stride + n];
}

@compute @workgroup_size(WG)
fn hedge_rollout_weights(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let across = (params.x_rows + 32u) / 32u;
    let tiles = (params.d_rows + 31u) / 32u * across;
    let blocks = (params.paths + BLOCK - 1u) / BLOCK;
    let group = group_index(wid, nwg);
    let m = group / (tiles * blocks);
    let block = group / tiles % blocks;
    let tile = group % tiles;
    let live = m < params.models;
    let d0 = tile / across * 32u;
    let x0 = tile % across * 32u;
    let own_d = tid / 8u * 4u;
    let own_x = tid % 8u * 4u;
    // The bias is the weight of an input of ones behind the others.
    let with_bias = params.bias_at < params.weights;
    let at = (m * params.partials + (params.first_block + block) % params.partials) * params.weights;
    var sum: array<vec4<f32>, 4>;
    for (var r = 0u; r < 4u; r++) {
        for (var c = 0u; c < 4u; c++) {
            let j = d0 + own_d + r;
            let i = x0 + own_x + c;
            if live && j < params.d_rows && i < params.x_rows {
                sum[r][c] = partials[at + params.weight_at + j * params.x_rows + i];
            } else if live && with_bias && j < params.d_rows && i == params.x_rows {
                sum[r][c] = partials[at + params.bias_at + j];
            }
        }
    }
    for (var later = params.to_step; later > params.from_step; later--) {
        for (var p0 = 0u; p0 < BLOCK; p0 += DEPTH) {
            for (var e = tid; e < 32u * DEPTH; e += WG) {
                let row = e / DEPTH;
                let n = select(params.paths, block * BLOCK + p0 + e % DEPTH, live);
                sh_d[row * 17u + e % DEPTH] = kept_at(m, later - 1u, d0 + row, params.d_rows, params.d_row, n, 0xffffffffu);
                sh_x[row * 17u + e % DEPTH] = kept_at(m, later - 1u, x0 + row, params.x_rows, params.x_row, n, params.x_rows);
            }
            workgroupBarrier();
            for (var k = 0u; k < DEPTH; k++) {
                let x = vec4<f32>(sh_x[own_x * 17u + k], sh_x[own_x * 17u + 17u + k], sh_x[own_x * 17u + 34u + k], sh_x[own_x * 17u + 51u + k]);
                for (var r = 0u; r < 4u; r++) {
                    sum[r] += sh_d[(own_d + r) * 17u + k] * x;
                }
            }
            workgroupBarrier();
        }
    }
    for (var r = 0u; r < 4u; r++) {
        for (var c = 0u; c < 4u; c++) {
            let j = d0 + own_d + r;
            let i = x0 + own_x + c;
            if live && j < params.d_rows && i < params.x_rows {
                partials[at + params.weight_at + j * params.x_rows + i] = sum[r][c];
            } else if live && with_bias && j < params.d_rows && i == params.x_rows {
                partials[at + params.bias_at + j] = sum[r][c];
            }
        }
    }
}
