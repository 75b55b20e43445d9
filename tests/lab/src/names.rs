//! Names in the lab: a name server at the site, and what the client makes of its answers.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::scenario::{Lab, RESOURCE_V4};

/// Process name of the name server.
const SERVER: &str = "dnsmasq";

impl Lab {
    /// Makes the resource the gateway's name server, with `records` as options of Debian's dnsmasq;
    /// called again, it knows these records instead.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn serve_names(&mut self, records: &[&str]) -> Result<()> {
        if self.net.runs(SERVER) {
            self.net.kill(SERVER)?;
        }
        let nameserver = format!("nameserver {RESOURCE_V4}\noptions timeout:1 attempts:2\n");
        self.net.etc("gateway", "resolv.conf", &nameserver)?;
        self.net.etc("gateway", "hosts", "127.0.0.1 localhost\n")?;
        let listen = format!("--listen-address={RESOURCE_V4}");
        let mut args = vec![
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--bind-interfaces",
            "--user=root",
            "--pid-file=",
            "--log-facility=-",
            "--local-ttl=1",
            // What is not among the records does not exist.
            "--local=/example/",
            &listen,
        ];
        args.extend(records);
        self.net
            .start(SERVER, "resource", Path::new("dnsmasq"), &args, &[])?;
        let line = format!("dig +short +time=1 +tries=1 @{RESOURCE_V4} . NS");
        self.net
            .eventually("the name server answers", Duration::from_secs(10), |net| {
                net.sh("resource", &line)
            })
    }

    /// The addresses that the client gives a name, and makes known to the gateway, as if an
    /// application had asked for it.
    ///
    /// # Errors
    /// When no resource covers the name.
    pub fn resolve(&self, domain: &str) -> Result<Proxies> {
        let body = serde_json::json!({ "domain": domain });
        let answer = self.net.output(
            "client",
            &format!(
                "curl -sS -f -X POST -H 'content-type: application/json' -d '{body}' \
                 http://127.0.0.1:8083/resolve"
            ),
        )?;
        let answer: Value = serde_json::from_str(&answer)?;
        let addresses: Vec<IpAddr> = serde_json::from_value(answer["proxy_ips"].clone())?;
        let first = |v4: bool| addresses.iter().copied().find(|a| a.is_ipv4() == v4);
        ensure!(!addresses.is_empty(), "no addresses: {answer}");
        Ok(Proxies {
            v4: first(true).context("no IPv4 address")?,
            v6: first(false).context("no IPv6 address")?,
        })
    }
}

/// One address of each family that the client made up for a name.
#[derive(Debug, Clone, Copy)]
pub struct Proxies {
    /// IPv4.
    pub v4: IpAddr,
    /// IPv6.
    pub v6: IpAddr,
}
