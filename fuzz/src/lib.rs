//! What must hold for any bytes in a price file.

#![forbid(unsafe_code)]

use forback::data::{Missing, Prices, ReadOptions, read_prices};
use std::path::PathBuf;

/// A file of this process; FUZZ_SCRATCH names a folder that is quick to write.
fn file(name: &str) -> PathBuf {
    let folder = std::env::var_os("FUZZ_SCRATCH").map_or_else(std::env::temp_dir, PathBuf::from);
    folder.join(format!("forback-fuzz-{}-{name}", std::process::id()))
}

/// The reader turns panics of the Parquet decoder into errors; only panics of other code are findings.
fn let_the_decoder_panic() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let abort = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !forback::data::decoding() {
                abort(panic);
            }
        }));
    });
}

/// Reads the bytes under every policy for missing cells. An error is an answer; prices that break a promise of [`Prices`] are not.
pub fn read_as(name: &str, bytes: &[u8]) {
    let_the_decoder_panic();
    let path = file(name);
    std::fs::write(&path, bytes).expect("the folder for scratch files can be written");
    for missing in [Missing::Error, Missing::Drop, Missing::Fill { limit: 2 }] {
        let options = ReadOptions { missing, ..ReadOptions::default() };
        match read_prices(std::slice::from_ref(&path), &options) {
            Ok(prices) => check(&prices),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}

fn check(prices: &Prices) {
    let (bars, assets) = (prices.n_bars(), prices.n_assets());
    assert!(bars >= 2 && assets >= 1, "{bars} bars of {assets} assets");
    assert_eq!(prices.close.dim(), (bars, assets));
    assert!(prices.times.windows(2).all(|t| t[0] < t[1]), "times {:?}", prices.times);
    assert!(prices.close.iter().all(|p| p.is_normal() && *p > 0.0), "prices {:?}", prices.close);
    if let Some(open) = &prices.open {
        assert_eq!(open.dim(), (bars, assets));
        assert!(open.iter().all(|p| p.is_normal() && *p > 0.0), "opens {open:?}");
    }
    let distinct: std::collections::HashSet<_> = prices.symbols.iter().collect();
    assert_eq!(distinct.len(), assets, "symbols {:?}", prices.symbols);
    assert!(prices.periods_per_year().is_ok_and(|p| p > 0.0 && p.is_finite()));
    assert!(prices.times.iter().all(|&t| !prices.format_time(t).is_empty()));
    assert_eq!(prices.sha256.len(), 64);
}
