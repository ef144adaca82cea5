//! Devices, buffers and passes. A [`Pass`] records launches, then submits once and downloads once.
//!
//! ```
//! use forback_kernels::{Device, philox};
//! # fn main() -> forback_kernels::Result<()> {
//! let device = Device::open("cpu")?;
//! let counter = device.upload_u32("counter", &[0, 0, 0, 0])?;
//! let key = device.upload_u32("key", &[0, 0])?;
//! let mut pass = device.pass("hello");
//! let out = philox::philox(&mut pass, &counter, &key)?;
//! let bits = pass.read(&out.bits)?;
//! assert_eq!(pass.submit()?.u32(bits)?, [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
//! # Ok(()) }
//! ```

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda-host")]
mod cuda_host;
pub(crate) mod prefetch;
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
mod unit_cache;
#[cfg(feature = "wgpu")]
mod wgpu;

use crate::kernel::{Access, Elem, Kernel, Params};
use crate::{Error, Result, cast, half};
use std::any::Any;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The five devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// The plain CPU column in f64.
    Reference,
    /// The CPU column in f32.
    Cpu,
    /// WGSL through wgpu: Vulkan, Metal, DX12.
    Wgpu,
    /// CUDA through the NVIDIA driver.
    Cuda,
    /// The CUDA column executed on the CPU, for tests.
    CudaHost,
}

impl DeviceKind {
    /// The name that [`Device::open`] takes.
    pub fn name(self) -> &'static str {
        match self {
            DeviceKind::Reference => "reference",
            DeviceKind::Cpu => "cpu",
            DeviceKind::Wgpu => "wgpu",
            DeviceKind::Cuda => "cuda",
            DeviceKind::CudaHost => "cuda-host",
        }
    }
}

/// What a device is.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceInfo {
    /// Which of the five.
    pub kind: DeviceKind,
    /// Adapter or processor name.
    pub adapter: String,
    /// Driver and its version, or the compiler of `cuda-host`.
    pub driver: String,
    /// True where a GPU's interface runs on the CPU (llvmpipe, SwiftShader, WARP, `cuda-host`).
    pub software: bool,
}

impl std::fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}{}{})", self.kind.name(), self.adapter, if self.driver.is_empty() { "" } else { ", " }, self.driver)
    }
}

/// What a device offers. Chunk planning keeps every launch inside these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Largest range of a buffer that one argument may bind, in bytes.
    pub binding_bytes: u64,
    /// Largest buffer, in bytes.
    pub buffer_bytes: u64,
    /// Workgroups per grid dimension.
    pub groups_per_dimension: u32,
    /// Bytes that all live buffers of the device may hold together.
    pub memory_bytes: u64,
    /// Alignment of a bound range's start, in elements.
    pub align: u64,
    /// Arithmetic instructions after which a launch should end, so that no watchdog resets the driver.
    pub work_per_launch: u64,
    /// Rounds that the loops of one thread may take together: llvmpipe leaves every loop after 65,535 of them, silently.
    pub loop_rounds: u64,
}

impl Limits {
    /// Workgroups that one launch can hold.
    pub fn groups(&self) -> u64 {
        u64::from(self.groups_per_dimension).saturating_pow(3).min(u64::from(u32::MAX))
    }

    /// Folds a number of workgroups into three grid dimensions; the product may exceed `groups`, so kernels guard their tail.
    pub fn fold(&self, groups: u64) -> [u32; 3] {
        let limit = u64::from(self.groups_per_dimension);
        let x = groups.clamp(1, limit);
        let y = groups.div_ceil(x).clamp(1, limit);
        let z = groups.div_ceil(x * y).max(1);
        [x as u32, y as u32, z.min(limit) as u32]
    }
}

/// How to open a device: limits to stay under (`None` = what the device offers), and how WGSL is compiled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Cap on [`Limits::binding_bytes`].
    pub binding_bytes: Option<u64>,
    /// Cap on [`Limits::buffer_bytes`].
    pub buffer_bytes: Option<u64>,
    /// Cap on [`Limits::groups_per_dimension`].
    pub groups_per_dimension: Option<u32>,
    /// Cap on [`Limits::memory_bytes`].
    pub memory_bytes: Option<u64>,
    /// Cap on [`Limits::work_per_launch`].
    pub work_per_launch: Option<u64>,
    /// Cap on [`Limits::loop_rounds`].
    pub loop_rounds: Option<u64>,
    /// Keep the shader compiler's bounds, loop and division checks; `None` asks `FORBACK_CHECKED=1`.
    pub checked: Option<bool>,
    /// Order in which `cuda-host` runs the threads of a block; `None` asks `FORBACK_SCHEDULE` (`forward`, `reverse`, or a seed).
    pub schedule: Option<Schedule>,
}

/// Order in which `cuda-host` runs the threads of a block between two barriers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// Thread 0 first.
    Forward,
    /// Thread 0 last.
    Reverse,
    /// A new random order after every barrier.
    Random(u32),
}

/// Values of a buffer on the host.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum HostData {
    F32(Vec<f32>),
    F64(Vec<f64>),
    U32(Vec<u32>),
    F16(Vec<u16>),
    Bf16(Vec<u16>),
}

