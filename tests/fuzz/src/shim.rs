//! What a runtime hands to the shim: variables and a configuration.

use std::collections::BTreeMap;
use weft_cni::{
    config::{self, Config},
    env::Call,
};

/// Lines of `NAME=value`, an empty line, and what is on stdin.
pub fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (variables, stdin) = text.split_once("\n\n").unwrap_or((text, ""));
    let variables: BTreeMap<_, _> = variables.lines().filter_map(|line| line.split_once('=')).collect();
    let call = Call::parse(|name| variables.get(name).map(|value| value.to_string()));
    let (Ok(Some(call)), Ok(document)) = (call, serde_json::from_str(stdin)) else { return };
    if let Ok(version) = config::version(&document) {
        let failed = Config::parse(&document, call.command, &call.args).err();
        failed.map(|failure| failure.json(version).to_string());
    }
}
