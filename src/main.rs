//! The `forback` command.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    forback::cli::main()
}
