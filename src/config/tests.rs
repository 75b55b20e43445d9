#![allow(clippy::unwrap_used)]

use std::{fs, path::Path};

use clap::{CommandFactory as _, Parser as _};
use secrecy::ExposeSecret as _;

use super::*;

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

#[test]
fn defaults_are_those_of_the_stock_gateway_where_it_has_them() {
    let config = load(&[]);

    assert_eq!(config.api_url.as_str(), "wss://api.firezone.dev/");
    assert_eq!(config.listeners.probes, tcp("0.0.0.0:8080"));
    assert_eq!(config.max_partition_time, None);
    assert_eq!(config.state_dir, Path::new("/var/lib/firezone"));
    assert_eq!(config.tun_name, "tun-firezone");
    assert_eq!(config.udp_port, 52625);
    assert_eq!(config.gateway_ports, crate::access::OpenPorts::none());
    assert_eq!(config.udp_send_buffer, 2 << 20);
    assert_eq!(config.udp_recv_buffer, 16 << 20);
    assert_eq!(config.name, "edge-host");
    assert!(config.raise_buffer_limits && config.check_host);
    assert!(!config.strict && !config.exit_on_auth_failure);
    assert_eq!((config.user, config.linger), (None, Duration::ZERO));
    assert_eq!(config.telemetry.log_format, LogFormat::Human);
    assert_eq!(config.telemetry.log_filter, "info");
    assert_eq!(config.notices, []);
}

#[test]
fn every_variable_arrives() {
    let config = load(&[
        ("FIREZONE_API_URL", "ws://portal:8081/base"),
        ("FIREZONE_NAME", "edge seven"),
        ("FIREZONE_MAX_PARTITION_TIME", "1h 30m"),
        ("FIREZONE_EXIT_ON_AUTH_FAILURE", "true"),
        ("HEALTH_CHECK_ADDR", "[::1]:9000"),
        ("FIREZONE_LOG_FORMAT", "json"),
        ("RUST_LOG", "warn,firezone_gateway::portal=debug"),
        ("FIREZONE_STATE_DIR", "/state"),
        ("FIREZONE_TUN_NAME", "fz0"),
        ("FIREZONE_UDP_PORT", "4500"),
        ("FIREZONE_GATEWAY_PORTS", "tcp/22, udp/5000-5010"),
        ("FIREZONE_WORKERS", "3"),
        ("FIREZONE_OFFLOADS", "udp-gro, tun-tso"),
        ("FIREZONE_NO_INC_BUF", "1"),
        ("FIREZONE_UDP_SEND_BUFFER_SIZE", "131072"),
        ("FIREZONE_UDP_RECV_BUFFER_SIZE", "262144"),
        ("FIREZONE_USER", "65532:65533"),
        ("FIREZONE_SHUTDOWN_LINGER", "1m 5s"),
        ("FIREZONE_STRICT", "TRUE"),
        ("FIREZONE_FLOW_LOGS", "true"),
    ]);

    assert_eq!(config.api_url.as_str(), "ws://portal:8081/base");
    assert_eq!(config.name, "edge seven");
    assert_eq!(config.max_partition_time, Some(Duration::from_secs(5400)));
    assert!(config.exit_on_auth_failure);
    assert_eq!(config.listeners.probes, tcp("[::1]:9000"));
    assert_eq!(config.telemetry.log_format, LogFormat::Json);
    assert_eq!(
        config.telemetry.log_filter,
        "warn,firezone_gateway::portal=debug"
    );
    assert_eq!(config.state_dir, Path::new("/state"));
    assert_eq!(config.tun_name, "fz0");
    assert_eq!(config.udp_port, 4500);
    assert_eq!(config.gateway_ports.to_string(), "tcp/22, udp/5000-5010");
    assert_eq!(config.workers, Some(3));
    assert_eq!(config.offloads.to_string(), "tun-tso,udp-gro");
    assert!(!config.raise_buffer_limits);
    assert_eq!(config.udp_send_buffer, 131_072);
    assert_eq!(config.udp_recv_buffer, 262_144);
    assert_eq!(config.user.unwrap().to_string(), "65532:65533");
    assert_eq!(config.linger, Duration::from_secs(65));
    assert!(config.strict && config.flow_logs);
    assert_eq!(config.identity.id, "edge-7");
    assert_eq!(config.notices, []);
}

