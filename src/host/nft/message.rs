//! The messages that make up our table (Linux `include/uapi/linux/netfilter/nf_tables.h`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, ExpressionAttribute, Expressions,
    Hook, Immediate, InetHookNumber, ListAttribute, Meta, MetaKey, NfTablesMessage, Operator,
    Payload, Register, RuleAttribute, RuleMessage, TableAttribute, TableMessage, Verdict,
    VerdictAttribute,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};

use crate::host::constants::{
    NFT_FORWARD, NFT_POSTROUTING, NFT_PRIORITY_FILTER, NFT_PRIORITY_SRCNAT, NFT_TABLE, TUNNEL_V4,
    TUNNEL_V6,
};

/// Rules that [`install`] makes.
pub(super) const RULES: usize = 4;

/// Netfilter subsystem number of nf_tables, in the header of a batch.
const NFNL_SUBSYS_NFTABLES: u16 = 10;
/// Where payload offsets count from: the network header.
const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
/// The verdict and chain policy "accept".
const NF_ACCEPT: u32 = 1;
/// The chain policy "drop".
const NF_DROP: u32 = 0;
/// Bytes that an interface name is compared over, including its terminator.
const IFNAMSIZ: usize = 16;
/// `meta nfproto` of IPv4 and IPv6, needed because an `inet` chain sees both.
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;

/// One message of a transaction and what it is for, in words that follow "could not".
pub(super) struct Step {
    pub(super) what: &'static str,
    message: NfTablesMessage,
    flags: u16,
}

/// Messages that replace our table by a new one.
pub(super) fn install(link: &str) -> Vec<Step> {
    let mut steps = remove();
    steps.push(create_table());
    steps.push(chain(
        "add the chain for source NAT",
        NFT_POSTROUTING,
        "nat",
        InetHookNumber::PostRouting,
        NFT_PRIORITY_SRCNAT,
    ));
    steps.push(chain(
        "add the chain for forwarded packets",
        NFT_FORWARD,
        "filter",
        InetHookNumber::Forward,
        NFT_PRIORITY_FILTER,
    ));
    steps.push(rule(
        "masquerade IPv4",
        NFT_POSTROUTING,
        masquerade(IpAddr::V4(TUNNEL_V4.0), TUNNEL_V4.1, link),
    ));
    steps.push(rule(
        "masquerade IPv6",
        NFT_POSTROUTING,
        masquerade(IpAddr::V6(TUNNEL_V6.0), TUNNEL_V6.1, link),
    ));
    for (what, key) in [
        ("accept packets from the device", MetaKey::Iifname),
        ("accept packets to the device", MetaKey::Oifname),
    ] {
        let mut expressions = name_is(key, Operator::Equal, link);
        expressions.push(accept());
        steps.push(rule(what, NFT_FORWARD, expressions));
    }
    steps
}

/// Messages that delete our table. The kernel refuses to delete a table that is not there, so it
/// is made first; as both happen in one transaction nobody sees it.
pub(super) fn remove() -> Vec<Step> {
    let delete = Step {
        what: "delete the old table",
        message: NfTablesMessage::DeleteTable(TableMessage {
            attributes: vec![TableAttribute::Name(NFT_TABLE.to_owned())],
        }),
        flags: 0,
    };
    vec![create_table(), delete]
}

/// A complete transaction: begin, the steps, and `end` if it shall take effect. The kernel checks
/// a transaction without an end and then forgets it. Step number n has sequence number n + 1, and
/// asks for an acknowledgement.
pub(super) fn batch(steps: &[Step], end: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    control(&mut bytes, ControlMessage::BatchBegin, 0);
    for (sequence, step) in (1..).zip(steps) {
        let flags = NLM_F_REQUEST | NLM_F_ACK | step.flags;
        emit(
            &mut bytes,
            NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0),
            step.message.clone().into(),
            flags,
            sequence,
        );
    }
    if end {
        let sequence = u32::try_from(steps.len()).unwrap_or(u32::MAX);
        control(&mut bytes, ControlMessage::BatchEnd, sequence + 1);
    }
    bytes
}

