//! The network of a node as the kernel shows it, to be compared.
use std::{collections::BTreeSet, fmt, fs, net::IpAddr, path::Path, process::Command};

use weft::linux::netlink::{Family, Netlink};
use weft_lab::{node::Node, sandbox, tools};

/// Links with their indices, addresses, routes, neighbours, MACs behind ports, firewall with its handles, sysctls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel(BTreeSet<String>);

impl Kernel {
    pub fn of(node: &Node) -> Self {
        let lines = node.netns().run(|| {
            let mut lines = BTreeSet::new();
            look(async |netlink| {
                lines.extend(netlink.links().await?.iter().map(|link| format!("{link:?}")));
                let addresses =
                    netlink.addresses().await?.into_iter().filter(|a| is_stable(a.address.addr()));
                lines.extend(addresses.map(|address| format!("{address:?}")));
                for family in [Family::V4, Family::V6] {
                    let routes = netlink.routes(family).await?.into_iter();
                    let stable = routes.filter(|route| is_stable(route.destination.addr()));
                    lines.extend(stable.map(|route| format!("{route:?}")));
                }
                let ours = |text: &String| text.contains("is_static: true");
                lines.extend(netlink.neighbours().await?.iter().map(|n| format!("{n:?}")).filter(ours));
                lines.extend(netlink.fdb().await?.iter().map(|entry| format!("{entry:?}")).filter(ours));
                Ok(())
            })?;
            let nft = tools::find("nft").expect("the lab has nft");
            let rules = Command::new(nft).args(["-a", "-s", "list", "ruleset"]).output()?;
            assert!(rules.status.success(), "{rules:?}");
            let rules = String::from_utf8(rules.stdout)?;
            // The order of rules counts, that of tables does not.
            let (mut table, mut number) = ("", 0);
            for line in rules.lines() {
                if let Some(name) = line.strip_prefix("table ") {
                    (table, number) = (name, 0);
                }
                lines.insert(format!(
                    "nft {} {number:3} {line}",
                    table.split(" {").next().unwrap_or_default()
                ));
                number += 1;
            }
            for family in ["ipv4", "ipv6"] {
                sysctls(&Path::new("/proc/sys/net").join(family).join("conf"), &mut lines)?;
            }
            Ok(lines)
        });
        Self(lines.unwrap())
    }

    /// What is there when no agent holds the TUN's queues: the device has no carrier then.
    pub fn without_carrier(self) -> Self {
        let text = |line: String| {
            line.replace("carrier: false", "carrier: true").replace("running: false", "running: true")
        };
        Self(self.0.into_iter().map(text).collect())
    }

    /// Without the numbers that tell a thing from one that was made anew in its place.
    pub fn without_handles(self) -> Self {
        let text = |line: String| line.split(" # handle").next().unwrap_or_default().to_owned();
        Self(self.0.into_iter().map(text).collect())
    }

    /// Whether any line of it holds this text.
    pub fn shows(&self, text: &str) -> bool {
        self.0.iter().any(|line| line.contains(text))
    }

    #[track_caller]
    pub fn assert_is(&self, expected: &Self) {
        assert!(self == expected, "{}", self.difference(expected));
    }

    pub fn check(&self, expected: &Self) -> anyhow::Result<()> {
        anyhow::ensure!(self == expected, "{}", self.difference(expected));
        Ok(())
    }

    fn difference(&self, expected: &Self) -> String {
        let missing = expected.0.difference(&self.0).map(|line| format!("- {line}\n"));
        let surplus = self.0.difference(&expected.0).map(|line| format!("+ {line}\n"));
        format!("the kernel is not as it was:\n{}", missing.chain(surplus).collect::<String>())
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

/// Works on the network namespace that the calling thread is in.
fn look<T>(work: impl AsyncFnOnce(&Netlink) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { work(&Netlink::open()?).await })
}

/// Does something to the node's links and routes, as its administrator might.
pub fn meddle(node: &Node, work: impl AsyncFnOnce(&Netlink) -> anyhow::Result<()> + Send) {
    sandbox::on_own_thread(|| {
        node.netns().enter()?;
        look(work)
    })
    .unwrap();
}

/// IPv6 gives links such addresses, and routes to them, by itself and in its own time.
fn is_stable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => true,
        IpAddr::V6(ip) => !ip.is_unicast_link_local() && !ip.is_multicast(),
    }
}

/// All values below a directory of `/proc/sys`; some can only be written.
fn sysctls(directory: &Path, lines: &mut BTreeSet<String>) -> anyhow::Result<()> {
    for link in fs::read_dir(directory)? {
        for key in fs::read_dir(link?.path())? {
            let path = key?.path();
            if let Ok(value) = fs::read_to_string(&path) {
                lines.insert(format!("{} = {}", path.display(), value.trim()));
            }
        }
    }
    Ok(())
}
