//! A policy's change acts on what is established.
use crate::harness::{address, apply, labelled, policy, wait_dropped, weft};
use anyhow::ensure;
use serde_json::json;
use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    time::Duration,
};
use weft_lab::{Lab, node::Node, pod::Pod, wait};

fn listen(pod: &Pod) -> TcpListener {
    pod.netns().run(|| Ok(TcpListener::bind((address(pod), 8000))?)).unwrap()
}

fn connect(from: &Pod, to: &TcpListener) -> anyhow::Result<(TcpStream, TcpStream)> {
    let target = to.local_addr()?;
    let client = from.netns().run(|| Ok(TcpStream::connect_timeout(&target, Duration::from_secs(2))?))?;
    Ok((client, to.accept()?.0))
}

/// What a page of metrics says of one of them.
fn number(page: &str, metric: &str) -> Option<u64> {
    page.lines().find_map(|line| line.strip_prefix(metric)).and_then(|rest| rest.trim().parse().ok())
}

fn silent(stream: &mut TcpStream) {
    stream.set_nonblocking(true).unwrap();
    let heard = stream.read(&mut [0; 16]);
    assert!(heard.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "{heard:?}");
}

#[test]
fn a_connection_that_is_forbidden_now_ends_though_both_talk_and_the_other_direction_is_allowed() {
    let lab = Lab::builder().nodes(2).pods(1).start().unwrap();
    let (n1, n2) = (lab.node("n1").unwrap(), lab.node("n2").unwrap());
    let (asking, serving) = (lab.pod("n1/p1").unwrap(), lab.pod("n2/p1").unwrap());
    let (back, listener) = (listen(&asking), listen(&serving));
    let (mut client, mut server) = connect(&asking, &listener).unwrap();
    client.write_all(b"hello").unwrap();
    server.read_exact(&mut [0; 5]).unwrap();
    server.write_all(b"there").unwrap();
    client.read_exact(&mut [0; 5]).unwrap();

    let isolated = policy("closed", json!({"podSelector": {"matchLabels": {"role": "server"}}}));
    let objects = [labelled(&serving, "role", "server"), isolated];
    let nodes: [&Node; 2] = [&n1, &n2];
    nodes.iter().for_each(|node| apply(node, &objects).unwrap());
    // Each end goes on by itself, and tries again as TCP does.
    client.write_all(b"still there?").unwrap();
    server.write_all(b"still here!").unwrap();
    wait_dropped(&n2, 4).unwrap();
    silent(&mut client);
    silent(&mut server);
    // Begun by the isolated pod, which only its ingress is closed of.
    connect(&serving, &back).unwrap();
    assert!(connect(&asking, &listener).is_err());
    let to = format!("lab/{}:8000/TCP", serving.netns().name());
    let said = weft(&n2, &["policy", "explain", &address(&asking).to_string(), &to]).unwrap();
    assert!(
        said.contains("ingress  denied: isolated by NetworkPolicy lab/closed, and no rule allows it"),
        "{said}"
    );

    wait::until("a scrape counts what was dropped", Duration::from_secs(15), || {
        let page = n2.http("/metrics")?.1;
        let policy = "namespace=\"lab\",policy=\"closed\",direction=\"ingress\"";
        let dropped = format!("weft_policy_packets_total{{{policy},verdict=\"dropped\"}} ");
        ensure!(number(&page, &dropped) >= Some(1) && number(&page, LATE) >= Some(2), "{page}");
        Ok(())
    })
    .unwrap();

    nodes.iter().for_each(|node| apply(node, &[]).unwrap());
    connect(&asking, &listener).unwrap();
    lab.finish().unwrap();
}

const LATE: &str = "weft_policy_dropped_packets_total{reason=\"no_connection\"} ";
