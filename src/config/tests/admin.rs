//! Where the admin server listens and who may ask it.

#![allow(clippy::unwrap_used)]

use super::*;

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
