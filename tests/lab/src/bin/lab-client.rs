//! Stand-in for the stock headless client; see `firezone_lab::client`.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser as _;
use firezone_lab::client::channel::{self, Login};
use firezone_lab::client::config::Args;
use firezone_lab::client::core::{Core, CoreConfig};
use firezone_lab::client::io::{Command, CoreHandle, Shell, Udp};
use firezone_lab::client::tun::Tun;
use firezone_lab::client::{control, netconf};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::unbounded_channel;
use tracing_subscriber::EnvFilter;

/// The libraries below log every packet at `info` or `debug`.
const DEFAULT_FILTER: &str = "info,turn_client_proto=warn,stun_proto=warn,turn_types=warn,is=warn";

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER)),
        )
        .with_writer(std::io::stderr)
        .init();

    let bind = |v6: bool, wanted: bool| {
        wanted
            .then(|| Udp::bind(v6, args.listen_port))
            .and_then(|result| {
                result
                    .inspect_err(|error| tracing::warn!(v6, %error, "no UDP socket"))
                    .ok()
            })
    };
    let v4 = bind(false, !args.no_v4);
    let v6 = bind(true, !args.no_v6);
    anyhow::ensure!(v4.is_some() || v6.is_some(), "no UDP socket at all");
    let tun = Tun::create(&args.tun_name)?;

    let core = Core::new(
        Instant::now(),
        rand::random(),
        CoreConfig {
            only: args.only,
            one_allocation_per_relay: args.one_allocation_per_relay,
            internet: args.internet,
            port_v4: v4.as_ref().map(Udp::port),
            port_v6: v6.as_ref().map(Udp::port),
            connect: args.connect.clone(),
        },
    );
    let public_key = core.public_key();
    let (handle, commands) = CoreHandle::new()?;
    let (egress, egress_receiver) = unbounded_channel();
    let (network, netconf_thread) = netconf::spawn(args.tun_name.clone())?;

    let shell = Shell {
        core,
        v4,
        v6,
        tun,
        commands,
        handle: handle.clone(),
        egress,
        network,
    };
    let (ended, mut data_ended) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("data".into())
        .spawn(move || {
            let _ = ended.send(shell.run());
        })?;

    let listener = tokio::net::TcpListener::bind(args.control)
        .await
        .with_context(|| format!("cannot listen on {}", args.control))?;
    tokio::spawn(axum::serve(listener, control::router(handle.clone())).into_future());

    let portal = tokio::spawn(channel::run(
        Login {
            portal_url: args.portal_url,
            token: args.token,
            external_id: args.id,
            name: args.name,
            public_key,
        },
        handle.clone(),
        egress_receiver,
    ));

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut result = Ok(());
    tokio::select! {
        _ = terminate.recv() => tracing::info!("terminating"),
        _ = interrupt.recv() => tracing::info!("interrupted"),
        ended = portal => result = ended.context("portal task").flatten(),
        ended = &mut data_ended => return ended.context("data thread")?.context("data thread"),
    }
    handle.send(Command::Shutdown);
    tokio::time::timeout(Duration::from_secs(1), data_ended)
        .await
        .ok();
    // The data thread held the sender; the rules go when it is gone.
    let _ = netconf_thread.join();
    result
}
