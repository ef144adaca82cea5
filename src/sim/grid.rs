//! Parameter grids of the built-in strategies: text → axes → columns `[P][S]`.
//!
//! ```text
//! grid        = entry { "," entry }
//! entry       = name "=" item | item | constraint       a bare item continues the list of the parameter before it
//! item        = piece { "|" piece }
//! piece       = number | a ":" b | a ":" b ":" step | a ":" b ":log" n
//! constraint  = expression ("<" | "<=" | ">" | ">=" | "==" | "!=") expression
//! expression  = ["-"] term { ("+" | "-") term }         term = factor { "*" factor }, at most one name in a term
//! ```
//! For example `fast=2:100:2,slow=20:400:10,slow>=3*fast`, `fast=5,10,20,slow=50|100`, `lookback=10:500:log20`.
//!
//! Ranges   hold both ends (b only if a whole number of steps leads there); the step is 1 unless given. A log range has n points of
//!          equal ratio, both ends included, rounded and without duplicates for whole-number parameters.
//! Missing  parameters take their default values; a grid without text is the default grid, at least 10,000 legal sets for every strategy.
//! Order    the first parameter of the strategy's table varies fastest, the last one slowest, whatever the order in the text; values stay
//!          in the order given (a repeated value is kept once). Ties in a ranking go to the lowest index, so this order is part of the result.
//! Legal    sets that break the strategy's own rule (`fast < slow`, `low < high`) or a constraint of the text are left out.
//! Lazy     ranges are not expanded and sets are not listed before [`Grid::sets`], so an absurd grid is refused at once.
//! Numerics values are stepped in f64 and rounded once to f32; a step finer than f32 is an error. Constraints compare in f64, and
//!          two sides within 1e-9 of each other (relative) are equal; the strategy's own rule compares the f32 values that run.

use std::fmt;

use crate::{Error, Result};

/// Largest window of any indicator, in bars.
pub const MAX_WINDOW: u32 = 1_048_575;

/// Most values that one parameter of a grid may take.
pub const MAX_VALUES: u64 = 1 << 20;

/// Up to this many combinations the legal ones are counted when the text is read.
pub const MAX_COUNTED: u128 = 50_000_000;

/// Most points of a log range: these are listed, ordinary ranges are not.
const MAX_LOG_POINTS: u32 = 65_536;

/// Most combinations that [`Grid::sets`] goes through to find the legal ones.
const MAX_VISITED: u128 = 1 << 32;

/// Relative distance at which the two sides of a constraint count as equal.
const EQUAL: f64 = 1e-9;

// ---- strategies -------------------------------------------------------------------------------------------------

/// The legal values of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Whole numbers from min to max.
    Integer,
    /// Numbers from min to max.
    Real,
    /// Numbers above min, up to max.
    RealAbove,
}

/// One parameter of a strategy.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct ParameterSpec {
    /// Name in a grid text and of the column.
    pub name: &'static str,
    /// Whole or real, and whether min itself is legal.
    pub kind: Kind,
    /// Lower end of the legal range.
    pub min: f64,
    /// Upper end of the legal range, itself legal.
    pub max: f64,
    /// Values that a grid takes when its text does not name the parameter, in the grid's own syntax.
    pub default_values: &'static str,
    /// One line for help texts.
    pub doc: &'static str,
}

impl ParameterSpec {
    const fn window(name: &'static str, min: u32, default_values: &'static str, doc: &'static str) -> Self {
        Self { name, kind: Kind::Integer, min: min as f64, max: MAX_WINDOW as f64, default_values, doc }
    }

    const fn real(name: &'static str, kind: Kind, min: f64, max: f64, default_values: &'static str, doc: &'static str) -> Self {
        Self { name, kind, min, max, default_values, doc }
    }

    const fn short() -> Self {
        Self {
            name: "short",
            kind: Kind::Integer,
            min: 0.0,
            max: 1.0,
            default_values: "0",
            doc: "1 goes short when the fast average is not above the slow one, 0 stays out",
        }
    }

    /// What is legal, in words: `a whole number from 1 to 1048575`.
    #[must_use]
    pub fn legal(&self) -> String {
        let Self { min, max, .. } = self;
        match self.kind {
            Kind::Integer => format!("a whole number from {min} to {max}"),
            Kind::Real => format!("a number from {min} to {max}"),
            Kind::RealAbove => format!("a number above {min} and up to {max}"),
        }
    }

    /// Whether `value` is legal, also after rounding to f32.
    #[must_use]
    pub fn is_legal(&self, value: f64) -> bool {
        let in_range = value >= self.min && value <= self.max;
        in_range
            && match self.kind {
                Kind::Integer => value.fract() == 0.0,
                Kind::Real => true,
                Kind::RealAbove => f64::from(value as f32) > self.min,
            }
    }
}

/// One built-in strategy: its parameters, its rule between them, its warm-up.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct StrategySpec {
    /// Name on the command line and in results.
    pub name: &'static str,
    /// One line for help texts.
    pub doc: &'static str,
    /// Parameters in the order of the columns.
    pub parameters: &'static [ParameterSpec],
    /// Indices (a, b) of two parameters: a set is legal only if parameter a is below parameter b.
    pub below: Option<(usize, usize)>,
    /// First bar with a position for a set in the order of `parameters`; use [`StrategySpec::first_bar`].
    warm_up: fn(&[f64]) -> f64,
}

impl StrategySpec {
    /// The strategy called `name`.
    ///
    /// # Errors
    /// `Unknown` with the nearest name.
    pub fn named(name: &str) -> Result<&'static Self> {
        STRATEGIES.iter().find(|s| s.name == name).ok_or_else(|| unknown("strategy", name, &STRATEGIES.map(|s| s.name)))
    }

    /// First bar whose close can give a position, 0-based: every earlier weight is 0. `set` is in the order of `parameters`.
    ///
    /// A missing value counts as 0. The warm-up does not shrink when a parameter grows.
    #[must_use]
    pub fn first_bar(&self, set: &[f64]) -> u32 {
        (self.warm_up)(set).max(0.0) as u32
    }

    /// The default grid as text, for help and reports.
    #[must_use]
    pub fn default_grid(&self) -> String {
        let values: Vec<_> = self.parameters.iter().map(|p| format!("{}={}", p.name, p.default_values)).collect();
        values.join(",")
    }

    fn names(&self) -> Vec<&'static str> {
        self.parameters.iter().map(|p| p.name).collect()
    }

    /// The strategy's own rule on the values that run.
    fn is_legal(&self, set: &[f64]) -> bool {
        self.below.is_none_or(|(a, b)| (at(set, a) as f32) < (at(set, b) as f32))
    }

    /// An error about `name = value` in a grid of this strategy.
    fn bad(&self, name: impl Into<String>, value: impl Into<String>, help: impl Into<String>) -> Error {
        Error::Parameter { op: self.name, name: name.into(), value: value.into(), help: help.into() }
    }
}

