//! The objects, and what has happened to them.
use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value, json};

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    pub group: &'static str,
    pub plural: &'static str,
    kind: &'static str,
    namespaced: bool,
}

#[derive(Default)]
pub struct Store {
    version: u64,
    uids: u64,
    objects: BTreeMap<Key, Value>,
    history: Vec<(Key, Change)>,
    /// Changes up to this version are forgotten.
    compacted: u64,
    /// By method.
    pub requests: HashMap<String, u64>,
}

type Key = (&'static str, String, String);

#[derive(Clone)]
pub struct Change {
    pub version: u64,
    /// As a watch is told.
    pub event: Value,
    /// What the object was before, if it was.
    before: Option<Value>,
}

/// Which objects are meant.
#[derive(Clone, Debug, Default)]
pub struct Selector {
    namespace: Option<String>,
    fields: Vec<(String, String)>,
}

/// What a client is told instead of an object.
#[derive(Debug)]
pub struct Failure {
    pub code: u16,
    reason: &'static str,
    message: String,
}

impl Kind {
    pub fn of(group: &str, plural: &str) -> Option<Self> {
        KINDS.iter().find(|kind| kind.group == group && kind.plural == plural).cloned()
    }

    fn api_version(&self) -> String {
        match self.group {
            "" => "v1".into(),
            POLICY => format!("{POLICY}/v1alpha2"),
            group => format!("{group}/v1"),
        }
    }

    fn key(&self, namespace: Option<&str>, name: &str) -> Key {
        let namespace = if self.namespaced { namespace.unwrap_or("default") } else { "" };
        (self.plural, namespace.into(), name.into())
    }
}

impl Store {
    pub fn version(&self) -> u64 {
        self.version
    }

    pub fn compact(&mut self) {
        self.compacted = self.version;
        self.history.clear();
    }

    pub fn get(&self, kind: &Kind, namespace: Option<&str>, name: &str) -> Result<Value, Failure> {
        self.objects.get(&kind.key(namespace, name)).cloned().ok_or_else(|| missing(kind, name))
    }

    pub fn all(&self, kind: &Kind, namespace: Option<&str>) -> impl Iterator<Item = &Value> {
        let here =
            move |key: &Key| key.0 == kind.plural && namespace.is_none_or(|namespace| key.1 == namespace);
        self.objects.iter().filter(move |(key, _)| here(key)).map(|(_, object)| object)
    }

    /// A page of objects; the token for the next is the last name on it.
    pub fn list(
        &self,
        kind: &Kind,
        selector: &Selector,
        query: &HashMap<String, String>,
    ) -> Result<Value, Failure> {
        let limit = query.get("limit").and_then(|text| text.parse().ok()).filter(|limit| *limit > 0);
        let after = query.get("continue").map(String::as_str).unwrap_or_default();
        let path = |key: &Key| format!("{}/{}", key.1, key.2);
        let all =
            self.objects.iter().filter(|(key, object)| key.0 == kind.plural && selector.matches(object));
        let all = all.map(|(key, object)| (path(key), object));
        let mut items: Vec<(String, &Value)> = all.filter(|(path, _)| path.as_str() > after).collect();
        let mut metadata = json!({"resourceVersion": self.version.to_string()});
        if let Some(limit) = limit
            && items.len() > limit
        {
            items.truncate(limit);
            metadata["continue"] = json!(items.last().map(|(path, _)| path));
        }
        let items: Vec<_> = items.into_iter().map(|(_, object)| object).collect();
        let list = format!("{}List", kind.kind);
        Ok(json!({"apiVersion": kind.api_version(), "kind": list, "metadata": metadata, "items": items}))
    }

    /// What has happened after a version, in order.
    pub fn since(&self, kind: &Kind, selector: &Selector, version: u64) -> Result<Vec<Change>, Failure> {
        if version < self.compacted {
            let message = format!("too old resource version: {version} ({})", self.compacted);
            return Err(Failure::new(410, "Expired", message));
        }
        let later =
            self.history.iter().filter(|(key, change)| key.0 == kind.plural && change.version > version);
        Ok(later.filter_map(|(_, change)| change.seen_by(selector)).collect())
    }

    pub fn create(
        &mut self,
        kind: &Kind,
        namespace: Option<&str>,
        mut object: Value,
    ) -> Result<Value, Failure> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_string();
        if name.is_empty() {
            return Err(Failure::new(422, "Invalid", "metadata.name: Required value".into()));
        }
        let key = kind.key(namespace, &name);
        if self.objects.contains_key(&key) {
            let message = format!("{} \"{name}\" already exists", kind.plural);
            return Err(Failure::new(409, "AlreadyExists", message));
        }
        self.uids += 1;
        let metadata = &mut object["metadata"];
        metadata["uid"] = json!(format!("00000000-0000-4000-8000-{:012x}", self.uids));
        metadata["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
        if kind.namespaced {
            metadata["namespace"] = json!(key.1);
        }
        Ok(self.put(kind, key, object, "ADDED"))
    }

    pub fn replace(
        &mut self,
        kind: &Kind,
        namespace: Option<&str>,
        name: &str,
        mut object: Value,
    ) -> Result<Value, Failure> {
        let key = kind.key(namespace, name);
        let before = self.objects.get(&key).ok_or_else(|| missing(kind, name))?;
        check_version(kind, name, &object, before)?;
        for fixed in ["uid", "creationTimestamp", "namespace"] {
            object["metadata"][fixed] = before["metadata"][fixed].clone();
        }
        Ok(self.put(kind, key, object, "MODIFIED"))
    }

    pub fn patch(
        &mut self,
        kind: &Kind,
        namespace: Option<&str>,
        name: &str,
        patch: &Value,
        strategic: bool,
        status: bool,
    ) -> Result<Value, Failure> {
        let key = kind.key(namespace, name);
        let before = self.objects.get(&key).ok_or_else(|| missing(kind, name))?;
        check_version(kind, name, patch, before)?;
        let mut object = before.clone();
        if status {
            merge(&mut object["status"], &patch["status"], strategic);
        } else {
            let status = object["status"].clone();
            merge(&mut object, patch, strategic);
            object["status"] = status;
        }
        Ok(self.put(kind, key, object, "MODIFIED"))
    }

    pub fn delete(&mut self, kind: &Kind, namespace: Option<&str>, name: &str) -> Result<Value, Failure> {
        let key = kind.key(namespace, name);
        let mut object = self.objects.remove(&key).ok_or_else(|| missing(kind, name))?;
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let event = json!({"type": "DELETED", "object": object});
        self.history.push((key, Change { version: self.version, event, before: None }));
        Ok(object)
    }

    fn put(&mut self, kind: &Kind, key: Key, mut object: Value, what: &str) -> Value {
        self.version += 1;
        (object["apiVersion"], object["kind"]) = (json!(kind.api_version()), json!(kind.kind));
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let event = json!({"type": what, "object": object});
        let before = self.objects.insert(key.clone(), object.clone());
        self.history.push((key, Change { version: self.version, event, before }));
        object
    }
}

impl Change {
    /// An object that comes into a selection is added to it, and one that leaves it is deleted from it.
    fn seen_by(&self, selector: &Selector) -> Option<Change> {
        let is = selector.matches(&self.event["object"]);
        let was = self.before.as_ref().is_some_and(|before| selector.matches(before));
        let what = match (self.event["type"].as_str(), was, is) {
            (Some("MODIFIED"), true, false) => "DELETED",
            (Some("MODIFIED"), false, true) => "ADDED",
            (Some(what), _, true) => what,
            _ => return None,
        };
        let event = json!({"type": what, "object": self.event["object"]});
        Some(Change { event, ..self.clone() })
    }
}

impl Selector {
    pub fn parse(namespace: Option<&str>, fields: &str) -> Self {
        let field = |text: &str| text.split_once('=').map(|(path, value)| (path.into(), value.into()));
        Self { namespace: namespace.map(Into::into), fields: fields.split(',').filter_map(field).collect() }
    }

    /// The one object that is meant, if it is one.
    pub fn name(&self) -> Option<&str> {
        self.fields.iter().find(|(path, _)| path == "metadata.name").map(|(_, name)| name.as_str())
    }

    fn matches(&self, object: &Value) -> bool {
        let at = |path: &str| path.split('.').fold(object, |object, part| &object[part]);
        self.namespace.as_deref().is_none_or(|namespace| object["metadata"]["namespace"] == namespace)
            && self.fields.iter().all(|(path, value)| at(path).as_str().unwrap_or_default() == value)
    }
}

impl Failure {
    pub fn new(code: u16, reason: &'static str, message: String) -> Self {
        Self { code, reason, message }
    }

    pub fn status(&self) -> Value {
        json!({"apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
               "message": self.message, "reason": self.reason, "code": self.code})
    }
}

pub fn bookmark(kind: &Kind, version: u64) -> Value {
    let metadata = json!({"resourceVersion": version.to_string()});
    json!({"type": "BOOKMARK", "object": {"apiVersion": kind.api_version(), "kind": kind.kind, "metadata": metadata}})
}

fn missing(kind: &Kind, name: &str) -> Failure {
    Failure::new(404, "NotFound", format!("{} \"{name}\" not found", kind.plural))
}

fn check_version(kind: &Kind, name: &str, given: &Value, there: &Value) -> Result<(), Failure> {
    match given["metadata"]["resourceVersion"].as_str() {
        Some(version) if !version.is_empty() && there["metadata"]["resourceVersion"] != version => {
            let message = format!(
                "Operation cannot be fulfilled on {} \"{name}\": the object has been modified; please apply your changes \
                 to the latest version and try again",
                kind.plural
            );
            Err(Failure::new(409, "Conflict", message))
        }
        _ => Ok(()),
    }
}

/// RFC 7386; strategically, conditions and addresses are merged by their type.
fn merge(into: &mut Value, patch: &Value, strategic: bool) {
    let Value::Object(patch) = patch else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = Value::Object(Map::new());
    }
    for (key, value) in patch {
        if value.is_null() {
            into.as_object_mut().and_then(|object| object.remove(key));
            continue;
        }
        match (&mut into[key.as_str()], value) {
            (Value::Array(there), Value::Array(items))
                if strategic && (key == "conditions" || key == "addresses") =>
            {
                for item in items {
                    match there.iter_mut().find(|other| other["type"] == item["type"]) {
                        Some(other) => merge(other, item, strategic),
                        None => there.push(item.clone()),
                    }
                }
            }
            (there, value) => merge(there, value, strategic),
        }
    }
}

