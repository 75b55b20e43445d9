//! As much of DNS messages as a forwarder must understand (RFC 1035 §4.1): everything else passes
//! through untouched, so that record types and extensions of the future do, too.

/// Length of the header in bytes.
pub const HEADER_LEN: usize = 12;
/// Longest message over TCP in bytes.
pub const MAX_MESSAGE: usize = u16::MAX as usize;
/// Longest name in bytes, its labels' length bytes included (RFC 1035 §2.3.4).
const MAX_NAME: usize = 255;

/// Bits of the second header word.
const RESPONSE: u16 = 1 << 15;
const OPCODE: u16 = 0xF << 11;
const TRUNCATED: u16 = 1 << 9;
const RECURSION_DESIRED: u16 = 1 << 8;
const RECURSION_AVAILABLE: u16 = 1 << 7;
const CHECKING_DISABLED: u16 = 1 << 4;
const RCODE: u16 = 0xF;

/// The RCODE of RFC 1035 §4.1.1 that says "I could not find out".
const SERVFAIL: u16 = 2;

/// A query that may be forwarded: one question, as everybody sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query<'a> {
    message: &'a [u8],
    /// Where the question ends.
    question_end: usize,
}

impl<'a> Query<'a> {
    /// Reads a message; `None` if it is no standard query with exactly one question. Such a message
    /// gets no answer, as it may be one itself.
    pub fn parse(message: &'a [u8]) -> Option<Self> {
        if message.len() > MAX_MESSAGE {
            return None;
        }
        let flags = word(message, 2)?;
        if flags & (RESPONSE | OPCODE) != 0 {
            return None;
        }
        let question_end = question_end(message)?;
        Some(Self {
            message,
            question_end,
        })
    }

    /// The number by which the asker knows the answer.
    pub fn id(&self) -> u16 {
        // Parsed, so there is a header.
        word(self.message, 0).unwrap_or_default()
    }

    /// The query with another number.
    pub fn with_id(&self, id: u16) -> Vec<u8> {
        let mut message = self.message.to_vec();
        set_id(&mut message, id);
        message
    }

    /// Whether `response` answers the query when that was sent with this number: same number and
    /// the same question, letter by letter, so that a guess from outside has more to guess.
    pub fn is_answered_by(&self, response: &[u8], id: u16) -> bool {
        word(response, 0) == Some(id)
            && word(response, 2).is_some_and(|flags| flags & RESPONSE != 0)
            && question_end(response) == Some(self.question_end)
            && response[HEADER_LEN..self.question_end]
                == self.message[HEADER_LEN..self.question_end]
    }

    /// "I could not find out."
    pub fn failure(&self) -> Vec<u8> {
        let kept = self.flags() & (RECURSION_DESIRED | CHECKING_DISABLED);
        self.bare(kept | RESPONSE | RECURSION_AVAILABLE | SERVFAIL)
    }

    /// "The answer is longer than this way allows; ask by TCP."
    pub fn truncated(&self, response: &[u8]) -> Vec<u8> {
        let flags = word(response, 2).unwrap_or(RESPONSE);
        self.bare(flags | RESPONSE | TRUNCATED)
    }

    fn flags(&self) -> u16 {
        word(self.message, 2).unwrap_or_default()
    }

    /// A response with the question and nothing else.
    fn bare(&self, flags: u16) -> Vec<u8> {
        let mut message = self.message[..self.question_end].to_vec();
        message[2..4].copy_from_slice(&flags.to_be_bytes());
        // One question, no records.
        message[4..HEADER_LEN].copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
        message
    }
}

/// Gives a message another number.
pub fn set_id(message: &mut [u8], id: u16) {
    if let Some(place) = message.first_chunk_mut::<2>() {
        *place = id.to_be_bytes();
    }
}

/// Whether a response says that the server could not or would not find out, so that another one
/// may be asked: SERVFAIL, NOTIMP or REFUSED.
pub fn is_refusal(response: &[u8]) -> bool {
    word(response, 2).is_some_and(|flags| matches!(flags & RCODE, SERVFAIL | 4 | 5))
}

/// A query for the name servers of the root: small, cached everywhere, and of no interest to
/// anybody. To measure how fast a server answers.
pub fn root_query(id: u16) -> Vec<u8> {
    const TYPE_NS: u8 = 2;
    const CLASS_IN: u8 = 1;

    let mut message = vec![0; HEADER_LEN];
    set_id(&mut message, id);
    message[2..4].copy_from_slice(&RECURSION_DESIRED.to_be_bytes());
    message[5] = 1;
    message.extend_from_slice(&[0, 0, TYPE_NS, 0, CLASS_IN]);
    message
}

fn word(message: &[u8], at: usize) -> Option<u16> {
    let bytes = message.get(at..at + 2)?;
    Some(u16::from_be_bytes([bytes[0], bytes[1]]))
}

