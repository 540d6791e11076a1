//! Cases as packets: a pod for each address that some pod of the cases has, on the node that owns the address, and a host
//! beyond the nodes' router that has the addresses of nobody.
//!
//! Each step is applied on all nodes, as their operator would; then everybody tries to reach everybody at once. A try is over
//! when it was heard, or when the nodes' own counters say that it was dropped: nothing waits for a time to pass.
use super::{
    Outcome,
    cases::{Case, Cell, Cluster},
    ground::{Ground, SHARES},
    probe::{Round, Station, Try},
};
use crate::{Lab, namespace::Netns, node::Node, pod::Pod, wait};
use anyhow::{Context, ensure};
use ipnet::IpNet;
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
use weft::{
    policy::model::{Protocol, Service},
    types::BRIDGE,
};

/// # Errors
/// The lab does not come up, or a case is not one.
pub fn run(cases: &[Case]) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome { cases: cases.len(), ..Outcome::default() };
    for ground in Ground::plan(cases)? {
        Field::prepare(&ground)?.run(&ground, &mut outcome)?;
    }
    Ok(outcome)
}

/// A lab with a pod for each address.
struct Field {
    lab: Lab,
    nodes: Vec<Arc<Node>>,
    pods: BTreeMap<IpAddr, Arc<Pod>>,
}

impl Field {
    fn prepare(ground: &Ground<'_>) -> anyhow::Result<Self> {
        let lab = Lab::builder()
            .nodes(SHARES)
            .universe(&ground.universe.to_string())
            .networks(ground.networks()?)
            .without_agents()
            .start()?;
        let names: Vec<_> = lab.nodes().iter().map(|node| node.name().to_string()).collect();
        // Seeds that never start have their share all the same: so each eighth of the universe is some node's.
        let mut owners: Vec<_> = ground.shares().into_iter().zip(lab.nodes()).collect();
        let has_pods = |share: &IpNet| ground.pods.iter().any(|address| share.contains(address));
        owners.sort_by_key(|(share, _)| !has_pods(share));
        // One alone would wait for the other seeds.
        owners.truncate(owners.iter().filter(|(share, _)| has_pods(share)).count().max(2));
        let nodes: Vec<_> = owners.iter().map(|(_, node)| node.clone()).collect();
        for (share, node) in &owners {
            let others = nodes.iter().filter(|other| other.name() != node.name());
            let peers = others.map(|other| other.address().to_string()).collect();
            node.configure(|settings| {
                settings.seed = Some(names.join(","));
                settings.peers = peers;
                settings.more.push("--cluster-network-policy=on".into());
            });
            reserve(node, share, ground)?;
        }
        lead(&lab, &owners, ground)?;
        nodes.iter().try_for_each(|node| node.start_agent())?;
        nodes.iter().try_for_each(|node| node.wait_ready(PATIENCE))?;
        let mut pods = BTreeMap::new();
        for address in &ground.pods {
            let owner = owners.iter().find(|(share, _)| share.contains(address));
            let (_, node) = owner.context("every address is in some share")?;
            let pod = lab.add_pod(node)?;
            let mut call = pod.call("ADD");
            let args = call.args.take().unwrap_or_default();
            call.args = Some(format!("{args};IP={address}"));
            call.run(node)?.check(&format!("ADD of {address}"))?;
            pods.insert(*address, pod);
        }
        Ok(Self { lab, nodes, pods })
    }

    fn run(self, ground: &Ground<'_>, outcome: &mut Outcome) -> anyhow::Result<()> {
        {
            let outside = &self.lab.underlay().outside;
            let pods = self.pods.iter().map(|(address, pod)| (*address, pod.netns()));
            let externals = ground.externals.iter().map(|address| (*address, outside));
            let mut stations = BTreeMap::new();
            for (address, netns) in pods.chain(externals) {
                stations.insert(address, (Station::open(netns, address, &ground.ports)?, netns));
            }
            self.warm_up(&stations, &ground.ports)?;
            let mut number = 1;
            for case in &ground.cases {
                self.play(case, &stations, &mut number, outcome)
                    .with_context(|| format!("case {}", case.id))?;
            }
        }
        drop(self.pods);
        drop(self.nodes);
        self.lab.finish()
    }

    /// The first packets between two nodes wait for their keys.
    fn warm_up(&self, stations: &Stations<'_>, ports: &BTreeSet<u16>) -> anyhow::Result<()> {
        self.apply(&[])?;
        let port = *ports.first().context("the cases probe no port")?;
        let service = Service::Port(Protocol::Udp, port);
        wait::until("everybody reaches everybody without policies", PATIENCE, || {
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
            let ends =
                |it: &Cell<'_>| [(it.from.to_string(), it.source), (it.to.to_string(), it.destination)];
            let of_family = |address: IpAddr| stations.keys().all(|it| it.is_ipv4() == address.is_ipv4());
            let is_missing = |(_, address): &(String, IpAddr)| !stations.contains_key(address);
            let (nowhere, here): (Vec<_>, Vec<_>) =
                cells.iter().partition(|it| ends(it).iter().any(is_missing));
            for (name, address) in nowhere.iter().flat_map(|it| ends(it)).filter(is_missing) {
                // The other family has a lab of its own.
                if of_family(address) {
                    let who = format!("{}: {name}, as {address} lies between the pods' addresses", case.id);
                    outcome.left_out.insert(who);
                }
            }
            let mut expected = BTreeMap::new();
            for cell in here {
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

    /// Which policy decides, by the word of a node of one of the ends.
    fn explain(&self, it: &Try) -> String {
        let Service::Port(protocol, port) = it.service else { return String::new() };
        let to = format!("{}:{port}/{protocol}", it.destination);
        let pod = self.pods.get(&it.destination).or_else(|| self.pods.get(&it.source));
        let Some(pod) = pod else { return String::new() };
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

/// Has a node's bridge take an address that no pod wants: an agent keeps the one that it finds.
fn reserve(node: &Node, share: &IpNet, ground: &Ground<'_>) -> anyhow::Result<()> {
    let address = ground.spare(share)?;
    node.netns().links(async |links| {
        links.bridge(BRIDGE).await?;
        links.address(BRIDGE, address.into()).await
    })
}

/// Has the externals and the pods find each other beyond the nodes.
fn lead(lab: &Lab, owners: &[(IpNet, Arc<Node>)], ground: &Ground<'_>) -> anyhow::Result<()> {
    let underlay = lab.underlay();
    let v6 = matches!(ground.universe, IpNet::V6(_));
    if v6 && !ground.externals.is_empty() {
        underlay.route_ipv6()?;
    }
    ground.externals.iter().try_for_each(|address| underlay.settle_outside(*address))?;
    for (number, (share, node)) in (1..).zip(owners).filter(|_| !ground.externals.is_empty()) {
        let mut via = node.address();
        if v6 {
            via = underlay.plug_ipv6(node.netns(), number)?;
            let router = underlay.router_ipv6();
            node.netns().links(async |links| links.default_route(router).await)?;
        }
        underlay.lead(*share, via)?;
    }
    Ok(())
}

const PATIENCE: Duration = Duration::from_secs(30);
const ATTEMPTS: usize = 5;
/// Before TCP tries again, and is counted again.
const ANSWER: Duration = Duration::from_millis(900);
