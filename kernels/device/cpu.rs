//! `cpu` and `reference`: the CPU column in f32 and in f64. Kernels bring their own threads (rayon); here is only the bookkeeping.
//! A replay knows beforehand which arguments share a buffer: locking and binding take 0.12 µs a launch, 1.9 µs for the 16 of a small training
//! step (`forback bench replay`). Both hold f16 and bf16 as they are stored, and compute with what is widened from them.

use super::{Backend, Command, DeviceInfo, DeviceKind, HostData, Launch, LaunchTime, Limits, Prepared, Recorded, View};
use crate::kernel::{Access, Cpu, CpuArg, CpuLaunch, Elem};
use crate::real::Real;
use crate::{Error, Result, half};
use std::any::Any;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;

struct CpuBackend {
    reference: bool,
    /// One pass at a time: launches hold several buffers, and two passes could wait for each other's.
    running: Mutex<()>,
    lost: AtomicBool,
}

type Storage = RwLock<HostData>;

pub(super) fn open(reference: bool) -> (DeviceInfo, Limits, Box<dyn Backend>) {
    let kind = if reference { DeviceKind::Reference } else { DeviceKind::Cpu };
    let threads = rayon::current_num_threads();
    let real = if reference { "f64" } else { "f32" };
    let adapter = format!("{}, {threads} thread{}, {real}", std::env::consts::ARCH, if threads == 1 { "" } else { "s" });
    let info = DeviceInfo { kind, adapter, driver: String::new(), software: false };
    let limits = Limits {
        binding_bytes: u64::MAX,
        buffer_bytes: u64::MAX,
        groups_per_dimension: u32::MAX,
        memory_bytes: u64::MAX,
        align: 1,
        work_per_launch: u64::MAX,
        loop_rounds: u64::MAX,
    };
    (info, limits, Box::new(CpuBackend { reference, running: Mutex::new(()), lost: AtomicBool::new(false) }))
}

impl CpuBackend {
    fn check(&self) -> Result<()> {
        if self.lost.load(Ordering::Relaxed) {
            return Err(Error::DeviceLost { device: "cpu".into(), reason: "it was closed".into() });
        }
        Ok(())
    }
}

impl Backend for CpuBackend {
    fn alloc(&self, label: &str, elem: Elem, len: u64, data: Option<Cow<'_, [u32]>>) -> Result<Box<dyn Any + Send + Sync>> {
        self.check()?;
        let len = usize::try_from(len).map_err(|_| out_of_memory(label))?;
        let data = match (elem, self.reference, data) {
            (Elem::U32, _, Some(x)) => HostData::U32(x.into_owned()),
            (Elem::U32, _, None) => HostData::U32(zeros(len, label)?),
            (Elem::F32, false, Some(x)) => HostData::F32(bytemuck::cast_slice(&x).to_vec()),
            (Elem::F32, false, None) => HostData::F32(zeros(len, label)?),
            (Elem::F32, true, Some(x)) => HostData::F64(x.iter().map(|&v| f64::from(f32::from_bits(v))).collect()),
            (Elem::F32, true, None) => HostData::F64(zeros(len, label)?),
            (Elem::F16 | Elem::Bf16, _, Some(x)) => HostData::of_words(elem, x.into_owned(), len),
            (Elem::F16, _, None) => HostData::F16(zeros(len, label)?),
            (Elem::Bf16, _, None) => HostData::Bf16(zeros(len, label)?),
        };
        Ok(Box::new(RwLock::new(data)))
    }

    fn write(&self, to: &View, data: HostData) -> Result<()> {
        self.check()?;
        let data = match (data, self.reference) {
            (HostData::F32(x), true) => HostData::F64(x.into_iter().map(f64::from).collect()),
            (HostData::F64(x), false) => HostData::F32(x.into_iter().map(|v| v as f32).collect()),
            (same, _) => same,
        };
        paste(&mut *write_lock(to)?, to, &data)
    }

    fn prepare(&self, recorded: &Recorded<'_>) -> Result<Prepared> {
        Ok(Box::new(shared_of(recorded)) as Prepared)
    }

