// The path generator: what every kernel that simulates a market calls. Models, tables, draws and source: kernels/paths.rs.
// MODEL is the kind of its markets, plus FUTURES; branches on it vanish. Unroll the loop over the four steps of a draw, so that it stays in registers.

#define GBM 0u
#define MERTON 1u
#define HESTON 2u
#define BATES 3u
#define REGIMES 4u
#define BOOTSTRAP 5u
#define REPLAY 6u
#define FUTURES 16u
#define PATH_KIND (MODEL % FUTURES)
#define PATH_HAS_JUMPS (PATH_KIND == MERTON || PATH_KIND == BATES)
#define PATH_HAS_VARIANCE (PATH_KIND == HESTON || PATH_KIND == BATES)

#define PATH_STREAM 0x5054u
#define FACTOR_SPOT 0u
#define FACTOR_VARIANCE 0x1000u
#define FACTOR_JUMPS 0x2000u
#define FACTOR_REGIME 0x4000u
#define FACTOR_FIRST_REGIME 0x4001u
#define FACTOR_BASIS 0x5000u
#define FACTOR_RESTART 0x6000u
#define FACTOR_BLOCK 0x6001u

#define FIELDS 32u
#define WORDS 16u
#define FIELD_SPOT 0u
#define FIELD_DT 22u
#define FIELD_DRIFT_ANNUAL 23u
#define FIELD_VOLATILITY 24u

// A market's row; what MODEL does not use takes no register.
struct PathMarket {
    const float* market;
    const uint32_t* words;
    const float* row;
    float spot, drift, sd, variance, jump_mean, jump_variance;
    float v0, decay, mean, s1, s0, k1, k2, k3, k0, a;
    float basis, basis_decay, basis_mean, basis_spot, basis_own;
    uint32_t seed, seed_high, antithetic, steps, table, entries, tail, bars, restart, block, matched, first;
};

// What is known of a path at a time: ln S(t)/S(0), variance, ln F/S, the regime that governs step t or the jumps of the step before, the bar
// of history that it took or where the given path lies.
struct PathState {
    float x, v, basis;
    uint32_t regime, at;
};

// Draws of four steps: normals of spot and basis; words of jumps, regimes or ends of blocks; words of the variance or starts of blocks.
struct PathDraws {
    float z[4], zb[4];
    uint32_t w[4], w2[4];
};

__device__ __forceinline__ PathMarket path_market(const float* __restrict__ market, const uint32_t* __restrict__ market_words, uint32_t index) {
    const float* r = market + (uint64_t)index * FIELDS;
    const uint32_t* w = market_words + (uint64_t)index * WORDS;
    PathMarket m;
    m.market = market;
    m.words = market_words;
    m.row = r;
    m.spot = r[0];
    m.drift = r[1];
    m.sd = r[2];
    m.variance = r[3];
    m.jump_mean = r[4];
    m.jump_variance = r[5];
    m.v0 = r[6];
    m.decay = r[7];
    m.mean = r[8];
    m.s1 = r[9];
    m.s0 = r[10];
    m.k1 = r[11];
    m.k2 = r[12];
    m.k3 = r[13];
    m.k0 = r[14];
    m.a = r[15];
    m.basis = r[16];
    m.basis_decay = r[17];
    m.basis_mean = r[18];
    m.basis_spot = r[19];
    m.basis_own = r[20];
    m.seed = w[1];
    m.seed_high = w[2];
    m.antithetic = w[3];
    m.steps = w[4];
    m.table = w[5];
    m.entries = w[6];
    m.tail = w[7];
    m.bars = w[8];
    m.restart = w[9];
    m.block = w[10];
    m.matched = w[11];
    m.first = w[12];
    return m;
}

// ---- draws ----------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool path_mirrored(const PathMarket& m, uint64_t path) {
    return m.antithetic != 0 && (path & 1) == 1;
}

__device__ __forceinline__ void path_counter(const PathMarket& m, uint64_t path, uint32_t quad, uint32_t factor, uint32_t (&w)[4]) {
    const uint64_t index = m.antithetic != 0 ? path >> 1 : path;
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32), c2 = quad, c3 = factor | (PATH_STREAM << 16);
    uint32_t k0 = m.seed, k1 = m.seed_high;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t a_high = __umulhi(0xD2511F53u, c0), a = 0xD2511F53u * c0;
        const uint32_t b_high = __umulhi(0xCD9E8D57u, c2), b = 0xCD9E8D57u * c2;
        c0 = b_high ^ c1 ^ k0;
        c1 = b;
        c2 = a_high ^ c3 ^ k1;
        c3 = a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    w[0] = c0;
    w[1] = c1;
    w[2] = c2;
    w[3] = c3;
}

