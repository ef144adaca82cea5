//! Walk-forward windows: choose on the train part, score on the test part that follows, move on, repeat.
//!
//! ```text
//! return index   first                                                         n_returns
//!                  ├───── train ─────┤ purge ┤ embargo ├─── test ───┤
//!                  ├─ step ─┤───── train ─────┤ purge ┤ embargo ├─── test ───┤          rolling
//!                  ├───────── train + step ───┤ purge ┤ embargo ├─── test ───┤          anchored
//! ```
//! Return j is bar j → j+1. Window k, with f = max(first, start) and gap = purge + embargo:
//! ```text
//! train = [f + k·step, f + k·step + train), anchored [f, f + k·step + train)
//! test  = [train end + gap, train end + gap + test)
//! count = ⌊(n_returns − f − train − gap − test) / step⌋ + 1
//! ```
//! A last test window that would be cut short is not kept.
//!
//! Purge    returns left out because labels or holding periods that begin in train reach into them: as long as the longest label.
//! Embargo  further returns left out because neighbours in time are alike (slow indicators, volatility). Train always lies before its
//!          own test here, so an embargo has only this one side; the two numbers add up and are kept apart because they have two reasons.
//!          A rolling or anchored train window may cover the test windows before it: they are past by then, and choosing on them is fair.
//! Stitch   the out-of-sample series takes each test window up to the start of the next one, so that step < test counts no return twice.
//!          step > test leaves returns between test windows out.
//! Source   López de Prado 2018, Advances in Financial Machine Learning, ch. 7 (purge, embargo); layout as skfolio `WalkForward`.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// Most windows of one walk-forward.
pub const MAX_WINDOWS: u64 = 1 << 20;

const OP: &str = "walk_forward";
const KEYS: [&str; 8] = ["train", "test", "step", "anchored", "rolling", "purge", "embargo", "start"];
const EXAMPLE: &str = "train=756,test=63,step=21,anchored,purge=5,embargo=0";

/// A walk-forward scheme; all sizes count returns (bars). The head of this module defines the windows.
///
/// As text: `train=756,test=63,step=21,anchored,purge=5,embargo=0,start=0`. Left-out sizes take the defaults
/// (train 756, test 63, step = test, rolling, everything else 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WalkForward {
    /// Returns to choose on; of the first window if anchored. At least 2: one return has no Sharpe ratio.
    pub train: u32,
    /// Returns to score on.
    pub test: u32,
    /// Returns between the starts of neighbouring test windows.
    pub step: u32,
    /// Train starts at the first counted return in every window and grows, instead of moving along.
    pub anchored: bool,
    /// Returns left out after train because labels overlap them.
    pub purge: u32,
    /// Further returns left out before test.
    pub embargo: u32,
    /// Earliest return of the first train window; the warm-up decides where it is later.
    pub start: u32,
}

impl Default for WalkForward {
    /// Three years and a quarter of daily bars; test windows do not overlap.
    fn default() -> Self {
        Self { train: 756, test: 63, step: 63, anchored: false, purge: 0, embargo: 0, start: 0 }
    }
}

