//! Where the token comes from, and that it is never shown.

#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn missing_token_tells_both_variables_and_a_compose_line() {
    let variables = env(&[("FIREZONE_ID", "edge-7")]);
    let mistakes = Config::load(&Settings::default(), &variables, &host()).unwrap_err();
    let text = mistakes[0].to_string();
    for part in [
        "no token is set",
        "FIREZONE_TOKEN ",
        "FIREZONE_TOKEN_FILE",
        "environment: [",
        "secrets: [",
    ] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
}

fn token_of(settings: &Settings, variables: &[(&str, &str)]) -> (String, TokenSource) {
    let variables: FixedEnv = variables
        .iter()
        .chain(&[("FIREZONE_ID", "edge-7")])
        .copied()
        .collect();
    let config = Config::load(settings, &variables, &host()).unwrap();
    (config.token.expose_secret().to_owned(), config.token_source)
}

#[test]
fn token_sources_have_an_order() {
    let dir = tempfile::tempdir().unwrap();
    let credential = dir.path().join("FIREZONE_TOKEN");
    fs::write(&credential, "of.credential\n").unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "of.file\n").unwrap();
    let directory = ("CREDENTIALS_DIRECTORY", dir.path().to_str().unwrap());
    let token_file = ("FIREZONE_TOKEN_FILE", file.to_str().unwrap());
    let variable = ("FIREZONE_TOKEN", "of.variable");
    let nothing = Settings::default();

    assert_eq!(
        token_of(&nothing, &[directory]),
        ("of.credential".into(), TokenSource::File(credential))
    );
    assert_eq!(
        token_of(&nothing, &[directory, token_file]),
        ("of.file".into(), TokenSource::File(file.clone()))
    );
    assert_eq!(
        token_of(&nothing, &[directory, token_file, variable]),
        ("of.variable".into(), TokenSource::Variable)
    );
    assert_eq!(
        token_of(&cli(&["of.argument"]), &[directory, token_file, variable]),
        ("of.argument".into(), TokenSource::Argument)
    );
    assert_eq!(
        token_of(&cli(&["--token-file", file.to_str().unwrap()]), &[]),
        ("of.file".into(), TokenSource::File(file))
    );
}

#[test]
fn token_variable_that_names_a_file_is_read_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("secret");
    fs::write(&file, "of.file\n").unwrap();
    assert_eq!(
        token_of(
            &Settings::default(),
            &[("FIREZONE_TOKEN", file.to_str().unwrap())]
        ),
        ("of.file".into(), TokenSource::File(file))
    );
}

#[test]
fn token_that_cannot_be_had_is_a_mistake_that_names_its_source() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let missing = missing.to_str().unwrap();
    let empty = dir.path().join("empty");
    fs::write(&empty, "\n").unwrap();
    for (variable, value, problem) in [
        ("FIREZONE_TOKEN", missing, "cannot read"),
        ("FIREZONE_TOKEN_FILE", missing, "cannot read"),
        (
            "FIREZONE_TOKEN_FILE",
            dir.path().to_str().unwrap(),
            "is a directory",
        ),
        ("FIREZONE_TOKEN_FILE", empty.to_str().unwrap(), "is empty"),
        ("FIREZONE_TOKEN", "töken", "visible ASCII"),
    ] {
        let variables = env(&[(variable, value), ("FIREZONE_ID", "edge-7")]);
        let mistakes = Config::load(&Settings::default(), &variables, &host()).unwrap_err();
        assert_eq!(mistakes.len(), 1);
        assert_eq!(mistakes[0].setting, variable);
        assert!(mistakes[0].problem.contains(problem), "{}", mistakes[0]);
    }
}

#[test]
fn misspelt_sub_command_is_not_taken_for_a_token() {
    let mistake = |argument: &str| {
        let mistakes =
            Config::load(&cli(&[argument]), &env(&[("FIREZONE_ID", "a")]), &host()).unwrap_err();
        mistakes[0].to_string()
    };
    for (typed, meant) in [
        ("health", "was healthcheck meant?"),
        ("healthchek", "was healthcheck meant?"),
        ("stat", "was status meant?"),
    ] {
        let told = mistake(typed);
        assert!(
            told.contains("neither a sub-command nor a token") && told.contains(meant),
            "{told}"
        );
    }
    // It may be a token after all.
    let told = mistake("correct-horse-battery");
    assert!(
        !told.contains("meant?") && !told.contains("horse"),
        "{told}"
    );
    for name in ["run", "healthcheck", "status", "check-config"] {
        assert!(told.contains(name), "{told}");
    }
}

#[test]
fn token_is_never_shown() {
    let settings = cli(&[SECRET]);
    let variables = with_token(&[
        ("FIREZONE_TOKEN_FILE", "/run/secrets/x"),
        ("FIREZONE_API_URL", "wss://host/?token=hunter2"),
    ]);
    let examination = examine(&settings, &variables, &host());
    let mut printed = Vec::new();
    print_examination(&mut printed, &examination).unwrap();
    let printed = String::from_utf8(printed).unwrap();

    assert!(printed.contains("FIREZONE_TOKEN") && printed.contains("[REDACTED]"));
    for text in [
        printed,
        format!("{examination:?}"),
        format!("{settings:?}"),
        format!("{:?}", examination.config.unwrap()),
        Cli::command().render_long_help().to_string(),
    ] {
        assert!(!text.contains("hunter2"), "{text}");
    }
}
