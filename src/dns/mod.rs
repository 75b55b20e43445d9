//! Names: what DNS resources resolve to, and the DNS service that clients reach on the gateway's
//! tunnel addresses (data-path spec §6.3, §6.7).
//!
//! All of it runs on a thread of its own: however slow the site's name servers are, and however
//! much clients ask, neither the slow path nor the workers wait for it.

mod forwarder;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod message;
mod resolver;
#[cfg(test)]
mod test_server;
mod upstreams;
mod watched;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::access::{Resolved, ranges};
use forwarder::Forwarder;
pub use forwarder::{Forwarded, ForwarderCounters};
use resolver::Resolver;
pub use resolver::Settings;

/// The answer to [`Service::resolve`].
#[derive(Debug)]
pub struct Answer {
    /// As it was asked for.
    pub name: String,
    /// What it resolves to.
    pub resolved: Resolved,
}

enum Request {
    Resolve(String),
    Listen(Vec<SocketAddr>),
}

/// The way to the thread that looks after names.
#[derive(Debug)]
pub struct Service {
    requests: mpsc::UnboundedSender<Request>,
    counters: Arc<ForwarderCounters>,
}

impl Service {
    /// Starts the thread. Answers come out of the receiver, one for each question, in any order.
    ///
    /// # Errors
    /// When the kernel gives no thread or no epoll instance.
    pub fn start(settings: Settings) -> io::Result<(Self, mpsc::UnboundedReceiver<Answer>)> {
        let (requests, mut incoming) = mpsc::unbounded_channel();
        let (answers, outgoing) = mpsc::unbounded_channel();
        let counters = Arc::new(ForwarderCounters::default());
        let counted = Arc::clone(&counters);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name("dns".to_owned())
            .spawn(move || {
                runtime.block_on(async move {
                    let settings = Arc::new(settings);
                    let resolver = Arc::new(Resolver::new(Arc::clone(&settings)));
                    let mut forwarder: Option<Forwarder> = None;
                    // Ends with the gateway: the sender is dropped then.
                    while let Some(request) = incoming.recv().await {
                        match request {
                            Request::Resolve(name) => {
                                let (resolver, answers) = (Arc::clone(&resolver), answers.clone());
                                tokio::spawn(async move {
                                    let resolved = resolver.resolve(&name).await;
                                    // Nobody waits for it any more when the gateway is ending.
                                    let _ = answers.send(Answer { name, resolved });
                                });
                            }
                            Request::Listen(addresses) => {
                                // The former one lets go of its sockets first.
                                drop(forwarder.take());
                                forwarder = Some(Forwarder::start(
                                    addresses,
                                    Arc::clone(&settings),
                                    Arc::clone(&counted),
                                    ranges::is_tunnel,
                                ));
                            }
                        }
                    }
                });
            })?;
        Ok((Self { requests, counters }, outgoing))
    }

    /// Asks for the addresses of a name.
    pub fn resolve(&self, name: String) {
        // The thread ends with us alone; after a panic in it, questions stay unanswered and clients
        // are told nothing, which they take for a lost packet.
        let _ = self.requests.send(Request::Resolve(name));
    }

    /// Answers DNS queries at these addresses, and no longer at earlier ones. An address that is
    /// not there yet is tried again until it is.
    pub fn listen(&self, addresses: impl IntoIterator<Item = IpAddr>, port: u16) {
        let addresses = addresses
            .into_iter()
            .map(|address| SocketAddr::new(address, port))
            .collect();
        let _ = self.requests.send(Request::Listen(addresses));
    }

    /// What became of the queries that came in.
    pub fn forwarded(&self) -> Forwarded {
        self.counters.read()
    }
}
