//! Kernel calls that have no safe wrapper: the lab's only place for `unsafe`.
#![allow(unsafe_code)]

use std::{
    io, mem,
    net::UdpSocket,
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::Command,
};

use nix::sys::signal::{SigSet, Signal};

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
