use super::deadline;
use crate::{
    agent::Agent,
    config::Config,
    env::{Call, Command},
    failure::Failure,
    pod, tombstone,
};

/// The agent takes everything away, or, where it can't, we take the interface and leave a tombstone. The pod's
/// namespace is not needed: the host's end takes the pod's with it.
///
/// # Errors
/// Only if the interface can't be removed: a DEL that fails keeps its pod for ever.
pub async fn run(call: Call, config: Config) -> Result<(), Failure> {
    let key = call.attachment.expect("DEL needs an attachment");
    let released =
        async { Agent::connect(&config.socket, deadline(Command::Del)).await?.release(&key).await };
    if let Err(failure) = released.await {
        eprintln!("weft-cni: DEL {key}: {failure}; its interface is removed, the rest is left to the agent");
        pod::remove_host_end(&key).await?;
        if let Err(error) = tombstone::leave(&config.run_dir, &key) {
            // The agent frees what has no interface after a while.
            eprintln!("weft-cni: DEL {key}: leave a tombstone in {}: {error}", config.run_dir.display());
        }
    }
    Ok(())
}