/// Where the one question of a message ends.
fn question_end(message: &[u8]) -> Option<usize> {
    if word(message, 4)? != 1 {
        return None;
    }
    let mut at = HEADER_LEN;
    loop {
        let len = usize::from(*message.get(at)?);
        // Compression has nothing to point at yet, and the other two kinds were never used.
        if len > 63 || at - HEADER_LEN + len + 1 > MAX_NAME {
            return None;
        }
        at += len + 1;
        if len == 0 {
            break;
        }
    }
    let end = at + 4;
    (message.len() >= end && message.len() >= HEADER_LEN).then_some(end)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use hickory_resolver::proto::op::ResponseCode;
    use hickory_resolver::proto::op::{Message, MessageType, OpCode, Query as Question};
    use hickory_resolver::proto::rr::{Name, RecordType};
    use proptest::prelude::*;

    use super::*;

    fn query(name: &str, id: u16) -> Vec<u8> {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        let name = Name::from_ascii(name).unwrap();
        message.add_query(Question::query(name, RecordType::SRV));
        message.to_vec().unwrap()
    }

    fn response(query: &[u8]) -> Vec<u8> {
        let mut response = query.to_vec();
        response[2] |= 0x80;
        response
    }

    #[test]
    fn a_query_is_recognized_by_its_answer_with_number_and_question() {
        let message = query("_ldap._tcp.corp.example.", 7);
        let query = Query::parse(&message).unwrap();
        assert_eq!(query.id(), 7);
        let sent = query.with_id(99);
        assert!(query.is_answered_by(&response(&sent), 99));
        assert!(!query.is_answered_by(&response(&sent), 98), "number");
        assert!(!query.is_answered_by(&sent, 99), "a query");
        let other = super::tests::query("_ldap._tcp.corp.examplf.", 99);
        assert!(!query.is_answered_by(&response(&other), 99), "question");
        let shorter = super::tests::query("corp.example.", 99);
        assert!(!query.is_answered_by(&response(&shorter), 99));
        assert!(!query.is_answered_by(&[], 99));
    }

    #[test]
    fn failures_and_cut_answers_are_readable_by_others() {
        let message = query("corp.example.", 7);
        let asked = Query::parse(&message).unwrap();
        let failure = Message::from_vec(&asked.failure()).unwrap();
        assert_eq!(failure.metadata.response_code, ResponseCode::ServFail);
        assert_eq!(failure.metadata.id, 7);
        assert_eq!(failure.metadata.message_type, MessageType::Response);
        assert!(failure.metadata.recursion_desired);
        assert_eq!(failure.queries.len(), 1);
        assert!(is_refusal(&asked.failure()));

        let cut = asked.truncated(&response(&message));
        let read = Message::from_vec(&cut).unwrap();
        assert!(read.metadata.truncation && read.answers.is_empty());
        assert_eq!(read.metadata.response_code, ResponseCode::NoError);
        assert!(!is_refusal(&cut));
    }

    #[test]
    fn only_standard_queries_with_one_question_are_taken() {
        let good = query("corp.example.", 7);
        assert!(Query::parse(&good).is_some());
        let change = |at: usize, value: u8| {
            let mut message = good.clone();
            message[at] = value;
            message
        };
        for (name, message) in [
            ("response", change(2, 0x81)),
            ("notify", change(2, 0x20)),
            ("no question", change(5, 0)),
            ("two questions", change(5, 2)),
            ("compressed name", change(HEADER_LEN, 0xC0)),
        ] {
            assert_eq!(Query::parse(&message), None, "{name}");
        }
        for len in 0..good.len() {
            assert_eq!(Query::parse(&good[..len]), None, "cut to {len}");
        }
    }

    #[test]
    fn names_end_at_255_bytes() {
        // Four labels of 62 bytes with their length, one of what is left, and the root's one.
        let of_length = |bytes: usize| {
            let mut name = [&[61][..], &[b'a'; 61]].concat().repeat(4);
            let left = bytes - name.len() - 2;
            name.push(left as u8);
            name.resize(name.len() + left, b'a');
            name.push(0);
            assert_eq!(name.len(), bytes);
            let mut message = root_query(1);
            message.splice(HEADER_LEN..HEADER_LEN + 1, name);
            message
        };
        let longest = of_length(255);
        assert!(Query::parse(&longest).is_some());
        Message::from_vec(&longest).unwrap();
        assert_eq!(Query::parse(&of_length(256)), None);
    }

    #[test]
    fn the_root_query_is_one() {
        let message = root_query(5);
        assert_eq!(Query::parse(&message).unwrap().id(), 5);
        let read = Message::from_vec(&message).unwrap();
        assert_eq!(read.queries[0].query_type(), RecordType::NS);
        assert!(read.queries[0].name().is_root());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..80), other in prop::collection::vec(any::<u8>(), 0..80)) {
            is_refusal(&bytes);
            if let Some(query) = Query::parse(&bytes) {
                query.failure();
                query.truncated(&other);
                query.is_answered_by(&other, 1);
                let sent = response(&query.with_id(3));
                prop_assert!(query.is_answered_by(&sent, 3));
            }
        }
    }
}