impl HostData {
    fn len(&self) -> usize {
        match self {
            HostData::F32(x) => x.len(),
            HostData::F64(x) => x.len(),
            HostData::U32(x) => x.len(),
            HostData::F16(x) | HostData::Bf16(x) => x.len(),
        }
    }

    fn elem(&self) -> Elem {
        match self {
            HostData::F32(_) | HostData::F64(_) => Elem::F32,
            HostData::U32(_) => Elem::U32,
            HostData::F16(_) => Elem::F16,
            HostData::Bf16(_) => Elem::Bf16,
        }
    }

    /// Reals rounded to a storage of 16 bits; anything else as it is.
    fn stored(self, elem: Elem) -> HostData {
        let halves = |bits: Vec<u16>| if elem == Elem::Bf16 { HostData::Bf16(bits) } else { HostData::F16(bits) };
        match self {
            HostData::F32(x) if elem.is_half() => halves(x.into_iter().map(|v| half::narrow(elem, v)).collect()),
            HostData::F64(x) if elem.is_half() => halves(x.into_iter().map(|v| half::narrow(elem, v)).collect()),
            same => same,
        }
    }

    /// As words of a device whose reals are f32. Two halves share a word, the first in its low bits; an odd last one leaves zeros above it.
    #[cfg_attr(not(any(feature = "wgpu", feature = "cuda", feature = "cuda-host")), allow(dead_code, reason = "the CPU column holds values as they are"))]
    pub(crate) fn words(self) -> Vec<u32> {
        match self {
            HostData::F32(x) => bytemuck::cast_vec(x),
            HostData::F64(x) => x.into_iter().map(|v| (v as f32).to_bits()).collect(),
            HostData::U32(x) => x,
            HostData::F16(x) | HostData::Bf16(x) => pack(&x),
        }
    }

    /// `len` values out of words as [`HostData::words`] has them.
    pub(crate) fn of_words(elem: Elem, words: Vec<u32>, len: usize) -> HostData {
        match elem {
            Elem::F32 => HostData::F32(bytemuck::cast_vec(words)),
            Elem::U32 => HostData::U32(words),
            Elem::F16 => HostData::F16(unpack(&words, len)),
            Elem::Bf16 => HostData::Bf16(unpack(&words, len)),
        }
    }
}

fn pack(halves: &[u16]) -> Vec<u32> {
    halves.chunks(2).map(|two| u32::from(two[0]) | u32::from(two.get(1).copied().unwrap_or(0)) << 16).collect()
}

fn unpack(words: &[u32], len: usize) -> Vec<u16> {
    words.iter().flat_map(|&word| [word as u16, (word >> 16) as u16]).take(len).collect()
}

/// What a backend has to do; everything else is shared.
pub(crate) trait Backend: Send + Sync {
    /// Makes a buffer holding `data` ([`HostData::words`]), or zeros.
    fn alloc(&self, label: &str, elem: Elem, len: u64, data: Option<Cow<'_, [u32]>>) -> Result<Box<dyn Any + Send + Sync>>;
    /// Overwrites a range that is as long as `data`.
    fn write(&self, to: &View, data: HostData) -> Result<()>;
    /// What runs of the same commands can share: bind groups, a graph. Nothing where the commands are all there is.
    fn prepare(&self, _: &Recorded<'_>) -> Result<Prepared> {
        Ok(Box::new(()))
    }
    /// Does what the host does for a run before a kernel or the driver takes over, and drops it.
    fn rehearse(&self, _: &Recorded<'_>) -> Result<()> {
        Ok(())
    }
    /// Runs the commands in order and returns the reads, in order.
    fn run(&self, recorded: Recorded<'_>) -> Result<(Vec<HostData>, Vec<LaunchTime>)>;
    /// Makes the device unusable, as a driver reset would.
    fn lose(&self);
    /// Why the device has no buffers of an element type, and what to use instead; `None` where it has.
    fn lacks(&self, _: Elem) -> Option<&'static str> {
        None
    }
}

/// What a backend keeps for running the same commands again.
pub(crate) type Prepared = Box<dyn Any + Send + Sync>;

struct Inner {
    info: DeviceInfo,
    limits: Limits,
    used: AtomicU64,
    backend: Box<dyn Backend>,
}

/// An open device. Cloning is cheap and shares it.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

impl PartialEq for Device {
    /// Whether both are handles of the same open device.
    fn eq(&self, other: &Device) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({})", self.0.info)
    }
}

/// Names that [`Device::open`] knows.
pub const DEVICE_NAMES: [&str; 6] = ["auto", "cpu", "reference", "wgpu", "cuda", "cuda-host"];

impl Device {
    /// Opens `auto`, `cpu`, `reference`, `wgpu[:n]`, `cuda[:n]` or `cuda-host`.
    ///
    /// `auto` takes CUDA if present, else a hardware wgpu adapter, else the CPU; a software adapter only when asked for by name.
    /// # Errors
    /// `UnknownDevice` with the nearest name; `NoDevice` with what the probe saw and how to get one.
    pub fn open(spec: &str) -> Result<Device> {
        Device::open_with(spec, &OpenOptions::default())
    }

