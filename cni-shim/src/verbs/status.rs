use super::deadline;
use crate::{
    agent::Agent,
    config::Config,
    env::Command,
    failure::{Failure, code},
};

/// Whether ADD would work, in the agent's own words.
///
/// # Errors
/// Code 50 or 51; an agent that does not answer can't ADD either.
pub async fn run(config: Config) -> Result<(), Failure> {
    let ready = async { Agent::connect(&config.socket, deadline(Command::Status)).await?.ready().await };
    ready.await.map_err(|failure| match failure.code {
        code::AGENT_UNREACHABLE => Failure { code: code::CANNOT_ADD, ..failure },
        _ => failure,
    })
}
