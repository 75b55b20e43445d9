//! What the portal remembers across restarts: identities, their keys and addresses, and grants.

use std::fmt;
use std::io::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rand::Rng as _;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// First address of the range for peers, 100.64.0.0/11 (portal-channel spec §7.1).
const FIRST_V4: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 0);
/// First address of the range for peers, fd00:2021:1111::/107 (§7.1).
const FIRST_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x2021, 0x1111, 0, 0, 0, 0, 0);
/// Number of addresses in either range.
const HOSTS: u32 = 1 << 21;

/// Which kind of peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A gateway.
    Gateway,
    /// A client.
    Client,
}

impl Role {
    /// Name of the role and of its channel topic.
    pub fn topic(self) -> &'static str {
        match self {
            Role::Gateway => "gateway",
            Role::Client => "client",
        }
    }
}

/// 32 secret bytes.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretBytes(pub [u8; 32]);

impl SecretBytes {
    fn random() -> Self {
        Self(rand::rng().random())
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

impl From<SecretBytes> for String {
    fn from(secret: SecretBytes) -> Self {
        hex::encode(secret.0)
    }
}

impl TryFrom<String> for SecretBytes {
    type Error = hex::FromHexError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes)?;
        Ok(Self(bytes))
    }
}

/// A gateway or client, stable per external id.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Identity {
    /// Kind.
    pub role: Role,
    /// Id.
    pub id: Uuid,
    /// What the peer calls itself.
    pub external_id: String,
    /// Display name, as last given.
    pub name: String,
    /// Public key, base64, as last given.
    pub public_key: String,
    /// Secret that preshared keys are derived from.
    pub psk_base: SecretBytes,
    /// Tunnel address.
    pub ipv4: Ipv4Addr,
    /// Tunnel address.
    pub ipv6: Ipv6Addr,
}

/// Permission of a client to reach a resource through a gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Id.
    pub id: Uuid,
    /// Who.
    pub client_id: Uuid,
    /// Through which gateway.
    pub gateway_id: Uuid,
    /// What.
    pub resource_id: Uuid,
    /// Unix seconds; `None` never expires.
    pub expires_at: Option<u64>,
    /// Whether the gateway has answered.
    pub confirmed: bool,
}

impl Grant {
    /// Whether it is still good at `now` (Unix seconds).
    pub fn valid(&self, now: u64) -> bool {
        self.expires_at.is_none_or(|end| end > now)
    }
}

/// Everything that survives a restart.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Contents {
    account_id: Uuid,
    /// Signs ingest tokens.
    account_key: SecretBytes,
    identities: Vec<Identity>,
    grants: Vec<Grant>,
}

/// The memory of the portal, in a file if one is given.
#[derive(Debug)]
pub struct Store {
    contents: Contents,
    path: Option<PathBuf>,
    dirty: bool,
    in_order: bool,
}

