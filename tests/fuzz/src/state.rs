//! What the state file and the node's veths say, be it nonsense: an agent starts from it, or says that it cannot, and gives no
//! address to two.

use super::script::{Clock, Script};
use std::{collections::BTreeSet, time::Duration};
use weft::{
    ipam::{Allocator, Config, Found, Now, Request, Stored, record, seed::SeedPlan, span::Layout},
    linux::store::Table,
    types::{AttachmentKey, PodRef},
};

pub fn run(bytes: &[u8]) {
    let mut script = Script::new(bytes);
    let layout = Layout::new(super::ring::UNIVERSE.parse().expect("a universe"));
    let (mut stored, mut found) = (Stored::default(), Found::default());
    while let Some(what) = script.next() {
        let table = match what % 5 {
            0 => Table::Meta,
            1 => Table::Ring,
            2 => Table::Allocations,
            3 => Table::Resting,
            _ => {
                let alias = std::str::from_utf8(script.piece()).ok().and_then(|text| text.parse().ok());
                found.veths.extend(alias);
                found.bridge = (what & 16 != 0).then(|| [10, 32, 0, script.byte()].into());
                found.rebooted = what & 32 != 0;
                continue;
            }
        };
        let key = match what & 64 {
            0 => script.piece().to_vec(),
            _ => b"ring in force".to_vec(),
        };
        // One that cannot be read ends an agent's start.
        if record::read(&mut stored, table, &(key, script.piece().into()), &layout).is_err() {
            return;
        }
    }
    let config = Config {
        name: "n0".parse().expect("a name"),
        universe: layout.universe(),
        seeds: SeedPlan::default(),
        sealer: None,
        has_bootstrap: true,
        seeding: weft::ipam::Seeding::Given,
        assigned: None,
    };
    let mut clock = Clock::new();
    let now = Now { at: clock.0, unix_ms: 0 };
    let mut allocator = Allocator::new(config, stored, found, now).expect("there are no seeds");
    allocator.on_contact(now);
    let before = allocator.view().allocations;
    let mut given = BTreeSet::new();
    for pod in 0..4 {
        let key = AttachmentKey::new(&format!("new-{pod}"), "eth0").expect("a key");
        let request = Request { key, pod: PodRef::default(), wanted: vec![], ranges: vec![], mac: None };
        if let Ok(allocation) = allocator.reserve(request, now) {
            let fresh = !before.contains_key(&allocation.address) && given.insert(allocation.address);
            assert!(fresh || before.values().any(|known| known.owner == allocation.owner), "{allocation:?}");
        }
    }
    let at = clock.pass(Duration::from_secs(61));
    allocator.tick(Now { at, unix_ms: 61_000 });
    let view = allocator.view();
    let owners: BTreeSet<_> = view.allocations.values().map(|allocation| &allocation.owner).collect();
    assert_eq!(owners.len(), view.allocations.len(), "one user, one address");
}
