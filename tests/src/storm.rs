//! `cargo lab chaos --minutes M`: faults at random, several at once, again and again, under traffic that is checked.
//!
//! ```text
//!   seed ─▶ round: strike 1 to 3 times ─ hold ─▶ calm: all faults end, all agents run ─▶ within 5 s all is well again
//!             ▲                                                                             │
//!             └─────────────────────────────────────────────────────────────────────────────┘
//! ```
//! What does not depend on the machine's speed, the strikes, follows from the seed.
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use rand::{RngExt, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use crate::{
    Lab,
    clock::Clock,
    fault::{self, Fault},
    node::Node,
    pod::Pod,
    progress::Progress,
    scenario::{metric, says},
    traffic::{Crossfire, Hits, transfer},
    wait,
};

/// What strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Strike {
    /// Two sides, between which nothing passes.
    Partition,
    /// Nothing passes from one node to another, all that goes the other way.
    OneWay,
    /// Nothing passes between two nodes but their control link.
    NoData,
    Loss,
    /// Large packets vanish between two nodes.
    Narrow,
    /// A cable is pulled.
    Cable,
    Kill,
    Restart,
    Upgrade,
    Renumber,
    Clock,
    /// A node's whole firewall is flushed.
    Flush,
    /// A pod comes, another goes.
    Pods,
}

/// What a storm was, and how it was weathered.
#[derive(Clone, Debug)]
pub struct Weathered {
    pub strikes: BTreeMap<Strike, usize>,
    pub rounds: usize,
    pub hits: Hits,
    /// From the end of a round's faults until all was well, the longest last.
    pub healed: Vec<Duration>,
}

/// Strikes until the time is up.
///
/// # Errors
/// When all is not well again in time, or was never so: a packet at the wrong pod, an address twice, something that stays.
pub fn storm(seed: u64, lasting: Duration, nodes: usize, progress: &Progress) -> anyhow::Result<Weathered> {
    let lab = Lab::builder().nodes(nodes).pods(1).without_agents().start()?;
    let result = Storm::begin(&lab, seed).and_then(|storm| storm.run(lasting, progress));
    if result.is_err() {
        for node in lab.nodes() {
            eprintln!("last words of {}:\n{}", node.name(), node.log_tail());
        }
    }
    let weathered = result.with_context(|| format!("seed {seed}"))?;
    lab.finish()?;
    Ok(weathered)
}

struct Storm<'a> {
    lab: &'a Lab,
    rng: ChaCha8Rng,
    nodes: Vec<Arc<Node>>,
    clocks: Vec<Arc<Clock>>,
    /// Those that stay.
    pods: Vec<Arc<Pod>>,
    /// Those that come and go.
    guests: Vec<Arc<Pod>>,
    traffic: Crossfire,
    /// Of the round.
    faults: Vec<Fault<'a>>,
    unplugged: BTreeSet<usize>,
    dead: BTreeSet<usize>,
    struck: Vec<String>,
    strikes: BTreeMap<Strike, usize>,
}

impl<'a> Storm<'a> {
    fn begin(lab: &'a Lab, seed: u64) -> anyhow::Result<Self> {
        let nodes = lab.nodes();
        let mut clocks = Vec::new();
        for node in &nodes {
            let clock = Arc::new(Clock::new(&node.state_dir().with_file_name(""))?);
            // Where larger ones vanish, super-packets of the lab's cables would all be lost.
            fault::segmentation(node, false)?;
            node.configure(|settings| {
                settings.advertise.clear();
                settings.clock = Some(clock.clone());
            });
            node.start_agent()?;
            clocks.push(clock);
        }
        nodes.iter().try_for_each(|node| node.wait_ready(START))?;
        let pods = lab.pods();
        pods.iter().try_for_each(|pod| pod.attach().map(drop))?;
        let traffic = Crossfire::start(&pods)?;
        let mut storm = Self {
            lab,
            rng: ChaCha8Rng::seed_from_u64(seed),
            nodes,
            clocks,
            pods,
            guests: Vec::new(),
            traffic,
            faults: Vec::new(),
            unplugged: BTreeSet::new(),
            dead: BTreeSet::new(),
            struck: Vec::new(),
            strikes: BTreeMap::new(),
        };
        wait::until("all is well before the storm", START, || storm.is_well())?;
        storm.struck.clear();
        Ok(storm)
    }

