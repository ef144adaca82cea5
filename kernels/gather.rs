//! Embedding: rows of a table by their numbers, y[m,n,:] = table[m, ids[m,n], :].
//!
//! Shapes   table [M or 1,V,E]; ids [M or 1,N] words; y [M,N,E]; grad_table as table; invalid [M or 1] words. Ids from V on give rows of zeros,
//!          get no gradient, and are counted by [`embedding_invalid`] for the host to read. Positions are the ids 0 … T−1, or a slice
//!          of the table broadcast by [`crate::map::copy_strided`].
//! Backward grad_table[m,v,:] = Σ_{n: ids[n] = v} grad_y[m,n,:], in the order of n, without atomics: N is cut into segments of L = max(256, V,
//!          N/1024) rows. A workgroup owns 64 table rows, 64 columns and a segment, reads the segment's ids through
//!          workgroup memory, and adds the rows that are its own; segments are then summed by `reduce`. A table that all models share
//!          takes the rows of all models as one list.
//! Launch   `embedding`: thread = element of y. `embedding_backward`: ⌈V/64⌉·⌈E/64⌉·⌈N/L⌉ groups per table, so ids are read ⌈V/64⌉ times.
//! Scratch  backward: ⌈N/L⌉·V·E per table where N > L (at most the size of grad_y, rounded up to a table), else none.
//! Floor    8 bytes per element of y forward; 4 per element of grad_y and of grad_table backward.
//! Numerics forward copies bits; the order of the sums depends on N and V alone.
//! Source   the usual lookup table; the scan instead of a sort is for its fixed order.
//! Files    shaders/gather.wgsl · cuda/gather.cu · reference: the `_cpu` functions

use crate::device::{Device, Pass, View};
use crate::kernel::{Cost, Cpu, CpuLaunch, Kernel, layout, params_of, reads, reads_u32, writes, writes_u32};
use crate::map::{bind, binding_elements, check_len, fill};
use crate::real::Real;
use crate::reduce::{Reduce, reduce_sum};
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

params! {
    /// Params of the three kernels.
    pub struct GatherParams {
        /// Tables of this launch (`embedding`: models).
        models: u32,
        /// Rows per model.
        rows: u32,
        /// Elements of a row.
        width: u32,
        /// Rows of a table.
        vocabulary: u32,
        /// Words from one model's ids to the next.
        ids_step: u32,
        /// After so many rows the ids repeat.
        ids_period: u32,
        /// Elements from one model's table to the next.
        table_step: u32,
        /// Rows per segment.
        segment: u32,
        /// Segments per table.
        segments: u32,
        /// First element of the table …
        table_at: u32,
        /// … of the ids …
        ids_at: u32,
        /// … and of y.
        y_at: u32,
    }
}

/// Threads per workgroup of `embedding` and `embedding_invalid`.
const WG: u32 = 256;
/// Threads per workgroup of `embedding_backward`: columns; also the table rows that it owns.
const TILE: u32 = 64;

fn params(words: &[u32]) -> GatherParams {
    params_of(words).unwrap_or_else(bytemuck::Zeroable::zeroed)
}

fn gathered(words: &[u32]) -> u64 {
    let p = params(words);
    u64::from(p.models) * u64::from(p.rows) * u64::from(p.width)
}

fn tiles(vocabulary: u64, width: u64) -> u64 {
    vocabulary.div_ceil(u64::from(TILE)) * width.div_ceil(u64::from(TILE))
}

/// Rows of a table.
pub static EMBEDDING: Kernel = Kernel {
    name: "embedding",
    about: "rows of tables by their numbers",
    args: &[reads("table"), reads_u32("ids"), writes("y")],
    params: layout::<GatherParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| gathered(words).div_ceil(u64::from(WG)),
    wgsl: wgsl!("gather"),
    cuda: cuda!("gather"),
    cpu: Some(Cpu { f32: embedding_cpu::<f32>, f64: embedding_cpu::<f64> }),
    cost: Cost { unit: "element", units: gathered, bytes: 8.0, flops: 0.0 },
};

/// Gradient of a table.
pub static EMBEDDING_BACKWARD: Kernel = Kernel {
    name: "embedding_backward",
    about: "gradient of embedding tables, in a fixed order",
    args: &[reads("grad_y"), reads_u32("ids"), writes("sums")],
    params: layout::<GatherParams>(),
    workgroup: TILE,
    constants: &[],
    groups: |words| {
        let p = params(words);
        u64::from(p.models) * u64::from(p.segments) * tiles(p.vocabulary.into(), p.width.into())
    },
    wgsl: wgsl!("gather"),
    cuda: cuda!("gather"),
    cpu: Some(Cpu { f32: embedding_backward_cpu::<f32>, f64: embedding_backward_cpu::<f64> }),
    cost: Cost { unit: "element", units: gathered, bytes: 12.0, flops: 1.0 },
};

