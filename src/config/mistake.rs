//! What is wrong with the configuration, in an operator's words.

use std::fmt;

/// A setting that cannot be used. The gateway does not start with any of these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Environment variable of the setting.
    pub setting: &'static str,
    /// Where the value came from, when that is not the variable itself, e.g. `--api-url`.
    pub given_as: Option<&'static str>,
    /// What is wrong.
    pub problem: String,
    /// What to set instead.
    pub fix: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.given_as {
            Some(flag) => write!(f, "{flag} ({})", self.setting)?,
            None => f.write_str(self.setting)?,
        }
        write!(f, ": {}. {}", self.problem, self.fix)
    }
}

impl std::error::Error for Mistake {}

/// Something that works, but probably not as meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Environment variable, flag or file that this is about.
    pub setting: String,
    /// What to know.
    pub message: String,
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.setting, self.message)
    }
}

/// A value of the user's in a message: quoted, without control characters, and not endless.
pub(super) fn shown(value: &str) -> String {
    const LONGEST: usize = 80;
    let mut text: String = value.chars().take(LONGEST).collect();
    if value.chars().count() > LONGEST {
        text.push('…');
    }
    format!("{text:?}")
}
