//! Which names a DNS resource covers (data-path spec §6.2).

/// Whether `pattern` covers `name`, without regard to ASCII case and a trailing dot.
///
/// Labels are compared one by one. `*` stands for any characters within one label, `?` for exactly
/// one, a label `**` for any number of labels, none included. A leading `*.` also covers the bare
/// domain.
///
/// Takes time in proportion to the product of the lengths at worst, whatever a client asks for.
pub(super) fn covers(pattern: &str, name: &str) -> bool {
    let pattern = pattern.strip_suffix('.').unwrap_or(pattern);
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.is_empty() || name.split('.').any(str::is_empty) {
        return false;
    }
    if let Some(bare) = pattern.strip_prefix("*.")
        && labels_match(bare, name)
    {
        return true;
    }
    labels_match(pattern, name)
}

fn labels_match(pattern: &str, name: &str) -> bool {
    let pattern: Vec<&str> = pattern.split('.').collect();
    let name: Vec<&str> = name.split('.').collect();
    matches(&pattern, &name, |p| *p == "**", |p, n| label_matches(p, n))
}

fn label_matches(pattern: &str, label: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let label: Vec<char> = label.chars().collect();
    matches(
        &pattern,
        &label,
        |p| *p == '*',
        |p, c| *p == '?' || p.eq_ignore_ascii_case(c),
    )
}

/// Matches a list of elements against a pattern in which some stand for any number of them.
fn matches<P, E>(
    pattern: &[P],
    list: &[E],
    is_any: impl Fn(&P) -> bool,
    same: impl Fn(&P, &E) -> bool,
) -> bool {
    let (mut p, mut e) = (0, 0);
    // Where the last "any" is, and how far the list had been taken when it took one more. Only the
    // last one needs to be reconsidered: an earlier one cannot do better.
    let mut retry: Option<(usize, usize)> = None;
    while e < list.len() {
        match pattern.get(p) {
            Some(any) if is_any(any) => {
                retry = Some((p, e));
                p += 1;
            }
            Some(one) if same(one, &list[e]) => {
                p += 1;
                e += 1;
            }
            _ => {
                let Some((any, taken)) = retry else {
                    return false;
                };
                retry = Some((any, taken + 1));
                p = any + 1;
                e = taken + 1;
            }
        }
    }
    pattern[p..].iter().all(is_any)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pattern: &str, covered: &[&str], others: &[&str]) {
        for name in covered {
            assert!(covers(pattern, name), "{pattern} covers {name}");
        }
        for name in others {
            assert!(!covers(pattern, name), "{pattern} does not cover {name}");
        }
    }

    #[test]
    fn a_plain_name_covers_itself_in_any_case() {
        check(
            "db.corp.example",
            &["db.corp.example", "DB.Corp.Example", "db.corp.example."],
            &["corp.example", "a.db.corp.example", "dbxcorp.example", ""],
        );
        check("db.corp.example.", &["db.corp.example"], &[]);
    }

    #[test]
    fn a_leading_star_covers_one_label_and_the_bare_domain() {
        check(
            "*.corp.example",
            &["a.corp.example", "corp.example"],
            &["a.b.corp.example", "example", "acorp.example"],
        );
    }

    #[test]
    fn two_stars_cover_any_number_of_labels() {
        check(
            "**.corp.example",
            &["corp.example", "a.corp.example", "a.b.c.corp.example"],
            &["example", "acorp.example"],
        );
        check(
            "a.**.example",
            &["a.example", "a.b.example", "a.b.c.example"],
            &["b.example", "a.b.other"],
        );
        check("**", &["a", "a.b"], &[""]);
    }

    #[test]
    fn stars_and_question_marks_stay_within_a_label() {
        check(
            "web-*.corp.example",
            &["web-.corp.example", "web-1.corp.example"],
            &["web-1.a.corp.example", "web.corp.example"],
        );
        check(
            "*b*d.example",
            &["bd.example", "abcd.example", "bdbd.example"],
            &["bdb.example", "b.d.example"],
        );
        check(
            "db?.corp.example",
            &["db1.corp.example"],
            &["db.corp.example", "db12.corp.example", "db1.x.corp.example"],
        );
    }

    #[test]
    fn names_with_empty_labels_are_covered_by_nothing() {
        for name in ["..", "a..example", ".example", "a.example.."] {
            assert!(!covers("**", name), "{name}");
            assert!(!covers("**.example", name), "{name}");
        }
    }

    #[test]
    fn hostile_names_and_patterns_take_no_time() {
        let name = "a".repeat(60) + "." + &"a.".repeat(90) + "b";
        let pattern = "*a*a*a*a*a*a*a*a*a*b.**.a.**.a.**.a.**.a.**.c";
        assert!(!covers(pattern, &name));
    }
}
