//! A kernel as a value: one device entry point with its three columns, its arguments, its params and its cost.
//!
//! Everything that must be equal in Rust, WGSL and CUDA is written down once, here or in the kernel's home, and pinned: naga
//! reflection checks the WGSL side without a device (`tests/layout.rs`), `static_assert`s appended to the unit check the CUDA side.

use crate::{Error, Result};
use bytemuck::Pod;

/// Element type of a buffer. Reals are f32 on every device but `reference`, which holds f64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Elem {
    /// A real number.
    F32,
    /// A 32-bit word: counts, indices, bit patterns, limbs of wide integers.
    U32,
    /// A real number stored as IEEE 754 binary16, on every device; kernels compute in f32, `reference` in f64.
    F16,
    /// A real number stored as bfloat16; likewise.
    Bf16,
}

impl Elem {
    /// The type's name in WGSL (which lacks bf16), and in messages.
    pub fn wgsl(self) -> &'static str {
        match self {
            Elem::F32 => "f32",
            Elem::U32 => "u32",
            Elem::F16 => "f16",
            Elem::Bf16 => "bf16",
        }
    }

    /// The type's name in CUDA.
    pub fn cuda(self) -> &'static str {
        match self {
            Elem::F32 => "float",
            Elem::U32 => "uint32_t",
            Elem::F16 => "Half",
            Elem::Bf16 => "Bfloat",
        }
    }

    /// Bytes of an element on a GPU.
    pub const fn bytes(self) -> u64 {
        if self.is_half() { 2 } else { 4 }
    }

    /// Whether it is a real of 16 bits.
    pub const fn is_half(self) -> bool {
        matches!(self, Elem::F16 | Elem::Bf16)
    }

    /// Half a unit in the last place, relative: the largest error of rounding a normal number to it. 0 for words.
    pub const fn roundoff(self) -> f64 {
        match self {
            Elem::F32 => 1.0 / 16_777_216.0,
            Elem::U32 => 0.0,
            Elem::F16 => 1.0 / 2048.0,
            Elem::Bf16 => 1.0 / 256.0,
        }
    }
}

/// What a kernel does with an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Only read.
    Read,
    /// Written, and possibly read again.
    Write,
}

/// One storage argument of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arg {
    /// Name, the same in Rust, WGSL and CUDA.
    pub name: &'static str,
    /// Element type.
    pub elem: Elem,
    /// Read, or written.
    pub access: Access,
}

/// A read-only argument of reals.
pub const fn reads(name: &'static str) -> Arg {
    Arg { name, elem: Elem::F32, access: Access::Read }
}

/// A read-only argument of words.
pub const fn reads_u32(name: &'static str) -> Arg {
    Arg { name, elem: Elem::U32, access: Access::Read }
}

/// A written argument of reals.
pub const fn writes(name: &'static str) -> Arg {
    Arg { name, elem: Elem::F32, access: Access::Write }
}

/// A written argument of words.
pub const fn writes_u32(name: &'static str) -> Arg {
    Arg { name, elem: Elem::U32, access: Access::Write }
}

/// A read-only argument of this element type.
pub const fn reads_as(name: &'static str, elem: Elem) -> Arg {
    Arg { name, elem, access: Access::Read }
}

/// A written argument of this element type.
pub const fn writes_as(name: &'static str, elem: Elem) -> Arg {
    Arg { name, elem, access: Access::Write }
}

/// The arguments of a kernel with its reals in another storage, all but those named. `N` is their number.
pub const fn stored_args<const N: usize>(args: &[Arg], elem: Elem, but: &[&str]) -> [Arg; N] {
    assert!(args.len() == N, "as many arguments as the kernel has");
    let mut out = [Arg { name: "", elem, access: Access::Read }; N];
    let mut i = 0;
    while i < N {
        out[i] = args[i];
        if matches!(args[i].elem, Elem::F32) && !is_one_of(args[i].name, but) {
            out[i].elem = elem;
        }
        i += 1;
    }
    out
}

const fn is_one_of(name: &str, names: &[&str]) -> bool {
    let mut i = 0;
    while i < names.len() {
        if is_same(name.as_bytes(), names[i].as_bytes()) {
            return true;
        }
        i += 1;
    }
    false
}

