//! Option chains and volatility surfaces from files: quotes checked, forwards by put-call parity, implied volatilities.
//!
//! Chain    one row per quote: `date` or `ts_utc`, `underlying` or `root`, `expiry`, `strike`, `right` (C or P), then any of `bid`, `ask`, `close` or `last`,
//!          `spot_close` or `spot`, `implied_volatility`, `volume`. An empty cell is no value.
//! Surface  `spot`, `strike`, `days`, `zero_rate_cc` (continuous), `implied_vol`, and `dividend` where there is one.
//! Checked  every row that is selected: numbers finite, strike and spot above 0, quotes not negative, bid not above ask, expiry not before the quote.
//! Parity   call − put = D·(F − K) at every strike with both mid prices: a line through the pairs nearest the money gives forward F and discount D; with a given
//!          rate, D is its. American options have it up to their early exercise.
//! Source   Stoll 1969, J. Finance 24, for parity.

use std::collections::BTreeMap;
use std::path::Path;

use super::calendar::{DAY, Stamp, parse};
use super::table::Table;
use crate::kernels::implied_volatility::{VolatilityStatus, implied_volatilities};
use crate::{Device, Error, Result};

/// Days of a year in maturities.
const YEAR_DAYS: f64 = 365.0;
/// Pairs that parity looks at.
const NEAREST: usize = 12;
const OP: &str = "option chain";

/// What to do with a quote whose bid is above its ask.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Crossed {
    /// Refuse the file, naming the row.
    #[default]
    Error,
    /// Leave the quote out and say so in the notes.
    Drop,
}

/// Which rows of a chain to read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChainOptions {
    /// Underlying, or root; all if `None`.
    pub underlying: Option<String>,
    /// First time, inclusive.
    pub from: Option<String>,
    /// Last time, inclusive; a date means its whole day.
    pub to: Option<String>,
    /// Crossed quotes.
    pub crossed: Crossed,
}

/// One quote.
#[derive(Debug, Clone, PartialEq)]
pub struct OptionQuote {
    /// Line of the file.
    pub row: u64,
    /// When it was quoted, unix seconds.
    pub time: i64,
    /// Underlying, or root.
    pub underlying: String,
    /// Day of expiry, unix seconds at midnight.
    pub expiry: i64,
    /// Strike.
    pub strike: f64,
    /// Call, or put.
    pub call: bool,
    /// Bid.
    pub bid: Option<f64>,
    /// Ask.
    pub ask: Option<f64>,
    /// Last trade or close.
    pub last: Option<f64>,
    /// Price of the underlying beside it.
    pub spot: Option<f64>,
    /// The file's own implied volatility.
    pub implied_volatility: Option<f64>,
    /// Contracts traded.
    pub volume: Option<f64>,
}

impl OptionQuote {
    /// Middle of bid and ask; without an ask the last price. A bid that is empty counts as 0 where there is an ask.
    pub fn price(&self) -> Option<f64> {
        self.ask.map_or(self.last, |ask| Some(0.5 * (self.bid.unwrap_or(0.0) + ask)))
    }

    /// Whether there are a positive bid and an ask.
    pub fn is_two_sided(&self) -> bool {
        self.ask.is_some() && self.bid.is_some_and(|bid| bid > 0.0)
    }

    /// Years to expiry: whole days from a quote that has a date only, else to midnight after the day of expiry; of 365 days. 0 on the day for a date.
    pub fn maturity(&self) -> f64 {
        let end = if self.time.rem_euclid(DAY) == 0 { self.expiry } else { self.expiry + DAY };
        ((end - self.time) as f64 / (DAY as f64 * YEAR_DAYS)).max(0.0)
    }
}

/// Quotes of a file, in its order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OptionChain {
    /// The file, as it was named.
    pub file: String,
    /// Quotes.
    pub quotes: Vec<OptionQuote>,
    /// Crossed quotes that were left out.
    pub dropped: usize,
    /// What a user should know.
    pub notes: Vec<String>,
}

