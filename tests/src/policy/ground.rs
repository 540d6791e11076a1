//! What a lab has to be like for cases to be played in it: a universe around their pods, and around nobody else.
use super::cases::{Case, Cluster};
use crate::underlay::Networks;
use anyhow::Context;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};
use weft::policy::model::Service;

/// One lab, and the cases that are played there.
#[derive(Clone, Debug)]
pub struct Ground<'a> {
    pub cases: Vec<&'a Case>,
    pub universe: IpNet,
    /// The addresses of all pods, whenever they live; of one family.
    pub pods: BTreeSet<IpAddr>,
    pub externals: BTreeSet<IpAddr>,
    pub ports: BTreeSet<u16>,
}

impl<'a> Ground<'a> {
    /// Plays all cases, in as few labs as do; each case has one for each family of its pods.
    ///
    /// # Errors
    /// A case's pods are too far from each other.
    pub fn plan(cases: &'a [Case]) -> anyhow::Result<Vec<Self>> {
        let mut grounds: Vec<Self> = Vec::new();
        for (case, v4) in cases.iter().flat_map(|case| [(case, true), (case, false)]) {
            let Some(own) = Self::of(case, v4).with_context(|| format!("case {}", case.id))? else {
                continue;
            };
            match grounds.iter_mut().find_map(|ground| ground.with(&own).map(|both| (ground, both))) {
                Some((ground, both)) => *ground = both,
                None => grounds.push(own),
            }
        }
        Ok(grounds)
    }

    /// None where the case has no pod of that family.
    fn of(case: &'a Case, v4: bool) -> anyhow::Result<Option<Self>> {
        let mut cluster = Cluster::of(case.model.as_ref().context("there is no model")?);
        let of_family = |(_, address): (&str, IpAddr)| (address.is_ipv4() == v4).then_some(address);
        let mut pods: BTreeSet<_> = cluster.pods().filter_map(of_family).collect();
        let mut externals: BTreeSet<_> = cluster.externals().filter_map(of_family).collect();
        let mut ports = BTreeSet::new();
        for step in &case.steps {
            for action in &step.actions {
                cluster.act(action)?;
                pods.extend(cluster.pods().filter_map(of_family));
            }
            ports.extend(cluster.cells(step)?.iter().filter_map(|cell| match cell.service {
                Service::Port(_, port) => Some(port),
                Service::Other => None,
            }));
        }
        if pods.is_empty() {
            return Ok(None);
        }
        let nobody = BTreeSet::new();
        let universe = universe(&pods, &externals).or_else(|| universe(&pods, &nobody));
        let universe = universe.context("its pods are too far from each other for one universe")?;
        externals.retain(|address| !universe.contains(address));
        Ok(Some(Self { cases: vec![case], universe, pods, externals, ports }))
    }

    /// None where both do not fit into one lab.
    fn with(&self, other: &Self) -> Option<Self> {
        let joined = |a: &BTreeSet<IpAddr>, b: &BTreeSet<IpAddr>| a.union(b).copied().collect();
        let (pods, externals) = (joined(&self.pods, &other.pods), joined(&self.externals, &other.externals));
        Some(Self {
            cases: self.cases.iter().chain(&other.cases).copied().collect(),
            universe: universe(&pods, &externals)?,
            pods,
            externals,
            ports: self.ports.union(&other.ports).copied().collect(),
        })
    }

    /// Equal parts of the universe, as the nodes that share it have them.
    pub fn shares(&self) -> Vec<IpNet> {
        let shares = self.universe.subnets(self.universe.prefix_len() + SHARES.ilog2() as u8);
        shares.expect("a universe is large enough for that").collect()
    }

    /// An address of a share that no pod wants.
    pub fn spare(&self, share: &IpNet) -> anyhow::Result<IpAddr> {
        let below = |back: u32| match share.broadcast() {
            IpAddr::V4(last) => IpAddr::V4(Ipv4Addr::from_bits(last.to_bits() - back)),
            IpAddr::V6(last) => IpAddr::V6(Ipv6Addr::from_bits(last.to_bits() - u128::from(back))),
        };
        let mut inside = (1..).map(below).take_while(|address| share.contains(address));
        inside.find(|it| !self.pods.contains(it)).with_context(|| format!("pods have all of {share}"))
    }