const fn is_same(a: &[u8], b: &[u8]) -> bool {
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

/// Kernels with arguments in f16 and in bf16, of one in f32: `(names of arguments that stay f32); F16 "name_f16", BF16 "name_bf16" = F32[arguments];`.
#[macro_export]
macro_rules! stored_kernels {
    ($but:expr; $($f16:ident $f16_name:literal, $bf16:ident $bf16_name:literal = $base:ident[$count:literal];)*) => {$(
        #[doc = concat!("`", $f16_name, "`: arguments in f16.")]
        pub static $f16: $crate::Kernel = $crate::Kernel {
            name: $f16_name,
            args: &$crate::kernel::stored_args::<$count>($base.args, $crate::kernel::Elem::F16, $but),
            ..$base
        };
        #[doc = concat!("`", $bf16_name, "`: arguments in bf16.")]
        pub static $bf16: $crate::Kernel = $crate::Kernel {
            name: $bf16_name,
            args: &$crate::kernel::stored_args::<$count>($base.args, $crate::kernel::Elem::Bf16, $but),
            wgsl: None,
            ..$base
        };
    )*};
}

/// The kernel of a list that is `kernel` with its arguments in this storage; itself for f32.
pub(crate) fn in_storage(list: &[&'static Kernel], kernel: &'static Kernel, stored: Elem) -> crate::Result<&'static Kernel> {
    if !stored.is_half() {
        return Ok(kernel);
    }
    let found = list.iter().copied().find(|half| half.stored() == stored && half.entry() == kernel.name);
    found.ok_or_else(|| Error::Internal(format!("{} has no version in {}", kernel.name, stored.wgsl())))
}

/// Type of a params field; all are four bytes wide, so that the three languages agree on every offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// `u32` / `u32` / `uint32_t`.
    U32,
    /// `i32` / `i32` / `int32_t`.
    I32,
    /// `f32` / `f32` / `float`.
    F32,
}

impl Field {
    /// The type's name in CUDA.
    pub fn cuda(self) -> &'static str {
        match self {
            Field::U32 => "uint32_t",
            Field::I32 => "int32_t",
            Field::F32 => "float",
        }
    }
}

/// Rust type of a params field.
pub trait FieldType {
    /// The field type as a value.
    const FIELD: Field;
}
impl FieldType for u32 {
    const FIELD: Field = Field::U32;
}
impl FieldType for i32 {
    const FIELD: Field = Field::I32;
}
impl FieldType for f32 {
    const FIELD: Field = Field::F32;
}

/// The params struct of a kernel: plain four-byte scalars in declaration order.
pub trait Params: Pod {
    /// Name of the struct in all three languages.
    const NAME: &'static str;
    /// Fields in order; field i lies at byte 4·i.
    const FIELDS: &'static [(&'static str, Field)];
}

/// Declares a params struct: `params! { /// docs  pub struct FooParams { n: u32, scale: f32 } }`.
#[macro_export]
macro_rules! params {
    ($(#[$doc:meta])* pub struct $name:ident { $($(#[$fdoc:meta])* $field:ident : $ty:ty),* $(,)? }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
        pub struct $name { $($(#[$fdoc])* pub $field: $ty),* }

        impl $crate::kernel::Params for $name {
            const NAME: &'static str = stringify!($name);
            const FIELDS: &'static [(&'static str, $crate::kernel::Field)] =
                &[$((stringify!($field), <$ty as $crate::kernel::FieldType>::FIELD)),*];
        }
    };
}

/// Name and fields of a params struct, as a value.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Name of the struct.
    pub name: &'static str,
    /// Fields in order; field i lies at byte 4·i.
    pub fields: &'static [(&'static str, Field)],
}

/// The layout of `P`.
pub const fn layout<P: Params>() -> Layout {
    Layout { name: P::NAME, fields: P::FIELDS }
}

/// Reads a params struct back from the words of a launch. `None` if the length is not that of `P`.
pub fn params_of<P: Params>(words: &[u32]) -> Option<P> {
    bytemuck::try_pod_read_unaligned(bytemuck::cast_slice(words)).ok()
}

/// A source file that is part of the binary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Path from the root of the project.
    pub file: &'static str,
    /// Content.
    pub text: &'static str,
}

/// Includes `shaders/<stem>.wgsl`.
#[macro_export]
macro_rules! wgsl {
    ($stem:literal) => {
        Some($crate::kernel::Source { file: concat!("shaders/", $stem, ".wgsl"), text: include_str!(concat!("../shaders/", $stem, ".wgsl")) })
    };
}

/// Includes `cuda/<stem>.cu`.
#[macro_export]
macro_rules! cuda {
    ($stem:literal) => {
        Some($crate::kernel::Source { file: concat!("cuda/", $stem, ".cu"), text: include_str!(concat!("../cuda/", $stem, ".cu")) })
    };
}

/// Helpers that every WGSL unit may use; appended to the kernel's own text.
pub const COMMON_WGSL: Source = Source { file: "shaders/common.wgsl", text: include_str!("../shaders/common.wgsl") };
/// Helpers that every CUDA unit may use; placed before the kernel's own text.
pub const COMMON_CUDA: Source = Source { file: "cuda/common.cuh", text: include_str!("../cuda/common.cuh") };

