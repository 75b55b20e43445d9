//! Where settings are read from. Behind a trait, so that tests need not touch the environment of
//! the whole process.

use std::collections::BTreeMap;

/// A set of environment variables.
pub trait Env {
    /// The value of `name`; `None` when unset or empty, because compose files turn an unset
    /// variable into an empty one (`FIREZONE_ID: ${FIREZONE_ID:-}`).
    ///
    /// # Errors
    /// The value is not UTF-8.
    fn var(&self, name: &str) -> Result<Option<String>, NotUnicode>;

    /// Names of all variables, in no order.
    fn names(&self) -> Vec<String>;

    /// Like [`var`](Self::var), for variables where an unreadable value is as good as none.
    fn var_lossy(&self, name: &str) -> Option<String> {
        self.var(name).ok().flatten()
    }
}

/// The value of a variable is not UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotUnicode;

/// The environment of the process.
#[derive(Debug, Clone, Copy, Default)]
pub struct ProcessEnv;

impl Env for ProcessEnv {
    fn var(&self, name: &str) -> Result<Option<String>, NotUnicode> {
        match std::env::var_os(name) {
            None => Ok(None),
            Some(value) => match value.into_string() {
                Ok(value) => Ok(Some(value).filter(|value| !value.is_empty())),
                Err(_) => Err(NotUnicode),
            },
        }
    }

    fn names(&self) -> Vec<String> {
        std::env::vars_os()
            .filter_map(|(name, _)| name.into_string().ok())
            .collect()
    }
}

/// Fixed variables.
#[derive(Clone, Default)]
pub struct FixedEnv(BTreeMap<String, String>);

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for FixedEnv {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(variables: I) -> Self {
        Self(
            variables
                .into_iter()
                .map(|(name, value)| (name.into(), value.into()))
                .collect(),
        )
    }
}

impl Env for FixedEnv {
    fn var(&self, name: &str) -> Result<Option<String>, NotUnicode> {
        Ok(self.0.get(name).filter(|value| !value.is_empty()).cloned())
    }

    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }
}
