// Objectives of series of returns and their gradients. Maths, shapes and source: kernels/objective.rs.
//   objective_moments, objective_tail, …_tail_sweep    grid  N             thread t takes values t, t+WG, …; for drawdowns a run of ⌈T/WG⌉
//   objective_finish                                   grid  ⌈N / WG⌉      thread = row
//   objective_gradient, net_returns, …_backward        grid  ⌈N·T / WG⌉    thread = value
//   state [N,16], coefficients [N,12], bins [N,260]    workgroup memory: 8·WG + 258 words

struct ObjectiveParams {
    n: u32,
    first: u32,
    t: u32,
    start: u32,
    kind: u32,
    periods: f32,
    periods_low: f32,
    floor: f32,
    floor_low: f32,
    option: f32,
    option_low: f32,
    period: u32,
    sweep: u32,
}

@group(0) @binding(0) var<uniform> params: ObjectiveParams;
@group(0) @binding(1) var<storage, read> returns: array<f32>;
@group(0) @binding(2) var<storage, read> lengths: array<u32>;
@group(0) @binding(3) var<storage, read_write> state: array<f32>;

override WG: u32 = 128u;
const STATE: u32 = 16u;
const COEFFICIENTS: u32 = 12u;
const STRETCH: u32 = 4u;
const TAIL: u32 = 12u;
const SHARPE: u32 = 0u;
const SORTINO: u32 = 1u;
const CALMAR: u32 = 2u;
const DRAWDOWN: u32 = 3u;
const DRAWDOWN_ADDITIVE: u32 = 4u;
const CVAR: u32 = 5u;
const MEAN_VARIANCE: u32 = 6u;
const BINS: u32 = 260u;
const PREFIX: u32 = 256u;
const RANK: u32 = 258u;
const DIGITS: u32 = 4u;
const RUIN: f32 = 1e-6;
const MOST_GROWTH: f32 = 40.0;

// Levels of a stretch of bars, counted from its start: total, highest and lowest with their bars, and the deepest fall.
struct Stretch {
    total: f32,
    high: f32,
    high_at: u32,
    low: f32,
    low_at: u32,
    fall: f32,
    peak: u32,
    trough: u32,
}

var<workgroup> sh_sum: array<vec2<f32>, WG>;
var<workgroup> sh_stretch: array<Stretch, WG>;
var<workgroup> sh_bins: array<atomic<u32>, 256>;
var<workgroup> sh_pick: array<u32, 2>;

fn reduce(tid: u32, mine: vec2<f32>) -> vec2<f32> {
    workgroupBarrier();
    sh_sum[tid] = mine;
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if tid < half {
            sh_sum[tid] += sh_sum[tid + half];
        }
        workgroupBarrier();
    }
    return sh_sum[0];
}

// Bars of the batch that belong to a row.
fn bars_of(row: u32) -> u32 {
    if params.period == 0u {
        return params.t;
    }
    return min(max(lengths[(params.first + row) % params.period], params.start) - params.start, params.t);
}

fn empty(at: u32) -> Stretch {
    return Stretch(0.0, 0.0, at, 0.0, at, 0.0, at, at);
}

fn join(a: Stretch, b: Stretch) -> Stretch {
    var s = a;
    let across = a.high - (a.total + b.low);
    if across > s.fall {
        s.fall = across;
        s.peak = a.high_at;
        s.trough = b.low_at;
    }
    if b.fall > s.fall {
        s.fall = b.fall;
        s.peak = b.peak;
        s.trough = b.trough;
    }
    if a.total + b.high > s.high {
        s.high = a.total + b.high;
        s.high_at = b.high_at;
    }
    if a.total + b.low < s.low {
        s.low = a.total + b.low;
        s.low_at = b.low_at;
    }
    s.total = a.total + b.total;
    return s;
}

// ln(1 + r), 1 + r at least RUIN.
fn log_growth(r: f32) -> f32 {
    if abs(r) < 0.4 {
        return twice_artanh(r / (2.0 + r));
    }
    return log_f32(max(1.0 + r, RUIN));
}

