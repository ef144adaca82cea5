//! `cuda-host`: the CUDA column executed on the CPU, for tests on machines without an NVIDIA GPU.
//!
//! A kernel's unit is compiled by the system's C++ compiler behind `simt.hpp`, loaded, and run one block at a time with one fiber per
//! thread. Every launch works on copies of its arguments between guard zones, so a store outside an argument, or into one that is only
//! read, is an error that names it; `simt.hpp` lists what else is caught. Reads outside an argument find NaN.
//!
//! `CXX` names the compiler; `FORBACK_CUDA_HOST_FLAGS` adds flags, such as `-fsanitize=undefined -fno-sanitize-recover=all`.

use super::unit_cache::{self, UnitCache};
use super::{Backend, Command, DeviceInfo, DeviceKind, HostData, Launch, LaunchTime, Limits, OpenOptions, Recorded, Schedule, View};
use crate::kernel::{Access, Elem, Kernel};
use crate::{Error, Result};
use std::any::Any;
use std::borrow::Cow;
use std::collections::HashMap;
use std::ffi::{c_char, c_void};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Instant;

const DEVICE: &str = "cuda-host";
const SIMT: &str = include_str!("simt.hpp");
/// No contraction to FMA, as the CPU column; nothing kept that the kernel does not reach, so that shared memory is the kernel's own.
const FLAGS: [&str; 10] =
    ["-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-fvisibility=hidden", "-fdata-sections"];
const LINUX_FLAGS: [&str; 2] = ["-ffunction-sections", "-Wl,--gc-sections"];
/// Threads that a block of CUDA may have.
const MAX_THREADS: u32 = 1024;
/// Groups of CUDA's second and third grid dimension.
const MAX_GROUPS: u32 = 65_535;
/// Words in front of and behind an argument; a NaN in 32 and in 16 bits, so that reads outside show.
const GUARD: usize = 4096;
const CANARY: u32 = 0x7ff9_7ffd;
/// Alignment of an argument, as of a CUDA allocation.
const ALIGN: usize = 256;

type Storage = RwLock<Vec<u32>>;

struct CudaHost {
    compiler: Compiler,
    schedule: Schedule,
    /// Entries by the address of the kernel's value.
    entries: Mutex<HashMap<usize, Run>>,
    lost: AtomicBool,
}

pub(super) fn open(options: &OpenOptions) -> Result<(DeviceInfo, Limits, Box<dyn Backend>)> {
    if cfg!(not(unix)) {
        return Err(no_device("its fibers need ucontext", "run it on Linux"));
    }
    let schedule = match options.schedule {
        Some(schedule) => schedule,
        None => schedule_of(std::env::var("FORBACK_SCHEDULE").ok().as_deref())?,
    };
    let compiler = Compiler::find()?;
    let order = match schedule {
        Schedule::Forward => "forward".into(),
        Schedule::Reverse => "in reverse".into(),
        Schedule::Random(seed) => format!("in random order {seed}"),
    };
    let info = DeviceInfo { kind: DeviceKind::CudaHost, adapter: format!("one fiber per thread, {order}"), driver: compiler.version.clone(), software: true };
    let limits = Limits {
        binding_bytes: u64::MAX,
        buffer_bytes: u64::MAX,
        groups_per_dimension: MAX_GROUPS,
        memory_bytes: u64::MAX,
        align: 1,
        work_per_launch: u64::MAX,
        loop_rounds: u64::MAX,
    };
    Ok((info, limits, Box::new(CudaHost { compiler, schedule, entries: Mutex::default(), lost: AtomicBool::new(false) })))
}

fn no_device(reason: &str, help: &str) -> Error {
    Error::NoDevice { device: DEVICE, reason: reason.into(), help: help.into() }
}

fn schedule_of(text: Option<&str>) -> Result<Schedule> {
    match text {
        None | Some("" | "forward") => Ok(Schedule::Forward),
        Some("reverse") => Ok(Schedule::Reverse),
        Some(seed) => seed.parse().map(Schedule::Random).map_err(|_| Error::Parameter {
            op: DEVICE,
            name: "FORBACK_SCHEDULE".into(),
            value: seed.into(),
            help: "use forward, reverse or a seed".into(),
        }),
    }
}

// ---- the compiler ----------------------------------------------------------------------------------------------------

