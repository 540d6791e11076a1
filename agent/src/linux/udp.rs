//! Underlay UDP sockets, and batches of datagrams to and from them.
//!
//! ```text
//!   Outgoing: reserve() ─▶ fill the slot ─▶ commit(len, to) ─▶ … ─▶ send()     one sendmmsg
//!   Incoming: receive() ─▶ datagram(0) … datagram(n - 1)                       one recvmmsg
//! ```
//!
//! Several sockets share one port (`SO_REUSEPORT`), one for each worker: the kernel gives a datagram to one of them
//! by a hash of its addresses and ports. Nothing is allocated per call, and no call blocks.

use nix::errno::Errno;
use socket2::{Domain, Protocol, SockAddr, Type};
use std::{
    io,
    mem::{self, MaybeUninit},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

/// A socket that carries the underlay's datagrams. It never lets the kernel fragment one (`IP_PMTUDISC_DO`).
#[derive(Debug)]
pub struct Socket {
    data: socket2::Socket,
    /// Never sends: it is connected to a destination to ask for its path MTU.
    probe: socket2::Socket,
}

#[derive(Debug, thiserror::Error)]
pub enum UdpError {
    #[error("UDP {0} is in use by another program (see `ss -ulpn`); stop it or choose another port")]
    InUse(SocketAddr),
    #[error("UDP {0}: this host has no such address")]
    NotHere(SocketAddr),
    #[error("UDP {address}: {what}: {source}")]
    Os { address: SocketAddr, what: &'static str, source: io::Error },
}

impl Socket {
    /// Binds `count` sockets to one address and port. `[::]` serves IPv4 too, and alone where IPv6 is off; port 0
    /// takes any free one, the same for all.
    ///
    /// # Errors
    /// [`UdpError::InUse`] also when the other program would share the port.
    pub fn bind_group(address: SocketAddr, count: usize) -> Result<Vec<Self>, UdpError> {
        let first = match Self::bind_first(address) {
            Err(UdpError::NotHere(_) | UdpError::Os { .. }) if is_any_v6(address) => {
                Self::bind_first(SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())))?
            }
            first => first?,
        };
        let address = first.local_address().map_err(os(address, "read its address"))?;
        let rest = (1..count).map(|_| Self::bind(address, true));
        [Ok(first)].into_iter().chain(rest).take(count).collect()
    }

    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.data.local_addr()?.as_socket().ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    /// Largest IP packet, in bytes, that the kernel believes to reach `to` whole.
    pub fn path_mtu(&self, to: SocketAddr) -> io::Result<usize> {
        // The address of the last probe must not choose the route of this one: disconnect.
        disconnect(&self.probe)?;
        self.probe.connect(&SockAddr::from(to))?;
        let (level, option) = match to.ip().to_canonical() {
            IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU),
            IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
        };
        get_int(&self.probe, level, option).map(|mtu| usize::try_from(mtu).unwrap_or(0))
    }

    /// The first of a group shares its port only once it has it, so that it can't join another program's group.
    fn bind_first(address: SocketAddr) -> Result<Self, UdpError> {
        let first = Self::bind(address, false)?;
        first.data.set_reuse_port(true).map_err(os(address, "share the port"))?;
        Ok(first)
    }

    fn bind(address: SocketAddr, share: bool) -> Result<Self, UdpError> {
        let domain = Domain::for_address(address);
        let data = socket2::Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))
            .map_err(os(address, "open a socket"))?;
        let probe = socket2::Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))
            .map_err(os(address, "open a socket"))?;
        configure(&data, address, share).map_err(os(address, "set its options"))?;
        data.bind(&SockAddr::from(address)).map_err(|source| match source.raw_os_error() {
            Some(libc::EADDRINUSE) => UdpError::InUse(address),
            Some(libc::EADDRNOTAVAIL) => UdpError::NotHere(address),
            _ => UdpError::Os { address, what: "bind", source },
        })?;
        Ok(Self { data, probe })
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.data.as_fd()
    }
}