    /// As [`Device::open`], under caps.
    pub fn open_with(spec: &str, options: &OpenOptions) -> Result<Device> {
        let (name, index) = match spec.split_once(':') {
            Some((name, n)) => (name, Some(n.parse::<usize>().map_err(|_| unknown_device(spec))?)),
            None => (spec, None),
        };
        match (name, index) {
            ("auto", None) => Ok(Device::auto(options)),
            ("cpu", None) => Ok(Device::from_parts(cpu::open(false), options)),
            ("reference", None) => Ok(Device::from_parts(cpu::open(true), options)),
            ("wgpu", n) => open_wgpu(n, options),
            ("cuda", n) => open_cuda(n.unwrap_or(0), options),
            ("cuda-host", None) => open_cuda_host(options),
            _ => Err(unknown_device(spec)),
        }
    }

    fn auto(options: &OpenOptions) -> Device {
        if let Ok(device) = open_cuda(0, options) {
            return device;
        }
        match open_wgpu(None, options) {
            Ok(device) if !device.info().software => device,
            _ => Device::from_parts(cpu::open(false), options),
        }
    }

    fn from_parts((info, mut limits, backend): (DeviceInfo, Limits, Box<dyn Backend>), options: &OpenOptions) -> Device {
        limits.binding_bytes = limits.binding_bytes.min(options.binding_bytes.unwrap_or(u64::MAX));
        limits.buffer_bytes = limits.buffer_bytes.min(options.buffer_bytes.unwrap_or(u64::MAX));
        limits.groups_per_dimension = limits.groups_per_dimension.min(options.groups_per_dimension.unwrap_or(u32::MAX)).max(1);
        limits.memory_bytes = limits.memory_bytes.min(options.memory_bytes.unwrap_or(u64::MAX));
        limits.work_per_launch = limits.work_per_launch.min(options.work_per_launch.unwrap_or(u64::MAX)).max(1);
        limits.loop_rounds = limits.loop_rounds.min(options.loop_rounds.unwrap_or(u64::MAX)).max(1);
        Device(Arc::new(Inner { info, limits, used: AtomicU64::new(0), backend }))
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// What it offers.
    pub fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// Bytes held by live buffers.
    pub fn used_bytes(&self) -> u64 {
        self.0.used.load(Ordering::Relaxed)
    }

    /// Starts recording.
    pub fn pass(&self, label: &str) -> Pass {
        Pass { device: self.clone(), label: label.into(), commands: Vec::new(), reads: 0, profile: false }
    }

    /// A buffer of reals holding `data`.
    pub fn upload(&self, label: &str, data: &[f32]) -> Result<Buffer> {
        self.alloc(label, Elem::F32, data.len() as u64, Some(Cow::Borrowed(bytemuck::cast_slice(data))))
    }

    /// A buffer of words holding `data`.
    pub fn upload_u32(&self, label: &str, data: &[u32]) -> Result<Buffer> {
        self.alloc(label, Elem::U32, data.len() as u64, Some(Cow::Borrowed(data)))
    }

    /// A buffer of words holding `data`, without a copy where the device is the host.
    pub fn upload_words(&self, label: &str, data: Vec<u32>) -> Result<Buffer> {
        self.alloc(label, Elem::U32, data.len() as u64, Some(Cow::Owned(data)))
    }

    /// A buffer of `len` reals, zero.
    pub fn zeros(&self, label: &str, len: u64) -> Result<Buffer> {
        self.alloc(label, Elem::F32, len, None)
    }

    /// A buffer of `len` words, zero.
    pub fn zeros_u32(&self, label: &str, len: u64) -> Result<Buffer> {
        self.alloc(label, Elem::U32, len, None)
    }

    /// Whether buffers of an element type can be made here: f32 and words everywhere, f16 and bf16 where the device has them.
    /// # Errors
    /// `Parameter` that says what to use instead.
    pub fn supports(&self, elem: Elem) -> Result<()> {
        match self.0.backend.lacks(elem) {
            None => Ok(()),
            Some(help) => Err(Error::Parameter { op: "buffer", name: "storage".into(), value: elem.wgsl().into(), help: help.into() }),
        }
    }

    /// A buffer of this element type holding `data`, rounded to it (to nearest, ties to even).
    /// # Errors
    /// `Parameter` if the device lacks it (see [`Device::supports`]), `Shape` for words.
    pub fn upload_as(&self, label: &str, elem: Elem, data: &[f32]) -> Result<Buffer> {
        match elem {
            Elem::F32 => self.upload(label, data),
            Elem::U32 => Err(Error::Shape { op: "upload", arg: "data".into(), expected: "words: use upload_u32".into(), got: "reals".into() }),
            Elem::F16 | Elem::Bf16 => {
                let words = HostData::F32(data.to_vec()).stored(elem).words();
                self.alloc(label, elem, data.len() as u64, Some(Cow::Owned(words)))
            }
        }
    }

    /// A buffer of `len` elements of this type, zero.
    /// # Errors
    /// `Parameter` if the device lacks it (see [`Device::supports`]).
    pub fn zeros_as(&self, label: &str, elem: Elem, len: u64) -> Result<Buffer> {
        self.alloc(label, elem, len, None)
    }

    /// Overwrites a range with reals, rounded to what the buffer stores, after all passes submitted before.
    /// # Errors
    /// `Shape` for another length or element type.
    pub fn write(&self, to: impl Into<View>, data: &[f32]) -> Result<()> {
        self.write_host(to.into(), HostData::F32(data.to_vec()))
    }

    /// The same from f64: exact on `reference`, rounded elsewhere.
    /// # Errors
    /// As for [`Device::write`].
    pub fn write_f64(&self, to: impl Into<View>, data: &[f64]) -> Result<()> {
        self.write_host(to.into(), HostData::F64(data.to_vec()))
    }

    /// Overwrites a range with words.
    /// # Errors
    /// As for [`Device::write`].
    pub fn write_u32(&self, to: impl Into<View>, data: &[u32]) -> Result<()> {
        self.write_host(to.into(), HostData::U32(data.to_vec()))
    }

    fn write_host(&self, to: View, data: HostData) -> Result<()> {
        self.check_view("write", &to)?;
        let data = data.stored(to.elem());
        if data.len() as u64 != to.len() || data.elem() != to.elem() {
            let got = format!("{} × {}", data.len(), data.elem().wgsl());
            return Err(Error::Shape { op: "write", arg: "data".into(), expected: format!("{} × {}", to.len(), to.elem().wgsl()), got });
        }
        if data.len() == 0 {
            return Ok(());
        }
        if to.is_whole_words(&to) || !self.moves_words() {
            return self.0.backend.write(&to, data);
        }
        let own = self.alloc("written", to.elem(), to.len(), Some(Cow::Owned(data.words())))?;
        let mut pass = self.pass("write");
        pass.copy(&own, &to)?;
        pass.submit().map(|_| ())
    }

    /// Whether copies start and end at words, as on wgpu.
    fn moves_words(&self) -> bool {
        self.0.info.kind == DeviceKind::Wgpu
    }

    /// Alignment of a bound range's start, in elements of a type.
    pub fn align(&self, elem: Elem) -> u64 {
        // One is the host's: anything goes.
        if self.0.limits.align == 1 { 1 } else { self.0.limits.align * 4 / elem.bytes() }
    }

    fn check_view(&self, op: &'static str, view: &View) -> Result<()> {
        if !Arc::ptr_eq(&view.buffer.device().0, &self.0) {
            let got = format!("on another device, {}", view.buffer.device().info());
            return Err(Error::Shape { op, arg: "buffer".into(), expected: format!("on {}", self.info()), got });
        }
        if view.range.start > view.range.end || view.range.end > view.buffer.len() {
            let expected = format!("inside 0..{}", view.buffer.len());
            return Err(Error::Shape { op, arg: "range".into(), expected, got: format!("{:?}", view.range) });
        }
        Ok(())
    }

    fn alloc(&self, label: &str, elem: Elem, len: u64, data: Option<Cow<'_, [u32]>>) -> Result<Buffer> {
        self.supports(elem)?;
        let bytes = len.max(1).saturating_mul(elem.bytes()).checked_next_multiple_of(4).unwrap_or(u64::MAX);
        let help = "use fewer sets, assets or bars at once";
        if bytes > self.0.limits.buffer_bytes {
            return Err(too_large(&format!("buffer '{label}'"), bytes, self.0.limits.buffer_bytes, help));
        }
        let used = self.0.used.fetch_add(bytes, Ordering::Relaxed);
        let charge = Charge { device: self.clone(), bytes };
        if used.saturating_add(bytes) > self.0.limits.memory_bytes {
            return Err(too_large(&format!("buffer '{label}' beside {used} B in use"), bytes, self.0.limits.memory_bytes, help));
        }
        let storage = self.0.backend.alloc(label, elem, len, data)?;
        Ok(Buffer(Arc::new(BufferInner { storage, elem, len, charge })))
    }

    /// Ends the device as a driver reset would: every later call returns [`Error::DeviceLost`]. For testing recovery.
    pub fn lose(&self) {
        self.0.backend.lose();
    }

    /// Refuses a kernel whose loops would take more rounds than the device runs.
    pub fn check_rounds(&self, op: &'static str, rounds: u64, unit: &'static str) -> Result<()> {
        let limit = self.0.limits.loop_rounds;
        if rounds <= limit {
            return Ok(());
        }
        let help = format!("{} leaves longer loops early; shorten the series, or use --device cpu or a GPU", self.0.info.adapter);
        Err(Error::TooLarge { what: format!("{op}: one thread's loop"), needed: rounds, limit, unit, help })
    }

    /// Splits `items` into runs that one launch can take: `elements` is the longest argument's elements per item, `groups` the
    /// workgroups per item, `work` the arithmetic instructions per item. Results never depend on the split.
    /// # Errors
    /// `TooLarge` if not even one item fits.
    pub fn plan(&self, op: &'static str, items: u64, elements: u64, groups: u64, work: u64) -> Result<Vec<Range<u64>>> {
        let limits = &self.0.limits;
        let by_bytes = limits.binding_bytes / (4 * elements.max(1));
        let by_groups = limits.groups() / groups.max(1);
        if by_bytes == 0 {
            return Err(too_large(&format!("{op}: one item"), 4 * elements, limits.binding_bytes, "shorten the series or use another device"));
        }
        if by_groups == 0 {
            return Err(Error::TooLarge {
                what: format!("{op}: one item"),
                needed: groups,
                limit: limits.groups(),
                unit: "workgroups",
                help: "use a device with a larger grid".into(),
            });
        }
        let run = by_bytes.min(by_groups).min((limits.work_per_launch / work.max(1)).max(1));
        Ok((0..items.div_ceil(run)).map(|i| i * run..((i + 1) * run).min(items)).collect())
    }
}

fn too_large(what: &str, needed: u64, limit: u64, help: &str) -> Error {
    Error::TooLarge { what: what.into(), needed, limit, unit: "B", help: help.into() }
}

fn unknown_device(spec: &str) -> Error {
    let distance = |name: &&&str| {
        let (a, b): (Vec<char>, Vec<char>) = (spec.to_lowercase().chars().collect(), name.chars().collect());
        let common = a.iter().filter(|c| b.contains(c)).count();
        (a.len() + b.len()).saturating_sub(2 * common)
    };
    let suggestion = match spec.to_lowercase().as_str() {
        "gpu" | "vulkan" | "metal" | "dx12" | "webgpu" => Some("wgpu".to_string()),
        "nvidia" => Some("cuda".to_string()),
        _ => DEVICE_NAMES.iter().min_by_key(distance).filter(|name| distance(name) <= 3).map(|s| s.to_string()),
    };
    Error::UnknownDevice { given: spec.into(), suggestion }
}

#[cfg(feature = "wgpu")]
fn open_wgpu(index: Option<usize>, options: &OpenOptions) -> Result<Device> {
    Ok(Device::from_parts(wgpu::open(index, options)?, options))
}

#[cfg(feature = "cuda")]
fn open_cuda(index: usize, options: &OpenOptions) -> Result<Device> {
    Ok(Device::from_parts(cuda::open(index)?, options))
}

#[cfg(feature = "cuda-host")]
fn open_cuda_host(options: &OpenOptions) -> Result<Device> {
    Ok(Device::from_parts(cuda_host::open(options)?, options))
}

#[cfg(not(feature = "wgpu"))]
fn open_wgpu(_: Option<usize>, _: &OpenOptions) -> Result<Device> {
    Err(not_built("wgpu"))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_: usize, _: &OpenOptions) -> Result<Device> {
    Err(not_built("cuda"))
}

#[cfg(not(feature = "cuda-host"))]
fn open_cuda_host(_: &OpenOptions) -> Result<Device> {
    Err(not_built("cuda-host"))
}

#[cfg(not(all(feature = "wgpu", feature = "cuda", feature = "cuda-host")))]
fn not_built(device: &'static str) -> Error {
    Error::NoDevice { device, reason: "this build leaves it out".into(), help: format!("build with `--features {device}`") }
}

/// One adapter that a probe found, or why it found none.
#[derive(Debug, Clone, PartialEq)]
pub struct Probe {
    /// What [`Device::open`] takes.
    pub spec: String,
    /// The device and its limits, or why it cannot be opened.
    pub found: Result<(DeviceInfo, Limits)>,
}

/// Probes every device of this machine, opening each in turn.
pub fn probe() -> Vec<Probe> {
    let mut specs = vec!["cpu".to_string(), "reference".into()];
    #[cfg(feature = "wgpu")]
    specs.extend((0..wgpu::count().max(1)).map(|i| if i == 0 { "wgpu".into() } else { format!("wgpu:{i}") }));
    #[cfg(not(feature = "wgpu"))]
    specs.push("wgpu".into());
    #[cfg(feature = "cuda")]
    specs.extend((0..cuda::count().max(1)).map(|i| if i == 0 { "cuda".into() } else { format!("cuda:{i}") }));
    #[cfg(not(feature = "cuda"))]
    specs.push("cuda".into());
    specs.push("cuda-host".into());
    let open = |spec: &String| Device::open(spec).map(|d| (d.info().clone(), d.limits().clone()));
    specs.iter().map(|spec| Probe { spec: spec.clone(), found: open(spec) }).collect()
}

/// Gives the bytes back when the buffer is dropped.
struct Charge {
    device: Device,
    bytes: u64,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.device.0.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

struct BufferInner {
    storage: Box<dyn Any + Send + Sync>,
    elem: Elem,
    len: u64,
    charge: Charge,
}

/// A device buffer. Cloning is cheap and shares it; it is freed with its last clone.
#[derive(Clone)]
pub struct Buffer(Arc<BufferInner>);

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({:?} × {})", self.0.elem, self.0.len)
    }
}

