//! The three columns of every kernel against each other, without a device: WGSL by naga's reflection, CUDA by reading its
//! declarations. Also what other drivers need: every WGSL entry point translates to MSL and HLSL.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

use forback::kernels::ceilings::CEILING_MULTIPLY_ADD;
use forback::kernels::kernel::{Access, Arg, Elem, Field, Kernel, Layout, Source, reads, reads_u32, writes};
use forback::kernels::philox::PHILOX;
use forback::kernels::{KERNELS, OPS};
use naga::back::{PipelineConstants, hlsl, msl, pipeline_constants::process_overrides};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, ArraySize, Module, Scalar, ScalarKind, ShaderStage, StorageAccess, TypeInner, VectorSize};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What WebGPU guarantees every adapter to have.
const STORAGE_BUFFERS: usize = 8;
const WORKGROUP_BYTES: u32 = 16 << 10;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Whether a name is the argument's, alone or as whole words of it: `ema_keys` and `keys_in` both say `keys`. Two entries of one
/// WGSL file cannot declare the same name for two bindings.
fn says(name: &str, arg: &str) -> bool {
    let (name, arg): (Vec<&str>, Vec<&str>) = (name.split('_').collect(), arg.split('_').collect());
    name.windows(arg.len()).any(|words| words == arg)
}

// ---- WGSL -------------------------------------------------------------------------------------------------------------

/// Parses and validates a WGSL unit, with no capability beyond those of every adapter, but for f16 where the kernel stores it.
fn parsed(unit: &str) -> Result<(Module, ModuleInfo), String> {
    let module = naga::front::wgsl::parse_str(unit).map_err(|e| e.emit_to_string(unit))?;
    let needed = if unit.starts_with("enable f16;") { Capabilities::SHADER_FLOAT16 } else { Capabilities::empty() };
    let info = Validator::new(ValidationFlags::all(), needed).validate(&module).map_err(|e| e.emit_to_string(unit))?;
    Ok((module, info))
}

fn constants(kernel: &Kernel) -> PipelineConstants {
    let mut constants = PipelineConstants::default();
    for (name, value) in [("WG", kernel.workgroup)].iter().chain(kernel.constants) {
        constants.insert((*name).to_string(), f64::from(*value));
    }
    constants
}

/// Everything in which a kernel's WGSL differs from its value.
fn wgsl_problems(kernel: &Kernel) -> Vec<String> {
    let unit = kernel.wgsl_unit().expect("a WGSL column");
    let (module, info) = match parsed(&unit) {
        Ok(parsed) => parsed,
        Err(message) => return vec![message],
    };
    let mut problems = Vec::new();
    let declared: BTreeSet<&str> = module.overrides.iter().filter_map(|(_, o)| o.name.as_deref()).collect();
    let listed: BTreeSet<&str> = ["WG"].into_iter().chain(kernel.constants.iter().map(|c| c.0)).collect();
    if declared != listed {
        problems.push(format!("overrides are {declared:?}, constants {listed:?}"));
    }
    match module.entry_points.iter().find(|e| e.name == kernel.entry()) {
        Some(entry) if entry.stage == ShaderStage::Compute => {
            if !matches!(entry.workgroup_size_overrides, Some([Some(_), None, None])) {
                problems.push("its workgroup size is not (WG, 1, 1) with the override WG".into());
            }
        }
        _ => return vec![format!("no compute entry '{}'", kernel.entry())],
    }
    let (module, info) = match process_overrides(&module, &info, Some((ShaderStage::Compute, kernel.entry())), &constants(kernel)) {
        Ok(processed) => processed,
        Err(error) => return vec![format!("overrides: {error}")],
    };
    let at = module.entry_points.iter().position(|e| e.name == kernel.entry()).expect("the entry point stays");
    if module.entry_points[at].workgroup_size != [kernel.workgroup, 1, 1] {
        problems.push(format!("workgroup size is {:?}, expected {}", module.entry_points[at].workgroup_size, kernel.workgroup));
    }

    let uses = info.get_entry_point(at);
    let used: Vec<_> = module.global_variables.iter().filter(|(handle, _)| !uses[*handle].is_empty()).map(|(_, v)| v).collect();
    let mut bindings = BTreeSet::new();
    let mut workgroup_bytes = 0;
    for variable in used {
        let (name, ty) = (variable.name.as_deref().unwrap_or("?"), &module.types[variable.ty]);
        if variable.space == AddressSpace::WorkGroup {
            workgroup_bytes += ty.inner.size(module.to_ctx());
            continue;
        }
        let Some(binding) = variable.binding else { continue };
        if binding.group != 0 || !bindings.insert(binding.binding) {
            problems.push(format!("'{name}' is in group {} at binding {}, alone in group 0 expected", binding.group, binding.binding));
        }
        match binding.binding.checked_sub(1) {
            None => problems.extend(params_problems(&module, variable, &kernel.params)),
            Some(i) => match kernel.args.get(i as usize) {
                Some(arg) => problems.extend(arg_problem(&module, variable, arg)),
                None => problems.push(format!("binding {} '{name}' has no argument", binding.binding)),
            },
        }
    }
    let expected: BTreeSet<u32> = (0..=kernel.args.len() as u32).collect();
    if bindings != expected {
        problems.push(format!("bindings used are {bindings:?}, params and arguments are {expected:?}"));
    }
    if kernel.args.len() > STORAGE_BUFFERS {
        problems.push(format!("{} storage buffers, adapters guarantee {STORAGE_BUFFERS}", kernel.args.len()));
    }
    if workgroup_bytes > WORKGROUP_BYTES {
        problems.push(format!("{workgroup_bytes} bytes of workgroup memory, adapters guarantee {WORKGROUP_BYTES}"));
    }
    problems
}

