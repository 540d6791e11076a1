//! The rules, the text for nftables, the explanation and a direct reading of the specification say the same, of any cluster;
//! and rules that follow change by change are those that are made anew.

use super::{
    compile::Compiler,
    explain::explain,
    index::Index,
    model::*,
    nft_tests::Table,
    render::Renderer,
    rules::Change,
    selector::{Labels, Operator, Requirement, Selector},
};
use crate::types::{PodRef, Prefix};
use proptest::{collection::vec, option, prelude::*, sample::select};
use std::{collections::BTreeMap, net::IpAddr};

#[derive(Clone, Debug)]
enum Step {
    Pod(Pod),
    PodGone(usize),
    Namespace(Namespace),
    NamespaceGone(usize),
    Policy(Policy),
    PolicyGone(usize),
    ClusterPolicy(ClusterPolicy),
    ClusterPolicyGone(usize),
    /// Which of the addresses are attached here, as bits.
    Settle(u16),
    Nodes(Vec<(usize, usize)>),
}

/// What the steps lead to, without any cleverness.
#[derive(Clone, Debug, Default)]
struct Cluster {
    pods: BTreeMap<Uid, Pod>,
    /// In which order pods came to their addresses.
    claims: Vec<(IpAddr, Uid)>,
    namespaces: BTreeMap<String, Namespace>,
    policies: BTreeMap<PolicyId, Policy>,
    cluster_policies: BTreeMap<String, ClusterPolicy>,
    attached: Vec<IpAddr>,
    nodes: BTreeMap<IpAddr, IpAddr>,
}

impl Cluster {
    fn take(&mut self, step: &Step, index: &mut Index) {
        match step.clone() {
            Step::Pod(pod) => {
                let uid = pod.uids[0].clone();
                self.claims.retain(|(a, claim)| *claim != uid || pod.matchable && pod.addresses.contains(a));
                for address in pod.addresses.iter().filter(|_| pod.matchable) {
                    let claim = (*address, uid.clone());
                    if !self.claims.contains(&claim) {
                        self.claims.push(claim);
                    }
                }
                self.pods.insert(uid, pod.clone());
                index.apply_pod(pod);
            }
            Step::PodGone(n) => {
                let Some(uid) = self.pods.keys().nth(n).cloned() else { return };
                self.pods.remove(&uid);
                self.claims.retain(|(_, claim)| *claim != uid);
                index.delete_pod(&uid);
            }
            Step::Namespace(namespace) => {
                self.namespaces.insert(namespace.name.clone(), namespace.clone());
                index.apply_namespace(namespace);
            }
            Step::NamespaceGone(n) => {
                let Some(name) = self.namespaces.keys().nth(n).cloned() else { return };
                let gone = self.namespaces.remove(&name).unwrap();
                index.delete_namespace(&name, &gone.uid);
            }
            Step::Policy(policy) => {
                self.policies.insert(policy.id.clone(), policy.clone());
                index.apply_policy(policy);
            }
            Step::PolicyGone(n) => {
                let Some(id) = self.policies.keys().nth(n).cloned() else { return };
                let gone = self.policies.remove(&id).unwrap();
                index.delete_policy(&id, &gone.uid);
            }
            Step::ClusterPolicy(policy) => {
                self.cluster_policies.insert(policy.name.clone(), policy.clone());
                index.apply_cluster_policy(policy);
            }
            Step::ClusterPolicyGone(n) => {
                let Some(name) = self.cluster_policies.keys().nth(n).cloned() else { return };
                let gone = self.cluster_policies.remove(&name).unwrap();
                index.delete_cluster_policy(&name, &gone.uid);
            }
            Step::Settle(bits) => {
                self.attached = (0..ADDRESSES.len()).filter(|n| bits >> n & 1 == 1).map(address).collect();
                // By pods that nobody describes, so that whose the addresses are is told by the claims.
                let stranger = |a: &IpAddr| (*a, PodRef { uid: format!("at {a}"), ..PodRef::default() });
                index.settle(self.attached.iter().map(stranger).collect());
            }
            Step::Nodes(nodes) => {
                let nodes = nodes.into_iter().map(|(a, b)| (address(a), address(b)));
                self.nodes = nodes.collect();
                index.set_nodes(self.nodes.iter().map(|(a, b)| (*a, [*b].into())).collect());
            }
        }
    }

