//! The program as operators start it.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

const SECRET: &str = ".SFMyNTY.hunter2";

fn gateway(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_firezone-gateway"))
        .args(arguments)
        .env_clear()
        .envs(variables.iter().copied())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn start_with_mistakes_lists_all_of_them_and_exits_2() {
    let output = gateway(
        &[],
        &[
            ("HEALTH_CHECK_ADDR", "nonsense"),
            ("FIREZONE_UDP_PORT", "nonsense"),
            ("FIREZONE_ID", "edge-7"),
        ],
    );
    assert_eq!(output.status.code(), Some(2));
    let stderr = text(&output.stderr);
    for variable in ["FIREZONE_TOKEN", "HEALTH_CHECK_ADDR", "FIREZONE_UDP_PORT"] {
        assert!(stderr.contains(&format!("\n  - {variable}: ")), "{stderr}");
    }
}

#[test]
fn check_config_exits_0_2_or_78_and_never_shows_the_token() {
    let complete = [("FIREZONE_TOKEN", SECRET), ("FIREZONE_ID", "edge-7")];
    let arguments = ["check-config", "--no-check", "--tun-name", "fz0"];
    let output = gateway(&arguments, &complete);
    let stdout = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{stdout}");
    assert!(
        stdout.contains("fz0") && stdout.contains("[REDACTED]"),
        "{stdout}"
    );
    assert!(!stdout.contains("hunter2") && output.stderr.is_empty());

    // What this host has is not for this test to say.
    let output = gateway(&["check-config"], &complete);
    let stdout = text(&output.stdout);
    assert!(matches!(output.status.code(), Some(0 | 78)), "{stdout}");
    for check in ["tun_device", "privileges", "clock"] {
        assert!(stdout.contains(&format!(" {check}: ")), "{stdout}");
    }

    for platform in ["compose", "kubernetes", "host", "all"] {
        let output = gateway(&["check-config", "--fix-for", platform], &complete);
        let of_all = text(&output.stdout);
        let findings = |text: &str| text.lines().filter(|l| !l.contains("| ")).count();
        assert_eq!(findings(&of_all), findings(&stdout), "{of_all}");
    }

    let output = gateway(&["check-config", "--tun-name", "a/b"], &complete);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stdout).contains("--tun-name (FIREZONE_TUN_NAME)"));
}

#[test]
fn help_never_shows_the_token() {
    for arguments in [
        &["-h"][..],
        &["--help"],
        &["run", "-h"],
        &["check-config", "--help"],
    ] {
        let output = gateway(arguments, &[("FIREZONE_TOKEN", SECRET)]);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        let stdout = text(&output.stdout);
        assert!(stdout.contains("FIREZONE_TOKEN"), "{stdout}");
        assert!(!stdout.contains("hunter2"), "{stdout}");
    }
}

#[test]
fn each_sub_command_explains_itself() {
    for command in [
        "run",
        "healthcheck",
        "status",
        "log-filter",
        "diagnose",
        "check-config",
    ] {
        for arguments in [[command, "--help"], [command, "-h"], ["help", command]] {
            let output = gateway(&arguments, &[]);
            assert_eq!(output.status.code(), Some(0), "{arguments:?}");
            let usage = format!("Usage: firezone-gateway {command}");
            assert!(text(&output.stdout).contains(&usage), "{arguments:?}");
        }
    }
}

#[test]
fn wrong_usage_exits_2() {
    assert_eq!(gateway(&["--nonsense"], &[]).status.code(), Some(2));
    assert_eq!(gateway(&["healthchek"], &[]).status.code(), Some(2));
}

#[test]
fn healthcheck_and_status_without_a_gateway_exit_1_and_say_where_they_looked() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let variables = [("HEALTH_CHECK_ADDR", closed.as_str())];

    let output = gateway(&["healthcheck"], &variables);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains(&closed));

    let output = gateway(&["status"], &variables);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains(&closed));
}
