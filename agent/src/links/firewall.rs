//! The nftables tables as text, and as what is compared.
//!
//! `nft` prints a rule in its own words, which change between versions. So each rule carries a comment with a digest
//! of the text it was made from, and a table stands as it should if its chains hold the rules with those comments, in
//! that order, and its sets hold the same elements.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{desired::Desired, plan::Change};
use crate::types::{Mac, Prefix};
use siphasher::sip::SipHasher;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

/// What nftables shows of ours, and of others' what gets in our way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firewall {
    pub tables: BTreeMap<Family, Table>,
    /// Base chains of other tables on the forward hook whose policy is to drop, as `family table chain`.
    pub dropping: BTreeSet<String>,
}

/// nftables' address families that we have a table `weft` in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// Routing: NAT, and TCP's segment size.
    Inet,
    /// Switching: who may send what through which port.
    Bridge,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    pub family: Family,
    pub sets: BTreeMap<String, BTreeSet<Element>>,
    pub chains: BTreeMap<String, Chain>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// `filter` or `nat`.
    pub kind: String,
    pub hook: String,
    pub priority: i64,
    pub policy: String,
    pub rules: Vec<Rule>,
}

/// A rule is known by its comment; its text is empty where it was read back.
#[derive(Clone, Debug, Eq)]
pub struct Rule {
    pub comment: String,
    pub text: String,
}

/// Port, MAC and address that belong together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Element {
    pub port: String,
    pub mac: Mac,
    pub address: IpAddr,
}

/// Loads a table that is not as it should be, and else only corrects its sets.
pub(super) fn plan(desired: &Desired, found: &Firewall) -> Vec<Change> {
    let mut changes = Vec::new();
    for table in tables(desired) {
        match found.tables.get(&table.family) {
            Some(found) if found.chains == table.chains && found.sets.keys().eq(table.sets.keys()) => {
                for (name, elements) in &table.sets {
                    let standing = &found.sets[name];
                    changes.extend(standing.difference(elements).cloned().map(Change::DeleteElement));
                    changes.extend(elements.difference(standing).cloned().map(Change::AddElement));
                }
            }
            _ => changes.push(Change::LoadTable(table)),
        }
    }
    changes
}

/// The tables as they should be.
pub fn tables(desired: &Desired) -> [Table; 2] {
    [inet(desired), bridge(desired)]
}

/// The text for `nft -f -` that applies such changes together, or not at all. Others are passed over.
pub fn script<'a>(changes: impl IntoIterator<Item = &'a Change>) -> String {
    let mut text = String::new();
    for change in changes {
        text += &match change {
            // An empty one first, as deleting one that does not exist would fail.
            Change::LoadTable(table) => {
                let family = table.family;
                format!("table {family} {NAME} {{}}\ndelete table {family} {NAME}\n{table}")
            }
            Change::DropTable(family) => {
                format!("table {family} {NAME} {{}}\ndelete table {family} {NAME}\n")
            }
            Change::AddElement(element) => format!("add element bridge {NAME} {element}\n"),
            Change::DeleteElement(element) => format!("delete element bridge {NAME} {element}\n"),
            _ => continue,
        };
    }
    text
}

/// What holds after `changes`, so that our own need not be read back.
pub(super) fn after<'a>(mut found: Firewall, changes: impl IntoIterator<Item = &'a Change>) -> Firewall {
    for change in changes {
        match change {
            Change::LoadTable(table) => {
                found.tables.insert(table.family, table.clone());
            }
            Change::DropTable(family) => {
                found.tables.remove(family);
            }
            Change::AddElement(element) => {
                elements_like(&mut found, element).map(|elements| elements.insert(element.clone()));
            }
            Change::DeleteElement(element) => {
                elements_like(&mut found, element).map(|elements| elements.remove(element));
            }
            _ => {}
        }
    }
    found
}

fn elements_like<'a>(found: &'a mut Firewall, element: &Element) -> Option<&'a mut BTreeSet<Element>> {
    found.tables.get_mut(&Family::Bridge)?.sets.get_mut(element.set())
}

