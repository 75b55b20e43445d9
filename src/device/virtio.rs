//! The header in front of each packet that the device hands over or takes when offloads are on
//! (`struct virtio_net_hdr`, virtio 1.2 §5.1.6; the kernel's `include/uapi/linux/virtio_net.h`).

/// Length of the header in bytes (without `num_buffers`, as TUN uses it).
pub const HEADER_LEN: usize = 10;

const F_NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// The first segment of a TCP super-packet carries CWR, which the others must not.
const GSO_ECN: u8 = 0x80;

/// Where a checksum is to be completed: the field holds the sum of the pseudo-header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartialChecksum {
    /// Where the sum begins, in bytes from the packet's beginning.
    pub start: u16,
    /// Where the field lies, in bytes from `start`.
    pub offset: u16,
}

/// What one super-packet is to be cut into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segmentation {
    /// Nothing: it is an ordinary packet.
    None,
    /// TCP segments of so many bytes of payload.
    Tcp(u16),
    /// UDP datagrams of so many bytes of payload.
    Udp(u16),
}

/// The header, as far as it is of use here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The checksum that is still to be completed, if any.
    pub checksum: Option<PartialChecksum>,
    /// Whether it is a super-packet.
    pub segmentation: Segmentation,
    /// Length of all headers in front of the payload. The kernel's is a hint and not to be trusted.
    pub headers_len: u16,
}

/// The device asks for something that was not agreed upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnknownSegmentation;

impl Header {
    /// Of an ordinary packet that is complete.
    pub const PLAIN: Self = Self {
        checksum: None,
        segmentation: Segmentation::None,
        headers_len: 0,
    };

    /// Reads a header.
    ///
    /// # Errors
    /// For kinds of super-packets that are not asked for.
    #[inline]
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, UnknownSegmentation> {
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let size = word(4);
        let segmentation = match bytes[1] & !GSO_ECN {
            GSO_NONE => Segmentation::None,
            GSO_TCPV4 | GSO_TCPV6 if size > 0 => Segmentation::Tcp(size),
            GSO_UDP_L4 if size > 0 => Segmentation::Udp(size),
            _ => return Err(UnknownSegmentation),
        };
        Ok(Self {
            checksum: (bytes[0] & F_NEEDS_CSUM != 0).then(|| PartialChecksum {
                start: word(6),
                offset: word(8),
            }),
            segmentation,
            headers_len: word(2),
        })
    }

    /// Writes the header of a packet of this IP version.
    #[inline]
    pub fn to_bytes(self, is_v4: bool) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let (kind, size) = match self.segmentation {
            Segmentation::None => (GSO_NONE, 0),
            Segmentation::Tcp(size) if is_v4 => (GSO_TCPV4, size),
            Segmentation::Tcp(size) => (GSO_TCPV6, size),
            Segmentation::Udp(size) => (GSO_UDP_L4, size),
        };
        bytes[1] = kind;
        bytes[2..4].copy_from_slice(&self.headers_len.to_ne_bytes());
        bytes[4..6].copy_from_slice(&size.to_ne_bytes());
        if let Some(checksum) = self.checksum {
            bytes[0] = F_NEEDS_CSUM;
            bytes[6..8].copy_from_slice(&checksum.start.to_ne_bytes());
            bytes[8..10].copy_from_slice(&checksum.offset.to_ne_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let checksum = Some(PartialChecksum {
            start: 20,
            offset: 16,
        });
        for (segmentation, is_v4) in [
            (Segmentation::None, true),
            (Segmentation::Tcp(1228), true),
            (Segmentation::Tcp(1208), false),
            (Segmentation::Udp(1200), true),
        ] {
            for checksum in [None, checksum] {
                let header = Header {
                    checksum,
                    segmentation,
                    headers_len: 52,
                };
                assert_eq!(Header::parse(&header.to_bytes(is_v4)), Ok(header));
            }
        }
    }

    #[test]
    fn the_layout_is_the_kernels() {
        let header = Header {
            checksum: Some(PartialChecksum {
                start: 40,
                offset: 6,
            }),
            segmentation: Segmentation::Udp(1200),
            headers_len: 48,
        };
        let words: Vec<u8> = [48u16, 1200, 40, 6]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        assert_eq!(header.to_bytes(false), *[&[1, 5], &words[..]].concat());
    }

    #[test]
    fn kinds_that_were_not_asked_for_are_refused() {
        for kind in [2, 3, 6, 0x7f] {
            let mut bytes = [0; HEADER_LEN];
            bytes[1] = kind;
            bytes[4] = 1;
            assert_eq!(Header::parse(&bytes), Err(UnknownSegmentation));
        }
        // Segments of nothing would never end.
        let mut bytes = [0; HEADER_LEN];
        bytes[1] = GSO_TCPV4;
        assert_eq!(Header::parse(&bytes), Err(UnknownSegmentation));
    }
}
