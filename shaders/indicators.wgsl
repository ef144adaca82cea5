// Decision variables that many sets share, as keys. Maths, shapes and source: kernels/indicators.rs.
//   price_sums                                   grid  A                    one workgroup per asset: scan of ⌈T/WG⌉ bars a thread
//   indicator_sma, _bollinger, _volatility       grid  ⌈A·T·rows / WG⌉      thread = (asset, bar, row)
//   indicator_donchian                           grid  ⌈A·T / WG⌉           thread = (asset, bar)
//   indicator_ema, _rsi                          grid  A·⌈rows / WG⌉        thread = (asset, row), sequential over bars

struct IndicatorParams {
    a: u32,
    t: u32,
    rows: u32,
    bits: u32,
    extra: u32,
}

@group(0) @binding(0) var<uniform> params: IndicatorParams;
@group(0) @binding(1) var<storage, read> price: array<f32>;
@group(0) @binding(2) var<storage, read> exponents: array<u32>;

override WG: u32 = 64u;
const NEUTRAL: u32 = 0x40000000u;

// ---- returns and prefix sums --------------------------------------------------------------------------------------

@group(0) @binding(3) var<storage, read_write> returns: array<f32>;
@group(0) @binding(4) var<storage, read_write> sums: array<u32>;
@group(0) @binding(5) var<storage, read_write> squares: array<u32>;

var<workgroup> sh_sum: array<vec4<u32>, WG>;
var<workgroup> sh_square: array<vec4<u32>, WG>;

fn put_sum(at: u32, x: vec4<u32>) {
    for (var i = 0u; i < 4u; i++) {
        sums[4u * at + i] = x[i];
    }
}

fn put_square(at: u32, x: vec4<u32>) {
    for (var i = 0u; i < 4u; i++) {
        squares[4u * at + i] = x[i];
    }
}

@compute @workgroup_size(WG)
fn price_sums(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let a = group_index(wid, nwg);
    if a >= params.a {
        return;
    }
    let run = (params.t + WG - 1u) / WG;
    let first = min(tid * run, params.t);
    let last = min(first + run, params.t);

    // totals of each thread's run, and its returns
    var sum = vec4<u32>(0u, 0u, 0u, 0u);
    var square = vec4<u32>(0u, 0u, 0u, 0u);
    for (var j = first; j < last; j++) {
        let p = price[a * params.t + j];
        if j + 1u < params.t {
            let at = (params.a + a) * params.t + j;
            returns[a * (params.t - 1u) + j] = (price[at + 1u] - price[at]) / price[at];
        }
        let x = fixed_price(p, exponents[a], params.bits);
        sum = add128(sum, vec4<u32>(x, 0u, 0u));
        square = add128(square, mul64(x, x));
    }
    sh_sum[tid] = sum;
    sh_square[tid] = square;
    workgroupBarrier();

    // what the threads before hold
    sum = vec4<u32>(0u, 0u, 0u, 0u);
    square = vec4<u32>(0u, 0u, 0u, 0u);
    for (var i = 0u; i < tid; i++) {
        sum = add128(sum, sh_sum[i]);
        square = add128(square, sh_square[i]);
    }

    // prefix sums; the one before bar 0 is zero
    let base = a * (params.t + 1u);
    let want_sum = (params.extra & 1u) != 0u;
    let want_square = (params.extra & 2u) != 0u;
    if tid == 0u && want_sum {
        put_sum(base, sum);
    }
    if tid == 0u && want_square {
        put_square(base, square);
    }
    for (var j = first; j < last; j++) {
        let x = fixed_price(price[a * params.t + j], exponents[a], params.bits);
        if want_sum {
            sum = add128(sum, vec4<u32>(x, 0u, 0u));
            put_sum(base + j + 1u, sum);
        }
        if want_square {
            square = add128(square, mul64(x, x));
            put_square(base + j + 1u, square);
        }
    }
}

// ---- simple moving averages ---------------------------------------------------------------------------------------

@group(0) @binding(3) var<storage, read> sums_in: array<u32>;
@group(0) @binding(4) var<storage, read> periods: array<u32>;
@group(0) @binding(5) var<storage, read_write> keys: array<u32>;

fn get_sum(at: u32) -> vec4<u32> {
    return vec4<u32>(sums_in[4u * at], sums_in[4u * at + 1u], sums_in[4u * at + 2u], sums_in[4u * at + 3u]);
}

