//! Whether, where and how spans, metrics and log lines are exported, from the standard `OTEL_*`
//! variables, including those that the SDK does not read itself.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use hyper::Uri;
use hyper::header::{HeaderName, HeaderValue};
use sha2::{Digest as _, Sha256};
use url::Url;

use super::names;
use crate::config::Env;

/// How long an export may take, unless it is said.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// What is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Spans.
    Traces,
    /// Values of instruments.
    Metrics,
    /// Log lines.
    Logs,
}

impl Signal {
    /// What it is, in log lines.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Traces => "spans",
            Self::Metrics => "metrics",
            Self::Logs => "log lines",
        }
    }
}

/// The variables of one signal, or those for all.
struct Variables {
    endpoint: &'static str,
    protocol: &'static str,
    headers: &'static str,
    timeout: &'static str,
    compression: &'static str,
    certificate: &'static str,
    client_certificate: &'static str,
    client_key: &'static str,
}

macro_rules! variables {
    ($prefix:literal) => {
        Variables {
            endpoint: concat!($prefix, "ENDPOINT"),
            protocol: concat!($prefix, "PROTOCOL"),
            headers: concat!($prefix, "HEADERS"),
            timeout: concat!($prefix, "TIMEOUT"),
            compression: concat!($prefix, "COMPRESSION"),
            certificate: concat!($prefix, "CERTIFICATE"),
            client_certificate: concat!($prefix, "CLIENT_CERTIFICATE"),
            client_key: concat!($prefix, "CLIENT_KEY"),
        }
    };
}

const GENERAL: Variables = variables!("OTEL_EXPORTER_OTLP_");
const TRACES: Variables = variables!("OTEL_EXPORTER_OTLP_TRACES_");
const METRICS: Variables = variables!("OTEL_EXPORTER_OTLP_METRICS_");
const LOGS: Variables = variables!("OTEL_EXPORTER_OTLP_LOGS_");

impl Signal {
    const fn variables(self) -> &'static Variables {
        match self {
            Self::Traces => &TRACES,
            Self::Metrics => &METRICS,
            Self::Logs => &LOGS,
        }
    }

    /// The variable that chooses exporters.
    const fn exporter(self) -> &'static str {
        match self {
            Self::Traces => "OTEL_TRACES_EXPORTER",
            Self::Metrics => "OTEL_METRICS_EXPORTER",
            Self::Logs => "OTEL_LOGS_EXPORTER",
        }
    }

    /// What is appended to an endpoint for all signals.
    const fn path(self) -> &'static str {
        match self {
            Self::Traces => "/v1/traces",
            Self::Metrics => "/v1/metrics",
            Self::Logs => "/v1/logs",
        }
    }

    /// The gRPC method.
    const fn method(self) -> &'static str {
        match self {
            Self::Traces => "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
            Self::Metrics => "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
            Self::Logs => "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
        }
    }
}

/// How it is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Protobuf over HTTP/1.1.
    Http,
    /// gRPC, which is protobuf over HTTP/2.
    Grpc,
}

/// URL that is posted to. May hold a password, so that showing it leaves that out.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint(Url);

