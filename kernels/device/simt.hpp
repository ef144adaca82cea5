// A SIMT machine on the CPU: placed before a CUDA unit, it makes the unit a C++17 one that `cuda-host` compiles and runs.
//
// Every thread of a block is a fiber. A fiber runs until it waits (at a barrier or a warp operation) or leaves the kernel; when none
// can run, the scheduler completes the warp operations whose lanes have all arrived, then the barrier. Between two waits the threads
// run one after the other in the order of the schedule, so code that lacks a barrier gives another result in another order.
// Blocks run one after the other, in the order of the schedule too. Shared memory holds NaN at the start of a block.
//
// Reported as errors, with block and thread: a barrier or warp operation that some threads miss or that threads reach on different
// lines, lanes outside the mask, stack overflow, access to unmapped memory, integer division by zero, more than 48 KiB of shared memory.
// Not modelled: memory order between warps, bank conflicts, contraction to FMA, dynamic shared memory, textures, inline PTX (mma.sync and the
// conversions of f16 are functions here).

#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <math.h>
#include <type_traits>

#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#if defined(__linux__)
#include <link.h>
#endif

// ---- the language ------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static const
// `used`: the machine writes these from outside, which the compiler cannot see.
#define __shared__ static thread_local __attribute__((used))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

#define SIMT_VECTOR2(T, N) \
    struct __align__(2 * sizeof(T)) N##2 { T x, y; }; \
    inline N##2 make_##N##2(T x, T y) { return {x, y}; }
#define SIMT_VECTOR3(T, N) \
    struct N##3 { T x, y, z; }; \
    inline N##3 make_##N##3(T x, T y, T z) { return {x, y, z}; }
#define SIMT_VECTOR4(T, N) \
    struct __align__(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) N##4 { T x, y, z, w; }; \
    inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define SIMT_VECTORS(T, N) SIMT_VECTOR2(T, N) SIMT_VECTOR3(T, N) SIMT_VECTOR4(T, N)
SIMT_VECTORS(float, float)
SIMT_VECTORS(int, int)
SIMT_VECTORS(unsigned, uint)
SIMT_VECTOR2(unsigned long long, ulonglong)
SIMT_VECTOR2(long long, longlong)
SIMT_VECTOR2(double, double)
SIMT_VECTORS(unsigned char, uchar)

// ---- the machine -------------------------------------------------------------------------------------------------------

