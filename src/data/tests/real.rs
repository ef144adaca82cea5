//! The market data beside the project, where it is there; counts are those of its README files.

use super::*;

/// Paths under `shared/data`, or `None` with a reason.
fn data(names: &[&str]) -> Option<Vec<PathBuf>> {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data"));
    let paths: Vec<PathBuf> = names.iter().map(|name| root.join(name)).collect();
    if let Some(absent) = paths.iter().find(|path| !path.exists()) {
        println!("skipped: {} is not there", absent.display());
        return None;
    }
    Some(paths)
}

fn read(names: &[&str], options: ReadOptions) -> Option<Result<Prices>> {
    data(names).map(|paths| read_prices(&paths, &options))
}

#[test]
fn sp500_stocks() {
    let adjusted = ReadOptions { price: Some("adj_close".into()), missing: Missing::Drop, ..Default::default() };
    let start = std::time::Instant::now();
    let Some(prices) = read(&["sp500_stocks_daily/ohlcv.csv.gz"], adjusted.clone()) else { return };
    println!("sp500 in {:.2} s", start.elapsed().as_secs_f64());
    let prices = prices.unwrap();
    assert_eq!((prices.n_assets(), prices.n_bars(), prices.dropped.len()), (462, 2090, 42));
    assert_eq!((prices.format_time(prices.times[0]), prices.format_time(prices.times[2089])), ("2013-01-02".into(), "2021-04-21".into()));
    assert_eq!((prices.symbols[0].as_str(), prices.close[[0, 0]]), ("A", 27.9784));
    let per_year = prices.periods_per_year().unwrap();
    assert!((251.0..253.0).contains(&per_year), "{per_year}");
    let carr = prices.dropped.iter().find(|d| d.symbol == "CARR").unwrap();
    assert!(carr.reason.ends_with("first 2013-01-02"), "{}", carr.reason);
    // Two files of the same symbols, the later one first: 132,480 rows of 40 symbols before 2013.
    let both = ["sp500_stocks_daily/ohlcv.csv.gz", "sp500_stocks_daily/ohlcv_40_before_2013.csv.gz"];
    let Some(prices) = read(&both, ReadOptions { symbols: symbols(&["MSFT", "AAPL"]), ..adjusted }) else { return };
    assert_eq!(prices.unwrap().n_bars(), 3312 + 2090);
}

#[test]
fn etfs() {
    let file = ["etfs_daily/ohlcv.csv.gz"];
    let options = |names: &[&str], from: &str| ReadOptions { symbols: symbols(names), from: Some(from.into()), missing: Missing::Drop, ..Default::default() };
    let Some(spy) = read(&file, options(&["SPY"], "2005-02-25")) else { return };
    let spy = spy.unwrap();
    assert_eq!((spy.n_bars(), spy.open.is_some()), (3201, true));
    // Only QQQ and BNO have a bar on 2011-02-17, so that `drop` keeps no other complete symbol, and says what would.
    let all = |missing| read(&file, ReadOptions { from: Some("2005-02-25".into()), missing, ..Default::default() }).unwrap().unwrap();
    let dropped = all(Missing::Drop);
    assert_eq!((dropped.n_bars(), dropped.symbols.join("")), (3202, "QQQ".into()));
    assert!(dropped.notes[0].contains("would be kept by --missing fill:5"), "{:?}", dropped.notes);
    let filled = all(Missing::Fill { limit: 5 });
    println!("{} ETFs from 2005-02-25", filled.n_assets());
    assert_eq!(filled.n_assets() + filled.dropped.len(), 138);
    assert!(filled.n_assets() > 30 && filled.filled.contains(&("SPY".into(), 1)));
    let size = read(&file, options(&["SPY", "SIZE"], "2013-04-26")).unwrap().unwrap();
    assert!(size.dropped[0].reason.starts_with("163 of "), "{:?}", size.dropped);
    let rwx = read(&file, options(&["RWX", "SPY"], "2006-12-15")).unwrap().unwrap();
    assert_eq!((rwx.n_assets(), &rwx.open), (2, &None));
    assert!(rwx.notes[0].contains("2 of them") && rwx.notes[0].contains("RWX on 2006-12-15"), "{:?}", rwx.notes);
    assert!(read(&file, options(&["RWX", "SPY"], "2006-12-19")).unwrap().unwrap().open.is_some());
}

#[test]
fn hourly_bars() {
    let Some(stocks) = read(&["hourly_bars/us_equity_hourly.csv.gz"], ReadOptions { missing: Missing::Fill { limit: 7 }, ..Default::default() }) else {
        return;
    };
    let stocks = stocks.unwrap();
    assert!(stocks.has_time_of_day);
    assert_eq!(stocks.format_time(stocks.times[0]), "1998-01-02T09:00:00");
    let euro = read(&["hourly_bars/eurusd_hourly_bid.csv.gz"], ReadOptions::default()).unwrap().unwrap();
    assert_eq!((euro.n_bars(), euro.symbols.join("")), (74_439, "EURUSD".into()));
    let ask = read(&["hourly_bars/xauusd_hourly_bid.csv.gz"], ReadOptions { price: Some("ask_close".into()), ..Default::default() }).unwrap().unwrap();
    assert_eq!((ask.n_bars(), ask.close[[0, 0]], ask.open), (53_790, 1096.43, None));
    let coin = read(&["hourly_bars/btcusd_coinbase_daily.csv"], ReadOptions::default()).unwrap().unwrap();
    assert_eq!((coin.n_bars(), coin.has_time_of_day), (1318, false));
}

#[test]
fn wide_closes() {
    let file = ["closes_wide/pypfopt_20_stocks.csv.gz"];
    let Some(refused) = read(&file, ReadOptions::default()) else { return };
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("row 2, column 'GOOG'") && message.contains("35589 of 142520 cells"), "{message}");
    let complete = read(&file, ReadOptions { missing: Missing::Drop, ..Default::default() }).unwrap().unwrap();
    assert_eq!((complete.n_bars(), complete.n_assets() + complete.dropped.len()), (7126, 20));
    let all = read(&["closes_wide/skfolio_sp500_20_stocks.csv.gz", "closes_wide/skfolio_sp500_index.csv"], ReadOptions::default()).unwrap().unwrap();
    assert_eq!((all.n_bars(), all.n_assets(), all.symbols[20].as_str()), (8313, 21, "SP500"));
    let vix = read(&["vix_daily/vix.csv"], ReadOptions::default()).unwrap().unwrap();
    assert_eq!((vix.n_bars(), vix.symbols.join("")), (9235, "vix".into()));
}

#[test]
fn negative_crude_oil_is_refused_by_row_and_can_be_cut_away() {
    let file = ["spot_futures/futures_strips_daily.csv.gz"];
    let oil = |from: Option<&str>| ReadOptions { symbols: symbols(&["CL01"]), from: from.map(Into::into), missing: Missing::Drop, ..Default::default() };
    let Some(refused) = read(&file, oil(None)) else { return };
    let message = refused.unwrap_err().to_string();
    println!("{message}");
    for part in ["futures_strips_daily.csv.gz, row 3439, column 'CL01', value '-37.63'", "CL01 on 2020-04-20: the price is not positive"] {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
    assert!(read(&file, oil(Some("2020-04-21"))).unwrap().unwrap().n_bars() > 1300);
    // A weekend row of zeros: 2017-08-27 is a Sunday.
    let message = read(&file, ReadOptions::default()).unwrap().unwrap_err().to_string();
    assert!(message.contains("row 2757, column 'RB02', value '0'"), "{message}");
}
