//! Talking to the kernel: one datagram out, answers in, bounded in time.

use std::io;
use std::time::Instant;

use netlink_packet_core::{NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use super::NftError;
use super::message::{self, Step};
use crate::host::constants::NETLINK_TIMEOUT;

/// Message type of a rule in a dump: subsystem nf_tables (10), `NFT_MSG_NEWRULE` (6).
const NEW_RULE: u16 = 10 << 8 | 6;
/// How often an overtaken dump is repeated.
const DUMP_ATTEMPTS: usize = 3;
/// Room for one datagram of the kernel (Linux caps dumps at 32 KiB).
const RECEIVE_BUFFER: usize = 32 * 1024;

/// What shall become of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It takes effect.
    Commit,
    /// It is only checked.
    Discard,
}

/// Sends `steps` as one transaction and waits until every one of them is acknowledged or the first
/// is refused.
pub(super) fn transact(steps: &[Step], outcome: Outcome) -> Result<(), NftError> {
    let mut connection = Connection::open()?;
    connection.send(&message::batch(steps, outcome == Outcome::Commit))?;

    let expected = steps.len();
    let mut answered = 0;
    while answered < expected {
        let received = connection.receive().map_err(|e| match e {
            ReceiveError::TimedOut => NftError::Timeout { answered, expected },
            ReceiveError::Failed(e) => failed("read the kernel's answer", &e),
        })?;
        for answer in answers(received) {
            let Answer::Status { sequence, errno } = answer? else {
                continue;
            };
            match errno {
                None => answered += 1,
                Some(errno) => {
                    // Without the capability the kernel refuses the begin (sequence 0) and says
                    // nothing about the steps.
                    let what = usize::try_from(sequence)
                        .ok()
                        .and_then(|n| steps.get(n.checked_sub(1)?))
                        .map_or("change the rule set", |step| step.what);
                    return Err(NftError::from_errno(what, errno));
                }
            }
        }
    }
    Ok(())
}

/// Counts the rules in our table; none if there is no such table.
pub(super) fn count_rules() -> Result<usize, NftError> {
    let mut rules = 0;
    dump(
        "list the rules",
        &message::list_rules(),
        |event| match event {
            Event::Restart => rules = 0,
            Event::Object { kind, .. } => rules += usize::from(kind == NEW_RULE),
        },
    )?;
    Ok(rules)
}

/// Describes the rules in our table.
pub(super) fn rules() -> Result<Vec<String>, NftError> {
    let mut rules = Vec::new();
    dump(
        "list the rules",
        &message::list_rules(),
        |event| match event {
            Event::Restart => rules.clear(),
            Event::Object { kind, bytes } if kind == NEW_RULE => {
                rules.push(message::describe_rule(bytes));
            }
            Event::Object { .. } => {}
        },
    )?;
    Ok(rules)
}

/// Names of the chains of others whose policy drops forwarded packets.
pub(super) fn forward_drops() -> Result<Vec<String>, NftError> {
    let mut chains = Vec::new();
    dump(
        "list the chains",
        &message::list_chains(),
        |event| match event {
            Event::Restart => chains.clear(),
            Event::Object { bytes, .. } => chains.extend(message::forward_drop(bytes)),
        },
    )?;
    Ok(chains)
}

/// What happens while the kernel lists objects.
enum Event<'a> {
    /// The listing begins, or begins again because changes overtook it.
    Restart,
    /// One object, as a whole message.
    Object { kind: u16, bytes: &'a [u8] },
}