/// The system's C++ compiler.
#[derive(Debug, Clone)]
struct Compiler {
    command: Vec<String>,
    version: String,
    flags: Vec<String>,
}

impl Compiler {
    fn find() -> Result<Compiler> {
        let words = |text: &str| text.split_whitespace().map(String::from).collect::<Vec<_>>();
        let named = std::env::var("CXX").map(|cxx| words(&cxx)).unwrap_or_default();
        let candidates = [named, words("c++"), words("g++"), words("clang++")];
        let candidates: Vec<_> = candidates.into_iter().filter(|command| !command.is_empty()).collect();
        for command in &candidates {
            let output = std::process::Command::new(&command[0]).args(&command[1..]).arg("--version").stdin(Stdio::null()).output();
            if let Ok(output) = output
                && output.status.success()
                && let Some(version) = String::from_utf8_lossy(&output.stdout).lines().next()
            {
                let mut flags: Vec<String> = FLAGS.iter().map(|flag| flag.to_string()).collect();
                if cfg!(target_os = "linux") {
                    flags.extend(LINUX_FLAGS.iter().map(|flag| flag.to_string()));
                }
                flags.extend(words(&std::env::var("FORBACK_CUDA_HOST_FLAGS").unwrap_or_default()));
                return Ok(Compiler { command: command.clone(), version: version.trim().into(), flags });
            }
        }
        let tried: Vec<_> = candidates.iter().map(|command| command.join(" ")).collect();
        Err(no_device(&format!("no C++ compiler found (tried {})", tried.join(", ")), "apt-get install g++"))
    }

    /// Compiles `unit` to the shared object `out`.
    fn compile(&self, kernel: &Kernel, unit: &str, out: &Path) -> Result<()> {
        let internal = |error: std::io::Error| Error::Driver { device: DEVICE.into(), message: format!("{} did not run: {error}", self.command.join(" ")) };
        let mut command = std::process::Command::new(&self.command[0]);
        command.args(&self.command[1..]).args(&self.flags).arg("-o").arg(out).arg("-").env("LC_ALL", "C");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(internal)?;
        // A compiler that stops early closes the pipe; its exit status tells.
        if let Some(mut stdin) = child.stdin.take() {
            let _ = stdin.write_all(unit.as_bytes());
        }
        let output = child.wait_with_output().map_err(internal)?;
        if output.status.success() {
            return Ok(());
        }
        let log = String::from_utf8_lossy(&output.stderr);
        let (file, line, message) = first_error(&log).unwrap_or_else(|| {
            let file = kernel.cuda.map_or("", |source| source.file);
            (file.into(), 0, log.trim().into())
        });
        Err(Error::Compile { kernel: kernel.name, file, line, message })
    }
}

/// File, line and message of the first error in a log of `file:line:column: error: message` lines.
fn first_error(log: &str) -> Option<(String, u32, String)> {
    log.lines().find_map(|text| {
        let (place, message) = text.split_once(" error: ").or_else(|| text.split_once(" fatal error: "))?;
        let mut place = place.trim_end_matches(':').rsplitn(3, ':');
        let (last, middle, file) = (place.next()?, place.next()?, place.next());
        let (file, line) = match file {
            Some(file) => (file.to_string(), middle),
            None => (middle.to_string(), last),
        };
        Some((file, line.parse().ok()?, message.trim().into()))
    })
}

/// The whole unit: the machine, the kernel, and an entry that takes its arguments from an array.
fn unit(kernel: &Kernel) -> Result<String> {
    let cuda = kernel.cuda_unit().ok_or(Error::Unsupported { kernel: kernel.name, device: DEVICE })?;
    let mut unit = format!("#line 1 \"simt.hpp\"\n{SIMT}\n{cuda}#line 1 \"entry of {}\"\n", kernel.name);
    let types: Vec<String> = kernel.args.iter().map(|arg| format!("{}{}*", if arg.access == Access::Read { "const " } else { "" }, arg.elem.cuda())).collect();
    let (name, params) = (kernel.entry(), kernel.params.name);
    let signature: String = types.iter().fold(String::new(), |text, ty| text + ty + ", ") + params;
    let values: String = types.iter().enumerate().fold(String::new(), |text, (i, ty)| format!("{text}static_cast<{ty}>(args[{i}]), "));
    let _ = write!(
        unit,
        "static_assert(std::is_same<decltype(&{name}), void (*)({signature})>::value, \"the arguments of {name} are not those of the list\");\n\
         static void simt_entry([[maybe_unused]] void *const *args, const void *params) {{ {name}({values}*static_cast<const {params} *>(params)); }}\n\
         extern \"C\" __attribute__((visibility(\"default\"))) void forback_simt_run(void *const *args, const void *params, const uint32_t *grid, \
         uint32_t threads, uint32_t schedule, uint64_t seed, simt::Report *report) {{ simt::run(simt_entry, args, params, grid, threads, schedule, seed, report); }}\n"
    );
    Ok(unit)
}

