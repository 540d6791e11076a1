//! Underlay UDP sockets, and batches of datagrams to and from them.
//!
//! ```text
//!   worker 0 ─ lane 0: port 6783 ┐ one group: the kernel gives a datagram to    lane 1…: a port of its own, to send
//!   worker 1 ─ lane 0: port 6783 ┘ the worker that its flow names               lane 1…
//!
//!   Outgoing: room() ─▶ fill ─▶ push() ─▶ … ─▶ send()       few system calls: equal datagrams to one peer are one
//!   Incoming: receive() ─▶ message(0) … message(n - 1)      one recvmmsg, each message one or many datagrams
//! ```
//!
//! Further lanes give a peer's flows several source ports, by which network cards and equal paths tell them apart.
//! Nothing is allocated per call, and no call blocks.

mod incoming;
mod name;
mod outgoing;

pub use incoming::{BATCH, Incoming, Message};
pub use outgoing::{MAX_MESSAGE, MAX_SEGMENTS, Outgoing, ROOM, Report, Target};

use name::Name;
use nix::errno::Errno;
use socket2::{Domain, Protocol, SockAddr, Type};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
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
    /// Binds `workers` sockets to one address and port, and for each worker further ones to ports of their own, `lanes`
    /// in all. `[::]` serves IPv4 too, and alone where IPv6 is off; port 0 takes any free one, the same for all workers.
    ///
    /// A datagram goes to the worker that the big-endian number at `steer_at` names, modulo their count: so both ways of
    /// a flow stay with one worker each, whoever sends it.
    ///
    /// # Errors
    /// [`UdpError::InUse`] also when the other program would share the port.
    pub fn bind_workers(
        address: SocketAddr,
        workers: usize,
        lanes: usize,
        steer_at: usize,
    ) -> Result<Vec<Vec<Self>>, UdpError> {
        let first = match Self::bind_first(address) {
            Err(UdpError::NotHere(_) | UdpError::Os { .. }) if is_any_v6(address) => {
                Self::bind_first(SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())))?
            }
            first => first?,
        };
        let address = first.local_address().map_err(os(address, "read its address"))?;
        let mut shared = vec![first];
        for _ in 1..workers {
            shared.push(Self::bind(address, true)?);
        }
        // The first one alone is no group yet.
        if let [_, .., last] = &shared[..] {
            steer(&last.data, workers, steer_at).map_err(os(address, "steer flows to workers"))?;
        }
        let mut own = address;
        own.set_port(0);
        let worker =
            |shared| [Ok(shared)].into_iter().chain((1..lanes).map(|_| Self::bind(own, false))).collect();
        shared.into_iter().map(worker).collect()
    }

    /// A socket that another agent has bound.
    pub fn adopt(socket: OwnedFd) -> io::Result<Self> {
        let data = socket2::Socket::from(socket);
        let probe = socket2::Socket::new(data.domain()?, Type::DGRAM, Some(Protocol::UDP))?;
        Ok(Self { data, probe })
    }

    /// Binds one more socket to the port that this one, the first of `workers`, shares with its group: it gets what
    /// `steer` sets apart, and the workers the rest as before.
    ///
    /// It takes joined datagrams as they do: the kernel asks any member of the group whether to join, not the one that
    /// gets them.
    pub fn bind_beside(&self, workers: usize, steer: Steer) -> Result<Self, UdpError> {
        let address = self.local_address().map_err(os(ANY, "read its address"))?;
        let beside = Self::bind(address, true)?;
        let attached = steer.program(workers).and_then(|program| attach(&beside.data, &program));
        attached.map_err(os(address, "set some datagrams apart"))?;
        Ok(beside)
    }

    /// Binds a socket to a port of its own beside this one. It sends what its device takes, whatever the kernel believes
    /// of the path behind.
    pub fn bind_probing(&self) -> Result<Self, UdpError> {
        let mut address = self.local_address().map_err(os(ANY, "read its address"))?;
        address.set_port(0);
        let probing = Self::bind(address, false)?;
        let set = || {
            set_int(&probing.data, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)?;
            if address.is_ipv4() {
                return Ok(());
            }
            set_int(&probing.data, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)
        };
        set().map_err(os(address, "probe paths' MTU"))?;
        Ok(probing)
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

    /// Sends one datagram by itself.
    fn send_one(&self, datagram: &[u8], to: SocketAddr) -> Result<(), Errno> {
        let name = Name::from(to);
        // SAFETY: the datagram and the name are whole for the lengths given, and the kernel keeps neither.
        let sent = unsafe {
            libc::sendto(
                self.as_fd_raw(),
                datagram.as_ptr().cast(),
                datagram.len(),
                libc::MSG_DONTWAIT,
                (&raw const name).cast(),
                name.len(),
            )
        };
        Errno::result(sent).map(drop)
    }

    fn as_fd_raw(&self) -> RawFd {
        self.data.as_raw_fd()
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

/// What a group's socket of its own gets: by a datagram's first byte, or by the first one behind a prefix.
#[derive(Clone, Copy, Debug)]
pub struct Steer {
    /// Where the number is that names the worker of all else.
    pub at: u8,
    /// First bytes of datagrams that are set apart.
    pub apart: [u8; 2],
    /// First byte of a prefix, and its length.
    pub prefix: (u8, u8),
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.data.as_fd()
    }
}

/// Datagrams that found the socket's receive buffer full.
pub fn refused(socket: &impl AsFd) -> io::Result<u64> {
    let mut counts = [0_u32; SK_MEMINFO_DROPS + 1];
    let mut len = size_of_val(&counts) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `counts`, and `len`; both live through the call.
    let got = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            counts.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if got == 0 { Ok(counts[SK_MEMINFO_DROPS].into()) } else { Err(io::Error::last_os_error()) }
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
    // A kernel before 5.0 hands on one datagram at a time.
    let _ = set_int(socket, libc::IPPROTO_UDP, libc::UDP_GRO, 1);
    if share { socket.set_reuse_port(true) } else { Ok(()) }
}

/// Gives the socket's group a classic BPF program that picks one of its members: the number at `at`, modulo `members`.
fn steer(socket: &socket2::Socket, members: usize, at: usize) -> io::Result<()> {
    let members = u32::try_from(members).map_err(|_| io::ErrorKind::InvalidInput)?;
    let at = u32::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = [
        code(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, at),
        code(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, members),
        code(libc::BPF_RET | libc::BPF_A, 0),
    ];
    attach(socket, &program)
}

impl Steer {
    /// X is where the datagram proper begins. What lies outside of a datagram counts as 0.
    fn program(self, workers: usize) -> io::Result<[libc::sock_filter; 11]> {
        let workers = u32::try_from(workers).map_err(|_| io::ErrorKind::InvalidInput)?;
        let (prefix, len) = self.prefix;
        let is = |byte: u8, yes, no| libc::sock_filter {
            jt: yes,
            jf: no,
            ..code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, byte.into())
        };
        Ok([
            code(libc::BPF_LDX | libc::BPF_IMM, 0),
            code(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0),
            is(prefix, 0, 1),
            code(libc::BPF_LDX | libc::BPF_IMM, len.into()),
            code(libc::BPF_LD | libc::BPF_B | libc::BPF_IND, 0),
            is(self.apart[0], 4, 0),
            is(self.apart[1], 3, 0),
            code(libc::BPF_LD | libc::BPF_H | libc::BPF_IND, self.at.into()),
            code(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, workers),
            code(libc::BPF_RET | libc::BPF_A, 0),
            code(libc::BPF_RET | libc::BPF_K, workers),
        ])
    }
}

