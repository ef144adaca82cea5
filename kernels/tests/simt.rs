//! The SIMT machine behind `cuda-host`: it runs correct kernels, and it finds the faults that are planted here.
#![cfg(feature = "cuda-host")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use forback_kernels::kernel::{Arg, Cost, Elem, Source, layout, reads, reads_as, reads_u32, writes, writes_u32};
use forback_kernels::{Buffer, Device, Error, Kernel, OpenOptions, Result, Schedule};

forback_kernels::params! {
    /// Params of every kernel here.
    pub struct TestParams {
        /// Elements.
        n: u32,
        /// A factor.
        scale: f32,
    }
}

const SCHEDULES: [Schedule; 5] = [Schedule::Forward, Schedule::Reverse, Schedule::Random(1), Schedule::Random(2), Schedule::Random(3)];

/// A kernel of `text`, with a workgroup per `WG` elements.
const fn kernel(name: &'static str, args: &'static [Arg], workgroup: u32, text: &'static str) -> Kernel {
    Kernel {
        name,
        about: "a test",
        args,
        params: layout::<TestParams>(),
        workgroup,
        constants: &[("TILE", 8)],
        groups: |words| u64::from(words[0]).div_ceil(64),
        wgsl: None,
        cuda: Some(Source { file: "cuda/test.cu", text }),
        cpu: None,
        cost: Cost { unit: "element", units: |words| u64::from(words[0]), bytes: 4.0, flops: 1.0 },
    }
}

macro_rules! cu {
    ($($line:literal)*) => { concat!("struct TestParams { uint32_t n; float scale; };\n", $($line, "\n"),*) };
}

fn open(schedule: Schedule) -> Device {
    Device::open_with("cuda-host", &OpenOptions { schedule: Some(schedule), ..OpenOptions::default() }).unwrap()
}

/// Runs `kernel` on `n` elements of input and returns its output of `n` elements.
fn run_f32(kernel: &'static Kernel, schedule: Schedule, input: &[f32]) -> Result<Vec<f32>> {
    let device = open(schedule);
    let (x, y) = (device.upload("x", input)?, device.zeros("y", input.len() as u64)?);
    let mut pass = device.pass("test");
    pass.launch(kernel, &TestParams { n: input.len() as u32, scale: 1.0 }, &[(&x).into(), (&y).into()])?;
    let read = pass.read(&y)?;
    pass.submit()?.f32(read)
}

fn run_u32(kernel: &'static Kernel, schedule: Schedule, input: &[u32]) -> Result<Vec<u32>> {
    let device = open(schedule);
    let (x, y) = (device.upload_u32("x", input)?, device.zeros_u32("y", input.len() as u64)?);
    let mut pass = device.pass("test");
    pass.launch(kernel, &TestParams { n: input.len() as u32, scale: 1.0 }, &[(&x).into(), (&y).into()])?;
    let read = pass.read(&y)?;
    pass.submit()?.u32(read)
}

fn ramp(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i % 97) as f32 * 0.37 - 11.0).collect()
}

/// The error of a launch that must fail, as text.
fn failure(kernel: &'static Kernel, schedule: Schedule) -> String {
    match run_f32(kernel, schedule, &ramp(256)) {
        Err(error @ Error::Driver { .. }) => error.to_string(),
        other => panic!("{} gave {other:?}", kernel.name),
    }
}

#[track_caller]
fn assert_has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "'{part}' is missing in: {text}");
    }
}

static BLOCK_SUM: Kernel = kernel(
    "sum_of_block",
    &[reads("x"), writes("y")],
    64,
    cu!(
        "extern \"C\" __global__ void __launch_bounds__(WG) sum_of_block(const float* x, float* y, TestParams params) {"
        "    __shared__ float sh_sum[WG];"
        "    const uint32_t tid = threadIdx.x, row = group_index() * WG + tid;"
        "    sh_sum[tid] = row < params.n ? x[row] : 0.0f;"
        "    __syncthreads();"
        "    for (uint32_t half = WG / 2; half > 0; half /= 2) {"
        "        if (tid < half) sh_sum[tid] += sh_sum[tid + half];"
        "        __syncthreads();"
        "    }"
        "    if (row < params.n) y[row] = sh_sum[0];"
        "}"
    ),
);

