//! Runs a [`Channel`] on tokio: owns the attempt or the socket, the clock and the spans.
//!
//! Everything happens inside [`Driver::next`], on the caller's task; nothing moves while nobody
//! waits there.

mod link;
mod trace;

#[cfg(test)]
mod tests;

use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::trace::SpanContext;
use rustls::ClientConfig;
use secrecy::{ExposeSecret, SecretString};
use tokio::time::{sleep_until, timeout};
use tracing::Instrument;
use url::Url;

use self::link::{Link, LinkInput, linger};
use self::trace::Trace;
use super::channel::{
    Action, CLOSE_NORMAL, Channel, ChannelConfig, CloseCause, Counters, Event, Milestone, NotJoined,
};
use super::clock::PortalClock;
use super::dial::{DialRequest, Socket, dial, tls_config};
use super::error::Failure;
use super::history::History;
use super::login::{LoginError, LoginUrl, Protocol, external_id};
use super::messages::Egress;
use crate::admin::model::PortalStatus;
use crate::telemetry::durations::{Durations, Timing};
use crate::telemetry::outage::{Clients, Effect};

/// Longest time that an orderly end may take.
pub const SHUTDOWN_LIMIT: Duration = Duration::from_millis(500);

/// How to reach the portal and who we are there.
#[derive(Debug, Clone)]
pub struct PortalConfig {
    /// Base URL.
    pub api_url: Url,
    /// Token of the gateway or its site.
    pub token: SecretString,
    /// The configured id; see [`external_id`] for what is made of it.
    pub external_id_source: String,
    /// Name for display.
    pub name: String,
    /// WireGuard public key.
    pub public_key: [u8; 32],
    /// Budget of one outage; `None` tries for ever.
    pub max_partition_time: Option<Duration>,
    /// See [`super::login::user_agent`].
    pub user_agent: String,
    /// End instead of waiting when the token is refused.
    pub exit_on_auth_failure: bool,
}

type Dialling = Pin<Box<dyn Future<Output = Result<Socket, Failure>> + Send>>;

/// See the module documentation.
pub struct Driver {
    channel: Channel,
    login_v1: LoginUrl,
    login_v2: LoginUrl,
    token: SecretString,
    user_agent: String,
    tls: Arc<ClientConfig>,
    dialling: Option<Dialling>,
    link: Option<Link>,
    trace: Trace,
    history: History,
    durations: Durations,
    clock: PortalClock,
    /// When the present attempt began.
    attempt_since: Option<Instant>,
}

enum Input {
    Dialled(Box<Result<Socket, Failure>>),
    Link(LinkInput),
    Timeout,
}

impl Driver {
    /// Starts connecting with the first call of [`Self::next`].
    ///
    /// # Errors
    ///
    /// When the URL cannot be dialled at all.
    pub fn new(config: PortalConfig) -> Result<Self, LoginError> {
        Self::with_tls(config, tls_config())
    }

    /// Like [`Self::new`], with TLS settings of the caller's.
    ///
    /// # Errors
    ///
    /// When the URL cannot be dialled at all.
    pub fn with_tls(config: PortalConfig, tls: Arc<ClientConfig>) -> Result<Self, LoginError> {
        let login = |protocol| {
            LoginUrl::new(
                &config.api_url,
                &external_id(&config.external_id_source),
                &config.name,
                &config.public_key,
                protocol,
            )
        };
        let (login_v1, login_v2) = (login(Protocol::V1)?, login(Protocol::V2)?);
        let channel_config = ChannelConfig {
            url_v1: login_v1.display(),
            url_v2: login_v2.display(),
            max_partition_time: config.max_partition_time,
            exit_on_auth_failure: config.exit_on_auth_failure,
        };
        let mut channel = Channel::new(channel_config, rand::random());
        channel.start(now());
        Ok(Self {
            channel,
            trace: Trace::new(&login_v2),
            history: History::default(),
            durations: Durations::default(),
            clock: PortalClock::default(),
            attempt_since: None,
            login_v1,
            login_v2,
            token: config.token,
            user_agent: config.user_agent,
            tls,
            dialling: None,
            link: None,
        })
    }

    /// The next event. Cancel-safe: whatever was under way continues with the next call. After
    /// [`Event::GaveUp`] and after [`Self::shutdown`] it waits for ever.
    pub async fn next(&mut self) -> Event {
        loop {
            self.settle();
            if let Some(event) = self.channel.poll_event() {
                return event;
            }
            let input = self.wait().await;
            self.feed(input);
        }
    }

    /// Sends a message with the next call of [`Self::next`].
    ///
    /// # Errors
    ///
    /// While not joined; the message comes back. See [`Channel::send`].
    pub fn send(&mut self, message: Egress) -> Result<(), NotJoined> {
        self.channel.send(now(), message)
    }

    /// The token was read again. Another one is used at once unless the channel is joined, and
    /// then from the next connection on.
    pub fn token_read(&mut self, token: SecretString) {
        if token.expose_secret() != self.token.expose_secret() {
            self.token = token;
            self.channel.token_changed(now());
        }
    }

    /// Somebody asks for an attempt without waiting.
    pub fn retry_now(&mut self) {
        self.channel.retry_now(now());
    }

    /// Addresses or routes of the host changed.
    pub fn network_changed(&mut self) {
        self.channel.network_changed(now());
    }

    /// Sends what is still to be sent and closes the socket in order, within [`SHUTDOWN_LIMIT`].
    pub async fn shutdown(&mut self) {
        self.settle();
        let link = self.link.take();
        self.channel.close(now());
        self.settle();
        if let Some(link) = link
            && timeout(SHUTDOWN_LIMIT, link.finish(CLOSE_NORMAL))
                .await
                .is_err()
        {
            tracing::debug!("the portal did not answer the Close frame in time");
        }
    }