namespace simt {

constexpr uint32_t max_threads = 1024, warp_size = 32;
constexpr size_t stack_bytes = 256 * 1024, max_shared_bytes = 48 * 1024;
constexpr uint32_t poison = 0x7ffa7ffd;  // a NaN, in 16 bits too

// What went wrong, and where. The same struct is in cuda_host.rs.
struct Report {
    uint32_t failed;
    uint32_t block[3];
    uint32_t thread;
    char text[1004];
};

enum class State : uint8_t { ready, barrier, warp, done };
enum class Op : uint8_t { none, barrier, sync, mma, shuffle, ballot, any, all, match, add, min_signed, min_unsigned, max_signed, max_unsigned, band, bor, bxor };

struct Machine;

struct Fiber {
    Machine *machine;
    uint3 thread;
    State state;
    Op op;           // what it waits at
    const char *file;
    int line;
    uint32_t mask, source;
    uint64_t value, result;
    bool started;
    char *stack;     // above a guard page
    jmp_buf context;
};

using Entry = void (*)(void *const *args, const void *params);

struct Machine {
    Fiber fibers[max_threads];
    uint32_t order[max_threads];
    uint32_t threads;
    Fiber *current;  // null while the scheduler runs
    uint3 block, grid, block_dim;
    uint32_t schedule;
    uint64_t random;
    Entry entry;
    void *const *args;
    const void *params;
    Report *report;
    jmp_buf scheduler;
    Machine *next;
};

// The machine of the launch that runs on this system thread. It lies between the shared variables: `fill_shared` spares it.
static thread_local Machine *machine = nullptr;

[[noreturn]] __noinline__ static void to_scheduler(Machine *m) { _longjmp(m->scheduler, 1); }

static void describe(Machine *m, const Fiber *f, const char *format, va_list values) {
    m->report->failed = 1;
    const uint3 b = m->block;
    m->report->block[0] = b.x, m->report->block[1] = b.y, m->report->block[2] = b.z;
    m->report->thread = f ? f->thread.x : 0;
    vsnprintf(m->report->text, sizeof m->report->text, format, values);
}

__attribute__((format(printf, 3, 4))) static void fail(Machine *m, const Fiber *f, const char *format, ...) {
    va_list values;
    va_start(values, format);
    describe(m, f, format, values);
    va_end(values);
}

static const char *name_of(Op op) {
    switch (op) {
        case Op::barrier: return "__syncthreads";
        case Op::sync: return "__syncwarp";
        case Op::mma: return "mma.sync";
        case Op::shuffle: return "a warp shuffle";
        case Op::ballot: case Op::any: case Op::all: return "a warp vote";
        case Op::match: return "a warp match";
        default: return "a warp reduction";
    }
}

// Gives control to the scheduler; returns when the wait is over.
__noinline__ static void yield(Fiber *f) {
    if (_setjmp(f->context) == 0) to_scheduler(f->machine);
}

// A fiber's life: one thread of a block after the other.
__noinline__ static void live(Fiber *f) {
    for (;;) {
        f->machine->entry(f->machine->args, f->machine->params);
        f->state = State::done;
        yield(f);
    }
}

static void begin() { live(machine->current); }

__noinline__ static void enter(Fiber *f) {
    if (f->started) _longjmp(f->context, 1);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = f->stack;
    context.uc_stack.ss_size = stack_bytes;
    context.uc_link = nullptr;
    makecontext(&context, begin, 0);
    f->started = true;
    setcontext(&context);
}

// Runs a fiber until it waits, is done or fails.
__noinline__ static void resume(Machine *m, Fiber *f) {
    m->current = f;
    if (_setjmp(m->scheduler) == 0) enter(f);
    m->current = nullptr;
}

static size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

static bool prepare_fibers(Machine *m) {
    const size_t page = page_bytes();
    for (uint32_t t = 0; t < m->threads; t++) {
        Fiber &f = m->fibers[t];
        f.machine = m;
        if (!f.stack) {
            void *base = mmap(nullptr, page + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (base == MAP_FAILED || mprotect(base, page, PROT_NONE) != 0) return false;
            f.stack = static_cast<char *>(base) + page;
        }
    }
    return true;
}

static uint32_t random_below(Machine *m, uint32_t n) {  // splitmix64
    uint64_t x = (m->random += 0x9E3779B97F4A7C15ull);
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return static_cast<uint32_t>((x ^ (x >> 31)) % n);
}

static void reorder(Machine *m) {
    for (uint32_t i = 0; i < m->threads; i++) m->order[i] = m->schedule == 1 ? m->threads - 1 - i : i;
    if (m->schedule == 2) {
        for (uint32_t i = m->threads; i > 1; i--) {
            const uint32_t j = random_below(m, i), swapped = m->order[i - 1];
            m->order[i - 1] = m->order[j];
            m->order[j] = swapped;
        }
    }
}

static bool same_site(const Fiber &a, const Fiber &b) {
    return a.op == b.op && a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

static bool together(const Fiber &a, const Fiber &b) { return b.state == State::warp && same_site(a, b) && a.mask == b.mask; }

static uint64_t reduce(Op op, uint64_t a, uint64_t b) {
    const uint32_t x = static_cast<uint32_t>(a), y = static_cast<uint32_t>(b);
    const int32_t sx = static_cast<int32_t>(x), sy = static_cast<int32_t>(y);
    switch (op) {
        case Op::add: return x + y;
        case Op::min_signed: return static_cast<uint32_t>(sx < sy ? sx : sy);
        case Op::max_signed: return static_cast<uint32_t>(sx > sy ? sx : sy);
        case Op::min_unsigned: return x < y ? x : y;
        case Op::max_unsigned: return x > y ? x : y;
        case Op::band: return x & y;
        case Op::bor: return x | y;
        default: return x ^ y;
    }
}

// A lane's part of mma.sync m16n8k16: two values of 16 bits in a word, `value` gives their number.
struct Mma {
    const uint32_t *a, *b;
    float *d;
    float (*value)(uint16_t);
};

// d [16,8] += a [16,16] · b [16,8]; the products of 16-bit values are exact in f32, their sum is rounded in f32 in the order of the depth.
static void multiply_fragments(Fiber *warp) {
    float a[16][16], b[16][8];
    const auto of = [&](uint32_t lane) { return reinterpret_cast<const Mma *>(warp[lane].value); };
    for (uint32_t lane = 0; lane < warp_size; lane++) {
        const Mma *part = of(lane);
        const uint32_t g = lane / 4, t = lane % 4;
        for (uint32_t i = 0; i < 8; i++) {
            const uint16_t bits = static_cast<uint16_t>(part->a[i / 2] >> 16 * (i % 2));
            a[g + 8 * (i / 2 % 2)][2 * t + i % 2 + 8 * (i / 4)] = part->value(bits);
        }
        for (uint32_t i = 0; i < 4; i++) {
            const uint16_t bits = static_cast<uint16_t>(part->b[i / 2] >> 16 * (i % 2));
            b[2 * t + i % 2 + 8 * (i / 2)][g] = part->value(bits);
        }
    }
    for (uint32_t lane = 0; lane < warp_size; lane++) {
        float *d = of(lane)->d;
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t row = lane / 4 + 8 * (i / 2), col = 2 * (lane % 4) + i % 2;
            for (uint32_t k = 0; k < 16; k++) d[i] += a[row][k] * b[k][col];
        }
    }
}

// Completes the warp operation of the lanes of `mask`, which have all arrived.
static void complete(Fiber *warp, uint32_t mask) {
    const Op op = warp[__builtin_ctz(mask)].op;
    if (op == Op::mma) multiply_fragments(warp);
    uint32_t votes = 0;
    uint64_t folded = 0;
    bool first = true;
    for (uint32_t lane = 0; lane < warp_size; lane++) {
        if (!(mask >> lane & 1)) continue;
        votes |= static_cast<uint32_t>(warp[lane].value != 0) << lane;
        folded = first ? warp[lane].value : reduce(op, folded, warp[lane].value);
        first = false;
    }
    for (uint32_t lane = 0; lane < warp_size; lane++) {
        if (!(mask >> lane & 1)) continue;
        Fiber &f = warp[lane];
        switch (op) {
            case Op::sync: case Op::mma: break;
            case Op::shuffle: f.result = warp[f.source].value; break;
            case Op::ballot: f.result = votes; break;
            case Op::any: f.result = votes != 0; break;
            case Op::all: f.result = votes == mask; break;
            case Op::match:
                f.result = 0;
                for (uint32_t other = 0; other < warp_size; other++) {
                    if ((mask >> other & 1) && warp[other].value == f.value) f.result |= uint64_t{1} << other;
                }
                break;
            default: f.result = folded;
        }
        f.state = State::ready;
    }
}

static void explain_lane(Machine *m, const Fiber *warp, uint32_t lanes, const Fiber &f) {
    for (uint32_t lane = 0; lane < warp_size; lane++) {
        if (!(f.mask >> lane & 1) || (lane < lanes && together(f, warp[lane]))) continue;
        if (lane >= lanes) return fail(m, &f, "%s:%d: the mask %08x of %s names lane %u, which the block does not have", f.file, f.line, f.mask, name_of(f.op), lane);
        const Fiber &other = warp[lane];
        if (other.state == State::done) return fail(m, &f, "%s:%d: waits at %s for lane %u, which has left the kernel", f.file, f.line, name_of(f.op), lane);
        return fail(m, &f, "%s:%d: waits at %s with mask %08x for lane %u, which waits at %s on %s:%d with mask %08x", f.file, f.line, name_of(f.op), f.mask, lane,
                    name_of(other.op), other.file, other.line, other.mask);
    }
}

// No fiber can run: completes what is complete. False, with a report, if nothing is.
static bool release(Machine *m) {
    bool released = false;
    for (uint32_t base = 0; base < m->threads; base += warp_size) {
        Fiber *warp = m->fibers + base;
        const uint32_t lanes = m->threads - base < warp_size ? m->threads - base : warp_size;
        for (uint32_t lane = 0; lane < lanes; lane++) {
            const Fiber &f = warp[lane];
            if (f.state != State::warp) continue;
            uint32_t arrived = 0;
            for (uint32_t other = 0; other < lanes; other++) arrived |= static_cast<uint32_t>(together(f, warp[other])) << other;
            if ((arrived & f.mask) == f.mask) {
                complete(warp, f.mask);
                released = true;
            }
        }
    }
    if (released) return true;
    const Fiber *first = nullptr;
    uint32_t gone = 0, count = 0;
    for (uint32_t t = 0; t < m->threads; t++) {
        const Fiber &f = m->fibers[t];
        if (f.state == State::warp) {
            const uint32_t base = t / warp_size * warp_size;
            explain_lane(m, m->fibers + base, m->threads - base < warp_size ? m->threads - base : warp_size, f);
            return false;
        }
        if (f.state == State::done) {
            gone++;
            continue;
        }
        if (!first) first = &f;
        if (!same_site(*first, f)) {
            fail(m, &f, "%s:%d: waits at __syncthreads while thread %u waits at the one on %s:%d", f.file, f.line, first->thread.x, first->file, first->line);
            return false;
        }
        count += f.value != 0;
    }
    if (gone) {
        fail(m, first, "%s:%d: waits at __syncthreads, but %u of %u threads have left the kernel", first->file, first->line, gone, m->threads);
        return false;
    }
    for (uint32_t t = 0; t < m->threads; t++) {
        m->fibers[t].result = count;
        m->fibers[t].state = State::ready;
    }
    return true;
}

// ---- shared memory: the thread-local variables of this unit ------------------------------------------------------------------

struct Shared {
    char *begin;
    size_t bytes;
};

#if defined(__linux__)
static int find_shared(dl_phdr_info *info, size_t size, void *out) {
    if (size < offsetof(dl_phdr_info, dlpi_tls_data) + sizeof info->dlpi_tls_data) return 1;
    const uintptr_t here = reinterpret_cast<uintptr_t>(&find_shared);
    bool ours = false;
    size_t bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto &segment = info->dlpi_phdr[i];
        const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
        if (segment.p_type == PT_LOAD && here >= begin && here < begin + segment.p_memsz) ours = true;
        if (segment.p_type == PT_TLS) bytes = segment.p_memsz;
    }
    if (!ours) return 0;
    *static_cast<Shared *>(out) = {static_cast<char *>(info->dlpi_tls_data), info->dlpi_tls_data ? bytes : 0};
    return 1;
}
#endif

static Shared shared_memory() {
    Shared shared = {nullptr, 0};
#if defined(__linux__)
    dl_iterate_phdr(find_shared, &shared);
#endif
    return shared;
}

__noinline__ static void fill_shared(Shared shared) {
    Machine *const own = machine;
    for (size_t i = 0; i + 4 <= shared.bytes; i += 4) memcpy(shared.begin + i, &poison, 4);
    asm volatile("" ::"r"(&machine) : "memory");
    machine = own;
}

// ---- faults -----------------------------------------------------------------------------------------------------------

constexpr int fault_signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
static struct sigaction earlier[4];

static void on_fault(int signal, siginfo_t *info, void *context) {
    Machine *m = machine;
    if (m && m->current) {
        const Fiber *f = m->current;
        const char *at = static_cast<const char *>(info->si_addr);
        if (signal == SIGFPE) {
            fail(m, f, "divides an integer by zero, or overflows in the division");
        } else if (signal == SIGILL) {
            fail(m, f, "reaches a trap");
        } else if (at < f->stack && at + page_bytes() >= f->stack) {
            fail(m, f, "needs more than %zu KiB of stack", stack_bytes / 1024);
        } else {
            fail(m, f, "accesses unmapped memory: an index far outside an argument");
        }
        to_scheduler(m);
    }
    // Not ours: as if this handler had never been there.
    for (int i = 0; i < 4; i++) {
        if (fault_signals[i] != signal) continue;
        if (earlier[i].sa_flags & SA_SIGINFO) return earlier[i].sa_sigaction(signal, info, context);
        if (earlier[i].sa_handler != SIG_DFL && earlier[i].sa_handler != SIG_IGN) return earlier[i].sa_handler(signal);
        sigaction(signal, &earlier[i], nullptr);
    }
}

static void catch_faults() {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 4; i++) sigaction(fault_signals[i], &action, &earlier[i]);
}