@compute @workgroup_size(WG)
fn indicator_sma(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.a * params.t * params.rows {
        return;
    }
    let bar = at / params.rows;
    let a = bar / params.t;
    let j = bar % params.t;
    let n = periods[at % params.rows];
    var key = 0u;
    if j + 1u >= n {
        let end = a * (params.t + 1u) + j + 1u;
        key = mean_key(sub128(get_sum(end), get_sum(end - n)), n, fixed_price(price[bar], exponents[a], params.bits));
    }
    keys[at] = key;
}

// ---- exponential moving averages ----------------------------------------------------------------------------------

@group(0) @binding(3) var<storage, read> alphas: array<u32>;
@group(0) @binding(4) var<storage, read_write> ema_keys: array<u32>;

@compute @workgroup_size(WG)
fn indicator_ema(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let blocks = (params.rows + WG - 1u) / WG;
    let group = group_index(wid, nwg);
    let a = group / blocks;
    let row = (group % blocks) * WG + tid;
    if a >= params.a || row >= params.rows {
        return;
    }
    let alpha = vec2<u32>(alphas[4u * row], alphas[4u * row + 1u]);
    let signal_alpha = vec2<u32>(alphas[4u * row + 2u], alphas[4u * row + 3u]);
    let plain = is_zero64(signal_alpha);
    var average = fixed_price(price[a * params.t], exponents[a], params.bits);
    var smoothed = average;
    for (var j = 0u; j < params.t; j++) {
        let x = fixed_price(price[a * params.t + j], exponents[a], params.bits);
        average = blend(average, x, alpha);
        var against = x;
        if !plain {
            smoothed = blend(smoothed, average, signal_alpha);
            against = smoothed;
        }
        let negative = less64(average, against);
        let distance = select(sub64(average, against), sub64(against, average), negative);
        ema_keys[(a * params.t + j) * params.rows + row] = difference_key(distance, negative);
    }
}

// ---- relative strength index --------------------------------------------------------------------------------------

@group(0) @binding(3) var<storage, read> rsi_periods: array<u32>;
@group(0) @binding(4) var<storage, read> rsi_alphas: array<u32>;

// a / n for a < 2^96 and n < 2^20, the quotient below 2^64: long division by digits of 12 bits.
fn div96(a: vec4<u32>, n: u32) -> vec2<u32> {
    var rest = 0u;
    var quotient = vec2<u32>(0u, 0u);
    for (var i = 0u; i < 8u; i++) {
        let x = (rest << 12u) | (shr128(a, 84u - 12u * i).x & 0xfffu);
        let digit = x / n;
        rest = x - digit * n;
        quotient = add64(shl64(quotient, 12u), vec2<u32>(digit, 0u));
    }
    return quotient;
}

@compute @workgroup_size(WG)
fn indicator_rsi(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let blocks = (params.rows + WG - 1u) / WG;
    let group = group_index(wid, nwg);
    let a = group / blocks;
    let row = (group % blocks) * WG + tid;
    if a >= params.a || row >= params.rows {
        return;
    }
    let n = rsi_periods[row];
    let alpha = vec2<u32>(rsi_alphas[2u * row], rsi_alphas[2u * row + 1u]);
    var gains = vec4<u32>(0u, 0u, 0u, 0u);
    var losses = vec4<u32>(0u, 0u, 0u, 0u);
    var gain = vec2<u32>(0u, 0u);
    var loss = vec2<u32>(0u, 0u);
    var before = fixed_price(price[a * params.t], exponents[a], params.bits);
    keys[a * params.t * params.rows + row] = NEUTRAL;
    for (var j = 1u; j < params.t; j++) {
        let x = fixed_price(price[a * params.t + j], exponents[a], params.bits);
        let falls = less64(x, before);
        let up = select(sub64(x, before), vec2<u32>(0u, 0u), falls);
        let down = select(vec2<u32>(0u, 0u), sub64(before, x), falls);
        before = x;
        var key = NEUTRAL;
        if j <= n {
            gains = add128(gains, vec4<u32>(up, 0u, 0u));
            losses = add128(losses, vec4<u32>(down, 0u, 0u));
            if j == n {
                gain = div96(gains, n);
                loss = div96(losses, n);
            }
        } else {
            gain = blend(gain, up, alpha);
            loss = blend(loss, down, alpha);
        }
        if j >= n {
            key = rsi_key(gain, loss);
        }
        keys[(a * params.t + j) * params.rows + row] = key;
    }
}

// ---- distance from the mean in deviations -------------------------------------------------------------------------

@group(0) @binding(4) var<storage, read> squares_in: array<u32>;
@group(0) @binding(5) var<storage, read> band_periods: array<u32>;
@group(0) @binding(6) var<storage, read_write> band_keys: array<u32>;

