//! Who may do what, by the roles and bindings in the store, as the real server has it.
//!
//! A service account's token is its name: nobody here has anything to hide.
use serde_json::{Value, json};

use super::store::{Failure, Kind, RBAC, Store};

/// What somebody wants to do.
pub struct Wish<'a> {
    pub verb: &'static str,
    pub group: &'static str,
    /// With the part of it that is meant: `nodes/status`.
    pub resource: String,
    pub namespace: Option<&'a str>,
    /// Also of a list or watch whose field selector names one object.
    pub name: Option<&'a str>,
}

/// What a service account is given when it asks for a token.
pub fn token(account: &Value, mut request: Value) -> Value {
    let (namespace, name) = (&account["metadata"]["namespace"], &account["metadata"]["name"]);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let token = format!("{ACCOUNT}{}:{}", text(namespace), text(name));
    request["status"] = json!({"token": token, "expirationTimestamp": "2099-01-01T00:00:00Z"});
    request
}

/// # Errors
/// 403, in the real server's words.
pub fn check(store: &Store, authorization: &str, wish: &Wish<'_>) -> Result<(), Failure> {
    let Some(user) = authorization.strip_prefix("Bearer ") else { return Ok(()) };
    if bound(store, user, wish.namespace).any(|rule| allows(&rule, wish)) {
        return Ok(());
    }
    let Wish { verb, group, resource, namespace, name } = wish;
    let what = name.map_or(format!("{resource} is"), |name| format!("{resource} \"{name}\" is"));
    let place = namespace
        .map_or("at the cluster scope".into(), |namespace| format!("in the namespace \"{namespace}\""));
    let message = format!(
        "{what} forbidden: User \"{user}\" cannot {verb} resource \"{resource}\" in API group \"{group}\" {place}"
    );
    Err(Failure::new(403, "Forbidden", message))
}

/// The rules of all roles that somebody is bound to, everywhere and in a namespace.
fn bound<'a>(
    store: &'a Store,
    user: &'a str,
    namespace: Option<&'a str>,
) -> impl Iterator<Item = Value> + 'a {
    let of = |plural| Kind::of(RBAC, plural).expect("these kinds are known");
    let is_meant = move |binding: &&Value| {
        let subjects = binding["subjects"].as_array().into_iter().flatten();
        let mut names = subjects.filter(|subject| subject["kind"] == "ServiceAccount").map(|subject| {
            let text = |key: &str| subject[key].as_str().unwrap_or_default().to_string();
            format!("{ACCOUNT}{}:{}", text("namespace"), text("name"))
        });
        names.any(|name| name == user)
    };
    let everywhere: Vec<_> = store.all(&of("clusterrolebindings"), None).filter(is_meant).collect();
    let here: Vec<_> = match namespace {
        Some(_) => store.all(&of("rolebindings"), namespace).filter(is_meant).collect(),
        None => Vec::new(),
    };
    let rules = move |binding: &Value| {
        let role = &binding["roleRef"];
        let kind = if role["kind"] == "ClusterRole" { "clusterroles" } else { "roles" };
        let role = store.get(&of(kind), namespace, role["name"].as_str().unwrap_or_default());
        role.ok().and_then(|role| role["rules"].as_array().cloned()).unwrap_or_default()
    };
    everywhere.into_iter().chain(here).flat_map(rules)
}

fn allows(rule: &Value, wish: &Wish<'_>) -> bool {
    let has = |key: &str, wanted: &str| {
        rule[key].as_array().is_some_and(|all| all.iter().any(|one| one == wanted || one == "*"))
    };
    let named = rule["resourceNames"].as_array().is_none_or(|names| {
        names.is_empty() || wish.name.is_some_and(|wanted| names.iter().any(|name| name == wanted))
    });
    has("verbs", wish.verb) && has("apiGroups", wish.group) && has("resources", &wish.resource) && named
}

const ACCOUNT: &str = "system:serviceaccount:";

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> Store {
        let mut store = Store::default();
        let mut make = |plural, namespace, object| {
            store.create(&Kind::of(RBAC, plural).unwrap(), namespace, object).unwrap();
        };
        let subjects = json!([{"kind": "ServiceAccount", "namespace": "a", "name": "weft"}]);
        make(
            "clusterroles",
            None,
            json!({"metadata": {"name": "all"}, "rules": [
            {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list"]}]}),
        );
        make(
            "clusterrolebindings",
            None,
            json!({"metadata": {"name": "all"}, "subjects": subjects,
            "roleRef": {"kind": "ClusterRole", "name": "all"}}),
        );
        make(
            "roles",
            Some("a"),
            json!({"metadata": {"name": "one"}, "rules": [
            {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["s"], "verbs": ["watch"]}]}),
        );
        make(
            "rolebindings",
            Some("a"),
            json!({"metadata": {"name": "one"}, "subjects": subjects,
            "roleRef": {"kind": "Role", "name": "one"}}),
        );
        store
    }

    #[test]
    fn a_right_is_a_verb_on_a_resource_in_a_place_by_a_name() {
        let store = store();
        let may = |user: &str, verb, resource: &str, namespace, name| {
            let wish = Wish { verb, group: "", resource: resource.into(), namespace, name };
            check(&store, &format!("Bearer {ACCOUNT}{user}"), &wish).is_ok()
        };
        assert!(may("a:weft", "list", "nodes", None, None) && may("a:weft", "get", "nodes", None, Some("n")));
        assert!(!may("a:weft", "patch", "nodes", None, Some("n")), "another verb");
        assert!(!may("a:weft", "get", "nodes/status", None, Some("n")), "a part of it");
        assert!(!may("b:weft", "list", "nodes", None, None), "another account");
        assert!(may("a:weft", "watch", "secrets", Some("a"), Some("s")));
        assert!(!may("a:weft", "watch", "secrets", Some("a"), None), "all of them");
        assert!(!may("a:weft", "watch", "secrets", Some("b"), Some("s")), "elsewhere");
        let wish =
            Wish { verb: "delete", group: "", resource: "nodes".into(), namespace: None, name: Some("n") };
        let why = check(&store, "Bearer x", &wish).unwrap_err().status()["message"].to_string();
        assert!(
            why.contains(r#"cannot delete resource \"nodes\" in API group \"\" at the cluster scope"#),
            "{why}"
        );
        assert!(check(&store, "", &wish).is_ok(), "an administrator");
    }
}