fn dump(
    what: &'static str,
    request: &[u8],
    mut each: impl FnMut(Event<'_>),
) -> Result<(), NftError> {
    for _ in 0..DUMP_ATTEMPTS {
        each(Event::Restart);
        if dump_once(what, request, &mut each)? {
            return Ok(());
        }
    }
    Err(NftError::from_errno(what, Errno::INTR))
}

/// `false` if the rule set changed meanwhile, so that the listing means nothing.
fn dump_once(
    what: &'static str,
    request: &[u8],
    each: &mut impl FnMut(Event<'_>),
) -> Result<bool, NftError> {
    let mut connection = Connection::open()?;
    connection.send(request)?;

    let mut consistent = true;
    loop {
        let received = connection.receive().map_err(|e| match e {
            ReceiveError::TimedOut => NftError::Timeout {
                answered: 0,
                expected: 1,
            },
            ReceiveError::Failed(e) => failed(what, &e),
        })?;
        for answer in answers(received) {
            match answer? {
                Answer::Status { errno: None, .. } => {}
                // Some kernels say so when the table is not there.
                Answer::Status {
                    errno: Some(Errno::NOENT),
                    ..
                } => return Ok(consistent),
                Answer::Status {
                    errno: Some(errno), ..
                } => return Err(NftError::from_errno(what, errno)),
                Answer::Object { kind, flags, bytes } => {
                    consistent &= flags & NLM_F_DUMP_INTR == 0;
                    each(Event::Object { kind, bytes });
                }
                Answer::Done { flags } => {
                    return Ok(consistent && flags & NLM_F_DUMP_INTR == 0);
                }
            }
        }
    }
}

struct Connection {
    socket: Socket,
    buffer: Vec<u8>,
    deadline: Instant,
}

enum ReceiveError {
    TimedOut,
    Failed(io::Error),
}

impl Connection {
    fn open() -> Result<Self, NftError> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_NETFILTER)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            set_socket_timeout(&socket, Timeout::Send, Some(NETLINK_TIMEOUT))?;
            Ok(socket)
        };
        let socket = open().map_err(|e| failed("open a netfilter socket", &e))?;
        Ok(Self {
            socket,
            buffer: Vec::with_capacity(RECEIVE_BUFFER),
            deadline: Instant::now() + NETLINK_TIMEOUT,
        })
    }

    fn send(&self, bytes: &[u8]) -> Result<(), NftError> {
        match self.socket.send(bytes, 0) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            Ok(_) => Err(NftError::Malformed),
            Err(e) => Err(failed("send to the kernel", &e)),
        }
    }

    fn receive(&mut self) -> Result<&[u8], ReceiveError> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ReceiveError::TimedOut);
            }
            set_socket_timeout(&self.socket, Timeout::Recv, Some(left))
                .map_err(|e| ReceiveError::Failed(e.into()))?;
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => return Ok(&self.buffer),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Err(ReceiveError::TimedOut);
                }
                Err(e) => return Err(ReceiveError::Failed(e)),
            }
        }
    }
}

fn failed(step: &'static str, error: &io::Error) -> NftError {
    NftError::from_errno(step, Errno::from_io_error(error).unwrap_or(Errno::IO))
}

/// What one message of the kernel says, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer<'a> {
    /// Acknowledgement (`None`) or refusal of the message with this sequence number.
    Status { sequence: u32, errno: Option<Errno> },
    /// An object of a dump.
    Object {
        kind: u16,
        flags: u16,
        /// The whole message.
        bytes: &'a [u8],
    },
    /// The end of a dump.
    Done { flags: u16 },
}

/// Splits a datagram into its messages.
pub(super) fn answers(mut bytes: &[u8]) -> impl Iterator<Item = Result<Answer<'_>, NftError>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let Ok(message) = NetlinkBuffer::new_checked(bytes) else {
            bytes = &[];
            return Some(Err(NftError::Malformed));
        };
        let length = usize::try_from(message.length()).unwrap_or(usize::MAX);
        let answer = match message.message_type() {
            NLMSG_ERROR => match message.payload().first_chunk() {
                Some(code) => {
                    let code = i32::from_ne_bytes(*code);
                    Ok(Answer::Status {
                        sequence: message.sequence_number(),
                        errno: (code != 0).then(|| crate::host::errno(code.saturating_neg())),
                    })
                }
                None => Err(NftError::Malformed),
            },
            NLMSG_DONE => Ok(Answer::Done {
                flags: message.flags(),
            }),
            kind => Ok(Answer::Object {
                kind,
                flags: message.flags(),
                bytes: &bytes[..length],
            }),
        };
        let next = length.checked_next_multiple_of(4).unwrap_or(usize::MAX);
        bytes = bytes.get(next..).unwrap_or_default();
        Some(answer)
    })
}
