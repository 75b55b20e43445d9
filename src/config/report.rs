//! What `check-config` prints, and what a start with mistakes prints.

use std::io::{self, Write};

use super::{Examination, Mistake};

/// Writes all settings in force, where they came from, and everything that is wrong with them.
///
/// # Errors
/// Writing failed.
pub fn print_examination(out: &mut dyn Write, examination: &Examination) -> io::Result<()> {
    let width = |text: fn(&super::SettingShown) -> &str| {
        examination
            .settings
            .iter()
            .map(|setting| text(setting).chars().count())
            .max()
            .unwrap_or(0)
    };
    let names = width(|setting| setting.name);
    let values = width(|setting| &setting.value).min(60);
    for setting in &examination.settings {
        writeln!(
            out,
            "{:names$}  {:values$}  ({})",
            setting.name, setting.value, setting.source
        )?;
    }
    if !examination.notices.is_empty() {
        writeln!(out, "\nNotices:")?;
        for notice in &examination.notices {
            writeln!(out, "  - {notice}")?;
        }
    }
    writeln!(out)?;
    if examination.mistakes.is_empty() {
        writeln!(out, "The configuration is complete.")
    } else {
        print_mistakes(out, &examination.mistakes)
    }
}

/// Writes a readable list of `mistakes`.
///
/// # Errors
/// Writing failed.
pub fn print_mistakes(out: &mut dyn Write, mistakes: &[Mistake]) -> io::Result<()> {
    match mistakes.len() {
        1 => writeln!(out, "The configuration has a mistake:")?,
        n => writeln!(out, "The configuration has {n} mistakes:")?,
    }
    for mistake in mistakes {
        writeln!(out, "  - {mistake}")?;
    }
    Ok(())
}
