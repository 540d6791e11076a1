//! What the server says of its own accord: of Nodes, of our pods, of what the agents agree on.
//!
//! ```text
//!   nodes ───────┐
//!   our pods ────┤ list, then watch; a watch that breaks goes on where it was, and where the
//!   ConfigMap ───┤ server does not know that any more (410) it lists again; waits grow to 10 s
//!   Secret ──────┘
//! ```

use super::{CONFIG_MAP, SECRET, client::WATCH, join::Settings};
use crate::types::PeerName;
use futures_util::{
    Stream, StreamExt,
    stream::{SelectAll, select_all},
};
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Secret};
use kube::{
    Api, Client,
    runtime::{
        WatchStreamExt,
        utils::Backoff,
        watcher::{self, Event, watcher},
    },
};
use std::{
    pin::Pin,
    time::{Duration, Instant},
};

/// One thing that the server has said.
#[expect(clippy::large_enum_variant, reason = "each is taken at once and none is kept")]
pub enum Said {
    Node(Event<Node>),
    Pod(Event<Pod>),
    Map(Event<ConfigMap>),
    Secret(Event<Secret>),
    Failed(watcher::Error),
}

impl Said {
    /// That a list begins is said before the server has been asked for it.
    pub fn is_an_answer(&self) -> bool {
        !matches!(
            self,
            Self::Node(Event::Init)
                | Self::Pod(Event::Init)
                | Self::Map(Event::Init)
                | Self::Secret(Event::Init)
        )
    }
}

pub type Watches = SelectAll<Pin<Box<dyn Stream<Item = Said> + Send>>>;

pub fn open(settings: &Settings, client: &Client) -> Watches {
    let config = || watcher::Config::default().timeout(WATCH.as_secs() as u32);
    let named = |name: &str| config().fields(&format!("metadata.name={name}"));
    let namespace = &settings.namespace;
    let mut watches = vec![
        stream(Api::all(client.clone()), config(), Said::Node),
        stream(Api::all(client.clone()), config().fields(&on_node(&settings.node)), Said::Pod),
        stream(Api::namespaced(client.clone(), namespace), named(CONFIG_MAP), Said::Map),
    ];
    if settings.keys_dir.is_some() {
        watches.push(stream(Api::namespaced(client.clone(), namespace), named(SECRET), Said::Secret));
    }
    select_all(watches)
}

/// Whether a watch was refused because the server has forgotten what it goes on from. Asked again it would ask for the same;
/// where an event of the watch says so, it does not.
pub fn is_expired(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410)
}

pub fn on_node(node: &PeerName) -> String {
    format!("spec.nodeName={node}")
}

fn stream<K>(
    api: Api<K>,
    config: watcher::Config,
    said: fn(Event<K>) -> Said,
) -> Pin<Box<dyn Stream<Item = Said> + Send>>
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let events = watcher(api, config).backoff(Patience::default());
    Box::pin(events.map(move |event| event.map_or_else(Said::Failed, said)))
}

/// Doubles from a third of a second to ten, with a part left to chance; begins anew after a while without failures.
#[derive(Default)]
pub(super) struct Patience {
    failures: u32,
    last: Option<Instant>,
}

impl Iterator for Patience {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        if self.last.is_none_or(|last| last.elapsed() >= FORGIVEN) {
            self.failures = 0;
        }
        let pause = (FIRST_PAUSE * (1 << self.failures.min(10))).min(LONGEST_PAUSE);
        (self.failures, self.last) = (self.failures + 1, Some(Instant::now()));
        Some(pause.mul_f64(rand::random_range(0.5..1.0)))
    }
}

impl Backoff for Patience {
    /// Called for whatever is no failure, also for what is said before the server has answered.
    fn reset(&mut self) {}
}

pub const FIRST_PAUSE: Duration = Duration::from_millis(300);
pub const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Longer than the longest pause and a call that fails at its end.
const FORGIVEN: Duration = Duration::from_secs(30);
