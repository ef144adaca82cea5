//! `forback train`: models of windows on a price file, walk-forward.
//!
//! options → prices → samples (`train/market.rs`) → all folds × seeds × learning rates of a width train together → the choice of each fold, on
//! validation rows inside its training window → predictions out of sample → figures, what they earn, a verdict → files (`train_files.rs`).

use super::price_files::PriceFiles;
use super::store::difference;
use super::sweep::{opens, unknown};
use super::{Common, catch_interrupts, is_interrupted, results, say, train_files};
use crate::data::Prices;
use crate::kernels::backtest_sweep::Execution;
use crate::kernels::loss::Criterion;
use crate::kernels::objective::Goal;
use crate::kernels::optimiser::Average;
use crate::kernels::performance::Performance;
use crate::kernels::portfolio_sweep::{Rebalance, Scheme};
use crate::nn::Declared;
use crate::sim::portfolio::{Pooled, Pooling, portfolio_of};
use crate::sim::sweep::fills;
use crate::sim::walk_forward::WalkForward;
use crate::train::forecaster::{Forecaster, Kind};
use crate::train::log::Log;
use crate::train::market::{Bars, Feature, Samples, Target};
use crate::train::schedule::{EarlyStopping, Schedule};
use crate::train::score;
use crate::train::walk_forward::{Models, Plan, Selected, Stitched, select};
use crate::train::{Earnings, Epoch, Model, Objective, Step, TrainConfig, Trainer};
use crate::{Device, Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use ndarray::{Array2, ArrayView2};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Arguments of `forback train`.
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    pub(super) prices: PriceFiles,
    /// lstm, gru, transformer or mlp.
    #[arg(long, default_value = "lstm")]
    model: String,
    /// What models see of each bar: returns:N, momentum:N (in deviations), volatility:N; several numbers after a name are several features.
    #[arg(long, default_value = "returns:1,5,21,volatility:21")]
    features: String,
    /// Bars of a window that a model sees.
    #[arg(long, value_name = "BARS", default_value_t = 21)]
    window: usize,
    /// What is forecast: return, sign or volatility.
    #[arg(long, default_value = "return")]
    target: String,
    /// Bars that a forecast is for (default 1; 21 for a volatility).
    #[arg(long, value_name = "BARS")]
    horizon: Option<usize>,
    /// What is minimised: mse or huber (return, volatility), cross-entropy (sign); or made of what positions between -1 and 1 earn after costs:
    /// sharpe, sortino, calmar, max-drawdown, cvar, mean-variance.
    #[arg(long)]
    objective: Option<String>,
    /// Objectives of earnings: per epoch (exact, over all bars) or batch (of so many bars in a row).
    #[arg(long, value_name = "epoch|batch", default_value = "epoch")]
    per: String,
    /// Widths of the models, comma-separated: configurations to choose from.
    #[arg(long, default_value = "16", value_delimiter = ',')]
    hidden: Vec<usize>,
    /// Learning rates, comma-separated: configurations to choose from.
    #[arg(long, default_value = "1e-3,3e-3", value_delimiter = ',', allow_negative_numbers = true)]
    learning_rate: Vec<f64>,
    /// Models of each configuration and fold that differ by seed; their predictions are averaged.
    #[arg(long, default_value_t = 4)]
    seeds: usize,
    /// Bars of a training window, of which the last share validates.
    #[arg(long, value_name = "BARS", default_value_t = 756)]
    train: u32,
    /// Bars of a test window.
    #[arg(long, value_name = "BARS", default_value_t = 63)]
    test: u32,
    /// Bars between test windows (default: those of a test window).
    #[arg(long, value_name = "BARS")]
    step: Option<u32>,
    /// Bars left out after a training window, beyond those that its targets look ahead.
    #[arg(long, value_name = "BARS", default_value_t = 0)]
    purge: u32,
    /// Further bars left out.
    #[arg(long, value_name = "BARS", default_value_t = 0)]
    embargo: u32,
    /// Training windows start at the first bar and grow.
    #[arg(long)]
    anchored: bool,
    /// Share of a training window that chooses the best epoch and the configuration.
    #[arg(long, value_name = "SHARE", default_value_t = 0.2, allow_negative_numbers = true)]
    valid: f64,
    /// A model for each asset instead of one for all.
    #[arg(long)]
    per_asset: bool,
    /// Most epochs.
    #[arg(long, default_value_t = 20)]
    epochs: usize,
    /// Windows of a model in a batch.
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Epochs without improvement that a model is let pass before it stops; 0 never stops one.
    #[arg(long, value_name = "EPOCHS", default_value_t = 5)]
    patience: usize,
    /// Learning rate over time: constant, cosine or plateau.
    #[arg(long, default_value = "constant")]
    schedule: String,
    /// Steps over which learning rates rise.
    #[arg(long, value_name = "STEPS", default_value_t = 0)]
    warm_up: u64,
    /// Average of the weights that validates and predicts: none, ema:DECAY or polyak[:STEPS left out].
    #[arg(long, default_value = "none")]
    average: String,
    /// Decoupled weight decay of matrices.
    #[arg(long, default_value_t = 0.01, allow_negative_numbers = true)]
    weight_decay: f64,
    /// One-way cost in basis points of traded notional.
    #[arg(long, default_value_t = 10.0, allow_negative_numbers = true)]
    cost_bps: f64,
    /// same_close (earns the next bar; optimistic), next_open (traded at the next open) or next_close (traded one close later).
    #[arg(long, default_value = "next_close")]
    execution: String,
    /// Assets to print.
    #[arg(long, default_value_t = 10)]
    top: usize,
    /// Write predictions.parquet (which `forback sweep --signals` takes), models/*.safetensors, log.jsonl, train.json and config.toml into this folder.
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// Go on with the interrupted training in --out; starts from the beginning if there is none.
    #[arg(long, requires = "out")]
    resume: bool,
    /// Print what would be trained, and stop.
    #[arg(long, visible_alias = "dry-run")]
    plan: bool,
    /// Read options from a TOML file; the command line wins.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

fn bad(name: &str, value: &str, help: &str) -> Error {
    Error::Parameter { op: "train", name: name.into(), value: value.into(), help: help.into() }
}

/// What the options say, checked.
struct Options {
    kind: Kind,
    features: Vec<Feature>,
    target: Target,
    horizon: usize,
    objective: String,
    goal: Option<Goal>,
    execution: Execution,
    windows: WalkForward,
    schedule: Schedule,
    average: Average,
}

const CRITERIA: [&str; 3] = ["mse", "huber", "cross-entropy"];
const GOALS: [&str; 6] = ["sharpe", "sortino", "calmar", "max-drawdown", "cvar", "mean-variance"];

impl Options {
    fn of(args: &Args) -> Result<Options> {
        let wanted = match args.target.as_str() {
            "return" => Target::Return,
            "sign" => Target::Sign,
            "volatility" => Target::Volatility,
            other => return Err(unknown("target", other, ["return", "sign", "volatility"])),
        };
        let usual = if wanted == Target::Sign { "cross-entropy" } else { "mse" };
        let objective = args.objective.as_deref().unwrap_or(usual).replace('_', "-");
        let goal = goal(&objective)?;
        let fits = match objective.as_str() {
            "cross-entropy" => wanted == Target::Sign,
            "mse" | "huber" => wanted != Target::Sign,
            _ => wanted == Target::Return,
        };
        if !fits {
            let help = format!("does not fit --target {}: mse and huber take return or volatility, cross-entropy takes sign, the others return", args.target);
            return Err(bad("--objective", &objective, &help));
        }
        let horizon = args.horizon.unwrap_or(if wanted == Target::Volatility { 21 } else { 1 });
        if goal.is_some() && horizon != 1 {
            return Err(bad("--horizon", &horizon.to_string(), "positions are taken anew each bar: leave it at 1 for an objective of earnings"));
        }
        for (name, value) in [("--seeds", args.seeds), ("--epochs", args.epochs), ("--batch", args.batch), ("--window", args.window)] {
            if value == 0 {
                return Err(bad(name, "0", "give at least 1"));
            }
        }
        if let Some(rate) = args.learning_rate.iter().find(|r| !(r.is_finite() && **r > 0.0)) {
            return Err(bad("--learning-rate", &rate.to_string(), "give positive numbers, such as 1e-3,3e-3"));
        }
        if !(args.cost_bps.is_finite() && args.cost_bps >= 0.0) {
            return Err(bad("--cost-bps", &args.cost_bps.to_string(), "give basis points, 0 or more"));
        }
        args.prices.columns.check("train")?;
        if !["epoch", "batch"].contains(&args.per.as_str()) {
            return Err(unknown("--per", &args.per, ["epoch", "batch"]));
        }
        Ok(Options {
            kind: args.model.parse()?,
            features: Feature::list(&args.features)?,
            target: if goal.is_some() { Target::Position } else { wanted },
            horizon,
            objective,
            goal,
            execution: Execution::named(&args.execution).map_err(|_| unknown("execution", &args.execution, ["same_close", "next_open", "next_close"]))?,
            windows: WalkForward {
                train: args.train,
                test: args.test,
                step: args.step.unwrap_or(args.test),
                anchored: args.anchored,
                purge: args.purge,
                embargo: args.embargo,
                start: 0,
            },
            schedule: match args.schedule.as_str() {
                "constant" => Schedule::Constant,
                "cosine" => Schedule::Cosine { floor: 0.0 },
                "plateau" => Schedule::Plateau { factor: 0.5, patience: 2, threshold: 0.0, floor: 0.01 },
                other => return Err(unknown("schedule", other, ["constant", "cosine", "plateau"])),
            },
            average: average(&args.average)?,
        })
    }

    /// Minimised, for bars of so many a year.
    fn minimised(&self, args: &Args, periods_per_year: f64) -> Objective {
        match (self.goal, self.objective.as_str()) {
            (Some(goal), _) => {
                let per_epoch = args.per == "epoch";
                Objective::Earnings(Earnings { periods_per_year, cost: args.cost_bps / 1e4, per_epoch, ..Earnings::new(goal) })
            }
            (None, "huber") => Criterion::Huber { delta: 1.0 }.into(),
            (None, "cross-entropy") => Criterion::Bce { positive_weight: 1.0 }.into(),
            _ => Criterion::Mse.into(),
        }
    }
}

fn goal(name: &str) -> Result<Option<Goal>> {
    Ok(Some(match name {
        "sharpe" => Goal::Sharpe { risk_free: 0.0 },
        "sortino" => Goal::Sortino { target: 0.0 },
        "calmar" => Goal::Calmar,
        "max-drawdown" => Goal::MaxDrawdown { additive: false },
        "cvar" => Goal::Cvar { alpha: 0.05 },
        "mean-variance" => Goal::MeanVariance { risk_aversion: 1.0 },
        other if CRITERIA.contains(&other) => return Ok(None),
        other => {
            let known = [&CRITERIA[..], &GOALS].concat();
            let suggestion = crate::data::nearest(other, known.iter().copied());
            return Err(Error::Unknown { kind: "objective", given: other.into(), suggestion, known: known.into_iter().map(String::from).collect() });
        }
    }))
}

fn average(text: &str) -> Result<Average> {
    let help = "use none, ema:DECAY with a decay in [0, 1), or polyak:STEPS";
    Ok(match text.split_once(':').map_or((text, None), |(name, value)| (name, Some(value))) {
        ("none", None) => Average::None,
        ("ema", decay) => {
            let decay = decay.unwrap_or("0.99").parse::<f64>().ok().filter(|d| (0.0..1.0).contains(d));
            Average::Exponential { decay: decay.ok_or_else(|| bad("--average", text, help))? }
        }
        ("polyak", start) => Average::Polyak { start: start.unwrap_or("0").parse().map_err(|_| bad("--average", text, help))? },
        _ => return Err(bad("--average", text, help)),
    })
}

// ---- training ---------------------------------------------------------------------------------------------------------

/// Everything that is trained, and on what.
pub(super) struct Job<'a> {
    pub(super) args: &'a Args,
    options: Options,
    device: Device,
    pub(super) prices: Prices,
    periods_per_year: f64,
    /// Prices [T,N] that decisions are filled at.
    fill: Array2<f32>,
    delay: usize,
    pub(super) samples: Samples,
    pub(super) models: Models,
}

