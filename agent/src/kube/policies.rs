//! Watches what network policies are made of: policies, namespaces, and all the cluster's pods.

use super::{client::WATCH, task::Handle, watches::Patience};
use futures_util::{Stream, StreamExt, stream::select_all};
use k8s_openapi::api::{
    core::v1::{Namespace, Pod},
    networking::v1::NetworkPolicy,
};
use kube::{
    Api,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use std::{fmt::Debug, pin::Pin};
use tokio::sync::mpsc;
use tracing::{debug, warn};

/// What the server has said of one kind.
#[derive(Debug)]
pub enum News<K> {
    /// All there are.
    All(Vec<K>),
    Applied(K),
    Gone(K),
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "each is taken in at once and few are kept")]
pub enum Heard {
    Policy(News<NetworkPolicy>),
    Namespace(News<Namespace>),
    Pod(News<Pod>),
}

/// Tells until nobody listens. A full channel makes the watch wait.
pub async fn hear(handle: Handle, tell: mpsc::Sender<Heard>) {
    let mut clients = handle.clients();
    loop {
        let client = clients.borrow_and_update().watches.clone();
        let mut heard = select_all([
            watched(Api::all(client.clone()), Heard::Policy),
            watched(Api::all(client.clone()), Heard::Namespace),
            watched(Api::all(client), Heard::Pod),
        ]);
        loop {
            tokio::select! {
                Some(heard) = heard.next() => if tell.send(heard).await.is_err() {
                    return;
                },
                changed = clients.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
                () = tell.closed() => return,
            }
        }
        debug!("network policies are watched by another way to the API server");
    }
}

fn watched<K>(api: Api<K>, heard: fn(News<K>) -> Heard) -> Pin<Box<dyn Stream<Item = Heard> + Send>>
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + Debug + Send + 'static,
{
    let config = watcher::Config::default().timeout(WATCH.as_secs() as u32);
    let events = watcher(api, config).backoff(Patience::default());
    let mut listed = Vec::new();
    let news = events.filter_map(move |event| {
        let news = match event {
            Ok(Event::Init) => {
                listed.clear();
                None
            }
            Ok(Event::InitApply(object)) => {
                listed.push(object);
                None
            }
            Ok(Event::InitDone) => Some(News::All(std::mem::take(&mut listed))),
            Ok(Event::Apply(object)) => Some(News::Applied(object)),
            Ok(Event::Delete(object)) => Some(News::Gone(object)),
            Err(error) => {
                warn!(%error, "what network policies are made of cannot be watched; what was heard goes on counting");
                None
            }
        };
        std::future::ready(news.map(heard))
    });
    Box::pin(news)
}