static BLOCK_SUM_RACE: Kernel = kernel(
    "sum_of_block_race",
    &[reads("x"), writes("y")],
    64,
    cu!(
        "extern \"C\" __global__ void sum_of_block_race(const float* x, float* y, TestParams params) {"
        "    __shared__ float sh_sum[WG];"
        "    const uint32_t tid = threadIdx.x, row = group_index() * WG + tid;"
        "    sh_sum[tid] = row < params.n ? x[row] : 0.0f;"
        "    __syncthreads();"
        "    for (uint32_t half = WG / 2; half > 0; half /= 2) {"
        "        if (tid < half) sh_sum[tid] += sh_sum[tid + half];"
        "    }"
        "    __syncthreads();"
        "    if (row < params.n) y[row] = sh_sum[0];"
        "}"
    ),
);

#[test]
fn a_block_reduction_is_the_same_in_every_order() {
    let x = ramp(1000);
    let sums: Vec<f32> = x.chunks(64).map(|chunk| chunk.iter().sum()).collect();
    let first = run_f32(&BLOCK_SUM, Schedule::Forward, &x).unwrap();
    for (i, y) in first.iter().enumerate() {
        assert!((y - sums[i / 64]).abs() < 1e-3, "{i}: {y} and {}", sums[i / 64]);
    }
    for schedule in SCHEDULES {
        assert_eq!(run_f32(&BLOCK_SUM, schedule, &x).unwrap(), first, "{schedule:?}");
    }
}

#[test]
fn a_missing_barrier_shows_in_some_order() {
    let x = ramp(1000);
    let right = run_f32(&BLOCK_SUM, Schedule::Forward, &x).unwrap();
    let results = SCHEDULES.map(|schedule| run_f32(&BLOCK_SUM_RACE, schedule, &x).unwrap());
    assert!(results.iter().any(|y| *y != right), "the planted race was not seen");
    assert!(results.iter().any(|y| *y != results[0]), "the order made no difference");
}

static OUT_OF_BOUNDS: Kernel = kernel(
    "out_of_bounds",
    &[reads("x"), writes("y")],
    64,
    cu!(
        "extern \"C\" __global__ void out_of_bounds(const float* x, float* y, TestParams params) {"
        "    const uint32_t row = group_index() * WG + threadIdx.x;"
        "    if (row <= params.n) y[row] = 2.0f;"
        "    if (group_index() == 0 && threadIdx.x == 0) y[params.n] = x[0];"
        "}"
    ),
);
static UNDERFLOW: Kernel = kernel(
    "underflow",
    &[reads("x"), writes("y")],
    64,
    cu!("extern \"C\" __global__ void underflow(const float* x, float* y, TestParams params) { y[(int)threadIdx.x - 3] = x[0] * params.scale; }"),
);
static FAR_OUT: Kernel = kernel(
    "far_out",
    &[reads("x"), writes("y")],
    64,
    cu!("extern \"C\" __global__ void far_out(const float* x, float* y, TestParams params) { if (threadIdx.x == 5) y[params.n + (1ull << 44)] = x[0]; }"),
);
static WRITES_INPUT: Kernel = kernel(
    "writes_input",
    &[reads("x"), writes("y")],
    64,
    cu!("extern \"C\" __global__ void writes_input(const float* x, float* y, TestParams params) { const_cast<float*>(x)[7] = params.scale; y[0] = 1.0f; }"),
);

#[test]
fn a_store_outside_an_argument_names_it() {
    for schedule in SCHEDULES {
        assert_has(&failure(&OUT_OF_BOUNDS, schedule), &["kernel out_of_bounds", "element 256 of argument 'y'", "which has 256"]);
        assert_has(&failure(&UNDERFLOW, schedule), &["kernel underflow", "element -1 of argument 'y'"]);
    }
}