/// Datagrams to send: up to [`BATCH`] of up to [`SLOT`] bytes, each with its own destination.
pub struct Outgoing {
    buffers: Box<[u8]>,
    lens: [usize; BATCH],
    names: [Name; BATCH],
    iovecs: [libc::iovec; BATCH],
    headers: [libc::mmsghdr; BATCH],
    used: usize,
}

impl Outgoing {
    pub fn new() -> Box<Self> {
        Box::new(Self {
            buffers: vec![0; BATCH * STRIDE].into(),
            lens: [0; BATCH],
            names: [Name::default(); BATCH],
            iovecs: [NO_IOVEC; BATCH],
            headers: [no_header(); BATCH],
            used: 0,
        })
    }

    /// The buffer of the next datagram; none when the batch is full. Without `commit` the next call gives it again.
    pub fn reserve(&mut self) -> Option<&mut [u8; SLOT]> {
        if self.used == BATCH {
            return None;
        }
        self.buffers[self.used * STRIDE..].first_chunk_mut()
    }

    /// Makes the reserved buffer's first `len` bytes the next datagram.
    pub fn commit(&mut self, len: usize, to: SocketAddr) {
        assert!(self.used < BATCH && len <= SLOT, "a slot was reserved and {len} bytes fit it");
        self.lens[self.used] = len;
        self.names[self.used] = Name::from(to);
        self.used += 1;
    }

    /// How many datagrams are committed.
    pub fn len(&self) -> usize {
        self.used
    }

    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    pub fn datagram(&self, at: usize) -> &[u8] {
        &slot(&self.buffers, at)[..self.lens[at]]
    }

    /// Sends the datagrams from `first` on; gives how many the kernel took. The batch stays as it is: call again with
    /// `first` behind those, or behind the one that failed, and then [`clear`](Self::clear).
    ///
    /// # Errors
    /// What the kernel says of the datagram `first`: `EAGAIN` when its buffer is full, `EMSGSIZE` when that one is
    /// larger than its path's MTU.
    pub fn send(&mut self, socket: &Socket, first: usize) -> Result<usize, Errno> {
        if first >= self.used {
            return Ok(0);
        }
        let buffers = self.buffers.as_mut_ptr();
        for at in first..self.used {
            let iov_base = buffers.wrapping_add(at * STRIDE).cast();
            self.iovecs[at] = libc::iovec { iov_base, iov_len: self.lens[at] };
        }
        let (iovecs, names) = (self.iovecs.as_mut_ptr(), self.names.as_mut_ptr());
        for (at, header) in self.headers.iter_mut().enumerate().take(self.used).skip(first) {
            header.msg_hdr.msg_iov = iovecs.wrapping_add(at);
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_name = names.wrapping_add(at).cast();
            header.msg_hdr.msg_namelen = self.names[at].len();
        }
        let headers = &mut self.headers[first..self.used];
        // SAFETY: there are `headers.len()` headers. Each one's iovec, name and buffer were set just above to memory
        // of `self`, which is borrowed until the call returns; the kernel keeps none of them.
        let sent = unsafe {
            libc::sendmmsg(
                socket.data.as_raw_fd(),
                headers.as_mut_ptr(),
                headers.len() as libc::c_uint,
                libc::MSG_DONTWAIT,
            )
        };
        Errno::result(sent).map(|sent| sent as usize)
    }

    pub fn clear(&mut self) {
        self.used = 0;
    }
}

/// Datagrams received: up to [`BATCH`] of up to [`SLOT`] bytes.
pub struct Incoming {
    buffers: Box<[u8]>,
    iovecs: [libc::iovec; BATCH],
    headers: [libc::mmsghdr; BATCH],
}

impl Incoming {
    pub fn new() -> Box<Self> {
        Box::new(Self {
            buffers: vec![0; BATCH * STRIDE].into(),
            iovecs: [NO_IOVEC; BATCH],
            headers: [no_header(); BATCH],
        })
    }

