#![allow(clippy::unwrap_used)]

use netlink_packet_core::{NLMSG_ERROR, NetlinkBuffer, NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, ExpressionAttribute, Expressions, ListAttribute, NfTablesMessage,
    RuleAttribute,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use rustix::io::Errno;

use super::socket::{Answer, answers};
use super::*;

fn parse(mut bytes: &[u8]) -> Vec<NetlinkMessage<NetfilterMessage>> {
    let mut messages = Vec::new();
    while !bytes.is_empty() {
        let length = NetlinkBuffer::new_checked(bytes).unwrap().length() as usize;
        messages.push(NetlinkMessage::deserialize(&bytes[..length]).unwrap());
        bytes = &bytes[length.next_multiple_of(4)..];
    }
    messages
}

fn inner(message: &NetlinkMessage<NetfilterMessage>) -> &NetfilterMessage {
    match &message.payload {
        NetlinkPayload::InnerMessage(inner) => inner,
        other => panic!("{other:?}"),
    }
}

fn expressions(message: &NetlinkMessage<NetfilterMessage>) -> Vec<Expressions> {
    let NetfilterMessageInner::NfTables(NfTablesMessage::NewRule(rule)) = &inner(message).inner
    else {
        panic!("not a rule: {message:?}");
    };
    let list = rule
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RuleAttribute::Expressions(list) => Some(list),
            _ => None,
        });
    list.unwrap()
        .iter()
        .map(|element| match element {
            ListAttribute::Element(attributes) => attributes
                .iter()
                .find_map(|attribute| match attribute {
                    ExpressionAttribute::Data(data) => Some(data.clone()),
                    _ => None,
                })
                .unwrap(),
            other => panic!("{other:?}"),
        })
        .collect()
}

fn compared(expressions: &[Expressions]) -> Vec<Vec<u8>> {
    expressions
        .iter()
        .filter_map(|expression| match expression {
            Expressions::Cmp(attributes) => {
                attributes.iter().find_map(|attribute| match attribute {
                    Cmp::Data(DataAttribute::Value(value)) => Some(value.clone()),
                    _ => None,
                })
            }
            _ => None,
        })
        .collect()
}

fn masks(expressions: &[Expressions]) -> Vec<Vec<u8>> {
    expressions
        .iter()
        .filter_map(|expression| match expression {
            Expressions::Bitwise(attributes) => {
                attributes.iter().find_map(|attribute| match attribute {
                    Bitwise::Mask(DataAttribute::Value(value)) => Some(value.clone()),
                    _ => None,
                })
            }
            _ => None,
        })
        .collect()
}

fn is_masquerade(expression: &Expressions) -> bool {
    matches!(expression, Expressions::Other { expression_type, .. } if expression_type == "masq")
}

#[test]
fn installation_is_one_batch_that_replaces_the_table() {
    let messages = parse(&message::batch(&message::install("tun-firezone"), true));

    let kinds: Vec<&'static str> = messages
        .iter()
        .map(|message| match &inner(message).inner {
            NetfilterMessageInner::None(ControlMessage::BatchBegin) => "begin",
            NetfilterMessageInner::None(ControlMessage::BatchEnd) => "end",
            NetfilterMessageInner::NfTables(NfTablesMessage::NewTable(_)) => "new table",
            NetfilterMessageInner::NfTables(NfTablesMessage::DeleteTable(_)) => "delete table",
            NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(_)) => "new chain",
            NetfilterMessageInner::NfTables(NfTablesMessage::NewRule(_)) => "new rule",
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        kinds,
        [
            "begin",
            // Deleting what may not exist needs it to be made first.
            "new table",
            "delete table",
            "new table",
            "new chain",
            "new chain",
            "new rule",
            "new rule",
            "new rule",
            "new rule",
            "end"
        ]
    );
    let rules = kinds.iter().filter(|kind| **kind == "new rule").count();
    assert_eq!(rules, message::RULES);

    let sequences: Vec<u32> = messages
        .iter()
        .map(|message| message.header.sequence_number)
        .collect();
    assert_eq!(sequences, (0..=10).collect::<Vec<_>>());
    for message in &messages[1..10] {
        assert_eq!(inner(message).header.family, NetfilterProtoFamily::Inet);
        // NLM_F_REQUEST and NLM_F_ACK.
        assert_eq!(message.header.flags & 5, 5, "{message:?}");
    }
    // The batch belongs to subsystem nf_tables.
    assert_eq!(inner(&messages[0]).header.res_id, 10);
}

