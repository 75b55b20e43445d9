#![allow(clippy::unwrap_used)]

use std::net::Ipv4Addr;

use uuid::Uuid;

use super::*;
use crate::datapath::peers::PathKind;

const PSK: PresharedKey = PresharedKey([7; 32]);

struct Client {
    id: ClientId,
    tunn: Tunn,
    public: [u8; 32],
}

fn address(last: u8) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::new(192, 0, 2, last).into(), 1000)
}

fn path(last: u8) -> Path {
    Path {
        source: Some(Ipv4Addr::new(192, 0, 2, 1).into()),
        destination: address(last),
        channel: None,
        kind: PathKind::Direct,
    }
}

fn client(wireguard: &WireGuard, number: u128) -> Client {
    let private = StaticSecret::from([number as u8 + 100; 32]);
    let public = PublicKey::from(&private).to_bytes();
    let tunn = Tunn::new(
        private,
        PublicKey::from(wireguard.public_key()),
        Some(PSK.0),
        None,
        number as u32,
        None,
    );
    Client {
        id: ClientId(Uuid::from_u128(number)),
        tunn,
        public,
    }
}

impl Client {
    fn initiation(&mut self) -> Vec<u8> {
        let mut buffer = [0; SCRATCH];
        match self.tunn.format_handshake_initiation(&mut buffer, true) {
            TunnResult::WriteToNetwork(message) => message.to_vec(),
            other => panic!("{other:?}"),
        }
    }

    /// Takes a message and returns the answer, if any.
    fn take(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        let mut buffer = [0; SCRATCH];
        match self.tunn.decapsulate(None, message, &mut buffer) {
            TunnResult::WriteToNetwork(answer) => Some(answer.to_vec()),
            TunnResult::WriteToTunnelV4(packet, _) => Some(packet.to_vec()),
            TunnResult::Done => None,
            other => panic!("{other:?}"),
        }
    }
}

fn new() -> (WireGuard, Arc<PeerTable>, Instant) {
    let table = Arc::new(PeerTable::new());
    (WireGuard::new(Arc::clone(&table)), table, Instant::now())
}

fn inner_packet() -> Vec<u8> {
    let mut packet = vec![0; 28];
    packet[0] = 0x45;
    packet[3] = 28;
    packet[9] = 17;
    packet
}

/// Worker's part: decrypts data addressed by receiver index.
fn decrypt(table: &PeerTable, message: &[u8]) -> Option<Vec<u8>> {
    let peer = table.by_receiver_index(data_receiver(message)?)?;
    let mut buffer = [0; SCRATCH];
    match peer.tunn().decapsulate(None, message, &mut buffer) {
        TunnResult::WriteToTunnelV4(packet, _) => Some(packet.to_vec()),
        TunnResult::Done => Some(Vec::new()),
        _ => None,
    }
}

#[test]
fn an_answer_before_nomination_waits_for_the_path() {
    let (mut wg, table, now) = new();
    let mut c = client(&wg, 1);
    wg.insert(now, c.id, c.public, PSK).unwrap();
    let initiation = c.initiation();
    wg.handle_message(now, address(1), address(9), None, &initiation)
        .unwrap();
    assert_eq!(wg.poll_outgoing(), None, "no path, nothing leaves");

    wg.set_path(c.id, Some(path(9)));
    let answer = wg.poll_outgoing().unwrap();
    assert_eq!(answer.route, Route::Path(path(9)));
    let keepalive = c.take(&answer.payload).unwrap();
    assert_eq!(decrypt(&table, &keepalive), Some(Vec::new()));
    assert_eq!(wg.poll_event(), Some(Event::Handshake(c.id)));

    // Both ways now.
    let out = wg.encapsulate(c.id, &inner_packet()).unwrap();
    assert_eq!(c.take(&out.payload).unwrap(), inner_packet());
}

#[test]
fn without_a_session_nothing_is_encrypted_and_no_handshake_begins() {
    let (mut wg, _, now) = new();
    let c = client(&wg, 1);
    wg.insert(now, c.id, c.public, PSK).unwrap();
    wg.set_path(c.id, Some(path(9)));
    assert_eq!(wg.encapsulate(c.id, &inner_packet()), None);
    assert_eq!(wg.poll_outgoing(), None);
}

