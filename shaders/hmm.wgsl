// Hidden Markov models: densities and forward-backward. Maths, shapes and source: kernels/hmm.rs.
//   hmm_emission             grid ⌈B·T·K / WG⌉   thread = (sequence, step, state)
//   hmm_forward_backward_4   grid ⌈B / WG⌉       thread = sequence, K ≤ 4: states in a vector, transitions in a matrix
//   hmm_forward_backward_8   grid ⌈B / WG⌉       the same, K ≤ 8: two vectors, four matrices
//   …_table_4, …_table_8     the same for log-probabilities, all observed, under a fixed table
//   …_states_4, …_states_8   the same without predicted and pair probabilities
// Software adapters run every branch under a mask, loads and stores lane by lane: what a kernel need not do must not be compiled in.
//   hmm_forward_backward     grid ⌈B / (WG / L)⌉ L threads per sequence, a state each (or every L-th), L = K rounded up to a power of two, at most WG

struct HmmParams {
    b: u32,
    t: u32,
    k: u32,
    d: u32,
    u: u32,
    emission: u32,
    symbols: u32,
    stride: u32,
    flags: u32,
    begin: u32,
    end: u32,
    park: u32,
    record: u32,
}

@group(0) @binding(0) var<uniform> params: HmmParams;
@group(0) @binding(1) var<storage, read> model: array<f32>;
@group(0) @binding(2) var<storage, read> obs: array<f32>;
@group(0) @binding(3) var<storage, read> words: array<u32>;
@group(0) @binding(4) var<storage, read> log_trans: array<f32>;
@group(0) @binding(5) var<storage, read> inputs: array<f32>;
@group(0) @binding(6) var<storage, read_write> states: array<f32>;
@group(0) @binding(7) var<storage, read_write> pair: array<f32>;
@group(0) @binding(8) var<storage, read_write> summary: array<f32>;

override WG: u32 = 64u;
// 4, 8: up to so many states. 104, 108: with log-probabilities, all observed, under a fixed table, and nothing else compiled in. 204, 208: nor
// predicted and pair probabilities.
override VARIANT: u32 = 0u;

const MODELS: u32 = 1u;
const TRANS_SEQUENCE: u32 = 2u;
const TRANS_STEP: u32 = 4u;
const SOFTMAX: u32 = 8u;
const LENGTHS: u32 = 16u;
const MASKED: u32 = 32u;
const FILTERED: u32 = 64u;
const PREDICTED: u32 = 128u;
const POSTERIOR: u32 = 256u;
const PAIR_SUM: u32 = 512u;
const PAIR_STEPS: u32 = 1024u;
const FORWARD: u32 = 2048u;
const BACKWARD: u32 = 4096u;
const PARK: u32 = 8192u;

const LOG_ZERO: f32 = -1e30;
const IMPOSSIBLE: f32 = -1e29;
const LEAST: f32 = -1e28;
const MOST: f32 = 1e28;
// A step whose sum is below 2^-60 is done again with the joint shift.
const RETRY: f32 = 8.67361738e-19;
// What is predicted below this is forgotten: its reciprocal must be finite.
const TINY: f32 = 1e-37;
const FOLD: u32 = 128u;
const PAIR_BLOCK: u32 = 64u;
const LN2_HIGH: f32 = 0.693359375;
const LN2_LOW: f32 = -2.12194440e-4;

fn plain() -> bool {
    return VARIANT > 100u;
}

fn has(bits: u32) -> bool {
    let possible = ~(select(0u, TRANS_STEP | SOFTMAX | MASKED, plain()) | select(0u, PREDICTED | PAIR_SUM | PAIR_STEPS, VARIANT > 200u));
    return (params.flags & possible & bits) != 0u;
}

fn varies() -> bool {
    return has(TRANS_STEP);
}

fn softmax() -> bool {
    return has(SOFTMAX);
}

// ---- inputs -------------------------------------------------------------------------------------------------------

fn length_of(b: u32) -> u32 {
    if !has(LENGTHS) {
        return params.t;
    }
    return min(words[b * select(1u, 1u + params.t, has(MASKED))], params.t);
}

fn observed(b: u32, t: u32) -> bool {
    if !has(MASKED) {
        return true;
    }
    return words[b * (1u + params.t) + 1u + t] != 0u;
}

fn model_at(b: u32) -> u32 {
    return select(0u, b * params.stride, has(MODELS));
}

// ln x! for x ≥ 0: Stirling's series from 8 on, the recursion below.
fn log_factorial(x: f32) -> f32 {
    var z = x + 1.0;
    var product = 1.0;
    for (var i = 0u; i < 7u && z < 8.0; i++) {
        product *= z;
        z += 1.0;
    }
    let w = 1.0 / z;
    let series = w * (0.083333333 - w * w * (0.0027777778 - w * w * 0.00079365079));
    return (z - 0.5) * log_f32(z) - z + 0.918938533 + series - log_f32(product);
}

fn capped(x: f32) -> f32 {
    return clamp(x, -1e18, 1e18);
}

fn bounded(z: f32) -> f32 {
    return clamp(z, -1e14, 1e14);
}

