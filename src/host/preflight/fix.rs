//! The lines that put something right.

use std::path::Path;

use serde::Serialize;

/// How the gateway is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Platform {
    /// In a container of Docker, Podman or the like.
    Compose,
    /// In a pod.
    Kubernetes,
    /// Without a container, usually as a systemd service.
    Host,
}

impl Platform {
    /// Guesses from the files that container runtimes leave. `root` is `/` outside tests.
    pub fn detect(root: &Path) -> Self {
        // The kubelet writes the hosts file of every pod; the directory may be switched off.
        let in_pod = root.join("var/run/secrets/kubernetes.io").exists()
            || std::fs::read_to_string(root.join("etc/hosts"))
                .is_ok_and(|hosts| hosts.starts_with("# Kubernetes-managed hosts file"));
        if in_pod {
            Self::Kubernetes
        } else if root.join(".dockerenv").exists() || root.join("run/.containerenv").exists() {
            Self::Compose
        } else {
            Self::Host
        }
    }

    /// All of them.
    pub const ALL: [Self; 3] = [Self::Compose, Self::Kubernetes, Self::Host];

    /// In one word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Compose => "compose",
            Self::Kubernetes => "kubernetes",
            Self::Host => "host",
        }
    }

    /// The words before the line.
    pub(super) const fn instruction(self) -> &'static str {
        match self {
            Self::Compose => "Add to the service in compose.yaml",
            Self::Kubernetes => "Add to the pod",
            Self::Host => "On the host",
        }
    }
}

/// What to add, ready to be copied. A `#` starts a comment, as it does where the lines go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fix {
    /// For the service in a compose file.
    pub compose: String,
    /// For the pod's manifest.
    pub kubernetes: String,
    /// For a plain host: shell commands or lines of the systemd unit.
    pub host: String,
}

impl Fix {
    /// The lines for `platform`.
    pub fn on(&self, platform: Platform) -> &str {
        match platform {
            Platform::Compose => &self.compose,
            Platform::Kubernetes => &self.kubernetes,
            Platform::Host => &self.host,
        }
    }

    fn new(
        compose: impl Into<String>,
        kubernetes: impl Into<String>,
        host: impl Into<String>,
    ) -> Self {
        Self {
            compose: compose.into(),
            kubernetes: kubernetes.into(),
            host: host.into(),
        }
    }
}

/// The container has no `/dev/net/tun`, or may not open it.
pub(super) fn tun_device() -> Fix {
    Fix::new(
        r#"devices: ["/dev/net/tun:/dev/net/tun"]"#,
        r#"volumes: [{name: tun, hostPath: {path: /dev/net/tun, type: CharDevice}}]
volumeMounts: [{name: tun, mountPath: /dev/net/tun}]  # in the container; where the runtime still refuses it, a device plugin must offer it"#,
        "DeviceAllow=/dev/net/tun rw  # in the unit, if it restricts devices",
    )
}

/// The kernel has no TUN driver, which only the host can change.
pub(super) fn tun_module() -> Fix {
    Fix::new(
        "# on the machine that runs Docker:\nmodprobe tun",
        "# on the node:\nmodprobe tun",
        "modprobe tun  # and at every start: echo tun > /etc/modules-load.d/tun.conf",
    )
}

pub(super) fn net_admin() -> Fix {
    Fix::new(
        r#"cap_add: ["NET_ADMIN"]"#,
        r#"securityContext: {capabilities: {add: ["NET_ADMIN"]}}  # in the container"#,
        "AmbientCapabilities=CAP_NET_ADMIN  # in the unit",
    )
}

/// What leaving root takes.
pub(super) fn leave_root() -> Fix {
    Fix::new(
        r#"cap_add: ["NET_ADMIN", "SETUID", "SETGID"]"#,
        r#"securityContext: {capabilities: {add: ["NET_ADMIN", "SETUID", "SETGID"]}}  # in the container"#,
        "DynamicUser=yes\nAmbientCapabilities=CAP_NET_ADMIN  # in the unit, in place of root",
    )
}

/// The capability is in reach, but the user of the process does not get it.
pub(super) fn root_user() -> Fix {
    Fix::new(
        r#"user: "0:0"  # added capabilities do not reach other users; FIREZONE_USER leaves root after the start"#,
        "securityContext: {runAsUser: 0, runAsNonRoot: false}  # in the container; added capabilities do not reach other users; FIREZONE_USER leaves root after the start",
        "AmbientCapabilities=CAP_NET_ADMIN  # in the unit",
    )
}

