//! Entry point of the fuzz target in `fuzz/`. The committed corpus goes through it as a test.

#![allow(missing_docs)]

use super::message::{self, HEADER_LEN, Query};
use crate::fuzzing::Script;

/// A DNS query of a client, and what a name server says to it.
pub fn dns_message(data: &[u8]) {
    let mut script = Script::new(data);
    let (query, id) = (script.bytes(), script.u16());
    let response = script.bytes();
    message::is_refusal(response);
    let Some(query) = Query::parse(query) else {
        return;
    };
    let sent = query.with_id(id);
    let read = Query::parse(&sent).expect("the same with another number");
    assert_eq!(read.id(), id);
    assert!(!query.is_answered_by(&sent, id), "a question is no answer");
    for own in [query.failure(), query.truncated(response)] {
        assert!(own.len() >= HEADER_LEN && own.len() <= sent.len());
        assert!(query.is_answered_by(&own, query.id()));
        assert_eq!(Query::parse(&own), None, "an answer is no question");
    }
    assert!(message::is_refusal(&query.failure()));
    assert_ne!(
        query.truncated(response)[2] & 2,
        0,
        "it says that it is cut"
    );
    if query.is_answered_by(response, id) {
        let mut passed_on = response.to_vec();
        message::set_id(&mut passed_on, query.id());
        assert!(query.is_answered_by(&passed_on, query.id()));
    }
}

#[cfg(test)]
mod tests {
    use crate::fuzzing::corpus;

    #[test]
    fn corpus_of_dns_messages() {
        corpus("dns_message", 64, super::dns_message);
    }
}
