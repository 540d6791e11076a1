//! The network configuration on stdin, for our plugin.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use crate::{
    env::{Args, Command},
    failure::{Failure, code},
    prev_result::PrevResult,
    version::Version,
};
use ipnet::{Ipv4Subnets, Ipv6Subnets};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
};
use weft::types::{Mac, Prefix};

#[derive(Clone, Debug)]
pub struct Config {
    pub socket: PathBuf,
    pub run_dir: PathBuf,
    /// The pod's MTU, if less than the network's is wanted.
    pub mtu: Option<u32>,
    pub wish: Wish,
    /// Of CHECK.
    pub prev_result: Option<PrevResult>,
    /// Of GC: container id and interface name of what the runtime knows; none: it did not say.
    pub valid: Option<Vec<(String, String)>>,
}

/// What the runtime insists on, each from the first place that names it: `runtimeConfig`, `args.cni`, `CNI_ARGS`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    pub addresses: Vec<IpAddr>,
    pub ranges: Vec<Prefix>,
    pub mac: Option<Mac>,
    /// Of `args.cni` only.
    pub labels: BTreeMap<String, String>,
}

/// The document's version; a document without one means 0.1.0, which we don't speak.
///
/// # Errors
/// Code 6 if it is undecodable, code 1 if we don't speak it.
pub fn version(document: &Value) -> Result<Version, Failure> {
    match document.get("cniVersion") {
        None => "0.1.0".parse().map_err(|failure: Failure| Failure {
            msg: "cniVersion is missing, which means 0.1.0, which is not supported".into(),
            ..failure
        }),
        Some(Value::String(text)) => text.parse(),
        Some(other) => Err(Failure::new(code::DECODE, format!("cniVersion {other} is not a string"))),
    }
}

impl Config {
    /// # Errors
    /// Code 2, 6 or 7, naming the key and its value.
    pub fn parse(document: &Value, command: Command, args: &Args) -> Result<Self, Failure> {
        let name = document.get("name").unwrap_or(&Value::Null);
        if !name.as_str().is_some_and(is_network_name) {
            let msg = format!("name {name} must match ^[a-zA-Z0-9][a-zA-Z0-9_.-]*$");
            return Err(Failure::new(code::INVALID_CONFIG, msg));
        }
        let mut config = Self {
            socket: path(document, "socket", DEFAULT_SOCKET)?,
            run_dir: path(document, "runDir", DEFAULT_RUN_DIR)?,
            mtu: None,
            wish: Wish::default(),
            prev_result: None,
            valid: None,
        };
        match command {
            Command::Add => {
                config.refuse_what_is_not_ours(document)?;
                config.mtu = mtu(document)?;
                config.wish = Wish::parse(document, args)?;
            }
            Command::Check => {
                let missing =
                    || Failure::new(code::INVALID_CONFIG, "CHECK needs prevResult, and there is none");
                let prev_result = present(document.get("prevResult")).ok_or_else(missing)?;
                config.prev_result = Some(PrevResult::parse(prev_result)?);
                config.mtu = mtu(document)?;
            }
            Command::Gc => config.valid = valid_attachments(document)?,
            Command::Del | Command::Status | Command::Version => {}
        }
        Ok(config)
    }

    fn refuse_what_is_not_ours(&self, document: &Value) -> Result<(), Failure> {
        if let Some(prev_result) = present(document.get("prevResult")) {
            PrevResult::parse(prev_result)?;
            let msg = "weft-cni must be the first plugin of its list: ADD came with a prevResult";
            return Err(Failure::new(code::INVALID_CONFIG, msg));
        }
        match present(document.get("ipam")) {
            Some(ipam) if ipam.as_object().is_none_or(|ipam| !ipam.is_empty()) => {
                Err(refused("ipam", ipam, "the Weft agent hands out addresses itself"))
            }
            _ => Ok(()),
        }
    }
}

