//! A new agent that takes over from the one that runs.
use std::{iter, process::Output, sync::Arc, time::Duration};

use prost::Message;
use weft::linux::seqpacket::Connection;
use weft_lab::{
    Lab,
    node::Node,
    pod::Pod,
    traffic::{Datagrams, Manner, Stream},
};
use weft_proto::takeover::{Part, Request, part};

use crate::{
    harness::{START, attached, lab, metric, reaches},
    kernel::Kernel,
};

#[test]
fn a_takeover_loses_no_packet() {
    let lab = lab(3, 2);
    let (a, b, c, beside) = (pod(&lab, "n1/p1"), pod(&lab, "n2/p1"), pod(&lab, "n3/p1"), pod(&lab, "n1/p2"));
    [&b, &c, &beside].into_iter().for_each(|other| reaches(&a, other));
    let flows = [(&a, &b), (&b, &a), (&a, &c), (&c, &a), (&a, &beside)].map(|(from, to)| {
        let tick = Manner { per_second: 1000, size: 64, at_once: 1 };
        Datagrams::start(from.netns(), to.netns(), to.address().unwrap(), tick).unwrap()
    });
    for name in ["n1", "n2", "n1", "n3", "n1"] {
        let node = lab.node(name).unwrap();
        let (kernel, incarnation) = (Kernel::of(&node), node.status().unwrap()["incarnation"].clone());
        take_over(&node);
        assert_eq!(node.status().unwrap()["incarnation"], incarnation, "for its peers it is the same");
        Kernel::of(&node).assert_is(&kernel);
        let fresh = attached(&lab, &node);
        reaches(&fresh, &b);
        reaches(&c, &fresh);
    }
    let arrived = flows.map(|flow| flow.finish().unwrap());
    println!("{arrived:?}");
    assert!(arrived.iter().all(|flow| flow.received == flow.sent), "{arrived:?}");
    let mut addresses: Vec<_> = lab.pods().iter().map(|pod| pod.address().unwrap()).collect();
    addresses.sort();
    assert!(addresses.is_sorted_by(|one, next| one < next), "each is handed out once: {addresses:?}");
}

#[test]
fn connections_outlive_every_way_to_replace_an_agent() {
    let lab = lab(2, 2);
    let (a, b, beside) = (pod(&lab, "n1/p1"), pod(&lab, "n2/p1"), pod(&lab, "n1/p2"));
    [&b, &beside].into_iter().for_each(|other| reaches(&a, other));
    let streams = [(&a, &b), (&b, &a), (&a, &beside)].map(|(from, to)| stream(from, to));
    for name in ["n1", "n2"] {
        let node = lab.node(name).unwrap();
        take_over(&node);
        streams.iter().for_each(|stream| stream.advances(1 << 20, SOON).unwrap());
        node.stop_agent().unwrap();
        node.start_agent().unwrap();
        streams.iter().for_each(|stream| stream.advances(1 << 20, SOON).unwrap());
        node.kill_agent().unwrap();
        node.start_agent().unwrap();
        streams.iter().for_each(|stream| stream.advances(1 << 20, SOON).unwrap());
        node.wait_ready(START).unwrap();
    }
    streams.into_iter().for_each(|stream| drop(stream.finish().unwrap()));
}

#[test]
fn without_an_agent_to_take_over_from_it_starts_as_always() {
    let lab = lab(2, 1);
    let node = lab.node("n1").unwrap();
    node.kill_agent().unwrap();
    node.configure(|settings| settings.more.push("--takeover".into()));
    node.start_agent().unwrap();
    node.wait_ready(START).unwrap();
    reaches(&pod(&lab, "n1/p1"), &pod(&lab, "n2/p1"));
}

#[test]
fn an_agent_that_does_not_fit_is_refused_and_the_other_goes_on() {
    let lab = lab(2, 1);
    let node = lab.node("n1").unwrap();
    for (more, words) in [
        (
            ["--encryption", "off"],
            "--encryption is off with the next agent and required with the one that runs",
        ),
        (["--metrics-addr", "127.0.0.1:6799"], "--metrics-addr is 127.0.0.1:6799 with the next agent"),
    ] {
        let refused = run(&node, &more);
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && error.contains(words), "{error}");
        node.wait_ready(START).unwrap();
        reaches(&pod(&lab, "n1/p1"), &pod(&lab, "n2/p1"));
    }
    assert_eq!(metric(&node, "weft_links_repairs_total").unwrap(), 0.0);
}

