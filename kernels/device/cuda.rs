//! `cuda`: the CUDA column through the NVIDIA driver, found at run time; nothing is linked.
//!
//! Probe first: cudarc panics on its first call without a driver, so no call into it, not even the text of its errors, comes before
//! [`gpus`] or [`nvrtc_version`] said yes. One non-blocking stream per device orders everything, so cudarc's event tracking is off.
//!
//! Units are compiled at run time by NVRTC to a cubin for the device's own architecture, or to PTX for the newest architecture that
//! NVRTC knows where the device is newer (the driver compiles that), and kept in the unit cache: with a warm cache no NVRTC is needed.
//! Multiplications and additions contract to FMA, as is NVRTC's default; nothing else departs from IEEE.

use super::unit_cache::{self, UnitCache};
use super::{Backend, Command, DeviceInfo, DeviceKind, HostData, Launch, LaunchTime, Limits, Prepared, Recorded, View};
use crate::kernel::{Elem, Kernel};
use crate::{Error, Result};
use cudarc::driver::sys::{CUdevice_attribute, CUdeviceptr, CUevent_flags, CUmemPool_attribute, CUresult};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaGraph, CudaStream, DriverError, result, sys};
use cudarc::nvrtc::Ptx;
use cudarc::nvrtc::result as nvrtc;
use cudarc::nvrtc::sys as nvrtc_sys;
use std::any::Any;
use std::borrow::Cow;
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

const DEVICE: &str = "cuda";
/// Groups of the second and third grid dimension; the first takes as many, so that grids fold as on other devices.
const GROUPS: u32 = 65_535;
/// The first driver that has every function used here (stream-ordered memory, cubins of NVRTC 12 under minor-version compatibility).
const OLDEST_DRIVER: i32 = 12_000;
const OPTIONS: [&str; 2] = ["--std=c++17", "--generate-line-info"];
const INSTALL_DRIVER: &str = "install the NVIDIA driver, 525 or newer";
const INSTALL_NVRTC: &str = "pip install nvidia-cuda-nvrtc-cu12 and put its lib folder on LD_LIBRARY_PATH";

// ---- probing ---------------------------------------------------------------------------------------------------------

fn no_device(reason: String, help: &str) -> Error {
    Error::NoDevice { device: DEVICE, reason, help: help.into() }
}

/// Number of GPUs that the driver sees, and the CUDA version of the driver; asked once per process.
fn gpus() -> Result<(usize, i32)> {
    static PROBE: OnceLock<Result<(usize, i32)>> = OnceLock::new();
    PROBE.get_or_init(probe).clone()
}

fn probe() -> Result<(usize, i32)> {
    // SAFETY: loads the driver's library, as every user of CUDA does, and lets it go.
    if !unsafe { sys::is_culib_present() } {
        return Err(no_device("the driver's library was not found".into(), INSTALL_DRIVER));
    }
    let refused = |doing: &str, error: DriverError| no_device(format!("{doing}: {}", text(error)), "see whether nvidia-smi runs");
    let mut version: c_int = 0;
    // SAFETY: writes one int; may be called before cuInit.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(|error| refused("asking the driver for its version", error))?;
    if version < OLDEST_DRIVER {
        let reason = format!("the driver is for CUDA {}, {} is needed", dotted(version), dotted(OLDEST_DRIVER));
        return Err(no_device(reason, INSTALL_DRIVER));
    }
    match CudaContext::device_count() {
        Ok(count) if count > 0 => Ok((count as usize, version)),
        Ok(_) => Err(no_device("the driver sees no GPU".into(), "see what nvidia-smi lists, and CUDA_VISIBLE_DEVICES")),
        Err(error) => Err(refused("starting the driver", error)),
    }
}

