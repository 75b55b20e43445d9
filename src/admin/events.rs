//! What the page shows, as it changes: server-sent events. All streams are told the same, which is
//! put together once a second while anybody listens, of what is published anyway.

use std::{
    cmp::Reverse,
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, stream};
use serde::Serialize;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use super::{
    AdminState, Moment, Report,
    listener::Lifetime,
    model::{ClientStatus, Status},
};
use crate::config::Probe;

/// Streams at a time, at all listeners together.
const STREAMS: usize = 16;
/// Between two events; also what keeps the connection alive.
const PERIOD: Duration = Duration::from_secs(1);
/// A stream ends after this long, and the page asks for another one: who may see it is decided
/// anew, and what was forgotten in some tab gives its place up to others.
const LONGEST: Duration = Duration::from_secs(5 * 60);
/// How long a browser may take to take an event. It gets the latest one then, not all it missed.
const STALL: Duration = Duration::from_secs(5);
/// Clients that are told of: those with most traffic. A browser is no place for thousands of rows.
const CLIENTS: usize = 200;

/// The streams and what they are told. Clones share everything.
#[derive(Debug, Clone)]
pub(super) struct Events {
    places: Arc<Semaphore>,
    /// `None` while nobody listens.
    latest: Arc<Mutex<Option<watch::Sender<Bytes>>>>,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            places: Arc::new(Semaphore::new(STREAMS)),
            latest: Arc::default(),
        }
    }
}

/// One event.
#[derive(Serialize)]
struct Event<'a> {
    /// When it was made, by the gateway's clock (Unix seconds).
    at: f64,
    live: Report,
    started: Report,
    ready: Report,
    /// Clients that `status` leaves out.
    clients_left_out: usize,
    status: &'a Status,
}

impl Events {
    /// A stream of events, or `None` if there are too many already. It must be called on the
    /// runtime that the streams are served from.
    pub(super) fn listen(
        &self,
        state: &AdminState,
        lifetime: Lifetime,
    ) -> Option<impl Stream<Item = Result<Bytes, Infallible>> + use<>> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let listener = Listener {
            events: self.subscribe(state),
            lifetime,
            end: Instant::now() + LONGEST,
            fresh: true,
            _place: place,
        };
        Some(stream::unfold(listener, Listener::next))
    }

    fn subscribe(&self, state: &AdminState) -> watch::Receiver<Bytes> {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(events) = &*latest {
            return events.subscribe();
        }
        let (events, receiver) = watch::channel(event(state));
        *latest = Some(events);
        tokio::spawn(produce(state.clone(), self.clone()));
        receiver
    }

    /// Publishes what is shown now; `false` once nobody listens, or nothing more is to come.
    fn publish(&self, state: &AdminState) -> bool {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(events) = &*latest else {
            return false;
        };
        if events.receiver_count() > 0 {
            events.send_replace(event(state));
            if !state.drain.is_draining() {
                return true;
            }
        }
        // Streams end when the sender is gone, after the last event.
        *latest = None;
        false
    }
}

async fn produce(state: AdminState, events: Events) {
    let mut status = state.status.clone();
    let mut tick = interval(PERIOD);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick.tick().await;
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            // The last event is not to wait: the process may be gone before the next second.
            Ok(_) = status.wait_for(|status| status.draining) => {}
        }
        if !events.publish(&state) {
            return;
        }
    }
}

fn event(state: &AdminState) -> Bytes {
    let now = Moment::now();
    let status = state.status();
    let (status, clients_left_out) = busiest(&status);
    let event = Event {
        at: now.unix,
        live: state.report(Probe::Live, now),
        started: state.report(Probe::Started, now),
        ready: state.report(Probe::Ready, now),
        clients_left_out,
        status: &status,
    };
    // All of it is plain data with text for keys, which always becomes JSON; without line ends.
    let json = serde_json::to_string(&event).unwrap_or_else(|_| "{}".to_owned());
    Bytes::from(format!("event: status\ndata: {json}\n\n"))
}

fn busiest(status: &Arc<Status>) -> (Arc<Status>, usize) {
    let more = status.clients.len().saturating_sub(CLIENTS);
    if more == 0 {
        return (Arc::clone(status), 0);
    }
    let mut shortened = Status::clone(status);
    let traffic = |client: &ClientStatus| client.rx_bytes.saturating_add(client.tx_bytes);
    shortened
        .clients
        .sort_by_key(|client| Reverse(traffic(client)));
    shortened.clients.truncate(CLIENTS);
    (Arc::new(shortened), more)
}

/// The end of a stream at the gateway.
struct Listener {
    events: watch::Receiver<Bytes>,
    lifetime: Lifetime,
    end: Instant,
    fresh: bool,
    _place: OwnedSemaphorePermit,
}

impl Listener {
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        // Asked for the next event only once there is room for it.
        self.lifetime.extend(STALL);
        if std::mem::take(&mut self.fresh) {
            // How long a browser waits before it asks for another stream, in milliseconds.
            let first = self.events.borrow_and_update().clone();
            let first = [&b"retry: 2000\n\n"[..], &first].concat();
            return Some((Ok(first.into()), self));
        }
        tokio::select! {
            changed = self.events.changed() => changed.ok()?,
            () = sleep_until(self.end) => return None,
        }
        let event = self.events.borrow_and_update().clone();
        self.lifetime.extend(STALL);
        Some((Ok(event), self))
    }
}
