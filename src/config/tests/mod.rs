//! Settings from the command line, the environment and files.

#![allow(clippy::unwrap_used)]

use std::{fs, path::Path};

use clap::{CommandFactory as _, Parser as _};
use secrecy::ExposeSecret as _;

use super::*;

mod admin;
mod command;
mod export;
mod identity;
mod settings;
mod token;

const SECRET: &str = ".SFMyNTY.hunter2";

fn host() -> Host {
    Host {
        machine_id: PathBuf::from("/nonexistent/machine-id"),
        hostname: Some("edge-host".to_owned()),
    }
}

fn cli(arguments: &[&str]) -> Settings {
    Cli::try_parse_from([&["firezone-gateway"], arguments].concat())
        .unwrap()
        .settings
}

fn env(variables: &[(&str, &str)]) -> FixedEnv {
    variables.iter().copied().collect()
}

/// Settings that are complete, so that a test can add the one that it is about.
fn with_token(variables: &[(&str, &str)]) -> FixedEnv {
    [("FIREZONE_TOKEN", SECRET), ("FIREZONE_ID", "edge-7")]
        .iter()
        .chain(variables)
        .copied()
        .collect()
}

fn load(variables: &[(&str, &str)]) -> Config {
    Config::load(&Settings::default(), &with_token(variables), &host()).unwrap()
}

fn load_flags(arguments: &[&str]) -> Config {
    Config::load(&cli(arguments), &with_token(&[]), &host()).unwrap()
}

fn only_mistake(variables: &[(&str, &str)]) -> Mistake {
    let mut mistakes =
        Config::load(&Settings::default(), &with_token(variables), &host()).unwrap_err();
    assert_eq!(mistakes.len(), 1, "{mistakes:?}");
    mistakes.remove(0)
}

fn notices(variables: &[(&str, &str)]) -> Vec<String> {
    load(variables)
        .notices
        .iter()
        .map(Notice::to_string)
        .collect()
}

fn tcp(address: &str) -> Option<Place> {
    Some(Place::Tcp(address.parse().unwrap()))
}