/// Ids that no table row has.
pub static EMBEDDING_INVALID: Kernel = Kernel {
    name: "embedding_invalid",
    about: "counts ids beyond the table",
    args: &[reads_u32("ids"), writes_u32("invalid")],
    params: layout::<GatherParams>(),
    workgroup: WG,
    constants: &[],
    groups: |words| params(words).models.into(),
    wgsl: wgsl!("gather"),
    cuda: cuda!("gather"),
    cpu: Some(Cpu { f32: embedding_invalid_cpu::<f32>, f64: embedding_invalid_cpu::<f64> }),
    cost: Cost { unit: "id", units: |words| u64::from(params(words).models) * u64::from(params(words).rows), bytes: 4.0, flops: 1.0 },
};

/// Sizes of an embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Embedding {
    /// Models M.
    pub models: u64,
    /// Tables: 1 or M.
    pub table_models: u64,
    /// Lists of ids: 1 or M.
    pub ids_models: u64,
    /// Ids per model N.
    pub rows: u64,
    /// Rows of a table V.
    pub vocabulary: u64,
    /// Elements of a row E.
    pub width: u64,
}

impl Embedding {
    /// # Errors
    /// `Shape` for a number of tables or lists that is neither 1 nor M; `TooLarge` for sizes that no index holds.
    pub fn check(&self) -> Result<()> {
        for (arg, n) in [("table_models", self.table_models), ("ids_models", self.ids_models)] {
            if n != 1 && n != self.models {
                let expected = format!("1 or {}", self.models);
                return Err(Error::Shape { op: "embedding", arg: arg.into(), expected, got: n.to_string() });
            }
        }
        let most = (1u64 << 31) - 1;
        for (what, needed) in [("vocabulary", self.vocabulary), ("rows of all models", self.rows.saturating_mul(self.models)), ("width", self.width)] {
            if needed > most {
                let help = "use a smaller table or fewer rows at once".into();
                return Err(Error::TooLarge { what: format!("embedding: {what}"), needed, limit: most, unit: "elements", help });
            }
        }
        Ok(())
    }

    /// Elements of all tables.
    pub fn table(&self) -> u64 {
        self.table_models.saturating_mul(self.vocabulary).saturating_mul(self.width)
    }

    /// Elements of y.
    pub fn output(&self) -> u64 {
        self.models.saturating_mul(self.rows).saturating_mul(self.width)
    }

    /// Rows that end in one table.
    fn rows_per_table(&self) -> u64 {
        if self.table_models == self.models { self.rows } else { self.rows.saturating_mul(self.models) }
    }

    fn segment(&self) -> u64 {
        self.vocabulary.max(self.rows_per_table().div_ceil(1024)).max(1).next_multiple_of(256)
    }

    fn segments(&self) -> u64 {
        self.rows_per_table().div_ceil(self.segment())
    }

    /// Reals of scratch that the backward pass needs.
    pub fn scratch_backward(&self) -> u64 {
        if self.segments() > 1 { self.table().saturating_mul(self.segments()) } else { 0 }
    }

    fn check_views(&self, op: &'static str, table: (&'static str, &View), ids: &View, y: (&'static str, &View)) -> Result<()> {
        self.check()?;
        check_len(op, table.0, table.1, self.table())?;
        check_len(op, "ids", ids, self.ids_models.saturating_mul(self.rows))?;
        check_len(op, y.0, y.1, self.output())
    }

    fn params(&self, models: u64, rows: u64) -> GatherParams {
        GatherParams {
            models: models as u32,
            rows: rows as u32,
            width: self.width as u32,
            vocabulary: self.vocabulary as u32,
            ids_step: if self.ids_models > 1 { self.rows as u32 } else { 0 },
            ids_period: rows as u32,
            table_step: if self.table_models > 1 { (self.vocabulary * self.width) as u32 } else { 0 },
            segment: self.segment() as u32,
            segments: self.segments() as u32,
            table_at: 0,
            ids_at: 0,
            y_at: 0,
        }
    }

    /// Models and rows of each launch: whole models, or a part of one.
    fn runs(&self, device: &Device) -> Result<Vec<(Range<u64>, Range<u64>)>> {
        let step = device.limits().align;
        let per_model = (self.rows * self.width).max(self.vocabulary * self.width) + step;
        let groups = (self.rows * self.width).div_ceil(u64::from(WG));
        if let Ok(runs) = device.plan("embedding", self.models, per_model, groups, 4 * self.rows * self.width)
            && (self.models == 1 || self.rows * self.width * 4 <= device.limits().work_per_launch)
            && runs.iter().all(|run| (run.end - run.start) * self.rows * self.width < 1 << 31)
        {
            return Ok(runs.into_iter().map(|run| (run, 0..self.rows)).collect());
        }
        let rows = device.plan("embedding", self.rows, self.width + step, self.width.div_ceil(u64::from(WG)) + 1, 4 * self.width)?;
        Ok((0..self.models).flat_map(|m| rows.iter().map(move |run| (m..m + 1, run.clone()))).collect())
    }
}

