//! A training's log as JSON lines: first what is trained, then an object per epoch and model.
//!
//! ```text
//! {"training":{"version":"0.1.0","device":"…","models":8,…}}
//! {"epoch":0,"model":0,"train":0.031,"valid":0.029,"learning_rate":0.001,"grad_norm":0.4,"skipped":0,"first_skipped":null,"seconds":0.2,"windows_per_second":51200}
//! ```
//! Losses that are no number are null. `seconds` and `windows_per_second` are those of the epoch, all models together. A training that goes
//! on appends to its log; epochs that it does again stand there twice, and the later line counts.

use super::Epoch;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A log file, open for writing.
pub struct Log {
    path: PathBuf,
    file: File,
}

fn number(x: f64) -> Value {
    if x.is_finite() { json!(x) } else { Value::Null }
}

impl Log {
    /// Starts a log with a line that says what is trained: configuration, seed, device, version.
    /// # Errors
    /// `Io` where the file cannot be written.
    pub fn create(path: &Path, training: &Value) -> Result<Log> {
        let file = File::create(path).map_err(|e| Error::Io { path: path.display().to_string(), message: e.to_string() })?;
        let mut log = Log { path: path.into(), file };
        log.line(&json!({ "training": training }))?;
        Ok(log)
    }

    /// Goes on with a log; starts it where there is none.
    /// # Errors
    /// `Io` where the file cannot be written.
    pub fn append(path: &Path, training: &Value) -> Result<Log> {
        if !path.exists() {
            return Log::create(path, training);
        }
        let file = File::options().append(true).open(path).map_err(|e| Error::Io { path: path.display().to_string(), message: e.to_string() })?;
        Ok(Log { path: path.into(), file })
    }

    /// Writes an epoch, a line per model; `name` says what else is known of a model, such as its fold.
    /// # Errors
    /// `Io` where the file cannot be written.
    pub fn epoch(&mut self, epoch: &Epoch, name: &dyn Fn(usize) -> Vec<(&'static str, Value)>) -> Result<()> {
        let mut text = String::new();
        for model in 0..epoch.train.len() {
            let mut line = json!({ "epoch": epoch.epoch, "model": model });
            let values = [
                ("train", number(epoch.train[model])),
                ("valid", number(epoch.valid[model])),
                ("learning_rate", number(epoch.learning_rate[model])),
                ("grad_norm", number(epoch.grad_norm[model])),
                ("skipped", json!(epoch.skipped[model])),
                ("first_skipped", json!(epoch.first_skipped[model])),
                ("seconds", number(epoch.seconds)),
                ("windows_per_second", number(epoch.windows_per_second())),
            ];
            for (key, value) in name(model).into_iter().chain(values) {
                line[key] = value;
            }
            text.push_str(&line.to_string());
            text.push('\n');
        }
        self.write(&text)
    }

    fn line(&mut self, value: &Value) -> Result<()> {
        self.write(&format!("{value}\n"))
    }

    fn write(&mut self, text: &str) -> Result<()> {
        self.file.write_all(text.as_bytes()).map_err(|e| Error::Io { path: self.path.display().to_string(), message: e.to_string() })
    }
}
