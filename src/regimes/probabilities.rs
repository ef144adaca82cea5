//! Regime probabilities, by what they know.
//!
//! | type | p(state at t given …) | parameters from | may be traded |
//! |---|---|---|---|
//! | [`FilteredProbabilities`] | observations up to t | a refit before t | yes |
//! | [`PredictedProbabilities`] | observations up to t − h | a refit before t − h | yes |
//! | [`InSampleProbabilities`] | observations up to t | the whole sample | no |
//! | [`SmoothedProbabilities`] | all observations | the whole sample | no |
//!
//! Trading code takes a [`Causal`], which only the first two are. They come from [`rolling`](super::rolling()) alone.
//!

use ndarray::{Array3, ArrayView1, Axis, Slice};

/// Probabilities [N,T,K]; NaN where there are none, and for states past an asset's own K.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Table {
    values: Array3<f32>,
    states: Vec<usize>,
}

impl Table {
    /// Nothing known yet of assets with `states` states over `bars` bars.
    pub(super) fn empty(states: Vec<usize>, bars: usize) -> Table {
        let most = states.iter().copied().max().unwrap_or(0);
        Table { values: Array3::from_elem((states.len(), bars, most), f32::NAN), states }
    }

    /// Writes rows [R,K] of an asset from a bar on.
    pub(super) fn put(&mut self, asset: usize, bar: usize, rows: &[f32]) {
        let k = self.states[asset];
        for (i, row) in rows.chunks_exact(k).enumerate() {
            row.iter().enumerate().for_each(|(state, &p)| self.values[[asset, bar + i, state]] = p);
        }
    }

    fn at(&self, asset: usize, bar: usize) -> Option<ArrayView1<'_, f32>> {
        if asset >= self.states.len() || bar >= self.values.dim().1 {
            return None;
        }
        let row = self.values.index_axis(Axis(0), asset).index_axis_move(Axis(0), bar).slice_axis_move(Axis(0), Slice::from(..self.states[asset]));
        row.first().is_some_and(|p| !p.is_nan()).then_some(row)
    }

    fn first(&self, asset: usize) -> Option<usize> {
        (0..self.values.dim().1).find(|&bar| self.at(asset, bar).is_some())
    }
}

/// Probabilities that know nothing after their bar: what a decision may use.
pub trait Causal: sealed::Sealed {
    /// Probabilities [K] known at the close of a bar, if there are any yet.
    fn known_at(&self, asset: usize, bar: usize) -> Option<ArrayView1<'_, f32>>;
    /// Assets N.
    fn assets(&self) -> usize;
    /// Bars T.
    fn bars(&self) -> usize;
    /// States of an asset's model.
    fn states(&self, asset: usize) -> usize;
}

mod sealed {
    /// Only types of this module are causal.
    pub trait Sealed {}
}

macro_rules! table {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name(pub(super) Table);

        impl $name {
            /// Probabilities [K] of an asset at a bar; `None` where there are none.
            pub fn get(&self, asset: usize, bar: usize) -> Option<ArrayView1<'_, f32>> {
                self.0.at(asset, bar)
            }

            /// First bar of an asset with probabilities.
            pub fn first_bar(&self, asset: usize) -> Option<usize> {
                self.0.first(asset)
            }

            /// All of them [N,T,K], NaN where there are none.
            pub fn values(&self) -> &Array3<f32> {
                &self.0.values
            }
        }
    };
}

macro_rules! causal {
    ($name:ident) => {
        impl sealed::Sealed for $name {}
        impl Causal for $name {
            fn known_at(&self, asset: usize, bar: usize) -> Option<ArrayView1<'_, f32>> {
                self.0.at(asset, bar)
            }

            fn assets(&self) -> usize {
                self.0.states.len()
            }

            fn bars(&self) -> usize {
                self.0.values.dim().1
            }

            fn states(&self, asset: usize) -> usize {
                self.0.states[asset]
            }
        }
    };
}

table! {
    /// p(state at t | observations up to t), with parameters of the last refit before t: nothing after t enters, whatever the sample.
    FilteredProbabilities
}
table! {
    /// p(state at t + h | observations up to t), stored at t: filtered probabilities carried h steps forward.
    PredictedProbabilities
}
table! {
    /// p(state at t | observations up to t) with parameters of the whole sample, which knows the future: for looking, not for trading.
    InSampleProbabilities
}
table! {
    /// p(state at t | all observations), with parameters of the whole sample: look-ahead by definition.
    SmoothedProbabilities
}
causal!(FilteredProbabilities);
causal!(PredictedProbabilities);