fn at(set: &[f64], i: usize) -> f64 {
    set.get(i).copied().unwrap_or(0.0)
}

const CROSS: &[ParameterSpec] = &[
    ParameterSpec::window("fast", 1, "2:100", "bars of the fast average"),
    ParameterSpec::window("slow", 1, "20:400:2", "bars of the slow average, more than fast"),
    ParameterSpec::short(),
];

/// The built-in strategies.
pub static STRATEGIES: [StrategySpec; 7] = [
    StrategySpec {
        name: "sma_cross",
        doc: "long while the fast simple moving average is above the slow one",
        parameters: CROSS,
        below: Some((0, 1)),
        warm_up: |set| at(set, 1) - 1.0,
    },
    StrategySpec {
        name: "ema_cross",
        doc: "long while the fast exponential moving average is above the slow one",
        parameters: CROSS,
        below: Some((0, 1)),
        warm_up: |set| at(set, 1) - 1.0,
    },
    StrategySpec {
        name: "rsi_reversion",
        doc: "buys when Wilder's RSI falls below low, sells when it rises above high",
        parameters: &[
            ParameterSpec::window("period", 1, "2:30", "bars of the RSI"),
            ParameterSpec::real("low", Kind::Real, 0.0, 100.0, "5:45:2", "RSI below which to buy"),
            ParameterSpec::real("high", Kind::Real, 0.0, 100.0, "55:95:2", "RSI above which to sell, more than low"),
        ],
        below: Some((1, 2)),
        warm_up: |set| at(set, 0),
    },
    StrategySpec {
        name: "bollinger_reversion",
        doc: "buys below the lower Bollinger band, sells above the mean",
        parameters: &[
            ParameterSpec::window("period", 2, "5:200", "bars of mean and standard deviation"),
            ParameterSpec::real("width", Kind::Real, 0.0, 1000.0, "0.5:3.5:0.05", "distance of the band from the mean in standard deviations"),
        ],
        below: None,
        warm_up: |set| at(set, 0) - 1.0,
    },
    StrategySpec {
        name: "macd",
        doc: "long while the MACD line is above its signal line",
        parameters: &[
            ParameterSpec::window("fast", 1, "4:30", "bars of the fast exponential average"),
            ParameterSpec::window("slow", 1, "20:80:2", "bars of the slow exponential average, more than fast"),
            ParameterSpec::window("signal", 1, "3:20", "bars of the signal line"),
        ],
        below: Some((0, 1)),
        warm_up: |set| at(set, 1) + at(set, 2) - 2.0,
    },
    StrategySpec {
        name: "donchian_breakout",
        doc: "buys above the highest close of the previous entry bars, sells below the lowest of the previous exit bars",
        parameters: &[
            ParameterSpec::window("entry", 1, "10:250:2", "bars of the channel that opens a position"),
            ParameterSpec::window("exit", 1, "2:100", "bars of the channel that closes it"),
        ],
        below: None,
        warm_up: |set| at(set, 0),
    },
    StrategySpec {
        name: "ts_momentum",
        doc: "long or short by the sign of the past return, sized to a target volatility",
        parameters: &[
            ParameterSpec::window("lookback", 1, "10:260:2", "bars of the past return"),
            ParameterSpec::window("vol_window", 2, "10:120:10", "bars of the volatility estimate"),
            ParameterSpec::real("target_vol", Kind::RealAbove, 0.0, 100.0, "0.1|0.15|0.2", "annual volatility aimed at (0.15 is 15 %)"),
            ParameterSpec::real("max_leverage", Kind::RealAbove, 0.0, 1000.0, "1|2|3", "largest position, as a multiple of the equity"),
        ],
        below: None,
        warm_up: |set| at(set, 0).max(at(set, 1)),
    },
];

fn unknown(kind: &'static str, given: &str, known: &[&str]) -> Error {
    Error::Unknown { kind, given: given.into(), suggestion: nearest(given, known), known: known.iter().map(|k| (*k).to_owned()).collect() }
}

/// The known name that `given` is likely to mean: one within a third of its letters, or one that holds it.
fn nearest(given: &str, known: &[&str]) -> Option<String> {
    let given = given.to_lowercase().replace(['-', ' '], "_");
    let distance = |k: &&&str| strsim::damerau_levenshtein(&given, k);
    let close = known.iter().min_by_key(distance).filter(|k| distance(k) <= 1 + k.len() / 3);
    let held = || known.iter().find(|k| given.len() >= 3 && (k.contains(&given) || given.contains(*k)));
    close.or_else(held).map(|k| (*k).to_owned())
}

// ---- the values of one parameter --------------------------------------------------------------------------------

/// A range that is not expanded, or a list.
#[derive(Debug, Clone, PartialEq)]
enum Values {
    Range { first: f64, step: f64, last: f64, count: u64 },
    List(Vec<f64>),
}

#[derive(Debug, Clone, PartialEq)]
struct Axis {
    text: String,
    values: Values,
}

impl Axis {
    /// Reads `5`, `5|10`, `2:100:2`, `10:500:log20` and lists of these.
    fn parse(strategy: &StrategySpec, spec: &ParameterSpec, text: &str) -> Result<Self> {
        let bad = |value: &str, help: String| strategy.bad(spec.name, value, help);
        if text.trim().is_empty() {
            return Err(bad(text, format!("has no values; write {}={}", spec.name, spec.default_values)));
        }
        let mut pieces = text.split('|').map(|piece| Values::parse(strategy, spec, piece.trim())).collect::<Result<Vec<_>>>()?;
        let text = text.split('|').map(str::trim).collect::<Vec<_>>().join("|");
        let n = pieces.iter().fold(0u64, |n, piece| n.saturating_add(piece.len()));
        if n > MAX_VALUES {
            return Err(bad(&text, format!("{n} values; one parameter takes at most {MAX_VALUES}, so use a bigger step or a log range such as a:b:log50")));
        }
        if let (1, Some(Values::Range { .. })) = (pieces.len(), pieces.first()) {
            return Ok(Self { text, values: pieces.swap_remove(0) });
        }
        // Several pieces: listed, each value once.
        let mut seen = std::collections::HashSet::new();
        let all = pieces.iter().flat_map(|p| (0..p.len()).map(|i| p.get(i)));
        // + 0.0 turns -0 into 0, so that the two are one value.
        let list: Vec<f64> = all.filter(|v| seen.insert((*v as f32 + 0.0).to_bits())).collect();
        Ok(Self { text, values: Values::List(list) })
    }