/// Reads a chain from a CSV file, plain or gzipped.
/// # Errors
/// `Io`; `Data` with file, row, column and value for a missing column, a cell that is no number, a strike or spot that is not positive, a negative quote, a
/// crossed one, an expiry before the quote, or nothing left; `Parameter` for `from` and `to`.
pub fn read_chain(path: &Path, options: &ChainOptions) -> Result<OptionChain> {
    let (from, to) = range(options)?;
    let mut table = Table::open(path)?;
    let time = table.needed(&["date", "ts_utc", "time", "quote_date"])?;
    let underlying = table.column(&["underlying", "root", "symbol"]);
    let (expiry, strike, right) = (table.needed(&["expiry", "expiration"])?, table.needed(&["strike"])?, table.needed(&["right", "type", "kind"])?);
    let (bid, ask, last) = (table.column(&["bid"]), table.column(&["ask"]), table.column(&["close", "last", "price"]));
    if ask.is_none() && last.is_none() {
        table.needed(&["ask", "close"])?;
    }
    let (spot, volatility) = (table.column(&["spot_close", "spot", "underlying_price"]), table.column(&["implied_volatility", "iv"]));
    let volume = table.column(&["volume"]);
    let mut chain = OptionChain { file: table.file.clone(), ..OptionChain::default() };
    let mut seen = 0u64;
    while let Some(row) = table.next()? {
        seen += 1;
        let at = table.time(time)?;
        let name = underlying.map(|column| table.words(column)).unwrap_or_default();
        if at < from || at > to || options.underlying.as_ref().is_some_and(|wanted| !wanted.eq_ignore_ascii_case(&name)) {
            continue;
        }
        let day = table.time(expiry)?;
        if day < at - at.rem_euclid(DAY) {
            return Err(table.wrong(expiry, "the option expired before it was quoted", "correct the dates or drop the row; dates are YYYY-MM-DD"));
        }
        let call = match table.text(right).to_ascii_lowercase().as_slice() {
            b"c" | b"call" => true,
            b"p" | b"put" => false,
            _ => return Err(table.wrong(right, "this is neither a call nor a put", "write C or P")),
        };
        let (low, high) = (quote(&table, bid)?, quote(&table, ask)?);
        if let (Some(low), Some(high), Some(column)) = (low, high, bid)
            && low > high
        {
            if options.crossed == Crossed::Drop {
                chain.dropped += 1;
                continue;
            }
            let message = format!("the bid is above the ask {high}");
            return Err(table.wrong(column, &message, "correct the row, or have crossed quotes dropped"));
        }
        chain.quotes.push(OptionQuote {
            row,
            time: at,
            underlying: name,
            expiry: day,
            strike: table.positive(strike)?,
            call,
            bid: low,
            ask: high,
            last: quote(&table, last)?,
            spot: spot.map(|column| if table.text(column).is_empty() { Ok(None) } else { table.positive(column).map(Some) }).transpose()?.flatten(),
            implied_volatility: quote(&table, volatility)?,
            volume: quote(&table, volume)?,
        });
    }
    if chain.quotes.is_empty() {
        let message = format!("none of its {seen} rows is a quote of what was asked for");
        return Err(super::data_error(&chain.file, message, "check the underlying's name and the range of times".into()));
    }
    if chain.dropped > 0 {
        chain.notes.push(format!("{} crossed quotes were left out", chain.dropped));
    }
    let empty = chain.quotes.iter().filter(|q| q.price().is_none()).count();
    if empty > 0 {
        chain.notes.push(format!("{empty} quotes have no price"));
    }
    Ok(chain)
}

/// A cell of 0 or more, where the column is there and the cell is not empty.
fn quote(table: &Table, column: Option<usize>) -> Result<Option<f64>> {
    let Some(column) = column else { return Ok(None) };
    match table.number(column)? {
        Some(x) if x < 0.0 => Err(table.wrong(column, "a quote is never negative", "correct the cell or leave it empty")),
        x => Ok(x),
    }
}

fn range(options: &ChainOptions) -> Result<(i64, i64)> {
    let end = |name: &str, text: &Option<String>| match text {
        None => Ok(None),
        Some(text) => parse(text.as_bytes()).map(Some).ok_or_else(|| Error::Parameter {
            op: OP,
            name: name.into(),
            value: text.clone(),
            help: "this is not a time; write YYYY-MM-DD or YYYY-MM-DDTHH:MM:SS".into(),
        }),
    };
    let (from, to) = (end("from", &options.from)?, end("to", &options.to)?);
    Ok((from.map_or(i64::MIN, |stamp| stamp.seconds), to.map_or(i64::MAX, Stamp::last_second)))
}

/// What put-call parity says of one expiry at one time.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpiryForward {
    /// When.
    pub time: i64,
    /// Of what.
    pub underlying: String,
    /// Day of expiry.
    pub expiry: i64,
    /// Years to it.
    pub maturity: f64,
    /// Forward price.
    pub forward: f64,
    /// Value now of 1 at expiry.
    pub discount: f64,
    /// Pairs of call and put that it comes from.
    pub pairs: usize,
    /// Largest |call − put − D·(F − K)| among them.
    pub worst: f64,
}