    fn pod_at(&self, address: IpAddr) -> Option<&Pod> {
        let (_, uid) = self.claims.iter().rev().find(|(claimed, _)| *claimed == address)?;
        self.pods.get(uid)
    }

    fn allows(&self, direction: Direction, flow: &Flow) -> bool {
        let (own, other) = flow.ends(direction);
        let Some(pod) = self.pod_at(own) else { return true };
        let isolating = self.policies.values().filter(|policy| {
            policy.id.namespace == pod.namespace
                && selects(&policy.subject, &pod.labels)
                && policy.rules(direction).is_some()
        });
        let isolating: Vec<_> = isolating.collect();
        if own == other {
            return true;
        }
        match self.decided(Tier::Admin, pod, direction, flow) {
            Action::Accept => return true,
            Action::Deny => return false,
            Action::Pass => {}
        }
        if isolating.is_empty() {
            return self.decided(Tier::Baseline, pod, direction, flow) != Action::Deny;
        }
        let mut rules = isolating.iter().flat_map(|policy| policy.rules(direction).unwrap());
        rules.any(|rule| self.is_matched(rule, other, flow))
    }

    /// What a tier says of a pod's flow; to pass on is to say nothing.
    fn decided(&self, tier: Tier, pod: &Pod, direction: Direction, flow: &Flow) -> Action {
        let mut policies: Vec<_> = self.cluster_policies.values().filter(|it| it.tier == tier).collect();
        policies.sort_by_key(|policy| (policy.priority, &policy.name));
        for policy in policies {
            if !self.is_selected(&policy.subject, pod) {
                continue;
            }
            for rule in policy.rules(direction) {
                if self.is_matched(&rule.matching, flow.ends(direction).1, flow) {
                    return rule.action;
                }
            }
        }
        Action::Pass
    }

    fn is_matched(&self, rule: &Rule, other: IpAddr, flow: &Flow) -> bool {
        let from = match &rule.peers {
            None => true,
            Some(peers) => peers.iter().any(|peer| self.is_peer(peer, other)),
        };
        let on = match (&rule.ports, flow.to) {
            (None, _) => true,
            (Some(_), Service::Other) => false,
            (Some(ports), Service::Port(protocol, number)) => ports.iter().any(|port| {
                port.protocol == protocol
                    && match &port.wanted {
                        Wanted::Any => true,
                        Wanted::Range(from, to) => *from <= number && number <= *to,
                        Wanted::Named(name) => self.pod_at(flow.destination).is_some_and(|pod| {
                            let is = |it: &ContainerPort| it.protocol == protocol && it.number == number;
                            pod.ports.iter().any(|it| it.name == *name && is(it))
                        }),
                    }
            }),
        };
        from && on
    }

    fn is_selected(&self, wanted: &PodPeer, pod: &Pod) -> bool {
        let there = match &wanted.namespaces {
            Namespaces::Named(name) => *name == pod.namespace,
            Namespaces::Selected(selector) => {
                self.namespaces.get(&pod.namespace).is_some_and(|it| selects(selector, &it.labels))
            }
        };
        there && selects(&wanted.pods, &pod.labels)
    }

    fn is_peer(&self, peer: &Peer, other: IpAddr) -> bool {
        match peer {
            Peer::Pods(wanted) => self.pod_at(other).is_some_and(|pod| self.is_selected(wanted, pod)),
            Peer::Block(block) => {
                let inside = |address: IpAddr| {
                    block.cidr.contains(&address) && block.except.iter().all(|it| !it.contains(&address))
                };
                inside(other) || self.nodes.get(&other).is_some_and(|node| inside(*node))
            }
        }
    }
}