    /// The axis with about `factor` times fewer values, for the help of a grid that is too large.
    fn thinned(&self, factor: f64) -> Option<String> {
        let Values::Range { first, step, last, count } = &self.values else { return None };
        let points = ((*count as f64 / factor).floor()).clamp(2.0, f64::from(MAX_LOG_POINTS));
        // Rounding to whole numbers may merge points of a log range: that only thins it more.
        let step = step * ((*count as f64 - 1.0) / (points - 1.0)).ceil();
        Some(if *first > 0.0 { format!("{first}:{last}:log{points}") } else { format!("{first}:{last}:{step}") })
    }
}

impl Values {
    fn len(&self) -> u64 {
        match self {
            Self::Range { count, .. } => *count,
            Self::List(list) => list.len() as u64,
        }
    }

    fn get(&self, i: u64) -> f64 {
        match self {
            Self::Range { first, step, last, .. } => (first + i as f64 * step).min(*last),
            Self::List(list) => list.get(i as usize).copied().unwrap_or(f64::NAN),
        }
    }

    fn max(&self) -> f64 {
        match self {
            Self::Range { count, .. } => self.get(count.saturating_sub(1)),
            Self::List(list) => list.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        }
    }

    /// One piece of a list: a number or a range, with legal values only.
    fn parse(strategy: &StrategySpec, spec: &ParameterSpec, piece: &str) -> Result<Self> {
        let bad = |help: String| strategy.bad(spec.name, piece, help);
        let number = |text: &str| -> Result<f64> {
            let text = text.trim();
            if text.is_empty() {
                return Err(bad("a number is missing; write 5, 5|10, 2:100, 2:100:2 or 2:100:log20".into()));
            }
            match text.parse::<f64>() {
                Ok(value) if value.is_finite() => Ok(value),
                Ok(_) => Err(bad(format!("'{text}' is not finite; {} takes {}", spec.name, spec.legal()))),
                Err(_) => Err(bad(format!("'{text}' is not a number; write 5, 5|10, 2:100, 2:100:2 or 2:100:log20, and a comma before the next parameter"))),
            }
        };
        let legal = |value: f64| -> Result<f64> {
            if spec.is_legal(value) { Ok(value) } else { Err(bad(format!("{value} is not legal, {} takes {}", spec.name, spec.legal()))) }
        };
        let parts: Vec<&str> = piece.split(':').collect();
        let (a, b, step) = match parts.as_slice() {
            [single] => return Ok(Self::List(vec![legal(number(single)?)?])),
            [a, b] => (number(a)?, number(b)?, "1"),
            [a, b, step] => (number(a)?, number(b)?, step.trim()),
            _ => return Err(bad("too many colons; a range is first:last, first:last:step or first:last:logN".into())),
        };
        if a > b {
            return Err(bad(format!("the range runs down from {a} to {b}; write the smaller end first, {b}:{a}")));
        }
        let (a, b) = (legal(a)?, legal(b)?);
        if let Some(points) = step.strip_prefix("log") {
            let help = || bad(format!("a log range needs its number of points, 2 to {MAX_LOG_POINTS}, such as {a}:{b}:log20"));
            let points: u32 = points.parse().map_err(|_| help())?;
            return match points {
                2..=MAX_LOG_POINTS if a > 0.0 => Ok(Self::log_spaced(spec, a, b, points)),
                2..=MAX_LOG_POINTS => Err(bad(format!("a log range cannot start at {a}; start above 0"))),
                _ => Err(help()),
            };
        }
        let step = number(step)?;
        if step <= 0.0 {
            return Err(bad(format!("the step is {step}; it must be above 0")));
        }
        if spec.kind == Kind::Integer && step.fract() != 0.0 {
            return Err(bad(format!("the step {step} is not a whole number, as {} needs", spec.name)));
        }
        let quotient = (b - a) / step;
        let count = (quotient + EQUAL * (1.0 + quotient)).floor() + 1.0;
        // Neighbours further apart than one ulp of the largest value are two f32 values.
        let largest = (a.abs().max(b.abs())) as f32;
        if count > 1.0 && step < f64::from(largest.next_up()) - f64::from(largest) {
            return Err(bad(format!("the step {step} is finer than single precision at {largest}; use a bigger one")));
        }
        Ok(Self::Range { first: a, step, last: b, count: count as u64 })
    }

    fn log_spaced(spec: &ParameterSpec, a: f64, b: f64, points: u32) -> Self {
        let ratio = (b / a).ln();
        let round = |value: f64| if spec.kind == Kind::Integer { value.round() } else { value };
        // Both ends exact, whatever exp and ln round to.
        let point = |i: u32| match i {
            0 => a,
            i if i == points - 1 => b,
            i => round(a * (ratio * f64::from(i) / f64::from(points - 1)).exp()).clamp(a, b),
        };
        let mut list: Vec<f64> = (0..points).map(point).collect();
        list.dedup_by_key(|v| *v as f32);
        Self::List(list)
    }
}

// ---- constraints ------------------------------------------------------------------------------------------------

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    Equal,
    NotEqual,
}

impl Comparison {
    /// Two-character operators first, so that `<=` is not read as `<`.
    const ALL: [(&'static str, Self); 9] = [
        ("<=", Self::LessEqual),
        (">=", Self::GreaterEqual),
        ("==", Self::Equal),
        ("!=", Self::NotEqual),
        ("≤", Self::LessEqual),
        ("≥", Self::GreaterEqual),
        ("≠", Self::NotEqual),
        ("<", Self::Less),
        (">", Self::Greater),
    ];

    /// Splits `slow>=3*fast` at its first operator.
    fn split(text: &str) -> Option<(&str, Self, &str)> {
        let found = Self::ALL.iter().filter_map(|(symbol, op)| text.find(symbol).map(|i| (i, *symbol, *op)));
        // Of operators that start at the same place the first in the table is the longest.
        let (i, symbol, op) = found.min_by_key(|(i, symbol, _)| (*i, std::cmp::Reverse(symbol.len())))?;
        Some((text.get(..i)?, op, text.get(i + symbol.len()..)?))
    }

    /// Whether `difference` = left − right is as asked; `scale` is the sum of the absolute terms of both sides.
    fn holds(self, difference: f64, scale: f64) -> bool {
        let equal = difference.abs() <= EQUAL * scale;
        match self {
            Self::Less => difference < 0.0 && !equal,
            Self::LessEqual => difference < 0.0 || equal,
            Self::Greater => difference > 0.0 && !equal,
            Self::GreaterEqual => difference > 0.0 || equal,
            Self::Equal => equal,
            Self::NotEqual => !equal,
        }
    }

    /// The symbol of the opposite, for "fast ≥ slow in all 12 combinations".
    fn opposite(self) -> &'static str {
        match self {
            Self::Less => "≥",
            Self::LessEqual => ">",
            Self::Greater => "≤",
            Self::GreaterEqual => "<",
            Self::Equal => "≠",
            Self::NotEqual => "=",
        }
    }
}