#[test]
fn every_flag_arrives_and_beats_its_variable() {
    let flags = cli(&[
        "-u",
        "wss://flag.example",
        "-n",
        "flag-name",
        "-i",
        "flag-id",
        "-m",
        "15m",
        "--exit-on-auth-failure",
        "--health-check-addr=off",
        "--log-format=json",
        "--log-filter=debug",
        "--state-dir=/flag",
        "--tun-name=flag0",
        "--udp-port=0",
        "--no-inc-buf",
        "--udp-send-buffer-size=65536",
        "--udp-recv-buffer-size=65537",
        "--user=1000",
        "--shutdown-linger=0",
        "--strict=true",
        "--no-check",
    ]);
    let variables = with_token(&[
        ("FIREZONE_API_URL", "wss://env.example"),
        ("FIREZONE_NAME", "env-name"),
        ("FIREZONE_MAX_PARTITION_TIME", "1h"),
        ("FIREZONE_EXIT_ON_AUTH_FAILURE", "false"),
        ("HEALTH_CHECK_ADDR", "0.0.0.0:1"),
        ("FIREZONE_USER", "none"),
        ("FIREZONE_SHUTDOWN_LINGER", "5s"),
        ("FIREZONE_STRICT", "false"),
    ]);

    let config = Config::load(&flags, &variables, &host()).unwrap();

    assert_eq!(config.api_url.as_str(), "wss://flag.example/");
    assert_eq!(config.name, "flag-name");
    assert_eq!(config.identity.id, "flag-id");
    assert_eq!(config.max_partition_time, Some(Duration::from_secs(900)));
    assert!(config.exit_on_auth_failure && config.strict);
    assert_eq!(config.listeners.probes, None);
    assert_eq!(config.telemetry.log_format, LogFormat::Json);
    assert_eq!(config.telemetry.log_filter, "debug");
    assert_eq!(config.state_dir, Path::new("/flag"));
    assert_eq!(config.tun_name, "flag0");
    assert_eq!(config.udp_port, 0);
    assert!(!config.raise_buffer_limits && !config.check_host);
    assert_eq!(config.user.unwrap().to_string(), "1000:1000");
    assert_eq!(config.linger, Duration::ZERO);
    assert_eq!(config.udp_send_buffer, 65536);
    assert_eq!(config.udp_recv_buffer, 65537);
}

#[test]
fn empty_variables_are_unset() {
    let config = load(&[("HEALTH_CHECK_ADDR", ""), ("FIREZONE_NAME", "")]);
    assert_eq!(config.name, "edge-host");
    assert_eq!(config.listeners.probes, tcp("0.0.0.0:8080"));
}

