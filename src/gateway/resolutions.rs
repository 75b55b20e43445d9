//! Announcements that wait for a name to be resolved (data-path spec §6.2).
//!
//! Clients repeat themselves: every DNS query of an application announces its name again. A name is
//! asked for once at a time, however many announcements wait for it.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::access::limits::{
    MAX_RESOLUTIONS as MAX_NAMES, MAX_RESOLUTIONS_OF_CLIENT as MAX_PER_CLIENT,
};
use crate::ids::{ClientId, ResourceId};

/// An announcement that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// Who announced it.
    pub client: ClientId,
    /// For which resource.
    pub resource: ResourceId,
    /// The domain, to be echoed as it was written.
    pub domain: String,
    /// What is to stand for it.
    pub proxy_ips: Vec<IpAddr>,
}

/// What to do about an announcement.
#[derive(Debug, PartialEq, Eq)]
pub enum Begun {
    /// Resolve this name.
    Resolve(String),
    /// The name is being resolved already.
    Waiting,
    /// There are too many; the client will announce it again.
    Refused,
}

/// All announcements that wait.
#[derive(Debug, Default)]
pub struct Resolutions {
    by_name: HashMap<String, Vec<Announcement>>,
    per_client: HashMap<ClientId, usize>,
}

impl Resolutions {
    /// Takes an announcement in. A repeated one replaces the former.
    pub fn begin(&mut self, announcement: Announcement) -> Begun {
        let name = announcement.domain.to_ascii_lowercase();
        if let Some(waiting) = self.by_name.get_mut(&name)
            && let Some(former) = waiting.iter_mut().find(|former| {
                (former.client, former.resource) == (announcement.client, announcement.resource)
            })
        {
            *former = announcement;
            return Begun::Waiting;
        }
        let of_client = self.per_client.entry(announcement.client).or_default();
        let is_new = !self.by_name.contains_key(&name);
        if *of_client >= MAX_PER_CLIENT || is_new && self.by_name.len() >= MAX_NAMES {
            if *of_client == 0 {
                self.per_client.remove(&announcement.client);
            }
            return Begun::Refused;
        }
        *of_client += 1;
        self.by_name
            .entry(name.clone())
            .or_default()
            .push(announcement);
        if is_new {
            Begun::Resolve(name)
        } else {
            Begun::Waiting
        }
    }

    /// The announcements that waited for a name.
    pub fn end(&mut self, name: &str) -> Vec<Announcement> {
        let waiting = self.by_name.remove(name).unwrap_or_default();
        for announcement in &waiting {
            if let Some(of_client) = self.per_client.get_mut(&announcement.client) {
                *of_client -= 1;
                if *of_client == 0 {
                    self.per_client.remove(&announcement.client);
                }
            }
        }
        waiting
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn announcement(client: u128, resource: u128, domain: &str) -> Announcement {
        Announcement {
            client: ClientId(Uuid::from_u128(client)),
            resource: ResourceId(Uuid::from_u128(resource)),
            domain: domain.to_owned(),
            proxy_ips: vec![],
        }
    }

    #[test]
    fn a_name_is_resolved_once_for_all_who_wait() {
        let mut resolutions = Resolutions::default();
        let first = announcement(1, 1, "Db.example");
        assert_eq!(
            resolutions.begin(first.clone()),
            Begun::Resolve("db.example".into())
        );
        let second = announcement(2, 1, "db.example");
        assert_eq!(resolutions.begin(second.clone()), Begun::Waiting);
        assert_eq!(resolutions.end("db.example"), [first.clone(), second]);
        assert_eq!(resolutions.end("db.example"), []);
        assert!(matches!(resolutions.begin(first), Begun::Resolve(_)));
    }

    #[test]
    fn a_repeated_announcement_takes_the_place_of_the_former() {
        let mut resolutions = Resolutions::default();
        resolutions.begin(announcement(1, 1, "a"));
        let again = Announcement {
            proxy_ips: vec![[100, 96, 0, 1].into()],
            ..announcement(1, 1, "a")
        };
        assert_eq!(resolutions.begin(again.clone()), Begun::Waiting);
        let other_resource = announcement(1, 2, "a");
        assert_eq!(resolutions.begin(other_resource.clone()), Begun::Waiting);
        assert_eq!(resolutions.end("a"), [again, other_resource]);
    }

    #[test]
    fn one_client_cannot_take_all_places() {
        let mut resolutions = Resolutions::default();
        for n in 0..MAX_PER_CLIENT {
            let begun = resolutions.begin(announcement(1, 1, &n.to_string()));
            assert!(matches!(begun, Begun::Resolve(_)));
        }
        let more = announcement(1, 1, "more");
        assert_eq!(resolutions.begin(more.clone()), Begun::Refused);
        let other = resolutions.begin(announcement(2, 1, "more"));
        assert!(matches!(other, Begun::Resolve(_)));
        resolutions.end("7");
        assert_eq!(resolutions.begin(more), Begun::Waiting);
    }

    #[test]
    fn the_number_of_names_is_bounded() {
        let mut resolutions = Resolutions::default();
        for n in 0..MAX_NAMES {
            let begun = resolutions.begin(announcement(n as u128, 1, &n.to_string()));
            assert!(matches!(begun, Begun::Resolve(_)));
        }
        let more = announcement(5000, 1, "more");
        assert_eq!(resolutions.begin(more.clone()), Begun::Refused);
        let joins = announcement(5000, 1, "7");
        assert_eq!(resolutions.begin(joins), Begun::Waiting);
        for n in 0..MAX_NAMES {
            resolutions.end(&n.to_string());
        }
        assert!(resolutions.per_client.is_empty());
        assert!(matches!(resolutions.begin(more), Begun::Resolve(_)));
    }
}
