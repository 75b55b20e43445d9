//! What the gateway says of itself when it connects: URL, headers, user agent
//! (portal-channel spec §1.1–§1.4).

use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use tokio_tungstenite::tungstenite::http::HeaderValue;
use url::{Host, Url};
use uuid::Uuid;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// The port that is dialled when the URL names none. It is the same for *every* scheme
/// (portal-channel spec §1.1), also for `ws` and `http`.
pub const DEFAULT_PORT: u16 = 443;

/// Version of the gateway channel. The two differ in the path and in the names of two events
/// (portal-channel spec §4.1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Protocol {
    /// `authorize_flow`, `flow_authorized`; what portals of 2024 speak.
    V1,
    /// `create_authorization`, `authorization_created`.
    #[default]
    V2,
}

impl Protocol {
    /// The one to try when the portal does not know this one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::V1 => Self::V2,
            Self::V2 => Self::V1,
        }
    }

    /// As it appears in logs and spans.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        }
    }

    const fn path(self) -> &'static [&'static str] {
        match self {
            Self::V1 => &["gateway", "websocket"],
            Self::V2 => &["gateway", "v2", "websocket"],
        }
    }
}

/// Where to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoginUrl {
    url: Url,
    host: Host,
    port: u16,
    protocol: Protocol,
}

/// Why no connection can be attempted at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    /// Neither `ws`, `wss`, `http` nor `https`.
    #[error("the portal URL has the scheme `{0}`; only ws, wss, http and https can be dialled")]
    Scheme(String),
    /// No host.
    #[error("the portal URL names no host")]
    NoHost,
    /// See [`bearer`].
    #[error("the token is empty")]
    EmptyToken,
    /// See [`bearer`].
    #[error("the token contains characters that an HTTP header cannot carry")]
    UnsendableToken,
}

impl LoginUrl {
    /// Builds the URL of the gateway socket (portal-channel spec §1.1, §1.2).
    ///
    /// # Errors
    ///
    /// When the scheme is unknown or there is no host.
    pub fn new(
        api_url: &Url,
        external_id: &str,
        name: &str,
        public_key: &[u8; 32],
        protocol: Protocol,
    ) -> Result<Self, LoginError> {
        let scheme = match api_url.scheme() {
            "ws" | "http" => "ws",
            "wss" | "https" => "wss",
            other => return Err(LoginError::Scheme(other.to_owned())),
        };
        let host = api_url.host().ok_or(LoginError::NoHost)?.to_owned();
        // Read before the scheme changes: a parser drops a port that is its scheme's default.
        let port = api_url.port().unwrap_or(DEFAULT_PORT);

        let mut url = api_url.clone();
        url.set_scheme(scheme)
            .map_err(|()| LoginError::Scheme(api_url.scheme().to_owned()))?;
        // Credentials in the URL have no meaning here and would end up in logs.
        let _ = url.set_username("");
        let _ = url.set_password(None);
        url.set_fragment(None);
        url.path_segments_mut()
            .map_err(|()| LoginError::NoHost)?
            .pop_if_empty()
            .extend(protocol.path());
        url.query_pairs_mut()
            .clear()
            .append_pair("external_id", external_id)
            .append_pair("name", name)
            .append_pair("public_key", &STANDARD.encode(public_key));

        Ok(Self {
            url,
            host,
            port,
            protocol,
        })
    }

    /// The whole URL, with the query.
    pub fn as_url(&self) -> &Url {
        &self.url
    }

    /// The URL to ask for. Portals that know version 1 alone are older than the header that the
    /// token is sent in otherwise, and read it from the query (portal-channel spec §1.2); so what
    /// is returned is as secret as the token.
    ///
    /// # Errors
    ///
    /// See [`bearer`].
    pub fn with_token(&self, token: &SecretString) -> Result<SecretString, LoginError> {
        let mut url = self.url.clone();
        if self.protocol == Protocol::V1 {
            url.query_pairs_mut()
                .append_pair("token", sendable(token)?.expose_secret());
        }
        Ok(SecretString::from(String::from(url)))
    }

    /// The URL without the query, for display.
    pub fn display(&self) -> String {
        let mut url = self.url.clone();
        url.set_query(None);
        url.into()
    }

    /// The host to resolve and to verify the certificate against.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The port to dial.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether to speak TLS.
    pub fn is_tls(&self) -> bool {
        self.url.scheme() == "wss"
    }

    /// Value of the `Host` header: the host alone, even when the port is unusual
    /// (portal-channel spec §1.3).
    pub fn host_header(&self) -> String {
        self.host.to_string()
    }
}

/// The id under which the portal knows the gateway: a UUID is replaced by its hash, anything else
/// is sent as it is (portal-channel spec §1.2).
pub fn external_id(configured: &str) -> String {
    match Uuid::parse_str(configured) {
        Ok(_) => hex::encode(Sha256::digest(configured.as_bytes())),
        Err(_) => configured.to_owned(),
    }
}

