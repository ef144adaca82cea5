//! Every refusal names the place and the way out.

use super::*;

/// The message of reading one CSV text; it must contain all parts.
fn refused(content: &str, options: &ReadOptions, parts: &[&str]) {
    let message = read_text(content, options).expect_err(content).to_string();
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
    assert!(!message.contains('\n'), "one line: {message}");
}

fn plain(content: &str, parts: &[&str]) {
    refused(content, &ReadOptions::default(), parts);
}

fn file_refused(path: PathBuf, parts: &[&str]) {
    let message = read_prices(&[path], &ReadOptions::default()).expect_err("refused").to_string();
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

#[test]
fn files_that_are_no_tables() {
    let files = Files::new();
    file_refused("no/such/prices.csv".into(), &["no/such/prices.csv", "file not found"]);
    file_refused(files.0.path().to_owned(), &["is a directory"]);
    file_refused(files.text("empty.csv", ""), &["empty.csv", "the file is empty"]);
    file_refused(files.bytes("empty.csv.gz", &gzip("")), &["the file is empty"]);
    file_refused(files.bytes("sheet.csv", b"PK\x03\x04...."), &["spreadsheet", "save it as CSV"]);
    file_refused(files.bytes("wide.csv", b"\xFF\xFEd\0a\0"), &["UTF-16"]);
    file_refused(files.bytes("cut.parquet", b"PAR1 and no footer"), &["Parquet file cannot be read"]);
    let rows: String = (0..9999).map(|second| format!("{},{}\n", DAYS[0] + second, second * 7 % 31 + 1)).collect();
    let whole = gzip(&format!("time,A\n{rows}"));
    file_refused(files.bytes("cut.csv.gz", &whole[..whole.len() / 2]), &["cut.csv.gz", "cut off or damaged"]);
    assert!(read_prices(&[], &ReadOptions::default()).is_err());
}

/// Every byte of a Parquet file changed in several ways: an error, or prices that keep their promises, and never a panic. (The Parquet
/// crate panics on some of these.)
#[test]
fn damaged_parquet_files_are_errors() {
    let files = Files::new();
    let days = Arc::new(Date32Array::from(vec![18263, 18264, 18267, 18268])) as ArrayRef;
    let prices = Arc::new(Float64Array::from(vec![10.0, 10.5, 11.0, 11.5])) as ArrayRef;
    let whole = std::fs::read(files.parquet("whole.parquet", vec![("date", days), ("A", prices)])).unwrap();
    let (mut refused, mut read) = (0, 0);
    for at in 0..whole.len() {
        for change in [0x01, 0x80, 0xFF] {
            let mut bytes = whole.clone();
            bytes[at] ^= change;
            match read_prices(&[files.bytes("damaged.parquet", &bytes)], &ReadOptions::default()) {
                Ok(prices) => {
                    assert!(prices.close.iter().all(|p| p.is_normal() && *p > 0.0) && prices.times.is_sorted(), "byte {at} ^ {change}");
                    assert!(prices.periods_per_year().is_ok_and(|p| p > 0.0), "byte {at} ^ {change}");
                    read += 1;
                }
                Err(Error::Internal(message)) => panic!("byte {at} ^ {change}: {message}"),
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 100 && read > 100, "{refused} refused, {read} read");
}

#[test]
fn times_outside_the_calendar_are_errors() {
    let files = Files::new();
    let stamps = Arc::new(TimestampSecondArray::from(vec![i64::MIN, i64::MAX])) as ArrayRef;
    let prices = Arc::new(Float64Array::from(vec![10.0, 10.5])) as ArrayRef;
    file_refused(files.parquet("far.parquet", vec![("time", stamps), ("A", prices)]), &["row 1", "this is not a time"]);
}

#[test]
fn too_few_rows() {
    plain("date,A\n", &["a header and no rows"]);
    plain("date,A\n2020-01-01,1\n", &["only one bar (2020-01-01)", "at least 2"]);
    plain("\n\n", &["empty"]);
}

#[test]
fn columns_that_are_not_there() {
    plain("when,A\n2020-01-01,1\n", &["no time column among: when, A", "--time-column NAME"]);
    let long = "date,symbol,open,adj_close\n2020-01-01,A,1,1\n2020-01-02,A,1,1\n";
    plain(long, &["column 'close'", "no such price column", "did you mean 'adj_close'", "(columns: open, adj_close)", "--price NAME"]);
    let options = ReadOptions { price: Some("opne".into()), ..Default::default() };
    refused(long, &options, &["column 'opne'", "did you mean 'open'"]);
    refused(WIDE, &options, &["each column is an asset", "AAA, BBB"]);
    refused(WIDE, &ReadOptions { time_column: Some("dat".into()), ..Default::default() }, &["no such time column", "did you mean 'date'"]);
    plain("date\n2020-01-01\n", &["no price column"]);
    plain("date,A,A\n2020-01-01,1,2\n", &["column 'A'", "two columns"]);
}

#[test]
fn cells_that_are_no_prices() {
    plain("date,A\n2020-01-01,1\n2020-01-02,\"1,234\"\n", &["row 3", "column 'A'", "value '1,234'", "not a number", "thousands"]);
    plain("date,A\n2020-01-01,1\n\n2020-01-02,abc\n", &["row 4", "value 'abc'"]);
    plain("date,A\n2020-01-01,1\n2020-01-02,inf\n", &["row 3", "not finite"]);
    plain("date,A\n2020-01-01,1\n2020-01-02,1e999\n", &["row 3", "not finite"]);
    plain("date,A\n2020-01-01,1\n2020-01-02,1e39\n", &["row 3", "32-bit"]);
    plain("date,A\n2020-01-01,1e-40\n", &["row 2", "32-bit"]);
    let positive = ["column 'close'", "A on 2020-01-02", "not positive", "--symbols", "--from/--to"];
    for (text, shown) in [("0", "value '0'"), ("-37.63", "value '-37.63'"), ("-0.0", "value '-0'")] {
        plain(&format!("date,symbol,close\n2020-01-01,A,1\n2020-01-02,A,{text}\n"), &[&positive[..], &["row 3", shown]].concat());
    }
    for text in ["date,A\n2020-01-01,1\n\n2020-01-02,x\n", "date,A\n2020-01-01,1\n\n2020-01-02,x", "date,A,\"n\n\"\n2020-01-02,x,1\n2020-01-02,x,1"] {
        for text in [text.to_owned(), text.replace('\n', "\r\n")] {
            let row = if text.contains('"') { "row 3, column 'A'" } else { "row 4, column 'A'" };
            plain(&text, &[row]);
            plain(&text.replace(",x", ",x,1,1"), &[&row[..5], "fields as in the header, got"]);
        }
    }
    let files = Files::new();
    let gz = files.bytes("p.csv.gz", &gzip("date,A\n2020-01-01,1\n2020-01-02,x\n"));
    file_refused(gz, &["p.csv.gz, row 3"]);
}

#[test]
fn rows_that_are_ragged_even_where_they_are_cut_away() {
    let options = ReadOptions { symbols: symbols(&["AAA"]), to: Some("2020-01-03".into()), ..Default::default() };
    refused(&WIDE.replace("-06,3,30", "-06,3"), &options, &["row 4", "expected 3 fields as in the header, got 2"]);
    plain(&WIDE.replace("-06,3,30", "-06,3,30,4"), &["row 4", "got 4"]);
}

#[test]
fn times_that_are_wrong() {
    plain("date,A\n01/02/2020,1\n", &["row 2", "column 'date'", "value '01/02/2020'", "YYYY-MM-DD"]);
    plain("date,A\n,1\n", &["row 2", "not a time"]);
    plain("date,A\n2020-01-02,1\n2020-01-01,1\n", &["row 3", "2020-01-01 comes after 2020-01-02", "sort the file"]);
    plain("date,A\n2020-01-02,1\n2020-01-02,1\n", &["row 3", "2020-01-02 is there twice"]);
    let long = "date,symbol,close\n2020-01-02,A,1\n2020-01-01,B,1\n2020-01-01,A,1\n";
    plain(long, &["row 4", "2020-01-01 of A comes after 2020-01-02"]);
    plain(&long.replace("01-01,A", "01-02,A"), &["row 4", "2020-01-02 of A is there twice"]);
    plain("date,symbol,close\n2020-01-02,,1\n", &["row 2", "column 'symbol'", "the symbol is empty"]);
}

#[test]
fn selections_that_leave_nothing() {
    let cut = |from: Option<&str>, to: Option<&str>| ReadOptions { from: from.map(Into::into), to: to.map(Into::into), ..Default::default() };
    refused(WIDE, &ReadOptions { symbols: symbols(&["AAB"]), ..Default::default() }, &["unknown symbol 'AAB'", "did you mean 'AAA'", "known: AAA, BBB"]);
    refused(LONG, &ReadOptions { symbols: symbols(&["aaa"]), ..Default::default() }, &["did you mean 'AAA'"]);
    refused(LONG, &ReadOptions { symbols: Some(Vec::new()), ..Default::default() }, &["--symbols", "at least one"]);
    refused(WIDE, &cut(Some("2020-13-01"), None), &["--from = 2020-13-01", "not a time"]);
    refused(WIDE, &cut(None, Some("soon")), &["--to = soon"]);
    refused(WIDE, &cut(Some("2021"), Some("2020")), &["--from = 2021", "after --to 2020"]);
    refused(WIDE, &cut(Some("2021"), None), &["--from = 2021", "no bar is left", "2020-01-02 to 2020-01-06"]);
    refused(WIDE, &cut(None, Some("2020-01-02")), &["only one bar"]);
}

#[test]
fn cells_that_are_missing() {
    let parts = ["row 3", "column 'A'", "A has no price on 2020-01-02", "2 of 6 cells", "2 of 2 symbols", "--missing drop", "--missing fill:5"];
    plain("date,A,B\n2020-01-01,1,1\n2020-01-02,,1\n2020-01-03,1,-\n", &parts);
    let late = "date,symbol,close\n2020-01-01,A,1\n2020-01-02,A,1\n2020-01-03,A,1\n2020-01-02,B,1\n2020-01-03,B,1\n";
    plain(late, &["column 'close'", "B has no price on 2020-01-01", "1 of 6 cells", "--from 2020-01-02"]);
    let options = ReadOptions { missing: Missing::Drop, ..Default::default() };
    let none = "date,A,B\n2020-01-01,1,\n2020-01-02,,1\n2020-01-03,1,1\n";
    refused(none, &options, &["no asset is left with --missing drop", "none of the 2 selected covers all 3 bars", "A: 1 of 3"]);
}

#[test]
fn files_that_overlap() {
    let files = Files::new();
    let refused = |a: &str, b: &str, parts: &[&str]| {
        let paths = [files.text("a.csv", a), files.text("b.csv", b)];
        let message = read_prices(&paths, &ReadOptions::default()).expect_err("overlap").to_string();
        parts.iter().for_each(|part| assert!(message.contains(part), "'{part}' is not in: {message}"));
    };
    refused(WIDE, WIDE, &["b.csv", "column 'AAA'", "a.csv has this symbol too"]);
    refused(LONG, WIDE, &["b.csv", "must not share a symbol"]);
    refused(LONG, LONG, &["b.csv", "2020-01-02", "a.csv too", "must not overlap"]);
}

#[test]
fn parquet_of_wrong_types() {
    let files = Files::new();
    let day: ArrayRef = Arc::new(Date32Array::from(vec![1, 2]));
    let text: ArrayRef = Arc::new(StringArray::from(vec!["a", "b"]));
    let bad: ArrayRef = Arc::new(Float64Array::from(vec![1.0, 0.0]));
    file_refused(files.parquet("text.parquet", vec![("date", day.clone()), ("A", text.clone())]), &["column 'A'", "prices must be numbers", "Utf8"]);
    file_refused(files.parquet("zero.parquet", vec![("date", day), ("A", bad.clone())]), &["row 2", "column 'A'", "value '0'", "not positive"]);
    file_refused(files.parquet("time.parquet", vec![("date", text), ("A", bad)]), &["row 1", "column 'date'", "value 'a'"]);
}
