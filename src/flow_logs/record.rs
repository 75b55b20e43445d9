//! One report about a flow, and the file that keeps it until it is uploaded (data-path spec §8.1,
//! portal-channel spec §4.8).

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use crc::{CRC_32_ISO_HDLC, Crc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

/// Longest file of one record, in bytes. A record with every member at its longest and 16 paths
/// takes a tenth of it.
pub(super) const MAX_FILE: usize = 64 << 10;
/// The last moment that RFC 3339 can express, in seconds since 1970: the end of the year 9999.
const LAST_SECOND: u64 = 253_402_300_799;

static CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);

/// Protocols whose flows are recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A path that packets of the flow took outside the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outer {
    /// The gateway's or the client's end, if it is known.
    pub src: Option<SocketAddr>,
    /// The other end.
    pub dst: SocketAddr,
    /// When the path came into use.
    pub path_activated_at: SystemTime,
}

/// What is known of a flow once it is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// When it ended.
    pub flow_end: SystemTime,
    /// When its last packet passed.
    pub last_packet: SystemTime,
    /// Packets from the resource to the client.
    pub rx_packets: u64,
    /// Packets from the client to the resource.
    pub tx_packets: u64,
    /// Layer-4 payload from the resource to the client, in bytes.
    pub rx_bytes: u64,
    /// Layer-4 payload from the client to the resource, in bytes.
    pub tx_bytes: u64,
}

/// A report about a flow: that it started, or with [`Record::end`] that it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its protocol.
    pub protocol: Protocol,
    /// The client's end inside the tunnel; for DNS resources with the port after translation.
    pub inner_src: SocketAddr,
    /// The resource's end; for DNS resources after translation.
    pub inner_dst: SocketAddr,
    /// The name the client asked for, for DNS resources.
    pub domain: Option<String>,
    /// The paths it took.
    pub outers: Vec<Outer>,
    /// When its first packet passed.
    pub flow_start: SystemTime,
    /// Nothing in the report of a start.
    pub end: Option<End>,
}

#[cfg(test)]
impl Record {
    /// For those who must know that two reports are filed as of one flow.
    pub(crate) fn file_name(&self) -> String {
        Key::of(self).file_name()
    }
}

/// Which of the two reports about a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    Start,
    End,
}

/// What the file of a record is named after. The reports about one flow differ in their kind alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    /// Start of the flow in nanoseconds since 1970.
    start: u64,
    /// Of the protocol and the inner addresses and ports.
    flow: u64,
    pub(super) kind: Kind,
}

impl Key {
    pub(super) fn of(record: &Record) -> Self {
        let mut hash = Sha256::new();
        hash.update([record.protocol as u8]);
        for end in [record.inner_src, record.inner_dst] {
            hash.update(end.to_string());
            hash.update([0]);
        }
        let digest = hash.finalize();
        let mut flow = [0; 8];
        flow.copy_from_slice(&digest[..8]);
        Self {
            start: u64::try_from(since_1970(record.flow_start).as_nanos()).unwrap_or(u64::MAX),
            flow: u64::from_be_bytes(flow),
            kind: match record.end {
                None => Kind::Start,
                Some(_) => Kind::End,
            },
        }
    }

    /// The report of the start of the same flow.
    pub(super) fn start(self) -> Self {
        Self {
            kind: Kind::Start,
            ..self
        }
    }

    /// The report of the end of the same flow.
    pub(super) fn end(self) -> Self {
        Self {
            kind: Kind::End,
            ..self
        }
    }

    pub(super) fn file_name(self) -> String {
        let kind = match self.kind {
            Kind::Start => "start",
            Kind::End => "end",
        };
        format!("{:020}-{:016x}.{kind}.json", self.start, self.flow)
    }

    /// The key behind a name that [`Self::file_name`] gave, and of no other name.
    pub(super) fn from_file_name(name: &str) -> Option<Self> {
        let (stem, kind) = if let Some(stem) = name.strip_suffix(".start.json") {
            (stem, Kind::Start)
        } else {
            (name.strip_suffix(".end.json")?, Kind::End)
        };
        let (start, flow) = stem.split_once('-')?;
        let key = Self {
            start: start.parse().ok()?,
            flow: u64::from_str_radix(flow, 16).ok()?,
            kind,
        };
        (key.file_name() == name).then_some(key)
    }
}

