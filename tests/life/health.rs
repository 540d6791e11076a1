//! What an agent tells of itself: health, metrics, and the answers of the command line.
use std::{os::unix::fs::PermissionsExt, time::Duration};

use anyhow::ensure;
use weft_lab::wait;

use crate::harness::{SHORT, SOON, complaint, lab, metric, printed};

#[test]
fn metrics_tell_what_was_carried() {
    let lab = lab(2, 1);
    let (node, other) = (lab.node("n1").unwrap(), lab.node("n2").unwrap());
    let (from, to) = (lab.pod("n1/p1").unwrap(), lab.pod("n2/p1").unwrap());
    let address = to.address().unwrap();
    wait::until("the first echo", SOON, || from.ping(address, SHORT)).unwrap();
    let name = |family: &str, labels: &str| format!("weft_{family}{{{labels}}}");
    let sent = name("packets_total", "direction=\"sent\"");
    let before = metric(&node, &sent).unwrap();
    for _ in 0..5 {
        from.ping(address, SOON).unwrap();
    }

    assert_eq!(metric(&node, &sent).unwrap() - before, 5.0);
    assert!(metric(&node, &name("packets_total", "direction=\"received\"")).unwrap() >= 5.0);
    assert!(metric(&other, &name("packets_total", "direction=\"received\"")).unwrap() >= 5.0);
    let packets = metric(&node, &sent).unwrap();
    let bytes = metric(&node, &name("bytes_total", "direction=\"sent\"")).unwrap();
    // An echo of the lab: 20 bytes of IPv4, 8 of ICMP, 13 of data.
    assert!((20.0 * packets..=41.0 * packets).contains(&bytes), "{bytes} bytes in {packets} packets");
    let to_peer = metric(&node, &name("peer_packets_total", "peer=\"n2\",direction=\"sent\"")).unwrap();
    assert_eq!(to_peer, packets);

    for (one, value) in [
        ("weft_ready", 1.0),
        ("weft_peers", 1.0),
        ("weft_pod_mtu_bytes", 1440.0),
        ("weft_pods{state=\"active\"}", 1.0),
        ("weft_pods{state=\"reserved\"}", 0.0),
        ("weft_links_repairs_total", 0.0),
        ("weft_ipam_addresses{state=\"allocated\"}", 2.0),
        ("weft_ipam_addresses{state=\"resting\"}", 0.0),
        ("weft_ipam_range_share{peer=\"n1\"}", 0.5),
        ("weft_ipam_range_share{peer=\"n2\"}", 0.5),
        ("weft_peer_path{peer=\"n2\",path=\"direct\"}", 1.0),
        ("weft_drops_total{reason=\"spoofed_source\"}", 0.0),
        ("weft_cni_add_seconds_count", 1.0),
    ] {
        assert_eq!(metric(&node, one).unwrap(), value, "{one}");
    }
    wait::until("the link is shown, and that calls were in vain before is not any more", SOON, || {
        ensure!(metric(&node, "weft_warnings")? == 0.0);
        ensure!(metric(&node, "weft_links")? == 1.0);
        ensure!(metric(&node, "weft_peer_linked{peer=\"n2\"}")? == 1.0);
        Ok(())
    })
    .unwrap();
    let took = metric(&node, "weft_cni_add_seconds_sum").unwrap();
    assert!(took > 0.0 && took < 5.0, "{took} s");
    assert!(metric(&node, "weft_gossip_events_total{event=\"items_merged\"}").unwrap() >= 1.0);
    assert!(metric(&node, "weft_uptime_seconds").unwrap() > 0.0);
    let (status, page) = node.http("/metrics").unwrap();
    assert!(status == 200 && page.contains("weft_info{") && page.ends_with("# EOF\n"), "{page}");
    assert_eq!(node.http("/livez").unwrap(), (200, "ok\n".into()));
    assert_eq!(node.http("/readyz").unwrap(), (200, "ok\n".into()));
}