#[test]
fn a_store_into_unmapped_memory_is_an_error_and_the_device_lives_on() {
    for _ in 0..3 {
        assert_has(&failure(&FAR_OUT, Schedule::Reverse), &["kernel far_out", "block [3, 0, 0], thread 5", "unmapped memory"]);
        assert!(run_f32(&BLOCK_SUM, Schedule::Reverse, &ramp(70)).is_ok());
    }
}

#[test]
fn a_store_into_a_read_only_argument_names_it() {
    assert_has(&failure(&WRITES_INPUT, Schedule::Forward), &["element 7 of argument 'x'", "only read"]);
}

#[test]
fn a_range_of_a_buffer_is_guarded_too() {
    let device = open(Schedule::Forward);
    let (x, y) = (device.upload("x", &ramp(300)).unwrap(), device.upload("y", &[9.0; 300]).unwrap());
    let launch = |kernel: &'static Kernel, y: &Buffer, n: u32| {
        let mut pass = device.pass("test");
        pass.launch(kernel, &TestParams { n, scale: 1.0 }, &[x.view(100..200), y.view(100..200)]).unwrap();
        let read = pass.read(y).unwrap();
        pass.submit()?.f32(read)
    };
    assert_has(&launch(&OUT_OF_BOUNDS, &y, 100).unwrap_err().to_string(), &["element 100 of argument 'y'", "which has 100"]);
    let result = launch(&BLOCK_SUM, &y, 100).unwrap();
    assert!(result[..100].iter().chain(&result[200..]).all(|&value| value == 9.0), "elements outside the range stay");
    assert!(result[100..200].iter().all(|&value| value != 9.0));
}

static EARLY_EXIT: Kernel = kernel(
    "early_exit",
    &[reads("x"), writes("y")],
    64,
    cu!(
        "extern \"C\" __global__ void early_exit(const float* x, float* y, TestParams params) {"
        "    if (threadIdx.x >= 40) return;"
        "    __syncthreads();"
        "    y[threadIdx.x] = x[threadIdx.x] * params.scale;"
        "}"
    ),
);
static TWO_BARRIERS: Kernel = kernel(
    "two_barriers",
    &[reads("x"), writes("y")],
    64,
    cu!(
        "extern \"C\" __global__ void two_barriers(const float* x, float* y, TestParams params) {"
        "    if (threadIdx.x < 32) {"
        "        __syncthreads();"
        "    } else {"
        "        __syncthreads();"
        "    }"
        "    y[threadIdx.x] = x[threadIdx.x] * params.scale;"
        "}"
    ),
);
static LANE_MISSING: Kernel = kernel(
    "lane_missing",
    &[reads("x"), writes("y")],
    64,
    cu!(
        "extern \"C\" __global__ void lane_missing(const float* x, float* y, TestParams params) {"
        "    float v = x[threadIdx.x] * params.scale;"
        "    if (threadIdx.x != 35) v += __shfl_xor_sync(0xffffffffu, v, 1);"
        "    __syncthreads();"
        "    y[threadIdx.x] = v;"
        "}"
    ),
);
static OTHER_OPERATION: Kernel = kernel(
    "other_operation",
    &[reads("x"), writes("y")],
    64,
    cu!(
        "extern \"C\" __global__ void other_operation(const float* x, float* y, TestParams params) {"
        "    if (threadIdx.x & 1) __syncwarp();"
        "    else y[threadIdx.x] = x[0] + (float)__any_sync(0xffffffffu, params.n > 3);"
        "}"
    ),
);

#[test]
fn divergent_barriers_and_warp_operations_are_errors() {
    for schedule in SCHEDULES {
        assert_has(&failure(&EARLY_EXIT, schedule), &["kernel early_exit", "cuda/test.cu:4", "__syncthreads", "24 of 64 threads have left"]);
        assert_has(&failure(&TWO_BARRIERS, schedule), &["kernel two_barriers", "cuda/test.cu:4", "cuda/test.cu:6"]);
        assert_has(&failure(&LANE_MISSING, schedule), &["kernel lane_missing", "cuda/test.cu:4", "a warp shuffle", "lane 3", "cuda/test.cu:5"]);
        assert_has(&failure(&OTHER_OPERATION, schedule), &["kernel other_operation", "__syncwarp", "a warp vote"]);
    }
}

