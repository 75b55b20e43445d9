//! docs/rfc.md says which test shows what; here is seen to it that it says the truth.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

/// Demands without a test. To be lowered when there are fewer, and never to be raised.
const UNTESTED: usize = 0;

/// A demand: section, words, and what shows it.
struct Row {
    line: usize,
    cells: Vec<String>,
}

impl Row {
    fn shown_by(&self) -> &str {
        &self.cells[2]
    }

    /// Paths of tests in backticks, such as `turn_coturn::coturn_that_restarts_is_used_again`.
    fn tests(&self) -> impl Iterator<Item = &str> {
        let quoted = self.shown_by().split('`').skip(1).step_by(2);
        quoted.filter(|quote| quote.contains("::"))
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rows() -> Vec<Row> {
    let document = std::fs::read_to_string(root().join("docs/rfc.md")).unwrap();
    let rows: Vec<Row> = (1..)
        .zip(document.lines())
        .filter(|(_, line)| line.starts_with('|') && !line.starts_with("|---"))
        .map(|(number, line)| Row {
            line: number,
            cells: line
                .trim_matches('|')
                .split('|')
                .map(|cell| cell.trim().to_owned())
                .collect(),
        })
        .filter(|row| row.cells[0] != "Section")
        .collect();
    assert!(rows.len() > 200, "{} rows", rows.len());
    rows
}

/// Where the module of a test may be: in a file of its own, in a directory, in the file around it,
/// or among the tests of the whole.
fn files(modules: &[&str]) -> Vec<PathBuf> {
    let path = |root: &str, modules: &[&str]| -> PathBuf {
        std::iter::once(root)
            .chain(modules.iter().copied())
            .collect()
    };
    let around = &modules[..modules.len() - 1];
    [
        path("src", modules).with_extension("rs"),
        path("src", modules).join("mod.rs"),
        path("src", around).with_extension("rs"),
        path("tests", modules).with_extension("rs"),
    ]
    .map(|file| root().join(file))
    .into_iter()
    .filter(|file| file.is_file())
    .collect()
}

/// Whether the source has a test of that name.
fn has_test(source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim_start).collect();
    lines.iter().enumerate().any(|(at, line)| {
        let is_named = line
            .trim_start_matches("async ")
            .strip_prefix("fn ")
            .and_then(|rest| rest.strip_prefix(name))
            .is_some_and(|rest| rest.starts_with('('));
        let mut above = lines[..at].iter().rev();
        is_named
            && above
                .by_ref()
                .take_while(|line| line.starts_with("#[") || line.starts_with("//"))
                .any(|line| *line == "#[test]" || line.starts_with("#[tokio::test"))
    })
}

#[test]
fn every_row_says_what_shows_it() {
    for row in rows() {
        assert_eq!(row.cells.len(), 3, "line {}", row.line);
        assert!(
            row.cells.iter().all(|cell| !cell.is_empty()),
            "line {}",
            row.line
        );
    }
}

#[test]
fn every_test_that_is_named_exists() {
    let mut named = 0;
    for row in rows() {
        for path in row.tests() {
            let modules: Vec<&str> = path.split("::").collect();
            let (name, modules) = modules.split_last().unwrap();
            let exists = files(modules)
                .into_iter()
                .any(|file| has_test(&std::fs::read_to_string(file).unwrap(), name));
            assert!(exists, "line {}: no test {path}", row.line);
            named += 1;
        }
    }
    assert!(named > 100, "{named} names");
}

#[test]
fn no_more_demands_are_untested_than_before() {
    let untested = rows()
        .iter()
        .filter(|row| row.shown_by().contains("no test"))
        .count();
    assert_eq!(untested, UNTESTED, "rows");
}

#[test]
fn a_function_that_is_no_test_does_not_count() {
    let source = "#[test]\nfn a() {}\n\nfn b() {}\n    #[test]\n    // why\n    fn c(x: u8) {}\n";
    assert!(has_test(source, "a") && has_test(source, "c"));
    assert!(!has_test(source, "b") && !has_test(source, "d"));
}
