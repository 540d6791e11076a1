//! Kernel calls that have no safe wrapper: the lab's only place for `unsafe`.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, CString},
    io, mem,
    net::UdpSocket,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{ffi::OsStrExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::Command,
    ptr,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::signal::{SigSet, Signal},
    unistd::{chdir, chroot},
};

/// Has the kernel kill the command's process when the *thread* that spawns it ends, however it ends; the process starts
/// with no signal blocked, whatever its parent blocks.
pub fn die_with_spawner(command: &mut Command) {
    let arm = || {
        SigSet::empty().thread_set_mask()?;
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from)
    };
    // SAFETY: between fork and exec only sigprocmask(2) and prctl(2) are called: async-signal-safe, no allocation.
    unsafe { command.pre_exec(arm) };
}

/// Has the command's process start as a careful container runtime starts it: with `CAP_NET_ADMIN` and no other capability
/// to be had, and with everything read-only but `writable` and the network's sysctls. `root` is an empty directory on
/// which the file system is mounted again, `hidden` a mount point that is left out of it.
///
/// # Errors
/// A path has a zero byte in it.
pub fn confine(command: &mut Command, root: &Path, hidden: &Path, writable: &[PathBuf]) -> io::Result<()> {
    let text = |path: &Path| CString::new(path.as_os_str().as_bytes());
    let within = |path: &Path| text(&root.join(path.strip_prefix("/").unwrap_or(path)));
    let sysctls = Path::new("/proc/sys/net");
    let writable: Vec<(CString, CString)> = writable
        .iter()
        .map(PathBuf::as_path)
        .chain([sysctls])
        .map(|path| Ok((text(path)?, within(path)?)))
        .collect::<io::Result<_>>()?;
    let (root, hidden) = (text(root)?, text(hidden)?);
    let confine = move || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        umount2(&*hidden, MntFlags::MNT_DETACH)?;
        bind(c"/", &root, MsFlags::MS_REC)?;
        set_read_only(&root)?;
        for (source, target) in &writable {
            bind(source, target, MsFlags::empty())?;
        }
        chroot(&*root)?;
        chdir(c"/")?;
        drop_from_bounding_set(|capability| capability != CAP_NET_ADMIN)
    };
    // SAFETY: between fork and exec there are only system calls with what was allocated before.
    unsafe { command.pre_exec(confine) };
    Ok(())
}

fn bind(source: &CStr, target: &CStr, flags: MsFlags) -> nix::Result<()> {
    mount(Some(source), target, None::<&CStr>, MsFlags::MS_BIND | flags, None::<&CStr>)
}

/// A mount with all that are below.
fn set_read_only(path: &CStr) -> io::Result<()> {
    let attributes =
        libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let size = mem::size_of_val(&attributes);
    // SAFETY: the path ends with a zero byte, and the pointer is to a live mount_attr of that size.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A program that root starts has every capability of this set, and no other.
fn drop_from_bounding_set(drops: impl Fn(libc::c_ulong) -> bool) -> io::Result<()> {
    for capability in (0..).filter(|capability| drops(*capability)) {
        // SAFETY: takes two numbers and no pointer.
        match Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }) {
            Ok(_) => {}
            // Beyond the last that the kernel knows.
            Err(Errno::EINVAL) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// `linux/capability.h`.
const CAP_NET_ADMIN: libc::c_ulong = 12;

/// Sets "don't fragment" on what the socket sends; packets above the known path MTU fail with `EMSGSIZE`.
pub fn forbid_fragmentation(socket: &UdpSocket) -> io::Result<()> {
    let (level, name, value) = match socket.local_addr()?.is_ipv4() {
        true => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO),
        false => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO),
    };
    let size = mem::size_of_val(&value) as libc::socklen_t;
    // SAFETY: the pointer is to a live c_int and `size` is its size; the descriptor is open while `socket` is borrowed.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), size) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The path MTU that the kernel knows for the connected socket's peer, in bytes.
pub fn path_mtu(socket: &UdpSocket) -> io::Result<u32> {
    let (level, name) = match socket.local_addr()?.is_ipv4() {
        true => (libc::IPPROTO_IP, libc::IP_MTU),
        false => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let mut mtu: libc::c_int = 0;
    let mut size = mem::size_of_val(&mtu) as libc::socklen_t;
    // SAFETY: both pointers are to live variables, `size` holds the size of the first.
    let done =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut mtu).cast(), &raw mut size) };
    if done == 0 { Ok(mtu.unsigned_abs()) } else { Err(io::Error::last_os_error()) }
}