impl Endpoint {
    /// The URL with everything in it.
    pub(super) fn url(&self) -> &Url {
        &self.0
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut url = self.0.clone();
        // Fails only for URLs without a host, which have no user either.
        let _ = url.set_username("");
        let _ = url.set_password(None);
        url.set_query(None);
        url.fmt(f)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where to, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Address.
    pub endpoint: Endpoint,
    /// Protocol.
    pub protocol: Protocol,
    /// Headers to add to each request. Showing them leaves the values out.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// How long one export may take.
    pub timeout: Duration,
    /// Whether requests are compressed.
    pub gzip: bool,
    /// File with the only certificates to trust.
    pub certificate: Option<PathBuf>,
    /// Files with our certificate and its key.
    pub client: Option<(PathBuf, PathBuf)>,
}

/// Whether a signal is exported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Export {
    /// No.
    Off {
        /// The variable that this is due to.
        setting: &'static str,
        /// In words.
        why: String,
        /// Whether export was asked for in a way that cannot be followed.
        mistaken: bool,
    },
    /// With OTLP.
    On {
        /// Where to, and how.
        target: Box<Target>,
        /// The variable that says so.
        setting: &'static str,
        /// Variables that could not be followed, and why. The rest holds.
        notices: Vec<(&'static str, String)>,
    },
}

/// A variable, by name, and its value.
type Given = (&'static str, String);

impl Export {
    /// Decides from the environment. Without an endpoint nothing is exported, instead of to the
    /// specification's `localhost`, where in a container nobody listens.
    pub fn decide(env: &dyn Env, signal: Signal) -> Self {
        let own = signal.variables();
        let off = |setting, why: &str| Self::Off {
            setting,
            why: why.to_owned(),
            mistaken: false,
        };
        let mistaken = |setting, why: String| Self::Off {
            setting,
            why,
            mistaken: true,
        };
        let given = |specific, general| -> Option<Given> {
            [specific, general]
                .into_iter()
                .find_map(|name| Some((name, env.var_lossy(name)?.trim().to_owned())))
        };

        if env
            .var_lossy("OTEL_SDK_DISABLED")
            .is_some_and(|value| value.trim().eq_ignore_ascii_case("true"))
        {
            return off("OTEL_SDK_DISABLED", "switched off");
        }
        let Some((setting, address)) = given(own.endpoint, GENERAL.endpoint) else {
            return off(GENERAL.endpoint, "no endpoint is set");
        };
        if let Some(exporters) = env.var_lossy(signal.exporter()) {
            let mut exporters = exporters.split(',').map(str::trim);
            let is = |wanted| move |given: &str| given.eq_ignore_ascii_case(wanted);
            if !exporters.clone().any(is("otlp")) {
                let setting = signal.exporter();
                return if exporters.any(is("none")) {
                    off(setting, "switched off")
                } else {
                    mistaken(setting, "only otlp and none are supported".to_owned())
                };
            }
        }
        let protocol = match given(own.protocol, GENERAL.protocol) {
            None => Protocol::Http,
            Some((variable, value)) => match value.to_ascii_lowercase().as_str() {
                "http/protobuf" => Protocol::Http,
                "grpc" => Protocol::Grpc,
                _ => {
                    let why = format!(
                        "the protocol {value:?} is not supported; use http/protobuf, which \
                         collectors take on port 4318, or grpc, on port 4317"
                    );
                    return mistaken(variable, why);
                }
            },
        };
        let path = if setting == own.endpoint {
            ""
        } else {
            signal.path()
        };
        let endpoint = match endpoint(&address, protocol, path, signal.method()) {
            Ok(endpoint) => endpoint,
            Err(why) => return mistaken(setting, why),
        };

        let certificate = given(own.certificate, GENERAL.certificate);
        let chain = given(own.client_certificate, GENERAL.client_certificate);
        let key = given(own.client_key, GENERAL.client_key);
        // Taken for a path, the key itself would be in the error.
        let pasted = [&certificate, &chain, &key]
            .into_iter()
            .flatten()
            .find(|(_, value)| value.contains("-----BEGIN"));
        if let Some((name, _)) = pasted {
            let why = "the value is PEM itself instead of the path of a file with it";
            return mistaken(name, why.to_owned());
        }

        let mut notices = Vec::new();
        let headers = match given(own.headers, GENERAL.headers) {
            None => Vec::new(),
            Some((name, value)) => headers(&value, |why| notices.push((name, why))),
        };
        let timeout = given(own.timeout, GENERAL.timeout).and_then(|(name, value)| {
            let millis = value.parse::<u64>().ok().filter(|ms| *ms > 0);
            if millis.is_none() {
                let why = "not a number of milliseconds; 10000 is used";
                notices.push((name, why.to_owned()));
            }
            millis.map(Duration::from_millis)
        });
        let gzip = match given(own.compression, GENERAL.compression) {
            Some((_, value)) if value.eq_ignore_ascii_case("gzip") => true,
            Some((name, value)) if !value.eq_ignore_ascii_case("none") => {
                let why = "only gzip and none are supported; requests are not compressed";
                notices.push((name, why.to_owned()));
                false
            }
            _ => false,
        };
        let client = match (chain, key) {
            (Some((_, chain)), Some((_, key))) => Some((chain.into(), key.into())),
            (None, None) => None,
            (Some((name, _)), None) | (None, Some((name, _))) => {
                let why = "of certificate and key, one is not set; neither is used";
                notices.push((name, why.to_owned()));
                None
            }
        };
        Self::On {
            target: Box::new(Target {
                endpoint,
                protocol,
                headers,
                timeout: timeout.unwrap_or(DEFAULT_TIMEOUT),
                gzip,
                certificate: certificate.map(|(_, path)| path.into()),
                client,
            }),
            setting,
            notices,
        }
    }

    /// Where to, and how, if at all.
    pub fn target(&self) -> Option<&Target> {
        match self {
            Self::On { target, .. } => Some(target),
            Self::Off { .. } => None,
        }
    }
}

/// The URL to post to. gRPC knows methods instead of paths. What is wrong is told without the value,
/// which may hold a password.
fn endpoint(
    address: &str,
    protocol: Protocol,
    path: &str,
    method: &str,
) -> Result<Endpoint, String> {
    let example = match protocol {
        Protocol::Http => "http://collector:4318",
        Protocol::Grpc => "http://collector:4317",
    };
    let refused = || format!("the value is not a URL such as {example}");
    // The endpoint of a signal has no path to append and is taken as it is.
    let text = match protocol {
        Protocol::Http if !path.is_empty() => format!("{}{path}", address.trim_end_matches('/')),
        Protocol::Http | Protocol::Grpc => address.to_owned(),
    };
    match Url::parse(&text) {
        Ok(mut url) if matches!(url.scheme(), "http" | "https") && url.has_host() => {
            if protocol == Protocol::Grpc {
                url.set_path(method);
                url.set_query(None);
            }
            // Hosts such as `${COLLECTOR}` make a URL, but no request.
            url.as_str().parse::<Uri>().map_err(|_| refused())?;
            Ok(Endpoint(url))
        }
        Ok(_) | Err(_) => Err(refused()),
    }
}

/// Headers as the specification has them: `name=value,…`, values percent-encoded. Says what cannot
/// be used, without repeating what may be a secret.
fn headers(value: &str, mut tell: impl FnMut(String)) -> Vec<(HeaderName, HeaderValue)> {
    let mut headers = Vec::new();
    for (n, pair) in value.split(',').enumerate() {
        if pair.trim().is_empty() {
            continue;
        }
        let header = pair.split_once('=').and_then(|(name, value)| {
            let name = HeaderName::from_bytes(name.trim().as_bytes()).ok()?;
            let mut value = HeaderValue::from_str(&decode(value.trim())).ok()?;
            value.set_sensitive(true);
            Some((name, value))
        });
        match header {
            Some(header) => headers.push(header),
            None => tell(format!(
                "entry {} is not a header as in name=value; it is left out",
                n + 1
            )),
        }
    }
    headers
}

/// Attributes of the resource: ours, then `OTEL_RESOURCE_ATTRIBUTES`, then `OTEL_SERVICE_NAME`;
/// later ones win (OpenTelemetry specification, SDK environment variables).
pub fn resource_attributes(env: &dyn Env, gateway_id: &str) -> Vec<(String, String)> {
    let mut attributes = vec![
        (names::SERVICE_NAME, "firezone-gateway".to_owned()),
        (names::SERVICE_VERSION, env!("CARGO_PKG_VERSION").to_owned()),
        (names::SERVICE_INSTANCE_ID, instance_id(gateway_id)),
        (names::OS_TYPE, std::env::consts::OS.to_owned()),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect::<Vec<_>>();
    if let Some(given) = env.var_lossy("OTEL_RESOURCE_ATTRIBUTES") {
        attributes.extend(
            given
                .split(',')
                .filter_map(|pair| pair.split_once('='))
                .map(|(name, value)| (name.trim().to_owned(), decode(value.trim())))
                .filter(|(name, _)| !name.is_empty()),
        );
    }
    if let Some(name) = env.var_lossy("OTEL_SERVICE_NAME") {
        attributes.push((names::SERVICE_NAME.to_owned(), name));
    }
    attributes
}

/// Stable for a gateway, unique among gateways, and of no use at the portal: a UUID from the hash
/// of the gateway's id.
fn instance_id(gateway_id: &str) -> String {
    let hash = Sha256::new()
        .chain_update(b"service.instance.id\0")
        .chain_update(gateway_id.as_bytes())
        .finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash[..16]);
    uuid::Builder::from_custom_bytes(bytes)
        .into_uuid()
        .to_string()
}

/// Values are percent-encoded (W3C Baggage); what is not well encoded is taken as it is.
pub(crate) fn decode(value: &str) -> String {
    let bytes = value.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escaped = bytes
            .get(at..at + 3)
            .filter(|escape| escape[0] == b'%')
            .and_then(|escape| hex::decode(&escape[1..]).ok());
        match escaped {
            Some(byte) => {
                decoded.extend(byte);
                at += 3;
            }
            None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8(decoded).unwrap_or_else(|_| value.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use uuid::Uuid;

    use super::*;
    use crate::config::FixedEnv;

    fn decide(variables: &[(&str, &str)]) -> Export {
        Export::decide(
            &variables.iter().copied().collect::<FixedEnv>(),
            Signal::Traces,
        )
    }

    const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
    const TRACES_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";

    #[test]
    fn each_signal_has_its_own_variables() {
        let env: FixedEnv = [
            (ENDPOINT, "http://c:4318"),
            ("OTEL_TRACES_EXPORTER", "none"),
            ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://m/x"),
        ]
        .into_iter()
        .collect();
        let metrics = Export::decide(&env, Signal::Metrics);
        assert_eq!(
            metrics.target().unwrap().endpoint.url().as_str(),
            "http://m/x"
        );
        assert!(matches!(
            Export::decide(&env, Signal::Traces),
            Export::Off { .. }
        ));
        let env: FixedEnv = [
            (ENDPOINT, "http://c:4318"),
            ("OTEL_METRICS_EXPORTER", "none"),
        ]
        .into_iter()
        .collect();
        assert!(matches!(
            Export::decide(&env, Signal::Metrics),
            Export::Off { .. }
        ));
    }

    fn endpoint(variables: &[(&str, &str)]) -> Option<String> {
        let decision = decide(variables);
        Some(decision.target()?.endpoint.url().to_string())
    }

    #[test]
    fn nothing_is_exported_without_an_endpoint() {
        assert_eq!(endpoint(&[]), None);
        assert_eq!(endpoint(&[("OTEL_TRACES_EXPORTER", "otlp")]), None);
        assert_eq!(endpoint(&[(ENDPOINT, "")]), None);
    }

    #[test]
    fn base_endpoint_gets_the_path_and_the_signal_endpoint_does_not() {
        let traces = Some("http://c:4318/v1/traces".to_owned());
        assert_eq!(endpoint(&[(ENDPOINT, "http://c:4318")]), traces);
        assert_eq!(endpoint(&[(ENDPOINT, "http://c:4318/")]), traces);
        assert_eq!(
            endpoint(&[(ENDPOINT, "http://c:4318/otlp")]),
            Some("http://c:4318/otlp/v1/traces".into())
        );
        assert_eq!(
            endpoint(&[(ENDPOINT, "http://a"), (TRACES_ENDPOINT, "http://b/x")]),
            Some("http://b/x".into())
        );
        assert_eq!(
            endpoint(&[(TRACES_ENDPOINT, "http://b/x/")]),
            Some("http://b/x/".into())
        );
    }

    #[test]
    fn switches_decide_as_the_specification_says() {
        let on = (ENDPOINT, "http://c:4318");
        for (variable, value, exported) in [
            ("OTEL_SDK_DISABLED", "true", false),
            ("OTEL_SDK_DISABLED", "TRUE", false),
            ("OTEL_SDK_DISABLED", "false", true),
            ("OTEL_SDK_DISABLED", "1", true),
            ("OTEL_TRACES_EXPORTER", "none", false),
            ("OTEL_TRACES_EXPORTER", "otlp", true),
            ("OTEL_TRACES_EXPORTER", "console, otlp", true),
            ("OTEL_TRACES_EXPORTER", "", true),
            ("OTEL_TRACES_EXPORTER", "OTLP", true),
            ("OTEL_TRACES_EXPORTER", "None", false),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", true),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "HTTP/Protobuf", true),
        ] {
            assert_eq!(
                endpoint(&[on, (variable, value)]).is_some(),
                exported,
                "{variable}={value}"
            );
        }
    }

    #[test]
    fn what_cannot_be_followed_is_told_and_off() {
        let on = (ENDPOINT, "http://c:4318");
        for variables in [
            vec![on, ("OTEL_TRACES_EXPORTER", "zipkin")],
            vec![on, ("OTEL_EXPORTER_OTLP_PROTOCOL", "gRPC-web")],
            vec![on, ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json")],
            vec![(ENDPOINT, "ftp://c:4318")],
            vec![(ENDPOINT, "collector:4318")],
            vec![(ENDPOINT, "not a url")],
            vec![(ENDPOINT, "http://user:hunter2@${COLLECTOR}:4318")],
            vec![(TRACES_ENDPOINT, "https://user:hunter2@{{ host }}/v1/traces")],
            vec![
                (ENDPOINT, "http://user:hunter2@${COLLECTOR}:4317"),
                ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ],
        ] {
            let decision = decide(&variables);
            assert!(
                matches!(decision, Export::Off { mistaken: true, .. }),
                "{variables:?} gave {decision:?}"
            );
            assert!(!format!("{decision:?}").contains("hunter2"), "{decision:?}");
        }
    }

    #[test]
    fn protocol_of_the_signal_wins_over_the_general_one() {
        let both = [
            (ENDPOINT, "http://c:4318"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf"),
        ];
        let protocol = |variables| decide(variables).target().unwrap().protocol;
        assert_eq!(protocol(&both), Protocol::Http);
        assert_eq!(protocol(&both[..2]), Protocol::Grpc);
        let spelt = [both[0], ("OTEL_EXPORTER_OTLP_PROTOCOL", "gRPC")];
        assert_eq!(protocol(&spelt), Protocol::Grpc);
        assert_eq!(protocol(&both[..1]), Protocol::Http);
    }

    #[test]
    fn grpc_takes_the_address_alone() {
        let grpc = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
        for (variable, address) in [
            (ENDPOINT, "http://c:4317"),
            (ENDPOINT, "http://c:4317/"),
            (TRACES_ENDPOINT, "http://c:4317/v1/traces"),
        ] {
            assert_eq!(
                endpoint(&[grpc, (variable, address)]).unwrap(),
                "http://c:4317/opentelemetry.proto.collector.trace.v1.TraceService/Export"
            );
        }
    }

    #[test]
    fn further_settings_of_the_signal_win_and_what_cannot_be_followed_is_told() {
        let with = |variables: &[(&'static str, &'static str)]| {
            let mut all = vec![(ENDPOINT, "https://c:4318")];
            all.extend(variables);
            match decide(&all) {
                Export::On {
                    target, notices, ..
                } => (*target, notices),
                off => panic!("{off:?}"),
            }
        };
        let (plain, notices) = with(&[]);
        assert_eq!(plain.timeout, Duration::from_secs(10));
        assert!(!plain.gzip && plain.headers.is_empty() && notices.is_empty());
        assert_eq!((plain.certificate, plain.client), (None, None));

        let (target, notices) = with(&[
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "1000"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2500"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "GZIP"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca.pem"),
            ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "/us.pem"),
            ("OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY", "/us.key"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "other=1"),
            (
                "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
                "Authorization=Bearer%20hunter2, x-scope = a=b,",
            ),
        ]);
        assert_eq!(notices, []);
        assert_eq!(target.timeout, Duration::from_millis(2500));
        assert!(target.gzip);
        assert_eq!(target.certificate, Some("/ca.pem".into()));
        assert_eq!(target.client, Some(("/us.pem".into(), "/us.key".into())));
        let headers: Vec<_> = target
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.to_str().unwrap()))
            .collect();
        assert_eq!(
            headers,
            [("authorization", "Bearer hunter2"), ("x-scope", "a=b")]
        );
        assert!(!format!("{target:?}").contains("hunter2"), "{target:?}");

        let (target, notices) = with(&[
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=1,hunter2,b b=hunter2"),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/us.key"),
        ]);
        assert_eq!(target.timeout, Duration::from_secs(10));
        assert!(!target.gzip);
        assert_eq!((target.headers.len(), target.client), (1, None));
        let named: Vec<_> = notices.iter().map(|(name, _)| *name).collect();
        assert_eq!(
            named,
            [
                "OTEL_EXPORTER_OTLP_HEADERS",
                "OTEL_EXPORTER_OTLP_HEADERS",
                "OTEL_EXPORTER_OTLP_TIMEOUT",
                "OTEL_EXPORTER_OTLP_COMPRESSION",
                "OTEL_EXPORTER_OTLP_CLIENT_KEY",
            ]
        );
        assert!(!format!("{notices:?}").contains("hunter2"), "{notices:?}");
    }

    #[test]
    fn a_key_in_place_of_its_path_is_refused_without_being_shown() {
        let key = "OTEL_EXPORTER_OTLP_CLIENT_KEY";
        let decision = decide(&[
            (ENDPOINT, "https://c:4318"),
            ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "/us.pem"),
            (key, "-----BEGIN PRIVATE KEY-----\nhunter2"),
        ]);
        assert!(
            matches!(&decision, Export::Off { setting, mistaken: true, .. } if *setting == key),
            "{decision:?}"
        );
        assert!(!format!("{decision:?}").contains("hunter2"), "{decision:?}");
    }

