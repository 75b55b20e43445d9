#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use stun_codec::rfc5389::attributes::MessageIntegrity as Mi;

use super::*;

/// RFC 5769 §2.2: response with MESSAGE-INTEGRITY (short-term) and FINGERPRINT, IPv4.
const RFC5769_IPV4_RESPONSE: &str = "
    0101003c 2112a442 b7e7a701bc34d686fa87dfae
    8022000b 7465737420766563746f7220
    00200008 0001a147e112a643
    00080014 2b91f599fd9e90c38c7489f92af9ba53f06be7d7
    80280004 c07d4c96";
/// RFC 5769 §2.3: the same over IPv6.
const RFC5769_IPV6_RESPONSE: &str = "
    01010048 2112a442 b7e7a701bc34d686fa87dfae
    8022000b 7465737420766563746f7220
    00200014 0002a1470113a9faa5d3f179bc25f4b5bed2b9d9
    00080014 a382954e4be67bf11784c97c8292c275bfe3ed41
    80280004 c8fb0b4c";
const RFC5769_SHORT_TERM_PASSWORD: &str = "VOkJxbRl1RmTxUk/WvJxBt";
/// RFC 5769 §2.4: request with long-term credentials.
const RFC5769_LONG_TERM_REQUEST: &str = "
    00010060 2112a442 78ad3433c6ad72c029da412e
    00060012 e3839ee38388e383aae38383e382afe382b90000
    0015001c 662f2f3439396b39353464364f4c33346f4c39465354767936347341
    0014000b 6578616d706c652e6f726700
    00080014 f67024656dd64a3e02b8e0712e85c9a28ca89666";

fn bytes(hex_with_spaces: &str) -> Vec<u8> {
    let digits: String = hex_with_spaces.split_whitespace().collect();
    hex::decode(digits).unwrap()
}

fn short_term_is_valid(message: &Incoming, password: &str) -> bool {
    let integrity = message.message.get_attribute::<Mi>().unwrap();
    integrity.check_short_term_credential(password).is_ok()
}

fn credentials(username: &str, password: &str) -> Credentials {
    Credentials::new(username, &SecretString::from(password)).unwrap()
}

fn challenge(realm: &str, nonce: &str) -> Challenge {
    Challenge {
        realm: Realm::new(realm.to_owned()).unwrap(),
        nonce: Nonce::new(nonce.to_owned()).unwrap(),
    }
}

fn attribute_types(datagram: &[u8]) -> Vec<u16> {
    let mut types = Vec::new();
    let mut rest = &datagram[20..];
    while !rest.is_empty() {
        types.push(u16::from_be_bytes([rest[0], rest[1]]));
        let len = usize::from(u16::from_be_bytes([rest[2], rest[3]]));
        rest = &rest[4 + len.next_multiple_of(4)..];
    }
    types
}

#[test]
fn rfc5769_responses_reveal_the_mapped_address() {
    for (vector, mapped) in [
        (RFC5769_IPV4_RESPONSE, "192.0.2.1:32853"),
        (
            RFC5769_IPV6_RESPONSE,
            "[2001:db8:1234:5678:11:2233:4455:6677]:32853",
        ),
    ] {
        let message = Incoming::decode(&bytes(vector)).unwrap();
        assert!(message.is_success());
        assert!(message.answers(Request::Binding));
        assert_eq!(message.mapped(), Some(mapped.parse().unwrap()));
        assert!(short_term_is_valid(&message, RFC5769_SHORT_TERM_PASSWORD));
        assert!(!short_term_is_valid(&message, "wrong"));
    }
}

#[test]
fn rfc5769_long_term_credentials_verify() {
    let message = Incoming::decode(&bytes(RFC5769_LONG_TERM_REQUEST)).unwrap();
    // The RFC names user and password before SASLprep; on the wire they are prepared.
    let user = "\u{30DE}\u{30C8}\u{30EA}\u{30C3}\u{30AF}\u{30B9}";
    let realm = Realm::new("example.org".to_owned()).unwrap();
    let check = |password| message.integrity(&credentials(user, password), &realm);
    assert_eq!(check("TheMatrIX"), Integrity::Valid);
    assert_eq!(check("TheMatrix"), Integrity::Invalid);
    assert_eq!(message.realm(), Some(&realm));
    assert_eq!(
        message.nonce().unwrap().value(),
        "f//499k954d6OL34oL9FSTvy64sA"
    );
}

