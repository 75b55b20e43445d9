//! The status document as a table for people.

use std::fmt::Write as _;

use super::model::{
    ClientStatus, DeviceStatus, HostFinding, KernelDrops, PathChange, PortalState, PortalStatus,
    RelayStatus, Status,
};

/// What notes are broken at, so that with their indent they stay within 100 columns.
const WIDTH: usize = 94;

/// A path that lasted less than this (seconds) was only on the way to the next one.
const STOPOVER: f64 = 5.0;

/// Colours of a terminal (ECMA-48 SGR).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Paint {
    Plain,
    Bold,
    Good,
    Odd,
    Bad,
}

impl Paint {
    fn apply(self, text: &str, colour: bool) -> String {
        let code = match self {
            Self::Plain => return text.to_owned(),
            _ if !colour => return text.to_owned(),
            Self::Bold => 1,
            Self::Good => 32,
            Self::Odd => 33,
            Self::Bad => 31,
        };
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }
}

struct Cell(String, Paint);

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self(text, Paint::Plain)
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self(text.to_owned(), Paint::Plain)
    }
}

/// A line of a table, and what is too long for a column of it.
struct Row {
    cells: Vec<Cell>,
    notes: Vec<String>,
}

/// Renders `status` as seen at `now` (Unix seconds).
pub fn render(status: &Status, now: f64, colour: bool) -> String {
    let mut page = Page {
        text: String::new(),
        now,
        colour,
    };
    page.head(status);
    page.portal(&status.portal);
    page.relays(&status.relays);
    page.clients(&status.clients);
    page.device(&status.device);
    page.host(&status.host);
    page.dropped(status);
    page.text
}

/// How long an outage may last yet.
fn budget(left: Option<f64>) -> String {
    match left {
        Some(left) => format!("gives up in {}", duration(left)),
        None => "never gives up".to_owned(),
    }
}

struct Page {
    text: String,
    now: f64,
    colour: bool,
}

impl Page {
    fn line(&mut self, text: impl AsRef<str>) {
        self.text.push_str(text.as_ref().trim_end());
        self.text.push('\n');
    }

    fn title(&mut self, text: &str) {
        self.text.push('\n');
        let text = Paint::Bold.apply(text, self.colour);
        self.line(text);
    }

    fn paint(&self, paint: Paint, text: &str) -> String {
        paint.apply(text, self.colour)
    }

    /// Time since `at`, for "… ago" and "for …".
    fn since(&self, at: f64) -> String {
        duration(self.now - at)
    }

    fn rows(&mut self, heading: &[&str], rows: Vec<Row>) {
        let heading = Row {
            cells: heading
                .iter()
                .map(|text| Cell((*text).to_owned(), Paint::Bold))
                .collect(),
            notes: Vec::new(),
        };
        let mut widths: Vec<usize> = vec![0; heading.cells.len()];
        let mut rows = std::iter::once(heading).chain(rows).collect::<Vec<_>>();
        for row in &mut rows {
            for (cell, width) in row.cells.iter_mut().zip(&mut widths) {
                cell.0 = printable(&cell.0);
                *width = (*width).max(cell.0.chars().count());
            }
        }
        for row in rows {
            let mut line = String::from("  ");
            for (Cell(text, paint), width) in row.cells.iter().zip(&widths) {
                line.push_str(&self.paint(*paint, text));
                for _ in text.chars().count()..width + 2 {
                    line.push(' ');
                }
            }
            self.line(line);
            for note in row.notes {
                self.line(format!("    {}", printable(&note)));
            }
        }
    }

    fn head(&mut self, status: &Status) {
        let name = self.paint(Paint::Bold, &printable(&status.name));
        let draining = if status.draining {
            self.paint(Paint::Odd, ", shutting down")
        } else {
            String::new()
        };
        let up = self.since(status.started_at);
        self.line(format!(
            "{name}  firezone-gateway {}, up {up}{draining}",
            printable(&status.version)
        ));
        self.line(format!("id {}", printable(&status.id)));
        let rights = status.host.iter().find(|f| f.name == "privileges");
        if let Some(rights) = rights.filter(|f| f.level == "ok") {
            self.line(format!("running as {}", printable(&rights.found)));
        }
        for stuck in &status.stuck {
            let stuck = self.paint(Paint::Bad, &printable(stuck));
            self.line(format!("not alive: {stuck}"));
        }
    }