/// Σ weights[p]·parameter[p] + constant compared with 0.
#[derive(Debug, Clone, PartialEq)]
struct Constraint {
    text: String,
    broken: String,
    weights: Vec<f64>,
    constant: f64,
    comparison: Comparison,
}

impl Constraint {
    fn parse(strategy: &StrategySpec, text: &str) -> Result<Self> {
        let bad = |help: &str| strategy.bad("constraint", text, help);
        let (left, comparison, right) = Comparison::split(text).ok_or_else(|| bad("has no comparison; write one such as slow>=3*fast"))?;
        if Comparison::split(right).is_some() {
            return Err(bad("compares more than once; write two constraints with a comma between them, such as 5<fast,fast<slow"));
        }
        if left.contains('=') || right.contains('=') {
            return Err(bad("mixes = with a comparison; the operators are < <= > >= == !="));
        }
        let (left, right) = (left.trim(), right.trim());
        let mut this = Self {
            text: text.trim().to_owned(),
            broken: format!("{left} {} {right}", comparison.opposite()),
            weights: vec![0.0; strategy.parameters.len()],
            constant: 0.0,
            comparison,
        };
        this.add(strategy, left, 1.0)?;
        this.add(strategy, right, -1.0)?;
        let finite = this.weights.iter().chain([&this.constant]).all(|w| w.is_finite());
        if !finite {
            return Err(bad("its numbers are too large"));
        }
        if this.weights.iter().all(|w| *w == 0.0) {
            return Err(bad("depends on no parameter, so it keeps all sets or none"));
        }
        Ok(this)
    }

    /// Adds sign · expression.
    fn add(&mut self, strategy: &StrategySpec, expression: &str, sign: f64) -> Result<()> {
        let bad = |help: String| strategy.bad("constraint", self.text.clone(), help);
        let mut terms = Vec::new();
        let (mut weight, mut name) = (sign, None);
        let mut rest = expression.trim_start();
        // A sign is legal before the first term only; afterwards + and - stand between terms, * between factors.
        if let Some(after) = rest.strip_prefix('-') {
            (weight, rest) = (-sign, after.trim_start());
        }
        loop {
            let end = token_end(rest);
            let (token, after) = rest.split_at(end);
            if let Some(p) = strategy.parameters.iter().position(|p| p.name == token) {
                if name.replace(p).is_some() {
                    return Err(bad("multiplies two parameters; only numbers times parameters are legal, such as slow>=3*fast".into()));
                }
            } else if let Ok(value) = token.parse::<f64>()
                && token.starts_with(|c: char| c.is_ascii_digit() || c == '.')
            {
                weight *= value;
            } else if token.starts_with(|c: char| c.is_alphabetic() || c == '_') {
                return Err(unknown("parameter", token, &strategy.names()));
            } else {
                let found = if rest.is_empty() { "its end".to_owned() } else { format!("'{rest}'") };
                return Err(bad(format!("expected a number or a parameter at {found}; a constraint holds numbers, parameters, + - * and one comparison")));
            }
            rest = after.trim_start();
            let mut next = rest.chars();
            match next.next() {
                Some('*') => {}
                operator @ (Some('+' | '-') | None) => {
                    terms.push((name.take(), weight));
                    weight = if operator == Some('-') { -sign } else { sign };
                    if operator.is_none() {
                        break;
                    }
                }
                Some(_) => return Err(bad(format!("expected + - or * at '{rest}'; a constraint holds numbers, parameters, + - * and one comparison"))),
            }
            rest = next.as_str().trim_start();
        }
        for (name, weight) in terms {
            match name.and_then(|p| self.weights.get_mut(p)) {
                Some(sum) => *sum += weight,
                None => self.constant += weight,
            }
        }
        Ok(())
    }

    fn holds(&self, set: &[f64]) -> bool {
        let (mut difference, mut scale) = (self.constant, self.constant.abs());
        for (weight, value) in self.weights.iter().zip(set) {
            difference += weight * value;
            scale += (weight * value).abs();
        }
        self.comparison.holds(difference, scale)
    }
}

/// Length of the name or number at the start of `text`; 0 if there is none.
fn token_end(text: &str) -> usize {
    let number = text.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    let mut before = ' ';
    let ends = |(_, c): &(usize, char)| {
        let exponent_sign = number && matches!(before, 'e' | 'E') && matches!(c, '+' | '-');
        before = *c;
        !(c.is_alphanumeric() || *c == '_' || (number && *c == '.') || exponent_sign)
    };
    text.char_indices().find(ends).map_or(text.len(), |(i, _)| i)
}

// ---- the grid ---------------------------------------------------------------------------------------------------

/// All combinations of the values of a strategy's parameters, less the illegal ones.
#[derive(Debug, Clone)]
pub struct Grid {
    strategy: &'static StrategySpec,
    axes: Vec<Axis>,
    constraints: Vec<Constraint>,
    counted: Option<u64>,
    warm_up: u32,
}

impl Grid {
    /// Reads a grid of `strategy`; without text it is the strategy's default grid. The syntax stands at the head of this module.
    ///
    /// # Errors
    /// `Unknown` for a strategy or parameter, with the nearest name; `Parameter` for a malformed, illegal or repeated entry and for
    /// a grid whose constraints leave nothing.
    pub fn parse(strategy: &str, text: Option<&str>) -> Result<Self> {
        let strategy = StrategySpec::named(strategy)?;
        let mut given: Vec<Option<String>> = vec![None; strategy.parameters.len()];
        let mut constraints = Vec::new();
        // The parameter whose list a bare number continues.
        let mut open = None;
        for entry in text.into_iter().flat_map(|t| t.split(',')) {
            let entry = entry.trim();
            if entry.is_empty() {
                let text = text.unwrap_or_default().trim();
                let help = if text.is_empty() { "is empty; leave it out for the default grid" } else { "has an entry without content; remove the extra comma" };
                return Err(strategy.bad("grid", text, format!("{help}, or write one such as {}", strategy.default_grid())));
            }
            if Comparison::split(entry).is_some() {
                constraints.push(Constraint::parse(strategy, entry)?);
                open = None;
            } else if let Some((name, values)) = entry.split_once('=') {
                let name = name.trim();
                let p = strategy.parameters.iter().position(|p| p.name == name).ok_or_else(|| unknown("parameter", name, &strategy.names()))?;
                if let Some(slot) = given.get_mut(p) {
                    if let Some(first) = slot {
                        let help = format!("is given twice, first as {first}; put all its values in one list, {name}={first}|{}", values.trim());
                        return Err(strategy.bad(name, values.trim(), help));
                    }
                    *slot = Some(values.trim().to_owned());
                }
                open = Some(p);
            } else if let Some(list) = open.and_then(|p| given.get_mut(p)).and_then(Option::as_mut) {
                if strategy.parameters.iter().any(|p| p.name == entry) {
                    return Err(strategy.bad(entry, "", format!("has no values; write {entry}=5, {entry}=5|10 or {entry}=2:100:2")));
                }
                list.push('|');
                list.push_str(entry);
            } else {
                return Err(strategy.bad("grid", entry, format!("belongs to no parameter; write name=values with a name of {}", strategy.names().join(", "))));
            }
        }
        let axes = strategy.parameters.iter().zip(given).map(|(spec, text)| Axis::parse(strategy, spec, text.as_deref().unwrap_or(spec.default_values)));
        let mut grid = Self { strategy, axes: axes.collect::<Result<_>>()?, constraints, counted: None, warm_up: 0 };
        grid.count();
        if grid.counted == Some(0) { Err(grid.nothing_left()) } else { Ok(grid) }
    }

