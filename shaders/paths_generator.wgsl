// The path generator: what every kernel that simulates a market calls. Models, tables, draws and source: kernels/paths.rs.
// The unit declares the storage arrays `market` (f32) and `market_words` (u32). MODEL is the kind of its markets, plus FUTURES.

override MODEL: u32 = 0u;

const GBM: u32 = 0u;
const MERTON: u32 = 1u;
const HESTON: u32 = 2u;
const BATES: u32 = 3u;
const REGIMES: u32 = 4u;
const BOOTSTRAP: u32 = 5u;
const REPLAY: u32 = 6u;
const FUTURES: u32 = 16u;

const PATH_STREAM: u32 = 0x5054u;
const FACTOR_SPOT: u32 = 0u;
const FACTOR_VARIANCE: u32 = 0x1000u;
const FACTOR_JUMPS: u32 = 0x2000u;
const FACTOR_REGIME: u32 = 0x4000u;
const FACTOR_FIRST_REGIME: u32 = 0x4001u;
const FACTOR_BASIS: u32 = 0x5000u;
const FACTOR_RESTART: u32 = 0x6000u;
const FACTOR_BLOCK: u32 = 0x6001u;

const FIELDS: u32 = 32u;
const WORDS: u32 = 16u;
const FIELD_SPOT: u32 = 0u;
const FIELD_DT: u32 = 22u;
const FIELD_DRIFT_ANNUAL: u32 = 23u;
const FIELD_VOLATILITY: u32 = 24u;

// A market's row.
struct PathMarket {
    spot: f32,
    drift: f32,
    sd: f32,
    variance: f32,
    jump_mean: f32,
    jump_variance: f32,
    row: u32,
    seed: vec2<u32>,
    antithetic: u32,
    steps: u32,
    table: u32,
    entries: u32,
    tail: u32,
    bars: u32,
    restart: u32,
    block: u32,
    matched: u32,
    first: u32,
}

// What is known of a path at a time: ln S(t)/S(0), variance, ln F/S, the regime that governs step t or the jumps of the step before, the bar
// of history that it took or where the given path lies.
struct PathState {
    x: f32,
    v: f32,
    basis: f32,
    regime: u32,
    at: u32,
}

// Draws of four steps: normals of spot and basis; words of jumps, regimes or ends of blocks; words of the variance or starts of blocks.
struct PathDraws {
    z: vec4<f32>,
    zb: vec4<f32>,
    w: vec4<u32>,
    w2: vec4<u32>,
}

fn path_kind() -> u32 {
    return MODEL % FUTURES;
}

fn path_has_jumps() -> bool {
    return path_kind() == MERTON || path_kind() == BATES;
}

fn path_has_variance() -> bool {
    return path_kind() == HESTON || path_kind() == BATES;
}

fn path_market(index: u32) -> PathMarket {
    let r = index * FIELDS;
    let w = index * WORDS;
    var m: PathMarket;
    m.row = r;
    m.spot = market[r];
    m.drift = market[r + 1u];
    m.sd = market[r + 2u];
    m.variance = market[r + 3u];
    m.jump_mean = market[r + 4u];
    m.jump_variance = market[r + 5u];
    m.seed = vec2<u32>(market_words[w + 1u], market_words[w + 2u]);
    m.antithetic = market_words[w + 3u];
    m.steps = market_words[w + 4u];
    m.table = market_words[w + 5u];
    m.entries = market_words[w + 6u];
    m.tail = market_words[w + 7u];
    m.bars = market_words[w + 8u];
    m.restart = market_words[w + 9u];
    m.block = market_words[w + 10u];
    m.matched = market_words[w + 11u];
    m.first = market_words[w + 12u];
    return m;
}

// ---- draws ----------------------------------------------------------------------------------------------------------------

// Upper word of a product.
fn path_upper(a: u32, b: u32) -> u32 {
    let low = b & 0xffffu;
    let high = b >> 16u;
    let mid = (a >> 16u) * low + ((a & 0xffffu) * low >> 16u);
    return (a >> 16u) * high + (mid >> 16u) + (((a & 0xffffu) * high + (mid & 0xffffu)) >> 16u);
}

