//! The sub-commands `healthcheck`, `status` and `log-filter`: they ask the admin server of a running gateway,
//! with blocking sockets and no runtime, so that they start fast.

use std::{
    fmt::Write as _,
    io::{self, Read as _, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream, ToSocketAddrs as _},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use secrecy::{ExposeSecret as _, SecretString};

use super::{Moment, listener::Place, model::Status, table};
use crate::config::{
    Env, ExitStatus, Listeners, Probe, Settings, admin_listeners, admin_token,
    cli::{HealthcheckArgs, LogFilterArgs, StatusArgs},
};

/// For one question, from connecting to the end of the answer. Docker's own limit is usually 3 s.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long `status` waits for a gateway that is not there: whoever has just started one asks at once.
const STARTING: Duration = Duration::from_secs(2);
/// A status document of thousands of clients is some megabytes.
const LARGEST_ANSWER: u64 = 64 * 1024 * 1024;

/// What the server answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Status code.
    pub code: u16,
    /// Body.
    pub body: String,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The address cannot be used.
    #[error("{0}")]
    Address(String),
    /// No connection, or no answer in time.
    #[error(
        "no answer from the admin server at {address}: {error}. Is the gateway running here (in \
         the same container), and are HEALTH_CHECK_ADDR and FIREZONE_ADMIN_ADDR the same for both?"
    )]
    Unreachable {
        /// Who was asked.
        address: Place,
        /// What happened.
        error: io::Error,
    },
    /// The admin server asks for a token, and the one shown is not right.
    #[error(
        "the admin server at {0} asks for its token; set FIREZONE_ADMIN_TOKEN_FILE to the file that \
         the gateway has it from"
    )]
    Token(Place),
    /// Something else listens there, or only the probes are there.
    #[error(
        "what listens at {0} is not the admin server of a gateway, or has only the probes; see \
         HEALTH_CHECK_ADDR and FIREZONE_ADMIN_ADDR"
    )]
    NotOurs(Place),
}

/// Asks for `path`. Unspecified addresses, fit only for listening, become loopback.
///
/// # Errors
/// See [`AskError`].
pub fn ask(address: impl Into<Place>, path: &str) -> Result<Answer, AskError> {
    ask_as(&address.into(), &Request::get(path), None)
}

/// What is asked.
#[derive(Debug, Clone, Copy)]
struct Request<'a> {
    method: &'a str,
    path: &'a str,
    body: &'a str,
}

impl<'a> Request<'a> {
    fn get(path: &'a str) -> Self {
        Self {
            method: "GET",
            path,
            body: "",
        }
    }
}

/// As [`ask`], anything, showing the admin token.
fn ask_as(
    address: &Place,
    request: &Request<'_>,
    token: Option<&SecretString>,
) -> Result<Answer, AskError> {
    let address = reachable(address);
    match exchange(&address, request, token) {
        Ok(answer) => parse(&answer).ok_or(AskError::NotOurs(address)),
        Err(error) => Err(AskError::Unreachable { address, error }),
    }
}

fn reachable(place: &Place) -> Place {
    match place {
        Place::Tcp(address) => {
            let mut address = *address;
            match address.ip() {
                IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
                IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
                _ => {}
            }
            Place::Tcp(address)
        }
        Place::Unix(path) => Place::Unix(path.clone()),
    }
}

/// A connection of either kind.
enum Connection {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Connection {
    fn open(place: &Place) -> io::Result<Self> {
        Ok(match place {
            Place::Tcp(address) => Self::Tcp(TcpStream::connect_timeout(address, PATIENCE)?),
            // Either somebody listens or not; only a full backlog makes one wait.
            Place::Unix(path) => Self::Unix(UnixStream::connect(path)?),
        })
    }

    fn write_all(&mut self, bytes: &[u8], limit: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => {
                stream.set_write_timeout(Some(limit))?;
                stream.write_all(bytes)
            }
            Self::Unix(stream) => {
                stream.set_write_timeout(Some(limit))?;
                stream.write_all(bytes)
            }
        }
    }

