//! The pages.

use std::fmt::Write as _;
use std::net::IpAddr;

use axum::{
    Json, Router,
    body::Body,
    extract::{ConnectInfo, DefaultBodyLimit, Query, Request, State},
    http::{
        HeaderMap, HeaderName, HeaderValue, StatusCode,
        header::{
            ACCEPT, AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY,
            CONTENT_TYPE, HOST, REFERRER_POLICY, WWW_AUTHENTICATE,
        },
        uri::Authority,
    },
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};

use super::{
    AdminState, Moment, Offer, Report,
    listener::{Caller, Peer},
    table::duration,
};
use crate::config::Probe;
use crate::telemetry::{FilterError, LONGEST_FILTER};

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

const INDEX: &str = "\
firezone-gateway; with a browser, this is a page that shows what it is doing

/livez     200 while the process works; also as /healthz. For restarts.
/startupz  200 once the device is up, the host can forward and the portal has sent its
           configuration. For start-up gates.
/readyz    200 while joined to the portal, with a working device, a host that forwards and a
           usable relay, and not shutting down. For monitoring and rollouts, never for restarts.
/status    What the gateway is doing, as JSON.
/events    The same once a second, with the answers of the probes, as server-sent events.
/metrics   Numbers for Prometheus.
/log-filter
           Which log lines are written; PUT another filter in the syntax of RUST_LOG, or DELETE it
           to go back to the settings. For those with the admin token or on the gateway's host.
/log       The last 1000 log lines at INFO and above. For the same.

The first three take ?verbose, ?exclude=NAME and `Accept: application/json`.
";

/// What there is where only the probes are.
const PROBES_ONLY: &str = "\
only /livez (/healthz), /startupz and /readyz are here, with ?verbose and ?exclude=NAME; page, status,
metrics and control are where FIREZONE_ADMIN_ADDR says
";

pub(super) fn router(state: AdminState, offer: Offer) -> Router {
    let probes = Router::new()
        .route("/healthz", get(live))
        .route("/livez", get(live))
        .route("/startupz", get(started))
        .route("/readyz", get(ready));
    let routes = match offer {
        Offer::Probes => probes.route("/", get(PROBES_ONLY)).fallback((
            StatusCode::NOT_FOUND,
            [(CONTENT_TYPE, TEXT)],
            PROBES_ONLY,
        )),
        Offer::Everything => probes.merge(guarded(&state)).fallback(unknown),
    };
    routes
        .layer(middleware::map_response(finish))
        .with_state(state)
}

fn guarded(state: &AdminState) -> Router<AdminState> {
    let control = Router::new()
        .route(
            "/log-filter",
            get(log_filter)
                .put(set_log_filter)
                .delete(reset_log_filter)
                .layer(DefaultBodyLimit::max(LARGEST_BODY)),
        )
        .route("/log", get(log))
        .layer(middleware::from_fn_with_state(state.clone(), control));
    Router::new()
        .route("/", get(index))
        .route("/page.css", get(style))
        .route("/page.js", get(script))
        .route("/status", get(status))
        .route("/events", get(events))
        .route("/metrics", get(metrics))
        .merge(control)
        .layer(middleware::from_fn_with_state(state.clone(), guard))
}

/// Lets those in who know the token. Probes are not asked: orchestrators could not answer.
async fn guard(State(state): State<AdminState>, request: Request, next: Next) -> Response {
    let Some(token) = &state.token else {
        return next.run(request).await;
    };
    let authorization = request.headers().get(AUTHORIZATION);
    let shown = authorization.and_then(|value| value.to_str().ok());
    match token.permits(shown) {
        Ok(true) => next.run(request).await,
        Ok(false) => {
            let ask =
                HeaderValue::from_static("Basic realm=\"firezone-gateway\", charset=\"UTF-8\"");
            let text = "this needs the admin token, as bearer or as password\n";
            (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, ask)], text).into_response()
        }
        Err(error) => {
            // Whoever reaches the port can ask as often as they like.
            if let Some(suppressed) = state.complaint() {
                let file = token.path().display();
                tracing::warn!(%file, %error, suppressed, "The admin token cannot be read");
            }
            let text = "the admin token cannot be read; see the log\n";
            (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
        }
    }
}

