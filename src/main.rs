//! The command line of the gateway.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::Path,
    process::ExitCode,
};

use clap::Parser as _;
use firezone_gateway::{
    admin,
    config::{
        self, Cli, Command, Config, ExitStatus, FixFor, Host, ProcessEnv, Settings, examine,
        print_examination, print_mistakes,
    },
    diagnose, gateway,
    host::{
        preflight::{self, Level, Platform},
        privileges::{self, Outcome},
    },
    telemetry,
};

fn main() -> ExitCode {
    let Cli {
        command, settings, ..
    } = Cli::parse();
    let result = match command {
        None => run(&settings),
        Some(Command::Run { settings: given }) => run(&given.or(settings)),
        Some(Command::CheckConfig {
            fix_for,
            settings: given,
        }) => check_config(&given.or(settings), fix_for),
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
    // Before the settings are read: some files may be for this group only.
    let rights = privileges::begin(config::user(settings, &ProcessEnv));
    let mut config = match Config::load(settings, &ProcessEnv, &Host::here()) {
        Ok(config) => config,
        Err(mistakes) => {
            print_mistakes(&mut io::stderr().lock(), &mistakes)?;
            return Ok(ExitStatus::Config);
        }
    };
    // First: of a state directory that several gateways share, a part is this one's.
    config.keep_identity(&ProcessEnv);
    gateway::hand_over_state(&mut config, &rights);
    let mut prepared = match gateway::Prepared::open(&config) {
        Ok(prepared) => prepared,
        Err(error) => {
            complain(&error.to_string());
            return Ok(ExitStatus::Failure);
        }
    };
    // Before there are threads: each would keep the rights of its own.
    let outcome = gateway::leave_root(&mut config, &mut prepared, rights);
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
    if let Outcome::Left(user) = outcome {
        tracing::info!(%user, "Left root");
    }
    // Fails only if one is installed already, and then there is one.
    let _ = rustls::crypto::ring::default_provider().install_default();

    match gateway::run(config, prepared, telemetry) {
        Ok(status) => Ok(status),
        Err(error) => {
            // The log may be gone by now: its guard was handed over.
            complain(&format!("{error:#}"));
            Ok(ExitStatus::Failure)
        }
    }
}

fn check_config(settings: &Settings, fix_for: Option<FixFor>) -> io::Result<ExitStatus> {
    let rights = privileges::begin(config::user(settings, &ProcessEnv));
    let examination = examine(settings, &ProcessEnv, &Host::here());
    let mut out = io::stdout().lock();
    print_examination(&mut out, &examination)?;
    let Some(mut config) = examination.config else {
        return Ok(ExitStatus::Config);
    };
    if !config.check_host {
        return Ok(ExitStatus::Ok);
    }
    let findings = gateway::check_host(&mut config, rights);
    let platforms = match fix_for {
        None => vec![Platform::detect(Path::new("/"))],
        Some(FixFor::Compose) => vec![Platform::Compose],
        Some(FixFor::Kubernetes) => vec![Platform::Kubernetes],
        Some(FixFor::Host) => vec![Platform::Host],
        Some(FixFor::All) => Platform::ALL.to_vec(),
    };
    let count = |level| findings.iter().filter(|f| f.level == level).count();
    write!(
        out,
        "\nThe host:\n{}\n",
        preflight::render(&findings, &platforms)
    )?;
    for notice in &config.notices[examination.notices.len()..] {
        writeln!(out, "  - {notice}")?;
    }
    match (count(Level::Error), count(Level::Warning)) {
        (0, 0) => writeln!(out, "The host has everything.")?,
        (0, warnings) => writeln!(out, "The host will do, with warnings: {warnings}.")?,
        (errors, _) => {
            writeln!(
                out,
                "The host lacks what the gateway needs; errors: {errors}."
            )?;
            return Ok(ExitStatus::HostLacks);
        }
    }
    Ok(ExitStatus::Ok)
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