/// What WGSL units with f16 storage use besides; appended after the common helpers.
pub const HALF_WGSL: Source = Source { file: "shaders/half.wgsl", text: include_str!("../shaders/half.wgsl") };
/// What CUDA units with 16-bit storage use besides; placed after the common helpers.
pub const HALF_CUDA: Source = Source { file: "cuda/half.cuh", text: include_str!("../cuda/half.cuh") };

/// The path generator (kernels/paths.rs): appended to WGSL units of kernels whose constants name `MODEL`.
pub const PATHS_WGSL: Source = Source { file: "shaders/paths_generator.wgsl", text: include_str!("../shaders/paths_generator.wgsl") };
/// The path generator: placed before the text of CUDA units of kernels whose constants name `MODEL`.
pub const PATHS_CUDA: Source = Source { file: "cuda/paths.cuh", text: include_str!("../cuda/paths.cuh") };

/// What one launch moves and computes, as a constant per unit of work.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// The unit: `row`, `set-bar`, …
    pub unit: &'static str,
    /// Units in a launch with these params.
    pub units: fn(&[u32]) -> u64,
    /// Bytes read and written per unit, at least.
    pub bytes: f64,
    /// Arithmetic instructions per unit.
    pub flops: f64,
}

/// One argument of a CPU launch.
pub enum CpuArg<'a, R> {
    /// Reals, read.
    Real(&'a [R]),
    /// Reals, written.
    RealMut(&'a mut [R]),
    /// Words, read.
    Word(&'a [u32]),
    /// Words, written.
    WordMut(&'a mut [u32]),
}

/// A launch as the CPU column sees it: params and arguments, taken in the order of [`Kernel::args`].
pub struct CpuLaunch<'a, R> {
    pub(crate) kernel: &'static str,
    pub(crate) params: &'a [u32],
    pub(crate) args: std::vec::IntoIter<CpuArg<'a, R>>,
}

impl<'a, R> CpuLaunch<'a, R> {
    /// The launch's params.
    pub fn params<P: Params>(&self) -> Result<P> {
        params_of(self.params).ok_or_else(|| Error::Internal(format!("{}: params are not {}", self.kernel, P::NAME)))
    }

    /// The next argument, reals to read.
    pub fn real(&mut self) -> Result<&'a [R]> {
        match self.args.next() {
            Some(CpuArg::Real(x)) => Ok(x),
            _ => Err(self.mismatch()),
        }
    }

    /// The next argument, reals to write.
    pub fn real_mut(&mut self) -> Result<&'a mut [R]> {
        match self.args.next() {
            Some(CpuArg::RealMut(x)) => Ok(x),
            _ => Err(self.mismatch()),
        }
    }

    /// The next argument, words to read.
    pub fn word(&mut self) -> Result<&'a [u32]> {
        match self.args.next() {
            Some(CpuArg::Word(x)) => Ok(x),
            _ => Err(self.mismatch()),
        }
    }

    /// The next argument, words to write.
    pub fn word_mut(&mut self) -> Result<&'a mut [u32]> {
        match self.args.next() {
            Some(CpuArg::WordMut(x)) => Ok(x),
            _ => Err(self.mismatch()),
        }
    }

    fn mismatch(&self) -> Error {
        Error::Internal(format!("{}: the CPU column takes its arguments in another order than the list", self.kernel))
    }
}

/// The CPU column: the same generic function in f32 (what runs without a GPU) and in f64 (the reference).
#[derive(Clone, Copy)]
pub struct Cpu {
    /// In f32; may be a lane-wise version, checked against the plain one.
    pub f32: fn(CpuLaunch<'_, f32>) -> Result<()>,
    /// In f64: the truth that every device is compared with.
    pub f64: fn(CpuLaunch<'_, f64>) -> Result<()>,
}

/// One device entry point. Add one by writing its three files and its line in [`crate::KERNELS`].
#[derive(Clone, Copy)]
pub struct Kernel {
    /// Entry name, the same in Rust, WGSL and CUDA.
    pub name: &'static str,
    /// One line on what it computes.
    pub about: &'static str,
    /// Storage arguments, in order.
    pub args: &'static [Arg],
    /// Its params.
    pub params: Layout,
    /// Threads per workgroup (one-dimensional); `WG` in both shader languages.
    pub workgroup: u32,
    /// Tile constants: `override` in WGSL, `#define` in CUDA.
    pub constants: &'static [(&'static str, u32)],
    /// Workgroups of a launch with these params; folded into three dimensions by the device.
    pub groups: fn(&[u32]) -> u64,
    /// WGSL column.
    pub wgsl: Option<Source>,
    /// CUDA column.
    pub cuda: Option<Source>,
    /// CPU column.
    pub cpu: Option<Cpu>,
    /// What a launch moves and computes.
    pub cost: Cost,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kernel({})", self.name)
    }
}

