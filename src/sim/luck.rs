//! What luck explains of a sweep: is the best of many sets better than the best of as many without skill?
//!
//! ```text
//! expected best      what luck gives the best of N sets whose Sharpe ratios differ by their measured deviation (false strategy theorem)
//! deflated ratio     probability that the chosen set's true ratio is above that; probabilistic ratio: above zero, were it the only set
//! overfitting (PBO)  share of the ways to halve time in which the best set of one half ends in the lower half of the sets in the other
//! track record       years that the ratio needs to be above zero, and above the expected best, at the level of confidence
//! interval           stationary block bootstrap of the chosen set's series and of the stitched out-of-sample series
//! ```
//! N counts every set as a trial of its own. Neighbouring sets trade alike, so N overstates the search and the expected best is on the high
//! side: a set that passes has passed the harder test. The interval of the chosen set is that of a series which was chosen for being
//! high; only the stitched one is free of the choice.
//!
//! Shapes   selected [T], stitched [K], sample [S',T]: simple returns per bar of the same portfolio.
//! Source   `kernels/multiple_testing.rs` and `kernels/block_bootstrap.rs` have the formulas and their papers.

use crate::kernels::block_bootstrap::{Bootstrap, Interval, bootstrap_sharpe};
use crate::kernels::multiple_testing::{
    MAX_SPLITS, MultipleTesting, TrackRecord, deflated_sharpe, expected_max_sharpe, minimum_track_record, multiple_testing,
};
use crate::kernels::performance::performance_read;
use crate::{Device, Error, Result};

const OP: &str = "luck";
/// Rows from which on the deviation of a sample of sets is used.
const SAMPLE: usize = 20;

/// Number, mean and deviation of the sets' Sharpe ratios, gathered one by one.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TrialRatios {
    /// Sets with a defined ratio.
    pub trials: u64,
    /// Sets without one: they never traded.
    pub undefined: u64,
    /// Mean ratio.
    pub mean: f64,
    squares: f64,
}

impl TrialRatios {
    /// Adds a set's ratio; NaN counts as undefined.
    pub fn push(&mut self, sharpe: f64) {
        if sharpe.is_nan() {
            self.undefined += 1;
            return;
        }
        self.trials += 1;
        let delta = sharpe - self.mean;
        self.mean += delta / self.trials as f64;
        self.squares += delta * (sharpe - self.mean);
    }

    /// Both together, as for the parts of a sweep.
    #[must_use]
    pub fn merge(self, other: TrialRatios) -> TrialRatios {
        let undefined = self.undefined + other.undefined;
        let trials = self.trials + other.trials;
        if self.trials == 0 || other.trials == 0 {
            let one = if self.trials == 0 { other } else { self };
            return TrialRatios { undefined, ..one };
        }
        let (a, b, n) = (self.trials as f64, other.trials as f64, trials as f64);
        let delta = other.mean - self.mean;
        TrialRatios { trials, undefined, mean: self.mean + delta * b / n, squares: self.squares + other.squares + delta * delta * a * b / n }
    }

    /// Deviation (n−1); NaN below two ratios.
    pub fn deviation(&self) -> f64 {
        if self.trials < 2 { f64::NAN } else { (self.squares / (self.trials as f64 - 1.0)).sqrt() }
    }
}

impl FromIterator<f64> for TrialRatios {
    fn from_iter<I: IntoIterator<Item = f64>>(ratios: I) -> TrialRatios {
        let mut all = TrialRatios::default();
        ratios.into_iter().for_each(|x| all.push(x));
        all
    }
}

/// What a sweep knows about its best set.
#[derive(Debug, Clone, Copy)]
pub struct Evidence<'a> {
    /// Annualised Sharpe ratios of all sets, NaN where undefined.
    pub ratios: TrialRatios,
    /// Returns per bar of the best set in sample [T].
    pub selected: &'a [f32],
    /// Stitched out-of-sample returns per bar [K]; empty without a walk-forward.
    pub stitched: &'a [f32],
    /// Returns per bar of sets spread evenly over the grid, row by row over the bars of `selected` [S',T]; may be empty. From 20 rows on
    /// their ratios' deviation is taken instead of that of `ratios`: it is of the portfolio, as `selected` is, where `ratios` may be means
    /// over assets.
    pub sample: &'a [f32],
    /// Return periods per year.
    pub periods_per_year: f64,
}