#[test]
fn each_wrong_value_is_named_with_what_to_set() {
    for (variable, value, problem, fix) in [
        (
            "FIREZONE_API_URL",
            "api.firezone.dev",
            "not a URL",
            "wss://",
        ),
        ("FIREZONE_API_URL", "ftp://host", "scheme \"ftp\"", "wss://"),
        ("FIREZONE_API_URL", "wss://", "not a URL", "wss://"),
        (
            "FIREZONE_API_URL",
            "wss://me:pw@host",
            "user or password",
            "wss://",
        ),
        ("FIREZONE_MAX_PARTITION_TIME", "15", "not a duration", "15m"),
        ("FIREZONE_MAX_PARTITION_TIME", "0s", "no time at all", "15m"),
        (
            "FIREZONE_EXIT_ON_AUTH_FAILURE",
            "yes",
            "neither true nor false",
            "=true",
        ),
        ("FIREZONE_ID", "a\nb", "control character", "edge-1"),
        ("FIREZONE_NAME", "a\tb", "cannot be shown", "one line"),
        (
            "FIREZONE_STATE_DIR",
            "state",
            "not an absolute path",
            "/var/lib/firezone",
        ),
        (
            "HEALTH_CHECK_ADDR",
            "8080",
            "not an IP address with a port",
            "0.0.0.0:8080",
        ),
        (
            "HEALTH_CHECK_ADDR",
            "localhost:8080",
            "not an IP address",
            "off",
        ),
        ("HEALTH_CHECK_ADDR", "0.0.0.0:0", "port 0", "0.0.0.0:8080"),
        (
            "FIREZONE_LOG_FORMAT",
            "xml",
            "not a log format",
            "human or json",
        ),
        ("RUST_LOG", "info,=,=", "not a log filter", "info"),
        (
            "FIREZONE_TUN_NAME",
            "a-name-too-long-for-linux",
            "name of an interface",
            "15",
        ),
        ("FIREZONE_TUN_NAME", "a/b", "name of an interface", "15"),
        ("FIREZONE_UDP_PORT", "70000", "not a port", "65535"),
        (
            "FIREZONE_GATEWAY_PORTS",
            "tcp/22,22",
            "\"22\" is not a port",
            "tcp/22",
        ),
        (
            "FIREZONE_UDP_PORT",
            "tcp://10.0.0.1:53",
            "Kubernetes service",
            "enableServiceLinks: false",
        ),
        (
            "FIREZONE_WORKERS",
            "0",
            "not a number of workers",
            "1 to 32",
        ),
        ("FIREZONE_WORKERS", "33", "not a number of workers", "auto"),
        (
            "FIREZONE_OFFLOADS",
            "tun-tso,lro",
            "\"lro\" is not an offload",
            "udp-gso",
        ),
        (
            "FIREZONE_NO_INC_BUF",
            "maybe",
            "neither true nor false",
            "=false",
        ),
        (
            "FIREZONE_UDP_SEND_BUFFER_SIZE",
            "2M",
            "not a buffer size",
            "bytes",
        ),
        (
            "FIREZONE_UDP_RECV_BUFFER_SIZE",
            "1",
            "not a buffer size",
            "bytes",
        ),
        (
            "FIREZONE_USER",
            "nobody",
            "not a user by number",
            "65532:65532",
        ),
        ("FIREZONE_USER", "0", "would be root", "none"),
        ("FIREZONE_USER", "65532:0", "in its group", "65532:65532"),
        ("FIREZONE_USER", "65532:", "not a user by number", "none"),
        // "Leave it as it is", to the kernel.
        (
            "FIREZONE_USER",
            "4294967295",
            "not a user by number",
            "none",
        ),
        ("FIREZONE_SHUTDOWN_LINGER", "5", "not a duration", "5s"),
        (
            "FIREZONE_SHUTDOWN_LINGER",
            "2h",
            "longer than an hour",
            "5s",
        ),
        ("FIREZONE_STRICT", "2", "neither true nor false", "=true"),
    ] {
        let mistake = only_mistake(&[(variable, value)]);
        assert_eq!(mistake.setting, variable);
        assert!(mistake.problem.contains(problem), "{mistake}");
        assert!(mistake.fix.contains(fix), "{mistake}");
        assert!(mistake.to_string().starts_with(variable), "{mistake}");
    }
}

#[test]
fn mistake_on_the_command_line_names_the_flag_too() {
    let mistakes = Config::load(&cli(&["--udp-port", "x"]), &with_token(&[]), &host()).unwrap_err();
    assert!(
        mistakes[0]
            .to_string()
            .starts_with("--udp-port (FIREZONE_UDP_PORT): \"x\" is not a port"),
        "{mistakes:?}"
    );
}

#[test]
fn all_mistakes_come_at_once() {
    let variables = env(&[
        ("FIREZONE_API_URL", "nonsense"),
        ("FIREZONE_ID", " "),
        ("HEALTH_CHECK_ADDR", "nonsense"),
        ("FIREZONE_STRICT", "nonsense"),
    ]);

    let mistakes = Config::load(&Settings::default(), &variables, &host()).unwrap_err();

    let settings: Vec<_> = mistakes.iter().map(|mistake| mistake.setting).collect();
    assert_eq!(
        settings,
        [
            "FIREZONE_API_URL",
            "FIREZONE_TOKEN",
            "FIREZONE_ID",
            "HEALTH_CHECK_ADDR",
            "FIREZONE_STRICT"
        ]
    );
    let mut text = Vec::new();
    print_mistakes(&mut text, &mistakes).unwrap();
    let text = String::from_utf8(text).unwrap();
    assert!(text.starts_with("The configuration has 5 mistakes:\n  - FIREZONE_API_URL: "));
    assert_eq!(text.lines().count(), 6);
}

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

