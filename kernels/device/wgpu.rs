//! `wgpu`: the WGSL column on Vulkan, Metal or DX12.
//!
//! One encoder, one submit and one wait per pass. Bind groups bind the params at 0 and the arguments from 1 on, in the kernel's
//! order. A replay keeps its pipelines, bind groups and the buffers that its reads land in; what is left is to encode, which wgpu asks for
//! anew each time: 22 µs for the 16 launches of a small training step, of them 0.3 here, 14 in wgpu's checks and barriers, 8 in the Vulkan
//! driver (`forback bench replay`). Release shaders run without the compiler's bounds and loop checks; `FORBACK_CHECKED=1` keeps them.

use super::{Backend, Command, DeviceInfo, DeviceKind, HostData, Launch, LaunchTime, Limits, OpenOptions, Prepared, Recorded, View};
use crate::kernel::{Access, Elem, Kernel};
use crate::{Error, Result};
use pollster::block_on;
use std::any::Any;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use wgpu::{BufferUsages, ErrorFilter, Features};

struct WgpuBackend {
    name: String,
    device: wgpu::Device,
    queue: wgpu::Queue,
    timestamps: bool,
    half: bool,
    checked: bool,
    uniform_align: u64,
    pipelines: Mutex<HashMap<usize, Arc<Pipeline>>>,
    lost: Arc<Mutex<Option<String>>>,
    uncaptured: Arc<Mutex<Option<String>>>,
}

struct Pipeline {
    layout: wgpu::BindGroupLayout,
    pipeline: wgpu::ComputePipeline,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn adapters() -> Vec<wgpu::Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
    descriptor.backends &= wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    let instance = wgpu::Instance::new(descriptor);
    let mut adapters = block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    adapters.retain(|a| a.get_downlevel_capabilities().flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS));
    adapters.sort_by_key(|a| match a.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    adapters
}

/// Number of adapters, software ones included.
pub(super) fn count() -> usize {
    adapters().len()
}

fn no_device(reason: String) -> Error {
    let help = "install a Vulkan driver (Debian: apt-get install mesa-vulkan-drivers libvulkan1), or use --device cpu".into();
    Error::NoDevice { device: "wgpu", reason, help }
}

/// Opens the n-th adapter, hardware first; `None` is the best one.
pub(super) fn open(index: Option<usize>, options: &OpenOptions) -> Result<(DeviceInfo, Limits, Box<dyn Backend>)> {
    let adapters = adapters();
    let count = adapters.len();
    let adapter = adapters.into_iter().nth(index.unwrap_or(0)).ok_or_else(|| {
        no_device(match count {
            0 => "no Vulkan, Metal or DX12 adapter was found".into(),
            1 => "there is one adapter, wgpu:0".into(),
            _ => format!("there are {count} adapters, wgpu:0 to wgpu:{}", count - 1),
        })
    })?;
    let (adapter_info, adapter_limits) = (adapter.get_info(), adapter.limits());
    let timestamps = adapter.features().contains(Features::TIMESTAMP_QUERY);
    let half = adapter.features().contains(Features::SHADER_F16);
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("forback"),
        required_features: adapter.features() & (Features::TIMESTAMP_QUERY | Features::SHADER_F16),
        required_limits: adapter_limits.clone(),
        ..Default::default()
    };
    let (device, queue) = block_on(adapter.request_device(&descriptor)).map_err(|e| no_device(e.to_string()))?;

    let lost = Arc::new(Mutex::new(None));
    let uncaptured = Arc::new(Mutex::new(None));
    let (lost_in, uncaptured_in) = (lost.clone(), uncaptured.clone());
    device.set_device_lost_callback(move |reason, message| *lock(&lost_in) = Some(format!("{reason:?}: {message}").trim_end_matches(": ").to_string()));
    device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| *lock(&uncaptured_in) = Some(error.to_string())));

    let software = adapter_info.device_type == wgpu::DeviceType::Cpu;
    let info = DeviceInfo {
        kind: DeviceKind::Wgpu,
        adapter: adapter_info.name.clone(),
        driver: format!("{:?} {} {}", adapter_info.backend, adapter_info.driver, adapter_info.driver_info).trim().to_string(),
        software,
    };
    let limits = Limits {
        binding_bytes: adapter_limits.max_storage_buffer_binding_size.min(adapter_limits.max_buffer_size),
        buffer_bytes: adapter_limits.max_buffer_size,
        groups_per_dimension: adapter_limits.max_compute_workgroups_per_dimension,
        memory_bytes: u64::MAX,
        align: u64::from(adapter_limits.min_storage_buffer_offset_alignment).div_ceil(4).max(1),
        loop_rounds: if adapter_info.name.starts_with("llvmpipe") { 65_000 } else { u64::MAX },
        work_per_launch: if software { u64::MAX } else { 200_000_000_000 },
    };
    let backend = WgpuBackend {
        name: adapter_info.name,
        device,
        queue,
        timestamps,
        half,
        checked: options.checked.unwrap_or_else(|| std::env::var_os("FORBACK_CHECKED").is_some_and(|v| v == "1")),
        uniform_align: u64::from(adapter_limits.min_uniform_buffer_offset_alignment).max(16),
        pipelines: Mutex::new(HashMap::new()),
        lost,
        uncaptured,
    };
    Ok((info, limits, Box::new(backend)))
}

