//! Objects in a file: YAML documents or JSON, lists of objects among them.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::{
    cluster,
    convert::{self, Invalid},
    model::{ClusterPolicy, Namespace, Pod, Policy},
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::{collections::BTreeMap, fmt};

/// What a file describes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Objects {
    pub namespaces: Vec<Namespace>,
    pub pods: Vec<Pod>,
    pub policies: Vec<Policy>,
    pub cluster_policies: Vec<ClusterPolicy>,
}

/// What an object is known by: its kind, and `namespace/name`, or the name alone of what has no namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectKey {
    pub kind: String,
    pub name: String,
}

#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    #[error("this is neither YAML nor JSON: {0}")]
    Syntax(String),
    #[error(
        "`{0}` objects are not known here: NetworkPolicy, ClusterNetworkPolicy, Namespace, Pod, or a List of them"
    )]
    Kind(String),
    #[error("a {kind} does not have the form that Kubernetes gives it: {error}")]
    Form { kind: &'static str, error: serde_json::Error },
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

impl Objects {
    /// # Errors
    /// Something in it is no object that is known here, or one that the API server would not take.
    pub fn parse(text: &str) -> Result<Self, DocumentError> {
        let mut objects = Self::default();
        for document in documents(text)? {
            objects.add(document)?;
        }
        Ok(objects)
    }

    /// Each object of a text by kind and name, as it was written.
    ///
    /// # Errors
    /// As of [`Objects::parse`].
    pub fn split(text: &str) -> Result<BTreeMap<ObjectKey, Value>, DocumentError> {
        let mut split = BTreeMap::new();
        let mut waiting = documents(text)?;
        while let Some(mut document) = waiting.pop() {
            if document["kind"].as_str().is_some_and(|kind| kind.ends_with("List")) {
                if let Value::Array(items) = document["items"].take() {
                    waiting.extend(items);
                }
                continue;
            }
            let mut one = Self::default();
            one.add(document.clone())?;
            let policies = one.policies.iter().map(|it| ("NetworkPolicy", it.id.to_string()));
            let namespaces = one.namespaces.iter().map(|it| ("Namespace", it.name.clone()));
            let pods = one.pods.iter().map(|it| ("Pod", it.full_name()));
            let cluster = one.cluster_policies.iter().map(|it| (cluster::KIND, it.name.clone()));
            let policies = policies.chain(cluster);
            let key = policies.chain(namespaces).chain(pods).next().expect("one object was added");
            split.insert(ObjectKey { kind: key.0.into(), name: key.1 }, document);
        }
        Ok(split)
    }

    fn add(&mut self, mut document: Value) -> Result<(), DocumentError> {
        let kind = document["kind"].as_str().unwrap_or_default().to_string();
        match kind.as_str() {
            "NetworkPolicy" => self.policies.push(convert::policy(&read("NetworkPolicy", document)?)?),
            cluster::KIND => self.cluster_policies.push(cluster::policy(&read(cluster::KIND, document)?)?),
            "Namespace" => self.namespaces.push(convert::namespace(&read("Namespace", document)?)?),
            "Pod" => self.pods.push(convert::pod(&read("Pod", document)?)?),
            list if list.ends_with("List") => {
                let Value::Array(items) = document["items"].take() else { return Ok(()) };
                return items.into_iter().try_for_each(|item| self.add(item));
            }
            _ => return Err(DocumentError::Kind(kind)),
        }
        Ok(())
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

fn documents(text: &str) -> Result<Vec<Value>, DocumentError> {
    // Far faster, and what programs write.
    if let Ok(document) = serde_json::from_str(text) {
        return Ok(vec![document]);
    }
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(text).map_err(|error| DocumentError::Syntax(error.to_string()))?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

fn read<T: DeserializeOwned>(kind: &'static str, document: Value) -> Result<T, DocumentError> {
    serde_json::from_value(document).map_err(|error| DocumentError::Form { kind, error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_and_lists_are_read_alike() {
        let yaml = "kind: Namespace\nmetadata: {name: x}\n---\nkind: NetworkPolicy\nmetadata: {name: p, namespace: x}\nspec:\n  podSelector: {}\n";
        let objects = Objects::parse(yaml).unwrap();
        assert_eq!((objects.namespaces.len(), objects.policies.len(), objects.pods.len()), (1, 1, 0));
        let json = r#"{"kind":"List","items":[{"kind":"Namespace","metadata":{"name":"x"}},
            {"kind":"NetworkPolicy","metadata":{"name":"p","namespace":"x"},"spec":{"podSelector":{}}}]}"#;
        assert_eq!(Objects::parse(json).unwrap(), objects);
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let error = |text| Objects::parse(text).unwrap_err().to_string();
        assert!(error("kind: Deployment").starts_with("`Deployment` objects are not known"));
        assert!(error("kind: Pod\nmetadata: 7").starts_with("a Pod does not have the form"));
        assert!(error("a: [").starts_with("this is neither YAML nor JSON"));
    }
}