static NOT_C: Kernel = kernel(
    "not_c",
    &[reads("x"), writes("y")],
    64,
    cu!(
        "extern \"C\" __global__ void not_c(const float* x, float* y, TestParams params) {"
        "    y[0] = x[0] + undeclared;"
        "}"
    ),
);
static OTHER_ARGUMENTS: Kernel =
    kernel("other_arguments", &[reads("x"), writes("y")], 64, cu!("extern \"C\" __global__ void other_arguments(float* x, float* y, TestParams params) {}"));
static OTHER_LAYOUT: Kernel = kernel(
    "other_layout",
    &[reads("x"), writes("y")],
    64,
    concat!("struct TestParams { float scale; uint32_t n; };\n", "extern \"C\" __global__ void other_layout(const float* x, float* y, TestParams params) {}\n"),
);
static OTHER_TYPE: Kernel = kernel(
    "other_type",
    &[reads("x"), writes("y")],
    64,
    concat!("struct TestParams { uint32_t n, scale; };\n", "extern \"C\" __global__ void other_type(const float* x, float* y, TestParams params) {}\n"),
);

#[test]
fn compile_errors_name_file_and_line() {
    match run_f32(&NOT_C, Schedule::Forward, &[1.0]) {
        Err(Error::Compile { kernel, file, line, message }) => {
            assert_eq!((kernel, file.as_str(), line), ("not_c", "cuda/test.cu", 3));
            assert_has(&message, &["undeclared"]);
        }
        other => panic!("{other:?}"),
    }
    match run_f32(&OTHER_ARGUMENTS, Schedule::Forward, &[1.0]) {
        Err(Error::Compile { message, .. }) => assert_has(&message, &["arguments of other_arguments"]),
        other => panic!("{other:?}"),
    }
    for (kernel, field) in [(&OTHER_LAYOUT, "TestParams::n"), (&OTHER_TYPE, "TestParams::scale")] {
        match run_f32(kernel, Schedule::Forward, &[1.0]) {
            Err(Error::Compile { file, message, .. }) => assert!(file == "layout of TestParams" && message.contains(field), "{file}: {message}"),
            other => panic!("{other:?}"),
        }
    }
}

static UNINITIALISED: Kernel = kernel(
    "uninitialised",
    &[reads("x"), writes("y")],
    64,
    cu!(
        "extern \"C\" __global__ void uninitialised(const float* x, float* y, TestParams params) {"
        "    __shared__ float sh_first[WG];"
        "    __shared__ float sh_never[WG];"
        "    const uint32_t row = group_index() * WG + threadIdx.x;"
        "    if (threadIdx.x < 32 && group_index() == 0) sh_first[threadIdx.x] = x[row];"
        "    __syncthreads();"
        "    if (row < params.n) y[row] = row % 2 ? sh_first[threadIdx.x] : sh_never[threadIdx.x];"
        "}"
    ),
);
static TOO_MUCH_SHARED: Kernel = kernel(
    "too_much_shared",
    &[reads("x"), writes("y")],
    64,
    cu!(
        "extern \"C\" __global__ void other_entry(float* y) { __shared__ float sh_unused[20000]; sh_unused[threadIdx.x] = 1.0f; y[0] = sh_unused[3]; }"
        "extern \"C\" __global__ void too_much_shared(const float* x, float* y, TestParams params) {"
        "    __shared__ float sh_big[12300];"
        "    sh_big[threadIdx.x] = x[0]; __syncthreads(); y[0] = sh_big[params.n];"
        "}"
    ),
);

#[test]
fn uninitialised_shared_memory_is_nan() {
    for schedule in SCHEDULES {
        let y = run_f32(&UNINITIALISED, schedule, &ramp(256)).unwrap();
        for (i, value) in y.iter().enumerate() {
            let written = i < 32 && i % 2 == 1;
            assert_eq!(value.is_nan(), !written, "{i}: {value}");
        }
    }
}