/// Largest body that is taken: a filter, and white space around it.
const LARGEST_BODY: usize = LONGEST_FILTER + 256;

/// Lets those in who may change something or read the log. [`guard`] has seen to the token, if there
/// is one. Without one whoever reaches the port may look, but this is for the host itself: neither
/// what came through a proxy that says so, nor a web page that has a browser here ask under a name
/// of its own (DNS rebinding).
async fn control(
    State(state): State<AdminState>,
    ConnectInfo(caller): ConnectInfo<Caller>,
    request: Request,
    next: Next,
) -> Response {
    let headers = request.headers();
    let forwarded = |name: &str| {
        matches!(name, "forwarded" | "via" | "x-real-ip")
            || name.starts_with("x-forwarded-")
            || name.starts_with("x-envoy-")
    };
    let local = caller.is_local()
        && (caller.peer == Peer::Unix || headers.get(HOST).is_some_and(names_this_host))
        && !headers.keys().any(|name| forwarded(name.as_str()));
    if state.token.is_some() || local {
        return next.run(request).await;
    }
    let text = "this is for whoever knows the admin token, and none is set; set \
                FIREZONE_ADMIN_TOKEN_FILE, or ask over a loopback address or a Unix socket of the \
                gateway's own host (in a container: from inside of it)\n";
    (StatusCode::FORBIDDEN, [(CONTENT_TYPE, TEXT)], text).into_response()
}

/// Whether a `Host` is a loopback address or `localhost`.
fn names_this_host(host: &HeaderValue) -> bool {
    let Ok(authority) = Authority::try_from(host.as_bytes()) else {
        return false;
    };
    let host = authority.host();
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || address
            .parse::<IpAddr>()
            .is_ok_and(|ip| ip.to_canonical().is_loopback())
}

async fn log_filter(State(state): State<AdminState>) -> Response {
    let text = format!("{}\n", state.log.filter());
    ([(CONTENT_TYPE, TEXT)], text).into_response()
}

/// The last log lines. They tell more of whom the gateway serves than the status does.
async fn log(State(state): State<AdminState>) -> Response {
    ([(CONTENT_TYPE, TEXT)], state.log.recent_lines()).into_response()
}

async fn set_log_filter(state: State<AdminState>, filter: String) -> Response {
    filter_changed(state.log.set_filter(&filter, "admin"), state).await
}

async fn reset_log_filter(state: State<AdminState>) -> Response {
    filter_changed(state.log.reset_filter("admin"), state).await
}

async fn filter_changed(changed: Result<(), FilterError>, state: State<AdminState>) -> Response {
    match changed {
        Ok(()) => log_filter(state).await,
        Err(error) => {
            let text = format!("no log filter: {error}\n");
            (StatusCode::BAD_REQUEST, [(CONTENT_TYPE, TEXT)], text).into_response()
        }
    }
}

/// One request per connection: the listener bounds a connection's life, and a client that kept it
/// for later would find it gone.
async fn finish(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(
        HeaderName::from_static("x-content-type-options"),
        HeaderValue::from_static("nosniff"),
    );
    response
}

/// Browsers get the page, everybody else the list.
async fn index(headers: HeaderMap) -> Response {
    let accepted = headers.get_all(ACCEPT).iter();
    let wants_page = accepted
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("text/html"));
    if wants_page {
        return page(HTML, include_str!("page/page.html"));
    }
    ([(CONTENT_TYPE, TEXT)], INDEX).into_response()
}

async fn style() -> Response {
    page(CSS, include_str!("page/page.css"))
}

async fn script() -> Response {
    page(SCRIPT, include_str!("page/page.js"))
}

const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");
const CSS: HeaderValue = HeaderValue::from_static("text/css; charset=utf-8");
const SCRIPT: HeaderValue = HeaderValue::from_static("text/javascript; charset=utf-8");

/// Nothing from elsewhere, nothing inline, and in nobody else's frame.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