    fn portal(&mut self, portal: &PortalStatus) {
        self.title("Portal");
        let (state, paint) = match portal.state {
            PortalState::Idle => ("not started", Paint::Odd),
            PortalState::Connecting => ("connecting", Paint::Odd),
            PortalState::Joining => ("joining", Paint::Odd),
            PortalState::Joined => ("joined", Paint::Good),
            PortalState::Waiting => ("waiting for the next attempt", Paint::Bad),
            PortalState::Blocked => ("blocked: token refused", Paint::Bad),
            PortalState::GaveUp => ("gave up", Paint::Bad),
            PortalState::Closed => ("closed", Paint::Odd),
        };
        let state = self.paint(paint, state);
        // A channel that was never started has no beginning.
        let since = if portal.since > 0.0 {
            format!(" for {}", self.since(portal.since))
        } else {
            String::new()
        };
        self.line(format!("  {state}{since}  {}", printable(&portal.url)));
        let last_message = match portal.last_message_at {
            Some(at) => format!("{} ago", self.since(at)),
            None => "none yet".to_owned(),
        };
        self.line(format!(
            "  last message {last_message}, joined {} times in {} attempts",
            portal.joins, portal.attempts
        ));
        if let Some(backoff) = &portal.backoff {
            let outage = self.since(backoff.outage_since);
            let next = match backoff.next_attempt_at {
                // A join proves something only when it has lasted.
                _ if portal.state == PortalState::Joined => {
                    "joined; it counts as over once this has lasted".to_owned()
                }
                Some(at) => format!(
                    "attempt {} in {}, {}",
                    backoff.attempt.saturating_add(1),
                    duration(at - self.now),
                    budget(backoff.budget_left)
                ),
                None => format!(
                    "attempt {} running, {}",
                    backoff.attempt.saturating_add(1),
                    budget(backoff.budget_left)
                ),
            };
            let first = match portal.first_cause() {
                Some(cause) => format!("; it began with {}", printable(cause)),
                None => String::new(),
            };
            self.line(format!("  outage for {outage}: {next}{first}"));
        }
        if let Some(last) = portal.outages.last() {
            let longest = portal.outages.iter().map(|o| o.ended - o.began);
            let longest = longest.fold(0.0, f64::max);
            self.line(format!(
                "  outages in the last 24 hours: {}, longest {}; the last {} ago for {}: {}",
                portal.outages.len(),
                duration(longest),
                self.since(last.ended),
                duration(last.ended - last.began),
                printable(&last.cause)
            ));
        }
        if let Some(error) = &portal.last_error {
            let ago = self.since(error.at);
            self.line(format!(
                "  last error {ago} ago: {}: {}",
                printable(&error.kind),
                printable(&error.message)
            ));
        }
    }

    fn relays(&mut self, relays: &[RelayStatus]) {
        self.title("Relays");
        if relays.is_empty() {
            self.line("  none offered by the portal");
            return;
        }
        let rows = relays.iter().map(|relay| self.relay(relay)).collect();
        self.rows(
            &[
                "STATE",
                "SINCE",
                "ADDRESS",
                "RTT",
                "ALLOCATED",
                "MADE",
                "FLAPS",
                "CREDENTIALS",
                "CHANNELS",
            ],
            rows,
        );
    }

    fn relay(&self, relay: &RelayStatus) -> Row {
        let paint = match relay.state.as_str() {
            "allocated" => Paint::Good,
            "failed" => Paint::Bad,
            _ => Paint::Odd,
        };
        let absent = || "-".to_owned();
        let credentials = match relay.credentials_expire_at {
            Some(at) if at <= self.now => Cell("expired".to_owned(), Paint::Bad),
            Some(at) => format!("{} left", duration(at - self.now)).into(),
            None => absent().into(),
        };
        let cells = vec![
            Cell(relay.state.clone(), paint),
            self.since(relay.since).into(),
            relay
                .addresses
                .first()
                .cloned()
                .unwrap_or_else(absent)
                .into(),
            match relay.rtt {
                Some(rtt) => format!("{:.0} ms", rtt * 1000.0),
                None => absent(),
            }
            .into(),
            relay
                .allocated_at
                .map_or_else(absent, |at| self.since(at))
                .into(),
            relay.allocations.to_string().into(),
            relay.flaps.to_string().into(),
            credentials,
            relay.channels.to_string().into(),
        ];
        let mut notes = Vec::new();
        if let Some(others) = relay.addresses.get(1..) {
            notes.extend(wrapped("also", others));
        }
        notes.extend(wrapped("lends", &relay.relayed));
        if let Some(error) = &relay.last_error {
            notes.push(match relay.last_error_at {
                Some(at) => format!("last error {} ago: {error}", self.since(at)),
                None => format!("last error: {error}"),
            });
        }
        Row { cells, notes }
    }