// Up to 64 bars from value `from_index`, bar `bar`.
fn stretch_of(from_index: u32, to_index: u32, bar: u32) -> Stretch {
    var s = empty(bar);
    for (var j = from_index; j < to_index; j++) {
        let r = returns[j];
        if params.kind == DRAWDOWN_ADDITIVE {
            s.total += r;
        } else {
            s.total += log_growth(r);
        }
        let at = bar + j - from_index + 1u;
        if s.total > s.high {
            s.high = s.total;
            s.high_at = at;
        }
        if s.total < s.low {
            s.low = s.total;
            s.low_at = at;
        }
        if s.high - s.total > s.fall {
            s.fall = s.high - s.total;
            s.peak = s.high_at;
            s.trough = at;
        }
    }
    return s;
}

// ---- moments ----------------------------------------------------------------------------------------------------

@compute @workgroup_size(WG)
fn objective_moments(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = group_index(wid, nwg);
    if row >= params.n {
        return;
    }
    let at = row * params.t;
    let out = (params.first + row) * STATE;
    let t = bars_of(row);
    if t == 0u {
        if params.start == 0u && tid < STATE {
            state[out + tid] = 0.0;
        }
        return;
    }

    // mean, as the first return plus an offset
    let first = returns[at];
    var sum = 0.0;
    for (var j = tid; j < t; j += WG) {
        sum += returns[at + j] - first;
    }
    var count = f32(t);
    let offset = reduce(tid, vec2<f32>(sum, 0.0)).x / count;

    // central and downside squares
    let target_return = select(0.0, params.option, params.kind == SORTINO);
    var mine = vec2<f32>(0.0);
    for (var j = tid; j < t; j += WG) {
        let d = (returns[at + j] - first) - offset;
        let low = min(returns[at + j] - target_return, 0.0);
        mine += vec2<f32>(d * d, low * low);
    }
    let squares = reduce(tid, mine);

    // drawdown: runs in order, then an ordered tree
    var s = empty(params.start);
    if params.kind == CALMAR || params.kind == DRAWDOWN || params.kind == DRAWDOWN_ADDITIVE {
        let run = (t + WG - 1u) / WG;
        let from_bar = min(tid * run, t);
        let last = min(from_bar + run, t);
        s = empty(params.start + from_bar);
        for (var j = from_bar; j < last; j += 64u) {
            s = join(s, stretch_of(at + j, at + min(j + 64u, last), params.start + j));
        }
        sh_stretch[tid] = s;
        workgroupBarrier();
        for (var step = 1u; step < WG; step *= 2u) {
            if tid % (2u * step) == 0u {
                sh_stretch[tid] = join(sh_stretch[tid], sh_stretch[tid + step]);
            }
            workgroupBarrier();
        }
        s = sh_stretch[0];
    }
    if tid > 0u {
        return;
    }
    var mean = first + offset;
    var m2 = squares.x;
    var downside = squares.y;
    if params.start > 0u {
        let before = state[out];
        let total = before + count;
        let delta = mean - state[out + 1u];
        m2 += state[out + 2u] + delta * delta * (before * count / total);
        mean = state[out + 1u] + delta * (count / total);
        downside += state[out + 3u];
        count = total;
        let o = out + STRETCH;
        let old = Stretch(state[o], state[o + 1u], u32(state[o + 2u]), state[o + 3u], u32(state[o + 4u]), state[o + 5u], u32(state[o + 6u]), u32(state[o + 7u]));
        s = join(old, s);
    }
    state[out] = count;
    state[out + 1u] = mean;
    state[out + 2u] = m2;
    state[out + 3u] = downside;
    let o = out + STRETCH;
    state[o] = s.total;
    state[o + 1u] = s.high;
    state[o + 2u] = f32(s.high_at);
    state[o + 3u] = s.low;
    state[o + 4u] = f32(s.low_at);
    state[o + 5u] = s.fall;
    state[o + 6u] = f32(s.peak);
    state[o + 7u] = f32(s.trough);
}

// ---- tail -------------------------------------------------------------------------------------------------------

