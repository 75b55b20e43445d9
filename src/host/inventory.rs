//! Interfaces, addresses, routes and policy rules as the kernel lists them, for a bundle that
//! somebody else is to read.

use std::fmt::Debug;
use std::fmt::Write as _;
use std::io;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::packet_route::rule::RuleMessage;
use rtnetlink::{Handle, IpVersion};

/// For one listing.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the kernel lists, each as text with one line per object.
#[derive(Debug)]
pub struct Inventory {
    /// Interfaces with their addresses.
    pub interfaces: Result<String, String>,
    /// Routes of all tables but `local`.
    pub routes: Result<String, String>,
    /// Policy rules.
    pub rules: Result<String, String>,
}

/// Asks the kernel, in the network namespace of the thread. Needs a tokio runtime with I/O and time
/// enabled, and no rights.
///
/// # Errors
/// When the kernel offers no such socket.
pub async fn inventory() -> io::Result<Inventory> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let found = Inventory {
        interfaces: bounded(interfaces(&handle)).await,
        routes: bounded(routes(&handle)).await,
        rules: bounded(rules(&handle)).await,
    };
    connection.abort();
    Ok(found)
}

async fn bounded(
    listing: impl Future<Output = Result<String, rtnetlink::Error>>,
) -> Result<String, String> {
    match tokio::time::timeout(PATIENCE, listing).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the kernel does not answer".to_owned()),
    }
}

async fn interfaces(handle: &Handle) -> Result<String, rtnetlink::Error> {
    let links: Vec<_> = handle.link().get().execute().try_collect().await?;
    let addresses: Vec<_> = handle.address().get().execute().try_collect().await?;
    let mut text = String::new();
    for link in links {
        let about = link.attributes.iter().filter(|attribute| {
            matches!(
                attribute,
                LinkAttribute::IfName(_)
                    | LinkAttribute::Mtu(_)
                    | LinkAttribute::OperState(_)
                    | LinkAttribute::Carrier(_)
                    | LinkAttribute::Qdisc(_)
                    | LinkAttribute::TxQueueLen(_)
                    | LinkAttribute::Controller(_)
            )
        });
        let index = link.header.index;
        line(&mut text, &format!("{index}:"), &link.header.flags, about);
        for address in addresses.iter().filter(|a| a.header.index == index) {
            let about = address.attributes.iter().filter(|attribute| {
                matches!(
                    attribute,
                    AddressAttribute::Address(_)
                        | AddressAttribute::Local(_)
                        | AddressAttribute::Flags(_)
                )
            });
            let prefix = format!("   /{}", address.header.prefix_len);
            line(&mut text, &prefix, &address.header.scope, about);
        }
    }
    Ok(text)
}

/// The kernel's own addresses and broadcasts would hide the rest.
const LOCAL_TABLE: u32 = 255;

async fn routes(handle: &Handle) -> Result<String, rtnetlink::Error> {
    let mut text = String::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut wanted = RouteMessage::default();
        wanted.header.address_family = family;
        let found: Vec<RouteMessage> = handle.route().get(wanted).execute().try_collect().await?;
        for route in found {
            let table = route
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    RouteAttribute::Table(table) => Some(*table),
                    _ => None,
                });
            let table = table.unwrap_or(route.header.table.into());
            if table == LOCAL_TABLE {
                continue;
            }
            let about = route.attributes.iter().filter(|attribute| {
                matches!(
                    attribute,
                    RouteAttribute::Destination(_)
                        | RouteAttribute::Gateway(_)
                        | RouteAttribute::Oif(_)
                        | RouteAttribute::Priority(_)
                        | RouteAttribute::PrefSource(_)
                        | RouteAttribute::MultiPath(_)
                )
            });
            let prefix = format!(
                "{family:?} table {table} /{}",
                route.header.destination_prefix_length
            );
            line(&mut text, &prefix, &route.header.kind, about);
        }
    }
    Ok(text)
}

async fn rules(handle: &Handle) -> Result<String, rtnetlink::Error> {
    let mut text = String::new();
    for family in [IpVersion::V4, IpVersion::V6] {
        let found: Vec<RuleMessage> = handle.rule().get(family).execute().try_collect().await?;
        for rule in found {
            let prefix = format!("{:?} table {}", rule.header.family, rule.header.table);
            line(
                &mut text,
                &prefix,
                &rule.header.action,
                rule.attributes.iter(),
            );
        }
    }
    Ok(text)
}

fn line<A: Debug>(
    text: &mut String,
    prefix: &str,
    kind: &dyn Debug,
    attributes: impl Iterator<Item = A>,
) {
    let attributes: Vec<String> = attributes.map(|a| format!("{a:?}")).collect();
    // Writing to a string does not fail.
    let _ = writeln!(text, "{prefix} {kind:?} {}", attributes.join(" "));
}