// Log-density of a state at the observation that starts at `x`, with the model that starts at `m`.
fn density(m: u32, x: u32, state: u32) -> f32 {
    let k = params.k;
    let d = params.d;
    let p = m + k;
    var value = 0.0;
    switch params.emission {
        case 1u: {
            let mean = p + state * d;
            for (var i = 0u; i < d; i++) {
                let z = bounded(capped(obs[x + i] - model[mean + i]) * model[mean + k * d + i]);
                value += z * z;
            }
            value = model[p + 2u * k * d + state] - 0.5 * value;
        }
        case 2u: {
            let triangle = d * (d + 1u) / 2u;
            let mean = p + state * d;
            var at = p + k * d + state * triangle;
            for (var i = 0u; i < d; i++) {
                var z = 0.0;
                for (var j = 0u; j <= i; j++) {
                    z += model[at + j] * capped(obs[x + j] - model[mean + j]);
                }
                at += i + 1u;
                z = bounded(z);
                value += z * z;
            }
            value = model[p + k * (d + triangle) + state] - 0.5 * value;
        }
        case 3u: {
            let location = p + state * d;
            for (var i = 0u; i < d; i++) {
                let z = bounded(capped(obs[x + i] - model[location + i]) * model[location + k * d + i]);
                value += model[location + 2u * k * d + i] * log_1p(z * z * model[location + 3u * k * d + i]);
            }
            value = model[p + 4u * k * d + state] - value;
        }
        case 4u: {
            value = model[p + k * d + state];
            for (var i = 0u; i < d; i++) {
                let count = capped(obs[x + i]);
                value += count * model[p + state * d + i] - log_factorial(count);
            }
        }
        case 5u: {
            return model[p + state * params.symbols + min(u32(max(obs[x], 0.0)), params.symbols - 1u)];
        }
        default: {
            let r = d - 1u;
            var fit = 0.0;
            for (var i = 0u; i < r; i++) {
                fit += capped(obs[x + 1u + i]) * model[p + state * r + i];
            }
            let z = bounded((capped(obs[x]) - fit) * model[p + k * r + state]);
            value = model[p + k * r + k + state] - 0.5 * z * z;
        }
    }
    return max(value, LEAST);
}

// log b of one state at step t of sequence b.
fn log_b(b: u32, t: u32, state: u32) -> f32 {
    if !observed(b, t) {
        return 0.0;
    }
    if params.emission == 0u {
        return min(obs[(b * params.t + t) * params.k + state], MOST);
    }
    return density(model_at(b), (b * params.t + t) * params.d, state);
}

// Where the transitions of slot t of sequence b start.
fn table_at(b: u32, slot: u32) -> u32 {
    let b_trans = select(0u, b, has(TRANS_SEQUENCE));
    if softmax() {
        return b_trans * params.k * params.k * (params.u + 1u);
    }
    let slots = select(1u, max(params.t, 2u) - 1u, has(TRANS_STEP));
    return (b_trans * slots + select(0u, slot, has(TRANS_STEP))) * params.k * params.k;
}

// Entry (i,j) of the table, or the logit: weights·(inputs(t+1), 1).
fn transition(table: u32, b: u32, slot: u32, i: u32, j: u32) -> f32 {
    if !softmax() {
        return log_trans[table + i * params.k + j];
    }
    let at = table + (i * params.k + j) * (params.u + 1u);
    let input = (b * params.t + slot + 1u) * params.u;
    var logit = log_trans[at + params.u];
    for (var c = 0u; c < params.u; c++) {
        logit += log_trans[at + c] * capped(inputs[input + c]);
    }
    return logit;
}

// ---- the log-likelihood -------------------------------------------------------------------------------------------

struct Total {
    high: f32,
    low: f32,
    exponents: i32,
}

// The same bits, out of reach of compilers that reorder sums: the last flag bit is never set.
fn exact(x: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(x) ^ (params.flags >> 31u));
}

fn add(total: Total, x: f32) -> Total {
    let sum = exact(total.high + x);
    let part = exact(sum - total.high);
    let lost = exact(total.high - exact(sum - part)) + (x - part);
    return Total(sum, total.low + lost, total.exponents);
}

fn fold(total: Total) -> Total {
    let e = f32(total.exponents);
    let folded = add(add(total, e * LN2_HIGH), e * LN2_LOW);
    return Total(folded.high, folded.low, 0);
}

fn exponent_of(x: f32) -> i32 {
    return i32(bitcast<u32>(x) >> 23u) - 127;
}

fn power_of_two(e: i32) -> f32 {
    return bitcast<f32>(u32(e + 127) << 23u);
}

fn finish(b: u32, total: Total, sum: f32, failed: f32) {
    let at = b * params.record;
    let whole = add(fold(total), log_f32(sum));
    let high = exact(whole.high + whole.low);
    summary[at] = select(high, LOG_ZERO, failed >= 0.0);
    summary[at + 1u] = select((whole.high - high) + whole.low, 0.0, failed >= 0.0);
    summary[at + 2u] = failed;
    summary[at + 3u] = 0.0;
}

fn section(bit: u32) -> u32 {
    let before = select(0u, 1u, bit > FILTERED && has(FILTERED)) + select(0u, 1u, bit > PREDICTED && has(PREDICTED));
    return before * params.b * params.t * params.k;
}

// ---- a thread per sequence ----------------------------------------------------------------------------------------