    #[test]
    fn switched_off_wins_over_a_broken_endpoint() {
        let decision = decide(&[(ENDPOINT, "nonsense"), ("OTEL_TRACES_EXPORTER", "none")]);
        assert!(matches!(
            decision,
            Export::Off {
                mistaken: false,
                ..
            }
        ));
    }

    #[test]
    fn password_in_the_endpoint_is_used_but_never_shown() {
        let decision = decide(&[(ENDPOINT, "http://user:hunter2@c:4318")]);
        let endpoint = &decision.target().unwrap().endpoint;
        assert_eq!(endpoint.url().password(), Some("hunter2"));
        assert_eq!(endpoint.to_string(), "http://c:4318/v1/traces");
        assert!(!format!("{decision:?}").contains("hunter2"));
    }

    fn attributes(variables: &[(&str, &str)]) -> std::collections::HashMap<String, String> {
        let env: FixedEnv = variables.iter().copied().collect();
        resource_attributes(&env, "edge-7").into_iter().collect()
    }

    #[test]
    fn service_name_follows_the_order_of_the_specification() {
        let name = |variables: &[_]| attributes(variables)["service.name"].clone();
        let in_attributes = ("OTEL_RESOURCE_ATTRIBUTES", "service.name=b");

        assert_eq!(name(&[]), "firezone-gateway");
        assert_eq!(name(&[in_attributes]), "b");
        assert_eq!(name(&[in_attributes, ("OTEL_SERVICE_NAME", "c")]), "c");
    }

    #[test]
    fn resource_attributes_are_decoded_and_bad_ones_skipped() {
        let attributes = attributes(&[(
            "OTEL_RESOURCE_ATTRIBUTES",
            "a=1, b = two%20words,nothing,=x,c=50%,d=%ff,e=x=y",
        )]);
        assert_eq!(attributes["a"], "1");
        assert_eq!(attributes["b"], "two words");
        assert_eq!(attributes["c"], "50%");
        assert_eq!(attributes["d"], "%ff");
        assert_eq!(attributes["e"], "x=y");
        assert!(!attributes.contains_key("nothing") && !attributes.contains_key(""));
        assert_eq!(attributes["service.version"], env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn instance_id_is_stable_distinct_and_hides_the_gateway_id() {
        let env = FixedEnv::default();
        let id = |gateway: &str| {
            resource_attributes(&env, gateway)
                .into_iter()
                .find(|(name, _)| name == "service.instance.id")
                .unwrap()
                .1
        };
        assert_eq!(id("edge-7"), id("edge-7"));
        assert_ne!(id("edge-7"), id("edge-8"));
        assert!(!id("edge-7").contains("edge"));
        assert!(Uuid::parse_str(&id("edge-7")).is_ok());
    }
}