pub(super) fn sysctl(name: &str, value: &str) -> Fix {
    Fix::new(
        format!(r#"sysctls: {{{name}: "{value}"}}"#),
        format!(
            r#"securityContext: {{sysctls: [{{name: {name}, value: "{value}"}}]}}  # of the pod; the kubelet needs --allowed-unsafe-sysctls={name}"#
        ),
        format!(
            "sysctl -w {name}={value}  # and at every start: echo '{name} = {value}' > /etc/sysctl.d/90-firezone-gateway-{}.conf",
            name.rsplit('.').next().unwrap_or(name)
        ),
    )
}

/// A sysctl that belongs to the machine, not to a network namespace.
pub(super) fn machine_sysctl(name: &str, value: u64) -> Fix {
    let command = format!("sysctl -w {name}={value}");
    Fix::new(
        format!("# compose cannot set it; on the machine that runs Docker:\n{command}"),
        format!("# on the node:\n{command}"),
        command,
    )
}

/// The kernel was built or booted without IPv6.
pub(super) fn ipv6_in_kernel() -> Fix {
    let line = "boot without ipv6.disable=1 on the kernel's command line";
    Fix::new(
        format!("# on the machine that runs Docker: {line}"),
        format!("# on the node: {line}"),
        format!("# {line}"),
    )
}

pub(super) fn nft_modules() -> Fix {
    let command = "modprobe -a nf_tables nft_chain_nat nft_masq";
    Fix::new(
        format!("# on the machine that runs Docker:\n{command}"),
        format!("# on the node:\n{command}"),
        command,
    )
}

/// Chains, as "family table chain", that need to let the tunnel through.
pub(super) fn forward_policy(chains: &[String], link: &str) -> Fix {
    let mut commands = Vec::new();
    for chain in chains {
        for key in ["iifname", "oifname"] {
            commands.push(format!("nft insert rule {chain} {key} {link} accept"));
        }
    }
    let commands = commands.join("\n");
    Fix::new(
        format!("# only with network_mode: host; on the machine that runs Docker:\n{commands}"),
        format!("# only with hostNetwork: true; on the node:\n{commands}"),
        format!(
            "{commands}\n# and the same in the firewall's own configuration, or the next reload undoes it"
        ),
    )
}

pub(super) fn clock() -> Fix {
    let command = "timedatectl set-ntp true";
    Fix::new(
        format!("# on the machine that runs Docker:\n{command}"),
        format!("# on the node:\n{command}"),
        command,
    )
}

pub(super) fn state_directory(path: &str) -> Fix {
    let unit = match path.strip_prefix("/var/lib/") {
        Some(name) => format!("StateDirectory={name}  # in the unit"),
        None => format!("ReadWritePaths={path}  # in the unit, after: mkdir -p {path}"),
    };
    Fix::new(
        format!(
            r#"volumes: ["firezone-gateway:{path}"]  # and at the top level: volumes: {{firezone-gateway: {{}}}}"#
        ),
        format!(
            "volumeMounts: [{{name: state, mountPath: {path}}}]  # in the container, with a volume named state"
        ),
        unit,
    )
}

/// The directory is there, but somebody else's.
pub(super) fn state_owner(path: &str, user: u32) -> Fix {
    let command = format!("chown {user} {path}");
    Fix::new(
        format!(
            "# on the machine that runs Docker, for the directory that is mounted there:\n{command}"
        ),
        format!("securityContext: {{fsGroup: {user}}}  # of the pod"),
        command,
    )
}

/// The kernel, or what imitates one, does not do what is asked of it.
pub(super) fn newer_kernel() -> Fix {
    let line = "Linux 5.0 or newer, and no sandbox such as gVisor in between";
    Fix::new(
        format!("# on the machine that runs Docker: {line}"),
        format!("# on the node: {line}"),
        format!("# {line}"),
    )
}

/// Packets of the tunnel do not fit through this interface.
pub(super) fn mtu(link: &str) -> Fix {
    Fix::new(
        r#"driver_opts: {com.docker.network.driver.mtu: "1500"}  # of the network, at the top level"#,
        "# on the node: a larger MTU for the pod network, in the configuration of its CNI plugin",
        format!("ip link set dev {link} mtu 1500  # and in the network's own configuration"),
    )
}

pub(super) fn resolv_conf() -> Fix {
    Fix::new(
        r#"dns: ["192.0.2.53"]  # the address of your resolver"#,
        r#"dnsPolicy: None
dnsConfig: {nameservers: ["192.0.2.53"]}  # the address of your resolver"#,
        "echo 'nameserver 192.0.2.53' >> /etc/resolv.conf  # the address of your resolver",
    )
}
