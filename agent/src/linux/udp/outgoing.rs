//! Datagrams to send, many with one system call and equal ones as one message that the kernel cuts (`UDP_SEGMENT`).

use super::{Socket, name::Name};
use crate::types::LARGEST_MESSAGE;
use nix::errno::Errno;
use std::{mem, net::SocketAddr};

/// A batch of datagrams in one buffer. Those that follow each other in a lane, go to one peer and are equally long are
/// sent as one message.
pub struct Outgoing {
    arena: Box<[u8]>,
    used: usize,
    parts: Vec<Part>,
    /// The kernel cuts messages for us.
    segmentation: bool,
    calls: Calls,
}

/// Where a datagram goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The peer's place in the table.
    pub peer: u32,
    pub to: SocketAddr,
    /// The socket of the worker's that sends it.
    pub lane: u8,
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    pub target: Target,
    pub datagrams: usize,
    /// Their bytes, without IP's and UDP's headers.
    pub bytes: usize,
    pub result: Result<(), Errno>,
}

/// Datagrams that lie one behind the other, equally long but for the last.
#[derive(Clone, Copy)]
struct Part {
    target: Target,
    start: usize,
    len: usize,
    segment: usize,
}

/// Parts that are sent as one message.
#[derive(Clone, Copy)]
struct Message {
    first: usize,
    parts: usize,
    len: usize,
    segment: usize,
}

impl Outgoing {
    pub fn new() -> Self {
        Self {
            arena: vec![0; ARENA].into(),
            used: 0,
            parts: Vec::with_capacity(PARTS),
            segmentation: true,
            calls: Calls::new(),
        }
    }

    /// Whether another part may be pushed and there are `ROOM` bytes for it; else send first.
    pub fn has_room(&self) -> bool {
        self.parts.len() < PARTS && self.arena.len() - self.used >= ROOM
    }

    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The free part of the buffer.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.arena[self.used..]
    }

    /// Makes the first `len` bytes of the room datagrams of `segment` bytes each, the last one of what is left.
    pub fn push(&mut self, target: Target, len: usize, segment: usize) {
        self.parts.push(Part { target, start: self.used, len, segment });
        self.used += len;
    }

    /// Sends the batch and says of each message what became of it. What the kernel has no room for is not kept.
    pub fn send(&mut self, sockets: &[Socket], mut report: impl FnMut(Report)) {
        // By lane and peer; within, as they came. So flows stay in order.
        self.parts.sort_unstable_by_key(|part| (part.target.lane, part.target.peer, part.start));
        let mut first = 0;
        while first < self.parts.len() {
            let lane = self.parts[first].target.lane;
            let count = self.parts[first..].iter().take_while(|part| part.target.lane == lane).count();
            self.send_lane(&sockets[usize::from(lane)], first..first + count, &mut report);
            first += count;
        }
        self.parts.clear();
        self.used = 0;
    }

    fn send_lane(&mut self, socket: &Socket, parts: std::ops::Range<usize>, report: &mut impl FnMut(Report)) {
        self.calls.clear();
        let mut next = parts.start;
        while next < parts.end {
            let message = self.message(next, parts.end);
            next += message.parts;
            self.calls.add(&mut self.arena, &self.parts, message);
        }
        let mut at = 0;
        while at < self.calls.messages.len() {
            let errno = match self.calls.send(socket, at) {
                Ok(sent) => {
                    (at..at + sent).for_each(|at| report(self.report(self.calls.messages[at], Ok(()))));
                    at += sent;
                    continue;
                }
                Err(Errno::EINTR) => continue,
                Err(errno) => errno,
            };
            let message = self.calls.messages[at];
            let many = message.len > message.segment;
            if errno == Errno::EAGAIN {
                // The socket's buffer is full: so it is for the lane's other messages.
                for at in at..self.calls.messages.len() {
                    report(self.report(self.calls.messages[at], Err(errno)));
                }
                return;
            } else if many && matches!(errno, Errno::EIO | Errno::EINVAL) {
                // EIO: it can't sum up what it cuts for this device. EINVAL: also a segment above the MTU (before 6.9).
                self.segmentation &= errno == Errno::EINVAL;
                self.send_each(socket, message, report);
            } else {
                report(self.report(message, Err(errno)));
            }
            at += 1;
        }
    }

    /// As many of the parts from `first` on as make one message.
    fn message(&self, first: usize, end: usize) -> Message {
        let Part { target, len, segment, .. } = self.parts[first];
        let mut message = Message { first, parts: 1, len, segment };
        for part in &self.parts[first + 1..end] {
            let open = self.segmentation && message.len.is_multiple_of(segment);
            let fits = part.len <= segment && message.len + part.len <= MAX_MESSAGE;
            if !open || !fits || part.target.peer != target.peer || message.len / segment >= MAX_SEGMENTS {
                break;
            }
            message.len += part.len;
            message.parts += 1;
        }
        message
    }

    /// Sends a message's datagrams one by one.
    fn send_each(&self, socket: &Socket, message: Message, report: &mut impl FnMut(Report)) {
        for part in &self.parts[message.first..message.first + message.parts] {
            for datagram in self.arena[part.start..part.start + part.len].chunks(part.segment) {
                let result = socket.send_one(datagram, part.target.to);
                report(Report { target: part.target, datagrams: 1, bytes: datagram.len(), result });
            }
        }
    }

    fn report(&self, message: Message, result: Result<(), Errno>) -> Report {
        let Message { first, len, segment, .. } = message;
        Report { target: self.parts[first].target, datagrams: len.div_ceil(segment), bytes: len, result }
    }
}

