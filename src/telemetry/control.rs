//! What can be done about log lines while the process runs.

use std::fmt;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

use super::libraries::Libraries;
use super::recent::Recent;
use crate::kept_files;

/// Longest filter in bytes.
pub const LONGEST_FILTER: usize = 4096;

/// Target of the lines that tell of another filter. They come out whatever the filters say: who
/// reads a log must learn why it went quiet.
const CHANGES: &str = "firezone_gateway::telemetry::log_filter";

/// A handle to the log. Clones share everything.
#[derive(Debug, Clone, Default)]
pub struct LogControl {
    libraries: Libraries,
    filter: Arc<Mutex<Filter>>,
    recent: Recent,
}

/// Puts a filter into force.
pub(super) type Apply = Box<dyn Fn(EnvFilter) + Send>;

#[derive(Default)]
struct Filter {
    current: String,
    /// The one of the settings.
    configured: String,
    file: Option<PathBuf>,
    /// `None` where nothing is logged, as in tests.
    apply: Option<Apply>,
}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Filter").field(&self.current).finish()
    }
}

/// Why a text is no filter.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// It means nothing, and would silently be taken for `error`.
    #[error(
        "it is empty; give a level such as info, directives such as info,firezone_gateway=debug, \
         or off"
    )]
    Empty,
    /// Nobody means this.
    #[error("it is longer than {LONGEST_FILTER} bytes")]
    TooLong,
    /// It is not in the syntax of `RUST_LOG`.
    #[error("{0}")]
    Syntax(#[from] ParseError),
    /// The file cannot be read.
    #[error("{0}")]
    File(#[from] io::Error),
}

/// Reads a filter, without white space around its parts: the library counts from behind the space before
/// a part and cuts from in front of it, which gives wrong parts, or ends the process inside a letter
/// of more than one byte. It takes no regular expressions, of which a short one can be as large as memory.
///
/// # Errors
/// See [`FilterError`].
pub fn parse_filter(text: &str) -> Result<(String, EnvFilter), FilterError> {
    if text.len() > LONGEST_FILTER {
        return Err(FilterError::TooLong);
    }
    let parts: Vec<&str> = text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect();
    if parts.is_empty() {
        return Err(FilterError::Empty);
    }
    let text = parts.join(",");
    let filter = EnvFilter::builder().with_regex(false).parse(&text)?;
    let changes = format!("{CHANGES}=info").parse()?;
    Ok((text, filter.add_directive(changes)))
}

/// Reads the filter in a file.
///
/// # Errors
/// See [`FilterError`].
pub fn read_filter(path: &Path) -> Result<String, FilterError> {
    let mut bytes = Vec::new();
    kept_files::open(path)?
        .take(LONGEST_FILTER as u64 + 1)
        .read_to_end(&mut bytes)?;
    let text = String::from_utf8(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(parse_filter(&text)?.0)
}

impl LogControl {
    pub(super) fn new(configured: &str, file: Option<PathBuf>, apply: Apply) -> Self {
        Self {
            libraries: Libraries::default(),
            recent: Recent::default(),
            filter: Arc::new(Mutex::new(Filter {
                current: configured.to_owned(),
                configured: configured.to_owned(),
                file,
                apply: Some(apply),
            })),
        }
    }

    pub(super) fn libraries(&self) -> Libraries {
        self.libraries.clone()
    }

    pub(super) fn recent(&self) -> Recent {
        self.recent.clone()
    }

    /// The last lines at INFO and above, oldest first, whatever the filter says.
    pub fn recent_lines(&self) -> String {
        self.recent.text()
    }

    /// The filter in force.
    pub fn filter(&self) -> String {
        let filter = self.filter.lock().unwrap_or_else(PoisonError::into_inner);
        filter.current.clone()
    }

    /// Puts another filter into force, and logs that `by` wanted it.
    ///
    /// # Errors
    /// See [`FilterError`]. Nothing changes then.
    pub fn set_filter(&self, text: &str, by: &str) -> Result<(), FilterError> {
        let (text, parsed) = parse_filter(text)?;
        let mut filter = self.filter.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut filter.current, text.clone());
        if old == text {
            return Ok(());
        }
        if let Some(apply) = &filter.apply {
            apply(parsed);
        }
        tracing::info!(target: CHANGES, old, new = text, by, "Another log filter is in force");
        Ok(())
    }

    /// Puts the filter of the settings into force again, as its file has it now if there is one.
    ///
    /// # Errors
    /// See [`FilterError`]. Nothing changes then.
    pub fn reset_filter(&self, by: &str) -> Result<(), FilterError> {
        let (file, configured) = {
            let filter = self.filter.lock().unwrap_or_else(PoisonError::into_inner);
            (filter.file.clone(), filter.configured.clone())
        };
        let wanted = match file {
            Some(path) => read_filter(&path)?,
            None => configured,
        };
        self.set_filter(&wanted, by)
    }

    /// Logs how much of what libraries had to say was held back; to be called now and then.
    pub fn tell(&self) {
        for (library, suppressed) in self.libraries.overdue(Instant::now()) {
            tracing::info!(library, suppressed, "A library repeats itself");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn spaces_around_the_parts_of_a_filter_mean_nothing() {
        for text in [
            " warn, firezone_gateway=debug ,,",
            "warn,firezone_gateway=debug",
            "warn,\nfirezone_gateway=debug\n",
        ] {
            let (text, filter) = parse_filter(text).unwrap();
            assert_eq!(text, "warn,firezone_gateway=debug");
            let shown = filter.to_string();
            assert!(shown.contains("firezone_gateway=debug"), "{shown}");
        }
        for nothing in ["", " ", " , ,"] {
            assert!(matches!(parse_filter(nothing), Err(FilterError::Empty)));
        }
    }

    #[test]
    fn letters_of_more_than_one_byte_behind_a_space_are_no_end() {
        for (text, is_filter) in [
            ("info, \u{e9}=debug", true),
            ("info,  \u{1f600}", false),
            ("\u{2003}x=debug", true),
        ] {
            assert_eq!(parse_filter(text).is_ok(), is_filter, "{text}");
        }
    }

    #[test]
    fn a_regular_expression_that_would_not_fit_into_memory_is_plain_text() {
        let expression = format!("[{{a=(a|b)*a{}}}]=info", "(a|b)".repeat(30));
        let (text, _) = parse_filter(&expression).unwrap();
        assert_eq!(text, expression);
    }
}