// Up to eight states; K ≤ 4 leaves `hi` alone.
struct States {
    lo: vec4<f32>,
    hi: vec4<f32>,
}

// Rows 0..4 and 4..8 (first letter) by columns 0..4 and 4..8; a column of each matrix is a row of transitions.
struct Transitions {
    ll: mat4x4<f32>,
    lh: mat4x4<f32>,
    hl: mat4x4<f32>,
    hh: mat4x4<f32>,
}

fn sum_of(x: States, two: bool) -> f32 {
    var sum = (x.lo.x + x.lo.y) + (x.lo.z + x.lo.w);
    if two {
        sum += (x.hi.x + x.hi.y) + (x.hi.z + x.hi.w);
    }
    return sum;
}

fn max_of(x: States, two: bool) -> f32 {
    var most = max(max(x.lo.x, x.lo.y), max(x.lo.z, x.lo.w));
    if two {
        most = max(most, max(max(x.hi.x, x.hi.y), max(x.hi.z, x.hi.w)));
    }
    return most;
}

fn times(x: States, factor: f32) -> States {
    return States(x.lo * factor, x.hi * factor);
}

fn zero_states() -> States {
    return States(vec4<f32>(0.0), vec4<f32>(0.0));
}

// pred(j) = Σ_i α(i)·A(i,j)
fn predict(a: Transitions, alpha: States, two: bool) -> States {
    if two {
        return States(a.ll * alpha.lo + a.hl * alpha.hi, a.lh * alpha.lo + a.hh * alpha.hi);
    }
    return States(a.ll * alpha.lo, vec4<f32>(0.0));
}

// Σ_j A(i,j)·r(j)
fn onto(a: Transitions, r: States, two: bool) -> States {
    if two {
        return States(r.lo * a.ll + r.hi * a.lh, r.lo * a.hl + r.hi * a.hh);
    }
    return States(r.lo * a.ll, vec4<f32>(0.0));
}

fn exp_states(x: States, shift: f32, two: bool) -> States {
    var y = zero_states();
    y.lo = exp_vec4(x.lo - shift);
    if two {
        y.hi = exp_vec4(x.hi - shift);
    }
    return y;
}

// log 0 in the states from K on.
fn padded(x: States) -> States {
    let k = vec4<u32>(params.k);
    let none = vec4<f32>(LOG_ZERO);
    return States(select(none, x.lo, vec4<u32>(0u, 1u, 2u, 3u) < k), select(none, x.hi, vec4<u32>(4u, 5u, 6u, 7u) < k));
}

fn load4(at: u32, first: u32) -> vec4<f32> {
    let last = params.k - 1u;
    let x = vec4<f32>(obs[at + min(first, last)], obs[at + min(first + 1u, last)], obs[at + min(first + 2u, last)], obs[at + min(first + 3u, last)]);
    return min(x, vec4<f32>(MOST));
}

// x with element j replaced.
fn insert(x: States, j: u32, value: f32, two: bool) -> States {
    var y = x;
    y.lo = select(x.lo, vec4<f32>(value), vec4<u32>(0u, 1u, 2u, 3u) == vec4<u32>(j));
    if two {
        y.hi = select(x.hi, vec4<f32>(value), vec4<u32>(4u, 5u, 6u, 7u) == vec4<u32>(j));
    }
    return y;
}

fn log_b_states(b: u32, t: u32, two: bool) -> States {
    var x = zero_states();
    if observed(b, t) {
        if plain() || params.emission == 0u {
            let at = (b * params.t + t) * params.k;
            x.lo = load4(at, 0u);
            if two {
                x.hi = load4(at, 4u);
            }
        } else {
            for (var j = 0u; j < params.k; j++) {
                x = insert(x, j, density(model_at(b), (b * params.t + t) * params.d, j), two);
            }
        }
    }
    return padded(x);
}

// Row i of slot t as probabilities; zeros from column K on.
fn row(table: u32, b: u32, slot: u32, i: u32, two: bool) -> States {
    var x = States(vec4<f32>(LOG_ZERO), vec4<f32>(LOG_ZERO));
    for (var j = 0u; j < params.k; j++) {
        x = insert(x, j, transition(table, b, slot, i, j), two);
    }
    let y = exp_states(x, select(0.0, max_of(x, two), softmax()), two);
    return times(y, select(1.0, 1.0 / sum_of(y, two), softmax()));
}

fn insert_row(m: mat4x4<f32>, i: u32, x: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(select(m[0], x, i == 0u), select(m[1], x, i == 1u), select(m[2], x, i == 2u), select(m[3], x, i == 3u));
}

fn transitions_of(b: u32, slot: u32, two: bool) -> Transitions {
    let table = table_at(b, slot);
    var a: Transitions;
    for (var i = 0u; i < params.k; i++) {
        let r = row(table, b, slot, i, two);
        a.ll = insert_row(a.ll, i, r.lo);
        if two {
            a.lh = insert_row(a.lh, i, r.hi);
            a.hl = insert_row(a.hl, i - 4u, r.lo);
            a.hh = insert_row(a.hh, i - 4u, r.hi);
        }
    }
    return a;
}

