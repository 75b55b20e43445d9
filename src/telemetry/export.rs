//! Whether and where spans and metrics are exported, from the standard `OTEL_*` variables, including those that
//! the SDK does not read itself.

use std::fmt;

use sha2::{Digest as _, Sha256};
use url::Url;

use super::names;
use crate::config::Env;

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const PROTOCOL: &str = "OTEL_EXPORTER_OTLP_PROTOCOL";

/// What is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Spans.
    Traces,
    /// Values of instruments.
    Metrics,
}

/// The variables of one signal.
struct Variables {
    endpoint: &'static str,
    path: &'static str,
    exporter: &'static str,
    protocol: &'static str,
}

impl Signal {
    fn variables(self) -> Variables {
        match self {
            Self::Traces => Variables {
                endpoint: "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
                path: "/v1/traces",
                exporter: "OTEL_TRACES_EXPORTER",
                protocol: "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
            },
            Self::Metrics => Variables {
                endpoint: "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
                path: "/v1/metrics",
                exporter: "OTEL_METRICS_EXPORTER",
                protocol: "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL",
            },
        }
    }
}

/// URL that is posted to. May hold a password, so that showing it leaves that out.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint(Url);

impl Endpoint {
    /// The URL with everything in it.
    pub(super) fn expose(&self) -> &str {
        self.0.as_str()
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
    /// With OTLP over HTTP, as protobuf.
    On {
        /// Where to.
        endpoint: Endpoint,
        /// The variable that says so.
        setting: &'static str,
    },
}

impl Export {
    /// Decides from the environment. Without an endpoint nothing is exported, instead of to the
    /// specification's `localhost`, where in a container nobody listens.
    pub fn decide(env: &dyn Env, signal: Signal) -> Self {
        let variables = signal.variables();
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

        if env
            .var_lossy("OTEL_SDK_DISABLED")
            .is_some_and(|value| value.trim().eq_ignore_ascii_case("true"))
        {
            return off("OTEL_SDK_DISABLED", "switched off");
        }
        let (setting, given, path) = match env.var_lossy(variables.endpoint) {
            Some(given) => (variables.endpoint, given, ""),
            None => match env.var_lossy(ENDPOINT) {
                Some(given) => (ENDPOINT, given, variables.path),
                None => return off(ENDPOINT, "no endpoint is set"),
            },
        };
        if let Some(exporters) = env.var_lossy(variables.exporter) {
            let mut exporters = exporters.split(',').map(str::trim);
            if !exporters.clone().any(|exporter| exporter == "otlp") {
                let setting = variables.exporter;
                return if exporters.any(|exporter| exporter == "none") {
                    off(setting, "switched off")
                } else {
                    mistaken(setting, "only otlp and none are supported".to_owned())
                };
            }
        }
        for variable in [variables.protocol, PROTOCOL] {
            match env.var_lossy(variable).as_deref().map(str::trim) {
                None => {}
                Some("http/protobuf") => break,
                Some(other) => {
                    return mistaken(
                        variable,
                        format!(
                            "the protocol {other:?} is not supported; use http/protobuf, which \
                             collectors take on port 4318"
                        ),
                    );
                }
            }
        }
        let text = format!("{}{path}", given.trim().trim_end_matches('/'));
        match Url::parse(&text) {
            Ok(url) if url.scheme() == "http" && url.has_host() => Self::On {
                endpoint: Endpoint(url),
                setting,
            },
            Ok(url) if url.scheme() == "https" => mistaken(
                setting,
                "https is not supported; send to a collector nearby over http, and let it pass on \
                 what it gets"
                    .to_owned(),
            ),
            Ok(_) | Err(_) => mistaken(
                setting,
                "the value is not a URL such as http://collector:4318".to_owned(),
            ),
        }
    }
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
fn decode(value: &str) -> String {
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
        let Export::On { endpoint, .. } = Export::decide(&env, Signal::Metrics) else {
            panic!("off");
        };
        assert_eq!(endpoint.expose(), "http://m/x");
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
        match decide(variables) {
            Export::On { endpoint, .. } => Some(endpoint.expose().to_owned()),
            Export::Off { .. } => None,
        }
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
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", true),
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
            vec![on, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")],
            vec![on, ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json")],
            vec![(ENDPOINT, "https://c:4318")],
            vec![(ENDPOINT, "collector:4318")],
            vec![(ENDPOINT, "not a url")],
        ] {
            let decision = decide(&variables);
            assert!(
                matches!(decision, Export::Off { mistaken: true, .. }),
                "{variables:?} gave {decision:?}"
            );
        }
    }

    #[test]
    fn protocol_of_the_signal_wins_over_the_general_one() {
        assert!(
            endpoint(&[
                (ENDPOINT, "http://c:4318"),
                ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
                ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf"),
            ])
            .is_some()
        );
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
        let Export::On { endpoint, .. } = &decision else {
            panic!("{decision:?}");
        };
        assert!(endpoint.expose().contains("hunter2"));
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
