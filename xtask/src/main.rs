//! Development tasks: `cargo xtask tidy` checks the repository, `cargo xtask synth` writes a
//! synthetic pair of checkpoints for benchmarks.

mod synth;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Development tasks of this repository.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", disable_version_flag = true)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check what ARCHITECTURE.md asks and a program can see
    Tidy,
    /// Write a synthetic base and fine-tune of a real model's shape
    Synth(Box<synth::Args>),
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Tidy => tidy::run(),
        Task::Synth(args) => synth::run(&args).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