    fn run(mut self, lasting: Duration, progress: &Progress) -> anyhow::Result<Weathered> {
        let start = Instant::now();
        let mut healed = Vec::new();
        while start.elapsed() < lasting {
            let round = healed.len() + 1;
            let took = self.round().with_context(|| format!("round {round}: {}", self.struck.join(", ")))?;
            let at = start.elapsed().as_secs();
            progress
                .step(format!("{at} s, round {round}: {}; well after {took:.1?}", self.struck.join(", ")));
            healed.push(took);
        }
        self.end(healed)
    }

    fn round(&mut self) -> anyhow::Result<Duration> {
        self.struck.clear();
        let mut moved = false;
        for _ in 0..self.rng.random_range(1..=3) {
            let strike = *Strike::ALL.choose(&mut self.rng).expect("there are some");
            // Two that move at once, while they can't tell each other, lose each other for good.
            if !(strike == Strike::Renumber && std::mem::replace(&mut moved, true)) {
                self.strike(strike).with_context(|| format!("{strike:?}"))?;
            }
            thread::sleep(Duration::from_millis(self.rng.random_range(0..1500)));
        }
        thread::sleep(Duration::from_millis(self.rng.random_range(500..5000)));
        self.calm()?;
        let start = Instant::now();
        wait::until("all is well again", HEALS, || self.is_well())?;
        let took = start.elapsed();
        self.is_unique()?;
        self.traffic.check()?;
        Ok(took)
    }

    fn strike(&mut self, strike: Strike) -> anyhow::Result<()> {
        let underlay = self.lab.underlay();
        let one = self.rng.random_range(0..self.nodes.len());
        let other = (one + self.rng.random_range(1..self.nodes.len())) % self.nodes.len();
        let (a, b) = (self.nodes[one].clone(), self.nodes[other].clone());
        let mut what = format!("{strike:?} {}", a.name());
        match strike {
            Strike::Partition => {
                let side: Vec<bool> = (0..self.nodes.len())
                    .map(|at| at == one || at != other && self.rng.random_bool(0.5))
                    .collect();
                let of = |wanted| self.nodes.iter().zip(&side).filter(move |(_, side)| **side == wanted);
                let [left, right] =
                    [true, false].map(|side| of(side).map(|(node, _)| node).collect::<Vec<_>>());
                what = format!("{strike:?} {}", left.iter().map(|node| node.name()).collect::<String>());
                self.faults.push(Fault::partition(underlay, &left, &right)?);
            }
            Strike::OneWay => self.faults.push(Fault::one_way(underlay, &a, &b)?),
            Strike::NoData => self.faults.push(Fault::no_data(underlay, &a, &b)?),
            Strike::Loss => self.faults.push(Fault::loss(underlay, &a, self.rng.random_range(1..=30))?),
            Strike::Narrow => {
                self.faults.push(Fault::narrow(underlay, &a, &b, self.rng.random_range(1280..1500))?)
            }
            Strike::Cable => {
                fault::cable(underlay, &a, false)?;
                self.unplugged.insert(one);
            }
            Strike::Kill if self.dead.insert(one) => a.kill_agent()?,
            Strike::Restart if !self.dead.contains(&one) => {
                a.stop_agent()?;
                a.start_agent()?;
            }
            Strike::Upgrade if !self.dead.contains(&one) => {
                // Not before the last one has begun in earnest.
                a.wait_ready(START)?;
                a.take_over(START)?;
            }
            Strike::Kill | Strike::Restart | Strike::Upgrade => return Ok(()),
            Strike::Renumber => self.renumber(one)?,
            Strike::Clock => {
                let seconds = self.rng.random_range(-MOST_OFF..=MOST_OFF);
                what = format!("{what} {seconds} s");
                self.clocks[one].set(seconds)?;
            }
            Strike::Flush => fault::nft(a.netns(), "flush ruleset")?,
            Strike::Pods => self.exchange_pods(&a, one)?,
        }
        if matches!(strike, Strike::OneWay | Strike::NoData | Strike::Narrow) {
            what = format!("{what} {}", b.name());
        }
        self.struck.push(what);
        *self.strikes.entry(strike).or_default() += 1;
        Ok(())
    }