/// Version of NVRTC, if there is one; asked once per process.
fn nvrtc_version() -> Option<(i32, i32)> {
    static PROBE: OnceLock<Option<(i32, i32)>> = OnceLock::new();
    *PROBE.get_or_init(|| {
        // SAFETY: loads NVRTC's library and lets it go.
        if !unsafe { nvrtc_sys::is_culib_present() } {
            return None;
        }
        let (mut major, mut minor): (c_int, c_int) = (0, 0);
        // SAFETY: writes two ints.
        unsafe { nvrtc_sys::nvrtcVersion(&mut major, &mut minor) }.result().ok()?;
        // Older ones have no cubins for what they compile.
        (major >= 12).then_some((major, minor))
    })
}

/// Number of CUDA devices; 0 without a driver.
pub(super) fn count() -> usize {
    gpus().map_or(0, |(count, _)| count)
}

fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// Name and description of a driver's error. Only after [`gpus`] found the library.
fn text(error: DriverError) -> String {
    let name = error.error_name().map_or_else(|_| format!("CUDA error {}", error.0 as u32), |name| name.to_string_lossy().into_owned());
    match error.error_string() {
        Ok(description) => format!("{name} ({})", description.to_string_lossy()),
        Err(_) => name,
    }
}

// ---- the device ------------------------------------------------------------------------------------------------------

/// Context and stream of a device; buffers keep it alive.
struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    name: String,
    driver: i32,
    /// Compute capability times ten, as in `sm_90`.
    sm: i32,
    lost: AtomicBool,
}

struct Cuda {
    gpu: Arc<Gpu>,
    /// Loaded kernels by the address of their value.
    functions: Mutex<HashMap<usize, CudaFunction>>,
    /// One pass at a time, so that its times and errors are its own.
    running: Mutex<()>,
}

