//! Grids: a strategy's name, a space, the grid's text. What is read can be written and read again, and lists as many sets as it counts.
#![no_main]

use forback::sim::grid::Grid;

/// Most combinations that are gone through here.
const MOST: u128 = 1 << 18;

libfuzzer_sys::fuzz_target!(|text: &str| {
    let (strategy, text) = text.split_once(' ').map_or((text, None), |(strategy, text)| (strategy, Some(text)));
    let Ok(grid) = Grid::parse(strategy, text) else { return };
    let written = grid.to_string();
    let again = Grid::parse(strategy, Some(&written)).unwrap_or_else(|e| panic!("{written} does not read back: {e}"));
    assert_eq!((again.to_string(), again.len(), again.warm_up()), (written, grid.len(), grid.warm_up()));
    if grid.raw_len() > MOST {
        return assert!(grid.len() <= 1 || grid.sets(grid.len() - 1).is_err());
    }
    let sets = grid.sets(u64::MAX).unwrap_or_else(|e| panic!("{grid}: {e}"));
    assert!(grid.is_counted() && sets.len() as u64 == grid.len());
    assert!(sets.columns.iter().all(|c| c.len() == sets.len() && c.iter().all(|x| x.is_finite())));
    for (i, set) in grid.iter().enumerate() {
        assert!(set.iter().zip(&sets.columns).all(|(value, column)| value.to_bits() == column[i].to_bits()), "{grid}: set {i}");
        let values: Vec<f64> = set.iter().map(|&x| f64::from(x)).collect();
        assert!(grid.strategy().first_bar(&values) <= grid.warm_up(), "{grid}: set {i} warms up longer than the grid");
    }
});
