//! The TUN device and its queues.
//!
//! ```text
//!   open(name, n) ─▶ inspect: free, or a multi-queue TUN that nobody holds
//!                 ─▶ a first queue that asks for virtio headers ─▶ tokio-tun attaches n more ─▶ offloads ─▶ n × Queue
//! ```
//!
//! The device is persistent: it keeps its address and routes when the agent ends, and the next one attaches to it.
//! A queue reads and writes whole IP packets behind a virtio header; a packet may be a super-packet of up to 64 KiB.

use nix::{
    errno::Errno,
    fcntl,
    sys::{
        stat::Mode,
        uio::{readv, writev},
    },
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};
use tokio_tun::Tun;

/// One queue of the device, with a descriptor of its own. No call blocks.
#[derive(Debug)]
pub struct Queue(OwnedFd);

#[derive(Debug, thiserror::Error)]
pub enum TunError {
    #[error(
        "/dev/net/tun does not exist or has no driver: load it with `modprobe tun`; in a container, hand the device in"
    )]
    NoDevice,
    #[error("/dev/net/tun must not be opened here: allow the device (10:200) to this container or service")]
    Denied,
    #[error("TUN device {0}: making or attaching to it needs the capability NET_ADMIN")]
    NeedsNetAdmin(String),
    #[error("TUN device {0} is held by another process: does another agent run on this node?")]
    Busy(String),
    #[error(
        "{name} exists and is not Weft's TUN device but {found}: remove it with `ip link del {name}`, or rename it"
    )]
    NotOurs { name: String, found: String },
    #[error("`{0}` is no name for a device: 1 to 15 characters")]
    Name(String),
    #[error("TUN device {name}: {what}: {source}")]
    Os { name: String, what: &'static str, source: io::Error },
}