/// Implied volatility of one quote.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QuoteVolatility {
    /// Index into [`OptionChain::quotes`].
    pub quote: usize,
    /// Forward of its expiry.
    pub forward: f64,
    /// Discount of its expiry.
    pub discount: f64,
    /// Years to expiry.
    pub maturity: f64,
    /// Volatility; 0 unless the status is ok.
    pub volatility: f64,
    /// What came of it.
    pub status: VolatilityStatus,
}

/// One point of a volatility surface.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SurfacePoint {
    /// Spot; from a chain the discounted forward, with a dividend of 0.
    pub spot: f64,
    /// Strike.
    pub strike: f64,
    /// Years.
    pub maturity: f64,
    /// Continuous rate a year.
    pub rate: f64,
    /// Continuous dividend yield a year.
    pub dividend: f64,
    /// Implied volatility a year.
    pub volatility: f64,
}

/// Which quotes of a chain make a surface.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SurfaceFilter {
    /// Shortest maturity, years.
    pub min_maturity: f64,
    /// Longest maturity, years.
    pub max_maturity: f64,
    /// Largest |ln K/F|.
    pub moneyness: f64,
    /// Only quotes with a positive bid and an ask, where the file has them.
    pub two_sided: bool,
}

impl Default for SurfaceFilter {
    fn default() -> SurfaceFilter {
        SurfaceFilter { min_maturity: 7.0 / YEAR_DAYS, max_maturity: 3.0, moneyness: 0.3, two_sided: true }
    }
}

type Key = (i64, String, i64);

impl OptionChain {
    /// Times of the quotes, ascending.
    pub fn times(&self) -> Vec<i64> {
        let mut times: Vec<i64> = self.quotes.iter().map(|q| q.time).collect();
        times.sort_unstable();
        times.dedup();
        times
    }

    /// The quotes of one time.
    pub fn at(&self, time: i64) -> OptionChain {
        OptionChain { quotes: self.quotes.iter().filter(|q| q.time == time).cloned().collect(), ..self.clone() }
    }

    /// Forward and discount of each expiry with at least one strike that has a call's and a put's mid price (two where the rate is not given). `rate` is
    /// continuous a year. Where parity gives a discount that is no positive number up to 1.25, the rate is taken for 0.
    pub fn forwards(&self, rate: Option<f64>) -> Vec<ExpiryForward> {
        let mut strikes: BTreeMap<Key, BTreeMap<u64, [Option<f64>; 2]>> = BTreeMap::new();
        for q in self.quotes.iter().filter(|q| q.maturity() > 0.0) {
            // Positive reals are ordered as their bits.
            let cell = strikes.entry((q.time, q.underlying.clone(), q.expiry)).or_default().entry(q.strike.to_bits()).or_default();
            cell[usize::from(q.call)] = q.price();
        }
        let maturity: BTreeMap<Key, f64> = self.quotes.iter().map(|q| ((q.time, q.underlying.clone(), q.expiry), q.maturity())).collect();
        let mut found = Vec::new();
        for (key, cells) in strikes {
            let mut pairs: Vec<(f64, f64)> = cells.iter().filter_map(|(bits, [put, call])| Some((f64::from_bits(*bits), (*call)? - (*put)?))).collect();
            let years = maturity.get(&key).copied().unwrap_or_default();
            if pairs.len() < if rate.is_some() { 1 } else { 2 } {
                continue;
            }
            // The strike at which call and put cost the same is the forward.
            pairs.sort_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
            pairs.truncate(NEAREST);
            let n = pairs.len() as f64;
            let (mean_k, mean_gap) = (pairs.iter().map(|p| p.0).sum::<f64>() / n, pairs.iter().map(|p| p.1).sum::<f64>() / n);
            let (sxy, sxx) = pairs.iter().fold((0.0, 0.0), |(xy, xx), (k, gap)| (xy + (k - mean_k) * (gap - mean_gap), xx + (k - mean_k) * (k - mean_k)));
            let discount = match rate {
                Some(rate) => (-rate * years).exp(),
                None if sxx > 0.0 && (0.1..=1.25).contains(&(-sxy / sxx)) => -sxy / sxx,
                None => 1.0,
            };
            let forward = mean_k + mean_gap / discount;
            if forward <= 0.0 {
                continue;
            }
            let worst = pairs.iter().map(|(k, gap)| (gap - discount * (forward - k)).abs()).fold(0.0, f64::max);
            found.push(ExpiryForward { time: key.0, underlying: key.1, expiry: key.2, maturity: years, forward, discount, pairs: pairs.len(), worst });
        }
        found
    }