    /// Others hear of it by gossip; who starts anew is told by its operator.
    fn renumber(&mut self, at: usize) -> anyhow::Result<()> {
        let number = if self.rng.random_bool(0.5) { at + 1 } else { at + 1 + self.nodes.len() };
        let number = number + self.rng.random_range(1..8) * 2 * self.nodes.len();
        fault::renumber(self.lab.underlay(), &self.nodes[at], number)?;
        for node in &self.nodes {
            let others = self.nodes.iter().filter(|other| other.name() != node.name());
            let others = others.map(|other| other.address().to_string()).collect();
            node.configure(|settings| settings.peers = others);
        }
        Ok(())
    }

    fn exchange_pods(&mut self, node: &Arc<Node>, at: usize) -> anyhow::Result<()> {
        if !self.dead.contains(&at) {
            let pod = self.lab.add_pod(node)?;
            // As runtimes do, it tries again while the agent is starting.
            wait::until("ADD", START, || pod.attach())?;
            self.guests.push(pod);
        }
        if self.guests.len() > MOST_GUESTS {
            let guest = self.guests.remove(self.rng.random_range(0..self.guests.len()));
            guest.detach()?;
            self.lab.remove_pod(&guest);
        }
        Ok(())
    }

    /// Ends all faults; clocks stay wrong.
    fn calm(&mut self) -> anyhow::Result<()> {
        for at in std::mem::take(&mut self.dead) {
            self.nodes[at].start_agent()?;
        }
        for at in std::mem::take(&mut self.unplugged) {
            fault::cable(self.lab.underlay(), &self.nodes[at], true)?;
        }
        self.faults.clear();
        Ok(())
    }

    /// Everybody reaches everybody directly, says so, and believes the same.
    fn is_well(&self) -> anyhow::Result<()> {
        let mut ranges: Option<(Value, &str)> = None;
        for node in &self.nodes {
            node.check_agent()?;
            let (status, body) = node.http("/readyz")?;
            ensure!(status == 200, "{} is not ready: {}", node.name(), body.trim());
            let links = metric(node, "weft_links")?;
            ensure!(links as usize == self.nodes.len() - 1, "{} has {links} links", node.name());
            let others = || self.nodes.iter().filter(|other| other.name() != node.name());
            others().try_for_each(|other| says(node, other, "direct"))?;
            let told = node.weft_json("peers")?;
            for other in others() {
                let found =
                    told["peers"].as_array().into_iter().flatten().find(|it| it["name"] == other.name());
                let endpoint = found.map(|peer| peer["endpoints"][0].clone()).unwrap_or_default();
                let is = format!("{}:6783", other.address());
                ensure!(
                    endpoint == is,
                    "{} says that {} is at {endpoint}, not {is}",
                    node.name(),
                    other.name()
                );
            }
            let owned = self.owners(node)?;
            match &ranges {
                Some((before, name)) => ensure!(*before == owned, "{} and {name} disagree", node.name()),
                None => ranges = Some((owned, node.name())),
            }
        }
        for from in &self.pods {
            for to in self.pods.iter().filter(|to| to.full_name() != from.full_name()) {
                from.ping(to.address()?, ECHO)?;
            }
        }
        Ok(())
    }

    /// Who owns what, as a node sees it.
    fn owners(&self, node: &Node) -> anyhow::Result<Value> {
        let ipam = node.weft_json("ipam")?;
        let ranges = ipam["ranges"].as_array().context("no ranges")?;
        Ok(ranges
            .iter()
            .map(|range| [&range["prefix"], &range["owner"]].map(Value::clone).to_vec())
            .collect())
    }