fn path_round(c: vec4<u32>, k: vec2<u32>) -> vec4<u32> {
    let a = path_upper(0xD2511F53u, c.x);
    let b = path_upper(0xCD9E8D57u, c.z);
    return vec4<u32>(b ^ c.y ^ k.x, 0xCD9E8D57u * c.z, a ^ c.w ^ k.y, 0xD2511F53u * c.x);
}

// Philox4x32-10 without a loop.
fn path_philox(counter: vec4<u32>, key: vec2<u32>) -> vec4<u32> {
    let step = vec2<u32>(0x9E3779B9u, 0xBB67AE85u);
    var c = path_round(counter, key);
    c = path_round(c, key + step);
    c = path_round(c, key + 2u * step);
    c = path_round(c, key + 3u * step);
    c = path_round(c, key + 4u * step);
    c = path_round(c, key + 5u * step);
    c = path_round(c, key + 6u * step);
    c = path_round(c, key + 7u * step);
    c = path_round(c, key + 8u * step);
    return path_round(c, key + 9u * step);
}

fn path_counter(m: PathMarket, path: vec2<u32>, quad: u32, factor: u32) -> vec4<u32> {
    let half = vec2<u32>((path.x >> 1u) | (path.y << 31u), path.y >> 1u);
    let index = select(path, half, m.antithetic != 0u);
    return path_philox(vec4<u32>(index, quad, factor | (PATH_STREAM << 16u)), m.seed);
}

fn path_mirrored(m: PathMarket, path: vec2<u32>) -> bool {
    return m.antithetic != 0u && (path.x & 1u) == 1u;
}

fn path_words(m: PathMarket, path: vec2<u32>, quad: u32, factor: u32) -> vec4<u32> {
    return path_counter(m, path, quad, factor) ^ vec4<u32>(select(0u, 0xffffffffu, path_mirrored(m, path)));
}

// −2·ln(1 + f) for √½ ≤ 1 + f ≤ √2.
fn path_minus_two_ln_1p(f: f32) -> f32 {
    let p = 0.99999964 + f * (-0.66667867 + f * (0.5000517 + f * (-0.39926952 + f * (0.33103588 + f * (-0.297674 + f * (0.28853685 - f * 0.17958869))))));
    return (f * f) * p - 2.0 * f;
}

// ln(1 + y), to an ulp or so of itself also for small y; y > −1.
fn path_ln_1p(y: f32) -> f32 {
    let raw = bitcast<u32>(max(1.0 + y, 1.1754944e-38)) - 0x3f3504f3u;
    let e = bitcast<i32>(raw) >> 23u;
    let f = select(bitcast<f32>((raw & 0x7fffffu) + 0x3f3504f3u) - 1.0, y, e == 0);
    return f32(e) * 0.69314718 - 0.5 * path_minus_two_ln_1p(f);
}

// −2·ln of the uniform (k + ½)·2⁻²⁴ of a whole number below 2²⁴; through 1 − u where u ≥ √½.
fn path_minus_two_ln(k: f32) -> f32 {
    let raw = bitcast<u32>(k + 0.5) - 0x4b3504f3u;
    let e = f32(bitcast<i32>(raw) >> 23u);
    let far = bitcast<f32>((raw & 0x7fffffu) + 0x3f3504f3u) - 1.0;
    let near = (k - 16777216.0) * 5.9604645e-8 + 2.9802322e-8;
    return e * -1.3862944 + path_minus_two_ln_1p(select(far, near, k > 11863283.0));
}

// The two normals of a pair of words; the angle in half turns.
fn path_normal_pair(a: u32, b: u32) -> vec2<f32> {
    let radius = sqrt(path_minus_two_ln(f32(a >> 8u)));
    let turned = b + 0x40000000u;
    let y = (f32((turned >> 8u) & 0x7fffffu) - 4194304.0) * 1.1920929e-7 + 5.9604645e-8;
    let q = y * y;
    let sine = y * (3.1415925 + q * (-5.167707 + q * (2.5500317 + q * (-0.5980465 + q * 0.07722227))));
    let cosine = 0.99999994 + q * (-4.934793 + q * (4.058412 + q * (-1.3318809 + q * 0.21969819)));
    return select(radius, -radius, (turned >> 31u) == 1u) * vec2<f32>(cosine, sine);
}

