use super::deadline;
use crate::{agent::Agent, config::Config, env::Command, failure::Failure};

/// Has the agent take away what the runtime doesn't know. A runtime that does not say what it knows gets nothing done.
pub async fn run(config: Config) -> Result<(), Failure> {
    let Some(valid) = config.valid else { return Ok(()) };
    Agent::connect(&config.socket, deadline(Command::Gc)).await?.gc(valid).await
}
