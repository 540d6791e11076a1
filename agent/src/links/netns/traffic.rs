//! Packets through what was set up.

use super::*;

#[test]
fn pods_reach_each_other_and_the_gateway_but_only_with_their_own_addresses() {
    in_a_node(|| async {
        let node = Node::new().await;
        let handle = node.spawn(desired()).await;
        let (one, two) = (Namespace::new(), Namespace::new());
        let ports = [node.plug(&one, 2).await, node.plug(&two, 3).await];
        for port in &ports {
            handle.attach(port.clone()).await.unwrap();
        }
        for pod in [&one, &two] {
            // As the shim does: the pod's end takes note of its carrier.
            pod.asynchronously(|netlink| async move { netlink.link_by_name("eth0").await.unwrap() }).await;
        }
        let mut full = desired();
        full.pods.extend(ports.iter().map(|port| (port.host_interface.clone(), port.clone())));
        assert_eq!(node.to_do(&full).await, []);
        assert_eq!(handle.veths().await.unwrap().len(), 2);

        let at_gateway = bound(gateway());
        one.run(send(pod_ip(2), gateway(), "to the gateway")).await;
        assert_eq!(receive(&at_gateway).0, "to the gateway");
        let at_two = two.run(|| bound(pod_ip(3))).await;
        one.run(send(pod_ip(2), pod_ip(3), "to a pod")).await;
        let (text, from) = receive(&at_two);
        assert_eq!((text.as_str(), from.ip()), ("to a pod", pod_ip(2)));
        send(gateway(), pod_ip(3), "from the host")();
        assert_eq!(receive(&at_two).0, "from the host");

        // Each spoofed packet is followed by an honest one, which must be the first to come.
        one.asynchronously(|netlink| async move {
            let eth0 = netlink.link_by_name("eth0").await.unwrap().index;
            netlink.add_address(eth0, Prefix::from(pod_ip(9)), AddressFlags::default()).await.unwrap();
        })
        .await;
        one.run(send(pod_ip(9), pod_ip(3), "another's address")).await;
        one.run(send(pod_ip(2), pod_ip(3), "its own address")).await;
        assert_eq!(receive(&at_two).0, "its own address");
        let with_mac = |mac| {
            one.asynchronously(move |netlink| async move {
                let eth0 = netlink.link_by_name("eth0").await.unwrap().index;
                netlink.set_mac(eth0, mac).await.unwrap();
                // Or the packet would wait for ARP until the MAC is right again.
                netlink.set_neighbour(eth0, gateway(), desired().bridge.mac).await.unwrap();
            })
        };
        with_mac(Mac([2, 6, 6, 6, 6, 6])).await;
        one.run(send(pod_ip(2), pod_ip(3), "another's MAC")).await;
        with_mac(ports[0].mac).await;
        one.run(send(pod_ip(2), pod_ip(3), "its own MAC")).await;
        assert_eq!(receive(&at_two).0, "its own MAC");
        let (to_two, mac_two) = (Prefix::from(pod_ip(3)), ports[1].mac);
        one.asynchronously(move |netlink| async move {
            let eth0 = netlink.link_by_name("eth0").await.unwrap().index;
            netlink.set_neighbour(eth0, pod_ip(3), mac_two).await.unwrap();
            netlink.add_route(&Route::on_link(to_two, eth0)).await.unwrap();
            send(pod_ip(2), pod_ip(3), "past the gateway")();
            netlink.delete_route(&Route::on_link(to_two, eth0)).await.unwrap();
            send(pod_ip(2), pod_ip(3), "through the gateway")();
        })
        .await;
        assert_eq!(receive(&at_two).0, "through the gateway");

        handle.detach(&ports[0].host_interface).await.unwrap();
        full.pods.remove(&ports[0].host_interface);
        assert_eq!(node.to_do(&full).await, []);
        assert!(node.netlink.link_by_name(&ports[0].host_interface).await.unwrap_err().is_gone());
        handle.detach(&ports[0].host_interface).await.unwrap();
        let missing = handle.attach(ports[0].clone()).await;
        assert_eq!(missing, Err(crate::links::LinksError::NoVeth(ports[0].host_interface.clone())));
        assert_eq!(handle.watch().borrow().repairs, 0, "own changes are no drift");
    });
}