    fn is_unique(&self) -> anyhow::Result<()> {
        let all = || self.pods.iter().chain(&self.guests);
        let addresses: BTreeSet<_> = all().map(|pod| pod.address()).collect::<anyhow::Result<_>>()?;
        ensure!(addresses.len() == all().count(), "an address is there twice");
        Ok(())
    }

    fn end(mut self, mut healed: Vec<Duration>) -> anyhow::Result<Weathered> {
        for pair in self.pods.windows(2) {
            transfer(pair[0].netns(), pair[1].netns(), pair[1].address()?, 4 << 20, START)?;
        }
        wait::until("every node knows its pods and no others", START, || {
            self.nodes.iter().try_for_each(|node| self.knows_its_pods(node))
        })?;
        for guest in std::mem::take(&mut self.guests) {
            guest.detach()?;
            self.lab.remove_pod(&guest);
        }
        wait::until("what has gone is gone", START, || {
            self.nodes.iter().try_for_each(|node| self.knows_its_pods(node))
        })?;
        let hits = self.traffic.finish()?;
        healed.sort_unstable();
        Ok(Weathered { strikes: self.strikes, rounds: healed.len(), hits, healed })
    }

    /// What the agent says it has, its kernel has and the lab has is the same.
    fn knows_its_pods(&self, node: &Node) -> anyhow::Result<()> {
        let mine = || self.pods.iter().chain(&self.guests).filter(|pod| pod.node().name() == node.name());
        let there: BTreeSet<_> =
            mine().map(|pod| Ok(pod.address()?.to_string())).collect::<anyhow::Result<_>>()?;
        let told = node.weft_json("pods")?;
        let told = told["pods"].as_array().context("no pods")?;
        let told: BTreeSet<_> =
            told.iter().filter_map(|pod| pod["addresses"][0].as_str().map(String::from)).collect();
        ensure!(told == there, "{} has {told:?}, not {there:?}", node.name());
        let links = node.netns().links(async |links| links.names().await)?;
        let veths = links.iter().filter(|name| name.starts_with("wf")).count();
        ensure!(veths == there.len(), "{} has {veths} veths for {} pods", node.name(), there.len());
        let ipam = node.weft_json("ipam")?;
        let taken =
            ipam["ranges"].as_array().into_iter().flatten().filter_map(|range| range["allocated"].as_u64());
        let (taken, wanted) = (taken.sum::<u64>(), there.len() as u64 + 1);
        ensure!(taken == wanted, "{} has handed out {taken} addresses, not {wanted}", node.name());
        Ok(())
    }
}

impl Strike {
    const ALL: [Self; 13] = [
        Self::Partition,
        Self::OneWay,
        Self::NoData,
        Self::Loss,
        Self::Narrow,
        Self::Cable,
        Self::Kill,
        Self::Restart,
        Self::Upgrade,
        Self::Renumber,
        Self::Clock,
        Self::Flush,
        Self::Pods,
    ];
}

impl fmt::Display for Weathered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Hits { sent, received } = self.hits;
        let strikes: Vec<_> =
            self.strikes.iter().map(|(strike, times)| format!("{strike:?} {times}")).collect();
        let median = self.healed.get(self.healed.len() / 2).copied().unwrap_or_default();
        let worst = self.healed.last().copied().unwrap_or_default();
        write!(
            f,
            "{} rounds ({}): well again after {median:.1?} (median), {worst:.1?} at most; {received} of {sent} \
             datagrams arrived, none changed or at the wrong pod; no address twice, nothing left",
            self.rounds,
            strikes.join(", "),
        )
    }
}

/// For one echo: a busy machine answers late.
const ECHO: Duration = Duration::from_millis(500);
/// In which all must be well after the faults.
const HEALS: Duration = Duration::from_secs(5);
/// With a wide margin for a machine that compiles beside it.
const START: Duration = Duration::from_secs(20);
/// How far a clock may be off, in seconds: two together by less than the hour by which certificates are older than they are.
const MOST_OFF: i64 = 1500;
/// Pods that have come and not gone.
const MOST_GUESTS: usize = 6;
