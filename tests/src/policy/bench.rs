//! `cargo lab policy-bench`: TCP throughput between two nodes' pods with many network policies against none, in turn.
//!
//! All policies isolate both pods, in both directions, and only the last one lets them talk: what is established must not pay.
use crate::{
    Lab,
    bench::generator,
    claim,
    lab::check_root,
    node::Node,
    pairs::{self, Ratio},
    pod::Pod,
};
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::{fs, path::PathBuf, process::ExitCode, time::Duration};

#[derive(Debug, clap::Args)]
pub struct Options {
    /// How often both are measured
    #[arg(long, value_name = "COUNT", default_value = "15")]
    pairs: usize,
    /// How long one measurement takes
    #[arg(long, value_name = "SECONDS", default_value = "2")]
    seconds: f64,
    #[arg(long, value_name = "COUNT", default_value = "1000")]
    policies: usize,
    /// Write the figures as JSON to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    check_root()?;
    ensure!(options.pairs > 0, "--pairs: at least one");
    claim::sweep()?;
    let lab = Lab::builder().nodes(2).pods(1).start()?;
    let nodes: Vec<_> = lab.nodes().to_vec();
    let (from, to) = (lab.pod("n1/p1")?, lab.pod("n2/p1")?);
    let many = many(options.policies);
    let pairs = pairs::in_turn(options.pairs, |with| {
        let objects = if with { &many[..] } else { &[] };
        nodes.iter().try_for_each(|node| apply(node, objects))?;
        let speed = gigabits(&from, &to, Duration::from_secs_f64(options.seconds))?;
        println!("{} policies: {speed:.2} Gbit/s", objects.len());
        Ok(speed)
    })?;
    let ratio = Ratio::of(&pairs);
    println!("policies           {}", options.policies);
    println!("{ratio}");
    if let Some(file) = &options.json {
        let text = json!({"policies": options.policies, "gigabits": pairs, "ratio": ratio});
        fs::write(file, text.to_string()).with_context(|| format!("write {}", file.display()))?;
    }
    drop((nodes, from, to));
    lab.finish()?;
    Ok(ExitCode::SUCCESS)
}

/// Policies of the lab's pods; only the last one lets anybody talk.
pub fn many(count: usize) -> Vec<Value> {
    let policy = |number: usize| {
        let cidr = match number + 1 == count {
            true => "0.0.0.0/0".into(),
            false => format!("172.{}.{}.0/24", 16 + number / 256, number % 256),
        };
        let peers = json!([{"ipBlock": {"cidr": cidr}}]);
        json!({
            "kind": "NetworkPolicy",
            "metadata": {"name": format!("p{number:05}"), "namespace": "lab"},
            "spec": {
                "podSelector": {},
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [{"from": peers}],
                "egress": [{"to": peers}],
            },
        })
    };
    (0..count).map(policy).collect()
}

fn apply(node: &Node, objects: &[Value]) -> anyhow::Result<()> {
    let file = node.run_dir().join("objects.json");
    fs::write(&file, json!({"kind": "List", "items": objects}).to_string())?;
    let output = node.weft(&["policy", "apply", "--only", "-f", &file.to_string_lossy()])?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "weft policy apply on {}: {}", node.name(), stderr.trim());
    Ok(())
}

fn gigabits(from: &Pod, to: &Pod, time: Duration) -> anyhow::Result<f64> {
    let address = to.address().context("the pod is attached")?;
    let way = generator::Way { from: from.netns(), to: to.netns(), address };
    Ok(generator::tcp(way, 1, time / 8, time)?.gigabits_per_second())
}
