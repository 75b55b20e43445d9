//! What all connections share: relays, candidates, and what goes out.

use super::*;

/// Everything but the connections, so that a connection and this can be borrowed together.
pub(super) struct Io {
    pub(super) config: CoreConfig,
    pub(super) relays: Relays,
    pub(super) transmits: TransmitQueue,
    pub(super) tun: PacketQueue,
    pub(super) egress: VecDeque<Egress>,
    pub(super) host_addrs: BTreeSet<IpAddr>,
    pub(super) route_probes: VecDeque<SocketAddr>,
    pub(super) counters: Counters,
    pub(super) portal_up: bool,
    pub(super) scratch: Box<[u8; SCRATCH]>,
}

/// Sends a WireGuard datagram on the current path, if there is one.
pub(super) fn send_on(
    now: Instant,
    path: Option<Nominated>,
    datagram: &[u8],
    relays: &mut Relays,
    transmits: &mut TransmitQueue,
) {
    let Some(path) = path else { return };
    if relays.is_relayed(path.local) {
        relays.send(now, path.local, path.remote, datagram, transmits);
    } else {
        transmits.push(Some(path.local.ip()), path.remote, &[], datagram);
    }
}

impl Io {
    pub(super) fn send_packet(&mut self, now: Instant, connection: &mut Connection, packet: &[u8]) {
        let path = connection.nominated;
        let Some(needed) = packet.len().checked_add(32) else {
            return;
        };
        if needed > self.scratch.len() {
            return;
        }
        if let Some(datagram) = connection.encapsulate(now, packet, self.scratch.as_mut_slice()) {
            send_on(now, path, datagram, &mut self.relays, &mut self.transmits);
        }
    }

    /// Drains the agent: checks go out, events are applied, due work is done.
    pub(super) fn drive(&mut self, now: Instant, connection: &mut Connection) {
        // With Ta = 0 the agent does one check per call; the pair limit of 100 bounds the rounds.
        for _ in 0..256 {
            while let Some(transmit) = connection.agent.poll_transmit() {
                let path = Nominated {
                    local: transmit.source,
                    remote: transmit.destination,
                };
                send_on(
                    now,
                    Some(path),
                    &transmit.contents,
                    &mut self.relays,
                    &mut self.transmits,
                );
            }
            while let Some(event) = connection.agent.poll_event() {
                if connection.handle_agent_event(now, event) {
                    tracing::info!(gateway = %connection.gateway_id, pair = ?connection.nominated, "nominated");
                    let path = connection.nominated;
                    if let Some(datagram) =
                        connection.initiate_after_nomination(now, self.scratch.as_mut_slice())
                    {
                        send_on(now, path, datagram, &mut self.relays, &mut self.transmits);
                    }
                }
            }
            if connection.agent.poll_timeout().is_none_or(|at| at > now) {
                break;
            }
            connection.agent.handle_timeout(now);
        }
    }

    pub(super) fn tick(
        &mut self,
        now: Instant,
        connection: &mut Connection,
    ) -> Result<(), Failure> {
        let path = connection.nominated;
        if let Some(datagram) = connection.tick(now, self.scratch.as_mut_slice())? {
            send_on(now, path, datagram, &mut self.relays, &mut self.transmits);
        }
        Ok(())
    }

    /// Channels and host addresses for new remote candidates.
    pub(super) fn reach_remotes(
        &mut self,
        now: Instant,
        connection: &Connection,
        remotes: &[(SocketAddr, CandidateKind)],
    ) {
        for (addr, kind) in remotes {
            let through_relay = *kind != CandidateKind::Host;
            if through_relay && let Some(relay) = connection.relay {
                self.relays.want_channel(now, relay, *addr);
            }
            if self.config.only != Only::Relay && *kind != CandidateKind::Relayed {
                self.route_probes.push_back(*addr);
            }
        }
    }