// ---- a launch ---------------------------------------------------------------------------------------------------------

static pthread_mutex_t pool_mutex = PTHREAD_MUTEX_INITIALIZER;
static Machine *pool = nullptr;

static Machine *take_machine() {
    static bool catching = false;
    pthread_mutex_lock(&pool_mutex);
    if (!catching) catch_faults();
    catching = true;
    Machine *m = pool;
    if (m) pool = m->next;
    pthread_mutex_unlock(&pool_mutex);
    return m ? m : static_cast<Machine *>(calloc(1, sizeof(Machine)));
}

static void give_machine(Machine *m) {
    pthread_mutex_lock(&pool_mutex);
    m->next = pool;
    pool = m;
    pthread_mutex_unlock(&pool_mutex);
}

static void run_block(Machine *m, Shared shared) {
    fill_shared(shared);
    for (uint32_t t = 0; t < m->threads; t++) {
        m->fibers[t].thread = make_uint3(t, 0, 0);
        m->fibers[t].state = State::ready;
    }
    for (;;) {
        reorder(m);
        uint32_t live = 0;
        for (uint32_t i = 0; i < m->threads; i++) {
            Fiber *f = m->fibers + m->order[i];
            if (f->state == State::ready) resume(m, f);
            if (m->report->failed) return;
            live += f->state != State::done;
        }
        if (live == 0 || !release(m)) return;
    }
}