#[test]
fn shared_memory_is_limited_and_belongs_to_the_entry() {
    assert_has(&failure(&TOO_MUCH_SHARED, Schedule::Forward), &["needs 49200 bytes of shared memory"]);
}

static WARP: Kernel = kernel(
    "warp",
    &[reads_u32("x"), writes_u32("y")],
    64,
    cu!(
        "extern \"C\" __global__ void warp(const uint32_t* x, uint32_t* y, TestParams params) {"
        "    const uint32_t row = group_index() * WG + threadIdx.x, lane = threadIdx.x % 32, all = 0xffffffffu;"
        "    const uint32_t v = x[row];"
        "    uint32_t sum = v;"
        "    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(all, sum, step);"
        "    bool ok = sum == __reduce_add_sync(all, v);"
        "    uint32_t scan = v;"
        "    for (uint32_t step = 1; step < 32; step *= 2) { uint32_t other = __shfl_up_sync(all, scan, step); if (lane >= step) scan += other; }"
        "    ok = ok && __shfl_sync(all, scan, 31) == sum && __shfl_sync(all, v, lane) == v;"
        "    ok = ok && __shfl_down_sync(all, lane, 3) == (lane < 29 ? lane + 3 : lane);"
        "    ok = ok && __shfl_down_sync(all, lane, 3, 8) == (lane % 8 < 5 ? lane + 3 : lane);"
        "    ok = ok && __shfl_sync(all, lane, 9, 8) == (lane & ~7u) + 1;"
        "    ok = ok && __ballot_sync(all, lane % 3 == 0) == 0x49249249u && __any_sync(all, lane == 7) && !__all_sync(all, lane == 7);"
        "    ok = ok && __reduce_max_sync(all, -(int)lane) == 0 && __reduce_min_sync(all, -(int)lane) == -31 && __reduce_or_sync(all, 1u << lane) == all;"
        "    ok = ok && __match_any_sync(all, lane / 4) == 0xfu << (lane & ~3u);"
        "    const uint32_t half = lane < 16 ? 0xffffu : 0xffff0000u;"
        "    if (lane < 16) { ok = ok && __reduce_add_sync(half, 1u) == 16; } else { ok = ok && __shfl_xor_sync(half, lane, 1) == (lane ^ 1); }"
        "    ok = ok && __shfl_xor_sync(all, 0.5 + lane, 2) == 0.5 + (lane ^ 2);"
        "    ok = ok && __syncthreads_count(lane == 0) == 2;"
        "    y[row] = ok ? scan : 0xdeadu;"
        "    (void)params;"
        "}"
    ),
);

#[test]
fn warp_operations_follow_the_definition() {
    let x: Vec<u32> = (0..256u32).map(|i| i.wrapping_mul(2_654_435_761) >> 20).collect();
    let mut scan = x.clone();
    for i in 0..256 {
        scan[i] += if i % 32 > 0 { scan[i - 1] } else { 0 };
    }
    for schedule in SCHEDULES {
        assert_eq!(run_u32(&WARP, schedule, &x).unwrap(), scan, "{schedule:?}");
    }
}