fn path_normals(m: PathMarket, path: vec2<u32>, quad: u32, factor: u32, slot: u32) -> vec4<f32> {
    let w = path_counter(m, path, quad, factor);
    var z = vec4<f32>(path_normal_pair(w.x, w.y), path_normal_pair(w.z, w.w));
    z = select(z, -z, path_mirrored(m, path));
    // No branch around the loop: a software adapter would go through all of it with its lanes switched off.
    for (var i = 0u; i < select(0u, 4u, m.matched != 0u); i++) {
        let at = m.matched + 2u * (slot * m.steps + min(4u * quad + i, m.steps - 1u));
        z[i] = z[i] * market[at] + market[at + 1u];
    }
    return z;
}

// Φ⁻¹ of a word's uniform: x·P(−ln 4p(1 − p)), x = 1 − 2p, p the smaller tail.
fn path_normal_quantile(w: u32) -> f32 {
    let k = w >> 8u;
    let above = k >= 0x800000u;
    let p = (f32(select(k, 0xffffffu - k, above)) + 0.5) * 5.9604645e-8;
    let x = 1.0 - 2.0 * p;
    let y = max(-log_f32(4.0 * p * (1.0 - p)), 0.0);
    let c = y - 2.5;
    let r = sqrt(y) - 3.0;
    let mid = 2.1233137 + c * (0.34880266 + c * (-0.005908171 + c * (-0.0017730101 + c * (0.0003091502 + c * (-6.217988e-6
        + c * (-4.990561e-6 + c * (4.861035e-7 + c * 4.0354287e-8)))))));
    let tail = 4.0064344 + r * (1.416581 + r * (0.013347772 + r * (-0.01077934 + r * (0.008123112 + r * (-0.005194886
        + r * (0.0018939015 + r * (0.00014147961 + r * -0.00027298412)))))));
    let z = x * select(tail, mid, y < 5.0);
    return select(-z, z, above);
}

// How many of `count` thresholds from `at` on a word has reached.
fn path_reached(at: u32, count: u32, word: u32) -> u32 {
    var sum = 0u;
    for (var i = 0u; i < count; i++) {
        sum += select(0u, 1u, market_words[at + i] <= word);
    }
    return sum;
}

// ---- paths ----------------------------------------------------------------------------------------------------------------

fn path_start(m: PathMarket, path: vec2<u32>) -> PathState {
    var s = PathState(0.0, market[m.row + 6u], market[m.row + 16u], 0u, 0u);
    if path_kind() == REGIMES {
        s.regime = path_reached(m.table, m.entries - 1u, path_words(m, path, 0u, FACTOR_FIRST_REGIME).x);
    }
    if path_kind() == REPLAY {
        s.at = (path.x - m.first) * (m.steps + 1u) + m.tail;
        s.x = log_f32(market[s.at] / m.spot);
    }
    return s;
}

// Draws of steps 4·quad ….
fn path_draws(m: PathMarket, path: vec2<u32>, quad: u32) -> PathDraws {
    var d: PathDraws;
    if path_kind() < BOOTSTRAP {
        d.z = path_normals(m, path, quad, FACTOR_SPOT, 0u);
    }
    if path_has_variance() {
        d.w2 = path_words(m, path, quad, FACTOR_VARIANCE);
    }
    if path_has_jumps() {
        d.w = path_words(m, path, quad, FACTOR_JUMPS);
    }
    if path_kind() == REGIMES {
        d.w = path_words(m, path, quad, FACTOR_REGIME);
    }
    if path_kind() == BOOTSTRAP {
        d.w = path_words(m, path, quad, FACTOR_RESTART);
        d.w2 = path_words(m, path, quad, FACTOR_BLOCK);
    }
    if MODEL >= FUTURES {
        d.zb = path_normals(m, path, quad, FACTOR_BASIS, 1u);
    }
    return d;
}

