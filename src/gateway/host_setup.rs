//! Getting from the host what carrying traffic needs: the device, the sockets, masquerading.
//!
//! What is missing is named in the status and tried again; the process stays up, so that the
//! message can be read where operators look (`/readyz?verbose`, `status`).

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::admin::model::{DeviceStatus, HostFinding};
use crate::config::Config;
use crate::device::Tun;
use crate::host::buffers;
use crate::host::nft::{self, NftError};
use crate::host::preflight::{self, Environment, Nftables, Platform};
use crate::net::{SocketOptions, Sockets};

/// Device and sockets.
pub(super) struct Host {
    pub(super) tun: Arc<Tun>,
    pub(super) sockets: Arc<Sockets>,
    masquerading: Arc<Mutex<Masquerading>>,
}

/// What is known about our nftables rules.
struct Masquerading {
    installed: Result<(), NftError>,
    /// They were taken back for good; a check that is still under way must not restore them.
    released: bool,
}

impl Host {
    /// Makes the device, binds the sockets and installs masquerading. Without masquerading the
    /// gateway still serves resources that know a way back, so that is only a finding.
    ///
    /// # Errors
    /// What is missing, in words that name the setting to change.
    pub(super) fn acquire(config: &Config) -> Result<Self, String> {
        if config.raise_buffer_limits {
            let report = buffers::raise(Path::new("/"));
            tracing::debug!(receive = %report.receive, send = %report.send, "socket buffer limits");
        }
        let tun = Tun::create(&config.tun_name).map_err(|e| e.to_string())?;
        let sockets = Sockets::bind(SocketOptions {
            port: config.udp_port,
            send_buffer: config.udp_send_buffer,
            recv_buffer: config.udp_recv_buffer,
        })
        .map_err(|e| format!("cannot bind a UDP socket: {e}"))?;
        Ok(Self {
            masquerading: Arc::new(Mutex::new(Masquerading {
                installed: nft::install(tun.name()),
                released: false,
            })),
            tun: Arc::new(tun),
            sockets: Arc::new(sockets),
        })
    }

    /// A look at the host, which also restores masquerading if somebody has flushed it. It asks the
    /// kernel, which may take its time: not for the slow path's own thread.
    pub(super) fn checker(&self, config: &Config) -> impl FnOnce() -> Vec<HostFinding> + use<> {
        let (config, tun) = (config.clone(), Arc::clone(&self.tun));
        let masquerading = Arc::clone(&self.masquerading);
        move || {
            let mut state = masquerading.lock().unwrap_or_else(PoisonError::into_inner);
            if !state.released && !matches!(nft::is_installed(), Ok(true)) {
                if state.installed.is_ok() {
                    tracing::warn!("The nftables rules are gone; installing them again");
                }
                state.installed = nft::install(tun.name());
            }
            findings(&config, Nftables::Known(&state.installed))
        }
    }

    /// Takes back what the device does not take with it when it goes.
    pub(super) fn release(&self) {
        let mut state = self
            .masquerading
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        state.released = true;
        if let Err(error) = nft::remove() {
            tracing::debug!(%error, "nftables rules not removed");
        }
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

/// Looks at the host before there is a device.
pub(super) fn first_findings(config: &Config) -> Vec<HostFinding> {
    findings(config, Nftables::Probe)
}

fn findings(config: &Config, nftables: Nftables<'_>) -> Vec<HostFinding> {
    if !config.check_host {
        return Vec::new();
    }
    let environment = Environment {
        nftables,
        ..Environment::of_this_host(&config.state_dir, &config.tun_name)
    };
    let platform = Platform::detect(&environment.root);
    preflight::run(&environment)
        .iter()
        .map(|finding| finding.to_status(platform))
        .collect()
}
