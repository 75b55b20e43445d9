//! The slow path's loop: one thread that feeds the core and carries out what it decides.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::trace::SpanContext;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep_until};

use super::core::{Command, Core};
use super::flow_reports::{self, WallClock};
use super::host_setup::{self, Host};
use super::host_story::{HostStory, Lack};
use super::snapshot::{self, Collected, Facts, Surroundings, Told};
use crate::access::DNS_PORT;
use crate::admin::model::{Clients, DeviceStatus, HostFinding, PortalState, Status};
use crate::admin::{Drain, Heartbeat, Liveness, Question};
use crate::config::{Config, ExitStatus};
use crate::datapath::counters::Counters;
use crate::datapath::peers::PeerTable;
use crate::datapath::worker::{Slow, Stop, Worker};
use crate::device::Nodes;
use crate::dns;
use crate::fault;
use crate::file_version::FileVersion;
use crate::flow_logs::{self, FlowLogs, UploadConfig};
use crate::host::network::Network;
use crate::net::{self, Sockets};
use crate::portal::channel::{Event, GaveUpReason, NotJoined};
use crate::portal::dial::tls_config;
use crate::portal::driver::{Driver, PortalConfig};
use crate::portal::login::{HostFacts, user_agent};
use crate::portal::messages::{Egress, Interface};
use crate::telemetry::durations::Durations;
use crate::telemetry::{LogControl, past::TRACER};
use crate::throttle::Throttle;

/// Datagrams and control packets that wait for the slow path.
const QUEUE: usize = 4096;
/// Of those, how many are taken before timers and the portal get their turn.
const BURST: usize = 256;
/// From so many clients on, something is due all the time, and timers wait for company…
const CROWD: usize = 1000;
/// …so long: a wake-up costs more than what is then to be done. No timer is as exact as this, least of
/// all at the other end of the internet.
const CROWD_SLACK: Duration = Duration::from_millis(10);
/// How often the status is published.
const PUBLISH: Duration = Duration::from_millis(500);
/// Shortest pause between two complete documents.
const ANSWER_PAUSE: Duration = Duration::from_millis(250);
/// The pause in multiples of what the last one took: however many ask, and however many clients
/// there are, no more than a tenth of our time goes into them.
const ANSWER_FACTOR: u32 = 9;
/// How many may ask for complete documents at once.
pub(super) const QUESTIONS: usize = 16;
/// How often the host is looked at again, and the device tried again.
const HOST_CHECK: Duration = Duration::from_secs(5);
/// How many episodes may become spans at once; half of what the exporter's queue holds.
const STORIES_AT_ONCE: u32 = 1024;
/// The pause between two after that.
const STORY_PAUSE: Duration = Duration::from_millis(20);
/// How long the last flow logs may take to reach the disk.
const FLOW_LOG_FAREWELL: Duration = Duration::from_millis(500);
/// How long the spans of the last moments may take to leave.
pub(super) const TELEMETRY_FLUSH: Duration = Duration::from_millis(800);

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

enum Asked {
    Stop,
    Reload,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Stop,
            _ = self.interrupt.recv() => Asked::Stop,
            _ = self.hangup.recv() => Asked::Reload,
        }
    }
}

/// Runs until a signal or a final failure.
#[expect(
    clippy::too_many_arguments,
    reason = "the root hands out what it has made, once"
)]
pub(super) async fn run(
    config: Config,
    nodes: Nodes,
    facts: Facts,
    status: watch::Sender<Arc<Status>>,
    questions: mpsc::Receiver<Question>,
    liveness: Liveness,
    drain: Drain,
    log: LogControl,
    durations: Durations,
) -> anyhow::Result<ExitStatus> {
    // First of all: whatever follows may get stuck.
    let heartbeat = liveness.register("slow_path", Instant::now());
    let mut signals = Signals::new()?;
    let mut around = Surroundings {
        host: host_setup::first_findings(&config, &nodes),
        ..Surroundings::default()
    };
    let mut story = HostStory::default();
    story.note(Instant::now(), &around.host);
    for finding in around.host.iter().filter(|f| f.level == "ok") {
        tracing::debug!(check = %finding.name, "{}", finding.found);
    }
    if config.strict && around.host.iter().any(|f| f.level == "error") {
        return Ok(ExitStatus::HostLacks);
    }
    let mut publisher = Publisher {
        status,
        facts,
        collected: Collected::default(),
        heartbeat,
        log,
    };
    let host = wait_for_host(&config, &nodes, &mut around, &mut publisher, &mut signals).await;
    let host = match host {
        Some(Ok(host)) => host,
        Some(Err(())) => return Ok(ExitStatus::HostLacks),
        None => {
            tell(story.end(Instant::now()));
            return Ok(ExitStatus::Ok);
        }
    };
    around.device = host.describe();
    let found = host.checker(&config, None)();
    let mut slow_path = SlowPath::new(config, around, publisher, questions, host, &liveness)?;
    slow_path.portal.tell(durations.clone());
    slow_path.durations = durations;
    slow_path.host_story = story;
    slow_path.host_checked(found);
    let exit = slow_path.serve(&mut signals, &drain).await;
    drain.begin();
    slow_path.shut_down(&mut signals).await;
    Ok(exit)
}