#[test]
fn quotes_of_an_env_file_are_removed_and_told() {
    let variables = env(&[("FIREZONE_TOKEN", "\"a.b\""), ("FIREZONE_ID", "'edge-7'")]);
    let config = Config::load(&Settings::default(), &variables, &host()).unwrap();
    assert_eq!(config.token.expose_secret(), "a.b");
    assert_eq!(config.identity.id, "edge-7");
    assert_eq!(config.notices.len(), 2);
}

#[test]
fn settings_of_the_stock_gateway_are_accepted_with_a_notice() {
    for variable in [
        "FIREZONE_NO_TELEMETRY",
        "FIREZONE_METRICS",
        "OTLP_GRPC_ENDPOINT",
        "FIREZONE_VALIDATE_CHECKSUMS",
    ] {
        let notices = notices(&[(variable, "true")]);
        assert_eq!(notices.len(), 1, "{notices:?}");
        assert!(
            notices[0].starts_with(&format!("{variable}: ignored")),
            "{notices:?}"
        );
    }
    let config = load_flags(&[
        "--no-telemetry",
        "--validate-checksums",
        "--metrics=stdout",
        "--otlp-grpc-endpoint=collector:4317",
    ]);
    assert_eq!(config.notices.len(), 4);
    assert!(load_flags(&["--flow-logs"]).flow_logs);
}

#[test]
fn the_log_filter_of_a_file_counts_more_and_must_be_there_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("filter");
    let path = file.to_str().unwrap();
    let variables = [("RUST_LOG", "warn"), ("FIREZONE_LOG_FILTER_FILE", path)];
    let missing = only_mistake(&variables).to_string();
    assert!(missing.contains("FIREZONE_LOG_FILTER_FILE"), "{missing}");
    std::fs::write(&file, "a=b=c").unwrap();
    let wrong = only_mistake(&variables).to_string();
    assert!(wrong.contains("no log filter can be read from"), "{wrong}");
    std::fs::write(&file, "debug\n").unwrap();
    let telemetry = load(&variables).telemetry;
    assert_eq!(telemetry.log_filter, "debug");
    assert_eq!(telemetry.log_filter_file, Some(file));
}

#[test]
fn the_admin_token_must_be_there_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    let path = file.to_str().unwrap();
    assert_eq!(load(&[]).admin_token, None);
    let variables = with_token(&[("FIREZONE_ADMIN_TOKEN_FILE", path)]);
    let mistakes = Config::load(&Settings::default(), &variables, &host()).unwrap_err();
    assert_eq!(mistakes.len(), 1, "{mistakes:?}");
    assert!(
        mistakes[0]
            .to_string()
            .contains("FIREZONE_ADMIN_TOKEN_FILE")
    );
    fs::write(&file, "open sesame").unwrap();
    let mistake = only_mistake(&[("FIREZONE_ADMIN_TOKEN_FILE", path)]).to_string();
    assert!(
        mistake.contains("only visible ASCII") && !mistake.contains("sesame"),
        "{mistake}"
    );
    fs::write(&file, "sesame\n").unwrap();
    let config = load(&[("FIREZONE_ADMIN_TOKEN_FILE", path)]);
    assert_eq!(config.admin_token.unwrap().path(), file);
}

#[test]
fn misspelt_variable_is_told_but_service_links_are_not() {
    let notices = notices(&[
        ("FIREZONE_TOKENFILE", "x"),
        ("FIREZONE_GATEWAY_SERVICE_HOST", "10.0.0.1"),
        ("FIREZONE_GATEWAY_PORT_8080_TCP_ADDR", "10.0.0.1"),
        ("FIREZONE_GATEWAY_PORT", "tcp://10.0.0.1:8080"),
    ]);
    assert_eq!(
        notices,
        ["FIREZONE_TOKENFILE: not a known setting; ignored"]
    );
}