fn params_problems(module: &Module, variable: &naga::GlobalVariable, layout: &Layout) -> Option<String> {
    let ty = &module.types[variable.ty];
    let TypeInner::Struct { members, .. } = &ty.inner else { return Some("binding 0 is not a struct".into()) };
    let scalar = |field| match field {
        Field::U32 => Scalar::U32,
        Field::I32 => Scalar::I32,
        Field::F32 => Scalar::F32,
    };
    let expected: Vec<_> = layout.fields.iter().enumerate().map(|(i, (name, field))| (*name, TypeInner::Scalar(scalar(*field)), 4 * i as u32)).collect();
    let found: Vec<_> = members.iter().map(|m| (m.name.as_deref().unwrap_or("?"), module.types[m.ty].inner.clone(), m.offset)).collect();
    if variable.space != AddressSpace::Uniform || ty.name.as_deref() != Some(layout.name) || found != expected {
        return Some(format!("params are {:?} {:?} {found:?}, expected a uniform {} {expected:?}", variable.space, ty.name, layout.name));
    }
    None
}

fn arg_problem(module: &Module, variable: &naga::GlobalVariable, arg: &Arg) -> Option<String> {
    let name = variable.name.as_deref().unwrap_or("?");
    let kind = match arg.elem {
        Elem::U32 => ScalarKind::Uint,
        _ => ScalarKind::Float,
    };
    let bytes = arg.elem.bytes();
    let element = match &module.types[variable.ty].inner {
        TypeInner::Array { base, size: ArraySize::Dynamic, stride } => match &module.types[*base].inner {
            // four elements in one load
            inner @ TypeInner::Vector { size: VectorSize::Quad, .. } if u64::from(*stride) == 4 * bytes => inner.scalar(),
            inner if u64::from(*stride) == bytes => inner.scalar(),
            _ => None,
        },
        _ => None,
    };
    let access = match arg.access {
        Access::Read => StorageAccess::LOAD,
        Access::Write => StorageAccess::LOAD | StorageAccess::STORE,
    };
    if element != Some(Scalar { kind, width: bytes as u8 }) {
        return Some(format!("'{name}' is not array<{}>", arg.elem.wgsl()));
    }
    if variable.space != (AddressSpace::Storage { access }) {
        return Some(format!("'{name}' is {:?}, the argument is {:?}", variable.space, arg.access));
    }
    (!says(name, arg.name)).then(|| format!("'{name}' stands where the argument is '{}'", arg.name))
}

