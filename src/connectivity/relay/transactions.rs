//! Requests in flight: retransmission and matching of answers (RFC 8489 §6.2.1).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use stun_codec::TransactionId;
use stun_codec::rfc5389::attributes::Realm;

use super::RelayError;
use super::constants::{RETRANSMIT_FACTOR, RETRANSMIT_FIRST, RETRANSMIT_GIVE_UP};

/// A request that waits for its answer.
///
/// Retransmissions are the same bytes under the same transaction id, so that the answer to an
/// earlier copy counts however late it comes.
#[derive(Debug)]
pub(super) struct Transaction<P> {
    pub(super) purpose: P,
    pub(super) dst: SocketAddr,
    pub(super) first_sent: Instant,
    /// How often this request was already challenged for another nonce.
    pub(super) challenged: u8,
    /// The realm whose key the request was signed with, if it carried MESSAGE-INTEGRITY. The answer
    /// is signed with the same one, whatever other answers have said since.
    pub(super) realm: Option<Realm>,
    /// What an answer said that could not be trusted; explains a later time-out.
    pub(super) distrusted: Option<RelayError>,
    bytes: Vec<u8>,
    retransmit: bool,
    deadline: Instant,
    interval: Duration,
}

/// What became due.
pub(super) enum Due<P> {
    /// Send these bytes again.
    Retransmit { dst: SocketAddr, bytes: Vec<u8> },
    /// No answer in time.
    TimedOut(Transaction<P>),
}

#[derive(Debug)]
pub(super) struct Transactions<P> {
    by_id: BTreeMap<TransactionId, Transaction<P>>,
    deadlines: BTreeSet<(Instant, TransactionId)>,
}

impl<P> Default for Transactions<P> {
    fn default() -> Self {
        Self {
            by_id: BTreeMap::new(),
            deadlines: BTreeSet::new(),
        }
    }
}

/// Parameters of a new transaction.
pub(super) struct Outgoing<P> {
    pub(super) purpose: P,
    pub(super) dst: SocketAddr,
    pub(super) bytes: Vec<u8>,
    pub(super) realm: Option<Realm>,
    pub(super) challenged: u8,
    pub(super) retransmit: bool,
}

impl<P> Transaction<P> {
    /// Whether the request carried MESSAGE-INTEGRITY.
    pub(super) fn is_signed(&self) -> bool {
        self.realm.is_some()
    }
}

impl<P: Copy> Transactions<P> {
    pub(super) fn insert(&mut self, now: Instant, id: TransactionId, outgoing: Outgoing<P>) {
        let deadline = now + RETRANSMIT_FIRST;
        self.deadlines.insert((deadline, id));
        let transaction = Transaction {
            purpose: outgoing.purpose,
            dst: outgoing.dst,
            first_sent: now,
            challenged: outgoing.challenged,
            realm: outgoing.realm,
            distrusted: None,
            bytes: outgoing.bytes,
            retransmit: outgoing.retransmit,
            deadline,
            interval: RETRANSMIT_FIRST,
        };
        self.by_id.insert(id, transaction);
    }

    pub(super) fn get_mut(&mut self, id: TransactionId) -> Option<&mut Transaction<P>> {
        self.by_id.get_mut(&id)
    }

    pub(super) fn remove(&mut self, id: TransactionId) -> Option<Transaction<P>> {
        let transaction = self.by_id.remove(&id)?;
        self.deadlines.remove(&(transaction.deadline, id));
        Some(transaction)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Transaction<P>> {
        self.by_id.values()
    }

    pub(super) fn clear(&mut self) {
        self.by_id.clear();
        self.deadlines.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Takes one transaction whose deadline has come; call until `None`.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<Due<P>> {
        let &(at, id) = self.deadlines.first().filter(|(at, _)| *at <= now)?;
        self.deadlines.remove(&(at, id));
        let transaction = self.by_id.get_mut(&id)?;
        // The clock may have jumped over several deadlines; one copy is enough for all of them.
        let mut deadline = at;
        let mut interval = transaction.interval;
        let give_up = transaction.first_sent + RETRANSMIT_GIVE_UP;
        while deadline <= now && deadline <= give_up {
            interval = interval.mul_f64(RETRANSMIT_FACTOR);
            deadline += interval;
        }
        if !transaction.retransmit || deadline <= now {
            return self.by_id.remove(&id).map(Due::TimedOut);
        }
        transaction.interval = interval;
        transaction.deadline = deadline;
        self.deadlines.insert((deadline, id));
        Some(Due::Retransmit {
            dst: transaction.dst,
            bytes: transaction.bytes.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn one(now: Instant, retransmit: bool) -> Transactions<()> {
        let mut transactions = Transactions::default();
        let outgoing = Outgoing {
            purpose: (),
            dst: "192.0.2.1:3478".parse().unwrap(),
            bytes: vec![1, 2, 3],
            realm: None,
            challenged: 0,
            retransmit,
        };
        transactions.insert(now, TransactionId::new([1; 12]), outgoing);
        transactions
    }

    #[test]
    fn four_copies_in_five_seconds_and_failure_after_eight() {
        let start = Instant::now();
        let mut transactions = one(start, true);
        let mut sent = vec![0.0];
        loop {
            let at = transactions.next_deadline().unwrap();
            let elapsed = (at - start).as_secs_f64();
            match transactions.pop_due(at).unwrap() {
                Due::Retransmit { bytes, .. } => {
                    assert_eq!(bytes, [1, 2, 3]);
                    sent.push(elapsed);
                }
                Due::TimedOut(_) => {
                    assert_eq!(sent, [0.0, 1.0, 2.5, 4.75]);
                    assert!((8.0..8.2).contains(&elapsed), "{elapsed}");
                    break;
                }
            }
        }
        assert_eq!(transactions.next_deadline(), None);
        assert!(transactions.is_empty());
    }

    #[test]
    fn nothing_is_due_before_its_time() {
        let start = Instant::now();
        let mut transactions = one(start, true);
        assert!(
            transactions
                .pop_due(start + Duration::from_millis(999))
                .is_none()
        );
    }

    #[test]
    fn clock_that_jumped_costs_one_copy_or_the_request() {
        let start = Instant::now();
        let mut transactions = one(start, true);
        let late = start + Duration::from_secs(3);
        assert!(matches!(
            transactions.pop_due(late),
            Some(Due::Retransmit { .. })
        ));
        assert!(transactions.pop_due(late).is_none());

        let mut transactions = one(start, true);
        let very_late = start + Duration::from_secs(60);
        assert!(matches!(
            transactions.pop_due(very_late),
            Some(Due::TimedOut(_))
        ));
    }

    #[test]
    fn single_shot_is_not_repeated() {
        let start = Instant::now();
        let mut transactions = one(start, false);
        let at = transactions.next_deadline().unwrap();
        assert!(matches!(transactions.pop_due(at), Some(Due::TimedOut(_))));
    }

    #[test]
    fn answered_request_leaves_no_deadline() {
        let start = Instant::now();
        let mut transactions = one(start, true);
        assert!(transactions.remove(TransactionId::new([2; 12])).is_none());
        assert!(transactions.remove(TransactionId::new([1; 12])).is_some());
        assert_eq!(transactions.next_deadline(), None);
    }
}