#[test]
fn export_that_cannot_be_followed_is_told_and_does_not_stop_the_gateway() {
    let notices = notices(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
    ]);
    assert_eq!(notices.len(), 1);
    assert!(
        notices[0].contains("no spans, no metrics and no log lines are exported")
            && notices[0].contains("http/protobuf"),
        "{notices:?}"
    );
}

#[test]
fn what_of_an_export_cannot_be_followed_is_told_once_and_without_secrets() {
    let notices = notices(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "hunter2"),
        ("OTEL_EXPORTER_OTLP_LOGS_TIMEOUT", "soon"),
    ]);
    assert_eq!(notices.len(), 2, "{notices:?}");
    assert!(notices[0].starts_with("OTEL_EXPORTER_OTLP_HEADERS: entry 1"));
    assert!(notices[1].starts_with("OTEL_EXPORTER_OTLP_LOGS_TIMEOUT: not a number"));
    assert!(!format!("{notices:?}").contains("hunter2"), "{notices:?}");
}

#[test]
fn what_keeps_metrics_alone_from_being_pushed_is_told() {
    const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
    let no_spans = ("OTEL_TRACES_EXPORTER", "none");
    let no_logs = ("OTEL_LOGS_EXPORTER", "none");
    for (variables, named) in [
        ([no_spans, (ENDPOINT, "ftp://c")], ENDPOINT),
        (
            [no_spans, ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "c:4318")],
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
        ),
        (
            [
                (ENDPOINT, "http://c:4318"),
                ("OTEL_METRICS_EXPORTER", "console"),
            ],
            "OTEL_METRICS_EXPORTER",
        ),
        (
            [
                (ENDPOINT, "http://c:4318"),
                ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/json"),
            ],
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL",
        ),
    ] {
        let told = notices(&[variables.as_slice(), &[no_logs]].concat());
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].starts_with(named) && told[0].contains("no metrics are exported"),
            "{named}: {told:?}"
        );
    }
    let told = notices(&[
        no_spans,
        no_logs,
        (ENDPOINT, "http://c:4317"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "thrift"),
    ]);
    assert!(
        told.len() == 1 && told[0].starts_with("OTEL_EXPORTER_OTLP_PROTOCOL: no metrics"),
        "{told:?}"
    );
}

#[test]
fn where_spans_and_metrics_go_is_shown_for_each_of_them() {
    let shown = |variables: &[(&str, &str)]| {
        examine(&Settings::default(), &with_token(variables), &host())
            .settings
            .into_iter()
            .filter(|setting| setting.name.starts_with("OTEL_"))
            .map(|setting| format!("{} {} ({})", setting.name, setting.value, setting.source))
            .collect::<Vec<_>>()
    };
    const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318");
    assert_eq!(
        shown(&[]),
        [
            "OTEL_EXPORTER_OTLP_ENDPOINT no spans, no metrics and no log lines are exported: no \
             endpoint is set (default)"
        ]
    );
    assert_eq!(
        shown(&[ENDPOINT]),
        [
            "OTEL_EXPORTER_OTLP_ENDPOINT http://c:4318/v1/traces (environment)",
            "OTEL_EXPORTER_OTLP_ENDPOINT http://c:4318/v1/metrics (environment)",
            "OTEL_EXPORTER_OTLP_ENDPOINT http://c:4318/v1/logs (environment)",
        ]
    );
    assert_eq!(
        shown(&[ENDPOINT, ("OTEL_TRACES_EXPORTER", "none")]),
        [
            "OTEL_TRACES_EXPORTER no spans are exported: switched off (environment)",
            "OTEL_EXPORTER_OTLP_ENDPOINT http://c:4318/v1/metrics (environment)",
            "OTEL_EXPORTER_OTLP_ENDPOINT http://c:4318/v1/logs (environment)",
        ]
    );
    assert_eq!(
        shown(&[("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://m/x")]),
        [
            "OTEL_EXPORTER_OTLP_ENDPOINT no spans and no log lines are exported: no endpoint is set \
             (default)",
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT http://m/x (environment)",
        ]
    );
}