/// Asks for all rules of our table.
pub(super) fn list_rules() -> Vec<u8> {
    let mut bytes = Vec::new();
    emit(
        &mut bytes,
        NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0),
        NfTablesMessage::GetRule(RuleMessage {
            attributes: vec![RuleAttribute::Table(NFT_TABLE.to_owned())],
        })
        .into(),
        NLM_F_REQUEST | NLM_F_DUMP,
        1,
    );
    bytes
}

/// Asks for all chains of all tables.
pub(super) fn list_chains() -> Vec<u8> {
    let mut bytes = Vec::new();
    emit(
        &mut bytes,
        NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0),
        NfTablesMessage::GetChain(ChainMessage {
            attributes: Vec::new(),
        })
        .into(),
        NLM_F_REQUEST | NLM_F_DUMP,
        1,
    );
    bytes
}

/// Family, table and name of a chain whose policy drops forwarded IP packets; `None` for any other
/// message, also for one that cannot be read.
pub(super) fn forward_drop(message: &[u8]) -> Option<String> {
    let message = NetlinkMessage::<NetfilterMessage>::deserialize(message).ok()?;
    let NetlinkPayload::InnerMessage(NetfilterMessage {
        header,
        inner: NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(chain)),
        ..
    }) = message.payload
    else {
        return None;
    };
    let family = match header.family {
        NetfilterProtoFamily::Inet => "inet",
        NetfilterProtoFamily::IPv4 => "ip",
        NetfilterProtoFamily::IPv6 => "ip6",
        _ => return None,
    };
    let (mut table, mut name, mut forwards, mut drops) = (None, None, false, false);
    for attribute in &chain.attributes {
        match attribute {
            ChainAttribute::Table(value) => table = Some(value),
            ChainAttribute::Name(value) => name = Some(value),
            ChainAttribute::Policy(policy) => drops = *policy == NF_DROP,
            ChainAttribute::Hook(hook) => {
                forwards = hook.contains(&Hook::Number(InetHookNumber::Forward.into()));
            }
            _ => {}
        }
    }
    (forwards && drops).then(|| Some(format!("{family} {} {}", table?, name?)))?
}

/// Chain and expressions of a rule.
pub(super) fn describe_rule(message: &[u8]) -> String {
    let message = NetlinkMessage::<NetfilterMessage>::deserialize(message);
    let Ok(NetlinkMessage {
        payload:
            NetlinkPayload::InnerMessage(NetfilterMessage {
                inner: NetfilterMessageInner::NfTables(NfTablesMessage::NewRule(rule)),
                ..
            }),
        ..
    }) = message
    else {
        return "a rule that cannot be read".to_owned();
    };
    let attributes = rule.attributes.iter().filter(|attribute| {
        matches!(
            attribute,
            RuleAttribute::Chain(_) | RuleAttribute::Expressions(_)
        )
    });
    let attributes: Vec<String> = attributes.map(|a| format!("{a:?}")).collect();
    attributes.join(" ")
}

fn control(bytes: &mut Vec<u8>, message: ControlMessage, sequence: u32) {
    emit(
        bytes,
        NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFNL_SUBSYS_NFTABLES),
        message.into(),
        NLM_F_REQUEST,
        sequence,
    );
}

fn emit(
    bytes: &mut Vec<u8>,
    header: NetfilterHeader,
    inner: NetfilterMessageInner,
    flags: u16,
    sequence: u32,
) {
    let mut message = NetlinkMessage::from(NetfilterMessage::new(header, inner));
    message.header.flags = flags;
    message.header.sequence_number = sequence;
    message.finalize();
    let start = bytes.len();
    // Messages in one datagram start at multiples of four; attributes are padded to that already.
    bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut bytes[start..]);
}

fn create_table() -> Step {
    Step {
        what: "add the table",
        message: NfTablesMessage::NewTable(TableMessage {
            attributes: vec![TableAttribute::Name(NFT_TABLE.to_owned())],
        }),
        flags: NLM_F_CREATE,
    }
}