fn get_square(at: u32) -> vec4<u32> {
    return vec4<u32>(squares_in[4u * at], squares_in[4u * at + 1u], squares_in[4u * at + 2u], squares_in[4u * at + 3u]);
}

@compute @workgroup_size(WG)
fn indicator_bollinger(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.a * params.t * params.rows {
        return;
    }
    let bar = at / params.rows;
    let a = bar / params.t;
    let j = bar % params.t;
    let n = band_periods[at % params.rows];
    var key = 0u;
    if j + 1u >= n {
        let end = a * (params.t + 1u) + j + 1u;
        let total = sub128(get_sum(end), get_sum(end - n));
        let total_squares = sub128(get_square(end), get_square(end - n));
        let level = mul128_32(vec4<u32>(fixed_price(price[bar], exponents[a], params.bits), 0u, 0u), n);
        let negative = less128(level, total);
        let distance = select(sub128(level, total), sub128(total, level), negative);
        key = ratio_key(square128(distance), sub128(mul128_32(total_squares, n), square128(total)), negative);
    }
    band_keys[at] = key;
}

// ---- runs of lower and higher closes ------------------------------------------------------------------------------

@group(0) @binding(2) var<storage, read_write> run_keys: array<u32>;

@compute @workgroup_size(WG)
fn indicator_donchian(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let bar = group_index(wid, nwg) * WG + tid;
    if bar >= params.a * params.t {
        return;
    }
    let p = price[bar];
    let most = min(bar % params.t, params.extra);
    var above = 0u;
    while above < most && price[bar - 1u - above] < p {
        above += 1u;
    }
    var below = 0u;
    while below < most && price[bar - 1u - below] > p {
        below += 1u;
    }
    run_keys[2u * bar] = above;
    run_keys[2u * bar + 1u] = below;
}

// ---- inverse volatility of log returns ------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> logs: array<u32>;
@group(0) @binding(2) var<storage, read> volatility_periods: array<u32>;
@group(0) @binding(3) var<storage, read_write> inverse_volatility: array<f32>;

const INVERSE_YEAR: f32 = 0.06299408; // 1/√252
const NO_VOLATILITY: f32 = 1e30;

fn log_distance(i: u32, j: u32) -> vec2<u32> {
    let a = vec2<u32>(logs[2u * i], logs[2u * i + 1u]);
    let b = vec2<u32>(logs[2u * j], logs[2u * j + 1u]);
    return magnitude64(sub64(a, b));
}

@compute @workgroup_size(WG)
fn indicator_volatility(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = group_index(wid, nwg) * WG + tid;
    if at >= params.a * params.t * params.rows {
        return;
    }
    let bar = at / params.rows;
    let n = volatility_periods[at % params.rows];
    var value = 0.0;
    if bar % params.t >= n {
        var squares = vec4<u32>(0u, 0u, 0u, 0u);
        for (var i = bar - n; i < bar; i++) {
            let x = log_distance(i + 1u, i);
            squares = add128(squares, mul64(x, x));
        }
        let sum = log_distance(bar, bar - n);
        value = inverse_of(n, sub128(mul128_32(squares, n), mul64(sum, sum)));
    }
    inverse_volatility[at] = value;
}

// The root of kernels/fixed.rs::inverse_deviation as a real, rounded once by hand.
fn inverse_of(n: u32, variance: vec4<u32>) -> f32 {
    if is_zero128(variance) {
        return NO_VOLATILITY;
    }
    let num = mul32(n, n - 1u);
    let lead_num = leading_zeros64(num);
    let lead_den = leading_zeros128(variance);
    let quotient = div64_32(shr64(shl64(num, lead_num), 1u), shl128(variance, lead_den).w);
    let exponent = 2 * i32(params.bits) + i32(lead_den) - i32(lead_num) - 95;
    let up = select(31u, 32u, (exponent & 1) == 0);
    let root = root64(shl64(vec2<u32>(quotient, 0u), up));
    let rounded = (root >> 8u) + ((root >> 7u) & 1u);
    return ldexp(f32(rounded) * INVERSE_YEAR, (exponent - i32(up)) / 2 + 8);
}

// Integer square root.
fn root64(x: vec2<u32>) -> u32 {
    var root = 0u;
    for (var bit = 0x80000000u; bit > 0u; bit >>= 1u) {
        let more = root | bit;
        if !less64(x, mul32(more, more)) {
            root = more;
        }
    }
    return root;
}