    /// Implied volatility of every quote that has a price and whose expiry has a forward, from that forward and discount.
    /// # Errors
    /// Those of the device.
    pub fn volatilities(&self, device: &Device, rate: Option<f64>) -> Result<Vec<QuoteVolatility>> {
        let forwards: BTreeMap<Key, ExpiryForward> = self.forwards(rate).into_iter().map(|f| ((f.time, f.underlying.clone(), f.expiry), f)).collect();
        let (mut quotes, mut kind, mut found) = (Vec::new(), Vec::new(), Vec::new());
        for (i, q) in self.quotes.iter().enumerate() {
            let (Some(price), Some(f)) = (q.price(), forwards.get(&(q.time, q.underlying.clone(), q.expiry))) else { continue };
            // The discounted forward is a spot that pays nothing.
            let row = [f.forward * f.discount, q.strike, f.maturity, price, -f.discount.ln() / f.maturity, 0.0];
            quotes.extend(row.map(|x| x as f32));
            kind.push(u32::from(q.call));
            let status = VolatilityStatus::Ok;
            found.push(QuoteVolatility { quote: i, forward: f.forward, discount: f.discount, maturity: f.maturity, volatility: 0.0, status });
        }
        let (volatility, status) = implied_volatilities(device, &quotes, &kind)?;
        for (x, (volatility, status)) in found.iter_mut().zip(volatility.into_iter().zip(status)) {
            (x.volatility, x.status) = (volatility, status);
        }
        Ok(found)
    }

    /// The out-of-the-money side of every strike inside the filter, as a surface.
    /// # Errors
    /// Those of the device; `Data` if nothing is left.
    pub fn surface(&self, device: &Device, rate: Option<f64>, filter: &SurfaceFilter) -> Result<Vec<SurfacePoint>> {
        let two_sided = filter.two_sided && self.quotes.iter().any(|q| q.ask.is_some());
        let volatilities = self.volatilities(device, rate)?;
        let points: Vec<SurfacePoint> = volatilities
            .iter()
            .filter_map(|x| {
                let q = &self.quotes[x.quote];
                let money = (q.strike / x.forward).ln();
                let inside = x.maturity >= filter.min_maturity && x.maturity <= filter.max_maturity && money.abs() <= filter.moneyness;
                let takes = inside && x.status == VolatilityStatus::Ok && (money >= 0.0) == q.call && (!two_sided || q.is_two_sided());
                takes.then(|| SurfacePoint {
                    spot: x.forward * x.discount,
                    strike: q.strike,
                    maturity: x.maturity,
                    rate: -x.discount.ln() / x.maturity,
                    dividend: 0.0,
                    volatility: x.volatility,
                })
            })
            .collect();
        if points.is_empty() {
            let message = format!("none of {} quotes is out of the money, two-sided and inside the filter", self.quotes.len());
            return Err(super::data_error(&self.file, message, "widen the maturities or the moneyness, or give the rate".into()));
        }
        Ok(points)
    }
}

/// Reads a volatility surface.
/// # Errors
/// `Io`; `Data` with file, row, column and value where a cell is not a number above 0 (rates and dividends: not a number).
pub fn read_surface(path: &Path) -> Result<Vec<SurfacePoint>> {
    let mut table = Table::open(path)?;
    let (spot, strike, days) = (table.needed(&["spot"])?, table.needed(&["strike"])?, table.needed(&["days"])?);
    let (rate, volatility, dividend) =
        (table.needed(&["zero_rate_cc", "rate"])?, table.needed(&["implied_vol", "implied_volatility"])?, table.column(&["dividend"]));
    let mut points = Vec::new();
    while table.next()?.is_some() {
        points.push(SurfacePoint {
            spot: table.positive(spot)?,
            strike: table.positive(strike)?,
            maturity: table.positive(days)? / YEAR_DAYS,
            rate: table.needed_number(rate)?,
            dividend: dividend.map_or(Ok(0.0), |column| table.needed_number(column))?,
            volatility: table.positive(volatility)?,
        });
    }
    if points.is_empty() {
        return Err(super::data_error(&table.file, "the file has a header and no rows".into(), "a surface needs points".into()));
    }
    Ok(points)
}