#[test]
fn probes_ask_their_own_process() {
    let lab = lab(1, 0);
    let node = lab.node("n1").unwrap();
    let sockets = ["one", "two"].map(|name| node.run_dir().join(name).to_str().unwrap().to_owned());
    let probe = |what: &str, socket: usize| {
        let output = node.weft(&["probe", what, "--probe-socket", &sockets[socket]]).unwrap();
        output.status.success().then_some(()).ok_or(String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let serve_at = |socket: usize| {
        node.configure(|settings| settings.more = vec!["--probe-socket".into(), sockets[socket].clone()]);
    };
    serve_at(0);
    node.stop_agent().unwrap();
    node.start_agent().unwrap();
    node.wait_ready(START).unwrap();
    assert_eq!([probe("live", 0), probe("ready", 0)], [Ok(()), Ok(())]);
    serve_at(1);
    take_over(&node);
    assert_eq!([probe("live", 1), probe("ready", 1)], [Ok(()), Ok(())]);
    let refused = probe("live", 0).unwrap_err();
    assert!(refused.contains(&sockets[0]) && refused.contains("refused"), "{refused}");
}

#[test]
fn two_agents_without_takeover_still_exclude_each_other() {
    let lab = lab(1, 0);
    let second = lab.node("n1").unwrap().agent_command().unwrap();
    let output = lab.node("n1").unwrap().exec(second).unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("in use"), "{error}");
    lab.node("n1").unwrap().wait_ready(START).unwrap();
}

#[test]
fn an_agent_whose_successor_ends_in_the_middle_ends_too_and_leaves_all_in_place() {
    let lab = lab(2, 1);
    let (node, from, to) = (lab.node("n1").unwrap(), pod(&lab, "n1/p1"), pod(&lab, "n2/p1"));
    let status = node.status().unwrap();
    let request = Request {
        protocol: 1,
        name: "n1".into(),
        universe: "10.32.0.0/12".into(),
        listen: "[::]:6783".into(),
        metrics: weft_lab::agent::METRICS.into(),
        sealed: true,
    };
    let successor = Connection::connect(&node.run_dir().join("takeover.sock"), SOON).unwrap().unwrap();
    successor.send(&request.encode_to_vec(), &[]).unwrap();
    let mut parts = iter::from_fn(|| Part::decode(successor.receive().unwrap().0.as_slice()).unwrap().part);
    let Some(part::Part::Agent(agent)) = parts.next() else { panic!("it says first who it is") };
    assert_eq!(status["incarnation"].to_string().trim_matches('"'), agent.incarnation.to_string());
    assert!(parts.any(|part| matches!(part, part::Part::Done(_))));
    reaches(&from, &to);
    drop(successor);
    assert!(!node.wait_agent_end(SOON).unwrap().success());
    assert!(node.log_tail().contains("has ended before it had taken over"), "{}", node.log_tail());
    node.start_agent().unwrap();
    node.wait_ready(START).unwrap();
    reaches(&from, &to);
}

fn run(node: &Arc<Node>, more: &[&str]) -> Output {
    let mut command = node.agent_command().unwrap();
    // The last of a flag that is given twice would be refused: these are none of the lab's but one.
    let kept: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    let mut again = std::process::Command::new(command.get_program());
    let mut kept = kept.into_iter();
    while let Some(argument) = kept.next() {
        match more.contains(&argument.to_string_lossy().as_ref()) {
            true => drop(kept.next()),
            false => drop(again.arg(argument)),
        }
    }
    again.args(more).arg("--takeover").stdin(std::process::Stdio::null());
    command = again;
    node.exec(command).unwrap()
}

fn take_over(node: &Node) {
    node.take_over(START).unwrap_or_else(|error| panic!("{error:#}\n{}", node.log_tail()));
    node.wait_ready(START).unwrap();
}

fn stream(from: &Arc<Pod>, to: &Arc<Pod>) -> Stream {
    let address = to.address().unwrap();
    Stream::start(from.netns(), to.netns(), address, u64::MAX, Duration::from_secs(60)).unwrap()
}

fn pod(lab: &Lab, name: &str) -> Arc<Pod> {
    lab.pod(name).unwrap()
}

const SOON: Duration = Duration::from_secs(5);