impl Queue {
    /// Reads one packet into `parts`, of which the first is as long as a virtio header; gives the length with it.
    ///
    /// # Errors
    /// `EAGAIN` when none waits; `EBADFD` when the device is gone.
    pub fn read(&self, parts: &mut [IoSliceMut<'_>]) -> Result<usize, Errno> {
        readv(&self.0, parts)
    }

    /// Writes one packet, which the kernel takes as arrived at the device; the first of `parts` is a virtio header.
    ///
    /// # Errors
    /// `EIO` while the device is down; `EBADFD` when it is gone; `EINVAL` when the header does not fit the packet.
    pub fn write(&self, parts: &[IoSlice<'_>]) -> Result<(), Errno> {
        writev(&self.0, parts).map(drop)
    }
}

/// Packets that found the queues of the device `name`, in this network namespace, full.
pub fn refused(name: &str) -> io::Result<u64> {
    let devices = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    let line = devices.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'));
    let count = line.and_then(|line| line.split_whitespace().nth(TX_DROPPED)?.parse().ok());
    count.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// What the kernel leaves to us and takes from us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// Super-packets of UDP too: since Linux 6.2.
    pub udp: bool,
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Opens `queues` queues of the persistent device `name`, which is made if it does not exist. Call it within a tokio
/// runtime that drives I/O.
///
/// The kernel spreads flows over the queues that are open, so each needs its reader.
pub fn open(name: &str, queues: usize) -> Result<(Vec<Queue>, Offloads), TunError> {
    let os = |what| move |source: io::Error| TunError::Os { name: name.into(), what, source };
    let control = open_control()?;
    if let Some(found) = inspect(name)? {
        found.check(name)?;
        if found.queues > 0 {
            return Err(TunError::Busy(name.into()));
        }
    }
    // tokio-tun does not ask for virtio headers, but leaves them as the device's first queue has them.
    attach(&control, name, libc::IFF_VNET_HDR)?;
    // With a single queue tokio-tun would leave IFF_MULTI_QUEUE away; one more is closed again below.
    let tuns = Tun::builder()
        .name(name)
        .queues(queues.max(2))
        .persist()
        .build()
        .map_err(|e| attach_error(name, e))?;
    let fds: io::Result<Vec<_>> = tuns.iter().take(queues).map(duplicate).collect();
    drop((tuns, control));
    let queues: Vec<_> = fds.map_err(os("duplicate a descriptor"))?.into_iter().map(Queue).collect();
    // Both are the device's, not a queue's.
    let offloads = ask_offloads(&queues[0].0).map_err(|e| os("ask for offloads")(e.into()))?;
    Ok((queues, offloads))
}

/// Queues of the device `name` that another agent has opened.
pub fn adopt(name: &str, queues: Vec<OwnedFd>) -> Result<(Vec<Queue>, Offloads), TunError> {
    let os =
        |source: Errno| TunError::Os { name: name.into(), what: "ask for offloads", source: source.into() };
    let offloads = ask_offloads(queues.first().ok_or(Errno::EBADF).map_err(os)?).map_err(os)?;
    Ok((queues.into_iter().map(Queue).collect(), offloads))
}

/// Removes the device `name`, or makes it go with the last process that holds it; false where there is none.
pub fn remove(name: &str) -> Result<bool, TunError> {
    let control = open_control()?;
    let Some(found) = inspect(name)? else { return Ok(false) };
    found.check(name)?;
    attach(&control, name, 0)?;
    // SAFETY: the argument is a plain number.
    let released = unsafe { tunsetpersist(control.as_raw_fd(), 0) };
    released.map_err(|e| TunError::Os { name: name.into(), what: "let it go", source: e.into() })?;
    Ok(true)
}

/// Makes a descriptor of /dev/net/tun a queue of the device.
fn attach(control: &OwnedFd, name: &str, flags: libc::c_int) -> Result<(), TunError> {
    let mut request = Request::new(name)?;
    request.data.flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE | flags) as libc::c_short;
    // SAFETY: the descriptor is /dev/net/tun's, and the request a whole `ifreq` that lives through the call.
    let attached = unsafe { tunsetiff(control.as_raw_fd(), (&raw const request) as libc::c_ulong) };
    attached.map(drop).map_err(|e| attach_error(name, tokio_tun::Error::NixError(e)))
}

/// Asks for partial checksums and super-packets, of as many kinds as this kernel knows.
fn ask_offloads(queue: &OwnedFd) -> Result<Offloads, Errno> {
    let header = libc::c_int::try_from(VIRTIO_LEN).expect("ten bytes");
    // SAFETY: the kernel reads one number, which lives through the call.
    unsafe { tunsetvnethdrsz(queue.as_raw_fd(), &raw const header) }?;
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    let udp = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    // SAFETY: the argument is a plain number.
    let set = |offloads: u32| unsafe { tunsetoffload(queue.as_raw_fd(), offloads.into()) };
    if set(tcp | udp).is_ok() {
        return Ok(Offloads { udp: true });
    }
    set(tcp).map(|_| Offloads { udp: false })
}

/// A device that has our name already.
struct Found {
    driver: String,
    kind: String,
    multi_queue: bool,
    /// Open queues. A device that nobody holds says 0.
    queues: u32,
}

impl Found {
    fn check(&self, name: &str) -> Result<(), TunError> {
        let found = match self {
            Self { driver, .. } if driver != "tun" => match driver.as_str() {
                "" => "a device without a driver's name".into(),
                driver => format!("a device of driver `{driver}`"),
            },
            Self { kind, .. } if kind != "tun" => format!("a {kind} device"),
            Self { multi_queue: false, .. } => "a TUN device with a single queue".into(),
            _ => return Ok(()),
        };
        Err(TunError::NotOurs { name: name.into(), found })
    }
}

/// Asks the device `name`, if there is one, what it is.
fn inspect(name: &str) -> Result<Option<Found>, TunError> {
    let os = |what| move |source: Errno| TunError::Os { name: name.into(), what, source: source.into() };
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)
        .map_err(|source| TunError::Os { name: name.into(), what: "open a socket", source })?;
    let mut driver = Driver { cmd: ETHTOOL_GDRVINFO, text: [[0; 32]; 5], rest: [0; 32] };
    let mut request = Request::new(name)?;
    request.data.pointer = (&raw mut driver).cast();
    // SAFETY: the kernel reads the request and writes a `struct ethtool_drvinfo` of 196 bytes, `driver`'s size, to
    // where it points; both live through the call.
    match unsafe { siocethtool(socket.as_raw_fd(), &raw mut request) } {
        Err(Errno::ENODEV) => return Ok(None),
        // A device without any ethtool operation.
        Err(Errno::EOPNOTSUPP) => {}
        result => result.map(drop).map_err(os("ask for its driver"))?,
    }
    let mut channels = Channels { cmd: ETHTOOL_GCHANNELS, ..Channels::default() };
    request.data.pointer = (&raw mut channels).cast();
    // SAFETY: as above, with a `struct ethtool_channels` of nine numbers.
    let counted = unsafe { siocethtool(socket.as_raw_fd(), &raw mut request) };
    // A kernel that does not count can't tell whether the device is held either; attaching then tells the rest.
    let (multi_queue, queues) =
        counted.map_or((true, 0), |_| (channels.max_combined > 1, channels.combined_count));
    let text = |at: usize| {
        let bytes = driver.text[at].split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(bytes).into_owned()
    };
    Ok(Some(Found { driver: text(0), kind: text(3), multi_queue, queues }))
}

fn open_control() -> Result<OwnedFd, TunError> {
    let flags = fcntl::OFlag::O_RDWR | fcntl::OFlag::O_CLOEXEC;
    fcntl::open("/dev/net/tun", flags, Mode::empty()).map_err(|e| match e {
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => TunError::NoDevice,
        Errno::EPERM | Errno::EACCES => TunError::Denied,
        e => TunError::Os { name: "/dev/net/tun".into(), what: "open it", source: e.into() },
    })
}

fn attach_error(name: &str, error: tokio_tun::Error) -> TunError {
    let source = match error {
        tokio_tun::Error::NixError(errno) => errno.into(),
        tokio_tun::Error::IoError(error) => error,
    };
    match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM) => TunError::NeedsNetAdmin(name.into()),
        Some(Errno::EBUSY | Errno::E2BIG) => TunError::Busy(name.into()),
        Some(Errno::EINVAL) => TunError::NotOurs {
            name: name.into(),
            found: "a device of another kind or with other flags".into(),
        },
        _ => TunError::Os { name: name.into(), what: "attach to it", source },
    }
}

