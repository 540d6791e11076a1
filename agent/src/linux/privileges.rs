//! Gives up what an agent does not need: all capabilities but `CAP_NET_ADMIN`, and the ways to gain others.

use caps::{CapSet, Capability, CapsHashSet, errors::CapsError};
use nix::{
    errno::Errno,
    sys::{
        prctl,
        stat::{Mode, umask},
    },
};

#[derive(Debug, thiserror::Error)]
pub enum PrivilegesError {
    #[error("give up capabilities: {0}")]
    Capabilities(#[from] CapsError),
    #[error("set no_new_privs: {0}")]
    NoNewPrivileges(Errno),
}

/// Keeps `CAP_NET_ADMIN`, if it is there, for the calling thread, the threads it starts from now on, and the programs that
/// these run; files that are made are for their owner only. Call it before there are other threads: capabilities are each
/// thread's own.
///
/// # Errors
/// The kernel refuses, which a seccomp filter may make it do.
pub fn keep_net_admin_only() -> Result<(), PrivilegesError> {
    umask(Mode::from_bits_truncate(0o077));
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = permitted.into_iter().filter(|capability| *capability == KEPT).collect();
    for capability in caps::all().into_iter().filter(|capability| *capability != KEPT) {
        // Takes CAP_SETPCAP. Who has not got it gains nothing by what stays in this set: see below.
        let _ = caps::drop(None, CapSet::Bounding, capability);
    }
    // In an order in which each set is within those that bound it. What is ambient goes to `nft`, whoever its user is.
    for set in [CapSet::Effective, CapSet::Inheritable, CapSet::Permitted, CapSet::Ambient] {
        caps::set(None, set, &kept)?;
    }
    prctl::set_no_new_privs().map_err(PrivilegesError::NoNewPrivileges)
}

/// Whether the calling thread may change the network.
///
/// # Errors
/// The kernel does not say.
pub fn has_net_admin() -> Result<bool, PrivilegesError> {
    Ok(caps::has_cap(None, CapSet::Effective, KEPT)?)
}

/// Links, routes, nftables, sysctls of the network, TUN devices.
const KEPT: Capability = Capability::CAP_NET_ADMIN;

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::HashSet, thread};

    #[test]
    fn net_admin_is_all_that_is_left_also_to_children() {
        // On a thread of its own; the mask of files is the process's and is put back.
        let mask = umask(Mode::empty());
        let seen = thread::spawn(|| {
            keep_net_admin_only().expect("this test needs root");
            assert!(has_net_admin().unwrap());
            let child = std::process::Command::new("cat").arg("/proc/self/status").output().unwrap();
            let sets = [CapSet::Permitted, CapSet::Ambient, CapSet::Bounding];
            let own = sets.map(|set| caps::read(None, set).unwrap());
            (own, String::from_utf8(child.stdout).unwrap())
        });
        let (own, child) = seen.join().unwrap();
        umask(mask);
        assert_eq!(own, [(); 3].map(|()| HashSet::from([KEPT])));
        for line in ["CapPrm:\t0000000000001000", "CapBnd:\t0000000000001000", "NoNewPrivs:\t1"] {
            assert!(child.contains(line), "{child}");
        }
    }
}
