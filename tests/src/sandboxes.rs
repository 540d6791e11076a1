//! `cargo lab sandboxes`: how long `RunPodSandbox` of a real containerd takes with Weft and with the reference `bridge` plugin,
//! in pairs, one after the other, the same plugins chained behind both.
use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::{
    Lab,
    pairs::{self, Ratio},
    runtime::{Containerd, Version},
    wait,
};

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Pairs to measure, at least 15
    #[arg(long, default_value = "30", value_parser = clap::value_parser!(u32).range(15..))]
    pairs: u32,
    /// containerd 1.6 instead of 2.x
    #[arg(long)]
    old: bool,
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    let version = if options.old { Version::V1 } else { Version::V2 };
    let lab = Lab::builder().nodes(2).without_agents().start()?;
    let nodes = lab.nodes();
    let [ours, theirs] = &nodes[..] else { unreachable!("two nodes were asked for") };
    let (weft, bridge) =
        (Containerd::start(ours, lab.claim(), version)?, Containerd::start(theirs, lab.claim(), version)?);
    let directory = weft.conf_dir().to_string_lossy().into_owned();
    ours.configure(|settings| {
        settings.more.extend(["--cni-conf-dir".into(), directory]);
        (settings.seed, settings.peers) = (Some(settings.name.clone()), Vec::new());
    });
    ours.start_agent()?;
    ours.wait_ready(PATIENCE)?;
    fs::write(bridge.conf_dir().join(".tmp"), reference(&weft)?.to_string())?;
    fs::rename(bridge.conf_dir().join(".tmp"), bridge.conf_dir().join("10-bridge.conflist"))?;
    for runtime in [&weft, &bridge] {
        runtime.wait_network(PATIENCE)?;
        timed(runtime, "warm-up")?;
    }
    let mut numbers = 0..;
    let pairs = pairs::in_turn(options.pairs as usize, |ours| {
        let name = format!("p{}", numbers.next().expect("numbers do not end"));
        timed(if ours { &weft } else { &bridge }, &name)
    })?;
    drop((weft, bridge));
    report(&pairs);
    lab.finish()
}

/// The reference's chain with what the conflist of ours chains.
fn reference(weft: &Containerd) -> anyhow::Result<Value> {
    let file = weft.conf_dir().join("10-weft.conflist");
    let text = wait::until("the conflist is there", PATIENCE, || Ok(fs::read_to_string(&file)?))?;
    let mut list: Value = serde_json::from_str(&text)?;
    let plugins = list["plugins"].as_array_mut().context("a conflist has plugins")?;
    ensure!(!plugins.is_empty(), "the conflist names no plugin");
    plugins[0] = json!({
        "type": "bridge", "bridge": "ref0", "isGateway": true, "isDefaultGateway": true, "ipMasq": false,
        "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.40.0.0/16" }]],
            "dataDir": weft.conf_dir().with_file_name("host-local") },
    });
    list["name"] = "reference".into();
    Ok(list)
}

fn timed(runtime: &Containerd, name: &str) -> anyhow::Result<Duration> {
    let config = runtime.pod(name);
    let start = Instant::now();
    let id = runtime.client().run_pod_sandbox(&config)?;
    let took = start.elapsed();
    runtime.remove(&id)?;
    Ok(took)
}

fn report(pairs: &[(Duration, Duration)]) {
    let median = |mut times: Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    println!("weft, median       {:.1?}", median(pairs.iter().map(|pair| pair.0).collect()));
    println!("bridge, median     {:.1?}", median(pairs.iter().map(|pair| pair.1).collect()));
    let seconds: Vec<_> = pairs.iter().map(|(a, b)| (a.as_secs_f64(), b.as_secs_f64())).collect();
    println!("{}", Ratio::of(&seconds));
}

const PATIENCE: Duration = Duration::from_secs(20);