#[test]
fn strangers_and_wrong_macs_are_told_apart() {
    let (mut wg, _, now) = new();
    let mut stranger = client(&wg, 1);
    let initiation = stranger.initiation();
    assert_eq!(
        wg.handle_message(now, address(1), address(9), None, &initiation),
        Err(Refused::UnknownPeer)
    );
    let mut forged = initiation;
    forged[20] ^= 1;
    assert_eq!(
        wg.handle_message(now, address(1), address(9), None, &forged),
        Err(Refused::Mac)
    );
    for len in 0..200 {
        let _ = wg.handle_message(now, address(1), address(9), None, &vec![1; len]);
    }
    assert_eq!(
        wg.handle_message(now, address(1), address(9), None, b"hello"),
        Err(Refused::Invalid)
    );
}

#[test]
fn a_wrong_preshared_key_does_not_connect() {
    let (mut wg, _, now) = new();
    let mut c = client(&wg, 1);
    wg.insert(now, c.id, c.public, PresharedKey([8; 32]))
        .unwrap();
    wg.set_path(c.id, Some(path(9)));
    let initiation = c.initiation();
    wg.handle_message(now, address(1), address(9), None, &initiation)
        .unwrap();
    let answer = wg.poll_outgoing().unwrap();
    let mut buffer = [0; SCRATCH];
    assert!(matches!(
        c.tunn.decapsulate(None, &answer.payload, &mut buffer),
        TunnResult::Err(_)
    ));
}

#[test]
fn a_source_that_sends_too_much_is_asked_for_a_cookie_at_its_address() {
    let (mut wg, _, now) = new();
    let mut c = client(&wg, 1);
    wg.insert(now, c.id, c.public, PSK).unwrap();
    wg.set_path(c.id, Some(path(9)));
    let mut asked = 0;
    for _ in 0..25 {
        let initiation = c.initiation();
        if wg.handle_message(now, address(1), address(9), None, &initiation)
            == Err(Refused::UnderLoad)
        {
            asked += 1;
        }
    }
    assert_eq!(asked, 5, "twenty are free");
    let cookie = std::iter::from_fn(|| wg.poll_outgoing())
        .filter(|o| matches!(o.route, Route::Reply { .. }))
        .last()
        .unwrap();
    assert_eq!(
        cookie.route,
        Route::Reply {
            local: address(1),
            remote: address(9)
        }
    );
    // With the cookie the client gets through even now, but from nowhere else.
    c.take(&cookie.payload);
    let initiation = c.initiation();
    for _ in 0..25 {
        let _ = wg.handle_message(now, address(1), address(8), None, &initiation);
    }
    assert_eq!(
        wg.handle_message(now, address(1), address(8), None, &initiation),
        Err(Refused::UnderLoad)
    );
    let initiation = c.initiation();
    assert_eq!(
        wg.handle_message(now, address(1), address(9), None, &initiation),
        Ok(())
    );
}

// ---- Floods ----

/// Ten thousand initiations a second for five seconds, and a hundred clients that want in
/// meanwhile. `attack` sends the n-th one.
fn flood(
    known_paths: bool,
    mut attack: impl FnMut(&mut WireGuard, Instant, u32),
) -> (WireGuard, usize) {
    let (mut wg, _, start) = new();
    let mut clients: Vec<Client> = (1..=100).map(|n| client(&wg, n)).collect();
    for c in &clients {
        wg.insert(start, c.id, c.public, PSK).unwrap();
        wg.set_path(c.id, Some(path(9)));
    }
    let mut served = 0;
    for n in 0..50_000u32 {
        let now = start + Duration::from_micros(100) * n;
        attack(&mut wg, now, n);
        if n % 500 == 0 {
            let at = (n / 500) as usize;
            let source = SocketAddr::from(([10, 0, 0, u8::try_from(at).unwrap()], 7));
            let c = &mut clients[at];
            let owner = known_paths.then_some(c.id);
            while wg.poll_outgoing().is_some() {}
            let initiation = c.initiation();
            let first = wg.handle_message(now, address(1), source, owner, &initiation);
            let outcome = match first {
                Ok(()) => Ok(()),
                // Asked for a cookie, it comes back with it.
                Err(_) => match wg.poll_outgoing() {
                    Some(cookie) => {
                        c.take(&cookie.payload);
                        let again = c.initiation();
                        let later = now + Duration::from_millis(50);
                        wg.handle_message(later, address(1), source, owner, &again)
                    }
                    None => first,
                },
            };
            served += usize::from(outcome.is_ok());
        }
        while wg.poll_outgoing().is_some() {}
        while wg.poll_event().is_some() {}
    }
    (wg, served)
}

