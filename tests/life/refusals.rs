//! What an agent refuses: with a message that names flag and conflict, and before it has touched anything.
use std::{
    net::{TcpListener, UdpSocket},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    sync::Arc,
};

use anyhow::ensure;
use weft::linux::store::Store;
use weft_lab::{Lab, agent::Settings, namespace::Netns, node::Node, tools, wait};

use crate::{
    harness::{Running, SOON, lab},
    kernel::Kernel,
};

/// A network of one, and a node that wants to join it.
struct Scene {
    lab: Lab,
    node: Arc<Node>,
    before: Kernel,
}

impl Scene {
    fn new() -> Self {
        Self::with(|_| {})
    }

    /// Prepares the joiner's namespace first.
    fn with(prepare: impl FnOnce(&Netns)) -> Self {
        let lab = lab(1, 0);
        let node = lab.add_node().unwrap();
        prepare(node.netns());
        let before = Kernel::of(&node);
        Self { lab, node, before }
    }

    /// Starts the joiner's agent with more arguments.
    #[track_caller]
    fn refuses(&self, arguments: &[&str]) -> String {
        self.refuses_with(|settings| settings.more.extend(arguments.iter().map(|word| (*word).to_owned())))
    }

    /// Starts the joiner's agent with settings that are changed for this once.
    #[track_caller]
    fn refuses_with(&self, change: impl FnOnce(&mut Settings)) -> String {
        let mut before = None;
        self.node.configure(|settings| {
            before = Some(settings.clone());
            change(settings);
        });
        let command = self.node.agent_command().unwrap();
        self.node.configure(|settings| *settings = before.expect("just set"));
        self.refuses_command(command)
    }

    /// What it said, when it has ended by itself and touched nothing.
    #[track_caller]
    fn refuses_command(&self, command: Command) -> String {
        let mut agent = Running::start(&self.node, command);
        let status = agent.wait_end(SOON).unwrap();
        let said = agent.said();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(!said.contains("panicked"), "{said}");
        Kernel::of(&self.node).assert_is(&self.before);
        said
    }

    /// A socket that is closed here lives on in what other tests have forked meanwhile, until that is executed.
    fn ports_are_free(&self) -> anyhow::Result<()> {
        self.node.netns().run(|| {
            for table in ["tcp", "udp"] {
                let sockets = std::fs::read_to_string(Path::new("/proc/thread-self/net").join(table))?;
                let mut local = sockets.lines().filter_map(|line| line.split_whitespace().nth(1));
                let held = local.find(|address| address.ends_with(":1A7E") || address.ends_with(":1A7F"));
                ensure!(held.is_none(), "{table} {held:?} is there");
            }
            Ok(())
        })
    }

    /// The same configuration without what is wrong with it works.
    fn accepts(&self) {
        self.node.start_agent().unwrap();
        self.node.wait_ready(crate::harness::START).unwrap();
        self.node.stop_agent().unwrap();
    }
}

#[track_caller]
fn says(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "`{word}` is missing in: {said}");
    }
}

#[test]
fn a_universe_that_is_in_use_or_none_is_refused() {
    let scene = Scene::with(|netns| {
        let route = async |links: &weft_lab::links::Links| {
            links.route("172.20.0.0/16".parse()?, "192.0.2.254".parse()?).await
        };
        netns.links(route).unwrap();
    });
    let said = scene.refuses(&["--universe", "172.16.0.0/12"]);
    says(&said, &["--universe 172.16.0.0/12", "172.20.0.0/16", "nothing was changed"]);
    let said = scene.refuses(&["--universe", "10.32.0.1/12"]);
    says(&said, &["--universe", "`10.32.0.1/12` is not a network address", "10.32.0.0/12"]);
    let said = scene.refuses(&["--universe", "192.0.0.0/16"]);
    says(&said, &["--universe 192.0.0.0/16", "192.0.2."]);
    scene.accepts();
}

