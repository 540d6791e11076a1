//! Cases as packets: a pod for each address that some pod of the cases has, on the node that owns the address.
//!
//! Each step is applied on all nodes, as their operator would; then everybody tries to reach everybody at once. A try is over
//! when it was heard, or when the nodes' own counters say that it was dropped: nothing waits for a time to pass.
use super::{
    Outcome,
    cases::{Case, Cluster},
    probe::{Round, Station, Try},
};
use crate::{Lab, namespace::Netns, node::Node, pod::Pod, wait};
use anyhow::{Context, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};
use weft::policy::model::{Protocol, Service};

/// # Errors
/// The lab does not come up, or a case is not one.
pub fn run(cases: &[Case]) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::default();
    for family in [true, false] {
        let of_family: Vec<_> = cases.iter().filter(|case| is_of(case, family)).collect();
        if !of_family.is_empty() {
            Field::prepare(&of_family)?.run(&of_family, &mut outcome)?;
        }
    }
    Ok(outcome)
}

fn is_of(case: &Case, v4: bool) -> bool {
    addresses(case).into_iter().next().is_none_or(|address| address.is_ipv4()) == v4
}

/// Of all pods that a case has some time.
fn addresses(case: &Case) -> BTreeSet<IpAddr> {
    let Some(model) = &case.model else { return BTreeSet::new() };
    let mut cluster = Cluster::of(model);
    let mut found: BTreeSet<_> = cluster.pods().map(|(_, address)| address).collect();
    for action in case.steps.iter().flat_map(|step| &step.actions) {
        // What is wrong with an action is told where it counts.
        if cluster.act(action).is_ok() {
            found.extend(cluster.pods().map(|(_, address)| address));
        }
    }
    found
}

/// A lab with a pod for each address.
struct Field {
    lab: Lab,
    nodes: Vec<Arc<Node>>,
    pods: BTreeMap<IpAddr, Arc<Pod>>,
    ports: BTreeSet<u16>,
}

impl Field {
    fn prepare(cases: &[&Case]) -> anyhow::Result<Self> {
        let addresses: BTreeSet<IpAddr> = cases.iter().flat_map(|case| addresses(case)).collect();
        let universe = universe(&addresses)?;
        let names: Vec<_> = (1..=SHARES).map(|number| format!("n{number}")).collect();
        let lab = Lab::builder().nodes(SHARES).universe(&universe.to_string()).without_agents().start()?;
        // Seeds that never start have their share all the same: so each eighth of the universe is some node's.
        let owners: Vec<_> = universe.subnets(universe.prefix_len() + 3)?.zip(lab.nodes()).collect();
        let lives = |share: &IpNet| addresses.iter().any(|address| share.contains(address));
        let nodes: Vec<_> = owners.iter().filter(|(share, _)| lives(share)).map(|(_, n)| n.clone()).collect();
        for node in &nodes {
            let others = nodes.iter().filter(|other| other.name() != node.name());
            let peers = others.map(|other| other.address().to_string()).collect();
            node.configure(|settings| {
                settings.seed = Some(names.join(","));
                settings.peers = peers;
                settings.more.push("--cluster-network-policy=on".into());
            });
        }
        nodes.iter().try_for_each(|node| node.start_agent())?;
        nodes.iter().try_for_each(|node| node.wait_ready(PATIENCE))?;
        let mut pods = BTreeMap::new();
        for address in &addresses {
            let owner = owners.iter().find(|(share, _)| share.contains(address));
            let (_, node) = owner.context("every address is in some share")?;
            let pod = lab.add_pod(node)?;
            let mut call = pod.call("ADD");
            let args = call.args.take().unwrap_or_default();
            call.args = Some(format!("{args};IP={address}"));
            call.run(node)?.check(&format!("ADD of {address}"))?;
            pods.insert(*address, pod);
        }
        let ports = cases.iter().flat_map(|case| ports(case)).collect();
        Ok(Self { lab, nodes, pods, ports })
    }

    fn run(self, cases: &[&Case], outcome: &mut Outcome) -> anyhow::Result<()> {
        {
            let mut stations = BTreeMap::new();
            for (address, pod) in &self.pods {
                stations.insert(*address, (Station::open(pod.netns(), *address, &self.ports)?, pod.netns()));
            }
            self.warm_up(&stations)?;
            let mut number = 1;
            for case in cases {
                self.play(case, &stations, &mut number, outcome)
                    .with_context(|| format!("case {}", case.id))?;
                outcome.cases += 1;
            }
        }
        drop(self.pods);
        drop(self.nodes);
        self.lab.finish()
    }

