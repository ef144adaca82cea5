// Element-wise functions, fill and dropout. Maths, shapes and source: kernels/map.rs.
//   map, fill   grid ⌈count / (WG·PER)⌉   thread t of a group takes elements t, t + WG, …
//   dropout     grid ⌈count / (WG·4)⌉     thread = four neighbours, one Philox counter

struct MapParams {
    code: u32,
    arity: u32,
    add: u32,
    count: u32,
    rank: u32,
    p: f32,
    q: f32,
    a_at: u32,
    b_at: u32,
    c_at: u32,
    y_at: u32,
    n0: u32, a0: u32, b0: u32, c0: u32, y0: u32,
    n1: u32, a1: u32, b1: u32, c1: u32, y1: u32,
    n2: u32, a2: u32, b2: u32, c2: u32, y2: u32,
    n3: u32, a3: u32, b3: u32, c3: u32, y3: u32,
    n4: u32, a4: u32, b4: u32, c4: u32, y4: u32,
    n5: u32, a5: u32, b5: u32, c5: u32, y5: u32,
}

struct FillParams {
    count: u32,
    value: f32,
}

struct DropoutParams {
    count: u32,
    block: u32,
    block_high: u32,
    stream: u32,
    seed: u32,
    seed_high: u32,
    threshold: u32,
    p: f32,
}

override WG: u32 = 256u;
override PER: u32 = 4u;

@group(0) @binding(0) var<uniform> params: MapParams;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read> c: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

const MAP_COPY: u32 = 0u;
const MAP_NEG: u32 = 1u;
const MAP_EXP: u32 = 2u;
const MAP_LOG: u32 = 3u;
const MAP_LOG1P: u32 = 4u;
const MAP_SQRT: u32 = 5u;
const MAP_SQUARE: u32 = 6u;
const MAP_ABS: u32 = 7u;
const MAP_SIGN: u32 = 8u;
const MAP_RECIPROCAL: u32 = 9u;
const MAP_RELU: u32 = 10u;
const MAP_GELU: u32 = 11u;
const MAP_TANH: u32 = 12u;
const MAP_SIGMOID: u32 = 13u;
const MAP_SILU: u32 = 14u;
const MAP_SOFTPLUS: u32 = 15u;
const MAP_CLAMP: u32 = 16u;
const MAP_AFFINE: u32 = 17u;
const MAP_POWER: u32 = 18u;
const MAP_STEP: u32 = 19u;
const MAP_SHARE: u32 = 20u;
const MAP_LOG_D: u32 = 32u;
const MAP_LOG1P_D: u32 = 33u;
const MAP_SQRT_D: u32 = 34u;
const MAP_SQUARE_D: u32 = 35u;
const MAP_ABS_D: u32 = 36u;
const MAP_RECIPROCAL_D: u32 = 37u;
const MAP_RELU_D: u32 = 38u;
const MAP_GELU_D: u32 = 39u;
const MAP_TANH_D: u32 = 40u;
const MAP_SIGMOID_D: u32 = 41u;
const MAP_SILU_D: u32 = 42u;
const MAP_SOFTPLUS_D: u32 = 43u;
const MAP_CLAMP_D: u32 = 44u;
const MAP_POWER_D: u32 = 45u;
const MAP_ADD: u32 = 64u;
const MAP_SUB: u32 = 65u;
const MAP_MUL: u32 = 66u;
const MAP_DIV: u32 = 67u;
const MAP_MIN: u32 = 68u;
const MAP_MAX: u32 = 69u;
const MAP_GLU: u32 = 70u;
const MAP_REST: u32 = 71u;
const MAP_DIV_B: u32 = 96u;
const MAP_MIN_A: u32 = 97u;
const MAP_MIN_B: u32 = 98u;
const MAP_MAX_A: u32 = 99u;
const MAP_MAX_B: u32 = 100u;
const MAP_GLU_B: u32 = 101u;
const MAP_MIX: u32 = 102u;
const MAP_MIX_C: u32 = 103u;

// ---- functions --------------------------------------------------------------------------------------------------

fn map_is_nan(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u;
}

// A number by its bits, which no compiler folds.
fn map_by_bits(bits: u32) -> f32 {
    return bitcast<f32>(bits | (params.code >> 31u));
}

fn map_exp(x: f32) -> f32 {
    if x > 88.0 {
        return exp_f32(min(x - 1.0, 88.0)) * 2.7182817;
    }
    return exp_f32(x);
}

fn map_log(x: f32) -> f32 {
    if x >= 1.1754944e-38 && x < 3.4e38 {
        return log_f32(x);
    }
    if x > 0.0 {
        return select(log_f32(x * 16777216.0) - 16.635532, x, x > 1.0);
    }
    return map_by_bits(select(0x7fc00000u, 0xff800000u, x == 0.0));
}

fn map_log_1p(x: f32) -> f32 {
    if x > -0.5 && x < 0.7 {
        return twice_artanh(x / (2.0 + x));
    }
    return map_log(1.0 + x);
}

