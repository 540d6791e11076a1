use super::{deadline, open_netns};
use crate::{
    agent::Agent,
    config::Config,
    env::{Call, Command},
    failure::{Failure, code},
    pod::Pod,
};

/// The agent looks at its side, then we look into the pod.
///
/// # Errors
/// Code 103, with every difference in its details.
pub async fn run(call: Call, config: Config) -> Result<(), Failure> {
    let key = call.attachment.expect("CHECK needs an attachment");
    let netns = open_netns(&call.netns.expect("CHECK needs a namespace"))?;
    let prev_result = config.prev_result.expect("CHECK needs a prevResult");
    let mismatch = |details: String| {
        let msg = format!("{key} is not as it was set up");
        Err(Failure::new(code::CHECK_MISMATCH, msg).with_details(details))
    };
    let Some((place, _)) = prev_result.of_pod(key.ifname()) else {
        return mismatch(format!("prevResult has no interface {} of a pod", key.ifname()));
    };
    let mut agent = Agent::connect(&config.socket, deadline(Command::Check)).await?;
    let mut reservation = agent.check(&key, &prev_result.addresses(place)).await?;
    reservation.mtu = config.mtu.unwrap_or(reservation.mtu);
    let differences = Pod::open(&netns, &key)?.differences(&reservation, &prev_result).await?;
    if differences.is_empty() { Ok(()) } else { mismatch(differences.join("; ")) }
}