    /// The strategy.
    #[must_use]
    pub fn strategy(&self) -> &'static StrategySpec {
        self.strategy
    }

    /// Number of legal sets. Where they are not counted ([`Grid::is_counted`]) it is the number of all combinations, an upper bound.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.counted.unwrap_or_else(|| u64::try_from(self.raw_len()).unwrap_or(u64::MAX))
    }

    /// Always false: a grid known to be empty is refused when it is read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether [`Grid::len`] is exact: the parameters that stand in constraints have at most [`MAX_COUNTED`] combinations.
    #[must_use]
    pub fn is_counted(&self) -> bool {
        self.counted.is_some()
    }

    /// Number of all combinations, legal or not.
    #[must_use]
    pub fn raw_len(&self) -> u128 {
        // Four parameters of at most 2^20 values: no overflow, but nothing depends on that.
        self.axes.iter().fold(1, |n: u128, axis| n.saturating_mul(u128::from(axis.values.len())))
    }

    /// First bar at which every set has had its warm-up: the longest [`StrategySpec::first_bar`] of the legal sets
    /// (of all combinations where the legal ones are not counted).
    #[must_use]
    pub fn warm_up(&self) -> u32 {
        self.warm_up
    }

    /// The legal sets one after the other, each in the order of the strategy's parameters; nothing is stored.
    pub fn iter(&self) -> impl Iterator<Item = Vec<f32>> + '_ {
        let mut odometer = Some(Odometer::new(&self.axes));
        std::iter::from_fn(move || {
            loop {
                let current = odometer.as_mut()?;
                let set = self.is_legal(&current.values).then(|| current.values.iter().map(|v| *v as f32).collect());
                if !current.advance() {
                    odometer = None;
                }
                if set.is_some() {
                    return set;
                }
            }
        })
    }

    /// The set of a combination, first parameter fastest; `None` if it is illegal or there is no such combination.
    #[must_use]
    pub fn at_raw(&self, index: u64) -> Option<Vec<f32>> {
        let mut rest = index;
        let mut set = Vec::with_capacity(self.axes.len());
        for axis in &self.axes {
            let n = axis.values.len().max(1);
            set.push(axis.values.get(rest % n));
            rest /= n;
        }
        (rest == 0 && self.is_legal(&set)).then(|| set.into_iter().map(|v| v as f32).collect())
    }

    /// Columns without a set.
    pub(crate) fn no_sets(&self) -> ParameterSets {
        ParameterSets { strategy: self.strategy, names: self.strategy.names(), columns: vec![Vec::new(); self.axes.len()] }
    }

    /// All legal sets as columns.
    ///
    /// # Errors
    /// `TooLarge` if there are more than `limit` (or than u32 can number), with a way to thin the grid; `Parameter` if
    /// the constraints leave nothing; `OutOfMemory`.
    pub fn sets(&self, limit: u64) -> Result<ParameterSets> {
        let limit = limit.min(u64::from(u32::MAX));
        if self.len() > limit {
            return Err(self.too_large(limit));
        }
        if self.raw_len() > MAX_VISITED {
            let what = format!("finding the {} legal sets of the {} grid {self}", self.len(), self.strategy.name);
            let needed = u64::try_from(self.raw_len()).unwrap_or(u64::MAX);
            let help = "name the values themselves instead of removing most of them by a constraint".into();
            return Err(Error::TooLarge { what, needed, limit: MAX_VISITED as u64, unit: "combinations", help });
        }
        let mut columns: Vec<Vec<f32>> = vec![Vec::new(); self.axes.len()];
        let expected = self.counted.unwrap_or(0);
        for column in &mut columns {
            let room = usize::try_from(expected).ok().and_then(|n| column.try_reserve_exact(n).ok());
            room.ok_or_else(|| Error::OutOfMemory { device: "the host".into(), doing: format!("listing {expected} parameter sets") })?;
        }
        let mut odometer = Odometer::new(&self.axes);
        loop {
            if self.is_legal(&odometer.values) {
                for (column, value) in columns.iter_mut().zip(&odometer.values) {
                    column.push(*value as f32);
                }
            }
            if !odometer.advance() {
                break;
            }
        }
        if columns.first().is_none_or(Vec::is_empty) {
            return Err(self.nothing_left());
        }
        Ok(ParameterSets { strategy: self.strategy, names: self.strategy.names(), columns })
    }

    fn is_legal(&self, set: &[f64]) -> bool {
        self.strategy.is_legal(set) && self.constraints.iter().all(|c| c.holds(set))
    }

    /// Counts the legal sets and takes their longest warm-up. Parameters in no constraint only multiply the count; for the warm-up,
    /// which grows with each parameter, they stand at their largest value.
    fn count(&mut self) {
        let bound = |p: usize| {
            let own = self.strategy.below.is_some_and(|(a, b)| a == p || b == p);
            own || self.constraints.iter().any(|c| c.weights.get(p).is_some_and(|w| *w != 0.0))
        };
        let top = |axis: &Axis| Axis { text: String::new(), values: Values::List(vec![axis.values.max()]) };
        let reduced: Vec<Axis> = self.axes.iter().enumerate().map(|(p, axis)| if bound(p) { axis.clone() } else { top(axis) }).collect();
        let combinations = reduced.iter().fold(1, |n: u128, axis| n.saturating_mul(u128::from(axis.values.len())));
        if combinations > MAX_COUNTED {
            let largest: Vec<f64> = self.axes.iter().map(|axis| axis.values.max()).collect();
            self.warm_up = self.strategy.first_bar(&largest);
            return;
        }
        let (mut legal, mut warm_up) = (0u128, 0);
        let mut odometer = Odometer::new(&reduced);
        loop {
            if self.is_legal(&odometer.values) {
                legal += 1;
                warm_up = warm_up.max(self.strategy.first_bar(&odometer.values));
            }
            if !odometer.advance() {
                break;
            }
        }
        let all = legal.saturating_mul(self.raw_len() / combinations.max(1));
        self.counted = Some(u64::try_from(all).unwrap_or(u64::MAX));
        self.warm_up = warm_up;
    }

    /// Says which constraint removes how much. Only called for grids that were gone through already.
    fn nothing_left(&self) -> Error {
        let own = self.strategy.below.map(|(a, b)| {
            let name = |p: usize| self.strategy.parameters.get(p).map_or("", |p| p.name);
            format!("{} ≥ {}", name(a), name(b))
        });
        let mut broken: Vec<(String, u64)> = own.into_iter().chain(self.constraints.iter().map(|c| c.broken.clone())).map(|text| (text, 0)).collect();
        let mut odometer = Odometer::new(&self.axes);
        let (mut seen, mut budget) = (0u64, MAX_COUNTED as u64);
        loop {
            let own = self.strategy.below.map(|_| self.strategy.is_legal(&odometer.values));
            let holds = own.into_iter().chain(self.constraints.iter().map(|c| c.holds(&odometer.values)));
            for ((_, count), holds) in broken.iter_mut().zip(holds) {
                *count += u64::from(!holds);
            }
            seen += 1;
            budget -= 1;
            if budget == 0 || !odometer.advance() {
                break;
            }
        }
        let whole = u128::from(seen) == self.raw_len();
        let which = if whole { format!("all {seen}") } else { format!("the first {seen}") };
        let reason = match broken.iter().find(|(_, count)| *count == seen) {
            Some((text, _)) => format!("{text} in {which} combinations"),
            None => {
                let parts: Vec<_> = broken.iter().filter(|(_, count)| *count > 0).map(|(text, count)| format!("{text} in {count}")).collect();
                format!("{} of {which} combinations", parts.join(", "))
            }
        };
        self.strategy.bad("grid", self.to_string(), format!("{reason}, so no set is left; widen a range or relax a constraint"))
    }

    fn too_large(&self, limit: u64) -> Error {
        let needed = self.len();
        // Spread the thinning evenly over the long ranges.
        let long: Vec<_> = self.axes.iter().zip(self.strategy.parameters).filter(|(axis, _)| axis.values.len() > 10 && axis.thinned(1.0).is_some()).collect();
        let excess = self.counted.map_or(self.raw_len() as f64, |n| n as f64) / limit.max(1) as f64;
        let factor = excess.powf(1.0 / long.len().max(1) as f64);
        let thinner: Vec<_> = long.iter().filter_map(|(axis, spec)| axis.thinned(factor).map(|text| format!("{}={text}", spec.name))).collect();
        let counted = if self.is_counted() { "" } else { " (before constraints, too many to count)" };
        let example = if thinner.is_empty() { String::new() } else { format!(", for example {}", thinner.join(",")) };
        Error::TooLarge {
            what: format!("the {} grid {self}{counted}", self.strategy.name),
            needed,
            limit,
            unit: "sets",
            help: format!("use bigger steps (first:last:step), log ranges (first:last:log20) or fewer values{example}"),
        }
    }
}