/// Seconds between two saves of a training that could be interrupted.
const SAVE_EVERY: Duration = Duration::from_secs(30);
/// What an interrupted training leaves in its folder.
const MARK: &str = "training.json";

/// Runs the command; `config` is what it was asked for, as TOML.
pub(super) fn run(args: &Args, config: &str) -> Result<ExitCode> {
    let options = Options::of(args)?;
    let device = args.common.open()?;
    let prices = args.prices.read("train", false, args.common.seed)?;
    let periods_per_year = args.prices.columns.periods_per_year(&prices)?;
    let fill = fills(prices.close.view(), opens(&prices, options.execution)?).into_owned();
    let fill = Array2::from_shape_vec(prices.close.dim(), fill).map_err(|e| Error::Internal(e.to_string()))?;
    let delay = usize::from(options.execution == Execution::NextClose);
    let bars = Bars { close: prices.close.view(), fill: fill.view(), delay, ahead: usize::from(options.execution == Execution::NextOpen) };
    let samples = Samples::of(&bars, &options.features, options.target, options.horizon, args.window)?;
    let plan = Plan {
        windows: options.windows,
        horizon: samples.reach as u32,
        valid: args.valid,
        seeds: args.seeds,
        learning_rates: args.learning_rate.clone(),
        per_series: args.per_asset,
    };
    let models = plan.models(&samples.table)?;
    let job = Job { args, options, device, prices, periods_per_year, fill, delay, samples, models };
    let widths = args.hidden.iter().map(|&h| job.model(h)).collect::<Result<Vec<_>>>()?;
    if args.plan {
        job.say_plan(&widths);
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(dir) = &args.out {
        results::folder(dir)?;
        job.claim(dir)?;
    }
    catch_interrupts()?;
    let start = Instant::now();
    let mut trained = Vec::new();
    let mut notes = Vec::new();
    for (model, &hidden) in widths.iter().zip(&args.hidden) {
        trained.push(job.train(model, hidden, &mut notes).inspect_err(|error| job.release(error))?);
    }
    let selected = select(&trained)?;
    let found = Found::of(&job, &trained, selected, notes, start.elapsed().as_secs_f64())?;
    if let Some(dir) = &args.out {
        train_files::write(dir, &found)?;
        results::Whole::text(dir, "config.toml", &config.replace("device = \"auto\"", &format!("device = \"{}\"", job.device.info().kind.name())))?;
        for hidden in &args.hidden {
            // Best effort: a finished training needs them no more.
            let _ = std::fs::remove_file(state_of(dir, *hidden));
        }
        let _ = std::fs::remove_file(dir.join(MARK));
    }
    if args.common.json {
        say(&found.json().to_string())
    } else {
        found.text()
    }
    Ok(ExitCode::SUCCESS)
}

fn state_of(dir: &Path, hidden: usize) -> PathBuf {
    dir.join(format!("training-{hidden}.safetensors"))
}

impl Job<'_> {
    fn model(&self, hidden: usize) -> Result<Forecaster> {
        Forecaster::new(self.options.kind, self.args.window, self.options.features.len(), hidden, 1, self.options.target == Target::Position)
    }

    fn config(&self) -> TrainConfig {
        let args = self.args;
        TrainConfig {
            epochs: args.epochs,
            batch: args.batch,
            objective: self.options.minimised(args, self.periods_per_year),
            learning_rate: self.models.learning_rates.clone(),
            weight_decay: args.weight_decay,
            schedule: self.options.schedule.clone(),
            warm_up: args.warm_up,
            stopping: (args.patience > 0).then_some(EarlyStopping { patience: args.patience, threshold: 0.0 }),
            average: self.options.average,
            seed: args.common.seed,
            ..TrainConfig::default()
        }
    }

    /// Everything that decides the results.
    fn identity(&self) -> Value {
        let (a, p) = (self.args, &self.prices);
        let data = if p.sha256.is_empty() { p.sources.join(", ") } else { p.sha256.clone() };
        json!({
            "version": env!("CARGO_PKG_VERSION"), "device": self.device.info().kind.name(), "seed": a.common.seed, "data": data,
            "symbols": p.symbols, "bars": p.n_bars(), "first": p.times.first(), "model": self.options.kind.name(), "features": self.features(),
            "window": a.window, "target": a.target, "horizon": self.options.horizon, "objective": self.options.objective, "per": a.per,
            "hidden": a.hidden, "learning_rate": a.learning_rate, "seeds": a.seeds, "windows": self.options.windows.to_string(), "valid": a.valid,
            "per_asset": a.per_asset, "epochs": a.epochs, "batch": a.batch, "patience": a.patience, "schedule": a.schedule, "warm_up": a.warm_up,
            "average": a.average, "weight_decay": a.weight_decay, "cost_bps": a.cost_bps, "execution": a.execution,
            "periods_per_year": self.periods_per_year,
        })
    }

    fn features(&self) -> String {
        self.options.features.iter().map(Feature::to_string).collect::<Vec<_>>().join(",")
    }

    /// Marks the folder as that of this training, or finds that it is another's.
    fn claim(&self, dir: &Path) -> Result<()> {
        let refused = |name: &str, help: String| Error::Parameter { op: "train", name: name.into(), value: dir.display().to_string(), help };
        let ours = self.identity();
        if let Ok(text) = std::fs::read_to_string(dir.join(MARK)) {
            if !self.args.resume {
                return Err(refused("--out", "the folder holds an interrupted training; go on with --resume, or remove it to start again".into()));
            }
            let theirs: Value = serde_json::from_str(&text).map_err(|_| refused("--resume", format!("{MARK} is damaged; remove it to start again")))?;
            // As it comes back from text: a number may lose its last bit.
            let ours = serde_json::from_str(&ours.to_string()).unwrap_or(ours);
            if let Some((field, theirs, ours)) = difference(&theirs, &ours) {
                let help = format!("the interrupted training has {field} {theirs}, this one {ours}; repeat its options, or name another --out");
                return Err(refused("--resume", help));
            }
            return Ok(());
        }
        results::Whole::text(dir, MARK, &ours.to_string())
    }

    /// Takes the mark back where a training ended before there was anything to go on with.
    fn release(&self, error: &Error) {
        let Some(dir) = &self.args.out else { return };
        let kept = self.args.hidden.iter().any(|&hidden| state_of(dir, hidden).exists());
        if !kept && !matches!(error, Error::Interrupted { .. }) {
            // Best effort: the error that led here is the one to report.
            let _ = std::fs::remove_file(dir.join(MARK));
        }
    }

    /// All models of one width.
    fn train(&self, model: &Forecaster, hidden: usize, notes: &mut Vec<String>) -> Result<Stitched> {
        let config = self.config();
        let epochs = config.epochs;
        let mut trainer = Trainer::new(&self.device, model, &self.samples.table, &self.models.folds, config)?;
        let state = self.args.out.as_deref().map(|dir| state_of(dir, hidden));
        if let Some(state) = state.as_ref().filter(|state| self.args.resume && state.exists()) {
            trainer.resume(state)?;
        }
        let mut log = self.log(hidden, trainer.epochs())?;
        let bar = progress(self.args.common.json, epochs, hidden);
        let (watched, begun) = (bar.clone(), Instant::now());
        let mut windows = 0;
        trainer.watch(move |step: &Step| {
            windows += step.windows;
            watched.set_length((epochs * step.batches) as u64);
            watched.set_position((step.epoch * step.batches + step.batch) as u64);
            let loss = if step.loss.is_nan() { String::new() } else { format!("loss {:.4}, ", step.loss) };
            let rate = windows as f64 / begun.elapsed().as_secs_f64().max(1e-9);
            watched.set_message(format!("epoch {}/{epochs}, {loss}{rate:.0} windows/s", step.epoch + 1));
            Ok(())
        });
        let mut saved = Instant::now();
        let done = trainer.fit_saving(&mut |trainer, epoch| {
            if let Some(log) = &mut log {
                log.epoch(epoch, &|k| self.names(k, hidden))?;
            }
            self.note(epoch, hidden, notes);
            let stop = is_interrupted();
            if let Some(state) = state.as_ref().filter(|_| stop || saved.elapsed() > SAVE_EVERY) {
                trainer.save(state)?;
                saved = Instant::now();
            }
            if stop { Err(self.interrupted(epoch)) } else { Ok(()) }
        });
        bar.finish_and_clear();
        done?;
        if let (Some(state), Some(dir)) = (&state, &self.args.out) {
            trainer.save(state)?;
            train_files::models(dir, trainer.evaluated(), &|k| self.file(k, hidden))?;
        }
        let losses = trainer.progress().iter().map(|p| p.best).collect();
        Ok(self.models.stitch(&self.samples.table, &trainer.predict()?, losses))
    }

    fn log(&self, hidden: usize, epochs: usize) -> Result<Option<Log>> {
        let Some(dir) = &self.args.out else { return Ok(None) };
        let mut header = self.identity();
        header["device"] = json!(self.device.info().to_string());
        header["models"] = json!(self.models.folds.len());
        let path = dir.join("log.jsonl");
        let first = self.args.hidden.first() == Some(&hidden) && epochs == 0;
        if first { Log::create(&path, &header).map(Some) } else { Log::append(&path, &header).map(Some) }
    }

    /// What is known of model `k`.
    fn names(&self, k: usize, hidden: usize) -> Vec<(&'static str, Value)> {
        let place = self.models.place(k);
        let mut names = vec![("hidden", json!(hidden)), ("fold", json!(place.fold)), ("seed", json!(place.seed))];
        if self.args.per_asset {
            names.push(("symbol", json!(self.prices.symbols[place.group])));
        }
        names
    }

    fn file(&self, k: usize, hidden: usize) -> String {
        let place = self.models.place(k);
        let asset = if self.args.per_asset { format!("-asset{}", place.group) } else { String::new() };
        format!("hidden{hidden}-rate{}{asset}-fold{}-seed{}.safetensors", self.args.learning_rate[place.configuration], place.fold, place.seed)
    }

    /// Says once which models skip steps.
    fn note(&self, epoch: &Epoch, hidden: usize, notes: &mut Vec<String>) {
        for (k, first) in epoch.first_skipped.iter().enumerate().filter_map(|(k, f)| f.map(|f| (k, f))) {
            let start = format!("width {hidden}, model {k} ");
            if notes.len() < 20 && !notes.iter().any(|note: &String| note.starts_with(&start)) {
                let place = self.models.place(k);
                let rate = self.models.learning_rates[k];
                let what =
                    format!("(rate {rate}, fold {}, seed {}) skipped steps from step {first} on: its loss or gradient was not finite", place.fold, place.seed);
                notes.push(start + &what);
            }
        }
    }

    fn interrupted(&self, epoch: &Epoch) -> Error {
        let message = match &self.args.out {
            Some(dir) => format!("{} epochs are kept in {}; the same command with --resume goes on", epoch.epoch + 1, dir.display()),
            None => format!("{} epochs were done; with --out DIR they would be kept, and --resume would go on", epoch.epoch + 1),
        };
        Error::Interrupted { message }
    }

    fn say_plan(&self, widths: &[Forecaster]) {
        let counts: Vec<usize> = widths
            .iter()
            .map(|model| {
                let mut declared = Declared::new();
                model.declare(&mut declared);
                declared.count()
            })
            .collect();
        let m = self.models.folds.len();
        let longest = self.models.folds.iter().map(|f| f.train.len()).max().unwrap_or(0);
        let batches = longest.div_ceil(self.args.batch);
        let windows = (batches * self.args.batch * m * self.args.epochs * counts.len()) as u64;
        if self.args.common.json {
            let plan = json!({ "models": m * counts.len(), "folds": self.models.windows.len(), "parameters": counts, "batches": batches,
                "epochs": self.args.epochs, "windows": windows, "assets": self.prices.n_assets(), "bars": self.prices.n_bars() });
            return say(&json!({ "plan": plan, "run": self.identity() }).to_string());
        }
        self.say_head(counts.len());
        for (hidden, count) in self.args.hidden.iter().zip(&counts) {
            say(&format!("width    {hidden}: {m} models × {count} parameters, {:.0} MB with moments and gradients", (m * count * 16) as f64 / 1e6));
        }
        say(&format!("epochs   {} at most, {batches} batches of {} windows a model: {windows} windows", self.args.epochs, self.args.batch));
    }

    fn say_head(&self, widths: usize) {
        let (p, a) = (&self.prices, self.args);
        let time = |t: Option<&i64>| t.map(|t| p.format_time(*t)).unwrap_or_default();
        let assets = if let [one] = p.symbols.as_slice() { one.clone() } else { format!("{} assets", p.n_assets()) };
        say(&format!("device   {}", self.device.info()));
        say(&format!("data     {}: {assets} × {} bars, {} to {}", p.sources.join(", "), p.n_bars(), time(p.times.first()), time(p.times.last())));
        let derived = if a.prices.columns.periods_per_year.is_some() { "as given" } else { "derived from the dates" };
        say(&format!("         {:.1} periods per year ({derived})", self.periods_per_year));
        p.notes.iter().for_each(|note| say(&format!("note     {note}")));
        if let Some(first) = p.dropped.first() {
            say(&format!("dropped  {} assets, such as {}: {}", p.dropped.len(), first.symbol, first.reason));
        }
        let what = match self.options.target {
            Target::Position => "a position".to_string(),
            _ if self.options.horizon == 1 => format!("the {} of a bar", a.target),
            _ => format!("the {} of {} bars", a.target, self.options.horizon),
        };
        let per = if self.options.goal.is_some() { format!(" per {}", a.per) } else { String::new() };
        say(&format!("model    {} on windows of {} bars of {}", self.options.kind.name(), a.window, self.features()));
        say(&format!("         for {what}, {}{per}, {} after the decision", self.options.objective, a.execution));
        let rates = a.learning_rate.len();
        let kind = match (a.per_asset, p.n_assets()) {
            (_, 1) => String::new(),
            (true, n) => format!(" × {n} assets"),
            (false, n) => format!(", each for all {n} assets"),
        };
        say(&format!(
            "trained  {} models: {} folds × {} configurations (hidden {}; rate {}) × {} seeds{kind}",
            self.models.folds.len() * widths,
            self.models.windows.len(),
            widths * rates,
            list(&a.hidden),
            list(&a.learning_rate),
            a.seeds
        ));
        say(&format!("         walk-forward {}, targets {} bars ahead purged", self.options.windows, self.samples.reach));
    }
}

