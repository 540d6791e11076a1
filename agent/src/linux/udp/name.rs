//! A socket's address as the kernel takes it.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// A destination as the kernel takes it. A dual-stack socket takes IPv4's form too.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) union Name {
    family: libc::sa_family_t,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl Name {
    /// No address at all.
    pub(super) const NONE: Self = Self {
        v6: libc::sockaddr_in6 {
            sin6_family: 0,
            sin6_port: 0,
            sin6_flowinfo: 0,
            sin6_addr: libc::in6_addr { s6_addr: [0; 16] },
            sin6_scope_id: 0,
        },
    };

    pub(super) fn len(&self) -> libc::socklen_t {
        // SAFETY: every form begins with the family, and all of them are plain integers that are always initialised.
        match i32::from(unsafe { self.family }) {
            libc::AF_INET => size_of::<libc::sockaddr_in>() as libc::socklen_t,
            _ => size_of::<libc::sockaddr_in6>() as libc::socklen_t,
        }
    }

    pub(super) fn address(&self) -> Option<SocketAddr> {
        // SAFETY: every form begins with the family, which tells the form; all are plain integers and initialised.
        unsafe {
            match i32::from(self.family) {
                libc::AF_INET => {
                    let ip = Ipv4Addr::from(u32::from_be(self.v4.sin_addr.s_addr));
                    Some(SocketAddr::from((ip, u16::from_be(self.v4.sin_port))))
                }
                libc::AF_INET6 => {
                    let libc::sockaddr_in6 { sin6_port, sin6_flowinfo, sin6_addr, sin6_scope_id, .. } =
                        self.v6;
                    let (ip, port) = (Ipv6Addr::from(sin6_addr.s6_addr), u16::from_be(sin6_port));
                    Some(SocketAddrV6::new(ip, port, sin6_flowinfo, sin6_scope_id).into())
                }
                _ => None,
            }
        }
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