impl Store {
    /// Opens the state file, or begins a new one.
    ///
    /// # Errors
    /// If the file exists and cannot be read or understood: starting over would silently give
    /// every peer a new identity.
    pub fn open(path: Option<PathBuf>) -> anyhow::Result<Self> {
        let existing = match path.as_deref().map(std::fs::read) {
            Some(Ok(bytes)) => Some(bytes),
            Some(Err(error)) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context("cannot read the state file");
            }
            Some(Err(_)) | None => None,
        };
        let contents = match existing {
            Some(bytes) => {
                serde_json::from_slice(&bytes).context("cannot understand the state file")?
            }
            None => Contents {
                account_id: Uuid::new_v4(),
                account_key: SecretBytes::random(),
                identities: Vec::new(),
                grants: Vec::new(),
            },
        };
        Ok(Self {
            contents,
            path,
            dirty: true,
            in_order: false,
        })
    }

    /// Ids count up, so that tests that sort by them run alike each time.
    #[must_use]
    pub fn in_order(mut self) -> Self {
        self.in_order = true;
        self
    }

    /// Id of the account.
    pub fn account_id(&self) -> Uuid {
        self.contents.account_id
    }

    /// Key that signs ingest tokens.
    pub fn account_key(&self) -> &[u8; 32] {
        &self.contents.account_key.0
    }

    /// All identities in order of first appearance.
    pub fn identities(&self) -> &[Identity] {
        &self.contents.identities
    }

    /// The identity with this id.
    pub fn identity(&self, id: Uuid) -> Option<&Identity> {
        self.contents.identities.iter().find(|i| i.id == id)
    }

    /// The identity of this role whose id, external id or name is `key`.
    pub fn find(&self, role: Role, key: &str) -> Option<&Identity> {
        let of_role = || self.contents.identities.iter().filter(|i| i.role == role);
        // A display name may be shared or equal somebody's external id; ids come first.
        of_role()
            .find(|i| i.id.to_string() == key)
            .or_else(|| of_role().find(|i| i.external_id == key))
            .or_else(|| of_role().find(|i| i.name == key))
    }

    /// The identity of `external_id`, made on first sight; `None` if the addresses are used up.
    pub fn identify(&mut self, role: Role, external_id: &str, name: &str) -> Option<&Identity> {
        let known = self
            .contents
            .identities
            .iter()
            .position(|i| i.role == role && i.external_id == external_id);
        if let Some(index) = known {
            return self.contents.identities.get(index);
        }
        let host = u32::try_from(self.contents.identities.len() + 1)
            .ok()
            .filter(|host| *host < HOSTS)?;
        let id = if self.in_order {
            Uuid::from_u128(u128::from(host))
        } else {
            Uuid::new_v4()
        };
        self.contents.identities.push(Identity {
            role,
            id,
            external_id: external_id.to_owned(),
            name: name.to_owned(),
            public_key: String::new(),
            psk_base: SecretBytes::random(),
            ipv4: Ipv4Addr::from_bits(FIRST_V4.to_bits() + host),
            ipv6: Ipv6Addr::from_bits(FIRST_V6.to_bits() + u128::from(host)),
        });
        self.dirty = true;
        self.contents.identities.last()
    }

    /// Notes what a peer said when it last connected.
    pub fn update(&mut self, id: Uuid, name: &str, public_key: &str) {
        if let Some(identity) = self.contents.identities.iter_mut().find(|i| i.id == id) {
            name.clone_into(&mut identity.name);
            public_key.clone_into(&mut identity.public_key);
            self.dirty = true;
        }
    }

    /// All grants, expired ones included until the next restart.
    pub fn grants(&self) -> &[Grant] {
        &self.contents.grants
    }

    /// The still valid grants through a gateway.
    pub fn grants_of_gateway(&self, gateway_id: Uuid, now: u64) -> Vec<Grant> {
        self.contents
            .grants
            .iter()
            .filter(|grant| grant.gateway_id == gateway_id && grant.valid(now))
            .cloned()
            .collect()
    }

    /// Adds a grant, in place of an earlier one for the same client, gateway and resource.
    pub fn grant(&mut self, grant: Grant) {
        self.take(|g| {
            (g.client_id, g.gateway_id, g.resource_id)
                == (grant.client_id, grant.gateway_id, grant.resource_id)
        });
        self.contents.grants.push(grant);
        self.dirty = true;
    }

    /// Changes the grants that `which` selects and returns them as they are now.
    pub fn change(
        &mut self,
        which: impl Fn(&Grant) -> bool,
        change: impl Fn(&mut Grant),
    ) -> Vec<Grant> {
        let mut changed = Vec::new();
        for grant in self.contents.grants.iter_mut().filter(|g| which(g)) {
            change(grant);
            changed.push(grant.clone());
        }
        self.dirty |= !changed.is_empty();
        changed
    }

    /// Removes and returns the grants that `which` selects.
    pub fn take(&mut self, which: impl Fn(&Grant) -> bool) -> Vec<Grant> {
        let taken: Vec<_> = self.contents.grants.extract_if(.., |g| which(g)).collect();
        self.dirty |= !taken.is_empty();
        taken
    }

    /// Forgets grants that have expired by `now` (Unix seconds).
    pub fn forget_expired(&mut self, now: u64) {
        self.take(|grant| !grant.valid(now));
    }

    /// Writes changes to the state file, if there are any and there is one.
    ///
    /// # Errors
    /// If the file cannot be written; the changes stay pending.
    pub fn save(&mut self) -> anyhow::Result<()> {
        if !self.dirty {
            return Ok(());
        }
        if let Some(path) = &self.path {
            let bytes = serde_json::to_vec_pretty(&self.contents)?;
            write_atomically(path, &bytes).context("cannot write the state file")?;
        }
        self.dirty = false;
        Ok(())
    }
}

/// Replaces the file in one step, so that a crash leaves the old or the new state, never half.
fn write_atomically(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn memory() -> Store {
        Store::open(None).unwrap()
    }

    #[test]
    fn identity_is_stable_per_external_id_and_role() {
        let mut store = memory();
        let first = store.identify(Role::Gateway, "edge", "a").unwrap().clone();
        let again = store.identify(Role::Gateway, "edge", "b").unwrap().clone();
        let client = store.identify(Role::Client, "edge", "c").unwrap().clone();
        assert_eq!(
            (first.id, first.ipv4, first.ipv6),
            (again.id, again.ipv4, again.ipv6)
        );
        assert_eq!(first.psk_base, again.psk_base);
        assert_ne!(first.id, client.id);
        assert_ne!((first.ipv4, first.ipv6), (client.ipv4, client.ipv6));
        assert_eq!(first.ipv4, Ipv4Addr::new(100, 64, 0, 1));
        assert_eq!(first.ipv6, "fd00:2021:1111::1".parse::<Ipv6Addr>().unwrap());
    }

    #[test]
    fn repeated_grant_replaces_and_expired_grant_is_not_listed() {
        let mut store = memory();
        let grant = |expires_at| Grant {
            id: Uuid::new_v4(),
            client_id: Uuid::nil(),
            gateway_id: Uuid::nil(),
            resource_id: Uuid::nil(),
            expires_at,
            confirmed: false,
        };
        store.grant(grant(Some(100)));
        store.grant(grant(Some(200)));
        assert_eq!(store.grants().len(), 1);
        assert_eq!(store.grants_of_gateway(Uuid::nil(), 199).len(), 1);
        assert_eq!(store.grants_of_gateway(Uuid::nil(), 200).len(), 0);
        store.grant(grant(None));
        assert_eq!(store.grants_of_gateway(Uuid::nil(), u64::MAX).len(), 1);
    }

    #[test]
    fn broken_state_file_is_an_error_not_a_new_beginning() {
        let path = std::env::temp_dir().join(format!("lab-portal-state-{}", Uuid::new_v4()));
        std::fs::write(&path, "{").unwrap();
        assert!(Store::open(Some(path.clone())).is_err());
        std::fs::remove_file(&path).unwrap();

        let mut store = Store::open(Some(path.clone())).unwrap();
        let id = store.identify(Role::Client, "x", "x").unwrap().id;
        store.save().unwrap();
        let store = Store::open(Some(path.clone())).unwrap();
        assert_eq!(store.find(Role::Client, "x").unwrap().id, id);
        std::fs::remove_file(&path).unwrap();
    }
}
