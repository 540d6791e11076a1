//! `weft forget`: declares nodes dead.

use super::{Client, print};
use crate::{
    config::{DEFAULT_RUN_DIR, socket_in},
    identity::{self, Source},
    ipam::death,
};
use anyhow::{Context, bail};
use prost::Message;
use std::path::PathBuf;
use weft_proto::local::{ForgetReply, ForgetRequest, Statement};

/// Which nodes, and who says so
#[derive(Debug, clap::Args)]
pub struct ForgetArgs {
    /// Nodes that will not come back; this node takes their addresses over
    #[arg(value_name = "NODE", required = true)]
    peers: Vec<String>,
    /// Though other nodes still hear them, or cannot be asked: if they live, addresses may be in use twice for a while
    #[arg(long)]
    force: bool,
    /// Run directory of the agent to ask
    #[arg(long, env = "WEFT_RUN_DIR", hide_env_values = true, value_name = "DIR", default_value = DEFAULT_RUN_DIR)]
    run_dir: PathBuf,
    /// Directory of the CA, where the agent does not have it itself
    #[arg(long, value_name = "DIR", conflicts_with = "tls_cert")]
    ca_dir: Option<PathBuf>,
    /// File of the CAs that are believed
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_ca: Option<PathBuf>,
    /// File of an operator's certificate, which `weft ca issue weft-operator` makes
    #[arg(long, value_name = "FILE", requires = "tls_key", requires = "tls_ca")]
    tls_cert: Option<PathBuf>,
    /// File of that certificate's private key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

/// Has this node's agent take over what the dead have.
pub async fn forget(args: ForgetArgs) -> anyhow::Result<()> {
    let source = match (args.ca_dir, args.tls_ca, args.tls_cert, args.tls_key) {
        (Some(dir), ..) => Some(Source::CaDir(dir)),
        (_, Some(ca), Some(cert), Some(key)) => Some(Source::Files { ca, cert, key, retired: None }),
        _ => None,
    };
    let operator = source.map(identity::operator).transpose()?;
    let mut agent = Client::connect(&socket_in(&args.run_dir)).await?;
    let request = ForgetRequest { peers: args.peers.clone(), force: args.force, ..ForgetRequest::default() };
    let sealed = match operator {
        None => Vec::new(),
        Some(operator) => {
            let prepared = agent.forget(ForgetRequest { prepare: true, ..request.clone() }).await?;
            let seal = |Statement { body, .. }| {
                let seal = operator.seal(death::SEALED, &body).encode_to_vec();
                Statement { body, seal }
            };
            prepared.statements.into_iter().map(seal).collect()
        }
    };
    let ForgetReply { taken, waiting_for, .. } = agent.forget(ForgetRequest { sealed, ..request }).await?;
    if !waiting_for.is_empty() {
        bail!(
            "{} forgotten, but their addresses can only be taken over once these have agreed: {}; name those that are dead too, \
             and say it again where that takes longer: somebody may have been forgotten elsewhere meanwhile",
            args.peers.join(", "),
            waiting_for.join(", ")
        );
    }
    let taken = if taken.is_empty() { "nothing was left to take over".into() } else { taken.join(", ") };
    print(&format!("{} forgotten; this node now has {taken}\n", args.peers.join(", "))).context("tell")
}