// Monotone unsigned image of a float; both zeros are one.
fn ordered(x: f32) -> u32 {
    let raw = bitcast<u32>(select(x, 0.0, x == 0.0));
    return select(raw | 0x80000000u, ~raw, (raw >> 31u) == 1u);
}

fn unordered(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key & 0x7fffffffu, (key >> 31u) == 1u));
}

@compute @workgroup_size(WG)
fn objective_tail(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = group_index(wid, nwg);
    if row >= params.n {
        return;
    }
    let at = row * params.t;
    let t = bars_of(row);
    if t == 0u {
        return;
    }
    // the order statistic, one byte of its ordered image at a time
    var prefix = 0u;
    var rank = min(u32(params.option * f32(t) + params.option_low * f32(t)), t - 1u);
    for (var byte = 0u; byte < 4u; byte++) {
        let shift = 24u - 8u * byte;
        for (var i = tid; i < 256u; i += WG) {
            atomicStore(&sh_bins[i], 0u);
        }
        workgroupBarrier();
        for (var j = tid; j < t; j += WG) {
            let key = ordered(returns[at + j]);
            if byte == 0u || (key >> (shift + 8u)) == prefix {
                atomicAdd(&sh_bins[(key >> shift) & 0xffu], 1u);
            }
        }
        workgroupBarrier();
        if tid == 0u {
            var bin = 0u;
            var before = 0u;
            for (; bin < 255u; bin++) {
                let inside = atomicLoad(&sh_bins[bin]);
                if before + inside > rank {
                    break;
                }
                before += inside;
            }
            sh_pick[0] = (prefix << 8u) | bin;
            sh_pick[1] = rank - before;
        }
        workgroupBarrier();
        prefix = sh_pick[0];
        rank = sh_pick[1];
        workgroupBarrier();
    }
    var below = vec2<f32>(0.0);
    var equal = 0.0;
    for (var j = tid; j < t; j += WG) {
        let key = ordered(returns[at + j]);
        if key < prefix {
            below += vec2<f32>(1.0, returns[at + j]);
        }
        equal += select(0.0, 1.0, key == prefix);
    }
    let sums = reduce(tid, below);
    let count = sums.x;
    let sum = sums.y;
    let equals = reduce(tid, vec2<f32>(equal, 0.0)).x;
    if tid == 0u {
        let out = (params.first + row) * STATE + TAIL;
        state[out] = unordered(prefix);
        state[out + 1u] = count;
        state[out + 2u] = sum;
        state[out + 3u] = equals;
    }
}

// ---- tail of an epoch in batches --------------------------------------------------------------------------------

@group(0) @binding(4) var<storage, read_write> bins: array<f32>;

// The image so far of a row's threshold, and its rank among the values that have it, from what the last sweep counted.
fn pick(own: u32, s: u32) {
    var prefix = u32(bins[own + PREFIX + 1u]);
    var rank = u32(bins[own + RANK]);
    if params.sweep == 1u {
        let n = state[s];
        prefix = 0u;
        rank = min(u32(params.option * n + params.option_low * n), max(u32(n), 1u) - 1u);
    }
    var bin = 0u;
    for (; bin < 255u; bin++) {
        let inside = u32(bins[own + bin]);
        if inside > rank {
            break;
        }
        rank -= inside;
    }
    prefix = (prefix << 8u) | bin;
    if params.sweep < DIGITS {
        bins[own + PREFIX + 1u] = f32(prefix);
        bins[own + RANK] = f32(rank);
    } else {
        state[s + TAIL] = unordered(prefix);
        for (var i = 1u; i < 4u; i++) {
            state[s + TAIL + i] = 0.0;
        }
    }
}

