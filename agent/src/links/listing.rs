//! Reads what `nft -j list …` prints.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::firewall::{Chain, Element, Family, Firewall, NAME, Rule, Table};
use serde::Deserialize;

#[derive(Debug, thiserror::Error)]
#[error("`nft -j list` printed what is not understood: {0}")]
pub struct InvalidListing(#[from] serde_json::Error);

impl Firewall {
    /// Adds what one listing shows: `list chains` (all tables' chains), or `list table …` of one of ours.
    pub fn read(&mut self, json: &str) -> Result<(), InvalidListing> {
        let listing: Listing = serde_json::from_str(json)?;
        for object in listing.nftables {
            match object {
                Object::Chain(chain) => self.read_chain(chain),
                Object::Set(set) => self.read_set(set),
                Object::Rule(rule) => self.read_rule(rule),
                Object::Other {} => {}
            }
        }
        Ok(())
    }

    fn read_chain(&mut self, chain: ChainObject) {
        let policy = chain.policy.unwrap_or_default();
        let Some(table) = self.table(&chain.family, &chain.table) else {
            if chain.hook.as_deref() == Some("forward") && policy == "drop" {
                self.dropping.insert(format!("{} {} {}", chain.family, chain.table, chain.name));
            }
            return;
        };
        table.chains.entry(chain.name).or_insert_with(|| Chain {
            kind: chain.kind.unwrap_or_default(),
            hook: chain.hook.unwrap_or_default(),
            priority: chain.prio.unwrap_or_default(),
            policy,
            rules: Vec::new(),
        });
    }

    fn read_set(&mut self, set: SetObject) {
        let Some(table) = self.table(&set.family, &set.table) else { return };
        let elements = set.elem.into_iter().filter_map(|value| {
            let [port, mac, address] = serde_json::from_value::<Concat>(value).ok()?.concat;
            Some(Element { port, mac: mac.parse().ok()?, address: address.parse().ok()? })
        });
        table.sets.entry(set.name).or_default().extend(elements);
    }

    fn read_rule(&mut self, rule: RuleObject) {
        let Some(table) = self.table(&rule.family, &rule.table) else { return };
        let comment = rule.comment.unwrap_or_default();
        if let Some(chain) = table.chains.get_mut(&rule.chain) {
            chain.rules.push(Rule { comment, text: String::new() });
        }
    }

    fn table(&mut self, family: &str, name: &str) -> Option<&mut Table> {
        let family = Family::ALL.into_iter().find(|known| known.to_string() == family && name == NAME)?;
        let table = || Table { family, sets: Default::default(), chains: Default::default() };
        Some(self.tables.entry(family).or_insert_with(table))
    }
}

#[derive(Deserialize)]
struct Listing {
    nftables: Vec<Object>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Object {
    Chain(ChainObject),
    Set(SetObject),
    Rule(RuleObject),
    #[serde(untagged)]
    Other {},
}

#[derive(Deserialize)]
struct ChainObject {
    family: String,
    table: String,
    name: String,
    #[serde(rename = "type")]
    kind: Option<String>,
    hook: Option<String>,
    prio: Option<i64>,
    policy: Option<String>,
}

#[derive(Deserialize)]
struct SetObject {
    family: String,
    table: String,
    name: String,
    #[serde(default)]
    elem: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Concat {
    concat: [String; 3],
}

#[derive(Deserialize)]
struct RuleObject {
    family: String,
    table: String,
    chain: String,
    comment: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_tells_our_tables_and_others_drops() {
        let mut firewall = Firewall::default();
        firewall
            .read(
                r#"{"nftables": [{"metainfo": {"version": "1.0.6"}},
                {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "handle": 2, "type": "filter",
                           "hook": "forward", "prio": 0, "policy": "drop"}},
                {"chain": {"family": "ip", "table": "filter", "name": "DOCKER", "handle": 3}},
                {"chain": {"family": "inet", "table": "weft", "name": "forward", "handle": 1, "type": "filter",
                           "hook": "forward", "prio": -150, "policy": "accept"}}]}"#,
            )
            .unwrap();
        firewall
            .read(
                r#"{"nftables": [{"table": {"family": "bridge", "name": "weft", "handle": 2}},
                {"set": {"family": "bridge", "name": "pods4", "table": "weft", "handle": 2,
                         "type": ["ifname", "ether_addr", "ipv4_addr"],
                         "elem": [{"concat": ["wf1", "02:00:00:00:00:01", "10.32.0.2"]}]}},
                {"chain": {"family": "bridge", "table": "weft", "name": "prerouting", "handle": 1,
                           "type": "filter", "hook": "prerouting", "prio": -300, "policy": "accept"}},
                {"rule": {"family": "bridge", "table": "weft", "chain": "prerouting", "handle": 4,
                          "comment": "weft 1", "expr": [{"accept": null}]}}]}"#,
            )
            .unwrap();
        assert_eq!(firewall.dropping.iter().collect::<Vec<_>>(), ["ip filter FORWARD"]);
        let bridge = &firewall.tables[&Family::Bridge];
        assert_eq!(bridge.chains["prerouting"].rules[0].comment, "weft 1");
        assert_eq!(bridge.sets["pods4"].first().unwrap().port, "wf1");
        assert_eq!(firewall.tables[&Family::Inet].chains["forward"].priority, -150);
        assert!(firewall.read("nonsense").is_err());
    }
}
