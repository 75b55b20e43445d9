//! What is opened while the process may still be root.

use std::path::Path;

use crate::admin::{self, BindError, Offer, Opened};
use crate::config::Config;
use crate::device::Nodes;
use crate::host::buffers;
use crate::host::preflight::{self, Environment, Finding, KernelOffloads, TunDevice};
use crate::host::privileges::{self, Outcome, Rights, User};
use crate::kept_files;

use super::host_setup::{environment, tun_device, workers_wanted};

/// What all of this is for.
const SETTING: &str = "FIREZONE_USER";

/// Sockets and devices for [`run`](super::run), opened by whoever the process was then.
#[derive(Debug)]
pub struct Prepared {
    pub(super) listeners: Vec<(Opened, Offer)>,
    /// Why there is no status page, if only that cannot be had.
    pub(super) without_page: Option<BindError>,
    pub(super) nodes: Nodes,
}

impl Prepared {
    /// Opens what may need the rights of root.
    ///
    /// # Errors
    /// When an address that somebody chose for the admin server cannot be had.
    pub fn open(config: &Config) -> Result<Self, BindError> {
        let places = &config.listeners;
        let mut listeners = Vec::new();
        let mut without_page = None;
        if let Some(place) = places.probes.clone() {
            let offer = if places.are_one() {
                Offer::Everything
            } else {
                Offer::Probes
            };
            listeners.push((admin::open(place)?, offer));
        }
        if let Some(place) = places.admin.clone().filter(|_| !places.are_one()) {
            match admin::open(place) {
                Ok(opened) => listeners.push((opened, Offer::Everything)),
                // Nobody asked for this very port; something else may well have been there before.
                Err(error) if !places.chosen => without_page = Some(error),
                Err(error) => return Err(error),
            }
        }
        Ok(Self {
            listeners,
            without_page,
            nodes: Nodes::default(),
        })
    }
}

/// Gives the state directory to the user that the gateway is to be, before anything is stored there.
pub fn hand_over_state(config: &mut Config, rights: &Rights) {
    let Some(user) = rights.leaving_for() else {
        return;
    };
    if let Err(error) = privileges::hand_over(&config.state_dir, user)
        // Nobody could write it then, which the check of the host tells.
        && error.kind() != std::io::ErrorKind::ReadOnlyFilesystem
    {
        let directory = config.state_dir.display();
        let message = format!(
            "{directory} cannot be given to group {} ({error}); nothing can be kept there unless user {} \
             may write it: chown {user} {directory}",
            user.gid, user.uid
        );
        config.tell(SETTING, message);
    }
}

/// Leaves root, if that is wanted and can be done; what is opened as root and read again later goes
/// along. Nothing but the notices tells of it, since there is no log yet.
pub fn leave_root(config: &mut Config, prepared: &mut Prepared, rights: Rights) -> Outcome {
    if rights.leaving_for().is_some() {
        kept_files::keep(files(config).iter().map(|path| path.as_path()));
        if config.check_host {
            // Where it is missing, only root can make it.
            preflight::make_tun_device(Path::new("/"));
        }
        prepared.nodes = Nodes::open(workers_wanted(config));
        if config.raise_buffer_limits {
            buffers::raise(Path::new("/"));
        }
    }
    let outcome = rights.leave(privileges::is_low_port(config.udp_port));
    match &outcome {
        Outcome::Left(user) | Outcome::Failed(user, _) => {
            prepared.nodes.let_go_if_open();
            tell_kept(config, *user);
        }
        Outcome::Stayed(why) => {
            config.stays_root = Some(why.clone());
            // Otherwise the check of the host says so, with the line to add.
            if !config.check_host {
                config.tell(SETTING, format!("stays root: {why}"));
            }
        }
        Outcome::Kept | Outcome::Trimmed => {}
    }
    if let Outcome::Failed(user, why) = &outcome {
        config.tell(SETTING, format!("user {user} was taken, but {why}"));
    }
    outcome
}

/// Looks at the host as the gateway will find it, with the rights that it will have, and changes
/// nothing; also beside a gateway that runs. What the settings are in for then is added to their notices.
pub fn check_host(config: &mut Config, rights: Rights) -> Vec<Finding> {
    let leaving = rights.leaving_for();
    let state_handed_over =
        leaving.is_some_and(|user| privileges::can_hand_over(&config.state_dir, user));
    let nodes = match leaving {
        Some(_) => Nodes::open(1),
        None => Nodes::default(),
    };
    if leaving.is_some() {
        kept_files::keep(files(config).iter().map(|path| path.as_path()));
    }
    let can_be_made = preflight::tun_device_can_be_made(Path::new("/"));
    let outcome = rights.leave(privileges::is_low_port(config.udp_port));
    match outcome {
        Outcome::Stayed(why) => config.stays_root = Some(why),
        Outcome::Left(user) | Outcome::Failed(user, _) => tell_kept(config, user),
        Outcome::Kept | Outcome::Trimmed => {}
    }
    nodes.let_go_if_open();
    preflight::run(&Environment {
        tun_device: if can_be_made {
            TunDevice::ToBeMade
        } else {
            tun_device(&nodes)
        },
        offloads: KernelOffloads::Probe(&nodes),
        raises_buffers: config.raise_buffer_limits,
        state_handed_over,
        may_make: false,
        ..environment(config)
    })
}

/// Whoever replaces a secret should know beforehand that it will not be read.
fn tell_kept(config: &mut Config, user: User) {
    for path in kept_files::let_go() {
        let path = path.display();
        config.tell(
            SETTING,
            format!(
                "{path} may be read by root only. What changes in it is noticed, but another file in its \
                 place cannot be read: chown {user} {path}"
            ),
        );
    }
}

/// Files that are read again, or only once there are threads.
fn files(config: &Config) -> Vec<std::path::PathBuf> {
    let telemetry = &config.telemetry;
    let exports = [&telemetry.export, &telemetry.metrics, &telemetry.logs];
    let certificates = exports.into_iter().filter_map(|export| export.target());
    let certificates = certificates.flat_map(|target| {
        let client = target.client.iter().flat_map(|(chain, key)| [chain, key]);
        target.certificate.iter().chain(client)
    });
    let token = config.token_source.path();
    let admin_token = config.admin_token.as_ref().map(|token| token.path());
    let named = [token, admin_token, telemetry.log_filter_file.as_deref()];
    let named = named.into_iter().flatten();
    named
        .map(Path::to_owned)
        .chain(certificates.cloned())
        .collect()
}
