//! The identity of a gateway, stored or given.

#![allow(clippy::unwrap_used)]

use super::*;

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