fn progress(silent: bool, epochs: usize, hidden: usize) -> ProgressBar {
    if silent || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{prefix} {bar:40} {msg}, {eta} left").unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(epochs as u64).with_style(style).with_prefix(format!("width {hidden}"))
}

// ---- what was found ---------------------------------------------------------------------------------------------------

/// Figures of one asset, or of all.
pub(super) struct Figures {
    name: String,
    rows: usize,
    correlation: f64,
    rank_correlation: f64,
    r_squared: f64,
    accuracy: f64,
    naive_accuracy: f64,
}

/// A book of positions and what it earned.
pub(super) struct Book {
    name: &'static str,
    pub(super) pooled: Pooled,
}

/// One row of predictions, in the units of what is forecast.
pub(super) struct Prediction {
    pub(super) asset: usize,
    pub(super) bar: usize,
    pub(super) fold: u32,
    pub(super) value: f64,
    pub(super) naive: f64,
    pub(super) truth: f64,
    /// Position, as a share of what an asset may have; none for volatilities.
    pub(super) position: Option<f32>,
}

/// Everything that the outputs are made of.
pub(super) struct Found<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) predictions: Vec<Prediction>,
    figures: Vec<Figures>,
    books: Vec<Book>,
    chosen: Vec<usize>,
    notes: Vec<String>,
    seconds: f64,
}