fn too_wide(op: &'static str, device: &Device, what: &str, needed: u64) -> Error {
    let help = "use a smaller table, or another device".into();
    Error::TooLarge { what: format!("{op}: {what}"), needed: 4 * needed, limit: 4 * binding_elements(device), unit: "B", help }
}

/// Records y [M,N,E] from table [M or 1,V,E] and ids [M or 1,N].
/// # Errors
/// `Shape` for other lengths; `TooLarge` if one table does not fit a binding.
pub fn embedding(pass: &mut Pass, op: &Embedding, table: &View, ids: &View, y: &View) -> Result<()> {
    op.check_views("embedding", ("table", table), ids, ("y", y))?;
    if op.output() == 0 {
        return Ok(());
    }
    if op.vocabulary == 0 {
        return fill(pass, 0.0, y);
    }
    let device = pass.device().clone();
    let (size, per_model) = (op.vocabulary * op.width, op.rows * op.width);
    if size + device.limits().align > binding_elements(&device) {
        return Err(too_wide("embedding", &device, "a table", size));
    }
    for (m, n) in op.runs(&device)? {
        let (models, rows) = (m.end - m.start, n.end - n.start);
        let first = if op.table_models > 1 { m.start } else { 0 };
        let tables = if op.table_models > 1 { models } else { 1 };
        let lists = if op.ids_models > 1 { m.start..m.end } else { 0..1 };
        let (table, table_at) = bind(&device, table, first * size, tables * size);
        let ids_span = (lists.end - lists.start - 1) * op.rows + rows;
        let (ids, ids_at) = bind(&device, ids, lists.start * op.rows + n.start, ids_span);
        let (y, y_at) = bind(&device, y, m.start * per_model + n.start * op.width, (models - 1) * per_model + rows * op.width);
        pass.launch(&EMBEDDING, &GatherParams { table_at, ids_at, y_at, ..op.params(models, rows) }, &[table, ids, y])?;
    }
    Ok(())
}

/// Records grad_table [M or 1,V,E] from grad_y [M,N,E]; `scratch` holds [`Embedding::scratch_backward`] reals.
/// # Errors
/// `Shape` for other lengths or missing scratch; `TooLarge` if one table's rows do not fit a binding.
pub fn embedding_backward(pass: &mut Pass, op: &Embedding, ids: &View, grad_y: &View, grad_table: &View, scratch: Option<&View>) -> Result<()> {
    op.check_views("embedding_backward", ("grad_table", grad_table), ids, ("grad_y", grad_y))?;
    if op.table() == 0 {
        return Ok(());
    }
    if op.output() == 0 {
        return fill(pass, 0.0, grad_table);
    }
    let device = pass.device().clone();
    let (rows, segments) = (op.rows_per_table(), op.segments());
    let sums = match scratch {
        _ if segments == 1 => grad_table.clone(),
        Some(scratch) if scratch.len() >= op.scratch_backward() => scratch.part(0..op.scratch_backward()),
        got => {
            let expected = format!("at least {} elements (Embedding::scratch_backward)", op.scratch_backward());
            let got = got.map_or("none".into(), |s| s.len().to_string());
            return Err(Error::Shape { op: "embedding_backward", arg: "scratch".into(), expected, got });
        }
    };
    let (per_table, per_list) = (op.vocabulary * op.width * segments, rows * op.width);
    let widest = per_table.max(per_list) + device.limits().align;
    if widest > binding_elements(&device) {
        return Err(too_wide("embedding_backward", &device, "the rows of one table", widest));
    }
    device.check_rounds("embedding_backward", 2 * op.segment() + 256, "rounds")?;
    let work = op.segment() * segments * op.vocabulary.div_ceil(u64::from(TILE)) * op.width.div_ceil(u64::from(TILE)) * u64::from(TILE);
    for run in device.plan("embedding_backward", op.table_models, widest, segments * tiles(op.vocabulary, op.width), work)? {
        let models = run.end - run.start;
        let own_ids = op.ids_models > 1 && op.table_models > 1;
        let (ids, ids_at) = if own_ids { bind(&device, ids, run.start * op.rows, models * op.rows) } else { (ids.clone(), 0) };
        let (grad_y, table_at) = bind(&device, grad_y, run.start * per_list, models * per_list);
        let (sums, y_at) = bind(&device, &sums, run.start * per_table, models * per_table);
        let params = GatherParams {
            ids_step: if own_ids { op.rows as u32 } else { 0 },
            ids_period: if op.ids_models == 1 { op.rows } else { rows } as u32,
            table_at,
            ids_at,
            y_at,
            ..op.params(models, rows)
        };
        pass.launch(&EMBEDDING_BACKWARD, &params, &[grad_y, ids, sums])?;
    }
    if segments > 1 {
        let reduce = Reduce::over(&[op.table_models, segments, op.vocabulary * op.width], &[1])?;
        reduce_sum(pass, &reduce, &sums, grad_table, None)?;
    }
    Ok(())
}