fn tell(lacks: Vec<Lack>) {
    let tracer = opentelemetry::global::tracer(TRACER);
    for lack in lacks {
        lack.record(&tracer, Instant::now());
    }
}

/// `None` when asked to stop; `Err` when the host lacks something and `--strict` is set.
async fn wait_for_host(
    config: &Config,
    nodes: &Nodes,
    around: &mut Surroundings,
    publisher: &mut Publisher,
    signals: &mut Signals,
) -> Option<Result<Host, ()>> {
    let mut told = String::new();
    loop {
        let missing = match Host::acquire(config, nodes) {
            Ok(host) => return Some(Ok(host)),
            Err(missing) => missing,
        };
        if missing != told {
            tracing::error!("{missing}");
            told.clone_from(&missing);
        }
        if config.strict {
            return Some(Err(()));
        }
        around.device = DeviceStatus {
            name: config.tun_name.clone(),
            error: Some(missing),
            ..DeviceStatus::default()
        };
        around.portal = idle_portal(config);
        let next = Instant::now() + HOST_CHECK;
        let mut beat = interval(PUBLISH);
        while Instant::now() < next {
            publisher.publish(around, None, &[]);
            tokio::select! {
                _ = beat.tick() => {}
                asked = signals.next() => match asked {
                    Asked::Stop => return None,
                    Asked::Reload => {
                        publisher.reset_log_filter();
                        break;
                    }
                },
            }
        }
        around.host = host_setup::first_findings(config, nodes);
    }
}

fn idle_portal(config: &Config) -> crate::admin::model::PortalStatus {
    crate::admin::model::PortalStatus {
        url: config.api_url.to_string(),
        state: PortalState::Idle,
        ..Default::default()
    }
}

struct Publisher {
    status: watch::Sender<Arc<Status>>,
    facts: Facts,
    collected: Collected,
    heartbeat: Heartbeat,
    log: LogControl,
}

impl Publisher {
    /// SIGHUP counts for the log filter also while the host keeps the gateway from starting.
    fn reset_log_filter(&self) {
        if let Err(error) = self.log.reset_filter("SIGHUP") {
            tracing::warn!(%error, "The log filter was not read again; the former one stays");
        }
    }

    fn publish(&mut self, around: &Surroundings, core: Option<&Core>, counters: &[Arc<Counters>]) {
        self.heartbeat.tick(Instant::now());
        self.log.tell();
        let (now, wall) = (Instant::now(), SystemTime::now());
        let clients = core.map_or_else(Clients::default, |core| {
            self.collected
                .clients(Instant::now, || core.client_statuses(now, wall, false))
        });
        let told = Told {
            clients,
            complete: false,
        };
        let status = self.build(around, core, told, counters);
        self.status.send_replace(Arc::new(status));
    }

    /// Everything that is known now.
    fn complete(&self, around: &Surroundings, core: &Core, counters: &[Arc<Counters>]) -> Status {
        let clients = core.client_statuses(Instant::now(), SystemTime::now(), true);
        let told = Told {
            clients: clients.into(),
            complete: true,
        };
        self.build(around, Some(core), told, counters)
    }

    fn build(
        &self,
        around: &Surroundings,
        core: Option<&Core>,
        told: Told,
        counters: &[Arc<Counters>],
    ) -> Status {
        let (now, wall) = (Instant::now(), SystemTime::now());
        let facts = &self.facts;
        snapshot::build(facts, around, core, told, counters, now, wall)
    }
}