impl<'a> Found<'a> {
    fn of(job: &'a Job<'a>, trained: &[Stitched], selected: Selected, notes: Vec<String>, seconds: f64) -> Result<Found<'a>> {
        let first = trained.first().ok_or_else(|| Error::Internal("nothing was trained".into()))?;
        let naive = job.naive();
        let folds = job.models.windows.len();
        let predictions: Vec<Prediction> = first
            .rows
            .iter()
            .enumerate()
            .map(|(i, &row)| {
                let (asset, bar) = job.samples.place(row);
                let raw = f64::from(selected.predictions[i]);
                let known = naive[first.group[i] as usize * folds + first.fold[i] as usize];
                let (value, naive, position) = match job.options.target {
                    Target::Return => (raw * job.samples.unit[row as usize], known, Some(if raw > 0.0 { 1.0 } else { -1.0 })),
                    Target::Sign => (1.0 / (1.0 + (-raw).exp()), known, Some(if raw > 0.0 { 1.0 } else { -1.0 })),
                    Target::Volatility => (raw + job.samples.base[row as usize], job.samples.base[row as usize], None),
                    Target::Position => (raw, known, Some(raw as f32)),
                };
                Prediction { asset, bar, fold: first.fold[i], value, naive, truth: job.samples.truth[row as usize], position }
            })
            .collect();
        let mut found = Found { job, predictions, figures: Vec::new(), books: Vec::new(), chosen: selected.chosen, notes, seconds };
        let n = job.prices.n_assets();
        found.figures.push(found.figures_of("all", |_| true));
        if n > 1 {
            let each = (0..n).map(|asset| found.figures_of(&job.prices.symbols[asset], |p| p.asset == asset)).collect::<Vec<_>>();
            found.figures.extend(each);
        }
        found.trade()?;
        Ok(found)
    }

    fn figures_of(&self, name: &str, of: impl Fn(&Prediction) -> bool) -> Figures {
        let rows: Vec<&Prediction> = self.predictions.iter().filter(|p| of(p) && p.truth.is_finite()).collect();
        let column = |f: &dyn Fn(&Prediction) -> f64| rows.iter().map(|p| f(p)).collect::<Vec<f64>>();
        let (value, naive, truth) = (column(&|p| p.value), column(&|p| p.naive), column(&|p| p.truth));
        let middle = if self.job.options.target == Target::Sign { 0.5 } else { 0.0 };
        let above = |list: &[f64]| list.iter().map(|x| *x > middle).collect::<Vec<bool>>();
        let signs = self.job.options.target != Target::Volatility;
        Figures {
            name: name.into(),
            rows: rows.len(),
            correlation: score::correlation(&value, &truth),
            rank_correlation: score::rank_correlation(&value, &truth),
            r_squared: if self.job.options.target == Target::Position { f64::NAN } else { score::r_squared(&truth, &value, &naive) },
            accuracy: if signs { score::accuracy(&above(&truth), &above(&value)) } else { f64::NAN },
            naive_accuracy: if signs { score::accuracy(&above(&truth), &above(&naive)) } else { f64::NAN },
        }
    }

    /// What the positions earn, beside those of the naive forecast and holding everything.
    fn trade(&mut self) -> Result<()> {
        let (job, n) = (self.job, self.job.prices.n_assets());
        let positions = || self.predictions.iter().filter_map(|p| Some((p, p.position?)));
        let bars = || positions().map(|(p, _)| p.bar + job.delay);
        let (Some(from), Some(to)) = (bars().min(), bars().max()) else { return Ok(()) };
        let returns = Array2::from_shape_fn((to + 1 - from, n), |(j, i)| job.fill[[from + j + 1, i]] / job.fill[[from + j, i]] - 1.0);
        let middle = if job.options.target == Target::Sign { 0.5 } else { 0.0 };
        let mut held: Vec<Array2<f32>> = vec![Array2::zeros(returns.dim()); 3];
        for (p, position) in positions() {
            let at = [p.bar + job.delay - from, p.asset];
            held[0][at] = position;
            held[1][at] = if p.naive > middle { 1.0 } else { -1.0 };
            held[2][at] = 1.0;
        }
        let pooling = Pooling {
            scheme: Scheme::Equal,
            cap: None,
            rebalance: Rebalance::default(),
            cost_bps: job.args.cost_bps,
            execution: Execution::SameClose,
            start: 0,
            periods_per_year: job.periods_per_year,
        };
        let earned = |held: ArrayView2<'_, f32>| portfolio_of(&job.device, returns.view(), held, &pooling);
        let names = [if job.options.target == Target::Position { "positions" } else { "sign of the forecast" }, "sign of the naive one", "buy and hold"];
        let books = names.iter().zip(&held).map(|(&name, held)| Ok(Book { name, pooled: earned(held.view())? })).collect::<Result<Vec<_>>>()?;
        self.books = books;
        Ok(())
    }

    /// Bars out of sample.
    fn bars(&self) -> usize {
        let mut bars: Vec<usize> = self.predictions.iter().map(|p| p.bar).collect();
        bars.sort_unstable();
        bars.dedup();
        bars.len()
    }

    fn configurations(&self) -> usize {
        self.job.args.hidden.len() * self.job.args.learning_rate.len()
    }

    /// How often each configuration was chosen, with its name.
    fn choices(&self) -> Vec<(String, usize)> {
        let a = self.job.args;
        let names = a.hidden.iter().flat_map(|h| a.learning_rate.iter().map(move |r| format!("width {h}, rate {r}")));
        names.enumerate().map(|(i, name)| (name, self.chosen.iter().filter(|c| **c == i).count())).collect()
    }

    /// The correlation over what chance gives it: forecasts that overlap, and assets that move together, count as one.
    fn t_value(&self) -> f64 {
        let independent = self.bars() as f64 / self.job.options.horizon as f64;
        self.figures.first().map_or(f64::NAN, |f| f.rank_correlation * independent.sqrt())
    }

    fn verdict(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let Some(all) = self.figures.first() else { return lines };
        let t = self.t_value();
        if self.job.options.target == Target::Volatility {
            let what = if all.r_squared > 0.0 { "closer to what came" } else { "no closer to what came" };
            lines.push(format!("squared error of the forecasts: {:.2} of that of the volatility so far, {what}", 1.0 - all.r_squared));
        } else {
            let what = if t.abs() < 2.0 {
                "chance alone gives as much"
            } else if t > 0.0 {
                "more than chance gives"
            } else {
                "worse than chance: it is wrong more often than right"
            };
            lines.push(format!("rank correlation with what came: {:.3}, {t:.1} deviations from none: {what}", all.rank_correlation));
        }
        if let [model, _, hold] = self.books.as_slice() {
            let (ours, theirs) = (model.pooled.performance.sharpe, hold.pooled.performance.sharpe);
            let what = if ours > theirs { "more than" } else { "no more than" };
            lines.push(format!(
                "Sharpe ratio {} after {} bp, {what} the {} of holding everything; probability that the true one is above 0: {}",
                ratio(ours),
                self.job.args.cost_bps,
                ratio(theirs),
                ratio(model.pooled.performance.probabilistic_sharpe)
            ));
        }
        let k = self.configurations();
        let choice =
            if k > 1 { format!("{k} configurations were tried and chosen from inside each training window") } else { "one configuration was trained".into() };
        lines.push(format!("{choice}: out of sample this is 1 trial; every run of other options on these bars is one more, and lowers what it proves"));
        lines
    }

    fn text(&self) {
        let job = self.job;
        job.say_head(job.args.hidden.len());
        say(&format!("         in {:.1} s", self.seconds));
        self.notes.iter().for_each(|note| say(&format!("note     {note}")));
        if self.configurations() > 1 {
            let list: Vec<String> = self.choices().iter().map(|(name, n)| format!("{name}: {n}")).collect();
            say(&format!("chosen   {}", list.join("; ")));
        }
        let time = |bar: Option<usize>| bar.map(|bar| job.prices.format_time(job.prices.times[bar])).unwrap_or_default();
        let (from, to) = (self.predictions.iter().map(|p| p.bar).min(), self.predictions.iter().map(|p| p.bar).max());
        say(&format!("\nout of sample: {} bars, {} to {}", self.bars(), time(from), time(to)));
        say(&format!("{:<12} {:>7} {:>12} {:>8} {:>10} {:>9} {:>14}", "", "rows", "correlation", "rank", "R2/naive", "accuracy", "naive accuracy"));
        for f in self.figures.iter().take(job.args.top + 1) {
            let three = |x: f64| if x.is_nan() { "-".to_string() } else { format!("{x:.3}") };
            say(&format!(
                "{:<12} {:>7} {:>12} {:>8} {:>10} {:>9} {:>14}",
                f.name,
                f.rows,
                three(f.correlation),
                three(f.rank_correlation),
                three(f.r_squared),
                percent(f.accuracy),
                percent(f.naive_accuracy)
            ));
        }
        if !self.books.is_empty() {
            say(&format!("\n{:<22} {:>8} {:>10} {:>9} {:>8} {:>8} {:>11}", "", "sharpe", "return", "drawdown", "sortino", "P(SR>0)", "turnover/yr"));
            self.books.iter().for_each(|book| self.say_book(book));
        }
        say("");
        self.verdict().iter().for_each(|line| say(line));
        if let Some(dir) = &job.args.out {
            say(&format!("\nwrote    {}", dir.display()));
            if !self.books.is_empty() {
                say(&format!("         forback sweep PRICES --signals {} back-tests its weights", dir.join("predictions.parquet").display()));
            }
        }
    }

    fn per_year(&self, book: &Book) -> f64 {
        book.pooled.turnover / book.pooled.net.len().max(1) as f64 * self.job.periods_per_year
    }

    fn say_book(&self, book: &Book) {
        let p = &book.pooled.performance;
        say(&format!(
            "{:<22} {:>8} {:>10} {:>9} {:>8} {:>8} {:>11.1}",
            book.name,
            ratio(p.sharpe),
            percent(p.total_return),
            percent(p.max_drawdown),
            ratio(p.sortino),
            ratio(p.probabilistic_sharpe),
            self.per_year(book)
        ));
    }

    pub(super) fn json(&self) -> Value {
        let number = super::print::number;
        let performance = |p: &Performance| Value::Object(p.entries().into_iter().map(|(k, v)| (k.to_string(), number(v))).collect());
        let figures = |f: &Figures| {
            json!({ "name": f.name, "rows": f.rows, "correlation": number(f.correlation), "rank_correlation": number(f.rank_correlation),
                "r_squared": number(f.r_squared), "accuracy": number(f.accuracy), "naive_accuracy": number(f.naive_accuracy) })
        };
        let job = self.job;
        json!({
            "run": job.identity(), "device": job.device.info().to_string(), "seconds": self.seconds, "models": job.models.folds.len() * job.args.hidden.len(),
            "folds": job.models.windows.len(), "configurations": self.configurations(), "bars": self.bars(),
            "chosen": self.choices().iter().map(|(name, n)| json!({ "configuration": name, "folds": n })).collect::<Vec<_>>(),
            "figures": self.figures.iter().map(figures).collect::<Vec<_>>(), "t_value": number(self.t_value()),
            "books": self.books.iter().map(|b| json!({ "name": b.name, "performance": performance(&b.pooled.performance),
                "turnover_per_year": number(self.per_year(b)), "trades": b.pooled.trades })).collect::<Vec<_>>(),
            "notes": self.notes, "verdict": self.verdict(),
        })
    }
}

impl Job<'_> {
    /// The naive forecast of each group and fold: the mean of what came true in its training window; for positions, its mean return.
    fn naive(&self) -> Vec<f64> {
        let (folds, per) = (self.models.windows.len(), self.models.folds.len() / self.args.learning_rate.len() / self.args.seeds);
        let mean = |k: usize| {
            let fold = &self.models.folds[k * self.args.seeds];
            let rows = fold.train.iter().chain(&fold.valid);
            rows.clone().map(|&row| self.samples.truth[row as usize]).sum::<f64>() / rows.count() as f64
        };
        debug_assert_eq!(per % folds, 0);
        (0..per).map(mean).collect()
    }

    pub(super) fn identity_text(&self) -> String {
        self.identity().to_string()
    }
}

fn list<T: ToString>(values: &[T]) -> String {
    values.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

fn percent(x: f64) -> String {
    super::print::percent(x)
}

fn ratio(x: f64) -> String {
    super::print::ratio(x)
}
