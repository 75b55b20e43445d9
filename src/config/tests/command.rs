//! The command line, its help, and what `check-config` prints.

#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn check_config_shows_value_and_source_of_each_setting() {
    let examination = examine(
        &cli(&["--tun-name", "fz0"]),
        &with_token(&[("HEALTH_CHECK_ADDR", "off")]),
        &host(),
    );
    let mut text = Vec::new();
    print_examination(&mut text, &examination).unwrap();
    let text = String::from_utf8(text).unwrap();
    let line = |name: &str| {
        text.lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_else(|| panic!("{name} is missing in {text}"))
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    };

    assert_eq!(
        line("FIREZONE_TUN_NAME"),
        "FIREZONE_TUN_NAME fz0 (--tun-name)"
    );
    assert_eq!(
        line("HEALTH_CHECK_ADDR"),
        "HEALTH_CHECK_ADDR off (environment)"
    );
    assert_eq!(
        line("FIREZONE_UDP_PORT"),
        "FIREZONE_UDP_PORT 52625 (default)"
    );
    assert_eq!(
        line("FIREZONE_TOKEN"),
        "FIREZONE_TOKEN [REDACTED] (FIREZONE_TOKEN)"
    );
    assert_eq!(line("FIREZONE_NAME"), "FIREZONE_NAME edge-host (host name)");
    assert!(text.ends_with("The configuration is complete.\n"), "{text}");
}

#[test]
fn help_names_each_setting_once_and_groups_them() {
    let help = Cli::command().render_long_help().to_string();
    let examination = examine(&Settings::default(), &with_token(&[]), &host());
    for setting in &examination.settings {
        if setting.name.starts_with("OTEL_") {
            assert!(help.contains(setting.name), "{}", setting.name);
        } else {
            let tag = format!("[env: {}]", setting.name);
            assert_eq!(help.matches(&tag).count(), 1, "{tag} in {help}");
        }
    }
    for heading in [
        "Portal:",
        "Identity:",
        "Admin server:",
        "Logging and tracing:",
        "Device and sockets:",
        "Behaviour:",
    ] {
        assert!(help.contains(&format!("\n{heading}\n")), "{heading}");
    }
    for default in [
        DEFAULT_API_URL.to_owned(),
        DEFAULT_HEALTH_CHECK_ADDR.to_owned(),
        DEFAULT_STATE_DIR.to_owned(),
        DEFAULT_TUN_NAME.to_owned(),
        DEFAULT_UDP_PORT.to_string(),
        DEFAULT_UDP_SEND_BUFFER.to_string(),
        DEFAULT_UDP_RECV_BUFFER.to_string(),
    ] {
        assert!(help.contains(&format!("[default: {default}]")), "{default}");
    }
}

#[test]
fn command_line_is_consistent_and_settings_may_follow_the_sub_command() {
    Cli::command().debug_assert();
    let parsed = Cli::try_parse_from([
        "firezone-gateway",
        "-n",
        "a",
        "check-config",
        "-u",
        "wss://b",
    ])
    .unwrap();
    let Some(Command::CheckConfig { settings, .. }) = parsed.command else {
        panic!("{parsed:?}");
    };
    let settings = settings.or(parsed.settings);
    assert_eq!(settings.firezone_name.as_deref(), Some("a"));
    assert_eq!(settings.api_url.as_deref(), Some("wss://b"));
}

#[test]
fn sub_commands_that_ask_the_server_need_no_token() {
    let nothing = Settings::default();
    assert_eq!(
        admin_listeners(&nothing, &env(&[])).unwrap().probes,
        tcp("0.0.0.0:8080")
    );
    assert_eq!(
        admin_listeners(
            &cli(&["--health-check-addr=127.0.0.1:9", "healthcheck"]),
            &env(&[])
        )
        .unwrap()
        .probes,
        tcp("127.0.0.1:9")
    );
    let mistake = admin_listeners(&nothing, &env(&[("HEALTH_CHECK_ADDR", "x")])).unwrap_err();
    assert_eq!(mistake.setting, "HEALTH_CHECK_ADDR");
}

#[test]
fn the_user_is_known_before_the_rest_is_read_and_mistakes_are_left_to_the_rest() {
    let variables = |value| env(&[("FIREZONE_USER", value), ("FIREZONE_UDP_PORT", "x")]);
    let of = |value| user(&Settings::default(), &variables(value));
    assert_eq!(
        of("65532:65533"),
        load(&[("FIREZONE_USER", "65532:65533")]).user
    );
    assert!(of("65532:65533").is_some());
    for none in ["none", "KEEP", "", "nobody"] {
        assert_eq!(of(none), None, "{none}");
    }
}