struct SlowPath {
    config: Config,
    around: Surroundings,
    publisher: Publisher,
    questions: mpsc::Receiver<Question>,
    /// Those that wait for a complete document, and when the next one may be made.
    asked: Vec<Question>,
    answer_from: Instant,
    host: Host,
    core: Core,
    portal: Driver,
    counters: Vec<Arc<Counters>>,
    from_workers: mpsc::Receiver<Slow>,
    workers: Vec<Stop>,
    network: Option<Arc<Network>>,
    names: dns::Service,
    flow_logs: FlowLogs,
    /// Places flows in the time of day.
    wall_clock: WallClock,
    resolved: mpsc::UnboundedReceiver<dns::Answer>,
    configured: (
        mpsc::UnboundedSender<Configuration>,
        mpsc::UnboundedReceiver<Configuration>,
    ),
    /// What was wanted last, and who does it.
    configuring: Option<(Interface, JoinHandle<()>)>,
    checks: (
        mpsc::UnboundedSender<Vec<HostFinding>>,
        mpsc::UnboundedReceiver<Vec<HostFinding>>,
    ),
    host_story: HostStory,
    durations: Durations,
    /// Of what becomes a span: the exporter's queue has an end, and what ends with thousands of
    /// clients at once must not push out the outage that it belongs to.
    stories: Throttle,
    /// Of the lines about those that do not.
    spanless: Throttle,
    token_seen: Option<FileVersion>,
    checked: Instant,
    checking: bool,
    /// Until when it carries traffic although it was asked to stop.
    lingers_until: Option<Instant>,
}

/// Offers what addresses the host has to clients, also those that came since. Those that go are left to
/// the checks, which fail there.
fn offer_addresses(core: &mut Core, sockets: &Sockets, now: Instant) {
    for address in net::local_addresses() {
        if let Some(socket) = sockets.for_destination(SocketAddr::new(address, 0)) {
            core.add_host(now, SocketAddr::new(address, socket.local_addr().port()));
        }
    }
}

/// What became of the device's addresses.
struct Configuration {
    wanted: Interface,
    result: Result<Vec<String>, String>,
}

impl SlowPath {
    fn new(
        config: Config,
        around: Surroundings,
        publisher: Publisher,
        questions: mpsc::Receiver<Question>,
        host: Host,
        liveness: &Liveness,
    ) -> anyhow::Result<Self> {
        let now = Instant::now();
        let table = Arc::new(PeerTable::new());
        // The slow path's own counters come first, then one set per worker.
        let counters: Vec<_> = (0..=host.workers())
            .map(|_| Arc::new(Counters::new()))
            .collect();
        let (to_slow_path, from_workers) = mpsc::channel(QUEUE);
        let mut core = Core::new(
            now,
            SystemTime::now(),
            Arc::clone(&table),
            Arc::clone(&counters[0]),
            rand::random(),
        );
        core.open_ports(&config.gateway_ports);
        offer_addresses(&mut core, &host.sockets[0], now);
        let workers = (0..host.workers())
            .map(|n| {
                Worker {
                    sockets: Arc::clone(&host.sockets[n]),
                    tun: Arc::clone(&host.tun),
                    queue: n,
                    table: Arc::clone(&table),
                    counters: Arc::clone(&counters[n + 1]),
                    slow: to_slow_path.clone(),
                    heartbeat: liveness.register(format!("worker-{n}"), now),
                }
                .spawn(n)
            })
            .collect::<Result<_, _>>()?;
        let portal = Driver::new(PortalConfig {
            api_url: config.api_url.clone(),
            token: config.token.clone(),
            external_id_source: config.identity.id.clone(),
            name: config.name.clone(),
            public_key: core.public_key(),
            max_partition_time: config.max_partition_time,
            user_agent: user_agent(&HostFacts::read(), env!("CARGO_PKG_VERSION")),
            exit_on_auth_failure: config.exit_on_auth_failure,
        })?;
        let network = match Network::new() {
            Ok(network) => Some(Arc::new(network)),
            Err(error) => {
                tracing::error!(%error, "No netlink: the device gets no addresses");
                None
            }
        };
        let (names, resolved) = dns::Service::start(dns::Settings::default())?;
        if config.flow_logs {
            core.log_flows();
        }
        let flow_logs = FlowLogs::start(flow_logs::Settings {
            state_dir: config.state_dir.clone(),
            tls: tls_config(),
            user_agent: user_agent(&HostFacts::read(), env!("CARGO_PKG_VERSION")),
            allow_plain_http: config.api_url.scheme() == "ws",
            limits: flow_logs::Limits::default(),
        })?;
        let token_seen = config.token_source.path().and_then(FileVersion::of);
        Ok(Self {
            config,
            around,
            publisher,
            questions,
            asked: Vec::new(),
            answer_from: now,
            host,
            core,
            portal,
            counters,
            from_workers,
            workers,
            network,
            names,
            flow_logs,
            wall_clock: WallClock::new(now, SystemTime::now()),
            resolved,
            configured: mpsc::unbounded_channel(),
            configuring: None,
            checks: mpsc::unbounded_channel(),
            host_story: HostStory::default(),
            durations: Durations::default(),
            stories: Throttle::new(STORIES_AT_ONCE, STORY_PAUSE),
            spanless: Throttle::MINUTELY,
            token_seen,
            checked: now,
            checking: false,
            lingers_until: None,
        })
    }