pub(super) fn open(index: usize) -> Result<(DeviceInfo, Limits, Box<dyn Backend>)> {
    let (count, driver) = gpus()?;
    if index >= count {
        let gpus = if count == 1 { "1 GPU".into() } else { format!("{count} GPUs") };
        return Err(no_device(format!("cuda:{index} was asked for, the driver sees {gpus}"), &format!("use cuda:0 to cuda:{}", count - 1)));
    }
    let refused = |error: DriverError| no_device(format!("opening GPU {index}: {}", text(error)), "see whether nvidia-smi runs, and whether the GPU is free");
    let context = CudaContext::new(index).map_err(refused)?;
    // SAFETY: one stream orders all work and all frees of this context's buffers, and no buffer exists yet.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().map_err(refused)?;
    let name = context.name().map_err(refused)?;
    let (major, minor) = context.compute_capability().map_err(refused)?;
    let (_, memory) = context.mem_get_info().map_err(refused)?;
    let grid = [CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z];
    let mut groups = GROUPS;
    for attribute in grid {
        groups = groups.min(context.attribute(attribute).map_err(refused)?.max(1) as u32);
    }
    let gpu = Gpu { context, stream, name, driver, sm: 10 * major + minor, lost: AtomicBool::new(false) };
    gpu.keep_freed_memory().map_err(refused)?;
    let nvrtc = nvrtc_version().map_or("no NVRTC".into(), |(major, minor)| format!("NVRTC {major}.{minor}"));
    let info =
        DeviceInfo { kind: DeviceKind::Cuda, adapter: gpu.name.clone(), driver: format!("CUDA {}, sm_{}, {nvrtc}", dotted(driver), gpu.sm), software: false };
    let memory = memory as u64;
    let limits = Limits {
        // Kernels count elements in 32 bits.
        binding_bytes: memory.min(4 * u64::from(u32::MAX)),
        buffer_bytes: memory,
        groups_per_dimension: groups,
        memory_bytes: memory,
        align: 64,
        work_per_launch: 2_000_000_000_000,
        loop_rounds: u64::MAX,
    };
    let cuda = Cuda { gpu: Arc::new(gpu), functions: Mutex::default(), running: Mutex::default() };
    Ok((info, limits, Box::new(cuda)))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// Makes the device's context current on this thread, unless the device is lost.
    fn enter(&self) -> Result<()> {
        if self.lost.load(Ordering::Relaxed) {
            return Err(Error::DeviceLost { device: self.device(), reason: "by an earlier error, or it was closed".into() });
        }
        self.context.bind_to_thread().map_err(|error| self.error("entering the device", error))
    }

    fn device(&self) -> String {
        format!("{DEVICE} ({})", self.name)
    }

    /// The pool keeps freed memory instead of returning it at every synchronisation.
    fn keep_freed_memory(&self) -> Result<(), DriverError> {
        if !self.context.has_async_alloc() {
            return Ok(());
        }
        let mut threshold = u64::MAX;
        // SAFETY: the device is the context's; the attribute takes a 64-bit number.
        unsafe {
            let pool = result::device::get_default_mem_pool(self.context.cu_device())?;
            result::mem_pool::set_attribute(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, (&raw mut threshold).cast())
        }
    }

    /// The library's error for a driver's error; one that ends the context marks the device lost.
    fn error(&self, doing: &str, error: DriverError) -> Error {
        use CUresult as C;
        match error.0 {
            C::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { device: self.device(), doing: doing.into() },
            C::CUDA_ERROR_ILLEGAL_ADDRESS
            | C::CUDA_ERROR_MISALIGNED_ADDRESS
            | C::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | C::CUDA_ERROR_INVALID_PC
            | C::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | C::CUDA_ERROR_HARDWARE_STACK_ERROR
            | C::CUDA_ERROR_ASSERT
            | C::CUDA_ERROR_LAUNCH_FAILED
            | C::CUDA_ERROR_LAUNCH_TIMEOUT
            | C::CUDA_ERROR_ECC_UNCORRECTABLE
            | C::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | C::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | C::CUDA_ERROR_DEINITIALIZED
            | C::CUDA_ERROR_DEVICE_UNAVAILABLE
            | C::CUDA_ERROR_EXTERNAL_DEVICE => {
                self.lost.store(true, Ordering::Relaxed);
                Error::DeviceLost { device: self.device(), reason: format!("{doing}: {}", text(error)) }
            }
            // What the unit was compiled for is not what the driver takes.
            C::CUDA_ERROR_UNSUPPORTED_PTX_VERSION | C::CUDA_ERROR_NO_BINARY_FOR_GPU | C::CUDA_ERROR_INVALID_IMAGE | C::CUDA_ERROR_INVALID_PTX => {
                let nvrtc = nvrtc_version().map_or("a cached unit".into(), |(major, minor)| format!("NVRTC {major}.{minor}"));
                let driver = dotted(self.driver);
                self.driver_error(format!(
                    "{doing}: {}: the driver is for CUDA {driver}, the unit comes from {nvrtc}; update the driver, or pip install \
                     nvidia-cuda-nvrtc-cu12 in a version that is not newer than {driver}",
                    text(error)
                ))
            }
            C::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES => {
                self.driver_error(format!("{doing}: {}: a workgroup needs more registers or shared memory than the GPU has", text(error)))
            }
            _ => self.driver_error(format!("{doing}: {}", text(error))),
        }
    }

    fn driver_error(&self, message: String) -> Error {
        Error::Driver { device: self.device(), message }
    }

    /// Allocates in the order of the stream, or at once where the driver has no pools.
    fn allocate(&self, bytes: usize) -> Result<CUdeviceptr, DriverError> {
        if !self.context.has_async_alloc() {
            // SAFETY: the context is current.
            return unsafe { result::malloc_sync(bytes) };
        }
        // SAFETY: the stream is the context's, which is current.
        let first = unsafe { result::malloc_async(self.stream.cu_stream(), bytes) };
        match first {
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                // The pool may hold enough in pieces that do not fit: let it go, and ask again.
                self.stream.synchronize()?;
                // SAFETY: the device is the context's, and its pool is in use by nobody after the synchronisation.
                unsafe {
                    let pool = result::device::get_default_mem_pool(self.context.cu_device())?;
                    result::mem_pool::trim_to(pool, 0)?;
                    result::malloc_async(self.stream.cu_stream(), bytes)
                }
            }
            other => other,
        }
    }
}

