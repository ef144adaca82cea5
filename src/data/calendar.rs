//! Times as unix seconds: read from the usual spellings, written back as ISO 8601.

use time::{Date, Month, OffsetDateTime, Time, UtcOffset};

/// Seconds of a day.
pub(super) const DAY: i64 = 86_400;
/// Seconds of a mean Gregorian-Julian year (365.25 days), the unit of "elapsed years".
pub(super) const YEAR: f64 = 365.25 * DAY as f64;
/// What to write instead of a time in a file that was not understood.
pub(super) const TIME_HELP: &str =
    "write dates as YYYY-MM-DD, times as YYYY-MM-DD HH:MM[:SS] (with Z or ±HH:MM if you like), or unix seconds; --time-column NAME picks another column";

const UNIX_EPOCH_JULIAN_DAY: i64 = 2_440_588;

/// How much time a text names: `2020-03` is a whole month, `2020-03-02 10:00` an instant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Span {
    Instant,
    Day,
    Months(u8),
}

/// A time as it was written: its first second and how long it lasts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Stamp {
    pub(super) seconds: i64,
    pub(super) span: Span,
}

impl Stamp {
    /// The last second that the text covers, for an inclusive upper end.
    pub(super) fn last_second(self) -> i64 {
        match self.span {
            Span::Instant => self.seconds,
            Span::Day => self.seconds + DAY - 1,
            Span::Months(n) => {
                let Ok(start) = OffsetDateTime::from_unix_timestamp(self.seconds) else { return self.seconds };
                let months = start.year() * 12 + i32::from(u8::from(start.month())) - 1 + i32::from(n);
                day_start(months.div_euclid(12), months.rem_euclid(12) as u32 + 1, 1).map_or(self.seconds, |next| next - 1)
            }
        }
    }
}

/// Reads a time; `None` if it is in none of the known spellings or no such day exists.
///
/// `YYYY-MM-DD`, `YYYY/MM/DD`, `YYYYMMDD`, each also with `[T ]HH:MM[:SS[.fff]][Z|±HH:MM]`; `YYYY-MM`, `YYYYQn`, `YYYY`;
/// unix seconds (10 digits) or milliseconds (13). Fractions of a second are cut off. Without a zone the clock is taken as UTC.
pub(super) fn parse(text: &[u8]) -> Option<Stamp> {
    let text = text.trim_ascii();
    if text.iter().all(u8::is_ascii_digit) {
        return match text.len() {
            10 => Some(Stamp { seconds: integer(text)?, span: Span::Instant }),
            13 => Some(Stamp { seconds: integer(text)? / 1000, span: Span::Instant }),
            _ => date(text),
        };
    }
    match text.iter().position(|&b| matches!(b, b'T' | b't' | b' ')) {
        None => date(text),
        Some(at) => {
            let day = date(&text[..at]).filter(|d| d.span == Span::Day)?;
            Some(Stamp { seconds: day.seconds + clock(text[at + 1..].trim_ascii())?, span: Span::Instant })
        }
    }
}

/// The date part: a day, month, quarter or year.
fn date(text: &[u8]) -> Option<Stamp> {
    let number = |range: std::ops::Range<usize>| integer(text.get(range)?).and_then(|v| u32::try_from(v).ok());
    let year = number(0..4)? as i32;
    let mark = text.get(4).copied();
    let dashed = matches!(mark, Some(b'-' | b'/'));
    let (month, day, span) = match text.len() {
        10 if dashed && text.get(7).copied() == mark => (number(5..7)?, number(8..10)?, Span::Day),
        8 => (number(4..6)?, number(6..8)?, Span::Day),
        7 if dashed && matches!(text.get(5), Some(b'Q' | b'q')) => (quarter(number(6..7)?)?, 1, Span::Months(3)),
        7 if dashed => (number(5..7)?, 1, Span::Months(1)),
        6 if matches!(mark, Some(b'Q' | b'q')) => (quarter(number(5..6)?)?, 1, Span::Months(3)),
        4 => (1, 1, Span::Months(12)),
        _ => return None,
    };
    Some(Stamp { seconds: day_start(year, month, day)?, span })
}