fn store(at: u32, x: States, two: bool) {
    states[at] = x.lo.x;
    if params.k > 1u {
        states[at + 1u] = x.lo.y;
    }
    if params.k > 2u {
        states[at + 2u] = x.lo.z;
    }
    if params.k > 3u {
        states[at + 3u] = x.lo.w;
    }
    if two {
        if params.k > 4u {
            states[at + 4u] = x.hi.x;
        }
        if params.k > 5u {
            states[at + 5u] = x.hi.y;
        }
        if params.k > 6u {
            states[at + 6u] = x.hi.z;
        }
        if params.k > 7u {
            states[at + 7u] = x.hi.w;
        }
    }
}

fn load_states(at: u32, two: bool) -> States {
    let last = params.k - 1u;
    var x = zero_states();
    x.lo = vec4<f32>(states[at], states[at + min(1u, last)], states[at + min(2u, last)], states[at + min(3u, last)]);
    if two {
        x.hi = vec4<f32>(states[at + min(4u, last)], states[at + min(5u, last)], states[at + min(6u, last)], states[at + min(7u, last)]);
    }
    let k = vec4<u32>(params.k);
    let none = vec4<f32>(0.0);
    return States(select(none, x.lo, vec4<u32>(0u, 1u, 2u, 3u) < k), select(none, x.hi, vec4<u32>(4u, 5u, 6u, 7u) < k));
}

// States that wait in the summary between launches.
fn keep(b: u32, x: States, two: bool) {
    let at = b * params.record + 4u;
    for (var j = 0u; j < params.k; j++) {
        let quad = select(x.lo, x.hi, two && j > 3u);
        summary[at + j] = select(select(quad.x, quad.y, (j & 3u) == 1u), select(quad.z, quad.w, (j & 3u) == 3u), (j & 3u) > 1u);
    }
}

fn kept(b: u32, two: bool) -> States {
    var x = zero_states();
    for (var j = 0u; j < params.k; j++) {
        x = insert(x, j, summary[b * params.record + 4u + j], two);
    }
    return x;
}

// pred·exp(log b − shift) with the joint shift max (log b + log pred), for steps at which the plain shift leaves nothing.
fn joint(pred: States, x: States, two: bool) -> States {
    let none = vec4<f32>(LOG_ZERO);
    let least = vec4<f32>(TINY);
    let log4 = States(
        vec4<f32>(log_f32(pred.lo.x), log_f32(pred.lo.y), log_f32(pred.lo.z), log_f32(pred.lo.w)),
        vec4<f32>(log_f32(pred.hi.x), log_f32(pred.hi.y), log_f32(pred.hi.z), log_f32(pred.hi.w)),
    );
    return States(select(none, x.lo + log4.lo, (pred.lo > least) & (x.lo > vec4<f32>(IMPOSSIBLE))), select(none, x.hi + log4.hi, (pred.hi > least) & (x.hi > vec4<f32>(IMPOSSIBLE))));
}

fn initial(b: u32, two: bool) -> States {
    let m = model_at(b);
    let last = params.k - 1u;
    var x = zero_states();
    x.lo = vec4<f32>(model[m], model[m + min(1u, last)], model[m + min(2u, last)], model[m + min(3u, last)]);
    if two {
        x.hi = vec4<f32>(model[m + min(4u, last)], model[m + min(5u, last)], model[m + min(6u, last)], model[m + min(7u, last)]);
    }
    return exp_states(padded(x), 0.0, two);
}

fn forward(b: u32, length: u32, two: bool) {
    let each = params.t * params.k;
    let of_b = b * each;
    let filtered = section(FILTERED) + of_b;
    let predicted = section(PREDICTED) + of_b;
    let parked = params.park * params.b * each + of_b;
    let keeps = has(FILTERED) || has(PARK);
    let kept_at = select(parked, filtered, has(FILTERED));
    let record = b * params.record;
    var total = Total(0.0, 0.0, 0);
    var failed = -1.0;
    var alpha = zero_states();
    var sum = 1.0;
    if params.begin > 0u && params.begin < length {
        total = Total(summary[record], summary[record + 1u], i32(summary[record + 3u]));
        failed = summary[record + 2u];
        alpha = kept(b, two);
        sum = select(sum_of(alpha, two), 1.0, failed >= 0.0);
    }
    var a: Transitions;
    if plain() {
        a = transitions_of(b, 0u, two);
    }
    let end = min(params.end, length);
    var t = params.begin;
    // The inner loop is left at a step that must be done again, and to fold: what those take stays out of it.
    let first = initial(b, two);
    while t < end {
        let stop = min(end, (t / FOLD + 1u) * FOLD);
        var pred: States;
        var x: States;
        var shift = 0.0;
        for (; t < stop; t++) {
            if !plain() && (t == max(params.begin, 1u) || (varies() && t > 0u)) {
                a = transitions_of(b, t - 1u, two);
            }
            pred = predict(a, alpha, two);
            pred = States(select(pred.lo, first.lo, t == 0u), select(pred.hi, first.hi, t == 0u));
            if has(PREDICTED) {
                store(predicted + t * params.k, times(pred, 1.0 / sum), two);
            }
            let exponent = exponent_of(sum);
            total.exponents += exponent;
            pred = times(pred, power_of_two(-exponent));
            x = log_b_states(b, t, two);
            shift = max_of(x, two);
            let y = exp_states(x, shift, two);
            alpha = States(pred.lo * y.lo, pred.hi * y.hi);
            sum = select(sum_of(alpha, two), 0.0, shift <= IMPOSSIBLE);
            if sum < RETRY {
                break;
            }
            total = add(total, shift);
            if keeps {
                store(kept_at + t * params.k, times(alpha, 1.0 / sum), two);
            }
        }
        if t < stop {
            let z = joint(pred, x, two);
            shift = max_of(z, two);
            alpha = exp_states(z, shift, two);
            sum = sum_of(alpha, two);
            if shift <= IMPOSSIBLE {
                failed = select(failed, f32(t), failed < 0.0);
                alpha = zero_states();
                sum = 1.0;
                shift = 0.0;
            }
            total = add(total, shift);
            if keeps {
                store(kept_at + t * params.k, times(alpha, 1.0 / sum), two);
            }
            t++;
        }
        if t % FOLD == 0u {
            total = fold(total);
        }
    }
    if params.end >= length && (params.begin < length || params.begin == 0u) {
        finish(b, total, sum, failed);
    } else if params.end < length {
        summary[record] = total.high;
        summary[record + 1u] = total.low;
        summary[record + 2u] = failed;
        summary[record + 3u] = f32(total.exponents);
        keep(b, alpha, two);
    }
    for (t = max(params.begin, length); t < params.end; t++) {
        let at = of_b + t * params.k;
        if has(FILTERED) {
            store(section(FILTERED) + at, zero_states(), two);
        }
        if has(PREDICTED) {
            store(section(PREDICTED) + at, zero_states(), two);
        }
        if has(POSTERIOR) {
            store(section(POSTERIOR) + at, zero_states(), two);
        }
    }
}

