//! `lab-portal`: the stand-in portal.

mod support;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use firezone_lab::portal::tls::{Front, Identity};
use firezone_lab::portal::{Options, Policy, Portal, Timings};

/// Stand-in for the Firezone portal: the gateway and client channels over WebSocket, plain and with
/// TLS if asked for, plus a control API for tests.
#[derive(Parser)]
#[command(name = "lab-portal", version)]
struct Args {
    /// Addresses for gateways and clients, separated by commas.
    #[arg(
        long,
        env = "LAB_PORTAL_LISTEN",
        value_delimiter = ',',
        default_value = "0.0.0.0:8081"
    )]
    listen: Vec<SocketAddr>,
    /// Address of the control API. It is not protected in any way.
    #[arg(long, env = "LAB_PORTAL_CONTROL", default_value = "127.0.0.1:8082")]
    control: SocketAddr,
    /// Policy file (YAML).
    #[arg(long, env = "LAB_PORTAL_POLICY")]
    policy: PathBuf,
    /// File that keeps identities, keys and grants over a restart; without it all are forgotten.
    #[arg(long, env = "LAB_PORTAL_STATE")]
    state: Option<PathBuf>,
    /// Close connections without a frame for this long, in milliseconds.
    #[arg(long, default_value_t = 37_000)]
    idle_timeout_ms: u64,
    /// Time for a gateway to answer an authorization, in milliseconds.
    #[arg(long, default_value_t = 15_000)]
    authorization_timeout_ms: u64,
    /// Time between a change of relays and its announcement, in milliseconds.
    #[arg(long, default_value_t = 1_000)]
    presence_debounce_ms: u64,
    /// Address for gateways and clients that speak TLS.
    #[arg(long, requires = "tls_root")]
    tls_listen: Option<SocketAddr>,
    /// Names and addresses in the certificate, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "localhost")]
    tls_names: Vec<String>,
    /// Let the certificate have expired an hour ago.
    #[arg(long)]
    tls_expired: bool,
    /// Where to write the certificate (PEM), for SSL_CERT_FILE.
    #[arg(long)]
    tls_root: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    support::init_logging();
    // Before anybody can connect: who starts this process may end it then.
    let terminated = support::terminated()?;
    let portal = Portal::start(Options {
        listen: args.listen,
        control: args.control,
        policy: Policy::load(&args.policy)?,
        state: args.state,
        timings: Timings {
            idle: Duration::from_millis(args.idle_timeout_ms),
            authorization: Duration::from_millis(args.authorization_timeout_ms),
            presence_debounce: Duration::from_millis(args.presence_debounce_ms),
        },
    })
    .await?;
    let _front = match (args.tls_listen, &args.tls_root) {
        (Some(listen), Some(root)) => {
            let identity = Identity::new(&args.tls_names, args.tls_expired)?;
            std::fs::write(root, identity.pem())?;
            Some(Front::start(listen, portal.addresses()[0], &identity).await?)
        }
        _ => None,
    };
    tracing::info!(
        peers = ?portal.addresses(),
        control = %portal.control_address(),
        "portal listening"
    );
    tokio::select! {
        () = portal.shutdown_requested() => tracing::info!("shutdown requested"),
        () = terminated => {}
    }
    portal.shut_down().await;
    Ok(())
}
