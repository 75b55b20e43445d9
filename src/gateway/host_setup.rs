//! Getting from the host what carrying traffic needs: the device, the sockets, masquerading.
//!
//! What is missing is named in the status and tried again; the process stays up, so that the
//! message can be read where operators look (`/readyz?verbose`, `status`).

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::admin::model::{DeviceStatus, HostFinding, KernelDrops};
use crate::config::{Config, Offloads};
use crate::device::{self, Nodes, Tun};
use crate::host::buffers;
use crate::host::nft::{self, NftError};
use crate::host::preflight::{
    self, Environment, KernelOffloads, Nftables, Owner, Platform, TunDevice,
};
use crate::net::{SocketOptions, Sockets, UdpSocket};

/// Device and sockets.
pub(super) struct Host {
    pub(super) tun: Arc<Tun>,
    /// A set for each worker.
    pub(super) sockets: Vec<Arc<Sockets>>,
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
    pub(super) fn acquire(config: &Config, nodes: &Nodes) -> Result<Self, String> {
        if config.raise_buffer_limits {
            let report = buffers::raise(Path::new("/"));
            tracing::debug!(receive = %report.receive, send = %report.send, "socket buffer limits");
        }
        let wanted = config.offloads;
        let options = device::Options {
            queues: workers_wanted(config),
            tso: wanted.tun_tso,
            uso: wanted.tun_uso,
        };
        let mut tun =
            Tun::create_from(nodes, &config.tun_name, options).map_err(|e| e.to_string())?;
        let options = SocketOptions {
            port: config.udp_port,
            send_buffer: config.udp_send_buffer,
            recv_buffer: config.udp_recv_buffer,
            gso: wanted.udp_gso,
            gro: wanted.udp_gro,
        };
        let sockets = Sockets::bind_group(options, tun.queues().len())
            .map_err(|e| format!("cannot bind a UDP socket: {e}"))?;
        tun.keep_queues(sockets.len());
        Ok(Self {
            masquerading: Arc::new(Mutex::new(Masquerading {
                installed: nft::install(tun.name()),
                released: false,
            })),
            tun: Arc::new(tun),
            sockets: sockets.into_iter().map(Arc::new).collect(),
        })
    }

    /// A look at the host, which also restores masquerading if somebody has flushed it. It asks the
    /// kernel, which may take its time: not for the slow path's own thread.
    pub(super) fn checker(
        &self,
        config: &Config,
        portal_ahead: Option<f64>,
    ) -> impl FnOnce() -> Vec<HostFinding> + use<> {
        let (config, tun) = (config.clone(), Arc::clone(&self.tun));
        let offloads = self.offloads();
        let masquerading = Arc::clone(&self.masquerading);
        move || {
            let mut state = masquerading.lock().unwrap_or_else(PoisonError::into_inner);
            if !state.released && !matches!(nft::is_installed(), Ok(true)) {
                if state.installed.is_ok() {
                    tracing::warn!("The nftables rules are gone; installing them again");
                }
                state.installed = nft::install(tun.name());
            }
            findings(
                &config,
                Environment {
                    nftables: Nftables::Known(&state.installed),
                    tun_device: TunDevice::Open,
                    offloads: KernelOffloads::Known(offloads),
                    portal_ahead,
                    ..environment(&config)
                },
            )
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

    /// How many workers there can be.
    pub(super) fn workers(&self) -> usize {
        self.sockets.len()
    }

    /// What the kernel does for us.
    fn offloads(&self) -> Offloads {
        let device = self.tun.offloads();
        let every = |has: fn(&UdpSocket) -> bool| self.sockets[0].iter().all(has);
        Offloads {
            tun_tso: device.tso,
            tun_uso: device.uso,
            udp_gso: every(|socket| socket.max_segments() > 1),
            udp_gro: every(UdpSocket::has_gro),
        }
    }

    /// What the kernel has dropped before the gateway saw it.
    pub(super) fn kernel_drops(&self) -> KernelDrops {
        let sockets = self.sockets.iter().flat_map(|sockets| sockets.iter());
        let udp = sockets
            .map(|socket| u64::from(socket.dropped().unwrap_or(0)))
            .sum();
        let name = self.tun.name();
        let file = format!("/sys/class/net/{name}/statistics/tx_dropped");
        let device = std::fs::read_to_string(file)
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0);
        KernelDrops { udp, device }
    }

    /// What to show about the device.
    pub(super) fn describe(&self) -> DeviceStatus {
        DeviceStatus {
            name: self.tun.name().to_owned(),
            up: true,
            error: None,
            addresses: Vec::new(),
            sockets: self.sockets[0]
                .iter()
                .map(|s| {
                    let (send, receive) = s.buffer_sizes();
                    format!("{} (send {send} B, receive {receive} B)", s.local_addr())
                })
                .collect(),
            offloads: self.offloads().names().map(str::to_owned).collect(),
            workers: self.workers(),
            kernel_drops: self.kernel_drops(),
        }
    }
}

/// How many workers there shall be.
pub(super) fn workers_wanted(config: &Config) -> usize {
    config.workers.unwrap_or_else(default_workers)
}

/// One worker per core that we may use, but not so many that most have nothing to do.
fn default_workers() -> usize {
    const MOST: usize = 8;
    std::thread::available_parallelism().map_or(1, |cores| cores.get().min(MOST))
}

/// Looks at the host before there is a device.
pub(super) fn first_findings(config: &Config, nodes: &Nodes) -> Vec<HostFinding> {
    findings(
        config,
        Environment {
            tun_device: tun_device(nodes),
            ..environment(config)
        },
    )
}

/// What is known about the device before there is one.
pub(super) fn tun_device(nodes: &Nodes) -> TunDevice {
    if nodes.are_there() {
        TunDevice::Open
    } else {
        TunDevice::Probe
    }
}

pub(super) fn environment(config: &Config) -> Environment<'_> {
    Environment {
        wanted_offloads: config.offloads,
        owner: Owner {
            wanted: config.user,
            stays_root: config.stays_root.as_deref(),
        },
        ..Environment::of_this_host(&config.state_dir, &config.tun_name)
    }
}

fn findings(config: &Config, environment: Environment<'_>) -> Vec<HostFinding> {
    if !config.check_host {
        return Vec::new();
    }
    let platform = Platform::detect(&environment.root);
    preflight::run(&environment)
        .iter()
        .map(|finding| finding.to_status(platform))
        .collect()
}