/// How to judge it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LuckConfig {
    /// Most blocks of the cross-validation, even; short series take fewer.
    pub splits: u32,
    /// Bootstrap replicates.
    pub replicates: u32,
    /// Seed of the bootstrap.
    pub seed: u64,
    /// Confidence of every statement.
    pub level: f64,
}

impl Default for LuckConfig {
    /// 16 blocks, 2,000 replicates, 95 %.
    fn default() -> Self {
        LuckConfig { splits: 16, replicates: 2000, seed: 0, level: 0.95 }
    }
}

/// Overfitting by combinatorially symmetric cross-validation.
#[derive(Debug, Clone, PartialEq)]
pub struct Overfitting {
    /// Probability of back-test overfitting.
    pub pbo: f64,
    /// Share of combinations in which the chosen set loses money out of sample.
    pub loss: f64,
    /// Sets.
    pub trials: usize,
    /// Blocks of time.
    pub splits: u32,
    /// Logit of the chosen set's rank out of sample, per combination.
    pub logits: Vec<f64>,
}

/// How much of a sweep's best result luck explains. Ratios are annualised, undefined ones NaN.
#[derive(Debug, Clone, PartialEq)]
pub struct Luck {
    /// Number of sets that the best one was chosen from.
    pub trials: u64,
    /// Mean of their ratios: what they share, such as a rising market.
    pub mean: f64,
    /// Deviation of their ratios.
    pub deviation: f64,
    /// Sharpe ratio of the best set in sample.
    pub best: f64,
    /// Ratio that luck gives the best of so many sets.
    pub expected_best: f64,
    /// Probability that its true ratio is above zero, were it the only set.
    pub probabilistic: f64,
    /// Probability that its true ratio is above the expected best.
    pub deflated: f64,
    /// Years of its series.
    pub years: f64,
    /// Years that its ratio needs to be above zero at `level`; infinite where it is not above zero.
    pub minimum_years: f64,
    /// Years that it needs to be above the expected best.
    pub minimum_years_deflated: f64,
    /// Overfitting, where there are two sets and four bars at least.
    pub overfitting: Option<Overfitting>,
    /// Interval of the best set in sample.
    pub in_sample: Interval,
    /// Interval of the stitched series out of sample.
    pub out_of_sample: Option<Interval>,
    /// Confidence of every statement.
    pub level: f64,
}

/// Judges a sweep's best result.
/// # Errors
/// `Shape` if `selected` has fewer than two bars or `sample` is no whole number of rows of its length; `Parameter` for returns that are
/// not finite, a number of periods that is not positive, and settings outside their range.
pub fn luck(device: &Device, evidence: &Evidence<'_>, config: &LuckConfig) -> Result<Luck> {
    let Evidence { ratios, selected, stitched, sample, periods_per_year } = *evidence;
    check(evidence, config)?;
    let year = periods_per_year.sqrt();
    let rows = sample.len() / selected.len();
    // Blocks of two bars at least.
    let splits = config.splits.min((selected.len() / 2).min(MAX_SPLITS as usize) as u32 & !1);
    let (mut overfitting, mut mean, mut deviation) = (None, ratios.mean / year, ratios.deviation() / year);
    if rows >= 2 && splits >= 2 {
        let tested = multiple_testing(device, sample, rows, &MultipleTesting { splits, level: config.level, ..MultipleTesting::default() })?;
        if rows >= SAMPLE && tested.deviation.is_finite() {
            deviation = tested.deviation;
            mean = tested.sharpe.iter().copied().filter(|s| s.is_finite()).collect::<TrialRatios>().mean;
        }
        overfitting = Some(Overfitting { pbo: tested.pbo, loss: tested.loss, trials: rows, splits, logits: tested.logits });
    }
    let trials = ratios.trials.max(1);
    let record = record_of(device, selected)?;
    let expected = expected_max_sharpe(trials, deviation);
    let years = |bars: f64| bars / periods_per_year;
    Ok(Luck {
        trials,
        mean: mean * year,
        deviation: deviation * year,
        best: record.sharpe * year,
        expected_best: expected * year,
        probabilistic: record.probabilistic(0.0),
        deflated: deflated_sharpe(&record, trials, deviation),
        years: years(selected.len() as f64),
        minimum_years: years(minimum_track_record(&record, 0.0, config.level)),
        minimum_years_deflated: years(minimum_track_record(&record, expected, config.level)),
        overfitting,
        in_sample: interval(device, selected, year, config)?,
        out_of_sample: if stitched.len() < 2 { None } else { Some(interval(device, stitched, year, config)?) },
        level: config.level,
    })
}

