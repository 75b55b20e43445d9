//! Addresses, routes and policy rules of the tunnel device, over rtnetlink.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute};
use rtnetlink::packet_route::route::{RouteMessage, RouteScope};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder};
use rustix::io::Errno;
use rustix::net::{AddressFamily as SocketFamily, SocketType};
use tokio::task::JoinHandle;

use super::constants::{
    FWMARK, NETLINK_TIMEOUT, ROUTING_TABLE, RULE_PRIORITY, TUNNEL_V4, TUNNEL_V6, TX_QUEUE_LEN,
};

/// How often cleaning up asks again for one more of the same; a bound, not an expectation.
const MAX_DUPLICATES: usize = 16;

/// Why the device could not be configured at all.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No netlink socket.
    #[error("no netlink socket: {0}")]
    Socket(#[source] io::Error),
    /// There is no such interface.
    #[error("interface {link}: {source}")]
    NoSuchLink {
        /// Its name.
        link: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The interface stays down.
    #[error("interface {link}: {reason}")]
    Link {
        /// Its name.
        link: String,
        /// What failed, in words.
        reason: String,
    },
    /// Neither IPv4 nor IPv6 works.
    #[error("interface {link}: IPv4: {v4}; IPv6: {v6}")]
    NoFamily {
        /// Its name.
        link: String,
        /// Why IPv4 does not.
        v4: String,
        /// Why IPv6 does not.
        v6: String,
    },
    /// Something of ours could not be taken away.
    #[error("left behind: {0}")]
    Cleanup(String),
}

/// What became of each family. At least one is `Ok`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configured {
    /// IPv4; the reason in words when it does not work.
    pub v4: Result<(), String>,
    /// IPv6; likewise.
    pub v6: Result<(), String>,
}

/// A connection to the kernel's routing configuration, in the network namespace of the thread that
/// made it.
#[derive(Debug)]
pub struct Network {
    handle: Handle,
    connection: JoinHandle<()>,
}