/// Case by case, as the specification has them.
fn selects(selector: &Selector, labels: &Labels) -> bool {
    selector.requirements().all(|Requirement { key, operator }| match (operator, labels.get(key)) {
        (Operator::In(values), Some(value)) => values.contains(value),
        (Operator::NotIn(values), Some(value)) => !values.contains(value),
        (Operator::Exists, value) => value.is_some(),
        (Operator::DoesNotExist, value) => value.is_none(),
        (Operator::In(_), None) => false,
        (Operator::NotIn(_), None) => true,
    })
}

fn address(n: usize) -> IpAddr {
    ADDRESSES[n % ADDRESSES.len()].parse().unwrap()
}

fn flows() -> impl Iterator<Item = Flow> {
    let services = [
        Service::Port(Protocol::Tcp, 80),
        Service::Port(Protocol::Tcp, 81),
        Service::Port(Protocol::Udp, 80),
        Service::Port(Protocol::Sctp, 81),
        Service::Other,
    ];
    let of = move |(source, destination)| services.map(|to| Flow { source, destination, to });
    let pairs =
        (0..ADDRESSES.len()).flat_map(|a| (0..ADDRESSES.len()).map(move |b| (address(a), address(b))));
    pairs.filter(|(a, b)| a.is_ipv4() == b.is_ipv4()).flat_map(of)
}

fn any_labels() -> impl Strategy<Value = Labels> {
    let pair = (select(vec!["app", "tier"]), select(vec!["", "a", "b"]));
    vec(pair, 0..3).prop_map(|pairs| pairs.into_iter().map(|(k, v)| (k.into(), v.into())).collect())
}

fn any_selector() -> impl Strategy<Value = Selector> {
    let values =
        || vec(select(vec!["", "a", "b"]), 1..3).prop_map(|v| v.into_iter().map(String::from).collect());
    let operator = prop_oneof![
        values().prop_map(Operator::In),
        values().prop_map(Operator::NotIn),
        Just(Operator::Exists),
        Just(Operator::DoesNotExist),
    ];
    let requirement = (select(vec!["app", "tier"]), operator);
    let requirement = requirement.prop_map(|(key, operator)| Requirement { key: key.into(), operator });
    vec(requirement, 0..3).prop_map(Selector::from_iter)
}

fn any_pod() -> impl Strategy<Value = Pod> {
    let port = (select(vec!["web", "dns"]), any_protocol(), select(vec![80u16, 81]));
    let port =
        port.prop_map(|(name, protocol, number)| ContainerPort { name: name.into(), protocol, number });
    let addresses = vec(0..ADDRESSES.len(), 0..3);
    (0..8usize, any_labels(), addresses, vec(port, 0..3), prop::bool::weighted(0.9)).prop_map(
        |(n, labels, addresses, ports, matchable)| Pod {
            uids: vec![Uid(format!("u{n}"))],
            namespace: ["x", "y"][n % 2].into(),
            name: format!("p{n}"),
            labels,
            addresses: addresses.into_iter().map(address).collect(),
            ports,
            matchable,
        },
    )
}

fn any_protocol() -> impl Strategy<Value = Protocol> {
    select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp])
}