// Column i of a block of the pair posterior: A(i,·)·r scaled by α(i).
fn pairs4(a: mat4x4<f32>, alpha: vec4<f32>, r: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(a[0] * r * alpha.x, a[1] * r * alpha.y, a[2] * r * alpha.z, a[3] * r * alpha.w);
}

fn put_pair(at: u32, i: u32, first: u32, x: vec4<f32>, add_to: bool) {
    if i >= params.k || first >= params.k {
        return;
    }
    let to = at + i * params.k + first;
    let old = select(0.0, 1.0, add_to);
    pair[to] = old * pair[to] + x.x;
    if params.k > first + 1u {
        pair[to + 1u] = old * pair[to + 1u] + x.y;
    }
    if params.k > first + 2u {
        pair[to + 2u] = old * pair[to + 2u] + x.z;
    }
    if params.k > first + 3u {
        pair[to + 3u] = old * pair[to + 3u] + x.w;
    }
}

fn put_pairs(at: u32, x: Transitions, add_to: bool, two: bool) {
    put_pair(at, 0u, 0u, x.ll[0], add_to);
    put_pair(at, 1u, 0u, x.ll[1], add_to);
    put_pair(at, 2u, 0u, x.ll[2], add_to);
    put_pair(at, 3u, 0u, x.ll[3], add_to);
    if two {
        put_pair(at, 0u, 4u, x.lh[0], add_to);
        put_pair(at, 1u, 4u, x.lh[1], add_to);
        put_pair(at, 2u, 4u, x.lh[2], add_to);
        put_pair(at, 3u, 4u, x.lh[3], add_to);
        put_pair(at, 4u, 0u, x.hl[0], add_to);
        put_pair(at, 5u, 0u, x.hl[1], add_to);
        put_pair(at, 6u, 0u, x.hl[2], add_to);
        put_pair(at, 7u, 0u, x.hl[3], add_to);
        put_pair(at, 4u, 4u, x.hh[0], add_to);
        put_pair(at, 5u, 4u, x.hh[1], add_to);
        put_pair(at, 6u, 4u, x.hh[2], add_to);
        put_pair(at, 7u, 4u, x.hh[3], add_to);
    }
}

fn no_pairs() -> Transitions {
    var x: Transitions;
    return x;
}

fn ratio4(gamma: vec4<f32>, pred: vec4<f32>) -> vec4<f32> {
    // the reciprocal does not wait for γ: a product is all that lies on the chain
    return gamma * select(vec4<f32>(0.0), 1.0 / pred, pred > vec4<f32>(TINY));
}

