//! Weft's own agents.
use std::time::Duration;

use super::{
    Path,
    ground::{Ground, Side},
};
use crate::node::Node;

/// Starts the agents of the two nodes, with more flags for both, and has the shim attach the pods.
pub fn set_up(ground: &Ground<'_>, path: Path, more: &[String]) -> anyhow::Result<()> {
    ground.join_nodes()?;
    let seed = ground.nodes.map(Node::name).join(",");
    for side in Side::BOTH {
        ground.node(side).configure(|settings| {
            settings.advertise = side.underlay().to_string();
            settings.peers = vec![side.other().underlay().to_string()];
            settings.seed = Some(seed.clone());
            settings.verbosity = "warn".into();
            settings.more.extend(flags(path).iter().map(ToString::to_string).chain(more.iter().cloned()));
        });
    }
    ground.nodes.iter().try_for_each(|node| node.start_agent())?;
    ground.nodes.iter().try_for_each(|node| node.wait_ready(READY_WITHIN))?;
    ground.pods.iter().try_for_each(|pod| pod.attach().map(drop))
}

/// What sets Weft's paths apart.
fn flags(path: Path) -> &'static [&'static str] {
    match path {
        Path::WeftClear => &["--encryption", "off"],
        Path::WeftSealed => &[],
        _ => unreachable!("{} is not Weft", path.name()),
    }
}

/// From the agents' start until ADD would work, with a wide margin.
const READY_WITHIN: Duration = Duration::from_secs(20);