impl WalkForward {
    /// Rows (train start, train end, test start, test end) `[W, 4]`, half-open on the return index.
    ///
    /// `first` is the first counted return (the longest warm-up of a sweep), `n_returns` the number of returns: one less than bars.
    ///
    /// # Errors
    /// `Parameter` if a size is 0 or the history holds no whole window, with the numbers to lower; `TooLarge` beyond [`MAX_WINDOWS`].
    pub fn windows(&self, first: u32, n_returns: u32) -> Result<Vec<[u32; 4]>> {
        self.check()?;
        let begin = first.max(self.start);
        // In u64 nothing below can overflow; every row ends at or before n_returns, so it fits u32 again.
        let [begin_, train, test, step] = [begin, self.train, self.test, self.step].map(u64::from);
        let gap = u64::from(self.purge) + u64::from(self.embargo);
        let needed = begin_ + train + gap + test;
        let Some(room) = u64::from(n_returns).checked_sub(needed) else { return Err(self.too_short(first, n_returns, needed)) };
        let count = room / step + 1;
        if count > MAX_WINDOWS {
            let help = format!("use a step above {step}");
            return Err(Error::TooLarge {
                what: format!("walk-forward {self} over {n_returns} returns"),
                needed: count,
                limit: MAX_WINDOWS,
                unit: "windows",
                help,
            });
        }
        let row = |k: u64| {
            let train_end = begin_ + k * step + train;
            let train_start = if self.anchored { begin_ } else { begin_ + k * step };
            [train_start, train_end, train_end + gap, train_end + gap + test].map(|j| j as u32)
        };
        Ok((0..count).map(row).collect())
    }

    /// Number of windows, 0 where [`WalkForward::windows`] finds none that fits.
    #[must_use]
    pub fn count(&self, first: u32, n_returns: u32) -> u64 {
        let [begin, train, test, purge, embargo] = [first.max(self.start), self.train, self.test, self.purge, self.embargo].map(u64::from);
        let room = u64::from(n_returns).checked_sub(begin + train + purge + embargo + test);
        room.and_then(|room| room.checked_div(u64::from(self.step))).map_or(0, |k| k + 1)
    }

    fn check(&self) -> Result<()> {
        for (name, value, least, why) in [
            ("train", self.train, 2, "a Sharpe ratio needs two returns"),
            ("test", self.test, 1, "an empty test window scores nothing"),
            ("step", self.step, 1, "the windows must move on"),
        ] {
            if value < least {
                return Err(bad(name, value.to_string(), format!("must be at least {least}: {why}")));
            }
        }
        Ok(())
    }

    fn too_short(&self, first: u32, n_returns: u32, needed: u64) -> Error {
        let Self { train, test, purge, embargo, start, .. } = *self;
        let before = if start > first { format!("start {start}") } else { format!("warm-up {first}") };
        let parts = [(Some(before), start.max(first)), (None, train), (Some(format!("purge {purge}")), purge), (Some(format!("embargo {embargo}")), embargo)];
        let parts: Vec<_> = parts.into_iter().filter(|(_, n)| *n > 0).map(|(text, _)| text.unwrap_or_else(|| format!("train {train}"))).collect();
        let missing = needed - u64::from(n_returns);
        let largest = |n: u32| u64::from(n).checked_sub(missing);
        // Train first, unless that would leave less to choose on than to score on; then the warm-up, where it is what fills the history.
        let lower = match (largest(train), largest(first)) {
            (Some(t), _) if t >= 2 && t >= u64::from(test) => format!("lower train to {t} or less, or the longest window of the grid"),
            (_, Some(f)) if first > start => format!("lower the longest window of the grid until its warm-up is {f} or less, or train and test"),
            _ => "lower train and test".to_owned(),
        };
        let help = format!(
            "the first walk-forward window needs {needed} returns ({} + test {test}), {} bars; the history has {n_returns} returns, {} bars: {lower}, or use {missing} more bars",
            parts.join(" + "),
            needed + 1,
            u64::from(n_returns) + 1,
        );
        bad("train", train.to_string(), help)
    }
}

fn bad(name: &str, value: impl Into<String>, help: impl Into<String>) -> Error {
    Error::Parameter { op: OP, name: name.into(), value: value.into(), help: help.into() }
}