impl WgpuBackend {
    /// Runs `f` with every kind of wgpu error caught and typed.
    fn scoped<T>(&self, doing: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
        self.check_lost()?;
        let memory = self.device.push_error_scope(ErrorFilter::OutOfMemory);
        let internal = self.device.push_error_scope(ErrorFilter::Internal);
        let validation = self.device.push_error_scope(ErrorFilter::Validation);
        let result = f();
        let (validation, internal, memory) = (block_on(validation.pop()), block_on(internal.pop()), block_on(memory.pop()));
        self.check_lost()?;
        if memory.is_some() {
            return Err(Error::OutOfMemory { device: self.name.clone(), doing: doing.into() });
        }
        let value = result?;
        match validation.or(internal).map(|e| e.to_string()).or_else(|| lock(&self.uncaptured).take()) {
            Some(message) => Err(Error::Driver { device: self.name.clone(), message: format!("{doing}: {message}") }),
            None => Ok(value),
        }
    }

    fn check_lost(&self) -> Result<()> {
        match &*lock(&self.lost) {
            Some(reason) => Err(Error::DeviceLost { device: self.name.clone(), reason: reason.clone() }),
            None => Ok(()),
        }
    }

    fn buffer(&self, label: &str, bytes: u64, usage: BufferUsages) -> wgpu::Buffer {
        self.device.create_buffer(&wgpu::BufferDescriptor { label: Some(label), size: bytes, usage, mapped_at_creation: false })
    }

    fn pipeline(&self, kernel: &'static Kernel) -> Result<Arc<Pipeline>> {
        let key = std::ptr::from_ref(kernel) as usize;
        if let Some(pipeline) = lock(&self.pipelines).get(&key) {
            return Ok(pipeline.clone());
        }
        let pipeline = Arc::new(self.compile(kernel)?);
        lock(&self.pipelines).insert(key, pipeline.clone());
        Ok(pipeline)
    }