impl Wish {
    fn parse(document: &Value, args: &Args) -> Result<Self, Failure> {
        let runtime = document.get("runtimeConfig").unwrap_or(&Value::Null);
        let cni = document.pointer("/args/cni").unwrap_or(&Value::Null);
        let mut wish = Self::default();
        let ips = folded(runtime, "ips").or_else(|| folded(cni, "ips"));
        let from_args = args.ip.as_ref().map(|ip| ip.split(',').collect::<Vec<_>>().into());
        for text in array("ips", ips.or(from_args.as_ref()))? {
            let parsed = text.as_str().and_then(|text| text.split('/').next()?.parse::<IpAddr>().ok());
            let address = parsed.ok_or_else(|| refused("ips", text, "it is not an address"))?;
            if wish.addresses.iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
                return Err(refused("ips", text, "a pod gets one address of each family"));
            }
            wish.addresses.push(address);
        }
        let mac = folded(runtime, "mac").or_else(|| folded(cni, "mac")).cloned();
        let mac = mac.or_else(|| args.mac.clone().map(Value::String));
        if let Some(mac) = mac.filter(|mac| mac != "") {
            let parsed = mac.as_str().map(str::parse);
            let why = |error: &dyn std::fmt::Display| refused("mac", &mac, &error.to_string());
            wish.mac = Some(parsed.ok_or_else(|| why(&"it is not a string"))?.map_err(|error| why(&error))?);
        }
        for label in array("labels", folded(cni, "labels"))? {
            let text = |key| folded(label, key).and_then(Value::as_str).map(String::from);
            let pair = text("key").zip(text("value"));
            let (key, value) = pair.ok_or_else(|| refused("labels", label, "it has no key and value"))?;
            wish.labels.insert(key, value);
        }
        for set in array("ipRanges", folded(runtime, "ipRanges").or_else(|| folded(cni, "ipRanges")))? {
            for range in array("ipRanges", Some(set))? {
                wish.ranges.extend(prefixes(range)?);
            }
        }
        Ok(wish)
    }
}

/// `{"subnet": "10.32.0.0/24", "rangeStart": "10.32.0.10", "rangeEnd": "10.32.0.19"}` as prefixes.
fn prefixes(range: &Value) -> Result<Vec<Prefix>, Failure> {
    let bad = |why: &str| refused("ipRanges", range, why);
    let text = |key: &str| folded(range, key).and_then(Value::as_str);
    let subnet: Prefix =
        text("subnet").and_then(|text| text.parse().ok()).ok_or_else(|| bad("subnet is not a prefix"))?;
    let end = |key: &str, default: IpAddr| match text(key) {
        None | Some("") => Ok(default),
        Some(text) => text
            .parse::<IpAddr>()
            .ok()
            .filter(|ip| subnet.contains(ip))
            .ok_or_else(|| bad(&format!("{key} is not in the subnet"))),
    };
    let start = end("rangeStart", subnet.network())?;
    let stop = end("rangeEnd", subnet.broadcast())?;
    match (start, stop) {
        _ if start > stop => Err(bad("rangeStart is beyond rangeEnd")),
        (IpAddr::V4(start), IpAddr::V4(stop)) => {
            Ok(Ipv4Subnets::new(start, stop, 0).map(Prefix::from).collect())
        }
        (IpAddr::V6(start), IpAddr::V6(stop)) => {
            Ok(Ipv6Subnets::new(start, stop, 0).map(Prefix::from).collect())
        }
        _ => Err(bad("its ends are of different families")),
    }
}

/// Absent is not "none are valid"; a list that can't be read is an error, never an empty one.
fn valid_attachments(document: &Value) -> Result<Option<Vec<(String, String)>>, Failure> {
    let keys = ["cni.dev/valid-attachments", "cni.dev/attachments"];
    let Some((key, list)) = keys.iter().find_map(|key| Some((*key, present(document.get(*key))?))) else {
        return Ok(None);
    };
    let bad =
        |value: &Value| Failure::new(code::DECODE, format!("{key}: {value} is not a list of attachments"));
    let list = list.as_array().ok_or_else(|| bad(list))?;
    let attachment = |entry: &Value| {
        let text = |field: &str| Some(folded(entry, field)?.as_str()?.to_string());
        text("containerID").zip(text("ifname")).ok_or_else(|| bad(entry))
    };
    list.iter().map(attachment).collect::<Result<_, _>>().map(Some)
}

fn mtu(document: &Value) -> Result<Option<u32>, Failure> {
    let Some(value) = present(document.get("mtu")) else { return Ok(None) };
    let mtu = value.as_u64().filter(|mtu| *mtu == 0 || (68..=65535).contains(mtu));
    let bad = || Failure::new(code::INVALID_CONFIG, format!("mtu {value} is not between 68 and 65535"));
    Ok(Some(mtu.ok_or_else(bad)? as u32).filter(|mtu| *mtu != 0))
}

fn path(document: &Value, key: &str, default: &str) -> Result<PathBuf, Failure> {
    let absolute = |text: &&str| Path::new(text).is_absolute();
    match present(document.get(key)) {
        None => Ok(default.into()),
        Some(value) => value.as_str().filter(absolute).map(PathBuf::from).ok_or_else(|| {
            Failure::new(code::INVALID_CONFIG, format!("{key} {value} is not an absolute path"))
        }),
    }
}

fn is_network_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// Capability arguments come with capitals from some runtimes: the key's case does not matter.
fn folded<'a>(object: &'a Value, key: &str) -> Option<&'a Value> {
    let found = object.as_object()?.iter().find(|(name, _)| name.eq_ignore_ascii_case(key));
    present(found.map(|(_, value)| value))
}