impl FromStr for WalkForward {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut this = Self::default();
        let mut seen: Vec<&str> = Vec::new();
        for entry in text.split(',') {
            let (key, value) = match entry.split_once('=') {
                Some((key, value)) => (key.trim(), Some(value.trim())),
                None => (entry.trim(), None),
            };
            if key.is_empty() {
                return Err(bad("text", text, format!("has an entry without a name; write one such as {EXAMPLE}")));
            }
            let Some(key) = KEYS.into_iter().find(|k| *k == key) else {
                if key.starts_with(|c: char| c.is_ascii_digit()) {
                    return Err(bad("text", text, format!("{key} needs a name; write one such as {EXAMPLE}")));
                }
                let near = KEYS.into_iter().min_by_key(|k| strsim::damerau_levenshtein(key, k)).filter(|k| strsim::damerau_levenshtein(key, k) <= 2);
                let known = KEYS.map(str::to_owned).to_vec();
                return Err(Error::Unknown { kind: "walk-forward setting", given: key.into(), suggestion: near.map(str::to_owned), known });
            };
            // anchored and rolling are two words for one setting.
            let setting = if key == "rolling" { "anchored" } else { key };
            if seen.contains(&setting) {
                return Err(bad(key, value.unwrap_or(key), format!("is given twice in {text}; keep one")));
            }
            seen.push(setting);
            if setting == "anchored" {
                let on = match value {
                    None | Some("true") => true,
                    Some("false") => false,
                    Some(value) => return Err(bad(key, value, format!("takes no value; write {key} alone, or {key}=true or {key}=false"))),
                };
                this.anchored = on == (key == "anchored");
                continue;
            }
            let value = value.ok_or_else(|| bad(key, "", format!("has no value; write {key}=63")))?;
            let number: u32 = value.parse().map_err(|_| bad(key, value, format!("must be a whole number of returns from 0 to {}", u32::MAX)))?;
            match key {
                "train" => this.train = number,
                "test" => this.test = number,
                "step" => this.step = number,
                "purge" => this.purge = number,
                "embargo" => this.embargo = number,
                _ => this.start = number,
            }
        }
        if !seen.contains(&"step") {
            this.step = this.test;
        }
        this.check()?;
        Ok(this)
    }
}