// ---- buffers ---------------------------------------------------------------------------------------------------------

/// Device memory of at least one word.
struct Memory {
    gpu: Arc<Gpu>,
    pointer: CUdeviceptr,
}

impl Memory {
    /// Address of the first element of a range.
    fn at(view: &View) -> Result<CUdeviceptr> {
        Ok(view.storage::<Memory>()?.pointer + view.elem().bytes() * view.range.start)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let gpu = &self.gpu;
        // The last clone may go on any thread. An error here means that the context, and the memory with it, is gone.
        if gpu.context.bind_to_thread().or_else(|_| gpu.context.bind_to_thread()).is_ok() {
            if gpu.context.has_async_alloc() {
                // SAFETY: the pointer came from malloc_async on this stream and is freed once; earlier work on the stream ends first.
                let _ = unsafe { result::free_async(self.pointer, gpu.stream.cu_stream()) };
            } else {
                let _ = gpu.stream.synchronize();
                // SAFETY: the pointer came from malloc_sync and is freed once; the stream is idle.
                let _ = unsafe { result::free_sync(self.pointer) };
            }
        }
    }
}

fn bytes_of(view: &View) -> usize {
    view.bytes() as usize
}

// ---- compiling -------------------------------------------------------------------------------------------------------

/// What NVRTC is to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// Machine code for this architecture.
    Cubin(i32),
    /// PTX for this architecture, which the driver compiles.
    Ptx(i32),
}

impl Target {
    /// Machine code where NVRTC knows the GPU, else PTX for the newest architecture below it; `None` if the GPU is too old.
    fn of(sm: i32, known: &[i32]) -> Option<Target> {
        if known.contains(&sm) {
            return Some(Target::Cubin(sm));
        }
        known.iter().copied().filter(|&arch| arch < sm).max().map(Target::Ptx)
    }

    fn option(self) -> String {
        match self {
            Target::Cubin(arch) => format!("--gpu-architecture=sm_{arch}"),
            Target::Ptx(arch) => format!("--gpu-architecture=compute_{arch}"),
        }
    }
}

/// Architectures that NVRTC compiles for.
fn known_architectures() -> Vec<i32> {
    let mut count: c_int = 0;
    // SAFETY: writes one int.
    if unsafe { nvrtc_sys::nvrtcGetNumSupportedArchs(&mut count) }.result().is_err() || count <= 0 {
        return Vec::new();
    }
    let mut known = vec![0; count as usize];
    // SAFETY: writes as many ints as it announced.
    match unsafe { nvrtc_sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) }.result() {
        Ok(()) => known,
        Err(_) => Vec::new(),
    }
}

/// An NVRTC program, destroyed at the end.
struct Program(nvrtc_sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by create_program and destroyed once.
        let _ = unsafe { nvrtc::destroy_program(self.0) };
    }
}

