//! Settings: where they come from, which counts more, and what is wrong with them.

#![allow(clippy::unwrap_used)]

use super::*;

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
fn partition_time_can_be_lifted_by_name() {
    let config = load(&[("FIREZONE_MAX_PARTITION_TIME", "none")]);
    assert_eq!(config.max_partition_time, None);
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