    /// An underlay that has none of these addresses.
    pub fn networks(&self) -> anyhow::Result<Networks> {
        let free = |network: IpNet| {
            let apart = !self.universe.contains(&network) && !network.contains(&self.universe);
            apart && !self.externals.iter().any(|address| network.contains(address))
        };
        let all = |it: &Networks| {
            [it.wire.into(), it.beyond.into(), it.wire6.into(), it.beyond6.into()].into_iter().all(free)
        };
        let others = (0..16).map(|number| {
            // RFC 2544: for benchmarks; RFC 4193: unique local.
            let v4 = |last| Ipv4Net::new_assert(Ipv4Addr::new(198, 18, number, last), 24);
            let v6 =
                |last| Ipv6Net::new_assert(Ipv6Addr::new(0xfd57, number.into(), 0, last, 0, 0, 0, 0), 64);
            let next =
                |net: Ipv4Net| Ipv4Net::new_assert(Ipv4Addr::from_bits(net.addr().to_bits() + (16 << 8)), 24);
            Networks { wire: v4(0), beyond: next(v4(0)), wire6: v6(0), beyond6: v6(1) }
        });
        [Networks::default()].into_iter().chain(others).find(all).context("no network is free for the nodes")
    }
}

/// The smallest range with room for all shares that holds these pods and no external; a smaller one where that one
/// does hold one.
fn universe(pods: &BTreeSet<IpAddr>, externals: &BTreeSet<IpAddr>) -> Option<IpNet> {
    let (first, last) = (pods.first()?, pods.last()?);
    let (roomy, tight) = if first.is_ipv4() { (21, 26) } else { (64, 122) };
    let around = |length| IpNet::new(*first, length).expect("it is a length").trunc();
    let mut ranges = (8..=roomy).rev().chain(roomy + 1..=tight).map(around);
    ranges.find(|range| range.contains(last) && !externals.iter().any(|address| range.contains(address)))
}

/// Nodes that share the universe; of those that have no pod none is started, but where one would be alone.
pub const SHARES: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{from_value, json};

    fn case(pods: &[&str], externals: &[&str]) -> Case {
        let pods: serde_json::Map<_, _> =
            pods.iter().map(|ip| (format!("x/{ip}"), json!({"ip": ip}))).collect();
        let externals: serde_json::Map<_, _> =
            externals.iter().map(|ip| (ip.to_string(), json!(ip))).collect();
        from_value(json!({"id": "it", "model": {"pods": pods, "externals": externals}, "steps": []})).unwrap()
    }

    fn universes(cases: &[Case]) -> Vec<String> {
        Ground::plan(cases).unwrap().iter().map(|ground| ground.universe.to_string()).collect()
    }

    #[test]
    fn a_universe_holds_the_pods_and_no_external() {
        assert_eq!(universes(&[case(&["10.0.1.1", "10.0.3.1"], &["203.0.113.1"])]), ["10.0.0.0/21"]);
        assert_eq!(universes(&[case(&["10.0.1.1", "10.0.1.9"], &["10.0.4.1"])]), ["10.0.0.0/22"]);
        assert_eq!(universes(&[case(&["10.0.1.1", "fd00::1"], &[])]), ["10.0.0.0/21", "fd00::/64"]);
        let between = [case(&["10.0.1.1", "10.0.1.9"], &["10.0.1.5"])];
        assert!(Ground::plan(&between).unwrap()[0].externals.is_empty());
        assert!(Ground::plan(&[case(&["10.0.1.1", "192.168.0.1"], &[])]).is_err());
    }

    #[test]
    fn cases_are_played_together_where_nobody_stands_between() {
        let (one, two) = (case(&["10.0.1.1"], &["192.0.2.1"]), case(&["10.0.9.1"], &[]));
        assert_eq!(universes(&[one.clone(), two.clone()]), ["10.0.0.0/20"]);
        let between = case(&["10.0.1.1"], &["10.0.5.1"]);
        assert_eq!(universes(&[between, two]), ["10.0.0.0/22", "10.0.8.0/21"]);
        let ground = &Ground::plan(std::slice::from_ref(&one)).unwrap()[0];
        assert_eq!(ground.networks().unwrap().wire.to_string(), "198.18.0.0/24");
        assert_eq!(ground.spare(&ground.shares()[0]).unwrap().to_string(), "10.0.0.254");
    }
}
