//! Cases through the engine alone: what it explains, and what its rules let pass.
use super::{
    Outcome,
    cases::{Case, Cell, Cluster, News},
};
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use weft::{
    policy::{
        Compiler, Index, Rules,
        document::Objects,
        explain,
        model::{Direction, Flow},
    },
    types::PodRef,
};

/// # Errors
/// A case is not one.
pub fn run(cases: &[Case]) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome::default();
    for case in cases {
        evaluate(case, &mut outcome).with_context(|| format!("case {}", case.id))?;
        outcome.cases += 1;
    }
    Ok(outcome)
}

fn evaluate(case: &Case, outcome: &mut Outcome) -> anyhow::Result<()> {
    let mut cluster = Cluster::of(case.model.as_ref().context("there is no model")?);
    let (mut index, mut compiler) = (Index::new(false), Compiler::default());
    for object in cluster.objects() {
        tell(&mut index, &News::Apply(object))?;
    }
    for (number, step) in case.steps.iter().enumerate() {
        for action in &step.actions {
            for news in cluster.act(action)? {
                tell(&mut index, &news)?;
                settle(&mut index, &cluster);
                compiler.follow(&mut index);
            }
        }
        settle(&mut index, &cluster);
        compiler.follow(&mut index);
        let mut all_anew = Index::new(false);
        for object in cluster.objects() {
            tell(&mut all_anew, &News::Apply(object))?;
        }
        settle(&mut all_anew, &cluster);
        let mut fresh = Compiler::default();
        fresh.follow(&mut all_anew);
        ensure!(fresh.rules() == compiler.rules(), "step {number}: rules differ from those made anew");
        for cell in cluster.cells(step)? {
            outcome.cells += 1;
            if let Some(why) = judge(&cell, &index, compiler.rules()) {
                outcome.wrong.push(format!("{} step {number} {cell}: {why}", case.id));
            }
        }
    }
    Ok(())
}

/// Every pod is on this node, so that its rules are for all.
fn settle(index: &mut Index, cluster: &Cluster) {
    let attached: BTreeMap<_, _> = cluster
        .objects()
        .iter()
        .filter(|object| object["kind"] == "Pod")
        .filter_map(|object| {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
            let metadata = &object["metadata"];
            let pod = PodRef {
                uid: text(&metadata["uid"]),
                namespace: text(&metadata["namespace"]),
                name: text(&metadata["name"]),
            };
            Some((object["status"]["podIPs"][0]["ip"].as_str()?.parse().ok()?, pod))
        })
        .collect();
    index.settle(attached);
}

fn tell(index: &mut Index, news: &News) -> anyhow::Result<()> {
    let (News::Apply(object) | News::Delete(object)) = news;
    let Objects { namespaces, pods, policies, cluster_policies } =
        Objects::parse(&json!({"kind": "List", "items": [object]}).to_string())?;
    match news {
        News::Apply(_) => {
            namespaces.into_iter().for_each(|it| index.apply_namespace(it));
            pods.into_iter().for_each(|it| index.apply_pod(it));
            policies.into_iter().for_each(|it| index.apply_policy(it));
            cluster_policies.into_iter().for_each(|it| index.apply_cluster_policy(it));
        }
        News::Delete(_) => {
            namespaces.iter().for_each(|it| index.delete_namespace(&it.name, &it.uid));
            pods.iter().for_each(|it| index.delete_pod(&it.uids[0]));
            policies.iter().for_each(|it| index.delete_policy(&it.id, &it.uid));
            cluster_policies.iter().for_each(|it| index.delete_cluster_policy(&it.name, &it.uid));
        }
    }
    Ok(())
}

fn judge(cell: &Cell<'_>, index: &Index, rules: &Rules) -> Option<String> {
    let flow = Flow { source: cell.source, destination: cell.destination, to: cell.service };
    let explained = explain(index, &flow);
    let by_rules = (rules.permit_in(Direction::Ingress, &flow), rules.permit_in(Direction::Egress, &flow));
    let said = (explained.ingress.allowed(), explained.egress.allowed());
    let expected = match cell.expected {
        'I' => (false, true),
        'E' => (true, false),
        'X' => (false, false),
        _ => (true, true),
    };
    let why = format!("egress {}; ingress {}", explained.egress, explained.ingress);
    if said != expected {
        return Some(format!("expected `{}`, explained as {why}", cell.expected));
    }
    (by_rules != expected)
        .then(|| format!("expected `{}`, the rules let pass {by_rules:?}; {why}", cell.expected))
}