/// Messages of somebody who knows our public key and nothing else.
fn strangers(wg: &WireGuard) -> Vec<Vec<u8>> {
    let mut stranger = client(wg, 150);
    (0..20).map(|_| stranger.initiation()).collect()
}

#[test]
fn a_flood_from_one_source_keeps_nobody_else_out() {
    let messages = std::cell::OnceCell::new();
    let (wg, served) = flood(false, |wg, now, n| {
        let messages = messages.get_or_init(|| strangers(wg));
        let message = &messages[n as usize % messages.len()];
        let refused = wg.handle_message(now, address(1), address(66), None, message);
        assert!(refused.is_err());
    });
    assert!(served >= 99, "{served} of 100");
    let counters = wg.admission_counters();
    // Twenty at once and ten a second for five seconds are free for any source.
    assert!(counters.computed <= 100 + 71, "{counters:?}");
    assert!(counters.cookies <= 200 + 2500, "{counters:?}");
    assert!(wg.admission.remembered() <= 200, "memory is flat");
}

#[test]
fn a_flood_from_forged_sources_keeps_clients_with_a_path_in_and_costs_little() {
    let messages = std::cell::OnceCell::new();
    let (wg, served) = flood(true, |wg, now, n| {
        let messages = messages.get_or_init(|| strangers(wg));
        let source = SocketAddr::from(([11, (n >> 16) as u8, (n >> 8) as u8, n as u8], 7));
        let message = &messages[n as usize % messages.len()];
        let _ = wg.handle_message(now, address(1), source, None, message);
    });
    assert_eq!(served, 100);
    let counters = wg.admission_counters();
    assert!(counters.computed <= 100 + 100 + 251, "{counters:?}");
    assert!(wg.admission.remembered() <= 3 * 4096, "memory is flat");
}

#[test]
fn a_flood_with_a_cookie_meets_the_limit_of_its_source() {
    let cookie = std::cell::OnceCell::new();
    let (wg, served) = flood(true, |wg, now, n| {
        let messages = cookie.get_or_init(|| {
            let mut stranger = client(wg, 150);
            for _ in 0..25 {
                let message = stranger.initiation();
                let _ = wg.handle_message(now, address(1), address(66), None, &message);
            }
            let reply = std::iter::from_fn(|| wg.poll_outgoing()).last().unwrap();
            stranger.take(&reply.payload);
            (0..20).map(|_| stranger.initiation()).collect::<Vec<_>>()
        });
        let message = &messages[n as usize % messages.len()];
        let _ = wg.handle_message(now, address(1), address(66), None, message);
    });
    assert_eq!(served, 100);
    let counters = wg.admission_counters();
    // A hundred at once and fifty a second for those who prove their address, on top of the free
    // ones.
    assert!(counters.computed <= 100 + 71 + 351, "{counters:?}");
    assert!(counters.computed >= 300, "the cookie is worth something");
}

#[test]
fn garbage_costs_no_curve_operation() {
    let (wg, served) = flood(false, |wg, now, n| {
        let mut message = [n as u8; 148];
        message[..4].copy_from_slice(&[1, 0, 0, 0]);
        let refused = wg.handle_message(now, address(1), address(66), None, &message);
        assert_eq!(refused, Err(Refused::Mac));
    });
    assert_eq!(served, 100);
    let counters = wg.admission_counters();
    assert_eq!((counters.computed, counters.bad_mac), (100, 50_000));
    assert_eq!(counters.cookies, 0);
}

#[test]
fn a_replaced_session_no_longer_decrypts_what_was_meant_for_the_former() {
    let (mut wg, table, now) = new();
    let mut c = client(&wg, 1);
    wg.insert(now, c.id, c.public, PSK).unwrap();
    wg.set_path(c.id, Some(path(9)));
    let initiation = c.initiation();
    wg.handle_message(now, address(1), address(9), None, &initiation)
        .unwrap();
    let answer = wg.poll_outgoing().unwrap();
    let data = c.take(&answer.payload).unwrap();

    wg.insert(now, c.id, c.public, PSK).unwrap();
    assert_eq!(decrypt(&table, &data), None);
    assert!(
        wg.peer(c.id).unwrap().path().is_none(),
        "a fresh one has no path"
    );
}