impl Buffer {
    /// Number of elements.
    #[allow(clippy::len_without_is_empty, reason = "a buffer's length is its shape; emptiness is not a question that callers ask")]
    pub fn len(&self) -> u64 {
        self.0.len
    }

    /// Element type.
    pub fn elem(&self) -> Elem {
        self.0.elem
    }

    /// The device that it lives on.
    pub fn device(&self) -> &Device {
        &self.0.charge.device
    }

    /// Elements `range` of the buffer.
    pub fn view(&self, range: Range<u64>) -> View {
        View { buffer: self.clone(), range }
    }

    fn is(&self, other: &Buffer) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// A range of a buffer.
#[derive(Debug, Clone)]
pub struct View {
    pub(crate) buffer: Buffer,
    pub(crate) range: Range<u64>,
}

impl View {
    /// Number of elements.
    #[allow(clippy::len_without_is_empty, reason = "as for Buffer")]
    pub fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// The device that it lives on.
    pub fn device(&self) -> &Device {
        self.buffer.device()
    }

    /// Element type.
    pub fn elem(&self) -> Elem {
        self.buffer.elem()
    }

    /// Elements of the view, counted from its first; cut where the view ends.
    pub fn part(&self, range: Range<u64>) -> View {
        let at = |i: u64| self.range.start + i.min(self.len());
        View { buffer: self.buffer.clone(), range: at(range.start)..at(range.end) }
    }