#[test]
fn a_check_is_the_same_batch_without_its_end() {
    let steps = message::install("tun-firezone");
    let whole = message::batch(&steps, true);
    let check = message::batch(&steps, false);
    assert_eq!(whole[..check.len()], check);
    // Header of netlink and of netfilter.
    assert_eq!(whole.len() - check.len(), 16 + 4);
}

#[test]
fn masquerading_matches_exactly_the_tunnel_networks() {
    let messages = parse(&message::batch(&message::install("tun-firezone"), true));
    let name = *b"tun-firezone\0\0\0\0";

    let v4 = expressions(&messages[6]);
    assert_eq!(compared(&v4), [vec![2], vec![100, 64, 0, 0], name.to_vec()]);
    assert_eq!(masks(&v4), [[0xff, 0xe0, 0, 0]]);
    assert!(is_masquerade(v4.last().unwrap()), "{v4:?}");

    let v6 = expressions(&messages[7]);
    let network = [
        0xfd, 0, 0x20, 0x21, 0x11, 0x11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let mut mask = [0xff; 16];
    mask[13..].copy_from_slice(&[0xe0, 0, 0]);
    assert_eq!(compared(&v6), [vec![10], network.to_vec(), name.to_vec()]);
    assert_eq!(masks(&v6), [mask]);
    assert!(is_masquerade(v6.last().unwrap()), "{v6:?}");
}

#[test]
fn names_that_no_interface_can_have_are_refused_before_asking_the_kernel() {
    for name in ["", "sixteen-letters-", "a/b", "a b", "a\0", "..", "a:1"] {
        assert!(
            matches!(install(name), Err(NftError::InvalidLink(n)) if n == name),
            "{name:?}"
        );
    }
}

/// One netlink message as the kernel writes it.
fn kernel_message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let length = u32::try_from(16 + payload.len()).unwrap();
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

#[test]
fn acknowledgements_and_refusals_are_told_apart() {
    let mut bytes = kernel_message(NLMSG_ERROR, 0, 3, &0_i32.to_ne_bytes());
    bytes.extend(kernel_message(NLMSG_ERROR, 0, 4, &(-1_i32).to_ne_bytes()));
    let answers: Vec<Answer<'_>> = answers(&bytes).map(Result::unwrap).collect();
    assert_eq!(
        answers,
        [
            Answer::Status {
                sequence: 3,
                errno: None
            },
            Answer::Status {
                sequence: 4,
                errno: Some(Errno::PERM)
            },
        ]
    );
}

#[test]
fn truncated_answers_are_an_error_not_a_panic() {
    let whole = kernel_message(NLMSG_ERROR, 0, 3, &0_i32.to_ne_bytes());
    for length in 1..whole.len() {
        let last = answers(&whole[..length]).last().unwrap();
        assert!(matches!(last, Err(NftError::Malformed)), "{length}");
    }
    // An error number that the kernel never sends.
    let odd = kernel_message(NLMSG_ERROR, 0, 3, &i32::MIN.to_ne_bytes());
    assert!(matches!(
        answers(&odd).next(),
        Some(Ok(Answer::Status { errno: Some(_), .. }))
    ));
}

#[test]
fn errors_say_what_the_operator_can_do() {
    let error = |errno| NftError::from_errno("masquerade IPv4", errno);
    assert!(matches!(error(Errno::PERM), NftError::NotPermitted));
    assert!(matches!(
        error(Errno::OPNOTSUPP),
        NftError::Unsupported { .. }
    ));
    assert!(matches!(error(Errno::BUSY), NftError::Kernel { .. }));
    assert!(error(Errno::PERM).to_string().contains("CAP_NET_ADMIN"));
    assert!(error(Errno::BUSY).to_string().contains("masquerade IPv4"));
}