/// Compiles a unit; PTX ends with a zero byte. Only after [`nvrtc_version`] found the library.
fn compile(kernel: &Kernel, unit: &str, target: Target) -> Result<Vec<u8>> {
    let file = kernel.cuda.map_or("", |source| source.file);
    let failed = |message: String| Error::Compile { kernel: kernel.name, file: file.into(), line: 0, message };
    let nvrtc_failed = |error: nvrtc::NvrtcError| failed(format!("NVRTC: {:?}", error.0));
    let source = CString::new(unit).map_err(|_| failed("the source has a zero byte".into()))?;
    let name = CString::new(file).map_err(|_| failed("the file name has a zero byte".into()))?;
    let program = Program(nvrtc::create_program(&source, Some(&name)).map_err(nvrtc_failed)?);
    let mut options: Vec<String> = OPTIONS.iter().map(|option| option.to_string()).collect();
    options.push(target.option());
    // SAFETY: the program is alive, and so is its source.
    if let Err(error) = unsafe { nvrtc::compile_program(program.0, &options) } {
        // SAFETY: the program is alive.
        let log = unsafe { nvrtc::get_program_log(program.0) }.map(|log| chars(&log)).unwrap_or_default();
        let (file, line, message) = first_error(&log).unwrap_or_else(|| (file.into(), 0, format!("NVRTC: {:?}: {}", error.0, log.trim())));
        return Err(Error::Compile { kernel: kernel.name, file, line, message });
    }
    if let Target::Ptx(_) = target {
        // SAFETY: the program is alive and compiled.
        let ptx = unsafe { nvrtc::get_ptx(program.0) }.map_err(nvrtc_failed)?;
        let mut image: Vec<u8> = ptx.iter().map(|&c| c as u8).collect();
        if image.last() != Some(&0) {
            image.push(0);
        }
        return Ok(image);
    }
    let mut size = 0usize;
    // SAFETY: the program is alive and compiled for a real architecture; writes one size.
    unsafe { nvrtc_sys::nvrtcGetCUBINSize(program.0, &mut size) }.result().map_err(nvrtc_failed)?;
    let mut image = vec![0u8; size];
    // SAFETY: as above; writes as many bytes as it announced.
    unsafe { nvrtc_sys::nvrtcGetCUBIN(program.0, image.as_mut_ptr().cast::<c_char>()) }.result().map_err(nvrtc_failed)?;
    Ok(image)
}

impl Gpu {
    /// The compiled unit, from the cache or from NVRTC. Without NVRTC, what any NVRTC compiled for this architecture will do.
    fn image(&self, kernel: &Kernel, cache: &UnitCache) -> Result<Vec<u8>> {
        let unit = kernel.cuda_unit().ok_or(Error::Unsupported { kernel: kernel.name, device: DEVICE })?;
        let options = OPTIONS.join(" ");
        let name = |nvrtc: &str| format!("{}.cubin", unit_cache::key(&["cuda", &unit, &options, &format!("sm_{}", self.sm), nvrtc]));
        let any = name("any");
        let Some((major, minor)) = nvrtc_version() else {
            return cache.load(&any).map(|(_, image)| image).ok_or_else(|| {
                let reason = format!("kernel {} must be compiled for sm_{} and NVRTC (12 or newer) was not found", kernel.name, self.sm);
                no_device(reason, INSTALL_NVRTC)
            });
        };
        let own = name(&format!("{major}.{minor}"));
        if let Some((_, image)) = cache.load(&own) {
            return Ok(image);
        }
        let target = Target::of(self.sm, &known_architectures()).ok_or_else(|| {
            self.driver_error(format!("NVRTC {major}.{minor} does not compile for sm_{}; pip install nvidia-cuda-nvrtc-cu12, an older one", self.sm))
        })?;
        let image = compile(kernel, &unit, target)?;
        for name in [own, any] {
            cache.store(&name, &image);
        }
        Ok(image)
    }
}

