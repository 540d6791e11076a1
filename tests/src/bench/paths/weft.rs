//! Weft's own agents.
use std::time::Duration;

use super::{Path, Side};
use crate::node::Node;

/// Starts the agents of the two nodes, with more flags for both, and waits until pods can be attached.
pub fn start(nodes: [&Node; 2], path: Path, more: &[String]) -> anyhow::Result<()> {
    let seed = nodes.map(Node::name).join(",");
    for (side, node) in Side::BOTH.into_iter().zip(nodes) {
        node.configure(|settings| {
            settings.advertise = side.underlay().to_string();
            settings.peers = vec![side.other().underlay().to_string()];
            settings.seed = Some(seed.clone());
            settings.verbosity = "warn".into();
            settings.more.extend(flags(path).iter().map(ToString::to_string).chain(more.iter().cloned()));
        });
    }
    nodes.iter().try_for_each(|node| node.start_agent())?;
    nodes.iter().try_for_each(|node| node.wait_ready(READY_WITHIN))
}

/// What sets Weft's paths apart.
fn flags(path: Path) -> &'static [&'static str] {
    match path {
        Path::WeftClear => &[],
        _ => unreachable!("{} is not Weft", path.name()),
    }
}

/// From the agents' start until ADD would work, with a wide margin.
const READY_WITHIN: Duration = Duration::from_secs(20);