fn duplicate(tun: &Tun) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is open, as `tun` lives.
    let fd = unsafe { libc::fcntl(tun.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the new descriptor is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The kernel's `struct ifreq`.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    data: RequestData,
}

#[repr(C)]
union RequestData {
    flags: libc::c_short,
    pointer: *mut libc::c_void,
    whole: [u64; 3],
}

impl Request {
    fn new(name: &str) -> Result<Self, TunError> {
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['\0', '/', '%', ':']) {
            return Err(TunError::Name(name.into()));
        }
        let mut bytes = [0; libc::IFNAMSIZ];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        Ok(Self { name: bytes, data: RequestData { whole: [0; 3] } })
    }
}

/// The kernel's `struct ethtool_drvinfo`: driver, version, firmware version, bus, expansion ROM's version; numbers.
#[repr(C)]
struct Driver {
    cmd: u32,
    text: [[u8; 32]; 5],
    rest: [u8; 32],
}

/// The kernel's `struct ethtool_channels`.
#[repr(C)]
#[derive(Default)]
struct Channels {
    cmd: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx_count: u32,
    tx_count: u32,
    other_count: u32,
    combined_count: u32,
}

nix::ioctl_write_int!(tunsetiff, b'T', 202);
nix::ioctl_write_int!(tunsetpersist, b'T', 203);
nix::ioctl_write_int!(tunsetoffload, b'T', 208);
nix::ioctl_write_ptr!(tunsetvnethdrsz, b'T', 216, libc::c_int);
nix::ioctl_readwrite_bad!(siocethtool, 0x8946, Request);

/// A column of /proc/net/dev.
const TX_DROPPED: usize = 11;
/// Queues of one device, besides the one that sets it up (`MAX_TAP_QUEUES`).
pub const MAX_QUEUES: usize = 255;
/// Bytes of the virtio header.
pub const VIRTIO_LEN: usize = 10;
const ETHTOOL_GDRVINFO: u32 = 0x3;
const ETHTOOL_GCHANNELS: u32 = 0x3c;
const _: () = assert!(size_of::<Request>() == 40);
const _: () = assert!(size_of::<Driver>() == 196 && size_of::<Channels>() == 36);
