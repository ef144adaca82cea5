//! Parquet files. What does not start like one is another format.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if bytes.starts_with(b"PAR1") {
        forback_fuzz::read_as("prices.parquet", bytes);
    }
});