// ---- loaded units ------------------------------------------------------------------------------------------------------

/// What went wrong in a launch, and where; the same struct is in `simt.hpp`.
#[repr(C)]
struct Report {
    failed: u32,
    block: [u32; 3],
    thread: u32,
    text: [c_char; 1004],
}

type Run = unsafe extern "C" fn(*const *mut c_void, *const u32, *const u32, u32, u32, u64, *mut Report);
type Slot = Arc<Mutex<Option<Run>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The entry of a kernel, compiled and loaded once per process. Shared objects are never unloaded: they handle signals.
fn load(kernel: &Kernel, compiler: &Compiler) -> Result<Run> {
    static LOADED: OnceLock<Mutex<HashMap<String, Slot>>> = OnceLock::new();
    let unit = unit(kernel)?;
    let mut parts = vec!["cuda-host", &unit, &compiler.version];
    parts.extend(compiler.command.iter().chain(&compiler.flags).map(String::as_str));
    let key = unit_cache::key(&parts);
    let slot = Arc::clone(lock(LOADED.get_or_init(Mutex::default)).entry(key.clone()).or_default());
    let mut slot = lock(&slot);
    if let Some(run) = *slot {
        return Ok(run);
    }
    let (cache, name) = (UnitCache::user(), format!("{key}.so"));
    // What the cache holds may be unloadable here, as on a file system mounted noexec: then it is compiled again.
    let run = match cache.load(&name).and_then(|(path, _)| open_object(&path).ok()) {
        Some(run) => run,
        None => build(kernel, compiler, &unit, &cache, &name)?,
    };
    *slot = Some(run);
    Ok(run)
}

/// Compiles into a directory of our own, and leaves a copy in the cache.
fn build(kernel: &Kernel, compiler: &Compiler, unit: &str, cache: &UnitCache, name: &str) -> Result<Run> {
    let dir = std::env::temp_dir().join(unit_cache::unique("forback"));
    let io = |error: std::io::Error| Error::Io { path: dir.display().to_string(), message: error.to_string() };
    let mut builder = std::fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(&dir).map_err(io)?;
    let object: PathBuf = dir.join("unit.so");
    let run = compiler.compile(kernel, unit, &object).and_then(|()| {
        let run = open_object(&object)?;
        cache.store(name, &std::fs::read(&object).map_err(io)?);
        Ok(run)
    });
    let _ = std::fs::remove_dir_all(&dir);
    run
}

fn open_object(path: &Path) -> Result<Run> {
    let driver = |error: libloading::Error| Error::Driver { device: DEVICE.into(), message: format!("{}: {error}", path.display()) };
    // SAFETY: the object was compiled from our own unit (its content is verified, its directory the user's own); its initialisers are
    // those of the C++ library.
    let library = unsafe { libloading::Library::new(path) }.map_err(driver)?;
    // SAFETY: `unit` gives forback_simt_run this signature.
    let run = *unsafe { library.get::<Run>(b"forback_simt_run\0") }.map_err(driver)?;
    std::mem::forget(library);
    Ok(run)
}

// ---- launches --------------------------------------------------------------------------------------------------------

/// A copy of an argument between two guard zones.
struct Guarded {
    words: Vec<u32>,
    /// Its first byte, its length in bytes, and bytes of an element.
    start: usize,
    len: usize,
    each: usize,
}