const fn kind(group: &'static str, plural: &'static str, kind: &'static str, namespaced: bool) -> Kind {
    Kind { group, plural, kind, namespaced }
}

pub const RBAC: &str = "rbac.authorization.k8s.io";

const POLICY: &str = "policy.networking.k8s.io";

const KINDS: [Kind; 14] = [
    kind("", "configmaps", "ConfigMap", true),
    kind("", "endpoints", "Endpoints", true),
    kind("", "events", "Event", true),
    kind("", "namespaces", "Namespace", false),
    kind("", "nodes", "Node", false),
    kind("", "pods", "Pod", true),
    kind("", "secrets", "Secret", true),
    kind("", "serviceaccounts", "ServiceAccount", true),
    kind("networking.k8s.io", "networkpolicies", "NetworkPolicy", true),
    kind(POLICY, "clusternetworkpolicies", "ClusterNetworkPolicy", false),
    kind(RBAC, "clusterrolebindings", "ClusterRoleBinding", false),
    kind(RBAC, "clusterroles", "ClusterRole", false),
    kind(RBAC, "rolebindings", "RoleBinding", true),
    kind(RBAC, "roles", "Role", true),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(plural: &str) -> Kind {
        Kind::of("", plural).unwrap()
    }

    #[test]
    fn of_two_updates_that_begin_with_one_version_the_second_fails() {
        let (mut store, maps) = (Store::default(), kind("configmaps"));
        let made = store.create(&maps, Some("a"), json!({"metadata": {"name": "m"}})).unwrap();
        assert_eq!(store.create(&maps, Some("a"), made.clone()).unwrap_err().code, 409);
        assert!(store.replace(&maps, Some("a"), "m", made.clone()).is_ok());
        assert_eq!(store.replace(&maps, Some("a"), "m", made).unwrap_err().reason, "Conflict");
        assert_eq!(store.get(&maps, Some("b"), "m").unwrap_err().code, 404);
    }

    #[test]
    fn pages_hold_everything_once() {
        let (mut store, pods) = (Store::default(), kind("pods"));
        for n in 0..5 {
            store.create(&pods, None, json!({"metadata": {"name": format!("p{n}")}})).unwrap();
        }
        let (mut query, mut names) = (HashMap::from([("limit".to_string(), "2".to_string())]), Vec::new());
        loop {
            let page = store.list(&pods, &Selector::default(), &query).unwrap();
            let items = page["items"].as_array().unwrap();
            names.extend(items.iter().map(|item| item["metadata"]["name"].as_str().unwrap().to_string()));
            match page["metadata"]["continue"].as_str() {
                Some(token) => query.insert("continue".into(), token.into()),
                None => break,
            };
        }
        assert_eq!(names, ["p0", "p1", "p2", "p3", "p4"]);
    }

    #[test]
    fn who_leaves_a_selection_is_deleted_from_it() {
        let (mut store, pods) = (Store::default(), kind("pods"));
        let selector = Selector::parse(None, "spec.nodeName=a");
        let types = |store: &Store| -> Vec<String> {
            let changes = store.since(&pods, &selector, 0).unwrap();
            changes.iter().map(|change| change.event["type"].as_str().unwrap().into()).collect()
        };
        store.create(&pods, None, json!({"metadata": {"name": "p"}})).unwrap();
        assert!(types(&store).is_empty());
        for node in ["a", "b"] {
            store.patch(&pods, None, "p", &json!({"spec": {"nodeName": node}}), false, false).unwrap();
        }
        assert_eq!(types(&store), ["ADDED", "DELETED"]);
        store.compact();
        assert_eq!(store.since(&pods, &selector, 1).err().unwrap().code, 410);
    }

    #[test]
    fn conditions_are_merged_by_type_and_a_status_apart() {
        let (mut store, nodes) = (Store::default(), kind("nodes"));
        let node = json!({"metadata": {"name": "n"}, "spec": {"x": 1},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]}});
        store.create(&nodes, None, node).unwrap();
        let patch = json!({"status": {"conditions": [{"type": "NetworkUnavailable", "status": "False"}]}});
        let patched = store.patch(&nodes, None, "n", &patch, true, true).unwrap();
        assert_eq!(patched["status"]["conditions"].as_array().unwrap().len(), 2);
        let patched = store
            .patch(&nodes, None, "n", &json!({"spec": {"x": null}, "status": null}), false, false)
            .unwrap();
        assert_eq!(
            (patched["spec"].clone(), patched["status"]["conditions"][0]["type"].clone()),
            (json!({}), json!("Ready"))
        );
    }
}