    /// Bytes of the view on a GPU.
    pub(crate) fn bytes(&self) -> u64 {
        self.buffer.elem().bytes() * self.len()
    }

    /// Whether a copy into it from a range like `from` can go by words: halves start at even ones and end there, or where the buffer ends.
    fn is_whole_words(&self, from: &View) -> bool {
        !self.elem().is_half()
            || (self.range.start.is_multiple_of(2)
                && from.range.start.is_multiple_of(2)
                && (self.len().is_multiple_of(2) || self.range.end == self.buffer.len()))
    }

    fn overlaps(&self, other: &View) -> bool {
        self.range.start.max(other.range.start) < self.range.end.min(other.range.end)
    }

    /// Whether the other is the same range of the same buffer.
    pub fn is(&self, other: &View) -> bool {
        self.buffer.is(&other.buffer) && self.range == other.range
    }

    /// The same, not cut: a range beyond the buffer is found by the check of whatever records it.
    fn at(&self, range: Range<u64>) -> View {
        View { buffer: self.buffer.clone(), range: self.range.start + range.start..self.range.start + range.end }
    }

    #[cfg_attr(not(feature = "wgpu"), allow(dead_code, reason = "every backend reads it"))]
    pub(crate) fn storage<T: 'static>(&self) -> Result<&T> {
        self.buffer.0.storage.downcast_ref().ok_or_else(|| Error::Internal("a buffer of another device".into()))
    }
}