#[test]
fn the_command_line_shows_the_agents_state() {
    let lab = lab(2, 1);
    let node = lab.node("n1").unwrap();
    let pod = lab.pod("n1/p1").unwrap();
    let address = pod.address().unwrap().to_string();
    wait::until("the link is shown", SOON, || {
        ensure!(node.status()?["links"] == 1);
        Ok(())
    })
    .unwrap();

    let status = node.status().unwrap();
    for (key, value) in [("name", "n1"), ("universe", "10.32.0.0/12"), ("encryption", "required")] {
        assert_eq!(status[key], value, "{status}");
    }
    assert!(status["ready"] == true && status["pods"] == 1 && status["peers"] == 1, "{status}");
    assert_eq!(status["addresses_owned"], 1 << 19);
    let peers = node.weft_json("peers").unwrap();
    assert!(peers["peers"][0]["me"] == true && peers["peers"][1]["name"] == "n2", "{peers}");
    assert!(peers["peers"][1]["linked"] == true && peers["peers"][1]["addresses"] == 1 << 19, "{peers}");
    let ipam = node.weft_json("ipam").unwrap();
    assert!(ipam["ranges"][0]["mine"] == true && ipam["ranges"][0]["prefix"] == "10.32.0.0/13", "{ipam}");
    assert!(ipam["ranges"][0]["allocated"] == 2 && ipam["ranges"][1]["allocated"].is_null(), "{ipam}");
    let pods = node.weft_json("pods").unwrap();
    let shown = &pods["pods"][0];
    assert_eq!(shown["addresses"], serde_json::json!([address]));
    assert!(shown["namespace"] == "lab" && shown["name"] == "n1-p1" && shown["state"] == "active", "{pods}");
    assert!(shown["container_id"] == pod.container_id() && shown["uid"] == pod.uid(), "{pods}");
    let report = node.weft_json("report").unwrap();
    assert_eq!((&report["ipam"], &report["pods"]), (&ipam, &pods["pods"]));
    assert!(report["kernel"].as_str().unwrap().starts_with("Linux ") && report["status"]["name"] == "n1");

    let text = |command: &str| printed(node.weft(&[command]).unwrap()).unwrap();
    for (command, words) in [
        (
            "status",
            vec!["node        n1\n", "ready       yes\n", "1 known, 1 linked", "encryption  required"],
        ),
        ("peers", vec!["n1 (this node)", "n2", "direct", "192.0.2.2:6783"]),
        ("ipam", vec!["universe 10.32.0.0/12", "10.40.0.0/13", "50.0 %"]),
        ("pods", vec!["lab", "n1-p1", "active", &address]),
        ("report", vec!["== status ==", "== peers ==", "== ipam ==", "== pods ==", "== counters =="]),
    ] {
        let shown = text(command);
        assert!(words.iter().all(|word| shown.contains(word)), "{command}: {shown}");
        assert!(!shown.contains('\x1b'), "colours are for terminals: {shown}");
    }

    let mode = std::fs::metadata(node.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    node.stop_agent().unwrap();
    for command in ["status", "peers", "ipam", "pods", "report"] {
        let said = complaint(node.weft(&[command]).unwrap());
        let expected = format!("weft: no agent answers on {}: is it running?", node.socket().display());
        assert!(said.starts_with(&expected), "{said}");
    }
}

#[test]
fn a_joiner_that_finds_nobody_is_alive_and_says_why_it_is_not_ready() {
    let lab = lab(1, 0);
    let node = lab.add_node().unwrap();
    let conf = tempfile::tempdir().unwrap();
    node.configure(|settings| {
        settings.peers = vec!["192.0.2.77".into()];
        settings.more.extend(["--cni-conf-dir".into(), conf.path().display().to_string()]);
    });
    let pod = lab.add_pod(&node).unwrap();
    node.start_agent().unwrap();
    wait::until("it says that it is starting", SOON, || {
        let (status, reasons) = node.http("/readyz")?;
        assert_eq!(status, 503, "{reasons}");
        ensure!(reasons.starts_with("the agent is starting"), "{reasons}");
        Ok(())
    })
    .unwrap();
    assert_eq!(node.http("/livez").unwrap().0, 200);
    let said = complaint(node.weft(&["status"]).unwrap());
    assert!(said.contains("the agent is starting"), "{said}");
    for (command, code) in [("ADD", 11), ("STATUS", 50)] {
        let mut call = pod.call(command);
        let mut config: serde_json::Value = serde_json::from_slice(&call.stdin).unwrap();
        config["cniVersion"] = "1.1.0".into();
        call.stdin = config.to_string().into_bytes();
        let answer = call.run(&node).unwrap();
        assert_eq!(answer.json().unwrap()["code"], code, "{}", answer.stdout);
        assert!(answer.stdout.contains("the agent is starting"), "{}", answer.stdout);
    }
    wait::until("it says why it is not ready", Duration::from_secs(10), || {
        let (status, reasons) = node.http("/readyz")?;
        assert_eq!(status, 503, "{reasons}");
        ensure!(reasons.contains("no addresses to hand out: waiting for "), "{reasons}");
        Ok(())
    })
    .unwrap();
    assert_eq!(node.http("/livez").unwrap(), (200, "ok\n".into()));
    let text = printed(node.weft(&["status"]).unwrap()).unwrap();
    assert!(text.contains("ready       no") && text.contains("no addresses to hand out"), "{text}");
    assert!(text.contains("192.0.2.77"), "whom it cannot reach is missing: {text}");
    let answer = pod.call("ADD").run(&node).unwrap();
    assert_eq!(answer.json().unwrap()["code"], 11, "{}", answer.stdout);
    assert_eq!(std::fs::read_dir(conf.path()).unwrap().count(), 0, "a conflist before it is ready");
}