/// Routing. Packets enter the universe only with an address of the universe (the far end drops others), and pods
/// leave it with the node's address.
fn inet(desired: &Desired) -> Table {
    let (bridge, tun) = (&desired.bridge.name, &desired.tun.name);
    let universe = desired.universe.prefix();
    let ip = word(universe);
    let mut nat = Vec::new();
    if let Some(gateway) = desired.source() {
        nat.push(format!("oifname \"{tun}\" {ip} saddr != {universe} snat {ip} to {gateway} fully-random"));
    }
    let exceptions: Vec<_> = desired
        .no_masquerade
        .iter()
        .filter(|prefix| word(**prefix) == ip)
        .map(|prefix| format!(" {ip} daddr != {}", prefix.trunc()))
        .collect();
    nat.push(format!(
        "oifname != {{ \"{bridge}\", \"{tun}\" }} {ip} saddr {universe} {ip} daddr != {universe}{} \
         masquerade fully-random",
        exceptions.concat()
    ));
    // A path may be narrower than both ends believe.
    let clamp = |side: &str| {
        format!("{side} {{ \"{bridge}\", \"{tun}\" }} tcp flags syn tcp option maxseg size set rt mtu")
    };
    let forward = [clamp("iifname"), clamp("oifname")];
    Table {
        family: Family::Inet,
        sets: BTreeMap::new(),
        chains: BTreeMap::from([
            ("forward".into(), chain("filter", "forward", MANGLE, forward)),
            ("postrouting".into(), chain("nat", "postrouting", SRCNAT, nat)),
        ]),
    }
}

/// Switching: a frame from a pod's port passes only with the pod's own MAC and address, in ARP too. All else, also
/// VLAN tags, DHCP and neighbour discovery from link-local addresses, is dropped; pods need none of it. And it goes to
/// the gateway only, not to another pod's port past the `forward` hook.
fn bridge(desired: &Desired) -> Table {
    let mut sets = BTreeMap::from([(PODS4.to_string(), BTreeSet::new()), (PODS6.into(), BTreeSet::new())]);
    for pod in desired.pods.values() {
        for address in &pod.addresses {
            let element = Element { port: pod.host_interface.clone(), mac: pod.mac, address: *address };
            sets.entry(element.set().into()).or_default().insert(element);
        }
    }
    let rules = [
        // Other bridges' ports; `meta ibrname` would say it better, but not every kernel has it.
        format!("iifname != \"{PORTS}\" accept"),
        format!("ether daddr != {{ {}, ff:ff:ff:ff:ff:ff }} counter drop", desired.bridge.mac),
        format!("iifname . ether saddr . ip saddr @{PODS4} accept"),
        format!("iifname . ether saddr . ip6 saddr @{PODS6} accept"),
        format!(
            "iifname . ether saddr . arp saddr ip @{PODS4} \
             iifname . arp saddr ether . arp saddr ip @{PODS4} accept"
        ),
        "counter drop".into(),
    ];
    Table {
        family: Family::Bridge,
        sets,
        chains: BTreeMap::from([("prerouting".into(), chain("filter", "prerouting", BRIDGE_DSTNAT, rules))]),
    }
}

fn chain(kind: &str, hook: &str, priority: i64, rules: impl IntoIterator<Item = String>) -> Chain {
    Chain {
        kind: kind.into(),
        hook: hook.into(),
        priority,
        policy: "accept".into(),
        rules: rules.into_iter().map(Rule::new).collect(),
    }
}

impl Rule {
    pub fn new(text: String) -> Self {
        Self { comment: format!("weft {:016x}", SipHasher::new().hash(text.as_bytes())), text }
    }
}

impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        self.comment == other.comment
    }
}

impl Element {
    fn set(&self) -> &'static str {
        if self.address.is_ipv4() { PODS4 } else { PODS6 }
    }
}

impl Family {
    pub const ALL: [Self; 2] = [Self::Inet, Self::Bridge];
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inet => "inet",
            Self::Bridge => "bridge",
        })
    }
}

/// `pods4 { port . MAC . address }`, as `add element` takes it.
impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {{ \"{}\" . {} . {} }}", self.set(), self.port, self.mac, self.address)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table {} {NAME} {{", self.family)?;
        for (name, elements) in &self.sets {
            let address = if name == PODS4 { "ipv4_addr" } else { "ipv6_addr" };
            writeln!(f, "    set {name} {{\n        type ifname . ether_addr . {address}")?;
            if !elements.is_empty() {
                let listed: Vec<_> = elements
                    .iter()
                    .map(|Element { port, mac, address }| format!("\"{port}\" . {mac} . {address}"))
                    .collect();
                writeln!(f, "        elements = {{ {} }}", listed.join(",\n                     "))?;
            }
            writeln!(f, "    }}")?;
        }
        for (name, chain) in &self.chains {
            let Chain { kind, hook, priority, policy, rules } = chain;
            writeln!(f, "    chain {name} {{")?;
            writeln!(f, "        type {kind} hook {hook} priority {priority}; policy {policy};")?;
            for Rule { text, comment } in rules {
                writeln!(f, "        {text} comment \"{comment}\"")?;
            }
            writeln!(f, "    }}")?;
        }
        writeln!(f, "}}")
    }
}

fn word(prefix: Prefix) -> &'static str {
    if prefix.addr().is_ipv4() { "ip" } else { "ip6" }
}

