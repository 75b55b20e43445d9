//! Candidate lines and which candidates a connection should have (data-path spec §2.3).

use std::net::{IpAddr, SocketAddr};

use is::{Candidate, CandidateKind};

/// Highest-priority first, as SDP lines.
pub fn to_lines(mut candidates: Vec<Candidate>) -> Vec<String> {
    candidates.sort_by_key(|c| std::cmp::Reverse(c.prio()));
    candidates.iter().map(Candidate::to_sdp_string).collect()
}

/// Reads a signalled line; `None` for anything malformed.
pub fn parse(line: &str) -> Option<Candidate> {
    Candidate::from_sdp_string(line)
        .inspect_err(|e| tracing::debug!("skipping a candidate: {e}"))
        .ok()
}

/// Guesses that a port forwarding exists: every reflexive IPv4 address combined with every host
/// port, at most two that are not yet known.
pub fn optimistic(known: &[(SocketAddr, CandidateKind)]) -> Vec<Candidate> {
    let reflexive = known
        .iter()
        .filter(|(addr, kind)| *kind == CandidateKind::ServerReflexive && addr.is_ipv4())
        .map(|(addr, _)| addr.ip());
    let mut guesses: Vec<SocketAddr> = Vec::new();
    for ip in reflexive {
        for port in known
            .iter()
            .filter(|(addr, kind)| *kind == CandidateKind::Host && addr.is_ipv4())
            .map(|(addr, _)| addr.port())
        {
            let guess = SocketAddr::new(ip, port);
            if !guesses.contains(&guess) && !known.iter().any(|(addr, _)| *addr == guess) {
                guesses.push(guess);
            }
        }
    }
    guesses.truncate(2);
    guesses
        .into_iter()
        .filter_map(|addr| {
            let base = SocketAddr::new(unspecified(addr), 0);
            Candidate::server_reflexive(addr, base, "udp").ok()
        })
        .collect()
}

fn unspecified(addr: SocketAddr) -> IpAddr {
    if addr.is_ipv4() {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use is::{IceAgent, IceCreds};

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn agent() -> IceAgent {
        IceAgent::new(IceCreds {
            ufrag: "ww54".into(),
            pass: "atm32zsp76tbbrq6su4fqb".into(),
        })
    }

    #[test]
    fn lines_come_highest_priority_first_in_the_signalled_grammar() {
        let mut agent = agent();
        let base = addr("192.168.1.2:5000");
        let added: Vec<_> = [
            Candidate::relayed(addr("203.0.113.1:50000"), base, "udp").unwrap(),
            Candidate::server_reflexive(addr("198.51.100.1:5000"), base, "udp").unwrap(),
            Candidate::host(base, "udp").unwrap(),
        ]
        .into_iter()
        .map(|c| agent.add_local_candidate(c).unwrap().clone())
        .collect();
        let lines = to_lines(added);
        assert!(
            lines[0].ends_with(" 192.168.1.2 5000 typ host ufrag ww54"),
            "{lines:?}"
        );
        assert!(
            lines[1].ends_with(" 198.51.100.1 5000 typ srflx raddr 0.0.0.0 rport 0 ufrag ww54"),
            "{lines:?}"
        );
        assert!(
            lines[2].ends_with(" 203.0.113.1 50000 typ relay raddr 0.0.0.0 rport 0 ufrag ww54"),
            "{lines:?}"
        );
        for line in &lines {
            assert!(line.starts_with("candidate:") && line.contains(" 1 udp "));
        }
    }

    #[test]
    fn both_generations_of_lines_parse_and_rubbish_does_not() {
        let old = parse("candidate:1 1 udp 1694498815 198.51.100.1 5000 typ srflx").unwrap();
        assert_eq!(old.kind(), CandidateKind::ServerReflexive);
        let v6 = parse(
            "candidate:x 1 udp 37748735 2001:db8::9 50000 typ relay raddr :: rport 0 ufrag qslo",
        )
        .unwrap();
        assert_eq!(v6.addr(), addr("[2001:db8::9]:50000"));
        assert!(parse("1 1 udp 1 198.51.100.1 5000 typ host").is_none());
        assert!(parse("candidate:1 1 udp 1 198.51.100.1 port typ host").is_none());
        assert!(parse("").is_none());
    }

    #[test]
    fn reflexive_address_with_host_port_is_tried_once() {
        let mut known = vec![
            (addr("10.0.0.2:52625"), CandidateKind::Host),
            (addr("198.51.100.1:40000"), CandidateKind::ServerReflexive),
            (addr("[2001:db8::1]:52625"), CandidateKind::Host),
        ];
        let guesses = optimistic(&known);
        assert_eq!(guesses.len(), 1);
        assert_eq!(guesses[0].addr(), addr("198.51.100.1:52625"));
        known.push((guesses[0].addr(), guesses[0].kind()));
        assert!(optimistic(&known).is_empty());
    }
}
