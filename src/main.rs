//! The command line of the gateway.

use std::{
    io::{self, IsTerminal as _, Write as _},
    process::ExitCode,
};

use clap::Parser as _;
use firezone_gateway::{
    admin,
    config::{
        Cli, Command, Config, ExitStatus, Host, ProcessEnv, Settings, examine, print_examination,
        print_mistakes,
    },
    diagnose, gateway, telemetry,
};

fn main() -> ExitCode {
    let Cli {
        command, settings, ..
    } = Cli::parse();
    let result = match command {
        None => run(&settings),
        Some(Command::Run { settings: given }) => run(&given.or(settings)),
        Some(Command::CheckConfig { settings: given }) => check_config(&given.or(settings)),
        Some(Command::Healthcheck(arguments)) => {
            admin::healthcheck(&arguments, &settings, &ProcessEnv, &mut io::stdout().lock())
        }
        Some(Command::LogFilter(arguments)) => admin::log_filter(
            &arguments,
            &settings,
            &ProcessEnv,
            &mut io::stdout().lock(),
            &mut io::stderr().lock(),
        ),
        Some(Command::Diagnose(arguments)) => diagnose::run(
            &arguments,
            &settings,
            &ProcessEnv,
            &Host::here(),
            &mut io::stderr().lock(),
        ),
        Some(Command::Status(arguments)) => admin::status(
            &arguments,
            &settings,
            &ProcessEnv,
            in_colour(),
            &mut io::stdout().lock(),
            &mut io::stderr().lock(),
        ),
    };
    match result {
        Ok(status) => status.into(),
        // Whoever read the output has gone, as with `status | head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitStatus::Ok.into(),
        Err(error) => {
            complain(&error.to_string());
            ExitStatus::Failure.into()
        }
    }
}

fn run(settings: &Settings) -> io::Result<ExitStatus> {
    let mut config = match Config::load(settings, &ProcessEnv, &Host::here()) {
        Ok(config) => config,
        Err(mistakes) => {
            print_mistakes(&mut io::stderr().lock(), &mistakes)?;
            return Ok(ExitStatus::Config);
        }
    };
    config.keep_identity();
    let telemetry = match telemetry::init(&config.telemetry) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            complain(&error.to_string());
            return Ok(ExitStatus::Failure);
        }
    };
    for notice in &config.notices {
        tracing::warn!(setting = notice.setting, "{}", notice.message);
    }
    // Fails only if one is installed already, and then there is one.
    let _ = rustls::crypto::ring::default_provider().install_default();

    match gateway::run(config, telemetry) {
        Ok(status) => Ok(status),
        Err(error) => {
            // The log may be gone by now: its guard was handed over.
            complain(&format!("{error:#}"));
            Ok(ExitStatus::Failure)
        }
    }
}

fn check_config(settings: &Settings) -> io::Result<ExitStatus> {
    let examination = examine(settings, &ProcessEnv, &Host::here());
    print_examination(&mut io::stdout().lock(), &examination)?;
    Ok(if examination.mistakes.is_empty() {
        ExitStatus::Ok
    } else {
        ExitStatus::Config
    })
}

/// Colour is for terminals whose user has not asked for none (no-color.org).
fn in_colour() -> bool {
    io::stdout().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|terminal| terminal != "dumb")
}

fn complain(message: &str) {
    // Nothing is left to do when stderr is closed as well.
    let _ = writeln!(io::stderr().lock(), "firezone-gateway: {message}");
}
