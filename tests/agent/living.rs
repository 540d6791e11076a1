//! Pods as a runtime has them: every container has an id of its own, and no two that live have one address.
use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, bail, ensure};
use ipnet::IpNet;
use weft_lab::{cni::Answer, pod::Pod};

/// Who lives where, over all nodes.
#[derive(Default)]
pub struct Living(Mutex<BTreeMap<IpAddr, String>>);

/// A container in a pod's namespace: the namespace serves many of them, one after another.
pub struct Container<'a> {
    pub pod: &'a Pod,
    pub id: String,
}

impl Living {
    /// From the moment when ADD has succeeded.
    ///
    /// # Errors
    /// The address is another's.
    pub fn begins(&self, address: IpAddr, id: &str) -> anyhow::Result<()> {
        let mut living = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match living.insert(address, id.into()) {
            Some(other) => bail!("{address} was given to {id}, but {other} lives there"),
            None => Ok(()),
        }
    }

    /// Right before DEL is called.
    pub fn ends(&self, address: IpAddr) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
    }
}

impl Container<'_> {
    /// CNI ADD, whatever comes of it.
    pub fn add(&self) -> anyhow::Result<Answer> {
        self.call("ADD")
    }

    /// CNI DEL, which never fails.
    pub fn del(&self) -> anyhow::Result<()> {
        self.call("DEL")?.check(&format!("DEL of {}", self.id))
    }

    fn call(&self, verb: &str) -> anyhow::Result<Answer> {
        let mut call = self.pod.call(verb);
        call.container_id = Some(self.id.clone());
        let id = &self.id;
        call.args = Some(format!("K8S_POD_NAMESPACE=lab;K8S_POD_NAME={id};K8S_POD_UID=uid-{id}"));
        call.run(self.pod.node())
    }
}

/// The address that an ADD brought.
pub fn address(answer: &Answer) -> anyhow::Result<IpAddr> {
    let result = answer.json()?;
    let address = result["ips"][0]["address"].as_str().and_then(|text| text.parse::<IpNet>().ok());
    Ok(address.with_context(|| format!("no address in {result}"))?.addr())
}

/// CNI's code of a call that failed.
///
/// # Errors
/// It is not a CNI error with a message.
pub fn code(answer: &Answer) -> anyhow::Result<u64> {
    let error = answer.json()?;
    let code = error["code"].as_u64().with_context(|| format!("no code in {error}"))?;
    ensure!(error["msg"].as_str().is_some_and(|msg| msg.len() > 10), "no message in {error}");
    Ok(code)
}
