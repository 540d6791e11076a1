//! Other programs' hands in our table.
use crate::harness::{apply, policy};
use anyhow::ensure;
use serde_json::json;
use std::{
    process::Command,
    time::{Duration, Instant},
};
use weft_lab::{Lab, node::Node, wait};

fn nft(node: &Node, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new("nft");
    command.args(arguments);
    let output = node.exec(command)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn what_others_change_in_the_table_is_put_right_at_once_and_outlives_the_agent() {
    let lab = Lab::builder().nodes(1).pods(2).start().unwrap();
    let node = lab.node("n1").unwrap();
    let deny = policy("deny", json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}));
    apply(&node, &[deny]).unwrap();
    let stands = || {
        let listed = nft(&node, &["list", "map", "inet", "weft-policy", "ingress4"])?;
        ensure!(listed.matches("jump").count() == 2, "{listed}");
        Ok(())
    };
    stands().unwrap();
    let owned = nft(&node, &["list", "table", "inet", "weft-policy"]).unwrap().contains("flags owner");
    let mut windows = Vec::new();
    for damage in [&["flush", "ruleset"][..], &["flush", "map", "inet", "weft-policy", "ingress4"]] {
        for _ in 0..10 {
            let done = nft(&node, damage);
            let start = Instant::now();
            if owned {
                stands().unwrap();
            } else {
                done.unwrap();
            }
            wait::until("the table stands again", Duration::from_secs(2), stands).unwrap();
            windows.push(start.elapsed());
        }
    }
    windows.sort();
    let (median, longest) = (windows[windows.len() / 2], windows[windows.len() - 1]);
    println!("owned: {owned}; the table stood again after {median:?} in the median, {longest:?} at most");
    assert!(longest < Duration::from_secs(1), "{windows:?}");

    node.kill_agent().unwrap();
    stands().unwrap();
    node.start_agent().unwrap();
    node.wait_ready(Duration::from_secs(20)).unwrap();
    wait::until("the policies are in force again", Duration::from_secs(5), stands).unwrap();
    lab.finish().unwrap();
}
