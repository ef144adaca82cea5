//! The one error of the library. Every variant says what was asked, what was found and, where there is one, the way out.

use thiserror::Error as ThisError;

/// Result with the library's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, from a missing driver to a text in a price column.
#[derive(Debug, Clone, PartialEq, ThisError)]
#[non_exhaustive]
pub enum Error {
    // ---- devices ------------------------------------------------------------------------------------------------
    /// The device text is none of the known ones.
    #[error("unknown device '{given}'{}; known: auto, cpu, reference, wgpu[:n], cuda[:n], cuda-host", nearest(.suggestion))]
    UnknownDevice {
        /// What was asked for.
        given: String,
        /// The nearest known name.
        suggestion: Option<String>,
    },
    /// The device is known but this machine or this build has none.
    #[error("no {device} device: {reason}; {help}")]
    NoDevice {
        /// `wgpu`, `cuda` or `cuda-host`.
        device: &'static str,
        /// What the probe saw.
        reason: String,
        /// How to get one.
        help: String,
    },
    /// The kernel has no column for the device.
    #[error("kernel {kernel} has no column for {device}; run it on another device (`forback kernels` lists them)")]
    Unsupported {
        /// Kernel name.
        kernel: &'static str,
        /// Device kind.
        device: &'static str,
    },
    /// A size is beyond what the device offers.
    #[error("{what} needs {needed} {unit}, the limit is {limit}; {help}")]
    TooLarge {
        /// What was asked for.
        what: String,
        /// How much it needs.
        needed: u64,
        /// How much there is.
        limit: u64,
        /// Unit of both.
        unit: &'static str,
        /// What to do.
        help: String,
    },
    /// The device has no memory left.
    #[error("{device} is out of memory while {doing}; use fewer sets or assets at once, or another device")]
    OutOfMemory {
        /// Device name.
        device: String,
        /// What was being done.
        doing: String,
    },
    /// The device went away; it must be opened again and its buffers uploaded again.
    #[error("{device} was lost ({reason}); open it again and upload the buffers again")]
    DeviceLost {
        /// Device name.
        device: String,
        /// What the driver said.
        reason: String,
    },
    /// A shader or CUDA unit did not compile.
    #[error("{file}:{line}: kernel {kernel} does not compile: {message}")]
    Compile {
        /// Kernel name.
        kernel: &'static str,
        /// Source file of the offending line.
        file: String,
        /// One-based line in that file; 0 if the compiler named none.
        line: u32,
        /// The compiler's message.
        message: String,
    },
    /// The driver refused a call for a reason that is not one of the above.
    #[error("{device}: {message}")]
    Driver {
        /// Device name.
        device: String,
        /// The driver's message.
        message: String,
    },
    // ---- calls --------------------------------------------------------------------------------------------------
    /// A tensor has the wrong shape, length or element type.
    #[error("{op}: {arg} must be {expected}, got {got}")]
    Shape {
        /// Op or kernel.
        op: &'static str,
        /// Argument.
        arg: String,
        /// What is legal.
        expected: String,
        /// What came.
        got: String,
    },
    /// A parameter is outside its legal range.
    #[error("{op}: {name} = {value}: {help}")]
    Parameter {
        /// Op or command.
        op: &'static str,
        /// Parameter name.
        name: String,
        /// The offending value.
        value: String,
        /// What is legal, and what to do.
        help: String,
    },
    /// A name is unknown.
    #[error("unknown {kind} '{given}'{}{}", nearest(.suggestion), known_list(.known))]
    Unknown {
        /// `strategy`, `symbol`, `column`, `workload` …
        kind: &'static str,
        /// What was given.
        given: String,
        /// The nearest known one.
        suggestion: Option<String>,
        /// All known ones, where they are few.
        known: Vec<String>,
    },
    // ---- files --------------------------------------------------------------------------------------------------
    /// A file's content is wrong: names file and, where they are known, row, column and value.
    #[error("{file}{}{}{}: {message}; {help}", at(", row ", .row), quoted(", column ", .column), quoted(", value ", .value))]
    Data {
        /// File name.
        file: String,
        /// One-based line in the file (the header is row 1).
        row: Option<u64>,
        /// Column name.
        column: Option<String>,
        /// The offending text.
        value: Option<String>,
        /// What is wrong.
        message: String,
        /// What to do.
        help: String,
    },
    /// Reading or writing failed.
    #[error("{path}: {message}")]
    Io {
        /// File or directory.
        path: String,
        /// The system's message, and what to do where that is clear.
        message: String,
    },
    /// The user stopped the run.
    #[error("interrupted: {message}")]
    Interrupted {
        /// What is finished, and how to go on.
        message: String,
    },
    // ---- ourselves ----------------------------------------------------------------------------------------------
    /// An invariant of the library does not hold: please report it.
    #[error("internal error, please report it: {0}")]
    Internal(String),
}

fn nearest(suggestion: &Option<String>) -> String {
    suggestion.as_ref().map(|s| format!("; did you mean '{s}'?")).unwrap_or_default()
}

fn known_list(known: &[String]) -> String {
    if known.is_empty() { String::new() } else { format!(" (known: {})", known.join(", ")) }
}

fn at(prefix: &str, row: &Option<u64>) -> String {
    row.map(|r| format!("{prefix}{r}")).unwrap_or_default()
}

fn quoted(prefix: &str, text: &Option<String>) -> String {
    text.as_ref().map(|t| format!("{prefix}'{t}'")).unwrap_or_default()
}
