//! Config files of a sweep. An error says what is wrong in one line.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Err(error) = forback::cli::check_config(text) {
        assert!(!error.to_string().contains('\n'), "{error}");
    }
});