static INTRINSICS: Kernel = kernel(
    "intrinsics",
    &[reads_u32("x"), writes_u32("y")],
    64,
    cu!(
        "extern \"C\" __global__ void intrinsics(const uint32_t* x, uint32_t* y, TestParams params) {"
        "    __shared__ uint32_t sh_count, sh_max, sh_bits;"
        "    const uint32_t row = group_index() * WG + threadIdx.x;"
        "    if (threadIdx.x == 0) { sh_count = 0; sh_max = 0; sh_bits = 0; }"
        "    __syncthreads();"
        "    atomicAdd(&sh_count, 1u); atomicMax(&sh_max, threadIdx.x); atomicOr(&sh_bits, 1u << (threadIdx.x % 32));"
        "    __syncthreads();"
        "    bool ok = sh_count == WG && sh_max == WG - 1 && sh_bits == ~0u;"
        "    const uint32_t v = __ldg(x + row);"
        "    ok = ok && __umulhi(v, 0xD2511F53u) == (uint32_t)((uint64_t)v * 0xD2511F53u >> 32);"
        "    ok = ok && __umul64hi(0xffffffffffffffffull, 0xffffffffffffffffull) == 0xfffffffffffffffeull;"
        "    ok = ok && __clz(0) == 32 && __clz(1) == 31 && __clzll(1) == 63 && __clzll(0) == 64 && __ffs(8) == 4 && __popc(0xf0f0u) == 8;"
        "    ok = ok && __float_as_uint(1.0f) == 0x3f800000u && __uint_as_float(0x40000000u) == 2.0f && __brev(1u) == 0x80000000u;"
        "    ok = ok && __fmaf_rn(3.0f, 4.0f, 5.0f) == 17.0f && rsqrtf(4.0f) == 0.5f && min(3, 4) == 3 && max(3u, 4u) == 4u && max(1.0f, 2.0f) == 2.0f;"
        "    int e; const float m = frexpf(12.0f, &e);"
        "    ok = ok && m == 0.75f && e == 4 && ldexpf(m, e) == 12.0f && __funnelshift_l(0x80000000u, 1u, 1) == 3u;"
        "    const float4 f = make_float4(1.0f, 2.0f, 3.0f, 4.0f); const uint2 u = make_uint2(5u, 6u);"
        "    ok = ok && f.w == 4.0f && u.y == 6u && sizeof(float4) == 16 && TILE == 8 && blockDim.x == WG && warpSize == 32;"
        "    uint32_t old = v; old = atomicCAS(&old, v, 3u); ok = ok && old == v;"
        "    y[row] = ok ? v : 0xdeadu;"
        "    (void)params;"
        "}"
    ),
);
static DIVIDES: Kernel = kernel(
    "divides",
    &[reads_u32("x"), writes_u32("y")],
    64,
    cu!("extern \"C\" __global__ void divides(const uint32_t* x, uint32_t* y, TestParams params) { y[threadIdx.x] = params.n / x[threadIdx.x]; }"),
);
static RECURSES: Kernel = kernel(
    "recurses",
    &[reads_u32("x"), writes_u32("y")],
    64,
    cu!(
        "__device__ __noinline__ uint32_t deep(const uint32_t* x, uint32_t n) { volatile uint32_t big[1000]; big[n % 1000] = x[0];"
        "    return n == 0 ? 0 : deep(x, n - 1) + big[n % 1000]; }"
        "extern \"C\" __global__ void recurses(const uint32_t* x, uint32_t* y, TestParams params) { y[threadIdx.x] = deep(x, 100000 + params.n); }"
    ),
);

#[test]
fn intrinsics_follow_the_definition() {
    let x: Vec<u32> = (0..256u32).map(|i| i.wrapping_mul(0x9E37_79B9)).collect();
    for schedule in SCHEDULES {
        assert_eq!(run_u32(&INTRINSICS, schedule, &x).unwrap(), x, "{schedule:?}");
    }
}

#[test]
fn faults_of_the_processor_are_errors() {
    let text = |kernel| run_u32(kernel, Schedule::Forward, &[0; 64]).unwrap_err().to_string();
    if cfg!(target_arch = "x86_64") {
        assert_has(&text(&DIVIDES), &["kernel divides", "thread 0", "by zero"]);
    }
    assert_has(&text(&RECURSES), &["kernel recurses", "KiB of stack"]);
}

static WHERE: Kernel = kernel(
    "where_am_i",
    &[reads_u32("x"), writes_u32("y")],
    64,
    cu!(
        "extern \"C\" __global__ void where_am_i(const uint32_t* x, uint32_t* y, TestParams params) {"
        "    const uint32_t row = group_index() * WG + threadIdx.x;"
        "    if (row < params.n) y[row] += row + x[row] * (uint32_t)params.scale;"
        "}"
    ),
);