#[test]
fn wgsl_agrees_with_the_list() {
    let problems: Vec<String> =
        KERNELS.iter().filter(|k| k.wgsl.is_some()).flat_map(|k| wgsl_problems(k).into_iter().map(|p| format!("{}: {p}", k.name))).collect();
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn wgsl_translates_for_metal_and_dx12() {
    for kernel in KERNELS.iter().filter(|k| k.wgsl.is_some()) {
        let (module, info) = parsed(&kernel.wgsl_unit().unwrap()).unwrap();
        let entry = Some((ShaderStage::Compute, kernel.entry()));
        let (module, info) = process_overrides(&module, &info, entry, &constants(kernel)).unwrap();
        let options = msl::Options { lang_version: (2, 0), ..Default::default() };
        let pipeline = msl::PipelineOptions { entry_point: entry.map(|e| (e.0, e.1.into())), ..Default::default() };
        let (text, translated) = msl::write_string(&module, &info, &options, &pipeline).unwrap_or_else(|e| panic!("{}: MSL: {e}", kernel.name));
        assert!(translated.entry_point_names.iter().all(Result::is_ok) && text.contains("kernel void"), "{}: MSL", kernel.name);
        // 16-bit types came with 6.2.
        let models = if kernel.stored() == Elem::F32 { vec![hlsl::ShaderModel::V5_1, hlsl::ShaderModel::V6_0] } else { vec![hlsl::ShaderModel::V6_2] };
        for shader_model in models {
            let options = hlsl::Options { shader_model, ..Default::default() };
            let pipeline = hlsl::PipelineOptions { entry_point: entry.map(|e| (e.0, e.1.into())) };
            let mut text = String::new();
            let translated = hlsl::Writer::new(&mut text, &options, &pipeline).write(&module, &info, None);
            let names = translated.unwrap_or_else(|e| panic!("{}: HLSL: {e}", kernel.name)).entry_point_names;
            assert!(names.iter().all(Result::is_ok) && text.contains("numthreads"), "{}: HLSL", kernel.name);
        }
    }
}

// ---- CUDA -------------------------------------------------------------------------------------------------------------

/// Text without comments.
fn uncommented(text: &str) -> String {
    let mut rest = text;
    let mut out = String::new();
    while let Some(at) = rest.find('/') {
        let (before, tail) = rest.split_at(at);
        out += before;
        rest = if tail.starts_with("//") {
            tail.find('\n').map_or("", |end| &tail[end..])
        } else if tail.starts_with("/*") {
            tail.find("*/").map_or("", |end| &tail[end + 2..])
        } else {
            out.push('/');
            &tail[1..]
        };
    }
    out + rest
}

/// A declaration's words: `const float *__restrict__ x` → ["const", "float", "*", "x"].
fn words(declaration: &str) -> Vec<String> {
    let text = declaration.replace('*', " * ").replace("__restrict__", " ");
    text.split_whitespace().map(str::to_string).collect()
}

/// The parameter list of the `__global__` function `name`.
fn cuda_parameters(text: &str, name: &str) -> Option<Vec<Vec<String>>> {
    let call = format!("{name}(");
    for (at, _) in text.match_indices(&call) {
        let head = &text[text[..at].rfind([';', '}']).map_or(0, |i| i + 1)..at];
        let whole = !text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        if whole && head.contains("__global__") {
            let inside = &text[at + call.len()..];
            return Some(inside[..inside.find(')')?].split(',').map(words).collect());
        }
    }
    None
}

/// Everything in which a kernel's CUDA text differs from its value.
fn cuda_problems(kernel: &Kernel) -> Vec<String> {
    let text = uncommented(kernel.cuda.expect("a CUDA column").text);
    let mut problems = Vec::new();
    let field = |f: &Field| match f {
        Field::U32 => "uint32_t",
        Field::I32 => "int32_t",
        Field::F32 => "float",
    };
    let expected: Vec<Vec<String>> = kernel.params.fields.iter().map(|(name, f)| words(&format!("{} {name}", field(f)))).collect();
    let fields = text.split_once(&format!("struct {} {{", kernel.params.name)).and_then(|(_, rest)| rest.split_once('}')).map(|(inside, _)| {
        let declarations = inside.split(';').map(words).filter(|w| !w.is_empty());
        declarations.collect::<Vec<_>>()
    });
    if fields.as_ref() != Some(&expected) {
        problems.push(format!("struct {} is {fields:?}, expected {expected:?}", kernel.params.name));
    }
    let mut expected: Vec<Vec<String>> =
        kernel.args.iter().map(|arg| words(&format!("{}{}* {}", if arg.access == Access::Read { "const " } else { "" }, arg.elem.cuda(), arg.name))).collect();
    expected.push(words(&format!("{} params", kernel.params.name)));
    let stored = |words: Vec<String>| words.into_iter().map(|word| if word == "Stored" { kernel.stored().cuda().to_string() } else { word }).collect();
    let found = cuda_parameters(&text, kernel.entry()).map(|all| all.into_iter().map(stored).collect::<Vec<Vec<String>>>());
    match found {
        Some(found) if found == expected => {}
        Some(found) => problems.push(format!("parameters are {found:?}, expected {expected:?}")),
        None => problems.push(format!("no __global__ entry '{}'", kernel.entry())),
    }
    problems
}

#[test]
fn cuda_agrees_with_the_list() {
    let mut problems = Vec::new();
    for kernel in KERNELS {
        match kernel.cuda {
            Some(source) if source.text.lines().count() < 3 => eprintln!("skipped {}: {} holds no kernel yet", kernel.name, source.file),
            Some(_) => problems.extend(cuda_problems(kernel).into_iter().map(|p| format!("{}: {p}", kernel.name))),
            None => {}
        }
    }
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

// ---- the lists --------------------------------------------------------------------------------------------------------

fn stems(folder: &str, extension: &str, without: &str) -> BTreeSet<String> {
    let files = std::fs::read_dir(root().join(folder)).unwrap().map(|e| e.unwrap().path());
    let named = files.filter(|p| p.extension().is_some_and(|e| e == extension));
    named.map(|p| p.file_stem().unwrap().to_string_lossy().into_owned()).filter(|s| s != without).collect()
}

#[test]
fn the_columns_have_equal_stems() {
    let (mut shaders, cuda) = (stems("shaders", "wgsl", "common"), stems("cuda", "cu", "common"));
    // What units with 16-bit storage have besides.
    shaders.remove("half");
    // What units that simulate paths have besides.
    shaders.remove("paths_generator");
    // Kernels of software adapters have a shader of their own, and their op's home.
    let (blocks, own): (BTreeSet<String>, BTreeSet<String>) = shaders.iter().cloned().partition(|stem| stem.ends_with("_blocks"));
    assert_eq!(own, cuda, "shaders/*.wgsl and cuda/*.cu");
    let homes = stems("kernels", "rs", "");
    let wanted: BTreeSet<String> = own.iter().map(String::as_str).chain(blocks.iter().map(|stem| stem.trim_end_matches("_blocks"))).map(String::from).collect();
    assert!(wanted.is_subset(&homes), "no kernels/<stem>.rs for {:?}", wanted.difference(&homes).collect::<Vec<_>>());
    let named = |source: &Option<Source>| source.map(|s| Path::new(s.file).file_stem().unwrap().to_string_lossy().into_owned());
    let listed: BTreeSet<String> = KERNELS.iter().flat_map(|k| [named(&k.wgsl), named(&k.cuda)]).flatten().collect();
    assert_eq!(listed, shaders, "files named by KERNELS and files in shaders/");
    for kernel in KERNELS {
        for source in [kernel.wgsl, kernel.cuda].into_iter().flatten() {
            assert_eq!(std::fs::read_to_string(root().join(source.file)).unwrap(), source.text, "{}: {}", kernel.name, source.file);
        }
        assert!(kernel.wgsl.is_none() || kernel.cuda.is_none() || named(&kernel.wgsl) == named(&kernel.cuda), "{}", kernel.name);
    }
}

#[test]
fn kernels_and_ops_name_each_other() {
    let unique: BTreeSet<&str> = KERNELS.iter().map(|k| k.name).collect();
    assert_eq!(unique.len(), KERNELS.len(), "kernel names are unique");
    let used: BTreeSet<&str> = OPS.iter().flat_map(|op| op.kernels).map(|k| k.name).collect();
    // The ceiling of `forback bench` is a kernel of no op.
    let listed: BTreeSet<&str> = KERNELS.iter().map(|k| k.name).filter(|name| *name != CEILING_MULTIPLY_ADD.name).collect();
    assert_eq!(used, listed, "kernels of all ops, and KERNELS");
    for kernel in OPS.iter().flat_map(|op| op.kernels) {
        assert!(KERNELS.iter().any(|k| std::ptr::eq(*k, *kernel)), "{} of an op is another value than that in KERNELS", kernel.name);
    }
    let ops: BTreeSet<&str> = OPS.iter().map(|op| op.name).collect();
    assert_eq!(ops.len(), OPS.len(), "op names are unique");
    for kernel in KERNELS {
        assert!(kernel.workgroup.is_power_of_two() && kernel.workgroup <= 256, "{}: trees halve the workgroup", kernel.name);
        let names: BTreeSet<&str> = kernel.args.iter().map(|a| a.name).collect();
        assert_eq!(names.len(), kernel.args.len(), "{}: argument names are unique", kernel.name);
        assert!(kernel.args.iter().any(|a| a.access == Access::Write), "{} writes nothing", kernel.name);
    }
}

// ---- the checks themselves --------------------------------------------------------------------------------------------

#[test]
fn a_wrong_value_is_noticed() {
    const SWAPPED: &[Arg] = &[reads_u32("key"), reads_u32("counter"), PHILOX.args[2], PHILOX.args[3], PHILOX.args[4]];
    const REAL: &[Arg] = &[PHILOX.args[0], PHILOX.args[1], writes("bits"), PHILOX.args[3], PHILOX.args[4]];
    const READ: &[Arg] = &[PHILOX.args[0], PHILOX.args[1], PHILOX.args[2], reads("uniforms"), PHILOX.args[4]];
    const FEWER: &[Arg] = &[PHILOX.args[0], PHILOX.args[1], PHILOX.args[2], PHILOX.args[3]];
    let params = |fields: &'static [(&'static str, Field)]| Kernel { params: Layout { name: "PhiloxParams", fields }, ..PHILOX };
    let wrong = [
        ("a field of another type", params(&[("n", Field::F32)])),
        ("a field of another name", params(&[("rows", Field::U32)])),
        ("a field too many", params(&[("n", Field::U32), ("m", Field::U32)])),
        ("another struct", Kernel { params: Layout { name: "Params", fields: PHILOX.params.fields }, ..PHILOX }),
        ("arguments in another order", Kernel { args: SWAPPED, ..PHILOX }),
        ("an argument of another type", Kernel { args: REAL, ..PHILOX }),
        ("an argument of another access", Kernel { args: READ, ..PHILOX }),
        ("an argument too few", Kernel { args: FEWER, ..PHILOX }),
        ("another entry", Kernel { name: "philox4x64", ..PHILOX }),
    ];
    assert!(wgsl_problems(&PHILOX).is_empty() && cuda_problems(&PHILOX).is_empty());
    for (what, kernel) in &wrong {
        assert!(!wgsl_problems(kernel).is_empty(), "WGSL: {what} goes unnoticed");
        assert!(!cuda_problems(kernel).is_empty(), "CUDA: {what} goes unnoticed");
    }
    let only_wgsl = [
        ("a constant that the shader lacks", Kernel { constants: &[("TILE", 16)], ..PHILOX }),
        ("workgroup memory beyond the limit", Kernel { wgsl: Some(Source { file: "greedy", text: GREEDY }), ..PHILOX }),
        ("an override that the list lacks", Kernel { wgsl: Some(Source { file: "override", text: OVERRIDE }), ..PHILOX }),
        ("a fixed workgroup size", Kernel { wgsl: Some(Source { file: "fixed", text: FIXED }), ..PHILOX }),
    ];
    for (what, kernel) in &only_wgsl {
        assert!(!wgsl_problems(kernel).is_empty(), "WGSL: {what} goes unnoticed");
    }
    assert!(says("ema_keys", "keys") && says("segments_in", "segments") && says("segment_of", "segment_of"));
    assert!(!says("monkeys", "keys") && !says("segment", "segment_of"));
}