fn page(kind: HeaderValue, content: &'static str) -> Response {
    let headers = [
        (CONTENT_TYPE, kind),
        (CONTENT_SECURITY_POLICY, POLICY),
        (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    ];
    (headers, content).into_response()
}

async fn unknown() -> Response {
    let body = "not found; see / for what there is\n";
    (StatusCode::NOT_FOUND, [(CONTENT_TYPE, TEXT)], body).into_response()
}

async fn status(State(state): State<AdminState>) -> Response {
    Json(&*state.complete_status().await).into_response()
}

const EVENTS: HeaderValue = HeaderValue::from_static("text/event-stream");

async fn events(
    State(state): State<AdminState>,
    ConnectInfo(caller): ConnectInfo<Caller>,
) -> Response {
    let Some(stream) = state.events.listen(&state, caller.lifetime()) else {
        let text = "too many look at once; /status has the same\n";
        return (
            StatusCode::SERVICE_UNAVAILABLE,
            [(CONTENT_TYPE, TEXT)],
            text,
        )
            .into_response();
    };
    let headers = [(CONTENT_TYPE, EVENTS), (CONTENT_SECURITY_POLICY, POLICY)];
    (headers, Body::from_stream(stream)).into_response()
}

/// The text format of Prometheus, version 0.0.4.
const PROMETHEUS: HeaderValue =
    HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

async fn metrics(State(state): State<AdminState>) -> Response {
    let Some(metrics) = &state.metrics else {
        return (StatusCode::NOT_FOUND, "no metrics here\n").into_response();
    };
    match metrics.render() {
        Ok(text) => ([(CONTENT_TYPE, PROMETHEUS)], text).into_response(),
        Err(error) => {
            let text = format!("metrics cannot be written: {error}\n");
            (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
        }
    }
}

type Parameters = Query<Vec<(String, String)>>;

async fn live(state: State<AdminState>, query: Parameters, headers: HeaderMap) -> Response {
    health(Probe::Live, "livez", &state, &query, &headers)
}

async fn started(state: State<AdminState>, query: Parameters, headers: HeaderMap) -> Response {
    health(Probe::Started, "startupz", &state, &query, &headers)
}

async fn ready(state: State<AdminState>, query: Parameters, headers: HeaderMap) -> Response {
    health(Probe::Ready, "readyz", &state, &query, &headers)
}

fn health(
    probe: Probe,
    page: &str,
    state: &AdminState,
    query: &[(String, String)],
    headers: &HeaderMap,
) -> Response {
    let now = Moment::now();
    let excluded: Vec<String> = query
        .iter()
        .filter(|(name, _)| name == "exclude")
        .map(|(_, value)| value.clone())
        .collect();
    let report = state.report(probe, now).excluding(&excluded);
    let code = if report.passed {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let wants_json = headers
        .get_all(ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("application/json"));
    if wants_json {
        return (code, Json(report)).into_response();
    }
    // A failure is always explained, as Kubernetes does.
    let verbose = !report.passed || query.iter().any(|(name, _)| name == "verbose");
    let body = if verbose {
        explain(page, &report, &excluded, now)
    } else {
        "ok".to_owned()
    };
    (code, [(CONTENT_TYPE, TEXT)], body).into_response()
}

/// The form of the Kubernetes API server.
fn explain(page: &str, report: &Report, excluded: &[String], now: Moment) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    for check in &report.checks {
        let sign = if check.ok { '+' } else { '-' };
        let _ = write!(text, "[{sign}]{} ", check.name);
        if check.excluded {
            let _ = write!(text, "excluded: ");
        }
        // Reasons quote what the portal and relays said; a line stays a line.
        let reason = check.reason.replace(char::is_control, " ");
        let _ = match (check.ok, reason.as_str()) {
            (true, "") => write!(text, "ok"),
            (true, note) => write!(text, "ok: {note}"),
            (false, reason) => {
                write!(text, "{reason} (for {})", duration(now.unix - check.since))
            }
        };
        text.push('\n');
    }
    for name in excluded {
        if !report.checks.iter().any(|check| check.name == *name) {
            let name = name.replace(char::is_control, " ");
            let _ = writeln!(text, "warn: there is no check {name:?} to exclude");
        }
    }
    let verdict = if report.passed { "passed" } else { "failed" };
    let _ = writeln!(text, "{page} check {verdict}");
    text
}