@compute @workgroup_size(WG)
fn objective_tail_sweep(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = group_index(wid, nwg);
    if row >= params.n {
        return;
    }
    let at = row * params.t;
    let own = (params.first + row) * BINS;
    let s = (params.first + row) * STATE;
    let t = bars_of(row);
    if tid == 0u {
        if params.start == 0u && params.sweep > 0u {
            pick(own, s);
        }
        var prefix = 0u;
        if params.sweep == DIGITS {
            prefix = ordered(state[s + TAIL]);
        } else if params.sweep > 0u {
            prefix = u32(bins[own + PREFIX + 1u]);
        }
        sh_pick[0] = prefix;
    }
    for (var i = tid; i < 256u; i += WG) {
        atomicStore(&sh_bins[i], 0u);
    }
    workgroupBarrier();
    let prefix = sh_pick[0];
    if params.sweep < DIGITS {
        // one more byte of the images that begin as the threshold's
        let shift = 24u - 8u * params.sweep;
        for (var j = tid; j < t; j += WG) {
            let key = ordered(returns[at + j]);
            if params.sweep == 0u || (key >> (shift + 8u)) == prefix {
                atomicAdd(&sh_bins[(key >> shift) & 0xffu], 1u);
            }
        }
        workgroupBarrier();
        for (var i = tid; i < 256u; i += WG) {
            let before = select(bins[own + i], 0.0, params.start == 0u);
            bins[own + i] = before + f32(atomicLoad(&sh_bins[i]));
        }
        return;
    }
    var below = vec2<f32>(0.0);
    var equal = 0.0;
    for (var j = tid; j < t; j += WG) {
        let key = ordered(returns[at + j]);
        if key < prefix {
            below += vec2<f32>(1.0, returns[at + j]);
        }
        equal += select(0.0, 1.0, key == prefix);
    }
    let sums = reduce(tid, below);
    let count = sums.x;
    let sum = sums.y;
    let equals = reduce(tid, vec2<f32>(equal, 0.0)).x;
    if tid == 0u {
        state[s + TAIL + 1u] += count;
        state[s + TAIL + 2u] += sum;
        state[s + TAIL + 3u] += equals;
    }
}

// ---- values and coefficients ------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> state_in: array<f32>;
@group(0) @binding(2) var<storage, read_write> value: array<f32>;
@group(0) @binding(3) var<storage, read_write> coefficients: array<f32>;

// 1 − e^y.
fn minus_expm1(y: f32) -> f32 {
    if abs(y) > 0.35 {
        return 1.0 - exp_f32(y);
    }
    let tail = 1.0 + y * 0.2 * (1.0 + y * 0.16666667 * (1.0 + y * 0.14285715 * (1.0 + y * 0.125)));
    return -y * (1.0 + y * 0.5 * (1.0 + y * 0.33333334 * (1.0 + y * 0.25 * tail)));
}

@compute @workgroup_size(WG)
fn objective_finish(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let i = group_index(wid, nwg) * WG + tid;
    if i >= params.n {
        return;
    }
    let row = params.first + i;
    let s = row * STATE;
    let n = state_in[s];
    let mean = state_in[s + 1u];
    let level = state_in[s + STRETCH];
    let fall = state_in[s + STRETCH + 5u];
    let year = sqrt(params.periods);
    let floor_square = params.floor * params.floor;
    let drawdown = minus_expm1(-fall);
    var c = array<f32, 12>();
    var result = UNDEFINED;
    switch params.kind {
        case SHARPE: {
            let below = sqrt(state_in[s + 2u] / max(n - 1.0, 1.0) + floor_square);
            if n > 1.0 && below > 0.0 {
                result = year * (mean - params.option) / below;
                c[0] = year / (n * below);
                c[1] = -(result / ((n - 1.0) * below * below));
            }
        }
        case MEAN_VARIANCE: {
            if n > 1.0 {
                result = params.periods * (mean - 0.5 * params.option * state_in[s + 2u] / (n - 1.0));
                c[0] = params.periods / n;
                c[1] = -(params.periods * params.option / (n - 1.0));
            }
        }
        case SORTINO: {
            let below = sqrt(state_in[s + 3u] / max(n, 1.0) + floor_square);
            if n > 0.0 && below > 0.0 {
                result = year * (mean - params.option) / below;
                c[0] = year / (n * below);
                c[3] = -(result / (n * below * below));
            }
        }
        case CALMAR: {
            let below = sqrt(drawdown * drawdown + floor_square);
            if n > 0.0 && below > 0.0 {
                let growth = -minus_expm1(min(params.periods / n * level, MOST_GROWTH));
                result = growth / below;
                c[4] = (1.0 + growth) * params.periods / (n * below);
                c[5] = growth / below * (drawdown / below) * ((1.0 - drawdown) / below);
            }
        }
        case DRAWDOWN: {
            result = select(UNDEFINED, drawdown, n > 0.0);
            c[5] = -(1.0 - drawdown);
        }
        case DRAWDOWN_ADDITIVE: {
            result = select(UNDEFINED, fall, n > 0.0);
            c[6] = -1.0;
        }
        default: {
            if n > 0.0 {
                let tail = min(params.option * n + params.option_low * n, n);
                let rest = tail - state_in[s + TAIL + 1u];
                result = -((state_in[s + TAIL + 2u] + rest * state_in[s + TAIL]) / tail);
                c[9] = state_in[s + TAIL];
                c[10] = -(1.0 / tail);
                c[11] = -(rest / (tail * state_in[s + TAIL + 3u]));
            }
        }
    }
    c[2] = mean;
    c[7] = state_in[s + STRETCH + 6u];
    c[8] = state_in[s + STRETCH + 7u];
    value[row] = result;
    for (var k = 0u; k < COEFFICIENTS; k++) {
        coefficients[row * COEFFICIENTS + k] = c[k];
    }
}