    async fn serve(&mut self, signals: &mut Signals, drain: &Drain) -> ExitStatus {
        let mut batch = Vec::with_capacity(BURST);
        let mut beat = interval(PUBLISH);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let mut deadline = self
                .core
                .poll_timeout()
                .map_or_else(|| Instant::now() + PUBLISH, |(at, _)| at + self.slack());
            if !self.asked.is_empty() {
                deadline = deadline.min(self.answer_from);
            }
            if let Some(until) = self.lingers_until {
                deadline = deadline.min(until);
            }
            tokio::select! {
                asked = signals.next() => match asked {
                    Asked::Stop if self.lingers_until.is_none() && !self.config.linger.is_zero() => {
                        drain.begin();
                        self.linger();
                    }
                    Asked::Stop => return ExitStatus::Ok,
                    Asked::Reload => self.reload(),
                },
                event = self.portal.next() => {
                    if let Some(exit) = self.portal_event(event) {
                        return exit;
                    }
                }
                taken = self.from_workers.recv_many(&mut batch, BURST) => {
                    // All workers are gone, or one cannot go on: its clients would stay with it.
                    if taken == 0 || !self.take(&mut batch) {
                        tracing::error!("A worker ended; the gateway cannot carry traffic");
                        return ExitStatus::Failure;
                    }
                }
                Some(answer) = self.resolved.recv() => {
                    self.core.resolved(Instant::now(), &answer.name, &answer.resolved);
                }
                Some(done) = self.configured.1.recv() => self.configuration_done(done),
                Some(found) = self.checks.1.recv() => {
                    self.checking = false;
                    self.host_checked(found);
                }
                Some(question) = self.questions.recv() => self.asked.push(question),
                () = sleep_until(deadline.into()) => {}
                _ = beat.tick() => self.beat(),
            }
            if let Err(error) = fault::point("slow_path") {
                tracing::error!(%error, "The slow path ends");
                return ExitStatus::Failure;
            }
            let now = Instant::now();
            if self.core.poll_timeout().is_some_and(|(at, _)| at <= now) {
                self.core.handle_timeout(now);
            }
            self.carry_out();
            self.answer();
            if self.lingers_until.is_some_and(|until| until <= now) {
                return ExitStatus::Ok;
            }
        }
    }

    fn slack(&self) -> Duration {
        if self.core.client_count() < CROWD {
            Duration::ZERO
        } else {
            CROWD_SLACK
        }
    }

    /// Asked to stop, it first lets those who send it clients find out.
    fn linger(&mut self) {
        let linger = self.config.linger;
        self.lingers_until = Some(Instant::now() + linger);
        self.around.draining = true;
        tracing::info!(
            linger = %humantime::format_duration(linger),
            "Asked to stop; traffic is carried for some time yet, unless asked again"
        );
        self.publish();
    }

    /// Whether all workers go on.
    fn take(&mut self, batch: &mut Vec<Slow>) -> bool {
        let now = Instant::now();
        for message in batch.drain(..) {
            match message {
                Slow::Datagram {
                    local,
                    remote,
                    payload,
                } => self.core.handle_datagram(now, local, remote, &payload),
                Slow::Control { client, packet } => {
                    self.core.handle_control(now, client, &packet);
                }
                Slow::Ended(error) => {
                    tracing::error!(%error, "a worker cannot go on: sockets or device are gone");
                    return false;
                }
            }
        }
        true
    }

    /// The exit status when the event is final.
    fn portal_event(&mut self, event: Event) -> Option<ExitStatus> {
        let now = Instant::now();
        match event {
            Event::Connected => self.core.connected(now),
            Event::Disconnected { undelivered, .. } => {
                self.portal.outage_met(self.core.served());
                self.core.disconnected(now, undelivered);
            }
            Event::Message(message) => {
                self.core.handle_portal(now, message);
                // The next beat shows it. There are thousands of these at once when the portal
                // comes back, and each document names every client.
                return None;
            }
            // The end of the session was an event of its own.
            Event::Blocked { .. } => self.core.revoke_all(now),
            Event::Unblocked => {}
            Event::GaveUp { reason, .. } => {
                return Some(match reason {
                    GaveUpReason::BudgetExhausted => ExitStatus::Failure,
                    GaveUpReason::AuthRefused => ExitStatus::AuthFailure,
                });
            }
        }
        self.publish();
        None
    }

    /// The session may be lost already without our having heard of it; what must survive is then
    /// held like everything else that comes up while the portal is away.
    fn send(&mut self, message: Egress) {
        if let Err(NotJoined(message)) = self.portal.send(message) {
            tracing::debug!("a message for the portal comes too late for this session");
            self.core.hold_undelivered(vec![message]);
        }
    }

    /// Does what the core decided.
    fn carry_out(&mut self) {
        while let Some(message) = self.core.poll_egress() {
            self.send(message);
        }
        while let Some(transmit) = self.core.poll_transmit() {
            let sent = self.host.sockets[0].send(
                transmit.source,
                transmit.destination,
                0,
                &transmit.payload,
                None,
            );
            if let Err(error) = sent {
                tracing::debug!(%error, to = %transmit.destination, "datagram not sent");
                self.counters[0].count(crate::access::DropReason::SocketWriteFailed, 1);
            }
        }
        while let Some(timing) = self.core.poll_timing() {
            self.durations.note(timing);
        }
        while let Some(story) = self.core.poll_story() {
            if let Some(timing) = story.timing() {
                self.durations.note(timing);
            }
            let (tracer, outage) = (opentelemetry::global::tracer(TRACER), self.portal.outage());
            let effect = story.effect();
            let now = Instant::now();
            let span = if self.stories.admit_silently(now) {
                story.record(&tracer, now, outage)
            } else {
                if let Some(held_back) = self.spanless.admit(now) {
                    tracing::info!(held_back, "Too much ends at once to have a span for each");
                }
                SpanContext::NONE
            };
            if let Some(effect) = effect {
                self.portal.outage_affected(effect, span);
            }
        }
        while let Some((report, outers)) = self.core.poll_flow_report() {
            let log = self.config.flow_logs;
            if let Some(report) = flow_reports::take(&report, &outers, log, &self.wall_clock) {
                self.flow_logs.report(report);
            }
        }
        while let Some(command) = self.core.poll_command() {
            match command {
                Command::Configure(interface) => self.configure(interface, Duration::ZERO),
                Command::Resolve(name) => self.names.resolve(name),
                Command::ConfigureFlowLogs(uploads) => {
                    self.flow_logs
                        .configure(uploads.map(|uploads| UploadConfig {
                            api_url: uploads.api_url,
                            interval: Duration::from_secs(uploads.interval_secs),
                            batch_size: uploads.batch_size.try_into().unwrap_or(u32::MAX),
                        }));
                }
            }
        }
    }

    fn configure(&mut self, wanted: Interface, delay: Duration) {
        let Some(network) = self.network.clone() else {
            return;
        };
        let link = self.host.tun.name().to_owned();
        let done = self.configured.0.clone();
        // What was wanted before is wanted no more.
        if let Some((_, former)) = self.configuring.take() {
            former.abort();
        }
        let task = tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let result = network
                .configure(&link, wanted.ipv4, wanted.ipv6)
                .await
                .map(|configured| {
                    let mut addresses = Vec::new();
                    for (address, outcome) in [
                        (wanted.ipv4.to_string(), configured.v4),
                        (wanted.ipv6.to_string(), configured.v6),
                    ] {
                        match outcome {
                            Ok(()) => addresses.push(address),
                            Err(error) => tracing::warn!(%address, %error, "Address not usable"),
                        }
                    }
                    addresses
                })
                .map_err(|error| error.to_string());
            // Nobody waits for it any more when the gateway is shutting down.
            let _ = done.send(Configuration { wanted, result });
        });
        self.configuring = Some((wanted, task));
    }

    fn configuration_done(&mut self, done: Configuration) {
        let last = self.configuring.as_ref().map(|(wanted, _)| *wanted);
        if last != Some(done.wanted) {
            // It was overtaken by another one.
            return;
        }
        match done.result {
            Ok(addresses) => {
                tracing::info!(?addresses, "Device configured");
                self.around.device.addresses = addresses;
                self.around.device.error = None;
                let Interface { ipv4, ipv6 } = done.wanted;
                self.names.listen([ipv4.into(), ipv6.into()], DNS_PORT);
            }
            Err(error) => {
                tracing::error!(%error, "Device not configured; trying again");
                self.around.device.error = Some(error);
                self.configure(done.wanted, HOST_CHECK);
            }
        }
        self.publish();
    }

    /// Twice a second: status, token file, and now and then the host.
    fn beat(&mut self) {
        let now = Instant::now();
        if let Some(path) = self.config.token_source.path() {
            let seen = FileVersion::of(path);
            if seen.is_some() && seen != self.token_seen {
                self.read_token();
            }
        }
        if !self.checking && now.duration_since(self.checked) >= HOST_CHECK {
            offer_addresses(&mut self.core, &self.host.sockets[0], now);
            self.around.device.kernel_drops = self.host.kernel_drops();
            (self.checking, self.checked) = (true, now);
            let ahead = self.around.portal.clock_ahead;
            let (check, done) = (
                self.host.checker(&self.config, ahead),
                self.checks.0.clone(),
            );
            // Nobody waits for the result any more when the gateway is shutting down.
            tokio::task::spawn_blocking(move || done.send(check()));
        }
        if let Some(held_back) = self.spanless.overdue(now) {
            tracing::info!(held_back, "Too much ended at once to have a span for each");
        }
        let wall = SystemTime::now();
        self.core.note_wall(now, wall);
        self.wall_clock.note(now, wall);
        self.publish();
    }

    fn host_checked(&mut self, found: Vec<HostFinding>) {
        tell(self.host_story.note(Instant::now(), &found));
        self.around.host = found;
    }

    /// One complete document for all who wait, if it is time.
    fn answer(&mut self) {
        let begin = Instant::now();
        if self.asked.is_empty() || begin < self.answer_from {
            return;
        }
        self.look_around();
        let status = self
            .publisher
            .complete(&self.around, &self.core, &self.counters);
        let status = Arc::new(status);
        for question in self.asked.drain(..) {
            // Who gave up waiting has been given something else.
            let _ = question.send(Arc::clone(&status));
        }
        let end = Instant::now();
        self.answer_from = end + ANSWER_PAUSE.max((end - begin) * ANSWER_FACTOR);
    }

    /// SIGHUP: somebody changed something here or at the portal.
    fn reload(&mut self) {
        tracing::info!("Reload asked for");
        self.publisher.reset_log_filter();
        self.read_token();
        // Whatever the backoff says, and even if the token is the same: it may have been made valid
        // at the portal.
        self.portal.retry_now();
    }

    fn read_token(&mut self) {
        self.token_seen = self.config.token_source.path().and_then(FileVersion::of);
        match self.config.token_source.reload() {
            Some(Ok(token)) => self.portal.token_read(token),
            Some(Err(error)) => tracing::warn!(%error, "Token not read again"),
            None => {}
        }
    }

    fn look_around(&mut self) {
        self.around.portal = self.portal.status();
        self.around.dns = self.names.forwarded();
        self.around.flow_logs = self.flow_logs.counters();
    }

    fn publish(&mut self) {
        self.look_around();
        self.publisher
            .publish(&self.around, Some(&self.core), &self.counters);
    }

    /// Tells everybody, within a bounded time.
    async fn shut_down(&mut self, signals: &mut Signals) {
        tracing::info!("Shutting down");
        self.around.draining = true;
        self.publish();
        tell(self.host_story.end(Instant::now()));
        self.core.shutdown(Instant::now());
        self.carry_out();
        let asked_twice = self
            .lingers_until
            .is_some_and(|until| Instant::now() < until);
        if !asked_twice {
            tokio::select! {
                () = self.portal.shutdown() => {}
                // Asked twice: at once, then.
                _ = signals.next() => {}
            }
        }
        // One that fails now would wait for somebody to hear of it.
        self.from_workers.close();
        for worker in self.workers.drain(..) {
            worker.stop();
        }
        if !self.flow_logs.finish(FLOW_LOG_FAREWELL) {
            tracing::warn!("Some of the last flow logs were not written");
        }
        self.host.release();
        // It would make anew what is removed.
        if let Some((_, task)) = self.configuring.take() {
            task.abort();
            let _ = task.await;
        }
        if let Some(network) = &self.network
            && let Err(error) = network.cleanup().await
        {
            tracing::debug!(%error, "routes not removed");
        }
    }
}