#[test]
fn packets_leave_the_universe_and_enter_it_with_a_fitting_source() {
    in_a_node(|| async {
        let node = Node::new().await;
        let (pod, outside) = (Namespace::new(), Namespace::new());
        let pair = VethPair {
            name: "eth0",
            mac: None,
            peer_name: "eth0",
            peer_mac: None,
            peer_netns: Some(outside.file.as_fd()),
            mtu: 1500,
            peer_max_segments: None,
        };
        let mut desired = desired();
        desired.no_masquerade.insert("198.51.100.0/24".parse().unwrap());
        desired.underlay.insert([192, 0, 2, 1].into());
        let handle = node.spawn(desired).await;
        let port = node.plug(&pod, 2).await;
        handle.attach(port).await.unwrap();
        // The underlay comes up later than the agent, and must forward all the same.
        node.netlink.create_veth(&pair).await.unwrap();
        let eth0 = node.index("eth0").await;
        node.netlink.set_up(eth0, true).await.unwrap();
        node.netlink
            .add_address(eth0, "192.0.2.1/24".parse().unwrap(), AddressFlags::default())
            .await
            .unwrap();
        let theirs = Route { protocol: 4, ..Route::on_link("198.51.100.0/24".parse().unwrap(), eth0) };
        node.netlink.add_route(&theirs).await.unwrap();
        outside
            .asynchronously(|netlink| async move {
                let eth0 = netlink.link_by_name("eth0").await.unwrap().index;
                for address in ["192.0.2.2/24", "198.51.100.2/24"] {
                    let flags = AddressFlags::default();
                    netlink.add_address(eth0, address.parse().unwrap(), flags).await.unwrap();
                }
                netlink.set_up(eth0, true).await.unwrap();
                let back = Route::via("10.32.0.0/12".parse().unwrap(), [192, 0, 2, 1].into(), eth0);
                netlink.add_route(&back).await.unwrap();
            })
            .await;
        let begun = Instant::now();
        while sysctl::read("net/ipv4/conf/eth0/forwarding").unwrap().as_deref() != Some("1") {
            assert!(begun.elapsed() < Duration::from_secs(1), "the underlay does not forward after 1 s");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for (to, seen_as) in [([192, 0, 2, 2], [192, 0, 2, 1]), ([198, 51, 100, 2], [10, 32, 0, 2])] {
            let (to, seen_as) = (IpAddr::from(to), IpAddr::from(seen_as));
            let echo = outside.run(move || bound(to)).await;
            let answered = pod.run(move || {
                let socket = UdpSocket::bind((pod_ip(2), 0)).unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                socket.send_to(b"hello", (to, PORT)).unwrap();
                receive(&socket).0
            });
            let echoed = async {
                let (text, from) = tokio::task::spawn_blocking(move || {
                    let (text, from) = receive(&echo);
                    echo.send_to(b"hello back", from).unwrap();
                    (text, from)
                })
                .await
                .unwrap();
                assert_eq!((text.as_str(), from.ip()), ("hello", seen_as));
            };
            let (answer, ()) = tokio::join!(answered, echoed);
            assert_eq!(answer, "hello back");
        }
        let mut conntrack = Conntrack::open().unwrap();
        assert_eq!(conntrack.forget(pod_ip(2)).unwrap(), 2);
        assert_eq!(conntrack.forget(pod_ip(2)).unwrap(), 0);

        // Into the universe, the host speaks as its bridge, whatever address a socket has.
        send([192, 0, 2, 1].into(), [10, 40, 0, 1].into(), "to a remote pod")();
        let mut packet = [0; 2048];
        let source = loop {
            let length = tokio::time::timeout(Duration::from_secs(5), node.tun.recv(&mut packet)).await;
            let length = length.expect("nothing came to the TUN in 5 s").unwrap();
            if packet[0] >> 4 == 4 && packet[16..20] == [10, 40, 0, 1] {
                assert!(packet[..length].ends_with(b"to a remote pod"));
                break IpAddr::from([packet[12], packet[13], packet[14], packet[15]]);
            }
        };
        assert_eq!(source, gateway());
    });
}

fn bound(address: IpAddr) -> UdpSocket {
    let socket = UdpSocket::bind((address, PORT)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket
}

fn send(from: IpAddr, to: IpAddr, text: &'static str) -> impl FnOnce() + Send + 'static {
    move || {
        let socket = UdpSocket::bind((from, 0)).unwrap();
        // What the firewall drops may be told to the sender.
        let _ = socket.send_to(text.as_bytes(), (to, PORT));
    }
}

fn receive(socket: &UdpSocket) -> (String, SocketAddr) {
    let mut buffer = [0; 64];
    let (length, from) = loop {
        match socket.recv_from(&mut buffer) {
            // A child process ended; sockets with a time limit are not resumed then.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            result => break result.expect("nothing came in 5 s"),
        }
    };
    (String::from_utf8_lossy(&buffer[..length]).into(), from)
}

const PORT: u16 = 9999;