    /// Brings the agent's local candidates and what the gateway knows of them up to date.
    pub(super) fn sync_candidates(&mut self, now: Instant, connection: &mut Connection) {
        if self.config.only != Only::Direct {
            let usable = connection
                .relay
                .is_some_and(|relay| self.relays.has_allocation(relay));
            if !usable && let Some(relay) = self.relays.best() {
                connection.relay = Some(relay);
                let remotes = connection.remote.clone();
                self.reach_remotes(now, connection, &remotes);
            }
        }
        let wanted = self.wanted_candidates(connection.relay);
        for candidate in &wanted {
            if !connection.local.iter().any(|c| same(c, candidate))
                && let Some(added) = connection.agent.add_local_candidate(candidate.clone())
            {
                connection.local.push(added.clone());
            }
        }
        // Only relayed candidates are ever taken back (§2.3).
        let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut connection.local)
            .into_iter()
            .partition(|c| c.kind() != CandidateKind::Relayed || wanted.iter().any(|w| same(c, w)));
        connection.local = kept;
        for candidate in gone {
            connection.agent.invalidate_candidate(&candidate);
            if connection.signalled.iter().any(|c| same(c, &candidate)) {
                connection.signalled.retain(|c| !same(c, &candidate));
                connection.withdrawn.push(candidate);
            }
        }
        if self.portal_up {
            self.signal(connection);
        }
        connection.agent.handle_timeout(now);
    }

    pub(super) fn signal(&mut self, connection: &mut Connection) {
        let gateway_id = connection.gateway_id;
        // Withdrawn and added again while the portal was away: nothing to say.
        let local = &connection.local;
        connection
            .withdrawn
            .retain(|gone| !local.iter().any(|c| same(c, gone)));
        if !connection.withdrawn.is_empty() {
            let candidates = candidate::to_lines(std::mem::take(&mut connection.withdrawn));
            self.egress
                .push_back(Egress::InvalidateGatewayIceCandidates {
                    gateway_id,
                    candidates,
                });
        }
        let fresh: Vec<Candidate> = connection
            .local
            .iter()
            .filter(|c| !connection.signalled.iter().any(|s| same(s, c)))
            .cloned()
            .collect();
        if !fresh.is_empty() {
            connection.signalled.extend(fresh.iter().cloned());
            self.egress.push_back(Egress::NewGatewayIceCandidates {
                gateway_id,
                candidates: candidate::to_lines(fresh),
            });
        }
    }

    pub(super) fn wanted_candidates(&self, relay: Option<Uuid>) -> Vec<Candidate> {
        let mut hosts: Vec<SocketAddr> = Vec::new();
        let mut wanted = Vec::new();
        if self.config.only != Only::Relay {
            for ip in &self.host_addrs {
                let port = if ip.is_ipv4() {
                    self.config.port_v4
                } else {
                    self.config.port_v6
                };
                hosts.extend(port.map(|port| SocketAddr::new(*ip, port)));
            }
            hosts.extend(self.relays.paths().filter_map(|(_, p)| p.local()));
            hosts.sort_unstable();
            hosts.dedup();
            wanted.extend(hosts.iter().map(|addr| Candidate::host(*addr, "udp")));
            wanted.extend(
                self.relays
                    .paths()
                    .filter_map(|(_, p)| Some((p.mapped()?, p.local()?)))
                    .map(|(mapped, local)| Candidate::server_reflexive(mapped, local, "udp")),
            );
        }
        if self.config.only != Only::Direct {
            wanted.extend(
                self.relays
                    .paths()
                    .filter(|(id, _)| Some(*id) == relay)
                    .filter_map(|(_, p)| Some((p.relayed()?, p.local()?)))
                    .map(|(relayed, local)| Candidate::relayed(relayed, local, "udp")),
            );
        }
        // Addresses that cannot be candidates, such as link-local ones, are left out.
        wanted.into_iter().flatten().collect()
    }
}

fn same(a: &Candidate, b: &Candidate) -> bool {
    a.addr() == b.addr() && a.kind() == b.kind() && a.local() == b.local()
}
