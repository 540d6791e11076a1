//! One file per verb; here is what they have in common: check everything, then act.

mod add;
mod check;
mod del;
mod gc;
mod status;

use crate::{
    config::{self, Config},
    env::{Call, Command},
    failure::{Failure, code},
    result, stdin,
    version::Version,
};
use serde_json::Value;
use std::{future::Future, path::Path, time::Duration};
use weft::linux::netns::{Netns, NetnsError};

/// Does what the environment asks for and returns what to print. `version` becomes the request's as soon as it is
/// known, so that failures speak it too.
pub fn run(version: &mut Version) -> Result<Option<Value>, Failure> {
    let Some(call) = Call::parse(|name| std::env::var_os(name)?.into_string().ok())? else {
        eprintln!("weft-cni {}: attaches pods to the Weft overlay network", env!("CARGO_PKG_VERSION"));
        eprintln!("CNI protocol versions supported: {}", Version::list());
        return Ok(None);
    };
    if call.command == Command::Version {
        return versions().map(Some);
    }
    let document = stdin::document(deadline(call.command))?;
    *version = config::version(&document)?;
    refuse_what_the_version_lacks(call.command, *version)?;
    let config = Config::parse(&document, call.command, &call.args)?;
    match call.command {
        Command::Add => block_on(add::run(*version, call, config)).map(Some),
        Command::Del => block_on(del::run(call, config)).map(|()| None),
        Command::Check => block_on(check::run(call, config)).map(|()| None),
        Command::Gc => block_on(gc::run(config)).map(|()| None),
        Command::Status => block_on(status::run(config)).map(|()| None),
        Command::Version => unreachable!("answered above"),
    }
}

fn versions() -> Result<Value, Failure> {
    let asked = stdin::first_document()?;
    match asked.as_ref().map(|document| document.get("cniVersion").unwrap_or(&Value::Null)) {
        None | Some(Value::Null) => Ok(result::versions(Version::NEWEST.as_str())),
        Some(Value::String(text)) => Ok(result::versions(text)),
        Some(other) => Err(Failure::new(code::DECODE, format!("cniVersion {other} is not a string"))),
    }
}

fn refuse_what_the_version_lacks(command: Command, version: Version) -> Result<(), Failure> {
    let (exists, name, since) = match command {
        Command::Check => (version.has_check(), "CHECK", "0.4.0"),
        Command::Gc => (version.has_gc_and_status(), "GC", "1.1.0"),
        Command::Status => (version.has_gc_and_status(), "STATUS", "1.1.0"),
        Command::Add | Command::Del | Command::Version => return Ok(()),
    };
    let msg = format!("{name} exists since CNI {since}; the configuration says {}", version.as_str());
    if exists { Ok(()) } else { Err(Failure::new(code::INCOMPATIBLE_VERSION, msg)) }
}

/// Opens the pod's namespace, for good.
///
/// # Errors
/// Code 8 if it is none, or the host's own; code 4 if there is nothing.
fn open_netns(path: &Path) -> Result<Netns, Failure> {
    let netns = Netns::open(path).map_err(|error| match error {
        NetnsError::NotANamespace { .. } | NetnsError::NotANetwork { .. } => {
            Failure::new(code::BAD_NETNS, format!("CNI_NETNS: {error}"))
        }
        _ => Failure::new(code::ENVIRONMENT, format!("CNI_NETNS: {error}")),
    })?;
    if netns.is_same(&Netns::current()?)? {
        let msg = format!("CNI_NETNS: {} is the host's own network namespace", path.display());
        return Err(Failure::new(code::BAD_NETNS, msg));
    }
    Ok(netns)
}

/// How long a verb may take, from its start or from its last input on.
fn deadline(command: Command) -> Duration {
    Duration::from_secs(match command {
        Command::Add => 20,
        Command::Del | Command::Check | Command::Gc => 10,
        Command::Status | Command::Version => 5,
    })
}

fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime
        .map_err(|error| Failure::new(code::INTERNAL, format!("start the runtime: {error}")))?
        .block_on(work)
}