/// Value of the `X-Authorization` header (portal-channel spec §1.3). White space anywhere in the
/// token is dropped: tokens get wrapped in files, mails and YAML.
///
/// # Errors
///
/// When nothing is left of the token, or when it cannot be put into a header.
pub fn bearer(token: &SecretString) -> Result<HeaderValue, LoginError> {
    let token = sendable(token)?;
    let mut value = HeaderValue::try_from(format!("Bearer {}", token.expose_secret()))
        .map_err(|_| LoginError::UnsendableToken)?;
    value.set_sensitive(true);
    Ok(value)
}

fn sendable(token: &SecretString) -> Result<SecretString, LoginError> {
    let token: String = token
        .expose_secret()
        .chars()
        .filter(|c| !c.is_whitespace())
        .collect();
    if token.is_empty() {
        return Err(LoginError::EmptyToken);
    }
    if !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(LoginError::UnsendableToken);
    }
    Ok(SecretString::from(token))
}

/// What the user agent says of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// `NAME` of `/etc/os-release`; empty if unknown.
    pub os_name: String,
    /// `VERSION_ID` of `/etc/os-release`; empty if unknown.
    pub os_version: String,
    /// Machine, as in `uname -m`.
    pub arch: String,
    /// Kernel release, as in `uname -r`.
    pub kernel: String,
}

impl HostFacts {
    /// Reads them from the host.
    pub fn read() -> Self {
        let uname = rustix::system::uname();
        let mut facts = Self {
            arch: uname.machine().to_string_lossy().into_owned(),
            kernel: uname.release().to_string_lossy().into_owned(),
            ..Self::default()
        };
        // Absent in an image made from scratch; the kernel then speaks for the system.
        if let Ok(os_release) = std::fs::read_to_string("/etc/os-release") {
            facts.add_os_release(&os_release);
        }
        facts
    }

    fn add_os_release(&mut self, content: &str) {
        for line in content.lines() {
            let Some((key, value)) = line.split_once('=') else {
                continue;
            };
            let value = value.trim().trim_matches(['"', '\'']);
            match key.trim() {
                "NAME" => self.os_name = value.to_owned(),
                "VERSION_ID" => self.os_version = value.to_owned(),
                _ => {}
            }
        }
    }
}

