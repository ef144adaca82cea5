//! Random sets of a grid: N distinct legal ones, drawn without replacement, in the grid's order.
//!
//! Counted  a grid of at most [`LISTED`] combinations is drawn by rank: Floyd's method takes N distinct ranks below the number of legal
//!          sets, one pass over the combinations picks them. A set's number is its index in the whole grid.
//! Absurd   a larger one is never listed: raw combinations are drawn until N distinct legal ones are found. A set's number is then that of
//!          the combination, illegal ones counted, first parameter fastest.
//! Random   Philox, key = seed, counter = (draw, 0, 0, STREAM): words 0 and 1 make a 64-bit number, scaled to the range by
//!          multiplication, which is uneven by at most range / 2^64.
//! Source   Floyd in Bentley & Floyd 1987, Communications of the ACM 30(9).

use super::grid::{Grid, ParameterSets};
use crate::kernels::philox::philox4x32;
use crate::{Error, Result};
use std::collections::BTreeSet;

/// Grids of at most this many combinations are gone through; larger ones are drawn from blindly.
pub const LISTED: u128 = 1 << 22;

/// Stream of the draws, apart from those of the synthetic market.
const STREAM: u32 = 2 << 16;

/// Most draws for each set that is asked for, where legality is found out by drawing.
const TRIES: u64 = 2_000;

/// Sets drawn from a grid.
#[derive(Debug, Clone)]
pub struct Sample {
    /// The sets, ascending by number.
    pub sets: ParameterSets,
    /// Their numbers in the grid.
    pub ids: Vec<u64>,
}

/// Uniform whole numbers.
struct Draws {
    key: [u32; 2],
    next: u32,
}

impl Draws {
    fn new(seed: u64) -> Draws {
        Draws { key: [seed as u32, (seed >> 32) as u32], next: 0 }
    }

    /// Below `range`, which is positive.
    fn below(&mut self, range: u64) -> u64 {
        let [low, high, ..] = philox4x32([self.next, 0, 0, STREAM], self.key);
        self.next = self.next.wrapping_add(1);
        let word = u64::from(low) | (u64::from(high) << 32);
        ((u128::from(word) * u128::from(range)) >> 64) as u64
    }
}

/// `n` distinct numbers below `range`, ascending.
fn distinct(n: u64, range: u64, draws: &mut Draws) -> BTreeSet<u64> {
    let mut chosen = BTreeSet::new();
    for top in range - n..range {
        let drawn = draws.below(top + 1);
        if !chosen.insert(drawn) {
            chosen.insert(top);
        }
    }
    chosen
}

fn bad(n: u64, help: String) -> Error {
    Error::Parameter { op: "sweep", name: "random".into(), value: n.to_string(), help }
}

/// Draws `n` legal sets of `grid`.
///
/// The same grid, `n` and `seed` give the same sets.
/// # Errors
/// `Parameter` if `n` is 0, above `limit` or above the number of legal sets, or if legal sets are too rare to be found by drawing.
pub fn sample(grid: &Grid, n: u64, seed: u64, limit: u64) -> Result<Sample> {
    if n == 0 {
        return Err(bad(n, "draw at least one set".into()));
    }
    if grid.is_counted() && n > grid.len() {
        return Err(bad(n, format!("the grid has {} legal sets; draw at most as many, or widen a range", grid.len())));
    }
    if n > limit {
        return Err(bad(n, format!("one sweep takes at most {limit} sets")));
    }
    let mut draws = Draws::new(seed);
    let mut sets = grid.no_sets();
    let mut ids = Vec::with_capacity(n as usize);
    let mut push = |id: u64, set: &[f32]| {
        ids.push(id);
        for (column, value) in sets.columns.iter_mut().zip(set) {
            column.push(*value);
        }
    };
    if grid.is_counted() && grid.raw_len() <= LISTED {
        let chosen = distinct(n, grid.len(), &mut draws);
        for (rank, set) in grid.iter().enumerate().filter(|(rank, _)| chosen.contains(&(*rank as u64))) {
            push(rank as u64, &set);
        }
    } else {
        let range = u64::try_from(grid.raw_len()).map_err(|_| bad(n, "the grid has more than 2^64 combinations; use bigger steps or log ranges".into()))?;
        let mut chosen = std::collections::BTreeMap::new();
        let mut tries = 0;
        while (chosen.len() as u64) < n {
            tries += 1;
            if tries > TRIES.saturating_mul(n) + 1_000_000 {
                let help = format!(
                    "{} distinct legal sets in {tries} combinations drawn; legal ones are too rare: relax a constraint, draw fewer, or cut the ranges",
                    chosen.len()
                );
                return Err(bad(n, help));
            }
            let id = draws.below(range);
            if let Some(set) = grid.at_raw(id) {
                chosen.insert(id, set);
            }
        }
        for (id, set) in chosen {
            push(id, &set);
        }
    }
    Ok(Sample { sets, ids })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_draw_of_all_sets_is_the_grid_and_fewer_are_a_part_of_it() {
        let grid = Grid::parse("sma_cross", Some("fast=2:12,slow=5:30:5,slow>=2*fast")).unwrap();
        let whole = grid.sets(1000).unwrap();
        let n = whole.len() as u64;
        let all = sample(&grid, n, 1, 1000).unwrap();
        assert_eq!(all.sets.columns, whole.columns);
        assert_eq!(all.ids, (0..n).collect::<Vec<_>>());
        let some = sample(&grid, 9, 1, 1000).unwrap();
        assert!(some.ids.windows(2).all(|pair| pair[0] < pair[1]) && some.ids.len() == 9);
        for (i, &id) in some.ids.iter().enumerate() {
            assert_eq!(some.sets.get(i), whole.get(id as usize));
        }
        assert_ne!(some.ids, sample(&grid, 9, 2, 1000).unwrap().ids);
        assert!(matches!(sample(&grid, n + 1, 1, 1000), Err(Error::Parameter { .. })));
        assert!(matches!(sample(&grid, 0, 1, 1000), Err(Error::Parameter { .. })));
    }

    #[test]
    fn every_rank_is_drawn_equally_often() {
        let mut counts = [0u32; 10];
        for seed in 0..4000 {
            for rank in distinct(3, 10, &mut Draws::new(seed)) {
                counts[rank as usize] += 1;
            }
        }
        // 1200 expected, standard deviation 29.
        assert!(counts.iter().all(|&c| (1085..=1315).contains(&c)), "{counts:?}");
    }

    #[test]
    fn an_absurd_grid_is_drawn_from_without_listing_it() {
        let grid = Grid::parse("macd", Some("fast=1:1000000,slow=1:1000000,signal=2:1000")).unwrap();
        let drawn = sample(&grid, 500, 3, 1000).unwrap();
        assert_eq!(drawn.sets.len(), 500);
        assert!(drawn.ids.windows(2).all(|pair| pair[0] < pair[1]));
        for (i, &id) in drawn.ids.iter().enumerate() {
            let set = drawn.sets.get(i);
            assert!(set[0].1 < set[1].1, "{set:?}");
            let raw = (set[0].1 as u64 - 1) + 1_000_000 * (set[1].1 as u64 - 1) + 1_000_000_000_000 * (set[2].1 as u64 - 2);
            assert_eq!(raw, id);
        }
        let rare = Grid::parse("macd", Some("fast=1:1000000,slow=1:1000000,signal=2:1000,slow==fast+1")).unwrap();
        let error = sample(&rare, 500, 3, 1000).unwrap_err().to_string();
        assert!(error.contains("too rare"), "{error}");
    }
}