/// Asks the driver of an interface in the calling thread's network namespace; `request` is one of the structures of
/// `linux/ethtool.h`, with room for the answer.
pub fn ethtool(interface: &str, request: &mut [u32]) -> io::Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    // SAFETY: all zeroes are an empty name and a null pointer.
    let mut query: libc::ifreq = unsafe { mem::zeroed() };
    // The last byte stays zero.
    let room = query.ifr_name.len() - 1;
    for (to, from) in query.ifr_name[..room].iter_mut().zip(interface.bytes()) {
        *to = from.cast_signed();
    }
    query.ifr_ifru.ifru_data = request.as_mut_ptr().cast();
    // SAFETY: `query` and what it points to are live; the callers' requests are as long as the kernel's answers.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut query) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A socket that hears every frame that passes an interface of the calling thread's network namespace, and sends frames
/// there as they are.
pub fn packet_socket(interface: &str) -> io::Result<OwnedFd> {
    let name = CString::new(interface)?;
    // SAFETY: the name ends with a zero byte.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    let (family, protocol) = (libc::AF_PACKET, (libc::ETH_P_ALL as u16).to_be());
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    // Of no protocol: nothing is heard, of any interface, before it is bound to this one.
    // SAFETY: takes three numbers and no pointer.
    let socket = Errno::result(unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor was just opened, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: all zeroes are numbers without a meaning.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = family as libc::c_ushort;
    (address.sll_protocol, address.sll_ifindex) = (protocol, index.cast_signed());
    let size = mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: the pointer is to a live address of that size.
    Errno::result(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) })?;
    Ok(socket)
}

/// Puts the calling thread before all others of its control group.
pub fn first_in_line() -> io::Result<()> {
    // SAFETY: takes three numbers and no pointer; zero is the calling thread.
    Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) })?;
    Ok(())
}

/// Datagrams of one size that go through a socket in one call.
pub struct Batch {
    headers: Vec<libc::mmsghdr>,
    _vectors: Vec<libc::iovec>,
    _bytes: Vec<u8>,
}

impl Batch {
    /// So many datagrams of so many bytes, all zero.
    pub fn new(count: usize, size: usize) -> Self {
        Self::of(count, &vec![0; size])
    }

    /// The same datagram so many times.
    pub fn of(count: usize, datagram: &[u8]) -> Self {
        let (size, mut bytes) = (datagram.len(), datagram.repeat(count));
        let vector = |part: &mut [u8]| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: size };
        let mut vectors: Vec<_> = bytes.chunks_exact_mut(size).map(vector).collect();
        let header = |vector: &mut libc::iovec| {
            // SAFETY: all zeroes are null pointers with lengths of zero.
            let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
            (header.msg_hdr.msg_iov, header.msg_hdr.msg_iovlen) = (vector, 1);
            header
        };
        let headers = vectors.iter_mut().map(header).collect();
        Self { headers, _vectors: vectors, _bytes: bytes }
    }

    /// Sends the first `count`, at most all; returns how many the kernel took.
    pub fn send(&mut self, socket: &UdpSocket, count: usize) -> io::Result<usize> {
        let count = count.min(self.headers.len()) as libc::c_uint;
        // SAFETY: the headers point to vectors and bytes that live as long as they, and `count` of them exist.
        let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), self.headers.as_mut_ptr(), count, 0) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Waits for a datagram, as long as the socket waits; returns how many were there, at most all that fit.
    pub fn receive(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        let (headers, count) = (self.headers.as_mut_ptr(), self.headers.len() as libc::c_uint);
        let flags = libc::MSG_WAITFORONE;
        // SAFETY: as in `send`; nothing else has a reference to the bytes that are written.
        let received = unsafe { libc::recvmmsg(socket.as_raw_fd(), headers, count, flags, ptr::null_mut()) };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }
}

/// Bytes that this process has allocated and not given back.
pub fn allocated() -> usize {
    // SAFETY: takes no argument, and returns numbers.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

/// What the calling thread has had of processors.
pub fn thread_time() -> std::time::Duration {
    let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
    clock.now().expect("every thread has this clock").into()
}