/// The `User-Agent`. The portal reads the version from its `gateway/` part and offers the gateway
/// only to clients of a compatible version (portal-channel spec §1.4).
pub fn user_agent(host: &HostFacts, version: &str) -> String {
    let (os, os_version) = if host.os_name.is_empty() {
        ("Linux", host.kernel.as_str())
    } else if host.os_version.is_empty() {
        // Rolling distributions have no version.
        (host.os_name.as_str(), host.kernel.as_str())
    } else {
        (host.os_name.as_str(), host.os_version.as_str())
    };
    let extra = match (host.arch.as_str(), host.kernel.as_str()) {
        ("", "") => String::new(),
        (one, "") | ("", one) => format!(" ({one})"),
        (arch, kernel) => format!(" ({arch}; {kernel})"),
    };
    format!("{os}/{os_version} gateway/{version}{extra}")
        .chars()
        .filter(|c| c.is_ascii_graphic() || *c == ' ')
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const KEY: [u8; 32] = [2; 32];

    fn login(base: &str) -> LoginUrl {
        LoginUrl::new(
            &base.parse().unwrap(),
            "5f0ce1",
            "edge-7",
            &KEY,
            Protocol::V2,
        )
        .unwrap()
    }

    #[test]
    fn url_matches_the_documented_example() {
        assert_eq!(
            login("wss://cp.example.net").as_url().as_str(),
            "wss://cp.example.net/gateway/v2/websocket?external_id=5f0ce1&name=edge-7\
             &public_key=AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI%3D"
        );
    }

    #[test]
    fn version_1_has_another_path_and_the_token_in_the_query() {
        let base = "wss://h/base/".parse().unwrap();
        let v1 = LoginUrl::new(&base, "5f0ce1", "edge-7", &KEY, Protocol::V1).unwrap();
        assert_eq!(v1.display(), "wss://h/base/gateway/websocket");
        let v2 = login("wss://h/base");
        assert_eq!(v1.as_url().query(), v2.as_url().query());
        let token = SecretString::from(".a+b\n/=");
        let asked = |url: &LoginUrl| url.with_token(&token).unwrap().expose_secret().to_owned();
        assert_eq!(asked(&v2), v2.as_url().as_str());
        assert_eq!(
            asked(&v1),
            format!("{}&token=.a%2Bb%2F%3D", v1.as_url().as_str())
        );
        assert!(!format!("{v1:?}").contains("a+b") && !v1.display().contains("token"));
        for protocol in [Protocol::V1, Protocol::V2] {
            assert_eq!(protocol.other().other(), protocol);
            assert_ne!(protocol.other(), protocol);
        }
    }

    #[test]
    fn base_path_query_and_trailing_slash_are_handled() {
        for base in [
            "wss://h/base",
            "wss://h/base/",
            "https://h/base?token=secret#frag",
            "wss://user:pass@h/base",
        ] {
            let url = login(base);
            assert_eq!(
                url.display(),
                "wss://h/base/gateway/v2/websocket",
                "from {base}"
            );
            assert!(!url.as_url().as_str().contains("secret"));
        }
    }

    #[test]
    fn values_are_form_encoded() {
        let url = LoginUrl::new(
            &"ws://h:8081".parse().unwrap(),
            "a+b/c=d",
            "my gateway é",
            &KEY,
            Protocol::V2,
        )
        .unwrap();
        assert!(
            url.as_url()
                .as_str()
                .contains("?external_id=a%2Bb%2Fc%3Dd&name=my+gateway+%C3%A9&public_key=")
        );
    }

    #[test]
    fn port_is_443_for_every_scheme_unless_named() {
        let cases = [
            ("ws://h", 443, false),
            ("http://h", 443, false),
            ("wss://h", 443, true),
            ("https://h", 443, true),
            ("ws://h:80", 443, false),
            ("ws://h:8081", 8081, false),
            ("http://h:443", 443, false),
            ("https://h:80", 80, true),
            ("wss://h:8443", 8443, true),
        ];
        for (base, port, tls) in cases {
            let url = login(base);
            assert_eq!((url.port(), url.is_tls()), (port, tls), "{base}");
        }
    }

    #[test]
    fn host_header_has_no_port() {
        assert_eq!(login("ws://portal:8081").host_header(), "portal");
        assert_eq!(
            login("ws://[2001:db8::1]:8081").host_header(),
            "[2001:db8::1]"
        );
    }

    #[test]
    fn other_schemes_are_refused() {
        assert_eq!(
            LoginUrl::new(&"ftp://h".parse().unwrap(), "i", "n", &KEY, Protocol::V2),
            Err(LoginError::Scheme("ftp".to_owned()))
        );
        let mail = "mailto:a@b".parse().unwrap();
        assert!(LoginUrl::new(&mail, "i", "n", &KEY, Protocol::V2).is_err());
    }

    #[test]
    fn uuid_is_hashed_and_anything_else_sent_verbatim() {
        assert_eq!(
            external_id("11111111-2222-4333-8444-555555555555"),
            hex::encode(Sha256::digest(b"11111111-2222-4333-8444-555555555555"))
        );
        assert_eq!(
            external_id("753B38F9-F969-47EF-8083-802D5909A372").len(),
            64,
            "upper case is hashed as given"
        );
        for id in ["edge-7", "5f0ce1", ""] {
            assert_eq!(external_id(id), id);
        }
    }

    #[test]
    fn white_space_anywhere_in_the_token_is_dropped_and_a_leading_dot_kept() {
        let value = bearer(&SecretString::from(" .SFMyNTY\n .abc\tdef\r\n")).unwrap();
        assert_eq!(value.to_str().unwrap(), "Bearer .SFMyNTY.abcdef");
        assert!(
            !format!("{value:?}").contains("SFMy"),
            "not in Debug output"
        );
    }

    #[test]
    fn unsendable_tokens_are_named() {
        assert_eq!(
            bearer(&SecretString::from(" \n")),
            Err(LoginError::EmptyToken)
        );
        for token in ["abc\u{0}", "tökén"] {
            assert_eq!(
                bearer(&SecretString::from(token)),
                Err(LoginError::UnsendableToken)
            );
        }
    }

    #[test]
    fn user_agent_carries_the_version_where_the_portal_looks_for_it() {
        let mut host = HostFacts {
            arch: "x86_64".to_owned(),
            kernel: "6.9.3".to_owned(),
            ..HostFacts::default()
        };
        assert_eq!(
            user_agent(&host, "1.6.0"),
            "Linux/6.9.3 gateway/1.6.0 (x86_64; 6.9.3)"
        );
        host.add_os_release("ID=alpine\nNAME=\"Alpine Linux\"\nVERSION_ID=3.22.1\n# x\n");
        let agent = user_agent(&host, "1.6.0");
        assert_eq!(agent, "Alpine Linux/3.22.1 gateway/1.6.0 (x86_64; 6.9.3)");
        assert!(agent.split(' ').any(|part| part == "gateway/1.6.0"));
    }

    #[test]
    fn user_agent_is_ascii() {
        let host = HostFacts {
            os_name: "Línux\nDistro".to_owned(),
            os_version: "1".to_owned(),
            ..HostFacts::default()
        };
        assert_eq!(user_agent(&host, "1.6.0"), "LnuxDistro/1 gateway/1.6.0");
    }
}