    fn run(&self, recorded: Recorded<'_>) -> Result<(Vec<HostData>, Vec<LaunchTime>)> {
        self.check()?;
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut reads, mut times) = (Vec::new(), Vec::new());
        let (mut own, mut prepared) = (None, prepared_of(&recorded).map(|shared| shared.iter()));
        for command in recorded.commands {
            match command {
                Command::Launch(launch) => {
                    let start = recorded.profile.then(Instant::now);
                    let shared = match prepared.as_mut().and_then(Iterator::next) {
                        Some(shared) => shared,
                        None => own.insert(Shared::of(launch)),
                    };
                    match (launch.kernel.cpu, self.reference) {
                        (Some(Cpu { f64, .. }), true) => run_launch::<f64>(launch, shared, f64)?,
                        (Some(Cpu { f32, .. }), false) => run_launch::<f32>(launch, shared, f32)?,
                        (None, _) => return Err(Error::Unsupported { kernel: launch.kernel.name, device: "cpu" }),
                    }
                    if let Some(start) = start {
                        times.push(LaunchTime::of(launch, start.elapsed().as_secs_f64()));
                    }
                }
                Command::Copy { from, to } => {
                    let values = slice(&*read_lock(from)?, from);
                    paste(&mut *write_lock(to)?, to, &values)?;
                }
                Command::Read(view) => reads.push(slice(&*read_lock(view)?, view)),
            }
        }
        Ok((reads, times))
    }

    fn rehearse(&self, recorded: &Recorded<'_>) -> Result<()> {
        self.check()?;
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let launches = recorded.commands.iter().filter_map(|c| if let Command::Launch(l) = c { Some(l) } else { None });
        for (launch, shared) in launches.zip(prepared_of(recorded).into_iter().flatten()) {
            if self.reference {
                run_launch::<f64>(launch, shared, |_| Ok(()))?;
            } else {
                run_launch::<f32>(launch, shared, |_| Ok(()))?;
            }
        }
        Ok(())
    }

    fn lose(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }
}

fn out_of_memory(label: &str) -> Error {
    Error::OutOfMemory { device: "cpu".into(), doing: format!("allocating '{label}'") }
}

fn zeros<T: bytemuck::Zeroable + Clone>(len: usize, label: &str) -> Result<Vec<T>> {
    let mut probe: Vec<T> = Vec::new();
    probe.try_reserve_exact(len).map_err(|_| out_of_memory(label))?;
    drop(probe);
    Ok(vec![T::zeroed(); len])
}

fn read_lock(view: &View) -> Result<RwLockReadGuard<'_, HostData>> {
    Ok(view.storage::<Storage>()?.read().unwrap_or_else(PoisonError::into_inner))
}

fn write_lock(view: &View) -> Result<RwLockWriteGuard<'_, HostData>> {
    Ok(view.storage::<Storage>()?.write().unwrap_or_else(PoisonError::into_inner))
}

fn range(view: &View) -> Range<usize> {
    view.range.start as usize..view.range.end as usize
}

fn slice(data: &HostData, view: &View) -> HostData {
    match data {
        HostData::F32(x) => HostData::F32(x[range(view)].to_vec()),
        HostData::F64(x) => HostData::F64(x[range(view)].to_vec()),
        HostData::U32(x) => HostData::U32(x[range(view)].to_vec()),
        HostData::F16(x) => HostData::F16(x[range(view)].to_vec()),
        HostData::Bf16(x) => HostData::Bf16(x[range(view)].to_vec()),
    }
}

fn paste(data: &mut HostData, view: &View, values: &HostData) -> Result<()> {
    match (data, values) {
        (HostData::F32(x), HostData::F32(y)) => x[range(view)].copy_from_slice(y),
        (HostData::F64(x), HostData::F64(y)) => x[range(view)].copy_from_slice(y),
        (HostData::U32(x), HostData::U32(y)) => x[range(view)].copy_from_slice(y),
        (HostData::F16(x), HostData::F16(y)) | (HostData::Bf16(x), HostData::Bf16(y)) => x[range(view)].copy_from_slice(y),
        _ => return Err(Error::Internal("a copy between element types".into())),
    }
    Ok(())
}

/// The slices of one element type inside [`HostData`].
trait Stored: Real {
    fn get(data: &HostData) -> Option<&[Self]>;
    fn get_mut(data: &mut HostData) -> Option<&mut [Self]>;
}

macro_rules! stored {
    ($ty:ty, $variant:ident) => {
        impl Stored for $ty {
            fn get(data: &HostData) -> Option<&[Self]> {
                if let HostData::$variant(x) = data { Some(x) } else { None }
            }
            fn get_mut(data: &mut HostData) -> Option<&mut [Self]> {
                if let HostData::$variant(x) = data { Some(x) } else { None }
            }
        }
    };
}
stored!(f32, F32);
stored!(f64, F64);