/// The members of the upload format, in its order.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Payload {
    protocol: Protocol,
    inner_src_ip: IpAddr,
    inner_src_port: u16,
    inner_dst_ip: IpAddr,
    inner_dst_port: u16,
    domain: Option<String>,
    outers: Vec<OuterPayload>,
    flow_start: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    flow_end: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_packet: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rx_packets: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tx_packets: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rx_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tx_bytes: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OuterPayload {
    #[serde(skip_serializing_if = "Option::is_none")]
    src_ip: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    src_port: Option<u16>,
    dst_ip: IpAddr,
    dst_port: u16,
    path_activated_at: Timestamp,
}

/// RFC 3339 text in UTC. Microseconds, as more digits are beyond some parsers.
#[derive(Serialize, Deserialize)]
#[serde(try_from = "String")]
struct Timestamp(String);

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        // The formatter panics outside the range of the format, where a broken clock may stand.
        let since = since_1970(time).min(Duration::from_secs(LAST_SECOND));
        let time = SystemTime::UNIX_EPOCH + since;
        Self(humantime::format_rfc3339_micros(time).to_string())
    }
}

impl TryFrom<String> for Timestamp {
    type Error = humantime::TimestampError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        humantime::parse_rfc3339(&text).map(|_| Self(text))
    }
}

fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
}

impl From<&Outer> for OuterPayload {
    fn from(outer: &Outer) -> Self {
        Self {
            // A socket of both families shows IPv4 peers in mapped form.
            src_ip: outer.src.map(|src| src.ip().to_canonical()),
            src_port: outer.src.map(|src| src.port()),
            dst_ip: outer.dst.ip().to_canonical(),
            dst_port: outer.dst.port(),
            path_activated_at: outer.path_activated_at.into(),
        }
    }
}

impl From<&Record> for Payload {
    fn from(record: &Record) -> Self {
        let end = record.end.as_ref();
        Self {
            protocol: record.protocol,
            inner_src_ip: record.inner_src.ip(),
            inner_src_port: record.inner_src.port(),
            inner_dst_ip: record.inner_dst.ip(),
            inner_dst_port: record.inner_dst.port(),
            domain: record.domain.clone(),
            outers: record.outers.iter().map(OuterPayload::from).collect(),
            flow_start: record.flow_start.into(),
            flow_end: end.map(|end| end.flow_end.into()),
            last_packet: end.map(|end| end.last_packet.into()),
            rx_packets: end.map(|end| end.rx_packets),
            tx_packets: end.map(|end| end.tx_packets),
            rx_bytes: end.map(|end| end.rx_bytes),
            tx_bytes: end.map(|end| end.tx_bytes),
        }
    }
}

impl Payload {
    /// The kind it is of; `None` for one that has some members of an end and not others.
    fn kind(&self) -> Option<Kind> {
        let present = [
            self.flow_end.is_some(),
            self.last_packet.is_some(),
            self.rx_packets.is_some(),
            self.tx_packets.is_some(),
            self.rx_bytes.is_some(),
            self.tx_bytes.is_some(),
        ];
        if present.iter().all(|present| *present) {
            Some(Kind::End)
        } else if present.iter().any(|present| *present) {
            None
        } else {
            Some(Kind::Start)
        }
    }
}

/// Content of a file. The checksum is over the bytes of `payload` as they stand there.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<'a> {
    checksum: u32,
    #[serde(borrow)]
    payload: &'a RawValue,
}

/// A record cannot be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the record is longer than {MAX_FILE} bytes")]
pub(super) struct TooLong;

/// The file of a record.
pub(super) fn encode(record: &Record) -> Result<Vec<u8>, TooLong> {
    let payload = serde_json::value::to_raw_value(&Payload::from(record))
        .expect("texts, numbers and lists of them are JSON");
    let envelope = Envelope {
        checksum: CRC.checksum(payload.get().as_bytes()),
        payload: &payload,
    };
    let file = serde_json::to_vec(&envelope).expect("a number and JSON are JSON");
    if file.len() > MAX_FILE {
        return Err(TooLong);
    }
    Ok(file)
}

/// The payload in the file of a record of this kind, ready to be sent. `None` when the file is
/// damaged or was not written by [`encode`].
pub(super) fn decode(file: &[u8], kind: Kind) -> Option<&str> {
    let envelope: Envelope<'_> = serde_json::from_slice(file).ok()?;
    let payload = envelope.payload.get();
    if CRC.checksum(payload.as_bytes()) != envelope.checksum {
        return None;
    }
    let parsed: Payload = serde_json::from_str(payload).ok()?;
    (parsed.kind() == Some(kind)).then_some(payload)
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