/// The grid in its own syntax, every parameter named: reads back as the same grid.
impl fmt::Display for Grid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (axis, spec)) in self.axes.iter().zip(self.strategy.parameters).enumerate() {
            write!(f, "{}{}={}", if i == 0 { "" } else { "," }, spec.name, axis.text)?;
        }
        self.constraints.iter().try_for_each(|c| write!(f, ",{}", c.text))
    }
}

/// Goes through all combinations, first axis fastest.
struct Odometer<'a> {
    axes: &'a [Axis],
    index: Vec<u64>,
    values: Vec<f64>,
}

impl<'a> Odometer<'a> {
    fn new(axes: &'a [Axis]) -> Self {
        Self { axes, index: vec![0; axes.len()], values: axes.iter().map(|axis| axis.values.get(0)).collect() }
    }

    /// Moves on; false after the last combination.
    fn advance(&mut self) -> bool {
        for ((axis, index), value) in self.axes.iter().zip(&mut self.index).zip(&mut self.values) {
            *index += 1;
            if *index < axis.values.len() {
                *value = axis.values.get(*index);
                return true;
            }
            *index = 0;
            *value = axis.values.get(0);
        }
        false
    }
}

/// The sets of a sweep as columns `[P][S]`, in the order of the strategy's parameters.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ParameterSets {
    /// The strategy.
    pub strategy: &'static StrategySpec,
    /// Parameter names `[P]`.
    pub names: Vec<&'static str>,
    /// One column per parameter `[P][S]`.
    pub columns: Vec<Vec<f32>>,
}

impl ParameterSets {
    /// Number of sets S.
    #[must_use]
    pub fn len(&self) -> usize {
        self.columns.first().map_or(0, Vec::len)
    }

    /// Whether there is no set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Set `i` as names and values; empty if there is no such set.
    #[must_use]
    pub fn get(&self, i: usize) -> Vec<(&'static str, f32)> {
        self.names.iter().zip(&self.columns).filter_map(|(name, column)| column.get(i).map(|value| (*name, *value))).collect()
    }

    /// The column of parameter `name`.
    #[must_use]
    pub fn column(&self, name: &str) -> Option<&[f32]> {
        self.names.iter().position(|n| *n == name).and_then(|p| self.columns.get(p)).map(Vec::as_slice)
    }

