//! The client's TUN device, with super-packets where the kernel has them. They are cut and put together by
//! a library, not by the code of the gateway, so that each is a check of the other.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use anyhow::Context as _;
use tun_rs::{DeviceBuilder, GROTable, IDEAL_BATCH_SIZE, SyncDevice, VIRTIO_NET_HDR_LEN};

use super::io::MTU;
use super::transmit::PacketQueue;

/// Longest super-packet with its header.
const MAX_READ: usize = VIRTIO_NET_HDR_LEN + 65_535;

/// An open device; it never blocks.
pub struct Tun {
    device: SyncDevice,
    table: GROTable,
    read: Vec<u8>,
    packets: Vec<Vec<u8>>,
    sizes: Vec<usize>,
    out: Vec<Vec<u8>>,
}

impl Tun {
    /// Creates the device: up, with the tunnel's MTU, no addresses yet.
    ///
    /// # Errors
    /// Without `/dev/net/tun` or CAP_NET_ADMIN.
    pub fn create(name: &str) -> anyhow::Result<Self> {
        let device = DeviceBuilder::new()
            .name(name)
            .mtu(MTU)
            .offload(true)
            .build_sync()
            .context("cannot create the TUN device")?;
        device.set_nonblocking(true)?;
        Ok(Self {
            device,
            table: GROTable::default(),
            read: vec![0; MAX_READ],
            packets: vec![vec![0; usize::from(MTU)]; IDEAL_BATCH_SIZE],
            sizes: vec![0; IDEAL_BATCH_SIZE],
            out: Vec::new(),
        })
    }

    /// Reads once and hands over the packets.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when none is there.
    pub fn read(&mut self, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let count =
            self.device
                .recv_multiple(&mut self.read, &mut self.packets, &mut self.sizes, 0)?;
        for (packet, size) in self.packets.iter_mut().zip(&self.sizes).take(count) {
            let packet = &mut packet[..*size];
            complete_udp6(packet);
            each(packet);
        }
        Ok(())
    }

    /// Writes packets.
    ///
    /// # Errors
    /// As the kernel reports them.
    pub fn write(&mut self, packets: &PacketQueue) -> io::Result<()> {
        let mut count = 0;
        for packet in packets.iter() {
            if self.out.len() == count {
                self.out.push(Vec::with_capacity(MAX_READ));
            }
            let out = &mut self.out[count];
            out.clear();
            out.resize(VIRTIO_NET_HDR_LEN, 0);
            out.extend_from_slice(packet);
            count += 1;
            if count == IDEAL_BATCH_SIZE {
                self.flush(count)?;
                count = 0;
            }
        }
        self.flush(count)
    }

    fn flush(&mut self, count: usize) -> io::Result<()> {
        self.device
            .send_multiple(&mut self.table, &mut self.out[..count], VIRTIO_NET_HDR_LEN)?;
        Ok(())
    }
}

/// A sum of zero is sent as ones, because a zero says that there is no checksum, which IPv6 does not allow
/// (RFC 8200 §8.1). The library leaves the zero.
fn complete_udp6(packet: &mut [u8]) {
    const UDP: u8 = 17;
    if let [version, _, _, _, _, _, UDP, ..] = packet
        && *version >> 4 == 6
        && let Some(checksum) = packet.get_mut(46..48)
        && *checksum == [0, 0]
    {
        checksum.fill(0xFF);
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        let fd = self.device.as_raw_fd();
        // SAFETY: the descriptor belongs to `self.device`, which outlives the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zero_checksum_of_udp_over_ipv6_is_sent_as_ones() {
        let mut packet = [0; 48];
        packet[0] = 0x60;
        packet[6] = 17;
        complete_udp6(&mut packet);
        assert_eq!(packet[46..], [0xFF, 0xFF]);
        let mut other = packet;
        other[6] = 6;
        other[46..].fill(0);
        complete_udp6(&mut other);
        assert_eq!(other[46..], [0, 0]);
    }
}