fn backward(b: u32, length: u32, two: bool) {
    let each = params.t * params.k;
    let of_b = b * each;
    let posterior = section(POSTERIOR) + of_b;
    let parked = params.park * params.b * each + of_b;
    let pairs = has(PAIR_SUM | PAIR_STEPS);
    var gamma = zero_states();
    if params.end < length {
        gamma = kept(b, two);
    }
    var a: Transitions;
    if plain() {
        a = transitions_of(b, 0u, two);
    }
    var block = no_pairs();
    // The sum over time starts afresh in the launch that holds the last step.
    var adds = params.end < params.t;
    for (var after = params.end; after > params.begin; after--) {
        let t = after - 1u;
        if after <= length {
            let alpha = load_states(parked + t * params.k, two);
            var inverse = 1.0;
            if after == length {
                gamma = alpha;
            } else {
                if !plain() && (varies() || after == min(params.end, length - 1u)) {
                    a = transitions_of(b, t, two);
                }
                let pred = predict(a, alpha, two);
                var r = zero_states();
                r.lo = ratio4(gamma.lo, pred.lo);
                if two {
                    r.hi = ratio4(gamma.hi, pred.hi);
                }
                let from_here = onto(a, r, two);
                gamma = States(alpha.lo * from_here.lo, alpha.hi * from_here.hi);
                let sum = sum_of(gamma, two);
                inverse = select(0.0, 1.0 / sum, sum > 0.0);
                if pairs {
                    let scaled = times(alpha, inverse);
                    block.ll += pairs4(a.ll, scaled.lo, r.lo);
                    if two {
                        block.lh += pairs4(a.lh, scaled.lo, r.hi);
                        block.hl += pairs4(a.hl, scaled.hi, r.lo);
                        block.hh += pairs4(a.hh, scaled.hi, r.hi);
                    }
                }
            }
            if has(POSTERIOR) {
                store(posterior + t * params.k, times(gamma, inverse), two);
            }
        }
        if (has(PAIR_STEPS) && after < params.t) || (has(PAIR_SUM) && (t % PAIR_BLOCK == 0u || t == params.begin)) {
            let slot = select(b, b * (params.t - 1u) + t, has(PAIR_STEPS));
            put_pairs(slot * params.k * params.k, block, adds && has(PAIR_SUM), two);
            block = no_pairs();
            adds = true;
        }
    }
    if params.begin > 0u && params.begin < length {
        keep(b, gamma, two);
    }
}

fn thread_per_sequence(b: u32, two: bool) {
    if b >= params.b {
        return;
    }
    let length = length_of(b);
    if has(FORWARD) {
        forward(b, length, two);
    }
    if has(BACKWARD) {
        backward(b, length, two);
    }
}

@compute @workgroup_size(WG)
fn hmm_forward_backward_4(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    thread_per_sequence(group_index(wid, nwg) * WG + tid, false);
}

@compute @workgroup_size(WG)
fn hmm_forward_backward_8(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    thread_per_sequence(group_index(wid, nwg) * WG + tid, true);
}

@compute @workgroup_size(WG)
fn hmm_forward_backward_table_4(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    thread_per_sequence(group_index(wid, nwg) * WG + tid, false);
}

@compute @workgroup_size(WG)
fn hmm_forward_backward_table_8(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    thread_per_sequence(group_index(wid, nwg) * WG + tid, true);
}

@compute @workgroup_size(WG)
fn hmm_forward_backward_states_4(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    thread_per_sequence(group_index(wid, nwg) * WG + tid, false);
}

@compute @workgroup_size(WG)
fn hmm_forward_backward_states_8(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    thread_per_sequence(group_index(wid, nwg) * WG + tid, true);
}

// ---- several threads per sequence ---------------------------------------------------------------------------------

// Workgroup memory: four arrays over the states of all sequences of the group (log b or γ, α, predicted or ratio, row sums of a softmax), then,
// where they fit, the transitions and the pair posteriors of a block of steps.
const POOL: u32 = 4096u;
var<workgroup> sh: array<f32, POOL>;

// One thread of a sequence: its states are lane, lane + lanes, …; each array's part of the sequence starts here.
struct Lane {
    b: u32,
    length: u32,
    lane: u32,
    lanes: u32,
    log_b: u32,
    alpha: u32,
    ratio: u32,
    row: u32,
    transitions: u32,
    pairs: u32,
    keeps_transitions: bool,
    keeps_pairs: bool,
    valid: bool,
}

// Fills what transitions of a slot need: the matrix, or for many states under a softmax the logarithm of each row's sum. Barrier after.
fn fill_transitions(l: Lane, slot: u32) {
    let table = table_at(l.b, slot);
    let k = params.k;
    for (var i = l.lane; i < k; i += l.lanes) {
        var total = 0.0;
        if has(SOFTMAX) {
            var most = LOG_ZERO;
            for (var j = 0u; j < k; j++) {
                most = max(most, transition(table, l.b, slot, i, j));
            }
            for (var j = 0u; j < k; j++) {
                total += exp_f32(transition(table, l.b, slot, i, j) - most);
            }
            total = most + log_f32(total);
            sh[l.row + i] = total;
        }
        if l.keeps_transitions {
            for (var j = 0u; j < k; j++) {
                sh[l.transitions + i * k + j] = exp_f32(transition(table, l.b, slot, i, j) - total);
            }
        }
    }
}

fn probability(l: Lane, slot: u32, table: u32, i: u32, j: u32) -> f32 {
    if l.keeps_transitions {
        return sh[l.transitions + i * params.k + j];
    }
    let x = transition(table, l.b, slot, i, j);
    if has(SOFTMAX) {
        return exp_f32(x - sh[l.row + i]);
    }
    return exp_f32(x);
}

// Σ_i α(i)·A(i,j)
fn predict_state(l: Lane, slot: u32, j: u32) -> f32 {
    let table = table_at(l.b, slot);
    var pred = 0.0;
    for (var i = 0u; i < params.k; i++) {
        pred += sh[l.alpha + i] * probability(l, slot, table, i, j);
    }
    return pred;
}

// α(j) of a step that is done again, from what was predicted and observed.
fn joint_state(l: Lane, j: u32) -> f32 {
    let pred = sh[l.ratio + j];
    let x = sh[l.log_b + j];
    if pred > TINY && x > IMPOSSIBLE {
        return x + log_f32(pred);
    }
    return LOG_ZERO;
}