impl From<&Buffer> for View {
    fn from(buffer: &Buffer) -> View {
        buffer.view(0..buffer.len())
    }
}

impl From<&View> for View {
    fn from(view: &View) -> View {
        view.clone()
    }
}

/// One recorded launch.
pub(crate) struct Launch {
    pub(crate) kernel: &'static Kernel,
    pub(crate) params: Vec<u32>,
    #[cfg_attr(not(any(feature = "wgpu", feature = "cuda", feature = "cuda-host")), allow(dead_code, reason = "the CPU column brings its own threads"))]
    pub(crate) grid: [u32; 3],
    pub(crate) args: Vec<View>,
}

pub(crate) enum Command {
    Launch(Launch),
    Copy { from: View, to: View },
    Read(View),
}

/// A pass as a backend sees it.
pub(crate) struct Recorded<'a> {
    #[cfg_attr(not(feature = "wgpu"), allow(dead_code, reason = "only labels GPU work"))]
    pub(crate) label: &'a str,
    pub(crate) commands: &'a [Command],
    pub(crate) profile: bool,
    #[cfg_attr(not(any(feature = "wgpu", feature = "cuda")), allow(dead_code, reason = "the CPU column prepares nothing"))]
    pub(crate) prepared: Option<&'a Prepared>,
}

/// Time of one launch of a profiled pass.
#[derive(Debug, Clone, PartialEq)]
pub struct LaunchTime {
    /// Kernel name.
    pub kernel: &'static str,
    /// Seconds on the device; NaN where it has no timer.
    pub seconds: f64,
    /// Bytes moved, by the kernel's cost.
    pub bytes: f64,
    /// Arithmetic instructions, by the kernel's cost.
    pub flops: f64,
}

impl LaunchTime {
    pub(crate) fn of(launch: &Launch, seconds: f64) -> LaunchTime {
        let cost = launch.kernel.cost;
        let units = (cost.units)(&launch.params) as f64;
        LaunchTime { kernel: launch.kernel.name, seconds, bytes: cost.bytes * units, flops: cost.flops * units }
    }
}

/// A promise of values, redeemed after [`Pass::submit`].
#[derive(Debug, Clone, Copy)]
pub struct Read(usize);

/// A run of a chunked output: bind [`Output::view`], then hand it to [`Pass::finish`].
pub struct Output {
    /// What to bind.
    pub view: View,
    target: Option<View>,
}

/// Launches, recorded and submitted once.
pub struct Pass {
    device: Device,
    label: String,
    commands: Vec<Command>,
    reads: usize,
    profile: bool,
}

impl Pass {
    /// The device that this pass runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Times every launch; [`Done::profile`] has the result.
    pub fn profile(&mut self) -> &mut Pass {
        self.profile = true;
        self
    }

    /// Number of launches recorded so far.
    pub fn launches(&self) -> usize {
        self.commands.iter().filter(|c| matches!(c, Command::Launch(_))).count()
    }

