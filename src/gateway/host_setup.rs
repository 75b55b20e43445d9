//! Getting from the host what carrying traffic needs: the device, the sockets, masquerading.
//!
//! What is missing is named in the status and tried again; the process stays up, so that the
//! message can be read where operators look (`/readyz?verbose`, `status`).

use std::path::Path;
use std::sync::Arc;

use crate::admin::model::{DeviceStatus, HostFinding};
use crate::config::Config;
use crate::device::Tun;
use crate::host::{nft, preflight};
use crate::net::{SocketOptions, Sockets};

/// Device and sockets.
pub(super) struct Host {
    pub(super) tun: Arc<Tun>,
    pub(super) sockets: Arc<Sockets>,
}

impl Host {
    /// Makes the device, binds the sockets and installs masquerading.
    ///
    /// # Errors
    /// What is missing, in words that name the setting to change.
    pub(super) fn acquire(config: &Config) -> Result<Self, String> {
        let tun = Tun::create(&config.tun_name).map_err(|e| e.to_string())?;
        let sockets = Sockets::bind(SocketOptions {
            port: config.udp_port,
            send_buffer: config.udp_send_buffer,
            recv_buffer: config.udp_recv_buffer,
        })
        .map_err(|e| format!("cannot bind a UDP socket: {e}"))?;
        nft::install(tun.name()).map_err(|e| format!("cannot install masquerading: {e}"))?;
        Ok(Self {
            tun: Arc::new(tun),
            sockets: Arc::new(sockets),
        })
    }

    /// What to show about the device.
    pub(super) fn describe(&self) -> DeviceStatus {
        DeviceStatus {
            name: self.tun.name().to_owned(),
            up: true,
            error: None,
            addresses: Vec::new(),
            sockets: self
                .sockets
                .iter()
                .map(|s| {
                    let (send, receive) = s.buffer_sizes();
                    format!("{} (send {send} B, receive {receive} B)", s.local_addr())
                })
                .collect(),
            offloads: self
                .sockets
                .iter()
                .next()
                .map(|s| {
                    let mut on = Vec::new();
                    if s.max_segments() > 1 {
                        on.push("udp_gso".to_owned());
                    }
                    if s.has_gro() {
                        on.push("udp_gro".to_owned());
                    }
                    on
                })
                .unwrap_or_default(),
            workers: 1,
        }
    }
}

/// Looks at the host anew.
pub(super) fn findings(config: &Config) -> Vec<HostFinding> {
    if !config.check_host {
        return Vec::new();
    }
    preflight::run(Path::new("/"), &config.state_dir)
        .iter()
        .map(HostFinding::from)
        .collect()
}