enum Guard<'a> {
    Read(RwLockReadGuard<'a, HostData>),
    Write(RwLockWriteGuard<'a, HostData>),
}

/// Ranges of one slice, ascending and apart, each to write.
fn apart<T>(mut rest: &mut [T], ranges: impl Iterator<Item = Range<usize>>) -> impl Iterator<Item = &mut [T]> {
    let mut at = 0;
    ranges.map(move |r| {
        let (_, tail) = std::mem::take(&mut rest).split_at_mut(r.start - at);
        let (part, tail) = tail.split_at_mut(r.len());
        (rest, at) = (tail, r.end);
        part
    })
}

/// What runs of a launch share: its buffers, each once, with the arguments that bind ranges of it in ascending order.
struct Shared {
    buffers: Vec<(Access, Vec<usize>)>,
    /// Whether an argument is stored in 16 bits.
    halves: bool,
}

impl Shared {
    fn of(launch: &Launch) -> Shared {
        let mut order: Vec<usize> = (0..launch.args.len()).collect();
        order.sort_by_key(|&i| (launch.args[i].range.start, launch.args[i].range.end));
        let mut buffers: Vec<(Access, Vec<usize>)> = Vec::with_capacity(order.len());
        for i in order {
            match buffers.iter_mut().find(|(_, those)| launch.args[those[0]].buffer.is(&launch.args[i].buffer)) {
                Some((_, those)) => those.push(i),
                None => buffers.push((launch.kernel.args[i].access, vec![i])),
            }
        }
        Shared { buffers, halves: launch.kernel.stored().is_half() }
    }
}

/// Of all launches of a pass.
fn shared_of(recorded: &Recorded<'_>) -> Vec<Shared> {
    recorded.commands.iter().filter_map(|c| if let Command::Launch(l) = c { Some(Shared::of(l)) } else { None }).collect()
}

fn prepared_of<'a>(recorded: &Recorded<'a>) -> Option<&'a Vec<Shared>> {
    recorded.prepared.and_then(|p| p.downcast_ref())
}

fn run_launch<R: Stored>(launch: &Launch, shared: &Shared, entry: fn(CpuLaunch<'_, R>) -> Result<()>) -> Result<()> {
    let mut bound: Vec<(Guard<'_>, &[usize])> = Vec::with_capacity(shared.buffers.len());
    for (access, those) in &shared.buffers {
        let view = &launch.args[those[0]];
        let guard = if *access == Access::Read { Guard::Read(read_lock(view)?) } else { Guard::Write(write_lock(view)?) };
        bound.push((guard, those));
    }
    let wrong = || Error::Internal(format!("{}: an argument of another element type", launch.kernel.name));
    // Arguments stored in 16 bits are widened for the launch, and the written ones rounded after it.
    let mut wide: Vec<Vec<R>> = (0..if shared.halves { launch.args.len() } else { 0 }).map(|_| Vec::new()).collect();
    let mut halves: Vec<(usize, Elem, &mut [u16])> = Vec::new();
    let mut args: Vec<Option<CpuArg<'_, R>>> = (0..launch.args.len()).map(|_| None).collect();
    for (guard, those) in &mut bound {
        let ranges = those.iter().map(|&i| range(&launch.args[i]));
        match guard {
            Guard::Read(g) => {
                for (&i, r) in those.iter().zip(ranges) {
                    match &**g {
                        HostData::U32(x) => args[i] = Some(CpuArg::Word(&x[r])),
                        HostData::F16(x) => wide[i] = half::widened(Elem::F16, &x[r]),
                        HostData::Bf16(x) => wide[i] = half::widened(Elem::Bf16, &x[r]),
                        other => args[i] = Some(CpuArg::Real(&R::get(other).ok_or_else(wrong)?[r])),
                    }
                }
            }
            Guard::Write(g) => match &mut **g {
                HostData::U32(x) => those.iter().zip(apart(x, ranges)).for_each(|(&i, part)| args[i] = Some(CpuArg::WordMut(part))),
                HostData::F16(x) => halves.extend(those.iter().zip(apart(x, ranges)).map(|(&i, part)| (i, Elem::F16, part))),
                HostData::Bf16(x) => halves.extend(those.iter().zip(apart(x, ranges)).map(|(&i, part)| (i, Elem::Bf16, part))),
                other => {
                    let x = R::get_mut(other).ok_or_else(wrong)?;
                    those.iter().zip(apart(x, ranges)).for_each(|(&i, part)| args[i] = Some(CpuArg::RealMut(part)));
                }
            },
        }
    }
    for (i, elem, part) in &halves {
        wide[*i] = half::widened(*elem, part);
    }
    for ((slot, wide), arg) in args.iter_mut().zip(&mut wide).zip(launch.kernel.args) {
        if slot.is_none() {
            *slot = Some(if arg.access == Access::Write { CpuArg::RealMut(wide) } else { CpuArg::Real(wide) });
        }
    }
    let args: Vec<CpuArg<'_, R>> = args.into_iter().flatten().collect();
    entry(CpuLaunch { kernel: launch.kernel.name, params: &launch.params, args: args.into_iter() })?;
    for (i, elem, part) in halves {
        half::narrowed(elem, &wide[i], part);
    }
    Ok(())
}
