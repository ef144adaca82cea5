//! Hidden Markov models: every op against enumeration, closed forms, finite differences and published fits, on every device.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

#[path = "hmm/baum_welch.rs"]
mod baum_welch;
#[path = "hmm/forecast.rs"]
mod forecast;
#[path = "hmm/forward_backward.rs"]
mod forward_backward;
#[path = "hmm/gradient.rs"]
mod gradient;
#[path = "hmm/oracle.rs"]
mod oracle;
#[path = "hmm/paths.rs"]
mod paths;
#[path = "hmm/rounds.rs"]
mod rounds;
#[path = "hmm/sample.rs"]
mod sample;
#[path = "hmm/scan.rs"]
mod scan;
#[path = "hmm/switching.rs"]
mod switching;
#[path = "hmm/viterbi.rs"]
mod viterbi;