fn check(evidence: &Evidence<'_>, config: &LuckConfig) -> Result<()> {
    let Evidence { selected, sample, periods_per_year, .. } = *evidence;
    if selected.len() < 2 {
        return Err(Error::Shape { op: OP, arg: "selected".into(), expected: "two returns or more".into(), got: selected.len().to_string() });
    }
    if !sample.len().is_multiple_of(selected.len()) {
        let expected = format!("rows of {} returns, as selected has", selected.len());
        return Err(Error::Shape { op: OP, arg: "sample".into(), expected, got: format!("{} values", sample.len()) });
    }
    let wrong = |name: &str, value: f64, help: &str| Err(Error::Parameter { op: OP, name: name.into(), value: value.to_string(), help: help.into() });
    if !(periods_per_year.is_finite() && periods_per_year > 0.0) {
        return wrong("periods_per_year", periods_per_year, "give a positive number of return periods per year");
    }
    if config.level.is_nan() || config.level <= 0.5 || config.level >= 1.0 {
        return wrong("level", config.level, "must be a confidence between 0.5 and 1, such as 0.95");
    }
    if config.splits < 2 || config.splits > MAX_SPLITS || config.splits % 2 == 1 {
        return wrong("splits", f64::from(config.splits), "must be even, 2 to 20");
    }
    Ok(())
}

fn record_of(device: &Device, returns: &[f32]) -> Result<TrackRecord> {
    let bars = returns.len() as u64;
    let mut pass = device.pass(OP);
    let buffer = device.upload("returns", returns)?;
    let read = performance_read(&mut pass, &buffer, 1, bars)?;
    Ok(TrackRecord::of(&pass.submit()?.f64(read)?, bars))
}

/// Bootstrap interval of one series, annualised.
fn interval(device: &Device, returns: &[f32], year: f64, config: &LuckConfig) -> Result<Interval> {
    let bootstrap = Bootstrap { replicates: config.replicates, seed: config.seed, level: config.level, ..Bootstrap::default() };
    let found = bootstrap_sharpe(device, returns, 1, &bootstrap)?;
    let one = found.into_iter().next().ok_or_else(|| Error::Internal("one series has one interval".into()))?;
    Ok(Interval { sharpe: one.sharpe * year, lower: one.lower * year, upper: one.upper * year, ..one })
}

impl Luck {
    /// Whether the best set is within what luck gives the best of so many: its deflated ratio is below the level, or undefined.
    pub fn explains(&self) -> bool {
        self.deflated.is_nan() || self.deflated < self.level
    }

    /// What was found, a line each.
    pub fn verdict(&self) -> Vec<String> {
        let sets = grouped(self.trials);
        let mut lines = vec![
            format!("best in-sample Sharpe ratio {}; expected best of {sets} by luck {}", ratio(self.best), ratio(self.expected_best)),
            format!(
                "deflated Sharpe ratio {}: {}",
                ratio(self.deflated),
                if self.explains() {
                    format!("luck explains the best of {sets} sets")
                } else {
                    format!("more than luck explains at {} %", percent(self.level))
                }
            ),
        ];
        if !self.explains() && self.mean > self.expected_best {
            let shared = "what all sets share, such as a rising market, is no skill of the best";
            lines.push(format!("the mean of all sets is {}: {shared}", ratio(self.mean)));
        }
        if let Some(o) = &self.overfitting {
            let ways = format!(
                "probability of overfitting {} ({} sets, {} ways to halve time)",
                ratio(o.pbo),
                grouped(o.trials as u64),
                grouped(o.logits.len() as u64)
            );
            let meaning = if o.pbo < 0.5 {
                format!("the best of one half ends in the lower half of the other in {} % of them", percent(o.pbo))
            } else {
                "choosing the best in sample is no better than choosing at random".into()
            };
            lines.push(format!("{ways}: {meaning}"));
        }
        lines.push(self.track_record());
        lines.push(format!("best set in sample: {}", self.range(&self.in_sample)));
        if let Some(out) = &self.out_of_sample {
            let apart = if out.lower > 0.0 {
                "above zero"
            } else if out.upper < 0.0 {
                "below zero"
            } else {
                "not told apart from zero"
            };
            lines.push(format!("chosen anew, out of sample: {}: {apart}", self.range(out)));
        }
        lines
    }

