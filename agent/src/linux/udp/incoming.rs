//! Datagrams received, many with one system call; those of one flow may come as one message (`UDP_GRO`).

use super::{Socket, name::Name};
use nix::errno::Errno;
use std::{mem, net::SocketAddr, ops::Range};

/// The messages of one system call, in one buffer.
pub struct Incoming {
    buffer: Box<[u8]>,
    iovecs: Vec<libc::iovec>,
    names: Vec<Name>,
    controls: Vec<Control>,
    headers: Vec<libc::mmsghdr>,
}

/// One or many datagrams from one source, equally long but for the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Where in the buffer they are.
    pub range: Range<usize>,
    /// Bytes of each.
    pub segment: usize,
}

impl Incoming {
    pub fn new() -> Self {
        Self {
            buffer: vec![0; BATCH * STRIDE].into(),
            iovecs: Vec::with_capacity(BATCH),
            names: Vec::with_capacity(BATCH),
            controls: Vec::with_capacity(BATCH),
            headers: Vec::with_capacity(BATCH),
        }
    }

    /// Takes up to `most` of the messages that wait, in place of those it held; gives how many.
    ///
    /// # Errors
    /// `EAGAIN` when none waits.
    pub fn receive(&mut self, socket: &Socket, most: usize) -> Result<usize, Errno> {
        let most = most.min(BATCH);
        self.iovecs.clear();
        self.controls.clear();
        self.headers.clear();
        for slot in self.buffer.chunks_mut(STRIDE).take(most) {
            self.iovecs.push(libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: SLOT });
        }
        // SAFETY: both are integers and pointers, for which zero is a value.
        self.controls.resize_with(most, || unsafe { mem::zeroed() });
        self.names.resize(most, Name::NONE);
        let parts = self.iovecs.iter_mut().zip(&mut self.controls).zip(&mut self.names);
        for ((iovec, control), name) in parts {
            // SAFETY: as above.
            let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
            header.msg_hdr.msg_iov = iovec;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_name = (&raw mut *name).cast();
            header.msg_hdr.msg_namelen = size_of::<Name>() as _;
            header.msg_hdr.msg_control = (&raw mut *control).cast();
            header.msg_hdr.msg_controllen = size_of::<Control>() as _;
            self.headers.push(header);
        }
        // SAFETY: there are `most` headers. Each one's iovec, buffer, name and control data were set just above to
        // memory of `self`, which is borrowed until the call returns; no timeout is given.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_fd_raw(),
                self.headers.as_mut_ptr(),
                most as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let received = Errno::result(received)? as usize;
        self.headers.truncate(received);
        Ok(received)
    }

    /// A message of the last call.
    pub fn message(&self, at: usize) -> Message {
        let (header, control) = (&self.headers[at], &self.controls[at]);
        let len = (header.msg_len as usize).min(SLOT);
        let told = header.msg_hdr.msg_controllen >= CONTROL_LEN as _
            && control.header.cmsg_level == libc::SOL_UDP
            && control.header.cmsg_type == libc::UDP_GRO;
        let segment = if told { usize::try_from(control.segment).unwrap_or(0) } else { len };
        let start = at * STRIDE;
        Message { range: start..start + len, segment: if segment == 0 { len.max(1) } else { segment } }
    }

    /// Where a message of the last call came from.
    pub fn source(&self, at: usize) -> Option<SocketAddr> {
        self.names[at].address()
    }

    /// All messages' bytes.
    pub fn buffer(&mut self) -> &mut [u8] {
        &mut self.buffer
    }
}

impl Default for Incoming {
    fn default() -> Self {
        Self::new()
    }
}

// SAFETY: the raw pointers are set anew before each system call, to memory that the value itself owns, and are not
// followed otherwise.
unsafe impl Send for Incoming {}

/// The control message that says how long each datagram is.
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    segment: libc::c_int,
    padding: [u8; 4],
}

// SAFETY: it only computes.
const CONTROL_LEN: usize = unsafe { libc::CMSG_LEN(size_of::<libc::c_int>() as u32) } as usize;
const _: () = assert!(mem::offset_of!(Control, segment) == size_of::<libc::cmsghdr>());

/// Messages in one system call, at most.
pub const BATCH: usize = 32;
/// Bytes of the largest message: more than UDP has.
const SLOT: usize = 1 << 16;
/// From slot to slot: more than a power of two, so that all slots' beginnings don't fall on the same cache lines.
const STRIDE: usize = SLOT + 128;
