//! What a pod of a real runtime gets: reach, ports of the node, limits.
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::ensure;
use weft_lab::{
    runtime::containerd::{with_bandwidth, with_ports},
    traffic::Stream,
    wait,
};

use crate::cluster::{Cluster, SOON, attachments, reaches};

#[test]
fn pods_on_two_nodes_reach_each_other() {
    let cluster = Cluster::old_and_new();
    let [old, new] = &cluster.runtimes[..] else { panic!("two nodes") };
    let (a, b) = (old.run_pod("a").unwrap(), new.run_pod("b").unwrap());
    reaches(&a.netns, &b);
    reaches(&b.netns, &a);
    for (pod, runtime) in [(&a, old), (&b, new)] {
        reaches(runtime.node().netns(), pod);
    }

    let page = "echo from b > /page; exec httpd -f -p 80 -h /";
    new.run_container(&b, &["sh", "-c", page]).unwrap();
    let client = old.run_container(&a, &["/pause"]).unwrap();
    let url = format!("http://{}/page", b.address);
    let read = wait::until("b's page", SOON, || old.client().exec(&client, &["wget", "-qO-", &url])).unwrap();
    assert_eq!(read, "from b\n");

    for (pod, runtime) in [(&a, old), (&b, new)] {
        assert_eq!(attachments(runtime.node()).len(), 1);
        runtime.remove(&pod.id).unwrap();
        assert_eq!(attachments(runtime.node()).len(), 0, "its address is free again");
    }
    cluster.finish();
}

#[test]
fn a_port_of_the_node_leads_to_the_pod() {
    let cluster = Cluster::old_and_new();
    let outside = &cluster.lab.underlay().outside;
    for runtime in &cluster.runtimes {
        let pod = runtime.run(with_ports(runtime.pod("web"), &[(8080, 80)])).unwrap();
        let listener = pod.netns.run(|| Ok(TcpListener::bind((pod.address, 80))?)).unwrap();
        let target = SocketAddr::new(runtime.node().address(), 8080);
        let server = thread::spawn(move || {
            let (mut client, from) = listener.accept().unwrap();
            client.write_all(b"hello").unwrap();
            from.ip()
        });
        let ask = || {
            let mut answer = String::new();
            TcpStream::connect_timeout(&target, SOON)?.read_to_string(&mut answer)?;
            Ok(answer)
        };
        assert_eq!(outside.run(ask).unwrap(), "hello");
        assert_eq!(
            server.join().unwrap(),
            cluster.lab.underlay().outside_address(),
            "the client's own address"
        );

        runtime.remove(&pod.id).unwrap();
        let refused = outside.run(|| Ok(TcpStream::connect_timeout(&target, SOON).is_err())).unwrap();
        assert!(refused, "the port is closed with its pod");
    }
    cluster.finish();
}

#[test]
fn bandwidth_limits_hold() {
    let cluster = Cluster::old_and_new();
    for runtime in &cluster.runtimes {
        let limited = with_bandwidth(runtime.pod("slow"), "80M", "40M");
        let (slow, free) = (runtime.run(limited).unwrap(), runtime.run_pod("free").unwrap());
        for (from, to, megabits) in [(&free, &slow, 80.0), (&slow, &free, 40.0)] {
            let stream = Stream::start(&from.netns, &to.netns, to.address, u64::MAX, 2 * LONG).unwrap();
            wait::until("the burst is over and the limit holds", LONG, || {
                let (start, before) = (Instant::now(), stream.received());
                stream.advances(2_000_000, LONG)?;
                let rate = (stream.received() - before) as f64 * 8e-6 / start.elapsed().as_secs_f64();
                ensure!(
                    rate < megabits * 1.25,
                    "{rate} Mbit/s with a limit of {megabits}, after {before} bytes"
                );
                Ok(())
            })
            .unwrap();
            stream.finish().unwrap();
        }
    }
    cluster.finish();
}

/// Both containerds ask for bursts of 2³¹-1 bits, whatever the limit: a quarter of a gigabyte passes before it holds.
const LONG: Duration = Duration::from_secs(40);