    fn track_record(&self) -> String {
        let years = |y: f64| if y.is_finite() { format!("{y:.1} years") } else { "no number of years".into() };
        let (zero, luck) = (years(self.minimum_years), years(self.minimum_years_deflated));
        format!("track record {}; at {} % it takes {zero} to be above zero, {luck} to be above luck", years(self.years), percent(self.level))
    }

    fn range(&self, i: &Interval) -> String {
        format!("Sharpe ratio {}, {} % interval {} to {}", ratio(i.sharpe), percent(self.level), ratio(i.lower), ratio(i.upper))
    }
}

/// Two decimals, "undefined" for NaN.
fn ratio(x: f64) -> String {
    if x.is_nan() { "undefined".into() } else { format!("{:.2}", if x.abs() < 0.005 { 0.0 } else { x }) }
}

fn percent(share: f64) -> String {
    format!("{}", (share * 1e3).round() / 10.0)
}

/// 40,000.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|g| std::str::from_utf8(g).ok()).collect();
    groups.join(",")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::kernels::philox::{normals, philox4x32};

    const BARS: usize = 1000;

    /// Independent returns [sets,T] with deviation 1 % a bar; the first has annualised Sharpe ratio `skill`.
    fn returns(sets: usize, skill: f64, seed: u32) -> Vec<f32> {
        let drift = |set: usize| if set == 0 { skill / 252f64.sqrt() * 0.01 } else { 0.0 };
        let one = |i: usize| 0.01 * normals(philox4x32([i as u32, 0, 0, 0], [seed, 77]))[0] + drift(i / BARS);
        (0..sets * BARS).map(|i| one(i) as f32).collect()
    }

    fn sharpe(x: &[f32]) -> f64 {
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / x.len() as f64;
        let m2 = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>();
        mean / (m2 / (x.len() as f64 - 1.0)).sqrt() * 252f64.sqrt()
    }

    fn judged(sets: usize, skill: f64, seed: u32) -> Luck {
        let (device, x) = (Device::open("cpu").unwrap(), returns(sets, skill, seed));
        let (fresh, all) = (returns(1, skill, seed + 1000), x.chunks_exact(BARS).map(sharpe).collect::<Vec<_>>());
        let best = (0..sets).max_by(|a, b| all[*a].total_cmp(&all[*b])).unwrap();
        let evidence = Evidence {
            ratios: all.iter().copied().collect(),
            selected: &x[best * BARS..(best + 1) * BARS],
            stitched: &fresh,
            sample: &x,
            periods_per_year: 252.0,
        };
        let config = LuckConfig { splits: 10, replicates: 400, ..LuckConfig::default() };
        let found = luck(&device, &evidence, &config).unwrap();
        assert!((found.best - all[best]).abs() < 1e-4 && found.trials == sets as u64, "{found:?}");
        found
    }

    #[test]
    fn luck_explains_the_best_of_many_without_skill() {
        for seed in 1..6 {
            let found = judged(200, 0.0, seed);
            let text = found.verdict().join("\n");
            assert!(found.explains() && text.contains("luck explains the best of 200 sets"), "{text}");
            // Alone it would have looked real.
            assert!(found.probabilistic > 0.95 && found.deflated < 0.9, "{found:?}");
            assert!((found.best / found.expected_best - 1.0).abs() < 0.35, "{text}");
            assert!(found.overfitting.as_ref().is_some_and(|o| o.pbo > 0.25 && o.logits.len() == 252), "{text}");
            assert!(text.contains("not told apart from zero"), "{text}");
        }
    }

    #[test]
    fn planted_skill_is_more_than_luck() {
        for seed in 1..6 {
            let found = judged(200, 5.0, seed);
            let text = found.verdict().join("\n");
            assert!(!found.explains() && text.contains("more than luck explains at 95 %"), "{text}");
            assert!(found.overfitting.as_ref().is_some_and(|o| o.pbo < 0.02 && o.loss < 0.02), "{text}");
            assert!(found.minimum_years < found.minimum_years_deflated && found.minimum_years_deflated < found.years, "{text}");
            assert!(found.out_of_sample.is_some_and(|i| i.lower > 0.0 && i.lower < i.sharpe && i.sharpe < i.upper), "{text}");
        }
    }

    #[test]
    fn what_all_sets_share_is_no_skill() {
        let device = Device::open("cpu").unwrap();
        // One rising market under every set, which differ a little.
        let (market, own) = (returns(1, 3.0, 9), returns(40, 0.0, 10));
        let x: Vec<f32> = own.iter().enumerate().map(|(i, e)| market[i % BARS] + 0.1 * e).collect();
        let ratios = x.chunks_exact(BARS).map(sharpe).collect();
        let evidence = Evidence { ratios, selected: &x[..BARS], stitched: &[], sample: &x, periods_per_year: 252.0 };
        let found = luck(&device, &evidence, &LuckConfig { splits: 6, replicates: 100, ..LuckConfig::default() }).unwrap();
        let text = found.verdict().join("\n");
        assert!(!found.explains() && found.mean > found.expected_best && text.contains("what all sets share"), "{text}");
        let skilled = judged(200, 5.0, 1).verdict().join("\n");
        assert!(!skilled.contains("what all sets share"), "{skilled}");
    }

    #[test]
    fn a_set_that_loses_never_gets_there() {
        let device = Device::open("cpu").unwrap();
        let x: Vec<f32> = returns(1, -3.0, 3);
        let evidence = Evidence { ratios: [-3.0].into_iter().collect(), selected: &x, stitched: &[], sample: &[], periods_per_year: 252.0 };
        let found = luck(&device, &evidence, &LuckConfig::default()).unwrap();
        let text = found.verdict().join("\n");
        assert!(found.explains() && text.contains("no number of years to be above zero"), "{text}");
        assert!(found.overfitting.is_none() && found.out_of_sample.is_none() && found.expected_best == 0.0, "{text}");
    }

    #[test]
    fn a_set_that_never_trades_is_undefined() {
        let (device, flat) = (Device::open("cpu").unwrap(), vec![0.0; 90]);
        let evidence =
            Evidence { ratios: [f64::NAN; 3].into_iter().collect(), selected: &flat, stitched: &flat, sample: &flat.repeat(3), periods_per_year: 252.0 };
        let found = luck(&device, &evidence, &LuckConfig::default()).unwrap();
        let text = found.verdict().join("\n");
        assert!(found.explains() && found.best.is_nan() && text.contains("best in-sample Sharpe ratio undefined"), "{text}");
    }

    #[test]
    fn moments_stream_and_merge() {
        let x: Vec<f64> = (0..200).map(|i| if i % 9 == 0 { f64::NAN } else { 0.4 + normals(philox4x32([i, 0, 0, 0], [1, 1]))[0] }).collect();
        let whole: TrialRatios = x.iter().copied().collect();
        let defined: Vec<f64> = x.iter().copied().filter(|v| !v.is_nan()).collect();
        let mean = defined.iter().sum::<f64>() / defined.len() as f64;
        let deviation = (defined.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (defined.len() as f64 - 1.0)).sqrt();
        for cut in [0, 1, 77, 200] {
            let (a, b) = x.split_at(cut);
            let merged = a.iter().copied().collect::<TrialRatios>().merge(b.iter().copied().collect());
            assert!((merged.mean - mean).abs() < 1e-12 && (merged.deviation() - deviation).abs() < 1e-12, "{cut}");
            assert_eq!((merged.trials, merged.undefined), (whole.trials, 23));
        }
        assert!(TrialRatios::default().deviation().is_nan());
    }

    #[test]
    fn wrong_evidence_is_named() {
        let device = Device::open("cpu").unwrap();
        let x = [0.01f32, -0.01, 0.02, f32::NAN];
        let fine = Evidence { ratios: TrialRatios::default(), selected: &x[..2], stitched: &[], sample: &[], periods_per_year: 252.0 };
        let refused = |evidence: Evidence<'_>, config: LuckConfig| luck(&device, &evidence, &config).unwrap_err().to_string();
        let config = LuckConfig::default();
        assert!(refused(Evidence { selected: &x[..1], ..fine }, config).contains("selected must be two returns"));
        assert!(refused(Evidence { sample: &x[..3], ..fine }, config).contains("sample must be rows of 2 returns"));
        assert!(refused(Evidence { stitched: &x, ..fine }, config).contains("returns[0, 3] = NaN"));
        assert!(refused(Evidence { periods_per_year: 0.0, ..fine }, config).contains("periods_per_year = 0"));
        assert!(refused(fine, LuckConfig { level: 1.0, ..config }).contains("level = 1"));
        assert!(refused(fine, LuckConfig { splits: 5, ..config }).contains("splits = 5"));
        assert!(refused(fine, LuckConfig { replicates: 0, ..config }).contains("replicates = 0"));
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!([0, 999, 40_000, 1_234_567].map(grouped), ["0", "999", "40,000", "1,234,567"]);
    }
}