/// Records how many ids of each list no table row has: invalid [M or 1], words.
/// # Errors
/// `Shape` for other lengths.
pub fn embedding_invalid(pass: &mut Pass, op: &Embedding, ids: &View, invalid: &View) -> Result<()> {
    op.check()?;
    check_len("embedding_invalid", "ids", ids, op.ids_models.saturating_mul(op.rows))?;
    check_len("embedding_invalid", "invalid", invalid, op.ids_models)?;
    let device = pass.device().clone();
    device.check_rounds("embedding_invalid", op.rows.div_ceil(u64::from(WG)) + 64, "rounds")?;
    for run in device.plan("embedding_invalid", op.ids_models, op.rows + device.limits().align, 1, op.rows)? {
        let models = run.end - run.start;
        let ((ids, ids_at), (invalid, y_at)) = (bind(&device, ids, run.start * op.rows, models * op.rows), bind(&device, invalid, run.start, models));
        pass.launch(&EMBEDDING_INVALID, &GatherParams { ids_step: op.rows as u32, ids_at, y_at, ..op.params(models, op.rows) }, &[ids, invalid])?;
    }
    Ok(())
}

// ---- CPU --------------------------------------------------------------------------------------------------------------

fn embedding_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: GatherParams = launch.params()?;
    let (table, ids, y) = (&launch.real()?[p.table_at as usize..], &launch.word()?[p.ids_at as usize..], launch.real_mut()?);
    let (rows, width) = (p.rows as usize, p.width as usize);
    let y = &mut y[p.y_at as usize..][..p.models as usize * rows * width];
    y.par_chunks_exact_mut(width).enumerate().with_min_len((4096 / width).max(1)).for_each(|(i, y)| {
        let (m, n) = (i / rows, i % rows);
        let id = ids[m * p.ids_step as usize + n];
        if id < p.vocabulary {
            y.copy_from_slice(&table[m * p.table_step as usize + id as usize * width..][..width]);
        } else {
            y.fill(R::ZERO);
        }
    });
    Ok(())
}

fn embedding_backward_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: GatherParams = launch.params()?;
    let (grad_y, ids, sums) = (&launch.real()?[p.table_at as usize..], &launch.word()?[p.ids_at as usize..], launch.real_mut()?);
    let (rows, width, vocabulary) = (p.rows as usize, p.width as usize, p.vocabulary as usize);
    let (segment, segments) = (p.segment as usize, p.segments as usize);
    let sums = &mut sums[p.y_at as usize..][..p.models as usize * segments * vocabulary * width];
    // Each task owns some rows of a table and looks for them in the whole segment.
    let block = vocabulary.div_ceil(16).max(64).min(vocabulary);
    sums.par_chunks_exact_mut(vocabulary * width).enumerate().for_each(|(i, sums)| {
        let (m, s) = (i / segments, i % segments);
        sums.par_chunks_mut(block * width).enumerate().for_each(|(b, sums)| {
            sums.fill(R::ZERO);
            let owned = sums.len() / width;
            for n in s * segment..((s + 1) * segment).min(rows) {
                let id = (ids[m * p.ids_step as usize + n % p.ids_period as usize] as usize).wrapping_sub(b * block);
                if id < owned {
                    let from = &grad_y[(m * rows + n) * width..][..width];
                    sums[id * width..][..width].iter_mut().zip(from).for_each(|(sum, &g)| *sum += g);
                }
            }
        });
    });
    Ok(())
}

fn embedding_invalid_cpu<R: Real>(mut launch: CpuLaunch<'_, R>) -> Result<()> {
    let p: GatherParams = launch.params()?;
    let (ids, invalid) = (&launch.word()?[p.ids_at as usize..], launch.word_mut()?);
    for (m, count) in invalid[p.y_at as usize..][..p.models as usize].iter_mut().enumerate() {
        let ids = &ids[m * p.ids_step as usize..][..p.rows as usize];
        *count = ids.iter().filter(|&&id| id >= p.vocabulary).count() as u32;
    }
    Ok(())
}
