//! Rows of tables.

use super::{need, wrong};
use crate::Result;
use crate::kernels::gather::{self, Embedding};
use crate::kernels::{Device, Pass};
use crate::tape::{Backward, Forward, Function, Keeps, Tape, Var};

struct EmbeddingOp {
    op: Embedding,
    shape: Vec<usize>,
}

const NAME: &str = "embedding";

impl Function for EmbeddingOp {
    fn name(&self) -> &'static str {
        NAME
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![self.shape.clone()]
    }
    fn scratch_backward(&self, _: &Device) -> Vec<u64> {
        vec![self.op.scratch_backward()]
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0b10, outputs: 0 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        gather::embedding(pass, &self.op, need(io.inputs, 0, NAME)?, need(io.inputs, 1, NAME)?, need(io.outputs, 0, NAME)?)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let (ids, grad_y) = (need(io.inputs, 1, NAME)?, need(io.grad_outputs, 0, NAME)?);
        gather::embedding_backward(pass, &self.op, ids, grad_y, need(io.grad_inputs, 0, NAME)?, io.scratch.first())
    }
}

impl Tape {
    /// Rows of table [M or 1,V,E] by ids, words [M or 1,…]: [M,…,E]. An id of V or more gives zeros and no gradient.
    /// # Errors
    /// `Shape` naming the argument; `TooLarge` for a table that no binding holds.
    pub fn embedding(&mut self, table: Var, ids: Var) -> Result<Var> {
        let [table_models, v, e] = self.axes(NAME, "table", table, "[M or 1,V,E]")?;
        let Some((&ids_models, inner)) = self.shape(ids).split_first() else { return Err(wrong(NAME, "ids", "[M or 1,…]", self.shape(ids))) };
        self.expect_words(NAME, "ids", ids)?;
        let models = table_models.max(ids_models);
        let shape: Vec<usize> = std::iter::once(models).chain(inner.iter().copied()).chain([e]).collect();
        let op = Embedding {
            models: models as u64,
            table_models: table_models as u64,
            ids_models: ids_models as u64,
            rows: inner.iter().product::<usize>() as u64,
            vocabulary: v as u64,
            width: e as u64,
        };
        op.check()?;
        self.one(EmbeddingOp { op, shape }, &[Some(table), Some(ids)])
    }
}