    fn read(&mut self, buffer: &mut [u8], limit: Duration) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => {
                stream.set_read_timeout(Some(limit))?;
                stream.read(buffer)
            }
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(limit))?;
                stream.read(buffer)
            }
        }
    }
}

fn exchange(
    address: &Place,
    request: &Request<'_>,
    token: Option<&SecretString>,
) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + PATIENCE;
    let left = || match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::Error::from(io::ErrorKind::TimedOut)),
        left => Ok(left),
    };
    let mut stream = Connection::open(address)?;
    let host = match address {
        Place::Tcp(address) => address.to_string(),
        Place::Unix(_) => "localhost".to_owned(),
    };
    let authorization = token.map_or_else(String::new, |token| {
        format!("Authorization: Bearer {}\r\n", token.expose_secret())
    });
    let Request { method, path, body } = request;
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nAccept: */*\r\nConnection: close\r\n\
         Content-Length: {length}\r\n{authorization}\r\n{body}"
    );
    stream.write_all(request.as_bytes(), left()?)?;

    let mut answer = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        match stream.read(&mut buffer, left()?) {
            Ok(0) => return Ok(answer),
            Ok(length) => answer.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // What Linux says when a socket's own limit has passed.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        }
        if answer.len() as u64 > LARGEST_ANSWER {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
    }
}

/// Takes an answer apart. The server closes the connection after it, so that its end is the end of
/// the body; a length that says otherwise means that it broke off.
fn parse(answer: &[u8]) -> Option<Answer> {
    let at = answer.windows(4).position(|end| end == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..at]).ok()?;
    let body = &answer[at + 4..];
    let mut lines = head.split("\r\n");
    let mut status = lines.next()?.splitn(3, ' ');
    if !status.next()?.starts_with("HTTP/1.") {
        return None;
    }
    let code = status.next()?.parse().ok()?;
    for line in lines {
        let (name, value) = line.split_once(':')?;
        if name.eq_ignore_ascii_case("content-length")
            && value.trim().parse::<usize>().ok()? != body.len()
        {
            return None;
        }
    }
    Some(Answer {
        code,
        body: String::from_utf8_lossy(body).into_owned(),
    })
}

/// The address to ask: the argument, else one of the settings. `None` when that is off.
fn address(
    argument: Option<&str>,
    settings: &Settings,
    env: &dyn Env,
    choose: impl FnOnce(&Listeners) -> Option<&Place>,
) -> Result<Option<Place>, AskError> {
    let Some(argument) = argument else {
        let listeners =
            admin_listeners(settings, env).map_err(|error| AskError::Address(error.to_string()))?;
        return Ok(choose(&listeners).cloned());
    };
    if let Some(path) = argument.strip_prefix("unix:") {
        return Ok(Some(Place::Unix(path.into())));
    }
    let unusable = |why: &str| {
        AskError::Address(format!(
            "--addr: {argument:?} {why}. Give a host and a port, such as 127.0.0.1:8080, or unix: \
             and the path of a socket"
        ))
    };
    argument
        .to_socket_addrs()
        .map_err(|error| unusable(&format!("cannot be used ({error})")))?
        .next()
        .map(|address| Some(Place::Tcp(address)))
        .ok_or_else(|| unusable("has no address"))
}

/// The sub-command `healthcheck`: prints the checks that fail.
///
/// With the admin server off there is nothing to ask. Asked for nothing in particular, as a
/// container image's HEALTHCHECK does, that passes: whoever switched it off should not have the
/// gateway restarted for it.
///
/// # Errors
/// Printing failed.
pub fn healthcheck(
    arguments: &HealthcheckArgs,
    settings: &Settings,
    env: &dyn Env,
    out: &mut dyn Write,
) -> io::Result<ExitStatus> {
    let probes = Listeners::for_probes;
    let address = match address(arguments.addr.as_deref(), settings, env, probes) {
        Ok(Some(address)) => address,
        Ok(None) => {
            writeln!(
                out,
                "not checked: the admin server is off (HEALTH_CHECK_ADDR)"
            )?;
            return Ok(if arguments.check.is_empty() {
                ExitStatus::Ok
            } else {
                ExitStatus::Failure
            });
        }
        Err(error) => {
            writeln!(out, "{error}")?;
            return Ok(ExitStatus::Failure);
        }
    };
    let probes = match arguments.check.as_slice() {
        [] => &[Probe::Live, Probe::Started],
        probes => probes,
    };
    let mut failed = false;
    for probe in probes {
        match ask(address.clone(), probe.path()) {
            Ok(Answer { code: 200, .. }) => writeln!(out, "{}: ok", probe.name())?,
            Ok(Answer { code: 503, body }) => {
                failed = true;
                writeln!(out, "{}: failed", probe.name())?;
                for line in body.lines().filter(|line| line.starts_with("[-]")) {
                    writeln!(out, "  {}", table::printable(line))?;
                }
            }
            Ok(_) => {
                writeln!(out, "{}", AskError::NotOurs(reachable(&address)))?;
                return Ok(ExitStatus::Failure);
            }
            Err(error) => {
                writeln!(out, "{error}")?;
                return Ok(ExitStatus::Failure);
            }
        }
    }
    Ok(if failed {
        ExitStatus::Failure
    } else {
        ExitStatus::Ok
    })
}

/// The sub-command `status`: a table for people, in colour if `colour`, or the bare document.
///
/// # Errors
/// Printing failed.
pub fn status(
    arguments: &StatusArgs,
    settings: &Settings,
    env: &dyn Env,
    colour: bool,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> io::Result<ExitStatus> {
    let Some(seconds) = arguments.watch else {
        let begun = Instant::now();
        let answer = loop {
            match fetch_status(arguments, settings, env, colour) {
                // Started a moment ago, it does not listen yet.
                Err(AskError::Unreachable { error, .. })
                    if is_not_there(&error) && begun.elapsed() < STARTING =>
                {
                    std::thread::sleep(STARTING / 20);
                }
                answer => break answer,
            }
        };
        return match answer {
            Ok(text) => {
                out.write_all(text.as_bytes())?;
                Ok(ExitStatus::Ok)
            }
            Err(error) => {
                writeln!(err, "{error}")?;
                Ok(ExitStatus::Failure)
            }
        };
    };
    // Until interrupted, or until nobody reads any more. A gateway that does not answer may do so
    // the next time.
    loop {
        let text = match fetch_status(arguments, settings, env, colour) {
            Ok(text) => text,
            Err(error) => format!("{error}\n"),
        };
        out.write_all(frame(&text, colour && !arguments.json).as_bytes())?;
        out.flush()?;
        std::thread::sleep(Duration::from_secs(seconds.into()));
    }
}

/// Nobody listens, rather than somebody who does not answer.
fn is_not_there(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
    )
}

/// One picture of several: on a terminal it takes the place of the former, elsewhere it follows it
/// after an empty line.
fn frame(text: &str, on_terminal: bool) -> String {
    if !on_terminal {
        return format!("{text}\n");
    }
    // Home, each line cleared to its end, then everything below: no flicker, unlike clearing first.
    let lines = text.replace('\n', "\u{1b}[K\n");
    format!("\u{1b}[H{lines}\u{1b}[J")
}

/// What the admin server has at `path`.
///
/// # Errors
/// See [`AskError`].
pub fn fetch(
    addr: Option<&str>,
    settings: &Settings,
    env: &dyn Env,
    path: &str,
) -> Result<Answer, AskError> {
    let (_, answer) = ask_admin(addr, settings, env, &Request::get(path))?;
    Ok(answer)
}

/// Asks for what needs the admin token.
fn ask_admin(
    argument: Option<&str>,
    settings: &Settings,
    env: &dyn Env,
    request: &Request<'_>,
) -> Result<(Place, Answer), AskError> {
    let address = address(argument, settings, env, |listeners| {
        listeners.admin.as_ref()
    })?;
    let address = address.ok_or_else(|| {
        AskError::Address(
            "the admin server is off (HEALTH_CHECK_ADDR, FIREZONE_ADMIN_ADDR), so that there is \
             nobody to ask"
                .to_owned(),
        )
    })?;
    let token = admin_token(settings, env)
        .map_err(|error| AskError::Address(error.to_string()))?
        .and_then(|token| token.read().ok());
    let answer = ask_as(&address, request, token.as_ref())?;
    if answer.code == 401 {
        return Err(AskError::Token(reachable(&address)));
    }
    Ok((address, answer))
}

/// The sub-command `log-filter`: shows or changes which log lines the gateway writes.
///
/// # Errors
/// Printing failed.
pub fn log_filter(
    arguments: &LogFilterArgs,
    settings: &Settings,
    env: &dyn Env,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> io::Result<ExitStatus> {
    let (method, body) = match (&arguments.filter, arguments.reset) {
        (Some(filter), _) => ("PUT", filter.as_str()),
        (None, true) => ("DELETE", ""),
        (None, false) => ("GET", ""),
    };
    let request = Request {
        method,
        path: "/log-filter",
        body,
    };
    match ask_admin(arguments.addr.as_deref(), settings, env, &request) {
        Ok((_, Answer { code: 200, body })) => {
            writeln!(out, "{}", table::printable(body.trim_end()))?;
            return Ok(ExitStatus::Ok);
        }
        // Of an older gateway, or of something else.
        Ok((address, Answer { code: 404, .. })) => {
            writeln!(err, "{}", AskError::NotOurs(reachable(&address)))?;
        }
        Ok((_, answer)) => writeln!(err, "{}", table::printable(answer.body.trim_end()))?,
        Err(error) => writeln!(err, "{error}")?,
    }
    Ok(ExitStatus::Failure)
}

fn fetch_status(
    arguments: &StatusArgs,
    settings: &Settings,
    env: &dyn Env,
    colour: bool,
) -> Result<String, AskError> {
    let question = Request::get("/status");
    let (address, answer) = ask_admin(arguments.addr.as_deref(), settings, env, &question)?;
    if answer.code != 200 {
        return Err(AskError::NotOurs(reachable(&address)));
    }
    if arguments.json {
        let mut text = answer.body;
        // Writing to a string does not fail.
        let _ = writeln!(text);
        return Ok(text);
    }
    let status: Status =
        serde_json::from_str(&answer.body).map_err(|_| AskError::NotOurs(reachable(&address)))?;
    // Ages by the gateway's own reading of the clock, if it is one that tells.
    let now = if status.at > 0.0 {
        status.at
    } else {
        Moment::now().unix
    };
    Ok(table::render(&status, now, colour))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn addresses_for_listening_become_loopback() {
        for (listening, asked) in [
            ("0.0.0.0:8080", "127.0.0.1:8080"),
            ("[::]:9000", "[::1]:9000"),
            ("192.0.2.1:1", "192.0.2.1:1"),
        ] {
            let place = |text: &str| Place::Tcp(text.parse().unwrap());
            assert_eq!(reachable(&place(listening)), place(asked));
        }
    }

    #[test]
    fn answers_are_taken_apart_and_broken_ones_refused() {
        let answer = parse(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno");
        assert_eq!(
            answer,
            Some(Answer {
                code: 503,
                body: "no".into()
            })
        );
        for broken in [
            &b""[..],
            b"HTTP/1.1 200 OK\r\n",
            b"SSH-2.0-OpenSSH\r\n\r\n",
            b"HTTP/1.1 two OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
            b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            b"\xff\xfe\r\n\r\n",
        ] {
            assert_eq!(parse(broken), None, "{}", String::from_utf8_lossy(broken));
        }
    }
}