/// The text that [`WalkForward::from_str`] reads; settings that are off are left out.
impl fmt::Display for WalkForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "train={},test={},step={}", self.train, self.test, self.step)?;
        if self.anchored {
            f.write_str(",anchored")?;
        }
        let rest = [("purge", self.purge), ("embargo", self.embargo), ("start", self.start)];
        rest.into_iter().filter(|(_, n)| *n > 0).try_for_each(|(name, n)| write!(f, ",{name}={n}"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> WalkForward {
        text.parse().unwrap()
    }

    fn error(text: &str) -> String {
        text.parse::<WalkForward>().unwrap_err().to_string()
    }

    #[test]
    fn text_round_trips_and_defaults() {
        let all = "train=756,test=63,step=21,anchored,purge=5,embargo=2,start=10";
        assert_eq!(parse(all), WalkForward { train: 756, test: 63, step: 21, anchored: true, purge: 5, embargo: 2, start: 10 });
        assert_eq!(parse(all).to_string(), all);
        assert_eq!(parse(" test = 21 , train=100, rolling").to_string(), "train=100,test=21,step=21");
        assert_eq!(parse("train=756"), WalkForward::default());
        assert_eq!(parse("anchored=false,purge=0"), WalkForward::default());
        assert!(parse("rolling=false").anchored && parse("anchored").anchored);
    }

    #[test]
    fn windows_by_hand() {
        assert_eq!(parse("train=4,test=2").windows(1, 10).unwrap(), [[1, 5, 5, 7], [3, 7, 7, 9]]);
        assert_eq!(parse("train=4,test=2,step=1,purge=1,embargo=1").windows(0, 9).unwrap(), [[0, 4, 6, 8], [1, 5, 7, 9]]);
        // The layout of conformance/backtest_sweep/ema_cross_anchored_purged.
        let rows = parse("train=252,test=126,step=63,anchored,purge=5").windows(0, 899).unwrap();
        assert_eq!((rows.len(), rows[0], rows[1]), (9, [0, 252, 257, 383], [0, 315, 320, 446]));
        // start moves the first window, but not before the warm-up.
        let late = parse("train=4,test=2,start=3,anchored");
        assert_eq!(late.windows(1, 11).unwrap(), [[3, 7, 7, 9], [3, 9, 9, 11]]);
        assert_eq!(late.windows(5, 11).unwrap(), [[5, 9, 9, 11]]);
        // 20 to 25 windows of 756/63/21 for 1,218 to 1,343 returns (spec §12.5).
        let seed = parse("train=756,test=63,step=21");
        let counts = [1217, 1218, 1343, 1344].map(|t| seed.count(0, t));
        assert_eq!(counts, [19, 20, 25, 26]);
    }

    #[test]
    fn errors_say_what_and_how() {
        for (text, want) in [
            ("train=0", "must be at least 2"),
            ("test=0", "must be at least 1"),
            ("step=0", "the windows must move on"),
            ("tran=5", "did you mean 'train'?"),
            ("756,63", "756 needs a name; write one such as train=756"),
            ("train=5,", "entry without a name"),
            ("", "entry without a name"),
            ("train", "has no value; write train=63"),
            ("train=-5", "whole number"),
            ("train=5.5", "whole number"),
            ("train=5000000000", "whole number"),
            ("train=5,train=6", "given twice"),
            ("anchored,rolling", "given twice"),
            ("anchored=7", "anchored=true"),
        ] {
            let got = error(text);
            assert!(got.contains(want), "{text}\n  got  {got}\n  want {want}");
        }
        let short = |text: &str, first| parse(text).windows(first, 1000).unwrap_err().to_string();
        let got = short("train=756,purge=5", 399);
        assert!(got.contains("needs 1223 returns (warm-up 399 + train 756 + purge 5 + test 63), 1224 bars; the history has 1000 returns, 1001 bars"), "{got}");
        assert!(got.contains("lower train to 533 or less") && got.contains("223 more bars"), "{got}");
        assert!(parse("train=533,purge=5").windows(399, 1000).is_ok());
        assert!(short("train=100", 5000).contains("until its warm-up is 837 or less"));
        assert!(short("train=1000,test=1000", 0).contains("lower train and test"));
        assert!(short("start=4000000000", 5).contains("start 4000000000"));
        assert!(matches!(parse("train=2,test=1").windows(0, u32::MAX), Err(Error::TooLarge { .. })));
        let most = u32::MAX;
        let all = WalkForward { train: most, test: most, step: most, anchored: true, purge: most, embargo: most, start: most };
        assert!(all.windows(most, most).is_err() && all.count(most, most) == 0);
        assert!(WalkForward { step: 0, ..WalkForward::default() }.windows(0, 5000).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn windows_keep_their_promises(
            train in 2u32..60, test in 1u32..30, step in 1u32..40, anchored: bool, purge in 0u32..9, embargo in 0u32..9, start in 0u32..30, first in 0u32..30, n in 0u32..400
        ) {
            let scheme = WalkForward { train, test, step, anchored, purge, embargo, start };
            prop_assert_eq!(parse(&scheme.to_string()), scheme);
            let f = first.max(start);
            let Ok(rows) = scheme.windows(first, n) else {
                prop_assert!(n < f + train + purge + embargo + test);
                return Ok(());
            };
            prop_assert_eq!(rows.len() as u32, (n - f - train - test - purge - embargo) / step + 1);
            prop_assert_eq!(rows.len() as u64, scheme.count(first, n));
            for (k, &[a, b, c, d]) in rows.iter().enumerate() {
                prop_assert_eq!([b, c, d], [f + k as u32 * step + train, b + purge + embargo, c + test]);
                prop_assert_eq!(a, if anchored { f } else { b - train });
                prop_assert!(d <= n);
            }
            // One more window would not fit.
            prop_assert!(rows[rows.len() - 1][3] + step > n);
        }
    }
}
