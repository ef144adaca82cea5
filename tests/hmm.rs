//! Hidden Markov models on every device: against enumeration of all paths, closed forms and the f64 reference; ties, ragged lengths,
//! missing and impossible steps; the same bits however a batch or its time is cut.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

#[path = "hmm/forecast.rs"]
mod forecast;
#[path = "hmm/sample.rs"]
mod sample;
#[path = "hmm/viterbi.rs"]
mod viterbi;