__device__ __forceinline__ void path_words(const PathMarket& m, uint64_t path, uint32_t quad, uint32_t factor, uint32_t (&w)[4]) {
    path_counter(m, path, quad, factor, w);
    const uint32_t flip = path_mirrored(m, path) ? 0xffffffffu : 0u;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        w[i] ^= flip;
    }
}

// −2·ln(1 + f) for √½ ≤ 1 + f ≤ √2.
__device__ __forceinline__ float path_minus_two_ln_1p(float f) {
    float p = -0.17958869f;
    p = fmaf(p, f, 0.28853685f);
    p = fmaf(p, f, -0.297674f);
    p = fmaf(p, f, 0.33103588f);
    p = fmaf(p, f, -0.39926952f);
    p = fmaf(p, f, 0.5000517f);
    p = fmaf(p, f, -0.66667867f);
    p = fmaf(p, f, 0.99999964f);
    return fmaf(f * f, p, -2.0f * f);
}

// ln(1 + y), to an ulp or so of itself also for small y; y > −1.
__device__ __forceinline__ float path_ln_1p(float y) {
    const uint32_t raw = __float_as_uint(fmaxf(1.0f + y, 1.1754944e-38f)) - 0x3f3504f3u;
    const int32_t e = (int32_t)raw >> 23;
    const float f = e == 0 ? y : __uint_as_float((raw & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    return fmaf(-0.5f, path_minus_two_ln_1p(f), (float)e * 0.69314718f);
}

// −2·ln of the uniform (k + ½)·2⁻²⁴ of a whole number below 2²⁴; through 1 − u where u ≥ √½.
__device__ __forceinline__ float path_minus_two_ln(float k) {
    const uint32_t raw = __float_as_uint(k + 0.5f) - 0x4b3504f3u;
    const float e = (float)((int32_t)raw >> 23);
    const float away = __uint_as_float((raw & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    const float near_one = fmaf(k - 16777216.0f, 5.9604645e-8f, 2.9802322e-8f);
    return fmaf(e, -1.3862944f, path_minus_two_ln_1p(k > 11863283.0f ? near_one : away));
}

// ln x for normal x > 0.
__device__ __forceinline__ float path_ln(float x) {
    const uint32_t raw = __float_as_uint(x) - 0x3f3504f3u;
    const float e = (float)((int32_t)raw >> 23);
    const float f = __uint_as_float((raw & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    return fmaf(-0.5f, path_minus_two_ln_1p(f), e * 0.69314718f);
}

// The two normals of a pair of words; the angle in half turns.
__device__ __forceinline__ float2 path_normal_pair(uint32_t a, uint32_t b) {
    const float size = sqrtf(path_minus_two_ln((float)(a >> 8)));
    const uint32_t turned = b + 0x40000000u;
    const float y = fmaf((float)((turned >> 8) & 0x7fffffu) - 4194304.0f, 1.1920929e-7f, 5.9604645e-8f);
    const float q = y * y;
    const float sine = y * fmaf(fmaf(fmaf(fmaf(0.07722227f, q, -0.5980465f), q, 2.5500317f), q, -5.167707f), q, 3.1415925f);
    const float cosine = fmaf(fmaf(fmaf(fmaf(0.21969819f, q, -1.3318809f), q, 4.058412f), q, -4.934793f), q, 0.99999994f);
    const float radius = (turned >> 31) != 0 ? -size : size;
    return make_float2(radius * cosine, radius * sine);
}

__device__ __forceinline__ void path_normals(const PathMarket& m, uint64_t path, uint32_t quad, uint32_t factor, uint32_t slot, float (&z)[4]) {
    uint32_t w[4];
    path_counter(m, path, quad, factor, w);
    const float2 first = path_normal_pair(w[0], w[1]), second = path_normal_pair(w[2], w[3]);
    const float sign = path_mirrored(m, path) ? -1.0f : 1.0f;
    z[0] = sign * first.x;
    z[1] = sign * first.y;
    z[2] = sign * second.x;
    z[3] = sign * second.y;
    if (m.matched != 0) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t at = m.matched + 2 * (slot * m.steps + min(4 * quad + i, m.steps - 1));
            z[i] = fmaf(z[i], m.market[at], m.market[at + 1]);
        }
    }
}

// Φ⁻¹ of a word's uniform: x·P(−ln 4p(1 − p)), x = 1 − 2p, p the smaller tail.
__device__ __forceinline__ float path_normal_quantile(uint32_t w) {
    const uint32_t k = w >> 8;
    const bool above = k >= 0x800000u;
    const float p = ((float)(above ? 0xffffffu - k : k) + 0.5f) * 5.9604645e-8f;
    const float x = fmaf(-2.0f, p, 1.0f);
    const float y = fmaxf(-path_ln(4.0f * p * (1.0f - p)), 0.0f);
    float z;
    if (y < 5.0f) {
        const float c = y - 2.5f;
        z = 4.0354287e-8f;
        z = fmaf(z, c, 4.861035e-7f);
        z = fmaf(z, c, -4.990561e-6f);
        z = fmaf(z, c, -6.217988e-6f);
        z = fmaf(z, c, 0.0003091502f);
        z = fmaf(z, c, -0.0017730101f);
        z = fmaf(z, c, -0.005908171f);
        z = fmaf(z, c, 0.34880266f);
        z = fmaf(z, c, 2.1233137f);
    } else {
        const float c = sqrtf(y) - 3.0f;
        z = -0.00027298412f;
        z = fmaf(z, c, 0.00014147961f);
        z = fmaf(z, c, 0.0018939015f);
        z = fmaf(z, c, -0.005194886f);
        z = fmaf(z, c, 0.008123112f);
        z = fmaf(z, c, -0.01077934f);
        z = fmaf(z, c, 0.013347772f);
        z = fmaf(z, c, 1.416581f);
        z = fmaf(z, c, 4.0064344f);
    }
    return above ? x * z : -x * z;
}

// How many of `count` thresholds from `at` on a word has reached.
__device__ __forceinline__ uint32_t path_reached(const PathMarket& m, uint32_t at, uint32_t count, uint32_t word) {
    uint32_t sum = 0;
    for (uint32_t i = 0; i < count; i++) {
        sum += m.words[at + i] <= word ? 1 : 0;
    }
    return sum;
}

// ---- paths ----------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ PathState path_start(const PathMarket& m, uint64_t path) {
    PathState s = {0.0f, m.v0, m.basis, 0, 0};
    if (PATH_KIND == REGIMES) {
        uint32_t w[4];
        path_words(m, path, 0, FACTOR_FIRST_REGIME, w);
        s.regime = path_reached(m, m.table, m.entries - 1, w[0]);
    }
    if (PATH_KIND == REPLAY) {
        s.at = ((uint32_t)path - m.first) * (m.steps + 1) + m.tail;
        s.x = path_ln(m.market[s.at] / m.spot);
    }
    return s;
}

// Draws of steps 4·quad ….
__device__ __forceinline__ PathDraws path_draws(const PathMarket& m, uint64_t path, uint32_t quad) {
    PathDraws d;
    if (PATH_KIND < BOOTSTRAP) {
        path_normals(m, path, quad, FACTOR_SPOT, 0, d.z);
    } else {
        d.z[0] = d.z[1] = d.z[2] = d.z[3] = 0.0f;
    }
    if (PATH_HAS_VARIANCE) {
        path_words(m, path, quad, FACTOR_VARIANCE, d.w2);
    }
    if (PATH_HAS_JUMPS) {
        path_words(m, path, quad, FACTOR_JUMPS, d.w);
    }
    if (PATH_KIND == REGIMES) {
        path_words(m, path, quad, FACTOR_REGIME, d.w);
    }
    if (PATH_KIND == BOOTSTRAP) {
        path_words(m, path, quad, FACTOR_RESTART, d.w);
        path_words(m, path, quad, FACTOR_BLOCK, d.w2);
    }
    if (MODEL >= FUTURES) {
        path_normals(m, path, quad, FACTOR_BASIS, 1, d.zb);
    }
    return d;
}

// (v', what the log step holds besides K2·v' and the normal).
__device__ __forceinline__ float2 path_variance_step(const PathMarket& m, float v, uint32_t w) {
    const float mean = fmaf(m.decay, v, m.mean);
    const float psi = fmaf(m.s1, v, m.s0) / fmaxf(mean * mean, 1e-30f);
    float next, room, minus_log_m;
    if (psi <= 1.5f) {
        const float two = 2.0f - psi;
        const float q2 = psi / (two + sqrtf(two + two));
        const float base = mean / (1.0f + q2);
        const float root = fmaf(sqrtf(q2), path_normal_quantile(w), 1.0f);
        next = base * (root * root);
        const float less = -2.0f * m.a * base * q2;
        room = 1.0f + less;
        minus_log_m = 0.5f * path_ln_1p(less) - m.a * base / fmaxf(room, 1e-30f);
    } else {
        const float scale = 0.5f * mean * (psi + 1.0f);
        const float tail = 2.0f / (psi + 1.0f);
        next = fmaxf(scale * (0.5f * path_minus_two_ln((float)(0xffffffu - (w >> 8))) + path_ln(tail)), 0.0f);
        room = 1.0f - m.a * scale;
        minus_log_m = -path_ln_1p(m.a * mean / fmaxf(room, 1e-30f));
    }
    return make_float2(next, room > 0.0f ? minus_log_m - 0.5f * m.k3 * v : fmaf(m.k1, v, m.k0));
}

// The bar that a step of the bootstrap takes.
__device__ __forceinline__ uint32_t path_bar(const PathMarket& m, uint32_t at, uint32_t end, uint32_t start, uint32_t t) {
    const uint32_t next = at + 1 == m.bars ? 0 : at + 1;
    const bool restart = t == 0 || (m.block != 0 ? t % m.block == 0 : end < m.restart);
    return restart ? __umulhi(start, m.bars) : next;
}

// Step t: from t to t + 1.
__device__ __forceinline__ PathState path_step(const PathMarket& m, PathState s, const PathDraws& d, uint32_t t) {
    const uint32_t i = t & 3;
    const float z = d.z[i];
    // The sum of a step first: a constant added to a number with few bits would be rounded the same way every time.
    float delta = m.drift;
    float jump_variance = 0.0f;
    if (PATH_HAS_JUMPS) {
        s.regime = path_reached(m, m.table, m.entries, d.w[i]);
        delta = fmaf((float)s.regime, m.jump_mean, delta);
        jump_variance = (float)s.regime * m.jump_variance;
    }
    if (PATH_KIND == GBM) {
        delta = fmaf(z, m.sd, delta);
    }
    if (PATH_KIND == MERTON) {
        delta = fmaf(z, sqrtf(m.variance + jump_variance), delta);
    }
    if (PATH_HAS_VARIANCE) {
        const float2 next = path_variance_step(m, s.v, d.w2[i]);
        const float spread = fmaf(m.k3, s.v + next.x, jump_variance);
        delta += fmaf(m.k2, next.x, next.y);
        delta = fmaf(z, sqrtf(spread), delta);
        s.v = next.x;
    }
    if (PATH_KIND == REGIMES) {
        const float* own = m.market + m.tail + 2 * s.regime;
        delta = fmaf(z, own[1], delta + own[0]);
        s.regime = path_reached(m, m.table + (m.entries - 1) * (1 + s.regime), m.entries - 1, d.w[i]);
    }
    if (PATH_KIND == BOOTSTRAP) {
        s.at = path_bar(m, s.at, d.w[i], d.w2[i], t);
        delta += m.market[m.tail + s.at];
    }
    s.x += delta;
    if (PATH_KIND == REPLAY) {
        s.at += 1;
        s.x = path_ln(m.market[s.at] / m.spot);
    }
    if (MODEL >= FUTURES) {
        const float shock = fmaf(d.zb[i], m.basis_own, fmaf(z, m.basis_spot, m.basis_mean));
        s.basis = fmaf(s.basis, m.basis_decay, shock);
    }
    return s;
}

// S(t).
__device__ __forceinline__ float path_spot(const PathMarket& m, const PathState& s) {
    return PATH_KIND == REPLAY ? m.market[s.at] : m.spot * expf(s.x);
}

// F(t).
__device__ __forceinline__ float path_future(const PathMarket& m, const PathState& s) {
    return path_spot(m, s) * expf(s.basis);
}

// Regime, jumps or bar of history.
__device__ __forceinline__ uint32_t path_event(const PathState& s) {
    return PATH_KIND == BOOTSTRAP ? s.at : s.regime;
}