fn quarter(q: u32) -> Option<u32> {
    (1..=4).contains(&q).then(|| 3 * q - 2)
}

/// Seconds since midnight UTC of `HH:MM[:SS[.fff]][Z|±HH:MM]`; an offset may push it out of the day.
fn clock(text: &[u8]) -> Option<i64> {
    let zone_at = text.iter().position(|&b| matches!(b, b'Z' | b'z' | b'+' | b'-')).unwrap_or(text.len());
    let (clock, zone) = text.split_at(zone_at);
    let small = |field: &[u8]| integer(field).filter(|_| field.len() == 2).and_then(|v| u8::try_from(v).ok());
    let mut fields = clock.trim_ascii().split(|&b| b == b':');
    let (hour, minute) = (small(fields.next()?)?, small(fields.next()?)?);
    let second = match fields.next() {
        None => 0,
        Some(field) => {
            let (whole, fraction) = field.iter().position(|&b| b == b'.').map_or((field, None), |at| (&field[..at], Some(&field[at + 1..])));
            if fraction.is_some_and(|f| !f.iter().all(u8::is_ascii_digit)) {
                return None;
            }
            small(whole)?
        }
    };
    if fields.next().is_some() {
        return None;
    }
    let offset = match zone {
        [] | [b'Z' | b'z'] => UtcOffset::UTC,
        [sign, digits @ ..] => {
            let digits: Vec<u8> = digits.iter().copied().filter(|&b| b != b':').collect();
            let (hours, minutes) = match digits.len() {
                2 => (small(&digits)?, 0),
                4 => (small(&digits[..2])?, small(&digits[2..])?),
                _ => return None,
            };
            let sign = if *sign == b'-' { -1 } else { 1 };
            UtcOffset::from_hms(sign * i8::try_from(hours).ok()?, sign * i8::try_from(minutes).ok()?, 0).ok()?
        }
    };
    let (hour, minute, second) = Time::from_hms(hour, minute, second).ok()?.as_hms();
    Some(i64::from(hour) * 3600 + i64::from(minute) * 60 + i64::from(second) - i64::from(offset.whole_seconds()))
}

fn integer(digits: &[u8]) -> Option<i64> {
    if digits.is_empty() || digits.len() > 18 {
        return None;
    }
    digits.iter().try_fold(0i64, |sum, b| b.is_ascii_digit().then(|| sum * 10 + i64::from(b - b'0')))
}

fn day_start(year: i32, month: u32, day: u32) -> Option<i64> {
    let month = Month::try_from(u8::try_from(month).ok()?).ok()?;
    let date = Date::from_calendar_date(year, month, u8::try_from(day).ok()?).ok()?;
    Some((i64::from(date.to_julian_day()) - UNIX_EPOCH_JULIAN_DAY) * DAY)
}

/// Whether the calendar has this second: years −9999 to 9999.
pub(super) fn is_time(seconds: i64) -> bool {
    OffsetDateTime::from_unix_timestamp(seconds).is_ok()
}

/// `YYYY-MM-DD`, or `YYYY-MM-DDTHH:MM:SS` if asked for.
pub(super) fn format(seconds: i64, with_clock: bool) -> String {
    let Ok(t) = OffsetDateTime::from_unix_timestamp(seconds) else { return seconds.to_string() };
    let (date, (h, m, s)) = (t.date(), t.time().as_hms());
    if with_clock { format!("{date}T{h:02}:{m:02}:{s:02}") } else { date.to_string() }
}

/// The date, with the clock only where it is not midnight: for messages about one time.
pub(super) fn format_short(seconds: i64) -> String {
    format(seconds, seconds.rem_euclid(DAY) != 0)
}