fn any_block() -> impl Strategy<Value = Block> {
    let prefix = || select(BLOCKS.to_vec()).prop_map(|text| text.parse::<Prefix>().unwrap());
    (prefix(), vec(prefix(), 0..3))
        .prop_map(|(cidr, except)| Block { cidr, except: except.into_iter().collect() })
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let namespaces = prop_oneof![
        select(vec!["x", "y"]).prop_map(|name| Namespaces::Named(name.into())),
        any_selector().prop_map(Namespaces::Selected),
    ];
    let pods = (namespaces, any_selector()).prop_map(|(namespaces, pods)| PodPeer { namespaces, pods });
    let peer = prop_oneof![pods.prop_map(Peer::Pods), any_block().prop_map(Peer::Block)];
    let wanted = prop_oneof![
        Just(Wanted::Any),
        select(vec![(80, 80), (80, 81), (79, 90), (1, 79)]).prop_map(|(from, to)| Wanted::Range(from, to)),
        select(vec!["web", "dns"]).prop_map(|name| Wanted::Named(name.into())),
    ];
    let port = (any_protocol(), wanted).prop_map(|(protocol, wanted)| Port { protocol, wanted });
    (option::of(vec(peer, 1..3)), option::of(vec(port, 1..4)))
        .prop_map(|(peers, ports)| Rule { peers, ports })
}

fn any_policy() -> impl Strategy<Value = Policy> {
    let rules = || option::of(vec(any_rule(), 0..3));
    (0..6usize, any_selector(), rules(), rules()).prop_map(|(n, subject, ingress, egress)| {
        let id = PolicyId { namespace: ["x", "y"][n % 2].into(), name: format!("n{n}") };
        Policy { uid: Uid(id.to_string()), id, subject, ingress, egress }
    })
}

fn any_cluster_policy() -> impl Strategy<Value = ClusterPolicy> {
    let rule = || {
        let rule = (select(vec![Action::Accept, Action::Deny, Action::Pass]), any_rule());
        rule.prop_map(|(action, matching)| ClusterRule {
            name: String::new(),
            action,
            matching,
            unknown: None,
        })
    };
    let rules = || vec(rule(), 0..3);
    let subject = (any_selector(), any_selector())
        .prop_map(|(namespaces, pods)| PodPeer { namespaces: Namespaces::Selected(namespaces), pods });
    let rank = (0..4usize, select(vec![Tier::Admin, Tier::Baseline]), 0..3u16);
    (rank, subject, rules(), rules()).prop_map(|((n, tier, priority), subject, ingress, egress)| {
        let name = format!("c{n}");
        ClusterPolicy { uid: Uid(name.clone()), name, tier, priority, subject, ingress, egress }
    })
}