    /// Names of the kernels launched so far, in order.
    pub fn kernels(&self) -> Vec<&'static str> {
        self.commands.iter().filter_map(|c| if let Command::Launch(l) = c { Some(l.kernel.name) } else { None }).collect()
    }

    /// Records a launch of `kernel`.
    /// # Errors
    /// `Unsupported` if the kernel lacks this device's column; `Shape` if the arguments are not those of the list; `TooLarge` if a
    /// range or the grid passes the device's limits.
    pub fn launch<P: Params>(&mut self, kernel: &'static Kernel, params: &P, args: &[View]) -> Result<()> {
        let device = self.device.info().kind;
        let has_column = match device {
            DeviceKind::Reference | DeviceKind::Cpu => kernel.cpu.is_some(),
            DeviceKind::Wgpu => kernel.wgsl.is_some(),
            DeviceKind::Cuda | DeviceKind::CudaHost => kernel.cuda.is_some(),
        };
        if !has_column {
            return Err(Error::Unsupported { kernel: kernel.name, device: device.name() });
        }
        if P::NAME != kernel.params.name {
            return Err(shape(kernel, "params", kernel.params.name, P::NAME));
        }
        if args.len() != kernel.args.len() {
            return Err(shape(kernel, "arguments", &kernel.args.len().to_string(), &args.len().to_string()));
        }
        for (i, (arg, view)) in kernel.args.iter().zip(args).enumerate() {
            self.check_arg(kernel, arg.name, arg.elem, view)?;
            let writes = |j: usize| kernel.args[j].access == Access::Write;
            let clash = |j: &usize| args[*j].buffer.is(&view.buffer) && (writes(i) != writes(*j) || writes(i) && args[*j].overlaps(view));
            if let Some(j) = (0..i).find(clash) {
                let got = format!("what argument '{}' of the launch uses", kernel.args[j].name);
                return Err(shape(kernel, arg.name, "a buffer of its own, or a range that only this argument writes", &got));
            }
        }
        let params: Vec<u32> = bytemuck::cast_slice(bytemuck::bytes_of(params)).to_vec();
        let groups = (kernel.groups)(&params);
        if groups > self.device.limits().groups() {
            return Err(Error::TooLarge {
                what: format!("a launch of {}", kernel.name),
                needed: groups,
                limit: self.device.limits().groups(),
                unit: "workgroups",
                help: "split the batch with Device::plan".into(),
            });
        }
        if groups > 0 {
            let grid = self.device.limits().fold(groups);
            self.commands.push(Command::Launch(Launch { kernel, params, grid, args: args.to_vec() }));
        }
        Ok(())
    }

    fn check_arg(&self, kernel: &Kernel, name: &str, elem: Elem, view: &View) -> Result<()> {
        let limits = self.device.limits();
        self.device.check_view(kernel.name, view)?;
        if view.buffer.elem() != elem {
            return Err(shape(kernel, name, elem.wgsl(), view.buffer.elem().wgsl()));
        }
        if view.bytes() > limits.binding_bytes {
            let what = format!("{}: argument '{name}'", kernel.name);
            return Err(too_large(&what, view.bytes(), limits.binding_bytes, "split the batch with Device::plan"));
        }
        let align = self.device.align(elem);
        if !view.range.start.is_multiple_of(align) {
            return Err(shape(kernel, name, &format!("a range that starts at a multiple of {align}"), &format!("{}", view.range.start)));
        }
        Ok(())
    }

    /// Records a copy between two ranges of equal length and type.
    pub fn copy(&mut self, from: impl Into<View>, to: impl Into<View>) -> Result<()> {
        let (from, to) = (from.into(), to.into());
        self.device.check_view("copy", &from)?;
        self.device.check_view("copy", &to)?;
        if from.len() != to.len() || from.buffer.elem() != to.buffer.elem() || from.buffer.is(&to.buffer) {
            return Err(Error::Shape { op: "copy", arg: "to".into(), expected: format!("{from:?}, another buffer"), got: format!("{to:?}") });
        }
        if !to.is_whole_words(&from) && self.device.moves_words() {
            return cast::copy(self, &from, &to);
        }
        if from.len() > 0 {
            self.commands.push(Command::Copy { from, to });
        }
        Ok(())
    }

    /// A range to bind for reading: the range itself where its start is aligned, else an aligned copy.
    pub fn input(&mut self, of: impl Into<View>, range: Range<u64>) -> Result<View> {
        let view = of.into().at(range);
        if view.range.start.is_multiple_of(self.device.align(view.elem())) {
            return Ok(view);
        }
        let own = self.device.alloc("aligned input", view.buffer.elem(), view.len(), None)?;
        self.copy(&view, &own)?;
        Ok(View::from(&own))
    }

    /// A range to bind for writing; hand the result to [`Pass::finish`] after the launch.
    pub fn output(&mut self, of: impl Into<View>, range: Range<u64>) -> Result<Output> {
        let view = of.into().at(range);
        if view.range.start.is_multiple_of(self.device.align(view.elem())) {
            return Ok(Output { view, target: None });
        }
        let own = self.device.alloc("aligned output", view.buffer.elem(), view.len(), None)?;
        Ok(Output { view: View::from(&own), target: Some(view) })
    }

    /// As [`Pass::output`], for a kernel that writes only parts of the range.
    pub fn update(&mut self, of: impl Into<View>, range: Range<u64>) -> Result<Output> {
        let output = self.output(of, range)?;
        if let Some(target) = &output.target {
            self.copy(target, &output.view)?;
        }
        Ok(output)
    }

    /// Copies an output back where it was not written in place.
    pub fn finish(&mut self, output: Output) -> Result<()> {
        match output.target {
            Some(target) => self.copy(&output.view, target),
            None => Ok(()),
        }
    }

    /// Records a download of a whole buffer or a range, with the values that it has at this point of the pass.
    pub fn read(&mut self, what: impl Into<View>) -> Result<Read> {
        let view = what.into();
        self.device.check_view("read", &view)?;
        self.commands.push(Command::Read(view));
        self.reads += 1;
        Ok(Read(self.reads - 1))
    }

    /// Runs everything recorded, waits, and returns the downloads.
    /// # Errors
    /// `Compile` with file and line, `OutOfMemory`, `DeviceLost`, `Driver`.
    pub fn submit(self) -> Result<Done> {
        self.run(None)
    }

    /// Makes ready what runs of this pass can share, so that the host has next to nothing to do for each.
    /// # Errors
    /// As for [`Pass::submit`].
    pub fn prepare(self) -> Result<Replay> {
        let prepared = self.device.0.backend.prepare(&self.recorded(None))?;
        Ok(Replay { pass: self, prepared })
    }

    fn recorded<'a>(&'a self, prepared: Option<&'a Prepared>) -> Recorded<'a> {
        Recorded { label: &self.label, commands: &self.commands, profile: self.profile, prepared }
    }

    fn run(&self, prepared: Option<&Prepared>) -> Result<Done> {
        let (values, profile) = self.device.0.backend.run(self.recorded(prepared))?;
        Ok(Done { values: values.into_iter().map(Some).collect(), profile })
    }
}