static void run(Entry entry, void *const *args, const void *params, const uint32_t *grid, uint32_t threads, uint32_t schedule, uint64_t seed, Report *report) {
    memset(report, 0, sizeof *report);
    Machine *m = take_machine();
    if (!m) {
        report->failed = 1;
        snprintf(report->text, sizeof report->text, "no memory for the threads of a block");
        return;
    }
    machine = m;
    m->threads = threads;
    m->grid = make_uint3(grid[0], grid[1], grid[2]);
    m->block = make_uint3(0, 0, 0);
    m->block_dim = make_uint3(threads, 1, 1);
    m->schedule = schedule;
    m->random = seed;
    m->entry = entry, m->args = args, m->params = params;
    m->report = report;
    const Shared shared = shared_memory();
    const size_t shared_bytes = shared.bytes > sizeof machine ? shared.bytes - sizeof machine : 0;
    const uint64_t blocks = uint64_t{grid[0]} * grid[1] * grid[2];
    // A step that shares no factor with the number of blocks visits each block once.
    uint64_t at = schedule == 1 ? blocks - 1 : 0, step = schedule == 1 ? blocks - 1 : 1;
    if (schedule == 2) {
        const auto coprime = [blocks](uint64_t a) {
            uint64_t b = blocks;
            while (b) {
                const uint64_t rest = a % b;
                a = b;
                b = rest;
            }
            return a == 1;
        };
        const uint32_t range = blocks < 0xffffffffu ? static_cast<uint32_t>(blocks) : 0xffffffffu;
        at = random_below(m, range);
        do step = 1 + random_below(m, range);
        while (!coprime(step));
    }
    if (shared_bytes > max_shared_bytes) {
        fail(m, nullptr, "needs %zu bytes of shared memory, more than the %zu that a block may have", shared_bytes, max_shared_bytes);
    } else if (!prepare_fibers(m)) {
        fail(m, nullptr, "no memory for the stacks of %u threads", threads);
    } else {
        for (uint64_t i = 0; i < blocks && !report->failed; i++) {
            m->block = make_uint3(static_cast<uint32_t>(at % grid[0]), static_cast<uint32_t>(at / grid[0] % grid[1]), static_cast<uint32_t>(at / grid[0] / grid[1]));
            run_block(m, shared);
            at = (at + step) % blocks;
        }
    }
    // Fibers that were stopped inside a kernel start afresh.
    if (report->failed) {
        for (Fiber &f : m->fibers) f.started = false;
    }
    machine = nullptr;
    give_machine(m);
}