/// Our tables' name in both families.
pub const NAME: &str = "weft";
const PODS4: &str = "pods4";
const PODS6: &str = "pods6";
/// The host ends of pods' veths, as [`AttachmentKey::host_interface`](crate::types::AttachmentKey::host_interface)
/// names them.
const PORTS: &str = "wf*";
/// nftables' standard priorities.
const MANGLE: i64 = -150;
const SRCNAT: i64 = 100;
const BRIDGE_DSTNAT: i64 = -300;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::links::PodPort;

    fn desired() -> Desired {
        let mut desired = Desired::new("10.32.0.0/12".parse().unwrap(), Mac([2, 0, 0, 0, 0, 1]), 1440);
        desired.gateways.insert("10.32.0.1".parse().unwrap());
        desired.no_masquerade.insert("192.0.2.0/24".parse().unwrap());
        for n in [2, 3] {
            let host_interface = format!("wf00000000000{n}");
            let addresses = BTreeSet::from([IpAddr::from([10, 32, 0, n])]);
            let mac = Mac([2, 0, 0, 0, 1, n]);
            desired.pods.insert(host_interface.clone(), PodPort { host_interface, addresses, mac });
        }
        desired
    }

    #[test]
    fn the_tables_read_well() {
        let [inet, bridge] = tables(&desired());
        insta::assert_snapshot!(inet, @r#"
        table inet weft {
            chain forward {
                type filter hook forward priority -150; policy accept;
                iifname { "weft", "weft0" } tcp flags syn tcp option maxseg size set rt mtu comment "weft 979f89ec701fadac"
                oifname { "weft", "weft0" } tcp flags syn tcp option maxseg size set rt mtu comment "weft b2aa3c58f02cf958"
            }
            chain postrouting {
                type nat hook postrouting priority 100; policy accept;
                oifname "weft0" ip saddr != 10.32.0.0/12 snat ip to 10.32.0.1 fully-random comment "weft 720f1e0007a6ae49"
                oifname != { "weft", "weft0" } ip saddr 10.32.0.0/12 ip daddr != 10.32.0.0/12 ip daddr != 192.0.2.0/24 masquerade fully-random comment "weft 63779a21fb5eebb0"
            }
        }
        "#);
        insta::assert_snapshot!(bridge, @r#"
        table bridge weft {
            set pods4 {
                type ifname . ether_addr . ipv4_addr
                elements = { "wf000000000002" . 02:00:00:00:01:02 . 10.32.0.2,
                             "wf000000000003" . 02:00:00:00:01:03 . 10.32.0.3 }
            }
            set pods6 {
                type ifname . ether_addr . ipv6_addr
            }
            chain prerouting {
                type filter hook prerouting priority -300; policy accept;
                iifname != "wf*" accept comment "weft b5de6db69f7bcfab"
                ether daddr != { 02:00:00:00:00:01, ff:ff:ff:ff:ff:ff } counter drop comment "weft ee63d42c191d1a77"
                iifname . ether saddr . ip saddr @pods4 accept comment "weft 2a318ad4a0bbe0e3"
                iifname . ether saddr . ip6 saddr @pods6 accept comment "weft c8bbae984369c8e0"
                iifname . ether saddr . arp saddr ip @pods4 iifname . arp saddr ether . arp saddr ip @pods4 accept comment "weft c68a5890011ce628"
                counter drop comment "weft f82b719648d3d8e8"
            }
        }
        "#);
    }

    #[test]
    fn a_pod_costs_one_element() {
        let before = desired();
        let mut found = Firewall::default();
        found = after(found, &plan(&before, &Firewall::default()));
        assert_eq!(plan(&before, &found), []);
        let mut desired = before;
        let last = desired.pods.pop_last().unwrap().1;
        let changes = plan(&desired, &found);
        insta::assert_snapshot!(script(&changes), @r#"delete element bridge weft pods4 { "wf000000000003" . 02:00:00:00:01:03 . 10.32.0.3 }"#);
        desired.pods.insert(last.host_interface.clone(), last);
        let changes = plan(&desired, &after(found, &changes));
        insta::assert_snapshot!(script(&changes), @r#"add element bridge weft pods4 { "wf000000000003" . 02:00:00:00:01:03 . 10.32.0.3 }"#);
    }

    #[test]
    fn a_changed_rule_is_a_changed_table() {
        let found = after(Firewall::default(), &plan(&desired(), &Firewall::default()));
        let mut desired = desired();
        desired.no_masquerade.clear();
        let [change] = &plan(&desired, &found)[..] else { panic!("one table") };
        assert!(matches!(change, Change::LoadTable(table) if table.family == Family::Inet), "{change}");
    }
}