    /// Takes the datagrams that wait, in place of those it held; gives how many.
    ///
    /// # Errors
    /// `EAGAIN` when none waits.
    pub fn receive(&mut self, socket: &Socket) -> Result<usize, Errno> {
        let buffers = self.buffers.as_mut_ptr();
        for at in 0..BATCH {
            let iov_base = buffers.wrapping_add(at * STRIDE).cast();
            self.iovecs[at] = libc::iovec { iov_base, iov_len: SLOT };
        }
        let iovecs = self.iovecs.as_mut_ptr();
        for (at, header) in self.headers.iter_mut().enumerate() {
            header.msg_len = 0;
            header.msg_hdr.msg_iov = iovecs.wrapping_add(at);
            header.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: there are BATCH headers. Each one's iovec and buffer were set just above to memory of `self`, which
        // is borrowed until the call returns; names and control data are null with length 0; no timeout is given.
        let received = unsafe {
            libc::recvmmsg(
                socket.data.as_raw_fd(),
                self.headers.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        Errno::result(received).map(|received| received as usize)
    }

    /// A datagram of the last batch.
    pub fn datagram(&self, at: usize) -> &[u8] {
        let len = self.headers[at].msg_len as usize;
        &slot(&self.buffers, at)[..len.min(SLOT)]
    }
}

// SAFETY: the raw pointers in both are set anew before each system call, to memory that the value itself owns, and are
// not followed otherwise.
unsafe impl Send for Outgoing {}
// SAFETY: as above.
unsafe impl Send for Incoming {}

/// A destination as the kernel takes it. A dual-stack socket takes IPv4's form too.
#[derive(Clone, Copy)]
#[repr(C)]
union Name {
    family: libc::sa_family_t,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl Name {
    fn len(&self) -> libc::socklen_t {
        // SAFETY: every form begins with the family, and all of them are plain integers that are always initialised.
        match i32::from(unsafe { self.family }) {
            libc::AF_INET => size_of::<libc::sockaddr_in>() as libc::socklen_t,
            _ => size_of::<libc::sockaddr_in6>() as libc::socklen_t,
        }
    }
}

impl Default for Name {
    fn default() -> Self {
        Self::from(SocketAddr::from(([0; 16], 0)))
    }
}

impl From<SocketAddr> for Name {
    fn from(address: SocketAddr) -> Self {
        match address {
            SocketAddr::V4(a) => Self {
                v4: libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: a.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(a.ip().octets()) },
                    sin_zero: [0; 8],
                },
            },
            SocketAddr::V6(a) => Self {
                v6: libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: a.port().to_be(),
                    sin6_flowinfo: a.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: a.ip().octets() },
                    sin6_scope_id: a.scope_id(),
                },
            },
        }
    }
}

fn configure(socket: &socket2::Socket, address: SocketAddr, share: bool) -> io::Result<()> {
    use nix::sys::socket::{setsockopt, sockopt};
    socket.set_nonblocking(true)?;
    // Beyond the host's limits where NET_ADMIN allows it, else up to them.
    if setsockopt(socket, sockopt::RcvBufForce, &SOCKET_BUFFER).is_err() {
        socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    }
    if setsockopt(socket, sockopt::SndBufForce, &SOCKET_BUFFER).is_err() {
        socket.set_send_buffer_size(SOCKET_BUFFER)?;
    }
    set_int(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)?;
    if address.is_ipv6() {
        socket.set_only_v6(!is_any_v6(address))?;
        set_int(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)?;
    }
    if share { socket.set_reuse_port(true) } else { Ok(()) }
}

fn is_any_v6(address: SocketAddr) -> bool {
    address.is_ipv6() && address.ip().is_unspecified()
}

fn os(address: SocketAddr, what: &'static str) -> impl FnOnce(io::Error) -> UdpError {
    move |source| UdpError::Os { address, what, source }
}

fn set_int(socket: &socket2::Socket, level: i32, option: i32, value: i32) -> io::Result<()> {
    let len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of `value`, which lives through the call.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), len) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn get_int(socket: &socket2::Socket, level: i32, option: i32) -> io::Result<i32> {
    let (mut value, mut len) = (0i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: the kernel writes at most `len` bytes to `value`, and `len`; both live through the call.
    let got =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut value).cast(), &raw mut len) };
    if got == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

