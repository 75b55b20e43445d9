#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::Read as _;

use flate2::read::GzDecoder;

use super::*;
use crate::config::FixedEnv;

fn here() -> Host {
    Host {
        machine_id: "/nowhere".into(),
        hostname: Some("edge".into()),
    }
}

/// The files of an archive, and its directory.
fn unpack(archive: &[u8]) -> (String, BTreeMap<String, String>) {
    let mut files = BTreeMap::new();
    let mut directory = String::new();
    for entry in tar::Archive::new(GzDecoder::new(archive))
        .entries()
        .unwrap()
    {
        let mut entry = entry.unwrap();
        assert_eq!(entry.header().mode().unwrap(), 0o600);
        let path = entry.path().unwrap().display().to_string();
        let (first, rest) = path.split_once('/').unwrap();
        directory = first.to_owned();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        files.insert(rest.to_owned(), text);
    }
    (directory, files)
}

fn diagnose(output: &Path, env: &FixedEnv) -> (ExitStatus, String) {
    let arguments = DiagnoseArgs {
        output: Some(output.display().to_string()),
        addr: None,
    };
    let mut said = Vec::new();
    let exit = run(&arguments, &Settings::default(), env, &here(), &mut said).unwrap();
    (exit, String::from_utf8(said).unwrap())
}

#[test]
fn without_a_gateway_the_archive_has_the_rest_and_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("bundle.tar.gz");
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let state = dir.path().join("state");
    let env: FixedEnv = [
        ("HEALTH_CHECK_ADDR", closed.as_str()),
        ("FIREZONE_STATE_DIR", state.to_str().unwrap()),
        ("FIREZONE_UDP_PORT", "nonsense"),
    ]
    .into_iter()
    .collect();
    let (exit, said) = diagnose(&output, &env);
    assert_eq!(exit, ExitStatus::Ok, "{said}");
    assert!(said.contains("status.json: no answer from"), "{said}");
    let archive = fs::read(&output).unwrap();
    let (directory, files) = unpack(&archive);
    assert!(directory.starts_with("firezone-gateway-20"), "{directory}");
    for (file, wanted) in [
        ("summary.txt", "What is missing, and why:"),
        (
            "summary.txt",
            "log.txt: not asked for, because of status.json",
        ),
        ("version.txt", env!("CARGO_PKG_VERSION")),
        ("config.txt", "FIREZONE_UDP_PORT"),
        ("preflight.txt", "tun_device"),
        ("interfaces.txt", "IfName(\"lo\")"),
        ("sysctl.txt", "net/ipv4/ip_forward "),
        ("proc/net/snmp", "Udp:"),
    ] {
        let text = files.get(file).unwrap_or_else(|| panic!("no {file}"));
        assert!(text.contains(wanted), "{file}: {text}");
    }
    assert!(!files.contains_key("status.json"));
    assert!(!state.exists(), "looking changes nothing");

    // It is nobody else's to read, and nothing is overwritten.
    use std::os::unix::fs::PermissionsExt as _;
    let mode = fs::metadata(&output).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (exit, said) = diagnose(&output, &env);
    assert_eq!(exit, ExitStatus::Failure);
    assert!(said.contains("cannot write"), "{said}");
    assert_eq!(fs::read(&output).unwrap(), archive);
}

#[test]
fn secrets_of_the_settings_are_removed_wherever_they_turn_up() {
    let dir = tempfile::tempdir().unwrap();
    let admin = dir.path().join("admin");
    fs::write(&admin, "open-sesame\n").unwrap();
    let token = dir.path().join("token");
    fs::write(&token, ".filed-token\n").unwrap();
    let env: FixedEnv = [
        ("FIREZONE_TOKEN_FILE", token.to_str().unwrap()),
        ("FIREZONE_ID", "edge-7"),
        ("FIREZONE_ADMIN_TOKEN_FILE", admin.to_str().unwrap()),
        (
            "OTEL_EXPORTER_OTLP_HEADERS",
            "authorization=Bearer%20s3cr3t%2Bkey,x-tenant=tenant-9",
        ),
        (
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "http://user:p%40ssword@collector:4318",
        ),
    ]
    .into_iter()
    .collect();
    let settings = Settings::default();
    let examination = examine(&settings, &env, &here());
    let secrets = Secrets::of(&settings, &env, &examination);
    let text = "a .filed-token b open-sesame c Bearer s3cr3t+key d s3cr3t+key e \
                Bearer%20s3cr3t%2Bkey f tenant-9 g p%40ssword h p@ssword i edge-7";
    let cleaned = secrets.remove(text);
    let expected = "a [REMOVED] b [REMOVED] c [REMOVED] d [REMOVED] e [REMOVED] f [REMOVED] \
                    g [REMOVED] h [REMOVED] i edge-7";
    assert_eq!(cleaned, expected);
}

#[test]
fn a_token_that_cannot_be_used_is_one_all_the_same() {
    let env: FixedEnv = [("FIREZONE_TOKEN", "not usable"), ("HEALTH_CHECK_ADDR", "x")]
        .into_iter()
        .collect();
    let settings = Settings::default();
    let examination = examine(&settings, &env, &here());
    assert!(examination.config.is_none());
    let secrets = Secrets::of(&settings, &env, &examination);
    assert_eq!(secrets.remove("is not usable"), "is [REMOVED]");
}
