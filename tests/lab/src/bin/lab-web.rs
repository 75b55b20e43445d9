//! `lab-web`: the resource behind the gateway.

mod support;

use std::net::SocketAddr;

use clap::Parser;
use firezone_lab::web;

/// Web server for tests: says whom it sees, sends and swallows bytes.
#[derive(Parser)]
#[command(name = "lab-web", version)]
struct Args {
    /// Addresses to listen on, separated by commas. A family that the host lacks is skipped.
    #[arg(
        long,
        env = "LAB_WEB_LISTEN",
        value_delimiter = ',',
        default_value = "[::]:80,0.0.0.0:80"
    )]
    listen: Vec<SocketAddr>,
    /// Name shown on the page; the host name by default.
    #[arg(long, env = "LAB_WEB_NAME")]
    name: Option<String>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    support::init_logging();
    let name = args.name.unwrap_or_else(web::host_name);
    // Before anybody can connect: who starts this process may end it then.
    let terminated = support::terminated()?;
    let listeners = web::bind(&args.listen)?;
    tokio::select! {
        result = web::serve(listeners, name) => result?,
        () = terminated => {}
    }
    Ok(())
}
