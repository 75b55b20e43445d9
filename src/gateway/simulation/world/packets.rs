//! What goes through the tunnel: numbered requests, and their answers.

use super::*;

/// What went through the tunnel for a client.
#[derive(Debug, Default)]
pub(in super::super) struct Flow {
    sent: u64,
    /// The way that each request and answer took, by number.
    ways: HashMap<(bool, u64), (SocketAddr, SocketAddr)>,
    /// The newest that arrived: requests at the gateway, answers at the client.
    pub(super) newest: [Option<u64>; 2],
    /// Answers, and when they came.
    pub(in super::super) answers: Vec<(Instant, u64)>,
    /// Packets that came after a later one although both went the same way.
    pub(in super::super) overtaken: u64,
}

impl World {
    pub(super) fn request(&mut self, n: usize) {
        let device = &mut self.devices[n];
        let Some(source) = device.tunnel else {
            return;
        };
        device.packets += 1;
        let packet = numbered(source.octets(), RESOURCE, n, device.packets);
        device.flow.sent += 1;
        if let Some(way) = device.way(self.now) {
            device.flow.ways.insert((false, device.packets), way);
        }
        device.core.handle_tun_packet(self.now, &packet);
    }

    /// A datagram that arrives at the gateway: what a worker would do with it.
    pub(super) fn gateway_receives(&mut self, datagram: &Datagram) {
        let Datagram { from, to, payload } = datagram;
        let Some((index, range)) = established(&self.table.relays(), *from, payload) else {
            self.core.handle_datagram(self.now, *to, *from, payload);
            return;
        };
        let Some(peer) = self.table.by_receiver_index(index) else {
            return;
        };
        let mut scratch = [0; 2048];
        let packet = match peer.tunn().decapsulate(None, &payload[range], &mut scratch) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                packet.to_vec()
            }
            _ => return,
        };
        self.leave_tunnel(&peer, &packet);
    }

    pub(super) fn leave_tunnel(&mut self, peer: &Peer, packet: &[u8]) {
        let meta = Meta::parse(packet).expect("clients send valid packets");
        if meta.is_control() {
            self.core.handle_control(self.now, peer.client, packet);
            return;
        }
        let allowed = peer
            .policy()
            .is_some_and(|policy| policy.outbound(&meta, self.now).is_allow());
        if !allowed {
            return;
        }
        peer.counters.traffic.received(1, packet.len() as u64);
        let (n, number) = number_of(packet);
        if Some(meta.src) != self.devices[n].tunnel.map(IpAddr::V4) {
            self.astray += 1;
        }
        self.devices[n].flow.arrived(false, number);
        // The resource answers.
        let IpAddr::V4(client) = meta.src else {
            return;
        };
        let answer = numbered(RESOURCE, client.octets(), n, number);
        self.enter_tunnel(client, &answer, n, number);
    }

    pub(super) fn enter_tunnel(&mut self, client: Ipv4Addr, packet: &[u8], n: usize, number: u64) {
        let Some(peer) = self.table.by_address(client.into()) else {
            return;
        };
        let Some(path) = peer.path() else {
            return;
        };
        let mut buffer = vec![0; packet.len() + 32];
        let mut tunn = peer.tunn();
        if tunn.time_since_last_handshake().is_none() {
            return;
        }
        let TunnResult::WriteToNetwork(message) = tunn.encapsulate(packet, &mut buffer) else {
            return;
        };
        let message = message.to_vec();
        drop(tunn);
        peer.counters.traffic.sent(1, packet.len() as u64);
        let Path {
            source,
            destination,
            channel,
            ..
        } = *path;
        let way = SocketAddr::new(source.unwrap_or(destination.ip()), channel.unwrap_or(0));
        let flow = &mut self.devices[n].flow;
        flow.ways.insert((true, number), (way, destination));
        let payload = match channel {
            Some(channel) => connectivity::wrap(channel, &message).expect("short"),
            None => message,
        };
        self.network.send(
            self.now,
            self.gateway_host,
            source,
            PORT,
            destination,
            payload,
        );
    }

    pub(super) fn client_packets(&mut self, n: usize) {
        let device = &mut self.devices[n];
        let packets: Vec<Vec<u8>> = device
            .core
            .tun_packets()
            .iter()
            .map(<[u8]>::to_vec)
            .collect();
        device.core.tun_packets().clear();
        for packet in packets {
            let (meant, number) = number_of(&packet);
            if meant != n {
                self.astray += 1;
                continue;
            }
            let flow = &mut self.devices[n].flow;
            flow.arrived(true, number);
            flow.answers.push((self.now, number));
        }
    }
}

impl Flow {
    pub(super) fn arrived(&mut self, answer: bool, number: u64) {
        let newest = &mut self.newest[usize::from(answer)];
        if let Some(newest) = *newest
            && newest > number
        {
            // What took another way may well be overtaken.
            let way = |n| self.ways.get(&(answer, n));
            if way(newest) == way(number) {
                self.overtaken += 1;
            }
        }
        *newest = (*newest).max(Some(number));
    }
}

/// A UDP packet that says whose it is and which.
fn numbered(source: [u8; 4], destination: [u8; 4], client: usize, number: u64) -> Vec<u8> {
    let mut udp = vec![0x13, 0x88, 0x13, 0x88, 0, 24, 0, 0];
    udp.extend_from_slice(&(client as u64).to_be_bytes());
    udp.extend_from_slice(&number.to_be_bytes());
    samples::ip4(source, destination, 17, &udp)
}

fn number_of(packet: &[u8]) -> (usize, u64) {
    let at = |i: usize| u64::from_be_bytes(packet[i..i + 8].try_into().expect("eight bytes"));
    (usize::try_from(at(28)).expect("few"), at(36))
}
