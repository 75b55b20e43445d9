//! The binaries as processes: they start, say so, and end when asked.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/policy.example.yaml");

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn start(binary: &str, arguments: &[&str], port: u16) -> Child {
    let child = Command::new(binary)
        .args(arguments)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "{binary} does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

fn ends_cleanly(mut child: Child, signal: Signal) {
    kill_process(Pid::from_child(&child), signal).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn portal_runs_with_the_example_policy_and_ends_on_sigterm() {
    let (peers, control) = (free_port(), free_port());
    let (listen, control_address) = (format!("127.0.0.1:{peers}"), format!("127.0.0.1:{control}"));
    let arguments = [
        "--policy",
        EXAMPLE,
        "--listen",
        &listen,
        "--control",
        &control_address,
    ];
    let child = start(env!("CARGO_BIN_EXE_lab-portal"), &arguments, control);
    ends_cleanly(child, Signal::TERM);
}

#[test]
fn collector_and_web_server_end_on_either_signal() {
    for binary in [
        env!("CARGO_BIN_EXE_lab-collector"),
        env!("CARGO_BIN_EXE_lab-web"),
    ] {
        for signal in [Signal::TERM, Signal::INT] {
            let port = free_port();
            let listen = format!("127.0.0.1:{port}");
            ends_cleanly(start(binary, &["--listen", &listen], port), signal);
        }
    }
}

#[test]
fn portal_with_a_wrong_policy_names_the_mistake() {
    let directory = tempfile::tempdir().unwrap();
    let policy = directory.path().join("policy.yaml");
    std::fs::write(&policy, "sites: []\n").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_lab-portal"))
        .arg("--policy")
        .arg(&policy)
        .output()
        .unwrap();
    assert!(!output.status.success());
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("at least one site is needed"), "{message}");
}

#[test]
fn every_binary_explains_itself() {
    for binary in [
        env!("CARGO_BIN_EXE_lab-portal"),
        env!("CARGO_BIN_EXE_lab-collector"),
        env!("CARGO_BIN_EXE_lab-web"),
    ] {
        let output = Command::new(binary).arg("--help").output().unwrap();
        assert!(output.status.success());
        assert!(
            String::from_utf8(output.stdout)
                .unwrap()
                .contains("--listen")
        );
    }
}