fn code(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn attach(socket: &socket2::Socket, program: &[libc::sock_filter]) -> io::Result<()> {
    // The kernel only reads it.
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    let len = size_of::<libc::sock_fprog>() as libc::socklen_t;
    // SAFETY: the kernel reads the program and its instructions, which live through the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const program).cast(),
            len,
        )
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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

const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
/// The place of the drops among the numbers of `SO_MEMINFO`.
const SK_MEMINFO_DROPS: usize = 8;
/// Bytes that a socket may queue each way: about 5 ms at 13 Gb/s.
const SOCKET_BUFFER: usize = 8 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, poll};

    fn bind(address: &str, workers: usize, lanes: usize) -> Result<Vec<Vec<Socket>>, UdpError> {
        Socket::bind_workers(address.parse().unwrap(), workers, lanes, 2)
    }

    fn receive(socket: &Socket, incoming: &mut Incoming) -> Vec<Vec<u8>> {
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, 5000u16).unwrap(), 1, "a datagram within 5 s");
        let received = incoming.receive(socket, BATCH).unwrap();
        let messages: Vec<_> = (0..received).map(|at| incoming.message(at)).collect();
        let datagrams = messages.into_iter().flat_map(|Message { range, segment }| {
            incoming.buffer()[range].chunks(segment).map(Vec::from).collect::<Vec<_>>()
        });
        datagrams.collect()
    }

    #[test]
    fn a_batch_arrives_whole_and_in_order() {
        let sender = bind("127.0.0.1:0", 1, 2).unwrap().remove(0);
        let receiver = bind("[::]:0", 1, 1).unwrap().remove(0).remove(0);
        let to = SocketAddr::from(([127, 0, 0, 1], receiver.local_address().unwrap().port()));
        let (mut outgoing, mut incoming) = (Outgoing::new(), Incoming::new());
        // Some datagrams alike, some of falling size, some of rising; and one part of many.
        let sizes = [100, 100, 100, 40, 40, 100, 1, 2, 3];
        let mut expected: Vec<Vec<u8>> = Vec::new();
        for (at, size) in sizes.into_iter().enumerate() {
            outgoing.room()[..size].fill(at as u8);
            outgoing.push(Target { peer: 7, to, lane: 1 }, size, size);
            expected.push(vec![at as u8; size]);
        }
        let many: Vec<u8> = (0..=255).cycle().take(1000).collect();
        outgoing.room()[..1000].copy_from_slice(&many);
        outgoing.push(Target { peer: 7, to, lane: 1 }, 1000, 300);
        expected.extend(many.chunks(300).map(Vec::from));
        let mut sent = (0, 0);
        outgoing.send(&sender, |report| {
            assert_eq!((report.result, report.target.peer), (Ok(()), 7));
            sent = (sent.0 + report.datagrams, sent.1 + report.bytes);
        });
        assert_eq!(sent, (expected.len(), expected.iter().map(Vec::len).sum()));
        let mut got = Vec::new();
        while got.len() < expected.len() {
            got.extend(receive(&receiver, &mut incoming));
        }
        assert_eq!(got, expected);
        assert_eq!(incoming.receive(&receiver, BATCH), Err(Errno::EAGAIN));
        assert!(outgoing.is_empty());
    }

    #[test]
    fn a_message_that_fails_takes_no_other_with_it() {
        let sender = bind("127.0.0.1:0", 1, 1).unwrap().remove(0);
        let receiver = bind("127.0.0.1:0", 1, 1).unwrap().remove(0).remove(0);
        let to = receiver.local_address().unwrap();
        let mut outgoing = Outgoing::new();
        for (peer, to) in [(0, to), (1, "192.0.2.1:9".parse().unwrap()), (2, to)] {
            outgoing.push(Target { peer, to, lane: 0 }, 10, 10);
        }
        let mut results = Vec::new();
        outgoing.send(&sender, |report| results.push((report.target.peer, report.result.is_ok())));
        assert_eq!(results, [(0, true), (1, false), (2, true)], "loopback can't reach 192.0.2.1");
        let mut incoming = Incoming::new();
        assert_eq!(receive(&receiver, &mut incoming).len(), 2);
    }

    #[test]
    fn a_flow_goes_to_one_worker() {
        let workers = bind("127.0.0.1:0", 3, 1).unwrap();
        let to = workers[0][0].local_address().unwrap();
        let senders = bind("127.0.0.1:0", 1, 4).unwrap().remove(0);
        let mut incoming = Incoming::new();
        for sender in &senders {
            for flow in [0u16, 1, 2, 3, 3001, 65_535] {
                let [high, low] = flow.to_be_bytes();
                sender.send_one(&[0, 0, high, low, 0], to).unwrap();
                let worker = &workers[usize::from(flow) % 3][0];
                assert_eq!(receive(worker, &mut incoming), [[0, 0, high, low, 0]], "flow {flow}");
            }
        }
    }

    #[test]
    fn what_is_set_apart_has_a_socket_of_its_own() {
        for workers in [1, 3] {
            let group = bind("127.0.0.1:0", workers, 1).unwrap();
            let steer = Steer { at: 2, apart: [7, 8], prefix: (6, 12) };
            let apart = group[0][0].bind_beside(workers, steer).unwrap();
            let address = apart.local_address().unwrap();
            assert_eq!(address, group[0][0].local_address().unwrap());
            let sender = bind("127.0.0.1:0", 1, 1).unwrap().remove(0).remove(0);
            let mut incoming = Incoming::new();
            let behind = |datagram: &[u8]| [&[6; 12][..], datagram].concat();
            for datagram in [vec![7], vec![8, 1, 0, 1], behind(&[7, 0, 0, 2]), behind(&[8])] {
                sender.send_one(&datagram, address).unwrap();
                assert_eq!(receive(&apart, &mut incoming), [datagram]);
            }
            for flow in 0..4_u8 {
                for datagram in [vec![9, 0, 0, flow, 5], behind(&[9, 0, 0, flow, 5])] {
                    sender.send_one(&datagram, address).unwrap();
                    let worker = &group[usize::from(flow) % workers][0];
                    assert_eq!(receive(worker, &mut incoming), [datagram]);
                }
            }
        }
    }

    #[test]
    fn a_group_shares_its_port_with_nobody_else() {
        let group = bind("127.0.0.1:0", 3, 2).unwrap();
        let address = group[0][0].local_address().unwrap();
        assert!(group.iter().all(|lanes| lanes[0].local_address().unwrap() == address));
        assert!(group.iter().all(|lanes| lanes[1].local_address().unwrap() != address));
        let message = bind(&address.to_string(), 2, 1).unwrap_err().to_string();
        assert!(message.contains(&address.to_string()) && message.contains("in use"), "{message}");
        let elsewhere = bind("192.0.2.1:0", 1, 1).unwrap_err();
        assert!(matches!(elsewhere, UdpError::NotHere(_)), "{elsewhere}");
    }

    #[test]
    fn the_path_mtu_is_the_kernels() {
        for address in ["[::]:0", "0.0.0.0:0"] {
            let socket = bind(address, 1, 1).unwrap().remove(0).remove(0);
            let to = SocketAddr::from(([127, 0, 0, 1], 9));
            assert!(socket.path_mtu(to).unwrap() >= 1280);
            assert!(socket.path_mtu(to).unwrap() >= 1280, "again");
        }
    }
}
