use super::{deadline, open_netns};
use crate::{
    agent::{Agent, Reservation, attachment},
    config::Config,
    env::{Call, Command},
    failure::{Failure, code},
    pod::Pod,
    result, tombstone,
    version::Version,
};
use serde_json::Value;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};
use weft::types::AttachmentKey;
use weft_proto::local;

/// Reserve, make the veth, set the pod's side up, activate, print.
///
/// # Errors
/// Whatever fails, everything that was done is undone.
pub async fn run(version: Version, call: Call, config: Config) -> Result<Value, Failure> {
    let key = call.attachment.expect("ADD needs an attachment");
    let path = call.netns.expect("ADD needs a namespace");
    let netns = open_netns(&path)?;
    let until = Instant::now() + deadline(Command::Add);
    let pod = Pod::open(&netns, &key)?;
    pod.refuse_existing().await?;
    let mut agent = Agent::connect(&config.socket, deadline(Command::Add)).await?;
    let mut undo = Undo { key: &key, config: &config, pod: &pod, refused: false, made: None };
    let request = local::ReserveRequest {
        attachment: Some(attachment(&key)),
        pod: Some(local::Pod {
            uid: call.args.pod.uid,
            namespace: call.args.pod.namespace,
            name: call.args.pod.name,
        }),
        addresses: config.wish.addresses.iter().map(ToString::to_string).collect(),
        ranges: config.wish.ranges.iter().map(ToString::to_string).collect(),
        mac: config.wish.mac.map(|mac| mac.to_string()).unwrap_or_default(),
        labels: config.wish.labels.clone().into_iter().collect(),
    };
    let work = async {
        let reserved = agent.reserve(request).await;
        undo.refused = matches!(&reserved, Err(failure) if failure.code != code::AGENT_UNREACHABLE);
        let mut reservation = reserved?;
        restrict_mtu(&mut reservation, config.mtu)?;
        pod.create(&reservation).await?;
        undo.made = Some(reservation.clone());
        pod.configure(&reservation).await?;
        agent.activate(&key).await?;
        pod.wait_running().await?;
        Ok(reservation)
    };
    let late = |_| Err(Failure::new(code::AGENT_UNREACHABLE, "ADD did not end within 20 s"));
    match timeout_at(until, work).await.unwrap_or_else(late) {
        Ok(reservation) => Ok(result::added(version, &reservation, key.ifname(), &path)),
        // Somebody else's ADD made the interface: the reservation is theirs as well.
        Err(failure) if failure.code == code::INTERFACE_EXISTS => Err(failure),
        Err(failure) => Err(undo.run(failure).await),
    }
}

/// What an ADD that fails has to take back.
struct Undo<'a> {
    key: &'a AttachmentKey,
    config: &'a Config,
    pod: &'a Pod<'a>,
    /// The agent reserved nothing, so there is nothing to release: the key may have an older attachment that lives.
    refused: bool,
    /// The veth exists.
    made: Option<Reservation>,
}

impl Undo<'_> {
    /// Returns the failure, with what could not be taken back in its details.
    async fn run(self, mut failure: Failure) -> Failure {
        if self.refused {
            return failure;
        }
        let mut left = Vec::new();
        if let Some(reservation) = &self.made
            && let Err(error) = self.pod.remove(reservation).await
        {
            left.push(format!("interface {}: {error}", reservation.host_interface));
        }
        let released = async { Agent::connect(&self.config.socket, UNDO).await?.release(self.key).await };
        if released.await.is_err()
            && let Err(error) = tombstone::leave(&self.config.run_dir, self.key)
        {
            left.push(format!("reservation (times out by itself): tombstone: {error}"));
        }
        if !left.is_empty() {
            failure.details =
                [failure.details, format!("not undone: {}", left.join("; "))].join(" ").trim().into();
        }
        failure
    }
}

fn restrict_mtu(reservation: &mut Reservation, wanted: Option<u32>) -> Result<(), Failure> {
    let Some(wanted) = wanted else { return Ok(()) };
    let least = if reservation.addresses.iter().any(|(_, gateway)| gateway.is_ipv6()) { 1280 } else { 68 };
    if !(least..=reservation.mtu).contains(&wanted) {
        let msg = format!("mtu {wanted} is not between {least} and {}, the network's", reservation.mtu);
        return Err(Failure::new(code::INVALID_CONFIG, msg));
    }
    reservation.mtu = wanted;
    Ok(())
}

/// Beyond ADD's own deadline, well before a runtime's.
const UNDO: Duration = Duration::from_secs(3);