// ---- waiting -----------------------------------------------------------------------------------------------------------

__noinline__ static uint64_t wait(State state, Op op, uint32_t mask, uint64_t value, uint32_t source, const char *file, int line) {
    Fiber *f = machine->current;
    const uint32_t lane = f->thread.x % warp_size;
    if (state == State::warp && !(mask >> lane & 1)) {
        fail(f->machine, f, "%s:%d: calls %s with mask %08x, which leaves out its own lane %u", file, line, name_of(op), mask, lane);
        to_scheduler(f->machine);
    }
    if (op == Op::shuffle && !(mask >> source & 1)) {
        fail(f->machine, f, "%s:%d: shuffles from lane %u, which the mask %08x leaves out", file, line, source, mask);
        to_scheduler(f->machine);
    }
    f->op = op, f->mask = mask, f->value = value, f->source = source, f->file = file, f->line = line;
    f->state = state;
    yield(f);
    return f->result;
}

template <class T> uint64_t to_bits(T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "warp operations move 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T> T from_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T> T shuffle(uint32_t mask, T value, uint32_t source, const char *file, int line) {
    return from_bits<T>(wait(State::warp, Op::shuffle, mask, to_bits(value), source, file, line));
}

// mma.sync m16n8k16 with f32 sums, by all 32 lanes of a warp.
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*value)(uint16_t), const char *file, int line) {
    const Mma part = {a, b, d, value};
    asm volatile("" ::"r"(&part) : "memory");
    wait(State::warp, Op::mma, 0xffffffffu, reinterpret_cast<uintptr_t>(&part), 0, file, line);
    asm volatile("" ::: "memory");
}

