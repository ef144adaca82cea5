//! Formats, alignment and policies; `errors` has the refusals, `real` the market data of the project.

mod errors;
mod real;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use ::parquet::arrow::ArrowWriter;
use arrow_array::types::Int32Type;
use arrow_array::{
    ArrayRef, Date32Array, DictionaryArray, Float32Array, Float64Array, Int64Array, LargeStringArray, RecordBatch, StringArray, StringViewArray,
    TimestampMicrosecondArray, TimestampNanosecondArray, TimestampSecondArray,
};
use ndarray::array;
use tempfile::TempDir;

use super::*;

/// A directory that lives as long as the test, and files in it.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn bytes(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn text(&self, name: &str, content: &str) -> PathBuf {
        self.bytes(name, content.as_bytes())
    }

    fn parquet(&self, name: &str, columns: Vec<(&str, ArrayRef)>) -> PathBuf {
        let path = self.0.path().join(name);
        let batch = RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, array)| (name, array, true))).unwrap();
        let mut writer = ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        path
    }
}

fn gzip(content: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

/// Reads one CSV text with options.
fn read_text(content: &str, options: &ReadOptions) -> Result<Prices> {
    let files = Files::new();
    read_prices(&[files.text("prices.csv", content)], options)
}

fn symbols(names: &[&str]) -> Option<Vec<String>> {
    Some(names.iter().map(|&name| name.to_owned()).collect())
}

const WIDE: &str = "date,AAA,BBB\n2020-01-02,1,10\n2020-01-03,2,20\n2020-01-06,3,30\n";
const LONG: &str =
    "symbol,volume,date,close\nBBB,5,2020-01-02,10\nAAA,5,2020-01-02,1\nAAA,5,2020-01-03,2\nBBB,5,2020-01-03,20\nAAA,5,2020-01-06,3\nBBB,5,2020-01-06,30\n";
const DAYS: [i64; 3] = [1_577_923_200, 1_578_009_600, 1_578_268_800];

#[test]
fn wide_csv() {
    let prices = read_text(WIDE, &ReadOptions::default()).unwrap();
    assert_eq!(prices.symbols, ["AAA", "BBB"]);
    assert_eq!(prices.times, DAYS);
    assert_eq!(prices.close, array![[1., 10.], [2., 20.], [3., 30.]]);
    assert_eq!((prices.n_bars(), prices.n_assets(), prices.has_time_of_day), (3, 2, false));
    assert_eq!((prices.price_column.as_str(), prices.open), ("price", None));
    assert_eq!(prices.times.iter().map(|&t| calendar::format(t, false)).collect::<Vec<_>>(), ["2020-01-02", "2020-01-03", "2020-01-06"]);
}

#[test]
fn long_csv_in_any_order_is_the_wide_panel() {
    let wide = read_text(WIDE, &ReadOptions::default()).unwrap();
    let long = read_text(LONG, &ReadOptions { symbols: symbols(&["AAA", "BBB"]), ..Default::default() }).unwrap();
    assert_eq!((&long.symbols, &long.times, &long.close), (&wide.symbols, &wide.times, &wide.close));
    let first_seen = read_text(LONG, &ReadOptions::default()).unwrap();
    assert_eq!(first_seen.symbols, ["BBB", "AAA"]);
    assert_eq!(first_seen.price_column, "close");
}

#[test]
fn spellings_of_one_file_give_one_panel() {
    let want = read_text(WIDE, &ReadOptions::default()).unwrap();
    let same = [
        WIDE.replace('\n', "\r\n"),
        format!("\u{feff}{WIDE}"),
        WIDE.replace(',', ";"),
        WIDE.replace(',', "\t"),
        WIDE.replace("date,AAA,BBB", " Date , AAA,\"BBB\" "),
        WIDE.replace("date", ""),
        WIDE.replace("2020-01-0", "2020/01/0"),
        WIDE.replace("2020-01-0", "2020010"),
        WIDE.replace("-02,", "-02 00:00,").replace("-03,", "-03T00:00:00.000Z,").replace("-06,", "-06T02:00+02:00,"),
        WIDE.replace("2020-01-02", "1577923200").replace("2020-01-03", "1578009600").replace("2020-01-06", "1578268800000"),
        WIDE.trim_end().to_owned(),
        WIDE.replace("\n2020-01-06", "\n\n2020-01-06"),
    ];
    for text in same {
        let got = read_text(&text, &ReadOptions::default()).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!((got.symbols, got.times, got.close), (want.symbols.clone(), want.times.clone(), want.close.clone()), "{text}");
    }
}

#[test]
fn gzip_is_told_by_content() {
    let files = Files::new();
    let path = files.bytes("zipped.csv", &gzip(WIDE));
    assert_eq!(read_prices(&[path], &ReadOptions::default()).unwrap().times, DAYS);
    let two_members = [gzip("date,AAA\n2020-01-02,1\n"), gzip("2020-01-03,2\n")].concat();
    assert_eq!(read_prices(&[files.bytes("members.csv.gz", &two_members)], &ReadOptions::default()).unwrap().n_bars(), 2);
}

#[test]
fn hash_is_that_of_the_bytes() {
    let files = Files::new();
    let (a, b) = (files.text("a.csv", WIDE), files.bytes("b.csv.gz", &gzip(&WIDE.replace("AAA", "CCC").replace("BBB", "DDD"))));
    let prices = read_prices(&[a.clone(), b.clone()], &ReadOptions::default()).unwrap();
    let bytes = [std::fs::read(a).unwrap(), std::fs::read(b).unwrap()].concat();
    assert_eq!(prices.sha256, Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    assert_eq!((prices.symbols.join(" "), prices.sources.len()), ("AAA BBB CCC DDD".to_owned(), 2));
}

#[test]
fn single_asset_is_named_after_the_file() {
    let files = Files::new();
    let path = files.text("spy.daily.csv", "Date,Open,High,Low,Close,Adj Close,Volume\n2020-01-02,1,2,1,2,1.0,9\n2020-01-03,2,3,2,4,2.0,9\n");
    let prices = read_prices(std::slice::from_ref(&path), &ReadOptions::default()).unwrap();
    assert_eq!((prices.symbols[0].as_str(), &prices.close, &prices.open), ("spy.daily", &array![[2.], [4.]], &Some(array![[1.], [2.]])));
    let adjusted = read_prices(std::slice::from_ref(&path), &ReadOptions { price: Some("ADJ_CLOSE".into()), ..Default::default() }).unwrap();
    assert_eq!((adjusted.price_column.as_str(), &adjusted.close, &adjusted.open), ("Adj Close", &array![[1.], [2.]], &Some(array![[0.5], [1.]])));
    assert!(adjusted.notes[0].contains("scaled"), "{:?}", adjusted.notes);
    let high = read_prices(&[path], &ReadOptions { price: Some("high".into()), ..Default::default() }).unwrap();
    assert_eq!((high.close, high.open), (array![[2.], [3.]], None));
}

#[test]
fn files_are_joined() {
    let files = Files::new();
    let late = files.text("late.csv", "date,symbol,open,close\n2020-01-03,A,3,3\n2020-01-06,A,4,4\n");
    let early = files.text("early.csv", "date,ticker,open,close\n2020-01-01,A,1,1\n2020-01-02,A,2,2\n");
    let wide = files.text("wide.csv", "date,B\n2020-01-01,5\n2020-01-02,6\n2020-01-03,7\n2020-01-06,8\n");
    let prices = read_prices(&[late.clone(), early.clone()], &ReadOptions::default()).unwrap();
    assert_eq!((&prices.close, prices.open.as_ref()), (&array![[1.], [2.], [3.], [4.]], Some(&prices.close)));
    let mixed = read_prices(&[late, early, wide], &ReadOptions::default()).unwrap();
    assert_eq!(mixed.close, array![[1., 5.], [2., 6.], [3., 7.], [4., 8.]]);
    assert_eq!(mixed.open, None);
    assert!(mixed.notes[0].contains("B has none"), "{:?}", mixed.notes);
}

const GAPS: &str = "date,A,B,C,D\n2020-01-01,,,,\n2020-01-02,1,,1,1\n2020-01-03,2,NA,2,2\n2020-01-04,3,3,NaN,\n2020-01-05,4,4,null,4\n2020-01-06,5,5,6,5\n2020-01-07,-,-,-,-\n";

#[test]
fn drop_leaves_incomplete_assets_out() {
    let prices = read_text(GAPS, &ReadOptions { missing: Missing::Drop, ..Default::default() }).unwrap();
    assert_eq!((prices.symbols.join(""), prices.n_bars()), ("A".to_owned(), 5));
    let reasons: Vec<String> = prices.dropped.iter().map(|d| format!("{}: {}", d.symbol, d.reason)).collect();
    assert_eq!(reasons, ["B: 2 of 5 bars missing, first 2020-01-02", "C: 2 of 5 bars missing, first 2020-01-04", "D: 1 of 5 bars missing, first 2020-01-04"]);
    assert_eq!(
        prices.notes,
        [
            "2 of 7 bars left out: no selected symbol has a price there",
            "2 of the dropped symbols would be kept by --missing fill:5 (no gap of more than 5 bars)"
        ]
    );
}

#[test]
fn fill_repeats_the_last_price_over_short_gaps() {
    let fill = |limit| read_text(GAPS, &ReadOptions { missing: Missing::Fill { limit }, ..Default::default() }).unwrap();
    let two = fill(2);
    assert_eq!(two.symbols, ["A", "C", "D"]);
    assert_eq!(two.close, array![[1., 1., 1.], [2., 2., 2.], [3., 2., 2.], [4., 2., 4.], [5., 6., 5.], [5., 6., 5.]]);
    assert_eq!(two.filled, [("A".to_owned(), 1), ("C".to_owned(), 3), ("D".to_owned(), 2)]);
    assert_eq!(two.dropped, [Dropped { symbol: "B".into(), reason: "3 of 6 bars missing, first 2020-01-02; starts 2020-01-04".into() }]);
    let one = fill(1);
    assert_eq!(one.symbols, ["A", "D"]);
    assert!(one.dropped[1].reason.ends_with("a gap of 2 bars from 2020-01-04, more than 1"), "{:?}", one.dropped);
}

#[test]
fn filled_bars_open_at_the_filled_price_and_bad_opens_leave_all_out() {
    let text = "date,symbol,open,close\n2020-01-01,A,9,1\n2020-01-01,B,9,1\n2020-01-02,A,9,2\n2020-01-03,A,9,3\n2020-01-03,B,9,3\n";
    let options = ReadOptions { missing: Missing::Fill { limit: 5 }, ..Default::default() };
    let prices = read_text(text, &options).unwrap();
    assert_eq!(prices.open, Some(array![[9., 9.], [9., 1.], [9., 9.]]));
    for bad in ["0", "-1", "", "x", "inf"] {
        let prices = read_text(&text.replacen("A,9", &format!("A,{bad}"), 1), &options).unwrap();
        assert_eq!(prices.open, None);
        assert!(prices.notes[0].contains("1 of them are missing or not positive, first A on 2020-01-01"), "{:?}", prices.notes);
    }
}

#[test]
fn range_and_symbols_cut_defects_away() {
    let text = "date,A,B,note\n2020-01-01,zero,1,a\n2020-01-02,1,-1,b\n2020-01-02 12:00,2,0,c\n2020-01-03,0,0,d\n";
    let options = ReadOptions { symbols: symbols(&["A"]), from: Some("2020-01-02".into()), to: Some("2020-01-02".into()), ..Default::default() };
    let prices = read_text(text, &options).unwrap();
    assert_eq!((prices.close.clone(), prices.has_time_of_day), (array![[1.], [2.]], true));
    assert_eq!(prices.format_time(prices.times[1]), "2020-01-02T12:00:00");
    let long = "date,symbol,close\nnever,B,x\n2020-01-01,A,-1\n2020-01-02,A,1\n2020-01-03,A,2\n";
    let options = ReadOptions { symbols: symbols(&["A"]), from: Some("2020-01-02T00:00".into()), ..Default::default() };
    assert_eq!(read_text(long, &options).unwrap().n_bars(), 2);
}

#[test]
fn symbols_give_the_order() {
    let prices = read_text(WIDE, &ReadOptions { symbols: symbols(&["BBB", "AAA", "BBB"]), ..Default::default() }).unwrap();
    assert_eq!((prices.symbols.join(" "), prices.close[[0, 0]]), ("BBB AAA".to_owned(), 10.0));
}

#[test]
fn periods_per_year_follow_the_times() {
    let prices = |times: Vec<i64>| Prices { times, ..read_text(WIDE, &ReadOptions::default()).unwrap() };
    let days = prices((0..731).map(|d| d * calendar::DAY).collect());
    assert!((days.periods_per_year().unwrap() - 365.25).abs() < 1e-9);
    let months = read_text("month,A\n2019-01,1\n2019-02,1\n2023-01,1\n", &ReadOptions::default()).unwrap();
    assert!((months.periods_per_year().unwrap() - 0.5).abs() < 1e-9);
    assert!(prices(vec![1]).periods_per_year().unwrap_err().to_string().contains("at least 2 bars"));
}

#[test]
fn missing_from_text() {
    let parse = |text: &str| text.parse::<Missing>();
    assert_eq!(parse("error").unwrap(), Missing::Error);
    assert_eq!(parse("drop").unwrap(), Missing::Drop);
    assert_eq!(parse("fill").unwrap(), Missing::Fill { limit: 5 });
    assert_eq!(parse("fill:12").unwrap().to_string(), "fill:12");
    for bad in ["", "fill:0", "fill:x", "skip", "drop:1"] {
        assert!(parse(bad).unwrap_err().to_string().contains("fill:N"), "{bad}");
    }
}

#[test]
fn times_in_every_spelling() {
    let seconds = |text: &str| calendar::parse(text.as_bytes()).map(|stamp| stamp.seconds);
    for text in ["2013-10-06T19:05:30Z", "2013-10-06 21:05:30+02:00", "2013/10/06 19:05:30.999", "20131006 19:05:30", "2013-10-06T14:05:30-0500", "1381086330"]
    {
        assert_eq!(seconds(text), Some(1_381_086_330), "{text}");
    }
    assert_eq!(seconds("1969-12-31"), Some(-calendar::DAY));
    assert_eq!(seconds("1951Q2"), seconds("1951-04-01"));
    assert_eq!(seconds("1951-Q2"), seconds("1951-04"));
    assert_eq!(seconds("1900"), seconds("1900-01-01"));
    assert_eq!(seconds("2024-02-29"), seconds("2024-03-01").map(|t| t - calendar::DAY));
    for bad in ["", "x", "2023-02-29", "2020-13-01", "2020-1-1", "01/02/2020", "2020-01/02", "2020-01-02 25:00", "2020-01-02 10", "2020-01-02T10:00+1", "12345"]
    {
        assert_eq!(seconds(bad), None, "{bad}");
    }
    let last = |text: &str| calendar::parse(text.as_bytes()).map(|stamp| calendar::format(stamp.last_second(), true)).unwrap();
    assert_eq!(
        [last("2020-12-31"), last("2020-12"), last("2020"), last("2020Q1")].map(|t| t[5..].to_owned()),
        ["12-31T23:59:59", "12-31T23:59:59", "12-31T23:59:59", "03-31T23:59:59"]
    );
}

#[test]
fn nearest_name() {
    assert_eq!(nearest("APPL", ["MSFT", "AAPL"]), Some("AAPL".into()));
    assert_eq!(nearest("adjclose", ["open", "close", "adj_close"]), Some("adj_close".into()));
    assert_eq!(nearest("aapl", ["AAP", "AAPL"]), Some("AAPL".into()));
    assert_eq!(nearest("zzz", ["AAPL"]), None);
}

#[test]
fn parquet_wide_with_every_time_type() {
    let files = Files::new();
    let a: ArrayRef = Arc::new(Float64Array::from(vec![1., 2., 3.]));
    let b: ArrayRef = Arc::new(Int64Array::from(vec![10, 20, 30]));
    let texts = ["2020-01-02", "2020-01-03", "2020-01-06"];
    let micros: Vec<i64> = DAYS.iter().map(|t| t * 1_000_000).collect();
    let times: Vec<ArrayRef> = vec![
        Arc::new(Date32Array::from(DAYS.map(|t| (t / calendar::DAY) as i32).to_vec())),
        Arc::new(TimestampMicrosecondArray::from(micros.clone()).with_timezone("America/New_York")),
        Arc::new(TimestampNanosecondArray::from(micros.iter().map(|t| t * 1000).collect::<Vec<_>>())),
        Arc::new(StringArray::from(texts.to_vec())),
        Arc::new(LargeStringArray::from(texts.to_vec())),
        Arc::new(StringViewArray::from(texts.to_vec())),
        Arc::new(DictionaryArray::<Int32Type>::from_iter(texts)),
        Arc::new(Int64Array::from(DAYS.to_vec())),
        Arc::new(Int64Array::from(vec![20_200_102, 20_200_103, 20_200_106])),
    ];
    for time in times {
        let path = files.parquet("wide.parquet", vec![("AAA", a.clone()), ("when", time.clone()), ("BBB", b.clone())]);
        let options = ReadOptions { time_column: Some("When".into()), ..Default::default() };
        let prices = read_prices(&[path], &options).unwrap_or_else(|error| panic!("{}: {error}", time.data_type()));
        assert_eq!((prices.times.as_slice(), &prices.close), (&DAYS[..], &array![[1., 10.], [2., 20.], [3., 30.]]), "{}", time.data_type());
    }
}

#[test]
fn parquet_long_is_the_csv_panel() {
    let files = Files::new();
    let columns = |symbol: ArrayRef| {
        let days = [0, 0, 1, 1, 2, 2].map(|d: usize| (DAYS[d] / calendar::DAY) as i32).to_vec();
        let close: ArrayRef = Arc::new(Float32Array::from(vec![10., 1., 2., 20., 3., 30.]));
        vec![("Close", close.clone()), ("day_of_bar", Arc::new(Date32Array::from(days)) as ArrayRef), ("Ticker", symbol), ("open", close)]
    };
    let names = ["BBB", "AAA", "AAA", "BBB", "AAA", "BBB"];
    let csv = read_text(LONG, &ReadOptions::default()).unwrap();
    let kinds: [ArrayRef; 2] = [Arc::new(StringViewArray::from(names.to_vec())), Arc::new(DictionaryArray::<Int32Type>::from_iter(names))];
    for kind in kinds {
        let prices = read_prices(&[files.parquet("long.bin", columns(kind))], &ReadOptions::default()).unwrap();
        assert_eq!((&prices.symbols, &prices.times, &prices.close), (&csv.symbols, &csv.times, &csv.close));
        assert_eq!((prices.open, prices.price_column.as_str()), (Some(prices.close), "Close"));
    }
}

#[test]
fn parquet_nulls_and_nans_are_missing() {
    let files = Files::new();
    let day: ArrayRef = Arc::new(Date32Array::from(vec![1, 2, 3]));
    let a: ArrayRef = Arc::new(Float64Array::from(vec![Some(1.), None, Some(f64::NAN)]));
    let path = files.parquet("gaps.parquet", vec![("date", day), ("A", a)]);
    let prices = read_prices(std::slice::from_ref(&path), &ReadOptions { missing: Missing::Fill { limit: 2 }, ..Default::default() }).unwrap();
    assert_eq!(prices.filled, [("A".to_owned(), 2)]);
    let error = read_prices(&[path], &ReadOptions::default()).unwrap_err().to_string();
    assert!(error.contains("row 2") && error.contains("2 of 3 cells"), "{error}");
}
