// Sharpe ratios of block-bootstrap replicates. Maths, shapes and source: kernels/block_bootstrap.rs.
//   grid  N·R      workgroup WG      one workgroup per (replicate, series): WG blocks are drawn at once, one a thread; their lengths are
//                                    summed up, then threads stride over the bars that they cover
//   reads returns [N,T], statistics [N,12], lengths [N,K]      writes sharpe [R,N]      workgroup memory: 4·WG + 1 words

struct BootstrapParams {
    n: u32,
    t: u32,
    table: u32,
    replicates: u32,
    first: u32,
    seed: u32,
    seed_high: u32,
}

@group(0) @binding(0) var<uniform> params: BootstrapParams;
@group(0) @binding(1) var<storage, read> returns: array<f32>;
@group(0) @binding(2) var<storage, read> statistics: array<f32>;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read_write> sharpe: array<f32>;

override WG: u32 = 64u;
const STATISTICS: u32 = 12u;
const STREAM: u32 = 0x4242u;
const FLAT: f32 = 1e-5;

var<workgroup> sh_start: array<u32, WG>;
var<workgroup> sh_end: array<u32, WG>;
var<workgroup> sh_total: u32;
var<workgroup> sh_sum: array<vec2<f32>, WG>;

// Length of a block: one more than the entries of the series' table that do not exceed u.
fn length_of(row: u32, u: u32) -> u32 {
    var low = 0u;
    var high = params.table;
    while low < high {
        let mid = (low + high) / 2u;
        if lengths[row * params.table + mid] <= u {
            low = mid + 1u;
        } else {
            high = mid;
        }
    }
    return low + 1u;
}

@compute @workgroup_size(WG)
fn block_bootstrap(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) nwg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let group = group_index(wid, nwg);
    if group >= params.n * params.replicates {
        return;
    }
    let row = group % params.n;
    let replicate = params.first + group / params.n;
    let mean = statistics[row * STATISTICS];
    var sums = vec2<f32>(0.0, 0.0);
    var base = 0u;
    for (var batch = 0u; base < params.t; batch++) {
        // each thread's block: where it starts, how long it is
        let block = batch * WG + tid;
        let word = philox4x32(vec4<u32>(replicate, 0u, block / 2u, STREAM << 16u), vec2<u32>(params.seed, params.seed_high));
        let draw = select(word.xy, word.zw, (block & 1u) == 1u);
        sh_start[tid] = mul32(draw.x, params.t).y;
        sh_end[tid] = length_of(row, draw.y >> 1u);
        workgroupBarrier();

        // where each block ends in the replicate
        for (var step = 1u; step < WG; step *= 2u) {
            var before = 0u;
            if tid >= step {
                before = sh_end[tid - step];
            }
            workgroupBarrier();
            sh_end[tid] += before;
            workgroupBarrier();
        }
        if tid == 0u {
            sh_total = sh_end[WG - 1u];
        }
        let total = workgroupUniformLoad(&sh_total);

        // the bars that these blocks cover
        let covered = min(total, params.t - base);
        for (var j = tid; j < covered; j += WG) {
            var low = 0u;
            var high = WG - 1u;
            while low < high {
                let mid = (low + high) / 2u;
                if sh_end[mid] <= j {
                    low = mid + 1u;
                } else {
                    high = mid;
                }
            }
            var into = j;
            if low > 0u {
                into -= sh_end[low - 1u];
            }
            var bar = sh_start[low] + into;
            if bar >= params.t {
                bar -= params.t;
            }
            let d = returns[row * params.t + bar] - mean;
            sums += vec2<f32>(d, d * d);
        }
        workgroupBarrier();
        base += total;
    }

    sh_sum[tid] = sums;
    workgroupBarrier();
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        if tid < half {
            sh_sum[tid] += sh_sum[tid + half];
        }
        workgroupBarrier();
    }
    if tid == 0u {
        let count = f32(params.t);
        let offset = sh_sum[0].x / count;
        let central = sh_sum[0].y - sh_sum[0].x * offset;
        let valid = params.t > 1u && central > FLAT * sh_sum[0].y;
        sharpe[group] = select(UNDEFINED, (mean + offset) / sqrt(central / max(count - 1.0, 1.0)), valid);
    }
}