impl Network {
    /// Opens the netlink socket and starts its task. Has to run inside a tokio runtime with I/O
    /// and time enabled.
    ///
    /// # Errors
    /// [`NetworkError::Socket`] if the kernel offers no such socket.
    pub fn new() -> Result<Self, NetworkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Socket)?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    /// Brings the interface `link` up with exactly the addresses `v4`/32 and `v6`/128, routes the
    /// tunnel networks to it in a table of its own, and sends everything but the gateway's own
    /// packets through that table (portal-channel spec §5.6). May be repeated, also with other
    /// addresses.
    ///
    /// # Errors
    /// If the interface does not exist or stays down, or if neither family works. One family
    /// failing is reported in the result.
    pub async fn configure(
        &self,
        link: &str,
        v4: Ipv4Addr,
        v6: Ipv6Addr,
    ) -> Result<Configured, NetworkError> {
        let index = link_index(link).map_err(|source| NetworkError::NoSuchLink {
            link: link.to_owned(),
            source,
        })?;
        self.prepare_link(link, index).await?;

        let v4 = self
            .configure_family(index, IpAddr::V4(v4))
            .await
            .map_err(|e| e.to_string());
        let v6 = self
            .configure_family(index, IpAddr::V6(v6))
            .await
            .map_err(|e| e.to_string());
        match (v4, v6) {
            (Err(v4), Err(v6)) => Err(NetworkError::NoFamily {
                link: link.to_owned(),
                v4,
                v6,
            }),
            (v4, v6) => Ok(Configured { v4, v6 }),
        }
    }

    /// Takes our policy rules and routes away. What was not there counts as taken away; the
    /// addresses go with the device.
    ///
    /// # Errors
    /// [`NetworkError::Cleanup`] naming everything that could not be removed.
    pub async fn cleanup(&self) -> Result<(), NetworkError> {
        let mut left = Vec::new();
        for family in [Family::V4, Family::V6] {
            // Rules first: a rule whose table is gone costs a lookup per packet.
            if let Err(e) = self.delete_rules(family).await {
                left.push(e.to_string());
            }
            if let Err(e) = self.delete_routes(family).await {
                left.push(e.to_string());
            }
        }
        if left.is_empty() {
            Ok(())
        } else {
            Err(NetworkError::Cleanup(left.join("; ")))
        }
    }

    async fn prepare_link(&self, link: &str, index: u32) -> Result<(), NetworkError> {
        // Before the interface goes up, because going up is what makes the link-local address.
        let no_link_local =
            LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
                In6AddrGenMode::None,
            )])]);
        let best_effort = [
            (
                "disable IPv6 link-local addresses",
                LinkUnspec::new_with_index(index).append_extra_attribute(no_link_local),
            ),
            (
                "set the queue length",
                LinkUnspec::new_with_index(index).txqueuelen(TX_QUEUE_LEN),
            ),
        ];
        for (step, change) in best_effort {
            if let Err(e) = self.change_link(step, change).await {
                tracing::debug!(link, "{e}");
            }
        }
        self.change_link("set it up", LinkUnspec::new_with_index(index).up())
            .await
            .map_err(|e| NetworkError::Link {
                link: link.to_owned(),
                reason: e.to_string(),
            })
    }

    async fn change_link(
        &self,
        step: &'static str,
        change: LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), Failure> {
        bounded(step, self.handle.link().change(change.build()).execute()).await
    }

    async fn configure_family(&self, index: u32, address: IpAddr) -> Result<(), Failure> {
        let family = Family::of(address);
        // The new address comes before the old ones go, so that the device is never without.
        bounded(
            "add the address",
            self.handle
                .address()
                .add(index, address, family.host_prefix())
                .replace()
                .execute(),
        )
        .await?;
        self.delete_other_addresses(index, address).await?;
        bounded(
            "add the route",
            self.handle
                .route()
                .add(route(family, Some(index)))
                .replace()
                .execute(),
        )
        .await?;
        self.add_rule(family).await
    }

    async fn delete_other_addresses(&self, index: u32, wanted: IpAddr) -> Result<(), Failure> {
        let family = Family::of(wanted);
        let mut request = self.handle.address().get().set_link_index_filter(index);
        request.message_mut().header.family = family.netlink();
        let present: Vec<AddressMessage> =
            bounded("list the addresses", request.execute().try_collect()).await?;
        for message in present {
            if message.header.family != family.netlink()
                || (message.header.prefix_len == family.host_prefix()
                    && local_address(&message) == Some(wanted))
            {
                continue;
            }
            match bounded(
                "delete another address",
                self.handle.address().del(message).execute(),
            )
            .await
            {
                Err(e) if !e.is(Errno::ADDRNOTAVAIL) => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    async fn add_rule(&self, family: Family) -> Result<(), Failure> {
        let mut request = self.handle.rule().add();
        *request.message_mut() = rule(family);
        match bounded("add the policy rule", request.execute()).await {
            Err(e) if e.is(Errno::EXIST) => Ok(()),
            // A kernel without multiple tables has put the route into the only one it has.
            Err(e) if e.is(Errno::OPNOTSUPP) => {
                tracing::warn!(
                    ?family,
                    "the kernel has no policy routing; the gateway's own packets to tunnel addresses are not kept out of the tunnel"
                );
                Ok(())
            }
            other => other,
        }
    }

    async fn delete_rules(&self, family: Family) -> Result<(), Failure> {
        for _ in 0..MAX_DUPLICATES {
            match bounded(
                "delete the policy rule",
                self.handle.rule().del(rule(family)).execute(),
            )
            .await
            {
                Ok(()) => {}
                Err(e) if e.is_absence() => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    async fn delete_routes(&self, family: Family) -> Result<(), Failure> {
        for _ in 0..MAX_DUPLICATES {
            match bounded(
                "delete the route",
                self.handle.route().del(route(family, None)).execute(),
            )
            .await
            {
                Ok(()) => {}
                Err(e) if e.is_absence() => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    fn netlink(self) -> AddressFamily {
        match self {
            Self::V4 => AddressFamily::Inet,
            Self::V6 => AddressFamily::Inet6,
        }
    }

    fn host_prefix(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }
}

/// The route of the tunnel network; without an interface it stands for any route to it in our
/// table, as deleting wants it.
fn route(family: Family, index: Option<u32>) -> RouteMessage {
    let mut message = match family {
        Family::V4 => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(TUNNEL_V4.0, TUNNEL_V4.1)
            .table_id(ROUTING_TABLE)
            .scope(if index.is_some() {
                RouteScope::Link
            } else {
                RouteScope::NoWhere
            })
            .build(),
        Family::V6 => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(TUNNEL_V6.0, TUNNEL_V6.1)
            .table_id(ROUTING_TABLE)
            .build(),
    };
    if let Some(index) = index {
        message
            .attributes
            .push(rtnetlink::packet_route::route::RouteAttribute::Oif(index));
    }
    message
}

/// "not fwmark … lookup …" (data-path spec §7.1).
fn rule(family: Family) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family.netlink();
    message.header.action = RuleAction::ToTable;
    message.header.flags = RuleFlags::Invert;
    message.attributes = vec![
        RuleAttribute::Priority(RULE_PRIORITY),
        RuleAttribute::FwMark(FWMARK),
        RuleAttribute::FwMask(u32::MAX),
        RuleAttribute::Table(ROUTING_TABLE),
    ];
    message
}

/// Our end of an address: `IFA_LOCAL` where there is one, since `IFA_ADDRESS` is the far end of a
/// point-to-point link.
fn local_address(message: &AddressMessage) -> Option<IpAddr> {
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(local) => return Some(*local),
            AddressAttribute::Address(any) => address = Some(*any),
            _ => {}
        }
    }
    address
}

/// Asks by ioctl, not by netlink: a link message has hundreds of nested attributes, and one that
/// the parser does not know would lose the answer.
fn link_index(link: &str) -> io::Result<u32> {
    let socket = rustix::net::socket(SocketFamily::UNIX, SocketType::DGRAM, None)?;
    Ok(rustix::net::netdevice::name_to_index(&socket, link)?)
}

/// One request that did not work.
#[derive(Debug)]
struct Failure {
    step: &'static str,
    cause: Cause,
}

#[derive(Debug)]
enum Cause {
    Kernel(Errno),
    Other(String),
}

impl Failure {
    fn is(&self, errno: Errno) -> bool {
        matches!(self.cause, Cause::Kernel(e) if e == errno)
    }

    /// Whether it failed because what was to be removed is not there, or cannot be there since the
    /// kernel lacks the family or policy routing.
    fn is_absence(&self) -> bool {
        [
            Errno::NOENT,
            Errno::SRCH,
            Errno::NODEV,
            Errno::AFNOSUPPORT,
            Errno::OPNOTSUPP,
        ]
        .into_iter()
        .any(|errno| self.is(errno))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "could not {}: ", self.step)?;
        match &self.cause {
            Cause::Kernel(Errno::PERM) => f.write_str("CAP_NET_ADMIN is missing"),
            // What adding an IPv6 address says when `disable_ipv6` is set.
            Cause::Kernel(Errno::ACCESS) => {
                f.write_str("the kernel refused it, IPv6 may be disabled by sysctl disable_ipv6")
            }
            Cause::Kernel(errno) => write!(f, "{}", io::Error::from(*errno)),
            Cause::Other(reason) => f.write_str(reason),
        }
    }
}

async fn bounded<T>(
    step: &'static str,
    request: impl Future<Output = Result<T, rtnetlink::Error>>,
) -> Result<T, Failure> {
    let cause = match tokio::time::timeout(NETLINK_TIMEOUT, request).await {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(rtnetlink::Error::NetlinkError(message))) => match message.to_io().raw_os_error() {
            Some(number) => Cause::Kernel(super::errno(number)),
            None => Cause::Other(message.to_string()),
        },
        Ok(Err(other)) => Cause::Other(other.to_string()),
        Err(_) => Cause::Other("the kernel did not answer".to_owned()),
    };
    Err(Failure { step, cause })
}
