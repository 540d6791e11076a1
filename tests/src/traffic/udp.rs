//! Datagrams there and back.
use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};

use crate::{namespace::Netns, wait::Deadline};

/// Sends `count` datagrams of `size` bytes one after another to an echo server in `to`, which has that address.
///
/// # Errors
/// When one does not come back within the time, or not as it was sent.
pub fn udp_echo(
    from: &Netns,
    to: &Netns,
    address: IpAddr,
    (count, size): (usize, usize),
    within: Duration,
) -> anyhow::Result<()> {
    let server =
        to.run(|| Ok(UdpSocket::bind((address, 0))?)).with_context(|| format!("listen on {address}"))?;
    let target = server.local_addr()?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        // The socket stays in the namespace where it was opened, whichever thread uses it.
        scope.spawn(|| echo(&server, &done));
        let asked = from.run(|| ask(target, count, size, within));
        done.store(true, Ordering::Relaxed);
        asked.with_context(|| format!("UDP from {} to {target}", from.name()))
    })
}

fn ask(target: SocketAddr, count: usize, size: usize, within: Duration) -> anyhow::Result<()> {
    let any: SocketAddr = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("an address");
    let socket = UdpSocket::bind(any)?;
    socket.connect(target)?;
    let deadline = Deadline::after(within);
    let mut buffer = vec![0; size + 1];
    for number in 0..count {
        let sent: Vec<u8> = (0..size).map(|at| (at + number) as u8).collect();
        socket.send(&sent).with_context(|| format!("send datagram {number} of {size} bytes"))?;
        socket.set_read_timeout(Some(deadline.left()?))?;
        let length =
            socket.recv(&mut buffer).with_context(|| format!("datagram {number} did not come back"))?;
        ensure!(buffer[..length] == sent, "datagram {number} came back changed");
    }
    Ok(())
}

fn echo(server: &UdpSocket, done: &AtomicBool) {
    let mut buffer = vec![0; 1 << 16];
    let patience = server.set_read_timeout(Some(Duration::from_millis(20)));
    while patience.is_ok() && !done.load(Ordering::Relaxed) {
        match server.recv_from(&mut buffer) {
            // An answer that can't be sent is one that the client misses.
            Ok((length, client)) => drop(server.send_to(&buffer[..length], client)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => break,
        }
    }
}