fn disconnect(socket: &socket2::Socket) -> io::Result<()> {
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let len = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of `nowhere`, which lives through the call.
    let done = unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, len) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn slot(buffers: &[u8], at: usize) -> &[u8; SLOT] {
    buffers[at * STRIDE..].first_chunk().expect("each stride holds a slot")
}

fn no_header() -> libc::mmsghdr {
    // SAFETY: a `mmsghdr` is integers and pointers, for which zero is a value: no name, no data, no control data.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

const NO_IOVEC: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// Datagrams in one system call: enough that its cost is shared, few enough that the first need not wait for long.
pub const BATCH: usize = 64;
/// Bytes of the largest datagram: more than UDP has.
pub const SLOT: usize = 1 << 16;
/// From slot to slot: more than a power of two, so that all slots' beginnings don't fall on the same cache lines.
const STRIDE: usize = SLOT + 128;
/// Bytes that a socket may queue each way: about 5 ms at 13 Gb/s.
const SOCKET_BUFFER: usize = 8 << 20;
const _: () =
    assert!(2 * BATCH * STRIDE <= 16 << 20, "a worker's buffers stay under 16 MiB, mostly untouched");
const _: () = assert!(mem::align_of::<Name>() >= mem::align_of::<libc::sockaddr_in>());

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, poll};

    fn receive(socket: &Socket, incoming: &mut Incoming) -> usize {
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, 5000u16).unwrap(), 1, "a datagram within 5 s");
        incoming.receive(socket).unwrap()
    }

    #[test]
    fn a_batch_arrives_whole_and_in_order() {
        let local = SocketAddr::from(([127, 0, 0, 1], 0));
        let sockets = Socket::bind_group(local, 1).unwrap();
        let receivers = Socket::bind_group("[::]:0".parse().unwrap(), 1).unwrap();
        let to = SocketAddr::from(([127, 0, 0, 1], receivers[0].local_address().unwrap().port()));
        let (mut outgoing, mut incoming) = (Outgoing::new(), Incoming::new());
        for at in 0..BATCH {
            let slot = outgoing.reserve().unwrap();
            slot[..at + 1].fill(at as u8);
            outgoing.commit(at + 1, to);
        }
        assert!(outgoing.reserve().is_none(), "full");
        assert_eq!(outgoing.send(&sockets[0], 0), Ok(BATCH));
        outgoing.clear();
        let mut got = 0;
        while got < BATCH {
            let count = receive(&receivers[0], &mut incoming);
            for at in 0..count {
                assert_eq!(incoming.datagram(at), vec![(got + at) as u8; got + at + 1]);
            }
            got += count;
        }
        assert_eq!(incoming.receive(&receivers[0]), Err(Errno::EAGAIN));
    }

    #[test]
    fn a_group_shares_its_port_with_nobody_else() {
        let group = Socket::bind_group("127.0.0.1:0".parse().unwrap(), 3).unwrap();
        let address = group[0].local_address().unwrap();
        assert!(group.iter().all(|socket| socket.local_address().unwrap() == address));
        let message = Socket::bind_group(address, 2).unwrap_err().to_string();
        assert!(message.contains(&address.to_string()) && message.contains("in use"), "{message}");
        let elsewhere = Socket::bind_group("192.0.2.1:0".parse().unwrap(), 1).unwrap_err();
        assert!(matches!(elsewhere, UdpError::NotHere(_)), "{elsewhere}");
    }

    #[test]
    fn the_path_mtu_is_the_kernels() {
        for bind in ["[::]:0", "0.0.0.0:0"] {
            let group = Socket::bind_group(bind.parse().unwrap(), 1).unwrap();
            let to = SocketAddr::from(([127, 0, 0, 1], 9));
            assert!(group[0].path_mtu(to).unwrap() >= 1280);
            assert!(group[0].path_mtu(to).unwrap() >= 1280, "again");
        }
    }
}