#[test]
fn a_key_belongs_to_its_newest_owner_only() {
    let (mut wg, _, now) = new();
    let mut c = client(&wg, 1);
    let other = ClientId(Uuid::from_u128(2));
    wg.insert(now, c.id, c.public, PSK).unwrap();
    wg.insert(now, other, c.public, PSK).unwrap();
    assert!(wg.peer(c.id).is_none());
    wg.set_path(other, Some(path(9)));
    let initiation = c.initiation();
    wg.handle_message(now, address(1), address(9), None, &initiation)
        .unwrap();
    assert_eq!(wg.poll_event(), Some(Event::Handshake(other)));
}

#[test]
fn only_data_of_sufficient_length_counts_as_data() {
    let mut message = vec![4, 0, 0, 0, 0x02, 0x01, 0, 0];
    assert_eq!(data_receiver(&message), None);
    message.resize(31, 0);
    assert_eq!(data_receiver(&message), None);
    message.push(0);
    assert_eq!(data_receiver(&message), Some(0x0102));
    message[1] = 1;
    assert_eq!(data_receiver(&message), None, "reserved bytes must be zero");
}

#[test]
fn a_wake_up_touches_only_the_sessions_that_are_due() {
    const CLIENTS: u128 = 2000;
    let (mut wg, _, start) = new();
    for n in 0..CLIENTS {
        let key = [(n % 251) as u8, (n / 251) as u8, 9].repeat(11)[..32].to_vec();
        let now = start + Duration::from_millis(n as u64);
        let client = ClientId(Uuid::from_u128(n));
        wg.insert(now, client, key.try_into().unwrap(), PSK)
            .unwrap();
    }
    let run = |wg: &mut WireGuard, seconds: u64, from: Instant| {
        let (end, mut most) = (from + Duration::from_secs(seconds), 0);
        let before = wg.looked_at;
        while let Some(at) = wg.poll_timeout().filter(|at| *at <= end) {
            let before = wg.looked_at;
            wg.handle_timeout(at);
            most = most.max(wg.looked_at - before);
        }
        (wg.looked_at - before, most)
    };
    let idle = start + IN_USE + Duration::from_secs(10);
    run(&mut wg, 40, start);
    let (all, most) = run(&mut wg, 60, idle);
    // Each every twenty seconds, and none because of another one.
    assert_eq!(all, 3 * CLIENTS as u64);
    assert!(most <= 10, "{most} at once");

    // One that is in use again is looked at often, alone: twice a second at first.
    let later = idle + Duration::from_secs(60);
    wg.note_activity(later, ClientId(Uuid::from_u128(7)));
    let (busy, _) = run(&mut wg, 20, later);
    let idle_share = CLIENTS as u64;
    assert!(
        (idle_share + 11..=idle_share + 14).contains(&busy),
        "{busy}"
    );
}

#[test]
fn keys_that_end_are_looked_at_in_that_moment() {
    let (mut wg, _, start) = new();
    let mut c = client(&wg, 1);
    wg.insert(start, c.id, c.public, PSK).unwrap();
    let second = start + Duration::from_secs(113);
    let mut looks = Vec::new();
    for (at, until) in [(start, second), (second, start + Duration::from_secs(320))] {
        // Two initiations with one time of day are one to boringtun.
        std::thread::sleep(Duration::from_millis(1));
        let initiation = c.initiation();
        wg.handle_message(at, address(1), address(9), None, &initiation)
            .unwrap();
        while let Some(due) = wg.poll_timeout().filter(|due| *due <= until) {
            wg.handle_timeout(due);
            looks.push(due);
        }
    }
    for handshake in [start, second] {
        assert!(looks.contains(&(handshake + KEYS_END)), "{handshake:?}");
    }
    let pauses = looks.windows(2).map(|pair| pair[1] - pair[0]);
    assert!(pauses.clone().all(|pause| pause <= IDLE_STEP));
    // 5 and 15 in the half minute after each handshake, and the rest of 260 s.
    assert!((40..=60).contains(&looks.len()), "{}", looks.len());
}
