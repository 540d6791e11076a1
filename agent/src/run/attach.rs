//! What the CNI service needs of allocator and links.

use super::steering::Steered;
use crate::{
    cni::{AddressError, Addresses, Allocation, Port, PortError, Ports, Veth, Wish},
    ipam::{self, IpamError, Owner, task::Handle as Ipam},
    links::{self, LinksError, PodPort},
    policy,
    types::{AttachmentKey, PodRef},
};
use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};
use tokio::{sync::watch, time::timeout};

#[derive(Clone, Debug)]
pub struct IpamAddresses {
    pub ipam: Ipam,
    /// Take in pods' labels; none: policies are not enforced.
    pub policies: Option<super::policy::Policies>,
}

impl Addresses for IpamAddresses {
    async fn reserve(&self, wish: Wish) -> Result<Allocation, AddressError> {
        let Wish { attachment, pod, addresses, ranges, mac, labels } = wish;
        if let (Some(policies), false) = (&self.policies, labels.is_empty()) {
            let labelled = policies.label(&attachment, &pod, &labels).await;
            labelled.map_err(|error| AddressError::Store(format!("the pod's labels: {error:#}")))?;
        }
        let request = ipam::Request { key: attachment, pod, wanted: addresses, ranges, mac: Some(mac) };
        let allocation = self.ipam.reserve(request).await?;
        Ok(of_pod(&allocation).expect("what is reserved for a pod is a pod's"))
    }

    async fn activated(&self, key: &AttachmentKey) -> Result<bool, AddressError> {
        Ok(self.ipam.activated(key.clone()).await?)
    }

    async fn release(&self, key: &AttachmentKey) -> Result<(), AddressError> {
        self.ipam.release(key.clone()).await?;
        if let Some(policies) = &self.policies {
            let forgotten = policies.forget_labels(key).await;
            forgotten.map_err(|error| AddressError::Store(format!("the pod's labels: {error:#}")))?;
        }
        Ok(())
    }

    async fn allocations(&self) -> Result<Vec<Allocation>, AddressError> {
        let view = self.ipam.view().borrow().clone();
        Ok(view.allocations.values().filter_map(of_pod).collect())
    }
}

fn of_pod(allocation: &Arc<ipam::Allocation>) -> Option<Allocation> {
    let Owner::Pod(attachment) = &allocation.owner else { return None };
    Some(Allocation {
        attachment: attachment.clone(),
        pod: allocation.pod.clone(),
        addresses: vec![allocation.address],
        mac: allocation.mac,
        reserved: UNIX_EPOCH + Duration::from_millis(allocation.reserved_at),
    })
}

impl From<IpamError> for AddressError {
    fn from(error: IpamError) -> Self {
        let text = error.to_string();
        match error {
            IpamError::NotReady(_) | IpamError::PodsLeft(_) | IpamError::Left | IpamError::Stopped => {
                Self::NotReady(text)
            }
            IpamError::Full { .. } => Self::Full(text),
            IpamError::NotOurs { .. }
            | IpamError::InUse { .. }
            | IpamError::HasAnother { .. }
            | IpamError::OutOfRanges { .. } => Self::Taken(text),
            IpamError::OutsideUniverse { .. }
            | IpamError::Reserved { .. }
            | IpamError::TooManyWanted(_)
            | IpamError::Contradiction { .. } => Self::Refused(format!("ips: {text}")),
            IpamError::Store(_) => Self::Store(text),
        }
    }
}

#[derive(Clone, Debug)]
pub struct LinksPorts {
    pub links: links::Handle,
    pub steered: watch::Receiver<Arc<Steered>>,
    /// None: policies are not enforced.
    pub policies: Option<watch::Receiver<Arc<policy::Status>>>,
}

impl LinksPorts {
    async fn policies_in_force(&self, pod: PodRef, addresses: &[IpAddr]) -> Result<(), PortError> {
        let Some(mut policies) = self.policies.clone() else { return Ok(()) };
        let in_force = |status: &Arc<policy::Status>| {
            addresses.iter().all(|address| status.pods.get(address) == Some(&pod))
        };
        match timeout(POLICIES_IN_FORCE, policies.wait_for(in_force)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(_)) => return Err(PortError::Policy("network policies are enforced no more".into())),
            Err(_) => {}
        }
        let why = policies.borrow().error.clone();
        let why = why.unwrap_or_else(|| {
            "the API server has not said yet what the pod and its policies are like".into()
        });
        let after = POLICIES_IN_FORCE.as_secs();
        Err(PortError::Policy(format!(
            "the network policies of {pod} are not in force after {after} s: {why}"
        )))
    }
}

impl Ports for LinksPorts {
    async fn attach(&self, port: Port) -> Result<(), PortError> {
        let Port { attachment, pod, host_interface, addresses, mac } = port;
        // Before the port is open: there is no packet that its policies have not seen.
        self.policies_in_force(super::policy::whole(&pod, attachment.container_id()), &addresses).await?;
        let pod = PodPort { host_interface, addresses: addresses.iter().copied().collect(), mac };
        self.links.attach(pod).await?;
        let mut steered = self.steered.clone();
        let known =
            steered.wait_for(|steered| addresses.iter().all(|address| steered.local.contains(address)));
        match timeout(IN_FORCE, known).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(PortError::NotReady("the data path does not take packets for the pod yet".into())),
        }
    }

    async fn detach(&self, key: &AttachmentKey) -> Result<(), PortError> {
        Ok(self.links.detach(&key.host_interface()).await?)
    }

    async fn veths(&self) -> Result<Vec<Veth>, PortError> {
        let veth = |veth: links::Veth| Veth {
            alias: veth.alias,
            host_interface: veth.host_interface,
            up: veth.up,
            on_bridge: veth.on_bridge,
            routes: veth.routes,
        };
        Ok(self.links.veths().await?.into_iter().map(veth).collect())
    }
}

impl From<LinksError> for PortError {
    fn from(error: LinksError) -> Self {
        let text = error.to_string();
        match error {
            LinksError::NoVeth(_) => Self::Missing(text),
            LinksError::Failed(_) => Self::Kernel(text),
            LinksError::Stopped => Self::NotReady(text),
        }
    }
}

/// How long the forwarding table may take to follow an allocation; it takes far less than a millisecond.
const IN_FORCE: Duration = Duration::from_secs(5);
/// How long a pod may wait for its policies; the runtime tries again.
const POLICIES_IN_FORCE: Duration = Duration::from_secs(10);