#[test]
fn wrong_fingerprint_is_not_stun() {
    let mut datagram = bytes(RFC5769_IPV4_RESPONSE);
    *datagram.last_mut().unwrap() ^= 1;
    assert!(Incoming::decode(&datagram).is_none());
}

#[test]
fn any_flipped_bit_under_the_signature_is_noticed() {
    let good = bytes(RFC5769_LONG_TERM_REQUEST);
    let user = "\u{30DE}\u{30C8}\u{30EA}\u{30C3}\u{30AF}\u{30B9}";
    let realm = Realm::new("example.org".to_owned()).unwrap();
    for i in 0..good.len() {
        let mut datagram = good.clone();
        datagram[i] ^= 1;
        let verdict = Incoming::decode(&datagram)
            .map(|m| m.integrity(&credentials(user, "TheMatrIX"), &realm));
        assert_ne!(verdict, Some(Integrity::Valid), "byte {i}");
    }
}

#[test]
fn first_allocate_is_unsigned_and_asks_for_udp_on_both_families() {
    let request = Request::Allocate(Families::Both);
    let datagram = encode(request, TransactionId::new([7; 12]), None);
    assert_eq!(datagram[..2], [0x00, 0x03]);
    assert_eq!(attribute_types(&datagram), [0x8022, 0x0019, 0x8000]);
}

#[test]
fn signed_request_carries_exactly_what_the_server_needs() {
    let (user, auth) = (credentials("u:1", "secret"), challenge("firezone", "n0"));
    let id = TransactionId::new([9; 12]);
    let signed = |request| encode(request, id, Some((&user, &auth)));

    let refresh = signed(Request::Refresh { lifetime: None });
    assert_eq!(
        attribute_types(&refresh),
        [0x8022, 0x0006, 0x0014, 0x0015, 0x0008],
        "nothing extra in REFRESH"
    );
    let release = signed(Request::Refresh { lifetime: Some(0) });
    assert_eq!(
        attribute_types(&release),
        [0x8022, 0x000D, 0x0006, 0x0014, 0x0015, 0x0008]
    );
    let bind = signed(Request::ChannelBind {
        channel: 0x4001,
        peer: "192.0.2.1:9".parse().unwrap(),
    });
    assert_eq!(
        attribute_types(&bind),
        [0x8022, 0x000C, 0x0012, 0x0006, 0x0014, 0x0015, 0x0008]
    );
    for datagram in [refresh, release, bind] {
        let message = Incoming::decode(&datagram).unwrap();
        assert_eq!(message.integrity(&user, &auth.realm), Integrity::Valid);
    }
}

#[test]
fn attributes_behind_the_signature_are_ignored() {
    let (user, auth) = (credentials("u", "p"), challenge("r", "n"));
    let mut message = Message::<Attribute>::new(
        MessageClass::SuccessResponse,
        ALLOCATE,
        TransactionId::new([1; 12]),
    );
    message.add_attribute(XorRelayAddress::new("192.0.2.1:50000".parse().unwrap()));
    let integrity =
        Mi::new_long_term_credential(&message, &user.username, &auth.realm, "p").unwrap();
    message.add_attribute(integrity);
    message.add_attribute(XorRelayAddress::new("[2001:db8::bad]:1".parse().unwrap()));
    message.add_attribute(Lifetime::from_u32(1));
    let datagram = MessageEncoder::default()
        .encode_into_bytes(message)
        .unwrap();

    let message = Incoming::decode(&datagram).unwrap();
    assert_eq!(message.integrity(&user, &auth.realm), Integrity::Valid);
    assert_eq!(message.relayed(), ["192.0.2.1:50000".parse().unwrap()]);
    assert_eq!(message.lifetime(), None);
}

#[test]
fn credentials_never_show_in_debug_output() {
    let debug = format!("{:?}", credentials("user-name", "pass-word"));
    assert!(!debug.contains("user-name") && !debug.contains("pass-word"));
}

#[test]
fn user_name_that_no_attribute_can_carry_is_refused() {
    assert!(Credentials::new(&"x".repeat(513), &SecretString::from("p")).is_none());
}