#[test]
fn every_thread_runs_once_in_a_folded_grid() {
    for schedule in SCHEDULES {
        let options = OpenOptions { groups_per_dimension: Some(3), schedule: Some(schedule), ..OpenOptions::default() };
        let device = Device::open_with("cuda-host", &options).unwrap();
        let n = 64 * 20 + 7;
        let (x, y) = (device.upload_u32("x", &vec![1; n]).unwrap(), device.zeros_u32("y", n as u64).unwrap());
        let mut pass = device.pass("test");
        pass.profile();
        pass.launch(&WHERE, &TestParams { n: n as u32, scale: 2.0 }, &[(&x).into(), (&y).into()]).unwrap();
        let read = pass.read(&y).unwrap();
        let mut done = pass.submit().unwrap();
        assert_eq!(done.profile().len(), 1);
        assert_eq!(done.u32(read).unwrap(), (2..n as u32 + 2).collect::<Vec<_>>(), "{schedule:?}");
    }
}

#[test]
fn launches_run_at_once_on_several_threads() {
    std::thread::scope(|scope| {
        for t in 0..4 {
            scope.spawn(move || {
                let x = ramp(640 + t);
                let first = run_f32(&BLOCK_SUM, Schedule::Forward, &x).unwrap();
                for _ in 0..20 {
                    assert_eq!(run_f32(&BLOCK_SUM, Schedule::Random(t as u32), &x).unwrap(), first);
                }
            });
        }
    });
}

#[test]
fn a_lost_device_says_so() {
    let device = open(Schedule::Forward);
    device.lose();
    assert!(matches!(device.zeros("x", 1), Err(Error::DeviceLost { .. })));
}

// The functions of philox.cu on words of our choice, which counters cannot reach.
static PHILOX_PARTS: Kernel = kernel(
    "philox_parts",
    &[reads_u32("x"), writes("y")],
    64,
    concat!(
        include_str!("../../cuda/philox.cu"),
        "struct TestParams { uint32_t n; float scale; };\n",
        "extern \"C\" __global__ void philox_parts(const uint32_t* x, float* y, TestParams params) {\n",
        "    const uint32_t row = group_index() * WG + threadIdx.x;\n",
        "    if (row >= params.n) return;\n",
        "    const float radius = sqrtf(2.0f * neg_log_uniform(x[2 * row] >> 8));\n",
        "    const float2 z = turn(uniform_of(x[2 * row + 1]));\n",
        "    y[2 * row] = radius * z.x;\n",
        "    y[2 * row + 1] = radius * z.y;\n",
        "}\n"
    ),
);

#[test]
fn philox_normals_are_close_to_f64_at_the_extremes() {
    let edges = [0, 1, 2, 3, 0x3f_ffff, 0x40_0000, 0x7f_fffe, 0x7f_ffff, 0x80_0000, 0x80_0001, 0xbf_ffff, 0xc0_0000, 0xff_fffd, 0xff_fffe, 0xff_ffff];
    let mut ks: Vec<u32> = edges.to_vec();
    ks.extend((0..400).map(|i| i * 41_943));
    let words: Vec<u32> =
        ks.iter().flat_map(|&a| edges.iter().chain(&[0x1f_ffff, 0x20_0000, 0x60_0001, 0x9f_ffff]).flat_map(move |&b| [a << 8, b << 8 | 255])).collect();
    let n = words.len() / 2;
    let device = open(Schedule::Forward);
    let (x, y) = (device.upload_u32("x", &words).unwrap(), device.zeros("y", 2 * n as u64).unwrap());
    let mut pass = device.pass("test");
    pass.launch(&PHILOX_PARTS, &TestParams { n: n as u32, scale: 0.0 }, &[(&x).into(), (&y).into()]).unwrap();
    let read = pass.read(&y).unwrap();
    let got = pass.submit().unwrap().f32(read).unwrap();
    let mut worst = 0.0f64;
    for (pair, z) in words.chunks(2).zip(got.chunks(2)) {
        let [u, v] = [pair[0], pair[1]].map(|word| (f64::from(word >> 8) + 0.5) / 16_777_216.0);
        let (radius, angle) = ((-2.0 * u.ln()).sqrt(), std::f64::consts::TAU * v);
        for (got, want) in z.iter().zip([radius * angle.cos(), radius * angle.sin()]) {
            worst = worst.max((f64::from(*got) - want).abs() / (1.0 + want.abs()));
        }
    }
    // Seen: 1.1e-6, most of it the rounding of v to f32.
    assert!(worst < 2e-6, "{worst:e}");
}

