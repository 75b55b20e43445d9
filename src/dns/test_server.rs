//! A name server for tests, on a loopback address of its own choice.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hickory_resolver::proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_resolver::proto::rr::rdata::{A, AAAA, TXT};
use hickory_resolver::proto::rr::{RData, Record, RecordType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UdpSocket};

use super::resolver::Settings;

/// What it answers, by name and type.
#[derive(Clone, Default)]
pub(super) struct Zone {
    pub(super) records: Vec<(&'static str, RData)>,
    /// Names whose queries fail.
    pub(super) broken: Vec<&'static str>,
    /// Names whose queries are not answered.
    pub(super) silent: Vec<&'static str>,
    /// How long answers over UDP take.
    pub(super) delay: Duration,
}

impl Zone {
    pub(super) fn address(mut self, name: &'static str, address: &str) -> Self {
        let data = match address.parse().unwrap() {
            IpAddr::V4(a) => RData::A(A(a)),
            IpAddr::V6(a) => RData::AAAA(AAAA(a)),
        };
        self.records.push((name, data));
        self
    }

    /// A TXT record of this many bytes and a few more.
    pub(super) fn text(mut self, name: &'static str, len: usize) -> Self {
        let strings = vec!["x".repeat(200); len.div_ceil(200)];
        self.records.push((name, RData::TXT(TXT::new(strings))));
        self
    }

    fn answer(&self, query: &[u8], limit: usize) -> Option<Vec<u8>> {
        let query = Message::from_vec(query).unwrap();
        let question = query.queries[0].clone();
        let name = question.name().to_ascii().to_ascii_lowercase();
        if self.silent.contains(&name.as_str()) {
            return None;
        }
        let mut answer = Message::new(query.metadata.id, MessageType::Response, OpCode::Query);
        answer.add_query(question.clone());
        let of_name = || self.records.iter().filter(|(n, _)| *n == name);
        for (_, data) in of_name().filter(|(_, d)| d.record_type() == question.query_type()) {
            answer.add_answer(Record::from_rdata(
                question.name().clone(),
                60,
                data.clone(),
            ));
        }
        answer.metadata.response_code = if self.broken.contains(&name.as_str()) {
            ResponseCode::ServFail
        } else if of_name().next().is_none() && question.query_type() != RecordType::NS {
            ResponseCode::NXDomain
        } else {
            ResponseCode::NoError
        };
        let bytes = answer.to_vec().unwrap();
        if bytes.len() <= limit {
            return Some(bytes);
        }
        let mut short = answer.truncate();
        short.metadata.truncation = true;
        Some(short.to_vec().unwrap())
    }
}

/// A running name server.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    pub(super) queries: Arc<AtomicUsize>,
    zone: Arc<Mutex<Zone>>,
}

impl Server {
    /// Starts at an address of the loopback network; port 0 takes any.
    pub(super) async fn start(ip: &str, port: u16, zone: Zone) -> Self {
        let ip: IpAddr = ip.parse().unwrap();
        let udp = UdpSocket::bind((ip, port)).await.unwrap();
        let address = udp.local_addr().unwrap();
        let tcp = TcpListener::bind(address).await.unwrap();
        let zone = Arc::new(Mutex::new(zone));
        let queries = Arc::new(AtomicUsize::new(0));
        let (of_udp, count) = (Arc::clone(&zone), Arc::clone(&queries));
        tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            loop {
                let (len, from) = udp.recv_from(&mut buffer).await.unwrap();
                count.fetch_add(1, Ordering::Relaxed);
                // Larger than any UDP answer that reaches a client, so that we have to cut.
                let (answer, delay) = {
                    let zone = of_udp.lock().unwrap();
                    (zone.answer(&buffer[..len], 4096), zone.delay)
                };
                if let Some(answer) = answer {
                    tokio::time::sleep(delay).await;
                    udp.send_to(&answer, from).await.unwrap();
                }
            }
        });
        let (of_tcp, count) = (Arc::clone(&zone), Arc::clone(&queries));
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let Ok(len) = stream.read_u16().await else {
                    continue;
                };
                let mut query = vec![0; usize::from(len)];
                stream.read_exact(&mut query).await.unwrap();
                count.fetch_add(1, Ordering::Relaxed);
                let answer = of_tcp.lock().unwrap().answer(&query, 65_535);
                if let Some(answer) = answer {
                    stream.write_u16(answer.len() as u16).await.unwrap();
                    stream.write_all(&answer).await.unwrap();
                }
            }
        });
        Self {
            address,
            queries,
            zone,
        }
    }

    pub(super) fn set(&self, zone: Zone) {
        *self.zone.lock().unwrap() = zone;
    }

    pub(super) fn asked(&self) -> usize {
        self.queries.load(Ordering::Relaxed)
    }
}

/// A host's files in a directory of the test's own.
pub(super) struct Host {
    dir: tempfile::TempDir,
    port: u16,
}

impl Host {
    pub(super) fn new(servers: &[IpAddr], port: u16) -> Self {
        let host = Self {
            dir: tempfile::tempdir().unwrap(),
            port,
        };
        host.use_servers(servers);
        host
    }

    pub(super) fn use_servers(&self, servers: &[IpAddr]) {
        let lines: String = servers
            .iter()
            .map(|s| format!("nameserver {s}\n"))
            .collect();
        // A new file each time, so that it differs even within one tick of the file system's clock.
        let new = self.dir.path().join("new");
        std::fs::write(&new, format!("options timeout:1 attempts:1\n{lines}")).unwrap();
        self.make_room("resolv.conf");
        std::fs::rename(new, self.path("resolv.conf")).unwrap();
    }

    pub(super) fn set_hosts(&self, content: impl AsRef<[u8]>) {
        let new = self.dir.path().join("new");
        std::fs::write(&new, content).unwrap();
        self.make_room("hosts");
        std::fs::rename(new, self.path("hosts")).unwrap();
    }

    pub(super) fn remove_hosts(&self) {
        std::fs::remove_file(self.path("hosts")).unwrap();
    }

    /// From now on both files are there and cannot be read; not even by root.
    pub(super) fn break_files(&self) {
        for name in ["resolv.conf", "hosts"] {
            std::fs::remove_file(self.path(name)).unwrap();
            std::fs::create_dir(self.path(name)).unwrap();
        }
    }

    /// A file does not take the place of a directory.
    fn make_room(&self, name: &str) {
        // There is none, most of the time.
        let _ = std::fs::remove_dir(self.path(name));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn settings(&self) -> Arc<Settings> {
        Arc::new(Settings {
            resolv_conf: self.path("resolv.conf"),
            hosts: self.path("hosts"),
            port: self.port,
        })
    }
}
