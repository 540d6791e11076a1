//! Weft's own agents.
use std::time::Duration;

use super::{Path, Side};
use crate::{agent::Settings, node::Node};

/// Starts the agents of the two nodes and waits until pods can be attached.
pub fn start(nodes: [&Node; 2], path: Path) -> anyhow::Result<()> {
    let seed = nodes.map(Node::name).join(",");
    for (side, node) in Side::BOTH.into_iter().zip(nodes) {
        node.configure(|settings| {
            settings.advertise = side.underlay().to_string();
            settings.peers = vec![side.other().underlay().to_string()];
            settings.seed = Some(seed.clone());
            choose(path, settings);
        });
    }
    nodes.iter().try_for_each(|node| node.start_agent())?;
    nodes.iter().try_for_each(|node| node.wait_ready(READY_WITHIN))
}

/// What sets Weft's paths apart.
fn choose(path: Path, settings: &mut Settings) {
    debug_assert_eq!(path, Path::WeftClear);
    settings.verbosity = "warn".into();
}

/// From the agents' start until ADD would work, with a wide margin.
const READY_WITHIN: Duration = Duration::from_secs(20);