#[test]
fn every_truncation_is_refused() {
    let full = bytes(RFC5769_IPV4_RESPONSE);
    for len in 0..full.len() {
        assert!(Incoming::decode(&full[..len]).is_none(), "{len} bytes");
    }
}

/// A well-formed header around whatever attributes.
fn message_around(kind: u16, attributes: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (kind, value) in attributes {
        body.extend_from_slice(&kind.to_be_bytes());
        body.extend_from_slice(&u16::try_from(value.len()).unwrap().to_be_bytes());
        body.extend_from_slice(value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let mut datagram = (kind & 0x3FFF).to_be_bytes().to_vec();
    datagram.extend_from_slice(&u16::try_from(body.len()).unwrap().to_be_bytes());
    datagram.extend_from_slice(&MAGIC_COOKIE);
    datagram.extend_from_slice(&[5; 12]);
    datagram.extend_from_slice(&body);
    datagram
}

/// The values of the attributes of one type.
fn values(datagram: &[u8], wanted: u16) -> Vec<Vec<u8>> {
    let mut values = Vec::new();
    let mut rest = &datagram[20..];
    while !rest.is_empty() {
        let kind = u16::from_be_bytes([rest[0], rest[1]]);
        let len = usize::from(u16::from_be_bytes([rest[2], rest[3]]));
        if kind == wanted {
            values.push(rest[4..4 + len].to_vec());
        }
        rest = &rest[4 + len.next_multiple_of(4)..];
    }
    values
}

#[test]
fn attributes_have_their_values_and_reserved_bytes_are_zero() {
    let id = TransactionId::new([7; 12]);
    let both = encode(Request::Allocate(Families::Both), id, None);
    assert_eq!(
        values(&both, 0x0019),
        [[17, 0, 0, 0]],
        "REQUESTED-TRANSPORT"
    );
    assert_eq!(
        values(&both, 0x8000),
        [[2, 0, 0, 0]],
        "ADDITIONAL-ADDRESS-FAMILY"
    );
    assert!(values(&both, 0x0017).is_empty());
    let v6 = encode(Request::Allocate(Families::V6), id, None);
    assert_eq!(
        values(&v6, 0x0017),
        [[2, 0, 0, 0]],
        "REQUESTED-ADDRESS-FAMILY"
    );
    assert!(values(&v6, 0x8000).is_empty());
    let default = encode(Request::Allocate(Families::Default), id, None);
    assert_eq!(attribute_types(&default), [0x8022, 0x0019]);

    let bind = |peer: &str| {
        let peer = peer.parse().unwrap();
        encode(
            Request::ChannelBind {
                channel: 0x4ABC,
                peer,
            },
            id,
            None,
        )
    };
    let v4 = bind("192.0.2.1:9");
    assert_eq!(values(&v4, 0x000C), [[0x4A, 0xBC, 0, 0]], "CHANNEL-NUMBER");
    let [port0, port1] = (9u16 ^ 0x2112).to_be_bytes();
    assert_eq!(
        values(&v4, 0x0012),
        [[0, 1, port0, port1, 192 ^ 0x21, 0x12, 2 ^ 0xA4, 1 ^ 0x42]],
        "XOR-PEER-ADDRESS"
    );
    let v6 = values(&bind("[2001:db8::1]:9"), 0x0012).remove(0);
    assert_eq!(v6[..4], [0, 2, port0, port1]);
    let mask = [&MAGIC_COOKIE[..], &[7; 12]].concat();
    let address: Vec<u8> = v6[4..].iter().zip(mask).map(|(a, b)| a ^ b).collect();
    let expected: std::net::Ipv6Addr = "2001:db8::1".parse().unwrap();
    assert_eq!(address, expected.octets());
}

#[test]
fn padding_is_zero_and_requests_are_short() {
    // What servers of today send is shorter than this.
    let user = credentials(&"u".repeat(61), "secret");
    let auth = challenge(&"r".repeat(41), &"n".repeat(97));
    for request in [
        Request::Binding,
        Request::Allocate(Families::Both),
        Request::Allocate(Families::Default),
        Request::Allocate(Families::V6),
        Request::Refresh { lifetime: None },
        Request::Refresh { lifetime: Some(0) },
        Request::ChannelBind {
            channel: 0x4001,
            peer: "[2001:db8::1]:9".parse().unwrap(),
        },
    ] {
        let datagram = encode(request, TransactionId::new([9; 12]), Some((&user, &auth)));
        // IPv4 without path MTU discovery (RFC 8489 §6.1).
        assert!(datagram.len() < 548, "{} bytes", datagram.len());
        let mut at = STUN_HEADER_LEN;
        let mut padding = 0;
        while at < datagram.len() {
            let len = usize::from(u16::from_be_bytes([datagram[at + 2], datagram[at + 3]]));
            let (end, next) = (at + 4 + len, at + 4 + len.next_multiple_of(4));
            assert!(datagram[end..next].iter().all(|byte| *byte == 0));
            padding += next - end;
            at = next;
        }
        assert!(padding >= 9, "three odd lengths");
    }
}

#[test]
fn unknown_optional_attributes_and_reserved_bits_are_ignored() {
    let mapped = |first: u8| vec![first, 1, 0x21 ^ 0x12, 0x12 ^ 0x34, 0x21, 0x12, 0xA4, 0x42];
    for first in [0, 0x80, 0xFF] {
        let datagram = message_around(
            0x0101,
            &[
                (0x8001, vec![1]),
                (0xFFFF, vec![]),
                (0x0020, mapped(first)),
                (0x0001, vec![0, 1, 0, 1, 1, 1, 1, 1]),
            ],
        );
        let message = Incoming::decode(&datagram).unwrap();
        assert_eq!(message.verdict(), Verdict::Success);
        assert_eq!(message.mapped(), Some("0.0.0.0:4660".parse().unwrap()));
    }
    for reserved in [[0, 0, 0], [0xFF, 0xFF, 0xF8]] {
        let value = vec![reserved[0], reserved[1], reserved[2] | 4, 86];
        let datagram = message_around(0x0113, &[(0x0009, value)]);
        let message = Incoming::decode(&datagram).unwrap();
        assert_eq!(message.verdict(), Verdict::Error(486));
    }
}

#[test]
fn what_must_be_understood_and_is_not_makes_nonsense_unless_it_comes_too_late() {
    let error = (0x0009, vec![0, 0, 4, 86]);
    for unknown in [0x0002, 0x0013, 0x001A, 0x7FFF] {
        for kind in [0x0103, 0x0113] {
            let datagram = message_around(kind, &[error.clone(), (unknown, vec![1, 2, 3])]);
            let message = Incoming::decode(&datagram).unwrap();
            assert_eq!(message.verdict(), Verdict::Nonsense, "{unknown:#x}");
        }
        let behind = [error.clone(), (0x0008, vec![0; 20]), (unknown, vec![])];
        let message = Incoming::decode(&message_around(0x0113, &behind)).unwrap();
        assert_eq!(message.verdict(), Verdict::Error(486));
    }
    let message = Incoming::decode(&message_around(0x0113, &[])).unwrap();
    assert_eq!(
        message.verdict(),
        Verdict::Nonsense,
        "an error without a code"
    );
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(datagram: Vec<u8>) {
        let _ = Incoming::decode(&datagram);
    }

    #[test]
    fn arbitrary_attributes_never_panic(
        kind: u16,
        attributes in prop::collection::vec(
            (
                prop_oneof![
                    prop::sample::select(vec![
                        0x0001u16, 0x0006, 0x0008, 0x0009, 0x000C, 0x000D, 0x0012, 0x0014, 0x0015,
                        0x0016, 0x0017, 0x0019, 0x0020, 0x8000, 0x8022, 0x8028,
                    ]),
                    any::<u16>(),
                ],
                prop::collection::vec(any::<u8>(), 0..40),
            ),
            0..6,
        ),
    ) {
        let datagram = message_around(kind, &attributes);
        prop_assert!(is_well_formed(&datagram));
        if let Some(message) = Incoming::decode(&datagram) {
            let _ = (message.verdict(), message.relayed(), message.mapped(), message.lifetime());
            let realm = Realm::new("r".to_owned()).unwrap();
            let verdict = message.integrity(&credentials("u", "p"), &realm);
            prop_assert_ne!(verdict, Integrity::Valid);
        }
    }
}