#[test]
fn who_differs_from_the_peers_is_refused() {
    let scene = Scene::new();
    let said = scene.refuses(&["--universe", "10.64.0.0/12"]);
    says(&said, &["--universe", "10.64.0.0/12", "10.32.0.0/12", "n1"]);
    let said = scene.refuses(&["--ipam-seed", "n1,n9"]);
    says(&said, &["192.0.2.1:6783 belongs to another network", "--ipam-seed"]);
    assert!(scene.lab.node("n1").unwrap().log().contains("link refused"));
    scene.accepts();
}

#[test]
fn a_port_in_use_is_refused() {
    let scene = Scene::new();
    let held = |what: &str| -> Box<dyn Send> {
        let run = |work: fn() -> anyhow::Result<Box<dyn Send>>| scene.node.netns().run(work).unwrap();
        match what {
            "TCP" => run(|| Ok(Box::new(TcpListener::bind("0.0.0.0:6783")?))),
            "UDP" => run(|| Ok(Box::new(UdpSocket::bind("0.0.0.0:6783")?))),
            _ => run(|| Ok(Box::new(TcpListener::bind("127.0.0.1:6782")?))),
        }
    };
    for (what, words) in [
        ("TCP", ["--listen", "6783", "TCP", "in use"]),
        ("UDP", ["--listen", "6783", "UDP", "in use"]),
        ("metrics", ["--metrics-addr 127.0.0.1:6782", "cannot listen", "in use", "another"]),
    ] {
        let holder = held(what);
        says(&scene.refuses(&[]), &words);
        drop(holder);
        wait::until("the ports are free", SOON, || scene.ports_are_free()).unwrap();
    }
    scene.accepts();
}

#[test]
fn directories_of_another_agent_are_refused() {
    let scene = Scene::new();
    let elder = scene.lab.node("n1").unwrap();
    let said = scene.refuses_with(|settings| settings.run_dir = elder.run_dir());
    says(&said, &["--run-dir", "another agent answers on", &elder.socket().display().to_string()]);
    elder.status().unwrap();
    let said = scene.refuses_with(|settings| settings.state_dir = elder.state_dir());
    says(&said, &["--state-dir", "another agent", &elder.state_dir().display().to_string()]);

    let other = tempfile::tempdir().unwrap();
    let state = |name: &str, universe: &str| {
        let directory = other.path().join(name);
        Store::open(&directory, &name.parse().unwrap(), &universe.parse().unwrap()).unwrap();
        move |settings: &mut Settings| settings.state_dir = directory
    };
    let said = scene.refuses_with(state("n7", "10.32.0.0/12"));
    says(&said, &["--name is n2", "n7"]);
    let said = scene.refuses_with(state("n2", "10.0.0.0/8"));
    says(&said, &["--universe is 10.32.0.0/12", "10.0.0.0/8"]);
    scene.accepts();
}

#[test]
fn a_node_without_nft_is_refused() {
    let scene = Scene::new();
    let agent = scene.node.agent_command().unwrap();
    let nft = tools::find("nft").unwrap().canonicalize().unwrap();
    // The agent looks beside PATH as well, so the program has to be hidden. The lab's mounts are private already, and in
    // a chroot `/` is no mount point that could be made so.
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "unchanged"]);
    command.args(["sh", "-c", "mount --bind /dev/null $0 && exec \"$@\""]).arg(nft);
    command.arg(agent.get_program()).args(agent.get_args());
    says(&scene.refuses_command(command), &["`nft` is not installed", "nftables"]);
    assert!(!scene.node.state_dir().exists(), "it began before it was sure that it can go on");
}

#[test]
fn an_agent_without_the_right_to_change_the_network_says_what_it_needs() {
    let scene = Scene::new();
    let agent = scene.node.agent_command().unwrap();
    // Where anybody may run it.
    let place = tempfile::tempdir().unwrap();
    let program = place.path().join("weft");
    std::fs::copy(agent.get_program(), &program).unwrap();
    let open = |path: &Path| std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    open(place.path());
    open(&program);
    let mut root = Command::new("setpriv");
    root.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"]).arg(&program).args(agent.get_args());
    says(&scene.refuses_command(root), &["NET_ADMIN"]);
    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program).args(agent.get_args());
    says(&scene.refuses_command(nobody), &["NET_ADMIN", "root"]);
    assert!(!scene.node.state_dir().exists(), "it began before it was sure that it can go on");
}