/// A pass to run many times: the same kernels, params and buffers; what the buffers hold may change in between. A CUDA graph, bind groups and
/// room for the reads on wgpu, which arguments share a buffer on the CPU, the recorded list elsewhere.
pub struct Replay {
    pass: Pass,
    prepared: Prepared,
}

impl Replay {
    /// Runs everything, waits, and returns the downloads; reads are those that the pass recorded.
    /// # Errors
    /// As for [`Pass::submit`].
    pub fn run(&self) -> Result<Done> {
        self.pass.run(Some(&self.prepared))
    }

    /// Does what the host does for a run, short of the kernels (CPU) or of handing the commands to the driver (wgpu): the clock around it
    /// shows what a run costs besides. Nothing on CUDA, where a run is a launch of the graph.
    /// # Errors
    /// As for [`Pass::submit`].
    pub fn rehearse(&self) -> Result<()> {
        self.pass.device.0.backend.rehearse(&self.pass.recorded(Some(&self.prepared)))
    }

    /// Number of launches in a run.
    pub fn launches(&self) -> usize {
        self.pass.launches()
    }

    /// Names of the kernels that a run launches, in order.
    pub fn kernels(&self) -> Vec<&'static str> {
        self.pass.kernels()
    }
}

fn shape(kernel: &Kernel, arg: &str, expected: &str, got: &str) -> Error {
    Error::Shape { op: kernel.name, arg: arg.into(), expected: expected.into(), got: got.into() }
}

/// The downloads of a finished pass.
pub struct Done {
    values: Vec<Option<HostData>>,
    profile: Vec<LaunchTime>,
}

impl Done {
    /// Times of the launches, in order; empty unless [`Pass::profile`] was called.
    pub fn profile(&self) -> &[LaunchTime] {
        &self.profile
    }

    fn take(&mut self, read: Read) -> Result<HostData> {
        self.values.get_mut(read.0).and_then(Option::take).ok_or_else(|| Error::Internal("a read was redeemed twice or in another pass".into()))
    }

    /// Reals as f32 (`reference` rounds).
    pub fn f32(&mut self, read: Read) -> Result<Vec<f32>> {
        match self.take(read)? {
            HostData::F32(x) => Ok(x),
            HostData::F64(x) => Ok(x.into_iter().map(|v| v as f32).collect()),
            HostData::F16(x) => Ok(half::widened(Elem::F16, &x)),
            HostData::Bf16(x) => Ok(half::widened(Elem::Bf16, &x)),
            HostData::U32(_) => Err(Error::Internal("words were read as reals".into())),
        }
    }

    /// Reals as f64 (exact on every device).
    pub fn f64(&mut self, read: Read) -> Result<Vec<f64>> {
        match self.take(read)? {
            HostData::F32(x) => Ok(x.into_iter().map(f64::from).collect()),
            HostData::F64(x) => Ok(x),
            HostData::F16(x) => Ok(half::widened(Elem::F16, &x)),
            HostData::Bf16(x) => Ok(half::widened(Elem::Bf16, &x)),
            HostData::U32(_) => Err(Error::Internal("words were read as reals".into())),
        }
    }

    /// Words.
    pub fn u32(&mut self, read: Read) -> Result<Vec<u32>> {
        match self.take(read)? {
            HostData::U32(x) => Ok(x),
            _ => Err(Error::Internal("reals were read as words".into())),
        }
    }
}