    fn clients(&mut self, clients: &[ClientStatus]) {
        self.title(&format!("Clients: {}", clients.len()));
        if clients.is_empty() {
            return;
        }
        let rows = clients.iter().map(|client| self.client(client)).collect();
        self.rows(
            &[
                "CLIENT",
                "CONNECTION",
                "PATH",
                "HANDSHAKE",
                "RECEIVED",
                "SENT",
            ],
            rows,
        );
    }

    fn client(&self, client: &ClientStatus) -> Row {
        let paint = match client.connection.as_str() {
            "connected" => Paint::Good,
            "failed" | "disconnected" => Paint::Bad,
            _ => Paint::Odd,
        };
        let cells = vec![
            client.id.clone().into(),
            Cell(client.connection.clone(), paint),
            client.path.as_deref().unwrap_or("-").into(),
            match client.last_handshake_at {
                Some(at) => format!("{} ago", self.since(at)),
                None => "-".to_owned(),
            }
            .into(),
            bytes(client.rx_bytes).into(),
            bytes(client.tx_bytes).into(),
        ];
        let mut notes: Vec<String> = self.path(client).into_iter().collect();
        notes.extend(wrapped("at", &client.addresses));
        let grants: Vec<String> = client
            .grants
            .iter()
            .map(|grant| match grant.expires_at {
                Some(at) => format!("{} ({} left)", grant.name, duration(at - self.now)),
                None => grant.name.clone(),
            })
            .collect();
        notes.extend(wrapped("may reach", &grants));
        let mut uses: Vec<String> = Vec::new();
        for (count, one, many) in [
            (client.flows, "flow", "flows"),
            (client.domains, "name", "names"),
        ] {
            match count {
                0 => {}
                1 => uses.push(format!("1 {one}")),
                _ => uses.push(format!("{count} {many}")),
            }
        }
        if !uses.is_empty() {
            notes.extend(wrapped("uses", &uses));
        }
        let dropped: Vec<String> = client
            .dropped
            .iter()
            .filter(|(_, count)| **count > 0)
            .map(|(reason, count)| format!("{reason} {count}"))
            .collect();
        if !dropped.is_empty() {
            notes.extend(wrapped("dropped", &dropped));
        }
        Row { cells, notes }
    }

    /// The path and its last change, such as `direct for 5s after relay_local (returned), 2 changes`.
    /// Where the path before was a [`STOPOVER`], why the one before that ended says more.
    fn path(&self, client: &ClientStatus) -> Option<String> {
        let since = client.path_since?;
        let mut text = format!(
            "{} for {}",
            client.path.as_deref().unwrap_or("no path"),
            self.since(since)
        );
        // Writing to a string does not fail.
        let mut told: Option<&PathChange> = None;
        for change in client.path_history.iter().rev().take(2) {
            // The first path of all was on no way.
            let is_stopover = |told: &PathChange| {
                told.from.is_some() && change.from.is_some() && told.at - change.at < STOPOVER
            };
            if told.is_some_and(|told| !is_stopover(told)) {
                break;
            }
            let reason = change.reason.as_str();
            let _ = match change.from {
                Some(from) => write!(text, " after {} ({reason})", from.as_str()),
                None => write!(text, " ({reason})"),
            };
            told = Some(change);
        }
        let _ = match client.path_changes {
            0 => Ok(()),
            1 => write!(text, ", 1 change"),
            changes => write!(text, ", {changes} changes"),
        };
        Some(text)
    }