fn any_step() -> impl Strategy<Value = Step> {
    let namespace = (select(vec!["x", "y"]), any_labels());
    let namespace =
        namespace.prop_map(|(name, labels)| Namespace { uid: Uid(name.into()), name: name.into(), labels });
    prop_oneof![
        6 => any_pod().prop_map(Step::Pod),
        1 => (0..8usize).prop_map(Step::PodGone),
        2 => namespace.prop_map(Step::Namespace),
        1 => (0..2usize).prop_map(Step::NamespaceGone),
        6 => any_policy().prop_map(Step::Policy),
        1 => (0..6usize).prop_map(Step::PolicyGone),
        4 => any_cluster_policy().prop_map(Step::ClusterPolicy),
        1 => (0..4usize).prop_map(Step::ClusterPolicyGone),
        2 => any::<u16>().prop_map(Step::Settle),
        1 => vec((0..ADDRESSES.len(), 0..ADDRESSES.len()), 0..2).prop_map(Step::Nodes),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn rules_and_explanation_say_what_the_specification_says(steps in vec(any_step(), 1..30)) {
        let (mut cluster, mut index, mut compiler) = (Cluster::default(), Index::new(false), Compiler::default());
        let (mut renderer, mut table) = (Renderer::new(Some(1), true), Table::default());
        table.run(&renderer.table(compiler.rules(), 0));
        for step in &steps {
            cluster.take(step, &mut index);
            let before = compiler.rules().clone();
            let changes = compiler.follow(&mut index);
            table.run(&renderer.steps(&changes, 1));
            let mut followed = before;
            changes.iter().for_each(|change| followed.apply(change));
            prop_assert_eq!(&followed, compiler.rules());
        }
        let mut anew = Index::new(false);
        let mut again = Cluster::default();
        steps.iter().for_each(|step| again.take(step, &mut anew));
        let mut fresh = Compiler::default();
        fresh.follow(&mut anew);
        prop_assert_eq!(fresh.rules(), compiler.rules());
        let mut written = Table::default();
        written.run(&Renderer::new(Some(1), true).table(fresh.rules(), 1));
        prop_assert_eq!(&written, &table);
        let counters: Vec<_> = renderer.counters().into_keys().collect();
        prop_assert!(table.has_counters(&counters), "{:?}: {:?}", counters, table);
        for flow in flows() {
            let said = explain(&index, &flow);
            for direction in Direction::BOTH {
                let expected = cluster.allows(direction, &flow);
                let said = match direction {
                    Direction::Ingress => &said.ingress,
                    Direction::Egress => &said.egress,
                };
                prop_assert_eq!(said.allowed(), expected, "{:?} {:?}: {}", direction, flow, said);
                if cluster.attached.contains(&flow.ends(direction).0) {
                    let permitted = compiler.rules().permit_in(direction, &flow);
                    prop_assert_eq!(permitted, expected, "rules: {:?} {:?}", direction, flow);
                    let passes = table.passes(direction, &flow, true);
                    prop_assert_eq!(passes, expected, "nftables: {:?} {:?}: {:?}", direction, flow, table);
                    let isolated = compiler.rules().targets.contains_key(&(direction, flow.ends(direction).0));
                    let late = isolated
                        && flow.source != flow.destination
                        && matches!(flow.to, Service::Port(Protocol::Tcp, _));
                    prop_assert_eq!(table.passes(direction, &flow, false), expected && !late);
                }
            }
        }
    }
}

#[test]
fn a_nodes_bridge_counts_as_the_nodes_own_addresses() {
    let block = |cidr: &str| Block { cidr: cidr.parse().unwrap(), except: Default::default() };
    let rule = Rule { peers: Some(vec![Peer::Block(block("198.51.100.0/24"))]), ports: None };
    let id = PolicyId { namespace: "x".into(), name: "from-nodes".into() };
    let (uid, subject) = (Uid("p".into()), Selector::default());
    let (mut index, mut compiler) = (Index::new(true), Compiler::default());
    index.apply_policy(Policy { uid, id, subject, ingress: Some(vec![rule]), egress: None });
    let pod = PodRef { uid: String::new(), namespace: "x".into(), name: "web".into() };
    index.settle([(address(0), pod)].into());
    let flow = Flow { source: address(1), destination: address(0), to: Service::Other };
    for (nodes, passes) in [(vec![], false), (vec![(address(1), address(4))], true), (vec![], false)] {
        index.set_nodes(nodes.into_iter().map(|(bridge, own)| (bridge, [own].into())).collect());
        compiler.follow(&mut index);
        assert_eq!((compiler.rules().permit(&flow), explain(&index, &flow).allowed()), (passes, passes));
    }
}

#[test]
fn a_pod_elsewhere_is_reached_at_the_port_that_it_names() {
    let named = Port { protocol: Protocol::Tcp, wanted: Wanted::Named("web".into()) };
    let web = ContainerPort { name: "web".into(), protocol: Protocol::Tcp, number: 8080 };
    for (number, passes) in [(8080, true), (8081, false)] {
        assert_eq!(
            passes_to(Direction::Egress, vec![named.clone()], vec![web.clone()], number),
            passes,
            "{number}"
        );
    }
}

#[test]
fn a_range_inside_another_takes_nothing_away() {
    let range = |from, to| Port { protocol: Protocol::Tcp, wanted: Wanted::Range(from, to) };
    for (number, passes) in [(10, true), (40, true), (91, true), (92, false)] {
        let ports = vec![range(10, 90), range(20, 30), range(91, 91)];
        assert_eq!(passes_to(Direction::Ingress, ports, Vec::new(), number), passes, "{number}");
    }
}

/// Whether rules let pass what goes between a pod here, with a policy of these ports, and another elsewhere.
fn passes_to(direction: Direction, ports: Vec<Port>, names: Vec<ContainerPort>, number: u16) -> bool {
    let (mut index, mut compiler) = (Index::new(false), Compiler::default());
    let rules = Some(vec![Rule { peers: None, ports: Some(ports) }]);
    let (ingress, egress) = match direction {
        Direction::Ingress => (rules, None),
        Direction::Egress => (None, rules),
    };
    let id = PolicyId { namespace: "x".into(), name: "web".into() };
    index.apply_policy(Policy { uid: Uid("p".into()), id, subject: Selector::default(), ingress, egress });
    for (n, name, ports) in [(0, "here", Vec::new()), (1, "elsewhere", names)] {
        index.apply_pod(Pod {
            uids: vec![Uid(name.into())],
            namespace: "x".into(),
            name: name.into(),
            labels: Labels::new(),
            addresses: [address(n)].into(),
            ports,
            matchable: true,
        });
    }
    let here = PodRef { uid: String::new(), namespace: "x".into(), name: "here".into() };
    index.settle([(address(0), here)].into());
    compiler.follow(&mut index);
    let (source, destination) = match direction {
        Direction::Ingress => (address(1), address(0)),
        Direction::Egress => (address(0), address(1)),
    };
    compiler.rules().permit(&Flow { source, destination, to: Service::Port(Protocol::Tcp, number) })
}

#[test]
fn one_pods_change_takes_elements_and_no_chain() {
    let (mut cluster, mut index, mut compiler) = (Cluster::default(), Index::new(false), Compiler::default());
    let peers = PodPeer { namespaces: Namespaces::Named("x".into()), pods: Selector::default() };
    let numbers = vec![Port { protocol: Protocol::Tcp, wanted: Wanted::Range(80, 90) }];
    let rule = Rule { peers: Some(vec![Peer::Pods(peers)]), ports: Some(numbers) };
    let id = PolicyId { namespace: "x".into(), name: "web".into() };
    let policy = Policy {
        uid: Uid("p".into()),
        id,
        subject: Selector::default(),
        ingress: Some(vec![rule]),
        egress: None,
    };
    let pod = |n: usize| Pod {
        uids: vec![Uid(format!("u{n}"))],
        namespace: "x".into(),
        name: format!("p{n}"),
        labels: Labels::new(),
        addresses: [address(n)].into(),
        ports: Vec::new(),
        matchable: true,
    };
    for step in [Step::Policy(policy), Step::Pod(pod(0)), Step::Settle(1)] {
        cluster.take(&step, &mut index);
    }
    let mut renderer = Renderer::default();
    compiler.follow(&mut index);
    let table = renderer.table(compiler.rules(), 1);
    assert_eq!(table.matches(" : jump in-").count(), 1, "{table}");
    cluster.take(&Step::Pod(pod(1)), &mut index);
    let changes = compiler.follow(&mut index);
    assert!(matches!(&changes[..], [Change::AddElement(..)]), "{changes:?}");
    let text = renderer.steps(&changes, 2);
    assert!(text.starts_with("add element inet weft-policy pods4-") && text.lines().count() == 3, "{text}");
}

const ADDRESSES: [&str; 7] =
    ["10.32.1.3", "10.32.1.19", "10.32.2.3", "10.32.2.19", "198.51.100.2", "fd00::3", "fd00::19"];
const BLOCKS: [&str; 9] = [
    "0.0.0.0/0",
    "10.32.0.0/16",
    "10.32.1.0/24",
    "10.32.1.16/28",
    "10.32.2.3/32",
    "198.51.100.0/24",
    "::/0",
    "fd00::/120",
    "fd00::3/128",
];
