//! What is kept on disk of what the API server has said, for starts while it cannot be reached.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    index::Index,
    model::{ClusterPolicy, Namespace, Pod, Policy},
};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    namespaces: Vec<Namespace>,
    pods: Vec<Pod>,
    policies: Vec<Policy>,
    #[serde(default)]
    cluster_policies: Vec<ClusterPolicy>,
}

impl Known {
    pub fn of(index: &Index) -> Self {
        Self {
            namespaces: index.namespaces().cloned().collect(),
            pods: index.pods().map(|pod| Pod::clone(pod)).collect(),
            policies: index.policies().values().map(|policy| Policy::clone(policy)).collect(),
            cluster_policies: index.cluster_policies().map(|policy| ClusterPolicy::clone(policy)).collect(),
        }
    }

    /// None where it cannot be read: then it is as if there were none.
    pub fn read(text: &str) -> Option<Self> {
        serde_json::from_str(text)
            .ok()
            .filter(|known: &Self| known.pods.iter().all(|pod| !pod.uids.is_empty()))
    }

    pub fn write(&self) -> String {
        serde_json::to_string(self).expect("strings and numbers are JSON")
    }

    /// Has an index know it, as if it had been listed.
    pub fn teach(self, index: &mut Index) {
        index.reset_namespaces(self.namespaces);
        index.reset_pods(self.pods);
        index.reset_policies(self.policies);
        index.reset_cluster_policies(self.cluster_policies);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::document::Objects;

    #[test]
    fn what_is_written_is_read() {
        let text = r#"
kind: Namespace
metadata: {name: x, uid: u1, labels: {team: red}}
---
kind: Pod
metadata: {name: a, namespace: x, uid: p, labels: {app: a}}
spec: {containers: [{name: c, ports: [{name: web, containerPort: 80}]}]}
status: {podIPs: [{ip: 10.32.0.2}, {ip: "fd00::2"}]}
---
kind: NetworkPolicy
metadata: {name: p, namespace: x}
spec:
  podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [b]}]}
  ingress:
  - from:
    - ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}
    - namespaceSelector: {}
    ports: [{port: web}, {port: 80, endPort: 90, protocol: UDP}]
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: c}
spec:
  tier: Baseline
  priority: 7
  subject: {namespaces: {}}
  egress: [{name: out, action: Pass, to: [{networks: ["::/0"]}]}]
"#;
        let Objects { namespaces, pods, policies, cluster_policies } = Objects::parse(text).unwrap();
        let mut index = Index::new(false);
        Known { namespaces, pods, policies, cluster_policies }.teach(&mut index);
        let known = Known::of(&index);
        assert_eq!(known.policies.len() + known.cluster_policies.len(), 2);
        assert_eq!(Known::read(&known.write()), Some(known.clone()));
        let mut again = Index::new(false);
        Known::read(&known.write()).unwrap().teach(&mut again);
        assert_eq!(Known::of(&again), known);
        assert_eq!(Known::read("half a fi"), None);
    }
}