    /// First bar of set `i`, as [`StrategySpec::first_bar`].
    #[must_use]
    pub fn first_bar(&self, i: usize) -> u32 {
        let set: Vec<f64> = self.get(i).iter().map(|(_, value)| f64::from(*value)).collect();
        self.strategy.first_bar(&set)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn grid(strategy: &str, text: &str) -> Grid {
        Grid::parse(strategy, Some(text)).unwrap_or_else(|e| panic!("{strategy} {text}: {e}"))
    }

    fn error(strategy: &str, text: &str) -> String {
        Grid::parse(strategy, Some(text)).map(|g| g.to_string()).unwrap_err().to_string()
    }

    fn column(strategy: &str, text: &str, name: &str) -> Vec<f32> {
        grid(strategy, text).sets(1 << 20).unwrap().column(name).unwrap().to_vec()
    }

    #[test]
    fn every_strategy_has_a_large_legal_default() {
        for strategy in &STRATEGIES {
            let grid = Grid::parse(strategy.name, None).unwrap();
            assert!(grid.is_counted() && grid.len() >= 10_000, "{}: {}", strategy.name, grid.len());
            let sets = grid.sets(grid.len()).unwrap();
            assert_eq!(sets.len() as u64, grid.len());
            assert_eq!((0..sets.len()).map(|i| sets.first_bar(i)).max(), Some(grid.warm_up()), "{}", strategy.name);
            for (spec, column) in strategy.parameters.iter().zip(&sets.columns) {
                assert!(column.iter().all(|v| spec.is_legal(f64::from(*v))), "{} {}", strategy.name, spec.name);
            }
            assert_eq!(Grid::parse(strategy.name, Some(&strategy.default_grid())).unwrap().to_string(), grid.to_string());
            assert_eq!(grid.iter().count() as u64, grid.len());
        }
    }

    #[test]
    fn first_bars() {
        let first = |name: &str, set: &[f64]| StrategySpec::named(name).unwrap().first_bar(set);
        assert_eq!(first("sma_cross", &[2.0, 20.0, 0.0]), 19);
        assert_eq!(first("ema_cross", &[1.0, 2.0, 1.0]), 1);
        assert_eq!(first("rsi_reversion", &[14.0, 30.0, 70.0]), 14);
        assert_eq!(first("bollinger_reversion", &[20.0, 2.0]), 19);
        assert_eq!(first("macd", &[12.0, 26.0, 9.0]), 33);
        assert_eq!(first("donchian_breakout", &[20.0, 10.0]), 20);
        assert_eq!(first("ts_momentum", &[252.0, 60.0, 0.15, 2.0]), 252);
        assert_eq!(first("ts_momentum", &[5.0, 60.0, 0.15, 2.0]), 60);
        assert_eq!(first("macd", &[]), 0);
    }

    #[test]
    fn order_is_first_parameter_fastest() {
        let sets = grid("sma_cross", " slow = 4 , 9, fast=3:5 , short=0|1").sets(100).unwrap();
        assert_eq!(sets.columns[0], [3.0, 3.0, 4.0, 5.0, 3.0, 3.0, 4.0, 5.0]);
        assert_eq!(sets.columns[1], [4.0, 9.0, 9.0, 9.0, 4.0, 9.0, 9.0, 9.0]);
        assert_eq!(sets.columns[2], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(sets.get(2), [("fast", 4.0), ("slow", 9.0), ("short", 0.0)]);
        assert!(sets.get(8).is_empty());
        // The million pairs of the standard workload, in its order.
        let pairs = grid("sma_cross", "fast=2:101,slow=102:501");
        let third = pairs.iter().nth(102).unwrap();
        assert_eq!((pairs.len(), third), (40_000, vec![4.0, 103.0, 0.0]));
    }

    #[test]
    fn values() {
        assert_eq!(column("donchian_breakout", "entry=2:9:3,exit=1", "entry"), [2.0, 5.0, 8.0]);
        assert_eq!(column("donchian_breakout", "entry=2:8:3,exit=1", "entry"), [2.0, 5.0, 8.0]);
        assert_eq!(column("donchian_breakout", "entry=5|2:4,8,5:6|1e1,exit=1", "entry"), [5.0, 2.0, 3.0, 4.0, 8.0, 6.0, 10.0]);
        assert_eq!(column("donchian_breakout", "entry=1:10:log5,exit=1", "entry"), [1.0, 2.0, 3.0, 6.0, 10.0]);
        assert_eq!(column("donchian_breakout", "entry=7:7:log20,exit=1", "entry"), [7.0]);
        assert_eq!(column("donchian_breakout", "entry=7:7:5,exit=1", "entry"), [7.0]);
        assert_eq!(column("bollinger_reversion", "period=20,width=0.5:0.9:0.1", "width"), [0.5, 0.6, 0.7, 0.8, 0.9]);
        assert_eq!(column("bollinger_reversion", "period=20,width=0|-0.0|0.0", "width").len(), 1);
        let logs = column("ts_momentum", "lookback=20,vol_window=20,target_vol=0.05:0.8:log5,max_leverage=1", "target_vol");
        assert_eq!(logs.len(), 5);
        assert!(logs.windows(2).all(|w| (w[1] / w[0] - 2.0).abs() < 1e-6), "{logs:?}");
    }

    #[test]
    fn constraints() {
        assert_eq!(grid("sma_cross", "fast=1:10,slow=1:30,slow>=3*fast").len(), (1..=10).map(|f| 31 - 3 * f).sum::<u64>());
        assert_eq!(grid("rsi_reversion", "period=2,low=10:50:10,high=50:90:10,high-low>20").len(), 5 + 5 + 4 + 3 + 2);
        assert_eq!(grid("macd", "fast=2:10,slow=20,signal=2:10,signal==fast").len(), 9);
        assert_eq!(grid("macd", "fast=2:10,slow=20,signal=2:10,signal != fast").len(), 72);
        assert_eq!(grid("macd", "fast=2:10,slow=20,signal=2:10,-fast*2 + 1.5e+1≥signal").len(), 9 + 8 + 6 + 4 + 2);
        // Tenths are equal although they are not in binary.
        assert_eq!(grid("bollinger_reversion", "period=2,width=0.1:1:0.1,width*10==3").len(), 1);
        assert_eq!(grid("bollinger_reversion", "period=2,width=0.1:1:0.1,0.7-width>0.4").len(), 2);
        // The warm-up is that of the sets that are left.
        assert_eq!(grid("sma_cross", "fast=2:10,slow=20:400,slow<100").warm_up(), 98);
        assert_eq!(grid("macd", "fast=2:10,slow=20:400,signal=5|9|7,slow<=10*fast").warm_up(), 107);
    }

    #[test]
    fn grids_beyond_reason_are_answered_at_once() {
        let grid = grid("sma_cross", "fast=1:1000000,slow=1:1000000");
        assert_eq!((grid.len(), grid.raw_len(), grid.is_counted(), grid.warm_up()), (1_000_000_000_000, 1_000_000_000_000, false, 999_999));
        let text = grid.sets(1_000_000).unwrap_err().to_string();
        assert!(text.contains("needs 1000000000000 sets, the limit is 1000000") && text.contains("fast=1:1000000:log1000,slow=1:1000000:log1000"), "{text}");
        let thinner = Grid::parse("sma_cross", Some("fast=1:1000000:log1000,slow=1:1000000:log1000")).unwrap();
        assert!(thinner.sets(1_000_000).is_ok());
        let huge = Grid::parse("ts_momentum", Some("lookback=1:1048575,vol_window=2:1048575,target_vol=1:2:0.000001,max_leverage=1:2:0.000001")).unwrap();
        assert_eq!((huge.len(), huge.is_counted()), (u64::MAX, true));
        assert!(matches!(huge.sets(u64::MAX), Err(Error::TooLarge { .. })));
        let sparse =
            Grid::parse("ts_momentum", Some("lookback=2:7000,vol_window=2:7000,target_vol=0.001:1:0.001,max_leverage=1:2:0.01,lookback==3*vol_window"));
        assert!(matches!(sparse.unwrap().sets(u64::MAX), Err(Error::TooLarge { unit: "combinations", .. })));
    }

    #[test]
    fn nothing_left() {
        let text = error("sma_cross", "fast=20:22,slow=10:13");
        assert!(text.contains("fast ≥ slow in all 12 combinations"), "{text}");
        let text = error("sma_cross", "fast=2:4,slow=10:13,slow>=20*fast");
        assert!(text.contains("slow < 20*fast in all 12 combinations"), "{text}");
        let text = error("sma_cross", "fast=10:11,slow=10:11,slow==fast");
        assert!(text.contains("fast ≥ slow in 3, slow ≠ fast in 2 of all 4 combinations"), "{text}");
    }

    #[test]
    fn errors_say_what_and_how() {
        for (text, want) in [
            ("fsat=2:10", "unknown parameter 'fsat'; did you mean 'fast'? (known: fast, slow, short)"),
            ("lookback=5", "unknown parameter 'lookback' (known"),
            ("fsat<slow", "did you mean 'fast'?"),
            ("fast=100:2", "write the smaller end first, 2:100"),
            ("fast=2:100:0", "the step is 0; it must be above 0"),
            ("fast=2:100:-2", "the step is -2"),
            ("fast=2:100:nan", "not finite"),
            ("fast=2:100:0.5", "not a whole number"),
            ("fast=2:100:2:3", "too many colons"),
            ("fast=2:100:log", "such as 2:100:log20"),
            ("fast=2:100:log1", "such as 2:100:log20"),
            ("fast=2:100:log1000000", "2 to 65536"),
            ("fast=2.5", "fast takes a whole number from 1 to 1048575"),
            ("fast=0:10", "0 is not legal"),
            ("fast=1:1e18", "1000000000000000000 is not legal"),
            ("fast=1e400", "not finite"),
            ("short=2", "a whole number from 0 to 1"),
            ("fast=2,fast=3", "given twice, first as 2"),
            ("fast=", "has no values; write fast=2:100"),
            ("fast=5||7", "a number is missing"),
            ("fast=5,", "remove the extra comma"),
            (" ", "leave it out for the default grid"),
            ("fast=5,x", "'x' is not a number"),
            ("fast=5,slow", "slow = : has no values"),
            ("5,fast=5", "belongs to no parameter"),
            ("fast=5,fast<slow,10", "belongs to no parameter"),
            ("fast=2:10 slow=20", "comma before the next parameter"),
            ("1<fast<slow", "compares more than once"),
            ("fast=<slow", "mixes = with a comparison"),
            ("fast*slow<5", "multiplies two parameters"),
            ("fast/2<slow", "expected + - or *"),
            ("fast<(slow)", "expected a number or a parameter"),
            ("fast<", "at its end"),
            ("fast+<slow", "at its end"),
            ("3<5", "depends on no parameter"),
            ("fast-fast<5", "depends on no parameter"),
            ("1e308*10*fast<5", "too large"),
        ] {
            let got = error("sma_cross", text);
            assert!(got.contains(want), "{text}\n  got  {got}\n  want {want}");
        }
        assert!(error("ts_momentum", "target_vol=1e-60").contains("a number above 0"));
        assert!(error("rsi_reversion", "low=0:100:1e-9").contains("finer than single precision"));
        assert!(error("bollinger_reversion", "width=0.001:0.9:1e-7").contains("one parameter takes at most 1048576"));
        assert!(error("rsi_reversion", "low=0:50:log5").contains("start above 0"));
        for (given, want) in [("sma-cross", "sma_cross"), ("smacross", "sma_cross"), ("momentum", "ts_momentum"), ("Bollinger", "bollinger_reversion")] {
            assert!(matches!(Grid::parse(given, None), Err(Error::Unknown { suggestion: Some(s), known, .. }) if s == want && known.len() == 7), "{given}");
        }
        assert!(matches!(Grid::parse("buy_and_hold", None), Err(Error::Unknown { suggestion: None, .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn counts_and_order_match_plain_loops(f0 in 1u32..20, fw in 0u32..12, s0 in 1u32..20, sw in 0u32..12, step in 1u32..4, k in 1u32..3) {
            let text = format!("slow={s0}:{}:{step},fast={f0}:{},short=1|0,slow>{k}*fast", s0 + sw, f0 + fw);
            let mut want = Vec::new();
            for short in [1, 0] {
                for slow in (s0..=s0 + sw).step_by(step as usize) {
                    want.extend((f0..=f0 + fw).filter(|fast| slow > k * fast).map(|fast| vec![fast as f32, slow as f32, short as f32]));
                }
            }
            match Grid::parse("sma_cross", Some(&text)) {
                Ok(grid) => {
                    prop_assert_eq!(grid.len(), want.len() as u64);
                    prop_assert_eq!(grid.warm_up(), want.iter().map(|s| s[1] as u32 - 1).max().unwrap());
                    prop_assert_eq!(grid.iter().collect::<Vec<_>>(), want);
                    let again = Grid::parse("sma_cross", Some(&grid.to_string())).unwrap();
                    prop_assert_eq!(again.iter().collect::<Vec<_>>(), grid.iter().collect::<Vec<_>>());
                }
                Err(e) => prop_assert!(want.is_empty(), "{}", e),
            }
        }

        #[test]
        fn any_text_is_answered(text in "[a-z0-9=:|,<>!*+.eE -]{0,24}", tail in "(fast|slow|=|:|,|<|>=|==|log|1|20|3.5|-|\\*|\\||é){0,12}") {
            for strategy in &STRATEGIES {
                let _ = Grid::parse(strategy.name, Some(&text));
                let _ = Grid::parse(strategy.name, Some(&tail));
            }
        }

        #[test]
        fn real_ranges_are_distinct_and_bounded(a in 0.0f64..50.0, width in 0.0f64..50.0, step in 0.001f64..7.0) {
            let b = a + width;
            let grid = Grid::parse("rsi_reversion", Some(&format!("period=2,low={a}:{b}:{step},high=100"))).unwrap();
            let low = grid.sets(1 << 20).unwrap().columns.swap_remove(1);
            prop_assert!(low.windows(2).all(|w| w[0] < w[1]));
            prop_assert!(low.iter().all(|v| *v >= a as f32 && *v <= b as f32));
        }
    }
}