    /// The first packets between two nodes wait for their keys.
    fn warm_up(&self, stations: &Stations<'_>) -> anyhow::Result<()> {
        self.apply(&[])?;
        let port = *self.ports.first().context("the cases probe no port")?;
        let service = Service::Port(Protocol::Udp, port);
        wait::until("all pods reach each other without policies", PATIENCE, || {
            let mut round = Round::begin(0, everybody(stations, service), stations)?;
            wait::until("packets arrive", Duration::from_millis(500), || {
                round.look(stations)?;
                ensure!(round.heard.len() == stations.len() * stations.len());
                Ok(())
            })
        })
    }

    fn play(
        &self,
        case: &Case,
        stations: &Stations<'_>,
        number: &mut u32,
        outcome: &mut Outcome,
    ) -> anyhow::Result<()> {
        let mut cluster = Cluster::of(case.model.as_ref().context("there is no model")?);
        for (step_number, step) in case.steps.iter().enumerate() {
            for action in &step.actions {
                cluster.act(action)?;
            }
            self.apply(&cluster.objects())?;
            let cells = cluster.cells(step)?;
            let between_pods = |it: &&super::cases::Cell<'_>| {
                stations.contains_key(&it.source) && stations.contains_key(&it.destination)
            };
            let mut expected = BTreeMap::new();
            for cell in cells.iter().filter(between_pods) {
                let key = Try { source: cell.source, destination: cell.destination, service: cell.service };
                expected.insert(key, (cell.passes()?, cell.to_string()));
            }
            let tries: Vec<Try> = expected.keys().copied().collect();
            // What is neither heard nor dropped was lost on the way: that says nothing, and it is tried again.
            let mut heard = BTreeSet::new();
            let mut over = Ok(());
            for _ in 0..ATTEMPTS {
                *number += 1;
                (heard, over) = self.send(*number, &tries, stations)?;
                let arrived = expected.iter().all(|(it, (passes, _))| !passes || heard.contains(it));
                if over.is_ok() && arrived {
                    break;
                }
            }
            for (it, (passes, cell)) in &expected {
                outcome.cells += 1;
                let heard = heard.contains(it);
                if heard != *passes {
                    let was = if heard { "passed, and should not" } else { "did not arrive" };
                    let why = self.explain(it);
                    outcome.wrong.push(format!("{} step {step_number} {cell}: it {was}; {why}", case.id));
                }
            }
            if let (Err(error), true) = (over, outcome.wrong.is_empty()) {
                outcome.wrong.push(format!("{} step {step_number}: {error:#}", case.id));
            }
        }
        Ok(())
    }

    /// Sends each once; returns what was heard, and whether all the others were dropped.
    fn send(
        &self,
        number: u32,
        tries: &[Try],
        stations: &Stations<'_>,
    ) -> anyhow::Result<(BTreeSet<Try>, anyhow::Result<()>)> {
        let before = self.dropped()?;
        let mut round = Round::begin(number, tries.to_vec(), stations)?;
        let over = wait::until("every try is heard or dropped", ANSWER, || {
            round.look(stations)?;
            let dropped = self.dropped()?.saturating_sub(before);
            // Once more: what was not dropped may have arrived since.
            round.look(stations)?;
            let (heard, all) = (round.heard.len() as u64, tries.len() as u64);
            ensure!(heard + dropped >= all, "of {all} tries {heard} were heard and {dropped} dropped");
            Ok(())
        });
        Ok((round.heard, over))
    }

    /// Has all nodes know these objects, and no others.
    fn apply(&self, objects: &[Value]) -> anyhow::Result<()> {
        let text = json!({"kind": "List", "items": objects}).to_string();
        let apply = |node: &Arc<Node>| {
            let file = node.run_dir().join("objects.json");
            fs::write(&file, &text).with_context(|| format!("write {}", file.display()))?;
            let file = file.to_string_lossy().into_owned();
            let output = node.weft(&["policy", "apply", "--only", "-f", &file])?;
            let stderr = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "weft policy apply on {}: {}", node.name(), stderr.trim());
            Ok(())
        };
        self.on_all(apply).map(drop)
    }

    /// How many packets all nodes have dropped for their policies' sake.
    fn dropped(&self) -> anyhow::Result<u64> {
        Ok(self.on_all(|node| dropped_on(node))?.into_iter().sum())
    }

    fn on_all<T: Send>(
        &self,
        what: impl Fn(&Arc<Node>) -> anyhow::Result<T> + Sync,
    ) -> anyhow::Result<Vec<T>> {
        let what = &what;
        thread::scope(|scope| {
            let threads: Vec<_> = self.nodes.iter().map(|node| scope.spawn(move || what(node))).collect();
            threads.into_iter().map(|it| it.join().expect("a node's thread does not panic")).collect()
        })
    }

    /// Which policy decides, by the word of the destination's node.
    fn explain(&self, it: &Try) -> String {
        let Service::Port(protocol, port) = it.service else { return String::new() };
        let to = format!("{}:{port}/{protocol}", it.destination);
        let Some(pod) = self.pods.get(&it.destination) else { return String::new() };
        let said = pod.node().weft(&["policy", "explain", &it.source.to_string(), &to]);
        said.map(|out| String::from_utf8_lossy(&out.stdout).trim().replace('\n', ";")).unwrap_or_default()
    }
}