    fn compile(&self, kernel: &'static Kernel) -> Result<Pipeline> {
        let unit = kernel.wgsl_unit().ok_or(Error::Unsupported { kernel: kernel.name, device: "wgpu" })?;
        let source = wgpu::ShaderSource::Wgsl(unit.into());
        let descriptor = wgpu::ShaderModuleDescriptor { label: Some(kernel.name), source };
        let scope = self.device.push_error_scope(ErrorFilter::Validation);
        let module = if self.checked {
            self.device.create_shader_module(descriptor)
        } else {
            // SAFETY: every kernel guards its own tails and loops; the test suite runs them with the checks on as well.
            unsafe { self.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        };
        if let Some(error) = block_on(scope.pop()) {
            let info = block_on(module.get_compilation_info());
            let first = info.messages.into_iter().next();
            let line = first.as_ref().and_then(|m| m.location).map_or(0, |l| l.line_number);
            let (file, line) = kernel.wgsl_line(line);
            return Err(Error::Compile { kernel: kernel.name, file: file.into(), line, message: first.map_or_else(|| error.to_string(), |m| m.message) });
        }
        let entry = |binding: u32, ty: wgpu::BufferBindingType| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        };
        let storage = |(i, arg): (usize, &crate::kernel::Arg)| entry(1 + i as u32, wgpu::BufferBindingType::Storage { read_only: arg.access == Access::Read });
        let entries: Vec<_> = [entry(0, wgpu::BufferBindingType::Uniform)].into_iter().chain(kernel.args.iter().enumerate().map(storage)).collect();
        self.scoped(&format!("making the pipeline of {}", kernel.name), || {
            let layout = self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(kernel.name), entries: &entries });
            let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: Some(kernel.name),
                bind_group_layouts: &[Some(&layout)],
                immediate_size: 0,
            });
            let constants: Vec<(&str, f64)> =
                [("WG", kernel.workgroup)].iter().chain(kernel.constants).map(|&(name, value)| (name, f64::from(value))).collect();
            let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(kernel.name),
                layout: Some(&pipeline_layout),
                module: &module,
                entry_point: Some(kernel.entry()),
                compilation_options: wgpu::PipelineCompilationOptions { constants: &constants, zero_initialize_workgroup_memory: self.checked },
                cache: None,
            });
            Ok(Pipeline { layout, pipeline })
        })
    }

    /// Pipelines and bind groups of the launches.
    fn bound(&self, recorded: &Recorded<'_>) -> Result<Vec<Bound>> {
        let launches: Vec<&Launch> = recorded.commands.iter().filter_map(|c| if let Command::Launch(l) = c { Some(l) } else { None }).collect();
        let pipelines: Vec<Arc<Pipeline>> = launches.iter().map(|l| self.pipeline(l.kernel)).collect::<Result<_>>()?;
        let (params, offsets) = self.params(&launches);
        let bind = |((launch, pipeline), at): ((&&Launch, Arc<Pipeline>), (u64, u64))| {
            let group = self.bind(launch, &pipeline, &params, at)?;
            Ok(Bound { pipeline, group })
        };
        launches.iter().zip(pipelines).zip(offsets).map(bind).collect()
    }

    /// Buffers that the reads land in, in order.
    fn staging(&self, recorded: &Recorded<'_>) -> Vec<wgpu::Buffer> {
        let make = |view: &View| {
            let (start, end) = words_of(view);
            self.buffer("read", (end - start).max(4), BufferUsages::MAP_READ | BufferUsages::COPY_DST)
        };
        reads(recorded).map(make).collect()
    }

    fn encode(&self, recorded: &Recorded<'_>, launches: &[Bound], staging: &[wgpu::Buffer]) -> Result<Encoded> {
        let queries = (recorded.profile && self.timestamps && !launches.is_empty()).then(|| {
            let count = 2 * launches.len().min(MAX_TIMED) as u32;
            let set = self.device.create_query_set(&wgpu::QuerySetDescriptor { label: None, ty: wgpu::QueryType::Timestamp, count });
            (set, count)
        });
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some(recorded.label) });
        let mut targets = staging.iter();
        let mut next = 0;
        let mut commands = recorded.commands.iter().peekable();
        while let Some(command) = commands.next() {
            match command {
                Command::Copy { from, to } => {
                    let (source, target) = (from.storage::<wgpu::Buffer>()?, to.storage::<wgpu::Buffer>()?);
                    let bytes = from.elem().bytes();
                    encoder.copy_buffer_to_buffer(source, bytes * from.range.start, target, bytes * to.range.start, from.bytes().next_multiple_of(4));
                }
                Command::Read(view) => {
                    let (start, end) = words_of(view);
                    if let Some(target) = targets.next().filter(|_| view.len() > 0) {
                        encoder.copy_buffer_to_buffer(view.storage::<wgpu::Buffer>()?, start, target, 0, end - start);
                    }
                }
                Command::Launch(first) => {
                    // Launches in a row share a compute pass, unless each is timed.
                    let timed = queries.as_ref().filter(|_| next < MAX_TIMED).map(|(set, _)| wgpu::ComputePassTimestampWrites {
                        query_set: set,
                        beginning_of_pass_write_index: Some(2 * next as u32),
                        end_of_pass_write_index: Some(2 * next as u32 + 1),
                    });
                    let alone = timed.is_some();
                    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some(recorded.label), timestamp_writes: timed });
                    let (mut launch, mut set) = (Some(first), None);
                    while let Some(l) = launch {
                        let Bound { pipeline, group } = &launches[next];
                        let kernel = std::ptr::from_ref(l.kernel);
                        if set.replace(kernel) != Some(kernel) {
                            pass.set_pipeline(&pipeline.pipeline);
                        }
                        pass.set_bind_group(0, group, &[]);
                        pass.dispatch_workgroups(l.grid[0], l.grid[1], l.grid[2]);
                        next += 1;
                        launch = match commands.peek() {
                            Some(Command::Launch(_)) if !alone => commands.next().and_then(|c| if let Command::Launch(l) = c { Some(l) } else { None }),
                            _ => None,
                        };
                    }
                }
            }
        }
        let times = queries.map(|(set, count)| {
            let bytes = 8 * u64::from(count);
            let resolve = self.buffer("timestamps", bytes, BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC);
            let target = self.buffer("read timestamps", bytes, BufferUsages::MAP_READ | BufferUsages::COPY_DST);
            encoder.resolve_query_set(&set, 0..count, &resolve, 0);
            encoder.copy_buffer_to_buffer(&resolve, 0, &target, 0, bytes);
            target
        });
        Ok(Encoded { commands: encoder.finish(), times })
    }

    /// All params of a pass in one uniform buffer, each at its own aligned offset.
    fn params(&self, launches: &[&Launch]) -> (wgpu::Buffer, Vec<(u64, u64)>) {
        let mut bytes: Vec<u8> = Vec::new();
        let mut offsets = Vec::with_capacity(launches.len());
        for launch in launches {
            let size = (4 * launch.params.len() as u64).next_multiple_of(16);
            offsets.push((bytes.len() as u64, size));
            bytes.extend_from_slice(bytemuck::cast_slice(&launch.params));
            bytes.resize(bytes.len().next_multiple_of(16).next_multiple_of(self.uniform_align as usize), 0);
        }
        bytes.resize(bytes.len().max(16), 0);
        let buffer = self.buffer("params", bytes.len() as u64, BufferUsages::UNIFORM | BufferUsages::COPY_DST);
        self.queue.write_buffer(&buffer, 0, &bytes);
        (buffer, offsets)
    }

    fn bind(&self, launch: &Launch, pipeline: &Pipeline, params: &wgpu::Buffer, (offset, size): (u64, u64)) -> Result<wgpu::BindGroup> {
        let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: binding(params, offset, size) }];
        for (i, view) in launch.args.iter().enumerate() {
            let size = view.bytes().next_multiple_of(4).max(LEAST);
            let resource = binding(view.storage::<wgpu::Buffer>()?, view.elem().bytes() * view.range.start, size);
            entries.push(wgpu::BindGroupEntry { binding: 1 + i as u32, resource });
        }
        let descriptor = wgpu::BindGroupDescriptor { label: Some(launch.kernel.name), layout: &pipeline.layout, entries: &entries };
        Ok(self.device.create_bind_group(&descriptor))
    }

    fn wait(&self) -> Result<()> {
        let waited = self.device.poll(wgpu::PollType::wait_indefinitely());
        self.check_lost()?;
        waited.map(|_| ()).map_err(|e| Error::Driver { device: self.name.clone(), message: e.to_string() })
    }

    fn mapped(&self, buffer: &wgpu::Buffer) -> Result<Vec<u32>> {
        let view = buffer.slice(..).get_mapped_range().map_err(|e| Error::Driver { device: self.name.clone(), message: e.to_string() })?;
        Ok(bytemuck::pod_collect_to_vec(&view[..]))
    }
}

