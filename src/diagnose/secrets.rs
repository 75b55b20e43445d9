//! Secrets that are known here. Nothing that goes into the archive is meant to hold any; what does
//! by mistake, such as a server's message that quotes what it was sent, is cleaned.

use secrecy::ExposeSecret as _;
use url::Url;

use crate::config::{Env, Examination, Settings, admin_token};
use crate::telemetry;

const REMOVED: &str = "[REMOVED]";
/// Shorter ones would tear holes into everything, and hide nothing.
const SHORTEST: usize = 4;

/// Secrets in the settings, the longest first: one may be part of another.
pub(super) struct Secrets(Vec<String>);

impl Secrets {
    pub(super) fn of(settings: &Settings, env: &dyn Env, examination: &Examination) -> Self {
        let mut found = Vec::new();
        // The settings may have mistakes, and be all the more interesting.
        found.extend(settings.token.as_ref().map(|t| t.expose().to_owned()));
        found.extend(env.var_lossy("FIREZONE_TOKEN"));
        // A token may be the path of the file that holds it, which is worth knowing.
        found.retain(|token| !token.starts_with('/'));
        if let Some(config) = &examination.config {
            found.push(config.token.expose_secret().to_owned());
        }
        if let Ok(Some(token)) = admin_token(settings, env)
            && let Ok(token) = token.read()
        {
            found.push(token.expose_secret().to_owned());
        }
        for name in env.names() {
            let value = || env.var_lossy(&name).unwrap_or_default();
            if name.starts_with("OTEL_") && name.ends_with("_HEADERS") {
                headers(&value(), &mut found);
            } else if name.starts_with("OTEL_") && name.ends_with("_ENDPOINT") {
                password(&value(), &mut found);
            }
        }
        found.retain(|secret| secret.trim().len() >= SHORTEST);
        for secret in &mut found {
            *secret = secret.trim().to_owned();
        }
        found.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        found.dedup();
        Self(found)
    }

    /// The text without them.
    pub(super) fn remove(&self, text: &str) -> String {
        let cleaned = |text: String, secret: &String| text.replace(secret, REMOVED);
        self.0.iter().fold(text.to_owned(), cleaned)
    }
}

/// Values of `name=value,name=value`, as they are written and as they are sent.
fn headers(text: &str, found: &mut Vec<String>) {
    for value in text
        .split(',')
        .filter_map(|pair| Some(pair.split_once('=')?.1))
    {
        let value = value.trim().trim_matches('"');
        let decoded = telemetry::decode(value);
        // `Bearer TOKEN`: the token alone is one, too.
        found.extend(decoded.split_whitespace().skip(1).map(str::to_owned));
        found.push(decoded);
        found.push(value.to_owned());
    }
}

fn password(text: &str, found: &mut Vec<String>) {
    if let Ok(url) = Url::parse(text)
        && let Some(password) = url.password()
    {
        found.push(telemetry::decode(password));
        found.push(password.to_owned());
    }
}
