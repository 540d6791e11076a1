//! `weft agent`'s flags, on a host with one link.

use clap::{CommandFactory, FromArgMatches};
use std::cell::RefCell;
use weft::{
    cli::{Cli, Command},
    config::{Config, HostAddress, HostFacts, HostLink, HostRoute},
};

/// A flag or a value on each line.
pub fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let words = ["weft", "agent"].into_iter().chain(text.lines());
    let Ok(matches) = COMMAND.with_borrow_mut(|command| command.try_get_matches_from_mut(words)) else {
        return;
    };
    let Ok(cli) = Cli::from_arg_matches(&matches) else { return };
    let Command::Agent(args) = cli.command else { return };
    let device = || "eth0".to_string();
    let host = HostFacts {
        host_name: "host".into(),
        ipv6: true,
        cores: 2,
        links: vec![HostLink { device: device(), mtu: 1500 }],
        addresses: vec![HostAddress { device: device(), address: "192.0.2.1/24".parse().expect("a prefix") }],
        routes: vec![HostRoute {
            destination: "0.0.0.0/0".parse().expect("a prefix"),
            device: Some(device()),
            gateway: Some([192, 0, 2, 254].into()),
            source: None,
            metric: 0,
            protocol: 3,
        }],
    };
    match Config::check(&args, &host) {
        Ok(config) => assert!(config.endpoints.iter().all(|e| !config.universe.contains(e.0.ip()))),
        Err(errors) => assert!(!errors.to_string().is_empty()),
    }
}

thread_local! {
    /// Built once: that takes longer than to parse.
    static COMMAND: RefCell<clap::Command> = RefCell::new(Cli::command());
}
