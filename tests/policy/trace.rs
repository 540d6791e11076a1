//! What an established connection's packets pass.
use crate::harness::{address, apply};
use anyhow::{Context, ensure};
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};
use weft_lab::{Lab, node::Node, policy::bench::many, wait};

/// The rules of our table that packets of a connection match after it has begun, and how many packets did.
fn rules_of_established(
    node: &Node,
    client: &mut TcpStream,
    server: &mut TcpStream,
) -> BTreeMap<String, usize> {
    nft(node, &[TRACE]).unwrap();
    let mut monitor = node.netns().run(|| {
        let mut command = Command::new("nft");
        Ok(command.args(["monitor", "trace"]).stdout(Stdio::piped()).spawn()?)
    });
    let monitor: &mut Child = monitor.as_mut().unwrap();
    let traced: Arc<Mutex<BTreeMap<String, usize>>> = Arc::default();
    let (out, heard) = (monitor.stdout.take().unwrap(), traced.clone());
    let reader = thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            let traced = line.strip_prefix("trace id ").and_then(|line| line.split_once(' '));
            let rule = traced.and_then(|(_, rest)| rest.strip_prefix("inet weft-policy "));
            if let Some(rule) = rule.filter(|rule| rule.contains(" rule ")) {
                *heard.lock().unwrap().entry(rule.into()).or_default() += 1;
            }
        }
    });
    wait::until("packets are traced", Duration::from_secs(20), || {
        client.write_all(b"go on")?;
        server.read_exact(&mut [0; 5])?;
        ensure!(traced.lock().unwrap().values().sum::<usize>() > PACKETS * 2);
        Ok(())
    })
    .unwrap();
    nft(node, &["delete", "table", "inet", "lab-trace"]).unwrap();
    monitor.kill().unwrap();
    monitor.wait().unwrap();
    reader.join().unwrap();
    let traced = traced.lock().unwrap();
    traced.clone()
}

fn nft(node: &Node, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new("nft");
    let output = node.exec({
        command.args(arguments);
        command
    })?;
    ensure!(output.status.success(), "nft {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).context("nft's output is not text")
}

/// The first rule of a chain, as nft lists it.
fn first_rule(node: &Node, chain: &str) -> String {
    let listed = nft(node, &["list", "chain", "inet", "weft-policy", chain]).unwrap();
    let mut rules = listed.lines().map(str::trim).skip_while(|line| !line.starts_with("type filter"));
    rules.nth(1).unwrap().into()
}

#[test]
fn an_established_packet_passes_one_rule_in_each_direction_whatever_the_number_of_policies() {
    let lab = Lab::builder().nodes(2).pods(1).start().unwrap();
    let (n1, n2) = (lab.node("n1").unwrap(), lab.node("n2").unwrap());
    let (asking, serving) = (lab.pod("n1/p1").unwrap(), lab.pod("n2/p1").unwrap());
    let listener = serving.netns().run(|| Ok(TcpListener::bind((address(&serving), 8000))?)).unwrap();
    for policies in [1, 1000] {
        [&n1, &n2].into_iter().for_each(|node| apply(node, &many(policies)).unwrap());
        let target = listener.local_addr().unwrap();
        let mut client = asking.netns().run(|| Ok(TcpStream::connect(target)?)).unwrap();
        let mut server = listener.accept().unwrap().0;
        let passed = rules_of_established(&n1, &mut client, &mut server);
        assert_eq!(passed.len(), 2, "{policies} policies: {passed:?}");
        for ((rule, packets), chain) in passed.iter().zip(["egress", "ingress"]) {
            assert!(rule.starts_with(chain) && rule.contains(ESTABLISHED), "{policies} policies: {passed:?}");
            assert!(*packets >= PACKETS, "{policies} policies: {passed:?}");
            assert_eq!(first_rule(&n1, chain), ESTABLISHED);
        }
    }
    lab.finish().unwrap();
}

const PACKETS: usize = 4;
const ESTABLISHED: &str = "ct state established,related accept";
/// Before our chains.
const TRACE: &str = "table inet lab-trace { chain forward { type filter hook forward priority -10; ct state established meta nftrace set 1; }; }";