fn chars(text: &[c_char]) -> String {
    let bytes: Vec<u8> = text.iter().take_while(|&&c| c != 0).map(|&c| c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// File, line and message of the first error in a log of `file(line): error: message` lines.
fn first_error(log: &str) -> Option<(String, u32, String)> {
    log.lines().find_map(|text| {
        let (place, message) = text.split_once("): error: ").or_else(|| text.split_once("): catastrophic error: ")).or_else(|| {
            // With a number, as in `error #20:`.
            let (place, rest) = text.split_once("): error #")?;
            Some((place, rest.split_once(": ")?.1))
        })?;
        let (file, line) = place.rsplit_once('(')?;
        Some((file.into(), line.parse().ok()?, message.trim().into()))
    })
}

// ---- passes ----------------------------------------------------------------------------------------------------------

/// What a pass collects while it is being submitted. Copies to the host write into `reads` until the stream is idle.
#[derive(Default)]
struct Submitted {
    reads: Vec<(View, Vec<u32>)>,
    events: Vec<(CudaEvent, CudaEvent)>,
}

/// The launches and copies of a pass up to its first read.
struct Graph {
    graph: CudaGraph,
    until: usize,
}

// SAFETY: the handles are the driver's, which takes calls from any thread; launches are ordered by the backend's `running` lock.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Cuda {
    fn function(&self, kernel: &'static Kernel) -> Result<CudaFunction> {
        let mut functions = lock(&self.functions);
        let address = std::ptr::from_ref(kernel) as usize;
        if let Some(function) = functions.get(&address) {
            return Ok(function.clone());
        }
        let gpu = &self.gpu;
        let image = gpu.image(kernel, &UnitCache::user())?;
        let loading = |error| gpu.error(&format!("loading kernel {}", kernel.name), error);
        let module = gpu.context.load_module(Ptx::from_binary(image)).map_err(loading)?;
        let function = module.load_function(kernel.entry()).map_err(loading)?;
        functions.insert(address, function.clone());
        Ok(function)
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        let (gpu, kernel) = (&self.gpu, launch.kernel);
        if launch.params.len() != kernel.params.fields.len() || launch.args.len() != kernel.args.len() {
            return Err(Error::Internal(format!("{}: a launch with other arguments than the list", kernel.name)));
        }
        let function = self.function(kernel)?;
        let mut pointers = launch.args.iter().map(Memory::at).collect::<Result<Vec<CUdeviceptr>>>()?;
        let mut values: Vec<*mut c_void> = pointers.iter_mut().map(|pointer| (&raw mut *pointer).cast()).collect();
        values.push(launch.params.as_ptr().cast_mut().cast());
        let [x, y, z] = launch.grid;
        // SAFETY: the driver copies the values during the call: a pointer per argument, in the order of the list, then the params
        // struct, whose layout the unit's static_asserts pin to the words that it is read from. The buffers are alive, and freeing
        // them waits for this launch, in the order of the stream. The function's module is loaded in this context.
        unsafe { result::launch_kernel(function.cu_function(), (x, y, z), (kernel.workgroup, 1, 1), 0, gpu.stream.cu_stream(), &mut values) }
            .map_err(|error| gpu.error(&format!("launching kernel {}", kernel.name), error))
    }

    fn submit(&self, recorded: &Recorded<'_>, submitted: &mut Submitted) -> Result<()> {
        let gpu = &self.gpu;
        let (stream, timed) = (&gpu.stream, Some(CUevent_flags::CU_EVENT_DEFAULT));
        for command in recorded.commands {
            match command {
                Command::Launch(launch) if recorded.profile => {
                    // Compile and load before the clock starts.
                    self.function(launch.kernel)?;
                    let timing = |error| gpu.error("timing a launch", error);
                    let start = stream.record_event(timed).map_err(timing)?;
                    self.launch(launch)?;
                    submitted.events.push((start, stream.record_event(timed).map_err(timing)?));
                }
                Command::Launch(launch) => self.launch(launch)?,
                Command::Copy { from, to } => {
                    let (source, target, bytes) = (Memory::at(from)?, Memory::at(to)?, bytes_of(from));
                    // SAFETY: both ranges lie inside live buffers of this device and are equally long, as the pass checked; frees
                    // come later on the same stream.
                    unsafe { result::memcpy_dtod_async(target, source, bytes, stream.cu_stream()) }
                        .map_err(|error| gpu.error("copying between buffers", error))?;
                }
                Command::Read(view) => {
                    let source = Memory::at(view)?;
                    let mut words = Vec::new();
                    let doing = "making room for a download";
                    words.try_reserve_exact(bytes_of(view).div_ceil(4)).map_err(|_| Error::OutOfMemory { device: "the host".into(), doing: doing.into() })?;
                    words.resize(bytes_of(view).div_ceil(4), 0u32);
                    submitted.reads.push((view.clone(), words));
                    if let Some((_, words)) = submitted.reads.last_mut()
                        && !words.is_empty()
                    {
                        let bytes = &mut bytemuck::cast_slice_mut::<u32, u8>(words)[..bytes_of(view)];
                        // SAFETY: the range lies inside a live buffer; `submitted` owns the words until the stream is idle.
                        unsafe { result::memcpy_dtoh_async(bytes, source, stream.cu_stream()) }.map_err(|error| gpu.error("downloading", error))?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl Backend for Cuda {
    fn alloc(&self, label: &str, elem: Elem, len: u64, data: Option<Cow<'_, [u32]>>) -> Result<Box<dyn Any + Send + Sync>> {
        let gpu = &self.gpu;
        gpu.enter()?;
        let doing = format!("allocating '{label}'");
        let bytes = len.max(1).checked_mul(elem.bytes()).and_then(|bytes| bytes.checked_next_multiple_of(4)).and_then(|bytes| usize::try_from(bytes).ok());
        let bytes = bytes.ok_or_else(|| Error::OutOfMemory { device: gpu.device(), doing: doing.clone() })?;
        let pointer = gpu.allocate(bytes).map_err(|error| gpu.error(&doing, error))?;
        let memory = Memory { gpu: Arc::clone(gpu), pointer };
        let stream = gpu.stream.cu_stream();
        let filled = match data {
            // SAFETY: the memory is as long as the data or longer; from pageable host memory the call returns when the data is staged.
            Some(data) if !data.is_empty() => unsafe { result::memcpy_htod_async(pointer, &data[..data.len().min(bytes / 4)], stream) },
            // SAFETY: the memory is `bytes` long.
            _ => unsafe { result::memset_d8_async(pointer, 0, bytes, stream) },
        };
        filled.map_err(|error| gpu.error(&format!("filling '{label}'"), error))?;
        Ok(Box::new(memory))
    }

    fn write(&self, to: &View, data: HostData) -> Result<()> {
        let gpu = &self.gpu;
        gpu.enter()?;
        let (target, words) = (Memory::at(to)?, data.words());
        let bytes = &bytemuck::cast_slice::<u32, u8>(&words)[..bytes_of(to)];
        // SAFETY: the range is as long as the words, as the device checked; from pageable host memory the call returns when they are staged.
        unsafe { result::memcpy_htod_async(target, bytes, gpu.stream.cu_stream()) }.map_err(|error| gpu.error("writing a buffer", error))
    }

    fn prepare(&self, recorded: &Recorded<'_>) -> Result<Prepared> {
        let gpu = &self.gpu;
        let _running = lock(&self.running);
        gpu.enter()?;
        // A graph holds what comes before the first read, and no clocks.
        let until = recorded.commands.iter().position(|c| matches!(c, Command::Read(_))).unwrap_or(recorded.commands.len());
        if recorded.profile || until == 0 {
            return Ok(Box::new(()));
        }
        for command in &recorded.commands[..until] {
            if let Command::Launch(launch) = command {
                // Modules load outside of the capture.
                self.function(launch.kernel)?;
            }
        }
        let capturing = |error| gpu.error("capturing a graph", error);
        gpu.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(capturing)?;
        let head = Recorded { commands: &recorded.commands[..until], ..*recorded };
        let result = self.submit(&head, &mut Submitted::default());
        let graph = gpu.stream.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(capturing)?;
        result?;
        Ok(match graph {
            Some(graph) => Box::new(Graph { graph, until }) as Prepared,
            None => Box::new(()),
        })
    }

    fn run(&self, recorded: Recorded<'_>) -> Result<(Vec<HostData>, Vec<LaunchTime>)> {
        let gpu = &self.gpu;
        let _running = lock(&self.running);
        gpu.enter()?;
        let mut submitted = Submitted::default();
        let result = match recorded.prepared.and_then(|p| p.downcast_ref::<Graph>()) {
            Some(Graph { graph, until }) => {
                let tail = Recorded { commands: &recorded.commands[*until..], ..recorded };
                graph.launch().map_err(|error| gpu.error("launching a graph", error)).and_then(|()| self.submit(&tail, &mut submitted))
            }
            None => self.submit(&recorded, &mut submitted),
        };
        // Also after an error: copies into `submitted` may be under way.
        let idle = gpu.stream.synchronize().map_err(|error| gpu.error(&format!("running pass '{}'", recorded.label), error));
        result?;
        idle?;
        let launches = recorded.commands.iter().filter_map(|command| if let Command::Launch(launch) = command { Some(launch) } else { None });
        let mut times = Vec::new();
        for (launch, (start, end)) in launches.zip(&submitted.events) {
            let milliseconds = start.elapsed_ms(end).map_err(|error| gpu.error("timing a launch", error))?;
            times.push(LaunchTime::of(launch, f64::from(milliseconds) / 1e3));
        }
        let host = |(view, words): (View, Vec<u32>)| HostData::of_words(view.elem(), words, view.len() as usize);
        Ok((submitted.reads.into_iter().map(host).collect(), times))
    }

    fn lose(&self) {
        self.gpu.lost.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
mod tests {
    use super::*;
    use crate::Device;
    use crate::philox::PHILOX;

    /// With or without a driver, opening never panics; without one it says what to install.
    #[test]
    fn opening_is_an_error_or_a_device() {
        for spec in ["cuda", "cuda:0", "cuda:999"] {
            match Device::open(spec) {
                Ok(device) => assert!(count() > 0 && spec != "cuda:999", "{device:?}"),
                Err(Error::NoDevice { device, help, .. }) => assert!(device == DEVICE && !help.is_empty()),
                Err(error) => panic!("{spec}: {error}"),
            }
        }
        if count() == 0 {
            let _ = nvrtc_version();
            assert!(Device::open("auto").is_ok());
        }
    }

    #[test]
    fn the_target_is_the_gpu_or_the_newest_below_it() {
        let cuda_12_4 = [50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90];
        let cuda_13 = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121];
        assert_eq!(Target::of(90, &cuda_12_4), Some(Target::Cubin(90)));
        assert_eq!(Target::of(120, &cuda_12_4), Some(Target::Ptx(90)));
        assert_eq!(Target::of(121, &cuda_13), Some(Target::Cubin(121)));
        assert_eq!(Target::of(61, &cuda_13), None);
        assert_eq!(Target::Ptx(90).option(), "--gpu-architecture=compute_90");
    }

    /// Where NVRTC is installed, it compiles a kernel to machine code and to PTX, and its errors name file and line.
    #[test]
    fn nvrtc_compiles_where_it_is_installed() {
        let Some(version) = nvrtc_version() else { return };
        let known = known_architectures();
        assert!(known.contains(&80), "NVRTC {version:?} knows {known:?}");
        let unit = PHILOX.cuda_unit().unwrap();
        assert!(compile(&PHILOX, &unit, Target::Cubin(80)).unwrap().starts_with(b"\x7fELF"));
        let ptx = compile(&PHILOX, &unit, Target::Ptx(80)).unwrap();
        let text = std::ffi::CStr::from_bytes_with_nul(&ptx).unwrap().to_str().unwrap();
        assert!(text.contains(".target sm_80") && text.contains(".entry philox"));
        let broken = unit.replace("threadIdx.x", "threadIndex.x");
        match compile(&PHILOX, &broken, Target::Cubin(80)) {
            Err(Error::Compile { file, line, message, .. }) => {
                assert!(line > 0 && file.starts_with("cuda/") && message.contains("threadIndex"), "{file}:{line}: {message}");
            }
            other => panic!("{:?}", other.map(|image| image.len())),
        }
    }

    #[test]
    fn errors_of_nvrtc_name_file_and_line() {
        let log = "cuda/a.cu(2): warning #177-D: variable \"x\" was declared but never referenced\n\ncuda/a.cu(12): error: identifier \"y\" is undefined\n      y = 1;\n      ^\n\n1 error detected";
        assert_eq!(first_error(log), Some(("cuda/a.cu".into(), 12, "identifier \"y\" is undefined".into())));
        let numbered = "layout of P(1): error #20: identifier \"P\" is undefined";
        assert_eq!(first_error(numbered), Some(("layout of P".into(), 1, "identifier \"P\" is undefined".into())));
        assert_eq!(first_error("nothing"), None);
    }
}