inline uint32_t own_lane() { return machine->current->thread.x % warp_size; }

template <class T> struct Just { using Type = T; };
template <class T> using Same = typename Just<T>::Type;

}  // namespace simt

#define threadIdx (simt::machine->current->thread)
#define blockIdx (simt::machine->block)
#define blockDim (simt::machine->block_dim)
#define gridDim (simt::machine->grid)
constexpr int warpSize = 32;

// ---- barriers, votes, shuffles, reductions -----------------------------------------------------------------------------------

inline void __syncthreads(SIMT_SITE) {
    asm volatile("" ::: "memory");
    simt::wait(simt::State::barrier, simt::Op::barrier, 0, 0, 0, file, line);
    asm volatile("" ::: "memory");
}
inline int __syncthreads_count(int predicate, SIMT_SITE) {
    return static_cast<int>(simt::wait(simt::State::barrier, simt::Op::barrier, 0, predicate != 0, 0, file, line));
}
inline int __syncthreads_or(int predicate, SIMT_SITE) { return __syncthreads_count(predicate, file, line) != 0; }
inline int __syncthreads_and(int predicate, SIMT_SITE) { return __syncthreads_count(predicate, file, line) == static_cast<int>(blockDim.x); }

#define SIMT_WARP(op, mask, value) simt::wait(simt::State::warp, simt::Op::op, mask, value, 0, file, line)
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) {
    asm volatile("" ::: "memory");
    SIMT_WARP(sync, mask, 0);
    asm volatile("" ::: "memory");
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) { return static_cast<unsigned>(SIMT_WARP(ballot, mask, predicate != 0)); }
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) { return static_cast<int>(SIMT_WARP(any, mask, predicate != 0)); }
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) { return static_cast<int>(SIMT_WARP(all, mask, predicate != 0)); }
template <class T> unsigned __match_any_sync(unsigned mask, T value, SIMT_SITE) { return static_cast<unsigned>(SIMT_WARP(match, mask, simt::to_bits(value))); }
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SIMT_SITE) { return static_cast<unsigned>(SIMT_WARP(add, mask, value)); }
inline int __reduce_add_sync(unsigned mask, int value, SIMT_SITE) { return static_cast<int>(SIMT_WARP(add, mask, static_cast<unsigned>(value))); }
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, SIMT_SITE) { return static_cast<unsigned>(SIMT_WARP(min_unsigned, mask, value)); }
inline int __reduce_min_sync(unsigned mask, int value, SIMT_SITE) { return static_cast<int>(SIMT_WARP(min_signed, mask, static_cast<unsigned>(value))); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, SIMT_SITE) { return static_cast<unsigned>(SIMT_WARP(max_unsigned, mask, value)); }
inline int __reduce_max_sync(unsigned mask, int value, SIMT_SITE) { return static_cast<int>(SIMT_WARP(max_signed, mask, static_cast<unsigned>(value))); }
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, SIMT_SITE) { return static_cast<unsigned>(SIMT_WARP(band, mask, value)); }
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, SIMT_SITE) { return static_cast<unsigned>(SIMT_WARP(bor, mask, value)); }
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, SIMT_SITE) { return static_cast<unsigned>(SIMT_WARP(bxor, mask, value)); }