fn clear_padding(l: Lane) {
    let each = params.t * params.k;
    let at = l.b * each;
    for (var i = max(params.begin, l.length) * params.k + l.lane; i < params.end * params.k; i += l.lanes) {
        if has(FILTERED) {
            states[section(FILTERED) + at + i] = 0.0;
        }
        if has(PREDICTED) {
            states[section(PREDICTED) + at + i] = 0.0;
        }
        if has(POSTERIOR) {
            states[section(POSTERIOR) + at + i] = 0.0;
        }
    }
}

fn forward_lanes(l: Lane) {
    let k = params.k;
    let each = params.t * k;
    let of_b = l.b * each;
    let filtered = section(FILTERED) + of_b;
    let predicted = section(PREDICTED) + of_b;
    let parked = params.park * params.b * each + of_b;
    let parks = has(PARK) && !has(FILTERED);
    let record = l.b * params.record;
    var total = Total(0.0, 0.0, 0);
    var failed = -1.0;
    var sum = 1.0;
    if l.valid && params.begin > 0u && params.begin < l.length {
        total = Total(summary[record], summary[record + 1u], i32(summary[record + 3u]));
        failed = summary[record + 2u];
        sum = 0.0;
        for (var j = 0u; j < k; j++) {
            sum += summary[record + 4u + j];
        }
        sum = select(sum, 1.0, failed >= 0.0);
        for (var j = l.lane; j < k; j += l.lanes) {
            sh[l.alpha + j] = summary[record + 4u + j];
        }
    }
    if l.valid && !has(TRANS_STEP) {
        fill_transitions(l, 0u);
    }
    // A step that is done again has its shift here until α is written anew.
    var again = LOG_ZERO;
    for (var t = params.begin; t < params.end; t++) {
        let runs = l.valid && t < l.length;
        if runs {
            for (var j = l.lane; j < k; j += l.lanes) {
                if again > IMPOSSIBLE {
                    sh[l.alpha + j] = exp_f32(joint_state(l, j) - again);
                }
                sh[l.log_b + j] = log_b(l.b, t, j);
            }
            if t > 0u && has(TRANS_STEP) {
                fill_transitions(l, t - 1u);
            }
        }
        workgroupBarrier();  // α, log b and transitions are complete
        var shift = LOG_ZERO;
        let exponent = exponent_of(sum);
        if runs {
            for (var j = 0u; j < k; j++) {
                shift = max(shift, sh[l.log_b + j]);
            }
            for (var j = l.lane; j < k; j += l.lanes) {
                var pred = 0.0;
                if t == 0u {
                    pred = exp_f32(model[model_at(l.b) + j]);
                } else {
                    pred = predict_state(l, t - 1u, j);
                }
                if has(PREDICTED) {
                    states[predicted + t * k + j] = pred / sum;
                }
                sh[l.ratio + j] = pred * power_of_two(-exponent);
            }
            total.exponents += exponent;
        }
        workgroupBarrier();  // all have read α
        if runs {
            for (var j = l.lane; j < k; j += l.lanes) {
                let b = exp_f32(sh[l.log_b + j] - shift);
                sh[l.alpha + j] = select(sh[l.ratio + j] * b, 0.0, shift <= IMPOSSIBLE);
            }
        }
        workgroupBarrier();  // α is complete
        if runs {
            sum = 0.0;
            for (var j = 0u; j < k; j++) {
                sum += sh[l.alpha + j];
            }
            again = LOG_ZERO;
            if sum < RETRY {
                sum = 0.0;
                for (var j = 0u; j < k; j++) {
                    again = max(again, joint_state(l, j));
                }
                for (var j = 0u; j < k; j++) {
                    sum += exp_f32(joint_state(l, j) - again);
                }
                shift = again;
                if again <= IMPOSSIBLE {
                    failed = select(failed, f32(t), failed < 0.0);
                    sum = 1.0;
                    shift = 0.0;
                }
            }
            total = add(total, shift);
            if t % FOLD == FOLD - 1u {
                total = fold(total);
            }
            if has(FILTERED) || parks {
                let to = select(parked, filtered, has(FILTERED)) + t * k;
                for (var j = l.lane; j < k; j += l.lanes) {
                    var alpha = sh[l.alpha + j];
                    if again > IMPOSSIBLE {
                        alpha = exp_f32(joint_state(l, j) - again);
                    }
                    // an impossible step leaves no α
                    states[to + j] = select(alpha / sum, 0.0, failed >= 0.0);
                }
            }
        }
        workgroupBarrier();  // all have read α and what a step done again reads
    }
    if !l.valid {
        return;
    }
    let last = params.end < l.length;
    if last {
        for (var j = l.lane; j < k; j += l.lanes) {
            var alpha = sh[l.alpha + j];
            if again > IMPOSSIBLE {
                alpha = exp_f32(joint_state(l, j) - again);
            }
            summary[record + 4u + j] = alpha;
        }
    }
    if l.lane == 0u {
        if last {
            summary[record] = total.high;
            summary[record + 1u] = total.low;
            summary[record + 2u] = failed;
            summary[record + 3u] = f32(total.exponents);
        } else if params.begin < l.length || params.begin == 0u {
            finish(l.b, total, sum, failed);
        }
    }
    clear_padding(l);
}