// ---- products of fragments, 16 bits ------------------------------------------------------------------------------------

forback_kernels::params! {
    /// Params of the product of fragments.
    pub struct FragmentParams {
        /// Whether through shuffles.
        shuffled: u32,
    }
}

macro_rules! fragments {
    ($id:ident, $name:literal, $elem:ident) => {
        static $id: Kernel = Kernel {
            name: $name,
            args: &[reads_as("a", Elem::$elem), reads_as("b", Elem::$elem), writes("d")],
            params: layout::<FragmentParams>(),
            groups: |_| 1,
            ..kernel(
                $name,
                &[],
                64,
                concat!(
                    "struct FragmentParams { uint32_t shuffled; };\n",
                    "extern \"C\" __global__ void fragments(const Stored* a, const Stored* b, float* d, FragmentParams params) {\n",
                    "    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;\n",
                    "    uint32_t x[4], y[2];\n",
                    "    for (uint32_t r = 0; r < 4; r++) {\n",
                    "        const Stored* at = a + 16 * (g + 8 * (r % 2)) + 2 * t + 8 * (r / 2);\n",
                    "        x[r] = pair_of(at[0], at[1]);\n",
                    "    }\n",
                    "    for (uint32_t r = 0; r < 2; r++) {\n",
                    "        const Stored* at = b + 8 * (2 * t + 8 * r) + g;\n",
                    "        y[r] = pair_of(at[0], at[8]);\n",
                    "    }\n",
                    "    float sum[4] = {1.0f, 1.0f, 1.0f, 1.0f};\n",
                    "    if (params.shuffled) mma_by_shuffles(sum, x, y); else mma_sync(Stored(), sum, x, y);\n",
                    "    for (uint32_t i = 0; i < 4; i++) d[128 * warp + 8 * (g + 8 * (i / 2)) + 2 * t + i % 2] = sum[i];\n",
                    "}\n"
                ),
            )
        };
    };
}
fragments!(FRAGMENTS_F16, "fragments_f16", F16);
fragments!(FRAGMENTS_BF16, "fragments_bf16", Bf16);

/// mma.sync with the layouts of the PTX ISA is the product of the matrices, in every order of the threads, and so is the way through shuffles.
#[test]
fn fragments_multiply_like_matrices() {
    for (kernel, elem) in [(&FRAGMENTS_F16, Elem::F16), (&FRAGMENTS_BF16, Elem::Bf16)] {
        for schedule in SCHEDULES {
            let device = open(schedule);
            // Small integers: every product and sum is exact.
            let number = |i: usize, by: usize| ((i * by) % 23) as f32 - 11.0;
            let (a, b): (Vec<f32>, Vec<f32>) = ((0..256).map(|i| number(i, 7)).collect(), (0..128).map(|i| number(i, 5)).collect());
            let (x, y) = (device.upload_as("a", elem, &a).unwrap(), device.upload_as("b", elem, &b).unwrap());
            let d = device.zeros("d", 256).unwrap();
            for shuffled in [0, 1] {
                let mut pass = device.pass("fragments");
                pass.launch(kernel, &FragmentParams { shuffled }, &[(&x).into(), (&y).into(), (&d).into()]).unwrap();
                let read = pass.read(&d).unwrap();
                let got = pass.submit().unwrap().f32(read).unwrap();
                for (at, got) in got.iter().enumerate() {
                    let (row, col) = (at % 128 / 8, at % 8);
                    let want = 1.0 + (0..16).map(|k| a[16 * row + k] * b[8 * k + col]).sum::<f32>();
                    assert_eq!(*got, want, "{elem:?} [{row},{col}] {schedule:?} shuffled {shuffled}");
                }
            }
        }
    }
}