template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
    const uint32_t w = static_cast<uint32_t>(width), segment = simt::own_lane() & ~(w - 1);
    return simt::shuffle(mask, value, segment + (static_cast<uint32_t>(source) & (w - 1)), file, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
    const uint32_t lane = simt::own_lane(), in_segment = lane & (static_cast<uint32_t>(width) - 1);
    return simt::shuffle(mask, value, in_segment < delta ? lane : lane - delta, file, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
    const uint32_t w = static_cast<uint32_t>(width), lane = simt::own_lane(), in_segment = lane & (w - 1);
    return simt::shuffle(mask, value, delta >= w - in_segment ? lane : lane + delta, file, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_SITE) {
    const uint32_t w = static_cast<uint32_t>(width), lane = simt::own_lane(), other = lane ^ static_cast<uint32_t>(lanes);
    return simt::shuffle(mask, value, other >= (lane & ~(w - 1)) + w ? lane : other, file, line);
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap() {
    simt::fail(simt::machine, simt::machine->current, "calls __trap");
    simt::to_scheduler(simt::machine);
}

// ---- atomics: integers only, because sums of floats depend on the order --------------------------------------------------------

#define SIMT_ATOMIC(name, expression) \
    template <class T> T name(T *at, simt::Same<T> value) { \
        static_assert(std::is_integral<T>::value, "atomics on floats are not deterministic"); \
        const T old = *at; \
        *at = expression; \
        return old; \
    }
SIMT_ATOMIC(atomicAdd, static_cast<T>(old + value))
SIMT_ATOMIC(atomicSub, static_cast<T>(old - value))
SIMT_ATOMIC(atomicMax, old > value ? old : value)
SIMT_ATOMIC(atomicMin, old < value ? old : value)
SIMT_ATOMIC(atomicOr, static_cast<T>(old | value))
SIMT_ATOMIC(atomicAnd, static_cast<T>(old & value))
SIMT_ATOMIC(atomicXor, static_cast<T>(old ^ value))
SIMT_ATOMIC(atomicExch, value)
template <class T> T atomicCAS(T *at, simt::Same<T> expected, simt::Same<T> value) {
    static_assert(std::is_integral<T>::value, "atomics on floats are not deterministic");
    const T old = *at;
    if (old == expected) *at = value;
    return old;
}

// ---- loads, bits, arithmetic ---------------------------------------------------------------------------------------------

template <class T> T __ldg(const T *at) { return *at; }
template <class T> T __ldcg(const T *at) { return *at; }
template <class T> T __ldcs(const T *at) { return *at; }
template <class T> void __stcg(T *at, simt::Same<T> value) { *at = value; }
template <class T> void __stcs(T *at, simt::Same<T> value) { *at = value; }

inline unsigned __float_as_uint(float x) { return simt::from_bits<unsigned>(simt::to_bits(x)); }
inline int __float_as_int(float x) { return simt::from_bits<int>(simt::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return simt::from_bits<float>(x); }
inline float __int_as_float(int x) { return simt::from_bits<float>(static_cast<unsigned>(x)); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline int __float2int_ru(float x) { return static_cast<int>(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(nearbyintf(x)); }
inline unsigned __float2uint_rz(float x) { return static_cast<unsigned>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

// f16: the exponent moves by a product with 2^112, which also normalises subnormals; to f16 to nearest, ties to even.
inline float cvt_f32_f16(uint16_t bits) {
    const unsigned special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    const unsigned magnitude = __float_as_uint(__uint_as_float((bits & 0x7fffu) << 13) * 0x1p112f);
    return __uint_as_float(magnitude | special | (bits & 0x8000u) << 16);
}
inline uint16_t cvt_rn_f16_f32(float x) {
    const unsigned sign = __float_as_uint(x) >> 16 & 0x8000u, magnitude = __float_as_uint(x) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) return static_cast<uint16_t>(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u));
    return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64); }
inline long long __mul64hi(long long a, long long b) { return static_cast<long long>(static_cast<__int128>(a) * b >> 64); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline unsigned __brev(unsigned x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) { return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) << (shift & 31) >> 32); }
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) { return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) >> (shift & 31)); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
inline float normcdff(float x) { return static_cast<float>(0.5 * erfc(-0.70710678118654752440 * x)); }
inline void sincospif(float x, float *s, float *c) {
    const double angle = 3.14159265358979323846 * fmod(static_cast<double>(x), 2.0);
    *s = static_cast<float>(sin(angle));
    *c = static_cast<float>(cos(angle));
}
inline float sinpif(float x) { float s, c; sincospif(x, &s, &c); return s; }
inline float cospif(float x) { float s, c; sincospif(x, &s, &c); return c; }
// The system's headers declare some of these names themselves.
#define __expf expf
#define __exp10f(x) exp10f(x)
#define __logf logf
#define __log2f log2f
#define __log10f log10f
#define __sinf sinf
#define __cosf cosf
#define __tanf tanf
#define __powf powf
#define __sincosf(x, s, c) (*(s) = sinf(x), *(c) = cosf(x))

#define SIMT_MIN_MAX(R, A, B) \
    inline R min(A a, B b) { return static_cast<R>(a) < static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); } \
    inline R max(A a, B b) { return static_cast<R>(a) > static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); }
SIMT_MIN_MAX(int, int, int)
SIMT_MIN_MAX(unsigned, unsigned, unsigned)
SIMT_MIN_MAX(unsigned, unsigned, int)
SIMT_MIN_MAX(unsigned, int, unsigned)
SIMT_MIN_MAX(long, long, long)
SIMT_MIN_MAX(unsigned long, unsigned long, unsigned long)
SIMT_MIN_MAX(long long, long long, long long)
SIMT_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
