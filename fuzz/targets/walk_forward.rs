//! Walk-forward schemes: the text, and windows over a history of up to 65,535 returns (the first four bytes: warm-up and length).
#![no_main]

use forback::sim::walk_forward::WalkForward;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((sizes, text)) = bytes.split_first_chunk::<4>() else { return };
    let Ok(scheme) = std::str::from_utf8(text).unwrap_or_default().parse::<WalkForward>() else { return };
    assert_eq!(scheme.to_string().parse::<WalkForward>().ok(), Some(scheme), "{scheme} does not read back");
    let [first, returns] = [u16::from_le_bytes([sizes[0], sizes[1]]), u16::from_le_bytes([sizes[2], sizes[3]])].map(u32::from);
    let count = scheme.count(first, returns);
    let Ok(windows) = scheme.windows(first, returns) else { return assert_eq!(count, 0, "{scheme}") };
    assert_eq!(windows.len() as u64, count, "{scheme}");
    let begin = first.max(scheme.start);
    for [train, train_end, test, test_end] in windows {
        assert!(begin <= train && train + 2 <= train_end && train_end <= test && test < test_end && test_end <= returns, "{scheme}");
        assert_eq!((test - train_end, test_end - test), (scheme.purge + scheme.embargo, scheme.test), "{scheme}");
    }
});