// (v', what the log step holds besides K2·v' and the normal).
fn path_variance_step(m: PathMarket, v: f32, w: u32) -> vec2<f32> {
    let a = market[m.row + 15u];
    let mean = market[m.row + 7u] * v + market[m.row + 8u];
    let psi = (market[m.row + 9u] * v + market[m.row + 10u]) / max(mean * mean, 1e-30);
    var next = 0.0;
    var room = 0.0;
    var minus_log_m = 0.0;
    if psi <= 1.5 {
        let two = 2.0 - psi;
        let q2 = psi / (two + sqrt(two + two));
        let base = mean / (1.0 + q2);
        let root = 1.0 + sqrt(q2) * path_normal_quantile(w);
        next = base * (root * root);
        let less = -2.0 * a * base * q2;
        room = 1.0 + less;
        minus_log_m = 0.5 * path_ln_1p(less) - a * base / max(room, 1e-30);
    } else {
        let scale = 0.5 * mean * (psi + 1.0);
        let tail = 2.0 / (psi + 1.0);
        next = max(scale * (0.5 * path_minus_two_ln(f32(0xffffffu - (w >> 8u))) + log_f32(tail)), 0.0);
        room = 1.0 - a * scale;
        minus_log_m = -path_ln_1p(a * mean / max(room, 1e-30));
    }
    let plain = market[m.row + 11u] * v + market[m.row + 14u];
    return vec2<f32>(next, select(plain, minus_log_m - 0.5 * market[m.row + 13u] * v, room > 0.0));
}

// The bar that a step of the bootstrap takes.
fn path_bar(m: PathMarket, at: u32, end: u32, start: u32, t: u32) -> u32 {
    let next = select(at + 1u, 0u, at + 1u == m.bars);
    let fixed = m.block != 0u && t % max(m.block, 1u) == 0u;
    let restart = t == 0u || fixed || (m.block == 0u && end < m.restart);
    return select(next, path_upper(start, m.bars), restart);
}

// Step t: from t to t + 1.
fn path_step(m: PathMarket, before: PathState, d: PathDraws, t: u32) -> PathState {
    var s = before;
    let z = d.z[t & 3u];
    // The sum of a step first: a constant added to a number with few bits would be rounded the same way every time.
    var delta = m.drift;
    var jump_variance = 0.0;
    if path_has_jumps() {
        s.regime = path_reached(m.table, m.entries, d.w[t & 3u]);
        let n = f32(s.regime);
        delta += n * m.jump_mean;
        jump_variance = n * m.jump_variance;
    }
    if path_kind() == GBM {
        delta += m.sd * z;
    }
    if path_kind() == MERTON {
        delta += sqrt(m.variance + jump_variance) * z;
    }
    if path_has_variance() {
        let next = path_variance_step(m, s.v, d.w2[t & 3u]);
        let spread = market[m.row + 13u] * (s.v + next.x) + jump_variance;
        delta += market[m.row + 12u] * next.x + next.y;
        delta += sqrt(spread) * z;
        s.v = next.x;
    }
    if path_kind() == REGIMES {
        let at = m.tail + 2u * s.regime;
        delta += market[at] + market[at + 1u] * z;
        s.regime = path_reached(m.table + (m.entries - 1u) * (1u + s.regime), m.entries - 1u, d.w[t & 3u]);
    }
    if path_kind() == BOOTSTRAP {
        s.at = path_bar(m, s.at, d.w[t & 3u], d.w2[t & 3u], t);
        delta += market[m.tail + s.at];
    }
    s.x += delta;
    if path_kind() == REPLAY {
        s.at += 1u;
        s.x = log_f32(market[s.at] / m.spot);
    }
    if MODEL >= FUTURES {
        let shock = market[m.row + 18u] + market[m.row + 19u] * z + market[m.row + 20u] * d.zb[t & 3u];
        s.basis = market[m.row + 17u] * s.basis + shock;
    }
    return s;
}

// S(t).
fn path_spot(m: PathMarket, s: PathState) -> f32 {
    if path_kind() == REPLAY {
        return market[s.at];
    }
    return m.spot * exp_f32(s.x);
}

// F(t).
fn path_future(m: PathMarket, s: PathState) -> f32 {
    return path_spot(m, s) * exp_f32(s.basis);
}

// Regime, jumps or bar of history.
fn path_event(s: PathState) -> u32 {
    return select(s.regime, s.at, path_kind() == BOOTSTRAP);
}