fn map_sigmoid(x: f32) -> f32 {
    return 1.0 / (1.0 + exp_f32(min(-x, 88.0)));
}

fn map_tanh(x: f32) -> f32 {
    if abs(x) < 0.625 {
        let u = x * x;
        return x * (1.0 + u * (-0.3333325 + u * (0.13330932 + u * (-0.053705316 + u * (0.020539926 + u * -0.0056027286)))));
    }
    let far = 1.0 - 2.0 / (exp_f32(min(2.0 * abs(x), 88.0)) + 1.0);
    return select(far, -far, x < 0.0);
}

// Normal distribution function.
fn map_phi(x: f32) -> f32 {
    let z = min(abs(x) * 0.70710677, 9.7);
    let t = 1.0 / (1.0 + 0.5 * z);
    let low = 0.28206274 + t * (0.2828936 + t * (0.23832202 + t * (0.22712865 + t * -0.10311595)));
    let t5 = t * t * t * t * t;
    let p = low + t5 * (0.43055746 + t * (-0.6815482 + t * (0.43781054 + t * (-0.1271211 + t * 0.013010177))));
    let tail = 0.5 * t * p * exp_f32(-z * z);
    return select(tail, 1.0 - tail, x > 0.0);
}

fn map_power(x: f32, p: f32) -> f32 {
    let whole = floor(p) == p;
    if whole && abs(p) <= 64.0 {
        var result = 1.0;
        var factor = x;
        for (var n = u32(abs(p)); n > 0u; n >>= 1u) {
            if (n & 1u) == 1u {
                result *= factor;
            }
            factor *= factor;
        }
        return select(result, 1.0 / result, p < 0.0);
    }
    if x == 0.0 {
        return map_by_bits(select(0u, 0x7f800000u, p < 0.0));
    }
    let size = map_exp(clamp(p * map_log(abs(x)), -100.0, 100.0));
    if x > 0.0 {
        return size;
    }
    let odd = p - 2.0 * floor(0.5 * p) == 1.0;
    return select(map_by_bits(0x7fc00000u), select(size, -size, odd), whole);
}

fn map_sign(x: f32) -> f32 {
    return select(0.0, 1.0, x > 0.0) - select(0.0, 1.0, x < 0.0);
}

fn map_value_of(a: f32, b: f32, c: f32) -> f32 {
    let p = params.p;
    let q = params.q;
    switch params.code {
        case MAP_COPY: { return a; }
        case MAP_NEG: { return -a; }
        case MAP_EXP: { return map_exp(a); }
        case MAP_LOG: { return map_log(a); }
        case MAP_LOG1P: { return map_log_1p(a); }
        case MAP_SQRT: { return sqrt(a); }
        case MAP_SQUARE: { return a * a; }
        case MAP_ABS: { return abs(a); }
        case MAP_SIGN: { return map_sign(a); }
        case MAP_RECIPROCAL: { return 1.0 / a; }
        case MAP_RELU: { return max(a, 0.0); }
        case MAP_GELU: { return a * map_phi(a); }
        case MAP_TANH: { return map_tanh(a); }
        case MAP_SIGMOID: { return map_sigmoid(a); }
        case MAP_SILU: { return a * map_sigmoid(a); }
        case MAP_SOFTPLUS: { return max(a, 0.0) + map_log_1p(exp_f32(-abs(a))); }
        case MAP_CLAMP: { return select(select(a, q, a > q), p, a < p); }
        case MAP_AFFINE: { return p * a + q; }
        case MAP_POWER: { return map_power(a, p); }
        case MAP_STEP: { return select(0.0, 1.0, a > 0.0); }
        case MAP_SHARE: { return a / (p + q); }
        case MAP_LOG_D: { return b / a; }
        case MAP_LOG1P_D: { return b / (1.0 + a); }
        case MAP_SQRT_D: { return b / (2.0 * a); }
        case MAP_SQUARE_D: { return 2.0 * a * b; }
        case MAP_ABS_D: { return map_sign(a) * b; }
        case MAP_RECIPROCAL_D: { return -(b * a * a); }
        case MAP_RELU_D: { return select(0.0, b, a > 0.0); }
        case MAP_GELU_D: { return b * (map_phi(a) + a * 0.3989423 * exp_f32(-0.5 * (a * a))); }
        case MAP_TANH_D: { return b * (1.0 - a * a); }
        case MAP_SIGMOID_D: { return b * a * (1.0 - a); }
        case MAP_SILU_D: { return b * map_sigmoid(a) * (1.0 + a * map_sigmoid(-a)); }
        case MAP_SOFTPLUS_D: { return b * map_sigmoid(a); }
        case MAP_CLAMP_D: { return select(0.0, b, a >= p && a <= q); }
        case MAP_POWER_D: {
            if p == 0.0 {
                return 0.0;
            }
            return b * p * map_power(a, p - 1.0);
        }
        case MAP_ADD: { return a + b; }
        case MAP_SUB: { return a - b; }
        case MAP_MUL: { return a * b; }
        case MAP_DIV: { return a / b; }
        case MAP_MIN: { return select(a, b, b < a); }
        case MAP_MAX: { return select(a, b, b > a); }
        case MAP_GLU: { return a * map_sigmoid(b); }
        case MAP_REST: { return a * (1.0 - b); }
        case MAP_DIV_B: { return -(c * (a / b) / b); }
        case MAP_MIN_A: { return select(0.0, c, a <= b); }
        case MAP_MIN_B: { return select(0.0, c, b < a); }
        case MAP_MAX_A: { return select(0.0, c, a >= b); }
        case MAP_MAX_B: { return select(0.0, c, b > a); }
        case MAP_GLU_B: { return c * a * map_sigmoid(b) * map_sigmoid(-b); }
        case MAP_MIX: { return a * c + b * (1.0 - c); }
        case MAP_MIX_C: { return c * (a - b); }
        default: { return a; }
    }
}