impl Kernel {
    /// Element type of the reals that the source calls `Stored`: that of the arguments in 16 bits where there are any, else f32.
    pub fn stored(&self) -> Elem {
        self.args.iter().map(|arg| arg.elem).find(|elem| elem.is_half()).unwrap_or(Elem::F32)
    }

    /// Whether it simulates paths of the market model that its constant `MODEL` names, its name ending in the model's.
    pub fn simulates(&self) -> bool {
        self.constants.iter().any(|(name, _)| *name == "MODEL")
    }

    /// Name of the entry in WGSL and CUDA: the kernel's without its storage or its market model, so that one text serves them all.
    pub fn entry(&self) -> &'static str {
        if self.simulates() {
            let name = self.name.strip_suffix("_futures").unwrap_or(self.name);
            return name.rsplit_once('_').map_or(name, |(entry, _)| entry);
        }
        match self.stored() {
            Elem::F16 => self.name.strip_suffix("_f16").unwrap_or(self.name),
            Elem::Bf16 => self.name.strip_suffix("_bf16").unwrap_or(self.name),
            _ => self.name,
        }
    }

    /// The whole WGSL unit: the kernel's file, then the common helpers (declarations may come in any order, so line numbers of the
    /// kernel's file stay true). What arguments are stored in, `Stored`, and `stored(x)`, which rounds to it, are defined beside it.
    pub fn wgsl_unit(&self) -> Option<String> {
        self.wgsl.map(|Source { text, .. }| {
            let common = COMMON_WGSL.text;
            match self.stored() {
                Elem::F32 if self.simulates() => format!("{text}\n{common}\n{}", PATHS_WGSL.text),
                Elem::F32 if !text.contains("Stored") => format!("{text}\n{common}"),
                Elem::F32 => format!("alias Stored = f32; fn stored(x: f32) -> f32 {{ return x; }} {text}\n{common}"),
                _ => format!("enable f16; alias Stored = f16; {text}\n{common}\n{}", HALF_WGSL.text),
            }
        })
    }

    /// The whole CUDA unit: constants, common helpers, the kernel's file, and `static_assert`s that pin the params struct.
    pub fn cuda_unit(&self) -> Option<String> {
        let (source, stored) = (self.cuda?, self.stored());
        let mut unit = format!("#define WG {}\n", self.workgroup);
        for (name, value) in self.constants {
            unit += &format!("#define {name} {value}\n");
        }
        if stored.is_half() {
            unit += "#define STORED_16\n";
        }
        unit += &format!("#line 1 \"{}\"\n{}\n", COMMON_CUDA.file, COMMON_CUDA.text);
        if stored.is_half() {
            unit += &format!("typedef struct {0} Stored;\n#line 1 \"{1}\"\n{2}\n", stored.cuda(), HALF_CUDA.file, HALF_CUDA.text);
        } else if source.text.contains("Stored") {
            unit += "typedef float Stored;\n";
        }
        if self.simulates() {
            unit += &format!("#line 1 \"{}\"\n{}\n", PATHS_CUDA.file, PATHS_CUDA.text);
        }
        unit += &format!("#line 1 \"{}\"\n{}\n", source.file, source.text);
        unit += &format!("#line 1 \"layout of {}\"\n", self.params.name);
        // NVRTC 12 has no offsetof: field i of the struct is the one that the i-th value initialises.
        let params = self.params.name;
        let values: Vec<String> = (0..self.params.fields.len()).map(|i| i.to_string()).collect();
        let numbered = format!("{params}{{{}}}", values.join(", "));
        unit += &format!("static_assert(sizeof({params}) == {}, \"{params}\");\n", 4 * values.len());
        for (i, (field, ty)) in self.params.fields.iter().enumerate() {
            let same_type = format!("SameType<decltype({params}::{field}), {}>::value", ty.cuda());
            unit += &format!("static_assert({same_type} && {numbered}.{field} == {i}, \"{params}::{field}\");\n");
        }
        Some(unit)
    }

    /// File and line of a line of the WGSL unit.
    pub fn wgsl_line(&self, line: u32) -> (&'static str, u32) {
        let mut rest = line;
        for source in self.wgsl.into_iter().chain([COMMON_WGSL]) {
            let own = source.text.lines().count() as u32 + u32::from(source.text.ends_with('\n'));
            if rest <= own || source == COMMON_WGSL && !self.stored().is_half() && !self.simulates() {
                return (source.file, rest);
            }
            rest -= own;
        }
        (if self.simulates() { PATHS_WGSL.file } else { HALF_WGSL.file }, rest)
    }
}
