// Performance statistics of return series. Maths, shapes and source: kernels/performance.rs.
//   grid  N      workgroup WG      thread t takes values t, t+WG, …; for the drawdown a run of ⌈T/WG⌉ values
//   reads returns [N,T]      writes statistics [N,12]      workgroup memory: 6·WG + 258 words

struct PerformanceParams {
    n: u32,
    t: u32,
    tail: u32,
}

@group(0) @binding(0) var<uniform> params: PerformanceParams;
@group(0) @binding(1) var<storage, read> returns: array<f32>;
@group(0) @binding(2) var<storage, read_write> statistics: array<f32>;

override WG: u32 = 128u;
const STATISTICS: u32 = 12u;
const RUIN: f32 = 1e-30;

var<workgroup> sh_sum: array<array<f32, 6>, WG>;
var<workgroup> sh_bins: array<atomic<u32>, 256>;
var<workgroup> sh_pick: array<u32, 2>;

// Tree sum of the six lanes of sh_sum; the result is in sh_sum[0].
fn reduce(tid: u32) {
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if tid < half {
            for (var i = 0u; i < 6u; i++) {
                sh_sum[tid][i] += sh_sum[tid + half][i];
            }
        }
        workgroupBarrier();
    }
}

// A stretch of equity: growth as mantissa·2^exponent, its end against its highest level, its lowest level against its start, its
// worst level against a running peak. The last three are at most 1, and exactly 1 where equity only rises.
struct Stretch {
    mantissa: f32,
    exponent: f32,
    end_to_peak: f32,
    lowest: f32,
    worst: f32,
}

fn growth_of(s: Stretch) -> f32 {
    return ldexp(s.mantissa, i32(clamp(s.exponent, -120.0, 120.0)));
}

fn join(a: Stretch, b: Stretch) -> Stretch {
    let product = a.mantissa * b.mantissa;
    let carry = select(0.0, 1.0, product >= 2.0);
    return Stretch(
        product * select(1.0, 0.5, product >= 2.0),
        a.exponent + b.exponent + carry,
        min(b.end_to_peak, a.end_to_peak * growth_of(b)),
        min(a.lowest, growth_of(a) * b.lowest),
        min(min(a.worst, b.worst), a.end_to_peak * b.lowest),
    );
}

// Monotone unsigned image of a float.
fn ordered(x: f32) -> u32 {
    let raw = bitcast<u32>(x);
    return select(raw | 0x80000000u, ~raw, (raw >> 31u) == 1u);
}

fn unordered(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key & 0x7fffffffu, (key >> 31u) == 1u));
}

// One block of up to 64 values, compounded from 1.
fn stretch_of(at: u32, from_index: u32, to_index: u32) -> Stretch {
    var level = 1.0;
    var lowest = 1.0;
    var end_to_peak = 1.0;
    var worst = 1.0;
    for (var j = from_index; j < to_index; j++) {
        let factor = max(1.0 + returns[at + j], RUIN);
        level *= factor;
        lowest = min(lowest, level);
        end_to_peak = min(end_to_peak * factor, 1.0);
        worst = min(worst, end_to_peak);
    }
    level = clamp(level, 1e-37, 1e37);
    let raw = bitcast<u32>(level);
    let mantissa = bitcast<f32>((raw & 0x7fffffu) | 0x3f800000u);
    return Stretch(mantissa, f32(i32(raw >> 23u) - 127), end_to_peak, lowest, worst);
}

@compute @workgroup_size(WG)
fn performance(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = group_index(wid, nwg);
    if row >= params.n {
        return;
    }
    let at = row * params.t;
    let n = f32(params.t);
    let out = row * STATISTICS;

    // mean, as the first return plus an offset
    let first = returns[at];
    var sum = 0.0;
    for (var j = tid; j < params.t; j += WG) {
        sum += returns[at + j] - first;
    }
    sh_sum[tid] = array<f32, 6>(sum, 0.0, 0.0, 0.0, 0.0, 0.0);
    reduce(tid);
    let offset = sh_sum[0][0] / n;
    workgroupBarrier();

    // central sums, downside, hits
    var acc = array<f32, 6>();
    for (var j = tid; j < params.t; j += WG) {
        let x = returns[at + j];
        let d = (x - first) - offset;
        let low = min(x, 0.0);
        acc[0] += d * d;
        acc[1] += d * d * d;
        acc[2] += d * d * d * d;
        acc[3] += low * low;
        acc[4] += select(0.0, 1.0, x > 0.0);
    }
    sh_sum[tid] = acc;
    reduce(tid);
    if tid == 0u {
        statistics[out] = first + offset;
        for (var i = 0u; i < 5u; i++) {
            statistics[out + 1u + i] = sh_sum[0][i];
        }
    }
    workgroupBarrier();

    // growth and drawdown: runs in order, then an ordered tree
    let run = (params.t + WG - 1u) / WG;
    let last = min((tid + 1u) * run, params.t);
    var mine = Stretch(1.0, 0.0, 1.0, 1.0, 1.0);
    for (var j = tid * run; j < last; j += 64u) {
        mine = join(mine, stretch_of(at, j, min(j + 64u, last)));
    }
    sh_sum[tid] = array<f32, 6>(mine.mantissa, mine.exponent, mine.end_to_peak, mine.lowest, mine.worst, 0.0);
    workgroupBarrier();
    for (var step = 1u; step < WG; step *= 2u) {
        if tid % (2u * step) == 0u {
            let a = sh_sum[tid];
            let b = sh_sum[tid + step];
            let both = join(Stretch(a[0], a[1], a[2], a[3], a[4]), Stretch(b[0], b[1], b[2], b[3], b[4]));
            sh_sum[tid] = array<f32, 6>(both.mantissa, both.exponent, both.end_to_peak, both.lowest, both.worst, 0.0);
        }
        workgroupBarrier();
    }
    if tid == 0u {
        statistics[out + 6u] = sh_sum[0][0];
        statistics[out + 7u] = sh_sum[0][1];
        statistics[out + 8u] = 1.0 - sh_sum[0][4];
    }
    workgroupBarrier();

    // the tail's order statistic, one byte of its ordered image at a time
    var prefix = 0u;
    var rank = min(params.tail, params.t - 1u);
    for (var byte = 0u; byte < 4u; byte++) {
        let shift = 24u - 8u * byte;
        for (var i = tid; i < 256u; i += WG) {
            atomicStore(&sh_bins[i], 0u);
        }
        workgroupBarrier();
        for (var j = tid; j < params.t; j += WG) {
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
                let count = atomicLoad(&sh_bins[bin]);
                if before + count > rank {
                    break;
                }
                before += count;
            }
            sh_pick[0] = (prefix << 8u) | bin;
            sh_pick[1] = rank - before;
        }
        workgroupBarrier();
        prefix = sh_pick[0];
        rank = sh_pick[1];
        workgroupBarrier();
    }
    var tail_sum = 0.0;
    var tail_count = 0.0;
    for (var j = tid; j < params.t; j += WG) {
        let x = returns[at + j];
        if ordered(x) < prefix {
            tail_sum += x;
            tail_count += 1.0;
        }
    }
    sh_sum[tid] = array<f32, 6>(tail_sum, tail_count, 0.0, 0.0, 0.0, 0.0);
    reduce(tid);
    if tid == 0u {
        statistics[out + 9u] = sh_sum[0][0];
        statistics[out + 10u] = sh_sum[0][1];
        statistics[out + 11u] = unordered(prefix);
    }
}
