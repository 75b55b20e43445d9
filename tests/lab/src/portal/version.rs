//! Versions from user agents, and which gateways a client may use (portal-channel spec §1.4).

use std::cmp::Ordering;

/// Components whose version the portal knows how to find.
const COMPONENTS: [&str; 7] = [
    "relay",
    "connlib",
    "headless-client",
    "gui-client",
    "apple-client",
    "android-client",
    "gateway",
];

/// A semantic version; build metadata do not count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    core: (u64, u64, u64),
    /// Whether there is a pre-release part, which sorts before the release.
    pre_release: bool,
}

impl Version {
    /// Parses `major.minor.patch[-pre][+build]`.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.split('+').next()?;
        let (core, pre_release) = match text.split_once('-') {
            Some((_, "")) => return None,
            Some((core, _)) => (core, true),
            None => (text, false),
        };
        let mut numbers = core.split('.').map(|part| {
            part.bytes()
                .all(|b| b.is_ascii_digit())
                .then(|| part.parse().ok())
                .flatten()
        });
        let core = (numbers.next()??, numbers.next()??, numbers.next()??);
        numbers
            .next()
            .is_none()
            .then_some(Self { core, pre_release })
    }

    fn release(major: u64, minor: u64) -> Self {
        Self {
            core: (major, minor, 0),
            pre_release: false,
        }
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> Ordering {
        // `false` sorts first, but it is the pre-release that comes first.
        (self.core, !self.pre_release).cmp(&(other.core, !other.pre_release))
    }
}

/// The version text of a user agent: what follows the slash of the first word that names a known
/// component.
pub fn from_user_agent(user_agent: &str) -> Option<&str> {
    user_agent
        .split(' ')
        .filter_map(|word| word.split_once('/'))
        .find(|(component, _)| COMPONENTS.contains(component))
        .map(|(_, version)| version)
}

/// Whether a client of one version may use a gateway of another:
/// `client.major.(client.minor-1).0 <= gateway < client.major.(client.minor+2).0`.
/// A version that does not parse is compatible with nothing.
pub fn compatible(client: Option<&str>, gateway: Option<&str>) -> bool {
    let parse = |text: Option<&str>| text.and_then(Version::parse);
    let (Some(client), Some(gateway)) = (parse(client), parse(gateway)) else {
        return false;
    };
    let (major, minor, _) = client.core;
    (Version::release(major, minor.saturating_sub(1))..Version::release(major, minor + 2))
        .contains(&gateway)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn version_is_found_in_user_agents() {
        for (user_agent, version) in [
            (
                "Alpine Linux/3.22.1 gateway/1.6.0 (x86_64; 6.9.3)",
                Some("1.6.0"),
            ),
            (
                "Debian/13.0 headless-client/1.5.11 (x86_64; 6.9)",
                Some("1.5.11"),
            ),
            ("Ubuntu/24.04 connlib/1.4.0", Some("1.4.0")),
            ("curl/8.0", None),
            ("my-gateway/1.6.0", None),
            ("", None),
        ] {
            assert_eq!(from_user_agent(user_agent), version, "{user_agent}");
        }
    }

    #[test]
    fn only_neighbouring_minor_versions_are_compatible() {
        for (gateway, expected) in [
            ("1.3.9", false),
            ("1.4.0-rc.1", false),
            ("1.4.0", true),
            ("1.6.0", true),
            ("1.6.99", true),
            ("1.7.0", false),
            ("2.5.0", false),
            ("1.6", false),
            ("1.6.x", false),
        ] {
            assert_eq!(
                compatible(Some("1.5.3"), Some(gateway)),
                expected,
                "{gateway}"
            );
        }
        assert!(!compatible(None, Some("1.5.0")));
        assert!(!compatible(Some("1.5.0"), None));
        assert!(compatible(Some("1.0.0"), Some("1.0.0")));
    }

    #[test]
    fn pre_release_sorts_before_its_release() {
        let parse = |text| Version::parse(text).unwrap();
        assert!(parse("1.6.1-dev") < parse("1.6.1"));
        assert!(parse("1.6.1-dev") > parse("1.6.0"));
        assert_eq!(parse("1.6.1+abc"), parse("1.6.1"));
    }
}