impl Guarded {
    fn of(view: &View) -> Result<Guarded> {
        let len = view.bytes() as usize;
        let total = len.div_ceil(4) + 2 * GUARD + ALIGN / 4;
        let mut words = Vec::new();
        words.try_reserve_exact(total).map_err(|_| out_of_memory("copying an argument"))?;
        words.resize(total, CANARY);
        let start = 4 * (GUARD..GUARD + ALIGN / 4).find(|&i| (words.as_ptr() as usize + 4 * i).is_multiple_of(ALIGN)).unwrap_or(GUARD);
        bytemuck::cast_slice_mut::<u32, u8>(&mut words)[start..start + len].copy_from_slice(&bytes(&read_lock(view)?)[range(view)]);
        Ok(Guarded { words, start, len, each: view.elem().bytes() as usize })
    }

    fn pointer(&mut self) -> *mut c_void {
        self.words[self.start / 4..].as_mut_ptr().cast()
    }

    fn content(&self) -> &[u8] {
        &bytes(&self.words)[self.start..self.start + self.len]
    }

    /// Number of elements.
    fn elements(&self) -> usize {
        self.len / self.each
    }

    /// The first damaged element of a guard zone, counted from the start of the argument.
    fn damage(&self) -> Option<i64> {
        let (all, end) = (bytes(&self.words), self.start + self.len);
        let whole = |words: &[u32]| words.iter().all(|&word| word == CANARY);
        if end.is_multiple_of(4) && whole(&self.words[..self.start / 4]) && whole(&self.words[end / 4..]) {
            return None;
        }
        let canary = CANARY.to_ne_bytes();
        let hit = |i: &usize| all[*i] != canary[i % 4];
        let element = |i: usize| (i as i64 - self.start as i64).div_euclid(self.each as i64);
        (end..all.len()).find(hit).or_else(|| (0..self.start).rev().find(hit)).map(element)
    }
}

fn bytes(words: &[u32]) -> &[u8] {
    bytemuck::cast_slice(words)
}

fn out_of_memory(doing: &str) -> Error {
    Error::OutOfMemory { device: DEVICE.into(), doing: doing.into() }
}

/// Bytes of a view in its buffer.
fn range(view: &View) -> std::ops::Range<usize> {
    let at = |element: u64| (view.elem().bytes() * element) as usize;
    at(view.range.start)..at(view.range.end)
}

fn read_lock(view: &View) -> Result<std::sync::RwLockReadGuard<'_, Vec<u32>>> {
    Ok(view.storage::<Storage>()?.read().unwrap_or_else(PoisonError::into_inner))
}

fn paste(view: &View, from: &[u8]) -> Result<()> {
    let mut to = view.storage::<Storage>()?.write().unwrap_or_else(PoisonError::into_inner);
    bytemuck::cast_slice_mut::<u32, u8>(&mut to)[range(view)].copy_from_slice(from);
    Ok(())
}

fn fault(kernel: &Kernel, message: &str) -> Error {
    Error::Driver { device: DEVICE.into(), message: format!("kernel {}: {message}", kernel.name) }
}

impl CudaHost {
    fn check(&self) -> Result<()> {
        if self.lost.load(Ordering::Relaxed) {
            return Err(Error::DeviceLost { device: DEVICE.into(), reason: "it was closed".into() });
        }
        Ok(())
    }