// ---- gradient ---------------------------------------------------------------------------------------------------

@group(0) @binding(3) var<storage, read> coefficients_in: array<f32>;
@group(0) @binding(4) var<storage, read> grad_value: array<f32>;
@group(0) @binding(5) var<storage, read_write> grad_returns: array<f32>;

@compute @workgroup_size(WG)
fn objective_gradient(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.n * params.t {
        return;
    }
    if at % params.t >= bars_of(at / params.t) {
        grad_returns[at] = 0.0;
        return;
    }
    let row = params.first + at / params.t;
    let bar = f32(params.start + at % params.t);
    let c = row * COEFFICIENTS;
    let r = returns[at];
    let falls = bar >= coefficients_in[c + 7u] && bar < coefficients_in[c + 8u];
    var g = coefficients_in[c] + coefficients_in[c + 1u] * (r - coefficients_in[c + 2u]);
    g += coefficients_in[c + 3u] * min(r - select(0.0, params.option, params.kind == SORTINO), 0.0);
    if 1.0 + r >= RUIN {
        g += (coefficients_in[c + 4u] + select(0.0, coefficients_in[c + 5u], falls)) / (1.0 + r);
    }
    g += select(0.0, coefficients_in[c + 6u], falls);
    let threshold = coefficients_in[c + 9u];
    g += select(select(0.0, coefficients_in[c + 11u], r == threshold), coefficients_in[c + 10u], r < threshold);
    grad_returns[at] = grad_value[row] * g;
}

// ---- positions --------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> positions: array<f32>;
@group(0) @binding(2) var<storage, read> asset_returns: array<f32>;
@group(0) @binding(3) var<storage, read_write> returns_out: array<f32>;

// Where the return of position `at` lies: series of asset returns repeat.
fn asset_at(at: u32) -> u32 {
    if params.period == 0u {
        return at;
    }
    return (params.first + at / params.t) % params.period * params.t + at % params.t;
}

fn position_before(at: u32) -> f32 {
    if at % params.t == 0u {
        return 0.0;
    }
    return positions[at - 1u];
}

@compute @workgroup_size(WG)
fn net_returns(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.n * params.t {
        return;
    }
    returns_out[at] = positions[at] * asset_returns[asset_at(at)] - params.option * abs(positions[at] - position_before(at));
}

@group(0) @binding(3) var<storage, read> grad_returns_in: array<f32>;
@group(0) @binding(4) var<storage, read_write> grad_positions: array<f32>;

@compute @workgroup_size(WG)
fn net_returns_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.n * params.t {
        return;
    }
    let x = positions[at];
    var after = 0.0;
    if at % params.t + 1u < params.t {
        after = grad_returns_in[at + 1u] * params.option * sign(positions[at + 1u] - x);
    }
    grad_positions[at] = grad_returns_in[at] * (asset_returns[asset_at(at)] - params.option * sign(x - position_before(at))) + after;
}
