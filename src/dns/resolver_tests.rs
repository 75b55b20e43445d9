#![allow(clippy::unwrap_used)]

use std::net::{Ipv4Addr, Ipv6Addr};

use super::*;
use crate::dns::test_server::{Host, Server, Zone};

fn found(v4: &[&str], v6: &[&str]) -> Resolved {
    Resolved {
        ipv4: Some(v4.iter().map(|a| a.parse::<Ipv4Addr>().unwrap()).collect()),
        ipv6: Some(v6.iter().map(|a| a.parse::<Ipv6Addr>().unwrap()).collect()),
    }
}

async fn server(zone: Zone) -> (Server, Host, Resolver) {
    let server = Server::start("127.0.0.1", 0, zone).await;
    let host = Host::new(&[server.address.ip()], server.address.port());
    let resolver = Resolver::new(host.settings());
    (server, host, resolver)
}

#[tokio::test]
async fn both_families_are_asked_for() {
    let zone = Zone::default()
        .address("db.corp.example.", "10.0.0.1")
        .address("db.corp.example.", "10.0.0.2")
        .address("db.corp.example.", "fd12::1")
        .address("six.example.", "fd12::6");
    let (_server, _host, resolver) = server(zone).await;
    let mut both = resolver.resolve("DB.corp.example").await;
    both.ipv4.as_mut().unwrap().sort();
    assert_eq!(both, found(&["10.0.0.1", "10.0.0.2"], &["fd12::1"]));
    assert_eq!(
        resolver.resolve("six.example").await,
        found(&[], &["fd12::6"])
    );
}

#[tokio::test]
async fn no_such_name_is_an_answer_and_a_failure_is_none() {
    let zone = Zone {
        broken: vec!["broken.example."],
        ..Zone::default()
    };
    let (_server, _host, resolver) = server(zone).await;
    assert_eq!(resolver.resolve("nowhere.example").await, found(&[], &[]));
    assert!(resolver.resolve("broken.example").await.is_failure());
    assert_eq!(resolver.resolve("..").await, found(&[], &[]), "no name");
}

#[tokio::test]
async fn answers_are_kept_for_a_while() {
    let zone = Zone::default()
        .address("a.example.", "10.0.0.1")
        .address("a.example.", "fd12::1");
    let (server, _host, resolver) = server(zone).await;
    for _ in 0..5 {
        let both = resolver.resolve("a.example").await;
        assert_eq!(both, found(&["10.0.0.1"], &["fd12::1"]));
    }
    assert_eq!(server.asked(), 2, "A and AAAA");
}

#[tokio::test]
async fn the_hosts_file_comes_first_and_is_read_again_when_it_changes() {
    let zone = Zone::default()
        .address("a.example.", "10.0.0.1")
        .address("a.example.", "fd12::1");
    let (server, host, resolver) = server(zone).await;
    host.set_hosts("10.9.9.9 a.example b.example\nfd99::9 b.example\n");
    assert_eq!(
        resolver.resolve("A.example").await,
        found(&["10.9.9.9"], &[])
    );
    let both = resolver.resolve("b.example").await;
    assert_eq!(both, found(&["10.9.9.9"], &["fd99::9"]));
    assert_eq!(server.asked(), 0);
    host.set_hosts("10.8.8.8 b.example\n");
    assert_eq!(
        resolver.resolve("b.example").await,
        found(&["10.8.8.8"], &[])
    );
    let asked = resolver.resolve("a.example").await;
    assert_eq!(asked, found(&["10.0.0.1"], &["fd12::1"]));
}

#[tokio::test]
async fn resolv_conf_is_read_again_when_it_changes() {
    let (server, host, resolver) = server(Zone::default().address("a.example.", "10.0.0.1")).await;
    host.use_servers(&[]);
    assert!(resolver.resolve("a.example").await.is_failure());
    host.use_servers(&[server.address.ip()]);
    assert_eq!(
        resolver.resolve("a.example").await,
        found(&["10.0.0.1"], &[])
    );
    let other = Zone::default().address("a.example.", "10.0.0.2");
    let _other = Server::start("127.0.0.2", server.address.port(), other).await;
    host.use_servers(&["127.0.0.2".parse().unwrap()]);
    assert_eq!(
        resolver.resolve("a.example").await,
        found(&["10.0.0.2"], &[])
    );
}

#[tokio::test]
async fn a_silent_server_fails_in_bounded_time_and_the_next_is_asked() {
    let zone = Zone::default().address("a.example.", "10.0.0.1");
    let (server, host, resolver) = server(zone).await;
    let silent = Zone {
        silent: vec!["a.example.", "b.example."],
        ..Zone::default()
    };
    let silent = Server::start("127.0.0.2", server.address.port(), silent).await;
    host.use_servers(&[silent.address.ip(), server.address.ip()]);
    let begin = std::time::Instant::now();
    assert_eq!(
        resolver.resolve("a.example").await,
        found(&["10.0.0.1"], &[])
    );
    assert!(begin.elapsed() < LIMIT, "the next was asked in time");
    let asked = silent.asked();
    assert!(asked > 0, "it was asked first");
    host.use_servers(&[silent.address.ip()]);
    let begin = std::time::Instant::now();
    assert!(resolver.resolve("b.example").await.is_failure());
    assert!(silent.asked() > asked);
    assert!(begin.elapsed() < LIMIT + TIMEOUT, "{:?}", begin.elapsed());
}

#[tokio::test]
async fn files_that_cannot_be_read_leave_what_they_said_before() {
    let (server, host, resolver) = server(Zone::default().address("a.example.", "10.0.0.1")).await;
    host.set_hosts("10.9.9.9 b.example\n");
    let asked = resolver.resolve("a.example").await;
    assert_eq!(asked, found(&["10.0.0.1"], &[]));
    host.break_files();
    let asked = resolver.resolve("c.example").await;
    assert_eq!(asked, found(&[], &[]), "the server said so");
    assert_eq!(server.asked(), 4);
    let asked = resolver.resolve("b.example").await;
    assert_eq!(asked, found(&["10.9.9.9"], &[]));
    // A list without servers is one that is being written.
    host.use_servers(&[]);
    let asked = resolver.resolve("d.example").await;
    assert_eq!(asked, found(&[], &[]));
    // Once they can be read again, what they say holds.
    let other = Zone::default().address("a.example.", "10.0.0.2");
    let _other = Server::start("127.0.0.2", server.address.port(), other).await;
    host.use_servers(&["127.0.0.2".parse().unwrap()]);
    host.set_hosts("10.8.8.8 b.example\n");
    let asked = resolver.resolve("b.example").await;
    assert_eq!(asked, found(&["10.8.8.8"], &[]));
    let asked = resolver.resolve("a.example").await;
    assert_eq!(asked, found(&["10.0.0.2"], &[]));
}

#[tokio::test]
async fn a_hosts_file_in_another_encoding_is_read_to_its_end_and_a_removed_one_is_empty() {
    let (_server, host, resolver) = server(Zone::default()).await;
    host.set_hosts(b"# caf\xe9\n10.9.9.9 b.example\n");
    let asked = resolver.resolve("b.example").await;
    assert_eq!(asked, found(&["10.9.9.9"], &[]));
    host.remove_hosts();
    assert_eq!(resolver.resolve("b.example").await, found(&[], &[]));
}