    fn entry(&self, kernel: &'static Kernel) -> Result<Run> {
        let address = std::ptr::from_ref(kernel) as usize;
        if let Some(&run) = lock(&self.entries).get(&address) {
            return Ok(run);
        }
        let run = load(kernel, &self.compiler)?;
        lock(&self.entries).insert(address, run);
        Ok(run)
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        let (kernel, grid) = (launch.kernel, launch.grid);
        if !(1..=MAX_THREADS).contains(&kernel.workgroup) {
            return Err(fault(kernel, &format!("{} threads in a block, CUDA allows {MAX_THREADS}", kernel.workgroup)));
        }
        if grid.contains(&0) || grid[1].max(grid[2]) > MAX_GROUPS {
            return Err(fault(kernel, &format!("a grid of {grid:?} blocks, CUDA allows {MAX_GROUPS} in the second and third dimension")));
        }
        if launch.params.len() != kernel.params.fields.len() || launch.args.len() != kernel.args.len() {
            return Err(Error::Internal(format!("{}: a launch with other arguments than the list", kernel.name)));
        }
        let run = self.entry(kernel)?;
        let mut args = launch.args.iter().map(Guarded::of).collect::<Result<Vec<_>>>()?;
        let pointers: Vec<*mut c_void> = args.iter_mut().map(Guarded::pointer).collect();
        let (schedule, seed) = match self.schedule {
            Schedule::Forward => (0, 0),
            Schedule::Reverse => (1, 0),
            Schedule::Random(seed) => (2, u64::from(seed)),
        };
        let mut report = Report { failed: 0, block: [0; 3], thread: 0, text: [0; 1004] };
        // SAFETY: `run` is the entry of this kernel's unit, whose static_asserts pin arguments and params to the list; the arrays are
        // as long as the list says and outlive the call. A kernel that stores far outside its arguments and their guard zones can
        // still damage this process: cuda-host exists to find such kernels.
        unsafe { run(pointers.as_ptr(), launch.params.as_ptr(), grid.as_ptr(), kernel.workgroup, schedule, seed, &mut report) };
        let failure = (report.failed != 0).then(|| {
            let text: Vec<u8> = report.text.iter().take_while(|&&c| c != 0).map(|&c| c as u8).collect();
            format!("block {:?}, thread {}: {}", report.block, report.thread, String::from_utf8_lossy(&text))
        });
        for ((arg, view), copy) in kernel.args.iter().zip(&launch.args).zip(&args) {
            let also = failure.as_ref().map(|text| format!("; then {text}")).unwrap_or_default();
            if let Some(at) = copy.damage() {
                return Err(fault(kernel, &format!("stores at element {at} of argument '{}', which has {}{also}", arg.name, copy.elements())));
            }
            if arg.access == Access::Read {
                let original = read_lock(view)?;
                if let Some(at) = bytes(&original)[range(view)].iter().zip(copy.content()).position(|(a, b)| a != b) {
                    let at = at / copy.each;
                    return Err(fault(kernel, &format!("stores at element {at} of argument '{}', which it may only read{also}", arg.name)));
                }
            }
        }
        if let Some(text) = failure {
            return Err(fault(kernel, &text));
        }
        for ((arg, view), copy) in kernel.args.iter().zip(&launch.args).zip(&args) {
            if arg.access == Access::Write {
                paste(view, copy.content())?;
            }
        }
        Ok(())
    }
}

impl Backend for CudaHost {
    fn alloc(&self, label: &str, elem: Elem, len: u64, data: Option<Cow<'_, [u32]>>) -> Result<Box<dyn Any + Send + Sync>> {
        self.check()?;
        let doing = || out_of_memory(&format!("allocating '{label}'"));
        let len = usize::try_from(len.saturating_mul(elem.bytes()).div_ceil(4)).map_err(|_| doing())?;
        let mut words: Vec<u32> = Vec::new();
        words.try_reserve_exact(len).map_err(|_| doing())?;
        match data {
            Some(data) => words.extend_from_slice(&data),
            None => words.resize(len, 0),
        }
        Ok(Box::new(Storage::new(words)))
    }

    fn write(&self, to: &View, data: HostData) -> Result<()> {
        self.check()?;
        paste(to, &bytes(&data.words())[..to.bytes() as usize])
    }

    fn run(&self, recorded: Recorded<'_>) -> Result<(Vec<HostData>, Vec<LaunchTime>)> {
        self.check()?;
        let (mut reads, mut times) = (Vec::new(), Vec::new());
        for command in recorded.commands {
            match command {
                Command::Launch(launch) => {
                    let start = Instant::now();
                    self.launch(launch)?;
                    if recorded.profile {
                        times.push(LaunchTime::of(launch, start.elapsed().as_secs_f64()));
                    }
                }
                Command::Copy { from, to } => {
                    let copied = bytes(&read_lock(from)?)[range(from)].to_vec();
                    paste(to, &copied)?;
                }
                Command::Read(view) => {
                    let mut words = vec![0u32; view.bytes().div_ceil(4) as usize];
                    let to = &mut bytemuck::cast_slice_mut::<u32, u8>(&mut words)[..view.bytes() as usize];
                    to.copy_from_slice(&bytes(&read_lock(view)?)[range(view)]);
                    reads.push(HostData::of_words(view.elem(), words, view.len() as usize));
                }
            }
        }
        Ok((reads, times))
    }

    fn lose(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }
}