    fn device(&mut self, device: &DeviceStatus) {
        self.title("Device");
        let state = match (&device.error, device.up) {
            (None, true) => self.paint(Paint::Good, "up"),
            (Some(error), _) => self.paint(Paint::Bad, &printable(error)),
            (None, false) => self.paint(Paint::Odd, "not up yet"),
        };
        self.line(format!("  {} {state}", printable(&device.name)));
        for (what, items) in [
            ("addresses", &device.addresses),
            ("sockets", &device.sockets),
            ("offloads", &device.offloads),
        ] {
            self.line(format!("  {what} {}", printable(&list(items))));
        }
        self.line(format!("  workers {}", device.workers));
        let drops = device.kernel_drops;
        if drops != KernelDrops::default() {
            let text = format!(
                "dropped by the kernel: {} datagrams, {} packets to clients",
                drops.udp, drops.device
            );
            let text = self.paint(Paint::Odd, &text);
            self.line(format!("  {text}"));
        }
    }

    fn host(&mut self, findings: &[HostFinding]) {
        let notable: Vec<_> = findings.iter().filter(|f| f.level != "ok").collect();
        if notable.is_empty() {
            return;
        }
        self.title("Host");
        for finding in notable {
            let paint = if finding.level == "error" {
                Paint::Bad
            } else {
                Paint::Odd
            };
            let level = self.paint(paint, &printable(&finding.level));
            self.line(format!(
                "  {level} {}: {}",
                printable(&finding.name),
                printable(&finding.found)
            ));
            if let Some(fix) = &finding.fix {
                // Some remedies are several lines, such as a comment and a command.
                for (number, line) in fix.lines().enumerate() {
                    let lead = if number == 0 { "set " } else { "    " };
                    self.line(format!("    {lead}{}", printable(line)));
                }
            }
        }
    }

    fn dropped(&mut self, status: &Status) {
        if status.dropped.values().all(|count| *count == 0) {
            return;
        }
        self.title("Dropped packets");
        for (reason, count) in status.dropped.iter().filter(|(_, count)| **count > 0) {
            self.line(format!("  {}: {count}", printable(reason)));
        }
    }
}

fn list(items: &[String]) -> String {
    if items.is_empty() {
        "-".to_owned()
    } else {
        items.join(", ")
    }
}

/// A list in as many lines as it takes to stay within [`WIDTH`]; none for an empty one.
fn wrapped(lead: &str, items: &[String]) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = lead.to_owned();
    let mut is_empty = true;
    for (number, item) in (1..).zip(items) {
        let comma = if number < items.len() { "," } else { "" };
        if !is_empty && line.chars().count() + 1 + item.chars().count() + comma.len() > WIDTH {
            lines.push(line);
            line = " ".repeat(lead.chars().count());
        }
        line.push(' ');
        line.push_str(item);
        line.push_str(comma);
        is_empty = false;
    }
    if !is_empty {
        lines.push(line);
    }
    lines
}

/// Names come from the portal and errors from anywhere; none of them may steer the terminal.
pub(super) fn printable(text: &str) -> String {
    text.replace(char::is_control, "?")
}

/// A time in seconds as its two largest units, such as `3h 12m`. Negative is zero.
pub(super) fn duration(seconds: f64) -> String {
    // `max` also turns NaN into zero; the cast saturates.
    let seconds = seconds.max(0.0) as u64;
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = match (days, hours, minutes) {
        (0, 0, 0) => write!(text, "{seconds}s"),
        (0, 0, minutes) => write!(text, "{minutes}m {}s", seconds % 60),
        (0, hours, minutes) => write!(text, "{hours}h {minutes}m"),
        (days, hours, _) => write!(text, "{days}d {hours}h"),
    };
    text
}

fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::super::model::{
        BackoffStatus, GrantStatus, OutageStatus, PathChange, PathReason, PortalError,
    };
    use super::*;
    use crate::datapath::peers::PathKind;

    const NOW: f64 = 1_000_000.0;

    fn strings(items: &[&str]) -> Vec<String> {
        items.iter().map(|item| (*item).to_owned()).collect()
    }

    fn healthy() -> Status {
        Status {
            schema: 1,
            version: "1.6.0".into(),
            name: "edge-7".into(),
            id: "5f0ce1".into(),
            started_at: NOW - 11_520.0,
            portal: PortalStatus {
                url: "wss://portal.example".into(),
                state: PortalState::Joined,
                since: NOW - 720.0,
                initialized: true,
                last_message_at: Some(NOW - 3.0),
                joins: 2,
                attempts: 5,
                last_error: Some(PortalError {
                    kind: "tcp_connect".into(),
                    message: "connection refused".into(),
                    at: NOW - 730.0,
                }),
                ..PortalStatus::default()
            },
            relays: vec![RelayStatus {
                id: "r1".into(),
                addresses: strings(&["192.0.2.4:3478", "[2001:db8::4]:3478"]),
                state: "allocated".into(),
                since: NOW - 700.0,
                relayed: strings(&["192.0.2.4:50000", "[2001:db8::4]:50000"]),
                allocated_at: Some(NOW - 700.0),
                allocation_expires_at: Some(NOW + 400.0),
                allocations: 2,
                flaps: 3,
                rtt: Some(0.0234),
                credentials_expire_at: Some(NOW + 82_860.0),
                channels: 1,
                last_error: Some("the relay does not answer".into()),
                last_error_at: Some(NOW - 710.0),
            }],
            clients: vec![ClientStatus {
                id: "0198b8f2-4b5c-7d6e-8f90-a1b2c3d4e5f6".into(),
                addresses: strings(&["100.64.0.2", "fd00:2021:1111::2"]),
                connection: "connected".into(),
                path: Some("direct".into()),
                path_since: Some(NOW - 65.0),
                path_changes: 2,
                path_history: vec![
                    PathChange {
                        at: NOW - 80.0,
                        from: Some(PathKind::Direct),
                        to: Some(PathKind::RelayLocal),
                        reason: PathReason::Dead,
                    },
                    PathChange {
                        at: NOW - 65.0,
                        from: Some(PathKind::RelayLocal),
                        to: Some(PathKind::Direct),
                        reason: PathReason::Returned,
                    },
                ],
                last_handshake_at: Some(NOW - 61.0),
                rx_bytes: 1536,
                tx_bytes: 12,
                grants: vec![GrantStatus {
                    name: "wiki".into(),
                    expires_at: Some(NOW + 3600.0),
                    ..GrantStatus::default()
                }],
                ..ClientStatus::default()
            }]
            .into(),
            device: DeviceStatus {
                name: "tun-firezone".into(),
                up: true,
                addresses: strings(&["100.64.0.1", "fd00:2021:1111::1"]),
                sockets: strings(&["0.0.0.0:52625"]),
                workers: 2,
                kernel_drops: KernelDrops::default(),
                ..DeviceStatus::default()
            },
            host: vec![
                HostFinding {
                    name: "tun".into(),
                    level: "ok".into(),
                    ..HostFinding::default()
                },
                HostFinding {
                    name: "privileges".into(),
                    level: "ok".into(),
                    found: "user 65532, group 65532, capability NET_ADMIN, no_new_privs".into(),
                    ..HostFinding::default()
                },
            ],
            ..Status::default()
        }
    }

    #[test]
    fn healthy_gateway_reads_like_this() {
        let expected = "\
edge-7  firezone-gateway 1.6.0, up 3h 12m
id 5f0ce1
running as user 65532, group 65532, capability NET_ADMIN, no_new_privs

Portal
  joined for 12m 0s  wss://portal.example
  last message 3s ago, joined 2 times in 5 attempts
  last error 12m 10s ago: tcp_connect: connection refused

Relays
  STATE      SINCE    ADDRESS         RTT    ALLOCATED  MADE  FLAPS  CREDENTIALS  CHANNELS
  allocated  11m 40s  192.0.2.4:3478  23 ms  11m 40s    2     3      23h 1m left  1
    also [2001:db8::4]:3478
    lends 192.0.2.4:50000, [2001:db8::4]:50000
    last error 11m 50s ago: the relay does not answer

Clients: 1
  CLIENT                                CONNECTION  PATH    HANDSHAKE  RECEIVED  SENT
  0198b8f2-4b5c-7d6e-8f90-a1b2c3d4e5f6  connected   direct  1m 1s ago  1.5 KiB   12 B
    direct for 1m 5s after relay_local (returned), 2 changes
    at 100.64.0.2, fd00:2021:1111::2
    may reach wiki (1h 0m left)

Device
  tun-firezone up
  addresses 100.64.0.1, fd00:2021:1111::1
  sockets 0.0.0.0:52625
  offloads -
  workers 2
";
        let rendered = render(&healthy(), NOW, false);
        assert_eq!(rendered, expected, "\n{rendered}");
        let mut status = healthy();
        status.device.kernel_drops = KernelDrops { udp: 3, device: 4 };
        let rendered = render(&status, NOW, false);
        let line = "dropped by the kernel: 3 datagrams, 4 packets to clients";
        assert!(rendered.contains(line), "{rendered}");
        let column = |line: &str, word: &str| line.find(word);
        let lines: Vec<&str> = rendered.lines().collect();
        let heading = lines.iter().position(|l| l.contains("CLIENT")).unwrap_or(0);
        assert_eq!(
            column(lines[heading], "PATH"),
            column(lines[heading + 1], "direct"),
            "columns are aligned"
        );
    }

    #[test]
    fn the_widest_tables_stay_within_100_columns() {
        let mut status = healthy();
        status.relays.push(RelayStatus {
            addresses: strings(&[
                "198.151.100.244:34789",
                "[2001:db8:85a3:8d3:1319:8a2e:370:7344]:3478",
            ]),
            relayed: strings(&[
                "198.51.100.244:50000",
                "[2001:db8:85a3:8d3:1319:8a2e:370:7344]:65535",
            ]),
            state: "withdrawn".into(),
            since: NOW - 59.0,
            rtt: Some(0.2),
            allocated_at: Some(NOW - 86_000.0),
            credentials_expire_at: Some(NOW + 86_000.0),
            ..RelayStatus::default()
        });
        let client = &mut status.clients[0];
        client.path = Some("relay_remote".into());
        client.last_handshake_at = Some(NOW - 3599.0);
        (client.rx_bytes, client.tx_bytes) = (999 << 30, 999 << 20);
        client.path_history[1].from = Some(PathKind::RelayRemote);
        client.path_history[1].reason = PathReason::Nominated;
        client.path_changes = u64::MAX;
        client.grants = (0..30)
            .map(|n| GrantStatus {
                name: format!("database {n}"),
                expires_at: (n % 2 == 0).then_some(NOW + 3600.0),
                ..GrantStatus::default()
            })
            .collect();

        let text = render(&status, NOW, false);

        for line in text.lines() {
            assert!(line.chars().count() <= 100, "{line}\n{text}");
        }
        assert!(text.contains("database 0 (1h 0m left),"), "{text}");
        assert!(text.contains("database 29\n"), "{text}");
    }

    #[test]
    fn relay_and_client_that_never_worked_say_so() {
        let mut status = healthy();
        status.relays[0] = RelayStatus {
            addresses: strings(&["192.0.2.4:3478"]),
            state: "failed".into(),
            since: NOW - 5.0,
            credentials_expire_at: Some(NOW - 1.0),
            last_error: Some("the relay refuses the credentials".into()),
            last_error_at: Some(NOW - 2.0),
            ..RelayStatus::default()
        };
        status.clients[0] = ClientStatus {
            id: "c1".into(),
            connection: "checking".into(),
            ..ClientStatus::default()
        };

        let text = render(&status, NOW, false);

        for part in [
            "failed  5s     192.0.2.4:3478  -    -          0     0      expired      0\n",
            "    last error 2s ago: the relay refuses the credentials\n",
            "  c1      checking    -     -          0 B       0 B\n\nDevice",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
    }

    #[test]
    fn a_path_is_told_with_its_last_change() {
        let mut client = healthy().clients.remove(0);
        let page = Page {
            text: String::new(),
            now: NOW,
            colour: false,
        };
        client.path_history.truncate(1);
        client.path_changes = 1;
        client.path = Some("relay_local".into());
        assert_eq!(
            page.path(&client).as_deref(),
            Some("relay_local for 1m 5s after direct (dead), 1 change")
        );
        client.path = None;
        client.path_history[0].to = None;
        client.path_history[0].reason = PathReason::Disconnected;
        assert_eq!(
            page.path(&client).as_deref(),
            Some("no path for 1m 5s after direct (disconnected), 1 change")
        );
        client.path = Some("relay_local".into());
        client.path_changes = 2;
        client.path_history[0] = PathChange {
            at: NOW - 66.0,
            from: Some(PathKind::Direct),
            to: Some(PathKind::RelayRemote),
            reason: PathReason::Dead,
        };
        client.path_history.push(PathChange {
            at: NOW - 65.0,
            from: Some(PathKind::RelayRemote),
            to: Some(PathKind::RelayLocal),
            reason: PathReason::Nominated,
        });
        assert_eq!(
            page.path(&client).as_deref(),
            Some(
                "relay_local for 1m 5s after relay_remote (nominated) after direct (dead), 2 changes"
            )
        );
        let first = client.path_history[0].from.take();
        assert_eq!(
            page.path(&client).as_deref(),
            Some("relay_local for 1m 5s after relay_remote (nominated), 2 changes")
        );
        client.path_history[0].from = first;
        client.path_history[0].at = NOW - 70.0;
        assert_eq!(
            page.path(&client).as_deref(),
            Some("relay_local for 1m 5s after relay_remote (nominated), 2 changes")
        );
        client.path_history[1].from = None;
        client.path_history[1].reason = PathReason::Returned;
        assert_eq!(
            page.path(&client).as_deref(),
            Some("relay_local for 1m 5s (returned), 2 changes")
        );
        client.path_history.truncate(1);
        client.path = Some("direct".into());
        client.path_changes = 0;
        client.path_history[0] = PathChange {
            at: NOW,
            from: None,
            to: Some(PathKind::Direct),
            reason: PathReason::Nominated,
        };
        assert_eq!(
            page.path(&client).as_deref(),
            Some("direct for 1m 5s (nominated)")
        );
        // A gateway from before there was a history.
        client.path_history.clear();
        assert_eq!(page.path(&client).as_deref(), Some("direct for 1m 5s"));
    }

    #[test]
    fn outages_of_the_last_day_are_told_in_one_line() {
        let outage = |began: f64, seconds: f64, cause: &str| OutageStatus {
            began,
            ended: began + seconds,
            cause: cause.into(),
            ..OutageStatus::default()
        };
        let mut status = healthy();
        status.portal.outages = vec![
            outage(NOW - 7200.0, 600.0, "http_503"),
            outage(NOW - 120.0, 60.0, "tcp_connect"),
        ];
        let text = render(&status, NOW, false);
        let line = "  outages in the last 24 hours: 2, longest 10m 0s; the last 1m 0s ago for 1m 0s: tcp_connect\n";
        assert!(text.contains(line), "{text}");
        status.clients[0].flows = 1;
        status.clients[0].domains = 2;
        status.clients[0].dropped = [("no_grant".to_owned(), 3)].into();
        let text = render(&status, NOW, false);
        assert!(text.contains("uses 1 flow, 2 names"), "{text}");
        assert!(text.contains("dropped no_grant 3"), "{text}");
    }

    #[test]
    fn outage_tells_cause_next_attempt_and_budget() {
        let mut status = healthy();
        status.portal.state = PortalState::Waiting;
        status.portal.since = NOW - 2.0;
        status.portal.backoff = Some(BackoffStatus {
            outage_since: NOW - 95.0,
            attempt: 3,
            next_attempt_at: Some(NOW + 12.0),
            budget_left: Some(805.0),
            ..BackoffStatus::default()
        });

        let text = render(&status, NOW, false);

        assert!(
            text.contains("waiting for the next attempt for 2s"),
            "{text}"
        );
        assert!(
            text.contains("outage for 1m 35s: attempt 4 in 12s, gives up in 13m 25s\n"),
            "{text}"
        );
        for (cause, told) in [
            ("tcp_connect", "\n"),
            ("server_close", "; it began with server_close\n"),
        ] {
            if let Some(backoff) = &mut status.portal.backoff {
                backoff.cause = cause.into();
            }
            let text = render(&status, NOW, false);
            assert!(
                text.contains(&format!("gives up in 13m 25s{told}")),
                "{text}"
            );
        }

        status.portal.state = PortalState::Connecting;
        status.portal.backoff = Some(BackoffStatus {
            outage_since: NOW - 95.0,
            attempt: 3,
            ..BackoffStatus::default()
        });
        let text = render(&status, NOW, false);
        assert!(
            text.contains("outage for 1m 35s: attempt 4 running, never gives up\n"),
            "{text}"
        );

        status.portal.state = PortalState::Joined;
        let text = render(&status, NOW, false);
        assert!(
            text.contains("outage for 1m 35s: joined; it counts as over once this has lasted\n"),
            "{text}"
        );
    }

    #[test]
    fn what_is_wrong_with_host_and_device_is_shown_with_its_remedy() {
        let mut status = healthy();
        status.draining = true;
        status.device.up = false;
        status.device.error = Some("operation not permitted".into());
        status.host.push(HostFinding {
            name: "ipv4 forwarding".into(),
            level: "error".into(),
            found: "off".into(),
            fix: Some("sysctls: [net.ipv4.ip_forward=1]".into()),
        });
        status.dropped.insert("no_route".into(), 7);
        status.dropped.insert("never".into(), 0);
        status.relays.clear();
        status.clients.clear();

        let text = render(&status, NOW, false);

        for part in [
            ", shutting down\n",
            "  tun-firezone operation not permitted\n",
            "Host\n  error ipv4 forwarding: off\n    set sysctls: [net.ipv4.ip_forward=1]\n",
            "Dropped packets\n  no_route: 7\n",
            "Relays\n  none offered by the portal\n",
            "Clients: 0\n",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
        assert!(!text.contains("never"), "{text}");
    }

    #[test]
    fn colour_is_only_used_when_asked_and_changes_nothing_else() {
        let plain = render(&healthy(), NOW, false);
        let coloured = render(&healthy(), NOW, true);
        assert!(!plain.contains('\u{1b}'));
        assert!(coloured.contains("\u{1b}[32mjoined\u{1b}[0m"));
        let mut stripped = coloured;
        for code in [
            "\u{1b}[0m",
            "\u{1b}[1m",
            "\u{1b}[31m",
            "\u{1b}[32m",
            "\u{1b}[33m",
        ] {
            stripped = stripped.replace(code, "");
        }
        let trim = |text: &str| {
            text.lines()
                .map(|l| l.trim_end().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(trim(&stripped), trim(&plain));
    }

    #[test]
    fn names_from_outside_cannot_steer_the_terminal() {
        let mut status = healthy();
        let evil = "a\u{1b}[2Jb\nc\u{9b}";
        status.name = evil.into();
        status.version = evil.into();
        status.id = evil.into();
        status.portal.url = evil.into();
        status.portal.last_error = Some(PortalError {
            kind: evil.into(),
            message: evil.into(),
            at: NOW,
        });
        status.relays[0].last_error = Some(evil.into());
        status.relays[0].addresses = vec![evil.into(), evil.into()];
        status.relays[0].relayed = vec![evil.into()];
        status.clients[0].addresses = vec![evil.into()];
        status.clients[0].path = Some(evil.into());
        status.clients[0].grants[0].name = evil.into();
        status.device.name = evil.into();
        status.host[0] = HostFinding {
            name: evil.into(),
            level: "warning".into(),
            found: evil.into(),
            fix: Some(evil.into()),
        };
        status.dropped.insert(evil.into(), 1);

        let text = render(&status, NOW, false);

        assert!(
            text.chars().all(|c| c == '\n' || !c.is_control()),
            "{text:?}"
        );
    }

    #[test]
    fn empty_status_of_a_gateway_that_just_started_is_rendered() {
        let text = render(&Status::default(), NOW, false);
        assert!(text.contains("  not started\n"), "{text}");
    }

    #[test]
    fn durations_and_sizes_have_two_digits_of_meaning() {
        for (seconds, text) in [
            (-5.0, "0s"),
            (f64::NAN, "0s"),
            (59.9, "59s"),
            (60.0, "1m 0s"),
            (3_600.0, "1h 0m"),
            (90_061.0, "1d 1h"),
        ] {
            assert_eq!(duration(seconds), text);
        }
        for (count, text) in [
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (5 << 30, "5.0 GiB"),
            (u64::MAX, "16384.0 PiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }
}
