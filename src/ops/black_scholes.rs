//! Black-Scholes prices, with gradients by spot, strike, maturity, volatility, rate and dividend yield.

use super::{need, wrong};
use crate::Result;
use crate::kernels::Pass;
use crate::kernels::black_scholes::{self as kernel, TERMS};
use crate::tape::{Backward, Forward, Function, Keeps, Tape, Var};

const NAME: &str = "black_scholes";

struct BlackScholesOp {
    options: usize,
}

impl Function for BlackScholesOp {
    fn name(&self) -> &'static str {
        NAME
    }
    fn shapes(&self) -> Vec<Vec<usize>> {
        vec![vec![self.options]]
    }
    fn keeps(&self) -> Keeps {
        Keeps { inputs: 0b11, outputs: 0 }
    }
    fn forward(&self, pass: &mut Pass, io: &Forward<'_>) -> Result<()> {
        kernel::black_scholes_price(pass, need(io.inputs, 0, NAME)?, need(io.inputs, 1, NAME)?, need(io.outputs, 0, NAME)?)
    }
    fn backward(&self, pass: &mut Pass, io: &Backward<'_>) -> Result<()> {
        let grad_price = need(io.grad_outputs, 0, NAME)?;
        kernel::black_scholes_backward(pass, need(io.inputs, 0, NAME)?, need(io.inputs, 1, NAME)?, grad_price, need(io.grad_inputs, 0, NAME)?)
    }
}

impl Tape {
    /// Prices [N] of options terms [N,6] (spot, strike, maturity in years, volatility, rate, dividend) and kind [N] words (0 put, 1 call, 2 digital put,
    /// 3 digital call). The gradient by a term's column is that greek: concatenate columns to differentiate by each. Values are not looked at: spot
    /// and strike must be positive, maturity and volatility 0 or more.
    /// # Errors
    /// `Shape` naming the argument.
    pub fn black_scholes(&mut self, terms: Var, kind: Var) -> Result<Var> {
        let shape = self.shape(terms).to_vec();
        let &[options, TERMS] = shape.as_slice() else {
            return Err(wrong(NAME, "terms", "[N,6]", &shape));
        };
        self.expect(NAME, "kind", kind, &[options])?;
        self.expect_words(NAME, "kind", kind)?;
        self.one(BlackScholesOp { options }, &[Some(terms), Some(kind)])
    }
}