#[test]
fn partition_time_can_be_lifted_by_name() {
    let config = load(&[("FIREZONE_MAX_PARTITION_TIME", "none")]);
    assert_eq!(config.max_partition_time, None);
}

#[test]
fn random_identity_is_stored_only_when_asked_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let variables = env(&[
        ("FIREZONE_TOKEN", SECRET),
        ("FIREZONE_STATE_DIR", state.to_str().unwrap()),
    ]);
    let load = || Config::load(&Settings::default(), &variables, &host()).unwrap();

    let mut first = load();
    assert!(!state.exists(), "looking does not write");
    first.keep_identity(&variables);
    let second = load();

    assert_eq!(first.identity.id, second.identity.id);
    assert_eq!(
        second.identity.source,
        IdentitySource::File(state.join("gateway_id"))
    );
}

/// Containers of one compose service share its volume.
#[test]
fn gateways_that_share_a_state_directory_have_an_identity_each_and_keep_it() {
    let dir = tempfile::tempdir().unwrap();
    let machine_id = dir.path().join("machine-id");
    fs::write(&machine_id, "0123\n").unwrap();
    let state = dir.path().join("state");
    let start = |variables: &[(&str, &str)]| {
        let mut all = vec![
            ("FIREZONE_TOKEN", SECRET),
            ("FIREZONE_STATE_DIR", state.to_str().unwrap()),
        ];
        all.extend(variables);
        let variables = env(&all);
        let host = Host {
            machine_id: machine_id.clone(),
            ..host()
        };
        let mut config = Config::load(&Settings::default(), &variables, &host).unwrap();
        config.keep_identity(&variables);
        config
    };
    let instance = |config: &Config| {
        let mut attributes = config.telemetry.resource.iter();
        let found = attributes.find(|(name, _)| name == "service.instance.id");
        found.unwrap().1.clone()
    };

    let first = start(&[]);
    let second = start(&[]);
    let third = start(&[]);

    let ids = [&first, &second, &third].map(|c| c.identity.id.clone());
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[2] != ids[0]);
    assert!(instance(&first) != instance(&second) && instance(&second) != instance(&third));
    // The machine's identity is for one of them.
    assert_eq!(
        first.identity.source,
        IdentitySource::MachineId(machine_id.clone())
    );
    assert_eq!(
        [&first, &second, &third].map(|c| c.state_dir.clone()),
        [
            state.clone(),
            state.join("gateway-2"),
            state.join("gateway-3")
        ]
    );
    let mode = fs::metadata(&second.state_dir).unwrap().permissions();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode) & 0o7777,
        0o770
    );
    assert!(first.notices.is_empty());
    assert!(second.notices[0].message.contains("another gateway uses"));

    // Whoever comes takes what is free, with the identity that lies there.
    drop((second, first));
    let (one, two) = (start(&[]), start(&[]));
    assert_eq!(
        [&one, &two].map(|c| c.identity.id.as_str()),
        [&ids[0], &ids[1]]
    );

    // Who says who it is is that, and keeps the rest apart.
    let named = start(&[("FIREZONE_ID", "edge-7")]);
    assert_eq!(named.identity.id, "edge-7");
    assert_eq!(named.state_dir, state.join("gateway-4"));
}

#[test]
fn identity_that_another_stored_meanwhile_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let variables = env(&[
        ("FIREZONE_TOKEN", SECRET),
        ("FIREZONE_STATE_DIR", dir.path().to_str().unwrap()),
    ]);
    let load = || Config::load(&Settings::default(), &variables, &host()).unwrap();
    let (mut one, mut two) = (load(), load());
    assert_ne!(one.identity.id, two.identity.id);

    one.keep_identity(&variables);
    let id = one.identity.id.clone();
    drop(one);
    two.keep_identity(&variables);

    assert_eq!(two.identity.id, id);
}

