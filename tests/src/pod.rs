//! A pod: a network namespace that the real shim attaches to its node.
use std::{
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context;
use ipnet::IpNet;
use serde_json::Value;

use crate::{
    cni::{self, Call},
    namespace::Netns,
    node::Node,
    traffic,
};

pub struct Pod {
    name: String,
    container_id: String,
    uid: String,
    node: Arc<Node>,
    netns: Netns,
    attached: Mutex<Option<Attached>>,
}

/// What ADD brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The first of the addresses.
    pub address: IpAddr,
    /// CNI's result, as printed.
    pub result: Value,
    /// From the shim's start to its end.
    pub took: Duration,
}

impl Pod {
    /// Makes the pod's namespace; [`Pod::attach`] makes it a part of the overlay.
    pub fn create(node: &Arc<Node>, name: &str) -> anyhow::Result<Self> {
        let full = format!("{}-{name}", node.name());
        let netns = Netns::create(node.netns().sandbox(), &full)?;
        // Fresh for each pod, as a runtime's ids are: a namespace's number is not used twice while it lives.
        let inode = netns.inode()?;
        let container_id = format!("{full}-{inode:x}");
        let uid = format!("00000000-0000-4000-8000-{inode:012x}");
        Ok(Self {
            name: name.into(),
            container_id,
            uid,
            node: Arc::clone(node),
            netns,
            attached: Mutex::new(None),
        })
    }

    /// `NODE/POD`, as the command line has it.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.node.name(), self.name)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn container_id(&self) -> &str {
        &self.container_id
    }

    pub fn uid(&self) -> &str {
        &self.uid
    }

    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The pod's address.
    ///
    /// # Errors
    /// When it is not attached.
    pub fn address(&self) -> anyhow::Result<IpAddr> {
        let attached = self.attached();
        attached
            .as_ref()
            .map(|it| it.address)
            .with_context(|| format!("pod {} has no address", self.full_name()))
    }

    /// A call of the shim for this pod, to change before it is run.
    pub fn call(&self, command: &str) -> Call {
        let mut call = Call::new(command, &self.container_id, self.netns.path(), &cni::config(&self.node));
        call.args = Some(format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=lab;K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            self.netns.name(),
            self.container_id,
            self.uid
        ));
        call
    }

    /// CNI ADD.
    pub fn attach(&self) -> anyhow::Result<Attached> {
        let answer = self.call("ADD").run(&self.node)?;
        answer.check(&format!("ADD of {}", self.full_name()))?;
        let result = answer.json()?;
        let address: IpNet = result["ips"][0]["address"]
            .as_str()
            .and_then(|text| text.parse().ok())
            .with_context(|| format!("ADD's result has no address: {result}"))?;
        let attached = Attached { address: address.addr(), result, took: answer.took };
        *self.attached() = Some(attached.clone());
        Ok(attached)
    }

    /// CNI DEL; returns how long it took.
    pub fn detach(&self) -> anyhow::Result<Duration> {
        let mut call = self.call("DEL");
        if let Some(attached) = &*self.attached() {
            let mut config = cni::config(&self.node);
            config["prevResult"] = attached.result.clone();
            call.stdin = config.to_string().into_bytes();
        }
        let answer = call.run(&self.node)?;
        answer.check(&format!("DEL of {}", self.full_name()))?;
        *self.attached() = None;
        Ok(answer.took)
    }

    /// One ICMP echo to the address.
    pub fn ping(&self, to: IpAddr, within: Duration) -> anyhow::Result<Duration> {
        traffic::ping(&self.netns, to, within)
    }

    fn attached(&self) -> MutexGuard<'_, Option<Attached>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
