//! `lab-collector`: keeps the traces it is sent and answers questions about them.

mod support;

use std::net::SocketAddr;

use clap::Parser;
use firezone_lab::collector::{self, Store};

/// OTLP/HTTP receiver for tests: POST protobuf to /v1/traces, read back with GET /spans.
#[derive(Parser)]
#[command(name = "lab-collector", version)]
struct Args {
    /// Address to listen on; 4318 is the OTLP/HTTP port.
    #[arg(long, env = "LAB_COLLECTOR_LISTEN", default_value = "0.0.0.0:4318")]
    listen: SocketAddr,
    /// Number of spans to keep; the oldest go first.
    #[arg(long, env = "LAB_COLLECTOR_CAPACITY", default_value_t = 100_000)]
    capacity: usize,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    support::init_logging();
    // Before anybody can connect: who starts this process may end it then.
    let terminated = support::terminated()?;
    let listener = tokio::net::TcpListener::bind(args.listen).await?;
    tracing::info!(address = %listener.local_addr()?, "collector listening");
    let app = collector::router(Store::with_capacity(args.capacity));
    tokio::select! {
        result = std::future::IntoFuture::into_future(axum::serve(listener, app)) => result?,
        () = terminated => {}
    }
    Ok(())
}
