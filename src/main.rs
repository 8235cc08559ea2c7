//! Parses the arguments, reads the environment, runs the command, and exits with its code.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use tidegate::cli::{self, Cli, Environment};

fn main() -> ExitCode {
    ExitCode::from(match Cli::try_parse() {
        Ok(cli) => cli::run(cli, environment()),
        Err(error) => cli::refuse(&error),
    })
}

/// Reads the one variable that is no setting, and all that may be settings.
#[expect(clippy::disallowed_methods, reason = "this is the one reader of the environment")]
fn environment() -> Environment {
    let variables = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    Environment {
        config_file: std::env::var_os("TIDEGATE_CONFIG").map(PathBuf::from),
        variables: variables.collect(),
    }
}