/// Bytes of the least binding, and what buffers are padded to: one `vec4<f32>`, the largest element that shaders declare.
const LEAST: u64 = 16;
/// Timed launches per pass: a query set holds 4,096 entries at least.
const MAX_TIMED: usize = 2048;

/// A launch with its pipeline and what it binds.
struct Bound {
    pipeline: Arc<Pipeline>,
    group: wgpu::BindGroup,
}

/// What runs of a pass share. A run takes the buffers for its reads and gives them back; one beside it makes its own.
struct Shared {
    launches: Vec<Bound>,
    staging: Mutex<Option<Vec<wgpu::Buffer>>>,
}

fn reads<'a>(recorded: &Recorded<'a>) -> impl Iterator<Item = &'a View> + use<'a> {
    recorded.commands.iter().filter_map(|c| if let Command::Read(view) = c { Some(view) } else { None })
}

/// First byte of a view and one past its last, in whole words: an odd half before the range comes along.
fn words_of(view: &View) -> (u64, u64) {
    let start = (view.elem().bytes() * view.range.start) & !3;
    (start, start + (view.elem().bytes() * view.range.end - start).next_multiple_of(4))
}

struct Encoded {
    commands: wgpu::CommandBuffer,
    times: Option<wgpu::Buffer>,
}

fn binding(buffer: &wgpu::Buffer, offset: u64, size: u64) -> wgpu::BindingResource<'_> {
    wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size: std::num::NonZeroU64::new(size) })
}

