// Combinatorially symmetric cross-validation. Maths, shapes and source: kernels/multiple_testing.rs.
//   cscv_blocks   grid  S     workgroup WG      one workgroup per trial, threads stride over the bars of each block
//   cscv_best     grid  C     workgroup WG      one workgroup per combination, threads stride over trials, tree of (key, index)
//   cscv_rank     grid  C     workgroup WG      the same, counts of trials out of sample below and level with the best

struct CscvParams {
    n: u32,
    t: u32,
    splits: u32,
    shift: u32,
    combinations: u32,
    first: u32,
}

@group(0) @binding(0) var<uniform> params: CscvParams;

override WG: u32 = 128u;
const NONE: u32 = 0xffffffffu;

// First bar of a block; the first t mod splits blocks have one bar more.
fn edge(block: u32) -> u32 {
    return block * (params.t / params.splits) + min(block, params.t % params.splits);
}

// ---- blocks -------------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> returns: array<f32>;
@group(0) @binding(2) var<storage, read_write> sums: array<u32>;

var<workgroup> sh_sums: array<vec4<u32>, WG>;

@compute @workgroup_size(WG)
fn cscv_blocks(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row = group_index(wid, nwg);
    if row >= params.n {
        return;
    }
    let at = row * params.t;

    // largest exponent of the row
    var largest = 1u;
    for (var j = tid; j < params.t; j += WG) {
        largest = max(largest, (bitcast<u32>(returns[at + j]) >> 23u) & 0xffu);
    }
    sh_sums[tid] = vec4<u32>(largest, 0u, 0u, 0u);
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if tid < half {
            sh_sums[tid].x = max(sh_sums[tid].x, sh_sums[tid + half].x);
        }
        workgroupBarrier();
    }
    let scale = i32(params.shift) + 126 - i32(sh_sums[0].x);
    workgroupBarrier();

    // exact sum (xy) and sum of squares (zw) of each block
    for (var block = 0u; block < params.splits; block++) {
        var sum = vec2<u32>(0u, 0u);
        var squares = vec2<u32>(0u, 0u);
        let to_bar = edge(block + 1u);
        for (var j = edge(block) + tid; j < to_bar; j += WG) {
            let x = to_fixed(returns[at + j], scale);
            let size = magnitude64(x);
            sum = add64(sum, x);
            squares = add64(squares, shr128(mul64(size, size), params.shift).xy);
        }
        sh_sums[tid] = vec4<u32>(sum, squares);
        workgroupBarrier();
        for (var half = WG / 2u; half > 0u; half /= 2u) {
            if tid < half {
                let a = sh_sums[tid];
                let b = sh_sums[tid + half];
                sh_sums[tid] = vec4<u32>(add64(a.xy, b.xy), add64(a.zw, b.zw));
            }
            workgroupBarrier();
        }
        if tid < 4u {
            sums[(4u * block + tid) * params.n + row] = sh_sums[0][tid];
        }
        workgroupBarrier();
    }
}

// ---- combinations -------------------------------------------------------------------------------------------------

@group(0) @binding(1) var<storage, read> sums_in: array<u32>;
@group(0) @binding(2) var<storage, read> masks: array<u32>;

// Bars of the blocks in `mask`.
fn bars_of(mask: u32) -> u32 {
    var bars = 0u;
    for (var rest = mask; rest != 0u; rest &= rest - 1u) {
        let block = countTrailingZeros(rest);
        bars += edge(block + 1u) - edge(block);
    }
    return bars;
}

// Key of a trial's Sharpe ratio over the `bars` bars of the blocks in `mask`; 0 where it is undefined.
fn score(trial: u32, mask: u32, bars: u32) -> u32 {
    var sum = vec2<u32>(0u, 0u);
    var squares = vec2<u32>(0u, 0u);
    for (var rest = mask; rest != 0u; rest &= rest - 1u) {
        let at = 4u * countTrailingZeros(rest) * params.n + trial;
        sum = add64(sum, vec2<u32>(sums_in[at], sums_in[at + params.n]));
        squares = add64(squares, vec2<u32>(sums_in[at + 2u * params.n], sums_in[at + 3u * params.n]));
    }
    let variance = scaled_variance(bars, sum, squares, params.shift);
    if bars < 2u || is_zero128(variance) {
        return 0u;
    }
    let size = magnitude64(sum);
    return ratio_key(mul64(size, size), variance, (sum.y >> 31u) == 1u);
}

fn complement(mask: u32) -> u32 {
    return ~mask & ((1u << params.splits) - 1u);
}

@group(0) @binding(3) var<storage, read_write> best: array<u32>;

var<workgroup> sh_key: array<u32, WG>;
var<workgroup> sh_trial: array<u32, WG>;

@compute @workgroup_size(WG)
fn cscv_best(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.combinations {
        return;
    }
    let mask = masks[group];
    let bars = bars_of(mask);

    // each thread's best in sample; a later trial must be strictly better
    var key = 0u;
    var winner = NONE;
    for (var trial = tid; trial < params.n; trial += WG) {
        let mine = score(trial, mask, bars);
        if winner == NONE || mine > key {
            key = mine;
            winner = trial;
        }
    }
    sh_key[tid] = key;
    sh_trial[tid] = winner;
    workgroupBarrier();

    // tree: larger key, then lower index
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if tid < half {
            let other = sh_trial[tid + half];
            let better = sh_key[tid + half] > sh_key[tid] || (sh_key[tid + half] == sh_key[tid] && other < sh_trial[tid]);
            if other != NONE && (sh_trial[tid] == NONE || better) {
                sh_key[tid] = sh_key[tid + half];
                sh_trial[tid] = other;
            }
        }
        workgroupBarrier();
    }
    // against earlier runs of trials; the winner's key out of sample beside it
    if tid == 0u && sh_trial[0] != NONE && (best[3u * group + 1u] == NONE || sh_key[0] > best[3u * group]) {
        best[3u * group] = sh_key[0];
        best[3u * group + 1u] = params.first + sh_trial[0];
        best[3u * group + 2u] = score(sh_trial[0], complement(mask), params.t - bars);
    }
}

// ---- ranks --------------------------------------------------------------------------------------------------------

@group(0) @binding(3) var<storage, read> best_in: array<u32>;
@group(0) @binding(4) var<storage, read_write> counts: array<u32>;

@compute @workgroup_size(WG)
fn cscv_rank(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.combinations {
        return;
    }
    let mask = complement(masks[group]);
    let bars = bars_of(mask);
    let pivot = best_in[3u * group + 2u];
    var below = 0u;
    var level = 0u;
    for (var trial = tid; trial < params.n; trial += WG) {
        let key = score(trial, mask, bars);
        below += select(0u, 1u, key < pivot);
        level += select(0u, 1u, key == pivot);
    }
    sh_key[tid] = below;
    sh_trial[tid] = level;
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if tid < half {
            sh_key[tid] += sh_key[tid + half];
            sh_trial[tid] += sh_trial[tid + half];
        }
        workgroupBarrier();
    }
    if tid == 0u {
        counts[2u * group] += sh_key[0];
        counts[2u * group + 1u] += sh_trial[0];
    }
}
