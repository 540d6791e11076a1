//! A whole lab: built by [`Lab::builder`], taken down by [`Lab::finish`] or by dropping it.
use std::{
    collections::BTreeSet,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use nix::unistd::Uid;

use crate::{
    binaries::Binaries,
    capacity::{self, Slot},
    claim::{Claim, Taken},
    fault, keys,
    leaks::{Host, Leak},
    node::{Common, Node},
    pod::Pod,
    progress::Progress,
    sandbox::Sandbox,
    underlay::{CROWD, Networks, Underlay},
    wait,
};

pub struct Lab {
    nodes: Mutex<Vec<Arc<Node>>>,
    /// Numbers are not used twice, also when nodes are removed in between.
    numbers: AtomicUsize,
    pods: Mutex<Vec<Arc<Pod>>>,
    common: Arc<Common>,
    host: Host,
    finished: bool,
    _slot: Option<Slot>,
}

/// What a lab is made of.
pub struct Builder {
    nodes: usize,
    pods: usize,
    agents: bool,
    universe: Option<String>,
    networks: Networks,
    verbosity: String,
    confined: bool,
    arguments: Vec<String>,
    cables: Vec<(String, u32)>,
    name: Option<String>,
    progress: Progress,
}

impl Lab {
    /// One node without pods, an agent on it, Weft's default universe.
    pub fn builder() -> Builder {
        Builder {
            nodes: 1,
            pods: 0,
            agents: true,
            universe: None,
            networks: Networks::default(),
            verbosity: "info".into(),
            confined: false,
            arguments: Vec::new(),
            cables: Vec::new(),
            name: None,
            progress: Progress::Quiet,
        }
    }

    pub fn nodes(&self) -> Vec<Arc<Node>> {
        locked(&self.nodes).clone()
    }

    pub fn pods(&self) -> Vec<Arc<Pod>> {
        locked(&self.pods).clone()
    }

    /// The node called that: `n1`, `n2` ...
    pub fn node(&self, name: &str) -> anyhow::Result<Arc<Node>> {
        let found = self.nodes().into_iter().find(|node| node.name() == name);
        found.with_context(|| format!("the lab has no node {name}"))
    }

    /// The pod called that: `n1/p1` ...
    pub fn pod(&self, name: &str) -> anyhow::Result<Arc<Pod>> {
        let found = self.pods().into_iter().find(|pod| pod.full_name() == name);
        found.with_context(|| format!("the lab has no pod {name}"))
    }

    pub fn underlay(&self) -> &Underlay {
        &self.common.underlay
    }

    /// The directory of the CA that all its agents have.
    pub fn ca_dir(&self) -> &Path {
        &self.common.ca_dir
    }

    pub fn claim(&self) -> &Claim {
        &self.common.claim
    }

    pub fn sandbox(&self) -> &Arc<Sandbox> {
        &self.common.sandbox
    }

    /// Adds a node whose agent is not started and knows the first node as its only peer.
    pub fn add_node(&self) -> anyhow::Result<Arc<Node>> {
        let mut nodes = locked(&self.nodes);
        let number = self.numbers.fetch_add(1, Ordering::Relaxed) + 1;
        let node = Arc::new(Node::create(&self.common, number)?);
        let first = nodes.first().map(|first| first.address().to_string());
        node.configure(|settings| settings.peers.extend(first));
        nodes.push(Arc::clone(&node));
        Ok(node)
    }

    /// Stops a node's agent, if one runs, and forgets the node with its pods; its namespace ends with the last handle to
    /// it.
    ///
    /// # Errors
    /// When the agent does not stop on SIGTERM.
    pub fn remove_node(&self, node: &Node) -> anyhow::Result<()> {
        locked(&self.pods).retain(|pod| pod.node().name() != node.name());
        locked(&self.nodes).retain(|other| other.name() != node.name());
        node.take_running().map_or(Ok(()), |agent| agent.stop().map(|_| ()))
    }

    /// Adds a pod that is not attached: `p1` is the node's first one.
    pub fn add_pod(&self, node: &Arc<Node>) -> anyhow::Result<Arc<Pod>> {
        // Numbers are not used twice on a node, also when pods are removed in between.
        let number = |pod: &Arc<Pod>| pod.name().trim_start_matches('p').parse().unwrap_or(0);
        let mut pods = locked(&self.pods);
        let last: u32 =
            pods.iter().filter(|pod| pod.node().name() == node.name()).map(number).max().unwrap_or(0);
        let pod = Arc::new(Pod::create(node, &format!("p{}", last + 1))?);
        pods.push(Arc::clone(&pod));
        Ok(pod)
    }

    /// Forgets a pod; its namespace ends with the last handle to it.
    pub fn remove_pod(&self, pod: &Pod) {
        locked(&self.pods).retain(|other| other.full_name() != pod.full_name());
    }

    /// Ends everything.
    ///
    /// # Errors
    /// When an agent does not stop on SIGTERM, or when anything is left behind.
    pub fn finish(mut self) -> anyhow::Result<()> {
        self.end()
    }

    fn end(&mut self) -> anyhow::Result<()> {
        self.finished = true;
        let nodes = std::mem::take(&mut *locked(&self.nodes));
        let pods = std::mem::take(&mut *locked(&self.pods));
        let underlay = &self.common.underlay;
        let netns = nodes.iter().map(|node| node.netns()).chain(pods.iter().map(|pod| pod.netns()));
        let netns = netns.chain([&underlay.netns, &underlay.outside]);
        let namespaces: BTreeSet<u64> = netns.map(|netns| netns.inode()).collect::<Result<_, _>>()?;

        nodes.iter().for_each(|node| node.terminate_agent());
        let stopped: Vec<_> =
            nodes.iter().filter_map(|node| node.take_running()).map(|agent| agent.stop()).collect();
        drop((nodes, pods));
        let leaks = self.leaks(&namespaces)?;
        for ended in stopped {
            ended?;
        }
        if !leaks.is_empty() {
            let list: Vec<_> = leaks.iter().map(Leak::to_string).collect();
            bail!("the lab left behind: {}", list.join(", "));
        }
        Ok(())
    }

    /// What is left, once processes that are about to end have had the time for it.
    fn leaks(&self, namespaces: &BTreeSet<u64>) -> anyhow::Result<Vec<Leak>> {
        let mut leaks = Vec::new();
        let gone = wait::until("nothing is left", Duration::from_secs(2), || {
            leaks = self.host.compare(namespaces)?;
            ensure!(leaks.is_empty());
            Ok(())
        });
        match gone {
            Err(error) if leaks.is_empty() => Err(error),
            _ => Ok(leaks),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if thread::panicking() {
            for node in self.nodes() {
                let log = node.log_tail();
                if !log.is_empty() {
                    eprintln!("last words of {}:\n{log}", node.name());
                }
            }
        }
        match self.end() {
            Err(error) if thread::panicking() => eprintln!("{error:#}"),
            Err(error) => panic!("{error:#}"),
            Ok(()) => {}
        }
    }
}

impl Builder {
    pub fn nodes(self, nodes: usize) -> Self {
        Self { nodes, ..self }
    }

    /// Attached pods on each node.
    pub fn pods(self, pods: usize) -> Self {
        Self { pods, ..self }
    }

    /// The overlay's range, Weft's default if this is not called.
    pub fn universe(self, universe: &str) -> Self {
        Self { universe: Some(universe.into()), ..self }
    }

    /// Other addresses for the underlay than it has by default.
    pub fn networks(self, networks: Networks) -> Self {
        Self { networks, ..self }
    }

    /// More flags for every agent.
    pub fn arguments<'a>(mut self, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        self.arguments.extend(arguments.into_iter().map(String::from));
        self
    }

    /// The MTU of one node's cable, in bytes, before its agent starts.
    pub fn underlay_mtu(mut self, node: &str, mtu: u32) -> Self {
        self.cables.push((node.into(), mtu));
        self
    }

    /// The agents' `--log` filter; `info` if this is not called.
    pub fn verbosity(self, verbosity: &str) -> Self {
        Self { verbosity: verbosity.into(), ..self }
    }

    /// Agents have `CAP_NET_ADMIN` and no other capability, and can write their own directories only.
    pub fn confined(self, confined: bool) -> Self {
        Self { confined, ..self }
    }

    /// Leaves the agents to the caller, and the pods unattached.
    pub fn without_agents(self) -> Self {
        Self { agents: false, ..self }
    }

    pub fn progress(self, progress: Progress) -> Self {
        Self { progress, ..self }
    }

    /// A name under which others find the lab; it does not wait for a free place, as it may stay up for long.
    pub fn name(self, name: &str) -> Self {
        Self { name: Some(name.into()), ..self }
    }

    /// Builds what is needed, waits for its turn, and returns when all agents are ready and all pods attached.
    pub fn start(self) -> anyhow::Result<Lab> {
        self.start_named().map_err(Into::into)
    }

    /// As [`Builder::start`], and tells whether it was the name that was taken.
    pub fn start_named(self) -> Result<Lab, Taken> {
        check_root()?;
        let progress = &self.progress;
        if self.agents {
            progress.pause(Binaries::get)?;
        }
        let slot = match self.name {
            None => Some(progress.pause(capacity::admit)?),
            Some(_) => None,
        };
        let claim = self.name.as_deref().map_or_else(|| Ok(Claim::fresh()?), Claim::named)?;
        Ok(self.build(claim, slot)?)
    }

    fn build(self, claim: Claim, slot: Option<Slot>) -> anyhow::Result<Lab> {
        let progress = &self.progress;
        let host = Host::look()?;
        let sandbox = Arc::new(Sandbox::new()?);
        let underlay = Underlay::create(&sandbox, self.networks)?;
        let ca_dir = claim.state_dir().join("ca");
        keys::make_ca(&ca_dir)?;
        let common = Arc::new(Common {
            sandbox,
            claim: Arc::new(claim),
            underlay,
            ca_dir,
            universe: self.universe,
            verbosity: self.verbosity,
            confined: self.confined,
            arguments: self.arguments,
        });
        let lab = Lab {
            nodes: Mutex::default(),
            numbers: AtomicUsize::new(0),
            pods: Mutex::default(),
            common,
            host,
            finished: false,
            _slot: slot,
        };
        for number in 1..=self.nodes {
            progress.step(format!("node {number} of {}", self.nodes));
            lab.add_node()?;
        }
        let nodes = lab.nodes();
        if nodes.len() > CROWD {
            let at: Vec<_> = nodes.iter().map(|node| (node.netns(), node.address())).collect();
            Underlay::introduce(&at)?;
        }
        let names: Vec<_> = nodes.iter().map(|node| node.name()).collect();
        for node in &nodes {
            let others = nodes.iter().filter(|other| other.name() != node.name());
            node.configure(|settings| {
                settings.seed = Some(names.join(","));
                settings.peers = others.map(|other| other.address().to_string()).collect();
            });
        }
        for (name, mtu) in &self.cables {
            fault::underlay_mtu(lab.underlay(), &*lab.node(name)?, *mtu)?;
        }
        if self.agents {
            progress.step("agents start");
            nodes.iter().try_for_each(|node| node.start_agent())?;
            let within = READY_WITHIN + EACH * nodes.len() as u32;
            nodes.iter().try_for_each(|node| node.wait_ready(within))?;
        }
        for (done, node) in nodes.iter().enumerate() {
            progress.step(format!("pods of {} ({} of {})", node.name(), done + 1, nodes.len()));
            for _ in 0..self.pods {
                let pod = lab.add_pod(node)?;
                if self.agents {
                    pod.attach()?;
                }
            }
        }
        Ok(lab)
    }
}

/// Fails, and says why, without the rights that a lab needs.
pub fn check_root() -> anyhow::Result<()> {
    ensure!(
        Uid::effective().is_root(),
        "the lab makes network namespaces and needs root: run it with sudo, or in a virtual machine"
    );
    Ok(())
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From an agent's start until ADD would work, with a wide margin for a machine that compiles beside it.
const READY_WITHIN: Duration = Duration::from_secs(20);
/// All of a lab's agents share the machine's few processors while they start.
const EACH: Duration = Duration::from_millis(500);