fn backward_lanes(l: Lane) {
    let k = params.k;
    let each = params.t * k;
    let posterior = section(POSTERIOR) + l.b * each;
    let parked = params.park * params.b * each + l.b * each;
    let record = l.b * params.record;
    let end = min(params.end, l.length);
    // γ of the step after lies where log b lay
    if l.valid && params.begin < l.length {
        for (var j = l.lane; j < k; j += l.lanes) {
            var gamma = 0.0;
            if params.end < l.length {
                gamma = summary[record + 4u + j];
            } else {
                gamma = states[parked + (end - 1u) * k + j];
                if has(POSTERIOR) {
                    states[posterior + (end - 1u) * k + j] = gamma;
                }
            }
            sh[l.log_b + j] = gamma;
        }
        if !has(TRANS_STEP) {
            fill_transitions(l, 0u);
        }
    }
    // The sum over time starts afresh in the launch that holds the last step, its blocks after each flush.
    var adds = params.end < params.t;
    var fresh = true;
    for (var after = params.end; after > params.begin; after--) {
        let t = after - 1u;
        let runs = l.valid && after < l.length;
        if has(TRANS_STEP) {
            workgroupBarrier();  // all have read the transitions of the step after
        }
        if runs {
            for (var j = l.lane; j < k; j += l.lanes) {
                sh[l.alpha + j] = states[parked + t * k + j];
            }
            if has(TRANS_STEP) {
                fill_transitions(l, t);
            }
        }
        workgroupBarrier();  // α, γ and transitions are complete
        var inverse = 0.0;
        if runs {
            var sum = 0.0;
            for (var j = 0u; j < k; j++) {
                sum += sh[l.log_b + j];
            }
            inverse = select(0.0, 1.0 / sum, sum > 0.0);
            for (var j = l.lane; j < k; j += l.lanes) {
                let pred = predict_state(l, t, j);
                sh[l.ratio + j] = select(0.0, sh[l.log_b + j] / pred, pred > TINY);
            }
        }
        workgroupBarrier();  // the ratios are complete, all have read γ
        let flush = has(PAIR_SUM) && (!l.keeps_pairs || t % PAIR_BLOCK == 0u || t == params.begin);
        if l.valid {
            let table = table_at(l.b, t);
            let at = select(l.b, l.b * (params.t - 1u) + t, has(PAIR_STEPS)) * k * k;
            for (var i = l.lane; i < k; i += l.lanes) {
                let alpha = sh[l.alpha + i] * inverse;
                var onto = 0.0;
                for (var j = 0u; j < k; j++) {
                    var p = 0.0;
                    if runs {
                        p = probability(l, t, table, i, j) * sh[l.ratio + j];
                        onto += p;
                    }
                    if has(PAIR_STEPS) && after < params.t {
                        pair[at + i * k + j] = select(0.0, alpha * p, runs);
                    }
                    if has(PAIR_SUM) {
                        var total = select(0.0, alpha * p, runs);
                        if l.keeps_pairs {
                            total += select(sh[l.pairs + i * k + j], 0.0, fresh);
                            sh[l.pairs + i * k + j] = total;
                        }
                        if flush {
                            pair[at + i * k + j] = select(0.0, pair[at + i * k + j], adds) + total;
                        }
                    }
                }
                if runs {
                    sh[l.log_b + i] = alpha * onto;
                    if has(POSTERIOR) {
                        states[posterior + t * k + i] = alpha * onto;
                    }
                }
            }
        }
        fresh = flush;
        adds = adds || flush;
    }
    if l.valid && params.begin > 0u && params.begin < l.length {
        for (var j = l.lane; j < k; j += l.lanes) {
            summary[record + 4u + j] = sh[l.log_b + j];
        }
    }
}

@compute @workgroup_size(WG)
fn hmm_forward_backward(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    var lanes = 1u;
    while lanes < WG && lanes < params.k {
        lanes *= 2u;
    }
    let slot = tid / lanes;
    let k = params.k;
    let all = WG / lanes * k;
    var l: Lane;
    l.b = group_index(wid, nwg) * (WG / lanes) + slot;
    l.valid = l.b < params.b;
    l.lane = tid % lanes;
    l.lanes = lanes;
    l.log_b = slot * k;
    l.alpha = all + l.log_b;
    l.ratio = 2u * all + l.log_b;
    l.row = 3u * all + l.log_b;
    l.transitions = 4u * all + slot * k * k;
    l.pairs = l.transitions + all * k;
    l.keeps_transitions = all * (4u + k) <= POOL;
    l.keeps_pairs = all * (4u + 2u * k) <= POOL;
    if l.valid {
        l.length = length_of(l.b);
    }
    if has(FORWARD) {
        forward_lanes(l);
    }
    if has(BACKWARD) {
        backward_lanes(l);
    }
}

// ---- densities ----------------------------------------------------------------------------------------------------

@group(0) @binding(4) var<storage, read_write> log_obs: array<f32>;

@compute @workgroup_size(WG)
fn hmm_emission(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.b * params.t * params.k {
        return;
    }
    let step = at / params.k;
    log_obs[at] = log_b(step / params.t, step % params.t, at % params.k);
}