#[test]
fn identity_that_cannot_be_stored_is_used_with_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let blocked = dir.path().join("file");
    fs::write(&blocked, "").unwrap();
    let state = blocked.join("state");
    // A path below a file cannot be read either, but that says nothing about an identity in it.
    let variables = env(&[
        ("FIREZONE_TOKEN", SECRET),
        ("FIREZONE_STATE_DIR", state.to_str().unwrap()),
    ]);
    let mut config = Config::load(&Settings::default(), &variables, &host()).unwrap();

    config.keep_identity(&variables);

    assert_eq!(config.identity.source, IdentitySource::Random);
    let notice = config.notices.last().unwrap().to_string();
    assert!(
        notice.contains("cannot be stored") && notice.contains("FIREZONE_ID"),
        "{notice}"
    );
}

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
fn offloads_are_all_none_or_some() {
    for (text, shown) in [
        ("all", "all"),
        ("none", "none"),
        ("tun-tso,tun-uso,udp-gso,udp-gro", "all"),
        ("udp-gso", "udp-gso"),
    ] {
        let config = load(&[("FIREZONE_OFFLOADS", text)]);
        assert_eq!(config.offloads.to_string(), shown);
    }
    let config = load(&[("FIREZONE_WORKERS", "auto")]);
    assert_eq!(
        (config.offloads, config.workers),
        (crate::config::Offloads::ALL, None)
    );
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
    let Some(Command::CheckConfig { settings }) = parsed.command else {
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

fn tcp(address: &str) -> Option<Place> {
    Some(Place::Tcp(address.parse().unwrap()))
}

#[test]
fn the_admin_server_is_for_this_host_only_unless_told_otherwise() {
    let unix = || Some(Place::Unix("/run/gateway.sock".into()));
    for (health, admin, probes, everything, chosen) in [
        ("", "", tcp("0.0.0.0:8080"), tcp("127.0.0.1:8081"), false),
        ("[::]:80", "", tcp("[::]:80"), tcp("127.0.0.1:8081"), false),
        // One is enough where nobody else comes anyway.
        (
            "127.0.0.1:9",
            "",
            tcp("127.0.0.1:9"),
            tcp("127.0.0.1:9"),
            false,
        ),
        ("[::1]:9", "", tcp("[::1]:9"), tcp("[::1]:9"), false),
        // What the image says.
        ("", "health", tcp("0.0.0.0:8080"), tcp("0.0.0.0:8080"), true),
        ("off", "health", None, None, true),
        ("off", "", None, None, false),
        ("", "OFF", tcp("0.0.0.0:8080"), None, true),
        ("off", "10.0.0.1:99", None, tcp("10.0.0.1:99"), true),
        (
            "",
            "0.0.0.0:8080",
            tcp("0.0.0.0:8080"),
            tcp("0.0.0.0:8080"),
            true,
        ),
        (
            "",
            "unix:/run/gateway.sock",
            tcp("0.0.0.0:8080"),
            unix(),
            true,
        ),
    ] {
        let variables = [
            ("HEALTH_CHECK_ADDR", health),
            ("FIREZONE_ADMIN_ADDR", admin),
        ];
        let expected = Listeners {
            probes,
            admin: everything,
            chosen,
        };
        assert_eq!(load(&variables).listeners, expected, "{health} {admin}");
        let listeners = admin_listeners(&Settings::default(), &env(&variables));
        assert_eq!(listeners, Ok(expected), "{health} {admin}");
    }
}

#[test]
fn an_address_that_the_admin_server_cannot_have_is_a_mistake() {
    let long = format!("unix:/{}", "x".repeat(107));
    for (admin, problem) in [
        ("8081", "not an IP address with a port"),
        ("localhost:8081", "not an IP address"),
        ("127.0.0.1:0", "port 0"),
        ("unix:run/gateway.sock", "not an absolute path"),
        ("unix:", "not an absolute path"),
        (&long, "longer than 107 bytes"),
        ("127.0.0.1:8080", "port 8080 already"),
    ] {
        let mistake = only_mistake(&[("FIREZONE_ADMIN_ADDR", admin)]).to_string();
        assert!(
            mistake.starts_with("FIREZONE_ADMIN_ADDR") && mistake.contains(problem),
            "{mistake}"
        );
    }
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