type Stations<'a> = BTreeMap<IpAddr, (Station, &'a Netns)>;

fn everybody(stations: &Stations<'_>, service: Service) -> Vec<Try> {
    let pairs = stations.keys().flat_map(|source| stations.keys().map(move |it| (*source, *it)));
    pairs.map(|(source, destination)| Try { source, destination, service }).collect()
}

/// All counters of drops in a node's table.
pub fn dropped_on(node: &Node) -> anyhow::Result<u64> {
    let mut list = Command::new("nft");
    list.args(["-j", "list", "counters", "table", "inet", "weft-policy"]);
    let output = node.exec(list)?;
    // Where no policy isolates a pod there is no table.
    if !output.status.success() {
        return Ok(0);
    }
    let listed: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("nft on {}: {}", node.name(), String::from_utf8_lossy(&output.stderr)))?;
    let drops = |name: &str| match name {
        "late" => true,
        // Of a policy, and of what it lets pass.
        name if name.contains('/') => false,
        name => name.starts_with("in-") || name.starts_with("out-") || name.ends_with("-deny"),
    };
    let counters = listed["nftables"].as_array().into_iter().flatten().map(|item| &item["counter"]);
    let drops = counters.filter(|counter| counter["name"].as_str().is_some_and(drops));
    Ok(drops.filter_map(|counter| counter["packets"].as_u64()).sum())
}

fn ports(case: &Case) -> BTreeSet<u16> {
    let Some(model) = &case.model else { return BTreeSet::new() };
    let mut cluster = Cluster::of(model);
    let mut found = BTreeSet::new();
    for step in &case.steps {
        step.actions.iter().for_each(|action| drop(cluster.act(action)));
        let cells = cluster.cells(step).unwrap_or_default();
        found.extend(cells.iter().filter_map(|cell| match cell.service {
            Service::Port(_, port) => Some(port),
            Service::Other => None,
        }));
    }
    found
}

/// The smallest range that holds all addresses, and is large enough for a share of each node.
fn universe(addresses: &BTreeSet<IpAddr>) -> anyhow::Result<IpNet> {
    let (first, last) =
        (addresses.first().context("there are no pods")?, addresses.last().context("no pods")?);
    let least = if first.is_ipv4() { 21 } else { 64 };
    let around = |length| match first {
        IpAddr::V4(address) => Ipv4Net::new(*address, length).map(IpNet::V4),
        IpAddr::V6(address) => Ipv6Net::new(*address, length).map(IpNet::V6),
    };
    for length in (8..=least).rev() {
        let range = around(length)?.trunc();
        if range.contains(last) {
            return Ok(range);
        }
    }
    anyhow::bail!("{first} and {last} are too far from each other for one universe")
}

/// Nodes that share the universe; those that have no pod are never started.
const SHARES: usize = 8;
const PATIENCE: Duration = Duration::from_secs(30);
const ATTEMPTS: usize = 5;
/// Before TCP tries again, and is counted again.
const ANSWER: Duration = Duration::from_millis(900);