macro_rules! small {
    ($override:literal, $size:literal, $memory:literal) => {
        concat!(
            "struct PhiloxParams { n: u32 }
            @group(0) @binding(0) var<uniform> params: PhiloxParams;
            @group(0) @binding(1) var<storage, read> counter: array<u32>;
            @group(0) @binding(2) var<storage, read> key: array<u32>;
            @group(0) @binding(3) var<storage, read_write> bits: array<u32>;
            @group(0) @binding(4) var<storage, read_write> uniforms: array<f32>;
            @group(0) @binding(5) var<storage, read_write> normal: array<f32>;
            override WG: u32 = 64u;",
            $override,
            "var<workgroup> sh: array<u32, ",
            $memory,
            ">;
            @compute @workgroup_size(",
            $size,
            ")
            fn philox(@builtin(local_invocation_index) tid: u32) {
                sh[tid] = counter[tid] + key[tid] + params.n;
                workgroupBarrier();
                bits[tid] = sh[tid ^ 1u];
                uniforms[tid] = 0.0;
                normal[tid] = 0.0;
            }"
        )
    };
}
const PLAIN: &str = small!("", "WG", "64u * WG");
const GREEDY: &str = small!("", "WG", "65u * WG");
const OVERRIDE: &str = small!("override TILE: u32 = 4u;", "WG", "TILE * WG");
const FIXED: &str = small!("", "64", "WG");

#[test]
fn the_small_shader_of_these_checks_is_well_formed() {
    let kernel = Kernel { wgsl: Some(Source { file: "plain", text: PLAIN }), ..PHILOX };
    assert_eq!(wgsl_problems(&kernel), Vec::<String>::new());
}
