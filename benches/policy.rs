//! Network policies at the size of a large cluster: all rules anew, and one pod's change, as text for nftables.
use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use std::{collections::BTreeMap, net::IpAddr};
use weft::{
    policy::{
        Compiler, Index, Renderer,
        model::{
            Namespace, Namespaces, Peer, Pod, PodPeer, Policy, PolicyId, Port, Protocol, Rule, Uid, Wanted,
        },
        selector::{Operator, Requirement, Selector},
    },
    types::PodRef,
};

/// Twenty pods in each namespace, two policies each, 110 pods on this node.
fn cluster(namespaces: usize) -> Index {
    let mut index = Index::new(false);
    for n in 0..namespaces {
        let (name, team) = (format!("n{n}"), [("team".to_string(), format!("t{}", n % 10))].into());
        index.apply_namespace(Namespace { uid: Uid(name.clone()), name: name.clone(), labels: team });
        for p in 0..PODS {
            index.apply_pod(pod(n, p, "a"));
        }
        for p in 0..2 {
            let peers = PodPeer {
                namespaces: Namespaces::Selected(is("team", &format!("t{}", (n + p) % 10))),
                pods: is("app", "a1"),
            };
            let port = Port { protocol: Protocol::Tcp, wanted: Wanted::Range(80, 80) };
            let rule = Rule { peers: Some(vec![Peer::Pods(peers)]), ports: Some(vec![port]) };
            let id = PolicyId { namespace: name.clone(), name: format!("p{p}") };
            let (uid, subject) = (Uid(id.to_string()), Selector::default());
            index.apply_policy(Policy {
                uid,
                id,
                subject,
                ingress: Some(vec![rule.clone()]),
                egress: Some(vec![rule]),
            });
        }
    }
    let here = (0..LOCAL).map(|n| (address(n % namespaces, n / namespaces), n));
    let attached = here.map(|(address, n)| {
        let (namespace, name) = (n % namespaces, n / namespaces);
        (address, PodRef { uid: format!("{namespace}/{name}"), ..PodRef::default() })
    });
    index.settle(attached.collect());
    index.complete();
    index
}

fn pod(namespace: usize, number: usize, app: &str) -> Pod {
    Pod {
        uids: vec![Uid(format!("{namespace}/{number}"))],
        namespace: format!("n{namespace}"),
        name: format!("p{number}"),
        labels: BTreeMap::from([("app".into(), format!("{app}{}", number % 5))]),
        addresses: [address(namespace, number)].into(),
        ports: Vec::new(),
        matchable: true,
    }
}

fn address(namespace: usize, number: usize) -> IpAddr {
    let host = (namespace * PODS + number) as u32;
    IpAddr::from((0x0a20_0000 + host).to_be_bytes())
}

fn is(key: &str, value: &str) -> Selector {
    [Requirement { key: key.into(), operator: Operator::In([value.to_string()].into()) }]
        .into_iter()
        .collect()
}

fn benches(c: &mut Criterion) {
    let mut group = c.benchmark_group("policy");
    for namespaces in [50, 500] {
        let pods = namespaces * PODS;
        let index = cluster(namespaces);
        group.bench_function(BenchmarkId::new("all anew", pods), |b| {
            let follow = |mut index: Index| {
                let (mut compiler, mut renderer) = (Compiler::default(), Renderer::default());
                compiler.follow(&mut index);
                renderer.table(compiler.rules(), 1)
            };
            b.iter_batched(|| index.clone(), follow, BatchSize::LargeInput);
        });
        let (mut index, mut compiler, mut renderer) = (index, Compiler::default(), Renderer::default());
        compiler.follow(&mut index);
        renderer.table(compiler.rules(), 1);
        let mut turn = 0;
        group.bench_function(BenchmarkId::new("one pod", pods), |b| {
            b.iter(|| {
                turn += 1;
                index.apply_pod(pod(0, 1, ["b", "a"][turn % 2]));
                renderer.steps(&compiler.follow(&mut index), 2)
            });
        });
    }
}

const PODS: usize = 20;
const LOCAL: usize = 110;

criterion_group!(all, benches);
criterion_main!(all);
