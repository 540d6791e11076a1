//! The environment: `CNI_*`, checked before anything else happens.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::failure::{Failure, code};
use std::{collections::BTreeMap, path::PathBuf};
use weft::types::{AttachmentKey, PodRef};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

/// What the runtime asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    pub command: Command,
    /// Of ADD, DEL and CHECK.
    pub attachment: Option<AttachmentKey>,
    /// Of ADD and CHECK; of DEL only while the namespace is there.
    pub netns: Option<PathBuf>,
    pub args: Args,
}

/// `CNI_ARGS`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    pub pod: PodRef,
    pub ip: Option<String>,
    pub mac: Option<String>,
}

impl Call {
    /// Parses what `variable` answers; none if there is no command at all.
    ///
    /// # Errors
    /// Code 4, naming all variables that are missing, or the one that is invalid.
    pub fn parse(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, Failure> {
        let given = |name: &str| variable(name).filter(|value| !value.is_empty());
        let Some(command) = given("CNI_COMMAND") else { return Ok(None) };
        let command = match command.as_str() {
            "ADD" => Command::Add,
            "DEL" => Command::Del,
            "CHECK" => Command::Check,
            "GC" => Command::Gc,
            "STATUS" => Command::Status,
            "VERSION" => Command::Version,
            other => {
                let msg = format!("CNI_COMMAND `{other}` is none of ADD, DEL, CHECK, GC, STATUS, VERSION");
                return Err(Failure::new(code::ENVIRONMENT, msg));
            }
        };
        let missing: Vec<_> =
            command.required().iter().copied().filter(|name| given(name).is_none()).collect();
        if !missing.is_empty() {
            let msg = format!("required environment variables are missing: {}", missing.join(", "));
            return Err(Failure::new(code::ENVIRONMENT, msg));
        }
        let mut call = Self { command, attachment: None, netns: None, args: Args::default() };
        if let Command::Add | Command::Del | Command::Check = command {
            let (id, ifname) = (given("CNI_CONTAINERID"), given("CNI_IFNAME"));
            let key = AttachmentKey::new(&id.unwrap_or_default(), &ifname.unwrap_or_default());
            call.attachment = Some(key.map_err(invalid("CNI_CONTAINERID and CNI_IFNAME"))?);
            call.netns = given("CNI_NETNS").map(PathBuf::from);
        }
        if command == Command::Add {
            call.args = Args::parse(&given("CNI_ARGS").unwrap_or_default())?;
        }
        Ok(Some(call))
    }
}

impl Command {
    fn required(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"],
            Self::Del => &["CNI_CONTAINERID", "CNI_IFNAME"],
            Self::Gc | Self::Status | Self::Version => &[],
        }
    }
}

impl Args {
    /// `KEY=value;KEY=value` in any order; keys that we don't know need `IgnoreUnknown=1`.
    fn parse(text: &str) -> Result<Self, Failure> {
        let invalid = invalid("CNI_ARGS");
        let mut pairs = BTreeMap::new();
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| invalid(format!("`{pair}` is not KEY=value")))?;
            pairs.insert(key, value.to_string());
        }
        let mut take = |key: &str| pairs.remove(key).filter(|value| !value.is_empty());
        let ignore =
            take("IgnoreUnknown").is_some_and(|value| value == "1" || value.eq_ignore_ascii_case("true"));
        let args = Self {
            pod: PodRef {
                uid: take("K8S_POD_UID").unwrap_or_default(),
                namespace: take("K8S_POD_NAMESPACE").unwrap_or_default(),
                name: take("K8S_POD_NAME").unwrap_or_default(),
            },
            ip: take("IP"),
            mac: take("MAC"),
        };
        take("K8S_POD_INFRA_CONTAINER_ID");
        match pairs.into_keys().next() {
            Some(key) if !ignore => Err(invalid(format!("`{key}` is unknown, and IgnoreUnknown is not set"))),
            _ => Ok(args),
        }
    }
}

fn invalid<E: std::fmt::Display>(what: &str) -> impl Fn(E) -> Failure {
    move |error| Failure::new(code::ENVIRONMENT, format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(variables: &[(&str, &str)]) -> Result<Option<Call>, Failure> {
        Call::parse(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn all_missing_variables_are_named() {
        let failure =
            parse(&[("CNI_COMMAND", "ADD"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "")]).unwrap_err();
        assert_eq!(failure.code, code::ENVIRONMENT);
        assert!(failure.msg.ends_with("CNI_CONTAINERID, CNI_NETNS"), "{}", failure.msg);
        assert_eq!(parse(&[]), Ok(None));
        assert!(parse(&[("CNI_COMMAND", "add")]).unwrap_err().msg.contains("`add`"));
        let del =
            [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "c"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "")];
        assert_eq!(parse(&del).unwrap().unwrap().netns, None);
    }

    #[test]
    fn cni_args_come_in_any_order() {
        let pod =
            |text: &str| Args::parse(text).map(|args| (args.pod.uid, args.pod.namespace, args.pod.name));
        let expected = Ok(("u".to_string(), "ns".to_string(), "web".to_string()));
        assert_eq!(pod("IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web;K8S_POD_UID=u"), expected);
        assert_eq!(
            pod("K8S_POD_UID=u;X=y;K8S_POD_NAME=web;IgnoreUnknown=true;K8S_POD_NAMESPACE=ns;"),
            expected
        );
        assert!(pod("X=y").unwrap_err().msg.contains("`X`"));
        assert!(pod("K8S_POD_UID").unwrap_err().msg.contains("KEY=value"));
        assert_eq!(Args::parse("IP=10.32.0.9").unwrap().ip.as_deref(), Some("10.32.0.9"));
    }
}