fn chain(what: &'static str, name: &str, kind: &str, hook: InetHookNumber, priority: i32) -> Step {
    Step {
        what,
        message: NfTablesMessage::NewChain(ChainMessage {
            attributes: vec![
                ChainAttribute::Table(NFT_TABLE.to_owned()),
                ChainAttribute::Name(name.to_owned()),
                ChainAttribute::Policy(NF_ACCEPT),
                ChainAttribute::Type(kind.to_owned()),
                ChainAttribute::Hook(vec![
                    Hook::Number(hook.into()),
                    Hook::Priority(priority.cast_unsigned()),
                ]),
            ],
        }),
        flags: NLM_F_CREATE,
    }
}

fn rule(what: &'static str, chain: &str, expressions: Vec<Expressions>) -> Step {
    let expressions: Vec<ListAttribute<ExpressionAttribute>> =
        expressions.into_iter().map(Into::into).collect();
    Step {
        what,
        message: NfTablesMessage::NewRule(RuleMessage {
            attributes: vec![
                RuleAttribute::Table(NFT_TABLE.to_owned()),
                RuleAttribute::Chain(chain.to_owned()),
                RuleAttribute::Expressions(expressions),
            ],
        }),
        flags: NLM_F_CREATE | NLM_F_APPEND,
    }
}

/// `ip saddr <network>/<prefix> oifname != <link> masquerade`, or the same for IPv6.
fn masquerade(network: IpAddr, prefix: u8, link: &str) -> Vec<Expressions> {
    let mut expressions = source_in(network, prefix);
    expressions.extend(name_is(MetaKey::Oifname, Operator::NotEqual, link));
    expressions.push(Expressions::Other {
        expression_type: "masq".to_owned(),
        attributes: Vec::new(),
    });
    expressions
}

/// Matches the source address against a network.
fn source_in(network: IpAddr, prefix: u8) -> Vec<Expressions> {
    // Offsets of the source address: RFC 791 §3.1, RFC 8200 §3.
    let (protocol, offset, length, value, mask) = match network {
        IpAddr::V4(ip) => (
            NFPROTO_IPV4,
            12,
            4,
            ip.octets().to_vec(),
            Ipv4Addr::from_bits(mask_v4(prefix)).octets().to_vec(),
        ),
        IpAddr::V6(ip) => (
            NFPROTO_IPV6,
            8,
            16,
            ip.octets().to_vec(),
            Ipv6Addr::from_bits(mask_v6(prefix)).octets().to_vec(),
        ),
    };
    vec![
        load_meta(MetaKey::Nfproto),
        compare(Operator::Equal, vec![protocol]),
        Expressions::Payload(vec![
            Payload::DestinationRegister(Register::Reg1),
            Payload::Base(NFT_PAYLOAD_NETWORK_HEADER),
            Payload::Offset(offset),
            Payload::Len(length),
        ]),
        Expressions::Bitwise(vec![
            Bitwise::SourceRegister(Register::Reg1),
            Bitwise::DestinationRegister(Register::Reg1),
            Bitwise::Length(length),
            Bitwise::Xor(DataAttribute::Value(vec![0; mask.len()])),
            Bitwise::Mask(DataAttribute::Value(mask)),
        ]),
        compare(Operator::Equal, value),
    ]
}

fn mask_v4(prefix: u8) -> u32 {
    u32::MAX
        .checked_shl(32 - u32::from(prefix.min(32)))
        .unwrap_or(0)
}

fn mask_v6(prefix: u8) -> u128 {
    u128::MAX
        .checked_shl(128 - u32::from(prefix.min(128)))
        .unwrap_or(0)
}

fn name_is(key: MetaKey, operator: Operator, link: &str) -> Vec<Expressions> {
    let mut name = link.as_bytes().to_vec();
    name.resize(IFNAMSIZ, 0);
    vec![load_meta(key), compare(operator, name)]
}

fn load_meta(key: MetaKey) -> Expressions {
    Expressions::Meta(vec![
        Meta::DestinationRegister(Register::Reg1),
        Meta::Key(key),
    ])
}

fn compare(operator: Operator, value: Vec<u8>) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(Register::Reg1),
        Cmp::Op(operator),
        Cmp::Data(DataAttribute::Value(value)),
    ])
}

fn accept() -> Expressions {
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Verdict),
        Immediate::Data(DataAttribute::Verdict(vec![VerdictAttribute::Code(
            Verdict::Other(NF_ACCEPT),
        )])),
    ])
}