/// The system call's arguments, kept so that none is allocated anew.
struct Calls {
    messages: Vec<Message>,
    iovecs: Vec<libc::iovec>,
    names: Vec<Name>,
    controls: Vec<Control>,
    headers: Vec<libc::mmsghdr>,
}

impl Calls {
    fn new() -> Self {
        Self {
            messages: Vec::with_capacity(PARTS),
            iovecs: Vec::with_capacity(PARTS),
            names: Vec::with_capacity(PARTS),
            controls: Vec::with_capacity(PARTS),
            headers: Vec::with_capacity(PARTS),
        }
    }

    fn clear(&mut self) {
        self.messages.clear();
        self.iovecs.clear();
        self.names.clear();
        self.controls.clear();
        self.headers.clear();
    }

    fn add(&mut self, arena: &mut [u8], parts: &[Part], message: Message) {
        let parts = &parts[message.first..message.first + message.parts];
        self.names.push(Name::from(parts[0].target.to));
        self.controls.push(Control::new(message.segment));
        for part in parts {
            let bytes = &mut arena[part.start..part.start + part.len];
            self.iovecs.push(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() });
        }
        self.messages.push(message);
    }

    /// Sends the messages from `at` on; gives how many the kernel took.
    fn send(&mut self, socket: &Socket, at: usize) -> Result<usize, Errno> {
        self.headers.clear();
        let mut iovec = self.messages[..at].iter().map(|message| message.parts).sum::<usize>();
        for (place, message) in self.messages.iter().enumerate().skip(at) {
            let (name, control) = (&mut self.names[place], &mut self.controls[place]);
            // SAFETY: a `mmsghdr` is integers and pointers, for which zero is a value.
            let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
            header.msg_hdr.msg_iov = self.iovecs[iovec..iovec + message.parts].as_mut_ptr();
            header.msg_hdr.msg_iovlen = message.parts as _;
            header.msg_hdr.msg_namelen = name.len();
            header.msg_hdr.msg_name = (&raw mut *name).cast();
            if message.len > message.segment {
                header.msg_hdr.msg_control = (&raw mut *control).cast();
                header.msg_hdr.msg_controllen = CONTROL_SPACE as _;
            }
            self.headers.push(header);
            iovec += message.parts;
        }
        // SAFETY: there are that many headers. What each points to was set just above to elements of vectors of `self`
        // and, by way of the iovecs, to the batch's arena; all outlive the call, and the kernel keeps none of them.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_fd_raw(),
                self.headers.as_mut_ptr(),
                self.headers.len() as libc::c_uint,
                libc::MSG_DONTWAIT,
            )
        };
        Errno::result(sent).map(|sent| sent as usize)
    }
}

impl Default for Outgoing {
    fn default() -> Self {
        Self::new()
    }
}

// SAFETY: the raw pointers are set anew before each system call, to memory that the value itself owns, and are not
// followed otherwise.
unsafe impl Send for Outgoing {}

/// The control message that says how long each datagram is.
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    segment: u16,
    padding: [u8; 6],
}

impl Control {
    fn new(segment: usize) -> Self {
        // SAFETY: a `cmsghdr` is integers, for which zero is a value.
        let mut header: libc::cmsghdr = unsafe { mem::zeroed() };
        header.cmsg_level = libc::SOL_UDP;
        header.cmsg_type = libc::UDP_SEGMENT;
        // SAFETY: it only computes.
        header.cmsg_len = unsafe { libc::CMSG_LEN(size_of::<u16>() as u32) } as _;
        Self { header, segment: segment as u16, padding: [0; 6] }
    }
}

// SAFETY: it only computes.
const CONTROL_SPACE: usize = unsafe { libc::CMSG_SPACE(size_of::<u16>() as u32) } as usize;
const _: () = assert!(CONTROL_SPACE <= size_of::<Control>());
const _: () = assert!(mem::offset_of!(Control, segment) == size_of::<libc::cmsghdr>());

/// Bytes that the largest packet may take, cut into the smallest segments that the data path cuts.
pub const ROOM: usize = 192 << 10;
const ARENA: usize = 320 << 10;
/// Parts in one batch: enough that a system call's cost is shared, few enough that the first need not wait for long.
const PARTS: usize = 64;
/// Bytes and datagrams of the largest message that the kernel cuts (`UDP_MAX_SEGMENTS` before 6.9).
pub const MAX_MESSAGE: usize = LARGEST_MESSAGE;
pub const MAX_SEGMENTS: usize = 64;