fn array<'a>(key: &str, value: Option<&'a Value>) -> Result<&'a [Value], Failure> {
    match value {
        None => Ok(&[]),
        Some(value) => {
            value.as_array().map(Vec::as_slice).ok_or_else(|| refused(key, value, "it is not a list"))
        }
    }
}

fn present(value: Option<&Value>) -> Option<&Value> {
    value.filter(|value| !value.is_null())
}

fn refused(key: &str, value: &Value, why: &str) -> Failure {
    Failure::new(code::UNSUPPORTED_FIELD, format!("{key} {value} is refused: {why}"))
}

const DEFAULT_SOCKET: &str = "/run/weft/weft.sock";
const DEFAULT_RUN_DIR: &str = "/run/weft";

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn wish(document: Value) -> Result<Wish, Failure> {
        Wish::parse(&document, &Args::default())
    }

    #[test]
    fn capability_arguments_are_decoded_without_regard_to_case() {
        let lower = json!({"runtimeConfig": {"ips": ["10.32.0.9/24"], "mac": "02:42:ac:11:00:02",
            "ipRanges": [[{"subnet": "10.32.0.0/24", "rangeStart": "10.32.0.8", "rangeEnd": "10.32.0.15"}]]}});
        let upper = json!({"runtimeConfig": {"IPs": ["10.32.0.9/24"], "Mac": "02:42:ac:11:00:02",
            "IpRanges": [[{"Subnet": "10.32.0.0/24", "RangeStart": "10.32.0.8", "RangeEnd": "10.32.0.15"}]],
            "PortMappings": [{"HostPort": 8080, "ContainerPort": 80}]}});
        let parsed = wish(lower).unwrap();
        assert_eq!(parsed.addresses, ["10.32.0.9".parse::<IpAddr>().unwrap()]);
        assert_eq!(parsed.ranges, ["10.32.0.8/29".parse::<Prefix>().unwrap()]);
        assert_eq!(wish(upper), Ok(parsed));
    }

    #[test]
    fn a_refused_field_is_named_with_its_value() {
        for (document, word) in [
            (json!({"runtimeConfig": {"ips": ["10.32.0.300"]}}), "10.32.0.300"),
            (json!({"args": {"cni": {"ips": "10.32.0.3"}}}), "not a list"),
            (json!({"runtimeConfig": {"mac": "01:00:5e:00:00:01"}}), "01:00:5e:00:00:01"),
            (json!({"runtimeConfig": {"ipRanges": [[{"subnet": "x"}]]}}), "subnet"),
            (
                json!({"runtimeConfig": {"ipRanges": [[{"subnet": "10.0.0.0/24", "rangeEnd": "10.1.0.0"}]]}}),
                "rangeEnd",
            ),
        ] {
            let failure = wish(document).unwrap_err();
            assert_eq!(failure.code, code::UNSUPPORTED_FIELD);
            assert!(failure.msg.contains(word), "{}", failure.msg);
        }
    }

    #[test]
    fn absent_attachments_are_not_an_empty_list() {
        assert_eq!(valid_attachments(&json!({})), Ok(None));
        assert_eq!(valid_attachments(&json!({"cni.dev/valid-attachments": null})), Ok(None));
        assert_eq!(valid_attachments(&json!({"cni.dev/valid-attachments": []})), Ok(Some(vec![])));
        let one = Ok(Some(vec![("c".to_string(), "eth0".to_string())]));
        let entry = json!([{"containerID": "c", "ifname": "eth0"}]);
        assert_eq!(valid_attachments(&json!({"cni.dev/attachments": entry})), one);
        assert!(valid_attachments(&json!({"cni.dev/attachments": [{"containerID": "c"}]})).is_err());
        assert!(valid_attachments(&json!({"cni.dev/attachments": {}})).is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_configuration_makes_it_panic(
            key in proptest::sample::select(vec!["name", "mtu", "ips", "mac", "ipRanges", "prevResult",
                "cni.dev/attachments", "socket", "ipam", "cniVersion"]),
            text in "[0-9a-f:./\\[\\]{}\"a-z,-]{0,40}",
            number in proptest::num::i64::ANY,
        ) {
            let values = [json!(text), json!(number), json!([[{"subnet": text, "rangeEnd": text}]]), json!([text]),
                json!({"ips": [{"address": text, "interface": number}]}), serde_json::from_str(&text).unwrap_or_default()];
            for value in values {
                let document = json!({"cniVersion": "1.1.0", "name": "weft", key: value.clone(),
                    "runtimeConfig": {key: value.clone()}, "args": {"cni": {key: value}}});
                let _ = version(&document);
                for command in [Command::Add, Command::Check, Command::Del, Command::Gc] {
                    let _ = Config::parse(&document, command, &Args::default());
                }
            }
        }
    }
}