impl Backend for WgpuBackend {
    fn alloc(&self, label: &str, elem: Elem, len: u64, data: Option<Cow<'_, [u32]>>) -> Result<Box<dyn Any + Send + Sync>> {
        self.scoped(&format!("allocating '{label}'"), || {
            let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
            let buffer = self.buffer(label, (elem.bytes() * len.max(1)).next_multiple_of(LEAST), usage);
            if let Some(data) = data.filter(|d| !d.is_empty()) {
                self.queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&data));
            }
            Ok(Box::new(buffer) as Box<dyn Any + Send + Sync>)
        })
    }

    fn write(&self, to: &View, data: HostData) -> Result<()> {
        self.scoped("writing a buffer", || {
            self.queue.write_buffer(to.storage::<wgpu::Buffer>()?, to.elem().bytes() * to.range.start, bytemuck::cast_slice(&data.words()));
            Ok(())
        })
    }

    fn prepare(&self, recorded: &Recorded<'_>) -> Result<Prepared> {
        let share = || Ok(Shared { launches: self.bound(recorded)?, staging: Mutex::new(Some(self.staging(recorded))) });
        self.scoped("preparing a pass", || Ok(Box::new(share()?) as Prepared))
    }

    fn run(&self, recorded: Recorded<'_>) -> Result<(Vec<HostData>, Vec<LaunchTime>)> {
        let shared = recorded.prepared.and_then(|p| p.downcast_ref::<Shared>());
        let (staging, times) = self.scoped("running a pass", || {
            let staging = shared.and_then(|s| lock(&s.staging).take()).unwrap_or_else(|| self.staging(&recorded));
            let Encoded { commands, times } = match shared {
                Some(shared) => self.encode(&recorded, &shared.launches, &staging)?,
                None => self.encode(&recorded, &self.bound(&recorded)?, &staging)?,
            };
            self.queue.submit([commands]);
            for buffer in staging.iter().chain(&times) {
                buffer.slice(..).map_async(wgpu::MapMode::Read, |_| {});
            }
            self.wait()?;
            Ok((staging, times))
        })?;
        let mut values = Vec::with_capacity(staging.len());
        for (buffer, view) in staging.iter().zip(reads(&recorded)) {
            let mut words = self.mapped(buffer)?;
            if view.len() == 0 {
                words.clear();
            } else if view.elem().is_half() && !view.range.start.is_multiple_of(2) {
                let next = words.iter().skip(1).copied().chain([0]).collect::<Vec<_>>();
                words.iter_mut().zip(next).for_each(|(word, next)| *word = *word >> 16 | next << 16);
            }
            values.push(HostData::of_words(view.elem(), words, view.len() as usize));
        }
        if let Some(shared) = shared {
            staging.iter().for_each(wgpu::Buffer::unmap);
            *lock(&shared.staging) = Some(staging);
        }
        let launches = recorded.commands.iter().filter_map(|c| if let Command::Launch(l) = c { Some(l) } else { None });
        let seconds: Vec<f64> = match &times {
            Some(buffer) => {
                let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&self.mapped(buffer)?);
                let period = f64::from(self.queue.get_timestamp_period()) * 1e-9;
                ticks.chunks_exact(2).map(|t| t[1].saturating_sub(t[0]) as f64 * period).collect()
            }
            None => Vec::new(),
        };
        let profile = recorded.profile.then(|| launches.enumerate().map(|(i, l)| LaunchTime::of(l, seconds.get(i).copied().unwrap_or(f64::NAN))).collect());
        Ok((values, profile.unwrap_or_default()))
    }

    fn rehearse(&self, recorded: &Recorded<'_>) -> Result<()> {
        let Some(shared) = recorded.prepared.and_then(|p| p.downcast_ref::<Shared>()) else { return Ok(()) };
        self.scoped("rehearsing a pass", || {
            let staging = lock(&shared.staging).take().unwrap_or_else(|| self.staging(recorded));
            self.encode(recorded, &shared.launches, &staging)?;
            *lock(&shared.staging) = Some(staging);
            Ok(())
        })
    }

    fn lacks(&self, elem: Elem) -> Option<&'static str> {
        match elem {
            Elem::Bf16 => Some("WGSL has no bf16: use f16 or f32, or another device"),
            Elem::F16 if !self.half => Some("the adapter has no SHADER_F16: use f32, or another device"),
            _ => None,
        }
    }

    fn lose(&self) {
        self.device.destroy();
        let _ = self.device.poll(wgpu::PollType::Poll);
        lock(&self.lost).get_or_insert_with(|| "destroyed".into());
    }
}

impl Drop for WgpuBackend {
    fn drop(&mut self) {
        // Frees what dropped buffers left behind; an error here has nobody to tell.
        let _ = self.device.poll(wgpu::PollType::Poll);
    }
}