// ---- map --------------------------------------------------------------------------------------------------------

// Where element i lies in a, b, c and y.
fn map_place(i: u32) -> vec4<u32> {
    var at = vec4<u32>(params.a_at, params.b_at, params.c_at, params.y_at);
    if params.rank == 1u {
        return at + i * vec4<u32>(params.a0, params.b0, params.c0, params.y0);
    }
    var rest = i / params.n0;
    at += (i - rest * params.n0) * vec4<u32>(params.a0, params.b0, params.c0, params.y0);
    {
        let next = rest / params.n1;
        at += (rest - next * params.n1) * vec4<u32>(params.a1, params.b1, params.c1, params.y1);
        rest = next;
    }
    if params.rank > 2u {
        let next = rest / params.n2;
        at += (rest - next * params.n2) * vec4<u32>(params.a2, params.b2, params.c2, params.y2);
        rest = next;
    }
    if params.rank > 3u {
        let next = rest / params.n3;
        at += (rest - next * params.n3) * vec4<u32>(params.a3, params.b3, params.c3, params.y3);
        rest = next;
    }
    if params.rank > 4u {
        let next = rest / params.n4;
        at += (rest - next * params.n4) * vec4<u32>(params.a4, params.b4, params.c4, params.y4);
        rest = next;
    }
    if params.rank > 5u {
        let next = rest / params.n5;
        at += (rest - next * params.n5) * vec4<u32>(params.a5, params.b5, params.c5, params.y5);
        rest = next;
    }
    return at;
}

@compute @workgroup_size(WG)
fn map(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= (params.count + WG * PER - 1u) / (WG * PER) {
        return;
    }
    let first = group * WG * PER + tid;
    for (var k = 0u; k < PER; k++) {
        let i = first + k * WG;
        if i >= params.count {
            return;
        }
        let at = map_place(i);
        let a_i = a[at.x];
        var b_i = a_i;
        var c_i = a_i;
        if params.arity > 1u {
            b_i = b[at.y];
        }
        if params.arity > 2u {
            c_i = c[at.z];
        }
        var v = map_value_of(a_i, b_i, c_i);
        v = select(v, c_i, map_is_nan(c_i));
        v = select(v, b_i, map_is_nan(b_i));
        v = select(v, a_i, map_is_nan(a_i));
        if params.add == 1u {
            v += y[at.w];
        }
        y[at.w] = v;
    }
}

// ---- fill -------------------------------------------------------------------------------------------------------

@group(0) @binding(0) var<uniform> fill_params: FillParams;
@group(0) @binding(1) var<storage, read_write> fill_y: array<f32>;

@compute @workgroup_size(WG)
fn fill(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= (fill_params.count + WG * PER - 1u) / (WG * PER) {
        return;
    }
    let first = group * WG * PER + tid;
    for (var k = 0u; k < PER; k++) {
        let i = first + k * WG;
        if i < fill_params.count {
            fill_y[i] = fill_params.value;
        }
    }
}

// ---- dropout ----------------------------------------------------------------------------------------------------

@group(0) @binding(0) var<uniform> dropout_params: DropoutParams;
@group(0) @binding(1) var<storage, read> dropout_x: array<f32>;
@group(0) @binding(2) var<storage, read> step_word: array<u32>;
@group(0) @binding(3) var<storage, read_write> dropout_y: array<f32>;

@compute @workgroup_size(WG)
fn dropout(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let own = group_index(wid, nwg) * WG + tid;
    if own >= (dropout_params.count + PER - 1u) / PER {
        return;
    }
    let block = add64(vec2<u32>(dropout_params.block, dropout_params.block_high), vec2<u32>(own, 0u));
    let word = philox4x32(vec4<u32>(block, dropout_params.stream, step_word[0]), vec2<u32>(dropout_params.seed, dropout_params.seed_high));
    let kept = dropout_params.p < 1.0;
    let scale = 1.0 / select(1.0, 1.0 - dropout_params.p, kept);
    for (var k = 0u; k < 4u; k++) {
        let i = 4u * own + k;
        if i < dropout_params.count {
            dropout_y[i] = select(0.0, dropout_x[i] * scale, kept && word[k] >= dropout_params.threshold);
        }
    }
}