    /// For the status document.
    pub fn status(&self) -> PortalStatus {
        let (now, wall) = (now(), SystemTime::now());
        PortalStatus {
            outages: self.history.status(now, wall),
            recent_attempts: self.history.attempts(now, wall),
            clock_ahead: self.clock.ahead(now, wall),
            ..self.channel.status(now, wall)
        }
    }

    /// For metrics.
    pub fn counters(&self) -> &Counters {
        self.channel.counters()
    }

    /// Whether messages can be sent.
    pub fn is_joined(&self) -> bool {
        self.channel.is_joined()
    }

    /// The span of the outage that is on, for what happens meanwhile to link to.
    pub fn outage(&self) -> Option<SpanContext> {
        self.trace.outage()
    }

    /// Tells who was served when the outage that is on began.
    pub fn outage_met(&mut self, clients: Clients) {
        self.trace.met(clients);
    }

    /// Tells what happened during the outage that is on, if one is.
    pub fn outage_affected(&mut self, effect: Effect, span: SpanContext) {
        self.trace.affected(effect, span);
    }

    /// From now on, durations of attempts and outages are told.
    pub fn tell(&mut self, durations: Durations) {
        self.durations = durations;
    }

    fn time(&mut self, milestone: &Milestone) {
        let error = match milestone {
            Milestone::AttemptSucceeded => None,
            Milestone::AttemptFailed(failure) => Some(failure.kind.as_str()),
            Milestone::OutageEnded(outage) => {
                self.durations.note(Timing::PortalOutage {
                    took: outage.until - outage.since,
                    outcome: outage.outcome.as_str(),
                });
                return;
            }
            Milestone::JoinStarted | Milestone::Failed(_) | Milestone::AttemptAbandoned => return,
        };
        if let Some(since) = self.attempt_since.take() {
            let took = now() - since;
            self.durations.note(Timing::PortalConnect { took, error });
        }
    }

    /// Carries out what the channel decided.
    fn settle(&mut self) {
        while let Some(milestone) = self.channel.poll_milestone() {
            match &milestone {
                Milestone::OutageEnded(outage) => self.history.note(*outage),
                Milestone::AttemptSucceeded => self.history.note_attempt(now(), None),
                Milestone::AttemptFailed(failure) => {
                    self.history.note_attempt(now(), Some(failure.kind));
                }
                _ => {}
            }
            self.time(&milestone);
            self.trace.record(milestone, now());
        }
        while let Some(action) = self.channel.poll_action() {
            match action {
                Action::Dial(attempt) => {
                    let login = match attempt.protocol {
                        Protocol::V1 => &self.login_v1,
                        Protocol::V2 => &self.login_v2,
                    };
                    let request = DialRequest {
                        login: login.clone(),
                        token: self.token.clone(),
                        user_agent: self.user_agent.clone(),
                        tls: Arc::clone(&self.tls),
                        clock: self.clock.clone(),
                    };
                    self.attempt_since = Some(now());
                    let span = self.trace.attempt(&attempt);
                    self.dialling = Some(Box::pin(dial(request).instrument(span)));
                }
                Action::SendText { text, reference } => {
                    if let Some(link) = &mut self.link {
                        link.send(text, reference, now());
                    }
                }
                Action::Disconnect => {
                    self.dialling = None;
                    self.link = None;
                }
                Action::Close { code } => {
                    self.dialling = None;
                    if let Some(link) = self.link.take() {
                        linger(link.into_socket(), Some(code));
                    }
                }
            }
        }
    }

    async fn wait(&mut self) -> Input {
        let channel_timeout = self.channel.poll_timeout().map(|(at, _)| at);
        let stalled = self.link.as_ref().and_then(Link::stalls_at);
        let timer = async {
            match [channel_timeout, stalled].into_iter().flatten().min() {
                Some(at) => sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(timer);
        std::future::poll_fn(|cx| {
            if let Some(dialling) = &mut self.dialling
                && let Poll::Ready(result) = dialling.as_mut().poll(cx)
            {
                return Poll::Ready(Input::Dialled(Box::new(result)));
            }
            if let Some(link) = &mut self.link
                && let Poll::Ready(input) = link.poll(cx)
            {
                return Poll::Ready(Input::Link(input));
            }
            timer.as_mut().poll(cx).map(|()| Input::Timeout)
        })
        .await
    }

    fn feed(&mut self, input: Input) {
        let now = now();
        // What is logged about an attempt has the ids of its span; its attributes would only make
        // lines long.
        let _ids = self.trace.current().attach();
        match input {
            Input::Dialled(result) => {
                self.dialling = None;
                match *result {
                    Ok(socket) => {
                        self.link = Some(Link::new(socket));
                        self.channel.socket_opened(now);
                    }
                    Err(failure) => self.channel.attempt_failed(now, failure),
                }
            }
            Input::Link(LinkInput::Written(references)) => {
                for reference in references {
                    self.channel.written(now, reference);
                }
            }
            Input::Link(LinkInput::Text(text)) => self.channel.frame(now, &text),
            Input::Link(LinkInput::Closed(cause)) => {
                if let Some(link) = self.link.take()
                    && matches!(cause, CloseCause::Frame { .. })
                {
                    // The answer to the Close frame is queued inside the socket.
                    linger(link.into_socket(), None);
                }
                self.channel.closed(now, cause);
            }
            Input::Timeout => {
                let stalled = self.link.as_ref().and_then(Link::stalls_at);
                if stalled.is_some_and(|at| at <= now) {
                    self.link = None;
                    self.channel.closed(now, CloseCause::WriteStalled);
                }
                self.channel.handle_timeout(now);
            }
        }
    }
}

/// Through tokio's clock, which tests can hold.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
