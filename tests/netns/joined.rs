//! The data port behind a cable that no super-packet crosses.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::ensure;
use ipnet::IpNet;
use weft::{
    datapath::{path_task, task},
    linux::udp::{BATCH, Incoming, Outgoing, Socket, Target},
};
use weft_lab::{
    bench::{CABLE, Wire},
    namespace::Netns,
    sandbox::Sandbox,
    wait,
};

/// The kernel asks some socket of the port's group whether to join, whichever gets them in the end.
#[test]
fn datagrams_are_joined_whichever_port_they_come_from() {
    let sandbox = Arc::new(Sandbox::new().unwrap());
    let [here, there] = ["a", "b"].map(|name| Netns::create(&sandbox, name).unwrap());
    Wire::Plain.lay([&here, &there]).unwrap();
    for (netns, address) in [(&here, HERE), (&there, THERE)] {
        let prefix = IpNet::new(address, 24).unwrap();
        netns.links(async |links| links.address(CABLE, prefix).await).unwrap();
        netns.links(async |links| links.up(CABLE).await).unwrap();
    }
    for workers in [1, 2] {
        let (group, _probes) = there
            .run(|| {
                let group = task::bind(SocketAddr::new(ANY, 0), workers)?;
                let probes = path_task::bind(&group)?;
                Ok((group, probes))
            })
            .unwrap();
        let worker = &group[0][0];
        let to = SocketAddr::new(THERE, worker.local_address().unwrap().port());
        let senders = here
            .run(|| Ok(Socket::bind_workers(SocketAddr::new(ANY, 0), 1, LANES.into(), 0)?.remove(0)))
            .unwrap();
        for lane in 0..LANES {
            send(&senders, Target { peer: 0, to, lane });
            let messages = receive(worker);
            assert!(
                messages * 4 <= DATAGRAMS,
                "lane {lane} to {workers}: {messages} messages of {DATAGRAMS}"
            );
        }
    }
}

/// Sends datagrams that are all alike, and steered to the first worker.
fn send(senders: &[Socket], target: Target) {
    let mut outgoing = Outgoing::new();
    outgoing.room()[..DATAGRAMS * LEN].fill(0);
    outgoing.push(target, DATAGRAMS * LEN, LEN);
    outgoing.send(senders, |report| assert_eq!(report.result, Ok(())));
}

/// Messages in which they have all come.
fn receive(worker: &Socket) -> usize {
    let mut incoming = Incoming::new();
    let (mut bytes, mut messages) = (0, 0);
    let all = wait::until("all have come", SOON, || {
        if let Ok(received) = incoming.receive(worker, BATCH) {
            messages += received;
            bytes += (0..received).map(|at| incoming.message(at).range.len()).sum::<usize>();
        }
        ensure!(bytes == DATAGRAMS * LEN, "{bytes} bytes");
        Ok(messages)
    });
    all.unwrap()
}

const ANY: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
const HERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const THERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
/// Ports to send from: each is a flow of its own to the kernel.
const LANES: u8 = 16;
const DATAGRAMS: usize = 40;
const LEN: usize = 1200;
const SOON: Duration = Duration::from_secs(5);
