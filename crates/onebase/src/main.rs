//! The program `onebase`.

mod args;
mod commands;
mod output;

use std::process::ExitCode;

use clap::Parser;
use onebase_kernels::Backend;

use crate::args::{Args, Command};
use crate::output::Output;

/// Exit code of wrong use, as clap's.
const WRONG_USE: u8 = 2;

fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(error) = Backend::from_env() {
        Output::note(&format!("error: {error}"));
        return ExitCode::from(WRONG_USE);
    }
    if let Command::Serve(serve) = &args.command {
        // Its engine has a pool of its own, of which no thread waits for the network.
        return exit_code(commands::serve::run(serve, args.threads, &Output::new(args.json)));
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads).build();
    let result = match pool {
        // The whole command runs inside the pool, so that handing out work never
        // crosses from a thread outside it.
        Ok(pool) => pool.install(|| run(args)),
        Err(error) => Err(error.into()),
    };
    exit_code(result)
}

fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::print_error(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    let output = Output::new(args.json);
    match args.command {
        Command::Compress(args) => commands::compress::run(&args, &output),
        Command::Quantize(args) => commands::quantize::run(&args, &output),
        Command::Calibrate(args) => commands::calibrate::run(&args, &output),
        Command::Finalize(args) => commands::finalize::run(&args, &output),
        Command::Family(command) => commands::family::run(&command, &output),
        Command::Inspect(args) => commands::inspect::run(&args, &output),
        Command::Verify(args) => commands::verify::run(&args, &output),
        Command::Restore(args) => commands::restore::run(&args, &output),
        Command::Archive(args) => commands::archive::run(&args, &output),
        Command::Eval(args) => commands::eval::run(&args, &output),
        Command::Compare(args) => commands::compare::run(&args, &output),
        Command::Generate(args) => commands::generate::run(&args, &output),
        Command::Bench(command) => commands::bench::run(&command, &output),
        Command::Serve(_) => unreachable!("it is run outside the pool"),
        Command::Demo(args) => commands::demo::run(&args, &output),
        Command::Codecs => commands::codecs::run(&output),
        Command::Completions(args) => commands::completions::run(&args, &output),
    }
}
